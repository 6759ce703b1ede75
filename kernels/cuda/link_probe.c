// One end of a probe of links, in a process of its own. See kernels/link_board.h for who else is there, and link_probe.h for the kernels.
//
// What is proven of the direction from a to b: what a kernel and a copy engine of a write is in b's memory when b itself looks, byte for byte, and
// nothing beside it, from 4 bytes to LINK_MOST_BYTES; what b has in its memory is what a kernel and a copy engine of a read there (up to READ_MOST_BYTES); and, of both
// directions together, running kernels see each other's words, with what was written before them; of each direction alone and of both at once, a kernel
// that runs on b and sees the word that a posted behind a copy sees all of the copy, which the chunks of exchanges (exchange_p2p.c) rely on. A driver's
// leave, a bandwidth, and a look by the writer at what it wrote prove none of this: where writes end in a copy of the page, all three are as they
// should be. And where an end waits before it looks, a word that overtakes a copy is not to be seen.
//
// A link that delivers is good when it is not much slower than the way over the host's memory, which is measured beside it.
#include "kernels/cuda/device.h"
#include "kernels/cuda/link_probe_internal.h"

#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
    CALL_ROUNDS = 64,
    FLAG_ROUNDS = 256,
};
_Static_assert((int)LINK_CALL_BYTES <= (int)CALL_AREA_BYTES, "two slots and a number");
_Static_assert(sizeof(cudaIpcMemHandle_t) <= LINK_HANDLE_BYTES, "a handle fits the board");

// ---- what an end is at ---------------------------------------------------------------------------------------------

void probe_is_at(struct prober *p, enum link_doing doing, enum link_means means, uint64_t bytes)
{
    atomic_store(&p->end->means, means);
    atomic_store(&p->end->bytes, bytes);
    atomic_store(&p->end->doing, doing);
}

void probe_meet(struct prober *p, int other)
{
    enum link_doing before = (enum link_doing)atomic_load(&p->end->doing);
    atomic_store(&p->end->doing, LINK_MEETING);
    uint32_t steps = atomic_fetch_add(&p->end->steps, 1) + 1;
    for (int looks = 0; atomic_load(&p->board->end[other].steps) < steps; looks++)
        if (looks < EAGER_LOOKS)
            sched_yield();
        else
            usleep(100);
    atomic_store(&p->end->doing, before);
}

int probe_status(const struct prober *p, cudaError_t status, const char *what, struct error *err)
{
    if (status == cudaSuccess)
        return 0;
    cudaGetLastError(); // it is told here
    return error_set(err, ERR_GPU, "device %d: %s: %s (%s)", p->end->device, what, cudaGetErrorString(status),
                     cudaGetErrorName(status));
}

void probe_condemn(const struct prober *p, int a, int b, enum link_fault fault, const char *format, ...)
{
    struct link_result *result = probe_result(p, a, b);
    va_list words;
    va_start(words, format);
    vsnprintf(result->sentence, sizeof result->sentence, format, words);
    va_end(words);
    result->fault = fault;
}

// ---- a pair --------------------------------------------------------------------------------------------------------

static void map_other(struct prober *p, int other)
{
    cudaIpcMemHandle_t handle;
    probe_is_at(p, LINK_MAPPING, LINK_BY_KERNEL, WINDOW_BYTES);
    memcpy(&handle, p->board->end[other].handle, sizeof handle);
    cudaError_t status = cudaIpcOpenMemHandle((void **)&p->other_window, handle, cudaIpcMemLazyEnablePeerAccess);
    if (status == cudaSuccess)
        return;
    p->other_window = NULL;
    cudaGetLastError();
    probe_condemn(p, p->me, other, LINK_REFUSED, "device %d cannot map the memory of device %d: %s (%s)",
                  p->end->device, p->board->end[other].device, cudaGetErrorString(status), cudaGetErrorName(status));
}

