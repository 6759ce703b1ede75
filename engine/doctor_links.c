// What an all_reduce takes here, by really running it between processes. See doctor.h.
#include "engine/doctor.h"

#include "engine/comm_tcp.h"
#include "kernels/clock.h"

#include <netinet/in.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

// One token of a model with a hidden size of 8192, and pieces of prompts of 64 and 512.
const struct doctor_size doctor_sizes[DOCTOR_SIZES] = {
    {1, WIRE_BF16}, {64, WIRE_BF16}, {64, WIRE_S8X}, {512, WIRE_BF16}, {512, WIRE_S8X},
};
enum { MOST_RANKS = 8, ROUNDS = 9, MOST_ROWS = 512, TIMEOUT_MS = 60000, ONE_SIZE_NS = 250 * 1000000 };

// One rank: all sizes, each several times; what it took goes to the probe through rank 0, which waits for the slowest.
static int run_rank(struct doctor_times *out, struct comm *comm, float *data, struct error *err)
{
    int rc = 0;
    for (int size = 0; size < DOCTOR_SIZES; size++) {
        double best_us = 0;
        int64_t end_ns = clock_now_ns() + ONE_SIZE_NS;
        for (int round = 0; round < ROUNDS; round++) {
            double slowest_us = 0, all_us[COMM_MAX_RANKS];
            memset(data, 0, (size_t)(doctor_sizes[size].rows * DOCTOR_COLS) * sizeof *data);
            if ((rc = comm_barrier(comm, err)))
                return rc;
            int64_t begin_ns = clock_now_ns();
            if ((rc = comm_all_reduce(comm, data, doctor_sizes[size].rows, DOCTOR_COLS, DOCTOR_COLS,
                                      doctor_sizes[size].wire, NULL, NULL, err)))
                return rc;
            double mine_us = 1e-3 * (double)(clock_now_ns() - begin_ns);
            if ((rc = comm_all_gather(comm, all_us, &mine_us, sizeof mine_us, err)))
                return rc;
            for (int rank = 0; rank < comm_size(comm); rank++)
                slowest_us = all_us[rank] > slowest_us ? all_us[rank] : slowest_us;
            if (round > 0 && (best_us == 0 || slowest_us < best_us)) // the first warms up
                best_us = slowest_us;
            char enough = clock_now_ns() > end_ns && round > 0; // as rank 0 sees it
            if ((rc = comm_broadcast(comm, &enough, 1, 0, err)))
                return rc;
            if (enough)
                break;
        }
        if (comm_rank(comm) == 0)
            out->us[size] = best_us;
    }
    return 0;
}

struct run {
    enum transport transport;
    void *memory;                    // a region that all share; over sockets each rank's own
    uint64_t elems;                  // of a rank's data
    float *data;                     // [ranks][elems]
    int fds[MOST_RANKS][MOST_RANKS]; // of TRANSPORT_TCP
};

// Rank a's end and rank b's of a connection over the loopback.
static int connect_pair(struct run *run, int a, int b, struct error *err)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t bytes = sizeof address;
    int rc = 0, listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    int *there = &run->fds[a][b], *here = &run->fds[b][a];
    *there = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (listener < 0 || *there < 0 || bind(listener, (struct sockaddr *)&address, sizeof address) ||
        listen(listener, 1) || getsockname(listener, (struct sockaddr *)&address, &bytes) ||
        connect(*there, (struct sockaddr *)&address, sizeof address) || (*here = accept(listener, NULL, NULL)) < 0)
        rc = error_set_errno(err, "no connection over the loopback");
    if (listener >= 0)
        close(listener);
    return rc;
}

static int connect_all(struct run *run, int ranks, struct error *err)
{
    int rc = 0;
    for (int a = 0; a < ranks; a++)
        for (int b = 0; b < a && !rc; b++)
            rc = connect_pair(run, a, b, err);
    return rc;
}

// A rank's end; over sockets it keeps its own connections alone, so that the others hear of its end.
static int open_end(struct comm **comm, struct run *run, int ranks, int rank, struct error *err)
{
    if (run->transport == TRANSPORT_SHM)
        return comm_open(comm, run->memory, rank, TIMEOUT_MS, err);
    for (int a = 0; a < ranks; a++)
        for (int b = 0; b < ranks; b++)
            if (a != rank && a != b)
                close(run->fds[a][b]);
    void *memory = doctor_probe_new(comm_region_bytes(ranks, 1, run->elems, 0));
    if (!memory)
        return error_set(err, ERR_MEMORY, "no memory for rank %d", rank);
    return comm_open_sockets(comm, comm_region_init(memory, ranks, 1, run->elems, 0), run->fds[rank], rank, TIMEOUT_MS,
                             err);
}

static int rank_main(struct doctor_times *out, struct run *run, int rank)
{
    struct comm *comm = NULL;
    struct error err;
    int rc = open_end(&comm, run, out->ranks, rank, &err);
    if (!rc)
        rc = run_rank(out, comm, run->data + (size_t)rank * run->elems, &err);
    comm_close(comm);
    if (rc && rank == 0)
        out->probe.err = err;
    return rc;
}

static int prepare(struct run *run, const struct doctor_times *out, struct error *err)
{
    run->transport = out->transport;
    run->elems = (uint64_t)MOST_ROWS * DOCTOR_COLS;
    run->data = doctor_probe_new((size_t)out->ranks * run->elems * sizeof(float));
    run->memory = doctor_probe_new(comm_region_bytes(out->ranks, 1, run->elems, 0));
    if (!run->data || !run->memory)
        return error_set(err, ERR_MEMORY, "no memory for %d ranks", out->ranks);
    if (run->transport == TRANSPORT_TCP)
        return connect_all(run, out->ranks, err);
    comm_region_init(run->memory, out->ranks, 1, run->elems, 0);
    return 0;
}

static void run_ranks(struct probe *probe, void *arg)
{
    struct doctor_times *out = (struct doctor_times *)(void *)probe;
    struct run run;
    pid_t pids[MOST_RANKS] = {0};
    (void)arg;
    snprintf(probe->at, sizeof probe->at, "all_reduce between %d processes", out->ranks);
    if (prepare(&run, out, &probe->err))
        return;
    for (int rank = 1; rank < out->ranks; rank++) {
        pids[rank] = fork();
        if (pids[rank] == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            _exit(rank_main(out, &run, rank) ? 1 : 0);
        }
    }
    rank_main(out, &run, 0);
    for (int rank = 1; rank < out->ranks; rank++)
        if (pids[rank] > 0)
            waitpid(pids[rank], NULL, 0);
    probe->at[0] = 0;
}

void doctor_links_measure(struct doctor_times *out, enum transport transport, int ranks, double seconds)
{
    out->transport = transport;
    out->ranks = ranks;
    if (ranks < 2 || ranks > MOST_RANKS || (transport != TRANSPORT_SHM && transport != TRANSPORT_TCP))
        error_set(&out->probe.err, ERR_USAGE, "%s between %d ranks is not measured here", transport_name(transport),
                  ranks);
    else
        doctor_probe_run(&out->probe, run_ranks, NULL, seconds);
}
