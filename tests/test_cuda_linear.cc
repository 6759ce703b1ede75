// launch_linear_f16 and launch_linear_int8 over kinds, groups and shapes. int8: bit for bit the scalar table's matmul. f16: against sums in
// f64 of the same rounded inputs, within what the depth of the f32 sums allows. Both: a row alone has the bits that it has in company (law 9),
// NaN stays in its row, nothing is written beside the result, and hot loops touch memory as they should.
#include "tests/device/cuda_test.h"

// ---- matrices and inputs -----------------------------------------------------------------------------------------------

// Rows of different size.
static void fill(float *x, uint64_t row, uint64_t cols)
{
    double size = exp2((double)(row % 7) - 5);
    for (uint64_t c = 0; c < cols; c++)
        x[c] = (float)(size * (uniform() + uniform() - 1) * (c / 32 % 3 + 1));
}

static int64_t round_up_to_128(int64_t cols) { return round_up_to(cols, 128); }

// Where a column stands: see INPUT_F16_TILE.
static int64_t f16_place(enum weight_kind kind, int64_t col)
{
    if (!weight_is_tiled(kind))
        return col;
    int64_t word = col % 64 / 16, in_word = col % 16, t = in_word % 8 / 2;
    return col / 64 * 64 + t * 16 + word * 4 + in_word / 8 * 2 + in_word % 2;
}

// x [tokens][cols] as launch_linear_f16 wants it. Every third token has a scale of its own. stride: of the input, at least the columns.
static struct device_input make_f16_input(const struct matrix *w, const float *x, int64_t tokens, int64_t stride)
{
    int64_t cols = (int64_t)w->shape.cols;
    struct device_input in = {device_zeros((tokens * stride * 2)), (float *)device_zeros(tokens * 4), stride};
    uint16_t *values = (uint16_t *)in.values;
    for (int64_t i = 0; i < tokens; i++) {
        in.scale[i] = i % 3 == 1 ? 4.0f : 1.0f;
        for (int64_t c = 0; c < cols; c++) {
            float value = x[i * cols + c];
            values[i * stride + f16_place(w->shape.kind, c)] =
                w->shape.kind == WEIGHT_BF16 ? f32_to_bf16(value) : f32_to_f16(value / in.scale[i]);
        }
        for (int64_t c = round_up_to_128(cols); c < stride; c++) // belongs to nobody
            values[i * stride + c] = 0x7e00;
    }
    return in;
}

static double f16_value(const struct matrix *w, struct device_input in, int64_t token, int64_t col)
{
    uint16_t bits = ((const uint16_t *)in.values)[token * in.stride + f16_place(w->shape.kind, col)];
    return w->shape.kind == WEIGHT_BF16 ? (double)bf16_to_f32(bits)
                                        : (double)f16_to_f32(bits) * (double)in.scale[token];
}

// The table's own preparation, copied.
static struct device_input make_int8_input(struct activations *act, const struct matrix *w, const float *x,
                                           int64_t tokens)
{
    struct error err;
    int64_t cols = (int64_t)w->shape.cols;
    memset(act, 0, sizeof *act);
    assert_int_equal(activations_alloc(act, tokens, cols + 1, &err), 0);
    scalar()->prepare(act, w, x, cols, 0, tokens);
    struct device_input in = {device_zeros((tokens * act->stride)),
                              (float *)device_zeros((tokens * act->stride / ACT_GROUP) * 4), act->stride};
    int64_t used = round_up_to_128(cols);
    memset(in.values, 0x55, (size_t)(tokens * act->stride));
    for (int64_t i = 0; i < tokens; i++) {
        memcpy((int8_t *)in.values + i * in.stride, act->q + i * act->stride, (size_t)used);
        for (int64_t c = 0; c < in.stride / ACT_GROUP; c++)
            in.scale[i * (in.stride / ACT_GROUP) + c] =
                c < used / ACT_GROUP ? act->q_scale[i * (act->stride / ACT_GROUP) + c] : NAN;
    }
    return in;
}

// The input from token `first` on.
static struct device_input from_token(struct device_input in, bool int8, int64_t first)
{
    in.values = (unsigned char *)in.values + first * in.stride * (int8 ? 1 : 2);
    in.scale += int8 ? first * (in.stride / ACT_GROUP) : first;
    return in;
}

