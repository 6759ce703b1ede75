// Collectives over shared memory: the phases and waits, and the operations made of them. See comm.h.
//
// One primitive carries all: a phase. In phase t a rank writes its own buffer t % 2, posts t, waits until every rank
// has posted t or more, and then reads what the others wrote. It writes that buffer again in phase t + 2, which it
// enters only after all have posted t + 1, hence have read what they wanted of phase t. Tokens t are 32-bit counters
// compared modulo 2^32.
//
// all_reduce is two phases a piece (comm_reduce.h): everyone writes its groups for their owners; each owner adds them up
// and writes the encoded sum; everyone decodes the sums, the owner its own as well.
//
// Waking: a waiter that goes to sleep publishes whom it waits for and sleeps on its bell; that rank rings it after
// posting. Both sides use sequentially consistent accesses, so one of the two sees the other. The abort word rings all
// bells.
#include "engine/comm.h"

#include "engine/comm_reduce.h"
#include "formats/checked.h"
#include "kernels/futex.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    CACHE_LINE = 64,
    PAGE_BYTES = 4096,
    PIECE_GROUPS = 1024,     // of an all_reduce at once: 256 KiB of bf16 from each rank stay in the near caches
    TASK_GROUPS = 32,        // of an all_reduce, for one thread
    PARALLEL_ELEMS = 32768,  // from here on the pool is worth its wake-up
    SLICE_NS = 50 * 1000000, // longest sleep between two looks at the clock
    FIRST_TOKEN = -16,       // the wrap to 0 belongs to every run
    ABORT_NONE = 0,
    ABORT_RAISED = 1, // the error is being written
    ABORT_TOLD = 2,   // and can be read
};

enum collective { ALL_REDUCE, ALL_REDUCE_END, ALL_GATHER, BROADCAST, BARRIER, HANDSHAKE };
static const char *const collective_names[] = {"all_reduce", "all_reduce", "all_gather",
                                               "broadcast",  "barrier",    "handshake"};

// What a rank takes its phase for; all ranks must agree.
struct call {
    enum collective collective;
    int detail;      // wire of an all_reduce, root of a broadcast
    uint64_t amount; // floats of an all_reduce, bytes else
    enum comm_operation op;
    int layer;
};

struct rank_slot {
    _Alignas(CACHE_LINE) _Atomic uint32_t posted;
    struct call calls[2]; // of phase t in t % 2; published by posted
    _Alignas(CACHE_LINE) _Atomic uint32_t bell;
    _Atomic int32_t waits_for; // rank, or -1
    _Alignas(CACHE_LINE) _Atomic uint64_t position;
};

struct comm_region {
    int tp_size;
    int start_timeout_ms;
    uint64_t piece_groups, buffer_bytes, buffers_offset;
    _Alignas(CACHE_LINE) _Atomic uint32_t abort;
    int error_rank;
    struct error error;
    struct rank_slot slots[];
};

struct comm {
    struct comm_region *region;
    struct rank_slot *slot; // of this rank
    int rank, tp_size, timeout_ms;
    uint32_t token;      // last phase posted
    uint64_t sent_bytes; // of all_reduces
    struct spinner spinner;
};

static uint8_t *buffer(const struct comm *comm, int rank, uint32_t token)
{
    struct comm_region *region = comm->region;
    return (uint8_t *)region + region->buffers_offset + ((uint64_t)rank * 2 + token % 2) * region->buffer_bytes;
}

// ---- the region ----------------------------------------------------------------------------------------------------

static uint64_t piece_groups(uint64_t max_elems)
{
    uint64_t groups = wire_groups(max_elems);
    return groups > PIECE_GROUPS ? PIECE_GROUPS : groups ? groups : 1;
}

static uint64_t buffer_bytes(uint64_t max_elems)
{
    uint64_t bytes = piece_groups(max_elems) * WIRE_MAX_GROUP_BYTES;
    return round_up(bytes > COMM_GATHER_MAX_BYTES ? bytes : COMM_GATHER_MAX_BYTES, PAGE_BYTES);
}

static uint64_t buffers_offset(int tp_size)
{
    return round_up(sizeof(struct comm_region) + (uint64_t)tp_size * sizeof(struct rank_slot), PAGE_BYTES);
}

