// The matmul kernels: every supported table against the scalar one, and scalar against double arithmetic on the numbers that the
// stored bytes mean. Heap blocks have their exact size, so that the address sanitizer sees a read past the padding.
#include "kernels/kernels_internal.h"
#include "kernels/pack.h"
#include "tests/kernels_help.h"

// ---- Matmul --------------------------------------------------------------------------------------------------------

// Scalar against double arithmetic. Integer parts are exact, so what is left is the rounding of at most 250 f32 additions and
// a few products: below 1e-5 of the sum of magnitudes.
static const double sum_tolerance = 1e-5;

static void check_against_double(const float *y, const struct test_matrix *t, const struct activations *act,
                                 int64_t tokens, const struct kernels *kernels)
{
    int64_t rows = (int64_t)t->m.shape.rows, cols = (int64_t)t->m.shape.cols;
    double *x = malloc(((size_t)cols + 1) * sizeof *x);
    assert_non_null(x);
    for (int64_t token = 0; token < tokens; token++) {
        for (int64_t i = 0; i < cols; i++)
            x[i] = activation_value(kernels, act, &t->m, token, i);
        for (int64_t r = 0; r < rows; r++) {
            double want = 0, magnitude = 0, got = y[token * rows + r];
            for (int64_t i = 0; i < cols; i++) {
                double term = t->value[r * cols + i] * x[i];
                want += term;
                magnitude += fabs(term);
            }
            if (!(fabs(got - want) <= sum_tolerance * magnitude))
                fail_msg("%s, %s: token %d row %d is %.9g, not %.9g", kernels->name, t->name, (int)token, (int)r, got,
                         want);
        }
    }
    free(x);
}

