// Every operation of the kernel table that is not a matmul of bf16, int8, fp8 or int4, written once. Included by each
// kernels_<isa>.c and compiled with its flags; the results are the same bits everywhere, because each sum has 16 partial sums
// whatever the vector width, products and sums round separately (-ffp-contract=off), and no intrinsic stands here.
// Loops that touch elements singly are left to the compiler; sums and exp use its vector type f32x16.
#ifndef TPSHARD_KERNELS_VECTOR_OPS_H
#define TPSHARD_KERNELS_VECTOR_OPS_H

#include "formats/checked.h"
#include "formats/number_formats.h"
#include "kernels/kernels.h"

#include <math.h>
#include <string.h>

enum { LANES = 16 };

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
#define VECTOR_INLINE static inline __attribute__((always_inline))

// Before a loop over arrays of vectors: unrolled early, they live in registers. Sanitizers would need minutes for what comes of it.
#ifdef KERNELS_SANITIZED
#define UNROLL
#elif defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

VECTOR_INLINE void load16(f32x16 *out, const float *x) { memcpy(out, x, sizeof *out); }
VECTOR_INLINE void store16(float *out, const f32x16 *x) { memcpy(out, x, sizeof *x); }

// Size of the next tile of tokens when `left` are left: 6, 4, 2 or 1, for which loops are compiled apart.
VECTOR_INLINE int64_t tile_tokens(int64_t left)
{
    return left == 8 ? 4 : left >= 6 ? 6 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

// The first `count` < 16 floats; the others are `rest`.
VECTOR_INLINE void load_part(f32x16 *out, const float *x, int64_t count, float rest)
{
    float lane[LANES];
    for (int64_t i = 0; i < LANES; i++)
        lane[i] = i < count ? x[i] : rest;
    load16(out, lane);
}

VECTOR_INLINE void load_bf16(f32x16 *out, const uint16_t *x)
{
    float lane[LANES];
    for (int i = 0; i < LANES; i++)
        lane[i] = bf16_to_f32(x[i]);
    load16(out, lane);
}

VECTOR_INLINE void load_bf16_part(f32x16 *out, const uint16_t *x, int64_t count)
{
    float lane[LANES];
    for (int64_t i = 0; i < LANES; i++)
        lane[i] = i < count ? bf16_to_f32(x[i]) : 0.0f;
    load16(out, lane);
}

// The order in which every sum of 16 partial sums ends: halves onto halves.
VECTOR_INLINE float sum_lanes(const f32x16 *x)
{
    float lane[LANES];
    store16(lane, x);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++)
            lane[i] += lane[i + half];
    return lane[0];
}

// where[i] is all ones: a[i], all zeros: b[i].
VECTOR_INLINE void select16(f32x16 *out, const i32x16 *where, const f32x16 *a, const f32x16 *b)
{
    *out = (f32x16)((*where & (i32x16)*a) | (~*where & (i32x16)*b));
}

// exp of each lane: at most 2 ulp off, Inf above 88.72, 0 from -104 down (subnormals between), NaN for NaN.
VECTOR_INLINE void exp16(f32x16 *y, const f32x16 *x)
{
    const f32x16 zero = {0}, high = zero + 89.0f, low = zero - 104.0f;
    f32x16 a;
    i32x16 beyond = *x > high;
    select16(&a, &beyond, &high, x);
    beyond = a < low;
    select16(&a, &beyond, &low, &a);

    // a = n * ln2 + r, |r| <= ln2 / 2. Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits; the upper part
    // of ln2 has 15 bits, so that n times it is exact.
    f32x16 shifted = a * 0x1.715476p+0f + 12582912.0f;
    f32x16 n = shifted - 12582912.0f;
    i32x16 exponent = (i32x16)shifted - 0x4b400000;
    f32x16 r = a - n * 0x1.62e4p-1f - n * 0x1.7f7d1cp-20f;

    f32x16 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;

    // Two steps of 2^(n/2), because 2^n itself may be out of range where the result is not.
    i32x16 half = exponent >> 1;
    f32x16 first = (f32x16)((u32x16)(half + 127) << 23), second = (f32x16)((u32x16)(exponent - half + 127) << 23);
    *y = p * first * second;
}

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
    int32_t *q_sum = act->q_sum + token * (act->stride / 32);
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
        for (int i = 0; i < ACT_GROUP / 32; i++) {
            int32_t sum = 0;
            for (int j = 0; j < 32; j++)
                sum += natural[32 * i + j];
            q_sum[begin / 32 + i] = sum;
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
        if (kind == WEIGHT_INT8 || kind == WEIGHT_INT4) {
            prepare_int8_row(act, kind == WEIGHT_INT4, row, cols, token);
            continue;
        }
        float *copy = act->f32 + token * act->stride;
        memset(copy + cols, 0, (size_t)(cols_padded - cols) * sizeof *copy);
        if (kind == WEIGHT_FP8)
            prepare_fp8_row(copy, row, cols);
        else
            memcpy(copy, row, (size_t)cols * sizeof *copy);
    }
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
    case WEIGHT_INT4: {
        const uint8_t *data = w->data;
        int64_t groups = (int64_t)(shape->cols_padded / shape->group_size);
        const uint16_t *scale = (const uint16_t *)w->scale + row / 16 * groups * 16 + row % 16;
        for (int64_t i = 0; i < cols; i++) {
            bool high;
            uint8_t byte = data[weight_int4_offset((uint64_t)row, (uint64_t)i, shape->cols_padded, &high)];
            float q = int4_sign_extend(high ? nibble_high(byte) : byte);
            out[i] = q * f16_to_f32(scale[i / shape->group_size * 16]) * 0x1p-8f;
        }
        break;
    }
    case WEIGHT_KIND_COUNT:
        break;
    }
}

