// Matmul of int8 and tiled weights with several tokens, for AVX2; included by kernels_avx2.c.
//
// Weights of 64 rows and 256 columns are unpacked and transposed into a panel in L1, with 8 rows in the lanes of a vector, so that no sum goes
// across lanes. Two tokens and 16 rows at a time keep their sums of a group in registers; pairs of products are added in 16 bits as
// often as they fit.
#ifndef TPSHARD_KERNELS_CPU_AVX2_PANEL_H
#define TPSHARD_KERNELS_CPU_AVX2_PANEL_H

#include "kernels/cpu/panel_tokens.h"

enum {
    PANEL_TOKENS = 96, // that share a panel
    PANEL_VECTORS = BLOCK_ROWS / ROWS,
    TILE_TOKENS = 2, // and vectors of rows, whose sums stay in registers at once
    TILE_VECTORS = 2,
};

// Codes (+ bias, of tiled kinds) of 64 rows and up to PANEL_COLS columns: [cols / 4][8 vectors][8 rows][4 columns]; and of tiled kinds what
// stands beside each group.
struct panel {
    __m256i v[PANEL_COLS / 4][PANEL_VECTORS];
    float scale[PANEL_COLS / 16][BLOCK_ROWS], zero[PANEL_COLS / 32][BLOCK_ROWS];
};

// out[k] = word k of the eight rows.
VECTOR_INLINE void transpose_8(__m256i out[ROWS], const __m256i row[ROWS])
{
    __m256i pair[8], quad[8];
    for (int i = 0; i < 8; i += 2) {
        pair[i] = _mm256_unpacklo_epi32(row[i], row[i + 1]);
        pair[i + 1] = _mm256_unpackhi_epi32(row[i], row[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int high = 0; high < 2; high++) {
            quad[i + 2 * high] = _mm256_unpacklo_epi64(pair[i + high], pair[i + 2 + high]);
            quad[i + 2 * high + 1] = _mm256_unpackhi_epi64(pair[i + high], pair[i + 2 + high]);
        }
    for (int i = 0; i < 4; i++) {
        out[i] = _mm256_permute2x128_si256(quad[i], quad[i + 4], 0x20);
        out[i + 4] = _mm256_permute2x128_si256(quad[i], quad[i + 4], 0x31);
    }
}

// 64 columns (16 words) of 64 rows into panel words 0..15.
VECTOR_INLINE void fill_tiles(__m256i (*panel)[PANEL_VECTORS], const uint8_t *tiles, enum weight_kind kind)
{
    const __m256i low_bits = _mm256_set1_epi8(15), flip = _mm256_set1_epi8((char)0x88);
    const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)tile_table(kind)));
    const bool by_table = has_tile_table(kind);
    for (int i = 0; i < PANEL_VECTORS; i += 2, tiles += WEIGHT_TILE_BYTES)
        for (int half = 0; half < 2; half++) {
            __m256i row[ROWS], word[ROWS];
            for (int r = 0; r < ROWS; r++) {
                row[r] = load(tiles + 64 * r + 32 * half);
                __builtin_prefetch(tiles + 64 * r + PREFETCH_BYTES);
            }
            transpose_8(word, row);
            for (int k = 0; k < ROWS; k++) {
                __m256i v = by_table ? word[k] : _mm256_xor_si256(word[k], flip);
                __m256i low = _mm256_and_si256(v, low_bits), high = _mm256_and_si256(_mm256_srli_epi16(v, 4), low_bits);
                panel[8 * half + k][i] = by_table ? _mm256_shuffle_epi8(table, low) : low;
                panel[8 * half + k][i + 1] = by_table ? _mm256_shuffle_epi8(table, high) : high;
            }
        }
}

VECTOR_INLINE void fill_int8(__m256i (*panel)[PANEL_VECTORS], const uint8_t *codes, int64_t cols)
{
    for (int i = 0; i < PANEL_VECTORS; i++)
        for (int half = 0; half < 2; half++) {
            __m256i row[ROWS], word[ROWS];
            for (int r = 0; r < ROWS; r++) {
                const uint8_t *from = codes + (i * ROWS + r) * cols + 32 * half;
                row[r] = load(from);
                _mm_prefetch((const char *)from + PANEL_COLS, _MM_HINT_T1);
            }
            transpose_8(word, row);
            for (int k = 0; k < ROWS; k++)
                panel[8 * half + k][i] = word[k];
        }
}

