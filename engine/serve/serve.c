// tpengine serve: the OpenAI-compatible server. Options, and the order in which its parts come up and go down.
//
// The sockets are open before anything of the model is read, be it from a slow server, so that health checks are answered meanwhile.
// Threads: this one forks and steps the ranks (engine.h); one serves the sockets (http_server.h); a few parse and tokenize (api.h). Only this one takes SIGINT and SIGTERM.
#include "engine/commands.h"
#include "engine/serve/api.h"
#include "engine/serve/engine.h"
#include "engine/serve/http_server.h"
#include "engine/serve/log.h"
#include "engine/serve/metrics.h"
#include "engine/serve/notify.h"
#include "engine/serve/page.h"
#include "engine/serve/start_log.h"
#include "engine/store_url.h"
#include "kernels/clock.h"
#include "version.h"

#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

enum { DEFAULT_PORT = 8000, SAGEMAKER_PORT = 8080, MAX_KEYS = 1024, MAX_KEY_FILE_BYTES = 1 << 20 };
static const double flush_s = 3; // for answers on their way when everything else has ended

static struct {
    const char *host, *unix_path, *key_file, *metrics_names, *log_format, *log_level, *prefix_cache;
    int64_t port, health_port, max_batch, max_queue, connections, kv_tokens, draft_tokens, headers, max_tokens, workers;
    int64_t restart_limit;
    uint64_t header_bytes, body_bytes, output_bytes;
    double header_s, body_s, idle_s, write_s, drain_s, keep_alive_s, request_s, restart_delay_s;
    struct option_list keys, origins, names;
    bool restart, no_page, no_request_log, sagemaker;
} options = {
    .port = -1,
    .health_port = -1,
    .max_batch = MAX_SEQUENCES,
    .metrics_names = "tpengine",
    .log_format = "text",
    .log_level = "info",
    .prefix_cache = "on",
};

void serve_set_defaults(void)
{
    const struct http_limits *limits = &http_limits_default;
    const struct engine_options *engine = &engine_options_default;
    options.max_queue = engine->max_queue;
    options.draft_tokens = engine->draft_tokens;
    options.drain_s = engine->drain_timeout_s;
    options.restart_delay_s = engine->restart_delay_s;
    options.restart_limit = engine->restart_limit;
    options.connections = limits->connections;
    options.headers = limits->headers;
    options.header_bytes = limits->header_bytes;
    options.body_bytes = limits->body_bytes;
    options.output_bytes = limits->output_bytes;
    options.header_s = limits->header_s;
    options.body_s = limits->body_s;
    options.idle_s = limits->idle_s;
    options.write_s = limits->write_stall_s;
    options.keep_alive_s = api_options_default.keep_alive_s;
    options.request_s = api_options_default.request_timeout_s;
    options.workers = api_options_default.worker_threads;
    options.max_tokens = api_options_default.default_max_tokens;
}

