// tpengine advise: what each codec of the sums over ranks does to a model's predictions, and which one --wire auto should take.
//
// The text is run once over each codec, f32 first, which loses nothing: a piece of a window after the other, each codec with a sequence of its
// own, so that only one piece of logits is kept. The advice is the codec of eight bits with the least KL divergence from f32, if the upper end
// of its interval is not above --limit; bf16 if theirs is; f32 if even its is. NaN or infinity are above any limit. How long the sums took is
// shown and does not count: a model goes to other machines.
#include "engine/commands.h"

#include "engine/eval_statistics.h"
#include "engine/store_url.h"
#include "engine/text_windows.h"
#include "formats/checksum.h"
#include "formats/file_io.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct {
    const char *text;
    int64_t max_tokens;
    double limit;
    bool write;
} options = {.max_tokens = 8192, .limit = 0.001};

const struct option_spec advise_options[] = {
    {"text", OPTION_TEXT, &options.text, "FILE|-", 0, 0, "a text such as the model will see, UTF-8"},
    {"max-tokens", OPTION_INT, &options.max_tokens, "N", 0, 9e15, "take only the first N tokens; 0: all"},
    {"limit", OPTION_NUMBER, &options.limit, "NATS", 0, 100,
     "largest KL divergence from sums without a loss that a codec may cost"},
    {"write", OPTION_FLAG, &options.write, NULL, 0, 0, "write advice and figures into the directory's model.json"},
    SESSION_OPTION_LINES,
    {NULL, OPTION_FLAG, NULL, NULL, 0, 0, NULL},
};

enum { CHUNK = 128, LEAST_TOKENS = 64, CODECS = 4 };
// In this order they are run and shown; of two that are as good the first one is advised.
static const enum wire codecs[CODECS] = {WIRE_F32, WIRE_BF16, WIRE_S8X, WIRE_FP8};

// One codec's share of the run.
struct trial {
    double *kl, *same_top; // [tokens]
    double exchange_s;     // of rank 0
};

struct advice {
    struct session *session;
    float *exact; // f32 [CHUNK][vocab]
    uint32_t *window;
    struct trial trials[CODECS];
    int64_t tokens; // scored so far
    struct manifest_wires measured;
    enum wire wire;
};

// ---- the run ---------------------------------------------------------------------------------------------------

static int keep_exact(struct advice *a, const float *logits, int64_t count, struct error *err)
{
    for (int64_t i = 0; i < count; i++)
        if (!isfinite(logits[i]))
            return error_set(err, ERR_OTHER,
                             "the logits hold NaN or infinity even with sums that lose nothing; the weights or the "
                             "activations are damaged");
    memcpy(a->exact, logits, (size_t)count * sizeof *logits);
    return 0;
}

// Tokens start .. start + count - 1 of the window, over one codec; those behind `skip` are scored by what follows them.
static int run_piece(struct advice *a, int codec, int64_t start, int64_t count, int64_t skip, struct error *err)
{
    struct trial *trial = &a->trials[codec];
    int64_t vocab = session_manifest(a->session)->model.vocab_size;
    struct shared_area *shared = session_shared(a->session);
    long long before_ns = shared ? atomic_load(&shared->rank_exchange_ns[0]) : 0;
    const float *logits;
    int rc = session_forward_over(a->session, codecs[codec], codec, a->window + start, count, start, &logits, err);
    if (rc)
        return rc;
    trial->exchange_s += 1e-9 * (double)(atomic_load(&session_shared(a->session)->rank_exchange_ns[0]) - before_ns);
    if (codecs[codec] == WIRE_F32)
        return keep_exact(a, logits, count * vocab, err);
    for (int64_t i = skip; i < count; i++) {
        struct position_score score;
        eval_statistics_score(&score, logits + i * vocab, a->exact + i * vocab, vocab, a->window[start + i + 1]);
        trial->kl[a->tokens + i - skip] = score.kl;
        trial->same_top[a->tokens + i - skip] = score.top1;
    }
    return 0;
}

static int run_window(struct advice *a, int64_t count, int64_t first, struct error *err)
{
    int rc = 0;
    for (int64_t start = 0; start + 1 < count && !rc; start += CHUNK) {
        int64_t n = count - 1 - start < CHUNK ? count - 1 - start : CHUNK;
        int64_t skip = first - 1 - start < 0 ? 0 : first - 1 - start < n ? first - 1 - start : n;
        for (int codec = 0; codec < CODECS && !rc; codec++)
            rc = run_piece(a, codec, start, n, skip, err);
        a->tokens += n - skip;
    }
    return rc;
}

