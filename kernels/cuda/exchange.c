// The host's side of sums over the ranks of one machine: areas, streams and what becomes of a wait without an end. See exchange.h.
#include "kernels/cuda/exchange_host.h"

#include "formats/checked.h"
#include "kernels/buffers.h"
#include "kernels/clock.h"
#include "kernels/host_identity.h"

#include <assert.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
    ABORT_BYTES = 4096,
    LOOK_NS = 1000000,
    ASK_NS = 50 * LOOK_NS,         // between two questions how far the device has come
    MOST_SLICE_NS = 100 * LOOK_NS, // time in which this process was stopped counts little
    END_MS = 2000,                 // of a device after exchanges were ended
};

// ---- the areas -----------------------------------------------------------------------------------------------------

enum { HOST_AREA_BYTES = EXCHANGE_DIRECT_BYTES + EXCHANGE_DEPTH * (EXCHANGE_PARTS_BYTES + EXCHANGE_SUMS_BYTES) };

uint64_t exchange_region_bytes(int tp_size)
{
    return tp_size > EXCHANGE_RANKS ? 0 : ABORT_BYTES + (uint64_t)tp_size * HOST_AREA_BYTES;
}

// For the host and its copies; for kernels.
uint8_t *exchange_host_area(const struct exchange *x, int rank)
{
    return (uint8_t *)x->options.region + ABORT_BYTES + (uint64_t)rank * HOST_AREA_BYTES;
}
static uint8_t *mapped_area(const struct exchange *x, int rank)
{
    return x->region + ABORT_BYTES + (uint64_t)rank * HOST_AREA_BYTES;
}

// The device memory of chunks. Over p2p what comes in has its place elsewhere.
enum {
    OUT_BYTES = 2 * (EXCHANGE_PARTS_BYTES + EXCHANGE_SUMS_BYTES),
    STAGING_BYTES = OUT_BYTES + EXCHANGE_DEPTH * 2 * EXCHANGE_PARTS_BYTES,
};

static void place_staging(struct exchange *x, uint8_t *memory)
{
    for (int i = 0; i < 2; i++) {
        x->parts_out[i] = memory;
        x->sums_out[i] = memory + EXCHANGE_PARTS_BYTES;
        memory += EXCHANGE_PARTS_BYTES + EXCHANGE_SUMS_BYTES;
    }
    for (int i = 0; i < EXCHANGE_DEPTH && !x->p2p; i++) {
        x->parts_in[i] = memory;
        x->sums_in[i] = memory + EXCHANGE_PARTS_BYTES;
        memory += 2 * EXCHANGE_PARTS_BYTES;
    }
}

static uint64_t lost_bytes(const struct device_shape *s)
{
    return (uint64_t)(s->max_rows * s->desc->hidden_size) * sizeof(uint16_t);
}

// Whatever is allocated below is counted here.
uint64_t exchange_memory_bytes(const struct device_shape *s, int tp_size)
{
    uint64_t lost = s->feedback ? lost_bytes(s) : 0;
    if (tp_size == 1)
        return 0;
    switch (s->exchange) {
    case TRANSPORT_HOST:
        return sizeof(struct exchange_state) + STAGING_BYTES + lost;
    case TRANSPORT_P2P:
        return sizeof(struct exchange_state) + OUT_BYTES + exchange_p2p_bytes(tp_size) + lost;
    case TRANSPORT_NCCL:
        return exchange_nccl_memory_bytes(s, tp_size) + lost;
    default:
        return 0; // the host adds up
    }
}

// ---- opening -------------------------------------------------------------------------------------------------------

static int map_region(struct device *d, struct exchange *x, struct error *err)
{
    uint64_t bytes = x->options.transport == TRANSPORT_P2P ? ABORT_BYTES : x->options.region_bytes;
    cudaError_t status = cudaHostRegister(x->options.region, bytes, cudaHostRegisterPortable | cudaHostRegisterMapped);
    if (status != cudaSuccess)
        return error_set(
            err, ERR_GPU,
            "device %d: pinning %.1f MiB of shared memory: %s; a limit of locked memory (ulimit -l) or a container "
            "may forbid it; --transport shm does without",
            d->index, (double)bytes / 0x1p20, cudaGetErrorString(status));
    x->registered = true;
    return CHECK(cudaHostGetDevicePointer((void **)&x->region, x->options.region, 0), "mapping shared memory");
}

