// What rank 0 sends of the step area to ranks of other processes: after each command the others have what it works on, whatever was there before; a message
// that is cut or changed never leaves their tables.
#include "engine/relay.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { CONTEXT = 300, SLOTS = 5, VOCAB = 1000, PAGES = 40, STEPS = 2000 };

struct side {
    struct step_area area;
    void *memory;
    struct relay *relay;
};

static struct side make_side(void)
{
    struct side side = {.area = {.context = CONTEXT, .max_sequences = SLOTS, .vocab_size = VOCAB, .num_pages = PAGES}};
    uint64_t bytes = step_area_bytes(&side.area);
    side.memory = aligned_alloc(64, bytes);
    memset(side.memory, 0, bytes);
    step_area_place(&side.area, side.memory);
    assert_int_equal(relay_create(&side.relay, NULL, &side.area, NULL), 0);
    return side;
}

static void free_side(struct side *side)
{
    relay_free(side->relay);
    free(side->memory);
}

static uint64_t state = 12345;

static int64_t below(int64_t n)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (int64_t)((state >> 33) % (uint64_t)n);
}

// Changes some of everything, then fills a step.
static void change(struct step_area *a)
{
    struct step *step = a->step;
    for (int64_t n = below(30); n > 0; n--)
        a->tokens[below(SLOTS * CONTEXT)] = (uint32_t)below(VOCAB);
    for (int64_t n = below(3); n > 0; n--) {
        a->pages[below(SLOTS * a->pages_per_sequence)] = (int32_t)below(PAGES);
        ++*a->pages_version;
    }
    for (int64_t n = below(4); n > 0; n--)
        a->masks[below(SLOTS * a->mask_words)] = (uint32_t)below(1 << 30);
    for (int64_t n = below(3); n > 0; n--) {
        struct step_slot *slot = &a->slots[below(SLOTS)];
        slot->prompt_count = 1 + below(CONTEXT);
        slot->masked = below(2);
        slot->sampling.seed = (uint64_t)below(1000);
        slot->num_edits = (int32_t)below(STEP_MAX_EDITS + 1);
        for (int32_t i = 0; i < slot->num_edits; i++)
            slot->edits[i] = (struct logit_edit){(uint32_t)below(VOCAB), (float)below(9)};
    }
    step->staggered = below(2);
    step->num_segments = 1 + below(3);
    step->num_choices = below(4);
    for (int64_t i = 0; i < step->num_segments; i++) {
        int64_t start = below(CONTEXT), count = 1 + below(CONTEXT - start);
        step->segments[i] = (struct step_segment){.sequence = (int32_t)below(SLOTS), .start = start, .count = count};
    }
}

