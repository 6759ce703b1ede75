// Reads by io_uring: those of several pieces are in flight together. Straight on the system calls, as little of the interface is needed. Where
// io_uring is missing or forbidden (containers' seccomp filters), loader_ring_open says so.
#ifndef TPSHARD_ENGINE_LOADER_URING_H
#define TPSHARD_ENGINE_LOADER_URING_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

enum { RING_READS = 16 }; // in flight, at most

struct loader_ring; // belongs to one thread

// What fails returns an errno. With an error the kernel writes to no buffer any more, and nothing else may be asked of the ring than to be closed.
// stop (NULL: none): set, a ring that the kernel is too busy for is not waited for.
int loader_ring_open(struct loader_ring **out, const atomic_bool *stop);
void loader_ring_close(struct loader_ring *ring); // nothing is in flight; accepts NULL

// Prepares read `index` (0 .. RING_READS - 1), which is not under way; it begins when any is waited for next.
void loader_ring_read(struct loader_ring *ring, unsigned index, int fd, void *buffer, uint32_t bytes, uint64_t offset);
// Begins what is prepared, and waits for one read: *whole says whether it brought all its bytes.
int loader_ring_wait(struct loader_ring *ring, unsigned index, bool *whole);
// Reads that are prepared or in flight, as far as was seen.
unsigned loader_ring_under_way(const struct loader_ring *ring);
// Waits for all that is in flight, so that its buffers may be used for something else.
int loader_ring_drain(struct loader_ring *ring);

#endif
