// What vocabulary.c and the grammar's files share.
#ifndef TPSHARD_ENGINE_SERVE_VOCABULARY_INTERNAL_H
#define TPSHARD_ENGINE_SERVE_VOCABULARY_INTERNAL_H

#include "engine/serve/vocabulary.h"

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// Begins the bytes of a special token, followed by its content. No text has this byte, and no other token of the trie.
enum {
    VOCABULARY_MARK = 0xFF,
    VOCABULARY_MAX_TOKEN_BYTES = 512, // a longer token, or one of this length, is never allowed
};

// One node for each prefix of a token, in the order of a walk from the root (node 0, the empty prefix): the children of a node follow it, and
// `end` leads past the last of them.
struct vocabulary_trie {
    uint32_t num_nodes;
    uint8_t *byte;         // [num_nodes] last byte of the prefix
    uint32_t *end;         // [num_nodes]
    uint32_t *first_token; // [num_nodes + 1] into tokens: the ids whose bytes are this prefix
    uint32_t *tokens;      // ids in the order of their bytes
};

struct grammar_cache; // grammar_cache.h

struct vocabulary {
    int64_t num_tokens; // ids are below
    uint32_t *offsets;  // [num_tokens + 1] into bytes
    uint8_t *bytes;
    uint32_t longest_bytes; // of a token
    uint32_t *eos;
    int64_t num_eos;
    struct vocabulary_trie trie;
    pthread_mutex_t lock; // of cache
    struct grammar_cache *cache;
};

// Whether a special token of this content, not an end of sequence, can be named.
bool vocabulary_has_special(const struct vocabulary *vocabulary, const char *content);

#endif
