// Small JSON files: refusals as whole sentences, types, ranges, defaults, huge integers.
#include "formats/json_file.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

static void test_bad_files(void **state)
{
    (void)state;
    static const struct {
        const char *what, *text, *message;
    } cases[] = {
        {"empty", "", "c.json, line 1, column 0: not valid JSON: '[' or '{' expected near end of file"},
        {"array", "[1]", "c.json: must hold a JSON object, found an array"},
        {"trailing bytes", "{} x", "c.json, line 1, column 4: not valid JSON: end of file expected near 'x'"},
        {"third line", "{\n\"a\":1,\n\"b\":}", "c.json, line 3, column 5: not valid JSON: unexpected token near '}'"},
        {"duplicate", "{\"a\":1,\"a\":1}",
         "c.json, line 1, column 10: not valid JSON: duplicate object key near '\"a\"'"},
        {"NaN", "{\"a\":NaN}", "c.json, line 1, column 8: not valid JSON: invalid token near 'NaN'"},
        {"infinite", "{\"a\":1e999}", "c.json, line 1, column 10: not valid JSON: real number overflow near '1e999'"},
        {"NUL", "{\"a\":\"\\u0000\"}",
         "c.json, line 1, column 13: not valid JSON: \\u0000 is not allowed without JSON_ALLOW_NUL near '\"\\u0000\"'"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct json_object root = {0};
        struct error err = {0};
        int rc = json_file_parse(&root, cases[i].text, strlen(cases[i].text), "c.json", ERR_CORRUPT, &err);
        if (rc != ERR_CORRUPT || err.code != rc || root.json || strcmp(err.msg, cases[i].message))
            fail_msg("%s: code %d, %s", cases[i].what, rc, err.msg);
    }
    char deep[5000];
    memset(deep, '[', sizeof deep);
    memcpy(deep, "{\"a\":", 5);
    struct json_object root = {0};
    assert_int_equal(json_file_parse(&root, deep, sizeof deep, "c.json", ERR_MODEL, NULL), ERR_MODEL);
}

// One getter with everything fixed but the object; the value goes to one number.
static int get_int(double *out, const struct json_object *object, enum json_need need, struct error *err)
{
    int64_t value = -77;
    int rc = json_file_get_int(&value, object, "k", 1, 1048576, need, err);
    *out = (double)value;
    return rc;
}
static int get_number(double *out, const struct json_object *object, enum json_need need, struct error *err)
{
    *out = -77;
    return json_file_get_number(out, object, "k", 0.5, 1e9, need, err);
}
static int get_bool(double *out, const struct json_object *object, enum json_need need, struct error *err)
{
    bool value = true;
    int rc = json_file_get_bool(&value, object, "k", need, err);
    *out = value;
    return rc;
}
static int get_string(double *out, const struct json_object *object, enum json_need need, struct error *err)
{
    const char *value = "default";
    int rc = json_file_get_string(&value, object, "k", need, err);
    *out = (double)strlen(value);
    return rc;
}
static int get_array(double *out, const struct json_object *object, enum json_need need, struct error *err)
{
    const json_t *value = NULL;
    int rc = json_file_get_array(&value, object, "k", need, err);
    *out = value ? (double)json_array_size(value) : -77;
    return rc;
}
static int get_object(double *out, const struct json_object *object, enum json_need need, struct error *err)
{
    struct json_object value = {0};
    int rc = json_file_get_object(&value, object, "k", need, err);
    *out = value.json ? (double)json_object_size(value.json) : -77;
    return rc;
}

static void test_members(void **state)
{
    (void)state;
    static const struct {
        int (*get)(double *out, const struct json_object *object, enum json_need need, struct error *err);
        const char *text;
        enum json_need need;
        double want;
        const char *message; // null: accepted
    } cases[] = {
        {get_int, "{\"k\":1}", JSON_REQUIRED, 1, NULL},
        {get_int, "{\"k\":1048576}", JSON_OPTIONAL, 1048576, NULL},
        {get_int, "{}", JSON_OPTIONAL, -77, NULL},
        {get_int, "{\"k\":null}", JSON_OPTIONAL, -77, NULL},
        {get_int, "{}", JSON_REQUIRED, 0, "c.json: k must be an integer from 1 to 1048576, found nothing"},
        {get_int, "{\"k\":null}", JSON_REQUIRED, 0, "c.json: k must be an integer from 1 to 1048576, found null"},
        {get_int, "{\"k\":0}", JSON_REQUIRED, 0, "c.json: k must be an integer from 1 to 1048576, found 0"},
        {get_int, "{\"k\":1048577}", JSON_OPTIONAL, 0, "c.json: k must be an integer from 1 to 1048576, found 1048577"},
        {get_int, "{\"k\":-9223372036854775808}", JSON_REQUIRED, 0,
         "c.json: k must be an integer from 1 to 1048576, found -9223372036854775808"},
        {get_int, "{\"k\":\"1\"}", JSON_REQUIRED, 0, "c.json: k must be an integer from 1 to 1048576, found a string"},
        {get_int, "{\"k\":1.0}", JSON_OPTIONAL, 0,
         "c.json: k must be an integer from 1 to 1048576, found a real number"},
        {get_int, "{\"k\":true}", JSON_REQUIRED, 0, "c.json: k must be an integer from 1 to 1048576, found a boolean"},
        {get_int, "{\"k\":{}}", JSON_REQUIRED, 0, "c.json: k must be an integer from 1 to 1048576, found an object"},
        // A file with an integer beyond 64 bits: whole reals count as integers there.
        {get_int, "{\"k\":4096,\"m\":1000000000000000019884624838656}", JSON_REQUIRED, 4096, NULL},
        {get_int, "{\"k\":4096.5,\"m\":1000000000000000019884624838656}", JSON_REQUIRED, 0,
         "c.json: k must be an integer from 1 to 1048576, found a real number"},
        {get_int, "{\"k\":1000000000000000019884624838656}", JSON_REQUIRED, 0,
         "c.json: k must be an integer from 1 to 1048576, found a real number"},
        {get_int, "{\"k\":-5,\"m\":1000000000000000019884624838656}", JSON_REQUIRED, 0,
         "c.json: k must be an integer from 1 to 1048576, found -5"},
        {get_number, "{\"k\":0.5}", JSON_REQUIRED, 0.5, NULL},
        {get_number, "{\"k\":10000}", JSON_REQUIRED, 10000, NULL},
        {get_number, "{}", JSON_OPTIONAL, -77, NULL},
        {get_number, "{\"k\":0.25}", JSON_REQUIRED, 0, "c.json: k must be a number from 0.5 to 1e+09, found 0.25"},
        {get_number, "{\"k\":1e300}", JSON_REQUIRED, 0, "c.json: k must be a number from 0.5 to 1e+09, found 1e+300"},
        {get_number, "{\"k\":[1]}", JSON_REQUIRED, 0, "c.json: k must be a number from 0.5 to 1e+09, found an array"},
        {get_bool, "{\"k\":false}", JSON_REQUIRED, 0, NULL},
        {get_bool, "{}", JSON_OPTIONAL, 1, NULL},
        {get_bool, "{\"k\":0}", JSON_OPTIONAL, 0, "c.json: k must be true or false, found an integer"},
        {get_string, "{\"k\":\"abc\"}", JSON_REQUIRED, 3, NULL},
        {get_string, "{\"k\":null}", JSON_OPTIONAL, 7, NULL},
        {get_string, "{\"k\":1}", JSON_OPTIONAL, 0, "c.json: k must be a string, found an integer"},
        {get_array, "{\"k\":[1,2]}", JSON_REQUIRED, 2, NULL},
        {get_array, "{}", JSON_OPTIONAL, -77, NULL},
        {get_array, "{\"k\":{}}", JSON_REQUIRED, 0, "c.json: k must be an array, found an object"},
        {get_object, "{\"k\":{\"a\":1}}", JSON_REQUIRED, 1, NULL},
        {get_object, "{\"k\":null}", JSON_OPTIONAL, -77, NULL},
        {get_object, "{\"k\":\"\"}", JSON_OPTIONAL, 0, "c.json: k must be an object, found a string"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct json_object root;
        struct error err = {0};
        assert_int_equal(json_file_parse(&root, cases[i].text, strlen(cases[i].text), "c.json", ERR_MODEL, &err), 0);
        double got;
        int rc = cases[i].get(&got, &root, cases[i].need, &err);
        if (rc != (cases[i].message ? ERR_MODEL : 0) || (cases[i].message && strcmp(err.msg, cases[i].message)))
            fail_msg("%s: code %d, %s", cases[i].text, rc, err.msg);
        if (!cases[i].message && !(got == cases[i].want))
            fail_msg("%s: got %g", cases[i].text, got);
        json_file_close(&root);
    }
}

static void test_nested_members_are_named_in_full(void **state)
{
    (void)state;
    static const char text[] = "{\"rope_scaling\":{\"factor\":\"8\"},\"ranks\":[{\"bytes\":1},{\"bytes\":-1},7]}";
    struct json_object root, child;
    struct error err;
    double factor;
    int64_t bytes = 0;
    assert_int_equal(json_file_parse(&root, text, strlen(text), "c.json", ERR_MODEL, &err), 0);
    assert_int_equal(json_file_get_object(&child, &root, "rope_scaling", JSON_REQUIRED, &err), 0);
    assert_int_equal(json_file_get_number(&factor, &child, "factor", 1, 1024, JSON_REQUIRED, &err), ERR_MODEL);
    assert_string_equal(err.msg, "c.json: rope_scaling.factor must be a number from 1 to 1024, found a string");
    assert_int_equal(json_file_get_object_at(&child, &root, "ranks", 0, &err), 0);
    assert_int_equal(json_file_get_int(&bytes, &child, "bytes", 0, INT64_MAX, JSON_REQUIRED, &err), 0);
    assert_int_equal(bytes, 1);
    assert_int_equal(json_file_get_object_at(&child, &root, "ranks", 1, &err), 0);
    assert_int_equal(json_file_get_int(&bytes, &child, "bytes", 0, INT64_MAX, JSON_REQUIRED, &err), ERR_MODEL);
    assert_string_equal(err.msg, "c.json: ranks[1].bytes must be an integer from 0 to 9223372036854775807, found -1");
    assert_int_equal(json_file_get_object_at(&child, &root, "ranks", 2, &err), ERR_MODEL);
    assert_string_equal(err.msg, "c.json: ranks[2] must be an object, found an integer");
    assert_int_equal(json_file_get_object_at(&child, &root, "ranks", 3, &err), ERR_MODEL);
    assert_string_equal(err.msg, "c.json: ranks[3] must be an object, found nothing");
    json_file_close(&root);
}

static void test_files(void **state)
{
    (void)state;
    char path[] = "/tmp/test_json_file.XXXXXX";
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, "{\"a\":1}", 7), 7);
    close(fd);
    struct json_object root = {0};
    struct error err;
    int64_t a = 0;
    assert_int_equal(json_file_open(&root, path, 7, ERR_MODEL, &err), 0);
    assert_int_equal(json_file_get_int(&a, &root, "a", 0, 9, JSON_REQUIRED, &err), 0);
    assert_int_equal(a, 1);
    json_file_close(&root);
    assert_int_equal(json_file_open(&root, path, 6, ERR_MODEL, &err), ERR_MODEL);
    assert_non_null(strstr(err.msg, "has 7 bytes, at most 6 are accepted"));
    unlink(path);
    assert_int_equal(json_file_open(&root, path, 7, ERR_MODEL, &err), ERR_IO);
    json_file_close(&root);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bad_files),
        cmocka_unit_test(test_members),
        cmocka_unit_test(test_nested_members_are_named_in_full),
        cmocka_unit_test(test_files),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
