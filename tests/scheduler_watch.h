// What tests of the scheduler's promises share: a sequence whose tokens and end are kept, and which may cancel or add another from within.
#ifndef TPSHARD_TESTS_SCHEDULER_WATCH_H
#define TPSHARD_TESTS_SCHEDULER_WATCH_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/random_help.h"
#include "tests/scheduler_help.h"

#include <string.h>

struct watched {
    struct fake_model *model;
    struct sequence *handle;
    struct sequence_spec spec;
    uint32_t prompt[FAKE_MAX_CONTEXT];
    uint32_t output[FAKE_MAX_CONTEXT];
    int64_t produced, last_token_step, longest_silence; // steps
    int ends;
    int64_t end_order;
    enum finish_reason reason;
    int error_code;
    struct sequence_usage usage;
    struct watched *cancels_on_tokens, *cancels_on_end, *adds_on_end;
};
static int64_t ends_seen;

static inline void add(struct fake_model *model, struct watched *w, int64_t count)
{
    struct error err;
    struct sequence_spec specs[4] = {0};
    struct sequence *handles[4];
    for (int64_t i = 0; i < count; i++) {
        w[i].model = model;
        w[i].spec.arg = &w[i];
        w[i].last_token_step = model->steps;
        specs[i] = w[i].spec;
    }
    if (scheduler_add(model->scheduler, specs, count, handles, &err))
        fail_msg("%s", err.msg);
    for (int64_t i = 0; i < count; i++)
        w[i].handle = handles[i];
}

static inline void cancel(struct watched *w) { scheduler_cancel(w->model->scheduler, w->handle); }

static inline bool on_tokens(void *arg, const struct step_choice *choices, int64_t count)
{
    struct watched *w = arg;
    if (w->produced > 0 && w->model->steps - w->last_token_step > w->longest_silence)
        w->longest_silence = w->model->steps - w->last_token_step;
    w->last_token_step = w->model->steps;
    for (int64_t i = 0; i < count; i++)
        w->output[w->produced++] = choices[i].token;
    if (w->cancels_on_tokens && w->cancels_on_tokens->handle)
        cancel(w->cancels_on_tokens);
    return true;
}

static inline void on_end(void *arg, enum finish_reason reason, const struct sequence_usage *usage, uint32_t stop_token,
                          const struct error *err)
{
    struct watched *w = arg;
    (void)stop_token;
    w->ends++;
    w->end_order = ends_seen++;
    w->reason = reason;
    w->usage = *usage;
    w->error_code = err ? err->code : 0;
    w->handle = NULL;
    if (w->cancels_on_end && w->cancels_on_end->handle)
        cancel(w->cancels_on_end);
    if (w->adds_on_end)
        add(w->model, w->adds_on_end, 1);
}

// A prompt of one family begins like every other of it. Output has no end but max_tokens.
static inline void make(struct watched *w, uint64_t family, int64_t prompt_count, int64_t max_tokens)
{
    memset(w, 0, sizeof *w);
    random_state = family * 0x9e3779b97f4a7c15u + 1;
    for (int64_t i = 0; i < prompt_count; i++)
        w->prompt[i] = (uint32_t)(random_bits() >> 20) % 50;
    w->spec = (struct sequence_spec){.prompt = w->prompt,
                                     .prompt_count = prompt_count,
                                     .max_tokens = max_tokens,
                                     .sampling = {.top_p = 1, .repetition_penalty = 1},
                                     .num_logprobs = -1,
                                     .on_tokens = on_tokens,
                                     .on_end = on_end};
}

static inline void step(struct fake_model *model)
{
    struct error err;
    if (fake_model_step(model, &err))
        fail_msg("%s", err.msg);
}

static inline void run_out(struct fake_model *model)
{
    for (int64_t steps = 0; scheduler_has_work(model->scheduler); steps++) {
        step(model);
        assert_true(steps < 100000);
    }
}

static inline struct scheduler_stats stats_of(const struct fake_model *model)
{
    struct scheduler_stats stats;
    scheduler_read_stats(model->scheduler, &stats);
    return stats;
}

#endif
