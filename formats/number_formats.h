// Number formats, converted bit for bit the same on host and device: bf16, f16, fp8 (e4m3, e5m2), fp4 (e2m1),
// e8m0, int8, int4.
// Owns single values only; scales, groups and packing of whole tensors belong to kernels/.
//
// Rules that hold for every function here:
// - Rounding is to nearest, ties to even. The rounding mode of the thread must be the default one; flush-to-zero
//   and denormals-are-zero modes change nothing, because no step produces or needs a subnormal f32 result
//   (a subnormal f32 is far below half of the smallest value of every format but bf16 and e8m0, which are pure bit work).
// - No tables, no branches that matter: the functions inline and vectorise.
// - Compiles as C11, C++ and CUDA.
#ifndef TPSHARD_FORMATS_NUMBER_FORMATS_H
#define TPSHARD_FORMATS_NUMBER_FORMATS_H

#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define TP_HD __host__ __device__ static inline
#else
#define TP_HD static inline
#endif

#define E4M3_MAX 448.0f  // largest finite e4m3
#define E2M1_MAX 6.0f    // largest e2m1
#define F16_MAX 65504.0f // largest finite f16

TP_HD uint32_t f32_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

TP_HD float f32_from_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// bf16: sign, 8 exponent bits, 7 mantissa bits. Exact; a NaN keeps its bits.
TP_HD float bf16_to_f32(uint16_t value) { return f32_from_bits((uint32_t)value << 16); }

// Beyond the largest finite bf16, rounding gives Inf. NaN stays NaN: sign and upper payload kept, made quiet.
TP_HD uint16_t f32_to_bf16(float value)
{
    uint32_t bits = f32_bits(value);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    uint32_t nan = bits >> 16 | 0x40;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded);
}

// f16: IEEE half, sign, 5 exponent bits, 10 mantissa bits. Exact; a NaN is made quiet (as x86 vcvtph2ps does).
TP_HD float f16_to_f32(uint16_t value)
{
    uint32_t sign = (uint32_t)(value & 0x8000) << 16;
    uint32_t magnitude = (uint32_t)(value & 0x7fff) << 13;
    uint32_t normal = magnitude + (112u << 23); // exponent bias 15 -> 127
    // Subnormal: read as 2^-14 * (1 + mantissa), then take the 2^-14 away; exact.
    uint32_t subnormal = f32_bits(f32_from_bits(magnitude + (113u << 23)) - 0x1p-14f);
    uint32_t special = magnitude | 0x7f800000u | (magnitude > 0x0f800000 ? 0x00400000u : 0); // Inf or quiet NaN
    uint32_t bits = magnitude < 0x00800000 ? subnormal : magnitude >= 0x0f800000 ? special : normal;
    return f32_from_bits(sign | bits);
}

