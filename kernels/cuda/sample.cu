// Sampling: one token for each row of logits. The order of the steps, the ties and the random numbers are those of engine/sampler.c, which is the
// reference; here a row is dealt to blocks in parts, and what the parts find is joined by integers, whose sums and maxima do
// not depend on the order: best tokens as (ordered logit, ~id) in 64 bits, masses in fixed point.
//
// Nine launches, whatever the settings: largest logit by parts; the choice of greedy rows, temperature and the first digit of top-k; five more
// digits (two of top-k, three of top-p); the draw by parts; the choice. Each launch finishes the step before it by itself, in every block
// alike, and a row that needs a step no more returns at once. The settings lie in device memory, so that the launches fit a graph.
#include "formats/number_formats.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/primitives.cuh"

#include <math.h>

namespace
{

enum {
    THREADS = 256,
    WARPS = THREADS / 32,
    ITEMS = 16,             // logits of one thread
    PART = THREADS * ITEMS, // of one block
    BINS = 2048,            // 11 bits: the largest digit of a search
    BINS_PER_THREAD = BINS / THREADS,
    ROUNDS = 3,                        // digits of a threshold: 11, 11 and 10 bits
    FIRST_TOP_K = 0,                   // rounds of the search for top-k
    FIRST_TOP_P = ROUNDS,              // of that for top-p
    LAST_ROUND = FIRST_TOP_P + ROUNDS, // one behind
};

const uint64_t BEST_NAN = UINT64_MAX, BEST_NONE = 0; // no pair of a number and an id looks like these

// Where the search for a threshold stands before a round.
struct search {
    uint64_t above;  // weight of all tokens above the digits found so far
    uint64_t target; // the tokens at or above the threshold weigh at least this
    uint32_t prefix; // digits found so far
    float floor;     // tokens below do not count
};

// Scratch of one row; behind it the best of each part, uint64 [parts].
struct row_scratch {
    uint64_t histogram[3][BINS]; // round r adds to [r % 3], reads [(r - 1) % 3] and clears the third
    struct search search[LAST_ROUND];
    uint32_t sampled; // not decided by the maximum alone
    uint32_t unused;
};

struct arguments {
    uint32_t *tokens;
    float *logits;
    int64_t stride, vocab;
    const struct device_sampling *how;
    uint16_t *in_output;
    uint8_t *in_any;
    unsigned char *scratch;
    uint64_t row_bytes; // of scratch
};

__host__ __device__ inline uint64_t parts_of(int64_t vocab) { return ((uint64_t)vocab + PART - 1) / PART; }
__host__ __device__ inline uint64_t row_bytes_of(int64_t vocab)
{
    return sizeof(struct row_scratch) + parts_of(vocab) * sizeof(uint64_t);
}

__device__ inline struct row_scratch *scratch_of(const struct arguments &a, uint32_t row)
{
    return (struct row_scratch *)(void *)(a.scratch + row * a.row_bytes);
}
__device__ inline uint64_t *bests_of(struct row_scratch *s) { return (uint64_t *)(void *)(s + 1); }

__device__ inline bool has_top_k(const struct device_sampling &how) { return how.top_k > 0; }
__device__ inline bool has_top_p(const struct device_sampling &how) { return how.top_p < 1; }
__device__ inline bool has_round(const struct device_sampling &how, int round)
{
    return round < FIRST_TOP_P ? has_top_k(how) : has_top_p(how);
}

// ---- numbers in order ------------------------------------------------------------------------------------------------

// Bits of a float, so that unsigned order is the order of the numbers.
__device__ inline uint32_t ordered(float x)
{
    uint32_t u = f32_bits(x);
    return u & 0x80000000u ? ~u : u | 0x80000000u;
}
__device__ inline float from_ordered(uint32_t key)
{
    return f32_from_bits(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// Larger is better: the larger number, among equals (both zeros are) the lower id. Minus infinity is no choice.
__device__ inline uint64_t pack_best(float x, uint32_t token)
{
    x = x == 0 ? 0.0f : x;
    uint64_t packed = (uint64_t)ordered(x) << 32 | (uint32_t)~token;
    return x > -INFINITY ? packed : x == -INFINITY ? BEST_NONE : BEST_NAN;
}

// The largest value of the block, for every thread.
__device__ inline uint64_t block_max(uint64_t value)
{
    SHARED(unsigned long long, warp_best, WARPS);
    for (int step = 16; step > 0; step /= 2) {
        uint64_t other = __shfl_xor_sync(0xffffffffu, (unsigned long long)value, step);
        value = other > value ? other : value;
    }
    __syncthreads(); // the last call's values have been read
    if (threadIdx.x % 32 == 0)
        warp_best[threadIdx.x / 32] = value;
    __syncthreads();
    for (int warp = 0; warp < WARPS; warp++)
        value = warp_best[warp] > value ? warp_best[warp] : value;
    return value;
}

// ---- a part of a row in registers ------------------------------------------------------------------------------------

__device__ inline int64_t item_index(int item) { return (int64_t)blockIdx.x * PART + item * THREADS + threadIdx.x; }

// Behind the vocabulary: minus infinity, which no maximum takes.
__device__ inline void load_part(float (&x)[ITEMS], const struct arguments &a)
{
    const float *row = a.logits + blockIdx.y * a.stride;
#pragma unroll
    for (int i = 0; i < ITEMS; i++)
        x[i] = item_index(i) < a.vocab ? row[item_index(i)] : -INFINITY;
}

__device__ inline void store_part(const struct arguments &a, const float (&x)[ITEMS])
{
    float *row = a.logits + blockIdx.y * a.stride;
#pragma unroll
    for (int i = 0; i < ITEMS; i++)
        if (item_index(i) < a.vocab)
            row[item_index(i)] = x[i];
}

__device__ inline bool has_penalties(const struct device_sampling &how)
{
    return how.repetition_penalty != 1 || how.frequency_penalty != 0 || how.presence_penalty != 0;
}

// ---- the maximum -----------------------------------------------------------------------------------------------------

__device__ inline float penalized(float x, const struct device_sampling &how, uint32_t in_output)
{
    if (how.repetition_penalty != 1)
        x = (float)(x > 0 ? x / how.repetition_penalty : x * how.repetition_penalty);
    if ((how.frequency_penalty != 0 || how.presence_penalty != 0) && in_output)
        x -= (float)(how.frequency_penalty * in_output + how.presence_penalty);
    return x;
}

__device__ inline void apply_penalties(float (&x)[ITEMS], const struct arguments &a, const struct device_sampling &how)
{
    if (!has_penalties(how) || !a.in_any || !a.in_output)
        return;
    const uint8_t *in_any = a.in_any + how.sequence * a.vocab;
    const uint16_t *in_output = a.in_output + how.sequence * a.vocab;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        int64_t at = item_index(i);
        if (at < a.vocab && in_any[at])
            x[i] = penalized(x[i], how, in_output[at]);
    }
    store_part(a, x);
}

// Grid [parts, rows].
__global__ void __launch_bounds__(THREADS) maximum_kernel(struct arguments a)
{
    const struct device_sampling how = a.how[blockIdx.y];
    struct row_scratch *scratch = scratch_of(a, blockIdx.y);
    float x[ITEMS];
    load_part(x, a);
    apply_penalties(x, a, how);
    uint64_t best = BEST_NONE;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        uint64_t packed = pack_best(x[i], (uint32_t)item_index(i));
        best = packed > best ? packed : best;
    }
    best = block_max(best);
    if (threadIdx.x == 0)
        bests_of(scratch)[blockIdx.x] = best;
    if (how.temperature <= 0)
        return;
    for (uint32_t i = blockIdx.x * THREADS + threadIdx.x; i < 3 * BINS; i += gridDim.x * THREADS)
        scratch->histogram[i / BINS][i % BINS] = 0;
}

__device__ inline uint64_t best_of_parts(const struct arguments &a, struct row_scratch *scratch)
{
    uint64_t best = BEST_NONE;
    for (uint32_t part = threadIdx.x; part < parts_of(a.vocab); part += THREADS) {
        uint64_t other = bests_of(scratch)[part];
        best = other > best ? other : best;
    }
    return block_max(best);
}

// By one thread of the row.
__device__ inline void choose(const struct arguments &a, uint32_t row, uint64_t best)
{
    uint32_t token = best == BEST_NAN ? SAMPLE_NAN : best == BEST_NONE ? SAMPLE_NONE : ~(uint32_t)best;
    a.tokens[row] = token;
    if (best == BEST_NAN || best == BEST_NONE || !has_penalties(a.how[row]) || !a.in_any || !a.in_output)
        return;
    int64_t at = a.how[row].sequence * a.vocab + token;
    a.in_any[at] = 1;
    if (a.in_output[at] < UINT16_MAX)
        a.in_output[at]++;
}

// ---- thresholds ------------------------------------------------------------------------------------------------------

__device__ inline int round_shift(int round) { return round % ROUNDS == 0 ? 21 : round % ROUNDS == 1 ? 10 : 0; }

// exp(x) in fixed point, x <= 0. The whole vocabulary stays below 2^63.
__device__ inline uint64_t mass_of(float x, int64_t vocab)
{
    if (x < -45.0f)
        return 0; // below half of the finest unit, 2^-62
    int vocab_bits = 32 - __clz((int)vocab);
    double one = (double)(1ull << (63 - vocab_bits));
    return (uint64_t)(exp((double)x) * one + 0.5);
}

// Adds the part's weights by the round's digit to the row's histogram, which is clear, and clears the next round's.
__device__ inline void add_digits(const float (&x)[ITEMS], const struct arguments &a, struct row_scratch *scratch,
                                  int round, const struct search &search)
{
    // 64-bit sums in two halves: shared memory adds 32 bits at once, and each wrap of the low half is seen by exactly one thread.
    SHARED(uint32_t, low, BINS);
    SHARED(uint32_t, high, BINS);
    for (int bin = threadIdx.x; bin < BINS; bin += THREADS)
        low[bin] = high[bin] = 0;
    __syncthreads();
    int shift = round_shift(round);
    uint32_t known = round % ROUNDS == 0 ? 0 : ~0u << round_shift(round - 1);
    uint32_t bins = round % ROUNDS == ROUNDS - 1 ? BINS / 2 : BINS;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        uint32_t key = ordered(x[i]);
        if (item_index(i) >= a.vocab || !(x[i] >= search.floor) || (key & known) != search.prefix)
            continue;
        uint64_t weight = round < FIRST_TOP_P ? 1 : mass_of(x[i], a.vocab);
        uint32_t bin = key >> shift & (bins - 1), add = (uint32_t)weight;
        uint32_t carry = atomicAdd(&low[bin], add) > ~add;
        carry += (uint32_t)(weight >> 32);
        if (carry)
            atomicAdd(&high[bin], carry);
    }
    __syncthreads();
    for (int bin = threadIdx.x; bin < BINS; bin += THREADS) {
        uint64_t weight = (uint64_t)high[bin] << 32 | low[bin];
        if (weight)
            atomicAdd((unsigned long long *)&scratch->histogram[round % 3][bin], (unsigned long long)weight);
    }
    for (uint32_t bin = blockIdx.x * THREADS + threadIdx.x; bin < BINS; bin += gridDim.x * THREADS)
        scratch->histogram[(round + 1) % 3][bin] = 0;
}

