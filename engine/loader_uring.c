// A ring for reads. See loader_uring.h; the protocol is io_uring(7): this side owns the tail of the submissions and the head of the
// completions, the kernel the other two.
#include "engine/loader_uring.h"

#include <assert.h>
#include <errno.h>
#include <linux/io_uring.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

struct loader_ring {
    int fd;
    uint8_t *queues; // both, in one mapping
    struct io_uring_sqe *entries;
    size_t queues_bytes, entries_bytes;
    _Atomic unsigned *submit_tail, *complete_head, *complete_tail;
    unsigned *submit_array, submit_mask, complete_mask;
    struct io_uring_cqe *completions;
    unsigned prepared, in_flight;
    bool has_failed;
    struct {
        uint32_t wanted;
        bool pending, whole;
    } reads[RING_READS];
};

static int map_queues(struct loader_ring *ring, const struct io_uring_params *p)
{
    size_t submit_bytes = p->sq_off.array + p->sq_entries * sizeof(unsigned);
    size_t complete_bytes = p->cq_off.cqes + p->cq_entries * sizeof(struct io_uring_cqe);
    ring->queues_bytes = submit_bytes > complete_bytes ? submit_bytes : complete_bytes;
    ring->entries_bytes = p->sq_entries * sizeof *ring->entries;
    uint8_t *queues =
        mmap(NULL, ring->queues_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring->fd, IORING_OFF_SQ_RING);
    if (queues == MAP_FAILED)
        return -1;
    ring->queues = queues;
    void *entries =
        mmap(NULL, ring->entries_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring->fd, IORING_OFF_SQES);
    if (entries == MAP_FAILED)
        return -1;
    ring->entries = entries;
    ring->submit_tail = (_Atomic unsigned *)(void *)(queues + p->sq_off.tail);
    ring->submit_mask = *(unsigned *)(void *)(queues + p->sq_off.ring_mask);
    ring->submit_array = (unsigned *)(void *)(queues + p->sq_off.array);
    ring->complete_head = (_Atomic unsigned *)(void *)(queues + p->cq_off.head);
    ring->complete_tail = (_Atomic unsigned *)(void *)(queues + p->cq_off.tail);
    ring->complete_mask = *(unsigned *)(void *)(queues + p->cq_off.ring_mask);
    ring->completions = (struct io_uring_cqe *)(void *)(queues + p->cq_off.cqes);
    return 0;
}

int loader_ring_open(struct loader_ring **out, struct error *err)
{
    struct io_uring_params params = {0};
    struct loader_ring *ring = calloc(1, sizeof *ring);
    if (!ring)
        return error_set(err, ERR_MEMORY, "no memory for an io_uring");
    ring->fd = (int)syscall(SYS_io_uring_setup, RING_READS, &params);
    if (ring->fd >= 0 && !(params.features & IORING_FEAT_SINGLE_MMAP))
        errno = ENOSYS; // older than 5.4
    else if (ring->fd >= 0 && map_queues(ring, &params) == 0) {
        *out = ring;
        return 0;
    }
    int rc = error_set_errno(err, "io_uring cannot be used");
    loader_ring_close(ring);
    return rc;
}

void loader_ring_close(struct loader_ring *ring)
{
    if (!ring)
        return;
    assert(ring->has_failed || ring->prepared + ring->in_flight == 0);
    if (ring->entries)
        munmap(ring->entries, ring->entries_bytes);
    if (ring->queues)
        munmap(ring->queues, ring->queues_bytes);
    if (ring->fd >= 0)
        close(ring->fd);
    free(ring);
}

void loader_ring_read(struct loader_ring *ring, unsigned index, int fd, void *buffer, uint32_t bytes, uint64_t offset)
{
    unsigned tail = atomic_load_explicit(ring->submit_tail, memory_order_relaxed), at = tail & ring->submit_mask;
    ring->entries[at] = (struct io_uring_sqe){.opcode = IORING_OP_READ,
                                              .fd = fd,
                                              .addr = (uint64_t)(uintptr_t)buffer,
                                              .len = bytes,
                                              .off = offset,
                                              .user_data = index};
    ring->submit_array[at] = at;
    atomic_store_explicit(ring->submit_tail, tail + 1, memory_order_release);
    ring->reads[index].wanted = bytes;
    ring->reads[index].pending = true;
    ring->reads[index].whole = false;
    ring->prepared++;
}

static void take_completions(struct loader_ring *ring)
{
    unsigned head = atomic_load_explicit(ring->complete_head, memory_order_relaxed);
    for (; head != atomic_load_explicit(ring->complete_tail, memory_order_acquire); head++) {
        const struct io_uring_cqe *done = &ring->completions[head & ring->complete_mask];
        ring->reads[done->user_data].pending = false;
        ring->reads[done->user_data].whole =
            done->res >= 0 && (uint32_t)done->res == ring->reads[done->user_data].wanted;
        ring->in_flight--;
    }
    atomic_store_explicit(ring->complete_head, head, memory_order_release);
}

// Hands over what was prepared or, when all is in flight, sleeps until something has come. Not called with nothing to wait for.
static int enter(struct loader_ring *ring, struct error *err)
{
    unsigned wait_for = ring->prepared > 0 ? 0 : 1;
    long taken = syscall(SYS_io_uring_enter, ring->fd, ring->prepared, wait_for, IORING_ENTER_GETEVENTS, NULL, 0);
    if (taken > 0) {
        ring->prepared -= (unsigned)taken;
        ring->in_flight += (unsigned)taken;
    } else if (taken < 0 && errno != EINTR && errno != EAGAIN && errno != EBUSY) {
        ring->has_failed = true;
        return error_set_errno(err, "io_uring has failed");
    }
    take_completions(ring);
    return 0;
}

int loader_ring_wait(struct loader_ring *ring, unsigned index, bool *whole, struct error *err)
{
    int rc = 0;
    take_completions(ring);
    while (ring->reads[index].pending && !rc)
        rc = enter(ring, err);
    *whole = ring->reads[index].whole;
    return rc;
}

int loader_ring_drain(struct loader_ring *ring, struct error *err)
{
    int rc = 0;
    take_completions(ring);
    while (ring->prepared + ring->in_flight > 0 && !rc)
        rc = enter(ring, err);
    return rc;
}
