// Exchanges beside what the device computes (kernels/cuda/exchange_sides.c), in the emulator: the rows of a step in two windows, whose sums go on sides
// of their own. Held, bit for bit, to comm_all_reduce of each window; with streams that run as late as they may, and with exchanges that run as soon as
// they may, so that neither a missing wait of the device for its exchange nor one of the exchange for the device stays unseen. That one half computes
// while the other's sum cannot end; ranks that never come; a side that is left open.
#include "tests/device/exchange_threads.h"

#include <atomic>

enum { FIRST = 128, SECOND = 44, ROWS = FIRST + SECOND, COLS = 260, ROUNDS = 3 };
static_assert((int)ROWS <= (int)MAX_ROWS && (int)COLS <= (int)HIDDEN, "what the ranks have memory for");

static const int64_t first_row[] = {0, FIRST}, num_rows[] = {FIRST, SECOND};

// Work on the device's stream: rows of the message of a round become the partial sums, which hold the last round's sums before.
struct piece {
    struct end *e;
    int64_t first, count;
    int round;
    std::vector<float> before; // what was there
};

static float part_of(int round, int rank, int64_t row, int64_t col)
{
    return exchange_value((uint64_t)(500 + round), rank, row, col);
}

static void compute(void *arg)
{
    struct piece *p = (struct piece *)arg;
    float *rows = p->e->device.all_buffer[BUFFER_PARTIAL] + p->first * COLS;
    p->before.assign(rows, rows + p->count * COLS);
    for (int64_t i = 0; i < p->count * COLS; i++)
        rows[i] = part_of(p->round, p->e->rank, p->first + i / COLS, i % COLS);
}

static void begin_step(struct end *e)
{
    struct error err;
    struct device *d = &e->device;
    static uint32_t numbers[ROWS]; // of a step's rows; nobody reads them
    if (!d->all_buffer[BUFFER_PARTIAL])
        memcpy(d->all_buffer, d->buffer, sizeof d->all_buffer);
    d->all_block.token = numbers;
    d->all_block.sequence = d->all_block.position = (int32_t *)numbers;
    e->desc.hidden_size = COLS;
    d->step_count = ROWS;
    d->phase = PHASE_PREFILL;
    if (step_window(d, 0, ROWS, &err) || exchange_begin_step(d, &err))
        note(e, "%s", err.msg);
}

static int send_half(struct end *e, int half, const struct exchange_choice *choice, struct error *err)
{
    struct device *d = &e->device;
    int rc;
    if ((rc = step_window(d, first_row[half], num_rows[half], err)) || (rc = exchange_side_begin(d, half, err)) ||
        (rc = exchange_all_reduce(d, BUFFER_PARTIAL, choice, e->group->feedback, OP_MLP, half, err)))
        return rc;
    return exchange_side_end(d, err);
}

// The sum of a half in a round, on the CPU.
static void check_half(struct end *e, const struct piece *p, const struct exchange_choice *choice, uint16_t *lost)
{
    struct error err;
    std::vector<float> want((size_t)(p->count * COLS));
    for (int64_t i = 0; i < p->count * COLS; i++)
        want[(size_t)i] = part_of(p->round - 1, e->rank, p->first + i / COLS, i % COLS);
    if (comm_all_reduce(e->comm, want.data(), p->count, COLS, COLS, choice->wire,
                        e->group->feedback ? lost + p->first * COLS : NULL, NULL, &err))
        note(e, "%s", err.msg);
    else if (memcmp(want.data(), p->before.data(), want.size() * sizeof(float)) != 0)
        note(e, "%s, %d ranks: another sum of rows %lld on in round %d", wire_name(choice->wire), e->group->tp_size,
             (long long)p->first, p->round - 1);
}

