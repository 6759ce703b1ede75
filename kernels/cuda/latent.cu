// Attention over latent rows (DeepSeek's MLA). Declared in launch.h.
//
// The cache holds one row of kv_rank + rope_dim values per position, which is key and, in its first kv_rank columns, value of all heads.
// With a head's key K c and value V c for a latent c, q . K c = (K^T q) . c, and the weighted sum of values is V times the weighted sum of
// latents: queries are taken to the latent's side once (absorb), and what comes out is brought back (values).
//
// Attention: a block takes one row and 16 of its heads, which all read the same keys, and goes over the pages that the row sees in
// ascending order with the softmax of flash attention, on the tensor cores: queries, latents and weights as bf16, sums in f32. Its 4 warps
// share the keys of a page while scores are computed, the columns of the result after that. In decode a block takes LATENT_CHUNK
// positions, counted from 0 whatever the length, and the chunks' parts are combined in ascending order (law 9).
#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/rows.cuh"

namespace
{

enum {
    WARPS = 4,
    THREADS = WARPS * WARP,
    HEADS = 16, // of a block
    KEYS = KV_PAGE_TOKENS,
    MOST_TILES = LATENT_MAX_VALUE / 8 / WARPS, // of 8 columns of the result that a warp has
    WEIGHT_UNITS = KEYS / 8 | 1,               // pitch of the weights, in 16 bytes
    PRODUCT_ROWS = 16,                         // of a block of absorb and values
    PRODUCT_THREADS = 256,
};

// ---- norm, rotation, the cache -----------------------------------------------------------------------------------------

struct latent_rows {
    float *q;
    const float *latent, *norm;
    struct device_rotation rotation;
    float eps;
    struct device_rows rows;
    struct device_kv kv;
    struct device_latent shape;
};

// The pair `pair` of x, rotated by the angle.
__device__ __forceinline__ float2 rotated(const float *x, int2 at, float cosine, float sine)
{
    float a = x[at.x], b = x[at.y];
    return make_float2(a * cosine - b * sine, b * cosine + a * sine);
}

// One block per row.
__global__ void __launch_bounds__(PRODUCT_THREADS) finish_latent(struct latent_rows in)
{
    SHARED(float, warps, MAX_WARPS);
    SHARED(float, inverse, 1);
    int64_t row = blockIdx.x, position = in.rows.position[row], sequence = in.rows.sequence[row];
    int rank = (int)in.shape.kv_rank, width = rank + (int)in.shape.rope_dim, half = (int)in.shape.rope_dim / 2;
    int head_dim = (int)(in.shape.nope_dim + in.shape.rope_dim);
    const float *c = in.latent + row * width;
    int64_t page = in.kv.pages[sequence * in.kv.pages_per_sequence + position / KV_PAGE_TOKENS];
    int64_t slot = kv_row(in.kv, page, 0, (int)(position % KV_PAGE_TOKENS));
    float squares = 0;
    for (int i = threadIdx.x; i < rank; i += PRODUCT_THREADS)
        squares += c[i] * c[i];
    double sum = block_sum(squares, warps);
    if (threadIdx.x == 0)
        inverse[0] = (float)(1.0 / sqrt(sum / (double)rank + (double)in.eps));
    __syncthreads();
    for (int i = threadIdx.x; i < rank; i += PRODUCT_THREADS)
        store_kv(in.kv.k, in.kv.format, slot + i, c[i] * inverse[0] * in.norm[i]);

    // "Head" -1 is the key's.
    for (int i = threadIdx.x; i < (in.shape.num_heads + 1) * half; i += PRODUCT_THREADS) {
        int head = i / half - 1, pair = i % half;
        int2 at = in.rotation.interleaved ? make_int2(2 * pair, 2 * pair + 1) : make_int2(pair, pair + half);
        float angle = in.rotation.inv_freq ? (float)position * in.rotation.inv_freq[pair] : 0.0f;
        float factor = in.rotation.inv_freq ? in.rotation.factor : 1.0f;
        float *q = in.q + (row * in.shape.num_heads + head) * head_dim + in.shape.nope_dim;
        float2 x = rotated(head < 0 ? c + rank : q, at, cosf(angle) * factor, sinf(angle) * factor);
        if (head < 0) {
            store_kv(in.kv.k, in.kv.format, slot + rank + at.x, x.x);
            store_kv(in.kv.k, in.kv.format, slot + rank + at.y, x.y);
        } else {
            q[at.x] = x.x;
            q[at.y] = x.y;
        }
    }
}

// ---- to the latent's side and back -------------------------------------------------------------------------------------

struct head_product {
    float *out;
    const float *x;
    const uint16_t *w; // bf16 [heads][nope_dim + v_dim][stride]
    int64_t stride, rows;
    struct device_latent shape;
};

// grid (head, PRODUCT_ROWS rows, PRODUCT_THREADS columns): out [rows][heads][kv_rank + rope_dim] = K^T of the head times the query's first
// nope_dim columns, then its last ones as they are.
__global__ void __launch_bounds__(PRODUCT_THREADS) absorb_queries(struct head_product in)
{
    SHARED_DYNAMIC(float, q); // [PRODUCT_ROWS][head_dim]
    int head_dim = (int)(in.shape.nope_dim + in.shape.rope_dim), nope = (int)in.shape.nope_dim;
    int64_t head = blockIdx.x, first = (int64_t)blockIdx.y * PRODUCT_ROWS, heads = in.shape.num_heads;
    int64_t col = (int64_t)blockIdx.z * PRODUCT_THREADS + threadIdx.x, width = in.shape.kv_rank + in.shape.rope_dim;
    int count = (int)min(in.rows - first, (int64_t)PRODUCT_ROWS);
    for (int i = threadIdx.x; i < PRODUCT_ROWS * head_dim; i += PRODUCT_THREADS)
        q[i] = i / head_dim < count ? in.x[((first + i / head_dim) * heads + head) * head_dim + i % head_dim] : 0.0f;
    __syncthreads();
    if (col >= width)
        return;
    float sum[PRODUCT_ROWS];
    const uint16_t *keys = in.w + head * (in.shape.nope_dim + in.shape.v_dim) * in.stride + col;
#pragma unroll
    for (int r = 0; r < PRODUCT_ROWS; r++)
        sum[r] = col < in.shape.kv_rank ? 0.0f : q[r * head_dim + nope + (int)(col - in.shape.kv_rank)];
    for (int i = 0; i < nope && col < in.shape.kv_rank; i++) {
        float key = bf16_to_f32(keys[i * in.stride]);
#pragma unroll
        for (int r = 0; r < PRODUCT_ROWS; r++)
            sum[r] = fmaf(q[r * head_dim + i], key, sum[r]);
    }
#pragma unroll
    for (int r = 0; r < PRODUCT_ROWS; r++)
        if (r < count)
            in.out[((first + r) * heads + head) * width + col] = sum[r];
}

// grid (head, PRODUCT_ROWS rows): out [rows][heads][v_dim] = V of the head times the mixed latents. A warp takes one column of out at a
// time, its lanes the latent's.
__global__ void __launch_bounds__(PRODUCT_THREADS) latent_values(struct head_product in)
{
    SHARED_DYNAMIC(float, mixed); // [PRODUCT_ROWS][kv_rank]
    int rank = (int)in.shape.kv_rank, lane = threadIdx.x % WARP;
    int64_t head = blockIdx.x, first = (int64_t)blockIdx.y * PRODUCT_ROWS, heads = in.shape.num_heads;
    int count = (int)min(in.rows - first, (int64_t)PRODUCT_ROWS);
    for (int i = threadIdx.x; i < count * rank; i += PRODUCT_THREADS)
        mixed[i] = in.x[((first + i / rank) * heads + head) * rank + i % rank];
    __syncthreads();
    const uint16_t *values = in.w + (head * (in.shape.nope_dim + in.shape.v_dim) + in.shape.nope_dim) * in.stride;
    for (int64_t j = threadIdx.x / WARP; j < in.shape.v_dim; j += PRODUCT_THREADS / WARP) {
        float sum[PRODUCT_ROWS] = {0};
        for (int c = lane; c < rank; c += WARP) {
            float value = bf16_to_f32(values[j * in.stride + c]);
#pragma unroll
            for (int r = 0; r < PRODUCT_ROWS; r++)
                if (r < count)
                    sum[r] = fmaf(mixed[r * rank + c], value, sum[r]);
        }
#pragma unroll
        for (int r = 0; r < PRODUCT_ROWS; r++) {
            float whole = warp_sum(sum[r]);
            if (lane == 0 && r < count)
                in.out[((first + r) * heads + head) * in.shape.v_dim + j] = whole;
        }
    }
}

// ---- attention ---------------------------------------------------------------------------------------------------------

struct latent_parts {
    float *value, *largest, *sum; // [rows][heads][chunks], value [..][kv_rank]
    int64_t chunks;               // 0: prefill, a block sees all and writes the result itself
};

struct latent_input {
    float *out;
    const float *query; // [rows][heads][kv_rank + rope_dim]
    struct attention_shape attention;
    struct device_rows rows;
    struct device_kv kv;
    struct device_latent shape;
    struct latent_parts parts;
    int units, pitch; // of a row of keys: 16 bytes each, those with values and those from row to row
};

// Rows [0, KEYS) of one page, of which [begin, end) are seen; zeros elsewhere.
template <enum kv_format FORMAT>
__device__ __forceinline__ void load_latents(uint4 *tile, const struct latent_input &in, int64_t page, int begin,
                                             int end)
{
    int dim = (int)in.kv.head_dim;
    bool by_eights = dim % 8 == 0;
    int64_t row = kv_row(in.kv, page, 0, 0);
    for (int i = threadIdx.x; i < KEYS * in.units; i += THREADS) {
        int slot = i / in.units, unit = i % in.units;
        bool valid = slot >= begin && slot < end && unit * 8 < dim;
        int64_t at = row + (int64_t)slot * dim;
        uint4 *to = &tile[slot * in.pitch + unit];
        if (FORMAT == KV_BF16 && by_eights)
            copy_async16(to, valid ? (const uint16_t *)in.kv.k + at + unit * 8 : (const uint16_t *)in.kv.k, valid);
        else
            store_shared(
                to, eight_to_bf16<FORMAT>(load_eight<FORMAT>(in.kv.k, at, valid ? unit * 8 : dim, dim, by_eights)));
    }
    copy_async_commit();
}

__device__ __forceinline__ float quad_max(float x)
{
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float quad_sum(float x)
{
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// The queries of 16 heads of a row as bf16; zeros behind the last head and the last column.
__device__ __forceinline__ void load_queries(uint4 *q_tile, const struct latent_input &in, int64_t row, int64_t head)
{
    int64_t heads = in.shape.num_heads;
    int dim = (int)in.kv.head_dim;
    for (int i = threadIdx.x; i < HEADS * in.units * 4; i += THREADS) {
        int h = i / (in.units * 4), pair = i % (in.units * 4) * 2;
        const float *q = in.query + (row * heads + head + h) * dim + pair;
        bool here = head + h < heads;
        store_shared((uint32_t *)&q_tile[h * in.pitch + pair / 8] + pair % 8 / 2,
                     floats_to_bf162(here && pair < dim ? q[0] : 0.0f, here && pair + 1 < dim ? q[1] : 0.0f));
    }
}

// In the fragments of an MMA this thread has heads g and g + 8, and columns 2t, 2t + 1 of each 8; index h = 0, 1 stands for the two heads.
struct latent_place {
    int lane, warp, g, t;
    int begin, end;                  // positions that are seen
    int first_tile, num_tiles;       // columns of the result that are this warp's, by 8
    uint4 *q_tile, *k_tile, *w_tile; // shared: queries, the page's latents, weights
    float *warp_part;                // shared, [WARPS][HEADS]: what warps tell each other of a head
};

// Flash attention's sums so far: of weights this thread's own share.
struct latent_sums {
    float largest[2], sum[2], value[MOST_TILES][4];
};

// Scores of the warp's 16 keys of the page.
__device__ __forceinline__ void page_scores(float (&score)[2][4], const struct latent_input &in,
                                            const struct latent_place &at, int first_key)
{
    for (int k = 0; k < in.units / 2; k++) {
        uint32_t a[4], b[4];
        load_matrix_x4(a, &at.q_tile[at.lane % 16 * in.pitch + 2 * k + at.lane / 16]);
        load_matrix_x4(
            b, &at.k_tile[(at.warp * 16 + at.lane / 16 * 8 + at.lane % 8) * in.pitch + 2 * k + at.lane / 8 % 2]);
        mma_bf16(score[0], a, b);
        mma_bf16(score[1], a, b + 2);
    }
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int key = first_key + at.warp * 16 + n * 8 + 2 * at.t + i % 2;
            score[n][i] = key >= at.begin && key < at.end ? finished_score(in.attention, score[n][i]) : -INFINITY;
        }
}

// The scores become weights, which all warps find in w_tile behind the next barrier; shrink: what the sums before are worth now.
__device__ __forceinline__ void page_weights(struct latent_sums &sums, float (&shrink)[2], const float (&score)[2][4],
                                             const struct latent_place &at)
{
    float now[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            now[i / 2] = fmaxf(now[i / 2], score[n][i]); // passes over NaN, which reaches the sum
#pragma unroll
    for (int h = 0; h < 2; h++) {
        now[h] = quad_max(now[h]);
        if (at.t == 0)
            at.warp_part[at.warp * HEADS + at.g + 8 * h] = now[h];
    }
    __syncthreads();
#pragma unroll
    for (int h = 0; h < 2; h++) {
        now[h] = sums.largest[h];
#pragma unroll
        for (int w = 0; w < WARPS; w++)
            now[h] = fmaxf(now[h], at.warp_part[w * HEADS + at.g + 8 * h]);
        shrink[h] = weight_of(sums.largest[h], now[h]);
        sums.largest[h] = now[h];
        sums.sum[h] *= shrink[h];
#pragma unroll
        for (int n = 0; n < 2; n++) {
            float a = weight_of(score[n][2 * h], now[h]), b = weight_of(score[n][2 * h + 1], now[h]);
            sums.sum[h] += a;
            sums.sum[h] += b;
            ((uint32_t *)&at.w_tile[(at.g + 8 * h) * WEIGHT_UNITS + at.warp * 2 + n])[at.t] = floats_to_bf162(a, b);
        }
    }
}

// The warp's columns of the weighted sum of the page's latents.
__device__ __forceinline__ void page_values(struct latent_sums &sums, const float (&shrink)[2],
                                            const struct latent_input &in, const struct latent_place &at)
{
    int rank = (int)in.shape.kv_rank;
#pragma unroll
    for (int n = 0; n < MOST_TILES; n++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            sums.value[n][i] *= shrink[i / 2];
#pragma unroll
    for (int k = 0; k < KEYS / 16; k++) {
        uint32_t a[4];
        load_matrix_x4(a, &at.w_tile[at.lane % 16 * WEIGHT_UNITS + 2 * k + at.lane / 16]);
#pragma unroll
        for (int n = 0; n < MOST_TILES; n += 2) {
            if (n >= at.num_tiles || (at.first_tile + n) * 8 >= rank)
                continue;
            uint32_t b[4];
            load_matrix_x4_transposed(
                b, &at.k_tile[(k * 16 + at.lane % 16) * in.pitch + at.first_tile + n + at.lane / 16]);
            mma_bf16(sums.value[n], a, b);
            mma_bf16(sums.value[n + 1], a, b + 2);
        }
    }
}

// A chunk's part, or in prefill the result.
__device__ __forceinline__ void store_latents(const struct latent_sums &sums, const struct latent_input &in,
                                              const struct latent_place &at, int64_t row, int64_t head, int64_t chunk)
{
    int64_t heads = in.shape.num_heads;
    int rank = (int)in.shape.kv_rank;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float part = quad_sum(sums.sum[h]);
        if (at.t == 0)
            at.warp_part[at.warp * HEADS + at.g + 8 * h] = part;
    }
    __syncthreads();
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int64_t mine = row * heads + head + at.g + 8 * h;
        if (head + at.g + 8 * h >= heads)
            continue;
        float whole = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++)
            whole += at.warp_part[w * HEADS + at.g + 8 * h];
        bool parts = in.parts.chunks > 0;
        int64_t part = mine * in.parts.chunks + chunk;
        float *out = parts ? in.parts.value + part * rank : in.out + mine * rank;
        if (parts && at.warp == 0 && at.t == 0) {
            in.parts.largest[part] = sums.largest[h];
            in.parts.sum[part] = whole;
        }
#pragma unroll
        for (int n = 0; n < MOST_TILES; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int col = (at.first_tile + n) * 8 + 2 * at.t + i;
                if (n < at.num_tiles && col < rank)
                    out[col] = parts ? sums.value[n][2 * h + i] : sums.value[n][2 * h + i] / whole;
            }
    }
}

// grid (chunk, 16 heads, row).
template <enum kv_format FORMAT> __global__ void __launch_bounds__(THREADS, 1) attend_latent(struct latent_input in)
{
    SHARED_DYNAMIC(uint4, tiles);
    SHARED(float, warp_part, WARPS *HEADS);
    int64_t row = blockIdx.z, chunk = blockIdx.x, head = (int64_t)blockIdx.y * HEADS;
    int64_t position = in.rows.position[row];
    struct latent_place at = {};
    at.lane = threadIdx.x % WARP;
    at.warp = threadIdx.x / WARP;
    at.g = at.lane / 4;
    at.t = at.lane % 4;
    at.begin = (int)window_begin(in.attention, position);
    at.end = (int)position + 1;
    if (in.parts.chunks > 0) {
        at.begin = max(at.begin, (int)chunk * LATENT_CHUNK);
        at.end = min(at.end, (int)(chunk + 1) * LATENT_CHUNK);
    }
    if (at.begin >= at.end)
        return;
    at.num_tiles = (((int)in.shape.kv_rank + 7) / 8 + 2 * WARPS - 1) / (2 * WARPS) * 2;
    at.first_tile = at.warp * at.num_tiles;
    at.q_tile = tiles;
    at.k_tile = tiles + HEADS * in.pitch;
    at.w_tile = at.k_tile + KEYS * in.pitch;
    at.warp_part = warp_part;
    load_queries(at.q_tile, in, row, head);

    const int32_t *pages = in.kv.pages + in.rows.sequence[row] * in.kv.pages_per_sequence;
    struct latent_sums sums = {};
    sums.largest[0] = sums.largest[1] = -INFINITY;
    for (int page = at.begin / KEYS; page * KEYS < at.end; page++) {
        int first_key = page * KEYS;
        float score[2][4] = {{0, 0, 0, 0}, {0, 0, 0, 0}}, shrink[2];
        load_latents<FORMAT>(at.k_tile, in, pages[page], at.begin - first_key, at.end - first_key);
        copy_async_wait<0>();
        __syncthreads();
        page_scores(score, in, at, first_key);
        page_weights(sums, shrink, score, at);
        __syncthreads();
        page_values(sums, shrink, in, at);
        __syncthreads(); // the page is done with
    }
    store_latents(sums, in, at, row, head, chunk);
}

// grid (head, row): the chunks' parts together, in ascending order.
__global__ void __launch_bounds__(PRODUCT_THREADS) combine_latent(struct latent_input in)
{
    int64_t position = in.rows.position[blockIdx.y], head = blockIdx.y * in.shape.num_heads + blockIdx.x;
    int64_t begin = window_begin(in.attention, position) / LATENT_CHUNK, end = position / LATENT_CHUNK + 1;
    int64_t rank = in.shape.kv_rank, part = head * in.parts.chunks;
    float largest = -INFINITY, sum = 0;
    for (int64_t chunk = begin; chunk < end; chunk++)
        largest = fmaxf(largest, in.parts.largest[part + chunk]);
    for (int64_t chunk = begin; chunk < end; chunk++)
        sum = fmaf(weight_of(in.parts.largest[part + chunk], largest), in.parts.sum[part + chunk], sum);
    for (int64_t col = threadIdx.x; col < rank; col += PRODUCT_THREADS) {
        float value = 0;
        for (int64_t chunk = begin; chunk < end; chunk++)
            value = fmaf(weight_of(in.parts.largest[part + chunk], largest),
                         in.parts.value[(part + chunk) * rank + col], value);
        in.out[head * rank + col] = value / sum;
    }
}

int64_t chunk_count(int64_t max_context) { return rounded_up_quotient(max_context, LATENT_CHUNK); }

} // namespace

