// The bytes of a KV cache on the host: how large it is, and storing into it. Reading is attention's (kernels.h); which pages belong to
// which sequence is the engine's.
#ifndef TPSHARD_KERNELS_KV_H
#define TPSHARD_KERNELS_KV_H

#include "formats/model_desc.h"
#include "kernels/kernels.h"

#include <stdbool.h>
#include <stdint.h>

// What one position of one layer takes on a rank, on any backend. Latent attention keeps one row for all heads: keys without values.
struct kv_shape {
    int64_t heads, k_dim, v_dim; // v_dim: columns that attention reads as values
    bool latent;
};
static inline struct kv_shape kv_shape(const struct model_desc *desc, const struct rank_share *share)
{
    if (desc->latent.kv_rank > 0)
        return (struct kv_shape){1, desc->latent.kv_rank + desc->latent.rope_dim, desc->latent.kv_rank, true};
    return (struct kv_shape){share->num_kv_heads_local, desc->head_dim, desc->head_dim, false};
}

// Bytes of one value.
static inline uint64_t kv_format_bytes(enum kv_format format) { return format == KV_E4M3 ? 1 : 2; }
// Keys of one layer; values take as much, or nothing with latent attention.
static inline uint64_t kv_keys_bytes(const struct kv_shape *shape, int64_t num_pages, enum kv_format format)
{
    return (uint64_t)num_pages * (uint64_t)shape->heads * KV_PAGE_TOKENS * (uint64_t)shape->k_dim *
           kv_format_bytes(format);
}
static inline uint64_t kv_layer_bytes(const struct kv_shape *shape, int64_t num_pages, enum kv_format format)
{
    return (shape->latent ? 1 : 2) * kv_keys_bytes(shape, num_pages, format);
}
// Keys and values of all layers on the rank with this share.
static inline uint64_t kv_bytes(const struct model_desc *desc, const struct rank_share *share, int64_t num_pages,
                                enum kv_format format)
{
    struct kv_shape shape = kv_shape(desc, share);
    return (uint64_t)desc->num_layers * kv_layer_bytes(&shape, num_pages, format);
}

// Stores one position's keys and values, f32 [num_kv_heads][k_dim] and [num_kv_heads][v_dim], rounded to the format; v is NULL with latent
// attention. The position has a page.
void kv_store(const struct kv_view *kv, int64_t position, const float *k, const float *v);

#endif
