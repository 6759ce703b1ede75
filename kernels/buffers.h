// Sizes of a step's buffers and inputs on one rank, the same on every backend.
#ifndef TPSHARD_KERNELS_BUFFERS_H
#define TPSHARD_KERNELS_BUFFERS_H

#include "kernels/backend.h"

#include <stdbool.h>
#include <stdint.h>

static inline int64_t larger_of(int64_t a, int64_t b) { return a > b ? a : b; }

// Floats of one row of a buffer; 0 where the model has no use for it.
static inline int64_t buffer_width(const struct model_desc *desc, const struct rank_share *share, enum buffer buffer)
{
    const struct latent_desc *latent = &desc->latent;
    const struct experts_desc *experts = &desc->experts;
    int64_t kv_heads = latent->kv_rank > 0 ? 0 : share->num_kv_heads_local;
    switch (buffer) {
    case BUFFER_RESIDUAL:
    case BUFFER_PARTIAL:
    case BUFFER_NORMED:
        return desc->hidden_size;
    case BUFFER_QKV:
        return (share->num_heads_local + 2 * kv_heads) * desc->head_dim;
    case BUFFER_Q_LATENT:
        return latent->q_rank;
    case BUFFER_KV_LATENT:
        return latent->kv_rank > 0 ? latent->kv_rank + latent->rope_dim : 0;
    case BUFFER_SQUARES:
        return desc->qk_norm == QK_NORM_FULL ? 2 : 0;
    case BUFFER_GATE_UP:
        return 2 * larger_of(share->intermediate_local, share->shared_size_local);
    case BUFFER_ROUTER:
        return experts->num_experts > 0 ? experts->num_experts + experts->shared_gate : 0;
    case BUFFER_COUNT:
        break;
    }
    return 0;
}

// Columns of what attention puts out for o.
static inline int64_t attended_width(const struct model_desc *desc, const struct rank_share *share)
{
    return share->num_heads_local * (desc->latent.kv_rank > 0 ? desc->latent.v_dim : desc->head_dim);
}

// Columns of the widest input of a product, experts' own inputs apart.
static inline int64_t widest_input(const struct model_desc *desc, const struct rank_share *share)
{
    int64_t mlp = larger_of(share->intermediate_local, share->shared_size_local);
    return larger_of(larger_of(desc->hidden_size, desc->latent.q_rank), larger_of(attended_width(desc, share), mlp));
}

// (row, chosen expert) pairs of a step with `rows` rows; 0 without experts.
static inline int64_t expert_slots(const struct model_desc *desc, int64_t rows)
{
    return desc->experts.num_experts > 0 ? rows * desc->experts.experts_per_token : 0;
}

#endif
