// Ranks that die, hang, dawdle or disagree, at every stage, as processes and as threads, and that nothing is left behind. Prints how long each
// detection took.
#include "tests/entries_help.h"
#include "tests/launch_help.h"

// Sanitizers keep freed memory for a while.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define SANITIZED 1
#endif
#endif
#ifndef SANITIZED
#define SANITIZED 0
#endif

static const char *const stage_names[] = {"start", "load",     "idle", "inside a command", "inside a collective",
                                          "end",   "handshake"};

// ---- faults --------------------------------------------------------------------------------------------------------

struct fault_case {
    struct plan plan;
    int tp_size, code;
    double limit_s;
    const char *part;
};

static void run_fault(const struct fault_case *fault, int mode)
{
    struct error err = {0};
    struct launch *launch = start(fault->tp_size, mode, &fault->plan, 300, 300);
    struct area *area = launch_shared(launch);
    int rc = launch_wait(launch, -1, &err);
    if (!rc && fault->plan.stage == AT_IDLE) {
        atomic_store(&area->fault_s, clock_now_s());
        kill(atomic_load(&area->pids[fault->plan.faulty_rank]), fault->plan.act == STOP ? SIGSTOP : SIGKILL);
        if (fault->plan.act == STOP)
            rc = launch_post(launch, COMMAND_STEP, &err); // an idle rank has no deadline
        else
            usleep(5000);
        int fds[2]; // an idle server waits for connections
        assert_int_equal(pipe(fds), 0);
        rc = rc ? rc : launch_wait(launch, fds[0], &err);
        close(fds[0]), close(fds[1]);
    } else if (!rc && fault->plan.stage != AT_END) {
        expect(launch_post(launch, COMMAND_STEP, &err), 0, &err);
        rc = launch_wait(launch, -1, &err);
    }
    if (fault->plan.stage == AT_END) {
        int pids[8] = {0};
        for (int rank = 0; rank < fault->tp_size; rank++)
            pids[rank] = mode == PROCESSES ? area->pids[rank] : 0;
        expect(launch_stop(launch, &err), fault->code, &err);
        assert_non_null(strstr(err.msg, fault->part));
        expect_all_gone(pids, fault->tp_size, 1);
        return;
    }
    double took_s = clock_now_s() - atomic_load(&area->fault_s);
    if (rc != fault->code || (rc && !strstr(err.msg, fault->part)))
        fail_msg("%s, %s: returned %d, wanted %d: \"%s\", wanted \"%s\"", mode_names[mode],
                 stage_names[fault->plan.stage], rc, fault->code, err.msg, fault->part);
    int pids[8] = {0};
    for (int rank = 0; rank < fault->tp_size; rank++)
        pids[rank] = mode == PROCESSES ? atomic_load(&area->pids[rank]) : 0;
    if (rc) {
        print_message("%s, %s: %.1f ms until all had ended: %s\n", mode_names[mode], stage_names[fault->plan.stage],
                      took_s * 1e3, err.msg);
        if (!(took_s < fault->limit_s))
            fail_msg("%s, %s: took %.3f s, at most %.3f", mode_names[mode], stage_names[fault->plan.stage], took_s,
                     fault->limit_s);
        int named;
        if (sscanf(err.msg, "rank %d", &named) == 1)
            assert_int_equal(launch_lost_rank(launch), named);
        // The ranks are gone when launch_wait returns, and every later call says the same.
        expect_all_gone(pids, fault->tp_size, 0);
        struct error again = {0};
        assert_int_equal(launch_wait(launch, -1, &again), fault->code);
        assert_string_equal(again.msg, err.msg);
        assert_int_equal(launch_post(launch, COMMAND_STEP, &again), fault->code);
    }
    stop(launch);
    expect_all_gone(pids, fault->tp_size, 1);
}

