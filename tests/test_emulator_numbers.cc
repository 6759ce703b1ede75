// The emulator's instructions on bits, halves and e4m3, against references in integers, or over all codes: what kernels do with weights rests on
// them. And the arithmetic with which primitives.cuh widens e4m3 where the device has no instruction for it.
#include "tests/emulator_help.h"

#include <utility>

template <int TABLE> static void check_lop3(uint32_t a, uint32_t b, uint32_t c)
{
    uint32_t want = 0;
    for (int bit = 0; bit < 32; bit++) {
        int i = (int)((a >> bit & 1) * 4 + (b >> bit & 1) * 2 + (c >> bit & 1));
        want |= (uint32_t)(TABLE >> i & 1) << bit;
    }
    assert_int_equal(lop3<TABLE>(a, b, c), want);
}
template <int... TABLES> static void check_all_lop3(std::integer_sequence<int, TABLES...>)
{
    for (int n = 0; n < 20; n++) {
        uint32_t a = random_bits(), b = random_bits(), c = random_bits();
        (check_lop3<TABLES>(a, b, c), ...);
    }
    assert_int_equal(lop3<0x6a>(0x12345678u, 0x000f000fu, 0x64086408u), (0x12345678u & 0x000f000fu) ^ 0x64086408u);
}

static void test_bits(void **)
{
    check_all_lop3(std::make_integer_sequence<int, 256>());
    for (int n = 0; n < 5000; n++) {
        uint32_t a = random_bits(), b = random_bits(), selector = random_bits() & 0x7777;
        unsigned char bytes[8], permuted[4];
        memcpy(bytes, &a, 4);
        memcpy(bytes + 4, &b, 4);
        int sum = (int)random_bits(), want = sum;
        for (int i = 0; i < 4; i++) {
            permuted[i] = bytes[selector >> 4 * i & 7];
            want = (int)((unsigned)want + (unsigned)((signed char)bytes[i] * (signed char)bytes[4 + i]));
        }
        uint32_t got = byte_permute(a, b, selector);
        assert_memory_equal(&got, permuted, 4);
        assert_int_equal(dp4a((int)a, (int)b, sum), want);
    }
    assert_int_equal(dp4a((int)0x80808080u, (int)0x80808080u, 0), 65536);
    assert_int_equal(__popc(0xf0000001u), 5);
    assert_int_equal(__clz(0), 32);
    assert_int_equal(__clz(1 << 20), 11);
    assert_int_equal(__ffs(0), 0);
    assert_int_equal(__ffs(0x50), 5);
    assert_int_equal(__float2int_rn(2.5f), 2);
    assert_int_equal(__float2int_rn(-3.5f), -4);
}

// A finite half in units of 2^-24.
static int64_t half_units(uint16_t h)
{
    int exponent = h >> 10 & 31;
    int64_t magnitude = exponent ? (int64_t)(1024 + (h & 1023)) << (exponent - 1) : h & 1023;
    return h & 0x8000 ? -magnitude : magnitude;
}

// a * b + c rounded once to nearest, ties to even, in integers alone.
static uint16_t fma_half_exact(uint16_t a, uint16_t b, uint16_t c)
{
    __int128 sum = (__int128)half_units(a) * half_units(b) + (__int128)half_units(c) * (1 << 24); // units of 2^-48
    if (sum == 0) // minus zero only as the sum of two
        return ((a ^ b) & c & 0x8000) != 0 ? 0x8000 : 0;
    uint16_t sign = sum < 0 ? 0x8000 : 0;
    unsigned __int128 magnitude = sum < 0 ? (unsigned __int128)-sum : (unsigned __int128)sum;
    int top = 0; // the number of the highest bit
    while (magnitude >> top > 1)
        top++;
    int drop = top - 10 > 24 ? top - 10 : 24; // bits below the half's last one
    uint64_t kept = (uint64_t)(magnitude >> drop);
    unsigned __int128 rest = magnitude - ((unsigned __int128)kept << drop), middle = (unsigned __int128)1 << (drop - 1);
    kept += rest > middle || (rest == middle && kept % 2 == 1);
    // With the hidden bit added into the exponent, a carry comes out right by itself.
    uint64_t bits = kept + ((uint64_t)(drop - 24) << 10);
    return (uint16_t)(sign | (bits < 0x7c00 ? bits : 0x7c00));
}

