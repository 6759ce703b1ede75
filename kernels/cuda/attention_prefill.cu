// Attention of many rows at consecutive positions of one sequence, on the tensor cores. Declared in launch.h.
//
// A block takes QUERIES rows of one query head, a warp 16 of them, and goes over the pages of keys and values that they see, in
// ascending order, with the softmax of flash attention: scores, running maximum and sum in f32; queries, keys, weights and values
// enter the products as bf16, codes of a scaled cache exactly, whose scales multiply scores and weights. A page is a tile, whatever the
// launch's first position: the order of a row's sums is given by its position alone, and a tile that a row does not see leaves its sums
// as they are (law 9).
//
// One buffer each for queries, keys and values: values arrive while scores are computed, the next keys while values are used.
#include "kernels/cuda/attention.cuh"

enum {
    WARP = 32,
    WARPS = 4,
    THREADS = WARPS * WARP,
    QUERIES = 16 * WARPS,
    KEYS = KV_PAGE_TOKENS,
    KEY_TILES = KEYS / 8, // of an MMA's result
};

struct prefill_input {
    const float *qkv;
    float *out;
    struct attention_shape shape;
    struct device_rows rows;
    struct device_kv kv;
};

// Place of (row, 8 elements) in a tile of rows of DIM bf16, in units of 16 bytes. ldmatrix reads the same unit of 8 consecutive rows:
// they lie in different banks, by exchanging units inside 128 bytes, or by an odd pitch where DIM is no multiple of 64.
template <int DIM> constexpr int tile_pitch = DIM % 64 ? DIM / 8 | 1 : DIM / 8;
template <int DIM> __device__ __forceinline__ int tile_place_of(int row, int unit)
{
    return row * tile_pitch<DIM> + (DIM % 64 ? unit : unit ^ (row & 7));
}

// Threads are dealt to units of 16 bytes as if a row had this many, a power of two: so the 8 lanes that store together stay in one row.
template <int DIM> constexpr int dealt_units = DIM <= 64 ? 8 : DIM <= 128 ? 16 : 32;

__device__ __forceinline__ int64_t first_slot_of(const struct device_kv &kv, int64_t page, int64_t kv_head)
{
    return (page * kv.num_kv_heads + kv_head) * KV_PAGE_TOKENS;
}

// Starts to bring one page of keys or values; zeros behind head_dim and from slot `end` on: what lies there was never written, and 0 times
// it might be a NaN.
//   first_slot  of the page, counted over the cache's rows
//   scales, scale_cache  where the format has them
template <enum kv_format FORMAT, int DIM>
__device__ __forceinline__ void load_page(uint4 *tile, uint16_t *scales, const void *cache, const uint16_t *scale_cache,
                                          int head_dim, int64_t first_slot, int end)
{
    if (scaled_cache<FORMAT> && threadIdx.x < KEYS) {
        int slot = threadIdx.x;
        store_shared(&scales[slot], slot < end ? load_global(scale_cache + first_slot + slot) : (uint16_t)0);
    }
    bool by_eights = head_dim % 8 == 0;
#pragma unroll(FORMAT == KV_INT4 ? 2 : 4) // codes of four bits take registers on their way
    for (int i = threadIdx.x; i < KEYS * dealt_units<DIM>; i += THREADS) {
        int slot = i / dealt_units<DIM>, unit = i % dealt_units<DIM>;
        if (unit >= DIM / 8)
            continue;
        bool valid = slot < end && unit * 8 < head_dim;
        int64_t at = (first_slot + slot) * head_dim;
        uint4 *to = &tile[tile_place_of<DIM>(slot, unit)];
        if (FORMAT == KV_BF16 && by_eights)
            copy_async16(to, valid ? (const uint16_t *)cache + at + unit * 8 : (const uint16_t *)cache, valid);
        else
            store_shared(to, eight_to_bf16<FORMAT>(
                                 load_eight<FORMAT>(cache, at, valid ? unit * 8 : head_dim, head_dim, by_eights)));
    }
}

__device__ __forceinline__ bool is_special(uint32_t bf16) { return (bf16 & 0x7f80) == 0x7f80; } // Inf or NaN

