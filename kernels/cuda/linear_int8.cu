// Matrix products of int8 inputs with int4 and int8 weights for a few tokens, and the choice between this and linear_int8_tiles.cu. Integer
// sums over a group are exact, and the groups' terms are added in ascending order, each step rounded: the same bits as kernels.h's matmul.
//
// As in linear_f16.cu, 4 or 8 warps share the columns of a tile of 16 rows, step s belonging to warp s mod splits. So that the order of the
// sum does not suffer, a warp adds nothing: it leaves its step's terms in shared memory, and one panel (a step of each
// warp) later every thread adds, for the few results that it keeps, the panel's terms from the first group to the last. Terms have
// two places that take turns, so the one barrier that a panel needs anyway is enough.
#include "kernels/cuda/linear.cuh"

namespace
{

enum { X_STEP_BYTES = STEP_COLS, STAGES = 3, MOST_TOKENS = 16 };

#define GROUPS_OF(GROUP) ((GROUP) ? STEP_COLS / (GROUP) : 1)
#define SCALE_GROUPS(GROUP) ((GROUP) ? STEP_COLS / (GROUP) : 0)
#define SCALE_PIECES(GROUP) (SCALE_GROUPS(GROUP) * 2), 2 // of 16 bytes: of a step, of a group
// Steps of weights on their way: 8 loads of 16 bytes a lane; 6 or 4 for int4, which needs registers for scales and terms.
#define DEPTH(KIND, TILES) ((KIND) == WEIGHT_INT4 && (TILES) == 1 ? 3 : 2)

// Scales of tokens 2 t and 2 t + 1 of each tile of tokens, for one step. from: the first of them.
template <int TILES>
__device__ __forceinline__ void load_q_scales(float2 (&q_scale)[TILES], const struct linear &l, const float *from,
                                              int t)
{
#pragma unroll
    for (int n = 0; n < TILES; n++) {
        int token = n * TILE_TOKENS + t * 2, tokens = (int)l.tokens;
        q_scale[n].x = token < tokens ? load_global(from + n * TILE_TOKENS * l.x_groups) : 0.0f;
        q_scale[n].y = token + 1 < tokens ? load_global(from + (n * TILE_TOKENS + 1) * l.x_groups) : 0.0f;
    }
}

// Leaves one step's terms at terms [TILES][GROUPS][32 lanes][4].
template <int KIND, int GROUP, int TILES>
__device__ __forceinline__ void leave_terms(float *terms, const uint4 (&w)[STEP_LOADS(KIND)], const uint8_t *x,
                                            const uint8_t *scales, const float2 (&q_scale)[TILES], int lane)
{
    enum { GROUPS = GROUPS_OF(GROUP) };
    int g = lane >> 2, t = lane & 3;
    uint32_t a[4][4];
    int8_operands<KIND>(a, w);
    float row_scale[GROUPS][2] = {};
    if (GROUP)
        int4_row_scales<GROUPS>(row_scale, scales, g);
#pragma unroll
    for (int n = 0; n < TILES; n++) {
        const uint8_t *from = x + (n * TILE_TOKENS + g) * X_STEP_BYTES;
        uint4 b[2];
        b[0] = load_shared((const uint4 *)(const void *)(from + x_slot(g, t) * 16));
        b[1] = load_shared((const uint4 *)(const void *)(from + x_slot(g, 4 + t) * 16));
        float term[GROUPS][4];
        int8_terms<KIND, GROUPS>(term, a, b, row_scale, q_scale[n]);
#pragma unroll
        for (int i = 0; i < GROUPS; i++)
            store_shared((float4 *)(void *)(terms + ((n * GROUPS + i) * 32 + lane) * 4),
                         make_float4(term[i][0], term[i][1], term[i][2], term[i][3]));
    }
}

// Adds a panel's terms in ascending order to the result that a thread keeps of each token tile. terms: of the tile of rows,
// [splits][TILES][GROUPS][128].
template <int GROUPS, int TILES>
__device__ __forceinline__ void add_terms(float (&y)[TILES], const float *terms, int steps, int element)
{
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll 4
        for (int s = 0; s < steps; s++)
#pragma unroll
            for (int i = 0; i < GROUPS; i++)
                y[n] += load_shared(terms + ((s * TILES + n) * GROUPS + i) * 128 + element);
}

// What a block works with, and how far it has come.
struct place {
    const uint8_t *weights; // of the lane
    const float *q_scale;   // of the lane's first token, in the next step that is loaded
    uint8_t *shared;
    float *terms;                    // of the tile of rows, in the first of the two places
    int terms_of_panel;              // floats from one place to the other
    int stage_bytes, x_at, scale_at; // of the warp's step in a stage
    int lane, split, tokens, panels;
    int stage, next_stage;
};

// One panel: leaves the terms of the warp's step, with the weights in w, which then receive the step that is AHEAD panels further; adds the
// terms of the panel before it. WHOLE: all that is begun or waited for here belongs to panels with all their steps.
template <int KIND, int GROUP, int TILES, bool WHOLE>
__device__ __forceinline__ void add_panel(float (&y)[TILES], uint4 (&w)[STEP_LOADS(KIND)], float2 (&q_scale)[TILES],
                                          const struct linear &l, struct stager &stager, struct place &at, int panel)
{
    enum { GROUPS = GROUPS_OF(GROUP), TERMS = TILES * GROUPS * 128, AHEAD = DEPTH(KIND, TILES) };
    int splits = 1 << l.split_bits, step = (panel << l.split_bits) + at.split;
    int next_step = step + (AHEAD << l.split_bits);
    copy_async_wait<STAGES - 2>();
    __syncthreads(); // the stage and the last panel's terms are there for all; all are done with what was there before them
    if (WHOLE || panel + STAGES - 1 < at.panels)
        stager_copy<X_STEP_BYTES, SCALE_PIECES(GROUP), WHOLE, false>(
            l, stager, at.shared + at.next_stage * at.stage_bytes, NULL, 0, at.tokens, true);
    copy_async_commit();
    float2 now[TILES];
#pragma unroll
    for (int n = 0; n < TILES; n++)
        now[n] = q_scale[n];
    if (WHOLE || step + splits < l.steps)
        load_q_scales<TILES>(q_scale, l, at.q_scale += splits, at.lane & 3);
    if (WHOLE || step < l.steps) {
        const uint8_t *from = at.shared + at.stage * at.stage_bytes;
        leave_terms<KIND, GROUP, TILES>(at.terms + (panel & 1) * at.terms_of_panel + at.split * TERMS, w,
                                        from + at.x_at, from + at.scale_at, now, at.lane);
    }
    if (WHOLE || next_step < l.steps)
        load_step<KIND, WHOLE>(w, l, at.weights, next_step);
    if (panel > 0 && at.split < 4) // a panel with all its steps: only the last one may lack some
        add_terms<GROUPS, TILES>(y, at.terms + (~panel & 1) * at.terms_of_panel, splits, at.split * 32 + at.lane);
    at.stage = at.stage + 1 == STAGES ? 0 : at.stage + 1;
    at.next_stage = at.next_stage + 1 == STAGES ? 0 : at.next_stage + 1;
}

// One block: blockDim.x / 32 / splits tiles of 16 rows, 8 * TILES tokens.
template <int KIND, int GROUP, int TILES>
__global__ void __launch_bounds__(256, 2) linear_int8(struct linear l, int stage_bytes)
{
    enum {
        GROUPS = GROUPS_OF(GROUP),
        TOKENS = TILES * TILE_TOKENS,
        AHEAD = DEPTH(KIND, TILES),
        REACH = AHEAD > STAGES - 1 ? AHEAD : STAGES - 1, // panels between a load or a copy and its use, at most
        TERMS = TILES * GROUPS * 128,                    // floats of one step
    };
    SHARED_DYNAMIC(uint8_t, shared);
    int warp = (int)threadIdx.x >> 5, splits = 1 << l.split_bits, tile_in_block = warp >> l.split_bits;
    int row_tiles = (int)blockDim.x >> (5 + l.split_bits);
    int64_t row_tile = (int64_t)blockIdx.x * row_tiles + tile_in_block;
    struct place at;
    at.lane = (int)threadIdx.x & 31;
    at.split = warp & (splits - 1);
    at.weights = weights_of_lane<KIND>(l, row_tile, at.lane);
    at.q_scale = l.x_scale + (at.lane & 3) * 2 * l.x_groups + at.split;
    at.shared = shared;
    at.terms = (float *)(void *)(shared + STAGES * stage_bytes) + tile_in_block * splits * TERMS;
    at.terms_of_panel = (row_tiles << l.split_bits) * TERMS;
    at.stage_bytes = stage_bytes;
    at.x_at = at.split * TOKENS * X_STEP_BYTES;
    at.scale_at = ((TOKENS * X_STEP_BYTES) << l.split_bits) + warp * SCALE_GROUPS(GROUP) * 32;
    at.tokens = (int)l.tokens;
    at.panels = (l.steps + splits - 1) >> l.split_bits;
    at.stage = 0;
    at.next_stage = STAGES - 1;

    uint4 w[AHEAD][STEP_LOADS(KIND)];
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
        if (i * splits + at.split < l.steps)
            load_step<KIND, false>(w[i], l, at.weights, i * splits + at.split);
    float2 q_scale[TILES] = {};
    if (at.split < l.steps)
        load_q_scales<TILES>(q_scale, l, at.q_scale, at.lane & 3);
    struct stager stager =
        stager_make<X_STEP_BYTES, TOKENS, SCALE_PIECES(GROUP), false>(l, 0, (int64_t)blockIdx.x * row_tiles, row_tiles);
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) {
        if (i < at.panels)
            stager_copy<X_STEP_BYTES, SCALE_PIECES(GROUP), false, false>(l, stager, shared + i * stage_bytes, NULL, 0,
                                                                         at.tokens, true);
        copy_async_commit();
    }

