// Attention over the pages of a KV cache: every table against double and each other, and a query's bits whatever stands beside it, in all
// formats and both layouts of keys.
#include "formats/number_formats.h"
#include "kernels/attention.h"
#include "kernels/kv_codes.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "tests/floats_help.h"

enum { PAGES = 40, KV_HEADS = 2, CONTEXT = 38 * KV_PAGE_TOKENS };
_Static_assert(CONTEXT > 2 * KV_CHUNK_TOKENS, "several chunks");

static const struct shape {
    int k_dim, v_dim;
    bool latent;
} shapes[] = {{2, 2, false},     {16, 16, false},   {64, 64, false}, {80, 80, false},  {98, 98, false},
              {128, 128, false}, {256, 256, false}, {48, 32, true},  {576, 512, true}, {638, 510, true}};

struct how {
    float scale, softcap;
    const float *sink;
};

static int32_t table[PAGES]; // pages lie in disorder

static double cached(const struct kv_view *kv, const void *pool, int64_t at, double scale)
{
    switch (kv->format) {
    case KV_BF16:
        return bf16_to_f32(((const uint16_t *)pool)[at]);
    case KV_E4M3:
        return e4m3_to_f32(((const uint8_t *)pool)[at]);
    case KV_INT8:
        return scale * ((const int8_t *)pool)[at];
    default: // at: twice the byte's place, and which of its codes
        return scale * weight_nl4_level((uint8_t)(((const uint8_t *)pool)[at / 2] >> at % 2 * 4));
    }
}

// Of the scale of a position's key or value.
static int64_t scale_at(const struct kv_view *kv, int64_t kv_head, int64_t position)
{
    int64_t page = kv->pages[position / KV_PAGE_TOKENS] * kv->num_kv_heads + kv_head;
    return page * KV_PAGE_TOKENS + position % KV_PAGE_TOKENS;
}
static double scale_of(const uint16_t *scales, int64_t at) { return scales ? (double)bf16_to_f32(scales[at]) : 0; }

// Where column d of a position's key or value lies.
static int64_t key_at(const struct kv_view *kv, int64_t kv_head, int64_t position, int64_t d)
{
    int64_t page = kv->pages[position / KV_PAGE_TOKENS] * kv->num_kv_heads + kv_head, slot = position % KV_PAGE_TOKENS;
    if (kv->format == KV_INT4)
        return ((page * kv->k_dim + d / 2 * 2) * KV_PAGE_TOKENS / 2 + slot) * 2 + d % 2;
    return kv->v == kv->k ? (page * KV_PAGE_TOKENS + slot) * kv->k_dim + d
                          : (page * kv->k_dim + d) * KV_PAGE_TOKENS + slot;
}
static int64_t value_at(const struct kv_view *kv, int64_t kv_head, int64_t position, int64_t d)
{
    int64_t page = kv->pages[position / KV_PAGE_TOKENS] * kv->num_kv_heads + kv_head;
    int64_t row = (page * KV_PAGE_TOKENS + position % KV_PAGE_TOKENS) * kv->v_stride;
    if (kv->format == KV_INT4)
        return row + 2 * kv_int4_byte(d, kv->v_dim) + kv_int4_shift(d, kv->v_dim) / 4;
    return row + d;
}

