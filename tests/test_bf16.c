// The tables that multiply bf16 by bf16, AMX and AVX512_BF16, on emulated registers and instructions, and the second one itself where the processor
// has it: the instructions by their formulas, the tables' bits by the text of kernels/cpu/amx_bf16.h and avx512_bf16.h in plain C, the same bits
// for a row in any company, and how far they are from the exact sums.
#ifndef __x86_64__
#include <stdio.h>

int main(void)
{
    printf("SKIP other processors have neither\n");
    return 77;
}

#else
#include "tests/kernels_help.h"

#include <cpuid.h>
#include <float.h>
#include <immintrin.h>

#include "kernels/kernels_internal.h"
#include "tests/amx_emulator.h"

static const struct kind_case float_kinds[] = {{WEIGHT_BF16, 0}, {WEIGHT_FP8, 0}, {WEIGHT_FP8G, 128}};
enum { FLOAT_KINDS = sizeof float_kinds / sizeof *float_kinds };

extern const struct kernels kernels_avx512bf16_emulated; // needs AVX-512
// The emulated ones; behind them stands the one that runs here, where it does.
static const struct kernels *tables[3] = {&kernels_amx_emulated, &kernels_avx512bf16_emulated};
static int num_tables = 2;
// Which formula the instruction of tables[2] follows (test_vectors): 0, or 1 where subnormal numbers are zero; -1: neither.
static int formula = -1;

static void need_vectors(void)
{
    if (!kernels_supported_avx512())
        skip();
}

// ---- The instructions ----------------------------------------------------------------------------------------------

static float without_subnormals(float x) { return fabsf(x) < FLT_MIN ? copysignf(0, x) : x; }

// Rounded once; zero when the result, rounded with exponents without an end, is subnormal.
static float fma_flushed(float a, float b, float c)
{
    a = without_subnormals(a);
    b = without_subnormals(b);
    c = without_subnormals(c);
    float r = fmaf(a, b, c);
    bool tiny = fabs((double)a * (double)b + (double)c) < 0x1p-126 * (1 - 0x1p-25);
    return tiny ? copysignf(0, r) : r;
}
static float add_flushed(float a, float b) { return without_subnormals(without_subnormals(a) + without_subnormals(b)); }

// sum + the products of `pairs` pairs of bf16; b's stand `stride` apart.
static float dot_bf16(float sum, const uint16_t *a, const uint16_t *b, int stride, int pairs)
{
    float even = 0, odd = 0;
    for (int k = 0; k < pairs; k++) {
        even = fma_flushed(bf16_to_f32(a[2 * k]), bf16_to_f32(b[k * stride]), even);
        odd = fma_flushed(bf16_to_f32(a[2 * k + 1]), bf16_to_f32(b[k * stride + 1]), odd);
    }
    return add_flushed(sum, add_flushed(even, odd));
}

// Ordinary numbers, and what rounds, cancels, is subnormal or becomes it, now and then; rarely NaN and Inf.
static uint16_t any_bf16(int rare)
{
    uint16_t bits = (uint16_t)random_bits();
    switch (random_below(rare ? 8 : 7)) {
    case 0:
        return (uint16_t)(bits & 0x807f); // subnormal or zero
    case 1:
        return (uint16_t)((bits & 0x80ff) | 0x2000); // a product of two is about the least normal number
    case 2:
        return (uint16_t)((bits & 0x8000) | 0x3f80); // +-1: sums cancel
    case 7:
        return random_below(40) ? (uint16_t)0x3f80 : (uint16_t)((bits & 0x807f) | 0x7f80);
    default:
        return (uint16_t)((bits & 0x83ff) | 0x3c00);
    }
}

