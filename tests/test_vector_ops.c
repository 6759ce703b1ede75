// What the kernel tables do beside matmul: against double arithmetic, and the same bits from every table.
#include "formats/number_formats.h"
#include "kernels/kernels.h"
#include "kernels/vector_ops.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static uint64_t random_state = 0x9e3779b97f4a7c15u;

static uint64_t random_bits(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state * 0x2545f4914f6cdd1du;
}

static int64_t random_below(int64_t limit) { return (int64_t)(random_bits() >> 33) % limit; }
static float uniform(void) { return (float)((double)(random_bits() >> 11) * 0x1p-52 - 1.0); } // [-1, 1)

static void *zeroed(uint64_t bytes)
{
    void *memory = calloc(1, bytes ? bytes : 1);
    assert_non_null(memory);
    return memory;
}

// Same bits, or both NaN.
static bool same(float a, float b) { return f32_bits(a) == f32_bits(b) || (isnan(a) && isnan(b)); }

static void assert_same(const float *a, const float *b, int64_t count, const char *what)
{
    for (int64_t i = 0; i < count; i++)
        if (!same(a[i], b[i]))
            fail_msg("%s: element %lld is %.9g, not %.9g", what, (long long)i, (double)a[i], (double)b[i]);
}

static float *random_floats(int64_t count)
{
    float *x = zeroed((uint64_t)count * sizeof *x);
    for (int64_t i = 0; i < count; i++)
        x[i] = uniform() * (random_below(20) ? 1.0f : 8.0f);
    return x;
}

// The operations as this file's own flags compile them: one more instruction set, and a way to exp16.
static const struct kernels baseline = {.name = "baseline", VECTOR_OPS_ENTRIES};

static double ulp(float x)
{
    float magnitude = fabsf(x);
    return magnitude < 0x1p-126f ? 0x1p-149 : (double)nextafterf(magnitude, INFINITY) - magnitude;
}

static void test_exp(void **state)
{
    (void)state;
    (void)vector_ops_matmul; // tests/test_kernels.c
    uint32_t step = 1009;
    for (uint64_t bits = 0; bits < 0x100000000; bits += step * LANES) {
        float x[LANES], y[LANES];
        for (uint64_t i = 0; i < LANES; i++)
            x[i] = f32_from_bits((uint32_t)(bits + i * step));
        f32x16 v;
        load16(&v, x);
        exp16(&v, &v);
        store16(y, &v);
        for (int i = 0; i < LANES; i++) {
            float want = (float)exp((double)x[i]);
            if (isnan(x[i])   ? !isnan(y[i])
                : isinf(want) ? y[i] != want
                              : !(fabs((double)y[i] - exp((double)x[i])) <= 2 * ulp(want)))
                fail_msg("exp(%a) is %a, not %a", (double)x[i], (double)y[i], (double)want);
        }
    }
}

static void test_silu_mul(void **state)
{
    (void)state;
    enum { COUNT = 1037 };
    float *gate = random_floats(COUNT), *up = random_floats(COUNT), *want = zeroed(COUNT * sizeof *want);
    for (int i = 0; i < 300; i++)
        gate[i] = (float)(i - 150);
    baseline.silu_mul(want, gate, up, COUNT);
    for (int i = 0; i < COUNT; i++) {
        double exact = gate[i] / (1 + exp(-(double)gate[i])) * up[i];
        // exp 2 ulp, then four roundings; exp(-gate) beyond the f32 range gives 0.
        assert_true(fabs(want[i] - exact) <= 5e-7 * fabs(exact) + 1e-36);
    }
    for (int n = 0; kernels_all[n]; n++) {
        if (!kernels_all[n]->supported())
            continue;
        float *out = zeroed(COUNT * sizeof *out);
        memcpy(out, gate, COUNT * sizeof *out);
        kernels_all[n]->silu_mul(out, out, up, COUNT); // in place
        assert_same(out, want, COUNT, "silu_mul");
        float nan = NAN, one = 1;
        kernels_all[n]->silu_mul(&nan, &nan, &one, 1);
        assert_true(isnan(nan));
        kernels_all[n]->add(out, gate, COUNT);
        for (int i = 0; i < COUNT; i++)
            assert_true(out[i] == want[i] + gate[i]);
        free(out);
    }
    free(gate);
    free(up);
    free(want);
}

