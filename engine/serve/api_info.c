// Routes that are answered at once. I/O thread.
#include "engine/serve/api_internal.h"

#include <string.h>

const char *api_state_word(enum engine_state state) { return state == ENGINE_READY ? "ok" : engine_state_name(state); }

// As a client sees it: ready needs the tokenizer too.
static enum engine_state state_of(const struct api_request *request)
{
    const struct api_engine *engine = &request->api->options.engine;
    enum engine_state state = engine->state(engine->arg);
    return state == ENGINE_READY && !atomic_load_explicit(&request->api->model, memory_order_acquire) ? ENGINE_LOADING
                                                                                                      : state;
}

static void respond_text(struct api_request *request, int status, struct api_text *json)
{
    struct api_error error = {0};
    if (json->failed) {
        api_error_memory(&error);
        api_respond_error(request, &error);
    } else
        api_respond_json(request, status, json->data, json->bytes);
}

// {"a": 1} of a new reference.
static void respond_object(struct api_request *request, json_t *object)
{
    struct api_error error = {0};
    char *text = object ? json_dumps(object, JSON_COMPACT) : NULL;
    json_decref(object);
    if (!text) {
        api_error_memory(&error);
        api_respond_error(request, &error);
        return;
    }
    api_respond_json(request, 200, text, strlen(text));
    free(text);
}

// ---- health ------------------------------------------------------------------------------------------------------

static bool asks_for_life(const char *query)
{
    return strcmp(query, "live=1") == 0 || strncmp(query, "live=1&", 7) == 0 || strstr(query, "&live=1");
}

void api_info_health(struct api_request *request, const char *rest)
{
    enum engine_state state = state_of(request);
    struct api_text *out = &request->api->scratch;
    bool alive = asks_for_life(http_exchange_request(request->exchange)->query);
    (void)rest;
    api_text_clear(out);
    api_text_printf(out, "{\"status\":\"%s\"}", api_state_word(state));
    respond_text(request, state == ENGINE_READY || alive ? 200 : 503, out);
}

// RunPod's load balancer: 204 while a worker starts, 200 when it takes requests.
void api_info_ping(struct api_request *request, const char *rest)
{
    enum engine_state state = state_of(request);
    (void)rest;
    if (state == ENGINE_LOADING || state == ENGINE_RESTARTING)
        api_respond(request, 204, NULL, NULL, 0);
    else
        api_info_health(request, "");
}

// ---- what runs here ----------------------------------------------------------------------------------------------

static void write_model(const struct api *api, const char *name, struct api_text *out)
{
    const struct api_model *model = atomic_load_explicit(&api->model, memory_order_acquire);
    api_text_puts(out, "{\"id\":");
    api_text_string(out, name, strlen(name));
    api_text_printf(
        out, ",\"object\":\"model\",\"created\":%lld,\"owned_by\":\"tpengine\",\"root\":", (long long)api->created);
    api_text_string(out, name, strlen(name));
    if (model)
        api_text_printf(out, ",\"max_model_len\":%lld", (long long)model->context);
    api_text_puts(out, "}");
}

void api_info_models(struct api_request *request, const char *rest)
{
    const struct api *api = request->api;
    struct api_text *out = &request->api->scratch;
    (void)rest;
    api_text_clear(out);
    api_text_puts(out, "{\"object\":\"list\",\"data\":[");
    for (int i = 0; i < api->options.num_model_names; i++) {
        api_text_puts(out, i ? "," : "");
        write_model(api, api->options.model_names[i], out);
    }
    api_text_puts(out, "]}");
    respond_text(request, 200, out);
}

void api_info_model(struct api_request *request, const char *name)
{
    const struct api_options *options = &request->api->options;
    struct api_text *out = &request->api->scratch;
    struct api_error error = {0};
    for (int i = 0; i < options->num_model_names; i++)
        if (strcmp(options->model_names[i], name) == 0) {
            api_text_clear(out);
            write_model(request->api, name, out);
            respond_text(request, 200, out);
            return;
        }
    api_error_set(&error, 404, "model_not_found", "model", "the model \"%.200s\" is not served here", name);
    api_respond_error(request, &error);
}

void api_info_version(struct api_request *request, const char *rest)
{
    (void)rest;
    respond_object(request, json_pack("{s:s}", "version", request->api->options.version));
}

void api_info_props(struct api_request *request, const char *rest)
{
    const struct api *api = request->api;
    const struct api_model *model = atomic_load_explicit(&api->model, memory_order_acquire);
    static const char *const formats[] = {
        [TOOLS_NONE] = "none",       [TOOLS_HERMES] = "hermes",           [TOOLS_LLAMA3] = "llama3",
        [TOOLS_MISTRAL] = "mistral", [TOOLS_MISTRAL_V11] = "mistral_v11", [TOOLS_HARMONY] = "harmony"};
    json_t *object = json_pack(
        "{s:s, s:s, s:s, s:i}", "model", api->options.num_model_names ? api->options.model_names[0] : "", "version",
        api->options.version, "state", api_state_word(state_of(request)), "max_choices", API_MAX_CHOICES);
    (void)rest;
    if (object && model)
        json_object_update_new(object, json_pack("{s:s, s:I, s:I, s:b, s:s, s:b}", "architecture",
                                                 model->desc->architecture, "max_model_len", (json_int_t)model->context,
                                                 "vocab_size", (json_int_t)model->desc->vocab_size, "chat_template",
                                                 model->chat != NULL, "tool_format", formats[model->format.tools],
                                                 "reasoning", model->format.reasoning));
    respond_object(request, object);
}

