// One rank's end: opening, and waiting for others with a deadline. See comm.h.
//
// Waking: a waiter that goes to sleep publishes whom it waits for and sleeps on its bell; that rank rings it after posting.
// Both sides use sequentially consistent accesses, so one of the two sees the other. The abort word rings all bells. Over a
// network what comes in wakes.
#include "engine/comm_internal.h"

#include <stdio.h>
#include <stdlib.h>

enum { SLICE_NS = 50 * 1000000 }; // longest sleep between two looks at the clock

// ---- one rank's end ------------------------------------------------------------------------------------------------

static void init_end(struct comm *comm, enum comm_group group, int first, int size, int rank, int timeout_ms)
{
    comm->group = group;
    comm->first = first;
    comm->size = size;
    comm->rank = rank - first;
    comm->slot = &comm->region->slots[rank];
    comm->timeout_ms = timeout_ms;
    comm->token = atomic_load_explicit(&comm->slot->posted[group], memory_order_relaxed);
    comm->parts = atomic_load_explicit(&comm->slot->parts, memory_order_relaxed);
    spinner_init(&comm->spinner);
}

int comm_open_over(struct comm **out, const struct comm_transport *transport, void *link, struct comm_region *region,
                   int rank, int timeout_ms, struct error *err)
{
    int rc;
    bool staged = region->pp_size > 1;
    struct comm *comm = calloc(1, sizeof *comm), *stage = staged ? calloc(1, sizeof *stage) : comm;
    struct comm closing = {.transport = transport, .link = link, .region = region};
    if (rank < 0 || rank >= region->world_size || timeout_ms <= 0) {
        rc = error_set(err, ERR_USAGE,
                       "rank %d of %d with a deadline of %d ms: wanted a rank below %d and a deadline above 0", rank,
                       region->world_size, timeout_ms, region->world_size);
        goto fail;
    }
    if (!comm || !stage) {
        rc = error_set(err, ERR_MEMORY, "rank %d: out of memory", rank);
        goto fail;
    }
    *comm = closing;
    comm->stage = stage;
    init_end(comm, GROUP_WORLD, 0, region->world_size, rank, timeout_ms);
    if (staged) {
        *stage = closing;
        stage->stage = stage;
        init_end(stage, GROUP_STAGE, rank / region->tp_size * region->tp_size, region->tp_size, rank, timeout_ms);
    }
    *out = comm;
    return 0;
fail:
    if (transport->close)
        transport->close(&closing);
    if (staged)
        free(stage);
    free(comm);
    return rc;
}

void comm_close(struct comm *comm)
{
    if (!comm)
        return;
    if (comm->transport->close)
        comm->transport->close(comm);
    if (comm->stage != comm)
        free(comm->stage);
    free(comm);
}

struct comm *comm_stage(struct comm *comm) { return comm->stage; }

uint64_t comm_piece_groups(const struct comm *comm)
{
    uint64_t held = comm->region->piece_groups, most = comm->transport->piece_groups;
    return held < most ? held : most;
}

int comm_num_stages(const struct comm *comm) { return comm->region->pp_size; }

int comm_rank(const struct comm *comm) { return comm->rank; }

int comm_size(const struct comm *comm) { return comm->size; }
bool comm_is_local(const struct comm *comm) { return !comm->transport->look; }

void comm_at(struct comm *comm, enum comm_operation op, int layer)
{
    uint64_t moves = (atomic_load_explicit(&comm->slot->position, memory_order_relaxed) >> 32) + 1;
    uint32_t place = layer < 0 ? 0 : (uint32_t)(comm->first_layer + layer + 1);
    uint64_t bits = moves << 32 | (uint64_t)(place & 0xffffff) << 8 | (uint64_t)op;
    atomic_store_explicit(&comm->slot->position, bits, memory_order_relaxed);
}

void comm_count_layers_from(struct comm *comm, int first_layer)
{
    comm->first_layer = comm->stage->first_layer = first_layer;
}

int comm_check_abort(struct comm *comm, struct error *err)
{
    if (atomic_load_explicit(&comm->region->abort, memory_order_acquire) == ABORT_NONE)
        return 0;
    struct error kept;
    int rank;
    // Whoever is writing the error needs a moment, unless it died over it.
    for (int tries = 0; !comm_region_error(comm->region, &rank, &kept); tries++) {
        if (tries == 100)
            return error_set(err, ERR_RANK, "rank %d was stopped after an error elsewhere", comm->first + comm->rank);
        usleep(100);
    }
    if (err)
        *err = kept;
    return kept.code;
}

int comm_raise(struct comm *comm, struct error *err, const struct error *found)
{
    comm_region_abort(comm->region, comm->first + comm->rank, found);
    return comm_check_abort(comm, err);
}