static int make_streams(struct device *d, struct exchange *x, struct error *err)
{
    int rc;
    if ((rc = exchange_make_stream(d, &x->out, err)) || (rc = exchange_make_stream(d, &x->in, err)) ||
        (rc = exchange_make_stream(d, &x->asks, err)))
        return rc;
    for (int i = 0; i < EXCHANGE_EVENTS; i++)
        for (int k = 0; k < EXCHANGE_DEPTH; k++)
            if ((rc = CHECK(cudaEventCreateWithFlags(&x->event[i][k], cudaEventDisableTiming), "making an event")))
                return rc;
    return 0;
}

static int make_memory(struct device *d, struct exchange *x, struct error *err)
{
    static const char what[] = "taking memory for exchanges";
    struct exchange_state *state = &x->first_state;
    int rc;
    for (int lane = 0; lane < EXCHANGE_LANES; lane++)
        state->token[lane] = state->waited[lane] = (uint32_t)EXCHANGE_FIRST_TOKEN;
    if ((rc = CHECK(cudaMalloc((void **)&x->ranks.state, sizeof *state), what)) ||
        (rc = device_upload(d, x->ranks.state, state, sizeof *state, what, err)) ||
        (rc = CHECK(cudaMalloc((void **)&x->staging, x->p2p ? OUT_BYTES : STAGING_BYTES), what)) ||
        (rc = CHECK(cudaMallocHost((void **)&x->record, sizeof *x->record), what)) ||
        (rc = CHECK(cudaHostGetDevicePointer((void **)&x->ranks.record, x->record, 0), what)) ||
        (rc = CHECK(cudaMallocHost((void **)&x->seen, sizeof *x->seen), what)))
        return rc;
    memset(x->record, 0, sizeof *x->record);
    *x->seen = x->last_seen = *state;
    place_staging(x, x->staging);
    return exchange_make_lost(d, x, err);
}

int exchange_make_lost(struct device *d, struct exchange *x, struct error *err)
{
    uint64_t lost = lost_bytes(&d->shape);
    int rc;
    if (!x->options.feedback)
        return 0;
    if ((rc = CHECK(cudaMalloc((void **)&x->lost, lost), "taking memory for exchanges")))
        return rc;
    return CHECK(cudaMemsetAsync(x->lost, 0, lost, d->stream), "taking memory for exchanges");
}

// Tokens before the first, in the areas where this rank writes.
static void begin_tokens(uint8_t *area)
{
    for (int lane = 0; lane < EXCHANGE_LANES; lane++) {
        uint32_t *token = (uint32_t *)(void *)(area + lane * EXCHANGE_TOKEN_BYTES);
        *token = (uint32_t)EXCHANGE_FIRST_TOKEN;
    }
}

// The ranks tell each other who they are, and whether something went wrong on any. Then each knows how many blocks it may have, so that those of all
// ranks of a device run at the same time.
static int share_devices(struct device *d, struct exchange *x, struct exchange_card *mine, struct exchange_card *all,
                         struct error *err)
{
    int most = 1, rc;
    mine->host = host_identity();
    gethostname(mine->host_name, sizeof mine->host_name - 1);
    if (!mine->problem.code)
        device_status(d, cudaDeviceGetPCIBusId(mine->bus, sizeof mine->bus, d->index), "asking where it is",
                      &mine->problem);
    if ((rc = x->options.all_gather(x->options.arg, all, mine, sizeof *mine, err)))
        return rc;
    for (int r = 0; r < x->options.tp_size; r++)
        if (all[r].problem.code) {
            *err = all[r].problem;
            return err->code;
        }
    for (int r = 0; r < x->options.tp_size; r++) {
        int sharing = 0;
        for (int other = 0; other < x->options.tp_size; other++)
            sharing += memcmp(all[r].bus, all[other].bus, sizeof mine->bus) == 0;
        most = sharing > most ? sharing : most;
        if (all[r].host != mine->host)
            return error_set(err, ERR_USAGE,
                             "ranks %d and %d are on %s and %s: --transport %s is for the ranks of one machine", r,
                             x->options.rank, all[r].host_name, mine->host_name, transport_name(x->options.transport));
    }
    x->blocks = larger_of(EXCHANGE_BLOCKS / most, 1);
    return 0;
}