static struct kv_view make_view(const struct shape *shape, enum kv_format format)
{
    int64_t count = (int64_t)PAGES * KV_HEADS * KV_PAGE_TOKENS * shape->k_dim;
    for (int32_t i = 0; i < PAGES; i++)
        table[i] = (i * 7 + 3) % PAGES;
    uint64_t bytes = (uint64_t)count * (format == KV_BF16 ? 2 : 1);
    struct kv_view kv = {.k = zeroed(bytes),
                         .format = format,
                         .pages = table,
                         .num_kv_heads = KV_HEADS,
                         .k_dim = shape->k_dim,
                         .v_dim = shape->v_dim,
                         .v_stride = shape->k_dim};
    kv.v = shape->latent ? kv.k : zeroed(bytes);
    if (kv_format_scaled(format)) {
        int64_t scales = (int64_t)PAGES * KV_HEADS * KV_PAGE_TOKENS;
        float top = format == KV_INT8 ? 127 : 34;
        kv.k_scale = zeroed((uint64_t)scales * sizeof *kv.k_scale);
        kv.v_scale = zeroed((uint64_t)scales * sizeof *kv.v_scale);
        for (int64_t i = 0; i < scales; i++) {
            kv.k_scale[i] = f32_to_bf16((2 + uniform()) / top);
            kv.v_scale[i] = f32_to_bf16((0.75f + 0.25f * uniform()) / top);
        }
    }
    for (int64_t i = 0; i < count; i++) {
        float k = uniform() * (shape->latent ? 1 : 3), v = uniform();
        if (format == KV_BF16) {
            ((uint16_t *)kv.v)[i] = f32_to_bf16(v);
            ((uint16_t *)kv.k)[i] = f32_to_bf16(k);
        } else if (kv_format_scaled(format)) { // int4 has two codes in each byte, and half of them
            ((int8_t *)kv.v)[i] = (int8_t)(random_below(255) - 127);
            ((int8_t *)kv.k)[i] = (int8_t)(random_below(255) - 127);
        } else {
            ((uint8_t *)kv.v)[i] = f32_to_e4m3(v);
            ((uint8_t *)kv.k)[i] = f32_to_e4m3(k);
        }
    }
    return kv;
}

static void free_view(struct kv_view *kv)
{
    if (kv->v != kv->k)
        free(kv->v);
    free(kv->k);
    free(kv->k_scale);
    free(kv->v_scale);
}

static void reference(double *out, const float *q, const struct kv_view *kv, int64_t kv_head, int64_t first,
                      int64_t end, const struct how *how)
{
    double sum = 0, largest = how->sink ? *how->sink : -INFINITY;
    double *score = zeroed((uint64_t)(end - first) * sizeof *score);
    memset(out, 0, (size_t)kv->v_dim * sizeof *out);
    for (int64_t p = first; p < end; p++) {
        double *s = &score[p - first], k_scale = scale_of(kv->k_scale, scale_at(kv, kv_head, p));
        for (int64_t d = 0; d < kv->k_dim; d++)
            *s += (double)q[d] * cached(kv, kv->k, key_at(kv, kv_head, p, d), k_scale);
        *s *= how->scale;
        if (how->softcap > 0)
            *s = how->softcap * tanh(*s / how->softcap);
        largest = fmax(largest, *s);
    }
    for (int64_t p = first; p < end; p++) {
        double weight = exp(score[p - first] - largest), v_scale = scale_of(kv->v_scale, scale_at(kv, kv_head, p));
        sum += weight;
        for (int64_t d = 0; d < kv->v_dim; d++)
            out[d] += weight * cached(kv, kv->v, value_at(kv, kv_head, p, d), v_scale);
    }
    if (how->sink)
        sum += exp(*how->sink - largest);
    for (int64_t d = 0; d < kv->v_dim; d++)
        out[d] /= sum;
    free(score);
}

static void run(const struct kernels *k, struct attention_query *queries, int64_t count, const struct kv_view *kv,
                int64_t kv_head, const struct how *how)
{
    const struct attention_scores scores = {how->scale, how->softcap};
    float *room = zeroed((uint64_t)attention_room_floats(kv->k_dim, kv->v_dim) * sizeof *room);
    for (int64_t i = 0; i < count; i++)
        attention_begin(&queries[i]);
    k->attention(queries, count, kv, kv_head, 0, INT64_MAX, &scores, room);
    for (int64_t i = 0; i < count; i++)
        attention_finish(&queries[i], kv->v_dim, how->sink);
    free(room);
}

static void one(const struct kernels *k, float *out, const float *q, const struct kv_view *kv, int64_t kv_head,
                int64_t first, int64_t end, const struct how *how)
{
    struct attention_query query = {.q = q, .first = first, .end = end, .out = out};
    run(k, &query, 1, kv, kv_head, how);
}

