// The transport "nccl" (kernels/cuda/nccl.h) over a library in NCCL's place (tests/nccl): the bits of comm_all_reduce on every rank, as threads
// and as processes; and every fault ends every rank within its deadline, by ncclCommAbort, with a sentence that names rank, operation and
// layer. Where the real library is, its functions are looked up too.
#include "tests/device/cuda_test.h"

extern "C" {
#include "engine/comm.h"
#include "engine/comm_rows.h"
#include "kernels/clock.h"
}
#include "kernels/cuda/nccl.h"
#include "kernels/cuda/nccl_library.h"
#include "tests/nccl/stand_in.h"

#include <dlfcn.h>
#include <initializer_list>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MAX_RANKS = 8, NEVER_RETURNED = -99, TIMEOUT_MS = 300, MESSAGES = 3 };

static struct stand_in *stand_in;
static char stand_in_file[4096];

// ---- ranks ------------------------------------------------------------------------------------------------------------------

struct rank;
typedef int rank_body(struct rank *rank, struct error *err);

struct result {
    int code;
    struct error error;
    double seconds;
    bool endless; // nccl_close has left what does not end
};

// What the ranks of a run have in common; shared memory.
struct run {
    rank_body *body;
    struct comm_region *region;
    struct result results[MAX_RANKS];
    int tp_size;
    bool processes, same_gpu;
    int64_t rows, cols, max_rows;
    enum wire wire;
    bool feeds;
    int dies, dies_at; // this rank does not begin this message
};

struct rank {
    struct run *run;
    int number;
    struct comm *comm;
    cudaStream_t stream;
    struct nccl *nccl;
};

static int check(void *context, struct error *err)
{
    struct rank *rank = (struct rank *)context;
    int of = 0;
    if (!comm_region_aborted(rank->run->region))
        return 0;
    while (!comm_region_error(rank->run->region, &of, err))
        usleep(100);
    return err->code;
}

static int give_up(void *context, struct nccl_place place, bool late, struct error *err)
{
    struct rank *rank = (struct rank *)context;
    (void)place, (void)late;
    comm_region_abort(rank->run->region, rank->number, err);
    return check(context, err);
}

static void describe(void *context, struct nccl_place place, char text[NCCL_PLACE_BYTES])
{
    (void)context;
    snprintf(text, NCCL_PLACE_BYTES, "all_reduce of layer %d (%s)", place.layer,
             comm_operation_name((enum comm_operation)place.operation));
}

static int connect_rank(struct rank *rank, struct error *err)
{
    struct nccl_hello mine, all[MAX_RANKS];
    struct nccl_options options = {};
    options.library = stand_in_file;
    options.group = {rank, rank->number, rank->run->tp_size, check, give_up, describe};
    options.timeout_ms = TIMEOUT_MS, options.start_timeout_ms = TIMEOUT_MS;
    options.max_rows = rank->run->max_rows, options.max_cols = rank->run->cols;
    options.stream = rank->stream;
    int rc = nccl_open(&rank->nccl, &options, &mine, err);
    if (!rc)
        rc = comm_all_gather(rank->comm, all, &mine, sizeof mine, err);
    return rc ? rc : nccl_connect(rank->nccl, all, err);
}

static void *run_rank(void *argument)
{
    struct rank *rank = (struct rank *)argument;
    struct result *result = &rank->run->results[rank->number];
    struct error err = {};
    double start_s = clock_now_s();
    int code = comm_open(&rank->comm, rank->run->region, rank->number, 60 * TIMEOUT_MS, &err);
    if (!code) {
        if (cudaSetDevice(rank->run->same_gpu ? 0 : rank->number) != cudaSuccess ||
            cudaStreamCreateWithFlags(&rank->stream, cudaStreamNonBlocking) != cudaSuccess)
            code = error_set(&err, ERR_OTHER, "no device");
        code = code ? code : rank->run->body(rank, &err);
        result->endless = !nccl_close(rank->nccl);
        if (!result->endless)
            cudaStreamDestroy(rank->stream);
        comm_close(rank->comm);
    }
    result->error = err;
    result->seconds = clock_now_s() - start_s;
    result->code = code;
    return NULL;
}

static void *map_shared(size_t bytes)
{
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    assert_true(memory != MAP_FAILED);
    return memory;
}

