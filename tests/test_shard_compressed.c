// Compressed rank files: where leaves lie, what is refused, a golden file. What a leaf holds is tested in test_leaf_code.c, files that tpshard makes
// in test_compressed.sh.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <zstd.h>

#include "formats/checksum.h"
#include "formats/file_io.h"
#include "formats/shard_file.h"
#include "tests/shard_file_help.h"
#include "tests/shard_fixture.h"

static void make_compressed(struct shard_fixture *file, uint64_t extra_vocab)
{
    shard_fixture_make(file, 1, some_contract, extra_vocab);
    shard_fixture_compress(file);
}

static void compressed_leaves(void **state)
{
    (void)state;
    struct shard_fixture plain, written;
    struct shard_file *file = NULL;
    struct error err = {0};
    shard_fixture_make(&plain, 1, some_contract, 9000);
    make_compressed(&written, 9000);
    if (parse(written.bytes, written.payload_offset, written.file_bytes, &file, &err))
        fail_msg("%s", err.msg);
    assert_true(shard_file_is_compressed(file));
    assert_int_equal(shard_file_payload_bytes(file), plain.payload_bytes);
    assert_int_equal(shard_file_stored_bytes(file), written.file_bytes - written.payload_offset);
    assert_true(shard_file_stored_bytes(file) < plain.payload_bytes);
    assert_int_equal(written.file_bytes % SHARD_FILE_ALIGN, 0);
    assert_int_equal(shard_file_leaf_count(file), 3);
    for (int i = 0; i < SHARD_FIXTURE_TENSORS; i++)
        assert_same_tensor(shard_file_tensor(file, (uint64_t)i), &plain.tensors[i]);

    struct leaf_scratch *scratch = leaf_scratch_new();
    uint8_t *out = malloc(SHARD_LEAF_BYTES);
    assert_true(scratch && out);
    uint64_t end = 0;
    for (uint64_t i = 0; i < 3; i++) {
        struct shard_stored stored = shard_file_stored_leaf(file, i);
        const uint8_t *bytes = written.bytes + written.payload_offset + stored.offset;
        assert_int_equal(stored.offset, end);
        end += stored.bytes;
        assert_int_equal(shard_file_verify_leaf(file, i, bytes, &err), 0);
        assert_int_equal(shard_file_decode_leaf(file, i, bytes, out, scratch, &err), 0);
        assert_memory_equal(out, plain.bytes + plain.payload_offset + i * SHARD_LEAF_BYTES,
                            shard_file_leaf_bytes(file, i));
        // Each stored byte is under the checksum, the zeros at the end too.
        uint8_t *copy = malloc(stored.bytes);
        assert_non_null(copy);
        memcpy(copy, bytes, stored.bytes);
        for (uint64_t at = 0; at < stored.bytes; at += 1 + stored.bytes / 500) {
            copy[stored.bytes - 1 - at] ^= 1;
            assert_int_equal(shard_file_verify_leaf(file, i, copy, &err), ERR_CORRUPT);
            copy[stored.bytes - 1 - at] ^= 1;
        }
        free(copy);
    }
    assert_int_equal(end, shard_file_stored_bytes(file));

    // What a wrong writer vouched for is refused in the words of a broken leaf.
    struct shard_stored last = shard_file_stored_leaf(file, 2);
    uint8_t *bytes = written.bytes + written.payload_offset + last.offset;
    assert_int_equal(bytes[last.bytes - 1], 0);
    bytes[last.bytes - 1] = 1;
    assert_int_equal(shard_file_decode_leaf(file, 2, bytes, out, scratch, &err), ERR_CORRUPT);
    assert_non_null(strstr(err.msg, "rank 1: tensor embedding (embed) or one of the 12 behind it, file bytes "));
    assert_non_null(strstr(err.msg, ": it is not followed by zeros; repair it: tpshard repair . --from SOURCE"));
    struct shard_stored first = shard_file_stored_leaf(file, 0);
    written.bytes[written.payload_offset] ^= 0xff;
    assert_int_equal(shard_file_decode_leaf(file, 0, written.bytes + written.payload_offset, out, scratch, &err),
                     ERR_CORRUPT);
    char range[64];
    snprintf(range, sizeof range, "file bytes %" PRIu64 " to %" PRIu64 ": ", written.payload_offset,
             written.payload_offset + first.bytes - 1);
    assert_non_null(strstr(err.msg, range));

    free(out);
    leaf_scratch_free(scratch);
    shard_file_close(file);
    free(written.bytes);
    free(plain.bytes);
}

