// The strict safetensors header reader: tables of good and bad headers, truncation, damage, large headers.
#include "formats/safetensors.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

// Parses a file made of this header and data_bytes of data; both ends of the memory are exact.
static int parse(const char *json, size_t json_bytes, uint64_t data_bytes, struct safetensors_header **out,
                 struct error *err)
{
    uint8_t *file = malloc(8 + json_bytes);
    assert_non_null(file);
    for (int i = 0; i < 8; i++)
        file[i] = (uint8_t)((uint64_t)json_bytes >> 8 * i);
    memcpy(file + 8, json, json_bytes);
    int rc = safetensors_parse(file, 8 + json_bytes, 8 + json_bytes + data_bytes, "test.safetensors", out, err);
    free(file);
    return rc;
}

// One tensor with this shape, dtype and offsets.
#define TENSOR(name, dtype, shape, offsets)                                                                            \
    "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":" offsets "}"
#define ONE(dtype, shape, offsets) "{" TENSOR("a", dtype, shape, offsets) "}"
#define NAMED(name) "{" TENSOR(name, "U8", "[1]", "[0,1]") "}"
#define METADATA(text) "{\"__metadata__\":" text "," TENSOR("a", "U8", "[1]", "[0,1]") "}"

// word is null for what must be accepted, else a part of the message.
static const struct header_case {
    const char *what, *json, *word;
    uint64_t data_bytes;
} cases[] = {
    // Accepted
    {"no tensors", "{}", NULL, 0},
    {"one tensor", ONE("F32", "[2,3]", "[0,24]"), NULL, 24},
    {"white space around", " \t\r\n{ } \n\t ", NULL, 0},
    {"white space within", "{ \"a\" : { \"shape\" : [ 1 , 2 ] ,\n\"data_offsets\":[ 0 , 2 ], \"dtype\" : \"I8\" } }",
     NULL, 2},
    {"scalar", ONE("F64", "[]", "[0,8]"), NULL, 8},
    {"zero dimension", ONE("F32", "[0,18446744073709551615]", "[0,0]"), NULL, 0},
    {"eight dimensions", ONE("BOOL", "[1,1,1,1,1,1,1,1]", "[0,1]"), NULL, 1},
    {"F4", ONE("F4", "[3,2]", "[0,3]"), NULL, 3},
    {"F8_E8M0", ONE("F8_E8M0", "[3]", "[0,3]"), NULL, 3},
    {"metadata", METADATA("{\"format\":\"pt\",\"\":\"\",\"x\":\"\\n\\u0000\"}"), NULL, 1},
    {"empty metadata", METADATA("{}"), NULL, 1},
    {"slash in a name", NAMED("a/b"), NULL, 1},
    {"dots as a name", NAMED("../.."), NULL, 1},
    {"escaped and raw UTF-8", NAMED("\\u00e9\xc3\xa9\\ud83d\\ude00"), NULL, 1},
    {"data order differs from name order",
     "{" TENSOR("b", "U8", "[1]", "[0,1]") "," TENSOR("a", "U8", "[2]", "[1,3]") "}", NULL, 3},
    {"empty tensor between",
     "{" TENSOR("a", "U8", "[1]", "[0,1]") "," TENSOR("b", "U8", "[0]", "[1,1]") "," TENSOR("c", "U8", "[1]",
                                                                                            "[1,2]") "}",
     NULL, 2},
    {"empty tensor before, by name after",
     "{" TENSOR("a", "U8", "[1]", "[0,1]") "," TENSOR("b", "U8", "[0]", "[0,0]") "}", NULL, 1},
    {"name that begins like metadata", NAMED("__metadata__x"), NULL, 1},
    // P2: not a JSON object in UTF-8
    {"empty", "", "'{' is missing", 0},
    {"array", "[]", "'{' is needed, found '['", 0},
    {"null", "null", "'{' is needed", 0},
    {"byte order mark", "\xef\xbb\xbf{}", "'{' is needed", 0},
    {"unterminated object", "{", "a string is missing", 0},
    {"unterminated after key", "{\"a\"", "':' is missing", 0},
    {"unterminated string", "{\"a", "ends within a string", 0},
    {"unterminated escape", "{\"a\\", "escape", 0},
    {"unterminated unicode", "{\"a\\u00", "hexadecimal", 0},
    {"trailing bytes", "{}x", "the end of the JSON is needed, found 'x'", 0},
    {"second object", "{}{}", "the end of the JSON", 0},
    {"trailing comma", "{" TENSOR("a", "U8", "[1]", "[0,1]") ",}", "a string is needed", 1},
    {"leading comma", "{," TENSOR("a", "U8", "[1]", "[0,1]") "}", "a string is needed", 1},
    {"missing comma", "{" TENSOR("a", "U8", "[1]", "[0,1]") TENSOR("b", "U8", "[1]", "[1,2]") "}", "',' or '}'", 2},
    {"comment", "{/**/}", "a string is needed", 0},
    {"single quotes", "{'a':1}", "a string is needed", 0},
    {"tensor is an array", "{\"a\":[]}", "'{' is needed", 0},
    {"not UTF-8", NAMED("\xff"), "UTF-8", 1},
    {"lone continuation", NAMED("\x80"), "UTF-8", 1},
    {"overlong slash", NAMED("\xc0\xaf"), "UTF-8", 1},
    {"overlong of three", NAMED("\xe0\x80\xaf"), "UTF-8", 1},
    {"overlong of four", NAMED("\xf0\x80\x80\xaf"), "UTF-8", 1},
    {"surrogate in UTF-8", NAMED("\xed\xa0\x80"), "UTF-8", 1},
    {"beyond U+10FFFF", NAMED("\xf4\x90\x80\x80"), "UTF-8", 1},
    {"cut sequence", NAMED("\xe2\x82"), "UTF-8", 1},
    {"lone high surrogate", NAMED("\\ud800"), "surrogate", 1},
    {"lone low surrogate", NAMED("\\udc00"), "surrogate", 1},
    {"two high surrogates", NAMED("\\ud800\\ud800"), "surrogate", 1},
    {"unknown escape", NAMED("\\x41"), "escape", 1},
    {"bad hexadecimal", NAMED("\\u00g0"), "hexadecimal", 1},
    // P3: keys
    {"duplicate name", "{" TENSOR("a", "U8", "[1]", "[0,1]") "," TENSOR("a", "U8", "[1]", "[1,2]") "}", "'a' twice", 2},
    {"duplicate name, same offsets", "{" TENSOR("a", "U8", "[1]", "[0,1]") "," TENSOR("a", "U8", "[1]", "[0,1]") "}",
     "'a' twice", 1},
    {"duplicate name by escape", "{" TENSOR("a", "U8", "[1]", "[0,1]") "," TENSOR("\\u0061", "U8", "[1]", "[1,2]") "}",
     "'a' twice", 2},
    {"empty name", NAMED(""), "name must have", 1},
    {"escaped NUL in a name", NAMED("a\\u0000b"), "name must have", 1},
    {"raw newline in a name", NAMED("a\nb"), "control character", 1},
    {"escaped newline in a name", NAMED("a\\nb"), "name must have", 1},
    {"terminal escape in a name", NAMED("\\u001b[2J"), "name must have", 1},
    {"delete in a name", NAMED("\x7f"), "name must have", 1},
    {"Latin-1 control in a name", NAMED("\\u009b2J"), "name must have", 1},
    {"metadata twice", "{\"__metadata__\":{},\"__metadata__\":{}}", "__metadata__ occurs twice", 0},
    {"metadata null", METADATA("null"), "'{' is needed", 1},
    {"metadata array", METADATA("[]"), "'{' is needed", 1},
    {"metadata of a number", METADATA("{\"a\":1}"), "a string is needed", 1},
    {"metadata nested", METADATA("{\"a\":{}}"), "a string is needed", 1},
    {"metadata key twice", METADATA("{\"k\":\"1\",\"l\":\"2\",\"k\":\"3\"}"), "'k' twice", 1},
    {"raw newline in metadata", METADATA("{\"k\":\"a\nb\"}"), "a control character in a string", 1},
    {"metadata key with NUL", METADATA("{\"k\\u0000\":\"1\"}"), "NUL", 1},
    {"unknown key", "{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1],\"x\":1}}", "unknown key 'x'", 1},
    {"dtype twice", "{\"a\":{\"dtype\":\"U8\",\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}",
     "twice the key 'dtype'", 1},
    {"no dtype", "{\"a\":{\"shape\":[1],\"data_offsets\":[0,1]}}", "has no dtype", 1},
    {"no shape", "{\"a\":{\"dtype\":\"U8\",\"data_offsets\":[0,1]}}", "has no shape", 1},
    {"no data_offsets", "{\"a\":{\"dtype\":\"U8\",\"shape\":[1]}}", "has no data_offsets", 1},
    {"nothing at all", "{\"a\":{}}", "has no dtype", 0},
    // P4: offsets
    {"negative offset", ONE("U8", "[1]", "[-1,0]"), "a data offset must be an integer", 1},
    {"real offset", ONE("U8", "[1]", "[0,1.0]"), "without sign, point or exponent", 1},
    {"exponent", ONE("U8", "[1000]", "[0,1e3]"), "without sign, point or exponent", 1000},
    {"string offset", ONE("U8", "[1]", "[0,\"1\"]"), "must be an integer", 1},
    {"null offset", ONE("U8", "[1]", "[0,null]"), "must be an integer", 1},
    {"leading zero", ONE("U8", "[1]", "[0,01]"), "must be an integer", 1},
    {"2^53 + 1", ONE("U8", "[9007199254740993]", "[0,9007199254740993]"), "the file has only 1", 1},
    {"2^64 - 1", ONE("U8", "[18446744073709551615]", "[0,18446744073709551615]"), "overflows", 1},
    {"2^64", ONE("U8", "[1]", "[0,18446744073709551616]"), "at most 64 bits", 1},
    {"reversed", ONE("U8", "[1]", "[1,0]"), "reversed", 1},
    {"one offset", ONE("U8", "[1]", "[0]"), "',' is needed", 1},
    {"three offsets", ONE("U8", "[1]", "[0,1,2]"), "']' is needed", 1},
    {"overlap by one", "{" TENSOR("a", "U8", "[2]", "[0,2]") "," TENSOR("b", "U8", "[2]", "[1,3]") "}",
     "'b' begins at data byte 1, but the tensor before it ends at 2", 3},
    {"same bytes twice", "{" TENSOR("a", "U8", "[2]", "[0,2]") "," TENSOR("b", "U8", "[2]", "[0,2]") "}",
     "the tensor before it ends at 2", 2},
    {"hole of one", "{" TENSOR("a", "U8", "[2]", "[0,2]") "," TENSOR("b", "U8", "[2]", "[3,5]") "}",
     "nothing owns the bytes from 2", 5},
    {"hole at the front", ONE("U8", "[1]", "[1,2]"), "nothing owns the bytes from 0", 2},
    {"hole at the end", ONE("U8", "[1]", "[0,1]"), "the last 1 bytes of the file belong to no tensor", 2},
    {"tail of another format", ONE("U8", "[1]", "[0,1]"), "belong to no tensor", 5000},
    {"data without tensors", "{}", "belong to no tensor", 1},
    {"beyond the end by one", ONE("U8", "[2]", "[0,2]"), "truncated", 1},
    {"empty tensor beyond the end", ONE("U8", "[0]", "[9,9]"), "nothing owns", 0},
    // P5: shapes
    {"negative dimension", ONE("U8", "[-1]", "[0,1]"), "a dimension must be an integer", 1},
    {"real dimension", ONE("U8", "[1.5]", "[0,1]"), "a dimension must be an integer", 1},
    {"dimension of text", ONE("U8", "[\"1\"]", "[0,1]"), "a dimension must be an integer", 1},
    {"shape is a number", ONE("U8", "1", "[0,1]"), "'[' is needed", 1},
    {"shape with a trailing comma", ONE("U8", "[1,]", "[0,1]"), "a dimension must be an integer", 1},
    {"shape of shapes", ONE("U8", "[[1]]", "[0,1]"), "a dimension must be an integer", 1},
    {"nine dimensions", ONE("U8", "[1,1,1,1,1,1,1,1,1]", "[0,1]"), "more than 8 dimensions", 1},
    {"product wraps to 2^64 - 4", ONE("U8", "[2,18446744073709551614]", "[0,1]"), "overflows", 1},
    {"product wraps to 0", ONE("U8", "[4294967296,4294967296]", "[0,0]"), "overflows", 0},
    {"elements times bits wrap", ONE("F32", "[2,9223372036854775807]", "[0,1]"), "overflows", 1},
    {"bits alone wrap to 0", ONE("F64", "[288230376151711744]", "[0,0]"), "overflows", 0},
    {"overflow before a zero", ONE("U8", "[18446744073709551615,2,0]", "[0,0]"), "overflows", 0},
    // P6: dtypes
    {"unknown dtype", ONE("F128", "[1]", "[0,16]"), "'F128', which is not supported", 16},
    {"complex", ONE("C64", "[1]", "[0,8]"), "'C64', which is not supported", 8},
    {"lower case", ONE("f32", "[1]", "[0,4]"), "'f32', which is not supported", 4},
    {"dtype with NUL", ONE("F32\\u0000", "[1]", "[0,4]"), "not supported", 4},
    {"dtype is a number", "{\"a\":{\"dtype\":1,\"shape\":[1],\"data_offsets\":[0,1]}}", "a string is needed", 1},
    {"one byte too few", ONE("F32", "[2]", "[0,7]"), "need 8 bytes, data_offsets give 7", 7},
    {"one byte too many", ONE("F32", "[2]", "[0,9]"), "need 8 bytes, data_offsets give 9", 9},
    {"zero bytes for something", ONE("F32", "[1]", "[0,0]"), "need 4 bytes", 0},
    {"bytes for nothing", ONE("F32", "[0]", "[0,4]"), "need 0 bytes", 4},
    {"F4 of half a byte", ONE("F4", "[3]", "[0,2]"), "whole bytes", 2},
    {"F4 scalar", ONE("F4", "[]", "[0,1]"), "whole bytes", 1},
    {"F4 with odd rows", ONE("F4", "[2,3]", "[0,3]"), "whole bytes", 3},
};

