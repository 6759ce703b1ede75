// The matmul kernels: every supported table against the scalar one, and scalar against double arithmetic on the numbers that the
// stored bytes mean. Heap blocks have their exact size, so that the address sanitizer sees a read past the padding.
#include "formats/number_formats.h"
#include "kernels/kernels.h"
#include "kernels/pack.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static uint64_t random_state = 0x9e3779b97f4a7c15u;

static uint64_t random_bits(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state * 0x2545f4914f6cdd1du;
}

static int64_t random_below(int64_t limit) { return (int64_t)(random_bits() >> 33) % limit; }
static float uniform(void) { return (float)((double)(random_bits() >> 11) * 0x1p-52 - 1.0); } // [-1, 1)

static void *zeroed(uint64_t bytes)
{
    void *memory = calloc(1, bytes ? bytes : 1);
    assert_non_null(memory);
    return memory;
}

static const struct kernels *table(const char *name)
{
    struct error err;
    const struct kernels *kernels = NULL;
    return kernels_select(&kernels, name, &err) ? NULL : kernels;
}

// Same bits, or both NaN.
static bool same(float a, float b) { return f32_bits(a) == f32_bits(b) || (isnan(a) && isnan(b)); }

static void assert_same(const float *a, const float *b, int64_t count, const char *what)
{
    for (int64_t i = 0; i < count; i++)
        if (!same(a[i], b[i]))
            fail_msg("%s: element %lld is %.9g, not %.9g", what, (long long)i, (double)a[i], (double)b[i]);
}

// ---- Matrices with known values ------------------------------------------------------------------------------------

struct kind_case {
    enum weight_kind kind;
    uint32_t group_size;
};
static const struct kind_case kind_cases[] = {
    {WEIGHT_F32, 0},   {WEIGHT_BF16, 0},  {WEIGHT_INT8, 0},   {WEIGHT_FP8, 0},
    {WEIGHT_INT4, 32}, {WEIGHT_INT4, 64}, {WEIGHT_INT4, 128},
};
enum { KIND_CASES = sizeof kind_cases / sizeof *kind_cases };

static bool is_integer(enum weight_kind kind) { return kind == WEIGHT_INT8 || kind == WEIGHT_INT4; }

struct test_matrix {
    struct matrix m;
    void *data, *scale;
    double *value; // [rows][cols]
    char name[64];
};

// Random codes over their whole range, int8's -128 and int4's -8 among them, stored by the formulas of weight.h alone.
static struct test_matrix make_matrix(struct kind_case c, uint64_t rows, uint64_t cols)
{
    struct test_matrix t = {0};
    struct weight_shape *shape = &t.m.shape;
    assert_true(weight_shape_make(shape, c.kind, c.group_size, rows, cols));
    snprintf(t.name, sizeof t.name, "%s g%u %llux%llu", weight_kind_name(c.kind), c.group_size,
             (unsigned long long)rows, (unsigned long long)cols);
    t.data = zeroed(shape->data_bytes);
    t.scale = zeroed(shape->scale_bytes);
    t.value = zeroed(rows * cols * sizeof *t.value);
    t.m.data = t.data;
    t.m.scale = shape->scale_bytes ? t.scale : NULL;
    uint64_t groups = c.group_size ? shape->cols_padded / c.group_size : 0;
    for (uint64_t r = 0; r < rows; r++) {
        float row_scale = 0.001f + 0.01f * fabsf(uniform());
        if (c.kind == WEIGHT_INT8 || c.kind == WEIGHT_FP8)
            ((float *)t.scale)[r] = row_scale;
        for (uint64_t g = 0; g < groups; g++)
            ((uint16_t *)t.scale)[(r / 16 * groups + g) * 16 + r % 16] = f32_to_f16(uniform() * 2);
        for (uint64_t i = 0; i < cols; i++) {
            uint64_t at = r * shape->cols_padded + i;
            double *value = &t.value[r * cols + i];
            switch (c.kind) {
            case WEIGHT_F32:
                *value = ((float *)t.data)[at] = uniform();
                break;
            case WEIGHT_BF16:
                ((uint16_t *)t.data)[at] = f32_to_bf16(uniform());
                *value = bf16_to_f32(((uint16_t *)t.data)[at]);
                break;
            case WEIGHT_INT8:
                *value = ((int8_t *)t.data)[at] = (int8_t)(random_below(256) - 128);
                *value *= row_scale;
                break;
            case WEIGHT_FP8: {
                uint8_t code = (uint8_t)random_below(256);
                code = (code & 0x7f) == 0x7f ? 0 : code;
                ((uint8_t *)t.data)[at] = code;
                *value = (double)e4m3_to_f32(code) * row_scale;
                break;
            }
            case WEIGHT_INT4: {
                bool high;
                uint8_t *byte = (uint8_t *)t.data + weight_int4_offset(r, i, shape->cols_padded, &high);
                int code = (int)random_below(16);
                *byte = (uint8_t)(*byte | (high ? code << 4 : code));
                uint16_t scale = ((uint16_t *)t.scale)[(r / 16 * groups + i / c.group_size) * 16 + r % 16];
                *value = (code < 8 ? code : code - 16) * (double)f16_to_f32(scale) / 256;
                break;
            }
            case WEIGHT_KIND_COUNT:
                fail();
            }
        }
    }
    return t;
}

