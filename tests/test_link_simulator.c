// bench/link_simulator: bytes are those of the formulae, exactly; all ranks have the bits of the definition, whatever algorithm and
// chunks; the clock obeys the laws of links; and the bounds of the table of exchanges follow from it.
#include "bench/link_simulator.h"
#include "engine/comm_select.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>

#include <cmocka.h>

static const enum transport transports[] = {TRANSPORT_HOST, TRANSPORT_P2P};
static const struct exchange_choice algorithms[] = {
    {ALGORITHM_ONE_SHOT, WIRE_BF16, 0},
    {ALGORITHM_TWO_SHOT, WIRE_BF16, 0},
    {ALGORITHM_CHUNKS, WIRE_BF16, 20 * 256},
    {ALGORITHM_CHUNKS, WIRE_BF16, 11 * 256}, // chunks that end within a row and between its owners
};

static struct link_message message_of(enum transport transport, struct exchange_choice choice, int tp_size,
                                      int64_t rows, int64_t cols)
{
    return (struct link_message){.transport = transport,
                                 .choice = choice,
                                 .tp_size = tp_size,
                                 .rows = rows,
                                 .cols = cols,
                                 .rates = link_rates_pcie4_x16};
}

static struct link_result simulate(const struct link_message *message)
{
    struct link_result result;
    struct error err;
    if (link_simulate(&result, message, &err))
        fail_msg("%s", err.msg);
    if (!result.same_bits)
        fail_msg("%s, %s, %s, tp %d: the ranks' bits are not those of the definition",
                 transport_name(message->transport), exchange_algorithm_name(message->choice.algorithm),
                 wire_name(message->choice.wire), message->tp_size);
    return result;
}

// n divides a row's groups: every rank sends and receives what the formulae say.
static void test_bytes_and_bits(void **state)
{
    (void)state;
    for (size_t t = 0; t < 2; t++)
        for (int tp_size = 2; tp_size <= 8; tp_size *= 2)
            for (size_t a = 0; a < sizeof algorithms / sizeof *algorithms; a++)
                for (int wire = 0; wire < WIRE_COUNT; wire++) {
                    uint64_t to, from;
                    bool once = algorithms[a].algorithm == ALGORITHM_ONE_SHOT;
                    if ((algorithms[a].algorithm == ALGORITHM_CHUNKS && wire != (tp_size > 2 ? WIRE_S8X : WIRE_BF16)) ||
                        (once && wire_is_compressed((enum wire)wire)))
                        continue;
                    struct link_message message = message_of(transports[t], algorithms[a], tp_size, 2, 2048);
                    message.choice.wire = (enum wire)wire;
                    struct link_result result = simulate(&message);
                    link_formula(&message, &to, &from);
                    for (int rank = 0; rank < tp_size; rank++)
                        if (result.to_bytes[rank] != to || result.from_bytes[rank] != from)
                            fail_msg(
                                "%s, %s, %s, tp %d: rank %d moved %llu and %llu bytes, the formulae say %llu and %llu",
                                transport_name(message.transport), exchange_algorithm_name(message.choice.algorithm),
                                wire_name(message.choice.wire), tp_size, rank,
                                (unsigned long long)result.to_bytes[rank], (unsigned long long)result.from_bytes[rank],
                                (unsigned long long)to, (unsigned long long)from);
                }
}

