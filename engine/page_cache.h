// The pages of the KV cache by what they hold. A page is free; or used by one or more sequences; or kept: used by none, but full and still
// findable by its tokens, until room is needed. The numbers in the pages are the ranks' matter, and so is the memory.
//
// A full page is a node of a tree: its tokens, behind those of its parent, behind a root that is a salt. A sequence that uses a page
// uses all pages before it as well, so a page is never in use longer than its parent; pages given back together go last page
// first, and the one given back first is taken first. So what is taken is always a leaf that was used least recently.
#ifndef TPSHARD_ENGINE_PAGE_CACHE_H
#define TPSHARD_ENGINE_PAGE_CACHE_H

#include "formats/error.h"
#include "kernels/kernels.h"

#include <stdint.h>

enum { NO_PAGE = -1 };

struct page_cache;

// seed: secret. Pages are found by a hash over it and compared by their tokens.
int page_cache_create(struct page_cache **out, int64_t num_pages, uint64_t seed, struct error *err);
void page_cache_free(struct page_cache *cache);

// A page to be filled, used by the caller; NO_PAGE when every page is in use.
int32_t page_cache_take(struct page_cache *cache);
// The page that holds these KV_PAGE_TOKENS tokens behind parent (NO_PAGE: they are the first under this salt), used by the caller too from now
// on; or NO_PAGE. parent: found or published, and in use by the caller.
int32_t page_cache_find(struct page_cache *cache, int32_t parent, uint64_t salt, const uint32_t *tokens);
// The caller's page now holds these tokens and may be found. Where an equal page is known already the caller gets that one instead, and
// its own is free.
int32_t page_cache_publish(struct page_cache *cache, int32_t page, int32_t parent, uint64_t salt,
                           const uint32_t *tokens);
// The caller uses the page no more. Of a sequence's pages the last goes first.
void page_cache_release(struct page_cache *cache, int32_t page);
// Forgets the contents of all pages; none is in use.
void page_cache_clear(struct page_cache *cache);

int64_t page_cache_available(const struct page_cache *cache); // how many takes would succeed: free and kept pages
int64_t page_cache_kept(const struct page_cache *cache);
int64_t page_cache_users(const struct page_cache *cache, int32_t page);

#endif
