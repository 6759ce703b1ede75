// Mixtures of experts: the router's choice, the list of slots by expert, and the sum of what the experts put out. Declared in launch.h.
//
// The choice is that of the CPU's cpu_experts.c but for the last places of exponentials and of a softmax's sum; the first of equal experts
// wins. Everything is decided by a row's own logits, and sums go over its slots in the order of choice (law 9).
#include "kernels/cuda/rows.cuh"

namespace
{

enum { LIST_THREADS = 256, COMBINE_THREADS = 256 };

static_assert((int)MODEL_MAX_EXPERTS_PER_TOKEN <= (int)WARP, "a lane for each chosen expert");

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (exp_as_cpu(-x) + 1.0f); }

__device__ __forceinline__ float warp_max_float(float x)
{
    for (int mask = WARP / 2; mask; mask /= 2)
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, mask));
    return x;
}

// x [count] in shared memory becomes its softmax.
__device__ __forceinline__ void softmax(float *x, int count, int lane)
{
    float largest = -INFINITY, sum = 0;
    for (int i = lane; i < count; i += WARP)
        largest = fmaxf(largest, x[i]);
    largest = warp_max_float(largest);
    for (int i = lane; i < count; i += WARP)
        sum += x[i] = exp_as_cpu(x[i] - largest);
    sum = warp_sum(sum);
    for (int i = lane; i < count; i += WARP)
        x[i] /= sum;
    __syncwarp();
}

// The index of the largest of x [count] that is not taken, the first of equals, which is then taken; -1: all are. The same in all lanes.
__device__ __forceinline__ int take_largest(const float *x, uint8_t *taken, int count, int lane)
{
    int best = -1;
    float value = 0;
    for (int i = lane; i < count; i += WARP)
        if (!taken[i] && (best < 0 || x[i] > value)) {
            best = i;
            value = x[i];
        }
    for (int mask = WARP / 2; mask; mask /= 2) {
        int other = __shfl_xor_sync(0xffffffffu, best, mask);
        float others = __shfl_xor_sync(0xffffffffu, value, mask);
        if (other >= 0 && (best < 0 || others > value || (!(others < value) && other < best))) {
            best = other;
            value = others;
        }
    }
    best = __shfl_sync(0xffffffffu, best, 0); // NaN may leave lanes of different opinions
    if (best >= 0 && lane == 0)
        taken[best] = 1;
    __syncwarp();
    return best;
}

// Takes the experts of all but the best groups out of the running. rating, seen: room for as many as there are experts.
__device__ __forceinline__ void choose_groups(const struct device_router &r, const float *choice, uint8_t *taken,
                                              float *rating, uint8_t *seen, int lane)
{
    int groups = (int)r.num_groups, size = (int)r.num_experts / groups;
    for (int g = 0; g < groups; g++) {
        float sum = 0;
        for (int i = lane; i < size; i += WARP)
            seen[i] = 0;
        __syncwarp();
        for (int i = 0; i < r.group_members; i++) {
            int best = take_largest(choice + g * size, seen, size, lane);
            sum += best >= 0 ? choice[g * size + best] : 0;
        }
        if (lane == 0)
            rating[g] = sum;
        __syncwarp();
    }
    for (int i = lane; i < groups; i += WARP)
        seen[i] = 0;
    __syncwarp();
    for (int i = 0; i < r.groups_per_token; i++)
        take_largest(rating, seen, groups, lane);
    for (int i = lane; i < r.num_experts; i += WARP)
        taken[i] = !seen[i / size];
    __syncwarp();
}

// One warp per row. Shared: scores, choice, rating [num_experts], then taken and seen.
__global__ void __launch_bounds__(WARP)
    route_row(int32_t *chosen, float *weight, float *shared_factor, const float *logits, struct device_router r)
{
    SHARED_DYNAMIC(float, scores);
    int lane = threadIdx.x, experts = (int)r.num_experts, count = (int)r.experts_per_token;
    float *choice = scores + experts, *rating = choice + experts;
    uint8_t *taken = (uint8_t *)(rating + experts), *seen = taken + experts;
    int64_t row = blockIdx.x;
    logits += row * (experts + r.shared_gate);
    for (int i = lane; i < experts; i += WARP) {
        scores[i] = logits[i] + (r.bias ? r.bias[i] : 0.0f);
        taken[i] = 0;
    }
    __syncwarp();
    if (r.kind == ROUTER_SOFTMAX)
        softmax(scores, experts, lane);
    for (int i = lane; i < experts; i += WARP) {
        if (r.kind == ROUTER_SIGMOID)
            scores[i] = sigmoid(scores[i]);
        choice[i] = scores[i] + (r.choice_bias ? r.choice_bias[i] : 0.0f);
    }
    __syncwarp();
    if (r.num_groups > 1)
        choose_groups(r, choice, taken, rating, seen, lane);

    float mine = 0; // lane i has the ith choice
    for (int i = 0; i < count; i++) {
        int best = take_largest(choice, taken, experts, lane);
        int64_t local = best - r.expert_begin;
        if (lane == i) {
            mine = best >= 0 ? scores[best] : 0.0f;
            chosen[row * count + i] = best >= 0 && local >= 0 && local < r.num_experts_local ? (int32_t)local : -1;
        }
    }
    if (r.kind == ROUTER_CHOSEN_SOFTMAX) {
        float largest = warp_max_float(lane < count ? mine : -INFINITY);
        mine = lane < count ? exp_as_cpu(mine - largest) : 0.0f;
        mine /= warp_sum(mine);
    }
    float sum = warp_sum(lane < count ? mine : 0.0f) + (r.kind == ROUTER_SIGMOID ? 1e-20f : 0.0f); // all may be zero
    if (lane < count)
        weight[row * count + lane] = (r.normalise ? mine / sum : mine) * r.scale;
    if (r.shared_gate && lane == 0)
        shared_factor[row] = sigmoid(logits[experts]);
}

