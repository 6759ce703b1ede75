// Opening exchanges between the ranks' devices. See device_exchange.h.
#include "engine/device_exchange.h"

#include "engine/comm_internal.h"
#include "kernels/clock.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { LATE_MS = 2000, LOOK_US = 1000, CALL_TEXT_BYTES = 128, REST_US = 200000 };

struct device_exchange {
    struct comm *comm;
    enum transport transport;
    void *region;
    size_t bytes;
};

// ---- the memory ----------------------------------------------------------------------------------------------------

// How the others find the memory of rank 0.
struct address {
    int64_t pid, fd, bytes, secret; // fd < 0: there is none
};

static int map(struct device_exchange *x, int fd, struct error *err)
{
    void *region = mmap(NULL, x->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (region == MAP_FAILED)
        return error_set(err, ERR_MEMORY, "mapping %zu bytes for the ranks' devices: %m", x->bytes);
    x->region = region;
    return 0;
}

static int make_memory(struct device_exchange *x, struct address *address, struct error *err)
{
    address->fd = memfd_create("tpengine-exchange", MFD_CLOEXEC);
    if (address->fd < 0 || ftruncate((int)address->fd, (off_t)x->bytes))
        return error_set(err, ERR_MEMORY, "making %zu bytes of shared memory for the ranks' devices: %m", x->bytes);
    address->secret = clock_now_ns();
    int rc = map(x, (int)address->fd, err);
    if (!rc)
        *(int64_t *)x->region = address->secret;
    return rc;
}

static int find_memory(struct device_exchange *x, const struct address *address, struct error *err)
{
    char path[64];
    if (address->fd < 0)
        return error_set(err, ERR_MEMORY, "rank 0 has no shared memory for the ranks' devices");
    snprintf(path, sizeof path, "/proc/%lld/fd/%lld", (long long)address->pid, (long long)address->fd);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return error_set(err, ERR_IO,
                         "%s, the memory of rank 0: %m; ranks whose devices exchange must be of one machine, user and "
                         "process namespace",
                         path);
    off_t size = lseek(fd, 0, SEEK_END);
    int rc = size != (off_t)x->bytes
                 ? error_set(err, ERR_IO, "%s is not the memory of rank 0: are the ranks on one machine?", path)
                 : map(x, fd, err);
    close(fd);
    if (!rc && *(const int64_t *)x->region != address->secret)
        rc = error_set(err, ERR_IO, "%s is not the memory of rank 0: are the ranks on one machine?", path);
    return rc;
}

// Whether something went wrong on any rank; that of the first is every rank's error.
static int agree_on_result(struct comm *comm, int rc, struct error *err)
{
    struct error mine = {.code = 0}, all[COMM_MAX_RANKS];
    if (rc)
        mine = *err;
    if ((rc = comm_all_gather(comm, all, &mine, sizeof mine, err)))
        return rc;
    for (int r = 0; r < comm_size(comm); r++)
        if (all[r].code) {
            *err = all[r];
            return all[r].code;
        }
    return 0;
}

static int share_memory(struct device_exchange *x, struct error *err)
{
    struct comm *comm = x->comm;
    struct address address = {.pid = getpid(), .fd = -1, .bytes = (int64_t)x->bytes};
    int made = comm_rank(comm) == 0 ? make_memory(x, &address, err) : 0, fd = (int)address.fd;
    struct error found;
    if (made)
        found = *err;
    int rc = comm_broadcast(comm, &address, sizeof address, 0, err);
    if (!rc && comm_rank(comm) != 0)
        made = find_memory(x, &address, &found);
    if (!rc)
        rc = agree_on_result(comm, made, made ? &found : err);
    if (rc && made)
        *err = found;
    if (comm_rank(comm) == 0 && fd >= 0)
        close(fd);
    if (!rc && comm_rank(comm) == 0)
        *(int64_t *)x->region = 0;
    return rc ? rc : comm_barrier(comm, err);
}

// ---- called by the device ------------------------------------------------------------------------------------------

static int on_gather(void *arg, void *all, const void *mine, size_t bytes, struct error *err)
{
    return comm_all_gather(((struct device_exchange *)arg)->comm, all, mine, bytes, err);
}

// A step's operations are all queued before their first is done. To the watchdog a rank that waits for them moves: what does not end on a device is
// found by the others' devices, whose waits have deadlines, or by a host that sees its own device come no further.
static bool on_look(void *arg)
{
    struct comm *comm = ((struct device_exchange *)arg)->comm;
    struct comm_position at = comm_region_position(comm->region, comm->first + comm->rank);
    comm_at(comm, at.op, at.layer);
    if (comm->transport->look)
        comm->transport->look(comm);
    return comm_region_aborted(comm->region);
}

static void describe_sum(struct comm *comm, int operation, int layer, char what[CALL_TEXT_BYTES])
{
    struct call call = comm_call(comm,
                                 operation >= DEVICE_ALL_GATHER       ? ROWS_TO_ALL
                                 : operation >= DEVICE_REDUCE_SCATTER ? ROWS_TO_OWNERS
                                                                      : ALL_REDUCE,
                                 0, 0);
    if (operation < 0) {
        snprintf(what, CALL_TEXT_BYTES, "a step's sums over ranks");
        return;
    }
    call.op = (enum comm_operation)(operation % DEVICE_REDUCE_SCATTER);
    call.layer = layer;
    comm_describe_call(what, &call);
}

static void on_describe(void *arg, int operation, int layer, char *text, size_t bytes)
{
    char what[CALL_TEXT_BYTES];
    describe_sum(((struct device_exchange *)arg)->comm, operation, layer, what);
    snprintf(text, bytes, "%s", what);
}

static int on_raise(void *arg, struct error *err)
{
    struct error found = *err;
    return comm_raise(((struct device_exchange *)arg)->comm, err, &found);
}

// A rank that waits for its device moves (on_look). One that does not, while others do, is the cause; -1: there is none.
static int rank_at_rest(const struct comm *comm)
{
    uint64_t before[COMM_MAX_RANKS];
    int whom = -1;
    for (int r = 0; r < comm->size; r++)
        before[r] = comm_region_position(comm->region, comm->first + r).progress;
    usleep(REST_US);
    for (int r = 0; r < comm->size && whom < 0; r++)
        if (r != comm->rank && comm_region_position(comm->region, comm->first + r).progress == before[r])
            whom = r;
    return whom;
}

// It is not known whom it waits for.
static int say_none_missing(struct device_exchange *x, const struct exchange_failure *failure, struct error *err)
{
    struct comm *comm = x->comm;
    char what[CALL_TEXT_BYTES];
    struct error found;
    describe_sum(comm, failure->operation, failure->layer, what);
    error_set(&found, ERR_RANK, "rank %d's device did not finish %s within %.1f s, and all ranks wait: %s",
              comm->first + failure->rank, what, comm->timeout_ms / 1000.0,
              x->transport == TRANSPORT_HOST ? "it hangs, or its link to the host's memory does; dmesg may tell more"
                                             : "a link between the devices hangs; --transport host does without it");
    return comm_raise(comm, err, &found);
}

static int say_missing(struct device_exchange *x, const struct exchange_failure *failure, struct error *err)
{
    struct comm *comm = x->comm;
    char place[COMM_PLACE_BYTES], what[CALL_TEXT_BYTES];
    int behind = failure->whom >= 0 ? failure->whom : rank_at_rest(comm), whom = comm->first + behind;
    if (behind < 0)
        return say_none_missing(x, failure, err);
    struct comm_position at = comm_region_position(comm->region, whom);
    struct error found;
    describe_sum(comm, failure->operation, failure->layer, what);
    comm_place(place, at.op, at.layer);
    error_set(&found, ERR_RANK,
              "rank %d's device did not %s %s within %.1f s; rank %d's waited; rank %d was last seen in %s", whom,
              failure->phase ? "finish" : "reach", what, comm->timeout_ms / 1000.0, comm->first + failure->rank, whom,
              place);
    comm_region_abort(comm->region, whom, &found); // it is that one's error
    return comm_check_abort(comm, err);
}

static int on_failure(void *arg, const struct exchange_failure *failure, struct error *err)
{
    struct comm *comm = ((struct device_exchange *)arg)->comm;
    if (failure)
        return say_missing(arg, failure, err);
    // Another rank's device has ended the exchanges; its host is about to say why.
    for (int ms = 0; ms < LATE_MS && !comm_region_aborted(comm->region); ms += LOOK_US / 1000)
        usleep(LOOK_US);
    int rc = comm_check_abort(comm, err);
    struct error found;
    error_set(&found, ERR_RANK,
              "rank %d: the exchanges between the devices were ended by another rank, which has not said why",
              comm->first + comm->rank);
    return rc ? rc : comm_raise(comm, err, &found);
}

// ---- opening -------------------------------------------------------------------------------------------------------

static int open_over(struct device_exchange *x, const struct backend *backend, struct device *device,
                     enum transport transport, bool feedback, struct error *err)
{
    struct exchange_options options = {.transport = transport,
                                       .rank = comm_rank(x->comm),
                                       .tp_size = comm_size(x->comm),
                                       .timeout_ms = x->comm->timeout_ms,
                                       .feedback = feedback,
                                       .region_bytes = x->bytes,
                                       .all_gather = on_gather,
                                       .aborted = on_look,
                                       .failed = on_failure,
                                       .raise = on_raise,
                                       .describe = on_describe,
                                       .arg = x};
    int rc = x->bytes ? share_memory(x, err) : 0;
    options.region = x->region;
    return rc ? rc : backend->exchange_open(device, &options, err);
}

int device_exchange_open(struct device_exchange **out, enum transport *transport, const struct backend *backend,
                         struct device *device, struct comm *comm, struct exchange_wish wish,
                         char note[DEVICE_EXCHANGE_NOTE_BYTES], struct error *err)
{
    *out = NULL;
    *transport = wish.transport;
    note[0] = 0;
    bool in_memory = wish.transport == TRANSPORT_HOST || wish.transport == TRANSPORT_P2P;
    bool carried = wish.transport == TRANSPORT_NCCL; // by a library: no memory is shared
    if (comm_size(comm) == 1 || (!in_memory && !carried))
        return 0;
    struct device_exchange *x = calloc(1, sizeof *x);
    if (!x)
        return error_set(err, ERR_MEMORY, "no memory for exchanges");
    *x = (struct device_exchange){.comm = comm,
                                  .transport = wish.transport,
                                  .bytes = carried ? 0 : (size_t)backend->exchange_bytes(comm_size(comm))};
    int rc = open_over(x, backend, device, wish.transport, wish.feedback, err);
    if (!rc) {
        *out = x;
        return 0;
    }
    device_exchange_close(x);
    if (comm_region_aborted(comm->region) || !wish.or_host) // on all ranks alike
        return rc;
    if (wish.transport != TRANSPORT_P2P) {
        snprintf(note, DEVICE_EXCHANGE_NOTE_BYTES, "sums of ranks through the CPU: %.200s", err->msg);
        *transport = comm_is_local(comm) ? TRANSPORT_SHM : TRANSPORT_TCP;
        return 0;
    }
    char why[DEVICE_EXCHANGE_NOTE_BYTES];
    snprintf(why, sizeof why, "not over p2p: %.220s", err->msg);
    wish.transport = TRANSPORT_HOST;
    rc = device_exchange_open(out, transport, backend, device, comm, wish, note, err);
    if (!rc && *transport == TRANSPORT_HOST)
        memcpy(note, why, sizeof why);
    return rc;
}

void device_exchange_close(struct device_exchange *x)
{
    if (x && x->region)
        munmap(x->region, x->bytes);
    free(x);
}
