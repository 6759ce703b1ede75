// Matmul of int8 and tiled weights with many tokens, for AVX-512; included by avx512_table.h.
//
// Weights of 64 rows and 256 columns are unpacked and transposed into a panel in L1, with 16 rows in the lanes of a vector, so that no sum goes
// across lanes. Six tokens at a time, whose sums of a group stay in registers, go through it: four loads of weights and six of activations
// for 24 vpdpbusd. The activations of those columns lie beside each other in L2 and serve several panels before the next columns come;
// so do the sums.
#ifndef TPSHARD_KERNELS_CPU_AVX512_PANEL_H
#define TPSHARD_KERNELS_CPU_AVX512_PANEL_H

#include "kernels/cpu/panel_tokens.h"

enum {
    TILE_TOKENS = 6,    // whose sums stay in registers at once
    PANEL_TOKENS = 192, // that share a panel
    PANEL_BLOCKS = 8,   // of 64 rows that share the activations: 384 KiB of sums
};

// Unpacked codes + bias of 64 rows and up to PANEL_COLS columns: [cols / 4][4 vectors][16 rows][4 columns]; and of tiled kinds what
// stands beside each group.
struct panel {
    __m512i v[PANEL_COLS / 4][BLOCK_VECTORS];
    float scale[PANEL_COLS / 16][BLOCK_ROWS], zero[PANEL_COLS / 32][BLOCK_ROWS];
};

// 4x4 transpose of 128-bit lanes: out[i] = lane i of a, b, c, d.
VECTOR_INLINE void transpose_lanes(__m512i out[4], __m512i a, __m512i b, __m512i c, __m512i d)
{
    __m512i ab02 = _mm512_shuffle_i32x4(a, b, 0x88),
            ab13 = _mm512_shuffle_i32x4(a, b, 0xdd); // a0 a2 b0 b2, a1 a3 b1 b3
    __m512i cd02 = _mm512_shuffle_i32x4(c, d, 0x88), cd13 = _mm512_shuffle_i32x4(c, d, 0xdd);
    out[0] = _mm512_shuffle_i32x4(ab02, cd02, 0x88);
    out[1] = _mm512_shuffle_i32x4(ab13, cd13, 0x88);
    out[2] = _mm512_shuffle_i32x4(ab02, cd02, 0xdd);
    out[3] = _mm512_shuffle_i32x4(ab13, cd13, 0xdd);
}

// 64 columns (16 words) of 64 rows into panel words 0..15.
VECTOR_INLINE void fill_tiles(__m512i (*panel)[BLOCK_VECTORS], const uint8_t *tiles, enum weight_kind kind)
{
    for (int i = 0; i < BLOCK_VECTORS; i++, tiles += WEIGHT_TILE_BYTES) {
        __m512i v[8], first[4], second[4], word[4];
        for (int g = 0; g < 8; g++)
            v[g] = _mm512_loadu_si512(tiles + 64 * g);
        transpose_words(first, v[0], v[1], v[2], v[3]);
        transpose_words(second, v[4], v[5], v[6], v[7]);
        for (int c = 0; c < 4; c++) {
            transpose_lanes(word, low_codes(first[c], kind), low_codes(second[c], kind), high_codes(first[c], kind),
                            high_codes(second[c], kind));
            for (int l = 0; l < 4; l++)
                panel[4 * l + c][i] = word[l];
        }
    }
}

typedef void fill_fn(__m512i (*panel)[BLOCK_VECTORS], const uint8_t *tiles);
static void fill_int4(__m512i (*panel)[BLOCK_VECTORS], const uint8_t *tiles) { fill_tiles(panel, tiles, WEIGHT_INT4); }
static void fill_nl4(__m512i (*panel)[BLOCK_VECTORS], const uint8_t *tiles) { fill_tiles(panel, tiles, WEIGHT_NL4); }
static void fill_fp4(__m512i (*panel)[BLOCK_VECTORS], const uint8_t *tiles) { fill_tiles(panel, tiles, WEIGHT_MXFP4); }

