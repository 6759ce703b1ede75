// See comm_cases.h.
#include "tests/comm_cases.h"

#include "engine/comm_rows.h"
#include "tests/comm_help.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

// ---- the reference -----------------------------------------------------------------------------------------------------

static float input_value(const struct reduce_case *shape, int call, int rank, int64_t row, int64_t col)
{
    if (col >= shape->cols)
        return REDUCE_GAP;
    uint64_t bits = mix((uint64_t)(((row * 131072 + col) * 64 + rank) * 100 + call));
    float value = (float)((double)(int64_t)bits * 0x1p-63);
    value *= col % 61 == 7 ? 50.0f : 1.0f;
    static const uint32_t special[] = {0x7f800000, 0xff800000, 0x7fc00000, 0, 0x80000000, 1, 0x007fffff, 0x7f7fffff};
    if (shape->special && row % 3 == 1 && bits % 97 == 0)
        return f32_from_bits(special[bits / 97 % 8]);
    return shape->special && row % 3 == 2 ? (row % 2 ? 0.0f : value * 0x1p-130f) : value;
}

void reduce_case_fill(const struct reduce_case *shape, int call, int rank, float *data)
{
    for (int64_t row = 0; row < shape->rows; row++)
        for (int64_t col = 0; col < shape->stride; col++)
            data[row * shape->stride + col] = input_value(shape, call, rank, row, col);
}

// Encodes count values, with what earlier messages lost where there is any feedback, as wire.h says it.
static void reference_encode(uint8_t *bytes, const float *x, float *lost, int count, const struct reduce_case *shape)
{
    float t[WIRE_GROUP] = {0}, decoded[WIRE_GROUP];
    for (int i = 0; i < count; i++)
        t[i] = shape->fed ? x[i] + lost[i] : x[i];
    wire_encode_group(bytes, t, count, shape->wire);
    wire_decode_group(decoded, bytes, count, shape->wire);
    for (int i = 0; i < count; i++) {
        lost[i] = bf16_to_f32(f32_to_bf16(t[i] - decoded[i]));
        if (!isfinite(lost[i]))
            lost[i] = 0;
    }
}

// The last sum of one group of a row.
static void reference_group(const struct reduce_case *shape, int64_t row, int64_t col, float *out)
{
    uint8_t bytes[WIRE_MAX_GROUP_BYTES];
    int count = shape->cols - col < WIRE_GROUP ? (int)(shape->cols - col) : WIRE_GROUP;
    int owner = (int)(col / WIRE_GROUP % shape->tp_size);
    float lost[COMM_MAX_RANKS][WIRE_GROUP] = {{0}};
    for (int call = shape->fed ? 0 : shape->calls - 1; call < shape->calls; call++) {
        float sum[WIRE_GROUP] = {0}, part[WIRE_GROUP];
        for (int rank = 0; rank < shape->tp_size; rank++) {
            for (int i = 0; i < count; i++)
                part[i] = input_value(shape, call, rank, row, col + i);
            if (rank == owner && (shape->fed || shape->wire != WIRE_BF16)) {
                for (int i = 0; i < count; i++)
                    sum[i] += part[i];
            } else {
                reference_encode(bytes, part, lost[rank], count, shape);
                wire_add_group(sum, bytes, count, shape->wire);
            }
        }
        reference_encode(bytes, sum, lost[owner], count, shape);
        wire_decode_group(out, bytes, count, shape->wire);
    }
}

void reduce_case_row(const struct reduce_case *shape, int64_t row, float *out)
{
    for (int64_t col = 0; col < shape->cols; col += WIRE_GROUP)
        reference_group(shape, row, col, out + col);
}

// ---- cases -------------------------------------------------------------------------------------------------------------

static uint8_t pattern(int rank, size_t i) { return (uint8_t)mix(i * 64 + (size_t)rank); }

