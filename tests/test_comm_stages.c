// A grid of ranks: the groups of world and stage beside each other, and messages between stages: order, bytes, the sender ahead
// of its receiver, waits as long as somebody moves, and errors that name the rank behind a wait.
#include "engine/comm_internal.h"
#include "kernels/clock.h"
#include "tests/comm_cases.h"
#include "tests/comm_help.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

// ---- groups --------------------------------------------------------------------------------------------------------

struct grid {
    int tp_size, pp_size;
};

static int check(bool is_true, const char *what, struct error *err)
{
    return is_true ? 0 : error_set(err, ERR_OTHER, "%s", what);
}

// Sums over a stage and over the world take turns, out of step between the stages.
static int groups_body(struct comm *comm, void *arg, struct error *err)
{
    const struct grid *grid = arg;
    struct comm *stage = comm_stage(comm);
    int rank = comm_rank(comm), own = rank / grid->tp_size, rc;
    if ((rc = check(comm_size(comm) == grid->tp_size * grid->pp_size && comm_num_stages(comm) == grid->pp_size &&
                        comm_size(stage) == grid->tp_size && comm_rank(stage) == rank % grid->tp_size &&
                        (stage == comm) == (grid->pp_size == 1) && comm_stage(stage) == stage,
                    "ranks and sizes", err)))
        return rc;
    for (int round = 0; round < 40; round++) {
        for (int call = 0; call < own + 1; call++) { // each stage as often as it likes
            float x[300], want = 0;
            for (int i = 0; i < 300; i++)
                x[i] = (float)(rank + 1) * (float)(i % 7 + call);
            comm_at(stage, OP_MLP, call);
            if ((rc = comm_all_reduce(stage, x, 1, 300, 300, WIRE_F32, NULL, NULL, err)))
                return rc;
            for (int r = 0; r < grid->tp_size; r++)
                want += (float)(own * grid->tp_size + r + 1) * (float)(299 % 7 + call);
            if ((rc = check(x[299] == want, "a stage's sum", err)))
                return rc;
        }
        int all[COMM_MAX_RANKS], mine = rank * 1000 + round, last = round % comm_size(comm),
                                 told = rank == last ? round : -1;
        if ((rc = comm_all_gather(comm, all, &mine, sizeof mine, err)) ||
            (rc = comm_broadcast_idle(comm, &told, sizeof told, last, err)))
            return rc;
        for (int r = 0; r < comm_size(comm) && !rc; r++)
            rc = check(all[r] == r * 1000 + round, "the world's gather", err);
        if (rc || (rc = check(told == round, "the world's broadcast", err)) || (rc = comm_barrier(stage, err)))
            return rc;
    }
    return 0;
}

static void test_groups(void **state)
{
    (void)state;
    static const struct grid grids[] = {{2, 2}, {1, 3}, {3, 2}, {2, 1}};
    for (size_t i = 0; i < sizeof grids / sizeof *grids; i++)
        for (int mode = 0; mode < 2; mode++)
            expect_success(run_stages((enum mode)mode, grids[i].tp_size, grids[i].pp_size, 0, 20000, groups_body,
                                      (void *)&grids[i]),
                           grids[i].tp_size * grids[i].pp_size, "groups");
}

// ---- messages ------------------------------------------------------------------------------------------------------

static void test_messages(void **state)
{
    (void)state;
    static const struct grid grids[] = {{1, 2}, {2, 2}, {1, 3}, {2, 4}};
    for (size_t i = 0; i < sizeof grids / sizeof *grids; i++)
        for (int mode = 0; mode < 2; mode++)
            expect_success(run_stages((enum mode)mode, grids[i].tp_size, grids[i].pp_size, CASES_MESSAGE_BYTES, 20000,
                                      comm_cases_messages, NULL),
                           grids[i].tp_size * grids[i].pp_size, "messages");
}

// Two messages wait for a receiver that does not yet come, and the sender has gone on.
static int ahead_body(struct comm *comm, void *arg, struct error *err)
{
    atomic_int *sent = arg;
    uint8_t data[CASES_MESSAGE_BYTES] = {0};
    int rc;
    if (comm_rank(comm) == 0) {
        for (int number = 0; number < 2; number++) {
            memset(data, number + 1, sizeof data);
            if ((rc = comm_send(comm, data, sizeof data, 1, err)))
                return rc;
        }
        atomic_store(sent, 1);
        return 0;
    }
    for (int i = 0; i < 1000 && !atomic_load(sent); i++)
        usleep(10000);
    if (!atomic_load(sent))
        return error_set(err, ERR_OTHER, "the sender waits for its receiver");
    uint8_t want[CASES_MESSAGE_BYTES];
    for (int number = 0; number < 2; number++) {
        memset(want, number + 1, sizeof want);
        if ((rc = comm_receive(comm, data, sizeof data, 0, err)) ||
            (rc = check(memcmp(data, want, sizeof data) == 0, "a message that waited", err)))
            return rc;
    }
    return 0;
}

