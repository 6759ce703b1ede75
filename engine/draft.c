// Drafts by prompt lookup. See draft.h.
#include "engine/draft.h"

#include <string.h>

enum { MAX_STEPS_BACK = 32, FIRST_PAUSE = 8, LONGEST_PAUSE = 64 };
static const double first_hit_rate = 0.7, learning_rate = 0.1;

void draft_begin(struct draft *d, int64_t longest)
{
    memset(d->heads, 0xff, sizeof d->heads); // -1
    d->indexed = 1;
    d->longest = longest;
    d->hit_rate = first_hit_rate;
    d->pause = d->next_pause = FIRST_PAUSE;
}

int64_t draft_limit(struct draft *d, double worth)
{
    int64_t limit = 0;
    for (double chance = d->hit_rate; limit < d->longest && chance > worth; chance *= d->hit_rate)
        limit++;
    if (limit > 0) {
        d->pause = d->next_pause = FIRST_PAUSE;
        return limit;
    }
    if (d->pause-- > 0)
        return 0;
    d->pause = d->next_pause = 2 * d->next_pause < LONGEST_PAUSE ? 2 * d->next_pause : LONGEST_PAUSE;
    return 1;
}

static uint32_t bucket_of(uint32_t first, uint32_t second)
{
    return (first * 0x9e3779b1u + second) * 0x85ebca6bu >> 20;
}
_Static_assert(DRAFT_HEADS == 1 << 12, "bucket_of has 12 bits");

// Pairs whose next token is known.
static void extend(struct draft *d, const uint32_t *tokens, int64_t length)
{
    if (d->indexed < length - DRAFT_WINDOW)
        d->indexed = length - DRAFT_WINDOW;
    for (; d->indexed < length - 1; d->indexed++) {
        int32_t *head = &d->heads[bucket_of(tokens[d->indexed - 1], tokens[d->indexed])];
        d->previous[d->indexed % DRAFT_WINDOW] = *head;
        *head = (int32_t)d->indexed;
    }
}

// How many tokens that end at `at` equal the last ones, up to DRAFT_MAX_MATCH.
static int match_at(const uint32_t *tokens, int64_t length, int64_t at)
{
    int match = 0;
    while (match < DRAFT_MAX_MATCH && at >= match && tokens[at - match] == tokens[length - 1 - match])
        match++;
    return match;
}

int64_t draft_propose(struct draft *d, uint32_t *tokens, int64_t length, int64_t count)
{
    if (length <= DRAFT_MIN_MATCH)
        return 0;
    extend(d, tokens, length);
    int best = 0;
    int64_t from = 0;
    int64_t at = d->heads[bucket_of(tokens[length - 2], tokens[length - 1])];
    for (int steps = 0; at > length - DRAFT_WINDOW && at >= 0 && steps < MAX_STEPS_BACK && best < DRAFT_MAX_MATCH;
         steps++) {
        int match = match_at(tokens, length, at);
        if (match > best) {
            best = match;
            from = at + 1;
        }
        at = d->previous[at % DRAFT_WINDOW];
    }
    if (best < DRAFT_MIN_MATCH)
        return 0;
    // A match that reaches the end goes on into the draft itself: what repeats is drafted as repeating.
    for (int64_t i = 0; i < count; i++)
        tokens[length + i] = tokens[from + i];
    return count;
}

void draft_learn(struct draft *d, int64_t drafted, int64_t accepted)
{
    for (int64_t i = 0; i < accepted; i++)
        d->hit_rate += (1 - d->hit_rate) * learning_rate;
    if (accepted < drafted) // what follows a wrong token says nothing
        d->hit_rate -= d->hit_rate * learning_rate;
}
