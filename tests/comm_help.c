// See comm_help.h.
#include "tests/comm_help.h"

#include "engine/comm_tcp.h"
#include "formats/checked.h"
#include "kernels/clock.h"

#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

const char *const mode_names[] = {"threads", "processes", "threads over sockets", "processes over sockets"};

struct rank_run {
    struct comm_region *region;
    int rank, timeout_ms;
    const int *connections; // NULL: over the region
    comm_body *body;
    void *arg;
    struct rank_result *result;
};

void *map_shared(size_t bytes)
{
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    assert_true(memory != MAP_FAILED);
    return memory;
}

static void *run_rank(void *arg)
{
    struct rank_run *run = arg;
    struct comm *comm = NULL;
    struct error err = {0};
    double start_s = clock_now_s();
    int code = run->connections
                   ? comm_open_sockets(&comm, run->region, run->connections, run->rank, run->timeout_ms, &err)
                   : comm_open(&comm, run->region, run->rank, run->timeout_ms, &err);
    if (!code) {
        code = run->body(comm, run->arg, &err);
        run->result->seconds = clock_now_s() - start_s;
        if (code) // as a rank does whose error is its own
            comm_region_abort(run->region, run->rank, &err);
        comm_close(comm);
    }
    run->result->code = code;
    run->result->error = err;
    return NULL;
}

static bool is_threads(enum mode mode) { return mode == THREADS || mode == SOCKET_THREADS; }

static void connect_tcp(int *a, int *b)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t bytes = sizeof address;
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    assert_int_equal(bind(listener, (struct sockaddr *)&address, sizeof address), 0);
    assert_int_equal(listen(listener, 1), 0);
    assert_int_equal(getsockname(listener, (struct sockaddr *)&address, &bytes), 0);
    *a = socket(AF_INET, SOCK_STREAM, 0);
    assert_int_equal(connect(*a, (struct sockaddr *)&address, sizeof address), 0);
    *b = accept(listener, NULL, NULL);
    assert_true(*b >= 0);
    close(listener);
}

void connect_ranks(int connections[COMM_MAX_RANKS][COMM_MAX_RANKS], int ranks, bool tcp)
{
    for (int a = 0; a < ranks; a++) {
        connections[a][a] = -1;
        for (int b = 0; b < a; b++) {
            int pair[2];
            if (tcp)
                connect_tcp(&pair[0], &pair[1]);
            else
                assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, pair), 0);
            connections[a][b] = pair[0];
            connections[b][a] = pair[1];
        }
    }
}

static void close_connections(int connections[COMM_MAX_RANKS][COMM_MAX_RANKS], int ranks, int but)
{
    for (int a = 0; a < ranks; a++)
        for (int b = 0; b < ranks && a != but; b++)
            if (a != b)
                close(connections[a][b]);
}

// Each run with its region and connections.
static void start_and_join(enum mode mode, struct rank_run *runs, int ranks,
                           int connections[COMM_MAX_RANKS][COMM_MAX_RANKS])
{
    pthread_t threads[COMM_MAX_RANKS];
    pid_t pids[COMM_MAX_RANKS];
    for (int rank = 0; rank < ranks; rank++) {
        runs[rank].result->code = -99;
        if (is_threads(mode)) {
            assert_int_equal(pthread_create(&threads[rank], NULL, run_rank, &runs[rank]), 0);
            continue;
        }
        pids[rank] = fork();
        if (pids[rank] == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            if (connections)
                close_connections(connections, ranks, rank);
            run_rank(&runs[rank]);
            _exit(0);
        }
        assert_true(pids[rank] > 0);
    }
    if (connections && !is_threads(mode))
        close_connections(connections, ranks, -1);
    for (int rank = 0; rank < ranks; rank++) {
        if (is_threads(mode))
            pthread_join(threads[rank], NULL);
        else
            waitpid(pids[rank], NULL, 0);
    }
}

void run_ranks_in(enum mode mode, struct comm_region *region, int ranks, int timeout_ms, comm_body *body, void *arg,
                  struct rank_result *results)
{
    struct rank_run runs[COMM_MAX_RANKS];
    for (int rank = 0; rank < ranks; rank++)
        runs[rank] = (struct rank_run){region, rank, timeout_ms, NULL, body, arg, &results[rank]};
    start_and_join(mode, runs, ranks, NULL);
}

struct rank_result *run_shape(enum mode mode, const struct rank_shape *shape, comm_body *body, void *arg)
{
    static struct rank_result *results;
    static int connections[COMM_MAX_RANKS][COMM_MAX_RANKS];
    struct rank_run runs[COMM_MAX_RANKS];
    if (!results)
        results = map_shared(COMM_MAX_RANKS * sizeof *results);
    bool sockets = mode == SOCKET_THREADS || mode == SOCKET_PROCESSES;
    int ranks = shape->tp_size * shape->pp_size;
    uint64_t bytes =
        round_up(comm_region_bytes(shape->tp_size, shape->pp_size, shape->max_elems, shape->message_bytes), 4096);
    uint8_t *memory = map_shared(sockets ? (size_t)ranks * bytes : bytes);
    if (sockets)
        connect_ranks(connections, ranks, mode == SOCKET_PROCESSES);
    for (int rank = 0; rank < ranks; rank++) {
        uint8_t *own = memory + (sockets ? (size_t)rank * bytes : 0);
        struct comm_region *region = (struct comm_region *)own;
        if (sockets || rank == 0)
            region = comm_region_init(own, shape->tp_size, shape->pp_size, shape->max_elems, shape->message_bytes);
        comm_region_set_start_timeout(region, shape->start_timeout_ms);
        runs[rank] = (struct rank_run){region, rank, shape->timeout_ms, sockets ? connections[rank] : NULL,
                                       body,   arg,  &results[rank]};
    }
    start_and_join(mode, runs, ranks, sockets ? connections : NULL);
    munmap(memory, sockets ? (size_t)ranks * bytes : bytes);
    return results;
}

struct rank_result *run_ranks(enum mode mode, int tp_size, uint64_t max_elems, int timeout_ms, comm_body *body,
                              void *arg)
{
    struct rank_shape shape = {.tp_size = tp_size, .pp_size = 1, .timeout_ms = timeout_ms, .max_elems = max_elems};
    return run_shape(mode, &shape, body, arg);
}

struct rank_result *run_stages(enum mode mode, int tp_size, int pp_size, uint64_t message_bytes, int timeout_ms,
                               comm_body *body, void *arg)
{
    struct rank_shape shape = {.tp_size = tp_size,
                               .pp_size = pp_size,
                               .timeout_ms = timeout_ms,
                               .max_elems = 4096,
                               .message_bytes = message_bytes};
    return run_shape(mode, &shape, body, arg);
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
