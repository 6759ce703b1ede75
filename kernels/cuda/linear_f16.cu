// Matrix products with weights widened in registers (int4 and e4m3 to f16, bf16 as it is) and f32 sums: made for a few tokens, where
// reading the weights is all that takes time.
//
// A block takes a few tiles of 16 rows. Of each tile, 4 or 8 warps share the columns: step s (128 columns) belongs to warp s mod splits, and
// each warp's sums are added at the end in the order of the warps. How many is fixed by the matrix's shape, so that a token's
// result does not depend on its company. Weights go from memory to registers, several steps ahead; inputs go through shared memory,
// one panel (a step for each warp) at a time, for all tiles of the block.
#include "kernels/cuda/linear.cuh"

namespace
{

enum { X_STEP_BYTES = STEP_COLS * 2 };

// Tokens of a stage: 64 would not leave room for two stages, so they come in two parts, and the weights are widened twice.
#define PART_TILES(TILES) ((TILES) < 4 ? (TILES) : 4)
#define STAGES(TILES) ((TILES) == 1 ? 4 : (TILES) == 2 ? 3 : 2)
#define GROUPS_OF(GROUP) ((GROUP) ? STEP_COLS / (GROUP) : 0)
// Steps of weights on their way: 8 loads of 16 bytes a lane; 4 for int4 where many sums need registers.
#define DEPTH(KIND, TILES) ((KIND) == WEIGHT_BF16 ? 1 : (KIND) == WEIGHT_INT4 && (TILES) == 1 ? 4 : 2)

// Two operands A of 16 columns each: half `half` of a column tile. w: the loads of that tile.
template <int KIND> __device__ __forceinline__ void f16_operands(uint32_t (&a)[2][4], const uint4 *w, int half)
{
#pragma unroll
    for (int i = 0; i < 2; i++) {
        if (KIND == WEIGHT_INT4) {
            // (nibble ^ 8) in the mantissa of 1024 is 1032 + q; four bits higher it is 1152 + 16 q.
            uint32_t q = word_of(w[0], half * 2 + i), q8 = q >> 8;
            a[i][0] = fma_half2(lop3<0x6a>(q, 0x000f000fu, 0x64086408u), 0x3c003c00u, 0xe408e408u);
            a[i][1] = fma_half2(lop3<0x6a>(q, 0x00f000f0u, 0x64806480u), 0x2c002c00u, 0xd480d480u);
            a[i][2] = fma_half2(lop3<0x6a>(q8, 0x000f000fu, 0x64086408u), 0x3c003c00u, 0xe408e408u);
            a[i][3] = fma_half2(lop3<0x6a>(q8, 0x00f000f0u, 0x64806480u), 0x2c002c00u, 0xd480d480u);
        } else if (KIND == WEIGHT_FP8) {
            uint32_t low = word_of(w[0], half * 2 + i), high = word_of(w[1], half * 2 + i);
            a[i][0] = e4m3x2_to_half2((uint16_t)low);
            a[i][1] = e4m3x2_to_half2((uint16_t)high);
            a[i][2] = e4m3x2_to_half2((uint16_t)(low >> 16));
            a[i][3] = e4m3x2_to_half2((uint16_t)(high >> 16));
        } else {
            a[i][0] = word_of(w[half * 2], i * 2);
            a[i][1] = word_of(w[half * 2 + 1], i * 2);
            a[i][2] = word_of(w[half * 2], i * 2 + 1);
            a[i][3] = word_of(w[half * 2 + 1], i * 2 + 1);
        }
    }
}

template <int KIND>
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    uint32_t b[2] = {b0, b1};
    if (KIND == WEIGHT_BF16)
        mma_bf16(c, a, b);
    else
        mma_f16(c, a, b);
}

