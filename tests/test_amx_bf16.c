// bf16 and fp8 weights of the AMX table, on emulated tile registers (tests/amx_emulator.h): the instruction by its formula, the table's bits by
// the text of kernels/cpu/amx_bf16.h in plain C, the same bits for a row in any company, and how far they are from the exact sums.
#ifndef __x86_64__
#include <stdio.h>

int main(void)
{
    printf("SKIP no other processors have AMX\n");
    return 77;
}

#else
#include "tests/kernels_help.h"

#include <float.h>

#include "kernels/kernels_internal.h"
#include "tests/amx_emulator.h"

static const struct kind_case float_kinds[] = {{WEIGHT_BF16, 0}, {WEIGHT_FP8, 0}, {WEIGHT_FP8G, 128}};
enum { FLOAT_KINDS = sizeof float_kinds / sizeof *float_kinds };

static void need_vectors(void)
{
    if (!kernels_supported_avx512())
        skip();
}

// ---- The instruction -----------------------------------------------------------------------------------------------

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

static void check_instruction(int m_count, int pairs, int n_count, int rare)
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

static void test_instruction(void **state)
{
    (void)state;
    need_vectors();
    for (int i = 0; i < 300; i++) {
        check_instruction(16, 16, 16, i % 2);
        check_instruction(1 + i % 16, 1 + (int)random_below(16), 1 + (int)random_below(16), i % 2);
    }
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

// ---- The table by its text -----------------------------------------------------------------------------------------

static uint16_t weight_code(const struct matrix *w, int64_t row, int64_t col)
{
    int64_t at = row * (int64_t)w->shape.cols_padded + col;
    if (w->shape.kind == WEIGHT_BF16)
        return ((const uint16_t *)w->data)[at];
    return f32_to_bf16(e4m3_to_f32(((const uint8_t *)w->data)[at]) * 0x1p-8f);
}

static float output_by_text(const struct matrix *w, const float *x, int64_t row)
{
    int64_t cols = (int64_t)w->shape.cols, stored = (int64_t)w->shape.cols_padded;
    float hi_sum = 0, lo_sum = 0, total = 0;
    for (int64_t col = 0; col < stored; col += 32) {
        uint16_t hi[32], lo[32], codes[32];
        for (int64_t i = 0; i < 32; i++) {
            float value = col + i < cols ? x[col + i] : 0;
            hi[i] = f32_to_bf16(value);
            lo[i] = f32_to_bf16(value - bf16_to_f32(hi[i]));
            codes[i] = weight_code(w, row, col + i);
        }
        hi_sum = dot_bf16(hi_sum, hi, codes, 2, 16);
        lo_sum = dot_bf16(lo_sum, lo, codes, 2, 16);
        if (w->shape.kind == WEIGHT_FP8G && (col + 32) % 128 == 0) {
            int64_t at = row / 16 * (stored / 128) * 16 + col / 128 * 16 + row % 16;
            total = fmaf(hi_sum + lo_sum, ((const float *)w->scale)[at], total);
            hi_sum = lo_sum = 0;
        }
    }
    if (w->shape.kind == WEIGHT_FP8G)
        return 0x1p8f * total;
    total = hi_sum + lo_sum;
    return w->shape.kind == WEIGHT_FP8 ? total * (0x1p8f * ((const float *)w->scale)[row]) : total;
}

// Magnitudes over many powers of two, some subnormal.
static float *wide_floats(int64_t count)
{
    float *x = random_floats(count);
    for (int64_t i = 0; i < count; i += 1 + random_below(40))
        x[i] *= ldexpf(1, (int)random_below(150) - 130);
    return x;
}

static void test_text(void **state)
{
    (void)state;
    static const int rows[] = {1, 17, 64, 70}, cols[] = {1, 64, 96, 128, 130, 192, 320, 450},
                     tokens[] = {1, 2, 5, 8, 9, 16, 17, 35};
    need_vectors();
    for (int k = 0; k < FLOAT_KINDS; k++)
        for (int c = 0; c < 8; c++)
            for (int i = 0; i < 8; i++) {
                int num_rows = rows[(c + i) % 4];
                struct test_matrix t = make_matrix(float_kinds[k], (uint64_t)num_rows, (uint64_t)cols[c]);
                struct activations act = make_activations(tokens[i], cols[c]);
                float *x = wide_floats(tokens[i] * cols[c]), *want = zeroed(sizeof *want * (uint64_t)num_rows);
                kernels_amx_emulated.prepare(&act, &t.m, x, cols[c], 0, tokens[i]);
                float *y = multiply(&kernels_amx_emulated, &t.m, &act, tokens[i]);
                for (int token = 0; token < tokens[i]; token += 1 + token / 4) {
                    for (int r = 0; r < num_rows; r++)
                        want[r] = output_by_text(&t.m, x + token * cols[c], r);
                    assert_same(y + token * num_rows, want, num_rows, t.name);
                }
                assert_true(amx_is_released());
                free(want);
                free(y);
                free(x);
                activations_free(&act);
                free_matrix(&t);
            }
}

// ---- Company -------------------------------------------------------------------------------------------------------

// A row's bits are those that it has alone, at every number of rows and wherever it stands among them, on both sides of what fits
// the few tokens' input, and of a block of tokens.
static void test_company(void **state)
{
    (void)state;
    static const struct {
        int64_t rows, cols, tokens, step;
    } shapes[] = {{70, 448, 40, 1}, {64, 8320, 18, 1}, {128, 192, 290, 67}};
    need_vectors();
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (int k = 0; k < FLOAT_KINDS; k++) {
            int64_t rows = shapes[i].rows, cols = shapes[i].cols, tokens = shapes[i].tokens;
            struct test_matrix t = make_matrix(float_kinds[k], (uint64_t)rows, (uint64_t)cols);
            struct activations act = make_activations(tokens, cols);
            float *x = random_floats(tokens * cols), *alone = zeroed(sizeof *alone * (uint64_t)(tokens * rows));
            kernels_amx_emulated.prepare(&act, &t.m, x, cols, 0, tokens);
            for (int64_t token = 0; token < tokens; token++) {
                struct activations one = activations_rows(&act, token);
                kernels_amx_emulated.matmul(alone + token * rows, rows, &t.m, &one, 1, 0, rows);
            }
            for (int64_t count = 2; count <= tokens; count += shapes[i].step) {
                int64_t first = random_below(tokens - count + 1);
                struct activations some = activations_rows(&act, first);
                float *y = multiply(&kernels_amx_emulated, &t.m, &some, count);
                assert_same(y, alone + first * rows, count * rows, t.name);
                free(y);
            }
            free(x);
            free(alone);
            activations_free(&act);
            free_matrix(&t);
        }
}

// A row that is copied to activations of another width, as rows of experts are.
static void test_copied_row(void **state)
{
    (void)state;
    enum { ROWS = 64, COLS = 320 };
    need_vectors();
    for (int k = 0; k < FLOAT_KINDS; k++) {
        struct test_matrix t = make_matrix(float_kinds[k], ROWS, COLS);
        struct activations act = make_activations(3, COLS + 700), other = make_activations(2, COLS);
        float *x = random_floats(3 * COLS);
        kernels_amx_emulated.prepare(&act, &t.m, x, COLS, 0, 3);
        activations_copy_row(&other, 1, &act, 2, float_kinds[k].kind);
        struct activations from = activations_rows(&act, 2), to = activations_rows(&other, 1);
        float *want = multiply(&kernels_amx_emulated, &t.m, &from, 1);
        float *y = multiply(&kernels_amx_emulated, &t.m, &to, 1);
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

static void test_bad_activations(void **state)
{
    (void)state;
    enum { ROWS = 70, COLS = 320 };
    static const float bad[] = {NAN, INFINITY, -INFINITY, FLT_MAX};
    need_vectors();
    for (int k = 0; k < FLOAT_KINDS; k++)
        for (int64_t tokens = 5; tokens <= 25; tokens += 5)
            for (int i = 0; i < 4; i++) {
                struct test_matrix t = make_matrix(float_kinds[k], ROWS, COLS);
                struct activations act = make_activations(tokens, COLS);
                float *x = random_floats(tokens * COLS);
                kernels_amx_emulated.prepare(&act, &t.m, x, COLS, 0, tokens);
                float *before = multiply(&kernels_amx_emulated, &t.m, &act, tokens);
                int64_t token = random_below(tokens);
                x[token * COLS + random_below(COLS)] = bad[i];
                kernels_amx_emulated.prepare(&act, &t.m, x, COLS, 0, tokens);
                float *after = multiply(&kernels_amx_emulated, &t.m, &act, tokens);
                for (int64_t j = 0; j < tokens * ROWS; j++)
                    assert_true(j / ROWS == token ? isnan(after[j]) : same(after[j], before[j]));
                free(before);
                free(after);
                free(x);
                activations_free(&act);
                free_matrix(&t);
            }
}

// Each code of e4m3 in its turn, at each place of 64: its value, or NaN for all tokens of its row alone.
static void test_codes(void **state)
{
    (void)state;
    enum { ROWS = 128, COLS = 256, MOST = 18 };
    static const int tokens[] = {1, 11, MOST};
    need_vectors();
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
        kernels_amx_emulated.prepare(&act, &t.m, x, COLS, 0, MOST);
        float want = e4m3_to_f32((uint8_t)code) * ((const float *)t.scale)[bad_row];
        for (int i = 0; i < 3; i++) {
            float *y = multiply(&kernels_amx_emulated, &t.m, &act, tokens[i]);
            for (int j = 0; j < tokens[i] * ROWS; j++)
                assert_true(j % ROWS == bad_row ? same(y[j], want) || y[j] == want : y[j] == 0);
            free(y);
        }
        memset(x, 0, sizeof *x * MOST * COLS);
    }
    free(x);
    activations_free(&act);
    free_matrix(&t);
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

// Against the exact sum of products of the f32 activations. An activation is off by at most 2^-17 of itself, and each of the roundings on
// a product's way to the output by 2^-24 of the sums so far: 16 in its chain, one for each step, half a dozen behind them. Typical errors are
// given in units of the root of the sum of squared products, which is what outputs of random signs are like.
static void test_accuracy(void **state)
{
    (void)state;
    enum { ROWS = 64, COLS = 4096, TOKENS = 24 };
    const int roundings = 16 + COLS / 32 + 6;
    need_vectors();
    for (int k = 0; k < FLOAT_KINDS; k++) {
        struct test_matrix t = make_matrix(float_kinds[k], ROWS, COLS);
        struct activations act = make_activations(TOKENS, COLS), vector_act = make_activations(TOKENS, COLS);
        float *x = random_floats(TOKENS * COLS);
        kernels_amx_emulated.prepare(&act, &t.m, x, COLS, 0, TOKENS);
        table("avx512")->prepare(&vector_act, &t.m, x, COLS, 0, TOKENS);
        float *y = multiply(&kernels_amx_emulated, &t.m, &act, TOKENS);
        float *vectors = multiply(table("avx512"), &t.m, &vector_act, TOKENS);
        struct errors tiles = {0}, f32 = {0}, hi_alone = {0};
        for (int64_t i = 0; i < TOKENS * ROWS; i++) {
            const float *from = x + i / ROWS * COLS;
            const double *w = t.value + i % ROWS * COLS;
            double exact = 0, hi = 0, magnitude = 0, squares = 0;
            for (int64_t j = 0; j < COLS; j++) {
                double term = w[j] * (double)from[j];
                exact += term;
                hi += w[j] * (double)bf16_to_f32(f32_to_bf16(from[j]));
                magnitude += fabs(term);
                squares += term * term;
            }
            double bound = magnitude * (0x1p-17 + roundings * 0x1p-24 * 1.01), size = sqrt(squares);
            add_error(&tiles, y[i] - exact, bound, size);
            add_error(&f32, vectors[i] - exact, bound, size);
            add_error(&hi_alone, hi - exact, bound, size);
        }
        double rms = sqrt(tiles.squares / tiles.count);
        print_message(
            "%s: error rms %.1e (f32 vectors %.1e, hi alone %.1e) of a typical output; worst %.3f of its bound\n",
            t.name, rms, sqrt(f32.squares / f32.count), sqrt(hi_alone.squares / hi_alone.count), tiles.worst);
        assert_true(tiles.worst <= 1);
        assert_true(rms <= 1e-5);
        free(y);
        free(vectors);
        free(x);
        activations_free(&act);
        activations_free(&vector_act);
        free_matrix(&t);
    }
}

// ---- What is asked of the processor --------------------------------------------------------------------------------

// Prefill: per 16 tokens, 32 columns and 64 rows eight products, half of them of lo, and eight loads; per panel of 128 columns eight loads more
// and eight stores. Few tokens: per 16 rows and 32 columns one product for each eight tokens, and one load of weights.
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
            int64_t stores = amx_counts.stores - before.stores, groups = (tokens[i] + 7) / 8;
            bool fp8g = float_kinds[k].kind == WEIGHT_FP8G, many = tokens[i] == MANY;
            int64_t steps = many ? MANY / 16 * (ROWS / 64) * (COLS / 32) : ROWS / 16 * (COLS / 32);
            int64_t panels = steps / 4;
            assert_int_equal(dots, many ? 8 * steps : groups * steps);
            assert_int_equal(loads, many ? 8 * steps + (fp8g ? 0 : 8 * (panels - panels / (COLS / 128)))
                                         : (1 + groups) * steps);
            assert_int_equal(stores, many ? 8 * panels : groups * (fp8g ? panels : ROWS / 16));
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
        cmocka_unit_test(test_instruction), cmocka_unit_test(test_faults),     cmocka_unit_test(test_text),
        cmocka_unit_test(test_company),     cmocka_unit_test(test_copied_row), cmocka_unit_test(test_bad_activations),
        cmocka_unit_test(test_codes),       cmocka_unit_test(test_accuracy),   cmocka_unit_test(test_counts),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

#endif
