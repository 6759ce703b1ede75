// Which backend computes: the host's, or CUDA's shared object, loaded when it is wanted. The choice is the parent's, before ranks are forked,
// so it never talks to a driver: a CUDA context does not survive a fork.
#ifndef TPSHARD_ENGINE_BACKENDS_H
#define TPSHARD_ENGINE_BACKENDS_H

#include "formats/error.h"
#include "kernels/backend.h"

#include <limits.h>
#include <stdbool.h>

struct backend_choice {
    const struct backend *backend;
    const struct kernels *kernels; // the host's table, which every backend gets
    const char *note;              // what the user should know of the choice; NULL: nothing
};

// wanted: "cuda", "cpu" (its fastest kernel table), the name of a kernel table, or "auto": CUDA where a GPU driver and the shared object are
// there, else the fastest kernel table. library: the shared object's file; NULL or "": libtpengine_cuda.so beside the program or in
// ../lib of it. ERR_USAGE for a name that this machine cannot run; ERR_GPU when "cuda" cannot be loaded.
int backends_select(struct backend_choice *out, const char *wanted, const char *library, struct error *err);
// A library of that name beside the program, or in the lib folder beside the program's; false: in neither.
bool backends_find_library(char path[PATH_MAX], const char *name);

#endif
