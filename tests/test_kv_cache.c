// The paged KV cache: pages come and go, values come back, a full cache says so.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "engine/kv_cache.h"
#include "formats/number_formats.h"

enum { LAYERS = 2, HEADS = 3, HEAD_DIM = 8, PAGES = 5, SEQUENCES = 3, MAX_TOKENS = 3 * KV_PAGE_TOKENS };

static struct kv_cache *make(void)
{
    struct kv_cache *cache = NULL;
    struct error err;
    assert_int_equal(kv_cache_create(&cache, LAYERS, HEADS, HEAD_DIM, PAGES, SEQUENCES, MAX_TOKENS, &err), 0);
    return cache;
}

static float value_of(int64_t layer, int sequence, int64_t position, int64_t head, int64_t i, int which)
{
    return (float)((layer * 7 + sequence * 31 + position * 3 + head * 11 + i + which * 5) % 251); // exact in bfloat16
}

static void store(struct kv_cache *cache, int64_t layer, int sequence, int64_t position)
{
    float k[HEADS * HEAD_DIM], v[HEADS * HEAD_DIM];
    for (int64_t h = 0; h < HEADS; h++)
        for (int64_t i = 0; i < HEAD_DIM; i++) {
            k[h * HEAD_DIM + i] = value_of(layer, sequence, position, h, i, 0);
            v[h * HEAD_DIM + i] = value_of(layer, sequence, position, h, i, 1);
        }
    kv_cache_store(cache, layer, sequence, position, k, v);
}

static void check(const struct kv_cache *cache, int64_t layer, int sequence, int64_t position)
{
    struct kv_view view = kv_cache_view(cache, layer, sequence);
    for (int64_t h = 0; h < HEADS; h++)
        for (int64_t i = 0; i < HEAD_DIM; i++) {
            int64_t at = (((int64_t)view.pages[position / KV_PAGE_TOKENS] * HEADS + h) * KV_PAGE_TOKENS +
                          position % KV_PAGE_TOKENS) *
                             HEAD_DIM +
                         i;
            assert_true(bf16_to_f32(view.k[at]) == value_of(layer, sequence, position, h, i, 0));
            assert_true(bf16_to_f32(view.v[at]) == value_of(layer, sequence, position, h, i, 1));
        }
}

static void test_values_stay_apart(void **state)
{
    (void)state;
    struct kv_cache *cache = make();
    struct error err;
    static const int64_t lengths[SEQUENCES] = {KV_PAGE_TOKENS + 1, 5, 2 * KV_PAGE_TOKENS};
    for (int s = 0; s < SEQUENCES; s++)
        for (int64_t p = 0; p < lengths[s]; p++) { // grown one by one: pages of the sequences interleave
            assert_int_equal(kv_cache_reserve(cache, s, p + 1, &err), 0);
            for (int64_t layer = 0; layer < LAYERS; layer++)
                store(cache, layer, s, p);
        }
    for (int s = 0; s < SEQUENCES; s++)
        for (int64_t layer = 0; layer < LAYERS; layer++)
            for (int64_t p = 0; p < lengths[s]; p++)
                check(cache, layer, s, p);
    kv_cache_free(cache);
}

static void test_full_cache_says_so(void **state)
{
    (void)state;
    struct kv_cache *cache = make();
    struct error err = {0};
    assert_int_equal(kv_cache_reserve(cache, 0, 3 * KV_PAGE_TOKENS, &err), 0);
    assert_int_equal(kv_cache_reserve(cache, 1, 3 * KV_PAGE_TOKENS, &err), ERR_MEMORY); // 2 pages left
    assert_int_equal(kv_cache_reserve(cache, 1, 2 * KV_PAGE_TOKENS, &err), 0);
    assert_int_equal(kv_cache_reserve(cache, 2, 1, &err), ERR_MEMORY);
    kv_cache_reset(cache, 0);
    assert_int_equal(kv_cache_reserve(cache, 2, 3 * KV_PAGE_TOKENS, &err), 0);
    assert_int_equal(kv_cache_reserve(cache, 2, 3 * KV_PAGE_TOKENS + 1, &err),
                     ERR_MEMORY); // longer than a sequence may be
    kv_cache_free(cache);
}

static void test_rank_without_heads(void **state)
{
    (void)state;
    struct kv_cache *cache = NULL;
    struct error err;
    assert_int_equal(kv_cache_bytes(LAYERS, 0, HEAD_DIM, PAGES), 0);
    assert_int_equal(kv_cache_create(&cache, LAYERS, 0, HEAD_DIM, PAGES, 1, MAX_TOKENS, &err), 0);
    assert_int_equal(kv_cache_reserve(cache, 0, 1, &err), 0);
    kv_cache_store(cache, 1, 0, 0, NULL, NULL);
    kv_cache_free(cache);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_values_stay_apart),
                                       cmocka_unit_test(test_full_cache_says_so),
                                       cmocka_unit_test(test_rank_without_heads)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
