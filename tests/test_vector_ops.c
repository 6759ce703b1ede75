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

#include "tests/floats_help.h"

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

static double sigmoid(double x) { return 1 / (1 + exp(-x)); }

static double activation_reference(double gate, double up, enum activation activation)
{
    switch (activation) {
    case ACTIVATION_SILU:
        return gate * sigmoid(gate) * up;
    case ACTIVATION_GELU_TANH:
        return 0.5 * gate * (1 + tanh(sqrt(2 / M_PI) * (gate + 0.044715 * gate * gate * gate))) * up;
    case ACTIVATION_GPT_OSS:
        gate = fmin(gate, 7);
        up = fmax(fmin(up, 7), -7);
        return (up + 1) * gate * sigmoid(1.702 * gate);
    }
    return NAN;
}

static void test_activate(void **state)
{
    (void)state;
    enum { COUNT = 1037 };
    for (int kind = ACTIVATION_SILU; kind <= ACTIVATION_GPT_OSS; kind++) {
        enum activation activation = (enum activation)kind;
        float *gate = random_floats(COUNT), *up = random_floats(COUNT), *want = zeroed(COUNT * sizeof *want);
        for (int i = 0; i < 300; i++)
            gate[i] = (float)(i - 150);
        for (int i = 300; i < 330; i++)
            up[i] = (float)(i - 315);
        baseline.activate(want, gate, up, COUNT, activation);
        for (int i = 0; i < COUNT; i++) {
            double exact = activation_reference(gate[i], up[i], activation);
            // exp 2 ulp, then four roundings; where the result vanishes, the roundings of a large argument show.
            assert_true(fabs(want[i] - exact) <= 2e-6 * fabs(exact) + (gate[i] < -2 ? 1e-9 : 1e-36));
        }
        for (int n = 0; kernels_all[n]; n++) {
            if (!kernels_all[n]->supported())
                continue;
            float *out = zeroed(COUNT * sizeof *out);
            memcpy(out, gate, COUNT * sizeof *out);
            kernels_all[n]->activate(out, out, up, COUNT, activation); // in place
            assert_same(out, want, COUNT, "activate");
            float nan = NAN, one = 1, result = 0;
            kernels_all[n]->activate(&result, &nan, &one, 1, activation);
            assert_true(isnan(result));
            kernels_all[n]->activate(&result, &one, &nan, 1, activation);
            assert_true(isnan(result));
            free(out);
        }
        free(gate);
        free(up);
        free(want);
    }
}

// Entry (i, j) of the Hadamard matrix in Sylvester's order: -1 where i and j have an odd number of bits in common.
static void test_hadamard(void **state)
{
    (void)state;
    enum { COUNT = 512 };
    for (int64_t block = 2; block <= KERNELS_MAX_ROTATION; block *= 2) {
        float *x = random_floats(COUNT), *want = zeroed(COUNT * sizeof *want);
        memcpy(want, x, COUNT * sizeof *want);
        baseline.hadamard(want, COUNT, block);
        for (int64_t i = 0; i < COUNT; i++) {
            double exact = 0, magnitude = 0;
            for (int64_t j = 0; j < block; j++) {
                double term = x[i / block * block + j];
                exact += __builtin_parityll((unsigned long long)(i % block & j)) ? -term : term;
                magnitude += fabs(term);
            }
            exact /= sqrt((double)block);
            // log2(block) sums and two products round, each by 2^-24 of what stands there at most.
            assert_true(fabs(want[i] - exact) <= 10 * 0x1p-24 * magnitude / sqrt((double)block));
        }
        for (int n = 0; kernels_all[n]; n++) {
            if (!kernels_all[n]->supported())
                continue;
            float *out = zeroed(COUNT * sizeof *out);
            memcpy(out, x, COUNT * sizeof *out);
            kernels_all[n]->hadamard(out, COUNT, block);
            assert_same(out, want, COUNT, "hadamard");
            kernels_all[n]->hadamard(out, 0, block); // a rank that holds nothing
            out[0] = NAN;
            kernels_all[n]->hadamard(out, COUNT, block);
            for (int64_t i = 0; i < COUNT; i++)
                assert_true(isnan(out[i]) == (i < block));
            free(out);
        }
        free(x);
        free(want);
    }
}

