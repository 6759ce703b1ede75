// Collectives over shared memory, between threads and between forked processes: bits equal to a serial reference on
// every rank and for every batch, pool and mode; errors that name rank, operation and layer; deadlines; the abort word.
#include "engine/comm.h"
#include "kernels/clock.h"
#include "tests/comm_cases.h"
#include "tests/comm_help.h"

#include <math.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

// ---- all_reduce ----------------------------------------------------------------------------------------------------

struct reduce_run {
    struct reduce_case shape;
    float *results; // shared: [tp_size][rows][stride], of the last call
};

static int reduce_body(struct comm *comm, void *arg, struct error *err)
{
    struct reduce_run *run = arg;
    const struct reduce_case *shape = &run->shape;
    size_t elems = (size_t)(shape->rows * shape->stride);
    float *mine = run->results + (size_t)comm_rank(comm) * elems;
    uint16_t *lost = shape->fed ? calloc((size_t)(shape->rows * shape->cols) + 1, sizeof *lost) : NULL;
    struct thread_pool *pool = NULL;
    int rc = shape->pool_threads ? thread_pool_create(&pool, shape->pool_threads, err) : 0;
    for (int call = 0; call < shape->calls && !rc; call++) {
        reduce_case_fill(shape, call, comm_rank(comm), mine);
        comm_at(comm, OP_MLP, call);
        rc = comm_all_reduce(comm, mine, shape->rows, shape->cols, shape->stride, shape->wire, lost, pool, err);
    }
    thread_pool_free(pool);
    free(lost);
    return rc;
}

static void check_reduce(enum mode mode, struct reduce_case shape)
{
    size_t elems = (size_t)(shape.rows * shape.stride), bytes = ((size_t)shape.tp_size * elems + 1) * sizeof(float);
    struct reduce_run run = {.shape = shape, .results = map_shared(bytes)};
    char name[160];
    snprintf(name, sizeof name, "%s tp %d, %lld x %lld of %lld, max %llu, %s%s, pool %d", mode_names[mode],
             shape.tp_size, (long long)shape.rows, (long long)shape.cols, (long long)shape.stride,
             (unsigned long long)shape.max_elems, wire_name(shape.wire), shape.fed ? " fed" : "", shape.pool_threads);
    expect_success(run_ranks(mode, shape.tp_size, shape.max_elems, 20000, reduce_body, &run), shape.tp_size, name);
    float *want = malloc((size_t)shape.stride * sizeof *want);
    assert_non_null(want);
    for (int64_t row = 0; row < shape.rows; row++) {
        reduce_case_row(&shape, row, want);
        for (int64_t col = shape.cols; col < shape.stride; col++)
            want[col] = 12345.0f;
        for (int rank = 0; rank < shape.tp_size; rank++) {
            const float *got = run.results + (size_t)rank * elems + (size_t)(row * shape.stride);
            for (int64_t col = 0; col < shape.stride; col++)
                if (f32_bits(got[col]) != f32_bits(want[col]))
                    fail_msg("%s: rank %d row %lld col %lld: %08x, wanted %08x", name, rank, (long long)row,
                             (long long)col, f32_bits(got[col]), f32_bits(want[col]));
        }
    }
    free(want);
    munmap(run.results, bytes);
}

