// Queries, keys and values after their product: bias, norms, rotation, and the way into the cache. Declared in launch.h.
//
// A cache with scales takes a second kernel: it has to know all of a head before it can round a part of it.
//
// The same bits as the CPU's table but for sums of squares, which are added in another order, and for what the device's cosf and sinf
// make of an angle.
#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/rows.cuh"

enum {
    HEAD_WARPS = 8,                               // of a block of finish_qkv
    HEAD_PAIRS = KERNELS_MAX_HEAD_DIM / 2 / WARP, // that a lane holds
    FEW_ROWS = 16,                                // up to here finish_qkv spreads the heads of a row over blocks
};

struct qkv_input {
    float *qkv;
    struct device_qkv how;
    struct device_rows rows;
    struct device_kv kv;
};

// The columns of a head that a pair stands for: those that rotate together; behind them neighbours.
__device__ __forceinline__ int2 columns_of(const struct device_qkv &how, int pair)
{
    int half = (int)how.rotary_dim / 2;
    return how.rotation.interleaved || pair >= half ? make_int2(2 * pair, 2 * pair + 1) : make_int2(pair, pair + half);
}

// One warp per head; a lane holds the pairs lane, lane + 32, ... of a head's columns. blockIdx.x is the row, blockIdx.y a part of its heads.
__global__ void __launch_bounds__(HEAD_WARPS *WARP) finish_heads(struct qkv_input in)
{
    const struct device_qkv &how = in.how;
    int lane = threadIdx.x % WARP, head_dim = (int)in.kv.head_dim, half = head_dim / 2;
    int rotating = how.rotation.inv_freq ? (int)how.rotary_dim / 2 : 0; // pairs
    int64_t row = blockIdx.x, position = in.rows.position[row], sequence = in.rows.sequence[row];
    int64_t kv_heads = in.kv.num_kv_heads, heads = how.num_heads + 2 * kv_heads;
    int64_t page = in.kv.pages[sequence * in.kv.pages_per_sequence + position / KV_PAGE_TOKENS];

    float cosine[HEAD_PAIRS], sine[HEAD_PAIRS];
#pragma unroll
    for (int i = 0; i < HEAD_PAIRS; i++) {
        int pair = lane + i * WARP;
        float angle = pair < rotating ? (float)position * how.rotation.inv_freq[pair] : 0.0f;
        cosine[i] = cosf(angle) * how.rotation.factor;
        sine[i] = sinf(angle) * how.rotation.factor;
    }

    for (int64_t head = (int64_t)blockIdx.y * HEAD_WARPS + threadIdx.x / WARP; head < heads;
         head += (int64_t)gridDim.y * HEAD_WARPS) {
        bool is_q = head < how.num_heads, is_v = head >= how.num_heads + kv_heads;
        int64_t kv_head = is_v ? head - how.num_heads - kv_heads : head - how.num_heads;
        float *x = in.qkv + (row * heads + head) * head_dim;
        float a[HEAD_PAIRS], b[HEAD_PAIRS], squares = 0;
#pragma unroll
        for (int i = 0; i < HEAD_PAIRS; i++) {
            int pair = lane + i * WARP;
            int2 at = columns_of(how, pair);
            a[i] = pair < half ? x[at.x] : 0.0f;
            b[i] = pair < half ? x[at.y] : 0.0f;
            if (how.bias && pair < half) {
                a[i] += how.bias[head * head_dim + at.x];
                b[i] += how.bias[head * head_dim + at.y];
            }
            squares += a[i] * a[i];
            squares += b[i] * b[i];
        }
        const float *norm = is_v ? NULL : is_q ? how.q_norm : how.k_norm;
        float inverse = 1.0f;
        if (norm && how.squares) {
            inverse =
                (float)(1.0 / sqrt((double)how.squares[2 * row + !is_q] / (double)(is_q ? how.q_width : how.k_width) +
                                   (double)how.eps));
            norm += (is_q ? head : kv_head) * head_dim;
        } else if (norm) {
            inverse = 1.0f / sqrtf(warp_sum(squares) / (float)head_dim + how.eps);
        }

        int64_t slot = ((page * kv_heads + kv_head) * KV_PAGE_TOKENS + position % KV_PAGE_TOKENS) * head_dim;
#pragma unroll
        for (int i = 0; i < HEAD_PAIRS; i++) {
            int pair = lane + i * WARP;
            int2 at = columns_of(how, pair);
            if (pair >= half)
                continue;
            if (norm) {
                a[i] = a[i] * inverse * norm[at.x];
                b[i] = b[i] * inverse * norm[at.y];
            }
            bool rotates = !is_v && pair < rotating;
            float first = rotates ? a[i] * cosine[i] - b[i] * sine[i] : a[i];
            float second = rotates ? b[i] * cosine[i] + a[i] * sine[i] : b[i];
            if (is_q || in.kv.k_scale) { // the scaled formats go on from here
                x[at.x] = first;
                x[at.y] = second;
            } else {
                store_kv(is_v ? in.kv.v : in.kv.k, in.kv.format, slot + at.x, first);
                store_kv(is_v ? in.kv.v : in.kv.k, in.kv.format, slot + at.y, second);
            }
        }
    }
}

