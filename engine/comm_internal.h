// What the parts of the collectives share: the region (comm_region.c), one rank's end with its waits (comm_wait.c), its
// operations (comm.c) and messages between two ranks (comm_channel.c), and what a transport adds to them (comm_shm.c and its
// like). For users: comm.h.
//
// One primitive carries all operations of a group: a phase. In phase t a rank writes its own buffer t % 2, posts t, waits
// until every rank has posted t or more, and then reads what the others wrote. It writes that buffer again in phase t + 2,
// which it enters only after all have posted t + 1, hence have read what they wanted of phase t. Tokens t are 32-bit
// counters compared modulo 2^32. The groups (world, stage) have tokens and buffers of their own.
//
// A transport makes this true where ranks do not share a region. Each rank then has a region of its own, in which the
// transport plays the others: it moves the part of a buffer that is wanted there, then posts their tokens, and keeps their
// positions, the abort and the channels up to date. Over shared memory nothing moves.
#ifndef TPSHARD_ENGINE_COMM_INTERNAL_H
#define TPSHARD_ENGINE_COMM_INTERNAL_H

#include "engine/comm.h"
#include "kernels/futex.h"

enum {
    CACHE_LINE = 64,
    FIRST_TOKEN = -16, // the wrap to 0 belongs to every run
    // A rank may have posted two parts for which it has not waited; another one, which has seen both, may have posted two more.
    PARTS_UNDER_WAY = 4,
    ABORT_NONE = 0,
    ABORT_RAISED = 1, // the error is being written
    ABORT_TOLD = 2,   // and can be read
};

enum comm_group { GROUP_WORLD, GROUP_STAGE, GROUP_COUNT }; // with one stage only the first is used

enum collective {
    ALL_REDUCE,
    ALL_REDUCE_END,
    ROWS_TO_OWNERS,
    ROWS_TO_ALL,
    ALL_GATHER,
    BROADCAST,
    BARRIER,
    HANDSHAKE,
    SEND,
    RECEIVE
};

// What a rank takes its phase for; all ranks must agree.
struct call {
    enum collective collective;
    int detail;      // wire of what is coded, root of a broadcast, the other rank of a message
    uint64_t amount; // floats of what is coded, bytes else
    enum comm_operation op;
    int layer;
};

// Which part of the buffers must be seen by whom after a phase.
struct comm_move {
    enum {
        MOVE_NOTHING,
        MOVE_EVERYONE,    // the first `bytes` of each rank's buffer, by all
        MOVE_ROOT,        // the first `bytes` of the root's buffer, by all
        MOVE_TO_OWNERS,   // of each rank's groups of wire bytes those of an owner, by it
        MOVE_FROM_OWNERS, // an owner's own groups, by all
    } pattern;
    int root; // in the group
    uint64_t bytes;
    // Group i of the buffer lies at i * group_bytes and belongs to rank (first + i) % groups_per_row % size of the group.
    uint64_t first, count, groups_per_row, group_bytes;
};

enum wait_kind {
    WAITS_UNKNOWN,
    WAITS_WORLD,   // the other one's post of this phase, of the world
    WAITS_STAGE,   // of the stage
    WAITS_PART,    // its part of this number
    WAITS_WRITTEN, // its channel to this rank, written so far
    WAITS_TAKEN,   // this rank's channel to it, taken so far
};

struct rank_slot {
    _Alignas(CACHE_LINE) _Atomic uint32_t posted[GROUP_COUNT];
    struct call calls[GROUP_COUNT][2];           // of phase t in t % 2; published by posted
    _Alignas(CACHE_LINE) _Atomic uint32_t parts; // complete ones of sums in common memory, counted from FIRST_TOKEN
    struct call part_calls[PARTS_UNDER_WAY];     // of part t in t % PARTS_UNDER_WAY; published by parts
    _Alignas(CACHE_LINE) _Atomic uint32_t bell;
    // Rank of the world, or -1, and what for (enum wait_kind, a number). A rank that is stopped goes on saying it. Over a network others' kinds are not known,
    // but who has been silent.
    _Atomic int32_t waits_for;
    _Atomic uint32_t wait_kind, silent;
    _Atomic uint64_t wait_reach;
    _Atomic uint32_t messages; // sent and received
    _Alignas(CACHE_LINE) _Atomic uint64_t position;
};

// A ring of bytes from one rank to another; byte n of all that went through it lies at n % capacity of its data.
struct channel {
    _Alignas(CACHE_LINE) _Atomic uint64_t written; // by the sender
    _Alignas(CACHE_LINE) _Atomic uint64_t taken;   // by the receiver
};

