// Bad and unusual tokenizer.json files and compiled images: refused with a clear message, or used correctly.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/tokenizer_help.h"

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
    double start = clock_now_s();
    int rc = tokenizer_encode(opened.tok, text, sizeof text, 0, &ids, &err);
    assert_int_equal(rc, ERR_MODEL);
    assert_non_null(strstr(err.msg, "limit"));
    assert_int_equal(ids.count, 0);
    print_message("(a+)+$ on 65 bytes gives up after %.2f s\n", clock_now_s() - start);
    assert_true(clock_now_s() - start < 10);
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
    // What a model chooses may have no text.
    static const uint32_t chosen[] = {0, 1, 3, 0xffffffff, 2};
    struct tokenizer_stream *stream;
    char streamed[8] = "";
    const char *part;
    size_t bytes;
    assert_int_equal(tokenizer_stream_new(&stream, opened.tok, false, &err), 0);
    for (size_t i = 0; i < COUNT(chosen); i++) {
        assert_int_equal(tokenizer_stream_push(stream, chosen[i], &part, &bytes, &err), 0);
        strncat(streamed, part, bytes);
    }
    tokenizer_stream_free(stream);
    assert_string_equal(streamed, "a b");
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
    struct tokenizer *tok = NULL;
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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_documents),   cmocka_unit_test(test_hostile_patterns), cmocka_unit_test(test_huge_token),
        cmocka_unit_test(test_unknown_ids), cmocka_unit_test(test_config),           cmocka_unit_test(test_bad_images),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
