// Attention of few rows, each at its own position of its own sequence. Declared in launch.h.
//
// A block takes one chunk of ATTENTION_CHUNK positions of one row and all query heads that read one kv head, so that keys and values
// are read once. In it: scores of all positions, their maximum, weights and sum, then the weighted sum of the values; all in f32.
// What comes of a chunk, (maximum, sum, sums of values) per query head, goes to scratch, and a second kernel combines the chunks in ascending
// order. The grid covers max_context; blocks whose chunk the row does not see leave at once, so a captured launch stays good.
//
// A row of keys is read by LANES neighbouring lanes, 8 elements each (16 bytes of bf16, 8 of e4m3 or int8, 4 of int4); a group of LANES lanes takes STEP
// consecutive positions at a time.
#include "kernels/cuda/attention.cuh"

enum {
    WARP = 32,
    WARPS = 8,
    THREADS = WARPS * WARP,
    STEP = 4,
    MAX_DIM = KERNELS_MAX_HEAD_DIM,
    COMBINE_THREADS = 128,
};
static_assert((int)THREADS == (int)ATTENTION_CHUNK, "a thread for each scale");

// Parts of one row: [num_heads][chunks] of maximum, sum, and [head_dim] sums of values, apart.
struct parts {
    float *largest, *sum; // [rows][num_heads][chunks]
    float *value;         // [rows][num_heads][chunks][head_dim]
    int64_t chunks;
};

struct decode_input {
    const float *qkv;
    struct attention_shape shape;
    struct device_rows rows;
    struct device_kv kv;
    struct parts parts;
    int lanes; // of a row of keys: a power of two from 4 to 32
};

// In shared memory the 8 elements of a lane lie as two halves, so that neighbouring lanes read neighbouring 16 bytes.
__device__ __forceinline__ int split_place(int dim) { return dim % 8 / 4 * (MAX_DIM / 2) + dim / 8 * 4 + dim % 4; }

// Sums over the lanes of each group what a lane has for STEP = 4 positions; a lane ends with the sum for position
// step_of_lane(), the same in a quarter of the group's lanes.
__device__ __forceinline__ float sum_steps(const float *x, int lanes, int lane)
{
    bool upper = lane & (lanes / 2), odd = lane & (lanes / 4);
    float a = upper ? x[2] : x[0], b = upper ? x[3] : x[1];
    a += __shfl_xor_sync(0xffffffffu, upper ? x[0] : x[2], lanes / 2);
    b += __shfl_xor_sync(0xffffffffu, upper ? x[1] : x[3], lanes / 2);
    float sum = odd ? b : a;
    sum += __shfl_xor_sync(0xffffffffu, odd ? a : b, lanes / 4);
    for (int mask = lanes / 8; mask; mask /= 2)
        sum += __shfl_xor_sync(0xffffffffu, sum, mask);
    return sum;
}

__device__ __forceinline__ int step_of_lane(int lanes, int lane)
{
    return (lane & (lanes / 2) ? 2 : 0) + (lane & (lanes / 4) ? 1 : 0);
}

// Where a thread stands in its chunk, whose first position counts as 0.
struct chunk_place {
    int lane, warp;
    int lanes, dim; // of a row of keys, and the first of this lane's elements
    int head_dim;
    int turn_positions;         // that the block takes at once
    int first_slot;             // of this thread's STEP positions of the first turn
    int seen_begin, seen_end;   // what the query sees
    const int64_t *row_of_page; // shared
};

// This thread's STEP positions of the turn that begins at `turn`; zeros where the query does not see them.
template <enum kv_format FORMAT>
__device__ __forceinline__ void load_steps(uint4 *x, const void *cache, const struct chunk_place &at, int turn)
{
    int head_dim = at.head_dim;
#pragma unroll
    for (int i = 0; i < STEP; i++) {
        int slot = turn + at.first_slot + i;
        bool seen = slot >= at.seen_begin && slot < at.seen_end;
        int64_t row = seen ? at.row_of_page[slot / KV_PAGE_TOKENS] + (int64_t)(slot % KV_PAGE_TOKENS) * head_dim : 0;
        x[i] = load_eight<FORMAT>(cache, row, seen ? at.dim : head_dim, head_dim, head_dim % 8 == 0);
    }
}