// Adds one step's products to acc. int4: the sum of a group is multiplied by the group's scale, not the weights.
//   x       this warp's step of the stage
//   scales  f16 [groups][16] of this warp's step
template <int KIND, int GROUP, int TILES>
__device__ __forceinline__ void add_step(float (*acc)[4], const uint4 (&w)[STEP_LOADS(KIND)], const uint8_t *x,
                                         const uint8_t *scales, int lane)
{
    enum { LOADS = STEP_LOADS(KIND) / 2, GROUPS = GROUP ? STEP_COLS / GROUP : 1 };
    int g = lane >> 2, t = lane & 3;
    float row_scale[1][2], c[TILES][4];
#pragma unroll
    for (int half = 0; half < 4; half++) { // 32 columns each
        int slot = KIND == WEIGHT_BF16 ? half % 2 * 4 + t : t * 2 + half % 2;
        const uint8_t *from = x + g * X_STEP_BYTES + half / 2 * 128 + x_slot(g, slot) * 16;
        if (GROUP && half % (4 / GROUPS) == 0)
            int4_row_scales<1>(row_scale, scales + half * GROUPS / 4 * 32, g);
        uint32_t a[2][4];
        f16_operands<KIND>(a, w + half / 2 * LOADS, half % 2);
#pragma unroll
        for (int n = 0; n < TILES; n++) {
            uint4 b = load_shared((const uint4 *)(const void *)(from + n * TILE_TOKENS * X_STEP_BYTES));
            float(&sum)[4] = GROUP ? c[n] : acc[n];
            if (GROUP && half % (4 / GROUPS) == 0)
                sum[0] = sum[1] = sum[2] = sum[3] = 0.0f;
            multiply<KIND>(sum, a[0], b.x, b.y);
            multiply<KIND>(sum, a[1], b.z, b.w);
            if (GROUP && (half + 1) % (4 / GROUPS) == 0)
#pragma unroll
                for (int k = 0; k < 4; k++)
                    acc[n][k] = fmaf(sum[k], row_scale[0][k >> 1], acc[n][k]);
        }
    }
}

// Adds what the warps of a tile of rows have, in their order, and writes it. sums: [tiles of rows][splits][TILES][32 lanes][4].
template <int KIND, int TILES>
__device__ __forceinline__ void write_sums(const struct linear &l, const float *sums, int64_t row_tile,
                                           int64_t token_begin, int tile_in_block, int split, int lane)
{
    int splits = 1 << l.split_bits, element = split * 32 + lane, owner = element >> 2;
    int64_t row = row_tile * TILE_ROWS + (owner >> 2) + (element & 2) * 4;
    if (split >= 4 || row >= l.out_rows)
        return;
    float row_scale = KIND == WEIGHT_FP8 ? ((const float *)l.weight_scale)[row] : KIND == WEIGHT_INT4 ? 0x1p-8f : 1.0f;
#pragma unroll
    for (int n = 0; n < TILES; n++) {
        int64_t token = token_begin + n * TILE_TOKENS + (owner & 3) * 2 + (element & 1);
        float y = 0.0f;
        for (int s = 0; s < splits; s++)
            y += load_shared(sums + (((tile_in_block << l.split_bits) + s) * TILES + n) * 128 + element);
        if (token < l.tokens)
            l.y[token * l.y_stride + row] = y * row_scale * (KIND == WEIGHT_BF16 ? 1.0f : l.x_scale[token]);
    }
}

// What a block works with, and how far it has come. A phase is one part of the tokens of one panel, and has its stage in turn.
struct place {
    const uint8_t *weights; // of the lane
    uint8_t *shared;
    int stage_bytes, x_at, scale_at; // of the warp's step in a stage
    int lane, split, tokens, panels;
    int stage, next_stage, next; // next: the first phase whose copies have not started
};

