// Pages of the KV cache by what they hold. See page_cache.h.
#include "engine/page_cache.h"

#include <assert.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

struct page {
    int32_t users;
    int32_t parent;         // of a published page
    int32_t next_in_bucket; // NO_PAGE: the last
    int32_t older, newer;   // neighbours among the kept pages
    bool published;
    uint64_t salt, hash;
    uint32_t tokens[KV_PAGE_TOKENS];
};

enum { HASH_WORDS = KV_PAGE_TOKENS + 3 }; // tokens, parent, both halves of the salt

struct page_cache {
    int64_t num_pages;
    struct page *pages;
    int32_t *free_pages; // stack
    int64_t num_free;
    int32_t oldest, newest; // of the kept pages
    int64_t num_kept;
    int32_t *buckets;
    uint64_t bucket_mask;
    uint64_t keys[HASH_WORDS + 1];
};

static uint64_t splitmix64(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

// Multilinear hashing (Lemire & Kaser, "Strongly universal string hashing is fast", 2014): for whoever does not know the keys, two
// different pages meet in the upper 32 bits with probability 2^-32, whatever their tokens.
static uint64_t hash_of(const struct page_cache *c, int32_t parent, uint64_t salt, const uint32_t *tokens)
{
    const uint64_t *key = c->keys;
    uint64_t sum = key[0] + key[1] * (uint32_t)parent + key[2] * (uint32_t)salt + key[3] * (uint32_t)(salt >> 32);
    for (int i = 0; i < KV_PAGE_TOKENS; i++)
        sum += key[4 + i] * tokens[i];
    return sum >> 32;
}

int page_cache_create(struct page_cache **out, int64_t num_pages, uint64_t seed, struct error *err)
{
    struct page_cache *c = calloc(1, sizeof *c);
    if (!c)
        return error_set(err, ERR_MEMORY, "no memory for the KV cache's pages");
    uint64_t buckets = 1;
    while (buckets < (uint64_t)num_pages)
        buckets *= 2;
    c->num_pages = num_pages;
    c->bucket_mask = buckets - 1;
    c->pages = calloc((size_t)num_pages, sizeof *c->pages);
    c->free_pages = calloc((size_t)num_pages, sizeof *c->free_pages);
    c->buckets = calloc((size_t)buckets, sizeof *c->buckets);
    if (!c->pages || !c->free_pages || !c->buckets) {
        page_cache_free(c);
        return error_set(err, ERR_MEMORY, "no memory for the books of %lld KV pages", (long long)num_pages);
    }
    for (int i = 0; i <= HASH_WORDS; i++)
        c->keys[i] = splitmix64(&seed);
    page_cache_clear(c);
    *out = c;
    return 0;
}

void page_cache_free(struct page_cache *c)
{
    if (!c)
        return;
    free(c->pages);
    free(c->free_pages);
    free(c->buckets);
    free(c);
}

void page_cache_clear(struct page_cache *c)
{
    c->oldest = c->newest = NO_PAGE;
    c->num_kept = c->num_free = 0;
    for (uint64_t i = 0; i <= c->bucket_mask; i++)
        c->buckets[i] = NO_PAGE;
    for (int64_t page = c->num_pages - 1; page >= 0; page--) {
        assert(c->pages[page].users == 0);
        c->pages[page].published = false;
        c->free_pages[c->num_free++] = (int32_t)page;
    }
}

static void keep(struct page_cache *c, int32_t page)
{
    c->pages[page].older = c->newest;
    c->pages[page].newer = NO_PAGE;
    *(c->newest == NO_PAGE ? &c->oldest : &c->pages[c->newest].newer) = page;
    c->newest = page;
    c->num_kept++;
}

static void unkeep(struct page_cache *c, int32_t page)
{
    struct page *p = &c->pages[page];
    *(p->older == NO_PAGE ? &c->oldest : &c->pages[p->older].newer) = p->newer;
    *(p->newer == NO_PAGE ? &c->newest : &c->pages[p->newer].older) = p->older;
    c->num_kept--;
}

static void unpublish(struct page_cache *c, int32_t page)
{
    int32_t *at = &c->buckets[c->pages[page].hash & c->bucket_mask];
    while (*at != page)
        at = &c->pages[*at].next_in_bucket;
    *at = c->pages[page].next_in_bucket;
    c->pages[page].published = false;
}

int32_t page_cache_take(struct page_cache *c)
{
    int32_t page;
    if (c->num_free > 0) {
        page = c->free_pages[--c->num_free];
    } else if (c->oldest != NO_PAGE) {
        page = c->oldest;
        unkeep(c, page);
        unpublish(c, page);
    } else {
        return NO_PAGE;
    }
    c->pages[page].users = 1;
    return page;
}

static int32_t lookup(const struct page_cache *c, uint64_t hash, int32_t parent, uint64_t salt, const uint32_t *tokens)
{
    for (int32_t page = c->buckets[hash & c->bucket_mask]; page != NO_PAGE; page = c->pages[page].next_in_bucket) {
        const struct page *p = &c->pages[page];
        if (p->hash == hash && p->parent == parent && p->salt == salt && !memcmp(p->tokens, tokens, sizeof p->tokens))
            return page;
    }
    return NO_PAGE;
}

int32_t page_cache_find(struct page_cache *c, int32_t parent, uint64_t salt, const uint32_t *tokens)
{
    int32_t page = lookup(c, hash_of(c, parent, salt, tokens), parent, salt, tokens);
    if (page != NO_PAGE && c->pages[page].users++ == 0)
        unkeep(c, page);
    return page;
}

int32_t page_cache_publish(struct page_cache *c, int32_t page, int32_t parent, uint64_t salt, const uint32_t *tokens)
{
    struct page *p = &c->pages[page];
    assert(p->users == 1 && !p->published);
    uint64_t hash = hash_of(c, parent, salt, tokens);
    int32_t equal = lookup(c, hash, parent, salt, tokens);
    if (equal != NO_PAGE) {
        if (c->pages[equal].users++ == 0)
            unkeep(c, equal);
        page_cache_release(c, page);
        return equal;
    }
    p->parent = parent;
    p->salt = salt;
    p->hash = hash;
    p->published = true;
    memcpy(p->tokens, tokens, sizeof p->tokens);
    int32_t *bucket = &c->buckets[hash & c->bucket_mask];
    p->next_in_bucket = *bucket;
    *bucket = page;
    return page;
}

void page_cache_release(struct page_cache *c, int32_t page)
{
    assert(c->pages[page].users > 0);
    if (--c->pages[page].users > 0)
        return;
    if (c->pages[page].published)
        keep(c, page);
    else
        c->free_pages[c->num_free++] = page;
}

int64_t page_cache_available(const struct page_cache *c) { return c->num_free + c->num_kept; }
int64_t page_cache_kept(const struct page_cache *c) { return c->num_kept; }
int64_t page_cache_users(const struct page_cache *c, int32_t page) { return c->pages[page].users; }
