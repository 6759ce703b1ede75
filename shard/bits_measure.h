// The errors of a checkpoint's matrices in every candidate kind, measured on some of their rows. See bits.h.
#ifndef TPSHARD_SHARD_BITS_MEASURE_H
#define TPSHARD_SHARD_BITS_MEASURE_H

#include "kernels/thread_pool.h"
#include "shard/bits.h"
#include "shard/progress.h"
#include "shard/row_source.h"

// Replaces the errors in *bits. plan: the one bits_init got, for one rank, with matrices in bf16; source gives its rows. A matrix of more than
// BITS_ROWS rows is measured on so many, evenly spread; of more experts than BITS_EXPERTS so many. The result does not depend on the pool.
enum { BITS_ROWS = 512, BITS_EXPERTS = 16, BITS_EXPERT_ROWS = 64 };
int bits_measure(struct bits *bits, const struct plan *plan, const struct row_source *source, enum weight_scales scales,
                 struct thread_pool *pool, struct progress *progress, struct error *err);
// Source bytes (in bf16) that bits_measure reads: for a progress line.
uint64_t bits_measure_bytes(const struct plan *plan);

#endif