// ---- what a rank waits for -------------------------------------------------------------------------------------------

static const char *const collective_names[] = {"all_reduce", "all_reduce", "reduce_scatter", "all_gather of rows",
                                               "all_gather", "broadcast",  "barrier",        "handshake",
                                               "send",       "receive"};

const char *comm_collective_name(enum collective collective) { return collective_names[collective]; }

struct call comm_call(const struct comm *comm, enum collective collective, int detail, uint64_t amount)
{
    struct comm_position at = comm_unpack_position(atomic_load_explicit(&comm->slot->position, memory_order_relaxed));
    return (struct call){collective, detail, amount, at.op, at.layer};
}

void comm_describe_call(char text[128], const struct call *call)
{
    if (call->layer >= 0)
        snprintf(text, 128, "%s of layer %d (%s)", collective_names[call->collective], call->layer,
                 comm_operation_name(call->op));
    else
        snprintf(text, 128, "%s (%s)", collective_names[call->collective], comm_operation_name(call->op));
}

static bool has_posted(const struct comm *comm, const struct comm_wait *wait, int rank)
{
    const struct rank_slot *slot = comm_slot(comm, rank);
    if (wait->for_part)
        return (int32_t)(atomic_load(&slot->parts) - wait->part) >= 0;
    return (int32_t)(atomic_load(&slot->posted[comm->group]) - comm->token) >= 0;
}

// rank in the group
static bool is_over(const struct comm *comm, const struct comm_wait *wait, int rank)
{
    return wait->counter ? atomic_load(wait->counter) >= wait->reach : has_posted(comm, wait, rank);
}

// ---- who is missing ----------------------------------------------------------------------------------------------------

// What the rank has not done, for which this one waited. Ranks are the world's.
static void describe_missing(char text[256], const struct comm *comm, const struct comm_wait *wait, int rank)
{
    char what[128], place[COMM_PLACE_BYTES];
    const struct call *call = wait->call;
    comm_place(place, call->op, call->layer);
    comm_describe_call(what, call);
    if (call->collective == SEND)
        snprintf(text, 256, "rank %d did not take what rank %d sent it (%s)", rank, comm->first + comm->rank, place);
    else if (call->collective == RECEIVE)
        snprintf(text, 256, "rank %d did not send rank %d what it waits for (%s)", rank, comm->first + comm->rank,
                 place);
    else
        snprintf(text, 256, "rank %d did not %s %s", rank, call->collective == ALL_REDUCE_END ? "finish" : "reach",
                 what);
}

// Among the ranks that are waited for, one that itself waits for nobody is the cause; or the one for which they wait in
// another stage. In the world.
static int missing_rank(const struct comm *comm, const struct comm_wait *wait, int missing, int *cause)
{
    *cause = comm->first + missing;
    for (int rank = 0; rank < comm->size && !wait->counter; rank++)
        if (!has_posted(comm, wait, rank) && comm_region_waits_for(comm->region, comm->first + rank) < 0) {
            *cause = comm->first + rank;
            return *cause;
        }
    int end = comm_region_cause(comm->region, *cause);
    bool in_group = end >= comm->first && end < comm->first + comm->size;
    if (!wait->counter && in_group && has_posted(comm, wait, end - comm->first))
        return *cause; // it waits for this rank's group, which waits for it
    *cause = end;
    return comm->first + missing;
}

static int report_missing(struct comm *comm, const struct comm_wait *wait, int rank, int timeout_ms, struct error *err)
{
    char what[256], place[COMM_PLACE_BYTES];
    int cause, missing = missing_rank(comm, wait, rank, &cause), next = comm_region_waits_for(comm->region, missing);
    if (next < 0) // it has just begun to move
        cause = missing;
    struct comm_position position = comm_region_position(comm->region, cause);
    comm_place(place, position.op, position.layer);
    describe_missing(what, comm, wait, missing);
    struct error found;
    char through[48] = "";
    if (next >= 0 && next != cause)
        snprintf(through, sizeof through, "rank %d, and in the end for ", next);
    if (cause == missing)
        error_set(&found, ERR_RANK, "%s within %.1f s; rank %d waited; rank %d was last seen in %s", what,
                  timeout_ms / 1000.0, comm->first + comm->rank, missing, place);
    else
        error_set(&found, ERR_RANK, "%s within %.1f s, since it waits for %srank %d; rank %d was last seen in %s", what,
                  timeout_ms / 1000.0, through, cause, cause, place);
    comm_region_abort(comm->region, cause, &found); // it is that one's error
    return comm_check_abort(comm, err);
}

// ---- waiting -----------------------------------------------------------------------------------------------------------

// The clock of a wait for a rank: what counts towards its deadline, and what it last saw of the one that all wait for.
struct patience {
    int64_t waited_ns;
    uint64_t progress;
    int cause;
};

