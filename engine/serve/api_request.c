// A request's life: owners, posts to the I/O thread, and what the engine calls. See api_internal.h.
#include "engine/serve/api_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

void api_random_hex(char *out, int digits)
{
    uint8_t random[32] = {0};
    size_t bytes = (size_t)digits / 2;
    if (getrandom(random, bytes, GRND_NONBLOCK) != (ssize_t)bytes) { // ids must differ; they are no secrets
        double now = clock_now_s();
        memcpy(random, &now, sizeof now < bytes ? sizeof now : bytes);
    }
    for (size_t i = 0; i < bytes; i++)
        snprintf(out + 2 * i, 3, "%02x", random[i]);
}

// ---- owners ------------------------------------------------------------------------------------------------------

static void on_posted(void *arg);

struct api_request *api_request_create(struct api *api, struct http_exchange *exchange)
{
    struct api_request *request = calloc(1, sizeof *request);
    if (!request)
        return NULL;
    request->api = api;
    request->exchange = exchange;
    request->writable = true;
    atomic_init(&request->refs, 1);
    atomic_init(&request->posted, false);
    request->post = (struct http_post){.fn = on_posted, .arg = request};
    pthread_mutex_init(&request->mutex, NULL);
    pthread_mutex_lock(&api->mutex);
    request->next = api->all;
    if (api->all)
        api->all->previous = request;
    api->all = request;
    pthread_mutex_unlock(&api->mutex);
    return request;
}

static void free_sequences(struct api_request *request)
{
    for (int i = 0; i < request->num_sequences; i++) {
        struct api_sequence *sequence = &request->sequences[i];
        api_choice_free(&sequence->choice);
        api_text_free(&sequence->queue);
        grammar_state_free(sequence->grammar);
    }
    for (int i = 0; i < request->num_groups; i++)
        free(request->groups[i].prompt.ids);
    free(request->sequences);
    free(request->groups);
    free(request->specs);
    grammar_free(request->grammar);
}

void api_request_free(struct api_request *request)
{
    struct api *api = request->api;
    pthread_mutex_lock(&api->mutex);
    if (request->next)
        request->next->previous = request->previous;
    if (request->previous)
        request->previous->next = request->next;
    else
        api->all = request->next;
    pthread_mutex_unlock(&api->mutex);
    free_sequences(request);
    api_params_clear(&request->params);
    api_text_free(&request->answer);
    pthread_mutex_destroy(&request->mutex);
    free(request->body);
    free(request);
}

void api_request_hold(struct api_request *request)
{
    atomic_fetch_add_explicit(&request->refs, 1, memory_order_relaxed);
}

void api_request_drop(struct api_request *request)
{
    if (atomic_fetch_sub_explicit(&request->refs, 1, memory_order_acq_rel) == 1)
        api_request_free(request);
}

// ---- to the I/O thread -------------------------------------------------------------------------------------------

// What happened before a wake is seen by the advance that follows: the flag falls before anything is looked at.
void api_request_wake(struct api_request *request)
{
    if (atomic_exchange(&request->posted, true))
        return;
    api_request_hold(request);
    http_server_post(request->api->server, &request->post);
}

static void on_posted(void *arg)
{
    struct api_request *request = arg;
    atomic_store(&request->posted, false);
    api_request_advance(request);
    api_request_drop(request);
}

static void end_work(struct api_request *request, enum api_phase phase)
{
    request->phase = phase;
    pthread_mutex_unlock(&request->mutex);
    api_request_wake(request);
}

void api_request_answer(struct api_request *request, struct api_text *json)
{
    pthread_mutex_lock(&request->mutex);
    if (json->failed)
        api_error_memory(&request->error);
    else if (json->bytes > API_ANSWER_BYTES)
        api_error_large(&request->error, "send less at once");
    else {
        request->answer = *json;
        *json = (struct api_text){0};
    }
    end_work(request, PHASE_ANSWERED);
}

void api_request_fail(struct api_request *request, const struct api_error *error)
{
    pthread_mutex_lock(&request->mutex);
    request->error = *error;
    end_work(request, PHASE_ANSWERED);
}

// ---- cancelling --------------------------------------------------------------------------------------------------

// Under the mutex. index: of a sequence; -1: all.
static void cancel(struct api_request *request, int64_t index)
{
    const struct api_engine *engine = &request->api->options.engine;
    if (request->running)
        engine->cancel(engine->arg, request->running, index);
}

void api_request_cancel_one(struct api_request *request, struct api_sequence *sequence)
{
    pthread_mutex_lock(&request->mutex);
    if (!sequence->cancelled && !sequence->ended)
        cancel(request, sequence->index);
    sequence->cancelled = true;
    pthread_mutex_unlock(&request->mutex);
}

// A job that the worker has not entered yet is cancelled when it does (remember_job).
void api_request_cancel(struct api_request *request)
{
    pthread_mutex_lock(&request->mutex);
    if (!request->cancelled)
        cancel(request, -1);
    request->cancelled = true;
    pthread_mutex_unlock(&request->mutex);
}

