// Rows that ranks own: sums to their owners and owned rows to all, against the definition computed by one thread; a thread that exchanges; and what
// a prompt's dealt out residual keeps of the wire's losses.
#include "engine/comm_rows.h"
#include "engine/exchange.h"
#include "engine/session.h"
#include "formats/number_formats.h"
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
#include <unistd.h>

#include <cmocka.h>

// ---- rows of owners --------------------------------------------------------------------------------------------------

enum { CALLS = 2 };

struct rows_case {
    int tp_size;
    int64_t rows, cols, first_owner;
    uint64_t max_elems; // of the region: larger messages are cut
    enum wire wire;
    bool fed; // with error feedback from call to call
    int pool_threads;
};

struct rows_run {
    struct rows_case shape;
    float *sums, *gathered; // shared: [tp_size][rows][cols]
    uint64_t sent[COMM_MAX_RANKS];
};

static float value_of(int call, int rank, int64_t row, int64_t col)
{
    uint64_t bits = mix((uint64_t)(((row * 131072 + col) * 64 + rank) * 100 + call));
    static const uint32_t special[] = {0x7f800000, 0x7fc00000, 0, 0x80000000, 1, 0x7f7fffff};
    if (row % 5 == 3 && bits % 97 == 0)
        return f32_from_bits(special[bits / 97 % 6]);
    return (float)((double)(int64_t)bits * 0x1p-63) * (col % 61 == 7 ? 50.0f : 1.0f);
}

static int rows_body(struct comm *comm, void *arg, struct error *err)
{
    struct rows_run *run = arg;
    const struct rows_case *shape = &run->shape;
    int64_t elems = shape->rows * shape->cols;
    float *mine = run->sums + comm_rank(comm) * elems, *all = run->gathered + comm_rank(comm) * elems;
    uint16_t *lost = shape->fed ? calloc((size_t)elems + 1, sizeof *lost) : NULL;
    struct thread_pool *pool = NULL;
    int rc = shape->pool_threads ? thread_pool_create(&pool, shape->pool_threads, err) : 0;
    for (int call = 0; call < CALLS && !rc; call++) {
        for (int64_t i = 0; i < elems; i++)
            mine[i] = value_of(call, comm_rank(comm), i / shape->cols, i % shape->cols);
        comm_at(comm, OP_MLP, call);
        uint64_t sent = comm_sent_bytes(comm);
        if ((rc = comm_reduce_scatter_rows(comm, mine, shape->rows, shape->cols, shape->first_owner, shape->wire, lost,
                                           pool, err)))
            break;
        memcpy(all, mine, (size_t)elems * sizeof *all);
        rc = comm_all_gather_rows(comm, all, shape->rows, shape->cols, shape->first_owner, shape->wire, pool, err);
        run->sent[comm_rank(comm)] = comm_sent_bytes(comm) - sent;
    }
    thread_pool_free(pool);
    free(lost);
    return rc;
}

// One group of the last call's sum and of what all ranks make of it.
static void reference_group(const struct rows_case *shape, int64_t row, int64_t col, float *sum, float *all)
{
    uint8_t bytes[WIRE_MAX_GROUP_BYTES];
    int count = shape->cols - col < WIRE_GROUP ? (int)(shape->cols - col) : WIRE_GROUP;
    int owner = (int)((shape->first_owner + row) % shape->tp_size);
    float lost[COMM_MAX_RANKS][WIRE_GROUP] = {{0}}, decoded[WIRE_GROUP];
    for (int call = 0; call < CALLS; call++) {
        memset(sum, 0, WIRE_GROUP * sizeof *sum);
        for (int rank = 0; rank < shape->tp_size; rank++) {
            float part[WIRE_GROUP] = {0};
            for (int i = 0; i < count; i++)
                part[i] = value_of(call, rank, row, col + i) + (rank == owner ? 0 : lost[rank][i]);
            if (rank == owner) {
                wire_add_group(sum, (const uint8_t *)part, count, WIRE_F32);
                continue;
            }
            wire_encode_group(bytes, part, count, shape->wire);
            wire_add_group(sum, bytes, count, shape->wire);
            wire_decode_group(decoded, bytes, count, shape->wire);
            for (int i = 0; i < count; i++) {
                float left = bf16_to_f32(f32_to_bf16(part[i] - decoded[i]));
                lost[rank][i] = shape->fed && isfinite(left) ? left : 0;
            }
        }
    }
    wire_encode_group(bytes, sum, count, shape->wire);
    wire_decode_group(all, bytes, count, shape->wire);
}

