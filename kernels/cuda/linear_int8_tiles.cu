// Matrix products of int8 inputs with int4 and int8 weights for many tokens: blocks of rows x tokens, both operands through shared
// memory in a pipeline of asynchronous copies, one step of 128 columns a stage. A warp has its results from the first step to the last and adds
// the terms of the groups in ascending order: the same bits as kernels.h's matmul, whatever the size of the block.
#include "kernels/cuda/linear.cuh"

namespace
{

#define GROUPS_OF(GROUP) ((GROUP) ? STEP_COLS / (GROUP) : 1)

// What a block is: ROW_WARPS x TOKEN_WARPS warps with ROW_TILES x TOKEN_TILES results of 16 x 8 each. Its stages hold
//   weights  int4: [2 column tiles][tiles of rows][512]; int8: [rows][128], slots exchanged as x_slot says
//   x        [tokens][128], slots exchanged
//   scale    int4: f16 [tiles of rows][groups][16]
template <int KIND, int GROUP, int ROW_TILES, int TOKEN_TILES, int ROW_WARPS, int TOKEN_WARPS, int STAGES>
struct tiling {
    enum {
        THREADS = 32 * ROW_WARPS * TOKEN_WARPS,
        BLOCK_ROW_TILES = ROW_TILES * ROW_WARPS,
        ROWS = BLOCK_ROW_TILES * TILE_ROWS,
        TOKENS = TOKEN_TILES * TOKEN_WARPS * TILE_TOKENS,
        WEIGHT_BYTES = ROWS * (KIND == WEIGHT_INT4 ? STEP_COLS / 2 : STEP_COLS),
        X_AT = WEIGHT_BYTES,
        SCALE_AT = X_AT + TOKENS * STEP_COLS,
        SCALE_BYTES = GROUP ? BLOCK_ROW_TILES * GROUPS_OF(GROUP) * 32 : 0,
        STAGE_BYTES = SCALE_AT + SCALE_BYTES,
        Q_SCALE_AT = STAGES * STAGE_BYTES, // f32 [2][TOKENS]
        SHARED_BYTES = Q_SCALE_AT + 2 * TOKENS * 4,
    };
};

// Starts the copies of one step. Rows, tokens and columns that are not there become zeros.
template <int KIND, int GROUP, typename TILING>
__device__ __forceinline__ void copy_step(const struct linear &l, uint8_t *stage, int64_t row_tile_begin,
                                          int64_t row_tiles, int64_t token_begin, int step)
{
    for (int i = (int)threadIdx.x; i < TILING::WEIGHT_BYTES / 16; i += TILING::THREADS) {
        const uint8_t *from;
        bool valid;
        int to;
        if (KIND == WEIGHT_INT4) {
            int64_t row_tile = row_tile_begin + (i >> 5) % TILING::BLOCK_ROW_TILES;
            int64_t col_tile = 2 * step + (i >> 5) / TILING::BLOCK_ROW_TILES;
            valid = row_tile < row_tiles && col_tile < l.col_tiles;
            from = l.weights + (((row_tile >> 2) * l.col_tiles + col_tile) * 4 + (row_tile & 3)) * WEIGHT_TILE_BYTES +
                   (i & 31) * 16;
            to = i * 16;
        } else {
            int row = i >> 3;
            int64_t byte = (int64_t)step * STEP_COLS + (i & 7) * 16;
            valid = row_tile_begin + row / TILE_ROWS < row_tiles && byte < l.weight_row_bytes;
            from = l.weights + (row_tile_begin * TILE_ROWS + row) * l.weight_row_bytes + byte;
            to = row * STEP_COLS + x_slot(row, i & 7) * 16;
        }
        copy_async16(stage + to, valid ? from : l.weights, valid);
    }
    for (int i = (int)threadIdx.x; i < TILING::TOKENS * 8; i += TILING::THREADS) {
        int token = i >> 3;
        bool valid = token_begin + token < l.tokens;
        const uint8_t *from = l.x + (token_begin + token) * l.x_row_bytes + (int64_t)step * STEP_COLS + (i & 7) * 16;
        copy_async16(stage + TILING::X_AT + token * STEP_COLS + x_slot(token, i & 7) * 16, valid ? from : l.x, valid);
    }
    if (GROUP) {
        enum { GROUPS = GROUPS_OF(GROUP) };
        int i = (int)threadIdx.x;
        int64_t row_tile = row_tile_begin + i / (2 * GROUPS), group = (int64_t)step * GROUPS + i % (2 * GROUPS) / 2;
        int64_t groups = (int64_t)l.col_tiles * GROUPS / 2;
        bool valid = row_tile < row_tiles && group < groups;
        const uint8_t *from = (const uint8_t *)l.weight_scale + (row_tile * groups + group) * 32 + (i & 1) * 16;
        if (i < TILING::SCALE_BYTES / 16)
            copy_async16(stage + TILING::SCALE_AT + i * 16, valid ? from : l.weight_scale, valid);
    }
}

// The scale of one of the block's tokens for a step, 0 where there is none. For the thread of that number.
__device__ __forceinline__ float q_scale_of(const struct linear &l, int64_t token, int step)
{
    return token < l.tokens && step < l.steps ? load_global(l.x_scale + token * l.x_groups + step) : 0.0f;
}

// Adds one step's terms to a warp's results.
//   weights, scales  of the stage;  x, q_scale: from the warp's first token on
template <int KIND, int GROUP, int ROW_TILES, int TOKEN_TILES, typename TILING>
__device__ __forceinline__ void add_step(float (&y)[ROW_TILES][TOKEN_TILES][4], const uint8_t *weights,
                                         const uint8_t *scales, const uint8_t *x, const float *q_scale,
                                         int first_row_tile, int lane)
{
    enum { GROUPS = GROUPS_OF(GROUP) };
    int g = lane >> 2, t = lane & 3;
    uint32_t a[ROW_TILES][4][4];
    float row_scale[ROW_TILES][GROUPS][2] = {};
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++) {
        int row_tile = first_row_tile + m;
        uint4 w[STEP_LOADS(KIND)];
#pragma unroll
        for (int tile = 0; tile < 2; tile++) {
            if (KIND == WEIGHT_INT4) {
                const uint8_t *from =
                    weights + (tile * TILING::BLOCK_ROW_TILES + row_tile) * WEIGHT_TILE_BYTES + lane * 16;
                w[tile] = load_shared((const uint4 *)(const void *)from);
            } else {
                const uint8_t *from = weights + (row_tile * TILE_ROWS + g) * STEP_COLS + x_slot(g, tile * 4 + t) * 16;
                w[tile * 2] = load_shared((const uint4 *)(const void *)from);
                w[tile * 2 + 1] = load_shared((const uint4 *)(const void *)(from + 8 * STEP_COLS));
            }
        }
        int8_operands<KIND>(a[m], w);
        if (GROUP)
            int4_row_scales<GROUPS>(row_scale[m], scales + row_tile * GROUPS * 32, g);
    }
#pragma unroll
    for (int n = 0; n < TOKEN_TILES; n++) {
        const uint8_t *from = x + (n * TILE_TOKENS + g) * STEP_COLS;
        uint4 b[2];
        b[0] = load_shared((const uint4 *)(const void *)(from + x_slot(g, t) * 16));
        b[1] = load_shared((const uint4 *)(const void *)(from + x_slot(g, 4 + t) * 16));
        float2 scale = load_shared((const float2 *)(const void *)(q_scale + n * TILE_TOKENS + t * 2));
#pragma unroll
        for (int m = 0; m < ROW_TILES; m++) {
            float term[GROUPS][4];
            int8_terms<KIND, GROUPS>(term, a[m], b, row_scale[m], scale);
#pragma unroll
            for (int i = 0; i < GROUPS; i++)
#pragma unroll
                for (int k = 0; k < 4; k++)
                    y[m][n][k] += term[i][k];
        }
    }
}

