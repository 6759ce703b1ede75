// What comes in over a link: nothing of it is trusted to be as it must be. See comm_link_internal.h.
#include "engine/comm_link_internal.h"

#include <string.h>

enum { BURST_BYTES = 4 * 1024 * 1024 }; // taken from one rank before the next one has its turn

static int refuse_frame(const struct link *link, int rank, const char *what, struct error *found)
{
    return error_set(found, ERR_CORRUPT, "what came from rank %d to rank %d is not as it must be: %s", rank, link->rank,
                     what);
}

static int check_hello(const struct link *link, int rank, const struct frame_head *theirs, struct error *found)
{
    struct frame_head mine = link_make_hello(link);
    if (theirs->token != mine.token || theirs->first != (uint64_t)rank)
        return error_set(found, ERR_CORRUPT,
                         "the connection of rank %d to rank %d leads to rank %llu, version %u: wanted version %u",
                         link->rank, rank, (unsigned long long)theirs->first, theirs->token, mine.token);
    if (theirs->count == mine.count && theirs->groups_per_row == mine.groups_per_row &&
        theirs->group_bytes == mine.group_bytes && theirs->bytes == mine.bytes && theirs->amount == mine.amount)
        return 0;
    return error_set(
        found, ERR_CORRUPT,
        "ranks that differ: rank %d has tp %llu, pp %llu, pieces of %llu groups, buffers of %llu and channels of %llu "
        "bytes; rank %d has %llu, %llu, %llu, %llu and %llu",
        link->rank, (unsigned long long)mine.count, (unsigned long long)mine.groups_per_row,
        (unsigned long long)mine.group_bytes, (unsigned long long)mine.bytes, (unsigned long long)mine.amount, rank,
        (unsigned long long)theirs->count, (unsigned long long)theirs->groups_per_row,
        (unsigned long long)theirs->group_bytes, (unsigned long long)theirs->bytes, (unsigned long long)theirs->amount);
}

static bool is_packed(const struct frame_head *head)
{
    return head->pattern == MOVE_TO_OWNERS || head->pattern == MOVE_FROM_OWNERS;
}

// Whether a rank's post is the next one of a group that both belong to, and its payload as long as its move.
static const char *phase_fault(const struct link *link, int rank, const struct frame_head *head)
{
    if (head->group >= GROUP_COUNT || !link->groups[head->group].region)
        return "a group that is not there";
    const struct comm *group = &link->groups[head->group];
    if (rank < group->first || rank >= group->first + group->size)
        return "a group of others";
    uint32_t own = atomic_load(&link_slot_of(link, link->rank)->posted[head->group]);
    uint32_t before = atomic_load(&link_slot_of(link, rank)->posted[head->group]);
    if (head->token != before + 1 || (int32_t)(head->token - own) > 1)
        return "a phase out of turn";
    bool values = comm_sums_values((enum collective)head->collective);
    if (head->collective > HANDSHAKE || (values && (uint32_t)head->detail >= WIRE_COUNT))
        return "an operation that is not there";
    struct comm_move move = frame_move(head);
    int64_t bytes = frame_move_bytes(&move, group->size, rank - group->first, group->rank, link->region->buffer_bytes);
    return bytes != (int64_t)head->payload_bytes ? "a phase of other length" : NULL;
}

static const char *channel_fault(const struct link *link, int rank, const struct frame_head *head)
{
    const struct comm_region *region = link->region;
    if (!link_have_channels(link, rank))
        return "a message where none can be";
    struct channel *in = comm_channel(region, rank, link->rank), *out = comm_channel(region, link->rank, rank);
    if (head->kind == FRAME_TAKEN)
        return head->payload_bytes || head->amount < atomic_load(&out->taken) ||
                       head->amount > link->peers[rank].channel_sent
                   ? "messages taken that were not sent"
                   : NULL;
    uint64_t room = region->channel_bytes - (head->amount - atomic_load(&in->taken));
    bool fits = head->amount == atomic_load(&in->written) && head->payload_bytes <= room &&
                head->payload_bytes <= region->channel_bytes - head->amount % region->channel_bytes;
    return fits ? NULL : "a message out of turn";
}

static int check_head(const struct link *link, int rank, struct error *found)
{
    const struct peer *peer = &link->peers[rank];
    const struct frame_head *head = &peer->head;
    const char *fault = NULL;
    if (head->magic != FRAME_MAGIC || head->kind > FRAME_BYE || (head->kind == FRAME_HELLO) == peer->greeted)
        return refuse_frame(link, rank, "no head of a frame", found);
    if (head->kind == FRAME_HELLO && check_hello(link, rank, head, found))
        return found->code;
    if (head->kind == FRAME_PHASE)
        fault = phase_fault(link, rank, head);
    else if (head->kind == FRAME_CHANNEL || head->kind == FRAME_TAKEN)
        fault = channel_fault(link, rank, head);
    else if (head->payload_bytes != (head->kind == FRAME_ABORT ? sizeof peer->error : 0))
        fault = "a frame of other length";
    return fault ? refuse_frame(link, rank, fault, found) : 0;
}

