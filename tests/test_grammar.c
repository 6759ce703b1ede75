// Grammars: which texts they admit, that a mask is what trying each token gives, and that random sentences are JSON.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/device/quick.h"
#include "tests/grammar_help.h"

static struct test_vocabulary bytes_only, vocabulary; // the second has pieces

#define OBJECT(properties, more) "{\"type\":\"object\",\"properties\":{" properties "}" more "}"

static const struct {
    const char *schema, *accepted[8], *refused[12];
} texts[] = {
    {"json",
     {"{}", "[1, 2,3]", "{\"a\": {\"b\": [true,false,null]}}", "-0.5e+10", "\"\\ud83d\\ude00\xC3\xA9\"",
      "{\n    \"a\": 1\n}", "\"\""},
     {"", " 1", "1 ", "01", "{\"a\":1,}", "[1,,2]", "\"\\ud83d\"", "\"\xC3\"", "{a:1}", "\"\n\"", "[1", "\"\\u0000\""}},
    {"json",
     {"0", "\"\\u00e9\\uD7ff\\uE000\\u0001\""},
     {"\"\\ude00\\ud83d\"", "\"\xED\xA0\x80\"", "\"\xC0\x80\"", "\"\xF4\x90\x80\x80\"", "+1", ".5", "1.", "1e"}},
    {"object", {"{}", "{\"a\":[]}"}, {"[]", "1", "\"{}\""}},
    {"{}", {"1", "{\"a\":[]}"}, {""}},
    {"true", {"null"}, {"nul"}},
    {"{\"type\":\"boolean\"}", {"true", "false"}, {"null", "tru"}},
    {"{\"type\":[\"string\",\"null\"]}", {"null", "\"x\""}, {"1"}},
    {"{\"type\":\"integer\"}", {"0", "-12", "999999999999999999"}, {"-0", "1.0", "1e3", "01", "1000000000000000000"}},
    {"{\"type\":\"integer\",\"minimum\":-5,\"maximum\":120}",
     {"-5", "0", "7", "99", "100", "120"},
     {"-6", "-10", "121", "130", "200", "-0", "1000"}},
    {"{\"type\":\"integer\",\"exclusiveMinimum\":9,\"exclusiveMaximum\":12}", {"10", "11"}, {"9", "12", "1", "110"}},
    {"{\"type\":\"integer\",\"minimum\":0.5,\"maximum\":3.5}", {"1", "3"}, {"0", "4"}},
    {"{\"type\":\"integer\",\"minimum\":1}", {"1", "999999999999999999"}, {"0", "-1"}},
    {"{\"type\":\"number\",\"minimum\":0,\"maximum\":1}",
     {"0", "1", "0.5", "1.000", "0.99999999999999"},
     {"1.1", "-0.1", "-0", "2", "10", "1e0", "0.999999999999999"}},
    {"{\"type\":\"number\",\"exclusiveMinimum\":0,\"exclusiveMaximum\":1}",
     {"0.1", "0.00001", "0.9999"},
     {"0", "0.0", "0.000", "1", "1.0"}},
    {"{\"type\":\"number\",\"minimum\":-2.25,\"maximum\":-0.5}",
     {"-2.25", "-2.2", "-1", "-0.5", "-0.50", "-0.75"},
     {"-2.26", "-0.4", "-0.49", "-0", "0", "-3", "1"}},
    {"{\"type\":\"number\",\"minimum\":12.5}", {"12.5", "13", "99.75", "100000"}, {"12.4", "12", "2", "-13"}},
    {"{\"type\":\"number\"}", {"-0", "1.5", "1e10", "1E-5", "0.1"}, {"1.", "1e100", "--1"}},
    {"{\"minimum\":3,\"maximum\":3}", {"3", "3.0"}, {"2", "3.1", "null"}},
    {"{\"type\":\"string\",\"minLength\":2,\"maxLength\":3}",
     {"\"ab\"", "\"\\n\xC3\xA9z\"", "\"\\ud83d\\ude00\xF0\x9F\x98\x80\""},
     {"\"a\"", "\"abcd\"", "\"\""}},
    {"{\"type\":\"string\",\"maxLength\":0}", {"\"\""}, {"\"a\""}},
    {"{\"type\":\"string\",\"minLength\":3}", {"\"abc\"", "\"abcdefghi\""}, {"\"ab\""}},
    {"{\"type\":\"string\",\"pattern\":\"^a[b-d]+$\"}", {"\"ab\"", "\"abcd\""}, {"\"a\"", "\"xab\"", "\"abx\""}},
    {"{\"type\":\"string\",\"pattern\":\"b+\"}",
     {"\"b\"", "\"abba\"",
      "\"\xC3\xA9"
      "b\\n\""},
     {"\"\"", "\"aca\""}},
    {"{\"pattern\":\"^a|b$\"}", {"\"a\"", "\"ax\"", "\"xb\""}, {"\"xa\"", "\"bx\""}},
    {"{\"pattern\":\"^(?:[^a-z]{2}|\\\\d{3,4}|\\\\w\\\\s|\\\\u00e9.)$\"}",
     {"\"AB\"", "\"123\"", "\"1234\"", "\"x \"", "\"\xC3\xA9x\"", "\"\\\"\\\\\""},
     {"\"ab\"", "\"12345\"", "\"1\""}},
    {"{\"pattern\":\"^\\\"\\\\\\\\[\\\\t\\\\n\\\\u0001]$\"}",
     {"\"\\\"\\\\\\t\"", "\"\\\"\\\\\\u0001\""},
     {"\"\\\"\\\\\\u0009\"", "\"\\\\\\t\""}},
    {"{\"pattern\":\"^(a|bc){2}(x?y*)$\"}", {"\"aa\"", "\"abcxyy\"", "\"bcbc\""}, {"\"a\"", "\"abcaxx\""}},
    {"{\"format\":\"date\"}",
     {"\"2024-02-29\"", "\"1999-12-31\""},
     {"\"2023-02-29\"", "\"2024-13-01\"", "\"2024-04-31\"", "\"1900-02-29\"", "\"0000-01-01\""}},
    {"{\"type\":\"string\",\"format\":\"date-time\"}",
     {"\"2024-02-29T23:59:59Z\"", "\"2024-01-01T00:00:00.123+02:00\""},
     {"\"2024-01-01\"", "\"2024-01-01T24:00:00Z\"", "\"2024-01-01T00:00:00\""}},
    {"{\"format\":\"uuid\"}", {"\"123e4567-e89b-12d3-a456-426614174000\""}, {"\"123e4567\""}},
    {"{\"format\":\"ipv4\"}", {"\"255.0.10.1\""}, {"\"256.0.0.1\"", "\"1.2.3\"", "\"01.2.3.4\""}},
    {"{\"format\":\"email\"}", {"\"a.b@example.org\""}, {"\"a@b\"", "\"@b.c\""}},
    {"{\"format\":\"time\"}", {"\"12:30:00Z\""}, {"\"25:00:00Z\""}},
    {"{\"enum\":[\"red\",\"green\",\"re\",1,null,{\"a\":[1]}]}",
     {"\"red\"", "\"re\"", "\"green\"", "1", "null", "{\"a\": [1]}"},
     {"\"r\"", "\"blue\"", "12"}},
    {"{\"type\":\"string\",\"enum\":[\"a\",3]}", {"\"a\""}, {"3"}},
    {"{\"enum\":[\"b\",\"a\",\"a\",1,\"a\",1,\"c\"]}", {"\"a\"", "1", "\"c\""}, {"\"d\"", "2"}},
    {"{\"const\":\"x\\n\\\"\"}", {"\"x\\n\\\"\""}, {"\"x\""}},
    {OBJECT("\"a\":{\"type\":\"integer\"},\"b\":{\"type\":\"string\"}",
            ",\"required\":[\"a\",\"b\"],\"additionalProperties\":false"),
     {"{\"a\": 1, \"b\": \"x\"}", "{\"a\":1,\"b\":\"\"}", "{\n  \"a\": 1,\n  \"b\": \"\"\n}"},
     {"{}", "{\"a\":1}", "{\"b\":\"x\",\"a\":1}", "{\"a\":1,\"b\":\"x\",\"c\":1}", "{\"a\":1,\"b\":\"x\",}",
      "{\"a\":\"1\",\"b\":\"x\"}", "{\"a\"  :1,\"b\":\"\"}"}},
    {OBJECT("\"a\":{\"type\":\"integer\"},\"b\":{\"type\":\"null\"},\"c\":{\"type\":\"integer\"}",
            ",\"required\":[\"b\"]"),
     {"{\"b\":null}", "{\"a\":1,\"b\":null}", "{\"b\":null,\"c\":2}", "{\"a\":1,\"b\":null,\"c\":2}"},
     {"{}", "{\"a\":1}", "{\"a\":1,\"c\":1}", "{\"b\":null,}", "{\"b\":null,\"b\":null}", "{\"b\":null,\"d\":1}",
      "{,\"b\":null}"}},
    {OBJECT("\"a\":{},\"b\":{}", ""),
     {"{}", "{\"a\":[]}", "{\"b\":1}", "{\"a\":1,\"b\":2}"},
     {"{\"b\":1,\"a\":2}", "{\"c\":1}"}},
    {OBJECT("\"ab\":{\"type\":\"integer\"},\"a\":{\"type\":\"integer\"}",
            ",\"additionalProperties\":{\"type\":\"string\"}"),
     {"{}", "{\"ab\":1,\"a\":2,\"c\":\"x\"}", "{\"abc\":\"x\",\"\":\"\"}", "{\"a\":1,\"\xC3\xA9\":\"\",\"b\":\"\"}"},
     {"{\"c\":1}", "{\"c\":\"x\",\"a\":\"x\"}", "{\"c\":\"x\",\"a\":1}", "{\"ab\":\"x\"}", "{\"\\u0061\":\"x\"}"}},
    {"{\"type\":\"object\",\"additionalProperties\":{\"type\":\"integer\"}}",
     {"{}", "{\"x\":1,\"y\":2}"},
     {"{\"x\":\"\"}"}},
    {"{\"type\":\"object\",\"required\":[\"x\"]}", {"{\"x\":1}", "{\"x\":1,\"y\":2}"}, {"{}", "{\"y\":1}"}},
    {"{\"type\":\"object\"}", {"{}", "{\"x\":{\"y\":[]}}"}, {"1"}},
    {OBJECT("", ",\"additionalProperties\":false"), {"{}"}, {"{\"a\":1}"}},
    {"{\"type\":\"array\",\"items\":{\"type\":\"integer\"},\"minItems\":1,\"maxItems\":3}",
     {"[1]", "[1,2]", "[1, 2, 3]"},
     {"[]", "[1,2,3,4]", "[\"1\"]"}},
    {"{\"type\":\"array\",\"items\":{\"type\":\"array\",\"items\":{\"type\":\"null\"},\"minItems\":2,\"maxItems\":2},"
     "\"minItems\":2}",
     {"[[null,null],[null,null]]", "[[null,null],[null,null],[null,null]]"},
     {"[[null,null]]", "[[null],[null,null]]"}},
    {"{\"type\":\"array\",\"maxItems\":0}", {"[]"}, {"[1]"}},
    {"{\"type\":\"array\",\"maxItems\":1}", {"[]", "[{}]"}, {"[1,2]"}},
    {"{\"type\":\"array\",\"prefixItems\":[{\"type\":\"integer\"},{\"type\":\"string\"}]}",
     {"[]", "[1]", "[1,\"x\"]"},
     {"[\"x\"]", "[1,\"x\",2]", "[1,]"}},
    {"{\"prefixItems\":[{\"type\":\"integer\"}],\"items\":{\"type\":\"null\"},\"minItems\":2,\"maxItems\":3}",
     {"[1,null]", "[1,null,null]"},
     {"[1]", "[1,null,null,null]", "[null,null]"}},
    {"{\"prefixItems\":[{},{}],\"maxItems\":1}", {"[]", "[1]"}, {"[1,2]"}},
    {"{\"anyOf\":[{\"type\":\"integer\"},{\"type\":\"null\"},{\"type\":\"array\",\"items\":{\"type\":\"null\"}}]}",
     {"1", "null", "[null]"},
     {"\"\"", "[1]"}},
    {"{\"oneOf\":[{\"const\":1},{\"const\":12}]}", {"1", "12"}, {"2"}},
    {"{\"type\":\"object\",\"properties\":{\"a\":{\"type\":\"integer\"}},\"anyOf\":[{\"required\":[\"a\"]},{"
     "\"properties\":{\"b\":{\"const\":1}},\"required\":[\"b\"]}]}",
     {"{\"a\":1}", "{\"a\":1,\"b\":1}", "{\"b\":1}"},
     {"{}", "{\"b\":2}"}},
    {"{\"allOf\":[{\"properties\":{\"a\":{\"minimum\":3}}},{\"properties\":{\"a\":{\"type\":\"integer\",\"maximum\":4}}"
     ",\"required\":[\"a\"]}]}",
     {"{\"a\":3}", "{\"a\":4}"},
     {"{}", "{\"a\":5}", "{\"a\":2}", "{\"a\":3.5}"}},
    {"{\"pattern\":\"^(?:((){3}){4}a){2}(b|){3}$\"}",
     {"\"aa\"", "\"aab\"", "\"aabbb\""},
     {"\"\"", "\"a\"", "\"aaa\"", "\"aabbbb\""}},
    {"{\"const\":{\"a\":[1]}}", {"{\"a\": [1]}"}, {"{}", "{\"a\":1}"}},
    {"{\"enum\":[1,2],\"const\":2}", {"2"}, {"1"}},
    {"{\"pattern\":\"^a(?:[]){0,5}(?:b{0}){7}c{2,4}$\"}", {"\"acc\"", "\"acccc\""}, {"\"ac\"", "\"accccc\"", "\"a\""}},
    {"{\"allOf\":[{\"enum\":[1,2,3]},{\"enum\":[2,3,4]}]}", {"2", "3"}, {"1", "4"}},
    {"{\"$ref\":\"#/$defs/"
     "n\",\"description\":\"d\",\"$defs\":{\"n\":{\"type\":\"object\",\"properties\":{\"v\":{\"type\":\"integer\"},"
     "\"next\":{\"anyOf\":[{\"$ref\":\"#/$defs/"
     "n\"},{\"type\":\"null\"}]}},\"required\":[\"v\",\"next\"],\"additionalProperties\":false}}}",
     {"{\"v\":1,\"next\":null}", "{\"v\":1,\"next\":{\"v\":2,\"next\":{\"v\":3,\"next\":null}}}"},
     {"{\"v\":1}", "{\"v\":1,\"next\":{}}", "null"}},
    {"{\"anyOf\":[{\"$ref\":\"#\"},{\"type\":\"integer\"}]}", {"1"}, {"\"\"", "null"}},
    {"{\"type\":\"array\",\"items\":{\"$ref\":\"#\"}}", {"[]", "[[],[[]]]"}, {"[1]"}},
    {"{\"definitions\":{\"a/b\":{\"type\":\"null\"}},\"$ref\":\"#/definitions/a~1b\"}", {"null"}, {"1"}},
    {"{\"$ref\":\"#/$defs/s\",\"maxLength\":1,\"$defs\":{\"s\":{\"type\":\"string\"}}}", {"\"a\""}, {"\"ab\"", "1"}},
    {"{\"type\":\"integer\",\"nullable\":true}", {"1", "null"}, {"\"\""}},
    {OBJECT("\"a\\\"b\":{\"type\":\"null\"}", ",\"required\":[\"a\\\"b\"]"), {"{\"a\\\"b\":null}"}, {"{\"ab\":null}"}},
    {"{\"title\":\"t\",\"description\":\"d\",\"default\":1,\"examples\":[1],\"x-y\":2,\"type\":\"null\"}",
     {"null"},
     {"1"}},
};

