// The device's operations over rows, in the emulator, against the scalar kernel table and the number formats.
//
// Bit for bit: embed, every input format of given f32 rows, activate, finish_qkv without norms (the emulator's cosf is the host's; a
// device's is not), and a norm whose sum of squares is exact. Norms of arbitrary rows against double arithmetic. Each at several seeds
// of the emulator.
#include "tests/device/cuda_test.h"

extern "C" {
#include "kernels/kv.h"
#include "kernels/kv_codes.h"
}

static const uint64_t seeds[] = {1, 2, 77};

// ---- input formats -------------------------------------------------------------------------------------------------

static const enum input_format formats[] = {INPUT_F16,       INPUT_F16_TILE, INPUT_BF16,      INPUT_INT8,
                                            INPUT_INT8_TILE, INPUT_E4M3,     INPUT_MXFP8_TILE};
static const char *const format_names[] = {"f16", "f16 tile", "bf16", "int8", "int8 tile", "e4m3", "mxfp8 tile"};

static int64_t value_bytes(enum input_format format) { return format <= INPUT_BF16 ? 2 : 1; }

// Column of the element at `place` of a row.
static int64_t column_at(enum input_format format, int64_t place)
{
    static const int f16_column[4] = {0, 1, 8, 9}, int8_column[4] = {0, 8, 1, 9};
    int64_t block = place / 64 * 64, in = place % 64;
    if (format == INPUT_F16_TILE) // t * 16 + w * 4 + j
        return block + 16 * (in / 4 % 4) + 2 * (in / 16) + f16_column[in % 4];
    if (format == INPUT_INT8_TILE || format == INPUT_MXFP8_TILE) // (t * 4 + w) * 4 + j
        return block + 16 * (in / 4 % 4) + 2 * (in / 16) + int8_column[in % 4];
    return place;
}

static struct device_input new_input(enum input_format format, int64_t rows, int64_t cols)
{
    struct device_input out;
    out.stride = round_up_to(cols, 128);
    out.values = device_new(rows * out.stride * value_bytes(format));
    out.scale = device_array<float>(rows * (out.stride / 128));
    return out;
}

// What one row of the int8 formats must be, by the CPU's table.
static void check_int8_row(struct device_input in, enum input_format format, int64_t row, const float *x, int64_t cols,
                           const char *what)
{
    struct error err;
    struct activations act;
    struct matrix w = {};
    w.shape.kind = format == INPUT_INT8 ? WEIGHT_INT8 : WEIGHT_INT4;
    w.shape.cols = (uint64_t)cols;
    assert_int_equal(activations_alloc(&act, 1, cols, &err), 0);
    scalar()->prepare(&act, &w, x, cols, 0, 1);
    const int8_t *q = (const int8_t *)in.values + row * in.stride;
    for (int64_t i = 0; i < round_up_to(cols, 128); i++)
        if (q[i] != act.q[i])
            fail_msg("%s, row %lld: byte %lld is %d, not %d", what, (long long)row, (long long)i, q[i], act.q[i]);
    for (int64_t g = 0; g < round_up_to(cols, 128) / 128; g++)
        if (!same(in.scale[row * (in.stride / 128) + g], act.q_scale[g]))
            fail_msg("%s, row %lld: scale %lld is %.9g, not %.9g", what, (long long)row, (long long)g,
                     (double)in.scale[row * (in.stride / 128) + g], (double)act.q_scale[g]);
    activations_free(&act);
}

static void check_mxfp8_row(struct device_input in, int64_t row, const float *x, int64_t cols, const char *what)
{
    const uint8_t *values = (const uint8_t *)in.values + row * in.stride;
    const uint8_t *scales = (const uint8_t *)in.scale + row * (in.stride / 32);
    for (int64_t g = 0; g < round_up_to(cols, 128) / 32; g++) {
        float amax = 0;
        int want = 127;
        for (int64_t c = g * 32; c < g * 32 + 32 && c < cols; c++)
            amax = isfinite(x[c]) ? fmaxf(amax, fabsf(x[c])) : INFINITY;
        if (isinf(amax))
            want = 255;
        else if (amax >= 0x1p-100f)
            for (want = 1; ldexp((double)amax, 127 - want) > 448; want++)
                ;
        if (scales[g] != want)
            fail_msg("%s, row %lld: scale %lld is %d, not %d", what, (long long)row, (long long)g, scales[g], want);
    }
    for (int64_t i = 0; i < round_up_to(cols, 128); i++) {
        int64_t col = column_at(INPUT_MXFP8_TILE, i);
        int scale = scales[col / 32];
        uint32_t want = scale == 255 ? 0x7f : col < cols ? f32_to_e4m3((float)ldexp((double)x[col], 127 - scale)) : 0;
        uint32_t got = values[i] & (scale == 255 || (want & 0x7f) == 0 ? 0x7f : 0xff); // NaN and zero of either sign
        if (got != (want & (got == 0 ? 0x7f : 0xff)))
            fail_msg("%s, row %lld: element %lld (column %lld) is %#x, not %#x", what, (long long)row, (long long)i,
                     (long long)col, values[i], want);
    }
}

