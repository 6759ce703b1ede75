// Matrix products of int8 inputs with int4 and int8 weights for many tokens: blocks of rows x tokens, both operands through shared
// memory in a pipeline of asynchronous copies, one step of 128 columns a stage. A warp has its results from the first step to the last and adds
// the terms of the groups in ascending order: the same bits as kernels.h's matmul, whatever the size of the block.
#include "kernels/cuda/linear_tiles.cuh"

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
        X_SCALE_AT = STAGES * STAGE_BYTES, // f32 [2][TOKENS]
        SHARED_BYTES = X_SCALE_AT + 2 * TOKENS * 4,
    };
};

// What a thread copies of each step. Its chunks of 16 bytes of an operand lie evenly, in memory and in the stage.
struct copier {
    const uint8_t *weights, *x, *scale; // its first chunks, in the next step
    int weights_at, x_at;               // and in a stage
    int weights_left, x_left;           // chunks of it that are there
    int64_t weights_stride, x_stride;   // bytes from one to the next in memory
    int col_tile;                       // int4: of its first chunk
    int64_t bytes_left;                 // int8: of its rows of weights, from its first chunk on
    int64_t groups_left;                // int4: of its row of scales; 0 or less: none
};

// How many of first, first + step, first + 2 step ... are below end.
__device__ __forceinline__ int count_below(int64_t first, int step, int64_t end)
{
    return first < end ? (int)((end - first + step - 1) / step) : 0;
}

template <int KIND, int GROUP, typename TILING>
__device__ __forceinline__ struct copier copier_make(const struct linear &l, int64_t row_tile_begin, int64_t row_tiles,
                                                     int64_t token_begin)
{
    enum { ROWS_AT_ONCE = TILING::THREADS / 8, GROUPS = GROUPS_OF(GROUP) };
    int thread = (int)threadIdx.x, row = thread >> 3, slot = thread & 7;
    struct copier c = {};
    c.x = l.x + (token_begin + row) * l.x_row_bytes + slot * 16;
    c.x_at = TILING::X_AT + row * STEP_COLS + x_slot(row, slot) * 16;
    c.x_left = count_below(token_begin + row, ROWS_AT_ONCE, l.tokens);
    c.x_stride = ROWS_AT_ONCE * l.x_row_bytes;
    if (KIND == WEIGHT_INT4) {
        int64_t row_tile = row_tile_begin + (thread >> 5) % TILING::BLOCK_ROW_TILES;
        c.col_tile = (thread >> 5) / TILING::BLOCK_ROW_TILES;
        c.weights = weights_of_lane<WEIGHT_INT4>(l, row_tile, thread & 31) + c.col_tile * (4 * WEIGHT_TILE_BYTES);
        c.weights_at = thread * 16;
        c.weights_left = row_tile < row_tiles ? 2 : 0;
        c.weights_stride = 4 * WEIGHT_TILE_BYTES;
        row_tile = row_tile_begin + thread / (2 * GROUPS);
        int64_t groups = (int64_t)l.col_tiles * GROUPS / 2;
        c.scale = (const uint8_t *)l.weight_scale + row_tile * groups * 32 + thread % (2 * GROUPS) * 16;
        c.groups_left = row_tile < row_tiles ? groups - thread % (2 * GROUPS) / 2 : 0;
    } else {
        c.weights = l.weights + (row_tile_begin * TILE_ROWS + row) * l.weight_row_bytes + slot * 16;
        c.weights_at = row * STEP_COLS + x_slot(row, slot) * 16;
        c.weights_left = count_below(row_tile_begin * TILE_ROWS + row, ROWS_AT_ONCE, row_tiles * TILE_ROWS);
        c.weights_stride = ROWS_AT_ONCE * l.weight_row_bytes;
        c.bytes_left = l.weight_row_bytes - slot * 16;
    }
    return c;
}

