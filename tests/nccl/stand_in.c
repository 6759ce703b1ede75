// A library in NCCL's place. See stand_in.h.
//
// An id names a file in /dev/shm with a box for each pair of ranks: a message goes through it in pieces. A rank's part of a message is work
// on the emulator's stream that is tried until all its pieces are through.
#include "tests/nccl/stand_in.h"

#include "kernels/cuda/nccl_library.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <libgen.h>
#include <limits.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { BOX_BYTES = 32768, MOST_TRANSFERS = 2 * STAND_IN_RANKS };

struct box {
    atomic_uint filled, emptied; // pieces so far
    unsigned bytes;
    unsigned char piece[BOX_BYTES];
};
struct region {
    atomic_int joined, finished;
    struct box boxes[STAND_IN_RANKS][STAND_IN_RANKS]; // [from][to]
};

struct ncclComm {
    atomic_int references;
    struct region *region;
    ncclUniqueId id;
    int rank, num_ranks;
    int messages;
    atomic_bool aborted;
    bool finalizing, finished, refused;
    struct message *queued; // not yet on its stream
    int asked;              // since
};

// A piece of work of one rank.
struct transfer {
    bool sends;
    int peer;
    unsigned char *data;
    size_t left;
};
struct message {
    struct ncclComm *comm;
    cudaStream_t stream;
    int num_transfers;
    bool stuck, endless, corrupt;
    struct transfer transfers[MOST_TRANSFERS];
};

static _Thread_local int group_depth;
static _Thread_local struct message *group;

// ---- what tests see ---------------------------------------------------------------------------------------------------------

static struct stand_in *shared;

__attribute__((constructor)) static void make_shared(void)
{
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED)
        abort();
    shared->version = 22809;
    const char *given = getenv("STAND_IN_FAULT");
    int fault = 0;
    if (given && sscanf(given, "%d:%d:%d", &fault, &shared->rank, &shared->nth) != 3)
        abort();
    shared->fault = (enum stand_in_fault)fault;
}

#define EXPORT __attribute__((visibility("default")))
EXPORT struct stand_in *nccl_stand_in(void) { return shared; }

static void count(int *counters, int rank) { __atomic_add_fetch(&counters[rank], 1, __ATOMIC_SEQ_CST); }

static bool fault(enum stand_in_fault kind, const struct ncclComm *comm)
{
    return shared->fault == kind && shared->rank == comm->rank;
}

// The emulator is in the program, or in the backend beside this library.
static void put_on_stream(struct message *message, bool (*step)(void *))
{
    typedef void enqueue_fn(cudaStream_t, bool (*)(void *), void *);
    static enqueue_fn *enqueue;
    if (!enqueue) {
        Dl_info info;
        char path[PATH_MAX + 64] = "";
        void *found = dlsym(RTLD_DEFAULT, "emulator_enqueue_until");
        if (!found && dladdr((void *)(uintptr_t)nccl_stand_in, &info)) {
            char file[PATH_MAX];
            if (!realpath(info.dli_fname, file))
                abort();
            snprintf(path, sizeof path, "%s/libtpengine_cuda_emulated.so", dirname(file));
            void *backend = dlopen(path, RTLD_NOW | RTLD_NOLOAD);
            found = backend ? dlsym(backend, "emulator_enqueue_until") : NULL;
        }
        if (!found) {
            fprintf(stderr, "nccl stand-in: no emulator in the program, and none at %s\n", path);
            abort();
        }
        *(void **)&enqueue = found;
    }
    enqueue(message->stream, step, message);
}

// ---- moving bytes -------------------------------------------------------------------------------------------------------------

static void release(struct ncclComm *comm)
{
    if (atomic_fetch_sub(&comm->references, 1) != 1)
        return;
    munmap(comm->region, sizeof *comm->region);
    free(comm);
}

static void move(struct ncclComm *comm, struct transfer *t, bool corrupt)
{
    struct box *box = t->sends ? &comm->region->boxes[comm->rank][t->peer] : &comm->region->boxes[t->peer][comm->rank];
    unsigned filled = atomic_load(&box->filled), emptied = atomic_load(&box->emptied);
    if (t->sends && filled == emptied) {
        box->bytes = t->left < BOX_BYTES ? (unsigned)t->left : BOX_BYTES;
        memcpy(box->piece, t->data, box->bytes);
        box->piece[box->bytes / 2 | 1] ^= corrupt ? 0x40 : 0;
    } else if (!t->sends && filled != emptied) {
        if (box->bytes > t->left) {
            fprintf(stderr, "nccl stand-in: rank %d receives %zu bytes from rank %d, which sends more\n", comm->rank,
                    t->left, t->peer);
            abort();
        }
        memcpy(t->data, box->piece, box->bytes);
    } else {
        return;
    }
    t->data += box->bytes;
    t->left -= box->bytes;
    atomic_store(t->sends ? &box->filled : &box->emptied, (t->sends ? filled : emptied) + 1);
}

