// The transport "nccl". See nccl.h.
#include "kernels/cuda/nccl.h"

#include "formats/fnv.h"
#include "kernels/clock.h"
#include "kernels/cuda/nccl_library.h"
#include "kernels/cuda/shares.h"
#include "kernels/host_identity.h"

#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    PIECE_BYTES = 16 << 20, // of a message's coded bytes that are on their way at a time
    PLACES = 1024,          // of messages that the host may be ahead of the device and still be named
    SPIN_ROUNDS = 2000,
    SLEEP_NS = 50000,
    ABORT_TIMEOUT_S = 3,
    END_TIMEOUT_MS = 3000,   // of an orderly end
    SHARING_VERSION = 23000, // from here on NCCL can be told to let ranks share a GPU
};

_Static_assert(sizeof(struct nccl_hello) == NCCL_HELLO_BYTES, "the ranks exchange it");
_Static_assert(sizeof(((struct nccl_hello *)0)->id) == NCCL_ID_BYTES, "the ranks exchange it");

struct nccl {
    struct nccl_library library;
    struct nccl_options options;
    cudaStream_t carrying, beside; // of messages; another one that has carried some, or NULL
    int device;
    ncclComm_t comm;
    bool connected;
    bool failed, stuck; // stuck: the stream did not end with the communicator
    struct error why;   // of the failure
    uint8_t *to, *from; // device [buffer_bytes]
    uint64_t buffer_bytes;
    uint32_t *began; // pinned; the device writes the number of the message that it has come to
    uint32_t messages;
    struct nccl_place places[PLACES]; // by message
    uint64_t sent_bytes;
};

// ---- failing --------------------------------------------------------------------------------------------------------------

struct aborting {
    ncclResult_t (*abort)(ncclComm_t comm);
    ncclComm_t comm;
    int device;
};

static void *abort_thread(void *argument)
{
    struct aborting *aborting = argument;
    if (cudaSetDevice(aborting->device) == cudaSuccess)
        aborting->abort(aborting->comm);
    free(aborting);
    return NULL;
}

// ncclCommAbort may itself wait for what never comes: it has a thread and a deadline.
static void abort_communicator(struct nccl *n)
{
    struct aborting *aborting = malloc(sizeof *aborting);
    struct timespec until;
    pthread_t thread;
    if (!n->comm || !aborting) {
        free(aborting);
        return;
    }
    *aborting = (struct aborting){n->library.ncclCommAbort_, n->comm, n->device};
    n->comm = NULL;
    if (pthread_create(&thread, NULL, abort_thread, aborting)) {
        abort_thread(aborting);
        return;
    }
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += ABORT_TIMEOUT_S;
    if (pthread_timedjoin_np(thread, NULL, &until)) {
        pthread_detach(thread);
        n->library.handle = NULL; // its code is in use until the process ends
    }
}

// What was queued behind messages that are gone runs to its end: memory that it uses is the caller's to free.
static void drain_stream(struct nccl *n)
{
    int64_t until_ns = clock_now_ns() + (int64_t)END_TIMEOUT_MS * 1000000;
    while ((cudaStreamQuery(n->options.stream) == cudaErrorNotReady ||
            (n->beside && cudaStreamQuery(n->beside) == cudaErrorNotReady)) &&
           !n->stuck) {
        n->stuck = clock_now_ns() > until_ns;
        sched_yield();
    }
}

// Keeps the error, ends what runs.
static int fail_with(struct nccl *n, const struct error *why, struct error *err)
{
    n->failed = true;
    n->why = *why;
    abort_communicator(n);
    drain_stream(n);
    if (err)
        *err = *why;
    return error_nonzero(why->code);
}

// What this rank found: the first error of any rank is the one that counts.
static int give_up(struct nccl *n, struct nccl_place place, bool late, struct error *found, struct error *err)
{
    const struct nccl_group *group = &n->options.group;
    int code = group->give_up(group->context, place, late, found);
    found->code = code ? code : found->code;
    return fail_with(n, found, err);
}

static void describe(const struct nccl *n, struct nccl_place place, char text[NCCL_PLACE_BYTES])
{
    if (n->connected)
        n->options.group.describe(n->options.group.context, place, text);
    else
        snprintf(text, NCCL_PLACE_BYTES, "its start");
}

