// The page for browsers: one file, embedded. It loads nothing from elsewhere, and its policy allows no script but its own.
#ifndef TPSHARD_ENGINE_SERVE_PAGE_H
#define TPSHARD_ENGINE_SERVE_PAGE_H

#include <stddef.h>

extern const char page_text[]; // page_bytes of HTML
extern const size_t page_bytes;
// The Content-Security-Policy of the page: its script and style are named by their hashes. Made on the first call; not thread-safe.
const char *page_policy(void);

#endif
