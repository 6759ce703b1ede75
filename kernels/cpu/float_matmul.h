// Matmul of bf16, fp8 and fp8g weights, written once for the vector types of kernels_<isa>.c, which define before they include this:
//   struct lanes                                      16 floats
//   lanes_zero(), lanes_all(float), lanes_load(const float *)   struct lanes
//   lanes_bf16(const uint8_t *codes)                  16 weights
//   lanes_fp8(const uint8_t *codes, bool odd)         the even or odd ones of 32 weights, 2^-8 times their value, NaN as anything
//   lanes_fmadd(struct lanes *sum, a, b)              *sum = a * b + *sum, rounded once
//   lanes_store(float *, const struct lanes *)
//   FLOAT_TILE_ROWS, FLOAT_TILE_TOKENS, FLOAT_DECODE_ROWS   sums that fit the registers; rows divide FLOAT_ROWS; tokens 3 or 6
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

// Which rows hold an fp8 NaN: the conversion does not see it.
static bool float_has_nan(const uint8_t *codes, int64_t cols)
{
    uint8_t largest = 0;
    for (int64_t i = 0; i < cols; i++) {
        uint8_t magnitude = codes[i] & 0x7f;
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest == 0x7f;
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

// One token: bound by memory, so FLOAT_DECODE_ROWS rows are read side by side, each cache line whole at once: rows of a
// length of 2^n bytes share few sets of L1, and a line may not last there until a second look.
VECTOR_INLINE void float_decode(float *y, const struct matrix *w, const float *x, int64_t row_begin, int64_t row_end,
                                enum weight_kind kind)
{
    enum { PARTS = 4 };
    int64_t cols = (int64_t)w->shape.cols_padded, elem_bytes = kind == WEIGHT_BF16 ? 2 : 1;
    int64_t row_bytes = cols * elem_bytes;
    for (int64_t row = row_begin; row < row_end; row += FLOAT_DECODE_ROWS) {
        const uint8_t *codes = (const uint8_t *)w->data + row * row_bytes;
        const float *scale = kind == WEIGHT_FP8G ? fp8g_scales(w, row) : NULL;
        struct lanes sum[FLOAT_DECODE_ROWS], total[FLOAT_DECODE_ROWS];
        for (int r = 0; r < FLOAT_DECODE_ROWS; r++)
            sum[r] = total[r] = lanes_zero();
        for (int64_t col = 0; col < cols; col += PARTS * LANES) {
            struct lanes xs[PARTS];
            for (int part = 0; part < PARTS; part++)
                xs[part] = lanes_load(x + col + part * LANES);
            for (int r = 0; r < FLOAT_DECODE_ROWS; r++) {
                const uint8_t *from = codes + r * row_bytes;
                for (int64_t line = 0; line < elem_bytes; line++)
                    __builtin_prefetch(from + col * elem_bytes + line * 64 + FLOAT_PREFETCH_BYTES);
                for (int part = 0; part < PARTS; part++)
                    lanes_fmadd(&sum[r], float_weights(from, col, part, kind), xs[part]);
            }
            if (kind != WEIGHT_FP8G || (col + PARTS * LANES) % FP8G_COLS)
                continue;
            for (int r = 0; r < FLOAT_DECODE_ROWS; r++) {
                lanes_fmadd(&total[r], sum[r], lanes_all(scale[col / FP8G_COLS * 16 + r]));
                sum[r] = lanes_zero();
            }
        }
        for (int r = 0; r < FLOAT_DECODE_ROWS && row + r < row_end; r++)
            float_store(y, kind == WEIGHT_FP8G ? &total[r] : &sum[r], w, row + r,
                        kind != WEIGHT_BF16 && float_has_nan(codes + r * row_bytes, cols));
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
    for (int r = 0; kind != WEIGHT_BF16 && r < FLOAT_ROWS; r++)
        nan[r] = float_has_nan(codes + r * row_bytes, cols);
    for (int64_t token = 0, count; token < tokens; token += count) {
        int64_t left = tokens - token;
        count = FLOAT_TILE_TOKENS == 6 ? tile_tokens(left) : left < 3 ? left : 3;
        struct lanes sum[FLOAT_ROWS * FLOAT_TILE_TOKENS];
        for (int64_t i = 0; i < FLOAT_ROWS * count; i++)
            sum[i] = lanes_zero();
        for (int64_t col = 0; col < cols; col += step) {
            const float *x = act->f32 + token * act->stride + col;
            int64_t part = cols - col < step ? cols - col : step;
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
    if (tokens == 1) {
        float_decode(y, w, act->f32, row_begin, row_end, kind);
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
