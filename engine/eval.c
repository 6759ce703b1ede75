// tpengine eval: how well a model predicts a text, and how far it is from another one.
//
// The text is cut into windows (text_windows.h); perplexity = exp(mean negative log-likelihood). Against a reference P, which is another
// directory or logits that were saved from one: KL(P || Q) in nats, the mean over predicted positions, and the shares of positions where the
// model finds the reference's likeliest token likeliest, or among its five likeliest. Intervals: eval_statistics.h. Each position is scored
// by itself and sums are in text order, in double precision: no figure depends on threads.
#include "engine/commands.h"

#include "engine/eval_layers.h"
#include "engine/eval_logits.h"
#include "engine/eval_needle.h"
#include "engine/eval_statistics.h"
#include "engine/text_windows.h"
#include "formats/checksum.h"
#include "kernels/clock.h"
#include "kernels/thread_pool.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct {
    const char *text, *against, *logits, *save_logits;
    const char *needle_text;
    int64_t max_tokens, stride, needle;
    bool layers;
} options;

const struct option_spec eval_options[] = {
    {"text", OPTION_TEXT, &options.text, "FILE|-", 0, 0, "the text, UTF-8"},
    {"max-tokens", OPTION_INT, &options.max_tokens, "N", 0, 9e15, "take only the first N tokens of it; 0: all"},
    {"stride", OPTION_INT, &options.stride, "N", 0, 1 << 24,
     "tokens from a window's begin to the next one's; windows that overlap give every token more context and cost "
     "their number; 0: "
     "windows follow each other"},
    {"against", OPTION_TEXT, &options.against, "OTHER_OUT_DIR", 0, 0,
     "reference model for KL divergence and agreement of top-1 and top-5; its cache and its wire are bf16"},
    {"layers", OPTION_FLAG, &options.layers, NULL, 0, 0,
     "with --against: the relative error of the residual stream behind each layer"},
    {"needle", OPTION_INT, &options.needle, "N", 0, 1000,
     "measure nothing else: how often a sentence is found again that stands at five depths in a quarter, a half and "
     "all "
     "of the context, N times each"},
    {"needle-text", OPTION_TEXT, &options.needle_text, "TEXT", 0, 0,
     "with --needle: the sentence; {} is the number to be found (default: \"" NEEDLE_SENTENCE "\")"},
    {"save-logits", OPTION_TEXT, &options.save_logits, "FILE", 0, 0,
     "keep the logits of all scored positions, 4 bytes for each token of the vocabulary, for --logits"},
    {"logits", OPTION_TEXT, &options.logits, "FILE", 0, 0,
     "the reference's logits, saved from a model that need not run again, or ran with other settings"},
    SESSION_OPTION_LINES,
    {NULL, OPTION_FLAG, NULL, NULL, 0, 0, NULL},
};

enum { CHUNK = 128 }; // most tokens of one forward

// ---- scoring ---------------------------------------------------------------------------------------------------

struct evaluation {
    const char *dir;
    struct session *session, *reference; // reference: NULL without --against
    struct eval_logits *from, *to;       // NULL without --logits, --save-logits
    struct token_list text;
    struct text_windows windows;
    uint32_t *window;              // [context]
    struct position_score *scores; // [total]
    int64_t total, done;
    struct thread_pool *pool;
    int64_t chunk;             // tokens of one forward
    struct eval_layers layers; // with --layers
    int64_t said_ns;           // when progress was last told
};

static bool has_reference(const struct evaluation *e) { return e->reference || e->from; }

// Rows that are scored together: row i predicts next[i].
struct rows {
    const float *q, *p; // p: NULL without a reference
    const uint32_t *next;
    int64_t vocab;
    struct position_score *scores;
};

static void score_row(void *arg, int64_t i, int thread)
{
    (void)thread;
    const struct rows *r = arg;
    eval_statistics_score(&r->scores[i], r->q + i * r->vocab, r->p ? r->p + i * r->vocab : NULL, r->vocab, r->next[i]);
}

static int check_scores(const struct evaluation *e, int64_t count, struct error *err)
{
    for (int64_t i = e->done; i < e->done + count; i++) {
        const struct position_score *s = &e->scores[i];
        bool reference_is_sound = isfinite(s->reference_nll);
        if (isfinite(s->nll) && reference_is_sound && isfinite(s->kl))
            continue;
        const char *whose = reference_is_sound ? e->dir : options.logits ? options.logits : options.against;
        return error_set(
            err, ERR_OTHER,
            "%s: the logits of scored position %lld hold NaN or infinity; the weights or the activations are "
            "damaged",
            whose, (long long)i);
    }
    return 0;
}