// What one row of any format must be, given its f32 values.
static void check_row(struct device_input in, enum input_format format, int64_t row, const float *x, int64_t cols,
                      const char *operation)
{
    char what[128];
    snprintf(what, sizeof what, "%s, %s, %lld columns", operation, format_names[format], (long long)cols);
    if (format == INPUT_INT8 || format == INPUT_INT8_TILE) {
        check_int8_row(in, format, row, x, cols, what);
        return;
    }
    if (format == INPUT_MXFP8_TILE) {
        check_mxfp8_row(in, row, x, cols, what);
        return;
    }
    uint32_t largest = 0;
    for (int64_t i = 0; i < cols; i++) {
        uint32_t magnitude = f32_bits(x[i]) & 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
    }
    float amax = f32_from_bits(largest), scale = 1.0f;
    bool finite = largest < 0x7f800000;
    if (format == INPUT_E4M3)
        scale = !finite ? NAN : amax < 0x1p-100f ? 0.0f : amax / 448.0f;
    else if (format != INPUT_BF16 && finite)
        while (amax / scale > 32768.0f)
            scale *= 2;
    if (format != INPUT_BF16 && !same(in.scale[row], scale))
        fail_msg("%s, row %lld: scale %.9g, not %.9g", what, (long long)row, (double)in.scale[row], (double)scale);
    for (int64_t i = 0; i < round_up_to(cols, 128); i++) {
        int64_t col = column_at(format, i);
        float value = col < cols ? x[col] : 0.0f;
        uint32_t want, got;
        if (format == INPUT_E4M3) {
            want = finite && scale > 0 ? f32_to_e4m3(value * (448.0f / amax)) : 0;
            got = ((const uint8_t *)in.values)[row * in.stride + i];
        } else {
            want = format == INPUT_BF16 ? f32_to_bf16(value) : f32_to_f16(value / scale);
            got = ((const uint16_t *)in.values)[row * in.stride + i];
            if (isnan(value) && (got & 0x7fff) > (format == INPUT_BF16 ? 0x7f80 : 0x7c00))
                continue; // any NaN will do
        }
        if (got != want)
            fail_msg("%s, row %lld: element %lld (column %lld, %.9g) is %#x, not %#x", what, (long long)row,
                     (long long)i, (long long)col, (double)value, got, want);
    }
}

enum { ORDINARY, WITH_NAN, WITH_INF, ZEROS, TINY, HUGE_VALUES, SUBNORMAL, OVER_32768, ROW_KINDS };

static void fill_row(float *x, int64_t cols, int kind)
{
    static const float factor[ROW_KINDS] = {3, 3, 3, 0, 0x1p-101f, 0x1p+100f, 0x1p-130f, 50000};
    for (int64_t i = 0; i < cols; i++)
        x[i] = centred() * factor[kind];
    if (kind == WITH_NAN)
        x[cols / 2] = NAN;
    if (kind == WITH_INF)
        x[cols - 1] = -INFINITY;
    if (kind == OVER_32768)
        x[0] = 40000;
}

// 9000 and more: beyond what a block keeps in shared memory.
static const int64_t widths[] = {1, 2, 3, 63, 64, 65, 100, 127, 128, 130, 257, 1000, 2880, 9000, 9001};

static void prepare_writes_every_format(void **state)
{
    (void)state;
    for (size_t w = 0; w < sizeof widths / sizeof *widths; w += quick() ? 5 : 1) {
        int64_t cols = widths[w], rows = cols > 5000 ? 2 : ROW_KINDS, x_stride = cols + (w % 3 == 0 ? 4 : w % 3);
        float *x = floats(rows * x_stride);
        for (int64_t row = 0; row < rows; row++)
            fill_row(x + row * x_stride, cols, (int)row);
        float *device_x = device_copy(x, rows * x_stride);
        for (enum input_format format : formats) {
            emulator_seed(seeds[w % 3]);
            struct device_input out = new_input(format, rows, cols);
            finish(launch_prepare(out, format, device_x, x_stride, NULL, rows, cols, 0));
            for (int64_t row = 0; row < rows; row++)
                check_row(out, format, row, x + row * x_stride, cols, "prepare");
            free_input(out);
        }
        cudaFree(device_x);
        free(x);
    }
}

// Rows that are kept stand next to each other: none may write into another, in whatever order the blocks run.
static void kept_rows_stay_apart(void **state)
{
    (void)state;
    enum { ROWS = 5 };
    static const int64_t cols_of[] = {48, 100, 202, 257, 2880};
    for (int64_t cols : cols_of) {
        float *x = floats(ROWS * cols), *want = floats(ROWS * cols), *ones = floats(cols);
        for (int64_t row = 0; row < ROWS; row++)
            fill_row(x + row * cols, cols, ORDINARY);
        for (int64_t i = 0; i < cols; i++)
            ones[i] = 1;
        for (int64_t row = 0; row < ROWS; row++)
            scalar()->rms_norm(want + row * cols, x + row * cols, ones, cols, 1e-5f);
        float *residual = device_copy(x, ROWS * cols), *weight = device_copy(ones, cols);
        struct device_input out = {};
        out.values = device_new(ROWS * cols * (int64_t)sizeof(float));
        out.stride = cols;
        for (uint64_t seed = 0; seed < 4; seed++) {
            emulator_seed(seed);
            cudaMemset(out.values, 0xff, (size_t)(ROWS * cols) * sizeof(float));
            finish(launch_norm(out, INPUT_F32, residual, {}, weight, NULL, ROWS, cols, 1e-5f, 0));
            for (int64_t i = 0; i < ROWS * cols; i++)
                if (!(fabsf(((const float *)out.values)[i] - want[i]) <= 1e-5f * fabsf(want[i])))
                    fail_msg("%lld columns: value %lld is %.9g, not %.9g", (long long)cols, (long long)i,
                             (double)((const float *)out.values)[i], (double)want[i]);
        }
        cudaFree(out.values);
        cudaFree(residual);
        cudaFree(weight);
        free(x);
        free(want);
        free(ones);
    }
}

