// Filters that take their time: the masks of one step are limited, nobody starves, and nothing changes what comes out.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/scheduler_help.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SEQUENCES = 8, TOKENS = 12, FILL_US = 3000 };

struct slow {
    struct fake_filter fake;
    struct token_filter filter; // fake's, slowed down
    uint32_t prompt[20], output[TOKENS + 1];
    int64_t produced;
    bool ended;
};
static int fills; // of the running step

static void slow_fill(void *state, uint32_t *mask, int64_t words)
{
    struct slow *slow = state;
    fills++;
    usleep(FILL_US);
    slow->fake.filter.fill(&slow->fake, mask, words);
}

static void slow_advance(void *state, uint32_t token)
{
    struct slow *slow = state;
    slow->fake.filter.advance(&slow->fake, token);
}

static bool on_tokens(void *arg, const struct step_choice *choices, int64_t count)
{
    struct slow *slow = arg;
    for (int64_t i = 0; i < count; i++)
        slow->output[slow->produced++] = choices[i].token;
    return true;
}

static void on_end(void *arg, enum finish_reason reason, const struct sequence_usage *usage, uint32_t stop_token,
                   const struct error *err)
{
    struct slow *slow = arg;
    (void)usage;
    (void)stop_token;
    (void)err;
    assert_int_equal(reason, FINISH_LENGTH);
    slow->ended = true;
}

static void test_slow_filters(void **state)
{
    (void)state;
    static const struct scheduler_options options = {.num_pages = 64,
                                                     .context = 512,
                                                     .max_sequences = SEQUENCES,
                                                     .max_rows = 160,
                                                     .decode_rows = 32,
                                                     .prefill_chunk = 128,
                                                     .hash_seed = 7};
    static struct slow sequences[SEQUENCES];
    static struct fake_output alone[SEQUENCES];
    struct fake_model model;
    struct sequence *handle;
    struct error err;
    fake_model_open(&model, &options);
    for (int i = 0; i < SEQUENCES; i++) {
        struct slow *slow = &sequences[i];
        for (int k = 0; k < 20; k++)
            slow->prompt[k] = (uint32_t)(5 + (7 * i + k) % 40);
        fake_filter_init(&slow->fake, (uint64_t)i + 1, 1000, 0, (uint32_t)fake_vocab_size);
        struct sequence_spec spec = {.prompt = slow->prompt,
                                     .prompt_count = 20,
                                     .max_tokens = TOKENS,
                                     .sampling = {.top_p = 1, .repetition_penalty = 1},
                                     .num_logprobs = -1,
                                     .arg = slow,
                                     .on_tokens = on_tokens,
                                     .on_end = on_end};
        if (i > 0) { // the first one has none
            spec.filter = &slow->fake.filter;
            fake_model_output(&options, &spec, &alone[i]);
            fake_filter_init(&slow->fake, (uint64_t)i + 1, 1000, 0, (uint32_t)fake_vocab_size);
            slow->filter = (struct token_filter){.state = slow, .fill = slow_fill, .advance = slow_advance};
            spec.filter = &slow->filter;
        } else {
            fake_model_output(&options, &spec, &alone[i]);
        }
        assert_int_equal(scheduler_add(model.scheduler, &spec, 1, &handle, &err), 0);
    }
    int64_t steps = 0, steps_of_first = 0;
    while (scheduler_has_work(model.scheduler)) {
        fills = 0;
        assert_int_equal(fake_model_step(&model, &err), 0);
        assert_in_range(fills, 0, 2); // the second ends beyond the limit of 5 ms
        assert_true(++steps < 1000);
        if (!steps_of_first && sequences[0].ended)
            steps_of_first = steps;
    }
    assert_in_range(steps_of_first, TOKENS, TOKENS + 1); // a token in every step, whatever the filters take
    for (int i = 0; i < SEQUENCES; i++) {
        assert_true(sequences[i].ended);
        assert_int_equal(sequences[i].produced, alone[i].count);
        assert_memory_equal(sequences[i].output, alone[i].tokens, TOKENS * sizeof(uint32_t));
    }
    fake_model_close(&model);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_slow_filters)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