static void test_table(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const struct header_case *c = &cases[i];
        struct safetensors_header *header = NULL;
        struct error err = {0};
        int rc = parse(c->json, strlen(c->json), c->data_bytes, &header, &err);
        if (rc != (c->word ? ERR_MODEL : 0))
            fail_msg("%s: code %d, %s", c->what, rc, err.msg);
        if (c->word &&
            (header || err.code != rc || strncmp(err.msg, "test.safetensors: ", 18) || !strstr(err.msg, c->word)))
            fail_msg("%s: '%s' does not say '%s'", c->what, err.msg, c->word);
        safetensors_free(header);
    }
}

static void test_fields(void **state)
{
    (void)state;
    static const char json[] = "{\"__metadata__\":{\"format\":\"pt\"}," TENSOR(
        "z.weight", "BF16", "[2,3]", "[4,16]") "," TENSOR("b\\u0041", "F32", "[]", "[0,4]") "}  ";
    struct safetensors_header *header;
    assert_int_equal(parse(json, strlen(json), 16, &header, NULL), 0);
    assert_int_equal(header->tensor_count, 2);
    const struct safetensors_tensor *b = &header->tensors[0], *z = &header->tensors[1];
    assert_string_equal(b->name, "bA");
    assert_int_equal(b->dtype, DTYPE_F32);
    assert_int_equal(b->num_dims, 0);
    assert_int_equal(b->offset, 8 + strlen(json));
    assert_int_equal(b->bytes, 4);
    assert_string_equal(z->name, "z.weight");
    assert_int_equal(z->dtype, DTYPE_BF16);
    assert_int_equal(z->num_dims, 2);
    assert_int_equal(z->dims[0], 2);
    assert_int_equal(z->dims[1], 3);
    assert_int_equal(z->offset, 8 + strlen(json) + 4);
    assert_int_equal(z->bytes, 12);
    assert_int_equal(z->file, 0);
    safetensors_free(header);
}