static void wait_for_processes(struct run *run, const pid_t *pids)
{
    for (int left = run->tp_size; left > 0; left--) {
        int status = 0, number = 0;
        pid_t ended = wait(&status);
        while (number < run->tp_size && pids[number] != ended)
            number++;
        assert_true(number < run->tp_size);
        if (WIFSIGNALED(status)) { // as the engine's parent does
            struct error err;
            (error_set)(&err, ERR_RANK, "rank %d was ended by signal %d", number, WTERMSIG(status));
            comm_region_abort(run->region, number, &err);
        }
    }
}

static void run_ranks(struct run *run)
{
    uint64_t elems = (uint64_t)(run->rows * run->cols), bytes = comm_region_bytes(run->tp_size, 1, elems, 0);
    void *memory = map_shared(bytes);
    run->region = comm_region_init(memory, run->tp_size, 1, elems, 0);
    struct rank ranks[MAX_RANKS] = {};
    pthread_t threads[MAX_RANKS];
    pid_t pids[MAX_RANKS];
    for (int r = 0; r < run->tp_size; r++) {
        ranks[r].run = run, ranks[r].number = r;
        run->results[r].code = NEVER_RETURNED;
        if (!run->processes) {
            assert_int_equal(pthread_create(&threads[r], NULL, run_rank, &ranks[r]), 0);
            continue;
        }
        pids[r] = fork();
        assert_true(pids[r] >= 0);
        if (pids[r] == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            emulator_new_process(); // tests before this one have made calls
            run_rank(&ranks[r]);
            _exit(0);
        }
    }
    for (int r = 0; r < run->tp_size && !run->processes; r++)
        pthread_join(threads[r], NULL);
    if (run->processes)
        wait_for_processes(run, pids);
    munmap(memory, bytes);
}

static struct run *new_run(rank_body *body, int tp_size, int64_t rows, int64_t cols, enum wire wire)
{
    static struct run *run;
    if (!run)
        run = (struct run *)map_shared(sizeof *run);
    *run = {};
    run->body = body, run->tp_size = tp_size, run->rows = rows, run->cols = cols, run->wire = wire;
    run->max_rows = rows;
    run->dies = -1;
    int version = stand_in->version;
    memset(stand_in, 0, sizeof *stand_in);
    stand_in->version = version;
    return run;
}

static int sum_of(const int *counts)
{
    int sum = 0;
    for (int r = 0; r < STAND_IN_RANKS; r++)
        sum += counts[r];
    return sum;
}

// ---- bits -------------------------------------------------------------------------------------------------------------------

static float value_at(int rank, int message, int64_t row, int64_t col)
{
    uint32_t h = (uint32_t)((rank * 31 + message) * 1000003 + row * 7919 + col) * 2654435761u;
    float x = (float)(int32_t)(h ^ h >> 15) * 0x1p-31f * (h % 61 == 0 ? 50.0f : 1.0f);
    switch (row % 6) {
    case 1:
        return rank == 1 && col % 150 == 9 ? f32_from_bits(0xffc00123) : x;
    case 2:
        return col % 200 == 11 ? (rank ? INFINITY : -INFINITY) : x;
    case 3:
        return 0;
    case 4:
        return x * 0x1p-128f;
    }
    return x;
}

// Messages, one after the other without a wait between them, and what error feedback keeps of them: of the device, and made by the CPU.
struct messages {
    int64_t elems; // of one
    float *cpu, *gpu[MESSAGES];
    uint16_t *cpu_lost, *gpu_lost;
};

static void fill(const struct rank *rank, float *to, int m)
{
    const struct run *run = rank->run;
    for (int64_t i = 0; i < run->rows * run->cols; i++)
        to[i] = value_at(rank->number, m, i / run->cols, i % run->cols);
}

static int make_messages(struct messages *all, const struct rank *rank, struct error *err)
{
    *all = {};
    all->elems = rank->run->rows * rank->run->cols;
    all->cpu = (float *)malloc((size_t)all->elems * 4);
    all->cpu_lost = (uint16_t *)calloc((size_t)all->elems, 2);
    if (!all->cpu || !all->cpu_lost || cudaMalloc((void **)&all->gpu_lost, (size_t)all->elems * 2) != cudaSuccess)
        return error_set(err, ERR_MEMORY, "no memory");
    memset(all->gpu_lost, 0, (size_t)all->elems * 2);
    for (int m = 0; m < MESSAGES; m++) {
        if (cudaMalloc((void **)&all->gpu[m], (size_t)all->elems * 4) != cudaSuccess)
            return error_set(err, ERR_MEMORY, "no memory");
        fill(rank, all->gpu[m], m);
    }
    return 0;
}

