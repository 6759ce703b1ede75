// See rank_transport.h.
#include "engine/rank_transport.h"

#include "formats/fnv.h"
#include "kernels/host_identity.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SEE_ALL "; for p2p, show each rank all GPUs of the host (Slurm: --gpus-per-node, not --gpus-per-task)"

// What ranks of a launcher tell each other before they open their devices.
struct place {
    uint64_t host, shown; // shown: of what names the devices that a process may see
    char host_name[64];
    int32_t device_rank;
};

static uint64_t shown_devices(void)
{
    static const char *const names[] = {"CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"};
    char text[1024];
    int used = 0;
    for (int i = 0; i < 2 && used < (int)sizeof text; i++) {
        const char *value = getenv(names[i]);
        used += snprintf(text + used, sizeof text - (size_t)used, "%s%s\n", value ? "=" : "", value ? value : "");
    }
    return fnv1a_64(text, strlen(text));
}

// The same on all ranks: what was wanted cannot be had.
static int do_without(struct rank_transport *t, enum transport instead, const char *why, struct error *err)
{
    const struct rank_transport_options *o = &t->options;
    bool of_links = instead == TRANSPORT_HOST;
    if (!o->is_auto)
        return error_set(err, of_links ? ERR_GPU : ERR_USAGE, "--transport %s: %s; --transport %s",
                         transport_name(o->wanted), why, of_links ? "host does without" : "nccl is for those");
    t->transport = instead;
    if (comm_rank(o->comm) == 0)
        snprintf(t->note, sizeof t->note,
                 of_links ? "not over p2p: %s" : "sums of ranks through the CPU: %s; --transport nccl is for those",
                 why);
    return 0;
}

// The ranks of a stage that is spread: on one host, and shown the same devices.
static int look_where(struct rank_transport *t, struct place *all, struct error *err)
{
    const struct rank_transport_options *o = &t->options;
    char why[LINK_SENTENCE_BYTES];
    struct place mine;
    memset(&mine, 0, sizeof mine);
    mine.host = host_identity();
    mine.shown = shown_devices();
    mine.device_rank = o->device_rank;
    gethostname(mine.host_name, sizeof mine.host_name - 1);
    int rc = comm_all_gather(o->comm, all, &mine, sizeof mine, err);
    if (rc)
        return rc;
    for (int r = 1; r < comm_size(o->comm); r++)
        if (all[r].host != all[0].host) {
            snprintf(why, sizeof why, "ranks %d and %d are on %s and %s, whose devices share no memory", o->first,
                     o->first + r, all[0].host_name, all[r].host_name);
            return do_without(t, TRANSPORT_TCP, why, err);
        }
    for (int r = 1; r < comm_size(o->comm) && o->wanted == TRANSPORT_P2P; r++)
        if (all[r].shown != all[0].shown) {
            snprintf(why, sizeof why,
                     "ranks %d and %d are shown devices of their own (CUDA_VISIBLE_DEVICES), between which no rank "
                     "can try the links" SEE_ALL,
                     o->first, o->first + r);
            return do_without(t, TRANSPORT_HOST, why, err);
        }
    return 0;
}

int rank_transport_begin(struct rank_transport *t, const struct rank_transport_options *options, struct error *err)
{
    struct link_probe_options probe = link_probe_defaults;
    struct place all[COMM_MAX_RANKS];
    int number[COMM_MAX_RANKS];
    struct error problem;
    bool by_devices = options->wanted == TRANSPORT_HOST || options->wanted == TRANSPORT_P2P;
    memset(t, 0, sizeof *t);
    t->options = *options;
    t->transport = options->wanted;
    if (!options->spread || !by_devices || options->tp_size == 1)
        return 0;
    int rc = look_where(t, all, err);
    if (rc || t->transport != TRANSPORT_P2P || comm_rank(options->comm) != 0)
        return rc;
    for (int r = 0; r < options->tp_size; r++)
        number[r] = all[r].device_rank;
    probe.backend = options->backend;
    probe.num_ends = probe.group = options->tp_size;
    probe.rank = number;
    if (link_probe_begin(&t->own, &probe, &problem))
        snprintf(t->problem, sizeof t->problem, "%.*s", (int)sizeof t->problem - 1, problem.msg);
    return 0;
}

// What the first rank has seen.
struct verdict {
    int32_t good, slow; // slow: it is not good for that reason alone
    char why[LINK_SENTENCE_BYTES];
};

// The links that were tried are those between the ranks' devices.
static void compare_devices(const struct rank_transport *t, char (*bus)[DEVICE_BUS_BYTES], struct verdict *seen)
{
    const struct link_board *board = link_probe_board(t->own);
    for (int r = 0; r < t->options.tp_size && (seen->good || seen->slow); r++)
        if (strcmp(bus[r], board->end[r].bus) != 0) {
            seen->good = seen->slow = false;
            snprintf(seen->why, sizeof seen->why,
                     "the device of rank %d (%.23s) is not shown to rank %d, which was to try its links" SEE_ALL,
                     t->options.first + r, bus[r], t->options.first);
        }
}

static int ask_devices(const struct rank_transport *t, const struct device *device, char (*all)[DEVICE_BUS_BYTES],
                       struct error *err)
{
    char mine[DEVICE_BUS_BYTES] = "";
    if (t->options.backend->bus)
        t->options.backend->bus(device, mine);
    return comm_all_gather(t->options.comm, all, mine, sizeof mine, err);
}

int rank_transport_settle(struct rank_transport *t, const struct device *device, struct error *err)
{
    enum { LOOK_US = 200 };
    const struct rank_transport_options *o = &t->options;
    const struct link_probe *links = o->spread ? t->own : o->links;
    char bus[COMM_MAX_RANKS][DEVICE_BUS_BYTES];
    bool first = comm_rank(o->comm) == 0;
    struct verdict seen;
    int rc;
    memset(&seen, 0, sizeof seen);
    if (t->transport != TRANSPORT_P2P || o->tp_size == 1)
        return 0;
    if (o->spread && (rc = ask_devices(t, device, bus, err)))
        return rc;
    while (first && links && !link_probe_has_ended(links) && !o->stopped(o->arg)) {
        comm_at(o->comm, OP_START, -1);
        usleep(LOOK_US);
    }
    if (first && links) {
        seen.good = link_probe_verdict(links, seen.why);
        seen.slow = !seen.good && link_probe_delivers(links);
    } else if (first) {
        snprintf(seen.why, sizeof seen.why, "%s", o->spread ? t->problem : o->link_problem);
    }
    if (first && (seen.good || seen.slow) && o->spread)
        compare_devices(t, bus, &seen);
    if ((rc = comm_broadcast(o->comm, &seen, sizeof seen, 0, err)))
        return rc;
    seen.why[sizeof seen.why - 1] = 0;
    if (seen.good || (seen.slow && !o->is_auto)) {
        if (first && seen.slow)
            snprintf(t->note, sizeof t->note, "slow over p2p: %s", seen.why);
        return 0;
    }
    return do_without(t, TRANSPORT_HOST, seen.why, err);
}

void rank_transport_end(struct rank_transport *t)
{
    link_probe_end(t->own);
    t->own = NULL;
}
