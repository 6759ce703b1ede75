// What the tests of the collectives ask of every transport, and the serial reference of its bits.
#ifndef TPSHARD_TESTS_COMM_CASES_H
#define TPSHARD_TESTS_COMM_CASES_H

#include "engine/comm.h"

#include <stdbool.h>
#include <stdint.h>

struct reduce_case {
    int tp_size;
    int64_t rows, cols, stride;
    uint64_t max_elems;
    enum wire wire;
    int pool_threads; // 0: none
    int calls;
    bool special; // NaN, Inf, zeros, denormals here and there
    bool fed;     // with error feedback from call to call
};

// Values of a rank before call number `call`, [rows][stride]; between the rows stands REDUCE_GAP, which must stay.
#define REDUCE_GAP 12345.0f
void reduce_case_fill(const struct reduce_case *shape, int call, int rank, float *data);
// A row after the last call as comm.h defines it, computed by one thread from the definition; out [cols].
void reduce_case_row(const struct reduce_case *shape, int64_t row, float *out);

// Functions for all ranks; an error says what is wrong.
// All sizes of all_gather and broadcast, compared byte for byte.
int comm_cases_gather(struct comm *comm, void *arg, struct error *err);
// Sums over the ranks in all codecs, bit for bit as in the reference.
int comm_cases_reduce(struct comm *comm, void *arg, struct error *err);
// Sums of rows to their owners, and the owned rows to all, bit for bit as in the reference.
int comm_cases_rows(struct comm *comm, void *arg, struct error *err);
// What the ranks together send for a sum is 2 (n - 1) times the message; of transports that move bytes.
int comm_cases_volume(struct comm *comm, void *arg, struct error *err);
// Around the stages: each rank sends to every rank of the next stage and receives from every one of the stage before. Of a
// world whose messages are CASES_MESSAGE_BYTES.
enum { CASES_MESSAGE_BYTES = 40000 };
int comm_cases_messages(struct comm *comm, void *arg, struct error *err);
// All of these that the world has, over the world and the stage.
int comm_cases_all(struct comm *comm, void *arg, struct error *err);

#endif
