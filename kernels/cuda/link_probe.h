// Kernels of the probe of links between devices (link_probe.c, kernels/link_board.h).
#ifndef TPSHARD_KERNELS_CUDA_LINK_PROBE_H
#define TPSHARD_KERNELS_CUDA_LINK_PROBE_H

#include "formats/number_formats.h"

#include <cuda_runtime_api.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Word i of what is written with a seed.
TP_HD uint32_t link_word(uint32_t seed, uint32_t i)
{
    uint32_t h = (seed ^ i * 0x9e3779b9u) * 0x85ebca6bu;
    h = (h ^ h >> 15) * 0xc2b2ae35u;
    return h ^ h >> 13;
}

// to [words] = link_word. to on 16 bytes, in any device's memory.
cudaError_t launch_link_write(uint32_t *to, uint32_t words, uint32_t seed, cudaStream_t stream);
// to [words] = from [words], which is in any device's memory; both on 16 bytes.
cudaError_t launch_link_read(uint32_t *to, const uint32_t *from, uint32_t words, cudaStream_t stream);

// Two kernels on two devices call each other: the first writes words into the second's area and posts a round's number there; the second, which
// waits for it in its own memory, compares the words and answers in the same way. An area: the number, in a line of its own; two slots, of odd and
// even rounds. So a slot is written again when its reader has answered twice.
enum {
    LINK_CALL_WORDS = 1024, // most of a round
    LINK_CALL_SLOTS = 128,  // bytes before the slots
    LINK_CALL_BYTES = LINK_CALL_SLOTS + 2 * 4 * LINK_CALL_WORDS,
    LINK_CALL_LEAST = 4, // rounds, however long they take
    LINK_CALL_LAST = 1u << 30,
};
struct link_call {
    uint8_t *own, *other; // areas of LINK_CALL_BYTES; own: zeros
    uint32_t rounds;      // at most; < LINK_CALL_LAST
    uint32_t words;       // of a round; 0: the number alone
    uint32_t seed;        // the same on both
    uint32_t first;       // 1: this one begins
    uint64_t most_ns;     // the first ends it then
    uint64_t timeout_ns;  // of each wait
    struct link_call_result *result;
};
// In pinned memory; zeros before.
struct link_call_result {
    uint32_t rounds; // done
    uint32_t missed; // 1: the other's number did not come in time
    uint32_t wrong;  // words that were not those
    uint64_t ns;     // of all rounds
};
cudaError_t launch_link_call(const struct link_call *call, cudaStream_t stream);

// Copies with a word behind each, as chunks of exchanges travel. A kernel runs on the device that takes: in each round it posts to the other device that
// it is ready, waits in its own memory for the round's word, and compares what the copy was to have brought before. A stream of the device that gives
// has, for each round, a kernel that waits until the other is ready, the copy, and a kernel that posts the word. All rounds use one place, so what came
// before is still there where a copy has not arrived. In an area: the words below, which the other device writes.
enum {
    LINK_HAND_ARRIVED = 0, // round that a copy has been made for
    LINK_HAND_READY = 128, // round that the other's kernel is ready for
    LINK_HAND_SIZES = 3,
    LINK_HAND_BYTES = 512 << 10,
    LINK_HAND_STEP = 256, // bytes that a round's message begins behind that of the round before, in what is sent
};
struct link_hand {
    uint8_t *own, *other;            // areas of LINK_CALL_BYTES; own: zeros
    const uint8_t *place;            // own, on 16 bytes: where the other's copies arrive
    uint32_t rounds;                 // < LINK_CALL_LAST
    uint32_t words[LINK_HAND_SIZES]; // of a round, by turns; multiples of 4
    uint32_t seed;                   // word i of round r is link_word(seed, r * LINK_HAND_STEP / 4 + i)
    uint64_t timeout_ns;             // of each wait
    struct link_hand_result *result;
};
// In pinned memory; zeros before. The first three of who takes, the others of who gives.
struct link_hand_result {
    uint32_t rounds;  // taken in
    uint32_t missed;  // 1: a word did not come in time
    uint32_t wrong;   // words of messages that were not those
    uint32_t posted;  // rounds
    uint32_t unready; // the round for which the other was not ready in time; 0: none
};
// Round's message, in words of 4 bytes.
TP_HD uint32_t link_hand_words(const struct link_hand *hand, uint32_t round)
{
    return hand->words[(round - 1) % LINK_HAND_SIZES];
}
TP_HD uint32_t link_hand_first(uint32_t round) { return round * (LINK_HAND_STEP / 4); }
cudaError_t launch_link_take(const struct link_hand *hand, cudaStream_t stream);
// Before and behind a round's copy. Nothing is waited for or posted any more when a wait was in vain.
cudaError_t launch_link_await(const struct link_hand *hand, uint32_t round, cudaStream_t stream);
cudaError_t launch_link_post(const struct link_hand *hand, uint32_t round, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
