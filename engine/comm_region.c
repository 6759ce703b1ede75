// The memory that ranks share: its layout, the abort with the first error, and the ranks' positions. See comm.h.
#include "engine/comm_internal.h"

#include "formats/checked.h"

#include <assert.h>
#include <stdio.h>

enum {
    PAGE_BYTES = 4096,
    MOST_PIECE_GROUPS = 4096, // of an all_reduce at once, for any transport; what it does not use is never touched
};

static uint64_t piece_groups(uint64_t max_elems)
{
    uint64_t groups = wire_groups(max_elems);
    return groups > MOST_PIECE_GROUPS ? MOST_PIECE_GROUPS : groups ? groups : 1;
}

static uint64_t buffer_bytes(uint64_t max_elems)
{
    uint64_t bytes = piece_groups(max_elems) * WIRE_MAX_GROUP_BYTES;
    return round_up(bytes > COMM_GATHER_MAX_BYTES ? bytes : COMM_GATHER_MAX_BYTES, PAGE_BYTES);
}

static int groups(int pp_size) { return pp_size > 1 ? GROUP_COUNT : 1; }

// Two messages, each with what stands before it.
static uint64_t channel_bytes(int pp_size, uint64_t message_bytes)
{
    return pp_size > 1 && message_bytes ? round_up(2 * (message_bytes + 2 * CACHE_LINE), PAGE_BYTES) : 0;
}

// From each rank to each one of another stage.
static uint64_t num_channels(int tp_size, int pp_size)
{
    uint64_t ranks = (uint64_t)tp_size * (uint64_t)pp_size;
    return ranks * (ranks - (uint64_t)tp_size);
}

static uint64_t buffers_offset(int ranks)
{
    return round_up(sizeof(struct comm_region) + (uint64_t)ranks * sizeof(struct rank_slot), PAGE_BYTES);
}

static uint64_t channels_offset(int tp_size, int pp_size, uint64_t max_elems)
{
    int ranks = tp_size * pp_size;
    return buffers_offset(ranks) + 2 * (uint64_t)groups(pp_size) * (uint64_t)ranks * buffer_bytes(max_elems);
}

uint64_t comm_region_bytes(int tp_size, int pp_size, uint64_t max_elems, uint64_t message_bytes)
{
    assert(tp_size >= 1 && pp_size >= 1 && tp_size <= COMM_MAX_RANKS && pp_size <= COMM_MAX_RANKS / tp_size);
    uint64_t channel = channel_bytes(pp_size, message_bytes);
    return channels_offset(tp_size, pp_size, max_elems) +
           (channel ? num_channels(tp_size, pp_size) * (PAGE_BYTES + channel) : 0);
}

struct comm_region *comm_region_init(void *memory, int tp_size, int pp_size, uint64_t max_elems, uint64_t message_bytes)
{
    struct comm_region *region = memory;
    region->tp_size = tp_size;
    region->pp_size = pp_size;
    region->world_size = tp_size * pp_size;
    region->piece_groups = piece_groups(max_elems);
    region->buffer_bytes = buffer_bytes(max_elems);
    region->buffers_offset = buffers_offset(region->world_size);
    region->channel_bytes = channel_bytes(pp_size, message_bytes);
    region->channels_offset = channels_offset(tp_size, pp_size, max_elems);
    for (int rank = 0; rank < region->world_size; rank++) {
        for (int group = 0; group < GROUP_COUNT; group++)
            atomic_init(&region->slots[rank].posted[group], (uint32_t)FIRST_TOKEN);
        atomic_init(&region->slots[rank].parts, (uint32_t)FIRST_TOKEN);
        atomic_init(&region->slots[rank].waits_for, -1);
    }
    return region;
}

struct rank_slot *comm_slot(const struct comm *comm, int rank) { return &comm->region->slots[comm->first + rank]; }

uint8_t *comm_buffer(const struct comm *comm, int rank, uint32_t token)
{
    struct comm_region *region = comm->region;
    uint64_t index = ((uint64_t)(comm->first + rank) * (uint64_t)groups(region->pp_size) + comm->group) * 2 + token % 2;
    return (uint8_t *)region + region->buffers_offset + index * region->buffer_bytes;
}

struct channel *comm_channel(const struct comm_region *region, int from, int to)
{
    int own = from / region->tp_size * region->tp_size, others = region->world_size - region->tp_size;
    uint64_t index = (uint64_t)from * (uint64_t)others + (uint64_t)(to < own ? to : to - region->tp_size);
    return (struct channel *)((uint8_t *)region + region->channels_offset +
                              index * (PAGE_BYTES + region->channel_bytes));
}

uint8_t *comm_channel_data(const struct comm_region *region, int from, int to)
{
    return (uint8_t *)comm_channel(region, from, to) + PAGE_BYTES;
}