// Columns gathered in an order of their own.
static void prepare_follows_an_order(void **state)
{
    (void)state;
    static const int64_t cols_of[] = {100, 257, 9001};
    for (int64_t cols : cols_of) {
        float *x = floats(2 * cols), *order = floats(cols), *want = floats(2 * cols);
        fill_row(x, cols, ORDINARY);
        fill_row(x + cols, cols, OVER_32768);
        for (int64_t i = 0; i < cols; i++) {
            order[i] = (float)((i * 7 + 3) % cols);
            want[i] = x[(i * 7 + 3) % cols];
            want[cols + i] = x[cols + (i * 7 + 3) % cols];
        }
        float *device_x = device_copy(x, 2 * cols), *device_order = device_copy(order, cols);
        for (enum input_format format : formats) {
            struct device_input out = new_input(format, 2, cols);
            finish(launch_prepare(out, format, device_x, cols, device_order, 2, cols, 0));
            for (int64_t row = 0; row < 2; row++)
                check_row(out, format, row, want + row * cols, cols, "prepare in order");
            free_input(out);
        }
        cudaFree(device_x);
        cudaFree(device_order);
        free(x);
        free(order);
        free(want);
    }
}

static void activate_is_the_cpus(void **state)
{
    (void)state;
    const struct kernels *k = scalar();
    for (size_t w = 0; w < sizeof widths / sizeof *widths; w += quick() ? 5 : 1) {
        int64_t cols = widths[w], rows = cols > 5000 ? 1 : 3;
        float *x = floats(rows * 2 * cols), *bias = floats(2 * cols);
        float *want = floats(2 * cols);
        for (int64_t i = 0; i < rows * 2 * cols; i++)
            x[i] = centred() * (i % 7 == 0 ? 120.0f : 4.0f); // exp from 0 to Inf
        if (rows > 2)
            x[2 * 2 * cols] = NAN;
        for (int64_t i = 0; i < 2 * cols; i++)
            bias[i] = centred();
        float *device_x = device_copy(x, rows * 2 * cols), *device_bias = device_copy(bias, 2 * cols);
        for (enum input_format format : formats)
            for (int with_bias = 0; with_bias < 2; with_bias++) {
                emulator_seed(seeds[(w + 1) % 3]);
                enum activation activation = (enum activation)((w + (size_t)format + (size_t)with_bias) % 3);
                struct device_input out = new_input(format, rows, cols);
                finish(launch_activate(out, format, activation, 0, device_x, with_bias ? device_bias : NULL, rows, cols,
                                       0));
                for (int64_t row = 0; row < rows; row++) {
                    memcpy(want, x + row * 2 * cols, (size_t)cols * 8);
                    if (with_bias)
                        k->add(want, bias, 2 * cols);
                    k->activate(want, want, want + cols, cols, activation);
                    check_row(out, format, row, want, cols, with_bias ? "activate with bias" : "activate");
                }
                free_input(out);
            }
        cudaFree(device_x);
        cudaFree(device_bias);
        free(x);
        free(bias);
        free(want);
    }
}

// Every block in every format, also of rows whose last group of 128 columns is not full and of more than are kept in shared memory.
static void activate_rotates_as_the_cpu(void **state)
{
    (void)state;
    const struct kernels *k = scalar();
    static const int64_t columns[] = {128, 384, 64, 224, 8320};
    for (size_t w = 0; w < sizeof columns / sizeof *columns; w++) {
        int64_t cols = columns[w], rows = cols > 5000 ? 1 : 2;
        float *x = floats(rows * 2 * cols), *want = floats(2 * cols);
        for (int64_t i = 0; i < rows * 2 * cols; i++)
            x[i] = centred() * (i % 7 == 0 ? 120.0f : 4.0f);
        float *device_x = device_copy(x, rows * 2 * cols);
        for (int64_t block = cols > 5000 ? 128 : 2; block <= 128 && cols % block == 0; block *= 2)
            for (enum input_format format : formats) {
                struct device_input out = new_input(format, rows, cols);
                emulator_seed(seeds[w % 3]);
                finish(launch_activate(out, format, ACTIVATION_SILU, block, device_x, NULL, rows, cols, 0));
                for (int64_t row = 0; row < rows; row++) {
                    memcpy(want, x + row * 2 * cols, (size_t)cols * 8);
                    k->activate(want, want, want + cols, cols, ACTIVATION_SILU);
                    k->hadamard(want, cols, block);
                    check_row(out, format, row, want, cols, "rotated activation");
                }
                free_input(out);
            }
        cudaFree(device_x);
        free(x);
        free(want);
    }
}

// ---- norm ----------------------------------------------------------------------------------------------------------

struct norm_case {
    bool partial, bias, join_norm, indexed, weight;
    float scale;
};
static const struct norm_case norm_cases[] = {
    {false, false, false, false, true, 1}, {true, false, false, false, true, 1}, {true, true, false, false, true, 0.5f},
    {false, false, false, true, true, 1},  {true, true, false, true, true, 1},   {true, true, true, false, true, 1},
    {true, false, true, true, true, 2},    {true, true, false, false, false, 1},
};
enum { NORM_ROWS = 4, INDEXED_ROWS = 3 };
static const int32_t norm_index[INDEXED_ROWS] = {3, 0, 3};

