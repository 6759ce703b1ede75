// See extra_file.h.
#include "formats/extra_file.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "formats/file_io.h"

static const struct manifest_file *find_extra(const struct manifest *manifest, const char *name)
{
    for (size_t i = 0; i < manifest->num_extras; i++)
        if (strcmp(manifest->extras[i].name, name) == 0)
            return &manifest->extras[i];
    return NULL;
}

int extra_file_read(uint8_t **out, uint64_t *num_bytes, const struct manifest *manifest, const char *dir,
                    const char *name, uint64_t cap_bytes, struct error *err)
{
    char path[PATH_MAX];
    uint8_t *bytes = NULL;
    uint64_t count = 0;
    const struct manifest_file *extra = find_extra(manifest, name);
    *out = NULL;
    *num_bytes = 0;
    if (!extra)
        return 0;
    if (snprintf(path, sizeof path, "%s/%s", dir, name) >= (int)sizeof path)
        return error_set(err, ERR_USAGE, "%s: the path is too long", dir);
    if (extra->bytes > cap_bytes)
        return error_set(err, ERR_CORRUPT, "%s: has %llu bytes in the manifest, at most %llu are accepted", path,
                         (unsigned long long)extra->bytes, (unsigned long long)cap_bytes);
    int rc = file_read_all(&bytes, &count, path, extra->bytes, ERR_CORRUPT, err);
    if (!rc && (count != extra->bytes || !checksum128_equal(checksum_whole(bytes, count), extra->hash)))
        rc = ERR_CORRUPT;
    if (rc) {
        free(bytes);
        return rc != ERR_CORRUPT
                   ? rc
                   : error_set(err, rc, "%s: size or checksum differs from the manifest's; shard the model again",
                               path);
    }
    *out = bytes;
    *num_bytes = count;
    return 0;
}
