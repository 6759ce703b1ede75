// Sampling on split logits: the same token on every rank and at every tp_size, thresholds against a sorted reference, the distribution
// of draws against the softmax.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "engine/comm.h"
#include "engine/sampler.h"
#include "tests/device/quick.h"

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { VOCAB = 1000, MAX_TP = 4 };

static uint64_t random_state = 20240607;
static double uniform(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (double)(random_state >> 11) * 0x1p-53;
}

static void fill(float *x, double spread)
{
    for (int i = 0; i < VOCAB; i++)
        x[i] = (float)(spread * (uniform() + uniform() + uniform() - 1.5));
}

// ---- one choice by tp_size ranks as threads ---------------------------------------------------------------------

struct rank_job {
    struct comm_region *region;
    int rank, tp_size, draws;
    const float *logits;     // [VOCAB]
    const uint32_t *history; // earlier output
    int num_history;
    const struct sampler_row *how; // with the whole vocabulary's edits and mask
    bool together;                 // all draws in calls of many rows
    struct step_choice *choices;   // [draws]
    int rc;
    struct error err;
};

static void *rank_thread(void *arg)
{
    struct rank_job *job = arg;
    struct comm *comm = NULL;
    struct sampler *sampler = NULL;
    struct token_counts counts = {0};
    struct sampler_row rows[SAMPLER_MAX_ROWS];
    int64_t begin = (int64_t)VOCAB * job->rank / job->tp_size, end = (int64_t)VOCAB * (job->rank + 1) / job->tp_size;
    int most = job->together ? SAMPLER_MAX_ROWS : 1;
    float *x = malloc(sizeof *x * (size_t)((end - begin) * most));
    job->rc = comm_open(&comm, job->region, job->rank, 5000, &job->err);
    if (!job->rc)
        job->rc = sampler_create(&sampler, job->tp_size, begin, end - begin, &job->err);
    if (!job->rc)
        job->rc = token_counts_alloc(&counts, end - begin, &job->err);
    for (int i = 0; i < job->num_history && !job->rc; i++)
        token_counts_add(&counts, sampler, job->history[i], true);
    for (int done = 0; done < job->draws && !job->rc; done += most) {
        int count = job->draws - done < most ? job->draws - done : most;
        for (int i = 0; i < count; i++) {
            rows[i] = *job->how;
            rows[i].logits = memcpy(x + i * (end - begin), job->logits + begin, sizeof *x * (size_t)(end - begin));
            rows[i].counts = &counts;
            rows[i].step = (uint64_t)(done + i);
            rows[i].out = &job->choices[done + i];
        }
        job->rc = sampler_choose(sampler, comm, rows, count, &job->err);
    }
    token_counts_free(&counts);
    sampler_free(sampler);
    comm_close(comm);
    free(x);
    return NULL;
}

// Every rank must report the same choices; they are returned in choices [draws].
static int choose_rows(int tp_size, const float *logits, const struct sampler_row *how, const uint32_t *history,
                       int num_history, int draws, bool together, struct step_choice *choices)
{
    uint64_t bytes = comm_region_bytes(tp_size, 1, 4096, 0);
    void *memory = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    memset(memory, 0, bytes);
    struct comm_region *region = comm_region_init(memory, tp_size, 1, 4096, 0);
    struct rank_job jobs[MAX_TP] = {{0}};
    pthread_t threads[MAX_TP];
    size_t choice_bytes = (size_t)draws * sizeof *choices;
    for (int r = 0; r < tp_size; r++) {
        jobs[r] = (struct rank_job){.region = region,
                                    .rank = r,
                                    .tp_size = tp_size,
                                    .draws = draws,
                                    .logits = logits,
                                    .history = history,
                                    .num_history = num_history,
                                    .how = how,
                                    .together = together,
                                    .choices = calloc(1, choice_bytes)};
        pthread_create(&threads[r], NULL, rank_thread, &jobs[r]);
    }
    int rc = 0;
    for (int r = 0; r < tp_size; r++) {
        pthread_join(threads[r], NULL);
        rc = rc ? rc : jobs[r].rc;
    }
    for (int r = 1; r < tp_size && !rc; r++)
        assert_memory_equal(jobs[r].choices, jobs[0].choices, choice_bytes);
    memcpy(choices, jobs[0].choices, choice_bytes);
    for (int r = 0; r < tp_size; r++)
        free(jobs[r].choices);
    free(memory);
    return rc;
}