const struct option_spec serve_options[] = {
    {"host", OPTION_TEXT, &options.host, "ADDRESS", 0, 0, "listen here; default: 127.0.0.1, with --sagemaker 0.0.0.0"},
    {"port", OPTION_INT, &options.port, "N", 0, 65535,
     "0 takes a free one; default: PORT of the environment, else 8000"},
    {"health-port", OPTION_INT, &options.health_port, "N", 0, 65535,
     "one more port, for health checks alone; default: PORT_HEALTH of the environment, else none"},
    {"unix", OPTION_TEXT, &options.unix_path, "PATH", 0, 0,
     "listen on this Unix socket; on TCP as well only if --host or --port is given"},
    {"api-key", OPTION_LIST, &options.keys, "KEY", 0, 0,
     "ask for one of these keys, but for health checks; may be repeated"},
    {"api-key-file", OPTION_TEXT, &options.key_file, "FILE", 0, 0, "more keys, one a line"},
    {"allow-origin", OPTION_LIST, &options.origins, "ORIGIN", 0, 0,
     "pages of this origin may call (CORS), * for any; may be repeated"},
    {"served-model-name", OPTION_LIST, &options.names, "NAME", 0, 0,
     "the model's name in requests and answers, default: the directory's; may be repeated"},
    {"max-batch", OPTION_INT, &options.max_batch, "N", 1, MAX_SEQUENCES, "most sequences that are computed together"},
    {"max-queue", OPTION_INT, &options.max_queue, "N", 0, 1 << 20, "most sequences that wait; above: status 429"},
    {"max-tokens", OPTION_INT, &options.max_tokens, "N", 0, 1 << 24,
     "tokens of a chat's answer that names no number; 0: what the context leaves"},
    {"kv-tokens", OPTION_INT, &options.kv_tokens, "N", 0, 1ll << 40,
     "tokens that the KV cache holds; 0: the context for each of --max-batch, or less where memory is short"},
    {"prefix-cache", OPTION_CHOICE, &options.prefix_cache, "on|off", 0, 0,
     "share the cache of equal beginnings of prompts"},
    {"draft-tokens", OPTION_INT, &options.draft_tokens, "N", 0, 64,
     "longest draft by prompt lookup, which never changes an answer; 0: none"},
    {"restart", OPTION_FLAG, &options.restart, NULL, 0, 0, "start the ranks again when one is lost, instead of ending"},
    {"restart-delay", OPTION_NUMBER, &options.restart_delay_s, "SECONDS", 0, 60,
     "before the first new start; doubled for each further one, up to 60"},
    {"restart-limit", OPTION_INT, &options.restart_limit, "N", 1, 1000, "most new starts within ten minutes"},
    {"drain-timeout", OPTION_NUMBER, &options.drain_s, "SECONDS", 0, 86400,
     "what runs at SIGTERM may go on for so long; a second signal ends at once"},
    {"metrics-names", OPTION_CHOICE, &options.metrics_names, "tpengine|vllm", 0, 0, "prefix of the names in /metrics"},
    {"log-format", OPTION_CHOICE, &options.log_format, "text|json", 0, 0, "lines on standard error"},
    {"log-level", OPTION_CHOICE, &options.log_level, "error|warning|info|debug", 0, 0, "least level of a line"},
    {"no-request-log", OPTION_FLAG, &options.no_request_log, NULL, 0, 0, "no line for each request"},
    {"no-page", OPTION_FLAG, &options.no_page, NULL, 0, 0, "no page for browsers at /"},
    {"sagemaker", OPTION_FLAG, &options.sagemaker, NULL, 0, 0, "host 0.0.0.0 and port 8080 unless others are given"},
    {"max-connections", OPTION_INT, &options.connections, "N", 1, 1 << 20, "most open connections"},
    {"max-header", OPTION_BYTES, &options.header_bytes, "SIZE", 0, 0,
     "longest request line and headers; default: 16KiB"},
    {"max-headers", OPTION_INT, &options.headers, "N", 1, 1 << 16, "most headers of a request"},
    {"max-body", OPTION_BYTES, &options.body_bytes, "SIZE", 0, 0, "longest body of a request; default: 4MiB"},
    {"max-output", OPTION_BYTES, &options.output_bytes, "SIZE", 0, 0,
     "most bytes that wait for a slow client; default: 64KiB"},
    {"header-timeout", OPTION_NUMBER, &options.header_s, "SECONDS", 0.1, 3600, "for all headers of a request"},
    {"body-timeout", OPTION_NUMBER, &options.body_s, "SECONDS", 0.1, 3600, "for the whole body of a request"},
    {"idle-timeout", OPTION_NUMBER, &options.idle_s, "SECONDS", 0.1, 86400, "between two requests of a connection"},
    {"write-timeout", OPTION_NUMBER, &options.write_s, "SECONDS", 0.1, 3600, "for a client that takes nothing"},
    {"request-timeout", OPTION_NUMBER, &options.request_s, "SECONDS", 0, 86400,
     "from a request to the end of its answer; above: status 504, or an error that ends its stream; 0: no limit"},
    {"keep-alive", OPTION_NUMBER, &options.keep_alive_s, "SECONDS", 0, 3600,
     "silence of a stream before a comment is sent; 0: none"},
    {"worker-threads", OPTION_INT, &options.workers, "N", 1, 64, "threads that parse requests and tokenize"},
    SESSION_OPTION_LINES,
    {NULL, OPTION_FLAG, NULL, NULL, 0, 0, NULL},
};