// exact: small integers, so that no sum of squares rounds and the CPU's bits are due.
static void check_norm(int64_t cols, struct norm_case how, bool exact, enum input_format format)
{
    const struct kernels *k = scalar();
    const float eps = 1e-5f;
    int64_t count = NORM_ROWS * cols;
    float *residual = floats(count), *partial = floats(count), *bias = floats(cols), *join_norm = floats(cols);
    float *weight = floats(cols), *x = floats(count), *want = floats(cols);
    for (int64_t i = 0; i < count; i++) {
        residual[i] = exact ? (float)(int)(centred() * 4) : centred() * 4;
        partial[i] = exact ? (float)(int)(centred() * 4) : centred() * 4;
    }
    for (int64_t i = 0; i < cols; i++) {
        bias[i] = exact ? (float)(int)(centred() * 2) : centred();
        weight[i] = 1 + centred() / 2;
        join_norm[i] = 1 + centred() / 2;
    }
    for (int64_t row = 0; row < NORM_ROWS; row++) {
        memcpy(x + row * cols, residual + row * cols, (size_t)cols * 4);
        if (!how.partial)
            continue;
        memcpy(want, partial + row * cols, (size_t)cols * 4);
        if (how.bias)
            k->add(want, bias, cols);
        if (how.join_norm)
            k->rms_norm(want, want, join_norm, cols, eps);
        k->add_scaled(x + row * cols, want, cols, how.scale);
    }
    int64_t rows = how.indexed ? INDEXED_ROWS : NORM_ROWS;
    float *device_residual = device_copy(residual, count), *device_partial = device_copy(partial, count);
    float *device_bias = device_copy(bias, cols), *device_norm = device_copy(join_norm, cols);
    float *device_weight = device_copy(weight, cols);
    int32_t *device_index = device_copy(norm_index, INDEXED_ROWS);
    struct device_join join = {how.partial ? device_partial : NULL, how.bias ? device_bias : NULL,
                               how.join_norm ? device_norm : NULL, how.scale};
    struct device_input out = new_input(format, rows, cols);
    finish(launch_norm(out, format, device_residual, join, how.weight ? device_weight : NULL,
                       how.indexed ? device_index : NULL, rows, cols, eps, 0));

    // A sum of squares is off by (4 * groups / warps + 6) * 2^-24: at most 2^-18 here. A sum over another norm is rounded once more.
    bool written = how.partial && !how.indexed, close = how.join_norm && !exact;
    for (int64_t i = 0; i < count; i++) {
        float due = written ? x[i] : residual[i];
        if (close ? !(fabsf(device_residual[i] - due) <= 0x1p-17f * (fabsf(due) + 8)) : !same(device_residual[i], due))
            fail_msg("norm, %lld columns: residual %lld is %.9g, not %.9g", (long long)cols, (long long)i,
                     (double)device_residual[i], (double)due);
    }
    for (int64_t row = 0; row < rows; row++) {
        const float *source = x + (how.indexed ? norm_index[row] : row) * cols;
        if (exact && !(how.join_norm && how.weight)) {
            memcpy(want, source, (size_t)cols * 4);
            if (how.weight)
                k->rms_norm(want, source, weight, cols, eps);
            check_row(out, format, row, want, cols, "exact norm");
            continue;
        }
        if (format != INPUT_BF16)
            continue;
        double squares = 0;
        for (int64_t i = 0; i < cols; i++)
            squares += (double)source[i] * source[i];
        for (int64_t i = 0; i < cols; i++) {
            double inverse = how.weight ? 1 / sqrt(squares / (double)cols + eps) : 1;
            double exactly = source[i] * inverse * (how.weight ? weight[i] : 1);
            double got = bf16_to_f32(((const uint16_t *)out.values)[row * out.stride + i]);
            if (!(fabs(got - exactly) <= fabs(exactly) * (0x1p-8 + 0x1p-17) + close * 0x1p-14 * inverse))
                fail_msg("norm, %lld columns: element %lld is %.9g, not %.9g", (long long)cols, (long long)i, got,
                         exactly);
        }
    }
    free_input(out);
    void *const devices[] = {device_residual, device_partial, device_bias, device_weight, device_norm, device_index};
    for (void *memory : devices)
        cudaFree(memory);
    void *const hosts[] = {residual, partial, bias, weight, join_norm, x, want};
    for (void *memory : hosts)
        free(memory);
}

static void norm_follows_the_cpu(void **state)
{
    (void)state;
    int turn = 0;
    for (size_t w = 0; w < sizeof widths / sizeof *widths; w += quick() ? 5 : 1)
        for (struct norm_case how : norm_cases) {
            emulator_seed(seeds[turn++ % 3]);
            check_norm(widths[w], how, true, formats[turn % (sizeof formats / sizeof *formats)]);
            check_norm(widths[w], how, false, INPUT_BF16);
        }
    for (enum input_format format : formats)
        check_norm(1000, norm_cases[2], true, format);
    if (quick())
        return;
    check_norm(65536, norm_cases[2], true, INPUT_INT8);
    check_norm(65536, norm_cases[2], true, INPUT_E4M3);
}

// ---- embed ---------------------------------------------------------------------------------------------------------

static void fill(float *x, uint64_t row, uint64_t cols)
{
    (void)row;
    for (uint64_t i = 0; i < cols; i++)
        x[i] = i % 5 == 0 ? -0.0f : centred();
}

