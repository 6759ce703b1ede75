// See numa.h. Nodes are known by the kernel's files alone; no library is needed.
#include "engine/numa.h"

#include <errno.h>
#include <linux/mempolicy.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { MAX_NODES = 64, MASK_BITS = 8 * sizeof(unsigned long) };

struct nodes {
    int count;
    int number[MAX_NODES];
    cpu_set_t cpus[MAX_NODES]; // allowed ones
};

enum numa_pin numa_pin_from_name(const char *name)
{
    return strcmp(name, "core") == 0 ? PIN_CORE : strcmp(name, "node") == 0 ? PIN_NODE : PIN_NONE;
}

// "0-3,8,10-11\n", also empty, as a set of numbers below CPU_SETSIZE.
static bool parse_list(const char *text, cpu_set_t *out)
{
    CPU_ZERO(out);
    while (*text && *text != '\n') {
        char *end;
        if (*text < '0' || *text > '9')
            return false;
        unsigned long first = strtoul(text, &end, 10), last = first;
        if (*end == '-') {
            if (end[1] < '0' || end[1] > '9')
                return false;
            last = strtoul(end + 1, &end, 10);
        }
        if (last < first || last >= CPU_SETSIZE || (*end && *end != ',' && *end != '\n'))
            return false;
        for (unsigned long i = first; i <= last; i++)
            CPU_SET(i, out);
        text = *end == ',' ? end + 1 : end;
    }
    return true;
}

static bool read_list(const char *path, cpu_set_t *out)
{
    char text[4096];
    FILE *f = fopen(path, "re");
    if (!f)
        return false;
    bool read = fgets(text, sizeof text, f) != NULL;
    fclose(f);
    return read && parse_list(text, out);
}

// False when they cannot be told.
static bool try_nodes(struct nodes *out, const char *system_dir, const cpu_set_t *allowed)
{
    char path[512];
    cpu_set_t online;
    out->count = 0;
    snprintf(path, sizeof path, "%s/online", system_dir);
    if (!read_list(path, &online))
        return false;
    for (int node = 0; node < CPU_SETSIZE; node++) {
        cpu_set_t cpus;
        if (!CPU_ISSET(node, &online))
            continue;
        snprintf(path, sizeof path, "%s/node%d/cpulist", system_dir, node);
        if (!read_list(path, &cpus))
            return false;
        CPU_AND(&cpus, &cpus, allowed);
        if (CPU_COUNT(&cpus) == 0)
            continue;
        if (out->count == MAX_NODES || node >= (int)MASK_BITS)
            return false;
        out->number[out->count] = node;
        out->cpus[out->count++] = cpus;
    }
    return out->count > 0;
}

// What cannot be told is one node.
static void read_nodes(struct nodes *out, const char *system_dir, const cpu_set_t *allowed)
{
    if (try_nodes(out, system_dir, allowed))
        return;
    out->count = 1;
    out->cpus[0] = *allowed;
}

// Part `index` of `parts` of the processors; at least one.
static cpu_set_t part_of(const cpu_set_t *cpus, int index, int parts)
{
    int count = CPU_COUNT(cpus), begin = index * count / parts, end = (index + 1) * count / parts, at = 0;
    cpu_set_t part;
    if (end == begin) {
        begin = index % count;
        end = begin + 1;
    }
    CPU_ZERO(&part);
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        if (!CPU_ISSET(cpu, cpus))
            continue;
        if (at >= begin && at < end)
            CPU_SET(cpu, &part);
        at++;
    }
    return part;
}

// On the nodes that there are. *sharing: how many ranks are on the same ones.
static struct numa_place place_on(const struct nodes *nodes, enum numa_pin pin, int rank, int tp_size, int *sharing)
{
    struct numa_place place = {.node = -1};
    CPU_ZERO(&place.cpus);
    // Ranks [first_rank, end_rank) share the nodes [first, end).
    int first = rank * nodes->count / tp_size, end = (rank + 1) * nodes->count / tp_size;
    int first_rank = rank, end_rank = rank + 1;
    if (end <= first)
        end = first + 1;
    if (tp_size > nodes->count) {
        end = first + 1;
        while (first_rank > 0 && (first_rank - 1) * nodes->count / tp_size == first)
            first_rank--;
        while (end_rank < tp_size && end_rank * nodes->count / tp_size == first)
            end_rank++;
    }
    for (int node = first; node < end; node++)
        CPU_OR(&place.cpus, &place.cpus, &nodes->cpus[node]);
    if (nodes->count > 1 && end == first + 1)
        place.node = nodes->number[first];
    if (pin == PIN_CORE)
        place.cpus = part_of(&place.cpus, rank - first_rank, end_rank - first_rank);
    *sharing = end_rank - first_rank;
    return place;
}

