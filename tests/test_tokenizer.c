// The tokenizer against Hugging Face `tokenizers`, by golden ids (scripts/make_goldens_tokenizer.py), and against bad
// files. Data: tests/golden/tokenizer.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <jansson.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "formats/tokenizer.h"
#include "formats/tokenizer_text.h"

#define GOLDEN "tests/golden/tokenizer/"

static const char *const families[] = {
    "llama2", "llama2_metaspace", "llama2_normalized", "mistral_v3",  "phi3",   "gemma", "llama3", "qwen", "tekken",
    "phi4",   "gpt_oss",          "deepseek",          "gpt2_digits", "classes"};
enum { FAMILIES = sizeof families / sizeof *families };

// ---- help

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static json_t *load_json(const char *name)
{
    char path[128];
    json_error_t error;
    snprintf(path, sizeof path, GOLDEN "%s", name);
    json_t *json = json_load_file(path, JSON_ALLOW_NUL, &error);
    if (!json)
        fail_msg("%s: %s", path, error.text);
    return json;
}

struct opened {
    uint8_t *image;
    size_t bytes;
    struct tokenizer *tok;
};

static struct opened open_path(const char *path, uint64_t vocab_size)
{
    struct opened opened = {0};
    struct error err = {0};
    if (tokenizer_compile(&opened.image, &opened.bytes, path, NULL, vocab_size, &err) ||
        tokenizer_open(&opened.tok, opened.image, opened.bytes, path, &err))
        fail_msg("%s", err.msg);
    return opened;
}

static struct opened open_family(const char *family)
{
    char path[128];
    snprintf(path, sizeof path, GOLDEN "%s.tokenizer.json", family);
    return open_path(path, 1 << 20);
}

static void close_opened(struct opened *opened)
{
    tokenizer_close(opened->tok);
    free(opened->image);
}

// A temporary file with this content; the caller unlinks it and frees the name.
static char *temporary_file(const char *content, size_t bytes)
{
    char *path = strdup("/tmp/test_tokenizer_XXXXXX");
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, content, bytes), bytes);
    close(fd);
    return path;
}

static int compile_text(struct opened *opened, const char *json, size_t bytes, uint64_t vocab_size, struct error *err)
{
    char *path = temporary_file(json, bytes);
    *opened = (struct opened){0};
    int rc =
        tokenizer_compile(&opened->image, &opened->bytes, path, "/nonexistent/tokenizer_config.json", vocab_size, err);
    unlink(path);
    free(path);
    return rc ? rc : tokenizer_open(&opened->tok, opened->image, opened->bytes, "test", err);
}

static struct token_list encode(const struct tokenizer *tok, const char *text, size_t bytes, unsigned flags)
{
    struct token_list ids = {0};
    struct error err = {0};
    if (tokenizer_encode(tok, text, bytes, flags, &ids, &err))
        fail_msg("%s", err.msg);
    return ids;
}

static bool same_ids(const struct token_list *got, const json_t *want)
{
    if (got->count != json_array_size(want))
        return false;
    for (size_t i = 0; i < got->count; i++)
        if (got->ids[i] != (uint32_t)json_integer_value(json_array_get(want, i)))
            return false;
    return true;
}

static void print_ids(const char *label, const struct token_list *ids)
{
    print_message("%s", label);
    for (size_t i = 0; i < ids->count; i++)
        print_message(" %u", ids->ids[i]);
    print_message("\n");
}

static void check_ids(const char *where, const struct token_list *got, const json_t *text, const json_t *want)
{
    if (same_ids(got, want))
        return;
    char *wanted = json_dumps(want, JSON_COMPACT), *quoted = json_dumps(text, JSON_ENCODE_ANY | JSON_ENSURE_ASCII);
    print_ids("got", got);
    fail_msg("%s: %s: wanted %s", where, quoted, wanted);
}

static uint64_t hash_value(uint64_t hash, uint64_t value) { return (hash ^ value) * 0x100000001B3u; }
static const uint64_t HASH_START = 0xCBF29CE484222325u;

static void check_hash(const char *where, size_t block, uint64_t hash, const json_t *want)
{
    char got[32];
    snprintf(got, sizeof got, "%016llx", (unsigned long long)hash);
    if (strcmp(got, json_string_value(want)))
        fail_msg("%s: block %zu: hash %s, wanted %s", where, block, got, json_string_value(want));
}

// ---- the same random texts as in the script

struct random {
    uint64_t state;
};

static uint64_t below(struct random *random, uint64_t n) // splitmix64
{
    uint64_t z = random->state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return (z ^ z >> 31) % n;
}

static size_t put_code_point(char *to, uint32_t c)
{
    if (c < 0x80) {
        to[0] = (char)c;
        return 1;
    }
    size_t length = c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    for (size_t i = length - 1; i > 0; i--, c >>= 6)
        to[i] = (char)(0x80 | (c & 0x3F));
    to[0] = (char)((0xF00 >> length) | c);
    return length;
}

#define COUNT(array) (sizeof(array) / sizeof *(array))

