// What the server counts, and Prometheus' page of it. See metrics.h.
#include "engine/serve/metrics.h"

#include "formats/memory_stream.h"

#include <dirent.h>
#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MAX_BUCKETS = 24, MAX_PHASES = 8, FIRST_STATUS = 100, NUM_STATUSES = 500 };

// vLLM's bounds, so that its dashboards' quantiles come out alike.
static const double first_token_bounds[] = {0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
                                            1,     2.5,   5,    7.5,  10,   20,   40,   80,  160,  640, 2560};
static const double token_bounds[] = {0.001, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4,
                                      0.5,   0.75,  1,    2.5,   5,    7.5,   10,  20,   40,  80};
static const double request_bounds[] = {0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1,  1.5, 2,   2.5, 5,
                                        10,   15,   20,  30,  40,  50,  60, 120, 240, 480, 960};
static const double count_bounds[] = {1,    2,    5,    10,    20,    50,    100,    200,    500,
                                      1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000, 500000};
#define BOUNDS(array) (array), (int)(sizeof(array) / sizeof((array)[0]))

enum histogram_id {
    FIRST_TOKEN,
    TOKEN_GAP,
    REQUEST,
    QUEUED,
    PREFILL,
    DECODE,
    PROMPT_TOKENS,
    OUTPUT_TOKENS,
    NUM_HISTOGRAMS
};
static const struct {
    const char *name, *help;
    const double *bounds;
    int num_bounds;
} histograms[NUM_HISTOGRAMS] = {
    [FIRST_TOKEN] = {"time_to_first_token_seconds", "From the whole request to the first token of its answer.",
                     BOUNDS(first_token_bounds)},
    [TOKEN_GAP] = {"inter_token_latency_seconds", "Between two tokens of one answer.", BOUNDS(token_bounds)},
    [REQUEST] = {"e2e_request_latency_seconds", "From the whole request to the end of its answer.",
                 BOUNDS(request_bounds)},
    [QUEUED] = {"request_queue_time_seconds", "Time of requests in the queue.", BOUNDS(request_bounds)},
    [PREFILL] = {"request_prefill_time_seconds", "Time of requests from the queue to the first token.",
                 BOUNDS(request_bounds)},
    [DECODE] = {"request_decode_time_seconds", "Time of requests from the first token to the last.",
                BOUNDS(request_bounds)},
    [PROMPT_TOKENS] = {"request_prompt_tokens", "Tokens in a request's prompt.", BOUNDS(count_bounds)},
    [OUTPUT_TOKENS] = {"request_generation_tokens", "Tokens that a request produced.", BOUNDS(count_bounds)},
};

struct histogram {
    // Values up to each bound, not counting those below; the last one: above all.
    atomic_ullong buckets[MAX_BUCKETS + 1];
    atomic_ullong sum_millionths;
};

static const char *const reasons[] = {"stop", "length", "tool_calls", "abort", "error"};
enum { NUM_REASONS = sizeof reasons / sizeof reasons[0] };

struct metrics {
    char *model_name; // escaped for a label
    const char *prefix;
    struct histogram histograms[NUM_HISTOGRAMS];
    atomic_ullong finished[NUM_REASONS];
    atomic_ullong statuses[NUM_STATUSES];
    struct {
        _Atomic(const char *) name;
        atomic_ullong microseconds;
    } phases[MAX_PHASES];
};

// A label's value: backslash, quote and newline are escaped.
static char *escape_label(const char *text)
{
    char *out = malloc(2 * strlen(text) + 1), *at = out;
    if (!out)
        return NULL;
    for (; *text; text++) {
        if (*text == '\\' || *text == '"' || *text == '\n')
            *at++ = '\\';
        *at++ = *text == '\n' ? 'n' : *text;
    }
    *at = 0;
    return out;
}

int metrics_create(struct metrics **out, const char *model_name, bool vllm_names, struct error *err)
{
    struct metrics *metrics = calloc(1, sizeof *metrics);
    if (!metrics || !(metrics->model_name = escape_label(model_name))) {
        free(metrics);
        return error_set(err, ERR_MEMORY, "no memory for metrics");
    }
    metrics->prefix = vllm_names ? "vllm:" : "tpengine_";
    *out = metrics;
    return 0;
}

void metrics_free(struct metrics *metrics)
{
    if (metrics)
        free(metrics->model_name);
    free(metrics);
}

// ---- counting ----------------------------------------------------------------------------------------------------

