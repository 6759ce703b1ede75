// launch_sample against engine/sampler.c: the same token from the same logits, settings and seed, for hundreds of random rows.
//
// They differ in one thing: the device sums the masses of top-p as integers, the CPU in double. A different token is
// accepted where the threshold is shown to lie within BOUNDARY of the wanted mass, and counted; almost no row may need that.
#include "tests/device/cuda_test.h"

extern "C" {
#include "engine/comm.h"
#include "engine/sampler.h"
}
#include "tests/noise_help.h"

static const double BOUNDARY = 1e-9; // of the whole mass

template <size_t N> static float pick(const float (&choices)[N]) { return choices[random_bits() % N]; }

// ---- the CPU -----------------------------------------------------------------------------------------------------------

struct cpu_row {
    const float *logits; // [vocab]
    struct device_sampling how;
    uint16_t *in_output; // [vocab], NULL without counts
    uint8_t *in_any;
};

static struct sampling cpu_settings(const struct device_sampling *how)
{
    struct sampling s = {};
    s.temperature = how->temperature, s.top_p = how->top_p, s.min_p = how->min_p, s.top_k = how->top_k;
    s.repetition_penalty = how->repetition_penalty, s.frequency_penalty = how->frequency_penalty;
    s.presence_penalty = how->presence_penalty, s.seed = how->seed;
    return s;
}

// scaled (may be NULL) receives what sampler_choose makes of the logits.
static int cpu_choose(const struct cpu_row *row, int64_t vocab, uint32_t *token, float *scaled)
{
    static void *memory;
    static struct comm *comm;
    struct error err;
    if (!memory) {
        uint64_t bytes = (comm_region_bytes(1, 1, 4096, 0) + 4095) / 4096 * 4096;
        memory = aligned_alloc(4096, bytes);
        memset(memory, 0, bytes);
        assert_int_equal(comm_open(&comm, comm_region_init(memory, 1, 1, 4096, 0), 0, 60000, &err), 0);
    }
    struct sampler *sampler;
    struct sampling how = cpu_settings(&row->how);
    uint16_t *none_output = (uint16_t *)calloc((size_t)vocab, 2);
    uint8_t *none_any = (uint8_t *)calloc((size_t)vocab, 1);
    struct token_counts counts = {row->in_output ? row->in_output : none_output, row->in_any ? row->in_any : none_any};
    float *x = (float *)malloc((size_t)vocab * sizeof *x);
    memcpy(x, row->logits, (size_t)vocab * sizeof *x);
    struct step_choice choice;
    struct sampler_row choosing = {};
    choosing.logits = x, choosing.how = &how, choosing.step = row->how.step, choosing.counts = &counts;
    choosing.num_logprobs = -1, choosing.out = &choice;
    assert_int_equal(sampler_create(&sampler, 1, 0, vocab, &err), 0);
    int rc = sampler_choose(sampler, comm, &choosing, 1, &err);
    if (!rc)
        *token = choice.token;
    if (!rc && row->in_output && sampling_has_penalties(&how))
        token_counts_add(&counts, sampler, *token, true);
    if (scaled)
        memcpy(scaled, x, (size_t)vocab * sizeof *x);
    sampler_free(sampler);
    free(x);
    free(none_output);
    free(none_any);
    return rc;
}

static int descending(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x < y) - (x > y);
}

// Whether some threshold's mass, among what top-k keeps, lies within BOUNDARY of top_p.
static bool is_boundary(const struct cpu_row *row, int64_t vocab)
{
    if (!(row->how.top_p < 1))
        return false;
    uint32_t token;
    float *x = (float *)malloc((size_t)vocab * sizeof *x);
    assert_int_equal(cpu_choose(row, vocab, &token, x), 0);
    qsort(x, (size_t)vocab, sizeof *x, descending);
    int64_t kept = row->how.top_k > 0 && row->how.top_k < vocab ? row->how.top_k : vocab;
    while (kept < vocab && x[kept] == x[kept - 1]) // ties with the threshold stay
        kept++;
    double whole = 0, mass = 0;
    bool near = false;
    for (int64_t i = 0; i < kept; i++)
        whole += exp((double)x[i]);
    for (int64_t i = 0; i < kept; i++) {
        mass += exp((double)x[i]);
        near = near || fabs(mass / whole - (double)row->how.top_p) <= BOUNDARY;
    }
    free(x);
    return near;
}

// ---- the device --------------------------------------------------------------------------------------------------------

