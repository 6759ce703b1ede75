// Matmul of bf16, fp8 and fp8g weights by bf16 activations with AVX512_BF16 and AVX512_VBMI; included by kernels_avx512bf16.c. An emulation of the
// two instructions defines BF16_DOT and BYTES_OF_128 before it includes this.
//
// The order of every sum, and so a row's bits, are one whatever its company: 16 partial sums, begun at zero, added by halves at the end. A vector
// of 32 columns is added to them by one instruction, element i's two products to partial sum i, where each + is a fused multiply-add in f32:
//   sum[i] = (sum[i] + w[2i + 1] * x[2i + 1]) + w[2i] * x[2i]
//   bf16   vectors of 32 columns, ascending; y = the sum
//   fp8    of each 64 columns first the first 8 of each 16, then the others; y = the sum * scale_w[row]
//   fp8g   the same with partial sums begun anew for each 128 columns g, ascending: total[i] = fma(sum[i], scale_w[row][g], total[i]);
//          y = the sum of the totals
// e4m3 is exact in bf16. AMD's Zen 4 computes that bit for bit, with subnormal numbers as zero, as Intel describes the instruction; Intel's processors
// were not at hand. Bits may depend on the processor, never on a row's company. tests/test_bf16.c finds out what holds where it runs.
//
// Few tokens are bound by memory: rows that stand far apart are read side by side, each cache line whole at once, as in float_matmul.h.
// More tokens: 64 rows x PANEL_COLS columns are copied, fp8 unpacked, to where BLOCK_TOKENS tokens find them in L2; 4 rows x 6 tokens of partial
// sums stay in registers, ten loads for 24 instructions. Meanwhile the next panel comes to L2.
#ifndef TPSHARD_KERNELS_CPU_AVX512_BF16_H
#define TPSHARD_KERNELS_CPU_AVX512_BF16_H

#include "kernels/cpu/bf16_rows.h"

// *sum += 32 products; and of 64 codes below 128, each one's byte of a table.
#ifndef BF16_DOT
#define BF16_DOT(sum, a, b) _mm512_dpbf16_ps(sum, (__m512bh)(a), (__m512bh)(b))
#define BYTES_OF_128(table, codes) _mm512_permutex2var_epi8((table)[0], codes, (table)[1])
#endif

enum {
    VECTOR_COLS = 32, // of one instruction
    STEP_COLS = 64,   // of two: a cache line of fp8
    GROUP_COLS = 128, // of one scale of fp8g
    FEW_ROWS = 8,     // read side by side for up to FEW_TOKENS / 2 tokens; half of them
    FEW_TOKENS = 6,   //   for so many
    FEW_PREFETCH_BYTES = 1536,
    PANEL_TOKENS = 13, // from so many tokens on weights are copied
    TILE_ROWS = 4,     // whose sums
    TILE_TOKENS = 6,   //   stay in registers
    PANEL_COLS = 1024, // with 64 rows 128 KiB
    BLOCK_TOKENS = 96, // 384 KiB of sums
    TILES = BLOCK_ROWS / TILE_ROWS,
};

VECTOR_INLINE void dot(struct lanes *sum, __m512i w, __m512i x) { sum->v = BF16_DOT(sum->v, w, x); }

// ---- Weights -------------------------------------------------------------------------------------------------------

// The upper and the lower byte of a magnitude of e4m3 as bf16: below 8 subnormal, 127 NaN. avx512_e4m3.h has 2^-8 times as much, as sums there want.
#define E4M3_BITS(c)                                                                                                   \
    ((c) == 127 ? 0x7fc0                                                                                               \
     : (c) >= 4 ? ((c) >= 8 ? 0x3c00 + 0x10 * (c) : 0x3c00 + 0x20 * ((c)-4))                                           \
     : (c) == 0 ? 0                                                                                                    \
     : (c) == 1 ? 0x3b00                                                                                               \
                : 0x3b80 + 0x40 * ((c)-2))
#define E4M3_UPPER(c) (E4M3_BITS(c) >> 8)
#define E4M3_LOWER(c) (E4M3_BITS(c) & 0xff)
#define E4M3_4(byte, c) byte(c), byte((c) + 1), byte((c) + 2), byte((c) + 3)
#define E4M3_16(byte, c) E4M3_4(byte, c), E4M3_4(byte, (c) + 4), E4M3_4(byte, (c) + 8), E4M3_4(byte, (c) + 12)
#define E4M3_64(byte, c) E4M3_16(byte, c), E4M3_16(byte, (c) + 16), E4M3_16(byte, (c) + 32), E4M3_16(byte, (c) + 48)
_Alignas(64) static const uint8_t e4m3_bytes[2][128] = {{E4M3_64(E4M3_UPPER, 0), E4M3_64(E4M3_UPPER, 64)},
                                                        {E4M3_64(E4M3_LOWER, 0), E4M3_64(E4M3_LOWER, 64)}};
