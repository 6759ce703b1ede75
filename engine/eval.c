// tpengine eval: how well a model predicts a text, and how far it is from another one.
//
// The text is cut into windows of context - 1 tokens, each behind a beginning-of-sequence token; every token of a window is
// predicted once. A model without such a token gets windows of context tokens, whose first is not scored. Perplexity = exp(mean negative log-likelihood).
// With --against, the other directory is the reference P: KL(P || Q) in nats, the mean over predicted positions, and the share of positions
// where both find the same token likeliest. Sums are in double precision and in text order.
#include "engine/commands.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct {
    const char *text, *against;
    int64_t max_tokens;
} options;

const struct option_spec eval_options[] = {
    {"text", OPTION_TEXT, &options.text, "FILE|-", 0, 0, "the text, UTF-8"},
    {"against", OPTION_TEXT, &options.against, "OTHER_OUT_DIR", 0, 0,
     "reference model for KL divergence and top-1 agreement"},
    {"max-tokens", OPTION_INT, &options.max_tokens, "N", 0, 9e15, "score only the first N tokens; 0: all"},
    SESSION_OPTION_LINES,
    {NULL, OPTION_FLAG, NULL, NULL, 0, 0, NULL},
};

enum { CHUNK = 128 }; // tokens of one forward

struct score {
    double nll, kl;
    int64_t tokens, top1_equal;
};

// log sum exp of a row and its maximum's place; NaN anywhere comes out as NaN.
static double log_sum(const float *x, int64_t n, int64_t *top)
{
    double maximum = x[0], sum = 0;
    *top = 0;
    for (int64_t i = 1; i < n; i++)
        if (x[i] > maximum) {
            maximum = x[i];
            *top = i;
        }
    for (int64_t i = 0; i < n; i++)
        sum += exp(x[i] - maximum);
    return maximum + log(sum);
}

// One predicted position: q are the logits under test, p (may be NULL) those of the reference.
static void score_position(struct score *score, const float *q, const float *p, int64_t vocab, uint32_t next)
{
    int64_t top_q, top_p;
    double log_z_q = log_sum(q, vocab, &top_q);
    score->nll += log_z_q - q[next];
    score->tokens++;
    if (!p)
        return;
    double log_z_p = log_sum(p, vocab, &top_p), kl = 0;
    for (int64_t i = 0; i < vocab; i++)
        kl += exp(p[i] - log_z_p) * ((p[i] - log_z_p) - (q[i] - log_z_q));
    score->kl += kl;
    score->top1_equal += top_p == top_q;
}

// tokens[0] is the beginning-of-sequence token or the window's first; tokens[1 ..] are predicted.
static int score_window(struct session *session, struct session *reference, const uint32_t *tokens, int64_t count,
                        struct score *score, struct error *err)
{
    int64_t vocab = session_manifest(session)->model.vocab_size;
    for (int64_t start = 0; start + 1 < count; start += CHUNK) {
        int64_t n = count - 1 - start < CHUNK ? count - 1 - start : CHUNK;
        const float *q, *p = NULL;
        int rc;
        if ((rc = session_forward(session, tokens + start, n, start, &q, err)) ||
            (reference && (rc = session_forward(reference, tokens + start, n, start, &p, err))))
            return rc;
        for (int64_t i = 0; i < n; i++)
            score_position(score, q + i * vocab, p ? p + i * vocab : NULL, vocab, tokens[start + i + 1]);
    }
    return 0;
}

