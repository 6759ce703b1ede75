// Exchanges of a step with the other ranks, and a thread of the rank that does them while the rank computes on.
//
// A comm belongs to one thread at a time: while an exchanger has anything under way (exchange_post to exchange_wait) it is the exchanger's, at all
// other times the caller's. Exchanges are done in the order in which they are posted, which must be the same on every rank.
#ifndef TPSHARD_ENGINE_EXCHANGE_H
#define TPSHARD_ENGINE_EXCHANGE_H

#include "engine/comm.h"

#include <stdbool.h>
#include <stdint.h>

enum exchange_kind {
    EXCHANGE_SUM,        // comm_all_reduce
    EXCHANGE_SUM_TO_OWN, // comm_reduce_scatter_rows
    EXCHANGE_OWN_TO_ALL, // comm_all_gather_rows
    EXCHANGE_GATHER,     // comm_all_gather of data [cols] into all [tp_size][cols]
};

struct exchange {
    enum exchange_kind kind;
    enum comm_operation op; // for comm_at
    int layer;
    float *data; // [rows][cols]
    int64_t rows, cols;
    int64_t first_owner; // of row 0, where rows have owners; see comm_rows.h
    enum wire wire;
    uint16_t *lost; // NULL: no error feedback
    float *all;
};

// On the calling thread, which owns the comm. pool may be NULL.
int exchange_run(struct comm *comm, const struct exchange *exchange, struct thread_pool *pool, struct error *err);

struct exchanger;

// Success: caller owns *out. The comm outlives it. The thread may run where the caller may now.
int exchanger_create(struct exchanger **out, struct comm *comm, struct error *err);
// Accepts NULL. Nothing is under way.
void exchanger_free(struct exchanger *exchanger);

enum { EXCHANGES_UNDER_WAY = 4 }; // at most, between post and wait

// Returns at once with a ticket above 0. What the exchange points to stays as it is until exchange_wait.
uint64_t exchange_post(struct exchanger *exchanger, const struct exchange *exchange);
// Whether it has ended; does not wait.
bool exchange_done(struct exchanger *exchanger, uint64_t ticket);
// Waits until it has ended; its error. After an exchange that failed all later ones fail with its error, untried.
int exchange_wait(struct exchanger *exchanger, uint64_t ticket, struct error *err);
// Nanoseconds that the thread has spent in exchanges so far. Nothing is under way.
int64_t exchanger_busy_ns(const struct exchanger *exchanger);

#endif