static int same_message(const struct messages *all, int m, struct error *err)
{
    for (int64_t i = 0; i < all->elems; i++)
        if (f32_bits(all->cpu[i]) != f32_bits(all->gpu[m][i]))
            return error_set(err, ERR_OTHER, "message %d, value %lld is %08x, not %08x", m, (long long)i,
                             f32_bits(all->gpu[m][i]), f32_bits(all->cpu[i]));
    return 0;
}

static int same_losses(const struct messages *all, struct error *err)
{
    return memcmp(all->cpu_lost, all->gpu_lost, (size_t)all->elems * 2) == 0
               ? 0
               : error_set(err, ERR_OTHER, "what error feedback keeps differs");
}

static void free_messages(const struct messages *all)
{
    for (float *message : all->gpu)
        cudaFree(message);
    cudaFree(all->gpu_lost);
    free(all->cpu), free(all->cpu_lost);
}

static int same_bits(struct rank *rank, struct error *err)
{
    struct run *run = rank->run;
    struct messages all;
    int rc = make_messages(&all, rank, err);
    rc = rc ? rc : connect_rank(rank, err);
    if (!rc) // of nothing
        rc = nccl_all_reduce(rank->nccl, NULL, NULL, run->rows, 0, 0, run->wire, nccl_place{OP_ATTENTION, 0}, err);
    for (int m = 0; m < MESSAGES && !rc; m++)
        rc = nccl_all_reduce(rank->nccl, all.gpu[m], run->feeds ? all.gpu_lost : NULL, run->rows, run->cols, run->cols,
                             run->wire, nccl_place{OP_ATTENTION, m}, err);
    rc = rc ? rc : nccl_wait(rank->nccl, err);
    for (int m = 0; m < MESSAGES && !rc; m++) {
        fill(rank, all.cpu, m);
        comm_at(rank->comm, OP_ATTENTION, m);
        rc = comm_all_reduce(rank->comm, all.cpu, run->rows, run->cols, run->cols, run->wire,
                             run->feeds ? all.cpu_lost : NULL, NULL, err);
        rc = rc ? rc : same_message(&all, m, err);
    }
    rc = rc || !run->feeds ? rc : same_losses(&all, err);
    uint64_t share = (uint64_t)((run->cols + 127) / 128 + run->tp_size - 1) / (uint64_t)run->tp_size *
                     (uint64_t)run->rows * wire_group_bytes(run->wire);
    if (!rc && nccl_sent_bytes(rank->nccl) != MESSAGES * 2 * share * (uint64_t)(run->tp_size - 1))
        rc = error_set(err, ERR_OTHER, "%llu bytes were sent", (unsigned long long)nccl_sent_bytes(rank->nccl));
    free_messages(&all);
    return rc;
}

// The halves, whose rows have owners. Of the last message what the owners have is looked at.
static int same_rows(struct rank *rank, struct error *err)
{
    struct run *run = rank->run;
    struct messages all;
    int rc = make_messages(&all, rank, err);
    rc = rc ? rc : connect_rank(rank, err);
    for (int m = 0; m < MESSAGES && !rc; m++) {
        struct nccl_rows rows = {all.gpu[m], run->rows, run->cols, m % run->tp_size, run->wire};
        struct nccl_place place = {OP_ATTENTION, m};
        rc = nccl_reduce_scatter_rows(rank->nccl, &rows, run->feeds ? all.gpu_lost : NULL, place, err);
        if (!rc && m < MESSAGES - 1)
            rc = nccl_all_gather_rows(rank->nccl, &rows, place, err);
    }
    rc = rc ? rc : nccl_wait(rank->nccl, err);
    for (int m = 0; m < MESSAGES && !rc; m++) {
        fill(rank, all.cpu, m);
        comm_at(rank->comm, OP_ATTENTION, m);
        rc = comm_reduce_scatter_rows(rank->comm, all.cpu, run->rows, run->cols, m % run->tp_size, run->wire,
                                      run->feeds ? all.cpu_lost : NULL, NULL, err);
        if (!rc && m < MESSAGES - 1)
            rc =
                comm_all_gather_rows(rank->comm, all.cpu, run->rows, run->cols, m % run->tp_size, run->wire, NULL, err);
        rc = rc ? rc : same_message(&all, m, err);
    }
    rc = rc || !run->feeds ? rc : same_losses(&all, err);
    free_messages(&all);
    return rc;
}