int comm_cases_gather(struct comm *comm, void *arg, struct error *err)
{
    (void)arg;
    static const size_t sizes[] = {1, 0, 4, 1000, 65535, COMM_GATHER_MAX_BYTES, 3};
    static const size_t broadcasts[] = {0, 1, 8, 65536, 65537, 1000000};
    int tp_size = comm_size(comm), rank = comm_rank(comm), rc = 0;
    uint8_t *mine = malloc(1000000), *all = malloc((size_t)tp_size * COMM_GATHER_MAX_BYTES);
    for (int round = 0; round < 3 && !rc; round++) {
        for (size_t s = 0; s < sizeof sizes / sizeof *sizes && !rc; s++) {
            for (size_t i = 0; i < sizes[s]; i++)
                mine[i] = pattern(rank, i + (size_t)round);
            rc = comm_all_gather(comm, all, mine, sizes[s], err);
            for (size_t i = 0; i < (size_t)tp_size * sizes[s] && !rc; i++)
                if (all[i] != pattern((int)(i / sizes[s]), i % sizes[s] + (size_t)round))
                    rc = error_set(err, ERR_OTHER, "all_gather of %zu: byte %zu is wrong", sizes[s], i);
        }
        for (size_t s = 0; s < sizeof broadcasts / sizeof *broadcasts && !rc; s++) {
            int root = (int)s % tp_size;
            for (size_t i = 0; i < broadcasts[s]; i++)
                mine[i] = rank == root ? pattern(root, i) : 0;
            rc = comm_broadcast(comm, mine, broadcasts[s], root, err);
            for (size_t i = 0; i < broadcasts[s] && !rc; i++)
                if (mine[i] != pattern(root, i))
                    rc = error_set(err, ERR_OTHER, "broadcast of %zu: byte %zu is wrong", broadcasts[s], i);
        }
        if (!rc)
            rc = comm_barrier(comm, err);
    }
    free(mine);
    free(all);
    return rc;
}

static int check_row(const struct reduce_case *shape, const float *got, const float *want, int64_t row,
                     struct error *err)
{
    for (int64_t col = 0; col < shape->stride; col++) {
        float wanted = col < shape->cols ? want[col] : REDUCE_GAP;
        if (f32_bits(got[col]) != f32_bits(wanted))
            return error_set(err, ERR_OTHER, "tp %d, %lld x %lld in %s: row %lld col %lld is %08x, wanted %08x",
                             shape->tp_size, (long long)shape->rows, (long long)shape->cols, wire_name(shape->wire),
                             (long long)row, (long long)col, f32_bits(got[col]), f32_bits(wanted));
    }
    return 0;
}

// That all ranks have the same bits. Then each row need be held to its reference by one of them alone: the one that is_mine says.
static int same_on_all(struct comm *comm, const float *data, size_t elems, struct error *err)
{
    uint64_t mine = 0, all[COMM_MAX_RANKS];
    for (size_t i = 0; i < elems; i++)
        mine = mix(mine ^ f32_bits(data[i]));
    int rc = comm_all_gather(comm, all, &mine, sizeof mine, err);
    for (int rank = 0; rank < comm_size(comm) && !rc; rank++)
        if (all[rank] != mine)
            rc = error_set(err, ERR_OTHER, "%zu values: ranks %d and %d have other bits", elems, comm_rank(comm), rank);
    return rc;
}

static bool is_mine(struct comm *comm, int64_t row) { return row % comm_size(comm) == comm_rank(comm); }

static int run_case(struct comm *comm, const struct reduce_case *shape, struct error *err)
{
    size_t elems = (size_t)(shape->rows * shape->stride);
    float *data = malloc((elems + 1) * sizeof *data), *want = malloc((size_t)shape->cols * sizeof *want);
    uint16_t *lost = shape->fed ? calloc((size_t)(shape->rows * shape->cols), sizeof *lost) : NULL;
    int rc = 0;
    for (int call = 0; call < shape->calls && !rc; call++) {
        reduce_case_fill(shape, call, comm_rank(comm), data);
        comm_at(comm, OP_MLP, call);
        rc = comm_all_reduce(comm, data, shape->rows, shape->cols, shape->stride, shape->wire, lost, NULL, err);
    }
    for (int64_t row = 0; row < shape->rows && !rc; row++) {
        if (!is_mine(comm, row))
            continue;
        reduce_case_row(shape, row, want);
        rc = check_row(shape, data + row * shape->stride, want, row, err);
    }
    rc = rc ? rc : same_on_all(comm, data, elems, err);
    free(data);
    free(want);
    free(lost);
    return rc;
}

