// What a sum over ranks takes here, by really running it between processes. See doctor.h.
#include "engine/doctor.h"

#include "engine/comm_select.h"
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
enum {
    ROUNDS = 10,
    MOST_ROWS = 512,
    MOST_COUNT = 32,
    ROUND_US = 2000,
    TIMEOUT_MS = 60000,
    ONE_SIZE_NS = 250 * 1000000
};

// ---- what CPU ranks and devices share ------------------------------------------------------------------------------

struct exchange_choice doctor_choice(const struct doctor_times *times, const struct doctor_size *size)
{
    enum phase phase = size->rows == 1 ? PHASE_DECODE : PHASE_PREFILL;
    return comm_select(times->transport, times->ranks, 2 * (uint64_t)(size->rows * DOCTOR_COLS), phase, size->wire);
}

// Microseconds of one of the sums, the slowest rank's; the same on all ranks.
static int time_round(double *us, struct comm *comm, const struct doctor_sums *sums, const struct doctor_size *size,
                      int count, struct error *err)
{
    double all_us[COMM_MAX_RANKS];
    int rc;
    if ((rc = sums->prepare(sums->arg, size, err)) || (rc = comm_barrier(comm, err)))
        return rc;
    int64_t begin_ns = clock_now_ns();
    if ((rc = sums->run(sums->arg, size, count, err)))
        return rc;
    double mine_us = 1e-3 * (double)(clock_now_ns() - begin_ns) / count;
    if ((rc = comm_all_gather(comm, all_us, &mine_us, sizeof mine_us, err)))
        return rc;
    *us = 0;
    for (int rank = 0; rank < comm_size(comm); rank++)
        *us = all_us[rank] > *us ? all_us[rank] : *us;
    return 0;
}

static int time_size(double *best_us, struct comm *comm, const struct doctor_sums *sums, const struct doctor_size *size,
                     struct error *err)
{
    int64_t end_ns = clock_now_ns() + ONE_SIZE_NS;
    double us = ROUND_US;
    *best_us = 0;
    for (int round = 0; round < ROUNDS; round++) { // the first warms up
        double fit = round < 2 ? 1 : 1 + ROUND_US / us;
        int rc = time_round(&us, comm, sums, size, fit < MOST_COUNT ? (int)fit : MOST_COUNT, err);
        if (rc || (round == 0 && sums->check && (rc = sums->check(sums->arg, size, err))))
            return rc;
        if (round > 0 && (*best_us == 0 || us < *best_us))
            *best_us = us;
        char enough = clock_now_ns() > end_ns && round > 0; // as rank 0 sees it
        if ((rc = comm_broadcast(comm, &enough, 1, 0, err)))
            return rc;
        if (enough)
            break;
    }
    return 0;
}

int doctor_time_sums(struct doctor_times *out, struct comm *comm, const struct doctor_sums *sums, struct error *err)
{
    for (int size = 0; size < DOCTOR_SIZES; size++) {
        double us;
        int rc = time_size(&us, comm, sums, &doctor_sizes[size], err);
        if (rc)
            return rc;
        if (comm_rank(comm) == 0)
            out->us[size] = us;
    }
    return 0;
}

void doctor_run_ranks(struct doctor_times *out, int (*rank_main)(void *arg, int rank, struct error *err), void *arg)
{
    pid_t pids[DOCTOR_RANKS] = {0};
    struct error err;
    snprintf(out->probe.at, sizeof out->probe.at, "sums between %d processes", out->ranks);
    for (int rank = 1; rank < out->ranks; rank++) {
        pids[rank] = fork();
        if (pids[rank] == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            _exit(rank_main(arg, rank, &err) ? 1 : 0);
        }
    }
    if (rank_main(arg, 0, &err))
        out->probe.err = err;
    for (int rank = 1; rank < out->ranks; rank++)
        if (pids[rank] > 0)
            waitpid(pids[rank], NULL, 0);
    out->probe.at[0] = 0;
}

// ---- between processors --------------------------------------------------------------------------------------------

