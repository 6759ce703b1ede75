// The bytes of a paged KV cache: values come back from the pages that they went to, in both formats.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "formats/number_formats.h"
#include "kernels/kv.h"

#include <math.h>
#include <stdlib.h>

enum { HEADS = 3, HEAD_DIM = 8, PAGES = 5, SEQUENCES = 3, PAGES_OF_ONE = 2 };
enum { ELEMS = PAGES * HEADS * KV_PAGE_TOKENS * HEAD_DIM };

// Sequences that grew one by one: their pages interleave.
static const int32_t tables[SEQUENCES][PAGES_OF_ONE] = {{0, 3}, {1, -1}, {4, 2}};

static float value_of(int sequence, int64_t position, int64_t head, int64_t i, int which)
{
    return (float)((sequence * 31 + position * 3 + head * 11 + i + which * 5) % 16); // exact in both formats
}

static struct kv_view view_of(int sequence, enum kv_format format, void *k, void *v)
{
    return (struct kv_view){k, v, format, tables[sequence], HEADS, HEAD_DIM, HEAD_DIM, HEAD_DIM};
}

static void store(const struct kv_view *view, int sequence, int64_t position)
{
    float k[HEADS * HEAD_DIM], v[HEADS * HEAD_DIM];
    for (int64_t h = 0; h < HEADS; h++)
        for (int64_t i = 0; i < HEAD_DIM; i++) {
            k[h * HEAD_DIM + i] = value_of(sequence, position, h, i, 0);
            v[h * HEAD_DIM + i] = value_of(sequence, position, h, i, 1);
        }
    kv_store(view, position, k, v);
}

static float value_at(const void *pool, enum kv_format format, int64_t at)
{
    return format == KV_BF16 ? bf16_to_f32(((const uint16_t *)pool)[at]) : e4m3_to_f32(((const uint8_t *)pool)[at]);
}

static void check(const struct kv_view *view, int sequence, int64_t position)
{
    for (int64_t h = 0; h < HEADS; h++)
        for (int64_t i = 0; i < HEAD_DIM; i++) {
            int64_t begin = ((int64_t)view->pages[position / KV_PAGE_TOKENS] * HEADS + h) * KV_PAGE_TOKENS * HEAD_DIM;
            int64_t slot = position % KV_PAGE_TOKENS, turned = begin + i * KV_PAGE_TOKENS + slot;
            assert_true(value_at(view->k, view->format, turned) == value_of(sequence, position, h, i, 0));
            assert_true(value_at(view->v, view->format, begin + slot * HEAD_DIM + i) ==
                        value_of(sequence, position, h, i, 1));
        }
}

static void values_stay_apart(enum kv_format format)
{
    uint16_t *k = calloc(ELEMS, sizeof *k), *v = calloc(ELEMS, sizeof *v);
    static const int64_t lengths[SEQUENCES] = {KV_PAGE_TOKENS + 1, 5, 2 * KV_PAGE_TOKENS};
    for (int s = 0; s < SEQUENCES; s++)
        for (int64_t p = 0; p < lengths[s]; p++) {
            struct kv_view view = view_of(s, format, k, v);
            store(&view, s, p);
        }
    for (int s = 0; s < SEQUENCES; s++)
        for (int64_t p = 0; p < lengths[s]; p++) {
            struct kv_view view = view_of(s, format, k, v);
            check(&view, s, p);
        }
    free(k);
    free(v);
}

static void test_values_stay_apart(void **state)
{
    (void)state;
    values_stay_apart(KV_BF16);
    values_stay_apart(KV_E4M3);
}

// What e4m3 cannot hold: too large saturates, NaN stays NaN.
static void test_e4m3_limits(void **state)
{
    (void)state;
    static const int32_t pages[] = {0};
    uint8_t k[KV_PAGE_TOKENS * 2] = {0}, v[KV_PAGE_TOKENS * 2] = {0};
    struct kv_view view = {k, v, KV_E4M3, pages, 1, 2, 2, 2};
    kv_store(&view, 3, (float[]){1000, -449}, (float[]){NAN, 0.0625f});
    assert_true(e4m3_to_f32(k[3]) == 448 && e4m3_to_f32(k[KV_PAGE_TOKENS + 3]) == -448);
    assert_true(isnan(e4m3_to_f32(v[6])) && e4m3_to_f32(v[7]) == 0.0625f);
}

// Latent attention: one row, key and value.
static void test_latent_rows(void **state)
{
    (void)state;
    static const int32_t pages[] = {1};
    uint16_t rows[2 * KV_PAGE_TOKENS * 4] = {0};
    struct kv_view view = {rows, rows, KV_BF16, pages, 1, 4, 2, 4};
    kv_store(&view, 5, (float[]){1, 2, 3, 4}, NULL);
    for (int64_t i = 0; i < 2 * KV_PAGE_TOKENS * 4; i++) {
        int64_t inside = i - (KV_PAGE_TOKENS + 5) * 4;
        assert_true(bf16_to_f32(rows[i]) == (inside >= 0 && inside < 4 ? (float)(inside + 1) : 0.0f));
    }
}

static void test_rank_without_heads(void **state)
{
    (void)state;
    struct model_desc desc = {.num_layers = 2, .head_dim = HEAD_DIM};
    struct rank_share share = {0};
    static const int32_t pages[] = {0};
    struct kv_view view = {NULL, NULL, KV_BF16, pages, 0, HEAD_DIM, HEAD_DIM, HEAD_DIM};
    assert_int_equal(kv_bytes(&desc, &share, PAGES, KV_BF16), 0);
    kv_store(&view, 0, NULL, NULL);
    share.num_kv_heads_local = HEADS;
    assert_int_equal(kv_bytes(&desc, &share, PAGES, KV_BF16), 2 * 2 * 2 * ELEMS);
    assert_int_equal(kv_bytes(&desc, &share, PAGES, KV_E4M3), 2 * 2 * ELEMS);
    // Latent attention keeps one row for all heads.
    desc.latent = (struct latent_desc){.kv_rank = 3 * HEAD_DIM, .rope_dim = HEAD_DIM};
    assert_int_equal(kv_bytes(&desc, &share, PAGES, KV_BF16), 2 * 2 * 4 * ELEMS / HEADS);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_values_stay_apart), cmocka_unit_test(test_e4m3_limits),
                                       cmocka_unit_test(test_latent_rows), cmocka_unit_test(test_rank_without_heads)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