// A few blocks of a layer: each half takes its sum, computes on, and sends its next part while the other half has its turn.
static void run_rounds(struct end *e, struct exchange_choice choice)
{
    struct error err;
    struct device *d = &e->device;
    std::vector<uint16_t> lost(ROWS * COLS);
    std::vector<struct piece> pieces(2 * (ROUNDS + 1));
    int rc = 0;
    begin_step(e);
    for (int i = 0; i < 2 * (ROUNDS + 1) && !rc; i++) {
        int half = i % 2;
        struct piece *p = &pieces[(size_t)i];
        *p = {e, first_row[half], num_rows[half], i / 2, {}};
        rc = exchange_side_wait(d, half, &err);
        emulator_enqueue(d->stream, compute, p);
        if (!rc && p->round < ROUNDS)
            rc = send_half(e, half, &choice, &err);
    }
    if (rc || device_wait(d, "rounds", &err)) {
        note(e, "%s", err.msg);
        return;
    }
    for (int i = 2; i < 2 * (ROUNDS + 1); i++)
        check_half(e, &pieces[(size_t)i], &choice, lost.data());
}

static void test_sums(void **state)
{
    for (bool hurry : {false, true}) {
        emulator_hurry(hurry);
        for (int tp_size : {2, 3})
            for (bool feedback : {false, true})
                run_ranks(*state, tp_size, TIMEOUT_MS, feedback, [=](struct end *e) {
                    for (int algorithm = ALGORITHM_ONE_SHOT; algorithm <= ALGORITHM_CHUNKS; algorithm++)
                        for (int wire : {WIRE_BF16, WIRE_S8X}) {
                            if ((feedback && wire == WIRE_BF16) ||
                                (algorithm == ALGORITHM_ONE_SHOT && wire_is_compressed((enum wire)wire)))
                                continue; // never together
                            run_rounds(e, {(enum exchange_algorithm)algorithm, (enum wire)wire, 64 * COLS});
                        }
                });
    }
    emulator_hurry(false);
}

// ---- beside --------------------------------------------------------------------------------------------------------

static std::atomic<int> computed; // ranks whose second half has

static void count_computed(void *arg)
{
    (void)arg;
    computed++;
}

// The last rank sends nothing before all others have computed their second half, and that behind their first half's exchange.
static void test_beside(void **state)
{
    for (int algorithm : {ALGORITHM_TWO_SHOT, ALGORITHM_CHUNKS}) {
        computed = 0;
        run_ranks(*state, 3, 20000, false, [=](struct end *e) {
            struct error err;
            struct device *d = &e->device;
            struct exchange_choice choice = {(enum exchange_algorithm)algorithm, WIRE_BF16, 64 * COLS};
            std::vector<struct piece> pieces(2);
            begin_step(e);
            pieces[0] = {e, 0, FIRST, 0, {}};
            pieces[1] = {e, 0, FIRST, 1, {}};
            emulator_enqueue(d->stream, compute, &pieces[0]);
            bool last = e->rank == e->group->tp_size - 1;
            int64_t end_ns = clock_now_ns() + 10000000000;
            while (last && computed < e->group->tp_size - 1 && clock_now_ns() < end_ns)
                usleep(1000);
            int rc = send_half(e, 0, &choice, &err);
            if (!last) {
                emulator_enqueue(d->stream, count_computed, NULL);
                rc = rc ? rc : device_wait(d, "the second half", &err); // not for the side
            }
            rc = rc ? rc : exchange_side_wait(d, 0, &err);
            emulator_enqueue(d->stream, compute, &pieces[1]);
            if (rc || device_wait(d, "both", &err))
                note(e, "%s", err.msg);
            else if (computed < e->group->tp_size - 1)
                note(e, "nothing is computed while a sum is on its way");
            else
                check_half(e, &pieces[1], &choice, NULL);
        });
    }
}

// ---- failures ------------------------------------------------------------------------------------------------------

