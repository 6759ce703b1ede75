// Slabs: rows of a quantized matrix as f16, bf16 or e4m3, row-major, for the library's matrix products; and the factors of rows and
// columns on what comes out of them.
//
// Memory bound, so every load and store is 8 or 16 bytes a lane and whole lines a warp. Values are exactly those of dequantize_row in
// kernels.h, rounded once to the slab's format.
#include "formats/number_formats.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/primitives.cuh"
#include "kernels/cuda/weights.cuh"

#include <math.h>

namespace
{

enum {
    THREADS = 256,
    WARPS = THREADS / 32,
    TILE_ROWS = 16,
    TILE_COLS = 64,
    RUN = 8,                    // columns that a lane writes side by side
    RUNS = TILE_COLS / RUN,     // of a tile's row
    ROWS_AT_ONCE = 32 / RUNS,   // and as many 8 rows below: a lane has both nibbles of its bytes
    TILE_UNITS = TILE_ROWS * 2, // 16 bytes of codes
};

__device__ inline float saturated_f16(float x)
{
    float limited = x > F16_MAX ? F16_MAX : x < -F16_MAX ? -F16_MAX : x;
    return fabsf(x) < INFINITY ? limited : x; // what is broken stays so
}

__device__ inline uint32_t pack_f16(float low, float high)
{
    return floats_to_half2(saturated_f16(low), saturated_f16(high));
}

// Eight values side by side, in the slab's format.
template <int FORMAT> __device__ inline void store_run(unsigned char *slab, int64_t index, const float (&v)[RUN])
{
    if (FORMAT == SLAB_E4M3) {
        uint2 out = make_uint2(floats_to_e4m3x2(v[0], v[1]) | floats_to_e4m3x2(v[2], v[3]) << 16,
                               floats_to_e4m3x2(v[4], v[5]) | floats_to_e4m3x2(v[6], v[7]) << 16);
        store_global<uint2>((uint2 *)(void *)(slab + index), out);
    } else {
        uint4 out = FORMAT == SLAB_F16 ? make_uint4(pack_f16(v[0], v[1]), pack_f16(v[2], v[3]), pack_f16(v[4], v[5]),
                                                    pack_f16(v[6], v[7]))
                                       : make_uint4(floats_to_bf162(v[0], v[1]), floats_to_bf162(v[2], v[3]),
                                                    floats_to_bf162(v[4], v[5]), floats_to_bf162(v[6], v[7]));
        store_global<uint4>((uint4 *)(void *)(slab + index * 2), out);
    }
}

// ---- four bits -------------------------------------------------------------------------------------------------------

// Rows [row_begin, row_end) of a matrix of T16x64 tiles.
struct tiled_part {
    struct matrix w;
    int64_t cols_padded, row_begin, row_end;
};

__device__ inline const uint4 *tile_of(const struct tiled_part &part, int64_t tile_row, int64_t tile_col)
{
    int64_t tile = (tile_row / 4 * (part.cols_padded / TILE_COLS) + tile_col) * 4 + tile_row % 4;
    return (const uint4 *)(const void *)((const unsigned char *)part.w.data + tile * WEIGHT_TILE_BYTES);
}

// The two's complement nibble at `shift` of a word; exact: 2^23 + 8 + q is a float.
__device__ inline float nibble(uint32_t word, int shift)
{
    return f32_from_bits(((word >> shift & 15) ^ 8) | 0x4b000000u) - 8388616.0f;
}

// The code of int4 or nl4 at `shift` of a word, in units of the scale.
template <int KIND> __device__ inline float code_of(uint32_t word, int shift)
{
    return KIND == WEIGHT_NL4 ? (float)weight_nl4_level((uint8_t)(word >> shift & 15)) : nibble(word, shift);
}

// Largest magnitude of each row of int4 or nl4 / 448. One block for 16 rows; a lane has the same two rows of every tile.
template <int KIND>
__global__ void __launch_bounds__(THREADS) row_scale_kernel(float *row_scale, struct tiled_part part)
{
    SHARED(float, largest, WARPS *TILE_ROWS);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = lane / 4;
    int64_t tile_row = part.row_begin / TILE_ROWS + blockIdx.x, first = tile_row * TILE_ROWS;
    float low = 0, high = 0; // rows `row` and `row` + 8
    for (int64_t tile_col = warp; tile_col < part.cols_padded / TILE_COLS; tile_col += WARPS) {
        uint4 codes = load_weights(tile_of(part, tile_row, tile_col) + lane);
        uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
        for (int pair = 0; pair < 2; pair++) { // 32 columns, of one group
            float low_code = 0, high_code = 0;
#pragma unroll
            for (int byte = 0; byte < 8; byte++) {
                uint32_t word = words[pair * 2 + byte / 4] >> byte % 4 * 8;
                low_code = fmaxf(low_code, fabsf(code_of<KIND>(word, 0)));
                high_code = fmaxf(high_code, fabsf(code_of<KIND>(word, 4)));
            }
            int64_t col = tile_col * TILE_COLS + pair * 32;
            low = fmaxf(low, low_code * fabsf(group_at((enum weight_kind)KIND, part.w, first + row, col).scale));
            high = fmaxf(high, high_code * fabsf(group_at((enum weight_kind)KIND, part.w, first + row + 8, col).scale));
        }
    }
    for (int mask = 1; mask <= 2; mask *= 2) {
        low = fmaxf(low, __shfl_xor_sync(0xffffffffu, low, mask));
        high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, mask));
    }
    if (lane % 4 == 0) {
        largest[warp * TILE_ROWS + row] = low;
        largest[warp * TILE_ROWS + row + 8] = high;
    }
    __syncthreads();
    int64_t mine = first + threadIdx.x;
    if (threadIdx.x >= TILE_ROWS || mine < part.row_begin || mine >= part.row_end)
        return;
    float value = 0;
    for (int i = 0; i < WARPS; i++)
        value = fmaxf(value, largest[i * TILE_ROWS + threadIdx.x]);
    row_scale[mine - part.row_begin] = value / E4M3_MAX;
}

