// The AMX table on emulated tile registers (tests/amx_emulator.h): the same bits as the scalar table where it computes with whole numbers, and
// what is asked of the processor. bf16 and fp8 weights: test_bf16. Where there is AMX, test_kernels runs the table itself.
#ifndef __x86_64__
#include <stdio.h>

int main(void)
{
    printf("SKIP no other processors have AMX\n");
    return 77;
}

#else
#include "tests/kernels_help.h"

#include <pthread.h>

#include "kernels/kernels_internal.h"
#include "tests/amx_emulator.h"

// ---- The emulation -------------------------------------------------------------------------------------------------

static const struct tile_config all_tiles = {
    .palette = 1,
    .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64},
    .rows = {16, 16, 16, 16, 16, 16, 16, 16},
};
static struct tile_config broken;
static uint8_t memory[TILE_ROWS][TILE_ROW_BYTES];

static void configure_broken(void) { TILES_CONFIGURE(&broken); }
static void zero_0(void) { TILE_ZERO(0); }
static void load_7(void) { TILE_LOAD(7, memory, 64); }
static void store_2(void) { TILE_STORE(2, memory, 64); }
static void dot(void) { TILE_DOT_INT8(0, 1, 2); }
static void dot_twice(void) { TILE_DOT_INT8(0, 1, 1); }
static void dot_into_itself(void) { TILE_DOT_INT8(2, 1, 2); }

static void expect(void (*fn)(void), const char *part)
{
    const char *reason = amx_fault_of(fn);
    if (!reason)
        reason = "no fault";
    if (!part)
        part = "no fault";
    if (!strstr(reason, part))
        fail_msg("\"%s\" instead of \"%s\"", reason, part);
}

// What the processor refuses.
static void test_faults(void **state)
{
    (void)state;
    static const struct {
        size_t at;
        uint8_t value;
        const char *part;
    } cases[] = {
        {0, 2, "palette"},     {0, 0, "lacks"},    {1, 1, "reserved"}, {15, 1, "reserved"}, {16, 65, "larger"},
        {17, 1, "larger"},     {48, 17, "larger"}, {16, 0, "alone"},   {55, 0, "alone"},    {16 + 2 * 8, 64, "lacks"},
        {48 + 8, 16, "lacks"}, {16, 63, NULL},     {48, 1, NULL},
    };
    TILES_RELEASE();
    expect(zero_0, "not configured");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        broken = all_tiles;
        memcpy((uint8_t *)&broken + cases[i].at, &cases[i].value, 1);
        expect(configure_broken, cases[i].part);
    }
    static const struct {
        int tile;
        uint8_t rows, row_bytes;
        const char *dot;
    } shapes[] = {{0, 15, 64, "shapes"}, {0, 16, 60, "shapes"},      {1, 15, 64, "shapes"}, {1, 16, 60, "shapes"},
                  {2, 15, 64, "shapes"}, {2, 16, 62, "whole words"}, {2, 0, 0, "not"},      {7, 0, 0, NULL}};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        broken = all_tiles;
        broken.rows[shapes[i].tile] = shapes[i].rows;
        broken.row_bytes[shapes[i].tile] = shapes[i].row_bytes;
        expect(configure_broken, NULL);
        expect(dot, shapes[i].dot);
        expect(load_7, shapes[i].tile == 7 ? "not configured" : NULL);
        expect(store_2, shapes[i].tile == 2 && !shapes[i].rows ? "not configured" : NULL);
    }
    TILES_CONFIGURE(&all_tiles);
    expect(dot_twice, "twice");
    expect(dot_into_itself, "twice");
    TILES_RELEASE();
    expect(dot, "not configured");
}

// A product of tiles of 3 rows, 12 columns and 5 words, by its formula; and what is not configured stays zero, or is left alone.
static void test_dot(void **state)
{
    (void)state;
    enum { M = 3, K = 12, N = 5 };
    struct tile_config config = {.palette = 1, .row_bytes = {4 * N, K, 4 * N}, .rows = {M, M, K / 4}};
    int8_t a[M][K], b[K / 4][N][4];
    int32_t sum[M][8] = {{0}};
    for (int i = 0; i < M * K; i++)
        a[i / K][i % K] = (int8_t)random_bits();
    for (int i = 0; i < K * N; i++)
        b[i / 4 / N][i / 4 % N][i % 4] = (int8_t)random_bits();
    for (int m = 0; m < M; m++)
        for (int n = 0; n < 8; n++)
            sum[m][n] = 1000 * m + n;
    TILES_CONFIGURE(&config);
    TILE_LOAD(0, sum, sizeof sum[0]);
    TILE_LOAD(1, a, K);
    TILE_LOAD(2, b, sizeof b[0]);
    TILE_DOT_INT8(0, 1, 2);
    TILE_DOT_INT8(0, 1, 2);
    TILE_STORE(0, sum, sizeof sum[0]);
    TILES_RELEASE();
    for (int m = 0; m < M; m++)
        for (int n = 0; n < 8; n++) {
            int32_t want = 1000 * m + n;
            for (int k = 0; n < N && k < K; k++)
                want += 2 * a[m][k] * b[k / 4][n][k % 4];
            assert_int_equal(sum[m][n], want);
        }
}

