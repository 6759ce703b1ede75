// Reads by io_uring: those of one piece are in flight together. Straight on the system calls, as little of the interface is needed. Where
// io_uring is missing or forbidden (containers' seccomp filters), loader_ring_open says so.
#ifndef TPSHARD_ENGINE_LOADER_URING_H
#define TPSHARD_ENGINE_LOADER_URING_H

#include "formats/error.h"

#include <stdbool.h>
#include <stdint.h>

enum { RING_READS = 16 }; // in flight, at most

struct loader_ring; // belongs to one thread

int loader_ring_open(struct loader_ring **out, struct error *err);
void loader_ring_close(struct loader_ring *ring); // nothing is in flight; accepts NULL

// Starts read `index` (0 .. RING_READS - 1) of a batch, whose reads begin when the first is waited for.
void loader_ring_read(struct loader_ring *ring, unsigned index, int fd, void *buffer, uint32_t bytes, uint64_t offset);
// Waits for one read: *whole says whether it brought all its bytes. An error: nothing more may be asked of the ring.
int loader_ring_wait(struct loader_ring *ring, unsigned index, bool *whole, struct error *err);
// Waits for all that is in flight, so that its buffers may be used for something else.
int loader_ring_drain(struct loader_ring *ring, struct error *err);

#endif
