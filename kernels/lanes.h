// Sixteen floats in the registers of the instruction set that the including file is compiled for, with a fused multiply-add: what the
// compiler's own vectors (vectors.h) do not promise. Without FMA each lane is a call of fmaf: slow, and the same bits.
#ifndef TPSHARD_KERNELS_LANES_H
#define TPSHARD_KERNELS_LANES_H

#include "kernels/kv_codes.h"
#include "kernels/vectors.h"

// lanes_int4: 8 bytes, 16 columns in blocks of 8 as kv_int4_byte (kernels/kv_codes.h) has them; lanes_int4_pair: the low nibbles of 16 bytes, and
// the high ones; lanes_int4_of_pair: one of the two. They become levels.
// lanes_e4m3: 16 codes; by way of f16, whose exponent has the bits that e4m3 lacks: each code is shifted to the top of its 16 bits, then
// down by one, which gives 2^-8 times its value. A NaN becomes e4m3_to_f32's.

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>

struct lanes {
    __m512 v;
};
VECTOR_INLINE struct lanes lanes_zero(void) { return (struct lanes){_mm512_setzero_ps()}; }
VECTOR_INLINE struct lanes lanes_all(float x) { return (struct lanes){_mm512_set1_ps(x)}; }
VECTOR_INLINE struct lanes lanes_load(const float *x) { return (struct lanes){_mm512_loadu_ps(x)}; }
VECTOR_INLINE void lanes_store(float *x, const struct lanes *a) { _mm512_storeu_ps(x, a->v); }
VECTOR_INLINE void lanes_fmadd(struct lanes *sum, struct lanes a, struct lanes b)
{
    sum->v = _mm512_fmadd_ps(a.v, b.v, sum->v);
}
VECTOR_INLINE struct lanes lanes_bf16(const uint8_t *codes)
{
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)codes));
    return (struct lanes){_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
VECTOR_INLINE struct lanes lanes_int8(const uint8_t *codes)
{
    return (struct lanes){_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)codes)))};
}
// The upper bits of the codes do not matter.
VECTOR_INLINE struct lanes lanes_levels(__m512i codes)
{
    __m128i levels = _mm_set_epi64x((int64_t)WEIGHT_NL4_NEGATIVE, (int64_t)WEIGHT_NL4_POSITIVE);
    return (struct lanes){_mm512_permutexvar_ps(codes, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(levels)))};
}
// The bytes of a block to its lanes twice, then their halves.
VECTOR_INLINE struct lanes lanes_int4(const uint8_t *codes)
{
    const __m512i bytes = _mm512_set_epi32(7, 6, 5, 4, 7, 6, 5, 4, 3, 2, 1, 0, 3, 2, 1, 0);
    const __m512i halves = _mm512_set_epi32(4, 4, 4, 4, 0, 0, 0, 0, 4, 4, 4, 4, 0, 0, 0, 0);
    int64_t eight;
    memcpy(&eight, codes, sizeof eight);
    return lanes_levels(_mm512_srlv_epi32(_mm512_shuffle_epi8(_mm512_set1_epi64(eight), bytes), halves));
}
VECTOR_INLINE struct lanes lanes_int4_of_pair(const uint8_t *codes, bool high)
{
    __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)codes));
    return lanes_levels(high ? _mm512_srli_epi32(both, 4) : both);
}
VECTOR_INLINE void lanes_int4_pair(struct lanes *low, struct lanes *high, const uint8_t *codes)
{
    __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)codes));
    *low = lanes_levels(both);
    *high = lanes_levels(_mm512_srli_epi32(both, 4));
}
VECTOR_INLINE struct lanes lanes_e4m3(const uint8_t *codes)
{
    __m128i bytes = _mm_loadu_si128((const __m128i *)codes), magnitude = _mm_set1_epi8(0x7f);
    __m256i half = _mm256_srai_epi16(_mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), 8), 1);
    __m512 value = _mm512_cvtph_ps(_mm256_and_si256(half, _mm256_set1_epi16((short)0xbf80)));
    __m512i bits = _mm512_castps_si512(_mm512_mul_ps(value, _mm512_set1_ps(0x1p8f)));
    __mmask16 nan = _mm_cmpeq_epi8_mask(_mm_and_si128(bytes, magnitude), magnitude);
    bits = _mm512_mask_and_epi32(bits, nan, bits, _mm512_set1_epi32(INT32_MIN));
    return (struct lanes){_mm512_castsi512_ps(_mm512_mask_or_epi32(bits, nan, bits, _mm512_set1_epi32(0x7fc00000)))};
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>

