// Needles. See eval_needle.h.
#include "engine/eval_needle.h"

#include "engine/eval_statistics.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int64_t eval_needle_depth(int64_t depth) { return 100 * depth / (NEEDLE_DEPTHS - 1); }

// One probe at work.
struct probe {
    struct eval_needle *needle;
    const struct tokenizer *tokenizer;
    struct token_list before, answer, after; // of the sentence
    uint32_t *tokens;                        // [context]
};

static void probe_free(struct probe *probe)
{
    free(probe->before.ids);
    free(probe->answer.ids);
    free(probe->after.ids);
    free(probe->tokens);
}

// Digits that look random, the same ones each time: the numbers of a probe must not depend on what else is measured.
static unsigned number_of(int64_t probe)
{
    uint64_t x = (uint64_t)(probe + 1) * 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return 10000 + (unsigned)((x ^ x >> 31) % 90000);
}

static int encode(const struct probe *probe, const char *text, size_t bytes, struct token_list *out, struct error *err)
{
    out->count = 0;
    return tokenizer_encode(probe->tokenizer, text, bytes, 0, out, err);
}

// The parts are encoded apart, so that the question is, token for token, how the sentence begins.
static int encode_sentence(struct probe *probe, struct error *err)
{
    const char *sentence = probe->needle->sentence, *place = strstr(sentence, "{}");
    char words[512];
    int rc;
    if (!place || place == sentence || strstr(place + 2, "{}"))
        return error_set(err, ERR_USAGE,
                         "--needle-text \"%s\": some words and then {} once, for the number, are expected", sentence);
    size_t length = (size_t)(place - sentence);
    while (length > 0 && sentence[length - 1] == ' ') // it goes with the number
        length--;
    if (length == 0 || length + 2 > sizeof words)
        return error_set(err, ERR_USAGE, "--needle-text: 1 to %zu bytes of words in front of {} are expected",
                         sizeof words - 2);
    int bytes = snprintf(words, sizeof words, " %.*s", (int)length, sentence);
    if ((rc = encode(probe, words, (size_t)bytes, &probe->before, err)))
        return rc;
    return encode(probe, place + 2, strlen(place + 2), &probe->after, err);
}

static int encode_number(struct probe *probe, int64_t index, struct error *err)
{
    char digits[16];
    int bytes = snprintf(digits, sizeof digits, " %u", number_of(index));
    return encode(probe, digits, (size_t)bytes, &probe->answer, err);
}

// Appends tokens; returns where the next ones go.
static int64_t put(const struct probe *probe, int64_t at, const uint32_t *ids, size_t count)
{
    if (count > 0)
        memcpy(probe->tokens + at, ids, count * sizeof *ids);
    return at + (int64_t)count;
}

// What of a probe of that length is left for the text.
static int64_t text_tokens(const struct probe *probe, int64_t length)
{
    const struct model_desc *model = &session_manifest(probe->needle->session)->model;
    return length - (model->bos_token_id >= 0) - 2 * (int64_t)(probe->before.count + probe->answer.count) -
           (int64_t)probe->after.count;
}

// Fills tokens [length]. depth < 0: the text alone, all of it.
static void compose(const struct probe *probe, int64_t index, int64_t length, int64_t depth)
{
    const struct eval_needle *needle = probe->needle;
    int64_t bos = session_manifest(needle->session)->model.bos_token_id, at = 0;
    int64_t body = text_tokens(probe, length),
            sentence = length - body - (bos >= 0) - (int64_t)(probe->before.count + probe->answer.count);
    int64_t straw = depth < 0 ? body + sentence : body, spare = (int64_t)needle->text->count - straw;
    const uint32_t *text = needle->text->ids + (needle->probes > 1 ? spare * index / (needle->probes - 1) : 0);
    if (bos >= 0)
        probe->tokens[at++] = (uint32_t)bos;
    if (depth < 0) {
        at = put(probe, at, text, (size_t)straw);
    } else {
        int64_t in_front = body * eval_needle_depth(depth) / 100;
        at = put(probe, at, text, (size_t)in_front);
        at = put(probe, at, probe->before.ids, probe->before.count);
        at = put(probe, at, probe->answer.ids, probe->answer.count);
        at = put(probe, at, probe->after.ids, probe->after.count);
        at = put(probe, at, text + in_front, (size_t)(body - in_front));
    }
    at = put(probe, at, probe->before.ids, probe->before.count);
    put(probe, at, probe->answer.ids, probe->answer.count);
}