static void compressed_heads(void **state)
{
    (void)state;
    enum { RAW = LEAF_RAW, ZSTD = LEAF_ZSTD };
    static const struct {
        const char *what;
        int leaf;
        uint32_t bytes, code; // 0 bytes: one more than there are
        int64_t longer;       // the file
        const char *wanted;
    } cases[] = {
        {"no bytes", 0, 0, ZSTD, 0, "a leaf has an impossible code or length"},
        {"too many bytes", 1, SHARD_LEAF_BYTES, ZSTD, 0, "a leaf has an impossible code or length"},
        {"hardly shorter", 1, SHARD_LEAF_BYTES / 100 * 98, ZSTD, 0, "a leaf has an impossible code or length"},
        {"raw and shorter", 1, SHARD_LEAF_BYTES - 4096, RAW, 0, "a leaf has an impossible code or length"},
        {"raw and longer", 1, SHARD_LEAF_BYTES + 1, RAW, 0, "a leaf has an impossible code or length"},
        {"a code that is not known", 2, 100, LEAF_CODE_COUNT, 0, "a leaf has an impossible code or length"},
        {"2^32 - 1 bytes", 2, UINT32_MAX, ZSTD, 0, "a leaf has an impossible code or length"},
        {"a leaf is longer", 1, 900000, ZSTD, 0, "its leaves end at "},
        {"the file is longer", -1, 0, 0, 4096, "its leaves end at "},
        {"the file is shorter", -1, 0, 0, -4096, "its leaves end at "},
        {"the file ends anywhere", -1, 0, 0, 1, "its leaves end at "},
    };
    struct shard_fixture file;
    struct error err = {0};
    make_compressed(&file, 9000);
    struct shard_compressed_layout layout;
    assert_int_equal(shard_compressed_layout(&layout, file.tensors, SHARD_FIXTURE_TENSORS, &err), 0);
    uint8_t *head = malloc(file.payload_offset);
    assert_non_null(head);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        memcpy(head, file.bytes, file.payload_offset);
        uint64_t file_bytes = file.file_bytes + (uint64_t)cases[i].longer;
        struct shard_leaf leaf = {cases[i].bytes, cases[i].code};
        if (cases[i].leaf >= 0)
            memcpy(head + layout.table_offset + (size_t)cases[i].leaf * sizeof leaf, &leaf, sizeof leaf);
        memcpy(head + 112, &file_bytes, sizeof file_bytes);
        put_head_hash(head, file.payload_offset);
        assert_refused(head, file.payload_offset, file_bytes, cases[i].wanted, cases[i].what);
    }
    // All raw: that is spelled without a table.
    memcpy(head, file.bytes, file.payload_offset);
    uint64_t left = file.payload_bytes, file_bytes = file.payload_offset + file.payload_bytes;
    for (size_t i = 0; i < 3; i++, left -= SHARD_LEAF_BYTES) {
        struct shard_leaf leaf = {(uint32_t)(left < SHARD_LEAF_BYTES ? left : SHARD_LEAF_BYTES), LEAF_RAW};
        memcpy(head + layout.table_offset + i * sizeof leaf, &leaf, sizeof leaf);
    }
    memcpy(head + 112, &file_bytes, sizeof file_bytes);
    put_head_hash(head, file.payload_offset);
    assert_refused(head, file.payload_offset, file_bytes, "no leaf is compressed", "all raw");
    // Without the bit the table is no padding.
    memcpy(head, file.bytes, file.payload_offset);
    head[16] = 0;
    memcpy(head + 112, &file_bytes, sizeof file_bytes);
    put_head_hash(head, file.payload_offset);
    assert_refused(head, file.payload_offset, file_bytes, "padding of its head is not zero", "no bit");
    free(head);
    free(file.bytes);
}

// Files of this version, once released, are read for ever. They are not written byte for byte: frames are libzstd's.
// This one is rank 0 of `test_shard_file --write-compressed`, packed with zstd -19.
static void golden_compressed(void **state)
{
    (void)state;
    struct shard_fixture plain;
    struct shard_file *file = NULL;
    struct error err = {0};
    uint64_t packed_bytes, bytes;
    uint8_t *packed = NULL;
    if (file_read_all(&packed, &packed_bytes, "tests/golden/shard_file/compressed.tpshard.zst", 8 << 20, ERR_OTHER,
                      &err))
        fail_msg("%s", err.msg);
    bytes = ZSTD_getFrameContentSize(packed, packed_bytes);
    assert_true(bytes < 8 << 20);
    uint8_t *unpacked = malloc(bytes), *out = malloc(SHARD_LEAF_BYTES);
    struct leaf_scratch *scratch = leaf_scratch_new();
    assert_true(unpacked && out && scratch);
    assert_int_equal(ZSTD_decompress(unpacked, bytes, packed, packed_bytes), bytes);
    if (shard_file_parse(&file, unpacked, bytes, bytes, "compressed.tpshard", &err))
        fail_msg("%s", err.msg);
    shard_fixture_make(&plain, 0, shard_file_identity(file)->contract, 0);
    assert_true(shard_file_is_compressed(file));
    assert_int_equal(shard_file_payload_bytes(file), plain.payload_bytes);
    for (uint64_t i = 0; i < shard_file_leaf_count(file); i++) {
        const uint8_t *stored = unpacked + shard_file_payload_offset(file) + shard_file_stored_leaf(file, i).offset;
        if (shard_file_verify_leaf(file, i, stored, &err) ||
            shard_file_decode_leaf(file, i, stored, out, scratch, &err))
            fail_msg("%s", err.msg);
        assert_memory_equal(out, plain.bytes + plain.payload_offset + i * SHARD_LEAF_BYTES,
                            shard_file_leaf_bytes(file, i));
    }
    shard_file_close(file);
    leaf_scratch_free(scratch);
    free(plain.bytes);
    free(out);
    free(unpacked);
    free(packed);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(compressed_leaves),
        cmocka_unit_test(compressed_heads),
        cmocka_unit_test(golden_compressed),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
