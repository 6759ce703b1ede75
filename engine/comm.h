// Collectives between the ranks of one model, and messages between two of them, over a transport: shared memory on one host
// ("shm", comm_open), between processes or threads alike.
//
// The ranks are a grid: pp_size stages of tp_size ranks each; rank = stage * tp_size + its place in the stage. A rank has an
// end of two groups: the world, which comm_open gives, and its stage, comm_stage. Both have all collectives; those of one
// group say nothing of the other. In what follows, ranks and sizes are those of the group, and messages name ranks of the world.
//
// Law 4: every rank leaves with the same bits, the owner of a part included: what went over the wire defines the
// result. The summation order is the rank order. Group g of a row belongs to rank g % tp_size, so a row's bits do not
// depend on the rows beside it.
// Law 6: no wait without a deadline; a wait that fails names the missing rank, the operation and the layer, and raises
// the abort word, so that all other ranks leave their waits at once.
#ifndef TPSHARD_ENGINE_COMM_H
#define TPSHARD_ENGINE_COMM_H

#include "formats/error.h"
#include "kernels/thread_pool.h"
#include "kernels/wire.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { COMM_MAX_RANKS = 64, COMM_GATHER_MAX_BYTES = 65536 };

struct comm_region; // lives in memory that all ranks share; position independent
struct comm;        // one rank's end of a group

// What a rank is doing, for messages and the watchdog. Up to OP_HANDSHAKE a rank counts as starting.
enum comm_operation {
    OP_START = 0,
    OP_LOAD,
    OP_HANDSHAKE,
    OP_IDLE,
    OP_EMBED,
    OP_ATTENTION,
    OP_MLP,
    OP_HEAD,
    OP_SAMPLE,
    OP_HAND_OVER, // of the residual, from stage to stage
    OP_COUNT
};
const char *comm_operation_name(enum comm_operation op);

// Bytes of shared memory needed for pp_size stages of tp_size ranks, COMM_MAX_RANKS at most, and all_reduces of at most
// max_elems floats. Larger ones are cut into pieces, and so is what does not fit a cache: a large max_elems does not cost
// memory in proportion.
// message_bytes: of comm_send, so that two messages fit between each two ranks of different stages; 0: none are sent. Only
// what is used of that memory is ever touched.
uint64_t comm_region_bytes(int tp_size, int pp_size, uint64_t max_elems, uint64_t message_bytes);
// Initialises zeroed shared memory (alignment 4096).
struct comm_region *comm_region_init(void *memory, int tp_size, int pp_size, uint64_t max_elems,
                                     uint64_t message_bytes);
// Before comm_open: how long a wait bears with a rank that is still starting and makes no progress (unset: timeout_ms
// of comm_open).
void comm_region_set_start_timeout(struct comm_region *region, int timeout_ms);

// The world's end of a rank over shared memory. timeout_ms: deadline of each single wait. Time in which the waiter itself was
// stopped does not count; with more than one stage, nor does time in which the rank moves for which it waits in the end
// (another stage works longer than a layer). Success: caller owns *out.
int comm_open(struct comm **out, struct comm_region *region, int rank, int timeout_ms, struct error *err);
void comm_close(struct comm *comm); // of the world; its stage goes with it. Accepts NULL
// This rank's end of its stage; `comm` itself where there is one stage. Belongs to comm.
struct comm *comm_stage(struct comm *comm);
int comm_num_stages(const struct comm *comm);
int comm_rank(const struct comm *comm);
int comm_size(const struct comm *comm);
bool comm_is_local(const struct comm *comm); // the ranks share this host's memory: nothing is ever on its way

// Tells the others (and the watchdog) where this rank is; layer -1: none. Cheap: one relaxed store.
void comm_at(struct comm *comm, enum comm_operation op, int layer);
// Layers that comm_at is told count from this one of the model on: a stage numbers its own from 0. `comm`: the world's end; its stage's does so, too.
void comm_count_layers_from(struct comm *comm, int first_layer);

// The collectives below: all ranks call them in the same order with the same sizes. That is checked in every call;
// ranks that differ are named. For all_reduce the operation and layer of comm_at must agree as well. An error of one
// rank is the error of all. A comm belongs to one thread.