// Starts the copies of the next step. Rows, tokens and columns that are not there become zeros.
template <int KIND, int GROUP, typename TILING>
__device__ __forceinline__ void copy_step(const struct linear &l, struct copier &c, uint8_t *stage)
{
    enum {
        CHUNKS = TILING::WEIGHT_BYTES / 16,
        X_CHUNKS = TILING::TOKENS * 8,
        COL_TILES = TILING::THREADS / 32 / TILING::BLOCK_ROW_TILES, // int4: that are copied at once
    };
#pragma unroll
    for (int i = 0; i < (CHUNKS + TILING::THREADS - 1) / TILING::THREADS; i++) {
        bool valid =
            i < c.weights_left && (KIND == WEIGHT_INT4 ? c.col_tile + i * COL_TILES < l.col_tiles : c.bytes_left > 0);
        if (CHUNKS % TILING::THREADS == 0 || (int)threadIdx.x < CHUNKS)
            copy_async16(stage + c.weights_at + i * TILING::THREADS * 16,
                         valid ? c.weights + i * c.weights_stride : l.weights, valid);
    }
#pragma unroll
    for (int i = 0; i < X_CHUNKS / TILING::THREADS; i++) {
        bool valid = i < c.x_left;
        copy_async16(stage + c.x_at + i * TILING::THREADS * 16, valid ? c.x + i * c.x_stride : l.x, valid);
    }
    c.weights += KIND == WEIGHT_INT4 ? 8 * WEIGHT_TILE_BYTES : STEP_COLS;
    c.col_tile += 2;
    c.bytes_left -= STEP_COLS;
    c.x += STEP_COLS;
    if (GROUP) {
        bool valid = c.groups_left > 0;
        if ((int)threadIdx.x < TILING::SCALE_BYTES / 16)
            copy_async16(stage + TILING::SCALE_AT + (int)threadIdx.x * 16, valid ? c.scale : l.weight_scale, valid);
        c.scale += GROUPS_OF(GROUP) * 32;
        c.groups_left -= GROUPS_OF(GROUP);
    }
}

// The scale of one of the block's tokens for a step, 0 where there is none. For the thread of that number.
__device__ __forceinline__ float x_scale_of(const struct linear &l, int64_t token, int step)
{
    return token < l.tokens && step < l.steps ? load_global(l.x_scale + token * l.x_groups + step) : 0.0f;
}

// Adds one step's terms to a warp's results.
//   weights, scales  of the stage;  x, x_scale: from the warp's first token on
template <int KIND, int GROUP, int ROW_TILES, int TOKEN_TILES, typename TILING>
__device__ __forceinline__ void add_step(float (&y)[ROW_TILES][TOKEN_TILES][4], const uint8_t *weights,
                                         const uint8_t *scales, const uint8_t *x, const float *x_scale,
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
        float2 scale = load_shared((const float2 *)(const void *)(x_scale + n * TILE_TOKENS + t * 2));
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
__global__ void __launch_bounds__(32 * ROW_WARPS * TOKEN_WARPS, 1)
    linear_int8_block(struct linear l, int64_t row_tiles, int token_blocks)
{
    typedef struct tiling<KIND, GROUP, ROW_TILES, TOKEN_TILES, ROW_WARPS, TOKEN_WARPS, STAGES> tiling;
    SHARED_DYNAMIC(uint8_t, shared);
    int lane = (int)threadIdx.x & 31, thread = (int)threadIdx.x;
    struct warp_place at = warp_place_of<tiling>(l, token_blocks, ROW_WARPS, ROW_TILES, TOKEN_TILES);
    struct copier copier = copier_make<KIND, GROUP, tiling>(l, at.row_tile_begin, row_tiles, at.token_begin);
    float y[ROW_TILES][TOKEN_TILES][4];
    run_steps<tiling, STAGES, float>(
        y, l.steps, shared, at.has_tokens,
        [&](uint8_t *stage, int) { copy_step<KIND, GROUP, tiling>(l, copier, stage); },
        [&](int step) { return x_scale_of(l, at.token_begin + thread, step); },
        [&](const uint8_t *stage, const float *x_scales) {
            add_step<KIND, GROUP, ROW_TILES, TOKEN_TILES, tiling>(y, stage, stage + tiling::SCALE_AT,
                                                                  stage + tiling::X_AT + at.first_token * STEP_COLS,
                                                                  x_scales + at.first_token, at.row_tile, lane);
        });

#pragma unroll
    for (int m = 0; m < ROW_TILES; m++)
#pragma unroll
        for (int high = 0; high < 2; high++) {
            int64_t row = (at.row_tile_begin + at.row_tile + m) * TILE_ROWS + high * 8 + (lane >> 2);
            if (row >= l.out_rows)
                continue;
            float row_scale = KIND == WEIGHT_INT4 ? WEIGHT_INT4_FACTOR : ((const float *)l.weight_scale)[row];
#pragma unroll
            for (int n = 0; n < TOKEN_TILES; n++)
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    int64_t token = at.token_begin + at.first_token + n * TILE_TOKENS + (lane & 3) * 2 + k;
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