static int nccl_error(struct nccl *n, ncclResult_t result, const char *what, struct nccl_place place, struct error *err)
{
    const char *more = n->library.ncclGetLastError_(n->comm);
    struct error found;
    char at[NCCL_PLACE_BYTES];
    describe(n, place, at);
    if (more && strstr(more, "Duplicate GPU"))
        error_set(&found, ERR_GPU, "rank %d: NCCL refuses two ranks on one GPU: %s; take --transport host",
                  n->options.group.rank, more);
    else
        error_set(&found, result == ncclRemoteError ? ERR_RANK : ERR_GPU, "rank %d: NCCL failed in %s: %s: %s%s%s",
                  n->options.group.rank, at, what, n->library.ncclGetErrorString_(result), more && *more ? ": " : "",
                  more ? more : "");
    return give_up(n, place, false, &found, err);
}

static int cuda_failed(struct nccl *n, cudaError_t status, const char *what, struct nccl_place place, struct error *err)
{
    struct error found;
    char at[NCCL_PLACE_BYTES];
    if (status == cudaSuccess)
        return 0;
    describe(n, place, at);
    error_set(&found, status == cudaErrorMemoryAllocation ? ERR_MEMORY : ERR_GPU, "rank %d: device %d: %s in %s: %s",
              n->options.group.rank, n->device, what, at, cudaGetErrorString(status));
    return give_up(n, place, false, &found, err);
}

// ---- waiting --------------------------------------------------------------------------------------------------------------

struct wait {
    struct nccl_place place;
    int timeout_ms;
    const char *verb; // "rank 1: ... did not <verb> within"
    int64_t waited_ns, before_ns;
    uint32_t began;
    int rounds;
};

static struct wait wait_begin(const struct nccl *n, struct nccl_place place, int timeout_ms, const char *verb)
{
    return (struct wait){.place = place,
                         .timeout_ms = timeout_ms,
                         .verb = verb,
                         .before_ns = clock_now_ns(),
                         .began = *(volatile uint32_t *)n->began};
}

static int late(struct nccl *n, const struct wait *w, struct error *err)
{
    struct error found;
    char at[NCCL_PLACE_BYTES];
    describe(n, w->place, at);
    if (n->connected)
        error_set(&found, ERR_RANK, "rank %d: %s did not %s over NCCL within %.1f s", n->options.group.rank, at,
                  w->verb, w->timeout_ms / 1000.0);
    else
        error_set(&found, ERR_RANK,
                  "rank %d: NCCL did not connect the %d ranks within %.1f s: it needs a way between "
                  "all of them (NCCL_DEBUG=INFO tells more); --transport host needs none between devices",
                  n->options.group.rank, n->options.group.tp_size, w->timeout_ms / 1000.0);
    return give_up(n, w->place, n->connected, &found, err);
}

// A turn of a wait that is not over yet. Time in which this process was stopped counts little.
static int wait_more(struct nccl *n, struct wait *w, struct error *err)
{
    const struct nccl_group *group = &n->options.group;
    struct error found = {.code = 0};
    uint32_t began = *(volatile uint32_t *)n->began;
    if (group->check(group->context, &found))
        return fail_with(n, &found, err);
    if (began != w->began) { // the device has come to a later message
        w->began = began;
        w->waited_ns = 0;
    }
    if (w->rounds++ < SPIN_ROUNDS)
        sched_yield();
    else
        nanosleep(&(struct timespec){.tv_nsec = SLEEP_NS}, NULL);
    int64_t now_ns = clock_now_ns(), most_ns = 100 * (int64_t)SLEEP_NS, slice_ns = now_ns - w->before_ns;
    w->before_ns = now_ns;
    w->waited_ns += slice_ns < most_ns ? slice_ns : most_ns;
    return w->waited_ns < (int64_t)w->timeout_ms * 1000000 ? 0 : late(n, w, err);
}

