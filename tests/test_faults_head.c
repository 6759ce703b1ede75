// What stands between a damaged rank file and its weights: its head at every length that a copy may break off at, features that later versions may
// add, and the strength of the checksum itself. Flipped bits and every field of the head: test_shard_file.c; whole directories: test_faults_format.c.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "formats/checksum.h"
#include "formats/shard_layout.h"
#include "tests/random_help.h"
#include "tests/shard_fixture.h"

enum { PAGE = 4096 };
static const uint8_t some_contract[16] = {1, 2, 3};

// ---- heads -----------------------------------------------------------------------------------------------------------

static int parse(const uint8_t *bytes, uint64_t available, uint64_t file_bytes)
{
    struct shard_file *file = NULL;
    struct error err;
    int rc = shard_file_parse(&file, bytes, available, file_bytes, "rank-00-of-01.tpshard", &err);
    shard_file_close(file);
    return rc;
}

// A copy that ended early, at every byte of the head and at the borders of leaves and pages.
static void test_truncated_at_every_byte(void **state)
{
    (void)state;
    struct shard_fixture f;
    shard_fixture_make(&f, 0, some_contract, 0);
    uint64_t step = getenv("TEST_QUICK") ? 61 : 1;
    for (uint64_t bytes = 0; bytes < f.payload_offset; bytes += step)
        if (parse(f.bytes, bytes, bytes) != ERR_CORRUPT || parse(f.bytes, bytes, f.file_bytes) != ERR_CORRUPT)
            fail_msg("a file of %" PRIu64 " bytes is taken for whole", bytes);
    for (uint64_t bytes = f.payload_offset; bytes < f.file_bytes; bytes += PAGE)
        for (int delta = -1; delta <= 1; delta++)
            assert_int_equal(parse(f.bytes, f.payload_offset, bytes + (uint64_t)(int64_t)delta), ERR_CORRUPT);
    assert_int_equal(parse(f.bytes, f.payload_offset, f.file_bytes), 0);
    free(f.bytes);
}

static void put_head_hash(uint8_t *head, uint64_t head_bytes)
{
    memset(head + offsetof(struct disk_header, head_hash), 0, 16);
    checksum128_to_bytes(checksum_whole(head, head_bytes), head + offsetof(struct disk_header, head_hash));
}

// What a later version may add: a reader refuses what it must know and passes over what it need not.
static void test_features(void **state)
{
    (void)state;
    struct shard_fixture f;
    shard_fixture_make(&f, 0, some_contract, 0);
    uint8_t *head = malloc(f.payload_offset);
    assert_non_null(head);
    for (int bit = 0; bit < 32; bit++) {
        struct disk_header header;
        memcpy(head, f.bytes, f.payload_offset);
        memcpy(&header, head, sizeof header);
        header.optional_features ^= 1u << bit;
        memcpy(head, &header, sizeof header);
        put_head_hash(head, f.payload_offset);
        assert_int_equal(parse(head, f.payload_offset, f.file_bytes), 0);
        header.optional_features ^= 1u << bit;
        header.required_features ^= 1u << bit;
        memcpy(head, &header, sizeof header);
        put_head_hash(head, f.payload_offset);
        assert_int_equal(parse(head, f.payload_offset, f.file_bytes), ERR_CORRUPT);
    }
    free(head);
    free(f.bytes);
}

// ---- the checksum ----------------------------------------------------------------------------------------------------

// Every single bit of a block, then bits in pairs and bytes that change places. A checksum of 64 bits that misses one of these has a flaw; by chance
// it would take 10^19.
static void test_strength(void **state)
{
    (void)state;
    enum { BLOCK = 64 << 10 };
    static uint8_t block[BLOCK];
    random_state = 6;
    for (size_t i = 0; i < BLOCK; i++)
        block[i] = (uint8_t)(random_bits() >> 32);
    uint64_t right = checksum_leaf(block, BLOCK);
    for (uint64_t bit = 0; bit < 8 * BLOCK; bit++) {
        block[bit / 8] ^= (uint8_t)(1 << bit % 8);
        if (checksum_leaf(block, BLOCK) == right)
            fail_msg("bit %" PRIu64 " flipped: the same checksum", bit);
        block[bit / 8] ^= (uint8_t)(1 << bit % 8);
    }
    long pairs = getenv("TEST_QUICK") ? 20000 : 200000;
    for (long i = 0; i < pairs; i++) {
        uint64_t a = random_bits() % BLOCK, b = random_bits() % BLOCK;
        uint8_t old_a = block[a], old_b = block[b];
        if (i % 2) {
            block[a] ^= (uint8_t)(1 << random_bits() % 8);
            block[b] ^= (uint8_t)(1 << random_bits() % 8);
        } else {
            block[a] = old_b;
            block[b] = old_a;
        }
        if ((block[a] != old_a || block[b] != old_b) && checksum_leaf(block, BLOCK) == right)
            fail_msg("bytes %" PRIu64 " and %" PRIu64 " changed: the same checksum", a, b);
        block[b] = old_b;
        block[a] = old_a;
    }
    assert_true(checksum_leaf(block, BLOCK) == right);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_truncated_at_every_byte),
        cmocka_unit_test(test_features),
        cmocka_unit_test(test_strength),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