struct run {
    struct doctor_times *out;
    void *memory;                        // a region that all share; over sockets each rank's own
    uint64_t elems;                      // of a rank's data
    float *data;                         // [ranks][2][elems]
    int fds[DOCTOR_RANKS][DOCTOR_RANKS]; // of TRANSPORT_TCP
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
static int open_end(struct comm **comm, struct run *run, int rank, struct error *err)
{
    int ranks = run->out->ranks;
    if (run->out->transport == TRANSPORT_SHM)
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

struct cpu_rank {
    struct run *run;
    struct comm *comm;
    int rank, set; // set: of the parts that are added up next
};

static float *set_of(const struct run *run, int rank, int set)
{
    return run->data + ((uint64_t)(2 * rank) + (uint64_t)set) * run->elems;
}

static int prepare_values(void *arg, const struct doctor_size *size, struct error *err)
{
    struct cpu_rank *r = arg;
    float *data = set_of(r->run, r->rank, 0);
    (void)err;
    r->set = 0;
    for (int64_t i = 0; i < size->rows * DOCTOR_COLS; i++)
        data[i] = doctor_value(r->rank, i % DOCTOR_COLS);
    return 0;
}

// From parts that lie where all ranks read them, as ranks of one host add up; the sum is this rank's next part.
static int sum_in_common(struct cpu_rank *r, const struct doctor_size *size, struct error *err)
{
    int ranks = r->run->out->ranks, rc;
    float *sum = set_of(r->run, r->rank, 1 - r->set);
    uint32_t part;
    if ((rc = comm_post_part(r->comm, size->rows, DOCTOR_COLS, size->wire, &part, err)) ||
        (rc = comm_wait_parts(r->comm, part, err)))
        return rc;
    for (int64_t at = 0; at < size->rows * DOCTOR_COLS; at += WIRE_GROUP) {
        const float *parts[DOCTOR_RANKS];
        for (int other = 0; other < ranks; other++)
            parts[other] = set_of(r->run, other, r->set) + at;
        wire_sum_group(sum + at, parts, (int)(at % DOCTOR_COLS / WIRE_GROUP % ranks), ranks, WIRE_GROUP, size->wire);
    }
    r->set = 1 - r->set;
    return 0;
}

static int add_up(void *arg, const struct doctor_size *size, int count, struct error *err)
{
    struct cpu_rank *r = arg;
    bool in_common = doctor_choice(r->run->out, size).algorithm == ALGORITHM_ONE_SHOT;
    int rc = 0;
    for (int i = 0; i < count && !rc; i++)
        rc = in_common ? sum_in_common(r, size, err)
                       : comm_all_reduce(r->comm, set_of(r->run, r->rank, 0), size->rows, DOCTOR_COLS, DOCTOR_COLS,
                                         size->wire, NULL, NULL, err);
    return rc;
}

static int run_rank(void *arg, int rank, struct error *err)
{
    struct cpu_rank r = {.run = arg, .rank = rank};
    const struct doctor_sums sums = {.prepare = prepare_values, .run = add_up, .arg = &r};
    int rc = open_end(&r.comm, r.run, rank, err);
    if (!rc)
        rc = doctor_time_sums(r.run->out, r.comm, &sums, err);
    comm_close(r.comm);
    return rc;
}

static int prepare_run(struct run *run, struct error *err)
{
    int ranks = run->out->ranks;
    run->elems = (uint64_t)MOST_ROWS * DOCTOR_COLS;
    run->data = doctor_probe_new(2 * (size_t)ranks * run->elems * sizeof(float));
    run->memory = doctor_probe_new(comm_region_bytes(ranks, 1, run->elems, 0));
    if (!run->data || !run->memory)
        return error_set(err, ERR_MEMORY, "no memory for %d ranks", ranks);
    if (run->out->transport == TRANSPORT_TCP)
        return connect_all(run, ranks, err);
    comm_region_init(run->memory, ranks, 1, run->elems, 0);
    return 0;
}

static void run_ranks(struct probe *probe, void *arg)
{
    struct run run = {.out = (struct doctor_times *)(void *)probe};
    (void)arg;
    if (!prepare_run(&run, &probe->err))
        doctor_run_ranks(run.out, run_rank, &run);
}

void doctor_links_measure(struct doctor_times *out, enum transport transport, int ranks, double seconds)
{
    out->transport = transport;
    out->ranks = ranks;
    out->devices = 0;
    if (ranks < 2 || ranks > DOCTOR_RANKS || (transport != TRANSPORT_SHM && transport != TRANSPORT_TCP))
        error_set(&out->probe.err, ERR_USAGE, "%s between %d ranks is not measured here", transport_name(transport),
                  ranks);
    else
        doctor_probe_run(&out->probe, run_ranks, NULL, seconds);
}
