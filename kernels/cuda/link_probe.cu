// Writing, reading and calling between devices. See link_probe.h.
#include "kernels/cuda/link_probe.h"
#include "kernels/cuda/primitives.cuh"

namespace
{

enum { THREADS = 256, BLOCKS = 64, CLOCK_POLLS = 64, EAGER_POLLS = 16 };

__device__ __forceinline__ uint4 words_at(uint32_t seed, uint32_t i)
{
    return make_uint4(link_word(seed, i), link_word(seed, i + 1), link_word(seed, i + 2), link_word(seed, i + 3));
}

__global__ void __launch_bounds__(THREADS) link_write(uint32_t *to, uint32_t words, uint32_t seed)
{
    uint32_t thread = blockIdx.x * THREADS + threadIdx.x, step = gridDim.x * THREADS;
    for (uint32_t i = thread; i < words / 4; i += step)
        store_global((uint4 *)(void *)to + i, words_at(seed, 4 * i));
    if (thread < words % 4)
        store_global(to + words / 4 * 4 + thread, link_word(seed, words / 4 * 4 + thread));
}

__global__ void __launch_bounds__(THREADS) link_read(uint32_t *to, const uint32_t *from, uint32_t words)
{
    uint32_t thread = blockIdx.x * THREADS + threadIdx.x, step = gridDim.x * THREADS;
    for (uint32_t i = thread; i < words / 4; i += step)
        store_global((uint4 *)(void *)to + i, load_system((const uint4 *)(const void *)from + i));
    if (thread < words % 4)
        store_global(to + words / 4 * 4 + thread, load_system(from + words / 4 * 4 + thread));
}

__device__ __forceinline__ uint32_t *slot_of(uint8_t *area, uint32_t round)
{
    return (uint32_t *)(void *)(area + LINK_CALL_SLOTS + round % 2 * 4 * LINK_CALL_WORDS);
}

// Until the other has posted the round to this device's memory; 0: it did not in time. Else what it posted.
__device__ uint32_t wait_for_round(const uint8_t *posted, uint32_t round, uint64_t timeout_ns)
{
    const uint32_t *number = (const uint32_t *)(const void *)posted;
    uint64_t begin = 0;
    for (uint32_t polls = 1;; polls++) {
        uint32_t seen = posted_system(number);
        if ((seen & (LINK_CALL_LAST - 1)) >= round)
            return seen;
        if (polls % CLOCK_POLLS == 0) {
            uint64_t now = device_now_ns();
            if (begin == 0)
                begin = now;
            if (now - begin > timeout_ns)
                return 0;
        }
        if (polls > EAGER_POLLS)
            wait_a_little();
    }
}

// All threads: waits for a round and compares its words; *seen is what the other posted. seen, wrong: shared.
__device__ void take_round(const struct link_call &call, uint32_t round, uint32_t *seen, uint32_t *wrong)
{
    if (threadIdx.x == 0)
        *seen = wait_for_round(call.own, round, call.timeout_ns);
    __syncthreads();
    if (*seen == 0)
        return;
    uint32_t seed = call.seed + 2 * round + !call.first, mine = 0;
    for (uint32_t i = threadIdx.x; i < call.words; i += THREADS)
        mine += load_system(slot_of(call.own, round) + i) != link_word(seed, i);
    if (mine)
        atomicAdd(wrong, mine);
}

// All threads.
__device__ void post_round(const struct link_call &call, uint32_t round, uint32_t last)
{
    uint32_t seed = call.seed + 2 * round + call.first;
    for (uint32_t i = threadIdx.x; i < call.words; i += THREADS)
        store_global(slot_of(call.other, round) + i, link_word(seed, i));
    __syncthreads();
    if (threadIdx.x == 0)
        post_system((uint32_t *)(void *)call.other, round | last);
}

__global__ void __launch_bounds__(THREADS) link_calls(const __grid_constant__ struct link_call call)
{
    SHARED(uint32_t, seen, 1);
    SHARED(uint32_t, ends, 1);
    SHARED(uint32_t, wrong, 1);
    uint64_t begin = device_now_ns();
    uint32_t round = 1, missed = 0;
    if (threadIdx.x == 0)
        *wrong = 0;
    __syncthreads();
    for (;; round++) {
        if (!call.first) {
            take_round(call, round, seen, wrong);
            missed = *seen == 0;
        }
        __syncthreads();
        if (threadIdx.x == 0)
            *ends = !call.first ? *seen & LINK_CALL_LAST
                    : round >= call.rounds || (round >= LINK_CALL_LEAST && device_now_ns() - begin > call.most_ns)
                        ? LINK_CALL_LAST
                        : 0;
        __syncthreads();
        if (missed)
            break;
        post_round(call, round, *ends);
        if (call.first) {
            take_round(call, round, seen, wrong);
            missed = *seen == 0;
        }
        if (missed || *ends)
            break;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        call.result->wrong = *wrong;
        call.result->rounds = round - missed;
        call.result->missed = missed;
        call.result->ns = device_now_ns() - begin;
    }
}

// One round: whether its word came. All threads; seen: shared.
__device__ bool take_message(const struct link_hand &hand, uint32_t round, uint32_t *seen, uint32_t *wrong)
{
    uint32_t first = link_hand_first(round), words = link_hand_words(&hand, round), mine = 0;
    if (threadIdx.x == 0) {
        post_system((uint32_t *)(void *)(hand.other + LINK_HAND_READY), round);
        *seen = wait_for_round(hand.own + LINK_HAND_ARRIVED, round, hand.timeout_ns);
    }
    __syncthreads();
    if (*seen == 0)
        return false;
    for (uint32_t i = threadIdx.x; i < words / 4; i += THREADS) {
        uint4 got = load_system((const uint4 *)(const void *)hand.place + i), want = words_at(hand.seed, first + 4 * i);
        mine += (got.x != want.x) + (got.y != want.y) + (got.z != want.z) + (got.w != want.w);
    }
    if (mine)
        atomicAdd(wrong, mine);
    __syncthreads();
    return true;
}

__global__ void __launch_bounds__(THREADS) link_take(const __grid_constant__ struct link_hand hand)
{
    SHARED(uint32_t, seen, 1);
    SHARED(uint32_t, wrong, 1);
    uint32_t round = 1;
    if (threadIdx.x == 0)
        *wrong = 0;
    __syncthreads();
    while (round <= hand.rounds && take_message(hand, round, seen, wrong))
        round++;
    if (threadIdx.x == 0) {
        hand.result->rounds = round - 1;
        hand.result->missed = round <= hand.rounds;
        hand.result->wrong = *wrong;
    }
}

__global__ void link_await(const __grid_constant__ struct link_hand hand, uint32_t round)
{
    if (!hand.result->unready && !wait_for_round(hand.own + LINK_HAND_READY, round, hand.timeout_ns))
        hand.result->unready = round;
}

// What a copy engine has moved before it in the stream is there.
__global__ void link_post(const __grid_constant__ struct link_hand hand, uint32_t round)
{
    if (hand.result->unready)
        return;
    hand.result->posted = round;
    post_system((uint32_t *)(void *)(hand.other + LINK_HAND_ARRIVED), round);
}

unsigned blocks_for(uint32_t words)
{
    uint32_t wanted = (words / 4 + THREADS - 1) / THREADS;
    return wanted < 1 ? 1 : wanted < (uint32_t)BLOCKS ? wanted : (uint32_t)BLOCKS;
}

} // namespace

