// What the products of many tokens share (linear_int8_tiles.cu, linear_fp4.cu): where a warp of a block of rows x tokens stands, and the
// block's way through the steps. What is copied and multiplied in a step is theirs.
//
// TILING gives the block's size and the layout of its shared memory: stages of STAGE_BYTES, and from X_SCALE_AT on the scales of TOKENS
// tokens for this step and the next.
#ifndef TPSHARD_KERNELS_CUDA_LINEAR_TILES_CUH
#define TPSHARD_KERNELS_CUDA_LINEAR_TILES_CUH

#include "kernels/cuda/linear.cuh"

namespace
{

struct warp_place {
    int64_t row_tile_begin, token_begin; // of the block
    int row_tile, first_token;           // of the warp, counted from there
    bool has_tokens;
};

// Warps stand row_warps beside each other, each has row_tiles x token_tiles results of 16 x 8. Blocks that run side by side share rows of
// the matrix.
template <typename TILING>
__device__ __forceinline__ struct warp_place warp_place_of(const struct linear &l, int token_blocks, int row_warps,
                                                           int row_tiles, int token_tiles)
{
    int warp = (int)threadIdx.x >> 5;
    struct warp_place place;
    place.row_tile_begin = (int64_t)(blockIdx.x / token_blocks) * TILING::BLOCK_ROW_TILES;
    place.token_begin = (int64_t)(blockIdx.x % token_blocks) * TILING::TOKENS;
    place.row_tile = warp % row_warps * row_tiles;
    place.first_token = warp / row_warps * token_tiles * TILE_TOKENS;
    place.has_tokens = place.token_begin + place.first_token < l.tokens;
    return place;
}

// y = the products of all steps of a block, STAGES - 1 steps on their way at a time. y is cleared here, behind the first copies: in front of
// them it costs registers and code.
//   copy(stage, step)      starts the copies of a step
//   scale_of(step)         the scale of this thread's token, 0 behind the last step
//   add(stage, x_scales)   adds a step's products to y; not called without has_tokens
template <typename TILING, int STAGES, typename SCALE, int ROW_TILES, int TOKEN_TILES, typename COPY, typename SCALE_OF,
          typename ADD>
__device__ __forceinline__ void run_steps(float (&y)[ROW_TILES][TOKEN_TILES][4], int steps, uint8_t *shared,
                                          bool has_tokens, COPY copy, SCALE_OF scale_of, ADD add)
{
    SCALE *x_scales = (SCALE *)(void *)(shared + TILING::X_SCALE_AT), next_scale = 0;
    int thread = (int)threadIdx.x;
    bool scales_token = thread < TILING::TOKENS;
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) {
        if (i < steps)
            copy(shared + i * TILING::STAGE_BYTES, i);
        copy_async_commit();
    }
    if (scales_token) {
        store_shared(x_scales + thread, scale_of(0));
        next_scale = scale_of(1);
    }
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++)
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; n++)
            y[m][n][0] = y[m][n][1] = y[m][n][2] = y[m][n][3] = 0.0f;
    int stage = 0, next_stage = STAGES - 1;
    for (int step = 0; step < steps; step++) {
        copy_async_wait<STAGES - 2>();
        __syncthreads(); // the stage and its scales are there for all, and all are done with the one before it
        if (step + STAGES - 1 < steps)
            copy(shared + next_stage * TILING::STAGE_BYTES, step + STAGES - 1);
        copy_async_commit();
        if (scales_token) {
            store_shared(x_scales + (~step & 1) * TILING::TOKENS + thread, next_scale);
            next_scale = scale_of(step + 2);
        }
        if (has_tokens)
            add(shared + stage * TILING::STAGE_BYTES, x_scales + (step & 1) * TILING::TOKENS);
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        next_stage = next_stage + 1 == STAGES ? 0 : next_stage + 1;
    }
}

} // namespace

#endif
