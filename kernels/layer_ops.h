// The operations of a layer between its matmuls: norms, rotation, activations and what stands around attention. A part of vector_ops.h,
// which says what holds for all of them.
#ifndef TPSHARD_KERNELS_LAYER_OPS_H
#define TPSHARD_KERNELS_LAYER_OPS_H

#include "kernels/kernels.h"
#include "kernels/vectors.h"

static double layer_ops_squares(const float *x, int64_t cols)
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
    return squares;
}

static void layer_ops_scale_norm(float *y, const float *x, const float *weight, int64_t cols, double squares,
                                 int64_t width, float eps)
{
    float inverse = (float)(1.0 / sqrt(squares / (double)width + eps));
    for (int64_t i = 0; i < cols; i++)
        y[i] = x[i] * inverse * weight[i];
}

static void layer_ops_rms_norm(float *y, const float *x, const float *weight, int64_t cols, float eps)
{
    layer_ops_scale_norm(y, x, weight, cols, layer_ops_squares(x, cols), cols, eps);
}

static void layer_ops_rope_table(float *cos, float *sin, const float *inv_freq, int64_t half, int64_t position,
                                 float factor)
{
    for (int64_t i = 0; i < half; i++) {
        float angle = (float)position * inv_freq[i];
        cos[i] = cosf(angle) * factor;
        sin[i] = sinf(angle) * factor;
    }
}

static void layer_ops_rope(float *x, const float *restrict cos, const float *restrict sin, int64_t rotary_dim,
                           bool interleaved)
{
    int64_t half = rotary_dim / 2, step = interleaved ? 2 : 1;
    float *first = x, *second = interleaved ? x + 1 : x + half;
    for (int64_t i = 0; i < half; i++) {
        float a = first[i * step], b = second[i * step];
        first[i * step] = a * cos[i] - b * sin[i];
        second[i * step] = b * cos[i] + a * sin[i];
    }
}

// ---- Around attention ----------------------------------------------------------------------------------------------

enum { MAX_KEY_VECTORS = KERNELS_MAX_KEY_DIM / LANES };

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

static void layer_ops_softcap(float *x, int64_t count, float cap)
{
    for (int64_t i = 0; i < count; i += LANES) {
        int64_t part = count - i < LANES ? count - i : LANES;
        f32x16 a;
        load_part(&a, x + i, part, 0.0f);
        a = a / cap;
        tanh16(&a, &a);
        a = a * cap;
        memcpy(x + i, &a, (size_t)part * sizeof *x);
    }
}

// out[cols] += sum over rows r, ascending, of x[r] * w[r][:]. 64 columns at a time, so that the partial sums stay in registers.
static void add_rows(float *out, const float *x, const uint16_t *w, int64_t stride, int64_t rows, int64_t cols)
{
    int64_t i = 0;
    for (; i + 4 * LANES <= cols; i += 4 * LANES) {
        f32x16 acc[4], a;
        for (int j = 0; j < 4; j++)
            load16(&acc[j], out + i + j * LANES);
        for (int64_t r = 0; r < rows; r++)
            for (int j = 0; j < 4; j++) {
                load_bf16(&a, w + r * stride + i + j * LANES);
                acc[j] += a * x[r];
            }
        for (int j = 0; j < 4; j++)
            store16(out + i + j * LANES, &acc[j]);
    }
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = i; c < cols; c++)
            out[c] += bf16_to_f32(w[r * stride + c]) * x[r];
}

static void layer_ops_mix_rows(float *out, const float *x, const uint16_t *w, int64_t stride, int64_t rows,
                               int64_t cols)
{
    memset(out, 0, (size_t)cols * sizeof *out);
    add_rows(out, x, w, stride, rows, cols);
}

static void layer_ops_dot_rows(float *out, const float *x, const uint16_t *w, int64_t stride, int64_t rows,
                               int64_t cols)
{
    f32x16 vector[MAX_KEY_VECTORS];
    for (int64_t i = 0; i < (cols + LANES - 1) / LANES; i++)
        load_part(&vector[i], x + i * LANES, cols - i * LANES, 0.0f);
    for (int64_t r = 0; r < rows; r++)
        out[r] = dot_bf16(vector, w + r * stride, cols);
}

// ---- Activations ---------------------------------------------------------------------------------------------------

// x * sigmoid(z)
VECTOR_INLINE void times_sigmoid(f32x16 *x, const f32x16 *z)
{
    f32x16 e = -*z;
    exp16(&e, &e);
    *x = *x / (e + 1.0f);
}