// Device memory of one launch: `rows` rows, `sequences` sequences, counts when with_counts.
struct batch {
    int64_t vocab, stride, rows, sequences;
    float *logits;
    struct device_sampling *how;
    uint16_t *in_output;
    uint8_t *in_any;
    uint32_t *tokens;
    void *scratch;
};

static struct batch make_batch(int64_t vocab, int64_t stride, int64_t rows, int64_t sequences, bool with_counts)
{
    struct batch b = {};
    b.vocab = vocab, b.stride = stride, b.rows = rows, b.sequences = sequences;
    b.logits = device_array<float>(rows * stride);
    b.how = device_array<struct device_sampling>(rows);
    b.tokens = device_array<uint32_t>(rows);
    b.scratch = device_array<uint8_t>((int64_t)sample_scratch_bytes(rows, vocab));
    if (with_counts) {
        b.in_output = device_array<uint16_t>(sequences * vocab);
        b.in_any = device_array<uint8_t>(sequences * vocab);
        memset(b.in_output, 0, (size_t)(sequences * vocab) * 2);
        memset(b.in_any, 0, (size_t)(sequences * vocab));
    }
    return b;
}

static void free_batch(struct batch *b)
{
    cudaFree(b->logits);
    cudaFree(b->how);
    cudaFree(b->tokens);
    cudaFree(b->scratch);
    cudaFree(b->in_output);
    cudaFree(b->in_any);
}

static void launch(const struct batch *b, int64_t first_row, int64_t rows)
{
    assert_int_equal(launch_sample(b->tokens + first_row, b->logits + first_row * b->stride, b->stride, b->vocab,
                                   b->how + first_row, b->in_output, b->in_any, rows, b->scratch, 0),
                     cudaSuccess);
    assert_int_equal(cudaDeviceSynchronize(), cudaSuccess);
}

// ---- random rows -------------------------------------------------------------------------------------------------------

static void random_logits(float *x, int64_t vocab)
{
    static const float spreads[] = {0.1f, 2, 2, 8, 8, 60, 3e5f};
    float spread = pick(spreads);
    uint64_t kind = random_bits() % 8;
    for (int64_t i = 0; i < vocab; i++) {
        x[i] = (float)(spread * (uniform() + uniform() + uniform() + uniform() - 2));
        if (kind == 0)
            x[i] = roundf(x[i] * 2) / 2; // many ties, zeros of both signs
        if (kind == 1 && random_bits() % 3)
            x[i] = -INFINITY;
        if (kind == 2)
            x[i] *= x[i] * x[i]; // heavy tails
        if (kind == 3)
            x[i] = x[i] * 1e-41f; // subnormal
    }
    x[random_bits() % (uint64_t)vocab] = 1; // not all minus infinity
}

static struct device_sampling random_settings(int32_t sequence)
{
    static const float temperatures[] = {0, 0.7f, 0.7f, 1, 1, 0.05f, 2.5f, 50, 1e-6f, 1e30f},
                       top_p[] = {1, 0.9f, 0.5f, 0.999f, 0.01f, 0.9999999f};
    static const float min_p[] = {0, 0, 0.05f, 0.3f, 1}, repetition[] = {1, 1.1f, 0.8f, 3},
                       other[] = {0, 0, 0.4f, -0.3f, 100};
    static const int32_t top_k[] = {0, 0, 1, 7, 40, 1000, 100000000};
    struct device_sampling s = {};
    s.temperature = pick(temperatures), s.top_p = pick(top_p), s.min_p = pick(min_p);
    s.top_k = top_k[random_bits() % 7];
    s.repetition_penalty = s.frequency_penalty = s.presence_penalty = 0;
    bool penalties = random_bits() % 2;
    s.repetition_penalty = penalties ? pick(repetition) : 1;
    s.frequency_penalty = penalties ? pick(other) : 0;
    s.presence_penalty = penalties ? pick(other) : 0;
    s.sequence = sequence;
    s.seed = random_bits(), s.step = random_bits() % 1000;
    return s;
}

static void random_counts(const struct batch *b)
{
    for (int64_t i = 0; i < b->sequences * b->vocab; i++) {
        uint64_t r = random_bits() % 8;
        b->in_any[i] = r < 3;
        b->in_output[i] = r < 2 ? (uint16_t)(1 + random_bits() % 4) : 0;
        if (random_bits() % 50 == 0)
            b->in_any[i] = 1, b->in_output[i] = UINT16_MAX; // saturated
    }
}