// Ranks are those of the world unless said otherwise.
struct comm_region {
    int tp_size, pp_size, world_size;
    int start_timeout_ms;
    uint64_t piece_groups, buffer_bytes, buffers_offset; // piece_groups: what a buffer holds
    uint64_t channel_bytes, channels_offset;             // capacity of one; 0: there are none
    _Alignas(CACHE_LINE) _Atomic uint32_t abort;
    int error_rank;
    struct error error;
    struct rank_slot slots[];
};

struct comm {
    const struct comm_transport *transport;
    void *link; // the transport's own
    struct comm_region *region;
    struct rank_slot *slot; // of this rank
    enum comm_group group;
    int first, rank, size; // ranks first .. first + size - 1 are the group, and this one is first + rank
    int timeout_ms;
    int first_layer;      // of comm_at's
    uint32_t token;       // last phase posted
    uint32_t parts;       // last part of a sum in common memory that was posted
    uint64_t sent_bytes;  // of all_reduces
    uint64_t moved_bytes; // that the transport has sent for phases, beside heads of its own
    struct spinner spinner;
    struct comm *stage; // owned by the world's end; itself where there is one stage
};

// Calls fn for each task of a message of so many values, on the pool (NULL: there is none) where that is worth waking it.
void comm_run_tasks(struct thread_pool *pool, uint64_t values, thread_pool_fn *fn, void *arg, int64_t tasks);

struct comm_transport {
    uint64_t piece_groups; // at most, of an all_reduce at once
    // This rank has written its buffer of phase comm->token and posted it: the others are to learn of it.
    void (*post)(struct comm *comm, const struct comm_move *move);
    // This rank has written to its channel to another rank, or taken from the one that comes from there.
    void (*channel_moved)(struct comm *comm, int other);
    // Takes in what has come, without waiting. NULL where others write to the region themselves.
    void (*look)(struct comm *comm);
    // Sleeps until something may have come, at most limit_ns. bell: this rank's bell before the caller looked last.
    void (*sleep)(struct comm *comm, uint32_t bell, int64_t limit_ns);
    void (*close)(struct comm *comm); // frees the link. NULL: nothing to do
};

// A wait for a rank's post of phase comm->token (counter NULL) or of a part of a sum, or until a counter of a channel has reached a value.
struct comm_wait {
    const struct call *call;
    const _Atomic uint64_t *counter;
    uint64_t reach;
    bool idle;     // without a deadline
    bool for_part; // number `part`
    uint32_t part;
};

// Groups of an all_reduce at once.
uint64_t comm_piece_groups(const struct comm *comm);
struct rank_slot *comm_slot(const struct comm *comm, int rank); // rank in the group
uint8_t *comm_buffer(const struct comm *comm, int rank, uint32_t token);
struct channel *comm_channel(const struct comm_region *region, int from, int to);
uint8_t *comm_channel_data(const struct comm_region *region, int from, int to);
struct comm_position comm_unpack_position(uint64_t bits);
// For which rank one waits, as far as that can still be true: -1 where what it waits for is there, or nothing has been heard of it for long.
int comm_region_waits_for(const struct comm_region *region, int rank);
void comm_ring(struct rank_slot *slot);

// Ends with world and stage of a rank over a transport. Takes the link in every case.
int comm_open_over(struct comm **out, const struct comm_transport *transport, void *link, struct comm_region *region,
                   int rank, int timeout_ms, struct error *err);
int comm_check_abort(struct comm *comm, struct error *err);
// Ends the run with an error that was found here, unless one came first: that one counts on every rank.
int comm_raise(struct comm *comm, struct error *err, const struct error *found);
// Waits for all ranks of the group to post, or for one rank of the group, with a deadline. See comm.h.
int comm_wait_for_all(struct comm *comm, const struct call *call, struct error *err);
int comm_wait_for_parts(struct comm *comm, const struct call *call, uint32_t part, struct error *err);
int comm_wait_for(struct comm *comm, const struct comm_wait *wait, int rank, struct error *err);
// One phase: posts what this rank wrote to its buffer of phase comm->token + 1 and waits for the others, whose calls must agree with this
// one. Afterwards comm->token is that phase.
int comm_phase(struct comm *comm, enum collective collective, int detail, uint64_t amount, const struct comm_move *move,
               struct error *err);
// Ends the run where what another rank of the group calls is not what this one does.
int comm_check_call(struct comm *comm, const struct call *mine, int rank, const struct call *theirs, struct error *err);
// Whether its amount are values in a wire format, which is its detail.
bool comm_sums_values(enum collective collective);
// What the rank is at, for a call.
struct call comm_call(const struct comm *comm, enum collective collective, int detail, uint64_t amount);
const char *comm_collective_name(enum collective collective);
void comm_describe_call(char text[128], const struct call *call);

#endif
