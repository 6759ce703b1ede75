// What goes out over a link, and who is lost. See comm_link_internal.h.
#include "engine/comm_link_internal.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

struct rank_slot *link_slot_of(const struct link *link, int rank) { return &link->region->slots[rank]; }

void link_raise_alarm(int event_fd)
{
    uint64_t one = 1;
    // It cannot fail: the counter is far from its end.
    if (write(event_fd, &one, sizeof one) != sizeof one)
        return;
}

// ---- losses ----------------------------------------------------------------------------------------------------------

void link_end_all(struct link *link, int rank, const struct error *found)
{
    comm_region_abort(link->region, rank, found);
    link_raise_alarm(link->wake_main);
}

static void end_over(struct link *link, int rank, const char *how)
{
    char place[COMM_PLACE_BYTES];
    struct comm_position at = comm_region_position(link->region, rank);
    comm_place(place, at.op, at.layer);
    struct error found;
    error_set(&found, ERR_RANK, "rank %d is lost: %s; rank %d was last seen in %s", rank, how, rank, place);
    link_end_all(link, rank, &found);
}

void link_give_up(struct link *link, int rank, const char *how)
{
    struct peer *peer = &link->peers[rank];
    bool known = peer->left || link->closing || comm_region_aborted(link->region);
    peer->refused = true;
    if (!known)
        end_over(link, rank, how);
}

void link_lose_connection(struct link *link, int rank)
{
    struct peer *peer = &link->peers[rank];
    bool known = peer->gone || peer->left || link->closing || comm_region_aborted(link->region);
    peer->gone = true;
    if (known)
        return;
    char how[128];
    if (errno)
        snprintf(how, sizeof how, "its connection to rank %d broke (%s)", link->rank, strerror(errno));
    else
        snprintf(how, sizeof how, "it closed its connection to rank %d", link->rank);
    end_over(link, rank, how);
}

// ---- what goes out -----------------------------------------------------------------------------------------------------

struct frame_head link_make_head(const struct link *link, enum frame_kind kind)
{
    const struct rank_slot *slot = link_slot_of(link, link->rank);
    return (struct frame_head){.magic = FRAME_MAGIC,
                               .kind = (uint8_t)kind,
                               .position = atomic_load_explicit(&slot->position, memory_order_relaxed),
                               .waits_for = atomic_load_explicit(&slot->waits_for, memory_order_relaxed),
                               .messages = atomic_load_explicit(&slot->messages, memory_order_relaxed)};
}

struct frame_head link_make_hello(const struct link *link)
{
    const struct comm_region *region = link->region;
    struct frame_head head = link_make_head(link, FRAME_HELLO);
    head.token = FRAME_VERSION;
    head.first = (uint64_t)link->rank;
    head.count = (uint64_t)region->tp_size;
    head.groups_per_row = (uint64_t)region->pp_size;
    head.group_bytes = region->piece_groups;
    head.bytes = region->buffer_bytes;
    head.amount = region->channel_bytes;
    return head;
}

bool link_have_channels(const struct link *link, int rank)
{
    const struct comm_region *region = link->region;
    return region->channel_bytes && rank / region->tp_size != link->rank / region->tp_size;
}

static bool next_abort(struct link *link, struct peer *peer)
{
    struct error error;
    int rank;
    if (peer->abort_told || !comm_region_error(link->region, &rank, &error))
        return false;
    peer->told_error = (struct frame_error){.rank = rank, .code = error.code};
    memcpy(peer->told_error.msg, error.msg, sizeof peer->told_error.msg);
    peer->now = (struct out_frame){link_make_head(link, FRAME_ABORT), (const uint8_t *)&peer->told_error};
    peer->now.head.payload_bytes = sizeof peer->told_error;
    return peer->abort_told = true;
}