static void test_rms_norm(void **state)
{
    (void)state;
    static const int cols[] = {1, 15, 16, 64, 1000, 4096};
    for (size_t c = 0; c < 6; c++) {
        int64_t count = cols[c];
        float *x = random_floats(count), *weight = random_floats(count), *want = zeroed((uint64_t)count * sizeof *want);
        float eps = 1e-5f;
        baseline.rms_norm(want, x, weight, count, eps);
        double squares = 0;
        for (int64_t i = 0; i < count; i++)
            squares += (double)x[i] * x[i];
        for (int64_t i = 0; i < count; i++) {
            double exact = x[i] / sqrt(squares / (double)count + eps) * weight[i];
            // 256 additions of squares a lane, at most 2^-24 each and half of it in the root, then three roundings
            assert_true(fabs(want[i] - exact) <= 1e-5 * fabs(exact));
        }
        for (int n = 0; kernels_all[n]; n++) {
            if (!kernels_all[n]->supported())
                continue;
            float *y = zeroed((uint64_t)count * sizeof *y);
            memcpy(y, x, (size_t)count * sizeof *y);
            kernels_all[n]->rms_norm(y, y, weight, count, eps); // in place
            assert_same(y, want, count, "rms_norm");
            y[count / 2] = NAN;
            kernels_all[n]->rms_norm(y, y, weight, count, eps);
            for (int64_t i = 0; i < count; i++)
                assert_true(isnan(y[i]));
            free(y);
        }
        free(x);
        free(weight);
        free(want);
    }
}

static void test_rope(void **state)
{
    (void)state;
    static const int head_dims[] = {2, 6, 64, 80, 128, 256};
    static const int64_t positions[] = {0, 1, 17, 4095, 131071, 1000000};
    for (size_t h = 0; h < 6; h++)
        for (size_t p = 0; p < 6; p++) {
            int64_t dim = head_dims[h], half = dim / 2;
            uint64_t bytes = (uint64_t)half * sizeof(float);
            float *inv_freq = zeroed(bytes), *cosine = zeroed(bytes), *sine = zeroed(bytes), *x = random_floats(dim);
            for (int64_t i = 0; i < half; i++)
                inv_freq[i] = powf(10000.0f, -2.0f * (float)i / (float)dim);
            float factor = 1.25f, *want = zeroed(2 * bytes);
            baseline.rope_table(cosine, sine, inv_freq, half, positions[p], factor);
            memcpy(want, x, 2 * bytes);
            baseline.rope(want, cosine, sine, dim);
            for (int64_t i = 0; i < half; i++) {
                double angle =
                    (float)positions[p] * inv_freq[i]; // rounded to f32, as the reference implementation does
                double c = cos(angle) * factor, s = sin(angle) * factor, a = x[i], b = x[i + half];
                assert_true(fabs(want[i] - (a * c - b * s)) <= 1e-6 * (fabs(a) + fabs(b)));
                assert_true(fabs(want[i + half] - (b * c + a * s)) <= 1e-6 * (fabs(a) + fabs(b)));
            }
            for (int n = 0; kernels_all[n]; n++) {
                if (!kernels_all[n]->supported())
                    continue;
                float *y = zeroed(2 * bytes), *c = zeroed(bytes), *s = zeroed(bytes);
                kernels_all[n]->rope_table(c, s, inv_freq, half, positions[p], factor);
                memcpy(y, x, 2 * bytes);
                kernels_all[n]->rope(y, c, s, dim);
                assert_same(y, want, dim, "rope");
                free(y);
                free(c);
                free(s);
            }
            free(inv_freq);
            free(cosine);
            free(sine);
            free(x);
            free(want);
        }
}