VECTOR_INLINE void fill_scales(struct panel *panel, const struct matrix *w, int64_t row, int64_t col, int64_t cols,
                               enum weight_kind kind)
{
    for (int64_t i = 0; i < BLOCK_ROWS; i += TILE_ROWS) {
        struct tile_scales scales = tile_scales(w, row + i);
        int64_t half_bytes = scales.group_bytes / (kind == WEIGHT_INT4Z ? 4 : 2); // the scales of 8 rows
        const uint8_t *from = tile_scales_at(&scales, col);
        for (int64_t g = 0; g << scales.group_shift < cols; g++, from += scales.group_bytes)
            for (int64_t half = 0; half < 2; half++) {
                _mm256_storeu_ps(&panel->scale[g][i + half * ROWS], load_scale(kind, from + half * half_bytes));
                if (kind == WEIGHT_INT4Z)
                    _mm256_storeu_ps(&panel->zero[g][i + half * ROWS], load_f16(from + (2 + half) * half_bytes));
            }
    }
}

// dot[t][i] += products of the words that `steps` steps of four words from word k on have in one group: the first `words` of each four.
VECTOR_INLINE void add_words(__m256i dot[TILE_TOKENS][TILE_VECTORS], const struct panel *panel, int vector,
                             const struct panel_token *x, int64_t k, int tokens, int words, int steps, bool int8)
{
    const __m256i one = _mm256_set1_epi16(1);
    __m256i products[TILE_TOKENS][TILE_VECTORS];
    UNROLL
    for (int step = 0; step < steps; step++) {
        UNROLL
        for (int word = 0; word < words; word++) {
            int64_t at = k + 4 * step + word;
            UNROLL
            for (int t = 0; t < tokens; t++) {
                int32_t four;
                memcpy(&four, x[t].q + 4 * at, sizeof four);
                __m256i all = _mm256_set1_epi32(four);
                UNROLL
                for (int i = 0; i < TILE_VECTORS; i++) {
                    __m256i w = panel->v[at][vector + i];
                    if (int8) {
                        __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(all, w));
                        add_32(&dot[t][i], _mm256_madd_epi16(pairs, one));
                    } else {
                        __m256i pairs = _mm256_maddubs_epi16(w, all);
                        if (step + word)
                            add_16(&products[t][i], pairs);
                        else
                            products[t][i] = pairs;
                    }
                }
            }
        }
    }
    UNROLL
    for (int t = 0; t < tokens; t++) {
        UNROLL
        for (int i = 0; i < TILE_VECTORS; i++)
            if (!int8)
                add_32(&dot[t][i], _mm256_madd_epi16(products[t][i], one));
    }
}

// sum[t][16 rows] += columns [0, cols) of the panel times each token. words: of every four words of a tile row, how many stand in one group.
VECTOR_INLINE void panel_tile(float (*restrict sum)[BLOCK_ROWS], const struct panel *restrict panel, int vector,
                              const struct panel_token *restrict x, int64_t cols, int64_t group_size, int tokens,
                              int words, enum weight_kind kind)
{
    // Eight pairs of products of 15 and 127 fit 16 bits, four of 24 and 127, two of 63 and 127.
    const int sums = kind == WEIGHT_NL4 ? 2 : is_fp4(kind) ? 4 : 8;
    const int steps = sums < words ? 1 : sums / words, together = sums < words ? sums : words;
    for (int64_t col = 0, group = 0; col < cols; col += group_size, group++) {
        int64_t left = cols - col < group_size ? cols - col : group_size;
        int64_t first = col / 64 * 16 + col % 64 / 16, end = first + (words < 4 ? 16 : left / 4);
        __m256i dot[TILE_TOKENS][TILE_VECTORS];
        for (int t = 0; t < tokens; t++)
            for (int i = 0; i < TILE_VECTORS; i++)
                dot[t][i] = _mm256_set1_epi32(x[t].start[col / ACT_SUM]);
        for (int64_t k = first; k < end; k += 4 * steps) {
            UNROLL
            for (int word = 0; word < words; word += together)
                add_words(dot, panel, vector, x, k + word, tokens, together, steps, kind == WEIGHT_INT8);
        }
        for (int t = 0; t < tokens; t++)
            for (int i = 0; i < TILE_VECTORS; i++) {
                int at = (vector + i) * ROWS;
                __m256 value = _mm256_cvtepi32_ps(dot[t][i]), factor = _mm256_set1_ps(x[t].scale[col / ACT_GROUP]);
                if (kind == WEIGHT_INT4Z) {
                    __m256 zero = _mm256_loadu_ps(panel->zero[group] + at);
                    value = _mm256_sub_ps(value, _mm256_mul_ps(zero, _mm256_set1_ps(x[t].sum[col / ACT_SUM])));
                }
                if (kind != WEIGHT_INT8)
                    factor = _mm256_mul_ps(_mm256_loadu_ps(panel->scale[group] + at), factor);
                _mm256_storeu_ps(sum[t] + at, add_term(_mm256_loadu_ps(sum[t] + at), value, factor));
            }
    }
}

