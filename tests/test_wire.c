// Wire codecs: goldens of a second implementation, every target the same bits, the borders of the s8x code, sums
// against fmaf, and the error figures that the choice of the codecs rests on.
#include "kernels/wire.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "tests/random_help.h"

static double uniform(void) { return ((double)(random_bits() >> 11) + 0.5) * 0x1p-53; }
static double gaussian(void) { return sqrt(-2 * log(uniform())) * cos(6.283185307179586 * uniform()); }

static int hex_digit(char c) { return c <= '9' ? c - '0' : c - 'a' + 10; }

static int read_hex_floats(float *out, const char *hex)
{
    int count = (int)strlen(hex) / 8;
    assert_true(count <= WIRE_GROUP);
    for (int i = 0; i < count; i++) {
        uint32_t bits = 0;
        for (int k = 0; k < 8; k++)
            bits = bits << 4 | (uint32_t)hex_digit(hex[8 * i + k]);
        out[i] = f32_from_bits(bits);
    }
    return count;
}

static void test_goldens(void **state)
{
    (void)state;
    FILE *file = fopen("tests/golden/wire/groups.txt", "r");
    if (!file)
        fail_msg("cannot open tests/golden/wire/groups.txt (run from the repository root)");
    char name[64], codec[8], input_hex[1100], wire_hex[1100], decoded_hex[1100];
    int count, lines = 0;
    for (; fscanf(file, "%63s %7s %d %1099s %1099s %1099s", name, codec, &count, input_hex, wire_hex, decoded_hex) == 6;
         lines++) {
        enum wire wire;
        assert_true(wire_from_name(codec, &wire));
        // Exact heap copies: a read or write past the end shows under the address sanitizer.
        size_t group_bytes = wire_group_bytes(wire), floats_bytes = (size_t)count * sizeof(float);
        float *x = malloc(floats_bytes), *decoded = malloc(floats_bytes);
        uint8_t *bytes = malloc(group_bytes), *want = malloc(group_bytes);
        float parsed[WIRE_GROUP] = {0}, want_decoded[WIRE_GROUP] = {0};
        assert_int_equal(read_hex_floats(parsed, input_hex), count);
        assert_int_equal(read_hex_floats(want_decoded, decoded_hex), count);
        memcpy(x, parsed, floats_bytes);
        assert_int_equal(strlen(wire_hex), 2 * group_bytes);
        for (size_t i = 0; i < group_bytes; i++)
            want[i] = (uint8_t)(hex_digit(wire_hex[2 * i]) << 4 | hex_digit(wire_hex[2 * i + 1]));
        for (int t = 0; wire_target_at(t); t++) {
            const struct wire_target *target = wire_target_at(t);
            target->encode[wire](bytes, x, count);
            for (size_t i = 0; i < group_bytes; i++)
                if (bytes[i] != want[i])
                    fail_msg("%s %s %s: byte %zu is %02x, wanted %02x", target->name, name, codec, i, bytes[i],
                             want[i]);
            target->decode[wire](decoded, want, count);
            for (int i = 0; i < count; i++) {
                uint32_t got_bits = f32_bits(decoded[i]), want_bits = f32_bits(want_decoded[i]);
                if (got_bits != want_bits)
                    fail_msg("%s %s %s: value %d is %08x (%g), wanted %08x (%g)", target->name, name, codec, i,
                             got_bits, (double)decoded[i], want_bits, (double)want_decoded[i]);
            }
        }
        free(x), free(decoded), free(bytes), free(want);
    }
    fclose(file);
    assert_int_equal(lines, 4 * 29);
}

// A group of random bits with exponents near each other, so that all codecs have something to do; now and then a
// special value.
static void random_group(float *x, int kind)
{
    for (int i = 0; i < WIRE_GROUP; i++) {
        uint64_t bits = random_bits();
        uint32_t exponent =
            kind == 0 ? 127 + (uint32_t)(bits >> 40) % 8 : (uint32_t)(bits >> 40) % (kind == 1 ? 160 : 255);
        x[i] = f32_from_bits((uint32_t)(bits & 0x807fffff) | exponent << 23);
    }
    static const uint32_t special[] = {0, 0x80000000, 1, 0x807fffff, 0x7f7fffff, 0xff7fffff};
    if (kind == 3)
        for (int i = 0; i < 20; i++)
            x[random_bits() % WIRE_GROUP] = f32_from_bits(special[random_bits() % 6]);
    if (kind == 4)
        x[random_bits() % WIRE_GROUP] = f32_from_bits(random_bits() % 2 ? 0x7f800000 : 0xffc12345);
}