static int try_pair(struct prober *p, int a, int b, struct error *err)
{
    int other = p->me == a ? b : a, rc = 0;
    if (!probe_is_condemned(p, p->me, other))
        map_other(p, other);
    probe_meet(p, other);
    if ((rc = probe_messages(p, a, b, err)) || (rc = probe_messages(p, b, a, err)))
        return rc;
    if (!probe_are_condemned(p, a, b) && (rc = probe_call(p, other, LINK_CALL_WORDS, CALL_ROUNDS, err)))
        return rc;
    if (!probe_are_condemned(p, a, b) && (rc = probe_call(p, other, 0, FLAG_ROUNDS, err)))
        return rc;
    if ((rc = probe_copies(p, a, b, err)) || (rc = probe_judge_rates(p, a, b, err)))
        return rc;
    probe_is_at(p, LINK_MAPPING, LINK_BY_KERNEL, 0);
    if (p->other_window)
        STEP(cudaIpcCloseMemHandle(p->other_window), "giving back another device's memory");
    p->other_window = NULL;
    probe_meet(p, other); // everything about them is said
    if (!probe_is_condemned(p, p->me, other))
        probe_result(p, p->me, other)->fault = LINK_GOOD;
    probe_is_at(p, LINK_IDLE, LINK_BY_KERNEL, 0);
    return 0;
}

// ---- an end's life -------------------------------------------------------------------------------------------------

// Whether several processes may use the device at once, as the probe's ends and ranks that start beside them do. Neither this nor the other questions
// make a context: in the other modes it would take the ranks' place.
static int is_shared(int *shared, struct prober *p, int device, struct error *err)
{
    int mode = cudaComputeModeDefault;
    STEP(cudaDeviceGetAttribute(&mode, cudaDevAttrComputeMode, device), "asking for its compute mode");
    *shared = mode == cudaComputeModeDefault;
    return 0;
}

// Both ends of a pair ask for both of its devices: each then writes its own direction alone.
static int ask_modes(struct prober *p, int other, int device, struct error *err)
{
    const int devices[2] = {p->end->device, device};
    for (int i = 0; i < 2; i++) {
        int shared = 1, rc = is_shared(&shared, p, devices[i], err);
        if (rc)
            return rc;
        if (!shared && !probe_is_condemned(p, p->me, other))
            probe_condemn(p, p->me, other, LINK_REFUSED,
                          "the compute mode of device %d lets one process at most use it, so its links cannot be tried "
                          "(`nvidia-smi -i %d -c DEFAULT` sets the usual mode)",
                          devices[i], devices[i]);
    }
    return 0;
}

static int ask(struct prober *p, struct error *err)
{
    struct link_board *board = p->board;
    int first = p->me - p->me % board->group;
    probe_is_at(p, LINK_ASKING, LINK_BY_KERNEL, 0);
    int rc = device_count(&p->count, err);
    if (rc)
        return rc;
    p->end->device = device_of_rank(p->end->rank, p->end->device, p->count);
    if (p->end->device >= p->count)
        return error_set(err, ERR_GPU, "device %d does not exist: there are %d", p->end->device, p->count);
    STEP(cudaDeviceGetPCIBusId(p->end->bus, sizeof p->end->bus, p->end->device), "asking where it is");
    for (int other = first; other < first + board->group && other < board->num_ends; other++) {
        int can = 1, device = device_of_rank(board->end[other].rank, board->end[other].device, p->count);
        if (other == p->me || device >= p->count)
            continue;
        if (device != p->end->device) // of its own memory there is nothing to ask
            STEP(cudaDeviceCanAccessPeer(&can, p->end->device, device), "asking which devices it reaches");
        probe_result(p, p->me, other)->claimed = can != 0;
        if (!can && !probe_is_condemned(p, p->me, other))
            probe_condemn(p, p->me, other, LINK_REFUSED,
                          "the driver does not let device %d reach the memory of device %d", p->end->device, device);
        if ((rc = ask_modes(p, other, device, err)))
            return rc;
    }
    return 0;
}

