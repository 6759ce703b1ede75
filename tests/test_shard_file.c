// Rank files: layout, round trip, refusals (truncation, flipped bits, every field), leaves, a golden file.
// `build/tests/test_shard_file --write DIR` writes a small directory of two ranks that holds every kind of weight,
// whose sources are known by formula; test_shard_reader.py reads it with a reader of its own.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zstd.h>

#include "formats/checksum.h"
#include "formats/file_io.h"
#include "formats/manifest.h"
#include "formats/shard_file.h"
#include "tests/shard_file_help.h"
#include "tests/shard_fixture.h"

// ---- round trip -----------------------------------------------------------------------------------------------------

static void layout_follows_the_rules(void **state)
{
    (void)state;
    struct shard_fixture file;
    shard_fixture_make(&file, 1, some_contract, 0);
    uint64_t end = 0;
    for (int i = 0; i < SHARD_FIXTURE_TENSORS; i++) {
        const struct shard_tensor *tensor = &file.tensors[i];
        uint64_t data = (end + 255) / 256 * 256;
        assert_int_equal(tensor->data_offset, data);
        end = data + tensor->shape.data_bytes;
        if (tensor->shape.scale_bytes) {
            uint64_t scale = (end + 255) / 256 * 256;
            assert_int_equal(tensor->scale_offset, scale);
            end = scale + tensor->shape.scale_bytes;
        } else {
            assert_int_equal(tensor->scale_offset, 0);
        }
    }
    assert_int_equal(file.payload_offset, SHARD_PAYLOAD_ALIGN);
    assert_int_equal(file.payload_bytes, (end + 4095) / 4096 * 4096);
    assert_int_equal(file.file_bytes, file.payload_offset + file.payload_bytes);
    free(file.bytes);
}

static void what_is_written_is_read(void **state)
{
    (void)state;
    struct shard_fixture written;
    struct shard_file *file = NULL;
    struct error err = {0};
    shard_fixture_make(&written, 1, some_contract, 0);
    uint8_t *head = malloc(written.payload_offset);
    assert_non_null(head);
    memcpy(head, written.bytes, written.payload_offset);
    if (parse(head, written.payload_offset, written.file_bytes, &file, &err))
        fail_msg("%s", err.msg);
    free(head); // the reader keeps a copy
    assert_memory_equal(shard_file_identity(file), &written.identity, sizeof written.identity);
    assert_int_equal(shard_file_tensor_count(file), SHARD_FIXTURE_TENSORS);
    for (int i = 0; i < SHARD_FIXTURE_TENSORS; i++) {
        const struct shard_tensor *wanted = &written.tensors[i];
        assert_same_tensor(shard_file_tensor(file, (uint64_t)i), wanted);
        assert_ptr_equal(shard_file_find(file, wanted->role, wanted->layer, wanted->expert),
                         shard_file_tensor(file, (uint64_t)i));
    }
    assert_null(shard_file_find(file, ROLE_Q_NORM, 0, -1));
    assert_null(shard_file_find(file, ROLE_QKV, 2, -1));
    assert_null(shard_file_find(file, ROLE_QKV, -1, -1));
    assert_null(shard_file_find(file, ROLE_QKV, 0, 0));
    assert_null(shard_file_find(file, ROLE_EXPERT_DOWN, 1, 2));
    assert_null(shard_file_find(file, ROLE_COUNT, 0, -1));
    struct checksum128 root = checksum_whole(written.bytes, written.payload_offset);
    assert_true(checksum128_equal(shard_file_root(file), root) && checksum128_equal(written.root, root));
    assert_int_equal(shard_file_payload_bytes(file), written.payload_bytes);
    assert_int_equal(shard_file_payload_offset(file), written.payload_offset);
    assert_null(shard_file_payload(file));
    shard_file_close(file);

    // The same input, the same bytes.
    struct shard_fixture again;
    shard_fixture_make(&again, 1, some_contract, 0);
    assert_memory_equal(again.bytes, written.bytes, written.file_bytes);
    free(again.bytes);
    free(written.bytes);
}

static void roles_have_names(void **state)
{
    (void)state;
    for (int i = 0; i < ROLE_COUNT; i++) {
        assert_string_not_equal(tensor_role_name((enum tensor_role)i), "unknown");
        for (int j = 0; j < i; j++)
            assert_string_not_equal(tensor_role_name((enum tensor_role)i), tensor_role_name((enum tensor_role)j));
    }
    assert_string_equal(tensor_role_name(ROLE_COUNT), "unknown");
}

