// Sums of rows to their owners, and owned rows to all. See comm_rows.h.
//
// Each is one phase a piece of whole rows. A row is one unit to the transport: unit i of a piece belongs to rank (first + i) % size, so that
// MOVE_TO_OWNERS and MOVE_FROM_OWNERS move it as they move the groups of an all_reduce.
#include "engine/comm_rows.h"

#include "engine/comm_internal.h"
#include "engine/comm_reduce.h"

#include <assert.h>
#include <string.h>

// Rows [first, first + count) of the message.
struct rows_piece {
    float *data;    // of row `first`: [count][cols]
    uint16_t *lost; // the same of bf16; NULL: no error feedback
    int64_t count, cols;
    uint64_t row_bytes, group_bytes;
    enum wire wire;
    int rank, size, owner; // owner: of row `first`
    const uint8_t *from[COMM_MAX_RANKS];
    uint8_t *to;
};

typedef void row_step(const struct rows_piece *piece, int64_t row);

static int owner_of(const struct rows_piece *piece, int64_t row) { return (int)((piece->owner + row) % piece->size); }

static int group_count(const struct rows_piece *piece, int64_t group)
{
    int64_t left = piece->cols - group * WIRE_GROUP;
    return left < WIRE_GROUP ? (int)left : WIRE_GROUP;
}

static void encode_row(const struct rows_piece *piece, int64_t row)
{
    float decoded[WIRE_GROUP];
    uint8_t *to = piece->to + (uint64_t)row * piece->row_bytes;
    for (int64_t g = 0; g * WIRE_GROUP < piece->cols; g++, to += piece->group_bytes) {
        int64_t at = row * piece->cols + g * WIRE_GROUP;
        if (piece->lost)
            wire_feed_group(to, decoded, piece->data + at, piece->lost + at, group_count(piece, g), piece->wire);
        else
            wire_encode_group(to, piece->data + at, group_count(piece, g), piece->wire);
    }
}

static void encode_for_owner(const struct rows_piece *piece, int64_t row)
{
    if (owner_of(piece, row) != piece->rank)
        encode_row(piece, row);
}

static void encode_own(const struct rows_piece *piece, int64_t row)
{
    if (owner_of(piece, row) == piece->rank)
        encode_row(piece, row);
}

// In rank order, the own part as it is.
static void add_up_own(const struct rows_piece *piece, int64_t row)
{
    uint64_t offset = (uint64_t)row * piece->row_bytes;
    if (owner_of(piece, row) != piece->rank)
        return;
    for (int64_t g = 0; g * WIRE_GROUP < piece->cols; g++, offset += piece->group_bytes) {
        float sum[WIRE_GROUP] = {0}, whole[WIRE_GROUP], *x = piece->data + row * piece->cols + g * WIRE_GROUP;
        int n = group_count(piece, g);
        for (int rank = 0; rank < piece->size; rank++)
            if (rank == piece->rank)
                wire_add_group(sum, reduce_own_group(whole, x, n), n, WIRE_F32);
            else
                wire_add_group(sum, piece->from[rank] + offset, n, piece->wire);
        memcpy(x, sum, (size_t)n * sizeof *x);
    }
}

static void decode_row(const struct rows_piece *piece, int64_t row)
{
    const uint8_t *from = piece->from[owner_of(piece, row)] + (uint64_t)row * piece->row_bytes;
    for (int64_t g = 0; g * WIRE_GROUP < piece->cols; g++, from += piece->group_bytes)
        wire_decode_group(piece->data + row * piece->cols + g * WIRE_GROUP, from, group_count(piece, g), piece->wire);
}

// ---- pieces ----------------------------------------------------------------------------------------------------

struct row_job {
    const struct rows_piece *piece;
    row_step *step;
};

static void run_row_task(void *arg, int64_t row, int thread)
{
    (void)thread;
    const struct row_job *job = arg;
    job->step(job->piece, row);
}