static struct cpu_row cpu_row_of(const struct batch *b, int64_t row, uint16_t *in_output, uint8_t *in_any)
{
    struct cpu_row cpu = {b->logits + row * b->stride, b->how[row], NULL, NULL};
    if (in_output) {
        cpu.in_output = in_output + b->how[row].sequence * b->vocab;
        cpu.in_any = in_any + b->how[row].sequence * b->vocab;
    }
    return cpu;
}

static void test_random_rows(void **)
{
    static const int64_t vocabs[] = {1, 2, 33, 1000, 4096, 4097, 9001};
    enum { ROWS = 6, SEQUENCES = 7, ROUNDS = 12, NUM_VOCABS = sizeof vocabs / sizeof vocabs[0] };
    int boundaries = 0, all = 0, sampled = 0;
    for (int v = 0; v < NUM_VOCABS; v += quick() ? 3 : 1) {
        for (int round = 0; round < (quick() ? 4 : ROUNDS); round++) {
            random_state = 1000 + (uint64_t)v * 100 + (uint64_t)round;
            int64_t vocab = vocabs[v], n = SEQUENCES * vocab;
            struct batch b = make_batch(vocab, vocab + (round % 3) * 5, ROWS, SEQUENCES, round % 4 != 0);
            uint16_t *in_output = NULL;
            uint8_t *in_any = NULL;
            if (b.in_any) {
                random_counts(&b);
                in_output = (uint16_t *)malloc((size_t)n * 2), in_any = (uint8_t *)malloc((size_t)n);
                memcpy(in_output, b.in_output, (size_t)n * 2);
                memcpy(in_any, b.in_any, (size_t)n);
            }
            uint32_t want[ROWS];
            for (int64_t r = 0; r < ROWS; r++) {
                b.how[r] = random_settings((int32_t)(SEQUENCES - 1 - r));
                if (!b.in_any)
                    b.how[r].repetition_penalty = 1, b.how[r].frequency_penalty = b.how[r].presence_penalty = 0;
                random_logits(b.logits + r * b.stride, vocab);
            }
            struct batch before = b; // logits and counts are changed by the launch
            before.logits = (float *)malloc((size_t)(ROWS * b.stride) * 4);
            memcpy(before.logits, b.logits, (size_t)(ROWS * b.stride) * 4);
            for (int64_t r = 0; r < ROWS; r++) {
                struct cpu_row cpu = cpu_row_of(&before, r, in_output, in_any);
                assert_int_equal(cpu_choose(&cpu, vocab, &want[r], NULL), 0);
            }
            emulator_seed((uint64_t)round);
            launch(&b, 0, ROWS);
            for (int64_t r = 0; r < ROWS; r++) {
                all++;
                sampled += b.how[r].temperature > 0;
                if (b.tokens[r] == want[r])
                    continue;
                struct cpu_row cpu = cpu_row_of(&before, r, in_output, in_any);
                struct sampling how = cpu_settings(&b.how[r]);
                if (in_output && sampling_has_penalties(&how)) // take the choice back
                    cpu.in_output[want[r]] -= cpu.in_output[want[r]] < UINT16_MAX;
                if (!is_boundary(&cpu, vocab))
                    fail_msg("vocab %d, round %d, row %d: token %u, the CPU's is %u", (int)vocab, round, (int)r,
                             b.tokens[r], want[r]);
                boundaries++;
            }
            if (in_output && !boundaries) {
                assert_memory_equal(in_output, b.in_output, (size_t)n * 2);
                assert_memory_equal(in_any, b.in_any, (size_t)n);
            }
            // Alone, in the other order, at another time: the same.
            emulator_seed((uint64_t)round + 77);
            uint32_t together[ROWS];
            memcpy(together, b.tokens, sizeof together);
            if (!b.in_any) {
                memcpy(b.logits, before.logits, (size_t)(ROWS * b.stride) * 4);
                for (int64_t r = ROWS - 1; r >= 0; r--)
                    launch(&b, r, 1);
                assert_memory_equal(together, b.tokens, sizeof together);
            }
            free(before.logits);
            free(in_output);
            free(in_any);
            free_batch(&b);
        }
    }
    assert_true(quick() || (all >= 400 && sampled >= 300));
    assert_true(boundaries <= (emulator_present() ? 1 : 8)); // a device's exp is not quite the host's
}

