// The bytes of a tokenizer's tokens, and grammars over real vocabularies: put together the bytes of ids are the text that decoding them gives, and
// JSON goes through a grammar token by token as the tokenizer cuts it.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/tokenizer_help.h"

#include "engine/serve/grammar.h"

static const char *const families[] = {
    "classes",           "deepseek", "gemma",      "gpt2_digits", "gpt_oss", "llama2", "llama2_metaspace",
    "llama2_normalized", "llama3",   "mistral_v3", "phi3",        "phi4",    "qwen",   "tekken"};

// Appends the bytes of an id.
static void append_token(struct tokenizer_stream *stream, uint32_t id, struct tokenizer_text *out)
{
    struct error err = {0};
    const char *bytes;
    size_t count;
    if (tokenizer_stream_token_bytes(stream, id, &bytes, &count, &err))
        fail_msg("%s", err.msg);
    assert_true(tokenizer_text_append(out, bytes, count));
}

static int strings_checked, texts_checked;

static void check_texts(const char *family, const struct tokenizer *tok, const json_t *texts)
{
    struct tokenizer_stream *stream = NULL;
    struct error err = {0};
    if (tokenizer_stream_new(&stream, tok, true, &err))
        fail_msg("%s", err.msg);
    for (size_t i = 0; i < json_array_size(texts); i++) {
        const json_t *text = json_array_get(texts, i);
        struct tokenizer_text joined = {0};
        size_t bytes;
        struct token_list ids = encode(tok, json_string_value(text), json_string_length(text), 0);
        char *decoded = decode_both(tok, ids.ids, ids.count, true, &bytes);
        bool all = true; // the unknown token has no bytes
        for (size_t k = 0; k < ids.count; k++) {
            size_t before = joined.bytes;
            append_token(stream, ids.ids[k], &joined);
            all &= joined.bytes > before;
        }
        // At the start of a text a decoder may take off the blank that the tokenizer put there.
        size_t blank = joined.bytes > bytes;
        strings_checked += all;
        if (all && (joined.bytes != bytes + blank || (blank && joined.data[0] != ' ') ||
                    (bytes && memcmp(joined.data + blank, decoded, bytes))))
            fail_msg("%s: text %d: '%.*s' instead of '%s'", family, (int)i, (int)joined.bytes, joined.data, decoded);
        tokenizer_text_free(&joined);
        free(decoded);
        free(ids.ids);
    }
    tokenizer_stream_free(stream);
}