static void expect_success(const struct run *run, const char *what)
{
    for (int r = 0; r < run->tp_size; r++)
        if (run->results[r].code)
            fail_msg("%s, tp %d, %s, rank %d: code %d: %s", what, run->tp_size, wire_name(run->wire), r,
                     run->results[r].code, run->results[r].error.msg);
    assert_int_equal(sum_of(stand_in->destroys), run->tp_size);
    assert_int_equal(sum_of(stand_in->aborts), 0);
}

static void test_bits(void **state)
{
    (void)state;
    static const int sizes[] = {2, 4, 8};
    for (int tp_size : sizes)
        for (int wire = 0; wire < WIRE_COUNT; wire++) {
            struct run *run = new_run(same_bits, tp_size, 6, 1024, (enum wire)wire);
            run->feeds = wire % 2 != 0;
            run_ranks(run);
            expect_success(run, "whole messages");
        }
}

static void test_bits_of_pieces(void **state)
{
    (void)state;
    for (int wire = 0; wire < WIRE_COUNT; wire++) {
        struct run *run = new_run(same_bits, 2, 7, 300, (enum wire)wire);
        run->max_rows = 1; // room for one row of f32
        run->feeds = wire % 2 == 0;
        run_ranks(run);
        expect_success(run, "pieces");
    }
}

static void test_bits_of_rows(void **state)
{
    (void)state;
    static const int sizes[] = {2, 3, 8};
    for (int tp_size : sizes)
        for (int wire = 0; wire < WIRE_COUNT; wire++)
            for (bool pieces : {false, true}) {
                if (pieces && tp_size == 8)
                    continue;
                struct run *run = new_run(same_rows, tp_size, 13, 300, (enum wire)wire);
                run->feeds = wire % 2 == 0;
                run->max_rows = pieces ? 1 : run->rows; // room for one row of each owner
                run_ranks(run);
                expect_success(run, "rows");
            }
}

static void test_bits_of_processes(void **state)
{
    (void)state;
    struct run *run = new_run(same_bits, 4, 5, 640, WIRE_S8X);
    run->processes = true;
    run_ranks(run);
    expect_success(run, "processes");
}

// ---- faults -------------------------------------------------------------------------------------------------------------------

static int exchange(struct rank *rank, struct error *err)
{
    struct run *run = rank->run;
    float *data = NULL;
    int rc = connect_rank(rank, err);
    if (!rc && cudaMalloc((void **)&data, (size_t)(run->rows * run->cols) * 4) != cudaSuccess)
        rc = error_set(err, ERR_MEMORY, "no memory");
    for (int64_t i = 0; i < run->rows * run->cols && !rc; i++)
        data[i] = 1;
    for (int m = 0; m < MESSAGES && !rc; m++) {
        struct nccl_place place = {OP_MLP, 10 + m};
        if (rank->number == run->dies && m == run->dies_at) {
            rc = nccl_wait(rank->nccl, err); // its device has done what it was told
            if (run->processes)
                kill(getpid(), SIGKILL);
            while (!comm_region_aborted(run->region)) // it has stopped in something else
                usleep(1000);
        }
        rc = nccl_all_reduce(rank->nccl, data, NULL, run->rows, run->cols, run->cols, run->wire, place, err);
    }
    rc = rc ? rc : nccl_wait(rank->nccl, err);
    // Whoever has failed goes on failing, with the same words.
    struct error again;
    if (rc && rank->nccl && (nccl_wait(rank->nccl, &again) != rc || strcmp(again.msg, err->msg) != 0))
        rc = error_set(err, ERR_OTHER, "a second error: %.300s", again.msg);
    cudaFree(data);
    return rc;
}