static void check_rows(enum mode mode, struct rows_case shape)
{
    size_t elems = (size_t)(shape.rows * shape.cols), bytes = ((size_t)shape.tp_size * elems + 1) * sizeof(float);
    char name[128];
    struct rows_run *run = map_shared(sizeof *run);
    *run = (struct rows_run){.shape = shape, .sums = map_shared(bytes), .gathered = map_shared(bytes)};
    snprintf(name, sizeof name, "%s tp %d, %lld x %lld, %s%s", mode_names[mode], shape.tp_size, (long long)shape.rows,
             (long long)shape.cols, wire_name(shape.wire), shape.fed ? ", fed" : "");
    expect_success(run_ranks(mode, shape.tp_size, shape.max_elems, 20000, rows_body, run), shape.tp_size, name);
    uint64_t row_bytes = wire_groups((uint64_t)shape.cols) * wire_group_bytes(shape.wire), sent = 0;
    for (int64_t row = 0; row < shape.rows; row++) {
        int owner = (int)((shape.first_owner + row) % shape.tp_size);
        for (int64_t col = 0; col < shape.cols; col += WIRE_GROUP) {
            float sum[WIRE_GROUP], all[WIRE_GROUP];
            int64_t count = shape.cols - col < WIRE_GROUP ? shape.cols - col : WIRE_GROUP, at = row * shape.cols + col;
            reference_group(&shape, row, col, sum, all);
            if (memcmp(run->sums + (size_t)owner * elems + at, sum, (size_t)count * sizeof *sum) != 0)
                fail_msg("%s: the sum of row %lld differs from column %lld on", name, (long long)row, (long long)col);
            for (int rank = 0; rank < shape.tp_size; rank++)
                if (memcmp(run->gathered + (size_t)rank * elems + at, all, (size_t)count * sizeof *all) != 0)
                    fail_msg("%s: row %lld on rank %d differs from column %lld on", name, (long long)row, rank,
                             (long long)col);
        }
    }
    for (int rank = 0; rank < shape.tp_size; rank++)
        sent += run->sent[rank];
    assert_int_equal(sent, 2 * (uint64_t)shape.rows * row_bytes * (uint64_t)(shape.tp_size - 1));
    munmap(run->sums, bytes);
    munmap(run->gathered, bytes);
    munmap(run, sizeof *run);
}

