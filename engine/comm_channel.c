// Messages between two ranks of different stages, through a ring of bytes for each direction. See comm.h.
//
// The sender writes the head of a message and its bytes and raises `written`, piece by piece; the receiver reads what was
// written and raises `taken`. Each waits for the other's counter. A message begins at a multiple of its head's size, so the
// head lies in one part.
#include "engine/comm_internal.h"

#include "formats/checked.h"

#include <stdio.h>
#include <string.h>

enum { CHANNEL_PIECE = 256 * 1024 }; // shown to the other side at once, at most, so that both copy at the same time

struct message_head {
    _Alignas(CACHE_LINE) uint64_t bytes;
    int32_t op, layer;
};

struct transfer {
    struct comm *comm;
    struct channel *channel;
    uint8_t *ring;
    uint64_t capacity, piece; // at most half the ring: the head and a piece fit
    int other;
    struct call call;
};

static int begin_transfer(struct transfer *transfer, struct comm *comm, enum collective collective, uint64_t bytes,
                          int other, struct error *err)
{
    struct comm_region *region = comm->region;
    int self = comm->first + comm->rank, rc = comm_check_abort(comm, err);
    if (rc)
        return rc;
    if (comm->group != GROUP_WORLD || !region->channel_bytes || other < 0 || other >= region->world_size ||
        other / region->tp_size == self / region->tp_size) {
        struct error found;
        error_set(&found, ERR_OTHER,
                  "rank %d: %s of %llu bytes with rank %d: messages go between ranks of different stages, where the "
                  "region was made for them",
                  self, comm_collective_name(collective), (unsigned long long)bytes, other);
        return comm_raise(comm, err, &found);
    }
    int from = collective == SEND ? self : other, to = collective == SEND ? other : self;
    *transfer = (struct transfer){.comm = comm,
                                  .channel = comm_channel(region, from, to),
                                  .ring = comm_channel_data(region, from, to),
                                  .capacity = region->channel_bytes,
                                  .piece = region->channel_bytes / 2 < CHANNEL_PIECE ? region->channel_bytes / 2
                                                                                     : CHANNEL_PIECE,
                                  .other = other,
                                  .call = comm_call(comm, collective, other, bytes)};
    return 0;
}

static int wait_until(struct transfer *transfer, const _Atomic uint64_t *counter, uint64_t reach, struct error *err)
{
    struct comm_wait wait = {.call = &transfer->call, .counter = counter, .reach = reach};
    return comm_wait_for(transfer->comm, &wait, transfer->other, err);
}

// Until bytes can be written up to `end`.
static int wait_for_room(struct transfer *transfer, uint64_t end, struct error *err)
{
    return wait_until(transfer, &transfer->channel->taken, end < transfer->capacity ? 0 : end - transfer->capacity,
                      err);
}

static void copy_in(const struct transfer *transfer, uint64_t at, const uint8_t *data, uint64_t bytes)
{
    uint64_t begin = at % transfer->capacity, first = transfer->capacity - begin;
    first = first < bytes ? first : bytes;
    memcpy(transfer->ring + begin, data, first);
    memcpy(transfer->ring, data + first, bytes - first);
}

static void copy_out(const struct transfer *transfer, uint64_t at, uint8_t *data, uint64_t bytes)
{
    uint64_t begin = at % transfer->capacity, first = transfer->capacity - begin;
    first = first < bytes ? first : bytes;
    memcpy(data, transfer->ring + begin, first);
    memcpy(data + first, transfer->ring, bytes - first);
}

static void show(struct transfer *transfer, _Atomic uint64_t *counter, uint64_t value)
{
    atomic_store(counter, value);
    transfer->comm->transport->channel_moved(transfer->comm, transfer->other);
}

int comm_send(struct comm *comm, const void *data, size_t bytes, int to, struct error *err)
{
    struct transfer transfer;
    int rc = begin_transfer(&transfer, comm, SEND, bytes, to, err);
    if (rc)
        return rc;
    struct channel *channel = transfer.channel;
    uint64_t at = atomic_load_explicit(&channel->written, memory_order_relaxed);
    struct message_head head = {.bytes = bytes, .op = (int32_t)transfer.call.op, .layer = transfer.call.layer};
    if ((rc = wait_for_room(&transfer, at + sizeof head, err)))
        return rc;
    copy_in(&transfer, at, (const uint8_t *)&head, sizeof head);
    at += sizeof head;
    uint64_t end = at + bytes;
    for (const uint8_t *from = data; at < end;) {
        uint64_t piece = end - at < transfer.piece ? end - at : transfer.piece;
        if ((rc = wait_for_room(&transfer, at + piece, err)))
            return rc;
        copy_in(&transfer, at, from, piece);
        from += piece;
        at += piece;
        if (at < end)
            show(&transfer, &channel->written, at);
    }
    show(&transfer, &channel->written, round_up(at, sizeof head));
    atomic_fetch_add_explicit(&comm->slot->messages, 1, memory_order_relaxed);
    return 0;
}

static int refuse(struct transfer *transfer, const struct message_head *head, struct error *err)
{
    struct comm *comm = transfer->comm;
    char mine[COMM_PLACE_BYTES], theirs[COMM_PLACE_BYTES];
    comm_place(mine, transfer->call.op, transfer->call.layer);
    comm_place(theirs, (enum comm_operation)head->op, head->layer);
    struct error found;
    error_set(&found, ERR_RANK,
              "the ranks do not take the same step: rank %d is at receive (%s), %llu bytes from rank %d; rank %d is at "
              "send (%s), %llu bytes",
              comm->first + comm->rank, mine, (unsigned long long)transfer->call.amount, transfer->other,
              transfer->other, theirs, (unsigned long long)head->bytes);
    return comm_raise(comm, err, &found);
}

int comm_receive(struct comm *comm, void *data, size_t bytes, int from, struct error *err)
{
    struct transfer transfer;
    int rc = begin_transfer(&transfer, comm, RECEIVE, bytes, from, err);
    if (rc)
        return rc;
    struct channel *channel = transfer.channel;
    uint64_t at = atomic_load_explicit(&channel->taken, memory_order_relaxed);
    struct message_head head;
    if ((rc = wait_until(&transfer, &channel->written, at + sizeof head, err)))
        return rc;
    copy_out(&transfer, at, (uint8_t *)&head, sizeof head);
    if (head.bytes != bytes)
        return refuse(&transfer, &head, err);
    at += sizeof head;
    uint64_t end = at + bytes;
    for (uint8_t *to = data; at < end;) {
        uint64_t piece = end - at < transfer.piece ? end - at : transfer.piece;
        if ((rc = wait_until(&transfer, &channel->written, at + piece, err)))
            return rc;
        copy_out(&transfer, at, to, piece);
        to += piece;
        at += piece;
        if (at < end)
            show(&transfer, &channel->taken, at);
    }
    show(&transfer, &channel->taken, round_up(at, sizeof head));
    atomic_fetch_add_explicit(&comm->slot->messages, 1, memory_order_relaxed);
    return 0;
}
