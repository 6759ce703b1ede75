// Numbers between bounds, digit by digit: no exponent, no sign of zero. Integers have at most 18 digits, other numbers 15: within these every
// text is told apart from its neighbours by a double too, so that what is written lies between the bounds also after it was parsed.
#ifndef TPSHARD_ENGINE_SERVE_GRAMMAR_NUMBER_H
#define TPSHARD_ENGINE_SERVE_GRAMMAR_NUMBER_H

#include "engine/serve/grammar_net.h"

enum { NUMBER_INTEGER_DIGITS = 18, NUMBER_REAL_DIGITS = 15 };

struct number_bound {
    bool set, exclusive;
    bool is_integer;
    int64_t integer; // where is_integer
    double real;
};

// ERR_USAGE: err has why not, as a part of a sentence: "the bounds have more than 15 digits", "no number lies between the bounds".
int grammar_number_build(struct net *net, bool integers, struct number_bound min, struct number_bound max,
                         uint32_t next, uint32_t *out, struct error *err);

#endif
