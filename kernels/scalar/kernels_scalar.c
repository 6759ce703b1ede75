// The reference kernels: plain C, no instruction set assumed. Slow, short, and what every other table is tested against.
#include "kernels/attention.h"
#include "kernels/kernels_internal.h"
#include "kernels/vector_ops.h"

static bool supported(void) { return true; }

// ---- Tiled kinds, int8: exact integer dot products per group, see kernels.h ----------------------------------------

// Products of 16 natural columns of one row of a tile, whose bytes lie in the order of act->q: every fourth word of four bytes.
static int32_t dot_16(enum weight_kind kind, const uint8_t *bytes, bool high, const int8_t *q)
{
    int32_t sum = 0;
    for (int t = 0; t < 4; t++)
        for (int j = 16 * t; j < 16 * t + 4; j++) {
            uint8_t code = high ? nibble_high(bytes[j]) : nibble_low(bytes[j]);
            sum += q[j] * (is_fp4(kind)         ? e2m1_doubled(code)
                           : kind == WEIGHT_NL4 ? weight_nl4_level(code)
                                                : int4_sign_extend(code));
        }
    return sum;
}

static float dot_tiled_row(const struct matrix *w, int64_t row, const int8_t *q, const float *q_scale,
                           const int32_t *q_sum)
{
    enum weight_kind kind = w->shape.kind;
    int64_t cols = (int64_t)w->shape.cols_padded, group_size = w->shape.group_size;
    const uint8_t *tile = (const uint8_t *)w->data + (row / 64 * (cols / 64) * 4 + row % 64 / 16) * WEIGHT_TILE_BYTES;
    struct tile_scales scales = tile_scales(w, row);
    float y = 0;
    int32_t dot = 0, sum = 0;
    for (int64_t col = 0; col < cols; col += 16) {
        dot += dot_16(kind, tile + col / 64 * 4 * WEIGHT_TILE_BYTES + row % 8 * 64 + col / 16 % 4 * 4, row % 16 >= 8,
                      q + col / 64 * 64 + col / 16 % 4 * 4);
        sum += q_sum[col / ACT_SUM];
        if ((col + 16) % group_size)
            continue;
        const uint8_t *at = tile_scales_at(&scales, col);
        float value = (float)dot, scale = tile_scale(kind, at, row % 16);
        if (kind == WEIGHT_INT4Z)
            value -= tile_zero(at, row % 16) * (float)sum;
        y += value * (scale * q_scale[col / ACT_GROUP]);
        dot = sum = 0;
    }
    return y * tile_last(kind, scales.global, row % 16);
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

// ---- bf16, fp8, fp8g: 16 partial sums ------------------------------------------------------------------------------------

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

// fp8, and fp8g with a scale for each 128 columns.
static float dot_fp8_row(const struct matrix *w, int64_t row, const float *x)
{
    int64_t cols = (int64_t)w->shape.cols_padded;
    const uint8_t *codes = (const uint8_t *)w->data + row * cols;
    bool groups = w->shape.kind == WEIGHT_FP8G;
    const float *scale = groups ? fp8g_scales(w, row) : NULL;
    f32x16 sum = {0}, total = {0}, a, b;
    for (int64_t i = 0; i < cols; i += LANES) {
        float lane[LANES]; // the even columns of 32, then the odd ones
        for (int j = 0; j < LANES; j++)
            lane[j] = e4m3_to_f32(codes[i / 32 * 32 + 2 * j + i / 16 % 2]);
        load16(&a, x + i);
        load16(&b, lane);
        sum += a * b;
        if (groups && (i + LANES) % w->shape.group_size == 0) {
            total += sum * scale[i / w->shape.group_size * 16];
            sum = (f32x16){0};
        }
    }
    return groups ? sum_lanes(&total) : sum_lanes(&sum) * ((const float *)w->scale)[row];
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
            const int32_t *q_sum = act->q_sum + t * (act->stride / ACT_SUM);
            float *out = &y[t * y_stride + row];
            switch (w->shape.kind) {
            case WEIGHT_BF16:
                *out = dot_bf16_row(w, row, x);
                break;
            case WEIGHT_FP8:
            case WEIGHT_FP8G:
                *out = dot_fp8_row(w, row, x);
                break;
            case WEIGHT_INT8:
                *out = dot_int8_row(w, row, q, q_scale);
                break;
            case WEIGHT_INT4:
            case WEIGHT_INT4Z:
            case WEIGHT_NL4:
            case WEIGHT_MXFP4:
            case WEIGHT_NVFP4:
                *out = dot_tiled_row(w, row, q, q_scale, q_sum);
                break;
            case WEIGHT_F32:
            case WEIGHT_KIND_COUNT:
                break;
            }
        }
}

const struct kernels kernels_scalar = {
    .name = "scalar",
    .sums = "scalar",
    .supported = supported,
    .matmul = matmul,
    .attention = attention_base,
    VECTOR_OPS_ENTRIES,
};