extern "C" cudaError_t launch_finish_latent(float *q, const float *latent, const float *norm, float eps,
                                            struct device_rotation rotation, struct device_latent shape,
                                            struct device_rows rows, struct device_kv kv, cudaStream_t stream)
{
    if (rows.count == 0)
        return cudaSuccess;
    struct latent_rows in = {q, latent, norm, rotation, eps, rows, kv, shape};
    return LAUNCH(finish_latent, dim3((unsigned)rows.count), dim3(PRODUCT_THREADS), 0, stream, in);
}

static struct head_product product_of(float *out, const float *x, const struct matrix *kv_b, struct device_latent shape,
                                      int64_t rows)
{
    return {out, x, (const uint16_t *)kv_b->data, (int64_t)kv_b->shape.cols_padded, rows, shape};
}

extern "C" cudaError_t launch_absorb_queries(float *query, const float *q, const struct matrix *kv_b,
                                             struct device_latent shape, int64_t rows, cudaStream_t stream)
{
    if (rows == 0 || shape.num_heads == 0)
        return cudaSuccess;
    int64_t width = shape.kv_rank + shape.rope_dim;
    dim3 grid((unsigned)shape.num_heads, (unsigned)rounded_up_quotient(rows, PRODUCT_ROWS),
              (unsigned)rounded_up_quotient(width, PRODUCT_THREADS));
    unsigned bytes = (unsigned)(PRODUCT_ROWS * (shape.nope_dim + shape.rope_dim) * (int64_t)sizeof(float));
    return LAUNCH(absorb_queries, grid, dim3(PRODUCT_THREADS), bytes, stream, product_of(query, q, kv_b, shape, rows));
}