static void test_texts(void **unused)
{
    (void)unused;
    for (size_t i = 0; i < COUNT(texts); i++) {
        const char *problem = NULL;
        for (int k = 0; k < 8 && texts[i].accepted[k] && !problem; k++)
            problem = test_accept_problem(bytes_only.vocabulary, texts[i].schema, texts[i].accepted[k], true);
        for (int k = 0; k < 12 && texts[i].refused[k] && !problem; k++)
            problem = test_accept_problem(bytes_only.vocabulary, texts[i].schema, texts[i].refused[k], false);
        if (problem)
            fail_msg("%s", problem);
    }
}

// ---- refusals ------------------------------------------------------------------------------------------------------

static const struct {
    const char *schema, *message;
} refusals[] = {
    {"1", "schema: a schema must be an object or a boolean"},
    {"false", "schema: no text can satisfy it"},
    {OBJECT("\"a\":{\"patternProperties\":{}}", ""), "schema.properties.a: \"patternProperties\" is not supported"},
    {"{\"anyOf\":[{\"type\":\"null\"},{\"not\":{}}]}", "schema.anyOf[1]: \"not\" is not supported"},
    {"{\"type\":\"array\",\"items\":{\"type\":\"array\",\"uniqueItems\":true}}",
     "schema.items: \"uniqueItems\" is not supported"},
    {"{\"type\":\"object\",\"propertyNames\":{}}", "schema: \"propertyNames\" is not supported"},
    {"{\"type\":\"number\",\"multipleOf\":0.1}", "schema: \"multipleOf\" is not supported"},
    {"{\"type\":\"text\"}", "schema: \"type\" must be one or a list of"},
    {"{\"type\":[]}", "schema: \"type\" must be one or a list of"},
    {"{\"enum\":[]}", "schema: \"enum\" must be an array that is not empty"},
    {"{\"properties\":1}", "schema: \"properties\" must be an object"},
    {"{\"items\":[{}]}", "schema: \"items\" must be an object or a boolean"},
    {"{\"minLength\":-1}", "schema: \"minLength\" must be a whole number from 0"},
    {"{\"minItems\":1.5}", "schema: \"minItems\" must be a whole number from 0"},
    {"{\"type\":\"string\",\"minLength\":2000000}", "schema: \"minLength\" is above 1000000"},
    {"{\"required\":[1]}", "schema: \"required\" must be an array of strings"},
    {OBJECT("", ",\"required\":[\"x\"],\"additionalProperties\":false"), "schema: \"x\" is required, but"},
    {"{\"$ref\":\"#/$defs/x\"}", "schema: there is no \"#/$defs/x\" to refer to"},
    {"{\"$ref\":\"http://x/y\"}", "schema: \"$ref\" must be \"#\" or begin with \"#/\""},
    {"{\"$ref\":\"#\"}", "schema: no text can satisfy it"},
    {"{\"type\":\"object\",\"properties\":{\"a\":{\"$ref\":\"#\"}},\"required\":[\"a\"]}",
     "schema: no text can satisfy it"},
    {"{\"type\":\"array\",\"items\":{\"$ref\":\"#\"},\"minItems\":1}", "schema: no text can satisfy it"},
    {"{\"allOf\":[{\"type\":\"string\"},{\"type\":\"null\"}]}", "schema: no text can satisfy it"},
    {"{\"type\":\"string\",\"minLength\":3,\"maxLength\":2}", "schema: no text can satisfy it"},
    {"{\"format\":\"ipv6\"}", "schema: the format \"ipv6\" is not supported"},
    {"{\"pattern\":\"(?=a)\"}", "schema: \"pattern\" cannot be used: look-around and flags are not supported"},
    {"{\"pattern\":\"a$b\"}", "schema: \"pattern\" cannot be used: ^ and $ are supported at the ends"},
    {"{\"pattern\":\"(a)\\\\1\"}", "schema: \"pattern\" cannot be used: references are not supported"},
    {"{\"pattern\":\"\\\\bx\"}", "schema: \"pattern\" cannot be used: \\b and \\B are not supported"},
    {"{\"pattern\":\"\\\\p{L}\"}", "schema: \"pattern\" cannot be used: \\p is not supported"},
    {"{\"pattern\":\"(a\"}", "schema: \"pattern\" cannot be used: a group has no end"},
    {"{\"pattern\":\"[a\"}", "schema: \"pattern\" cannot be used: a class has no end"},
    {"{\"pattern\":\"[b-a]\"}", "schema: \"pattern\" cannot be used: a range of a class is out of order"},
    {"{\"pattern\":\"a)\"}", "schema: \"pattern\" cannot be used: a \")\" closes nothing"},
    {"{\"pattern\":\"*\"}", "schema: \"pattern\" cannot be used: a quantifier follows nothing"},
    {"{\"pattern\":\"a{2,1}\"}", "schema: \"pattern\" cannot be used: a quantifier is not"},
    {"{\"pattern\":\"a\\\\\"}", "schema: \"pattern\" cannot be used: it ends in a backslash"},
    {"{\"pattern\":\"a\",\"maxLength\":3}", "schema: \"pattern\" together with another of"},
    {"{\"enum\":[\"a\"],\"maxLength\":3}",
     "schema: \"maxLength\" together with \"enum\" or \"const\" is not supported"},
    {"{\"type\":\"integer\",\"minimum\":3,\"maximum\":2}", "schema: no integer lies between the bounds"},
    {"{\"type\":\"number\",\"exclusiveMinimum\":2,\"maximum\":2}", "schema: no number lies between the bounds"},
    {"{\"type\":\"number\",\"minimum\":1e-300}", "schema: a bound has more than 15 digits"},
    {"{\"type\":\"integer\",\"minimum\":true}", "schema: \"minimum\" must be a number"},
};

