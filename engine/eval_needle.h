// A needle in a haystack: whether a model finds one sentence again in a long context. It measures what perplexity hides: keys and values that were
// rounded too much, positions beyond those of the training, windows that forgot.
//
// One probe: tokens of the text, in whose midst, at a depth of 0 to 100 %, a sentence with a number of five digits stands; behind them the sentence's
// beginning once more. Found: each token of the number is the likeliest behind those before it, as greedy decoding would give it. Beside that,
// what each of its tokens costs, -log p, with the sentence and without it: the difference shows that a model too weak to find it still sees it.
#ifndef TPSHARD_ENGINE_EVAL_NEEDLE_H
#define TPSHARD_ENGINE_EVAL_NEEDLE_H

#include "engine/session.h"
#include "formats/error.h"
#include "formats/tokenizer.h"

#include <stdint.h>

enum { NEEDLE_LENGTHS = 3, NEEDLE_DEPTHS = 5 };
#define NEEDLE_SENTENCE "The secret number of the tower is {}."

// Of all probes of one length and depth.
struct needle_cell {
    int64_t found;
    double nll; // mean over tokens of the numbers, in nats
};

struct eval_needle {
    // in:
    struct session *session; // started with logits_rows `chunk`
    int64_t chunk;
    const struct token_list *text;
    const char *sentence; // "{}" once, behind some words: the number
    int64_t probes;       // of each length and depth, with numbers and pieces of the text of their own
    bool tells;           // progress on standard error
    // out:
    int64_t lengths[NEEDLE_LENGTHS]; // tokens of a probe: a quarter, a half and the whole of the context
    struct needle_cell cells[NEEDLE_LENGTHS][NEEDLE_DEPTHS];
    double nll_without[NEEDLE_LENGTHS];
};

// In percent of the text.
int64_t eval_needle_depth(int64_t depth);
// ERR_USAGE: the sentence has no place for the number, the context is too short for it, the text for the context.
int eval_needle_run(struct eval_needle *needle, struct error *err);

#endif