static void free_matrix(struct test_matrix *t)
{
    free(t->data);
    free(t->scale);
    free(t->value);
}

static float *random_floats(int64_t count)
{
    float *x = zeroed((uint64_t)count * sizeof *x);
    for (int64_t i = 0; i < count; i++)
        x[i] = uniform() * (random_below(20) ? 1.0f : 8.0f);
    return x;
}

static struct activations make_activations(int64_t tokens, int64_t cols)
{
    struct activations act;
    struct error err;
    assert_int_equal(activations_alloc(&act, tokens, cols, &err), 0);
    assert_int_equal(
        (uintptr_t)act.f32 % 64 | (uintptr_t)act.q % 64 | (uintptr_t)act.q_scale % 64 | (uintptr_t)act.q_sum % 64, 0);
    return act;
}

// Where column `col` of an activation row lies for int4: kernels.h, struct activations.
static int64_t permuted(int64_t col)
{
    // position[c] = 4t + j where 2t + {0, 8, 1, 9}[j] = c
    static const int64_t position[16] = {0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15};
    int64_t p = position[col % 16], t = p / 4, j = p % 4, w = col / 16 % 4;
    return col / 64 * 64 + (t * 4 + w) * 4 + j;
}

// What the kernels multiply: x itself, or its int8 form.
static double activation_value(const struct activations *act, const struct matrix *w, int64_t token, int64_t col)
{
    if (w->shape.kind == WEIGHT_FP8)
        return act->f32[token * act->stride + col / 32 * 32 + col % 2 * 16 + col % 32 / 2];
    if (!is_integer(w->shape.kind))
        return act->f32[token * act->stride + col];
    int64_t at = w->shape.kind == WEIGHT_INT4 ? permuted(col) : col;
    return act->q[token * act->stride + at] * (double)act->q_scale[token * (act->stride / ACT_GROUP) + col / ACT_GROUP];
}

static float *multiply(const struct kernels *kernels, const struct matrix *w, const struct activations *act,
                       int64_t tokens)
{
    float *y = zeroed((uint64_t)tokens * w->shape.rows * sizeof *y);
    kernels->matmul(y, (int64_t)w->shape.rows, w, act, tokens, 0, (int64_t)w->shape.rows);
    return y;
}

// ---- Matmul --------------------------------------------------------------------------------------------------------

// Scalar against double arithmetic. Integer parts are exact, so what is left is the rounding of at most 250 f32 additions and
// a few products: below 1e-5 of the sum of magnitudes.
static const double sum_tolerance = 1e-5;