struct server {
    struct session *session;
    _Atomic(struct engine *) engine; // NULL until the manifest has been read, and with it session; then both stay
    struct metrics *metrics;
    struct api *api;
    struct http_server *http;
    pthread_t http_thread;
    bool http_running;
    atomic_bool http_failed;
    struct error http_error; // of http_server_run, once its thread has been joined
    pthread_t load_thread;   // of api_load
    bool loading;            // it has not been joined
    struct error load_error; // of api_load, where load_failed
    atomic_bool load_failed, load_cancelled;
    pthread_mutex_t ready;           // guards these two: who is ready last says so
    bool ranks_ready, answers_ready; // answers: what api_load brings
    char *keys[MAX_KEYS];
    int num_keys;
    char name[NAME_MAX + 1]; // of the model, unless others are given
    const char *model_name;  // it
    struct store_options store;
    double begin_s;
};
static struct server the_server = {.ready = PTHREAD_MUTEX_INITIALIZER};

// ---- options -----------------------------------------------------------------------------------------------------

static int port_from_environment(const char *name, int64_t *port, struct error *err)
{
    const char *text = getenv(name);
    char *end;
    if (*port >= 0 || !text || !*text)
        return 0;
    errno = 0;
    long value = strtol(text, &end, 10);
    if (*end || errno || value < 0 || value > 65535)
        return error_set(err, ERR_USAGE, "%s of the environment must be a port, not \"%.40s\"", name, text);
    *port = value;
    return 0;
}

static int add_key(struct server *server, const char *key, size_t bytes, struct error *err)
{
    if (server->num_keys == MAX_KEYS)
        return error_set(err, ERR_USAGE, "more than %d API keys", MAX_KEYS);
    if (!(server->keys[server->num_keys] = strndup(key, bytes)))
        return error_set(err, ERR_MEMORY, "no memory for API keys");
    server->num_keys++;
    return 0;
}

static int read_keys(struct server *server, struct error *err)
{
    char *text = NULL;
    size_t bytes;
    int rc = 0;
    for (int i = 0; i < options.keys.count && !rc; i++)
        rc = add_key(server, options.keys.items[i], strlen(options.keys.items[i]), err);
    if (rc || !options.key_file)
        return rc;
    if ((rc = read_text(options.key_file, &text, &bytes, err)))
        return rc;
    for (const char *line = text; *line && !rc; line += strspn(line, "\r\n")) {
        size_t length = strcspn(line, "\r\n"), blanks = strspn(line, " \t"), end = length;
        while (end > blanks && (line[end - 1] == ' ' || line[end - 1] == '\t'))
            end--;
        if (end > blanks)
            rc = add_key(server, line + blanks, end - blanks, err);
        line += length;
    }
    explicit_bzero(text, bytes);
    free(text);
    // An empty file must not open the server to everyone.
    if (!rc && server->num_keys == options.keys.count)
        rc = error_set(err, ERR_USAGE, "%s: holds no API key", options.key_file);
    return rc;
}

