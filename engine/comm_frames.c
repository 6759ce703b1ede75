// Moves: which groups go where. See comm_frames.h.
#include "engine/comm_frames.h"

#include <string.h>

struct comm_move frame_move(const struct frame_head *head)
{
    return (struct comm_move){.pattern = head->pattern,
                              .root = head->root,
                              .bytes = head->bytes,
                              .first = head->first,
                              .count = head->count,
                              .groups_per_row = head->groups_per_row,
                              .group_bytes = head->group_bytes};
}

void frame_set_move(struct frame_head *head, const struct comm_move *move)
{
    head->pattern = (uint8_t)move->pattern;
    head->root = move->root;
    head->bytes = move->bytes;
    head->first = move->first;
    head->count = move->count;
    head->groups_per_row = move->groups_per_row;
    head->group_bytes = move->group_bytes;
}

// A walk over the groups of an owner, without a division for each: `group` of its row, and its index in the buffer.
struct owned {
    uint64_t group, index;
};

static struct owned begin_owned(const struct comm_move *move)
{
    return (struct owned){.group = move->first % move->groups_per_row, .index = 0};
}

// The next group of the owner from here on, this one included; false at the end.
static bool find_owned(struct owned *at, const struct comm_move *move, int size, int owner)
{
    while (at->index < move->count) {
        uint64_t ahead = ((uint64_t)(owner + size) - at->group % (uint64_t)size) % (uint64_t)size;
        if (at->group + ahead < move->groups_per_row) {
            at->group += ahead;
            at->index += ahead;
            return at->index < move->count;
        }
        at->index += move->groups_per_row - at->group; // to the next row
        at->group = 0;
    }
    return false;
}

static void next_owned(struct owned *at, const struct comm_move *move)
{
    at->index++;
    at->group = at->group + 1 == move->groups_per_row ? 0 : at->group + 1;
}

static int64_t owned_bytes(const struct comm_move *move, int size, int owner)
{
    int64_t bytes = 0;
    struct owned at = begin_owned(move);
    for (; find_owned(&at, move, size, owner); next_owned(&at, move))
        bytes += (int64_t)move->group_bytes;
    return bytes;
}

int64_t frame_move_bytes(const struct comm_move *move, int size, int from, int to, uint64_t buffer_bytes)
{
    switch ((int)move->pattern) {
    case MOVE_NOTHING:
        return 0;
    case MOVE_EVERYONE:
        return move->bytes <= buffer_bytes ? (int64_t)move->bytes : -1;
    case MOVE_ROOT:
        return move->bytes > buffer_bytes ? -1 : from == move->root ? (int64_t)move->bytes : 0;
    case MOVE_TO_OWNERS:
    case MOVE_FROM_OWNERS:
        if (!move->groups_per_row || !move->group_bytes || move->count > buffer_bytes / move->group_bytes)
            return -1;
        return owned_bytes(move, size, move->pattern == MOVE_TO_OWNERS ? to : from);
    default:
        return -1;
    }
}

uint64_t frame_pack(uint8_t *packed, const uint8_t *buffer, const struct comm_move *move, int size, int owner)
{
    uint8_t *to = packed;
    struct owned at = begin_owned(move);
    for (; find_owned(&at, move, size, owner); next_owned(&at, move), to += move->group_bytes)
        memcpy(to, buffer + at.index * move->group_bytes, move->group_bytes);
    return (uint64_t)(to - packed);
}

uint64_t frame_unpack(uint8_t *buffer, const uint8_t *packed, const struct comm_move *move, int size, int owner)
{
    const uint8_t *from = packed;
    struct owned at = begin_owned(move);
    for (; find_owned(&at, move, size, owner); next_owned(&at, move), from += move->group_bytes)
        memcpy(buffer + at.index * move->group_bytes, from, move->group_bytes);
    return (uint64_t)(from - packed);
}