// The last rank leaves before its second half; the others end within the deadline, with its name.
static void test_missing_rank(void **state)
{
    for (int algorithm : {ALGORITHM_TWO_SHOT, ALGORITHM_CHUNKS})
        run_ranks(*state, 3, 300, false, [=](struct end *e) {
            struct error err;
            struct device *d = &e->device;
            struct exchange_choice choice = {(enum exchange_algorithm)algorithm, WIRE_S8X, 64 * COLS};
            int missing = e->group->tp_size - 1;
            int64_t begin_ns = clock_now_ns();
            begin_step(e);
            memset(d->all_buffer[BUFFER_PARTIAL], 0, ROWS * COLS * sizeof(float));
            int rc = send_half(e, 0, &choice, &err);
            if (!rc && e->rank != missing)
                rc = send_half(e, 1, &choice, &err);
            rc = rc ? rc : exchange_side_wait(d, 0, &err);
            rc = rc || e->rank == missing ? rc : exchange_side_wait(d, 1, &err);
            rc = rc ? rc : device_wait(d, "both", &err);
            if (e->rank == missing)
                return; // it may have learnt of the others' end or not
            if (rc != ERR_RANK || e->failures != 1)
                note(e, "without a rank: %d, %d failures", rc, e->failures);
            if (clock_now_ns() - begin_ns > 20000000000)
                note(e, "the wait had no end for %.1f s", 1e-9 * (double)(clock_now_ns() - begin_ns));
            if (d->exchange->record->told && (e->failure.whom != missing || e->failure.layer != 1))
                note(e, "the record names rank %d, layer %d", e->failure.whom, e->failure.layer);
        });
}

// A call fails amid a side: what was open is closed, and nothing waits for ever.
static void test_left_open(void **state)
{
    run_ranks(*state, 2, 300, false, [](struct end *e) {
        struct error err;
        struct device *d = &e->device;
        cudaStream_t stream = d->stream;
        begin_step(e);
        if (exchange_side_begin(d, 1, &err) || d->stream == stream)
            note(e, "a side has no stream of its own");
        if (exchange_side_begin(d, 0, &err) != ERR_OTHER || exchange_side_wait(d, 1, &err) != ERR_OTHER)
            note(e, "sides stand in each other");
        if (e->rank == 0 && (exchange_side_end(d, &err) || exchange_side_end(d, &err) || d->stream != stream))
            note(e, "a side that has ended is still there");
    });
}

// A sum that no side holds comes behind a side that nobody has waited for.
static void test_behind(void **state)
{
    run_ranks(*state, 2, TIMEOUT_MS, false, [](struct end *e) {
        struct error err;
        struct device *d = &e->device;
        struct exchange_choice choice = {ALGORITHM_TWO_SHOT, WIRE_BF16, 64 * COLS};
        std::vector<struct piece> pieces(1);
        begin_step(e);
        pieces[0] = {e, 0, FIRST, 0, {}};
        emulator_enqueue(d->stream, compute, &pieces[0]);
        int rc = send_half(e, 0, &choice, &err);
        rc = rc ? rc : step_window(d, FIRST, SECOND, &err);
        rc = rc ? rc : exchange_all_reduce(d, BUFFER_PARTIAL, &choice, false, OP_MLP, 1, &err);
        if (rc || device_wait(d, "the second half", &err))
            note(e, "%s", err.msg);
        struct piece seen = {e, 0, FIRST, 1, {}};
        const float *rows = d->all_buffer[BUFFER_PARTIAL];
        seen.before.assign(rows, rows + FIRST * COLS);
        check_half(e, &seen, &choice, NULL);
    });
}

int main(void)
{
    if (!begin_exchange_tests())
        return 0;
    static struct way host = {TRANSPORT_HOST, 1}, p2p = {TRANSPORT_P2P, TEST_RANKS};
    const struct CMUnitTest tests[] = {
        {"sums over host", test_sums, NULL, NULL, &host},
        {"sums over p2p", test_sums, NULL, NULL, &p2p},
        {"beside over host", test_beside, NULL, NULL, &host},
        {"beside over p2p", test_beside, NULL, NULL, &p2p},
        {"a missing rank over host", test_missing_rank, NULL, NULL, &host},
        {"a missing rank over p2p", test_missing_rank, NULL, NULL, &p2p},
        {"a side left open", test_left_open, NULL, NULL, &host},
        {"behind a side", test_behind, NULL, NULL, &p2p},
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
