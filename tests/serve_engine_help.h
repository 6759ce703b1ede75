// What the tests of the engine behind the server share: a session whose ranks are only played, requests, the engine on a thread of its own.
// The functions of session.h that the engine calls are defined here, so the linker leaves the real ones out.
#ifndef TPSHARD_TESTS_SERVE_ENGINE_HELP_H
#define TPSHARD_TESTS_SERVE_ENGINE_HELP_H

#include "engine/serve/engine.h"

#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

enum { CONTEXT = 128, SLOTS = 4, VOCAB = 1000, PAGES = 48, TP = 2, MAX_PROMPT = 24 };

// ---- the played session ------------------------------------------------------------------------------------------

struct session {
    struct manifest manifest;
    struct step_area area;
    struct shared_area *shared;
    void *memory;
    bool launched, announced, has_lost;
    int event_fd;         // something changed for session_wait
    atomic_int lose;      // the next step or wait loses a rank
    atomic_int hold_load; // ranks do not get ready
    atomic_int step_us;   // length of a step
    atomic_int launches, steps, lost;
};

static struct session the_session;

static inline void change(struct session *s, atomic_int *what, int value)
{
    uint64_t one = 1;
    atomic_store(what, value);
    assert_int_equal(write(s->event_fd, &one, sizeof one), sizeof one);
}

const struct manifest *session_manifest(const struct session *s) { return &s->manifest; }
double session_load_s(const struct session *s) { return s->launched ? 0.25 : 0; }
struct shared_area *session_shared(struct session *s) { return s->launched ? s->shared : NULL; }
int64_t session_context(const struct session *s)
{
    (void)s;
    return CONTEXT;
}
const struct step_area *session_step_area(const struct session *s) { return &s->area; }

void session_scheduler_options(const struct session *s, struct scheduler_options *out)
{
    (void)s;
    out->num_pages = PAGES;
    out->context = CONTEXT;
    out->max_sequences = SLOTS;
    out->max_rows = 64;
    out->decode_rows = 32;
    out->prefill_chunk = 16;
}

int session_launch(struct session *s, struct error *err)
{
    (void)err;
    assert_false(s->launched);
    s->area = (struct step_area){.context = CONTEXT, .max_sequences = SLOTS, .vocab_size = VOCAB, .num_pages = PAGES};
    uint64_t bytes = step_area_bytes(&s->area);
    s->memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
    s->shared = calloc(1, sizeof *s->shared);
    assert_non_null(s->memory);
    assert_non_null(s->shared);
    memset(s->memory, 0, bytes);
    step_area_place(&s->area, s->memory);
    s->launched = true;
    s->announced = s->has_lost = false;
    atomic_fetch_add(&s->launches, 1);
    return 0;
}

void session_stop(struct session *s)
{
    free(s->memory);
    free(s->shared);
    s->memory = NULL;
    s->shared = NULL;
    s->launched = false;
}

static inline int lose_rank(struct session *s, struct error *err)
{
    if (!atomic_exchange(&s->lose, 0))
        return 0;
    atomic_fetch_add(&s->lost, 1);
    s->has_lost = true;
    return error_set(err, ERR_RANK, "rank 1 was ended by signal 9");
}

int session_wait(struct session *s, int extra_fd, struct error *err)
{
    assert_true(s->launched);
    for (;;) {
        uint64_t count;
        int rc = lose_rank(s, err);
        if (rc)
            return rc;
        if (!s->announced && !atomic_load(&s->hold_load)) {
            s->announced = true;
            return 0;
        }
        struct pollfd fds[] = {{.fd = extra_fd, .events = POLLIN}, {.fd = s->event_fd, .events = POLLIN}};
        // Nothing may depend on its passing: every wake-up has a cause.
        int ready = poll(fds, 2, 20000);
        assert_int_not_equal(ready, 0);
        if (ready > 0 && fds[1].revents)
            assert_int_equal(read(s->event_fd, &count, sizeof count), sizeof count);
        if (ready > 0 && fds[0].revents)
            return 2;
    }
}

// The played model: the next token is a function of position and token before.
static inline uint32_t next_token(uint32_t token, int64_t position)
{
    return (uint32_t)((token * 31u + (uint32_t)position * 7u + 3u) % VOCAB);
}

static inline int run_step(void *arg, struct error *err)
{
    struct session *s = arg;
    struct step *step = s->area.step;
    int64_t choice = 0;
    int step_us = atomic_load(&s->step_us), rc = lose_rank(s, err);
    if (rc)
        return rc;
    if (step_us)
        usleep((useconds_t)step_us);
    for (int64_t i = 0; i < step->num_segments; i++) {
        const struct step_segment *segment = &step->segments[i];
        for (int64_t row = segment->count - segment->choices; row < segment->count; row++) {
            int64_t position = segment->start + row;
            uint32_t token = s->area.tokens[segment->sequence * CONTEXT + position];
            step->choices[choice++] = (struct step_choice){.token = next_token(token, position)};
        }
    }
    atomic_fetch_add(&s->steps, 1);
    return 0;
}

struct step_runner session_runner(struct session *s) { return (struct step_runner){.arg = s, .run = run_step}; }

void session_rank_report(const struct session *s, int rank, struct rank_report *out)
{
    assert_true(s->launched);
    *out = (struct rank_report){.pid = 100 + rank, .operation = "idle", .device = "played", .loaded_bytes = 1000};
    out->lost = s->has_lost && rank == 1;
}

// ---- requests ----------------------------------------------------------------------------------------------------

