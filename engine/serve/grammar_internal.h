// What grammar.c and grammar_state.c share.
#ifndef TPSHARD_ENGINE_SERVE_GRAMMAR_INTERNAL_H
#define TPSHARD_ENGINE_SERVE_GRAMMAR_INTERNAL_H

#include "engine/serve/grammar.h"
#include "engine/serve/grammar_cache.h"

struct grammar_language *grammar_language(struct grammar *grammar); // after grammar_compile
struct vocabulary *grammar_vocabulary(struct grammar *grammar);

#endif
