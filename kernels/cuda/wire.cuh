// The wire codecs of kernels/wire.h for a warp: a group of 128 values, four neighbours in each lane. The same bytes and the same bits as
// the CPU's, NaN and Inf included. Where a coded group lies and how it is read and written is the caller's choice: a lane's part of it is
// a struct of words.
//
// All of these are called by whole warps: branches are taken by what all lanes know.
#ifndef TPSHARD_KERNELS_CUDA_WIRE_CUH
#define TPSHARD_KERNELS_CUDA_WIRE_CUH

#include "kernels/cuda/rows.cuh"
#include "kernels/wire.h"

namespace
{

enum { LANE_VALUES = WIRE_GROUP / WARP };

// A lane's part of a coded group. bf16: word[0..1]; f32: word[0..3]; fp8, s8x: word[0], and behind the lanes' words the tail, which is the
// same in all lanes.
struct wire_lane {
    uint32_t word[LANE_VALUES];
    uint32_t tail;
};

__device__ constexpr uint32_t wire_bytes(enum wire wire)
{
    return wire == WIRE_F32 ? 4 * WIRE_GROUP : wire == WIRE_BF16 ? 2 * WIRE_GROUP : WIRE_GROUP + 4;
}

__device__ __forceinline__ float wire_nan() { return f32_from_bits(WIRE_NAN_BITS); }
__device__ __forceinline__ float wire_canonical(float x) { return x != x ? wire_nan() : x; }
__device__ __forceinline__ uint32_t wire_magnitude(float x) { return f32_bits(x) & 0x7fffffff; }

// ---- a group's bytes in memory: 4-byte aligned, 8 with bf16, 16 with f32 -------------------------------------------------

template <enum wire WIRE> __device__ __forceinline__ struct wire_lane wire_load(const uint8_t *group)
{
    int lane = threadIdx.x % WARP;
    struct wire_lane code = {};
    if (WIRE == WIRE_F32) {
        uint4 words = load_global((const uint4 *)(const void *)group + lane);
        code.word[0] = words.x, code.word[1] = words.y, code.word[2] = words.z, code.word[3] = words.w;
    } else if (WIRE == WIRE_BF16) {
        uint2 words = load_global((const uint2 *)(const void *)group + lane);
        code.word[0] = words.x, code.word[1] = words.y;
    } else {
        code.word[0] = load_global((const uint32_t *)(const void *)group + lane);
        code.tail = load_global((const uint32_t *)(const void *)group + WARP);
    }
    return code;
}

template <enum wire WIRE> __device__ __forceinline__ void wire_store(uint8_t *group, struct wire_lane code)
{
    int lane = threadIdx.x % WARP;
    if (WIRE == WIRE_F32) {
        store_global((uint4 *)(void *)group + lane, make_uint4(code.word[0], code.word[1], code.word[2], code.word[3]));
    } else if (WIRE == WIRE_BF16) {
        store_global((uint2 *)(void *)group + lane, make_uint2(code.word[0], code.word[1]));
    } else {
        store_global((uint32_t *)(void *)group + lane, code.word[0]);
        if (lane == 0)
            store_global((uint32_t *)(void *)group + WARP, code.tail);
    }
}

// ---- coding ----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ struct wire_lane wire_encode_fp8(const float *x)
{
    struct wire_lane code = {};
    uint32_t largest = 0;
    for (int i = 0; i < LANE_VALUES; i++)
        largest = max(largest, wire_magnitude(x[i]));
    largest = warp_max(largest);
    if (largest >= 0x7f800000) { // NaN or Inf
        code.tail = WIRE_NAN_BITS;
        return code;
    }
    if (largest < 0x0d800000) // 2^-100
        return code;
    float scale = f32_from_bits(largest) / E4M3_MAX, inverse = 1.0f / scale;
    code.tail = f32_bits(scale);
    for (int i = 0; i < LANE_VALUES; i++)
        code.word[0] |= (uint32_t)f32_to_e4m3(x[i] * inverse) << 8 * i;
    return code;
}

__device__ __forceinline__ struct wire_lane wire_encode_s8x(const float *x)
{
    struct wire_lane code = {};
    uint32_t largest = 0, second = 0, holder = LANE_VALUES; // and the spike's sign in bit 31
    for (int i = 0; i < LANE_VALUES; i++)
        largest = max(largest, wire_magnitude(x[i]));
    largest = warp_max(largest);
    for (int i = LANE_VALUES - 1; i >= 0; i--)
        if (wire_magnitude(x[i]) == largest)
            holder = (uint32_t)i | (f32_bits(x[i]) & 0x80000000u);
    int lane = __ffs((int)__ballot_sync(0xffffffffu, holder != LANE_VALUES)) - 1; // the first of several
    holder = __shfl_sync(0xffffffffu, holder, lane);
    int place = lane == (int)(threadIdx.x % WARP) ? (int)(holder & 0x7fffffff) : LANE_VALUES;
    for (int i = 0; i < LANE_VALUES; i++)
        second = max(second, i == place ? 0 : wire_magnitude(x[i]));
    int scale_code = s8x_code(warp_max(second));
    uint32_t spike = f32_to_bf16(f32_from_bits(largest | (holder & 0x80000000u)));
    // The bf16 exponent is all ones for NaN, Inf and what rounds to Inf.
    if ((spike & 0x7f80) == 0x7f80 || scale_code > S8X_MAX_CODE) {
        code.tail = (uint32_t)S8X_MARKED | (uint32_t)WIRE_NAN_BITS;
        return code;
    }
    float inverse = s8x_inverse(scale_code);
    for (int i = 0; i < LANE_VALUES; i++)
        code.word[0] |= i == place ? 0 : (uint32_t)(uint8_t)f32_to_int8(x[i] * inverse) << 8 * i;
    code.tail = (uint32_t)scale_code | (uint32_t)(lane * LANE_VALUES + (int)(holder & 0x7fffffff)) << 8 | spike << 16;
    return code;
}

// x [LANE_VALUES]: the lane's, zeros behind the end of a row.
template <enum wire WIRE> __device__ __forceinline__ struct wire_lane wire_encode(const float *x)
{
    if (WIRE == WIRE_FP8)
        return wire_encode_fp8(x);
    if (WIRE == WIRE_S8X)
        return wire_encode_s8x(x);
    struct wire_lane code = {};
    for (int i = 0; i < LANE_VALUES; i++) {
        if (WIRE == WIRE_F32)
            code.word[i] = f32_bits(x[i]);
        else
            code.word[i / 2] |= (uint32_t)f32_to_bf16(x[i]) << 16 * (i % 2);
    }
    return code;
}

__device__ __forceinline__ void wire_add_fp8(float *sum, struct wire_lane code)
{
    bool finite = (code.tail & 0x7fffffff) < 0x7f800000;
    for (int i = 0; i < LANE_VALUES; i++) {
        float value = fmaf(e4m3_to_f32((uint8_t)(code.word[0] >> 8 * i)), f32_from_bits(code.tail), sum[i]);
        sum[i] = finite ? wire_canonical(value) : wire_nan();
    }
}

__device__ __forceinline__ void wire_add_s8x(float *sum, struct wire_lane code)
{
    uint32_t scale_code = code.tail & 0xff, index = code.tail >> 8 & (WIRE_GROUP - 1);
    float scale = s8x_scale((int)scale_code), spike = bf16_to_f32((uint16_t)(code.tail >> 16));
    for (int i = 0; i < LANE_VALUES; i++) {
        float value = wire_canonical(fmaf((float)(int8_t)(code.word[0] >> 8 * i), scale, sum[i]));
        if (index == threadIdx.x % WARP * LANE_VALUES + (uint32_t)i)
            value = wire_canonical(value + spike);
        sum[i] = scale_code == S8X_MARKED ? wire_nan() : value;
    }
}

// sum [LANE_VALUES] += what the group is worth. From zeros: exactly what it decodes to.
template <enum wire WIRE> __device__ __forceinline__ void wire_add(float *sum, struct wire_lane code)
{
    if (WIRE == WIRE_FP8) {
        wire_add_fp8(sum, code);
    } else if (WIRE == WIRE_S8X) {
        wire_add_s8x(sum, code);
    } else {
        for (int i = 0; i < LANE_VALUES; i++) {
            float value = WIRE == WIRE_F32 ? f32_from_bits(code.word[i])
                                           : bf16_to_f32((uint16_t)(code.word[i / 2] >> 16 * (i % 2)));
            sum[i] = wire_canonical(sum[i] + value);
        }
    }
}

template <enum wire WIRE> __device__ __forceinline__ void wire_decode(float *x, struct wire_lane code)
{
    for (int i = 0; i < LANE_VALUES; i++)
        x[i] = 0;
    wire_add<WIRE>(x, code);
}

// ---- error feedback ----------------------------------------------------------------------------------------------------

// x [LANE_VALUES] + lost is coded; x becomes what it decodes to and lost, bf16, what that differs by.
template <enum wire WIRE> __device__ __forceinline__ struct wire_lane wire_feed(float *x, uint16_t *lost)
{
    float t[LANE_VALUES];
    for (int i = 0; i < LANE_VALUES;
         i++) // a sum with a NaN is that NaN, made quiet, as on the CPU; what was lost is a number
        t[i] = x[i] != x[i] ? f32_from_bits(f32_bits(x[i]) | 0x00400000u) : x[i] + bf16_to_f32(lost[i]);
    struct wire_lane code = wire_encode<WIRE>(t);
    wire_decode<WIRE>(x, code);
    for (int i = 0; i < LANE_VALUES; i++) {
        uint16_t difference = f32_to_bf16(t[i] - x[i]);
        lost[i] = (difference & 0x7f80) == 0x7f80 ? 0 : difference;
    }
    return code;
}

// ---- rows --------------------------------------------------------------------------------------------------------------

// The lane's values of a group of `count` <= WIRE_GROUP values; zeros behind them. aligned: the group begins at 16 bytes (bf16: 8)
// and its count is a multiple of 4.
__device__ __forceinline__ void wire_read(float *x, const float *group, int count, bool aligned)
{
    int first = (int)(threadIdx.x % WARP) * LANE_VALUES;
    if (aligned) {
        float4 four = first < count ? *(const float4 *)(const void *)(group + first) : make_float4(0, 0, 0, 0);
        x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
    } else {
        for (int i = 0; i < LANE_VALUES; i++)
            x[i] = first + i < count ? group[first + i] : 0;
    }
}
__device__ __forceinline__ void wire_write(float *group, const float *x, int count, bool aligned)
{
    int first = (int)(threadIdx.x % WARP) * LANE_VALUES;
    if (aligned && first < count)
        *(float4 *)(void *)(group + first) = make_float4(x[0], x[1], x[2], x[3]);
    for (int i = 0; i < LANE_VALUES && !aligned; i++)
        if (first + i < count)
            group[first + i] = x[i];
}

__device__ __forceinline__ void wire_read_lost(uint16_t *lost, const uint16_t *group, int count, bool aligned)
{
    int first = (int)(threadIdx.x % WARP) * LANE_VALUES;
    if (aligned) {
        uint2 four = first < count ? *(const uint2 *)(const void *)(group + first) : make_uint2(0, 0);
        lost[0] = (uint16_t)four.x, lost[1] = (uint16_t)(four.x >> 16);
        lost[2] = (uint16_t)four.y, lost[3] = (uint16_t)(four.y >> 16);
    } else {
        for (int i = 0; i < LANE_VALUES; i++)
            lost[i] = first + i < count ? group[first + i] : 0;
    }
}
__device__ __forceinline__ void wire_write_lost(uint16_t *group, const uint16_t *lost, int count, bool aligned)
{
    int first = (int)(threadIdx.x % WARP) * LANE_VALUES;
    if (aligned && first < count)
        *(uint2 *)(void *)(group + first) =
            make_uint2(lost[0] | (uint32_t)lost[1] << 16, lost[2] | (uint32_t)lost[3] << 16);
    for (int i = 0; i < LANE_VALUES && !aligned; i++)
        if (first + i < count)
            group[first + i] = lost[i];
}

} // namespace

#endif
