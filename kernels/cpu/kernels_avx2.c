// Matmul with AVX2, FMA and F16C. The order of every sum: kernels.h.
//
// vpmaddubsw multiplies unsigned with signed bytes, and pairs of products must fit 16 bits: of int4 codes + 8 (at most 15) eight such pairs
// can be added there, of doubled e2m1 codes + 12 (at most 24) five, of nl4's levels + 34 (at most 63) two; int8 uses |w| and x with w's sign. One token: weights go from their
// cache lines to vpmaddubsw, 8 rows and one group at a time. More: avx2_panel.h.
#include "kernels/attention.h"
#include "kernels/kernels_internal.h"
#include "kernels/lanes.h"
#include "kernels/vector_ops.h"

#include <immintrin.h>

enum {
    BLOCK_ROWS = WEIGHT_ROW_UNIT,
    TILE_ROWS = 16,
    BLOCK_TILES = BLOCK_ROWS / TILE_ROWS,
    DECODE_BLOCKS = 4, // blocks of a tiled kind read side by side
    DECODE_PREFETCH_BYTES = 6144,
    ROWS = 8, // of one sum across lanes
    PREFETCH_BYTES = 4096,
    INT8_PREFETCH_BYTES = 1536,
};

// ---- bf16, fp8 and fp8g --------------------------------------------------------------------------------------------------

// By way of f16, whose exponent has the bits that e4m3 lacks: each code is shifted to the top of its 16 bits, then down by one.
VECTOR_INLINE struct lanes lanes_fp8(const uint8_t *codes, bool odd)
{
    __m256i wide = _mm256_loadu_si256((const __m256i *)codes);
    if (!odd)
        wide = _mm256_slli_epi16(wide, 8);
    wide = _mm256_and_si256(_mm256_srai_epi16(wide, 1), _mm256_set1_epi16((short)0xbf80));
    return (struct lanes){_mm256_cvtph_ps(_mm256_castsi256_si128(wide)),
                          _mm256_cvtph_ps(_mm256_extracti128_si256(wide, 1))};
}

VECTOR_INLINE void lanes_fp8_all(struct lanes out[4], const uint8_t *codes)
{
    for (int part = 0; part < 4; part++)
        out[part] = lanes_fp8(codes + part / 2 * 32, part % 2);
}

#define FLOAT_FP8_NAN 0
// Doubled, which drops the sign.
struct magnitudes {
    __m256i v;
};
VECTOR_INLINE void magnitudes_add(struct magnitudes *largest, const uint8_t *codes)
{
    for (int i = 0; i < 64; i += 32) {
        __m256i v = _mm256_loadu_si256((const __m256i *)(codes + i));
        largest->v = _mm256_max_epu8(largest->v, _mm256_add_epi8(v, v));
    }
}
VECTOR_INLINE bool magnitudes_nan(const struct magnitudes *largest)
{
    return _mm256_movemask_epi8(_mm256_cmpeq_epi8(largest->v, _mm256_set1_epi8((char)0xfe))) != 0;
}

#define FLOAT_TILE_ROWS 2
#define FLOAT_TILE_TOKENS 3
#define FLOAT_FEW_ROWS 4
#define FLOAT_FEW_TOKENS 2
#define FLOAT_PANEL_TOKENS 12
#include "kernels/cpu/float_matmul.h"

// ---- int8 and tiled kinds ------------------------------------------------------------------------------------------

VECTOR_INLINE __m256i load(const void *x) { return _mm256_loadu_si256((const __m256i *)x); }

// Lane i: the sum of both 128-bit lanes' word i % 4 of low (i < 4) or high.
VECTOR_INLINE __m256i add_lanes(__m256i low, __m256i high)
{
    return _mm256_add_epi32(_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31));
}

// Lane i: the sum of all lanes of v[i].
VECTOR_INLINE __m256i sum_8(const __m256i v[ROWS])
{
    __m256i low = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
    __m256i high = _mm256_hadd_epi32(_mm256_hadd_epi32(v[4], v[5]), _mm256_hadd_epi32(v[6], v[7]));
    return add_lanes(low, high);
}

