// Requests from any thread to the thread of the ranks, and what becomes of them. See engine.h.
//
// One mutex guards the state, the list of jobs that the engine's thread has not yet taken, and the published figures; nobody holds it while
// anything else happens. An eventfd wakes the engine's thread from session_wait, which also watches the ranks; while they load, a timer does, for
// the figures.
#include "engine/serve/engine.h"

#include "engine/serve/places.h"
#include "kernels/futex.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum { LOOK_MS = 200 }; // between two looks at the ranks' figures
enum { RESTART_WINDOW_S = 600, RESTART_STABLE_S = 30, RESTART_MAX_DELAY_S = 60, RESTART_MAX_LIMIT = 1000 };

const struct engine_options engine_options_default = {
    .max_queue = 256,
    .draft_tokens = 4,
    .share_prefixes = true,
    .drain_timeout_s = 30,
    .restart_delay_s = 1,
    .restart_limit = 5,
};

// One sequence of a job.
struct entry {
    struct engine_job *job;
    struct sequence_spec spec; // the caller's
    struct sequence *sequence; // NULL: not with the scheduler
    atomic_bool cancelled;
    bool ended;
};

struct engine_job {
    struct engine *engine;
    uint64_t tenant;
    struct engine_job *next;            // not yet taken
    struct engine_job *before, *behind; // taken: the engine thread's list
    struct sequence_spec *specs;        // as the scheduler sees them
    int64_t count, left;                // sequences; those that have not ended, and holds
    struct entry entries[];
};

struct engine {
    struct session *session;
    struct engine_options options;
    int wake_fd, timer_fd, wait_fd; // wait_fd: has input when one of the others has
    uint64_t hash_seed;
    int64_t max_live; // sequences
    atomic_int drains, signal;
    atomic_bool woken, cancels; // the eventfd is set; some entry's cancelled is
    atomic_llong room_tokens;   // of one sequence: what the context and the KV cache hold

    pthread_mutex_t mutex; // for these:
    atomic_int state;      // changed under it, read anywhere
    struct engine_job *submitted, **submitted_end;
    int64_t num_submitted; // sequences
    struct places places;  // those of accepted sequences that have not ended are taken
    struct engine_stats stats;

    // The engine thread's own.
    struct scheduler *scheduler;
    struct step_runner runner; // the session's
    struct engine_job *taken;  // newest first
    struct engine_stats now;
    struct scheduler_stats past;            // of earlier starts
    double past_exchange_s[COMM_MAX_RANKS]; // the same
    double looked_s;                        // at the ranks
    void (*on_state)(void *arg, enum engine_state state);
    void *on_state_arg;
    bool was_ready, cut_short;
    bool launched, lost, restarts; // this start: has ranks to ask, has ended in an error, is followed by another one
    double drain_end_s;            // 0: no drain yet
    double ready_s;                // when the ranks were last ready
    double sequence_s;             // running mean of a sequence's time in its slot
    double restarts_s[RESTART_MAX_LIMIT];
    int64_t num_restarts; // in the window
    double delay_s;       // before the next one
};

static double clock_s(void) { return 1e-9 * (double)clock_now_ns(); }

const char *engine_state_name(enum engine_state state)
{
    static const char *const names[] = {"loading", "ready", "restarting", "draining", "failed"};
    return names[state];
}

// ---- life --------------------------------------------------------------------------------------------------------

static int open_descriptors(struct engine *engine, struct error *err)
{
    struct epoll_event input = {.events = EPOLLIN};
    engine->wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    engine->timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    engine->wait_fd = epoll_create1(EPOLL_CLOEXEC);
    if (engine->wake_fd < 0 || engine->timer_fd < 0 || engine->wait_fd < 0 ||
        epoll_ctl(engine->wait_fd, EPOLL_CTL_ADD, engine->wake_fd, &input) != 0 ||
        epoll_ctl(engine->wait_fd, EPOLL_CTL_ADD, engine->timer_fd, &input) != 0)
        return error_set_errno(err, "cannot make event descriptors");
    return 0;
}