// One sequence as its owner sees it.
struct request {
    uint32_t prompt[MAX_PROMPT];
    int64_t prompt_count, max_tokens;
    uint64_t tenant;
    struct engine *engine; // once submitted
    enum engine_state state_at_end;
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    uint32_t tokens[CONTEXT];
    int64_t count;
    int ends;
    enum finish_reason reason;
    int code;
};

static inline bool take_tokens(void *arg, const struct step_choice *choices, int64_t count)
{
    struct request *request = arg;
    pthread_mutex_lock(&request->mutex);
    for (int64_t i = 0; i < count; i++)
        request->tokens[request->count++] = choices[i].token;
    pthread_cond_broadcast(&request->changed);
    pthread_mutex_unlock(&request->mutex);
    return true;
}

static inline void take_end(void *arg, enum finish_reason reason, const struct sequence_usage *usage,
                            uint32_t stop_token, const struct error *err)
{
    struct request *request = arg;
    (void)usage;
    (void)stop_token;
    pthread_mutex_lock(&request->mutex);
    request->ends++;
    if (request->engine)
        request->state_at_end = engine_state(request->engine);
    request->reason = reason;
    request->code = err ? err->code : 0;
    pthread_cond_broadcast(&request->changed);
    pthread_mutex_unlock(&request->mutex);
}

static inline void request_init(struct request *request, uint32_t seed, int64_t max_tokens)
{
    *request = (struct request){.prompt_count = 1 + seed % (MAX_PROMPT - 1), .max_tokens = max_tokens};
    for (int64_t i = 0; i < request->prompt_count; i++)
        request->prompt[i] = (seed * 17u + (uint32_t)i * 5u) % VOCAB;
    pthread_mutex_init(&request->mutex, NULL);
    pthread_cond_init(&request->changed, NULL);
}

static inline void request_clear(struct request *request)
{
    pthread_mutex_destroy(&request->mutex);
    pthread_cond_destroy(&request->changed);
}

static inline struct sequence_spec spec_of(struct request *request)
{
    return (struct sequence_spec){
        .prompt = request->prompt,
        .prompt_count = request->prompt_count,
        .max_tokens = request->max_tokens,
        .ignore_eos = true,
        .sampling = {.top_p = 1, .repetition_penalty = 1},
        .num_logprobs = -1,
        .tenant = request->tenant,
        .arg = request,
        .on_tokens = take_tokens,
        .on_end = take_end,
    };
}

static inline int submit(struct engine *engine, struct request *request, struct engine_job **job)
{
    struct sequence_spec spec = spec_of(request);
    struct error err;
    request->engine = engine;
    return engine_submit(engine, &spec, 1, job, &err);
}

// Waits for the end, or until so many tokens are there (-1: the end).
static inline void wait_for(struct request *request, int64_t tokens)
{
    struct timespec end;
    clock_gettime(CLOCK_REALTIME, &end);
    end.tv_sec += 20;
    pthread_mutex_lock(&request->mutex);
    while (!request->ends && (tokens < 0 || request->count < tokens))
        assert_int_equal(pthread_cond_timedwait(&request->changed, &request->mutex, &end), 0);
    pthread_mutex_unlock(&request->mutex);
}

static inline bool tokens_are_right(const struct request *request)
{
    uint32_t token = request->prompt[request->prompt_count - 1];
    for (int64_t i = 0; i < request->count; i++) {
        token = next_token(token, request->prompt_count - 1 + i);
        if (request->tokens[i] != token)
            return false;
    }
    return true;
}

// ---- the engine on a thread of its own ---------------------------------------------------------------------------

struct run {
    struct engine *engine;
    struct engine_options options;
    pthread_t thread;
    int rc;
    struct error err;
    atomic_int states[5]; // how often each was entered
};

static inline void count_state(void *arg, enum engine_state state)
{
    atomic_fetch_add(&((struct run *)arg)->states[state], 1);
}

static inline void *run_engine(void *arg)
{
    struct run *run = arg;
    run->rc = engine_run(run->engine, count_state, run, &run->err);
    return NULL;
}

static inline void begin(struct run *run)
{
    struct session *s = &the_session;
    atomic_store(&s->lose, 0);
    atomic_store(&s->hold_load, 0);
    atomic_store(&s->step_us, 0);
    assert_int_equal(engine_create(&run->engine, s, &run->options, NULL), 0);
    assert_int_equal(engine_state(run->engine), ENGINE_LOADING);
    assert_int_equal(pthread_create(&run->thread, NULL, run_engine, run), 0);
}

static inline void wait_for_state(struct run *run, enum engine_state state)
{
    for (int i = 0; engine_state(run->engine) != state; i++) {
        assert_true(i < 20000);
        usleep(1000);
    }
}

static inline int end(struct run *run)
{
    pthread_join(run->thread, NULL);
    assert_false(the_session.launched);
    engine_free(run->engine);
    return run->rc;
}

static inline int drain_and_end(struct run *run)
{
    engine_drain(run->engine);
    return end(run);
}

static inline struct run new_run(void)
{
    struct run run = {.options = engine_options_default};
    run.options.draft_tokens = 0;
    run.options.restart_delay_s = 0.001;
    return run;
}

static inline int set_up(void **state)
{
    (void)state;
    the_session.manifest.tp_size = the_session.manifest.num_ranks = TP;
    the_session.event_fd = eventfd(0, EFD_CLOEXEC);
    return the_session.event_fd < 0;
}

#endif
