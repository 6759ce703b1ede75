// What the matmuls with AVX-512 vectors and with tiles share: blocks of rows, a transpose, and the scales of 16 rows at once.
#ifndef TPSHARD_KERNELS_CPU_AVX512_HELP_H
#define TPSHARD_KERNELS_CPU_AVX512_HELP_H

#include "kernels/lanes.h"
#include "kernels/vector_ops.h"

#include <immintrin.h>

enum { BLOCK_ROWS = WEIGHT_ROW_UNIT, BLOCK_VECTORS = BLOCK_ROWS / LANES };

// To the L2 cache: a line that is fetched to the L1 cache occupies one of its few buffers for misses until it comes.
VECTOR_INLINE void prefetch(const void *address) { _mm_prefetch((const char *)address, _MM_HINT_T1); }

// Stores lanes whose row is below row_end.
VECTOR_INLINE void store_rows(float *y, int64_t row, int64_t row_end, __m512 value)
{
    int64_t count = row_end - row;
    if (count > 0)
        _mm512_mask_storeu_ps(y + row, count >= LANES ? 0xffff : (__mmask16)((1u << count) - 1), value);
}

// Per 128-bit lane, 4x4 transpose of words: out[i] = word i of a, b, c, d.
VECTOR_INLINE void transpose_words(__m512i out[4], __m512i a, __m512i b, __m512i c, __m512i d)
{
    __m512i ab01 = _mm512_unpacklo_epi32(a, b), ab23 = _mm512_unpackhi_epi32(a, b);
    __m512i cd01 = _mm512_unpacklo_epi32(c, d), cd23 = _mm512_unpackhi_epi32(c, d);
    out[0] = _mm512_unpacklo_epi64(ab01, cd01);
    out[1] = _mm512_unpackhi_epi64(ab01, cd01);
    out[2] = _mm512_unpacklo_epi64(ab23, cd23);
    out[3] = _mm512_unpackhi_epi64(ab23, cd23);
}

VECTOR_INLINE __m512 load_f16(const uint8_t *x) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)x)); }

// 2^-8 times the values of 16 codes, NaN as 2^-8 * 480: the sign to the top, all other bits below f16's second bit, which e4m3 lacks.
VECTOR_INLINE __m256i e4m3_to_f16(__m128i codes)
{
    return _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(codes), 7), _mm256_set1_epi16((short)0xbf80));
}

// tile_scale of vector_ops.h, 16 rows at once.
VECTOR_INLINE __m512 load_scale(enum weight_kind kind, const uint8_t *scale)
{
    if (weight_group_chosen(kind))
        return load_f16(scale);
    __m128i codes = _mm_loadu_si128((const __m128i *)scale);
    if (kind == WEIGHT_MXFP4) {
        __m512i wide = _mm512_cvtepu8_epi32(codes);
        __m512i bits = _mm512_max_epu32(_mm512_slli_epi32(wide, 23), _mm512_set1_epi32(0x00400000));
        __mmask16 nan = _mm512_cmpeq_epi32_mask(wide, _mm512_set1_epi32(255));
        return _mm512_castsi512_ps(_mm512_mask_mov_epi32(bits, nan, _mm512_set1_epi32(0x7fc00000)));
    }
    __m256i f16 = e4m3_to_f16(codes);
    __m128i magnitude = _mm_and_si128(codes, _mm_set1_epi8(0x7f));
    __mmask16 nan = _mm_cmpeq_epi8_mask(magnitude, _mm_set1_epi8(0x7f));
    return _mm512_cvtph_ps(_mm256_mask_mov_epi16(f16, nan, _mm256_set1_epi16(0x7e00)));
}

// The same of `groups` groups of a tile, one behind the other; at most four.
VECTOR_INLINE void load_group_scales(__m512 *out, enum weight_kind kind, const uint8_t *scales, int groups)
{
    const int64_t group_bytes = tile_group_bytes(kind);
    if (kind == WEIGHT_NVFP4 && groups == 4) {
        __m512i all = _mm512_loadu_si512(scales), sign = _mm512_set1_epi8((char)0x80);
        bool nan = _mm512_cmpeq_epi8_mask(_mm512_or_si512(all, sign), _mm512_set1_epi8(-1)) != 0;
        if (__builtin_expect(!nan, 1)) {
            UNROLL
            for (int g = 0; g < groups; g++)
                out[g] = _mm512_cvtph_ps(e4m3_to_f16(_mm_loadu_si128((const __m128i *)(scales + g * group_bytes))));
            return;
        }
    }
    UNROLL
    for (int g = 0; g < groups; g++)
        out[g] = load_scale(kind, scales + g * group_bytes);
}

VECTOR_INLINE void load_scales_kind(float (*scale)[BLOCK_ROWS], float (*zero)[BLOCK_ROWS], const struct matrix *w,
                                    int64_t row, int64_t col, int64_t cols, enum weight_kind kind)
{
    for (int64_t i = 0; i < BLOCK_ROWS; i += LANES) {
        struct tile_scales scales = tile_scales(w, row + i);
        const uint8_t *from = tile_scales_at(&scales, col);
        for (int64_t g = 0; g << scales.group_shift < cols; g++, from += scales.group_bytes) {
            _mm512_storeu_ps(&scale[g][i], load_scale(kind, from));
            if (kind == WEIGHT_INT4Z)
                _mm512_storeu_ps(&zero[g][i], load_f16(from + 2 * LANES));
        }
    }
}

// Scales, and of int4z zeros, of the groups in columns [col, col + cols) of a tiled kind, for 64 rows: [groups][64].
VECTOR_INLINE void load_scales(float (*scale)[BLOCK_ROWS], float (*zero)[BLOCK_ROWS], const struct matrix *w,
                               int64_t row, int64_t col, int64_t cols)
{
    if (w->shape.kind == WEIGHT_INT4 || w->shape.kind == WEIGHT_NL4)
        load_scales_kind(scale, zero, w, row, col, cols, WEIGHT_INT4);
    else if (w->shape.kind == WEIGHT_INT4Z)
        load_scales_kind(scale, zero, w, row, col, cols, WEIGHT_INT4Z);
    else if (w->shape.kind == WEIGHT_MXFP4)
        load_scales_kind(scale, zero, w, row, col, cols, WEIGHT_MXFP4);
    else
        load_scales_kind(scale, zero, w, row, col, cols, WEIGHT_NVFP4);
}

VECTOR_INLINE __m512 load_last(enum weight_kind kind, const struct tile_scales *scales)
{
    if (kind == WEIGHT_NVFP4)
        return _mm512_mul_ps(_mm512_set1_ps(0x1p7f), _mm512_loadu_ps(scales->global));
    return _mm512_set1_ps(tile_last(kind, scales->global, 0));
}

// What the sums of 16 rows of an int8 or tiled matrix are multiplied with at last.
VECTOR_INLINE __m512 load_last_of(const struct matrix *w, int64_t row)
{
    if (w->shape.kind == WEIGHT_INT8)
        return _mm512_loadu_ps((const float *)w->scale + row);
    struct tile_scales scales = tile_scales(w, row);
    return load_last(w->shape.kind, &scales);
}

VECTOR_INLINE int32_t sum_of_q(const int32_t *q_sum, int64_t col, int64_t cols)
{
    int32_t sum = 0;
    for (int64_t i = col / ACT_SUM; i < (col + cols) / ACT_SUM; i++)
        sum += q_sum[i];
    return sum;
}

#endif