static const struct fault_case {
    const char *name;
    enum stand_in_fault fault;
    int tp_size, rank, nth, code;
    const char *parts[4];
} faults[] = {
    {"an asynchronous error", FAULT_ASYNC_ERROR, 2, 1, 2, ERR_RANK, {"rank 1", "layer 11 (mlp)", "remote process"}},
    {"an early asynchronous error", FAULT_ASYNC_ERROR, 4, 2, 0, ERR_RANK, {"rank 2", "layer 10 (mlp)"}},
    {"a call that fails", FAULT_CALL, 4, 3, 3, ERR_GPU, {"rank 3", "layer 11 (mlp)", "gathering", "system error"}},
    {"a message that never moves", FAULT_STUCK, 4, 1, 2, ERR_RANK, {"rank ", "layer 11 (mlp)", "within 0.3 s"}},
    {"the first message never moves", FAULT_STUCK, 8, 5, 0, ERR_RANK, {"rank ", "layer 10 (mlp)", "within 0.3 s"}},
    {"an init that never completes",
     FAULT_NO_INIT,
     4,
     2,
     0,
     ERR_RANK,
     {"rank ", "connect the 4 ranks", "within 0.3 s"}},
    {"a refused init", FAULT_DUPLICATE, 2, 1, 0, ERR_GPU, {"rank 1", "two ranks on one GPU", "--transport host"}},
    {"an abort that hangs", FAULT_ABORT_HANGS, 2, 1, 0, ERR_RANK, {"rank ", "layer 10 (mlp)", "within 0.3 s"}},
};

static void expect_failure(const struct run *run, const char *name, int code, const char *const *parts, int dead)
{
    for (int r = 0; r < run->tp_size; r++) {
        const struct result *result = &run->results[r];
        if (r == dead)
            continue;
        if (result->code != code)
            fail_msg("%s: rank %d: code %d, wanted %d: %s", name, r, result->code, code, result->error.msg);
        for (int i = 0; i < 4 && parts[i]; i++)
            if (!strstr(result->error.msg, parts[i]))
                fail_msg("%s: rank %d: \"%s\" does not hold \"%s\"", name, r, result->error.msg, parts[i]);
        if (strcmp(result->error.msg, run->results[r ? 0 : run->tp_size - 1].error.msg) != 0 && dead < 0)
            fail_msg("%s: the ranks say different things: %s", name, result->error.msg);
        if (!(result->seconds < 30))
            fail_msg("%s: rank %d took %.1f s", name, r, result->seconds);
        if (stand_in->aborts[r] != stand_in->opened[r] || stand_in->opened[r] != 1)
            fail_msg("%s: rank %d: %d communicators, %d aborts", name, r, stand_in->opened[r], stand_in->aborts[r]);
    }
    assert_int_equal(sum_of(stand_in->destroys), 0);
}

static void test_faults(void **state)
{
    (void)state;
    for (const struct fault_case &c : faults)
        for (int processes = c.fault == FAULT_ABORT_HANGS; processes < 2; processes++) {
            struct run *run = new_run(exchange, c.tp_size, 2, 512, WIRE_BF16);
            run->processes = processes;
            stand_in->fault = c.fault, stand_in->rank = c.rank, stand_in->nth = c.nth;
            run_ranks(run);
            expect_failure(run, c.name, c.code, c.parts, -1);
        }
}

static void test_a_rank_that_stops(void **state)
{
    (void)state;
    static const char *const parts[4] = {"rank ", "layer 11 (mlp)", "within 0.3 s"};
    struct run *run = new_run(exchange, 4, 2, 512, WIRE_S8X);
    run->dies = 2, run->dies_at = 1;
    run_ranks(run);
    expect_failure(run, "a rank that stops", ERR_RANK, parts, -1);
}

static void test_a_rank_that_dies(void **state)
{
    (void)state;
    static const char *const parts[4] = {"rank 1 was ended by signal 9"};
    for (int at = 0; at < MESSAGES; at++) {
        struct run *run = new_run(exchange, 4, 2, 512, WIRE_FP8);
        run->processes = true;
        run->dies = 1, run->dies_at = at;
        run_ranks(run);
        expect_failure(run, "a rank that dies", ERR_RANK, parts, 1);
        assert_int_equal(run->results[1].code, NEVER_RETURNED);
        assert_true(run->results[0].seconds < TIMEOUT_MS / 1000.0 + 10);
    }
}

