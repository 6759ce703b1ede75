// What does one all_reduce cost? One line for each codec, size, number of ranks, kind of rank, and with or without a
// foreign busy process.
//
//   us          median over rounds of the time per all_reduce, slowest rank of the round; best: the fastest round
//   work_us     busy work of every rank before each all_reduce, not counted in us: 0 shows the collective alone, more
//               a decode step, where a foreign busy process may cost its share of the cores and no more
//   over        shm: shared memory; common: the same, from parts that lie where all ranks read them, added up by each (comm_post_part); tcp:
//               sockets over the loopback device
//   rows        1: as in decode; 256: as in a step of prefill, in pieces
//   wire_bytes  what one rank writes for one all_reduce: its groups for the owners and its own sums
//
// How much of a model's decode that is, `tpengine bench` tells: exchange_us, exchange_share.
#include "engine/comm_tcp.h"
#include "kernels/futex.h"

#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>

enum { MAX_RANKS = 8, ROUNDS = 15, ROUND_NS = 12 * 1000000, MAX_FLOATS = 256 * 2048 };

struct bench {
    int tp_size, rows, cols, work_us;
    bool processes, busy, sockets, common;
    enum wire wire;
    int calls; // of a round
    struct comm_region *region;
    float *parts;                        // shared: [ranks][2][MAX_FLOATS]
    int fds[MAX_RANKS][MAX_RANKS];       // of sockets: [rank][to]
    int64_t round_ns[MAX_RANKS][ROUNDS]; // shared
};

struct rank {
    struct bench *bench;
    int rank;
    pthread_t thread;
    pid_t pid;
};

static void work(int64_t work_ns)
{
    for (int64_t end_ns = clock_now_ns() + work_ns; clock_now_ns() < end_ns;)
        cpu_relax();
}

static void connect_pair(int *a, int *b)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t bytes = sizeof address;
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    *a = socket(AF_INET, SOCK_STREAM, 0);
    if (bind(listener, (struct sockaddr *)&address, bytes) || listen(listener, 1) ||
        getsockname(listener, (struct sockaddr *)&address, &bytes) || connect(*a, (struct sockaddr *)&address, bytes) ||
        (*b = accept(listener, NULL, NULL)) < 0) {
        perror("bench_comm: no connection over the loopback");
        exit(1);
    }
    close(listener);
}

static void connect_all(struct bench *bench)
{
    for (int a = 0; a < bench->tp_size; a++)
        for (int b = 0; b < a; b++)
            connect_pair(&bench->fds[a][b], &bench->fds[b][a]);
}

// but: a rank that keeps its own; -1: none does
static void close_all(struct bench *bench, int but)
{
    for (int a = 0; a < bench->tp_size; a++)
        for (int b = 0; b < bench->tp_size && a != but; b++)
            if (a != b)
                close(bench->fds[a][b]);
}

static int open_end(struct comm **comm, struct bench *bench, int rank, struct error *err)
{
    if (!bench->sockets)
        return comm_open(comm, bench->region, rank, 60000, err);
    uint64_t bytes = comm_region_bytes(bench->tp_size, 1, MAX_FLOATS, 0);
    void *own = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (own == MAP_FAILED)
        return error_set(err, ERR_MEMORY, "no memory for rank %d", rank);
    close_all(bench, rank);
    return comm_open_sockets(comm, comm_region_init(own, bench->tp_size, 1, MAX_FLOATS, 0), bench->fds[rank], rank,
                             60000, err);
}

static const float *part_of(const struct bench *bench, int rank, int set)
{
    return bench->parts + (2 * rank + set) * MAX_FLOATS;
}

