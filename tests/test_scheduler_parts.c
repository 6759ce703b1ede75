// Pages of the KV cache: found by their tokens, taken again in the right order; the queue of tenants; drafts by lookup.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "engine/draft.h"
#include "engine/fair_queue.h"
#include "engine/page_cache.h"
#include "tests/random_help.h"

#include <stdlib.h>
#include <string.h>

// ---- Pages ---------------------------------------------------------------------------------------------------------

enum { PAGES = 6 };

static struct page_cache *make(void)
{
    struct page_cache *cache = NULL;
    struct error err;
    assert_int_equal(page_cache_create(&cache, PAGES, 99, &err), 0);
    return cache;
}

static void fill(uint32_t tokens[KV_PAGE_TOKENS], uint32_t first)
{
    for (uint32_t i = 0; i < KV_PAGE_TOKENS; i++)
        tokens[i] = first * 1000 + i;
}

// Takes and publishes a page.
static int32_t put(struct page_cache *cache, int32_t parent, uint64_t salt, uint32_t first)
{
    uint32_t tokens[KV_PAGE_TOKENS];
    fill(tokens, first);
    int32_t page = page_cache_take(cache);
    assert_int_not_equal(page, NO_PAGE);
    return page_cache_publish(cache, page, parent, salt, tokens);
}

static int32_t find(struct page_cache *cache, int32_t parent, uint64_t salt, uint32_t first)
{
    uint32_t tokens[KV_PAGE_TOKENS];
    fill(tokens, first);
    return page_cache_find(cache, parent, salt, tokens);
}

static void test_finds_equal_prefixes_only(void **state)
{
    (void)state;
    struct page_cache *cache = make();
    int32_t a = put(cache, NO_PAGE, 1, 10), b = put(cache, a, 1, 11), c = put(cache, NO_PAGE, 1, 11);
    const struct {
        int32_t parent;
        uint64_t salt;
        uint32_t first;
        int32_t page;
    } cases[] = {
        {NO_PAGE, 1, 10, a},       {a, 1, 11, b},       {NO_PAGE, 1, 11, c},
        {NO_PAGE, 2, 10, NO_PAGE}, {a, 2, 11, NO_PAGE}, {NO_PAGE, 1 + (1ull << 32), 10, NO_PAGE},
        {c, 1, 11, NO_PAGE},       {a, 1, 10, NO_PAGE}, {NO_PAGE, 1, 12, NO_PAGE},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        int32_t page = find(cache, cases[i].parent, cases[i].salt, cases[i].first);
        assert_int_equal(page, cases[i].page);
        if (page != NO_PAGE)
            page_cache_release(cache, page);
    }
    // Any other token is another page.
    uint32_t tokens[KV_PAGE_TOKENS];
    for (int i = 0; i < KV_PAGE_TOKENS; i++) {
        fill(tokens, 10);
        tokens[i] ^= 1u << i % 32;
        assert_int_equal(page_cache_find(cache, NO_PAGE, 1, tokens), NO_PAGE);
    }
    // An equal page is known already: the second one is given back.
    assert_int_equal(page_cache_available(cache), PAGES - 3);
    assert_int_equal(put(cache, a, 1, 11), b);
    assert_int_equal(page_cache_users(cache, b), 2);
    assert_int_equal(page_cache_available(cache), PAGES - 3);
    page_cache_free(cache);
    page_cache_free(NULL);
}

// Among so many pages and questions some have the same hash; they are told apart by what they are.
static void test_equal_hashes_are_not_enough(void **state)
{
    (void)state;
    enum { MANY = 8192, QUESTIONS = 1 << 21 };
    struct page_cache *cache = NULL;
    uint32_t tokens[KV_PAGE_TOKENS];
    fill(tokens, 1);
    for (int which = 0; which < 3; which++) {
        assert_int_equal(page_cache_create(&cache, MANY, 5, NULL), 0);
        for (int32_t i = 0; i < MANY + QUESTIONS; i++) {
            uint64_t bits = random_bits() << 1 | (i < MANY); // never what was published
            int32_t parent = which == 0 ? (int32_t)(bits & INT32_MAX) : NO_PAGE;
            uint64_t salt = which == 1 ? bits : 0;
            tokens[40] = which == 2 ? (uint32_t)bits : 0;
            tokens[50] = which == 2 ? (uint32_t)(bits >> 32) : 0;
            if (i < MANY)
                page_cache_publish(cache, page_cache_take(cache), parent, salt, tokens);
            else if (page_cache_find(cache, parent, salt, tokens) != NO_PAGE)
                fail_msg("a page is taken for another");
        }
        page_cache_free(cache);
    }
}