// The formulae themselves, in numbers: 4 rows of 1024 values are 8192 bytes of bf16, 4224 in eight bits and a little.
static void test_formulae(void **state)
{
    (void)state;
    static const struct {
        enum transport transport;
        enum exchange_algorithm algorithm;
        enum wire wire;
        int tp_size;
        uint64_t to, from;
    } cases[] = {
        {TRANSPORT_P2P, ALGORITHM_TWO_SHOT, WIRE_BF16, 2, 8192, 8192},
        {TRANSPORT_P2P, ALGORITHM_TWO_SHOT, WIRE_BF16, 4, 12288, 12288},
        {TRANSPORT_P2P, ALGORITHM_CHUNKS, WIRE_BF16, 8, 14336, 14336},
        {TRANSPORT_P2P, ALGORITHM_TWO_SHOT, WIRE_S8X, 4, 6336, 6336},
        {TRANSPORT_HOST, ALGORITHM_TWO_SHOT, WIRE_BF16, 4, 8192, 12288},
        {TRANSPORT_HOST, ALGORITHM_CHUNKS, WIRE_FP8, 2, 4224, 4224},
        {TRANSPORT_P2P, ALGORITHM_ONE_SHOT, WIRE_F32, 4, 3 * 16384, 3 * 16384},
        {TRANSPORT_HOST, ALGORITHM_ONE_SHOT, WIRE_F32, 8, 16384, 7 * 16384},
        {TRANSPORT_P2P, ALGORITHM_ONE_SHOT, WIRE_BF16, 2, 8192, 8192},
        {TRANSPORT_HOST, ALGORITHM_ONE_SHOT, WIRE_BF16, 2, 8192, 8192},
        {TRANSPORT_HOST, ALGORITHM_ONE_SHOT, WIRE_BF16, 4, 8192, 3 * 8192},
        {TRANSPORT_P2P, ALGORITHM_ONE_SHOT, WIRE_BF16, 8, 7 * 8192, 7 * 8192},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct exchange_choice choice = {cases[i].algorithm, cases[i].wire, 4096};
        struct link_message message = message_of(cases[i].transport, choice, cases[i].tp_size, 4, 1024);
        uint64_t to, from;
        link_formula(&message, &to, &from);
        assert_int_equal(to, cases[i].to);
        assert_int_equal(from, cases[i].from);
    }
}

// Groups that do not divide among the ranks: the bytes of all ranks together, and the bits.
static void test_odd_shapes(void **state)
{
    (void)state;
    for (size_t t = 0; t < 2; t++)
        for (size_t a = 0; a < sizeof algorithms / sizeof *algorithms; a++) {
            struct link_message message = message_of(transports[t], algorithms[a], 3, 5, 7 * 128);
            struct link_result result = simulate(&message);
            uint64_t to = 0, from = 0, all = 5 * 7 * 256;
            for (int rank = 0; rank < 3; rank++) {
                to += result.to_bytes[rank];
                from += result.from_bytes[rank];
            }
            bool one = algorithms[a].algorithm == ALGORITHM_ONE_SHOT, host = transports[t] == TRANSPORT_HOST;
            assert_int_equal(to, host ? 3 * all : one ? 6 * all : 4 * all);
            assert_int_equal(from, one ? 6 * all : 4 * all);
        }
}

static double seconds_of(enum transport transport, struct exchange_choice choice, int tp_size, int64_t rows)
{
    struct link_message message = message_of(transport, choice, tp_size, rows, 8192);
    return link_seconds(&message);
}

static void test_clock(void **state)
{
    (void)state;
    struct exchange_choice chunks = {ALGORITHM_CHUNKS, WIRE_S8X, 2 << 20},
                           bf16 = {ALGORITHM_CHUNKS, WIRE_BF16, 2 << 20};
    struct exchange_choice small = {ALGORITHM_ONE_SHOT, WIRE_BF16, 0};
    // The clock of the processes is the clock alone.
    struct link_message message = message_of(TRANSPORT_HOST, chunks, 2, 40, 8192);
    message.choice.chunk_bytes = 64 << 10;
    assert_true(fabs(simulate(&message).seconds - link_seconds(&message)) < 1e-12);
    // Not faster than the link, and with full pipelines not much slower: 2048 rows, M = 17.3 MB in s8x.
    for (int tp_size = 2; tp_size <= 4; tp_size *= 2) {
        double bytes = 2.0 * (tp_size - 1) / tp_size * 2048 * 64 * 132, least_s = bytes / 24e9;
        double took_s = seconds_of(TRANSPORT_HOST, chunks, tp_size, 2048);
        assert_true(took_s > least_s && took_s < 1.35 * least_s);
        assert_true(took_s < 0.6 * seconds_of(TRANSPORT_HOST, bf16, tp_size, 2048));
    }
    // The latencies that the rates were fitted to: 16 KB over P2P and the host.
    assert_true(fabs(seconds_of(TRANSPORT_P2P, small, 2, 1) - 5.8e-6) < 0.3e-6);
    assert_true(fabs(seconds_of(TRANSPORT_HOST, small, 2, 1) - 8.7e-6) < 0.3e-6);
    // A slower link takes longer, and so does memory that all cards share.
    message = message_of(TRANSPORT_HOST, chunks, 4, 2048, 8192);
    double before_s = link_seconds(&message);
    message.rates.dram_bytes_s = 70e9;
    double dram_s = link_seconds(&message);
    assert_true(dram_s > 1.8 * before_s && dram_s < 3 * before_s);
    message.rates = link_rates_pcie4_x16;
    message.rates.link_bytes_s /= 2;
    assert_true(link_seconds(&message) > 1.8 * before_s);
}

