// Attention over the pages of the KV cache: one function per instruction set (attention_<isa>.c, behind the kernel table), and what joins
// its results. What a query adds up and in which order: "attention" in kernels.h.
#ifndef TPSHARD_KERNELS_ATTENTION_H
#define TPSHARD_KERNELS_ATTENTION_H

#include "kernels/kernels.h"

#include <math.h>

typedef void attention_fn(struct attention_query *queries, int64_t count, const struct kv_view *kv, int64_t kv_head,
                          int64_t begin, int64_t end, const struct attention_scores *scores, float *room);
attention_fn attention_base, attention_avx2, attention_avx512;

// Floats of the room that a call needs.
int64_t attention_room_floats(int64_t k_dim, int64_t v_dim);

// Nothing summed up yet; out [v_dim] may hold anything.
static inline void attention_begin(struct attention_query *query)
{
    query->largest = -INFINITY;
    query->sum = 0;
}
// total takes what part has summed up; its positions follow total's. The first part is copied: joining parts one after the other gives the same
// bits wherever they were summed up.
void attention_join(struct attention_query *total, const struct attention_query *part, int64_t v_dim);
// out /= sum, with the sink's share (NULL: none). A query without positions gets zeros.
void attention_finish(struct attention_query *query, int64_t v_dim, const float *sink);

#endif
