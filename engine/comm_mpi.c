// Loading MPI, and ending it. See comm_mpi.h.
#include "engine/comm_mpi.h"

#include "engine/backends.h"
#include "engine/comm_internal.h"
#include "engine/mpi/mpi_library.h"

#include <dlfcn.h>
#include <limits.h>
#include <stdlib.h>

enum { END_NAP_US = 1000 };

static const struct mpi_library *library;
static void *carrier;
static int own_rank, world_size;

static int load(const char *path, struct error *err)
{
    // Open MPI loads parts of its own, which look for it among the names of the program.
    void *handle = dlopen(path, RTLD_NOW | RTLD_GLOBAL);
    if (!handle)
        return error_set(err, ERR_USAGE, "MPI could not be loaded: %s; build tpengine where Open MPI's headers are",
                         dlerror());
    mpi_library_entry_fn *entry;
    *(void **)(&entry) = dlsym(handle, MPI_LIBRARY_ENTRY);
    const struct mpi_library *found = entry ? entry() : NULL;
    if (!found || found->abi != MPI_LIBRARY_ABI) {
        dlclose(handle);
        return error_set(err, ERR_USAGE, "%s: it is not of this version of tpengine; build both together", path);
    }
    library = found;
    return 0; // cppcheck-suppress resourceLeak ; it stays loaded on purpose
}

int comm_mpi_start(const char *path, int *rank, int *size, struct error *err)
{
    char beside[PATH_MAX], why[128];
    int rc;
    if (library)
        return error_set(err, ERR_OTHER, "MPI is started once in a process");
    if (!path && !backends_find_library(beside, COMM_MPI_LIBRARY))
        return error_set(err, ERR_USAGE,
                         "ranks over MPI need " COMM_MPI_LIBRARY
                         ", which is neither beside tpengine nor in ../lib: it is "
                         "built where Open MPI's headers are");
    if ((rc = load(path ? path : beside, err)))
        return rc;
    if (!(carrier = library->start(&own_rank, &world_size, why, sizeof why)))
        return error_set(err, ERR_OTHER, "MPI does not start: %s", why);
    *rank = own_rank;
    *size = world_size;
    return 0;
}

int comm_open_mpi(struct comm **out, struct comm_region *region, int timeout_ms, struct error *err)
{
    if (!carrier)
        return error_set(err, ERR_OTHER, "ranks over MPI are opened once, after its start");
    if (region->world_size != world_size)
        return error_set(err, ERR_USAGE, "MPI has started %d ranks, but the model is for %d (%d stages of %d)",
                         world_size, region->world_size, region->pp_size, region->tp_size);
    void *taken = carrier;
    carrier = NULL;
    return comm_open_link(out, library->carrier, taken, region, own_rank, timeout_ms, err);
}

int comm_mpi_end(int code, int timeout_ms, struct error *err)
{
    if (!library)
        return 0;
    if (code)
        library->abort(code);
    for (int64_t end_ns = clock_now_ns() + (int64_t)timeout_ms * 1000000; !library->end();) {
        if (clock_now_ns() > end_ns)
            return error_set(err, ERR_RANK, "not all ranks came to the end of MPI within %.1f s; rank %d waited",
                             timeout_ms / 1000.0, own_rank);
        usleep(END_NAP_US);
    }
    return 0;
}