// scores [count][ATTENTION_CHUNK] = q . k. next: the keys of the first turn.
//   queries  shared, [count][MAX_DIM] as split_place says
template <enum kv_format FORMAT>
__device__ __forceinline__ void chunk_scores(float *scores, const float *queries, const void *keys, uint4 (&next)[STEP],
                                             int count, const struct chunk_place &at)
{
    uint4 raw[STEP];
#pragma unroll 1
    for (int turn = 0; turn < ATTENTION_CHUNK; turn += at.turn_positions) {
        float k[STEP][8];
#pragma unroll
        for (int i = 0; i < STEP; i++)
            raw[i] = next[i];
        if (turn + at.turn_positions < ATTENTION_CHUNK)
            load_steps<FORMAT>(next, keys, at, turn + at.turn_positions);
#pragma unroll
        for (int i = 0; i < STEP; i++)
            widen_eight<FORMAT>(k[i], raw[i]);
        for (int h = 0; h < count; h++) {
            float4 low = load_shared((const float4 *)&queries[h * MAX_DIM + at.dim / 2]);
            float4 high = load_shared((const float4 *)&queries[h * MAX_DIM + MAX_DIM / 2 + at.dim / 2]);
            const float query[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
            float dot[STEP];
#pragma unroll
            for (int i = 0; i < STEP; i++) {
                dot[i] = k[i][0] * query[0];
#pragma unroll
                for (int j = 1; j < 8; j++)
                    dot[i] = fmaf(k[i][j], query[j], dot[i]);
            }
            float sum = sum_steps(dot, at.lanes, at.lane);
            if (at.lane % (at.lanes / 4) == 0)
                scores[h * ATTENTION_CHUNK + turn + at.first_slot + step_of_lane(at.lanes, at.lane)] = sum;
        }
    }
}

// The scores become weights; their maximum and sum go to the parts of the heads, the first of which is number `part`.
//   scales  shared, [2][ATTENTION_CHUNK] where the format has them: scores are times the first, weights that go on times the second
template <bool SCALED>
__device__ __forceinline__ void chunk_weights(float *scores, const struct decode_input &in, int64_t part, int count,
                                              const float *scales, const struct chunk_place &at)
{
    for (int h = at.warp; h < count; h += WARPS) {
        float score[ATTENTION_CHUNK / WARP], largest = -INFINITY, sum = 0;
#pragma unroll
        for (int i = 0; i < ATTENTION_CHUNK / WARP; i++) {
            int slot = i * WARP + at.lane;
            bool seen = slot >= at.seen_begin && slot < at.seen_end;
            float dot = scores[h * ATTENTION_CHUNK + slot];
            score[i] = seen ? finished_score(in.shape, SCALED ? dot * scales[slot] : dot) : -INFINITY;
            largest = fmaxf(largest, score[i]); // passes over NaN, which reaches the sum
        }
        for (int mask = WARP / 2; mask; mask /= 2)
            largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, mask));
#pragma unroll
        for (int i = 0; i < ATTENTION_CHUNK / WARP; i++) {
            float weight = weight_of(score[i], largest);
            int slot = i * WARP + at.lane;
            scores[h * ATTENTION_CHUNK + slot] = SCALED ? weight * scales[ATTENTION_CHUNK + slot] : weight;
            sum += weight;
        }
        for (int mask = WARP / 2; mask; mask /= 2)
            sum += __shfl_xor_sync(0xffffffffu, sum, mask);
        if (at.lane == 0) {
            in.parts.largest[part + h * in.parts.chunks] = largest;
            in.parts.sum[part + h * in.parts.chunks] = sum;
        }
    }
}

