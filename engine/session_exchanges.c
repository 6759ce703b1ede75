// How the ranks of a session exchange: wire, transport, rows dealt out, halves, checks. See session_internal.h.
#include "engine/session_internal.h"

#include "engine/backends.h"
#include "engine/comm_mpi.h"
#include "engine/comm_select.h"

#include <limits.h>
#include <string.h>

static int choose_wire(const struct manifest *manifest, const char *wanted, enum wire *wire, struct error *err)
{
    const char *name = strcmp(wanted, "auto") == 0 ? manifest->wire_advice : wanted;
    if (!wire_from_name(name, wire))
        return error_set(err, ERR_CORRUPT, "model.json: wire advice \"%s\" is not bf16, f32, fp8 or s8x", name);
    return 0;
}

// What one sum lost is made up for by the next one: that needs sums that all enter the residual by the same factor, which
// post-norms do not leave them.
static bool feeds_back(const struct manifest *manifest, enum wire wire, const char *wanted)
{
    return strcmp(wanted, "off") != 0 && wire_is_compressed(wire) && manifest->tp_size > 1 &&
           !manifest->model.post_norms;
}

// NULL: ranks of several processes can exchange over MPI.
static const char *why_not_mpi(const struct session *s)
{
    char path[PATH_MAX];
    if (strcmp(s->where.launcher, "mpi") != 0)
        return "it is for ranks that mpirun has started; these exchange over sockets (tcp)";
    if (!backends_find_library(path, COMM_MPI_LIBRARY))
        return COMM_MPI_LIBRARY " is neither beside tpengine nor in ../lib: it is built where Open MPI's headers are";
    return NULL;
}

static int choose_transport(struct session *s, const char *wanted, struct error *err)
{
    const struct backend *backend = s->worker.backend;
    int ranks = (int)s->manifest->tp_size;
    bool automatic = strcmp(wanted, "auto") == 0;
    const char *elsewhere = "it is for ranks of several hosts; these are all on this one and share its memory (shm)";
    const char *for_gpus = backend == &backend_cpu ? "it is for GPUs, and these ranks compute on the CPU"
                                                   : "the backend's devices do not exchange among themselves";
    bool spread = s->where.world_size > 1;
    // Where the ranks of a stage are is theirs to find out (rank_transport.h): a launcher's count may be that of one of two launchers of a host.
    const char *no_host = !backend->exchange_open               ? for_gpus
                          : backend->exchange_bytes(ranks) == 0 ? "there are too many ranks for it"
                          : ranks == 1 && automatic             ? "one rank has nobody to exchange with"
                                                                : NULL;
    const char *no_nccl = !backend->exchange_open ? for_gpus : automatic ? "it is taken when it is asked for" : NULL;
    const char *no_p2p = no_host                ? no_host
                         : !backend->link_probe ? "the backend cannot try the links between its devices"
                                                : NULL; // or by what the links are (rank_transport.h)
    const char *missing[TRANSPORT_COUNT] = {
        [TRANSPORT_SHM] =
            spread ? "the ranks are processes that share no memory, so they exchange over sockets (tcp)" : NULL,
        [TRANSPORT_TCP] = spread ? NULL : elsewhere,
        [TRANSPORT_MPI] = !spread ? elsewhere : why_not_mpi(s),
        [TRANSPORT_HOST] = no_host,
        [TRANSPORT_P2P] = no_p2p,
        [TRANSPORT_NCCL] = no_nccl,
    };
    enum transport *transport = &s->worker.transport;
    s->worker.transport_is_auto = automatic;
    int rc = comm_select_transport(transport, wanted, missing, err);
    bool of_devices = *transport == TRANSPORT_HOST || *transport == TRANSPORT_P2P || *transport == TRANSPORT_NCCL;
    if (!rc && ranks == 1 && of_devices) // there are no sums; what goes from stage to stage the hosts carry
        *transport = spread ? TRANSPORT_TCP : TRANSPORT_SHM;
    return rc;
}

// Whether the residual of prompts is dealt out to the ranks. Not by itself: what normed rows lose on the wire each layer sees at once, and with the
// sums' error feedback that is more than what they keep out of the residual (bundled model, tp 2 and 4: KL divergence .000046 instead of .000022
// with s8x, .00080 instead of .00036 with fp8; without feedback the two are equal). With f32 the results are the same bits. Nor by a step's size: what a row
// loses where would then depend on the rows beside it (law 9).
static int choose_deal(struct session *s, const char *wanted, struct error *err)
{
    const struct backend *b = s->worker.backend;
    if (strcmp(wanted, "on") != 0 || s->manifest->tp_size == 1)
        return 0;
    if (!b->norm_own)
        return error_set(err, ERR_USAGE, "--sequence-parallel on: the %s backend does not deal rows out to the ranks",
                         b->name);
    s->worker.deals = true;
    return 0;
}

// Whether prompts go through the layers in two parts, one of which computes while the other's sums are on their way.
static int choose_overlap(struct session *s, const char *wanted, struct error *err)
{
    const struct backend *b = s->worker.backend;
    bool on = strcmp(wanted, "on") == 0;
    if (on && s->manifest->tp_size > 1 && !b->window)
        return error_set(err, ERR_USAGE, "--overlap on: the %s backend does not cut the rows of a step", b->name);
    s->worker.overlap = on ? OVERLAP_ON : strcmp(wanted, "off") == 0 ? OVERLAP_OFF : OVERLAP_AUTO;
    return 0;
}

// Which steps have their sums checked. Where the ranks find for themselves that their devices cannot add up, they say it (worker.c).
static int choose_check(struct session *s, int64_t every, struct error *err)
{
    struct worker_options *w = &s->worker;
    bool by_host = w->transport == TRANSPORT_SHM || w->transport == TRANSPORT_TCP || w->transport == TRANSPORT_MPI;
    w->check_sums = every;
    if (every == 0)
        return 0;
    if (s->manifest->tp_size == 1)
        return error_set(err, ERR_USAGE, "--check-sums: at tp 1 there are no sums over ranks");
    if (!w->backend->all_reduce)
        return error_set(err, ERR_USAGE,
                         "--check-sums: the %s backend's sums are the processors' own: there is nothing "
                         "to compare them with",
                         w->backend->name);
    if (by_host && !w->transport_is_auto)
        return error_set(err, ERR_USAGE,
                         "--check-sums: over %s the processors add up, not the devices: there is nothing to compare "
                         "with; give --transport p2p, host or nccl, or leave --check-sums out",
                         transport_name(w->transport));
    return 0;
}

int session_choose_exchanges(struct session *s, const struct session_options *options, struct error *err)
{
    int rc;
    if ((rc = choose_wire(s->manifest, options->wire, &s->worker.wire, err)))
        return rc;
    s->worker.feedback = feeds_back(s->manifest, s->worker.wire, options->wire_feedback);
    if ((rc = choose_transport(s, options->transport, err)) || (rc = choose_deal(s, options->sequence_parallel, err)) ||
        (rc = choose_overlap(s, options->overlap, err)))
        return rc;
    return choose_check(s, options->check_sums, err);
}