#undef E4M3_64
#undef E4M3_16
#undef E4M3_4
#undef E4M3_LOWER
#undef E4M3_UPPER
#undef E4M3_BITS

// STEP_COLS weights as two vectors of bf16.
VECTOR_INLINE void load_step(__m512i out[2], const uint8_t *from, enum weight_kind kind)
{
    if (kind == WEIGHT_BF16) {
        out[0] = _mm512_loadu_si512(from);
        out[1] = _mm512_loadu_si512(from + 64);
        return;
    }
    const __m512i upper_of[2] = {_mm512_load_si512(e4m3_bytes[0]), _mm512_load_si512(e4m3_bytes[0] + 64)};
    const __m512i lower_of[2] = {_mm512_load_si512(e4m3_bytes[1]), _mm512_load_si512(e4m3_bytes[1] + 64)};
    __m512i codes = _mm512_loadu_si512(from), lower = BYTES_OF_128(lower_of, codes);
    // upper byte | (code & 0x80)
    __m512i upper = _mm512_ternarylogic_epi32(BYTES_OF_128(upper_of, codes), codes, _mm512_set1_epi8((char)0x80), 0xf8);
    out[0] = _mm512_unpacklo_epi8(lower, upper);
    out[1] = _mm512_unpackhi_epi8(lower, upper);
}

VECTOR_INLINE int64_t elem_bytes_of(enum weight_kind kind) { return kind == WEIGHT_BF16 ? 2 : 1; }

VECTOR_INLINE const float *group_scales(const struct matrix *w, int64_t row, enum weight_kind kind)
{
    return kind == WEIGHT_FP8G ? fp8g_scales(w, row) : NULL;
}

VECTOR_INLINE float last_of(const struct matrix *w, int64_t row, enum weight_kind kind)
{
    return kind == WEIGHT_FP8 ? ((const float *)w->scale)[row] : 1.0f;
}

// ---- Few tokens ----------------------------------------------------------------------------------------------------

// A job's rows are read in FEW_ROWS streams, `gap` rows apart, with what follows each of them `ahead` bytes before its use.
struct few_job {
    float *y;
    int64_t y_stride;
    const struct matrix *w;
    const struct activations *act;
    int64_t row_end, gap, ahead;
};

VECTOR_INLINE void few_products(const struct few_job *job, int64_t token, int64_t row, int rows, int tokens,
                                enum weight_kind kind)
{
    enum { MOST_SUMS = FEW_ROWS * FEW_TOKENS / 2 };
    int64_t cols = (int64_t)job->w->shape.cols_padded, elem_bytes = elem_bytes_of(kind);
    int64_t gap_bytes = job->gap * cols * elem_bytes, x_bytes = job->act->stride * (int64_t)sizeof(float);
    const uint8_t *codes = (const uint8_t *)job->w->data + row * cols * elem_bytes;
    const uint8_t *x = rounded_at(job->act, token, 0);
    const float *scale[FEW_ROWS];
    struct lanes sum[MOST_SUMS], total[MOST_SUMS];
    for (int r = 0; r < rows; r++)
        scale[r] = group_scales(job->w, row + r * job->gap, kind);
    UNROLL
    for (int i = 0; i < rows * tokens; i++)
        sum[i] = total[i] = lanes_zero();
    for (int64_t col = 0; col < cols; col += STEP_COLS) {
        UNROLL
        for (int r = 0; r < rows; r++) {
            const uint8_t *from = codes + r * gap_bytes + col * elem_bytes;
            __m512i weights[2];
            for (int64_t line = 0; line < elem_bytes; line++)
                prefetch((const void *)((uintptr_t)from + (uintptr_t)(job->ahead + 64 * line)));
            load_step(weights, from, kind);
            UNROLL
            for (int t = 0; t < tokens; t++) {
                UNROLL
                for (int part = 0; part < 2; part++)
                    dot(&sum[r * tokens + t], weights[part], _mm512_loadu_si512(x + t * x_bytes + 2 * col + 64 * part));
            }
        }
        if (kind != WEIGHT_FP8G || (col + STEP_COLS) % GROUP_COLS)
            continue;
        UNROLL
        for (int i = 0; i < rows * tokens; i++) {
            lanes_fmadd(&total[i], sum[i], lanes_all(scale[i / tokens][col / GROUP_COLS * 16]));
            sum[i] = lanes_zero();
        }
    }
    for (int r = 0; r < rows && row + r * job->gap < job->row_end; r++)
        for (int t = 0; t < tokens; t++) {
            f32x16 lanes;
            memcpy(&lanes, kind == WEIGHT_FP8G ? &total[r * tokens + t] : &sum[r * tokens + t], sizeof lanes);
            job->y[(token + t) * job->y_stride + row + r * job->gap] =
                sum_lanes(&lanes) * last_of(job->w, row + r * job->gap, kind);
        }
}

