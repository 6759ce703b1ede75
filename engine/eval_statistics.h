// What the predictions of many positions amount to, and how sure that is.
//
// Neighbouring tokens are not independent: a hard passage is hard for many tokens in a row. So the text is cut into blocks of consecutive
// positions (eval_statistics_block), and the blocks are what is taken as independent: the standard error of a mean is that of a ratio of
// sums over blocks, interval = mean -+ t * error with Student's t of blocks - 1 degrees of freedom. A share's interval is Wilson's, at so many
// positions as would, if independent, have that standard error. All intervals are of 95 %.
//
// On 8,000 held-out tokens of the bundled model, blocks of 333 give 2.1 times the standard error of independent tokens for perplexity, 2.2 times for KL
// divergence, 1.0 times for the share of equal top-1. Longer blocks give somewhat more for the first two: an interval is about texts like this one.
#ifndef TPSHARD_ENGINE_EVAL_STATISTICS_H
#define TPSHARD_ENGINE_EVAL_STATISTICS_H

#include <stdbool.h>
#include <stdint.h>

// Of logits [vocab] the place of the largest, the first among equals.
int64_t eval_statistics_likeliest(const float *x, int64_t vocab);

// One predicted position.
struct position_score {
    double nll, reference_nll; // -log p of the token that follows, in nats
    double kl;                 // KL(reference || model) in nats
    bool top1, top5;           // the reference's likeliest token is the model's likeliest; is among its five likeliest
};

// q: the logits under test, p (NULL: none) those of the reference; [vocab]. Among equal logits the lowest token id comes first. NaN or an infinity
// in a row makes some of its figures NaN or infinite.
void eval_statistics_score(struct position_score *out, const float *q, const float *p, int64_t vocab, uint32_t next);

struct estimate {
    double value, low, high; // low = high = NaN: fewer than two blocks
};

// Positions of a block: a 24th of all, 32 at least, 512 at most.
int64_t eval_statistics_block(int64_t count);
// Of values [count], in the order of the text.
struct estimate eval_statistics_mean(const double *values, int64_t count);
// Of values that are 0 or 1.
struct estimate eval_statistics_share(const double *values, int64_t count);

#endif
