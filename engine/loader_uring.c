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
#include <time.h>
#include <unistd.h>

enum {
    BUSY_PAUSE_MS = 1,
    MOST_BUSY = 1000, // such pauses one after the other
};

struct loader_ring {
    int fd;
    uint8_t *queues; // both, in one mapping
    struct io_uring_sqe *entries;
    size_t queues_bytes, entries_bytes;
    _Atomic unsigned *submit_tail, *complete_head, *complete_tail;
    unsigned *submit_array, submit_mask, complete_mask;
    struct io_uring_cqe *completions;
    unsigned prepared, in_flight;
    unsigned busy; // how often in succession the kernel has taken nothing and brought nothing
    const atomic_bool *stop;
    int failed; // errno
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

int loader_ring_open(struct loader_ring **out, const atomic_bool *stop)
{
    struct io_uring_params params = {0};
    struct loader_ring *ring = calloc(1, sizeof *ring);
    if (!ring)
        return ENOMEM;
    ring->stop = stop;
    ring->fd = (int)syscall(SYS_io_uring_setup, RING_READS, &params);
    if (ring->fd >= 0 && !(params.features & IORING_FEAT_SINGLE_MMAP))
        errno = ENOSYS; // older than 5.4
    else if (ring->fd >= 0 && map_queues(ring, &params) == 0) {
        *out = ring;
        return 0;
    }
    int failed = errno;
    loader_ring_close(ring);
    return failed;
}

void loader_ring_close(struct loader_ring *ring)
{
    if (!ring)
        return;
    assert(ring->in_flight == 0 && (ring->failed || ring->prepared == 0));
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

static void pause_a_little(void) { nanosleep(&(struct timespec){.tv_nsec = BUSY_PAUSE_MS * 1000000}, NULL); }

// The ring is given up. What is in flight lands by itself, and its completion is told without being asked for; until then its buffer is the kernel's.
static int give_up(struct loader_ring *ring, int failed)
{
    ring->failed = failed;
    for (; ring->in_flight > 0; take_completions(ring))
        pause_a_little();
    return failed;
}

// Hands over what was prepared or, when all is in flight, sleeps until something has come. Not called with nothing to wait for.
static int enter(struct loader_ring *ring)
{
    unsigned wait_for = ring->prepared > 0 ? 0 : 1, before = ring->in_flight;
    long taken = syscall(SYS_io_uring_enter, ring->fd, ring->prepared, wait_for, IORING_ENTER_GETEVENTS, NULL, 0);
    int failed = taken < 0 ? errno : 0;
    if (failed && failed != EINTR && failed != EAGAIN && failed != EBUSY)
        return give_up(ring, failed);
    if (taken > 0) {
        ring->prepared -= (unsigned)taken;
        ring->in_flight += (unsigned)taken;
    }
    take_completions(ring);
    if (taken > 0 || ring->in_flight < before) {
        ring->busy = 0;
        return 0;
    }
    if (++ring->busy > MOST_BUSY || (ring->stop && atomic_load(ring->stop)))
        return give_up(ring, failed ? failed : EBUSY);
    pause_a_little();
    return 0;
}

int loader_ring_wait(struct loader_ring *ring, unsigned index, bool *whole)
{
    int failed = ring->failed;
    take_completions(ring);
    while ((ring->reads[index].pending || ring->prepared > 0) && !failed)
        failed = enter(ring);
    *whole = ring->reads[index].whole;
    return failed;
}

unsigned loader_ring_under_way(const struct loader_ring *ring) { return ring->prepared + ring->in_flight; }

int loader_ring_drain(struct loader_ring *ring)
{
    int failed = ring->failed;
    take_completions(ring);
    while (ring->prepared + ring->in_flight > 0 && !failed)
        failed = enter(ring);
    return failed;
}
