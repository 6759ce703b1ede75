// Which transport ranks take between their devices, settled before the first of them takes memory there: the one that was chosen for them, or, where
// they cannot have it, or would gain nothing by it, one that does without, and why. A slow link is left to who asks for it.
//
// Where one process starts all ranks, it has the links tried before (session_links.c). Ranks that a launcher has started first tell each other where they
// are: devices of several hosts have NCCL or the hosts' sockets. Then the first rank of each stage has the links of its stage tried, by processes that see what
// it sees itself; so what they find counts where all ranks are shown the same devices, and compute on those that were tried.
#ifndef TPSHARD_ENGINE_RANK_TRANSPORT_H
#define TPSHARD_ENGINE_RANK_TRANSPORT_H

#include "engine/comm.h"
#include "engine/link_probe.h"
#include "kernels/backend.h"
#include "kernels/exchange_choice.h"

#include <stdbool.h>

struct rank_transport_options {
    const struct backend *backend;
    enum transport wanted;
    bool is_auto; // another one will do
    bool spread;  // the ranks are processes that a launcher has started
    // Who settles it together: the stage where ranks are spread, else all ranks. first: the world's number of its rank 0.
    struct comm *comm;
    int first, tp_size; // tp_size 1: nobody exchanges anything
    int device_rank;    // that the backend's rule for devices is told of this rank
    // Not spread, rank 0: what the parent has begun (NULL: nothing, and why).
    const struct link_probe *links;
    const char *link_problem;
    // Whether all ranks are to end.
    bool (*stopped)(void *arg);
    void *arg;
};

enum { RANK_TRANSPORT_NOTE_BYTES = LINK_SENTENCE_BYTES + 64 };
struct rank_transport {
    struct rank_transport_options options;
    struct link_probe *own; // begun here
    char problem[LINK_SENTENCE_BYTES];
    enum transport transport;             // as far as it is known
    char note[RANK_TRANSPORT_NOTE_BYTES]; // of the first rank, for the user: why it is another one; "": it is not
};

// Before the rank's device is opened: the driver may not run in this process yet. All ranks call both in this order, and end with the same transport. An
// error: what was asked for cannot be had.
int rank_transport_begin(struct rank_transport *out, const struct rank_transport_options *options, struct error *err);
// With the rank's device open; waits until the links have been tried, which takes memory there.
int rank_transport_settle(struct rank_transport *settled, const struct device *device, struct error *err);
// Ends what still runs. Accepts zeroes, and a second time.
void rank_transport_end(struct rank_transport *settled);

#endif
