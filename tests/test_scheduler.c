// The scheduler, one promise after the other: shared prefixes, pages that run out, cancelling, failures. Whose turn it is and long runs:
// test_scheduler_turns.c; that company changes nothing: test_scheduler_random.c.
#include "tests/scheduler_watch.h"

// ---- Shared prefixes -----------------------------------------------------------------------------------------------

static void test_shares_prefixes(void **state)
{
    (void)state;
    // A first sequence has a prompt and output; what does the second one, whose prompt is as much of that text, find?
    const struct {
        const char *name;
        bool shares, fixed;
        int64_t chunk, first_prompt, first_output, second_prompt;
        uint64_t salt;
        int64_t cached;
    } cases[] = {
        {"same prompt", true, false, 128, 200, 1, 200, 0, 192},
        {"last token is computed", true, false, 128, 192, 1, 192, 0, 128},
        {"one more", true, false, 128, 192, 1, 193, 0, 192},
        {"less than a page", true, false, 128, 63, 1, 63, 0, 0},
        {"other salt", true, false, 128, 200, 1, 200, 1, 0},
        {"not asked for", false, false, 128, 200, 1, 200, 0, 0},
        {"output is shared", true, false, 128, 100, 150, 250, 0, 192},
        {"fixed: whole chunks", true, true, 128, 300, 1, 300, 0, 256},
        {"fixed: the last chunk again", true, true, 128, 256, 1, 256, 0, 128},
        {"fixed: the next chunk", true, true, 128, 256, 1, 257, 0, 256},
        {"fixed: a shorter chunk is another", true, true, 128, 200, 1, 300, 0, 128},
        {"fixed: output is computed otherwise", true, true, 64, 100, 150, 250, 0, 64},
        {"fixed: chunk and page must both end", true, true, 48, 400, 1, 400, 0, 384},
    };
    static struct watched first, second;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct fake_model model;
        struct scheduler_options options = fake_options;
        options.share_prefixes = cases[i].shares;
        options.chunks_fixed = cases[i].fixed;
        options.prefill_chunk = cases[i].chunk;
        fake_model_open(&model, &options);
        make(&first, 3, cases[i].first_prompt, cases[i].first_output);
        make(&second, 3, cases[i].second_prompt, 5);
        add(&model, &first, 1);
        run_out(&model);
        int64_t said = cases[i].second_prompt - cases[i].first_prompt;
        if (cases[i].first_output > 1)
            memcpy(second.prompt + cases[i].first_prompt, first.output, (size_t)said * sizeof *first.output);
        second.spec.salt = cases[i].salt;
        add(&model, &second, 1);
        run_out(&model);
        assert_int_equal(first.usage.cached_tokens, 0);
        if (second.usage.cached_tokens != cases[i].cached)
            fail_msg("%s: %lld", cases[i].name, (long long)second.usage.cached_tokens);
        assert_int_equal(stats_of(&model).cached_tokens, cases[i].cached);
        fake_model_close(&model);
    }
}

// Where another's prompt is this one's prompt and answer (a second turn), the pages behind the first prompt were computed as prompt there and as
// output here. Started again after a preemption, the first one leaves them alone.
static void test_output_is_not_anothers_prompt(void **state)
{
    (void)state;
    struct fake_model model;
    static struct watched first, second;
    static struct fake_output alone;
    for (int fixed = 0; fixed < 2; fixed++) {
        struct scheduler_options options = fake_options;
        options.num_pages = 8;
        options.chunks_fixed = fixed;
        options.phases_differ = !fixed;
        options.prefill_chunk = KV_PAGE_TOKENS;
        fake_model_open(&model, &options);
        make(&first, 3, 100, 200);
        fake_model_output(&options, &first.spec, &alone);
        make(&second, 3, 250, 200); // takes all pages in the end
        memcpy(second.prompt + 100, alone.tokens, 150 * sizeof *alone.tokens);
        add(&model, &second, 1);
        add(&model, &first, 1);
        run_out(&model);
        assert_true(first.usage.preemptions > 0);
        assert_int_equal(first.produced, alone.count);
        assert_memory_equal(first.output, alone.tokens, (size_t)alone.count * sizeof *alone.tokens);
        fake_model_close(&model);
    }
}