// Eight columns of one row, which are of one group: from each of four lanes' words the bytes of this half of 16 columns, columns 2t and
// 2t + 1.
template <int KIND, int FORMAT>
__device__ inline void expand_run(unsigned char *slab, const float *row_scale, const struct tiled_part &part,
                                  int64_t row, int64_t col, const uint32_t (&words)[4], int shift)
{
    if (row < part.row_begin || row >= part.row_end)
        return;
    struct weight_group group = group_at((enum weight_kind)KIND, part.w, row, col);
    float v[RUN], divisor = FORMAT == SLAB_E4M3 ? row_scale[row - part.row_begin] : 1;
    divisor = divisor > 0 ? divisor : 1; // a row of zeros
#pragma unroll
    for (int i = 0; i < RUN; i++) {
        int at = shift + i % 2 * 16;
        v[i] = KIND == WEIGHT_INT4 ? nibble(words[i / 2], at) * group.scale
                                   : weight_value((enum weight_kind)KIND, group, words[i / 2] >> at & 15);
        if (FORMAT == SLAB_E4M3)
            v[i] = v[i] / divisor;
    }
    store_run<FORMAT>(slab, (row - part.row_begin) * part.cols_padded + col, v);
}

// A warp turns one tile: lanes read their 16 bytes, which is 512 in a row, and pass them through shared memory, so that
// eight lanes write the 64 columns of one row.
template <int KIND, int FORMAT>
__global__ void __launch_bounds__(THREADS)
    tiled_kernel(unsigned char *slab, const float *row_scale, struct tiled_part part)
{
    SHARED(uint4, staged, WARPS * TILE_UNITS);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int64_t tile_row = part.row_begin / TILE_ROWS + blockIdx.y, tile_col = (int64_t)blockIdx.x * WARPS + warp;
    if (tile_col >= part.cols_padded / TILE_COLS)
        return;
    // Unit (row g, t) lies at 4 g + (t ^ g / 2): neither the stores nor the loads below meet in a bank.
    uint4 *tile = staged + warp * TILE_UNITS;
    store_shared<uint4>(&tile[lane / 4 * 4 + ((lane % 4) ^ (lane / 8 & 3))],
                        load_weights(tile_of(part, tile_row, tile_col) + lane));
    __syncwarp();
    int run = lane % RUNS;
#pragma unroll
    for (int begin = 0; begin < TILE_ROWS / 2; begin += ROWS_AT_ONCE) {
        int g = begin + lane / RUNS;
        uint32_t words[4];
#pragma unroll
        for (int t = 0; t < 4; t++) {
            const uint32_t *unit = (const uint32_t *)(const void *)&tile[g * 4 + (t ^ (g / 2 & 3))];
            words[t] = load_shared<uint32_t>(unit + run / 2) >> run % 2 * 8;
        }
        int64_t row = tile_row * TILE_ROWS + g, col = tile_col * TILE_COLS + run * RUN;
        expand_run<KIND, FORMAT>(slab, row_scale, part, row, col, words, 0);
        expand_run<KIND, FORMAT>(slab, row_scale, part, row + 8, col, words, 4);
    }
}

