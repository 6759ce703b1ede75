// The arithmetic of an all_reduce, on any transport: what a rank writes for the others and makes of what they wrote. A
// message is cut into pieces of whole groups; of each piece every rank
//   1. reduce_encode: writes its groups for their owners;
//   2. reduce_add_up: adds up what came for the groups that it owns, in rank order, its own part in wire_of_own's codec, with
//      error feedback exact; what the encoded sum decodes to is the result, and the encoded sum is written for the others;
//   3. reduce_decode: decodes the sums of the other owners.
// Between these all ranks wait for each other. Group g of a row belongs to rank g % tp_size.
//
// With error feedback each rank keeps what it lost: of groups of others what step 1 lost, of its own what step 2 lost of
// the sum. Added up over all ranks that is all that a message lost.
#ifndef TPSHARD_ENGINE_COMM_REDUCE_H
#define TPSHARD_ENGINE_COMM_REDUCE_H

#include "engine/comm.h"
#include "kernels/wire.h"

#include <stdint.h>
#include <string.h>

// Groups [first, first + count) of the message, counted row by row. Group i of the piece lies at i * wire_group_bytes of
// a buffer.
struct reduce_piece {
    float *data;    // [rows][stride], of which cols count
    uint16_t *lost; // bf16 [rows][cols]; NULL: no error feedback
    uint64_t cols, stride, groups_per_row, first, count;
    enum wire wire;
    int rank, tp_size;
    const uint8_t *from[COMM_MAX_RANKS]; // steps 2 and 3: what each rank wrote in the step before
    uint8_t *to;                         // steps 1 and 2: where this one writes
};

// Groups begin .. end - 1 of the piece; disjoint ranges may be done by different threads.
void reduce_encode(const struct reduce_piece *piece, uint64_t begin, uint64_t end);
void reduce_add_up(const struct reduce_piece *piece, uint64_t begin, uint64_t end);
void reduce_decode(const struct reduce_piece *piece, uint64_t begin, uint64_t end);

// What a rank sends: the parts of the others go to their owners, and the own result to each of them: 2 (n - 1) / n of the message.
static inline uint64_t reduce_sent_bytes(uint64_t groups, enum wire wire, int tp_size)
{
    return groups * wire_group_bytes(wire) * 2 * (uint64_t)(tp_size - 1) / (uint64_t)tp_size;
}

// An own part as a group of WIRE_F32: x itself, or a copy in `whole` where the row ends before its last group does: groups are
// read to their ends, and memory may end with the row.
static inline const uint8_t *reduce_own_group(float whole[WIRE_GROUP], const float *x, int count)
{
    if (count == WIRE_GROUP)
        return (const uint8_t *)x;
    memset(whole, 0, WIRE_GROUP * sizeof *whole);
    memcpy(whole, x, (size_t)count * sizeof *x);
    return (const uint8_t *)whole;
}

#endif