// R1, R5: a rank is killed, crashes or exits, at every stage.
static void test_dead_ranks(void **state)
{
    (void)state;
    static const struct fault_case faults[] = {
        {{1, AT_START, KILL, .layers = 0}, 2, ERR_RANK, 1.0, "rank 1 was ended by signal 9 (Killed) in start"},
        {{1, AT_LOAD, KILL, .layers = 0}, 2, ERR_RANK, 1.0, "rank 1 was ended by signal 9 (Killed) in load"},
        {{0, AT_LOAD, CRASH, .layers = 0},
         3,
         ERR_RANK,
         1.0,
         "rank 0 was ended by signal 11 (Segmentation fault) in load"},
        {{1, AT_LOAD, EXIT, .layers = 0}, 2, ERR_RANK, 1.0, "rank 1 exited with code 42 in load"},
        {{1, AT_IDLE, KILL, .layers = 0}, 2, ERR_RANK, 1.0, "rank 1 was ended by signal 9 (Killed) in idle"},
        {{1, AT_COMPUTE, KILL, .layers = 0},
         2,
         ERR_RANK,
         1.0,
         "rank 1 was ended by signal 9 (Killed) in attention of layer 2"},
        {{0, AT_COMPUTE, KILL, .layers = 0},
         1,
         ERR_RANK,
         1.0,
         "rank 0 was ended by signal 9 (Killed) in attention of layer 2"},
        {{2, AT_COMPUTE, CRASH, .layers = 0},
         4,
         ERR_RANK,
         1.0,
         "rank 2 was ended by signal 11 (Segmentation fault) in attention of layer 2"},
        {{1, AT_COLLECTIVE, KILL, .layers = 0},
         2,
         ERR_RANK,
         1.0,
         "rank 1 was ended by signal 9 (Killed) in mlp of layer 2"},
        {{0, AT_END, KILL, .layers = 0}, 2, ERR_RANK, 1.0, "rank 0 was ended by signal 9 (Killed) in idle"},
    };
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++)
        run_fault(&faults[i], PROCESSES);
}

// R2: stopped ranks, at deadlines of 300 ms.
static void test_silent_ranks(void **state)
{
    (void)state;
    static const struct fault_case faults[] = {
        {{1, AT_LOAD, STOP, .layers = 0}, 2, ERR_RANK, 1.0, "rank 1 did not reach handshake (handshake) within 0.3 s"},
        {{0, AT_LOAD, STOP, .layers = 0}, 1, ERR_RANK, 1.0, "rank 0 has made no progress for 0."},
        {{1, AT_IDLE, STOP, .layers = 0},
         2,
         ERR_RANK,
         1.0,
         "rank 1 did not reach all_reduce of layer 0 (mlp) within 0.3 s"},
        {{1, AT_COMPUTE, STOP, .layers = 0}, 2, ERR_RANK, 1.0, "rank 1 was last seen in attention of layer 2"},
        {{3, AT_COMPUTE, STOP, .layers = 0},
         4,
         ERR_RANK,
         1.0,
         "rank 3 did not reach all_reduce of layer 2 (mlp) within 0.3 s"},
        {{0, AT_COMPUTE, STOP, .layers = 0}, 1, ERR_RANK, 1.0, "it was last seen in attention of layer 2"},
    };
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++)
        run_fault(&faults[i], PROCESSES);
}