// ---- refusals -------------------------------------------------------------------------------------------------------

static void truncated(void **state)
{
    (void)state;
    struct shard_fixture file;
    shard_fixture_make(&file, 1, some_contract, 12000);
    // Every byte of the part that is in use, then a few; the file's length known, or that of the truncated copy.
    for (uint64_t bytes = 0; bytes < file.payload_offset; bytes += bytes < 8192 ? 1 : 4093) {
        // An exact copy: a read past its end shows under the address sanitizer.
        uint8_t *copy = malloc(bytes + 1);
        assert_non_null(copy);
        memcpy(copy, file.bytes, bytes);
        assert_refused(copy, bytes, file.file_bytes, "truncated: ", "head cut");
        assert_refused(copy, bytes, bytes, bytes < 320 ? "truncated: " : "its header says", "file cut");
        free(copy);
    }
    // Around the borders of the leaves, and with bytes too many.
    for (uint64_t border = 0; border <= file.payload_bytes; border += SHARD_LEAF_BYTES)
        for (int delta = -1; delta <= 1; delta++) {
            uint64_t length = file.payload_offset + border + (uint64_t)(int64_t)delta;
            assert_refused(file.bytes, file.payload_offset, length, "its header says", "payload cut");
        }
    assert_refused(file.bytes, file.payload_offset, file.file_bytes - 1, "its header says", "one byte short");
    assert_refused(file.bytes, file.payload_offset, file.file_bytes + 1, "its header says", "one byte more");
    free(file.bytes);
}

static void every_flipped_bit_of_the_head(void **state)
{
    (void)state;
    struct shard_fixture file;
    shard_fixture_make(&file, 1, some_contract, 0);
    uint64_t used = file.payload_offset;
    while (file.bytes[used - 1] == 0)
        used--;
    uint64_t random = 1, padding_bits = (file.payload_offset - used) * 8;
    for (uint64_t i = 0; i < used * 8 + 1000; i++) {
        uint64_t bit = i;
        if (bit >= used * 8 && padding_bits) { // somewhere in the padding
            random = random * 6364136223846793005u + 1442695040888963407u;
            bit = used * 8 + (random >> 16) % padding_bits;
        }
        file.bytes[bit / 8] ^= (uint8_t)(1 << bit % 8);
        struct error err = {0};
        struct shard_file *out = NULL;
        if (parse(file.bytes, file.payload_offset, file.file_bytes, &out, &err) != ERR_CORRUPT)
            fail_msg("bit %d of byte %" PRIu64 " flipped and not seen", (int)(bit % 8), bit / 8);
        file.bytes[bit / 8] ^= (uint8_t)(1 << bit % 8);
    }
    free(file.bytes);
}

static void flipped_bits_of_the_payload(void **state)
{
    (void)state;
    struct shard_fixture written;
    struct shard_file *file = NULL;
    struct error err = {0};
    shard_fixture_make(&written, 1, some_contract, 5000);
    assert_int_equal(parse(written.bytes, written.payload_offset, written.file_bytes, &file, &err), 0);
    uint64_t leaves = shard_file_leaf_count(file), covered = 0;
    assert_true(leaves >= 2);
    for (uint64_t i = 0; i < leaves; i++) {
        assert_int_equal(
            shard_file_verify_leaf(file, i, written.bytes + written.payload_offset + i * SHARD_LEAF_BYTES, &err), 0);
        covered += shard_file_leaf_bytes(file, i);
    }
    assert_int_equal(covered, written.payload_bytes); // padding included

    uint64_t random = 2;
    for (int i = 0; i < 1500; i++) {
        random = random * 6364136223846793005u + 1442695040888963407u;
        uint64_t bit = (random >> 16) % (written.payload_bytes * 8);
        if (i < 8 * 100)
            bit = written.payload_bytes * 8 - 1 - (uint64_t)i; // the padding at the end
        uint8_t *byte = written.bytes + written.payload_offset + bit / 8;
        uint64_t leaf = bit / 8 / SHARD_LEAF_BYTES;
        *byte ^= (uint8_t)(1 << bit % 8);
        const uint8_t *bytes = written.bytes + written.payload_offset + leaf * SHARD_LEAF_BYTES;
        if (shard_file_verify_leaf(file, leaf, bytes, &err) != ERR_CORRUPT)
            fail_msg("bit %d of payload byte %" PRIu64 " flipped and not seen", (int)(bit % 8), bit / 8);
        *byte ^= (uint8_t)(1 << bit % 8);
    }
    shard_file_close(file);
    free(written.bytes);
}