static void fill_host_ranks(struct exchange *x)
{
    struct exchange_ranks *ranks = &x->ranks;
    for (int r = 0; r < ranks->tp_size; r++) {
        ranks->to[r] = mapped_area(x, ranks->rank);
        ranks->from[r] = mapped_area(x, r);
    }
    ranks->every[0] = mapped_area(x, ranks->rank);
    ranks->num_every = 1;
    begin_tokens(exchange_host_area(x, ranks->rank));
}

// What a rank does alone.
static int open_alone(struct device *d, struct exchange *x, struct exchange_card *card, struct error *err)
{
    int rc;
    if ((rc = map_region(d, x, err)) ||
        (x->options.transport == TRANSPORT_P2P && (rc = exchange_p2p_make(d, x, card, err))) ||
        (rc = make_streams(d, x, err)) || (rc = make_memory(d, x, err)))
        return rc;
    x->ranks.abort = (uint32_t *)(void *)x->region;
    if (!x->p2p)
        fill_host_ranks(x);
    return device_wait(d, "preparing exchanges", err);
}

int exchange_open(struct device *d, const struct exchange_options *options, struct error *err)
{
    struct exchange *x;
    struct exchange_card mine, all[EXCHANGE_RANKS];
    int rc;
    memset(&mine, 0, sizeof mine);
    if (!(x = d->exchange = calloc(1, sizeof *x)))
        return error_set(err, ERR_MEMORY, "no memory for exchanges");
    x->options = *options;
    x->ranks.rank = options->rank;
    x->ranks.tp_size = options->tp_size;
    x->ranks.timeout_ns = (uint64_t)options->timeout_ms * 1000000;
    if (options->transport == TRANSPORT_NCCL) {
        if ((rc = exchange_nccl_open(d, x, err)))
            exchange_close(d);
        return rc;
    }
    if (!exchange_open_sides(d, x, &mine.problem))
        open_alone(d, x, &mine, &mine.problem);
    // Nobody posts before everybody's tokens are there.
    if ((rc = share_devices(d, x, &mine, all, err)) || (x->p2p && (rc = exchange_p2p_join(d, x, all, err))))
        exchange_close(d);
    return rc;
}

// ---- waiting for the device ----------------------------------------------------------------------------------------

static uint32_t *abort_word(const struct exchange *x) { return x->options.region; }
static void raise_abort(struct exchange *x) { __atomic_store_n(abort_word(x), 1, __ATOMIC_RELEASE); }
static bool is_raised(const struct exchange *x) { return __atomic_load_n(abort_word(x), __ATOMIC_ACQUIRE) != 0; }

static int failed(struct exchange *x, struct error *err)
{
    const struct exchange_record *r = x->record;
    if (!__atomic_load_n(&r->told, __ATOMIC_ACQUIRE))
        return x->options.failed(x->options.arg, NULL, err);
    struct exchange_failure failure = {.rank = x->options.rank,
                                       .whom = (int)r->whom,
                                       .operation = (int)(r->place >> 24),
                                       .layer = (int)(r->place & 0xffffff) - 1,
                                       .call = r->call,
                                       .phase = r->phase,
                                       .expected = r->expected,
                                       .seen = r->seen};
    return x->options.failed(x->options.arg, &failure, err);
}

// While the host waits it looks whether the ranks are to end: kernels that wait learn it from here.
static void look(struct exchange *x)
{
    int64_t now_ns = clock_now_ns();
    if (now_ns - x->looked_ns > LOOK_NS) {
        x->looked_ns = now_ns;
        if (x->options.aborted(x->options.arg))
            raise_abort(x);
    }
    sched_yield();
}

// A wait of the host. Kernels that wait have deadlines of their own, but a copy or a store over a link that hangs has none: it keeps all kernels
// behind it from ever running. So the host asks how far the device has come with its exchanges, by a copy of its state on a stream that nothing
// else uses. Where that has not changed for twice the time of a wait on the device, the host ends the exchanges of all ranks; and after
// END_MS without a change once they have been ended it gives up the device.
struct host_wait {
    int64_t before_ns, still_ns; // still: that nothing has changed
    bool raised, first;          // the exchanges were ended; by this wait
};

