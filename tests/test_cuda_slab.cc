// launch_slab and launch_scale, bit for bit: matrices packed as in a rank file, expanded by the device and by the scalar table's dequantize_row.
#include "tests/device/cuda_test.h"

// Rows of very different size, one of them zero.
static void fill(float *x, uint64_t row, uint64_t cols)
{
    double size = row == 5 ? 0 : exp2((double)(row % 23) - 16);
    for (uint64_t c = 0; c < cols; c++)
        x[c] = (float)(size * (uniform() + uniform() + uniform() - 1.5) * (c % 131 == 0 ? 9 : 1));
}

// ---- the slab ----------------------------------------------------------------------------------------------------------

static uint32_t to_format(float x, enum slab_format format)
{
    if (format == SLAB_E4M3)
        return f32_to_e4m3(x);
    if (format == SLAB_BF16)
        return f32_to_bf16(x);
    float limited = x > F16_MAX ? F16_MAX : x < -F16_MAX ? -F16_MAX : x;
    return f32_to_f16(isfinite(x) ? limited : x);
}

static uint32_t element(const void *slab, enum slab_format format, int64_t i)
{
    return format == SLAB_E4M3 ? ((const uint8_t *)slab)[i] : ((const uint16_t *)slab)[i];
}

// NaN's bits are nobody's matter.
static bool is_nan(uint32_t bits, enum slab_format format)
{
    return format == SLAB_E4M3 ? (bits & 0x7f) == 0x7f : (bits & 0x7fff) > (format == SLAB_F16 ? 0x7c00u : 0x7f80u);
}

static void check_slab(const char *name, const struct matrix *w, enum slab_format format, int64_t begin, int64_t end)
{
    int64_t rows = end - begin, padded = (int64_t)w->shape.cols_padded, cols = (int64_t)w->shape.cols;
    bool scaled = format == SLAB_E4M3;
    void *slab = device_new((rows * padded) * (scaled ? 1 : 2));
    float *row_scale = scaled ? (float *)device_new(rows * 4) : NULL, *x = (float *)malloc((size_t)cols * 4 + 4);
    for (uint64_t seed = 1; seed <= 3; seed++) {
        emulator_seed(seed);
        assert_int_equal(launch_slab(slab, format, row_scale, w, begin, end, 0), cudaSuccess);
        assert_int_equal(cudaDeviceSynchronize(), cudaSuccess);
        for (int64_t r = 0; r < rows; r++) {
            bool real = begin + r < (int64_t)w->shape.rows;
            float largest = 0, divisor = 1;
            if (real)
                scalar()->dequantize_row(x, w, begin + r);
            for (int64_t c = 0; c < cols && real; c++)
                largest = fmaxf(largest, fabsf(x[c]));
            if (scaled && row_scale[r] != largest / E4M3_MAX)
                fail_msg("%s: scale of row %d is %g, wanted %g", name, (int)r, row_scale[r], largest / E4M3_MAX);
            if (scaled && largest > 0)
                divisor = row_scale[r];
            for (int64_t c = 0; c < padded; c++) {
                uint32_t got = element(slab, format, r * padded + c);
                uint32_t want = real && c < cols ? to_format(x[c] / divisor, format) : 0;
                // Behind the columns stand codes of 0, which int4z's zero makes something else; inputs are zero there.
                if (w->shape.kind == WEIGHT_INT4Z && !(real && c < cols))
                    continue;
                bool zero = !(real && c < cols) && (got & (scaled ? 0x7fu : 0x7fffu)) == 0;
                if (got != want && !zero && !(is_nan(got, format) && is_nan(want, format)))
                    fail_msg("%s: row %d, column %d is %04x, wanted %04x", name, (int)r, (int)c, got, want);
            }
        }
    }
    free(x);
    cudaFree(slab);
    cudaFree(row_scale);
}

