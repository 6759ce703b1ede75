// Matrix products of e4m3 inputs with mxfp4 and nvfp4 weights for many tokens, on sm_120: blocks of rows x tokens, both operands through shared
// memory in a pipeline of asynchronous copies, one step of 128 columns a stage. Weights are exact, inputs have 8 bits and a power of two for
// 32 columns (INPUT_MXFP8_TILE), sums are f32.
//
//   mxfp4  e2m1 times e4m3 by 32 columns, which is a group of both: the tensor cores apply both scales
//   nvfp4  e2m1 in e4m3's shape, where it is worth 2^-6, by the 16 columns of a group; the sum is multiplied by the scales in f32
//
// A warp has its results from the first step to the last and adds groups in ascending order, so a token's result depends neither on the
// tokens beside it nor on the size of the block.
#include "kernels/cuda/linear_tiles.cuh"

namespace
{

// What a block is: ROW_WARPS x TOKEN_WARPS warps with ROW_TILES x TOKEN_TILES results of 16 x 8 each. Its stages hold
//   weights  [2 column tiles][tiles of rows][512]
//   x        [tokens][128], slots exchanged as x_slot says
//   scale    of the weights: [tiles of rows][groups][16]
// and behind the stages stand the scales of x for this step and the next, four bytes a token.
template <int KIND, int ROW_TILES, int TOKEN_TILES, int ROW_WARPS, int TOKEN_WARPS, int STAGES> struct tiling {
    enum {
        GROUPS = KIND == WEIGHT_MXFP4 ? STEP_COLS / 32 : STEP_COLS / 16,
        WARPS = ROW_WARPS * TOKEN_WARPS,
        THREADS = 32 * WARPS,
        BLOCK_ROW_TILES = ROW_TILES * ROW_WARPS,
        ROWS = BLOCK_ROW_TILES * TILE_ROWS,
        TOKENS = TOKEN_TILES * TOKEN_WARPS * TILE_TOKENS,
        X_AT = ROWS * STEP_COLS / 2,
        SCALE_AT = X_AT + TOKENS * STEP_COLS,
        SCALE_PIECES = BLOCK_ROW_TILES * GROUPS, // of 16 bytes
        STAGE_BYTES = SCALE_AT + SCALE_PIECES * 16,
        X_SCALE_AT = STAGES * STAGE_BYTES,
        SHARED_BYTES = X_SCALE_AT + 2 * TOKENS * 4,
        WEIGHT_COPIES = 2 * BLOCK_ROW_TILES / WARPS, // of a thread, each step
        X_COPIES = TOKENS * 8 / THREADS,
        X_ROWS_AT_ONCE = THREADS / 8,
    };
    static_assert(2 * BLOCK_ROW_TILES % WARPS == 0 && TOKENS * 8 % THREADS == 0 && SCALE_PIECES <= THREADS &&
                      TOKENS <= THREADS,
                  "every thread copies the same");
};

// Starts the copies of a step. Rows, tokens and columns that are not there become zeros.
template <typename TILING>
__device__ __forceinline__ void copy_step(const struct linear &l, uint8_t *stage, int step, int64_t row_tile_begin,
                                          int64_t row_tiles, int64_t token_begin)
{
    int thread = (int)threadIdx.x, lane = thread & 31, warp = thread >> 5;
#pragma unroll
    for (int i = 0; i < TILING::WEIGHT_COPIES; i++) {
        int at = warp + i * TILING::WARPS;
        int64_t row_tile = row_tile_begin + at % TILING::BLOCK_ROW_TILES;
        int col_tile = 2 * step + at / TILING::BLOCK_ROW_TILES;
        bool valid = row_tile < row_tiles && col_tile < l.col_tiles;
        const uint8_t *from =
            weights_of_lane<WEIGHT_MXFP4>(l, row_tile, lane) + (int64_t)col_tile * 4 * WEIGHT_TILE_BYTES;
        copy_async16(stage + at * WEIGHT_TILE_BYTES + lane * 16, valid ? from : l.weights, valid);
    }
    int slot = thread & 7;
#pragma unroll
    for (int i = 0; i < TILING::X_COPIES; i++) {
        int token = (thread >> 3) + i * TILING::X_ROWS_AT_ONCE;
        bool valid = token_begin + token < l.tokens;
        const uint8_t *from = l.x + (token_begin + token) * l.x_row_bytes + step * STEP_COLS + slot * 16;
        copy_async16(stage + TILING::X_AT + token * STEP_COLS + x_slot(token, slot) * 16, valid ? from : l.x, valid);
    }
    if (thread < TILING::SCALE_PIECES) {
        int64_t row_tile = row_tile_begin + thread / TILING::GROUPS;
        int64_t at = ((int64_t)step * TILING::GROUPS + thread % TILING::GROUPS) * 16;
        const uint8_t *scales = (const uint8_t *)l.weight_scale;
        bool valid = row_tile < row_tiles && at < l.scale_tile_bytes;
        const uint8_t *from = scales + row_tile * l.scale_tile_bytes + row_tile / 4 * l.scale_block_more + at;
        copy_async16(stage + TILING::SCALE_AT + thread * 16, valid ? from : scales, valid);
    }
}

// The four scales of one of the block's tokens for a step, 0 where there is none. For the thread of that number.
__device__ __forceinline__ uint32_t x_scales_of(const struct linear &l, int64_t token, int step)
{
    return token < l.tokens && step < l.steps
               ? load_global((const uint32_t *)(const void *)l.x_scale + token * l.x_groups + step)
               : 0;
}

// Operand A of 32 columns from the two words of a lane: e2m1 in the middle of bytes (mxfp4) or as e4m3 (nvfp4).
template <int KIND> __device__ __forceinline__ void fp4_operand(uint32_t *a, uint32_t first, uint32_t second)
{
#pragma unroll
    for (int i = 0; i < 2; i++) {
        uint32_t word = i ? second : first;
        if (KIND == WEIGHT_MXFP4) {
            a[2 * i] = (word << 2) & 0x3c3c3c3cu;
            a[2 * i + 1] = (word >> 2) & 0x3c3c3c3cu;
        } else {
            a[2 * i] = ((word << 4) & 0x80808080u) | ((word << 2) & 0x1c1c1c1cu);
            a[2 * i + 1] = (word & 0x80808080u) | ((word >> 2) & 0x1c1c1c1cu);
        }
    }
}

// Adds the products of a step's 32 columns number PART.
//   a_scale  mxfp4: of row g or g + 8, as mma_e2m1_e4m3 wants it
//   w_scale  nvfp4: of rows g and g + 8, for both groups
//   x_scale  mxfp4: of token g, four bytes; nvfp4: of tokens 2 t and 2 t + 1
template <int KIND, int PART>
__device__ __forceinline__ void add_part(float (&y)[4], const uint32_t (&a)[4], const uint32_t *b, uint32_t a_scale,
                                         const float (&w_scale)[2][2], const uint32_t (&x_scale)[2])
{
    if (KIND == WEIGHT_MXFP4) {
        mma_e2m1_e4m3<PART>(y, a, b, a_scale, x_scale[0]);
        return;
    }
    float factor[2] = {__uint_as_float((x_scale[0] >> PART * 8 & 255) << 23),
                       __uint_as_float((x_scale[1] >> PART * 8 & 255) << 23)};
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float c[4] = {0, 0, 0, 0};
        mma_e4m3(c, a + 2 * half, b[half]);
#pragma unroll
        for (int k = 0; k < 4; k++)
            y[k] = fmaf(c[k], w_scale[half][k >> 1] * factor[k & 1], y[k]);
    }
}