// Appends at most 40 * 13 bytes; returns their number.
static size_t random_string(struct random *random, char *to)
{
    static const uint32_t spaces[] = {'\t',   '\n',   '\r',   '\v',   '\f',   0x85,   0xA0,   0x1680,
                                      0x2000, 0x2003, 0x2028, 0x2029, 0x202F, 0x205F, 0x3000, 0x200B};
    static const uint32_t marks[] = {0x300, 0x301, 0x308, 0x323, 0x327, 0x328,  0x338,  0x345,
                                     0x5B0, 0x64B, 0x93C, 0xE38, 0xF71, 0x3099, 0x20D0, 0x1D165};
    static const char *const pieces[] = {"<s>", "</s>",         "<|", "|>",   "[INST]", "<|endoftext|>", "'s",
                                         "'LL", "\xE2\x96\x81", "  ", "\r\n", "ing",    "the",           "<unk>"};
    static const uint32_t letters[][2] = {{0xC0, 0x24F},    {0x391, 0x3A1},     {0x3B1, 0x3C9},    {0x410, 0x44F},
                                          {0x5D0, 0x5EA},   {0x620, 0x64A},     {0x904, 0x939},    {0xE01, 0xE30},
                                          {0x1100, 0x1112}, {0x1161, 0x1175},   {0x11A8, 0x11C2},  {0x1E00, 0x1EFF},
                                          {0x3041, 0x3096}, {0x30A1, 0x30FA},   {0x4E00, 0x9FFC},  {0xAC00, 0xD7A3},
                                          {0xF900, 0xFA6D}, {0x10400, 0x1044F}, {0x20000, 0x2A6DD}};
    char *start = to;
    for (uint64_t left = below(random, 40); left; left--) {
        uint64_t kind = below(random, 16);
        if (kind < 5)
            *to++ = (char)('a' + below(random, 26));
        else if (kind == 5)
            *to++ = (char)('A' + below(random, 26));
        else if (kind == 6)
            *to++ = (char)('0' + below(random, 10));
        else if (kind < 9)
            *to++ = ' ';
        else if (kind == 9)
            to += put_code_point(to, spaces[below(random, COUNT(spaces))]);
        else if (kind == 10)
            *to++ = (char)('!' + below(random, 15));
        else if (kind < 13) {
            const uint32_t *range = letters[below(random, COUNT(letters))];
            to += put_code_point(to, range[0] + (uint32_t)below(random, range[1] - range[0] + 1));
        } else if (kind == 13)
            to += put_code_point(to, marks[below(random, COUNT(marks))]);
        else if (kind == 14)
            to += put_code_point(to, below(random, 4) ? 0x1F600 + (uint32_t)below(random, 64) : 0x200D);
        else {
            const char *piece = pieces[below(random, COUNT(pieces))];
            memcpy(to, piece, strlen(piece));
            to += strlen(piece);
        }
    }
    return (size_t)(to - start);
}

// ---- against Hugging Face

// Decodes at once and as a stream; both must agree, and every released text must be valid UTF-8.
static char *decode_both(const struct tokenizer *tok, const uint32_t *ids, size_t count, bool skip, size_t *bytes)
{
    char *text = NULL;
    struct tokenizer_text streamed = {0};
    struct tokenizer_stream *stream = NULL;
    struct error err = {0};
    const char *part;
    size_t part_bytes;
    if (tokenizer_decode(tok, ids, count, skip, &text, bytes, &err) || tokenizer_stream_new(&stream, tok, skip, &err))
        fail_msg("%s", err.msg);
    for (size_t i = 0; i <= count; i++) {
        int rc = i < count ? tokenizer_stream_push(stream, ids[i], &part, &part_bytes, &err)
                           : tokenizer_stream_flush(stream, &part, &part_bytes, &err);
        if (rc)
            fail_msg("%s", err.msg);
        assert_int_equal(tokenizer_text_valid_prefix(part, part_bytes), part_bytes);
        assert_true(tokenizer_text_append(&streamed, part, part_bytes));
    }
    assert_int_equal(streamed.bytes, *bytes);
    assert_true(!*bytes || !memcmp(streamed.data, text, *bytes));
    assert_int_equal(text[*bytes], 0);
    tokenizer_stream_free(stream);
    tokenizer_text_free(&streamed);
    return text;
}

static void check_decoded(const char *where, const struct tokenizer *tok, const struct token_list *ids, bool skip,
                          const json_t *want)
{
    size_t bytes;
    char *text = decode_both(tok, ids->ids, ids->count, skip, &bytes);
    if (bytes != json_string_length(want) || memcmp(text, json_string_value(want), bytes)) {
        print_ids("ids", ids);
        fail_msg("%s: decoded with skip_special=%d: \"%s\", wanted \"%s\"", where, skip, text, json_string_value(want));
    }
    free(text);
}

static void test_strings(void **state)
{
    (void)state;
    json_t *texts = load_json("texts.json"), *strings = json_object_get(texts, "strings"), *text;
    for (size_t f = 0; f < FAMILIES; f++) {
        char name[64];
        snprintf(name, sizeof name, "%s.golden.json", families[f]);
        json_t *golden = load_json(name);
        struct opened opened = open_family(families[f]);
        size_t i;
        json_array_foreach(strings, i, text)
        {
            struct token_list ids = encode(opened.tok, json_string_value(text), json_string_length(text), 0);
            check_ids(families[f], &ids, text, json_array_get(json_object_get(golden, "ids"), i));
            check_decoded(families[f], opened.tok, &ids, false, json_array_get(json_object_get(golden, "decoded"), i));
            check_decoded(families[f], opened.tok, &ids, true,
                          json_array_get(json_object_get(golden, "decoded_skipped"), i));
            free(ids.ids);
        }
        struct token_list special = encode(opened.tok, "x", 1, TOKENIZER_ADD_SPECIAL);
        check_ids(families[f], &special, NULL, json_object_get(golden, "special"));
        free(special.ids);
        assert_int_equal(tokenizer_vocab_size(opened.tok), json_integer_value(json_object_get(golden, "tokens")));
        close_opened(&opened);
        json_decref(golden);
    }
    json_decref(texts);
}

static void add_ids_to_hash(const struct tokenizer *tok, const char *text, size_t bytes, struct token_list *ids,
                            uint64_t *hash)
{
    struct error err = {0};
    ids->count = 0;
    if (tokenizer_encode(tok, text, bytes, 0, ids, &err))
        fail_msg("%s", err.msg);
    for (size_t i = 0; i < ids->count; i++)
        *hash = hash_value(*hash, ids->ids[i]);
}