static void test_takes_the_oldest_leaf(void **state)
{
    (void)state;
    struct page_cache *cache = make();
    // Two texts of three and two pages; the page left over has never held anything.
    int32_t a = put(cache, NO_PAGE, 1, 1), b = put(cache, a, 1, 2), c = put(cache, b, 1, 3);
    int32_t x = put(cache, NO_PAGE, 1, 4), y = put(cache, x, 1, 5);
    const int32_t ends[] = {c, b, a, y, x};
    for (size_t i = 0; i < 5; i++)
        page_cache_release(cache, ends[i]);
    assert_true(page_cache_available(cache) == PAGES && page_cache_kept(cache) == 5);
    // Somebody uses the first two pages of the first text again.
    assert_int_equal(find(cache, NO_PAGE, 1, 1), a);
    assert_int_equal(find(cache, a, 1, 2), b);
    page_cache_release(cache, b);
    page_cache_release(cache, a);
    page_cache_take(cache); // the empty one
    const int32_t order[] = {c, y, x, b, a, NO_PAGE};
    for (size_t i = 0; i < 6; i++)
        assert_int_equal(page_cache_take(cache), order[i]);
    assert_int_equal(find(cache, NO_PAGE, 1, 1), NO_PAGE); // taken pages are forgotten
    assert_int_equal(page_cache_available(cache), 0);
    for (int32_t page = 0; page < PAGES; page++)
        page_cache_release(cache, page);
    assert_true(page_cache_available(cache) == PAGES && page_cache_kept(cache) == 0);
    page_cache_free(cache);
}

static void test_clear_forgets(void **state)
{
    (void)state;
    struct page_cache *cache = make();
    page_cache_release(cache, put(cache, NO_PAGE, 1, 1));
    page_cache_clear(cache);
    assert_int_equal(find(cache, NO_PAGE, 1, 1), NO_PAGE);
    assert_true(page_cache_available(cache) == PAGES && page_cache_kept(cache) == 0);
    for (int i = 0; i < PAGES; i++)
        assert_int_not_equal(page_cache_take(cache), NO_PAGE);
    assert_int_equal(page_cache_take(cache), NO_PAGE);
    page_cache_free(cache);
}

// ---- Tenants -------------------------------------------------------------------------------------------------------

static void push(struct fair_queue *queue, struct fair_item *item, uint64_t tenant, bool in_front)
{
    assert_int_equal(fair_queue_join(queue, item, tenant, NULL), 0);
    fair_queue_push(queue, item, in_front);
}

static struct fair_item *pop(struct fair_queue *queue)
{
    struct fair_item *item = fair_queue_first(queue);
    if (item)
        fair_queue_remove(queue, item);
    return item;
}

static void test_turns(void **state)
{
    (void)state;
    struct fair_queue *queue = NULL;
    struct fair_item a[4], b[4], c;
    assert_int_equal(fair_queue_create(&queue, NULL), 0);
    assert_null(fair_queue_first(queue));
    for (int i = 0; i < 3; i++)
        push(queue, &a[i], 1, false);
    for (int i = 0; i < 3; i++)
        push(queue, &b[i], 2, false);
    push(queue, &a[3], 1, true);
    assert_int_equal(fair_queue_count(queue), 7);
    assert_ptr_equal(pop(queue), &b[0]); // the front one came last of all
    fair_queue_charge(&b[0], 100);
    assert_ptr_equal(pop(queue), &a[3]);
    fair_queue_charge(&a[3], 250);
    assert_ptr_equal(pop(queue), &b[1]);
    fair_queue_charge(&b[1], 100);
    push(queue, &c, 3, false); // new: as if it had been served as little as the least served
    assert_ptr_equal(pop(queue), &b[2]);
    fair_queue_charge(&b[2], 10);
    assert_ptr_equal(pop(queue), &c);
    fair_queue_charge(&c, 1000);
    fair_queue_remove(queue, &a[1]); // from the middle
    assert_ptr_equal(pop(queue), &a[0]);
    assert_ptr_equal(pop(queue), &a[2]);
    assert_null(pop(queue));
    // All leave; who comes first now begins where the last one left, and another cannot be far behind.
    struct fair_item *all[] = {&a[0], &a[1], &a[2], &a[3], &b[0], &b[1], &b[2], &c};
    for (size_t i = 0; i < 8; i++)
        fair_queue_leave(queue, all[i]);
    push(queue, &b[0], 2, false);
    push(queue, &b[1], 2, false);
    push(queue, &c, 3, false);
    assert_ptr_equal(pop(queue), &b[0]);
    fair_queue_charge(&b[0], 1);
    assert_ptr_equal(pop(queue), &c);
    assert_ptr_equal(pop(queue), &b[1]);
    fair_queue_free(queue);
    fair_queue_free(NULL);
}

// However many tenants come, few are remembered; and who is here is never forgotten.
static void test_many_tenants(void **state)
{
    (void)state;
    struct fair_queue *queue = NULL;
    struct fair_item stays, item;
    assert_int_equal(fair_queue_create(&queue, NULL), 0);
    push(queue, &stays, 12345, false);
    fair_queue_charge(&stays, 7);
    for (uint64_t i = 0; i < 20000; i++) {
        push(queue, &item, i, false);
        fair_queue_charge(&item, 5);
        fair_queue_remove(queue, &item);
        fair_queue_leave(queue, &item);
    }
    assert_ptr_equal(pop(queue), &stays);
    fair_queue_leave(queue, &stays);
    fair_queue_free(queue);
}

