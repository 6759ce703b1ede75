// What all ranks must agree on of that which computes: its sums, not its name. Hosts may have unlike processors: tables with the same sums go together,
// and where a device computes, the processor's table counts for nothing.
#ifndef TPSHARD_ENGINE_RANK_BACKENDS_H
#define TPSHARD_ENGINE_RANK_BACKENDS_H

#include "formats/error.h"
#include "kernels/backend.h"
#include "kernels/kernels.h"

#include <stdint.h>

// Of one rank, as rank 0 gets it. Both texts end with a 0.
struct rank_sums {
    char name[16], sums[16];
    uint32_t tables; // of its processor: kernels_auto_set
    uint32_t device; // 1: another backend than the processor's
};
void rank_sums_of(struct rank_sums *out, const struct backend *backend, const struct kernels *kernels);
// all [ranks], of which there is at least one. ERR_USAGE where sums differ: the first two ranks that do, what each computes with, and the --backend
// that all hosts can start with.
int rank_sums_compare(const struct rank_sums *all, int ranks, struct error *err);

#endif
