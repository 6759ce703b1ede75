// FP8 weights as bf16, which holds each exactly, for AVX-512 with VBMI. Empty without.
#ifndef TPSHARD_KERNELS_CPU_AVX512_E4M3_H
#define TPSHARD_KERNELS_CPU_AVX512_E4M3_H

#ifdef __AVX512VBMI__

#include "kernels/vectors.h"

#include <immintrin.h>

// 2^-8 times what codes 0 to 127 stand for, as bf16: the upper bytes, then the lower ones. e4m3's subnormals are normal there; NaN stays NaN.
_Alignas(64) static const uint8_t e4m3_bf16_bytes[2][128] = {
    {0,  55, 55, 55, 56, 56, 56, 56, 56, 56, 56, 56, 56, 56, 56, 56, 57, 57, 57, 57, 57, 57, 57, 57, 57, 57,
     57, 57, 57, 57, 57, 57, 58, 58, 58, 58, 58, 58, 58, 58, 58, 58, 58, 58, 58, 58, 58, 58, 59, 59, 59, 59,
     59, 59, 59, 59, 59, 59, 59, 59, 59, 59, 59, 59, 60, 60, 60, 60, 60, 60, 60, 60, 60, 60, 60, 60, 60, 60,
     60, 60, 61, 61, 61, 61, 61, 61, 61, 61, 61, 61, 61, 61, 61, 61, 61, 61, 62, 62, 62, 62, 62, 62, 62, 62,
     62, 62, 62, 62, 62, 62, 62, 62, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 127},
    {0,   0,   128, 192, 0,   32,  64,  96,  128, 144, 160, 176, 192, 208, 224, 240, 0,   16,  32,  48,  64,  80,
     96,  112, 128, 144, 160, 176, 192, 208, 224, 240, 0,   16,  32,  48,  64,  80,  96,  112, 128, 144, 160, 176,
     192, 208, 224, 240, 0,   16,  32,  48,  64,  80,  96,  112, 128, 144, 160, 176, 192, 208, 224, 240, 0,   16,
     32,  48,  64,  80,  96,  112, 128, 144, 160, 176, 192, 208, 224, 240, 0,   16,  32,  48,  64,  80,  96,  112,
     128, 144, 160, 176, 192, 208, 224, 240, 0,   16,  32,  48,  64,  80,  96,  112, 128, 144, 160, 176, 192, 208,
     224, 240, 0,   16,  32,  48,  64,  80,  96,  112, 128, 144, 160, 176, 192, 208, 224, 192}};

// 64 codes in their order: 2^-8 times the values of the first 32, then of the others.
VECTOR_INLINE void e4m3_to_bf16(__m512i out[2], const uint8_t *codes)
{
    const __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0); // the first 32 to the lower halves of 128-bit lanes
    __m512i code = _mm512_permutexvar_epi64(order, _mm512_loadu_si512(codes));
    __m512i upper = _mm512_permutex2var_epi8(_mm512_load_si512(e4m3_bf16_bytes[0]), code,
                                             _mm512_load_si512(e4m3_bf16_bytes[0] + 64));
    __m512i lower = _mm512_permutex2var_epi8(_mm512_load_si512(e4m3_bf16_bytes[1]), code,
                                             _mm512_load_si512(e4m3_bf16_bytes[1] + 64));
    upper = _mm512_ternarylogic_epi32(upper, code, _mm512_set1_epi8((char)0x80), 0xf8); // with the sign
    out[0] = _mm512_unpacklo_epi8(lower, upper);
    out[1] = _mm512_unpackhi_epi8(lower, upper);
}

#endif
#endif