// Where a flag takes long, so many chunks are on their way as there are buffers.
static void test_buffers(void **state)
{
    enum { CHUNKS = 24, BUFFERS = 3 };
    (void)state;
    for (size_t t = 0; t < 2; t++) {
        struct exchange_choice choice = {ALGORITHM_CHUNKS, WIRE_BF16, 64 << 10};
        struct link_message message = message_of(transports[t], choice, 2, 4 * CHUNKS, 8192);
        message.rates.flag_s = 1e-3; // of parts, and of sums
        double took_s = link_seconds(&message), least_s = 2e-3 * CHUNKS / BUFFERS;
        if (!(took_s > least_s && took_s < 1.1 * least_s))
            fail_msg("%s: %.2f ms, wanted a little more than %.2f", transport_name(transports[t]), 1e3 * took_s,
                     1e3 * least_s);
    }
}

// The table's choice is never far from the fastest of all.
static void test_table(void **state)
{
    (void)state;
    for (size_t t = 0; t < 2; t++)
        for (int tp_size = 2; tp_size <= 4; tp_size *= 2)
            for (int64_t rows = 1; rows <= 4096; rows *= 2)
                for (int wire = WIRE_BF16; wire <= WIRE_S8X; wire += WIRE_S8X) {
                    enum phase phase = wire == WIRE_BF16 ? PHASE_DECODE : PHASE_PREFILL;
                    struct exchange_choice choice =
                        comm_select(transports[t], tp_size, (uint64_t)rows * 16384, phase, (enum wire)wire);
                    double ours_s = seconds_of(transports[t], choice, tp_size, rows), best_s = INFINITY;
                    for (int algorithm = 0; algorithm < ALGORITHM_COUNT; algorithm++)
                        for (uint64_t bytes = 256 << 10; bytes <= 2 << 20; bytes *= 2) {
                            bool once = algorithm != ALGORITHM_CHUNKS && bytes > 256 << 10; // they have no chunks
                            if (once || (algorithm == ALGORITHM_ONE_SHOT && wire_is_compressed((enum wire)wire)))
                                continue;
                            struct exchange_choice other = {(enum exchange_algorithm)algorithm, (enum wire)wire, bytes};
                            best_s = fmin(best_s, seconds_of(transports[t], other, tp_size, rows));
                        }
                    if (!(ours_s <= 1.2 * best_s))
                        fail_msg("%s, tp %d, %s, %lld rows: %s takes %.1f us, the fastest %.1f",
                                 transport_name(transports[t]), tp_size, wire_name((enum wire)wire), (long long)rows,
                                 exchange_algorithm_name(choice.algorithm), 1e6 * ours_s, 1e6 * best_s);
                }
}

static void test_refusals(void **state)
{
    (void)state;
    struct exchange_choice two_shot = {ALGORITHM_TWO_SHOT, WIRE_BF16, 0}, unknown = {ALGORITHM_COUNT, WIRE_BF16, 0},
                           compressed = {ALGORITHM_ONE_SHOT, WIRE_S8X, 0};
    const struct link_message messages[] = {
        message_of(TRANSPORT_NCCL, two_shot, 2, 1, 128),  message_of(TRANSPORT_HOST, two_shot, 1, 1, 128),
        message_of(TRANSPORT_HOST, two_shot, 9, 1, 128),  message_of(TRANSPORT_HOST, two_shot, 2, 0, 128),
        message_of(TRANSPORT_HOST, two_shot, 2, 1, 100),  message_of(TRANSPORT_P2P, unknown, 2, 1, 128),
        message_of(TRANSPORT_P2P, compressed, 2, 1, 128),
    };
    for (size_t i = 0; i < sizeof messages / sizeof *messages; i++) {
        struct link_result result;
        struct error err;
        assert_int_equal(link_simulate(&result, &messages[i], &err), ERR_USAGE);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bytes_and_bits), cmocka_unit_test(test_formulae), cmocka_unit_test(test_odd_shapes),
        cmocka_unit_test(test_clock),          cmocka_unit_test(test_buffers),  cmocka_unit_test(test_table),
        cmocka_unit_test(test_refusals),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
