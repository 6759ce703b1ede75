// The transport between ranks that share no memory, over anything that carries bytes in order between each two of them (a
// carrier: sockets, MPI). Each rank has a region of its own, in which this plays the others: see comm_internal.h.
//
// What goes over a connection are frames: a head (struct frame_head) and its payload. Every head tells where its sender is.
//   HELLO    the first one: version and figures, which must be the same on both sides
//   PHASE    the sender has posted: its call, and the part of its buffer that the move says
//   CHANNEL  bytes of the channel to the receiver
//   TAKEN    up to where the channel from the receiver has been read
//   BEAT     nothing else to say: at least eight times in the time after which silence means that a rank is lost
//   ABORT    the error that ends all; payload: struct frame_error
//   BYE      the sender closes its end in good order
//
// No wait of one connection stands behind another: all reads and writes take what they can. Both sides of a connection can
// write at the same time, since what arrives is always taken in: a phase's bytes have their place in the region (a rank is at
// most one phase ahead), a channel's too (its sender knows what was taken), and the rest is heads.
//
// Two threads work on a link, under one lock: the rank's own while it is in a collective, and one that wakes up now and then,
// for what must not wait for a rank that computes: beats, losses, aborts, the rest of a message. While the rank's own thread
// sleeps for input, the other one leaves reading to it.
#ifndef TPSHARD_ENGINE_COMM_LINK_H
#define TPSHARD_ENGINE_COMM_LINK_H

#include "engine/comm.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

// Bytes between this rank and each other one, in order. All but wait are called under the link's lock.
struct comm_carrier {
    // Gives bytes of the parts, in order, to a rank; returns how many it took, 0 while it can take none, -1 when the rank is
    // lost (errno says why, 0: its end was closed).
    int64_t (*send)(void *carrier, int rank, const struct iovec *parts, int count);
    // Takes at most `bytes` that have come from a rank; returns as above.
    int64_t (*receive)(void *carrier, int rank, void *to, size_t bytes);
    // Sleeps until something has come from one of readers [world], or one of writers [world] can take bytes, or `wake` (a
    // descriptor) has input; at most limit_ns, and without need.
    void (*wait)(void *carrier, const bool *readers, const bool *writers, int wake, int64_t limit_ns);
    void (*finish)(void *carrier, int rank); // nothing more will be sent to it, and all else may be dropped
    void (*close)(void *carrier);            // frees it
};

// The world's end of a rank over a carrier; takes the carrier in every case. Else as comm_open_sockets.
int comm_open_link(struct comm **out, const struct comm_carrier *carrier, void *data, struct comm_region *region,
                   int rank, int timeout_ms, struct error *err);

#endif