VECTOR_INLINE void panel_kind(float (*sum)[BLOCK_ROWS], struct panel *panel, const struct matrix *w, int64_t row,
                              int64_t col, int64_t cols, const struct panel_token *x, int64_t tokens,
                              int64_t group_size, int words, enum weight_kind kind)
{
    int64_t row_cols = (int64_t)w->shape.cols_padded;
    for (int64_t c = 0; c < cols; c += 64) {
        int64_t at = row * row_cols + (kind == WEIGHT_INT8 ? col + c : (col + c) * BLOCK_ROWS);
        if (kind == WEIGHT_INT8)
            fill_int8(&panel->v[c / 4], (const uint8_t *)w->data + at, row_cols);
        else
            fill_tiles(&panel->v[c / 4], (const uint8_t *)w->data + at / 2, kind);
    }
    if (kind != WEIGHT_INT8)
        fill_scales(panel, w, row, col, cols, kind);
    for (int vector = 0; vector < PANEL_VECTORS; vector += TILE_VECTORS) {
        int64_t t = 0;
        for (; tokens - t >= TILE_TOKENS; t += TILE_TOKENS)
            panel_tile(sum + t, panel, vector, x + t, cols, group_size, TILE_TOKENS, words, kind);
        if (t < tokens)
            panel_tile(sum + t, panel, vector, x + t, cols, group_size, 1, words, kind);
    }
}

// 64 rows from `row` on, tokens [token, token + tokens), tokens <= PANEL_TOKENS.
static void panel_block(float *y, int64_t y_stride, const struct matrix *w, const struct activations *act,
                        int64_t token, int64_t tokens, int64_t row, int64_t row_end)
{
    enum weight_kind kind = w->shape.kind;
    const bool int8 = kind == WEIGHT_INT8;
    int64_t row_cols = (int64_t)w->shape.cols_padded, group_size = int8 ? ACT_GROUP : w->shape.group_size;
    struct panel panel;
    struct panel_token x[PANEL_TOKENS];
    float sum[PANEL_TOKENS][BLOCK_ROWS];
    memset(sum, 0, (size_t)tokens * sizeof *sum);
    for (int64_t col = 0; col < row_cols; col += PANEL_COLS) {
        int64_t cols = row_cols - col < PANEL_COLS ? row_cols - col : PANEL_COLS;
        panel_tokens(x, act, token, tokens, col, cols, group_size, int8 ? 0 : tile_bias(kind));
        if (int8)
            panel_kind(sum, &panel, w, row, col, cols, x, tokens, ACT_GROUP, 4, WEIGHT_INT8);
        else if (kind == WEIGHT_NVFP4)
            panel_kind(sum, &panel, w, row, col, cols, x, tokens, 16, 1, WEIGHT_NVFP4);
        else if (kind == WEIGHT_MXFP4)
            panel_kind(sum, &panel, w, row, col, cols, x, tokens, 32, 2, WEIGHT_MXFP4);
        else if (kind == WEIGHT_NL4 && group_size == 32)
            panel_kind(sum, &panel, w, row, col, cols, x, tokens, 32, 2, WEIGHT_NL4);
        else if (kind == WEIGHT_NL4)
            panel_kind(sum, &panel, w, row, col, cols, x, tokens, group_size, 4, WEIGHT_NL4);
        else if (kind == WEIGHT_INT4 && group_size == 32)
            panel_kind(sum, &panel, w, row, col, cols, x, tokens, 32, 2, WEIGHT_INT4);
        else if (kind == WEIGHT_INT4)
            panel_kind(sum, &panel, w, row, col, cols, x, tokens, group_size, 4, WEIGHT_INT4);
        else if (group_size == 32)
            panel_kind(sum, &panel, w, row, col, cols, x, tokens, 32, 2, WEIGHT_INT4Z);
        else
            panel_kind(sum, &panel, w, row, col, cols, x, tokens, group_size, 4, WEIGHT_INT4Z);
    }
    for (int64_t r = 0; r < BLOCK_ROWS && row + r < row_end; r++) {
        float last =
            int8 ? ((const float *)w->scale)[row + r] : tile_last(kind, tile_scales(w, row + r).global, r % TILE_ROWS);
        for (int64_t t = 0; t < tokens; t++)
            y[(token + t) * y_stride + row + r] = sum[t][r] * last;
    }
}

static void panel_matmul(float *y, int64_t y_stride, const struct matrix *w, const struct activations *act,
                         int64_t tokens, int64_t row_begin, int64_t row_end)
{
    for (int64_t row = row_begin; row < row_end; row += BLOCK_ROWS)
        for (int64_t t = 0; t < tokens; t += PANEL_TOKENS)
            panel_block(y, y_stride, w, act, t, tokens - t < PANEL_TOKENS ? tokens - t : PANEL_TOKENS, row, row_end);
}

#endif