// Every Unicode scalar value (but those assigned after Unicode 14) between letters and behind a space.
static void test_code_points(void **state)
{
    (void)state;
    static bool excluded[0x110000];
    json_t *texts = load_json("texts.json"), *range;
    size_t i;
    json_array_foreach(json_object_get(texts, "excluded"), i, range)
    {
        json_int_t last = json_integer_value(json_array_get(range, 1));
        for (json_int_t c = json_integer_value(json_array_get(range, 0)); c <= last; c++)
            excluded[c] = true;
    }
    json_decref(texts);
    for (size_t f = 0; f < FAMILIES; f++) {
        char name[64], line[64 * 16];
        snprintf(name, sizeof name, "%s.golden.json", families[f]);
        json_t *golden = load_json(name), *blocks = json_object_get(golden, "code_points");
        struct opened opened = open_family(families[f]);
        struct token_list ids = {0};
        for (uint32_t block = 0; block < 0x110; block++) {
            uint64_t hash = HASH_START;
            for (uint32_t start = block * 4096; start < (block + 1) * 4096; start += 64) {
                char *to = line;
                for (uint32_t c = start; c < start + 64; c++) {
                    if ((c >= 0xD800 && c <= 0xDFFF) || excluded[c])
                        continue;
                    *to++ = 'a';
                    to += put_code_point(to, c);
                    *to++ = 'b';
                    *to++ = ' ';
                    to += put_code_point(to, c);
                }
                add_ids_to_hash(opened.tok, line, (size_t)(to - line), &ids, &hash);
            }
            check_hash(families[f], block, hash, json_array_get(blocks, block));
        }
        free(ids.ids);
        close_opened(&opened);
        json_decref(golden);
    }
}

static void test_random(void **state)
{
    (void)state;
    for (size_t f = 0; f < FAMILIES; f++) {
        char name[64], text[40 * 16];
        snprintf(name, sizeof name, "%s.golden.json", families[f]);
        json_t *golden = load_json(name), *blocks = json_object_get(golden, "random");
        struct opened opened = open_family(families[f]);
        struct token_list ids = {0};
        struct random random = {1};
        for (size_t block = 0; block < 100; block++) {
            uint64_t hash = HASH_START;
            for (int i = 0; i < 100; i++)
                add_ids_to_hash(opened.tok, text, random_string(&random, text), &ids, &hash);
            check_hash(families[f], block, hash, json_array_get(blocks, block));
        }
        free(ids.ids);
        uint64_t hash = HASH_START;
        random.state = 2;
        for (int i = 0; i < 1000; i++) {
            uint32_t some[20];
            size_t count = below(&random, 20);
            for (size_t k = 0; k < count; k++)
                some[k] = (uint32_t)below(&random, tokenizer_vocab_size(opened.tok));
            for (int skip = 0; skip < 2; skip++) {
                size_t bytes;
                char *decoded = decode_both(opened.tok, some, count, skip, &bytes);
                for (size_t k = 0; k < bytes; k++)
                    hash = hash_value(hash, (uint8_t)decoded[k]);
                free(decoded);
            }
        }
        check_hash(families[f], 0, hash, json_object_get(golden, "random_decoded"));
        close_opened(&opened);
        json_decref(golden);
    }
}

// The base document with members of settings put over its own.
static struct opened open_with(const json_t *base, json_t *settings, json_t *model, json_t *extra_vocab)
{
    json_t *document = json_deep_copy(base), *own_model = json_object_get(document, "model");
    struct opened opened;
    struct error err = {0};
    if (settings)
        json_object_update(document, settings);
    if (model)
        json_object_update(own_model, model);
    if (extra_vocab)
        json_object_update(json_object_get(own_model, "vocab"), extra_vocab);
    char *text = json_dumps(document, JSON_COMPACT);
    if (compile_text(&opened, text, strlen(text), 1000, &err)) {
        char *shown = json_dumps(settings ? settings : model, JSON_COMPACT);
        fail_msg("%s: %s", shown, err.msg);
    }
    free(text);
    json_decref(document);
    return opened;
}

static void test_components(void **state)
{
    (void)state;
    json_t *all = load_json("components.json"), *one, *text;
    size_t i, k;
    json_array_foreach(json_object_get(all, "cases"), i, one)
    {
        json_t *settings = json_object_get(one, "settings"), *model = json_object_get(one, "model");
        json_t *texts = json_object_get(one, "texts");
        struct opened opened = open_with(json_object_get(all, "base"), settings, model, json_object_get(one, "extra"));
        char *where = json_dumps(settings ? settings : model, JSON_COMPACT);
        json_array_foreach(texts ? texts : json_object_get(all, "texts"), k, text)
        {
            struct token_list ids = encode(opened.tok, json_string_value(text), json_string_length(text), 0);
            check_ids(where, &ids, text, json_array_get(json_object_get(one, "ids"), k));
            check_decoded(where, opened.tok, &ids, true, json_array_get(json_object_get(one, "decoded"), k));
            free(ids.ids);
        }
        free(where);
        close_opened(&opened);
    }
    json_decref(all);
}

// ---- what Hugging Face cannot be asked