static void test_refusals(void **unused)
{
    (void)unused;
    for (size_t i = 0; i < COUNT(refusals); i++) {
        struct grammar *grammar = NULL;
        struct error err = {0};
        if (!test_schema_grammar(&grammar, bytes_only.vocabulary, refusals[i].schema, &err))
            fail_msg("%s was not refused", refusals[i].schema);
        assert_int_equal(err.code, ERR_USAGE);
        if (strncmp(err.msg, refusals[i].message, strlen(refusals[i].message)))
            fail_msg("%s: '%s' instead of '%s'", refusals[i].schema, err.msg, refusals[i].message);
    }
}

// ---- masks ---------------------------------------------------------------------------------------------------------

static void check_walks(struct grammar *grammar, int walks, bool parse)
{
    static char text[4096];
    for (int walk = 0; walk < walks; walk++) {
        struct grammar_state *state = test_state(grammar);
        int64_t length = test_walk(&vocabulary, state, text, parse ? 400 : 200, test_check_mask);
        if (length >= 0 && parse) {
            json_error_t error;
            json_t *json = json_loadb(text, (size_t)length, JSON_DECODE_ANY, &error);
            if (!json)
                fail_msg("%.*s: %s", (int)length, text, error.text);
            json_decref(json);
        }
        grammar_state_free(state);
    }
}

