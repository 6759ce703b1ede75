// The bytes of a KV cache on the host: how large it is, and storing into it. Reading is attention's (kernels.h); which pages belong to
// which sequence is the engine's.
#ifndef TPSHARD_KERNELS_KV_H
#define TPSHARD_KERNELS_KV_H

#include "formats/model_desc.h"
#include "kernels/kernels.h"

#include <stdint.h>

// Bytes of one value.
static inline uint64_t kv_format_bytes(enum kv_format format) { return format == KV_E4M3 ? 1 : 2; }
// Keys and values of all layers on the rank with this share, on any backend.
uint64_t kv_bytes(const struct model_desc *desc, const struct rank_share *share, int64_t num_pages,
                  enum kv_format format);
// Stores one position's keys and values, f32 [num_kv_heads][head_dim] each, rounded to the format. The position has a page.
void kv_store(const struct kv_view *kv, int64_t position, const float *k, const float *v);

#endif
