// Number formats against goldens made with numpy and ml_dtypes (scripts/make_goldens_numbers.py says what each
// series holds): every code upwards; downwards every value, every midpoint and its neighbours, and a million patterns.
#include "formats/number_formats.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <cmocka.h>

enum { BLOCK = 4096, RANDOM = 245 * BLOCK, GOLDENS_MAX = 1024 };
static const uint64_t SEED = 20240607;

// A golden series that is consumed number by number.
struct golden {
    const char *name;
    uint64_t values[GOLDENS_MAX];
    size_t count, next;
    uint64_t hash;
    size_t in_block, block_elems;
};

static void golden_load(struct golden *golden, const char *name, size_t block_elems)
{
    char path[256];
    snprintf(path, sizeof path, "tests/golden/numbers/%s.txt", name);
    *golden = (struct golden){.name = name, .block_elems = block_elems, .hash = 0xcbf29ce484222325};
    FILE *file = fopen(path, "r");
    if (!file)
        fail_msg("cannot open %s (run from the repository root)", path);
    while (golden->count < GOLDENS_MAX && fscanf(file, "%lx", &golden->values[golden->count]) == 1)
        golden->count++;
    fclose(file);
    assert_in_range(golden->count, 1, GOLDENS_MAX - 1);
}

static void golden_expect(struct golden *golden, uint64_t got)
{
    if (golden->next >= golden->count)
        fail_msg("%s: more results than goldens", golden->name);
    if (got != golden->values[golden->next])
        fail_msg("%s: line %zu is %lx, golden %lx", golden->name, golden->next + 1, got, golden->values[golden->next]);
    golden->next++;
}

static void golden_flush(struct golden *golden)
{
    if (golden->in_block) {
        golden_expect(golden, golden->hash);
        golden->hash = 0xcbf29ce484222325;
        golden->in_block = 0;
    }
}

// Adds one result of result_bytes to the running hash (FNV-1a 64) and compares at the end of a block.
static void golden_hash(struct golden *golden, uint32_t result, int result_bytes)
{
    for (int i = 0; i < result_bytes; i++)
        golden->hash = (golden->hash ^ (result >> 8 * i & 0xff)) * 0x100000001b3;
    if (++golden->in_block == golden->block_elems)
        golden_flush(golden);
}

static void golden_end(struct golden *golden)
{
    golden_flush(golden);
    assert_int_equal(golden->next, golden->count);
}

static uint64_t splitmix64(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
}

static uint32_t one_nan(float value) { return value != value ? 0x7fc00000 : f32_bits(value); }

// The formats that f32 is rounded to, with NaN made one value.
static uint32_t to_bf16(float value) { return value != value ? 0x7fc0 : f32_to_bf16(value); }
static uint32_t to_f16(float value) { return value != value ? 0x7e00 : f32_to_f16(value); }
static uint32_t to_e4m3(float value)
{
    uint8_t code = f32_to_e4m3(value);
    return (code & 0x7f) == 0x7f ? 0x7f : code;
}
static uint32_t to_e2m1(float value) { return f32_to_e2m1(value); }
static uint32_t to_int8(float value) { return (uint8_t)f32_to_int8(value); }
static uint32_t to_int4(float value) { return (uint8_t)f32_to_int4(value); }
static float from_bf16(uint32_t code) { return bf16_to_f32((uint16_t)code); }
static float from_f16(uint32_t code) { return f16_to_f32((uint16_t)code); }
static float from_e4m3(uint32_t code) { return e4m3_to_f32((uint8_t)code); }
static float from_e2m1(uint32_t code) { return e2m1_to_f32((uint8_t)code); }

