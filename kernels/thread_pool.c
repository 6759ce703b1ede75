// The thread pool: how tasks are handed out and how threads wait. See thread_pool.h.
//
// `remaining` is the number of tasks not yet taken; taking one is one successful decrement of it. Only then are fn, arg
// and tasks read: the run cannot end before the taken task is counted in `unfinished`, so they stay as they are. A
// thread that sleeps through a whole run is never waited for.
#include "kernels/thread_pool.h"

#include "kernels/futex.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

enum { CACHE_LINE = 64 };

struct thread_pool {
    int threads, started;
    // Written by the caller before `remaining` is set (release), read after a task was taken (acquire).
    thread_pool_fn *fn;
    void *arg;
    int64_t first_task;
    uint32_t tasks;

    _Alignas(CACHE_LINE) _Atomic uint32_t remaining;
    _Alignas(CACHE_LINE) _Atomic uint32_t unfinished; // the caller sleeps on it
    _Alignas(CACHE_LINE) _Atomic uint32_t generation; // raised by every run and by the end; workers sleep on it
    _Atomic uint32_t sleeping_workers, sleeping_caller;
    _Atomic bool stop;
    struct spinner caller_spinner;
    struct worker *workers;
};

struct worker {
    struct thread_pool *pool;
    pthread_t thread;
    int index;
    struct spinner spinner;
};

static void run_tasks(struct thread_pool *pool, int thread)
{
    uint32_t remaining = atomic_load_explicit(&pool->remaining, memory_order_relaxed);
    while (remaining > 0) {
        if (!atomic_compare_exchange_weak_explicit(&pool->remaining, &remaining, remaining - 1, memory_order_acq_rel,
                                                   memory_order_relaxed))
            continue;
        pool->fn(pool->arg, pool->first_task + (pool->tasks - remaining), thread);
        // Sequentially consistent, as is the caller's announcement that it sleeps: one of the two sees the other.
        if (atomic_fetch_sub(&pool->unfinished, 1) == 1 && atomic_load(&pool->sleeping_caller))
            futex_wake(&pool->unfinished, 1);
        remaining = atomic_load_explicit(&pool->remaining, memory_order_relaxed);
    }
}

static void wait_for_run(struct worker *worker, uint32_t seen)
{
    struct thread_pool *pool = worker->pool;
    struct spin spin = spin_begin(&worker->spinner);
    while (atomic_load_explicit(&pool->generation, memory_order_acquire) == seen) {
        if (spin_again(&spin))
            continue;
        spinner_learn(&worker->spinner, false);
        atomic_fetch_add(&pool->sleeping_workers, 1);
        while (atomic_load(&pool->generation) == seen)
            futex_wait(&pool->generation, seen, -1);
        atomic_fetch_sub(&pool->sleeping_workers, 1);
        return;
    }
    spinner_learn(&worker->spinner, true);
}

static void *worker_main(void *arg)
{
    struct worker *worker = arg;
    struct thread_pool *pool = worker->pool;
    uint32_t seen = 0;
    for (;;) {
        wait_for_run(worker, seen);
        seen = atomic_load_explicit(&pool->generation, memory_order_acquire);
        if (atomic_load_explicit(&pool->stop, memory_order_relaxed))
            return NULL;
        run_tasks(pool, worker->index);
    }
}