// One row, one setting at a time switched on, so that a step that does nothing shows, over many draws.
static void test_each_step(void **)
{
    enum { VOCAB = 5000, ROWS = 16 };
    static const struct {
        const char *name;
        float temperature, top_p, min_p;
        int32_t top_k;
    } cases[] = {
        {"temperature", 1.5f, 1, 0, 0}, {"top-k", 2, 1, 0, 5},         {"top-k 1", 2, 1, 0, 1},
        {"top-p", 2, 0.3f, 0, 0},       {"min-p", 2, 1, 0.2f, 0},      {"top-k, top-p", 2, 0.5f, 0, 50},
        {"all", 2, 0.9f, 0.1f, 200},    {"top-k all", 2, 1, 0, VOCAB},
    };
    for (size_t c = 0; c < sizeof cases / sizeof cases[0]; c += quick() ? 6 : 1) {
        random_state = 5 + c;
        struct batch b = make_batch(VOCAB, VOCAB, ROWS, 1, false);
        uint32_t want[ROWS];
        int different = 0;
        for (int i = 0; i < VOCAB; i++)
            b.logits[i] = (float)(3 * (uniform() + uniform() + uniform() - 1.5)) + (i % 997 == 0 ? 6.0f : 0.0f);
        for (int r = 0; r < ROWS; r++) {
            memcpy(b.logits + r * VOCAB, b.logits, VOCAB * sizeof *b.logits);
            struct device_sampling how = {};
            how.temperature = cases[c].temperature, how.top_p = cases[c].top_p, how.min_p = cases[c].min_p;
            how.top_k = cases[c].top_k, how.repetition_penalty = 1, how.seed = 99, how.step = (uint64_t)r;
            b.how[r] = how;
            struct cpu_row cpu = cpu_row_of(&b, r, NULL, NULL);
            assert_int_equal(cpu_choose(&cpu, VOCAB, &want[r], NULL), 0);
            different += want[r] != want[0];
        }
        launch(&b, 0, ROWS);
        for (int r = 0; r < ROWS; r++)
            if (b.tokens[r] != want[r])
                fail_msg("%s: draw %d is %u, the CPU's %u", cases[c].name, r, b.tokens[r], want[r]);
        assert_true(cases[c].top_k == 1 ? different == 0 : different > 0);
        free_batch(&b);
    }
}

// Real vocabularies: the tie is found across parts, and what is broken is reported whatever the settings.
static void test_large_vocabulary(void **)
{
    enum { VOCAB = 131073, ROWS = 6 };
    struct batch b = make_batch(VOCAB, VOCAB + 3, ROWS, ROWS, false);
    random_state = 31;
    for (int64_t r = 0; r < ROWS; r++) {
        float *x = b.logits + r * b.stride;
        for (int i = 0; i < VOCAB; i++)
            x[i] = (float)(8 * (uniform() + uniform() - 1));
        struct device_sampling how = {};
        how.top_p = 1, how.repetition_penalty = 1, how.seed = 5, how.sequence = (int32_t)r;
        b.how[r] = how;
    }
    float *tie = b.logits, *nan = b.logits + b.stride, *nans = b.logits + 2 * b.stride, *none = b.logits + 3 * b.stride;
    tie[130999] = tie[70001] = tie[131072] = 9;
    nan[131072] = NAN;
    nans[5] = -NAN;
    b.how[2].temperature = 1, b.how[2].top_k = 4;
    for (int i = 0; i < VOCAB; i++)
        none[i] = -INFINITY;
    b.how[3].temperature = 0.5f, b.how[3].top_p = 0.9f;
    b.logits[4 * b.stride + 99999] = INFINITY; // takes all, at any temperature
    b.how[4].temperature = 1;
    b.how[5].temperature = 1.2f, b.how[5].top_p = 0.95f, b.how[5].top_k = 70000;
    uint32_t want;
    struct cpu_row cpu = cpu_row_of(&b, 5, NULL, NULL);
    assert_int_equal(cpu_choose(&cpu, VOCAB, &want, NULL), 0);
    launch(&b, 0, ROWS);
    assert_int_equal(b.tokens[0], 70001);
    assert_int_equal(b.tokens[1], SAMPLE_NAN);
    assert_int_equal(b.tokens[2], SAMPLE_NAN);
    assert_int_equal(b.tokens[3], SAMPLE_NONE);
    assert_int_equal(b.tokens[4], 99999);
    assert_int_equal(b.tokens[5], want);
    free_batch(&b);
}

