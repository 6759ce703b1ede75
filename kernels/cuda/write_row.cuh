// Writing rows in the formats in which a matrix product finds its input: what rows.cu's kernels do for one row, and what a norm behind an
// exchange (exchange.cu) does as well, with the same bits. See rows.cu.
#ifndef TPSHARD_KERNELS_CUDA_WRITE_ROW_CUH
#define TPSHARD_KERNELS_CUDA_WRITE_ROW_CUH

#include "kernels/cuda/rows.cuh"

namespace
{

enum { KEPT_GROUPS = 64 }; // 8192 columns in 32 KiB

// ---- four columns of a lane ----------------------------------------------------------------------------------------

__device__ constexpr bool is_tiled(enum input_format format)
{
    return format == INPUT_F16_TILE || format == INPUT_INT8_TILE || format == INPUT_MXFP8_TILE;
}

// A lane's four columns are two pairs of neighbours; in the tiled formats a pair and the one 8 columns on.
template <bool TILED> __device__ __forceinline__ int64_t pair_column(int pair)
{
    int lane = threadIdx.x % WARP;
    return TILED ? lane / 16 * 64 + lane % 4 * 16 + lane % 16 / 4 * 2 + pair * 8 : lane * 4 + pair * 2;
}

// The lane's columns of the group that begins at `begin`, zeros from cols on. aligned: cols and all strides are multiples of 4 and the
// pointers of 16 bytes; then a pair lies wholly inside or outside.
template <bool TILED>
__device__ __forceinline__ float4 read_four(const float *row, int64_t begin, int64_t cols, bool aligned)
{
    int64_t a = begin + pair_column<TILED>(0), b = begin + pair_column<TILED>(1);
    if (aligned && !TILED)
        return a < cols ? *(const float4 *)(row + a) : make_float4(0, 0, 0, 0);
    if (aligned) {
        float2 low = a < cols ? *(const float2 *)(row + a) : make_float2(0, 0);
        float2 high = b < cols ? *(const float2 *)(row + b) : make_float2(0, 0);
        return make_float4(low.x, low.y, high.x, high.y);
    }
    return make_float4(a < cols ? row[a] : 0, a + 1 < cols ? row[a + 1] : 0, b < cols ? row[b] : 0,
                       b + 1 < cols ? row[b + 1] : 0);
}

template <bool TILED>
__device__ __forceinline__ void write_four(float *row, int64_t begin, int64_t cols, bool aligned, float4 x)
{
    int64_t a = begin + pair_column<TILED>(0), b = begin + pair_column<TILED>(1);
    if (aligned && !TILED) {
        if (a < cols)
            *(float4 *)(row + a) = x;
    } else if (aligned) {
        if (a < cols)
            *(float2 *)(row + a) = make_float2(x.x, x.y);
        if (b < cols)
            *(float2 *)(row + b) = make_float2(x.z, x.w);
    } else {
        if (a < cols)
            row[a] = x.x;
        if (a + 1 < cols)
            row[a + 1] = x.y;
        if (b < cols)
            row[b] = x.z;
        if (b + 1 < cols)
            row[b + 1] = x.w;
    }
}

__device__ __forceinline__ float4 add_four(float4 a, float4 b)
{
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// ---- what a row's values are ---------------------------------------------------------------------------------------

enum row_source { SOURCE_PLAIN, SOURCE_NORM, SOURCE_ACTIVATE };

struct row_input {
    const float *x; // plain: the rows; activate: gate_up
    int64_t x_stride, cols;
    const float *order; // plain: column i is column order[i] of x; NULL: i
    float *residual;    // norm, as are the following
    int64_t row_stride; // of residual and partial
    struct device_join join;
    const float *weight;
    const int32_t *row_index;
    float eps;
    enum activation activation; // activate, as are the following
    int rotation;               // columns of a block that is rotated by a Hadamard matrix; 0: none
    float rotation_factor;      // 1 / sqrt(rotation)
    const float *bias;
    const int32_t *chosen; // of each row, its expert, whose bias is meant; NULL: bias
    const struct device_expert *experts;
    bool aligned;
};

template <bool TILED>
__device__ __forceinline__ float4 plain_four(const struct row_input &in, int64_t row, int64_t begin)
{
    const float *x = in.x + row * in.x_stride;
    if (!in.order)
        return read_four<TILED>(x, begin, in.cols, in.aligned);
    int64_t a = begin + pair_column<TILED>(0), b = begin + pair_column<TILED>(1);
    return make_float4(a < in.cols ? x[(int64_t)in.order[a]] : 0, a + 1 < in.cols ? x[(int64_t)in.order[a + 1]] : 0,
                       b < in.cols ? x[(int64_t)in.order[b]] : 0, b + 1 < in.cols ? x[(int64_t)in.order[b + 1]] : 0);
}

// What a block put out, before its own norm.
template <bool TILED>
__device__ __forceinline__ float4 joining_four(const struct row_input &in, int64_t row, int64_t begin)
{
    float4 x = read_four<TILED>(in.join.partial + row * in.row_stride, begin, in.cols, in.aligned);
    return in.join.bias ? add_four(x, read_four<TILED>(in.join.bias, begin, in.cols, in.aligned)) : x;
}

__device__ __forceinline__ float4 scale_four(float4 x, float factor)
{
    return make_float4(x.x * factor, x.y * factor, x.z * factor, x.w * factor);
}

__device__ __forceinline__ float4 multiply_four(float4 a, float4 b)
{
    return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w);
}

// The row before normalisation. join_inverse: of the block's own norm. written: the sum already stands in residual, put there by this
// very thread.
template <bool TILED>
__device__ __forceinline__ float4 summed_four(const struct row_input &in, int64_t row, int64_t begin,
                                              float join_inverse, bool written)
{
    float4 x = read_four<TILED>(in.residual + row * in.row_stride, begin, in.cols, in.aligned);
    if (written || !in.join.partial)
        return x;
    float4 sum = joining_four<TILED>(in, row, begin);
    if (in.join.norm)
        sum = multiply_four(scale_four(sum, join_inverse), read_four<TILED>(in.join.norm, begin, in.cols, in.aligned));
    return add_four(x, scale_four(sum, in.join.scale));
}

template <bool TILED>
__device__ __forceinline__ float4 activated_four(const struct row_input &in, int64_t row, int64_t begin)
{
    const float *x = in.x + row * in.x_stride;
    float4 gate = read_four<TILED>(x, begin, in.cols, in.aligned);
    float4 up = read_four<TILED>(x + in.cols, begin, in.cols, in.aligned);
    if (in.bias) {
        gate = add_four(gate, read_four<TILED>(in.bias, begin, in.cols, in.aligned));
        up = add_four(up, read_four<TILED>(in.bias + in.cols, begin, in.cols, in.aligned));
    }
    return make_float4(activation_as_cpu(in.activation, gate.x, up.x), activation_as_cpu(in.activation, gate.y, up.y),
                       activation_as_cpu(in.activation, gate.z, up.z), activation_as_cpu(in.activation, gate.w, up.w));
}

// Sums and differences of a column and the one of the lane that differs in `mask`; the lane with the bit set holds the upper one.
__device__ __forceinline__ float4 hadamard_lanes(float4 x, int mask)
{
    float sign = threadIdx.x & mask ? -1.0f : 1.0f;
    return make_float4(
        __shfl_xor_sync(0xffffffffu, x.x, mask) + x.x * sign, __shfl_xor_sync(0xffffffffu, x.y, mask) + x.y * sign,
        __shfl_xor_sync(0xffffffffu, x.z, mask) + x.z * sign, __shfl_xor_sync(0xffffffffu, x.w, mask) + x.w * sign);
}

// layer_ops_hadamard of kernels/layer_ops.h over the blocks of a warp's 128 columns: the same steps in the same order. All lanes take part.
template <bool TILED> __device__ __forceinline__ float4 hadamard_four(float4 x, int block, float factor)
{
    if (block >= 2)
        x = make_float4(x.x + x.y, x.x - x.y, x.z + x.w, x.z - x.w);
    if (TILED) { // columns 1 | 2 4 | 8 | 16 32 | 64 apart: x y | lanes 4 8 | x z | lanes 1 2 | lane 16
        for (int step = 2; step < 8 && step < block; step *= 2)
            x = hadamard_lanes(x, step * 2);
        if (block >= 16)
            x = make_float4(x.x + x.z, x.y + x.w, x.x - x.z, x.y - x.w);
        for (int step = 16; step < 64 && step < block; step *= 2)
            x = hadamard_lanes(x, step / 16);
        if (block >= 128)
            x = hadamard_lanes(x, 16);
    } else {
        if (block >= 4)
            x = make_float4(x.x + x.z, x.y + x.w, x.x - x.z, x.y - x.w);
        for (int step = 4; step < block; step *= 2)
            x = hadamard_lanes(x, step / 4);
    }
    return scale_four(x, factor);
}

// ---- writing a format ----------------------------------------------------------------------------------------------

// Magnitudes are compared as integers: NaN and Inf come out largest.
__device__ __forceinline__ uint32_t largest_magnitude(float4 x)
{
    return max(max(f32_bits(x.x) & 0x7fffffff, f32_bits(x.y) & 0x7fffffff),
               max(f32_bits(x.z) & 0x7fffffff, f32_bits(x.w) & 0x7fffffff));
}

// Scale of a group or row whose largest magnitude becomes `limit`, and the factor that takes values there. As quantize_group of
// kernels/vector_ops.h: below 2^-100 counts as zero; NaN and Inf give a NaN scale and zeros.
__device__ __forceinline__ float scale_to(float limit, uint32_t largest, float *scale)
{
    bool finite = largest < 0x7f800000;
    if (!finite || largest < 0x0d800000) {
        *scale = finite ? 0.0f : f32_from_bits(0x7fc00000);
        return 0.0f;
    }
    *scale = f32_from_bits(largest) / limit;
    return limit / f32_from_bits(largest);
}

// The smallest power of two that brings the row's largest magnitude to 32768 or below, at least 1. A row with NaN or Inf keeps 1: it holds
// them itself.
__device__ __forceinline__ float f16_scale(uint32_t largest)
{
    if (largest <= 0x47000000 || largest >= 0x7f800000)
        return 1.0f;
    return f32_from_bits(((largest + 0x7fffff) & 0x7f800000) - (15u << 23));
}

// The e8m0 of 32 columns with this largest magnitude, and the factor, a power of two, that takes values to e4m3. Below 2^-100 counts as zero.
__device__ __forceinline__ float e8m0_scale(uint32_t largest, uint32_t *scale)
{
    if (largest >= 0x7f800000) {
        *scale = 255;
        return f32_from_bits(0x7fc00000);
    }
    // 448 = 1.75 * 2^8
    uint32_t exponent = (largest >> 23) - 8 + ((largest & 0x7fffff) > 0x600000);
    *scale = largest < 0x0d800000 ? 127 : exponent;
    return largest < 0x0d800000 ? 0.0f : f32_from_bits((254 - exponent) << 23);
}

__device__ __forceinline__ uint32_t four_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d)
{
    return (a & 255) | (b & 255) << 8 | (c & 255) << 16 | d << 24;
}

