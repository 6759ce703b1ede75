// The device's operations over rows, in the emulator, against the scalar kernel table and the number formats.
//
// Bit for bit: embed, every input format of given f32 rows, activate, finish_qkv without norms (the emulator's cosf is the host's; a
// device's is not), and a norm whose sum of squares is exact. Norms of arbitrary rows against double arithmetic. Each at several seeds
// of the emulator.
extern "C" {
#include "formats/number_formats.h"
#include "kernels/kernels.h"
#include "kernels/pack.h"
}
#include "kernels/cuda/launch.h"
#include "tests/device/quick.h"
#include "tests/emulator/emulator.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

extern "C" {
#include <cmocka.h>
}

static uint64_t random_state = 0x9e3779b97f4a7c15u;

static uint64_t random_bits(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state * 0x2545f4914f6cdd1du;
}

static float uniform(void) { return (float)((double)(random_bits() >> 11) * 0x1p-52 - 1.0); } // [-1, 1)
static int64_t round_up_to(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

static void *zeroed(int64_t bytes)
{
    void *memory = calloc(1, bytes ? (size_t)bytes : 1);
    assert_non_null(memory);
    return memory;
}

static void *device_new(int64_t bytes)
{
    void *memory = NULL;
    assert_int_equal(cudaMalloc(&memory, bytes ? (size_t)bytes : 1), cudaSuccess);
    return memory;
}

static void *device_copy(const void *host, int64_t bytes)
{
    void *memory = device_new(bytes);
    assert_int_equal(cudaMemcpy(memory, host, (size_t)bytes, cudaMemcpyHostToDevice), cudaSuccess);
    return memory;
}

static void finish(cudaError_t rc)
{
    assert_int_equal(rc, cudaSuccess);
    assert_int_equal(cudaDeviceSynchronize(), cudaSuccess);
}

static const struct kernels *scalar(void)
{
    struct error err;
    const struct kernels *kernels = NULL;
    assert_int_equal(kernels_select(&kernels, "scalar", &err), 0);
    return kernels;
}

// Same bits, or both NaN.
static bool same(float a, float b) { return f32_bits(a) == f32_bits(b) || (isnan(a) && isnan(b)); }

static const uint64_t seeds[] = {1, 2, 77};

// ---- input formats -------------------------------------------------------------------------------------------------

static const enum input_format formats[] = {INPUT_F16,  INPUT_F16_TILE,  INPUT_BF16,
                                            INPUT_INT8, INPUT_INT8_TILE, INPUT_E4M3};
static const char *const format_names[] = {"f16", "f16 tile", "bf16", "int8", "int8 tile", "e4m3"};

static int64_t value_bytes(enum input_format format) { return format <= INPUT_BF16 ? 2 : 1; }

// Column of the element at `place` of a row.
static int64_t column_at(enum input_format format, int64_t place)
{
    static const int f16_column[4] = {0, 1, 8, 9}, int8_column[4] = {0, 8, 1, 9};
    int64_t block = place / 64 * 64, in = place % 64;
    if (format == INPUT_F16_TILE) // t * 16 + w * 4 + j
        return block + 16 * (in / 4 % 4) + 2 * (in / 16) + f16_column[in % 4];
    if (format == INPUT_INT8_TILE) // (t * 4 + w) * 4 + j
        return block + 16 * (in / 4 % 4) + 2 * (in / 16) + int8_column[in % 4];
    return place;
}

static struct device_input new_input(enum input_format format, int64_t rows, int64_t cols)
{
    struct device_input out;
    out.stride = round_up_to(cols, 128);
    out.values = device_new(rows * out.stride * value_bytes(format));
    out.scale = (float *)device_new(rows * (out.stride / 128) * 4);
    return out;
}

static void free_input(struct device_input in)
{
    cudaFree(in.values);
    cudaFree(in.scale);
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
        x[i] = uniform() * factor[kind];
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
        float *x = (float *)zeroed(rows * x_stride * 4);
        for (int64_t row = 0; row < rows; row++)
            fill_row(x + row * x_stride, cols, (int)row);
        float *device_x = (float *)device_copy(x, rows * x_stride * 4);
        for (enum input_format format : formats) {
            emulator_seed(seeds[w % 3]);
            struct device_input out = new_input(format, rows, cols);
            finish(launch_prepare(out, format, device_x, x_stride, rows, cols, 0));
            for (int64_t row = 0; row < rows; row++)
                check_row(out, format, row, x + row * x_stride, cols, "prepare");
            free_input(out);
        }
        cudaFree(device_x);
        free(x);
    }
}