// ---- scaled caches -------------------------------------------------------------------------------------------------------

enum { HEAD_PARTS = KERNELS_MAX_HEAD_DIM / WARP }; // column lane + 32 i of a head is part i of a lane

__device__ __forceinline__ void load_head(float (&part)[HEAD_PARTS], const float *x, int head_dim, int lane)
{
#pragma unroll
    for (int i = 0; i < HEAD_PARTS; i++)
        part[i] = i * WARP + lane < head_dim ? x[i * WARP + lane] : 0.0f;
}

// Columns behind the head are zeros and stay so: a block lies in the head or behind it.
__device__ __forceinline__ void rotate_head(float (&part)[HEAD_PARTS], int head_dim, int lane)
{
    int block = (int)kv_rotation_block(head_dim);
    for (int distance = 1; distance < WARP && distance < block; distance *= 2)
#pragma unroll
        for (int i = 0; i < HEAD_PARTS; i++) {
            float other = __shfl_xor_sync(0xffffffffu, part[i], distance);
            part[i] = lane & distance ? other - part[i] : part[i] + other;
        }
#pragma unroll
    for (int step = 1; step < HEAD_PARTS; step *= 2)
        if (step * WARP < block)
#pragma unroll
            for (int i = 0; i < HEAD_PARTS; i++)
                if (!(i & step)) {
                    float a = part[i], b = part[i + step];
                    part[i] = a + b;
                    part[i + step] = a - b;
                }
}

__device__ __forceinline__ void store_head(float *x, const float (&part)[HEAD_PARTS], int head_dim, int lane,
                                           float factor)
{
#pragma unroll
    for (int i = 0; i < HEAD_PARTS; i++)
        if (i * WARP + lane < head_dim)
            x[i * WARP + lane] = part[i] * factor;
}

// to: of the row's codes.
__device__ __forceinline__ void store_codes(uint8_t *to, uint16_t *scale, const float (&part)[HEAD_PARTS],
                                            enum kv_format format, int head_dim, int lane)
{
    uint32_t extent = 0;
#pragma unroll
    for (int i = 0; i < HEAD_PARTS; i++)
        if (i * WARP + lane < head_dim)
            extent = max(extent, kv_extent(part[i]));
    for (int mask = WARP / 2; mask; mask /= 2)
        extent = max(extent, __shfl_xor_sync(0xffffffffu, extent, mask));
    uint16_t bits = kv_scale(format, extent);
    float inverse = kv_inverse_scale(bits);
    if (lane == 0)
        *scale = bits;
#pragma unroll
    for (int i = 0; i < HEAD_PARTS; i++) {
        int column = i * WARP + lane;
        if (format == KV_INT8) {
            if (column < head_dim)
                to[column] = kv_code_int8(part[i], inverse);
            continue;
        }
        // The column that shares the byte stands behind by half of its block, whose columns are neighbouring lanes.
        int block = column / 8 * 8, half = head_dim - block < 8 ? (head_dim - block) / 2 : 4;
        unsigned code = kv_code_int4(part[i], inverse);
        unsigned other = __shfl_sync(0xffffffffu, code, (lane + half) & (WARP - 1));
        if (column < head_dim && kv_int4_shift(column, head_dim) == 0)
            to[kv_int4_byte(column, head_dim)] = (uint8_t)(code | other << 4);
    }
}