// FEW_ROWS rows and at most FEW_TOKENS tokens.
VECTOR_INLINE void few_products_any(const struct few_job *job, int64_t token, int64_t tokens, int64_t row,
                                    enum weight_kind kind)
{
#define FEW_CASE(n)                                                                                                    \
    case n:                                                                                                            \
        for (int r = 0; r < FEW_ROWS; r += (n) <= FEW_TOKENS / 2 ? FEW_ROWS : FEW_ROWS / 2)                            \
            few_products(job, token, row + r * job->gap, (n) <= FEW_TOKENS / 2 ? FEW_ROWS : FEW_ROWS / 2, n, kind);    \
        break
    switch (tokens) {
        FEW_CASE(1);
        FEW_CASE(2);
        FEW_CASE(3);
        FEW_CASE(4);
        FEW_CASE(5);
        FEW_CASE(6);
    }
#undef FEW_CASE
}

// Where the tokens do not fit one pass, the later ones find the rows in L2, and the last brings the next ones there.
VECTOR_INLINE void few_tokens(float *y, int64_t y_stride, const struct matrix *w, const struct activations *act,
                              int64_t tokens, int64_t row_begin, int64_t row_end, enum weight_kind kind)
{
    int64_t row_bytes = (int64_t)w->shape.cols_padded * elem_bytes_of(kind);
    struct few_job job = {y, y_stride, w, act, row_end, 0, 0};
    job.gap = (int64_t)div_up((uint64_t)(row_end - row_begin), WEIGHT_ROW_UNIT) * (WEIGHT_ROW_UNIT / FEW_ROWS);
    for (int64_t row = row_begin; row < row_begin + job.gap; row++)
        for (int64_t token = 0, passes = (tokens + FEW_TOKENS - 1) / FEW_TOKENS, count; token < tokens;
             token += count, passes--) {
            count = (tokens - token + passes - 1) / passes;
            job.ahead = tokens <= FEW_TOKENS ? FEW_PREFETCH_BYTES : passes == 1 ? row_bytes : 0;
            few_products_any(&job, token, count, row, kind);
        }
}

// ---- More tokens ---------------------------------------------------------------------------------------------------

struct block {
    const struct matrix *w;
    const struct activations *act;
    int64_t row, row_end, token, tokens; // tokens <= BLOCK_TOKENS
    // Columns of this panel: [TILES][vectors][TILE_ROWS]; and sums: of each TILE_TOKENS tokens [TILES][tokens][TILE_ROWS].
    __m512i weight[BLOCK_ROWS * PANEL_COLS / VECTOR_COLS];
    struct lanes sum[BLOCK_TOKENS * BLOCK_ROWS];
};

static int64_t panel_cols(const struct matrix *w, int64_t col)
{
    int64_t left = (int64_t)w->shape.cols_padded - col;
    return left < PANEL_COLS ? left : PANEL_COLS;
}

VECTOR_INLINE void copy_panel(struct block *block, int64_t col, enum weight_kind kind)
{
    int64_t cols = panel_cols(block->w, col), elem_bytes = elem_bytes_of(kind);
    int64_t row_bytes = (int64_t)block->w->shape.cols_padded * elem_bytes;
    const uint8_t *codes = (const uint8_t *)block->w->data + block->row * row_bytes + col * elem_bytes;
    __m512i *out = block->weight;
    for (int64_t tile = 0; tile < TILES; tile++, codes += TILE_ROWS * row_bytes)
        for (int64_t c = 0; c < cols; c += STEP_COLS, out += 2 * TILE_ROWS)
            for (int64_t r = 0; r < TILE_ROWS; r++) {
                __m512i step[2];
                load_step(step, codes + r * row_bytes + c * elem_bytes, kind);
                out[r] = step[0];
                out[TILE_ROWS + r] = step[1];
            }
}