static void a_broken_leaf_is_named(void **state)
{
    (void)state;
    struct shard_fixture written;
    struct shard_file *file = NULL;
    struct error err = {0};
    shard_fixture_make(&written, 1, some_contract, 9000);
    assert_int_equal(parse(written.bytes, written.payload_offset, written.file_bytes, &file, &err), 0);
    assert_int_equal(shard_file_leaf_count(file), 3);
    uint8_t *zeros = calloc(1, SHARD_LEAF_BYTES);
    assert_non_null(zeros);
    zeros[7] = 1;
    assert_int_equal(shard_file_verify_leaf(file, 1, zeros, &err), ERR_CORRUPT);
    assert_string_equal(err.msg,
                        "rank-01-of-02.tpshard: rank 1: tensor embedding (embed), file bytes 3145728 to 4194303: "
                        "checksum mismatch; repair it: tpshard repair . --from SOURCE, the checkpoint or another copy");
    assert_int_equal(shard_file_verify_leaf(file, 2, zeros, &err), ERR_CORRUPT);
    assert_non_null(strstr(err.msg, "tensor embedding (embed) or one of the 12 behind it, file bytes 4194304 to "));
    free(zeros);
    shard_file_close(file);
    free(written.bytes);
}

// The command can be typed as it stands.
static void the_repair_is_named(void **state)
{
    (void)state;
    static const char *const cases[][2] = {
        {"rank", "repair it: tpshard repair . --from SOURCE, the checkpoint or another copy"},
        {"/rank", "repair it: tpshard repair / --from SOURCE, "},
        {"a/b-2.0/rank", "repair it: tpshard repair a/b-2.0 --from SOURCE, "},
        {"my models/x/rank", "repair it: tpshard repair 'my models/x' --from SOURCE, "},
        {"-a b/rank", "repair it: tpshard repair './-a b' --from SOURCE, "},
        {"it's/rank", "repair it: tpshard repair DIR --from SOURCE, "},
        {"https://host/x/rank", "repair it where it was published: tpshard repair DIR --from SOURCE, "},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct error err = {0};
        struct shard_file *file = NULL;
        assert_int_equal(shard_file_parse(&file, some_contract, 16, 16, cases[i][0], &err), ERR_CORRUPT);
        if (!strstr(err.msg, cases[i][1]))
            fail_msg("'%s' instead of '%s'", err.msg, cases[i][1]);
    }
}

// ---- fields ---------------------------------------------------------------------------------------------------------

