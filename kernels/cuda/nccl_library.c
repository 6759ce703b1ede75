// Finding NCCL. See nccl_library.h.
#if !defined(CUDA_EMULATOR) && defined(__has_include)
#if __has_include(<nccl.h>)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wstrict-prototypes" // some of the header's declarations say () for (void)
#include <nccl.h>
#pragma GCC diagnostic pop
#endif
#endif
#include "kernels/cuda/nccl_library.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef NCCL_H_
// ---- the header that is here says the same --------------------------------------------------------------------------------
#define SAME_PROTOTYPE(name, type) _Static_assert(__builtin_types_compatible_p(type, __typeof__(&(name))), #name);
NCCL_FUNCTIONS(SAME_PROTOTYPE)
#define SAME_PLACE(mine, theirs)                                                                                       \
    _Static_assert(offsetof(struct nccl_config, mine) == offsetof(ncclConfig_t, theirs), #theirs);
SAME_PLACE(size, size)
SAME_PLACE(magic, magic)
SAME_PLACE(version, version)
SAME_PLACE(blocking, blocking)
SAME_PLACE(cga_cluster_size, cgaClusterSize)
SAME_PLACE(min_ctas, minCTAs)
SAME_PLACE(max_ctas, maxCTAs)
SAME_PLACE(net_name, netName)
SAME_PLACE(split_share, splitShare)
_Static_assert(sizeof(ncclUniqueId) == NCCL_ID_BYTES && NCCL_UNSET == NCCL_CONFIG_UNDEF_INT, "values of NCCL");
_Static_assert((int)ncclSuccess == 0 && (int)ncclUnhandledCudaError == 1 && (int)ncclSystemError == 2 &&
                   (int)ncclInternalError == 3 && (int)ncclInvalidArgument == 4 && (int)ncclInvalidUsage == 5 &&
                   (int)ncclRemoteError == 6 && (int)ncclInProgress == 7,
               "ncclResult_t");
_Static_assert((int)ncclUint8 == 1, "ncclDataType_t");
#endif

enum {
    HOST_BY_DRIVER = 22400,  // from this version on NCCL takes host memory by the driver's cuMem functions,
    RELIABLE_DRIVER = 13000, // which older drivers than this may refuse
};

static pthread_mutex_t environment = PTHREAD_MUTEX_INITIALIZER;

// Before NCCL reads the environment, which it does with the first communicator.
static void advise(struct nccl_library *library)
{
    static const char name[] = "NCCL_CUMEM_HOST_ENABLE";
    static int set_here; // by an earlier rank of this process
    int driver = 0;
    if (library->version < HOST_BY_DRIVER || cudaDriverGetVersion(&driver) != cudaSuccess || driver >= RELIABLE_DRIVER)
        return;
    pthread_mutex_lock(&environment);
    if (set_here || (!getenv(name) && setenv(name, "0", 0) == 0)) {
        set_here = 1;
        snprintf(library->note, sizeof library->note,
                 "%s=0 set, as drivers before CUDA 13 (here %d.%d) may refuse NCCL host memory", name, driver / 1000,
                 driver % 1000 / 10);
    }
    pthread_mutex_unlock(&environment);
}

static int find_functions(struct nccl_library *library, const char *file, struct error *err)
{
#define FIND(function, type)                                                                                           \
    *(void **)&library->function##_ = dlsym(library->handle, #function);                                               \
    if (!library->function##_)                                                                                         \
        return error_set(err, ERR_GPU,                                                                                 \
                         "--transport nccl: %s has no function %s: wanted NCCL %d.%d or later; --transport host "      \
                         "runs without it",                                                                            \
                         file, #function, NCCL_OLDEST / 10000, NCCL_OLDEST / 100 % 100);
    NCCL_FUNCTIONS(FIND)
#undef FIND
    return 0;
}

static int check_version(struct nccl_library *library, const char *file, struct error *err)
{
    ncclResult_t result = library->ncclGetVersion_(&library->version);
    if (result != ncclSuccess)
        return error_set(err, ERR_GPU, "--transport nccl: %s does not tell its version: %s", file,
                         library->ncclGetErrorString_(result));
    int version = library->version;
    snprintf(library->name, sizeof library->name, "NCCL %d.%d.%d", version / 10000, version / 100 % 100, version % 100);
    if (version < NCCL_OLDEST || version >= 30000)
        return error_set(
            err, ERR_GPU,
            "--transport nccl: %s is version %d (%s): wanted %d.%d or later, below 3; --transport host runs "
            "without it",
            file, version, library->name, NCCL_OLDEST / 10000, NCCL_OLDEST / 100 % 100);
    return 0;
}

int nccl_library_open(struct nccl_library *library, const char *file, struct error *err)
{
    static const char *const names[] = {"libnccl.so.2", "libnccl.so"};
    int rc;
    memset(library, 0, sizeof *library);
    for (size_t i = 0; i < sizeof names / sizeof *names && !library->handle; i++)
        library->handle = dlopen(file ? file : names[i], RTLD_NOW | RTLD_LOCAL);
    if (!library->handle)
        return error_set(err, ERR_GPU,
                         "--transport nccl: NCCL is not here: %s could not be loaded (%s); install it, put its folder "
                         "into LD_LIBRARY_PATH, or take --transport host",
                         file ? file : names[0], dlerror());
    if ((rc = find_functions(library, file ? file : names[0], err)) ||
        (rc = check_version(library, file ? file : names[0], err))) {
        nccl_library_close(library);
        return rc;
    }
    advise(library);
    return 0;
}

void nccl_library_close(struct nccl_library *library)
{
    if (library->handle)
        dlclose(library->handle);
    memset(library, 0, sizeof *library);
}
