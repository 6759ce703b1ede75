// The operations over rows between matrix products: embed, norm, prepare, activate, finish_qkv. Declared in launch.h.
//
// Owns the formats in which a matrix product finds its input (enum input_format), written by one kernel template for the three operations
// that end in it: a warp takes a group of 128 columns, a lane the four columns that stand side by side in memory in that format.
// Values are computed once and kept in shared memory as far as it reaches; what lies behind is computed again.
//
// The same bits as the CPU's table: embed, prepare, activate (its exp is plain arithmetic, written here for one lane), the bias and
// the int8 formats of whatever they are given. Sums of squares have another order than the CPU's 16 lanes, whose chain of cols / 16
// additions would be most of a small norm's time: a thread's columns in ascending order, then its warp by halves, then the warps
// in ascending order in double. Relative error of the sum at most (4 * groups / warps + 6) * 2^-24; the CPU's: (cols / 16) * 2^-24.
#include "formats/number_formats.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/primitives.cuh"

enum {
    WARP = 32,
    MAX_WARPS = 16,                               // of a block
    KEPT_GROUPS = 64,                             // 8192 columns in 32 KiB
    HEAD_WARPS = 8,                               // of a block of finish_qkv
    HEAD_PAIRS = KERNELS_MAX_HEAD_DIM / 2 / WARP, // that a lane holds
    FEW_ROWS = 16,                                // up to here finish_qkv spreads the heads of a row over blocks
};

static int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t rounded_up_quotient(int64_t a, int64_t b) { return (a + b - 1) / b; }
static bool on_16_bytes(const void *p) { return (uintptr_t)p % 16 == 0; }

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

// ---- four columns of a lane ----------------------------------------------------------------------------------------