static void check_grammar(const char *family, const struct tokenizer *tok)
{
    static const char *const texts[] = {
        "{\"name\": \"Zo\xC3\xAB \xE6\xBC\xA2\xE5\xAD\x97 \xF0\x9F\x98\x80\", \"n\": [1, -2.5e3, true, null]}",
        "{\n  \"a\\n\\u00e9\": {\n    \"b\": \"<x> \\\"quoted\\\"\"\n  }\n}", "{}"};
    int64_t size = tokenizer_vocab_size(tok), words = (size + 31) / 32;
    uint32_t eos = 0, *mask = calloc((size_t)words, sizeof *mask);
    struct vocabulary *vocabulary = NULL;
    struct grammar *grammar = NULL;
    struct error err = {0};
    while (eos < size && !tokenizer_is_special(tok, eos))
        eos++;
    if (vocabulary_create(&vocabulary, tok, &eos, eos < size, &err) || grammar_create(&grammar, vocabulary, &err))
        fail_msg("%s: %s", family, err.msg);
    grammar_regex(grammar, " ?", "blank"); // that some tokenizers put in front of every text
    grammar_json(grammar, true);
    if (grammar_compile(grammar, &err))
        fail_msg("%s: %s", family, err.msg);
    for (size_t i = 0; i < COUNT(texts); i++) {
        struct token_list ids = encode(tok, texts[i], strlen(texts[i]), TOKENIZER_PLAIN_TEXT);
        struct grammar_state *state = NULL;
        size_t bytes;
        char *decoded = decode_both(tok, ids.ids, ids.count, true, &bytes);
        bool same = !strcmp(decoded + (decoded[0] == ' '), texts[i]);
        free(decoded);
        if (!same) { // a tokenizer that puts blanks between digits, one without bytes
            free(ids.ids);
            continue;
        }
        if (grammar_state_create(&state, grammar, &err))
            fail_msg("%s", err.msg);
        for (size_t k = 0; k < ids.count; k++) {
            grammar_state_fill(state, mask, words);
            if (!(mask[ids.ids[k] / 32] >> ids.ids[k] % 32 & 1))
                fail_msg("%s: text %d: token %d of the tokenizer (id %u) is not allowed", family, (int)i, (int)k,
                         ids.ids[k]);
            grammar_state_advance(state, ids.ids[k]);
        }
        assert_true(grammar_state_complete(state));
        grammar_state_fill(state, mask, words);
        for (int64_t id = 0; id < size; id++)
            assert_int_equal(mask[id / 32] >> id % 32 & 1, id == eos);
        grammar_state_free(state);
        free(ids.ids);
        texts_checked++;
    }
    // No special token stands anywhere inside a text.
    struct grammar_state *state = NULL;
    if (grammar_state_create(&state, grammar, &err))
        fail_msg("%s", err.msg);
    assert_true(grammar_state_take(state, "{\"", 2));
    grammar_state_fill(state, mask, words);
    int64_t count = 0;
    for (uint32_t id = 0; id < size; id++) {
        bool is = mask[id / 32] >> id % 32 & 1;
        assert_false(is && tokenizer_is_special(tok, id));
        count += is;
    }
    assert_true(count > size / 8);
    grammar_state_free(state);
    grammar_free(grammar);
    vocabulary_free(vocabulary);
    free(mask);
}

static void test_families(void **unused)
{
    (void)unused;
    json_t *texts = load_json("texts.json");
    const json_t *list = json_object_get(texts, "strings");
    assert_true(json_array_size(list) > 10);
    for (size_t i = 0; i < COUNT(families); i++) {
        struct opened opened = open_family(families[i]);
        check_texts(families[i], opened.tok, list);
        check_grammar(families[i], opened.tok);
        close_opened(&opened);
    }
    assert_true(strings_checked > 9 * (int)(COUNT(families) * json_array_size(list)) / 10);
    assert_true(texts_checked >= 3 * 11);
    json_decref(texts);
}

// Every id alone, in a text that has begun.
static void test_bytes(void **unused)
{
    (void)unused;
    static const struct {
        const char *family, *content, *bytes;
    } cases[] = {
        {"llama2", "\xE2\x96\x81the", " the"}, {"llama2", "<0x0A>", "\n"},
        {"llama2", "<0xE2>", "\xE2"},          {"llama2_metaspace", "\xE2\x96\x81the", " the"},
        {"gemma", "\xE2\x96\x81the", " the"},  {"qwen", "\xC4\xA0the", " the"},
        {"llama3", "\xC4\x8A", "\n"},          {"qwen", "\xC3\xA9", "\xE9"},
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        struct opened opened = open_family(cases[i].family);
        struct tokenizer_stream *stream = NULL;
        struct tokenizer_text text = {0};
        struct error err = {0};
        uint32_t id;
        if (!tokenizer_token_id(opened.tok, cases[i].content, &id))
            fail_msg("%s has no %s", cases[i].family, cases[i].content);
        if (tokenizer_stream_new(&stream, opened.tok, true, &err))
            fail_msg("%s", err.msg);
        for (int twice = 0; twice < 2; twice++)
            append_token(stream, id, &text);
        append_token(stream, tokenizer_vocab_size(opened.tok), &text); // no such id: nothing
        size_t half = strlen(cases[i].bytes);
        if (text.bytes != 2 * half || memcmp(text.data, cases[i].bytes, half) ||
            memcmp(text.data + half, cases[i].bytes, half))
            fail_msg("%s: '%.*s' is not twice '%s'", cases[i].family, (int)text.bytes, text.data, cases[i].bytes);
        tokenizer_text_free(&text);
        tokenizer_stream_free(stream);
        close_opened(&opened);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_families),
        cmocka_unit_test(test_bytes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
