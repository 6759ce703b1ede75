// The arithmetic of an all_reduce. See comm_reduce.h.
#include "engine/comm_reduce.h"

#include <stdbool.h>

// A walk over the groups of a piece, without a division for each.
struct walk {
    const struct reduce_piece *piece;
    uint64_t offset, group_bytes; // in each buffer
    uint64_t row, group;
    int owner;
};

static struct walk walk_to(const struct reduce_piece *piece, uint64_t index)
{
    uint64_t at = piece->first + index, bytes = wire_group_bytes(piece->wire);
    uint64_t group = at % piece->groups_per_row;
    return (struct walk){.piece = piece,
                         .offset = index * bytes,
                         .group_bytes = bytes,
                         .row = at / piece->groups_per_row,
                         .group = group,
                         .owner = (int)(group % (uint64_t)piece->tp_size)};
}

static void walk_on(struct walk *walk)
{
    walk->offset += walk->group_bytes;
    walk->owner = walk->owner + 1 == walk->piece->tp_size ? 0 : walk->owner + 1;
    if (++walk->group == walk->piece->groups_per_row) {
        walk->group = 0;
        walk->owner = 0;
        walk->row++;
    }
}

static float *values(const struct walk *walk)
{
    return walk->piece->data + walk->row * walk->piece->stride + walk->group * WIRE_GROUP;
}

static uint16_t *lost(const struct walk *walk)
{
    return walk->piece->lost + walk->row * walk->piece->cols + walk->group * WIRE_GROUP;
}

static int count(const struct walk *walk)
{
    uint64_t left = walk->piece->cols - walk->group * WIRE_GROUP;
    return left < WIRE_GROUP ? (int)left : WIRE_GROUP;
}

void reduce_encode(const struct reduce_piece *piece, uint64_t begin, uint64_t end)
{
    float decoded[WIRE_GROUP];
    struct walk walk = walk_to(piece, begin);
    for (; begin < end; begin++, walk_on(&walk)) {
        if (walk.owner == piece->rank)
            continue;
        if (piece->lost)
            wire_feed_group(piece->to + walk.offset, decoded, values(&walk), lost(&walk), count(&walk), piece->wire);
        else
            wire_encode_group(piece->to + walk.offset, values(&walk), count(&walk), piece->wire);
    }
}

static void add_up(const struct walk *walk)
{
    const struct reduce_piece *piece = walk->piece;
    float sum[WIRE_GROUP], *x = values(walk);
    uint8_t *to = piece->to + walk->offset;
    int n = count(walk);
    if (!piece->lost) {
        const uint8_t *parts[COMM_MAX_RANKS];
        for (int rank = 0; rank < piece->tp_size; rank++)
            parts[rank] = piece->from[rank] + walk->offset;
        wire_add_up_group(to, x, parts, piece->rank, piece->tp_size, n, piece->wire);
        return;
    }
    float whole[WIRE_GROUP];
    const uint8_t *mine = reduce_own_group(whole, x, n);
    for (int rank = 0; rank < piece->tp_size; rank++) {
        bool own = rank == piece->rank;
        const uint8_t *part = own ? mine : piece->from[rank] + walk->offset;
        enum wire wire = own ? WIRE_F32 : piece->wire;
        if (rank == 0)
            wire_decode_group(sum, part, n, wire);
        else
            wire_add_group(sum, part, n, wire);
    }
    wire_feed_group(to, x, sum, lost(walk), n, piece->wire);
}

void reduce_add_up(const struct reduce_piece *piece, uint64_t begin, uint64_t end)
{
    struct walk walk = walk_to(piece, begin);
    for (; begin < end; begin++, walk_on(&walk))
        if (walk.owner == piece->rank)
            add_up(&walk);
}

void reduce_decode(const struct reduce_piece *piece, uint64_t begin, uint64_t end)
{
    struct walk walk = walk_to(piece, begin);
    for (; begin < end; begin++, walk_on(&walk))
        if (walk.owner != piece->rank)
            wire_decode_group(values(&walk), piece->from[walk.owner] + walk.offset, count(&walk), piece->wire);
}