// Waits until NCCL has taken what it was told: until then it has queued nothing on the stream. result: what the call returned.
static int settle(struct nccl *n, ncclResult_t result, struct wait *w, const char *what, struct error *err)
{
    int rc;
    while (result == ncclInProgress) {
        ncclResult_t called = n->library.ncclCommGetAsyncError_(n->comm, &result);
        if (called != ncclSuccess)
            result = called;
        if (result == ncclInProgress && (rc = wait_more(n, w, err)))
            return rc;
    }
    return result == ncclSuccess ? 0 : nccl_error(n, result, what, w->place, err);
}

static int already_failed(const struct nccl *n, struct error *err)
{
    if (err)
        *err = n->why;
    return error_nonzero(n->why.code);
}

// The message that the device is at.
static struct nccl_place place_now(const struct nccl *n)
{
    uint32_t began = *(volatile uint32_t *)n->began;
    return n->places[(n->messages - began < PLACES ? began : n->messages) % PLACES];
}

static int wait_until_done(struct nccl *n, cudaEvent_t event, struct error *err)
{
    int rc;
    if (n->failed)
        return already_failed(n, err);
    struct wait w = wait_begin(n, place_now(n), n->options.timeout_ms, "finish");
    for (;;) {
        cudaError_t status = event ? cudaEventQuery(event) : cudaStreamQuery(n->options.stream);
        if (status == cudaSuccess)
            return 0;
        w.place = place_now(n);
        if (status != cudaErrorNotReady)
            return cuda_failed(n, status, "waiting", w.place, err);
        ncclResult_t result = ncclSuccess, called = n->library.ncclCommGetAsyncError_(n->comm, &result);
        if (called != ncclSuccess)
            result = called;
        if (result != ncclSuccess && result != ncclInProgress)
            return nccl_error(n, result, "the communicator", w.place, err);
        if ((rc = wait_more(n, &w, err)))
            return rc;
    }
}

void nccl_follow(struct nccl *n, cudaStream_t stream)
{
    n->carrying = stream;
    if (stream != n->options.stream)
        n->beside = stream;
}

int nccl_wait(struct nccl *n, struct error *err) { return wait_until_done(n, NULL, err); }

int nccl_wait_event(struct nccl *n, cudaEvent_t event, struct error *err) { return wait_until_done(n, event, err); }

// ---- beginning and end -------------------------------------------------------------------------------------------------------

uint64_t nccl_buffer_bytes(int64_t max_rows, int64_t max_cols, int tp_size)
{
    uint64_t row = (uint64_t)(share_bytes(1, max_cols, tp_size, WIRE_F32) * tp_size), ranks = (uint64_t)tp_size;
    uint64_t most = row * (uint64_t)max_rows, bytes = most < PIECE_BYTES ? most : PIECE_BYTES;
    return 2 * (bytes > ranks * row ? bytes : ranks * row); // a row of each owner at least
}

uint64_t nccl_own_bytes(int tp_size)
{
    enum { CHANNELS = 2, CONNECTION_BYTES = 10 << 20 };
    return (uint64_t)CONNECTION_BYTES * CHANNELS * (uint64_t)tp_size; // a ring, and all others
}

// As NCCL tells machines apart.
static uint64_t host_of_nccl(void)
{
    const char *given = getenv("NCCL_HOSTID");
    return given ? fnv1a_64(given, strlen(given)) : host_identity();
}

static int fill_hello(struct nccl *n, struct nccl_hello *hello, struct error *err)
{
    const char *shares = getenv("NCCL_MULTI_RANK_GPU_ENABLE");
    memset(hello, 0, sizeof *hello);
    hello->version = n->library.version;
    hello->host = host_of_nccl();
    hello->shares = n->library.version >= SHARING_VERSION && shares && *shares == '1';
    cudaError_t status = cudaDeviceGetPCIBusId(hello->device, (int)sizeof hello->device, n->device);
    if (status != cudaSuccess)
        return error_set(err, ERR_GPU, "device %d: its PCI address: %s", n->device, cudaGetErrorString(status));
    if (n->options.group.rank != 0)
        return 0;
    ncclUniqueId id;
    ncclResult_t result = n->library.ncclGetUniqueId_(&id);
    if (result != ncclSuccess)
        return error_set(err, ERR_GPU, "rank 0: NCCL makes no id for its group: %s: %s",
                         n->library.ncclGetErrorString_(result), n->library.ncclGetLastError_(NULL));
    memcpy(hello->id, &id, sizeof id);
    return 0;
}

