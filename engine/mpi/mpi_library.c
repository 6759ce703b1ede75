// Bytes between two ranks as messages of MPI, sent and received without blocking. See mpi_library.h.
//
// What is sent is copied to a slot of its own until MPI has done with it. From each rank two receives are open, so that the next
// message has its place while the last one is read; messages of one sender arrive in the order of the receives.
#include "engine/mpi/mpi_library.h"

#include <errno.h>
#include <mpi.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    MESSAGE_BYTES = 128 * 1024,
    SENDS = 4, // under way to one rank
    RECEIVES = 2,
    TAG = 7,
    LEAST_NAP_NS = 20000, // between two looks at MPI, which has nothing to sleep on
    MOST_NAP_NS = 1000000,
    NAPS = 64, // of one length
};

struct outgoing {
    MPI_Request request;
    uint8_t *bytes; // [MESSAGE_BYTES]
};

struct incoming {
    MPI_Request request;
    uint8_t *bytes; // [MESSAGE_BYTES]
    int end;        // bytes that have come; -1: not yet
};

struct side {
    struct outgoing sends[SENDS];
    struct incoming receives[RECEIVES];
    int reading, at; // which receive is read, and from which byte
};

struct carrier {
    MPI_Comm comm;
    int rank, size;
    _Atomic int quiet;  // looks since something came
    struct side *sides; // [size]
};

static MPI_Request ending = MPI_REQUEST_NULL;
static bool is_ending;

static int64_t lost(int code)
{
    (void)code; // MPI says of a connection no more than that it failed
    errno = ECONNABORTED;
    return -1;
}

static int64_t send_bytes(void *data, int rank, const struct iovec *parts, int count)
{
    struct carrier *carrier = data;
    struct side *side = &carrier->sides[rank];
    for (int i = 0; i < SENDS; i++) {
        struct outgoing *send = &side->sends[i];
        int done = 1, code = MPI_Test(&send->request, &done, MPI_STATUS_IGNORE);
        if (code != MPI_SUCCESS)
            return lost(code);
        if (!done)
            continue;
        size_t bytes = 0;
        for (int part = 0; part < count && bytes < MESSAGE_BYTES; part++) {
            size_t room = MESSAGE_BYTES - bytes, n = parts[part].iov_len < room ? parts[part].iov_len : room;
            memcpy(send->bytes + bytes, parts[part].iov_base, n);
            bytes += n;
        }
        code = MPI_Isend(send->bytes, (int)bytes, MPI_BYTE, rank, TAG, carrier->comm, &send->request);
        return code == MPI_SUCCESS ? (int64_t)bytes : lost(code);
    }
    return 0;
}

static int open_receive(struct carrier *carrier, int rank, struct incoming *receive)
{
    receive->end = -1;
    return MPI_Irecv(receive->bytes, MESSAGE_BYTES, MPI_BYTE, rank, TAG, carrier->comm, &receive->request);
}

static int64_t receive_bytes(void *data, int rank, void *to, size_t bytes)
{
    struct carrier *carrier = data;
    struct side *side = &carrier->sides[rank];
    struct incoming *receive = &side->receives[side->reading];
    if (receive->end < 0) {
        int done = 0;
        MPI_Status status;
        int code = MPI_Test(&receive->request, &done, &status);
        if (code != MPI_SUCCESS)
            return lost(code);
        if (!done) {
            carrier->quiet++;
            return 0;
        }
        MPI_Get_count(&status, MPI_BYTE, &receive->end);
        side->at = 0;
    }
    carrier->quiet = 0;
    size_t left = (size_t)(receive->end - side->at), n = left < bytes ? left : bytes;
    memcpy(to, receive->bytes + side->at, n);
    side->at += (int)n;
    if (side->at == receive->end) {
        int code = open_receive(carrier, rank, receive);
        if (code != MPI_SUCCESS)
            return lost(code);
        side->reading = (side->reading + 1) % RECEIVES;
    }
    return (int64_t)n;
}

static void wait_for_bytes(void *data, const bool *readers, const bool *writers, int wake, int64_t limit_ns)
{
    struct carrier *carrier = data;
    bool looks = false;
    for (int rank = 0; rank < carrier->size; rank++)
        looks |= readers[rank] || writers[rank];
    int64_t nap_ns = LEAST_NAP_NS;
    for (int quiet = carrier->quiet; quiet > NAPS * carrier->size && nap_ns < MOST_NAP_NS; quiet /= 2)
        nap_ns *= 2;
    if (!looks || nap_ns > limit_ns)
        nap_ns = limit_ns;
    struct pollfd fd = {.fd = wake, .events = POLLIN};
    struct timespec nap = {.tv_sec = nap_ns / 1000000000, .tv_nsec = nap_ns % 1000000000};
    if (ppoll(&fd, 1, &nap, NULL) < 0)
        return; // a signal: the caller looks again
}

static void finish(void *data, int rank)
{
    (void)data;
    (void)rank;
}

