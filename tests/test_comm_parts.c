// Sums of parts that lie where all ranks read them: nobody reads a part that is not complete or is another block's, with one chain of sums and with
// two that take turns, with other collectives between; the sums have all_reduce's bits; who does not come, or comes for another sum, is named.
#include "engine/comm.h"
#include "tests/comm_help.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

enum { BLOCKS = 300, MOST_RANKS = 3, MOST_CHAINS = 2, COLS = 300, LEAST_SUMS = 8 };

// What the decoder does: in block n a chain computes its part in set n % 2, and what block n - 1's parts add up to, there before.
struct parts_case {
    int ranks, chains;
    float (*memory)[2][MOST_CHAINS][COLS]; // shared: [ranks]
};

static float value_of(int block, int chain, int rank, int col)
{
    return (float)((double)(int64_t)mix((uint64_t)(((block * 2 + chain) * 8 + rank) * 1024 + col)) * 0x1p-63);
}

static void linger(uint64_t dice)
{
    if (dice % 5 == 0)
        nanosleep(&(struct timespec){.tv_nsec = (long)(dice / 5 % 100000)}, NULL);
}

static int take_sum(struct comm *comm, const struct parts_case *c, int block, int chain, struct error *err)
{
    float sum[COLS], want[COLS];
    int rank = comm_rank(comm), rc;
    for (int r = 0; r < c->ranks; r++)
        for (int i = 0; i < COLS; i++)
            if (c->memory[r][block % 2][chain][i] != value_of(block, chain, r, i))
                return error_set(err, ERR_OTHER, "rank %d, block %d, chain %d: value %d of rank %d is not this block's",
                                 rank, block, chain, i, r);
    for (int at = 0; at < COLS; at += WIRE_GROUP) {
        const float *part[MOST_RANKS];
        for (int r = 0; r < c->ranks; r++)
            part[r] = c->memory[r][block % 2][chain] + at;
        wire_sum_group(sum + at, part, at / WIRE_GROUP % c->ranks, c->ranks,
                       COLS - at < WIRE_GROUP ? COLS - at : WIRE_GROUP, WIRE_BF16);
    }
    memcpy(c->memory[rank][(block + 1) % 2][chain], sum, sizeof sum);
    if (block % LEAST_SUMS)
        return 0;
    for (int i = 0; i < COLS; i++)
        want[i] = value_of(block, chain, rank, i);
    if ((rc = comm_all_reduce(comm, want, 1, COLS, COLS, WIRE_BF16, NULL, NULL, err)))
        return rc;
    for (int i = 0; i < COLS; i++)
        if (f32_bits(sum[i]) != f32_bits(want[i]))
            return error_set(err, ERR_OTHER, "block %d, value %d: not all_reduce's bits", block, i);
    return 0;
}

static int parts_body(struct comm *comm, void *arg, struct error *err)
{
    const struct parts_case *c = arg;
    uint32_t part[MOST_CHAINS];
    int rank = comm_rank(comm), rc;
    for (int n = 0; n <= BLOCKS; n++)
        for (int chain = 0; chain < c->chains; chain++) {
            comm_at(comm, OP_MLP, n);
            if (n > 0 &&
                ((rc = comm_wait_parts(comm, part[chain], err)) || (rc = take_sum(comm, c, n - 1, chain, err))))
                return rc;
            linger(mix((uint64_t)((n * 2 + chain) * 8 + rank)));
            for (int i = 0; i < COLS; i++)
                c->memory[rank][n % 2][chain][i] = value_of(n, chain, rank, i);
            if (n < BLOCKS && (rc = comm_post_part(comm, 1, COLS, WIRE_BF16, &part[chain], err)))
                return rc;
        }
    return 0;
}

static void test_parts(void **state)
{
    (void)state;
    for (int ranks = 2; ranks <= MOST_RANKS; ranks++)
        for (int chains = 1; chains <= MOST_CHAINS; chains++)
            for (int mode = THREADS; mode <= PROCESSES; mode++) {
                size_t bytes = (size_t)ranks * sizeof(float[2][MOST_CHAINS][COLS]);
                struct parts_case c = {ranks, chains, map_shared(bytes)};
                expect_success(run_ranks((enum mode)mode, ranks, 1000, 20000, parts_body, &c), ranks, mode_names[mode]);
                munmap(c.memory, bytes);
            }
}

static int lost_body(struct comm *comm, void *arg, struct error *err)
{
    uint32_t part;
    int rc;
    (void)arg;
    if (comm_rank(comm) == 1) {
        usleep(1500000);
        return comm_barrier(comm, err);
    }
    comm_at(comm, OP_ATTENTION, 5);
    if ((rc = comm_post_part(comm, 2, COLS, WIRE_BF16, &part, err)))
        return rc;
    comm_at(comm, OP_ATTENTION, 6); // another chain is further
    return comm_wait_parts(comm, part, err);
}

static int differ_body(struct comm *comm, void *arg, struct error *err)
{
    uint32_t part;
    (void)arg;
    comm_at(comm, OP_MLP, comm_rank(comm));
    int rc = comm_post_part(comm, 2, COLS, WIRE_BF16, &part, err);
    return rc ? rc : comm_wait_parts(comm, part, err);
}

static void test_errors(void **state)
{
    (void)state;
    for (int mode = THREADS; mode <= PROCESSES; mode++) {
        struct rank_result *results = run_ranks((enum mode)mode, 2, 1000, 300, lost_body, NULL);
        if (results[0].code != ERR_RANK)
            fail_msg("%d: %s", results[0].code, results[0].error.msg);
        assert_non_null(strstr(results[0].error.msg, "rank 1 did not reach all_reduce of layer 5 (attention)"));
        expect_error(run_ranks((enum mode)mode, 2, 1000, 2000, differ_body, NULL), 2, ERR_RANK,
                     (const char *const[]){"the same step", "all_reduce of layer 0 (mlp), 600 values in bf16",
                                           "all_reduce of layer 1 (mlp), 600 values in bf16", NULL});
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_parts), cmocka_unit_test(test_errors)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