bool api_request_cancelled(struct api_request *request)
{
    pthread_mutex_lock(&request->mutex);
    bool cancelled = request->cancelled;
    pthread_mutex_unlock(&request->mutex);
    return cancelled;
}

// ---- called by the engine ----------------------------------------------------------------------------------------

// Gaps between tokens, and when the first one came.
static void note_time(struct api_sequence *sequence, int64_t count)
{
    struct api_request *request = sequence->request;
    struct metrics *metrics = request->api->options.metrics;
    double now = clock_now_s();
    if (request->first_token_s == 0)
        request->first_token_s = now;
    for (int64_t i = 0; metrics && sequence->last_token_s > 0 && i < count; i++)
        metrics_token_gap(metrics, (now - sequence->last_token_s) / (double)count);
    sequence->last_token_s = now;
}

static bool on_tokens(void *arg, const struct step_choice *choices, int64_t count)
{
    struct api_sequence *sequence = arg;
    struct api_request *request = sequence->request;
    pthread_mutex_lock(&request->mutex);
    note_time(sequence, count);
    for (int64_t i = 0; i < count; i++)
        api_text_append(&sequence->queue, &choices[i],
                        offsetof(struct step_choice, top) + (size_t)choices[i].num_top * sizeof choices[i].top[0]);
    sequence->out_of_memory |= sequence->queue.failed;
    bool wanted = !sequence->cancelled && !request->cancelled && !sequence->out_of_memory;
    pthread_mutex_unlock(&request->mutex);
    api_request_wake(request);
    return wanted;
}

static void on_end(void *arg, enum finish_reason reason, const struct sequence_usage *usage, uint32_t stop_token,
                   const struct error *err)
{
    struct api_sequence *sequence = arg;
    struct api_request *request = sequence->request;
    pthread_mutex_lock(&request->mutex);
    sequence->ended = true;
    sequence->reason = reason;
    sequence->stop_token = stop_token;
    sequence->usage = *usage;
    if (reason == FINISH_ERROR && err && !request->engine_error.code)
        request->engine_error = *err;
    bool last = ++request->num_ended == request->num_sequences;
    if (last)
        request->running = NULL;
    pthread_mutex_unlock(&request->mutex);
    api_request_wake(request);
    if (last)
        api_request_drop(request);
}

// ---- submitting --------------------------------------------------------------------------------------------------

static void remember_job(struct api_request *request, struct engine_job *job)
{
    pthread_mutex_lock(&request->mutex);
    if (request->num_ended < request->num_sequences)
        request->running = job;
    if (request->cancelled)
        cancel(request, -1);
    for (int i = 0; i < request->num_sequences; i++)
        if (request->sequences[i].cancelled)
            cancel(request, i);
    pthread_mutex_unlock(&request->mutex);
}

static int submit(struct api_request *request, struct error *err)
{
    const struct api_engine *engine = &request->api->options.engine;
    struct engine_job *job = NULL;
    for (int i = 0; i < request->num_sequences; i++) {
        request->specs[i].arg = &request->sequences[i];
        request->specs[i].on_tokens = on_tokens;
        request->specs[i].on_end = on_end;
    }
    api_request_hold(request); // until the last on_end
    int rc = engine->submit(engine->arg, request->specs, request->num_sequences, &job, err);
    if (rc)
        api_request_drop(request); // the worker holds it as well
    else
        remember_job(request, job);
    return rc;
}

// What an engine refuses that takes only so many sequences of a request is no matter of length.
static bool is_too_long(const struct api_request *request, const struct engine_stats *stats)
{
    for (int i = 0; i < request->num_groups; i++)
        if ((int64_t)request->groups[i].prompt.count >= stats->scheduler.pages * KV_PAGE_TOKENS)
            return true;
    return false;
}

// An error of submit.
static int refuse(const struct api_request *request, const struct error *err, struct api_error *error)
{
    const struct api_engine *engine = &request->api->options.engine;
    struct engine_stats stats = {0};
    engine->read_stats(engine->arg, &stats);
    bool too_long = err->code == ERR_USAGE && is_too_long(request, &stats);
    bool choices = err->code == ERR_USAGE && !too_long && request->num_groups == 1;
    api_error_from(error, err, choices ? "n" : request->params.chat ? "messages" : "prompt");
    if (too_long)
        error->code = "context_length_exceeded";
    if (error->status == 429)
        error->retry_after_s = stats.retry_after_s > 1 && stats.retry_after_s < 3600 ? (int64_t)stats.retry_after_s : 1;
    return -1;
}

int api_request_submit(struct api_request *request, struct api_error *error)
{
    struct error err = {0};
    if (submit(request, &err))
        return refuse(request, &err, error);
    pthread_mutex_lock(&request->mutex);
    end_work(request, PHASE_RUNNING);
    return 0;
}