template <int KIND, int GROUP, int ROW_TILES, int TOKEN_TILES, int ROW_WARPS, int TOKEN_WARPS, int STAGES>
__global__ void __launch_bounds__(32 * ROW_WARPS * TOKEN_WARPS)
    linear_int8_block(struct linear l, int64_t row_tiles, int token_blocks)
{
    typedef struct tiling<KIND, GROUP, ROW_TILES, TOKEN_TILES, ROW_WARPS, TOKEN_WARPS, STAGES> tiling;
    SHARED_DYNAMIC(uint8_t, shared);
    float *q_scales = (float *)(void *)(shared + tiling::Q_SCALE_AT);
    int lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x >> 5, thread = (int)threadIdx.x;
    int row_warp = warp % ROW_WARPS, first_token = warp / ROW_WARPS * TOKEN_TILES * TILE_TOKENS;
    // Blocks that run side by side share rows of the matrix.
    int64_t row_tile_begin = (int64_t)(blockIdx.x / token_blocks) * tiling::BLOCK_ROW_TILES;
    int64_t token_begin = (int64_t)(blockIdx.x % token_blocks) * tiling::TOKENS;
    bool has_tokens = token_begin + first_token < l.tokens;

    bool scales_token = thread < tiling::TOKENS;
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) {
        if (i < l.steps)
            copy_step<KIND, GROUP, tiling>(l, shared + i * tiling::STAGE_BYTES, row_tile_begin, row_tiles, token_begin,
                                           i);
        copy_async_commit();
    }
    float next_q_scale = 0.0f;
    if (scales_token) {
        store_shared(q_scales + thread, q_scale_of(l, token_begin + thread, 0));
        next_q_scale = q_scale_of(l, token_begin + thread, 1);
    }

    float y[ROW_TILES][TOKEN_TILES][4];
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++)
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; n++)
            y[m][n][0] = y[m][n][1] = y[m][n][2] = y[m][n][3] = 0.0f;
    int stage = 0, next_stage = STAGES - 1;
    for (int step = 0; step < l.steps; step++) {
        copy_async_wait<STAGES - 2>();
        __syncthreads(); // the stage and its scales are there for all, and all are done with the one before it
        if (step + STAGES - 1 < l.steps)
            copy_step<KIND, GROUP, tiling>(l, shared + next_stage * tiling::STAGE_BYTES, row_tile_begin, row_tiles,
                                           token_begin, step + STAGES - 1);
        copy_async_commit();
        if (scales_token) {
            store_shared(q_scales + (~step & 1) * tiling::TOKENS + thread, next_q_scale);
            next_q_scale = q_scale_of(l, token_begin + thread, step + 2);
        }
        const uint8_t *from = shared + stage * tiling::STAGE_BYTES;
        if (has_tokens)
            add_step<KIND, GROUP, ROW_TILES, TOKEN_TILES, tiling>(
                y, from, from + tiling::SCALE_AT, from + tiling::X_AT + first_token * STEP_COLS,
                q_scales + (step & 1) * tiling::TOKENS + first_token, row_warp * ROW_TILES, lane);
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        next_stage = next_stage + 1 == STAGES ? 0 : next_stage + 1;
    }

