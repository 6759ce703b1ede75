// The engine's thread: its loop, ranks that start, are lost and start again, drains, signals. See engine_internal.h.
#include "engine/serve/engine_internal.h"

#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <sys/timerfd.h>
#include <unistd.h>

enum { RESTART_WINDOW_S = 600, RESTART_STABLE_S = 30, RESTART_MAX_DELAY_S = 60 };

// ---- wake-ups, states --------------------------------------------------------------------------------------------

static void take_wake(struct engine *engine)
{
    uint64_t count;
    ssize_t bytes = read(engine->timer_fd, &count, sizeof count);
    bytes = read(engine->wake_fd, &count, sizeof count);
    (void)bytes; // nothing to read is as well
    // In this order: work of whoever finds the flag still set, and so does not write, lies where the caller looks next.
    atomic_store(&engine->woken, false);
}

// Wakes session_wait again and again; 0: never.
static void set_timer(struct engine *engine, double interval_s)
{
    const struct timespec interval = {.tv_sec = (time_t)interval_s,
                                      .tv_nsec = (long)(1e9 * (interval_s - (double)(time_t)interval_s))};
    timerfd_settime(engine->timer_fd, 0, &(struct itimerspec){.it_interval = interval, .it_value = interval}, NULL);
}

static void tell_alive(struct engine *engine)
{
    double now_s = clock_now_s();
    // The timer comes a little early, now and then.
    if (engine->options.alive_s <= 0 || now_s - engine->alive_s < 0.9 * engine->options.alive_s)
        return;
    engine->alive_s = now_s;
    engine->options.on_alive();
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

// ---- drain -------------------------------------------------------------------------------------------------------

// Whether there is nothing left to wait for. Begins the drain when it has been asked for.
static bool drained(struct engine *engine)
{
    int drains = atomic_load(&engine->drains);
    if (!drains)
        return false;
    if (engine->drain_end_s <= 0) {
        engine->drain_end_s = clock_now_s() + engine->options.drain_timeout_s;
        set_state(engine, ENGINE_DRAINING);
        engine_work_add(engine); // accepted just before
    }
    if (!scheduler_has_work(engine->scheduler))
        return true;
    if (drains == 1 && clock_now_s() < engine->drain_end_s)
        return false;
    struct error err;
    error_set(&err, ERR_RANK, "the server is shutting down");
    scheduler_fail(engine->scheduler, &err);
    engine->cut_short = true;
    return true;
}

// ---- ranks -------------------------------------------------------------------------------------------------------

// Whether the ranks may be started once more.
static bool may_restart(struct engine *engine, int rc)
{
    double now = clock_now_s();
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
    snprintf(engine->now.error, sizeof engine->now.error, "%s", why->msg);
    engine_work_publish(engine);
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
    double begin_s = clock_now_s();
    int rc = atomic_load(&engine->drains) ? 0 : session_launch(engine->session, err);
    engine->launched = !rc;
    set_timer(engine, 1e-3 * ENGINE_LOOK_MS);
    while (!rc && !atomic_load(&engine->drains)) {
        rc = session_wait(engine->session, engine->wait_fd, err);
        if (rc != 2)
            break;
        take_wake(engine);
        tell_alive(engine);
        engine_work_look(engine, true);
        engine_work_publish(engine);
        rc = 0;
    }
    set_timer(engine, engine->options.alive_s);
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
    engine->ready_s = clock_now_s();
    engine->now.start_s = engine->ready_s - begin_s;
    engine->now.load_s = session_load_s(engine->session);
    engine_work_look(engine, true);
    for (int i = 0; i < engine->now.num_ranks; i++)
        engine->now.loaded_bytes += engine->now.ranks[i].loaded_bytes;
    engine->was_ready = true;
    engine_work_publish(engine);
    set_state(engine, ENGINE_READY);
    return 0;
}

// Steps until a drain is complete or the ranks are lost.
static int run_steps(struct engine *engine, struct error *err)
{
    for (;;) {
        int rc;
        tell_alive(engine);
        engine_work_add(engine);
        engine_work_cancel(engine);
        if (drained(engine))
            return 0;
        if (scheduler_has_work(engine->scheduler)) {
            double begin_s = clock_now_s();
            rc = scheduler_step(engine->scheduler, err);
            engine->now.step_s_total += clock_now_s() - begin_s;
            if (rc)
                return rc;
            engine_work_look(engine, false);
            engine_work_publish(engine);
            continue;
        }
        engine_work_look(engine, true);
        engine_work_publish(engine);
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
        engine_work_look(engine, true);
        engine_work_publish(engine);
        engine->past = engine->now.scheduler;
        engine->past.running = engine->past.waiting = engine->past.preempted = 0;
        engine->past.pages = engine->past.pages_used = engine->past.pages_cached = 0;
    }
    engine_work_refuse(engine, why);
    scheduler_free(engine->scheduler);
    engine->scheduler = NULL;
    for (int i = 0; i < engine->now.num_ranks; i++)
        engine->past_exchange_s[i] = engine->now.ranks[i].exchange_s_total;
    engine_work_publish(engine);
    session_stop(engine->session);
}

// ---- restarts ----------------------------------------------------------------------------------------------------

// Waits before the next start; false when a drain has begun meanwhile.
static bool back_off(struct engine *engine)
{
    if (engine->delay_s <= 0 || (engine->ready_s > 0 && clock_now_s() - engine->ready_s > RESTART_STABLE_S))
        engine->delay_s = engine->options.restart_delay_s;
    double delay = engine->delay_s;
    engine->delay_s = 2 * delay < RESTART_MAX_DELAY_S ? 2 * delay : RESTART_MAX_DELAY_S;
    engine->ready_s = 0;
    double end_s = clock_now_s() + delay;
    for (;;) {
        double left = end_s - clock_now_s();
        if (atomic_load(&engine->drains))
            return false;
        if (left <= 0)
            return true;
        struct pollfd fd = {.fd = engine->wait_fd, .events = POLLIN};
        if (poll(&fd, 1, (int)(left * 1000) + 1) > 0)
            take_wake(engine);
        tell_alive(engine);
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
