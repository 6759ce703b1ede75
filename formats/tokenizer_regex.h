// Regular expressions of tokenizer.json, which are written for Oniguruma (Ruby syntax), run by PCRE2.
// Owns: translating the pattern so that both agree, limits, iteration over matches. Patterns are untrusted.
#ifndef TPSHARD_FORMATS_TOKENIZER_REGEX_H
#define TPSHARD_FORMATS_TOKENIZER_REGEX_H

#include <stddef.h>

#include "formats/error.h"

struct tokenizer_regex;        // immutable, usable from several threads
struct tokenizer_regex_memory; // what one thread needs to match; serves any number of regexes, one search at a time

// ERR_MODEL says what is wrong with the pattern; where names the component for that message.
int tokenizer_regex_open(struct tokenizer_regex **out, const char *pattern, size_t bytes, const char *where,
                         struct error *err);
void tokenizer_regex_close(struct tokenizer_regex *regex);

struct tokenizer_regex_memory *tokenizer_regex_memory_new(void); // NULL: out of memory
void tokenizer_regex_memory_free(struct tokenizer_regex_memory *memory);

// A walk over the matches in valid UTF-8, leftmost first, not overlapping. An empty match right behind the match
// before it is skipped. Start with {.text, .bytes} and zeros.
struct tokenizer_regex_walk {
    const char *text;
    size_t bytes;
    size_t position;    // where the next search begins
    size_t last_end;    // end of the last match,
    int has_last_match; // if there was one
};

// 1: a match, [*start, *end). 0: no more. Negative: an error (the match limit, memory).
int tokenizer_regex_next(const struct tokenizer_regex *regex, struct tokenizer_regex_memory *memory,
                         struct tokenizer_regex_walk *walk, size_t *start, size_t *end, struct error *err);

#endif