// Sum of the values of the threads up to this one.
__device__ inline uint64_t block_scan(uint64_t value, uint64_t *total)
{
    SHARED(unsigned long long, warp_total, WARPS);
    uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (uint32_t step = 1; step < 32; step *= 2) {
        uint64_t below = __shfl_up_sync(0xffffffffu, (unsigned long long)value, step);
        value += lane >= step ? below : 0;
    }
    if (lane == 31)
        warp_total[warp] = value;
    __syncthreads();
    *total = 0;
    for (uint32_t i = 0; i < WARPS; i++) {
        value += i < warp ? warp_total[i] : 0;
        *total += warp_total[i];
    }
    return value;
}

// The digit of a finished round: the largest bin such that the tokens in it and above reach the target; if all together do not,
// the lowest bin that holds any.
__device__ inline struct search take_digit(const struct device_sampling &how, const struct row_scratch *scratch,
                                           int round)
{
    SHARED(struct search, found, 1);
    SHARED(uint32_t, lowest, 1);
    struct search s = scratch->search[round];
    uint64_t weight[BINS_PER_THREAD], sum = 0, total;
    int top = BINS - 1 - (int)threadIdx.x * BINS_PER_THREAD; // the first thread has the highest bins
    for (int i = 0; i < BINS_PER_THREAD; i++) {
        weight[i] = scratch->histogram[round % 3][top - i];
        sum += weight[i];
    }
    if (threadIdx.x == 0)
        *lowest = BINS;
    uint64_t above = s.above + block_scan(sum, &total) - sum;
    if (round == FIRST_TOP_P) {
        s.target = (uint64_t)ceil(how.top_p * (double)total);
        s.target = s.target > 0 ? s.target : 1;
    }
    bool reached = s.above + total >= s.target;
    if (!reached && sum)
        for (int i = 0; i < BINS_PER_THREAD; i++)
            if (weight[i])
                atomicMin(lowest, (uint32_t)(top - i));
    __syncthreads();
    for (int i = 0; i < BINS_PER_THREAD; i++) {
        int bin = top - i;
        bool take = reached ? above < s.target && above + weight[i] >= s.target : (uint32_t)bin == *lowest;
        if (take) {
            found->above = above;
            found->target = s.target;
            found->prefix = s.prefix | (uint32_t)bin << round_shift(round);
            found->floor = s.floor;
        }
        above += weight[i];
    }
    __syncthreads();
    return *found;
}