// Lane i of quarter[w]: the sum of word w of both 128-bit lanes of v[i]: 16 natural columns of a tile row.
VECTOR_INLINE void sum_8_quarters(__m256i quarter[4], const __m256i v[ROWS])
{
    __m256i a = add_lanes(v[0], v[4]), b = add_lanes(v[1], v[5]), c = add_lanes(v[2], v[6]), d = add_lanes(v[3], v[7]);
    __m256i ab01 = _mm256_unpacklo_epi32(a, b), ab23 = _mm256_unpackhi_epi32(a, b);
    __m256i cd01 = _mm256_unpacklo_epi32(c, d), cd23 = _mm256_unpackhi_epi32(c, d);
    quarter[0] = _mm256_unpacklo_epi64(ab01, cd01);
    quarter[1] = _mm256_unpackhi_epi64(ab01, cd01);
    quarter[2] = _mm256_unpacklo_epi64(ab23, cd23);
    quarter[3] = _mm256_unpackhi_epi64(ab23, cd23);
}

// *sum += x, here and not elsewhere: gcc 12 adds what is independent in an order of its own, and runs out of registers.
VECTOR_INLINE void add_16(__m256i *sum, __m256i x)
{
    *sum = _mm256_add_epi16(*sum, x);
    __asm__("" : "+x"(*sum));
}
VECTOR_INLINE void add_32(__m256i *sum, __m256i x)
{
    *sum = _mm256_add_epi32(*sum, x);
    __asm__("" : "+x"(*sum));
}

VECTOR_INLINE __m256 add_term(__m256 sum, __m256 dot, __m256 scale)
{
    return _mm256_add_ps(sum, _mm256_mul_ps(dot, scale));
}

VECTOR_INLINE __m256 load_f16(const uint8_t *x) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)x)); }

// tile_scale of vector_ops.h, 8 rows at once.
VECTOR_INLINE __m256 load_scale(enum weight_kind kind, const uint8_t *scale)
{
    if (weight_group_chosen(kind))
        return load_f16(scale);
    __m128i codes = _mm_loadl_epi64((const __m128i *)scale);
    if (kind == WEIGHT_MXFP4) {
        __m256i wide = _mm256_cvtepu8_epi32(codes), nan = _mm256_cmpeq_epi32(wide, _mm256_set1_epi32(255));
        __m256i bits = _mm256_max_epu32(_mm256_slli_epi32(wide, 23), _mm256_set1_epi32(0x00400000));
        return _mm256_castsi256_ps(_mm256_or_si256(bits, _mm256_and_si256(nan, _mm256_set1_epi32(0x00400000))));
    }
    __m128i f16 = _mm_srai_epi16(_mm_slli_epi16(_mm_cvtepu8_epi16(codes), 8), 1);
    f16 = _mm_and_si128(f16, _mm_set1_epi16((short)0xbf80));
    __m128i nan = _mm_cmpeq_epi16(_mm_and_si128(f16, _mm_set1_epi16(0x3f80)), _mm_set1_epi16(0x3f80));
    return _mm256_cvtph_ps(_mm_or_si128(f16, _mm_and_si128(nan, _mm_set1_epi16(0x7e00))));
}

// ---- Tiled kinds, one token ----------------------------------------------------------------------------------------

// products[r] += of 64 columns, for the 16 rows of a tile; pairs of products in 16 bits.
VECTOR_INLINE void add_tile(__m256i products[TILE_ROWS], const uint8_t *tile, const int8_t *q, enum weight_kind kind)
{
    const __m256i low_bits = _mm256_set1_epi8(15), flip = _mm256_set1_epi8((char)0x88);
    const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)tile_table(kind)));
    __m256i x[2] = {load(q), load(q + 32)};
    for (int r = 0; r < ROWS; r++) {
        __builtin_prefetch(tile + 64 * r + DECODE_PREFETCH_BYTES, 0, 2);
        for (int i = 0; i < 2; i++) {
            __m256i v = load(tile + 64 * r + 32 * i);
            if (!has_tile_table(kind))
                v = _mm256_xor_si256(v, flip);
            __m256i low = _mm256_and_si256(v, low_bits), high = _mm256_and_si256(_mm256_srli_epi16(v, 4), low_bits);
            if (has_tile_table(kind)) {
                low = _mm256_shuffle_epi8(table, low);
                high = _mm256_shuffle_epi8(table, high);
            }
            products[r] = _mm256_add_epi16(products[r], _mm256_maddubs_epi16(low, x[i]));
            products[r + ROWS] = _mm256_add_epi16(products[r + ROWS], _mm256_maddubs_epi16(high, x[i]));
        }
    }
}

// Products in 16 bits, added up in pairs.
VECTOR_INLINE __m256i add_pairs(__m256i products) { return _mm256_madd_epi16(products, _mm256_set1_epi16(1)); }

