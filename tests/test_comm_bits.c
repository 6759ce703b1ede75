// Bits of the collectives: sums over 2, 3, 4 and 8 ranks, of 1 to 4096 rows, in every codec, with and without error feedback, over shared memory and
// sockets, between threads and processes. Rows come from a short list, in batches of all sizes and in other orders: so each result is compared with the
// one that a single thread computes from the definition, and a row that depended on the rows beside it would show. Some rows are of NaN, infinities,
// zeros, denormals and numbers whose sum overflows; the phases go across the wrap of their counters.
#include "engine/comm.h"
#include "engine/comm_rows.h"
#include "tests/comm_help.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <cmocka.h>

// As many keys as all numbers of ranks divide, so that a row's owner belongs to its key.
enum { KEYS = 24, MOST_COLS = 1100, SHORT_CALLS = 2, LONG_CALLS = 10, MOST_RANKS = 8 };

// The first keys.
enum { ALL_NAN, ONE_INF, MINUS_ZEROS, DENORMALS, OVERFLOW, OPPOSITE_INFS, ONE_NAN, ZEROS, NUM_SPECIAL };

struct bits_case {
    int tp_size, calls;
    int64_t rows, cols;
    enum wire wire;
    bool fed;    // with error feedback from call to call
    bool dealt;  // rows have owners: sums to them, and from them to all
    float *got;  // shared: [tp_size][rows][cols], of the last call
    float *want; // [KEYS][cols]
};

static float input(const struct bits_case *c, int call, int rank, int key, int64_t col)
{
    uint64_t bits = mix((uint64_t)(((key * 131072 + col) * 64 + rank) * 100 + call));
    float value = (float)((double)(int64_t)bits * 0x1p-63) * (col % 61 == 7 ? 50.0f : 1.0f);
    const int last = c->tp_size - 1;
    switch (key) {
    case ALL_NAN:
        return rank == last ? NAN : value;
    case ONE_INF:
        return rank == 0 && col == 5 ? INFINITY : value;
    case MINUS_ZEROS:
        return -0.0f;
    case DENORMALS:
        return value * 0x1p-130f;
    case OVERFLOW:
        return 3.3e38f;
    case OPPOSITE_INFS:
        return col == 3 && rank == 0 ? INFINITY : col == 3 && rank == last ? -INFINITY : value;
    case ONE_NAN:
        return rank == last && col == 131 ? f32_from_bits(0xffc12345) : value;
    case ZEROS:
        return 0;
    default:
        return value;
    }
}

// The keys of a batch begin at another one for each size.
static int key_of(const struct bits_case *c, int64_t row) { return (int)((row + c->rows) % KEYS); }

// ---- the definition, by one thread ---------------------------------------------------------------------------------

// What `count` values are after the way over the wire; with feedback, what is lost is kept for the next message.
static void over_wire(const struct bits_case *c, uint8_t *bytes, float *out, const float *x, float *lost, int count)
{
    float sent[WIRE_GROUP] = {0};
    for (int i = 0; i < count; i++)
        sent[i] = c->fed && lost ? x[i] + lost[i] : x[i];
    wire_encode_group(bytes, sent, count, c->wire);
    wire_decode_group(out, bytes, count, c->wire);
    for (int i = 0; i < count && lost; i++) {
        lost[i] = bf16_to_f32(f32_to_bf16(sent[i] - out[i]));
        if (!isfinite(lost[i]))
            lost[i] = 0;
    }
}

static void want_group(const struct bits_case *c, int key, int64_t col, float *out)
{
    const int count = c->cols - col < WIRE_GROUP ? (int)(c->cols - col) : WIRE_GROUP;
    const int owner = (c->dealt ? key : (int)(col / WIRE_GROUP)) % c->tp_size;
    float lost[MOST_RANKS][WIRE_GROUP] = {{0}};
    for (int call = c->fed ? 0 : c->calls - 1; call < c->calls; call++) {
        uint8_t bytes[WIRE_MAX_GROUP_BYTES];
        float sum[WIRE_GROUP] = {0}, part[WIRE_GROUP], ignored[WIRE_GROUP];
        for (int rank = 0; rank < c->tp_size; rank++) {
            for (int i = 0; i < count; i++)
                part[i] = input(c, call, rank, key, col + i);
            if (rank != owner || (c->wire == WIRE_BF16 && !c->fed && !c->dealt)) {
                over_wire(c, bytes, ignored, part, lost[rank], count);
                wire_add_group(sum, bytes, count, c->wire);
            } else {
                for (int i = 0; i < count; i++)
                    sum[i] += part[i];
            }
        }
        over_wire(c, bytes, out, sum, c->dealt ? NULL : lost[owner], count);
    }
}

static void define(const struct bits_case *c)
{
    for (int key = 0; key < KEYS; key++)
        for (int64_t col = 0; col < c->cols; col += WIRE_GROUP)
            want_group(c, key, col, c->want + key * c->cols + col);
}

// What must hold whatever the definition says: what is no number reaches all, and nothing else is touched by it.
static void check_definition(const struct bits_case *c)
{
    const bool exact = c->wire == WIRE_BF16 || c->wire == WIRE_F32;
    const float *w = c->want;
    for (int64_t col = 0; col < c->cols; col++) {
        assert_true(isnan(w[ALL_NAN * c->cols + col]));
        assert_false(isfinite(w[OVERFLOW * c->cols + col]));
        assert_true(w[MINUS_ZEROS * c->cols + col] == 0 && w[ZEROS * c->cols + col] == 0);
        assert_true(fabsf(w[DENORMALS * c->cols + col]) < 1e-30f);
        assert_int_equal(isfinite(w[ONE_INF * c->cols + col]), exact ? col != 5 : col >= WIRE_GROUP);
        assert_int_equal(isnan(w[OPPOSITE_INFS * c->cols + col]), exact ? col == 3 : col < WIRE_GROUP);
        assert_int_equal(isnan(w[ONE_NAN * c->cols + col]),
                         exact ? col == 131 : col >= WIRE_GROUP && col < 2 * WIRE_GROUP);
        for (int key = NUM_SPECIAL; key < KEYS; key++)
            assert_true(isfinite(w[key * c->cols + col]));
    }
}