// The choice of the rows that need the maximum alone; temperature; the first digit of top-k. Grid [parts, rows].
__global__ void __launch_bounds__(THREADS) begin_kernel(struct arguments a)
{
    const struct device_sampling how = a.how[blockIdx.y];
    struct row_scratch *scratch = scratch_of(a, blockIdx.y);
    if (how.temperature <= 0 && blockIdx.x > 0)
        return;
    uint64_t best = best_of_parts(a, scratch);
    float maximum = from_ordered((uint32_t)(best >> 32));
    bool sampled = best != BEST_NAN && best != BEST_NONE && !(how.temperature <= 0) && maximum < INFINITY;
    struct search search = {0, (uint64_t)(how.top_k > 0 ? how.top_k : 0), 0, -INFINITY};
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        scratch->sampled = sampled;
        scratch->search[FIRST_TOP_K] = search;
        if (!sampled)
            choose(a, blockIdx.y, best);
    }
    if (!sampled)
        return;
    float x[ITEMS];
    load_part(x, a);
    // Relative to the maximum, so that no temperature makes the likeliest tokens overflow.
#pragma unroll
    for (int i = 0; i < ITEMS; i++)
        x[i] = (float)(((double)x[i] - (double)maximum) / how.temperature);
    store_part(a, x);
    if (has_top_k(how))
        add_digits(x, a, scratch, FIRST_TOP_K, search);
}