static int run_text(struct advice *a, const struct token_list *text, struct error *err)
{
    const struct model_desc *desc = &session_manifest(a->session)->model;
    int64_t context = session_context(a->session), count, first;
    struct text_windows windows = {
        .ids = text->ids, .count = (int64_t)text->count, .bos = desc->bos_token_id, .context = context};
    if (context < 2)
        return error_set(err, ERR_USAGE, "--context %lld: a window needs at least 2 tokens", (long long)context);
    windows.stride = text_windows_body(&windows);
    int64_t tokens = text_windows_total(windows);
    if (tokens < LEAST_TOKENS)
        return error_set(err, ERR_USAGE,
                         "%s: %lld tokens to predict are too few to judge by; at least %d, and better thousands",
                         options.text, (long long)tokens, LEAST_TOKENS);
    a->window = calloc((size_t)context, sizeof *a->window);
    a->exact = calloc((size_t)(CHUNK * desc->vocab_size), sizeof *a->exact);
    bool there = a->window && a->exact;
    for (int i = 0; i < CODECS; i++) {
        a->trials[i].kl = calloc((size_t)tokens, sizeof(double));
        a->trials[i].same_top = calloc((size_t)tokens, sizeof(double));
        there = there && a->trials[i].kl && a->trials[i].same_top;
    }
    if (!there)
        return error_set(err, ERR_MEMORY, "no memory for the figures of %lld tokens", (long long)tokens);
    int rc = 0;
    while (!rc && text_windows_next(&windows, a->window, &count, &first))
        rc = run_window(a, count, first, err);
    return rc;
}

// ---- the advice ------------------------------------------------------------------------------------------------

static void judge(struct advice *a)
{
    struct manifest_wires *m = &a->measured;
    m->tokens = a->tokens;
    m->context = session_context(a->session);
    m->feedback = session_feeds_back(a->session);
    m->limit = options.limit;
    m->count = CODECS;
    a->wire = WIRE_F32;
    double least = INFINITY;
    for (int i = 0; i < CODECS; i++) {
        struct manifest_wire *wire = &m->wires[i];
        struct estimate kl = eval_statistics_mean(a->trials[i].kl, a->tokens);
        snprintf(wire->name, sizeof wire->name, "%s", wire_name(codecs[i]));
        if (codecs[i] == WIRE_F32) {
            wire->finite = true;
            wire->same_top = 1;
            continue;
        }
        wire->finite = isfinite(kl.value) && isfinite(kl.high);
        if (!wire->finite)
            continue;
        wire->kl_divergence = fmin(kl.value, MANIFEST_MAX_KL); // a reader takes no more
        wire->kl_high = fmin(kl.high, MANIFEST_MAX_KL);
        wire->same_top = eval_statistics_share(a->trials[i].same_top, a->tokens).value;
        if (!(kl.high <= options.limit))
            continue;
        if (wire_is_compressed(codecs[i]) ? kl.value < least : a->wire == WIRE_F32) {
            a->wire = codecs[i];
            least = wire_is_compressed(codecs[i]) ? kl.value : INFINITY;
        }
    }
}

// ---- the report ------------------------------------------------------------------------------------------------

static void print_table(const struct advice *a)
{
    const struct manifest_wires *m = &a->measured;
    printf("%lld tokens, context %lld, %u ranks, error feedback %s; beside f32, which loses nothing\n",
           (long long)m->tokens, (long long)m->context, session_manifest(a->session)->tp_size,
           m->feedback ? "on" : "off");
    printf("wire  bits/value  KL divergence  at most     same top token  sums took\n");
    for (int i = 0; i < CODECS; i++) {
        const struct manifest_wire *wire = &m->wires[i];
        printf("%-4s  %10.2f  ", wire->name, 8.0 * (double)wire_group_bytes(codecs[i]) / WIRE_GROUP);
        if (wire->finite)
            printf("%13.7f  %-10.7f  %12.3f %%", wire->kl_divergence, wire->kl_high, 100 * wire->same_top);
        else
            printf("NaN or infinity                           ");
        printf("  %7.3f s\n", a->trials[i].exchange_s);
    }
    printf("advice: %s (limit %g)%s\n", wire_name(a->wire), m->limit,
           options.write ? "" : "; --write puts it into model.json");
}

static json_t *trial_json(const struct advice *a, int i)
{
    const struct manifest_wire *wire = &a->measured.wires[i];
    if (!wire->finite)
        return json_pack("{s:s, s:b, s:f}", "wire", wire->name, "finite", 0, "exchange_s", a->trials[i].exchange_s);
    return json_pack("{s:s, s:b, s:f, s:f, s:f, s:f}", "wire", wire->name, "finite", 1, "kl_divergence",
                     wire->kl_divergence, "kl_high", wire->kl_high, "same_top", wire->same_top, "exchange_s",
                     a->trials[i].exchange_s);
}