// The sum of this call's parts is the next call's part of this rank.
static int sum_common(struct bench *bench, struct comm *comm, int rank, int call, struct error *err)
{
    uint32_t part;
    float *sum = (float *)(uintptr_t)part_of(bench, rank, (call + 1) % 2);
    int rc = comm_post_part(comm, bench->rows, bench->cols, bench->wire, &part, err);
    if (rc || (rc = comm_wait_parts(comm, part, err)))
        return rc;
    for (int at = 0; at < bench->rows * bench->cols; at += WIRE_GROUP) {
        const float *parts[MAX_RANKS];
        for (int r = 0; r < bench->tp_size; r++)
            parts[r] = part_of(bench, r, call % 2) + at;
        wire_sum_group(sum + at, parts, at % bench->cols / WIRE_GROUP % bench->tp_size, bench->tp_size, WIRE_GROUP,
                       bench->wire);
    }
    return 0;
}

static int sum_once(struct bench *bench, struct comm *comm, int rank, float *data, int call, struct error *err)
{
    if (bench->common)
        return sum_common(bench, comm, rank, call, err);
    return comm_all_reduce(comm, data, bench->rows, bench->cols, bench->cols, bench->wire, NULL, NULL, err);
}

static void *run_rank(void *arg)
{
    struct rank *self = arg;
    struct bench *bench = self->bench;
    struct comm *comm;
    struct error err;
    static _Thread_local float data[MAX_FLOATS];
    if (open_end(&comm, bench, self->rank, &err))
        goto fail;
    for (int i = 0; i < bench->rows * bench->cols; i++)
        data[i] = (float)(i % 17) * 0.01f;
    for (int round = -1; round < ROUNDS; round++) { // the first warms up
        if (comm_barrier(comm, &err))
            goto fail;
        int64_t start_ns = clock_now_ns();
        for (int call = 0; call < bench->calls; call++) {
            if (bench->work_us)
                work((int64_t)bench->work_us * 1000);
            if (sum_once(bench, comm, self->rank, data, call, &err))
                goto fail;
        }
        if (round >= 0)
            bench->round_ns[self->rank][round] = clock_now_ns() - start_ns;
    }
    comm_close(comm);
    return NULL;
fail:
    fprintf(stderr, "bench_comm: %s\n", err.msg);
    exit(1);
}

static pid_t start_process(void *(*body)(void *), void *arg)
{
    pid_t pid = fork();
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        body(arg);
        _exit(0);
    }
    return pid;
}