uint64_t comm_region_bytes(int tp_size, uint64_t max_elems)
{
    assert(tp_size >= 1 && tp_size <= COMM_MAX_RANKS);
    return buffers_offset(tp_size) + 2 * (uint64_t)tp_size * buffer_bytes(max_elems);
}

struct comm_region *comm_region_init(void *memory, int tp_size, uint64_t max_elems)
{
    struct comm_region *region = memory;
    region->tp_size = tp_size;
    region->piece_groups = piece_groups(max_elems);
    region->buffer_bytes = buffer_bytes(max_elems);
    region->buffers_offset = buffers_offset(tp_size);
    for (int rank = 0; rank < tp_size; rank++) {
        atomic_init(&region->slots[rank].posted, (uint32_t)FIRST_TOKEN);
        atomic_init(&region->slots[rank].waits_for, -1);
    }
    return region;
}

void comm_region_set_start_timeout(struct comm_region *region, int timeout_ms)
{
    region->start_timeout_ms = timeout_ms;
}

static void ring(struct rank_slot *slot)
{
    atomic_fetch_add(&slot->bell, 1);
    futex_wake(&slot->bell, 1);
}

void comm_region_abort(struct comm_region *region, int rank, const struct error *why)
{
    uint32_t none = ABORT_NONE;
    if (atomic_compare_exchange_strong(&region->abort, &none, ABORT_RAISED)) {
        region->error_rank = rank;
        region->error = *why;
        atomic_store(&region->abort, ABORT_TOLD);
    }
    for (int i = 0; i < region->tp_size; i++)
        ring(&region->slots[i]);
}

bool comm_region_aborted(const struct comm_region *region) { return atomic_load(&region->abort) != ABORT_NONE; }

bool comm_region_error(const struct comm_region *region, int *rank, struct error *out)
{
    if (atomic_load(&region->abort) != ABORT_TOLD)
        return false;
    *rank = region->error_rank;
    *out = region->error;
    return true;
}

// ---- positions -----------------------------------------------------------------------------------------------------

const char *comm_operation_name(enum comm_operation op)
{
    static const char *const names[OP_COUNT] = {"start",     "load", "handshake", "idle",  "embedding",
                                                "attention", "mlp",  "head",      "sample"};
    return (unsigned)op < OP_COUNT ? names[op] : "unknown";
}

void comm_place(char place[COMM_PLACE_BYTES], enum comm_operation op, int layer)
{
    if (layer < 0)
        snprintf(place, COMM_PLACE_BYTES, "%s", comm_operation_name(op));
    else
        snprintf(place, COMM_PLACE_BYTES, "%s of layer %d", comm_operation_name(op), layer);
}

// position: moves (32 bits), layer + 1 (24), operation (8). Written by its rank alone.
static struct comm_position unpack_position(uint64_t bits)
{
    return (struct comm_position){
        .op = (enum comm_operation)(bits & 0xff), .layer = (int)(bits >> 8 & 0xffffff) - 1, .progress = bits >> 32};
}

void comm_at(struct comm *comm, enum comm_operation op, int layer)
{
    uint64_t moves = (atomic_load_explicit(&comm->slot->position, memory_order_relaxed) >> 32) + 1;
    uint64_t bits = moves << 32 | (uint64_t)((uint32_t)(layer + 1) & 0xffffff) << 8 | (uint64_t)op;
    atomic_store_explicit(&comm->slot->position, bits, memory_order_relaxed);
}

struct comm_position comm_region_position(const struct comm_region *region, int rank)
{
    const struct rank_slot *slot = &region->slots[rank];
    struct comm_position position = unpack_position(atomic_load_explicit(&slot->position, memory_order_relaxed));
    position.progress += atomic_load_explicit(&slot->posted, memory_order_relaxed) - (uint32_t)FIRST_TOKEN;
    position.waits_for = atomic_load_explicit(&slot->waits_for, memory_order_relaxed);
    return position;
}

// ---- one rank's end ------------------------------------------------------------------------------------------------

