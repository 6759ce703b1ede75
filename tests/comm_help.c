// See comm_help.h.
#include "tests/comm_help.h"

#include "kernels/clock.h"

#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

const char *const mode_names[] = {"threads", "processes"};

struct rank_run {
    struct comm_region *region;
    int rank, timeout_ms;
    comm_body *body;
    void *arg;
    struct rank_result *result;
};

void *map_shared(size_t bytes)
{
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    assert_true(memory != MAP_FAILED);
    return memory;
}

static void *run_rank(void *arg)
{
    struct rank_run *run = arg;
    struct comm *comm = NULL;
    struct error err = {0};
    double start_s = clock_now_s();
    int code = comm_open(&comm, run->region, run->rank, run->timeout_ms, &err);
    if (!code) {
        code = run->body(comm, run->arg, &err);
        comm_close(comm);
    }
    run->result->code = code;
    run->result->error = err;
    run->result->seconds = clock_now_s() - start_s;
    return NULL;
}

void run_ranks_in(enum mode mode, struct comm_region *region, int ranks, int timeout_ms, comm_body *body, void *arg,
                  struct rank_result *results)
{
    struct rank_run runs[COMM_MAX_RANKS];
    pthread_t threads[COMM_MAX_RANKS];
    pid_t pids[COMM_MAX_RANKS];
    for (int rank = 0; rank < ranks; rank++) {
        runs[rank] = (struct rank_run){region, rank, timeout_ms, body, arg, &results[rank]};
        results[rank].code = -99;
        if (mode == THREADS) {
            assert_int_equal(pthread_create(&threads[rank], NULL, run_rank, &runs[rank]), 0);
            continue;
        }
        pids[rank] = fork();
        if (pids[rank] == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            run_rank(&runs[rank]);
            _exit(0);
        }
        assert_true(pids[rank] > 0);
    }
    for (int rank = 0; rank < ranks; rank++) {
        if (mode == THREADS)
            pthread_join(threads[rank], NULL);
        else
            waitpid(pids[rank], NULL, 0);
    }
}

static struct rank_result *run_fresh(enum mode mode, int tp_size, int pp_size, uint64_t max_elems,
                                     uint64_t message_bytes, int timeout_ms, comm_body *body, void *arg)
{
    static struct rank_result *results;
    if (!results)
        results = map_shared(COMM_MAX_RANKS * sizeof *results);
    uint64_t bytes = comm_region_bytes(tp_size, pp_size, max_elems, message_bytes);
    void *memory = map_shared(bytes);
    struct comm_region *region = comm_region_init(memory, tp_size, pp_size, max_elems, message_bytes);
    run_ranks_in(mode, region, tp_size * pp_size, timeout_ms, body, arg, results);
    munmap(memory, bytes);
    return results;
}

struct rank_result *run_ranks(enum mode mode, int tp_size, uint64_t max_elems, int timeout_ms, comm_body *body,
                              void *arg)
{
    return run_fresh(mode, tp_size, 1, max_elems, 0, timeout_ms, body, arg);
}

struct rank_result *run_stages(enum mode mode, int tp_size, int pp_size, uint64_t message_bytes, int timeout_ms,
                               comm_body *body, void *arg)
{
    return run_fresh(mode, tp_size, pp_size, 4096, message_bytes, timeout_ms, body, arg);
}

void expect_success(const struct rank_result *results, int ranks, const char *what)
{
    for (int rank = 0; rank < ranks; rank++)
        if (results[rank].code)
            fail_msg("%s: rank %d: code %d: %s", what, rank, results[rank].code, results[rank].error.msg);
}

void expect_error(const struct rank_result *results, int ranks, int code, const char *const *parts)
{
    for (int rank = 0; rank < ranks; rank++) {
        if (results[rank].code != code)
            fail_msg("rank %d: code %d, wanted %d: %s", rank, results[rank].code, code, results[rank].error.msg);
        for (const char *const *part = parts; *part; part++)
            if (!strstr(results[rank].error.msg, *part))
                fail_msg("rank %d: \"%s\" does not hold \"%s\"", rank, results[rank].error.msg, *part);
    }
}

uint64_t mix(uint64_t x)
{
    x ^= x >> 33, x *= 0xff51afd7ed558ccdu, x ^= x >> 33, x *= 0xc4ceb9fe1a85ec53u;
    return x ^ x >> 33;
}