// A driver may load a kernel when it is first launched, and wait before that for what runs: for ever, if that waits for the new one.
static int load_kernels(struct prober *p, struct error *err)
{
    static const char what[] = "loading kernels";
    struct link_hand none = {.own = p->window, .other = p->window, .place = p->window, .words = {4}};
    memset(p->handed, 0, sizeof *p->handed);
    STEP(cudaHostGetDevicePointer((void **)&none.result, p->handed, 0), what);
    STEP(launch_link_take(&none, p->stream), what);
    STEP(launch_link_await(&none, 0, p->stream), what);
    STEP(launch_link_post(&none, 0, p->stream), what);
    STEP(cudaStreamSynchronize(p->stream), what);
    return 0;
}

static int open_device(struct prober *p, struct error *err)
{
    static const char what[] = "taking memory";
    cudaIpcMemHandle_t handle;
    probe_is_at(p, LINK_OPENING, LINK_BY_KERNEL, 0);
    STEP(cudaSetDevice(p->end->device), "choosing it");
    STEP(cudaStreamCreateWithFlags(&p->stream, cudaStreamNonBlocking), "making a stream");
    STEP(cudaStreamCreateWithFlags(&p->out, cudaStreamNonBlocking), "making a stream");
    STEP(cudaEventCreateWithFlags(&p->begin, cudaEventDefault), "making an event");
    STEP(cudaEventCreateWithFlags(&p->finish, cudaEventDefault), "making an event");
    STEP(cudaMalloc((void **)&p->window, WINDOW_BYTES), what);
    STEP(cudaMalloc((void **)&p->scratch, LINK_MOST_BYTES), what);
    STEP(cudaMallocHost((void **)&p->host, LINK_MOST_BYTES + 2 * GUARD_BYTES), what);
    STEP(cudaMallocHost((void **)&p->called, sizeof *p->called), what);
    STEP(cudaMallocHost((void **)&p->handed, sizeof *p->handed), what);
    STEP(cudaMemsetAsync(p->window, 0, WINDOW_BYTES, p->stream), what);
    STEP(cudaStreamSynchronize(p->stream), what);
    STEP(cudaIpcGetMemHandle(&handle, p->window), "making its memory one that other processes can map");
    memcpy(p->end->handle, &handle, sizeof handle);
    int rc = load_kernels(p, err);
    return rc ? rc : probe_host_rates(p, err);
}

static void give_back(struct prober *p)
{
    cudaFreeHost(p->handed);
    cudaFreeHost(p->called);
    cudaFreeHost(p->host);
    cudaFree(p->scratch);
    cudaFree(p->window);
    if (p->finish)
        cudaEventDestroy(p->finish);
    if (p->begin)
        cudaEventDestroy(p->begin);
    if (p->out)
        cudaStreamDestroy(p->out);
    if (p->stream)
        cudaStreamDestroy(p->stream);
}

// The next order; its number is the one after `number`.
static enum link_order next_order(const struct prober *p, uint32_t number)
{
    for (int looks = 0; atomic_load(&p->board->order.number) == number; looks++)
        if (looks < EAGER_LOOKS)
            sched_yield();
        else
            usleep(100);
    return (enum link_order)p->board->order.kind;
}

int link_probe(struct link_board *board, int end, struct error *err)
{
    struct prober p = {.board = board, .end = &board->end[end], .me = end};
    unsetenv("CUDA_LAUNCH_BLOCKING"); // it keeps kernels from running beside each other
    uint32_t number = atomic_load(&p.end->taken);
    int rc = 0;
    while (!rc) {
        enum link_order kind = next_order(&p, number);
        int other = board->order.other[end];
        number = atomic_load(&board->order.number);
        if (kind == LINK_ORDER_END)
            break;
        if (kind == LINK_ORDER_LOOK)
            rc = ask(&p, err);
        else if (kind == LINK_ORDER_OPEN)
            rc = open_device(&p, err);
        else if (kind == LINK_ORDER_PAIRS && other >= 0)
            rc = try_pair(&p, end < other ? end : other, end < other ? other : end, err);
        if (!rc)
            atomic_store(&p.end->taken, number);
    }
    if (!rc)
        give_back(&p);
    return rc;
}
