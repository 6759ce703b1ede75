// What compression would bring: predicted sizes, and whether a start becomes quicker. Arithmetic on constants that bench/bench_leaf_code measured.
#ifndef TPSHARD_SHARD_COMPRESS_PLAN_H
#define TPSHARD_SHARD_COMPRESS_PLAN_H

#include "shard/memory_plan.h"

#include <stdbool.h>
#include <stdint.h>

struct compress_plan {
    uint64_t plain_bytes, stored_bytes; // of all rank files
    double ratio;                       // of their payloads
    double core_gb_s;                   // payload that one core decodes in a second
};
void compress_plan_make(struct compress_plan *out, const struct rank_memory *ranks, const struct plan *plan);

// Reading through a link of so many GB/s: as they are, the payload arrives at the link's rate B; compressed, at min(B / ratio, cores x what a
// core decodes).
struct compress_advice {
    bool helps;
    double rate_gb_s;             // of payload, compressed
    double plain_s, compressed_s; // for all rank files
};
struct compress_advice compress_plan_advise(const struct compress_plan *plan, double link_gb_s, int64_t cores);

#endif