static void tell_progress(struct evaluation *e)
{
    enum { EVERY_S = 15 };
    int64_t now = clock_now_ns();
    if (common_options.quiet || now - e->said_ns < EVERY_S * (int64_t)1e9)
        return;
    e->said_ns = now;
    fprintf(stderr, "eval: %lld of %lld tokens scored\n", (long long)e->done, (long long)e->total);
}

// Scores rows skip .. n - 1 of the forward that has just run. The reference has run, too, if there is one.
static int score_rows(struct evaluation *e, const float *q, const float *p, const uint32_t *next, int64_t skip,
                      int64_t n, struct error *err)
{
    int64_t vocab = session_manifest(e->session)->model.vocab_size, count = n - skip;
    int rc = 0;
    if (count <= 0)
        return 0;
    q += skip * vocab;
    p = p ? p + skip * vocab : NULL;
    if (e->from && (rc = eval_logits_read(e->from, count, &p, err)))
        return rc;
    struct rows rows = {.q = q, .p = p, .next = next + skip, .vocab = vocab, .scores = e->scores + e->done};
    thread_pool_run(e->pool, score_row, &rows, count);
    if (options.layers)
        eval_layers_add(&e->layers, session_residual(e->session), session_residual(e->reference), skip, count, e->pool);
    if ((rc = check_scores(e, count, err)) || (e->to && (rc = eval_logits_write(e->to, q, count, err))))
        return rc;
    e->done += count;
    tell_progress(e);
    return 0;
}

// tokens [count] of a window; those from `first` on are scored.
static int score_window(struct evaluation *e, int64_t count, int64_t first, struct error *err)
{
    const uint32_t *tokens = e->window;
    for (int64_t start = 0; start + 1 < count; start += e->chunk) {
        int64_t n = count - 1 - start < e->chunk ? count - 1 - start : e->chunk;
        int64_t skip = first - 1 > start ? first - 1 - start : 0;
        const float *q, *p = NULL;
        int rc;
        if ((rc = session_forward(e->session, tokens + start, n, start, &q, err)) ||
            (e->reference && (rc = session_forward(e->reference, tokens + start, n, start, &p, err))) ||
            (rc = score_rows(e, q, p, tokens + start + 1, skip, n, err)))
            return rc;
    }
    return 0;
}

static int score_text(struct evaluation *e, struct error *err)
{
    struct text_windows windows = e->windows;
    int64_t count, first;
    int rc = 0;
    e->said_ns = clock_now_ns();
    while (!rc && text_windows_next(&windows, e->window, &count, &first))
        rc = score_window(e, count, first, err);
    if (!rc && e->from)
        rc = eval_logits_check(e->from, err);
    if (!rc && e->to)
        rc = eval_logits_finish(e->to, err);
    return rc;
}

// ---- the report ------------------------------------------------------------------------------------------------

struct figures {
    struct estimate perplexity, ratio, kl, top1, top5;
    double reference_perplexity, kl_median, kl_p99, kl_max;
    int64_t block;
};