static void test_masks(void **unused)
{
    (void)unused;
    test_positions = 0;
    for (size_t i = 0; i < COUNT(texts); i++) {
        struct grammar *grammar = NULL;
        struct error err = {0};
        if (test_schema_grammar(&grammar, vocabulary.vocabulary, texts[i].schema, &err))
            fail_msg("%s", err.msg);
        check_walks(grammar, (i < 4 ? 40 : 8) / (quick() ? 4 : 1), true);
        grammar_free(grammar);
    }
    print_message("# %lld positions\n", (long long)test_positions);
}

// ---- numbers -------------------------------------------------------------------------------------------------------

// Every number of a grid against random bounds.
static void test_bounds(void **unused)
{
    (void)unused;
    for (int i = 0; i < (quick() ? 80 : 300); i++) {
        static const int scales[] = {10, 100, 1000, 20000};
        int scale = scales[random_bits() % 4], tenths = i % 2; // the second kind has one decimal
        int64_t low = (int64_t)(random_bits() % (2u * (unsigned)scale)) - scale,
                high = low + (int64_t)(random_bits() % (unsigned)scale);
        bool above = random_bits() % 2, below = random_bits() % 2;
        char schema[200], text[32];
        struct grammar *grammar = NULL;
        struct error err = {0};
        if (low + above > high - below)
            continue;
        snprintf(schema, sizeof schema, "{\"type\":\"%s\",\"%s\":%.*f,\"%s\":%.*f}", tenths ? "number" : "integer",
                 above ? "exclusiveMinimum" : "minimum", tenths, (double)low / (tenths ? 10 : 1),
                 below ? "exclusiveMaximum" : "maximum", tenths, (double)high / (tenths ? 10 : 1));
        if (test_schema_grammar(&grammar, bytes_only.vocabulary, schema, &err))
            fail_msg("%s: %s", schema, err.msg);
        for (int64_t value = low - 30; value <= high + 30;
             value += value < low + 30 || value > high - 30 ? 1 : 1 + (int64_t)(random_bits() % 50)) {
            snprintf(text, sizeof text, "%.*f", tenths, (double)value / (tenths ? 10 : 1));
            bool wanted = value >= low + above && value <= high - below && strcmp(text, "-0.0") != 0;
            struct grammar_state *one = test_state(grammar);
            bool got = grammar_state_take(one, text, strlen(text)) && grammar_state_complete(one);
            grammar_state_free(one);
            if (got != wanted)
                fail_msg("%s: %s was %s", schema, text, got ? "accepted" : "refused");
        }
        grammar_free(grammar);
    }
}