static void test_invalid_utf8(void **state)
{
    (void)state;
    static const struct {
        const char *bad, *repaired; // U+FFFD written as ?
    } cases[] = {
        {"a\xFFz", "a?z"},
        {"a\xC0\xAFz", "a??z"},           // overlong
        {"a\xE0\x80\xAFz", "a???z"},      // overlong
        {"a\xED\xA0\x80z", "a???z"},      // surrogate
        {"a\xF4\x90\x80\x80z", "a????z"}, // above U+10FFFF
        {"a\xF0\x9F\x98z", "a?z"},        // cut off: one maximal subpart
        {"a\xE2\x82\xE2\x82\xACz", "a?\xE2\x82\xACz"},
        {"a\xF0\x9F\x98", "a?"},
        {"\x80", "?"},
    };
    struct opened opened = open_family("llama3");
    for (size_t i = 0; i < COUNT(cases); i++) {
        struct tokenizer_text repaired = {0};
        for (const char *c = cases[i].repaired; *c; c++)
            assert_true(*c == '?' ? tokenizer_text_append(&repaired, "\xEF\xBF\xBD", 3)
                                  : tokenizer_text_append(&repaired, c, 1));
        struct token_list got = encode(opened.tok, cases[i].bad, strlen(cases[i].bad), 0);
        struct token_list want = encode(opened.tok, repaired.data, repaired.bytes, 0);
        assert_int_equal(got.count, want.count);
        assert_memory_equal(got.ids, want.ids, got.count * sizeof *got.ids);
        free(got.ids);
        free(want.ids);
        tokenizer_text_free(&repaired);
    }
    close_opened(&opened);
}

// Every special token, written in a text, is an ordinary text for TOKENIZER_PLAIN_TEXT, and survives a round trip.
static void test_plain_text(void **state)
{
    (void)state;
    for (size_t f = 0; f < FAMILIES; f++) {
        struct opened opened = open_family(families[f]);
        for (uint32_t special = 0; special < tokenizer_vocab_size(opened.tok); special++) {
            size_t bytes;
            if (!tokenizer_is_special(opened.tok, special))
                continue;
            char *content = decode_both(opened.tok, &special, 1, false, &bytes);
            struct token_list plain = encode(opened.tok, content, bytes, TOKENIZER_PLAIN_TEXT);
            for (size_t i = 0; i < plain.count; i++)
                assert_false(tokenizer_is_special(opened.tok, plain.ids[i]));
            free(plain.ids);
            free(content);
        }
        close_opened(&opened);
    }
    // A special token that merges would build, too.
    static const char json[] =
        "{\"added_tokens\":[{\"id\":3,\"content\":\"<s>\",\"special\":true}],\"model\":{\"type\":\"BPE\",\"vocab\":"
        "{\"<\":0,\"s\":1,\">\":2,\"<s>\":3,\"s>\":4},\"merges\":[\"s >\",\"< s>\"]}}";
    struct opened opened;
    struct error err = {0};
    if (compile_text(&opened, json, strlen(json), 5, &err))
        fail_msg("%s", err.msg);
    struct token_list plain = encode(opened.tok, "<s>", 3, TOKENIZER_PLAIN_TEXT);
    struct token_list control = encode(opened.tok, "<s>", 3, 0);
    assert_int_equal(plain.count, 2);
    assert_int_equal(plain.ids[0], 0);
    assert_int_equal(plain.ids[1], 4);
    assert_int_equal(control.count, 1);
    assert_int_equal(control.ids[0], 3);
    uint32_t id;
    assert_true(tokenizer_token_id(opened.tok, "<s>", &id) && id == 3);
    assert_false(tokenizer_token_id(opened.tok, "<t>", &id));
    free(plain.ids);
    free(control.ids);
    close_opened(&opened);
}