static float *random_input(int64_t tokens, int64_t cols)
{
    float *x = (float *)malloc((size_t)(tokens * cols + 1) * sizeof *x);
    for (int64_t i = 0; i < tokens * cols; i++)
        x[i] = (float)((uniform() + uniform() + uniform() - 1.5) * (i % 67 == 0 ? 8 : 1));
    return x;
}

// ---- one product ---------------------------------------------------------------------------------------------------------

enum { BESIDE = 3 }; // columns of y that no product may touch

// y [tokens][rows + BESIDE], freed by the caller.
static float *run(const struct matrix *w, struct device_input in, bool int8, int64_t tokens)
{
    int64_t rows = (int64_t)w->shape.rows, stride = rows + BESIDE;
    float *y = (float *)device_zeros(((tokens + 1) * stride) * 4);
    for (int64_t i = 0; i < (tokens + 1) * stride; i++)
        y[i] = 12345.0f;
    cudaStream_t stream;
    assert_int_equal(cudaStreamCreate(&stream), 0);
    assert_int_equal((int8 ? launch_linear_int8 : launch_linear_f16)(y, stride, w, in, tokens, stream), 0);
    assert_int_equal(cudaStreamSynchronize(stream), 0);
    cudaStreamDestroy(stream);
    for (int64_t i = 0; i < (tokens + 1) * stride; i++)
        if ((i / stride == tokens || i % stride >= rows) && y[i] != 12345.0f)
            fail_msg("%ld rows, %ld tokens: wrote beside the result, at token %ld, row %ld", (long)rows, (long)tokens,
                     (long)(i / stride), (long)(i % stride));
    return y;
}

static void fail_at(const struct matrix *w, int64_t token, int64_t row, double got, double want, const char *what)
{
    fail_msg("%s group %u, %lu x %lu, token %ld, row %ld: %.9g, not %.9g (%s)", weight_kind_name(w->shape.kind),
             w->shape.group_size, (unsigned long)w->shape.rows, (unsigned long)w->shape.cols, (long)token, (long)row,
             got, want, what);
}

static void assert_same_bits(const struct matrix *w, const float *got, const float *want, int64_t tokens,
                             const char *what)
{
    int64_t stride = (int64_t)w->shape.rows + BESIDE;
    for (int64_t i = 0; i < tokens; i++)
        for (int64_t r = 0; r < stride - BESIDE; r++)
            if (f32_bits(got[i * stride + r]) != f32_bits(want[i * stride + r]) &&
                !(isnan(got[i * stride + r]) && isnan(want[i * stride + r])))
                fail_at(w, i, r, (double)got[i * stride + r], (double)want[i * stride + r], what);
}

// The scalar table's product, in the shape of run's.
static float *int8_reference(const struct matrix *w, const struct activations *act, int64_t tokens)
{
    int64_t rows = (int64_t)w->shape.rows, stride = rows + BESIDE;
    float *y = (float *)device_zeros((tokens * stride) * 4);
    scalar()->matmul(y, stride, w, act, tokens, 0, rows);
    return y;
}

// Each product passes through at most 16 + 8 + (steps + 4 + 8) f32 additions: inside one mma, the 8 of a step, the steps, the warps; each
// rounds (or cuts, as tensor cores do) what is at most the sum of magnitudes. Four roundings of scales come on top.
static void assert_f16_close(const struct matrix *w, struct device_input in, const float *y, int64_t tokens)
{
    int64_t rows = (int64_t)w->shape.rows, cols = (int64_t)w->shape.cols, stride = rows + BESIDE;
    double tolerance = (double)(16 + 8 + cols / 128 + 12 + 4) * 0x1p-23;
    if (w->shape.kind == WEIGHT_INT4Z) // q - zero is rounded to f16
        tolerance += 0x1p-11;
    float *weights = (float *)malloc((size_t)(cols + 1) * sizeof *weights);
    double *x = (double *)malloc((size_t)(tokens * cols + 1) * sizeof *x);
    for (int64_t i = 0; i < tokens; i++)
        for (int64_t c = 0; c < cols; c++)
            x[i * cols + c] = f16_value(w, in, i, c);
    for (int64_t r = 0; r < rows; r++) {
        scalar()->dequantize_row(weights, w, r);
        for (int64_t i = 0; i < tokens; i++) {
            double want = 0, magnitude = 0;
            for (int64_t c = 0; c < cols; c++) {
                double product = (double)weights[c] * x[i * cols + c];
                want += product;
                magnitude += fabs(product);
            }
            if (!(fabs((double)y[i * stride + r] - want) <= tolerance * magnitude))
                fail_at(w, i, r, (double)y[i * stride + r], want, "f64 sum");
        }
    }
    free(x);
    free(weights);
}