// Takes the digit of the round before and counts those of this one. Grid [parts, rows].
__global__ void __launch_bounds__(THREADS) round_kernel(struct arguments a, int round)
{
    const struct device_sampling how = a.how[blockIdx.y];
    struct row_scratch *scratch = scratch_of(a, blockIdx.y);
    bool before = has_round(how, round - 1), now = has_round(how, round);
    if (how.temperature <= 0 || !scratch->sampled || (!before && !now && round != FIRST_TOP_P))
        return;
    struct search search = {0, 0, 0, -INFINITY};
    if (before)
        search = take_digit(how, scratch, round - 1);
    if (round == FIRST_TOP_P) { // a new search, among what top-k has left
        search.floor = before ? from_ordered(search.prefix) : -INFINITY;
        search.above = search.target = 0;
        search.prefix = 0;
    }
    if (blockIdx.x == 0 && threadIdx.x == 0)
        scratch->search[round] = search;
    if (!now)
        return;
    float x[ITEMS];
    load_part(x, a);
    add_digits(x, a, scratch, round, search);
}

// ---- the draw --------------------------------------------------------------------------------------------------------

// splitmix64 (Steele, Lea, Flood 2014).
__device__ inline uint64_t mix(uint64_t z)
{
    z += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

__device__ inline double gumbel(uint64_t bits)
{
    double uniform = ((double)(bits >> 11) + 0.5) * 0x1p-53;
    return -log(-log(uniform < 1 ? uniform : 1 - 0x1p-53)); // 53 ones round up to 1
}

// The same to within 1e-4, without double precision, which many devices have little of. Near 1 the uniform is as gumbel()
// rounds it, to even units of 2^-53, and its distance from 1 is what has digits.
__device__ inline float gumbel_estimate(uint64_t bits)
{
    uint64_t n = bits >> 11;
    float minus_log;
    if (n < 1ull << 52)
        minus_log = -logf(((float)n + 0.5f) * 0x1p-53f);
    else
        minus_log = -log1pf(-fmaxf((float)((1ull << 53) - n - (n & 1)), 1) * 0x1p-53f);
    return -logf(minus_log);
}

// Grid [parts, rows].
__global__ void __launch_bounds__(THREADS) draw_kernel(struct arguments a)
{
    const struct device_sampling how = a.how[blockIdx.y];
    struct row_scratch *scratch = scratch_of(a, blockIdx.y);
    if (how.temperature <= 0 || !scratch->sampled)
        return;
    float threshold = has_top_p(how) ? from_ordered(take_digit(how, scratch, LAST_ROUND - 1).prefix)
                                     : scratch->search[FIRST_TOP_P].floor;
    float min_p = how.min_p > 0 ? (float)log(how.min_p) : -INFINITY;
    threshold = threshold < min_p ? min_p : threshold;
    uint64_t key = mix(mix(how.seed) ^ how.step);
    float x[ITEMS], estimate[ITEMS];
    load_part(x, a);
    // 53-bit uniforms bound the noise to [-3.63, 36.74]: a token further than 41 below the maximum, which is 0, cannot win.
    uint64_t best = BEST_NONE;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        bool kept = x[i] >= threshold && x[i] >= -41.0f;
        estimate[i] = kept ? x[i] + gumbel_estimate(mix(key ^ (uint32_t)item_index(i))) : -INFINITY;
        uint64_t packed = pack_best(estimate[i], 0);
        best = packed > best ? packed : best;
    }
    // Only what comes near the part's best needs the exact score.
    float near_best = from_ordered((uint32_t)(block_max(best) >> 32)) - 1e-3f;
    uint32_t near = 0;
#pragma unroll
    for (int i = 0; i < ITEMS; i++)
        near |= (uint32_t)(estimate[i] >= near_best && estimate[i] > -INFINITY) << i;
    best = BEST_NONE;
    for (; near; near &= near - 1) {
        uint32_t token = (uint32_t)item_index(__ffs((int)near) - 1);
        float scaled = a.logits[blockIdx.y * a.stride + token];
        uint64_t packed = pack_best((float)((double)scaled + gumbel(mix(key ^ token))), token);
        best = packed > best ? packed : best;
    }
    best = block_max(best);
    if (threadIdx.x == 0)
        bests_of(scratch)[blockIdx.x] = best;
}

