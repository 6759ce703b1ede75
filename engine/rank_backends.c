// Whether the ranks compute the same sums. See rank_backends.h.
#include "engine/rank_backends.h"

#include <stdio.h>
#include <string.h>

static int refuse(const struct rank_sums *all, int rank, uint32_t tables, struct error *err)
{
    char devices[80] = "";
    const struct rank_sums *other = &all[all[0].device ? 0 : rank];
    if (other->device)
        snprintf(devices, sizeof devices, "--backend %s, or, where a host cannot have that, with ", other->name);
    return error_set(err, ERR_USAGE,
                     "rank 0 computes with %s, rank %d with %s, and their sums differ: start all ranks with "
                     "%s--backend %s, which every host here can",
                     all[0].name, rank, all[rank].name, devices, kernels_fastest(tables)->name);
}

void rank_sums_of(struct rank_sums *out, const struct backend *backend, const struct kernels *kernels)
{
    memset(out, 0, sizeof *out);
    out->device = backend != &backend_cpu;
    out->tables = kernels_auto_set();
    snprintf(out->name, sizeof out->name, "%s", out->device ? backend->name : kernels->name);
    snprintf(out->sums, sizeof out->sums, "%s", out->device ? backend->name : kernels->sums);
}

int rank_sums_compare(const struct rank_sums *all, int ranks, struct error *err)
{
    uint32_t tables = all[0].tables;
    for (int r = 1; r < ranks; r++)
        tables &= all[r].tables;
    for (int r = 1; r < ranks; r++)
        if (memcmp(all[r].sums, all[0].sums, sizeof all[r].sums) != 0)
            return refuse(all, r, tables, err);
    return 0;
}