// sum[8 rows] += `groups` groups of the columns whose products are given; half: 0 the first 8 rows of a tile, 1 the last. first: pairs of
// products of the same group, or NULL.
VECTOR_INLINE void add_groups(float *sum, const __m256i products[ROWS], const __m256i *first, const uint8_t *scales,
                              int64_t group_bytes, int half, __m256 x_scale, const int32_t x_sum[4], int groups,
                              enum weight_kind kind)
{
    int64_t half_bytes = group_bytes / (kind == WEIGHT_INT4Z ? 4 : 2); // the scales of 8 rows
    __m256i dot[ROWS], part[4];
    for (int r = 0; r < ROWS; r++)
        dot[r] = first ? _mm256_add_epi32(first[r], add_pairs(products[r])) : add_pairs(products[r]);
    if (groups == 1)
        part[0] = sum_8(dot);
    else
        sum_8_quarters(part, dot);
    for (int g = 0; g < 2 && groups == 2; g++)
        part[g] = _mm256_add_epi32(part[2 * g], part[2 * g + 1]);
    __m256 y = _mm256_loadu_ps(sum);
    for (int g = 0; g < groups; g++, scales += group_bytes) {
        __m256 scale = _mm256_mul_ps(load_scale(kind, scales + half * half_bytes), x_scale);
        __m256 value = _mm256_cvtepi32_ps(_mm256_sub_epi32(part[g], _mm256_set1_epi32(tile_bias(kind) * x_sum[g])));
        if (kind == WEIGHT_INT4Z) {
            __m256 zero = load_f16(scales + (2 + half) * half_bytes);
            value = _mm256_sub_ps(value, _mm256_mul_ps(zero, _mm256_set1_ps((float)x_sum[g])));
        }
        y = add_term(y, value, scale);
    }
    _mm256_storeu_ps(sum, y);
}

// `blocks` blocks of 64 rows side by side: as many streams of memory.
VECTOR_INLINE void tiled_decode(float *y, const struct matrix *w, const struct activations *act, int64_t row,
                                int64_t row_end, int64_t blocks, enum weight_kind kind, int group_size)
{
    int64_t cols = (int64_t)w->shape.cols_padded, block_bytes = cols * BLOCK_ROWS / 2;
    const uint8_t *data = (const uint8_t *)w->data + row / BLOCK_ROWS * block_bytes;
    int step = group_size == 128 ? 128 : 64, groups = step / group_size;
    struct tile_scales scales[DECODE_BLOCKS * BLOCK_TILES];
    float sum[DECODE_BLOCKS * BLOCK_TILES][TILE_ROWS] = {{0}};
    for (int64_t i = 0; i < blocks * BLOCK_TILES; i++)
        scales[i] = tile_scales(w, row + i * TILE_ROWS);
    for (int64_t col = 0; col < cols; col += step) {
        const int8_t *q = act->q + col;
        __m256 x_scale = _mm256_set1_ps(act->q_scale[col / ACT_GROUP]);
        int32_t x_sum[4] = {0};
        for (int i = 0; i < step / ACT_SUM; i++)
            x_sum[i * ACT_SUM / group_size] += act->q_sum[col / ACT_SUM + i];
        for (int i = 0; i < BLOCK_TILES; i++)
            for (int64_t b = 0; b < blocks; b++) {
                const uint8_t *tile =
                    data + b * block_bytes + col / 64 * (BLOCK_TILES * WEIGHT_TILE_BYTES) + i * WEIGHT_TILE_BYTES;
                const struct tile_scales *at = &scales[b * BLOCK_TILES + i];
                const uint8_t *scale = tile_scales_at(at, col);
                __m256i products[TILE_ROWS], first[TILE_ROWS];
                for (int r = 0; r < TILE_ROWS; r++)
                    products[r] = _mm256_setzero_si256();
                add_tile(products, tile, q, kind);
                const bool in_two = step == 128 && kind == WEIGHT_NL4; // no more fit 16 bits
                for (int r = 0; r < TILE_ROWS && in_two; r++) {
                    first[r] = add_pairs(products[r]);
                    products[r] = _mm256_setzero_si256();
                }
                if (step == 128)
                    add_tile(products, tile + BLOCK_TILES * WEIGHT_TILE_BYTES, q + 64, kind);
                __builtin_prefetch(scale + 256);
                for (int half = 0; half < 2; half++)
                    add_groups(sum[b * BLOCK_TILES + i] + half * ROWS, products + half * ROWS,
                               in_two ? first + half * ROWS : NULL, scale, at->group_bytes, half, x_scale, x_sum,
                               groups, kind);
            }
    }
    for (int64_t r = 0; r < blocks * BLOCK_ROWS && row + r < row_end; r++)
        y[row + r] = sum[r / TILE_ROWS][r % TILE_ROWS] * tile_last(kind, scales[r / TILE_ROWS].global, r % TILE_ROWS);
}

