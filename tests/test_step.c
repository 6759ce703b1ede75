// The step area and the check that stands between a damaged step and a rank.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "engine/step.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { CONTEXT = 200, SLOTS = 4, VOCAB = 1000, PAGES = 12, PROMPT = 70 };
static const struct step_limits limits = {.max_rows = 90, .decode_rows = 8, .prefill_rows = 80, .chunk = 16};

static struct step_area make_area(void)
{
    struct step_area area = {.context = CONTEXT, .max_sequences = SLOTS, .vocab_size = VOCAB, .num_pages = PAGES};
    uint64_t bytes = step_area_bytes(&area);
    assert_int_equal(area.pages_per_sequence, 4);
    assert_int_equal(area.mask_words, 32);
    void *memory = aligned_alloc(64, bytes);
    memset(memory, 0, bytes);
    step_area_place(&area, memory);
    // The views lie one behind the other, inside.
    assert_ptr_equal(area.step, memory);
    assert_true((uint8_t *)(area.slots + SLOTS) <= (uint8_t *)area.tokens);
    assert_true((uint8_t *)(area.tokens + SLOTS * CONTEXT) <= (uint8_t *)area.pages);
    assert_true((uint8_t *)(area.pages + SLOTS * area.pages_per_sequence) <= (uint8_t *)area.pages_version);
    assert_true((uint8_t *)(area.masks + SLOTS * area.mask_words) <= (uint8_t *)memory + bytes);
    return area;
}

// Slot 0: the end of a prompt and one choice; slot 1: a token and two drafts; slot 2: recomputed output.
static void fill(struct step_area *a)
{
    memset(a->step, 0, sizeof *a->step);
    for (int64_t s = 0; s < SLOTS; s++) {
        a->slots[s].sampling = (struct sampling){.top_p = 1, .repetition_penalty = 1};
        a->slots[s].prompt_count = PROMPT;
        a->slots[s].num_logprobs = -1;
        a->slots[s].num_edits = 0;
        for (int64_t i = 0; i < CONTEXT; i++)
            a->tokens[s * CONTEXT + i] = (uint32_t)(VOCAB - 1 - i);
        for (int64_t i = 0; i < a->pages_per_sequence; i++)
            a->pages[s * a->pages_per_sequence + i] = i < 2 ? (int32_t)(PAGES - 1 - s) : -1;
    }
    struct step_segment *s = a->step->segments;
    s[0] = (struct step_segment){0, PHASE_PREFILL, 16, PROMPT - 16, 1, 0, true};
    s[1] = (struct step_segment){1, PHASE_DECODE, PROMPT + 4, 3, 3, 5, false};
    s[2] = (struct step_segment){2, PHASE_DECODE, PROMPT, 5, 0, 0, false};
    a->step->num_segments = 3;
    a->step->num_choices = 4;
}

static struct step_area *area;
static struct step_segment *segment(int i) { return &area->step->segments[i]; }

static void no_segments(void) { area->step->num_segments = 0; }
static void many_segments(void) { area->step->num_segments = STEP_MAX_SEGMENTS + 1; }
static void negative_segments(void) { area->step->num_segments = -1; }
static void staggered_prompt(void) { area->step->staggered = true; }
static void negative_slot(void) { segment(1)->sequence = -1; }
static void slot_behind(void) { segment(1)->sequence = SLOTS; }
static void other_phase(void) { segment(1)->phase = (enum phase)7; }
static void negative_start(void) { segment(0)->start = -16; }
static void start_overflow(void) { segment(1)->start = INT64_MAX; }
static void no_rows(void) { segment(2)->count = 0; }
static void rows_behind_context(void) { segment(2)->start = CONTEXT - 4; }
static void count_overflow(void) { segment(2)->count = INT64_MAX; }
static void chunk_start(void) { segment(0)->start = 17, segment(0)->count = PROMPT - 17; }
static void long_chunk(void) { segment(0)->start = 0, segment(0)->count = 81, segment(0)->choices = 0; }
static void large_token(void) { area->tokens[PROMPT - 1] = VOCAB; }
static void no_page(void) { area->pages[area->pages_per_sequence + 1] = -1; }
static void page_behind(void) { area->pages[0] = PAGES; }
static void many_choices(void) { segment(2)->choices = 6; }
static void negative_choices(void) { segment(2)->choices = -1; }
static void wrong_sum(void) { area->step->num_choices = 5; }
static void gap(void) { segment(1)->first_step = 6; }
static void huge_step(void) { segment(1)->first_step = UINT64_MAX; }
static void no_prompt(void) { area->slots[0].prompt_count = 0; }
static void long_prompt(void) { area->slots[0].prompt_count = INT64_MAX; }
static void twice(void) { segment(2)->sequence = 1; }
static void prefill_behind(void)
{
    segment(0)->sequence = 2, *segment(3) = *segment(0), *segment(0) = *segment(2), *segment(2) = *segment(3);
}
static void decode_rows(void) { segment(2)->count = 6; }
static void nan_temperature(void) { area->slots[1].sampling.temperature = NAN; }
static void negative_temperature(void) { area->slots[1].sampling.temperature = -1; }
static void zero_repetition(void) { area->slots[1].sampling.repetition_penalty = 0; }
static void infinite_frequency(void) { area->slots[1].sampling.frequency_penalty = INFINITY; }
static void drafts_with_penalty(void) { area->slots[1].sampling.presence_penalty = 1; }
static void nan_top_p(void) { area->slots[1].sampling.top_p = NAN; }
static void logprobs(void) { area->slots[0].num_logprobs = STEP_MAX_LOGPROBS + 1; }
static void edits(void) { area->slots[0].num_edits = STEP_MAX_EDITS + 1; }
static void negative_edits(void) { area->slots[0].num_edits = -1; }
static void nan_edit(void) { area->slots[0].num_edits = 1, area->slots[0].edits[0] = (struct logit_edit){3, NAN}; }
static void infinite_edit(void)
{
    area->slots[0].num_edits = 1, area->slots[0].edits[0] = (struct logit_edit){3, INFINITY};
}