// Every lane to at most `limit`, and at least -limit when `both`; a NaN stays.
VECTOR_INLINE void limit16(f32x16 *x, float limit, bool both)
{
    const f32x16 zero = {0}, high = zero + limit, low = zero - limit;
    i32x16 beyond = *x > high;
    select16(x, &beyond, &high, x);
    if (both) {
        beyond = *x < low;
        select16(x, &beyond, &low, x);
    }
}

// The formulas are transformers'. gelu(x), tanh form, is x * sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)).
static void layer_ops_activate(float *out, const float *gate, const float *up, int64_t count,
                               enum activation activation)
{
    for (int64_t i = 0; i < count; i += LANES) {
        int64_t part = count - i < LANES ? count - i : LANES;
        f32x16 g, u, z;
        load_part(&g, gate + i, part, 0.0f);
        load_part(&u, up + i, part, 0.0f);
        z = g;
        switch (activation) {
        case ACTIVATION_SILU:
            break;
        case ACTIVATION_GELU_TANH:
            z = (g + g * g * g * 0.044715f) * 0x1.988454p+0f;
            break;
        case ACTIVATION_GPT_OSS:
            limit16(&g, 7.0f, false);
            limit16(&u, 7.0f, true);
            z = g * 1.702f;
            u += 1.0f;
            break;
        }
        times_sigmoid(&g, &z);
        g *= u;
        memcpy(out + i, &g, (size_t)part * sizeof *out);
    }
}

// ---- Rotation ------------------------------------------------------------------------------------------------------

// 1 / sqrt(block), block a power of two.
VECTOR_INLINE float hadamard_factor(int64_t block)
{
    int shift = __builtin_ctzll((unsigned long long)block);
    return f32_from_bits((uint32_t)(127 - shift / 2) << 23) * (shift % 2 ? 0x1.6a09e6p-1f : 1.0f);
}

// Columns 1, 2, 4 and 8 apart. The upper one of two becomes the lower one less itself.
#define HADAMARD_STEP(x, sign, ...) *(x) = VECTOR_SHUFFLE(i32x16, *(x), *(x), __VA_ARGS__) + *(x) * (sign)
VECTOR_INLINE void hadamard16(f32x16 *x)
{
    const f32x16 by1 = {1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1};
    const f32x16 by2 = {1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1};
    const f32x16 by4 = {1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1};
    const f32x16 by8 = {1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1};
    HADAMARD_STEP(x, by1, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    HADAMARD_STEP(x, by2, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    HADAMARD_STEP(x, by4, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    HADAMARD_STEP(x, by8, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
}
#undef HADAMARD_STEP

// One block of at least 16 columns.
static void hadamard_block(float *x, int64_t block)
{
    f32x16 v[KERNELS_MAX_ROTATION / LANES];
    int64_t count = block / LANES;
    float factor = hadamard_factor(block);
    for (int64_t i = 0; i < count; i++) {
        load16(&v[i], x + i * LANES);
        hadamard16(&v[i]);
    }
    for (int64_t step = 1; step < count; step *= 2)
        for (int64_t i = 0; i < count; i++) {
            if (i & step)
                continue;
            f32x16 low = v[i], high = v[i + step];
            v[i] = low + high;
            v[i + step] = low - high;
        }
    for (int64_t i = 0; i < count; i++) {
        v[i] *= factor;
        store16(x + i * LANES, &v[i]);
    }
}

static void layer_ops_hadamard(float *x, int64_t count, int64_t block)
{
    for (float *end = x + count; block >= LANES && x < end; x += block)
        hadamard_block(x, block);
    if (block >= LANES)
        return;
    float factor = hadamard_factor(block);
    for (int64_t step = 1; step < block; step *= 2)
        for (int64_t i = 0; i < count; i++) {
            if (i & step)
                continue;
            float low = x[i], high = x[i + step];
            x[i] = low + high;
            x[i + step] = low - high;
        }
    for (int64_t i = 0; i < count; i++)
        x[i] *= factor;
}

static void layer_ops_add_scaled(float *y, const float *x, int64_t count, float factor)
{
    for (int64_t i = 0; i < count; i++)
        y[i] += factor * x[i];
}

static void layer_ops_add(float *y, const float *x, int64_t count)
{
    for (int64_t i = 0; i < count; i++)
        y[i] += x[i];
}

#endif