// One block per expert. Each counts the slots of all, so that it knows where its own begin, and lists them in ascending order; the first
// empties the tiles that are left over.
__global__ void __launch_bounds__(LIST_THREADS)
    list_slots(struct device_slots slots, const int32_t *chosen, int64_t count, int num_experts)
{
    SHARED(int32_t, counts, MODEL_MAX_EXPERTS);
    SHARED(int32_t, warp_counts, LIST_THREADS / WARP);
    int thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP, mine = blockIdx.x;
    int tile_tokens = (int)slots.tile_tokens, first = 0, tile = 0;
    for (int i = thread; i < num_experts; i += LIST_THREADS)
        counts[i] = 0;
    __syncthreads();
    for (int64_t i = thread; i < count; i += LIST_THREADS)
        if (chosen[i] >= 0)
            atomicAdd(&counts[chosen[i]], 1);
    __syncthreads();
    for (int i = 0; i < mine; i++) {
        first += counts[i];
        tile += (counts[i] + tile_tokens - 1) / tile_tokens;
    }
    int tiles = (counts[mine] + tile_tokens - 1) / tile_tokens;
    for (int i = thread; i < tiles; i += LIST_THREADS)
        slots.tiles[tile + i] = {mine, first + i * tile_tokens, min(counts[mine] - i * tile_tokens, tile_tokens)};
    if (mine == num_experts - 1)
        for (int64_t i = tile + tiles + thread; i < slots.num_tiles; i += LIST_THREADS)
            slots.tiles[i] = {0, 0, 0};

    for (int64_t base = 0; base < count; base += LIST_THREADS) {
        bool here = base + thread < count && chosen[base + thread] == mine;
        uint32_t warps_here = __ballot_sync(0xffffffffu, here);
        if (lane == 0)
            warp_counts[warp] = __popc(warps_here);
        __syncthreads();
        int before = __popc(warps_here & ((1u << lane) - 1)), all = 0;
        for (int i = 0; i < LIST_THREADS / WARP; i++) {
            before += i < warp ? warp_counts[i] : 0;
            all += warp_counts[i];
        }
        if (here)
            slots.slot[first + before] = (int32_t)(base + thread);
        first += all;
        __syncthreads();
    }
}

struct combine_input {
    const float *shared_factor, *out;
    const int32_t *chosen;
    const float *weight;
    const struct device_expert *experts;
    bool shared, with_bias;
    int64_t experts_per_token, cols;
};

__global__ void __launch_bounds__(COMBINE_THREADS) combine_slots(float *partial, struct combine_input in)
{
    int64_t row = blockIdx.x, col = (int64_t)blockIdx.y * COMBINE_THREADS + threadIdx.x;
    if (col >= in.cols)
        return;
    float sum = in.shared ? partial[row * in.cols + col] * (in.shared_factor ? in.shared_factor[row] : 1.0f) : 0.0f;
    for (int64_t slot = row * in.experts_per_token; slot < (row + 1) * in.experts_per_token; slot++) {
        if (in.chosen[slot] < 0)
            continue;
        float out = in.out[slot * in.cols + col];
        const float *bias = in.with_bias ? in.experts[in.chosen[slot]].down.bias : NULL;
        if (bias)
            out += bias[col];
        sum += in.weight[slot] * out;
    }
    partial[row * in.cols + col] = sum;
}

} // namespace

extern "C" cudaError_t launch_route(int32_t *chosen, float *weight, float *shared_factor, const float *logits,
                                    struct device_router router, int64_t rows, cudaStream_t stream)
{
    if (rows == 0)
        return cudaSuccess;
    if (router.num_experts < 1 || router.num_experts > MODEL_MAX_EXPERTS ||
        router.experts_per_token > MODEL_MAX_EXPERTS_PER_TOKEN)
        return cudaErrorInvalidValue;
    unsigned bytes = (unsigned)router.num_experts * (3 * sizeof(float) + 2);
    return LAUNCH(route_row, dim3((unsigned)rows), dim3(WARP), bytes, stream, chosen, weight, shared_factor, logits,
                  router);
}

extern "C" cudaError_t launch_list_slots(struct device_slots slots, const int32_t *chosen, int64_t count,
                                         int64_t num_experts_local, cudaStream_t stream)
{
    if (count == 0 || num_experts_local == 0)
        return cudaSuccess;
    if (num_experts_local > MODEL_MAX_EXPERTS ||
        slots.num_tiles < expert_tiles(count, num_experts_local, slots.tile_tokens))
        return cudaErrorInvalidValue;
    return LAUNCH(list_slots, dim3((unsigned)num_experts_local), dim3(LIST_THREADS), 0, stream, slots, chosen, count,
                  (int)num_experts_local);
}

extern "C" cudaError_t launch_combine(float *partial, bool shared, const float *shared_factor, const float *out,
                                      const int32_t *chosen, const float *weight, const struct device_expert *experts,
                                      bool with_bias, int64_t experts_per_token, int64_t rows, int64_t cols,
                                      cudaStream_t stream)
{
    if (rows == 0 || cols == 0)
        return cudaSuccess;
    struct combine_input in = {shared_factor, out, chosen, weight, experts, shared, with_bias, experts_per_token, cols};
    dim3 grid((unsigned)rows, (unsigned)rounded_up_quotient(cols, COMBINE_THREADS));
    return LAUNCH(combine_slots, grid, dim3(COMBINE_THREADS), 0, stream, partial, in);
}
