// Sums over the ranks of one machine, computed by their devices: what the host side (exchange.c) and the kernels (exchange.cu) share.
//
// A rank writes what others are to read into *areas* and says so with tokens in them. Where areas lie is all that differs between the transports:
//   host  one area a rank, in pinned memory of the host that all ranks have mapped. A rank writes its own and reads those of the others.
//   p2p   each rank's device memory has an area for each other rank. A rank writes into those of the others and reads its own; it never reads over a
//         link. What is the same for all others it writes to each (every).
// An area: tokens [EXCHANGE_LANES], each in a line of its own; slots [EXCHANGE_BLOCKS][2]; over host behind them, for chunks, parts [3] and
// sums [3], which over p2p stand behind all areas, for all senders together (exchange_p2p.c). No place in it depends on the size of a message.
//
// A lane is a block of a kernel, or the parts or the sums of chunks. In phase t a rank writes slot t % 2 of the lane, posts t, waits until every
// other rank has posted t or more, and reads what they wrote. It writes that slot again in phase t + 2, which it enters only after all have
// posted t + 1, hence have read what they wanted of phase t: a block posts only after all its threads have come to a barrier. Tokens are 32-bit
// counters compared modulo 2^32. They are counted in device memory, so that a graph with exchanges in it can be launched again and again.
//
// All algorithms give the bits of engine/comm_reduce.h (kernels/exchange_choice.h).
//
// No wait without an end: a wait looks at the abort word, in pinned memory that all ranks share, and at the clock. When its time is up the
// kernel writes down whom it waited for, raises the abort word, and leaves; what it should have computed is left as it is, and so do all exchanges
// that follow. The host finds the record when it next waits for the device. What hangs outside of a wait, a store or a copy over a link, the host
// ends: it sees the device come no further (exchange.c).
#ifndef TPSHARD_KERNELS_CUDA_EXCHANGE_H
#define TPSHARD_KERNELS_CUDA_EXCHANGE_H

#include "kernels/cuda/launch.h"
#include "kernels/wire.h"

#include <cuda_runtime_api.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
    EXCHANGE_RANKS = 16,
    EXCHANGE_BLOCKS = 32,      // of a kernel of one rank: they wait, so all must run at the same time
    EXCHANGE_UNIT_GROUPS = 64, // of a block in one phase
    EXCHANGE_LANE_PARTS = EXCHANGE_BLOCKS,
    EXCHANGE_LANE_SUMS,
    EXCHANGE_LANES,
    EXCHANGE_TOKEN_BYTES = 128,
    EXCHANGE_SLOT_BYTES = EXCHANGE_UNIT_GROUPS * WIRE_MAX_GROUP_BYTES,
    EXCHANGE_SLOTS_OFFSET = 8192, // behind the tokens
    EXCHANGE_DIRECT_BYTES = EXCHANGE_SLOTS_OFFSET + 2 * EXCHANGE_BLOCKS * EXCHANGE_SLOT_BYTES,
    EXCHANGE_PARTS_BYTES = 2 << 20,                 // of a chunk
    EXCHANGE_SUMS_BYTES = EXCHANGE_PARTS_BYTES / 2, // those of one owner
    EXCHANGE_FIRST_TOKEN = -16,                     // the wrap to 0 belongs to every run
    EXCHANGE_NORM_ROWS = 64,                        // most rows of an exchange with a norm behind it
};

// In device memory, one for each rank. Zero but for the tokens.
struct exchange_state {
    uint32_t token[EXCHANGE_LANES];  // posted last
    uint32_t waited[EXCHANGE_LANES]; // of chunks: waited for last
    uint32_t calls;
    uint32_t broken;                      // an exchange has failed; none does anything any more
    uint32_t arrived[EXCHANGE_NORM_ROWS]; // parts of a row that are done
};

// In pinned memory, one for each rank: the wait that had no end. whom: the rank that was furthest behind.
struct exchange_record {
    uint32_t told; // the rest can be read
    uint32_t call, place, phase, expected, seen, whom;
};

// One rank's view.
struct exchange_ranks {
    int rank, tp_size;
    int num_every;
    uint8_t *to[EXCHANGE_RANKS];         // the area in which rank r reads what this one wrote for it
    uint8_t *every[EXCHANGE_RANKS];      // [num_every]: the same, each area once
    const uint8_t *from[EXCHANGE_RANKS]; // the area in which rank r wrote for this one
    struct exchange_state *state;
    uint32_t *abort;
    struct exchange_record *record;
    uint64_t timeout_ns;
};

// A sum, or one of its halves over rows that have owners (engine/comm_rows.h).
enum exchange_half {
    EXCHANGE_WHOLE,
    EXCHANGE_TO_OWNERS, // the first: a row's sum is at its owner, not coded
    EXCHANGE_TO_ALL     // the second: owned rows go to everybody
};

// data [rows][cols], in place.
struct exchange_message {
    float *data;
    uint16_t *lost; // bf16 [rows][cols]: see comm_all_reduce; NULL: no error feedback
    uint32_t rows, cols;
    enum wire wire;
    uint32_t place; // what the record says
    enum exchange_half half;
    uint32_t first_owner; // < tp_size; of a half: row r belongs to rank (first_owner + r) % tp_size
};

// launch_norm of the same rows, whose join's partial is the message.
struct exchange_norm {
    struct device_input out;
    enum input_format format;
    float *residual;
    struct device_join join;
    const float *weight;
    float eps;
};

// One phase: every rank sends all its groups. norm (NULL: none) for at most EXCHANGE_NORM_ROWS rows. No feedback, no wire that compresses. blocks: at
// most so many, the same on all ranks.
cudaError_t launch_exchange_one_shot(const struct exchange_ranks *ranks, const struct exchange_message *message,
                                     const struct exchange_norm *norm, int blocks, cudaStream_t stream);
// Two phases: parts to their owners, sums back.
cudaError_t launch_exchange_two_shot(const struct exchange_ranks *ranks, const struct exchange_message *message,
                                     int blocks, cudaStream_t stream);
// A half, in one phase. No feedback in the second.
cudaError_t launch_exchange_half(const struct exchange_ranks *ranks, const struct exchange_message *message, int blocks,
                                 cudaStream_t stream);
// The same for all ranks of one device in one launch, whose blocks run together; two_shot also stands for halves. ranks and messages [tp_size] in memory that the device sees.
cudaError_t launch_exchange_together(const struct exchange_ranks *ranks, const struct exchange_message *messages,
                                     int tp_size, bool two_shot, int blocks, cudaStream_t stream);

// ---- chunks: copy engines move what the kernels of shares.h write and read -----------------------------------------------------------

// Posts the next token of a lane; waits for everybody's.
cudaError_t launch_exchange_post(const struct exchange_ranks *ranks, int lane, cudaStream_t stream);
cudaError_t launch_exchange_wait(const struct exchange_ranks *ranks, int lane, uint32_t place, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