static int choose(int tp_size, const float *logits, const struct sampling *how, const uint32_t *history,
                  int num_history, int draws, uint32_t *tokens)
{
    const struct sampler_row row = {.how = how, .num_logprobs = -1};
    struct step_choice *choices = calloc((size_t)draws, sizeof *choices);
    int rc = choose_rows(tp_size, logits, &row, history, num_history, draws, draws % 2 == 0, choices);
    for (int i = 0; i < draws; i++)
        tokens[i] = choices[i].token;
    free(choices);
    return rc;
}

static const struct sampling greedy = {.top_p = 1, .repetition_penalty = 1};

static void test_greedy(void **state)
{
    (void)state;
    float x[VOCAB];
    fill(x, 3);
    x[417] = x[903] = 50; // a tie: the lower id wins, wherever the cut
    for (int tp = 1; tp <= MAX_TP; tp += quick() ? MAX_TP - 1 : 1) {
        uint32_t token = 0;
        assert_int_equal(choose(tp, x, &greedy, NULL, 0, 1, &token), 0);
        assert_int_equal(token, 417);
    }
}

static void test_nan_is_an_error(void **state)
{
    (void)state;
    float x[VOCAB];
    uint32_t token;
    fill(x, 3);
    x[700] = NAN;
    for (int tp = 1; tp <= 3; tp++)
        assert_int_equal(choose(tp, x, &greedy, NULL, 0, 1, &token), ERR_OTHER);
    for (int i = 0; i < VOCAB; i++)
        x[i] = -INFINITY;
    assert_int_equal(choose(2, x, &greedy, NULL, 0, 1, &token), ERR_OTHER);
}

static int descending(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x < y) - (x > y);
}

// Smallest kept logit by sorting: temperature, then top-k, then top-p over what is left, then min-p.
static double reference_threshold(const float *logits, const struct sampling *how)
{
    static float sorted[VOCAB];
    for (int i = 0; i < VOCAB; i++)
        sorted[i] = (float)(logits[i] / how->temperature);
    qsort(sorted, VOCAB, sizeof *sorted, descending);
    int kept = how->top_k > 0 && how->top_k < VOCAB ? (int)how->top_k : VOCAB;
    double whole = 0, mass = 0;
    for (int i = 0; i < kept; i++)
        whole += exp((double)sorted[i] - sorted[0]);
    int last = 0;
    for (; last < kept; last++) {
        mass += exp((double)sorted[last] - sorted[0]);
        if (mass >= how->top_p * whole)
            break;
    }
    double threshold = sorted[last < kept ? last : kept - 1],
           floor = how->min_p > 0 ? sorted[0] + log(how->min_p) : -INFINITY;
    return threshold > floor ? threshold : floor;
}

static void test_thresholds(void **state)
{
    (void)state;
    static const struct sampling cases[] = {
        {.temperature = 1.0, .top_p = 1.0, .top_k = 1, .repetition_penalty = 1},
        {.temperature = 1.0, .top_p = 1.0, .top_k = 7, .repetition_penalty = 1},
        {.temperature = 0.7, .top_p = 0.9, .top_k = 0, .repetition_penalty = 1},
        {.temperature = 2.5, .top_p = 0.5, .top_k = 40, .repetition_penalty = 1},
        {.temperature = 1.3, .top_p = 0.999, .top_k = 999, .min_p = 0.05, .repetition_penalty = 1},
        {.temperature = 1.0, .top_p = 1.0, .top_k = 5000, .min_p = 0.3, .repetition_penalty = 1},
    };
    enum { DRAWS = 400 };
    uint32_t first[DRAWS], tokens[DRAWS];
    float x[VOCAB];
    fill(x, 2);
    for (size_t c = 0; c < sizeof cases / sizeof cases[0]; c++) {
        struct sampling how = cases[c];
        how.seed = 77 + c;
        double threshold = reference_threshold(x, &how), lowest = INFINITY;
        for (int tp = 1; tp <= MAX_TP; tp += quick() ? MAX_TP - 1 : 1) {
            assert_int_equal(choose(tp, x, &how, NULL, 0, DRAWS, tokens), 0);
            if (tp == 1)
                memcpy(first, tokens, sizeof first);
            assert_memory_equal(first, tokens, sizeof first); // the split does not change the draw
        }
        for (int i = 0; i < DRAWS; i++) {
            double scaled = (float)(x[first[i]] / how.temperature);
            assert_true(scaled >= threshold - 1e-6);
            lowest = scaled < lowest ? scaled : lowest;
        }
        if (how.top_k == 1)
            assert_true(fabs(lowest - threshold) <= 1e-6);
    }
}

