// The halves of sums over ranks by their devices, where rows have owners (kernels/cuda/exchange.*): sums to their owners, and owned rows to all. Each rank
// is a thread with streams of its own, over pinned memory that all have mapped (host) or straight into each other's device memory (p2p). Held, bit for
// bit, to comm_reduce_scatter_rows and comm_all_gather_rows of the same ranks on the CPU: every algorithm and codec, feedback, rows with NaN, Inf, zeros
// and denormals, some rows of a buffer, any first owner, through the wrap of the tokens, and between sums. Both with a norm between them are held to the
// three one after the other. Then ranks that never come, and rows that are not there.
#include "tests/device/exchange_threads.h"

extern "C" {
#include "engine/comm_rows.h"
}

struct rows_case {
    int64_t rows, cols;
    int64_t before, behind; // rows of the buffer that are not exchanged
    int first_owner;        // modulo the ranks
};

// What a rank has after each half: [rows of the buffer][cols].
struct halves {
    std::vector<float> sums, all;
};

static bool exchange_on_device(struct end *e, const struct rows_case &c, const struct exchange_choice &choice,
                               bool feedback, const std::vector<float> &x, struct halves *out)
{
    struct error err;
    struct device *d = &e->device;
    size_t bytes = x.size() * sizeof x[0];
    struct dealt_rows rows = {c.before, c.rows, c.first_owner % e->group->tp_size};
    out->sums.resize(x.size());
    out->all.resize(x.size());
    send(d->buffer[BUFFER_PARTIAL], x.data(), bytes);
    d->count = c.before + c.rows + c.behind;
    e->desc.hidden_size = c.cols;
    // What is there between the halves is kept beside, in order with both.
    if (exchange_reduce_scatter_rows(d, BUFFER_PARTIAL, &rows, &choice, feedback, OP_MLP, 3, &err) ||
        cudaMemcpyAsync(d->buffer[BUFFER_RESIDUAL], d->buffer[BUFFER_PARTIAL], bytes, cudaMemcpyDeviceToDevice,
                        d->stream) != cudaSuccess ||
        exchange_all_gather_rows(d, BUFFER_PARTIAL, &rows, &choice, OP_MLP, 3, &err) ||
        device_wait(d, "halves", &err)) {
        note(e, "%s", err.msg);
        return false;
    }
    cudaMemcpy(out->sums.data(), d->buffer[BUFFER_RESIDUAL], bytes, cudaMemcpyDeviceToHost);
    cudaMemcpy(out->all.data(), d->buffer[BUFFER_PARTIAL], bytes, cudaMemcpyDeviceToHost);
    return true;
}

static bool exchange_on_cpu(struct end *e, const struct rows_case &c, enum wire wire, uint16_t *lost,
                            const std::vector<float> &x, struct halves *out)
{
    struct error err;
    int64_t at = c.before * c.cols, owner = c.first_owner % e->group->tp_size;
    out->sums = x;
    int rc = comm_reduce_scatter_rows(e->comm, out->sums.data() + at, c.rows, c.cols, owner, wire,
                                      lost ? lost + at : NULL, NULL, &err);
    out->all = out->sums;
    rc = rc ? rc : comm_all_gather_rows(e->comm, out->all.data() + at, c.rows, c.cols, owner, wire, NULL, &err);
    if (rc)
        note(e, "%s", err.msg);
    return rc == 0;
}

static void compare(struct end *e, const struct rows_case &c, const struct exchange_choice &choice, const char *what,
                    const std::vector<float> &got, const std::vector<float> &want)
{
    for (size_t i = 0; i < want.size(); i++)
        if (f32_bits(got[i]) != f32_bits(want[i])) {
            note(e, "%s, %s, %s, %d ranks, %lld x %lld, first owner %d: value %zu is %a (%08x), not %a (%08x)", what,
                 algorithm_names[choice.algorithm], wire_name(choice.wire), e->group->tp_size, (long long)c.rows,
                 (long long)c.cols, c.first_owner % e->group->tp_size, i, (double)got[i], f32_bits(got[i]),
                 (double)want[i], f32_bits(want[i]));
            return;
        }
}