// A change that a checksum does not see, because whoever made it computed the checksum anew.
static void every_field(void **state)
{
    (void)state;
    enum { T = 320, P = T + 80 * SHARD_FIXTURE_TENSORS, PARTS = 20, S = P + 64 * PARTS };
    static const struct {
        const char *what;
        uint64_t offset;
        int bytes;
        uint64_t value;
        const char *wanted;
    } cases[] = {
        {"magic", 0, 1, 't', "not a rank file"},
        {"line end converted", 7, 1, '\r', "not a rank file"},
        {"version 0", 8, 4, 0, "version 0, this program reads version 2"},
        {"version 1", 8, 4, 1, "version 1, this program reads version 2"},
        {"header bytes", 12, 4, 512, "reserved field"},
        {"required feature", 16, 4, 4, "needs features 0x4 "},
        {"stages, but there is one", 16, 4, 2, "impossible layers of stage 0 of 1"},
        {"a first layer, but there is one stage", 120, 4, 1, "reserved field"},
        {"layers of a stage, but there is one", 124, 4, 1, "reserved field"},
        {"compressed, but it is not", 16, 4, 1, "its table of leaves: a leaf has an impossible code or length"},
        {"last required feature", 16, 4, 0x80000000u, "needs features 0x80000000 "},
        {"optional features", 20, 4, 0xffffffffu, NULL},
        {"rank", 24, 4, 2, "impossible rank 2 of 2"},
        {"tp_size 0", 28, 4, 0, "impossible rank"},
        {"tp_size 2^31", 28, 4, 0x80000000u, "impossible rank"},
        {"tp_size 4 is legal here", 28, 4, 4, NULL},
        {"pp_rank", 32, 4, 1, "stage 1 of 1"},
        {"pp_size 0", 36, 4, 0, "stage 0 of 0"},
        {"no tensor", 40, 4, 0, "holds no tensor"},
        {"one tensor less", 40, 4, SHARD_FIXTURE_TENSORS - 1, "offset of parts"},
        {"one tensor more", 40, 4, SHARD_FIXTURE_TENSORS + 1, "offset of parts"},
        {"2^32 - 1 tensors", 40, 4, 0xffffffffu, "impossible counts"},
        {"one part less", 44, 4, PARTS - 1, "offset of names"},
        {"2^32 - 1 parts", 44, 4, 0xffffffffu, "impossible counts"},
        {"tensors offset", 48, 8, 512, "offset of tensors"},
        {"parts offset", 56, 8, 0, "offset of parts"},
        {"strings offset", 64, 8, UINT64_MAX, "offset of names"},
        {"strings bytes 0", 72, 8, 0, "offset of leaves"},
        {"strings bytes 2^64 - 1", 72, 8, UINT64_MAX, "impossible counts"},
        {"leaves offset", 80, 8, 3, "offset of leaves"},
        {"leaf count 0", 88, 8, 0, "count of leaves"},
        {"leaf count", 88, 8, 1ull << 61, "count of leaves"},
        {"payload offset 0", 96, 8, 0, "impossible payload offset 0"},
        {"payload offset 3", 96, 8, 3, "impossible payload offset 3"},
        {"payload offset 2^31", 96, 8, 1ull << 31, "impossible payload offset"},
        {"payload offset 2^64 - 2 MiB", 96, 8, 0ull - (2 << 20), "impossible payload offset"},
        {"payload offset 4 MiB", 96, 8, 4 << 20, "truncated"},
        {"payload bytes 0", 104, 8, 0, "count of leaves"},
        {"payload bytes + 1", 104, 8, 1, NULL}, // patched below
        {"payload bytes 2^64 - 1", 104, 8, UINT64_MAX, "impossible counts"},
        {"file bytes", 112, 8, 4096, "its header says 4096"},
        {"contract", 128, 8, UINT64_MAX, NULL},
        {"share", 144, 8, 1ull << 31, "impossible share"},
        {"negative share", 200, 8, UINT64_MAX, "impossible share"},
        {"last share", 248, 8, UINT64_MAX, "impossible share (field 13 "},
        {"share is another rank's", 144, 8, 0, NULL},
        {"reserved", 272, 1, 1, "reserved field"},
        {"reserved end", 319, 1, 1, "reserved field"},

        {"role 38", T + 80 * 3, 4, 38, "tensor 3: unknown role 38"},
        {"role 2^32 - 1", T + 80 * 3, 4, 0xffffffffu, "unknown role"},
        {"layer -1 in a layer", T + 80 * 3 + 4, 4, 0xffffffffu, "tensor 3 (qkv): impossible layer -1"},
        {"layer 65536", T + 80 * 3 + 4, 4, 65536, "impossible layer 65536"},
        {"layer outside the layers", T + 4, 4, 0, "tensor 0 (embedding): impossible layer 0"},
        {"twice the same", T + 80 * 3 + 4, 4, 1, "two tensors are qkv of layer 1"},
        {"kind 10", T + 80 * 3 + 8, 4, WEIGHT_KIND_COUNT, "impossible kind 10"},
        {"kind 2^32 - 1", T + 80 * 3 + 8, 4, 0xffffffffu, "impossible kind"},
        {"vector of bf16", T + 80 * 2 + 8, 4, 1, "one row of f32"},
        {"vector of two rows", T + 80 * 2 + 16, 8, 2, "one row of f32"},
        {"group size 0", T + 80 * 3 + 12, 4, 0, "group size 0"},
        {"group size 33", T + 80 * 3 + 12, 4, 33, "group size 33"},
        {"group size of int8", T + 80 * 10 + 12, 4, 32, "group size 32"},
        {"another group size", T + 80 * 3 + 12, 4, 64, "out of place or has the wrong size"},
        {"rows 2^31", T + 80 * 3 + 16, 8, 1ull << 31, "impossible kind"},
        {"rows + 1", T + 80 * 3 + 16, 8, 129, "do not add up to 129 x 128"},
        {"cols", T + 80 * 3 + 24, 8, 64, "do not add up to 128 x 64"},
        {"cols 2^64 - 1", T + 80 * 3 + 24, 8, UINT64_MAX, "impossible kind"},
        {"data offset + 256", T + 80 * 3 + 32, 8, 100096, "out of place"},
        {"data offset", T + 32, 8, UINT64_MAX - 255, "tensor 0 (embedding) is out of place"},
        {"data bytes", T + 40, 8, 1ull << 40, "out of place"},
        {"scale offset without scales", T + 48, 8, 256, "out of place"},
        {"scale offset 0", T + 80 * 3 + 48, 8, 0, "out of place"},
        {"scale bytes", T + 80 * 3 + 56, 8, 0, "out of place"},
        {"first part", T + 80 * 3 + 64, 4, 0, "tensor 3 (qkv): its parts are out of place"},
        {"no parts", T + 80 * 3 + 68, 4, 0, "tensor 4 (qkv_bias): its parts are out of place"},
        {"5 parts", T + 80 * 3 + 68, 4, 5, "its parts are out of place"},
        {"2^32 - 1 parts of a tensor", T + 80 * 3 + 68, 4, 0xffffffffu, "its parts are out of place"},
        {"no parts at the end", T + 80 * 15 + 68, 4, 0, "belong to no tensor"},
        {"more parts than there are", T + 80 * 15 + 68, 4, 2, "its parts are out of place"},
        {"expert of a layer's tensor", T + 80 * 3 + 72, 4, 0, "tensor 3 (qkv): impossible expert 0"},
        {"reserved of a tensor", T + 80 * 12 + 76, 4, 1, "out of place"},
        {"expert -1", T + 80 * 14 + 72, 4, 0xffffffffu, "tensor 14 (expert_down): impossible expert -1"},
        {"expert 65536", T + 80 * 14 + 72, 4, 65536, "tensor 14 (expert_down): impossible expert 65536"},
        {"twice the same expert", T + 80 * 14 + 72, 4, 1, "two tensors are expert_down of layer 1 (expert 1)"},
        {"another expert", T + 80 * 14 + 72, 4, 2, NULL},
        {"router of f32", T + 80 * 13 + 8, 4, 0, "tensor 13 (router) must be bf16"},

        {"name offset", P + 64 + 0, 4, 0, "part 1: its name is out of place"},
        {"name bytes 0", P + 4, 4, 0, "part 0: its name is out of place"},
        {"name bytes 2^32 - 1", P + 4, 4, 0xffffffffu, "part 0: its name is out of place"},
        {"name too short", P + 4, 4, 4, "part 0: its name is out of place"},
        {"name with its end", P + 4, 4, 6, "part 0: its name is out of place"},
        {"rows outside", P + 8, 8, 149, "part 0 (embed) does not lie inside its source"},
        {"cols outside", P + 16, 8, 127, "does not lie inside its source"},
        {"source rows 2^31", P + 8, 8, 1ull << 31, "does not lie inside its source"},
        {"row begin", P + 24, 8, 151, "does not lie inside its source"},
        {"row begin 2^64 - 1", P + 24, 8, UINT64_MAX, "does not lie inside its source"},
        {"rows of a part", P + 32, 8, 149, "do not add up"},
        {"rows of a part 2^64 - 1", P + 32, 8, UINT64_MAX, "does not lie inside its source"},
        {"col begin", P + 40, 8, 1, "does not lie inside its source"},
        {"cols of a part", P + 48, 8, 127, "do not add up"},
        {"a part of a vector with no row", P + 64 + 32, 8, 0, "do not add up"},
        {"a part of a vector from a matrix", P + 64 + 8, 8, 2, "do not add up"},
        {"reserved of a part", P + 56, 8, 1, "does not lie inside its source"},

        {"control character in a name", S, 1, '\n', "part 0: its name holds byte 0x0a"},
        {"letter beyond ASCII", S, 1, 0xc3, "part 0: its name holds byte 0xc3"},
        {"NUL in a name", S, 1, 0, "part 0: its name holds byte 0x00"},
        {"name not ended", S + 5, 1, '.', "part 0: its name is out of place"},
        {"another name", S, 1, 'f', NULL},
        {"padding of the head", (2 << 20) - 1, 1, 1, "padding of its head is not zero"},
    };
    struct shard_fixture file;
    shard_fixture_make(&file, 1, some_contract, 0);
    uint8_t *head = malloc(file.payload_offset);
    assert_non_null(head);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        memcpy(head, file.bytes, file.payload_offset);
        uint64_t value = cases[i].value;
        const char *wanted = cases[i].wanted;
        if (strcmp(cases[i].what, "payload bytes + 1") == 0) {
            value = file.payload_bytes + 1;
            wanted = "size of the payload";
        }
        assert_true(memcmp(head + cases[i].offset, &value, (size_t)cases[i].bytes) != 0); // it is a change
        memcpy(head + cases[i].offset, &value, (size_t)cases[i].bytes);
        put_head_hash(head, file.payload_offset);
        if (wanted) {
            assert_refused(head, file.payload_offset, file.file_bytes, wanted, cases[i].what);
            continue;
        }
        struct shard_file *out = NULL;
        struct error err = {0};
        if (parse(head, file.payload_offset, file.file_bytes, &out, &err))
            fail_msg("%s: %s", cases[i].what, err.msg);
        shard_file_close(out);
    }
    free(head);
    free(file.bytes);
}

