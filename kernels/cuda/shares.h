// An all_reduce whose messages are packed by owner, as a library that moves bytes between ranks (NCCL) wants them. The arithmetic is that of
// engine/comm_reduce.h, bit for bit: group g of a row belongs to rank g % tp_size, the owner adds up in rank order, its own part
// in wire_of_own's codec, and what the sum is coded as is what every rank gets.
//
// A share: the groups of a piece of a message that one rank owns, row by row, slots_per_row in each row. Where a row's groups do not divide
// evenly the last slot of some ranks' rows is empty: zeros. All shares of a piece have the same size.
//
//   1. share_encode:  x -> to [tp_size][share], but for this rank's own share        then all-to-all: share r goes to rank r
//   2. share_add_up:  from [tp_size][share], by sender, and x -> to [share], and x   then all-gather
//   3. share_decode:  from [tp_size][share], by owner -> x
//
// Its halves, where whole rows have owners (engine/comm_rows.h): of the rows that a rank owns it has the share, rows behind each other. Where the rows do
// not divide evenly the last row of some ranks' shares is empty. The first half is 1 and 2, the own part exact and the sums not coded; the second is 3
// behind
//
//   2. share_encode_own:  x of the own rows -> to [share], and x, which becomes what that decodes to
#ifndef TPSHARD_KERNELS_CUDA_SHARES_H
#define TPSHARD_KERNELS_CUDA_SHARES_H

#include "kernels/wire.h"

#include <cuda_runtime_api.h>
#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// A piece of a message: whole rows, in device memory. rows * groups of a row < 2^31.
struct share_piece {
    float *data;    // [rows][stride], of which cols count
    uint16_t *lost; // bf16 [rows][cols], error feedback (comm_all_reduce of engine/comm.h); NULL: none
    int64_t rows, cols, stride;
    enum wire wire;
    int rank, tp_size;
    bool
        by_rows; // row r, all of it, belongs to rank (first_owner + r) % tp_size; else group g of a row to rank g % tp_size
    int first_owner; // < tp_size
};

static inline int64_t share_slots_per_row(int64_t cols, int tp_size)
{
    return ((int64_t)wire_groups((uint64_t)cols) + tp_size - 1) / tp_size;
}
// A multiple of 4.
static inline int64_t share_bytes(int64_t rows, int64_t cols, int tp_size, enum wire wire)
{
    return rows * share_slots_per_row(cols, tp_size) * (int64_t)wire_group_bytes(wire);
}
// The same of rows that have owners.
static inline int64_t share_rows_bytes(int64_t rows, int64_t cols, int tp_size, enum wire wire)
{
    return (rows + tp_size - 1) / tp_size * (int64_t)(wire_groups((uint64_t)cols) * wire_group_bytes(wire));
}
static inline int64_t share_piece_bytes(const struct share_piece *p)
{
    return p->by_rows ? share_rows_bytes(p->rows, p->cols, p->tp_size, p->wire)
                      : share_bytes(p->rows, p->cols, p->tp_size, p->wire);
}

// Buffers lie at 16 bytes. began (NULL: nobody asks): host memory that the device writes; it becomes `number` when the device
// comes to this message, that is, has done all before it.
cudaError_t launch_share_encode(uint8_t *to, const struct share_piece *piece, uint32_t *began, uint32_t number,
                                cudaStream_t stream);
// to NULL: the sums are not coded, x is what was added up.
cudaError_t launch_share_add_up(uint8_t *to, const uint8_t *from, const struct share_piece *piece, cudaStream_t stream);
cudaError_t launch_share_encode_own(uint8_t *to, const struct share_piece *piece, uint32_t *began, uint32_t number,
                                    cudaStream_t stream);
cudaError_t launch_share_decode(const uint8_t *from, const struct share_piece *piece, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
