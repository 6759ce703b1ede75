// Choosing and loading a backend. See backends.h.
#include "engine/backends.h"

#include <dlfcn.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define CUDA_LIBRARY "libtpengine_cuda.so"

// Device files, since asking the driver itself would make a context.
static bool gpu_driver_present(void)
{
    static const char *const devices[] = {"/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg"};
    for (size_t i = 0; i < sizeof devices / sizeof *devices; i++)
        if (access(devices[i], F_OK) == 0)
            return true;
    return false;
}

// The library beside the program, or in the lib folder beside the program's; false: in neither.
static bool find_library(char path[PATH_MAX])
{
    static const char *const places[] = {"", "../lib/"};
    char program[PATH_MAX];
    ssize_t length = readlink("/proc/self/exe", program, sizeof program - 1);
    if (length <= 0)
        return false;
    program[length] = 0;
    char *slash = strrchr(program, '/');
    if (!slash)
        return false;
    slash[1] = 0;
    for (size_t i = 0; i < sizeof places / sizeof *places; i++)
        if (snprintf(path, PATH_MAX, "%s%s" CUDA_LIBRARY, program, places[i]) < PATH_MAX && access(path, R_OK) == 0)
            return true;
    return false;
}

// The library stays loaded: ranks run in it until the process ends.
static int load(const struct backend **out, const char *path, struct error *err)
{
    void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!handle)
        return error_set(err, ERR_GPU, "the CUDA backend could not be loaded: %s; --backend cpu runs without it",
                         dlerror());
    backend_entry_fn *entry;
    *(void **)(&entry) = dlsym(handle, BACKEND_ENTRY);
    const struct backend *backend = entry ? entry() : NULL;
    if (!backend || backend->abi != BACKEND_ABI) {
        dlclose(handle);
        return error_set(err, ERR_GPU,
                         "%s: it is not the CUDA backend of this version of tpengine; build both together", path);
    }
    *out = backend;
    return 0; // cppcheck-suppress resourceLeak ; it stays loaded on purpose
}

int backends_select(const struct backend **backend, const struct kernels **kernels, const char *wanted,
                    const char *library, struct error *err)
{
    char path[PATH_MAX];
    bool cuda = strcmp(wanted, "cuda") == 0, any = strcmp(wanted, "auto") == 0;
    *backend = &backend_cpu;
    int rc = kernels_select(kernels, cuda || strcmp(wanted, "cpu") == 0 ? "auto" : wanted, err);
    if (rc || (!cuda && !(any && gpu_driver_present())))
        return rc;
    if (library || find_library(path))
        return load(backend, library ? library : path, err);
    return any ? 0
               : error_set(err, ERR_GPU,
                           "the CUDA backend, " CUDA_LIBRARY
                           ", is neither beside tpengine nor in ../lib: it is built where nvcc is; "
                           "--cuda-library names it elsewhere");
}
