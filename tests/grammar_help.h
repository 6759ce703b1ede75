// What the tests of grammars share. Include behind cmocka.h.
#ifndef TPSHARD_TESTS_GRAMMAR_HELP_H
#define TPSHARD_TESTS_GRAMMAR_HELP_H

#include "engine/serve/grammar.h"
#include "tests/random_help.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define COUNT(array) (sizeof(array) / sizeof *(array))

enum {
    TEST_EOS = 256,
    TEST_SPECIAL = 257,
    TEST_FIRST_PIECE = 259,
    TEST_MAX_TOKENS = 2048,
    TEST_WORDS = TEST_MAX_TOKENS / 32
};

// Every byte, an end of sequence, the special token [CALL], an id without text, and pieces as a tokenizer may have them.
struct test_vocabulary {
    struct vocabulary_token tokens[TEST_MAX_TOKENS];
    char storage[TEST_MAX_TOKENS][24];
    int64_t count;
    struct vocabulary *vocabulary;
};

static inline void test_add_token(struct test_vocabulary *v, const char *bytes, size_t count, bool special)
{
    assert_true(v->count < TEST_MAX_TOKENS && count < sizeof v->storage[0]);
    memcpy(v->storage[v->count], bytes, count);
    v->tokens[v->count] = (struct vocabulary_token){v->storage[v->count], count, special};
    v->count++;
}

static inline void test_vocabulary_open(struct test_vocabulary *v, int num_pieces)
{
    static const char *const whole[] = {
        "\": \"",      "\": ",         "\", \"",   "\",",      "\"}",      "\"}]",     "{\"",      "[{\"",   "}, {\"",
        "]}",          "}}",           "[[",       "[[[[",     "{}",       "[]",       "true",     "false",  "null",
        "\n  \"",      "\n",           "    ",     "  ",       "\\u00",    "\\u",      "\\n",      "\\\"",   "\\ud83d",
        "\\ude",       "\xC3",         "\xA9",     "\xC3\xA9", "\xF0\x9F", "\x98\x80", "\xE2\x82", "\xAC\"", "-",
        "12",          "345",          "0.",       ".5",       "e+",       "1e",       "name",     "\"name", "age\"",
        "<tool_call>", "</tool_call>", "</think>", "th",       "ink>",     " \"",      ": ",       ", ",     "\":"};
    static const char letters[] = "{}[]\",:\\ \nabcdentruflsx0123456789.-+eE/\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80<>_";
    const uint32_t eos[] = {TEST_EOS};
    struct error err = {0};
    memset(v, 0, sizeof *v);
    for (int byte = 0; byte < 256; byte++) {
        char c = (char)byte;
        test_add_token(v, &c, 1, false);
    }
    test_add_token(v, "</s>", 4, true);
    test_add_token(v, "[CALL]", 6, true);
    test_add_token(v, "", 0, false);
    for (size_t i = 0; i < COUNT(whole); i++)
        test_add_token(v, whole[i], strlen(whole[i]), false);
    for (int i = 0; i < num_pieces; i++) {
        char piece[8];
        size_t length = 2 + random_bits() % 5;
        for (size_t k = 0; k < length; k++)
            piece[k] = letters[random_bits() % (sizeof letters - 1)];
        test_add_token(v, piece, length, false);
    }
    if (vocabulary_create_from(&v->vocabulary, v->tokens, v->count, eos, 1, &err))
        fail_msg("%s", err.msg);
}

static inline void test_vocabulary_close(struct test_vocabulary *v) { vocabulary_free(v->vocabulary); }

static inline struct grammar *test_grammar_new(struct vocabulary *vocabulary)
{
    struct grammar *grammar = NULL;
    struct error err = {0};
    if (grammar_create(&grammar, vocabulary, &err))
        fail_msg("%s", err.msg);
    return grammar;
}

static inline json_t *test_json(const char *text)
{
    json_error_t error;
    json_t *json = json_loads(text, JSON_DECODE_ANY, &error);
    if (!json)
        fail_msg("%s: %s", text, error.text);
    return json;
}

// The grammar of a schema. A schema of "json" or "object" stands for any value or object.
static inline int test_schema_grammar(struct grammar **out, struct vocabulary *vocabulary, const char *schema,
                                      struct error *err)
{
    struct grammar *grammar = test_grammar_new(vocabulary);
    if (!strcmp(schema, "json") || !strcmp(schema, "object")) {
        grammar_json(grammar, schema[0] == 'o');
    } else {
        json_t *json = test_json(schema);
        grammar_schema(grammar, json, "schema");
        json_decref(json);
    }
    int rc = grammar_compile(grammar, err);
    if (rc)
        grammar_free(grammar);
    else
        *out = grammar;
    return rc;
}

