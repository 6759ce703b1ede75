// See extra_file.h.
#include "formats/extra_file.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "formats/file_io.h"
#include "formats/repair_hint.h"

static int refuse(const char *path, struct error *err)
{
    char hint[REPAIR_HINT_BYTES];
    return error_set(err, ERR_CORRUPT, "%s: size or checksum differs from the manifest's; %s", path,
                     repair_hint(hint, path));
}

int extra_file_find(const struct manifest_file **out, const struct manifest *manifest, const char *name,
                    uint64_t cap_bytes, const char *path, struct error *err)
{
    *out = NULL;
    for (size_t i = 0; i < manifest->num_extras && !*out; i++)
        if (strcmp(manifest->extras[i].name, name) == 0)
            *out = &manifest->extras[i];
    if (*out && (*out)->bytes > cap_bytes)
        return error_set(err, ERR_CORRUPT, "%s: has %llu bytes in the manifest, at most %llu are accepted", path,
                         (unsigned long long)(*out)->bytes, (unsigned long long)cap_bytes);
    return 0;
}

int extra_file_check(const struct manifest_file *extra, const void *bytes, uint64_t num_bytes, const char *path,
                     struct error *err)
{
    if (num_bytes == extra->bytes && checksum128_equal(checksum_whole(bytes, num_bytes), extra->hash))
        return 0;
    return refuse(path, err);
}

int extra_file_load(uint8_t **out, uint64_t *num_bytes, const struct manifest_file *extra, const char *dir,
                    struct error *err)
{
    char path[PATH_MAX];
    uint8_t *bytes;
    uint64_t count;
    *out = NULL;
    *num_bytes = 0;
    if (snprintf(path, sizeof path, "%s/%s", dir, extra->name) >= (int)sizeof path)
        return error_set(err, ERR_USAGE, "%s: the path is too long", dir);
    int rc = file_read_all(&bytes, &count, path, extra->bytes, ERR_CORRUPT, err);
    if (rc)
        return rc == ERR_CORRUPT ? refuse(path, err) : rc == ERR_IO ? repair_hint_unopened(path, err) : rc;
    if ((rc = extra_file_check(extra, bytes, count, path, err))) {
        free(bytes);
        return rc;
    }
    *out = bytes;
    *num_bytes = count;
    return 0;
}

int extra_file_read(uint8_t **out, uint64_t *num_bytes, const struct manifest *manifest, const char *dir,
                    const char *name, uint64_t cap_bytes, struct error *err)
{
    char path[PATH_MAX];
    const struct manifest_file *extra;
    *out = NULL;
    *num_bytes = 0;
    snprintf(path, sizeof path, "%s/%s", dir, name);
    int rc = extra_file_find(&extra, manifest, name, cap_bytes, path, err);
    return rc || !extra ? rc : extra_file_load(out, num_bytes, extra, dir, err);
}
