// The tokenizer against Hugging Face `tokenizers`, by golden ids (scripts/make_goldens_tokenizer.py). Bad files are the
// matter of test_tokenizer_files.c. Data: tests/golden/tokenizer.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <pthread.h>

#include "formats/utf8.h"
#include "tests/device/quick.h"
#include "tests/tokenizer_help.h"

static const char *const families[] = {
    "llama2", "llama2_metaspace", "llama2_normalized", "mistral_v3",  "phi3",   "gemma", "llama3", "qwen", "tekken",
    "phi4",   "gpt_oss",          "deepseek",          "gpt2_digits", "classes"};
enum { FAMILIES = sizeof families / sizeof *families };

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
            to += utf8_put(to, spaces[below(random, COUNT(spaces))]);
        else if (kind == 10)
            *to++ = (char)('!' + below(random, 15));
        else if (kind < 13) {
            const uint32_t *range = letters[below(random, COUNT(letters))];
            to += utf8_put(to, range[0] + (uint32_t)below(random, range[1] - range[0] + 1));
        } else if (kind == 13)
            to += utf8_put(to, marks[below(random, COUNT(marks))]);
        else if (kind == 14)
            to += utf8_put(to, below(random, 4) ? 0x1F600 + (uint32_t)below(random, 64) : 0x200D);
        else {
            const char *piece = pieces[below(random, COUNT(pieces))];
            memcpy(to, piece, strlen(piece));
            to += strlen(piece);
        }
    }
    return (size_t)(to - start);
}

// ---- against Hugging Face

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

// Sanitizers make this test ten times slower; they see a sample.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
enum { BLOCK_STEP = 8 };
#else
enum { BLOCK_STEP = 1 };
#endif

// Planes 4 to 13, which have no character at all, are asked of one vocabulary of each kind.
static bool is_block_tested(const char *family, uint32_t block)
{
    bool empty_plane = block >= 0x40 && block < 0xE0;
    return block % BLOCK_STEP == 0 && (!empty_plane || !strcmp(family, "llama2") || !strcmp(family, "llama3"));
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
    for (size_t f = 0; f < FAMILIES; f += quick() ? 4 : 1) {
        char name[64], line[64 * 16];
        snprintf(name, sizeof name, "%s.golden.json", families[f]);
        json_t *golden = load_json(name), *blocks = json_object_get(golden, "code_points");
        struct opened opened = open_family(families[f]);
        struct token_list ids = {0};
        for (uint32_t block = 0; block < 0x110; block += quick() ? 3 : 1) {
            uint64_t hash = HASH_START;
            if (!is_block_tested(families[f], block))
                continue;
            for (uint32_t start = block * 4096; start < (block + 1) * 4096; start += 64) {
                char *to = line;
                for (uint32_t c = start; c < start + 64; c++) {
                    if ((c >= 0xD800 && c <= 0xDFFF) || excluded[c])
                        continue;
                    *to++ = 'a';
                    to += utf8_put(to, c);
                    *to++ = 'b';
                    *to++ = ' ';
                    to += utf8_put(to, c);
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
        for (size_t block = 0; block < (quick() ? 25 : 100); block++) {
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
    const size_t text_bytes = quick() ? 1 << 17 : 1 << 20;
    char *text = malloc(text_bytes);
    static const char *const tried[] = {"llama2", "llama3", "gemma"};
    for (size_t f = 0; f < COUNT(tried); f++) {
        struct opened opened = open_family(tried[f]);
        for (int kind = 0; kind < 3; kind++) {
            for (size_t i = 0; i < text_bytes; i++)
                text[i] = kind == 0 ? 'a' : kind == 1 ? "the"[i % 3] : ' ';
            double start = clock_now_s();
            struct token_list ids = encode(opened.tok, text, text_bytes, 0);
            double seconds = clock_now_s() - start;
            size_t bytes;
            char *decoded = NULL;
            struct error err;
            assert_int_equal(tokenizer_decode(opened.tok, ids.ids, ids.count, true, &decoded, &bytes, &err), 0);
            assert_int_equal(bytes, text_bytes);
            assert_memory_equal(decoded, text, text_bytes);
            free(decoded);
            free(ids.ids);
            print_message("%s: without a break, kind %d: %.2f s\n", tried[f], kind, seconds);
            assert_true(seconds < 60); // quadratic time would be hours
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
    double start = clock_now_s();
    if (compile_text(&opened, json, at, 200000, &err))
        fail_msg("%s", err.msg);
    double compiled = clock_now_s();
    assert_int_equal(tokenizer_open(&again.tok, opened.image, opened.bytes, "test", &err), 0);
    double done = clock_now_s();
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
    const int repeat = quick() ? 500 : 20000;
    size_t bytes = (sizeof sentence - 1) * (size_t)repeat;
    char *text = malloc(bytes);
    for (int i = 0; i < repeat; i++)
        memcpy(text + (size_t)i * (sizeof sentence - 1), sentence, sizeof sentence - 1);
    for (size_t f = 0; f < FAMILIES; f++) {
        struct opened opened = open_family(families[f]);
        double start = clock_now_s();
        struct token_list ids = encode(opened.tok, text, bytes, 0);
        double encoded = clock_now_s();
        char *decoded;
        size_t decoded_bytes;
        struct error err;
        assert_int_equal(tokenizer_decode(opened.tok, ids.ids, ids.count, true, &decoded, &decoded_bytes, &err), 0);
        double done = clock_now_s();
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
        cmocka_unit_test(test_threads),          cmocka_unit_test(test_long_pieces),
        cmocka_unit_test(test_large_vocabulary), cmocka_unit_test(test_speed),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
