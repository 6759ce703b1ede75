// The scheduler: whose turn it is, drafts, and a long run of all that may happen.
#include "tests/scheduler_watch.h"

// ---- Whose turn it is ----------------------------------------------------------------------------------------------

// A tenant with many requests does not push back one with few; within a tenant the order is kept.
static void test_is_fair(void **state)
{
    (void)state;
    struct fake_model model;
    static struct watched greedy[60], modest[6];
    struct scheduler_options options = fake_options;
    options.max_sequences = 4;
    fake_model_open(&model, &options);
    for (int i = 0; i < 60; i++) {
        make(&greedy[i], (uint64_t)i, 50, 40);
        greedy[i].spec.tenant = 1;
        add(&model, &greedy[i], 1);
    }
    ends_seen = 0;
    for (int i = 0; i < 200; i++) // the other tenant earns nothing by being away
        step(&model);
    int64_t before = ends_seen;
    for (int i = 0; i < 6; i++) {
        make(&modest[i], (uint64_t)(100 + i), 50, 40);
        modest[i].spec.tenant = 2;
        add(&model, &modest[i], 1);
    }
    run_out(&model);
    int64_t others = modest[5].end_order - before - 5; // of the greedy one, while the six were served
    assert_in_range(others, 6, 10);
    for (int i = 1; i < 60; i++)
        assert_true(greedy[i].end_order > greedy[i - 1].end_order);
    for (int i = 1; i < 6; i++)
        assert_true(modest[i].end_order > modest[i - 1].end_order);
    fake_model_close(&model);
}

// What counts are tokens, not requests.
static void test_long_prompts_count(void **state)
{
    (void)state;
    struct fake_model model;
    static struct watched longer[20], shorter[20];
    struct scheduler_options options = fake_options;
    options.max_sequences = 1;
    fake_model_open(&model, &options);
    for (int i = 0; i < 20; i++) {
        make(&longer[i], (uint64_t)i, 400, 1);
        longer[i].spec.tenant = 1;
        add(&model, &longer[i], 1);
        make(&shorter[i], (uint64_t)(100 + i), 40, 1);
        shorter[i].spec.tenant = 2;
        add(&model, &shorter[i], 1);
    }
    ends_seen = 0;
    run_out(&model);
    assert_in_range(shorter[19].end_order - 19, 1, 3); // of the longer ones before
    fake_model_close(&model);
}

// Streams that run get a token in every step, whatever prompts arrive; in every second one where a chunk needs a step for itself. And the
// prompts get through as well.
static void test_nobody_starves(void **state)
{
    (void)state;
    const struct {
        bool fixed;
        int64_t max_rows, decode_rows, draft_tokens, balance_rows, silence, most_rows;
    } cases[] = {
        {false, 160, 32, 0, 0, 1, 160}, {false, 16, 16, 8, 0, 1, 16},       {true, 160, 32, 8, 0, 1, 160},
        {true, 128, 32, 8, 0, 2, 128},  {false, 160, 32, 8, 5, 1, 40 + 32},
    };
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        struct fake_model model;
        static struct watched streams[4], prompts[12];
        struct scheduler_options options = fake_options;
        options.max_rows = cases[c].max_rows;
        options.decode_rows = cases[c].decode_rows;
        options.draft_tokens = cases[c].draft_tokens;
        options.balance_rows = cases[c].balance_rows;
        options.chunks_fixed = cases[c].fixed;
        fake_model_open(&model, &options);
        for (int i = 0; i < 4; i++) {
            make(&streams[i], (uint64_t)i, 10, 400);
            add(&model, &streams[i], 1);
        }
        step(&model);
        for (int i = 0; i < 12; i++) {
            make(&prompts[i], (uint64_t)(10 + i), 450, 3);
            add(&model, &prompts[i], 1);
        }
        int64_t last_prompt = 0;
        while (scheduler_has_work(model.scheduler)) {
            step(&model);
            if (prompts[11].ends == 0)
                last_prompt = model.steps;
            assert_true(model.last_rows <= cases[c].most_rows);
        }
        for (int i = 0; i < 4; i++)
            assert_in_range(streams[i].longest_silence, 1, cases[c].silence);
        assert_true(last_prompt < 12 * 450 / (cases[c].most_rows / 4));
        fake_model_close(&model);
    }
}

// ---- Drafts --------------------------------------------------------------------------------------------------------

static void test_drafts(void **state)
{
    (void)state;
    struct fake_model model;
    static struct watched w[3];
    struct scheduler_options options = fake_options;
    options.draft_tokens = 8;
    fake_model_open(&model, &options);
    make(&w[0], 2, 60, 400); // repeats itself
    make(&w[1], 2, 60, 400); // must not
    w[1].spec.sampling.frequency_penalty = 0.5;
    make(&w[2], 2, 60, 400);
    w[2].spec.sampling.temperature = 1; // what is drawn repeats itself too
    for (int i = 0; i < 3; i++)
        add(&model, &w[i], 1);
    run_out(&model);
    for (int i = 0; i < 3; i++)
        assert_int_equal(w[i].produced, 400);
    assert_true(w[0].usage.accepted_tokens > 80 && w[2].usage.accepted_tokens > 80);
    assert_true(w[0].usage.drafted_tokens < 3 * w[0].usage.accepted_tokens);
    assert_int_equal(w[1].usage.drafted_tokens, 0);
    struct scheduler_stats stats = stats_of(&model);
    assert_int_equal(stats.accepted_tokens, w[0].usage.accepted_tokens + w[2].usage.accepted_tokens);
    fake_model_close(&model);
}

// ---- A long run ----------------------------------------------------------------------------------------------------

static void test_soak(void **state)
{
    (void)state;
    enum { LIVES = 24, STEPS = 10000 };
    static struct watched w[LIVES];
    static struct fake_output alone;
    struct fake_model model;
    struct scheduler_options options = fake_options;
    options.num_pages = 14;
    options.draft_tokens = 6;
    fake_model_open(&model, &options);
    uint64_t added = 0;
    int64_t checked = 0;
    for (int64_t i = 0; i < STEPS; i++) {
        struct watched *slot = &w[i % LIVES];
        if (!slot->handle) {
            if (slot->ends > 0 && slot->reason != FINISH_CANCELLED) {
                fake_model_output(&options, &slot->spec, &alone);
                assert_int_equal(slot->produced, alone.count);
                assert_memory_equal(slot->output, alone.tokens, (size_t)alone.count * sizeof *alone.tokens);
                checked++;
            }
            make(slot, added / 3, 20 + (int64_t)(added * 37 % 200), 10 + (int64_t)(added * 53 % 290));
            slot->spec.tenant = added % 700; // more than are remembered
            added++;
            add(&model, slot, 1);
        } else if (i % 97 == 0) {
            cancel(slot);
        }
        step(&model);
    }
    struct scheduler_stats stats = stats_of(&model);
    print_message("%llu sequences, %lld compared, %lld preemptions, %lld tokens from the cache\n",
                  (unsigned long long)added, (long long)checked, (long long)stats.preemptions,
                  (long long)stats.cached_tokens);
    assert_true(added > 300 && checked > 200 && stats.preemptions > 20 && stats.cached_tokens > 5000);
    fake_model_close(&model);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_is_fair),        cmocka_unit_test(test_long_prompts_count),
        cmocka_unit_test(test_nobody_starves), cmocka_unit_test(test_drafts),
        cmocka_unit_test(test_soak),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