static void close_descriptors(struct engine *engine)
{
    const int fds[] = {engine->wait_fd, engine->timer_fd, engine->wake_fd};
    for (int i = 0; i < 3; i++)
        if (fds[i] >= 0)
            close(fds[i]);
}

int engine_create(struct engine **out, struct session *session, const struct engine_options *options, struct error *err)
{
    int rc;
    struct scheduler_options sizes = {0};
    struct engine *engine = calloc(1, sizeof *engine);
    if (!engine)
        return error_set(err, ERR_MEMORY, "no memory for the engine");
    engine->session = session;
    engine->options = *options;
    if (engine->options.restart_limit > RESTART_MAX_LIMIT)
        engine->options.restart_limit = RESTART_MAX_LIMIT;
    session_scheduler_options(session, &sizes);
    engine->room_tokens = session_context(session);
    engine->max_live = sizes.max_sequences + options->max_queue;
    engine->submitted_end = &engine->submitted;
    engine->stats.num_ranks = engine->now.num_ranks = (int)session_manifest(session)->tp_size; // of one stage
    engine->wake_fd = engine->timer_fd = engine->wait_fd = -1;
    if ((rc = places_init(&engine->places, engine->max_live, err)) || (rc = open_descriptors(engine, err)))
        goto fail;
    if (getrandom(&engine->hash_seed, sizeof engine->hash_seed, 0) != sizeof engine->hash_seed) {
        rc = error_set_errno(err, "cannot get random bytes");
        goto fail;
    }
    pthread_mutex_init(&engine->mutex, NULL);
    *out = engine;
    return 0;
fail:
    close_descriptors(engine);
    places_clear(&engine->places);
    free(engine);
    return rc;
}

void engine_free(struct engine *engine)
{
    if (!engine)
        return;
    close_descriptors(engine);
    pthread_mutex_destroy(&engine->mutex);
    places_clear(&engine->places);
    free(engine);
}

// Also from signal handlers.
static void wake(struct engine *engine)
{
    uint64_t one = 1;
    int saved = errno;
    // A wake-up that has not been taken carries this one too. Writing cannot fail: the counter is far from its end.
    if (!atomic_exchange(&engine->woken, true) && write(engine->wake_fd, &one, sizeof one) < 0)
        atomic_store(&engine->woken, false);
    errno = saved;
}

static void take_wake(struct engine *engine)
{
    uint64_t count;
    ssize_t bytes = read(engine->timer_fd, &count, sizeof count);
    bytes = read(engine->wake_fd, &count, sizeof count);
    (void)bytes; // nothing to read is as well
    // In this order: work of whoever finds the flag still set, and so does not write, lies where the caller looks next.
    atomic_store(&engine->woken, false);
}

static void set_timer(struct engine *engine, int interval_ms)
{
    const struct timespec interval = {.tv_nsec = interval_ms * 1000000l};
    timerfd_settime(engine->timer_fd, 0, &(struct itimerspec){.it_interval = interval, .it_value = interval}, NULL);
}

static void set_state(struct engine *engine, enum engine_state state)
{
    pthread_mutex_lock(&engine->mutex);
    bool changed = atomic_exchange(&engine->state, (int)state) != (int)state;
    engine->stats.ready = engine->now.ready = state == ENGINE_READY || (state == ENGINE_DRAINING && engine->scheduler);
    pthread_mutex_unlock(&engine->mutex);
    if (changed && engine->on_state)
        engine->on_state(engine->on_state_arg, state);
}

enum engine_state engine_state(const struct engine *engine) { return (enum engine_state)atomic_load(&engine->state); }

// ---- submitting, from any thread ---------------------------------------------------------------------------------

