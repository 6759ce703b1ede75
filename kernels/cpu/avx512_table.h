// Matmul with AVX-512 (F, BW, DQ, VL, VNNI, and VBMI where the including file is compiled with it). The order of every sum: kernels.h.
// kernels_avx512.c and kernels_avx512vbmi.c define before they include this:
//   AVX512_TABLE, AVX512_NAME, AVX512_SUPPORTED       the table's variable, its name, whether it can run here
//
// One token (decode) is bound by memory, and so are few tokens as long as all of them use a line while it passes: weights go from their cache
// lines to vpdpbusd or FMA, in streams that go through memory from one end to the other (avx512_tiled.h, avx512_int8.h, float_matmul.h;
// avx512_few.h for some tokens more).
// More tokens: int8 and tiled weights are unpacked into panels that all tokens use (avx512_panel.h); bf16, fp8 and fp8g keep
// 4 rows x 6 tokens of partial sums in registers.
#ifndef TPSHARD_KERNELS_CPU_AVX512_TABLE_H
#define TPSHARD_KERNELS_CPU_AVX512_TABLE_H

#include "kernels/attention.h"
#include "kernels/cpu/avx512_e4m3.h"
#include "kernels/cpu/avx512_help.h"
#include "kernels/kernels_internal.h"

// ---- bf16, fp8 and fp8g --------------------------------------------------------------------------------------------------

#ifdef __AVX512VBMI__

// In two vectors of bf16, of which each is the upper half of an f32.
VECTOR_INLINE void lanes_fp8_all(struct lanes out[4], const uint8_t *codes)
{
    __m512i pairs[2];
    e4m3_to_bf16(pairs, codes);
    UNROLL
    for (int i = 0; i < 2; i++) {
        out[2 * i].v = _mm512_castsi512_ps(_mm512_slli_epi32(pairs[i], 16));
        out[2 * i + 1].v = _mm512_castsi512_ps(_mm512_and_si512(pairs[i], _mm512_set1_epi32((int32_t)0xffff0000)));
    }
}

// Nothing to keep: a NaN stays one on its way to the sum.
#define FLOAT_FP8_NAN 1
struct magnitudes {
    int none;
};
VECTOR_INLINE void magnitudes_add(const struct magnitudes *largest, const uint8_t *codes)
{
    (void)largest, (void)codes;
}
VECTOR_INLINE bool magnitudes_nan(const struct magnitudes *largest)
{
    (void)largest;
    return false;
}

#else

// By way of f16, whose exponent has the bits that e4m3 lacks: each code is shifted to the top of its 16 bits, then down by one.
VECTOR_INLINE void lanes_fp8_all(struct lanes out[4], const uint8_t *codes)
{
    const __m256i bits = _mm256_set1_epi16((short)0xbf80);
    UNROLL
    for (int i = 0; i < 4; i += 2, codes += 32) { // in halves: taking a vector apart costs more
        __m256i odd = _mm256_loadu_si256((const __m256i *)codes), even = _mm256_slli_epi16(odd, 8);
        out[i].v = _mm512_cvtph_ps(_mm256_and_si256(_mm256_srai_epi16(even, 1), bits));
        out[i + 1].v = _mm512_cvtph_ps(_mm256_and_si256(_mm256_srai_epi16(odd, 1), bits));
    }
}

#define FLOAT_FP8_NAN 0
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

#endif

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

// vpdpbusd wants unsigned weights: w + bias. The sums start at -bias times the sum of the activations of each lane.
VECTOR_INLINE __m512i minus_bias(int bias, __m512i x)
{
    __m512i zero = _mm512_setzero_si512();
    return _mm512_sub_epi32(zero, _mm512_dpbusd_epi32(zero, _mm512_set1_epi8((char)bias), x));
}

// ---- Codes of tiled kinds -----------------------------------------------------------------------------------------

// Unsigned codes of rows 0..7 of a tile (low nibbles) and of rows 8..15.
VECTOR_INLINE __m512i low_codes(__m512i v, enum weight_kind kind)
{
    if (!has_tile_table(kind))
        return _mm512_ternarylogic_epi32(v, _mm512_set1_epi8(15), _mm512_set1_epi8(8), 0x6a); // (v & 15) ^ 8
    __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)tile_table(kind)));
#ifdef __AVX512VBMI__
    return _mm512_permutexvar_epi8(v, table); // by six bits of each byte; the upper two choose among four equal lanes
#else
    return _mm512_shuffle_epi8(table, _mm512_and_si512(v, _mm512_set1_epi8(15)));
#endif
}
VECTOR_INLINE __m512i high_codes(__m512i v, enum weight_kind kind) { return low_codes(_mm512_srli_epi16(v, 4), kind); }

#include "kernels/cpu/avx512_int8.h"
#include "kernels/cpu/avx512_panel.h"
#include "kernels/cpu/avx512_tiled.h"
// It uses what stands above.
#include "kernels/cpu/avx512_few.h"

// ---- The table -----------------------------------------------------------------------------------------------------

static void int8_matmul(float *y, int64_t y_stride, const struct matrix *w, const struct activations *act,
                        int64_t tokens, int64_t row_begin, int64_t row_end)
{
    (tokens <= INT8_FEW_TOKENS ? int8_few : panel_matmul)(y, y_stride, w, act, tokens, row_begin, row_end);
}

static void tiled_matmul(float *y, int64_t y_stride, const struct matrix *w, const struct activations *act,
                         int64_t tokens, int64_t row_begin, int64_t row_end)
{
    if (tokens > 0 && tokens <= TILED_TOKENS)
        tiled_fn_of (&w->shape)(y, y_stride, w, act, tokens, row_begin, row_end);
    else if (tokens <= (w->shape.group_size > 16 ? FEW_TOKENS : FEW_TILE))
        few_matmul(y, y_stride, w, act, tokens, row_begin, row_end);
    else
        panel_matmul(y, y_stride, w, act, tokens, row_begin, row_end);
}

#include "kernels/cpu/matmul.h"

// Looking FP8 up is quicker where memory is the limit, converting it where products in registers are: shuffles wait for the same ports.
static void table_matmul(float *y, int64_t y_stride, const struct matrix *w, const struct activations *act,
                         int64_t tokens, int64_t row_begin, int64_t row_end)
{
#ifdef __AVX512VBMI__
    if (tokens > 2 && (w->shape.kind == WEIGHT_FP8 || w->shape.kind == WEIGHT_FP8G)) {
        kernels_avx512.matmul(y, y_stride, w, act, tokens, row_begin, row_end);
        return;
    }
#endif
    matmul(y, y_stride, w, act, tokens, row_begin, row_end);
}

const struct kernels AVX512_TABLE = {
    .name = AVX512_NAME,
    .sums = "avx2",
    .supported = AVX512_SUPPORTED,
    .matmul = table_matmul,
    .attention = attention_avx512,
    VECTOR_OPS_ENTRIES,
};

#endif