int comm_open(struct comm **out, struct comm_region *region, int rank, int timeout_ms, struct error *err)
{
    if (rank < 0 || rank >= region->tp_size || timeout_ms <= 0)
        return error_set(err, ERR_USAGE,
                         "rank %d of %d with a deadline of %d ms: wanted a rank below %d and a deadline above 0", rank,
                         region->tp_size, timeout_ms, region->tp_size);
    struct comm *comm = calloc(1, sizeof *comm);
    if (!comm)
        return error_set(err, ERR_MEMORY, "rank %d: out of memory", rank);
    comm->region = region;
    comm->slot = &region->slots[rank];
    comm->rank = rank;
    comm->tp_size = region->tp_size;
    comm->timeout_ms = timeout_ms;
    comm->token = atomic_load_explicit(&comm->slot->posted, memory_order_relaxed);
    spinner_init(&comm->spinner);
    *out = comm;
    return 0;
}

void comm_close(struct comm *comm) { free(comm); }

int comm_rank(const struct comm *comm) { return comm->rank; }

int comm_size(const struct comm *comm) { return comm->tp_size; }

static int check_abort(struct comm *comm, struct error *err)
{
    if (atomic_load_explicit(&comm->region->abort, memory_order_acquire) == ABORT_NONE)
        return 0;
    struct error kept;
    int rank;
    // Whoever is writing the error needs a moment, unless it died over it.
    for (int tries = 0; !comm_region_error(comm->region, &rank, &kept); tries++) {
        if (tries == 100)
            return error_set(err, ERR_RANK, "rank %d was stopped after an error elsewhere", comm->rank);
        usleep(100);
    }
    if (err)
        *err = kept;
    return kept.code;
}

// Ends the run with an error that was found here, unless one came first: that one counts on every rank.
static int raise_error(struct comm *comm, struct error *err, const struct error *found)
{
    comm_region_abort(comm->region, comm->rank, found);
    return check_abort(comm, err);
}

// ---- waiting -------------------------------------------------------------------------------------------------------

static bool has_posted(const struct comm *comm, int rank, uint32_t token)
{
    return (int32_t)(atomic_load(&comm->region->slots[rank].posted) - token) >= 0;
}

static void describe_call(char text[128], const struct call *call)
{
    if (call->layer >= 0)
        snprintf(text, 128, "%s of layer %d (%s)", collective_names[call->collective], call->layer,
                 comm_operation_name(call->op));
    else
        snprintf(text, 128, "%s (%s)", collective_names[call->collective], comm_operation_name(call->op));
}

// Among the ranks that have not posted, one that itself waits for nobody is the cause.
static int missing_rank(const struct comm *comm, uint32_t token, int missing)
{
    for (int rank = 0; rank < comm->tp_size; rank++)
        if (!has_posted(comm, rank, token) && atomic_load(&comm->region->slots[rank].waits_for) < 0)
            return rank;
    return missing;
}

static int report_missing(struct comm *comm, const struct call *call, int missing, int timeout_ms, struct error *err)
{
    char what[128], place[COMM_PLACE_BYTES];
    missing = missing_rank(comm, comm->token, missing);
    struct comm_position position = comm_region_position(comm->region, missing);
    describe_call(what, call);
    comm_place(place, position.op, position.layer);
    struct error found;
    error_set(&found, ERR_RANK, "rank %d did not %s %s within %.1f s; rank %d waited; rank %d was last seen in %s",
              missing, call->collective == ALL_REDUCE_END ? "finish" : "reach", what, timeout_ms / 1000.0, comm->rank,
              missing, place);
    comm_region_abort(comm->region, missing, &found); // it is that one's error
    return check_abort(comm, err);
}