__device__ constexpr bool is_tiled(enum input_format format)
{
    return format == INPUT_F16_TILE || format == INPUT_INT8_TILE;
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

enum row_source { SOURCE_PLAIN, SOURCE_NORM, SOURCE_SILU };

struct row_input {
    const float *x; // plain: the rows; silu: gate_up
    int64_t x_stride, cols;
    float *residual; // norm, as are the following
    const float *partial, *weight;
    const float *bias; // norm and silu
    const int32_t *row_index;
    float eps;
    bool aligned;
};

// exp16 of kernels/vector_ops.h for one lane, the same bits.
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

__device__ __forceinline__ float silu_mul(float gate, float up) { return gate / (exp_as_cpu(-gate) + 1.0f) * up; }

// The row before normalisation. written: the sum already stands in residual, put there by this very thread.
template <bool TILED>
__device__ __forceinline__ float4 summed_four(const struct row_input &in, int64_t row, int64_t begin, bool written)
{
    float4 x = read_four<TILED>(in.residual + row * in.cols, begin, in.cols, in.aligned);
    if (written || (!in.partial && !in.bias))
        return x;
    float4 sum = in.bias ? read_four<TILED>(in.bias, begin, in.cols, in.aligned) : make_float4(0, 0, 0, 0);
    if (in.partial) {
        float4 partial = read_four<TILED>(in.partial + row * in.cols, begin, in.cols, in.aligned);
        sum = in.bias ? add_four(partial, sum) : partial;
    }
    return add_four(x, sum);
}

template <bool TILED>
__device__ __forceinline__ float4 silu_four(const struct row_input &in, int64_t row, int64_t begin)
{
    const float *x = in.x + row * in.x_stride;
    float4 gate = read_four<TILED>(x, begin, in.cols, in.aligned);
    float4 up = read_four<TILED>(x + in.cols, begin, in.cols, in.aligned);
    if (in.bias) {
        gate = add_four(gate, read_four<TILED>(in.bias, begin, in.cols, in.aligned));
        up = add_four(up, read_four<TILED>(in.bias + in.cols, begin, in.cols, in.aligned));
    }
    return make_float4(silu_mul(gate.x, up.x), silu_mul(gate.y, up.y), silu_mul(gate.z, up.z), silu_mul(gate.w, up.w));
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
    else
        store_global((uint32_t *)out + lane, four_bytes(to_e4m3(x.x, factor), to_e4m3(x.y, factor),
                                                        to_e4m3(x.z, factor), to_e4m3(x.w, factor)));
}

// One block per row. kept: dynamic shared memory for kept_groups groups; a lane reads there only what it wrote itself.
template <enum row_source SOURCE, enum input_format FORMAT>
__global__ void __launch_bounds__(MAX_WARPS *WARP)
    write_row(struct device_input out, struct row_input in, int64_t kept_groups)
{
    constexpr bool TILED = is_tiled(FORMAT);
    constexpr bool GROUP_SCALE = FORMAT == INPUT_INT8 || FORMAT == INPUT_INT8_TILE;
    constexpr bool ROW_SCALE = !GROUP_SCALE && FORMAT != INPUT_BF16;
    constexpr int VALUE_BYTES = GROUP_SCALE || FORMAT == INPUT_E4M3 ? 1 : 2;
    SHARED_DYNAMIC(float4, kept);
    SHARED(float, warp_squares, MAX_WARPS);
    SHARED(float, row_inverse, 1);
    SHARED(uint32_t, warp_largest, MAX_WARPS);
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    int64_t row = blockIdx.x, groups = (in.cols + ACT_GROUP - 1) / ACT_GROUP;
    int64_t source_row = SOURCE == SOURCE_NORM && in.row_index ? in.row_index[row] : row;
    bool write_back = SOURCE == SOURCE_NORM && in.partial && !in.row_index;
    float inverse = 1.0f;

    if (SOURCE == SOURCE_NORM) {
        float squares = 0;
        for (int64_t group = warp; group < groups; group += warps) {
            float4 x = summed_four<TILED>(in, source_row, group * ACT_GROUP, false);
            if (write_back)
                write_four<TILED>(in.residual + row * in.cols, group * ACT_GROUP, in.cols, in.aligned, x);
            if (group < kept_groups)
                kept[group * WARP + lane] = x;
            squares += x.x * x.x;
            squares += x.y * x.y;
            squares += x.z * x.z;
            squares += x.w * x.w;
        }
        squares = warp_sum(squares);
        if (lane == 0)
            warp_squares[warp] = squares;
        __syncthreads();
        if (threadIdx.x == 0) { // one thread: GeForce chips have few units for doubles
            double sum = 0;
            for (int i = 0; i < warps; i++)
                sum += (double)warp_squares[i];
            row_inverse[0] = (float)(1.0 / sqrt(sum / (double)in.cols + (double)in.eps));
        }
        __syncthreads();
        inverse = row_inverse[0];
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
                x = summed_four<TILED>(in, source_row, begin, write_back);
            else if (SOURCE == SOURCE_SILU)
                x = silu_four<TILED>(in, row, begin);
            else
                x = read_four<TILED>(in.x + row * in.x_stride, begin, in.cols, in.aligned);
            if (SOURCE == SOURCE_NORM && !(is_kept && ROW_SCALE && pass == 1)) {
                float4 weight = read_four<TILED>(in.weight, begin, in.cols, in.aligned);
                x = make_float4(x.x * inverse * weight.x, x.y * inverse * weight.y, x.z * inverse * weight.z,
                                x.w * inverse * weight.w);
            }
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

template <enum row_source SOURCE>
static cudaError_t launch_rows(struct device_input out, enum input_format format, struct row_input in, int64_t rows,
                               cudaStream_t stream)
{
    if (rows == 0)
        return cudaSuccess;
    in.aligned = in.cols % 4 == 0 && in.x_stride % 4 == 0 && on_16_bytes(in.x) && on_16_bytes(in.residual) &&
                 on_16_bytes(in.partial) && on_16_bytes(in.weight) && on_16_bytes(in.bias);
    // All of this follows from the number of columns alone.
    int64_t groups = rounded_up_quotient(in.cols, ACT_GROUP);
    unsigned warps = groups > 0 ? (unsigned)at_most(groups, MAX_WARPS) : 1;
    int64_t kept = at_most(groups, KEPT_GROUPS);
    unsigned bytes = (unsigned)(kept * WARP * (int64_t)sizeof(float4));
    dim3 grid((unsigned)rows), block(warps * WARP);
    switch (format) {
    case INPUT_F16:
        return LAUNCH((write_row<SOURCE, INPUT_F16>), grid, block, bytes, stream, out, in, kept);
    case INPUT_F16_TILE:
        return LAUNCH((write_row<SOURCE, INPUT_F16_TILE>), grid, block, bytes, stream, out, in, kept);
    case INPUT_BF16:
        return LAUNCH((write_row<SOURCE, INPUT_BF16>), grid, block, bytes, stream, out, in, kept);
    case INPUT_INT8:
        return LAUNCH((write_row<SOURCE, INPUT_INT8>), grid, block, bytes, stream, out, in, kept);
    case INPUT_INT8_TILE:
        return LAUNCH((write_row<SOURCE, INPUT_INT8_TILE>), grid, block, bytes, stream, out, in, kept);
    case INPUT_E4M3:
        return LAUNCH((write_row<SOURCE, INPUT_E4M3>), grid, block, bytes, stream, out, in, kept);
    }
    return cudaErrorInvalidValue;
}

extern "C" cudaError_t launch_norm(struct device_input out, enum input_format format, float *residual,
                                   const float *partial, const float *bias, const float *weight,
                                   const int32_t *row_index, int64_t rows, int64_t cols, float eps, cudaStream_t stream)
{
    struct row_input in = {};
    in.residual = residual;
    in.partial = partial;
    in.bias = bias;
    in.weight = weight;
    in.row_index = row_index;
    in.cols = cols;
    in.eps = eps;
    return launch_rows<SOURCE_NORM>(out, format, in, rows, stream);
}

extern "C" cudaError_t launch_prepare(struct device_input out, enum input_format format, const float *x,
                                      int64_t x_stride, int64_t rows, int64_t cols, cudaStream_t stream)
{
    struct row_input in = {};
    in.x = x;
    in.x_stride = x_stride;
    in.cols = cols;
    return launch_rows<SOURCE_PLAIN>(out, format, in, rows, stream);
}

extern "C" cudaError_t launch_activate(struct device_input out, enum input_format format, const float *gate_up,
                                       const float *bias, int64_t rows, int64_t cols, cudaStream_t stream)
{
    struct row_input in = {};
    in.x = gate_up;
    in.x_stride = 2 * cols;
    in.bias = bias;
    in.cols = cols;
    return launch_rows<SOURCE_SILU>(out, format, in, rows, stream);
}

// ---- embed ---------------------------------------------------------------------------------------------------------

// weight_int4_offset of formats/weight.h.
__device__ __forceinline__ float int4_value(const struct matrix &table, int64_t row, int64_t col)
{
    int64_t cols_padded = (int64_t)table.shape.cols_padded, group_size = table.shape.group_size;
    int64_t tile = (row / 64 * (cols_padded / 64) + col / 64) * 4 + row % 64 / 16;
    int r = (int)(row % 16), c = (int)(col % 64), in_word = c % 16;
    int t = in_word % 8 / 2, j = in_word % 2 * 2 + in_word / 8;
    uint8_t byte = ((const uint8_t *)table.data)[tile * WEIGHT_TILE_BYTES + (r % 8 * 4 + t) * 16 + c / 16 * 4 + j];
    uint16_t scale =
        ((const uint16_t *)table.scale)[(row / 16 * (cols_padded / group_size) + col / group_size) * 16 + r];
    return (float)int4_sign_extend(r >= 8 ? nibble_high(byte) : byte) * f16_to_f32(scale) * 0x1p-8f;
}

// Four columns of one row. All kinds but f32 have rows of a multiple of 64 columns, zeros behind the last.
__device__ __forceinline__ float4 table_four(const struct matrix &table, int64_t row, int64_t col, int64_t cols,
                                             bool aligned)
{
    int64_t at = row * (int64_t)table.shape.cols_padded + col;
    if (table.shape.kind == WEIGHT_F32) {
        const float *x = (const float *)table.data + at;
        if (aligned)
            return *(const float4 *)x;
        return make_float4(x[0], col + 1 < cols ? x[1] : 0, col + 2 < cols ? x[2] : 0, col + 3 < cols ? x[3] : 0);
    }
    if (table.shape.kind == WEIGHT_BF16) {
        uint2 x = load_global((const uint2 *)((const uint16_t *)table.data + at));
        return make_float4(f32_from_bits(x.x << 16), f32_from_bits(x.x & 0xffff0000), f32_from_bits(x.y << 16),
                           f32_from_bits(x.y & 0xffff0000));
    }
    if (table.shape.kind == WEIGHT_INT4)
        return make_float4(int4_value(table, row, col), int4_value(table, row, col + 1),
                           int4_value(table, row, col + 2), int4_value(table, row, col + 3));
    uint32_t q = load_global((const uint32_t *)((const uint8_t *)table.data + at));
    float scale = ((const float *)table.scale)[row];
    if (table.shape.kind == WEIGHT_INT8)
        return make_float4((float)(int8_t)q * scale, (float)(int8_t)(q >> 8) * scale, (float)(int8_t)(q >> 16) * scale,
                           (float)(int8_t)(q >> 24) * scale);
    return make_float4(e4m3_to_f32((uint8_t)q) * scale, e4m3_to_f32((uint8_t)(q >> 8)) * scale,
                       e4m3_to_f32((uint8_t)(q >> 16)) * scale, e4m3_to_f32((uint8_t)(q >> 24)) * scale);
}

// A sum of ranks has no -0: the zero makes it +0 here too.
__device__ __forceinline__ float embedded(float x) { return bf16_to_f32(f32_to_bf16(x)) + 0.0f; }

__global__ void embed_row(float *residual, struct matrix table, const uint32_t *tokens, int64_t vocab_begin,
                          bool aligned)
{
    int64_t cols = (int64_t)table.shape.cols, local = (int64_t)tokens[blockIdx.x] - vocab_begin;
    bool here = local >= 0 && local < (int64_t)table.shape.rows;
    float *out = residual + (int64_t)blockIdx.x * cols;
    for (int64_t col = 4 * (int64_t)threadIdx.x; col < cols; col += 4 * (int64_t)blockDim.x) {
        float4 x = make_float4(0, 0, 0, 0);
        if (here) {
            x = table_four(table, local, col, cols, aligned);
            x = make_float4(embedded(x.x), embedded(x.y), embedded(x.z), embedded(x.w));
        }
        if (aligned) {
            *(float4 *)(out + col) = x;
            continue;
        }
        const float value[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (col + i < cols)
                out[col + i] = value[i];
    }
}

extern "C" cudaError_t launch_embed(float *residual, const struct matrix *table, const uint32_t *tokens, int64_t rows,
                                    int64_t vocab_begin, cudaStream_t stream)
{
    int64_t cols = (int64_t)table->shape.cols;
    if (rows == 0 || cols == 0)
        return cudaSuccess;
    bool aligned = cols % 4 == 0 && on_16_bytes(residual) && on_16_bytes(table->data);
    unsigned threads = (unsigned)at_most(rounded_up_quotient(cols, 4 * WARP), MAX_WARPS) * WARP;
    return LAUNCH(embed_row, dim3((unsigned)rows), dim3(threads), 0, stream, residual, *table, tokens, vocab_begin,
                  aligned);
}

// ---- finish_qkv ----------------------------------------------------------------------------------------------------

struct qkv_input {
    float *qkv;
    const float *bias, *q_norm, *k_norm, *inv_freq;
    float eps, rope_factor;
    struct device_rows rows;
    struct device_kv kv;
    int64_t num_heads;
};

__device__ __forceinline__ void store_kv(const struct device_kv &kv, void *cache, int64_t at, float x)
{
    if (kv.format == KV_E4M3)
        ((uint8_t *)cache)[at] = f32_to_e4m3(x);
    else
        ((uint16_t *)cache)[at] = f32_to_bf16(x);
}

// One warp per head; a lane holds the pairs lane, lane + 32, ... of the rotation. blockIdx.x is the row, blockIdx.y a part of its heads.
__global__ void __launch_bounds__(HEAD_WARPS *WARP) finish_heads(struct qkv_input in)
{
    int lane = threadIdx.x % WARP, head_dim = (int)in.kv.head_dim, half = head_dim / 2;
    int64_t row = blockIdx.x, position = in.rows.position[row], sequence = in.rows.sequence[row];
    int64_t kv_heads = in.kv.num_kv_heads, heads = in.num_heads + 2 * kv_heads;
    int64_t page = in.kv.pages[sequence * in.kv.pages_per_sequence + position / KV_PAGE_TOKENS];

    float cosine[HEAD_PAIRS], sine[HEAD_PAIRS];
#pragma unroll
    for (int i = 0; i < HEAD_PAIRS; i++) {
        int pair = lane + i * WARP;
        float angle = pair < half ? (float)position * in.inv_freq[pair] : 0.0f;
        cosine[i] = cosf(angle) * in.rope_factor;
        sine[i] = sinf(angle) * in.rope_factor;
    }

    for (int64_t head = (int64_t)blockIdx.y * HEAD_WARPS + threadIdx.x / WARP; head < heads;
         head += (int64_t)gridDim.y * HEAD_WARPS) {
        bool is_q = head < in.num_heads, is_v = head >= in.num_heads + kv_heads;
        float *x = in.qkv + (row * heads + head) * head_dim;
        float a[HEAD_PAIRS], b[HEAD_PAIRS], squares = 0;
#pragma unroll
        for (int i = 0; i < HEAD_PAIRS; i++) {
            int pair = lane + i * WARP;
            a[i] = pair < half ? x[pair] : 0.0f;
            b[i] = pair < half ? x[pair + half] : 0.0f;
            if (in.bias && pair < half) {
                a[i] += in.bias[head * head_dim + pair];
                b[i] += in.bias[head * head_dim + pair + half];
            }
            squares += a[i] * a[i];
            squares += b[i] * b[i];
        }
        const float *norm = is_v ? NULL : is_q ? in.q_norm : in.k_norm;
        float inverse = norm ? 1.0f / sqrtf(warp_sum(squares) / (float)head_dim + in.eps) : 1.0f;

        int64_t kv_head = is_v ? head - in.num_heads - kv_heads : head - in.num_heads;
        int64_t slot = ((page * kv_heads + kv_head) * KV_PAGE_TOKENS + position % KV_PAGE_TOKENS) * head_dim;
#pragma unroll
        for (int i = 0; i < HEAD_PAIRS; i++) {
            int pair = lane + i * WARP;
            if (pair >= half)
                continue;
            if (norm) {
                a[i] = a[i] * inverse * norm[pair];
                b[i] = b[i] * inverse * norm[pair + half];
            }
            float first = is_v ? a[i] : a[i] * cosine[i] - b[i] * sine[i];
            float second = is_v ? b[i] : b[i] * cosine[i] + a[i] * sine[i];
            if (is_q) {
                x[pair] = first;
                x[pair + half] = second;
            } else {
                store_kv(in.kv, is_v ? in.kv.v : in.kv.k, slot + pair, first);
                store_kv(in.kv, is_v ? in.kv.v : in.kv.k, slot + pair + half, second);
            }
        }
    }
}

extern "C" cudaError_t launch_finish_qkv(float *qkv, const float *bias, const float *q_norm, const float *k_norm,
                                         float eps, const float *inv_freq, float rope_factor, struct device_rows rows,
                                         struct device_kv kv, int64_t num_heads, cudaStream_t stream)
{
    int64_t heads = num_heads + 2 * kv.num_kv_heads;
    if (rows.count == 0 || heads == 0)
        return cudaSuccess;
    struct qkv_input in = {qkv, bias, q_norm, k_norm, inv_freq, eps, rope_factor, rows, kv, num_heads};
    unsigned parts = rows.count <= FEW_ROWS ? (unsigned)rounded_up_quotient(heads, HEAD_WARPS) : 1;
    return LAUNCH(finish_heads, dim3((unsigned)rows.count, parts), dim3(HEAD_WARPS * WARP), 0, stream, in);
}