// Grid [rows].
__global__ void __launch_bounds__(THREADS) finish_kernel(struct arguments a)
{
    struct row_scratch *scratch = scratch_of(a, blockIdx.x);
    if (a.how[blockIdx.x].temperature <= 0 || !scratch->sampled)
        return;
    uint64_t best = best_of_parts(a, scratch);
    if (threadIdx.x == 0)
        choose(a, blockIdx.x, best);
}

} // namespace

uint64_t sample_scratch_bytes(int64_t max_rows, int64_t vocab) { return (uint64_t)max_rows * row_bytes_of(vocab); }

cudaError_t launch_sample(uint32_t *tokens, float *logits, int64_t stride, int64_t vocab,
                          const struct device_sampling *how, uint16_t *in_output, uint8_t *in_any, int64_t rows,
                          void *scratch, cudaStream_t stream)
{
    if (vocab < 1 || vocab > INT32_MAX || stride < vocab || rows < 0 || rows > 65535)
        return cudaErrorInvalidValue;
    if (rows == 0)
        return cudaSuccess;
    struct arguments a = {
        tokens, logits, stride, vocab, how, in_output, in_any, (unsigned char *)scratch, row_bytes_of(vocab)};
    dim3 grid((unsigned)parts_of(vocab), (unsigned)rows);
    cudaError_t status = LAUNCH(maximum_kernel, grid, THREADS, 0, stream, a);
    if (status == cudaSuccess)
        status = LAUNCH(begin_kernel, grid, THREADS, 0, stream, a);
    for (int round = FIRST_TOP_K + 1; round < LAST_ROUND && status == cudaSuccess; round++)
        status = LAUNCH(round_kernel, grid, THREADS, 0, stream, a, round);
    if (status == cudaSuccess)
        status = LAUNCH(draw_kernel, grid, THREADS, 0, stream, a);
    if (status == cudaSuccess)
        status = LAUNCH(finish_kernel, dim3((unsigned)rows), THREADS, 0, stream, a);
    return status;
}
