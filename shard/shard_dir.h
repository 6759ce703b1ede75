// A shard directory that is there: its manifest and the heads of its rank files, checked against each other.
#ifndef TPSHARD_SHARD_SHARD_DIR_H
#define TPSHARD_SHARD_SHARD_DIR_H

#include "formats/error.h"
#include "formats/manifest.h"
#include "formats/shard_file.h"

#include <limits.h>

struct shard_dir {
    struct manifest *manifest;
    struct shard_file **files; // [manifest->num_ranks]; NULL for one that could not be opened
    char (*paths)[PATH_MAX];   // [manifest->num_ranks]
};

// Reads the manifest alone. Success: shard_dir_close.
int shard_dir_open(struct shard_dir *out, const char *path, struct error *err);
void shard_dir_close(struct shard_dir *dir); // accepts a zeroed one

// Opens the file of one rank and checks that it is the one that the manifest means (rank_file_open).
int shard_dir_open_rank(struct shard_dir *dir, uint32_t rank, struct error *err);

#endif
