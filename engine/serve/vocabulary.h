// Every token's bytes, as a trie, for grammars. Made once per model. Owns: the trie, what grammars keep for later requests.
#ifndef TPSHARD_ENGINE_SERVE_VOCABULARY_H
#define TPSHARD_ENGINE_SERVE_VOCABULARY_H

#include "formats/error.h"
#include "formats/tokenizer.h"

#include <stdint.h>

// Any number of threads may use one at the same time. Grammars borrow it.
struct vocabulary;
// The bytes that each id adds to a text that has begun. Special tokens have none: they are allowed where a grammar names them and, for the ids of
// eos [num_eos], at the end. The tokenizer is needed during the call alone. Success: the caller owns *out.
int vocabulary_create(struct vocabulary **out, const struct tokenizer *tokenizer, const uint32_t *eos, int64_t num_eos,
                      struct error *err);
// The same from a list [count]; ids are its indices.
struct vocabulary_token {
    const char *bytes; // content of a special token
    size_t count;      // 0: never allowed
    bool special;
};
int vocabulary_create_from(struct vocabulary **out, const struct vocabulary_token *tokens, int64_t count,
                           const uint32_t *eos, int64_t num_eos, struct error *err);
void vocabulary_free(struct vocabulary *vocabulary); // accepts NULL; all its grammars are freed before

#endif
