// Makes a compressed rank file of a raw one whose payload is complete: leaf by leaf, in memory that does not grow with the model.
#ifndef TPSHARD_SHARD_RANK_COMPRESS_H
#define TPSHARD_SHARD_RANK_COMPRESS_H

#include "formats/error.h"
#include "formats/manifest.h"
#include "kernels/thread_pool.h"
#include "shard/plan.h"
#include "shard/progress.h"

#include <stdbool.h>

struct rank_compress_input {
    const struct plan_rank *planned;
    uint64_t tensor_count;
    const struct shard_identity *identity;
    int raw_fd; // the payload stands there as the plan says
    const char *raw_path, *path;
    struct progress *progress; // counts payload
    bool keep; // path may hold the beginning of the same file, from an earlier run: what verifies is not made again
};

// Writes and syncs `path`; its bytes do not depend on the number of threads. *worth: some leaf became shorter; false: nothing did, and there
// is no such file. file receives size and root.
int rank_compress(bool *worth, struct manifest_file *file, const struct rank_compress_input *input,
                  struct thread_pool *pool, struct error *err);

#endif