static void activate_is_the_cpus(void **state)
{
    (void)state;
    const struct kernels *k = scalar();
    for (size_t w = 0; w < sizeof widths / sizeof *widths; w += quick() ? 5 : 1) {
        int64_t cols = widths[w], rows = cols > 5000 ? 1 : 3;
        float *x = (float *)zeroed(rows * 2 * cols * 4), *bias = (float *)zeroed(2 * cols * 4);
        float *want = (float *)zeroed(2 * cols * 4);
        for (int64_t i = 0; i < rows * 2 * cols; i++)
            x[i] = uniform() * (i % 7 == 0 ? 120.0f : 4.0f); // exp from 0 to Inf
        if (rows > 2)
            x[2 * 2 * cols] = NAN;
        for (int64_t i = 0; i < 2 * cols; i++)
            bias[i] = uniform();
        float *device_x = (float *)device_copy(x, rows * 2 * cols * 4),
              *device_bias = (float *)device_copy(bias, 2 * cols * 4);
        for (enum input_format format : formats)
            for (int with_bias = 0; with_bias < 2; with_bias++) {
                emulator_seed(seeds[(w + 1) % 3]);
                struct device_input out = new_input(format, rows, cols);
                finish(launch_activate(out, format, device_x, with_bias ? device_bias : NULL, rows, cols, 0));
                for (int64_t row = 0; row < rows; row++) {
                    memcpy(want, x + row * 2 * cols, (size_t)cols * 8);
                    if (with_bias)
                        k->add(want, bias, 2 * cols);
                    k->silu_mul(want, want, want + cols, cols);
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

// ---- norm ----------------------------------------------------------------------------------------------------------

struct norm_case {
    bool partial, bias, indexed;
};
static const struct norm_case norm_cases[] = {{false, false, false}, {true, false, false}, {true, true, false},
                                              {false, false, true},  {true, true, true},   {false, true, false}};
enum { NORM_ROWS = 4, INDEXED_ROWS = 3 };
static const int32_t norm_index[INDEXED_ROWS] = {3, 0, 3};

// exact: small integers, so that no sum of squares rounds and the CPU's bits are due.
static void check_norm(int64_t cols, struct norm_case how, bool exact, enum input_format format)
{
    const struct kernels *k = scalar();
    const float eps = 1e-5f;
    int64_t count = NORM_ROWS * cols;
    float *residual = (float *)zeroed(count * 4), *partial = (float *)zeroed(count * 4),
          *bias = (float *)zeroed(cols * 4);
    float *weight = (float *)zeroed(cols * 4), *x = (float *)zeroed(count * 4), *want = (float *)zeroed(cols * 4);
    for (int64_t i = 0; i < count; i++) {
        residual[i] = exact ? (float)(int)(uniform() * 4) : uniform() * 4;
        partial[i] = exact ? (float)(int)(uniform() * 4) : uniform() * 4;
    }
    for (int64_t i = 0; i < cols; i++) {
        bias[i] = exact ? (float)(int)(uniform() * 2) : uniform();
        weight[i] = 1 + uniform() / 2;
    }
    for (int64_t i = 0; i < count; i++) {
        float addend = how.partial && how.bias ? partial[i] + bias[i % cols]
                       : how.partial           ? partial[i]
                                               : bias[i % cols];
        x[i] = how.partial || how.bias ? residual[i] + addend : residual[i];
    }
    int64_t rows = how.indexed ? INDEXED_ROWS : NORM_ROWS;
    float *device_residual = (float *)device_copy(residual, count * 4);
    float *device_partial = (float *)device_copy(partial, count * 4),
          *device_bias = (float *)device_copy(bias, cols * 4);
    float *device_weight = (float *)device_copy(weight, cols * 4);
    int32_t *device_index = (int32_t *)device_copy(norm_index, sizeof norm_index);
    struct device_input out = new_input(format, rows, cols);
    finish(launch_norm(out, format, device_residual, how.partial ? device_partial : NULL, how.bias ? device_bias : NULL,
                       device_weight, how.indexed ? device_index : NULL, rows, cols, eps, 0));

    bool written = how.partial && !how.indexed;
    for (int64_t i = 0; i < count; i++)
        if (!same(device_residual[i], written ? x[i] : residual[i]))
            fail_msg("norm, %lld columns: residual %lld is %.9g", (long long)cols, (long long)i,
                     (double)device_residual[i]);
    for (int64_t row = 0; row < rows; row++) {
        const float *source = x + (how.indexed ? norm_index[row] : row) * cols;
        if (exact) {
            k->rms_norm(want, source, weight, cols, eps);
            check_row(out, format, row, want, cols, "exact norm");
            continue;
        }
        // BF16: its rounding (2^-8), and a sum of squares that is off by (4 * groups / warps + 6) * 2^-24: at most 2^-18 here.
        double squares = 0;
        for (int64_t i = 0; i < cols; i++)
            squares += (double)source[i] * source[i];
        for (int64_t i = 0; i < cols; i++) {
            double exactly = source[i] / sqrt(squares / (double)cols + eps) * weight[i];
            double got = bf16_to_f32(((const uint16_t *)out.values)[row * out.stride + i]);
            if (!(fabs(got - exactly) <= fabs(exactly) * (0x1p-8 + 0x1p-18)))
                fail_msg("norm, %lld columns: element %lld is %.9g, not %.9g", (long long)cols, (long long)i, got,
                         exactly);
        }
    }
    free_input(out);
    void *const devices[] = {device_residual, device_partial, device_bias, device_weight, device_index};
    for (void *memory : devices)
        cudaFree(memory);
    void *const hosts[] = {residual, partial, bias, weight, x, want};
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
            check_norm(widths[w], how, true, formats[turn % 6]);
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

static struct matrix new_table(enum weight_kind kind, uint32_t group_size, int64_t rows, int64_t cols)
{
    struct error err;
    struct matrix table = {};
    assert_true(weight_shape_make(&table.shape, kind, group_size, (uint64_t)rows, (uint64_t)cols));
    char *data = (char *)zeroed((int64_t)table.shape.data_bytes),
         *scale = (char *)zeroed((int64_t)table.shape.scale_bytes);
    void *memory = zeroed((int64_t)packed_row_bytes(kind, group_size, (uint64_t)cols));
    float *x = (float *)zeroed(cols * 4);
    for (int64_t row = 0; row < rows; row++) {
        struct packed_row packed;
        for (int64_t i = 0; i < cols; i++)
            x[i] = i % 5 == 0 ? -0.0f : uniform();
        packed_row_place(&packed, memory, kind, group_size, (uint64_t)cols);
        assert_int_equal(pack_quantize_row(&packed, kind, group_size, x, (uint64_t)cols, NULL, &err), 0);
        int64_t block = row / WEIGHT_ROW_UNIT;
        pack_store_row(data + block * (int64_t)pack_block_data_bytes(&table.shape),
                       scale + block * (int64_t)pack_block_scale_bytes(&table.shape), &table.shape,
                       (uint64_t)(block * WEIGHT_ROW_UNIT), (uint64_t)row, &packed, 0);
    }
    table.data = data;
    table.scale = table.shape.scale_bytes ? scale : NULL;
    if (!table.scale)
        free(scale);
    free(memory);
    free(x);
    return table;
}

static void embed_is_the_cpus(void **state)
{
    (void)state;
    static const struct {
        enum weight_kind kind;
        uint32_t group_size;
    } kinds[] = {{WEIGHT_F32, 0}, {WEIGHT_BF16, 0},  {WEIGHT_INT8, 0},
                 {WEIGHT_FP8, 0}, {WEIGHT_INT4, 32}, {WEIGHT_INT4, 128}};
    static const uint32_t tokens[] = {1000, 1069, 999, 1070, 1063, 1064, 1017, 0, UINT32_MAX};
    enum { ROWS = 70, VOCAB_BEGIN = 1000, TOKENS = sizeof tokens / sizeof *tokens };
    static const int64_t cols_of[] = {1, 64, 101, 130, 132, 2880};
    uint32_t *device_tokens = (uint32_t *)device_copy(tokens, sizeof tokens);
    int turn = 0;
    for (size_t kind = 0; kind < sizeof kinds / sizeof *kinds; kind++)
        for (int64_t cols : cols_of) {
            emulator_seed(seeds[turn++ % 3]);
            struct matrix table = new_table(kinds[kind].kind, kinds[kind].group_size, ROWS, cols), on_device = table;
            on_device.data = device_copy(table.data, (int64_t)table.shape.data_bytes);
            on_device.scale = table.scale ? device_copy(table.scale, (int64_t)table.shape.scale_bytes) : NULL;
            float *residual = (float *)device_new(TOKENS * cols * 4), *want = (float *)zeroed(cols * 4);
            finish(launch_embed(residual, &on_device, device_tokens, TOKENS, VOCAB_BEGIN, 0));
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
            cudaFree((void *)on_device.data);
            cudaFree((void *)on_device.scale);
            free((void *)table.data);
            free((void *)table.scale);
            free(want);
        }
    cudaFree(device_tokens);
}

// ---- finish_qkv ----------------------------------------------------------------------------------------------------

struct qkv_case {
    int64_t head_dim, num_heads, num_kv_heads, rows;
    bool bias, norms;
    enum kv_format format;
};
static const struct qkv_case qkv_cases[] = {
    {64, 4, 2, 1, false, false, KV_BF16},  {128, 8, 2, 3, true, false, KV_BF16}, {80, 3, 1, 5, true, false, KV_E4M3},
    {256, 2, 2, 2, false, false, KV_E4M3}, {2, 1, 1, 2, true, false, KV_BF16},   {66, 5, 3, 18, true, false, KV_BF16},
    {128, 6, 2, 20, true, true, KV_BF16},  {96, 2, 1, 3, false, true, KV_E4M3},  {16, 12, 4, 17, false, true, KV_BF16},
    {30, 0, 1, 2, true, false, KV_BF16},
};
enum { SEQUENCES = 3, PAGES_PER_SEQUENCE = 5 };

static void check_finish_qkv(const struct qkv_case *c)
{
    const struct kernels *k = scalar();
    const float eps = 1e-6f, factor = 1.25f;
    int64_t head_dim = c->head_dim, half = head_dim / 2, heads = c->num_heads + 2 * c->num_kv_heads,
            width = heads * head_dim;
    int32_t pages[SEQUENCES * PAGES_PER_SEQUENCE], sequence[20], position[20];
    for (int i = 0; i < SEQUENCES * PAGES_PER_SEQUENCE; i++)
        pages[i] = (i * 7 + 3) % (SEQUENCES * PAGES_PER_SEQUENCE);
    for (int i = 0; i < c->rows; i++) {
        sequence[i] = i % SEQUENCES;
        position[i] = (i * 61 + 60) % (PAGES_PER_SEQUENCE * KV_PAGE_TOKENS);
    }
    float *qkv = (float *)zeroed(c->rows * width * 4), *bias = (float *)zeroed(width * 4);
    float *norms = (float *)zeroed(2 * head_dim * 4), *inv_freq = (float *)zeroed(half * 4);
    float *cosines = (float *)zeroed(half * 4), *sines = (float *)zeroed(half * 4);
    for (int64_t i = 0; i < c->rows * width; i++)
        qkv[i] = uniform() * 3;
    if (c->rows > 2)
        qkv[2 * width + width - 1] = NAN; // in v
    for (int64_t i = 0; i < width; i++)
        bias[i] = uniform();
    for (int64_t i = 0; i < 2 * head_dim; i++)
        norms[i] = 1 + uniform() / 2;
    for (int64_t i = 0; i < half; i++)
        inv_freq[i] = powf(10000.0f, -(float)(2 * i) / (float)head_dim);

    int64_t cache_count = SEQUENCES * PAGES_PER_SEQUENCE * c->num_kv_heads * KV_PAGE_TOKENS * head_dim;
    int64_t element = c->format == KV_E4M3 ? 1 : 2;
    struct device_kv kv = {device_new(cache_count * element),
                           device_new(cache_count * element),
                           c->format,
                           (const int32_t *)device_copy(pages, sizeof pages),
                           PAGES_PER_SEQUENCE,
                           c->num_kv_heads,
                           head_dim};
    char *untouched = (char *)zeroed(cache_count * element); // how the cache was, what is expected being put in
    memcpy(untouched, kv.k, (size_t)(cache_count * element));
    char *want_cache[2] = {untouched, (char *)zeroed(cache_count * element)};
    memcpy(want_cache[1], kv.v, (size_t)(cache_count * element));
    struct device_rows rows = {(const int32_t *)device_copy(sequence, sizeof sequence),
                               (const int32_t *)device_copy(position, sizeof position), c->rows};
    float *device_qkv = (float *)device_copy(qkv, c->rows * width * 4),
          *device_bias = (float *)device_copy(bias, width * 4);
    float *device_norms = (float *)device_copy(norms, 2 * head_dim * 4),
          *device_freq = (float *)device_copy(inv_freq, half * 4);
    finish(launch_finish_qkv(device_qkv, c->bias ? device_bias : NULL, c->norms ? device_norms : NULL,
                             c->norms ? device_norms + head_dim : NULL, eps, device_freq, factor, rows, kv,
                             c->num_heads, 0));

    for (int64_t row = 0; row < c->rows; row++) {
        float *x = qkv + row * width;
        if (c->bias)
            k->add(x, bias, width);
        k->rope_table(cosines, sines, inv_freq, half, position[row], factor);
        for (int64_t head = 0; head < heads; head++) {
            bool is_q = head < c->num_heads, is_v = head >= c->num_heads + c->num_kv_heads;
            float *values = x + head * head_dim;
            if (!is_v && c->norms)
                k->rms_norm(values, values, norms + (is_q ? 0 : head_dim), head_dim, eps);
            if (!is_v)
                k->rope(values, cosines, sines, head_dim);
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
                                   device_qkv, device_bias, device_norms, device_freq};
    for (const void *memory : devices)
        cudaFree((void *)memory);
    void *const hosts[] = {qkv, bias, norms, inv_freq, cosines, sines, want_cache[0], want_cache[1]};
    for (void *memory : hosts)
        free(memory);
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
    float *x = (float *)zeroed(ROWS * COLS * 8), *weight = (float *)zeroed(COLS * 4);
    for (int64_t i = 0; i < ROWS * COLS * 2; i++)
        x[i] = uniform() * 5;
    for (int64_t i = 0; i < COLS; i++)
        weight[i] = uniform();
    x[4 * COLS] = NAN;
    float *device_weight = (float *)device_copy(weight, COLS * 4);
    for (enum input_format format : formats)
        for (int operation = 0; operation < 3; operation++) {
            int64_t width = operation == 2 ? 2 * COLS : COLS;
            struct device_input many = new_input(format, ROWS, COLS), one = new_input(format, 1, COLS);
            float *all = (float *)device_copy(x, ROWS * width * 4);
            for (int64_t row = -1; row < ROWS; row += row < 0 ? 1 : 5) {
                int64_t rows = row < 0 ? ROWS : 1;
                struct device_input out = row < 0 ? many : one;
                float *at = all + (row < 0 ? 0 : row * width);
                emulator_seed((uint64_t)(row + 5));
                finish(operation == 0 ? launch_prepare(out, format, at, width, rows, COLS, 0)
                       : operation == 1
                           ? launch_norm(out, format, at, NULL, NULL, device_weight, NULL, rows, COLS, 1e-5f, 0)
                           : launch_activate(out, format, at, NULL, rows, COLS, 0));
                if (row < 0)
                    continue;
                int64_t bytes = one.stride * value_bytes(format);
                assert_memory_equal(one.values, (char *)many.values + row * bytes, (size_t)bytes);
                bool grouped = format == INPUT_INT8 || format == INPUT_INT8_TILE;
                int64_t scales = grouped ? one.stride / 128 : format == INPUT_BF16 ? 0 : 1;
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

static void no_rows_are_no_work(void **state)
{
    (void)state;
    struct device_input none = {};
    struct device_rows rows = {};
    struct device_kv kv = {};
    struct matrix table = {};
    finish(launch_prepare(none, INPUT_INT8, NULL, 0, 0, 128, 0));
    finish(launch_norm(none, INPUT_INT8, NULL, NULL, NULL, NULL, NULL, 0, 128, 1e-5f, 0));
    finish(launch_activate(none, INPUT_INT8, NULL, NULL, 0, 128, 0));
    finish(launch_embed(NULL, &table, NULL, 0, 0, 0));
    finish(launch_finish_qkv(NULL, NULL, NULL, NULL, 0, NULL, 1, rows, kv, 4, 0));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(prepare_writes_every_format), cmocka_unit_test(activate_is_the_cpus),
        cmocka_unit_test(norm_follows_the_cpu),        cmocka_unit_test(embed_is_the_cpus),
        cmocka_unit_test(finish_qkv_follows_the_cpu),  cmocka_unit_test(a_row_does_not_see_its_neighbours),
        cmocka_unit_test(no_rows_are_no_work),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