// Another code at one cached element of a position's key or value, or where the format has scales another one of these. Returns what stood
// there.
static uint16_t exchange(const struct kv_view *kv, bool key, int64_t at, int64_t scale_at, uint16_t code)
{
    void *pool = key ? kv->k : kv->v;
    uint16_t had;
    if (kv_format_scaled(kv->format)) {
        uint16_t *scale = (key ? kv->k_scale : kv->v_scale) + scale_at;
        had = *scale;
        *scale = code;
    } else if (kv->format == KV_BF16) {
        had = ((uint16_t *)pool)[at];
        ((uint16_t *)pool)[at] = code;
    } else {
        had = ((uint8_t *)pool)[at];
        ((uint8_t *)pool)[at] = (uint8_t)code;
    }
    return had;
}

// Tables may share the function: it is tested once.
static bool was_tested(int index)
{
    for (int i = 0; i < index; i++)
        if (kernels_all[i]->supported() && kernels_all[i]->attention == kernels_all[index]->attention)
            return true;
    return false;
}

static void range_case(const struct kv_view *kv, const float *q, int64_t first, int64_t end, int64_t head,
                       const struct how *how)
{
    uint16_t nan = kv->format == KV_E4M3 ? 0x7f : 0x7fc0;
    double *exact = zeroed((uint64_t)kv->v_dim * sizeof *exact);
    float *want = zeroed((uint64_t)kv->v_dim * sizeof *want), *out = zeroed((uint64_t)kv->v_dim * sizeof *out);
    reference(exact, q, kv, head, first, end, how);
    const struct kernels *base = NULL;
    for (int n = 0; kernels_all[n]; n++)
        base = kernels_all[n]; // the last: scalar
    one(base, want, q, kv, head, first, end, how);
    for (int64_t d = 0; d < kv->v_dim;
         d++) // values are below 1; scores of magnitude 20 err by 3e-6, sums of 2000 terms by less
        if (!(fabs(want[d] - exact[d]) <= 1e-5))
            fail_msg("k_dim %d, [%d, %d): column %d is %.9g, not %.9g", (int)kv->k_dim, (int)first, (int)end, (int)d,
                     (double)want[d], exact[d]);
    for (int n = 0; kernels_all[n]; n++) {
        const struct kernels *k = kernels_all[n];
        if (!k->supported() || was_tested(n))
            continue;
        one(k, out, q, kv, head, first, end, how);
        assert_same(out, want, kv->v_dim, "attention");
        one(k, out, q, kv, head, first, first, how);
        for (int64_t d = 0; d < kv->v_dim; d++)
            assert_true(out[d] == 0);
        // A NaN in a key reaches every output; NaNs just before and behind the range none.
        int64_t at = key_at(kv, head, first, kv->k_dim - 1), scale = scale_at(kv, head, first);
        uint16_t had = exchange(kv, true, at, scale, nan);
        one(k, out, q, kv, head, first, end, how);
        exchange(kv, true, at, scale, had);
        for (int64_t d = 0; d < kv->v_dim; d++)
            assert_true(isnan(out[d]));
        for (int64_t p = first - 1; p <= end; p += end - first + 1) {
            if (p < 0)
                continue;
            int64_t k_at = key_at(kv, head, p, 0), v_at = value_at(kv, head, p, 0), s_at = scale_at(kv, head, p);
            uint16_t k_had = exchange(kv, true, k_at, s_at, nan), v_had = exchange(kv, false, v_at, s_at, nan);
            one(k, out, q, kv, head, first, end, how);
            exchange(kv, false, v_at, s_at, v_had);
            exchange(kv, true, k_at, s_at, k_had);
            assert_same(out, want, kv->v_dim, "attention beside a NaN");
        }
    }
    free(exact);
    free(want);
    free(out);
}

static const float sink = 0.75f, high_sink = 12;