// ---- texts around JSON ---------------------------------------------------------------------------------------------

static bool takes(struct grammar *grammar, const char *text)
{
    struct grammar_state *state = test_state(grammar);
    bool taken = grammar_state_take(state, text, strlen(text)) && grammar_state_complete(state);
    grammar_state_free(state);
    return taken;
}

static void compile(struct grammar *grammar)
{
    struct error err = {0};
    if (grammar_compile(grammar, &err))
        fail_msg("%s", err.msg);
}

static void test_pieces(void **unused)
{
    (void)unused;
    json_t *schema = test_json(OBJECT("\"x\":{\"type\":\"integer\"}", ",\"required\":[\"x\"]"));
    struct grammar *grammar = test_grammar_new(vocabulary.vocabulary);
    grammar_until(grammar, "</think>");
    grammar_blank(grammar);
    grammar_begin(grammar);
    grammar_marker(grammar, "<tool_call>");
    grammar_text(grammar, "\n{\"name\": \"");
    grammar_begin(grammar);
    grammar_text(grammar, "f\", \"arguments\": ");
    grammar_schema(grammar, schema, "tools[0].function.parameters");
    grammar_or(grammar);
    grammar_text(grammar, "g\", \"arguments\": ");
    grammar_json(grammar, true);
    grammar_end(grammar, 1, 1, "");
    grammar_text(grammar, "}\n");
    grammar_marker(grammar, "</tool_call>");
    grammar_end(grammar, 1, 3, "\n");
    compile(grammar);
#define CALL_F "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": 1}}\n</tool_call>"
#define CALL_G "<tool_call>\n{\"name\": \"g\", \"arguments\": {}}\n</tool_call>"
    assert_true(takes(grammar, "</think>" CALL_F));
    assert_true(takes(grammar, "hm </thin </</think>\n\n" CALL_G "\n" CALL_F "\n" CALL_G));
    assert_false(takes(grammar, CALL_F));
    assert_false(takes(grammar, "</think>"));
    assert_false(takes(grammar, "</think>" CALL_F CALL_F));
    assert_false(takes(grammar, "</think>" CALL_F "\n" CALL_F "\n" CALL_F "\n" CALL_F));
    assert_false(takes(grammar, "</think><tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call>"));
    check_walks(grammar, 20, false);
    grammar_free(grammar);

    // A special token is reached as a token, and its text alone does not do.
    grammar = test_grammar_new(vocabulary.vocabulary);
    grammar_marker(grammar, "[CALL]");
    grammar_regex(grammar, "(?:yes|no){0,2}", "guided_regex");
    compile(grammar);
    assert_false(takes(grammar, "[CALL]yes"));
    assert_true(takes(grammar, "\xFF[CALL]yesno"));
    check_walks(grammar, 20, false);
    struct grammar_state *state = test_state(grammar);
    grammar_state_advance(state, TEST_SPECIAL);
    assert_true(grammar_state_complete(state));
    // What is not allowed leads to the end, and nowhere else.
    uint32_t mask[TEST_WORDS];
    const uint32_t strange[] = {'x', TEST_EOS, 258, UINT32_MAX, 'y'};
    for (size_t i = 0; i < COUNT(strange); i++) {
        grammar_state_advance(state, strange[i]);
        assert_true(grammar_state_dead(state));
        assert_false(grammar_state_complete(state));
        grammar_state_fill(state, mask, TEST_WORDS);
        for (int64_t id = 0; id < vocabulary.count; id++)
            assert_int_equal(test_bit(mask, id), id == TEST_EOS);
    }
    grammar_state_free(state);
    grammar_free(grammar);

    static const struct {
        int64_t min, max;
        const char *accepted[4], *refused[4];
    } groups[] = {
        {0, -1, {"", "a", "a,b,a,a"}, {",", "a,", "ab"}},
        {1, -1, {"a", "b,b"}, {"", "a,"}},
        {2, -1, {"a,b", "a,b,a"}, {"a", ""}},
        {0, 2, {"", "a", "a,b"}, {"a,b,a", "a,"}},
        {2, 3, {"a,b", "a,b,b"}, {"a", "a,a,a,a"}},
        {1, 1, {"a", "b"}, {"", "a,b"}},
        {0, 0, {""}, {"a"}},
    };
    for (size_t i = 0; i < COUNT(groups); i++) {
        grammar = test_grammar_new(vocabulary.vocabulary);
        grammar_begin(grammar);
        grammar_text(grammar, "a");
        grammar_or(grammar);
        grammar_text(grammar, "b");
        grammar_end(grammar, groups[i].min, groups[i].max, ",");
        compile(grammar);
        for (int k = 0; k < 4 && groups[i].accepted[k]; k++)
            if (!takes(grammar, groups[i].accepted[k]))
                fail_msg("group %d: '%s' was refused", (int)i, groups[i].accepted[k]);
        for (int k = 0; k < 4 && groups[i].refused[k]; k++)
            if (takes(grammar, groups[i].refused[k]))
                fail_msg("group %d: '%s' was accepted", (int)i, groups[i].refused[k]);
        check_walks(grammar, 5, false);
        grammar_free(grammar);
    }

    // Groups that do not fit, and the first refusal of several.
    struct error err;
    grammar = test_grammar_new(vocabulary.vocabulary);
    grammar_end(grammar, 1, 1, "");
    assert_int_equal(grammar_compile(grammar, &err), ERR_USAGE);
    grammar_free(grammar);
    grammar = test_grammar_new(vocabulary.vocabulary);
    grammar_begin(grammar);
    assert_int_equal(grammar_compile(grammar, &err), ERR_USAGE);
    grammar_free(grammar);
    grammar = test_grammar_new(vocabulary.vocabulary);
    grammar_regex(grammar, "(", "guided_regex");
    assert_int_equal(grammar_compile(grammar, &err), ERR_USAGE);
    assert_string_equal(err.msg, "guided_regex: the regular expression cannot be used: a group has no end (at byte 1)");
    grammar_free(grammar);
    json_decref(schema);
}