static void observe(struct metrics *metrics, enum histogram_id id, double value)
{
    struct histogram *histogram = &metrics->histograms[id];
    int bucket = 0;
    if (!(value >= 0) || !isfinite(value))
        return;
    while (bucket < histograms[id].num_bounds && value > histograms[id].bounds[bucket])
        bucket++;
    atomic_fetch_add_explicit(&histogram->sum_millionths, (unsigned long long)(value * 1e6 + 0.5),
                              memory_order_relaxed);
    atomic_fetch_add_explicit(&histogram->buckets[bucket], 1, memory_order_relaxed);
}

void metrics_request(struct metrics *metrics, const struct request_record *record)
{
    const struct sequence_usage *usage = &record->usage;
    if (!record->finish_reason)
        return;
    for (int i = 0; i < NUM_REASONS; i++)
        if (strcmp(record->finish_reason, reasons[i]) == 0)
            atomic_fetch_add_explicit(&metrics->finished[i], 1, memory_order_relaxed);
    observe(metrics, REQUEST, record->end_s);
    observe(metrics, FIRST_TOKEN, record->first_token_s);
    observe(metrics, PROMPT_TOKENS, (double)usage->prompt_tokens);
    observe(metrics, OUTPUT_TOKENS, (double)usage->produced_tokens);
    observe(metrics, QUEUED, usage->queued_s);
    observe(metrics, PREFILL, usage->prefill_s);
    observe(metrics, DECODE, usage->decode_s);
}

void metrics_token_gap(struct metrics *metrics, double seconds) { observe(metrics, TOKEN_GAP, seconds); }

void metrics_http(struct metrics *metrics, int status)
{
    if (status >= FIRST_STATUS && status < FIRST_STATUS + NUM_STATUSES)
        atomic_fetch_add_explicit(&metrics->statuses[status - FIRST_STATUS], 1, memory_order_relaxed);
}

void metrics_cold_start(struct metrics *metrics, const char *phase, double seconds)
{
    for (int i = 0; i < MAX_PHASES; i++) {
        const char *expected = NULL;
        if (atomic_compare_exchange_strong(&metrics->phases[i].name, &expected, phase) ||
            strcmp(expected, phase) == 0) {
            atomic_store(&metrics->phases[i].microseconds, (unsigned long long)(seconds * 1e6));
            return;
        }
    }
}

// ---- the page ----------------------------------------------------------------------------------------------------

struct page {
    FILE *out;
    const struct metrics *metrics;
    const char *prefix; // of the names that follow
};

static void head(struct page *page, const char *name, const char *type, const char *help)
{
    fprintf(page->out, "# HELP %s%s %s\n# TYPE %s%s %s\n", page->prefix, name, help, page->prefix, name, type);
}

static void labelled(struct page *page, const char *name, const char *label, const char *label_value, double value)
{
    fprintf(page->out, "%s%s{model_name=\"%s\",%s=\"%s\"} %.15g\n", page->prefix, name, page->metrics->model_name,
            label, label_value, value);
}

static void single(struct page *page, const char *name, const char *type, const char *help, double value)
{
    head(page, name, type, help);
    fprintf(page->out, "%s%s{model_name=\"%s\"} %.15g\n", page->prefix, name, page->metrics->model_name, value);
}

static void write_histogram(struct page *page, enum histogram_id id)
{
    const struct histogram *histogram = &page->metrics->histograms[id];
    const char *name = histograms[id].name, *model = page->metrics->model_name;
    unsigned long long count = 0;
    head(page, name, "histogram", histograms[id].help);
    for (int i = 0; i <= histograms[id].num_bounds; i++) {
        char bound[32] = "+Inf";
        if (i < histograms[id].num_bounds)
            snprintf(bound, sizeof bound, "%.15g", histograms[id].bounds[i]);
        count += atomic_load_explicit(&histogram->buckets[i], memory_order_relaxed);
        fprintf(page->out, "%s%s_bucket{model_name=\"%s\",le=\"%s\"} %llu\n", page->prefix, name, model, bound, count);
    }
    fprintf(page->out, "%s%s_sum{model_name=\"%s\"} %.15g\n%s%s_count{model_name=\"%s\"} %llu\n", page->prefix, name,
            model, 1e-6 * (double)atomic_load_explicit(&histogram->sum_millionths, memory_order_relaxed), page->prefix,
            name, model, count);
}