int comm_cases_reduce(struct comm *comm, void *arg, struct error *err)
{
    (void)arg;
    static const struct reduce_case shapes[] = {
        {.rows = 1, .cols = 4096, .stride = 4096, .calls = 12}, // across the wrap of the tokens
        {.rows = 1, .cols = 1, .stride = 1, .calls = 2},
        {.rows = 5, .cols = 200, .stride = 256, .calls = 2, .special = true}, // a short last group, a gap between rows
        {.rows = 7, .cols = 900, .stride = 900, .calls = 2, .special = true},
        {.rows = 40, .cols = 4096, .stride = 4096, .calls = 1, .special = true}, // more than one piece
        {.rows = 5, .cols = 1000, .stride = 1024, .calls = 4, .special = true, .fed = true},
    };
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (int wire = 0; wire < WIRE_COUNT; wire++) {
            struct reduce_case shape = shapes[i];
            shape.wire = (enum wire)wire;
            shape.tp_size = comm_size(comm);
            int rc = shape.tp_size > 1 ? run_case(comm, &shape, err) : 0;
            if (rc)
                return rc;
        }
    return 0;
}

// A group of a row whose owner keeps the sum: as it adds it up, and as all have it then.
static void reference_rows_group(const struct reduce_case *shape, int64_t row, int64_t col, int owner, float *sum,
                                 float *all)
{
    uint8_t bytes[WIRE_MAX_GROUP_BYTES];
    int count = shape->cols - col < WIRE_GROUP ? (int)(shape->cols - col) : WIRE_GROUP;
    float part[WIRE_GROUP];
    memset(sum, 0, WIRE_GROUP * sizeof *sum);
    for (int rank = 0; rank < shape->tp_size; rank++) {
        for (int i = 0; i < count; i++)
            part[i] = input_value(shape, 0, rank, row, col + i);
        if (rank == owner) {
            wire_add_group(sum, (const uint8_t *)part, count, WIRE_F32);
        } else {
            wire_encode_group(bytes, part, count, shape->wire);
            wire_add_group(sum, bytes, count, shape->wire);
        }
    }
    wire_encode_group(bytes, sum, count, shape->wire);
    wire_decode_group(all, bytes, count, shape->wire);
}

// step 0: at its owner, when the ranks' parts are added up; 1: at any rank, when the owners have sent their rows.
static int check_dealt_row(const struct reduce_case *shape, const float *got, int64_t row, int owner, int step,
                           struct error *err)
{
    float sum[WIRE_GROUP], all[WIRE_GROUP];
    for (int64_t col = 0; col < shape->cols; col++) {
        if (col % WIRE_GROUP == 0)
            reference_rows_group(shape, row, col, owner, sum, all);
        float want = step ? all[col % WIRE_GROUP] : sum[col % WIRE_GROUP];
        if (f32_bits(got[col]) != f32_bits(want))
            return error_set(err, ERR_OTHER, "rows in %s, step %d: row %lld col %lld is %08x, wanted %08x",
                             wire_name(shape->wire), step, (long long)row, (long long)col, f32_bits(got[col]),
                             f32_bits(want));
    }
    return 0;
}

int comm_cases_rows(struct comm *comm, void *arg, struct error *err)
{
    (void)arg;
    enum { FIRST_OWNER = 1 };
    static const int64_t shapes[][2] = {{7, 900}, {1, 128}, {150, 4096}}; // rows, cols; the last in pieces
    int rc = 0;
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (int wire = 0; wire < WIRE_COUNT && comm_size(comm) > 1 && !rc; wire++) {
            struct reduce_case shape = {.tp_size = comm_size(comm),
                                        .rows = shapes[i][0],
                                        .cols = shapes[i][1],
                                        .stride = shapes[i][1],
                                        .wire = (enum wire)wire};
            size_t elems = (size_t)(shape.rows * shape.cols);
            float *data = malloc(elems * sizeof *data);
            reduce_case_fill(&shape, 0, comm_rank(comm), data);
            comm_at(comm, OP_MLP, wire);
            for (int step = 0; step < 2 && !rc; step++) {
                rc = step == 0
                         ? comm_reduce_scatter_rows(comm, data, shape.rows, shape.cols, FIRST_OWNER, shape.wire, NULL,
                                                    NULL, err)
                         : comm_all_gather_rows(comm, data, shape.rows, shape.cols, FIRST_OWNER, shape.wire, NULL, err);
                for (int64_t row = 0; row < shape.rows && !rc; row++) {
                    int owner = (int)((FIRST_OWNER + row) % shape.tp_size);
                    if (step ? is_mine(comm, row) : owner == comm_rank(comm))
                        rc = check_dealt_row(&shape, data + row * shape.cols, row, owner, step, err);
                }
            }
            rc = rc ? rc : same_on_all(comm, data, elems, err);
            free(data);
        }
    return rc;
}