static bool on_tokens(void *arg, const struct step_choice *choices, int64_t count)
{
    struct entry *entry = arg;
    if (atomic_load_explicit(&entry->cancelled, memory_order_relaxed))
        return false;
    return !entry->spec.on_tokens || entry->spec.on_tokens(entry->spec.arg, choices, count);
}

static void free_job(struct engine_job *job)
{
    if (job)
        free(job->specs);
    free(job);
}

static void release(struct engine_job *job)
{
    if (--job->left > 0)
        return;
    if (job->before)
        job->before->behind = job->behind;
    else
        job->engine->taken = job->behind;
    if (job->behind)
        job->behind->before = job->before;
    free_job(job);
}

static void on_end(void *arg, enum finish_reason reason, const struct sequence_usage *usage, uint32_t stop_token,
                   const struct error *err)
{
    struct entry *entry = arg;
    struct engine *engine = entry->job->engine;
    double seconds = usage->prefill_s + usage->decode_s;
    if (reason == FINISH_EOS || reason == FINISH_LENGTH)
        engine->sequence_s = engine->sequence_s > 0 ? 0.9 * engine->sequence_s + 0.1 * seconds : seconds;
    entry->ended = true;
    pthread_mutex_lock(&engine->mutex);
    places_leave(&engine->places, entry->job->tenant);
    pthread_mutex_unlock(&engine->mutex);
    entry->spec.on_end(entry->spec.arg, reason, usage, stop_token, err);
    release(entry->job);
}

// Ends a sequence that the scheduler does not know.
static void end_early(struct entry *entry, enum finish_reason reason, const struct error *err)
{
    struct sequence_usage usage = {.prompt_tokens = entry->spec.prompt_count};
    on_end(entry, reason, &usage, 0, err);
}

int engine_submit(struct engine *engine, const struct sequence_spec *specs, int64_t count, struct engine_job **out,
                  struct error *err)
{
    int rc = 0;
    const int64_t room = atomic_load(&engine->room_tokens);
    if (count < 1 || count > engine->max_live)
        return error_set(err, ERR_USAGE, "%lld sequences in one request: from 1 to %lld are taken", (long long)count,
                         (long long)engine->max_live);
    for (int64_t i = 0; i < count; i++)
        if (specs[i].prompt_count < 1 || specs[i].prompt_count > room)
            return error_set(err, ERR_USAGE, "the prompt has %lld tokens; from 1 to %lld fit",
                             (long long)specs[i].prompt_count, (long long)room);
    struct engine_job *job = calloc(1, sizeof *job + (size_t)count * sizeof job->entries[0]);
    if (!job || !(job->specs = malloc((size_t)count * sizeof *specs))) {
        free_job(job);
        return error_set(err, ERR_MEMORY, "no memory for a request");
    }
    job->engine = engine;
    job->tenant = specs[0].tenant;
    job->count = job->left = count;
    for (int64_t i = 0; i < count; i++) {
        struct entry *entry = &job->entries[i];
        entry->job = job;
        entry->spec = job->specs[i] = specs[i];
        job->specs[i].arg = entry;
        job->specs[i].on_tokens = on_tokens;
        job->specs[i].on_end = on_end;
    }
    pthread_mutex_lock(&engine->mutex);
    if (engine_state(engine) != ENGINE_READY) {
        rc = error_set(err, ERR_RANK, "the engine is %s", engine_state_name(engine_state(engine)));
    } else if (!places_take(&engine->places, job->tenant, count, clock_s())) {
        rc = error_set(err, ERR_BUSY,
                       "the queue is full: %lld of %lld places are taken, and beside others a client has half",
                       (long long)engine->places.taken, (long long)engine->max_live);
    } else {
        *out = job;
        *engine->submitted_end = job;
        engine->submitted_end = &job->next;
        engine->num_submitted += count;
    }
    pthread_mutex_unlock(&engine->mutex);
    if (rc)
        free_job(job);
    else
        wake(engine);
    return rc;
}

