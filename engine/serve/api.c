// See api.h: creation, the handlers of the server, the ticker, logs. Everything else: api_internal.h.
#include "engine/serve/api_internal.h"

#include "engine/serve/log.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

const struct api_options api_options_default = {
    .version = "",
    .keep_alive_s = 5,
    .worker_threads = 2,
    .max_jobs = 1024,
    .max_job_bytes = 256u << 20,
    .log_requests = true,
};

// ---- handlers ----------------------------------------------------------------------------------------------------

static void on_request(void *arg, struct http_exchange *exchange)
{
    struct api_request *request = api_request_create(arg, exchange);
    http_exchange_set_data(exchange, request);
    if (request)
        api_route_request(request);
    else
        http_respond(exchange, 503, "application/json", api_error_no_memory, strlen(api_error_no_memory));
}

static void log_request(const struct api_request *request, const struct request_record *record)
{
    const struct http_request *http = http_exchange_request(request->exchange);
    const struct log_field fields[] = {
        {.key = "id", .type = LOG_TEXT, .text = request->id},
        {.key = "peer", .type = LOG_TEXT, .text = http->peer},
        {.key = "method", .type = LOG_TEXT, .text = http->method},
        {.key = "path", .type = LOG_TEXT, .text = http->path},
        {.key = "status", .type = LOG_INTEGER, .integer = record->status},
        {.key = "seconds", .type = LOG_SECONDS, .seconds = record->end_s},
        {.key = record->finish_reason ? "finish" : NULL, .type = LOG_TEXT, .text = record->finish_reason},
        {.key = "prompt_tokens", .type = LOG_INTEGER, .integer = record->usage.prompt_tokens},
        {.key = "cached_tokens", .type = LOG_INTEGER, .integer = record->usage.cached_tokens},
        {.key = "completion_tokens", .type = LOG_INTEGER, .integer = record->usage.produced_tokens},
        {.key = "queued", .type = LOG_SECONDS, .seconds = record->usage.queued_s},
        {.key = record->first_token_s >= 0 ? "first_token" : NULL,
         .type = LOG_SECONDS,
         .seconds = record->first_token_s},
        {.key = NULL},
    };
    bool quiet = request->route && request->route->answer && record->status < 400; // health checks, metrics, the page
    log_line(quiet ? LOG_DEBUG : LOG_INFO, "request", fields);
}

static void on_ended(void *arg, struct http_exchange *exchange, bool complete)
{
    struct api *api = arg;
    struct api_request *request = http_exchange_data(exchange);
    struct request_record record = {0};
    if (!request)
        return;
    api_request_cancel(request);
    api_request_summary(request, complete, &record);
    if (api->options.metrics && request->route && request->route->generates)
        metrics_request(api->options.metrics, &record);
    if (api->options.log_requests)
        log_request(request, &record);
    request->exchange = NULL;
    api_request_drop(request);
}

static void on_writable(void *arg, struct http_exchange *exchange)
{
    struct api_request *request = http_exchange_data(exchange);
    (void)arg;
    if (!request)
        return;
    request->writable = true;
    api_request_advance(request);
}

static void on_answered(void *arg, const struct http_exchange *exchange, int status, uint64_t body_bytes)
{
    struct api *api = arg;
    (void)exchange;
    (void)body_bytes;
    if (api->options.metrics)
        metrics_http(api->options.metrics, status);
}

static void on_refused(void *arg, const char *peer, int status)
{
    struct api *api = arg;
    const struct log_field fields[] = {{.key = "peer", .type = LOG_TEXT, .text = peer},
                                       {.key = "status", .type = LOG_INTEGER, .integer = status},
                                       {.key = NULL}};
    if (api->options.metrics)
        metrics_http(api->options.metrics, status);
    if (api->options.log_requests)
        log_line(LOG_INFO, "refused", fields);
}

struct http_handlers api_handlers(struct api *api)
{
    return (struct http_handlers){.arg = api,
                                  .on_request = on_request,
                                  .on_ended = on_ended,
                                  .on_writable = on_writable,
                                  .on_answered = on_answered,
                                  .on_refused = on_refused};
}

// ---- once a second -----------------------------------------------------------------------------------------------

static void note_rate(struct api *api, double now)
{
    struct engine_stats stats = {0};
    int slot = api->rate.next++ % API_RATE_SECONDS;
    api->options.engine.read_stats(api->options.engine.arg, &stats);
    api->rate.at_s[slot] = now;
    api->rate.produced[slot] = stats.scheduler.produced_tokens;
}

double api_rate(const struct api *api, int64_t produced)
{
    int oldest = api->rate.next < API_RATE_SECONDS ? 0 : api->rate.next % API_RATE_SECONDS;
    double seconds = clock_now_s() - api->rate.at_s[oldest];
    return api->rate.next > 0 && seconds > 0 ? (double)(produced - api->rate.produced[oldest]) / seconds : 0;
}