static void test_ranges(void **state)
{
    (void)state;
    static const int64_t ranges[][2] = {{0, 1}, {0, 17}, {0, 64}, {3, 65}, {100, 200}, {1000, 1100}, {5, 2300}};
    for (size_t h = 0; h < sizeof shapes / sizeof *shapes; h++)
        for (int f = 0; f < KV_FORMAT_COUNT; f++) {
            if (shapes[h].latent && kv_format_scaled((enum kv_format)f))
                continue; // kv_format_check refuses
            struct kv_view kv = make_view(&shapes[h], (enum kv_format)f);
            const struct how hows[] = {
                {1 / sqrtf((float)kv.k_dim), 0, NULL}, {0.3f, 5, NULL}, {0.1f, 0, &sink}, {0.1f, 4, &high_sink}};
            float *q = random_floats(kv.k_dim);
            for (size_t r = 0; r < sizeof ranges / sizeof *ranges; r++)
                for (size_t c = 0; c < 4; c++)
                    if (ranges[r][1] < KV_CHUNK_TOKENS || c == h % 4) // long ones are slow
                        range_case(&kv, q, ranges[r][0], ranges[r][1], (int64_t)r % KV_HEADS, &hows[c]);
            free(q);
            free_view(&kv);
        }
}

// Many queries of any ranges at once, also chunk by chunk: each has the bits that it has alone.
static void test_company(void **state)
{
    (void)state;
    static const int counts[] = {2, 3, 7, 13, ATTENTION_QUERIES};
    for (size_t h = 0; h < sizeof shapes / sizeof *shapes; h++) {
        static const enum kv_format formats[] = {KV_BF16, KV_E4M3, KV_INT8, KV_INT4};
        struct kv_view kv = make_view(&shapes[h], formats[h % (shapes[h].latent ? 2 : 4)]);
        const struct how how = {0.2f, h % 3 ? 0 : 6, NULL};
        const struct attention_scores scores = {how.scale, how.softcap};
        float *q = random_floats(ATTENTION_QUERIES * kv.k_dim);
        float *out = zeroed((uint64_t)(ATTENTION_QUERIES * kv.v_dim) * sizeof *out);
        float *alone = zeroed((uint64_t)kv.v_dim * sizeof *alone), *part = zeroed((uint64_t)kv.v_dim * sizeof *part);
        float *room = zeroed((uint64_t)attention_room_floats(kv.k_dim, kv.v_dim) * sizeof *room);
        for (size_t c = 0; c < sizeof counts / sizeof *counts; c++)
            for (int n = 0; kernels_all[n]; n++) {
                const struct kernels *k = kernels_all[n];
                if (!k->supported() || was_tested(n) || (c > 2 && strcmp(k->name, "scalar") == 0))
                    continue;
                struct attention_query queries[ATTENTION_QUERIES];
                int64_t count = counts[c], start = c % 2 ? random_below(CONTEXT - 200) : 0;
                for (int64_t i = 0; i < count; i++) { // neighbours, a window, some with nothing
                    int64_t end = start + 1 + i / 2, first = i % 5 == 4 ? end
                                                             : c == 2   ? end - (end < 90 ? end : 90)
                                                                        : 0;
                    queries[i] = (struct attention_query){
                        .q = q + i * kv.k_dim, .first = first, .end = end, .out = out + i * kv.v_dim};
                }
                run(k, queries, count, &kv, 1, &how);
                for (int64_t i = 0; i<count; i += count> 13 ? 9 : 1) {
                    one(k, alone, queries[i].q, &kv, 1, queries[i].first, queries[i].end, &how);
                    assert_same(queries[i].out, alone, kv.v_dim, "in company");
                    struct attention_query total = queries[i], chunk = queries[i];
                    total.out = alone;
                    chunk.out = part;
                    attention_begin(&total);
                    for (int64_t p = 0; p < CONTEXT; p += KV_CHUNK_TOKENS) {
                        attention_begin(&chunk);
                        k->attention(&chunk, 1, &kv, 1, p, p + KV_CHUNK_TOKENS, &scores, room);
                        attention_join(&total, &chunk, kv.v_dim);
                    }
                    attention_finish(&total, kv.v_dim, NULL);
                    assert_same(queries[i].out, alone, kv.v_dim, "by chunks");
                }
            }
        free(q);
        free(out);
        free(alone);
        free(part);
        free(room);
        free_view(&kv);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_ranges), cmocka_unit_test(test_company)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
