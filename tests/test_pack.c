// Sizes of weights and stored layouts: the order of the bytes against the specification, and law 1: slicing and quantizing
// commute.
#include "formats/model_desc.h"
#include "formats/number_formats.h"
#include "tests/pack_help.h"

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
        {WEIGHT_INT4Z, 32, 65, 96, true, 128, 128, 8192, 2048},
        {WEIGHT_INT4Z, 128, 64, 129, true, 64, 256, 8192, 512},
        {WEIGHT_NL4, 32, 65, 96, true, 128, 128, 8192, 1024},
        {WEIGHT_NL4, 128, 64, 129, true, 64, 256, 8192, 256},
        {WEIGHT_FP8G, 128, 64, 129, true, 64, 256, 16384, 512},
        {WEIGHT_FP8G, 128, 0, 129, true, 0, 256, 0, 0},
        {WEIGHT_MXFP4, 32, 2880, 2880, true, 2880, 2880, 4147200, 259200},
        {WEIGHT_MXFP4, 32, 1, 65, true, 64, 128, 4096, 256},
        {WEIGHT_NVFP4, 16, 65, 65, true, 128, 128, 8192, 1536},
        {WEIGHT_NVFP4, 16, 65, 0, true, 128, 0, 0, 512},
        {WEIGHT_NVFP4, 16, 0x7fffffff, 0x7fffffff, true, 0x80000000u, 0x80000000u, 1ull << 61,
         (1ull << 58) + (1ull << 33)},
        {WEIGHT_INT4Z, 16, 64, 64, false, 0, 0, 0, 0},
        {WEIGHT_NL4, 16, 64, 64, false, 0, 0, 0, 0},
        {WEIGHT_NL4, 0, 64, 64, false, 0, 0, 0, 0},
        {WEIGHT_FP8G, 0, 64, 64, false, 0, 0, 0, 0},
        {WEIGHT_FP8G, 64, 64, 64, false, 0, 0, 0, 0},
        {WEIGHT_MXFP4, 16, 64, 64, false, 0, 0, 0, 0},
        {WEIGHT_MXFP4, 0, 64, 64, false, 0, 0, 0, 0},
        {WEIGHT_NVFP4, 32, 64, 64, false, 0, 0, 0, 0},
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
    static const char *const names[WEIGHT_KIND_COUNT] = {"f32",   "bf16", "int8",  "fp8",   "int4",
                                                         "int4z", "fp8g", "mxfp4", "nvfp4", "nl4"};
    for (int i = 0; i < WEIGHT_KIND_COUNT; i++) {
        enum weight_kind kind = WEIGHT_KIND_COUNT;
        assert_string_equal(weight_kind_name((enum weight_kind)i), names[i]);
        assert_true(weight_kind_from_name(names[i], &kind));
        assert_int_equal(kind, i);
        struct weight_shape shape;
        assert_true(weight_group_valid(kind, weight_group_default(kind)));
        assert_true(weight_shape_make(&shape, kind, weight_group_default(kind), 1, 1));
    }
    enum weight_kind kind = WEIGHT_INT8;
    assert_false(weight_kind_from_name("int5", &kind));
    assert_false(weight_kind_from_name("", &kind));
    assert_int_equal(kind, WEIGHT_INT8);
}

// ---- stored layouts -------------------------------------------------------------------------------------------------

// The nibble of (row, col), looked up as the specification says it: by tile, lane, word, byte and nibble.
static int specified_nibble(const uint8_t *data, uint64_t cols_padded, uint64_t row, uint64_t col)
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
                    return nibble ? bits >> 4 : bits & 15;
                }
    fail_msg("no byte holds row %d, column %d", (int)row, (int)col);
    return 0;
}

// Every number of a stored matrix of a kind with groups, by the formulas of formats/weight.h.
static void tile_and_scale_order(void **unused)
{
    (void)unused;
    state = 1;
    const uint64_t rows = 100, cols = 150;
    for (int k = 0; k < NUM_KINDS; k++) {
        const struct kind_case c = all_kinds[k];
        if (!c.group_size)
            continue;
        uint64_t row_groups = (cols + c.group_size - 1) / c.group_size, size = group_scale_size(c.kind);
        struct weight_shape shape;
        assert_true(weight_shape_make(&shape, c.kind, c.group_size, rows, cols));
        uint64_t groups = shape.cols_padded / c.group_size;
        uint8_t *data = allocate(shape.data_bytes), *scale = allocate(shape.scale_bytes);
        uint8_t *wanted = allocate(shape.scale_bytes), *codes = allocate(rows * cols);
        struct packed_row row = new_row(c, cols);
        for (uint64_t r = 0; r < rows; r++) {
            for (uint64_t col = 0; col < cols; col++)
                row.e4m3[col] = codes[r * cols + col] = (uint8_t)next_random();
            if (c.kind == WEIGHT_NVFP4) {
                uint64_t block = 64 * groups + 256;
                row.scale = (float)(r + 1);
                memcpy(wanted + r / 64 * block + 64 * groups + r % 64 * 4, &row.scale, 4);
            }
            for (uint64_t g = 0; g < row_groups; g++) {
                uint32_t number = (uint32_t)next_random() | 1, zero = (uint32_t)next_random() | 1;
                uint64_t at = (r / 16 * groups + g) * 16 + r % 16;
                memcpy((uint8_t *)row.group_scales + g * size, &number, size);
                if (c.kind == WEIGHT_INT4Z) {
                    at += (r / 16 * groups + g) * 16; // scales and zeros of 16 rows take turns
                    row.zero_f16[g] = (uint16_t)zero;
                    memcpy(wanted + (at + 16) * 2, &zero, 2);
                }
                memcpy(wanted + at * size + (c.kind == WEIGHT_NVFP4 ? r / 64 * 256 : 0), &number, size);
            }
            pack_store_row(data, scale, &shape, 0, r, &row, 0);
        }
        for (uint64_t r = 0; r < shape.rows_padded; r++)
            for (uint64_t col = 0; col < shape.cols_padded; col++) {
                int code = r < rows && col < cols ? codes[r * cols + col] : 0, found = data[r * shape.cols_padded / 2];
                if (c.kind == WEIGHT_FP8G) {
                    found = data[r * shape.cols_padded + col];
                } else {
                    code &= 15;
                    found = specified_nibble(data, shape.cols_padded, r, col);
                    bool high;
                    uint64_t offset = weight_tile_offset(r, col, shape.cols_padded, &high);
                    assert_int_equal(high ? data[offset] >> 4 : data[offset] & 15, code);
                }
                if (found != code)
                    fail_msg("%s row %d column %d: %d instead of %d", weight_kind_name(c.kind), (int)r, (int)col, found,
                             code);
            }
        assert_memory_equal(scale, wanted, shape.scale_bytes);
        free_row(&row);
        free(codes);
        free(wanted);
        free(scale);
        free(data);
    }
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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(shapes),
        cmocka_unit_test(kind_names),
        cmocka_unit_test(tile_and_scale_order),
        cmocka_unit_test(row_major_order),
        cmocka_unit_test(store_load_round_trip),
        cmocka_unit_test(slicing_commutes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
