// Which path does what, who may, and what every answer carries. I/O thread.
#include "engine/serve/api_internal.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

// ---- answers -----------------------------------------------------------------------------------------------------

// The Origin header if it may read answers, else NULL.
static const char *allowed_origin(const struct api_request *request)
{
    const struct api_options *options = &request->api->options;
    const char *origin = http_request_header(request->exchange, "Origin");
    for (int i = 0; origin && i < options->num_cors_origins; i++)
        if (strcmp(options->cors_origins[i], "*") == 0 || strcmp(options->cors_origins[i], origin) == 0)
            return origin;
    return NULL;
}

void api_add_headers(struct api_request *request)
{
    http_add_header(request->exchange, "X-Request-Id", request->id);
    if (request->api->options.num_cors_origins == 0)
        return;
    const char *origin = allowed_origin(request);
    http_add_header(request->exchange, "Vary", "Origin");
    if (!origin)
        return;
    http_add_header(request->exchange, "Access-Control-Allow-Origin", origin);
    http_add_header(request->exchange, "Access-Control-Expose-Headers", "X-Request-Id, Retry-After");
}

void api_respond(struct api_request *request, int status, const char *type, const void *body, size_t bytes)
{
    request->finished = true;
    api_add_headers(request);
    request->status = http_respond(request->exchange, status, type, body, bytes);
}

void api_respond_json(struct api_request *request, int status, const char *json, size_t bytes)
{
    api_respond(request, status, "application/json", json, bytes);
}

void api_respond_error(struct api_request *request, const struct api_error *error)
{
    struct api_text json = {0};
    char number[32];
    api_error_write(&json, error);
    if (error->retry_after_s > 0) {
        snprintf(number, sizeof number, "%lld", (long long)error->retry_after_s);
        http_add_header(request->exchange, "Retry-After", number);
    }
    if (error->status == 401)
        http_add_header(request->exchange, "WWW-Authenticate", "Bearer");
    if (json.failed)
        api_respond_json(request, 503, api_error_no_memory, strlen(api_error_no_memory));
    else
        api_respond_json(request, error->status, json.data, json.bytes);
    api_text_free(&json);
}

// ---- routes ------------------------------------------------------------------------------------------------------

static const struct api_route routes[] = {
    {.path = "/v1/chat/completions", .post = true, .generates = true, .work = api_chat_completions},
    {.path = "/v1/completions", .post = true, .generates = true, .work = api_completions},
    {.path = "/invocations", .post = true, .generates = true, .work = api_invocations},
    {.path = "/tokenize", .post = true, .work = api_tokenize},
    {.path = "/detokenize", .post = true, .work = api_detokenize},
    {.path = "/apply-template", .post = true, .work = api_apply_template},
    {.path = "/v1/models", .answer = api_info_models},
    {.path = "/v1/models/", .prefix = true, .answer = api_info_model},
    {.path = "/v1/stats", .answer = api_info_stats},
    {.path = "/health", .open = true, .health = true, .answer = api_info_health},
    {.path = "/v1/health", .open = true, .answer = api_info_health},
    {.path = "/ping", .open = true, .health = true, .answer = api_info_ping},
    {.path = "/version", .answer = api_info_version},
    {.path = "/metrics", .answer = api_info_metrics},
    {.path = "/props", .answer = api_info_props},
    {.path = "/info", .answer = api_info_props},
    // The page itself says nothing of the model, and a browser that opens it cannot send a key; what it shows, it asks for with one.
    {.path = "/", .open = true, .answer = api_info_page},
};

static const struct api_route *find_route(const char *path)
{
    for (size_t i = 0; i < sizeof routes / sizeof *routes; i++) {
        size_t bytes = strlen(routes[i].path);
        if (routes[i].prefix ? strncmp(path, routes[i].path, bytes) == 0 && path[bytes]
                             : strcmp(path, routes[i].path) == 0)
            return &routes[i];
    }
    return NULL;
}

// ---- what a request must satisfy ---------------------------------------------------------------------------------

static bool is_method(const struct api_route *route, const char *method)
{
    return route->post ? strcmp(method, "POST") == 0 : strcmp(method, "GET") == 0 || strcmp(method, "HEAD") == 0;
}

// Forms are let through: curl -d says so of everything.
static bool clearly_not_json(const char *type)
{
    static const char *const others[] = {"multipart/", "image/",   "audio/",         "video/",
                                         "text/html",  "text/xml", "application/xml"};
    for (size_t i = 0; type && i < sizeof others / sizeof *others; i++)
        if (strncasecmp(type, others[i], strlen(others[i])) == 0)
            return true;
    return false;
}

static bool is_encoded(const char *encoding) { return encoding && strcasecmp(encoding, "identity") != 0; }