static inline struct grammar_state *test_state(struct grammar *grammar)
{
    struct grammar_state *state = NULL;
    struct error err = {0};
    if (grammar_state_create(&state, grammar, &err))
        fail_msg("%s", err.msg);
    return state;
}

// What is wrong with how a schema takes a text; NULL: nothing.
static inline const char *test_accept_problem(struct vocabulary *vocabulary, const char *schema, const char *text,
                                              bool accepted)
{
    static char problem[1024];
    struct grammar *grammar = NULL;
    struct error err = {0};
    if (test_schema_grammar(&grammar, vocabulary, schema, &err)) {
        snprintf(problem, sizeof problem, "%.300s", err.msg);
        return problem;
    }
    struct grammar_state *state = test_state(grammar);
    bool got = grammar_state_take(state, text, strlen(text)) && grammar_state_complete(state);
    grammar_state_free(state);
    grammar_free(grammar);
    snprintf(problem, sizeof problem, "%.300s: %.300s was %s", schema, text, got ? "accepted" : "refused");
    return got == accepted ? NULL : problem;
}

static inline bool test_bit(const uint32_t *mask, int64_t token) { return mask[token / 32] >> token % 32 & 1; }

// A random sentence of the grammar: allowed tokens are chosen until the end, such as close something more often. Appends to text [capacity];
// returns its length, or -1 if it did not end. check is called at every position.
static inline int64_t test_walk(struct test_vocabulary *v, struct grammar_state *state, char *text, size_t capacity,
                                void (*check)(struct test_vocabulary *v, struct grammar_state *state,
                                              const uint32_t *mask))
{
    uint32_t mask[TEST_WORDS];
    size_t length = 0;
    for (;;) {
        int64_t allowed[TEST_MAX_TOKENS], closing[TEST_MAX_TOKENS], num_allowed = 0, num_closing = 0;
        grammar_state_fill(state, mask, TEST_WORDS);
        if (check)
            check(v, state, mask);
        for (int64_t id = 0; id < v->count; id++) {
            if (!test_bit(mask, id) || id == TEST_EOS)
                continue;
            allowed[num_allowed++] = id;
            if (strchr("\"}]\\", v->storage[id][0]) && v->tokens[id].count <= 2 && id >= ' ')
                closing[num_closing++] = id;
        }
        if (test_bit(mask, TEST_EOS) && (!num_allowed || random_bits() % 4 == 0))
            return (int64_t)length;
        if (!num_allowed)
            return -1;
        bool close = num_closing && random_bits() % (length > capacity / 2 ? 2 : 5) == 0;
        int64_t id =
            close ? closing[random_bits() % (uint64_t)num_closing] : allowed[random_bits() % (uint64_t)num_allowed];
        if (length + v->tokens[id].count >= capacity)
            return -1;
        memcpy(text + length, v->tokens[id].bytes, v->tokens[id].count);
        length += v->tokens[id].count;
        grammar_state_advance(state, (uint32_t)id);
        if (grammar_state_dead(state))
            fail_msg("token %d was allowed and then refused behind '%.*s'", (int)id, (int)length, text);
    }
}

static int64_t test_positions; // that were checked

// The mask is what trying each token gives, and what is complete may end, nothing else.
static inline void test_check_mask(struct test_vocabulary *v, struct grammar_state *state, const uint32_t *mask)
{
    for (int64_t id = 0; id < v->count; id++) {
        char bytes[32];
        size_t count = v->tokens[id].count + v->tokens[id].special;
        bytes[0] = (char)0xFF;
        memcpy(bytes + v->tokens[id].special, v->tokens[id].bytes, v->tokens[id].count);
        bool wanted = id != TEST_EOS && count > 0 && id != 0xFF && grammar_state_admits(state, bytes, count);
        if (id != TEST_EOS && wanted != test_bit(mask, id))
            fail_msg("token %d '%.*s' is %s, trying it says otherwise", (int)id, (int)count, bytes,
                     test_bit(mask, id) ? "allowed" : "not allowed");
    }
    assert_int_equal(test_bit(mask, TEST_EOS), grammar_state_complete(state));
    test_positions++;
}

#endif