template <int KIND, int FORMAT>
cudaError_t launch_tiled(void *slab, float *row_scale, const struct tiled_part &part, cudaStream_t stream)
{
    unsigned tile_rows = (unsigned)((part.row_end + TILE_ROWS - 1) / TILE_ROWS - part.row_begin / TILE_ROWS);
    unsigned tile_cols = (unsigned)(part.cols_padded / TILE_COLS);
    if (tile_rows > 65535)
        return cudaErrorInvalidValue;
    if constexpr (FORMAT == SLAB_E4M3) {
        cudaError_t status = LAUNCH((row_scale_kernel<KIND>), dim3(tile_rows), THREADS, 0, stream, row_scale, part);
        if (status != cudaSuccess)
            return status;
    }
    dim3 grid((tile_cols + WARPS - 1) / WARPS, tile_rows);
    return LAUNCH((tiled_kernel<KIND, FORMAT>), grid, THREADS, 0, stream, (unsigned char *)slab, row_scale, part);
}

// ---- 8 bits ----------------------------------------------------------------------------------------------------------

template <int KIND> __device__ inline float code_value(uint32_t byte)
{
    return KIND == WEIGHT_INT8 ? (float)(int8_t)byte : e4m3_to_f32((uint8_t)byte);
}

// Grid [rows, cols_padded / (8 * THREADS)]. A lane takes eight codes, which have one scale.
template <int KIND, int FORMAT>
__global__ void __launch_bounds__(THREADS) byte_kernel(unsigned char *slab, struct matrix w, int64_t row_begin)
{
    int64_t row = row_begin + blockIdx.x, col = ((int64_t)blockIdx.y * THREADS + threadIdx.x) * RUN;
    int64_t cols_padded = (int64_t)w.shape.cols_padded;
    if (col >= cols_padded)
        return;
    uint2 raw = load_global<uint2>((const uint2 *)(const void *)((const char *)w.data + row * cols_padded + col));
    float v[RUN],
        scale = KIND == WEIGHT_FP8G ? group_at(WEIGHT_FP8G, w, row, col).scale : ((const float *)w.scale)[row];
#pragma unroll
    for (int i = 0; i < RUN; i++)
        v[i] = code_value<KIND>((i < 4 ? raw.x : raw.y) >> i % 4 * 8 & 255) * scale;
    store_run<FORMAT>(slab, blockIdx.x * cols_padded + col, v);
}

template <int KIND, int FORMAT>
cudaError_t launch_bytes(void *slab, const struct matrix *w, int64_t row_begin, int64_t row_end, cudaStream_t stream)
{
    int64_t cols = (int64_t)w->shape.cols_padded, rows = row_end - row_begin;
    dim3 grid((unsigned)rows, (unsigned)((cols / RUN + THREADS - 1) / THREADS));
    return LAUNCH((byte_kernel<KIND, FORMAT>), grid, THREADS, 0, stream, (unsigned char *)slab, *w, row_begin);
}

// The two formats of 16 bits.
template <int KIND>
cudaError_t launch_wide(void *slab, enum slab_format format, const struct matrix *w, int64_t row_begin, int64_t row_end,
                        cudaStream_t stream)
{
    return format == SLAB_F16 ? launch_bytes<KIND, SLAB_F16>(slab, w, row_begin, row_end, stream)
                              : launch_bytes<KIND, SLAB_BF16>(slab, w, row_begin, row_end, stream);
}

template <int KIND>
cudaError_t launch_wide(void *slab, enum slab_format format, const struct tiled_part &part, cudaStream_t stream)
{
    return format == SLAB_F16 ? launch_tiled<KIND, SLAB_F16>(slab, NULL, part, stream)
                              : launch_tiled<KIND, SLAB_BF16>(slab, NULL, part, stream);
}

// ---- factors ---------------------------------------------------------------------------------------------------------

__device__ inline float factor_at(const float *factors, int64_t i) { return factors ? factors[i] : 1.0f; }