// The directory's name, or the last part of the URL's path.
static int choose_name(struct server *server, const char *place, struct error *err)
{
    struct store_url url = {0};
    char *path = NULL;
    int rc = store_url_is_one(place) ? store_url_parse(&url, place, err) : 0;
    if (rc)
        return rc;
    if (!url.shown && !(path = realpath(place, NULL)))
        return error_set_errno(err, "%s", place);
    const char *slash = strrchr(path ? path : strstr(url.shown, "://") + 3, '/'); // of a host alone there is no name
    snprintf(server->name, sizeof server->name, "%s", slash && slash[1] ? slash + 1 : "model");
    store_url_clear(&url);
    free(path);
    return 0;
}

static int check_options(struct error *err)
{
    int rc;
    // Beside --unix TCP must be asked for by an option; PORT only says where.
    bool tcp = !options.unix_path || options.host || options.sagemaker;
    if ((tcp && (rc = port_from_environment("PORT", &options.port, err))) ||
        (rc = port_from_environment("PORT_HEALTH", &options.health_port, err)))
        return rc;
    if (options.header_bytes < 256 || options.body_bytes < 1 || options.output_bytes < 1024)
        return error_set(err, ERR_USAGE,
                         "--max-header, --max-body and --max-output are at least 256, 1 and 1024 bytes");
    return 0;
}

static struct http_limits http_limits_chosen(void)
{
    struct http_limits limits = http_limits_default;
    limits.header_bytes = options.header_bytes;
    limits.headers = (int)options.headers;
    limits.body_bytes = options.body_bytes;
    limits.output_bytes = options.output_bytes;
    limits.header_s = options.header_s;
    limits.body_s = options.body_s;
    limits.idle_s = options.idle_s;
    limits.write_stall_s = options.write_s;
    limits.connections = (int)options.connections;
    return limits;
}

// Every connection is a descriptor. Where they cannot all be had, fewer connections are taken.
static void raise_descriptor_limit(void)
{
    enum { OTHER_DESCRIPTORS = 512 };
    struct rlimit limit;
    rlim_t wanted = (rlim_t)options.connections + OTHER_DESCRIPTORS;
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur >= wanted)
        return;
    limit.rlim_cur = limit.rlim_max == RLIM_INFINITY || limit.rlim_max > wanted ? wanted : limit.rlim_max;
    if (setrlimit(RLIMIT_NOFILE, &limit) != 0)
        return;
    if (limit.rlim_cur >= wanted)
        return;
    int64_t possible = (int64_t)limit.rlim_cur - OTHER_DESCRIPTORS;
    options.connections = possible > 64 ? possible : 64;
    log_line(LOG_WARNING, "fewer connections than wanted: raise the limit of open files",
             (struct log_field[]){{.key = "connections", .type = LOG_INTEGER, .integer = options.connections}, {0}});
}

// ---- listening ---------------------------------------------------------------------------------------------------

static bool is_loopback(const char *host)
{
    return strncmp(host, "127.", 4) == 0 || strcmp(host, "::1") == 0 || strcmp(host, "localhost") == 0;
}

static void log_listening(const char *host, int port, const char *what)
{
    log_line(LOG_INFO, what,
             (struct log_field[]){{.key = "address", .type = LOG_TEXT, .text = host},
                                  {.key = port ? "port" : NULL, .type = LOG_INTEGER, .integer = port},
                                  {0}});
}

static int open_sockets(struct server *server, struct error *err)
{
    int rc, bound;
    const char *host = options.host ? options.host : options.sagemaker ? "0.0.0.0" : "127.0.0.1";
    bool tcp = !options.unix_path || options.host || options.port >= 0 || options.sagemaker;
    int port = (int)(options.port >= 0 ? options.port : options.sagemaker ? SAGEMAKER_PORT : DEFAULT_PORT);
    if (options.unix_path) {
        if ((rc = http_server_listen_unix(server->http, options.unix_path, err)))
            return rc;
        log_listening(options.unix_path, 0, "listening");
    }
    if (tcp) {
        if ((rc = http_server_listen(server->http, host, port, false, &bound, err)))
            return rc;
        log_listening(host, bound, "listening");
        if (!is_loopback(host) && server->num_keys == 0)
            log_line(LOG_WARNING, "anyone who reaches this address may use the model: there is no --api-key", NULL);
    }
    if (options.health_port >= 0 && !(tcp && port > 0 && options.health_port == port)) {
        if ((rc = http_server_listen(server->http, host, (int)options.health_port, true, &bound, err)))
            return rc;
        log_listening(host, bound, "listening for health checks");
    }
    return 0;
}