// Sleeps until `rank` has posted the token, with a deadline. Each sleep counts for at most twice its planned length, so
// that a group of processes that was stopped and continued as a whole goes on.
static int sleep_for(struct comm *comm, const struct call *call, int rank, int64_t *waited_ns, struct error *err)
{
    struct rank_slot *slot = comm->slot;
    uint64_t progress = comm_region_position(comm->region, rank).progress;
    int rc = 0;
    for (;;) {
        uint32_t bell = atomic_load(&slot->bell);
        atomic_store(&slot->waits_for, rank);
        if (has_posted(comm, rank, comm->token) || (rc = check_abort(comm, err)))
            break;
        struct comm_position position = comm_region_position(comm->region, rank);
        bool starting = position.op <= OP_HANDSHAKE && comm->region->start_timeout_ms > 0;
        if (starting && position.progress != progress)
            *waited_ns = 0;
        progress = position.progress;
        int timeout_ms = starting ? comm->region->start_timeout_ms : comm->timeout_ms;
        int64_t left_ns = (int64_t)timeout_ms * 1000000 - *waited_ns;
        if (left_ns <= 0) {
            rc = report_missing(comm, call, rank, timeout_ms, err);
            break;
        }
        int64_t slice_ns = left_ns < SLICE_NS ? left_ns : SLICE_NS, before_ns = clock_now_ns();
        futex_wait(&slot->bell, bell, slice_ns);
        int64_t slept_ns = clock_now_ns() - before_ns;
        *waited_ns += slept_ns < 2 * slice_ns ? slept_ns : 2 * slice_ns;
    }
    atomic_store(&slot->waits_for, -1);
    return rc;
}

static int wait_for_all(struct comm *comm, const struct call *call, struct error *err)
{
    struct spin spin = spin_begin(&comm->spinner);
    int64_t waited_ns = 0;
    bool slept = false;
    for (int rank = 0; rank < comm->tp_size; rank++) {
        while (!slept && !has_posted(comm, rank, comm->token)) {
            int rc = check_abort(comm, err);
            if (rc)
                return rc;
            slept = !spin_again(&spin);
        }
        int rc = slept ? sleep_for(comm, call, rank, &waited_ns, err) : 0;
        if (rc)
            return rc;
    }
    if (spin.rounds)
        spinner_learn(&comm->spinner, !slept);
    return 0;
}

// ---- phases --------------------------------------------------------------------------------------------------------

static void describe_difference(char text[192], const struct call *call)
{
    char where[128];
    describe_call(where, call);
    bool reduce = call->collective == ALL_REDUCE || call->collective == ALL_REDUCE_END;
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
    bool reduce = a->collective == ALL_REDUCE || a->collective == ALL_REDUCE_END;
    return a->collective == b->collective && a->detail == b->detail && a->amount == b->amount &&
           (!reduce || (a->op == b->op && a->layer == b->layer));
}

// Posts what this rank wrote to its buffer of phase token + 1 and waits for the others. Afterwards comm->token is that
// phase.
static int phase(struct comm *comm, enum collective collective, int detail, uint64_t amount, struct error *err)
{
    struct comm_region *region = comm->region;
    struct comm_position at = unpack_position(atomic_load_explicit(&comm->slot->position, memory_order_relaxed));
    struct call call = {collective, detail, amount, at.op, at.layer};
    int rc = check_abort(comm, err);
    if (rc)
        return rc;
    uint32_t token = ++comm->token;
    comm->slot->calls[token % 2] = call;
    atomic_store(&comm->slot->posted, token);
    for (int rank = 0; rank < comm->tp_size; rank++)
        if (atomic_load(&region->slots[rank].waits_for) == comm->rank)
            ring(&region->slots[rank]);
    if ((rc = wait_for_all(comm, &call, err)))
        return rc;
    for (int rank = 0; rank < comm->tp_size; rank++) {
        const struct call *other = &region->slots[rank].calls[token % 2];
        if (calls_agree(&call, other))
            continue;
        char mine[192], theirs[192];
        struct error found;
        describe_difference(mine, &call);
        describe_difference(theirs, other);
        error_set(&found, ERR_RANK, "the ranks do not take the same step: rank %d is at %s; rank %d is at %s",
                  comm->rank, mine, rank, theirs);
        return raise_error(comm, err, &found);
    }
    return 0;
}

int comm_barrier(struct comm *comm, struct error *err) { return phase(comm, BARRIER, 0, 0, err); }

static int gather(struct comm *comm, enum collective collective, const void *mine, size_t bytes, struct error *err)
{
    if (bytes > COMM_GATHER_MAX_BYTES) {
        struct error found;
        error_set(&found, ERR_OTHER, "rank %d: %s of %zu bytes: at most %d", comm->rank, collective_names[collective],
                  bytes, COMM_GATHER_MAX_BYTES);
        return raise_error(comm, err, &found);
    }
    memcpy(buffer(comm, comm->rank, comm->token + 1), mine, bytes);
    return phase(comm, collective, 0, bytes, err);
}

