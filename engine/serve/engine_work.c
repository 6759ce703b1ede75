// Jobs on the engine's thread, from where they were submitted to the scheduler and back, and the figures that others see. See engine_internal.h.
#include "engine/serve/engine_internal.h"

#include <stdio.h>
#include <stdlib.h>

// ---- what the scheduler calls ------------------------------------------------------------------------------------

bool engine_work_tokens(void *arg, const struct step_choice *choices, int64_t count)
{
    struct entry *entry = arg;
    if (atomic_load_explicit(&entry->cancelled, memory_order_relaxed))
        return false;
    return !entry->spec.on_tokens || entry->spec.on_tokens(entry->spec.arg, choices, count);
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
    engine_job_free(job);
}

void engine_work_end(void *arg, enum finish_reason reason, const struct sequence_usage *usage, uint32_t stop_token,
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
    engine_work_end(entry, reason, &usage, 0, err);
}

// ---- jobs --------------------------------------------------------------------------------------------------------

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

// The sequences of one prompt, from first on; where they end.
static int64_t add_group(struct engine *engine, struct engine_job *job, int64_t first, struct sequence **sequences)
{
    struct error err = {0};
    int64_t end = first + 1;
    while (end < job->count && job->specs[end].prompt == job->specs[first].prompt)
        end++;
    int rc = scheduler_add(engine->scheduler, &job->specs[first], end - first, sequences, &err);
    for (int64_t i = first; i < end; i++)
        if (rc)
            end_early(&job->entries[i], FINISH_ERROR, &err);
        else
            job->entries[i].sequence = sequences[i - first];
    return end;
}

static void add_job(struct engine *engine, struct engine_job *job)
{
    struct error err = {0};
    struct sequence **sequences = calloc((size_t)job->count, sizeof(struct sequence *));
    if (!sequences) {
        error_set(&err, ERR_MEMORY, "no memory for a request");
        end_job_early(job, FINISH_ERROR, &err);
        return;
    }
    job->left++; // hold it over its last end
    for (int64_t first = 0; first < job->count;)
        first = add_group(engine, job, first, sequences);
    release(job);
    free(sequences);
}

static bool all_cancelled(const struct engine_job *job)
{
    for (int64_t i = 0; i < job->count; i++)
        if (!atomic_load(&job->entries[i].cancelled))
            return false;
    return true;
}

void engine_work_add(struct engine *engine)
{
    for (struct engine_job *job = take_submitted(engine), *next; job; job = next) {
        next = job->next;
        if (all_cancelled(job))
            end_job_early(job, FINISH_CANCELLED, NULL);
        else
            add_job(engine, job);
    }
}

void engine_work_cancel(struct engine *engine)
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

void engine_work_refuse(struct engine *engine, const struct error *why)
{
    for (struct engine_job *job = take_submitted(engine), *next; job; job = next) {
        next = job->next;
        end_job_early(job, FINISH_ERROR, why);
    }
}

// ---- figures -----------------------------------------------------------------------------------------------------

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

void engine_work_look(struct engine *engine, bool at_once)
{
    double now_s = clock_now_s();
    if (!at_once && now_s - engine->looked_s < 1e-3 * ENGINE_LOOK_MS)
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
        rank->load_s = report.load_s;
        rank->load_cpu_s = report.load_cpu_s;
        rank->load = report.load;
        rank->exchange_s_total = engine->past_exchange_s[i] + report.exchange_s;
        double step_s = engine->now.step_s_total - rank->exchange_s_total;
        rank->step_s_total = step_s > rank->step_s_total ? step_s : rank->step_s_total; // never back
        snprintf(rank->operation, sizeof rank->operation, "%s", report.operation);
        snprintf(rank->device, sizeof rank->device, "%s", report.device);
    }
}

void engine_work_publish(struct engine *engine)
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
    engine_copy_stats(&engine->stats, &engine->now);
    pthread_mutex_unlock(&engine->mutex);
}