// Feeding, value by value as wire.h says it, three times.
static void check_feed(const struct wire_target *target, enum wire wire, const float *x, int count)
{
    uint16_t lost[WIRE_GROUP] = {0}, want_lost[WIRE_GROUP] = {0};
    for (int round = 0; round < 3; round++) {
        float t[WIRE_GROUP] = {0}, want[WIRE_GROUP], decoded[WIRE_GROUP];
        uint8_t bytes[WIRE_MAX_GROUP_BYTES], want_bytes[WIRE_MAX_GROUP_BYTES];
        for (int i = 0; i < count; i++)
            t[i] = x[i] + bf16_to_f32(want_lost[i]);
        wire_target_at(0)->encode[wire](want_bytes, t, count);
        wire_target_at(0)->decode[wire](want, want_bytes, count);
        for (int i = 0; i < count; i++) {
            want_lost[i] = f32_to_bf16(t[i] - want[i]);
            if (!isfinite(bf16_to_f32(want_lost[i])))
                want_lost[i] = 0;
        }
        memcpy(decoded, x, sizeof decoded); // in place
        target->feed[wire](bytes, decoded, decoded, lost, count);
        assert_memory_equal(bytes, want_bytes, wire_group_bytes(wire));
        assert_memory_equal(decoded, want, (size_t)count * sizeof *want);
        for (int i = count; i < WIRE_GROUP; i++) // beyond count: untouched
            assert_int_equal(f32_bits(decoded[i]), f32_bits(x[i]));
        assert_memory_equal(lost, want_lost, sizeof lost);
    }
}

// Adding up, against the steps that it is made of.
static void check_add_up(const struct wire_target *target, enum wire wire, const float *x, int count, int round)
{
    enum { RANKS = 3 };
    static uint8_t bytes[RANKS][WIRE_MAX_GROUP_BYTES];
    const uint8_t *parts[RANKS] = {bytes[0], bytes[1], bytes[2]};
    int ranks = 2 + round % 2, own = round / 2 % ranks;
    float part[WIRE_GROUP], sum[WIRE_GROUP] = {0}, want[WIRE_GROUP], got[WIRE_GROUP];
    uint8_t out[WIRE_MAX_GROUP_BYTES], want_out[WIRE_MAX_GROUP_BYTES];
    for (int rank = 0; rank < ranks; rank++) {
        for (int i = 0; i < WIRE_GROUP; i++)
            part[i] = rank == own ? x[i] : -x[(i + 5 * rank) % WIRE_GROUP];
        wire_target_at(0)->encode[wire](bytes[rank], part, count);
        bool exact = rank == own && wire != WIRE_BF16;
        if (exact)
            wire_target_at(0)->encode[WIRE_F32](want_out, part, count);
        wire_target_at(0)->add[exact ? WIRE_F32 : wire](sum, exact ? want_out : bytes[rank], count);
    }
    wire_target_at(0)->encode[wire](want_out, sum, count);
    wire_target_at(0)->decode[wire](want, want_out, count);
    memcpy(got, x, sizeof got);
    memset(bytes[own], 0x77, sizeof bytes[own]); // not read
    target->add_up[wire](out, got, parts, own, ranks, count);
    assert_memory_equal(out, want_out, wire_group_bytes(wire));
    assert_memory_equal(got, want, (size_t)count * sizeof *want);
    for (int i = count; i < WIRE_GROUP; i++)
        assert_int_equal(f32_bits(got[i]), f32_bits(x[i]));
}

// Summing up parts that nobody has encoded, against what others encode and the owner adds up.
static void check_sum(const struct wire_target *target, enum wire wire, const float *x, int count, int round)
{
    enum { RANKS = 3 };
    uint8_t bytes[RANKS][WIRE_MAX_GROUP_BYTES], out[WIRE_MAX_GROUP_BYTES];
    const uint8_t *encoded[RANKS] = {bytes[0], bytes[1], bytes[2]};
    float parts[RANKS][WIRE_GROUP], want[WIRE_GROUP], got[WIRE_GROUP];
    const float *at[RANKS] = {parts[0], parts[1], parts[2]};
    int ranks = 2 + round % 2, own = round / 2 % ranks;
    for (int rank = 0; rank < ranks; rank++) {
        for (int i = 0; i < WIRE_GROUP; i++)
            parts[rank][i] = rank == own ? x[i] : -x[(i + 5 * rank) % WIRE_GROUP];
        wire_target_at(0)->encode[wire](bytes[rank], parts[rank], count);
    }
    memcpy(want, parts[own], sizeof want);
    wire_target_at(0)->add_up[wire](out, want, encoded, own, ranks, count);
    memcpy(got, x, sizeof got);
    target->sum[wire](got, at, own, ranks, count);
    assert_memory_equal(got, want, (size_t)count * sizeof *want);
    for (int i = count; i < WIRE_GROUP; i++)
        assert_int_equal(f32_bits(got[i]), f32_bits(x[i]));
}