// ---- The table -----------------------------------------------------------------------------------------------------

// It has vectors around its tiles.
static void need_vectors(void)
{
    if (!kernels_supported_avx512())
        skip();
}

static void check(const struct test_matrix *t, int64_t tokens)
{
    int64_t cols = (int64_t)t->m.shape.cols, rows = (int64_t)t->m.shape.rows;
    struct activations act = make_activations(tokens, cols);
    float *x = random_floats(tokens * cols);
    bool rounds = rounds_floats(&kernels_amx_emulated, t->m.shape.kind);
    kernels_amx_emulated.prepare(&act, &t->m, x, cols, 0, tokens);
    struct amx_counts before = amx_counts;
    float *want = multiply(table("scalar"), &t->m, &act, tokens),
          *y = multiply(&kernels_amx_emulated, &t->m, &act, tokens);
    if (!rounds)
        assert_same(y, want, tokens * rows, t->name);
    int64_t token = random_below(tokens), row = random_below(rows);
    double sum = 0, magnitude = 0;
    for (int64_t i = 0; i < cols; i++) {
        double term = t->value[row * cols + i] * activation_value(&kernels_amx_emulated, &act, &t->m, token, i);
        sum += term;
        magnitude += fabs(term);
    }
    assert_true(fabs(y[token * rows + row] - sum) <= 1e-5 * magnitude);
    bool tiles = rounds || (is_integer(t->m.shape.kind) && tokens >= 12);
    assert_true((amx_counts.dots > before.dots) == tiles);
    assert_int_equal(amx_counts.configures - before.configures, amx_counts.releases - before.releases);
    assert_true(amx_is_released());
    free(want);
    free(y);
    free(x);
    activations_free(&act);
}

static void test_matmul(void **state)
{
    (void)state;
    static const int rows[] = {1, 16, 63, 64, 65, 200}, cols[] = {1, 64, 96, 128, 192, 320, 384, 448, 1000};
    static const int tokens[] = {1, 11, 12, 15, 16, 17, 31, 32, 33};
    enum { COLS = sizeof cols / sizeof *cols, TOKENS = sizeof tokens / sizeof *tokens };
    need_vectors();
    for (int k = 0; k < KIND_CASES; k++)
        for (size_t r = 0; r < sizeof rows / sizeof *rows; r++)
            for (size_t c = 0; c < COLS; c++) {
                struct test_matrix t = make_matrix(kind_cases[k], (uint64_t)rows[r], (uint64_t)cols[c]);
                // Large ones take two lengths, the others each.
                bool large = rows[r] * cols[c] > 8192;
                for (size_t i = large ? c % TOKENS : 0; i < TOKENS; i += large ? 4 : 1)
                    check(&t, tokens[i]);
                free_matrix(&t);
            }
}

// More tokens than share a panel.
static void test_many_tokens(void **state)
{
    (void)state;
    static const int tokens[] = {255, 256, 257, 300};
    need_vectors();
    for (int k = 0; k < KIND_CASES; k++) {
        struct test_matrix t = make_matrix(kind_cases[k], 70, 448);
        check(&t, tokens[k % 4]);
        free_matrix(&t);
    }
}

// Every byte that a scale can be, and tokens with NaN and Inf beside others.
static void test_any_scales(void **state)
{
    (void)state;
    enum { TOKENS = 21, ROWS = 65, COLS = 320 };
    need_vectors();
    for (int k = 0; k < KIND_CASES; k++) {
        if (!is_integer(kind_cases[k].kind))
            continue;
        struct test_matrix t = make_matrix(kind_cases[k], ROWS, COLS);
        for (uint64_t i = 0; i < t.m.shape.scale_bytes; i++)
            ((uint8_t *)t.scale)[i] = (uint8_t)random_bits();
        struct activations act = make_activations(TOKENS, COLS);
        float *x = random_floats(TOKENS * COLS);
        x[3 * COLS + 7] = NAN;
        x[17 * COLS + 130] = INFINITY;
        for (int i = 0; i < COLS; i++) {
            x[5 * COLS + i] *= 0x1p-98f;
            x[6 * COLS + i] *= 0x1p120f;
        }
        table("scalar")->prepare(&act, &t.m, x, COLS, 0, TOKENS);
        float *want = multiply(table("scalar"), &t.m, &act, TOKENS);
        float *y = multiply(&kernels_amx_emulated, &t.m, &act, TOKENS);
        assert_same(y, want, TOKENS * ROWS, t.name);
        free(want);
        free(y);
        free(x);
        activations_free(&act);
        free_matrix(&t);
    }
}

