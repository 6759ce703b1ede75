// What can stand behind "is".
#include <string.h>

#include "formats/template_internal.h"

#define TEST(name)                                                                                                     \
    static struct value name(struct run *r, struct value self, const struct value *v, const struct args *args)
#define UNUSED (void)r, (void)self, (void)v, (void)args

TEST(test_defined)
{
    UNUSED;
    return value_bool(self.kind != VALUE_UNDEFINED);
}
TEST(test_undefined)
{
    UNUSED;
    return value_bool(self.kind == VALUE_UNDEFINED);
}
TEST(test_none)
{
    UNUSED;
    return value_bool(self.kind == VALUE_NONE);
}
TEST(test_boolean)
{
    UNUSED;
    return value_bool(self.kind == VALUE_BOOL);
}
TEST(test_true)
{
    UNUSED;
    return value_bool(self.kind == VALUE_BOOL && self.boolean);
}
TEST(test_false)
{
    UNUSED;
    return value_bool(self.kind == VALUE_BOOL && !self.boolean);
}
TEST(test_integer)
{
    UNUSED;
    return value_bool(self.kind == VALUE_INT);
}
TEST(test_float)
{
    UNUSED;
    return value_bool(self.kind == VALUE_FLOAT);
}
TEST(test_string)
{
    UNUSED;
    return value_bool(self.kind == VALUE_STRING);
}
TEST(test_mapping)
{
    UNUSED;
    return value_bool(self.kind == VALUE_DICT);
}
TEST(test_escaped)
{
    UNUSED;
    return value_bool(self.kind == VALUE_STRING && self.string->markup);
}

TEST(test_number)
{
    UNUSED;
    return value_bool(self.kind == VALUE_BOOL || self.kind == VALUE_INT || self.kind == VALUE_FLOAT);
}

TEST(test_callable)
{
    UNUSED; // an undefined value has a method for being called, which fails
    return value_bool(self.kind == VALUE_MACRO || self.kind == VALUE_FUNCTION || self.kind == VALUE_METHOD ||
                      self.kind == VALUE_UNDEFINED);
}

TEST(test_iterable)
{
    UNUSED;
    return value_bool(self.kind == VALUE_UNDEFINED || self.kind == VALUE_STRING || self.kind == VALUE_DICT ||
                      self.kind == VALUE_LOOP || value_is_sequence(self));
}

TEST(test_sequence) // has a length and items
{
    UNUSED;
    return value_bool(self.kind == VALUE_UNDEFINED || self.kind == VALUE_STRING || self.kind == VALUE_DICT ||
                      self.kind == VALUE_LIST || self.kind == VALUE_TUPLE || self.kind == VALUE_RANGE);
}

TEST(test_sameas)
{
    UNUSED;
    if (self.kind != v[0].kind)
        return value_bool(false);
    if (self.kind == VALUE_NONE)
        return value_bool(true);
    if (self.kind == VALUE_BOOL || self.kind == VALUE_INT || self.kind == VALUE_FLOAT || self.kind == VALUE_STRING)
        return value_bool(value_equal(r, self, v[0]));
    return value_bool(self.sequence == v[0].sequence);
}

static struct value parity(struct run *r, struct value self, int wanted)
{
    struct value rest = eval_binary(r, TOKEN_MOD, self, value_int(2));
    return value_bool(value_equal(r, rest, value_int(wanted)));
}

TEST(test_odd)
{
    UNUSED;
    return parity(r, self, 1);
}
TEST(test_even)
{
    UNUSED;
    return parity(r, self, 0);
}

TEST(test_divisibleby)
{
    UNUSED;
    return value_bool(value_equal(r, eval_binary(r, TOKEN_MOD, self, v[0]), value_int(0)));
}

static struct value is_case(struct run *r, struct value self, const char *method)
{
    struct value text = value_string(value_str(r, self));
    struct args none = {0};
    return call_value(r, call_attribute(r, text, value_text(r, method).string), &none);
}

TEST(test_lower)
{
    UNUSED;
    return is_case(r, self, "islower");
}
TEST(test_upper)
{
    UNUSED;
    return is_case(r, self, "isupper");
}

TEST(test_eq)
{
    UNUSED;
    return value_bool(eval_compare(r, TOKEN_EQ, self, v[0]));
}
TEST(test_ne)
{
    UNUSED;
    return value_bool(eval_compare(r, TOKEN_NE, self, v[0]));
}
TEST(test_lt)
{
    UNUSED;
    return value_bool(eval_compare(r, TOKEN_LT, self, v[0]));
}
TEST(test_le)
{
    UNUSED;
    return value_bool(eval_compare(r, TOKEN_LE, self, v[0]));
}
TEST(test_gt)
{
    UNUSED;
    return value_bool(eval_compare(r, TOKEN_GT, self, v[0]));
}
TEST(test_ge)
{
    UNUSED;
    return value_bool(eval_compare(r, TOKEN_GE, self, v[0]));
}
TEST(test_in)
{
    UNUSED;
    return value_bool(value_contains(r, v[0], self));
}

static bool names_callable(struct run *r, struct value v, const struct callable *find(const char *name))
{
    const struct string *name = value_str(r, v);
    return v.kind == VALUE_STRING && call_named(name, find) != NULL;
}

TEST(test_filter)
{
    UNUSED;
    return value_bool(names_callable(r, self, template_filter));
}
TEST(test_test)
{
    UNUSED;
    return value_bool(names_callable(r, self, template_test));
}

const struct callable *template_test(const char *name)
{
    static const struct callable tests[] = {
        {"defined", test_defined, "", 0},    {"string", test_string, "", 0},
        {"none", test_none, "", 0},          {"mapping", test_mapping, "", 0},
        {"iterable", test_iterable, "", 0},  {"sequence", test_sequence, "", 0},
        {"false", test_false, "", 0},        {"undefined", test_undefined, "", 0},
        {"true", test_true, "", 0},          {"boolean", test_boolean, "", 0},
        {"number", test_number, "", 0},      {"integer", test_integer, "", 0},
        {"float", test_float, "", 0},        {"callable", test_callable, "", 0},
        {"escaped", test_escaped, "", 0},    {"odd", test_odd, "", 0},
        {"even", test_even, "", 0},          {"divisibleby", test_divisibleby, "num", 1},
        {"lower", test_lower, "", 0},        {"upper", test_upper, "", 0},
        {"sameas", test_sameas, "other", 1}, {"eq", test_eq, "other", 1},
        {"equalto", test_eq, "other", 1},    {"==", test_eq, "other", 1},
        {"ne", test_ne, "other", 1},         {"!=", test_ne, "other", 1},
        {"lt", test_lt, "other", 1},         {"<", test_lt, "other", 1},
        {"lessthan", test_lt, "other", 1},   {"le", test_le, "other", 1},
        {"<=", test_le, "other", 1},         {"gt", test_gt, "other", 1},
        {">", test_gt, "other", 1},          {"greaterthan", test_gt, "other", 1},
        {"ge", test_ge, "other", 1},         {">=", test_ge, "other", 1},
        {"in", test_in, "seq", 1},           {"filter", test_filter, "", 0},
        {"test", test_test, "", 0},          {NULL, NULL, NULL, 0},
    };
    return callable_find(tests, name);
}