static void end_engine(struct server *server)
{
    struct engine *engine = server->engine;
    for (int i = 0; i < 2 && engine; i++) // the second one ends what still runs
        engine_drain(engine);
}

static void *run_http(void *arg)
{
    struct server *server = arg;
    if (http_server_run(server->http, &server->http_error)) {
        // Without sockets there is nothing to compute for.
        atomic_store(&server->http_failed, true);
        end_engine(server);
    }
    return NULL;
}

static int start_http(struct server *server, struct error *err)
{
    int failed = pthread_create(&server->http_thread, NULL, run_http, server);
    if (failed)
        return error_set(err, ERR_MEMORY, "cannot start a thread for the sockets: %s", strerror(failed));
    server->http_running = true;
    return 0;
}

// What has been answered goes out; then the sockets close.
static void stop_http(struct server *server)
{
    if (!server->http_running)
        return;
    struct http_server_stats stats;
    double end_s = clock_now_s() + flush_s;
    http_server_drain(server->http);
    for (http_server_read_stats(server->http, &stats); stats.exchanges > 0 && clock_now_s() < end_s;
         http_server_read_stats(server->http, &stats))
        usleep(2000);
    http_server_stop(server->http);
    pthread_join(server->http_thread, NULL);
    server->http_running = false;
}

// ---- what others ask of the engine -------------------------------------------------------------------------------

// Until the manifest has been read there is none: then the server is loading. (A model, without which nothing is submitted, comes later.)
static int submit(void *arg, const struct sequence_spec *specs, int64_t count, struct engine_job **out,
                  struct error *err)
{
    return engine_submit(((struct server *)arg)->engine, specs, count, out, err);
}

static void cancel(void *arg, struct engine_job *job, int64_t index)
{
    engine_cancel(((struct server *)arg)->engine, job, index);
}

static enum engine_state state(void *arg)
{
    struct engine *engine = ((struct server *)arg)->engine;
    return engine ? engine_state(engine) : ENGINE_LOADING;
}

static void read_stats(void *arg, struct engine_stats *out)
{
    struct engine *engine = ((struct server *)arg)->engine;
    *out = (struct engine_stats){0};
    if (engine)
        engine_read_stats(engine, out);
}

static char *metrics_page(void *arg)
{
    struct server *server = arg;
    return metrics_text(server->metrics, server->engine, server->http);
}

static json_t *describe(void *arg)
{
    struct server *server = arg;
    if (!server->engine)
        return NULL;
    return json_pack("{s:s, s:i, s:s, s:s, s:I}", "backend", session_backend(server->session), "threads",
                     session_threads(server->session), "wire", session_wire(server->session), "prefill",
                     session_prefill_way(server->session), "context", (json_int_t)session_context(server->session));
}

static void tell_watchdog(void) { notify("WATCHDOG=1"); }

// ---- what the answers need beside the ranks ------------------------------------------------------------------------