static void test_every_dtype(void **state)
{
    (void)state;
    static const struct {
        const char *name;
        enum dtype dtype;
        int bytes_of_two;
    } dtypes[] = {
        {"BOOL", DTYPE_BOOL, 2},       {"U8", DTYPE_U8, 2},           {"I8", DTYPE_I8, 2},
        {"I16", DTYPE_I16, 4},         {"U16", DTYPE_U16, 4},         {"F16", DTYPE_F16, 4},
        {"BF16", DTYPE_BF16, 4},       {"I32", DTYPE_I32, 8},         {"U32", DTYPE_U32, 8},
        {"F32", DTYPE_F32, 8},         {"F64", DTYPE_F64, 16},        {"I64", DTYPE_I64, 16},
        {"U64", DTYPE_U64, 16},        {"F8_E4M3", DTYPE_F8_E4M3, 2}, {"F8_E5M2", DTYPE_F8_E5M2, 2},
        {"F8_E8M0", DTYPE_F8_E8M0, 2}, {"F4", DTYPE_F4, 1},
    };
    assert_int_equal(sizeof dtypes / sizeof *dtypes, DTYPE_COUNT);
    for (int i = 0; i < DTYPE_COUNT; i++) {
        char json[256];
        snprintf(json, sizeof json, "{\"a\":{\"dtype\":\"%s\",\"shape\":[2],\"data_offsets\":[0,%d]}}", dtypes[i].name,
                 dtypes[i].bytes_of_two);
        struct safetensors_header *header;
        assert_int_equal(parse(json, strlen(json), (uint64_t)dtypes[i].bytes_of_two, &header, NULL), 0);
        assert_int_equal(header->tensors[0].dtype, dtypes[i].dtype);
        assert_string_equal(dtype_name(dtypes[i].dtype), dtypes[i].name);
        safetensors_free(header);
    }
}