static void fill_int8(__m512i (*panel)[BLOCK_VECTORS], const int8_t *codes, int64_t cols)
{
    const __m512i flip = _mm512_set1_epi8((char)0x80);
    for (int i = 0; i < BLOCK_VECTORS; i++) {
        __m512i part[4][4], word[4];
        for (int p = 0; p < 4; p++) {
            const int8_t *row = codes + (i * LANES + 4 * p) * cols;
            __m512i v[4];
            for (int r = 0; r < 4; r++)
                v[r] = _mm512_xor_si512(_mm512_loadu_si512(row + r * cols), flip);
            transpose_words(part[p], v[0], v[1], v[2], v[3]);
        }
        for (int c = 0; c < 4; c++) {
            transpose_lanes(word, part[0][c], part[1][c], part[2][c], part[3][c]);
            for (int l = 0; l < 4; l++)
                panel[4 * l + c][i] = word[l];
        }
    }
}

static void panel_fill(struct panel *panel, const struct matrix *w, int64_t row, int64_t col, int64_t cols)
{
    enum weight_kind kind = w->shape.kind;
    int64_t row_cols = (int64_t)w->shape.cols_padded;
    fill_fn *fill = is_fp4(kind) ? fill_fp4 : kind == WEIGHT_NL4 ? fill_nl4 : fill_int4;
    for (int64_t c = 0; c < cols; c += 64) {
        const uint8_t *tiles = (const uint8_t *)w->data + (row * row_cols + (col + c) * BLOCK_ROWS) / 2;
        if (kind == WEIGHT_INT8)
            fill_int8(&panel->v[c / 4], (const int8_t *)w->data + row * row_cols + col + c, row_cols);
        else
            fill(&panel->v[c / 4], tiles);
    }
    if (kind != WEIGHT_INT8)
        load_scales(panel->scale, panel->zero, w, row, col, cols);
}

// dot[t][i] += panel words `word`, which are word k of the panel, times the activations of each token. dot has elements of 32 bits by its type: gcc 12 keeps
// sums of type __m512i twice, once as what they are, and runs out of registers.
VECTOR_INLINE void add_word(i32x16 dot[TILE_TOKENS][BLOCK_VECTORS], const __m512i word[BLOCK_VECTORS],
                            const struct panel_token *x, int64_t k, int tokens)
{
    UNROLL
    for (int t = 0; t < tokens; t++) {
        int32_t four;
        memcpy(&four, x[t].q + 4 * k, sizeof four);
        __m512i all = _mm512_set1_epi32(four);
        UNROLL
        for (int i = 0; i < BLOCK_VECTORS; i++)
            dot[t][i] = (i32x16)_mm512_dpbusd_epi32((__m512i)dot[t][i], word[i], all);
    }
}

// sum[t] += columns [0, cols) of the panel times token t of a tile. words: of every four words of a tile row, how many stand in one group:
// 1 or 2 in groups of 16 or 32, else all 4. kind: int8, int4z or any other.
VECTOR_INLINE void panel_tile(float (*restrict sum)[BLOCK_ROWS], const struct panel *restrict panel,
                              const struct panel_token *restrict x, int64_t cols, int64_t group_size, int tokens,
                              int words, enum weight_kind kind)
{
    for (int64_t col = 0, group = 0; col < cols; col += group_size, group++) {
        int64_t left = cols - col < group_size ? cols - col : group_size;
        int64_t first = col / 64 * 16 + col % 64 / 16, end = first + (words < 4 ? 16 : left / 4);
        i32x16 dot[TILE_TOKENS][BLOCK_VECTORS];
        UNROLL
        for (int t = 0; t < tokens; t++) {
            UNROLL
            for (int i = 0; i < BLOCK_VECTORS; i++)
                dot[t][i] = (i32x16)_mm512_set1_epi32(x[t].start[col / ACT_SUM]);
        }
        for (int64_t k = first; k < end; k += 4) {
            UNROLL
            for (int i = 0; i < words; i++)
                add_word(dot, panel->v[k + i], x, k + i, tokens);
        }
        UNROLL
        for (int i = 0; i < BLOCK_VECTORS; i++) {
            UNROLL
            for (int t = 0; t < tokens; t++) {
                __m512 value = _mm512_cvtepi32_ps((__m512i)dot[t][i]);
                __m512 factor = _mm512_set1_ps(x[t].scale[col / ACT_GROUP]);
                if (kind == WEIGHT_INT4Z) {
                    __m512 zero = _mm512_loadu_ps(panel->zero[group] + i * LANES);
                    value = _mm512_sub_ps(value, _mm512_mul_ps(zero, _mm512_set1_ps(x[t].sum[col / ACT_SUM])));
                }
                if (kind != WEIGHT_INT8)
                    factor = _mm512_mul_ps(_mm512_loadu_ps(panel->scale[group] + i * LANES), factor);
                float *y = sum[t] + i * LANES;
                _mm512_storeu_ps(y, _mm512_add_ps(_mm512_loadu_ps(y), _mm512_mul_ps(value, factor)));
            }
        }
    }
}