// Starts the copies of the next phase. Past the last one only the count goes on. WHOLE: it belongs to a panel with all its steps.
template <int GROUP, int TILES, bool WHOLE>
__device__ __forceinline__ void copy_phase(const struct linear &l, struct stager &stager, struct place &at)
{
    enum { PARTS = TILES / PART_TILES(TILES), PART_TOKENS = PART_TILES(TILES) * TILE_TOKENS };
    int part = at.next % PARTS, begin = part * PART_TOKENS;
    if (WHOLE || at.next < at.panels * PARTS)
        stager_copy<X_STEP_BYTES, GROUPS_OF(GROUP), WHOLE>(l, stager, at.shared + at.next_stage * at.stage_bytes, begin,
                                                           min(at.tokens - begin, (int)PART_TOKENS), part == PARTS - 1);
    copy_async_commit();
    at.next++;
    at.next_stage = at.next_stage + 1 == STAGES(TILES) ? 0 : at.next_stage + 1;
}

// One panel: the warp's step, with the weights in w, which then receive the step that is AHEAD panels further. WHOLE: all that is begun or
// waited for here belongs to panels with all their steps.
template <int KIND, int GROUP, int TILES, bool WHOLE>
__device__ __forceinline__ void add_panel(float (&acc)[TILES][4], uint4 (&w)[STEP_LOADS(KIND)], const struct linear &l,
                                          struct stager &stager, struct place &at, int panel)
{
    enum { PART = PART_TILES(TILES), PARTS = TILES / PART, AHEAD = DEPTH(KIND, TILES) };
    int step = (panel << l.split_bits) + at.split, next_step = step + (AHEAD << l.split_bits);
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        copy_async_wait<STAGES(TILES) - 2>();
        __syncthreads(); // the stage is there for all, and all are done with the one before it
        copy_phase<GROUP, TILES, WHOLE>(l, stager, at);
        if (WHOLE || step < l.steps) {
            const uint8_t *from = at.shared + at.stage * at.stage_bytes;
            add_step<KIND, GROUP, PART>(acc + part * PART, w, from + at.x_at, from + at.scale_at, at.lane);
        }
        at.stage = at.stage + 1 == STAGES(TILES) ? 0 : at.stage + 1;
    }
    if (WHOLE || next_step < l.steps)
        load_step<KIND, WHOLE>(w, l, at.weights, next_step);
}

// One block: blockDim.x / 32 / splits tiles of 16 rows, 8 * TILES tokens.
template <int KIND, int GROUP, int TILES>
__global__ void __launch_bounds__(256, TILES < 4 ? 2 : 1) linear_f16(struct linear l, int stage_bytes)
{
    enum {
        PARTS = TILES / PART_TILES(TILES),
        PART_TOKENS = PART_TILES(TILES) * TILE_TOKENS,
        AHEAD = DEPTH(KIND, TILES),
        REACH = AHEAD > STAGES(TILES) - 1 ? AHEAD
                                          : STAGES(TILES) - 1, // panels between a load or a copy and its use, at most
        GROUPS = GROUPS_OF(GROUP),
    };
    SHARED_DYNAMIC(uint8_t, shared);
    int warp = (int)threadIdx.x >> 5, splits = 1 << l.split_bits, tile_in_block = warp >> l.split_bits;
    int row_tiles = (int)blockDim.x >> (5 + l.split_bits);
    int64_t row_tile = (int64_t)blockIdx.x * row_tiles + tile_in_block;
    int64_t token_begin = (int64_t)blockIdx.y * TILES * TILE_TOKENS;
    struct place at;
    at.lane = (int)threadIdx.x & 31;
    at.split = warp & (splits - 1);
    at.weights = weights_of_lane<KIND>(l, row_tile, at.lane);
    at.shared = shared;
    at.stage_bytes = stage_bytes;
    at.x_at = at.split * PART_TOKENS * X_STEP_BYTES;
    at.scale_at = ((PART_TOKENS * X_STEP_BYTES) << l.split_bits) + warp * GROUPS * 32;
    at.tokens = (int)min((int64_t)TILES * TILE_TOKENS, l.tokens - token_begin);
    at.panels = (l.steps + splits - 1) >> l.split_bits;
    at.stage = at.next_stage = at.next = 0;

    uint4 w[AHEAD][STEP_LOADS(KIND)];
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
        if (i * splits + at.split < l.steps)
            load_step<KIND, false>(w[i], l, at.weights, i * splits + at.split);
    struct stager stager =
        stager_make<X_STEP_BYTES, PART_TOKENS, GROUPS>(l, token_begin, (int64_t)blockIdx.x * row_tiles, row_tiles);
#pragma unroll
    for (int i = 0; i < STAGES(TILES) - 1; i++)
        copy_phase<GROUP, TILES, false>(l, stager, at);

    float acc[TILES][4];
#pragma unroll
    for (int n = 0; n < TILES; n++)
        acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0.0f;
    int panel = 0, whole = (l.col_tiles / 2) >> l.split_bits;
    for (; panel + AHEAD + REACH <= whole; panel += AHEAD)
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            add_panel<KIND, GROUP, TILES, true>(acc, w[i], l, stager, at, panel + i);
    for (; panel < at.panels; panel += AHEAD)
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            if (panel + i < at.panels)
                add_panel<KIND, GROUP, TILES, false>(acc, w[i], l, stager, at, panel + i);

    copy_async_wait<0>();
    __syncthreads();
    float *sums = (float *)(void *)shared;
#pragma unroll
    for (int n = 0; n < TILES; n++)
        store_shared((float4 *)(void *)(sums + ((warp * TILES + n) * 32 + at.lane) * 4),
                     make_float4(acc[n][0], acc[n][1], acc[n][2], acc[n][3]));
    __syncthreads();
    write_sums<KIND, TILES>(l, sums, row_tile, token_begin, tile_in_block, at.split, at.lane);
}