void engine_cancel(struct engine *engine, struct engine_job *job, int64_t index)
{
    for (int64_t i = 0; i < job->count; i++)
        if (index < 0 || index == i)
            atomic_store(&job->entries[i].cancelled, true);
    atomic_store(&engine->cancels, true);
    wake(engine);
}

void engine_drain(struct engine *engine)
{
    atomic_fetch_add(&engine->drains, 1);
    wake(engine);
}

// Of the many ranks that there could be, those that are.
static void copy_stats(struct engine_stats *to, const struct engine_stats *from)
{
    memcpy(to, from, offsetof(struct engine_stats, ranks) + (size_t)from->num_ranks * sizeof from->ranks[0]);
}

void engine_read_stats(struct engine *engine, struct engine_stats *out)
{
    pthread_mutex_lock(&engine->mutex);
    copy_stats(out, &engine->stats);
    out->queued = out->scheduler.waiting + engine->num_submitted;
    pthread_mutex_unlock(&engine->mutex);
}

// ---- the engine's thread: work -----------------------------------------------------------------------------------

// The list of what was submitted since the last call; its jobs are among the taken ones from here on.
static struct engine_job *take_submitted(struct engine *engine)
{
    pthread_mutex_lock(&engine->mutex);
    struct engine_job *first = engine->submitted;
    engine->submitted = NULL;
    engine->submitted_end = &engine->submitted;
    engine->num_submitted = 0;
    pthread_mutex_unlock(&engine->mutex);
    for (struct engine_job *job = first; job; job = job->next) {
        job->behind = engine->taken;
        if (job->behind)
            job->behind->before = job;
        engine->taken = job;
    }
    return first;
}

static void end_job_early(struct engine_job *job, enum finish_reason reason, const struct error *err)
{
    job->left++; // hold it over its last end
    for (int64_t i = 0; i < job->count; i++)
        end_early(&job->entries[i], reason, err);
    release(job);
}

static void add_job(struct engine *engine, struct engine_job *job)
{
    struct error err = {0};
    struct sequence **sequences = calloc((size_t)job->count, sizeof(struct sequence *));
    int rc = sequences ? scheduler_add(engine->scheduler, job->specs, job->count, sequences, &err)
                       : error_set(&err, ERR_MEMORY, "no memory for a request");
    for (int64_t i = 0; i < job->count && !rc; i++)
        job->entries[i].sequence = sequences[i];
    if (rc)
        end_job_early(job, FINISH_ERROR, &err);
    free(sequences);
}

static bool all_cancelled(const struct engine_job *job)
{
    for (int64_t i = 0; i < job->count; i++)
        if (!atomic_load(&job->entries[i].cancelled))
            return false;
    return true;
}

static void add_submitted(struct engine *engine)
{
    for (struct engine_job *job = take_submitted(engine), *next; job; job = next) {
        next = job->next;
        if (all_cancelled(job))
            end_job_early(job, FINISH_CANCELLED, NULL);
        else
            add_job(engine, job);
    }
}

static void cancel_marked(struct engine *engine)
{
    if (!atomic_exchange(&engine->cancels, false))
        return;
    for (struct engine_job *job = engine->taken, *next; job; job = next) {
        job->left++; // its last sequence may end here
        for (int64_t i = 0; i < job->count; i++) {
            struct entry *entry = &job->entries[i];
            if (!entry->ended && entry->sequence && atomic_load(&entry->cancelled))
                scheduler_cancel(engine->scheduler, entry->sequence);
        }
        next = job->behind;
        release(job);
    }
}

static void add_stats(struct scheduler_stats *to, const struct scheduler_stats *more)
{
    to->steps += more->steps;
    to->prompt_tokens += more->prompt_tokens;
    to->cached_tokens += more->cached_tokens;
    to->produced_tokens += more->produced_tokens;
    to->preemptions += more->preemptions;
    to->drafted_tokens += more->drafted_tokens;
    to->accepted_tokens += more->accepted_tokens;
    to->prefill_rows += more->prefill_rows;
    to->decode_rows += more->decode_rows;
    to->prefix_queries_tokens += more->prefix_queries_tokens;
}

