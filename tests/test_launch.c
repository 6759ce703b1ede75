// The launcher: commands and notices; ranks that die, hang, dawdle or disagree, at every stage, as processes and as
// threads; a parent that dies; signals; and that nothing is left behind. Prints how long each detection took.
#include "engine/launch.h"

#include <dirent.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

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

enum { PROCESSES = 0, THREADS = 1 };
static const char *const mode_names[] = {"processes", "threads"};

static double now_s(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

static void sleep_ms(int ms)
{
    for (int i = 0; i < ms / 10; i++)
        usleep(10000);
}

// ---- a small model of a rank ---------------------------------------------------------------------------------------

// Where in its life the faulty rank commits its fault; the stages of one run in order.
enum stage { AT_START, AT_LOAD, AT_IDLE, AT_COMPUTE, AT_COLLECTIVE, AT_END, NOWHERE };
static const char *const stage_names[] = {"start", "load",     "idle", "inside a command", "inside a collective",
                                          "end",   "handshake"};

enum act { KILL, STOP, CRASH, EXIT, ERROR, RETURN, SLOW, SKIP, OTHER_SIZE, SLEEP_LONG };

struct plan {
    int faulty_rank;
    enum stage stage;
    enum act act;
    bool other_contract; // the faulty rank's handshake differs
    int slow_load_ms;    // every rank loads so long, moving every 20 ms
    int layers;          // 0: 20
};

// The caller's area.
struct area {
    _Atomic int pids[8];
    _Atomic int reached; // the faulty rank is at its stage
    _Atomic double fault_s;
    _Atomic int commands[8];
    _Atomic int tokens;
    float sums[8];
};

enum { COMMAND_STEP = 1, COMMAND_NOTIFY = 2, COMMAND_LONG = 3 };

static void commit_fault(struct rank_env *env, const struct plan *plan)
{
    struct area *area = env->shared;
    atomic_store(&area->fault_s, now_s());
    atomic_store(&area->reached, 1);
    switch (plan->act) {
    case KILL:
        kill(getpid(), SIGKILL);
        break;
    case STOP:
        raise(SIGSTOP);
        break;
    case CRASH:
        signal(SIGSEGV, SIG_DFL); // a sanitizer would print and exit instead
        raise(SIGSEGV);
        break;
    case EXIT:
        _exit(42);
    case SLOW:
        usleep(150000);
        break;
    default:
        break;
    }
}

static int maybe_fault(struct rank_env *env, const struct plan *plan, enum stage stage, struct error *err)
{
    if (env->rank != plan->faulty_rank || stage != plan->stage)
        return 0;
    commit_fault(env, plan);
    if (plan->act == SLEEP_LONG)
        sleep_ms(1500);
    return plan->act == ERROR ? error_set(err, ERR_IO, "rank%d.bin: the disk is gone", env->rank) : 0;
}

static int step(struct rank_env *env, const struct plan *plan, int command, struct error *err)
{
    struct area *area = env->shared;
    float data[1024] = {0};
    int rc = 0;
    for (int layer = 0; layer < (plan->layers ? plan->layers : 20) && !rc; layer++) {
        for (int i = 0; i < 1024; i++)
            data[i] = (float)(env->rank + 1);
        bool faulty = env->rank == plan->faulty_rank && layer == 2;
        comm_at(env->comm, OP_ATTENTION, layer);
        if (faulty && (rc = maybe_fault(env, plan, AT_COMPUTE, err)))
            break;
        if (faulty && plan->stage == AT_COMPUTE && plan->act == SKIP)
            continue;
        comm_at(env->comm, OP_MLP, layer);
        if (command == COMMAND_LONG && env->rank != 0)
            usleep(10000); // rank 0 waits nearly all the time
        if (layer == 2 && plan->stage == AT_COLLECTIVE && env->rank != plan->faulty_rank)
            sleep_ms(250); // the faulty rank is inside and waits when its fault comes
        if (faulty && plan->stage == AT_COLLECTIVE)
            atomic_store(&area->reached, 1);
        int64_t cols = faulty && plan->stage == AT_COMPUTE && plan->act == OTHER_SIZE ? 1000 : 1024;
        rc = comm_all_reduce(env->comm, data, 1, cols, 1024, WIRE_BF16, NULL, err);
        if (command == COMMAND_NOTIFY && env->rank == 0) {
            atomic_fetch_add(&area->tokens, 1);
            rank_notify(env);
        }
    }
    area->sums[env->rank] = data[1023];
    return rc;
}

static void *kill_inside(void *arg)
{
    // Kills the faulty rank from a second thread of its own while the first sits in a collective.
    struct rank_env *env = arg;
    struct area *area = env->shared;
    while (!atomic_load(&area->reached))
        usleep(1000);
    usleep(10000);
    atomic_store(&area->fault_s, now_s());
    kill(getpid(), SIGKILL);
    return NULL;
}

static int rank_main(struct rank_env *env, void *arg, struct error *err)
{
    const struct plan *plan = arg;
    struct area *area = env->shared;
    int rc, command;
    atomic_store(&area->pids[env->rank], getpid());
    if ((rc = maybe_fault(env, plan, AT_START, err)) ||
        (env->rank == plan->faulty_rank && plan->stage == AT_START && plan->act == RETURN))
        return rc;
    comm_at(env->comm, OP_LOAD, -1);
    for (int i = 0; i < plan->slow_load_ms / 20; i++) {
        usleep(20000);
        comm_at(env->comm, OP_LOAD, -1);
    }
    if ((rc = maybe_fault(env, plan, AT_LOAD, err)))
        return rc;
    if (plan->other_contract)
        atomic_store(&area->fault_s, now_s());
    uint64_t contract =
        plan->other_contract && env->rank == plan->faulty_rank ? 0x2222222222222222u : 0x1111111111111111u;
    comm_at(env->comm, OP_HANDSHAKE, -1);
    if ((rc = comm_handshake(env->comm, &contract, sizeof contract, "the contract of the shards", err)))
        return rc;
    while (!(rc = rank_next_command(env, &command, err)) && command) {
        atomic_fetch_add(&area->commands[env->rank], 1);
        pthread_t killer;
        if (env->rank == plan->faulty_rank && plan->stage == AT_COLLECTIVE)
            pthread_create(&killer, NULL, kill_inside, env);
        if ((rc = step(env, plan, command, err)))
            return rc;
        rank_command_done(env);
    }
    return rc ? rc : maybe_fault(env, plan, AT_END, err);
}

static struct launch *start(int tp_size, int mode, const struct plan *plan, int start_timeout_ms, int wait_timeout_ms)
{
    struct launch_options options = {.tp_size = tp_size,
                                     .threads = mode == THREADS,
                                     .start_timeout_ms = start_timeout_ms,
                                     .wait_timeout_ms = wait_timeout_ms,
                                     .comm_max_elems = 4096,
                                     .shared_bytes = sizeof(struct area)};
    struct launch *launch = NULL;
    struct error err = {0};
    if (launch_start(&launch, &options, rank_main, (void *)plan, &err))
        fail_msg("launch_start: %s", err.msg);
    return launch;
}

static void expect(int got, int want, const struct error *err)
{
    if (got != want)
        fail_msg("returned %d, wanted %d: %s", got, want, err->msg);
}

// Orphans come to this process (see main), which takes them here: a zombie counts as gone.
static bool is_gone(pid_t pid)
{
    waitpid(pid, NULL, WNOHANG);
    return kill(pid, 0) && errno == ESRCH;
}

static void expect_all_gone(const int *pids, int count, double limit_s)
{
    double end_s = now_s() + limit_s;
    for (int i = 0; i < count; i++)
        while (pids[i] && !is_gone(pids[i])) {
            if (now_s() > end_s)
                fail_msg("process %d of rank %d is still there", pids[i], i);
            usleep(1000);
        }
}

static void stop(struct launch *launch)
{
    struct error err = {0};
    expect(launch_stop(launch, &err), 0, &err);
}

// ---- without faults ------------------------------------------------------------------------------------------------

static void test_commands(void **state)
{
    (void)state;
    static const struct plan plan = {.faulty_rank = -1, .stage = NOWHERE};
    for (int mode = 0; mode < 2; mode++)
        for (int tp_size = 1; tp_size <= 4; tp_size++) {
            struct error err = {0};
            struct launch *launch = start(tp_size, mode, &plan, 0, 0);
            struct area *area = launch_shared(launch);
            expect(launch_wait(launch, -1, &err), 0, &err);
            for (int i = 0; i < 50; i++) {
                expect(launch_post(launch, COMMAND_STEP, &err), 0, &err);
                assert_int_equal(launch_post(launch, COMMAND_STEP, &err), ERR_OTHER); // one at a time
                expect(launch_wait(launch, -1, &err), 0, &err);
                int sum_of_ranks = tp_size * (tp_size + 1) / 2;
                for (int rank = 0; rank < tp_size; rank++)
                    assert_true(area->sums[rank] == (float)sum_of_ranks && area->commands[rank] == i + 1);
            }
            assert_int_equal(launch_post(launch, 0, &err), ERR_OTHER);
            expect(launch_wait(launch, -1, &err), 0, &err); // nothing runs, nothing to wait for
            stop(launch);
        }
    launch_stop(NULL, NULL);
}

static void test_notices_and_input(void **state)
{
    (void)state;
    static const struct plan plan = {.faulty_rank = -1, .stage = NOWHERE, .layers = 200};
    for (int mode = 0; mode < 2; mode++) {
        struct error err = {0};
        struct launch *launch = start(2, mode, &plan, 0, 0);
        struct area *area = launch_shared(launch);
        // Posting before the ranks are there is fine.
        expect(launch_post(launch, COMMAND_NOTIFY, &err), 0, &err);
        int rc, notices = 0;
        while ((rc = launch_wait(launch, -1, &err)) == 1)
            notices++;
        expect(rc, 0, &err);
        assert_int_equal(area->tokens, 200);
        assert_true(notices >= 1 && notices <= 200);

        // Idle with a descriptor: its input ends the wait; a running command and input are both seen.
        int fds[2];
        assert_int_equal(pipe(fds), 0);
        assert_int_equal(write(fds[1], "x", 1), 1);
        expect(launch_wait(launch, fds[0], &err), 2, &err);
        int seen[3] = {0};
        expect(launch_post(launch, COMMAND_NOTIFY, &err), 0, &err);
        while ((rc = launch_wait(launch, fds[0], &err)) > 0)
            seen[rc]++;
        expect(rc, 0, &err);
        assert_true(seen[1] >= 1 && seen[2] >= 1);
        close(fds[0]), close(fds[1]);
        stop(launch);
    }
}

static double rusage_children_and_self_s(void)
{
    double total = 0;
    for (int who = RUSAGE_CHILDREN; who <= RUSAGE_SELF; who++) {
        struct rusage usage;
        getrusage(who, &usage);
        total += (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
                 (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) * 1e-6;
    }
    return total;
}

static void test_idle_ranks_sleep(void **state)
{
    (void)state;
    static const struct plan plan = {.faulty_rank = -1, .stage = NOWHERE};
    for (int mode = 0; mode < 2; mode++) {
        struct error err = {0};
        double before_s = rusage_children_and_self_s();
        // Idle for longer than both deadlines.
        struct launch *launch = start(2, mode, &plan, 200, 200);
        expect(launch_wait(launch, -1, &err), 0, &err);
        usleep(500000);
        expect(launch_post(launch, COMMAND_STEP, &err), 0, &err);
        expect(launch_wait(launch, -1, &err), 0, &err);
        stop(launch);
        double used_s = rusage_children_and_self_s() - before_s;
        print_message("%s: %.1f ms of processor time for a start, 500 ms idle and one command\n", mode_names[mode],
                      used_s * 1e3);
        if (!(used_s < 0.1))
            fail_msg("idle ranks used %.1f ms", used_s * 1e3);
    }
}

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
        atomic_store(&area->fault_s, now_s());
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
    double took_s = now_s() - atomic_load(&area->fault_s);
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

// ---- the parent ----------------------------------------------------------------------------------------------------

struct family {
    _Atomic int ready;
    _Atomic int pids[8];
    _Atomic int rc;
    _Atomic int stop_rc;
};

static struct family *new_family(void)
{
    struct family *family = mmap(NULL, sizeof *family, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    assert_true(family != MAP_FAILED);
    return family;
}

// A process that launches ranks and runs one command for a second.
static pid_t fork_parent(struct family *family, int command, const struct plan *plan, int wait_timeout_ms)
{
    pid_t parent = fork();
    assert_true(parent >= 0);
    if (parent > 0)
        return parent;
    setpgid(0, 0);
    alarm(20); // whatever goes wrong, the test goes on
    struct error err = {0};
    struct launch *launch = start(2, PROCESSES, plan, 1000, wait_timeout_ms);
    struct area *area = launch_shared(launch);
    if (launch_wait(launch, -1, &err))
        _exit(99);
    for (int rank = 0; rank < 2; rank++)
        family->pids[rank] = area->pids[rank];
    if (command && launch_post(launch, command, &err))
        _exit(99);
    family->ready = 1;
    int fds[2];
    if (pipe(fds))
        _exit(99);
    family->rc = launch_wait(launch, command ? -1 : fds[0], &err);
    if (family->rc == ERR_SIGTERM) // drain
        family->rc = launch_wait(launch, command ? -1 : fds[0], &err) ? 1 : ERR_SIGTERM;
    family->stop_rc = launch_stop(launch, &err);
    _exit(0);
}

static void wait_until_ready(struct family *family)
{
    for (int i = 0; i < 5000 && !family->ready; i++)
        usleep(1000);
    assert_int_equal(family->ready, 1);
}

// R4: the parent is killed, while its ranks idle and while they work.
static void test_killed_parent(void **state)
{
    (void)state;
    static const struct plan plan = {.faulty_rank = -1, .stage = NOWHERE, .layers = 500};
    for (int command = 0; command <= COMMAND_LONG; command += COMMAND_LONG) {
        struct family *family = new_family();
        pid_t parent = fork_parent(family, command, &plan, 10000);
        wait_until_ready(family);
        usleep(20000);
        double start_s = now_s();
        kill(parent, SIGKILL);
        int pids[2] = {family->pids[0], family->pids[1]}, status;
        for (int i = 0; i < 3; i++)
            if (waitpid(-1, &status, 0) < 0)
                fail_msg("%d processes were left of 3", i);
        double took_s = now_s() - start_s;
        expect_all_gone(pids, 2, 0);
        print_message("parent killed, ranks %s: all gone after %.1f ms\n", command ? "working" : "idle", took_s * 1e3);
        if (!(took_s < 1))
            fail_msg("ranks outlived their parent by %.3f s", took_s);
        munmap(family, sizeof *family);
    }
}

static void test_signals(void **state)
{
    (void)state;
    static const struct plan plan = {.faulty_rank = -1, .stage = NOWHERE, .layers = 50};
    static const struct {
        const char *name;
        int signals[2];
        int command, rc, exit_code;
    } cases[] = {
        {"SIGINT while idle", {SIGINT, 0}, 0, ERR_SIGINT, 0},
        {"SIGINT in a command", {SIGINT, 0}, COMMAND_LONG, ERR_SIGINT, 0},
        {"SIGTERM and drain", {SIGTERM, 0}, COMMAND_LONG, ERR_SIGTERM, 0},
        {"SIGTERM, then SIGINT", {SIGTERM, SIGINT}, COMMAND_LONG, ERR_SIGTERM, 130},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct family *family = new_family();
        pid_t parent = fork_parent(family, cases[i].command, &plan, 10000);
        wait_until_ready(family);
        double start_s = now_s();
        // To the whole group, as a terminal does: the ranks must not mind.
        kill(-parent, cases[i].signals[0]);
        if (cases[i].signals[1]) {
            usleep(50000);
            kill(-parent, cases[i].signals[1]);
        }
        int status;
        assert_int_equal(waitpid(parent, &status, 0), parent);
        print_message("%s: over after %.1f ms\n", cases[i].name, (now_s() - start_s) * 1e3);
        if (!WIFEXITED(status) || WEXITSTATUS(status) != cases[i].exit_code || family->rc != cases[i].rc ||
            family->stop_rc)
            fail_msg("%s: status %x, launch_wait %d, launch_stop %d", cases[i].name, status, family->rc,
                     family->stop_rc);
        int pids[2] = {family->pids[0], family->pids[1]};
        expect_all_gone(pids, 2, 1);
        munmap(family, sizeof *family);
    }
}

// Ctrl-Z and fg: parent and ranks are stopped together for longer than every deadline, and go on.
static void test_stopped_together(void **state)
{
    (void)state;
    static const struct plan plan = {.faulty_rank = -1, .stage = NOWHERE, .layers = 60};
    struct family *family = new_family();
    pid_t parent = fork_parent(family, COMMAND_LONG, &plan, 300);
    wait_until_ready(family);
    usleep(100000);
    kill(-parent, SIGSTOP);
    sleep_ms(1200);
    kill(-parent, SIGCONT);
    int status;
    assert_int_equal(waitpid(parent, &status, 0), parent);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    assert_int_equal(family->rc, 0);
    assert_int_equal(family->stop_rc, 0);
    munmap(family, sizeof *family);
}

// ---- leftovers -----------------------------------------------------------------------------------------------------

static int count_entries(const char *path)
{
    DIR *dir = opendir(path);
    int count = 0;
    if (!dir)
        return -1;
    while (readdir(dir))
        count++;
    closedir(dir);
    return count;
}

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
    int fds = 0, shm = count_entries("/dev/shm");
    long rss_kb = 0;
    double start_s = now_s();
    for (int cycle = 0; cycle < 110; cycle++) {
        if (cycle == 10) { // what the libraries allocate once is there
            fds = count_entries("/proc/self/fd");
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
    print_message("100 crash cycles: %.1f ms each, resident memory %+ld KiB\n", (now_s() - start_s) * 1e3 / 110,
                  grown_kb);
    assert_int_equal(count_entries("/proc/self/fd"), fds);
    assert_int_equal(count_entries("/dev/shm"), shm);
    assert_int_equal(waitpid(-1, NULL, WNOHANG), -1); // no child is left, dead or alive
    assert_int_equal(errno, ECHILD);
    if (!SANITIZED)
        assert_true(grown_kb < 512);
}

// ---- a server's process --------------------------------------------------------------------------------------------

static atomic_bool churning;

static void *churn(void *arg)
{
    // Takes the locks that a fork must find in order: the allocator's and a stream's.
    FILE *out = arg;
    for (unsigned i = 0; atomic_load(&churning); i++) {
        char *piece = malloc(16 + i % 5000);
        piece[0] = (char)i;
        fprintf(out, "%p", (void *)piece);
        free(piece);
    }
    return NULL;
}

// Ranks start while other threads live and connections are open: they end up with none of these, whatever their numbers.
static void test_threads_and_connections(void **state)
{
    (void)state;
    static const struct plan plans[] = {{.faulty_rank = -1, .stage = NOWHERE}, {1, AT_COMPUTE, KILL, .layers = 0}};
    FILE *null = fopen("/dev/null", "w");
    pthread_t threads[2];
    atomic_store(&churning, true);
    for (int i = 0; i < 2; i++)
        pthread_create(&threads[i], NULL, churn, null);
    for (int cycle = 0; cycle < 20; cycle++) {
        struct error err = {0};
        int fds[2], high = 900 + cycle;
        assert_int_equal(pipe(fds), 0);
        assert_int_equal(dup2(fds[1], high), high);
        struct launch *launch = start(2, PROCESSES, &plans[cycle % 2], 5000, 5000);
        expect(launch_wait(launch, -1, &err), 0, &err);
        close(fds[1]), close(high);
        char byte;
        struct pollfd end = {.fd = fds[0], .events = POLLIN};
        assert_int_equal(poll(&end, 1, 1000), 1);
        assert_int_equal(read(fds[0], &byte, 1), 0); // no rank holds the other end
        expect(launch_post(launch, COMMAND_STEP, &err), 0, &err);
        expect(launch_wait(launch, -1, &err), cycle % 2 ? ERR_RANK : 0, &err);
        stop(launch);
        close(fds[0]);
    }
    atomic_store(&churning, false);
    for (int i = 0; i < 2; i++)
        pthread_join(threads[i], NULL);
    fclose(null);
}

static volatile sig_atomic_t own_signals;
static void on_own_signal(int number) { own_signals += number == SIGTERM; }

static void test_signals_left_alone(void **state)
{
    (void)state;
    static const struct plan plan = {.faulty_rank = -1, .stage = NOWHERE};
    struct launch_options options = {
        .tp_size = 2, .leave_signals = true, .comm_max_elems = 4096, .shared_bytes = sizeof(struct area)};
    struct sigaction own = {.sa_handler = on_own_signal}, before;
    struct launch *launch = NULL;
    struct error err = {0};
    int fds[2];
    sigaction(SIGTERM, &own, &before);
    expect(launch_start(&launch, &options, rank_main, (void *)&plan, &err), 0, &err);
    expect(launch_wait(launch, -1, &err), 0, &err);
    raise(SIGTERM);
    assert_int_equal(own_signals, 1);
    struct area *area = launch_shared(launch);
    kill(area->pids[0], SIGTERM); // as a terminal's or a service manager's whole group gets it
    expect(launch_post(launch, COMMAND_STEP, &err), 0, &err);
    expect(launch_wait(launch, -1, &err), 0, &err);
    assert_int_equal(launch_pid(launch, 1), area->pids[1]);
    double end_s = now_s() + 1;
    while (launch_position(launch, 1).op != OP_IDLE && now_s() < end_s)
        usleep(100);
    assert_int_equal(launch_position(launch, 1).op, OP_IDLE);
    assert_int_equal(pipe(fds), 0);
    assert_int_equal(write(fds[1], "x", 1), 1);
    expect(launch_wait(launch, fds[0], &err), 2, &err);
    close(fds[0]), close(fds[1]);
    stop(launch);
    sigaction(SIGTERM, &before, NULL);
}

static void test_bad_options(void **state)
{
    (void)state;
    struct error err = {0};
    struct launch *launch = NULL;
    static const struct plan plan = {.faulty_rank = -1};
    struct launch_options options = {.tp_size = 0, .comm_max_elems = 100};
    assert_int_equal(launch_start(&launch, &options, rank_main, (void *)&plan, &err), ERR_USAGE);
    options.tp_size = COMM_MAX_RANKS + 1;
    assert_int_equal(launch_start(&launch, &options, rank_main, (void *)&plan, &err), ERR_USAGE);
    options.tp_size = 2;
    options.shared_bytes = (size_t)1 << 60;
    assert_int_equal(launch_start(&launch, &options, rank_main, (void *)&plan, &err), ERR_MEMORY);
    options.shared_bytes = SIZE_MAX - 100;
    assert_int_equal(launch_start(&launch, &options, rank_main, (void *)&plan, &err), ERR_MEMORY);
    assert_null(launch);
}

int main(void)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_commands),           cmocka_unit_test(test_notices_and_input),
        cmocka_unit_test(test_idle_ranks_sleep),   cmocka_unit_test(test_dead_ranks),
        cmocka_unit_test(test_silent_ranks),       cmocka_unit_test(test_reported_errors),
        cmocka_unit_test(test_killed_parent),      cmocka_unit_test(test_signals),
        cmocka_unit_test(test_stopped_together),   cmocka_unit_test(test_crash_loop),
        cmocka_unit_test(test_bad_options),        cmocka_unit_test(test_threads_and_connections),
        cmocka_unit_test(test_signals_left_alone),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