// One column tile of a warp's step: y += weights * x.
template <int KIND, int ROW_TILES, int TOKEN_TILES, int TILE, typename TILING>
__device__ __forceinline__ void add_tile(float (&y)[ROW_TILES][TOKEN_TILES][4], const uint8_t *weights,
                                         const uint8_t *scales, const uint8_t *x, const uint32_t *x_scales,
                                         int first_row_tile, int lane)
{
    enum { PART_GROUPS = TILING::GROUPS / 4 };
    int g = lane >> 2, t = lane & 3;
    uint32_t a[2][ROW_TILES][4], a_scale[2][ROW_TILES] = {};
    float w_scale[2][ROW_TILES][2][2] = {};
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++) {
        int row_tile = first_row_tile + m;
        const uint8_t *from = weights + (TILE * TILING::BLOCK_ROW_TILES + row_tile) * WEIGHT_TILE_BYTES + lane * 16;
        uint4 words = load_shared((const uint4 *)(const void *)from);
        fp4_operand<KIND>(a[0][m], words.x, words.y);
        fp4_operand<KIND>(a[1][m], words.z, words.w);
#pragma unroll
        for (int part = 0; part < 2; part++) {
            const uint8_t *scale = scales + (row_tile * TILING::GROUPS + (TILE * 2 + part) * PART_GROUPS) * 16 + g;
            if (KIND == WEIGHT_MXFP4)
                a_scale[part][m] = load_shared(scale + (t & 1) * 8);
#pragma unroll
            for (int half = 0; half < PART_GROUPS && KIND == WEIGHT_NVFP4; half++) {
                uint32_t low = load_shared(scale + half * 16), high = load_shared(scale + half * 16 + 8);
                uint32_t both = e4m3x2_to_half2((uint16_t)(low | high << 8));
                w_scale[part][m][half][0] = half_to_float((uint16_t)both);
                w_scale[part][m][half][1] = half_to_float((uint16_t)(both >> 16));
            }
        }
    }