int comm_all_gather(struct comm *comm, void *all, const void *mine, size_t bytes, struct error *err)
{
    int rc = gather(comm, ALL_GATHER, mine, bytes, err);
    for (int rank = 0; rank < comm->tp_size && !rc; rank++)
        memcpy((uint8_t *)all + (size_t)rank * bytes, buffer(comm, rank, comm->token), bytes);
    return rc;
}

int comm_broadcast(struct comm *comm, void *data, size_t bytes, int root, struct error *err)
{
    uint8_t *at = data;
    do {
        size_t piece = bytes < comm->region->buffer_bytes ? bytes : comm->region->buffer_bytes;
        if (comm->rank == root)
            memcpy(buffer(comm, root, comm->token + 1), at, piece);
        int rc = phase(comm, BROADCAST, root, bytes, err);
        if (rc)
            return rc;
        if (comm->rank != root)
            memcpy(at, buffer(comm, root, comm->token), piece);
        at += piece;
        bytes -= piece;
    } while (bytes);
    return 0;
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
    const uint8_t *first = buffer(comm, 0, comm->token);
    for (int rank = 1; rank < comm->tp_size; rank++) {
        const uint8_t *other = buffer(comm, rank, comm->token);
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
                  "%s differs between the ranks: rank 0 has %s, rank %d has %s (from byte %zu of %zu)", what, want,
                  rank, found_hex, from, bytes);
        return raise_error(comm, err, &found);
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

static void run_step(const struct reduce_piece *piece, piece_step *step, struct thread_pool *pool)
{
    struct piece_job job = {piece, step};
    if (pool)
        thread_pool_run(pool, run_piece_task, &job, (int64_t)div_up(piece->count, TASK_GROUPS));
    else
        step(piece, 0, piece->count);
}

// What everyone has written in the last phase, and where this rank writes in the next one.
static void set_buffers(struct reduce_piece *piece, const struct comm *comm)
{
    for (int rank = 0; rank < comm->tp_size; rank++)
        piece->from[rank] = buffer(comm, rank, comm->token);
    piece->to = buffer(comm, comm->rank, comm->token + 1);
}

int comm_all_reduce(struct comm *comm, float *data, int64_t rows, int64_t cols, int64_t stride, enum wire wire,
                    uint16_t *lost, struct thread_pool *pool, struct error *err)
{
    if (comm->tp_size == 1)
        return check_abort(comm, err);
    assert(rows >= 0 && cols >= 0 && cols <= stride);
    struct reduce_piece piece = {.data = data,
                                 .lost = lost,
                                 .cols = (uint64_t)cols,
                                 .stride = (uint64_t)stride,
                                 .groups_per_row = wire_groups((uint64_t)cols),
                                 .wire = wire,
                                 .rank = comm->rank,
                                 .tp_size = comm->tp_size};
    uint64_t groups = (uint64_t)rows * piece.groups_per_row, amount = (uint64_t)rows * (uint64_t)cols;
    if (amount < PARALLEL_ELEMS)
        pool = NULL;
    for (; piece.first < groups; piece.first += piece.count) {
        uint64_t left = groups - piece.first;
        piece.count = left < comm->region->piece_groups ? left : comm->region->piece_groups;
        int rc;
        set_buffers(&piece, comm);
        run_step(&piece, reduce_encode, pool);
        if ((rc = phase(comm, ALL_REDUCE, (int)wire, amount, err)))
            return rc;
        set_buffers(&piece, comm);
        run_step(&piece, reduce_add_up, pool);
        if ((rc = phase(comm, ALL_REDUCE_END, (int)wire, amount, err)))
            return rc;
        set_buffers(&piece, comm);
        run_step(&piece, reduce_decode, pool);
    }
    // The parts of the others go to their owners, and the own result to each of them: 2 (n - 1) / n of the message.
    comm->sent_bytes += groups * wire_group_bytes(wire) * 2 * (uint64_t)(comm->tp_size - 1) / (uint64_t)comm->tp_size;
    return 0;
}

uint64_t comm_sent_bytes(const struct comm *comm) { return comm->sent_bytes; }
