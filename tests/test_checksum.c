// Checksums: goldens made with another binding of xxHash, xxHash's published sanity values, all instruction sets
// equal, streams, the hexadecimal spelling, and that damage is seen.
#include "formats/checksum.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { DATA_BYTES = 5000000 };

// xxHash's own sanity-check buffer.
static uint8_t *sanity_buffer(void)
{
    uint8_t *data = malloc(DATA_BYTES);
    assert_non_null(data);
    uint64_t state = 2654435761;
    for (size_t i = 0; i < DATA_BYTES; i++) {
        data[i] = (uint8_t)(state >> 56);
        state *= 11400714785074694797u;
    }
    return data;
}

static void test_goldens_on_every_target(void **state)
{
    (void)state;
    uint8_t *data = sanity_buffer();
    FILE *file = fopen("tests/golden/checksum/xxh3.txt", "r");
    if (!file)
        fail_msg("cannot open tests/golden/checksum/xxh3.txt (run from the repository root)");
    size_t num_bytes;
    uint64_t leaf;
    char hex[33];
    int lines = 0;
    for (; fscanf(file, "%zu %lx %32s", &num_bytes, &leaf, hex) == 3; lines++) {
        struct checksum128 want;
        assert_true(checksum128_from_hex(&want, hex));
        assert_true(num_bytes <= DATA_BYTES);
        // An exact, unaligned copy: a read past the end shows under the address sanitizer.
        uint8_t *block = malloc(num_bytes + 1);
        assert_non_null(block);
        memcpy(block + 1, data, num_bytes);
        for (size_t t = 0; checksum_target_at(t); t++) {
            const struct checksum_target *target = checksum_target_at(t);
            if (target->leaf(block + 1, num_bytes) != leaf ||
                !checksum128_equal(target->whole(block + 1, num_bytes), want))
                fail_msg("%s: %zu bytes differ from the golden", target->name, num_bytes);
        }
        assert_true(checksum_leaf(block + 1, num_bytes) == leaf);
        assert_true(checksum128_equal(checksum_whole(block + 1, num_bytes), want));
        free(block);
    }
    assert_int_equal(lines, 1109);
    fclose(file);
    free(data);
}

// From xxHash's cli/xsum_sanity_check.c.
static void test_published_values(void **state)
{
    (void)state;
    static const struct {
        size_t num_bytes;
        uint64_t leaf;
        struct checksum128 whole;
    } cases[] = {
        {0, 0x2d06800538d394c2, {0x6001c324468d497f, 0x99aa06d3014798d8}},
        {1, 0xc44bdff4074eecdb, {0xc44bdff4074eecdb, 0xa6cd5e9392000f6a}},
        {6, 0x27b56a84cd2d7325, {0x3e7039bdda43cfc6, 0x082afe0b8162d12a}},
        {12, 0xa713daf0dfbb77e7, {0x061a192713f69ad9, 0x6e3efd8fc7802b18}},
        {24, 0xa3fe70bf9d3510eb, {0x1e7044d28b1b901d, 0x0ce966e4678d3761}},
        {48, 0x397da259ecba1f11, {0xf942219aed80f67b, 0xa002ac4e5478227e}},
        {403, 0xcdeb804d65c6dea4, {0xcdeb804d65c6dea4, 0x1b6de21e332dd73d}},
        {512, 0x617e49599013cb6b, {0x617e49599013cb6b, 0x18d2d110dcc9bca1}},
        {2048, 0xdd59e2c3a5f038e0, {0xdd59e2c3a5f038e0, 0xf736557fd47073a5}},
        {2240, 0x6e73a90539cf2948, {0x6e73a90539cf2948, 0xccb134fbfa7ce49d}},
        {2367, 0xcb37aeb9e5d361ed, {0xcb37aeb9e5d361ed, 0xe89c0f6ff369b427}},
    };
    uint8_t *data = sanity_buffer();
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        if (checksum_leaf(data, cases[i].num_bytes) != cases[i].leaf ||
            !checksum128_equal(checksum_whole(data, cases[i].num_bytes), cases[i].whole))
            fail_msg("%zu bytes differ from the published value", cases[i].num_bytes);
    }
    assert_true(checksum_leaf(NULL, 0) == cases[0].leaf);
    free(data);
}