static const struct float_format {
    const char *name;
    uint32_t (*from_f32)(float);
    float (*to_f32)(uint32_t);
    int bytes;
    uint32_t max_finite_code;
    double beyond; // the value that would follow the largest finite one
} float_formats[] = {
    {"bf16", to_bf16, from_bf16, 2, 0x7f7f, 0x1p128},
    {"f16", to_f16, from_f16, 2, 0x7bff, 65536.0},
    {"e4m3", to_e4m3, from_e4m3, 1, 0x7e, 480.0},
    {"e2m1", to_e2m1, from_e2m1, 1, 7, 8.0},
};
enum { NUM_FLOAT_FORMATS = sizeof float_formats / sizeof *float_formats };

static void test_upcasts_equal_goldens(void **state)
{
    (void)state;
    struct golden golden;
    golden_load(&golden, "e4m3_to_f32", 1);
    for (uint32_t code = 0; code < 256; code++)
        golden_expect(&golden, one_nan(e4m3_to_f32((uint8_t)code)));
    golden_end(&golden);
    golden_load(&golden, "e5m2_to_f32", 1);
    for (uint32_t code = 0; code < 256; code++)
        golden_expect(&golden, one_nan(e5m2_to_f32((uint8_t)code)));
    golden_end(&golden);
    golden_load(&golden, "e2m1_to_f32", 1);
    for (uint32_t code = 0; code < 16; code++)
        golden_expect(&golden, f32_bits(e2m1_to_f32((uint8_t)code)));
    golden_end(&golden);
    golden_load(&golden, "e8m0_to_f32", 1);
    for (uint32_t code = 0; code < 256; code++)
        golden_expect(&golden, one_nan(e8m0_to_f32((uint8_t)code)));
    golden_end(&golden);
    golden_load(&golden, "f16_to_f32", 256);
    for (uint32_t code = 0; code < 65536; code++)
        golden_hash(&golden, one_nan(f16_to_f32((uint16_t)code)), 4);
    golden_end(&golden);
    for (uint32_t code = 0; code < 65536; code++)
        assert_int_equal(f32_bits(bf16_to_f32((uint16_t)code)), code << 16);
}

static void test_every_code_survives_a_round_trip(void **state)
{
    (void)state;
    for (uint32_t code = 0; code < 65536; code++) {
        uint32_t bf16_quiet = (code & 0x7fff) > 0x7f80 ? code | 0x40 : code;
        uint32_t f16_quiet = (code & 0x7fff) > 0x7c00 ? code | 0x200 : code;
        assert_int_equal(f32_to_bf16(bf16_to_f32((uint16_t)code)), bf16_quiet);
        assert_int_equal(f32_to_f16(f16_to_f32((uint16_t)code)), f16_quiet);
    }
    for (uint32_t code = 0; code < 256; code++)
        assert_int_equal(f32_to_e4m3(e4m3_to_f32((uint8_t)code)), code);
    for (uint32_t code = 0; code < 256; code++) { // the upper four bits are ignored
        assert_int_equal(f32_to_e2m1(e2m1_to_f32((uint8_t)code)), code & 15);
        assert_true(e2m1_doubled((uint8_t)code) == 2 * e2m1_to_f32((uint8_t)code));
    }
}

static void test_borders_equal_goldens(void **state)
{
    (void)state;
    static const uint32_t special[] = {0x7f800000, 0x7f7fffff, 0x7fc00000, 0x7f800001, 1, 0x007fffff};
    for (int f = 0; f < NUM_FLOAT_FORMATS; f++) {
        const struct float_format *format = &float_formats[f];
        char name[64];
        snprintf(name, sizeof name, "f32_to_%s_borders", format->name);
        struct golden golden;
        golden_load(&golden, name, BLOCK);
        for (uint32_t sign = 0; sign < 2; sign++) {
            for (uint32_t code = 0; code <= format->max_finite_code; code++) {
                float value = format->to_f32(code);
                double next = code < format->max_finite_code ? format->to_f32(code + 1) : format->beyond;
                uint32_t middle = f32_bits((float)((value + next) / 2));
                uint32_t inputs[] = {f32_bits(value), middle - 1, middle, middle + 1};
                for (int i = 0; i < 4; i++)
                    golden_hash(&golden, format->from_f32(f32_from_bits(inputs[i] | sign << 31)), format->bytes);
            }
            for (size_t i = 0; i < sizeof special / sizeof *special; i++)
                golden_hash(&golden, format->from_f32(f32_from_bits(special[i] | sign << 31)), format->bytes);
        }
        golden_end(&golden);
    }
}