int nccl_open(struct nccl **out, const struct nccl_options *options, struct nccl_hello *hello, struct error *err)
{
    int rc;
    struct nccl *n = calloc(1, sizeof *n);
    if (!n)
        return error_set(err, ERR_MEMORY, "rank %d: no memory for the transport nccl", options->group.rank);
    n->options = *options;
    n->carrying = options->stream;
    n->buffer_bytes = nccl_buffer_bytes(options->max_rows, options->max_cols, options->group.tp_size) / 2;
    if ((rc = nccl_library_open(&n->library, options->library, err)))
        goto fail;
    cudaError_t status = cudaGetDevice(&n->device);
    if (status == cudaSuccess)
        status = cudaMalloc((void **)&n->to, n->buffer_bytes);
    if (status == cudaSuccess)
        status = cudaMalloc((void **)&n->from, n->buffer_bytes);
    if (status == cudaSuccess)
        status = cudaMallocHost((void **)&n->began, sizeof *n->began);
    if (status != cudaSuccess) {
        rc = error_set(err, status == cudaErrorMemoryAllocation ? ERR_MEMORY : ERR_GPU,
                       "device %d: %llu bytes for messages over NCCL: %s", n->device,
                       (unsigned long long)(2 * n->buffer_bytes), cudaGetErrorString(status));
        goto fail;
    }
    *n->began = 0;
    if ((rc = fill_hello(n, hello, err)))
        goto fail;
    *out = n;
    return 0;
fail:
    nccl_close(n);
    return rc;
}

static int compare_hellos(struct nccl *n, const struct nccl_hello *hellos, struct error *found)
{
    for (int a = 0; a < n->options.group.tp_size; a++) {
        if (hellos[a].version != hellos[0].version)
            return error_set(found, ERR_CORRUPT,
                             "the ranks have different versions of NCCL: rank 0 %d.%d.%d, rank %d %d.%d.%d",
                             hellos[0].version / 10000, hellos[0].version / 100 % 100, hellos[0].version % 100, a,
                             hellos[a].version / 10000, hellos[a].version / 100 % 100, hellos[a].version % 100);
        for (int b = 0; b < a; b++)
            if (hellos[a].host == hellos[b].host && !(hellos[a].shares && hellos[b].shares) &&
                strncmp(hellos[a].device, hellos[b].device, sizeof hellos[a].device) == 0)
                return error_set(found, ERR_GPU,
                                 "ranks %d and %d have the same GPU (%.31s), which NCCL refuses; take --transport host",
                                 b, a, hellos[a].device);
    }
    return 0;
}

int nccl_connect(struct nccl *n, const struct nccl_hello *hellos, struct error *err)
{
    const struct nccl_group *group = &n->options.group;
    struct nccl_place start = {0, -1};
    struct error found;
    struct nccl_config config = {
        .size = sizeof config,
        .magic = (unsigned)NCCL_CONFIG_MAGIC,
        .version = NCCL_OLDEST,
        .blocking = 0,
        .cga_cluster_size = NCCL_UNSET,
        .min_ctas = NCCL_UNSET,
        .max_ctas = NCCL_UNSET,
        .split_share = NCCL_UNSET,
    };
    ncclUniqueId id;
    if (n->failed)
        return already_failed(n, err);
    if (compare_hellos(n, hellos, &found))
        return give_up(n, start, false, &found, err);
    memcpy(&id, hellos[0].id, sizeof id);
    struct wait w = wait_begin(n, start, n->options.start_timeout_ms, "finish");
    ncclResult_t result =
        n->library.ncclCommInitRankConfig_(&n->comm, group->tp_size, id, group->rank, (ncclConfig_t *)(void *)&config);
    int rc = settle(n, result, &w, "connecting", err);
    n->connected = !rc;
    return rc;
}