// Under the mutex.
static void tell_ready(struct server *server)
{
    struct engine_stats stats;
    if (!server->ranks_ready || !server->answers_ready)
        return;
    engine_read_stats(server->engine, &stats);
    if (stats.restarts == 0)
        metrics_cold_start(server->metrics, "ready", clock_now_s() - server->begin_s);
    notify("READY=1\nSTATUS=ready");
    log_line(LOG_INFO, "ready",
             (struct log_field[]){
                 {.key = "load_s", .type = LOG_SECONDS, .seconds = stats.load_s},
                 {.key = "since_start_s", .type = LOG_SECONDS, .seconds = clock_now_s() - server->begin_s},
                 {.key = "ranks", .type = LOG_INTEGER, .integer = stats.num_ranks},
                 {.key = "backend", .type = LOG_TEXT, .text = session_backend(server->session)},
                 {.key = "context", .type = LOG_INTEGER, .integer = session_context(server->session)},
                 {.key = "kv_tokens", .type = LOG_INTEGER, .integer = stats.scheduler.pages * KV_PAGE_TOKENS},
                 {.key = "restarts", .type = LOG_INTEGER, .integer = stats.restarts},
                 {0}});
}

// Templates and tokenizer may come from a slow server: meanwhile engine_run watches the ranks, takes signals and tells the service manager
// that it lives.
static void *run_load(void *arg)
{
    struct server *server = arg;
    double begin_s = clock_now_s();
    if (api_load(server->api, server->session, &server->load_error) == 0) {
        metrics_cold_start(server->metrics, "prepare", clock_now_s() - begin_s);
        pthread_mutex_lock(&server->ready);
        server->answers_ready = true;
        tell_ready(server);
        pthread_mutex_unlock(&server->ready);
    } else if (!atomic_load(&server->load_cancelled)) {
        atomic_store(&server->load_failed, true);
        end_engine(server);
    }
    return NULL;
}

// The ranks load at the same time. If they cannot start, engine_run tries again and says why.
static int start_loading(struct server *server, struct error *err)
{
    session_launch(server->session, NULL);
    int failed = pthread_create(&server->load_thread, NULL, run_load, server);
    if (failed)
        return error_set(err, ERR_MEMORY, "cannot start a thread for the tokenizer: %s", strerror(failed));
    server->loading = true;
    return 0;
}

static void finish_loading(struct server *server)
{
    if (server->loading)
        pthread_join(server->load_thread, NULL);
    server->loading = false;
}

static void cancel_loading(struct server *server)
{
    atomic_store(&server->load_cancelled, true);
    store_cancel(session_store(server->session));
    finish_loading(server);
}

static void on_state(void *arg, enum engine_state state)
{
    struct server *server = arg;
    struct engine_stats stats;
    pthread_mutex_lock(&server->ready);
    server->ranks_ready = false;
    pthread_mutex_unlock(&server->ready);
    if (state == ENGINE_RESTARTING) // no process is forked beside what libcurl does
        finish_loading(server);
    engine_read_stats(server->engine, &stats);
    switch (state) {
    case ENGINE_LOADING:
        notify("STATUS=loading the model");
        log_line(LOG_INFO, "loading", NULL);
        break;
    case ENGINE_READY:
        metrics_cold_start(server->metrics, "load", stats.load_s);
        metrics_cold_start(server->metrics, "start", stats.start_s);
        start_log(server->session, &stats);
        pthread_mutex_lock(&server->ready);
        server->ranks_ready = true;
        tell_ready(server);
        pthread_mutex_unlock(&server->ready);
        break;
    case ENGINE_RESTARTING:
    case ENGINE_FAILED:
        notify(state == ENGINE_FAILED ? "STOPPING=1\nSTATUS=a rank was lost" : "STATUS=restarting after a lost rank");
        log_line(LOG_ERROR, state == ENGINE_FAILED ? "the ranks are lost" : "the ranks are lost and start again",
                 (struct log_field[]){{.key = "error", .type = LOG_TEXT, .text = stats.error}, {0}});
        break;
    case ENGINE_DRAINING:
        http_server_drain(server->http);
        notify("STOPPING=1\nSTATUS=draining");
        log_line(LOG_INFO, "draining",
                 (struct log_field[]){{.key = "running", .type = LOG_INTEGER, .integer = stats.scheduler.running},
                                      {.key = "waiting", .type = LOG_INTEGER, .integer = stats.queued},
                                      {.key = "timeout_s", .type = LOG_SECONDS, .seconds = options.drain_s},
                                      {0}});
        break;
    }
}