// P1: the length word, and files that are too short for one.
static void test_length_word(void **state)
{
    (void)state;
    static const char json[] = ONE("U8", "[1]", "[0,1]");
    enum { FILE_BYTES = 8 + sizeof json - 1 + 1 };
    static const uint64_t lengths[] = {
        0,          7,          FILE_BYTES - 8 + 1, FILE_BYTES - 8, sizeof json - 2, 100000001,
        1ull << 31, 1ull << 32, 1ull << 63,         UINT64_MAX,     UINT64_MAX - 7};
    uint8_t file[FILE_BYTES] = {0};
    memcpy(file + 8, json, sizeof json - 1);
    struct safetensors_header *header = NULL;
    struct error err;
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        for (int b = 0; b < 8; b++)
            file[b] = (uint8_t)(lengths[i] >> 8 * b);
        if (safetensors_parse(file, sizeof file, sizeof file, "f", &header, &err) != ERR_MODEL || header)
            fail_msg("length %llu accepted", (unsigned long long)lengths[i]);
    }
    for (size_t bytes = 0; bytes < 8; bytes++)
        assert_int_equal(safetensors_parse(file, bytes, bytes, "f", &header, &err), ERR_MODEL);
    // Both sides of the cap.
    uint64_t header_bytes = 0;
    static const uint8_t at_cap[8] = {0, 0, 0, 2}, above_cap[8] = {1, 0, 0, 2};
    assert_int_equal(safetensors_header_bytes(at_cap, 1 << 30, "f", &header_bytes, &err), 0);
    assert_int_equal(header_bytes, SAFETENSORS_HEADER_CAP_BYTES);
    assert_int_equal(safetensors_header_bytes(above_cap, 1 << 30, "f", &header_bytes, &err), ERR_MODEL);
}