static void check_tiles(int m_count, int pairs, int n_count, int rare)
{
    uint16_t a[16][32], b[16][32];
    float sum[16][16], want[16][16];
    struct tile_config config = {.palette = 1};
    config.rows[0] = config.rows[1] = (uint8_t)m_count;
    config.rows[2] = (uint8_t)pairs;
    config.row_bytes[0] = config.row_bytes[2] = (uint8_t)(4 * n_count);
    config.row_bytes[1] = (uint8_t)(4 * pairs);
    for (int i = 0; i < 16 * 32; i++) {
        a[i / 32][i % 32] = any_bf16(rare);
        b[i / 32][i % 32] = any_bf16(rare);
    }
    for (int i = 0; i < 256; i++)
        sum[i / 16][i % 16] = random_below(4) ? bf16_to_f32(any_bf16(0)) * (1 + 0x1p-20f) : 0x1p-140f;
    memcpy(want, sum, sizeof want);
    for (int m = 0; m < m_count; m++)
        for (int n = 0; n < n_count; n++)
            want[m][n] = dot_bf16(sum[m][n], a[m], &b[0][2 * n], 32, pairs);
    TILES_CONFIGURE(&config);
    TILE_LOAD(0, sum, sizeof sum[0]);
    TILE_LOAD(1, a, sizeof a[0]);
    TILE_LOAD(2, b, sizeof b[0]);
    TILE_DOT_BF16(0, 1, 2);
    TILE_STORE(0, sum, sizeof sum[0]);
    TILES_RELEASE();
    assert_same(sum[0], want[0], 256, "a product of tiles of bf16");
}

static void test_tiles(void **state)
{
    (void)state;
    need_vectors();
    for (int i = 0; i < 300; i++) {
        check_tiles(16, 16, 16, i % 2);
        check_tiles(1 + i % 16, 1 + (int)random_below(16), 1 + (int)random_below(16), i % 2);
    }
}

typedef float fma_fn(float a, float b, float c);

// *sum += two products, as kernels/cpu/avx512_bf16.h has it.
static float dot_pair(float sum, const uint16_t *a, const uint16_t *b, fma_fn *fma)
{
    return fma(bf16_to_f32(a[0]), bf16_to_f32(b[0]), fma(bf16_to_f32(a[1]), bf16_to_f32(b[1]), sum));
}

#if defined(__clang__) ? __clang_major__ >= 9 : __GNUC__ >= 10
__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16"), noinline)) static void
vector_dot(float *sum, const uint16_t *a, const uint16_t *b)
{
    __m512 v = _mm512_dpbf16_ps(_mm512_loadu_ps(sum), (__m512bh)_mm512_loadu_si512(a), (__m512bh)_mm512_loadu_si512(b));
    _mm512_storeu_ps(sum, v);
}
#else
static void vector_dot(float *sum, const uint16_t *a, const uint16_t *b) { (void)sum, (void)a, (void)b; }
#endif

// AMD's family 25, of which those with this instruction are Zen 4.
static bool is_zen4(void)
{
    uint32_t eax, ebx, ecx, edx;
    if (!__get_cpuid(0, &eax, &ebx, &ecx, &edx) || ebx != signature_AMD_ebx)
        return false;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (eax >> 8 & 0xf) + (eax >> 20 & 0xff) == 25;
}

// What the processor's own instruction computes. Where it is one of the two formulas, test_text holds its table to the bits. All else holds of
// every processor. Zen 4 follows the second.
static void test_vectors(void **state)
{
    (void)state;
    enum { TIMES = 20000 };
    int64_t differ[2] = {0}, rare_differ[2] = {0};
    if (!table("avx512bf16"))
        skip();
    for (int time = 0; time < TIMES; time++) {
        uint16_t a[32], b[32];
        float sum[16], got[16];
        bool rare = time % 2;
        for (int i = 0; i < 32; i++) {
            a[i] = rare ? any_bf16(1) : f32_to_bf16(uniform());
            b[i] = rare ? any_bf16(1) : f32_to_bf16(uniform());
        }
        for (int i = 0; i < 16; i++)
            got[i] = sum[i] = rare && random_below(3) == 0 ? 0x1p-140f : uniform() * 2;
        vector_dot(got, a, b);
        for (int i = 0; i < 16; i++)
            for (int flush = 0; flush < 2; flush++) {
                float want = dot_pair(sum[i], a + 2 * i, b + 2 * i, flush ? fma_flushed : fmaf);
                if (!same(got[i], want) && !(isnan(got[i]) && isnan(want)))
                    (rare ? rare_differ : differ)[flush]++;
            }
    }
    for (int flush = 0; flush < 2 && formula < 0; flush++)
        if (differ[flush] + rare_differ[flush] == 0)
            formula = flush;
    print_message("vdpbf16ps of this processor: %s\n", formula < 0
                                                           ? "neither formula, its sums are held to bounds alone"
                                                       : formula == 0 ? "the formula"
                                                                      : "the formula, subnormal numbers are zero");
    print_message("of %d sums %lld differ, of rare numbers %lld, or %lld where subnormal numbers are zero\n", 8 * TIMES,
                  (long long)differ[0], (long long)rare_differ[0], (long long)rare_differ[1]);
    if (is_zen4())
        assert_int_equal(formula, 1);
}

