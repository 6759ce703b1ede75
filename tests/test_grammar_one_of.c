// "oneOf": alternatives that exclude each other are let through, others are refused by name.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "engine/serve/api_text.h"
#include "tests/grammar_help.h"

static struct test_vocabulary bytes_only;

#define ONE_OF(alternatives) "{\"oneOf\":[" alternatives "]}"
#define KIND(value, more) "{\"type\":\"object\",\"properties\":{\"kind\":" value more "},\"required\":[\"kind\"]}"
#define HAS(name)                                                                                                      \
    "{\"type\":\"object\",\"properties\":{\"" name "\":{\"type\":\"integer\"}},\"required\":[\"" name "\"]}"

static const struct {
    const char *schema, *accepted[4], *refused[4];
} exclusive[] = {
    {ONE_OF("{\"type\":\"integer\"},{\"type\":\"string\"},{\"type\":[\"null\",\"boolean\"]}"),
     {"1", "\"a\"", "null", "true"},
     {"1.5", "[]"}},
    {ONE_OF("{\"const\":1,\"title\":\"one\"},{\"const\":12},{\"enum\":[\"a\",\"b\"]},{\"const\":\"c\"}"),
     {"1", "12", "\"b\"", "\"c\""},
     {"2", "\"d\""}},
    {ONE_OF("{\"type\":\"number\"},{\"const\":\"x\"},false"), {"1.5", "\"x\""}, {"\"y\"", "false"}},
    {ONE_OF(KIND("{\"const\":\"a\"}", ",\"x\":{\"type\":\"null\"}") "," KIND("{\"enum\":[\"b\",\"c\"]}", "")),
     {"{\"kind\":\"a\",\"x\":null}", "{\"kind\":\"c\"}"},
     {"{\"kind\":\"b\",\"x\":null}", "{}", "{\"kind\":\"d\"}"}},
    {ONE_OF(KIND("{\"type\":\"integer\"}", "") "," KIND("{\"type\":\"object\",\"properties\":{},\"required\":[]}", "")),
     {"{\"kind\":1}", "{\"kind\":{}}"},
     {"{\"kind\":\"a\"}"}},
    // One of both need not have the property: without it, it is not the other one.
    {ONE_OF(KIND("{\"const\":1}", "") ",{\"type\":\"object\",\"properties\":{\"kind\":{\"const\":2}}}"),
     {"{\"kind\":1}", "{\"kind\":2}", "{}"},
     {"{\"kind\":3}"}},
    // No object here has both.
    {ONE_OF(HAS("a") "," HAS("b")), {"{\"a\":1}", "{\"b\":1}"}, {"{\"a\":1,\"b\":1}", "{}"}},
    {ONE_OF("{\"type\":\"object\",\"additionalProperties\":{\"type\":\"integer\"},\"required\":[\"a\"]},"
            "{\"type\":\"object\",\"properties\":{\"b\":{\"type\":\"null\"}},\"required\":[\"b\"],"
            "\"additionalProperties\":false}"),
     {"{\"a\":1,\"c\":2}", "{\"b\":null}"},
     {"{\"a\":1,\"b\":null}"}},
    {"{\"type\":\"string\",\"oneOf\":[{\"const\":\"a\"},{\"const\":\"b\"}]}", {"\"a\"", "\"b\""}, {"\"c\""}},
    {"{\"type\":\"object\",\"properties\":{\"k\":{\"type\":\"string\"}},\"required\":[\"k\"],\"oneOf\":["
     "{\"properties\":{\"k\":{\"const\":\"a\"}}},{\"properties\":{\"k\":{\"const\":\"b\"}}}]}",
     {"{\"k\":\"a\"}", "{\"k\":\"b\"}"},
     {"{\"k\":\"c\"}"}},
    {ONE_OF("{\"anyOf\":[{\"type\":\"integer\"},{\"type\":\"null\"}]},{\"type\":\"string\"}"),
     {"1", "null", "\"a\""},
     {"[]"}},
    {"{\"oneOf\":[{\"$ref\":\"#/$defs/a\"},{\"$ref\":\"#/$defs/b\"}],\"$defs\":{\"a\":" KIND(
         "{\"const\":\"a\"}", "") ",\"b\":{\"allOf\":[" KIND("{\"const\":\"b\"}", "") "]}}}",
     {"{\"kind\":\"a\"}", "{\"kind\":\"b\"}"},
     {"{\"kind\":\"c\"}"}},
    {"{\"$ref\":\"#/$defs/n\",\"$defs\":{\"n\":{\"oneOf\":[{\"type\":\"null\"},{\"type\":\"array\",\"items\":{\"$ref\":"
     "\"#/$defs/n\"},\"maxItems\":1}]}}}",
     {"null", "[[null]]"},
     {"[1]"}},
};

