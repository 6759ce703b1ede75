// The steps of one rank: rows from the parent's segments, forward passes by phase, a token behind every row that wants one.
#ifndef TPSHARD_ENGINE_RANK_STEP_H
#define TPSHARD_ENGINE_RANK_STEP_H

#include "engine/decoder.h"
#include "engine/step.h"
#include "formats/error.h"

#include <stdatomic.h>
#include <stdint.h>

struct rank_step;

// Passes of all steps so far. A pass is in flight from its begin on the first stage to its end on the last one: with several stages, more than one
// can be.
struct pass_counts {
    atomic_llong begun, done;                   // by the first rank; by the first rank of the last stage
    atomic_llong most_in_flight, sum_in_flight; // of what was in flight at each begin, itself included
};

// The decoder is borrowed; its device is prepared for the limits. usual_choices: of a step; more are made in several rounds.
int rank_step_create(struct rank_step **out, struct decoder *decoder, const struct step_limits *limits,
                     int64_t usual_choices, struct error *err);
void rank_step_free(struct rank_step *s); // accepts NULL
// Where passes are counted from now on; NULL: nowhere.
void rank_step_count_passes(struct rank_step *s, struct pass_counts *counts);

// Checks the step in the area and runs it; of staggered ones (step.h) this rank's stage runs the one that is its turn. Rank 0 writes the choices back.
// Collective.
int rank_step_run(struct rank_step *s, const struct step_area *area, struct error *err);
// Tokens start .. start + count - 1 of a slot; all their logits, [count][stride], of this rank's part of the vocabulary (of the last stage's ranks
// alone). Collective.
int rank_step_forward(struct rank_step *s, const struct step_area *area, int32_t sequence, int64_t start, int64_t count,
                      float *logits, int64_t stride, struct error *err);

// Rows of the last step, by phase.
struct rank_step_rows {
    int64_t prefill, decode;
};
struct rank_step_rows rank_step_rows(const struct rank_step *s);

// What a forward pass of the device may hold, by the backend and by what a step may hold.
int64_t rank_step_pass_rows(const struct backend *backend, const struct step_limits *limits);

#endif
