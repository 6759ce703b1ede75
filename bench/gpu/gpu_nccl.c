// Sums over all GPUs of this machine whose bytes NCCL carries (--transport nccl), one result line for each size and codec: the median time of
// RUNS sums, and bytes of the values as bf16 by that time. One thread for each GPU; the time is rank 0's, from its first launch to the
// device's end, divided by the sums in between.
//
//   gpu_nccl [ranks]         ranks: as many as there are GPUs, at most MAX_RANKS
#include "bench/median.h"
#include "formats/error.h"
#include "kernels/clock.h"
#include "kernels/cuda/nccl.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_RANKS = 8, COLS = 8192, MOST_ROWS = 8192, RUNS = 9, WARM_UPS = 2, TIMEOUT_MS = 20000 };

static struct nccl_hello hellos[MAX_RANKS];
static struct error first_error; // under lock
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_barrier_t together;
static int tp_size;
static char gpu[64];

static int check(void *context, struct error *err)
{
    (void)context;
    pthread_mutex_lock(&lock);
    int code = first_error.code;
    if (code)
        *err = first_error;
    pthread_mutex_unlock(&lock);
    return code;
}

static int give_up(void *context, struct nccl_place place, bool late, struct error *err)
{
    (void)place, (void)late;
    pthread_mutex_lock(&lock);
    if (!first_error.code)
        first_error = *err;
    pthread_mutex_unlock(&lock);
    return check(context, err);
}

static void describe(void *context, struct nccl_place place, char text[NCCL_PLACE_BYTES])
{
    (void)context, (void)place;
    snprintf(text, NCCL_PLACE_BYTES, "a sum");
}

static int cuda_error(cudaError_t status, const char *what, struct error *err)
{
    return status == cudaSuccess ? 0 : error_set(err, ERR_GPU, "%s: %s", what, cudaGetErrorString(status));
}

// Microseconds of a sum: small ones many at a time, as layers follow each other.
static int time_sums(struct nccl *nccl, float *data, int64_t rows, enum wire wire, double *us, struct error *err)
{
    double times[RUNS];
    int repeats = rows <= 64 ? 32 : 4, rc = 0;
    for (int run = -WARM_UPS; run < RUNS && !rc; run++) {
        pthread_barrier_wait(&together);
        double begin_s = clock_now_s();
        for (int i = 0; i < repeats && !rc; i++)
            rc = nccl_all_reduce(nccl, data, NULL, rows, COLS, COLS, wire, (struct nccl_place){0, i}, err);
        rc = rc ? rc : nccl_wait(nccl, err);
        if (run >= 0)
            times[run] = 1e6 * (clock_now_s() - begin_s) / repeats;
    }
    if (!rc)
        *us = bench_median(times, RUNS);
    return rc;
}

static int run_sizes(struct nccl *nccl, int rank, float *data, struct error *err)
{
    static const enum wire wires[] = {WIRE_BF16, WIRE_S8X};
    for (size_t w = 0; w < sizeof wires / sizeof *wires; w++)
        for (int64_t rows = 1; rows <= MOST_ROWS; rows *= rows < 64 ? 8 : 2) {
            double us;
            int rc = time_sums(nccl, data, rows, wires[w], &us, err);
            if (rc)
                return rc;
            if (rank == 0)
                printf("gpu_all_reduce transport=nccl tp=%d wire=%s rows=%lld cols=%d bf16_bytes=%lld us=%.1f "
                       "gb_s=%.2f gpu=%s\n",
                       tp_size, wire_name(wires[w]), (long long)rows, COLS, (long long)rows * COLS * 2, us,
                       2e-3 * (double)rows * COLS / us, gpu);
        }
    return 0;
}

static int run_rank(int rank, struct error *err)
{
    struct nccl *nccl = NULL;
    struct nccl_options options = {.group = {NULL, rank, tp_size, check, give_up, describe},
                                   .timeout_ms = TIMEOUT_MS,
                                   .start_timeout_ms = 3 * TIMEOUT_MS,
                                   .max_rows = MOST_ROWS,
                                   .max_cols = COLS};
    float *data = NULL;
    int rc;
    if (!(rc = cuda_error(cudaSetDevice(rank), "choosing a device", err)) &&
        !(rc = cuda_error(cudaStreamCreateWithFlags(&options.stream, cudaStreamNonBlocking), "a stream", err)) &&
        !(rc = cuda_error(cudaMalloc((void **)&data, (size_t)MOST_ROWS * COLS * sizeof *data), "memory", err)) &&
        !(rc = cuda_error(cudaMemset(data, 0, (size_t)MOST_ROWS * COLS * sizeof *data), "clearing", err)))
        rc = nccl_open(&nccl, &options, &hellos[rank], err);
    if (rc)
        give_up(NULL, (struct nccl_place){0, 0}, false, err);
    pthread_barrier_wait(&together);
    if ((rc = check(NULL, err)) == 0 && (rc = nccl_connect(nccl, hellos, err)) == 0) {
        char text[256];
        nccl_describe(nccl, text, sizeof text);
        if (rank == 0)
            printf("# %s\n", text);
        rc = run_sizes(nccl, rank, data, err);
    }
    nccl_close(nccl);
    cudaFree(data);
    if (options.stream)
        cudaStreamDestroy(options.stream);
    return rc;
}

// After an error the others may wait at the barrier for a rank that does not come: the program ends here.
static void *rank_thread(void *argument)
{
    struct error err = {.code = 0};
    int rank = (int)((struct nccl_hello *)argument - hellos), code = run_rank(rank, &err);
    if (code) {
        fprintf(stderr, "gpu_nccl: %s\n", err.msg);
        exit(error_exit_code(code));
    }
    return NULL;
}

int main(int argc, char **argv)
{
    pthread_t threads[MAX_RANKS];
    struct cudaDeviceProp properties;
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess)
        count = 0;
    tp_size = argc > 1 ? atoi(argv[1]) : count < MAX_RANKS ? count : MAX_RANKS;
    if (tp_size < 2 || tp_size > count || tp_size > MAX_RANKS) {
        printf("# gpu_nccl: %d GPUs here; wanted at least two, and a rank for each\n", count);
        return 0;
    }
    if (cudaGetDeviceProperties(&properties, 0) == cudaSuccess)
        snprintf(gpu, sizeof gpu, "%.63s", properties.name);
    for (char *at = gpu; *at; at++)
        *at = *at == ' ' ? '-' : *at;
    pthread_barrier_init(&together, NULL, (unsigned)tp_size);
    for (int rank = 0; rank < tp_size; rank++)
        if (pthread_create(&threads[rank], NULL, rank_thread, &hellos[rank]) != 0)
            exit(1);
    for (int rank = 0; rank < tp_size; rank++)
        pthread_join(threads[rank], NULL);
    return 0;
}
