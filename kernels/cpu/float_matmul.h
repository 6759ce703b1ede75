// Matmul of bf16, fp8 and fp8g weights, written once for the vector types of kernels_<isa>.c, which define before they include this:
//   struct lanes                                      16 floats
//   lanes_zero(), lanes_all(float), lanes_load(const float *)   struct lanes
//   lanes_bf16(const uint8_t *codes)                  16 weights
//   lanes_fp8(const uint8_t *codes, bool odd)         the even or odd ones of 32 weights, 2^-8 times their value, NaN as anything
//   lanes_fp8_all(struct lanes out[4], codes)         the same of 64: even and odd ones of the first 32, then of the others
//   struct magnitudes, zero at first                  magnitudes_add(&m, codes) keeps the largest of 64 codes in each place
//   magnitudes_nan(&m)                                whether one of them was NaN
//   lanes_fmadd(struct lanes *sum, a, b)              *sum = a * b + *sum, rounded once
//   lanes_store(float *, const struct lanes *)
//   FLOAT_TILE_ROWS, FLOAT_TILE_TOKENS                sums that fit the registers; rows divide FLOAT_ROWS; tokens 3 or 6
//   FLOAT_FEW_ROWS, FLOAT_FEW_TOKENS                  rows read side by side for so few tokens, 1 or 4 (with half the rows)
// Every sum is 16 partial sums over ascending columns, whatever the tile: see kernels.h. `kind` is a constant wherever it is passed.
#ifndef TPSHARD_KERNELS_CPU_FLOAT_MATMUL_H
#define TPSHARD_KERNELS_CPU_FLOAT_MATMUL_H

#include "kernels/vector_ops.h"

enum {
    FLOAT_ROWS = 32,  // rows and columns for which a tile of tokens
    FLOAT_COLS = 512, //   stays in L1 with its sums
    FLOAT_PREFETCH_BYTES = 256,
    FP8G_COLS = 128, // of one scale
};

// Whether a piece of a row holds an fp8 NaN: the conversion does not see it.
VECTOR_INLINE bool float_has_nan(const uint8_t *codes, int64_t cols)
{
    struct magnitudes largest = {0};
    for (int64_t i = 0; i < cols; i += 64)
        magnitudes_add(&largest, codes + i);
    return magnitudes_nan(&largest);
}

// Weights [16 * part, 16 * part + 16) of the 64 (fp8: in the order of the activations) that begin at column `col` of a row.
VECTOR_INLINE struct lanes float_weights(const uint8_t *row, int64_t col, int part, enum weight_kind kind)
{
    return kind == WEIGHT_BF16 ? lanes_bf16(row + 2 * (col + part * LANES))
                               : lanes_fp8(row + col + part / 2 * 32, part % 2);
}

// sum[r * tokens + t] += products of columns [0, cols) of row r and token t; fp8g: of one group, times scale[r].
VECTOR_INLINE void float_tile(struct lanes *sum, const uint8_t *codes, int64_t row_bytes, const float *scale,
                              const float *x, int64_t x_stride, int64_t cols, int rows, int tokens,
                              enum weight_kind kind)
{
    enum { MAX_SUMS = 24, MAX_ROWS = 8, PARTS = 4 };
    struct lanes s[MAX_SUMS];
    UNROLL
    for (int i = 0; i < rows * tokens; i++)
        s[i] = kind == WEIGHT_FP8G ? lanes_zero() : sum[i];
    for (int64_t col = 0; col < cols; col += PARTS * LANES) {
        UNROLL
        for (int part = 0; part < PARTS; part++) {
            struct lanes weight[MAX_ROWS];
            UNROLL
            for (int r = 0; r < rows; r++) {
                const uint8_t *row = codes + r * row_bytes;
                weight[r] = float_weights(row, col, part, kind);
                if (tokens <= 4 && part % (kind == WEIGHT_BF16 ? 2 : 4) == 0)
                    __builtin_prefetch(row + (kind == WEIGHT_BF16 ? 2 * (col + part * LANES) : col) +
                                       FLOAT_PREFETCH_BYTES);
            }
            UNROLL
            for (int t = 0; t < tokens; t++) {
                struct lanes xt = lanes_load(x + t * x_stride + col + part * LANES);
                UNROLL
                for (int r = 0; r < rows; r++)
                    lanes_fmadd(&s[r * tokens + t], weight[r], xt);
            }
        }
    }
    UNROLL
    for (int i = 0; i < rows * tokens; i++)
        if (kind == WEIGHT_FP8G)
            lanes_fmadd(&sum[i], s[i], lanes_all(scale[i / tokens]));
        else
            sum[i] = s[i];
}

