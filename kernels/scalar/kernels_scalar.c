// The reference kernels: plain C, no instruction set assumed. Slow, short, and what every other table is tested against.
#include "kernels/kernels_internal.h"
#include "kernels/vector_ops.h"

static bool supported(void) { return true; }

// ---- int4, int8: exact integer dot products per group, see kernels.h -----------------------------------------------

// One row of one tile (64 columns), whose bytes lie in the order of act->q. sum[half] gets the products of 32 natural
// columns each: of every four words, two belong to each half.
static void dot_int4_tile_row(int32_t sum[2], const uint8_t *bytes, bool high, const int8_t *q)
{
    sum[0] = sum[1] = 0;
    for (int i = 0; i < 64; i++) {
        int32_t code = int4_sign_extend(high ? nibble_high(bytes[i]) : nibble_low(bytes[i]));
        sum[i / 8 % 2] += code * q[i];
    }
}

static float dot_int4_row(const struct matrix *w, int64_t row, const int8_t *q, const float *q_scale)
{
    int64_t tiles = (int64_t)w->shape.cols_padded / 64, group_size = w->shape.group_size;
    const uint8_t *tile = (const uint8_t *)w->data + (row / 64 * tiles * 4 + row % 64 / 16) * WEIGHT_TILE_BYTES;
    const uint16_t *scale = (const uint16_t *)w->scale + row / 16 * (tiles * 64 / group_size) * 16 + row % 16;
    float y = 0;
    int32_t dot = 0;
    for (int64_t col = 0; col < tiles * 64; col += 32) {
        int32_t half[2];
        dot_int4_tile_row(half, tile + col / 64 * 4 * WEIGHT_TILE_BYTES + row % 8 * 64, row % 16 >= 8,
                          q + col / 64 * 64);
        dot += half[col / 32 % 2];
        if ((col + 32) % group_size == 0) {
            y += (float)dot * (f16_to_f32(scale[col / group_size * 16]) * q_scale[col / ACT_GROUP]);
            dot = 0;
        }
    }
    return y * 0x1p-8f;
}

static float dot_int8_row(const struct matrix *w, int64_t row, const int8_t *q, const float *q_scale)
{
    int64_t cols = (int64_t)w->shape.cols_padded;
    const int8_t *codes = (const int8_t *)w->data + row * cols;
    float y = 0;
    for (int64_t begin = 0; begin < cols; begin += ACT_GROUP) {
        int64_t end = begin + ACT_GROUP < cols ? begin + ACT_GROUP : cols;
        int32_t dot = 0;
        for (int64_t i = begin; i < end; i++)
            dot += codes[i] * q[i];
        y += (float)dot * q_scale[begin / ACT_GROUP];
    }
    return y * ((const float *)w->scale)[row];
}

// ---- bf16, fp8: 16 partial sums ------------------------------------------------------------------------------------

static float dot_bf16_row(const struct matrix *w, int64_t row, const float *x)
{
    int64_t cols = (int64_t)w->shape.cols_padded;
    const uint16_t *codes = (const uint16_t *)w->data + row * cols;
    f32x16 sum = {0}, a, b;
    for (int64_t i = 0; i < cols; i += LANES) {
        load16(&a, x + i);
        load_bf16(&b, codes + i);
        sum += a * b;
    }
    return sum_lanes(&sum);
}

static float dot_fp8_row(const struct matrix *w, int64_t row, const float *x)
{
    int64_t cols = (int64_t)w->shape.cols_padded;
    const uint8_t *codes = (const uint8_t *)w->data + row * cols;
    f32x16 sum = {0}, a, b;
    for (int64_t i = 0; i < cols; i += LANES) {
        float lane[LANES]; // the even columns of 32, then the odd ones
        for (int j = 0; j < LANES; j++)
            lane[j] = e4m3_to_f32(codes[i / 32 * 32 + 2 * j + i / 16 % 2]);
        load16(&a, x + i);
        load16(&b, lane);
        sum += a * b;
    }
    return sum_lanes(&sum) * ((const float *)w->scale)[row];
}

static void matmul(float *y, int64_t y_stride, const struct matrix *w, const struct activations *act, int64_t tokens,
                   int64_t row_begin, int64_t row_end)
{
    if (vector_ops_matmul(y, y_stride, w, act, tokens, row_begin, row_end))
        return;
    for (int64_t row = row_begin; row < row_end; row++)
        for (int64_t t = 0; t < tokens; t++) {
            const float *x = act->f32 + t * act->stride;
            const int8_t *q = act->q + t * act->stride;
            const float *q_scale = act->q_scale + t * (act->stride / ACT_GROUP);
            float *out = &y[t * y_stride + row];
            switch (w->shape.kind) {
            case WEIGHT_BF16:
                *out = dot_bf16_row(w, row, x);
                break;
            case WEIGHT_FP8:
                *out = dot_fp8_row(w, row, x);
                break;
            case WEIGHT_INT8:
                *out = dot_int8_row(w, row, q, q_scale);
                break;
            case WEIGHT_INT4:
                *out = dot_int4_row(w, row, q, q_scale);
                break;
            case WEIGHT_F32:
            case WEIGHT_KIND_COUNT:
                break;
            }
        }
}

const struct kernels kernels_scalar = {
    .name = "scalar",
    .supported = supported,
    .matmul = matmul,
    VECTOR_OPS_ENTRIES,
};