// What not even an abort ends is left as it is, in time, and who closes is told.
static void test_what_never_ends(void **state)
{
    (void)state;
    static const char *const parts[4] = {"rank ", "layer 11 (mlp)", "within 0.3 s"};
    struct run *run = new_run(exchange, 2, 2, 512, WIRE_BF16);
    run->processes = true;
    stand_in->fault = FAULT_ENDLESS, stand_in->rank = 1, stand_in->nth = 2;
    run_ranks(run);
    expect_failure(run, "what never ends", ERR_RANK, parts, -1);
    assert_false(run->results[0].endless);
    assert_true(run->results[1].endless);
}

// Sums are done; only the end is not orderly.
static void test_an_end_that_never_comes(void **state)
{
    (void)state;
    struct run *run = new_run(exchange, 2, 1, 256, WIRE_F32);
    stand_in->fault = FAULT_NO_END, stand_in->rank = 1;
    run_ranks(run);
    assert_int_equal(run->results[0].code, 0);
    assert_int_equal(run->results[1].code, 0);
    assert_int_equal(stand_in->destroys[0], 1);
    assert_int_equal(stand_in->aborts[1], 1);
    assert_int_equal(stand_in->destroys[1], 0);
}

static void test_two_ranks_on_one_gpu(void **state)
{
    (void)state;
    static const char *const parts[] = {"ranks 0 and 1 have the same GPU (0000:01:00.0)", "--transport host"};
    struct run *run = new_run(exchange, 2, 1, 256, WIRE_F32);
    run->same_gpu = true;
    run_ranks(run);
    for (int r = 0; r < 2; r++) {
        assert_int_equal(run->results[r].code, ERR_GPU);
        assert_non_null(strstr(run->results[r].error.msg, parts[0]));
        assert_non_null(strstr(run->results[r].error.msg, parts[1]));
    }
    assert_int_equal(sum_of(stand_in->opened), 0);
}

static int too_wide(struct rank *rank, struct error *err)
{
    int rc = connect_rank(rank, err);
    float *data = NULL;
    if (rc || cudaMalloc((void **)&data, 1024) != cudaSuccess)
        return rc ? rc : error_set(err, ERR_MEMORY, "no memory");
    rc = nccl_all_reduce(rank->nccl, data, NULL, 1, 100000, 100000, WIRE_F32, nccl_place{OP_MLP, 0}, err);
    cudaFree(data);
    return rc;
}

static void test_a_message_that_was_not_planned(void **state)
{
    (void)state;
    struct run *run = new_run(too_wide, 2, 1, 256, WIRE_F32);
    run_ranks(run);
    assert_int_equal(run->results[0].code, ERR_OTHER);
    assert_non_null(strstr(run->results[0].error.msg, "100000 columns"));
}

// Every call of the runtime that can fail is an error of all ranks.
static void test_errors_of_the_runtime(void **state)
{
    (void)state;
    static const char *const names[] = {"cudaMalloc", "cudaMallocHost", "cudaDeviceGetPCIBusId"};
    for (const char *name : names) {
        struct run *run = new_run(exchange, 1, 1, 256, WIRE_F32);
        emulator_fail_call(name, 0, cudaErrorMemoryAllocation);
        run_ranks(run);
        emulator_fail_call(NULL, 0, cudaSuccess);
        assert_true(run->results[0].code == ERR_MEMORY || run->results[0].code == ERR_GPU);
        assert_non_null(strstr(run->results[0].error.msg, "device 0"));
    }
}

// ---- the library --------------------------------------------------------------------------------------------------------------

static void expect_refusal(const char *file, const char *const *parts)
{
    struct nccl_library library;
    struct error err;
    assert_int_equal(nccl_library_open(&library, file, &err), ERR_GPU);
    for (; *parts; parts++)
        if (!strstr(err.msg, *parts))
            fail_msg("\"%s\" does not hold \"%s\"", err.msg, *parts);
}

