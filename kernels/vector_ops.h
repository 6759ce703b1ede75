// Every operation of the kernel table that is not a matmul, and matmul of f32, written once. Included by each
// kernels_<isa>.c and compiled with its flags; the results are the same bits everywhere, because each sum has 16 partial sums
// whatever the vector width, products and sums round separately (-ffp-contract=off), and no intrinsic stands here.
// Loops that touch elements singly are left to the compiler; sums and exp use its vector type f32x16.
#ifndef TPSHARD_KERNELS_VECTOR_OPS_H
#define TPSHARD_KERNELS_VECTOR_OPS_H

#include "formats/checked.h"
#include "formats/number_formats.h"
#include "kernels/kernels.h"
#include "kernels/layer_ops.h"
#include "kernels/vectors.h"

#include <math.h>
#include <string.h>

// ---- Preparing activations -----------------------------------------------------------------------------------------

// One group of ACT_GROUP columns: q in natural order. Magnitudes are compared as integers: NaN and Inf come out largest.
// A group whose largest magnitude is below 2^-100 counts as zero, so that 127 / largest stays finite.
static void quantize_group(int8_t *restrict q, float *scale, const float *restrict x)
{
    uint32_t largest = 0;
    for (int i = 0; i < ACT_GROUP; i++) {
        uint32_t magnitude = f32_bits(x[i]) & 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
    }
    bool finite = largest < 0x7f800000;
    if (!finite || largest < 0x0d800000) {
        memset(q, 0, ACT_GROUP);
        *scale = finite ? 0.0f : NAN;
        return;
    }
    float amax = f32_from_bits(largest);
    float inverse = 127.0f / amax;
    *scale = amax / 127.0f;
    for (int i = 0; i < ACT_GROUP; i++)
        q[i] = f32_to_int8(x[i] * inverse);
}

// 64 natural columns to the order of T16x64: see struct activations.
static void permute_tile_row(int8_t *restrict out, const int8_t *restrict q)
{
    static const int8_t column[4] = {0, 8, 1, 9};
    for (int t = 0; t < 4; t++)
        for (int w = 0; w < 4; w++)
            for (int j = 0; j < 4; j++)
                out[(t * 4 + w) * 4 + j] = q[16 * w + 2 * t + column[j]];
}

static void prepare_int8_row(struct activations *act, bool permute, const float *x, int64_t cols, int64_t token)
{
    int8_t *q = act->q + token * act->stride;
    float *q_scale = act->q_scale + token * (act->stride / ACT_GROUP);
    int32_t *q_sum = act->q_sum + token * (act->stride / ACT_SUM);
    for (int64_t begin = 0; begin < cols; begin += ACT_GROUP) {
        float padded[ACT_GROUP];
        const float *group = x + begin;
        if (cols - begin < ACT_GROUP) {
            memset(padded, 0, sizeof padded);
            memcpy(padded, group, (size_t)(cols - begin) * sizeof *padded);
            group = padded;
        }
        int8_t natural[ACT_GROUP];
        quantize_group(natural, &q_scale[begin / ACT_GROUP], group);
        for (int i = 0; i < ACT_GROUP / ACT_SUM; i++) {
            int32_t sum = 0;
            for (int j = 0; j < ACT_SUM; j++)
                sum += natural[ACT_SUM * i + j];
            q_sum[begin / ACT_SUM + i] = sum;
        }
        if (permute) {
            permute_tile_row(q + begin, natural);
            permute_tile_row(q + begin + 64, natural + 64);
        } else {
            memcpy(q + begin, natural, ACT_GROUP);
        }
    }
}

static void prepare_fp8_row(float *restrict out, const float *restrict x, int64_t cols)
{
    for (int64_t begin = 0; begin < cols; begin += 32)
        for (int64_t i = 0; i < 32; i++)
            out[begin + i % 2 * 16 + i / 2] = begin + i < cols ? x[begin + i] : 0.0f;
}

static void vector_ops_prepare(struct activations *act, const struct matrix *w, const float *x, int64_t x_stride,
                               int64_t token_begin, int64_t token_end)
{
    int64_t cols = (int64_t)w->shape.cols, cols_padded = (int64_t)round_up(w->shape.cols, ACT_GROUP);
    enum weight_kind kind = w->shape.kind;
    for (int64_t token = token_begin; token < token_end; token++) {
        const float *row = x + token * x_stride;
        if (kind == WEIGHT_INT8 || weight_is_tiled(kind)) {
            prepare_int8_row(act, weight_is_tiled(kind), row, cols, token);
            continue;
        }
        float *copy = act->f32 + token * act->stride;
        memset(copy + cols, 0, (size_t)(cols_padded - cols) * sizeof *copy);
        if (kind == WEIGHT_FP8 || kind == WEIGHT_FP8G)
            prepare_fp8_row(copy, row, cols);
        else
            memcpy(copy, row, (size_t)cols * sizeof *copy);
    }
}