VECTOR_INLINE void float_tile_any(struct lanes *sum, const uint8_t *codes, int64_t row_bytes, const float *scale,
                                  const float *x, int64_t x_stride, int64_t cols, int64_t tokens, enum weight_kind kind)
{
#define FLOAT_CASE(n)                                                                                                  \
    case n:                                                                                                            \
        float_tile(sum, codes, row_bytes, scale, x, x_stride, cols, FLOAT_TILE_ROWS, n, kind);                         \
        break
    switch (tokens) {
        FLOAT_CASE(1);
        FLOAT_CASE(2);
#if FLOAT_TILE_TOKENS == 6
        FLOAT_CASE(4);
        FLOAT_CASE(6);
#else
        FLOAT_CASE(3);
#endif
    }
#undef FLOAT_CASE
}

VECTOR_INLINE void float_store(float *y, const struct lanes *sum, const struct matrix *w, int64_t row, bool nan)
{
    float lane[LANES];
    lanes_store(lane, sum);
    f32x16 lanes;
    load16(&lanes, lane);
    float total = sum_lanes(&lanes);
    if (w->shape.kind != WEIGHT_BF16)
        total = nan ? NAN : total * 0x1p8f * (w->shape.kind == WEIGHT_FP8 ? ((const float *)w->scale)[row] : 1.0f);
    y[row] = total;
}

// Few tokens: bound by memory, so `rows` rows from `row` on are read side by side from one end to the other, each cache line whole at once:
// rows of a length of 2^n bytes share few sets of L1, and a line may not last there until a second look.
VECTOR_INLINE void float_few(float *y, int64_t y_stride, const struct matrix *w, const float *x, int64_t x_stride,
                             int64_t row, int64_t row_end, int rows, int tokens, enum weight_kind kind)
{
    enum { PARTS = 4, MAX_ROWS = 8, MAX_SUMS = 24 };
    int64_t cols = (int64_t)w->shape.cols_padded, elem_bytes = kind == WEIGHT_BF16 ? 2 : 1;
    int64_t row_bytes = cols * elem_bytes;
    const uint8_t *codes = (const uint8_t *)w->data + row * row_bytes;
    const float *scale = kind == WEIGHT_FP8G ? fp8g_scales(w, row) : NULL;
    struct lanes sum[MAX_SUMS], total[MAX_SUMS];
    struct magnitudes largest[MAX_ROWS] = {0};
    UNROLL
    for (int i = 0; i < rows * tokens; i++)
        sum[i] = total[i] = lanes_zero();
    for (int64_t col = 0; col < cols; col += PARTS * LANES) {
        UNROLL
        for (int r = 0; r < rows; r++) {
            const uint8_t *from = codes + r * row_bytes + col * elem_bytes;
            struct lanes weights[PARTS];
            for (int64_t line = 0; line < elem_bytes; line++)
                __builtin_prefetch(from + line * 64 + FLOAT_PREFETCH_BYTES);
            if (kind == WEIGHT_BF16) {
                for (int part = 0; part < PARTS; part++)
                    weights[part] = lanes_bf16(from + 2 * part * LANES);
            } else {
                lanes_fp8_all(weights, from);
                magnitudes_add(&largest[r], from);
            }
            UNROLL
            for (int t = 0; t < tokens; t++) {
                UNROLL
                for (int part = 0; part < PARTS; part++)
                    lanes_fmadd(&sum[r * tokens + t], weights[part], lanes_load(x + t * x_stride + col + part * LANES));
            }
        }
        if (kind != WEIGHT_FP8G || (col + PARTS * LANES) % FP8G_COLS)
            continue;
        UNROLL
        for (int i = 0; i < rows * tokens; i++) {
            lanes_fmadd(&total[i], sum[i], lanes_all(scale[col / FP8G_COLS * 16 + i / tokens]));
            sum[i] = lanes_zero();
        }
    }
    for (int r = 0; r < rows && row + r < row_end; r++)
        for (int t = 0; t < tokens; t++)
            float_store(y + t * y_stride, kind == WEIGHT_FP8G ? &total[r * tokens + t] : &sum[r * tokens + t], w,
                        row + r, kind != WEIGHT_BF16 && magnitudes_nan(&largest[r]));
}