static void dot_0_1_2(void) { TILE_DOT_BF16(0, 1, 2); }
static void dot_0_1_1(void) { TILE_DOT_BF16(0, 1, 1); }

static void test_faults(void **state)
{
    (void)state;
    need_vectors();
    static const struct {
        uint8_t rows[3], row_bytes[3];
        const char *reason;
    } cases[] = {{{16, 16, 16}, {64, 64, 64}, NULL},     {{16, 16, 16}, {8, 64, 8}, NULL},
                 {{16, 15, 16}, {64, 64, 64}, "shapes"}, {{16, 16, 15}, {64, 64, 64}, "shapes"},
                 {{16, 16, 16}, {60, 64, 64}, "shapes"}, {{16, 16, 16}, {62, 64, 62}, "whole words"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct tile_config config = {.palette = 1};
        for (int t = 0; t < 3; t++) {
            config.rows[t] = cases[i].rows[t];
            config.row_bytes[t] = cases[i].row_bytes[t];
        }
        TILES_CONFIGURE(&config);
        const char *reason = amx_fault_of(dot_0_1_2);
        assert_true(cases[i].reason ? reason && strstr(reason, cases[i].reason) : !reason);
        assert_non_null(amx_fault_of(dot_0_1_1));
    }
    TILES_RELEASE();
    assert_non_null(strstr(amx_fault_of(dot_0_1_2), "not configured"));
}

// ---- The tables by their texts -------------------------------------------------------------------------------------

static float weight_value(const struct matrix *w, int64_t row, int64_t col)
{
    int64_t at = row * (int64_t)w->shape.cols_padded + col;
    if (w->shape.kind == WEIGHT_BF16)
        return bf16_to_f32(((const uint16_t *)w->data)[at]);
    return e4m3_to_f32(((const uint8_t *)w->data)[at]);
}

// fp8: times 2^-8.
static uint16_t weight_code(const struct matrix *w, int64_t row, int64_t col)
{
    return f32_to_bf16(weight_value(w, row, col) * (w->shape.kind == WEIGHT_BF16 ? 1 : 0x1p-8f));
}

static float scale_of_group(const struct matrix *w, int64_t row, int64_t col)
{
    int64_t groups = (int64_t)w->shape.cols_padded / 128;
    return ((const float *)w->scale)[row / 16 * groups * 16 + col / 128 * 16 + row % 16];
}

static uint16_t rounded(const float *x, int64_t col, int64_t cols)
{
    uint16_t bits = f32_to_bf16(col < cols ? x[col] : 0);
    return bits & 0x7f80 ? bits : 0;
}

static float tiles_by_text(const struct matrix *w, const float *x, int64_t row)
{
    int64_t stored = (int64_t)w->shape.cols_padded;
    float sum = 0, total = 0;
    for (int64_t col = 0; col < stored; col += 32) {
        uint16_t a[32], codes[32];
        for (int64_t i = 0; i < 32; i++) {
            a[i] = rounded(x, col + i, (int64_t)w->shape.cols);
            codes[i] = weight_code(w, row, col + i);
        }
        sum = dot_bf16(sum, a, codes, 2, 16);
        if (w->shape.kind == WEIGHT_FP8G && (col + 32) % 128 == 0) {
            total = fmaf(sum, scale_of_group(w, row, col), total);
            sum = 0;
        }
    }
    if (w->shape.kind == WEIGHT_FP8G)
        return 0x1p8f * total;
    return w->shape.kind == WEIGHT_FP8 ? sum * (0x1p8f * ((const float *)w->scale)[row]) : sum;
}

static float vectors_by_text(const struct matrix *w, const float *x, int64_t row, fma_fn *fma)
{
    int64_t stored = (int64_t)w->shape.cols_padded;
    bool fp8 = w->shape.kind != WEIGHT_BF16, groups = w->shape.kind == WEIGHT_FP8G;
    float sum[16] = {0}, total[16] = {0};
    for (int64_t vector = 0; vector < stored; vector += 32) {
        for (int64_t i = 0; i < 16; i++) {
            uint16_t a[2], b[2];
            for (int64_t j = 2 * i; j < 2 * i + 2; j++) {
                int64_t col = fp8 ? vector / 64 * 64 + j / 8 * 16 + vector % 64 / 32 * 8 + j % 8 : vector + j;
                a[j % 2] = rounded(x, col, (int64_t)w->shape.cols);
                b[j % 2] = f32_to_bf16(weight_value(w, row, col));
            }
            sum[i] = dot_pair(sum[i], a, b, fma);
        }
        for (int64_t i = 0; i < 16 && groups && (vector + 32) % 128 == 0; i++) {
            total[i] = fmaf(sum[i], scale_of_group(w, row, vector), total[i]);
            sum[i] = 0;
        }
    }
    float *last = groups ? total : sum;
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++)
            last[i] += last[i + half];
    return w->shape.kind == WEIGHT_FP8 ? last[0] * ((const float *)w->scale)[row] : last[0];
}