static void test_sender_is_ahead(void **state)
{
    (void)state;
    for (int mode = 0; mode < 2; mode++) {
        atomic_int *sent = map_shared(sizeof *sent);
        expect_success(run_stages((enum mode)mode, 1, 2, CASES_MESSAGE_BYTES, 30000, ahead_body, sent), 2, "ahead");
    }
}

// ---- waits and errors ------------------------------------------------------------------------------------------------

struct chain {
    enum { MOVES, STUCK, OTHER_SIZE, GONE, NO_ROOM, OWN_STAGE } kind;
    int code;
    const char *parts[4];
};

// Three stages of one rank: 2 waits for 1, which waits for 0, which works much longer than a deadline.
static int chain_body(struct comm *comm, void *arg, struct error *err)
{
    const struct chain *chain = arg;
    int rank = comm_rank(comm), rc = 0;
    uint8_t data[4096] = {0};
    comm_at(comm, rank == 0 ? OP_ATTENTION : OP_EMBED, rank == 0 ? 3 : -1);
    if (chain->kind == GONE && rank == 0)
        return 0;
    if (chain->kind == OWN_STAGE && rank == 1)
        return comm_send(comm, data, 10, 1, err);
    if (chain->kind == NO_ROOM) { // to a rank that takes nothing
        for (int i = 0; i < 3 && rank == 0 && !rc; i++)
            rc = comm_send(comm, data, sizeof data, 1, err);
        return rc || rank == 0 ? rc : comm_barrier(comm, err);
    }
    for (int i = 0; i < 12 && rank == 0 && chain->kind != OTHER_SIZE; i++) {
        usleep(100000);
        if (chain->kind == MOVES)
            comm_at(comm, OP_ATTENTION, i);
    }
    if (rank > 0)
        rc = comm_receive(comm, data, chain->kind == OTHER_SIZE ? 4000 : 4096, rank - 1, err);
    if (rank < 2 && !rc)
        rc = comm_send(comm, data, 4096, rank + 1, err);
    return rc ? rc : comm_barrier(comm, err);
}

static void test_waits_between_stages(void **state)
{
    (void)state;
    static const struct chain chains[] = {
        {MOVES, 0, {NULL}},
        {STUCK, ERR_RANK, {"within 0.4 s", "rank 0 was last seen in attention of layer 3", NULL}},
        {GONE, ERR_RANK, {"within 0.4 s", "rank 0 was last seen in attention of layer 3", NULL}},
        {OTHER_SIZE,
         ERR_RANK,
         {"rank 1 is at receive (embedding), 4000 bytes from rank 0",
          "rank 0 is at send (attention of layer 3), 4096 bytes", NULL}},
        {NO_ROOM, ERR_RANK, {"within 0.4 s", NULL}},
        {OWN_STAGE, ERR_OTHER, {"rank 1: send of 10 bytes with rank 1", "different stages", NULL}},
    };
    for (size_t i = 0; i < sizeof chains / sizeof *chains; i++)
        for (int mode = 0; mode < 2; mode++) {
            struct rank_result *results = run_stages((enum mode)mode, 1, 3, 4096, 400, chain_body, (void *)&chains[i]);
            print_message("%s: %s\n", mode_names[mode], results[2].error.msg);
            if (!chains[i].code)
                expect_success(results, 3, "a chain that moves");
            else
                expect_error(results + (chains[i].kind == GONE), 3 - (chains[i].kind == GONE), chains[i].code,
                             chains[i].parts);
            if (chains[i].kind == STUCK && !(results[2].seconds < 5)) // the machine may be busy
                fail_msg("a wait of 0.4 s took %.3f s", results[2].seconds);
        }
}

// All counters that a wait may be for: of two stages of two ranks, and of the messages between them.
static void set_counters(struct comm_region *region, uint64_t value)
{
    for (int rank = 0; rank < 4; rank++) {
        for (int group = 0; group < GROUP_COUNT; group++)
            atomic_store(&region->slots[rank].posted[group], (uint32_t)value);
        atomic_store(&region->slots[rank].parts, (uint32_t)value);
        for (int other = rank < 2 ? 2 : 0; other < (rank < 2 ? 4 : 2); other++) {
            atomic_store(&comm_channel(region, rank, other)->written, value);
            atomic_store(&comm_channel(region, rank, other)->taken, value);
        }
    }
}