static void write_scheduler(struct page *page, const struct engine_stats *stats)
{
    const struct scheduler_stats *s = &stats->scheduler;
    single(page, "num_requests_running", "gauge", "Sequences that are being computed.", (double)s->running);
    single(page, "num_requests_waiting", "gauge", "Sequences that wait for a place or for memory.",
           (double)(stats->queued + s->preempted));
    single(page, "kv_cache_usage_perc", "gauge", "Share of the KV cache's pages in use; 1 is full.",
           s->pages > 0 ? (double)s->pages_used / (double)s->pages : 0);
    single(page, "prefix_cache_queries_total", "counter", "Prompt tokens that were looked up in the prefix cache.",
           (double)s->prefix_queries_tokens);
    single(page, "prefix_cache_hits_total", "counter", "Prompt tokens that were found there.",
           (double)s->cached_tokens);
    single(page, "prompt_tokens_total", "counter", "Prompt tokens of all requests.", (double)s->prompt_tokens);
    single(page, "generation_tokens_total", "counter", "Tokens produced.", (double)s->produced_tokens);
    single(page, "num_preemptions_total", "counter", "Sequences that gave their memory back and were computed again.",
           (double)s->preemptions);
    single(page, "spec_decode_num_draft_tokens_total", "counter", "Tokens proposed by prompt lookup.",
           (double)s->drafted_tokens);
    single(page, "spec_decode_num_accepted_tokens_total", "counter", "Of these, tokens that the model chose as well.",
           (double)s->accepted_tokens);
}

static void of_rank(struct page *page, const char *name, int rank, const char *label, const char *label_value,
                    double value)
{
    fprintf(page->out, "%s%s{model_name=\"%s\",rank=\"%d\",%s=\"%s\"} %.15g\n", page->prefix, name,
            page->metrics->model_name, rank, label, label_value, value);
}

// How the weights of the last start came.
static void write_loads(struct page *page, const struct engine_stats *stats)
{
    head(page, "rank_load_seconds", "gauge",
         "Time of a rank's loading threads together, by what they did; wall: from its start until all was in place.");
    for (int rank = 0; rank < stats->num_ranks; rank++) {
        const struct engine_rank *r = &stats->ranks[rank];
        of_rank(page, "rank_load_seconds", rank, "phase", "wall", r->load_s);
        of_rank(page, "rank_load_seconds", rank, "phase", "cpu", r->load.cpu_s);
        of_rank(page, "rank_load_seconds", rank, "phase", "read", r->load.read_s);
        of_rank(page, "rank_load_seconds", rank, "phase", "verify", r->load.verify_s);
        of_rank(page, "rank_load_seconds", rank, "phase", "decode", r->load.decode_s);
        of_rank(page, "rank_load_seconds", rank, "phase", "copy", r->load.copy_s);
    }
    head(page, "rank_load_read_bytes", "gauge", "Bytes that a rank has read of its file, by the way they came.");
    for (int rank = 0; rank < stats->num_ranks; rank++) {
        const struct load_figures *load = &stats->ranks[rank].load;
        of_rank(page, "rank_load_read_bytes", rank, "path", load_path_name(load->path), (double)load->read_bytes);
    }
}

static void write_ranks(struct page *page, const struct engine_stats *stats)
{
    char number[24];
    head(page, "rank_up", "gauge", "Whether a rank has its weights and takes work; a loss of one takes down all.");
    for (int rank = 0; rank < stats->num_ranks; rank++) {
        snprintf(number, sizeof number, "%d", rank);
        labelled(page, "rank_up", "rank", number, stats->ready ? 1 : 0);
    }
    head(page, "collective_seconds", "counter", "Time of a rank in exchanges with the others, waiting included.");
    for (int rank = 0; rank < stats->num_ranks; rank++) {
        snprintf(number, sizeof number, "%d", rank);
        labelled(page, "collective_seconds", "rank", number, stats->ranks[rank].exchange_s_total);
    }
    head(page, "rank_step_seconds", "counter", "Time of a rank in steps outside of exchanges; a slow one has more.");
    for (int rank = 0; rank < stats->num_ranks; rank++) {
        snprintf(number, sizeof number, "%d", rank);
        labelled(page, "rank_step_seconds", "rank", number, stats->ranks[rank].step_s_total);
    }
    head(page, "rank_resident_memory_bytes", "gauge", "Resident memory of a rank.");
    for (int rank = 0; rank < stats->num_ranks; rank++) {
        snprintf(number, sizeof number, "%d", rank);
        labelled(page, "rank_resident_memory_bytes", "rank", number, (double)stats->ranks[rank].rss_bytes);
    }
    head(page, "rank_losses_total", "counter", "How often a rank's failure has ended all of them.");
    for (int rank = 0; rank < stats->num_ranks; rank++) {
        snprintf(number, sizeof number, "%d", rank);
        labelled(page, "rank_losses_total", "rank", number, (double)stats->ranks[rank].losses);
    }
    single(page, "rank_restarts_total", "counter", "Starts of the ranks after a loss.", (double)stats->restarts);
    write_loads(page, stats);
    single(page, "load_bytes_total", "counter", "Bytes of weights that the ranks have loaded.",
           (double)stats->loaded_bytes);
    single(page, "steps_total", "counter", "Steps of the ranks.", (double)stats->scheduler.steps);
    single(page, "step_seconds_total", "counter", "Time in steps of the ranks.", stats->step_s_total);
    head(page, "rows_total", "counter", "Token rows computed, by phase.");
    labelled(page, "rows_total", "phase", "prefill", (double)stats->scheduler.prefill_rows);
    labelled(page, "rows_total", "phase", "decode", (double)stats->scheduler.decode_rows);
}