#pragma unroll
    for (int n = 0; n < TOKEN_TILES; n++) {
        const uint8_t *from = x + (n * TILE_TOKENS + g) * STEP_COLS + x_slot(g, TILE * 4 + t) * 16;
        uint4 words = load_shared((const uint4 *)(const void *)from);
        uint32_t b[2][2] = {{words.x, words.y}, {words.z, words.w}}, x_scale[2];
        if (KIND == WEIGHT_MXFP4) {
            x_scale[0] = x_scale[1] = load_shared(x_scales + n * TILE_TOKENS + g);
        } else {
            uint2 two = load_shared((const uint2 *)(const void *)(x_scales + n * TILE_TOKENS + t * 2));
            x_scale[0] = two.x, x_scale[1] = two.y;
        }
#pragma unroll
        for (int m = 0; m < ROW_TILES; m++) {
            add_part<KIND, TILE * 2>(y[m][n], a[0][m], b[0], a_scale[0][m], w_scale[0][m], x_scale);
            add_part<KIND, TILE * 2 + 1>(y[m][n], a[1][m], b[1], a_scale[1][m], w_scale[1][m], x_scale);
        }
    }
}

template <int KIND, int ROW_TILES, int TOKEN_TILES, int ROW_WARPS, int TOKEN_WARPS, int STAGES>
__global__ void __launch_bounds__(32 * ROW_WARPS * TOKEN_WARPS, 1)
    linear_fp4(struct linear l, int64_t row_tiles, int token_blocks)
{
    typedef struct tiling<KIND, ROW_TILES, TOKEN_TILES, ROW_WARPS, TOKEN_WARPS, STAGES> tiling;
    SHARED_DYNAMIC(uint8_t, shared);
    int lane = (int)threadIdx.x & 31, thread = (int)threadIdx.x;
    struct warp_place at = warp_place_of<tiling>(l, token_blocks, ROW_WARPS, ROW_TILES, TOKEN_TILES);
    float y[ROW_TILES][TOKEN_TILES][4];
    run_steps<tiling, STAGES, uint32_t>(
        y, l.steps, shared, at.has_tokens,
        [&](uint8_t *stage, int step) {
            copy_step<tiling>(l, stage, step, at.row_tile_begin, row_tiles, at.token_begin);
        },
        [&](int step) { return x_scales_of(l, at.token_begin + thread, step); },
        [&](const uint8_t *stage, const uint32_t *x_scales) {
            const uint8_t *scales = stage + tiling::SCALE_AT, *x = stage + tiling::X_AT + at.first_token * STEP_COLS;
            const uint32_t *x_scale = x_scales + at.first_token;
            add_tile<KIND, ROW_TILES, TOKEN_TILES, 0, tiling>(y, stage, scales, x, x_scale, at.row_tile, lane);
            add_tile<KIND, ROW_TILES, TOKEN_TILES, 1, tiling>(y, stage, scales, x, x_scale, at.row_tile, lane);
        });

#pragma unroll
    for (int m = 0; m < ROW_TILES; m++)
#pragma unroll
        for (int high = 0; high < 2; high++) {
            int64_t row = (at.row_tile_begin + at.row_tile + m) * TILE_ROWS + high * 8 + (lane >> 2);
            if (row >= l.out_rows)
                continue;
            float global = 1.0f;
            if (KIND == WEIGHT_NVFP4) { // behind the scales of 64 rows their factors
                const uint8_t *block =
                    (const uint8_t *)l.weight_scale + row / 64 * (4 * l.scale_tile_bytes + l.scale_block_more);
                global = ((const float *)(const void *)(block + 4 * l.scale_tile_bytes))[row % 64];
            }
#pragma unroll
            for (int n = 0; n < TOKEN_TILES; n++)
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    int64_t token = at.token_begin + at.first_token + n * TILE_TOKENS + (lane & 3) * 2 + k;
                    float sum = y[m][n][high * 2 + k];
                    if (token < l.tokens)
                        l.y[token * l.y_stride + row] = KIND == WEIGHT_NVFP4 ? sum * 64.0f * global : sum;
                }
        }
}