static void test_random_patterns_equal_goldens(void **state)
{
    (void)state;
    for (int f = 0; f < NUM_FLOAT_FORMATS; f++) {
        const struct float_format *format = &float_formats[f];
        char name[64];
        snprintf(name, sizeof name, "f32_to_%s_random", format->name);
        struct golden golden;
        golden_load(&golden, name, BLOCK);
        uint64_t random = SEED;
        for (int i = 0; i < RANDOM; i++)
            golden_hash(&golden, format->from_f32(f32_from_bits((uint32_t)(splitmix64(&random) >> 32))), format->bytes);
        golden_end(&golden);
    }
}

static void test_integers_equal_goldens(void **state)
{
    (void)state;
    static const uint32_t special[] = {0x7f7fffff, 0x7f800000, 0x7fc00000, 0xff7fffff, 0xff800000, 0xffc00000};
    static const struct {
        const char *ties, *random;
        uint32_t (*from_f32)(float);
    } formats[] = {
        {"f32_to_int8_ties", "f32_to_int8_random", to_int8},
        {"f32_to_int4_ties", "f32_to_int4_random", to_int4},
    };
    for (int f = 0; f < 2; f++) {
        struct golden golden;
        golden_load(&golden, formats[f].ties, BLOCK);
        for (int k = -600; k <= 600; k++)
            for (int ulp = -1; ulp <= 1; ulp++)
                golden_hash(&golden, formats[f].from_f32(f32_from_bits(f32_bits((float)k / 2) + (uint32_t)ulp)), 1);
        for (size_t i = 0; i < sizeof special / sizeof *special; i++)
            golden_hash(&golden, formats[f].from_f32(f32_from_bits(special[i])), 1);
        golden_end(&golden);
        golden_load(&golden, formats[f].random, BLOCK);
        uint64_t random = SEED;
        for (int i = 0; i < RANDOM; i++)
            golden_hash(&golden, formats[f].from_f32(((float)(splitmix64(&random) >> 40) - 0x1p23f) * 0x1p-16f), 1);
        golden_end(&golden);
    }
}

// What the goldens leave open: saturation, NaN sign, quietness and payload, Inf.
static void test_special_values(void **state)
{
    (void)state;
    static const struct {
        uint32_t f32;
        uint16_t bf16, f16;
        uint8_t e4m3;
        int8_t int8, int4;
    } cases[] = {
        {0x00000000, 0x0000, 0x0000, 0x00, 0, 0},     // +0
        {0x80000000, 0x8000, 0x8000, 0x80, 0, 0},     // -0
        {0x7f800000, 0x7f80, 0x7c00, 0x7f, 127, 7},   // Inf
        {0xff800000, 0xff80, 0xfc00, 0xff, -127, -8}, // -Inf
        {0x7f7fffff, 0x7f80, 0x7c00, 0x7e, 127, 7},   // largest f32
        {0xff7fffff, 0xff80, 0xfc00, 0xfe, -127, -8}, // smallest f32
        {0x7fc00000, 0x7fc0, 0x7e00, 0x7f, 0, 0},     // quiet NaN
        {0xffc00000, 0xffc0, 0xfe00, 0xff, 0, 0},     // its negative
        {0x7f800001, 0x7fc0, 0x7e00, 0x7f, 0, 0},     // signalling NaN whose payload would vanish
        {0xffa00000, 0xffe0, 0xff00, 0xff, 0, 0},     // signalling NaN with an upper payload
        {0x7fffffff, 0x7fff, 0x7fff, 0x7f, 0, 0},     // a NaN that rounding up would wrap
        {0x43e00000, 0x43e0, 0x5f00, 0x7e, 127, 7},   // 448
        {0x43e80000, 0x43e8, 0x5f40, 0x7e, 127, 7},   // 464, the last that rounds to 448 by itself
        {0x43e80001, 0x43e8, 0x5f40, 0x7e, 127, 7},   // just above: saturates
        {0xc61c4000, 0xc61c, 0xf0e2, 0xfe, -127, -8}, // -10000
        {0x477fe000, 0x4780, 0x7bff, 0x7e, 127, 7},   // 65504
        {0x477fefff, 0x4780, 0x7bff, 0x7e, 127, 7},   // just below 65520
        {0x477ff000, 0x4780, 0x7c00, 0x7e, 127, 7},   // 65520: f16 Inf
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        float value = f32_from_bits(cases[i].f32);
        assert_int_equal(f32_to_bf16(value), cases[i].bf16);
        assert_int_equal(f32_to_f16(value), cases[i].f16);
        assert_int_equal(f32_to_e4m3(value), cases[i].e4m3);
        assert_int_equal(f32_to_int8(value), cases[i].int8);
        assert_int_equal(f32_to_int4(value), cases[i].int4);
    }
    assert_int_equal(f32_bits(f16_to_f32(0xfd00)), 0xffe00000u); // signalling f16 NaN becomes quiet
    assert_int_equal(f32_bits(e4m3_to_f32(0xff)), 0xffc00000u);  // the sign of a NaN is kept
}