// Chi-square of 40,000 draws over 12 likely tokens and the rest: 12 degrees of freedom, 32.9 is exceeded once in 1,000 seeds.
static void test_distribution(void **state)
{
    (void)state;
    enum { DRAWS = 40000, TOP = 12 };
    static float x[VOCAB];
    static uint32_t tokens[DRAWS];
    for (int i = 0; i < VOCAB; i++)
        x[i] = i < TOP ? (float)(6 - 0.25 * i) : -2.0f;
    struct sampling how = {.temperature = 1.25, .top_p = 1, .repetition_penalty = 1, .seed = 5};
    assert_int_equal(choose(2, x, &how, NULL, 0, DRAWS, tokens), 0);
    double whole = 0, counts[TOP + 1] = {0}, chi = 0;
    for (int i = 0; i < VOCAB; i++)
        whole += exp(x[i] / how.temperature);
    for (int i = 0; i < DRAWS; i++)
        counts[tokens[i] < TOP ? tokens[i] : TOP]++;
    double rest = DRAWS;
    for (int i = 0; i <= TOP; i++) {
        double expected = i < TOP ? DRAWS * exp(x[i] / how.temperature) / whole : rest;
        rest -= expected;
        chi += (counts[i] - expected) * (counts[i] - expected) / expected;
    }
    assert_true(chi <= 32.9);
}

static void test_penalties(void **state)
{
    (void)state;
    static const uint32_t history[] = {10, 10, 10, 20};
    float x[VOCAB];
    for (int i = 0; i < VOCAB; i++)
        x[i] = -5;
    x[10] = 4.0f;
    x[20] = 3.0f;
    x[30] = 2.0f;
    static const struct {
        double repetition, frequency, presence;
        uint32_t want;
    } cases[] = {{1, 0, 0, 10},     {1, 0.4, 0, 10}, {1, 0.6, 0, 20}, {1, 0, 1.5, 10},
                 {1, 0.5, 1.0, 30}, {2.5, 0, 0, 30}, {1.5, 0, 0, 10}};
    for (size_t c = 0; c < sizeof cases / sizeof cases[0]; c++) {
        struct sampling how = greedy;
        how.repetition_penalty = cases[c].repetition;
        how.frequency_penalty = cases[c].frequency;
        how.presence_penalty = cases[c].presence;
        uint32_t token = 0;
        assert_int_equal(choose(2, x, &how, history, 4, 1, &token), 0);
        assert_int_equal(token, cases[c].want);
    }
}

// ---- edits, masks, logprobs -------------------------------------------------------------------------------------

static void allow(uint32_t *mask, uint32_t token) { mask[token / 32] |= 1u << token % 32; }

