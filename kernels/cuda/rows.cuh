// What the operations over rows share: sums of a warp and of a block, and the functions of the CPU's tables for one lane.
#ifndef TPSHARD_KERNELS_CUDA_ROWS_CUH
#define TPSHARD_KERNELS_CUDA_ROWS_CUH

#include "formats/number_formats.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/primitives.cuh"

namespace
{

enum {
    WARP = 32,
    MAX_WARPS = 16, // of a block
};

inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t rounded_up_quotient(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline bool on_16_bytes(const void *p) { return (uintptr_t)p % 16 == 0; }

__device__ __forceinline__ float warp_sum(float x)
{
    for (int mask = WARP / 2; mask; mask /= 2)
        x += __shfl_xor_sync(0xffffffffu, x, mask);
    return x;
}

__device__ __forceinline__ uint32_t warp_max(uint32_t x)
{
    for (int mask = WARP / 2; mask; mask /= 2)
        x = max(x, __shfl_xor_sync(0xffffffffu, x, mask));
    return x;
}

// The block's sum of what each thread has: its warp by halves, then the warps in ascending order in double; for thread 0 alone (GeForce
// chips have few units for doubles). warps: shared, [MAX_WARPS]; the caller puts a barrier before it is used again.
__device__ __forceinline__ double block_sum(float x, float *warps)
{
    x = warp_sum(x);
    if (threadIdx.x % WARP == 0)
        warps[threadIdx.x / WARP] = x;
    __syncthreads();
    double sum = 0;
    for (int i = 0; threadIdx.x == 0 && i < (int)blockDim.x / WARP; i++)
        sum += (double)warps[i];
    return sum;
}

// exp16 of kernels/vectors.h for one lane, the same bits.
__device__ __forceinline__ float exp_as_cpu(float x)
{
    float a = x > 89.0f ? 89.0f : x;
    a = a < -104.0f ? -104.0f : a;
    float shifted = a * 0x1.715476p+0f + 12582912.0f;
    float n = shifted - 12582912.0f;
    int32_t exponent = (int32_t)f32_bits(shifted) - 0x4b400000;
    float r = a - n * 0x1.62e4p-1f - n * 0x1.7f7d1cp-20f;
    float p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    int32_t half = exponent >> 1;
    return p * f32_from_bits((uint32_t)(half + 127) << 23) * f32_from_bits((uint32_t)(exponent - half + 127) << 23);
}

// layer_ops_softcap of kernels/layer_ops.h.
__device__ __forceinline__ float softcap_as_cpu(float x, float cap)
{
    float a = x / cap;
    return (1.0f - 2.0f / (exp_as_cpu(a + a) + 1.0f)) * cap;
}

// layer_ops_activate of kernels/layer_ops.h.
__device__ __forceinline__ float activation_as_cpu(enum activation activation, float gate, float up)
{
    float z = gate;
    if (activation == ACTIVATION_GELU_TANH) {
        z = (gate + gate * gate * gate * 0.044715f) * 0x1.988454p+0f;
    } else if (activation == ACTIVATION_GPT_OSS) {
        gate = gate > 7.0f ? 7.0f : gate; // a NaN stays
        up = up > 7.0f ? 7.0f : up < -7.0f ? -7.0f : up;
        z = gate * 1.702f;
        up += 1.0f;
    }
    return gate / (exp_as_cpu(-z) + 1.0f) * up;
}

} // namespace

#endif