// Whether as one request or as several at the same time: a prompt is computed once.
static void test_computes_a_prompt_once(void **state)
{
    (void)state;
    for (int fixed = 0; fixed < 2; fixed++)
        for (int one_request = 0; one_request < 2; one_request++) {
            struct fake_model model;
            struct scheduler_options options = fake_options;
            static struct watched w[4];
            options.chunks_fixed = fixed;
            fake_model_open(&model, &options);
            for (int i = 0; i < 4; i++) {
                make(&w[i], 5, 300, 20);
                w[i].spec.sampling.temperature = 1;
                w[i].spec.sampling.seed = (uint64_t)i;
            }
            for (int i = 0; i < 4; i += one_request ? 4 : 1)
                add(&model, &w[i], one_request ? 4 : 1);
            run_out(&model);
            // 256 tokens are whole pages and chunks; the rest is computed by each.
            assert_int_equal(stats_of(&model).prefill_rows, 300 + 3 * 44);
            assert_true(w[0].usage.cached_tokens == 0 && w[3].usage.cached_tokens == 256);
            assert_int_equal(stats_of(&model).produced_tokens, 80);
            assert_memory_not_equal(w[0].output, w[1].output, 20 * sizeof *w[0].output);
            fake_model_close(&model);
        }
}

// What another salt hides is not waited for.
static void test_salts_do_not_wait(void **state)
{
    (void)state;
    for (uint64_t salt = 0; salt < 2; salt++) {
        struct fake_model model;
        static struct watched w[2];
        fake_model_open(&model, &fake_options);
        for (int i = 0; i < 2; i++) {
            make(&w[i], 5, 70, 5);
            w[i].spec.salt = (uint64_t)i * salt;
            add(&model, &w[i], 1);
        }
        step(&model);
        assert_true(w[0].produced == 1 && w[1].produced == (salt ? 1 : 0));
        step(&model);
        assert_true(w[1].usage.cached_tokens == 0 && w[1].produced == (salt ? 2 : 1));
        run_out(&model);
        assert_int_equal(w[1].usage.cached_tokens, salt ? 0 : 64);
        fake_model_close(&model);
    }
}

// A page that was begun while an older sequence was in the midst of the same one is left for the older one's.
static void test_leaves_a_page_that_was_begun(void **state)
{
    (void)state;
    struct fake_model model;
    static struct watched w[2];
    struct scheduler_options options = fake_options;
    options.prefill_chunk = 40;
    options.max_rows = 60;
    fake_model_open(&model, &options);
    for (int i = 0; i < 2; i++) {
        make(&w[i], 5, 400, 5);
        add(&model, &w[i], 1);
    }
    run_out(&model);
    assert_in_range(w[1].usage.cached_tokens, 4 * KV_PAGE_TOKENS, 6 * KV_PAGE_TOKENS - 20);
    fake_model_close(&model);
}

// The rest of a group does not queue up again.
static void test_group_keeps_its_turn(void **state)
{
    (void)state;
    struct fake_model model;
    static struct watched w[4];
    struct scheduler_options options = fake_options;
    options.max_sequences = 1;
    fake_model_open(&model, &options);
    for (int i = 0; i < 4; i++)
        make(&w[i], i < 3 ? 5 : 6, 100, 10);
    add(&model, w, 3);
    add(&model, &w[3], 1);
    ends_seen = 0;
    run_out(&model);
    for (int i = 0; i < 4; i++)
        assert_int_equal(w[i].end_order, i);
    fake_model_close(&model);
}

static void test_group_without_its_first(void **state)
{
    (void)state;
    for (int64_t steps = 0; steps < 4; steps++) {
        struct fake_model model;
        static struct watched w[4];
        fake_model_open(&model, &fake_options);
        for (int i = 0; i < 4; i++)
            make(&w[i], 5, 400, 20);
        add(&model, w, 4);
        for (int64_t i = 0; i < steps; i++)
            step(&model);
        cancel(&w[0]);
        cancel(&w[2]);
        assert_true(w[0].ends == 1 && w[2].ends == 1 && w[1].ends == 0);
        run_out(&model);
        assert_true(w[1].produced == 20 && w[3].produced == 20);
        assert_true(stats_of(&model).prefill_rows <= 400 + 16 + 16);
        fake_model_close(&model);
    }
}

// ---- Pages run out -------------------------------------------------------------------------------------------------

static void test_preempts_the_last(void **state)
{
    (void)state;
    struct fake_model model;
    static struct watched w[4];
    struct scheduler_options options = fake_options;
    options.num_pages = 8;
    fake_model_open(&model, &options);
    for (int i = 0; i < 4; i++) {
        make(&w[i], (uint64_t)i, 30, 5000); // each alone could fill all pages
        add(&model, &w[i], 1);
    }
    ends_seen = 0;
    run_out(&model);
    for (int i = 0; i < 4; i++) {
        assert_int_equal(w[i].produced, 8 * KV_PAGE_TOKENS + 1 - 30);
        assert_int_equal(w[i].reason, FINISH_LENGTH);
        assert_int_equal(w[i].end_order, i);
        assert_true((w[i].usage.preemptions > 0) == (i > 0));
    }
    assert_true(stats_of(&model).preemptions < 12); // no thrash
    fake_model_close(&model);
}