static void test_exclusive(void **unused)
{
    (void)unused;
    for (size_t i = 0; i < COUNT(exclusive); i++)
        for (int k = 0; k < 8; k++) {
            const char *text = k < 4 ? exclusive[i].accepted[k] : exclusive[i].refused[k - 4];
            const char *problem =
                text ? test_accept_problem(bytes_only.vocabulary, exclusive[i].schema, text, k < 4) : NULL;
            if (problem)
                fail_msg("%s", problem);
        }
}

static const char *const overlapping[] = {
    ONE_OF("{\"type\":\"integer\"},{\"type\":\"number\"}"),
    ONE_OF("{\"const\":1},{\"const\":1.0}"),
    ONE_OF("{\"const\":1},{\"const\":2},{\"enum\":[3,2]}"),
    ONE_OF("{\"const\":2.0},{\"type\":\"integer\"}"),
    ONE_OF("{\"type\":\"string\"},{\"const\":\"a\"}"),
    ONE_OF("{\"type\":\"string\"},{\"type\":[\"string\",\"null\"]}"),
    ONE_OF("{},{\"type\":\"null\"}"),
    ONE_OF("{\"type\":\"integer\"},{\"minLength\":2}"), // without "type" numbers are valid
    ONE_OF("{\"type\":\"array\",\"items\":{\"type\":\"null\"}},{\"type\":\"array\",\"items\":{\"type\":\"integer\"}"
           "}"), // []
    ONE_OF(KIND("{\"enum\":[\"a\",\"b\"]}", "") "," KIND("{\"enum\":[\"b\",\"c\"]}", "")),
    ONE_OF(KIND("{}", "") "," KIND("{\"const\":1}", "")),
    ONE_OF("{\"properties\":{\"a\":{\"const\":1}}},{\"properties\":{\"a\":{\"const\":2}}}"), // {}
    ONE_OF("{\"anyOf\":[{\"type\":\"integer\"},{\"type\":\"null\"}]},{\"type\":[\"null\",\"string\"]}"),
    // Both names may be there, from beside the alternatives or because the objects are open.
    "{\"properties\":{\"a\":{},\"b\":{}},\"oneOf\":[{\"required\":[\"a\"]},{\"required\":[\"b\"]}]}",
    "{\"properties\":{\"b\":{}},\"oneOf\":[" HAS("a") "," HAS("b") "]}",
    "{\"oneOf\":[" HAS("a") "," HAS("b") "],\"anyOf\":[{\"properties\":{\"b\":{}}},{\"type\":\"object\"}]}",
    "{\"additionalProperties\":{},\"oneOf\":[" HAS("a") "," HAS("b") "]}",
    "{\"$ref\":\"#/$defs/n\",\"$defs\":{\"n\":{\"oneOf\":[{\"type\":\"integer\"},{\"$ref\":\"#/$defs/n\"}]}}}",
};

static void test_overlapping(void **unused)
{
    (void)unused;
    for (size_t i = 0; i < COUNT(overlapping); i++) {
        struct grammar *grammar = NULL;
        struct error err = {0};
        if (!test_schema_grammar(&grammar, bytes_only.vocabulary, overlapping[i], &err))
            fail_msg("%s was not refused", overlapping[i]);
        if (err.code != ERR_USAGE || !strstr(err.msg, "oneOf: a value may be valid for ["))
            fail_msg("%s: '%s'", overlapping[i], err.msg);
    }
}

// The work is bounded, however the alternatives are made.
static void test_many_alternatives(void **unused)
{
    (void)unused;
    enum { COUNT_OF = 300 };
    struct api_text text = {0};
    struct grammar *grammar = NULL;
    struct error err = {0};
    api_text_puts(&text, "{\"oneOf\":[");
    for (int i = 0; i < COUNT_OF; i++)
        api_text_printf(&text, "%s{\"const\":\"value %d\"}", i ? "," : "", i);
    api_text_puts(&text, "]}");
    int rc = test_schema_grammar(&grammar, bytes_only.vocabulary, text.data, &err);
    assert_int_equal(rc, ERR_USAGE); // 89,700 comparisons
    assert_non_null(strstr(err.msg, "too many alternatives"));
    api_text_free(&text);
}

static int open_vocabulary(void **unused)
{
    (void)unused;
    test_vocabulary_open(&bytes_only, 0);
    return 0;
}

static int close_vocabulary(void **unused)
{
    (void)unused;
    test_vocabulary_close(&bytes_only);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_exclusive),
        cmocka_unit_test(test_overlapping),
        cmocka_unit_test(test_many_alternatives),
    };
    return cmocka_run_group_tests(tests, open_vocabulary, close_vocabulary);
}
