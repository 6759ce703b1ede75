// Values of the scaled formats of the KV cache, bit for bit the same on host and device: the scale of a row and its codes.
//
// A key or value of one kv head at one position is first rotated: multiplied by the Hadamard matrix of kv_rotation_block columns, block by
// block, which spreads what single columns have in excess over all of them. Stages of the transform go from neighbours up (distance 1, 2, 4
// ...), and each has (a, b) -> (a + b, a - b): it is not normalised, so that nothing but sums is rounded. Twice in a row it multiplies by the
// block's columns, a power of two: queries are rotated and divided by it, results of attention as well, which is exact.
// Then the row has one scale, bf16, and a code for each column: its value is scale * code with int8, scale * weight_nl4_level(code) with int4.
#ifndef TPSHARD_KERNELS_KV_CODES_H
#define TPSHARD_KERNELS_KV_CODES_H

#include "formats/number_formats.h"
#include "formats/weight.h"
#include "kernels/kernels.h"

#include <stdint.h>

// Columns of a row that are rotated together: the largest power of two that divides their number.
TP_HD int64_t kv_rotation_block(int64_t dim) { return dim & -dim; }

// What the scale of a row depends on: the largest of its values' extents, which are ordered by magnitude, and among equal ones the positive
// above the negative; NaN is above Inf. So no order of comparing them matters.
TP_HD uint32_t kv_extent(float x) { return f32_bits(x) << 1 | ((f32_bits(x) >> 31) ^ 1); }

// Rows without a value of this magnitude are zeros: scales stay so far from subnormal numbers that they have an inverse.
#define KV_LEAST_EXTENT 0x1p-100f

// The scale of a row with this largest extent. int8: rounded up, so that no code is cut. int4: of the sign that gives the extreme value the
// extreme level, which is negative. NaN and Inf: NaN, which no result hides.
TP_HD uint16_t kv_scale(enum kv_format format, uint32_t extent)
{
    float largest = f32_from_bits(extent >> 1);
    uint16_t up = (uint16_t)((f32_bits(largest * (1 / 127.0f)) + 0xffff) >> 16);
    uint16_t towards = f32_to_bf16((extent & 1 ? -largest : largest) * (1.0f / WEIGHT_NL4_TOP));
    uint16_t scale = format == KV_INT4 ? towards : up;
    return largest < KV_LEAST_EXTENT ? 0 : largest <= 0x1p127f ? scale : 0x7fc0;
}

// What a value is multiplied by before it is rounded to a code: 0 where the scale is 0 or NaN.
TP_HD float kv_inverse_scale(uint16_t scale)
{
    float value = bf16_to_f32(scale);
    return value < 0 || value > 0 ? 1 / value : 0;
}

TP_HD uint8_t kv_code_int8(float x, float inverse) { return (uint8_t)f32_to_int8(inverse > 0 ? x * inverse : 0); }

// int4 has the levels of nl4, weight_nl4_level (formats/weight.h), which looks at the lower four bits of a code alone. Rotated rows are roughly
// Gaussian: with the extreme value at the extreme level the error of 128 Gaussian values is 9.1 %, that of the sixteen levels that are best for
// this 9.08 %, and that of even steps 10.3 %.

// The code of the nearest level, the upper one between two, as a nibble.
TP_HD uint8_t kv_code_int4(float x, float inverse)
{
    float twice = inverse < 0 || inverse > 0 ? 2 * (x * inverse) : 0;
    int32_t code = -8;
    for (int32_t i = -8; i < 7; i++)
        code += twice >= (float)(weight_nl4_level((uint8_t)i) + weight_nl4_level((uint8_t)(i + 1)));
    return (uint8_t)(code & 15);
}

// Where the code of a column stands in a row of int4: bytes hold the columns of a block of 8 (the last block: of what is left, an even
// number), the first half in the low nibbles and the second in the high ones.
TP_HD int64_t kv_int4_byte(int64_t column, int64_t columns)
{
    int64_t block = column / 8 * 8, half = columns - block < 8 ? (columns - block) / 2 : 4;
    return block / 2 + (column - block) % half;
}
TP_HD int kv_int4_shift(int64_t column, int64_t columns)
{
    int64_t block = column / 8 * 8, half = columns - block < 8 ? (columns - block) / 2 : 4;
    return column - block < half ? 0 : 4;
}

#endif