// The reference knows a row alone, so these also show that a row's bits do not depend on its batch.
static void test_all_reduce_bits(void **state)
{
    (void)state;
    static const struct reduce_case shapes[] = {
        // tp rows cols stride max_elems wire pool calls special fed
        {2, 1, 4096, 4096, 4096, 0, 0, 40, false, false}, // 80 phases: across the wrap of the tokens
        {2, 3, 128, 128, 4096, 0, 0, 3, false, false},    // one group a row: rank 0 owns all
        {2, 1, 1, 1, 1, 0, 0, 20, false, false},
        {2, 5, 200, 256, 512, 0, 0, 3, true, false},    // short last group, a gap between rows, pieces of 4 groups
        {2, 4, 1000, 1000, 300, 0, 0, 3, true, false},  // pieces smaller than a row
        {2, 0, 128, 128, 128, 0, 0, 2, false, false},   // nothing to do
        {3, 7, 900, 900, 100000, 0, 0, 2, true, false}, // ranks no power of two
        {4, 2, 8192, 8192, 16384, 0, 0, 9, true, false},
        {8, 3, 2000, 2048, 4096, 0, 0, 2, true, false},
        {2, 40, 4096, 4096, 1 << 20, 0, 2, 2, true, false}, // pool
        {2, 40, 4096, 4096, 1 << 20, 0, 3, 2, true, false},
        {3, 33, 1100, 1100, 1 << 20, 0, 2, 2, true, false},
        {2, 200, 4096, 4096, 1 << 24, 0, 2, 1, false, false}, // more than fits one piece
        // with error feedback
        {2, 3, 512, 512, 4096, 0, 0, 12, false, true},
        {3, 5, 1000, 1024, 700, 0, 0, 6, true, true}, // a short last group, a gap between rows, small pieces
        {4, 9, 4096, 4096, 1 << 20, 0, 2, 5, true, true},
    };
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (int wire = 0; wire < WIRE_COUNT; wire++) {
            struct reduce_case shape = shapes[i];
            shape.wire = (enum wire)wire;
            check_reduce(THREADS, shape);
            check_reduce(PROCESSES, shape);
        }
}

static int one_rank_body(struct comm *comm, void *arg, struct error *err)
{
    (void)arg;
    static const float before[3] = {1.0f + 0x1p-20f, -3, 1e-30f};
    float data[3] = {before[0], before[1], before[2]};
    int rc = comm_all_reduce(comm, data, 1, 3, 3, WIRE_S8X, NULL, NULL, err);
    if (!rc && !(data[0] == before[0] && data[1] == before[1] && data[2] == before[2]))
        return error_set(err, ERR_OTHER, "one rank: the data changed");
    int mine = 7, all = 0;
    if (!rc)
        rc = comm_all_gather(comm, &all, &mine, sizeof mine, err);
    if (!rc)
        rc = comm_broadcast(comm, &mine, sizeof mine, 0, err);
    if (!rc)
        rc = comm_barrier(comm, err);
    if (!rc)
        rc = comm_handshake(comm, "x", 1, "letter", err);
    return rc ? rc : all == 7 && mine == 7 ? 0 : error_set(err, ERR_OTHER, "one rank: wrong values");
}

static void test_one_rank(void **state)
{
    (void)state;
    expect_success(run_ranks(THREADS, 1, 100, 1000, one_rank_body, NULL), 1, "one rank");
}

// ---- the other operations ------------------------------------------------------------------------------------------

static void test_gather_broadcast(void **state)
{
    (void)state;
    for (int tp_size = 1; tp_size <= 5; tp_size++)
        for (int mode = 0; mode < 2; mode++)
            expect_success(run_ranks((enum mode)mode, tp_size, 100, 20000, comm_cases_gather, NULL), tp_size, "gather");
}

// The barrier's promise: nobody leaves before the last has come.
struct barrier_run {
    _Atomic int arrived[300];
};

static int barrier_body(struct comm *comm, void *arg, struct error *err)
{
    struct barrier_run *run = arg;
    for (int i = 0; i < 300; i++) {
        if (mix((uint64_t)(i * 8 + comm_rank(comm))) % 16 == 0)
            usleep(200); // someone is late: the others sleep
        atomic_fetch_add(&run->arrived[i], 1);
        int rc = comm_barrier(comm, err);
        if (rc)
            return rc;
        if (atomic_load(&run->arrived[i]) != comm_size(comm))
            return error_set(err, ERR_OTHER, "left barrier %d before all had come", i);
    }
    return 0;
}

static void test_barrier(void **state)
{
    (void)state;
    for (int mode = 0; mode < MODE_COUNT; mode++) {
        struct barrier_run *run = map_shared(sizeof *run);
        expect_success(run_ranks((enum mode)mode, 4, 100, 20000, barrier_body, run), 4, "barrier");
        munmap(run, sizeof *run);
    }
}

static int handshake_body(struct comm *comm, void *arg, struct error *err)
{
    const uint8_t *odd = arg; // [0] rank that differs, [1] from which byte
    uint8_t contract[64];
    for (int i = 0; i < 64; i++)
        contract[i] = (uint8_t)(comm_rank(comm) == odd[0] && i >= odd[1] ? 0xee : i);
    comm_at(comm, OP_HANDSHAKE, -1);
    return comm_handshake(comm, contract, odd[1] < 8 ? 8 : 64, "the model contract", err);
}

