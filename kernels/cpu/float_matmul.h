// Matmul of bf16, fp8 and fp8g weights, written once for the vector types of kernels_<isa>.c, which define before they include this:
//   struct lanes                                      16 floats
//   lanes_zero(), lanes_all(float), lanes_load(const float *)   struct lanes
//   lanes_bf16(const uint8_t *codes)                  16 weights
//   lanes_fp8_all(struct lanes out[4], codes)         64 weights, 2^-8 times their value: even and odd ones of the first 32, then of the others;
//                                                     NaN as NaN, or as anything
//   struct magnitudes, zero at first                  magnitudes_add(&m, codes) keeps the largest of 64 codes in each place
//   magnitudes_nan(&m)                                whether one of them was NaN; false where lanes_fp8_all gives NaN
//   FLOAT_FP8_NAN                                     whether lanes_fp8_all gives NaN for NaN: then the sum tells
//   lanes_fmadd(struct lanes *sum, a, b)              *sum = a * b + *sum, rounded once
//   lanes_store(float *, const struct lanes *)
//   FLOAT_TILE_ROWS, FLOAT_TILE_TOKENS                sums that fit the registers; rows divide FLOAT_ROWS; tokens 3 or 6
//   FLOAT_FEW_ROWS, FLOAT_FEW_TOKENS                  rows read side by side for fewer tokens, half of them for so many: 2 or 4; they divide WEIGHT_ROW_UNIT
//   FLOAT_PANEL_TOKENS                                from so many tokens on weights are unpacked before they are multiplied
// Every sum is 16 partial sums over ascending columns, whatever the tile: see kernels.h. `kind` is a constant wherever it is passed.
#ifndef TPSHARD_KERNELS_CPU_FLOAT_MATMUL_H
#define TPSHARD_KERNELS_CPU_FLOAT_MATMUL_H

#include "kernels/vector_ops.h"

enum {
    FLOAT_ROWS = 64,   // rows and columns that are unpacked for all tokens of a block; with its sums
    FLOAT_COLS = 512,  //   they stay in L2, and a tile's activations
    FLOAT_TOKENS = 48, //   in L1
    FLOAT_PREFETCH_BYTES = 1536,
    FP8G_COLS = 128, // of one scale
};

// The rows of one tile as floats, from column `col` on: weight[col / 16][FLOAT_TILE_ROWS]. fp8: in the order of the activations.
VECTOR_INLINE void float_unpack(struct lanes *weight, const uint8_t *codes, int64_t row_bytes, int64_t cols,
                                struct magnitudes *largest, enum weight_kind kind)
{
    enum { PARTS = 4 };
    for (int64_t col = 0; col < cols; col += PARTS * LANES)
        UNROLL
    for (int r = 0; r < FLOAT_TILE_ROWS; r++) {
        const uint8_t *from = codes + r * row_bytes + (kind == WEIGHT_BF16 ? 2 : 1) * col;
        struct lanes part[PARTS];
        if (kind == WEIGHT_BF16) {
            for (int i = 0; i < PARTS; i++)
                part[i] = lanes_bf16(from + 2 * i * LANES);
        } else {
            lanes_fp8_all(part, from);
            magnitudes_add(&largest[r], from);
        }
        for (int i = 0; i < PARTS; i++)
            weight[(col / LANES + i) * FLOAT_TILE_ROWS + r] = part[i];
    }
}

