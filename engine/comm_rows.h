// Collectives over rows that are dealt out to the ranks, for a residual that lives where its rows are owned. Row r belongs to rank
// (first_owner + r) % tp_size. Rules as in comm.h: all ranks call with the same arguments, which is checked; every rank leaves with the same bits.
//
// Who owns a row is the caller's to fix by something that belongs to the row, for an owner's own part enters the sum as it is.
#ifndef TPSHARD_ENGINE_COMM_ROWS_H
#define TPSHARD_ENGINE_COMM_ROWS_H

#include "engine/comm.h"

#include <stdint.h>

// data [rows][cols] f32: the rows of this rank become the sums over ranks, added up in rank order; the other rows stay as they are. The parts of
// others are coded for the wire, the sum is not. lost (NULL: no error feedback) bf16 [rows][cols]: as in comm_all_reduce, of the rows that this rank
// sends away. pool may be NULL and changes no bit.
int comm_reduce_scatter_rows(struct comm *comm, float *data, int64_t rows, int64_t cols, int64_t first_owner,
                             enum wire wire, uint16_t *lost, struct thread_pool *pool, struct error *err);
// Every row becomes what its owner's row is after the way over the wire, on the owner too.
int comm_all_gather_rows(struct comm *comm, float *data, int64_t rows, int64_t cols, int64_t first_owner,
                         enum wire wire, struct thread_pool *pool, struct error *err);

#endif