// lost: of the whole buffer; empty: no feedback.
static void check_halves(struct end *e, uint64_t message, const struct rows_case &c, struct exchange_choice choice,
                         std::vector<uint16_t> &lost)
{
    int64_t rows = c.before + c.rows + c.behind;
    std::vector<float> x((size_t)(rows * c.cols));
    struct halves device, cpu;
    bool feedback = !lost.empty();
    exchange_fill(x.data(), message, e->rank, rows, c.cols);
    if (!exchange_on_device(e, c, choice, feedback, x, &device) ||
        !exchange_on_cpu(e, c, choice.wire, feedback ? lost.data() : NULL, x, &cpu))
        return;
    compare(e, c, choice, "sums at their owners", device.sums, cpu.sums);
    compare(e, c, choice, "rows of all owners", device.all, cpu.all);
    std::vector<uint16_t> device_lost(lost.size());
    if (feedback)
        cudaMemcpy(device_lost.data(), e->device.exchange->lost, lost.size() * sizeof lost[0], cudaMemcpyDeviceToHost);
    if (device_lost != lost)
        note(e, "%s, %s: other losses than on the CPU", algorithm_names[choice.algorithm], wire_name(choice.wire));
}

// Whole rows have owners: a chunk of tp_size rows is the least.
static void test_bits(void **state)
{
    static const struct rows_case cases[] = {
        {1, 1024, 0, 0, 1}, {2, 5, 0, 0, 0}, {9, 257, 2, 1, 2}, {27, 384, 0, 0, 5}, {40, 132, 3, 2, 1}};
    for (int tp_size : {2, 3, 4, 8})
        run_ranks(*state, tp_size, TIMEOUT_MS, false, [](struct end *e) {
            std::vector<uint16_t> none;
            uint64_t message = 0;
            bool p2p = e->group->way->transport == TRANSPORT_P2P;
            for (const struct rows_case &c : cases)
                for (int wire = 0; wire < WIRE_COUNT; wire++)
                    for (int algorithm = ALGORITHM_ONE_SHOT; algorithm <= ALGORITHM_CHUNKS; algorithm++) {
                        // One-shot is one phase too; the arithmetic is the same over all ways, and eight ranks are many for the emulator.
                        if ((algorithm == ALGORITHM_ONE_SHOT && c.rows > 1) ||
                            (emulator_present() && p2p && (c.cols == 1024 || c.cols == 384)) ||
                            (e->group->tp_size > 4 && c.rows > 20 && (wire + algorithm) % 2))
                            continue;
                        struct exchange_choice choice = {(enum exchange_algorithm)algorithm, (enum wire)wire,
                                                         (uint64_t)(8 * c.cols)};
                        check_halves(e, message++, c, choice, none);
                    }
        });
}

static void test_feedback(void **state)
{
    for (int tp_size : {2, 3})
        run_ranks(*state, tp_size, TIMEOUT_MS, true, [](struct end *e) {
            static const struct rows_case c = {20, 300, 2, 1, 1};
            uint64_t message = 100;
            for (int wire : {WIRE_FP8, WIRE_S8X})
                for (int algorithm : {ALGORITHM_TWO_SHOT, ALGORITHM_CHUNKS}) {
                    std::vector<uint16_t> lost(23 * 300);
                    struct error err;
                    e->desc.hidden_size = c.cols;
                    e->device.count = 23;
                    e->device.phase = PHASE_PREFILL;
                    if (exchange_begin_step(&e->device, &err))
                        note(e, "%s", err.msg);
                    for (int i = 0; i < 3; i++)
                        check_halves(e, message++, c, {(enum exchange_algorithm)algorithm, (enum wire)wire, 8 * 300},
                                     lost);
                }
        });
}