static int score_text(struct session *session, struct session *reference, const struct token_list *text,
                      struct score *score, struct error *err)
{
    int64_t bos = session_manifest(session)->model.bos_token_id, context = session_context(session);
    int64_t lead = bos >= 0 ? 1 : 0, body = context - lead;
    if (context < 2)
        return error_set(err, ERR_USAGE, "--context %lld: a window needs at least 2 tokens", (long long)context);
    uint32_t *window = malloc((size_t)context * sizeof *window);
    int rc = 0;
    if (!window)
        return error_set(err, ERR_MEMORY, "no memory for a window of %lld tokens", (long long)context);
    if (lead)
        window[0] = (uint32_t)bos;
    for (int64_t at = 0; at < (int64_t)text->count && rc == 0; at += body) {
        int64_t n = (int64_t)text->count - at < body ? (int64_t)text->count - at : body;
        memcpy(window + lead, text->ids + at, (size_t)n * sizeof *window);
        rc = score_window(session, reference, window, n + lead, score, err);
    }
    free(window);
    if (rc)
        return rc;
    if (score->tokens == 0)
        return error_set(err, ERR_USAGE, "%s: the text has no token to predict", options.text);
    if (!isfinite(score->nll) || !isfinite(score->kl))
        return error_set(err, ERR_OTHER, "the logits hold NaN or infinity; the weights or the activations are damaged");
    return 0;
}

static int report(const struct score *score, int64_t context, bool compared, struct error *err)
{
    double n = (double)score->tokens, perplexity = exp(score->nll / n);
    if (!common_options.json) {
        printf("perplexity %.6f tokens %lld context %lld", perplexity, (long long)score->tokens, (long long)context);
        if (compared)
            printf(" kl_divergence %.6f top1_agreement %.4f", score->kl / n, (double)score->top1_equal / n);
        printf("\n");
        return 0;
    }
    json_t *object = json_pack("{s:i, s:f, s:I, s:I}", "schema_version", 1, "perplexity", perplexity, "tokens",
                               (json_int_t)score->tokens, "context", (json_int_t)context);
    if (object && compared &&
        (json_object_set_new(object, "kl_divergence", json_real(score->kl / n)) ||
         json_object_set_new(object, "top1_agreement", json_real((double)score->top1_equal / n)))) {
        json_decref(object);
        object = NULL;
    }
    return print_report(object, err);
}

static int open_both(struct session **session, struct session **reference, const char *dir, struct error *err)
{
    int rc;
    struct session_options window = session_options;
    window.default_context = 512;
    if ((rc = choose_store(&window.store, dir, err)) || (rc = session_open(session, dir, &window, 1, CHUNK, err)))
        return rc;
    if (!options.against)
        return 0;
    if ((rc = session_open(reference, options.against, &window, 1, CHUNK, err)))
        return rc;
    int64_t vocab = session_manifest(*session)->model.vocab_size,
            other = session_manifest(*reference)->model.vocab_size;
    if (vocab != other)
        return error_set(err, ERR_USAGE, "%s has a vocabulary of %lld tokens and %s of %lld: they cannot be compared",
                         dir, (long long)vocab, options.against, (long long)other);
    return 0;
}

// Both plans come first: what one has begun to take would be counted by the other by chance.
static int launch_both(struct session *session, struct session *reference, struct error *err)
{
    int rc = session_settle(session, NULL, err);
    if (!rc && reference)
        rc = session_settle(reference, session, err);
    if (!rc)
        rc = session_launch(session, err);
    return rc || !reference ? rc : session_launch(reference, err);
}

int eval_run(int argc, char **argv, struct error *err)
{
    (void)argc;
    struct session *session = NULL, *reference = NULL;
    const struct tokenizer *tokenizer;
    struct token_list ids = {0};
    struct score score = {0};
    char *text = NULL;
    size_t bytes;
    int rc;
    if (!options.text)
        return error_set(err, ERR_USAGE, "eval needs --text FILE");
    if ((rc = read_text(options.text, &text, &bytes, err)) || (rc = open_both(&session, &reference, argv[0], err)) ||
        (rc = launch_both(session, reference, err)) || (rc = session_tokenizer(session, &tokenizer, err)) ||
        (rc = tokenizer_encode(tokenizer, text, bytes, 0, &ids, err)))
        goto done;
    if (options.max_tokens > 0 && (int64_t)ids.count > options.max_tokens)
        ids.count = (size_t)options.max_tokens;
    if ((rc = score_text(session, reference, &ids, &score, err)) == 0)
        rc = report(&score, session_context(session), reference != NULL, err);
    if (!rc)
        rc = print_timings(session, err);
done:
    session_close(reference);
    session_close(session);
    free(ids.ids);
    free(text);
    return rc;
}