static void check_same(const struct step_area *a, const struct step_area *b)
{
    assert_int_equal(b->step->staggered, a->step->staggered);
    assert_int_equal(b->step->num_segments, a->step->num_segments);
    assert_int_equal(b->step->num_choices, a->step->num_choices);
    assert_memory_equal(b->step->segments, a->step->segments,
                        (size_t)a->step->num_segments * sizeof a->step->segments[0]);
    for (int64_t i = 0; i < a->step->num_segments; i++) {
        const struct step_segment *s = &a->step->segments[i];
        const struct step_slot *slot = &a->slots[s->sequence], *other = &b->slots[s->sequence];
        int64_t tokens = s->start + s->count, pages = (tokens + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS;
        tokens = slot->prompt_count > tokens ? slot->prompt_count : tokens;
        assert_memory_equal(other, slot,
                            offsetof(struct step_slot, edits) + (size_t)slot->num_edits * sizeof slot->edits[0]);
        assert_memory_equal(b->tokens + s->sequence * CONTEXT, a->tokens + s->sequence * CONTEXT, (size_t)tokens * 4);
        assert_memory_equal(b->pages + s->sequence * b->pages_per_sequence,
                            a->pages + s->sequence * a->pages_per_sequence, (size_t)pages * 4);
        if (slot->masked)
            assert_memory_equal(b->masks + s->sequence * b->mask_words, a->masks + s->sequence * a->mask_words,
                                (size_t)a->mask_words * 4);
    }
}

static void test_steps(void **unused)
{
    (void)unused;
    struct side from = make_side(), to = make_side();
    struct relay_forward forward = {0}, got;
    for (int i = 0; i < STEPS; i++) {
        struct error err = {0};
        uint64_t bytes, version = *to.area.pages_version;
        int command = 0;
        change(&from.area);
        int32_t *before = malloc(SLOTS * (size_t)to.area.pages_per_sequence * 4);
        memcpy(before, to.area.pages, SLOTS * (size_t)to.area.pages_per_sequence * 4);
        bool is_forward = i % 7 == 0;
        if (is_forward)
            forward = (struct relay_forward){below(CONTEXT / 2), 1 + below(CONTEXT / 2), (int32_t)below(SLOTS), 1};
        const uint8_t *message = relay_encode(from.relay, 9, is_forward ? RELAY_FORWARD : RELAY_STEP, &forward, &bytes);
        assert_non_null(message);
        if (relay_decode(to.relay, message, bytes, &command, &got, &err))
            fail_msg("step %d: %s", i, err.msg);
        assert_int_equal(command, 9);
        if (is_forward) {
            assert_memory_equal(&got, &forward, sizeof got);
            assert_memory_equal(to.area.tokens + forward.sequence * CONTEXT,
                                from.area.tokens + forward.sequence * CONTEXT,
                                (size_t)(forward.start + forward.count) * 4);
        } else {
            check_same(&from.area, &to.area);
        }
        // A device looks at pages again when, and only when, their version has moved.
        bool moved = memcmp(before, to.area.pages, SLOTS * (size_t)to.area.pages_per_sequence * 4) != 0;
        assert_true(!moved || *to.area.pages_version > version);
        free(before);
    }
    free_side(&from);
    free_side(&to);
}

// What has not changed is not sent again.
static void test_sizes(void **unused)
{
    (void)unused;
    struct side from = make_side();
    uint64_t first, again, next;
    from.area.slots[1].prompt_count = 200;
    for (int i = 0; i < CONTEXT; i++)
        from.area.tokens[CONTEXT + i] = 7;
    from.area.step->num_segments = 1;
    from.area.step->segments[0] = (struct step_segment){.sequence = 1, .start = 0, .count = 200};
    assert_non_null(relay_encode(from.relay, 2, RELAY_STEP, NULL, &first));
    assert_non_null(relay_encode(from.relay, 2, RELAY_STEP, NULL, &again));
    from.area.step->segments[0] = (struct step_segment){.sequence = 1, .start = 200, .count = 1};
    assert_non_null(relay_encode(from.relay, 2, RELAY_STEP, NULL, &next));
    assert_true(first > 800 && again < first - 800);
    assert_int_equal(next, again + 4); // one token
    free_side(&from);
}

static void test_damage(void **unused)
{
    (void)unused;
    struct side from = make_side();
    struct relay_forward forward;
    int command;
    for (int i = 0; i < 300; i++) {
        struct side to = make_side();
        uint64_t bytes;
        change(&from.area);
        const uint8_t *message = relay_encode(from.relay, 2, RELAY_STEP, NULL, &bytes);
        assert_non_null(message);
        uint8_t *copy = malloc(bytes); // no byte behind it
        memcpy(copy, message, bytes);
        assert_true(relay_decode(to.relay, copy, bytes - 1, &command, &forward, NULL) != 0);
        for (int n = 0; n < 20; n++) {
            copy[below((int64_t)bytes)] ^= (uint8_t)(1 + below(255));
            relay_decode(to.relay, copy, bytes, &command, &forward, NULL); // sanitizers and the area's end watch
        }
        free(copy);
        free_side(&to);
    }
    free_side(&from);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_steps), cmocka_unit_test(test_sizes),
                                       cmocka_unit_test(test_damage)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
