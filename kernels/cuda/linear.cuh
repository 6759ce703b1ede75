// What the matrix products share: the arguments, weights on their way from memory to the tensor cores' operand A, inputs on their way
// to operand B. The products themselves are in linear_f16.cu, linear_int8.cu (few rows) and linear_int8_tiles.cu (many).
//
// In all of them the weights are operand A (16 rows of the matrix) and the rows of the input, here called tokens, are operand B
// (8 at a time). K goes by in steps of 128 columns, two column tiles of 64. In operand fragments lane = 4 g + t: of A it holds rows g and g + 8,
// of B token g, of the result rows g and g + 8 (elements 0, 1 and 2, 3) of tokens 2 t and 2 t + 1. Which columns a lane feeds into one
// multiplication is free as long as A and B agree: they follow the order in which weights lie in memory.
#ifndef TPSHARD_KERNELS_CUDA_LINEAR_CUH
#define TPSHARD_KERNELS_CUDA_LINEAR_CUH

#include "kernels/cuda/launch.h"
#include "kernels/cuda/primitives.cuh"

struct linear {
    float *y;
    int64_t y_stride;
    const uint8_t *weights;
    const void *weight_scale;
    const uint8_t *x;
    const float *x_scale;
    int64_t x_row_bytes, x_groups; // of one token: bytes in x, 128-column groups in x_scale (int8)
    int64_t tokens;
    int64_t out_rows, weight_row_bytes;
    int32_t col_tiles, steps; // of 64 and of 128 columns; the last step may lack its second tile
    int32_t split_bits;       // few tokens: 2^split_bits warps take turns in the steps of one tile of rows
    int64_t scale_tile_bytes; // scales of the groups of one tile of rows
    int64_t scale_block_more; // bytes behind those of four tiles
};

// int8 products of many tokens; the rows of w are shared out in blocks whose size depends on how many there are.
cudaError_t linear_int8_tiles(const struct linear *l, const struct weight_shape *shape, cudaStream_t stream);