// The one that rank 2's wait is for.
static void set_counter(struct comm_region *region, enum wait_kind kind, int other, uint64_t value)
{
    struct rank_slot *slot = &region->slots[other];
    if (kind == WAITS_WRITTEN)
        atomic_store(&comm_channel(region, other, 2)->written, value);
    else if (kind == WAITS_TAKEN)
        atomic_store(&comm_channel(region, 2, other)->taken, value);
    else
        atomic_store(kind == WAITS_PART ? &slot->parts : &slot->posted[kind == WAITS_WORLD ? GROUP_WORLD : GROUP_STAGE],
                     (uint32_t)value);
}

// What a rank says of its wait counts as long as it can be true: a rank that was stopped goes on saying it.
static void test_waits_that_are_over(void **state)
{
    enum { BYTES = 4096, REACH = 100 };
    static const struct {
        const char *name;
        enum wait_kind kind;
        int waits_for; // rank 2's
    } waits[] = {
        {"a post of the world", WAITS_WORLD, 1}, {"a post of the stage", WAITS_STAGE, 3}, {"a part", WAITS_PART, 3},
        {"a message", WAITS_WRITTEN, 0},         {"room for a message", WAITS_TAKEN, 1},
    };
    (void)state;
    for (size_t i = 0; i < sizeof waits / sizeof *waits; i++)
        for (int over = 0; over < 2; over++) {
            struct comm_region *region =
                comm_region_init(map_shared(comm_region_bytes(2, 2, 100, BYTES)), 2, 2, 100, BYTES);
            struct rank_slot *slot = &region->slots[2];
            // All others say the opposite.
            set_counters(region, over ? REACH - 1 : REACH);
            set_counter(region, waits[i].kind, waits[i].waits_for, over ? REACH : REACH - 1);
            atomic_store(&slot->wait_reach, REACH);
            atomic_store(&slot->wait_kind, (uint32_t)waits[i].kind);
            atomic_store(&slot->waits_for, waits[i].waits_for);
            int want = over ? 2 : waits[i].waits_for;
            if (comm_region_waits_for(region, 2) != (over ? -1 : want) || comm_region_cause(region, 2) != want)
                fail_msg("%s, %s: rank 2 waits for %d, in the end %d", waits[i].name, over ? "there" : "not yet there",
                         comm_region_waits_for(region, 2), comm_region_cause(region, 2));
            // Others' kinds are not known over a network, but that they are silent.
            atomic_store(&slot->wait_kind, WAITS_UNKNOWN);
            assert_int_equal(comm_region_waits_for(region, 2), waits[i].waits_for);
            atomic_store(&slot->silent, 1);
            assert_int_equal(comm_region_waits_for(region, 2), -1);
        }
}

// The sentence gives the rank behind a wait, through others too. tests/test_rank_stops.py reads sentences of this form.
static void test_reasons(void **state)
{
    enum { BYTES = 4096, STAGES = 4, DEADLINE_MS = 100 };
    static const char *const sentences[STAGES] = {
        [2] = "rank 1 did not send rank 2 what it waits for (embedding) within 0.1 s, since it waits for rank 0; "
              "rank 0 was last seen in attention of layer 3",
        [3] =
            "rank 2 did not send rank 3 what it waits for (embedding) within 0.1 s, since it waits for rank 1, and in "
            "the end for rank 0; rank 0 was last seen in attention of layer 3"};
    (void)state;
    for (int waiter = 2; waiter < STAGES; waiter++) {
        struct comm_region *region =
            comm_region_init(map_shared(comm_region_bytes(1, STAGES, 100, BYTES)), 1, STAGES, 100, BYTES);
        struct comm *cause, *comm;
        struct error err = {0};
        uint8_t data[16];
        for (int rank = 1; rank < waiter; rank++) {
            atomic_store(&region->slots[rank].wait_reach, 1);
            atomic_store(&region->slots[rank].wait_kind, WAITS_WRITTEN);
            atomic_store(&region->slots[rank].waits_for, rank - 1);
        }
        assert_int_equal(comm_open(&cause, region, 0, DEADLINE_MS, &err), 0);
        assert_int_equal(comm_open(&comm, region, waiter, DEADLINE_MS, &err), 0);
        comm_at(cause, OP_ATTENTION, 3);
        comm_at(comm, OP_EMBED, -1);
        assert_int_equal(comm_receive(comm, data, sizeof data, waiter - 1, &err), ERR_RANK);
        assert_string_equal(err.msg, sentences[waiter]);
        comm_close(comm);
        comm_close(cause);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_groups),
        cmocka_unit_test(test_messages),
        cmocka_unit_test(test_sender_is_ahead),
        cmocka_unit_test(test_waits_between_stages),
        cmocka_unit_test(test_waits_that_are_over),
        cmocka_unit_test(test_reasons),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