// The last tokens are the answer's; what is computed of the others' logits is not looked at.
static int score_answer(const struct probe *probe, int64_t length, bool *found, double *nll, struct error *err)
{
    const struct eval_needle *needle = probe->needle;
    int64_t vocab = session_manifest(needle->session)->model.vocab_size;
    int64_t first = length - (int64_t)probe->answer.count; // of the answer
    *found = true;
    for (int64_t start = 0; start + 1 < length; start += needle->chunk) {
        int64_t n = length - 1 - start < needle->chunk ? length - 1 - start : needle->chunk;
        const float *logits;
        int rc = session_forward(needle->session, probe->tokens + start, n, start, &logits, err);
        if (rc)
            return rc;
        for (int64_t i = first - 1 > start ? first - 1 - start : 0; i < n; i++) {
            struct position_score score;
            const float *row = logits + i * vocab;
            uint32_t next = probe->tokens[start + i + 1];
            eval_statistics_score(&score, row, NULL, vocab, next);
            if (!isfinite(score.nll))
                return error_set(err, ERR_OTHER,
                                 "the logits at position %lld hold NaN or infinity; the weights or the activations are "
                                 "damaged",
                                 (long long)(start + i));
            *nll += score.nll;
            *found = *found && eval_statistics_likeliest(row, vocab) == next;
        }
    }
    return 0;
}

static int run_length(struct probe *probe, int64_t which, struct error *err)
{
    struct eval_needle *needle = probe->needle;
    int64_t length = needle->lengths[which], answers = 0;
    double nll[NEEDLE_DEPTHS] = {0}, without = 0;
    int rc = 0;
    for (int64_t index = 0; index < needle->probes && !rc; index++) {
        bool found;
        if ((rc = encode_number(probe, index, err)))
            return rc;
        answers += (int64_t)probe->answer.count;
        compose(probe, index, length, -1);
        rc = score_answer(probe, length, &found, &without, err);
        for (int64_t depth = 0; depth < NEEDLE_DEPTHS && !rc; depth++) {
            compose(probe, index, length, depth);
            if ((rc = score_answer(probe, length, &found, &nll[depth], err)) == 0)
                needle->cells[which][depth].found += found;
        }
        if (needle->tells && !rc)
            fprintf(stderr, "eval: needle %lld of %lld in %lld tokens\n", (long long)index + 1,
                    (long long)needle->probes, (long long)length);
    }
    needle->nll_without[which] = without / (double)answers;
    for (int64_t depth = 0; depth < NEEDLE_DEPTHS; depth++)
        needle->cells[which][depth].nll = nll[depth] / (double)answers;
    return rc;
}

// The shortest probe must be text for its greater part, the text must reach for the longest.
static int check_lengths(struct probe *probe, struct error *err)
{
    struct eval_needle *needle = probe->needle;
    int64_t context = session_context(needle->session), longest = 0;
    int rc;
    for (int64_t index = 0; index < needle->probes; index++) {
        if ((rc = encode_number(probe, index, err)))
            return rc;
        int64_t rest = context - text_tokens(probe, context);
        longest = rest > longest ? rest : longest;
    }
    if (context / 4 < 2 * longest)
        return error_set(
            err, ERR_USAGE,
            "--context %lld is too short: a needle takes %lld tokens, and the shortest probe is a quarter of it",
            (long long)context, (long long)longest);
    if ((int64_t)needle->text->count < context)
        return error_set(err, ERR_USAGE,
                         "the text has %zu tokens, and probes of --context %lld need as many; use a longer text",
                         needle->text->count, (long long)context);
    return 0;
}

int eval_needle_run(struct eval_needle *needle, struct error *err)
{
    struct probe probe = {.needle = needle};
    int64_t context = session_context(needle->session);
    int rc;
    memset(needle->cells, 0, sizeof needle->cells);
    if ((rc = session_tokenizer(needle->session, &probe.tokenizer, err)) || (rc = encode_sentence(&probe, err)) ||
        (rc = check_lengths(&probe, err)))
        goto done;
    if (!(probe.tokens = malloc((size_t)context * sizeof *probe.tokens))) {
        rc = error_set(err, ERR_MEMORY, "no memory for %lld tokens", (long long)context);
        goto done;
    }
    for (int64_t i = 0; i < NEEDLE_LENGTHS && !rc; i++) {
        needle->lengths[i] = context >> (NEEDLE_LENGTHS - 1 - i);
        rc = run_length(&probe, i, err);
    }
done:
    probe_free(&probe);
    return rc;
}