struct lanes {
    __m256 a, b;
};
VECTOR_INLINE struct lanes lanes_zero(void) { return (struct lanes){_mm256_setzero_ps(), _mm256_setzero_ps()}; }
VECTOR_INLINE struct lanes lanes_all(float x) { return (struct lanes){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
VECTOR_INLINE struct lanes lanes_load(const float *x)
{
    return (struct lanes){_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)};
}
VECTOR_INLINE void lanes_store(float *x, const struct lanes *v)
{
    _mm256_storeu_ps(x, v->a);
    _mm256_storeu_ps(x + 8, v->b);
}
VECTOR_INLINE void lanes_fmadd(struct lanes *sum, struct lanes x, struct lanes y)
{
    sum->a = _mm256_fmadd_ps(x.a, y.a, sum->a);
    sum->b = _mm256_fmadd_ps(x.b, y.b, sum->b);
}
VECTOR_INLINE __m256 lanes_half_bf16(const uint8_t *codes)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)codes)), 16));
}
VECTOR_INLINE struct lanes lanes_bf16(const uint8_t *codes)
{
    return (struct lanes){lanes_half_bf16(codes), lanes_half_bf16(codes + 16)};
}
VECTOR_INLINE __m256 lanes_half_int8(const uint8_t *codes)
{
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)codes)));
}
VECTOR_INLINE struct lanes lanes_int8(const uint8_t *codes)
{
    return (struct lanes){lanes_half_int8(codes), lanes_half_int8(codes + 8)};
}
VECTOR_INLINE struct lanes lanes_levels(__m128i codes)
{
    __m128i levels = _mm_set_epi64x((int64_t)WEIGHT_NL4_NEGATIVE, (int64_t)WEIGHT_NL4_POSITIVE);
    __m128i value = _mm_shuffle_epi8(levels, _mm_and_si128(codes, _mm_set1_epi8(15)));
    return (struct lanes){_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(value)),
                          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(value, 8)))};
}
VECTOR_INLINE struct lanes lanes_int4(const uint8_t *codes)
{
    __m128i low = _mm_loadl_epi64((const __m128i *)codes);
    return lanes_levels(_mm_unpacklo_epi32(low, _mm_srli_epi16(low, 4)));
}
VECTOR_INLINE struct lanes lanes_int4_of_pair(const uint8_t *codes, bool high)
{
    __m128i both = _mm_loadu_si128((const __m128i *)codes);
    return lanes_levels(high ? _mm_srli_epi16(both, 4) : both);
}
VECTOR_INLINE void lanes_int4_pair(struct lanes *low, struct lanes *high, const uint8_t *codes)
{
    __m128i both = _mm_loadu_si128((const __m128i *)codes);
    *low = lanes_levels(both);
    *high = lanes_levels(_mm_srli_epi16(both, 4));
}
VECTOR_INLINE __m256 lanes_half_e4m3(__m128i half, __m128i codes)
{
    __m256 value = _mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(0x1p8f));
    __m256i wide = _mm256_cvtepi8_epi32(codes), magnitude = _mm256_set1_epi32(0x7f);
    __m256i nan = _mm256_cmpeq_epi32(_mm256_and_si256(wide, magnitude), magnitude);
    __m256i sign = _mm256_and_si256(wide, _mm256_set1_epi32(INT32_MIN));
    __m256i canonical = _mm256_or_si256(sign, _mm256_set1_epi32(0x7fc00000));
    return _mm256_blendv_ps(value, _mm256_castsi256_ps(canonical), _mm256_castsi256_ps(nan));
}
VECTOR_INLINE struct lanes lanes_e4m3(const uint8_t *codes)
{
    __m128i bytes = _mm_loadu_si128((const __m128i *)codes);
    __m256i half = _mm256_srai_epi16(_mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), 8), 1);
    half = _mm256_and_si256(half, _mm256_set1_epi16((short)0xbf80));
    return (struct lanes){lanes_half_e4m3(_mm256_castsi256_si128(half), bytes),
                          lanes_half_e4m3(_mm256_extracti128_si256(half, 1), _mm_srli_si128(bytes, 8))};
}

#else

struct lanes {
    float v[LANES];
};
VECTOR_INLINE struct lanes lanes_all(float x)
{
    struct lanes all;
    for (int i = 0; i < LANES; i++)
        all.v[i] = x;
    return all;
}
VECTOR_INLINE struct lanes lanes_zero(void) { return lanes_all(0); }
VECTOR_INLINE struct lanes lanes_load(const float *x)
{
    struct lanes a;
    memcpy(a.v, x, sizeof a.v);
    return a;
}
VECTOR_INLINE void lanes_store(float *x, const struct lanes *a) { memcpy(x, a->v, sizeof a->v); }
VECTOR_INLINE void lanes_fmadd(struct lanes *sum, struct lanes a, struct lanes b)
{
    for (int i = 0; i < LANES; i++)
        sum->v[i] = fmaf(a.v[i], b.v[i], sum->v[i]);
}
VECTOR_INLINE struct lanes lanes_bf16(const uint8_t *codes)
{
    uint16_t bits[LANES];
    memcpy(bits, codes, sizeof bits);
    struct lanes a;
    for (int i = 0; i < LANES; i++)
        a.v[i] = bf16_to_f32(bits[i]);
    return a;
}
VECTOR_INLINE struct lanes lanes_int8(const uint8_t *codes)
{
    struct lanes a;
    for (int i = 0; i < LANES; i++)
        a.v[i] = (float)(int8_t)codes[i];
    return a;
}
VECTOR_INLINE struct lanes lanes_int4(const uint8_t *codes)
{
    struct lanes a;
    for (int i = 0; i < LANES; i++)
        a.v[i] = (float)weight_nl4_level((uint8_t)(codes[i / 8 * 4 + i % 4] >> (i % 8 < 4 ? 0 : 4)));
    return a;
}
VECTOR_INLINE void lanes_int4_pair(struct lanes *low, struct lanes *high, const uint8_t *codes)
{
    for (int i = 0; i < LANES; i++) {
        low->v[i] = (float)weight_nl4_level(codes[i]);
        high->v[i] = (float)weight_nl4_level((uint8_t)(codes[i] >> 4));
    }
}
VECTOR_INLINE struct lanes lanes_int4_of_pair(const uint8_t *codes, bool high)
{
    struct lanes low_ones, high_ones;
    lanes_int4_pair(&low_ones, &high_ones, codes);
    return high ? high_ones : low_ones;
}
VECTOR_INLINE struct lanes lanes_e4m3(const uint8_t *codes)
{
    struct lanes a;
    for (int i = 0; i < LANES; i++)
        a.v[i] = e4m3_to_f32(codes[i]);
    return a;
}

#endif
#endif
