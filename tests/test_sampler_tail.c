// The unlikely tokens of a draw. The sampler leaves out those whose noise could never lift them to the top; each draw
// must still be argmax of logit / temperature + g(seed, step, token) over all kept tokens, however far down it lies.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "engine/comm.h"
#include "engine/sampler.h"
#include "tests/noise_help.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { VOCAB = 50000 };

// ---- draws by one rank --------------------------------------------------------------------------------------------

struct rank {
    void *memory;
    struct comm *comm;
    struct sampler *sampler;
};

static struct rank open_rank(void)
{
    struct rank rank;
    struct error err;
    uint64_t bytes = (comm_region_bytes(1, 1, 4096, 0) + 4095) / 4096 * 4096;
    rank.memory = aligned_alloc(4096, bytes);
    assert_non_null(rank.memory);
    memset(rank.memory, 0, bytes);
    assert_int_equal(comm_open(&rank.comm, comm_region_init(rank.memory, 1, 1, 4096, 0), 0, 5000, &err), 0);
    assert_int_equal(sampler_create(&rank.sampler, 1, 0, VOCAB, &err), 0);
    return rank;
}

static void close_rank(struct rank *rank)
{
    sampler_free(rank->sampler);
    comm_close(rank->comm);
    free(rank->memory);
}

static uint32_t draw(struct rank *rank, const float *logits, const struct sampling *how, uint64_t step)
{
    static float x[VOCAB];
    struct step_choice choice = {.token = UINT32_MAX};
    const struct sampler_row row = {.logits = x, .how = how, .step = step, .num_logprobs = -1, .out = &choice};
    struct error err;
    memcpy(x, logits, sizeof x);
    if (sampler_choose(rank->sampler, rank->comm, &row, 1, &err))
        fail_msg("%s", err.msg);
    return choice.token;
}

// ---- tests --------------------------------------------------------------------------------------------------------

// A head of a few likely tokens and tens of thousands below: one draw in four comes from the tail.
static void test_all_tokens_compete(void **state)
{
    (void)state;
    enum { DRAWS = 300 };
    static float logits[VOCAB];
    struct rank rank = open_rank();
    int from_tail = 0, deep = 0;
    for (int i = 0; i < VOCAB; i++)
        logits[i] = i % 10000 == 77 ? 3 : (float)(-5.3 - (i * 7919LL % VOCAB) * (8.0 / VOCAB)); // 8.3 to 16.3 below
    for (uint64_t step = 0; step < DRAWS; step++) {
        const struct sampling how = {.temperature = 1, .top_p = 1, .repetition_penalty = 1, .seed = 11};
        double best = -INFINITY;
        uint32_t want = 0;
        for (uint32_t i = 0; i < VOCAB; i++) {
            double score = (double)logits[i] + noise(how.seed, step, i);
            if (score > best) {
                best = score;
                want = i;
            }
        }
        assert_int_equal(draw(&rank, logits, &how, step), want);
        from_tail += logits[want] < 0;
        deep += logits[want] < -7;
    }
    close_rank(&rank);
    assert_true(from_tail > DRAWS / 10 && from_tail < DRAWS / 2 && deep > 3);
}

// A token far below the maximum wins when its noise is large enough, to the last that 53 bits give, and just fails to
// when it is not.
static void test_deep_winners(void **state)
{
    (void)state;
    static const double depths[] = {0.5, 3, 9, 16, 25, 33, 36, 37.5};
    static float logits[VOCAB];
    struct rank rank = open_rank();
    for (size_t d = 0; d < sizeof depths / sizeof *depths; d++) {
        const uint32_t likely = 31, unlikely = VOCAB - 3;
        struct sampling how = {.temperature = 0.5, .top_p = 1, .repetition_penalty = 1};
        for (int i = 0; i < VOCAB; i++)
            logits[i] = -100;
        logits[likely] = 4;
        logits[unlikely] = (float)(4 - depths[d] * how.temperature);
        int wins = 0, losses = 0;
        for (uint64_t step = 0; (wins < 3 || losses < 3) && step < 1 << 16; step++) {
            uint64_t bits = ~(uint64_t)0 - 2048 - (step & 2047); // the largest noise that is finite
            how.seed = seed_for(bits, step, unlikely);
            double gap = noise(how.seed, step, unlikely) - depths[d] - noise(how.seed, step, likely);
            if (fabs(gap) < 1e-4 || (gap > 0 ? wins : losses) >= 3) // rounding may decide, or enough of these
                continue;
            assert_int_equal(draw(&rank, logits, &how, step), gap > 0 ? unlikely : likely);
            (*(gap > 0 ? &wins : &losses))++;
        }
        assert_int_equal(wins, 3);
        if (depths[d] >= 36)
            assert_int_equal(losses, 3);
    }
    close_rank(&rank);
}

// Random bits that are all ones, one draw of 2^53: the largest noise, and a number like others.
static void test_largest_noise(void **state)
{
    (void)state;
    static const struct {
        double depth, most; // the noise of the likely one decides: above this it wins
    } cases[] = {{36.2, 36.7368005696771 - 36.2}, {40, 36.7368005696771 - 40}};
    static float logits[VOCAB];
    struct rank rank = open_rank();
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        const uint32_t likely = 31, unlikely = VOCAB - 3;
        struct sampling how = {.temperature = 1, .top_p = 1, .repetition_penalty = 1};
        int wins = 0;
        for (int i = 0; i < VOCAB; i++)
            logits[i] = -100;
        logits[likely] = 0;
        logits[unlikely] = (float)-cases[c].depth;
        for (uint64_t step = 0; step < 40; step++) {
            how.seed = seed_for(~(uint64_t)0 - (step & 2047), step, unlikely);
            double against = noise(how.seed, step, likely);
            if (fabs(against - cases[c].most) < 1e-4)
                continue; // rounding may decide
            bool wins_now = against < cases[c].most;
            assert_int_equal(draw(&rank, logits, &how, step), wins_now ? unlikely : likely);
            wins += wins_now;
        }
        assert_true(c == 0 ? wins > 5 && wins < 35 : wins == 0);
    }
    close_rank(&rank);
}

// What top-k leaves out stays out, whatever its noise.
static void test_cut_tokens_never_win(void **state)
{
    (void)state;
    static float logits[VOCAB];
    struct rank rank = open_rank();
    for (int i = 0; i < VOCAB; i++)
        logits[i] = (float)-i / VOCAB;
    for (uint64_t step = 0; step < 20; step++) {
        struct sampling how = {.temperature = 1, .top_p = 1, .top_k = 10, .repetition_penalty = 1};
        how.seed = seed_for(~(uint64_t)0 - 4096, step, 10); // the first one that is cut
        assert_true(draw(&rank, logits, &how, step) < 10);
        how.seed = seed_for(~(uint64_t)0 - 4096, step, 9); // the last one that is kept
        assert_int_equal(draw(&rank, logits, &how, step), 9);
    }
    close_rank(&rank);
}

static void test_way_back(void **state)
{
    (void)state;
    for (uint64_t i = 0; i < 1000; i++)
        assert_true(unmix(mix(i * 0x123456789abcdefu)) == i * 0x123456789abcdefu);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_way_back),
        cmocka_unit_test(test_all_tokens_compete),
        cmocka_unit_test(test_deep_winners),
        cmocka_unit_test(test_largest_noise),
        cmocka_unit_test(test_cut_tokens_never_win),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
