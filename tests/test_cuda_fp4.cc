// Products of mxfp4 and nvfp4 weights on sm_120's tensor cores, in the emulator, against sums in double of the very codes and scales; and the
// proof by which the backend decides whether to trust a device with them.
#include "tests/device/cuda_test.h"

extern "C" {
#include "kernels/cuda/device.h"
}

enum { BESIDE = 3 }; // columns of y that no product may touch
static const struct kind_case kinds[] = {{WEIGHT_MXFP4, 32}, {WEIGHT_NVFP4, 16}};

static void fill(float *x, uint64_t row, uint64_t cols)
{
    float factor = row % 5 == 0 ? 40.0f : row % 5 == 1 ? 0.001f : 1.0f;
    for (uint64_t c = 0; c < cols; c++)
        x[c] = centred() * factor * (c % 97 == 3 ? 9.0f : 1.0f);
}

static float *random_input(int64_t tokens, int64_t cols)
{
    float *x = floats(tokens * cols);
    for (int64_t i = 0; i < tokens * cols; i++)
        x[i] = centred() * (i % 67 == 0 ? 30.0f : i / 40 % 3 == 1 ? 0.01f : 1.0f);
    return x;
}

// As the backend prepares it.
static struct device_input make_input(const float *x, int64_t tokens, int64_t cols, int64_t stride)
{
    struct device_input in = {device_zeros(tokens * stride), (float *)device_zeros(tokens * (stride / 32)), stride};
    memset(in.values, 0x7f, (size_t)(tokens * stride)); // NaN where prepare does not write
    memset(in.scale, 0xff, (size_t)(tokens * (stride / 32)));
    float *device_x = device_copy(x, tokens * cols);
    finish(launch_prepare(in, INPUT_MXFP8_TILE, device_x, cols, NULL, tokens, cols, NULL));
    cudaFree(device_x);
    return in;
}

static struct device_input from_token(struct device_input in, int64_t first)
{
    return {(uint8_t *)in.values + first * in.stride, (float *)(void *)((uint8_t *)in.scale + first * (in.stride / 32)),
            in.stride};
}

static double e8m0(uint8_t code) { return code == 255 ? (double)NAN : ldexp(1, code - 127); }

static double input_value(struct device_input in, int64_t token, int64_t col)
{
    static const int place[16] = {0, 2, 16, 18, 32, 34, 48, 50, 1, 3, 17, 19, 33, 35, 49, 51};
    uint8_t code = ((uint8_t *)in.values)[token * in.stride + col / 64 * 64 + col % 64 / 16 * 4 + place[col % 16]];
    return (double)e4m3_to_f32(code) * e8m0(((uint8_t *)in.scale)[(token * in.stride + col) / 32]);
}

// Where the scale of a weight lies, and nvfp4's factor of the row.
static uint8_t *scale_at(const struct matrix *w, uint64_t row, uint64_t col)
{
    uint64_t groups = w->shape.cols_padded / w->shape.group_size;
    uint64_t before = w->shape.kind == WEIGHT_NVFP4 ? row / 64 * 64 * sizeof(float) : 0;
    return (uint8_t *)w->scale + before + (row / 16 * groups + col / w->shape.group_size) * 16 + row % 16;
}
static float *global_at(const struct matrix *w, uint64_t row)
{
    uint64_t groups = w->shape.cols_padded / w->shape.group_size;
    uint8_t *block = (uint8_t *)w->scale + row / 64 * (64 * groups + 64 * sizeof(float));
    return (float *)(void *)(block + 64 * groups) + row % 64;
}

// Without the row's factor.
static double weight_value(const struct matrix *w, uint64_t row, uint64_t col)
{
    bool high;
    uint64_t at = weight_tile_offset(row, col, w->shape.cols_padded, &high);
    double code = (double)e2m1_to_f32((uint8_t)(((uint8_t *)w->data)[at] >> (high ? 4 : 0) & 15));
    uint8_t scale = *scale_at(w, row, col);
    return code * (w->shape.kind == WEIGHT_MXFP4 ? e8m0(scale) : (double)e4m3_to_f32(scale));
}

// y [tokens][rows + BESIDE].
static float *run(const struct matrix *w, struct device_input in, int64_t tokens)
{
    int64_t rows = (int64_t)w->shape.rows, stride = rows + BESIDE;
    float *y = (float *)device_zeros((tokens + 1) * stride * 4);
    for (int64_t i = 0; i < (tokens + 1) * stride; i++)
        y[i] = 12345.0f;
    finish(launch_linear_fp4(y, stride, w, in, tokens, NULL));
    for (int64_t i = 0; i < (tokens + 1) * stride; i++)
        if ((i / stride == tokens || i % stride >= rows) && y[i] != 12345.0f)
            fail_msg("wrote beside the result, at token %ld, row %ld", (long)(i / stride), (long)(i % stride));
    return y;
}

static void fail_at(const struct matrix *w, int64_t token, int64_t row, double got, double want)
{
    fail_msg("%s, %lu x %lu, token %ld, row %ld: %.9g, not %.9g", weight_kind_name(w->shape.kind),
             (unsigned long)w->shape.rows, (unsigned long)w->shape.cols, (long)token, (long)row, got, want);
}