// ---- up and down -------------------------------------------------------------------------------------------------

// What is wrong with options.
static int prepare(struct server *server, const char *place, struct error *err)
{
    int rc;
    return (rc = check_options(err)) || (rc = choose_store(&server->store, NULL, err)) || (rc = read_keys(server, err))
               ? rc
               : choose_name(server, place, err);
}

// The manifest. It may come from a slow server: a signal ends the program meanwhile.
static int open_model(struct server *server, const char *place, struct error *err)
{
    struct session_options session = session_options;
    int rc;
    session.kv_tokens = options.kv_tokens;
    session.kv_fits = true;
    // Where chunks are fixed (devices): how finely prompts are shared, and how long a stream waits for another's prompt.
    session.prefill_rows = 512;
    session.leave_signals = true; // to engine_run
    session.draft_tokens = options.draft_tokens;
    session.load_first = true; // "ready" means it
    session.store = server->store;
    if (store_url_is_one(place)) {
        notify("STATUS=asking for the manifest");
        log_line(LOG_INFO, "asking for the manifest", NULL);
    }
    if ((rc = session_open(&server->session, place, &session, options.max_batch, 0, err)))
        return rc;
    if (session.store.cache_dir && !store_is_remote(session_store(server->session)))
        log_line(LOG_WARNING, "--cache is not used: the model is a directory's", NULL);
    return 0;
}

static int open_engine(struct server *server, struct error *err)
{
    bool restarts = options.restart && !session_is_spread(server->session); // else their launcher starts all again
    const struct engine_options chosen = {
        .max_queue = options.max_queue,
        .draft_tokens = options.draft_tokens,
        .share_prefixes = strcmp(options.prefix_cache, "on") == 0,
        .drain_timeout_s = options.drain_s,
        .restart = restarts,
        .restart_delay_s = options.restart_delay_s,
        .restart_limit = options.restart_limit,
        .alive_s = notify_watchdog_s(),
        .on_alive = tell_watchdog,
    };
    struct engine *engine;
    if (options.restart && !restarts)
        log_line(LOG_WARNING, "--restart is not used: who started the ranks, each by itself, starts all of them again",
                 NULL);
    int rc = engine_create(&engine, server->session, &chosen, err);
    if (rc)
        return rc;
    server->engine = engine;
    if (atomic_load(&server->http_failed)) // before there was an engine to end
        end_engine(server);
    return 0;
}

static struct api_options api_options_chosen(struct server *server)
{
    struct api_options api = api_options_default;
    server->model_name = server->name;
    api.model_names = options.names.count ? options.names.items : &server->model_name;
    api.num_model_names = options.names.count ? options.names.count : 1;
    api.keys = (const char *const *)server->keys;
    api.num_keys = server->num_keys;
    api.cors_origins = options.origins.items;
    api.num_cors_origins = options.origins.count;
    api.version = TPSHARD_VERSION " (" TPSHARD_COMMIT ")";
    api.default_max_tokens = options.max_tokens;
    api.keep_alive_s = options.keep_alive_s;
    api.request_timeout_s = options.request_s;
    api.worker_threads = (int)options.workers;
    api.log_requests = !options.no_request_log;
    if (!options.no_page) {
        api.page = page_text;
        api.page_bytes = page_bytes;
        api.page_policy = page_policy();
    }
    return api;
}

// What answers, and what is counted of it.
static int open_api(struct server *server, struct error *err)
{
    struct api_options api = api_options_chosen(server);
    int rc = metrics_create(&server->metrics, api.model_names[0], strcmp(options.metrics_names, "vllm") == 0, err);
    if (rc)
        return rc;
    api.metrics = server->metrics;
    api.engine = (struct api_engine){.arg = server,
                                     .submit = submit,
                                     .cancel = cancel,
                                     .state = state,
                                     .read_stats = read_stats,
                                     .describe = describe,
                                     .metrics_text = metrics_page};
    return api_create(&server->api, &api, err);
}