static int report(const struct advice *a, struct error *err)
{
    const struct manifest_wires *m = &a->measured;
    if (!common_options.json) {
        print_table(a);
        return 0;
    }
    json_t *wires = json_array();
    for (int i = 0; i < CODECS; i++)
        json_array_append_new(wires, trial_json(a, i));
    return print_report(json_pack("{s:i, s:s, s:f, s:I, s:I, s:i, s:b, s:b, s:o}", "schema_version", 1, "advice",
                                  wire_name(a->wire), "limit", m->limit, "tokens", (json_int_t)m->tokens, "context",
                                  (json_int_t)m->context, "tp_size", (int)session_manifest(a->session)->tp_size,
                                  "feedback", (int)m->feedback, "written", (int)options.write, "wires", wires),
                        err);
}

// The manifest as it stands there now, with the advice: not of another model that has taken its place.
static int write_advice(const struct advice *a, const char *dir, struct error *err)
{
    struct manifest *manifest = NULL;
    char *text = NULL, path[4096];
    bool signed_list = false;
    int rc = manifest_read(&manifest, dir, err);
    if (rc)
        return rc;
    char *name = strdup(wire_name(a->wire));
    if (!name)
        rc = error_set(err, ERR_MEMORY, "%s: no memory for the manifest", dir);
    else if (!checksum128_equal(manifest->contract, session_manifest(a->session)->contract))
        rc = error_set(err, ERR_CORRUPT, "%s: another model was written here meanwhile; its advice stays as it was",
                       dir);
    if (rc)
        goto done;
    free(manifest->wire_advice);
    manifest->wire_advice = name;
    name = NULL;
    manifest->wires_measured = a->measured;
    if ((rc = manifest_to_json(manifest, &text, err)) ||
        (rc = file_write_atomic(dir, MANIFEST_FILE_NAME, text, strlen(text), err)))
        goto done;
    if (snprintf(path, sizeof path, "%s/SHA256SUMS", dir) < (int)sizeof path)
        rc = file_is_there(&signed_list, path, err);
    if (signed_list && !common_options.quiet)
        fprintf(stderr, "%s: the list of checksums there is of the model.json before; run tpshard sums again\n", dir);
done:
    free(name);
    free(text);
    manifest_free(manifest);
    return rc;
}

static int check_usage(const char *place, struct error *err)
{
    if (!options.text)
        return error_set(err, ERR_USAGE, "advise needs --text FILE");
    if (options.write && store_url_is_one(place))
        return error_set(err, ERR_USAGE, "--write: %s is a URL; run it where the directory lies", place);
    if (strcmp(session_options.wire, "auto") != 0)
        return error_set(err, ERR_USAGE, "--wire %s: advise tries every codec itself", session_options.wire);
    return 0;
}

static int open_session(struct session **session, const char *place, struct error *err)
{
    struct session_options window = session_options;
    window.default_context = 512;
    window.wire = wire_name(WIRE_S8X); // so that there is room for what it loses
    int rc = choose_store(&window.store, place, err);
    if (rc || (rc = session_open(session, place, &window, CODECS, CHUNK, err)))
        return rc;
    if (session_manifest(*session)->tp_size == 1)
        return error_set(err, ERR_USAGE,
                         "%s is cut for one rank: nothing is summed over ranks, and there is nothing to advise", place);
    return 0;
}

int advise_run(int argc, char **argv, struct error *err)
{
    (void)argc;
    struct advice a = {0};
    const struct tokenizer *tokenizer;
    struct token_list ids = {0};
    char *text = NULL;
    size_t bytes;
    int rc;
    if ((rc = check_usage(argv[0], err)) || (rc = read_text(options.text, &text, &bytes, err)) ||
        (rc = open_session(&a.session, argv[0], err)) || (rc = session_tokenizer(a.session, &tokenizer, err)) ||
        (rc = tokenizer_encode(tokenizer, text, bytes, 0, &ids, err)))
        goto done;
    a.measured.text = checksum_whole(text, bytes);
    if (options.max_tokens > 0 && (int64_t)ids.count > options.max_tokens)
        ids.count = (size_t)options.max_tokens;
    if ((rc = run_text(&a, &ids, err)))
        goto done;
    judge(&a);
    if (options.write && (rc = write_advice(&a, argv[0], err)))
        goto done;
    rc = report(&a, err);
    if (!rc)
        rc = print_timings(a.session, err);
done:
    session_close(a.session);
    for (int i = 0; i < CODECS; i++) {
        free(a.trials[i].kl);
        free(a.trials[i].same_top);
    }
    free(a.exact);
    free(a.window);
    free(ids.ids);
    free(text);
    return rc;
}
