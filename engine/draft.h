// Drafts by prompt lookup: what followed when the last few tokens of a sequence stood earlier in its prompt or output. Needs no model, costs
// nothing where nothing repeats; the longest match of 4, 3 or 2 tokens wins, of equal ones the latest. How often drafts of this sequence are
// right is learnt from those that were tried; a draft is as long as its last token is still likely enough to be worth its row.
#ifndef TPSHARD_ENGINE_DRAFT_H
#define TPSHARD_ENGINE_DRAFT_H

#include <stdbool.h>
#include <stdint.h>

enum {
    DRAFT_MIN_MATCH = 2,
    DRAFT_MAX_MATCH = 4,
    DRAFT_WINDOW = 16384, // earlier tokens than these are not looked at
    DRAFT_HEADS = 4096,
};

// One sequence's. Where pairs of tokens stand: chains from the latest back, as LZ77 coders keep them.
struct draft {
    int32_t heads[DRAFT_HEADS];     // by the pair's hash: position of its second token
    int32_t previous[DRAFT_WINDOW]; // by position % DRAFT_WINDOW: the one before in the same chain
    int64_t indexed;                // pairs that end before this position are in
    int64_t longest;
    double hit_rate;           // chance that the next drafted token is right, as the last ones were
    int64_t pause, next_pause; // steps without drafts, where they do not pay: still to come; next time
};

void draft_begin(struct draft *draft, int64_t longest);
// Tokens that a draft may have now, where each must be right with at least this chance. Called once a step. Now and then one is tried though it
// seems in vain.
int64_t draft_limit(struct draft *draft, double worth);
// Writes at most `count` tokens behind tokens [length] and returns how many.
int64_t draft_propose(struct draft *draft, uint32_t *tokens, int64_t length, int64_t count);
// How many of the drafted tokens were the chosen ones.
void draft_learn(struct draft *draft, int64_t drafted, int64_t accepted);

#endif
