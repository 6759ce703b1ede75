// See shard_dir.h.
#include "shard/shard_dir.h"

#include "formats/rank_file.h"

#include <stdio.h>
#include <stdlib.h>

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

int shard_dir_open_rank(struct shard_dir *dir, uint32_t rank, struct error *err)
{
    return rank_file_open(&dir->files[rank], dir->manifest, rank, dir->paths[rank], err);
}