static float output_by_text(int n, const struct matrix *w, const float *x, int64_t row)
{
    return n == 0 ? tiles_by_text(w, x, row) : vectors_by_text(w, x, row, n == 2 && formula == 1 ? fma_flushed : fmaf);
}

// Magnitudes over many powers of two, some subnormal.
static float *wide_floats(int64_t count)
{
    float *x = random_floats(count);
    for (int64_t i = 0; i < count; i += 1 + random_below(40))
        x[i] *= ldexpf(1, (int)random_below(150) - 130);
    return x;
}

static void check_text(int n, struct kind_case kind, int rows, int cols, int tokens)
{
    struct test_matrix t = make_matrix(kind, (uint64_t)rows, (uint64_t)cols);
    struct activations act = make_activations(tokens, cols);
    float *x = wide_floats(tokens * cols), *want = zeroed(sizeof *want * (uint64_t)rows);
    tables[n]->prepare(&act, &t.m, x, cols, 0, tokens);
    float *y = multiply(tables[n], &t.m, &act, tokens);
    for (int token = 0; token < tokens; token += 1 + token / 4) {
        for (int r = 0; r < rows; r++)
            want[r] = output_by_text(n, &t.m, x + token * cols, r);
        assert_same(y + token * rows, want, rows, t.name);
    }
    assert_true(amx_is_released());
    free(want);
    free(y);
    free(x);
    activations_free(&act);
    free_matrix(&t);
}

static void test_text(void **state)
{
    (void)state;
    static const int rows[] = {1, 17, 64, 70}, cols[] = {1, 64, 96, 128, 130, 192, 320, 450, 1100},
                     tokens[] = {1, 2, 3, 4, 5, 6, 8, 13, 16, 17, 35};
    enum { COLS = sizeof cols / sizeof *cols, TOKENS = sizeof tokens / sizeof *tokens };
    need_vectors();
    for (int n = 0; n < (formula < 0 ? 2 : num_tables); n++)
        for (int k = 0; k < FLOAT_KINDS; k++)
            for (int c = 0; c < COLS; c++)
                for (int i = 0; i < TOKENS; i++)
                    check_text(n, float_kinds[k], rows[(c + i) % 4], cols[c], tokens[i]);
}

// ---- Company -------------------------------------------------------------------------------------------------------

// A row's bits are those that it has alone, at every number of rows and wherever it stands among them, on both sides of what fits
// the few tokens' input, and of a block of tokens.
static void check_company(const struct kernels *kernels, struct kind_case kind, int64_t rows, int64_t cols,
                          int64_t tokens, int64_t step)
{
    struct test_matrix t = make_matrix(kind, (uint64_t)rows, (uint64_t)cols);
    struct activations act = make_activations(tokens, cols);
    float *x = random_floats(tokens * cols), *alone = zeroed(sizeof *alone * (uint64_t)(tokens * rows));
    kernels->prepare(&act, &t.m, x, cols, 0, tokens);
    for (int64_t token = 0; token < tokens; token++) {
        struct activations one = activations_rows(&act, token);
        kernels->matmul(alone + token * rows, rows, &t.m, &one, 1, 0, rows);
    }
    for (int64_t count = 2; count <= tokens; count += step) {
        int64_t first = random_below(tokens - count + 1);
        struct activations some = activations_rows(&act, first);
        float *y = multiply(kernels, &t.m, &some, count);
        assert_same(y, alone + first * rows, count * rows, t.name);
        free(y);
    }
    free(x);
    free(alone);
    activations_free(&act);
    free_matrix(&t);
}

