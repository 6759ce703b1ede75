// Sizes of weights, quantizers and stored layouts: the order of the bytes against the specification, the quality
// against measured figures, and law 1: slicing and quantizing commute.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "formats/checksum.h"
#include "formats/model_desc.h"
#include "formats/number_formats.h"
#include "kernels/pack.h"

// ---- numbers to work on ---------------------------------------------------------------------------------------------

static uint64_t state;

static uint64_t next_random(void)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return state >> 32;
}

// Roughly Gaussian, exact in f32 and the same on every machine: the sum of four 16-bit numbers.
static float next_weight(void)
{
    int32_t sum = -131070;
    for (int i = 0; i < 4; i++)
        sum += (int32_t)(next_random() & 0xffff);
    return (float)sum * 0x1p-20f;
}

static double next_uniform(void) { return ((double)next_random() + 0.5) * 0x1p-32; }

static double next_gauss(void)
{
    double radius = sqrt(-2 * log(next_uniform()));
    return radius * cos(6.283185307179586 * next_uniform());
}

static double next_student5(void)
{
    double numerator = next_gauss(), chi2 = 0;
    for (int i = 0; i < 5; i++) {
        double g = next_gauss();
        chi2 += g * g;
    }
    return numerator / sqrt(chi2 / 5);
}

static void *allocate(uint64_t bytes)
{
    void *memory = calloc(1, bytes + 1);
    assert_non_null(memory);
    return memory;
}

struct kind_case {
    enum weight_kind kind;
    uint32_t group_size;
};

static const struct kind_case all_kinds[] = {
    {WEIGHT_F32, 0},   {WEIGHT_BF16, 0},  {WEIGHT_INT8, 0},   {WEIGHT_FP8, 0},
    {WEIGHT_INT4, 32}, {WEIGHT_INT4, 64}, {WEIGHT_INT4, 128},
};
enum { NUM_KINDS = sizeof all_kinds / sizeof *all_kinds };

static struct packed_row new_row(struct kind_case c, uint64_t cols)
{
    struct packed_row row;
    packed_row_place(&row, allocate(packed_row_bytes(c.kind, c.group_size, cols)), c.kind, c.group_size, cols);
    return row;
}

static void free_row(struct packed_row *row) { free(row->scale_f16 ? (void *)row->scale_f16 : (void *)row->q); }

static uint64_t code_size(enum weight_kind kind) { return kind == WEIGHT_F32 ? 4 : kind == WEIGHT_BF16 ? 2 : 1; }

static void assert_rows_equal(struct kind_case c, const struct packed_row *a, const struct packed_row *b, uint64_t cols)
{
    assert_memory_equal(a->q, b->q, cols * code_size(c.kind));
    if (c.kind == WEIGHT_INT8 || c.kind == WEIGHT_FP8)
        assert_memory_equal(&a->scale, &b->scale, sizeof a->scale);
    if (c.kind == WEIGHT_INT4)
        assert_memory_equal(a->scale_f16, b->scale_f16, (cols + c.group_size - 1) / c.group_size * 2);
}

// ---- weight.h -------------------------------------------------------------------------------------------------------

