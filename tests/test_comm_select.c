// The table of exchanges: its rows at their bounds; codecs by phase alone; the same for every rank and process; monotone in size;
// and ranks with another table are refused with both hashes.
#include "engine/comm_select.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#define KB 1024ull
#define MB (1024 * KB)

static void test_rows(void **state)
{
    (void)state;
    static const struct {
        enum transport transport;
        int tp_size;
        uint64_t bytes;
        enum phase phase;
        enum wire wanted;
        enum exchange_algorithm algorithm;
        enum wire wire;
        uint64_t chunk_bytes;
    } cases[] = {
        // CPU ranks
        {TRANSPORT_SHM, 2, 16 * KB, PHASE_DECODE, WIRE_S8X, ALGORITHM_ONE_SHOT, WIRE_BF16, 0},
        {TRANSPORT_SHM, 2, 64 * MB, PHASE_PREFILL, WIRE_F32, ALGORITHM_ONE_SHOT, WIRE_F32, 0},
        {TRANSPORT_SHM, 8, 32 * KB, PHASE_DECODE, WIRE_BF16, ALGORITHM_ONE_SHOT, WIRE_BF16, 0},
        {TRANSPORT_SHM, 9, 32 * KB, PHASE_DECODE, WIRE_BF16, ALGORITHM_TWO_SHOT, WIRE_BF16, 0},
        {TRANSPORT_SHM, 3, 33 * KB, PHASE_PREFILL, WIRE_BF16, ALGORITHM_TWO_SHOT, WIRE_BF16, 0},
        {TRANSPORT_TCP, 2, 16 * KB, PHASE_DECODE, WIRE_BF16, ALGORITHM_TWO_SHOT, WIRE_BF16, 0},
        {TRANSPORT_SHM, 64, 64 * MB, PHASE_PREFILL, WIRE_S8X, ALGORITHM_TWO_SHOT, WIRE_S8X, 0},
        {TRANSPORT_TCP, 4, 1, PHASE_PREFILL, WIRE_BF16, ALGORITHM_TWO_SHOT, WIRE_BF16, 0},
        {TRANSPORT_MPI, 3, 0, PHASE_DECODE, WIRE_F32, ALGORITHM_TWO_SHOT, WIRE_F32, 0},
        // one token of a hidden size of 8192
        {TRANSPORT_HOST, 2, 16 * KB, PHASE_DECODE, WIRE_BF16, ALGORITHM_ONE_SHOT, WIRE_BF16, 0},
        {TRANSPORT_HOST, 4, 16 * KB, PHASE_DECODE, WIRE_S8X, ALGORITHM_ONE_SHOT, WIRE_BF16, 0},
        {TRANSPORT_P2P, 4, 16 * KB, PHASE_DECODE, WIRE_FP8, ALGORITHM_ONE_SHOT, WIRE_BF16, 0},
        {TRANSPORT_P2P, 8, 16 * KB, PHASE_DECODE, WIRE_S8X, ALGORITHM_TWO_SHOT, WIRE_BF16, 0},
        {TRANSPORT_NCCL, 2, 16 * KB, PHASE_DECODE, WIRE_S8X, ALGORITHM_TWO_SHOT, WIRE_BF16, 0},
        // the bounds of one-shot
        {TRANSPORT_HOST, 2, 256 * KB, PHASE_DECODE, WIRE_BF16, ALGORITHM_ONE_SHOT, WIRE_BF16, 0},
        {TRANSPORT_HOST, 2, 256 * KB + 1, PHASE_DECODE, WIRE_BF16, ALGORITHM_CHUNKS, WIRE_BF16, 256 * KB},
        {TRANSPORT_HOST, 4, 32 * KB, PHASE_DECODE, WIRE_BF16, ALGORITHM_ONE_SHOT, WIRE_BF16, 0},
        {TRANSPORT_HOST, 4, 32 * KB + 1, PHASE_DECODE, WIRE_BF16, ALGORITHM_TWO_SHOT, WIRE_BF16, 0},
        {TRANSPORT_P2P, 2, 1 * MB, PHASE_DECODE, WIRE_BF16, ALGORITHM_ONE_SHOT, WIRE_BF16, 0},
        {TRANSPORT_P2P, 2, 1 * MB + 1, PHASE_DECODE, WIRE_BF16, ALGORITHM_CHUNKS, WIRE_BF16, 1 * MB},
        {TRANSPORT_P2P, 3, 32 * KB, PHASE_DECODE, WIRE_F32, ALGORITHM_ONE_SHOT, WIRE_F32, 0},
        {TRANSPORT_P2P, 3, 32 * KB + 1, PHASE_DECODE, WIRE_F32, ALGORITHM_TWO_SHOT, WIRE_F32, 0},
        {TRANSPORT_P2P, 5, 8 * KB, PHASE_PREFILL, WIRE_BF16, ALGORITHM_ONE_SHOT, WIRE_BF16, 0},
        {TRANSPORT_P2P, 5, 8 * KB + 1, PHASE_PREFILL, WIRE_BF16, ALGORITHM_TWO_SHOT, WIRE_BF16, 0},
        // what compresses is never of one shot
        {TRANSPORT_HOST, 2, 1, PHASE_PREFILL, WIRE_S8X, ALGORITHM_TWO_SHOT, WIRE_S8X, 0},
        {TRANSPORT_P2P, 4, 16 * KB, PHASE_PREFILL, WIRE_FP8, ALGORITHM_TWO_SHOT, WIRE_FP8, 0},
        // one kernel, then chunks
        {TRANSPORT_HOST, 4, 256 * KB, PHASE_PREFILL, WIRE_S8X, ALGORITHM_TWO_SHOT, WIRE_S8X, 0},
        {TRANSPORT_HOST, 4, 256 * KB + 1, PHASE_PREFILL, WIRE_S8X, ALGORITHM_CHUNKS, WIRE_S8X, 256 * KB},
        {TRANSPORT_HOST, 4, 1 * MB, PHASE_PREFILL, WIRE_S8X, ALGORITHM_CHUNKS, WIRE_S8X, 512 * KB},
        {TRANSPORT_P2P, 4, 1 * MB, PHASE_PREFILL, WIRE_S8X, ALGORITHM_TWO_SHOT, WIRE_S8X, 0},
        {TRANSPORT_P2P, 4, 1 * MB + 1, PHASE_PREFILL, WIRE_S8X, ALGORITHM_CHUNKS, WIRE_S8X, 1 * MB},
        {TRANSPORT_P2P, 2, 4 * MB + 1, PHASE_PREFILL, WIRE_BF16, ALGORITHM_CHUNKS, WIRE_BF16, 2 * MB},
        {TRANSPORT_HOST, 2, 4 * MB, PHASE_DECODE, WIRE_S8X, ALGORITHM_CHUNKS, WIRE_BF16, 1 * MB},
        {TRANSPORT_HOST, 64, UINT64_MAX, PHASE_PREFILL, WIRE_S8X, ALGORITHM_CHUNKS, WIRE_S8X, 2 * MB},
        {TRANSPORT_NCCL, 4, 32 * MB, PHASE_PREFILL, WIRE_S8X, ALGORITHM_TWO_SHOT, WIRE_S8X, 0},
        {TRANSPORT_NCCL, 4, 32 * MB, PHASE_PREFILL, WIRE_BF16, ALGORITHM_TWO_SHOT, WIRE_BF16, 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct exchange_choice got =
            comm_select(cases[i].transport, cases[i].tp_size, cases[i].bytes, cases[i].phase, cases[i].wanted);
        if (got.algorithm != cases[i].algorithm || got.wire != cases[i].wire || got.chunk_bytes != cases[i].chunk_bytes)
            fail_msg("case %zu (%s, tp %d, %llu bytes): %s in %s, chunks of %llu; wanted %s in %s, %llu", i,
                     transport_name(cases[i].transport), cases[i].tp_size, (unsigned long long)cases[i].bytes,
                     exchange_algorithm_name(got.algorithm), wire_name(got.wire), (unsigned long long)got.chunk_bytes,
                     exchange_algorithm_name(cases[i].algorithm), wire_name(cases[i].wire),
                     (unsigned long long)cases[i].chunk_bytes);
    }
}

// Sizes on both sides of every power of two.
enum { SIZES = 3 * 40 };
static uint64_t size_at(int i) { return (1ull << i / 3) + (uint64_t)(i % 3) - 1; }

// Of all transports, numbers of ranks, phases and codecs, by what is larger or later.
static void for_all(void (*check)(enum transport transport, int tp_size, enum phase phase, enum wire wire))
{
    for (int transport = 0; transport < TRANSPORT_COUNT; transport++)
        for (int tp_size = 1; tp_size <= COMM_MAX_RANKS; tp_size++)
            for (int phase = PHASE_PREFILL; phase <= PHASE_DECODE; phase++)
                for (int wire = 0; wire < WIRE_COUNT; wire++)
                    check((enum transport)transport, tp_size, (enum phase)phase, (enum wire)wire);
}

static void check_monotone(enum transport transport, int tp_size, enum phase phase, enum wire wire)
{
    struct exchange_choice last = comm_select(transport, tp_size, 0, phase, wire);
    for (int i = 0; i < SIZES; i++) {
        struct exchange_choice now = comm_select(transport, tp_size, size_at(i), phase, wire);
        if (now.algorithm < last.algorithm || now.chunk_bytes < last.chunk_bytes)
            fail_msg("%s, tp %d, %s: a message of %llu bytes goes back to %s", transport_name(transport), tp_size,
                     wire_name(wire), (unsigned long long)size_at(i), exchange_algorithm_name(now.algorithm));
        // Law 9: the size changes no bit.
        assert_int_equal(now.wire, comm_select_wire(phase, wire));
        assert_int_equal(now.chunk_bytes > 0, now.algorithm == ALGORITHM_CHUNKS);
        assert_int_equal(now.chunk_bytes % (2 * WIRE_GROUP), 0);
        last = now;
    }
    // One token at a time loses nothing beyond bf16; a wanted codec of prompts is kept.
    assert_false(phase == PHASE_DECODE && wire_is_compressed(last.wire));
    if (phase == PHASE_PREFILL || !wire_is_compressed(wire))
        assert_int_equal(last.wire, wire);
}

static void test_monotone_in_size(void **state)
{
    (void)state;
    for_all(check_monotone);
}

// ---- which transport ---------------------------------------------------------------------------------------------------

static void test_transport(void **state)
{
    (void)state;
    static const struct {
        const char *wanted, *there; // names of those that are there
        int rc;
        enum transport transport;
    } cases[] = {
        {"auto", "shm", 0, TRANSPORT_SHM},
        {"auto", "tcp mpi", 0, TRANSPORT_TCP},
        {"auto", "mpi", 0, TRANSPORT_MPI},
        {"auto", "shm host nccl", 0, TRANSPORT_HOST},
        {"auto", "shm nccl", 0, TRANSPORT_NCCL},
        {"auto", "shm host nccl p2p", 0, TRANSPORT_P2P},
        {"auto", "", ERR_USAGE, TRANSPORT_COUNT},
        {"shm", "shm host nccl p2p", 0, TRANSPORT_SHM},
        {"p2p", "shm", ERR_USAGE, TRANSPORT_COUNT},
        {"tcp", "tcp", 0, TRANSPORT_TCP},
        {"infiniband", "shm", ERR_USAGE, TRANSPORT_COUNT},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *missing[TRANSPORT_COUNT];
        enum transport got = TRANSPORT_COUNT;
        struct error err = {0};
        for (int t = 0; t < TRANSPORT_COUNT; t++)
            missing[t] = strstr(cases[i].there, transport_name((enum transport)t)) ? NULL : "it is elsewhere";
        int rc = comm_select_transport(&got, cases[i].wanted, missing, &err);
        if (rc != cases[i].rc || got != cases[i].transport)
            fail_msg("case %zu: %d, %s: %s", i, rc, transport_name(got), err.msg);
        if (strcmp(cases[i].wanted, "p2p") == 0)
            assert_string_equal(err.msg, "--transport p2p: it is elsewhere");
    }
}

// ---- halves --------------------------------------------------------------------------------------------------------

static void test_halves(void **state)
{
    (void)state;
    static const struct {
        enum transport transport;
        bool local, expands, overlaps;
        uint64_t least_bytes;
    } cases[] = {
        {TRANSPORT_SHM, true, false, false, 0},        {TRANSPORT_TCP, false, false, true, 0},
        {TRANSPORT_MPI, false, true, true, 0},         {TRANSPORT_HOST, true, false, true, 8 << 20},
        {TRANSPORT_HOST, true, true, false, 8 << 20},  {TRANSPORT_P2P, true, false, true, 8 << 20},
        {TRANSPORT_NCCL, false, false, true, 8 << 20}, {TRANSPORT_NCCL, false, true, false, 8 << 20},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        uint64_t least_bytes = 1;
        assert_int_equal(comm_select_overlaps(cases[i].transport, cases[i].local, cases[i].expands, &least_bytes),
                         cases[i].overlaps);
        assert_int_equal(least_bytes, cases[i].least_bytes);
    }
}

// ---- the same on every rank ----------------------------------------------------------------------------------------

static uint64_t digest;

static void add_to_digest(enum transport transport, int tp_size, enum phase phase, enum wire wire)
{
    for (int i = 0; i < SIZES; i++) {
        struct exchange_choice choice = comm_select(transport, tp_size, size_at(i), phase, wire);
        digest = digest * 6364136223846793005ull +
                 (choice.chunk_bytes * 16 + (uint64_t)choice.algorithm * 4 + (uint64_t)choice.wire + 1);
    }
    struct comm_select_options options = {transport, tp_size, wire, phase == PHASE_DECODE};
    digest = digest * 6364136223846793005ull + comm_select_hash(&options);
}

static void test_same_in_processes(void **state)
{
    (void)state;
    enum { PROCESSES = 3 };
    uint64_t *digests =
        mmap(NULL, PROCESSES * sizeof *digests, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    assert_true(digests != MAP_FAILED);
    for (int i = 0; i < PROCESSES; i++) {
        pid_t pid = fork();
        if (pid == 0) {
            setenv("LC_ALL", i ? "C" : "de_DE.UTF-8", 1); // nothing around it counts
            digest = 1;
            for_all(add_to_digest);
            digests[i] = digest;
            _exit(0);
        }
        assert_true(pid > 0);
        assert_int_equal(waitpid(pid, NULL, 0), pid);
    }
    for (int i = 0; i < PROCESSES; i++) {
        assert_true(digests[i] != 0);
        assert_true(digests[i] == digests[0]);
    }
    munmap(digests, PROCESSES * sizeof *digests);
}

static void test_hash_of_options(void **state)
{
    (void)state;
    static const struct comm_select_options options[] = {
        {TRANSPORT_SHM, 2, WIRE_BF16, false}, {TRANSPORT_HOST, 2, WIRE_BF16, false},
        {TRANSPORT_SHM, 4, WIRE_BF16, false}, {TRANSPORT_SHM, 2, WIRE_S8X, false},
        {TRANSPORT_SHM, 2, WIRE_S8X, true},
    };
    enum { COUNT = sizeof options / sizeof *options };
    for (int i = 0; i < COUNT; i++)
        for (int j = 0; j < COUNT; j++)
            assert_int_equal(comm_select_hash(&options[i]) == comm_select_hash(&options[j]), i == j);
}

// ---- the comparison at the start -----------------------------------------------------------------------------------

struct rank_of_table {
    struct comm_region *region;
    int rank, code;
    uint64_t hash;
    struct error err;
};

static void *compare_tables(void *arg)
{
    struct rank_of_table *rank = arg;
    struct comm *comm;
    rank->code = comm_open(&comm, rank->region, rank->rank, 20000, &rank->err);
    if (rank->code)
        return NULL;
    comm_at(comm, OP_HANDSHAKE, -1);
    rank->code = comm_select_agree(comm, rank->hash, &rank->err);
    comm_close(comm);
    return NULL;
}

// Ranks 0 to 2; the last one may have another table.
static void run_comparison(struct rank_of_table ranks[3], uint64_t others, uint64_t last)
{
    size_t bytes = comm_region_bytes(3, 1, 1, 0);
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    assert_true(memory != MAP_FAILED);
    struct comm_region *region = comm_region_init(memory, 3, 1, 1, 0);
    pthread_t threads[3];
    for (int i = 0; i < 3; i++) {
        ranks[i] = (struct rank_of_table){.region = region, .rank = i, .hash = i == 2 ? last : others};
        assert_int_equal(pthread_create(&threads[i], NULL, compare_tables, &ranks[i]), 0);
    }
    for (int i = 0; i < 3; i++)
        pthread_join(threads[i], NULL);
    munmap(memory, bytes);
}

static void test_tables_that_differ(void **state)
{
    (void)state;
    struct comm_select_options options = {TRANSPORT_SHM, 3, WIRE_S8X, true};
    struct rank_of_table ranks[3];
    char first[17], last[17];
    uint64_t hash = comm_select_hash(&options), other;
    run_comparison(ranks, hash, hash);
    for (int i = 0; i < 3; i++)
        assert_int_equal(ranks[i].code, 0);
    options.transport = TRANSPORT_TCP;
    other = comm_select_hash(&options);
    run_comparison(ranks, hash, other);
    snprintf(first, sizeof first, "%016llx", (unsigned long long)hash);
    snprintf(last, sizeof last, "%016llx", (unsigned long long)other);
    for (int i = 0; i < 3; i++) {
        assert_int_equal(ranks[i].code, ERR_CORRUPT);
        assert_non_null(strstr(ranks[i].err.msg, "table of exchanges"));
        assert_non_null(strstr(ranks[i].err.msg, "rank 2"));
        assert_non_null(strstr(ranks[i].err.msg, first));
        assert_non_null(strstr(ranks[i].err.msg, last));
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rows),
        cmocka_unit_test(test_monotone_in_size),
        cmocka_unit_test(test_transport),
        cmocka_unit_test(test_same_in_processes),
        cmocka_unit_test(test_halves),
        cmocka_unit_test(test_hash_of_options),
        cmocka_unit_test(test_tables_that_differ),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