static void test_libraries_that_are_refused(void **state)
{
    (void)state;
    static const char *const missing[] = {"--transport nccl", "/nowhere/libnccl.so.2", "--transport host", NULL};
    static const char *const other[] = {"libm.so.6 has no function ncclGetVersion", "2.18", "--transport host", NULL};
    static const char *const old[] = {"NCCL 2.10.5", "2.18 or later", "--transport host", NULL};
    static const char *const strange[] = {"version 30100", "below 3", NULL};
    expect_refusal("/nowhere/libnccl.so.2", missing);
    expect_refusal("libm.so.6", other);
    stand_in->version = 21005;
    expect_refusal(stand_in_file, old);
    stand_in->version = 30100;
    expect_refusal(stand_in_file, strange);
    stand_in->version = 22809;
}

static void test_advice_for_older_drivers(void **state)
{
    (void)state;
    struct nccl_library library;
    struct error err;
    unsetenv("NCCL_CUMEM_HOST_ENABLE");
    assert_int_equal(nccl_library_open(&library, stand_in_file, &err), 0);
    assert_string_equal(library.note, "");
    assert_string_equal(library.name, "NCCL 2.28.9");
    nccl_library_close(&library);
    setenv("EMULATED_DRIVER", "12080", 1);
    setenv("NCCL_CUMEM_HOST_ENABLE", "1", 1); // the user's word counts
    assert_int_equal(nccl_library_open(&library, stand_in_file, &err), 0);
    assert_string_equal(library.note, "");
    assert_string_equal(getenv("NCCL_CUMEM_HOST_ENABLE"), "1");
    nccl_library_close(&library);
    unsetenv("NCCL_CUMEM_HOST_ENABLE");
    assert_int_equal(nccl_library_open(&library, stand_in_file, &err), 0);
    assert_non_null(strstr(library.note, "NCCL_CUMEM_HOST_ENABLE=0"));
    assert_non_null(strstr(library.note, "12.8"));
    assert_string_equal(getenv("NCCL_CUMEM_HOST_ENABLE"), "0");
    nccl_library_close(&library);
    unsetenv("NCCL_CUMEM_HOST_ENABLE");
    unsetenv("EMULATED_DRIVER");
}

static void test_the_real_library(void **state)
{
    (void)state;
    static const char *const places[] = {"libnccl.so.2", "/usr/local/cuda/lib/libnccl.so.2",
                                         "/usr/local/cuda/lib64/libnccl.so.2"};
    struct nccl_library library;
    struct error err;
    for (const char *place : places) {
        void *there = dlopen(place, RTLD_LAZY | RTLD_LOCAL);
        if (!there)
            continue;
        int rc = nccl_library_open(&library, place, &err);
        if (rc)
            fail_msg("%s", err.msg);
        print_message("%s: %s\n", place, library.name);
        assert_string_equal(library.ncclGetErrorString_(ncclSuccess), "no error");
        nccl_library_close(&library);
        dlclose(there);
        return;
    }
    print_message("SKIP: no libnccl.so.2 here\n");
    skip();
}

static int load_stand_in(void **state)
{
    (void)state;
    ssize_t used = readlink("/proc/self/exe", stand_in_file, sizeof stand_in_file - 64);
    assert_true(used > 0);
    stand_in_file[used] = 0;
    strcpy(strrchr(stand_in_file, '/'), "/libnccl_stand_in.so");
    void *library = dlopen(stand_in_file, RTLD_NOW);
    if (!library)
        fail_msg("%s", dlerror());
    struct stand_in *(*entry)(void);
    *(void **)&entry = dlsym(library, STAND_IN_ENTRY);
    assert_non_null(entry);
    stand_in = entry();
    setenv("EMULATED_DEVICES", "8", 1);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bits),
        cmocka_unit_test(test_bits_of_pieces),
        cmocka_unit_test(test_bits_of_rows),
        cmocka_unit_test(test_bits_of_processes),
        cmocka_unit_test(test_faults),
        cmocka_unit_test(test_a_rank_that_stops),
        cmocka_unit_test(test_a_rank_that_dies),
        cmocka_unit_test(test_an_end_that_never_comes),
        cmocka_unit_test(test_what_never_ends),
        cmocka_unit_test(test_two_ranks_on_one_gpu),
        cmocka_unit_test(test_a_message_that_was_not_planned),
        cmocka_unit_test(test_errors_of_the_runtime),
        cmocka_unit_test(test_libraries_that_are_refused),
        cmocka_unit_test(test_advice_for_older_drivers),
        cmocka_unit_test(test_the_real_library),
    };
    return cmocka_run_group_tests(tests, load_stand_in, NULL);
}