static void test_every_truncation_is_refused(void **state)
{
    (void)state;
    static const char json[] = METADATA("{\"format\":\"pt\"}");
    size_t json_bytes = sizeof json - 1, file_bytes = 8 + json_bytes + 1;
    struct safetensors_header *header = NULL;
    struct error err;
    // The file cut, the length word as it was.
    for (size_t cut = 0; cut < file_bytes; cut++) {
        uint8_t *file = calloc(1, cut ? cut : 1);
        assert_non_null(file);
        const uint8_t length = (uint8_t)json_bytes;
        memcpy(file, &length, cut ? 1 : 0);
        if (cut > 8)
            memcpy(file + 8, json, cut - 8 < json_bytes ? cut - 8 : json_bytes);
        assert_int_equal(safetensors_parse(file, cut, cut, "f", &header, &err), ERR_MODEL);
        free(file);
    }
    // The header cut, its length word with it.
    for (size_t cut = 0; cut < json_bytes; cut++)
        assert_int_equal(parse(json, cut, 1, &header, &err), ERR_MODEL);
}

// Every value of every byte of a header: refused, or accepted with tensors that lie within the file.
static void test_every_changed_byte(void **state)
{
    (void)state;
    char json[] =
        "{\"__metadata__\":{\"f\":\"p\"}," TENSOR("a", "U8", "[2]", "[0,2]") "," TENSOR("b", "F4", "[4]", "[2,4]") "}";
    int accepted = 0;
    for (size_t at = 0; at < sizeof json - 1; at++) {
        char keep = json[at];
        for (int value = 0; value < 256; value++) {
            json[at] = (char)value;
            struct safetensors_header *header;
            if (parse(json, sizeof json - 1, 4, &header, NULL))
                continue;
            accepted++;
            assert_true(header->tensor_count == 2 && header->tensors[0].bytes == 2 && header->tensors[1].bytes == 2);
            safetensors_free(header);
        }
        json[at] = keep;
    }
    // The unchanged byte at each place, other names and metadata, U8 <-> I8, "shape":[2] as it must be.
    assert_in_range(accepted, sizeof json - 1, 3 * 256);
}

