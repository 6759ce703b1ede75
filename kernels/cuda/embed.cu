// The tokens' rows of the embedding, the same bits as the CPU's dequantize_row, rounded to bf16. Declared in launch.h.
#include "kernels/cuda/rows.cuh"
#include "kernels/cuda/weights.cuh"

__device__ __forceinline__ uint32_t tiled_code(const struct matrix &table, int64_t row, int64_t col)
{
    bool high;
    uint64_t at = weight_tile_offset((uint64_t)row, (uint64_t)col, table.shape.cols_padded, &high);
    uint8_t byte = ((const uint8_t *)table.data)[at];
    return high ? byte >> 4 : byte & 15;
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
    if (table.shape.group_size > 0) { // four columns are of one group
        struct weight_group group = group_at(table.shape.kind, table, row, col);
        const uint8_t *bytes = (const uint8_t *)table.data + at;
        float value[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            value[i] = weight_value(table.shape.kind, group,
                                    table.shape.kind == WEIGHT_FP8G ? bytes[i] : tiled_code(table, row, col + i));
        return make_float4(value[0], value[1], value[2], value[3]);
    }
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