// A file that differs from a good one in one place, and what the message must contain; NULL: it is accepted.
#define DOCUMENT(members, model) "{\"version\":\"1.0\"," members "\"model\":{" model "}}"
#define MODEL "\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":1,\"ab\":2},\"merges\":[\"a b\"]"
#define WITH(member) DOCUMENT(member ",", MODEL)
#define SPLIT_BY(pattern)                                                                                              \
    WITH("\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":{\"Regex\":\"" pattern                                     \
         "\"},\"behavior\":\"Isolated\",\"invert\":false}")
static const struct {
    const char *name, *json, *message;
} documents[] = {
    {"good", DOCUMENT("", MODEL), NULL},
    {"empty", "", "line 1"},
    {"not an object", "[]", "not a JSON object"},
    {"cut off", "{\"model\":", "line 1"},
    {"wrong version", "{\"version\":\"2.0\",\"model\":{" MODEL "}}", "version"},
    {"no model", "{}", "\"model\" is missing"},
    {"model Unigram", DOCUMENT("", "\"type\":\"Unigram\",\"vocab\":[]"), "Unigram"},
    {"model WordPiece", DOCUMENT("", "\"type\":\"WordPiece\",\"vocab\":{}"), "WordPiece"},
    {"no vocabulary", DOCUMENT("", "\"type\":\"BPE\",\"vocab\":{},\"merges\":[]"), "vocab"},
    {"no merges", DOCUMENT("", "\"type\":\"BPE\",\"vocab\":{\"a\":0}"), "merges"},
    {"duplicate token", DOCUMENT("", "\"vocab\":{\"a\":0,\"a\":1},\"merges\":[]"), "duplicate"},
    {"duplicate id", DOCUMENT("", "\"vocab\":{\"a\":0,\"b\":0},\"merges\":[]"), "same id 0"},
    {"gap in ids", DOCUMENT("", "\"vocab\":{\"a\":0,\"b\":9},\"merges\":[]"), NULL},
    {"id beyond the embedding", DOCUMENT("", "\"vocab\":{\"a\":0,\"b\":10},\"merges\":[]"), "10 rows"},
    {"negative id", DOCUMENT("", "\"vocab\":{\"a\":-1},\"merges\":[]"), "has id -1"},
    {"id 2^32", DOCUMENT("", "\"vocab\":{\"a\":4294967296},\"merges\":[]"), "4294967296"},
    {"id 2^64", DOCUMENT("", "\"vocab\":{\"a\":18446744073709551616},\"merges\":[]"), "integer"},
    {"id 1.0", DOCUMENT("", "\"vocab\":{\"a\":1.0},\"merges\":[]"), "not an integer"},
    {"NUL in a token", DOCUMENT("", "\"vocab\":{\"a\\u0000\":0},\"merges\":[]"), "NUL character"},
    {"merge of an absent token", DOCUMENT("", "\"vocab\":{\"a\":0,\"ab\":1},\"merges\":[\"a b\"]"), "token \"b\""},
    {"merge to an absent token", DOCUMENT("", "\"vocab\":{\"a\":0,\"b\":1},\"merges\":[[\"a\",\"b\"]]"), "\"ab\""},
    {"merge with two spaces", DOCUMENT("", "\"vocab\":{\"a\":0},\"merges\":[\"a  a\"]"), "merge 0"},
    {"merge of three", DOCUMENT("", "\"vocab\":{\"a\":0},\"merges\":[[\"a\",\"a\",\"a\"]]"), "merge 0"},
    {"merge of numbers", DOCUMENT("", "\"vocab\":{\"a\":0},\"merges\":[[1,2]]"), "merge 0"},
    {"merges of both forms", DOCUMENT("", "\"vocab\":{\"a\":0,\"aa\":1},\"merges\":[\"a a\",[\"a\",\"a\"]]"), "form"},
    {"version line in merges", DOCUMENT("", "\"vocab\":{\"a\":0,\"aa\":1},\"merges\":[\"#version: 0.2\",\"a a\"]"),
     NULL},
    {"dropout", DOCUMENT("", MODEL ",\"dropout\":0.1"), "dropout"},
    {"dropout 0", DOCUMENT("", MODEL ",\"dropout\":0.0"), NULL},
    {"prefix", DOCUMENT("", MODEL ",\"continuing_subword_prefix\":\"##\""), "continuing_subword_prefix"},
    {"suffix", DOCUMENT("", MODEL ",\"end_of_word_suffix\":\"</w>\""), "end_of_word_suffix"},
    {"empty suffix", DOCUMENT("", MODEL ",\"end_of_word_suffix\":\"\""), NULL},
    {"absent unk_token", DOCUMENT("", MODEL ",\"unk_token\":\"<unk>\""), "<unk>"},
    {"byte_fallback 1", DOCUMENT("", MODEL ",\"byte_fallback\":1"), "byte_fallback"},
    {"byte tokens that are none",
     DOCUMENT("", "\"vocab\":{\"<0x-1>\":0,\"<0xZZ>\":1,\"<0x1>\":2},\"merges\":[],\"byte_fallback\":true"), NULL},
    {"added token beyond the embedding", WITH("\"added_tokens\":[{\"id\":10,\"content\":\"x\"}]"), "10 rows"},
    {"added token without content", WITH("\"added_tokens\":[{\"id\":3}]"), "content"},
    {"added token with another's id", WITH("\"added_tokens\":[{\"id\":1,\"content\":\"x\"}]"), "gives it id 3"},
    {"added token with another id", WITH("\"added_tokens\":[{\"id\":3,\"content\":\"a\"}]"), "gives it id 0"},
    {"added token behind a gap", WITH("\"added_tokens\":[{\"id\":7,\"content\":\"x\"}]"), "gives it id 3"},
    {"good added token", WITH("\"added_tokens\":[{\"id\":3,\"content\":\"x\"}]"), NULL},
    {"added tokens not a list", WITH("\"added_tokens\":{}"), "added_tokens"},
    {"normalizer Lowercase", WITH("\"normalizer\":{\"type\":\"Lowercase\"}"), "normalizer of type \"Lowercase\""},
    {"normalizer NFKC inside",
     WITH("\"normalizer\":{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"NFC\"},{\"type\":\"NFKC\"}]}"),
     "normalizer[1] of type \"NFKC\""},
    {"normalizer without type", WITH("\"normalizer\":{}"), "without a type"},
    {"normalizer a number", WITH("\"normalizer\":1"), "not an object"},
    {"pre_tokenizer Whitespace", WITH("\"pre_tokenizer\":{\"type\":\"Whitespace\"}"),
     "pre_tokenizer of type \"Whitespace\""},
    {"post_processor Bert", WITH("\"post_processor\":{\"type\":\"BertProcessing\"}"), "BertProcessing"},
    {"decoder WordPiece", WITH("\"decoder\":{\"type\":\"WordPiece\"}"), "decoder of type \"WordPiece\""},
    {"escape in a type", WITH("\"decoder\":{\"type\":\"\\u001b[31m\"}"), "\"?[31m\""},
    {"unknown behavior",
     WITH("\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":{\"String\":\"a\"},\"behavior\":\"Maybe\"}"), "behavior"},
    {"two patterns",
     WITH("\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":{\"String\":\"a\",\"Regex\":\"a\"},\"behavior\":"
          "\"Isolated\"}"),
     "pattern"},
    {"empty pattern", WITH("\"normalizer\":{\"type\":\"Replace\",\"pattern\":{\"String\":\"\"},\"content\":\"a\"}"),
     "empty"},
    {"metaspace of two characters", WITH("\"pre_tokenizer\":{\"type\":\"Metaspace\",\"replacement\":\"__\"}"),
     "replacement"},
    {"metaspace in contradiction",
     WITH("\"pre_tokenizer\":{\"type\":\"Metaspace\",\"replacement\":\"_\",\"add_prefix_space\":false,\"prepend_"
          "scheme\":\"first\"}"),
     "contradicts"},
    {"strip -1", WITH("\"decoder\":{\"type\":\"Strip\",\"content\":\" \",\"start\":-1,\"stop\":0}"), "start"},
    {"template beyond the embedding",
     WITH("\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":{\"id\":\"x\"}},{"
          "\"Sequence\":{\"id\":\"A\"}}],\"special_tokens\":{\"x\":{\"ids\":[10]}}}"),
     "id 10"},
    {"template with an unused id",
     WITH("\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":{\"id\":\"x\"}},{"
          "\"Sequence\":{\"id\":\"A\"}}],\"special_tokens\":{\"x\":{\"ids\":[9]}}}"),
     "no token has id 9"},
    {"template with an unlisted token",
     WITH("\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":{\"id\":\"x\"}},{"
          "\"Sequence\":{\"id\":\"A\"}}],\"special_tokens\":{}}"),
     "does not list"},
    {"template without a text",
     WITH("\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":[],\"special_tokens\":{}}"), "exactly once"},
    {"pattern unbalanced", SPLIT_BY("(a"), "pattern"},
    {"pattern closed too often", SPLIT_BY("a)"), "parenthesis"},
    {"pattern bracket", SPLIT_BY("[a"), "bracket"},
    {"pattern recursion", SPLIT_BY("(?R)"), "(?R)"},
    {"pattern subroutine", SPLIT_BY("(a)\\\\g<1>"), "\\g"},
    {"pattern back reference", SPLIT_BY("(a)\\\\1"), "\\1"},
    {"pattern verb", SPLIT_BY("(*LIMIT_MATCH=1)a"), "verb"},
    {"pattern inline option", SPLIT_BY("a(?m)b"), "group"},
    {"pattern intersection", SPLIT_BY("[a-z&&[^b]]"), "intersection"},
    {"pattern nested class", SPLIT_BY("[a[b]]"), "nested"},
    {"pattern POSIX class", SPLIT_BY("[[:alpha:]]"), "POSIX"},
    {"pattern unknown property", SPLIT_BY("\\\\p{Nonsense}"), "pattern"},
    {"pattern huge repeat", SPLIT_BY("((((a{1000}){1000}){1000}){1000})"), "pattern"},
    {"pattern lookbehind", SPLIT_BY("(?<=a)b"), NULL},
    {"pattern unlimited lookbehind", SPLIT_BY("(?<=a+)b"), "pattern"},
};

static void test_documents(void **state)
{
    (void)state;
    for (size_t i = 0; i < COUNT(documents); i++) {
        struct opened opened;
        struct error err = {0};
        int rc = compile_text(&opened, documents[i].json, strlen(documents[i].json), 10, &err);
        if (!documents[i].message && rc)
            fail_msg("%s: refused: %s", documents[i].name, err.msg);
        if (documents[i].message && rc != ERR_MODEL)
            fail_msg("%s: result %d, wanted ERR_MODEL", documents[i].name, rc);
        if (documents[i].message && !strstr(err.msg, documents[i].message))
            fail_msg("%s: message \"%s\" lacks \"%s\"", documents[i].name, err.msg, documents[i].message);
        close_opened(&opened);
    }
    struct error err = {0};
    uint8_t *image;
    size_t bytes;
    assert_int_equal(tokenizer_compile(&image, &bytes, "/nonexistent/tokenizer.json", NULL, 10, &err), ERR_IO);
    assert_int_equal(tokenizer_compile(&image, &bytes, "/tmp", NULL, 10, &err), ERR_MODEL);
}

// A pattern that blows up ends at the match limit with a clear error, and a pattern of 1 MiB is refused.
static void test_hostile_patterns(void **state)
{
    (void)state;
    struct opened opened;
    struct error err = {0};
    static const char json[] = SPLIT_BY("(a+)+$");
    if (compile_text(&opened, json, strlen(json), 10, &err))
        fail_msg("%s", err.msg);
    char text[65];
    memset(text, 'a', 64);
    text[64] = 'b';
    struct token_list ids = {0};
    double start = now();
    int rc = tokenizer_encode(opened.tok, text, sizeof text, 0, &ids, &err);
    assert_int_equal(rc, ERR_MODEL);
    assert_non_null(strstr(err.msg, "limit"));
    assert_int_equal(ids.count, 0);
    print_message("(a+)+$ on 65 bytes gives up after %.2f s\n", now() - start);
    assert_true(now() - start < 10);
    free(ids.ids);
    close_opened(&opened);

    char *huge = malloc((1 << 20) + 512);
    size_t at = (size_t)sprintf(huge,
                                "{\"model\":{%s},\"pre_tokenizer\":{\"type\":\"Split\",\"behavior\":\"Isolated\","
                                "\"pattern\":{\"Regex\":\"",
                                MODEL);
    memset(huge + at, 'a', 1 << 20);
    at += 1 << 20;
    at += (size_t)sprintf(huge + at, "\"}}}");
    assert_int_equal(compile_text(&opened, huge, at, 10, &err), ERR_MODEL);
    assert_non_null(strstr(err.msg, "4096"));
    free(huge);
}

// A token of 1 MiB is a token like any other.
static void test_huge_token(void **state)
{
    (void)state;
    enum { BYTES = 1 << 20 };
    struct opened opened;
    struct error err = {0};
    char *json = malloc(BYTES + 128), *token = malloc(BYTES);
    memset(token, 'x', BYTES);
    int length = sprintf(json,
                         "{\"added_tokens\":[],\"model\":{\"vocab\":{\"x\":0,\"%.*s\":1},\"merges\":[],"
                         "\"ignore_merges\":true}}",
                         (int)BYTES, token);
    if (compile_text(&opened, json, (size_t)length, 10, &err))
        fail_msg("%s", err.msg);
    struct token_list ids = encode(opened.tok, token, BYTES, 0);
    assert_int_equal(ids.count, 1);
    assert_int_equal(ids.ids[0], 1);
    free(ids.ids);
    ids = encode(opened.tok, token, BYTES - 1, 0);
    assert_int_equal(ids.count, BYTES - 1);
    free(ids.ids);
    free(json);
    free(token);
    close_opened(&opened);
}

static void test_unknown_ids(void **state)
{
    (void)state;
    struct opened opened;
    struct error err = {0};
    static const char json[] = DOCUMENT("", "\"vocab\":{\"a\":0,\"b\":2},\"merges\":[]");
    static const uint32_t bad[] = {1, 3, 0xffffffff};
    if (compile_text(&opened, json, strlen(json), 10, &err))
        fail_msg("%s", err.msg);
    for (size_t i = 0; i < COUNT(bad); i++) {
        char *text;
        size_t bytes;
        assert_int_equal(tokenizer_decode(opened.tok, &bad[i], 1, false, &text, &bytes, &err), ERR_USAGE);
    }
    assert_false(tokenizer_is_special(opened.tok, 0xffffffff));
    size_t bytes;
    static const uint32_t good[] = {0, 2};
    char *text = decode_both(opened.tok, good, 2, false, &bytes);
    assert_string_equal(text, "a b"); // no decoder: Hugging Face joins with spaces
    free(text);
    close_opened(&opened);
}

// tokenizer_config.json adds tokens and corrects flags.
static void test_config(void **state)
{
    (void)state;
    static const char json[] = WITH("\"added_tokens\":[{\"id\":3,\"content\":\"x\"}]");
    static const char config[] = "{\"added_tokens_decoder\":{\"4\":{\"content\":\"y\",\"special\":true},"
                                 "\"3\":{\"content\":\"x\",\"special\":true,\"rstrip\":true}}}";
    char *json_path = temporary_file(json, strlen(json)), *config_path = temporary_file(config, strlen(config));
    uint8_t *image;
    size_t bytes;
    struct tokenizer *tok;
    struct error err = {0};
    if (tokenizer_compile(&image, &bytes, json_path, config_path, 10, &err) ||
        tokenizer_open(&tok, image, bytes, "test", &err))
        fail_msg("%s", err.msg);
    struct token_list ids = encode(tok, "ax  yb", 6, 0);
    static const uint32_t want[] = {0, 3, 4, 1};
    assert_int_equal(ids.count, 4);
    assert_memory_equal(ids.ids, want, sizeof want);
    assert_true(tokenizer_is_special(tok, 3) && tokenizer_is_special(tok, 4) && !tokenizer_is_special(tok, 0));
    free(ids.ids);
    tokenizer_close(tok);
    free(image);
    unlink(json_path);
    unlink(config_path);
    free(json_path);
    free(config_path);
}

// Cut short at every length and with single bytes changed, an image is rejected or works, and never crashes.
static void test_bad_images(void **state)
{
    (void)state;
    static const char json[] =
        "{\"added_tokens\":[{\"id\":3,\"content\":\"x\",\"special\":true},{\"id\":4,\"content\":\"yy\",\"normalized\":"
        "true}],"
        "\"normalizer\":{\"type\":\"Prepend\",\"prepend\":\"b\"},\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":"
        "{\"Regex\":\"\\\\s+\"},\"behavior\":\"Removed\"},\"decoder\":{\"type\":\"Strip\",\"content\":\"b\",\"start\":"
        "1,"
        "\"stop\":0},\"model\":{" MODEL "}}";
    struct opened opened;
    struct error err = {0};
    if (compile_text(&opened, json, strlen(json), 10, &err))
        fail_msg("%s", err.msg);
    uint8_t *copy = malloc(opened.bytes);
    struct tokenizer *tok;
    for (size_t length = 0; length < opened.bytes; length++) {
        uint8_t *shorter = malloc(length ? length : 1);
        memcpy(shorter, opened.image, length);
        assert_int_equal(tokenizer_open(&tok, shorter, length, "test", &err), ERR_CORRUPT);
        free(shorter);
    }
    static const uint8_t changes[] = {1, 0x80, 0xff, 0x20};
    size_t rejected = 0;
    for (size_t at = 0; at < opened.bytes; at++)
        for (size_t i = 0; i < COUNT(changes); i++) {
            memcpy(copy, opened.image, opened.bytes);
            copy[at] ^= changes[i];
            if (tokenizer_open(&tok, copy, opened.bytes, "test", &err)) {
                rejected++;
                continue;
            }
            struct token_list ids = {0};
            char *text;
            size_t bytes;
            if (!tokenizer_encode(tok, "ab xyy bbb abab", 15, TOKENIZER_ADD_SPECIAL, &ids, &err) &&
                !tokenizer_decode(tok, ids.ids, ids.count, true, &text, &bytes, &err))
                free(text);
            free(ids.ids);
            tokenizer_close(tok);
        }
    print_message("%zu of %zu changed images rejected\n", rejected, opened.bytes * COUNT(changes));
    assert_true(rejected > 500);
    free(copy);
    close_opened(&opened);
}

// ---- threads

struct worker {
    const struct tokenizer *tok;
    uint64_t hash;
};

static void *encode_random(void *argument)
{
    struct worker *worker = argument;
    struct random random = {7};
    struct token_list ids = {0};
    struct error err;
    char text[40 * 16];
    worker->hash = HASH_START;
    for (int i = 0; i < 2000; i++) {
        ids.count = 0;
        if (tokenizer_encode(worker->tok, text, random_string(&random, text), 0, &ids, &err))
            return NULL;
        for (size_t k = 0; k < ids.count; k++)
            worker->hash = hash_value(worker->hash, ids.ids[k]);
    }
    free(ids.ids);
    return worker;
}

static void test_threads(void **state)
{
    (void)state;
    struct opened opened = open_family("gpt_oss");
    struct worker workers[4];
    pthread_t threads[4];
    for (int i = 0; i < 4; i++) {
        workers[i].tok = opened.tok;
        assert_int_equal(pthread_create(&threads[i], NULL, encode_random, &workers[i]), 0);
    }
    for (int i = 0; i < 4; i++) {
        void *result;
        pthread_join(threads[i], &result);
        assert_non_null(result);
        assert_true(workers[i].hash == workers[0].hash);
    }
    close_opened(&opened);
}

// ---- time

static void test_long_pieces(void **state)
{
    (void)state;
    enum { BYTES = 1 << 20 };
    char *text = malloc(BYTES);
    static const char *const tried[] = {"llama2", "llama3", "gemma"};
    for (size_t f = 0; f < COUNT(tried); f++) {
        struct opened opened = open_family(tried[f]);
        for (int kind = 0; kind < 3; kind++) {
            for (size_t i = 0; i < BYTES; i++)
                text[i] = kind == 0 ? 'a' : kind == 1 ? "the"[i % 3] : ' ';
            double start = now();
            struct token_list ids = encode(opened.tok, text, BYTES, 0);
            double seconds = now() - start;
            size_t bytes;
            char *decoded = NULL;
            struct error err;
            assert_int_equal(tokenizer_decode(opened.tok, ids.ids, ids.count, true, &decoded, &bytes, &err), 0);
            assert_int_equal(bytes, BYTES);
            assert_memory_equal(decoded, text, BYTES);
            free(decoded);
            free(ids.ids);
            print_message("%s: 1 MiB without a break, kind %d: %.2f s\n", tried[f], kind, seconds);
            assert_true(seconds < 10);
        }
        close_opened(&opened);
    }
    free(text);
}

// A vocabulary of 128,000 tokens: every string of 1, 2 and some of 3 letters over 50 characters.
static void test_large_vocabulary(void **state)
{
    (void)state;
    static const char letters[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWX";
    enum { LETTERS = 50, TOKENS = LETTERS + LETTERS * LETTERS + LETTERS * LETTERS * LETTERS };
    size_t capacity = (size_t)TOKENS * 40, at = 0;
    char *json = malloc(capacity);
    at += (size_t)sprintf(
        json, "{\"pre_tokenizer\":{\"type\":\"ByteLevel\",\"add_prefix_space\":false},\"model\":{\"vocab\":{");
    for (int id = 0; id < TOKENS; id++) {
        int rest = id, length = 1;
        for (int count = LETTERS; rest >= count; count *= LETTERS, length++)
            rest -= count;
        char token[4] = {0};
        for (int i = length - 1; i >= 0; i--, rest /= LETTERS)
            token[i] = letters[rest % LETTERS];
        at += (size_t)sprintf(json + at, "%s\"%s\":%d", id ? "," : "", token, id);
    }
    at += (size_t)sprintf(json + at, "},\"merges\":[");
    for (int i = 0; i < LETTERS * LETTERS; i++)
        at += (size_t)sprintf(json + at, "%s\"%c %c\"", i ? "," : "", letters[i / LETTERS], letters[i % LETTERS]);
    for (int i = 0; i < LETTERS * LETTERS * LETTERS; i++)
        at += (size_t)sprintf(json + at, ",\"%c%c %c\"", letters[i / LETTERS / LETTERS], letters[i / LETTERS % LETTERS],
                              letters[i % LETTERS]);
    at += (size_t)sprintf(json + at, "]}}");
    assert_true(at < capacity);
    struct opened opened, again = {0};
    struct error err = {0};
    double start = now();
    if (compile_text(&opened, json, at, 200000, &err))
        fail_msg("%s", err.msg);
    double compiled = now();
    assert_int_equal(tokenizer_open(&again.tok, opened.image, opened.bytes, "test", &err), 0);
    double done = now();
    print_message("%d tokens: compile %.0f ms, open %.2f ms, image %.1f MB, json %.1f MB\n", (int)TOKENS,
                  1e3 * (compiled - start), 1e3 * (done - compiled), 1e-6 * (double)opened.bytes, 1e-6 * (double)at);
    assert_true(done - compiled < 0.1);
    close_opened(&again);
    close_opened(&opened);
    free(json);
}

static void test_speed(void **state)
{
    (void)state;
    static const char sentence[] = "The quick brown fox said: don't use what you have been made to find, 2024 times. ";
    enum { REPEAT = 20000 };
    size_t bytes = (sizeof sentence - 1) * REPEAT;
    char *text = malloc(bytes);
    for (int i = 0; i < REPEAT; i++)
        memcpy(text + (size_t)i * (sizeof sentence - 1), sentence, sizeof sentence - 1);
    for (size_t f = 0; f < FAMILIES; f++) {
        struct opened opened = open_family(families[f]);
        double start = now();
        struct token_list ids = encode(opened.tok, text, bytes, 0);
        double encoded = now();
        char *decoded;
        size_t decoded_bytes;
        struct error err;
        assert_int_equal(tokenizer_decode(opened.tok, ids.ids, ids.count, true, &decoded, &decoded_bytes, &err), 0);
        double done = now();
        print_message("%-18s encode %6.1f MB/s, decode %6.1f MB/s, %.2f bytes per token\n", families[f],
                      1e-6 * (double)bytes / (encoded - start), 1e-6 * (double)bytes / (done - encoded),
                      (double)bytes / (double)ids.count);
        free(decoded);
        free(ids.ids);
        close_opened(&opened);
    }
    free(text);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_strings),          cmocka_unit_test(test_components),
        cmocka_unit_test(test_random),           cmocka_unit_test(test_code_points),
        cmocka_unit_test(test_invalid_utf8),     cmocka_unit_test(test_plain_text),
        cmocka_unit_test(test_documents),        cmocka_unit_test(test_hostile_patterns),
        cmocka_unit_test(test_huge_token),       cmocka_unit_test(test_unknown_ids),
        cmocka_unit_test(test_config),           cmocka_unit_test(test_bad_images),
        cmocka_unit_test(test_threads),          cmocka_unit_test(test_long_pieces),
        cmocka_unit_test(test_large_vocabulary), cmocka_unit_test(test_speed),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
