// Exchanges with the other ranks, here or on a thread of their own. See exchange.h.
//
// The queue is a ring: exchange number n lies at n % EXCHANGES_UNDER_WAY. The caller raises `posted`, the thread `done`; both under the lock, whose
// hand-over orders everything else, the comm's own memory included.
#include "engine/exchange.h"

#include "engine/comm_rows.h"
#include "kernels/clock.h"

#include <assert.h>
#include <pthread.h>
#include <stdlib.h>

int exchange_run(struct comm *comm, const struct exchange *e, struct thread_pool *pool, struct error *err)
{
    comm_at(comm, e->op, e->layer);
    switch (e->kind) {
    case EXCHANGE_SUM:
        return comm_all_reduce(comm, e->data, e->rows, e->cols, e->cols, e->wire, e->lost, pool, err);
    case EXCHANGE_SUM_TO_OWN:
        return comm_reduce_scatter_rows(comm, e->data, e->rows, e->cols, e->first_owner, e->wire, e->lost, pool, err);
    case EXCHANGE_OWN_TO_ALL:
        return comm_all_gather_rows(comm, e->data, e->rows, e->cols, e->first_owner, e->wire, pool, err);
    case EXCHANGE_GATHER:
        return comm_all_gather(comm, e->all, e->data, (size_t)e->cols * sizeof *e->data, err);
    }
    return error_set(err, ERR_OTHER, "rank %d: exchange of kind %d", comm_rank(comm), (int)e->kind);
}

struct exchanger {
    struct comm *comm;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed; // posted, done or ends
    struct exchange queue[EXCHANGES_UNDER_WAY];
    uint64_t posted, done;
    bool ends;
    int rc; // of the first one that failed
    struct error err;
    int64_t busy_ns;
};

static void *exchanger_main(void *arg)
{
    struct exchanger *x = arg;
    pthread_mutex_lock(&x->lock);
    for (;;) {
        while (x->done == x->posted && !x->ends)
            pthread_cond_wait(&x->changed, &x->lock);
        if (x->done == x->posted)
            break;
        const struct exchange *next = &x->queue[x->done % EXCHANGES_UNDER_WAY];
        struct error err = x->err;
        int rc = x->rc;
        pthread_mutex_unlock(&x->lock);
        int64_t begin_ns = clock_now_ns();
        if (!rc)
            rc = exchange_run(x->comm, next, NULL, &err);
        int64_t busy_ns = clock_now_ns() - begin_ns;
        pthread_mutex_lock(&x->lock);
        x->busy_ns += busy_ns;
        x->rc = rc;
        x->err = err;
        x->done++;
        pthread_cond_broadcast(&x->changed);
    }
    pthread_mutex_unlock(&x->lock);
    return NULL;
}

int exchanger_create(struct exchanger **out, struct comm *comm, struct error *err)
{
    struct exchanger *x = calloc(1, sizeof *x);
    if (!x)
        return error_set(err, ERR_MEMORY, "rank %d: no memory for a thread that exchanges", comm_rank(comm));
    x->comm = comm;
    pthread_mutex_init(&x->lock, NULL);
    pthread_cond_init(&x->changed, NULL);
    if (pthread_create(&x->thread, NULL, exchanger_main, x)) {
        pthread_cond_destroy(&x->changed);
        pthread_mutex_destroy(&x->lock);
        free(x);
        return error_set(err, ERR_OTHER, "rank %d: a thread that exchanges cannot be started", comm_rank(comm));
    }
    *out = x;
    return 0;
}

void exchanger_free(struct exchanger *x)
{
    if (!x)
        return;
    pthread_mutex_lock(&x->lock);
    assert(x->done == x->posted);
    x->ends = true;
    pthread_cond_broadcast(&x->changed);
    pthread_mutex_unlock(&x->lock);
    pthread_join(x->thread, NULL);
    pthread_cond_destroy(&x->changed);
    pthread_mutex_destroy(&x->lock);
    free(x);
}

uint64_t exchange_post(struct exchanger *x, const struct exchange *exchange)
{
    pthread_mutex_lock(&x->lock);
    assert(x->posted - x->done < EXCHANGES_UNDER_WAY);
    x->queue[x->posted % EXCHANGES_UNDER_WAY] = *exchange;
    uint64_t ticket = ++x->posted;
    pthread_cond_broadcast(&x->changed);
    pthread_mutex_unlock(&x->lock);
    return ticket;
}

bool exchange_done(struct exchanger *x, uint64_t ticket)
{
    pthread_mutex_lock(&x->lock);
    bool done = x->done >= ticket;
    pthread_mutex_unlock(&x->lock);
    return done;
}

int exchange_wait(struct exchanger *x, uint64_t ticket, struct error *err)
{
    pthread_mutex_lock(&x->lock);
    while (x->done < ticket)
        pthread_cond_wait(&x->changed, &x->lock);
    int rc = x->rc;
    if (rc && err)
        *err = x->err;
    pthread_mutex_unlock(&x->lock);
    return rc;
}

int64_t exchanger_busy_ns(const struct exchanger *x) { return x->busy_ns; }
