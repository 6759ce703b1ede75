// Which pages of the KV cache belong to which sequence: pages of KV_PAGE_TOKENS positions that sequences take from a common pool and give
// back. The page table of a sequence is the same for all layers. Every rank makes the same calls in the same order. The memory
// itself is the backend's.
#ifndef TPSHARD_ENGINE_KV_CACHE_H
#define TPSHARD_ENGINE_KV_CACHE_H

#include "formats/error.h"
#include "kernels/backend.h"

#include <stdint.h>

struct kv_cache;

// num_sequences slots that share num_pages pages; no slot grows beyond max_tokens.
int kv_cache_create(struct kv_cache **out, int64_t num_pages, int num_sequences, int64_t max_tokens, struct error *err);
void kv_cache_free(struct kv_cache *cache);

// Makes room for positions [0, tokens) of a sequence. ERR_MEMORY when no page is left, with both figures.
int kv_cache_reserve(struct kv_cache *cache, int sequence, int64_t tokens, struct error *err);
// Gives all pages of a sequence back.
void kv_cache_reset(struct kv_cache *cache, int sequence);

// The page tables, valid until the next reserve or reset.
struct kv_pages kv_cache_pages(const struct kv_cache *cache);

#endif
