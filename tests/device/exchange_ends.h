// One rank's end of exchanges between devices, as the engine opens it, for tests whose ranks are threads or processes; and a sum held to the CPU's.
#ifndef TPSHARD_TESTS_DEVICE_EXCHANGE_ENDS_H
#define TPSHARD_TESTS_DEVICE_EXCHANGE_ENDS_H

#include "tests/device/cuda_test.h"
#include "tests/device/exchange_messages.h"

extern "C" {
#include "engine/comm.h"
#include "kernels/clock.h"
#include "kernels/cuda/exchange_host.h"
}

#include <string>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

enum { TEST_RANKS = 8, MAX_ROWS = 300, HIDDEN = 1024, SCRATCH_BYTES = 64 << 10 };

// ---- the ranks -----------------------------------------------------------------------------------------------------

// What a test runs over.
struct way {
    enum transport transport;
    int devices; // rank r has device r modulo so many, or fewer where there are fewer
};

struct group {
    const struct way *way;
    int tp_size, memory;
    int timeout_ms, host_timeout_ms; // of the devices' waits, of the hosts'
    bool feedback;
    uint64_t region_bytes, comm_bytes;
    struct comm_region *comm_region;
    void *comm_memory;
};

// Memory that all ranks share, threads or processes.
static inline void open_group(struct group *g, const struct way *way, int tp_size, int timeout_ms, bool feedback)
{
    *g = {};
    g->way = way;
    g->tp_size = tp_size;
    g->timeout_ms = g->host_timeout_ms = timeout_ms;
    g->feedback = feedback;
    g->region_bytes = exchange_region_bytes(tp_size);
    g->memory = memfd_create("exchange", MFD_CLOEXEC);
    assert_true(g->memory >= 0);
    assert_int_equal(ftruncate(g->memory, (off_t)g->region_bytes), 0);
    g->comm_bytes = comm_region_bytes(tp_size, 1, MAX_ROWS * HIDDEN, 0);
    g->comm_memory = mmap(NULL, g->comm_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    g->comm_region = comm_region_init(g->comm_memory, tp_size, 1, MAX_ROWS * HIDDEN, 0);
}

static inline void close_group(struct group *g)
{
    munmap(g->comm_memory, g->comm_bytes);
    close(g->memory);
}

struct end {
    struct group *group;
    int rank;
    struct comm *comm;
    struct device device;
    struct model_desc desc;
    struct rank_share share;
    uint8_t *region;
    float *memory
        [3]; // of SCRATCH_BYTES, on the device: nothing is allocated or freed there while ranks wait for each other
    struct exchange_failure failure;
    int failures;      // with and without a record
    std::string wrong; // what this rank found
};

static inline void begin_end(struct end *e, struct group *g, int rank)
{
    e->group = g;
    e->rank = rank;
    e->failures = 0;
    e->failure = {};
    e->wrong.clear();
}

static inline int gather(void *arg, void *all, const void *mine, size_t bytes, struct error *err)
{
    return comm_all_gather(((struct end *)arg)->comm, all, mine, bytes, err);
}
static inline bool is_aborted(void *arg) { return comm_region_aborted(((struct end *)arg)->group->comm_region); }
static inline int on_failure(void *arg, const struct exchange_failure *failure, struct error *err)
{
    struct end *e = (struct end *)arg;
    e->failures++;
    if (failure)
        e->failure = *failure;
    return error_set(err, ERR_RANK, "an exchange had no end");
}

static inline void note(struct end *e, const char *format, ...) __attribute__((format(printf, 2, 3)));
static inline void note(struct end *e, const char *format, ...)
{
    char text[256];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    if (e->wrong.empty())
        e->wrong = "rank " + std::to_string(e->rank) + ": " + text;
}

// Memory of the device alone: the host looks into it by copies, since kernels of other ranks run at any time. In parentheses: not the macro of
// tests/device/device.h.
static inline bool take(float **memory, size_t bytes) { return (cudaMalloc)((void **)memory, bytes) == cudaSuccess; }

// A copy from memory that is not pinned may be on its way when cudaMemcpy returns, and the ranks' streams do not wait for the default one.
static inline void send(void *to, const void *from, size_t bytes)
{
    cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice);
    cudaStreamSynchronize(NULL);
}

static inline int devices_of(const struct group *g)
{
    int count = 1;
    cudaGetDeviceCount(&count);
    return count < g->way->devices ? count : g->way->devices;
}

