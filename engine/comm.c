// Collectives: phases and the operations made of them, over any transport. See comm.h and comm_internal.h.
//
// all_reduce is two phases a piece (comm_reduce.h): everyone writes its groups for their owners; each owner adds them up
// and writes the encoded sum; everyone decodes the sums, the owner its own as well.
#include "engine/comm_internal.h"

#include "engine/comm_reduce.h"
#include "formats/checked.h"

#include <assert.h>
#include <stdio.h>
#include <string.h>

enum {
    TASK_GROUPS = 32,        // of an all_reduce, for one thread
    PARALLEL_VALUES = 32768, // from here on the pool is worth its wake-up
};

// ---- phases --------------------------------------------------------------------------------------------------------

// Of values in a codec, amid a step.
bool comm_sums_values(enum collective collective)
{
    return collective == ALL_REDUCE || collective == ALL_REDUCE_END || collective == ROWS_TO_OWNERS ||
           collective == ROWS_TO_ALL;
}

static void describe_difference(char text[192], const struct call *call)
{
    char where[128];
    comm_describe_call(where, call);
    bool reduce = comm_sums_values(call->collective);
    if (reduce)
        snprintf(text, 192, "%s, %llu values in %s", where, (unsigned long long)call->amount,
                 wire_name((enum wire)call->detail));
    else if (call->collective == BROADCAST)
        snprintf(text, 192, "%s, %llu bytes from rank %d", where, (unsigned long long)call->amount, call->detail);
    else
        snprintf(text, 192, "%s, %llu bytes", where, (unsigned long long)call->amount);
}

static bool calls_agree(const struct call *a, const struct call *b)
{
    bool reduce = comm_sums_values(a->collective);
    return a->collective == b->collective && a->detail == b->detail && a->amount == b->amount &&
           (!reduce || (a->op == b->op && a->layer == b->layer));
}

int comm_check_call(struct comm *comm, const struct call *mine, int rank, const struct call *theirs, struct error *err)
{
    if (calls_agree(mine, theirs))
        return 0;
    char own[192], other[192];
    struct error found;
    describe_difference(own, mine);
    describe_difference(other, theirs);
    error_set(&found, ERR_RANK, "the ranks do not take the same step: rank %d is at %s; rank %d is at %s",
              comm->first + comm->rank, own, comm->first + rank, other);
    return comm_raise(comm, err, &found);
}

static int check_calls(struct comm *comm, const struct call *call, struct error *err)
{
    int rc = 0;
    for (int rank = 0; rank < comm->size && !rc; rank++)
        rc = comm_check_call(comm, call, rank, &comm_slot(comm, rank)->calls[comm->group][comm->token % 2], err);
    return rc;
}

// Posts what this rank wrote to its buffer of phase token + 1. Afterwards comm->token is that phase.
static int post(struct comm *comm, const struct call *call, const struct comm_move *move, struct error *err)
{
    int rc = comm_check_abort(comm, err);
    if (rc)
        return rc;
    uint32_t token = ++comm->token;
    comm->slot->calls[comm->group][token % 2] = *call;
    atomic_store(&comm->slot->posted[comm->group], token);
    comm->transport->post(comm, move);
    return 0;
}

// Posts, and waits for the others.
int comm_phase(struct comm *comm, enum collective collective, int detail, uint64_t amount, const struct comm_move *move,
               struct error *err)
{
    struct call call = comm_call(comm, collective, detail, amount);
    int rc;
    if ((rc = post(comm, &call, move, err)) || (rc = comm_wait_for_all(comm, &call, err)))
        return rc;
    return check_calls(comm, &call, err);
}

int comm_barrier(struct comm *comm, struct error *err)
{
    return comm_phase(comm, BARRIER, 0, 0, &(struct comm_move){.pattern = MOVE_NOTHING}, err);
}

static int gather(struct comm *comm, enum collective collective, const void *mine, size_t bytes, struct error *err)
{
    if (bytes > COMM_GATHER_MAX_BYTES) {
        struct error found;
        error_set(&found, ERR_OTHER, "rank %d: %s of %zu bytes: at most %d", comm->first + comm->rank,
                  comm_collective_name(collective), bytes, COMM_GATHER_MAX_BYTES);
        return comm_raise(comm, err, &found);
    }
    memcpy(comm_buffer(comm, comm->rank, comm->token + 1), mine, bytes);
    return comm_phase(comm, collective, 0, bytes, &(struct comm_move){.pattern = MOVE_EVERYONE, .bytes = bytes}, err);
}

