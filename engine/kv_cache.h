// Keys and values of one rank, in pages of KV_PAGE_TOKENS positions that sequences take from a common pool and give back.
// The page table of a sequence is the same for all layers. Every rank makes the same calls in the same order.
#ifndef TPSHARD_ENGINE_KV_CACHE_H
#define TPSHARD_ENGINE_KV_CACHE_H

#include "formats/error.h"
#include "kernels/kernels.h"

#include <stdint.h>

struct kv_cache;

// Bytes that a cache of this size takes on one rank.
uint64_t kv_cache_bytes(int64_t num_layers, int64_t num_kv_heads_local, int64_t head_dim, int64_t num_pages);
// num_sequences slots that share num_pages pages; no slot grows beyond max_tokens.
int kv_cache_create(struct kv_cache **out, int64_t num_layers, int64_t num_kv_heads_local, int64_t head_dim,
                    int64_t num_pages, int num_sequences, int64_t max_tokens, struct error *err);
void kv_cache_free(struct kv_cache *cache);

// Makes room for positions [0, tokens) of a sequence. ERR_MEMORY when no page is left, with both figures.
int kv_cache_reserve(struct kv_cache *cache, int sequence, int64_t tokens, struct error *err);
// Gives all pages of a sequence back.
void kv_cache_reset(struct kv_cache *cache, int sequence);

struct kv_view kv_cache_view(const struct kv_cache *cache, int64_t layer, int sequence);
// Stores one position's keys and values, f32 [num_kv_heads_local][head_dim] each, rounded to bfloat16. The position is reserved.
void kv_cache_store(struct kv_cache *cache, int64_t layer, int sequence, int64_t position, const float *k,
                    const float *v);

#endif