// A sequence whose prompt is still being computed, a little in each step, has room for all of it.
static void test_prompts_have_room(void **state)
{
    (void)state;
    struct fake_model model;
    static struct watched w[3];
    struct scheduler_options options = fake_options;
    options.num_pages = 13;
    options.prefill_chunk = 20;
    fake_model_open(&model, &options);
    for (int i = 0; i < 3; i++) {
        make(&w[i], (uint64_t)i, 300, 50); // 5 pages, 6 at the end
        add(&model, &w[i], 1);
    }
    run_out(&model);
    assert_int_equal(stats_of(&model).preemptions, 0);
    fake_model_close(&model);
}

// Pages that no output can reach are kept for nobody: as many sequences run together as there are pages for all of them.
static void test_ends_before_a_page(void **state)
{
    (void)state;
    enum { COUNT = 4 };
    struct fake_model model;
    static struct watched w[COUNT];
    struct scheduler_options options = fake_options;
    options.num_pages = COUNT;
    fake_model_open(&model, &options);
    for (int i = 0; i < COUNT; i++) {
        make(&w[i], (uint64_t)i, 16, KV_PAGE_TOKENS - 16 + 1); // the last token is not computed
        add(&model, &w[i], 1);
    }
    step(&model);
    assert_int_equal(stats_of(&model).running, COUNT);
    run_out(&model);
    assert_int_equal(stats_of(&model).preemptions, 0);
    fake_model_close(&model);
}

// Younger sequences have grown into the pages that an older one's prompt needs: they make place, though they were to be in this step.
static void test_a_prompt_preempts(void **state)
{
    (void)state;
    struct fake_model model;
    static struct watched w[3];
    static struct fake_output alone;
    struct scheduler_options options = fake_options;
    options.num_pages = 17; // all are taken when the prompt needs its sixth
    options.prefill_chunk = 1;
    fake_model_open(&model, &options);
    make(&w[0], 0, 450, 20);
    make(&w[1], 1, 10, 500);
    make(&w[2], 2, 10, 500);
    for (int i = 0; i < 3; i++)
        add(&model, &w[i], 1);
    run_out(&model);
    assert_true(w[0].usage.preemptions == 0 && w[1].usage.preemptions + w[2].usage.preemptions > 0);
    for (int i = 0; i < 3; i++) {
        fake_model_output(&options, &w[i].spec, &alone);
        assert_int_equal(w[i].produced, alone.count);
        assert_memory_equal(w[i].output, alone.tokens, (size_t)alone.count * sizeof *alone.tokens);
    }
    fake_model_close(&model);
}

// A draft is a guess; nobody gives pages back for it.
static void test_drafts_do_not_preempt(void **state)
{
    (void)state;
    int64_t preempted = 0;
    for (uint64_t family = 0; family < 60; family++) {
        struct fake_model model;
        static struct watched w[2];
        struct scheduler_options options = fake_options;
        options.num_pages = 3; // the younger one takes the third first
        options.draft_tokens = 12;
        fake_model_open(&model, &options);
        make(&w[0], family, 20, 100);
        make(&w[1], family, 35, 60);
        for (int i = 0; i < 2; i++)
            add(&model, &w[i], 1);
        while (scheduler_has_work(model.scheduler)) {
            int64_t known = 20 + w[0].produced;
            step(&model);
            if (stats_of(&model).preemptions > 0) {
                assert_true(known > KV_PAGE_TOKENS); // the older one has to compute a position of its second page
                preempted++;
                break;
            }
        }
        fake_model_close(&model);
    }
    assert_in_range(preempted, 10, 59);
}

// ---- Cancelling ----------------------------------------------------------------------------------------------------