// What readers see of the ranks, now and then: it costs more than a step may.
static void look_at_ranks(struct engine *engine, bool at_once)
{
    double now_s = clock_s();
    if (!at_once && now_s - engine->looked_s < 1e-3 * LOOK_MS)
        return;
    engine->looked_s = now_s;
    for (int i = 0; i < engine->now.num_ranks; i++) {
        struct engine_rank *rank = &engine->now.ranks[i];
        struct rank_report report;
        session_rank_report(engine->session, i, &report);
        rank->pid = report.pid;
        rank->loaded_bytes = report.loaded_bytes;
        rank->file_bytes = report.file_bytes;
        rank->rss_bytes = report.rss_bytes;
        rank->exchange_s_total = engine->past_exchange_s[i] + report.exchange_s;
        double step_s = engine->now.step_s_total - rank->exchange_s_total;
        rank->step_s_total = step_s > rank->step_s_total ? step_s : rank->step_s_total; // never back
        snprintf(rank->operation, sizeof rank->operation, "%s", report.operation);
        snprintf(rank->device, sizeof rank->device, "%s", report.device);
    }
}

static void publish(struct engine *engine)
{
    struct scheduler_stats *now = &engine->now.scheduler;
    *now = (struct scheduler_stats){0};
    if (engine->scheduler)
        scheduler_read_stats(engine->scheduler, now);
    add_stats(now, &engine->past);
    int64_t ahead = now->waiting + now->preempted + 1, slots = engine->max_live - engine->options.max_queue;
    double wait = engine->sequence_s * (double)ahead / (double)slots;
    engine->now.retry_after_s = wait < 1 ? 1 : wait > 60 ? 60 : wait;
    pthread_mutex_lock(&engine->mutex);
    copy_stats(&engine->stats, &engine->now);
    pthread_mutex_unlock(&engine->mutex);
}

// ---- the engine's thread: drain ----------------------------------------------------------------------------------

// Whether there is nothing left to wait for. Begins the drain when it has been asked for.
static bool drained(struct engine *engine)
{
    int drains = atomic_load(&engine->drains);
    if (!drains)
        return false;
    if (engine->drain_end_s <= 0) {
        engine->drain_end_s = clock_s() + engine->options.drain_timeout_s;
        set_state(engine, ENGINE_DRAINING);
        add_submitted(engine); // accepted just before
    }
    if (!scheduler_has_work(engine->scheduler))
        return true;
    if (drains == 1 && clock_s() < engine->drain_end_s)
        return false;
    struct error err;
    error_set(&err, ERR_RANK, "the server is shutting down");
    scheduler_fail(engine->scheduler, &err);
    engine->cut_short = true;
    return true;
}

// ---- the engine's thread: ranks ----------------------------------------------------------------------------------

// Whether the ranks may be started once more.
static bool may_restart(struct engine *engine, int rc)
{
    double now = clock_s();
    int64_t kept = 0;
    // What fails before it ever worked fails again; but for ranks that vanish.
    if (!engine->options.restart || (!engine->was_ready && rc != ERR_RANK))
        return false;
    for (int64_t i = 0; i < engine->num_restarts; i++)
        if (now - engine->restarts_s[i] < RESTART_WINDOW_S)
            engine->restarts_s[kept++] = engine->restarts_s[i];
    engine->num_restarts = kept;
    if (kept >= engine->options.restart_limit)
        return false;
    engine->restarts_s[engine->num_restarts++] = now;
    return true;
}

