// What both attention kernels share: where keys and values lie, how they are read, and which query heads read which.
#ifndef TPSHARD_KERNELS_CUDA_ATTENTION_CUH
#define TPSHARD_KERNELS_CUDA_ATTENTION_CUH

#include "formats/number_formats.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/primitives.cuh"
#include "kernels/kv_codes.h"

#define LOG2_E 1.44269504f

// Whether rows of keys and values have scales.
template <enum kv_format FORMAT> constexpr bool scaled_cache = FORMAT == KV_INT8 || FORMAT == KV_INT4;

// First element of the row of keys or values of (page, kv head, position in the page).
__device__ __forceinline__ int64_t kv_row(const struct device_kv &kv, int64_t page, int64_t kv_head, int slot)
{
    return ((page * kv.num_kv_heads + kv_head) * KV_PAGE_TOKENS + slot) * kv.head_dim;
}

// Stores one value in the cache.
__device__ __forceinline__ void store_kv(void *cache, enum kv_format format, int64_t at, float x)
{
    if (format == KV_E4M3)
        ((uint8_t *)cache)[at] = f32_to_e4m3(x);
    else
        ((uint16_t *)cache)[at] = f32_to_bf16(x);
}

// First position that a query at `position` sees.
__device__ __forceinline__ int64_t window_begin(const struct attention_shape &shape, int64_t position)
{
    return shape.window > 0 && position + 1 > shape.window ? position + 1 - shape.window : 0;
}

// A score, given q . k: scaled, capped and in units of log2, so that exp2f follows.
__device__ __forceinline__ float finished_score(const struct attention_shape &shape, float dot)
{
    float score = dot * shape.scale;
    if (shape.soft_cap > 0)
        score = shape.soft_cap * tanhf(score / shape.soft_cap);
    return score * LOG2_E;
}

// The head's sink as a score; -Inf: it has none, and takes no share.
__device__ __forceinline__ float sink_score(const struct attention_shape &shape, int64_t head)
{
    return shape.sinks ? shape.sinks[head] * LOG2_E : -INFINITY;
}

// 2^(x - largest). A largest of -Inf says that nothing finite has been seen: then x is -Inf (gives 0) or NaN.
__device__ __forceinline__ float weight_of(float x, float largest)
{
    return exp2f(x - (largest == -INFINITY ? 0.0f : largest));
}

// A block of columns of int4, as kv_int4_byte has them, in the places of a block of eight. half: of its columns, 1 to 4, which is its bytes.
__device__ __forceinline__ uint32_t int4_block(const uint8_t *codes, int half)
{
    uint32_t bytes = 0;
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (i < half)
            bytes |= (uint32_t)codes[i] << i * 8;
    uint64_t columns = (bytes & 0x0f0f0f0fu) | (uint64_t)(bytes >> 4 & 0x0f0f0f0fu) << half * 8;
    return (uint32_t)columns | (uint32_t)(columns >> 32) << 4;
}

// Elements dim .. dim + 7 of the row that begins at element `row`, as stored: bf16 in x .. w, e4m3 and int8 in x and y,
// int4 in x, four low nibbles before four high ones; zeros from head_dim on.
// by_eights: head_dim is a multiple of 8, so that one load does it.
template <enum kv_format FORMAT>
__device__ __forceinline__ uint4 load_eight(const void *cache, int64_t row, int dim, int head_dim, bool by_eights)
{
    uint4 x = make_uint4(0, 0, 0, 0);
    if (dim >= head_dim)
        return x;
    if (by_eights && FORMAT == KV_BF16)
        return load_global((const uint4 *)((const uint16_t *)cache + row + dim));
    if (by_eights && FORMAT == KV_INT4)
        return make_uint4(load_global((const uint32_t *)((const uint8_t *)cache + (row + dim) / 2)), 0, 0, 0);
    if (by_eights) {
        uint2 bytes = load_global((const uint2 *)((const uint8_t *)cache + row + dim));
        return make_uint4(bytes.x, bytes.y, 0, 0);
    }
    if (FORMAT == KV_INT4)
        return make_uint4(int4_block((const uint8_t *)cache + (row + dim) / 2, min(head_dim - dim, 8) / 2), 0, 0, 0);
    uint32_t word[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < 8; i++) {
        if (dim + i >= head_dim)
            continue;
        if (FORMAT == KV_BF16)
            word[i / 2] |= (uint32_t)((const uint16_t *)cache)[row + dim + i] << i % 2 * 16;
        else
            word[i / 4] |= (uint32_t)((const uint8_t *)cache)[row + dim + i] << i % 4 * 8;
    }
    return make_uint4(word[0], word[1], word[2], word[3]);
}

// Eight codes of a scaled format without their scale. As bytes from 0 on they stand in the mantissa of 2^23.
template <enum kv_format FORMAT> __device__ __forceinline__ void widen_codes(float *out, uint4 x)
{
    constexpr bool BYTES = FORMAT == KV_INT8;
    uint32_t three_bits = x.x & 0x77777777u, choice = (x.x >> 1 & 0x44444444u) | 0x32103210u;
    uint32_t low = BYTES ? x.x ^ 0x80808080u : nl4_bytes(three_bits, choice);
    uint32_t high = BYTES ? x.y ^ 0x80808080u : nl4_bytes(three_bits >> 16, choice >> 16);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        int byte = BYTES ? i : i % 4 * 2 + i / 4;
        out[i] = f32_from_bits(byte_permute(byte < 4 ? low : high, 0x4b000000u, 0x7440u + (unsigned)(byte % 4))) -
                 (float)(0x800000 + (BYTES ? 128 : WEIGHT_NL4_TOP));
    }
}

// The eight as f32. Exact.
template <enum kv_format FORMAT> __device__ __forceinline__ void widen_eight(float *out, uint4 x)
{
    const uint32_t word[4] = {x.x, x.y, x.z, x.w};
    if (scaled_cache<FORMAT>)
        widen_codes<FORMAT>(out, x);
#pragma unroll
    for (int i = 0; i < 4 && FORMAT == KV_BF16; i++) {
        out[2 * i] = f32_from_bits(word[i] << 16);
        out[2 * i + 1] = f32_from_bits(word[i] & 0xffff0000);
    }
#pragma unroll
    for (int i = 0; i < 4 && FORMAT == KV_E4M3; i++) {
        uint32_t halves = e4m3x2_to_half2((uint16_t)(word[i / 2] >> i % 2 * 16));
        out[2 * i] = half_to_float((uint16_t)halves);
        out[2 * i + 1] = half_to_float((uint16_t)(halves >> 16));
    }
}

// The eight as bf16, two to a word; codes without their scale. Exact: e4m3 has 3 bits of mantissa, codes and levels have 7 bits.
template <enum kv_format FORMAT> __device__ __forceinline__ uint4 eight_to_bf16(uint4 x)
{
    if (FORMAT == KV_BF16)
        return x;
    float value[8];
    uint32_t word[4];
    widen_eight<FORMAT>(value, x);
#pragma unroll
    for (int i = 0; i < 4; i++)
        word[i] = byte_permute(f32_bits(value[2 * i]), f32_bits(value[2 * i + 1]), 0x7632);
    return make_uint4(word[0], word[1], word[2], word[3]);
}

#endif