extern "C" cudaError_t launch_latent_values(float *out, const float *mixed, const struct matrix *kv_b,
                                            struct device_latent shape, int64_t rows, cudaStream_t stream)
{
    if (rows == 0 || shape.num_heads == 0)
        return cudaSuccess;
    dim3 grid((unsigned)shape.num_heads, (unsigned)rounded_up_quotient(rows, PRODUCT_ROWS));
    unsigned bytes = (unsigned)(PRODUCT_ROWS * shape.kv_rank * (int64_t)sizeof(float));
    return LAUNCH(latent_values, grid, dim3(PRODUCT_THREADS), bytes, stream, product_of(out, mixed, kv_b, shape, rows));
}

extern "C" uint64_t latent_scratch_bytes(int64_t max_rows, struct device_latent shape, int64_t max_context)
{
    return (uint64_t)max_rows * (uint64_t)shape.num_heads * (uint64_t)chunk_count(max_context) *
           ((uint64_t)shape.kv_rank + 2) * sizeof(float);
}

extern "C" cudaError_t launch_latent_attention(float *mixed, const float *query, struct attention_shape attention,
                                               struct device_latent shape, struct device_rows rows, struct device_kv kv,
                                               int64_t max_context, void *scratch, cudaStream_t stream)
{
    if (rows.count == 0 || shape.num_heads == 0)
        return cudaSuccess;
    if (kv.head_dim > LATENT_MAX_KEY || shape.kv_rank > LATENT_MAX_VALUE || rows.count > 65535)
        return cudaErrorInvalidValue;
    struct latent_input in = {mixed, query, attention, rows, kv, shape, {}, 0, 0};
    in.units = (int)rounded_up_quotient(kv.head_dim, 16) * 2;
    in.pitch = in.units | 1; // ldmatrix reads the same unit of 8 consecutive rows: they lie in different banks
    int64_t chunks = scratch ? chunk_count(max_context) : 1, parts = rows.count * shape.num_heads * chunks;
    if (scratch) {
        in.parts.value = (float *)scratch;
        in.parts.largest = in.parts.value + parts * shape.kv_rank;
        in.parts.sum = in.parts.largest + parts;
        in.parts.chunks = chunks;
    }
    dim3 grid((unsigned)chunks, (unsigned)rounded_up_quotient(shape.num_heads, HEADS), (unsigned)rows.count);
    unsigned bytes = (unsigned)(((HEADS + KEYS) * in.pitch + HEADS * WEIGHT_UNITS) * (int)sizeof(uint4));
    cudaError_t rc = kv.format == KV_E4M3 ? LAUNCH((attend_latent<KV_E4M3>), grid, dim3(THREADS), bytes, stream, in)
                                          : LAUNCH((attend_latent<KV_BF16>), grid, dim3(THREADS), bytes, stream, in);
    if (rc != cudaSuccess || !scratch)
        return rc;
    return LAUNCH(combine_latent, dim3((unsigned)shape.num_heads, (unsigned)rows.count), dim3(PRODUCT_THREADS), 0,
                  stream, in);
}