// Looks for Inf and NaN in the units of a tile that fall to this thread, and clears them if asked to. True if there was any.
template <int DIM> __device__ __forceinline__ bool scan_special(uint4 *tile, bool clear)
{
    bool any = false;
    for (int i = threadIdx.x; i < KEYS * dealt_units<DIM>; i += THREADS) {
        int slot = i / dealt_units<DIM>, unit = i % dealt_units<DIM>;
        if (unit >= DIM / 8)
            continue;
        uint4 *place = &tile[tile_place_of<DIM>(slot, unit)];
        uint4 x = load_shared(place);
        uint32_t word[4] = {x.x, x.y, x.z, x.w};
        bool here = false;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            bool low = is_special(word[j]), high = is_special(word[j] >> 16);
            here |= low | high;
            word[j] &= (low ? 0xffff0000 : 0xffffffff) & (high ? 0x0000ffff : 0xffffffff);
        }
        any |= here;
        if (clear && here)
            store_shared(place, make_uint4(word[0], word[1], word[2], word[3]));
    }
    return any;
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

// In the fragments of an MMA this thread has rows g and g + 8 of its warp's 16, and columns 2t, 2t + 1 of each 8. Index h = 0, 1 stands for
// the two rows.
struct tile_place {
    int lane, warp, g, t;
    int first_key;                     // position of the page
    bool all_seen;                     // the page, by all rows of the block
    int position[2], seen_from[2];     // of the rows
    const uint16_t *k_scale, *v_scale; // shared, bf16 [KEYS], of the page; where the format has them
};

// Flash attention's sums so far: of weights this thread's own share.
template <int DIM> struct tile_sums {
    float largest[2], sum[2], value[DIM / 8][4];
};

// The block's rows of queries as bf16, zeros behind the last row and column.
template <int DIM>
__device__ __forceinline__ void load_queries(uint4 *q_tile, const float *q, int64_t stride, int rows, int head_dim)
{
    for (int i = threadIdx.x; i < QUERIES * 4 * dealt_units<DIM>; i += THREADS) {
        // head_dim is even; lanes behind the last pair repeat it
        int row = i / (4 * dealt_units<DIM>), dim = min(i % (4 * dealt_units<DIM>)*2, DIM - 2);
        float2 x = row < rows && dim < head_dim ? load_global((const float2 *)(q + (int64_t)row * stride + dim))
                                                : make_float2(0, 0);
        store_shared((uint32_t *)&q_tile[tile_place_of<DIM>(row, dim / 8)] + dim % 8 / 2, floats_to_bf162(x.x, x.y));
    }
}

// Queries that stay in registers, or that are read for each use.
template <int DIM> constexpr bool queries_stay = DIM < 128;
template <int DIM> constexpr int query_parts = queries_stay<DIM> ? DIM / 16 : 1;

template <int DIM>
__device__ __forceinline__ void load_query(uint32_t (&q)[4], const uint4 *q_tile, const struct tile_place &at, int k)
{
    load_matrix_x4(q, &q_tile[tile_place_of<DIM>(at.warp * 16 + at.lane % 16, 2 * k + at.lane / 16)]);
}

// Those of this thread's two columns of key tile n, as they lie.
__device__ __forceinline__ uint32_t two_scales(const uint16_t *scales, int n, const struct tile_place &at)
{
    return load_shared((const uint32_t *)(const void *)(scales + n * 8 + 2 * at.t));
}

// Scores of the warp's rows and the page's keys.
template <int DIM, bool SCALED>
__device__ __forceinline__ void page_scores(float (&score)[KEY_TILES][4], uint32_t (&q)[query_parts<DIM>][4],
                                            const uint4 *q_tile, const uint4 *k_tile,
                                            const struct attention_shape &shape, const struct tile_place &at)
{
#pragma unroll
    for (int n = 0; n < KEY_TILES; n++)
        score[n][0] = score[n][1] = score[n][2] = score[n][3] = 0;
#pragma unroll(queries_stay <DIM> ? DIM / 16 : 4)
    for (int k = 0; k < DIM / 16; k++) {
        if (!queries_stay<DIM>)
            load_query<DIM>(q[0], q_tile, at, k);
#pragma unroll
        for (int n = 0; n < KEY_TILES; n += 2) {
            uint32_t b[4];
            int lane = at.lane;
            load_matrix_x4(b, &k_tile[tile_place_of<DIM>(n * 8 + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2)]);
            mma_bf16(score[n], q[queries_stay<DIM> ? k : 0], b);
            mma_bf16(score[n + 1], q[queries_stay<DIM> ? k : 0], b + 2);
        }
    }
#pragma unroll
    for (int n = 0; n < KEY_TILES; n++) {
        uint32_t scales = SCALED ? two_scales(at.k_scale, n, at) : 0;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int key = at.first_key + n * 8 + 2 * at.t + i % 2;
            float scale = f32_from_bits(i % 2 ? scales & 0xffff0000u : scales << 16);
            score[n][i] = finished_score(shape, SCALED ? score[n][i] * scale : score[n][i]);
            if (!at.all_seen && (key > at.position[i / 2] || key < at.seen_from[i / 2]))
                score[n][i] = -INFINITY;
        }
    }
}