namespace
{

enum {
    STEP_COLS = 128,
    TILE_COLS = 64,
    TILE_ROWS = 16,
    TILE_TOKENS = 8,
    ACCUMULATOR_BYTES = 512, // of a warp: 16 rows x 8 tokens
};

inline struct linear linear_of(float *y, int64_t y_stride, const struct matrix *w, struct device_input in,
                               int64_t tokens, int64_t x_elem_bytes)
{
    struct linear l;
    l.y = y;
    l.y_stride = y_stride;
    l.weights = (const uint8_t *)w->data;
    l.weight_scale = w->scale;
    l.x = (const uint8_t *)in.values;
    l.x_scale = in.scale;
    l.x_row_bytes = in.stride * x_elem_bytes;
    l.x_groups = in.stride / ACT_GROUP;
    l.tokens = tokens;
    l.out_rows = (int64_t)w->shape.rows;
    l.weight_row_bytes = (int64_t)(w->shape.rows_padded ? w->shape.data_bytes / w->shape.rows_padded : 0);
    l.col_tiles = (int32_t)(w->shape.cols_padded / TILE_COLS);
    l.steps = (l.col_tiles + 1) / 2;
    l.split_bits = 0;
    l.scale_block_more = w->shape.kind == WEIGHT_NVFP4 ? WEIGHT_ROW_UNIT * (int64_t)sizeof(float) : 0;
    l.scale_tile_bytes =
        w->shape.rows_padded ? (int64_t)(w->shape.scale_bytes / (w->shape.rows_padded / WEIGHT_ROW_UNIT)) / 4 : 0;
    l.scale_tile_bytes -= l.scale_block_more / 4;
    return l;
}

// A rank may hold no column of a matrix: its product is zero.
__global__ void linear_without_columns(struct linear l)
{
    int64_t row = (int64_t)blockIdx.x * 256 + threadIdx.x;
    for (int64_t token = 0; token < l.tokens && row < l.out_rows; token++)
        l.y[token * l.y_stride + row] = 0.0f;
}

inline cudaError_t launch_without_columns(const struct linear *l, cudaStream_t stream)
{
    return LAUNCH(linear_without_columns, (unsigned)((l->out_rows + 255) / 256), 256, 0, stream, *l);
}

// ---- weights -----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t word_of(const uint4 &v, int i)
{
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// Codes of four bits in T16x64 tiles.
#define IS_TILED(KIND)                                                                                                 \
    ((KIND) == WEIGHT_INT4 || (KIND) == WEIGHT_INT4Z || (KIND) == WEIGHT_NL4 || (KIND) == WEIGHT_MXFP4 ||              \
     (KIND) == WEIGHT_NVFP4)
// 16-byte loads that a lane makes for its part of one step of a tile of rows.
#define STEP_LOADS(KIND) (IS_TILED(KIND) ? 2 : (KIND) == WEIGHT_BF16 ? 8 : 4)
// Bytes of what a group of 16 rows has: f16 scales; f16 scales and zeros; f32 scales; scales of a byte.
#define GROUP_BYTES(KIND)                                                                                              \
    ((KIND) == WEIGHT_INT4 || (KIND) == WEIGHT_NL4 ? 32 : (KIND) == WEIGHT_INT4Z || (KIND) == WEIGHT_FP8G ? 64 : 16)

// Where a lane's part of a tile of rows begins.
template <int KIND>
__device__ __forceinline__ const uint8_t *weights_of_lane(const struct linear &l, int64_t row_tile, int lane)
{
    if (IS_TILED(KIND))
        return l.weights + ((row_tile >> 2) * l.col_tiles * 4 + (row_tile & 3)) * WEIGHT_TILE_BYTES + lane * 16;
    return l.weights + (row_tile * TILE_ROWS + (lane >> 2)) * l.weight_row_bytes + (lane & 3) * 16;
}

// A lane's part of one step: for each column tile
//   four bits   the 16 bytes of T16x64
//   a byte      16 columns from 16 t on, of row g and then of row g + 8
//   bf16        for each half of 32 columns: 8 columns from 8 t on, of row g and then of row g + 8
// A missing second tile reads as zeros; WHOLE: it is there. Every request of a warp is made of whole sectors; that of four bits is 512 bytes side
// by side.
template <int KIND, bool WHOLE>
__device__ __forceinline__ void load_step(uint4 (&w)[STEP_LOADS(KIND)], const struct linear &l,
                                          const uint8_t *lane_weights, int step)
{
    enum {
        LOADS = STEP_LOADS(KIND) / 2,
        TILE_BYTES = IS_TILED(KIND)        ? 4 * WEIGHT_TILE_BYTES
                     : KIND == WEIGHT_BF16 ? 2 * TILE_COLS
                                           : TILE_COLS,
    };
    const uint8_t *p = lane_weights + (int64_t)step * (2 * TILE_BYTES);
    const uint8_t *p8 = IS_TILED(KIND) ? p : p + 8 * l.weight_row_bytes;
    bool both = WHOLE || 2 * step + 1 < l.col_tiles;
#pragma unroll
    for (int tile = 0; tile < 2; tile++)
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            const uint8_t *from = (i & 1 ? p8 : p) + tile * TILE_BYTES + (i >> 1) * 64;
            if (!WHOLE)
                w[tile * LOADS + i] = make_uint4(0, 0, 0, 0);
            if (tile == 0 || both)
                w[tile * LOADS + i] = load_weights((const uint4 *)(const void *)from);
        }
}

// ---- inputs of few tokens, staged in shared memory -----------------------------------------------------------------------

// A stage holds one panel, that is the next step of each of the warps that share a tile of rows:
//   x      [splits][TOKENS][STEP_BYTES]; the 16-byte slots of odd tokens are exchanged (x_slot), so that a quarter of a warp,
//          which reads two tokens, meets every bank once
//   scale  [tiles of rows][splits][groups of a step], GROUP_BYTES of the kind each
// Tokens that are not there are never written: what stands in their columns of B touches no other column.
__device__ __forceinline__ int x_slot(int token, int slot) { return slot ^ ((token & 1) * 5); }

// What a thread copies of each panel, and how far it has come.
struct stager {
    const uint8_t *x; // of its first token, in the next panel; with tokens by a list: of row 0
    int x_at;         // offset in a stage
    int token, token_step;
    int step;             // of the next panel, that it copies of
    const uint8_t *scale; // in the next panel; NULL: this thread copies none
    int scale_at;
    int64_t groups_left; // of this row of scales, from the next panel's on
};

// PIECES: 16 bytes each of a step's scales of a tile of rows; of each group GROUP_PIECES.
template <int STEP_BYTES, int TOKENS, int PIECES, int GROUP_PIECES, bool LISTED>
__device__ __forceinline__ struct stager stager_make(const struct linear &l, int64_t token_begin,
                                                     int64_t row_tile_begin, int row_tiles)
{
    enum { STEP_CHUNKS = STEP_BYTES / 16 };
    struct stager s;
    int chunks = STEP_CHUNKS << l.split_bits, thread = (int)threadIdx.x;
    int chunk = thread & (chunks - 1);
    s.token = thread / chunks;
    s.token_step = (int)blockDim.x / chunks; // even: the exchange of slots stays the same
    s.step = chunk / STEP_CHUNKS;
    s.x = l.x + (LISTED ? 0 : (token_begin + s.token) * l.x_row_bytes) + chunk * 16;
    s.x_at = (s.step * TOKENS + s.token) * STEP_BYTES + x_slot(s.token, chunk % STEP_CHUNKS) * 16;
    s.scale = NULL;
    s.groups_left = 0;
    if (PIECES > 0) {
        int panel = PIECES << l.split_bits; // pieces of one tile of rows
        int64_t groups = l.scale_tile_bytes / (GROUP_PIECES * 16), row_tile = row_tile_begin + thread / panel;
        if (thread < panel * row_tiles)
            s.scale = (const uint8_t *)l.weight_scale + row_tile * l.scale_tile_bytes +
                      row_tile / 4 * l.scale_block_more + thread % panel * 16;
        s.scale_at = ((TOKENS * STEP_BYTES) << l.split_bits) + thread * 16;
        s.groups_left = groups - thread % panel / GROUP_PIECES;
    }
    return s;
}

// Starts the copies of the next panel, of its tokens from token_begin on; rows: of each of these, their row of the input (LISTED). WHOLE:
// the panel has all its steps. last: the panel's last part.
template <int STEP_BYTES, int PIECES, int GROUP_PIECES, bool WHOLE, bool LISTED>
__device__ __forceinline__ void stager_copy(const struct linear &l, struct stager &s, uint8_t *stage,
                                            const int32_t *rows, int token_begin, int tokens, bool last)
{
    if (WHOLE || s.step < l.steps) {
        const uint8_t *x = token_begin ? s.x + token_begin * l.x_row_bytes : s.x;
        uint8_t *to = stage + s.x_at;
        for (int token = s.token; token < tokens; token += s.token_step) {
            copy_async16(to, LISTED ? s.x + rows[token_begin + token] * l.x_row_bytes : x, true);
            x += s.token_step * l.x_row_bytes;
            to += s.token_step * STEP_BYTES;
        }
    }
    if (PIECES > 0 && s.scale) {
        bool valid = WHOLE || s.groups_left > 0;
        copy_async16(stage + s.scale_at, valid ? s.scale : (const uint8_t *)l.weight_scale, valid);
    }
    if (last) {
        s.x += STEP_BYTES << l.split_bits;
        s.step += 1 << l.split_bits;
        if (PIECES > 0 && s.scale)
            s.scale += (PIECES * 16) << l.split_bits;
        s.groups_left -= (PIECES / (GROUP_PIECES ? GROUP_PIECES : 1)) << l.split_bits;
    }
}

// ---- int8 fragments ----------------------------------------------------------------------------------------------------

// One step of 16 rows as four operands A of 32 columns each. int4 becomes 16 times its value: a nibble in the upper half of a byte.
template <int KIND>
__device__ __forceinline__ void int8_operands(uint32_t (&a)[4][4], const uint4 (&w)[STEP_LOADS(KIND)])
{
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (KIND == WEIGHT_INT4) {
            uint32_t first = word_of(w[i / 2], i % 2 * 2), second = word_of(w[i / 2], i % 2 * 2 + 1);
            a[i][0] = (first << 4) & 0xf0f0f0f0u;
            a[i][1] = first & 0xf0f0f0f0u;
            a[i][2] = (second << 4) & 0xf0f0f0f0u;
            a[i][3] = second & 0xf0f0f0f0u;
        } else {
            a[i][0] = word_of(w[i / 2 * 2], i % 2 * 2);
            a[i][1] = word_of(w[i / 2 * 2 + 1], i % 2 * 2);
            a[i][2] = word_of(w[i / 2 * 2], i % 2 * 2 + 1);
            a[i][3] = word_of(w[i / 2 * 2 + 1], i % 2 * 2 + 1);
        }
    }
}