static void test_rows(void **state)
{
    (void)state;
    static const struct rows_case cases[] = {
        {2, 1, 64, 0, 1000, WIRE_BF16, false, 0},      {2, 1, 64, 1, 1000, WIRE_S8X, true, 0},
        {3, 17, 300, 2, 5000, WIRE_S8X, true, 0},      {4, 9, 1000, 3, 2000, WIRE_FP8, true, 2},
        {4, 3, 256, 1, 100000, WIRE_F32, false, 0},    {8, 40, 128, 5, 1024, WIRE_BF16, true, 0},
        {4, 64, 1024, 2, 1 << 20, WIRE_S8X, false, 2},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (int mode = 0; mode < MODE_COUNT; mode++)
            check_rows((enum mode)mode, cases[i]);
}

// A residual that many sums have entered, dealt out or not: without error feedback what the second coding of a sum loses is missing where it is
// dealt out. Of n ranks' independent parts each coding of one part loses e; a sum that stays with its owner has lost e sqrt((n - 1) / n), one that
// comes back over the wire e sqrt(1 + (n - 1) / n) of its size.
enum { SUMS = 40, SUM_ROWS = 16, SUM_COLS = 512 };
struct kept_run {
    double lost_plain[COMM_MAX_RANKS], lost_dealt[COMM_MAX_RANKS]; // squares
};

// Nearly normal, so that parts and sums are coded alike.
static double part_value(int i, int rank, int sum)
{
    uint64_t bits = mix((uint64_t)((i * 64 + rank) * SUMS + sum));
    return (double)((bits & 0xffff) + (bits >> 16 & 0xffff) + (bits >> 32 & 0xffff) + (bits >> 48)) * 0x1p-16 - 2;
}

static int kept_body(struct comm *comm, void *arg, struct error *err)
{
    enum { ELEMS = SUM_ROWS * SUM_COLS };
    static _Thread_local float part[ELEMS], dealt[ELEMS];
    static _Thread_local double exact[ELEMS], plain[ELEMS], own[ELEMS];
    struct kept_run *run = arg;
    int rank = comm_rank(comm), size = comm_size(comm), rc = 0;
    memset(exact, 0, sizeof exact), memset(plain, 0, sizeof plain), memset(own, 0, sizeof own);
    for (int sum = 0; sum < SUMS && !rc; sum++) {
        for (int i = 0; i < ELEMS; i++) {
            for (int r = 0; r < size; r++)
                exact[i] += part_value(i, r, sum);
            part[i] = dealt[i] = (float)part_value(i, rank, sum);
        }
        if ((rc = comm_all_reduce(comm, part, SUM_ROWS, SUM_COLS, SUM_COLS, WIRE_S8X, NULL, NULL, err)) == 0)
            rc = comm_reduce_scatter_rows(comm, dealt, SUM_ROWS, SUM_COLS, 1, WIRE_S8X, NULL, NULL, err);
        for (int i = 0; i < ELEMS; i++) {
            plain[i] += (double)part[i];
            own[i] += (double)dealt[i];
        }
    }
    for (int i = 0; i < ELEMS; i++) {
        run->lost_plain[rank] += pow(plain[i] - exact[i], 2);
        if ((i / SUM_COLS + 1) % size == rank)
            run->lost_dealt[rank] += pow(own[i] - exact[i], 2) * size;
    }
    return rc;
}

static void test_kept(void **state)
{
    (void)state;
    for (int size = 2; size <= 4; size *= 2) {
        struct kept_run run = {0};
        double plain = 0, dealt = 0, parts = (double)(size - 1) / size;
        expect_success(run_ranks(THREADS, size, 100000, 20000, kept_body, &run), size, "sums");
        for (int rank = 0; rank < size; rank++) {
            plain += run.lost_plain[rank];
            dealt += run.lost_dealt[rank];
        }
        double ratio = sqrt(dealt / plain), want = sqrt(parts / (1 + parts));
        print_message(
            "tp %d: after %d sums the residual is off by %.3f of what it is where sums come back, by theory %.3f\n",
            size, SUMS, ratio, want);
        assert_true(fabs(ratio - want) < 0.05);
    }
}

// What differs between the ranks is named on all of them.
static int differ_body(struct comm *comm, void *arg, struct error *err)
{
    float rows[2 * 64] = {0};
    (void)arg;
    comm_at(comm, OP_MLP, 3);
    return comm_rank(comm) == 0 ? comm_reduce_scatter_rows(comm, rows, 2, 64, 0, WIRE_S8X, NULL, NULL, err)
                                : comm_all_gather_rows(comm, rows, 2, 64, 0, WIRE_S8X, NULL, err);
}

static int narrow_body(struct comm *comm, void *arg, struct error *err)
{
    enum { WIDE = 1 << 20 };
    float *row = calloc(WIDE, sizeof *row);
    (void)arg;
    int rc = comm_reduce_scatter_rows(comm, row, 1, WIDE, 0, WIRE_F32, NULL, NULL, err);
    free(row);
    return rc;
}

static void test_rows_errors(void **state)
{
    (void)state;
    expect_error(run_ranks(THREADS, 2, 1000, 2000, differ_body, NULL), 2, ERR_RANK,
                 (const char *const[]){"the same step", "reduce_scatter of layer 3 (mlp), 128 values in s8x",
                                       "all_gather of rows", NULL});
    expect_error(run_ranks(THREADS, 2, 1000, 2000, narrow_body, NULL), 2, ERR_OTHER,
                 (const char *const[]){"a row of 1048576 values does not fit", NULL});
}

// ---- a thread that exchanges -----------------------------------------------------------------------------------------

enum { ROUNDS = 200, ELEMS = 300 };

// Exchanges of two buffers, of which one is always under way while the other is filled; the comm is the caller's in between.
static int exchanger_body(struct comm *comm, void *arg, struct error *err)
{
    float data[2][ELEMS], want = 0, all[COMM_MAX_RANKS];
    uint64_t tickets[2] = {0};
    struct exchanger *x;
    int rc = exchanger_create(&x, comm, err);
    (void)arg;
    if (rc)
        return rc;
    for (int round = 0; round < ROUNDS && !rc; round++) {
        int half = round % 2;
        if (tickets[half] && (rc = exchange_wait(x, tickets[half], err)))
            break;
        for (int i = 0; i < ELEMS && tickets[half]; i++)
            if (data[half][i] != (float)((round - 2) * comm_size(comm)) + want)
                rc = error_set(err, ERR_OTHER, "round %d: value %d is %g", round, i, (double)data[half][i]);
        for (int i = 0; i < ELEMS; i++)
            data[half][i] = (float)round;
        struct exchange sum = {.kind = EXCHANGE_SUM,
                               .op = OP_MLP,
                               .layer = round,
                               .data = data[half],
                               .rows = 1,
                               .cols = ELEMS,
                               .wire = WIRE_F32};
        tickets[half] = exchange_post(x, &sum);
        if (round % 16 == 15) { // a hand-over there and back
            float rank = (float)comm_rank(comm);
            if ((rc = exchange_wait(x, tickets[half], err)) ||
                (rc = comm_all_gather(comm, all, &rank, sizeof rank, err)))
                break;
            for (int r = 0; r < comm_size(comm); r++)
                if (all[r] != (float)r)
                    rc = error_set(err, ERR_OTHER, "round %d: rank %d says %g", round, r, (double)all[r]);
        }
    }
    struct error later; // the first one counts
    for (int half = 0; half < 2; half++)
        if (tickets[half])
            exchange_wait(x, tickets[half], rc ? &later : err);
    assert_true(exchanger_busy_ns(x) > 0);
    exchanger_free(x);
    return rc;
}

// A rank that never comes: who waits for the thread has the sentence, and so have all later exchanges.
static int lost_body(struct comm *comm, void *arg, struct error *err)
{
    float data[ELEMS] = {0};
    struct exchanger *x;
    struct error again;
    (void)arg;
    if (comm_rank(comm) == 1) {
        usleep(1500000);
        return comm_barrier(comm, err);
    }
    int rc = exchanger_create(&x, comm, err);
    if (rc)
        return rc;
    struct exchange sum = {
        .kind = EXCHANGE_SUM, .op = OP_ATTENTION, .layer = 5, .data = data, .rows = 1, .cols = ELEMS, .wire = WIRE_F32};
    uint64_t first = exchange_post(x, &sum), second = exchange_post(x, &sum);
    rc = exchange_wait(x, second, err);
    if (exchange_wait(x, first, &again) != rc || strcmp(again.msg, err->msg) != 0 || !exchange_done(x, first))
        rc = error_set(err, ERR_IO, "the first exchange ended otherwise: %d, %.60s", rc, again.msg);
    exchanger_free(x);
    return rc;
}

static void test_exchanger(void **state)
{
    (void)state;
    for (int mode = 0; mode < MODE_COUNT; mode++)
        expect_success(run_ranks((enum mode)mode, 3, 1000, 20000, exchanger_body, NULL), 3, mode_names[mode]);
    struct rank_result *results = run_ranks(THREADS, 2, 1000, 300, lost_body, NULL);
    if (results[0].code != ERR_RANK)
        fail_msg("%d: %s", results[0].code, results[0].error.msg);
    assert_non_null(strstr(results[0].error.msg, "rank 1 did not reach all_reduce of layer 5 (attention)"));
}

// ---- what enters the residual ----------------------------------------------------------------------------------------

enum { PROMPT = 80, PIECES = 3 };
static char work[] = "/tmp/test_sequence_parallel_XXXXXX";

static void check(int rc, const struct error *err)
{
    if (rc)
        fail_msg("%s", err->msg);
}

// The residual behind the last layer of a prompt. The caller frees it.
static float *residual_of(int tp_size, const char *wire, const char *dealt, int64_t *hidden)
{
    char dir[256];
    uint32_t prompt[PROMPT];
    const float *logits;
    struct error err;
    struct session *session;
    struct session_options options = session_defaults;
    snprintf(dir, sizeof dir, "%s/%d", work, tp_size);
    options.context = options.default_context = 128;
    options.backend = "cpu";
    options.threads = 1;
    options.timeout_s = 60;
    options.wire = wire;
    options.wire_feedback = "off";
    options.ranks = "thread";
    options.sequence_parallel = dealt;
    options.residual_rows = PROMPT;
    check(session_open(&session, dir, &options, 1, PROMPT, &err), &err);
    const struct model_desc *desc = &session_manifest(session)->model;
    for (int64_t i = 0; i < PROMPT; i++)
        prompt[i] = (uint32_t)((i * i * 31 + 7 * i + 11) % desc->vocab_size);
    check(session_forward(session, prompt, PROMPT, 0, &logits, &err), &err);
    *hidden = desc->hidden_size;
    size_t stage = (size_t)(PROMPT * *hidden);
    float *out = malloc(stage * sizeof *out);
    assert_non_null(out);
    memcpy(out, session_residual(session) + (size_t)desc->num_layers * stage, stage * sizeof *out);
    session_close(session);
    return out;
}

static double difference(const float *a, const float *b, int64_t count)
{
    double sum = 0, all = 0;
    for (int64_t i = 0; i < count; i++) {
        sum += pow((double)a[i] - (double)b[i], 2);
        all += pow((double)b[i], 2);
    }
    return sqrt(sum / all);
}

// The residual that every rank sees is the same at tp 2 and 4 and dealt out or not, but for the wire's losses.
static void test_residual(void **state)
{
    (void)state;
    int64_t hidden;
    for (int tp_size = 2; tp_size <= 4; tp_size *= 2) {
        float *exact = residual_of(tp_size, "f32", "off", &hidden), *same = residual_of(tp_size, "f32", "on", &hidden);
        assert_memory_equal(same, exact, (size_t)(PROMPT * hidden) * sizeof *exact);
        float *plain = residual_of(tp_size, "bf16", "off", &hidden),
              *dealt = residual_of(tp_size, "bf16", "on", &hidden);
        double lost_plain = difference(plain, exact, PROMPT * hidden),
               lost_dealt = difference(dealt, exact, PROMPT * hidden);
        print_message("tp %d: residual off by %.5f, dealt out %.5f\n", tp_size, lost_plain, lost_dealt);
        assert_true(lost_plain > 0 && lost_dealt > 0 && lost_dealt < 0.05);
        free(exact), free(same), free(plain), free(dealt);
    }
}

// Logits of a prompt in pieces; the weights are all there, so that halves do overlap. The caller frees them.
static float *logits_of(const char *model, int tp_size, const char *dealt, const char *overlap, int64_t *elems)
{
    char dir[256];
    uint32_t prompt[PROMPT];
    const float *logits;
    struct error err;
    struct session *session;
    struct session_options options = session_defaults;
    snprintf(dir, sizeof dir, "%s/%s%d", work, model, tp_size);
    options.context = options.default_context = PIECES * PROMPT;
    options.backend = "cpu";
    options.threads = 1;
    options.timeout_s = 60;
    options.wire = "s8x";
    options.ranks = "thread";
    options.sequence_parallel = dealt;
    options.overlap = overlap;
    options.load_first = true;
    check(session_open(&session, dir, &options, 1, PROMPT, &err), &err);
    int64_t vocab = session_manifest(session)->model.vocab_size;
    *elems = PIECES * PROMPT * vocab;
    float *out = malloc((size_t)*elems * sizeof *out);
    assert_non_null(out);
    for (int64_t piece = 0; piece < PIECES; piece++) {
        for (int64_t i = 0; i < PROMPT; i++)
            prompt[i] = (uint32_t)((i * i * 31 + 7 * i + 11 + piece) % vocab);
        check(session_forward(session, prompt, PROMPT, piece * PROMPT, &logits, &err), &err);
        memcpy(out + piece * PROMPT * vocab, logits, (size_t)(PROMPT * vocab) * sizeof *out);
    }
    assert_string_equal(session_prefill_way(session), strcmp(overlap, "off") == 0
                                                          ? strcmp(dealt, "off") == 0 ? "plain" : "sequence-parallel"
                                                      : strcmp(dealt, "off") == 0 ? "overlap"
                                                                                  : "sequence-parallel+overlap");
    session_close(session);
    return out;
}

// Nothing is taken before it has come: halves that overlap give the bits of those that do not. olmo2 has exchanges amid a block.
static void test_overlap(void **state)
{
    (void)state;
    static const char *const models[] = {"", "olmo2-"};
    for (int i = 0; i < 8; i++) {
        int64_t elems;
        int tp_size = i & 1 ? 4 : 2;
        const char *dealt = i & 2 ? "on" : "off", *model = models[i / 4];
        float *want = logits_of(model, tp_size, dealt, "off", &elems);
        float *got = logits_of(model, tp_size, dealt, "on", &elems);
        assert_memory_equal(got, want, (size_t)elems * sizeof *got);
        free(got), free(want);
    }
}

// It is called overlap where the longest steps that prompts have here are cut, and only there.
static void test_way(void **state)
{
    static const struct {
        int tp_size;
        const char *overlap, *wire;
        int64_t context;
        const char *way;
    } cases[] = {
        {2, "on", "s8x", 64, "overlap"},   {2, "on", "s8x", 48, "plain"},    {2, "auto", "bf16", 256, "overlap"},
        {2, "auto", "bf16", 240, "plain"}, {2, "auto", "s8x", 256, "plain"}, {2, "off", "bf16", 256, "plain"},
        {2, "on", "bf16", 256, "overlap"},
    };
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char dir[256];
        struct error err;
        struct session *session;
        struct session_options options = session_defaults;
        snprintf(dir, sizeof dir, "%s/%d", work, cases[i].tp_size);
        options.context = cases[i].context;
        options.backend = "cpu";
        options.threads = 1;
        options.timeout_s = 60;
        options.wire = cases[i].wire;
        options.ranks = "thread";
        options.overlap = cases[i].overlap;
        check(session_open(&session, dir, &options, 1, 0, &err), &err);
        check(session_start(session, &err), &err);
        if (strcmp(session_prefill_way(session), cases[i].way) != 0)
            fail_msg("case %zu: %s, wanted %s", i, session_prefill_way(session), cases[i].way);
        session_close(session);
    }
}

static int set_up(void **state)
{
    char command[512];
    const char *build = getenv("BUILD") ? getenv("BUILD") : "build";
    (void)state;
    if (!mkdtemp(work))
        return 1;
    for (int tp_size = 2; tp_size <= 4; tp_size *= 2) {
        snprintf(command, sizeof command,
                 "%s/tpshard --tp %d --quant none tests/model %s/%d --quiet && "
                 "%s/tpshard --tp %d --quant none tests/golden/families/olmo2 %s/olmo2-%d --quiet",
                 build, tp_size, work, tp_size, build, tp_size, work, tp_size);
        if (system(command) != 0)
            return 1;
    }
    return 0;
}

static int tear_down(void **state)
{
    char command[256];
    (void)state;
    snprintf(command, sizeof command, "rm -rf %s", work);
    return system(command) != 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_rows),        cmocka_unit_test(test_kept),
                                       cmocka_unit_test(test_rows_errors), cmocka_unit_test(test_exchanger),
                                       cmocka_unit_test(test_residual),    cmocka_unit_test(test_overlap),
                                       cmocka_unit_test(test_way)};
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