// Part of the rows writes these alone, at any address; and a token's bits are those that it has alone.
static void test_parts(void **state)
{
    (void)state;
    enum { TOKENS = 19, ROWS = 200, COLS = 576, STRIDE = ROWS + 5, SENTINEL = 12345 };
    need_vectors();
    for (int k = 0; k < KIND_CASES; k++) {
        struct test_matrix t = make_matrix(kind_cases[k], ROWS, COLS);
        struct activations act = make_activations(TOKENS, COLS);
        float *x = random_floats(TOKENS * COLS), *y = zeroed(sizeof *y * TOKENS * STRIDE), alone[ROWS];
        kernels_amx_emulated.prepare(&act, &t.m, x, COLS, 0, TOKENS);
        for (int i = 0; i < TOKENS * STRIDE; i++)
            y[i] = SENTINEL;
        for (int64_t begin = 0; begin < ROWS; begin += 64) {
            int64_t end = begin + 64 < ROWS ? begin + 64 : ROWS;
            kernels_amx_emulated.matmul(y + 1, STRIDE, &t.m, &act, TOKENS, begin, end);
            for (int64_t i = end; i < ROWS + 4; i++)
                assert_true(y[1 + i] == SENTINEL && y[18 * STRIDE + 1 + i] == SENTINEL);
        }
        for (int64_t token = 0; token < TOKENS; token++) {
            struct activations one = activations_rows(&act, token);
            kernels_amx_emulated.matmul(alone, ROWS, &t.m, &one, 1, 0, ROWS);
            assert_same(y + 1 + token * STRIDE, alone, ROWS, t.name);
            assert_true(y[token * STRIDE] == SENTINEL);
        }
        free(x);
        free(y);
        activations_free(&act);
        free_matrix(&t);
    }
}

static void *multiply_elsewhere(void *arg)
{
    const struct test_matrix *t = arg;
    assert_true(amx_is_released());
    check(t, 16);
    return arg;
}

// Nothing is taken over from one call, or one thread, to another: this thread's registers are in a state of their own.
static void test_threads(void **state)
{
    (void)state;
    need_vectors();
    struct test_matrix t = make_matrix((struct kind_case){WEIGHT_INT4, 128}, 64, 256);
    struct tile_config small = {.palette = 1, .row_bytes = {4}, .rows = {1}};
    int32_t word = 7;
    TILES_CONFIGURE(&small);
    TILE_LOAD(0, &word, 4);
    pthread_t thread;
    void *result = NULL;
    assert_int_equal(pthread_create(&thread, NULL, multiply_elsewhere, &t), 0);
    assert_int_equal(pthread_join(thread, &result), 0);
    assert_ptr_equal(result, &t);
    word = 0;
    TILE_STORE(0, &word, 4);
    assert_int_equal(word, 7);
    check(&t, 16);
    free_matrix(&t);
}

// What a prefill asks of the processor, which no machine in between can blur: per 16 tokens and 64 columns of 64 rows four products, each
// of 16 x 16 sums over 64 columns (narrow groups: one per group), five loads; and per group of sums four stores.
static void test_counts(void **state)
{
    (void)state;
    enum { TOKENS = 256, ROWS = 128, COLS = 768 };
    need_vectors();
    for (int k = 0; k < KIND_CASES; k++) {
        struct kind_case c = kind_cases[k];
        if (!is_integer(c.kind))
            continue;
        struct test_matrix t = make_matrix(c, ROWS, COLS);
        struct activations act = make_activations(TOKENS, COLS);
        float *x = random_floats(TOKENS * COLS);
        kernels_amx_emulated.prepare(&act, &t.m, x, COLS, 0, TOKENS);
        struct amx_counts before = amx_counts;
        free(multiply(&kernels_amx_emulated, &t.m, &act, TOKENS));
        int64_t group_cols = c.group_size ? c.group_size : ACT_GROUP, step_cols = group_cols < 64 ? group_cols : 64;
        int64_t steps = TOKENS / 16 * (ROWS / 64) * (COLS / step_cols), groups = steps * step_cols / group_cols;
        int64_t dots = amx_counts.dots - before.dots, loads = amx_counts.loads - before.loads;
        int64_t stores = amx_counts.stores - before.stores;
        assert_int_equal(dots, 4 * steps);
        assert_int_equal(loads, 5 * steps);
        assert_int_equal(stores, 4 * groups);
        assert_int_equal(amx_counts.configures - before.configures, 1);
        print_message(
            "%s: of 16384 products of a tile operation %.0f are used; per operation %.2f loads, %.2f stores\n", t.name,
            (double)TOKENS * ROWS * COLS / (double)dots, (double)loads / (double)dots, (double)stores / (double)dots);
        free(x);
        activations_free(&act);
        free_matrix(&t);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_faults),      cmocka_unit_test(test_dot),        cmocka_unit_test(test_matmul),
        cmocka_unit_test(test_many_tokens), cmocka_unit_test(test_any_scales), cmocka_unit_test(test_parts),
        cmocka_unit_test(test_threads),     cmocka_unit_test(test_counts),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

#endif