static bool step(void *argument)
{
    struct message *m = argument;
    bool done = true;
    if (m->endless)
        return false;
    for (int i = 0; i < m->num_transfers && !atomic_load(&m->comm->aborted); i++) {
        if (m->transfers[i].left && !m->stuck)
            move(m->comm, &m->transfers[i], m->corrupt);
        done = done && !m->transfers[i].left;
    }
    if (!done && !atomic_load(&m->comm->aborted))
        return false;
    release(m->comm);
    free(m);
    return true;
}

static struct message *new_message(struct ncclComm *comm, cudaStream_t stream)
{
    struct message *m = calloc(1, sizeof *m);
    if (!m)
        abort();
    m->comm = comm, m->stream = stream;
    return m;
}

static void add(struct message *m, bool sends, int peer, const void *data, size_t bytes)
{
    m->transfers[m->num_transfers++] = (struct transfer){sends, peer, (unsigned char *)(uintptr_t)data, bytes};
}

static ncclResult_t queue(struct message *m)
{
    struct ncclComm *comm = m->comm;
    int number = comm->messages++;
    m->corrupt = fault(FAULT_CORRUPT, comm) && number == shared->nth;
    m->endless = fault(FAULT_ENDLESS, comm) && number == shared->nth;
    m->stuck = (fault(FAULT_STUCK, comm) && number == shared->nth) || fault(FAULT_ABORT_HANGS, comm);
    if (comm->queued || (fault(FAULT_CALL, comm) && number == shared->nth)) {
        free(m);
        return ncclSystemError; // the earlier one was not waited for, or a planned failure
    }
    atomic_fetch_add(&comm->references, 1);
    comm->queued = m;
    comm->asked = 0;
    return ncclInProgress;
}

// ---- NCCL's functions ---------------------------------------------------------------------------------------------------------

EXPORT ncclResult_t ncclGetVersion(int *version);
EXPORT ncclResult_t ncclGetVersion(int *version)
{
    *version = shared->version;
    return ncclSuccess;
}

EXPORT ncclResult_t ncclGetUniqueId(ncclUniqueId *id);
EXPORT ncclResult_t ncclGetUniqueId(ncclUniqueId *id)
{
    static atomic_int ids;
    memset(id, 0, sizeof *id);
    snprintf(id->internal, sizeof id->internal, "/nccl_stand_in.%d.%d", (int)getpid(), atomic_fetch_add(&ids, 1));
    return ncclSuccess;
}

EXPORT ncclResult_t ncclCommInitRankConfig(ncclComm_t *out, int num_ranks, ncclUniqueId id, int rank,
                                           ncclConfig_t *config);
EXPORT ncclResult_t ncclCommInitRankConfig(ncclComm_t *out, int num_ranks, ncclUniqueId id, int rank,
                                           ncclConfig_t *config)
{
    struct nccl_config given;
    memcpy(&given, config, sizeof given);
    if (given.size != sizeof given || given.magic != (unsigned)NCCL_CONFIG_MAGIC || given.blocking != 0 ||
        num_ranks > STAND_IN_RANKS)
        return ncclInvalidArgument;
    int file = shm_open(id.internal, O_CREAT | O_RDWR | O_CLOEXEC, 0600); // zeros for the first rank
    void *memory = file < 0 || ftruncate(file, sizeof(struct region)) != 0
                       ? MAP_FAILED
                       : mmap(NULL, sizeof(struct region), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    struct ncclComm *comm = calloc(1, sizeof *comm);
    if (file >= 0)
        close(file);
    if (memory == MAP_FAILED || !comm)
        return ncclSystemError;
    comm->references = 1;
    comm->id = id;
    comm->region = memory;
    comm->rank = rank, comm->num_ranks = num_ranks;
    count(shared->opened, rank);
    *out = comm;
    if (fault(FAULT_DUPLICATE, comm)) {
        comm->refused = true;
        return ncclInvalidUsage;
    }
    if (!fault(FAULT_NO_INIT, comm) && atomic_fetch_add(&comm->region->joined, 1) == num_ranks - 1)
        shm_unlink(id.internal);
    return ncclInProgress;
}

EXPORT ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *result);
EXPORT ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *result)
{
    *result = ncclSuccess;
    if (fault(FAULT_ASYNC_ERROR, comm) && comm->messages > shared->nth)
        *result = ncclRemoteError;
    else if (atomic_load(&comm->region->joined) < comm->num_ranks)
        *result = ncclInProgress;
    else if (comm->finalizing && (fault(FAULT_NO_END, comm) || atomic_load(&comm->region->finished) < comm->num_ranks))
        *result = ncclInProgress;
    else if (comm->queued && comm->asked++ < 1)
        *result = ncclInProgress;
    else if (comm->queued) {
        put_on_stream(comm->queued, step);
        comm->queued = NULL;
    }
    return ncclSuccess;
}