static struct host_wait begin_wait(void) { return (struct host_wait){.before_ns = clock_now_ns()}; }

// Since it was asked last. A copy that does not come back tells of no change.
static bool has_moved(struct exchange *x)
{
    if (!x->ranks.state || !x->seen || cudaStreamQuery(x->asks) == cudaErrorNotReady)
        return false;
    bool moved = memcmp(x->seen, &x->last_seen, sizeof x->last_seen) != 0;
    x->last_seen = *x->seen;
    cudaMemcpyAsync(x->seen, x->ranks.state, sizeof *x->seen, cudaMemcpyDeviceToHost, x->asks);
    return moved;
}

// A turn; false: it has lasted too long.
static bool wait_more(struct exchange *x, struct host_wait *w)
{
    int64_t now_ns = clock_now_ns(), slice_ns = now_ns - w->before_ns;
    look(x);
    w->before_ns = now_ns;
    w->still_ns += slice_ns < MOST_SLICE_NS ? slice_ns : MOST_SLICE_NS;
    if (w->still_ns < ASK_NS)
        return true;
    if (now_ns - x->asked_ns > ASK_NS) {
        x->asked_ns = now_ns;
        if (has_moved(x))
            w->still_ns = 0;
    }
    if (is_raised(x) && !w->raised) {
        w->raised = true;
        w->still_ns = 0;
    }
    int64_t most_ms = w->raised ? END_MS : 2 * (int64_t)x->options.timeout_ms;
    if (w->still_ns < most_ms * 1000000 || (!w->raised && __atomic_exchange_n(abort_word(x), 1, __ATOMIC_ACQ_REL)))
        return true;
    w->first = !w->raised;
    x->hangs = w->raised;
    return false;
}

static int gave_up(struct exchange *x, const struct host_wait *w, struct error *err)
{
    struct exchange_failure failure = {
        .rank = x->options.rank, .whom = -1, .operation = -1, .layer = -1, .phase = 1}; // somewhere in the step
    return w->first ? x->options.failed(x->options.arg, &failure, err) : failed(x, err);
}

int device_wait(struct device *d, const char *what, struct error *err)
{
    struct exchange *x = d->exchange;
    cudaError_t status;
    if (!x)
        return CHECK(cudaStreamSynchronize(d->stream), what);
    if (x->nccl)
        return nccl_wait(x->nccl, err);
    struct host_wait w = begin_wait();
    while ((status = cudaStreamQuery(d->stream)) == cudaErrorNotReady)
        if (!wait_more(x, &w))
            return gave_up(x, &w, err);
    if (status != cudaSuccess)
        return CHECK(status, what);
    return is_raised(x) ? failed(x, err) : 0;
}

int device_wait_uploaded(struct device *d, struct error *err)
{
    static const char what[] = "the step before";
    cudaError_t status;
    if (!d->exchange)
        return CHECK(cudaEventSynchronize(d->uploaded), what);
    if (d->exchange->nccl)
        return nccl_wait_event(d->exchange->nccl, d->uploaded, err);
    struct host_wait w = begin_wait();
    while ((status = cudaEventQuery(d->uploaded)) == cudaErrorNotReady)
        if (!wait_more(d->exchange, &w))
            return gave_up(d->exchange, &w, err);
    return CHECK(status, what);
}

// Whether nothing runs any more.
static bool come_to_end(const struct device *d, struct exchange *x)
{
    const cudaStream_t streams[] = {d->stream, x->side, x->out, x->in, x->asks};
    struct host_wait w = begin_wait();
    for (int i = 0; i < 5 && x->options.region; i++)
        while (!x->hangs && streams[i] && cudaStreamQuery(streams[i]) == cudaErrorNotReady)
            wait_more(x, &w);
    return !x->hangs;
}