void api_info_metrics(struct api_request *request, const char *rest)
{
    const struct api_engine *engine = &request->api->options.engine;
    char *text = engine->metrics_text ? engine->metrics_text(engine->arg) : NULL;
    struct api_error error = {0};
    (void)rest;
    if (text)
        api_respond(request, 200, "text/plain; version=0.0.4; charset=utf-8", text, strlen(text));
    else {
        api_error_memory(&error);
        api_respond_error(request, &error);
    }
    free(text);
}

// ---- the page and its figures ------------------------------------------------------------------------------------

static json_t *describe_ranks(const struct engine_stats *stats)
{
    json_t *ranks = json_array();
    for (int i = 0; i < stats->num_ranks; i++) {
        const struct engine_rank *rank = &stats->ranks[i];
        json_array_append_new(ranks, json_pack("{s:i, s:I, s:I, s:I, s:I, s:f, s:s, s:s}", "rank", i, "pid",
                                               (json_int_t)rank->pid, "loaded_bytes", (json_int_t)rank->loaded_bytes,
                                               "file_bytes", (json_int_t)rank->file_bytes, "rss_bytes",
                                               (json_int_t)rank->rss_bytes, "exchange_s_total", rank->exchange_s_total,
                                               "operation", rank->operation, "device", rank->device));
    }
    return ranks;
}

static json_t *describe_scheduler(const struct scheduler_stats *stats)
{
    const struct {
        const char *key;
        int64_t value;
    } members[] = {
        {"running", stats->running},
        {"waiting", stats->waiting},
        {"preempted", stats->preempted},
        {"kv_pages", stats->pages},
        {"kv_pages_used", stats->pages_used},
        {"kv_pages_cached", stats->pages_cached},
        {"steps", stats->steps},
        {"prompt_tokens", stats->prompt_tokens},
        {"cached_tokens", stats->cached_tokens},
        {"produced_tokens", stats->produced_tokens},
        {"preemptions", stats->preemptions},
        {"drafted_tokens", stats->drafted_tokens},
        {"accepted_tokens", stats->accepted_tokens},
        {"prefill_rows", stats->prefill_rows},
        {"decode_rows", stats->decode_rows},
    };
    json_t *object = json_object();
    for (size_t i = 0; i < sizeof members / sizeof *members; i++)
        json_object_set_new(object, members[i].key, json_integer(members[i].value));
    return object;
}

void api_info_stats(struct api_request *request, const char *rest)
{
    struct api *api = request->api;
    const struct api_engine *engine = &api->options.engine;
    const struct api_model *model = atomic_load_explicit(&api->model, memory_order_acquire);
    struct engine_stats stats = {0};
    struct http_server_stats http = {0};
    (void)rest;
    engine->read_stats(engine->arg, &stats);
    http_server_read_stats(api->server, &http);
    json_t *object = json_pack(
        "{s:s, s:s, s:b, s:f, s:f, s:f, s:f, s:f, s:I, s:I, s:I, s:I, s:o, s:o, s:s}", "model",
        api->options.num_model_names ? api->options.model_names[0] : "", "state", api_state_word(state_of(request)),
        "chat_template", model && model->chat, "uptime_s", clock_now_s() - api->created_s, "tokens_per_second",
        api_rate(api, stats.scheduler.produced_tokens), "load_s", stats.load_s, "start_s", stats.start_s,
        "step_s_total", stats.step_s_total, "queued", (json_int_t)stats.queued, "restarts", (json_int_t)stats.restarts,
        "connections", (json_int_t)http.connections, "exchanges", (json_int_t)http.exchanges, "scheduler",
        describe_scheduler(&stats.scheduler), "ranks", describe_ranks(&stats), "error", stats.error);
    json_t *more = object && engine->describe ? engine->describe(engine->arg) : NULL;
    if (more)
        json_object_update_new(object, more);
    respond_object(request, object);
}

void api_info_page(struct api_request *request, const char *rest)
{
    const struct api_options *options = &request->api->options;
    struct api_error error = {0};
    (void)rest;
    if (!options->page) {
        api_error_set(&error, 404, "not_found", NULL, "there is no page here; the API begins at /v1");
        api_respond_error(request, &error);
        return;
    }
    if (options->page_policy)
        http_add_header(request->exchange, "Content-Security-Policy", options->page_policy);
    http_add_header(request->exchange, "X-Content-Type-Options", "nosniff");
    http_add_header(request->exchange, "Referrer-Policy", "no-referrer");
    http_add_header(request->exchange, "Cache-Control", "no-cache");
    api_respond(request, 200, "text/html; charset=utf-8", options->page, options->page_bytes);
}