static void test_names_at_the_limit(void **state)
{
    (void)state;
    for (int extra = 0; extra < 2; extra++) {
        size_t name_bytes = SAFETENSORS_NAME_BYTES + (size_t)extra;
        char *json = malloc(name_bytes + 128);
        assert_non_null(json);
        int begin = sprintf(json, "{\"");
        memset(json + begin, 'n', name_bytes);
        sprintf(json + begin + name_bytes, "\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}");
        struct safetensors_header *header = NULL;
        struct error err;
        assert_int_equal(parse(json, strlen(json), 1, &header, &err), extra ? ERR_MODEL : 0);
        safetensors_free(header);
        free(json);
    }
}

// P2: five million open brackets, at each place where a value may stand, are refused at the first or second one.
static void test_deep_nesting(void **state)
{
    (void)state;
    static const char *const heads[] = {"", "{\"a\":", "{\"__metadata__\":{\"k\":", "{\"a\":{\"shape\":"};
    enum { DEPTH = 5000000 };
    char *json = malloc(DEPTH + 64);
    assert_non_null(json);
    for (size_t i = 0; i < sizeof heads / sizeof *heads; i++) {
        size_t head_bytes = strlen(heads[i]);
        memcpy(json, heads[i], head_bytes);
        memset(json + head_bytes, '[', DEPTH);
        struct safetensors_header *header = NULL;
        assert_int_equal(parse(json, head_bytes + DEPTH, 0, &header, NULL), ERR_MODEL);
    }
    free(json);
}

// P7: a real large header (36,096 tensors, as mixtures of experts have) is accepted within a second of CPU time.
static void test_large_header(void **state)
{
    (void)state;
    enum { COUNT = 36096 };
    char *json = malloc(COUNT * 192);
    assert_non_null(json);
    size_t used = (size_t)sprintf(json, "{\"__metadata__\":{\"format\":\"pt\"}");
    for (int i = 0; i < COUNT; i++) {
        // 7919 is prime: names come in no order, data in order.
        int id = (int)((int64_t)i * 7919 % COUNT);
        used += (size_t)sprintf(
            json + used,
            ",\"model.layers.%d.mlp.experts.%d.down_proj.weight\":{\"dtype\":\"BF16\",\"shape\":[64,32],"
            "\"data_offsets\":[%lld,%lld]}",
            id / 384, id % 384, i * 4096ll, (i + 1) * 4096ll);
    }
    used += (size_t)sprintf(json + used, "}");
    struct safetensors_header *header;
    struct error err;
    struct timespec begin, end;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &begin);
    if (parse(json, used, COUNT * 4096ull, &header, &err))
        fail_msg("%s", err.msg);
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &end);
    double seconds = (double)(end.tv_sec - begin.tv_sec) + 1e-9 * (double)(end.tv_nsec - begin.tv_nsec);
    print_message("%d tensors, %zu bytes: %.1f ms\n", COUNT, used, 1e3 * seconds);
    assert_true(seconds <= 1.0);
    assert_int_equal(header->tensor_count, COUNT);
    for (int i = 1; i < COUNT; i++)
        assert_true(strcmp(header->tensors[i - 1].name, header->tensors[i].name) < 0);
    safetensors_free(header);
    free(json);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_table),
        cmocka_unit_test(test_fields),
        cmocka_unit_test(test_every_dtype),
        cmocka_unit_test(test_length_word),
        cmocka_unit_test(test_every_truncation_is_refused),
        cmocka_unit_test(test_every_changed_byte),
        cmocka_unit_test(test_names_at_the_limit),
        cmocka_unit_test(test_deep_nesting),
        cmocka_unit_test(test_large_header),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