// A zero factor stands for zeros; NaN and Inf times 0 are a NaN, which int8 already takes for 0.
__device__ __forceinline__ uint32_t to_int8(float x, float factor)
{
    return (uint32_t)(int32_t)f32_to_int8(x * factor);
}
__device__ __forceinline__ uint32_t to_e4m3(float x, float factor)
{
    return factor == 0.0f ? 0 : (uint32_t)f32_to_e4m3(x * factor);
}

// Writes the lane's four values, each times `factor`, at their place in the group that begins at out.
template <enum input_format FORMAT> __device__ __forceinline__ void write_values(void *out, float4 x, float factor)
{
    int lane = threadIdx.x % WARP;
    if (FORMAT == INPUT_F16 || FORMAT == INPUT_F16_TILE)
        store_global((uint2 *)out + lane, make_uint2(floats_to_half2(x.x * factor, x.y * factor),
                                                     floats_to_half2(x.z * factor, x.w * factor)));
    else if (FORMAT == INPUT_BF16)
        store_global((uint2 *)out + lane, make_uint2((uint32_t)f32_to_bf16(x.x) | (uint32_t)f32_to_bf16(x.y) << 16,
                                                     (uint32_t)f32_to_bf16(x.z) | (uint32_t)f32_to_bf16(x.w) << 16));
    else if (FORMAT == INPUT_INT8)
        store_global((uint32_t *)out + lane, four_bytes(to_int8(x.x, factor), to_int8(x.y, factor),
                                                        to_int8(x.z, factor), to_int8(x.w, factor)));
    else if (FORMAT == INPUT_INT8_TILE)
        store_global((uint32_t *)out + lane, four_bytes(to_int8(x.x, factor), to_int8(x.z, factor),
                                                        to_int8(x.y, factor), to_int8(x.w, factor)));
    else if (FORMAT == INPUT_MXFP8_TILE)
        store_global((uint32_t *)out + lane, four_bytes(to_e4m3(x.x, factor), to_e4m3(x.z, factor),
                                                        to_e4m3(x.y, factor), to_e4m3(x.w, factor)));
    else
        store_global((uint32_t *)out + lane, four_bytes(to_e4m3(x.x, factor), to_e4m3(x.y, factor),
                                                        to_e4m3(x.z, factor), to_e4m3(x.w, factor)));
}