int comm_all_gather(struct comm *comm, void *all, const void *mine, size_t bytes, struct error *err)
{
    int rc = gather(comm, ALL_GATHER, mine, bytes, err);
    for (int rank = 0; rank < comm->size && !rc; rank++)
        memcpy((uint8_t *)all + (size_t)rank * bytes, comm_buffer(comm, rank, comm->token), bytes);
    return rc;
}

static int broadcast(struct comm *comm, void *data, size_t bytes, int root, bool idle, struct error *err)
{
    uint8_t none = 0, *at = bytes ? data : &none;
    do {
        size_t piece = bytes < comm->region->buffer_bytes ? bytes : comm->region->buffer_bytes;
        struct comm_move move = {.pattern = MOVE_ROOT, .root = root, .bytes = piece};
        struct call call = comm_call(comm, BROADCAST, comm->first + root, bytes);
        int rc;
        if (comm->rank == root)
            memcpy(comm_buffer(comm, root, comm->token + 1), at, piece);
        if ((rc = post(comm, &call, &move, err)))
            return rc;
        if (idle && comm->rank != root &&
            (rc = comm_wait_for(comm, &(struct comm_wait){.call = &call, .idle = true}, root, err)))
            return rc;
        if ((rc = comm_wait_for_all(comm, &call, err)) || (rc = check_calls(comm, &call, err)))
            return rc;
        if (comm->rank != root)
            memcpy(at, comm_buffer(comm, root, comm->token), piece);
        at += piece;
        bytes -= piece;
    } while (bytes);
    return 0;
}

int comm_broadcast(struct comm *comm, void *data, size_t bytes, int root, struct error *err)
{
    return broadcast(comm, data, bytes, root, false, err);
}

int comm_broadcast_idle(struct comm *comm, void *data, size_t bytes, int root, struct error *err)
{
    return broadcast(comm, data, bytes, root, true, err);
}

enum { HEX_BYTES = 16 };

static void to_hex(char hex[2 * HEX_BYTES + 1], const uint8_t *bytes, size_t count)
{
    hex[0] = 0;
    for (size_t i = 0; i < count && i < HEX_BYTES; i++)
        snprintf(hex + 2 * i, 3, "%02x", bytes[i]);
}

int comm_handshake(struct comm *comm, const void *contract, size_t bytes, const char *what, struct error *err)
{
    int rc = gather(comm, HANDSHAKE, contract, bytes, err);
    if (rc)
        return rc;
    const uint8_t *first = comm_buffer(comm, 0, comm->token);
    for (int rank = 1; rank < comm->size; rank++) {
        const uint8_t *other = comm_buffer(comm, rank, comm->token);
        size_t same = 0;
        while (same < bytes && first[same] == other[same])
            same++;
        if (same == bytes)
            continue;
        // A long contract is shown from the first byte that differs.
        size_t from = bytes <= HEX_BYTES ? 0 : same;
        char want[2 * HEX_BYTES + 1], found_hex[2 * HEX_BYTES + 1];
        to_hex(want, first + from, bytes - from);
        to_hex(found_hex, other + from, bytes - from);
        struct error found;
        error_set(&found, ERR_CORRUPT,
                  "%s differs between the ranks: rank %d has %s, rank %d has %s (from byte %zu of %zu)", what,
                  comm->first, want, comm->first + rank, found_hex, from, bytes);
        return comm_raise(comm, err, &found);
    }
    return 0;
}

// ---- all_reduce ----------------------------------------------------------------------------------------------------

typedef void piece_step(const struct reduce_piece *piece, uint64_t begin, uint64_t end);

struct piece_job {
    const struct reduce_piece *piece;
    piece_step *step;
};

static void run_piece_task(void *arg, int64_t task, int thread)
{
    (void)thread;
    const struct piece_job *job = arg;
    uint64_t begin = (uint64_t)task * TASK_GROUPS, end = begin + TASK_GROUPS;
    job->step(job->piece, begin, end < job->piece->count ? end : job->piece->count);
}

void comm_run_tasks(struct thread_pool *pool, uint64_t values, thread_pool_fn *fn, void *arg, int64_t tasks)
{
    if (pool && values >= PARALLEL_VALUES)
        thread_pool_run(pool, fn, arg, tasks);
    else
        for (int64_t task = 0; task < tasks; task++)
            fn(arg, task, 0);
}