// Waits for the device and for the other ranks' last messages; false: the communicator is to be aborted.
static bool end_orderly(struct nccl *n)
{
    struct error ignored;
    const struct nccl_group *group = &n->options.group;
    if (n->failed || group->check(group->context, &ignored) || nccl_wait(n, &ignored))
        return false;
    int64_t until_ns = clock_now_ns() + (int64_t)END_TIMEOUT_MS * 1000000;
    ncclResult_t result = n->library.ncclCommFinalize_(n->comm);
    while (result == ncclInProgress) {
        if (clock_now_ns() > until_ns || group->check(group->context, &ignored) ||
            n->library.ncclCommGetAsyncError_(n->comm, &result) != ncclSuccess)
            return false;
        sched_yield();
    }
    return result == ncclSuccess;
}

bool nccl_close(struct nccl *n)
{
    if (!n)
        return true;
    if (n->comm && end_orderly(n))
        n->library.ncclCommDestroy_(n->comm);
    else if (n->comm) {
        abort_communicator(n);
        drain_stream(n); // what it frees below a kernel may still use
    }
    bool over = !n->stuck;
    if (over) { // else they end with the process, and the library's code is in use until then
        cudaFree(n->to);
        cudaFree(n->from);
        cudaFreeHost(n->began);
        nccl_library_close(&n->library);
    }
    free(n);
    return over;
}

void nccl_describe(const struct nccl *n, char *text, size_t bytes)
{
    snprintf(text, bytes, "%s%s%s", n->library.name, *n->library.note ? "; " : "", n->library.note);
}

uint64_t nccl_sent_bytes(const struct nccl *n) { return n->sent_bytes; }

// ---- messages -----------------------------------------------------------------------------------------------------------------

// Each share to its owner, and those of this rank from all others.
static ncclResult_t all_to_all(struct nccl *n, size_t share)
{
    const struct nccl_library *library = &n->library;
    cudaStream_t stream = n->carrying;
    ncclResult_t result = library->ncclGroupStart_(), end;
    if (result != ncclSuccess)
        return result;
    for (int i = 1; i < n->options.group.tp_size && result == ncclSuccess; i++) {
        int peer = (n->options.group.rank + i) % n->options.group.tp_size;
        result = library->ncclSend_(n->to + share * (size_t)peer, share, ncclUint8, peer, n->comm, stream);
        if (result == ncclSuccess)
            result = library->ncclRecv_(n->from + share * (size_t)peer, share, ncclUint8, peer, n->comm, stream);
    }
    end = library->ncclGroupEnd_(); // also after a failure: the group is the thread's
    return result == ncclSuccess ? end : result;
}

// What a message does with a piece of its rows.
typedef int piece_step(struct nccl *n, const struct share_piece *piece, struct nccl_place place, struct error *err);

// Parts go to their owners.
static int scatter(struct nccl *n, const struct share_piece *piece, size_t share, struct wait *w, struct error *err)
{
    cudaError_t status = launch_share_encode(n->to, piece, n->began, n->messages, n->carrying);
    int rc = cuda_failed(n, status, "coding", w->place, err);
    rc = rc ? rc : settle(n, all_to_all(n, share), w, "sending parts", err);
    n->sent_bytes += rc ? 0 : share * (uint64_t)(piece->tp_size - 1);
    return rc;
}

// Where a rank's own share is gathered with all others': where its parts were, which have been sent by then.
static uint8_t *own_share(const struct nccl *n, const struct share_piece *piece, size_t share)
{
    return n->to + share * (size_t)piece->rank;
}

static int gather(struct nccl *n, const struct share_piece *piece, size_t share, struct wait *w, struct error *err)
{
    ncclResult_t result =
        n->library.ncclAllGather_(own_share(n, piece, share), n->to, share, ncclUint8, n->comm, n->carrying);
    int rc = settle(n, result, w, "gathering sums", err);
    if (rc)
        return rc;
    n->sent_bytes += share * (uint64_t)(piece->tp_size - 1);
    return cuda_failed(n, launch_share_decode(n->to, piece, n->carrying), "decoding", w->place, err);
}

static int reduce_piece(struct nccl *n, const struct share_piece *piece, struct nccl_place place, struct error *err)
{
    size_t share = (size_t)share_piece_bytes(piece);
    struct wait w = wait_begin(n, place, n->options.timeout_ms, "begin");
    int rc = scatter(n, piece, share, &w, err);
    if (rc)
        return rc;
    cudaError_t status = launch_share_add_up(own_share(n, piece, share), n->from, piece, n->carrying);
    return (rc = cuda_failed(n, status, "adding up", place, err)) ? rc : gather(n, piece, share, &w, err);
}

