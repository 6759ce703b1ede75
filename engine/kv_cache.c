// The paged KV cache. See kv_cache.h.
#include "engine/kv_cache.h"

#include "formats/checked.h"
#include "formats/number_formats.h"

#include <stdlib.h>
#include <sys/mman.h>

struct kv_cache {
    int64_t num_layers, num_kv_heads, head_dim, num_pages, max_pages; // max_pages: of one sequence
    int num_sequences;
    uint16_t *memory;      // [num_layers][k, v][num_pages][num_kv_heads][KV_PAGE_TOKENS][head_dim]
    uint64_t memory_bytes; // mapped, so that untouched pages cost nothing
    int32_t *tables;       // [num_sequences][max_pages]
    int64_t *lengths;      // [num_sequences] pages in use
    int32_t *free_pages;   // stack
    int64_t num_free;
};

static int64_t page_elems(const struct kv_cache *c) { return c->num_kv_heads * KV_PAGE_TOKENS * c->head_dim; }

uint64_t kv_cache_bytes(int64_t num_layers, int64_t num_kv_heads_local, int64_t head_dim, int64_t num_pages)
{
    return (uint64_t)num_layers * 2 * (uint64_t)num_pages * (uint64_t)num_kv_heads_local * KV_PAGE_TOKENS *
           (uint64_t)head_dim * sizeof(uint16_t);
}

int kv_cache_create(struct kv_cache **out, int64_t num_layers, int64_t num_kv_heads_local, int64_t head_dim,
                    int64_t num_pages, int num_sequences, int64_t max_tokens, struct error *err)
{
    struct kv_cache *c = calloc(1, sizeof *c);
    if (!c)
        return error_set(err, ERR_MEMORY, "no memory for the KV cache");
    c->num_layers = num_layers;
    c->num_kv_heads = num_kv_heads_local;
    c->head_dim = head_dim;
    c->num_pages = num_pages;
    c->num_sequences = num_sequences;
    c->max_pages = (int64_t)div_up((uint64_t)max_tokens, KV_PAGE_TOKENS);
    c->memory_bytes = kv_cache_bytes(num_layers, num_kv_heads_local, head_dim, num_pages);
    c->tables = calloc((size_t)(num_sequences * c->max_pages), sizeof *c->tables);
    c->lengths = calloc((size_t)num_sequences, sizeof *c->lengths);
    c->free_pages = calloc((size_t)num_pages, sizeof *c->free_pages);
    c->memory =
        mmap(NULL, c->memory_bytes ? c->memory_bytes : 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (c->memory == MAP_FAILED)
        c->memory = NULL;
    if (!c->tables || !c->lengths || !c->free_pages || !c->memory) {
        int rc = error_set(err, ERR_MEMORY, "no memory for a KV cache of %llu bytes; ask for a smaller --context",
                           (unsigned long long)c->memory_bytes);
        kv_cache_free(c);
        return rc;
    }
    for (int64_t page = num_pages - 1; page >= 0; page--)
        c->free_pages[c->num_free++] = (int32_t)page;
    *out = c;
    return 0;
}

void kv_cache_free(struct kv_cache *c)
{
    if (!c)
        return;
    if (c->memory)
        munmap(c->memory, c->memory_bytes ? c->memory_bytes : 1);
    free(c->tables);
    free(c->lengths);
    free(c->free_pages);
    free(c);
}

int kv_cache_reserve(struct kv_cache *c, int sequence, int64_t tokens, struct error *err)
{
    int64_t wanted = (int64_t)div_up((uint64_t)tokens, KV_PAGE_TOKENS);
    int64_t missing = wanted - c->lengths[sequence];
    if (wanted > c->max_pages || missing > c->num_free)
        return error_set(err, ERR_MEMORY,
                         "the KV cache is full: %lld tokens wanted, room for %lld more; ask for a larger --context",
                         (long long)tokens, (long long)(c->num_free * KV_PAGE_TOKENS));
    while (c->lengths[sequence] < wanted)
        c->tables[sequence * c->max_pages + c->lengths[sequence]++] = c->free_pages[--c->num_free];
    return 0;
}

void kv_cache_reset(struct kv_cache *c, int sequence)
{
    while (c->lengths[sequence] > 0)
        c->free_pages[c->num_free++] = c->tables[sequence * c->max_pages + --c->lengths[sequence]];
}

// which: 0 keys, 1 values
static uint16_t *pool_of(const struct kv_cache *c, int64_t layer, int which)
{
    return c->memory + (layer * 2 + which) * c->num_pages * page_elems(c);
}

struct kv_view kv_cache_view(const struct kv_cache *c, int64_t layer, int sequence)
{
    return (struct kv_view){.k = pool_of(c, layer, 0),
                            .v = pool_of(c, layer, 1),
                            .pages = c->tables + sequence * c->max_pages,
                            .num_kv_heads = c->num_kv_heads,
                            .head_dim = c->head_dim};
}

void kv_cache_store(struct kv_cache *c, int64_t layer, int sequence, int64_t position, const float *k, const float *v)
{
    int64_t page = c->tables[sequence * c->max_pages + position / KV_PAGE_TOKENS];
    uint16_t *k_pool = pool_of(c, layer, 0), *v_pool = pool_of(c, layer, 1);
    for (int64_t head = 0; head < c->num_kv_heads; head++) {
        int64_t at = page * page_elems(c) + (head * KV_PAGE_TOKENS + position % KV_PAGE_TOKENS) * c->head_dim;
        for (int64_t i = 0; i < c->head_dim; i++) {
            k_pool[at + i] = f32_to_bf16(k[head * c->head_dim + i]);
            v_pool[at + i] = f32_to_bf16(v[head * c->head_dim + i]);
        }
    }
}