// R3, R6, R7 and errors that ranks report, in both modes.
static void test_reported_errors(void **state)
{
    (void)state;
    static const struct fault_case faults[] = {
        {{1, AT_COMPUTE, SLOW, .layers = 0}, 2, 0, 1.0, ""},
        {{0, AT_LOAD, SLOW, .layers = 0}, 2, 0, 1.0, ""},
        {{-1, NOWHERE, SLOW, .slow_load_ms = 600}, 2, 0, 1.0, ""}, // the start deadline asks for progress, not speed
        {{1, NOWHERE, SLOW, .other_contract = true},
         2,
         ERR_CORRUPT,
         1.0,
         "the contract of the shards differs between the ranks: "
         "rank 0 has 1111111111111111, rank 1 has 2222222222222222"},
        {{0, AT_COMPUTE, SKIP, .layers = 0}, 2, ERR_RANK, 1.0, "is at all_reduce of layer 3 (mlp)"},
        {{1, AT_COMPUTE, OTHER_SIZE, .layers = 0}, 2, ERR_RANK, 1.0, "1000 values in bf16"},
        {{1, AT_COMPUTE, SLEEP_LONG, .layers = 0},
         2,
         ERR_RANK,
         2.5,
         "rank 1 did not reach all_reduce of layer 2 (mlp) within 0.3 s"},
        {{1, AT_START, ERROR, .layers = 0}, 2, ERR_IO, 1.0, "rank1.bin: the disk is gone"},
        {{0, AT_LOAD, ERROR, .layers = 0}, 3, ERR_IO, 1.0, "rank0.bin: the disk is gone"},
        {{2, AT_COMPUTE, ERROR, .layers = 0}, 4, ERR_IO, 1.0, "rank2.bin: the disk is gone"},
        {{1, AT_START, RETURN, .layers = 0}, 2, ERR_RANK, 1.0, "rank 1 ended without being told to, in start"},
        {{1, AT_END, ERROR, .layers = 0}, 2, ERR_IO, 1.0, "rank1.bin: the disk is gone"},
    };
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++)
        for (int mode = 0; mode < 2; mode++)
            run_fault(&faults[i], mode);
}

// ---- leftovers -----------------------------------------------------------------------------------------------------

static long resident_kb(void)
{
    FILE *file = fopen("/proc/self/status", "r");
    char line[256];
    long kb = -1;
    assert_non_null(file);
    while (fgets(line, sizeof line, file))
        if (sscanf(line, "VmRSS: %ld", &kb) == 1)
            break;
    fclose(file);
    return kb;
}

// R9, R10: a hundred crashes leave no descriptor, memory, process or file behind, and every start works.
static void test_crash_loop(void **state)
{
    (void)state;
    static const struct plan plans[] = {{1, AT_COMPUTE, KILL, .layers = 0},
                                        {0, AT_LOAD, CRASH, .layers = 0},
                                        {1, AT_COMPUTE, ERROR, .layers = 0},
                                        {-1, NOWHERE, KILL, .layers = 0}};
    int fds = 0, shm = count_entries_named("/dev/shm", "tpengine"); // others may be busy there
    long rss_kb = 0;
    double start_s = clock_now_s();
    for (int cycle = 0; cycle < 110; cycle++) {
        if (cycle == 10) { // what the libraries allocate once is there
            fds = count_descriptors();
            rss_kb = resident_kb();
        }
        const struct plan *plan = &plans[cycle % 4];
        struct error err = {0};
        struct launch *launch = start(2, cycle % 8 == 2 ? THREADS : PROCESSES, plan, 5000, 5000);
        int rc = launch_wait(launch, -1, &err);
        rc = rc ? rc : launch_post(launch, COMMAND_STEP, &err);
        rc = rc ? rc : launch_wait(launch, -1, &err);
        assert_int_equal(rc, plan->faulty_rank < 0 ? 0 : plan->act == ERROR ? ERR_IO : ERR_RANK);
        stop(launch);
    }
    long grown_kb = resident_kb() - rss_kb;
    print_message("100 crash cycles: %.1f ms each, resident memory %+ld KiB\n", (clock_now_s() - start_s) * 1e3 / 110,
                  grown_kb);
    assert_int_equal(count_descriptors(), fds);
    assert_int_equal(count_entries_named("/dev/shm", "tpengine"), shm);
    assert_int_equal(waitpid(-1, NULL, WNOHANG), -1); // no child is left, dead or alive
    assert_int_equal(errno, ECHILD);
    if (!SANITIZED)
        assert_true(grown_kb < 512);
}

int main(void)
{
    prepare_process();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_dead_ranks),
        cmocka_unit_test(test_silent_ranks),
        cmocka_unit_test(test_reported_errors),
        cmocka_unit_test(test_crash_loop),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