// ---- on ranks ------------------------------------------------------------------------------------------------------

static int sum_body(struct comm *comm, void *arg, struct error *err)
{
    const struct bits_case *c = arg;
    const int rank = comm_rank(comm);
    const size_t row_bytes = (size_t)c->cols * sizeof(float);
    float *mine = c->got + (size_t)rank * (size_t)(c->rows * c->cols), *keys = malloc(KEYS * row_bytes);
    uint16_t *lost = c->fed ? calloc((size_t)(c->rows * c->cols), sizeof *lost) : NULL;
    int rc = 0;
    for (int call = 0; call < c->calls && !rc; call++) {
        for (int key = 0; key < KEYS; key++)
            for (int64_t col = 0; col < c->cols; col++)
                keys[key * c->cols + col] = input(c, call, rank, key, col);
        for (int64_t row = 0; row < c->rows; row++)
            memcpy(mine + row * c->cols, keys + key_of(c, row) * c->cols, row_bytes);
        comm_at(comm, OP_MLP, call);
        if (!c->dealt) {
            rc = comm_all_reduce(comm, mine, c->rows, c->cols, c->cols, c->wire, lost, NULL, err);
            continue;
        }
        rc = comm_reduce_scatter_rows(comm, mine, c->rows, c->cols, c->rows, c->wire, lost, NULL, err);
        if (!rc)
            rc = comm_all_gather_rows(comm, mine, c->rows, c->cols, c->rows, c->wire, NULL, err);
    }
    free(lost);
    free(keys);
    return rc;
}

static void check_bits(enum mode mode, struct bits_case c)
{
    const size_t elems = (size_t)(c.rows * c.cols), row_bytes = (size_t)c.cols * sizeof(float),
                 bytes = (size_t)c.tp_size * elems * sizeof(float);
    char name[128];
    snprintf(name, sizeof name, "%s, tp %d, %d x %d, %s%s%s", mode_names[mode], c.tp_size, (int)c.rows, (int)c.cols,
             wire_name(c.wire), c.fed ? ", fed back" : "", c.dealt ? ", rows dealt out" : "");
    c.got = map_shared(bytes);
    expect_success(run_ranks(mode, c.tp_size, elems, 60000, sum_body, &c), c.tp_size, name);
    for (int64_t row = 0; row < c.rows; row++)
        if (memcmp(c.got + row * c.cols, c.want + key_of(&c, row) * c.cols, row_bytes) != 0)
            fail_msg("%s: row %d, of kind %d, has other bits than alone", name, (int)row, key_of(&c, row));
    for (int rank = 1; rank < c.tp_size; rank++)
        if (memcmp(c.got, c.got + (size_t)rank * elems, elems * sizeof(float)) != 0)
            fail_msg("%s: rank %d has other bits than rank 0", name, rank);
    munmap(c.got, bytes);
}

// Batches of few rows many times over, so that counters wrap; of many rows twice.
static void check_batches(struct bits_case c, int turn)
{
    static const struct {
        int64_t rows, cols;
        int calls;
    } batches[] = {{1, MOST_COLS, LONG_CALLS}, {2, MOST_COLS, LONG_CALLS}, {7, MOST_COLS, LONG_CALLS},
                   {64, 200, SHORT_CALLS},     {513, 200, SHORT_CALLS},    {4096, 200, SHORT_CALLS}};
    for (size_t i = 0; i < sizeof batches / sizeof *batches; i++, turn++) {
        const bool same = i > 0 && batches[i].cols == batches[i - 1].cols && batches[i].calls == batches[i - 1].calls;
        c.rows = batches[i].rows;
        c.cols = batches[i].cols;
        c.calls = batches[i].calls;
        if (!same)
            define(&c);
        if (!same && !c.fed)
            check_definition(&c);
#ifdef KERNELS_SANITIZED
        if (c.rows > 64 || c.tp_size == 2 || c.tp_size == 8)
            continue;
#endif
        // In turn on one of the four ways, small ones on two.
        check_bits((enum mode)(turn % MODE_COUNT), c);
        if (c.rows <= 7 && c.tp_size < 8)
            check_bits((enum mode)((turn + 1 + turn / MODE_COUNT % 3) % MODE_COUNT), c);
    }
}

static void check_all(bool dealt)
{
    static const int tp_sizes[] = {2, 3, 4, 8};
    int turn = 0;
    struct bits_case c = {.dealt = dealt, .want = malloc(sizeof(float) * KEYS * MOST_COLS)};
    assert_non_null(c.want);
    for (size_t t = 0; t < sizeof tp_sizes / sizeof *tp_sizes; t++)
        for (int wire = 0; wire < WIRE_COUNT; wire++)
            for (int fed = 0; fed < 2; fed++, turn++) {
                c.tp_size = tp_sizes[t];
                c.wire = (enum wire)wire;
                c.fed = fed;
                check_batches(c, turn);
            }
    free(c.want);
}

static void test_all_reduce(void **state)
{
    (void)state;
    check_all(false);
}

static void test_rows_of_owners(void **state)
{
    (void)state;
    check_all(true);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_all_reduce), cmocka_unit_test(test_rows_of_owners)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