static void check_against_double(const float *y, const struct test_matrix *t, const struct activations *act,
                                 int64_t tokens, const char *kernels)
{
    int64_t rows = (int64_t)t->m.shape.rows, cols = (int64_t)t->m.shape.cols;
    for (int64_t token = 0; token < tokens; token++)
        for (int64_t r = 0; r < rows; r++) {
            double want = 0, magnitude = 0, got = y[token * rows + r];
            for (int64_t i = 0; i < cols; i++) {
                double term = t->value[r * cols + i] * activation_value(act, &t->m, token, i);
                want += term;
                magnitude += fabs(term);
            }
            if (!(fabs(got - want) <= sum_tolerance * magnitude))
                fail_msg("%s, %s: token %d row %d is %.9g, not %.9g", kernels, t->name, (int)token, (int)r, got, want);
        }
}

static void check_tables(const struct test_matrix *t, int64_t tokens)
{
    int64_t cols = (int64_t)t->m.shape.cols, rows = (int64_t)t->m.shape.rows;
    struct activations act = make_activations(tokens, cols);
    float *x = random_floats(tokens * cols);
    const struct kernels *scalar = table("scalar");
    scalar->prepare(&act, &t->m, x, cols, 0, tokens);
    float *want = multiply(scalar, &t->m, &act, tokens), *vector = NULL;
    check_against_double(want, t, &act, tokens, "scalar");
    for (int k = 0; kernels_all[k]; k++) {
        const struct kernels *kernels = kernels_all[k];
        if (!kernels->supported() || kernels == scalar)
            continue;
        float *y = multiply(kernels, &t->m, &act, tokens);
        if (is_integer(t->m.shape.kind) || t->m.shape.kind == WEIGHT_F32)
            assert_same(y, want, tokens * rows, t->name);
        else
            check_against_double(y, t, &act, tokens, kernels->name);
        if (vector)
            assert_same(y, vector, tokens * rows, t->name); // avx2 and avx512 agree on every kind
        free(vector);
        vector = y;
    }
    free(vector);
    free(want);
    free(x);
    activations_free(&act);
}

static void test_matmul(void **state)
{
    (void)state;
    static const int rows[] = {1, 16, 63, 64, 65, 200, 330}, cols[] = {64, 96, 128, 192, 320, 1000};
    static const int tokens[] = {1, 2, 3, 5, 16, 17};
    for (int k = 0; k < KIND_CASES; k++)
        for (size_t r = 0; r < sizeof rows / sizeof *rows; r++)
            for (size_t c = 0; c < sizeof cols / sizeof *cols; c++) {
                struct test_matrix t = make_matrix(kind_cases[k], (uint64_t)rows[r], (uint64_t)cols[c]);
                // The largest shapes take one long and one short call, the others each length.
                for (size_t i = rows[r] > 65 ? c % 5 : 0; i<6; i += rows[r]> 65 ? 5 - c % 5 : 1)
                    check_tables(&t, tokens[i]);
                free_matrix(&t);
            }
}