// Looks at a whole head and says where its payload goes. False when the rank is refused over it.
static bool begin_frame(struct link *link, int rank)
{
    struct peer *peer = &link->peers[rank];
    const struct frame_head *head = &peer->head;
    struct error found;
    if (check_head(link, rank, &found)) {
        peer->refused = true;
        link_end_all(link, rank, &found);
        return false;
    }
    peer->greeted = true;
    struct rank_slot *slot = link_slot_of(link, rank);
    atomic_store_explicit(&slot->position, head->position, memory_order_relaxed);
    atomic_store_explicit(&slot->waits_for, head->waits_for < link->world_size ? head->waits_for : -1,
                          memory_order_relaxed);
    atomic_store_explicit(&slot->messages, head->messages, memory_order_relaxed);
    if (head->kind == FRAME_PHASE)
        peer->to = is_packed(head)
                       ? peer->packed
                       : comm_buffer(&link->groups[head->group], rank - link->groups[head->group].first, head->token);
    else if (head->kind == FRAME_CHANNEL)
        peer->to = comm_channel_data(link->region, rank, link->rank) + head->amount % link->region->channel_bytes;
    else
        peer->to = (uint8_t *)&peer->error;
    peer->in_payload = true;
    peer->payload_got = 0;
    return true;
}

static void take_phase(struct link *link, int rank)
{
    struct peer *peer = &link->peers[rank];
    const struct frame_head *head = &peer->head;
    struct comm *group = &link->groups[head->group];
    struct rank_slot *slot = link_slot_of(link, rank);
    if (is_packed(head)) {
        struct comm_move move = frame_move(head);
        int owner = move.pattern == MOVE_TO_OWNERS ? group->rank : rank - group->first;
        frame_unpack(comm_buffer(group, rank - group->first, head->token), peer->packed, &move, group->size, owner);
    }
    slot->calls[head->group][head->token % 2] = (struct call){(enum collective)head->collective, head->detail,
                                                              head->amount, (enum comm_operation)head->op, head->layer};
    atomic_store(&slot->posted[head->group], head->token);
}

static void take_abort(struct link *link, int rank)
{
    struct peer *peer = &link->peers[rank];
    struct error error = {.code = peer->error.code < 0 ? peer->error.code : ERR_RANK};
    peer->error.msg[sizeof peer->error.msg - 1] = 0;
    memcpy(error.msg, peer->error.msg, sizeof error.msg);
    int cause = peer->error.rank >= 0 && peer->error.rank < link->world_size ? peer->error.rank : rank;
    link_end_all(link, cause, &error);
}

// The payload is there.
static void end_frame(struct link *link, int rank)
{
    struct peer *peer = &link->peers[rank];
    const struct frame_head *head = &peer->head;
    peer->in_payload = false;
    peer->head_got = 0;
    switch ((int)head->kind) {
    case FRAME_PHASE:
        take_phase(link, rank);
        break;
    case FRAME_CHANNEL:
        atomic_store(&comm_channel(link->region, rank, link->rank)->written, head->amount + head->payload_bytes);
        break;
    case FRAME_TAKEN:
        atomic_store(&comm_channel(link->region, link->rank, rank)->taken, head->amount);
        break;
    case FRAME_ABORT:
        take_abort(link, rank);
        break;
    case FRAME_BYE:
        peer->left = true;
        break;
    default:
        return;
    }
    atomic_fetch_add(&link_slot_of(link, link->rank)->bell, 1);
}

// What lies in `input`.
static void take_input(struct link *link, int rank)
{
    struct peer *peer = &link->peers[rank];
    while (!peer->refused) {
        size_t there = peer->end - peer->begin, missing;
        uint8_t *to;
        if (peer->in_payload) {
            missing = peer->head.payload_bytes - peer->payload_got;
            to = peer->to + peer->payload_got;
        } else {
            missing = sizeof peer->head - peer->head_got;
            to = (uint8_t *)&peer->head + peer->head_got;
        }
        size_t n = there < missing ? there : missing;
        memcpy(to, peer->input + peer->begin, n);
        peer->begin += n;
        *(peer->in_payload ? &peer->payload_got : &peer->head_got) += n;
        if (n < missing)
            break;
        if (peer->in_payload)
            end_frame(link, rank);
        else if (!begin_frame(link, rank))
            break;
    }
    peer->begin = peer->end = 0;
}

void link_read_from(struct link *link, int rank)
{
    struct peer *peer = &link->peers[rank];
    for (size_t taken = 0; taken < BURST_BYTES && !peer->gone;) {
        size_t missing = peer->in_payload ? peer->head.payload_bytes - peer->payload_got : 0;
        bool direct = missing >= LINK_INPUT_BYTES;
        int64_t n = link->carrier->receive(link->data, rank, direct ? peer->to + peer->payload_got : peer->input,
                                           direct ? missing : LINK_INPUT_BYTES);
        if (n < 0)
            link_lose_connection(link, rank);
        if (n <= 0)
            return;
        peer->silent_ns = 0;
        atomic_store(&link_slot_of(link, rank)->silent, 0);
        taken += (size_t)n;
        if (direct) {
            peer->payload_got += (size_t)n;
            if ((size_t)n == missing)
                end_frame(link, rank);
        } else {
            peer->end = (size_t)n;
            take_input(link, rank);
            if ((size_t)n < LINK_INPUT_BYTES && !peer->in_payload)
                return; // that was all
        }
    }
}

void link_read_all(struct link *link)
{
    for (int rank = 0; rank < link->world_size; rank++)
        if (rank != link->rank && !link->peers[rank].gone)
            link_read_from(link, rank);
}