static void *be_busy(void *arg)
{
    setsid(); // the kernel shares cores between sessions first: a program in another terminal
    for (;;)
        cpu_relax();
    return arg;
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static uint64_t wire_bytes(const struct bench *bench)
{
    uint64_t groups = wire_groups((uint64_t)bench->cols),
             own = (groups + (uint64_t)bench->tp_size - 1) / (uint64_t)bench->tp_size;
    return (uint64_t)bench->rows * (groups - own + own) * wire_group_bytes(bench->wire);
}

static void run_bench(struct bench shape)
{
    uint64_t region_bytes = (comm_region_bytes(shape.tp_size, 1, MAX_FLOATS, 0) + 4095) / 4096 * 4096,
             parts_bytes = 2 * (uint64_t)shape.tp_size * MAX_FLOATS * sizeof(float),
             bytes = sizeof shape + 4096 + region_bytes + parts_bytes;
    uint8_t *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        exit(1);
    uint64_t offset = (sizeof shape + 4095) / 4096 * 4096;
    struct bench *bench = (struct bench *)memory;
    *bench = shape;
    bench->region = comm_region_init(memory + offset, shape.tp_size, 1, MAX_FLOATS, 0);
    bench->parts = (float *)(void *)(memory + offset + region_bytes);
    bench->calls = ROUND_NS / ((shape.work_us + 20 * shape.rows) * 1000) + 1;
    if (shape.sockets)
        connect_all(bench);
    fflush(stdout);
    pid_t foreign = shape.busy ? start_process(be_busy, NULL) : 0;
    struct rank ranks[MAX_RANKS];
    for (int r = 0; r < shape.tp_size; r++) {
        ranks[r] = (struct rank){.bench = bench, .rank = r};
        if (shape.processes)
            ranks[r].pid = start_process(run_rank, &ranks[r]);
        else if (pthread_create(&ranks[r].thread, NULL, run_rank, &ranks[r]))
            exit(1);
    }
    if (shape.sockets)
        close_all(bench, -1);
    for (int r = 0; r < shape.tp_size; r++) {
        int status = 0;
        if (shape.processes)
            waitpid(ranks[r].pid, &status, 0);
        else
            pthread_join(ranks[r].thread, NULL);
        if (status)
            exit(1);
    }
    if (foreign) {
        kill(foreign, SIGKILL);
        waitpid(foreign, NULL, 0);
    }
    double us[ROUNDS];
    for (int round = 0; round < ROUNDS; round++) {
        int64_t slowest_ns = 0;
        for (int r = 0; r < shape.tp_size; r++)
            if (bench->round_ns[r][round] > slowest_ns)
                slowest_ns = bench->round_ns[r][round];
        us[round] = (double)slowest_ns / 1000 / bench->calls - shape.work_us;
    }
    qsort(us, ROUNDS, sizeof *us, compare);
    printf("all_reduce ranks=%d as=%s over=%s wire=%s rows=%d floats=%d foreign_busy=%d work_us=%d us=%.1f best=%.1f "
           "wire_bytes=%llu\n",
           shape.tp_size, shape.processes ? "processes" : "threads",
           shape.sockets  ? "tcp"
           : shape.common ? "common"
                          : "shm",
           wire_name(shape.wire), shape.rows, shape.cols, shape.busy, shape.work_us, us[ROUNDS / 2], us[0],
           (unsigned long long)wire_bytes(&shape));
    munmap(memory, bytes);
}

int main(void)
{
    for (int busy = 0; busy < 2; busy++)
        for (int tp_size = 2; tp_size <= 4; tp_size += 2)
            for (int processes = 0; processes < 2; processes++) {
                for (int cols = 2048; cols <= 8192; cols *= 2)
                    run_bench((struct bench){.tp_size = tp_size,
                                             .rows = 1,
                                             .cols = cols,
                                             .processes = processes,
                                             .busy = busy,
                                             .common = true,
                                             .wire = WIRE_BF16});
                run_bench((struct bench){.tp_size = tp_size,
                                         .rows = 256,
                                         .cols = 2048,
                                         .processes = processes,
                                         .busy = busy,
                                         .common = true,
                                         .wire = WIRE_BF16});
                for (int cols = 2048; cols <= 8192; cols *= 2)
                    for (int wire = 0; wire < WIRE_COUNT; wire++)
                        run_bench((struct bench){.tp_size = tp_size,
                                                 .rows = 1,
                                                 .cols = cols,
                                                 .processes = processes,
                                                 .busy = busy,
                                                 .wire = (enum wire)wire});
                run_bench((struct bench){
                    .tp_size = tp_size, .rows = 1, .cols = 4096, .processes = processes, .busy = busy, .work_us = 300});
                run_bench((struct bench){
                    .tp_size = tp_size, .rows = 256, .cols = 2048, .processes = processes, .busy = busy});
                run_bench((struct bench){.tp_size = tp_size,
                                         .rows = 256,
                                         .cols = 2048,
                                         .processes = processes,
                                         .busy = busy,
                                         .work_us = 3000});
            }
    for (int tp_size = 2; tp_size <= 4; tp_size += 2)
        for (int rows = 1; rows <= 256; rows += 255)
            for (int wire = 0; wire < WIRE_COUNT; wire++)
                run_bench((struct bench){.tp_size = tp_size,
                                         .rows = rows,
                                         .cols = rows == 1 ? 4096 : 2048,
                                         .processes = true,
                                         .sockets = true,
                                         .wire = (enum wire)wire});
    return 0;
}