static void shapes(void **unused)
{
    (void)unused;
    static const struct {
        enum weight_kind kind;
        uint32_t group_size;
        uint64_t rows, cols;
        bool ok;
        uint64_t rows_padded, cols_padded, data_bytes, scale_bytes;
    } cases[] = {
        {WEIGHT_F32, 0, 1, 1000, true, 1, 1000, 4000, 0},
        {WEIGHT_F32, 0, 0, 1000, true, 0, 1000, 0, 0},
        {WEIGHT_BF16, 0, 65, 63, true, 128, 64, 16384, 0},
        {WEIGHT_INT8, 0, 64, 64, true, 64, 64, 4096, 256},
        {WEIGHT_INT8, 0, 1, 0, true, 64, 0, 0, 256},
        {WEIGHT_FP8, 0, 63, 65, true, 64, 128, 8192, 256},
        {WEIGHT_INT4, 32, 64, 96, true, 64, 128, 4096, 512},
        {WEIGHT_INT4, 64, 64, 96, true, 64, 128, 4096, 256},
        {WEIGHT_INT4, 128, 64, 129, true, 64, 256, 8192, 256},
        {WEIGHT_INT4, 128, 0, 0, true, 0, 0, 0, 0},
        {WEIGHT_INT4, 128, 4096, 14336, true, 4096, 14336, 29360128, 917504},
        {WEIGHT_INT4, 0, 64, 64, false, 0, 0, 0, 0},
        {WEIGHT_INT4, 48, 64, 64, false, 0, 0, 0, 0},
        {WEIGHT_INT4, 256, 64, 64, false, 0, 0, 0, 0},
        {WEIGHT_INT8, 128, 64, 64, false, 0, 0, 0, 0},
        {WEIGHT_F32, 0, 0x80000000u, 1, false, 0, 0, 0, 0},
        {WEIGHT_F32, 0, 1, 0x80000000u, false, 0, 0, 0, 0},
        {WEIGHT_F32, 0, 1, UINT64_MAX, false, 0, 0, 0, 0},
        {WEIGHT_F32, 0, 0x7fffffff, 0x7fffffff, false, 0, 0, 0, 0},
        {WEIGHT_BF16, 0, 0x7fffffff, 0x7fffffff, false, 0, 0, 0, 0},
        {WEIGHT_INT8, 0, 0x7fffffff, 0x7fffffff, true, 0x80000000u, 0x80000000u, 1ull << 62, 1ull << 33},
        {WEIGHT_KIND_COUNT, 0, 64, 64, false, 0, 0, 0, 0},
        {(enum weight_kind) - 1, 0, 64, 64, false, 0, 0, 0, 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct weight_shape shape = {.rows = 12345};
        bool ok = weight_shape_make(&shape, cases[i].kind, cases[i].group_size, cases[i].rows, cases[i].cols);
        if (ok != cases[i].ok)
            fail_msg("case %zu", i);
        if (!ok) {
            assert_int_equal(shape.rows, 12345); // untouched
            continue;
        }
        assert_int_equal(shape.rows, cases[i].rows);
        assert_int_equal(shape.cols, cases[i].cols);
        assert_int_equal(shape.rows_padded, cases[i].rows_padded);
        assert_int_equal(shape.cols_padded, cases[i].cols_padded);
        assert_int_equal(shape.data_bytes, cases[i].data_bytes);
        assert_int_equal(shape.scale_bytes, cases[i].scale_bytes);
    }
}

static void kind_names(void **unused)
{
    (void)unused;
    static const char *const names[WEIGHT_KIND_COUNT] = {"f32", "bf16", "int8", "fp8", "int4"};
    for (int i = 0; i < WEIGHT_KIND_COUNT; i++) {
        enum weight_kind kind = WEIGHT_KIND_COUNT;
        assert_string_equal(weight_kind_name((enum weight_kind)i), names[i]);
        assert_true(weight_kind_from_name(names[i], &kind));
        assert_int_equal(kind, i);
    }
    enum weight_kind kind = WEIGHT_INT8;
    assert_false(weight_kind_from_name("int5", &kind));
    assert_false(weight_kind_from_name("", &kind));
    assert_int_equal(kind, WEIGHT_INT8);
}

// ---- stored layouts -------------------------------------------------------------------------------------------------

// The code of (row, col), looked up as the specification says it: by tile, lane, word, byte and nibble.
static int specified_code(const uint8_t *data, uint64_t cols_padded, uint64_t row, uint64_t col)
{
    static const int column_of_byte[4] = {0, 8, 1, 9};
    uint64_t tiles_across = cols_padded / 64;
    for (int lane = 0; lane < 32; lane++)
        for (int word = 0; word < 4; word++)
            for (int byte = 0; byte < 4; byte++)
                for (int nibble = 0; nibble < 2; nibble++) {
                    int g = lane >> 2, t = lane & 3;
                    if ((uint64_t)(g + 8 * nibble) != row % 16 ||
                        (uint64_t)(16 * word + 2 * t + column_of_byte[byte]) != col % 64)
                        continue;
                    uint64_t tile = ((row / 64) * tiles_across + col / 64) * 4 + (row % 64) / 16;
                    int bits = data[tile * 512 + 16 * (uint64_t)lane + 4 * (uint64_t)word + (uint64_t)byte];
                    bits = nibble ? bits >> 4 : bits & 15;
                    return bits >= 8 ? bits - 16 : bits;
                }
    fail_msg("no byte holds row %d, column %d", (int)row, (int)col);
    return 0;
}

static void int4_tile_order(void **unused)
{
    (void)unused;
    state = 1;
    const struct kind_case c = {WEIGHT_INT4, 32};
    const uint64_t rows = 100, cols = 150;
    struct weight_shape shape;
    assert_true(weight_shape_make(&shape, c.kind, c.group_size, rows, cols));
    uint8_t *data = allocate(shape.data_bytes);
    uint16_t *scale = allocate(shape.scale_bytes);
    int8_t *codes = allocate(rows * cols);
    struct packed_row row = new_row(c, cols);
    for (uint64_t r = 0; r < rows; r++) {
        for (uint64_t col = 0; col < cols; col++)
            row.q[col] = codes[r * cols + col] = (int8_t)((int)(next_random() % 16) - 8);
        for (uint64_t g = 0; g < 5; g++)
            row.scale_f16[g] = (uint16_t)(r * 8 + g + 1);
        pack_store_row(data, scale, &shape, 0, r, &row, 0);
    }
    for (uint64_t r = 0; r < shape.rows_padded; r++)
        for (uint64_t col = 0; col < shape.cols_padded; col++) {
            int wanted = r < rows && col < cols ? codes[r * cols + col] : 0;
            int found = specified_code(data, shape.cols_padded, r, col);
            if (found != wanted)
                fail_msg("row %d column %d: %d instead of %d", (int)r, (int)col, found, wanted);
            bool high;
            uint64_t offset = weight_int4_offset(r, col, shape.cols_padded, &high);
            assert_int_equal(int4_sign_extend(high ? data[offset] >> 4 : data[offset] & 15), wanted);
        }
    uint64_t groups = shape.cols_padded / c.group_size;
    for (uint64_t r = 0; r < shape.rows_padded; r++)
        for (uint64_t g = 0; g < groups; g++)
            assert_int_equal(scale[(r / 16 * groups + g) * 16 + r % 16], r < rows && g < 5 ? r * 8 + g + 1 : 0);
    free_row(&row);
    free(codes);
    free(scale);
    free(data);
}

// Row-major kinds, element by element, with a cut at a column that is no multiple of anything.
static void row_major_order(void **unused)
{
    (void)unused;
    state = 2;
    const uint64_t rows = 70, cols = 67, whole_cols = 100, col_begin = 13;
    for (int k = 0; k < 4; k++) {
        struct kind_case c = all_kinds[k];
        struct weight_shape shape;
        assert_true(weight_shape_make(&shape, c.kind, 0, rows, cols));
        uint64_t size = code_size(c.kind);
        uint8_t *data = allocate(shape.data_bytes), *wanted = allocate(shape.data_bytes);
        float *scale = allocate(shape.scale_bytes), *wanted_scale = allocate(shape.scale_bytes);
        struct packed_row row = new_row(c, whole_cols);
        for (uint64_t r = 0; r < rows; r++) {
            for (uint64_t b = 0; b < whole_cols * size; b++)
                ((uint8_t *)row.q)[b] = (uint8_t)next_random();
            row.scale = (float)(r + 1);
            pack_store_row(data, scale, &shape, 0, r, &row, col_begin);
            memcpy(wanted + r * shape.cols_padded * size, (uint8_t *)row.q + col_begin * size, cols * size);
            if (shape.scale_bytes)
                wanted_scale[r] = row.scale;
        }
        assert_memory_equal(data, wanted, shape.data_bytes);
        assert_memory_equal(scale, wanted_scale, shape.scale_bytes + 1);
        free_row(&row);
        free(wanted_scale);
        free(scale);
        free(wanted);
        free(data);
    }
}

// Stores rows block by block as the writer does, and loads them back.
static void store_load_round_trip(void **unused)
{
    (void)unused;
    state = 3;
    static const uint64_t row_counts[] = {1, 63, 64, 65, 200}, col_counts[] = {0, 1, 31, 64, 65, 128, 200, 257};
    for (int k = 0; k < NUM_KINDS; k++)
        for (size_t i = 0; i < sizeof row_counts / sizeof *row_counts; i++)
            for (size_t j = 0; j < sizeof col_counts / sizeof *col_counts; j++) {
                struct kind_case c = all_kinds[k];
                uint64_t rows = row_counts[i], cols = col_counts[j];
                struct weight_shape shape;
                assert_true(weight_shape_make(&shape, c.kind, c.group_size, rows, cols));
                uint8_t *data = allocate(shape.data_bytes), *scale = allocate(shape.scale_bytes);
                float *x = allocate(rows * cols * sizeof *x);
                struct packed_row row = new_row(c, cols), back = new_row(c, cols);
                for (uint64_t r = 0; r < rows; r++) {
                    for (uint64_t col = 0; col < cols; col++)
                        x[r * cols + col] = next_weight();
                    assert_int_equal(pack_quantize_row(&row, c.kind, c.group_size, x + r * cols, cols, NULL, NULL), 0);
                    uint64_t block_row = r / WEIGHT_ROW_UNIT * WEIGHT_ROW_UNIT, block = r / WEIGHT_ROW_UNIT;
                    pack_store_row(data + block * pack_block_data_bytes(&shape),
                                   scale + block * pack_block_scale_bytes(&shape), &shape, block_row, r, &row, 0);
                }
                if (c.kind != WEIGHT_F32) {
                    uint64_t blocks = shape.rows_padded / WEIGHT_ROW_UNIT;
                    assert_int_equal(blocks * pack_block_data_bytes(&shape), shape.data_bytes);
                    assert_int_equal(blocks * pack_block_scale_bytes(&shape), shape.scale_bytes);
                }
                for (uint64_t r = 0; r < rows; r++) {
                    assert_int_equal(pack_quantize_row(&row, c.kind, c.group_size, x + r * cols, cols, NULL, NULL), 0);
                    memset(back.q, 0x55, cols * code_size(c.kind));
                    pack_load_row(&back, 0, data, scale, &shape, r);
                    assert_rows_equal(c, &row, &back, cols);
                }
                free_row(&back);
                free_row(&row);
                free(x);
                free(scale);
                free(data);
            }
}

// Law 1. Whole rows are quantized; ranks store slices of their columns, cut at whole groups; put together again they
// are the whole rows, bit for bit, for every number of ranks.
static void slicing_commutes(void **unused)
{
    (void)unused;
    state = 4;
    static const int tp_sizes[] = {1, 2, 3, 4, 8};
    static const uint64_t col_counts[] = {70, 320, 1000, 1024};
    const uint64_t rows = 65;
    for (int k = 0; k < NUM_KINDS; k++)
        for (size_t j = 0; j < sizeof col_counts / sizeof *col_counts; j++)
            for (size_t t = 0; t < sizeof tp_sizes / sizeof *tp_sizes; t++) {
                struct kind_case c = all_kinds[k];
                uint64_t cols = col_counts[j], unit = c.group_size ? c.group_size : 1;
                int64_t units = (int64_t)((cols + unit - 1) / unit);
                float *x = allocate(rows * cols * sizeof *x);
                for (uint64_t i = 0; i < rows * cols; i++)
                    x[i] = next_weight();
                struct packed_row row = new_row(c, cols), back[65];
                for (uint64_t r = 0; r < rows; r++)
                    back[r] = new_row(c, cols);
                for (int rank = 0; rank < tp_sizes[t]; rank++) {
                    uint64_t begin = (uint64_t)partition_begin(units, rank, tp_sizes[t]) * unit;
                    uint64_t end = (uint64_t)partition_begin(units, rank + 1, tp_sizes[t]) * unit;
                    end = end < cols ? end : cols;
                    struct weight_shape shape;
                    assert_true(weight_shape_make(&shape, c.kind, c.group_size, rows, end - begin));
                    uint8_t *data = allocate(shape.data_bytes), *scale = allocate(shape.scale_bytes);
                    for (uint64_t r = 0; r < rows; r++) {
                        assert_int_equal(pack_quantize_row(&row, c.kind, c.group_size, x + r * cols, cols, NULL, NULL),
                                         0);
                        pack_store_row(data, scale, &shape, 0, r, &row, begin);
                    }
                    for (uint64_t r = 0; r < rows; r++)
                        pack_load_row(&back[r], begin, data, scale, &shape, r);
                    free(scale);
                    free(data);
                }
                for (uint64_t r = 0; r < rows; r++) {
                    assert_int_equal(pack_quantize_row(&row, c.kind, c.group_size, x + r * cols, cols, NULL, NULL), 0);
                    assert_rows_equal(c, &row, &back[r], cols);
                    free_row(&back[r]);
                }
                free_row(&row);
                free(x);
            }
}

// ---- quality --------------------------------------------------------------------------------------------------------

// Relative root mean square error in per cent over rows of different size, as formats are compared in the literature.
static double relative_error(struct kind_case c, double (*draw)(void))
{
    enum { ROWS = 512, COLS = 4096 };
    state = 5;
    static float x[COLS], y[COLS];
    struct packed_row row = new_row(c, COLS);
    double error = 0, power = 0;
    for (int r = 0; r < ROWS; r++) {
        double size = 0.02 * exp(0.3 * next_gauss());
        for (int i = 0; i < COLS; i++)
            x[i] = (float)(size * draw());
        assert_int_equal(pack_quantize_row(&row, c.kind, c.group_size, x, COLS, NULL, NULL), 0);
        pack_dequantize_row(y, &row, c.kind, c.group_size, COLS);
        for (int i = 0; i < COLS; i++) {
            error += ((double)x[i] - y[i]) * ((double)x[i] - y[i]);
            power += (double)x[i] * x[i];
        }
    }
    free_row(&row);
    return 100 * sqrt(error / power);
}

static void error_figures(void **unused)
{
    (void)unused;
    // Gaussian figures repeat within 0.1 % for other seeds; heavy tails within 1 %: the tolerances leave room for both.
    static const struct {
        struct kind_case c;
        double (*draw)(void);
        double percent, tolerance;
    } cases[] = {
        {{WEIGHT_INT4, 128}, next_gauss, 9.66, 0.01},     {{WEIGHT_INT4, 64}, next_gauss, 8.98, 0.01},
        {{WEIGHT_INT4, 32}, next_gauss, 8.09, 0.01},      {{WEIGHT_FP8, 0}, next_gauss, 2.65, 0.01},
        {{WEIGHT_INT8, 0}, next_gauss, 0.87, 0.01},       {{WEIGHT_BF16, 0}, next_gauss, 0.166, 0.01},
        {{WEIGHT_INT4, 128}, next_student5, 14.00, 0.03},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        double found = relative_error(cases[i].c, cases[i].draw);
        if (!(fabs(found - cases[i].percent) <= cases[i].tolerance * cases[i].percent))
            fail_msg("%s group %u: %.4f %% instead of %.3f", weight_kind_name(cases[i].c.kind), cases[i].c.group_size,
                     found, cases[i].percent);
    }
}

// The same search as prose says it, in double precision and with a full second pass for every candidate.
static double best_error_by_force(const float *x, const float *a, int count)
{
    double best = INFINITY, largest = 0;
    for (int i = 0; i < count; i++)
        largest = fmax(largest, fabs((double)x[i]));
    for (int sign = -1; sign <= 1; sign += 2)
        for (int f = -12; f <= 12; f++) {
            double scale = sign * largest / 8 * (1 + 0.02 * f), xq = 0, qq = 0, error = 0;
            for (int i = 0; i < count; i++) {
                double q = fmin(fmax(rint(x[i] / scale), -8), 7);
                xq += (a ? a[i] : 1) * x[i] * q;
                qq += (a ? a[i] : 1) * q * q;
            }
            if (qq <= 0)
                continue;
            scale = f16_to_f32(f32_to_f16((float)(xq / qq * 256))) / 256.0;
            for (int i = 0; i < count; i++) {
                double q = fmin(fmax(rint(x[i] / scale), -8), 7);
                error += (a ? a[i] : 1) * (x[i] - scale * q) * (x[i] - scale * q);
            }
            best = fmin(best, error);
        }
    return best;
}

static void int4_search_is_as_good_as_force(void **unused)
{
    (void)unused;
    state = 6;
    static const int counts[] = {128, 128, 64, 32, 33, 5};
    for (int weighted = 0; weighted < 2; weighted++)
        for (size_t k = 0; k < sizeof counts / sizeof *counts; k++) {
            const struct kind_case c = {WEIGHT_INT4, 128};
            double found = 0, wanted = 0;
            float x[128], a[128], y[128];
            struct packed_row row = new_row(c, 128);
            for (int repeat = 0; repeat < 300; repeat++) {
                for (int i = 0; i < counts[k]; i++) {
                    x[i] = (float)(k == 0 ? next_student5() : next_gauss()) * 0.02f;
                    a[i] = (float)exp(next_gauss());
                }
                const float *weight = weighted ? a : NULL;
                assert_int_equal(pack_quantize_row(&row, c.kind, c.group_size, x, (uint64_t)counts[k], weight, NULL),
                                 0);
                pack_dequantize_row(y, &row, c.kind, c.group_size, (uint64_t)counts[k]);
                double best = best_error_by_force(x, weight, counts[k]);
                for (int i = 0; i < counts[k]; i++)
                    found += (weight ? weight[i] : 1) * ((double)x[i] - y[i]) * ((double)x[i] - y[i]);
                wanted += best;
            }
            // The choice among candidates is made before the scale is rounded to f16, which costs a little in tiny
            // groups, where the error itself is nothing but that rounding.
            if (!(found <= wanted * (counts[k] >= 32 ? 1.002 : 1.5)))
                fail_msg("%d values, weighted %d: squared error %g, by force %g", counts[k], weighted, found, wanted);
            free_row(&row);
        }
}

// What already lies on a grid of codes comes back exactly.
static void int4_grid_is_kept(void **unused)
{
    (void)unused;
    state = 7;
    const struct kind_case c = {WEIGHT_INT4, 64};
    struct packed_row row = new_row(c, 64);
    for (int repeat = 0; repeat < 200; repeat++) {
        float x[64], y[64];
        float scale = f16_to_f32((uint16_t)(0x2400 + next_random() % 0x1000)) * (repeat % 2 ? 0x1p-8f : -0x1p-8f);
        for (int i = 0; i < 64; i++)
            x[i] = (float)((int)(next_random() % 16) - 8) * scale;
        x[5] = -8 * scale;
        assert_int_equal(pack_quantize_row(&row, c.kind, c.group_size, x, 64, NULL, NULL), 0);
        pack_dequantize_row(y, &row, c.kind, c.group_size, 64);
        for (int i = 0; i < 64; i++)
            assert_true(x[i] == y[i]);
    }
    free_row(&row);
}

static void importance(void **unused)
{
    (void)unused;
    state = 8;
    const struct kind_case c = {WEIGHT_INT4, 128};
    struct packed_row plain = new_row(c, 300), weighted = new_row(c, 300);
    float x[300], a[300], y[300];
    double plain_error = 0, weighted_error = 0;
    for (int repeat = 0; repeat < 50; repeat++) {
        for (int i = 0; i < 300; i++) {
            x[i] = next_weight();
            a[i] = i % 7 ? 0.01f : 30.0f;
        }
        assert_int_equal(pack_quantize_row(&plain, c.kind, 128, x, 300, NULL, NULL), 0);
        assert_int_equal(pack_quantize_row(&weighted, c.kind, 128, x, 300, a, NULL), 0);
        pack_dequantize_row(y, &plain, c.kind, 128, 300);
        for (int i = 0; i < 300; i++)
            plain_error += a[i] * ((double)x[i] - y[i]) * ((double)x[i] - y[i]);
        pack_dequantize_row(y, &weighted, c.kind, 128, 300);
        for (int i = 0; i < 300; i++)
            weighted_error += a[i] * ((double)x[i] - y[i]) * ((double)x[i] - y[i]);

        // The same for all, and nothing for all, are no importance.
        for (int value = 0; value < 2; value++) {
            for (int i = 0; i < 300; i++)
                a[i] = value ? 3.0f : 0.0f;
            assert_int_equal(pack_quantize_row(&weighted, c.kind, 128, x, 300, a, NULL), 0);
            assert_rows_equal(c, &plain, &weighted, 300);
        }
    }
    assert_true(weighted_error < 0.9 * plain_error);
    free_row(&weighted);
    free_row(&plain);
}

// ---- extremes -------------------------------------------------------------------------------------------------------

static void extremes(void **unused)
{
    (void)unused;
    static const struct {
        float value, other; // first element of the row, the rest
        float int4_limit;   // largest error of the first element, relative; 1: it may vanish or saturate
    } cases[] = {
        {0, 0, 0},
        {-0.0f, 0, 0},
        {1, 0, 0.0005f},
        {-1, 0, 0.0005f},
        {0x1p-149f, 0, 1},
        {-0x1p-130f, 0x1p-149f, 1},
        {FLT_MIN, -FLT_MIN, 1},
        {1e-30f, 1e-31f, 1},
        {2e-10f, 1e-10f, 1},
        {4e-6f, 1e-6f, 0.15f},
        {1990, 3, 0.15f},
        {2100, 1, 1},
        {FLT_MAX, -FLT_MAX, 1},
        {FLT_MAX, 1, 1},
        {-3e38f, 1e-38f, 1},
    };
    enum { COLS = 130 };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (int k = 0; k < NUM_KINDS; k++) {
            struct kind_case c = all_kinds[k];
            float x[COLS], y[COLS];
            for (int j = 0; j < COLS; j++)
                x[j] = cases[i].other;
            x[0] = cases[i].value;
            struct packed_row row = new_row(c, COLS);
            assert_int_equal(pack_quantize_row(&row, c.kind, c.group_size, x, COLS, NULL, NULL), 0);
            pack_dequantize_row(y, &row, c.kind, c.group_size, COLS);
            float limit = c.kind == WEIGHT_INT4 ? cases[i].int4_limit : fabsf(x[0]) < 1e-35f ? 1 : 0.004f;
            for (int j = 0; j < COLS; j++)
                if (!isfinite(y[j]) && !(c.kind == WEIGHT_BF16 && fabsf(x[j]) > 3.39e38f)) // bf16 rounds FLT_MAX to Inf
                    fail_msg("case %zu, %s: column %d is %g", i, weight_kind_name(c.kind), j, (double)y[j]);
            if (isfinite(y[0]) && !(fabs((double)y[0] - x[0]) <= (double)limit * fabs((double)x[0])))
                fail_msg("case %zu, %s: %g became %g", i, weight_kind_name(c.kind), (double)x[0], (double)y[0]);
            for (uint32_t g = 0; c.kind == WEIGHT_INT4 && g < (COLS + c.group_size - 1) / c.group_size; g++) {
                assert_true((row.scale_f16[g] & 0x7c00) != 0x7c00); // no Inf, no NaN
                assert_true(row.scale_f16[g] != 0x8000);            // zero has one spelling
            }
            free_row(&row);
        }
}

static void not_finite(void **unused)
{
    (void)unused;
    static const struct {
        uint32_t bits;
        const char *word;
    } values[] = {{0x7f800000, "infinite"}, {0xff800000, "infinite"}, {0x7fc00000, "NaN"},
                  {0xffc10000, "NaN"},      {0x7f810000, "NaN"},      {0xff8f0000, "NaN"}};
    for (size_t v = 0; v < sizeof values / sizeof *values; v++)
        for (uint64_t col = 0; col < 70; col += 69)
            for (int k = 0; k < NUM_KINDS; k++) {
                struct kind_case c = all_kinds[k];
                float x[70];
                for (int i = 0; i < 70; i++)
                    x[i] = 1;
                memcpy(&x[col], &values[v].bits, 4);
                struct packed_row row = new_row(c, 70);
                struct error err = {0};
                int rc = pack_quantize_row(&row, c.kind, c.group_size, x, 70, NULL, &err);
                if (c.kind == WEIGHT_F32) {
                    assert_int_equal(rc, 0);
                    assert_memory_equal(row.f32, x, sizeof x);
                } else if (c.kind == WEIGHT_BF16) {
                    assert_int_equal(rc, 0);
                    assert_int_equal(row.bf16[col], values[v].bits >> 16); // a NaN keeps its bits
                } else {
                    char wanted[64];
                    snprintf(wanted, sizeof wanted, "column %d is %s", (int)col, values[v].word);
                    assert_int_equal(rc, ERR_MODEL);
                    assert_non_null(strstr(err.msg, wanted));
                }
                free_row(&row);
            }
}

// Every bf16 value that a checkpoint can hold goes through unchanged.
static void bf16_is_exact(void **unused)
{
    (void)unused;
    const struct kind_case c = {WEIGHT_BF16, 0};
    float *x = allocate(65536 * sizeof *x);
    for (uint32_t i = 0; i < 65536; i++) {
        uint32_t bits = i << 16;
        memcpy(&x[i], &bits, sizeof bits);
    }
    struct packed_row row = new_row(c, 65536);
    assert_int_equal(pack_quantize_row(&row, c.kind, 0, x, 65536, NULL, NULL), 0);
    for (uint32_t i = 0; i < 65536; i++)
        assert_int_equal(row.bf16[i], i);
    free_row(&row);
    free(x);
}

// ---- the same bytes everywhere --------------------------------------------------------------------------------------

// Hashes of stored bytes: every compiler, optimisation level and instruction set must give these.
static void golden_bytes(void **unused)
{
    (void)unused;
    static const struct {
        struct kind_case c;
        bool weighted;
        uint64_t data, scale;
    } cases[] = {
        {{WEIGHT_F32, 0}, false, 0x72fe510572300cef, 0},
        {{WEIGHT_BF16, 0}, false, 0x306682f8be1ee444, 0},
        {{WEIGHT_INT8, 0}, false, 0xaa0c92c0e99cbd7f, 0x7ad51567640a2bf0},
        {{WEIGHT_FP8, 0}, false, 0xb4b5664f5bffbab3, 0x4f57352dc13ce9af},
        {{WEIGHT_INT4, 32}, false, 0x596dfb47d6df4b69, 0xc0fe04fa27fe8090},
        {{WEIGHT_INT4, 64}, false, 0x498923e388125966, 0xb800046c633a0cd0},
        {{WEIGHT_INT4, 128}, false, 0x7ae7ed9ba4d6fb51, 0x709a3a9ef37ce794},
        {{WEIGHT_INT4, 128}, true, 0x90df05eaf985927c, 0x43b06e9c679ccabc},
    };
    const uint64_t rows = 1000, cols = 1000; // enough groups for a sum in another order to show
    int num_different = 0;
    float *x = allocate(cols * sizeof *x), *a = allocate(cols * sizeof *a);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct kind_case c = cases[i].c;
        state = 9;
        struct weight_shape shape;
        assert_true(weight_shape_make(&shape, c.kind, c.group_size, rows, cols));
        uint8_t *data = allocate(shape.data_bytes), *scale = allocate(shape.scale_bytes);
        struct packed_row row = new_row(c, cols);
        for (uint64_t r = 0; r < rows; r++) {
            for (uint64_t j = 0; j < cols; j++) {
                x[j] = next_weight() * (r % 10 == 3 ? 0x1p-19f : r % 10 == 5 ? 0x1p13f : 1.0f);
                a[j] = (float)(next_random() & 0xff);
            }
            assert_int_equal(pack_quantize_row(&row, c.kind, c.group_size, x, cols, cases[i].weighted ? a : NULL, NULL),
                             0);
            pack_store_row(data, scale, &shape, 0, r, &row, 0);
        }
        uint64_t data_hash = checksum_leaf(data, shape.data_bytes);
        uint64_t scale_hash = shape.scale_bytes ? checksum_leaf(scale, shape.scale_bytes) : 0;
        if (data_hash != cases[i].data || scale_hash != cases[i].scale) {
            print_error("%s group %u weighted %d: 0x%016llx, 0x%016llx\n", weight_kind_name(c.kind), c.group_size,
                        cases[i].weighted, (unsigned long long)data_hash, (unsigned long long)scale_hash);
            num_different++;
        }
        free_row(&row);
        free(scale);
        free(data);
    }
    free(a);
    free(x);
    assert_int_equal(num_different, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(shapes),
        cmocka_unit_test(kind_names),
        cmocka_unit_test(int4_tile_order),
        cmocka_unit_test(row_major_order),
        cmocka_unit_test(store_load_round_trip),
        cmocka_unit_test(slicing_commutes),
        cmocka_unit_test(error_figures),
        cmocka_unit_test(int4_search_is_as_good_as_force),
        cmocka_unit_test(int4_grid_is_kept),
        cmocka_unit_test(importance),
        cmocka_unit_test(extremes),
        cmocka_unit_test(not_finite),
        cmocka_unit_test(bf16_is_exact),
        cmocka_unit_test(golden_bytes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