// ---- tables ----------------------------------------------------------------------------------------------------------------

static const struct kind_case f16_kinds[] = {
    {WEIGHT_INT4, 128},  {WEIGHT_INT4, 64},  {WEIGHT_INT4, 32},  {WEIGHT_FP8, 0},    {WEIGHT_BF16, 0},
    {WEIGHT_INT4Z, 128}, {WEIGHT_INT4Z, 64}, {WEIGHT_INT4Z, 32}, {WEIGHT_FP8G, 128}, {WEIGHT_MXFP4, 32},
    {WEIGHT_NVFP4, 16},  {WEIGHT_NL4, 128},  {WEIGHT_NL4, 64},   {WEIGHT_NL4, 32},
};
static const struct kind_case int8_kinds[] = {
    {WEIGHT_INT4, 128}, {WEIGHT_INT4, 64}, {WEIGHT_INT4, 32}, {WEIGHT_INT8, 0}};

enum { MAX_COUNTS = 10 };
static const struct {
    uint64_t rows, cols;
    int64_t tokens[MAX_COUNTS]; // the first is the largest
} shapes[] = {
    {1, 1, {9, 1, 2}},      {16, 64, {65, 64, 33, 16, 1}},
    {63, 96, {16, 8, 7}},   {64, 128, {130, 65, 33, 17, 9, 1}},
    {65, 130, {17, 2, 16}}, {200, 1000, {33, 9, 1}},
    {33, 1090, {9, 1}},    // a last step of one column tile, in the second panel of 8 warps
    {17, 9280, {9, 1}},    // every pipeline runs full
    {2050, 320, {33, 16}}, // four warps a tile of rows, not eight: each size of a f16 block, too
    {2050, 130, {65, 1}},   {1990, 2240, {2}},
    {0, 128, {3}},          {70, 0, {18, 3}},
};

static void check_shape(struct kind_case kind, bool int8, size_t s)
{
    uint64_t rows = shapes[s].rows, cols = shapes[s].cols;
    int64_t most = shapes[s].tokens[0];
    struct matrix w = make_matrix(kind, rows, cols, fill);
    float *x = random_input(most, (int64_t)cols);
    struct activations act;
    struct device_input in = int8 ? make_int8_input(&act, &w, x, most)
                                  : make_f16_input(&w, x, most, round_up_to_128((int64_t)cols) + (s % 2 ? 128 : 0));
    emulator_seed(s + 1);
    float *all = run(&w, in, int8, most);
    if (int8) {
        float *want = int8_reference(&w, &act, most);
        assert_same_bits(&w, all, want, most, "scalar table");
        cudaFree(want);
        activations_free(&act);
    } else {
        assert_f16_close(&w, in, all, most);
    }
    int64_t stride = (int64_t)rows + BESIDE;
    for (int i = 1; i < MAX_COUNTS && shapes[s].tokens[i]; i++) {
        int64_t tokens = shapes[s].tokens[i], first = i % 2 ? most - tokens : 0;
        emulator_seed((uint64_t)i + 2);
        float *some = run(&w, from_token(in, int8, first), int8, tokens);
        assert_same_bits(&w, some, all + first * stride, tokens, "the row in other company");
        cudaFree(some);
    }
    cudaFree(all);
    free(x);
    free_input(in);
    free_matrix(&w);
}

// Large shapes are tried with the first kind, and f16 with the last.
static bool tried(size_t s, size_t k, size_t last) { return shapes[s].rows < 1000 || k == 0 || k == last; }

static void test_int8(void **state)
{
    (void)state;
    random_state = 1;
    for (size_t s = quick() ? 4 : 0; s < (quick() ? 7 : sizeof shapes / sizeof *shapes); s += quick() ? 2 : 1)
        for (size_t k = 0; k < sizeof int8_kinds / sizeof *int8_kinds; k++)
            if (tried(s, k, 0))
                check_shape(int8_kinds[k], true, s);
}