// Each group's sum may round once, and so may adding it; a tensor core may cut off instead. Sums that f32 cannot hold need not be finite.
static void assert_close(const struct matrix *w, struct device_input in, const float *y, int64_t tokens)
{
    int64_t rows = (int64_t)w->shape.rows, cols = (int64_t)w->shape.cols;
    double *x = (double *)zeroed(tokens * cols * 8 + 8);
    for (int64_t i = 0; i < tokens; i++)
        for (int64_t c = 0; c < cols; c++)
            x[i * cols + c] = input_value(in, i, c);
    double *row = (double *)zeroed(cols * 8 + 8);
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t c = 0; c < cols; c++)
            row[c] = weight_value(w, (uint64_t)r, (uint64_t)c);
        double factor = w->shape.kind == WEIGHT_NVFP4 ? (double)*global_at(w, (uint64_t)r) : 1;
        for (int64_t i = 0; i < tokens; i++) {
            double sum = 0, magnitude = 0;
            for (int64_t c = 0; c < cols; c++) {
                sum += row[c] * x[i * cols + c];
                magnitude += fabs(row[c] * x[i * cols + c]);
            }
            double got = (double)y[i * (rows + BESIDE) + r], want = sum * factor;
            double bound = fabs(factor) * (magnitude * (4 + (double)cols / 16) * 0x1p-23 + 0x1p-120) + 0x1p-149;
            bool beyond = fmax(64, fabs(factor)) * magnitude > 0x1.fffffep127 && !isfinite(got);
            if (!(fabs(got - want) <= bound) && !(isnan(got) && isnan(want)) && !beyond)
                fail_at(w, i, r, got, want);
        }
    }
    free(row);
    free(x);
}

static void assert_same_bits(const struct matrix *w, const float *got, const float *want, int64_t tokens)
{
    int64_t rows = (int64_t)w->shape.rows, stride = rows + BESIDE;
    for (int64_t i = 0; i < tokens; i++)
        for (int64_t r = 0; r < rows; r++)
            if (!same(got[i * stride + r], want[i * stride + r]))
                fail_at(w, i, r, (double)got[i * stride + r], (double)want[i * stride + r]);
}

// ---- products --------------------------------------------------------------------------------------------------------

static const struct {
    uint64_t rows, cols;
    int64_t tokens;
} shapes[] = {{1, 1, 1},     {64, 64, 1},   {3, 65, 2},    {65, 130, 7},   {16, 257, 70}, {130, 320, 64},
              {100, 700, 9}, {64, 1088, 3}, {200, 32, 65}, {70, 1000, 13}, {0, 64, 3},    {64, 0, 3}};

static void products_of_every_shape(void **state)
{
    (void)state;
    random_state = 1;
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s += quick() ? 4 : 1)
        for (struct kind_case kind : kinds) {
            int64_t cols = (int64_t)shapes[s].cols, tokens = shapes[s].tokens;
            struct matrix w = make_matrix(kind, shapes[s].rows, shapes[s].cols, fill);
            float *x = random_input(tokens, cols);
            struct device_input in = make_input(x, tokens, cols, round_up_to(cols, 128) + (s % 2 ? 128 : 0));
            for (uint64_t seed = 0; seed < (s < 5 ? 3 : 1); seed++) {
                emulator_seed(seed);
                float *y = run(&w, in, tokens);
                assert_close(&w, in, y, tokens);
                cudaFree(y);
            }
            free_input(in);
            free(x);
            free_matrix(&w);
        }
}

// Law 9: a token alone, in a small block, and among others in the large one.
static void tokens_do_not_see_each_other(void **state)
{
    (void)state;
    enum { ROWS = 6100, COLS = 200 };
    random_state = 2;
    for (struct kind_case kind : kinds) {
        int64_t tokens = kind.kind == WEIGHT_MXFP4 ? 129 : 66, few = 5;
        if (quick() && kind.kind == WEIGHT_MXFP4)
            continue;
        struct matrix w = make_matrix(kind, ROWS, COLS, fill);
        float *x = random_input(tokens, COLS);
        struct device_input in = make_input(x, tokens, COLS, 256);
        emulator_seed(5);
        emulator_stats_reset();
        float *y = run(&w, in, tokens);
        struct emulator_stats stats = emulator_count("linear_fp4");
        if (emulator_present()) {
            assert_int_equal(stats.launches, 1);
            assert_int_equal(stats.shared_conflicts, 0);
            assert_true(stats.shared_requests > 0);
        }
        for (int64_t first = 0; first < tokens; first += 61) {
            int64_t count = first == 61 ? few : 1;
            float *alone = run(&w, from_token(in, first), count);
            assert_same_bits(&w, alone, y + first * (ROWS + BESIDE), count);
            if (first == 0)
                assert_close(&w, in, y, 3);
            cudaFree(alone);
        }
        cudaFree(y);
        free_input(in);
        free(x);
        free_matrix(&w);
    }
}

