// A fixed set of threads that take jobs from one bounded queue, first come, first served: for work that must not hold up the thread that serves
// sockets.
#ifndef TPSHARD_ENGINE_SERVE_JOB_POOL_H
#define TPSHARD_ENGINE_SERVE_JOB_POOL_H

#include "formats/error.h"

#include <stdbool.h>
#include <stdint.h>

struct job_pool; // thread-safe
struct job {     // the caller's memory, until run is called
    struct job *next;
    void (*run)(void *arg);
    void *arg;
    uint64_t bytes; // what it keeps in memory while it waits
};

// At most max_jobs and max_bytes wait; one job alone may be larger. Success: the caller owns *out.
int job_pool_create(struct job_pool **out, int threads, int64_t max_jobs, uint64_t max_bytes, struct error *err);
// False when the queue is full or the pool is closing: run is never called then.
bool job_pool_add(struct job_pool *pool, struct job *job);
// Runs what waits and joins the threads. Accepts NULL.
void job_pool_free(struct job_pool *pool);

#endif
