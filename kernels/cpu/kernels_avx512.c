// Matmul with AVX-512 (F, BW, DQ, VL, VNNI). The order of every sum: kernels.h.
//
// One token (decode) is bound by memory: weights go from their cache lines to vpdpbusd or FMA once, several sequential
// streams at a time; and so are few tokens (avx512_few.h, float_matmul.h), as long as all of them use a line while it passes.
// More tokens: int8 and tiled weights are unpacked into panels that all tokens use (avx512_panel.h); bf16, fp8 and fp8g keep
// 4 rows x 6 tokens of partial sums in registers.
#include "kernels/attention.h"
#include "kernels/cpu/avx512_help.h"
#include "kernels/kernels_internal.h"

enum {
    DECODE_BLOCKS = 4,     // blocks of a tiled kind read side by side
    PREFETCH_BYTES = 6144, // of codes, ahead
};

// ---- bf16, fp8 and fp8g --------------------------------------------------------------------------------------------------

// By way of f16, whose exponent has the bits that e4m3 lacks: each code is shifted to the top of its 16 bits, then down by one.
VECTOR_INLINE void lanes_fp8_all(struct lanes out[4], const uint8_t *codes)
{
    const __m512i bits = _mm512_set1_epi16((short)0xbf80);
    __m512i odd = _mm512_loadu_si512(codes), even = _mm512_slli_epi16(odd, 8);
    even = _mm512_and_si512(_mm512_srai_epi16(even, 1), bits);
    odd = _mm512_and_si512(_mm512_srai_epi16(odd, 1), bits);
    out[0].v = _mm512_cvtph_ps(_mm512_castsi512_si256(even));
    out[1].v = _mm512_cvtph_ps(_mm512_castsi512_si256(odd));
    out[2].v = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(even, 1));
    out[3].v = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(odd, 1));
}

// Doubled, which drops the sign.
struct magnitudes {
    __m512i v;
};
VECTOR_INLINE void magnitudes_add(struct magnitudes *largest, const uint8_t *codes)
{
    __m512i v = _mm512_loadu_si512(codes);
    largest->v = _mm512_max_epu8(largest->v, _mm512_add_epi8(v, v));
}
VECTOR_INLINE bool magnitudes_nan(const struct magnitudes *largest)
{
    return _mm512_cmpeq_epi8_mask(largest->v, _mm512_set1_epi8((char)0xfe)) != 0;
}

#define FLOAT_TILE_ROWS 4
#define FLOAT_TILE_TOKENS 6
#define FLOAT_FEW_ROWS 8
#define FLOAT_FEW_TOKENS 4
#define FLOAT_PANEL_TOKENS 12
#include "kernels/cpu/float_matmul.h"

// ---- Sums across lanes ---------------------------------------------------------------------------------------------

// Per 128-bit lane: the sums of a, b, c, d over its four elements.
VECTOR_INLINE __m512i sum_quads(__m512i a, __m512i b, __m512i c, __m512i d)
{
    __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
}

// Sums of neighbouring 128-bit lanes: a01 a23 b01 b23.
VECTOR_INLINE __m512i add_lane_pairs(__m512i a, __m512i b)
{
    return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
}

// Lane i: the sum of all lanes of v[i].
VECTOR_INLINE __m512i sum_16(const __m512i v[16])
{
    __m512i a = sum_quads(v[0], v[1], v[2], v[3]), b = sum_quads(v[4], v[5], v[6], v[7]);
    __m512i c = sum_quads(v[8], v[9], v[10], v[11]), d = sum_quads(v[12], v[13], v[14], v[15]);
    return add_lane_pairs(add_lane_pairs(a, b), add_lane_pairs(c, d));
}

// Lane i of quarter[w]: the sum of word w of all 128-bit lanes of v[i]: 16 natural columns of a tile row.
VECTOR_INLINE void sum_16_quarters(__m512i quarter[4], const __m512i v[16])
{
    __m512i words[4]; // of rows i, 4 + i, 8 + i, 12 + i
    for (int i = 0; i < 4; i++)
        words[i] = add_lane_pairs(add_lane_pairs(v[i], v[4 + i]), add_lane_pairs(v[8 + i], v[12 + i]));
    transpose_words(quarter, words[0], words[1], words[2], words[3]);
}

// vpdpbusd wants unsigned weights: w + bias. The sums start at -bias times the sum of the activations of each lane.
VECTOR_INLINE __m512i minus_bias(int bias, __m512i x)
{
    __m512i zero = _mm512_setzero_si512();
    return _mm512_sub_epi32(zero, _mm512_dpbusd_epi32(zero, _mm512_set1_epi8((char)bias), x));
}

// ---- Tiled kinds, one token ----------------------------------------------------------------------------------------

