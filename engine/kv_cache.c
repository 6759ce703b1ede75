// Page tables of the KV cache. See kv_cache.h.
#include "engine/kv_cache.h"

#include "formats/checked.h"

#include <stdlib.h>

struct kv_cache {
    int64_t max_pages; // of one sequence
    int num_sequences;
    int32_t *tables;     // [num_sequences][max_pages]
    int64_t *lengths;    // [num_sequences] pages in use
    int32_t *free_pages; // stack
    int64_t num_free;
    uint64_t version; // of the tables
};

int kv_cache_create(struct kv_cache **out, int64_t num_pages, int num_sequences, int64_t max_tokens, struct error *err)
{
    struct kv_cache *c = calloc(1, sizeof *c);
    if (!c)
        return error_set(err, ERR_MEMORY, "no memory for the KV cache");
    c->num_sequences = num_sequences;
    c->max_pages = (int64_t)div_up((uint64_t)max_tokens, KV_PAGE_TOKENS);
    c->tables = calloc((size_t)(num_sequences * c->max_pages), sizeof *c->tables);
    c->lengths = calloc((size_t)num_sequences, sizeof *c->lengths);
    c->free_pages = calloc((size_t)num_pages, sizeof *c->free_pages);
    c->version = 1;
    if (!c->tables || !c->lengths || !c->free_pages) {
        kv_cache_free(c);
        return error_set(err, ERR_MEMORY, "no memory for the tables of %lld KV pages", (long long)num_pages);
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
    if (missing > 0)
        c->version++;
    while (c->lengths[sequence] < wanted)
        c->tables[sequence * c->max_pages + c->lengths[sequence]++] = c->free_pages[--c->num_free];
    return 0;
}

void kv_cache_reset(struct kv_cache *c, int sequence)
{
    while (c->lengths[sequence] > 0)
        c->free_pages[c->num_free++] = c->tables[sequence * c->max_pages + --c->lengths[sequence]];
}

struct kv_pages kv_cache_pages(const struct kv_cache *c)
{
    return (struct kv_pages){.pages = c->tables, .pages_per_sequence = c->max_pages, .version = c->version};
}