// All ranks compare `bytes` of contract (model, version, options); ERR_CORRUPT with both values in hex when they
// differ.
int comm_handshake(struct comm *comm, const void *contract, size_t bytes, const char *what, struct error *err);
int comm_barrier(struct comm *comm, struct error *err);
// data [rows][stride] f32, cols <= stride: sum over ranks, in place, coded for the wire. tp_size 1: untouched. pool may
// be NULL; it changes the speed of large messages and no bit.
// lost (NULL: no error feedback) bf16 [rows][cols], zeros before the first of a chain of messages: this rank's part of what
// the earlier ones lost on the wire, which this one makes up for; it becomes what is lost now. On all ranks or on none.
int comm_all_reduce(struct comm *comm, float *data, int64_t rows, int64_t cols, int64_t stride, enum wire wire,
                    uint16_t *lost, struct thread_pool *pool, struct error *err);
// A sum whose parts lie where all ranks can read them, over shared memory alone: post_part says that this rank's part, [rows][cols], is complete; when
// wait_parts returns, so are the others' of that number, and each rank adds up what it wants (wire_sum_group). A rank may post a second part before it
// waits for the first, not a third. So a part that another rank has posted two numbers later proves that it has done with the earlier ones' memory, as far
// as it reads them before it posts. Bits, order and checks are those of all_reduce; other collectives may stand between post and wait.
int comm_post_part(struct comm *comm, int64_t rows, int64_t cols, enum wire wire, uint32_t *part, struct error *err);
int comm_wait_parts(struct comm *comm, uint32_t part, struct error *err);
// Bytes that this rank has sent in all_reduces so far, as over links of its own.
uint64_t comm_sent_bytes(const struct comm *comm);
// Bytes that the transport has sent to others for this group's collectives so far, without what frames them; 0 over shared memory.
uint64_t comm_moved_bytes(const struct comm *comm);
// all [tp_size][bytes] receives everyone's `mine`. bytes <= COMM_GATHER_MAX_BYTES.
int comm_all_gather(struct comm *comm, void *all, const void *mine, size_t bytes, struct error *err);
int comm_broadcast(struct comm *comm, void *data, size_t bytes, int root, struct error *err);
// The same for the next command: ranks other than the root wait for the root without a deadline (not for each other). They
// end at an abort, and over a network when the root is lost.
int comm_broadcast_idle(struct comm *comm, void *data, size_t bytes, int root, struct error *err);

// ---- messages between two ranks of different stages ------------------------------------------------------------------
// `comm` is the world's end, ranks are the world's. The sender may be two messages of message_bytes ahead of the receiver: it
// copies and goes on. A longer message goes through in pieces, while both are there. Messages between two ranks arrive in
// order; a receiver that asks for other than `bytes` is told so and ends the run. The wait for a rank lasts as long as that
// rank, or the one it waits for in its turn, moves (comm_at, collectives, messages), and timeout_ms longer.
int comm_send(struct comm *comm, const void *data, size_t bytes, int to, struct error *err);
int comm_receive(struct comm *comm, void *data, size_t bytes, int from, struct error *err);

// ---- failure, seen from the outside (parent, watchdog) ---------------------------------------------------------
// Raises the abort word and wakes every waiter; the first caller's error (code, message, rank) is kept in the region.
void comm_region_abort(struct comm_region *region, int rank, const struct error *why);
bool comm_region_aborted(const struct comm_region *region);
// The kept error; false when there is none.
bool comm_region_error(const struct comm_region *region, int *rank, struct error *out);
// Where a rank is: operation, layer, how often it has moved (a watchdog compares two readings), whom it waits for (-1:
// nobody).
struct comm_position {
    enum comm_operation op;
    int layer;
    uint64_t progress;
    int waits_for;
};
struct comm_position comm_region_position(const struct comm_region *region, int rank);
// The rank for which `rank` waits in the end, through all that wait themselves; `rank` where it waits for nobody or they wait
// for each other.
int comm_region_cause(const struct comm_region *region, int rank);
// "attention of layer 2", "load"
enum { COMM_PLACE_BYTES = 48 };
void comm_place(char place[COMM_PLACE_BYTES], enum comm_operation op, int layer);

#endif
