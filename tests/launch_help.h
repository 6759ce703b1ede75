// What the tests of the launcher share: a small model of a rank that commits a fault where it is told to, and how a launch of such ranks is
// started, watched and ended.
#ifndef TPSHARD_TESTS_LAUNCH_HELP_H
#define TPSHARD_TESTS_LAUNCH_HELP_H

#include "engine/launch.h"
#include "kernels/clock.h"

#include <errno.h>
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
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

enum { PROCESSES = 0, THREADS = 1 };
static const char *const mode_names[] = {"processes", "threads"};

static inline void sleep_ms(int ms)
{
    for (int i = 0; i < ms / 10; i++)
        usleep(10000);
}

// ---- a small model of a rank ---------------------------------------------------------------------------------------

// Where in its life the faulty rank commits its fault; the stages of one run in order.
enum stage { AT_START, AT_LOAD, AT_IDLE, AT_COMPUTE, AT_COLLECTIVE, AT_END, NOWHERE };

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

static inline void commit_fault(struct rank_env *env, const struct plan *plan)
{
    struct area *area = env->shared;
    atomic_store(&area->fault_s, clock_now_s());
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

static inline int maybe_fault(struct rank_env *env, const struct plan *plan, enum stage stage, struct error *err)
{
    if (env->rank != plan->faulty_rank || stage != plan->stage)
        return 0;
    commit_fault(env, plan);
    if (plan->act == SLEEP_LONG)
        sleep_ms(1500);
    return plan->act == ERROR ? error_set(err, ERR_IO, "rank%d.bin: the disk is gone", env->rank) : 0;
}

static inline int step(struct rank_env *env, const struct plan *plan, int command, struct error *err)
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
        rc = comm_all_reduce(env->comm, data, 1, cols, 1024, WIRE_BF16, NULL, NULL, err);
        if (command == COMMAND_NOTIFY && env->rank == 0) {
            atomic_fetch_add(&area->tokens, 1);
            rank_notify(env);
        }
    }
    area->sums[env->rank] = data[1023];
    return rc;
}

static inline void *kill_inside(void *arg)
{
    // Kills the faulty rank from a second thread of its own while the first sits in a collective.
    struct rank_env *env = arg;
    struct area *area = env->shared;
    while (!atomic_load(&area->reached))
        usleep(1000);
    usleep(10000);
    atomic_store(&area->fault_s, clock_now_s());
    kill(getpid(), SIGKILL);
    return NULL;
}

static inline int rank_main(struct rank_env *env, void *arg, struct error *err)
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
        atomic_store(&area->fault_s, clock_now_s());
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

static inline struct launch *start(int tp_size, int mode, const struct plan *plan, int start_timeout_ms,
                                   int wait_timeout_ms)
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

static inline void expect(int got, int want, const struct error *err)
{
    if (got != want)
        fail_msg("returned %d, wanted %d: %s", got, want, err->msg);
}

// Orphans come to this process (see main), which takes them here: a zombie counts as gone.
static inline bool is_gone(pid_t pid)
{
    waitpid(pid, NULL, WNOHANG);
    return kill(pid, 0) && errno == ESRCH;
}

static inline void expect_all_gone(const int *pids, int count, double limit_s)
{
    double end_s = clock_now_s() + limit_s;
    for (int i = 0; i < count; i++)
        while (pids[i] && !is_gone(pids[i])) {
            if (clock_now_s() > end_s)
                fail_msg("process %d of rank %d is still there", pids[i], i);
            usleep(1000);
        }
}

static inline void stop(struct launch *launch)
{
    struct error err = {0};
    expect(launch_stop(launch, &err), 0, &err);
}

// Orphans come to this process.
static inline void prepare_process(void)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    prctl(PR_SET_CHILD_SUBREAPER, 1);
}

#endif