// Decides what follows on an error of the ranks and says so, once for each start: before the sequences hear of it, so that who tries again at
// once is not taken by the engine that has just been lost.
static void ranks_lost(struct engine *engine, int rc, const struct error *why)
{
    if (engine->lost)
        return;
    engine->lost = true;
    engine->restarts = !atomic_load(&engine->drains) && may_restart(engine, rc);
    for (int i = 0; engine->launched && i < engine->now.num_ranks; i++) {
        struct rank_report report;
        session_rank_report(engine->session, i, &report);
        engine->now.ranks[i].losses += report.lost;
    }
    snprintf(engine->now.error, sizeof engine->now.error, "%.255s", why->msg);
    publish(engine);
    set_state(engine, engine->restarts ? ENGINE_RESTARTING : ENGINE_FAILED);
}

// The session's step, for the scheduler.
static int run_step(void *arg, struct error *err)
{
    struct engine *engine = arg;
    int rc = engine->runner.run(engine->runner.arg, err);
    if (rc)
        ranks_lost(engine, rc, err);
    return rc;
}

// 0 when the ranks are ready, or when a drain has begun before.
static int start_ranks(struct engine *engine, struct error *err)
{
    struct scheduler_options options = {0};
    double begin_s = clock_s();
    int rc = atomic_load(&engine->drains) ? 0 : session_launch(engine->session, err);
    engine->launched = !rc;
    set_timer(engine, LOOK_MS);
    while (!rc && !atomic_load(&engine->drains)) {
        rc = session_wait(engine->session, engine->wait_fd, err);
        if (rc != 2)
            break;
        take_wake(engine);
        look_at_ranks(engine, true);
        publish(engine);
        rc = 0;
    }
    set_timer(engine, 0);
    if (rc || atomic_load(&engine->drains))
        return rc;
    engine->runner = session_runner(engine->session);
    const struct step_runner runner = {.arg = engine, .run = run_step};
    session_scheduler_options(engine->session, &options);
    options.share_prefixes = engine->options.share_prefixes;
    options.draft_tokens = engine->options.draft_tokens;
    options.hash_seed = engine->hash_seed;
    if ((rc = scheduler_create(&engine->scheduler, &options, session_step_area(engine->session), &runner, err)))
        return rc;
    int64_t cache_tokens = options.num_pages * KV_PAGE_TOKENS;
    atomic_store(&engine->room_tokens, cache_tokens < options.context ? cache_tokens : options.context);
    const struct shared_area *shared = session_shared(engine->session);
    engine->ready_s = clock_s();
    engine->now.start_s = engine->ready_s - begin_s;
    engine->now.load_s = 1e-9 * (double)(atomic_load(&shared->loaded_ns) - atomic_load(&shared->started_ns));
    look_at_ranks(engine, true);
    for (int i = 0; i < engine->now.num_ranks; i++)
        engine->now.loaded_bytes += engine->now.ranks[i].loaded_bytes;
    engine->was_ready = true;
    publish(engine);
    set_state(engine, ENGINE_READY);
    return 0;
}

// Steps until a drain is complete or the ranks are lost.
static int run_steps(struct engine *engine, struct error *err)
{
    for (;;) {
        int rc;
        add_submitted(engine);
        cancel_marked(engine);
        if (drained(engine))
            return 0;
        if (scheduler_has_work(engine->scheduler)) {
            double begin_s = clock_s();
            rc = scheduler_step(engine->scheduler, err);
            engine->now.step_s_total += clock_s() - begin_s;
            if (rc)
                return rc;
            look_at_ranks(engine, false);
            publish(engine);
            continue;
        }
        look_at_ranks(engine, true);
        publish(engine);
        rc = session_wait(engine->session, engine->wait_fd, err);
        if (rc < 0)
            return rc;
        take_wake(engine);
    }
}