// sum[tokens][FLOAT_TILE_ROWS] += products of `cols` columns; fp8g: of one group, times scale[row].
VECTOR_INLINE void float_tile(struct lanes *sum, const struct lanes *weight, const float *scale, const float *x,
                              int64_t x_stride, int64_t cols, int tokens, enum weight_kind kind)
{
    struct lanes s[FLOAT_TILE_TOKENS][FLOAT_TILE_ROWS];
    UNROLL
    for (int t = 0; t < tokens; t++)
        UNROLL
    for (int r = 0; r < FLOAT_TILE_ROWS; r++)
        s[t][r] = kind == WEIGHT_FP8G ? lanes_zero() : sum[t * FLOAT_TILE_ROWS + r];
    for (int64_t col = 0; col < cols; col += LANES, weight += FLOAT_TILE_ROWS) {
        UNROLL
        for (int t = 0; t < tokens; t++) {
            struct lanes xt = lanes_load(x + t * x_stride + col);
            UNROLL
            for (int r = 0; r < FLOAT_TILE_ROWS; r++)
                lanes_fmadd(&s[t][r], weight[r], xt);
        }
    }
    UNROLL
    for (int t = 0; t < tokens; t++)
        UNROLL
    for (int r = 0; r < FLOAT_TILE_ROWS; r++)
        if (kind == WEIGHT_FP8G)
            lanes_fmadd(&sum[t * FLOAT_TILE_ROWS + r], s[t][r], lanes_all(scale[r]));
        else
            sum[t * FLOAT_TILE_ROWS + r] = s[t][r];
}

