// The bytes of a paged KV cache: values come back from the pages that they went to, in all formats; rotation and scales.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "formats/number_formats.h"
#include "kernels/kv.h"
#include "kernels/kv_codes.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/floats_help.h"

enum { HEADS = 3, HEAD_DIM = 8, PAGES = 5, SEQUENCES = 3, PAGES_OF_ONE = 2 };
enum { ELEMS = PAGES * HEADS * KV_PAGE_TOKENS * HEAD_DIM };

// Sequences that grew one by one: their pages interleave.
static const int32_t tables[SEQUENCES][PAGES_OF_ONE] = {{0, 3}, {1, -1}, {4, 2}};

static float value_of(int sequence, int64_t position, int64_t head, int64_t i, int which)
{
    return (float)((sequence * 31 + position * 3 + head * 11 + i + which * 5) % 16); // exact in both formats
}

enum { SCALES = PAGES * HEADS * KV_PAGE_TOKENS };
struct pools {
    uint16_t k[ELEMS], v[ELEMS], k_scale[SCALES], v_scale[SCALES];
};

static struct kv_view view_of(int sequence, enum kv_format format, struct pools *pools)
{
    return (struct kv_view){pools->k, pools->v, format,   tables[sequence], HEADS,
                            HEAD_DIM, HEAD_DIM, HEAD_DIM, pools->k_scale,   pools->v_scale};
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

static float code_at(const void *pool, enum kv_format format, int64_t at)
{
    switch (format) {
    case KV_E4M3:
        return e4m3_to_f32(((const uint8_t *)pool)[at]);
    case KV_INT8:
        return ((const int8_t *)pool)[at];
    case KV_INT4: // at: twice the byte's place, and which of its codes
        return (float)weight_nl4_level((uint8_t)(((const uint8_t *)pool)[at / 2] >> at % 2 * 4));
    default:
        return bf16_to_f32(((const uint16_t *)pool)[at]);
    }
}

// A row as it was stored, within `bound` times its largest value.
static void check_row(const float *codes, const struct kv_view *view, uint16_t scale, const float *want)
{
    static const double bounds[KV_FORMAT_COUNT] = {0, 0, 0.52 / 127, 4.1 / 34};
    float row[HEAD_DIM];
    double largest = 0;
    for (int64_t i = 0; i < HEAD_DIM; i++)
        row[i] = kv_format_scaled(view->format) ? codes[i] * bf16_to_f32(scale) : codes[i];
    if (kv_format_scaled(view->format))
        kv_rotate(row, 1, HEAD_DIM, kv_rotate_back(HEAD_DIM));
    for (int64_t i = 0; i < HEAD_DIM; i++)
        largest += fabs((double)want[i]); // no rotated value is larger
    for (int64_t i = 0; i < HEAD_DIM; i++)
        if (!(fabs((double)row[i] - (double)want[i]) <= bounds[view->format] * largest))
            fail_msg("%s: column %d is %.9g, not %.9g", kv_format_name(view->format), (int)i, (double)row[i],
                     (double)want[i]);
}

static void check(const struct kv_view *view, int sequence, int64_t position)
{
    for (int64_t h = 0; h < HEADS; h++) {
        int64_t page = (int64_t)view->pages[position / KV_PAGE_TOKENS] * HEADS + h, slot = position % KV_PAGE_TOKENS;
        float k[HEAD_DIM], v[HEAD_DIM], k_want[HEAD_DIM], v_want[HEAD_DIM];
        for (int64_t i = 0; i < HEAD_DIM; i++) {
            int64_t k_at = (page * HEAD_DIM + i) * KV_PAGE_TOKENS + slot,
                    v_at = (page * KV_PAGE_TOKENS + slot) * HEAD_DIM + i;
            if (view->format == KV_INT4) {
                k_at = ((page * HEAD_DIM + i / 2 * 2) * KV_PAGE_TOKENS / 2 + slot) * 2 + i % 2;
                v_at = (page * KV_PAGE_TOKENS + slot) * HEAD_DIM + 2 * kv_int4_byte(i, HEAD_DIM) +
                       kv_int4_shift(i, HEAD_DIM) / 4;
            }
            k[i] = code_at(view->k, view->format, k_at);
            v[i] = code_at(view->v, view->format, v_at);
            k_want[i] = value_of(sequence, position, h, i, 0);
            v_want[i] = value_of(sequence, position, h, i, 1);
        }
        check_row(k, view, view->k_scale[page * KV_PAGE_TOKENS + slot], k_want);
        check_row(v, view, view->v_scale[page * KV_PAGE_TOKENS + slot], v_want);
    }
}

static void test_values_stay_apart(void **state)
{
    (void)state;
    static const int64_t lengths[SEQUENCES] = {KV_PAGE_TOKENS + 1, 5, 2 * KV_PAGE_TOKENS};
    for (int format = 0; format < KV_FORMAT_COUNT; format++) {
        struct pools *pools = calloc(1, sizeof *pools);
        for (int s = 0; s < SEQUENCES; s++)
            for (int64_t p = 0; p < lengths[s]; p++) {
                struct kv_view view = view_of(s, (enum kv_format)format, pools);
                store(&view, s, p);
            }
        for (int s = 0; s < SEQUENCES; s++)
            for (int64_t p = 0; p < lengths[s]; p++) {
                struct kv_view view = view_of(s, (enum kv_format)format, pools);
                check(&view, s, p);
            }
        free(pools);
    }
}

// A row of any even number of columns has each code where kv_int4_byte says.
static void test_int4_rows(void **state)
{
    (void)state;
    static const int32_t pages[] = {0};
    for (int64_t dim = 2; dim <= 64; dim += dim == 34 ? 30 : 2) {
        uint8_t k[64 * KV_PAGE_TOKENS / 2] = {0}, v[64 * KV_PAGE_TOKENS / 2] = {0}, used[32] = {0};
        uint16_t scales[2][KV_PAGE_TOKENS];
        struct kv_view view = {k, v, KV_INT4, pages, 1, dim, dim, dim, scales[0], scales[1]};
        float *x = random_floats(2 * dim);
        if (dim % 8 == 4)
            x[0] = NAN, x[dim] = INFINITY; // rows without a finite scale have codes of zero
        kv_store(&view, 7, x, x + dim);    // rotates them
        for (int64_t i = 0; i < dim; i++) {
            uint8_t key = kv_code_int4(x[i], kv_inverse_scale(scales[0][7]));
            uint8_t value = kv_code_int4(x[dim + i], kv_inverse_scale(scales[1][7]));
            int64_t byte = kv_int4_byte(i, dim);
            assert_int_equal(k[i / 2 * KV_PAGE_TOKENS + 7] >> i % 2 * 4 & 15, key);
            assert_int_equal(v[7 * dim / 2 + byte] >> kv_int4_shift(i, dim) & 15, value);
            assert_true(byte < dim / 2);
            used[byte] |= (uint8_t)(15 << kv_int4_shift(i, dim));
        }
        for (int64_t byte = 0; byte < dim / 2; byte++)
            assert_int_equal(used[byte], 255);
        free(x);
    }
}

// ---- rotation and scales -------------------------------------------------------------------------------------------

// What kv_codes.h says, one column at a time.
static void rotate_slowly(float *x, int64_t dim)
{
    int64_t block = kv_rotation_block(dim);
    for (int64_t distance = 1; distance < block; distance *= 2)
        for (int64_t i = 0; i < dim; i++)
            if (!(i & distance)) {
                float a = x[i], b = x[i + distance];
                x[i] = a + b;
                x[i + distance] = a - b;
            }
}

static void test_rotation(void **state)
{
    (void)state;
    static const int64_t dims[] = {1, 2, 4, 34, 20, 64, 80, 96, 112, 128, 256};
    for (size_t d = 0; d < sizeof dims / sizeof *dims; d++) {
        int64_t dim = dims[d], block = kv_rotation_block(dim);
        assert_true(dim % block == 0 && (block & (block - 1)) == 0 && dim / block % 2 == 1);
        float *x = random_floats(3 * dim), *y = zeroed((uint64_t)(3 * dim) * sizeof *y), one[256] = {0};
        memcpy(y, x, (size_t)(3 * dim) * sizeof *y);
        kv_rotate(y, 3, dim, 1);
        for (int64_t h = 0; h < 3; h++) {
            float slow[256];
            memcpy(slow, x + h * dim, (size_t)dim * sizeof *slow);
            rotate_slowly(slow, dim);
            assert_same(y + h * dim, slow, dim, "rotated");
            double before = 0, after = 0;
            for (int64_t i = 0; i < dim; i++) {
                before += (double)x[h * dim + i] * (double)x[h * dim + i];
                after += (double)slow[i] * (double)slow[i];
            }
            assert_true(fabs(after - before * (double)block) <= 1e-4 * after);
        }
        kv_rotate(y, 3, dim, kv_rotate_back(dim));
        for (int64_t i = 0; i < 3 * dim; i++) // sums of at most 256 values below 8, rounded 16 times
            assert_true(fabs((double)y[i] - (double)x[i]) <= 2e-5);
        // One column alone is spread over its block, and over no other.
        one[dim - 1] = 1;
        kv_rotate(one, 1, dim, 1);
        for (int64_t i = 0; i < dim; i++)
            assert_true(fabsf(one[i]) == (i >= dim - block ? 1.0f : 0.0f));
        free(x);
        free(y);
    }
}

static void test_scales(void **state)
{
    (void)state;
    for (int i = 0; i < 10000; i++) {
        float largest = ldexpf(1 + fabsf(uniform()), (int)random_below(220) - 99);
        uint16_t bits = kv_scale(KV_INT8, kv_extent(i % 2 ? largest : -largest));
        double scale = (double)bf16_to_f32(bits);
        assert_true(scale * 127 >= largest * 0.999999 && scale * 127 <= largest * 1.008);
        float inverse = kv_inverse_scale(bits);
        int8_t most = (int8_t)kv_code_int8(largest, inverse);
        assert_true(most >= 126 && (int8_t)kv_code_int8(-largest, inverse) == -most);
        float x = largest * uniform();
        assert_true(fabs((int8_t)kv_code_int8(x, inverse) * scale - (double)x) <= 0.5001 * scale);
        float extreme = i % 2 ? largest : -largest;
        bits = kv_scale(KV_INT4, kv_extent(extreme));
        scale = (double)bf16_to_f32(bits), inverse = kv_inverse_scale(bits);
        assert_true(kv_code_int4(extreme, inverse) == 8 && kv_code_int4(0, inverse) == 0);
        assert_true(fabs(scale * -34 - (double)extreme) <= 0.004 * largest);
        uint8_t code = kv_code_int4(x, inverse);
        double off = fabs(weight_nl4_level(code) * scale - (double)x);
        for (int other = 0; other < 16; other++) // none is nearer
            assert_true(fabs(weight_nl4_level((uint8_t)other) * scale - (double)x) >= off - 1e-5 * fabs(scale));
    }
    // A row of nothing has no scale, nor one that is lost beside all others; one that is not finite has a scale that no result hides.
    static const struct {
        float value;
        bool finite;
    } cases[] = {{0, true},         {-0.0f, true},      {1e-40f, true}, {0x1p-101f, true},
                 {INFINITY, false}, {-INFINITY, false}, {NAN, false}};
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        static const int32_t pages[] = {0};
        int8_t codes[2][KV_PAGE_TOKENS * 2] = {{0}};
        uint16_t scales[2][KV_PAGE_TOKENS] = {{0}};
        struct kv_view view = {codes[0], codes[1], KV_INT8, pages, 1, 2, 2, 2, scales[0], scales[1]};
        memset(codes, 1, sizeof codes);
        kv_store(&view, 3, (float[]){cases[c].value, 0}, (float[]){0, cases[c].value});
        for (int which = 0; which < 2; which++) {
            float scale = bf16_to_f32(scales[which][3]);
            assert_true(cases[c].finite ? scale == 0 : isnan(scale));
        }
        assert_true(codes[0][3] == 0 && codes[0][KV_PAGE_TOKENS + 3] == 0 && codes[1][6] == 0 && codes[1][7] == 0);
        assert_true(codes[0][4] == 1 && codes[1][5] == 1 && codes[1][8] == 1);
    }
}

