// Attention of few rows, each at its own position of its own sequence. Declared in launch.h.
//
// A block takes one chunk of ATTENTION_CHUNK positions of one row and all query heads that read one kv head, so that keys and values
// are read once. In it: scores of all positions, their maximum, weights and sum, then the weighted sum of the values; all in f32.
// What comes of a chunk, (maximum, sum, sums of values) per query head, goes to scratch, and a second kernel combines the chunks in ascending
// order. The grid covers max_context; blocks whose chunk the row does not see leave at once, so a captured launch stays good.
//
// A row of keys is read by LANES neighbouring lanes, 8 elements each (16 bytes of bf16, 8 of e4m3); a group of LANES lanes takes STEP
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

// Where a lane group's next STEP positions lie; `seen` says which of them the query sees.
template <enum kv_format FORMAT>
__device__ __forceinline__ void load_steps(uint4 *x, const void *cache, const struct device_kv &kv,
                                           const int64_t *row_of_page, int first_slot, int dim, int seen_begin,
                                           int seen_end)
{
    int head_dim = (int)kv.head_dim;
#pragma unroll
    for (int i = 0; i < STEP; i++) {
        int slot = first_slot + i;
        bool seen = slot >= seen_begin && slot < seen_end;
        int64_t row = seen ? row_of_page[slot / KV_PAGE_TOKENS] + (int64_t)(slot % KV_PAGE_TOKENS) * head_dim : 0;
        x[i] = load_eight<FORMAT>(cache, row, seen ? dim : head_dim, head_dim, head_dim % 8 == 0);
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
    int64_t row = blockIdx.z, kv_head = blockIdx.y, chunk = blockIdx.x;
    int64_t position = in.rows.position[row], begin = chunk * ATTENTION_CHUNK;
    int64_t first = window_begin(in.shape, position);
    if (begin > position || begin + ATTENTION_CHUNK <= first)
        return;
    // In what follows positions count from the chunk's first.
    int seen_begin = first > begin ? (int)(first - begin) : 0;
    int seen_end = position - begin < ATTENTION_CHUNK ? (int)(position - begin) + 1 : ATTENTION_CHUNK;

    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, lanes = in.lanes;
    int head_dim = (int)in.kv.head_dim, dim = lane % lanes * 8;
    int positions_per_turn = THREADS / lanes * STEP, turn_begin = (warp * (WARP / lanes) + lane / lanes) * STEP;

    const int32_t *pages = in.kv.pages + in.rows.sequence[row] * in.kv.pages_per_sequence + begin / KV_PAGE_TOKENS;
    int page = threadIdx.x; // pages that the row does not see may have no entry
    if (page * KV_PAGE_TOKENS < seen_end && (page + 1) * KV_PAGE_TOKENS > seen_begin)
        row_of_page[page] = kv_row(in.kv, pages[page], kv_head, 0);
    __syncthreads();

    // This rank may hold only some of the query heads of a kv head.
    int64_t head = (in.shape.kv_head_begin + kv_head) * in.shape.heads_per_kv - in.shape.head_begin;
    int64_t head_end = min(head + in.shape.heads_per_kv, in.shape.num_heads);
    for (head = max(head, (int64_t)0); head < head_end; head += HEADS) {
        int count = (int)min(head_end - head, (int64_t)HEADS);
        const float *q = in.qkv + row * (in.shape.num_heads + 2 * in.kv.num_kv_heads) * head_dim + head * head_dim;
        uint4 raw[STEP], next[STEP];
        load_steps<FORMAT>(next, in.kv.k, in.kv, row_of_page, turn_begin, dim, seen_begin, seen_end);
        for (int i = threadIdx.x; i < count * MAX_DIM; i += THREADS)
            work[i / MAX_DIM * MAX_DIM + split_place(i % MAX_DIM)] =
                i % MAX_DIM < head_dim ? q[i / MAX_DIM * head_dim + i % MAX_DIM] : 0.0f;
        __syncthreads();

#pragma unroll 1
        for (int turn = 0; turn < ATTENTION_CHUNK; turn += positions_per_turn) {
            float k[STEP][8];
#pragma unroll
            for (int i = 0; i < STEP; i++)
                raw[i] = next[i];
            if (turn + positions_per_turn < ATTENTION_CHUNK)
                load_steps<FORMAT>(next, in.kv.k, in.kv, row_of_page, turn + positions_per_turn + turn_begin, dim,
                                   seen_begin, seen_end);
#pragma unroll
            for (int i = 0; i < STEP; i++)
                widen_eight<FORMAT>(k[i], raw[i]);
            for (int h = 0; h < count; h++) {
                float4 low = load_shared((const float4 *)&work[h * MAX_DIM + dim / 2]);
                float4 high = load_shared((const float4 *)&work[h * MAX_DIM + MAX_DIM / 2 + dim / 2]);
                const float query[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
                float dot[STEP];
#pragma unroll
                for (int i = 0; i < STEP; i++) {
                    dot[i] = k[i][0] * query[0];
#pragma unroll
                    for (int j = 1; j < 8; j++)
                        dot[i] = fmaf(k[i][j], query[j], dot[i]);
                }
                float sum = sum_steps(dot, lanes, lane);
                if (lane % (lanes / 4) == 0)
                    scores[h * ATTENTION_CHUNK + turn + turn_begin + step_of_lane(lanes, lane)] = sum;
            }
        }
        // The first values are on their way while the weights are made.
        load_steps<FORMAT>(next, in.kv.v, in.kv, row_of_page, turn_begin, dim, seen_begin, seen_end);
        __syncthreads();

        for (int h = warp; h < count; h += WARPS) {
            float score[ATTENTION_CHUNK / WARP], largest = -INFINITY, sum = 0;
#pragma unroll
            for (int i = 0; i < ATTENTION_CHUNK / WARP; i++) {
                int slot = i * WARP + lane;
                bool seen = slot >= seen_begin && slot < seen_end;
                score[i] = seen ? finished_score(in.shape, scores[h * ATTENTION_CHUNK + slot]) : -INFINITY;
                largest = fmaxf(largest, score[i]); // passes over NaN, which reaches the sum
            }
            for (int mask = WARP / 2; mask; mask /= 2)
                largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, mask));
#pragma unroll
            for (int i = 0; i < ATTENTION_CHUNK / WARP; i++) {
                float weight = weight_of(score[i], largest);
                scores[h * ATTENTION_CHUNK + i * WARP + lane] = weight;
                sum += weight;
            }
            for (int mask = WARP / 2; mask; mask /= 2)
                sum += __shfl_xor_sync(0xffffffffu, sum, mask);
            if (lane == 0) {
                int64_t part = (row * in.shape.num_heads + head + h) * in.parts.chunks + chunk;
                in.parts.largest[part] = largest;
                in.parts.sum[part] = sum;
            }
        }
        __syncthreads();

        float value[HEADS][8];
#pragma unroll
        for (int h = 0; h < HEADS; h++)
#pragma unroll
            for (int j = 0; j < 8; j++)
                value[h][j] = 0;
#pragma unroll 1
        for (int turn = 0; turn < ATTENTION_CHUNK; turn += positions_per_turn) {
#pragma unroll
            for (int i = 0; i < STEP; i++)
                raw[i] = next[i];
            if (turn + positions_per_turn < ATTENTION_CHUNK)
                load_steps<FORMAT>(next, in.kv.v, in.kv, row_of_page, turn + positions_per_turn + turn_begin, dim,
                                   seen_begin, seen_end);
#pragma unroll
            for (int i = 0; i < STEP; i++) {
                float v[8];
                widen_eight<FORMAT>(v, raw[i]);
#pragma unroll
                for (int h = 0; h < HEADS; h++) {
                    if (h >= count)
                        break;
                    float weight = load_shared(&scores[h * ATTENTION_CHUNK + turn + turn_begin + i]);
#pragma unroll
                    for (int j = 0; j < 8; j++)
                        value[h][j] = fmaf(weight, v[j], value[h][j]);
                }
            }
        }

        // Lane groups by halves, then the warps in ascending order. Two buffers: one barrier per head.
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            if (h >= count)
                break;
            float *buffer = work + h % 2 * WARPS * MAX_DIM;
#pragma unroll
            for (int j = 0; j < 8; j++)
                for (int mask = WARP / 2; mask >= lanes; mask /= 2)
                    value[h][j] += __shfl_xor_sync(0xffffffffu, value[h][j], mask);
            if (lane < lanes) {
                store_shared((float4 *)&buffer[warp * MAX_DIM + dim / 2],
                             make_float4(value[h][0], value[h][1], value[h][2], value[h][3]));
                store_shared((float4 *)&buffer[warp * MAX_DIM + MAX_DIM / 2 + dim / 2],
                             make_float4(value[h][4], value[h][5], value[h][6], value[h][7]));
            }
            __syncthreads();
            int64_t part = (row * in.shape.num_heads + head + h) * in.parts.chunks + chunk;
            for (int i = threadIdx.x; i < head_dim; i += THREADS) {
                float sum = 0;
#pragma unroll
                for (int w = 0; w < WARPS; w++)
                    sum += buffer[w * MAX_DIM + split_place(i)];
                in.parts.value[part * head_dim + i] = sum;
            }
        }
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
    cudaError_t rc = kv.format == KV_E4M3 ? launch_chunks<KV_E4M3>(in, grid, shape.heads_per_kv, stream)
                                          : launch_chunks<KV_BF16>(in, grid, shape.heads_per_kv, stream);
    return rc != cudaSuccess ? rc
                             : LAUNCH(combine_chunks, dim3((unsigned)shape.num_heads, (unsigned)rows.count),
                                      dim3(COMBINE_THREADS), 0, stream, out, in);
}