static void embed_is_the_cpus(void **state)
{
    (void)state;
    static const struct kind_case kinds[] = {{WEIGHT_F32, 0},    {WEIGHT_BF16, 0},   {WEIGHT_INT8, 0},
                                             {WEIGHT_FP8, 0},    {WEIGHT_INT4, 32},  {WEIGHT_INT4, 128},
                                             {WEIGHT_INT4Z, 64}, {WEIGHT_FP8G, 128}, {WEIGHT_MXFP4, 32},
                                             {WEIGHT_NVFP4, 16}, {WEIGHT_NL4, 64}};
    static const uint32_t tokens[] = {1000, 1069, 999, 1070, 1063, 1064, 1017, 0, UINT32_MAX};
    enum { ROWS = 70, VOCAB_BEGIN = 1000, TOKENS = sizeof tokens / sizeof *tokens };
    static const int64_t cols_of[] = {1, 64, 101, 130, 132, 2880};
    uint32_t *device_tokens = device_copy(tokens, (int64_t)(sizeof tokens / sizeof *tokens));
    int turn = 0;
    for (size_t kind = 0; kind < sizeof kinds / sizeof *kinds; kind++)
        for (int64_t cols : cols_of) {
            emulator_seed(seeds[turn++ % 3]);
            struct matrix table = make_matrix(kinds[kind], ROWS, (uint64_t)cols, fill);
            float *residual = device_array<float>(TOKENS * cols), *want = floats(cols);
            finish(launch_embed(residual, &table, device_tokens, TOKENS, VOCAB_BEGIN, 0));
            for (int64_t row = 0; row < TOKENS; row++) {
                int64_t local = (int64_t)tokens[row] - VOCAB_BEGIN;
                bool here = local >= 0 && local < ROWS;
                if (here)
                    scalar()->dequantize_row(want, &table, local);
                for (int64_t i = 0; i < cols; i++) {
                    float value = here ? bf16_to_f32(f32_to_bf16(want[i])) + 0.0f : 0.0f;
                    if (f32_bits(residual[row * cols + i]) != f32_bits(value))
                        fail_msg("embed, %s, %lld columns: row %lld, column %lld is %.9g, not %.9g",
                                 weight_kind_name(kinds[kind].kind), (long long)cols, (long long)row, (long long)i,
                                 (double)residual[row * cols + i], (double)value);
                }
            }
            cudaFree(residual);
            free_matrix(&table);
            free(want);
        }
    cudaFree(device_tokens);
}

// ---- finish_qkv ----------------------------------------------------------------------------------------------------

struct qkv_case {
    int64_t head_dim, num_heads, num_kv_heads, rows;
    bool bias, norms;
    enum kv_format format;
    int64_t rotary_dim; // -1: all
    bool interleaved = false, full_norm = false, no_rope = false;
};
static const struct qkv_case qkv_cases[] = {
    {64, 4, 2, 1, false, false, KV_BF16, -1},
    {128, 8, 2, 3, true, false, KV_BF16, -1},
    {80, 3, 1, 5, true, false, KV_E4M3, -1},
    {256, 2, 2, 2, false, false, KV_E4M3, -1},
    {2, 1, 1, 2, true, false, KV_BF16, -1},
    {66, 5, 3, 18, true, false, KV_BF16, -1},
    {128, 6, 2, 20, true, true, KV_BF16, -1},
    {96, 2, 1, 3, false, true, KV_E4M3, -1},
    {16, 12, 4, 17, false, true, KV_BF16, -1},
    {30, 0, 1, 2, true, false, KV_BF16, -1},
    {96, 2, 1, 3, false, false, KV_BF16, 32},
    {80, 2, 1, 3, true, false, KV_BF16, 60, true},
    {64, 2, 2, 3, true, true, KV_BF16, 64, true},
    {128, 3, 1, 3, true, true, KV_BF16, -1, false, true},
    {64, 2, 1, 3, true, true, KV_BF16, 16, false, false, true},
};
enum { SEQUENCES = 3, PAGES_PER_SEQUENCE = 5 };