static void on_tick(void *arg)
{
    struct api *api = arg;
    double now = clock_now_s();
    atomic_store(&api->tick_posted, false);
    note_rate(api, now);
    pthread_mutex_lock(&api->mutex); // of none of them another thread touches what this looks at
    for (struct api_request *request = api->all; request; request = request->next) {
        api_request_comment(request, now);
        api_request_expire(request, now);
    }
    pthread_mutex_unlock(&api->mutex);
}

// Comments and ends come when they are due to within this time.
static double tick_s(const struct api *api)
{
    double step_s = 1, wanted_s[] = {api->options.keep_alive_s / 5, api->options.request_timeout_s / 5};
    for (int i = 0; i < 2; i++)
        if (wanted_s[i] > 0 && wanted_s[i] < step_s)
            step_s = wanted_s[i];
    return step_s < 0.01 ? 0.01 : step_s;
}

static void *run_ticker(void *arg)
{
    struct api *api = arg;
    struct timespec until;
    double step = tick_s(api);
    pthread_mutex_lock(&api->ticker_mutex);
    while (!api->ending) {
        double at = clock_now_s() + step;
        until.tv_sec = (time_t)at;
        until.tv_nsec = (long)(1e9 * (at - (double)until.tv_sec));
        pthread_cond_timedwait(&api->ticker_changed, &api->ticker_mutex, &until);
        if (!api->ending && !atomic_exchange(&api->tick_posted, true))
            http_server_post(api->server, &api->tick_post);
    }
    pthread_mutex_unlock(&api->ticker_mutex);
    return NULL;
}

static int start_ticker(struct api *api, struct error *err)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int rc = pthread_create(&api->ticker, NULL, run_ticker, api);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    api->ticking = rc == 0;
    return rc ? error_set(err, ERR_OTHER, "a thread of the server could not be started (error %d)", rc) : 0;
}

static void stop_ticker(struct api *api)
{
    if (!api->ticking)
        return;
    pthread_mutex_lock(&api->ticker_mutex);
    api->ending = true;
    pthread_cond_signal(&api->ticker_changed);
    pthread_mutex_unlock(&api->ticker_mutex);
    pthread_join(api->ticker, NULL);
    api->ticking = false;
}

// ---- life --------------------------------------------------------------------------------------------------------

static void init_locks(struct api *api)
{
    pthread_condattr_t monotonic;
    pthread_mutex_init(&api->mutex, NULL);
    pthread_mutex_init(&api->ticker_mutex, NULL);
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&api->ticker_changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    atomic_init(&api->model, NULL);
    atomic_init(&api->tick_posted, false);
}

int api_create(struct api **out, const struct api_options *options, struct error *err)
{
    struct api *api = calloc(1, sizeof *api);
    int rc;
    if (!api)
        return error_set(err, ERR_MEMORY, "no memory for the API");
    init_locks(api);
    api->options = *options;
    api->created = (int64_t)time(NULL);
    api->created_s = clock_now_s();
    api->tick_post = (struct http_post){.fn = on_tick, .arg = api};
    snprintf(api->fingerprint, sizeof api->fingerprint, "tpengine-%s", options->version);
    if (getrandom(&api->secret, sizeof api->secret, 0) != (ssize_t)sizeof api->secret)
        rc = error_set_errno(err, "the system gave no random numbers");
    else
        rc = api_auth_create(&api->auth, options->keys, options->num_keys, err);
    if (rc)
        api_free(api);
    else
        *out = api;
    return rc;
}

int api_start(struct api *api, struct http_server *server, struct error *err)
{
    const struct api_options *options = &api->options;
    api->server = server;
    int rc = job_pool_create(&api->pool, options->worker_threads, options->max_jobs, options->max_job_bytes, err);
    return rc ? rc : start_ticker(api, err);
}

void api_set_model(struct api *api, const struct api_model *model)
{
    api->loaded = *model;
    atomic_store_explicit(&api->model, &api->loaded, memory_order_release);
}

void api_stop(struct api *api)
{
    if (!api)
        return;
    stop_ticker(api);
    job_pool_free(api->pool);
    api->pool = NULL;
}

void api_free(struct api *api)
{
    if (!api)
        return;
    api_stop(api);
    while (api->all) // posts that never ran
        api_request_free(api->all);
    chat_close(api->chat);
    vocabulary_free(api->vocabulary);
    api_auth_free(api->auth);
    api_text_free(&api->scratch);
    pthread_cond_destroy(&api->ticker_changed);
    pthread_mutex_destroy(&api->ticker_mutex);
    pthread_mutex_destroy(&api->mutex);
    free(api);
}
