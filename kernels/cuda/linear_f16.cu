// Matrix products with weights widened in registers, of a few rows. See linear_f16.cuh; declared in launch.h.
#include "kernels/cuda/linear_f16.cuh"

namespace
{

struct no_job {
};

template <int KIND, int GROUP, int TILES>
__global__ void __launch_bounds__(256, TILES < 4 ? 2 : 1) linear_f16(struct linear l, int stage_bytes)
{
    SHARED_DYNAMIC(uint8_t, shared);
    struct token_list none = {NULL, NULL};
    multiply_block<KIND, GROUP, TILES, false>(l, none, (int64_t)blockIdx.y * TILES * TILE_TOKENS, stage_bytes, shared);
}

template <int KIND, int GROUP, int TILES> cudaError_t launch(const struct linear *l, cudaStream_t stream)
{
    struct block_shape b = shape_of<KIND, GROUP, TILES>(l);
    dim3 grid(b.blocks, (unsigned)((l->tokens + TILES * TILE_TOKENS - 1) / (TILES * TILE_TOKENS)));
    return LAUNCH((linear_f16<KIND, GROUP, TILES>), grid, 256, b.shared_bytes, stream, *l, b.stage_bytes);
}

template <int KIND, int GROUP, class JOB>
cudaError_t launch_product(const struct linear *l, const JOB *, cudaStream_t stream)
{
    // 8 warps' panels leave room for 16 tokens; further ones reread a small matrix.
    int64_t most = l->split_bits == 3 ? 16 : 64, tokens = l->tokens < most ? l->tokens : most;
    if constexpr (KIND == WEIGHT_INT8) // linear_int8 has the exact sums that these weights are for
        return cudaErrorInvalidValue;
    else
        return tokens <= 8    ? launch<KIND, GROUP, 1>(l, stream)
               : tokens <= 16 ? launch<KIND, GROUP, 2>(l, stream)
               : tokens <= 32 ? launch<KIND, GROUP, 4>(l, stream)
                              : launch<KIND, GROUP, 8>(l, stream);
}

} // namespace

extern "C" cudaError_t launch_linear_f16(float *y, int64_t y_stride, const struct matrix *w, struct device_input in,
                                         int64_t rows, cudaStream_t stream)
{
    if (rows <= 0 || w->shape.rows == 0)
        return cudaSuccess;
    struct linear l = linear_of(y, y_stride, w, in, rows, 2);
    l.split_bits = w->shape.rows_padded < 2048 ? 3 : 2;
    if (w->shape.cols == 0)
        return launch_without_columns(&l, stream);
    return launch_for_kind<struct no_job>(&l, NULL, &w->shape, stream);
}