// Sums start at the bits of a float whose last place is worth 1 (int8) or 16 sixteenths (int4, whose codes are 16 times too large):
// then the sum's bits minus that float are the dot product as a float, without a conversion. |sum| <= 128 * 127 * 128 < 2^22.
template <int KIND> __device__ __forceinline__ void dot_start(int (&c)[4])
{
    c[0] = c[1] = c[2] = c[3] = KIND == WEIGHT_INT4 ? 0x49400000 : 0x4b400000;
}

template <int KIND> __device__ __forceinline__ float dot_value(int c)
{
    return __int_as_float(c) - (KIND == WEIGHT_INT4 ? 0x1.8p19f : 0x1.8p23f);
}

// The terms of one step, one per group of the weights (of a step, for int8): dot * (scale_w * q_scale), dot * q_scale.
//   b          the two column tiles of operand B
//   row_scale  of rows g, g + 8, per group (int4)
//   q_scale    of tokens 2 t, 2 t + 1
template <int KIND, int GROUPS>
__device__ __forceinline__ void int8_terms(float (&term)[GROUPS][4], const uint32_t (&a)[4][4], const uint4 (&b)[2],
                                           const float (&row_scale)[GROUPS][2], const float2 &q_scale)
{
    int c[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint32_t operand[2] = {word_of(b[i / 2], i % 2 * 2), word_of(b[i / 2], i % 2 * 2 + 1)};
        if (i % (4 / GROUPS) == 0)
            dot_start<KIND>(c);
        mma_int8(c, a[i], operand);
        if ((i + 1) % (4 / GROUPS) == 0) {
            int group = i * GROUPS / 4;
#pragma unroll
            for (int k = 0; k < 4; k++) {
                float q = k & 1 ? q_scale.y : q_scale.x;
                term[group][k] = dot_value<KIND>(c[k]) * (KIND == WEIGHT_INT4 ? row_scale[group][k >> 1] * q : q);
            }
        }
    }
}

// Scales of a step's groups for rows g and g + 8, from f16 [GROUPS][16] in shared memory.
template <int GROUPS>
__device__ __forceinline__ void int4_row_scales(float (&row_scale)[GROUPS][2], const uint8_t *scales, int g)
{
#pragma unroll
    for (int i = 0; i < GROUPS; i++) {
        row_scale[i][0] = half_to_float(*(const uint16_t *)(const void *)(scales + i * 32 + g * 2));
        row_scale[i][1] = half_to_float(*(const uint16_t *)(const void *)(scales + i * 32 + g * 2 + 16));
    }
}

} // namespace

#endif