template <int KIND, int GROUP, int TILES> cudaError_t launch(const struct linear *l, cudaStream_t stream)
{
    int splits = 1 << l->split_bits;
    int row_tiles = 8 / splits;
    int stage_bytes = splits * (PART_TILES(TILES) * TILE_TOKENS * X_STEP_BYTES + row_tiles * GROUPS_OF(GROUP) * 32);
    int sums_bytes = row_tiles * splits * TILES * ACCUMULATOR_BYTES;
    int shared_bytes = max(STAGES(TILES) * stage_bytes, sums_bytes);
    dim3 grid((unsigned)((l->out_rows + row_tiles * TILE_ROWS - 1) / (row_tiles * TILE_ROWS)),
              (unsigned)((l->tokens + TILES * TILE_TOKENS - 1) / (TILES * TILE_TOKENS)));
    return LAUNCH((linear_f16<KIND, GROUP, TILES>), grid, 256, shared_bytes, stream, *l, stage_bytes);
}

template <int KIND, int GROUP> cudaError_t launch_for_tokens(const struct linear *l, cudaStream_t stream)
{
    int64_t most =
        l->split_bits == 3 ? 16 : 64; // 8 warps' panels leave room for 16 tokens; further ones reread a small matrix
    int64_t tokens = l->tokens < most ? l->tokens : most;
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
    if (w->shape.cols == 0)
        return launch_without_columns(&l, stream);
    l.split_bits = w->shape.rows_padded < 2048 ? 3 : 2;
    if (w->shape.kind == WEIGHT_BF16)
        return launch_for_tokens<WEIGHT_BF16, 0>(&l, stream);
    if (w->shape.kind == WEIGHT_FP8)
        return launch_for_tokens<WEIGHT_FP8, 0>(&l, stream);
    if (w->shape.kind != WEIGHT_INT4)
        return cudaErrorInvalidValue;
    return w->shape.group_size == 128  ? launch_for_tokens<WEIGHT_INT4, 128>(&l, stream)
           : w->shape.group_size == 64 ? launch_for_tokens<WEIGHT_INT4, 64>(&l, stream)
                                       : launch_for_tokens<WEIGHT_INT4, 32>(&l, stream);
}