// ---- The layer's other operations ----------------------------------------------------------------------------------

static void vector_ops_rms_norm(float *y, const float *x, const float *weight, int64_t cols, float eps)
{
    f32x16 sum = {0}, a;
    int64_t i = 0;
    for (; i + LANES <= cols; i += LANES) {
        load16(&a, x + i);
        sum += a * a;
    }
    if (i < cols) {
        load_part(&a, x + i, cols - i, 0.0f);
        sum += a * a;
    }
    float lane[LANES];
    store16(lane, &sum);
    double squares = 0;
    for (int l = 0; l < LANES; l++)
        squares += lane[l];
    float inverse = (float)(1.0 / sqrt(squares / (double)cols + eps));
    for (i = 0; i < cols; i++)
        y[i] = x[i] * inverse * weight[i];
}

static void vector_ops_rope_table(float *cos, float *sin, const float *inv_freq, int64_t half, int64_t position,
                                  float factor)
{
    for (int64_t i = 0; i < half; i++) {
        float angle = (float)position * inv_freq[i];
        cos[i] = cosf(angle) * factor;
        sin[i] = sinf(angle) * factor;
    }
}

static void vector_ops_rope(float *x, const float *restrict cos, const float *restrict sin, int64_t head_dim)
{
    int64_t half = head_dim / 2;
    float *restrict first = x, *restrict second = x + half;
    for (int64_t i = 0; i < half; i++) {
        float a = first[i], b = second[i];
        first[i] = a * cos[i] - b * sin[i];
        second[i] = b * cos[i] + a * sin[i];
    }
}

enum { MAX_HEAD_VECTORS = KERNELS_MAX_HEAD_DIM / LANES };

static float dot_bf16(const f32x16 *q, const uint16_t *k, int64_t head_dim)
{
    f32x16 sum = {0}, a;
    int64_t i = 0;
    for (; i + LANES <= head_dim; i += LANES) {
        load_bf16(&a, k + i);
        sum += a * q[i / LANES];
    }
    if (i < head_dim) {
        load_bf16_part(&a, k + i, head_dim - i);
        sum += a * q[i / LANES];
    }
    return sum_lanes(&sum);
}

// scores[i] = exp(scores[i] - largest); the sum, lane i % 16 first. A NaN score is passed over by the maximum and
// reaches the sum.
static float exp_scores(float *scores, int64_t count)
{
    float largest = -INFINITY;
    for (int64_t i = 0; i < count; i++)
        largest = scores[i] > largest ? scores[i] : largest;
    f32x16 sum = {0}, a;
    for (int64_t i = 0; i < count; i += LANES) {
        int64_t part = count - i < LANES ? count - i : LANES;
        load_part(&a, scores + i, part, -INFINITY); // exp(-Inf) = 0
        a -= largest;
        exp16(&a, &a);
        sum += a;
        memcpy(scores + i, &a, (size_t)part * sizeof *scores);
    }
    return sum_lanes(&sum);
}