// Changes of more than one field that fit each other.
static void consistent_lies(void **state)
{
    (void)state;
    struct shard_fixture file;
    shard_fixture_make(&file, 1, some_contract, 0);
    uint64_t longer[2] = {file.payload_bytes + 4096, file.file_bytes + 4096}, strings_bytes;
    memcpy(file.bytes + 104, longer, sizeof longer);
    put_head_hash(file.bytes, file.payload_offset);
    assert_refused(file.bytes, file.payload_offset, file.file_bytes + 4096, "its tensors end at", "a page too many");
    longer[0] = file.payload_bytes;
    longer[1] = file.file_bytes;
    memcpy(file.bytes + 104, longer, sizeof longer);

    memcpy(&strings_bytes, file.bytes + 72, 8);
    assert_true(strings_bytes % 16 != 0); // the padding has room for one more
    strings_bytes++;
    memcpy(file.bytes + 72, &strings_bytes, 8);
    put_head_hash(file.bytes, file.payload_offset);
    assert_refused(file.bytes, file.payload_offset, file.file_bytes, "belong to no tensor", "a byte behind the names");
    free(file.bytes);
}

// The writer refuses what the reader would.
static void writer_refuses(void **state)
{
    (void)state;
    char long_name[257];
    memset(long_name, 'n', 256);
    long_name[256] = 0;
    const char *names[] = {"", "a\nb", "caf\xc3\xa9", long_name};
    struct shard_fixture file;
    shard_fixture_make(&file, 1, some_contract, 0);
    uint64_t leaf = 0;
    uint8_t *head = NULL;
    struct error err = {0};
    for (size_t i = 0; i < 4; i++) {
        file.tensors[0].parts[0].source = names[i];
        assert_int_equal(
            shard_head_serialise(&head, &file.identity, file.tensors, SHARD_FIXTURE_TENSORS, &leaf, NULL, &err),
            ERR_CORRUPT);
    }
    file.tensors[0].parts[0].source = long_name + 1;
    assert_int_equal(
        shard_head_serialise(&head, &file.identity, file.tensors, SHARD_FIXTURE_TENSORS, &leaf, NULL, &err), 0);
    free(head);
    head = NULL;
    file.tensors[12].layer = 0;
    assert_int_equal(
        shard_head_serialise(&head, &file.identity, file.tensors, SHARD_FIXTURE_TENSORS, &leaf, NULL, &err),
        ERR_CORRUPT);
    assert_non_null(strstr(err.msg, "two tensors are o of layer 0 (expert -1)"));
    file.tensors[12].layer = 1;
    file.identity.rank = 2;
    assert_int_equal(
        shard_head_serialise(&head, &file.identity, file.tensors, SHARD_FIXTURE_TENSORS, &leaf, NULL, &err),
        ERR_CORRUPT);
    assert_null(head);
    free(file.bytes);
}