static void test_targets_agree(void **state)
{
    (void)state;
    if (!wire_target_at(1)) {
        print_message("only one target on this machine\n");
        skip();
    }
    for (int round = 0; round < 20000; round++) {
        float x[WIRE_GROUP], sums[2][WIRE_GROUP], decoded[2][WIRE_GROUP];
        uint8_t bytes[2][WIRE_MAX_GROUP_BYTES];
        random_group(x, round % 5);
        int count = round % 3 ? WIRE_GROUP : 1 + (int)(random_bits() % WIRE_GROUP);
        for (int wire = 0; wire < WIRE_COUNT; wire++) {
            memset(bytes, 0xaa, sizeof bytes);
            for (int t = 0; t < 2; t++) {
                const struct wire_target *target = wire_target_at(t);
                target->encode[wire](bytes[t], x, count);
                for (int i = 0; i < count; i++)
                    sums[t][i] = x[WIRE_GROUP - 1 - i];
                target->add[wire](sums[t], bytes[0], count);
                target->decode[wire](decoded[t], bytes[0], count);
                check_feed(target, (enum wire)wire, x, count);
                check_add_up(target, (enum wire)wire, x, count, round);
                check_sum(target, (enum wire)wire, x, count, round);
            }
            assert_memory_equal(bytes[0], bytes[1], sizeof bytes[0]);
            assert_memory_equal(sums[0], sums[1], (size_t)count * sizeof(float));
            assert_memory_equal(decoded[0], decoded[1], (size_t)count * sizeof(float));
        }
    }
}

// Sums as kernels/wire.h states them, value by value.
static void test_add_is_fma(void **state)
{
    (void)state;
    for (int round = 0; round < 3000; round++) {
        float x[WIRE_GROUP], before[WIRE_GROUP], sum[WIRE_GROUP];
        uint8_t bytes[WIRE_MAX_GROUP_BYTES];
        random_group(x, 0);
        random_group(before, round % 2);
        int count = round % 2 ? WIRE_GROUP : 1 + (int)(random_bits() % WIRE_GROUP);
        for (int wire = 0; wire < WIRE_COUNT; wire++) {
            wire_encode_group(bytes, x, count, (enum wire)wire);
            memcpy(sum, before, sizeof sum);
            wire_add_group(sum, bytes, count, (enum wire)wire);
            for (int i = 0; i < WIRE_GROUP; i++) {
                float want = before[i], scale;
                uint16_t half;
                memcpy(&scale, bytes + WIRE_GROUP, sizeof scale);
                if (i < count && wire == WIRE_F32) {
                    memcpy(&scale, bytes + 4 * i, sizeof scale);
                    want += scale;
                } else if (i < count && wire == WIRE_BF16) {
                    memcpy(&half, bytes + 2 * i, sizeof half);
                    want += bf16_to_f32(half);
                } else if (i < count && wire == WIRE_FP8) {

                    want = fmaf(e4m3_to_f32(bytes[i]), scale, before[i]);
                } else if (i < count) {
                    want = fmaf((float)(int8_t)bytes[i], s8x_scale(bytes[S8X_CODE_BYTE]), want);
                    memcpy(&half, bytes + S8X_SPIKE_BYTE + 1, sizeof half);
                    want += i == bytes[S8X_SPIKE_BYTE] ? bf16_to_f32(half) : 0.0f;
                }
                assert_int_equal(f32_bits(sum[i]), f32_bits(want)); // beyond count: untouched
            }
        }
    }
}