// Law 9: the same bits for a token in any company, for any division of the rows, at any address.
static void test_company(void **state)
{
    (void)state;
    enum { TOKENS = 97, ROWS = 264, COLS = 576 }; // more than one block of each kind
    static const int counts[] = {1, 2, 3, 7, 16, 33, 97};
    for (int k = 0; k < KIND_CASES; k++) {
        struct test_matrix t = make_matrix(kind_cases[k], ROWS, COLS);
        struct activations act = make_activations(TOKENS, COLS);
        float *x = random_floats(TOKENS * COLS);
        table("scalar")->prepare(&act, &t.m, x, COLS, 0, TOKENS);
        for (int n = 0; kernels_all[n]; n++) {
            const struct kernels *kernels = kernels_all[n];
            if (!kernels->supported())
                continue;
            float *alone = zeroed(sizeof *alone * TOKENS * ROWS);
            for (int64_t token = 0; token < TOKENS; token++) {
                struct activations one = act;
                one.f32 += token * act.stride;
                one.q += token * act.stride;
                one.q_scale += token * (act.stride / ACT_GROUP);
                one.q_sum += token * (act.stride / 32);
                kernels->matmul(alone + token * ROWS, ROWS, &t.m, &one, 1, 0, ROWS);
            }
            for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
                float *y = multiply(kernels, &t.m, &act, counts[i]);
                assert_same(y, alone, counts[i] * ROWS, t.name);
                free(y);
            }
            for (int64_t tokens = 1; tokens <= 9; tokens += 8) {
                enum { STRIDE = ROWS + 5, SENTINEL = 12345 };
                float *y = zeroed(sizeof *y * 9 * STRIDE);
                for (int i = 0; i < 9 * STRIDE; i++)
                    y[i] = SENTINEL;
                for (int64_t begin = 0; begin < ROWS; begin += 64) { // each part alone, at an unaligned address
                    int64_t end = begin + 64 < ROWS ? begin + 64 : ROWS;
                    kernels->matmul(y + 1, STRIDE, &t.m, &act, tokens, begin, end);
                    for (int64_t i = end; i < ROWS + 4; i++)
                        assert_true(y[1 + i] == SENTINEL);
                }
                for (int64_t token = 0; token < tokens; token++)
                    assert_same(y + 1 + token * STRIDE, alone + token * ROWS, ROWS, t.name);
                assert_true(y[0] == SENTINEL && y[STRIDE] == SENTINEL && y[STRIDE - 1] == SENTINEL);
                free(y);
            }
            free(alone);
        }
        free(x);
        activations_free(&act);
        free_matrix(&t);
    }
}

static void test_nothing_to_do(void **state)
{
    (void)state;
    for (int k = 0; k < KIND_CASES; k++)
        for (int n = 0; kernels_all[n]; n++) {
            if (!kernels_all[n]->supported())
                continue;
            struct test_matrix full = make_matrix(kind_cases[k], 64, 64), empty = make_matrix(kind_cases[k], 0, 64);
            struct test_matrix narrow = make_matrix(kind_cases[k], 70, 0);
            struct activations act = make_activations(2, 64);
            float x[128] = {0}, y[140];
            for (int i = 0; i < 140; i++)
                y[i] = 7;
            kernels_all[n]->prepare(&act, &full.m, x, 64, 1, 1);
            kernels_all[n]->matmul(y, 64, &full.m, &act, 0, 0, 64);
            kernels_all[n]->matmul(y, 64, &full.m, &act, 2, 64, 64);
            kernels_all[n]->matmul(y, 64, &empty.m, &act, 1, 0, 0);
            kernels_all[n]->matmul(y, 64, &empty.m, &act, 2, 0, 0);
            for (int i = 0; i < 140; i++)
                assert_true(y[i] == 7);
            // No columns: sums of nothing.
            kernels_all[n]->prepare(&act, &narrow.m, x, 0, 0, 2);
            kernels_all[n]->matmul(y, 70, &narrow.m, &act, 2, 0, 70);
            for (int i = 0; i < 140; i++)
                assert_true(y[i] == 0);
            activations_free(&act);
            free_matrix(&full);
            free_matrix(&empty);
            free_matrix(&narrow);
        }
}