static void broken_numbers_stay_in_their_rows(void **state)
{
    (void)state;
    enum { ROWS = 80, COLS = 300, TOKENS = 18 };
    random_state = 3;
    for (struct kind_case kind : kinds) {
        struct matrix w = make_matrix(kind, ROWS, COLS, fill);
        float *x = random_input(TOKENS, COLS), *y[2];
        for (int broken = 0; broken < 2; broken++) {
            if (broken) {
                x[5 * COLS + COLS - 1] = NAN;
                x[12 * COLS] = INFINITY;
                *scale_at(&w, 3, 0) = *scale_at(&w, 77, 299) = kind.kind == WEIGHT_MXFP4 ? 255 : 0x7f;
            }
            struct device_input in = make_input(x, TOKENS, COLS, 384);
            y[broken] = run(&w, in, TOKENS);
            if (broken)
                assert_close(&w, in, y[1], TOKENS); // NaN where NaN must be
            free_input(in);
        }
        for (int64_t i = 0; i < TOKENS; i++)
            for (int64_t r = 0; r < ROWS; r++) {
                float *at = &y[1][i * (ROWS + BESIDE) + r];
                bool must = i == 5 || i == 12 || r == 3 || r == 77;
                if (isnan(*at) != must)
                    fail_at(&w, i, r, (double)*at, must ? (double)NAN : 0);
                if (must)
                    *at = y[0][i * (ROWS + BESIDE) + r];
            }
        assert_same_bits(&w, y[1], y[0], TOKENS);
        cudaFree(y[0]);
        cudaFree(y[1]);
        free(x);
        free_matrix(&w);
    }
}

// Rows and tokens at the ends of their scales' ranges, results that f32 holds and results that it does not.
static void scales_of_any_size(void **state)
{
    (void)state;
    enum { ROWS = 40, COLS = 160, TOKENS = 9 };
    static const uint8_t mx[] = {0, 1, 27, 127, 200, 253, 254}, nv[] = {0, 1, 8, 0x38, 0x7e, 0x81};
    static const float globals[] = {0, 1e-30f, 1e-9f, 1, 3e20f};
    static const int exponents[TOKENS] = {0, -90, -60, 60, 90, 119, -99, 20, -20};
    random_state = 4;
    for (struct kind_case kind : kinds) {
        struct matrix w = make_matrix(kind, ROWS, COLS, fill);
        float *x = random_input(TOKENS, COLS);
        for (int64_t i = 0; i < TOKENS * COLS; i++)
            x[i] = ldexpf(x[i], exponents[i / COLS]);
        for (uint64_t row = 0; row < ROWS; row++) {
            for (uint64_t col = 0; col < COLS; col += kind.group_size)
                *scale_at(&w, row, col) = kind.kind == WEIGHT_MXFP4
                                              ? mx[(row + (row % 3 == 0 ? col / 32 : 0)) % sizeof mx]
                                              : nv[(row + col / 16) % sizeof nv];
            if (kind.kind == WEIGHT_NVFP4)
                *global_at(&w, row) = globals[row % (sizeof globals / sizeof *globals)];
        }
        struct device_input in = make_input(x, TOKENS, COLS, 256);
        float *y = run(&w, in, TOKENS);
        assert_close(&w, in, y, TOKENS);
        cudaFree(y);
        free_input(in);
        free(x);
        free_matrix(&w);
    }
}

static void other_kinds_are_refused(void **state)
{
    (void)state;
    struct matrix w = {};
    struct device_input in = {};
    assert_true(weight_shape_make(&w.shape, WEIGHT_INT4, 32, 64, 64));
    assert_int_equal(launch_linear_fp4(NULL, 64, &w, in, 1, NULL), cudaErrorInvalidValue);
}

// ---- the proof -------------------------------------------------------------------------------------------------------

static void the_proof_holds(void **state)
{
    (void)state;
    struct error err;
    for (struct kind_case kind : kinds)
        if (fp4_probe(kind.kind, NULL, &err))
            fail_msg("%s", err.msg);
}

static void the_proof_can_fail(void **state)
{
    (void)state;
    if (!emulator_present())
        skip();
    emulator_misread_scales(true);
    for (struct kind_case kind : kinds) {
        struct error err = {};
        assert_int_equal(fp4_probe(kind.kind, NULL, &err), ERR_GPU);
        assert_non_null(strstr(err.msg, "of a known product with"));
    }
    emulator_misread_scales(false);
}

// Code for these instructions is there for sm_120 alone.
static bool other_chip(void)
{
    struct cudaDeviceProp properties;
    return cudaGetDeviceProperties(&properties, 0) != cudaSuccess || properties.major * 10 + properties.minor != 120;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(products_of_every_shape),
        cmocka_unit_test(tokens_do_not_see_each_other),
        cmocka_unit_test(broken_numbers_stay_in_their_rows),
        cmocka_unit_test(scales_of_any_size),
        cmocka_unit_test(other_kinds_are_refused),
        cmocka_unit_test(the_proof_holds),
        cmocka_unit_test(the_proof_can_fail),
    };
    if (!emulator_present() && other_chip())
        return puts("no device of compute capability 12.0 here"), 0;
    return cmocka_run_group_tests(tests, NULL, NULL);
}