// tokens <= FLOAT_FEW_TOKENS
VECTOR_INLINE void float_few_any(float *y, int64_t y_stride, const struct matrix *w, const struct activations *act,
                                 int64_t tokens, int64_t row_begin, int64_t row_end, enum weight_kind kind)
{
    const float *x = act->f32;
    int64_t stride = act->stride;
    for (int64_t row = row_begin; row < row_end; row += FLOAT_FEW_ROWS)
        switch (tokens) {
        case 1:
            float_few(y, y_stride, w, x, stride, row, row_end, FLOAT_FEW_ROWS, 1, kind);
            break;
#if FLOAT_FEW_TOKENS > 1
        case 2:
            float_few(y, y_stride, w, x, stride, row, row_end, FLOAT_FEW_ROWS, 2, kind);
            break;
        case 3:
            float_few(y, y_stride, w, x, stride, row, row_end, FLOAT_FEW_ROWS, 3, kind);
            break;
        case 4:
            for (int half = 0; half < FLOAT_FEW_ROWS; half += FLOAT_FEW_ROWS / 2)
                float_few(y, y_stride, w, x, stride, row + half, row_end, FLOAT_FEW_ROWS / 2, 4, kind);
            break;
#endif
        }
}

// FLOAT_ROWS rows from `row` on, all tokens.
VECTOR_INLINE void float_block(float *y, int64_t y_stride, const struct matrix *w, const struct activations *act,
                               int64_t tokens, int64_t row, int64_t row_end, enum weight_kind kind)
{
    int64_t cols = (int64_t)w->shape.cols_padded, elem_bytes = kind == WEIGHT_BF16 ? 2 : 1;
    int64_t row_bytes = cols * elem_bytes, step = kind == WEIGHT_FP8G ? FP8G_COLS : FLOAT_COLS;
    const uint8_t *codes = (const uint8_t *)w->data + row * row_bytes;
    bool nan[FLOAT_ROWS] = {0};
    for (int64_t token = 0, count; token < tokens; token += count) {
        int64_t left = tokens - token;
        count = FLOAT_TILE_TOKENS == 6 ? tile_tokens(left) : left < 3 ? left : 3;
        struct lanes sum[FLOAT_ROWS * FLOAT_TILE_TOKENS];
        for (int64_t i = 0; i < FLOAT_ROWS * count; i++)
            sum[i] = lanes_zero();
        for (int64_t col = 0; col < cols; col += step) {
            const float *x = act->f32 + token * act->stride + col;
            int64_t part = cols - col < step ? cols - col : step;
            for (int r = 0; kind != WEIGHT_BF16 && token == 0 && r < FLOAT_ROWS; r++)
                nan[r] |= float_has_nan(codes + r * row_bytes + col, part);
            for (int r = 0; r < FLOAT_ROWS; r += FLOAT_TILE_ROWS) {
                const float *scale = kind == WEIGHT_FP8G ? fp8g_scales(w, row + r) + col / FP8G_COLS * 16 : NULL;
                float_tile_any(sum + r * count, codes + r * row_bytes + col * elem_bytes, row_bytes, scale, x,
                               act->stride, part, count, kind);
            }
        }
        for (int r = 0; r < FLOAT_ROWS && row + r < row_end; r++)
            for (int64_t t = 0; t < count; t++)
                float_store(y + (token + t) * y_stride, &sum[r * count + t], w, row + r, nan[r]);
    }
}

VECTOR_INLINE void float_matmul_kind(float *y, int64_t y_stride, const struct matrix *w, const struct activations *act,
                                     int64_t tokens, int64_t row_begin, int64_t row_end, enum weight_kind kind)
{
    if (tokens <= FLOAT_FEW_TOKENS) {
        float_few_any(y, y_stride, w, act, tokens, row_begin, row_end, kind);
        return;
    }
    for (int64_t row = row_begin; row < row_end; row += FLOAT_ROWS)
        float_block(y, y_stride, w, act, tokens, row, row_end, kind);
}

static void float_matmul_bf16(float *y, int64_t y_stride, const struct matrix *w, const struct activations *act,
                              int64_t tokens, int64_t row_begin, int64_t row_end)
{
    float_matmul_kind(y, y_stride, w, act, tokens, row_begin, row_end, WEIGHT_BF16);
}

static void float_matmul_fp8(float *y, int64_t y_stride, const struct matrix *w, const struct activations *act,
                             int64_t tokens, int64_t row_begin, int64_t row_end)
{
    float_matmul_kind(y, y_stride, w, act, tokens, row_begin, row_end, WEIGHT_FP8);
}

static void float_matmul_fp8g(float *y, int64_t y_stride, const struct matrix *w, const struct activations *act,
                              int64_t tokens, int64_t row_begin, int64_t row_end)
{
    float_matmul_kind(y, y_stride, w, act, tokens, row_begin, row_end, WEIGHT_FP8G);
}

#endif
