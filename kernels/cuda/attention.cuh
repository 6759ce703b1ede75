// What both attention kernels share: where keys and values lie, how they are read, and which query heads read which.
#ifndef TPSHARD_KERNELS_CUDA_ATTENTION_CUH
#define TPSHARD_KERNELS_CUDA_ATTENTION_CUH

#include "formats/number_formats.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/primitives.cuh"

#define LOG2_E 1.44269504f

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

// Elements dim .. dim + 7 of the row that begins at element `row`, as stored: bf16 in x .. w, e4m3 in x and y; zeros from head_dim on.
// by_eights: head_dim is a multiple of 8, so that one load does it.
template <enum kv_format FORMAT>
__device__ __forceinline__ uint4 load_eight(const void *cache, int64_t row, int dim, int head_dim, bool by_eights)
{
    uint4 x = make_uint4(0, 0, 0, 0);
    if (dim >= head_dim)
        return x;
    if (by_eights && FORMAT == KV_BF16)
        return load_global((const uint4 *)((const uint16_t *)cache + row + dim));
    if (by_eights) {
        uint2 bytes = load_global((const uint2 *)((const uint8_t *)cache + row + dim));
        return make_uint4(bytes.x, bytes.y, 0, 0);
    }
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

// The eight as f32. Exact.
template <enum kv_format FORMAT> __device__ __forceinline__ void widen_eight(float *out, uint4 x)
{
    if (FORMAT == KV_BF16) {
        const uint32_t word[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            out[2 * i] = f32_from_bits(word[i] << 16);
            out[2 * i + 1] = f32_from_bits(word[i] & 0xffff0000);
        }
        return;
    }
    const uint32_t word[2] = {x.x, x.y};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint32_t halves = e4m3x2_to_half2((uint16_t)(word[i / 2] >> i % 2 * 16));
        out[2 * i] = half_to_float((uint16_t)halves);
        out[2 * i + 1] = half_to_float((uint16_t)(halves >> 16));
    }
}

// The eight as bf16, two to a word. Exact: e4m3 has 3 bits of mantissa.
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