static void test_cancels_in_every_phase(void **state)
{
    (void)state;
    // w[1] is cancelled after so many steps.
    for (int64_t steps = 0; steps < 40; steps++) {
        struct fake_model model;
        static struct watched w[3];
        struct scheduler_options options = fake_options;
        options.num_pages = 6;
        options.max_sequences = 2;
        options.prefill_chunk = 40;
        fake_model_open(&model, &options);
        for (int i = 0; i < 3; i++) {
            make(&w[i], (uint64_t)i, i == 1 ? 170 : 100, 150);
            add(&model, &w[i], 1);
        }
        for (int64_t i = 0; i < 3 * steps; i++)
            step(&model);
        if (w[1].handle) {
            cancel(&w[1]);
            assert_true(w[1].ends == 1 && w[1].reason == FINISH_CANCELLED && w[1].handle == NULL);
        }
        run_out(&model);
        assert_true(w[0].produced == 150 && w[2].produced == 150 && w[1].ends == 1);
        assert_int_equal(stats_of(&model).pages_used, 0);
        fake_model_close(&model);
    }
}

static void test_callbacks_cancel_and_add(void **state)
{
    (void)state;
    struct fake_model model;
    static struct watched w[6];
    fake_model_open(&model, &fake_options);
    for (int i = 0; i < 6; i++)
        make(&w[i], (uint64_t)i, 20, 10 + i);
    w[0].cancels_on_tokens = &w[2]; // whose turn comes later in the same step
    w[3].cancels_on_tokens = &w[1]; // whose turn was before
    w[1].cancels_on_end = &w[4];
    w[4].adds_on_end = &w[5];
    for (int i = 0; i < 5; i++)
        add(&model, &w[i], 1);
    step(&model);
    assert_true(w[2].ends == 1 && w[2].produced == 0);
    assert_true(w[1].ends == 1 && w[1].produced == 1);
    assert_true(w[4].ends == 1 && w[5].handle != NULL);
    run_out(&model);
    assert_true(w[0].produced == 10 && w[3].produced == 13 && w[5].produced == 15);
    fake_model_close(&model);
}

// ---- Failures ------------------------------------------------------------------------------------------------------

static void test_a_lost_rank_ends_all(void **state)
{
    (void)state;
    struct fake_model model;
    struct error err;
    static struct watched w[13];
    fake_model_open(&model, &fake_options);
    for (int i = 0; i < 12; i++) {
        make(&w[i], 5, 100, 50);
        add(&model, &w[i], 1);
    }
    make(&w[12], 5, 100, 50);
    w[3].adds_on_end = &w[12];
    model.fails_at = 7;
    int rc;
    while (!(rc = fake_model_step(&model, &err)))
        continue;
    assert_int_equal(rc, ERR_RANK);
    assert_string_equal(err.msg, "rank 1 was lost");
    for (int i = 0; i < 12; i++)
        assert_true(w[i].ends == 1 && w[i].reason == FINISH_ERROR && w[i].error_code == ERR_RANK);
    // The ranks begin anew, with other bytes in their pages.
    memset(model.entries, 0x5a, (size_t)(fake_options.num_pages * KV_PAGE_TOKENS) * sizeof *model.entries);
    run_out(&model);
    static struct fake_output alone;
    fake_model_output(&fake_options, &w[12].spec, &alone);
    assert_true(w[12].produced == 50 && w[12].usage.cached_tokens == 0);
    assert_memory_equal(w[12].output, alone.tokens, 50 * sizeof *alone.tokens);
    fake_model_close(&model);
}

static void test_free_ends_all(void **state)
{
    (void)state;
    struct fake_model model;
    static struct watched w[12];
    fake_model_open(&model, &fake_options);
    for (int i = 0; i < 12; i += 2) {
        make(&w[i], (uint64_t)i, 100, 50);
        make(&w[i + 1], (uint64_t)i, 100, 50);
        add(&model, &w[i], 2);
    }
    step(&model);
    step(&model);
    fake_model_close(&model);
    for (int i = 0; i < 12; i++)
        assert_true(w[i].ends == 1 && w[i].reason == FINISH_CANCELLED);
    scheduler_free(NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_shares_prefixes),
        cmocka_unit_test(test_output_is_not_anothers_prompt),
        cmocka_unit_test(test_computes_a_prompt_once),
        cmocka_unit_test(test_salts_do_not_wait),
        cmocka_unit_test(test_leaves_a_page_that_was_begun),
        cmocka_unit_test(test_group_keeps_its_turn),
        cmocka_unit_test(test_group_without_its_first),
        cmocka_unit_test(test_preempts_the_last),
        cmocka_unit_test(test_prompts_have_room),
        cmocka_unit_test(test_ends_before_a_page),
        cmocka_unit_test(test_a_prompt_preempts),
        cmocka_unit_test(test_drafts_do_not_preempt),
        cmocka_unit_test(test_cancels_in_every_phase),
        cmocka_unit_test(test_callbacks_cancel_and_add),
        cmocka_unit_test(test_a_lost_rank_ends_all),
        cmocka_unit_test(test_free_ends_all),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