// Memory that will be unpacked next: `rows` rows of 1 << row_shift cache lines.
struct panel_next {
    const uint8_t *codes;
    int64_t row_bytes, rows;
    int row_shift;
};

static struct panel_next panel_next(const struct matrix *w, int64_t row, int64_t col, int64_t cols)
{
    int64_t row_cols = (int64_t)w->shape.cols_padded;
    const uint8_t *data = w->data;
    if (w->shape.kind == WEIGHT_INT8)
        return (struct panel_next){data + row * row_cols + col, row_cols, BLOCK_ROWS, 2};
    return (struct panel_next){data + (row * row_cols + col * BLOCK_ROWS) / 2, 64, cols / 2, 0};
}

// Into L2, a few lines a tile, so that memory is busy while registers multiply.
VECTOR_INLINE void panel_prefetch(const struct panel_next *next, int64_t tile, int64_t tiles)
{
    int64_t lines = next->rows << next->row_shift;
    for (int64_t line = lines * tile / tiles; line < lines * (tile + 1) / tiles; line++)
        _mm_prefetch((const char *)next->codes + (line >> next->row_shift) * next->row_bytes +
                         (line & ((1 << next->row_shift) - 1)) * 64,
                     _MM_HINT_T1);
}

// sum[t] += the panel times token t, for all tokens.
VECTOR_INLINE void panel_multiply(float (*sum)[BLOCK_ROWS], const struct panel *panel, const struct panel_token *x,
                                  int64_t tokens, int64_t cols, const struct panel_next *next, int64_t group_size,
                                  int words, enum weight_kind kind)
{
    int64_t t = 0;
    for (; tokens - t >= TILE_TOKENS && tokens - t != 8; t += TILE_TOKENS) {
        panel_prefetch(next, t / TILE_TOKENS, tokens / TILE_TOKENS);
        panel_tile(sum + t, panel, x + t, cols, group_size, TILE_TOKENS, words, kind);
    }
    for (; tokens - t >= 4; t += 4)
        panel_tile(sum + t, panel, x + t, cols, group_size, 4, words, kind);
    for (; tokens - t >= 2; t += 2)
        panel_tile(sum + t, panel, x + t, cols, group_size, 2, words, kind);
    if (tokens > t)
        panel_tile(sum + t, panel, x + t, cols, group_size, 1, words, kind);
}

typedef void panel_fn(float (*sum)[BLOCK_ROWS], const struct panel *panel, const struct panel_token *x, int64_t tokens,
                      int64_t cols, int64_t group_size, const struct panel_next *next);
#define PANEL_FN(name, group, words, kind)                                                                             \
    static void name(float(*sum)[BLOCK_ROWS], const struct panel *panel, const struct panel_token *x, int64_t tokens,  \
                     int64_t cols, int64_t group_size, const struct panel_next *next)                                  \
    {                                                                                                                  \
        panel_multiply(sum, panel, x, tokens, cols, next, (group) ? (group) : group_size, words, kind);                \
    }