extern "C" cudaError_t launch_link_write(uint32_t *to, uint32_t words, uint32_t seed, cudaStream_t stream)
{
    return LAUNCH(link_write, dim3(blocks_for(words)), dim3(THREADS), 0, stream, to, words, seed);
}

extern "C" cudaError_t launch_link_read(uint32_t *to, const uint32_t *from, uint32_t words, cudaStream_t stream)
{
    return LAUNCH(link_read, dim3(blocks_for(words)), dim3(THREADS), 0, stream, to, from, words);
}

extern "C" cudaError_t launch_link_call(const struct link_call *call, cudaStream_t stream)
{
    if (call->words > LINK_CALL_WORDS || call->rounds < 1 || call->rounds >= LINK_CALL_LAST)
        return cudaErrorInvalidValue;
    return LAUNCH(link_calls, dim3(1), dim3(THREADS), 0, stream, *call);
}

extern "C" cudaError_t launch_link_take(const struct link_hand *hand, cudaStream_t stream)
{
    return LAUNCH(link_take, dim3(1), dim3(THREADS), 0, stream, *hand);
}

extern "C" cudaError_t launch_link_await(const struct link_hand *hand, uint32_t round, cudaStream_t stream)
{
    return LAUNCH(link_await, dim3(1), dim3(1), 0, stream, *hand, round);
}

extern "C" cudaError_t launch_link_post(const struct link_hand *hand, uint32_t round, cudaStream_t stream)
{
    return LAUNCH(link_post, dim3(1), dim3(1), 0, stream, *hand, round);
}