int thread_pool_create(struct thread_pool **out, int threads, struct error *err)
{
    if (threads < 1 || threads > 1024)
        return error_set(err, ERR_USAGE, "a pool of %d threads: wanted 1 to 1024", threads);
    struct thread_pool *pool = aligned_alloc(CACHE_LINE, sizeof *pool);
    if (!pool)
        return error_set(err, ERR_MEMORY, "out of memory for a pool of %d threads", threads);
    memset(pool, 0, sizeof *pool);
    pool->threads = threads;
    spinner_init(&pool->caller_spinner);
    pool->workers = calloc((size_t)threads, sizeof *pool->workers);
    if (!pool->workers) {
        thread_pool_free(pool);
        return error_set(err, ERR_MEMORY, "out of memory for a pool of %d threads", threads);
    }
    // Signals are for the thread that started the program; but where SIGBUS is blocked, nobody can explain it.
    sigset_t all, before;
    sigfillset(&all);
    sigdelset(&all, SIGBUS);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = 0;
    for (int i = 1; i < threads && !failed; i++) {
        struct worker *worker = &pool->workers[i];
        *worker = (struct worker){.pool = pool, .index = i};
        spinner_init(&worker->spinner);
        failed = pthread_create(&worker->thread, NULL, worker_main, worker);
        pool->started += !failed;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (failed) {
        thread_pool_free(pool);
        return error_set(err, ERR_MEMORY, "cannot start %d threads: %s", threads, strerror(failed));
    }
    *out = pool;
    return 0;
}

void thread_pool_free(struct thread_pool *pool)
{
    if (!pool)
        return;
    atomic_store(&pool->stop, true);
    atomic_fetch_add(&pool->generation, 1);
    futex_wake(&pool->generation, INT_MAX);
    for (int i = 1; i <= pool->started; i++)
        pthread_join(pool->workers[i].thread, NULL);
    free(pool->workers);
    free(pool);
}

int thread_pool_default_threads(void)
{
    cpu_set_t set;
    return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
}

int thread_pool_size(const struct thread_pool *pool) { return pool->threads; }

int thread_pool_pin(struct thread_pool *pool, const cpu_set_t *cpus, struct error *err)
{
    int cpu = -1;
    for (int i = 0; i < pool->threads && CPU_COUNT(cpus) > 0; i++) {
        do
            cpu = (cpu + 1) % CPU_SETSIZE;
        while (!CPU_ISSET(cpu, cpus));
        cpu_set_t one;
        CPU_ZERO(&one);
        CPU_SET(cpu, &one);
        int failed = pthread_setaffinity_np(i ? pool->workers[i].thread : pthread_self(), sizeof one, &one);
        if (failed)
            return error_set(err, ERR_OTHER, "cannot keep a thread to processor %d: %s", cpu, strerror(failed));
    }
    return 0;
}

static void wait_for_tasks(struct thread_pool *pool)
{
    struct spin spin = spin_begin(&pool->caller_spinner);
    while (atomic_load_explicit(&pool->unfinished, memory_order_acquire)) {
        if (spin_again(&spin))
            continue;
        spinner_learn(&pool->caller_spinner, false);
        atomic_store(&pool->sleeping_caller, 1);
        for (uint32_t left; (left = atomic_load(&pool->unfinished));)
            futex_wait(&pool->unfinished, left, -1);
        atomic_store(&pool->sleeping_caller, 0);
        return;
    }
    if (spin.rounds)
        spinner_learn(&pool->caller_spinner, true);
}

void thread_pool_run(struct thread_pool *pool, thread_pool_fn *fn, void *arg, int64_t tasks)
{
    if (pool->threads == 1 || tasks == 1) {
        for (int64_t task = 0; task < tasks; task++)
            fn(arg, task, 0);
        return;
    }
    for (int64_t first = 0; first < tasks; first += INT_MAX) {
        pool->fn = fn;
        pool->arg = arg;
        pool->first_task = first;
        pool->tasks = tasks - first < INT_MAX ? (uint32_t)(tasks - first) : INT_MAX;
        atomic_store_explicit(&pool->unfinished, pool->tasks, memory_order_relaxed);
        atomic_store_explicit(&pool->remaining, pool->tasks, memory_order_release);
        atomic_fetch_add(&pool->generation, 1);
        if (atomic_load(&pool->sleeping_workers))
            futex_wake(&pool->generation, pool->tasks < INT_MAX ? (int)pool->tasks - 1 : INT_MAX);
        run_tasks(pool, 0);
        wait_for_tasks(pool);
    }
}