#pragma unroll
    for (int m = 0; m < ROW_TILES; m++)
#pragma unroll
        for (int high = 0; high < 2; high++) {
            int64_t row = (row_tile_begin + row_warp * ROW_TILES + m) * TILE_ROWS + high * 8 + (lane >> 2);
            if (row >= l.out_rows)
                continue;
            float row_scale = KIND == WEIGHT_INT4 ? 0x1p-8f : ((const float *)l.weight_scale)[row];
#pragma unroll
            for (int n = 0; n < TOKEN_TILES; n++)
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    int64_t token = token_begin + first_token + n * TILE_TOKENS + (lane & 3) * 2 + k;
                    if (token < l.tokens)
                        l.y[token * l.y_stride + row] = y[m][n][high * 2 + k] * row_scale;
                }
        }
}

template <int KIND, int GROUP, int ROW_TILES, int TOKEN_TILES, int ROW_WARPS, int TOKEN_WARPS, int STAGES>
cudaError_t launch(const struct linear *l, const struct weight_shape *shape, cudaStream_t stream)
{
    typedef struct tiling<KIND, GROUP, ROW_TILES, TOKEN_TILES, ROW_WARPS, TOKEN_WARPS, STAGES> tiling;
    int64_t token_blocks = (l->tokens + tiling::TOKENS - 1) / tiling::TOKENS;
    int64_t row_blocks = (l->out_rows + tiling::ROWS - 1) / tiling::ROWS;
    return LAUNCH((linear_int8_block<KIND, GROUP, ROW_TILES, TOKEN_TILES, ROW_WARPS, TOKEN_WARPS, STAGES>),
                  (unsigned)(row_blocks * token_blocks), tiling::THREADS, tiling::SHARED_BYTES, stream, *l,
                  (int64_t)(shape->rows_padded / TILE_ROWS), (int)token_blocks);
}

// The largest block of which there are enough for most of a device's multiprocessors.
template <int KIND, int GROUP>
cudaError_t launch_for_size(const struct linear *l, const struct weight_shape *shape, cudaStream_t stream)
{
    enum { ENOUGH = 96 };
    int64_t rows = l->out_rows, tokens = l->tokens;
    if (((rows + 127) / 128) * ((tokens + 127) / 128) >= ENOUGH && tokens > 64)
        return launch<KIND, GROUP, 2, 8, 4, 2, 3>(l, shape, stream); // 128 x 128
    if (((rows + 63) / 64) * ((tokens + 63) / 64) >= ENOUGH)
        return launch<KIND, GROUP, 1, 4, 4, 2, 6>(l, shape, stream); // 64 x 64
    return launch<KIND, GROUP, 1, 2, 2, 4, 6>(l, shape, stream);     // 32 x 64
}

} // namespace

cudaError_t linear_int8_tiles(const struct linear *l, const struct weight_shape *shape, cudaStream_t stream)
{
    if (shape->kind == WEIGHT_INT8)
        return launch_for_size<WEIGHT_INT8, 0>(l, shape, stream);
    return shape->group_size == 128  ? launch_for_size<WEIGHT_INT4, 128>(l, shape, stream)
           : shape->group_size == 64 ? launch_for_size<WEIGHT_INT4, 64>(l, shape, stream)
                                     : launch_for_size<WEIGHT_INT4, 32>(l, shape, stream);
}