// Bytes of the channel to a rank that have been written and not yet sent, up to the ring's end.
static bool next_of_channel(struct link *link, int rank)
{
    struct peer *peer = &link->peers[rank];
    const struct comm_region *region = link->region;
    struct channel *channel = comm_channel(region, link->rank, rank);
    uint64_t at = peer->channel_sent % region->channel_bytes,
             bytes = atomic_load(&channel->written) - peer->channel_sent;
    bytes = bytes < region->channel_bytes - at ? bytes : region->channel_bytes - at;
    bytes = bytes < FRAME_CHANNEL_BYTES ? bytes : FRAME_CHANNEL_BYTES;
    if (!bytes)
        return false;
    peer->now =
        (struct out_frame){link_make_head(link, FRAME_CHANNEL), comm_channel_data(region, link->rank, rank) + at};
    peer->now.head.payload_bytes = (uint32_t)bytes;
    peer->now.head.amount = peer->channel_sent;
    peer->channel_sent += bytes;
    return true;
}

static bool next_taken(struct link *link, int rank)
{
    struct peer *peer = &link->peers[rank];
    uint64_t taken = atomic_load(&comm_channel(link->region, rank, link->rank)->taken);
    if (taken == peer->taken_told)
        return false;
    peer->now = (struct out_frame){link_make_head(link, FRAME_TAKEN), NULL};
    peer->now.head.amount = peer->taken_told = taken;
    return true;
}

// Chooses what is sent next to a rank.
static bool next_frame(struct link *link, int rank)
{
    struct peer *peer = &link->peers[rank];
    if (!peer->hello_told) {
        peer->now = (struct out_frame){link_make_hello(link), NULL};
        return peer->hello_told = true;
    }
    if (next_abort(link, peer))
        return true;
    if (peer->queued && !peer->abort_told) {
        peer->now = peer->queue[0];
        memmove(peer->queue, peer->queue + 1, --peer->queued * sizeof *peer->queue);
        return true;
    }
    if (link_have_channels(link, rank) && !peer->abort_told && (next_taken(link, rank) || next_of_channel(link, rank)))
        return true;
    if (peer->beat_due && !peer->bye_due) {
        peer->beat_due = false;
        peer->now = (struct out_frame){link_make_head(link, FRAME_BEAT), NULL};
        return true;
    }
    if (peer->bye_due && !peer->bye_told) {
        peer->now = (struct out_frame){link_make_head(link, FRAME_BYE), NULL};
        return peer->bye_told = true;
    }
    return false;
}

bool link_flush_to(struct link *link, int rank)
{
    struct peer *peer = &link->peers[rank];
    while (!peer->gone && (peer->sending || next_frame(link, rank))) {
        if (!peer->sending) {
            peer->sending = true;
            peer->now_sent = 0;
        }
        size_t head_bytes = sizeof peer->now.head, sent = peer->now_sent, payload = peer->now.head.payload_bytes;
        size_t head_left = sent < head_bytes ? head_bytes - sent : 0, payload_sent = sent - (head_bytes - head_left);
        struct iovec parts[2] = {{(uint8_t *)&peer->now.head + (head_bytes - head_left), head_left}};
        if (payload > payload_sent)
            parts[1] = (struct iovec){(uint8_t *)(uintptr_t)peer->now.payload + payload_sent, payload - payload_sent};
        int skip = head_left == 0;
        int64_t n = link->carrier->send(link->data, rank, parts + skip, payload > payload_sent ? 2 - skip : 1);
        if (n < 0) { // it may have said why
            int why = errno;
            link_read_from(link, rank);
            errno = why;
            link_lose_connection(link, rank);
        }
        if (n <= 0)
            return n < 0;
        peer->now_sent += (size_t)n;
        if (peer->now_sent == head_bytes + payload)
            peer->sending = false;
    }
    return true;
}

bool link_flush_all(struct link *link, bool *writers)
{
    bool left = false;
    for (int rank = 0; rank < link->world_size; rank++) {
        bool full = rank != link->rank && !link_flush_to(link, rank);
        left |= full;
        if (writers)
            writers[rank] = full;
    }
    return left;
}