// This thread's part of the weighted sum of values. next: the values of the first turn.
template <enum kv_format FORMAT, int HEADS>
__device__ __forceinline__ void chunk_values(float (&value)[HEADS][8], const float *weights, const void *values,
                                             uint4 (&next)[STEP], int count, const struct chunk_place &at)
{
    uint4 raw[STEP];
#pragma unroll
    for (int h = 0; h < HEADS; h++)
#pragma unroll
        for (int j = 0; j < 8; j++)
            value[h][j] = 0;
#pragma unroll 1
    for (int turn = 0; turn < ATTENTION_CHUNK; turn += at.turn_positions) {
#pragma unroll
        for (int i = 0; i < STEP; i++)
            raw[i] = next[i];
        if (turn + at.turn_positions < ATTENTION_CHUNK)
            load_steps<FORMAT>(next, values, at, turn + at.turn_positions);
#pragma unroll
        for (int i = 0; i < STEP; i++) {
            float v[8];
            widen_eight<FORMAT>(v, raw[i]);
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
                if (h >= count)
                    break;
                float weight = load_shared(&weights[h * ATTENTION_CHUNK + turn + at.first_slot + i]);
#pragma unroll
                for (int j = 0; j < 8; j++)
                    value[h][j] = fmaf(weight, v[j], value[h][j]);
            }
        }
    }
}

// What the threads have, together: lane groups by halves, then the warps in ascending order. Two buffers: one barrier per head.
//   buffers  shared, [2][WARPS][MAX_DIM]
template <int HEADS>
__device__ __forceinline__ void store_values(float (&value)[HEADS][8], float *buffers, const struct decode_input &in,
                                             int64_t part, int count, const struct chunk_place &at)
{
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        if (h >= count)
            break;
        float *buffer = buffers + h % 2 * WARPS * MAX_DIM;
#pragma unroll
        for (int j = 0; j < 8; j++)
            for (int mask = WARP / 2; mask >= at.lanes; mask /= 2)
                value[h][j] += __shfl_xor_sync(0xffffffffu, value[h][j], mask);
        if (at.lane < at.lanes) {
            store_shared((float4 *)&buffer[at.warp * MAX_DIM + at.dim / 2],
                         make_float4(value[h][0], value[h][1], value[h][2], value[h][3]));
            store_shared((float4 *)&buffer[at.warp * MAX_DIM + MAX_DIM / 2 + at.dim / 2],
                         make_float4(value[h][4], value[h][5], value[h][6], value[h][7]));
        }
        __syncthreads();
        for (int i = threadIdx.x; i < at.head_dim; i += THREADS) {
            float sum = 0;
#pragma unroll
            for (int w = 0; w < WARPS; w++)
                sum += buffer[w * MAX_DIM + split_place(i)];
            in.parts.value[(part + h * in.parts.chunks) * at.head_dim + i] = sum;
        }
    }
}

