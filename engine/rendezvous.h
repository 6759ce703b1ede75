// Ranks that a launcher started, each in a process of its own, on one host or several, find each other: rank 0 listens, the
// others come to it (again and again until the deadline, since it may start last), and when all are there and agree, each two
// of them get a connection of their own. Then nobody listens any more.
//
// Nobody who lacks the token (or is of another job of the same launcher) is let in, or can keep the others out: each
// connection has a few seconds to say who it is, and where too many wait the oldest is closed. What is said is authenticated,
// not hidden. Without a token, which is for one host alone, the kernel says who it is: only processes of the same user are let
// in, and called.
//
// A rank that is let in and does not fit (another world, another version, other shards, other options, a rank that is there already), one
// that says that it cannot come, and one that does not come, end the meeting with one sentence on all ranks that can be told.
#ifndef TPSHARD_ENGINE_RENDEZVOUS_H
#define TPSHARD_ENGINE_RENDEZVOUS_H

#include "engine/comm.h"
#include "engine/launcher_env.h"
#include "engine/rendezvous_wire.h"
#include "formats/error.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct rendezvous_options {
    const struct launcher_place *place; // world_size > 1
    const char *version;                // of the program
    uint8_t contract[MEET_CONTRACT_BYTES];
    int tp_size, pp_size; // world_size together
    const char *token;    // NULL: none. Only where rank 0 listens on this host alone; else ERR_USAGE
    int timeout_ms;       // of all of it
    // What this rank wants to run with, bytes <= MEET_OFFER_BYTES, for rank 0.
    const void *offer;
    size_t offer_bytes;
    // Rank 0, when all are there: offers [world], each with zeros behind it. An error ends the meeting on all ranks. NULL: all are taken.
    int (*judge)(void *arg, const uint8_t (*offers)[MEET_OFFER_BYTES], int world, struct error *err);
    // Of a connection that was sent away while the others are waited for. May be NULL.
    void (*on_note)(void *arg, const char *sentence);
    void *arg;
};

struct rendezvous {
    int rank, world;
    int links
        [COMM_MAX_RANKS]; // [world] connected sockets, TCP_NODELAY; that to itself is -1. Whoever takes one sets it to -1
    int control[COMM_MAX_RANKS]; // rank 0: [world] to each process, 0: -1. Others: [0] to rank 0's
};

// blob: bytes <= MEET_BLOB_MAX_BYTES that rank 0 gives and all others receive. ERR_RANK, ERR_CORRUPT (other shards), ERR_USAGE.
// Success: caller owns *out (rendezvous_close).
int rendezvous_meet(struct rendezvous *out, const struct rendezvous_options *options, void *blob, size_t bytes,
                    struct error *err);
// Instead of it, for a rank that cannot come: the others are told why, as far as they are found within a few seconds, and within timeout_ms where
// that is above 0. Of the options, offer and judge do not count; the place's rank may be out of its world.
void rendezvous_fail(const struct rendezvous_options *options, const struct error *why);
// Over the control connections: *value becomes the least of all ranks'. why (NULL: none): this rank cannot go on, for which
// all fail.
int rendezvous_least(struct rendezvous *r, int64_t *value, const struct error *why, int timeout_ms, struct error *err);
void rendezvous_close(struct rendezvous *r); // what is still its own. Accepts zeroes

#endif