// A token with NaN or Inf gets NaN (from f32 sums: not a finite number) in every output, its neighbours stay what they were.
static void test_nan(void **state)
{
    (void)state;
    enum { TOKENS = 8, ROWS = 100, COLS = 320 };
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    for (int k = 0; k < KIND_CASES; k++)
        for (int n = 0; kernels_all[n]; n++)
            for (size_t b = 0; b < 3; b++) {
                if (!kernels_all[n]->supported())
                    continue;
                struct test_matrix t = make_matrix(kind_cases[k], ROWS, COLS);
                struct activations act = make_activations(TOKENS, COLS);
                float *x = random_floats(TOKENS * COLS);
                kernels_all[n]->prepare(&act, &t.m, x, COLS, 0, TOKENS);
                float *before = multiply(kernels_all[n], &t.m, &act, TOKENS);
                x[3 * COLS + 5 + 100 * (int64_t)b] = bad[b];
                kernels_all[n]->prepare(&act, &t.m, x, COLS, 0, TOKENS);
                float *after = multiply(kernels_all[n], &t.m, &act, TOKENS);
                assert_same(after, before, 3 * ROWS, t.name);
                assert_same(after + 4 * ROWS, before + 4 * ROWS, 4 * ROWS, t.name);
                for (int64_t i = 3 * ROWS; i < 4 * ROWS; i++)
                    assert_true(is_integer(t.m.shape.kind) || b == 0 ? isnan(after[i]) : !isfinite(after[i]));
                kernels_all[n]->matmul(after, ROWS, &t.m, &act, 1, 0, ROWS);
                assert_same(after, before, ROWS, t.name);
                free(before);
                free(after);
                free(x);
                activations_free(&act);
                free_matrix(&t);
            }
}

// An fp8 NaN code in one row shows in that row, for every token, and in no other.
static void test_fp8_nan_weight(void **state)
{
    (void)state;
    enum { TOKENS = 3, ROWS = 70, COLS = 192 };
    struct test_matrix t = make_matrix((struct kind_case){WEIGHT_FP8, 0}, ROWS, COLS);
    ((uint8_t *)t.data)[66 * COLS + 190] = 0xff;
    struct activations act = make_activations(TOKENS, COLS);
    float *x = random_floats(TOKENS * COLS);
    for (int n = 0; kernels_all[n]; n++)
        for (int64_t tokens = 1; kernels_all[n]->supported() && tokens <= TOKENS; tokens += 2) {
            kernels_all[n]->prepare(&act, &t.m, x, COLS, 0, TOKENS);
            float *y = multiply(kernels_all[n], &t.m, &act, tokens);
            for (int64_t i = 0; i < tokens * ROWS; i++)
                assert_true(isnan(y[i]) == (i % ROWS == 66));
            free(y);
        }
    free(x);
    activations_free(&act);
    free_matrix(&t);
}

// ---- Activations ---------------------------------------------------------------------------------------------------

