// What the frames of a link hold, and which bytes of a buffer a move sends to whom. See comm_link.h.
#ifndef TPSHARD_ENGINE_COMM_FRAMES_H
#define TPSHARD_ENGINE_COMM_FRAMES_H

#include "engine/comm_internal.h"

enum { FRAME_MAGIC = 0x54505346, FRAME_VERSION = 1, FRAME_CHANNEL_BYTES = 256 * 1024 };

enum frame_kind { FRAME_HELLO, FRAME_PHASE, FRAME_CHANNEL, FRAME_TAKEN, FRAME_BEAT, FRAME_ABORT, FRAME_BYE };

// Little-endian, as is all else here.
struct frame_head {
    uint32_t magic;
    uint8_t kind, group, collective, pattern;
    uint32_t payload_bytes;
    uint32_t token;     // PHASE; HELLO: FRAME_VERSION
    uint64_t position;  // where the sender is, as in its slot
    int32_t waits_for;  // as in its slot
    uint32_t messages;  // as in its slot
    int32_t detail, op; // PHASE: its call
    int32_t layer, root;
    uint64_t
        amount; // PHASE: of the call; CHANNEL: number of the first byte; TAKEN: number of bytes; HELLO: channel_bytes
    uint64_t first;          // PHASE: of the move, as count to group_bytes; HELLO: rank
    uint64_t count;          // HELLO: tp_size
    uint64_t groups_per_row; // HELLO: pp_size
    uint64_t group_bytes;    // HELLO: piece_groups
    uint64_t bytes;          // HELLO: buffer_bytes
};
_Static_assert(sizeof(struct frame_head) == 96, "what goes over a connection");

struct frame_error {
    int32_t rank, code;
    char msg[sizeof(((struct error *)0)->msg)];
};

// ---- moves of a group of `size` ranks --------------------------------------------------------------------------------
struct comm_move frame_move(const struct frame_head *head);
void frame_set_move(struct frame_head *head, const struct comm_move *move);
// Bytes that rank `from` sends to rank `to`, packed; -1 for a move that no buffer of buffer_bytes can hold.
int64_t frame_move_bytes(const struct comm_move *move, int size, int from, int to, uint64_t buffer_bytes);
// The groups of an owner, one behind the other, out of and into a buffer. Return the bytes.
uint64_t frame_pack(uint8_t *packed, const uint8_t *buffer, const struct comm_move *move, int size, int owner);
uint64_t frame_unpack(uint8_t *buffer, const uint8_t *packed, const struct comm_move *move, int size, int owner);

#endif