// Unsigned codes of rows 0..7 of a tile (low nibbles) and of rows 8..15.
VECTOR_INLINE __m512i low_codes(__m512i v, enum weight_kind kind)
{
    if (!has_tile_table(kind))
        return _mm512_ternarylogic_epi32(v, _mm512_set1_epi8(15), _mm512_set1_epi8(8), 0x6a); // (v & 15) ^ 8
    __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)tile_table(kind)));
    return _mm512_shuffle_epi8(table, _mm512_and_si512(v, _mm512_set1_epi8(15)));
}
VECTOR_INLINE __m512i high_codes(__m512i v, enum weight_kind kind) { return low_codes(_mm512_srli_epi16(v, 4), kind); }

// sum[row] += products of 64 columns, for the 16 rows of a tile.
VECTOR_INLINE void add_tile(__m512i sum[16], const uint8_t *tile, __m512i x, enum weight_kind kind)
{
    for (int g = 0; g < 8; g++) {
        __m512i v = _mm512_loadu_si512(tile + 64 * g);
        prefetch(tile + PREFETCH_BYTES + 64 * g);
        sum[g] = _mm512_dpbusd_epi32(sum[g], low_codes(v, kind), x);
        sum[g + 8] = _mm512_dpbusd_epi32(sum[g + 8], high_codes(v, kind), x);
    }
}

// `blocks` blocks of 64 rows side by side.
VECTOR_INLINE void tiled_decode(float *y, const struct matrix *w, const struct activations *act, int64_t row_begin,
                                int64_t row_end, int64_t blocks, enum weight_kind kind, int group_size)
{
    int64_t cols = (int64_t)w->shape.cols_padded, block_bytes = cols * BLOCK_ROWS / 2;
    const uint8_t *data = (const uint8_t *)w->data + row_begin / BLOCK_ROWS * block_bytes;
    int step = group_size == 128 ? 128 : 64, groups = step / group_size;
    struct tile_scales scales[DECODE_BLOCKS * BLOCK_VECTORS];
    __m512 sum[DECODE_BLOCKS * BLOCK_VECTORS];
    for (int i = 0; i < blocks * BLOCK_VECTORS; i++) {
        scales[i] = tile_scales(w, row_begin + i * LANES);
        sum[i] = _mm512_setzero_ps();
    }
    for (int64_t col = 0; col < cols; col += step) {
        __m512i x0 = _mm512_loadu_si512(act->q + col), bias = minus_bias(tile_bias(kind), x0), x1 = x0;
        if (step == 128) {
            x1 = _mm512_loadu_si512(act->q + col + 64);
            bias = _mm512_add_epi32(bias, minus_bias(tile_bias(kind), x1));
        }
        __m512 x_scale = _mm512_set1_ps(act->q_scale[col / ACT_GROUP]), x_sum[4];
        for (int g = 0; g < groups && kind == WEIGHT_INT4Z; g++)
            x_sum[g] = _mm512_set1_ps((float)sum_of_q(act->q_sum, col + g * group_size, group_size));
        for (int i = 0; i < BLOCK_VECTORS; i++)
            for (int64_t b = 0; b < blocks; b++) {
                const uint8_t *tile =
                    data + b * block_bytes + col / 64 * (4 * WEIGHT_TILE_BYTES) + i * WEIGHT_TILE_BYTES;
                const struct tile_scales *at = &scales[b * BLOCK_VECTORS + i];
                const uint8_t *scale = tile_scales_at(at, col);
                __m512 *out = &sum[b * BLOCK_VECTORS + i];
                __m512i dot[16], part[4];
                for (int r = 0; r < 16; r++)
                    dot[r] = bias;
                add_tile(dot, tile, x0, kind);
                if (step == 128)
                    add_tile(dot, tile + 4 * WEIGHT_TILE_BYTES, x1, kind);
                prefetch(scale + 256);
                if (groups == 1)
                    part[0] = sum_16(dot);
                else
                    sum_16_quarters(part, dot);
                for (int g = 0; g < 2 && groups == 2; g++)
                    part[g] = _mm512_add_epi32(part[2 * g], part[2 * g + 1]);
                for (int g = 0; g < groups; g++, scale += at->group_bytes) {
                    __m512 value = _mm512_cvtepi32_ps(part[g]);
                    if (kind == WEIGHT_INT4Z)
                        value = _mm512_sub_ps(value, _mm512_mul_ps(load_f16(scale + 2 * LANES), x_sum[g]));
                    value = _mm512_mul_ps(value, _mm512_mul_ps(load_scale(kind, scale), x_scale));
                    *out = _mm512_add_ps(*out, value);
                }
            }
    }
    for (int i = 0; i < blocks * BLOCK_VECTORS; i++)
        store_rows(y, row_begin + i * LANES, row_end, _mm512_mul_ps(sum[i], load_last(kind, &scales[i])));
}

#include "kernels/cpu/tiled_decode.h"

// ---- int8, one token: 8 rows and 2 groups at a time ---------------------------------------------------------------