static void test_streams_equal_the_whole(void **state)
{
    (void)state;
    static const size_t pieces[] = {1, 63, 64, 65, 255, 256, 257, 1023, 4096, 100003};
    uint8_t *data = sanity_buffer();
    enum { TOTAL_BYTES = 300000 };
    struct checksum128 want = checksum_whole(data, TOTAL_BYTES);
    for (size_t t = 0; checksum_target_at(t); t++) {
        const struct checksum_target *target = checksum_target_at(t);
        for (size_t i = 0; i < sizeof pieces / sizeof *pieces; i++) {
            struct checksum_stream *stream = target->stream_new();
            assert_non_null(stream);
            for (size_t at = 0; at < TOTAL_BYTES; at += pieces[i])
                target->stream_update(stream, data + at, pieces[i] < TOTAL_BYTES - at ? pieces[i] : TOTAL_BYTES - at);
            assert_true(checksum128_equal(target->stream_final(stream), want));
            target->stream_free(stream);
        }
    }
    struct checksum_stream *stream = checksum_stream_new();
    assert_non_null(stream);
    assert_true(checksum128_equal(checksum_stream_final(stream), checksum_whole(NULL, 0)));
    checksum_stream_update(stream, NULL, 0);
    checksum_stream_update(stream, data, 1000);
    assert_true(checksum128_equal(checksum_stream_final(stream), checksum_whole(data, 1000)));
    checksum_stream_update(stream, data + 1000, 1000);
    assert_true(checksum128_equal(checksum_stream_final(stream), checksum_whole(data, 2000)));
    checksum_stream_free(stream);
    checksum_stream_free(NULL);
    free(data);
}

static void test_hex(void **state)
{
    (void)state;
    char hex[CHECKSUM128_HEX_DIGITS + 1];
    checksum128_to_hex(checksum_whole("", 0), hex);
    assert_string_equal(hex, "99aa06d3014798d86001c324468d497f");
    checksum128_to_hex((struct checksum128){.low = 0xa, .high = 0x0123456789abcdef}, hex);
    assert_string_equal(hex, "0123456789abcdef000000000000000a");
    struct checksum128 sum = {1, 2};
    assert_true(checksum128_from_hex(&sum, hex));
    assert_true(sum.low == 0xa && sum.high == 0x0123456789abcdef);
    static const uint8_t want[CHECKSUM128_BYTES] = {0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef, [15] = 0xa};
    uint8_t bytes[CHECKSUM128_BYTES];
    checksum128_to_bytes(sum, bytes);
    assert_memory_equal(bytes, want, sizeof want);
    assert_true(checksum128_equal(checksum128_from_bytes(want), sum));
    static const char *bad[] = {
        "",
        "0123456789abcdef000000000000000",
        "0123456789abcdef000000000000000a0",
        "0123456789ABCDEF000000000000000a",
        "0x23456789abcdef000000000000000a",
        " 123456789abcdef000000000000000a",
        "g123456789abcdef000000000000000a",
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_false(checksum128_from_hex(&sum, bad[i]));
    assert_true(sum.low == 0xa);
}

// Every single-bit flip of a block, and the swap of any two neighbouring unequal bytes, changes both sums.
static void test_damage_is_detected(void **state)
{
    (void)state;
    enum { BLOCK_BYTES = 4096 };
    uint8_t *block = sanity_buffer();
    uint64_t leaf = checksum_leaf(block, BLOCK_BYTES);
    struct checksum128 whole = checksum_whole(block, BLOCK_BYTES);
    for (size_t bit = 0; bit < 8 * BLOCK_BYTES; bit++) {
        block[bit / 8] ^= (uint8_t)(1 << bit % 8);
        if (checksum_leaf(block, BLOCK_BYTES) == leaf || checksum128_equal(checksum_whole(block, BLOCK_BYTES), whole))
            fail_msg("flip of bit %zu not detected", bit);
        block[bit / 8] ^= (uint8_t)(1 << bit % 8);
    }
    for (size_t i = 0; i + 1 < BLOCK_BYTES; i++) {
        if (block[i] == block[i + 1])
            continue;
        uint8_t left = block[i];
        block[i] = block[i + 1], block[i + 1] = left;
        if (checksum_leaf(block, BLOCK_BYTES) == leaf || checksum128_equal(checksum_whole(block, BLOCK_BYTES), whole))
            fail_msg("swap of bytes %zu and %zu not detected", i, i + 1);
        block[i + 1] = block[i], block[i] = left;
    }
    assert_true(checksum_leaf(block, BLOCK_BYTES) == leaf);
    free(block);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_goldens_on_every_target), cmocka_unit_test(test_published_values),
        cmocka_unit_test(test_streams_equal_the_whole), cmocka_unit_test(test_hex),
        cmocka_unit_test(test_damage_is_detected),
    };
    for (size_t i = 0; checksum_target_at(i); i++)
        print_message("target %s\n", checksum_target_at(i)->name);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