// The nibbles of a checkpoint's row, as MXFP4 and NVFP4 files have them: the even column in the low nibble.
static void test_fp4_rows(void **state)
{
    (void)state;
    static const uint8_t stored[4] = {0x41, 0xa7, 0x0d, 0x63}; // codes (3k + 1) mod 16 of columns k = 0..7
    static const float values[8] = {0.5f, 2, 6, -1, -3, 0, 1.5f, 4};
    for (int k = 0; k < 8; k++) {
        uint8_t code = k % 2 ? nibble_high(stored[k / 2]) : nibble_low(stored[k / 2]);
        assert_int_equal(code, (3 * k + 1) % 16);
        assert_true(e2m1_to_f32(code) == values[k]);
    }
    assert_int_equal(f32_to_e2m1(INFINITY), 7);
    assert_int_equal(f32_to_e2m1(-INFINITY), 15);
    assert_int_equal(f32_to_e2m1(NAN), 0);
    assert_int_equal(f32_to_e2m1(-NAN), 0);
    assert_int_equal(f32_bits(e8m0_to_f32(0)), 0x00400000);
    assert_int_equal(f32_bits(e8m0_to_f32(127)), 0x3f800000);
    assert_int_equal(f32_bits(e8m0_to_f32(255)), 0x7fc00000);
}

static void test_nibbles(void **state)
{
    (void)state;
    for (int value = -8; value <= 7; value++) {
        assert_int_equal(int4_sign_extend((uint8_t)(value & 15)), value);
        assert_int_equal(int4_sign_extend((uint8_t)((value & 15) | 0xa0)), value);
    }
    for (int byte = 0; byte < 256; byte++) {
        assert_int_equal(nibble_low((uint8_t)byte), byte % 16);
        assert_int_equal(nibble_high((uint8_t)byte), byte / 16);
        assert_int_equal(nibble_pack((uint8_t)(byte % 16), (uint8_t)(byte / 16)), byte);
    }
    assert_int_equal(nibble_pack(0xff, (uint8_t)-8), 0x8f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_upcasts_equal_goldens),
        cmocka_unit_test(test_every_code_survives_a_round_trip),
        cmocka_unit_test(test_borders_equal_goldens),
        cmocka_unit_test(test_random_patterns_equal_goldens),
        cmocka_unit_test(test_integers_equal_goldens),
        cmocka_unit_test(test_special_values),
        cmocka_unit_test(test_fp4_rows),
        cmocka_unit_test(test_nibbles),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