static struct patience begin_patience(const struct comm *comm, int rank, int64_t waited_ns)
{
    return (struct patience){waited_ns, comm_region_position(comm->region, comm->first + rank).progress,
                             comm->first + rank};
}

// The deadline in ms. While a rank starts only its silence counts, and so it is between stages.
static int look_at_cause(const struct comm *comm, const struct comm_wait *wait, int rank, struct patience *patience)
{
    const struct comm_region *region = comm->region;
    bool staged = region->pp_size > 1;
    int cause = staged ? comm_region_cause(region, comm->first + rank) : comm->first + rank;
    struct comm_position position = comm_region_position(region, cause);
    bool starting = position.op <= OP_HANDSHAKE && region->start_timeout_ms > 0, moved = false;
    if (cause != patience->cause || position.progress != patience->progress)
        moved = true;
    if (((starting || staged) && moved) || wait->idle)
        patience->waited_ns = 0;
    patience->cause = cause;
    patience->progress = position.progress;
    return starting ? region->start_timeout_ms : comm->timeout_ms;
}

// So that others can tell whether what this rank waits for is there.
static void publish_wait(struct comm *comm, const struct comm_wait *wait)
{
    enum wait_kind kind = wait->for_part                      ? WAITS_PART
                          : !wait->counter                    ? (comm->group == GROUP_WORLD ? WAITS_WORLD : WAITS_STAGE)
                          : wait->call->collective == RECEIVE ? WAITS_WRITTEN
                                                              : WAITS_TAKEN;
    uint64_t reach = wait->for_part ? wait->part : wait->counter ? wait->reach : comm->token;
    atomic_store(&comm->slot->wait_reach, reach);
    atomic_store(&comm->slot->wait_kind, (uint32_t)kind);
}

// Sleeps until the wait is over, with a deadline. Each sleep counts for at most twice its planned length, so that a group
// of processes that was stopped and continued as a whole goes on.
static int sleep_for(struct comm *comm, const struct comm_wait *wait, int rank, int64_t *waited_ns, struct error *err)
{
    struct rank_slot *slot = comm->slot;
    struct patience patience = begin_patience(comm, rank, *waited_ns);
    int rc = 0;
    publish_wait(comm, wait);
    for (;;) {
        uint32_t bell = atomic_load(&slot->bell);
        atomic_store(&slot->waits_for, comm->first + rank);
        if (is_over(comm, wait, rank) || (rc = comm_check_abort(comm, err)))
            break;
        int timeout_ms = look_at_cause(comm, wait, rank, &patience);
        int64_t left_ns = (int64_t)timeout_ms * 1000000 - patience.waited_ns;
        if (left_ns <= 0) {
            rc = report_missing(comm, wait, rank, timeout_ms, err);
            break;
        }
        int64_t slice_ns = left_ns < SLICE_NS ? left_ns : SLICE_NS, before_ns = clock_now_ns();
        comm->transport->sleep(comm, bell, slice_ns);
        int64_t slept_ns = clock_now_ns() - before_ns;
        patience.waited_ns += slept_ns < 2 * slice_ns ? slept_ns : 2 * slice_ns;
    }
    *waited_ns = patience.waited_ns;
    atomic_store(&slot->waits_for, -1);
    return rc;
}

// Ranks begin .. end - 1 of the group, one after the other, under one deadline.
static int wait_for_ranks(struct comm *comm, const struct comm_wait *wait, int begin, int end, struct error *err)
{
    struct spin spin = spin_begin(&comm->spinner);
    int64_t waited_ns = 0;
    bool slept = false;
    for (int rank = begin; rank < end; rank++) {
        while (!slept && !is_over(comm, wait, rank)) {
            int rc = comm_check_abort(comm, err);
            if (rc)
                return rc;
            if (comm->transport->look)
                comm->transport->look(comm);
            slept = !spin_again(&spin);
        }
        int rc = slept ? sleep_for(comm, wait, rank, &waited_ns, err) : 0;
        if (rc)
            return rc;
    }
    if (spin.rounds)
        spinner_learn(&comm->spinner, !slept);
    return 0;
}

int comm_wait_for_all(struct comm *comm, const struct call *call, struct error *err)
{
    return wait_for_ranks(comm, &(struct comm_wait){.call = call}, 0, comm->size, err);
}

int comm_wait_for_parts(struct comm *comm, const struct call *call, uint32_t part, struct error *err)
{
    return wait_for_ranks(comm, &(struct comm_wait){.call = call, .for_part = true, .part = part}, 0, comm->size, err);
}

int comm_wait_for(struct comm *comm, const struct comm_wait *wait, int rank, struct error *err)
{
    return wait_for_ranks(comm, wait, rank, rank + 1, err);
}