static void check_fma(uint16_t a, uint16_t b, uint16_t c)
{
    uint16_t want = fma_half_exact(a, b, c);
    uint32_t got = fma_half2(a | 0x3c000000u, b | 0x3c000000u, c | 0x3c000000u); // the upper one: 1 * 1 + 1
    if (got != (want | 0x40000000u))
        fail_msg("fma_half2(%04x, %04x, %04x) is %08x, wanted 4000%04x", a, b, c, got, want);
    got = fma_half2((uint32_t)a << 16, (uint32_t)b << 16, (uint32_t)c << 16);
    assert_int_equal(got, (uint32_t)want << 16);
}

static uint16_t random_finite_half(void)
{
    uint16_t h;
    do
        h = (uint16_t)random_bits();
    while ((h & 0x7c00) == 0x7c00);
    return h;
}

static void test_fma_half2(void **)
{
    for (int n = 0; n < 300000; n++)
        check_fma(random_finite_half(), random_finite_half(), random_finite_half());
    // The product is half a unit of c's last place, or that and a little more or less; all exponents, the last bit of c even and odd.
    static const uint16_t nearly_one[] = {0x3c00, 0x3c01, 0x3bff, 0x3e00, 0x4000, 0x3800};
    for (int exponent = 0; exponent < 31; exponent++)
        for (int mantissa = 0; mantissa < 1024; mantissa += mantissa < 8 || mantissa > 1015 ? 1 : 61)
            for (uint16_t factor : nearly_one)
                for (int signs = 0; signs < 4; signs++) {
                    int half_unit =
                        (exponent ? exponent : 1) - 11; // its exponent with the half's bias; below 1 it is subnormal
                    uint16_t product = (uint16_t)(half_unit > 0     ? half_unit << 10
                                                  : half_unit > -10 ? 1 << (9 + half_unit)
                                                                    : 0);
                    uint16_t c = (uint16_t)(exponent << 10 | mantissa);
                    check_fma((uint16_t)(product | (signs & 1) << 15), factor, (uint16_t)(c | (signs & 2) << 14));
                    check_fma(factor, (uint16_t)(product | (signs & 1) << 15), (uint16_t)(c | (signs & 2) << 14));
                }
    // Where the half unit itself is no half: 2^-25 as a product.
    for (uint16_t c = 0; c < 0x900; c++)
        for (int signs = 0; signs < 4; signs++) {
            check_fma((uint16_t)(0x0001 | (signs & 1) << 15), 0x3800, (uint16_t)(c | (signs & 2) << 14));
            check_fma((uint16_t)(0x0001 | (signs & 1) << 15), 0x3801, (uint16_t)(c | (signs & 2) << 14));
            check_fma((uint16_t)(0x0001 | (signs & 1) << 15), 0x37ff, (uint16_t)(c | (signs & 2) << 14));
        }
    static const struct {
        uint16_t a, b, c, want; // 0xffff: NaN
    } special[] = {
        {0x7c00, 0x3c00, 0x0000, 0x7c00}, {0x7c00, 0xbc00, 0x7bff, 0xfc00}, {0x7c00, 0x0000, 0x3c00, 0xffff},
        {0x7c00, 0x3c00, 0xfc00, 0xffff}, {0x3c00, 0x3c00, 0x7e00, 0xffff}, {0x7e00, 0x0000, 0x0000, 0xffff},
        {0x3c00, 0x3c00, 0xfc00, 0xfc00}, {0x7bff, 0x7bff, 0xfbff, 0x7c00}, {0x7bff, 0x3c00, 0x4bff, 0x7bff},
        {0x7bff, 0x3c00, 0x4c00, 0x7c00}, {0x8000, 0x3c00, 0x8000, 0x8000}, {0x8000, 0x3c00, 0x0000, 0x0000},
    };
    for (const auto &s : special) {
        uint32_t got = fma_half2(s.a, s.b, s.c) & 0xffff;
        if (s.want == 0xffff ? (got & 0x7fff) <= 0x7c00 : got != s.want)
            fail_msg("fma_half2(%04x, %04x, %04x) is %04x, wanted %04x", s.a, s.b, s.c, got, s.want);
    }
}

