// Rows from the rank files of a shard directory: the slices that the ranks hold, joined again.
#ifndef TPSHARD_SHARD_SHARDS_SOURCE_H
#define TPSHARD_SHARD_SHARDS_SOURCE_H

#include "shard/payload_reader.h"
#include "shard/plan.h"
#include "shard/row_source.h"

struct shards_source_rank {
    char *path;
    struct shard_file *file;
    struct payload_reader *reader;
};

struct shards_source {
    struct row_source source;         // must be first
    const struct plan *plan;          // of the files that are read
    struct shards_source_rank *ranks; // [plan->num_ranks]
};

// Opens the rank files of dir and checks that each is laid out as the plan says; contents are not verified here.
// Success: shards_source_clear; plan must outlive it.
int shards_source_init(struct shards_source *out, const char *dir, const struct plan *plan, struct error *err);
void shards_source_clear(struct shards_source *source); // accepts a zeroed one

#endif