static int check_state(struct api_request *request, struct api_error *error)
{
    const struct api_engine *engine = &request->api->options.engine;
    enum engine_state state = engine->state(engine->arg);
    request->model = atomic_load_explicit(&request->api->model, memory_order_acquire);
    if (request->model && (!request->route->generates || state == ENGINE_READY))
        return 0;
    api_error_set(error, 503, state == ENGINE_READY ? "loading" : api_state_word(state), NULL, "%s",
                  state == ENGINE_DRAINING ? "the server is about to stop and takes no new requests"
                  : state == ENGINE_FAILED ? "the ranks of the model were lost"
                                           : "the model is being loaded; try again soon");
    error->retry_after_s = 5;
    return -1;
}

static int check_request(struct api_request *request, const struct http_request *http, int key, struct api_error *error)
{
    const struct api_route *route = request->route;
    if (http->health_port && !(route && route->health))
        return api_error_set(error, 404, "not_found", NULL, "this port answers /health and /ping only");
    if (!(route && route->open) && api_auth_required(request->api->auth) && !key)
        return api_error_set(error, 401, "invalid_api_key", NULL,
                             "a valid API key is needed: send the header Authorization: Bearer KEY");
    if (!route)
        return api_error_set(error, 404, "not_found", NULL, "there is nothing at %.200s", http->path);
    if (!is_method(route, http->method)) {
        http_add_header(request->exchange, "Allow", route->post ? "POST" : "GET, HEAD");
        return api_error_set(error, 405, "method_not_allowed", NULL, "%s takes %s, not %.20s", route->path,
                             route->post ? "POST" : "GET", http->method);
    }
    if (!route->work)
        return 0;
    if (clearly_not_json(http_request_header(request->exchange, "Content-Type")))
        return api_error_set(error, 415, "unsupported_media_type", NULL, "the body must be application/json");
    if (is_encoded(http_request_header(request->exchange, "Content-Encoding")))
        return api_error_set(error, 415, "unsupported_media_type", NULL,
                             "the body must be sent without Content-Encoding");
    return check_state(request, error);
}

// ---- dispatch ----------------------------------------------------------------------------------------------------

// A browser asks whether a page of another origin may send a request.
static bool answer_preflight(struct api_request *request, const struct http_request *http)
{
    const char *wanted = http_request_header(request->exchange, "Access-Control-Request-Headers");
    if (strcmp(http->method, "OPTIONS") != 0 || http->health_port || !allowed_origin(request))
        return false;
    http_add_header(request->exchange, "Access-Control-Allow-Methods", "GET, POST, OPTIONS");
    http_add_header(request->exchange, "Access-Control-Allow-Headers",
                    wanted && strlen(wanted) <= 1024 ? wanted : "Authorization, Content-Type, X-Request-Id");
    http_add_header(request->exchange, "Access-Control-Max-Age", "600");
    api_respond(request, 204, NULL, NULL, 0);
    return true;
}

// The client's own id, if it can stand in headers and logs; else a new one.
static void choose_id(struct api_request *request)
{
    const char *given = http_request_header(request->exchange, "X-Request-Id");
    size_t bytes = given ? strlen(given) : 0;
    bool sane = bytes > 0 && bytes < API_ID_BYTES;
    for (size_t i = 0; sane && i < bytes; i++)
        sane = isalnum((unsigned char)given[i]) || strchr("-_.:+/=", given[i]);
    if (sane) {
        memcpy(request->id, given, bytes + 1);
        return;
    }
    memcpy(request->id, "req-", 4);
    api_random_hex(request->id + 4, 32);
}

static void run_work(void *arg)
{
    struct api_request *request = arg;
    if (!api_request_cancelled(request)) // nobody waits for it, as when the server stops
        request->route->work(request);
    free(request->body);
    request->body = NULL;
    api_request_drop(request);
}

static int start_work(struct api_request *request, struct api_error *error)
{
    if (!request->route->generates)
        http_exchange_outlive_half_close(request->exchange);
    request->body = http_request_take_body(request->exchange, &request->body_bytes);
    request->job = (struct job){.run = run_work, .arg = request, .bytes = request->body_bytes};
    api_request_hold(request);
    if (job_pool_add(request->api->pool, &request->job))
        return 0;
    api_request_drop(request);
    api_error_set(error, 503, "overloaded", NULL, "too many requests wait to be read; try again soon");
    error->retry_after_s = 1;
    return -1;
}

void api_route_request(struct api_request *request)
{
    const struct http_request *http = http_exchange_request(request->exchange);
    struct api_error error = {0};
    int key = api_auth_check(request->api->auth, http_request_header(request->exchange, "Authorization"));
    choose_id(request);
    request->received_s = request->last_write_s = http->received_s;
    request->salted = key > 0;
    request->tenant = key ? (uint64_t)key : http->peer_hash;
    request->route = find_route(http->path);
    if (answer_preflight(request, http))
        return;
    if (check_request(request, http, key, &error) == 0) {
        if (!request->route->work) {
            request->route->answer(request, http->path + strlen(request->route->path));
            return;
        }
        if (start_work(request, &error) == 0)
            return;
    }
    api_respond_error(request, &error);
}
