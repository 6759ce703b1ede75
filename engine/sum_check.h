// Sums that devices have exchanged, made again by the processors and compared bit by bit (--check-sums). The links were tried before they were used
// (link_probe.h), and may lose or change data later all the same: then ranks compute on with wrong numbers, and nothing else would tell.
//
// Of a step that is checked, all sums are: the parts are copied from the devices before the devices add them up, the processors add them up
// over the ranks' comm, and what the devices have made of them must be the same bits (law 5). Where rows are dealt out to the ranks, both halves are:
// the sums of a rank's own rows, and the rows that it has of the others. So a step that is checked takes much longer than
// others, is neither cut in parts nor kept, and gives the same results. Which steps are checked, all ranks know alike: they count them.
#ifndef TPSHARD_ENGINE_SUM_CHECK_H
#define TPSHARD_ENGINE_SUM_CHECK_H

#include "engine/exchange.h"
#include "kernels/backend.h"
#include "kernels/thread_pool.h"

#include <stdbool.h>
#include <stdint.h>

struct sum_check;

// One step of `every` > 0 is checked, the first one too. rows: most of a step; hidden_size: most columns. feedback: some sums make up for what a
// wire has lost. Success: caller owns *out.
int sum_check_create(struct sum_check **out, int64_t every, int64_t rows, int64_t hidden_size, bool feedback,
                     struct error *err);
void sum_check_free(struct sum_check *check); // accepts NULL

// A step begins: whether it is checked. check may be NULL.
bool sum_check_begin(struct sum_check *check);

// Of a step that is checked, in a later pipeline stage and before its first sum: what the wire has lost in the stages before, bf16 values, which the
// sums with feedback make up for.
int sum_check_take_losses(struct sum_check *check, const uint16_t *lost, int64_t count, struct error *err);

// A sum of the step, or a half of one: buffer's rows from `first` on, as the backend's all_reduce (EXCHANGE_SUM), reduce_scatter_rows
// (EXCHANGE_SUM_TO_OWN) or all_gather_rows (EXCHANGE_OWN_TO_ALL) leaves them.
struct checked_sum {
    enum exchange_kind kind;
    enum buffer buffer;
    int64_t first, rows, cols; // rows * cols values in all; cols: of a row of the message
    int64_t first_owner;       // of a half: of row `first`
    enum wire wire;
    bool feedback;
    enum comm_operation op;
    int layer;
};
// Before the devices add up: keeps this rank's part.
int sum_check_take(struct sum_check *check, const struct backend *backend, struct device *device,
                   const struct checked_sum *sum, struct error *err);
// Behind it, on all ranks: ERR_GPU where the device holds other bits than the processors.
int sum_check_compare(struct sum_check *check, const struct backend *backend, struct device *device, struct comm *comm,
                      struct thread_pool *pool, enum transport transport, const struct checked_sum *sum,
                      struct error *err);

#endif