static void test_prepare(void **state)
{
    (void)state;
    enum { TOKENS = 3, X_STRIDE = 1010 };
    static const int cols[] = {1, 31, 64, 128, 200, 1000};
    for (int k = 0; k < KIND_CASES; k++)
        for (size_t c = 0; c < 6; c++) {
            int64_t count = cols[c];
            struct test_matrix t = make_matrix(kind_cases[k], 1, (uint64_t)count);
            bool integer = is_integer(kind_cases[k].kind);
            float *x = random_floats(TOKENS * X_STRIDE);
            for (int i = 0; i < 130; i++) // a group of zeros, a value that rounds to the limit, ties
                x[X_STRIDE + i] = i < 128 ? 0.0f : 1.0f;
            for (int i = 0; i < 128; i++)
                x[2 * X_STRIDE + i] = i == 7 ? -127.0f : (float)i / 2 - 30;
            struct activations first = {0};
            for (int n = 0; kernels_all[n]; n++) {
                if (!kernels_all[n]->supported())
                    continue;
                struct activations act = make_activations(TOKENS, count);
                memset(act.f32, 0x55, (size_t)(TOKENS * act.stride) * sizeof *act.f32);
                memset(act.q, 0x55, (size_t)(TOKENS * act.stride));
                kernels_all[n]->prepare(&act, &t.m, x, X_STRIDE, 0, 1);
                kernels_all[n]->prepare(&act, &t.m, x, X_STRIDE, 1, TOKENS);
                for (int64_t token = 0; token < TOKENS; token++)
                    for (int64_t i = 0; i < act.stride; i++) {
                        double value = i < count ? x[token * X_STRIDE + i] : 0,
                               got = activation_value(&act, &t.m, token, i);
                        double step = integer ? act.q_scale[token * (act.stride / ACT_GROUP) + i / ACT_GROUP] : 0;
                        if (!(fabs(got - value) <= step * 0.50001))
                            fail_msg("prepare for %s: token %d column %d is %g, not %g", t.name, (int)token, (int)i,
                                     got, value);
                    }
                for (int64_t i = 0; integer && i < TOKENS * act.stride / 32; i++) {
                    int32_t sum = 0;
                    for (int64_t j = 0; j < 32; j++) {
                        int64_t col = i * 32 + j;
                        sum += act.q[kind_cases[k].kind == WEIGHT_INT4 ? permuted(col) : col];
                    }
                    assert_int_equal(act.q_sum[i], sum);
                }
                if (!first.q) {
                    first = act;
                    continue;
                }
                uint64_t elems = (uint64_t)(TOKENS * act.stride);
                assert_memory_equal(act.f32, first.f32, elems * sizeof *act.f32);
                assert_memory_equal(act.q, first.q, elems);
                assert_memory_equal(act.q_scale, first.q_scale, elems / ACT_GROUP * sizeof *act.q_scale);
                assert_memory_equal(act.q_sum, first.q_sum, elems / 32 * sizeof *act.q_sum);
                activations_free(&act);
            }
            activations_free(&first);
            free(x);
            free_matrix(&t);
        }
}

static void test_prepare_values(void **state)
{
    (void)state;
    struct test_matrix t = make_matrix((struct kind_case){WEIGHT_INT8, 0}, 1, 128);
    struct activations act = make_activations(1, 128);
    const struct kernels *scalar = table("scalar");
    float x[128] = {254, -254, 3, 1, -3, 5}; // scale 2: ties go to even
    scalar->prepare(&act, &t.m, x, 128, 0, 1);
    static const int8_t want[] = {127, -127, 2, 0, -2, 2};
    assert_memory_equal(act.q, want, sizeof want);
    assert_true(act.q_scale[0] == 2.0f);
    memset(x, 0, sizeof x);
    x[5] = 1e-40f; // 127 / x would be Inf: counts as zero
    scalar->prepare(&act, &t.m, x, 128, 0, 1);
    assert_true(act.q_scale[0] == 0.0f && act.q[5] == 0);
    x[0] = 3e38f;
    scalar->prepare(&act, &t.m, x, 128, 0, 1);
    assert_true(isfinite(act.q_scale[0]) && act.q[0] == 127 && act.q[5] == 0);
    x[9] = -NAN;
    scalar->prepare(&act, &t.m, x, 128, 0, 1);
    assert_true(isnan(act.q_scale[0]) && act.q[0] == 0);
    activations_free(&act);
    free_matrix(&t);
}

static void test_activations_alloc(void **state)
{
    (void)state;
    struct activations act;
    struct error err;
    assert_int_equal(activations_alloc(&act, 3, 129, &err), 0);
    assert_int_equal(act.stride, 256);
    assert_int_equal(act.max_tokens, 3);
    activations_free(&act);
    activations_free(&act); // twice does nothing
    assert_int_equal(activations_alloc(&act, INT64_MAX / 2, 4096, &err), ERR_MEMORY);
    assert_null(act.f32);
    assert_int_equal(activations_alloc(&act, (int64_t)1 << 42, (int64_t)1 << 20, &err), ERR_MEMORY);
    assert_non_null(strstr(err.msg, "1048576 columns"));
}

// ---- Single rows ---------------------------------------------------------------------------------------------------