// One warp per head, as in finish_heads, whose results stand in qkv.
__global__ void __launch_bounds__(HEAD_WARPS *WARP) store_scaled(struct qkv_input in)
{
    int lane = threadIdx.x % WARP, head_dim = (int)in.kv.head_dim;
    int64_t row = blockIdx.x, position = in.rows.position[row], sequence = in.rows.sequence[row];
    int64_t kv_heads = in.kv.num_kv_heads, heads = in.how.num_heads + 2 * kv_heads;
    int64_t page = in.kv.pages[sequence * in.kv.pages_per_sequence + position / KV_PAGE_TOKENS];
    for (int64_t head = (int64_t)blockIdx.y * HEAD_WARPS + threadIdx.x / WARP; head < heads;
         head += (int64_t)gridDim.y * HEAD_WARPS) {
        float *x = in.qkv + (row * heads + head) * head_dim, part[HEAD_PARTS];
        load_head(part, x, head_dim, lane);
        rotate_head(part, head_dim, lane);
        if (head < in.how.num_heads) {
            store_head(x, part, head_dim, lane, 1.0f / (float)kv_rotation_block(head_dim));
            continue;
        }
        bool is_v = head >= in.how.num_heads + kv_heads;
        int64_t kv_head = head - in.how.num_heads - (is_v ? kv_heads : 0);
        int64_t slot = (page * kv_heads + kv_head) * KV_PAGE_TOKENS + position % KV_PAGE_TOKENS;
        int64_t at = in.kv.format == KV_INT4 ? slot * head_dim / 2 : slot * head_dim;
        store_codes((uint8_t *)(is_v ? in.kv.v : in.kv.k) + at, (is_v ? in.kv.v_scale : in.kv.k_scale) + slot, part,
                    in.kv.format, head_dim, lane);
    }
}

__global__ void __launch_bounds__(HEAD_WARPS *WARP) rotate_heads(float *x, int64_t heads, int head_dim, float factor)
{
    int lane = threadIdx.x % WARP;
    int64_t head = (int64_t)blockIdx.x * HEAD_WARPS + threadIdx.x / WARP;
    if (head >= heads)
        return;
    float part[HEAD_PARTS];
    load_head(part, x + head * head_dim, head_dim, lane);
    rotate_head(part, head_dim, lane);
    store_head(x + head * head_dim, part, head_dim, lane, factor);
}

extern "C" cudaError_t launch_rotate_heads(float *x, int64_t heads, int64_t head_dim, float factor, cudaStream_t stream)
{
    if (heads == 0)
        return cudaSuccess;
    if (head_dim > KERNELS_MAX_HEAD_DIM)
        return cudaErrorInvalidValue;
    return LAUNCH(rotate_heads, dim3((unsigned)rounded_up_quotient(heads, HEAD_WARPS)), dim3(HEAD_WARPS * WARP), 0,
                  stream, x, heads, (int)head_dim, factor);
}

extern "C" cudaError_t launch_finish_qkv(float *qkv, struct device_qkv how, struct device_rows rows,
                                         struct device_kv kv, cudaStream_t stream)
{
    int64_t heads = how.num_heads + 2 * kv.num_kv_heads;
    if (rows.count == 0 || heads == 0)
        return cudaSuccess;
    if (kv.head_dim > KERNELS_MAX_HEAD_DIM || how.rotary_dim > kv.head_dim)
        return cudaErrorInvalidValue;
    struct qkv_input in = {qkv, how, rows, kv};
    unsigned parts = rows.count <= FEW_ROWS ? (unsigned)rounded_up_quotient(heads, HEAD_WARPS) : 1;
    dim3 grid((unsigned)rows.count, parts);
    cudaError_t rc = LAUNCH(finish_heads, grid, dim3(HEAD_WARPS * WARP), 0, stream, in);
    return rc != cudaSuccess || !kv.k_scale ? rc : LAUNCH(store_scaled, grid, dim3(HEAD_WARPS * WARP), 0, stream, in);
}

// ---- sums of squares over all heads ----------------------------------------------------------------------------------

// One block per row: the bias is added to all of it, then the squares of q and those of k in [k_begin, k_end) are summed.
__global__ void __launch_bounds__(MAX_WARPS *WARP)
    sum_squares(float *squares, float *qkv, const float *bias, int64_t width, int64_t q_end, int64_t k_begin,
                int64_t k_end)
{
    SHARED(float, warps, 2 * MAX_WARPS);
    float *x = qkv + blockIdx.x * width, of_q = 0, of_k = 0;
    for (int64_t i = threadIdx.x; i < width; i += blockDim.x) {
        float value = bias ? x[i] + bias[i] : x[i];
        x[i] = value;
        if (i < q_end)
            of_q += value * value;
        else if (i >= k_begin && i < k_end)
            of_k += value * value;
    }
    double q = block_sum(of_q, warps), k = block_sum(of_k, warps + MAX_WARPS);
    if (threadIdx.x == 0) {
        squares[2 * blockIdx.x] = (float)q;
        squares[2 * blockIdx.x + 1] = (float)k;
    }
}

extern "C" cudaError_t launch_squares(float *squares, float *qkv, const float *bias, int64_t rows, int64_t width,
                                      int64_t q_end, int64_t k_begin, int64_t k_end, cudaStream_t stream)
{
    if (rows == 0)
        return cudaSuccess;
    return LAUNCH(sum_squares, dim3((unsigned)rows), dim3(MAX_WARPS * WARP), 0, stream, squares, qkv, bias, width,
                  q_end, k_begin, k_end);
}
