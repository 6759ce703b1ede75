// One block of a matrix product with weights widened in registers (to f16; bf16 as it is) and f32 sums: made for a few tokens, where reading
// the weights is all that takes time. linear_f16.cu multiplies rows that stand one behind the other, linear_experts.cu those of a list.
//
// A block takes a few tiles of 16 rows. Of each tile, 4 or 8 warps share the columns: step s (128 columns) belongs to warp s mod splits, and
// each warp's sums are added at the end in the order of the warps. How many is fixed by the matrix's shape, so that a token's
// result does not depend on its company. Weights go from memory to registers, several steps ahead; inputs go through shared memory,
// one panel (a step for each warp) at a time, for all tiles of the block.
#ifndef TPSHARD_KERNELS_CUDA_LINEAR_F16_CUH
#define TPSHARD_KERNELS_CUDA_LINEAR_F16_CUH

#include "kernels/cuda/linear.cuh"

namespace
{

enum { X_STEP_BYTES = STEP_COLS * 2 };

// Tokens of a stage: 64 would not leave room for two stages, so they come in two parts, and the weights are widened twice.
#define PART_TILES(TILES) ((TILES) < 4 ? (TILES) : 4)
// Of 16 tokens with the scales and zeros of groups of 32, a third stage does not fit into 99 KiB.
#define STAGES_OF(KIND, GROUP, TILES)                                                                                  \
    ((TILES) == 1 ? 4 : (TILES) == 2 && !((KIND) == WEIGHT_INT4Z && (GROUP) == 32) ? 3 : 2)
#define GROUPS_OF(GROUP) ((GROUP) ? STEP_COLS / (GROUP) : 0)
#define PIECES_OF(KIND, GROUP) (GROUPS_OF(GROUP) * GROUP_BYTES(KIND) / 16), (GROUP_BYTES(KIND) / 16)
// Steps of weights on their way: 8 loads of 16 bytes a lane; 4 for four bits where many sums need registers.
#define DEPTH(KIND, TILES) ((KIND) == WEIGHT_BF16 ? 1 : IS_TILED(KIND) && (TILES) == 1 ? 4 : 2)

// Two bytes of int8 as f16: 128 more in the mantissa of 1024.
__device__ __forceinline__ uint32_t int8x2_to_half2(uint32_t two)
{
    return fma_half2(byte_permute(two ^ 0x8080u, 0x64646464u, 0x4140), 0x3c003c00u, 0xe480e480u);
}

// Four codes of e2m1, in bits 0 and 16 on, as f16 of 2^-14 times their value: what is subnormal in one is so in the other.
template <int SHIFT> __device__ __forceinline__ uint32_t e2m1_to_half2(uint32_t q)
{
    constexpr int UP = SHIFT < 9 ? 9 - SHIFT : 0, DOWN = SHIFT < 9 ? 0 : SHIFT - 9;
    return (q << UP >> DOWN & 0x0e000e00u) | (q << (12 - SHIFT) & 0x80008000u);
}

// Two operands A of 16 columns each: half `half` of a column tile. w: the loads of that tile. minus_zero: f16 twice, of rows g and g + 8.
template <int KIND>
__device__ __forceinline__ void f16_operands(uint32_t (&a)[2][4], const uint4 *w, int half,
                                             const uint32_t (&minus_zero)[2])
{
#pragma unroll
    for (int i = 0; i < 2; i++) {
        if (KIND == WEIGHT_INT4 || KIND == WEIGHT_INT4Z) {
            // (nibble ^ 8) in the mantissa of 1024 is 1032 + q; four bits higher it is 1152 + 16 q.
            uint32_t q = word_of(w[0], half * 2 + i), q8 = q >> 8;
            a[i][0] = fma_half2(lop3<0x6a>(q, 0x000f000fu, 0x64086408u), 0x3c003c00u, 0xe408e408u);
            a[i][1] = fma_half2(lop3<0x6a>(q, 0x00f000f0u, 0x64806480u), 0x2c002c00u, 0xd480d480u);
            a[i][2] = fma_half2(lop3<0x6a>(q8, 0x000f000fu, 0x64086408u), 0x3c003c00u, 0xe408e408u);
            a[i][3] = fma_half2(lop3<0x6a>(q8, 0x00f000f0u, 0x64806480u), 0x2c002c00u, 0xd480d480u);
#pragma unroll
            for (int k = 0; k < 4 && KIND == WEIGHT_INT4Z; k++)
                a[i][k] = fma_half2(a[i][k], 0x3c003c00u, minus_zero[k & 1]);
        } else if (KIND == WEIGHT_NL4) {
            uint32_t q = word_of(w[0], half * 2 + i), three_bits = q & 0x77777777u;
            uint32_t choice = (q >> 1 & 0x44444444u) | 0x32103210u;
            uint32_t low = nl4_bytes(three_bits, choice), high = nl4_bytes(three_bits >> 16, choice >> 16);
            const uint32_t pairs[2] = {byte_permute(low, high, 0x5140), byte_permute(low, high, 0x7362)};
#pragma unroll
            for (int k = 0; k < 4; k++) // bytes in the mantissa of 1024, less 1024 + WEIGHT_NL4_TOP
                a[i][k] = fma_half2(byte_permute(pairs[k / 2], 0x64646464u, k & 1 ? 0x4342 : 0x4140), 0x3c003c00u,
                                    0xe422e422u);
        } else if (IS_TILED(KIND)) {
            uint32_t q = word_of(w[0], half * 2 + i);
            a[i][0] = e2m1_to_half2<0>(q);
            a[i][1] = e2m1_to_half2<4>(q);
            a[i][2] = e2m1_to_half2<8>(q);
            a[i][3] = e2m1_to_half2<12>(q);
        } else if (KIND == WEIGHT_BF16) {
            a[i][0] = word_of(w[half * 2], i * 2);
            a[i][1] = word_of(w[half * 2 + 1], i * 2);
            a[i][2] = word_of(w[half * 2], i * 2 + 1);
            a[i][3] = word_of(w[half * 2 + 1], i * 2 + 1);
        } else {
            uint32_t low = word_of(w[0], half * 2 + i), high = word_of(w[1], half * 2 + i);
            const uint32_t two[4] = {low & 0xffff, high & 0xffff, low >> 16, high >> 16};
#pragma unroll
            for (int k = 0; k < 4; k++)
                a[i][k] = KIND == WEIGHT_INT8 ? int8x2_to_half2(two[k]) : e4m3x2_to_half2((uint16_t)two[k]);
        }
    }
}

// What a group has for rows g and g + 8.
template <int KIND>
__device__ __forceinline__ void read_group(float (&scale)[2], uint32_t (&minus_zero)[2], const uint8_t *group, int g)
{
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int row = g + 8 * i;
        if (KIND == WEIGHT_FP8G)
            scale[i] = ((const float *)(const void *)group)[row];
        else if (KIND == WEIGHT_MXFP4)
            scale[i] = e8m0_to_f32(group[row]);
        else if (KIND == WEIGHT_NVFP4)
            scale[i] = e4m3_to_f32(group[row]);
        else
            scale[i] = half_to_float(((const uint16_t *)(const void *)group)[row]);
        if (KIND == WEIGHT_INT4Z)
            minus_zero[i] = (((const uint16_t *)(const void *)group)[16 + row] ^ 0x8000u) * 0x10001u;
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

// Adds one step's products to acc. With groups: the sum of a group is multiplied by the group's scale, not the weights.
//   x       this warp's step of the stage
//   scales  of this warp's step, GROUP_BYTES for each group
template <int KIND, int GROUP, int TILES>
__device__ __forceinline__ void add_step(float (*acc)[4], const uint4 (&w)[STEP_LOADS(KIND)], const uint8_t *x,
                                         const uint8_t *scales, int lane)
{
    // Operands A of a step are 8, of 16 columns each.
    enum { LOADS = STEP_LOADS(KIND) / 2, GROUPS = GROUP ? STEP_COLS / GROUP : 1, PER_GROUP = 8 / GROUPS };
    int g = lane >> 2, t = lane & 3;
    float row_scale[PER_GROUP == 1 ? 2 : 1][2], c[TILES][4];
    uint32_t minus_zero[2] = {0, 0};
#pragma unroll
    for (int half = 0; half < 4; half++) { // 32 columns each
        int slot = KIND == WEIGHT_BF16 ? half % 2 * 4 + t : t * 2 + half % 2;
        const uint8_t *from = x + g * X_STEP_BYTES + half / 2 * 128 + x_slot(g, slot) * 16;
        if (GROUP && half * 2 % PER_GROUP == 0)
            read_group<KIND>(row_scale[0], minus_zero, scales + half * 2 / PER_GROUP * GROUP_BYTES(KIND), g);
        if (GROUP && PER_GROUP == 1)
            read_group<KIND>(row_scale[PER_GROUP == 1], minus_zero, scales + (half * 2 + 1) * GROUP_BYTES(KIND), g);
        uint32_t a[2][4];
        f16_operands<KIND>(a, w + half / 2 * LOADS, half % 2, minus_zero);
#pragma unroll
        for (int n = 0; n < TILES; n++) {
            uint4 b = load_shared((const uint4 *)(const void *)(from + n * TILE_TOKENS * X_STEP_BYTES));
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int operand = half * 2 + i;
                float(&sum)[4] = GROUP ? c[n] : acc[n];
                if (GROUP && operand % PER_GROUP == 0)
                    sum[0] = sum[1] = sum[2] = sum[3] = 0.0f;
                multiply<KIND>(sum, a[i], i ? b.z : b.x, i ? b.w : b.y);
                if (GROUP && (operand + 1) % PER_GROUP == 0)
#pragma unroll
                    for (int k = 0; k < 4; k++)
                        acc[n][k] = fmaf(sum[k], row_scale[PER_GROUP == 1 ? i : 0][k >> 1], acc[n][k]);
            }
        }
    }
}

// What a row's sums are multiplied by at the end, beside the token's scale.
template <int KIND> __device__ __forceinline__ float last_scale(const struct linear &l, int64_t row)
{
    if (KIND == WEIGHT_FP8 || KIND == WEIGHT_INT8)
        return ((const float *)l.weight_scale)[row];
    if (KIND == WEIGHT_INT4 || KIND == WEIGHT_INT4Z)
        return WEIGHT_INT4_FACTOR;
    if (KIND == WEIGHT_NL4)
        return WEIGHT_NL4_FACTOR;
    if (KIND == WEIGHT_MXFP4)
        return 0x1p14f;
    if (KIND != WEIGHT_NVFP4)
        return 1.0f;
    const char *block = (const char *)l.weight_scale +
                        row / WEIGHT_ROW_UNIT * (4 * l.scale_tile_bytes + l.scale_block_more) + 4 * l.scale_tile_bytes;
    return ((const float *)(const void *)block)[row % WEIGHT_ROW_UNIT] * 0x1p14f;
}

// The rows of the input and of the result that the tokens of a block stand for; in shared memory.
struct token_list {
    int32_t *x_row, *y_row;
};

// Adds what the warps of a tile of rows have, in their order, and writes it. sums: [tiles of rows][splits][TILES][32 lanes][4].
// list: of the tokens by which the block goes (LISTED).
template <int KIND, int TILES, bool LISTED>
__device__ __forceinline__ void write_sums(const struct linear &l, const struct token_list &list, const float *sums,
                                           int64_t row_tile, int64_t token_begin, int tile_in_block, int split,
                                           int lane)
{
    int splits = 1 << l.split_bits, element = split * 32 + lane, owner = element >> 2;
    int64_t row = row_tile * TILE_ROWS + (owner >> 2) + (element & 2) * 4;
    if (split >= 4 || row >= l.out_rows)
        return;
    float row_scale = last_scale<KIND>(l, row);
#pragma unroll
    for (int n = 0; n < TILES; n++) {
        int64_t token = token_begin + n * TILE_TOKENS + (owner & 3) * 2 + (element & 1);
        float y = 0.0f;
        for (int s = 0; s < splits; s++)
            y += load_shared(sums + (((tile_in_block << l.split_bits) + s) * TILES + n) * 128 + element);
        if (token >= l.tokens)
            continue;
        int64_t x_row = LISTED ? list.x_row[token] : token, y_row = LISTED ? list.y_row[token] : token;
        l.y[y_row * l.y_stride + row] = y * row_scale * (KIND == WEIGHT_BF16 ? 1.0f : l.x_scale[x_row]);
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
template <int KIND, int GROUP, int TILES, bool WHOLE, bool LISTED>
__device__ __forceinline__ void copy_phase(const struct linear &l, const struct token_list &list, struct stager &stager,
                                           struct place &at)
{
    enum { PARTS = TILES / PART_TILES(TILES), PART_TOKENS = PART_TILES(TILES) * TILE_TOKENS };
    int part = at.next % PARTS, begin = part * PART_TOKENS;
    if (WHOLE || at.next < at.panels * PARTS)
        stager_copy<X_STEP_BYTES, PIECES_OF(KIND, GROUP), WHOLE, LISTED>(
            l, stager, at.shared + at.next_stage * at.stage_bytes, list.x_row, begin,
            min(at.tokens - begin, (int)PART_TOKENS), part == PARTS - 1);
    copy_async_commit();
    at.next++;
    at.next_stage = at.next_stage + 1 == STAGES_OF(KIND, GROUP, TILES) ? 0 : at.next_stage + 1;
}

// One panel: the warp's step, with the weights in w, which then receive the step that is AHEAD panels further. WHOLE: all that is begun or
// waited for here belongs to panels with all their steps.
template <int KIND, int GROUP, int TILES, bool WHOLE, bool LISTED>
__device__ __forceinline__ void add_panel(float (&acc)[TILES][4], uint4 (&w)[STEP_LOADS(KIND)], const struct linear &l,
                                          const struct token_list &list, struct stager &stager, struct place &at,
                                          int panel)
{
    enum { PART = PART_TILES(TILES), PARTS = TILES / PART, AHEAD = DEPTH(KIND, TILES) };
    int step = (panel << l.split_bits) + at.split, next_step = step + (AHEAD << l.split_bits);
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        copy_async_wait<STAGES_OF(KIND, GROUP, TILES) - 2>();
        __syncthreads(); // the stage is there for all, and all are done with the one before it
        copy_phase<KIND, GROUP, TILES, WHOLE, LISTED>(l, list, stager, at);
        if (WHOLE || step < l.steps) {
            const uint8_t *from = at.shared + at.stage * at.stage_bytes;
            add_step<KIND, GROUP, PART>(acc + part * PART, w, from + at.x_at, from + at.scale_at, at.lane);
        }
        at.stage = at.stage + 1 == STAGES_OF(KIND, GROUP, TILES) ? 0 : at.stage + 1;
    }
    if (WHOLE || next_step < l.steps)
        load_step<KIND, WHOLE>(w, l, at.weights, next_step);
}

// One block: blockDim.x / 32 / splits tiles of 16 rows, 8 * TILES tokens from token_begin on.
template <int KIND, int GROUP, int TILES, bool LISTED>
__device__ __forceinline__ void multiply_block(const struct linear &l, const struct token_list &list,
                                               int64_t token_begin, int stage_bytes, uint8_t *shared)
{
    enum {
        PARTS = TILES / PART_TILES(TILES),
        PART_TOKENS = PART_TILES(TILES) * TILE_TOKENS,
        AHEAD = DEPTH(KIND, TILES),
        REACH = AHEAD > STAGES_OF(KIND, GROUP, TILES) - 1
                    ? AHEAD
                    : STAGES_OF(KIND, GROUP, TILES) - 1, // panels between a load or a copy and its use, at most
        GROUPS = GROUPS_OF(GROUP),
    };
    int warp = (int)threadIdx.x >> 5, splits = 1 << l.split_bits, tile_in_block = warp >> l.split_bits;
    int row_tiles = (int)blockDim.x >> (5 + l.split_bits);
    int64_t row_tile = (int64_t)blockIdx.x * row_tiles + tile_in_block;
    struct place at;
    at.lane = (int)threadIdx.x & 31;
    at.split = warp & (splits - 1);
    at.weights = weights_of_lane<KIND>(l, row_tile, at.lane);
    at.shared = shared;
    at.stage_bytes = stage_bytes;
    at.x_at = at.split * PART_TOKENS * X_STEP_BYTES;
    at.scale_at = ((PART_TOKENS * X_STEP_BYTES) << l.split_bits) + warp * GROUPS * GROUP_BYTES(KIND);
    at.tokens = (int)min((int64_t)TILES * TILE_TOKENS, l.tokens - token_begin);
    at.panels = (l.steps + splits - 1) >> l.split_bits;
    at.stage = at.next_stage = at.next = 0;

    uint4 w[AHEAD][STEP_LOADS(KIND)];
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
        if (i * splits + at.split < l.steps)
            load_step<KIND, false>(w[i], l, at.weights, i * splits + at.split);
    struct stager stager = stager_make<X_STEP_BYTES, PART_TOKENS, PIECES_OF(KIND, GROUP), LISTED>(
        l, token_begin, (int64_t)blockIdx.x * row_tiles, row_tiles);
#pragma unroll
    for (int i = 0; i < STAGES_OF(KIND, GROUP, TILES) - 1; i++)
        copy_phase<KIND, GROUP, TILES, false, LISTED>(l, list, stager, at);

    float acc[TILES][4];
#pragma unroll
    for (int n = 0; n < TILES; n++)
        acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0.0f;
    int panel = 0, whole = (l.col_tiles / 2) >> l.split_bits;
    for (; panel + AHEAD + REACH <= whole; panel += AHEAD)
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            add_panel<KIND, GROUP, TILES, true, LISTED>(acc, w[i], l, list, stager, at, panel + i);
    for (; panel < at.panels; panel += AHEAD)
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            if (panel + i < at.panels)
                add_panel<KIND, GROUP, TILES, false, LISTED>(acc, w[i], l, list, stager, at, panel + i);

    copy_async_wait<0>();
    __syncthreads();
    float *sums = (float *)(void *)shared;
#pragma unroll
    for (int n = 0; n < TILES; n++)
        store_shared((float4 *)(void *)(sums + ((warp * TILES + n) * 32 + at.lane) * 4),
                     make_float4(acc[n][0], acc[n][1], acc[n][2], acc[n][3]));
    __syncthreads();
    write_sums<KIND, TILES, LISTED>(l, list, sums, row_tile, token_begin, tile_in_block, at.split, at.lane);
}

struct block_shape {
    int row_tiles, stage_bytes, shared_bytes;
    unsigned blocks; // along the rows of the matrix
};

template <int KIND, int GROUP, int TILES> struct block_shape shape_of(const struct linear *l)
{
    int splits = 1 << l->split_bits, row_tiles = 8 / splits;
    int stage_bytes =
        splits * (PART_TILES(TILES) * TILE_TOKENS * X_STEP_BYTES + row_tiles * GROUPS_OF(GROUP) * GROUP_BYTES(KIND));
    int sums_bytes = row_tiles * splits * TILES * ACCUMULATOR_BYTES;
    return {row_tiles, stage_bytes, max(STAGES_OF(KIND, GROUP, TILES) * stage_bytes, sums_bytes),
            (unsigned)((l->out_rows + row_tiles * TILE_ROWS - 1) / (row_tiles * TILE_ROWS))};
}

// Launches the product of one kind and group; each file that includes this has its own, with what it needs in JOB.
template <int KIND, int GROUP, class JOB>
cudaError_t launch_product(const struct linear *l, const JOB *job, cudaStream_t stream);

template <int KIND, class JOB>
cudaError_t launch_for_group(const struct linear *l, const JOB *job, uint32_t group, cudaStream_t stream)
{
    return group == 128  ? launch_product<KIND, 128>(l, job, stream)
           : group == 64 ? launch_product<KIND, 64>(l, job, stream)
                         : launch_product<KIND, 32>(l, job, stream);
}

template <class JOB>
cudaError_t launch_for_kind(const struct linear *l, const JOB *job, const struct weight_shape *shape,
                            cudaStream_t stream)
{
    switch (shape->kind) {
    case WEIGHT_BF16:
        return launch_product<WEIGHT_BF16, 0>(l, job, stream);
    case WEIGHT_INT8:
        return launch_product<WEIGHT_INT8, 0>(l, job, stream);
    case WEIGHT_FP8:
        return launch_product<WEIGHT_FP8, 0>(l, job, stream);
    case WEIGHT_FP8G:
        return launch_product<WEIGHT_FP8G, 128>(l, job, stream);
    case WEIGHT_MXFP4:
        return launch_product<WEIGHT_MXFP4, 32>(l, job, stream);
    case WEIGHT_NVFP4:
        return launch_product<WEIGHT_NVFP4, 16>(l, job, stream);
    case WEIGHT_INT4:
        return launch_for_group<WEIGHT_INT4>(l, job, shape->group_size, stream);
    case WEIGHT_INT4Z:
        return launch_for_group<WEIGHT_INT4Z>(l, job, shape->group_size, stream);
    case WEIGHT_NL4:
        return launch_for_group<WEIGHT_NL4>(l, job, shape->group_size, stream);
    case WEIGHT_F32:
    case WEIGHT_KIND_COUNT:
        break;
    }
    return cudaErrorInvalidValue;
}

} // namespace

#endif