static void test_handshake(void **state)
{
    (void)state;
    uint8_t same[2] = {99, 0}, short_one[2] = {1, 2}, long_one[2] = {2, 40}, first[2] = {0, 60};
    for (int mode = 0; mode < MODE_COUNT; mode++) {
        expect_success(run_ranks((enum mode)mode, 3, 100, 20000, handshake_body, same), 3, "handshake");
        expect_error(
            run_ranks((enum mode)mode, 3, 100, 20000, handshake_body, short_one), 3, ERR_CORRUPT,
            (const char *[]){"the model contract", "rank 0 has 0001020304050607", "rank 1 has 0001eeee", NULL});
        expect_error(run_ranks((enum mode)mode, 3, 100, 20000, handshake_body, long_one), 3, ERR_CORRUPT,
                     (const char *[]){"rank 0 has 28292a2b", "rank 2 has eeee", "byte 40 of 64", NULL});
        expect_error(run_ranks((enum mode)mode, 2, 100, 20000, handshake_body, first), 2, ERR_CORRUPT,
                     (const char *[]){"rank 0 has eeeeeeee", "rank 1 has 3c3d3e3f", NULL});
    }
}

// ---- errors --------------------------------------------------------------------------------------------------------

struct fault {
    const char *name;
    int rank, at_call; // who misbehaves, and in which call
    enum { LATE, SKIP, OTHER_SIZE, OTHER_WIRE, OTHER_OPERATION, GO_AWAY, TOO_MUCH, WAIT } kind;
    int code;
    const char *parts[4];
};

static int fault_body(struct comm *comm, void *arg, struct error *err)
{
    const struct fault *fault = arg;
    float data[512] = {0};
    for (int call = 0; call < 6; call++) {
        bool odd = comm_rank(comm) == fault->rank && call == fault->at_call;
        comm_at(comm, OP_ATTENTION, call);
        if (odd && fault->kind == GO_AWAY)
            return 0;
        if (odd && fault->kind == SKIP)
            continue;
        if (odd && fault->kind == LATE)
            usleep(1200000);
        if (odd && fault->kind == WAIT)
            usleep(100000);
        comm_at(comm, OP_MLP, call);
        int rc = odd && fault->kind == OTHER_OPERATION ? comm_barrier(comm, err)
                 : odd && fault->kind == TOO_MUCH
                     ? comm_all_gather(comm, data, data, COMM_GATHER_MAX_BYTES + 1, err)
                     : comm_all_reduce(comm, data, 1, odd && fault->kind == OTHER_SIZE ? 500 : 512, 512,
                                       odd && fault->kind == OTHER_WIRE ? WIRE_FP8 : WIRE_BF16, NULL, NULL, err);
        if (rc)
            return rc;
    }
    return 0;
}

static void test_faults_are_named(void **state)
{
    (void)state;
    static const struct fault faults[] = {
        {"slow within the deadline", 1, 3, WAIT, 0, {NULL}},
        {"too late",
         1,
         3,
         LATE,
         ERR_RANK,
         {"rank 1 did not reach all_reduce of layer 3 (mlp) within 0.3 s",
          "rank 1 was last seen in attention of layer 3", NULL}},
        {"rank 0 too late", 0, 0, LATE, ERR_RANK, {"rank 0 did not reach", "last seen in attention of layer 0", NULL}},
        {"skips a call",
         1,
         2,
         SKIP,
         ERR_RANK,
         {"rank 1 is at all_reduce of layer 3 (mlp)", "rank 0 is at all_reduce of layer 2", NULL}},
        {"other size", 0, 2, OTHER_SIZE, ERR_RANK, {"512 values in bf16", "500 values in bf16", "rank 0 is at", NULL}},
        {"other wire", 1, 2, OTHER_WIRE, ERR_RANK, {"512 values in bf16", "512 values in fp8", "rank 1 is at", NULL}},
        {"other operation",
         1,
         4,
         OTHER_OPERATION,
         ERR_RANK,
         {"rank 1 is at barrier of layer 4 (mlp)", "rank 0 is at all_reduce of layer 4", NULL}},
        {"too much", 1, 4, TOO_MUCH, ERR_OTHER, {"rank 1", "65537 bytes", NULL}},
    };
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++)
        for (int mode = 0; mode < MODE_COUNT; mode++) {
            const int timeout_ms = faults[i].kind == LATE ? 300 : faults[i].kind == WAIT ? 1000 : 20000;
            struct rank_result *results =
                run_ranks((enum mode)mode, 2, 1000, timeout_ms, fault_body, (void *)&faults[i]);
            if (!faults[i].code)
                expect_success(results, 2, faults[i].name);
            else
                expect_error(results, 2, faults[i].code, faults[i].parts);
            print_message("%s, %s: %.3f s: %s\n", mode_names[mode], faults[i].name, results[0].seconds,
                          results[0].error.msg);
        }
}