    float y[TILES];
#pragma unroll
    for (int n = 0; n < TILES; n++)
        y[n] = 0.0f;
    int panel = 0, whole = (l.col_tiles / 2) >> l.split_bits;
    for (; panel + AHEAD + REACH <= whole; panel += AHEAD)
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            add_panel<KIND, GROUP, TILES, true>(y, w[i], q_scale, l, stager, at, panel + i);
    for (; panel < at.panels; panel += AHEAD)
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            if (panel + i < at.panels)
                add_panel<KIND, GROUP, TILES, false>(y, w[i], q_scale, l, stager, at, panel + i);
    __syncthreads();
    // The first four warps of a tile of rows keep its results, an element of each tile of tokens a thread.
    int element = at.split * 32 + at.lane, owner = element >> 2;
    int64_t row = row_tile * TILE_ROWS + (owner >> 2) + (element & 2) * 4;
    if (at.split >= 4 || row >= l.out_rows)
        return;
    add_terms<GROUPS, TILES>(y, at.terms + (~at.panels & 1) * at.terms_of_panel, l.steps - (at.panels - 1) * splits,
                             element);
    float row_scale = KIND == WEIGHT_INT4 ? WEIGHT_INT4_FACTOR : ((const float *)l.weight_scale)[row];
#pragma unroll
    for (int n = 0; n < TILES; n++) {
        int64_t token = n * TILE_TOKENS + (owner & 3) * 2 + (element & 1);
        if (token < l.tokens)
            l.y[token * l.y_stride + row] = y[n] * row_scale;
    }
}

