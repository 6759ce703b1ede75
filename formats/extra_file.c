// See extra_file.h.
#include "formats/extra_file.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "formats/file_io.h"

static int refuse(const char *path, struct error *err)
{
    return error_set(err, ERR_CORRUPT, "%s: size or checksum differs from the manifest's; shard the model again", path);
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

int extra_file_read(uint8_t **out, uint64_t *num_bytes, const struct manifest *manifest, const char *dir,
                    const char *name, uint64_t cap_bytes, struct error *err)
{
    char path[PATH_MAX];
    uint8_t *bytes = NULL;
    uint64_t count = 0;
    const struct manifest_file *extra;
    *out = NULL;
    *num_bytes = 0;
    int length = snprintf(path, sizeof path, "%s/%s", dir, name);
    int rc = extra_file_find(&extra, manifest, name, cap_bytes, path, err);
    if (rc || !extra)
        return rc;
    if (length >= (int)sizeof path)
        return error_set(err, ERR_USAGE, "%s: the path is too long", dir);
    if ((rc = file_read_all(&bytes, &count, path, extra->bytes, ERR_CORRUPT, err)))
        return rc == ERR_CORRUPT ? refuse(path, err) : rc;
    if ((rc = extra_file_check(extra, bytes, count, path, err))) {
        free(bytes);
        return rc;
    }
    *out = bytes;
    *num_bytes = count;
    return 0;
}
