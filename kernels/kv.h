// The bytes of a KV cache on the host: how large it is, which formats a model can have, rotating, and storing into it. Reading is
// attention's (kernels.h); which pages belong to which sequence is the engine's.
#ifndef TPSHARD_KERNELS_KV_H
#define TPSHARD_KERNELS_KV_H

#include "formats/error.h"
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

// The words of --kv-cache, as an option's choices and one by one.
#define KV_FORMAT_CHOICES "bf16|fp8|int8|int4"
static inline const char *kv_format_name(enum kv_format format)
{
    static const char *const names[KV_FORMAT_COUNT] = {"bf16", "fp8", "int8", "int4"};
    return names[format];
}
// A word that an option table has checked.
enum kv_format kv_format_from_name(const char *name);
// ERR_MODEL with the reason where a model cannot have its keys and values in this format.
int kv_format_check(const struct model_desc *desc, enum kv_format format, struct error *err);

// Bytes of so many values, an even number, scales apart.
static inline uint64_t kv_codes_bytes(uint64_t count, enum kv_format format)
{
    return format == KV_BF16 ? 2 * count : format == KV_INT4 ? count / 2 : count;
}
// Keys of one layer, and the scales of these; values take as much, or nothing with latent attention. A layer is keys, values, scales of
// keys, scales of values.
static inline uint64_t kv_keys_bytes(const struct kv_shape *shape, int64_t num_pages, enum kv_format format)
{
    return kv_codes_bytes((uint64_t)num_pages * (uint64_t)shape->heads * KV_PAGE_TOKENS * (uint64_t)shape->k_dim,
                          format);
}
static inline uint64_t kv_scales_bytes(const struct kv_shape *shape, int64_t num_pages, enum kv_format format)
{
    uint64_t count = (uint64_t)num_pages * (uint64_t)shape->heads * KV_PAGE_TOKENS;
    return kv_format_scaled(format) ? count * sizeof(uint16_t) : 0;
}
static inline uint64_t kv_layer_bytes(const struct kv_shape *shape, int64_t num_pages, enum kv_format format)
{
    return (shape->latent ? 1 : 2) *
           (kv_keys_bytes(shape, num_pages, format) + kv_scales_bytes(shape, num_pages, format));
}
// Keys and values of all layers on the rank with this share.
static inline uint64_t kv_bytes(const struct model_desc *desc, const struct rank_share *share, int64_t num_pages,
                                enum kv_format format)
{
    struct kv_shape shape = kv_shape(desc, share);
    return (uint64_t)desc->num_layers * kv_layer_bytes(&shape, num_pages, format);
}

// Rotates each head of x [heads][dim] in place as kernels/kv_codes.h says, and multiplies it by the factor.
void kv_rotate(float *x, int64_t heads, int64_t dim, float factor);
// The factor that makes the second rotation undo the first; of queries, too.
static inline float kv_rotate_back(int64_t dim) { return 1.0f / (float)(dim & -dim); }

// Stores one position's keys and values, f32 [num_kv_heads][k_dim] and [num_kv_heads][v_dim], rounded to the format, rotated before where it
// has scales (k and v are changed then); v is NULL with latent attention. The position has a page.
void kv_store(const struct kv_view *kv, int64_t position, float *k, float *v);

#endif