static void check_tables(const struct test_matrix *t, int64_t tokens)
{
    int64_t cols = (int64_t)t->m.shape.cols, rows = (int64_t)t->m.shape.rows;
    struct activations act = make_activations(tokens, cols);
    float *x = random_floats(tokens * cols);
    const struct kernels *scalar = table("scalar");
    scalar->prepare(&act, &t->m, x, cols, 0, tokens);
    float *want = multiply(scalar, &t->m, &act, tokens), *vector = NULL;
    check_against_double(want, t, &act, tokens, scalar);
    for (int k = 0; kernels_all[k]; k++) {
        const struct kernels *kernels = kernels_all[k];
        if (!kernels->supported() || kernels == scalar)
            continue;
        bool rounds = rounds_floats(kernels, t->m.shape.kind);
        kernels->prepare(&act, &t->m, x, cols, 0, tokens);
        float *y = multiply(kernels, &t->m, &act, tokens);
        if (is_integer(t->m.shape.kind) || t->m.shape.kind == WEIGHT_F32)
            assert_same(y, want, tokens * rows, t->name);
        else
            check_against_double(y, t, &act, tokens, kernels);
        if (rounds) {
            free(y);
            continue;
        }
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
#ifdef KERNELS_SANITIZED
    static const int tokens[] = {1, 2, 3, 1, 4, 6};
#else
    static const int tokens[] = {1, 2, 3, 5, 16, 17};
#endif
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
    enum { TOKENS = 193, ROWS = 520, COLS = 576 }; // more than one block of each kind
#ifdef KERNELS_SANITIZED
    static const int counts[] = {1, 2, 3, 7, 16, 33, 70, TOKENS};
    enum { COUNTS = sizeof counts / sizeof *counts };
#else
    enum { COUNTS = 71 };
    int counts[COUNTS];
    for (int i = 0; i < COUNTS; i++)
        counts[i] = i < 70 ? i + 1 : TOKENS;
#endif
    for (int k = 0; k < KIND_CASES; k++) {
        struct test_matrix t = make_matrix(kind_cases[k], ROWS, COLS);
        struct activations act = make_activations(TOKENS, COLS);
        float *x = random_floats(TOKENS * COLS);
        for (int n = 0; kernels_all[n]; n++) {
            const struct kernels *kernels = kernels_all[n];
            if (!kernels->supported())
                continue;
            kernels->prepare(&act, &t.m, x, COLS, 0, TOKENS);
            float *alone = zeroed(sizeof *alone * TOKENS * ROWS);
            for (int64_t token = 0; token < TOKENS; token++) {
                struct activations one = activations_rows(&act, token);
                kernels->matmul(alone + token * ROWS, ROWS, &t.m, &one, 1, 0, ROWS);
            }
            // The reference goes token by token: a few counts will do.
            for (int i = 0; i < COUNTS; i += kernels == &kernels_scalar ? 23 : 1) {
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

// A NaN among the stored numbers of one row shows in that row, for every token, and in no other.
static void test_nan_weight(void **state)
{
    (void)state;
    enum { TOKENS = 3, ROWS = 70, COLS = 256, BAD_ROW = 66, BAD_COL = 190 };
    static const struct {
        struct kind_case c;
        enum { CODE, SCALE, ZERO, GLOBAL } where;
        uint32_t bits;
    } cases[] = {
        {{WEIGHT_FP8, 0}, CODE, 0xff},       {{WEIGHT_FP8, 0}, CODE, 0x7f},
        {{WEIGHT_FP8G, 128}, CODE, 0xff},    {{WEIGHT_FP8G, 128}, SCALE, 0x7fc00000},
        {{WEIGHT_INT4, 64}, SCALE, 0x7e00},  {{WEIGHT_NL4, 32}, SCALE, 0x7e00},
        {{WEIGHT_INT4Z, 32}, SCALE, 0x7e00}, {{WEIGHT_INT4Z, 128}, ZERO, 0xfe00},
        {{WEIGHT_MXFP4, 32}, SCALE, 255},    {{WEIGHT_NVFP4, 16}, SCALE, 0x7f},
        {{WEIGHT_NVFP4, 16}, SCALE, 0xff},   {{WEIGHT_NVFP4, 16}, GLOBAL, 0x7fc00000},
    };
    for (size_t k = 0; k < sizeof cases / sizeof *cases; k++) {
        struct kind_case c = cases[k].c;
        struct test_matrix t = make_matrix(c, ROWS, COLS);
        uint8_t *scale = t.scale;
        if (cases[k].where == CODE)
            ((uint8_t *)t.data)[BAD_ROW * COLS + BAD_COL] = (uint8_t)cases[k].bits;
        else if (cases[k].where == GLOBAL)
            memcpy(scale + global_offset(&t.m.shape, BAD_ROW), &cases[k].bits, 4);
        else
            memcpy(scale + scale_offset(&t.m.shape, BAD_ROW, BAD_COL / c.group_size, cases[k].where == ZERO),
                   &cases[k].bits,
                   c.kind == WEIGHT_FP8G                              ? 4
                   : c.kind == WEIGHT_MXFP4 || c.kind == WEIGHT_NVFP4 ? 1
                                                                      : 2);
        struct activations act = make_activations(TOKENS, COLS);
        float *x = random_floats(TOKENS * COLS), out[COLS];
        for (int n = 0; kernels_all[n]; n++)
            for (int64_t tokens = 1; kernels_all[n]->supported() && tokens <= TOKENS; tokens += 2) {
                kernels_all[n]->prepare(&act, &t.m, x, COLS, 0, TOKENS);
                float *y = multiply(kernels_all[n], &t.m, &act, tokens);
                for (int64_t i = 0; i < tokens * ROWS; i++)
                    if (isnan(y[i]) != (i % ROWS == BAD_ROW))
                        fail_msg("%s, %s, case %zu: row %d is %g", kernels_all[n]->name, t.name, k, (int)(i % ROWS),
                                 (double)y[i]);
                free(y);
                kernels_all[n]->dequantize_row(out, &t.m, BAD_ROW);
                assert_true(isnan(out[BAD_COL]));
                assert_true(isnan(out[0]) == (cases[k].where == GLOBAL));
            }
        free(x);
        activations_free(&act);
        free_matrix(&t);
    }
}

// fp8g: the vector tables that do not round have the same bits; those that do are right where the sums are far from the largest numbers, but for
// what is lost below the normal ones.
static void check_extreme_floats(const struct test_matrix *t, const float *x, int64_t tokens)
{
    int64_t rows = (int64_t)t->m.shape.rows, cols = (int64_t)t->m.shape.cols;
    struct activations act = make_activations(tokens, cols);
    float *first = NULL;
    for (int n = 0; kernels_all[n]; n++) {
        const struct kernels *kernels = kernels_all[n];
        if (!kernels->supported() || kernels == &kernels_scalar)
            continue;
        kernels->prepare(&act, &t->m, x, cols, 0, tokens);
        float *y = multiply(kernels, &t->m, &act, tokens);
        if (!rounds_floats(kernels, t->m.shape.kind)) {
            if (first)
                assert_same(y, first, tokens * rows, t->name);
            free(first);
            first = y;
            continue;
        }
        int checked = 0;
        for (int64_t i = 0; i < tokens * rows; i++) {
            double want = 0, magnitude = 0;
            for (int64_t col = 0; col < cols; col++) {
                double term = t->value[i % rows * cols + col] * activation_value(kernels, &act, &t->m, i / rows, col);
                want += term;
                magnitude += fabs(term);
            }
            if (!(magnitude < 0x1p126))
                continue;
            checked++;
            if (!(fabs(y[i] - want) <= sum_tolerance * magnitude + 0x1p-126))
                fail_msg("%s, %s: token %d row %d is %.9g, not %.9g", kernels->name, t->name, (int)(i / rows),
                         (int)(i % rows), (double)y[i], want);
        }
        assert_true(checked >= tokens * rows / 4);
        free(y);
    }
    free(first);
    activations_free(&act);
}

// Scales at the ends of their formats: all tables give the same bits, and where the sums fit into f32 they are right.
static void test_extreme_scales(void **state)
{
    (void)state;
    enum { TOKENS = 7, ROWS = 65, COLS = 192 };
    static const struct {
        struct kind_case c;
        uint32_t scale[4];
        float global;
        bool fits;
    } cases[] = {
        {{WEIGHT_INT4, 32}, {0x7bff, 0x0001, 0x8001, 0xfbff}, 0, true},
        {{WEIGHT_NL4, 128}, {0x7bff, 0x0001, 0x8001, 0xfbff}, 0, true},
        {{WEIGHT_INT4Z, 64}, {0x7bff, 0x0001, 0x8001, 0xfbff}, 0, true},
        {{WEIGHT_MXFP4, 32}, {0, 1, 2, 127}, 0, true},
        {{WEIGHT_MXFP4, 32}, {0, 60, 200, 238}, 0, true},
        {{WEIGHT_MXFP4, 32}, {0, 0, 0, 0}, 0, false},
        {{WEIGHT_MXFP4, 32}, {254, 253, 250, 0}, 0, false},
        {{WEIGHT_NVFP4, 16}, {0x01, 0x07, 0x08, 0x7e}, 1e-30f, true},
        {{WEIGHT_NVFP4, 16}, {0x01, 0x81, 0xfe, 0x7e}, 1e30f, true},
        {{WEIGHT_NVFP4, 16}, {0, 0x80, 0xfe, 0x7e}, 3e38f, false},
        {{WEIGHT_NVFP4, 16}, {0x7e, 0x7e, 0x7e, 0x7e}, 1e-45f, false},
        {{WEIGHT_FP8G, 128}, {0x00800000, 0x7e000000, 0x00000001, 0}, 0, false},
    };
    for (size_t k = 0; k < sizeof cases / sizeof *cases; k++) {
        struct kind_case c = cases[k].c;
        struct test_matrix t = make_matrix(c, ROWS, COLS);
        struct weight_shape *shape = &t.m.shape;
        uint64_t bytes = c.kind == WEIGHT_FP8G ? 4 : c.kind == WEIGHT_MXFP4 || c.kind == WEIGHT_NVFP4 ? 1 : 2;
        for (uint64_t r = 0; r < ROWS; r++) {
            for (uint64_t g = 0; g < shape->cols_padded / c.group_size; g++)
                memcpy((uint8_t *)t.scale + scale_offset(shape, r, g, 0), &cases[k].scale[(r + g) % 4], bytes);
            if (c.kind == WEIGHT_NVFP4)
                memcpy((uint8_t *)t.scale + global_offset(shape, r), &cases[k].global, 4);
            float row[COLS];
            table("scalar")->dequantize_row(row, &t.m, (int64_t)r);
            for (int i = 0; i < COLS; i++)
                t.value[r * COLS + (uint64_t)i] = row[i];
        }
        struct activations act = make_activations(TOKENS, COLS);
        float *x = random_floats(TOKENS * COLS);
        table("scalar")->prepare(&act, &t.m, x, COLS, 0, TOKENS);
        for (int64_t tokens = 1; tokens <= TOKENS; tokens += 6) {
            float *want = multiply(table("scalar"), &t.m, &act, tokens);
            if (cases[k].fits)
                check_against_double(want, &t, &act, tokens, table("scalar"));
            for (int n = 0; is_integer(c.kind) && kernels_all[n]; n++) {
                if (!kernels_all[n]->supported())
                    continue;
                float *y = multiply(kernels_all[n], &t.m, &act, tokens);
                assert_same(y, want, tokens * ROWS, t.name);
                free(y);
            }
            if (c.kind == WEIGHT_FP8G)
                check_extreme_floats(&t, x, tokens);
            free(want);
        }
        free(x);
        activations_free(&act);
        free_matrix(&t);
    }
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
                bool rounds = rounds_floats(kernels_all[n], kind_cases[k].kind);
                for (int64_t token = 0; token < TOKENS; token++)
                    for (int64_t i = 0; i < (count + ACT_GROUP - 1) / ACT_GROUP * ACT_GROUP; i++) {
                        double value = i < count ? x[token * X_STRIDE + i] : 0,
                               got = activation_value(kernels_all[n], &act, &t.m, token, i);
                        double step = integer ? act.q_scale[token * (act.stride / ACT_GROUP) + i / ACT_GROUP] : 0;
                        if (!(fabs(got - value) <= (rounds ? 0x1p-8 * fabs(value) : step * 0.50001)))
                            fail_msg("prepare for %s: token %d column %d is %g, not %g", t.name, (int)token, (int)i,
                                     got, value);
                    }
                for (int64_t i = 0; integer && i < TOKENS * act.stride / ACT_SUM; i++) {
                    int32_t sum = 0;
                    if (i % (act.stride / ACT_SUM) * ACT_SUM >= (count + ACT_GROUP - 1) / ACT_GROUP * ACT_GROUP)
                        continue; // not prepared
                    for (int64_t j = 0; j < ACT_SUM; j++) {
                        int64_t col = i * ACT_SUM + j;
                        sum += act.q[weight_is_tiled(kind_cases[k].kind) ? permuted(col) : col];
                    }
                    assert_int_equal(act.q_sum[i], sum);
                }
                if (rounds) {
                    activations_free(&act);
                    continue;
                }
                if (!first.q) {
                    first = act;
                    continue;
                }
                uint64_t elems = (uint64_t)(TOKENS * act.stride);
                assert_memory_equal(act.f32, first.f32, elems * sizeof *act.f32);
                assert_memory_equal(act.q, first.q, elems);
                assert_memory_equal(act.q_scale, first.q_scale, elems / ACT_GROUP * sizeof *act.q_scale);
                assert_memory_equal(act.q_sum, first.q_sum, elems / ACT_SUM * sizeof *act.q_sum);
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
    assert_int_equal(act.stride, 3 * 128);
    assert_int_equal(act.max_tokens, 3);
    activations_free(&act);
    activations_free(&act); // twice does nothing
    assert_int_equal(activations_alloc(&act, INT64_MAX / 2, 4096, &err), ERR_MEMORY);
    assert_null(act.f32);
    assert_int_equal(activations_alloc(&act, (int64_t)1 << 42, (int64_t)1 << 20, &err), ERR_MEMORY);
    assert_non_null(strstr(err.msg, "1048576 columns"));
}

// Views and copies of prepared rows give what the row itself gives, whatever the strides.
static void test_activation_rows(void **state)
{
    (void)state;
    enum { TOKENS = 4, ROWS = 64, COLS = 320 };
    for (int k = 0; k < KIND_CASES; k++) {
        struct test_matrix t = make_matrix(kind_cases[k], ROWS, COLS);
        struct activations act = make_activations(TOKENS, COLS), other = make_activations(2, COLS + 300);
        float *x = random_floats(TOKENS * COLS), y[TOKENS * ROWS];
        const struct kernels *kernels = table("auto");
        kernels->prepare(&act, &t.m, x, COLS, 0, TOKENS);
        float *want = multiply(kernels, &t.m, &act, TOKENS);
        struct activations view = activations_rows(&act, 1);
        assert_int_equal(view.max_tokens, TOKENS - 1);
        kernels->matmul(y, ROWS, &t.m, &view, 3, 0, ROWS);
        assert_same(y, want + ROWS, 3 * ROWS, t.name);

        activations_copy_row(&other, 1, &act, 3, kind_cases[k].kind);
        activations_copy_row(&other, 0, &act, 2, kind_cases[k].kind);
        kernels->matmul(y, ROWS, &t.m, &other, 2, 0, ROWS);
        assert_same(y, want + 2 * ROWS, 2 * ROWS, t.name);
        activations_copy_row(&act, 0, &other, 1, kind_cases[k].kind);
        activations_copy_row(&act, 1, &act, 1, kind_cases[k].kind);
        kernels->matmul(y, ROWS, &t.m, &act, 2, 0, ROWS);
        assert_same(y, want + 3 * ROWS, ROWS, t.name);
        assert_same(y + ROWS, want + ROWS, ROWS, t.name);
        free(want);
        free(x);
        activations_free(&act);
        activations_free(&other);
        free_matrix(&t);
    }
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
                for (int i = 0; i < 200; i++) // one product rounds; int4z: a difference too
                    if (!(fabs(out[i] - t.value[row * 200 + i]) <= 1.5e-7 * fabs(t.value[row * 200 + i])))
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

// Intel's processors alone are passed by for AVX512_BF16 (kernels/kernels.c).
static bool is_intel(void)
{
    FILE *f = fopen("/proc/cpuinfo", "r");
    char line[512];
    bool found = false;
    while (f && !found && fgets(line, sizeof line, f))
        found = strstr(line, "GenuineIntel") != NULL;
    if (f)
        fclose(f);
    return found;
}

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
        bool taken = supported && !(is_intel() && strcmp(kernels_all[n]->name, "avx512bf16") == 0);
        if (taken && first)
            assert_ptr_equal(kernels, kernels_all[n]);
        first &= !taken;
        printf("%s: %s\n", kernels_all[n]->name, supported ? "supported" : "not supported here, not tested");
    }
    assert_int_equal(kernels_select(&kernels, "mmx", &err), ERR_USAGE);
    assert_non_null(strstr(err.msg, "\"mmx\""));
    assert_non_null(strstr(err.msg, "auto"));
    assert_non_null(strstr(err.msg, "scalar"));
}

// Which tables go together. That their bits are the same, test_matmul and the others above see.
static void test_sums(void **state)
{
    (void)state;
    static const char *const sums[][2] = {{"scalar", "scalar"},   {"avx2", "avx2"}, {"avx512", "avx2"},
                                          {"avx512vbmi", "avx2"}, {"amx", "amx"},   {"avx512bf16", "avx512bf16"}};
    uint32_t set = kernels_auto_set();
    int tables = 0;
    while (kernels_all[tables])
        tables++;
    for (int n = 0; n < tables; n++) {
        const struct kernels *k = kernels_all[n], *fastest = kernels_of_sums(k->sums);
        size_t known = 0;
        while (known < sizeof sums / sizeof *sums && strcmp(sums[known][0], k->name) != 0)
            known++;
        assert_true(known < sizeof sums / sizeof *sums);
        assert_string_equal(k->sums, sums[known][1]);
        assert_true(fastest || !k->supported());
        assert_true(!fastest || (fastest->supported() && strcmp(fastest->sums, k->sums) == 0));
        uint32_t bit = 1u << (tables - 1 - n);
        assert_int_equal((set & bit) != 0, k->supported() && !kernels_auto_passes_by(k));
        assert_ptr_equal(kernels_fastest(bit), k);
        assert_ptr_equal(kernels_fastest(bit | 1), k);
    }
    const struct kernels *chosen;
    assert_int_equal(kernels_select(&chosen, "auto", &(struct error){0}), 0);
    assert_ptr_equal(kernels_fastest(set), chosen);
    assert_null(kernels_of_sums("avx512")); // the word is avx2
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_select),          cmocka_unit_test(test_activations_alloc),
        cmocka_unit_test(test_prepare),         cmocka_unit_test(test_prepare_values),
        cmocka_unit_test(test_matmul),          cmocka_unit_test(test_company),
        cmocka_unit_test(test_nothing_to_do),   cmocka_unit_test(test_nan),
        cmocka_unit_test(test_nan_weight),      cmocka_unit_test(test_extreme_scales),
        cmocka_unit_test(test_activation_rows), cmocka_unit_test(test_dequantize_row),
        cmocka_unit_test(test_packed_rows),     cmocka_unit_test(test_sums),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