// A rank that has gone: the deadline of the others ends the wait, about in time, and all of them say the same.
static void test_deadline(void **state)
{
    (void)state;
    static const struct fault gone = {"gone", 2, 2, GO_AWAY, ERR_RANK, {NULL}};
    for (int mode = 0; mode < 2; mode++) {
        struct rank_result *results = run_ranks((enum mode)mode, 4, 1000, 200, fault_body, (void *)&gone);
        for (int rank = 0; rank < 4; rank++) {
            if (rank == 2)
                continue;
            assert_int_equal(results[rank].code, ERR_RANK);
            assert_non_null(strstr(results[rank].error.msg, "rank 2 did not reach all_reduce of layer 2 (mlp)"));
            assert_string_equal(results[rank].error.msg, results[0].error.msg);
            if (!(results[rank].seconds > 0.19 && results[rank].seconds < 5)) // the machine may be busy
                fail_msg("%s: the wait of 0.2 s ended after %.3f s", mode_names[mode], results[rank].seconds);
        }
    }
}

struct start_run {
    bool moves;
};

static int starting_body(struct comm *comm, void *arg, struct error *err)
{
    const struct start_run *run = arg;
    comm_at(comm, OP_LOAD, -1);
    for (int i = 0; i < 18 && comm_rank(comm) == 1; i++) {
        usleep(50000);
        if (run->moves)
            comm_at(comm, OP_LOAD, i);
    }
    return comm_handshake(comm, "contract", 8, "contract", err);
}

// While a rank loads, only silence counts: 0.9 s of loading pass a start deadline of 0.6 s when it moves, and not when
// it does not.
static void test_start_deadline(void **state)
{
    (void)state;
    struct rank_result *results = map_shared(2 * sizeof *results);
    for (int moves = 0; moves < 2; moves++) {
        void *memory = map_shared(comm_region_bytes(2, 1, 100, 0));
        struct comm_region *region = comm_region_init(memory, 2, 1, 100, 0);
        comm_region_set_start_timeout(region, 600);
        struct start_run run = {.moves = moves};
        run_ranks_in(PROCESSES, region, 2, 150, starting_body, &run, results);
        if (moves)
            expect_success(results, 2, "a start that moves");
        else
            expect_error(
                results, 2, ERR_RANK,
                (const char *[]){"rank 1 did not reach handshake (load) within 0.6 s", "last seen in load", NULL});
        munmap(memory, comm_region_bytes(2, 1, 100, 0));
    }
    munmap(results, 2 * sizeof *results);
}

// Not a multiple of the longest sleep between two looks, which alone would end the wait as well, but later.
enum { ABORT_AFTER_US = 110000, ABORT_TRIES = 40 };

static void *abort_later(void *arg)
{
    struct error why;
    usleep(ABORT_AFTER_US);
    error_set(&why, ERR_IO, "the parent has had enough");
    comm_region_abort(arg, 0, &why);
    error_set(&why, ERR_OTHER, "too late to count");
    comm_region_abort(arg, 1, &why);
    return NULL;
}

static int wait_body(struct comm *comm, void *arg, struct error *err)
{
    const int *rank_0_waits = arg;
    return comm_rank(comm) > 0 || *rank_0_waits ? comm_barrier(comm, err) : 0;
}