// grid (chunk, kv head, row). HEADS query heads at a time; what a head becomes does not depend on HEADS.
template <enum kv_format FORMAT, int HEADS>
__global__ void __launch_bounds__(THREADS, 2) attend_chunk(struct decode_input in)
{
    constexpr int WORK = 2 * WARPS; // at least HEADS
    SHARED(float, scores, HEADS *ATTENTION_CHUNK);
    SHARED(float, work, WORK *MAX_DIM); // first the queries [HEADS], then the warps' sums of values [2][WARPS]
    SHARED(int64_t, row_of_page, ATTENTION_CHUNK / KV_PAGE_TOKENS);
    SHARED(float, scales, scaled_cache<FORMAT> ? 2 * ATTENTION_CHUNK : 1);
    int64_t row = blockIdx.z, kv_head = blockIdx.y, chunk = blockIdx.x;
    int64_t position = in.rows.position[row], begin = chunk * ATTENTION_CHUNK;
    int64_t first = window_begin(in.shape, position);
    if (begin > position || begin + ATTENTION_CHUNK <= first)
        return;
    struct chunk_place at = {};
    at.lane = threadIdx.x % WARP;
    at.warp = threadIdx.x / WARP;
    at.lanes = in.lanes;
    at.dim = at.lane % at.lanes * 8;
    at.head_dim = (int)in.kv.head_dim;
    at.turn_positions = THREADS / at.lanes * STEP;
    at.first_slot = (at.warp * (WARP / at.lanes) + at.lane / at.lanes) * STEP;
    at.seen_begin = first > begin ? (int)(first - begin) : 0;
    at.seen_end = position - begin < ATTENTION_CHUNK ? (int)(position - begin) + 1 : ATTENTION_CHUNK;
    at.row_of_page = row_of_page;

    const int32_t *pages = in.kv.pages + in.rows.sequence[row] * in.kv.pages_per_sequence + begin / KV_PAGE_TOKENS;
    int page = threadIdx.x; // pages that the row does not see may have no entry
    if (page * KV_PAGE_TOKENS < at.seen_end && (page + 1) * KV_PAGE_TOKENS > at.seen_begin)
        row_of_page[page] = kv_row(in.kv, pages[page], kv_head, 0);
    if (scaled_cache<FORMAT>) { // a thread for each position; 0 where the row does not see it
        int slot = threadIdx.x;
        bool seen = slot >= at.seen_begin && slot < at.seen_end;
        int64_t place = seen ? (pages[slot / KV_PAGE_TOKENS] * in.kv.num_kv_heads + kv_head) * KV_PAGE_TOKENS +
                                   slot % KV_PAGE_TOKENS
                             : 0;
        scales[slot] = seen ? bf16_to_f32(in.kv.k_scale[place]) : 0.0f;
        scales[ATTENTION_CHUNK + slot] = seen ? bf16_to_f32(in.kv.v_scale[place]) : 0.0f;
    }
    __syncthreads();

    // This rank may hold only some of the query heads of a kv head.
    int64_t head = (in.shape.kv_head_begin + kv_head) * in.shape.heads_per_kv - in.shape.head_begin;
    int64_t head_end = min(head + in.shape.heads_per_kv, in.shape.num_heads);
    for (head = max(head, (int64_t)0); head < head_end; head += HEADS) {
        int count = (int)min(head_end - head, (int64_t)HEADS), head_dim = at.head_dim;
        int64_t part = (row * in.shape.num_heads + head) * in.parts.chunks + chunk;
        const float *q = in.qkv + row * (in.shape.num_heads + 2 * in.kv.num_kv_heads) * head_dim + head * head_dim;
        uint4 next[STEP];
        load_steps<FORMAT>(next, in.kv.k, at, 0);
        for (int i = threadIdx.x; i < count * MAX_DIM; i += THREADS)
            work[i / MAX_DIM * MAX_DIM + split_place(i % MAX_DIM)] =
                i % MAX_DIM < head_dim ? q[i / MAX_DIM * head_dim + i % MAX_DIM] : 0.0f;
        __syncthreads();
        chunk_scores<FORMAT>(scores, work, in.kv.k, next, count, at);
        // The first values are on their way while the weights are made.
        load_steps<FORMAT>(next, in.kv.v, at, 0);
        __syncthreads();
        chunk_weights<scaled_cache<FORMAT>>(scores, in, part, count, scales, at);
        __syncthreads();
        float value[HEADS][8];
        chunk_values<FORMAT, HEADS>(value, scores, in.kv.v, next, count, at);
        store_values<HEADS>(value, work, in, part, count, at);
        __syncthreads(); // the next heads' queries go where these sums lie
    }
}

// grid (query head, row): out = sum over chunks of 2^(largest - L) * value / sum over chunks of 2^(largest - L) * sum, ascending; a sink
// adds its share to the latter.
__global__ void __launch_bounds__(COMBINE_THREADS) combine_chunks(float *out, struct decode_input in)
{
    SHARED(float, factor, COMBINE_THREADS);
    SHARED(float, part_sum, COMBINE_THREADS);
    SHARED(float, warp_largest, COMBINE_THREADS / WARP);
    int64_t row = blockIdx.y, head = blockIdx.x, position = in.rows.position[row];
    int64_t chunk_begin = window_begin(in.shape, position) / ATTENTION_CHUNK,
            chunk_end = position / ATTENTION_CHUNK + 1;
    int64_t part = (row * in.shape.num_heads + head) * in.parts.chunks;
    int head_dim = (int)in.kv.head_dim, thread = threadIdx.x;

    float sink = sink_score(in.shape, head), largest = sink;
    for (int64_t chunk = chunk_begin + thread; chunk < chunk_end; chunk += COMBINE_THREADS)
        largest = fmaxf(largest, in.parts.largest[part + chunk]);
    for (int mask = WARP / 2; mask; mask /= 2)
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, mask));
    if (thread % WARP == 0)
        warp_largest[thread / WARP] = largest;
    __syncthreads();
    for (int i = 0; i < COMBINE_THREADS / WARP; i++)
        largest = fmaxf(largest, warp_largest[i]);

    float sum = weight_of(sink, largest), value[MAX_DIM / COMBINE_THREADS] = {0};
    for (int64_t base = chunk_begin; base < chunk_end; base += COMBINE_THREADS) {
        int count = (int)min(chunk_end - base, (int64_t)COMBINE_THREADS);
        __syncthreads();
        if (thread < count) {
            factor[thread] = weight_of(in.parts.largest[part + base + thread], largest);
            part_sum[thread] = in.parts.sum[part + base + thread];
        }
        __syncthreads();
#pragma unroll 8
        for (int i = 0; i < count; i++) {
            sum = fmaf(factor[i], part_sum[i], sum);
#pragma unroll
            for (int j = 0; j < MAX_DIM / COMBINE_THREADS; j++) {
                int dim = thread + j * COMBINE_THREADS;
                if (dim < head_dim)
                    value[j] =
                        fmaf(factor[i], load_global(&in.parts.value[(part + base + i) * head_dim + dim]), value[j]);
            }
        }
    }