static void check_finish_qkv(const struct qkv_case *c)
{
    const struct kernels *k = scalar();
    const float eps = 1e-6f, factor = 1.25f;
    int64_t rotary_dim = c->rotary_dim < 0 ? c->head_dim : c->rotary_dim;
    int64_t head_dim = c->head_dim, half = rotary_dim / 2, heads = c->num_heads + 2 * c->num_kv_heads,
            width = heads * head_dim;
    int32_t pages[SEQUENCES * PAGES_PER_SEQUENCE], sequence[20], position[20];
    for (int i = 0; i < SEQUENCES * PAGES_PER_SEQUENCE; i++)
        pages[i] = (i * 7 + 3) % (SEQUENCES * PAGES_PER_SEQUENCE);
    for (int i = 0; i < c->rows; i++) {
        sequence[i] = i % SEQUENCES;
        position[i] = (i * 61 + 60) % (PAGES_PER_SEQUENCE * KV_PAGE_TOKENS);
    }
    float *qkv = floats(c->rows * width), *bias = floats(width);
    int64_t q_size = c->num_heads * head_dim, kv_size = c->num_kv_heads * head_dim;
    int64_t q_norms = c->full_norm ? q_size : head_dim, all_norms = q_norms + (c->full_norm ? kv_size : head_dim);
    float *norms = floats(all_norms), *inv_freq = floats(half);
    float *cosines = floats(half), *sines = floats(half);
    for (int64_t i = 0; i < c->rows * width; i++)
        qkv[i] = centred() * 3;
    if (c->rows > 2)
        qkv[2 * width + width - 1] = NAN; // in v
    for (int64_t i = 0; i < width; i++)
        bias[i] = centred();
    for (int64_t i = 0; i < all_norms; i++)
        norms[i] = 1 + centred() / 2;
    for (int64_t i = 0; i < half; i++)
        inv_freq[i] = powf(10000.0f, -(float)(2 * i) / (float)rotary_dim);

    int64_t cache_count = SEQUENCES * PAGES_PER_SEQUENCE * c->num_kv_heads * KV_PAGE_TOKENS * head_dim;
    int64_t element = c->format == KV_E4M3 ? 1 : 2;
    struct device_kv kv = {device_new(cache_count * element),
                           device_new(cache_count * element),
                           c->format,
                           device_copy(pages, (int64_t)(sizeof pages / sizeof *pages)),
                           PAGES_PER_SEQUENCE,
                           c->num_kv_heads,
                           head_dim,
                           NULL,
                           NULL};
    char *untouched = (char *)zeroed(cache_count * element); // how the cache was, what is expected being put in
    memcpy(untouched, kv.k, (size_t)(cache_count * element));
    char *want_cache[2] = {untouched, (char *)zeroed(cache_count * element)};
    memcpy(want_cache[1], kv.v, (size_t)(cache_count * element));
    struct device_rows rows = {device_copy(sequence, (int64_t)(sizeof sequence / sizeof *sequence)),
                               device_copy(position, (int64_t)(sizeof position / sizeof *position)), c->rows};
    float *device_qkv = device_copy(qkv, c->rows * width), *device_bias = device_copy(bias, width);
    float *device_norms = device_copy(norms, all_norms), *device_freq = device_copy(inv_freq, half);
    struct device_qkv how = {};
    how.bias = c->bias && !c->full_norm ? device_bias : NULL;
    how.q_norm = c->norms ? device_norms : NULL;
    how.k_norm = c->norms ? device_norms + q_norms : NULL;
    how.q_width = 2 * q_size; // as if another rank had as many
    how.k_width = 2 * kv_size;
    how.eps = eps;
    how.rotation.inv_freq = c->no_rope ? NULL : device_freq;
    how.rotation.factor = factor;
    how.rotary_dim = rotary_dim;
    how.rotation.interleaved = c->interleaved;
    how.num_heads = c->num_heads;
    float *squares = device_array<float>(2 * c->rows);
    if (c->full_norm) {
        finish(launch_squares(squares, device_qkv, c->bias ? device_bias : NULL, c->rows, width, q_size, q_size,
                              q_size + kv_size, 0));
        how.squares = squares;
    }
    finish(launch_finish_qkv(device_qkv, how, rows, kv, 0));

    for (int64_t row = 0; row < c->rows; row++) {
        float *x = qkv + row * width;
        if (c->bias)
            k->add(x, bias, width);
        double of_q = k->squares(x, q_size), of_k = k->squares(x + q_size, kv_size);
        k->rope_table(cosines, sines, inv_freq, half, position[row], factor);
        for (int64_t head = 0; head < heads; head++) {
            bool is_q = head < c->num_heads, is_v = head >= c->num_heads + c->num_kv_heads;
            float *values = x + head * head_dim;
            if (!is_v && c->norms && c->full_norm)
                k->scale_norm(values, values, norms + head * head_dim, head_dim, is_q ? of_q : of_k,
                              is_q ? how.q_width : how.k_width, eps);
            else if (!is_v && c->norms)
                k->rms_norm(values, values, norms + (is_q ? 0 : head_dim), head_dim, eps);
            if (!is_v && !c->no_rope)
                k->rope(values, cosines, sines, rotary_dim, c->interleaved);
            int64_t kv_head = (head - c->num_heads) % (c->num_kv_heads ? c->num_kv_heads : 1);
            int64_t page = pages[sequence[row] * PAGES_PER_SEQUENCE + position[row] / KV_PAGE_TOKENS];
            int64_t at =
                ((page * c->num_kv_heads + kv_head) * KV_PAGE_TOKENS + position[row] % KV_PAGE_TOKENS) * head_dim;
            // With norms: the two sums of squares, a root and a quotient differ by at most 16 * 2^-24 together; a rotated element is the
            // sum of two. |element| <= 3 * sqrt(2) * factor * 1.5 * sqrt(head_dim) is far above what it is: take 8.
            // On a device cosf and sinf have 2 ulp, the host's 1: with the factor's roundings at most 5 * 2^-24, times 1.25 * (4 + 4).
            bool exact = !c->norms && emulator_present();
            double tolerance = (c->norms ? 8 * 16 * 0x1p-24 : 0) + (emulator_present() ? 0 : 50 * 0x1p-24);
            for (int64_t i = 0; i < head_dim; i++) {
                float want = values[i], got;
                double bound = tolerance;
                if (is_q) {
                    got = device_qkv[row * width + head * head_dim + i];
                } else {
                    const void *cache = is_v ? kv.v : kv.k;
                    char *expected = want_cache[is_v];
                    if (c->format == KV_E4M3) {
                        got = e4m3_to_f32(((const uint8_t *)cache)[at + i]);
                        want = e4m3_to_f32(f32_to_e4m3(want));
                        ((uint8_t *)expected)[at + i] = ((const uint8_t *)cache)[at + i];
                    } else {
                        got = bf16_to_f32(((const uint16_t *)cache)[at + i]);
                        want = bf16_to_f32(f32_to_bf16(want));
                        ((uint16_t *)expected)[at + i] = ((const uint16_t *)cache)[at + i];
                    }
                    if (!exact) // may round to the neighbour
                        bound += c->format == KV_E4M3 ? fmax(fabs((double)want) / 8, 0x1p-9) : fabs((double)want) / 128;
                    if (is_v)
                        bound = 0;
                }
                if (!(bound == 0 ? same(got, want) : fabs((double)got - (double)want) <= bound))
                    fail_msg("finish_qkv, head_dim %lld: row %lld, head %lld, element %lld is %.9g, not %.9g",
                             (long long)head_dim, (long long)row, (long long)head, (long long)i, (double)got,
                             (double)want);
            }
        }
    }
    // Nothing but the rows' own slots has changed.
    assert_memory_equal(kv.k, want_cache[0], (size_t)(cache_count * element));
    assert_memory_equal(kv.v, want_cache[1], (size_t)(cache_count * element));

    const void *const devices[] = {kv.k,       kv.v,        kv.pages,     rows.sequence, rows.position,
                                   device_qkv, device_bias, device_norms, device_freq,   squares};
    for (const void *memory : devices)
        cudaFree((void *)memory);
    void *const hosts[] = {qkv, bias, norms, inv_freq, cosines, sines, want_cache[0], want_cache[1]};
    for (void *memory : hosts)
        free(memory);
}