static void test_company(void **state)
{
    (void)state;
    static const struct {
        int64_t rows, cols, tokens, step;
    } shapes[] = {{70, 448, 40, 1}, {64, 16640, 18, 1}, {128, 192, 290, 67}};
    need_vectors();
    for (int n = 0; n < num_tables; n++)
        for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
            for (int k = 0; k < FLOAT_KINDS; k++)
                check_company(tables[n], float_kinds[k], shapes[i].rows, shapes[i].cols, shapes[i].tokens,
                              shapes[i].step);
}

// A row that is copied to activations of another width, as rows of experts are.
static void test_copied_row(void **state)
{
    (void)state;
    enum { ROWS = 64, COLS = 320 };
    need_vectors();
    for (int n = 0; n < num_tables; n++)
        for (int k = 0; k < FLOAT_KINDS; k++) {
            struct test_matrix t = make_matrix(float_kinds[k], ROWS, COLS);
            struct activations act = make_activations(3, COLS + 700), other = make_activations(2, COLS);
            float *x = random_floats(3 * COLS);
            tables[n]->prepare(&act, &t.m, x, COLS, 0, 3);
            activations_copy_row(&other, 1, &act, 2, float_kinds[k].kind);
            struct activations from = activations_rows(&act, 2), to = activations_rows(&other, 1);
            float *want = multiply(tables[n], &t.m, &from, 1);
            float *y = multiply(tables[n], &t.m, &to, 1);
            assert_same(y, want, ROWS, t.name);
            free(want);
            free(y);
            free(x);
            activations_free(&act);
            activations_free(&other);
            free_matrix(&t);
        }
}

// ---- NaN, Inf and what is too large --------------------------------------------------------------------------------

// One of them shows in its own row alone.
static void check_bad_activation(const struct kernels *kernels, struct kind_case kind, int64_t tokens, float bad)
{
    enum { ROWS = 70, COLS = 320 };
    struct test_matrix t = make_matrix(kind, ROWS, COLS);
    struct activations act = make_activations(tokens, COLS);
    float *x = random_floats(tokens * COLS);
    kernels->prepare(&act, &t.m, x, COLS, 0, tokens);
    float *before = multiply(kernels, &t.m, &act, tokens);
    int64_t token = random_below(tokens);
    x[token * COLS + random_below(COLS)] = bad;
    kernels->prepare(&act, &t.m, x, COLS, 0, tokens);
    float *after = multiply(kernels, &t.m, &act, tokens);
    for (int64_t j = 0; j < tokens * ROWS; j++)
        assert_true(j / ROWS != token ? same(after[j], before[j]) : isnan(bad) ? isnan(after[j]) : !isfinite(after[j]));
    free(before);
    free(after);
    free(x);
    activations_free(&act);
    free_matrix(&t);
}

static void test_bad_activations(void **state)
{
    (void)state;
    static const float bad[] = {NAN, INFINITY, -INFINITY, FLT_MAX};
    need_vectors();
    for (int n = 0; n < num_tables; n++)
        for (int k = 0; k < FLOAT_KINDS; k++)
            for (int64_t tokens = 5; tokens <= 25; tokens += 5)
                for (int i = 0; i < 4; i++)
                    check_bad_activation(tables[n], float_kinds[k], tokens, bad[i]);
}

// What is below the normal numbers of bf16 counts as zero, whatever the processor makes of it; what rounds up to them does not.
static void test_small_activations(void **state)
{
    (void)state;
    enum { ROWS = 64, COLS = 64, TOKENS = 2 };
    need_vectors();
    for (int n = 0; n < num_tables; n++)
        for (int k = 0; k < FLOAT_KINDS; k++) {
            struct test_matrix t = make_matrix(float_kinds[k], ROWS, COLS);
            struct activations act = make_activations(TOKENS, COLS);
            float x[TOKENS * COLS];
            for (int i = 0; i < TOKENS * COLS; i++)
                x[i] = i < COLS ? 0x1.fcp-127f : 0x1.ffp-127f;
            tables[n]->prepare(&act, &t.m, x, COLS, 0, TOKENS);
            float *y = multiply(tables[n], &t.m, &act, TOKENS);
            for (int i = 0; i < ROWS; i++)
                assert_true(y[i] == 0);
            assert_true(activation_value(tables[n], &act, &t.m, 1, 7) == 0x1p-126);
            free(y);
            activations_free(&act);
            free_matrix(&t);
        }
}