// Attention in double over a cache whose pages lie in disorder.
static void attention_reference(double *out, const float *q, const struct kv_view *kv, int64_t kv_head, int64_t first,
                                int64_t end, double scale)
{
    double sum = 0, largest = -INFINITY, *score = zeroed((uint64_t)(end - first) * sizeof *score);
    for (int pass = 0; pass < 2; pass++)
        for (int64_t p = first; p < end; p++) {
            int64_t slot =
                (kv->pages[p / KV_PAGE_TOKENS] * kv->num_kv_heads + kv_head) * KV_PAGE_TOKENS + p % KV_PAGE_TOKENS;
            if (pass == 0) {
                for (int64_t d = 0; d < kv->head_dim; d++)
                    score[p - first] += (double)q[d] * bf16_to_f32(((const uint16_t *)kv->k)[slot * kv->head_dim + d]);
                score[p - first] *= scale;
                largest = fmax(largest, score[p - first]);
                continue;
            }
            double weight = exp(score[p - first] - largest);
            sum += weight;
            for (int64_t d = 0; d < kv->head_dim; d++)
                out[d] += weight * bf16_to_f32(((const uint16_t *)kv->v)[slot * kv->head_dim + d]);
        }
    for (int64_t d = 0; d < kv->head_dim; d++)
        out[d] /= sum;
    free(score);
}

static void test_attention(void **state)
{
    (void)state;
    enum { PAGES = 5, KV_HEADS = 2 };
    static const int head_dims[] = {2, 16, 64, 80, 98, 128, 256};
    static const int64_t ranges[][2] = {{0, 1}, {0, 17}, {0, 64}, {3, 65}, {100, 200}, {0, 250}};
    for (size_t h = 0; h < sizeof head_dims / sizeof *head_dims; h++) {
        int64_t dim = head_dims[h], elems = PAGES * KV_HEADS * KV_PAGE_TOKENS * dim;
        uint16_t *k = zeroed((uint64_t)elems * 2), *v = zeroed((uint64_t)elems * 2);
        for (int64_t i = 0; i < elems; i++) {
            k[i] = f32_to_bf16(uniform() * 3);
            v[i] = f32_to_bf16(uniform());
        }
        static const int32_t pages[] = {3, 0, 4, 1};
        struct kv_view kv = {k, v, KV_BF16, pages, KV_HEADS, dim};
        float *q = random_floats(dim), scale = 1 / sqrtf((float)dim);
        for (size_t r = 0; r < 6; r++) {
            int64_t first = ranges[r][0], end = ranges[r][1], head = (int64_t)r % KV_HEADS;
            double *exact = zeroed((uint64_t)dim * sizeof *exact);
            float *want = zeroed((uint64_t)dim * sizeof *want),
                  *scores = zeroed((uint64_t)(end - first) * sizeof *scores);
            attention_reference(exact, q, &kv, head, first, end, scale);
            baseline.attention(want, q, &kv, head, first, end, scale, scores);
            for (int64_t d = 0; d < dim;
                 d++) // values are below 1; scores of magnitude 10 err by 1e-6, sums of 250 terms by less
                assert_true(fabs(want[d] - exact[d]) <= 5e-6);
            for (int n = 0; kernels_all[n]; n++) {
                if (!kernels_all[n]->supported())
                    continue;
                float *out = zeroed((uint64_t)dim * sizeof *out);
                kernels_all[n]->attention(out, q, &kv, head, first, end, scale, scores);
                assert_same(out, want, dim, "attention");
                kernels_all[n]->attention(out, q, &kv, head, first, first, scale, scores);
                for (int64_t d = 0; d < dim; d++)
                    assert_true(out[d] == 0);
                // One NaN in a key reaches every output.
                int64_t slot =
                    (pages[first / KV_PAGE_TOKENS] * KV_HEADS + head) * KV_PAGE_TOKENS + first % KV_PAGE_TOKENS;
                uint16_t saved = k[slot * dim + dim - 1];
                k[slot * dim + dim - 1] = 0x7fc0;
                kernels_all[n]->attention(out, q, &kv, head, first, end, scale, scores);
                k[slot * dim + dim - 1] = saved;
                for (int64_t d = 0; d < dim; d++)
                    assert_true(isnan(out[d]));
                free(out);
            }
            free(exact);
            free(want);
            free(scores);
        }
        free(k);
        free(v);
        free(q);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_exp),  cmocka_unit_test(test_silu_mul),  cmocka_unit_test(test_rms_norm),
        cmocka_unit_test(test_rope), cmocka_unit_test(test_attention),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
