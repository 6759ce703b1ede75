// A guard over mapped files: a page that can no longer be read (the file was shortened, its device failed) raises SIGBUS, on any thread
// and at any time. Under loader_guard_try that is a result; elsewhere the process ends with a sentence and not by the signal. The handler
// is the process's, and guards last as long as their maps. Threads that touch a guarded map must not block SIGBUS.
#ifndef TPSHARD_ENGINE_LOADER_GUARD_H
#define TPSHARD_ENGINE_LOADER_GUARD_H

#include "formats/error.h"

#include <stdbool.h>
#include <stdint.h>

struct loader_guard;

// on_lost: see loader.h; called with what the process ends with. name is for the message.
int loader_guard_new(struct loader_guard **out, const uint8_t *map, uint64_t bytes, const char *name,
                     void (*on_lost)(void *arg, const struct error *why), void *arg, struct error *err);
void loader_guard_free(struct loader_guard *guard); // accepts NULL

// Calls fn(arg). False: it was left in the middle, at a page that could not be read. fn holds nothing that would have to be given back.
bool loader_guard_try(void (*fn)(void *arg), void *arg);

// The sentence for it.
int loader_guard_error(const char *name, struct error *err);

#endif