#include "kernels/cpu/tiled_decode.h"

// ---- int8, one token -----------------------------------------------------------------------------------------------

// dot[r] = products of 64 * parts columns, parts <= 2, of row r.
VECTOR_INLINE void int8_dots(__m256i dot[ROWS], const uint8_t *codes, int64_t gap_bytes, const int8_t *q, int parts)
{
    __m256i x[4];
    for (int i = 0; i < 2 * parts; i++)
        x[i] = load(q + 32 * i);
    for (int r = 0; r < ROWS; r++) {
        dot[r] = _mm256_setzero_si256();
        for (int i = 0; i < 2 * parts; i++) {
            __m256i w = load(codes + r * gap_bytes + 32 * i);
            __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x[i], w));
            add_32(&dot[r], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
            if (i % 2 == 0)
                __builtin_prefetch(codes + r * gap_bytes + 32 * i + INT8_PREFETCH_BYTES, 0, 2);
        }
    }
}

// ROWS rows side by side that stand far apart: see float_few of float_matmul.h.
static void int8_decode(float *y, const struct matrix *w, const struct activations *act, int64_t row_begin,
                        int64_t row_end)
{
    int64_t cols = (int64_t)w->shape.cols_padded;
    int64_t gap = (int64_t)div_up((uint64_t)(row_end - row_begin), BLOCK_ROWS) * (BLOCK_ROWS / ROWS);
    for (int64_t row = row_begin; row < row_begin + gap; row++) {
        const uint8_t *codes = (const uint8_t *)w->data + row * cols;
        __m256 sum = _mm256_setzero_ps();
        for (int64_t col = 0; col < cols; col += ACT_GROUP) {
            __m256i dot[ROWS];
            if (cols - col >= ACT_GROUP)
                int8_dots(dot, codes + col, gap * cols, act->q + col, 2);
            else
                int8_dots(dot, codes + col, gap * cols, act->q + col, 1);
            sum = add_term(sum, _mm256_cvtepi32_ps(sum_8(dot)), _mm256_set1_ps(act->q_scale[col / ACT_GROUP]));
        }
        float out[ROWS];
        _mm256_storeu_ps(out, sum);
        for (int64_t r = 0; r < ROWS && row + r * gap < row_end; r++)
            y[row + r * gap] = out[r] * ((const float *)w->scale)[row + r * gap];
    }
}

// ---- The table -----------------------------------------------------------------------------------------------------

#include "kernels/cpu/avx2_panel.h"

typedef void decode_fn(float *y, const struct matrix *w, const struct activations *act, int64_t row_begin,
                       int64_t row_end);

// Two or three tokens are not worth a panel: one after the other, while the weights are in L2.
static void matmul_by(decode_fn *decode, float *y, int64_t y_stride, const struct matrix *w,
                      const struct activations *act, int64_t tokens, int64_t row_begin, int64_t row_end)
{
    if (tokens > 3) {
        panel_matmul(y, y_stride, w, act, tokens, row_begin, row_end);
        return;
    }
    const int64_t step = tokens == 1 ? row_end - row_begin : DECODE_BLOCKS * BLOCK_ROWS;
    for (int64_t row = row_begin; row < row_end; row += step)
        for (int64_t t = 0; t < tokens; t++) {
            struct activations one = activations_rows(act, t);
            decode(y + t * y_stride, w, &one, row, row_end - row < step ? row_end : row + step);
        }
}

static void int8_matmul(float *y, int64_t y_stride, const struct matrix *w, const struct activations *act,
                        int64_t tokens, int64_t row_begin, int64_t row_end)
{
    matmul_by(int8_decode, y, y_stride, w, act, tokens, row_begin, row_end);
}

static void tiled_matmul(float *y, int64_t y_stride, const struct matrix *w, const struct activations *act,
                         int64_t tokens, int64_t row_begin, int64_t row_end)
{
    matmul_by(tiled_decode_any, y, y_stride, w, act, tokens, row_begin, row_end);
}

#include "kernels/cpu/matmul.h"

const struct kernels kernels_avx2 = {
    .name = "avx2",
    .sums = "avx2",
    .supported = kernels_supported_avx2,
    .matmul = matmul,
    .attention = attention_avx2,
    VECTOR_OPS_ENTRIES,
};