static void write_http(struct page *page, const struct http_server *server)
{
    head(page, "http_responses_total", "counter", "Answers by status.");
    for (int i = 0; i < NUM_STATUSES; i++) {
        unsigned long long count = atomic_load_explicit(&page->metrics->statuses[i], memory_order_relaxed);
        char code[16];
        snprintf(code, sizeof code, "%d", FIRST_STATUS + i);
        if (count)
            labelled(page, "http_responses_total", "code", code, (double)count);
    }
    if (!server)
        return;
    struct http_server_stats stats;
    http_server_read_stats(server, &stats);
    single(page, "http_connections", "gauge", "Open connections.", (double)stats.connections);
    single(page, "http_exchanges", "gauge", "Requests whose answer is not yet complete.", (double)stats.exchanges);
    single(page, "http_accepted_total", "counter", "Connections accepted.", (double)stats.accepted_total);
    single(page, "http_requests_total", "counter", "Whole requests.", (double)stats.requests_total);
    single(page, "http_refused_total", "counter", "Requests that the HTTP server refused itself.",
           (double)stats.refused_total);
    single(page, "http_timeouts_total", "counter", "Connections closed at a deadline.", (double)stats.timeouts_total);
}

static void write_process(struct page *page)
{
    long long pages = 0, total;
    FILE *f = fopen("/proc/self/statm", "re");
    if (f) {
        if (fscanf(f, "%lld %lld", &total, &pages) != 2)
            pages = 0;
        fclose(f);
    }
    fprintf(page->out,
            "# HELP process_resident_memory_bytes Resident memory of the server, without its ranks.\n"
            "# TYPE process_resident_memory_bytes gauge\nprocess_resident_memory_bytes %lld\n",
            pages * (long long)sysconf(_SC_PAGESIZE));
    DIR *dir = opendir("/proc/self/fd");
    if (!dir)
        return;
    long long count = -3; // ".", ".." and the directory itself
    while (readdir(dir))
        count++;
    closedir(dir);
    fprintf(page->out,
            "# HELP process_open_fds Open file descriptors of the server, without its ranks.\n"
            "# TYPE process_open_fds gauge\nprocess_open_fds %lld\n",
            count);
}

char *metrics_text(struct metrics *metrics, struct engine *engine, const struct http_server *server)
{
    struct memory_stream memory;
    struct engine_stats stats = {0};
    if (!memory_stream_open(&memory))
        return NULL;
    struct page page = {.out = memory.out, .metrics = metrics, .prefix = metrics->prefix};
    if (engine)
        engine_read_stats(engine, &stats);
    write_scheduler(&page, &stats);
    head(&page, "request_success_total", "counter", "Requests that ended, by reason.");
    for (int i = 0; i < NUM_REASONS; i++)
        labelled(&page, "request_success_total", "finished_reason", reasons[i],
                 (double)atomic_load_explicit(&metrics->finished[i], memory_order_relaxed));
    for (int id = 0; id < NUM_HISTOGRAMS; id++)
        write_histogram(&page, (enum histogram_id)id);

    page.prefix = "tpengine_";
    write_ranks(&page, &stats);
    head(&page, "cold_start_seconds", "gauge", "Length of each phase of the last start.");
    for (int i = 0; i < MAX_PHASES; i++) {
        const char *name = atomic_load(&metrics->phases[i].name);
        if (name)
            labelled(&page, "cold_start_seconds", "phase", name,
                     1e-6 * (double)atomic_load(&metrics->phases[i].microseconds));
    }
    write_http(&page, server);
    write_process(&page);
    return memory_stream_close(&memory, NULL);
}