static void test_rows(void **state)
{
    (void)state;
    enum { COUNT = 1037, ROWS = 19, COLS = 83, STRIDE = 96 };
    float *x = random_floats(COUNT), *y = random_floats(COUNT), *rows = random_floats(ROWS);
    uint16_t w[ROWS * STRIDE];
    for (int i = 0; i < ROWS * STRIDE; i++)
        w[i] = f32_to_bf16(uniform());
    for (int n = 0; kernels_all[n]; n++) {
        if (!kernels_all[n]->supported())
            continue;
        const struct kernels *k = kernels_all[n];
        float out[COUNT], same_out[COUNT];
        memcpy(out, y, sizeof out);
        k->add(out, x, COUNT);
        for (int i = 0; i < COUNT; i++)
            assert_true(out[i] == y[i] + x[i]);
        memcpy(out, y, sizeof out);
        k->add_scaled(out, x, COUNT, 0.3f);
        for (int i = 0; i < COUNT; i++)
            assert_true(out[i] == y[i] + 0.3f * x[i]);

        memcpy(out, x, sizeof out);
        out[5] = 1e30f, out[6] = -INFINITY, out[7] = NAN;
        k->softcap(out, COUNT, 30);
        assert_true(out[5] == 30 && out[6] == -30 && isnan(out[7]));
        for (int i = 8; i < COUNT; i++)
            assert_true(fabs(out[i] - 30 * tanh((double)x[i] / 30)) <= 1e-5); // tanh by way of 1 - 2/(exp + 1)
        memcpy(same_out, x, sizeof same_out);
        same_out[5] = 1e30f, same_out[6] = -INFINITY, same_out[7] = NAN;
        baseline.softcap(same_out, COUNT, 30);
        assert_same(out, same_out, COUNT, "softcap");

        k->mix_rows(out, rows, w, STRIDE, ROWS, COLS);
        baseline.mix_rows(same_out, rows, w, STRIDE, ROWS, COLS);
        assert_same(out, same_out, COLS, "mix_rows");
        for (int i = 0; i < COLS; i++) {
            double exact = 0;
            for (int r = 0; r < ROWS; r++)
                exact += (double)rows[r] * bf16_to_f32(w[r * STRIDE + i]);
            assert_true(fabs(out[i] - exact) <= 2e-5);
        }
        k->dot_rows(out, x, w, STRIDE, ROWS, COLS);
        baseline.dot_rows(same_out, x, w, STRIDE, ROWS, COLS);
        assert_same(out, same_out, ROWS, "dot_rows");
        for (int r = 0; r < ROWS; r++) {
            double exact = 0;
            for (int i = 0; i < COLS; i++)
                exact += (double)x[i] * bf16_to_f32(w[r * STRIDE + i]);
            assert_true(fabs(out[r] - exact) <= 2e-5);
        }
        assert_true(k->squares(x, COUNT) == baseline.squares(x, COUNT));
        // A row normed in two parts by the sum of both is the row normed at once, up to the sum's rounding.
        k->rms_norm(out, x, y, COUNT, 1e-6f);
        double squares = k->squares(x, 500) + k->squares(x + 500, COUNT - 500);
        k->scale_norm(same_out, x, y, 500, squares, COUNT, 1e-6f);
        k->scale_norm(same_out + 500, x + 500, y + 500, COUNT - 500, squares, COUNT, 1e-6f);
        for (int i = 0; i < COUNT; i++)
            assert_true(fabsf(out[i] - same_out[i]) <= 1e-6f * fabsf(out[i]));
    }
    free(x);
    free(y);
    free(rows);
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
            bool interleaved = (h + p) % 2;
            int64_t step = interleaved ? 2 : 1, pair = interleaved ? 1 : half;
            baseline.rope(want, cosine, sine, dim, interleaved);
            for (int64_t i = 0; i < half; i++) {
                double angle =
                    (float)positions[p] * inv_freq[i]; // rounded to f32, as the reference implementation does
                double c = cos(angle) * factor, s = sin(angle) * factor, a = x[i * step], b = x[i * step + pair];
                assert_true(fabs(want[i * step] - (a * c - b * s)) <= 1e-6 * (fabs(a) + fabs(b)));
                assert_true(fabs(want[i * step + pair] - (b * c + a * s)) <= 1e-6 * (fabs(a) + fabs(b)));
            }
            for (int n = 0; kernels_all[n]; n++) {
                if (!kernels_all[n]->supported())
                    continue;
                float *y = zeroed(2 * bytes), *c = zeroed(bytes), *s = zeroed(bytes);
                kernels_all[n]->rope_table(c, s, inv_freq, half, positions[p], factor);
                memcpy(y, x, 2 * bytes);
                kernels_all[n]->rope(y, c, s, dim, interleaved);
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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_exp),  cmocka_unit_test(test_activate), cmocka_unit_test(test_hadamard),
        cmocka_unit_test(test_rows), cmocka_unit_test(test_rms_norm), cmocka_unit_test(test_rope),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