// The code of every float in the working range is the smallest that suffices.
static void test_s8x_code(void **state)
{
    (void)state;
    for (int code = 0; code <= S8X_MAX_CODE; code++) {
        uint32_t limit = f32_bits(127.0f * s8x_scale(code));
        assert_int_equal(s8x_code(limit), code);
        assert_int_equal(s8x_code(limit + 1), code + 1);
        assert_true(f32_bits(s8x_scale(code)) < f32_bits(s8x_scale(code + 1)));
        double exact = exp2(code / 8.0 - 20);
        assert_true(fabs((double)s8x_scale(code) - exact) <= exact * 0x1p-24);
        assert_true(fabs((double)s8x_inverse(code) - 1 / exact) <= 0x1p-24 / exact);
        // Rounding needs no clamp worth the name: the largest value of a group stays within +-127.
        assert_true(rint((double)(f32_from_bits(limit) * s8x_inverse(code))) <= 127);
    }
    assert_int_equal(s8x_code(0), 0);
    assert_int_equal(s8x_code(1), 0);
    assert_true(s8x_code(0x7f7fffff) > S8X_MAX_CODE);
    for (int i = 0; i < 1000000; i++) {
        uint32_t bits = (uint32_t)(random_bits() & 0x7fffff) | (uint32_t)(100 + random_bits() % 45) << 23;
        int code = s8x_code(bits);
        if (code <= S8X_MAX_CODE)
            assert_true(127.0f * s8x_scale(code) >= f32_from_bits(bits));
        if (code > 0)
            assert_true(127.0f * s8x_scale(code - 1) < f32_from_bits(bits));
    }
}

static void test_names(void **state)
{
    (void)state;
    static const struct {
        const char *name;
        int bytes;
    } cases[WIRE_COUNT] = {{"bf16", 256}, {"fp8", 132}, {"s8x", 132}, {"f32", 512}};
    for (int i = 0; i < WIRE_COUNT; i++) {
        enum wire wire;
        assert_true(wire_from_name(cases[i].name, &wire));
        assert_int_equal(wire, i);
        assert_string_equal(wire_name(wire), cases[i].name);
        assert_int_equal(wire_group_bytes(wire), cases[i].bytes);
    }
    enum wire wire;
    assert_false(wire_from_name("fp4", &wire));
    assert_false(wire_from_name("", &wire));
    assert_int_equal(wire_groups(0), 0);
    assert_int_equal(wire_groups(1), 1);
    assert_int_equal(wire_groups(128), 1);
    assert_int_equal(wire_groups(129), 2);
}

// ---- error figures -------------------------------------------------------------------------------------------------
// The data that the codecs were chosen on: rows of 8192 channels, independent parts from each rank rounded to bf16,
// Gaussian, either as they are or with 8 channels (0.1 %) 50 times as large; result rounded to bf16; relative L2 error.
// The stated figures of bf16 and fp8 are the root mean square of the rows' errors, those of s8x are pooled over all
// rows (lower with outliers: rows with small outliers weigh less). A tolerance of 5 % covers the choice of random
// numbers: figures of all channels hang on 8 values a row and vary by 3 % between seeds, the others by less than 1 %.

enum { ERROR_COLS = 8192, ERROR_ROWS = 128, MAX_RANKS = 8 };
static float parts[MAX_RANKS][ERROR_COLS], result[ERROR_COLS];

static bool is_outlier(int col) { return (col - 77) % 1021 == 0 && col >= 77; }

static void make_parts(int tp_size, bool outliers)
{
    for (int col = 0; col < ERROR_COLS; col++)
        for (int rank = 0; rank < tp_size; rank++) {
            float value = (float)gaussian() * (outliers && is_outlier(col) ? 50.0f : 1.0f);
            parts[rank][col] = bf16_to_f32(f32_to_bf16(value));
        }
}

// Every rank's part through the codec, summed; no second rounding.
static void one_shot(int tp_size, enum wire wire)
{
    uint8_t bytes[WIRE_MAX_GROUP_BYTES];
    for (int col = 0; col < ERROR_COLS; col += WIRE_GROUP) {
        memset(result + col, 0, WIRE_GROUP * sizeof(float));
        for (int rank = 0; rank < tp_size; rank++) {
            wire_encode_group(bytes, parts[rank] + col, WIRE_GROUP, wire);
            wire_add_group(result + col, bytes, WIRE_GROUP, wire);
        }
    }
}

