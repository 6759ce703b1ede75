// What an all_reduce takes here, by really running it between processes. See doctor.h.
#include "engine/doctor.h"

#include "kernels/clock.h"

#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

// One token of a model with a hidden size of 8192, and pieces of prompts of 64 and 512.
const struct doctor_size doctor_sizes[DOCTOR_SIZES] = {
    {1, WIRE_BF16}, {64, WIRE_BF16}, {64, WIRE_S8X}, {512, WIRE_BF16}, {512, WIRE_S8X},
};
enum { ROUNDS = 9, MOST_ROWS = 512, TIMEOUT_MS = 60000, ONE_SIZE_NS = 250 * 1000000 };

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
    struct comm_region *region;
    float *data; // [ranks][MOST_ROWS][DOCTOR_COLS]
};

static int rank_main(struct doctor_times *out, const struct run *run, int rank)
{
    struct comm *comm = NULL;
    struct error err;
    int rc = comm_open(&comm, run->region, rank, TIMEOUT_MS, &err);
    if (!rc)
        rc = run_rank(out, comm, run->data + (size_t)rank * MOST_ROWS * DOCTOR_COLS, &err);
    comm_close(comm);
    if (rc && rank == 0)
        out->probe.err = err;
    return rc;
}

static void run_ranks(struct probe *probe, void *arg)
{
    struct doctor_times *out = (struct doctor_times *)(void *)probe;
    (void)arg;
    uint64_t elems = (uint64_t)MOST_ROWS * DOCTOR_COLS;
    struct run run = {.data = doctor_probe_new((size_t)out->ranks * elems * sizeof(float))};
    void *memory = doctor_probe_new(comm_region_bytes(out->ranks, 1, elems, 0));
    pid_t pids[COMM_MAX_RANKS] = {0};
    snprintf(probe->at, sizeof probe->at, "all_reduce between %d processes", out->ranks);
    if (!run.data || !memory) {
        error_set(&probe->err, ERR_MEMORY, "no memory for %d ranks", out->ranks);
        return;
    }
    run.region = comm_region_init(memory, out->ranks, 1, elems, 0);
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
    doctor_probe_run(&out->probe, run_ranks, NULL, seconds);
}