// Grid [cols / THREADS, rows].
__global__ void __launch_bounds__(THREADS)
    scale_kernel(float *y, int64_t y_stride, const float *row_factor, const float *column_factor, int64_t cols)
{
    int64_t row = blockIdx.y, col = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (col < cols)
        y[row * y_stride + col] *= factor_at(row_factor, row) * factor_at(column_factor, col);
}

// The same by four columns a lane.
__global__ void __launch_bounds__(THREADS)
    scale4_kernel(float *y, int64_t y_stride, const float *row_factor, const float *column_factor, int64_t cols)
{
    int64_t row = blockIdx.y, col = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * 4;
    if (col >= cols)
        return;
    float4 *at = (float4 *)(void *)(y + row * y_stride + col);
    float4 v = *at, f = make_float4(1, 1, 1, 1);
    float factor = factor_at(row_factor, row);
    if (column_factor)
        f = load_global<float4>((const float4 *)(const void *)(column_factor + col));
    v = make_float4(v.x * (factor * f.x), v.y * (factor * f.y), v.z * (factor * f.z), v.w * (factor * f.w));
    store_global<float4>(at, v);
}

bool on_16_bytes(const void *p) { return (uintptr_t)p % 16 == 0; }

} // namespace

cudaError_t launch_slab(void *slab, enum slab_format format, float *row_scale, const struct matrix *w,
                        int64_t row_begin, int64_t row_end, cudaStream_t stream)
{
    bool scaled = format == SLAB_E4M3;
    if (row_begin < 0 || row_begin > row_end || row_end > (int64_t)w->shape.rows_padded ||
        scaled != (row_scale != NULL))
        return cudaErrorInvalidValue;
    if (row_begin == row_end || w->shape.cols_padded == 0)
        return cudaSuccess;
    struct tiled_part part = {*w, (int64_t)w->shape.cols_padded, row_begin, row_end};
    if (scaled)
        return w->shape.kind == WEIGHT_INT4  ? launch_tiled<WEIGHT_INT4, SLAB_E4M3>(slab, row_scale, part, stream)
               : w->shape.kind == WEIGHT_NL4 ? launch_tiled<WEIGHT_NL4, SLAB_E4M3>(slab, row_scale, part, stream)
                                             : cudaErrorInvalidValue;
    switch (w->shape.kind) {
    case WEIGHT_INT4:
        return launch_wide<WEIGHT_INT4>(slab, format, part, stream);
    case WEIGHT_INT4Z:
        return launch_wide<WEIGHT_INT4Z>(slab, format, part, stream);
    case WEIGHT_NL4:
        return launch_wide<WEIGHT_NL4>(slab, format, part, stream);
    case WEIGHT_MXFP4:
        return launch_wide<WEIGHT_MXFP4>(slab, format, part, stream);
    case WEIGHT_NVFP4:
        return launch_wide<WEIGHT_NVFP4>(slab, format, part, stream);
    case WEIGHT_INT8:
        return launch_wide<WEIGHT_INT8>(slab, format, w, row_begin, row_end, stream);
    case WEIGHT_FP8:
        return launch_wide<WEIGHT_FP8>(slab, format, w, row_begin, row_end, stream);
    case WEIGHT_FP8G:
        return launch_wide<WEIGHT_FP8G>(slab, format, w, row_begin, row_end, stream);
    case WEIGHT_BF16: // lies in the file as a product wants it
    case WEIGHT_F32:
    case WEIGHT_KIND_COUNT:
        break;
    }
    return cudaErrorInvalidValue;
}

cudaError_t launch_scale(float *y, int64_t y_stride, const float *row_factor, const float *column_factor, int64_t rows,
                         int64_t cols, cudaStream_t stream)
{
    if (rows < 0 || rows > 65535 || cols < 0 || y_stride < cols)
        return cudaErrorInvalidValue;
    if (rows == 0 || cols == 0 || (!row_factor && !column_factor))
        return cudaSuccess;
    bool by_four = cols % 4 == 0 && y_stride % 4 == 0 && on_16_bytes(y) && on_16_bytes(column_factor);
    int64_t lanes = by_four ? cols / 4 : cols;
    dim3 grid((unsigned)((lanes + THREADS - 1) / THREADS), (unsigned)rows);
    if (by_four)
        return LAUNCH(scale4_kernel, grid, THREADS, 0, stream, y, y_stride, row_factor, column_factor, cols);
    return LAUNCH(scale_kernel, grid, THREADS, 0, stream, y, y_stride, row_factor, column_factor, cols);
}