// A cache with scales has the host's scales and codes bit for bit; queries are rotated as there, and rotate back.
static void check_scaled_rows(int64_t head_dim, enum kv_format format)
{
    enum { HEADS = 3, KV_HEADS = 2, ROWS = 5, ALL = HEADS + 2 * KV_HEADS, SLOTS = 2 * KV_HEADS * KV_PAGE_TOKENS };
    static const int32_t pages[] = {1, 0}, sequence[ROWS] = {0, 1, 0, 1, 0}, position[ROWS] = {0, 63, 5, 7, 63};
    int64_t width = ALL * head_dim, bytes = (int64_t)kv_codes_bytes((uint64_t)(SLOTS * head_dim), format);
    float *qkv = floats(ROWS * width);
    for (int64_t i = 0; i < ROWS * width; i++)
        qkv[i] = centred() * (i % 37 ? 1.0f : 30.0f);
    memset(qkv + HEADS * head_dim, 0, (size_t)head_dim * sizeof *qkv); // a key of zeros, and a value that is not finite
    qkv[2 * width - 1] = INFINITY;
    struct device_kv kv = {device_new(bytes),
                           device_new(bytes),
                           format,
                           device_copy(pages, 2),
                           1,
                           KV_HEADS,
                           head_dim,
                           device_array<uint16_t>(SLOTS),
                           device_array<uint16_t>(SLOTS)};
    struct device_rows rows = {device_copy(sequence, ROWS), device_copy(position, ROWS), ROWS};
    float *device_qkv = device_copy(qkv, ROWS * width);
    struct device_qkv how = {};
    how.num_heads = HEADS;
    finish(launch_finish_qkv(device_qkv, how, rows, kv, 0));
    for (int64_t row = 0; row < ROWS; row++)
        for (int64_t head = 0; head < ALL; head++) {
            float *x = qkv + row * width + head * head_dim;
            const float *got = device_qkv + row * width + head * head_dim;
            kv_rotate(x, 1, head_dim, head < HEADS ? kv_rotate_back(head_dim) : 1);
            uint32_t extent = 0;
            for (int64_t i = 0; i < head_dim; i++) {
                if (head < HEADS && !same(got[i], x[i]))
                    fail_msg("head_dim %lld: a query's column %lld is %.9g, not %.9g", (long long)head_dim,
                             (long long)i, (double)got[i], (double)x[i]);
                extent = kv_extent(x[i]) > extent ? kv_extent(x[i]) : extent;
            }
            if (head < HEADS)
                continue;
            bool is_v = head >= HEADS + KV_HEADS;
            int64_t slot =
                (pages[sequence[row]] * KV_HEADS + (head - HEADS) % KV_HEADS) * KV_PAGE_TOKENS + position[row];
            uint16_t scale = kv_scale(format, extent);
            assert_int_equal((is_v ? kv.v_scale : kv.k_scale)[slot], scale);
            const uint8_t *codes = (const uint8_t *)(is_v ? kv.v : kv.k);
            for (int64_t i = 0; i < head_dim; i++) {
                float inverse = kv_inverse_scale(scale);
                if (format == KV_INT8)
                    assert_int_equal(codes[slot * head_dim + i], kv_code_int8(x[i], inverse));
                else
                    assert_int_equal(
                        codes[slot * head_dim / 2 + kv_int4_byte(i, head_dim)] >> kv_int4_shift(i, head_dim) & 15,
                        kv_code_int4(x[i], inverse));
            }
        }
    finish(launch_rotate_heads(device_qkv, HEADS, head_dim, 0.5f, 0));
    kv_rotate(qkv, HEADS, head_dim, 0.5f);
    for (int64_t i = 0; i < HEADS * head_dim; i++)
        assert_true(same(device_qkv[i], qkv[i]));
    void *const devices[] = {
        kv.k, kv.v, kv.k_scale, kv.v_scale, (void *)kv.pages, (void *)rows.sequence, (void *)rows.position, device_qkv};
    for (void *memory : devices)
        cudaFree(memory);
    free(qkv);
}