template <int KIND, int GROUP, int TILES>
cudaError_t launch(struct linear l, const struct weight_shape *shape, cudaStream_t stream)
{
    l.split_bits = TILES == 1 && shape->rows_padded < 2048 ? 3 : 2;
    int splits = 1 << l.split_bits, row_tiles = 8 / splits;
    int stage_bytes = splits * (TILES * TILE_TOKENS * X_STEP_BYTES + row_tiles * SCALE_GROUPS(GROUP) * 32);
    int terms_bytes = 2 * row_tiles * splits * TILES * GROUPS_OF(GROUP) * ACCUMULATOR_BYTES;
    int64_t block_rows = row_tiles * TILE_ROWS;
    return LAUNCH((linear_int8<KIND, GROUP, TILES>), (unsigned)((l.out_rows + block_rows - 1) / block_rows), 256,
                  STAGES * stage_bytes + terms_bytes, stream, l, stage_bytes);
}

template <int KIND, int GROUP>
cudaError_t launch_for_tokens(const struct linear *l, const struct weight_shape *shape, cudaStream_t stream)
{
    return l->tokens <= TILE_TOKENS ? launch<KIND, GROUP, 1>(*l, shape, stream)
                                    : launch<KIND, GROUP, 2>(*l, shape, stream);
}

} // namespace

extern "C" cudaError_t launch_linear_int8(float *y, int64_t y_stride, const struct matrix *w, struct device_input in,
                                          int64_t rows, cudaStream_t stream)
{
    if (rows <= 0 || w->shape.rows == 0)
        return cudaSuccess;
    if (w->shape.kind != WEIGHT_INT4 && w->shape.kind != WEIGHT_INT8)
        return cudaErrorInvalidValue;
    struct linear l = linear_of(y, y_stride, w, in, rows, 1);
    if (w->shape.cols == 0)
        return launch_without_columns(&l, stream);
    if (rows > MOST_TOKENS)
        return linear_int8_tiles(&l, &w->shape, stream);
    if (w->shape.kind == WEIGHT_INT8)
        return launch_for_tokens<WEIGHT_INT8, 0>(&l, &w->shape, stream);
    return w->shape.group_size == 128  ? launch_for_tokens<WEIGHT_INT4, 128>(&l, &w->shape, stream)
           : w->shape.group_size == 64 ? launch_for_tokens<WEIGHT_INT4, 64>(&l, &w->shape, stream)
                                       : launch_for_tokens<WEIGHT_INT4, 32>(&l, &w->shape, stream);
}
