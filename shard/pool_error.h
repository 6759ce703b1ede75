// The first error of a run over many threads.
#ifndef TPSHARD_SHARD_POOL_ERROR_H
#define TPSHARD_SHARD_POOL_ERROR_H

#include "formats/error.h"

#include <stdatomic.h>
#include <stdbool.h>

// Zeroed before the run. The thread that wins `claimed` writes `error`; it is read after the run only.
struct pool_error {
    atomic_bool claimed;
    struct error error;
};

static inline bool pool_error_any(struct pool_error *failure)
{
    return atomic_load_explicit(&failure->claimed, memory_order_relaxed);
}

static inline void pool_error_note(struct pool_error *failure, const struct error *error)
{
    if (!atomic_exchange(&failure->claimed, true))
        failure->error = *error;
}

// After the run: 0, or the noted error copied to err.
static inline int pool_error_take(struct pool_error *failure, struct error *err)
{
    if (!atomic_load(&failure->claimed))
        return 0;
    *err = failure->error;
    return err->code;
}

#endif