// Halves and sums share buffers and tokens: each finds them as the other has left them, in chunks and kernels of any number.
static void test_mixed(void **state)
{
    run_ranks(*state, 3, TIMEOUT_MS, false, [](struct end *e) {
        std::vector<uint16_t> none;
        for (uint64_t i = 0; i < 24; i++) {
            int64_t rows = 1 + (int64_t)(i * 7 % 23);
            struct exchange_choice choice = {i % 3 ? ALGORITHM_CHUNKS : ALGORITHM_TWO_SHOT,
                                             i % 2 ? WIRE_S8X : WIRE_BF16, 2 * 260 * (1 + i % 5)};
            if (i % 4 == 3)
                check_sum(e, 200 + i, rows, 260, choice, false, none);
            else
                check_halves(e, 200 + i, {rows, 260, (int64_t)(i % 2), 0, (int)i}, choice, none);
        }
    });
}

// Also a row so wide that chunks have no room for one of each owner: a kernel does it.
static void test_wide_rows(void **state)
{
    run_ranks(*state, 8, TIMEOUT_MS, false, [](struct end *e) {
        std::vector<uint16_t> none;
        check_halves(e, 300, {3, 70000, 0, 0, 6}, {ALGORITHM_CHUNKS, WIRE_F32, 1 << 20}, none);
    });
}

// ---- with a norm between -------------------------------------------------------------------------------------------

enum { NORM_ROWS = 37, NORM_COLS = 300, NORM_COUNT = NORM_ROWS * NORM_COLS };
static_assert(NORM_COUNT * sizeof(float) <= SCRATCH_BYTES, "normed rows lie in scratch memory");

struct normed {
    std::vector<float> rows, residual;
    std::vector<uint16_t> lost;
};

// From the same numbers: the halves and a norm one after the other, or as one.
static bool run_norm(struct end *e, bool apart, const struct dealt_norm *what, bool feedback, struct normed *out)
{
    struct error err;
    struct device *d = &e->device;
    int tp_size = e->group->tp_size, first = (e->rank - what->first_owner + tp_size) % tp_size;
    struct dealt_rows rows = {0, NORM_ROWS, what->first_owner};
    std::vector<float> x(NORM_COUNT);
    out->rows.resize(NORM_COUNT);
    out->residual.resize(NORM_COUNT);
    out->lost.resize(feedback ? NORM_COUNT : 0);
    exchange_fill(x.data(), 500, 99, NORM_ROWS, NORM_COLS);
    send(d->buffer[BUFFER_RESIDUAL], x.data(), NORM_COUNT * sizeof x[0]);
    exchange_fill(x.data(), 501, e->rank, NORM_ROWS, NORM_COLS);
    send(d->normed, x.data(), NORM_COUNT * sizeof x[0]);
    send(d->buffer[BUFFER_PARTIAL], x.data(), NORM_COUNT * sizeof x[0]);
    int rc = exchange_begin_step(d, &err);
    if (!rc && !apart) {
        rc = exchange_norm_dealt(d, what, &err);
    } else if (!rc) {
        rc = exchange_reduce_scatter_rows(d, BUFFER_PARTIAL, &rows, &what->choice, feedback, OP_MLP, 1, &err);
        rc = rc ? rc : step_norm_own(d, what->join, what->weight, first, tp_size, &err);
        rc = rc ? rc : exchange_all_gather_rows(d, BUFFER_NORMED, &rows, &what->choice, OP_ATTENTION, 2, &err);
    }
    if (rc || device_wait(d, "a norm", &err)) {
        note(e, "%s", err.msg);
        return false;
    }
    cudaMemcpy(out->rows.data(), d->normed, NORM_COUNT * sizeof x[0], cudaMemcpyDeviceToHost);
    cudaMemcpy(out->residual.data(), d->buffer[BUFFER_RESIDUAL], NORM_COUNT * sizeof x[0], cudaMemcpyDeviceToHost);
    if (feedback)
        cudaMemcpy(out->lost.data(), d->exchange->lost, NORM_COUNT * sizeof out->lost[0], cudaMemcpyDeviceToHost);
    return true;
}