// sum[tokens][TILE_ROWS] += products of `cols` columns; fp8g: of one group, times scale[row].
VECTOR_INLINE void multiply_tile(struct lanes *sum, const __m512i *weight, const float *scale, const uint8_t *x,
                                 int64_t x_bytes, int64_t cols, int tokens, enum weight_kind kind)
{
    struct lanes s[TILE_TOKENS][TILE_ROWS];
    UNROLL
    for (int t = 0; t < tokens; t++)
        UNROLL
    for (int r = 0; r < TILE_ROWS; r++)
        s[t][r] = kind == WEIGHT_FP8G ? lanes_zero() : sum[t * TILE_ROWS + r];
    for (int64_t col = 0; col < cols; col += VECTOR_COLS, weight += TILE_ROWS) {
        UNROLL
        for (int t = 0; t < tokens; t++) {
            __m512i xt = _mm512_loadu_si512(x + t * x_bytes + 2 * col);
            UNROLL
            for (int r = 0; r < TILE_ROWS; r++)
                dot(&s[t][r], weight[r], xt);
        }
    }
    UNROLL
    for (int t = 0; t < tokens; t++)
        UNROLL
    for (int r = 0; r < TILE_ROWS; r++)
        if (kind == WEIGHT_FP8G)
            lanes_fmadd(&sum[t * TILE_ROWS + r], s[t][r], lanes_all(scale[r]));
        else
            sum[t * TILE_ROWS + r] = s[t][r];
}

VECTOR_INLINE void multiply_tile_any(struct lanes *sum, const __m512i *weight, const float *scale, const uint8_t *x,
                                     int64_t x_bytes, int64_t cols, int64_t tokens, enum weight_kind kind)
{
#define TILE_CASE(n)                                                                                                   \
    case n:                                                                                                            \
        multiply_tile(sum, weight, scale, x, x_bytes, cols, n, kind);                                                  \
        break
    switch (tokens) {
        TILE_CASE(1);
        TILE_CASE(2);
        TILE_CASE(4);
        TILE_CASE(6);
    }
#undef TILE_CASE
}

// The panel that is needed next, and how many of its cache lines each tile of products fetches.
struct next_panel {
    const uint8_t *codes; // behind the end of a matrix fetching does nothing
    int64_t row_bytes, row_lines, line, lines_per_tile;
};

static struct next_panel next_panel(const struct block *block, int64_t col, enum weight_kind kind)
{
    int64_t cols = (int64_t)block->w->shape.cols_padded, elem_bytes = elem_bytes_of(kind), row = block->row;
    int64_t tiles = (block->tokens + TILE_TOKENS - 1) / TILE_TOKENS * TILES, next_col = col + PANEL_COLS;
    if (next_col >= cols) {
        next_col = 0;
        row += BLOCK_ROWS;
    }
    struct next_panel next = {.row_bytes = cols * elem_bytes};
    next.codes = (const uint8_t *)((uintptr_t)block->w->data + (uintptr_t)((row * cols + next_col) * elem_bytes));
    next.row_lines = panel_cols(block->w, next_col) * elem_bytes / 64;
    next.lines_per_tile = (next.row_lines * BLOCK_ROWS + tiles - 1) / tiles;
    return next;
}

VECTOR_INLINE void fetch_next(struct next_panel *next)
{
    for (int64_t i = 0; i < next->lines_per_tile; i++, next->line++)
        prefetch((const void *)((uintptr_t)next->codes + (uintptr_t)(next->line / next->row_lines * next->row_bytes +
                                                                     next->line % next->row_lines * 64)));
}

VECTOR_INLINE void multiply_panel(struct block *block, int64_t col, enum weight_kind kind)
{
    int64_t cols = panel_cols(block->w, col), group = kind == WEIGHT_FP8G ? GROUP_COLS : cols;
    int64_t x_bytes = block->act->stride * (int64_t)sizeof(float);
    struct next_panel next = next_panel(block, col, kind);
    for (int64_t token = 0, count; token < block->tokens; token += count) {
        const uint8_t *x = rounded_at(block->act, block->token + token, col);
        struct lanes *sum = block->sum + token * BLOCK_ROWS;
        const __m512i *weight = block->weight;
        count = tile_tokens(block->tokens - token);
        for (int64_t row = 0; row < BLOCK_ROWS; row += TILE_ROWS, sum += count * TILE_ROWS) {
            const float *scale = group_scales(block->w, block->row + row, kind);
            fetch_next(&next);
            for (int64_t c = 0; c < cols; c += group, weight += group / VECTOR_COLS * TILE_ROWS)
                multiply_tile_any(sum, weight, kind == WEIGHT_FP8G ? scale + (col + c) / GROUP_COLS * 16 : NULL,
                                  x + 2 * c, x_bytes, group, count, kind);
        }
    }
}