// ---- Drafts --------------------------------------------------------------------------------------------------------

static void test_proposes(void **state)
{
    (void)state;
    const struct {
        const char *name;
        int64_t length, most, count;
        uint32_t tokens[16], draft[4];
    } cases[] = {
        {"nothing repeats", 6, 4, 0, {1, 2, 3, 4, 5, 6}, {0}},
        {"one token is not enough", 5, 4, 0, {1, 2, 3, 4, 2}, {0}},
        {"two tokens", 6, 4, 4, {1, 2, 3, 4, 1, 2}, {3, 4, 1, 2}},
        {"as many as asked for", 6, 2, 2, {1, 2, 3, 4, 1, 2}, {3, 4}},
        {"the latest of equal ones", 9, 1, 1, {1, 2, 3, 1, 2, 4, 5, 1, 2}, {4}},
        {"the longest, though earlier", 13, 1, 1, {8, 9, 1, 2, 3, 5, 1, 2, 4, 8, 9, 1, 2}, {3}},
        {"what repeats goes on", 5, 4, 4, {7, 7, 7, 7, 7}, {7, 7, 7, 7}},
        {"a period goes on", 6, 4, 4, {1, 2, 3, 1, 2, 3}, {1, 2, 3, 1}},
        {"too short", 2, 4, 0, {1, 1}, {0}},
    };
    struct draft *draft = calloc(1, sizeof *draft);
    assert_non_null(draft);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (int at_once = 0; at_once < 2; at_once++) {
            uint32_t tokens[32];
            draft_begin(draft, 8);
            // As it grows, or all at once.
            for (int64_t length = at_once ? cases[i].length : 1; length < cases[i].length; length++) {
                memcpy(tokens, cases[i].tokens, sizeof cases[i].tokens);
                draft_propose(draft, tokens, length, 4);
            }
            memcpy(tokens, cases[i].tokens, sizeof cases[i].tokens);
            int64_t count = draft_propose(draft, tokens, cases[i].length, cases[i].most);
            if (count != cases[i].count || memcmp(tokens + cases[i].length, cases[i].draft, (size_t)count * 4) != 0)
                fail_msg("%s", cases[i].name);
        }
    free(draft);
}

static void test_looks_back_so_far(void **state)
{
    (void)state;
    enum { LENGTH = DRAFT_WINDOW + 2000 };
    static uint32_t tokens[LENGTH + 8];
    struct draft *draft = calloc(1, sizeof *draft);
    assert_non_null(draft);
    const struct {
        int64_t at, count;
    } cases[] = {{100, 0}, {LENGTH - DRAFT_WINDOW - 3, 0}, {LENGTH - DRAFT_WINDOW + 3, 4}, {LENGTH - 10, 4}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        for (uint32_t k = 0; k < LENGTH; k++)
            tokens[k] = k;
        tokens[cases[i].at] = LENGTH - 2;
        tokens[cases[i].at + 1] = LENGTH - 1;
        draft_begin(draft, 8);
        assert_int_equal(draft_propose(draft, tokens, LENGTH, 4), cases[i].count);
        if (cases[i].count > 0)
            assert_int_equal(tokens[LENGTH], cases[i].at + 2);
    }
    free(draft);
}

// Where drafts are never right few rows are spent on them; where they are always right they grow to the longest.
static void test_learns(void **state)
{
    (void)state;
    const double worth = 0.1;
    struct draft *draft = calloc(1, sizeof *draft);
    assert_non_null(draft);
    draft_begin(draft, 8);
    int64_t rows = 0, late_rows = 0;
    for (int i = 0; i < 1000; i++) {
        int64_t limit = draft_limit(draft, worth);
        rows += limit;
        late_rows += i >= 500 ? limit : 0;
        if (limit > 0)
            draft_learn(draft, limit, 0);
    }
    assert_in_range(rows, 20, 80);
    assert_in_range(late_rows, 6, 10); // now and then one
    for (int i = 0; i < 200; i++) {
        int64_t limit = draft_limit(draft, worth);
        if (limit > 0)
            draft_learn(draft, limit, limit);
    }
    assert_int_equal(draft_limit(draft, worth), 8);
    draft_learn(draft, 8, 0);
    assert_int_equal(draft_limit(draft, 0.95), 0); // rows are dear
    draft_learn(draft, 8, 0);
    assert_in_range(draft_limit(draft, 0.5), 2, 4); // 0.8, 0.64, 0.51
    free(draft);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_finds_equal_prefixes_only),
        cmocka_unit_test(test_equal_hashes_are_not_enough),
        cmocka_unit_test(test_takes_the_oldest_leaf),
        cmocka_unit_test(test_clear_forgets),
        cmocka_unit_test(test_turns),
        cmocka_unit_test(test_many_tenants),
        cmocka_unit_test(test_proposes),
        cmocka_unit_test(test_looks_back_so_far),
        cmocka_unit_test(test_learns),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
