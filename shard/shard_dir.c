// See shard_dir.h.
#include "shard/shard_dir.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int shard_dir_open(struct shard_dir *out, const char *path, struct error *err)
{
    struct shard_dir dir = {0};
    int rc = manifest_read(&dir.manifest, path, err);
    if (rc)
        return rc;
    dir.files = calloc(dir.manifest->num_ranks, sizeof *dir.files);
    dir.paths = calloc(dir.manifest->num_ranks, sizeof *dir.paths);
    if (!dir.files || !dir.paths) {
        shard_dir_close(&dir);
        return error_set(err, ERR_MEMORY, "%s: out of memory", path);
    }
    for (size_t rank = 0; rank < dir.manifest->num_ranks; rank++)
        snprintf(dir.paths[rank], PATH_MAX, "%s/%s", path, dir.manifest->ranks[rank].name);
    *out = dir;
    return 0;
}

void shard_dir_close(struct shard_dir *dir)
{
    for (size_t rank = 0; dir->files && rank < dir->manifest->num_ranks; rank++)
        shard_file_close(dir->files[rank]);
    free(dir->files);
    free(dir->paths);
    manifest_free(dir->manifest);
    *dir = (struct shard_dir){0};
}

static int check_hash(const char *path, const char *what, struct checksum128 found, struct checksum128 wanted,
                      const char *meaning, struct error *err)
{
    char found_hex[CHECKSUM128_HEX_DIGITS + 1], wanted_hex[CHECKSUM128_HEX_DIGITS + 1];
    if (checksum128_equal(found, wanted))
        return 0;
    checksum128_to_hex(found, found_hex);
    checksum128_to_hex(wanted, wanted_hex);
    return error_set(err, ERR_CORRUPT, "%s: its %s is %s, the manifest's %s: %s", path, what, found_hex, wanted_hex,
                     meaning);
}

int shard_dir_open_rank(struct shard_dir *dir, uint32_t rank, struct error *err)
{
    const struct manifest *manifest = dir->manifest;
    const char *path = dir->paths[rank];
    struct shard_file *file;
    int rc = shard_file_open(&file, path, err);
    if (rc)
        return rc;
    const struct shard_identity *identity = shard_file_identity(file);
    uint64_t file_bytes = shard_file_payload_offset(file) + shard_file_stored_bytes(file);
    if (identity->rank != rank || identity->tp_size != manifest->tp_size || identity->pp_size != manifest->pp_size)
        rc = error_set(err, ERR_CORRUPT,
                       "%s: it is the file of rank %u of %u, but rank %u of %u belongs there; files were mixed up",
                       path, identity->rank, identity->tp_size, rank, manifest->tp_size);
    else if ((rc = check_hash(path, "contract", checksum128_from_bytes(identity->contract), manifest->contract,
                              "the file comes from another run, model or setting", err)))
        ;
    else if (file_bytes != manifest->ranks[rank].bytes)
        rc = error_set(err, ERR_CORRUPT, "%s: the file has %llu bytes, the manifest says %llu", path,
                       (unsigned long long)file_bytes, (unsigned long long)manifest->ranks[rank].bytes);
    else
        rc = check_hash(path, "head's checksum", shard_file_root(file), manifest->ranks[rank].hash,
                        "the file was changed", err);
    if (rc)
        shard_file_close(file);
    else
        dir->files[rank] = file;
    return rc;
}