struct rows_call {
    enum collective collective;
    row_step *before, *after; // the phase
    int pattern;
    float *data;
    uint16_t *lost;
    int64_t rows, cols, first_owner;
    enum wire wire;
    struct thread_pool *pool;
};

static int run(struct comm *comm, const struct rows_call *call, struct error *err)
{
    if (comm->size == 1)
        return comm_check_abort(comm, err);
    assert(call->rows >= 0 && call->cols > 0 && call->first_owner >= 0);
    struct rows_piece piece = {.cols = call->cols,
                               .group_bytes = wire_group_bytes(call->wire),
                               .wire = call->wire,
                               .rank = comm->rank,
                               .size = comm->size};
    piece.row_bytes = wire_groups((uint64_t)call->cols) * piece.group_bytes;
    int64_t most = (int64_t)(comm_piece_groups(comm) * WIRE_MAX_GROUP_BYTES / piece.row_bytes);
    if (most < 1) {
        struct error found;
        error_set(&found, ERR_OTHER, "rank %d: a row of %lld values does not fit a message of %llu", comm_rank(comm),
                  (long long)call->cols, (unsigned long long)(comm_piece_groups(comm) * WIRE_GROUP));
        return comm_raise(comm, err, &found);
    }
    uint64_t amount = (uint64_t)(call->rows * call->cols);
    for (int64_t first = 0; first < call->rows; first += piece.count) {
        piece.count = call->rows - first < most ? call->rows - first : most;
        piece.data = call->data + first * call->cols;
        piece.lost = call->lost ? call->lost + first * call->cols : NULL;
        piece.owner = (int)((call->first_owner + first) % comm->size);
        piece.to = comm_buffer(comm, comm->rank, comm->token + 1);
        comm_run_tasks(call->pool, amount, run_row_task, &(struct row_job){&piece, call->before}, piece.count);
        struct comm_move move = {.pattern = call->pattern,
                                 .first = (uint64_t)piece.owner,
                                 .count = (uint64_t)piece.count,
                                 .groups_per_row = UINT64_MAX,
                                 .group_bytes = piece.row_bytes};
        int rc = comm_phase(comm, call->collective, (int)call->wire, amount, &move, err);
        if (rc)
            return rc;
        for (int rank = 0; rank < comm->size; rank++)
            piece.from[rank] = comm_buffer(comm, rank, comm->token);
        comm_run_tasks(call->pool, amount, run_row_task, &(struct row_job){&piece, call->after}, piece.count);
        // What goes to others: rows of theirs, or each own row to all of them.
        for (int64_t row = 0; row < piece.count; row++)
            if (call->collective == ROWS_TO_ALL && owner_of(&piece, row) == comm->rank)
                comm->sent_bytes += piece.row_bytes * (uint64_t)(comm->size - 1);
            else if (call->collective == ROWS_TO_OWNERS && owner_of(&piece, row) != comm->rank)
                comm->sent_bytes += piece.row_bytes;
    }
    return 0;
}

int comm_reduce_scatter_rows(struct comm *comm, float *data, int64_t rows, int64_t cols, int64_t first_owner,
                             enum wire wire, uint16_t *lost, struct thread_pool *pool, struct error *err)
{
    struct rows_call call = {
        ROWS_TO_OWNERS, encode_for_owner, add_up_own, MOVE_TO_OWNERS, data, lost, rows, cols, first_owner, wire, pool};
    return run(comm, &call, err);
}

int comm_all_gather_rows(struct comm *comm, float *data, int64_t rows, int64_t cols, int64_t first_owner,
                         enum wire wire, struct thread_pool *pool, struct error *err)
{
    struct rows_call call = {ROWS_TO_ALL, encode_own, decode_row, MOVE_FROM_OWNERS, data, NULL, rows, cols,
                             first_owner, wire,       pool};
    return run(comm, &call, err);
}
