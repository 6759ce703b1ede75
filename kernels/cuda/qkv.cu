// Queries, keys and values after their product: bias, norms, rotation, and the way into the cache. Declared in launch.h.
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
            if (is_q) {
                x[at.x] = first;
                x[at.y] = second;
            } else {
                store_kv(is_v ? in.kv.v : in.kv.k, in.kv.format, slot + at.x, first);
                store_kv(is_v ? in.kv.v : in.kv.k, in.kv.format, slot + at.y, second);
            }
        }
    }
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
    return LAUNCH(finish_heads, dim3((unsigned)rows.count, parts), dim3(HEAD_WARPS * WARP), 0, stream, in);
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