// ---- Scales of kinds with groups: where they lie, and what the formulas of kernels.h call scale_w, zero_w and last ---------

// Of the 16 rows of a tile.
struct tile_scales {
    const uint8_t *first; // of the first group
    int64_t group_bytes;  // to the next
    int group_shift;      // columns of a group: 1 << group_shift
    const float *global;  // [16], or NULL
};

// Of the group of column `col`.
VECTOR_INLINE const uint8_t *tile_scales_at(const struct tile_scales *scales, int64_t col)
{
    return scales->first + (col >> scales->group_shift) * scales->group_bytes;
}

// Of a tile and a group: scales of f16, behind them zeros of int4z, else scales of a byte.
VECTOR_INLINE int64_t tile_group_bytes(enum weight_kind kind)
{
    return kind == WEIGHT_INT4Z ? 64 : weight_group_chosen(kind) ? 32 : 16;
}

VECTOR_INLINE struct tile_scales tile_scales(const struct matrix *w, int64_t row)
{
    int group_shift = __builtin_ctz(w->shape.group_size); // a division here would be felt
    int64_t group_bytes = tile_group_bytes(w->shape.kind);
    int64_t tile = row / 16, tile_bytes = ((int64_t)w->shape.cols_padded >> group_shift) * group_bytes;
    struct tile_scales scales = {(const uint8_t *)w->scale + tile * tile_bytes, group_bytes, group_shift, NULL};
    if (w->shape.kind == WEIGHT_NVFP4) { // behind each block of four tiles stand its 64 globals
        const uint8_t *block = (const uint8_t *)w->scale + tile / 4 * (4 * tile_bytes + 64 * (int64_t)sizeof(float));
        scales.first = block + tile % 4 * tile_bytes;
        scales.global = (const float *)(const void *)(block + 4 * tile_bytes) + tile % 4 * 16;
    }
    return scales;
}

VECTOR_INLINE float tile_scale(enum weight_kind kind, const uint8_t *scale, int64_t lane)
{
    if (kind == WEIGHT_MXFP4)
        return e8m0_to_f32(scale[lane]);
    if (kind == WEIGHT_NVFP4)
        return e4m3_to_f32(scale[lane]) * 0x1p-8f;
    return f16_to_f32(((const uint16_t *)(const void *)scale)[lane]);
}
VECTOR_INLINE float tile_zero(const uint8_t *scale, int64_t lane)
{
    return f16_to_f32(((const uint16_t *)(const void *)scale)[16 + lane]);
}
VECTOR_INLINE float tile_last(enum weight_kind kind, const float *global, int64_t lane)
{
    return kind == WEIGHT_NVFP4   ? 0x1p7f * global[lane]
           : kind == WEIGHT_MXFP4 ? 0.5f
           : kind == WEIGHT_NL4   ? WEIGHT_NL4_FACTOR
                                  : WEIGHT_INT4_FACTOR;
}

VECTOR_INLINE bool is_fp4(enum weight_kind kind) { return kind == WEIGHT_MXFP4 || kind == WEIGHT_NVFP4; }