// More weights than an index can cover: said at layout, before anything is written.
static void too_large(void **state)
{
    (void)state;
    struct shard_tensor tensors[5];
    uint64_t payload_offset, payload_bytes, file_bytes;
    struct error err = {0};
    for (int32_t i = 0; i < 5; i++)
        shard_fixture_set_tensor(&tensors[i], ROLE_QKV, i, WEIGHT_INT8, 0, 0x7fffffff, 0x7fffffff);
    assert_int_equal(shard_layout(tensors, 5, &payload_offset, &payload_bytes, &file_bytes, &err), ERR_MODEL);
    assert_non_null(strstr(err.msg, "2^64"));
    assert_int_equal(shard_layout(tensors, 1, &payload_offset, &payload_bytes, &file_bytes, &err), ERR_MODEL);
    assert_non_null(strstr(err.msg, "64 MiB"));
    shard_fixture_set_tensor(&tensors[0], ROLE_QKV, 0, WEIGHT_INT8, 0, 0x7fffffff, 4097); // 8 TiB: the leaves alone
    assert_int_equal(shard_layout(tensors, 1, &payload_offset, &payload_bytes, &file_bytes, &err), ERR_MODEL);
    assert_non_null(strstr(err.msg, "64 MiB"));
    // A large model's rank file: the index needs no more than one step of 2 MiB.
    shard_fixture_set_tensor(&tensors[0], ROLE_QKV, 0, WEIGHT_INT8, 0, 1 << 20, 40 << 10);
    assert_int_equal(shard_layout(tensors, 1, &payload_offset, &payload_bytes, &file_bytes, &err), 0);
    assert_int_equal(payload_offset, 2 << 20);
}

