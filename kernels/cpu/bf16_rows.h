// Activations of the tables that multiply bf16 by bf16 (kernels_avx512bf16.c, kernels_amx.c): each is rounded to the nearest bf16, ties to even.
//
// Why rounded. The GPU backend's prefill takes bf16 inputs for bf16 weights, and so do the reference implementations, which also round what
// comes out; keys, values and sums over ranks are bf16 here too. An activation errs by up to 2^-8 of itself, and a typical output by
// 1.5e-3: a quarter of what int8 activations cost, and a fifteenth of the rounding of fp8 weights. The products of the instructions that
// take bf16 are twice (vectors) or sixteen times (tiles) those of f32 in the same time, and inputs take half the room. Whoever wants inputs of
// f32 has them with `--backend avx512`, at half the speed of a prompt.
#ifndef TPSHARD_KERNELS_CPU_BF16_ROWS_H
#define TPSHARD_KERNELS_CPU_BF16_ROWS_H

#include "kernels/cpu/avx512_help.h"

// Floats whose upper halves are the nearest bf16; NaN as the quiet one. What is below 2^-126 becomes zero: some processors take it for that,
// others do not, and so it is none of their business.
VECTOR_INLINE __m512i nearest_bf16(__m512 x)
{
    __m512i bits = _mm512_castps_si512(x), even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(even, _mm512_set1_epi32(0x7fff)));
    bits = _mm512_mask_mov_epi32(bits, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
    return _mm512_maskz_mov_epi32(_mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x7f800000)), bits);
}

// 32 of x, of which the first `left` are there and the others zero.
VECTOR_INLINE __m512i nearest_bf16_32(const float *x, int64_t left)
{
    _Alignas(64) static const uint16_t upper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                    33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    __m512i half[2];
    for (int64_t i = 0; i < 2; i++) {
        int64_t some = left - i * LANES;
        __mmask16 mask = some >= LANES ? 0xffff : some > 0 ? (__mmask16)((1u << some) - 1) : 0;
        half[i] = nearest_bf16(_mm512_maskz_loadu_ps(mask, x + (mask ? i * LANES : 0)));
    }
    return _mm512_permutex2var_epi16(half[0], _mm512_load_si512(upper), half[1]);
}

// A row as bf16, with zeros up to a multiple of ACT_GROUP. by_lanes: of each 64 columns first the first 8 of each 16, then the others, as
// the instructions unpack bytes.
static void round_row(uint16_t *out, const float *x, int64_t cols, bool by_lanes)
{
    for (int64_t col = 0, stored = (int64_t)round_up((uint64_t)cols, ACT_GROUP); col < stored; col += 64) {
        int64_t left = cols - col;
        __m512i first = nearest_bf16_32(left > 0 ? x + col : x, left);
        __m512i second = nearest_bf16_32(left > 32 ? x + col + 32 : x, left - 32);
        _mm512_storeu_si512(out + col, by_lanes ? _mm512_shuffle_i64x2(first, second, 0x88) : first);
        _mm512_storeu_si512(out + col + 32, by_lanes ? _mm512_shuffle_i64x2(first, second, 0xdd) : second);
    }
}

VECTOR_INLINE bool is_float_product(enum weight_kind kind)
{
    return kind == WEIGHT_BF16 || kind == WEIGHT_FP8 || kind == WEIGHT_FP8G;
}

// Of all kinds; by_lanes: of fp8 and fp8g.
static void round_or_prepare(struct activations *act, const struct matrix *w, const float *x, int64_t x_stride,
                             int64_t token_begin, int64_t token_end, bool by_lanes)
{
    enum weight_kind kind = w->shape.kind;
    if (!is_float_product(kind)) {
        vector_ops_prepare(act, w, x, x_stride, token_begin, token_end);
        return;
    }
    for (int64_t token = token_begin; token < token_end; token++)
        round_row((uint16_t *)(void *)(act->f32 + token * act->stride), x + token * x_stride, (int64_t)w->shape.cols,
                  by_lanes && kind != WEIGHT_BF16);
}

// Prepared columns of a token, from a multiple of 32 on.
VECTOR_INLINE const uint8_t *rounded_at(const struct activations *act, int64_t token, int64_t col)
{
    return (const uint8_t *)(act->f32 + token * act->stride) + col * (int64_t)sizeof(uint16_t);
}

#endif