// Returns how long after the abort the last waiter left.
static double time_abort(enum mode mode, struct rank_result *results)
{
    void *memory = map_shared(comm_region_bytes(3, 1, 100, 0));
    struct comm_region *region = comm_region_init(memory, 3, 1, 100, 0);
    assert_false(comm_region_aborted(region));
    pthread_t thread;
    pthread_create(&thread, NULL, abort_later, region);
    int rank_0_waits = 0; // only with all ranks does the barrier open
    run_ranks_in(mode, region, 3, 20000, wait_body, &rank_0_waits, results);
    pthread_join(thread, NULL);
    expect_error(results + 1, 2, ERR_IO, (const char *[]){"the parent has had enough", NULL});
    double last_s = results[1].seconds > results[2].seconds ? results[1].seconds : results[2].seconds;
    struct error kept;
    int rank = -1;
    assert_true(comm_region_error(region, &rank, &kept));
    assert_int_equal(rank, 0);
    assert_int_equal(kept.code, ERR_IO);
    // Whoever comes later does not even start.
    rank_0_waits = 1;
    run_ranks_in(mode, region, 3, 20000, wait_body, &rank_0_waits, results);
    expect_error(results, 3, ERR_IO, (const char *[]){"the parent has had enough", NULL});
    munmap(memory, comm_region_bytes(3, 1, 100, 0));
    return last_s - ABORT_AFTER_US * 1e-6;
}

static void test_abort_wakes_waiters(void **state)
{
    (void)state;
    struct rank_result *results = map_shared(3 * sizeof *results);
    for (int mode = 0; mode < 2; mode++) {
        double best_s = 1; // the machine may be busy
        for (int i = 0; i < ABORT_TRIES && !(best_s < 0.02); i++) {
            double took_s = time_abort((enum mode)mode, results);
            best_s = took_s < best_s ? took_s : best_s;
        }
        print_message("%s: waiters left %.2f ms after the abort\n", mode_names[mode], best_s * 1e3);
        if (!(best_s < 0.02))
            fail_msg("the abort was seen after %.3f s", best_s);
    }
    munmap(results, 3 * sizeof *results);
}

static int position_body(struct comm *comm, void *arg, struct error *err)
{
    (void)arg;
    comm_at(comm, OP_HEAD, -1);
    comm_at(comm, OP_ATTENTION, 79);
    return comm_barrier(comm, err);
}

static void test_positions(void **state)
{
    (void)state;
    void *memory = map_shared(comm_region_bytes(2, 1, 100, 0));
    struct rank_result *results = map_shared(2 * sizeof *results);
    struct comm_region *region = comm_region_init(memory, 2, 1, 100, 0);
    struct comm_position at = comm_region_position(region, 0);
    assert_int_equal(at.op, OP_START);
    assert_int_equal(at.layer, -1);
    assert_int_equal(at.progress, 0);
    assert_int_equal(at.waits_for, -1);
    run_ranks_in(THREADS, region, 2, 5000, position_body, NULL, results);
    for (int rank = 0; rank < 2; rank++) {
        at = comm_region_position(region, rank);
        assert_int_equal(at.op, OP_ATTENTION);
        assert_int_equal(at.layer, 79);
        assert_int_equal(at.progress, 3); // two moves and a phase
        assert_int_equal(at.waits_for, -1);
    }
    char place[COMM_PLACE_BYTES];
    comm_place(place, at.op, at.layer);
    assert_string_equal(place, "attention of layer 79");
    comm_place(place, OP_LOAD, -1);
    assert_string_equal(place, "load");
    struct comm *comm = NULL;
    struct error err;
    assert_int_equal(comm_open(&comm, region, 2, 100, &err), ERR_USAGE);
    assert_int_equal(comm_open(&comm, region, -1, 100, &err), ERR_USAGE);
    assert_int_equal(comm_open(&comm, region, 0, 0, &err), ERR_USAGE);
    assert_null(comm);
    munmap(memory, comm_region_bytes(2, 1, 100, 0));
    munmap(results, 2 * sizeof *results);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_all_reduce_bits),
        cmocka_unit_test(test_one_rank),
        cmocka_unit_test(test_gather_broadcast),
        cmocka_unit_test(test_barrier),
        cmocka_unit_test(test_handshake),
        cmocka_unit_test(test_faults_are_named),
        cmocka_unit_test(test_deadline),
        cmocka_unit_test(test_start_deadline),
        cmocka_unit_test(test_abort_wakes_waiters),
        cmocka_unit_test(test_positions),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
