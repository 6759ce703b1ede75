// What the scheduler refuses: options that cannot work, prompts that never fit, settings out of their ranges.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/scheduler_help.h"

#include <math.h>

static void on_end(void *arg, enum finish_reason reason, const struct sequence_usage *usage, uint32_t stop_token,
                   const struct error *err)
{
    (void)reason, (void)usage, (void)stop_token, (void)err;
    ++*(int *)arg;
}

static void test_refuses(void **state)
{
    (void)state;
    static const uint32_t bad_prompt[] = {3, 50}, many[600];
    static struct logit_edit not_a_number = {3, NAN}, infinite = {3, INFINITY}, no_token = {50, 1}, edits[520];
    const struct {
        const char *name;
        struct sequence_spec change; // what is not zero counts
        double temperature, repetition;
        int rc;
    } cases[] = {
        {"fits exactly", {.prompt_count = 256}, 0, 1, 0},
        {"longer than the cache", {.prompt_count = 257}, 0, 1, ERR_MEMORY},
        {"longer than the context", {.prompt_count = 513}, 0, 1, ERR_USAGE},
        {"empty prompt", {.prompt_count = -1}, 0, 1, ERR_USAGE},
        {"no output", {.max_tokens = -1}, 0, 1, ERR_USAGE},
        {"no such token", {.prompt = bad_prompt, .prompt_count = 2}, 0, 1, ERR_USAGE},
        {"temperature NaN", {0}, NAN, 1, ERR_USAGE},
        {"temperature below 0", {0}, -1, 1, ERR_USAGE},
        {"repetition penalty 0", {0}, 0, 0, ERR_USAGE},
        {"logprobs", {.num_logprobs = STEP_MAX_LOGPROBS + 1}, 0, 1, ERR_USAGE},
        {"bias NaN", {.edits = &not_a_number, .num_edits = 1}, 0, 1, ERR_USAGE},
        {"bias infinite", {.edits = &infinite, .num_edits = 1}, 0, 1, ERR_USAGE},
        {"bias of no token", {.edits = &no_token, .num_edits = 1}, 0, 1, ERR_USAGE},
        {"512 biases", {.edits = edits, .num_edits = 512}, 0, 1, 0},
        {"513 biases", {.edits = edits, .num_edits = 513}, 0, 1, ERR_USAGE},
        {"512 biases and ends",
         {.edits = edits, .num_edits = 512, .min_tokens = 1, .stop_ids = many, .num_stop_ids = 1},
         0,
         1,
         ERR_USAGE},
    };
    struct scheduler_options options = fake_options;
    options.num_pages = 4;
    struct fake_model model;
    fake_model_open(&model, &options);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const struct sequence_spec *change = &cases[i].change;
        struct error err;
        struct sequence *handle;
        int ends = 0;
        struct sequence_spec spec = {.sampling = {.top_p = 1}, .arg = &ends, .on_end = on_end};
        spec.prompt = change->prompt ? change->prompt : many;
        spec.prompt_count = change->prompt_count ? change->prompt_count : 10;
        spec.max_tokens = change->max_tokens ? change->max_tokens : 3;
        spec.num_logprobs = change->num_logprobs;
        spec.edits = change->edits;
        spec.num_edits = change->num_edits;
        spec.min_tokens = change->min_tokens;
        spec.stop_ids = change->stop_ids;
        spec.num_stop_ids = change->num_stop_ids;
        spec.sampling.temperature = cases[i].temperature;
        spec.sampling.repetition_penalty = cases[i].repetition;
        int rc = scheduler_add(model.scheduler, &spec, 1, &handle, &err);
        if (rc != cases[i].rc)
            fail_msg("%s: %d", cases[i].name, rc);
        if (rc == 0)
            scheduler_cancel(model.scheduler, handle);
        assert_int_equal(ends, rc == 0);
        assert_false(scheduler_has_work(model.scheduler));
    }
    // All of a request or nothing.
    int ends = 0;
    struct sequence *handles[2];
    struct sequence_spec specs[2] = {{.prompt = many,
                                      .prompt_count = 10,
                                      .max_tokens = 3,
                                      .sampling = {.top_p = 1, .repetition_penalty = 1},
                                      .arg = &ends,
                                      .on_end = on_end}};
    specs[1] = specs[0];
    specs[1].max_tokens = 0;
    assert_int_equal(scheduler_add(model.scheduler, specs, 2, handles, NULL), ERR_USAGE);
    assert_false(scheduler_has_work(model.scheduler));
    fake_model_close(&model);
    assert_int_equal(ends, 0);
}

static void test_refuses_options(void **state)
{
    (void)state;
    const struct {
        int64_t max_sequences, max_rows, decode_rows, prefill_chunk;
        bool fixed;
        int rc;
    } cases[] = {
        {8, 32, 8, 64, false, 0},          {8, 32, 8, 64, true, ERR_USAGE},   {8, 64, 8, 64, true, 0},
        {8, 32, 7, 8, false, ERR_USAGE},   {8, 31, 32, 8, false, ERR_USAGE},  {65, 160, 80, 8, false, ERR_USAGE},
        {0, 160, 32, 8, false, ERR_USAGE}, {8, 160, 32, 0, false, ERR_USAGE},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct fake_model model;
        struct scheduler_options options = fake_options;
        fake_model_open(&model, &fake_options);
        options.max_sequences = cases[i].max_sequences;
        options.max_rows = cases[i].max_rows;
        options.decode_rows = cases[i].decode_rows;
        options.prefill_chunk = cases[i].prefill_chunk;
        options.chunks_fixed = cases[i].fixed;
        struct scheduler *scheduler = NULL;
        assert_int_equal(scheduler_create(&scheduler, &options, &model.area, &model.runner, NULL), cases[i].rc);
        scheduler_free(scheduler);
        fake_model_close(&model);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_refuses),
        cmocka_unit_test(test_refuses_options),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