static void test_dequantize_row(void **state)
{
    (void)state;
    for (int k = 0; k < KIND_CASES; k++) {
        struct test_matrix t = make_matrix(kind_cases[k], 70, 200);
        for (int n = 0; kernels_all[n]; n++)
            for (int64_t row = 0; kernels_all[n]->supported() && row < 70; row++) {
                float *out = zeroed(200 * sizeof *out);
                kernels_all[n]->dequantize_row(out, &t.m, row);
                for (int i = 0; i < 200; i++) // one product rounds
                    if (!(fabs(out[i] - t.value[row * 200 + i]) <= 1e-7 * fabs(t.value[row * 200 + i])))
                        fail_msg("%s of %s: row %d column %d", kernels_all[n]->name, t.name, (int)row, i);
                free(out);
            }
        free_matrix(&t);
    }
}

// What pack.c stores is what the kernels read.
static void test_packed_rows(void **state)
{
    (void)state;
    enum { ROWS = 3, COLS = 256 };
    for (int k = 0; k < KIND_CASES; k++) {
        struct kind_case c = kind_cases[k];
        struct weight_shape shape;
        assert_true(weight_shape_make(&shape, c.kind, c.group_size, ROWS, COLS));
        void *data = zeroed(shape.data_bytes), *scale = zeroed(shape.scale_bytes);
        void *memory = zeroed(packed_row_bytes(c.kind, c.group_size, COLS));
        float *x = random_floats(ROWS * COLS), want[COLS], got[COLS];
        struct matrix m = {shape, data, scale};
        for (uint64_t r = 0; r < ROWS; r++) {
            struct packed_row row;
            struct error err;
            packed_row_place(&row, memory, c.kind, c.group_size, COLS);
            assert_int_equal(pack_quantize_row(&row, c.kind, c.group_size, x + r * COLS, COLS, NULL, &err), 0);
            pack_store_row(data, scale, &shape, 0, r, &row, 0);
            pack_dequantize_row(want, &row, c.kind, c.group_size, COLS);
            table("auto")->dequantize_row(got, &m, (int64_t)r);
            assert_same(got, want, COLS, weight_kind_name(c.kind));
        }
        free(x);
        free(memory);
        free(data);
        free(scale);
    }
}

// ---- Selection -----------------------------------------------------------------------------------------------------

static void test_select(void **state)
{
    (void)state;
    struct error err;
    const struct kernels *kernels = NULL;
    assert_int_equal(kernels_select(&kernels, "scalar", &err), 0);
    assert_string_equal(kernels->name, "scalar");
    assert_int_equal(kernels_select(&kernels, "auto", &err), 0);
    bool first = true;
    for (int n = 0; kernels_all[n]; n++) {
        const struct kernels *named = NULL;
        bool supported = kernels_all[n]->supported();
        assert_int_equal(kernels_select(&named, kernels_all[n]->name, &err), supported ? 0 : ERR_USAGE);
        assert_ptr_equal(named, supported ? kernels_all[n] : NULL);
        if (supported && first)
            assert_ptr_equal(kernels, kernels_all[n]);
        first &= !supported;
        printf("%s: %s\n", kernels_all[n]->name, supported ? "supported" : "not supported here, not tested");
    }
    assert_int_equal(kernels_select(&kernels, "mmx", &err), ERR_USAGE);
    assert_non_null(strstr(err.msg, "\"mmx\""));
    assert_non_null(strstr(err.msg, "auto"));
    assert_non_null(strstr(err.msg, "scalar"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_select),         cmocka_unit_test(test_activations_alloc),
        cmocka_unit_test(test_prepare),        cmocka_unit_test(test_prepare_values),
        cmocka_unit_test(test_matmul),         cmocka_unit_test(test_company),
        cmocka_unit_test(test_nothing_to_do),  cmocka_unit_test(test_nan),
        cmocka_unit_test(test_fp8_nan_weight), cmocka_unit_test(test_dequantize_row),
        cmocka_unit_test(test_packed_rows),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