// The scores become weights, of which the sums take theirs; what they had before shrinks. A scale that a row does not see may be anything.
template <int DIM, bool SCALED>
__device__ __forceinline__ void page_weights(uint32_t (&weight)[KEY_TILES][2], struct tile_sums<DIM> &sums,
                                             const float (&score)[KEY_TILES][4], const struct tile_place &at)
{
    float tile_largest[2] = {-INFINITY, -INFINITY}, shrink[2];
#pragma unroll
    for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            tile_largest[i / 2] = fmaxf(tile_largest[i / 2], score[n][i]); // passes over NaN, which reaches the sum
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float now = fmaxf(sums.largest[h], quad_max(tile_largest[h]));
        shrink[h] = weight_of(sums.largest[h], now);
        sums.largest[h] = now;
        sums.sum[h] *= shrink[h];
    }
#pragma unroll
    for (int n = 0; n < KEY_TILES; n++) {
        uint32_t scales = SCALED ? two_scales(at.v_scale, n, at) : 0;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float a = weight_of(score[n][2 * h], sums.largest[h]), b = weight_of(score[n][2 * h + 1], sums.largest[h]);
            sums.sum[h] += a;
            sums.sum[h] += b;
            if (SCALED) {
                a *= score[n][2 * h] == -INFINITY ? 0.0f : f32_from_bits(scales << 16);
                b *= score[n][2 * h + 1] == -INFINITY ? 0.0f : f32_from_bits(scales & 0xffff0000u);
            }
            weight[n][h] = floats_to_bf162(a, b);
        }
    }
#pragma unroll
    for (int n = 0; n < DIM / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            sums.value[n][i] *= shrink[i / 2];
}

// A row takes no harm from Inf and NaN among values that it does not see, though 0 times them is a NaN: in a tile that not every row sees
// whole they are taken out and added singly to the rows that see them.
//   room     shared: the weights of the block's rows, [QUERIES][KEYS / 2]
//   special  shared: whether there is any; 0 before and after
template <int DIM>
__device__ __forceinline__ void take_special(struct tile_sums<DIM> &sums, uint4 *v_tile, uint32_t *room, int *special,
                                             const uint32_t (&weight)[KEY_TILES][2], const struct tile_place &at)
{
    if (scan_special<DIM>(v_tile, false))
        special[0] = 1;
    __syncthreads();
    if (!special[0])
        return;
    uint32_t *p = room + at.warp * 16 * (KEYS / 2);
#pragma unroll
    for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
        for (int h = 0; h < 2; h++)
            p[(at.g + 8 * h) * (KEYS / 2) + n * 4 + at.t] = weight[n][h];
    __syncwarp();
    for (int slot = 0; slot < KEYS; slot++)
#pragma unroll
        for (int n = 0; n < DIM / 8; n++) {
            uint32_t pair = ((const uint32_t *)&v_tile[tile_place_of<DIM>(slot, n)])[at.t];
            int key = at.first_key + slot;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int h = i / 2;
                uint32_t v = pair >> i % 2 * 16 & 0xffff;
                if (is_special(v) && key <= at.position[h] && key >= at.seen_from[h])
                    sums.value[n][i] +=
                        f32_from_bits(p[(at.g + 8 * h) * (KEYS / 2) + slot / 2] >> slot % 2 * 16 << 16) *
                        f32_from_bits(v << 16);
            }
        }
    __syncthreads();
    scan_special<DIM>(v_tile, true);
    if (threadIdx.x == 0)
        special[0] = 0;
    __syncthreads();
}