bool exchange_close(struct device *d)
{
    struct exchange *x = d->exchange;
    struct error ignored;
    if (!x)
        return !d->hangs;
    exchange_side_end(d, &ignored);  // of a step that failed
    device_end_recording(d);         // likewise, before the streams that belong to it go
    bool over = nccl_close(x->nccl); // which waits itself
    if (!over || !come_to_end(d, x)) {
        free(x->p2p); // the others keep their inboxes, as this rank has not left
        free(x);
        d->exchange = NULL;
        d->hangs = true;
        return false;
    }
    exchange_close_sides(x);
    if (x->options.transport == TRANSPORT_P2P)
        exchange_p2p_close(x);
    for (int i = 0; i < EXCHANGE_EVENTS; i++)
        for (int k = 0; k < EXCHANGE_DEPTH; k++)
            if (x->event[i][k])
                cudaEventDestroy(x->event[i][k]);
    if (x->out)
        cudaStreamDestroy(x->out);
    if (x->in)
        cudaStreamDestroy(x->in);
    if (x->asks)
        cudaStreamDestroy(x->asks);
    cudaFree(x->ranks.state);
    cudaFree(x->staging);
    cudaFree(x->lost);
    if (x->record)
        cudaFreeHost(x->record);
    if (x->seen)
        cudaFreeHost(x->seen);
    if (x->registered)
        cudaHostUnregister(x->options.region);
    free(x);
    d->exchange = NULL;
    return true;
}

// ---- sums ----------------------------------------------------------------------------------------------------------

static uint32_t place_of(int operation, int layer)
{
    return (uint32_t)operation << 24 | ((uint32_t)(layer + 1) & 0xffffff);
}

static struct exchange_message message_of(const struct device *d, enum buffer buffer, int operation, int layer)
{
    int64_t cols = buffer_width(d->shape.desc, d->shape.share, buffer);
    assert((unsigned)buffer < BUFFER_COUNT);
    struct exchange_message m = {.data = d->buffer[buffer],
                                 .rows = (uint32_t)d->count,
                                 .cols = (uint32_t)cols,
                                 .place = place_of(operation, layer)};
    // Two numbers a row would be a group of 128.
    if (buffer == BUFFER_SQUARES) {
        m.rows = 1;
        m.cols = (uint32_t)(d->count * cols);
    }
    return m;
}

int exchange_all_reduce(struct device *d, enum buffer buffer, const struct exchange_choice *choice, bool feedback,
                        int operation, int layer, struct error *err)
{
    struct exchange *x = d->exchange;
    struct exchange_message m = message_of(d, buffer, operation, layer);
    int rc = exchange_flush(d, err);
    if (rc || m.rows == 0 || m.cols == 0)
        return rc;
    if ((rc = exchange_wait_for_sides(d, err)))
        return rc;
    m.wire = choice->wire;
    m.lost = feedback ? x->lost + d->window_first * m.cols : NULL;
    if (x->nccl)
        return exchange_nccl_all_reduce(x, &m, operation, layer, err);
    if (choice->algorithm == ALGORITHM_CHUNKS && exchange_fits_chunks(x, &m))
        return exchange_in_chunks(d, &m, NULL, choice->chunk_bytes, err);
    if (choice->algorithm == ALGORITHM_ONE_SHOT && !m.lost) {
        // The norm that follows may take it along.
        x->waiting = m;
        x->waits = true;
        return buffer == BUFFER_PARTIAL && m.rows <= EXCHANGE_NORM_ROWS ? 0 : exchange_flush(d, err);
    }
    return CHECK(launch_exchange_two_shot(&x->ranks, &m, x->blocks, d->stream), "an exchange");
}

// A half of a sum over rows of the window; begun alike on all ranks. An empty one has no rows.
static int begin_half(struct device *d, enum buffer buffer, enum exchange_half half, const struct dealt_rows *rows,
                      const struct exchange_choice *choice, bool feedback, int operation, int layer,
                      struct exchange_message *m, struct error *err)
{
    int rc = exchange_flush(d, err);
    *m = message_of(d, buffer, operation, layer);
    if (!rc && (rows->first < 0 || rows->count < 0 || rows->first + rows->count > d->count))
        rc = error_set(err, ERR_OTHER, "device %d: rows %lld to %lld of %lld are to be exchanged", d->index,
                       (long long)rows->first, (long long)(rows->first + rows->count), (long long)d->count);
    if (rc || rows->count == 0 || (rc = exchange_wait_for_sides(d, err))) {
        m->rows = 0;
        return rc;
    }
    m->data += rows->first * m->cols;
    m->rows = (uint32_t)rows->count;
    m->wire = choice->wire;
    m->lost = feedback ? d->exchange->lost + (d->window_first + rows->first) * m->cols : NULL;
    m->half = half;
    m->first_owner = (uint32_t)rows->first_owner;
    return 0;
}