// ---- files ----------------------------------------------------------------------------------------------------------

static char dir[64];

static int make_dir(void **state)
{
    (void)state;
    snprintf(dir, sizeof dir, "/tmp/test_shard_file_XXXXXX");
    return mkdtemp(dir) ? 0 : -1;
}

static int remove_dir(void **state)
{
    (void)state;
    return rmdir(dir);
}

static void opens_and_maps(void **state)
{
    (void)state;
    struct shard_fixture written;
    struct shard_file *file = NULL;
    struct error err = {0};
    char path[128];
    shard_fixture_make(&written, 0, some_contract, 5000);
    snprintf(path, sizeof path, "%s/rank", dir);
    assert_int_equal(shard_file_open(&file, path, &err), ERR_IO);
    assert_int_equal(shard_file_open(&file, dir, &err), ERR_IO);
    assert_int_equal(file_write_atomic(dir, "rank", written.bytes, written.file_bytes, &err), 0);
    if (shard_file_open(&file, path, &err))
        fail_msg("%s", err.msg);
    assert_memory_equal(shard_file_payload(file), written.bytes + written.payload_offset, written.payload_bytes);
    for (uint64_t i = 0; i < shard_file_leaf_count(file); i++)
        assert_int_equal(shard_file_verify_leaf(file, i, shard_file_payload(file) + i * SHARD_LEAF_BYTES, &err), 0);
    assert_int_equal(shard_file_identity(file)->rank, 0);
    shard_file_close(file);

    // A compressed one is not mapped.
    struct shard_fixture compressed;
    shard_fixture_make(&compressed, 0, some_contract, 5000);
    shard_fixture_compress(&compressed);
    assert_int_equal(file_write_atomic(dir, "rank", compressed.bytes, compressed.file_bytes, &err), 0);
    assert_int_equal(shard_file_open(&file, path, &err), 0);
    assert_null(shard_file_payload(file));
    shard_file_close(file);
    assert_int_equal(truncate(path, (off_t)compressed.file_bytes - 4096), 0);
    assert_int_equal(shard_file_open(&file, path, &err), ERR_CORRUPT);
    free(compressed.bytes);
    assert_int_equal(file_write_atomic(dir, "rank", written.bytes, written.file_bytes, &err), 0);

    // Cut anywhere, or with bytes behind it.
    const uint64_t lengths[] = {written.file_bytes + 1,
                                written.file_bytes - 1,
                                written.payload_offset + 1,
                                written.payload_offset,
                                written.payload_offset - 1,
                                SHARD_LEAF_BYTES,
                                4096,
                                321,
                                320,
                                319,
                                1,
                                0};
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        assert_int_equal(truncate(path, (off_t)lengths[i]), 0);
        file = NULL;
        assert_int_equal(shard_file_open(&file, path, &err), ERR_CORRUPT);
        assert_true(strncmp(err.msg, path, strlen(path)) == 0);
        assert_null(file);
    }
    // A header that promises a head of any size costs no memory for it.
    uint64_t nonsense = UINT64_MAX;
    memcpy(written.bytes + 96, &nonsense, 8);
    assert_int_equal(file_write_atomic(dir, "rank", written.bytes, 4096, &err), 0);
    assert_int_equal(shard_file_open(&file, path, &err), ERR_CORRUPT);
    unlink(path);
    free(written.bytes);
    shard_file_close(NULL);
}