// As in comm_all_reduce: the owner's part exact but with bf16, the sum through the codec once more.
static void two_shot(int tp_size, enum wire wire)
{
    uint8_t bytes[WIRE_MAX_GROUP_BYTES];
    for (int col = 0; col < ERROR_COLS; col += WIRE_GROUP) {
        int owner = col / WIRE_GROUP % tp_size;
        float sum[WIRE_GROUP] = {0};
        for (int rank = 0; rank < tp_size; rank++) {
            wire_encode_group(bytes, parts[rank] + col, WIRE_GROUP, wire);
            if (rank != owner || wire == WIRE_BF16)
                wire_add_group(sum, bytes, WIRE_GROUP, wire);
            else
                for (int i = 0; i < WIRE_GROUP; i++)
                    sum[i] += parts[rank][col + i];
        }
        wire_encode_group(bytes, sum, WIRE_GROUP, wire);
        wire_decode_group(result + col, bytes, WIRE_GROUP, wire);
    }
}

struct figure {
    void (*method)(int tp_size, enum wire wire);
    const char *name;
    enum wire wire;
    double all[3], bulk[3]; // stated, in per cent, at tp 2, 4, 8; bulk: channels that are no outliers
};

static const struct figure gaussian_figures[] = {
    {two_shot, "two-shot", WIRE_BF16, {.18, .17, .17}, {0}},
    {one_shot, "one-shot", WIRE_FP8, {2.58, 2.58, 2.58}, {0}},
    {two_shot, "two-shot", WIRE_FP8, {3.15, 3.41, 3.52}, {0}},
    {two_shot, "two-shot", WIRE_S8X, {.75, .81, .82}, {0}},
};
static const struct figure outlier_figures[] = {
    {two_shot, "two-shot", WIRE_BF16, {.18, .18, .17}, {.18, .17, .17}},
    {two_shot, "two-shot", WIRE_FP8, {1.80, 2.00, 2.06}, {3.17, 3.42, 3.53}},
    {two_shot, "two-shot", WIRE_S8X, {.42, .47, .49}, {.76, .83, .84}},
};

// Sums over rows, [0] all channels, [1] bulk.
struct errors {
    double relative[2], error[2], norm[2]; // squared
};

static void add_row_error(struct errors *errors, int tp_size, bool outliers)
{
    double error[2] = {0}, norm[2] = {0};
    for (int col = 0; col < ERROR_COLS; col++) {
        double exact = 0, got = (double)bf16_to_f32(f32_to_bf16(result[col]));
        for (int rank = 0; rank < tp_size; rank++)
            exact += (double)parts[rank][col];
        int kinds = outliers && is_outlier(col) ? 1 : 2;
        for (int bulk = 0; bulk < kinds; bulk++) {
            error[bulk] += (got - exact) * (got - exact);
            norm[bulk] += exact * exact;
        }
    }
    for (int bulk = 0; bulk < 2; bulk++) {
        errors->relative[bulk] += error[bulk] / norm[bulk];
        errors->error[bulk] += error[bulk];
        errors->norm[bulk] += norm[bulk];
    }
}

static int check_figures(const struct figure *figures, size_t count, bool outliers)
{
    int failures = 0;
    for (int t = 0; t < 3; t++) {
        int tp_size = 2 << t;
        struct errors errors[4] = {0};
        for (int row = 0; row < ERROR_ROWS; row++) {
            make_parts(tp_size, outliers);
            for (size_t f = 0; f < count; f++) {
                figures[f].method(tp_size, figures[f].wire);
                add_row_error(&errors[f], tp_size, outliers);
            }
        }
        for (size_t f = 0; f < count; f++)
            for (int bulk = 0; bulk < 2; bulk++) {
                double want = bulk ? figures[f].bulk[t] : figures[f].all[t];
                bool pooled = figures[f].wire == WIRE_S8X;
                double square =
                    pooled ? errors[f].error[bulk] / errors[f].norm[bulk] : errors[f].relative[bulk] / ERROR_ROWS;
                double percent = 100 * sqrt(square);
                bool good = want == 0 || fabs(percent - want) <= 0.05 * want + 0.005; // stated with two digits
                failures += !good;
                if (want > 0)
                    print_message("%s %s tp %d %s %s: %.3f %% (stated %.2f)%s\n", figures[f].name,
                                  wire_name(figures[f].wire), tp_size, outliers ? "outliers" : "Gaussian",
                                  bulk ? "bulk" : "all", percent, want, good ? "" : "  WRONG");
            }
    }
    return failures;
}

static void test_error_figures(void **state)
{
    (void)state;
    random_state = 77;
    int failures = check_figures(gaussian_figures, sizeof gaussian_figures / sizeof *gaussian_figures, false);
    failures += check_figures(outlier_figures, sizeof outlier_figures / sizeof *outlier_figures, true);
    assert_int_equal(failures, 0);
}