// The sums of 16 rows and one token; their tiles lie `count` tokens apart.
VECTOR_INLINE void store_block(float *y, const struct block *block, int64_t row, const struct lanes *sum, int64_t count,
                               enum weight_kind kind)
{
    f32x16 lanes[LANES];
    float total[LANES];
    for (int64_t j = 0; j < LANES; j++)
        memcpy(&lanes[j], &sum[j / TILE_ROWS * count * TILE_ROWS + j % TILE_ROWS], sizeof lanes[j]);
    sum_lanes_of_16(total, lanes);
    __m512 value = _mm512_loadu_ps(total);
    if (kind == WEIGHT_FP8)
        value = _mm512_mul_ps(value, _mm512_loadu_ps((const float *)block->w->scale + row));
    store_rows(y, row, block->row_end, value);
}

VECTOR_INLINE void multiply_block(float *y, int64_t y_stride, struct block *block, enum weight_kind kind)
{
    for (int64_t i = 0; i < BLOCK_ROWS * block->tokens; i++)
        block->sum[i] = lanes_zero();
    for (int64_t col = 0; col < (int64_t)block->w->shape.cols_padded; col += PANEL_COLS) {
        copy_panel(block, col, kind);
        multiply_panel(block, col, kind);
    }
    for (int64_t token = 0, count; token < block->tokens; token += count) {
        count = tile_tokens(block->tokens - token);
        for (int64_t t = 0; t < count; t++)
            for (int64_t r = 0; r < BLOCK_ROWS; r += LANES)
                store_block(y + (block->token + token + t) * y_stride, block, block->row + r,
                            block->sum + token * BLOCK_ROWS + r * count + t * TILE_ROWS, count, kind);
    }
}

VECTOR_INLINE void many_tokens(float *y, int64_t y_stride, const struct matrix *w, const struct activations *act,
                               int64_t tokens, int64_t row_begin, int64_t row_end, enum weight_kind kind)
{
    struct block block;
    block.w = w;
    block.act = act;
    block.row_end = row_end;
    for (block.row = row_begin; block.row < row_end; block.row += BLOCK_ROWS)
        for (block.token = 0; block.token < tokens; block.token += block.tokens) {
            block.tokens = tokens - block.token < BLOCK_TOKENS ? tokens - block.token : BLOCK_TOKENS;
            multiply_block(y, y_stride, &block, kind);
        }
}

// ---- All of them ---------------------------------------------------------------------------------------------------

#define BF16_FN(name, tokens, kind)                                                                                    \
    static void name##_##tokens(float *y, int64_t y_stride, const struct matrix *w, const struct activations *act,     \
                                int64_t count, int64_t row_begin, int64_t row_end)                                     \
    {                                                                                                                  \
        tokens##_tokens(y, y_stride, w, act, count, row_begin, row_end, kind);                                         \
    }
BF16_FN(bf16, few, WEIGHT_BF16)
BF16_FN(bf16, many, WEIGHT_BF16)
BF16_FN(fp8, few, WEIGHT_FP8)
BF16_FN(fp8, many, WEIGHT_FP8)
BF16_FN(fp8g, few, WEIGHT_FP8G)
BF16_FN(fp8g, many, WEIGHT_FP8G)
#undef BF16_FN

static void bf16_matmul(float *y, int64_t y_stride, const struct matrix *w, const struct activations *act,
                        int64_t tokens, int64_t row_begin, int64_t row_end)
{
    bool few = tokens < PANEL_TOKENS;
    switch (w->shape.kind) {
    case WEIGHT_BF16:
        (few ? bf16_few : bf16_many)(y, y_stride, w, act, tokens, row_begin, row_end);
        break;
    case WEIGHT_FP8:
        (few ? fp8_few : fp8_many)(y, y_stride, w, act, tokens, row_begin, row_end);
        break;
    default:
        (few ? fp8g_few : fp8g_many)(y, y_stride, w, act, tokens, row_begin, row_end);
        break;
    }
}

#endif
