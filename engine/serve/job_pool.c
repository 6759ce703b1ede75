// See job_pool.h.
#include "engine/serve/job_pool.h"

#include <pthread.h>
#include <signal.h>
#include <stdlib.h>

struct job_pool {
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    struct job *first, **last; // waiting
    int64_t jobs, max_jobs;
    uint64_t bytes, max_bytes;
    bool closing;
    int threads;
    pthread_t ids[];
};

static struct job *next_job(struct job_pool *pool)
{
    pthread_mutex_lock(&pool->mutex);
    while (!pool->first && !pool->closing)
        pthread_cond_wait(&pool->changed, &pool->mutex);
    struct job *job = pool->first;
    if (job) {
        pool->first = job->next;
        if (!pool->first)
            pool->last = &pool->first;
        pool->jobs--;
        pool->bytes -= job->bytes;
    }
    pthread_mutex_unlock(&pool->mutex);
    return job;
}

static void *serve(void *arg)
{
    struct job *job;
    while ((job = next_job(arg)))
        job->run(job->arg);
    return NULL;
}

// Signals stay with the thread that asked for the pool.
static int start_threads(struct job_pool *pool, int threads, struct error *err)
{
    sigset_t all, before;
    int rc = 0;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (pool->threads < threads && !rc) {
        rc = pthread_create(&pool->ids[pool->threads], NULL, serve, pool);
        pool->threads += rc == 0;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return rc ? error_set(err, ERR_OTHER, "a worker thread of the server could not be started (error %d)", rc) : 0;
}

int job_pool_create(struct job_pool **out, int threads, int64_t max_jobs, uint64_t max_bytes, struct error *err)
{
    struct job_pool *pool = calloc(1, sizeof *pool + (size_t)threads * sizeof *pool->ids);
    if (!pool)
        return error_set(err, ERR_MEMORY, "no memory for %d worker threads", threads);
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->changed, NULL);
    pool->last = &pool->first;
    pool->max_jobs = max_jobs;
    pool->max_bytes = max_bytes;
    int rc = start_threads(pool, threads, err);
    if (rc)
        job_pool_free(pool);
    else
        *out = pool;
    return rc;
}

bool job_pool_add(struct job_pool *pool, struct job *job)
{
    pthread_mutex_lock(&pool->mutex);
    bool room = !pool->closing && pool->jobs < pool->max_jobs &&
                (pool->jobs == 0 || pool->bytes + job->bytes <= pool->max_bytes);
    if (room) {
        job->next = NULL;
        *pool->last = job;
        pool->last = &job->next;
        pool->jobs++;
        pool->bytes += job->bytes;
        pthread_cond_signal(&pool->changed);
    }
    pthread_mutex_unlock(&pool->mutex);
    return room;
}

void job_pool_free(struct job_pool *pool)
{
    if (!pool)
        return;
    pthread_mutex_lock(&pool->mutex);
    pool->closing = true;
    pthread_cond_broadcast(&pool->changed);
    pthread_mutex_unlock(&pool->mutex);
    for (int i = 0; i < pool->threads; i++)
        pthread_join(pool->ids[i], NULL);
    pthread_cond_destroy(&pool->changed);
    pthread_mutex_destroy(&pool->mutex);
    free(pool);
}