template <int DIM>
__device__ __forceinline__ void page_values(struct tile_sums<DIM> &sums, const uint4 *v_tile,
                                            const uint32_t (&weight)[KEY_TILES][2], int lane)
{
#pragma unroll
    for (int k = 0; k < KEYS / 16; k++) {
        const uint32_t a[4] = {weight[2 * k][0], weight[2 * k][1], weight[2 * k + 1][0], weight[2 * k + 1][1]};
#pragma unroll
        for (int n = 0; n < DIM / 8; n += 2) {
            uint32_t b[4];
            load_matrix_x4_transposed(b, &v_tile[tile_place_of<DIM>(k * 16 + lane % 16, n + lane / 16)]);
            mma_bf16(sums.value[n], a, b);
            mma_bf16(sums.value[n + 1], a, b + 2);
        }
    }
}

// out: of the block's first row.
template <int DIM>
__device__ __forceinline__ void store_rows(float *out, int64_t stride, int rows, int head_dim, float sink,
                                           const struct tile_sums<DIM> &sums, const struct tile_place &at)
{
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int row = at.warp * 16 + at.g + 8 * h;
        float final = fmaxf(sums.largest[h], sink), shrink = weight_of(sums.largest[h], final);
        float whole = quad_sum(sums.sum[h]) * shrink + weight_of(sink, final);
        float *to = out + (int64_t)row * stride;
#pragma unroll
        for (int n = 0; n < DIM / 8; n++)
            if (row < rows && n * 8 + 2 * at.t < head_dim)
                store_global((float2 *)(to + n * 8 + 2 * at.t), make_float2(sums.value[n][2 * h] * shrink / whole,
                                                                            sums.value[n][2 * h + 1] * shrink / whole));
    }
}

// grid (tile of queries, query head).
template <enum kv_format FORMAT, int DIM>
__global__ void __launch_bounds__(THREADS, DIM > 128 ? 1 : 3) attend_tile(struct prefill_input in)
{
    constexpr int TILE = KEYS * tile_pitch<DIM>; // QUERIES == KEYS
    SHARED_DYNAMIC(uint4, tiles);
    uint4 *q_tile = tiles, *k_tile = tiles + TILE, *v_tile = tiles + 2 * TILE;
    int *special = (int *)(void *)(tiles + 3 * TILE);
    SHARED(uint16_t, scales, scaled_cache<FORMAT> ? 2 * KEYS : 2);
    uint16_t *v_scales = scales + (scaled_cache<FORMAT> ? (int)KEYS : 0);
    int head_dim = (int)in.kv.head_dim;
    int64_t head = blockIdx.y, kv_head = (in.shape.head_begin + head) / in.shape.heads_per_kv - in.shape.kv_head_begin;
    int64_t q_stride = (in.shape.num_heads + 2 * in.kv.num_kv_heads) * head_dim;
    struct tile_place at = {};
    at.lane = threadIdx.x % WARP;
    at.warp = threadIdx.x / WARP;
    at.g = at.lane / 4;
    at.t = at.lane % 4;
    at.k_scale = scales;
    at.v_scale = v_scales;

    // The tiles with the longest way first.
    int row_begin = (int)(gridDim.x - 1 - blockIdx.x) * QUERIES;
    int row_count = min((int)in.rows.count - row_begin, (int)QUERIES);
    int launch_end = in.rows.position[0] + (int)in.rows.count; // behind it nothing is written
    int first_position = in.rows.position[0] + row_begin, last_position = first_position + row_count - 1;
    const int32_t *pages = in.kv.pages + in.rows.sequence[0] * in.kv.pages_per_sequence;
    int page = (int)window_begin(in.shape, first_position) / KEYS, page_end = last_position / KEYS + 1;

    load_page<FORMAT, DIM>(k_tile, scales, in.kv.k, in.kv.k_scale, head_dim, first_slot_of(in.kv, pages[page], kv_head),
                           min(launch_end - page * KEYS, (int)KEYS));
    copy_async_commit();
    load_queries<DIM>(q_tile, in.qkv + row_begin * q_stride + head * head_dim, q_stride, row_count, head_dim);
    if (threadIdx.x == 0)
        special[0] = 0;
    uint32_t q[query_parts<DIM>][4];
    if (queries_stay<DIM>) {
        __syncthreads();
#pragma unroll
        for (int k = 0; k < DIM / 16; k++)
            load_query<DIM>(q[k], q_tile, at, k);
    }

    struct tile_sums<DIM> sums = {
    };
#pragma unroll
    for (int h = 0; h < 2; h++) {
        at.position[h] = first_position + at.warp * 16 + at.g + 8 * h;
        at.seen_from[h] = (int)window_begin(in.shape, at.position[h]);
        sums.largest[h] = -INFINITY;
    }
    for (; page < page_end; page++) {
        at.first_key = page * KEYS;
        at.all_seen =
            at.first_key + KEYS - 1 <= first_position && at.first_key >= window_begin(in.shape, last_position);
        copy_async_wait<0>();
        __syncthreads(); // the keys are there, the last values done with
        load_page<FORMAT, DIM>(v_tile, v_scales, in.kv.v, in.kv.v_scale, head_dim,
                               first_slot_of(in.kv, pages[page], kv_head), min(launch_end - at.first_key, (int)KEYS));
        copy_async_commit();
        float score[KEY_TILES][4];
        uint32_t weight[KEY_TILES][2];
        page_scores<DIM, scaled_cache<FORMAT>>(score, q, q_tile, k_tile, in.shape, at);
        page_weights<DIM, scaled_cache<FORMAT>>(weight, sums, score, at);

        copy_async_wait<0>();
        __syncthreads();                           // the values are there, the keys done with
        if (!at.all_seen && !scaled_cache<FORMAT>) // codes are numbers, and what is not seen has no scale
            take_special<DIM>(sums, v_tile, (uint32_t *)k_tile, special, weight, at);
        if (page + 1 < page_end)
            load_page<FORMAT, DIM>(k_tile, scales, in.kv.k, in.kv.k_scale, head_dim,
                                   first_slot_of(in.kv, pages[page + 1], kv_head),
                                   min(launch_end - at.first_key - KEYS, (int)KEYS));
        copy_async_commit();
        page_values<DIM>(sums, v_tile, weight, at.lane);
    }
    store_rows<DIM>(in.out + ((int64_t)row_begin * in.shape.num_heads + head) * head_dim, in.shape.num_heads * head_dim,
                    row_count, head_dim, sink_score(in.shape, head), sums, at);
}