static void test_damage_is_refused(void **state)
{
    (void)state;
    static void (*const damages[])(void) = {
        no_segments,
        many_segments,
        negative_segments,
        staggered_prompt,
        negative_slot,
        slot_behind,
        other_phase,
        negative_start,
        start_overflow,
        no_rows,
        rows_behind_context,
        count_overflow,
        chunk_start,
        long_chunk,
        large_token,
        no_page,
        page_behind,
        many_choices,
        negative_choices,
        wrong_sum,
        gap,
        huge_step,
        no_prompt,
        long_prompt,
        twice,
        prefill_behind,
        decode_rows,
        nan_temperature,
        negative_temperature,
        zero_repetition,
        infinite_frequency,
        drafts_with_penalty,
        nan_top_p,
        logprobs,
        edits,
        negative_edits,
        nan_edit,
        infinite_edit,
    };
    struct step_area made = make_area();
    area = &made;
    for (size_t i = 0; i < sizeof damages / sizeof *damages; i++) {
        struct error err = {0};
        fill(area);
        assert_int_equal(step_check(area, area->step, &limits, &err), 0);
        damages[i]();
        if (step_check(area, area->step, &limits, &err) != ERR_OTHER || !err.msg[0])
            fail_msg("damage %zu was not refused", i);
    }
    free(made.step);
}

// A slot's prompt may end and its first output be computed again in one step.
static void test_both_phases(void **state)
{
    (void)state;
    struct step_area made = make_area();
    struct error err;
    area = &made;
    fill(area);
    segment(0)->choices = 0;
    segment(1)->sequence = 0;
    segment(1)->start = PROMPT;
    segment(1)->first_step = 1;
    segment(1)->begins_sequence = true;
    area->step->num_choices = 3;
    assert_int_equal(step_check(area, area->step, &limits, &err), 0);
    area->slots[0].num_edits = 1;
    area->slots[0].edits[0] = (struct logit_edit){3, -INFINITY};
    assert_int_equal(step_check(area, area->step, &limits, &err), 0);
    free(made.step);
}

// A staggered step may be empty, and others not.
static void test_staggered(void **state)
{
    (void)state;
    struct step_area made = make_area();
    struct error err;
    area = &made;
    fill(area);
    area->step->segments[0] = area->step->segments[1];
    area->step->num_segments = 1;
    area->step->num_choices = 3;
    area->step->staggered = true;
    assert_int_equal(step_check(area, area->step, &limits, &err), 0);
    area->step->num_segments = area->step->num_choices = 0;
    assert_int_equal(step_check(area, area->step, &limits, &err), 0);
    area->step->staggered = false;
    assert_int_equal(step_check(area, area->step, &limits, &err), ERR_OTHER);
    free(made.step);
}

// Logits are computed without a step around them.
static void test_forwards(void **state)
{
    (void)state;
    struct step_area made = make_area();
    struct error err;
    area = &made;
    static const struct {
        int32_t sequence;
        int64_t start, count;
    } bad[] = {
        {-1, 0, 1},          {SLOTS, 0, 1},     {0, -1, 2},        {0, 0, 0},       {0, 0, -1}, {0, CONTEXT, 1},
        {0, CONTEXT - 1, 2}, {0, INT64_MAX, 1}, {0, 1, INT64_MAX}, {0, PROMPT, 100}}; // the last one: pages that are not there
    fill(area);
    assert_int_equal(step_check_forward(area, 2, 0, PROMPT, &err), 0);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        if (step_check_forward(area, bad[i].sequence, bad[i].start, bad[i].count, &err) != ERR_OTHER)
            fail_msg("forward %zu was not refused", i);
    area->tokens[2 * CONTEXT + PROMPT - 1] = VOCAB;
    assert_int_equal(step_check_forward(area, 2, 0, PROMPT - 1, &err), 0);
    assert_int_equal(step_check_forward(area, 2, 0, PROMPT, &err), ERR_OTHER);
    free(made.step);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_damage_is_refused), cmocka_unit_test(test_both_phases),
                                       cmocka_unit_test(test_staggered), cmocka_unit_test(test_forwards)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