// What e4m3 cannot hold: too large saturates, NaN stays NaN.
static void test_e4m3_limits(void **state)
{
    (void)state;
    static const int32_t pages[] = {0};
    uint8_t k[KV_PAGE_TOKENS * 2] = {0}, v[KV_PAGE_TOKENS * 2] = {0};
    struct kv_view view = {k, v, KV_E4M3, pages, 1, 2, 2, 2, NULL, NULL};
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
    struct kv_view view = {rows, rows, KV_BF16, pages, 1, 4, 2, 4, NULL, NULL};
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
    struct kv_view view = {NULL, NULL, KV_BF16, pages, 0, HEAD_DIM, HEAD_DIM, HEAD_DIM, NULL, NULL};
    assert_int_equal(kv_bytes(&desc, &share, PAGES, KV_BF16), 0);
    kv_store(&view, 0, NULL, NULL);
    share.num_kv_heads_local = HEADS;
    assert_int_equal(kv_bytes(&desc, &share, PAGES, KV_BF16), 2 * 2 * 2 * ELEMS);
    assert_int_equal(kv_bytes(&desc, &share, PAGES, KV_E4M3), 2 * 2 * ELEMS);
    assert_int_equal(kv_bytes(&desc, &share, PAGES, KV_INT8), 2 * 2 * (ELEMS + 2 * SCALES));
    assert_int_equal(kv_bytes(&desc, &share, PAGES, KV_INT4), 2 * 2 * (ELEMS / 2 + 2 * SCALES));
    // Latent attention keeps one row for all heads.
    desc.latent = (struct latent_desc){.kv_rank = 3 * HEAD_DIM, .rope_dim = HEAD_DIM};
    assert_int_equal(kv_bytes(&desc, &share, PAGES, KV_BF16), 2 * 2 * 4 * ELEMS / HEADS);
}

static void test_names(void **state)
{
    (void)state;
    char choices[64] = "";
    struct error err;
    for (int format = 0; format < KV_FORMAT_COUNT; format++) {
        const char *name = kv_format_name((enum kv_format)format);
        assert_int_equal(kv_format_from_name(name), format);
        snprintf(choices + strlen(choices), sizeof choices - strlen(choices), "%s%s", format ? "|" : "", name);
        struct model_desc heads = {.head_dim = HEAD_DIM}, latent = {.latent = {.kv_rank = 8}};
        assert_int_equal(kv_format_check(&heads, (enum kv_format)format, &err), 0);
        assert_int_equal(kv_format_check(&latent, (enum kv_format)format, &err), format >= KV_INT8 ? ERR_MODEL : 0);
    }
    assert_string_equal(choices, KV_FORMAT_CHOICES);
    assert_non_null(strstr(err.msg, "latent row"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_values_stay_apart),  cmocka_unit_test(test_int4_rows),
                                       cmocka_unit_test(test_rotation),           cmocka_unit_test(test_scales),
                                       cmocka_unit_test(test_e4m3_limits),        cmocka_unit_test(test_latent_rows),
                                       cmocka_unit_test(test_rank_without_heads), cmocka_unit_test(test_names)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