int comm_cases_volume(struct comm *comm, void *arg, struct error *err)
{
    (void)arg;
    enum { ROWS = 9, GROUPS = 24 };
    static _Thread_local float data[ROWS * GROUPS * WIRE_GROUP];
    uint64_t all[COMM_MAX_RANKS], size = (uint64_t)comm_size(comm);
    for (int wire = 0; wire < WIRE_COUNT; wire++) {
        uint64_t moved = comm_moved_bytes(comm), sum = 0, message = ROWS * GROUPS * wire_group_bytes((enum wire)wire);
        int64_t cols = GROUPS * WIRE_GROUP;
        memset(data, 0, sizeof data);
        int rc = comm_all_reduce(comm, data, ROWS, cols, cols, (enum wire)wire, NULL, NULL, err);
        moved = comm_moved_bytes(comm) - moved;
        if (rc || (rc = comm_all_gather(comm, all, &moved, sizeof moved, err)))
            return rc;
        for (uint64_t rank = 0; rank < size; rank++)
            sum += all[rank];
        if (size > 1 &&
            (sum != 2 * (size - 1) * message || (GROUPS % size == 0 && moved != 2 * (size - 1) * message / size)))
            return error_set(err, ERR_OTHER, "%s: %llu bytes sent, %llu of them by rank %d, for a message of %llu",
                             wire_name((enum wire)wire), (unsigned long long)sum, (unsigned long long)moved,
                             comm_rank(comm), (unsigned long long)message);
    }
    return 0;
}

// ---- messages ----------------------------------------------------------------------------------------------------------

static size_t message_bytes(int number)
{
    static const size_t bytes[] = {CASES_MESSAGE_BYTES,     0,      1, 63, 64, 65, 4096, CASES_MESSAGE_BYTES - 1,
                                   3 * CASES_MESSAGE_BYTES, 1000000};
    return bytes[number % 10];
}

static void fill_message(uint8_t *data, size_t bytes, int from, int to, int number)
{
    uint64_t bits = 0;
    for (size_t i = 0; i < bytes; i++, bits >>= 8) {
        if (i % 8 == 0)
            bits = mix((i * 64 + (size_t)from) * 64 + (size_t)to + (size_t)number * 7919);
        data[i] = (uint8_t)bits;
    }
}

int comm_cases_messages(struct comm *comm, void *arg, struct error *err)
{
    (void)arg;
    enum { MESSAGES = 30 };
    int stages = comm_num_stages(comm), tp_size = comm_size(comm) / stages, rank = comm_rank(comm), rc = 0;
    int own = rank / tp_size, next = (own + 1) % stages * tp_size, before = (own + stages - 1) % stages * tp_size;
    uint8_t *data = malloc(1000000), *want = malloc(1000000);
    for (int number = 0; number < MESSAGES && !rc; number++) {
        size_t bytes = message_bytes(number);
        // What does not fit the ring goes through while both are there, so not all may send at once.
        for (int turn = 0; turn < 2 && !rc; turn++)
            for (int other = 0; other < tp_size && !rc; other++) {
                if ((turn == 0) == (own == 0)) {
                    fill_message(data, bytes, rank, next + other, number);
                    rc = comm_send(comm, data, bytes, next + other, err);
                } else {
                    memset(data, 0, bytes);
                    rc = comm_receive(comm, data, bytes, before + other, err);
                    fill_message(want, bytes, before + other, rank, number);
                    if (!rc && memcmp(data, want, bytes) != 0)
                        rc = error_set(err, ERR_OTHER, "message %d of rank %d arrived changed", number, before + other);
                }
            }
        if (!rc && number % 7 == 0)
            rc = comm_barrier(comm_stage(comm), err);
    }
    free(data);
    free(want);
    return rc;
}

int comm_cases_all(struct comm *comm, void *arg, struct error *err)
{
    struct comm *stage = comm_stage(comm);
    int rc = 0;
    for (struct comm *group = comm; group && !rc; group = group != stage ? stage : NULL) {
        if ((rc = comm_handshake(group, "same", 4, "a word", err)) || (rc = comm_cases_reduce(group, arg, err)) ||
            (rc = comm_cases_rows(group, arg, err)) || (rc = comm_cases_gather(group, arg, err)) ||
            (rc = comm_cases_volume(group, arg, err)))
            return rc;
    }
    if (comm_num_stages(comm) > 1)
        rc = comm_cases_messages(comm, arg, err);
    return rc ? rc : comm_barrier(comm, err);
}