static void test_edits_and_masks(void **state)
{
    (void)state;
    uint32_t mask[(VOCAB + 31) / 32] = {0}, nothing[(VOCAB + 31) / 32] = {0};
    static const struct logit_edit forbid[] = {{417, -INFINITY}, {903, -INFINITY}, {5000, 3}}, raise[] = {{999, 60}},
                                   last[] = {{31, -INFINITY}};
    float x[VOCAB];
    fill(x, 3);
    x[417] = 50, x[903] = 49, x[31] = 10, x[640] = 9;
    allow(mask, 31), allow(mask, 640), allow(mask, 999);
    const struct {
        struct sampler_row row;
        uint32_t want;
    } cases[] = {
        {{.edits = forbid, .num_edits = 1}, 903},
        {{.edits = forbid, .num_edits = 3}, 31},
        {{.edits = raise, .num_edits = 1}, 999},
        {{.mask = mask}, 31},
        {{.mask = mask, .edits = raise, .num_edits = 1}, 999},
        {{.mask = mask, .edits = last, .num_edits = 1}, 640},
        {{.mask = nothing}, STEP_NO_TOKEN},
    };
    for (size_t c = 0; c < sizeof cases / sizeof cases[0]; c++)
        for (int tp = 1; tp <= MAX_TP; tp += quick() ? MAX_TP - 1 : 1)
            for (int sampled = 0; sampled < 2; sampled++) {
                struct sampling how = greedy;
                struct sampler_row row = cases[c].row;
                struct step_choice choice;
                how.temperature = sampled; // the others are too far behind to be drawn
                how.top_k = 1;
                row.how = &how;
                row.num_logprobs = tp % 2 ? -1 : 3;
                assert_int_equal(choose_rows(tp, x, &row, NULL, 0, 1, false, &choice), 0);
                assert_int_equal(choice.token, cases[c].want);
            }
    x[5] = NAN; // behind a mask as well
    const struct sampler_row row = {.how = &greedy, .mask = mask, .num_logprobs = -1};
    struct step_choice choice;
    assert_int_equal(choose_rows(2, x, &row, NULL, 0, 1, false, &choice), ERR_OTHER);
}

// Of the model's own distribution, whatever the token is chosen by.
static void test_logprobs(void **state)
{
    (void)state;
    static const struct logit_edit edits[] = {{700, -INFINITY}};
    static const uint32_t history[] = {3, 4, 5};
    float x[VOCAB];
    double whole = 0;
    fill(x, 3);
    x[700] = 9, x[20] = x[960] = 8; // a tie
    for (int i = 0; i < VOCAB; i++)
        whole += exp(x[i]);
    struct sampling how = {.temperature = 1.7, .top_p = 0.9, .repetition_penalty = 1.3, .seed = 3};
    for (int tp = 1; tp <= MAX_TP; tp += quick() ? MAX_TP - 1 : 1)
        for (int n = 0; n <= STEP_MAX_LOGPROBS; n += 5) {
            enum { DRAWS = 70 }; // more than one call takes
            static struct step_choice choices[DRAWS], again[DRAWS], plain[DRAWS];
            struct sampler_row row = {.how = &how, .edits = edits, .num_edits = 1, .num_logprobs = n};
            assert_int_equal(choose_rows(tp, x, &row, history, 3, DRAWS, true, choices), 0);
            assert_int_equal(choose_rows(tp, x, &row, history, 3, DRAWS, false, again), 0);
            assert_memory_equal(choices, again, sizeof choices);
            row.num_logprobs = -1;
            assert_int_equal(choose_rows(tp, x, &row, history, 3, DRAWS, true, plain), 0);
            for (int i = 0; i < DRAWS; i++) {
                const struct step_choice *c = &choices[i];
                assert_int_equal(c->token, plain[i].token); // logprobs change no choice
                assert_true(c->token != 700);
                assert_true(fabs(c->logprob - (x[c->token] - log(whole))) <= 1e-5);
                assert_int_equal(c->num_top, n);
                for (int t = 0; t < n; t++) {
                    assert_true(fabs(c->top[t].logprob - (x[c->top[t].token] - log(whole))) <= 1e-5);
                    assert_true(t == 0 || x[c->top[t].token] <= x[c->top[t - 1].token]);
                }
                if (n > 0)
                    assert_true(c->top[0].token == 700 && c->top[1].token == 20 && c->top[2].token == 960);
            }
        }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_greedy),     cmocka_unit_test(test_nan_is_an_error),
        cmocka_unit_test(test_thresholds), cmocka_unit_test(test_distribution),
        cmocka_unit_test(test_penalties),  cmocka_unit_test(test_edits_and_masks),
        cmocka_unit_test(test_logprobs),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
