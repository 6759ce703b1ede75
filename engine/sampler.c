// Sampling on vocabulary-parallel logits. See sampler.h.
#include "engine/sampler.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { RADIX_BITS = 11, RADIX_BINS = 1 << RADIX_BITS };

struct sampler {
    int64_t vocab_begin, vocab_local;
    double *histogram; // [RADIX_BINS] own
    double *gathered;  // [tp_size][RADIX_BINS]
    int tp_size;       // of `gathered`
};

int sampler_create(struct sampler **out, int64_t vocab_begin, int64_t vocab_local, struct error *err)
{
    struct sampler *s = calloc(1, sizeof *s);
    if (!s)
        return error_set(err, ERR_MEMORY, "no memory for the sampler");
    s->vocab_begin = vocab_begin;
    s->vocab_local = vocab_local;
    *out = s;
    return 0;
}

void sampler_free(struct sampler *s)
{
    if (!s)
        return;
    free(s->histogram);
    free(s->gathered);
    free(s);
}

int token_counts_alloc(struct token_counts *counts, int64_t vocab_local, struct error *err)
{
    size_t n = (size_t)(vocab_local > 0 ? vocab_local : 1);
    counts->in_output = calloc(n, sizeof *counts->in_output);
    counts->in_any = calloc(n, sizeof *counts->in_any);
    if (counts->in_output && counts->in_any)
        return 0;
    token_counts_free(counts);
    return error_set(err, ERR_MEMORY, "no memory for the token counts of a sequence");
}

void token_counts_free(struct token_counts *counts)
{
    free(counts->in_output);
    free(counts->in_any);
    *counts = (struct token_counts){0};
}

void token_counts_add(struct token_counts *counts, const struct sampler *s, uint32_t token, bool is_output)
{
    int64_t local = (int64_t)token - s->vocab_begin;
    if (local < 0 || local >= s->vocab_local)
        return;
    counts->in_any[local] = 1;
    if (is_output && counts->in_output[local] < UINT16_MAX)
        counts->in_output[local]++;
}

// ---- candidates ------------------------------------------------------------------------------------------------

struct candidate {
    float score;
    uint32_t token;
    uint32_t has_nan; // this rank met NaN
    uint32_t empty;   // this rank has no token to offer
};

// The best of everyone's best; equal scores go to the lowest token.
static int best_of_all(struct comm *comm, struct candidate mine, uint32_t *token, float *score, struct error *err)
{
    struct candidate all[COMM_MAX_RANKS];
    int rc = comm_all_gather(comm, all, &mine, sizeof mine, err);
    if (rc)
        return rc;
    int best = -1;
    for (int r = 0; r < comm_size(comm); r++) {
        if (all[r].has_nan)
            return error_set(err, ERR_OTHER, "rank %d: the logits hold NaN; the weights or the activations are damaged",
                             r);
        if (all[r].empty)
            continue;
        if (best < 0 || all[r].score > all[best].score ||
            (all[r].score == all[best].score && all[r].token < all[best].token))
            best = r;
    }
    if (best < 0)
        return error_set(err, ERR_OTHER, "no token is left to choose from: every logit is minus infinity");
    *token = all[best].token;
    *score = all[best].score;
    return 0;
}

static struct candidate local_maximum(const struct sampler *s, const float *x)
{
    struct candidate best = {.score = -INFINITY, .empty = 1};
    for (int64_t i = 0; i < s->vocab_local; i++) {
        if (isnan(x[i]))
            best.has_nan = 1;
        if (x[i] > best.score) {
            best.score = x[i];
            best.token = (uint32_t)(s->vocab_begin + i);
            best.empty = 0;
        }
    }
    return best;
}

// ---- penalties -------------------------------------------------------------------------------------------------

static void apply_penalties(const struct sampler *s, float *x, const struct token_counts *counts,
                            const struct sampling *how)
{
    bool repetition = how->repetition_penalty != 1.0,
         other = how->frequency_penalty != 0.0 || how->presence_penalty != 0.0;
    if (!repetition && !other)
        return;
    for (int64_t i = 0; i < s->vocab_local; i++) {
        if (!counts->in_any[i])
            continue;
        if (repetition)
            x[i] = (float)(x[i] > 0 ? x[i] / how->repetition_penalty : x[i] * how->repetition_penalty);
        if (other && counts->in_output[i])
            x[i] -= (float)(how->frequency_penalty * counts->in_output[i] + how->presence_penalty);
    }
}

// ---- thresholds ------------------------------------------------------------------------------------------------

// Bits of a float, so that unsigned order is the order of the numbers.
static uint32_t ordered(float x)
{
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u & 0x80000000u ? ~u : u | 0x80000000u;
}