void comm_region_set_start_timeout(struct comm_region *region, int timeout_ms)
{
    region->start_timeout_ms = timeout_ms;
}

void comm_ring(struct rank_slot *slot)
{
    atomic_fetch_add(&slot->bell, 1);
    futex_wake(&slot->bell, 1);
}

void comm_region_abort(struct comm_region *region, int rank, const struct error *why)
{
    uint32_t none = ABORT_NONE;
    if (atomic_compare_exchange_strong(&region->abort, &none, ABORT_RAISED)) {
        region->error_rank = rank;
        region->error = *why;
        atomic_store(&region->abort, ABORT_TOLD);
    }
    for (int i = 0; i < region->world_size; i++)
        comm_ring(&region->slots[i]);
}

bool comm_region_aborted(const struct comm_region *region) { return atomic_load(&region->abort) != ABORT_NONE; }

bool comm_region_error(const struct comm_region *region, int *rank, struct error *out)
{
    if (atomic_load(&region->abort) != ABORT_TOLD)
        return false;
    *rank = region->error_rank;
    *out = region->error;
    return true;
}

// ---- positions -----------------------------------------------------------------------------------------------------

const char *comm_operation_name(enum comm_operation op)
{
    static const char *const names[OP_COUNT] = {"start",     "load", "handshake", "idle",   "embedding",
                                                "attention", "mlp",  "head",      "sample", "hand-over"};
    return (unsigned)op < OP_COUNT ? names[op] : "unknown";
}

void comm_place(char place[COMM_PLACE_BYTES], enum comm_operation op, int layer)
{
    if (layer < 0)
        snprintf(place, COMM_PLACE_BYTES, "%s", comm_operation_name(op));
    else
        snprintf(place, COMM_PLACE_BYTES, "%s of layer %d", comm_operation_name(op), layer);
}

// position: moves (32 bits), layer + 1 (24), operation (8). Written by its rank alone, in comm_at.
struct comm_position comm_unpack_position(uint64_t bits)
{
    return (struct comm_position){
        .op = (enum comm_operation)(bits & 0xff), .layer = (int)(bits >> 8 & 0xffffff) - 1, .progress = bits >> 32};
}

struct comm_position comm_region_position(const struct comm_region *region, int rank)
{
    const struct rank_slot *slot = &region->slots[rank];
    struct comm_position position = comm_unpack_position(atomic_load_explicit(&slot->position, memory_order_relaxed));
    for (int group = 0; group < GROUP_COUNT; group++)
        position.progress += atomic_load_explicit(&slot->posted[group], memory_order_relaxed) - (uint32_t)FIRST_TOKEN;
    position.progress += atomic_load_explicit(&slot->parts, memory_order_relaxed) - (uint32_t)FIRST_TOKEN;
    position.progress += atomic_load_explicit(&slot->messages, memory_order_relaxed);
    position.waits_for = atomic_load_explicit(&slot->waits_for, memory_order_relaxed);
    return position;
}

// Whether what a rank waits for is there: it has not run since, or is just about to.
static bool wait_is_over(const struct comm_region *region, int rank, int other)
{
    const struct rank_slot *slot = &region->slots[rank], *theirs = &region->slots[other];
    uint64_t reach = atomic_load(&slot->wait_reach);
    uint32_t kind = atomic_load(&slot->wait_kind);
    bool has_channel = region->channel_bytes > 0 && rank / region->tp_size != other / region->tp_size;
    if ((kind == WAITS_WRITTEN || kind == WAITS_TAKEN) && !has_channel)
        return false; // of another wait than the rank that was read before
    switch (kind) {
    case WAITS_WORLD:
        return (int32_t)(atomic_load(&theirs->posted[GROUP_WORLD]) - (uint32_t)reach) >= 0;
    case WAITS_STAGE:
        return (int32_t)(atomic_load(&theirs->posted[GROUP_STAGE]) - (uint32_t)reach) >= 0;
    case WAITS_PART:
        return (int32_t)(atomic_load(&theirs->parts) - (uint32_t)reach) >= 0;
    case WAITS_WRITTEN:
        return atomic_load(&comm_channel(region, other, rank)->written) >= reach;
    case WAITS_TAKEN:
        return atomic_load(&comm_channel(region, rank, other)->taken) >= reach;
    default:
        return false;
    }
}

int comm_region_waits_for(const struct comm_region *region, int rank)
{
    const struct rank_slot *slot = &region->slots[rank];
    int other = atomic_load(&slot->waits_for);
    return other < 0 || atomic_load(&slot->silent) || wait_is_over(region, rank, other) ? -1 : other;
}

int comm_region_cause(const struct comm_region *region, int rank)
{
    int cause = rank;
    for (int steps = 0; steps < region->world_size; steps++) {
        int next = comm_region_waits_for(region, cause);
        if (next < 0)
            return cause;
        cause = next;
    }
    return rank;
}