static void test_f16(void **state)
{
    (void)state;
    random_state = 2;
    for (size_t s = quick() ? 4 : 0; s < (quick() ? 7 : sizeof shapes / sizeof *shapes); s += quick() ? 2 : 1)
        for (size_t k = 0; k < sizeof f16_kinds / sizeof *f16_kinds; k++)
            if (tried(s, k, sizeof f16_kinds / sizeof *f16_kinds - 1))
                check_shape(f16_kinds[k], false, s);
}

// Every size of block that many tokens can choose, and the same bits from each.
static void test_int8_tiles(void **state)
{
    (void)state;
    static const struct {
        struct kind_case kind;
        uint64_t rows, cols;
        int64_t tokens;
    } cases[] = {
        {{WEIGHT_INT4, 128}, 6100, 130, 129}, // 128 x 128
        {{WEIGHT_INT4, 32}, 12200, 96, 65},   {{WEIGHT_INT4, 64}, 12200, 64, 65},
        {{WEIGHT_INT8, 0}, 12200, 64, 65},    {{WEIGHT_INT4, 64}, 6100, 192, 33}, // 64 x 64
        {{WEIGHT_INT4, 32}, 6100, 64, 17},    {{WEIGHT_INT8, 0}, 6100, 320, 20},
        {{WEIGHT_INT8, 0}, 500, 1088, 70}, // 32 x 64
    };
    random_state = 3;
    for (size_t i = quick() ? 7 : 0; i < sizeof cases / sizeof *cases; i++) {
        struct matrix w = make_matrix(cases[i].kind, cases[i].rows, cases[i].cols, fill);
        float *x = random_input(cases[i].tokens, (int64_t)cases[i].cols);
        struct activations act;
        struct device_input in = make_int8_input(&act, &w, x, cases[i].tokens);
        emulator_seed(i + 1);
        float *got = run(&w, in, true, cases[i].tokens), *want = int8_reference(&w, &act, cases[i].tokens);
        assert_same_bits(&w, got, want, cases[i].tokens, "scalar table");
        cudaFree(got);
        cudaFree(want);
        activations_free(&act);
        free(x);
        free_input(in);
        free_matrix(&w);
    }
}

// ---- broken numbers ------------------------------------------------------------------------------------------------------

static void test_nan_input(void **state)
{
    (void)state;
    enum { ROWS = 40, COLS = 300, TOKENS = 18, BROKEN = 5 };
    random_state = 4;
    for (int int8 = 0; int8 < 2; int8++)
        for (size_t k = 0; k < (int8 ? sizeof int8_kinds / sizeof *int8_kinds : sizeof f16_kinds / sizeof *f16_kinds);
             k++)
            for (int64_t tokens = 7; tokens <= TOKENS; tokens += 11) {
                struct matrix w = make_matrix(int8 ? int8_kinds[k] : f16_kinds[k], ROWS, COLS, fill);
                float *x = random_input(TOKENS, COLS);
                float *y[2];
                for (int broken = 0; broken < 2; broken++) {
                    struct activations act;
                    x[BROKEN * COLS + COLS - 1] = broken ? NAN : 0.5f;
                    struct device_input in =
                        int8 ? make_int8_input(&act, &w, x, TOKENS) : make_f16_input(&w, x, TOKENS, 384);
                    y[broken] = run(&w, in, int8, tokens);
                    free_input(in);
                    if (int8)
                        activations_free(&act);
                }
                for (int64_t r = 0; r < ROWS; r++) {
                    float *at = &y[1][BROKEN * (ROWS + BESIDE) + r];
                    if (!isnan(*at))
                        fail_at(&w, BROKEN, r, (double)*at, NAN, "a NaN in the input");
                    *at = y[0][BROKEN * (ROWS + BESIDE) + r];
                }
                assert_same_bits(&w, y[1], y[0], tokens, "beside a NaN");
                cudaFree(y[0]);
                cudaFree(y[1]);
                free(x);
                free_matrix(&w);
            }
}