// ---- a directory ----------------------------------------------------------------------------------------------------

static uint8_t *read_file(const char *folder, const char *name, uint64_t *bytes)
{
    char path[256];
    uint8_t *data = NULL;
    struct error err = {0};
    snprintf(path, sizeof path, "%s/%s", folder, name);
    if (file_read_all(&data, bytes, path, 64 << 20, ERR_OTHER, &err))
        fail_msg("%s", err.msg);
    return data;
}

// Files of this version, once released, are read for ever, and written byte for byte.
static void golden(void **state)
{
    (void)state;
    static const char golden_dir[] = "tests/golden/shard_file";
    static const char *const names[] = {"model.json", "note.txt", "rank-00-of-02.tpshard", "rank-01-of-02.tpshard"};
    shard_fixture_write(dir, false);
    struct manifest *manifest = NULL;
    struct error err = {0};
    if (manifest_read(&manifest, dir, &err))
        fail_msg("%s", err.msg);
    for (int i = 0; i < 4; i++) {
        uint64_t bytes, stored_bytes;
        uint8_t *written = read_file(dir, names[i], &bytes), *stored, *unpacked = NULL;
        if (i < 2) {
            stored = read_file(golden_dir, names[i], &stored_bytes);
        } else { // compressed, for the head is mostly zeros
            char name[64];
            snprintf(name, sizeof name, "%s.zst", names[i]);
            stored = read_file(golden_dir, name, &stored_bytes);
            unpacked = malloc(bytes);
            assert_non_null(unpacked);
            stored_bytes = ZSTD_decompress(unpacked, bytes, stored, stored_bytes);
            struct shard_file *file = NULL;
            if (shard_file_parse(&file, unpacked, bytes, bytes, names[i], &err))
                fail_msg("%s", err.msg);
            assert_true(checksum128_equal(shard_file_root(file), manifest->ranks[i - 2].hash));
            for (uint64_t leaf = 0; leaf < shard_file_leaf_count(file); leaf++)
                assert_int_equal(
                    shard_file_verify_leaf(file, leaf,
                                           unpacked + shard_file_payload_offset(file) + leaf * SHARD_LEAF_BYTES, &err),
                    0);
            shard_file_close(file);
        }
        if (stored_bytes != bytes || memcmp(unpacked ? unpacked : stored, written, bytes) != 0)
            fail_msg("%s differs from the golden file", names[i]);
        free(unpacked);
        free(stored);
        free(written);
        char path[256];
        snprintf(path, sizeof path, "%s/%s", dir, names[i]);
        unlink(path);
    }
    manifest_free(manifest);
}

int main(int argc, char **argv)
{
    if (argc == 3 && strcmp(argv[1], "--write") == 0) {
        shard_fixture_write(argv[2], false);
        return 0;
    }
    if (argc == 3 && strcmp(argv[1], "--write-compressed") == 0) {
        shard_fixture_write(argv[2], true);
        return 0;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(layout_follows_the_rules),
        cmocka_unit_test(what_is_written_is_read),
        cmocka_unit_test(roles_have_names),
        cmocka_unit_test(truncated),
        cmocka_unit_test(every_flipped_bit_of_the_head),
        cmocka_unit_test(flipped_bits_of_the_payload),
        cmocka_unit_test(a_broken_leaf_is_named),
        cmocka_unit_test(the_repair_is_named),
        cmocka_unit_test(every_field),
        cmocka_unit_test(consistent_lies),
        cmocka_unit_test(writer_refuses),
        cmocka_unit_test(too_large),
        cmocka_unit_test_setup_teardown(opens_and_maps, make_dir, remove_dir),
        cmocka_unit_test_setup_teardown(golden, make_dir, remove_dir),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