static void run_on_piece(const struct reduce_piece *piece, piece_step *step, struct thread_pool *pool, uint64_t amount)
{
    struct piece_job job = {piece, step};
    comm_run_tasks(pool, amount, run_piece_task, &job, (int64_t)div_up(piece->count, TASK_GROUPS));
}

// What everyone has written in the last phase, and where this rank writes in the next one.
static void set_buffers(struct reduce_piece *piece, const struct comm *comm)
{
    for (int rank = 0; rank < comm->size; rank++)
        piece->from[rank] = comm_buffer(comm, rank, comm->token);
    piece->to = comm_buffer(comm, comm->rank, comm->token + 1);
}

int comm_all_reduce(struct comm *comm, float *data, int64_t rows, int64_t cols, int64_t stride, enum wire wire,
                    uint16_t *lost, struct thread_pool *pool, struct error *err)
{
    if (comm->size == 1)
        return comm_check_abort(comm, err);
    assert(rows >= 0 && cols >= 0 && cols <= stride);
    struct reduce_piece piece = {.data = data,
                                 .lost = lost,
                                 .cols = (uint64_t)cols,
                                 .stride = (uint64_t)stride,
                                 .groups_per_row = wire_groups((uint64_t)cols),
                                 .wire = wire,
                                 .rank = comm->rank,
                                 .tp_size = comm->size};
    uint64_t groups = (uint64_t)rows * piece.groups_per_row, amount = (uint64_t)rows * (uint64_t)cols;
    for (; piece.first < groups; piece.first += piece.count) {
        uint64_t left = groups - piece.first;
        piece.count = left < comm_piece_groups(comm) ? left : comm_piece_groups(comm);
        struct comm_move move = {.pattern = MOVE_TO_OWNERS,
                                 .first = piece.first,
                                 .count = piece.count,
                                 .groups_per_row = piece.groups_per_row,
                                 .group_bytes = wire_group_bytes(wire)};
        int rc;
        set_buffers(&piece, comm);
        run_on_piece(&piece, reduce_encode, pool, amount);
        if ((rc = comm_phase(comm, ALL_REDUCE, (int)wire, amount, &move, err)))
            return rc;
        set_buffers(&piece, comm);
        run_on_piece(&piece, reduce_add_up, pool, amount);
        move.pattern = MOVE_FROM_OWNERS;
        if ((rc = comm_phase(comm, ALL_REDUCE_END, (int)wire, amount, &move, err)))
            return rc;
        set_buffers(&piece, comm);
        run_on_piece(&piece, reduce_decode, pool, amount);
    }
    comm->sent_bytes += reduce_sent_bytes(groups, wire, comm->size);
    return 0;
}

// ---- sums in memory that all ranks read ------------------------------------------------------------------------

int comm_post_part(struct comm *comm, int64_t rows, int64_t cols, enum wire wire, uint32_t *part, struct error *err)
{
    int rc = comm_check_abort(comm, err);
    if (rc)
        return rc;
    *part = ++comm->parts;
    comm->slot->part_calls[*part % PARTS_UNDER_WAY] =
        comm_call(comm, ALL_REDUCE, (int)wire, (uint64_t)rows * (uint64_t)cols);
    atomic_store(&comm->slot->parts, *part);
    comm->transport->post(comm, &(struct comm_move){.pattern = MOVE_NOTHING});
    comm->sent_bytes += reduce_sent_bytes((uint64_t)rows * wire_groups((uint64_t)cols), wire, comm->size);
    return 0;
}

int comm_wait_parts(struct comm *comm, uint32_t part, struct error *err)
{
    const struct call *mine = &comm->slot->part_calls[part % PARTS_UNDER_WAY];
    int rc = comm_wait_for_parts(comm, mine, part, err);
    for (int rank = 0; rank < comm->size && !rc; rank++)
        rc = comm_check_call(comm, mine, rank, &comm_slot(comm, rank)->part_calls[part % PARTS_UNDER_WAY], err);
    return rc;
}

uint64_t comm_sent_bytes(const struct comm *comm) { return comm->sent_bytes; }

uint64_t comm_moved_bytes(const struct comm *comm) { return comm->moved_bytes; }