static inline bool open_end(struct end *e)
{
    struct error err;
    struct group *g = e->group;
    struct device *d = &e->device;
    memset(d, 0, sizeof *d);
    memset(&e->desc, 0, sizeof e->desc);
    memset(&e->share, 0, sizeof e->share);
    e->desc.hidden_size = HIDDEN;
    d->shape.desc = &e->desc;
    d->shape.share = &e->share;
    d->shape.max_rows = MAX_ROWS;
    d->tp_size = g->tp_size;
    d->index = e->rank % devices_of(g);
    cudaSetDevice(d->index);
    e->region = (uint8_t *)mmap(NULL, g->region_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, g->memory, 0);
    struct exchange_options options = {};
    options.transport = g->way->transport;
    options.rank = e->rank;
    options.tp_size = g->tp_size;
    options.timeout_ms = g->timeout_ms;
    options.feedback = g->feedback;
    options.region = e->region;
    options.region_bytes = g->region_bytes;
    options.all_gather = gather;
    options.aborted = is_aborted;
    options.failed = on_failure;
    options.arg = e;
    bool has_memory = true;
    for (float *&memory : e->memory)
        has_memory = has_memory && take(&memory, SCRATCH_BYTES);
    if (!has_memory || cudaStreamCreateWithFlags(&d->stream, cudaStreamNonBlocking) != cudaSuccess ||
        !take(&d->buffer[BUFFER_PARTIAL], MAX_ROWS * HIDDEN * 4) ||
        !take(&d->buffer[BUFFER_RESIDUAL], MAX_ROWS * HIDDEN * 4) ||
        comm_open(&e->comm, g->comm_region, e->rank, g->host_timeout_ms, &err) || exchange_open(d, &options, &err)) {
        note(e, "opening: %s", err.msg);
        return false;
    }
    return true;
}

static inline void close_end(struct end *e)
{
    struct error err;
    if (e->comm)
        comm_barrier(e->comm, &err);
    if (!exchange_close(&e->device)) { // it hangs: what it may touch stays
        comm_close(e->comm);
        return;
    }
    for (float *memory : e->memory)
        cudaFree(memory);
    float **buffers =
        e->device.all_buffer[BUFFER_PARTIAL] ? e->device.all_buffer : e->device.buffer; // whole, or a window
    cudaFree(buffers[BUFFER_PARTIAL]);
    cudaFree(buffers[BUFFER_RESIDUAL]);
    cudaStreamDestroy(e->device.stream);
    comm_close(e->comm);
    munmap(e->region, e->group->region_bytes);
}

// ---- messages ------------------------------------------------------------------------------------------------------

static const char *const algorithm_names[] = {"one-shot", "two-shot", "chunks"};

// One sum on the device and on the CPU.
static inline void check_sum(struct end *e, uint64_t message, int64_t rows, int64_t cols, struct exchange_choice choice,
                             bool feedback, std::vector<uint16_t> &lost)
{
    struct error err;
    struct device *d = &e->device;
    size_t count = (size_t)(rows * cols), bytes = count * sizeof(float);
    std::vector<float> want(count), got(count);
    exchange_fill(want.data(), message, e->rank, rows, cols);
    send(d->buffer[BUFFER_PARTIAL], want.data(), bytes);
    d->count = rows;
    e->desc.hidden_size = cols;
    if (exchange_all_reduce(d, BUFFER_PARTIAL, &choice, feedback, OP_MLP, 3, &err) || exchange_flush(d, &err) ||
        device_wait(d, "a sum", &err) ||
        comm_all_reduce(e->comm, want.data(), rows, cols, cols, choice.wire, feedback ? lost.data() : NULL, NULL,
                        &err)) {
        note(e, "%s", err.msg);
        return;
    }
    cudaMemcpy(got.data(), d->buffer[BUFFER_PARTIAL], bytes, cudaMemcpyDeviceToHost);
    for (size_t i = 0; i < count; i++)
        if (f32_bits(got[i]) != f32_bits(want[i])) {
            note(e, "%s, %s, %d ranks, %lld x %lld%s: value %zu is %a (%08x), not %a (%08x)",
                 algorithm_names[choice.algorithm], wire_name(choice.wire), e->group->tp_size, (long long)rows,
                 (long long)cols, feedback ? ", feedback" : "", i, (double)got[i], f32_bits(got[i]), (double)want[i],
                 f32_bits(want[i]));
            return;
        }
    std::vector<uint16_t> device_lost(feedback ? count : 0);
    if (feedback)
        cudaMemcpy(device_lost.data(), d->exchange->lost, count * sizeof lost[0], cudaMemcpyDeviceToHost);
    if (feedback && memcmp(lost.data(), device_lost.data(), count * sizeof lost[0]) != 0)
        note(e, "%s, %s: other losses than on the CPU", algorithm_names[choice.algorithm], wire_name(choice.wire));
}

#endif
