// Choosing and loading a backend. See backends.h.
#include "engine/backends.h"

#include <dlfcn.h>
#include <elf.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
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

bool backends_find_library(char path[PATH_MAX], const char *name)
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
        if (snprintf(path, PATH_MAX, "%s%s%s", program, places[i], name) < PATH_MAX && access(path, R_OK) == 0)
            return true;
    return false;
}

// Whether a file ends before its own section table does: mapping such a library would be a bus error, not a message.
static bool is_truncated(const char *path)
{
    Elf64_Ehdr header;
    struct stat info;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return false; // dlopen says why
    bool whole_header = read(fd, &header, sizeof header) == (ssize_t)sizeof header && fstat(fd, &info) == 0;
    close(fd);
    return !whole_header || header.e_shoff > (uint64_t)info.st_size ||
           (uint64_t)header.e_shnum * header.e_shentsize > (uint64_t)info.st_size - header.e_shoff;
}

// The library stays loaded: ranks run in it until the process ends.
static int load(const struct backend **out, const char *path, struct error *err)
{
    if (strchr(path, '/') && is_truncated(path)) // a plain name is looked up by the loader
        return error_set(err, ERR_GPU, "%s: the file is truncated or no library; build it again", path);
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

int backends_select(struct backend_choice *out, const char *wanted, const char *library, struct error *err)
{
    char path[PATH_MAX];
    bool cuda = strcmp(wanted, "cuda") == 0, any = strcmp(wanted, "auto") == 0;
    *out = (struct backend_choice){.backend = &backend_cpu};
    int rc = kernels_select(&out->kernels, cuda || strcmp(wanted, "cpu") == 0 ? "auto" : wanted, err);
    if (rc || (!cuda && !(any && gpu_driver_present())))
        return rc;
    if (library && library[0])
        return load(&out->backend, library, err);
    if (backends_find_library(path, CUDA_LIBRARY))
        return load(&out->backend, path, err);
    out->note =
        "there is a GPU driver, but " CUDA_LIBRARY " is neither beside tpengine nor in ../lib: running on the CPU";
    return any ? 0
               : error_set(err, ERR_GPU,
                           "the CUDA backend, " CUDA_LIBRARY
                           ", is neither beside tpengine nor in ../lib: it is built where nvcc is; "
                           "--cuda-library names it elsewhere");
}
