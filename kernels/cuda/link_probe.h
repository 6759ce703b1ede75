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

#ifdef __cplusplus
}
#endif
#endif