// Each code of e4m3 in its turn, at a random place: its value, or NaN for all tokens of its row alone.
static void check_codes(const struct kernels *kernels)
{
    enum { ROWS = 128, COLS = 256, MOST = 18 };
    static const int tokens[] = {1, 11, MOST};
    struct test_matrix t = make_matrix((struct kind_case){WEIGHT_FP8, 0}, ROWS, COLS);
    struct activations act = make_activations(MOST, COLS);
    float *x = zeroed(sizeof *x * MOST * COLS);
    uint8_t *codes = t.data;
    for (int code = 0; code < 256; code++) {
        memset(codes, 0, ROWS * COLS);
        int bad_row = (int)random_below(ROWS), bad_col = (int)random_below(COLS);
        codes[bad_row * COLS + bad_col] = (uint8_t)code;
        for (int token = 0; token < MOST; token++)
            x[token * COLS + bad_col] = 1;
        kernels->prepare(&act, &t.m, x, COLS, 0, MOST);
        float want = e4m3_to_f32((uint8_t)code) * ((const float *)t.scale)[bad_row];
        for (int i = 0; i < 3; i++) {
            float *y = multiply(kernels, &t.m, &act, tokens[i]);
            for (int j = 0; j < tokens[i] * ROWS; j++)
                assert_true(j % ROWS == bad_row ? (isnan(y[j]) && isnan(want)) || y[j] == want : y[j] == 0);
            free(y);
        }
        memset(x, 0, sizeof *x * MOST * COLS);
    }
    free(x);
    activations_free(&act);
    free_matrix(&t);
}

static void test_codes(void **state)
{
    (void)state;
    need_vectors();
    for (int n = 0; n < num_tables; n++)
        check_codes(tables[n]);
}

// ---- Accuracy ------------------------------------------------------------------------------------------------------

struct errors {
    double worst, squares, count; // worst: of the bound
};

static void add_error(struct errors *e, double error, double bound, double size)
{
    double share = fabs(error) / bound;
    e->worst = share <= e->worst ? e->worst : share; // NaN is the worst
    e->squares += error * error / (size * size);
    e->count++;
}

// Against the exact sum of products of the f32 activations. An activation is off by at most 2^-8 of itself, and each of the roundings on
// a product's way to the output by 2^-24 of the sums so far: in tiles 16 in its chain, one for each step, half a dozen behind them, in vectors two
// for each 32 columns and half a dozen behind them. Typical errors are given in units of the root of the sum of squared products, which is what
// outputs of random signs are like.
static void check_accuracy(int n, struct kind_case kind)
{
    enum { ROWS = 64, COLS = 4096, TOKENS = 24 };
    const int roundings = 16 + COLS / 16 + 6;
    struct test_matrix t = make_matrix(kind, ROWS, COLS);
    struct activations act = make_activations(TOKENS, COLS), vector_act = make_activations(TOKENS, COLS);
    float *x = random_floats(TOKENS * COLS);
    tables[n]->prepare(&act, &t.m, x, COLS, 0, TOKENS);
    table("avx512")->prepare(&vector_act, &t.m, x, COLS, 0, TOKENS);
    float *y = multiply(tables[n], &t.m, &act, TOKENS);
    float *vectors = multiply(table("avx512"), &t.m, &vector_act, TOKENS);
    struct errors bf16 = {0}, sums = {0}, f32 = {0};
    for (int64_t i = 0; i < TOKENS * ROWS; i++) {
        const float *from = x + i / ROWS * COLS;
        const double *w = t.value + i % ROWS * COLS;
        double exact = 0, exact_sum = 0, magnitude = 0, squares = 0;
        for (int64_t j = 0; j < COLS; j++) {
            double term = w[j] * (double)from[j];
            exact += term;
            exact_sum += w[j] * (double)bf16_to_f32(f32_to_bf16(from[j]));
            magnitude += fabs(term);
            squares += term * term;
        }
        double own = roundings * 0x1p-24 * 1.01 * magnitude, bound = magnitude * 0x1p-8 + own, size = sqrt(squares);
        add_error(&bf16, y[i] - exact, bound, size);
        add_error(&sums, y[i] - exact_sum, own, size);
        add_error(&f32, vectors[i] - exact, bound, size);
    }
    double rms = sqrt(bf16.squares / bf16.count), own_rms = sqrt(sums.squares / sums.count);
    print_message(
        "%s %s: error rms %.1e (its sums alone %.1e, f32 vectors %.1e) of a typical output; worst %.3f of its "
        "bound, of its sums' %.3f\n",
        tables[n]->name, t.name, rms, own_rms, sqrt(f32.squares / f32.count), bf16.worst, sums.worst);
    assert_true(bf16.worst <= 1 && sums.worst <= 1);
    assert_true(rms <= 2.5e-3 && own_rms <= 1e-5);
    free(y);
    free(vectors);
    free(x);
    activations_free(&act);
    activations_free(&vector_act);
    free_matrix(&t);
}