EXPORT ncclResult_t ncclCommFinalize(ncclComm_t comm);
EXPORT ncclResult_t ncclCommFinalize(ncclComm_t comm)
{
    const char *path = getenv("STAND_IN_TOLD");
    FILE *told = path ? fopen(path, "ae") : NULL;
    if (told) {
        fprintf(told, "rank %d: %d messages\n", comm->rank, comm->messages);
        fclose(told);
    }
    comm->finalizing = true;
    atomic_fetch_add(&comm->region->finished, 1);
    return ncclInProgress;
}

static ncclResult_t end(ncclComm_t comm, int *counters)
{
    count(counters, comm->rank);
    atomic_store(&comm->aborted, true);
    shm_unlink(comm->id.internal); // where not all ranks came
    if (comm->queued)
        put_on_stream(comm->queued, step);
    release(comm);
    return ncclSuccess;
}

EXPORT ncclResult_t ncclCommDestroy(ncclComm_t comm);
EXPORT ncclResult_t ncclCommDestroy(ncclComm_t comm) { return end(comm, shared->destroys); }

EXPORT ncclResult_t ncclCommAbort(ncclComm_t comm);
EXPORT ncclResult_t ncclCommAbort(ncclComm_t comm)
{
    if (fault(FAULT_ABORT_HANGS, comm)) {
        count(shared->aborts, comm->rank);
        shm_unlink(comm->id.internal);
        atomic_store(&comm->aborted, true); // what it has begun ends with the process; the test's stream as well
        for (;;)
            pause();
    }
    return end(comm, shared->aborts);
}

EXPORT ncclResult_t ncclGroupStart(void);
EXPORT ncclResult_t ncclGroupStart(void)
{
    group_depth++;
    return ncclSuccess;
}

EXPORT ncclResult_t ncclGroupEnd(void);
EXPORT ncclResult_t ncclGroupEnd(void)
{
    struct message *m = group;
    if (--group_depth > 0 || !m)
        return ncclSuccess;
    group = NULL;
    return queue(m);
}

static ncclResult_t transfer(bool sends, const void *data, size_t count, int peer, ncclComm_t comm, cudaStream_t stream)
{
    if (!group_depth || peer == comm->rank || peer >= comm->num_ranks)
        return ncclInvalidUsage;
    if (!group)
        group = new_message(comm, stream);
    add(group, sends, peer, data, count);
    return ncclSuccess;
}

EXPORT ncclResult_t ncclSend(const void *from, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                             cudaStream_t stream);
EXPORT ncclResult_t ncclSend(const void *from, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                             cudaStream_t stream)
{
    return type == ncclUint8 ? transfer(true, from, count, peer, comm, stream) : ncclInvalidArgument;
}

EXPORT ncclResult_t ncclRecv(void *to, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                             cudaStream_t stream);
EXPORT ncclResult_t ncclRecv(void *to, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                             cudaStream_t stream)
{
    return type == ncclUint8 ? transfer(false, to, count, peer, comm, stream) : ncclInvalidArgument;
}

EXPORT ncclResult_t ncclAllGather(const void *from, void *to, size_t count, ncclDataType_t type, ncclComm_t comm,
                                  cudaStream_t stream);
EXPORT ncclResult_t ncclAllGather(const void *from, void *to, size_t count, ncclDataType_t type, ncclComm_t comm,
                                  cudaStream_t stream)
{
    unsigned char *all = to;
    if (type != ncclUint8 || from != all + count * (size_t)comm->rank) // in place alone
        return ncclInvalidArgument;
    struct message *m = new_message(comm, stream);
    for (int i = 1; i < comm->num_ranks; i++) {
        int peer = (comm->rank + i) % comm->num_ranks;
        add(m, true, peer, from, count);
        add(m, false, peer, all + count * (size_t)peer, count);
    }
    return queue(m);
}

EXPORT const char *ncclGetErrorString(ncclResult_t result);
EXPORT const char *ncclGetErrorString(ncclResult_t result)
{
    static const char *const words[] = {"no error",
                                        "unhandled cuda error",
                                        "unhandled system error",
                                        "internal error",
                                        "invalid argument",
                                        "invalid usage",
                                        "remote process exited or there was a network error",
                                        "in progress"};
    return (unsigned)result <= ncclInProgress ? words[result] : "unknown result code";
}

EXPORT const char *ncclGetLastError(ncclComm_t comm);
EXPORT const char *ncclGetLastError(ncclComm_t comm)
{
    return comm && comm->refused ? "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000" : "";
}
