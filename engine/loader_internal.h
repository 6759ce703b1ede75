// What the loader's files share.
//
//   loader.c        threads, order, waiting
//   loader_piece.c  one piece of the payload: read, verified, decoded, copied
//   loader_path.c   how the bytes come: what lies in the page cache, what works here
//   loader_uring.c, loader_guard.c  have headers of their own
#ifndef TPSHARD_ENGINE_LOADER_INTERNAL_H
#define TPSHARD_ENGINE_LOADER_INTERNAL_H

#include "engine/loader.h"
#include "engine/loader_guard.h"
#include "engine/loader_uring.h"

#include <pthread.h>

enum {
    PIECE_LEAVES = 8,     // of one piece, at most
    LANE_SLOTS = 4,       // pieces of a lane with a ring: those whose reads are in flight, and those verified meanwhile
    READ_BYTES = 1 << 20, // of one read: enough for any disk, little enough to be verified out of the cache
    READS_AHEAD = 4,      // of a lane's: with fewer in flight it turns to one more piece
    DIRECT_ALIGN = 4096,  // of offsets, sizes and addresses past the page cache
};
_Static_assert(PIECE_LEAVES *SHARD_LEAF_BYTES <= LOAD_BUFFER_BYTES, "a piece is copied to a device in one go");
_Static_assert(PIECE_LEAVES / LANE_SLOTS + 2 <= RING_READS / LANE_SLOTS, "a slot's reads, with what rounding adds");

struct piece {
    uint64_t index;
    uint64_t first_leaf, end_leaf;
    uint64_t offset, bytes; // of the payload
    uint64_t begin, end;    // stored, from the payload's start
};

// Where the stored bytes of a piece land.
struct landing {
    uint8_t *bytes;
    uint64_t begin, end; // of the stored bytes; past the page cache they are rounded to its alignment
    uint64_t landed;     // begin <= landed <= end: up to here they are there
    unsigned first_read; // of the ring's
};

// A piece under way.
struct visit {
    struct piece piece;
    struct landing landing;
    uint8_t *payload; // where its payload bytes will lie
};

// A thread and what it brings pieces with.
struct lane {
    struct loader *loader;
    int index;
    pthread_t thread;
    uint8_t *
        stored; // stored_capacity bytes, aligned to pages: bytes as they lie in the file, where they do not land in their place
    uint64_t stored_capacity;
    uint8_t *buffer; // the device's
    struct leaf_scratch *scratch;
    struct loader_ring *ring;
    struct visit visits[LANE_SLOTS];
    bool goes_by_pages;        // reads through the page cache do; then, of the stored bytes:
    uint64_t asked, piece_end; // what the kernel was told to read ahead, and where that ends
    atomic_llong read_bytes, read_ns, verify_ns, decode_ns, copy_ns, cpu_ns, fetched_again;
};

enum piece_state { PIECE_WAITS, PIECE_IS_TAKEN, PIECE_IS_THERE };

struct loader {
    struct loader_options options;
    enum load_path path;
    char why[160];
    int fd, direct_fd;  // -1: the source is remote; reads go through the page cache
    const uint8_t *map; // the payload in the mapped file, where the kernels use it so; NULL: it is copied
    struct loader_guard *guard;
    struct load_target target;
    bool begun; // on the device
    bool compressed;
    bool waits;            // as far as is known: much of the file has to come from the disk
    atomic_bool refetches; // a cached file was damaged: some of it comes from where it was fetched
    uint64_t payload_offset, piece_leaves, piece_count;

    int threads; // started
    bool joined;
    struct lane *lanes;
    int64_t started_ns;
    _Atomic int64_t ended_ns;
    atomic_bool stop, failed;
    atomic_int running;
    atomic_ullong there;    // pieces
    atomic_llong moved;     // bytes that have arrived: somebody who waits looks whether it grows
    _Atomic uint8_t *state; // [piece_count], enum piece_state; becomes PIECE_IS_THERE (release) when all can be used

    pthread_mutex_t lock; // of the following
    pthread_cond_t changed;
    uint64_t next, taken; // where the next thread looks for a piece; pieces that are no longer waiting
    struct error error;   // the first
    struct error unable;  // why a lane could not begin; counts when none could
    long long seen_bytes; // of one who waits: what had arrived at the last look, and since when
    int64_t seen_ns;
};

// ---- loader_path.c
// Sets path, why, waits and direct_fd; and, where the kernels shall use the mapped file, map and guard. may_map: they could.
void loader_choose_path(struct loader *loader, bool may_map);

// Pieces that a lane has room for.
static inline int loader_slots(const struct loader *loader) { return loader->path == LOAD_URING ? LANE_SLOTS : 1; }

// ---- loader_piece.c
// What a lane needs; on its own thread. lane_close also when that failed.
int lane_open(struct lane *lane, struct error *err);
void lane_close(struct lane *lane);
// Turns to a piece: with a ring, its reads are under way from now on. Lanes without one have slot 0 alone.
void lane_visit(struct lane *lane, int slot, uint64_t piece);
// With a ring: waits for the first read of a piece, and takes note of all that has come.
void lane_await(struct lane *lane, int slot);
// Shall it turn to one more piece?
bool lane_may_read_ahead(const struct lane *lane);
// 0: the piece is there. Ends early, with 0 as well, when the loader is to stop.
int lane_bring(struct lane *lane, int slot, struct error *err);

#endif