// A file may hold e4m3's NaN codes; they show in their rows and nowhere else.
static void test_nan_weights(void **state)
{
    (void)state;
    enum { ROWS = 40, COLS = 200, TOKENS = 9 };
    random_state = 5;
    struct matrix w = make_matrix(f16_kinds[3], ROWS, COLS, fill);
    float *x = random_input(TOKENS, COLS);
    struct device_input in = make_f16_input(&w, x, TOKENS, 256);
    float *good = run(&w, in, false, TOKENS);
    ((uint8_t *)w.data)[3 * w.shape.cols_padded + 77] = 0x7f;
    ((uint8_t *)w.data)[29 * w.shape.cols_padded + 199] = 0xff;
    float *y = run(&w, in, false, TOKENS);
    for (int64_t i = 0; i < TOKENS; i++)
        for (int64_t r = 3; r < ROWS; r += 26) {
            if (!isnan(y[i * (ROWS + BESIDE) + r]))
                fail_at(&w, i, r, (double)y[i * (ROWS + BESIDE) + r], NAN, "a NaN code");
            y[i * (ROWS + BESIDE) + r] = good[i * (ROWS + BESIDE) + r];
        }
    assert_same_bits(&w, y, good, TOKENS, "beside a NaN code");
    cudaFree(good);
    cudaFree(y);
    free(x);
    free_input(in);
    free_matrix(&w);
}

// ---- the order of blocks and threads; memory -----------------------------------------------------------------------------

static void test_order_and_memory(void **state)
{
    (void)state;
    static const struct {
        struct kind_case kind;
        bool int8;
        int64_t tokens;
    } cases[] = {
        {{WEIGHT_INT4, 128}, false, 1}, {{WEIGHT_INT4, 32}, false, 16}, {{WEIGHT_INT4, 64}, false, 9},
        {{WEIGHT_FP8, 0}, false, 16},   {{WEIGHT_BF16, 0}, false, 8},   {{WEIGHT_INT4, 128}, true, 8},
        {{WEIGHT_INT4, 32}, true, 16},  {{WEIGHT_INT8, 0}, true, 16},   {{WEIGHT_INT4, 128}, true, 64},
        {{WEIGHT_INT8, 0}, true, 64},   {{WEIGHT_INT4Z, 32}, false, 8}, {{WEIGHT_FP8G, 128}, false, 16},
        {{WEIGHT_MXFP4, 32}, false, 1}, {{WEIGHT_NVFP4, 16}, false, 8}, {{WEIGHT_NL4, 128}, false, 1},
        {{WEIGHT_NL4, 32}, false, 16},
    };
    enum { ROWS = 128, COLS = 1280 };
    random_state = 6;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i += quick() ? 4 : 1) {
        struct matrix w = make_matrix(cases[i].kind, ROWS, COLS, fill);
        float *x = random_input(cases[i].tokens, COLS);
        struct activations act;
        bool int8 = cases[i].int8;
        int64_t tokens = cases[i].tokens;
        struct device_input in = int8 ? make_int8_input(&act, &w, x, tokens) : make_f16_input(&w, x, tokens, COLS);
        float *first = NULL;
        for (uint64_t seed = 0; seed < (quick() ? 1 : 3); seed++) {
            emulator_seed(seed);
            emulator_stats_reset();
            float *y = run(&w, in, int8, tokens);
            struct emulator_stats stats = emulator_count(int8 ? "linear_int8" : "linear_f16");
            if (emulator_present()) {
                assert_int_equal(stats.launches, 1);
                assert_int_equal(stats.shared_conflicts, 0);
                assert_true(stats.shared_requests > 0);
            }
            if (emulator_present() &&
                !int8) { // each sector of weights and inputs once for each block that needs it, and no part of one for nothing
                assert_int_equal(stats.global_sectors, stats.global_ideal_sectors);
                uint64_t inputs = (uint64_t)tokens * COLS * 2 * (ROWS / 16),
                         scales = w.shape.group_size > 0 ? w.shape.scale_bytes : 0;
                if (w.shape.kind == WEIGHT_NVFP4) // rows' own factors come once, at the end
                    scales -= w.shape.rows_padded * sizeof(float);
                assert_int_equal(stats.global_sectors, (w.shape.data_bytes + inputs + scales) / 32);
            }
            if (first) {
                assert_same_bits(&w, y, first, tokens, "another order of threads");
                cudaFree(y);
            } else {
                first = y;
            }
        }
        cudaFree(first);
        if (int8)
            activations_free(&act);
        free(x);
        free_input(in);
        free_matrix(&w);
    }
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_int8),      cmocka_unit_test(test_f16),         cmocka_unit_test(test_int8_tiles),
        cmocka_unit_test(test_nan_input), cmocka_unit_test(test_nan_weights), cmocka_unit_test(test_order_and_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
