// Regular expressions for grammars: the part of ECMA-262 that is regular. Characters are code points; \d \w and the like are as there.
// Left out, and refused: look-around, \b, references, \p, anchors elsewhere than at the ends of the expression. A lazy quantifier is its plain one.
#ifndef TPSHARD_ENGINE_SERVE_GRAMMAR_REGEX_H
#define TPSHARD_ENGINE_SERVE_GRAMMAR_REGEX_H

#include "engine/serve/grammar_net.h"

enum { REGEX_MAX_BYTES = 4096, REGEX_MAX_RANGES = 256 };

// How a character is written in the text.
enum regex_form {
    REGEX_PLAIN, // UTF-8
    REGEX_JSON, // as in a JSON string, each character in one way: itself, \" \\ \b \f \n \r \t, or \u00xx; U+0000 never
};

// What may stand around the match.
enum regex_extent { REGEX_WHOLE, REGEX_SEARCH }; // SEARCH: anything, but for ^ and $; as JSON Schema's "pattern"

// Success: *out is where the expression begins. ERR_USAGE: err has what is wrong with it, as a part of a sentence: "look-around is not supported".
int grammar_regex_build(struct net *net, const char *expression, size_t bytes, enum regex_form form,
                        enum regex_extent extent, uint32_t next, uint32_t *out, struct error *err);

// A set of characters: ascending ranges that do not touch. Start from {0}.
struct regex_set {
    struct regex_range {
        uint32_t low, high;
    } ranges[REGEX_MAX_RANGES];
    int count;
    bool full; // a range did not fit
};
void grammar_regex_add(struct regex_set *set, uint32_t low, uint32_t high);
void grammar_regex_invert(struct regex_set *set);
// One character of the set.
uint32_t grammar_regex_build_set(struct net *net, const struct regex_set *set, enum regex_form form, uint32_t next);

#endif