__device__ __forceinline__ float add_squares(float squares, float4 x)
{
    squares += x.x * x.x;
    squares += x.y * x.y;
    squares += x.z * x.z;
    return squares + x.w * x.w;
}

// 1 / sqrt(mean of squares + eps) of a row, for all threads.
__device__ __forceinline__ float row_inverse(float squares, const struct row_input &in, float *warps, float *inverse)
{
    double sum = block_sum(squares, warps);
    if (threadIdx.x == 0)
        *inverse = (float)(1.0 / sqrt(sum / (double)in.cols + (double)in.eps));
    __syncthreads();
    return *inverse;
}

// One row by one block. kept: dynamic shared memory for kept_groups groups; a lane reads there only what it wrote itself.
template <enum row_source SOURCE, enum input_format FORMAT>
__device__ __forceinline__ void write_one_row(struct device_input out, struct row_input in, int64_t kept_groups,
                                              int64_t row)
{
    constexpr bool TILED = is_tiled(FORMAT);
    constexpr bool GROUP_SCALE = FORMAT == INPUT_INT8 || FORMAT == INPUT_INT8_TILE;
    constexpr bool MX_SCALE = FORMAT == INPUT_MXFP8_TILE;
    constexpr bool ROW_SCALE = !GROUP_SCALE && !MX_SCALE && FORMAT != INPUT_BF16 && FORMAT != INPUT_F32;
    constexpr int VALUE_BYTES = GROUP_SCALE || MX_SCALE || FORMAT == INPUT_E4M3 ? 1 : 2;
    SHARED_DYNAMIC(float4, kept);
    SHARED(float, warp_squares, MAX_WARPS);
    SHARED(float, shared_inverse, 2);
    SHARED(uint32_t, warp_largest, MAX_WARPS);
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    int64_t groups = (in.cols + ACT_GROUP - 1) / ACT_GROUP;
    int64_t source_row = SOURCE == SOURCE_NORM && in.row_index ? in.row_index[row] : row;
    if (SOURCE == SOURCE_ACTIVATE && in.chosen) {
        if (in.chosen[row] < 0)
            return;
        in.bias = in.experts[in.chosen[row]].gate_up.bias;
    }
    bool write_back = SOURCE == SOURCE_NORM && in.join.partial && !in.row_index;
    float inverse = 1.0f, join_inverse = 1.0f;

    if (SOURCE == SOURCE_NORM) {
        float squares = 0;
        if (in.join.norm) {
            for (int64_t group = warp; group < groups; group += warps)
                squares = add_squares(squares, joining_four<TILED>(in, source_row, group * ACT_GROUP));
            join_inverse = row_inverse(squares, in, warp_squares, &shared_inverse[0]);
            squares = 0;
        }
        for (int64_t group = warp; group < groups; group += warps) {
            float4 x = summed_four<TILED>(in, source_row, group * ACT_GROUP, join_inverse, false);
            if (write_back)
                write_four<TILED>(in.residual + row * in.row_stride, group * ACT_GROUP, in.cols, in.aligned, x);
            if (group < kept_groups)
                kept[group * WARP + lane] = x;
            squares = add_squares(squares, x);
        }
        if (in.weight)
            inverse = row_inverse(squares, in, warp_squares, &shared_inverse[1]);
    }

    // The group's values: for a norm, from its x; once known for the whole row's scale, taken from where they are kept.
    uint32_t largest = 0;
    float factor = 1.0f;
    for (int pass = ROW_SCALE ? 0 : 1; pass < 2; pass++) {
        for (int64_t group = warp; group < groups; group += warps) {
            float4 x;
            int64_t begin = group * ACT_GROUP;
            bool is_kept = group < kept_groups;
            if (is_kept && (SOURCE == SOURCE_NORM || (ROW_SCALE && pass == 1)))
                x = kept[group * WARP + lane];
            else if (SOURCE == SOURCE_NORM)
                x = summed_four<TILED>(in, source_row, begin, join_inverse, write_back);
            else if (SOURCE == SOURCE_ACTIVATE)
                x = in.rotation
                        ? hadamard_four<TILED>(activated_four<TILED>(in, row, begin), in.rotation, in.rotation_factor)
                        : activated_four<TILED>(in, row, begin);
            else
                x = plain_four<TILED>(in, row, begin);
            if (SOURCE == SOURCE_NORM && in.weight && !(is_kept && ROW_SCALE && pass == 1))
                x = multiply_four(scale_four(x, inverse), read_four<TILED>(in.weight, begin, in.cols, in.aligned));
            if (pass == 0) {
                largest = max(largest, largest_magnitude(x));
                if (is_kept)
                    kept[group * WARP + lane] = x;
                continue;
            }
            if (GROUP_SCALE) {
                float scale;
                factor = scale_to(127.0f, warp_max(largest_magnitude(x)), &scale);
                if (lane == 0)
                    out.scale[row * (out.stride / ACT_GROUP) + group] = scale;
            }
            if (MX_SCALE) { // 32 columns are in the lanes that differ in these bits
                uint32_t most = largest_magnitude(x), scale;
                for (int mask = 8; mask; mask = mask == 4 ? 1 : mask / 2)
                    most = max(most, __shfl_xor_sync(0xffffffffu, most, mask));
                factor = e8m0_scale(most, &scale);
                if ((lane & 13) == 0)
                    ((uint8_t *)out.scale)[(row * out.stride + begin) / 32 + lane / 16 * 2 + lane % 4 / 2] =
                        (uint8_t)scale;
            }
            if (FORMAT == INPUT_F32) // its rows stand next to each other, without padding
                write_four<TILED>((float *)out.values + row * out.stride, begin, in.cols, in.aligned, x);
            else
                write_values<FORMAT>((char *)out.values + (row * out.stride + begin) * VALUE_BYTES, x, factor);
        }
        if (pass == 0) {
            largest = warp_max(largest);
            if (lane == 0)
                warp_largest[warp] = largest;
            __syncthreads();
            for (int i = 0; i < warps; i++)
                largest = max(largest, warp_largest[i]);
            float scale;
            if (FORMAT == INPUT_E4M3) {
                factor = scale_to(E4M3_MAX, largest, &scale);
            } else {
                scale = f16_scale(largest);
                factor = 1.0f / scale;
            }
            if (threadIdx.x == 0)
                out.scale[row] = scale;
        }
    }
}

// ---- launching -----------------------------------------------------------------------------------------------------

// How a row of so many columns is written; the number of columns alone decides.
struct row_launch {
    unsigned threads, shared_bytes;
    int64_t kept_groups;
};
inline struct row_launch row_launch_of(int64_t cols)
{
    int64_t groups = rounded_up_quotient(cols, ACT_GROUP), kept = at_most(groups, KEPT_GROUPS);
    unsigned warps = groups > 0 ? (unsigned)at_most(groups, MAX_WARPS) : 1;
    return {warps * WARP, (unsigned)(kept * WARP * (int64_t)sizeof(float4)), kept};
}

inline bool row_is_aligned(const struct device_input &out, const struct row_input &in)
{
    return in.cols % 4 == 0 && in.x_stride % 4 == 0 && in.row_stride % 4 == 0 && out.stride % 4 == 0 &&
           on_16_bytes(out.values) && on_16_bytes(in.x) && on_16_bytes(in.residual) && on_16_bytes(in.join.partial) &&
           on_16_bytes(in.join.bias) && on_16_bytes(in.join.norm) && on_16_bytes(in.weight) && on_16_bytes(in.bias);
}

} // namespace

#endif
