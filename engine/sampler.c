// Sampling on vocabulary-parallel logits. See sampler.h.
#include "engine/sampler.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { RADIX_BITS = 11, RADIX_BINS = 1 << RADIX_BITS };

// What a rank tells of one row.
struct candidate {
    float score;
    uint32_t token;
    uint32_t has_nan; // this rank met NaN
    uint32_t empty;   // this rank has no token to offer
};

struct token_score {
    uint32_t token;
    float score;
};

// A rank's part of a row's logprobs.
struct distribution {
    double maximum, sum; // sum: of exp(logit - maximum)
    float chosen;        // logit of the chosen token
    uint32_t holds_chosen, num_top;
    struct token_score top[STEP_MAX_LOGPROBS]; // likeliest first
};

enum { SCRATCH_BYTES = RADIX_BINS * sizeof(double) }; // of one rank in one exchange
_Static_assert(SAMPLER_MAX_ROWS * sizeof(struct candidate) <= SCRATCH_BYTES, "one exchange holds all candidates");
_Static_assert(SAMPLER_MAX_ROWS * sizeof(struct distribution) <= SCRATCH_BYTES, "and all distributions");
_Static_assert((int)SCRATCH_BYTES <= (int)COMM_GATHER_MAX_BYTES, "within what ranks exchange at once");

struct sampler {
    int tp_size;
    int64_t vocab_begin, vocab_local;
    union {
        double *histogram; // [RADIX_BINS]
        struct candidate *candidates;
        struct distribution *distributions; // [SAMPLER_MAX_ROWS], as candidates
    } own, gathered;                        // gathered: [tp_size] times as much
    float *shaped; // [vocab_local] a row's logits, changed, where the raw ones are needed again
};

int sampler_create(struct sampler **out, int tp_size, int64_t vocab_begin, int64_t vocab_local, struct error *err)
{
    struct sampler *s = calloc(1, sizeof *s);
    if (!s)
        return error_set(err, ERR_MEMORY, "no memory for the sampler");
    s->tp_size = tp_size;
    s->vocab_begin = vocab_begin;
    s->vocab_local = vocab_local;
    s->own.histogram = calloc(RADIX_BINS, sizeof(double));
    s->gathered.histogram = calloc((size_t)tp_size * RADIX_BINS, sizeof(double));
    s->shaped = calloc((size_t)(vocab_local > 0 ? vocab_local : 1), sizeof *s->shaped);
    if (!s->own.histogram || !s->gathered.histogram || !s->shaped) {
        sampler_free(s);
        return error_set(err, ERR_MEMORY, "no memory for the sampler");
    }
    *out = s;
    return 0;
}