// ---- error feedback ------------------------------------------------------------------------------------------------
// A residual stream of SUMS sums at tp 4, of the same data with outliers: its relative error (all channels) at the end,
// with error feedback and without. The figures are of a simulation in another language; they hang on few outliers as
// those above, their ratio does not.

enum { SUMS = 160, STREAM_ROWS = 3 };

// Adds tp_size parts to the residual, over the wire.
static void add_to_residual(float *residual, int tp_size, enum wire wire, uint16_t (*lost)[ERROR_COLS])
{
    uint8_t bytes[WIRE_MAX_GROUP_BYTES];
    float decoded[WIRE_GROUP];
    static uint16_t nothing[WIRE_GROUP];
    for (int col = 0; col < ERROR_COLS; col += WIRE_GROUP) {
        int owner = col / WIRE_GROUP % tp_size;
        float sum[WIRE_GROUP] = {0};
        for (int rank = 0; rank < tp_size; rank++) {
            if (rank != owner) {
                memset(nothing, 0, sizeof nothing);
                wire_feed_group(bytes, decoded, parts[rank] + col, lost ? lost[rank] + col : nothing, WIRE_GROUP, wire);
                wire_add_group(sum, bytes, WIRE_GROUP, wire);
            } else {
                for (int i = 0; i < WIRE_GROUP; i++)
                    sum[i] += parts[rank][col + i];
            }
        }
        memset(nothing, 0, sizeof nothing);
        wire_feed_group(bytes, sum, sum, lost ? lost[owner] + col : nothing, WIRE_GROUP, wire);
        for (int i = 0; i < WIRE_GROUP; i++)
            residual[col + i] += sum[i];
    }
}

static void test_error_feedback(void **state)
{
    (void)state;
    enum { TP = 4, FIGURES = 3 };
    static const struct {
        enum wire wire;
        double fed, unfed; // per cent
    } figures[FIGURES] = {{WIRE_FP8, .154, 1.94}, {WIRE_S8X, .036, .454}, {WIRE_F32, 0, 0}};
    static float residual[FIGURES][2][ERROR_COLS];
    static uint16_t lost[FIGURES][TP][ERROR_COLS];
    static double exact[ERROR_COLS];
    double error[FIGURES][2] = {{0}}, norm = 0;
    random_state = 78;
    for (int row = 0; row < STREAM_ROWS; row++) {
        memset(residual, 0, sizeof residual);
        memset(lost, 0, sizeof lost);
        memset(exact, 0, sizeof exact);
        for (int sum = 0; sum < SUMS; sum++) {
            make_parts(TP, true);
            for (int col = 0; col < ERROR_COLS; col++)
                for (int rank = 0; rank < TP; rank++)
                    exact[col] += (double)parts[rank][col];
            for (int f = 0; f < FIGURES; f++)
                for (int fed = 0; fed < 2; fed++)
                    add_to_residual(residual[f][fed], TP, figures[f].wire, fed ? lost[f] : NULL);
        }
        for (int col = 0; col < ERROR_COLS; col++) {
            norm += exact[col] * exact[col];
            for (int f = 0; f < FIGURES; f++)
                for (int fed = 0; fed < 2; fed++)
                    error[f][fed] += pow((double)residual[f][fed][col] - exact[col], 2);
        }
    }
    for (int f = 0; f < FIGURES; f++) {
        double fed = 100 * sqrt(error[f][1] / norm), unfed = 100 * sqrt(error[f][0] / norm);
        const char *name = wire_name(figures[f].wire);
        print_message("after %d sums, %s: %.4f %% fed back (stated %.3f), %.4f %% not (stated %.3f)\n", SUMS, name, fed,
                      figures[f].fed, unfed, figures[f].unfed);
        if (!(fabs(fed - figures[f].fed) <= 0.12 * figures[f].fed + 0.0002) ||
            !(fabs(unfed - figures[f].unfed) <= 0.12 * figures[f].unfed + 0.0002))
            fail_msg("%s: not the stated figures", name);
        if (wire_is_compressed(figures[f].wire) && !(unfed / fed >= 12 && unfed / fed <= 13.5))
            fail_msg("%s: error feedback makes the error %.2f times smaller, not 12 to 13.5 times", name, unfed / fed);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_error_feedback), cmocka_unit_test(test_goldens),  cmocka_unit_test(test_targets_agree),
        cmocka_unit_test(test_add_is_fma),     cmocka_unit_test(test_s8x_code), cmocka_unit_test(test_names),
        cmocka_unit_test(test_error_figures),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