static void test_accuracy(void **state)
{
    (void)state;
    need_vectors();
    for (int n = 0; n < num_tables; n++)
        for (int k = 0; k < FLOAT_KINDS; k++)
            check_accuracy(n, float_kinds[k]);
}

// ---- What is asked of the processor --------------------------------------------------------------------------------

// Prefill with tiles: per 32 tokens, 32 columns and 64 rows eight products and eight loads; per panel of 128 columns eight loads more and eight
// stores. Few tokens: per 16 rows and 32 columns one product and two loads.
static void test_counts(void **state)
{
    (void)state;
    enum { ROWS = 128, COLS = 768, MANY = 256, FEW = 11 };
    static const int tokens[] = {1, 8, FEW, MANY};
    need_vectors();
    for (int k = 0; k < FLOAT_KINDS; k++)
        for (int i = 0; i < 4; i++) {
            struct test_matrix t = make_matrix(float_kinds[k], ROWS, COLS);
            struct activations act = make_activations(tokens[i], COLS);
            float *x = random_floats(tokens[i] * COLS);
            kernels_amx_emulated.prepare(&act, &t.m, x, COLS, 0, tokens[i]);
            struct amx_counts before = amx_counts;
            free(multiply(&kernels_amx_emulated, &t.m, &act, tokens[i]));
            int64_t dots = amx_counts.dots - before.dots, loads = amx_counts.loads - before.loads;
            int64_t stores = amx_counts.stores - before.stores;
            bool fp8g = float_kinds[k].kind == WEIGHT_FP8G, many = tokens[i] == MANY;
            int64_t steps = many ? MANY / 32 * (ROWS / 64) * (COLS / 32) : ROWS / 16 * (COLS / 32);
            int64_t panels = steps / 4;
            assert_int_equal(dots, many ? 8 * steps : steps);
            assert_int_equal(loads, many ? 8 * steps + (fp8g ? 0 : 8 * (panels - panels / (COLS / 128))) : 2 * steps);
            assert_int_equal(stores, many ? 8 * panels : fp8g ? panels : ROWS / 16);
            assert_int_equal(amx_counts.configures - before.configures, 1);
            assert_int_equal(amx_counts.releases - before.releases, 1);
            print_message("%s, %d tokens: per product %.2f loads, %.2f stores\n", t.name, tokens[i],
                          (double)loads / (double)dots, (double)stores / (double)dots);
            free(x);
            activations_free(&act);
            free_matrix(&t);
        }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_tiles),      cmocka_unit_test(test_faults),
        cmocka_unit_test(test_vectors), // first: it says which formula test_text holds a table to
        cmocka_unit_test(test_text),       cmocka_unit_test(test_company),
        cmocka_unit_test(test_copied_row), cmocka_unit_test(test_bad_activations),
        cmocka_unit_test(test_codes),      cmocka_unit_test(test_small_activations),
        cmocka_unit_test(test_accuracy),   cmocka_unit_test(test_counts),
    };
    if (table("avx512bf16"))
        tables[num_tables++] = table("avx512bf16");
    return cmocka_run_group_tests(tests, NULL, NULL);
}

#endif
