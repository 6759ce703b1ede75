// Staggered steps of several stages: who takes turns and when, that prompts, shortage of pages, cancellations and failures find nothing under way, or
// what they need of it back. That tokens stay those of a sequence alone, whatever the mix, is test_scheduler_random.c's.
#include "tests/scheduler_watch.h"

enum { STAGES = 3, STREAMS = 8, PROMPT = 5, OUTPUT = 40 };

static struct scheduler_options options_of_stages(void)
{
    struct scheduler_options options = fake_options;
    options.balance_rows = 2;
    options.stages = STAGES;
    options.staggered_rows = 32;
    options.max_sequences = STREAMS + 1;
    return options;
}

static struct watched streams[STREAMS + 1];

// Streams that have computed their prompts and wait for the next turn.
static void begin(struct fake_model *model, const struct scheduler_options *options, int64_t count)
{
    fake_model_open(model, options);
    for (int64_t i = 0; i < count; i++) {
        make(&streams[i], (uint64_t)i + 1, PROMPT, OUTPUT);
        add(model, &streams[i], 1);
    }
    step(model);
    assert_int_equal(model->staggered_steps, 0);
}

static void check_output(const struct fake_model *model, const struct watched *w)
{
    static struct fake_output alone;
    fake_model_output(&model->options, &w->spec, &alone);
    assert_int_equal(w->ends, 1);
    assert_int_equal(w->produced, alone.count);
    assert_memory_equal(w->output, alone.tokens, (size_t)alone.count * sizeof *alone.tokens);
}

static void test_turns(void **state)
{
    (void)state;
    const struct scheduler_options options = options_of_stages();
    struct fake_model model;
    begin(&model, &options, STREAMS);
    for (int turn = 0; turn < 3 * STAGES; turn++) {
        int64_t before[STREAMS];
        for (int i = 0; i < STREAMS; i++)
            before[i] = streams[i].produced;
        step(&model);
        assert_true(model.area.step->staggered);
        assert_int_equal(model.area.step->num_segments, turn % STAGES < 2 ? 3 : 2); // 8 of them in 3 turns
        for (int i = 0; i < STREAMS; i++) // a token is there when the last stage has computed it
            assert_int_equal(streams[i].produced - before[i], turn >= STAGES - 1 && i / 3 == (turn + 1) % STAGES);
    }
    // A prompt finds nothing under way, and is computed beside all others.
    make(&streams[STREAMS], 77, PROMPT, OUTPUT);
    add(&model, &streams[STREAMS], 1);
    for (int turn = 0; turn < STAGES - 1; turn++) {
        step(&model);
        assert_true(model.area.step->staggered && model.area.step->num_segments == 0);
    }
    int64_t steps = stats_of(&model).steps;
    step(&model);
    assert_false(model.area.step->staggered);
    assert_int_equal(model.area.step->num_segments, STREAMS + 1);
    assert_int_equal(stats_of(&model).steps, steps + 1);
    run_out(&model);
    for (int i = 0; i <= STREAMS; i++)
        check_output(&model, &streams[i]);
    fake_model_close(&model);
}

// When turns are not worth it, or one's rows do not fit between stages.
static void test_no_turns(void **state)
{
    (void)state;
    for (int i = 0; i < 4; i++) {
        struct scheduler_options options = options_of_stages();
        struct fake_model model;
        options.stages = i == 0 ? 1 : STAGES;
        options.balance_rows = i == 1 ? 5 : i == 2 ? 0 : 2;
        options.staggered_rows = i == 3 ? 2 : 32;
        begin(&model, &options, STREAMS);
        run_out(&model);
        assert_int_equal(model.staggered_steps, 0);
        for (int w = 0; w < STREAMS; w++)
            check_output(&model, &streams[w]);
        fake_model_close(&model);
    }
}

static void test_cancel(void **state)
{
    (void)state;
    const struct scheduler_options options = options_of_stages();
    struct fake_model model;
    begin(&model, &options, STREAMS);
    step(&model);
    int64_t produced = streams[1].produced;
    cancel(&streams[1]); // under way
    cancel(&streams[6]); // not
    assert_int_equal(streams[1].ends, 0);
    assert_int_equal(streams[6].ends, 1);
    step(&model);
    assert_int_equal(streams[1].ends, 0);
    step(&model);
    assert_int_equal(streams[1].ends, 1);
    assert_int_equal(streams[1].reason, FINISH_CANCELLED);
    assert_int_equal(streams[1].produced, produced);
    run_out(&model);
    check_output(&model, &streams[0]);
    check_output(&model, &streams[7]);
    fake_model_close(&model);
}

static void test_failure(void **state)
{
    (void)state;
    const struct scheduler_options options = options_of_stages();
    struct fake_model model;
    struct error err;
    begin(&model, &options, STREAMS);
    step(&model);
    model.fails_at = model.steps + 1;
    assert_int_equal(fake_model_step(&model, &err), ERR_RANK);
    for (int i = 0; i < STREAMS; i++)
        assert_true(streams[i].ends == 1 && streams[i].reason == FINISH_ERROR);
    assert_false(scheduler_has_work(model.scheduler));
    // With other ranks it goes on.
    memset(model.turns, 0, STAGES * sizeof *model.turns);
    make(&streams[0], 3, PROMPT, OUTPUT);
    add(&model, &streams[0], 1);
    run_out(&model);
    check_output(&model, &streams[0]);
    fake_model_close(&model);
}

// A page is wanted that only a sequence under way could give: it is waited for, and then gives it.
static void test_shortage(void **state)
{
    (void)state;
    struct scheduler_options options = options_of_stages();
    struct fake_model model;
    options.num_pages = 2 * 2 * STAGES; // two for each that is let in, which want three
    fake_model_open(&model, &options);
    for (int i = 0; i < STREAMS; i++) {
        make(&streams[i], (uint64_t)i + 1, PROMPT, 2 * KV_PAGE_TOKENS);
        add(&model, &streams[i], 1);
    }
    run_out(&model);
    for (int i = 0; i < STREAMS; i++)
        check_output(&model, &streams[i]);
    assert_true(model.staggered_steps > 0 && stats_of(&model).preemptions > 0);
    fake_model_close(&model);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_turns),   cmocka_unit_test(test_no_turns), cmocka_unit_test(test_cancel),
        cmocka_unit_test(test_failure), cmocka_unit_test(test_shortage),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
