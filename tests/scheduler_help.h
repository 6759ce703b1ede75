// A model without numbers, for tests of the scheduler. The entry of the KV cache of a position is a hash of everything that may make a
// difference: its token, its phase and chunk where arithmetic depends on them, and all entries before it, read through the page
// table. A token is chosen by that hash. So a page that is wrong, stale, shared too early or computed in the wrong phase
// changes what comes out, and what should come out is known without any scheduler (fake_model_output).
#ifndef TPSHARD_TESTS_SCHEDULER_HELP_H
#define TPSHARD_TESTS_SCHEDULER_HELP_H

#include "engine/scheduler.h"

#include <stdbool.h>
#include <stdint.h>

enum { FAKE_MAX_CONTEXT = 1024, FAKE_MAX_VOCAB = 64 };
extern const struct scheduler_options fake_options; // of a model whose options do not matter
extern int64_t fake_vocab_size; // tokens of the model: 50, or what a test sets, at most FAKE_MAX_VOCAB

// A filter whose allowed tokens depend on those before; after `complete_after` of them only the end is allowed.
struct fake_filter {
    uint64_t seed, state;
    int64_t taken, complete_after;
    uint32_t eos, vocab_size;
    struct token_filter filter; // filter.state is this struct
};
void fake_filter_init(struct fake_filter *filter, uint64_t seed, int64_t complete_after, uint32_t eos,
                      uint32_t vocab_size);

struct fake_model {
    struct scheduler_options options;
    struct step_area area;
    struct step_runner runner;
    struct scheduler *scheduler;
    void *memory;
    uint64_t *entries; // of the KV cache [num_pages * KV_PAGE_TOKENS]
    int64_t *written;  // [num_pages] the last step and slot that wrote it
    // What ranks remember of a slot: the prompt, the tokens chosen.
    uint64_t begun[MAX_SEQUENCES], counted[MAX_SEQUENCES];
    int64_t steps, fails_at; // the step that fails; 0: none does
    // Staggered steps under way, step n at n % stages, and what they were planned with.
    struct fake_turn {
        struct step step;
        uint64_t inputs[STEP_MAX_SEGMENTS];
    } * turns;
    int64_t num_turns, staggered_steps;
    int64_t last_rows;
    bool last_decoded[MAX_SEQUENCES]; // slots that were given a token in the last step
};

// Makes area and scheduler for the options.
void fake_model_open(struct fake_model *model, const struct scheduler_options *options);
void fake_model_close(struct fake_model *model);
// Runs a step and checks the books behind it: no page lost, none used twice, none used by nobody.
int fake_model_step(struct fake_model *model, struct error *err);

struct fake_output {
    uint32_t tokens[FAKE_MAX_CONTEXT];
    int64_t count;
    enum finish_reason reason;
    uint32_t stop_token;
};
// What a sequence gives when it is alone. A filter must be in its first state; it is left in its last.
void fake_model_output(const struct scheduler_options *options, const struct sequence_spec *spec,
                       struct fake_output *output);
// What a chosen token's logprob is, to see that choices are not mixed up.
float fake_model_logprob(const uint32_t *prompt, int64_t prompt_count, const uint32_t *output, int64_t step);

#endif