// in_place: the normed rows have the place of the sums, as where nothing else needs them.
static void check_norm(struct end *e, struct exchange_choice choice, bool in_place, int first_owner)
{
    struct device *d = &e->device;
    bool feedback = e->group->feedback && choice.wire == WIRE_S8X;
    std::vector<float> weight(NORM_COLS, 1.25f), bias(NORM_COLS, 0.5f);
    struct join join = {e->memory[2], e->memory[0]};
    struct dealt_norm what = {};
    struct normed apart, together;
    e->desc.hidden_size = NORM_COLS;
    e->desc.norm_eps = 1e-5;
    e->desc.residual_scale = 0.75;
    d->count = NORM_ROWS;
    d->phase = PHASE_PREFILL;
    d->normed = d->buffer[BUFFER_NORMED] = in_place ? d->buffer[BUFFER_PARTIAL] : e->memory[1];
    send(e->memory[0], weight.data(), NORM_COLS * sizeof weight[0]);
    send(e->memory[2], bias.data(), NORM_COLS * sizeof bias[0]);
    what.first_owner = first_owner;
    what.join = &join;
    what.weight = e->memory[0];
    what.choice = choice;
    what.choice.algorithm = ALGORITHM_TWO_SHOT;
    what.feedback = feedback;
    if (!run_norm(e, true, &what, feedback, &apart))
        return;
    what.choice = choice;
    if (!run_norm(e, false, &what, feedback, &together))
        return;
    for (int i = 0; i < NORM_COUNT; i++)
        if (f32_bits(apart.rows[(size_t)i]) != f32_bits(together.rows[(size_t)i]) ||
            f32_bits(apart.residual[(size_t)i]) != f32_bits(together.residual[(size_t)i])) {
            note(e, "%s, %s, %d ranks, %s: row %d differs from column %d on", algorithm_names[choice.algorithm],
                 wire_name(choice.wire), e->group->tp_size, in_place ? "in place" : "apart", i / NORM_COLS,
                 i % NORM_COLS);
            return;
        }
    if (apart.lost != together.lost)
        note(e, "%s, %s: other losses", algorithm_names[choice.algorithm], wire_name(choice.wire));
}

static void test_norms(void **state)
{
    for (int tp_size : {2, 3, 8})
        run_ranks(*state, tp_size, TIMEOUT_MS, true, [](struct end *e) {
            for (int i = 0; i < 6; i++)
                check_norm(e,
                           {i % 3 == 2 ? ALGORITHM_TWO_SHOT : ALGORITHM_CHUNKS, i % 2 ? WIRE_S8X : WIRE_BF16,
                            2 * 8 * NORM_COLS},
                           i < 3, i % e->group->tp_size);
        });
}

// ---- failures ------------------------------------------------------------------------------------------------------

static int run_half(struct end *e, bool to_all, const struct dealt_rows *rows, const struct exchange_choice *choice,
                    struct error *err)
{
    struct device *d = &e->device;
    int rc = to_all ? exchange_all_gather_rows(d, BUFFER_PARTIAL, rows, choice, OP_ATTENTION, 17, err)
                    : exchange_reduce_scatter_rows(d, BUFFER_PARTIAL, rows, choice, false, OP_ATTENTION, 17, err);
    return rc ? rc : device_wait(d, "half a sum", err);
}