// Slots of one page of keys or values as bfloat16; e4m3 is widened into `wide`, exactly.
static const uint16_t *page_rows(const struct kv_view *kv, const void *pool, int64_t slot, int64_t count,
                                 uint16_t wide[KV_PAGE_TOKENS * KERNELS_MAX_HEAD_DIM])
{
    if (kv->format == KV_BF16)
        return (const uint16_t *)pool + slot * kv->head_dim;
    const uint8_t *narrow = (const uint8_t *)pool + slot * kv->head_dim;
    for (int64_t i = 0; i < count * kv->head_dim; i++)
        wide[i] = (uint16_t)(f32_bits(e4m3_to_f32(narrow[i])) >> 16);
    return wide;
}

static void vector_ops_attention(float *out, const float *q, const struct kv_view *kv, int64_t kv_head, int64_t first,
                                 int64_t end, float scale, float *scores)
{
    int64_t head_dim = kv->head_dim;
    uint16_t wide[KV_PAGE_TOKENS * KERNELS_MAX_HEAD_DIM];
    memset(out, 0, (size_t)head_dim * sizeof *out);
    if (first >= end)
        return;

    f32x16 query[MAX_HEAD_VECTORS];
    int64_t vectors = (head_dim + LANES - 1) / LANES;
    for (int64_t i = 0; i < vectors; i++)
        load_part(&query[i], q + i * LANES, head_dim - i * LANES, 0.0f);
    for (int64_t p = first, stop; p < end; p = stop) {
        int64_t page_end = (p / KV_PAGE_TOKENS + 1) * KV_PAGE_TOKENS;
        stop = page_end < end ? page_end : end;
        int64_t slot =
            (kv->pages[p / KV_PAGE_TOKENS] * kv->num_kv_heads + kv_head) * KV_PAGE_TOKENS + p % KV_PAGE_TOKENS;
        const uint16_t *k = page_rows(kv, kv->k, slot, stop - p, wide);
        for (int64_t s = 0; s < stop - p; s++)
            scores[p - first + s] = dot_bf16(query, k + s * head_dim, head_dim) * scale;
    }
    float sum = exp_scores(scores, end - first);

    // Each output element is a sum over ascending positions. Page by page and 64 elements at a time, so that the partial
    // sums stay in registers.
    for (int64_t p = first, stop; p < end; p = stop) {
        int64_t page_end = (p / KV_PAGE_TOKENS + 1) * KV_PAGE_TOKENS;
        stop = page_end < end ? page_end : end;
        int64_t slot =
            (kv->pages[p / KV_PAGE_TOKENS] * kv->num_kv_heads + kv_head) * KV_PAGE_TOKENS + p % KV_PAGE_TOKENS;
        const uint16_t *v = page_rows(kv, kv->v, slot, stop - p, wide);
        const float *weight = scores + (p - first);
        int64_t count = stop - p, i = 0;
        for (; i + 4 * LANES <= head_dim; i += 4 * LANES) {
            f32x16 acc[4], a;
            for (int j = 0; j < 4; j++)
                load16(&acc[j], out + i + j * LANES);
            for (int64_t s = 0; s < count; s++)
                for (int j = 0; j < 4; j++) {
                    load_bf16(&a, v + s * head_dim + i + j * LANES);
                    acc[j] += a * weight[s];
                }
            for (int j = 0; j < 4; j++)
                store16(out + i + j * LANES, &acc[j]);
        }
        for (int64_t s = 0; s < count; s++)
            for (int64_t d = i; d < head_dim; d++)
                out[d] += bf16_to_f32(v[s * head_dim + d]) * weight[s];
    }
    for (int64_t i = 0; i < head_dim; i++)
        out[i] /= sum;
}

static void vector_ops_silu_mul(float *out, const float *gate, const float *up, int64_t count)
{
    for (int64_t i = 0; i < count; i += LANES) {
        int64_t part = count - i < LANES ? count - i : LANES;
        f32x16 g, u, e;
        load_part(&g, gate + i, part, 0.0f);
        load_part(&u, up + i, part, 0.0f);
        e = -g;
        exp16(&e, &e);
        g = g / (e + 1.0f) * u;
        memcpy(out + i, &g, (size_t)part * sizeof *out);
    }
}

static void vector_ops_add(float *y, const float *x, int64_t count)
{
    for (int64_t i = 0; i < count; i++)
        y[i] += x[i];
}

// The entries of a table that this file provides.
#define VECTOR_OPS_ENTRIES                                                                                             \
    .prepare = vector_ops_prepare, .dequantize_row = vector_ops_dequantize_row, .rms_norm = vector_ops_rms_norm,       \
    .rope_table = vector_ops_rope_table, .rope = vector_ops_rope, .attention = vector_ops_attention,                   \
    .silu_mul = vector_ops_silu_mul, .add = vector_ops_add

#endif
