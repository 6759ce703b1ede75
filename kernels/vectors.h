// Sixteen floats as one value, in GCC's vector types: what vector_ops.h and layer_ops.h are written in.
#ifndef TPSHARD_KERNELS_VECTORS_H
#define TPSHARD_KERNELS_VECTORS_H

#include "formats/number_formats.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { LANES = 16 };

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
#define VECTOR_INLINE static inline __attribute__((always_inline))

// Elements of a and b, counted on from one to the other, as clang and gcc 12 say it and as gcc 11 does. index: a vector of as many integers.
#if __has_builtin(__builtin_shufflevector)
#define VECTOR_SHUFFLE(index, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define VECTOR_SHUFFLE(index, a, b, ...) __builtin_shuffle(a, b, (index){__VA_ARGS__})
#endif

// Before a loop over arrays of vectors: unrolled early, they live in registers. Sanitizers would need minutes for what comes of it.
#ifdef KERNELS_SANITIZED
#define UNROLL
#elif defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
#ifdef __clang__
#define NO_UNROLL _Pragma("clang loop unroll(disable)")
#else
#define NO_UNROLL _Pragma("GCC unroll 1")
#endif

VECTOR_INLINE void load16(f32x16 *out, const float *x) { memcpy(out, x, sizeof *out); }
VECTOR_INLINE void store16(float *out, const f32x16 *x) { memcpy(out, x, sizeof *x); }

// Size of the next tile of tokens when `left` are left: 6, 4, 2 or 1, for which loops are compiled apart.
VECTOR_INLINE int64_t tile_tokens(int64_t left)
{
    return left == 8 ? 4 : left >= 6 ? 6 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

// The first `count` < 16 floats; the others are `rest`.
VECTOR_INLINE void load_part(f32x16 *out, const float *x, int64_t count, float rest)
{
    float lane[LANES];
    for (int64_t i = 0; i < LANES; i++)
        lane[i] = i < count ? x[i] : rest;
    load16(out, lane);
}

VECTOR_INLINE void load_bf16(f32x16 *out, const uint16_t *x)
{
    float lane[LANES];
    for (int i = 0; i < LANES; i++)
        lane[i] = bf16_to_f32(x[i]);
    load16(out, lane);
}

VECTOR_INLINE void load_bf16_part(f32x16 *out, const uint16_t *x, int64_t count)
{
    float lane[LANES];
    for (int64_t i = 0; i < LANES; i++)
        lane[i] = i < count ? bf16_to_f32(x[i]) : 0.0f;
    load16(out, lane);
}

// The order in which every sum of 16 partial sums ends: halves onto halves.
VECTOR_INLINE float sum_lanes(const f32x16 *x)
{
    float lane[LANES];
    store16(lane, x);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++)
            lane[i] += lane[i + half];
    return lane[0];
}

// out[i] = sum_lanes(&x[i]), all in steps of whole vectors; x is lost.
VECTOR_INLINE void sum_lanes_of_16(float *out, f32x16 x[16])
{
    UNROLL
    for (int i = 0; i < 8; i++)
        x[i] = VECTOR_SHUFFLE(i32x16, x[2 * i], x[2 * i + 1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               VECTOR_SHUFFLE(i32x16, x[2 * i], x[2 * i + 1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30,
                              31);
    UNROLL
    for (int i = 0; i < 4; i++)
        x[i] =
            VECTOR_SHUFFLE(i32x16, x[2 * i], x[2 * i + 1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
            VECTOR_SHUFFLE(i32x16, x[2 * i], x[2 * i + 1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    UNROLL
    for (int i = 0; i < 2; i++)
        x[i] =
            VECTOR_SHUFFLE(i32x16, x[2 * i], x[2 * i + 1], 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
            VECTOR_SHUFFLE(i32x16, x[2 * i], x[2 * i + 1], 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
    x[0] = VECTOR_SHUFFLE(i32x16, x[0], x[1], 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           VECTOR_SHUFFLE(i32x16, x[0], x[1], 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    store16(out, &x[0]);
}

// where[i] is all ones: a[i], all zeros: b[i].
VECTOR_INLINE void select16(f32x16 *out, const i32x16 *where, const f32x16 *a, const f32x16 *b)
{
    *out = (f32x16)((*where & (i32x16)*a) | (~*where & (i32x16)*b));
}

// exp of each lane: at most 2 ulp off, Inf above 88.72, 0 from -104 down (subnormals between), NaN for NaN.
VECTOR_INLINE void exp16(f32x16 *y, const f32x16 *x)
{
    const f32x16 zero = {0}, high = zero + 89.0f, low = zero - 104.0f;
    f32x16 a;
    i32x16 beyond = *x > high;
    select16(&a, &beyond, &high, x);
    beyond = a < low;
    select16(&a, &beyond, &low, &a);

    // a = n * ln2 + r, |r| <= ln2 / 2. Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits; the upper part
    // of ln2 has 15 bits, so that n times it is exact.
    f32x16 shifted = a * 0x1.715476p+0f + 12582912.0f;
    f32x16 n = shifted - 12582912.0f;
    i32x16 exponent = (i32x16)shifted - 0x4b400000;
    f32x16 r = a - n * 0x1.62e4p-1f - n * 0x1.7f7d1cp-20f;

    f32x16 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;

    // Two steps of 2^(n/2), because 2^n itself may be out of range where the result is not.
    i32x16 half = exponent >> 1;
    f32x16 first = (f32x16)((u32x16)(half + 127) << 23), second = (f32x16)((u32x16)(exponent - half + 127) << 23);
    *y = p * first * second;
}

// tanh of each lane, from exp16: 1 - 2 / (exp(2x) + 1).
VECTOR_INLINE void tanh16(f32x16 *y, const f32x16 *x)
{
    f32x16 e = *x + *x;
    exp16(&e, &e);
    *y = 1.0f - 2.0f / (e + 1.0f);
}

#endif