enum { INT8_ROWS = 8 };

// dot[r] = products of 64 * parts columns of row r.
VECTOR_INLINE void int8_dots(__m512i dot[INT8_ROWS], const int8_t *codes, int64_t cols, const int8_t *q, int parts)
{
    const int8_t *next = codes + INT8_ROWS * cols; // of the next rows
    __m512i x[2], bias = _mm512_setzero_si512();
    for (int p = 0; p < parts; p++) {
        x[p] = _mm512_loadu_si512(q + 64 * p);
        bias = _mm512_add_epi32(bias, minus_bias(128, x[p]));
    }
    for (int r = 0; r < INT8_ROWS; r++) {
        dot[r] = bias;
        for (int p = 0; p < parts; p++) {
            __m512i v = _mm512_loadu_si512(codes + r * cols + 64 * p);
            prefetch(next + r * cols + 64 * p);
            dot[r] = _mm512_dpbusd_epi32(dot[r], _mm512_xor_si512(v, _mm512_set1_epi8((char)0x80)), x[p]);
        }
    }
}

static void int8_rows(float *y, const struct matrix *w, const int8_t *q, const float *q_scale, int64_t row,
                      int64_t row_end)
{
    int64_t cols = (int64_t)w->shape.cols_padded;
    const int8_t *codes = (const int8_t *)w->data + row * cols;
    __m256 sum = _mm256_setzero_ps();
    __m512i dot[16];
    int64_t col = 0;
    for (; col + 2 * ACT_GROUP <= cols; col += 2 * ACT_GROUP) {
        int8_dots(dot, codes + col, cols, q + col, 2);
        int8_dots(dot + INT8_ROWS, codes + col + ACT_GROUP, cols, q + col + ACT_GROUP, 2);
        const float *s = q_scale + col / ACT_GROUP;
        __m512 x_scale = _mm512_insertf32x8(_mm512_set1_ps(s[0]), _mm256_set1_ps(s[1]), 1);
        __m512 term = _mm512_mul_ps(_mm512_cvtepi32_ps(sum_16(dot)), x_scale);
        sum = _mm256_add_ps(sum, _mm512_castps512_ps256(term));
        sum = _mm256_add_ps(sum, _mm512_extractf32x8_ps(term, 1));
    }
    for (; col < cols; col += ACT_GROUP) {
        if (cols - col >= ACT_GROUP)
            int8_dots(dot, codes + col, cols, q + col, 2);
        else
            int8_dots(dot, codes + col, cols, q + col, 1);
        for (int r = INT8_ROWS; r < 16; r++)
            dot[r] = _mm512_setzero_si512();
        __m512 term = _mm512_mul_ps(_mm512_cvtepi32_ps(sum_16(dot)), _mm512_set1_ps(q_scale[col / ACT_GROUP]));
        sum = _mm256_add_ps(sum, _mm512_castps512_ps256(term));
    }
    sum = _mm256_mul_ps(sum, _mm256_loadu_ps((const float *)w->scale + row));
    int64_t last = row_end < row + INT8_ROWS ? row_end : row + INT8_ROWS;
    store_rows(y, row, last, _mm512_castps256_ps512(sum));
}

static void int8_decode(float *y, const struct matrix *w, const struct activations *act, int64_t row_begin,
                        int64_t row_end)
{
    for (int64_t row = row_begin; row < row_end; row += INT8_ROWS)
        int8_rows(y, w, act->q, act->q_scale, row, row_end);
}

#include "kernels/cpu/avx512_few.h"
#include "kernels/cpu/avx512_panel.h"

// ---- The table -----------------------------------------------------------------------------------------------------

static void int8_matmul(float *y, int64_t y_stride, const struct matrix *w, const struct activations *act,
                        int64_t tokens, int64_t row_begin, int64_t row_end)
{
    if (tokens == 1)
        int8_decode(y, w, act, row_begin, row_end);
    else
        (tokens <= FEW_TILE ? few_matmul : panel_matmul)(y, y_stride, w, act, tokens, row_begin, row_end);
}

static void tiled_matmul(float *y, int64_t y_stride, const struct matrix *w, const struct activations *act,
                         int64_t tokens, int64_t row_begin, int64_t row_end)
{
    if (tokens == 1)
        tiled_decode_any(y, w, act, row_begin, row_end);
    else if (tokens <= (w->shape.group_size > 16 ? FEW_TOKENS : FEW_TILE))
        few_matmul(y, y_stride, w, act, tokens, row_begin, row_end);
    else
        panel_matmul(y, y_stride, w, act, tokens, row_begin, row_end);
}

#include "kernels/cpu/matmul.h"

const struct kernels kernels_avx512 = {
    .name = "avx512",
    .supported = kernels_supported_avx512,
    .matmul = matmul,
    .attention = attention_avx512,
    VECTOR_OPS_ENTRIES,
};