static void scaled_caches_are_the_cpus(void **state)
{
    (void)state;
    static const int64_t head_dims[] = {2, 20, 34, 64, 80, 96, 128, 256};
    int turn = 0;
    for (int64_t head_dim : head_dims)
        for (int format = KV_INT8; format <= KV_INT4; format++) {
            emulator_seed(seeds[turn++ % 3]);
            check_scaled_rows(head_dim, (enum kv_format)format);
        }
}

static void finish_qkv_follows_the_cpu(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof qkv_cases / sizeof *qkv_cases; i++) {
        emulator_seed(seeds[i % 3]);
        check_finish_qkv(&qkv_cases[i]);
    }
}

// ---- law 9 ---------------------------------------------------------------------------------------------------------

// A row alone gives the bytes that it gives among others.
static void a_row_does_not_see_its_neighbours(void **state)
{
    (void)state;
    enum { ROWS = 21, COLS = 700 };
    struct device_join none = {};
    float *x = floats(ROWS * COLS * 2), *weight = floats(COLS);
    for (int64_t i = 0; i < ROWS * COLS * 2; i++)
        x[i] = centred() * 5;
    for (int64_t i = 0; i < COLS; i++)
        weight[i] = centred();
    x[4 * COLS] = NAN;
    float *device_weight = device_copy(weight, COLS);
    for (enum input_format format : formats)
        for (int operation = 0; operation < 3; operation++) {
            int64_t width = operation == 2 ? 2 * COLS : COLS;
            struct device_input many = new_input(format, ROWS, COLS), one = new_input(format, 1, COLS);
            float *all = device_copy(x, ROWS * width);
            for (int64_t row = -1; row < ROWS; row += row < 0 ? 1 : 5) {
                int64_t rows = row < 0 ? ROWS : 1;
                struct device_input out = row < 0 ? many : one;
                float *at = all + (row < 0 ? 0 : row * width);
                emulator_seed((uint64_t)(row + 5));
                finish(operation == 0   ? launch_prepare(out, format, at, width, NULL, rows, COLS, 0)
                       : operation == 1 ? launch_norm(out, format, at, none, device_weight, NULL, rows, COLS, 1e-5f, 0)
                                        : launch_activate(out, format, ACTIVATION_SILU, 0, at, NULL, rows, COLS, 0));
                if (row < 0)
                    continue;
                int64_t bytes = one.stride * value_bytes(format);
                assert_memory_equal(one.values, (char *)many.values + row * bytes, (size_t)bytes);
                bool grouped = format == INPUT_INT8 || format == INPUT_INT8_TILE;
                int64_t scales = grouped                                              ? one.stride / 128
                                 : format == INPUT_BF16 || format == INPUT_MXFP8_TILE ? 0
                                                                                      : 1;
                if (format == INPUT_MXFP8_TILE)
                    assert_memory_equal(one.scale, (char *)many.scale + row * (one.stride / 32),
                                        (size_t)one.stride / 32);
                for (int64_t i = 0; i < scales; i++)
                    assert_true(same(one.scale[i], many.scale[row * scales + i]));
            }
            cudaFree(all);
            free_input(many);
            free_input(one);
        }
    cudaFree(device_weight);
    free(x);
    free(weight);
}

static void scale_is_the_cpus(void **state)
{
    (void)state;
    enum { COUNT = 1000 };
    for (int capped = 0; capped < 2; capped++) {
        float *want = floats(COUNT);
        for (int i = 0; i < COUNT; i++)
            want[i] = i == 7 ? NAN : centred() * 100;
        float *x = device_copy(want, COUNT);
        for (int i = 0; i < COUNT; i++)
            want[i] *= 0.3f;
        if (capped)
            scalar()->softcap(want, COUNT, 30);
        finish(launch_scale_values(x, COUNT, 0.3f, capped ? 30 : 0, 0));
        for (int i = 0; i < COUNT; i++)
            assert_true(same(x[i], want[i]));
        cudaFree(x);
        free(want);
    }
}

static void no_rows_are_no_work(void **state)
{
    (void)state;
    struct device_input none = {};
    struct device_join join = {};
    struct device_qkv how = {};
    struct device_rows rows = {};
    struct device_kv kv = {};
    struct matrix table = {};
    finish(launch_prepare(none, INPUT_INT8, NULL, 0, NULL, 0, 128, 0));
    finish(launch_norm(none, INPUT_INT8, NULL, join, NULL, NULL, 0, 128, 1e-5f, 0));
    finish(launch_activate(none, INPUT_INT8, ACTIVATION_SILU, 0, NULL, NULL, 0, 128, 0));
    finish(launch_scale_values(NULL, 0, 1, 0, 0));
    finish(launch_squares(NULL, NULL, NULL, 0, 4, 2, 2, 3, 0));
    finish(launch_embed(NULL, &table, NULL, 0, 0, 0));
    finish(launch_finish_qkv(NULL, how, rows, kv, 0));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(prepare_writes_every_format),
        cmocka_unit_test(prepare_follows_an_order),
        cmocka_unit_test(kept_rows_stay_apart),
        cmocka_unit_test(activate_is_the_cpus),
        cmocka_unit_test(activate_rotates_as_the_cpu),
        cmocka_unit_test(norm_follows_the_cpu),
        cmocka_unit_test(embed_is_the_cpus),
        cmocka_unit_test(finish_qkv_follows_the_cpu),
        cmocka_unit_test(scaled_caches_are_the_cpus),
        cmocka_unit_test(scale_is_the_cpus),
        cmocka_unit_test(a_row_does_not_see_its_neighbours),
        cmocka_unit_test(no_rows_are_no_work),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