VECTOR_INLINE void float_tile_any(struct lanes *sum, const struct lanes *weight, const float *scale, const float *x,
                                  int64_t x_stride, int64_t cols, int64_t tokens, enum weight_kind kind)
{
#define FLOAT_CASE(n)                                                                                                  \
    case n:                                                                                                            \
        float_tile(sum, weight, scale, x, x_stride, cols, n, kind);                                                    \
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

VECTOR_INLINE float float_finish(float total, const struct matrix *w, int64_t row, bool nan)
{
    if (w->shape.kind == WEIGHT_BF16)
        return total;
    return nan ? NAN : total * 0x1p8f * (w->shape.kind == WEIGHT_FP8 ? ((const float *)w->scale)[row] : 1.0f);
}

// nan: whether a weight is known to be NaN. Where the sum tells, it comes with any sign, which is looked at there alone: it takes instructions.
VECTOR_INLINE void float_store(float *y, const struct lanes *sum, const struct matrix *w, int64_t row, bool nan)
{
    float lane[LANES];
    lanes_store(lane, sum);
    f32x16 lanes;
    load16(&lanes, lane);
    float total = sum_lanes(&lanes);
    y[row] = float_finish(total, w, row, nan || (FLOAT_FP8_NAN && isnan(total)));
}

// Few tokens: bound by memory, so `rows` rows are read side by side from one end to the other, each cache line whole at once: rows of a length
// of 2^n bytes share few sets of L1, and a line may not last there until a second look. They stand `gap` rows apart, so that what follows each
// in memory is read after it: with neighbours, what is fetched beyond the end of a row has been read, and the next rows begin unfetched.
VECTOR_INLINE void float_few(float *y, int64_t y_stride, const struct matrix *w, const float *x, int64_t x_stride,
                             int64_t row, int64_t row_end, int64_t gap, int rows, int tokens, enum weight_kind kind)
{
    enum { PARTS = 4, MAX_ROWS = 8, MAX_SUMS = 24 };
    int64_t cols = (int64_t)w->shape.cols_padded, elem_bytes = kind == WEIGHT_BF16 ? 2 : 1;
    int64_t gap_bytes = gap * cols * elem_bytes;
    const uint8_t *codes = (const uint8_t *)w->data + row * cols * elem_bytes;
    const float *scale[MAX_ROWS];
    struct lanes sum[MAX_SUMS], total[MAX_SUMS];
    struct magnitudes largest[MAX_ROWS] = {0};
    for (int r = 0; r < rows; r++)
        scale[r] = kind == WEIGHT_FP8G ? fp8g_scales(w, row + r * gap) : NULL;
    UNROLL
    for (int i = 0; i < rows * tokens; i++)
        sum[i] = total[i] = lanes_zero();
    for (int64_t col = 0; col < cols; col += PARTS * LANES) {
        UNROLL
        for (int r = 0; r < rows; r++) {
            const uint8_t *from = codes + r * gap_bytes + col * elem_bytes;
            struct lanes weights[PARTS];
            for (int64_t line = 0; line < elem_bytes; line++)
                __builtin_prefetch(from + line * 64 + FLOAT_PREFETCH_BYTES, 0, 2);
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
            lanes_fmadd(&total[i], sum[i], lanes_all(scale[i / tokens][col / FP8G_COLS * 16]));
            sum[i] = lanes_zero();
        }
    }
    for (int r = 0; r < rows && row + r * gap < row_end; r++)
        for (int t = 0; t < tokens; t++)
            float_store(y + t * y_stride, kind == WEIGHT_FP8G ? &total[r * tokens + t] : &sum[r * tokens + t], w,
                        row + r * gap, kind != WEIGHT_BF16 && magnitudes_nan(&largest[r]));
}

// FLOAT_FEW_ROWS rows and at most FLOAT_FEW_TOKENS tokens.
VECTOR_INLINE void float_few_any(float *y, int64_t y_stride, const struct matrix *w, const float *x, int64_t stride,
                                 int64_t tokens, int64_t row, int64_t row_end, int64_t gap, enum weight_kind kind)
{
#define FLOAT_CASE(n)                                                                                                  \
    case n:                                                                                                            \
        for (int r = 0; r < FLOAT_FEW_ROWS; r += (n) < FLOAT_FEW_TOKENS ? FLOAT_FEW_ROWS : FLOAT_FEW_ROWS / 2)         \
            float_few(y, y_stride, w, x, stride, row + r * gap, row_end, gap,                                          \
                      (n) < FLOAT_FEW_TOKENS ? FLOAT_FEW_ROWS : FLOAT_FEW_ROWS / 2, n, kind);                          \
        break
    switch (tokens) {
        FLOAT_CASE(1);
        FLOAT_CASE(2);
#if FLOAT_FEW_TOKENS == 4
        FLOAT_CASE(3);
        FLOAT_CASE(4);
#endif
    }
#undef FLOAT_CASE
}

VECTOR_INLINE int64_t float_tile_tokens(int64_t left)
{
    return FLOAT_TILE_TOKENS == 6 ? tile_tokens(left) : left < 3 ? left : 3;
}

// Columns [col, col + cols) of FLOAT_ROWS rows, unpacked to `weight`, times `tokens` rows x, added to sum[tokens / tile][FLOAT_ROWS][tile].
VECTOR_INLINE void float_panel(struct lanes *sum, const struct lanes *weight, const struct matrix *w, const float *x,
                               int64_t x_stride, int64_t tokens, int64_t row, int64_t col, int64_t cols,
                               enum weight_kind kind)
{
    int64_t group = kind == WEIGHT_FP8G ? FP8G_COLS : cols;
    for (int64_t token = 0, count; token < tokens; token += count) {
        count = float_tile_tokens(tokens - token);
        _Alignas(64) float
            copy[FLOAT_TILE_TOKENS * FLOAT_COLS]; // rows of x at a distance of 2^n bytes share few sets of a cache
        for (int64_t t = 0; t < count; t++)
            for (int64_t i = 0; i < cols; i += LANES) {
                struct lanes part = lanes_load(x + (token + t) * x_stride + i);
                lanes_store(copy + t * FLOAT_COLS + i, &part);
            }
        for (int64_t r = 0; r < FLOAT_ROWS; r += FLOAT_TILE_ROWS) {
            // Meanwhile the next tile's activations are fetched.
            int64_t next = token + count + r / FLOAT_TILE_ROWS;
            for (int64_t i = 0; i < cols && r / FLOAT_TILE_ROWS < FLOAT_TILE_TOKENS && next < tokens; i += LANES)
                __builtin_prefetch(x + next * x_stride + i, 0, 2);
            for (int64_t i = 0; i < cols; i += group) {
                const float *scale = kind == WEIGHT_FP8G ? fp8g_scales(w, row + r) + (col + i) / FP8G_COLS * 16 : NULL;
                float_tile_any(sum + token * FLOAT_ROWS + r * count, weight + (r * cols + i * FLOAT_TILE_ROWS) / LANES,
                               scale, copy + i, FLOAT_COLS, group, count, kind);
            }
        }
    }
}

// FLOAT_ROWS rows from `row` on times at most FLOAT_TOKENS rows of act, from `token` on.
VECTOR_INLINE void float_block(float *y, int64_t y_stride, const struct matrix *w, const struct activations *act,
                               int64_t token, int64_t tokens, int64_t row, int64_t row_end, enum weight_kind kind)
{
    int64_t cols = (int64_t)w->shape.cols_padded, elem_bytes = kind == WEIGHT_BF16 ? 2 : 1;
    const uint8_t *codes = (const uint8_t *)w->data + row * cols * elem_bytes;
    struct lanes weight[FLOAT_ROWS * FLOAT_COLS / LANES], sum[FLOAT_TOKENS * FLOAT_ROWS];
    struct magnitudes largest[FLOAT_ROWS] = {0};
    for (int64_t i = 0; i < FLOAT_ROWS * tokens; i++)
        sum[i] = lanes_zero();
    for (int64_t col = 0, part; col < cols; col += part) {
        part = cols - col < FLOAT_COLS ? cols - col : FLOAT_COLS;
        for (int64_t r = 0; r < FLOAT_ROWS; r += FLOAT_TILE_ROWS)
            float_unpack(weight + r * part / LANES, codes + (r * cols + col) * elem_bytes, cols * elem_bytes, part,
                         largest + r, kind);
        float_panel(sum, weight, w, act->f32 + token * act->stride + col, act->stride, tokens, row, col, part, kind);
    }
    for (int64_t t = 0, count; t < tokens; t += count) {
        count = float_tile_tokens(tokens - t);
        for (int64_t i = 0; i < count; i++)
            for (int64_t r = 0; r < FLOAT_ROWS && row + r < row_end; r += LANES) {
                f32x16 rows[LANES];
                float total[LANES];
                for (int64_t j = 0; j < LANES; j++) {
                    int64_t tile = (r + j) / FLOAT_TILE_ROWS * FLOAT_TILE_ROWS;
                    load16(&rows[j], (const float *)&sum[t * FLOAT_ROWS + tile * count + i * FLOAT_TILE_ROWS +
                                                         (r + j) % FLOAT_TILE_ROWS]);
                }
                sum_lanes_of_16(total, rows);
                for (int64_t j = 0; j < LANES && row + r + j < row_end; j++)
                    y[(token + t + i) * y_stride + row + r + j] =
                        float_finish(total[j], w, row + r + j, kind != WEIGHT_BF16 && magnitudes_nan(&largest[r + j]));
            }
    }
}

VECTOR_INLINE void float_matmul_kind(float *y, int64_t y_stride, const struct matrix *w, const struct activations *act,
                                     int64_t tokens, int64_t row_begin, int64_t row_end, enum weight_kind kind)
{
    if (tokens < FLOAT_PANEL_TOKENS) {
        int64_t gap =
            (int64_t)div_up((uint64_t)(row_end - row_begin), WEIGHT_ROW_UNIT) * (WEIGHT_ROW_UNIT / FLOAT_FEW_ROWS);
        for (int64_t row = row_begin; row < row_begin + gap; row++) // the second time from a cache
            for (int64_t token = 0; token < tokens; token += FLOAT_FEW_TOKENS)
                float_few_any(y + token * y_stride, y_stride, w, act->f32 + token * act->stride, act->stride,
                              tokens - token < FLOAT_FEW_TOKENS ? tokens - token : FLOAT_FEW_TOKENS, row, row_end, gap,
                              kind);
        return;
    }
    for (int64_t row = row_begin; row < row_end; row += FLOAT_ROWS)
        for (int64_t token = 0; token < tokens; token += FLOAT_TOKENS)
            float_block(y, y_stride, w, act, token, tokens - token < FLOAT_TOKENS ? tokens - token : FLOAT_TOKENS, row,
                        row_end, kind);
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