static const struct {
    struct kind_case kind;
    enum slab_format format;
} kinds[] = {
    {{WEIGHT_INT4, 32}, SLAB_F16},   {{WEIGHT_INT4, 64}, SLAB_F16},   {{WEIGHT_INT4, 128}, SLAB_F16},
    {{WEIGHT_INT4, 32}, SLAB_BF16},  {{WEIGHT_INT4, 64}, SLAB_BF16},  {{WEIGHT_INT4, 128}, SLAB_BF16},
    {{WEIGHT_INT4, 32}, SLAB_E4M3},  {{WEIGHT_INT4, 64}, SLAB_E4M3},  {{WEIGHT_INT4, 128}, SLAB_E4M3},
    {{WEIGHT_FP8, 0}, SLAB_F16},     {{WEIGHT_FP8, 0}, SLAB_BF16},    {{WEIGHT_INT8, 0}, SLAB_F16},
    {{WEIGHT_INT8, 0}, SLAB_BF16},   {{WEIGHT_INT4Z, 32}, SLAB_F16},  {{WEIGHT_INT4Z, 128}, SLAB_F16},
    {{WEIGHT_FP8G, 128}, SLAB_BF16}, {{WEIGHT_MXFP4, 32}, SLAB_BF16}, {{WEIGHT_NVFP4, 16}, SLAB_BF16},
    {{WEIGHT_NL4, 32}, SLAB_F16},    {{WEIGHT_NL4, 128}, SLAB_BF16},  {{WEIGHT_NL4, 32}, SLAB_E4M3},
    {{WEIGHT_NL4, 128}, SLAB_E4M3},
};
enum { NUM_KINDS = sizeof kinds / sizeof kinds[0] };

static void test_slab(void **)
{
    static const struct {
        uint64_t rows, cols;
        int64_t begin, end; // of the slab
    } shapes[] = {
        {1, 32, 0, 1},      {64, 128, 0, 64}, {100, 200, 0, 128}, {130, 1100, 64, 130},
        {200, 96, 64, 192}, {70, 640, 5, 23}, {64, 64, 17, 17},
    };
    for (int k = 0; k < NUM_KINDS; k++)
        for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s += quick() ? 3 : 1) {
            char name[96];
            snprintf(name, sizeof name, "kind %d, group %u, format %d, shape %d", kinds[k].kind.kind,
                     kinds[k].kind.group_size, kinds[k].format, (int)s);
            random_state = 11 + s;
            struct matrix w = make_matrix(kinds[k].kind, shapes[s].rows, shapes[s].cols, fill);
            check_slab(name, &w, kinds[k].format, shapes[s].begin, shapes[s].end);
            free_matrix(&w);
        }
}

// Scales as no quantizer writes them: broken ones show in every element that they touch, large ones saturate f16.
static void test_hostile_scales(void **)
{
    for (int k = 0; k < NUM_KINDS; k++) {
        random_state = 3;
        struct matrix w = make_matrix(kinds[k].kind, 64, 256, fill);
        static const float scales[] = {1e30f, -3e38f, INFINITY, -INFINITY, NAN, 1e-44f, 600, -0.0f};
        static const uint16_t scales_f16[] = {0x7bff, 0xfbff, 0x7c00, 0xfc00, 0x7e00, 0x0001, 0x8000, 0x0400};
        for (int i = 0; i < 8; i++) {
            bool f16 = weight_group_chosen(kinds[k].kind.kind);
            if (f16)
                ((uint16_t *)(void *)w.scale)[i * 5] = scales_f16[i];
            else
                ((float *)(void *)w.scale)[i * 5] = scales[i];
        }
        check_slab("hostile scales", &w, kinds[k].format, 0, 64);
        free_matrix(&w);
    }
}

// Whole sectors only, and no bank is met twice.
static void test_access(void **)
{
    if (!emulator_present() || quick())
        skip(); // nothing is counted
    for (int k = 0; k < NUM_KINDS; k++) {
        random_state = 4;
        struct matrix w = make_matrix(kinds[k].kind, 128, 1024, fill);
        emulator_stats_reset();
        check_slab("access", &w, kinds[k].format, 0, 128);
        bool tiled = weight_is_tiled(kinds[k].kind.kind);
        struct emulator_stats s = emulator_count(tiled ? "tiled_kernel" : "byte_kernel");
        uint64_t weights = 3 * 128 * 1024; // check_slab expands three times
        uint64_t read = weights / (tiled ? 2 : 1), written = weights * (kinds[k].format == SLAB_E4M3 ? 1 : 2);
        assert_int_equal(s.global_sectors, s.global_ideal_sectors);
        assert_int_equal(s.global_sectors, (read + written) / 32);
        assert_int_equal(s.shared_requests > 0, tiled);
        assert_int_equal(s.shared_conflicts, 0);
        free_matrix(&w);
    }
}

