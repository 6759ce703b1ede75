// Chooses the next tokens from logits that are split over the ranks by vocabulary, without gathering the vocabulary. Every rank makes the
// same calls and gets the same tokens. All rows of a call share their exchanges: greedy ones are chosen with a single all-gather.
//
// Greedy: each rank's best, then the best of these (the lowest id among equals). Otherwise, in this order: edits and mask, penalties,
// temperature, top-k, top-p, min-p, then one draw by the Gumbel-max method: argmax of logit / temperature + g(seed, step, token id) is an
// exact sample of the softmax (Gumbel 1954; Maddison et al. 2014), and needs one number a rank. The thresholds of top-k and top-p are
// found by a radix search over the ordered bits of the logits: three small all-gathers of histograms, exact. Tokens that tie with the
// threshold stay.
#ifndef TPSHARD_ENGINE_SAMPLER_H
#define TPSHARD_ENGINE_SAMPLER_H

#include "engine/comm.h"
#include "engine/step.h"
#include "formats/error.h"

#include <stdint.h>

// struct sampling: kernels/backend.h. top_k, top_p and min_p keep the likeliest tokens by number, by mass and by share of the likeliest
// one's probability. repetition_penalty divides positive and multiplies negative logits of tokens in prompt or output (CTRL);
// frequency_penalty is subtracted once for each earlier occurrence in the output, presence_penalty once if there is any.

enum { SAMPLER_MAX_ROWS = 64 };

// One sequence's counts on one rank's part of the vocabulary, for the penalties.
struct token_counts {
    uint16_t *in_output; // [vocab_local], saturating
    uint8_t *in_any;     // [vocab_local] 1: in the prompt or the output
};

// One choice.
struct sampler_row {
    float *logits; // [vocab_local]; changed
    const struct sampling *how;
    uint64_t step;                     // how many tokens the sequence has produced
    const struct token_counts *counts; // NULL: no penalties
    const struct logit_edit *edits;
    int64_t num_edits;
    const uint32_t *mask; // of the whole vocabulary, see struct step_area; NULL: every token
    int32_t num_logprobs; // as in struct step_slot
    struct step_choice *out;
};

struct sampler;

// For one of tp_size ranks: vocab_local logits that begin at vocab_begin.
int sampler_create(struct sampler **out, int tp_size, int64_t vocab_begin, int64_t vocab_local, struct error *err);
void sampler_free(struct sampler *sampler);

int token_counts_alloc(struct token_counts *counts, int64_t vocab_local, struct error *err);
void token_counts_free(struct token_counts *counts);
void token_counts_add(struct token_counts *counts, const struct sampler *sampler, uint32_t token, bool is_output);

// Fills the rows' out [count <= SAMPLER_MAX_ROWS]; STEP_NO_TOKEN where edits and mask leave nothing. ERR_OTHER for NaN among the logits, on
// any rank, and for logits that leave nothing by themselves.
int sampler_choose(struct sampler *sampler, struct comm *comm, const struct sampler_row *rows, int64_t count,
                   struct error *err);

#endif