template <enum kv_format FORMAT>
static cudaError_t launch_tiles(struct prefill_input in, dim3 grid, cudaStream_t stream)
{
    int64_t dim = in.kv.head_dim;
    enum { TILE_BYTES = 3 * KEYS * 16, SPECIAL_BYTES = 16 }; // of one unit of the pitch; behind the tiles
    if (dim <= 64)
        return LAUNCH((attend_tile<FORMAT, 64>), grid, dim3(THREADS), TILE_BYTES * tile_pitch<64> + SPECIAL_BYTES,
                      stream, in);
    if (dim <= 80)
        return LAUNCH((attend_tile<FORMAT, 80>), grid, dim3(THREADS), TILE_BYTES * tile_pitch<80> + SPECIAL_BYTES,
                      stream, in);
    if (dim <= 96)
        return LAUNCH((attend_tile<FORMAT, 96>), grid, dim3(THREADS), TILE_BYTES * tile_pitch<96> + SPECIAL_BYTES,
                      stream, in);
    if (dim <= 128)
        return LAUNCH((attend_tile<FORMAT, 128>), grid, dim3(THREADS), TILE_BYTES * tile_pitch<128> + SPECIAL_BYTES,
                      stream, in);
    return LAUNCH((attend_tile<FORMAT, 256>), grid, dim3(THREADS), TILE_BYTES * tile_pitch<256> + SPECIAL_BYTES, stream,
                  in);
}

extern "C" cudaError_t launch_attention_prefill(float *out, const float *qkv, struct attention_shape shape,
                                                struct device_rows rows, struct device_kv kv, cudaStream_t stream)
{
    if (rows.count == 0 || shape.num_heads == 0)
        return cudaSuccess;
    if (kv.head_dim < 2 || kv.head_dim % 2 || kv.head_dim > KERNELS_MAX_HEAD_DIM)
        return cudaErrorInvalidValue;
    struct prefill_input in = {qkv, out, shape, rows, kv};
    dim3 grid((unsigned)((rows.count + QUERIES - 1) / QUERIES), (unsigned)shape.num_heads);
    return kv.format == KV_BF16   ? launch_tiles<KV_BF16>(in, grid, stream)
           : kv.format == KV_E4M3 ? launch_tiles<KV_E4M3>(in, grid, stream)
           : kv.format == KV_INT8 ? launch_tiles<KV_INT8>(in, grid, stream)
                                  : launch_tiles<KV_INT4>(in, grid, stream);
}