static void free_carrier(struct carrier *carrier)
{
    for (int rank = 0; rank < carrier->size && carrier->sides; rank++) {
        for (int i = 0; i < SENDS; i++)
            free(carrier->sides[rank].sends[i].bytes);
        for (int i = 0; i < RECEIVES; i++)
            free(carrier->sides[rank].receives[i].bytes);
    }
    free(carrier->sides);
    free(carrier);
}

// Receives end here. A send that MPI still holds, to a rank that no longer takes it, keeps its memory until the process ends.
static void close_carrier(void *data)
{
    struct carrier *carrier = data;
    bool held = false;
    for (int rank = 0; rank < carrier->size; rank++) {
        struct side *side = &carrier->sides[rank];
        for (int i = 0; i < RECEIVES && rank != carrier->rank; i++)
            if (side->receives[i].request != MPI_REQUEST_NULL) {
                MPI_Cancel(&side->receives[i].request);
                MPI_Request_free(&side->receives[i].request);
                held = true; // it may still be written to
            }
        for (int i = 0; i < SENDS && rank != carrier->rank; i++) {
            int done = 1;
            MPI_Test(&side->sends[i].request, &done, MPI_STATUS_IGNORE);
            held |= !done;
        }
    }
    if (!held)
        free_carrier(carrier);
}

static const struct comm_carrier mpi_carrier = {
    .send = send_bytes, .receive = receive_bytes, .wait = wait_for_bytes, .finish = finish, .close = close_carrier};

static bool make_sides(struct carrier *carrier)
{
    bool whole = true;
    if (!(carrier->sides = calloc((size_t)carrier->size, sizeof *carrier->sides)))
        return false;
    for (int rank = 0; rank < carrier->size; rank++) {
        struct side *side = &carrier->sides[rank];
        for (int i = 0; i < SENDS; i++)
            side->sends[i].request = MPI_REQUEST_NULL;
        for (int i = 0; i < RECEIVES; i++)
            side->receives[i].request = MPI_REQUEST_NULL;
        for (int i = 0; i < SENDS && rank != carrier->rank; i++)
            whole &= (side->sends[i].bytes = malloc(MESSAGE_BYTES)) != NULL;
        for (int i = 0; i < RECEIVES && rank != carrier->rank; i++)
            whole &= (side->receives[i].bytes = malloc(MESSAGE_BYTES)) != NULL;
    }
    return whole;
}

static bool open_receives(struct carrier *carrier)
{
    for (int rank = 0; rank < carrier->size; rank++)
        for (int i = 0; i < RECEIVES && rank != carrier->rank; i++)
            if (open_receive(carrier, rank, &carrier->sides[rank].receives[i]) != MPI_SUCCESS)
                return false;
    return true;
}

static void *start(int *rank, int *size, char *why, size_t why_bytes)
{
    int has = 0, initialized = 0;
    struct carrier *carrier = calloc(1, sizeof *carrier);
    if (!carrier) {
        snprintf(why, why_bytes, "out of memory");
        return NULL;
    }
    MPI_Initialized(&initialized);
    if (initialized || MPI_Init_thread(NULL, NULL, MPI_THREAD_SERIALIZED, &has) != MPI_SUCCESS ||
        has < MPI_THREAD_SERIALIZED) {
        snprintf(why, why_bytes,
                 initialized ? "MPI was started before" : "MPI does not start with calls from several threads");
        free(carrier);
        return NULL;
    }
    MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
    MPI_Comm_rank(MPI_COMM_WORLD, &carrier->rank);
    MPI_Comm_size(MPI_COMM_WORLD, &carrier->size);
    carrier->comm = MPI_COMM_WORLD;
    if (!make_sides(carrier)) {
        snprintf(why, why_bytes, "no memory for messages of %d ranks", carrier->size);
        free_carrier(carrier);
        return NULL;
    }
    if (!open_receives(carrier)) {
        snprintf(why, why_bytes, "MPI takes no messages of other ranks");
        close_carrier(carrier); // MPI may still write to those that are open
        return NULL;
    }
    *rank = carrier->rank;
    *size = carrier->size;
    return carrier;
}

static bool end(void)
{
    int done = 0;
    if (!is_ending) {
        if (MPI_Ibarrier(MPI_COMM_WORLD, &ending) != MPI_SUCCESS)
            return false;
        is_ending = true;
    }
    if (MPI_Test(&ending, &done, MPI_STATUS_IGNORE) != MPI_SUCCESS || !done)
        return false;
    MPI_Finalize();
    return true;
}

static void abort_all(int code) { MPI_Abort(MPI_COMM_WORLD, code); }

static const struct mpi_library library = {
    .abi = MPI_LIBRARY_ABI, .carrier = &mpi_carrier, .start = start, .end = end, .abort = abort_all};

__attribute__((visibility("default"))) const struct mpi_library *tpengine_mpi_library(void);
const struct mpi_library *tpengine_mpi_library(void) { return &library; }