// |value| >= 65520 gives Inf. NaN stays NaN: sign and upper payload kept, made quiet (as x86 vcvtps2ph does).
TP_HD uint16_t f32_to_f16(float value)
{
    uint32_t bits = f32_bits(value);
    uint32_t sign = bits >> 16 & 0x8000;
    uint32_t magnitude = bits & 0x7fffffff;
    uint32_t normal = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
    // Subnormal: 0.5f has an ulp of 2^-24, the step of subnormal f16, so the addition rounds to it.
    uint32_t subnormal = f32_bits(f32_from_bits(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t special = magnitude > 0x7f800000 ? 0x7e00 | (magnitude >> 13 & 0x3ff) : 0x7c00; // NaN or Inf
    uint32_t half = magnitude < 0x38800000 ? subnormal : magnitude >= 0x477ff000 ? special : normal;
    return (uint16_t)(sign | half);
}

// e4m3: OCP FP8 "e4m3fn": sign, 4 exponent bits (bias 7), 3 mantissa bits; no Inf; 0x7f and 0xff are NaN. Exact.
TP_HD float e4m3_to_f32(uint8_t value)
{
    uint32_t sign = (uint32_t)(value & 0x80) << 24;
    uint32_t magnitude = (uint32_t)(value & 0x7f) << 20;
    uint32_t normal = magnitude + (120u << 23);
    uint32_t subnormal = f32_bits(f32_from_bits(magnitude + (121u << 23)) - 0x1p-6f);
    uint32_t bits = magnitude < 0x00800000 ? subnormal : magnitude == 0x07f00000 ? 0x7fc00000u : normal;
    return f32_from_bits(sign | bits);
}

// Saturating: every finite |value| above 448 gives 448 with its sign. Inf and NaN give NaN (0x7f or 0xff), so that
// a broken value is not silently turned into a large one.
TP_HD uint8_t f32_to_e4m3(float value)
{
    uint32_t bits = f32_bits(value);
    uint32_t sign = bits >> 24 & 0x80;
    uint32_t magnitude = bits & 0x7fffffff;
    uint32_t normal = (magnitude + 0x7ffff + (magnitude >> 20 & 1) - (120u << 23)) >> 20;
    // Subnormal: 16384.0f has an ulp of 2^-9, the step of subnormal e4m3, so the addition rounds to it.
    uint32_t subnormal = f32_bits(f32_from_bits(magnitude) + 16384.0f) - 0x46800000u;
    uint32_t large = magnitude >= 0x7f800000 ? 0x7f : 0x7e; // NaN or 448
    uint32_t small = magnitude < 0x3c800000 ? subnormal : normal;
    return (uint8_t)(sign | (magnitude >= 0x43e00000 ? large : small));
}

// e5m2: OCP FP8: the upper byte of an f16, with Inf (0x7c) and NaN (0x7d to 0x7f). Exact; a NaN is made quiet.
TP_HD float e5m2_to_f32(uint8_t value) { return f16_to_f32((uint16_t)(value << 8)); }

// e2m1: OCP FP4: sign (bit 3), 2 exponent bits (bias 1), 1 mantissa bit: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives.
// The upper four bits of code are ignored. Exact.
TP_HD float e2m1_to_f32(uint8_t code)
{
    uint32_t sign = (uint32_t)(code & 8) << 28;
    uint32_t magnitude = (uint32_t)(code & 7) << 22;
    uint32_t normal = magnitude + (126u << 23);
    uint32_t subnormal = f32_bits(f32_from_bits(magnitude + (127u << 23)) - 1.0f);
    return f32_from_bits(sign | (magnitude < 0x00800000 ? subnormal : normal));
}

// Twice the value of e2m1, an integer: 0, 1, 2, 3, 4, 6, 8, 12 and their negatives.
TP_HD int8_t e2m1_doubled(uint8_t code)
{
    int32_t exponent = code >> 1 & 3, mantissa = code & 1;
    int32_t magnitude = exponent ? (2 + mantissa) << (exponent - 1) : mantissa;
    return (int8_t)(code & 8 ? -magnitude : magnitude);
}

// Saturating: |value| above 6, Inf too, gives 6 with its sign. NaN, which e2m1 lacks, gives 0.
TP_HD uint8_t f32_to_e2m1(float value)
{
    uint32_t bits = f32_bits(value);
    uint32_t sign = bits >> 28 & 8;
    uint32_t magnitude = bits & 0x7fffffff;
    uint32_t normal = (magnitude + 0x1fffff + (magnitude >> 22 & 1) - (126u << 23)) >> 22;
    // Below 1: 4194304.0f has an ulp of 0.5, so the addition rounds to halves.
    uint32_t subnormal = f32_bits(f32_from_bits(magnitude) + 4194304.0f) - 0x4a800000u;
    uint32_t finite = magnitude < 0x3f800000 ? subnormal : magnitude >= 0x40c00000 ? 7 : normal;
    return (uint8_t)(magnitude > 0x7f800000 ? 0 : sign | finite);
}

// e8m0: OCP scale: 2^(code - 127); 255 is NaN. Code 0 is the one subnormal f32 that comes out of here.
TP_HD float e8m0_to_f32(uint8_t code)
{
    uint32_t bits = code ? (uint32_t)code << 23 : 0x00400000u;
    return f32_from_bits(code == 255 ? 0x7fc00000u : bits);
}

// Rounds value to an integer after clamping it to low..high; both must be integers below 2^22 in magnitude.
// NaN gives 0. Adding 1.5 * 2^23 leaves the rounded integer in the low mantissa bits.
TP_HD int32_t f32_to_int_clamped(float value, float low, float high)
{
    float clamped = value < low ? low : value > high ? high : value;
    int32_t rounded = (int32_t)(f32_bits(clamped + 12582912.0f) - 0x4b400000u);
    return (f32_bits(value) & 0x7fffffff) > 0x7f800000 ? 0 : rounded;
}

// Symmetric: -127..127 (Inf clamps as well), never -128. NaN gives 0.
TP_HD int8_t f32_to_int8(float value) { return (int8_t)f32_to_int_clamped(value, -127.0f, 127.0f); }

// -8..7 (Inf clamps as well). NaN gives 0.
TP_HD int8_t f32_to_int4(float value) { return (int8_t)f32_to_int_clamped(value, -8.0f, 7.0f); }

// Two's complement int4 in the low four bits of nibble; the upper four bits are ignored.
TP_HD int8_t int4_sign_extend(uint8_t nibble) { return (int8_t)(((nibble & 15) ^ 8) - 8); }

// Two nibbles of a byte: the element with the even index lies in the low one.
TP_HD uint8_t nibble_low(uint8_t byte) { return (uint8_t)(byte & 15); }
TP_HD uint8_t nibble_high(uint8_t byte) { return (uint8_t)(byte >> 4); }
TP_HD uint8_t nibble_pack(uint8_t low, uint8_t high) { return (uint8_t)((low & 15) | (high & 15) << 4); }

#endif