static int run_half(struct device *d, const struct exchange_message *m, const struct exchange_choice *choice,
                    int operation, int layer, struct error *err)
{
    struct exchange *x = d->exchange;
    if (m->rows == 0)
        return 0;
    if (x->nccl)
        return exchange_nccl_half(x, m, operation, layer, err);
    if (choice->algorithm == ALGORITHM_CHUNKS && exchange_fits_chunks(x, m))
        return exchange_in_chunks(d, m, NULL, choice->chunk_bytes, err);
    return CHECK(launch_exchange_half(&x->ranks, m, x->blocks, d->stream), "half an exchange");
}

int exchange_reduce_scatter_rows(struct device *d, enum buffer buffer, const struct dealt_rows *rows,
                                 const struct exchange_choice *choice, bool feedback, int operation, int layer,
                                 struct error *err)
{
    struct exchange_message m;
    int rc = begin_half(d, buffer, EXCHANGE_TO_OWNERS, rows, choice, feedback, operation, layer, &m, err);
    return rc ? rc : run_half(d, &m, choice, operation, layer, err);
}

int exchange_all_gather_rows(struct device *d, enum buffer buffer, const struct dealt_rows *rows,
                             const struct exchange_choice *choice, int operation, int layer, struct error *err)
{
    struct exchange_message m;
    int rc = begin_half(d, buffer, EXCHANGE_TO_ALL, rows, choice, false, operation, layer, &m, err);
    return rc ? rc : run_half(d, &m, choice, operation, layer, err);
}

int exchange_norm_dealt(struct device *d, const struct dealt_norm *what, struct error *err)
{
    const struct exchange_choice *choice = &what->choice;
    struct exchange *x = d->exchange;
    struct dealt_rows rows = {0, d->count, what->first_owner};
    int64_t ranks = x->options.tp_size, first = (x->options.rank - what->first_owner + ranks) % ranks;
    struct exchange_message m;
    int rc = begin_half(d, BUFFER_PARTIAL, EXCHANGE_TO_OWNERS, &rows, choice, what->feedback, what->operation[0],
                        what->layer[0], &m, err);
    if (rc || m.rows == 0)
        return rc;
    if (!x->nccl && choice->algorithm == ALGORITHM_CHUNKS && exchange_fits_chunks(x, &m)) {
        struct exchange_own_norm norm = {.normed = d->normed,
                                         .residual = d->buffer[BUFFER_RESIDUAL],
                                         .join = step_join(d, what->join),
                                         .weight = what->weight,
                                         .eps = (float)d->shape.desc->norm_eps,
                                         .place = place_of(what->operation[1], what->layer[1])};
        return exchange_in_chunks(d, &m, &norm, choice->chunk_bytes, err);
    }
    if ((rc = run_half(d, &m, choice, what->operation[0], what->layer[0], err)) ||
        (rc = step_norm_own(d, what->join, what->weight, first, ranks, err)))
        return rc;
    return exchange_all_gather_rows(d, BUFFER_NORMED, &rows, choice, what->operation[1], what->layer[1], err);
}

int exchange_flush(struct device *d, struct error *err)
{
    struct exchange *x = d->exchange;
    if (!x || !x->waits)
        return 0;
    x->waits = false;
    return CHECK(launch_exchange_one_shot(&x->ranks, &x->waiting, NULL, x->blocks, d->stream), "an exchange");
}

bool exchange_takes_norm(const struct device *d) { return d->exchange && d->exchange->waits; }

int exchange_with_norm(struct device *d, const struct exchange_norm *norm, struct error *err)
{
    struct exchange *x = d->exchange;
    x->waits = false;
    return CHECK(launch_exchange_one_shot(&x->ranks, &x->waiting, norm, x->blocks, d->stream),
                 "an exchange and a norm");
}

int exchange_begin_step(struct device *d, struct error *err)
{
    struct exchange *x = d->exchange;
    if (!x)
        return 0;
    x->waits = false;
    if (!x->lost || d->phase != PHASE_PREFILL)
        return 0;
    uint64_t bytes = (uint64_t)(d->count * d->shape.desc->hidden_size) * sizeof *x->lost;
    return CHECK(cudaMemsetAsync(x->lost, 0, bytes, d->stream), "clearing what a wire lost");
}