// What is added to codes to make them unsigned; and of kinds whose codes are looked up, what each stands for with it: e2m1 doubled, the levels
// of nl4.
VECTOR_INLINE int32_t tile_bias(enum weight_kind kind)
{
    return is_fp4(kind) ? 12 : kind == WEIGHT_NL4 ? WEIGHT_NL4_TOP : 8;
}
VECTOR_INLINE bool has_tile_table(enum weight_kind kind) { return is_fp4(kind) || kind == WEIGHT_NL4; }
static const uint8_t e2m1_doubled_biased[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
static const uint8_t nl4_biased[16] = {34, 37, 40, 43, 47, 51, 56, 63, 0, 8, 14, 18, 22, 25, 28, 31};
VECTOR_INLINE const uint8_t *tile_table(enum weight_kind kind)
{
    return kind == WEIGHT_NL4 ? nl4_biased : e2m1_doubled_biased;
}

// Of one row: group g at [16 * g].
VECTOR_INLINE const float *fp8g_scales(const struct matrix *w, int64_t row)
{
    return (const float *)w->scale + row / 16 * ((int64_t)w->shape.cols_padded / w->shape.group_size) * 16 + row % 16;
}

// ---- Matrices of f32 (small: routers, vectors) and single rows -----------------------------------------------------

static float dot_f32(const float *restrict x, const float *restrict w, int64_t cols)
{
    f32x16 sum = {0}, a, b;
    int64_t i = 0;
    for (; i + LANES <= cols; i += LANES) {
        load16(&a, x + i);
        load16(&b, w + i);
        sum += a * b;
    }
    if (i < cols) {
        load_part(&a, x + i, cols - i, 0.0f);
        load_part(&b, w + i, cols - i, 0.0f);
        sum += a * b;
    }
    return sum_lanes(&sum);
}

// Does the matmuls that are the same everywhere: f32, and matrices without columns (a rank that holds no part). False: not one of them.
static bool vector_ops_matmul(float *y, int64_t y_stride, const struct matrix *w, const struct activations *act,
                              int64_t tokens, int64_t row_begin, int64_t row_end)
{
    int64_t cols = (int64_t)w->shape.cols, stored_cols = (int64_t)w->shape.cols_padded;
    if (w->shape.kind != WEIGHT_F32 && cols > 0)
        return false;
    for (int64_t row = row_begin; row < row_end; row++)
        for (int64_t t = 0; t < tokens; t++)
            y[t * y_stride + row] =
                cols ? dot_f32(act->f32 + t * act->stride, (const float *)w->data + row * stored_cols, cols) : 0.0f;
    return true;
}

// Column `col` of a row, of a kind with groups. The formulas: formats/weight.h.
static float group_value(const struct matrix *w, int64_t row, int64_t col)
{
    const struct weight_shape *shape = &w->shape;
    int64_t cols = (int64_t)shape->cols_padded, lane = row % 16;
    if (shape->kind == WEIGHT_FP8G)
        return e4m3_to_f32(((const uint8_t *)w->data)[row * cols + col]) *
               fp8g_scales(w, row)[col / shape->group_size * 16];

    bool high;
    uint64_t at = weight_tile_offset((uint64_t)row, (uint64_t)col, shape->cols_padded, &high);
    uint8_t byte = ((const uint8_t *)w->data)[at], code = high ? nibble_high(byte) : nibble_low(byte);
    struct tile_scales scales = tile_scales(w, row);
    const uint8_t *scale = tile_scales_at(&scales, col);
    switch (shape->kind) {
    case WEIGHT_INT4:
        return (float)int4_sign_extend(code) * (tile_scale(WEIGHT_INT4, scale, lane) * WEIGHT_INT4_FACTOR);
    case WEIGHT_INT4Z:
        return ((float)int4_sign_extend(code) - tile_zero(scale, lane)) *
               (tile_scale(WEIGHT_INT4Z, scale, lane) * WEIGHT_INT4_FACTOR);
    case WEIGHT_NL4:
        return (float)weight_nl4_level(code) * (tile_scale(WEIGHT_NL4, scale, lane) * WEIGHT_NL4_FACTOR);
    case WEIGHT_MXFP4:
        return e2m1_to_f32(code) * tile_scale(WEIGHT_MXFP4, scale, lane);
    default:
        return e2m1_to_f32(code) * e4m3_to_f32(scale[lane]) * scales.global[lane];
    }
}

static void vector_ops_dequantize_row(float *out, const struct matrix *w, int64_t row)
{
    const struct weight_shape *shape = &w->shape;
    int64_t cols = (int64_t)shape->cols, begin = row * (int64_t)shape->cols_padded;
    switch (shape->kind) {
    case WEIGHT_F32:
        memcpy(out, (const float *)w->data + begin, (size_t)cols * sizeof *out);
        break;
    case WEIGHT_BF16: {
        const uint16_t *data = (const uint16_t *)w->data + begin;
        for (int64_t i = 0; i < cols; i++)
            out[i] = bf16_to_f32(data[i]);
        break;
    }
    case WEIGHT_INT8: {
        const int8_t *data = (const int8_t *)w->data + begin;
        float scale = ((const float *)w->scale)[row];
        for (int64_t i = 0; i < cols; i++)
            out[i] = (float)data[i] * scale;
        break;
    }
    case WEIGHT_FP8: {
        const uint8_t *data = (const uint8_t *)w->data + begin;
        float scale = ((const float *)w->scale)[row];
        for (int64_t i = 0; i < cols; i++)
            out[i] = e4m3_to_f32(data[i]) * scale;
        break;
    }
    default:
        for (int64_t i = 0; i < cols; i++)
            out[i] = group_value(w, row, i);
        break;
    }
}

// The entries of a table that this file provides; and all of them but `prepare`.
#define VECTOR_OPS_ENTRIES .prepare = vector_ops_prepare, VECTOR_OPS_OTHER_ENTRIES
#define VECTOR_OPS_OTHER_ENTRIES                                                                                       \
    .dequantize_row = vector_ops_dequantize_row, .rms_norm = layer_ops_rms_norm, .scale_norm = layer_ops_scale_norm,   \
    .rope_table = layer_ops_rope_table, .rope = layer_ops_rope, .activate = layer_ops_activate,                        \
    .hadamard = layer_ops_hadamard, .softcap = layer_ops_softcap, .squares = layer_ops_squares,                        \
    .mix_rows = layer_ops_mix_rows, .dot_rows = layer_ops_dot_rows, .add_scaled = layer_ops_add_scaled,                \
    .add = layer_ops_add

#endif