static float from_ordered(uint32_t key)
{
    uint32_t u = key & 0x80000000u ? key & 0x7fffffffu : ~key;
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

// What a token weighs in the search: 1 (top-k) or its probability up to a constant (top-p).
static double weight_of(float x, float maximum, bool mass) { return mass ? exp((double)x - maximum) : 1.0; }

static int gather_histogram(struct sampler *s, struct comm *comm, struct error *err)
{
    int n = comm_size(comm), rc;
    if ((rc = comm_all_gather(comm, s->gathered, s->histogram, RADIX_BINS * sizeof(double), err)))
        return rc;
    for (int bin = 0; bin < RADIX_BINS; bin++) {
        s->histogram[bin] = 0;
        for (int r = 0; r < n; r++)
            s->histogram[bin] += s->gathered[r * RADIX_BINS + bin];
    }
    return 0;
}

// The largest threshold such that the tokens at or above it (and at or above `floor`) weigh at least `target` (top-k), or `target` times the
// whole (top-p, mass). One radix digit a round, from the top.
static int find_threshold(struct sampler *s, struct comm *comm, const float *x, float floor, float maximum, bool mass,
                          double target, float *threshold, struct error *err)
{
    static const int shifts[] = {21, 10, 0}, bits[] = {11, 11, 10};
    uint32_t prefix = 0; // digits found so far
    double above = 0;    // weight of all tokens above the prefix
    for (int round = 0; round < 3; round++) {
        uint32_t known = round == 0 ? 0 : ~0u << (shifts[round] + bits[round]);
        uint32_t bins = 1u << bits[round];
        memset(s->histogram, 0, RADIX_BINS * sizeof(double));
        for (int64_t i = 0; i < s->vocab_local; i++) {
            uint32_t key = ordered(x[i]);
            if (x[i] >= floor && (key & known) == prefix)
                s->histogram[key >> shifts[round] & (bins - 1)] += weight_of(x[i], maximum, mass);
        }
        int rc = gather_histogram(s, comm, err);
        if (rc)
            return rc;
        if (round == 0 && mass) {
            double whole = 0;
            for (uint32_t bin = 0; bin < bins; bin++)
                whole += s->histogram[bin];
            target *= whole;
        }
        uint32_t bin = bins - 1,
                 lowest = 0; // a target that is never reached (more than all, or rounding) ends at the lowest token
        while (lowest < bin && s->histogram[lowest] == 0)
            lowest++;
        while (bin > lowest && above + s->histogram[bin] < target)
            above += s->histogram[bin--];
        prefix |= bin << shifts[round];
    }
    *threshold = from_ordered(prefix);
    return 0;
}

static int make_histograms(struct sampler *s, struct comm *comm, struct error *err)
{
    if (s->tp_size == comm_size(comm))
        return 0;
    free(s->histogram);
    free(s->gathered);
    s->tp_size = 0;
    s->histogram = calloc(RADIX_BINS, sizeof(double));
    s->gathered = calloc((size_t)comm_size(comm) * RADIX_BINS, sizeof(double));
    if (!s->histogram || !s->gathered)
        return error_set(err, ERR_MEMORY, "no memory for the sampler's histograms");
    s->tp_size = comm_size(comm);
    return 0;
}

// ---- the draw --------------------------------------------------------------------------------------------------

// splitmix64 (Steele, Lea, Flood 2014) over seed, step and token: a number that does not depend on the rank that asks.
static uint64_t mix(uint64_t z)
{
    z += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static double gumbel(uint64_t seed, uint64_t step, uint32_t token)
{
    uint64_t bits = mix(mix(mix(seed) ^ step) ^ token);
    double uniform = ((double)(bits >> 11) + 0.5) * 0x1p-53;
    return -log(-log(uniform));
}

static struct candidate draw_local(const struct sampler *s, const float *x, float threshold, float maximum,
                                   const struct sampling *how, uint64_t step)
{
    // 53-bit uniforms bound the noise to [-3.7, 36.8]: a token further than this below the maximum cannot win.
    float hopeless = maximum - 41.0f;
    struct candidate best = {.score = -INFINITY, .empty = 1};
    for (int64_t i = 0; i < s->vocab_local; i++) {
        if (!(x[i] >= threshold) || x[i] < hopeless)
            continue;
        uint32_t token = (uint32_t)(s->vocab_begin + i);
        float score = (float)(x[i] - maximum + gumbel(how->seed, step, token));
        if (score > best.score) {
            best.score = score;
            best.token = token;
            best.empty = 0;
        }
    }
    return best;
}

int sampler_choose(struct sampler *s, struct comm *comm, float *logits, const struct token_counts *counts,
                   const struct sampling *how, uint64_t step, uint32_t *token, struct error *err)
{
    int rc;
    float maximum, threshold = -INFINITY;
    comm_at(comm, OP_SAMPLE, -1);
    apply_penalties(s, logits, counts, how);
    if ((rc = best_of_all(comm, local_maximum(s, logits), token, &maximum, err)))
        return rc;
    if (how->temperature <= 0 || isinf(maximum))
        return 0;
    // Relative to the maximum, so that no temperature makes the likeliest tokens overflow.
    for (int64_t i = 0; i < s->vocab_local; i++)
        logits[i] = (float)((logits[i] - (double)maximum) / how->temperature);
    maximum = 0;
    if (how->top_k > 0 || how->top_p < 1.0)
        if ((rc = make_histograms(s, comm, err)))
            return rc;
    if (how->top_k > 0 &&
        (rc = find_threshold(s, comm, logits, threshold, maximum, false, (double)how->top_k, &threshold, err)))
        return rc;
    if (how->top_p < 1.0 &&
        (rc = find_threshold(s, comm, logits, threshold, maximum, true, how->top_p, &threshold, err)))
        return rc;
    if (how->min_p > 0 && threshold < maximum + (float)log(how->min_p))
        threshold = maximum + (float)log(how->min_p);
    float score;
    return best_of_all(comm, draw_local(s, logits, threshold, maximum, how, step), token, &score, err);
}