// The last rank leaves before a half; the others end within the deadline, with its name.
static void test_missing_rank(void **state)
{
    for (bool to_all : {false, true})
        for (int algorithm : {ALGORITHM_TWO_SHOT, ALGORITHM_CHUNKS})
            run_ranks(*state, 3, 500, false, [=](struct end *e) {
                struct error err;
                std::vector<uint16_t> none;
                struct exchange_choice choice = {(enum exchange_algorithm)algorithm, WIRE_BF16, 8 * 256};
                struct dealt_rows rows = {0, 7, 1};
                int missing = e->group->tp_size - 1;
                check_halves(e, 400, {7, 256, 0, 0, 1}, choice, none);
                comm_barrier(e->comm, &err);
                if (e->rank == missing)
                    return;
                int64_t begin_ns = clock_now_ns();
                int rc = run_half(e, to_all, &rows, &choice, &err);
                if (rc != ERR_RANK || e->failures != 1)
                    note(e, "%s without a rank: %d, %d failures", algorithm_names[algorithm], rc, e->failures);
                if (clock_now_ns() - begin_ns > 20000000000)
                    note(e, "%s: the wait had no end for %.1f s", algorithm_names[algorithm],
                         1e-9 * (double)(clock_now_ns() - begin_ns));
                uint32_t phase =
                    to_all && algorithm == ALGORITHM_TWO_SHOT; // chunks meet before the first is on its way
                if (e->device.exchange->record->told &&
                    (e->failure.whom != missing || e->failure.layer != 17 || e->failure.operation != OP_ATTENTION ||
                     e->failure.phase != phase || e->failure.expected - e->failure.seen != 1))
                    note(e, "%s: the record names rank %d, layer %d, operation %d, phase %u, token %u of %u",
                         algorithm_names[algorithm], e->failure.whom, e->failure.layer, e->failure.operation,
                         e->failure.phase, e->failure.seen, e->failure.expected);
                if (run_half(e, !to_all, &rows, &choice, &err) != ERR_RANK) // whoever comes later leaves at once
                    note(e, "a half behind a broken one went well");
            });
}

// Rows that the window does not have, or none at all.
static void test_no_rows(void **state)
{
    run_ranks(*state, 2, TIMEOUT_MS, false, [](struct end *e) {
        struct error err;
        struct exchange_choice choice = {ALGORITHM_TWO_SHOT, WIRE_BF16, 0};
        static const struct dealt_rows none = {3, 0, 1}, wrong[] = {{0, 8, 0}, {-1, 2, 0}, {7, 1, 0}, {0, -1, 0}};
        e->device.count = 7;
        for (bool to_all : {false, true}) {
            if (run_half(e, to_all, &none, &choice, &err))
                note(e, "of no rows: %s", err.msg);
            for (const struct dealt_rows &rows : wrong)
                if (run_half(e, to_all, &rows, &choice, &err) != ERR_OTHER ||
                    !strstr(err.msg, "of 7 are to be exchanged"))
                    note(e, "rows %lld to %lld are exchanged", (long long)rows.first,
                         (long long)(rows.first + rows.count));
        }
    });
}

int main(void)
{
    if (!begin_exchange_tests())
        return 0;
    static struct way host = {TRANSPORT_HOST, 1}, p2p = {TRANSPORT_P2P, TEST_RANKS}, shared = {TRANSPORT_P2P, 1};
    const struct CMUnitTest tests[] = {
        {"bits over host", test_bits, NULL, NULL, &host},
        {"bits over p2p", test_bits, NULL, NULL, &p2p},
        {"feedback over host", test_feedback, NULL, NULL, &host},
        {"feedback over p2p on one device", test_feedback, NULL, NULL, &shared},
        {"between sums over host", test_mixed, NULL, NULL, &host},
        {"between sums over p2p", test_mixed, NULL, NULL, &p2p},
        {"wide rows over host", test_wide_rows, NULL, NULL, &host},
        {"norms over host", test_norms, NULL, NULL, &host},
        {"norms over p2p", test_norms, NULL, NULL, &p2p},
        {"a missing rank over host", test_missing_rank, NULL, NULL, &host},
        {"a missing rank over p2p", test_missing_rank, NULL, NULL, &p2p},
        {"no rows", test_no_rows, NULL, NULL, &host},
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
