// See engine.h: creation, what any thread may ask for. The engine's own thread: engine_work.c, engine_run.c.
#include "engine/serve/engine_internal.h"

#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <sys/timerfd.h>
#include <unistd.h>

const struct engine_options engine_options_default = {
    .max_queue = 256,
    .draft_tokens = 4,
    .share_prefixes = true,
    .drain_timeout_s = 30,
    .restart_delay_s = 1,
    .restart_limit = 5,
};

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
    if (engine->options.restart_limit > ENGINE_MAX_RESTARTS)
        engine->options.restart_limit = ENGINE_MAX_RESTARTS;
    session_scheduler_options(session, &sizes);
    engine->room_tokens = session_context(session);
    engine->max_live = sizes.max_sequences + options->max_queue;
    engine->submitted_end = &engine->submitted;
    engine->stats.num_ranks = engine->now.num_ranks = (int)session_manifest(session)->num_ranks;
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

// ---- from any thread ---------------------------------------------------------------------------------------------

void engine_wake(struct engine *engine)
{
    uint64_t one = 1;
    int saved = errno;
    // A wake-up that has not been taken carries this one too. Writing cannot fail: the counter is far from its end.
    if (!atomic_exchange(&engine->woken, true) && write(engine->wake_fd, &one, sizeof one) < 0)
        atomic_store(&engine->woken, false);
    errno = saved;
}

enum engine_state engine_state(const struct engine *engine) { return (enum engine_state)atomic_load(&engine->state); }

void engine_job_free(struct engine_job *job)
{
    if (job)
        free(job->specs);
    free(job);
}

int engine_submit(struct engine *engine, const struct sequence_spec *specs, int64_t count, struct engine_job **out,
                  struct error *err)
{
    int rc = 0;
    const int64_t room = atomic_load(&engine->room_tokens);
    if (count < 1 || count > engine->max_live)
        return error_set(err, ERR_USAGE, "%lld sequences in one request: from 1 to %lld have places here",
                         (long long)count, (long long)engine->max_live);
    for (int64_t i = 0; i < count; i++)
        if (specs[i].prompt_count < 1 || specs[i].prompt_count > room)
            return error_set(err, ERR_USAGE, "the prompt has %lld tokens; from 1 to %lld fit",
                             (long long)specs[i].prompt_count, (long long)room);
    struct engine_job *job = calloc(1, sizeof *job + (size_t)count * sizeof job->entries[0]);
    if (!job || !(job->specs = malloc((size_t)count * sizeof *specs))) {
        engine_job_free(job);
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
        job->specs[i].on_tokens = engine_work_tokens;
        job->specs[i].on_end = engine_work_end;
    }
    pthread_mutex_lock(&engine->mutex);
    if (engine_state(engine) != ENGINE_READY) {
        rc = error_set(err, ERR_RANK, "the engine is %s", engine_state_name(engine_state(engine)));
    } else if (!places_take(&engine->places, job->tenant, count, clock_now_s())) {
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
        engine_job_free(job);
    else
        engine_wake(engine);
    return rc;
}

void engine_cancel(struct engine *engine, struct engine_job *job, int64_t index)
{
    for (int64_t i = 0; i < job->count; i++)
        if (index < 0 || index == i)
            atomic_store(&job->entries[i].cancelled, true);
    atomic_store(&engine->cancels, true);
    engine_wake(engine);
}

void engine_drain(struct engine *engine)
{
    atomic_fetch_add(&engine->drains, 1);
    engine_wake(engine);
}

void engine_copy_stats(struct engine_stats *to, const struct engine_stats *from)
{
    memcpy(to, from, offsetof(struct engine_stats, ranks) + (size_t)from->num_ranks * sizeof from->ranks[0]);
}

void engine_read_stats(struct engine *engine, struct engine_stats *out)
{
    pthread_mutex_lock(&engine->mutex);
    engine_copy_stats(out, &engine->stats);
    out->queued = out->scheduler.waiting + engine->num_submitted;
    pthread_mutex_unlock(&engine->mutex);
}