// For test_grammar_schema.py: texts of the schema on standard input, one JSON string a line.
static int generate(int count)
{
    static char text[1 << 16];
    struct error err = {0};
    size_t bytes = fread(text, 1, sizeof text - 1, stdin);
    text[bytes] = 0;
    struct grammar *grammar = NULL;
    if (test_schema_grammar(&grammar, vocabulary.vocabulary, text, &err)) {
        fprintf(stderr, "%s\n", err.msg);
        return 1;
    }
    for (int made = 0, tries = 0; made < count && tries < 20 * count; tries++) {
        struct grammar_state *state = test_state(grammar);
        int64_t length = test_walk(&vocabulary, state, text, 1500, NULL);
        json_t *line = length < 0 ? NULL : json_stringn(text, (size_t)length);
        if (line && json_dumpf(line, stdout, JSON_ENCODE_ANY | JSON_ENSURE_ASCII) == 0) {
            putchar('\n');
            made++;
        }
        json_decref(line);
        grammar_state_free(state);
    }
    grammar_free(grammar);
    return 0;
}

int main(int argc, char **argv)
{
    test_vocabulary_open(&bytes_only, 0);
    test_vocabulary_open(&vocabulary, 600);
    if (argc == 3 && !strcmp(argv[1], "generate"))
        return generate(atoi(argv[2]));
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_texts),  cmocka_unit_test(test_refusals), cmocka_unit_test(test_masks),
        cmocka_unit_test(test_bounds), cmocka_unit_test(test_pieces),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    test_vocabulary_close(&bytes_only);
    test_vocabulary_close(&vocabulary);
    return failed;
}