// Ranks and scheduler end; so does whatever they still had to do.
static void stop_ranks(struct engine *engine, const struct error *why)
{
    if (engine->scheduler) {
        scheduler_fail(engine->scheduler, why);
        look_at_ranks(engine, true);
        publish(engine);
        engine->past = engine->now.scheduler;
        engine->past.running = engine->past.waiting = engine->past.preempted = 0;
        engine->past.pages = engine->past.pages_used = engine->past.pages_cached = 0;
    }
    for (struct engine_job *job = take_submitted(engine), *next; job; job = next) {
        next = job->next;
        end_job_early(job, FINISH_ERROR, why);
    }
    scheduler_free(engine->scheduler);
    engine->scheduler = NULL;
    for (int i = 0; i < engine->now.num_ranks; i++)
        engine->past_exchange_s[i] = engine->now.ranks[i].exchange_s_total;
    publish(engine);
    session_stop(engine->session);
}

// ---- the engine's thread: restarts -------------------------------------------------------------------------------

// Waits before the next start; false when a drain has begun meanwhile.
static bool back_off(struct engine *engine)
{
    if (engine->delay_s <= 0 || (engine->ready_s > 0 && clock_s() - engine->ready_s > RESTART_STABLE_S))
        engine->delay_s = engine->options.restart_delay_s;
    double delay = engine->delay_s;
    engine->delay_s = 2 * delay < RESTART_MAX_DELAY_S ? 2 * delay : RESTART_MAX_DELAY_S;
    engine->ready_s = 0;
    double end_s = clock_s() + delay;
    for (;;) {
        double left = end_s - clock_s();
        if (atomic_load(&engine->drains))
            return false;
        if (left <= 0)
            return true;
        struct pollfd fd = {.fd = engine->wake_fd, .events = POLLIN};
        if (poll(&fd, 1, (int)(left * 1000) + 1) > 0)
            take_wake(engine);
    }
}

static struct engine *_Atomic signalled_engine;

static void on_signal(int number)
{
    struct engine *engine = atomic_load(&signalled_engine);
    if (!engine || atomic_exchange(&engine->signal, number))
        _exit(128 + number);
    engine_drain(engine);
}

int engine_run(struct engine *engine, void (*on_state)(void *arg, enum engine_state state), void *arg,
               struct error *err)
{
    int rc;
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART}, before_int, before_term;
    engine->on_state = on_state;
    engine->on_state_arg = arg;
    atomic_store(&signalled_engine, engine);
    sigaction(SIGINT, &action, &before_int);
    sigaction(SIGTERM, &action, &before_term);
    sigset_t handled, mask_before;
    sigemptyset(&handled);
    sigaddset(&handled, SIGINT);
    sigaddset(&handled, SIGTERM);
    pthread_sigmask(SIG_UNBLOCK, &handled, &mask_before);
    if (on_state)
        on_state(arg, ENGINE_LOADING);
    for (;;) {
        struct error why = {0};
        engine->lost = false;
        if ((rc = start_ranks(engine, &why)) == 0 && engine->scheduler)
            rc = run_steps(engine, &why);
        if (rc == 0) {
            set_state(engine, ENGINE_DRAINING); // where it began before the ranks were ready
            error_set(&why, ERR_RANK, "the server is shutting down");
            stop_ranks(engine, &why);
            break;
        }
        ranks_lost(engine, rc, &why);
        stop_ranks(engine, &why);
        if (!engine->restarts) {
            if (engine->num_restarts > 0)
                error_set(&why, rc, "after %lld restarts: %s", (long long)engine->num_restarts, engine->now.error);
            if (err)
                *err = why;
            break;
        }
        if (!back_off(engine)) {
            set_state(engine, ENGINE_DRAINING);
            rc = 0;
            break;
        }
        engine->now.restarts++;
    }
    pthread_sigmask(SIG_SETMASK, &mask_before, NULL);
    sigaction(SIGINT, &before_int, NULL);
    sigaction(SIGTERM, &before_term, NULL);
    atomic_store(&signalled_engine, NULL);
    if (rc == 0 && engine->cut_short)
        rc = error_set(err, atomic_load(&engine->signal) == SIGINT ? ERR_SIGINT : ERR_SIGTERM,
                       "the drain's time was over; the sequences that were left have been ended");
    return rc;
}