static int scatter_piece(struct nccl *n, const struct share_piece *piece, struct nccl_place place, struct error *err)
{
    struct wait w = wait_begin(n, place, n->options.timeout_ms, "begin");
    int rc = scatter(n, piece, (size_t)share_piece_bytes(piece), &w, err);
    return rc ? rc : cuda_failed(n, launch_share_add_up(NULL, n->from, piece, n->carrying), "adding up", place, err);
}

static int gather_piece(struct nccl *n, const struct share_piece *piece, struct nccl_place place, struct error *err)
{
    size_t share = (size_t)share_piece_bytes(piece);
    struct wait w = wait_begin(n, place, n->options.timeout_ms, "begin");
    cudaError_t status = launch_share_encode_own(own_share(n, piece, share), piece, n->began, n->messages, n->carrying);
    int rc = cuda_failed(n, status, "coding", place, err);
    return rc ? rc : gather(n, piece, share, &w, err);
}

// all: the whole message, of which the buffers hold some rows at a time.
static int run_message(struct nccl *n, const struct share_piece *all, piece_step *step, struct nccl_place place,
                       struct error *err)
{
    struct share_piece least = *all;
    int rc = 0;
    if (n->failed)
        return already_failed(n, err);
    least.rows = all->by_rows ? all->tp_size : 1;
    uint64_t least_bytes = (uint64_t)(share_piece_bytes(&least) * all->tp_size);
    if (least_bytes == 0) // nothing to add up
        return 0;
    if (least_bytes > n->buffer_bytes)
        return error_set(err, ERR_OTHER,
                         "rank %d: a message of %lld columns over NCCL: the largest was said to have %lld", all->rank,
                         (long long)all->cols, (long long)n->options.max_cols);
    int64_t at_once = (int64_t)(n->buffer_bytes / least_bytes) * least.rows;
    n->places[++n->messages % PLACES] = place;
    for (int64_t row = 0; row < all->rows && !rc; row += at_once) {
        struct share_piece piece = *all;
        piece.data = all->data + row * all->stride;
        piece.lost = all->lost ? all->lost + row * all->cols : NULL;
        piece.rows = all->rows - row < at_once ? all->rows - row : at_once; // whole turns of owners, but for the last
        rc = step(n, &piece, place, err);
    }
    return rc;
}

int nccl_all_reduce(struct nccl *n, float *data, uint16_t *lost, int64_t rows, int64_t cols, int64_t stride,
                    enum wire wire, struct nccl_place place, struct error *err)
{
    const struct nccl_group *group = &n->options.group;
    struct share_piece all = {.data = data,
                              .lost = lost,
                              .rows = rows,
                              .cols = cols,
                              .stride = stride,
                              .wire = wire,
                              .rank = group->rank,
                              .tp_size = group->tp_size};
    return run_message(n, &all, reduce_piece, place, err);
}

static struct share_piece piece_of_rows(const struct nccl *n, const struct nccl_rows *rows, uint16_t *lost)
{
    return (struct share_piece){.data = rows->data,
                                .lost = lost,
                                .rows = rows->rows,
                                .cols = rows->cols,
                                .stride = rows->cols,
                                .wire = rows->wire,
                                .rank = n->options.group.rank,
                                .tp_size = n->options.group.tp_size,
                                .by_rows = true,
                                .first_owner = rows->first_owner};
}

int nccl_reduce_scatter_rows(struct nccl *n, const struct nccl_rows *rows, uint16_t *lost, struct nccl_place place,
                             struct error *err)
{
    struct share_piece all = piece_of_rows(n, rows, lost);
    return run_message(n, &all, scatter_piece, place, err);
}

int nccl_all_gather_rows(struct nccl *n, const struct nccl_rows *rows, struct nccl_place place, struct error *err)
{
    struct share_piece all = piece_of_rows(n, rows, NULL);
    return run_message(n, &all, gather_piece, place, err);
}