// From here on requests come in.
static int open_http(struct server *server, struct error *err)
{
    int rc;
    raise_descriptor_limit();
    const struct http_limits limits = http_limits_chosen();
    const struct http_handlers handlers = api_handlers(server->api);
    if ((rc = http_server_create(&server->http, &limits, &handlers, err)) ||
        (rc = api_start(server->api, server->http, err)) || (rc = open_sockets(server, err)) ||
        (rc = start_http(server, err)))
        return rc;
    metrics_cold_start(server->metrics, "listen", clock_now_s() - server->begin_s);
    return 0;
}

// The threads that start before and after the model is opened inherit the mask; engine_run lets this thread alone have both signals.
static int open_all(struct server *server, const char *place, const sigset_t *ends, struct error *err)
{
    int rc;
    pthread_sigmask(SIG_BLOCK, ends, NULL);
    if ((rc = prepare(server, place, err)) || (rc = open_api(server, err)) || (rc = open_http(server, err)))
        return rc;
    pthread_sigmask(SIG_UNBLOCK, ends, NULL);
    rc = open_model(server, place, err);
    pthread_sigmask(SIG_BLOCK, ends, NULL);
    return rc ? rc : open_engine(server, err);
}

static void close_all(struct server *server)
{
    stop_http(server);
    api_stop(server->api);
    engine_free(server->engine);
    api_free(server->api);
    http_server_free(server->http);
    metrics_free(server->metrics);
    session_close(server->session);
    for (int i = 0; i < server->num_keys; i++) {
        explicit_bzero(server->keys[i], strlen(server->keys[i]));
        free(server->keys[i]);
    }
}

static void configure_log(void)
{
    static const char *const levels[] = {"error", "warning", "info", "debug"};
    enum log_level level = LOG_INFO;
    for (int i = 0; i < (int)(sizeof levels / sizeof levels[0]); i++)
        if (strcmp(options.log_level, levels[i]) == 0)
            level = (enum log_level)i;
    if (common_options.quiet && level > LOG_WARNING)
        level = LOG_WARNING;
    log_configure(level, strcmp(options.log_format, "json") == 0);
}

// Before there is an engine to drain, and after it: nobody is waited for.
static void end_at_once(int number)
{
    static const char what[] = "ended by a signal\n";
    if (options.unix_path && the_server.http_running)
        unlink(options.unix_path);
    if (write(STDERR_FILENO, what, sizeof what - 1) < 0)
        _exit(ERR_OTHER);
    _exit(128 + number);
}

int serve_run(int argc, char **argv, struct error *err)
{
    (void)argc;
    struct server *server = &the_server;
    sigset_t ends;
    int rc;
    server->begin_s = clock_now_s();
    configure_log();
    signal(SIGPIPE, SIG_IGN);
    signal(SIGINT, end_at_once);
    signal(SIGTERM, end_at_once);
    sigemptyset(&ends);
    sigaddset(&ends, SIGINT);
    sigaddset(&ends, SIGTERM);
    rc = open_all(server, argv[0], &ends, err);
    if (!rc && (rc = start_loading(server, err)) == 0) {
        rc = engine_run(server->engine, on_state, server, err);
        cancel_loading(server);
        if (atomic_load(&server->load_failed)) {
            *err = server->load_error;
            rc = err->code;
        }
    }
    // What follows may wait for the last answers and jobs; whoever does not want to, ends it with one more signal.
    pthread_sigmask(SIG_UNBLOCK, &ends, NULL);
    if (!rc)
        rc = print_timings(server->session, err);
    close_all(server);
    if (!rc && server->http_error.code) {
        *err = server->http_error;
        rc = err->code;
    }
    if (!rc)
        log_line(LOG_INFO, "ended", NULL);
    return rc;
}