template <int KIND, int ROW_TILES, int TOKEN_TILES, int ROW_WARPS, int TOKEN_WARPS, int STAGES>
cudaError_t launch(const struct linear *l, const struct weight_shape *shape, cudaStream_t stream)
{
    typedef struct tiling<KIND, ROW_TILES, TOKEN_TILES, ROW_WARPS, TOKEN_WARPS, STAGES> tiling;
    int64_t token_blocks = (l->tokens + tiling::TOKENS - 1) / tiling::TOKENS;
    int64_t row_blocks = (l->out_rows + tiling::ROWS - 1) / tiling::ROWS;
    return LAUNCH((linear_fp4<KIND, ROW_TILES, TOKEN_TILES, ROW_WARPS, TOKEN_WARPS, STAGES>),
                  (unsigned)(row_blocks * token_blocks), tiling::THREADS, tiling::SHARED_BYTES, stream, *l,
                  (int64_t)(shape->rows_padded / TILE_ROWS), (int)token_blocks);
}

// The larger block where there are enough for most of a device's multiprocessors. nvfp4's scales need registers.
template <int KIND>
cudaError_t launch_for_size(const struct linear *l, const struct weight_shape *shape, cudaStream_t stream)
{
    enum { ENOUGH = 96, TOKEN_TILES = KIND == WEIGHT_MXFP4 ? 8 : 4, TOKENS = TOKEN_TILES * 2 * TILE_TOKENS };
    if (((l->out_rows + 127) / 128) * ((l->tokens + TOKENS - 1) / TOKENS) >= ENOUGH)
        return launch<KIND, 2, TOKEN_TILES, 4, 2, 3>(l, shape, stream); // 128 x 128, 128 x 64
    return launch<KIND, 1, 4, 4, 2, 4>(l, shape, stream);               // 64 x 64
}

} // namespace

extern "C" cudaError_t launch_linear_fp4(float *y, int64_t y_stride, const struct matrix *w, struct device_input in,
                                         int64_t rows, cudaStream_t stream)
{
    if (rows <= 0 || w->shape.rows == 0)
        return cudaSuccess;
    if (w->shape.kind != WEIGHT_MXFP4 && w->shape.kind != WEIGHT_NVFP4)
        return cudaErrorInvalidValue;
    struct linear l = linear_of(y, y_stride, w, in, rows, 1);
    if (w->shape.cols == 0)
        return launch_without_columns(&l, stream);
    return w->shape.kind == WEIGHT_MXFP4 ? launch_for_size<WEIGHT_MXFP4>(&l, &w->shape, stream)
                                         : launch_for_size<WEIGHT_NVFP4>(&l, &w->shape, stream);
}