struct numa_place numa_place_of(const char *system_dir, const cpu_set_t *allowed, enum numa_pin pin, int rank,
                                int tp_size, int threads)
{
    struct numa_place anywhere = {.node = -1}, place = anywhere;
    struct nodes nodes;
    int sharing;
    CPU_ZERO(&anywhere.cpus);
    if (pin == PIN_NONE || CPU_COUNT(allowed) == 0)
        return anywhere;
    read_nodes(&nodes, system_dir, allowed);
    if (nodes.count == 1 && pin == PIN_NODE)
        return anywhere;
    for (int r = 0; r < tp_size && pin == PIN_NODE; r++) {
        place = place_on(&nodes, pin, r, tp_size, &sharing);
        if (CPU_COUNT(&place.cpus) < sharing * threads)
            return anywhere;
    }
    return place_on(&nodes, pin, rank, tp_size, &sharing);
}

// The ranks that have the fewest processors for each.
struct misfit {
    struct numa_place place;
    int rank, sharing, fits; // fits: threads of each
};

static struct misfit narrowest(const struct nodes *nodes, enum numa_pin pin, int tp_size)
{
    struct misfit least = {.fits = CPU_SETSIZE};
    for (int rank = 0; rank < tp_size; rank++) {
        int sharing;
        struct numa_place place = place_on(nodes, pin, rank, tp_size, &sharing);
        sharing = pin == PIN_CORE ? 1 : sharing; // each has its part
        if (CPU_COUNT(&place.cpus) / sharing < least.fits)
            least = (struct misfit){place, rank, sharing, CPU_COUNT(&place.cpus) / sharing};
    }
    return least;
}

void numa_note(char text[NUMA_NOTE_BYTES], const char *system_dir, const cpu_set_t *allowed, enum numa_pin pin,
               int tp_size, int threads)
{
    struct nodes nodes;
    char where[32] = "its nodes";
    int cpus = CPU_COUNT(allowed), each = cpus > tp_size ? cpus / tp_size : 1;
    text[0] = 0;
    if (cpus == 0 || threads == 1)
        return;
    if ((int64_t)tp_size * threads > cpus) {
        snprintf(text, NUMA_NOTE_BYTES,
                 "%d rank%s of %d threads %s %d processor%s here, so threads wait for each other: --threads %d %s",
                 tp_size, tp_size == 1 ? "" : "s", threads, tp_size == 1 ? "has" : "have", cpus, cpus == 1 ? "" : "s",
                 each, tp_size > cpus ? "comes nearest" : "fits");
        return;
    }
    read_nodes(&nodes, system_dir, allowed);
    if (pin == PIN_NONE || nodes.count == 1)
        return;
    struct misfit least = narrowest(&nodes, pin, tp_size);
    if (least.fits >= threads)
        return;
    int count = CPU_COUNT(&least.place.cpus);
    if (least.place.node >= 0)
        snprintf(where, sizeof where, "NUMA node %d", least.place.node);
    each = least.fits > 1 ? least.fits : 1;
    if (pin == PIN_CORE)
        snprintf(text, NUMA_NOTE_BYTES,
                 "--pin core: rank %d has %d processor%s of %s for %d threads, so some share one: --threads %d fits",
                 least.rank, count, count == 1 ? "" : "s", where, threads, each);
    else
        snprintf(text, NUMA_NOTE_BYTES,
                 "--pin node keeps no rank to its node: %d rank%s of %d threads would have the %d processor%s of %s: "
                 "--threads %d %s",
                 least.sharing, least.sharing == 1 ? "" : "s", threads, count, count == 1 ? "" : "s", where, each,
                 least.fits > 0 ? "fits" : "comes nearest");
}

int numa_keep_to(const struct numa_place *place, struct error *err)
{
    bool forbidden = false; // by a container: then ranks are wherever the kernel puts them
    if (CPU_COUNT(&place->cpus) > 0 && sched_setaffinity(0, sizeof place->cpus, &place->cpus)) {
        forbidden = errno == EPERM || errno == ENOSYS;
        if (!forbidden)
            return error_set_errno(err, "cannot keep a rank to %d processors; --pin none leaves them open",
                                   CPU_COUNT(&place->cpus));
    }
    if (place->node < 0 || forbidden)
        return 0;
    unsigned long node = 1ul << place->node;
    // Refused in some containers: then the first touch decides, and it comes from a thread that is there.
    syscall(SYS_set_mempolicy, MPOL_PREFERRED, &node, MASK_BITS + 1);
    return 0;
}

void numa_gather_pages(const struct numa_place *place, const void *begin, uint64_t bytes)
{
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), at = (uintptr_t)begin / page * page;
    unsigned long node = place->node < 0 ? 0 : 1ul << place->node;
    if (node && bytes) // pages that cannot move stay where they are
        syscall(SYS_mbind, at, (uintptr_t)begin + bytes - at, MPOL_PREFERRED, &node, MASK_BITS + 1, MPOL_MF_MOVE);
}
