// A fixed set of worker threads that run one function over numbered tasks. Waits spin a bounded time, then sleep on a
// futex, so that a foreign busy core costs its share and not the whole speed.
#ifndef TPSHARD_KERNELS_THREAD_POOL_H
#define TPSHARD_KERNELS_THREAD_POOL_H

#include "formats/error.h"

#include <sched.h>
#include <stdint.h>

struct thread_pool;

// `threads` >= 1 includes the caller: threads - 1 are started. Success: caller owns *out.
int thread_pool_create(struct thread_pool **out, int threads, struct error *err);
void thread_pool_free(struct thread_pool *pool);
// Processors that this process may run on, at least 1.
int thread_pool_default_threads(void);
int thread_pool_size(const struct thread_pool *pool);
// Each thread keeps to one of the processors from now on, in order, and round again where they are fewer; the caller is thread 0.
int thread_pool_pin(struct thread_pool *pool, const cpu_set_t *cpus, struct error *err);

// Calls fn(arg, task, thread) once for every task in [0, tasks), on any of the threads (0 <= thread < size; the caller
// is thread 0), and returns when all are done. Tasks are handed out dynamically: fn's results must not depend on the
// thread. Not reentrant.
typedef void thread_pool_fn(void *arg, int64_t task, int thread);
void thread_pool_run(struct thread_pool *pool, thread_pool_fn *fn, void *arg, int64_t tasks);

#endif
