// Making a shard directory: what `convert` and `reshard` have in common. They differ in where rows come from.
#ifndef TPSHARD_SHARD_BUILD_H
#define TPSHARD_SHARD_BUILD_H

#include "formats/error.h"
#include "formats/manifest.h"
#include "kernels/thread_pool.h"
#include "shard/extras.h"
#include "shard/plan.h"
#include "shard/progress.h"
#include "shard/row_source.h"

#include <stdbool.h>
#include <stdint.h>

struct build_options {
    const char *out_dir;
    bool force, resume, quiet;
    bool compress; // leaves that become shorter; needs disk for both forms while it works
    int threads;
};

struct build_input {
    const struct plan *plan;
    const struct row_source *source;
    const struct extras *extras;
    struct checksum128 key; // of everything that decides the output, for --resume
    const char *what;       // "convert"
    uint64_t source_bytes;  // for the report
    // Called when all weights are written: fills manifest->sources (and may wait for their hashes).
    int (*sources)(void *arg, struct manifest *manifest, struct error *err);
    // Called when work on the weights begins and when it has failed; NULL for none.
    int (*begin)(void *arg, const struct progress *progress, struct error *err);
    void (*fail)(void *arg);
    void *arg;
};

struct build_result {
    uint64_t rank_bytes, largest_rank_bytes; // of the rank files as they stand in the directory: all, and the largest
    uint64_t written_bytes, source_bytes, peak_memory_bytes;
    double seconds;
};

// Takes out_dir, writes every rank file, the extras and, last, the manifest. On failure or a signal nothing is
// left that could be taken for a model; a work folder stays only if --resume can use it, and the error says so.
int build_directory(struct build_result *result, const struct build_input *input, const struct build_options *options,
                    struct error *err);

const char *build_tool_name(void); // "tpshard 0.1.0 (commit)"

#endif
