// Prompts run to their ends, without a server. See session.h.
#include "engine/session_internal.h"

#include "kernels/clock.h"

// One session_generate while it runs.
struct run {
    struct generate_figures figures;
    int64_t running, waiting; // sequences; of these, before their first token
    struct error error;       // of a sequence
};

struct run_sequence {
    struct run *run;
    struct generation *generation;
    int64_t index;
    bool waiting;
};

static void have_token(struct run_sequence *q)
{
    q->run->waiting -= q->waiting;
    q->waiting = false;
}

static bool on_tokens(void *arg, const struct step_choice *choices, int64_t count)
{
    struct run_sequence *q = arg;
    struct generation *g = q->generation;
    bool more = true;
    q->run->figures.tokens += count;
    have_token(q);
    g->produced += count;
    for (int64_t i = 0; i < count && more && g->on_tokens; i++)
        more = g->on_tokens(g->arg, q->index, &choices[i].token, 1);
    return more;
}

static void on_end(void *arg, enum finish_reason reason, const struct sequence_usage *usage, uint32_t stop_token,
                   const struct error *err)
{
    struct run_sequence *q = arg;
    (void)stop_token;
    have_token(q);
    q->generation->finished = reason;
    q->generation->usage = *usage;
    q->run->running--;
    if (reason == FINISH_ERROR && !q->run->error.code)
        q->run->error = *err;
}

static int check_prompt(const struct session *s, const struct generation *g, struct error *err)
{
    if (g->prompt_count < 1 || g->prompt_count > s->worker.context)
        return error_set(err, ERR_USAGE, "the prompt has %lld tokens; from 1 to %lld fit the context",
                         (long long)g->prompt_count, (long long)s->worker.context);
    return session_check_tokens(s, g->prompt, g->prompt_count, err);
}

int session_check_prompts(const struct session *s, const struct generation *generations, int64_t count,
                          struct error *err)
{
    int rc = 0;
    for (int64_t i = 0; i < count && !rc; i++)
        rc = check_prompt(s, &generations[i], err);
    return rc;
}

static int make_scheduler(struct session *s, struct error *err)
{
    struct scheduler_options options;
    struct step_runner runner = session_runner(s);
    if (s->scheduler)
        return 0;
    session_scheduler_options(s, &options);
    options.share_prefixes = !s->recomputes;
    options.draft_tokens = s->draft_tokens;
    return scheduler_create(&s->scheduler, &options, &s->area, &runner, err);
}

static int run_all(struct session *s, struct run *run, struct run_sequence *sequences, struct generation *generations,
                   int64_t count, struct error *err)
{
    const struct model_desc *desc = &s->manifest->model;
    uint32_t eos[MODEL_MAX_EOS];
    int rc = 0;
    for (int i = 0; i < desc->num_eos; i++)
        eos[i] = (uint32_t)desc->eos_token_ids[i];
    for (int64_t i = 0; i < count && !rc; i++) {
        struct generation *g = &generations[i];
        struct sequence *added;
        sequences[i] = (struct run_sequence){run, g, i, true};
        const struct sequence_spec spec = {.prompt = g->prompt,
                                           .prompt_count = g->prompt_count,
                                           .max_tokens = g->max_tokens,
                                           .ignore_eos = g->ignore_eos,
                                           .eos_ids = eos,
                                           .num_eos = desc->num_eos,
                                           .sampling = g->sampling,
                                           .num_logprobs = -1,
                                           .arg = &sequences[i],
                                           .on_tokens = on_tokens,
                                           .on_end = on_end};
        if ((rc = scheduler_add(s->scheduler, &spec, 1, &added, err)) == 0)
            run->running++;
    }
    while (!rc && run->running > 0) {
        rc = scheduler_step(s->scheduler, err);
        if (run->waiting == 0 && run->figures.first_s == 0) {
            run->figures.first_s = clock_now_s();
            run->figures.first_tokens = run->figures.tokens;
        }
    }
    if (run->running > 0) // nothing may call back any more
        scheduler_fail(s->scheduler, err);
    if (!rc && run->error.code) {
        *err = run->error;
        rc = err->code;
    }
    return rc;
}

int session_generate(struct session *s, struct generation *generations, int64_t count, struct generate_figures *figures,
                     struct error *err)
{
    struct run_sequence sequences[MAX_SEQUENCES];
    struct run run = {.waiting = count};
    int rc;
    if (count < 1 || count > s->worker.max_sequences)
        return error_set(err, ERR_USAGE, "%lld sequences: from 1 to %lld run together", (long long)count,
                         (long long)s->worker.max_sequences);
    if ((rc = session_check_prompts(s, generations, count, err)) || (rc = session_start(s, err)) ||
        (rc = make_scheduler(s, err)))
        return rc;
    for (int64_t i = 0; i < count; i++) {
        generations[i].produced = 0;
        generations[i].finished = FINISH_NONE;
    }
    int64_t steps = atomic_load(&s->shared->decode_steps), rows = atomic_load(&s->shared->decode_rows),
            sent = atomic_load(&s->shared->decode_sent_bytes), exchanges = atomic_load(&s->shared->decode_exchanges),
            exchange_ns = atomic_load(&s->shared->decode_exchange_ns);
    run.figures.begin_s = clock_now_s();
    rc = run_all(s, &run, sequences, generations, count, err);
    run.figures.end_s = clock_now_s();
    run.figures.steps = atomic_load(&s->shared->decode_steps) - steps;
    run.figures.decode_rows = atomic_load(&s->shared->decode_rows) - rows;
    run.figures.sent_bytes = atomic_load(&s->shared->decode_sent_bytes) - sent;
    run.figures.exchanges = atomic_load(&s->shared->decode_exchanges) - exchanges;
    run.figures.exchange_ns = atomic_load(&s->shared->decode_exchange_ns) - exchange_ns;
    if (figures)
        *figures = run.figures;
    return rc;
}