static void test_refused(void **)
{
    struct matrix bf16 = make_matrix({WEIGHT_BF16, 0}, 64, 64, fill), fp8 = make_matrix({WEIGHT_FP8, 0}, 64, 64, fill),
                  int4 = make_matrix({WEIGHT_INT4, 64}, 64, 64, fill),
                  none = make_matrix({WEIGHT_INT4, 64}, 0, 64, fill);
    float scale[64];
    uint16_t slab[64 * 64];
    assert_int_equal(launch_slab(slab, SLAB_BF16, NULL, &bf16, 0, 64, 0), cudaErrorInvalidValue);
    assert_int_equal(launch_slab(slab, SLAB_E4M3, scale, &fp8, 0, 64, 0), cudaErrorInvalidValue);
    assert_int_equal(launch_slab(slab, SLAB_F16, NULL, &fp8, 0, 65, 0), cudaErrorInvalidValue);
    assert_int_equal(launch_slab(slab, SLAB_F16, NULL, &fp8, 32, 16, 0), cudaErrorInvalidValue);
    assert_int_equal(launch_slab(slab, SLAB_E4M3, NULL, &int4, 0, 64, 0), cudaErrorInvalidValue);
    assert_int_equal(launch_slab(slab, SLAB_F16, scale, &int4, 0, 64, 0), cudaErrorInvalidValue);
    assert_int_equal(launch_slab(slab, SLAB_F16, NULL, &none, 0, 0, 0), cudaSuccess);
    free_matrix(&bf16);
    free_matrix(&fp8);
    free_matrix(&int4);
    free_matrix(&none);
}

// ---- factors -----------------------------------------------------------------------------------------------------------

static void test_scale(void **)
{
    static const struct {
        int64_t rows, cols, stride, offset; // of the column factors: 1 leaves the 16-byte grid
    } cases[] = {{1, 4, 4, 0}, {3, 1000, 1004, 0}, {2, 1028, 1028, 1}, {5, 37, 41, 0}, {2, 1030, 1032, 0}};
    for (size_t c = 0; c < sizeof cases / sizeof cases[0]; c++)
        for (int given = 0; given < 4; given++) {
            int64_t rows = cases[c].rows, cols = cases[c].cols, stride = cases[c].stride;
            float *y = (float *)device_new((rows * stride) * 4), *row = (float *)device_new(rows * 4),
                  *memory = (float *)device_new((cols + 1) * 4), *col = memory + cases[c].offset;
            float *before = (float *)malloc((size_t)(rows * stride) * 4);
            random_state = 9 + c;
            for (int64_t i = 0; i < rows * stride; i++)
                y[i] = before[i] = (float)(uniform() - 0.5);
            for (int64_t i = 0; i < rows; i++)
                row[i] = (float)uniform() * 1e-3f;
            for (int64_t i = 0; i < cols; i++)
                col[i] = (float)uniform() * 1e3f;
            emulator_seed(c + 1);
            assert_int_equal(launch_scale(y, stride, given & 1 ? row : NULL, given & 2 ? col : NULL, rows, cols, 0),
                             cudaSuccess);
            assert_int_equal(cudaDeviceSynchronize(), cudaSuccess);
            for (int64_t r = 0; r < rows; r++)
                for (int64_t i = 0; i < stride; i++) {
                    float factor = (given & 1 ? row[r] : 1.0f) * (given & 2 ? col[i < cols ? i : 0] : 1.0f);
                    float want = i < cols ? before[r * stride + i] * factor : before[r * stride + i];
                    assert_true(y[r * stride + i] == want);
                }
            free(before);
            cudaFree(y);
            cudaFree(row);
            cudaFree(memory);
        }
    assert_int_equal(launch_scale(NULL, 4, NULL, NULL, 4, 5, 0), cudaErrorInvalidValue);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_slab),    cmocka_unit_test(test_hostile_scales), cmocka_unit_test(test_access),
        cmocka_unit_test(test_refused), cmocka_unit_test(test_scale),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