// Zeros of both signs tie; min-p above 1 leaves nothing.
static void test_corners(void **)
{
    struct batch b = make_batch(40, 40, 2, 2, true);
    struct device_sampling how = {};
    how.top_p = 1, how.repetition_penalty = 1;
    for (int i = 0; i < 80; i++)
        b.logits[i] = -1;
    b.logits[7] = -0.0f, b.logits[30] = 0.0f;
    b.how[0] = b.how[1] = how;
    b.how[0].presence_penalty = 0.5; // of what is counted, which is nothing yet
    b.how[1].temperature = 1, b.how[1].min_p = 2, b.how[1].sequence = 1;
    launch(&b, 0, 2);
    assert_int_equal(b.tokens[0], 7);
    assert_int_equal(b.tokens[1], SAMPLE_NONE);
    for (int i = 0; i < 80; i++) { // a choice for a row with penalties is counted, a failure is not
        assert_int_equal(b.in_any[i], i == 7);
        assert_int_equal(b.in_output[i], i == 7);
    }
    assert_int_equal(launch_sample(b.tokens, b.logits, 39, 40, b.how, NULL, NULL, 2, b.scratch, 0),
                     cudaErrorInvalidValue);
    assert_int_equal(launch_sample(b.tokens, b.logits, 40, 40, b.how, NULL, NULL, 0, b.scratch, 0), cudaSuccess);
    free_batch(&b);
}

// Random bits that are all ones give the largest noise, which is finite: a token 36.2 below the likeliest wins by it sometimes, one 40 below never.
static void test_largest_noise(void **)
{
    enum { VOCAB = 40, LIKELY = 7, UNLIKELY = 30, STEPS = 20 };
    struct batch b = make_batch(VOCAB, VOCAB, 2, 2, false);
    struct device_sampling how = {};
    int wins = 0;
    how.top_p = 1, how.repetition_penalty = 1, how.temperature = 1;
    for (uint64_t step = 0; step < STEPS; step++) {
        uint32_t want[2];
        how.step = step, how.seed = seed_for(~(uint64_t)0 - step, step, UNLIKELY); // the same 53 bits
        for (int r = 0; r < 2; r++) {
            float *logits = b.logits + r * VOCAB;
            for (int i = 0; i < VOCAB; i++)
                logits[i] = -100;
            logits[LIKELY] = 0, logits[UNLIKELY] = r ? -40 : -36.2f;
            b.how[r] = how;
            struct cpu_row cpu = cpu_row_of(&b, r, NULL, NULL);
            assert_int_equal(cpu_choose(&cpu, VOCAB, &want[r], NULL), 0);
        }
        launch(&b, 0, 2);
        assert_memory_equal(b.tokens, want, sizeof want);
        assert_int_equal(want[1], LIKELY);
        wins += want[0] == UNLIKELY;
    }
    assert_true(wins > 2 && wins < STEPS - 2);
    free_batch(&b);
}

// A captured launch obeys settings and logits that change in device memory.
static void test_capture(void **)
{
    enum { VOCAB = 5000, ROWS = 2 };
    struct batch b = make_batch(VOCAB, VOCAB, ROWS, ROWS, false);
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    assert_int_equal(cudaStreamCreate(&stream), 0);
    assert_int_equal(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), 0);
    assert_int_equal(launch_sample(b.tokens, b.logits, VOCAB, VOCAB, b.how, NULL, NULL, ROWS, b.scratch, stream), 0);
    assert_int_equal(cudaStreamEndCapture(stream, &graph), 0);
    assert_int_equal(cudaGraphInstantiate(&exec, graph, 0), 0);
    for (uint64_t round = 0; round < 4; round++) {
        random_state = 700 + round;
        uint32_t want[ROWS];
        for (int r = 0; r < ROWS; r++) {
            random_logits(b.logits + r * VOCAB, VOCAB);
            struct device_sampling how = {};
            how.temperature = (round + (uint64_t)r) % 2 ? 0.9f : 0, how.top_p = round < 2 ? 0.8f : 1;
            how.top_k = round % 3 ? 30 : 0, how.repetition_penalty = 1, how.seed = round, how.step = round;
            b.how[r] = how;
            struct cpu_row cpu = cpu_row_of(&b, r, NULL, NULL);
            assert_int_equal(cpu_choose(&cpu, VOCAB, &want[r], NULL), 0);
        }
        assert_int_equal(cudaGraphLaunch(exec, stream), 0);
        assert_int_equal(cudaStreamSynchronize(stream), 0);
        assert_memory_equal(b.tokens, want, sizeof want);
    }
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
    cudaStreamDestroy(stream);
    free_batch(&b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_random_rows),      cmocka_unit_test(test_each_step),
        cmocka_unit_test(test_large_vocabulary), cmocka_unit_test(test_corners),
        cmocka_unit_test(test_largest_noise),    cmocka_unit_test(test_capture),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