void sampler_free(struct sampler *s)
{
    if (!s)
        return;
    free(s->own.histogram);
    free(s->gathered.histogram);
    free(s->shaped);
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

// Joins the ranks' candidates, own [count]: own becomes the best of everyone's best; equal scores go to the lowest token.
static int join_candidates(struct sampler *s, struct comm *comm, int64_t count, struct error *err)
{
    struct candidate *own = s->own.candidates;
    int rc = comm_all_gather(comm, s->gathered.candidates, own, (size_t)count * sizeof *own, err);
    if (rc)
        return rc;
    for (int64_t i = 0; i < count; i++) {
        struct candidate best = {.empty = 1};
        for (int rank = 0; rank < s->tp_size; rank++) {
            struct candidate other = s->gathered.candidates[rank * count + i];
            if (other.has_nan)
                return error_set(err, ERR_OTHER,
                                 "rank %d: the logits hold NaN; the weights or the activations are damaged", rank);
            if (!other.empty &&
                (best.empty || other.score > best.score || (other.score == best.score && other.token < best.token)))
                best = other;
        }
        own[i] = best;
    }
    return 0;
}

// ---- edits, mask, penalties ------------------------------------------------------------------------------------

static void apply_edits(const struct sampler *s, float *x, const struct sampler_row *row)
{
    for (int64_t i = 0; i < row->num_edits; i++) {
        int64_t local = (int64_t)row->edits[i].token - s->vocab_begin;
        if (local >= 0 && local < s->vocab_local)
            x[local] += row->edits[i].add;
    }
}

// NaN stays, so that it is found.
static void apply_mask(const struct sampler *s, float *x, const uint32_t *mask)
{
    for (int64_t i = 0; i < s->vocab_local; i++) {
        int64_t token = s->vocab_begin + i;
        if (!(mask[token / 32] >> (token % 32) & 1) && !isnan(x[i]))
            x[i] = -INFINITY;
    }
}

static void apply_penalties(const struct sampler *s, float *x, const struct token_counts *counts,
                            const struct sampling *how)
{
    bool repetition = how->repetition_penalty != 1.0,
         other = how->frequency_penalty != 0.0 || how->presence_penalty != 0.0;
    for (int64_t i = 0; i < s->vocab_local; i++) {
        if (!counts->in_any[i])
            continue;
        if (repetition)
            x[i] = (float)(x[i] > 0 ? x[i] / how->repetition_penalty : x[i] * how->repetition_penalty);
        if (other && counts->in_output[i])
            x[i] -= (float)(how->frequency_penalty * counts->in_output[i] + how->presence_penalty);
    }
}

// Logits of a row as tokens are chosen by: in place, or in `shaped` where logprobs need the raw ones later; then the same again.
static float *shape(struct sampler *s, const struct sampler_row *row)
{
    float *x = row->logits;
    bool penalties = row->counts && sampling_has_penalties(row->how);
    if (row->num_logprobs >= 0) {
        x = s->shaped;
        memcpy(x, row->logits, (size_t)s->vocab_local * sizeof *x);
    }
    apply_edits(s, x, row);
    if (row->mask)
        apply_mask(s, x, row->mask);
    if (penalties)
        apply_penalties(s, x, row->counts, row->how);
    return x;
}

static float *shape_again(struct sampler *s, const struct sampler_row *row)
{
    return row->num_logprobs >= 0 ? shape(s, row) : row->logits;
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
    double *sum = s->own.histogram;
    int rc;
    if ((rc = comm_all_gather(comm, s->gathered.histogram, s->own.histogram, RADIX_BINS * sizeof(double), err)))
        return rc;
    for (int bin = 0; bin < RADIX_BINS; bin++) {
        sum[bin] = 0;
        for (int r = 0; r < s->tp_size; r++)
            sum[bin] += s->gathered.histogram[r * RADIX_BINS + bin];
    }
    return 0;
}

// The largest threshold such that the tokens at or above it (and at or above `floor`) weigh at least `target` (top-k), or `target` times the
// whole (top-p, mass). One radix digit a round, from the top.
static int find_threshold(struct sampler *s, struct comm *comm, const float *x, float floor, float maximum, bool mass,
                          double target, float *threshold, struct error *err)
{
    static const int shifts[] = {21, 10, 0}, bits[] = {11, 11, 10};
    double *histogram = s->own.histogram;
    uint32_t prefix = 0; // digits found so far
    double above = 0;    // weight of all tokens above the prefix
    for (int round = 0; round < 3; round++) {
        uint32_t known = round == 0 ? 0 : ~0u << (shifts[round] + bits[round]);
        uint32_t bins = 1u << bits[round];
        memset(histogram, 0, RADIX_BINS * sizeof(double));
        for (int64_t i = 0; i < s->vocab_local; i++) {
            uint32_t key = ordered(x[i]);
            if (x[i] >= floor && (key & known) == prefix)
                histogram[key >> shifts[round] & (bins - 1)] += weight_of(x[i], maximum, mass);
        }
        int rc = gather_histogram(s, comm, err);
        if (rc)
            return rc;
        if (round == 0 && mass) {
            double whole = 0;
            for (uint32_t bin = 0; bin < bins; bin++)
                whole += histogram[bin];
            target *= whole;
        }
        uint32_t bin = bins - 1,
                 lowest = 0; // a target that is never reached (more than all, or rounding) ends at the lowest token
        while (lowest < bin && histogram[lowest] == 0)
            lowest++;
        while (bin > lowest && above + histogram[bin] < target)
            above += histogram[bin--];
        prefix |= bin << shifts[round];
    }
    *threshold = from_ordered(prefix);
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
    // 53 ones round up to 1, whose noise would be infinite.
    return -log(-log(uniform < 1 ? uniform : 1 - 0x1p-53));
}

static struct candidate draw_local(const struct sampler *s, const float *x, float threshold, float maximum,
                                   const struct sampling *how, uint64_t step)
{
    // 53-bit uniforms bound the noise to [-3.63, 36.74] (36.05 but for 53 ones): a token further than their distance, 40.37, below the maximum
    // cannot win.
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

// Temperature and the thresholds of a row whose largest logit is known; then this rank's draw.
static int draw(struct sampler *s, struct comm *comm, const struct sampler_row *row, float maximum,
                struct candidate *mine, struct error *err)
{
    const struct sampling *how = row->how;
    float *x = shape_again(s, row), threshold = -INFINITY;
    int rc;
    // Relative to the maximum, so that no temperature makes the likeliest tokens overflow.
    for (int64_t i = 0; i < s->vocab_local; i++)
        x[i] = (float)((x[i] - (double)maximum) / how->temperature);
    maximum = 0;
    if (how->top_k > 0 &&
        (rc = find_threshold(s, comm, x, threshold, maximum, false, (double)how->top_k, &threshold, err)))
        return rc;
    if (how->top_p < 1.0 && (rc = find_threshold(s, comm, x, threshold, maximum, true, how->top_p, &threshold, err)))
        return rc;
    if (how->min_p > 0 && threshold < maximum + (float)log(how->min_p))
        threshold = maximum + (float)log(how->min_p);
    *mine = draw_local(s, x, threshold, maximum, how, row->step);
    return 0;
}

// ---- logprobs --------------------------------------------------------------------------------------------------

static bool is_likelier(struct token_score a, struct token_score b)
{
    return a.score > b.score || (a.score == b.score && a.token < b.token);
}

// Puts a token into the list of the `limit` likeliest.
static void rank_token(struct token_score *top, uint32_t *count, uint32_t limit, struct token_score x)
{
    if (*count == limit && (limit == 0 || !is_likelier(x, top[limit - 1])))
        return;
    uint32_t at = *count < limit ? (*count)++ : limit - 1;
    for (; at > 0 && is_likelier(x, top[at - 1]); at--)
        top[at] = top[at - 1];
    top[at] = x;
}

static void look_at(const struct sampler *s, const struct sampler_row *row, struct distribution *out)
{
    const float *x = row->logits;
    int64_t chosen = (int64_t)row->out->token - s->vocab_begin;
    *out = (struct distribution){.maximum = -INFINITY};
    for (int64_t i = 0; i < s->vocab_local; i++) {
        out->maximum = x[i] > out->maximum ? x[i] : out->maximum;
        rank_token(out->top, &out->num_top, (uint32_t)row->num_logprobs,
                   (struct token_score){(uint32_t)(s->vocab_begin + i), x[i]});
    }
    for (int64_t i = 0; i < s->vocab_local && out->maximum > -INFINITY; i++)
        out->sum += exp(x[i] - out->maximum);
    out->holds_chosen = chosen >= 0 && chosen < s->vocab_local;
    if (out->holds_chosen)
        out->chosen = x[chosen];
}

// all: the ranks' parts, `stride` apart. Sums are taken in rank order.
static void fill_logprobs(const struct sampler *s, const struct distribution *all, int64_t stride,
                          const struct sampler_row *row)
{
    struct token_score top[STEP_MAX_LOGPROBS] = {{0}};
    struct step_choice *out = row->out;
    double maximum = -INFINITY, sum = 0;
    float chosen = -INFINITY;
    uint32_t count = 0;
    for (int rank = 0; rank < s->tp_size; rank++)
        maximum = all[rank * stride].maximum > maximum ? all[rank * stride].maximum : maximum;
    for (int rank = 0; rank < s->tp_size; rank++) {
        const struct distribution *part = &all[rank * stride];
        if (part->sum > 0)
            sum += part->sum * exp(part->maximum - maximum);
        if (part->holds_chosen)
            chosen = part->chosen;
        for (uint32_t i = 0; i < part->num_top; i++)
            rank_token(top, &count, (uint32_t)row->num_logprobs, part->top[i]);
    }
    double log_sum = maximum + log(sum);
    out->logprob = (float)(chosen - log_sum);
    out->num_top = (int32_t)count;
    for (uint32_t i = 0; i < count; i++) {
        out->top[i].token = top[i].token;
        out->top[i].logprob = (float)(top[i].score - log_sum);
    }
}

static int add_logprobs(struct sampler *s, struct comm *comm, const struct sampler_row *rows, int64_t count,
                        struct error *err)
{
    int64_t n = 0;
    for (int64_t i = 0; i < count; i++)
        if (rows[i].num_logprobs >= 0)
            look_at(s, &rows[i], &s->own.distributions[n++]);
    if (n == 0)
        return 0;
    int rc = comm_all_gather(comm, s->gathered.distributions, s->own.distributions,
                             (size_t)n * sizeof *s->own.distributions, err);
    if (rc)
        return rc;
    for (int64_t i = 0, at = 0; i < count; i++)
        if (rows[i].num_logprobs >= 0)
            fill_logprobs(s, &s->gathered.distributions[at++], n, &rows[i]);
    return 0;
}

// ---- all rows --------------------------------------------------------------------------------------------------

// Whether the largest logit decides.
static bool is_decided(const struct sampler_row *row, const struct candidate *best)
{
    return best->empty || row->how->temperature <= 0 || isinf(best->score);
}

// Draws for the rows that the largest logits, bests [count], leave open. They share the last exchange.
static int draw_all(struct sampler *s, struct comm *comm, const struct sampler_row *rows, int64_t count,
                    const struct candidate *bests, struct error *err)
{
    struct candidate drawn[SAMPLER_MAX_ROWS];
    int64_t n = 0;
    int rc;
    for (int64_t i = 0; i < count; i++)
        if (!is_decided(&rows[i], &bests[i]) && (rc = draw(s, comm, &rows[i], bests[i].score, &drawn[n++], err)))
            return rc;
    if (n == 0)
        return 0;
    memcpy(s->own.candidates, drawn, (size_t)n * sizeof *drawn);
    if ((rc = join_candidates(s, comm, n, err)))
        return rc;
    for (int64_t i = 0, at = 0; i < count; i++)
        if (!is_decided(&rows[i], &bests[i]))
            rows[i].out->token = s->own.candidates[at++].token;
    return 0;
}

int sampler_choose(struct sampler *s, struct comm *comm, const struct sampler_row *rows, int64_t count,
                   struct error *err)
{
    struct candidate bests[SAMPLER_MAX_ROWS];
    int rc;
    comm_at(comm, OP_SAMPLE, -1);
    if (count < 1 || count > SAMPLER_MAX_ROWS)
        return error_set(err, ERR_OTHER, "%lld choices at once: at most %d", (long long)count, SAMPLER_MAX_ROWS);
    for (int64_t i = 0; i < count; i++)
        s->own.candidates[i] = local_maximum(s, shape(s, &rows[i]));
    if ((rc = join_candidates(s, comm, count, err)))
        return rc;
    memcpy(bests, s->own.candidates, (size_t)count * sizeof *bests);
    for (int64_t i = 0; i < count; i++) {
        if (bests[i].empty && !rows[i].mask && rows[i].num_edits == 0)
            return error_set(err, ERR_OTHER, "no token is left to choose from: every logit is minus infinity");
        *rows[i].out = (struct step_choice){.token = bests[i].empty ? STEP_NO_TOKEN : bests[i].token};
    }
    if ((rc = draw_all(s, comm, rows, count, bests, err)))
        return rc;
    return add_logprobs(s, comm, rows, count, err);
}
