// The transport over shared memory: the ranks of a region write to it themselves, so nothing moves. See comm_internal.h.
#include "engine/comm_internal.h"

static void ring_waiters(struct comm *comm, const struct comm_move *move)
{
    (void)move;
    int self = comm->first + comm->rank;
    for (int rank = 0; rank < comm->size; rank++)
        if (atomic_load(&comm_slot(comm, rank)->waits_for) == self)
            comm_ring(comm_slot(comm, rank));
}

static void ring_other(struct comm *comm, int other)
{
    struct rank_slot *slot = &comm->region->slots[other];
    if (atomic_load(&slot->waits_for) == comm->first + comm->rank)
        comm_ring(slot);
}

static void sleep_on_bell(struct comm *comm, uint32_t bell, int64_t limit_ns)
{
    futex_wait(&comm->slot->bell, bell, limit_ns);
}

// 256 KiB of bf16 from each rank stay in the near caches.
static const struct comm_transport shm = {
    .piece_groups = 1024, .post = ring_waiters, .channel_moved = ring_other, .sleep = sleep_on_bell};

int comm_open(struct comm **out, struct comm_region *region, int rank, int timeout_ms, struct error *err)
{
    return comm_open_over(out, &shm, NULL, region, rank, timeout_ms, err);
}