// e4m3: a sign, four bits of exponent with bias 7, three of mantissa, no Inf, NaN with all ones.
static double e4m3_value(int code)
{
    int exponent = code >> 3 & 15, mantissa = code & 7;
    double magnitude = (code & 0x7f) == 0x7f ? NAN
                       : exponent            ? ldexp(8 + mantissa, exponent - 10)
                                             : ldexp(mantissa, -9);
    return code & 0x80 ? -magnitude : magnitude;
}

static void check_e4m3_half(uint16_t half, int code)
{
    double want = e4m3_value(code), got = (double)half_to_float(half);
    if (!(got == want && (half >> 15) == code >> 7) && !(isnan(got) && isnan(want)))
        fail_msg("e4m3 %02x as a half is %04x (%g), wanted %g", code, half, got, want);
}

// The body of e4m3x2_to_half2 for devices without an instruction for it, which the emulator does not run: the same arithmetic.
static uint32_t e4m3x2_to_half2_by_bits(uint16_t two)
{
    uint32_t wide = byte_permute(two, 0, 0x1404);
    uint32_t sign = wide & 0x80008000u, magnitude = wide >> 1 & 0x3f803f80u;
    uint32_t half = fma_half2(magnitude, 0x5c005c00u, 0);
    uint32_t low_nan = (wide & 0x7f00u) == 0x7f00u ? 0x7fffu : 0;
    uint32_t high_nan = (wide & 0x7f000000u) == 0x7f000000u ? 0x7fff0000u : 0;
    return half | sign | low_nan | high_nan;
}

static void test_e4m3(void **)
{
    for (int two = 0; two < 65536; two++) {
        uint32_t halves = e4m3x2_to_half2((uint16_t)two), by_bits = e4m3x2_to_half2_by_bits((uint16_t)two);
        check_e4m3_half((uint16_t)halves, two & 255);
        check_e4m3_half((uint16_t)(halves >> 16), two >> 8);
        check_e4m3_half((uint16_t)by_bits, two & 255);
        check_e4m3_half((uint16_t)(by_bits >> 16), two >> 8);
    }
    for (uint32_t code = 0; code < 0x7f; code++) { // back, with the middle to the next one, and its neighbours
        uint32_t next = code < 0x7e ? code + 1 : 0x7e, even = code % 2 ? next : code;
        double value = e4m3_value((int)code);
        float middle = (float)(code < 0x7e ? (value + e4m3_value((int)next)) / 2 : value + 1000);
        assert_int_equal(floats_to_e4m3x2((float)value, (float)-value), code | (code | 0x80) << 8);
        assert_int_equal(floats_to_e4m3x2(middle, -middle), even | (even | 0x80) << 8);
        assert_int_equal(floats_to_e4m3x2(nextafterf(middle, 0), nextafterf(middle, 1e9f)), code | next << 8);
    }
    assert_int_equal(floats_to_e4m3x2(1e30f, -3e38f), 0xfe7e);
    assert_int_equal(floats_to_e4m3x2(NAN, INFINITY) & 0x7f7f, 0x7f7f);
    assert_int_equal(floats_to_e4m3x2(-INFINITY, 1e-30f) & 0xff7f, 0x007f);
}

static void test_pairs(void **)
{
    assert_int_equal(floats_to_half2(1, -2), 0xc0003c00u);
    assert_int_equal(floats_to_bf162(1, -2), 0xc0003f80u);
    assert_int_equal(floats_to_half2(1 + 0x1p-11f, 1 + 0x3p-11f), 0x3c023c00u); // ties to even
    assert_int_equal(floats_to_bf162(1 + 0x1p-8f, 1 + 0x3p-8f), 0x3f823f80u);
    for (uint32_t h = 0; h < 0x7c00; h++) {
        assert_true((double)half_to_float((uint16_t)h) == ldexp((double)half_units((uint16_t)h), -24));
        assert_int_equal(float_to_half(half_to_float((uint16_t)h)), h);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bits),
        cmocka_unit_test(test_fma_half2),
        cmocka_unit_test(test_e4m3),
        cmocka_unit_test(test_pairs),
    };
    return cmocka_run_group_tests(tests, nullptr, nullptr);
}
