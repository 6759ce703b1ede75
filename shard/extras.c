// See extras.h.
#include "shard/extras.h"
#include "shard/extras_chat.h"

#include "formats/extra_file.h"
#include "formats/file_io.h"
#include "formats/tokenizer_compile.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { EXTRA_CAP_BYTES = 256 << 20 };

int extras_add(struct extras *extras, const char *name, uint8_t *bytes, uint64_t num_bytes, struct error *err)
{
    struct extra extra = {strdup(name), bytes, num_bytes};
    if (!extra.name || extras->count == EXTRAS_MAX) {
        int rc = extra.name ? error_set(err, ERR_CORRUPT, "%s: more than %d extra files", name, EXTRAS_MAX)
                            : error_set(err, ERR_MEMORY, "%s: out of memory for its name", name);
        free(extra.name);
        free(bytes);
        return rc;
    }
    size_t at = extras->count++;
    for (; at > 0 && strcmp(extras->files[at - 1].name, name) > 0; at--)
        extras->files[at] = extras->files[at - 1];
    extras->files[at] = extra;
    return 0;
}

int extras_there(bool *there, char path[PATH_MAX], const char *dir, const char *name, struct error *err)
{
    if (snprintf(path, PATH_MAX, "%s/%s", dir, name) >= PATH_MAX)
        return error_set(err, ERR_IO, "%.80s...: the path is too long", dir);
    return file_is_there(there, path, err);
}

static int copy_if_there(struct extras *extras, const char *dir, const char *name, bool *copied, struct error *err)
{
    char path[PATH_MAX];
    uint8_t *bytes;
    uint64_t num_bytes;
    int rc;
    if ((rc = extras_there(copied, path, dir, name, err)) || !*copied ||
        (rc = file_read_all(&bytes, &num_bytes, path, EXTRA_CAP_BYTES, ERR_MODEL, err)))
        return rc;
    return extras_add(extras, name, bytes, num_bytes, err);
}

static int add_tokenizer(struct extras *extras, bool *has_tokenizer, const char *model_dir, int64_t vocab_size,
                         struct error *err)
{
    char path[PATH_MAX], config_path[PATH_MAX];
    uint8_t *image;
    size_t image_bytes;
    bool has_config;
    int rc;
    if ((rc = extras_there(has_tokenizer, path, model_dir, "tokenizer.json", err)) || !*has_tokenizer ||
        (rc = extras_there(&has_config, config_path, model_dir, "tokenizer_config.json", err)) ||
        (rc =
             tokenizer_compile(&image, &image_bytes, path, has_config ? config_path : NULL, (uint64_t)vocab_size, err)))
        return rc;
    return extras_add(extras, "tokenizer.bin", image, image_bytes, err);
}

int extras_from_model(struct extras *out, bool *has_tokenizer, const char *model_dir, int64_t vocab_size,
                      struct error *err)
{
    struct extras extras = {.count = 0};
    bool copied;
    int rc;
    if ((rc = copy_if_there(&extras, model_dir, "config.json", &copied, err)) ||
        (rc = copy_if_there(&extras, model_dir, "generation_config.json", &copied, err)) ||
        (rc = extras_chat_add(&extras, model_dir, err)) ||
        (rc = add_tokenizer(&extras, has_tokenizer, model_dir, vocab_size, err)))
        extras_clear(&extras);
    else
        *out = extras;
    return rc;
}

int extras_from_shards(struct extras *out, const char *dir, const struct manifest *manifest, struct error *err)
{
    struct extras extras = {.count = 0};
    int rc = 0;
    for (size_t i = 0; !rc && i < manifest->num_extras; i++) {
        uint8_t *bytes;
        uint64_t num_bytes;
        if (!(rc = extra_file_load(&bytes, &num_bytes, &manifest->extras[i], dir, err)))
            rc = extras_add(&extras, manifest->extras[i].name, bytes, num_bytes, err);
    }
    if (rc)
        extras_clear(&extras);
    else
        *out = extras;
    return rc;
}

void extras_clear(struct extras *extras)
{
    for (size_t i = 0; i < extras->count; i++) {
        free(extras->files[i].name);
        free(extras->files[i].bytes);
    }
    extras->count = 0;
}

int extras_write(const struct extras *extras, const char *dir, struct manifest *manifest, struct error *err)
{
    int rc;
    manifest->extras = calloc(extras->count + 1, sizeof *manifest->extras);
    if (!manifest->extras)
        return error_set(err, ERR_MEMORY, "out of memory for the manifest");
    for (size_t i = 0; i < extras->count; i++) {
        const struct extra *extra = &extras->files[i];
        struct manifest_file *file = &manifest->extras[i];
        if ((rc = file_write_atomic(dir, extra->name, extra->bytes, extra->num_bytes, err)))
            return rc;
        *file = (struct manifest_file){strdup(extra->name), extra->num_bytes,
                                       checksum_whole(extra->bytes, extra->num_bytes)};
        manifest->num_extras++;
        if (!file->name)
            return error_set(err, ERR_MEMORY, "out of memory for the manifest");
    }
    return 0;
}