#pragma unroll
    for (int j = 0; j < MAX_DIM / COMBINE_THREADS; j++) {
        int dim = thread + j * COMBINE_THREADS;
        if (dim < head_dim)
            out[(row * in.shape.num_heads + head) * head_dim + dim] = value[j] / sum;
    }
}

static int64_t chunk_count(int64_t max_context) { return (max_context + ATTENTION_CHUNK - 1) / ATTENTION_CHUNK; }

extern "C" uint64_t attention_scratch_bytes(int64_t max_rows, int64_t num_heads, int64_t head_dim, int64_t max_context)
{
    return (uint64_t)max_rows * (uint64_t)num_heads * (uint64_t)chunk_count(max_context) * ((uint64_t)head_dim + 2) *
           sizeof(float);
}

template <enum kv_format FORMAT>
static cudaError_t launch_chunks(struct decode_input in, dim3 grid, int64_t heads_per_kv, cudaStream_t stream)
{
    if (heads_per_kv == 1)
        return LAUNCH((attend_chunk<FORMAT, 1>), grid, dim3(THREADS), 0, stream, in);
    if (heads_per_kv == 2)
        return LAUNCH((attend_chunk<FORMAT, 2>), grid, dim3(THREADS), 0, stream, in);
    if (heads_per_kv <= 4)
        return LAUNCH((attend_chunk<FORMAT, 4>), grid, dim3(THREADS), 0, stream, in);
    return LAUNCH((attend_chunk<FORMAT, 8>), grid, dim3(THREADS), 0, stream, in); // more heads take turns
}

extern "C" cudaError_t launch_attention_decode(float *out, const float *qkv, struct attention_shape shape,
                                               struct device_rows rows, struct device_kv kv, int64_t max_context,
                                               void *scratch, cudaStream_t stream)
{
    if (rows.count == 0 || shape.num_heads == 0)
        return cudaSuccess;
    if (kv.head_dim < 2 || kv.head_dim > MAX_DIM || max_context < 1)
        return cudaErrorInvalidValue;
    struct decode_input in = {qkv, shape, rows, kv, {}, 4};
    int64_t chunks = chunk_count(max_context), parts = rows.count * shape.num_heads * chunks;
    in.parts.value = (float *)scratch;
    in.parts.largest = in.parts.value + parts * kv.head_dim;
    in.parts.sum = in.parts.largest + parts;
    in.parts.chunks = chunks;
    while (in.lanes * 8 < kv.head_dim)
        in.lanes *= 2;
    dim3 grid((unsigned)chunks, (unsigned)kv.num_kv_heads, (unsigned)rows.count);
    cudaError_t rc = kv.format == KV_BF16   ? launch_chunks<KV_BF16>(in, grid, shape.heads_per_kv, stream)
                     : kv.format == KV_E4M3 ? launch_chunks<KV_E4M3>(in, grid, shape.heads_per_kv, stream)
                     : kv.format == KV_INT8 ? launch_chunks<KV_INT8>(in, grid, shape.heads_per_kv, stream)
                                            : launch_chunks<KV_INT4>(in, grid, shape.heads_per_kv, stream);
    return rc != cudaSuccess ? rc
                             : LAUNCH(combine_chunks, dim3((unsigned)shape.num_heads, (unsigned)rows.count),
                                      dim3(COMBINE_THREADS), 0, stream, out, in);
}