static struct estimate exp_of(struct estimate e)
{
    return (struct estimate){.value = exp(e.value), .low = exp(e.low), .high = exp(e.high)};
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

enum column { COLUMN_NLL, COLUMN_REFERENCE, COLUMN_EXCESS, COLUMN_TOP1, COLUMN_TOP5, COLUMN_KL };

static const double *column_of(const struct evaluation *e, double *values, enum column column)
{
    for (int64_t i = 0; i < e->total; i++) {
        const struct position_score *s = &e->scores[i];
        switch (column) {
        case COLUMN_NLL:
            values[i] = s->nll;
            break;
        case COLUMN_REFERENCE:
            values[i] = s->reference_nll;
            break;
        case COLUMN_EXCESS:
            values[i] = s->nll - s->reference_nll;
            break;
        case COLUMN_TOP1:
            values[i] = s->top1;
            break;
        case COLUMN_TOP5:
            values[i] = s->top5;
            break;
        case COLUMN_KL:
            values[i] = s->kl;
            break;
        }
    }
    return values;
}

static int compute_figures(struct figures *out, const struct evaluation *e, struct error *err)
{
    int64_t n = e->total;
    double *values = malloc((size_t)n * sizeof *values);
    if (!values)
        return error_set(err, ERR_MEMORY, "no memory for the scores of %lld tokens", (long long)n);
    *out = (struct figures){.block = eval_statistics_block(n)};
    out->perplexity = exp_of(eval_statistics_mean(column_of(e, values, COLUMN_NLL), n));
    if (has_reference(e)) {
        out->reference_perplexity = exp(eval_statistics_mean(column_of(e, values, COLUMN_REFERENCE), n).value);
        out->ratio = exp_of(eval_statistics_mean(column_of(e, values, COLUMN_EXCESS), n));
        out->top1 = eval_statistics_share(column_of(e, values, COLUMN_TOP1), n);
        out->top5 = eval_statistics_share(column_of(e, values, COLUMN_TOP5), n);
        out->kl = eval_statistics_mean(column_of(e, values, COLUMN_KL), n);
        out->kl.low = out->kl.low < 0 ? 0 : out->kl.low; // it is never less; NaN stays
        qsort(values, (size_t)n, sizeof *values, by_value);
        out->kl_median = values[n / 2];
        out->kl_p99 = values[n - 1 - n / 100];
        out->kl_max = values[n - 1];
    }
    free(values);
    if (!isfinite(out->perplexity.value) || !isfinite(out->ratio.value) || !isfinite(out->reference_perplexity))
        return error_set(err, ERR_OTHER,
                         "a perplexity is too large for a number; the weights or the activations are damaged");
    return 0;
}

static void print_estimate(const char *name, struct estimate e, int digits)
{
    printf("%s %.*f", name, digits, e.value);
    if (isfinite(e.low) && isfinite(e.high))
        printf(" [%.*f, %.*f]", digits, e.low, digits, e.high);
}

static void print_figures(const struct evaluation *e, const struct figures *f)
{
    print_estimate("perplexity", f->perplexity, 6);
    printf(" tokens %lld context %lld stride %lld\n", (long long)e->total, (long long)e->windows.context,
           (long long)e->windows.stride);
    if (has_reference(e)) {
        print_estimate("perplexity_ratio", f->ratio, 6);
        printf(" reference_perplexity %.6f\n", f->reference_perplexity);
        print_estimate("kl_divergence", f->kl, 6);
        printf(" median %.6f p99 %.6f max %.6f\n", f->kl_median, f->kl_p99, f->kl_max);
        print_estimate("top1_agreement", f->top1, 4);
        print_estimate(" top5_agreement", f->top5, 4);
        printf("\n");
    }
    if (isfinite(f->perplexity.low))
        printf("intervals of 95 %%, from blocks of %lld tokens\n", (long long)f->block);
    if (!options.layers)
        return;
    printf("%-10s %14s %14s\n", "layer", "relative error", "largest");
    for (int64_t stage = 0; stage < e->layers.stages; stage++) {
        char name[32] = "embedding";
        if (stage > 0)
            snprintf(name, sizeof name, "%lld", (long long)stage - 1);
        printf("%-10s %14.6f %14.6f\n", name, eval_layers_mean(&e->layers, stage), e->layers.largest[stage]);
    }
}

// name: the value, name_interval: [low, high], or null where there are too few tokens for one.
static bool add_estimate(json_t *object, const char *name, struct estimate e)
{
    char interval[64];
    snprintf(interval, sizeof interval, "%s_interval", name);
    json_t *ends = isfinite(e.low) && isfinite(e.high) ? json_pack("[f, f]", e.low, e.high) : json_null();
    return json_object_set_new(object, name, json_real(e.value)) == 0 &&
           json_object_set_new(object, interval, ends) == 0;
}

// Layer -1 is the embedding.
static json_t *layers_of(const struct eval_layers *layers)
{
    json_t *list = json_array();
    for (int64_t stage = 0; list && stage < layers->stages; stage++)
        if (json_array_append_new(list, json_pack("{s:I, s:f, s:f}", "layer", (json_int_t)stage - 1, "relative_error",
                                                  eval_layers_mean(layers, stage), "relative_error_max",
                                                  layers->largest[stage]))) {
            json_decref(list);
            list = NULL;
        }
    return list;
}

static int check_layers(const struct eval_layers *layers, struct error *err)
{
    for (int64_t stage = 0; stage < layers->stages; stage++)
        if (!isfinite(layers->sum[stage]))
            return error_set(
                err, ERR_OTHER,
                "the residual stream behind layer %lld holds NaN or infinity, or is 0 in the reference alone",
                (long long)stage - 1);
    return 0;
}

static int report(const struct evaluation *e, struct error *err)
{
    struct figures f;
    int rc = compute_figures(&f, e, err);
    if (rc || (rc = check_layers(&e->layers, err)))
        return rc;
    if (!common_options.json) {
        print_figures(e, &f);
        return 0;
    }
    json_t *object = json_pack("{s:i, s:I, s:I, s:I, s:I, s:i}", "schema_version", 1, "tokens", (json_int_t)e->total,
                               "context", (json_int_t)e->windows.context, "stride", (json_int_t)e->windows.stride,
                               "block_tokens", (json_int_t)f.block, "interval_percent", 95);
    bool whole = object && add_estimate(object, "perplexity", f.perplexity);
    if (whole && has_reference(e))
        whole = json_object_set_new(object, "reference",
                                    json_string(options.against ? options.against : options.logits)) == 0 &&
                json_object_set_new(object, "reference_perplexity", json_real(f.reference_perplexity)) == 0 &&
                add_estimate(object, "perplexity_ratio", f.ratio) && add_estimate(object, "kl_divergence", f.kl) &&
                json_object_set_new(object, "kl_median", json_real(f.kl_median)) == 0 &&
                json_object_set_new(object, "kl_p99", json_real(f.kl_p99)) == 0 &&
                json_object_set_new(object, "kl_max", json_real(f.kl_max)) == 0 &&
                add_estimate(object, "top1_agreement", f.top1) && add_estimate(object, "top5_agreement", f.top5);
    if (whole && options.layers)
        whole = json_object_set_new(object, "layers", layers_of(&e->layers)) == 0;
    if (!whole) {
        json_decref(object);
        object = NULL;
    }
    return print_report(object, err);
}

static json_t *needle_cells(const struct eval_needle *needle)
{
    json_t *list = json_array();
    for (int64_t i = 0; list && i < NEEDLE_LENGTHS * NEEDLE_DEPTHS; i++) {
        int64_t length = i / NEEDLE_DEPTHS, depth = i % NEEDLE_DEPTHS;
        const struct needle_cell *cell = &needle->cells[length][depth];
        if (json_array_append_new(
                list, json_pack("{s:I, s:I, s:I, s:f, s:f}", "tokens", (json_int_t)needle->lengths[length],
                                "depth_percent", (json_int_t)eval_needle_depth(depth), "found", (json_int_t)cell->found,
                                "nll", cell->nll, "nll_without", needle->nll_without[length]))) {
            json_decref(list);
            list = NULL;
        }
    }
    return list;
}

static int report_needle(const struct eval_needle *needle, struct error *err)
{
    int64_t found = 0, all = NEEDLE_LENGTHS * NEEDLE_DEPTHS * needle->probes;
    for (int64_t i = 0; i < NEEDLE_LENGTHS * NEEDLE_DEPTHS; i++)
        found += needle->cells[i / NEEDLE_DEPTHS][i % NEEDLE_DEPTHS].found;
    if (common_options.json)
        return print_report(json_pack("{s:i, s:I, s:I, s:I, s:I, s:o}", "schema_version", 1, "context",
                                      (json_int_t)session_context(needle->session), "needles", (json_int_t)all, "found",
                                      (json_int_t)found, "of_each", (json_int_t)needle->probes, "cells",
                                      needle_cells(needle)),
                            err);
    printf("needles %lld found %lld; nats for a token of the number, with the needle and without it\n", (long long)all,
           (long long)found);
    printf("%8s %7s %7s %9s %9s\n", "tokens", "depth", "found", "nll", "without");
    for (int64_t i = 0; i < NEEDLE_LENGTHS; i++)
        for (int64_t depth = 0; depth < NEEDLE_DEPTHS; depth++)
            printf("%8lld %5lld %% %3lld/%-3lld %9.4f %9.4f\n", (long long)needle->lengths[i],
                   (long long)eval_needle_depth(depth), (long long)needle->cells[i][depth].found,
                   (long long)needle->probes, needle->cells[i][depth].nll, needle->nll_without[i]);
    return 0;
}

// ---- opening ---------------------------------------------------------------------------------------------------

static int open_one(struct session **out, const char *dir, bool is_reference, int64_t chunk, struct error *err)
{
    struct session_options wanted = session_options;
    if (is_reference) { // its ranks are this process's own, in every case
        wanted.kv_cache = wanted.wire = "bf16";
        wanted.launcher =
            (struct launcher_options){"none", LAUNCHER_NOT_GIVEN, LAUNCHER_NOT_GIVEN, LAUNCHER_NOT_GIVEN, NULL};
    }
    wanted.default_context = options.needle > 0 ? 4096 : 512;
    wanted.residual_rows = options.layers ? chunk : 0;
    int rc = choose_store(&wanted.store, dir, err);
    return rc ? rc : session_open(out, dir, &wanted, 1, chunk, err);
}

static int check_pair(const struct evaluation *e, struct error *err)
{
    if (options.layers && strcmp(session_backend(e->session), "cuda") == 0)
        return error_set(err, ERR_USAGE,
                         "--layers looks at the residual stream in the host's memory: it needs --backend cpu");
    const struct model_desc *q = &session_manifest(e->session)->model, *p = &session_manifest(e->reference)->model;
    const struct {
        const char *what;
        int64_t q, p;
        bool matters;
    } pairs[] = {
        {"a vocabulary", q->vocab_size, p->vocab_size, true},
        {"a hidden size", q->hidden_size, p->hidden_size, options.layers},
        {"a number of layers", q->num_layers, p->num_layers, options.layers},
    };
    for (size_t i = 0; i < sizeof pairs / sizeof *pairs; i++)
        if (pairs[i].matters && pairs[i].q != pairs[i].p)
            return error_set(err, ERR_USAGE, "%s has %s of %lld and %s of %lld: they cannot be compared", e->dir,
                             pairs[i].what, (long long)pairs[i].q, options.against, (long long)pairs[i].p);
    if (session_context(e->session) != session_context(e->reference))
        return error_set(err, ERR_USAGE, "%s has a context of %lld tokens and %s of %lld: give a --context of both",
                         e->dir, (long long)session_context(e->session), options.against,
                         (long long)session_context(e->reference));
    return 0;
}

static int open_both(struct evaluation *e, struct error *err)
{
    int rc = open_one(&e->session, e->dir, false, e->chunk = CHUNK, err);
    if (!rc && options.layers && eval_layers_room(&session_manifest(e->session)->model, CHUNK) < CHUNK) {
        e->chunk = eval_layers_room(&session_manifest(e->session)->model, CHUNK);
        session_close(e->session);
        e->session = NULL;
        rc = open_one(&e->session, e->dir, false, e->chunk, err);
    }
    if (rc || !options.against)
        return rc;
    return (rc = open_one(&e->reference, options.against, true, e->chunk, err)) ? rc : check_pair(e, err);
}

// Both plans come first: what one has begun to take would be counted by the other by chance.
static int launch_both(struct evaluation *e, struct error *err)
{
    int rc = session_settle(e->session, NULL, err);
    if (!rc && e->reference)
        rc = session_settle(e->reference, e->session, err);
    if (!rc)
        rc = session_launch(e->session, err);
    return rc || !e->reference ? rc : session_launch(e->reference, err);
}

static int read_tokens(struct evaluation *e, struct error *err)
{
    const struct tokenizer *tokenizer;
    char *text = NULL;
    size_t bytes;
    int rc = read_text(options.text, &text, &bytes, err);
    if (!rc && (rc = session_tokenizer(e->session, &tokenizer, err)) == 0)
        rc = tokenizer_encode(tokenizer, text, bytes, 0, &e->text, err);
    free(text);
    if (!rc && options.max_tokens > 0 && (int64_t)e->text.count > options.max_tokens)
        e->text.count = (size_t)options.max_tokens;
    return rc;
}

static int plan_windows(struct evaluation *e, struct error *err)
{
    struct text_windows *w = &e->windows;
    *w = (struct text_windows){.ids = e->text.ids,
                               .count = (int64_t)e->text.count,
                               .bos = session_manifest(e->session)->model.bos_token_id,
                               .context = session_context(e->session)};
    if (w->context < 2)
        return error_set(err, ERR_USAGE, "--context %lld: a window needs at least 2 tokens", (long long)w->context);
    w->stride = options.stride > 0 ? options.stride : text_windows_body(w);
    if (w->stride > text_windows_body(w))
        return error_set(
            err, ERR_USAGE,
            "--stride %lld: a window of --context %lld holds %lld tokens of the text, and more would be left out",
            (long long)w->stride, (long long)w->context, (long long)text_windows_body(w));
    e->total = text_windows_total(*w);
    if (e->total == 0)
        return error_set(err, ERR_USAGE, "%s: the text has no token to predict", options.text);
    return 0;
}

static uint64_t text_hash(const struct evaluation *e, struct error *err, int *rc)
{
    int64_t *numbers = malloc((e->text.count + 1) * sizeof *numbers);
    uint64_t hash = 0;
    *rc = numbers ? 0 : error_set(err, ERR_MEMORY, "no memory for a text of %zu tokens", e->text.count);
    if (!numbers)
        return 0;
    numbers[0] = e->windows.bos;
    for (size_t i = 0; i < e->text.count; i++)
        numbers[i + 1] = e->text.ids[i];
    hash = checksum_leaf(numbers, (e->text.count + 1) * sizeof *numbers);
    free(numbers);
    return hash;
}

static int open_logits(struct evaluation *e, struct error *err)
{
    int rc = 0;
    if (!options.logits && !options.save_logits)
        return 0;
    struct eval_logits_key key = {.vocab_size = (uint32_t)session_manifest(e->session)->model.vocab_size,
                                  .rows = e->total,
                                  .context = e->windows.context,
                                  .stride = e->windows.stride,
                                  .text = text_hash(e, err, &rc)};
    if (!rc && options.logits)
        rc = eval_logits_open(&e->from, options.logits, &key, err);
    if (!rc && options.save_logits)
        rc = eval_logits_create(&e->to, options.save_logits, &key, err);
    return rc;
}

static int make_room(struct evaluation *e, struct error *err)
{
    e->window = malloc((size_t)e->windows.context * sizeof *e->window);
    e->scores = malloc((size_t)e->total * sizeof *e->scores);
    if (!e->window || !e->scores)
        return error_set(err, ERR_MEMORY, "no memory for the scores of %lld tokens", (long long)e->total);
    int threads = thread_pool_default_threads(), rc = 0;
    if (options.layers)
        rc = eval_layers_open(&e->layers, session_manifest(e->session), session_manifest(e->reference), e->chunk,
                              threads, err);
    return rc ? rc : thread_pool_create(&e->pool, threads, err);
}

static void close_all(struct evaluation *e)
{
    thread_pool_free(e->pool);
    eval_logits_close(e->from);
    eval_logits_close(e->to);
    eval_layers_close(&e->layers);
    session_close(e->reference);
    session_close(e->session);
    free(e->scores);
    free(e->window);
    free(e->text.ids);
}

static int run_needle(const struct evaluation *e, struct error *err)
{
    struct eval_needle needle = {.session = e->session,
                                 .chunk = e->chunk,
                                 .text = &e->text,
                                 .sentence = options.needle_text ? options.needle_text : NEEDLE_SENTENCE,
                                 .probes = options.needle,
                                 .tells = !common_options.quiet};
    int rc = eval_needle_run(&needle, err);
    return rc ? rc : report_needle(&needle, err);
}

static int score(struct evaluation *e, struct error *err)
{
    int rc;
    return (rc = plan_windows(e, err)) || (rc = open_logits(e, err)) || (rc = make_room(e, err)) ||
                   (rc = score_text(e, err))
               ? rc
               : report(e, err);
}

int eval_run(int argc, char **argv, struct error *err)
{
    (void)argc;
    struct evaluation e = {.dir = argv[0]};
    int rc;
    if (!options.text)
        return error_set(err, ERR_USAGE, "eval needs --text FILE");
    if (options.layers && !options.against)
        return error_set(err, ERR_USAGE,
                         "--layers compares with a reference that runs beside the model: it needs --against");
    if (options.needle_text && options.needle == 0)
        return error_set(err, ERR_USAGE, "--needle-text says what --needle looks for: add --needle");
    if (options.needle > 0 && (options.against || options.logits || options.save_logits || options.stride > 0))
        return error_set(err, ERR_USAGE,
                         "--needle measures one model by itself: it goes without --against, --logits, "
                         "--save-logits and --stride");
    if (options.against && options.logits)
        return error_set(err, ERR_USAGE,
                         "--against and --logits: there is one reference, either a model or its logits");
    // The ranks load while the text is read.
    if ((rc = open_both(&e, err)) || (rc = launch_both(&e, err)) || (rc = read_tokens(&e, err)) ||
        (rc = options.needle > 0 ? run_needle(&e, err) : score(&e, err)))
        goto done;
    rc = print_timings(e.session, err);
done:
    close_all(&e);
    return rc;
}