PANEL_FN(panel_int8, 0, 4, WEIGHT_INT8)
PANEL_FN(panel_wide, 0, 4, WEIGHT_INT4)
PANEL_FN(panel_32, 32, 2, WEIGHT_INT4)
PANEL_FN(panel_16, 16, 1, WEIGHT_INT4)
PANEL_FN(panel_zero_wide, 0, 4, WEIGHT_INT4Z)
PANEL_FN(panel_zero_32, 32, 2, WEIGHT_INT4Z)
#undef PANEL_FN

static panel_fn *panel_fn_of(enum weight_kind kind, int64_t group_size)
{
    if (kind == WEIGHT_INT8)
        return panel_int8;
    if (kind == WEIGHT_INT4Z)
        return group_size == 32 ? panel_zero_32 : panel_zero_wide;
    return group_size == 16 ? panel_16 : group_size == 32 ? panel_32 : panel_wide;
}

// `blocks` blocks of 64 rows from `row` on, tokens [token, token + tokens), tokens <= PANEL_TOKENS.
static void panel_blocks(float *y, int64_t y_stride, const struct matrix *w, const struct activations *act,
                         int64_t token, int64_t tokens, int64_t row, int64_t row_end, int64_t blocks)
{
    bool int8 = w->shape.kind == WEIGHT_INT8;
    int64_t row_cols = (int64_t)w->shape.cols_padded, group_size = int8 ? ACT_GROUP : w->shape.group_size;
    panel_fn *multiply = panel_fn_of(w->shape.kind, group_size);
    struct panel panel;
    struct panel_token x[PANEL_TOKENS];
    _Alignas(64) float sum[PANEL_BLOCKS][PANEL_TOKENS][BLOCK_ROWS];
    for (int64_t b = 0; b < blocks; b++)
        memset(sum[b], 0, (size_t)tokens * sizeof *sum[b]);

    for (int64_t col = 0; col < row_cols; col += PANEL_COLS) {
        int64_t cols = row_cols - col < PANEL_COLS ? row_cols - col : PANEL_COLS;
        panel_tokens(x, act, token, tokens, col, cols, group_size, int8 ? 128 : tile_bias(w->shape.kind));
        for (int64_t b = 0; b < blocks; b++) {
            panel_fill(&panel, w, row + b * BLOCK_ROWS, col, cols);
            struct panel_next next = b + 1 < blocks ? panel_next(w, row + (b + 1) * BLOCK_ROWS, col, cols)
                                                    : panel_next(w, row, col + cols, cols);
            multiply(sum[b], &panel, x, tokens, cols, group_size, &next);
        }
    }
    __m512 last[PANEL_BLOCKS * BLOCK_VECTORS];
    for (int64_t i = 0; i < blocks * BLOCK_VECTORS; i++)
        last[i] = load_last_of(w, row + i * LANES);
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t i = 0; i < blocks * BLOCK_VECTORS; i++) {
            __m512 total = _mm512_load_ps(&sum[i / BLOCK_VECTORS][t][i % BLOCK_VECTORS * LANES]);
            store_rows(y + (token + t) * y_stride, row + i * LANES, row_end, _mm512_mul_ps(total, last[i]));
        }
}

static void panel_matmul(float *y, int64_t y_stride, const struct matrix *w, const struct activations *act,
                         int64_t tokens, int64_t row_begin, int64_t row_end)
{
    for (int64_t row = row_begin; row < row_end; row += PANEL_BLOCKS * BLOCK_ROWS) {
        int64_t blocks = (row_end - row + BLOCK_ROWS - 1) / BLOCK_ROWS;
        for (int64_t t = 0; t < tokens; t += PANEL_TOKENS)
            panel_blocks(y, y_stride, w, act, t, tokens - t < PANEL_TOKENS ? tokens - t : PANEL_TOKENS, row, row_end,
                         blocks < PANEL_BLOCKS ? blocks : PANEL_BLOCKS);
    }
}

#endif
