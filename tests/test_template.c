// The template interpreter: byte-equal to Jinja2 (golden rows), marks, limits, and what is refused by name.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "formats/template.h"
#include "tests/device/quick.h"

#define GOLDEN "tests/golden/templates/"
#define COUNT(array) (sizeof(array) / sizeof *(array))

static json_t *load(const char *path)
{
    json_error_t error;
    json_t *json = json_load_file(path, JSON_ALLOW_NUL, &error);
    if (!json)
        fail_msg("%s: %s", path, error.text);
    return json;
}

// Renders a template with the members of variables (may be NULL), all from the user.
static int render_with(const char *text, size_t bytes, const json_t *variables, const struct template_limits *limits,
                       struct template_output *out, struct error *err)
{
    struct template *tmpl;
    struct template_variable list[64];
    size_t count = 0;
    const char *key;
    json_t *value, *members = (json_t *)variables;
    *out = (struct template_output){0};
    *err = (struct error){0};
    int rc = template_compile(&tmpl, text, bytes, "test", err);
    if (rc)
        return rc;
    json_object_foreach(members, key, value) list[count++] = (struct template_variable){key, value, TEMPLATE_FROM_USER};
    rc = template_render(out, tmpl, list, count, limits, 1700000000, err);
    template_free(tmpl);
    return rc;
}

static void check_segments(const struct template_output *out)
{
    size_t at = 0;
    for (size_t i = 0; i < out->num_segments; i++) {
        assert_int_equal(out->segments[i].begin, at);
        assert_true(out->segments[i].end > at);
        assert_true(i == 0 || out->segments[i].from_user != out->segments[i - 1].from_user);
        at = out->segments[i].end;
    }
    assert_int_equal(at, out->bytes);
    assert_int_equal(out->text[out->bytes], 0);
}

static void test_features(void **state)
{
    (void)state;
    json_t *golden = load(GOLDEN "features.json"), *row;
    const json_t *variables = json_object_get(golden, "variables");
    size_t i, wrong = 0;
    json_array_foreach(json_object_get(golden, "rows"), i, row)
    {
        struct template_output out;
        struct error err;
        const json_t *text = json_array_get(row, 0), *wanted = json_array_get(row, 1), *raised = json_array_get(row, 2);
        int rc = render_with(json_string_value(text), json_string_length(text), variables, NULL, &out, &err);
        bool same = json_is_null(wanted) ? rc != 0 && (!raised || !strcmp(err.msg, json_string_value(raised)))
                                         : rc == 0 && out.bytes == json_string_length(wanted) &&
                                               !memcmp(out.text, json_string_value(wanted), out.bytes);
        if (!same) {
            print_error("%s\n  wanted: %s\n  found:  %s\n", json_string_value(text),
                        json_is_null(wanted) ? "an error" : json_string_value(wanted), rc ? err.msg : out.text);
            wrong++;
        }
        if (!rc)
            check_segments(&out);
        template_output_clear(&out);
    }
    assert_true(i >= 250);
    assert_int_equal(wrong, 0);
    json_decref(golden);
}

// ---- marks: what came from the user stands between ( and ) below; the values hold no parentheses

static void test_marks(void **state)
{
    (void)state;
    static const struct {
        const char *text, *wanted;
    } cases[] = {
        {"a{{ s }}b", "a(User)b"},
        {"{{ '<' + s + '>' }}", "<(User)>"},
        {"{{ s ~ '|' ~ s }}", "(User)|(User)"},
        {"{{ s[1:3] }}{{ ('x' ~ s)[:2] }}{{ ('x' ~ s ~ 'y')[::-1] }}", "(se)x(U)y(resU)x"},
        {"{{ s[0] }}{{ s|first }}{{ s|last }}{{ s|reverse }}", "(UUrresU)"},
        {"{{ (' ' ~ s ~ ' ')|trim }}|{{ sp.strip() }}|{{ s.strip('U') }}", "(User)|(a b)|(ser)"},
        {"{{ s.upper() }}{{ ('a' ~ s)|upper }}{{ s|lower }}{{ ('a ' ~ s)|title }}{{ s.swapcase() }}",
         "(USER)A(USERuser)A (UseruSER)"},
        {"{{ s.replace('s', '-') }}|{{ 'a-b'.replace('-', s) }}|{{ s.replace('', '.') }}",
         "(U)-(er)|a(User)b|.(U).(s).(e).(r)."},
        {"{{ 'x y'.split(' ')|join(s) }}|{{ sp.split()|join('-') }}|{{ [s, 'a']|join(',') }}",
         "x(User)y|(a)-(b)|(User),a"},
        {"{{ (s ~ '=v').partition('=')[0] }}{{ (s ~ '=v').partition('=')[1:]|join }}", "(User)=v"},
        {"{{ [s, 'a']|tojson }}|{{ q|tojson }}|{{ {'k': s}|tojson }}",
         "[\"(User)\", \"a\"]|\"(a\\\"b\\n)\"|{\"k\": \"(User)\"}"},
        {"{{ d|tojson(indent=1) }}", "{\n \"(key)\": \"(val)\"\n}"},
        {"{{ d }}{{ [q] }}{{ d.items()|list }}", "{'(key)': '(val)'}['(a\"b\\n)'][('(key)', '(val)')]"},
        {"{% for k, v in d.items() %}{{ k }}:{{ v }}{% endfor %}{% for c in s %}{{ c }}.{% endfor %}",
         "(key):(valU).(s).(e).(r)."},
        {"{{ '%s|%6s|%.2s|%r' % (s, s, s, s) }}", "(User)|  (User)|(Us)|'(User)'"},
        {"{{ '{}|{:>6}|{!r}|{x}'.format(s, s, s, x=s) }}", "(User)|  (User)|'(User)'|(User)"},
        // What a user's format adds is the user's: fills, signs, separators.
        {"{{ fill.format('', 1000) }}|{{ '{:{}}'.format('', width) }}|{{ '{:{}}{:+}'.format('', '-<2', 1) }}",
         "(<|>+1,000)|(xx)|--+1"},
        {"{{ plus % 5 }}|{{ ('%' ~ digit) % 5 }}|{{ '%+d%%' % 5 }}", "(+5%)|( 5)|+5%"},
        {"{{ (s ~ '%s') % 'a' }}{{ (s ~ '{}').format('b') }}", "(User)a(User)b"},
        {"{% set x %}[{{ s }}]{% endset %}{{ x }}{% filter upper %}a{{ s }}{% endfilter %}", "[(User)]A(USER)"},
        {"{% macro f(a) %}<{{ a }}>{% endmacro %}{{ f(s) }}{{ f(s)|length }}", "<(User)>6"},
        {"{% set ns = namespace(t='') %}{% for c in 'ab' %}{% set ns.t = ns.t ~ c ~ s %}{% endfor %}{{ ns.t }}",
         "a(User)b(User)"},
        {"{{ s * 2 }}{{ ('-' ~ s) * 2 }}{{ '=' * 3 }}", "(UserUser)-(User)-(User)==="},
        {"{{ l|indent(2) }}|{{ s|truncate(3, true, '..', 0) }}|{{ s|center(8) }}|{{ s.zfill(6) }}",
         "(one)\n  (two)|(U)..|  (User)  |00(User)"},
        {"{{ s|e }}{{ '<'|e }}{{ lt|e }}{{ (lt|safe) + '<' }}", "(User)&lt;(&lt;<)&lt;"},
        {"{{ s|string }}{{ [s]|first }}{{ missing|default(s) }}{{ s if s == 'User' else 'b' }}{{ d[('key')] }}",
         "(UserUserUserUserval)"},
        {"{{ n }}{{ n ~ '' }}{{ n|string }}{{ s|length }}{{ s == 'User' }}", "5554True"},
        {"{{ words|sort|join(' ') }}|{{ words|map('upper')|join }}|{{ words|unique|join }}", "(a) (b)|(BA)|(ba)"},
        {"{{ strftime_now(when) }}|{{ strftime_now('%Y') }}|{{ strftime_now('%Y' ~ when) }}", "(2023)|2023|(20232023)"},
        {"{{ s.splitlines()|join }}{{ s.removeprefix('U') }}{{ s.rsplit('s', 1)|join }}{{ '\n'.join(words) }}",
         "(UserserUerb)\n(a)"},
    };
    json_t *variables =
        json_pack("{s:s, s:s, s:s, s:s, s:s, s:{s:s}, s:i, s:[s, s], s:s, s:s, s:s, s:s, s:s}", "s", "User", "sp",
                  " a b ", "q", "a\"b\n", "l", "one\ntwo", "lt", "<", "d", "key", "val", "n", 5, "words", "b", "a",
                  "fill", "{0:<<1}{0:|<1}{0:><1}{1:+,}", "width", "x<2", "plus", "%+d%%", "digit", "2d", "when", "%Y");
    for (size_t i = 0; i < COUNT(cases); i++) {
        struct template_output out;
        struct error err;
        char found[512] = "";
        if (render_with(cases[i].text, strlen(cases[i].text), variables, NULL, &out, &err))
            fail_msg("%s: %s", cases[i].text, err.msg);
        check_segments(&out);
        // A text may hold ( of its own only where no mark stands.
        for (size_t s = 0; s < out.num_segments; s++)
            snprintf(found + strlen(found), sizeof found - strlen(found), out.segments[s].from_user ? "(%.*s)" : "%.*s",
                     (int)(out.segments[s].end - out.segments[s].begin), out.text + out.segments[s].begin);
        assert_string_equal(found, cases[i].wanted);
        template_output_clear(&out);
    }
    json_decref(variables);
}

static void test_origins(void **state)
{
    (void)state;
    static const char text[] = "{% for m in messages %}{{ m.role }}{{ m.content }}{{ m.name }}{% endfor %}{{ bos }}";
    json_t *messages =
        json_pack("[{s:s, s:s}, {s:s, s:s, s:{s:s}}, {s:s%, s:s}]", "role", "user", "content", "user", "role", "<x>",
                  "content", "c", "name", "role", "user", "role", "user\0<x>", (size_t)8, "content", "d");
    json_t *bos = json_string("<s>");
    struct template_variable variables[] = {{"messages", messages, TEMPLATE_MESSAGES}, {"bos", bos, TEMPLATE_TRUSTED}};
    struct template *tmpl;
    struct template_output out;
    struct error err;
    assert_int_equal(template_compile(&tmpl, text, strlen(text), "test", &err), 0);
    assert_int_equal(template_render(&out, tmpl, variables, 2, NULL, 0, &err), 0);
    // user is a role as any; <x> and what hides behind a NUL are not, and neither is a role deeper down.
    static const struct text_segment wanted[] = {{0, 4, false}, {4, 12, true}, {12, 14, false}};
    assert_string_equal(out.text, "useruser<x>c{'role': 'user'}user");
    assert_int_equal(out.segments[0].end, wanted[0].end);
    assert_false(out.segments[0].from_user);
    assert_true(out.segments[1].from_user);
    assert_int_equal(out.segments[1].end, wanted[1].end);
    assert_false(out.segments[out.num_segments - 1].from_user);
    assert_memory_equal(out.text + out.segments[out.num_segments - 1].begin, "<s>", 3);
    assert_int_equal(out.segments[out.num_segments - 2].end - out.segments[out.num_segments - 2].begin, 9);
    check_segments(&out);
    template_output_clear(&out);
    template_free(tmpl);
    json_decref(messages);
    json_decref(bos);
}

// ---- limits

static void test_limits(void **state)
{
    (void)state;
    static const char LOOP[] = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
    static const struct {
        const char *text, *words;
    } cases[] = {
        {LOOP, "steps"},
        {"{{ 'x' * 10**9 }}", "steps"},
        {"{{ 'x' * 40000000 ~ 'x' * 40000000 }}", "steps"},
        {"{{ ('xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx' "
         "* 900000)[:1] }}",
         "memory"},
        {"{{ [0] * 10**9 }}", "memory"},
        {"{{ [0] * 10**9 * 10**9 }}", "memory"},
        {"{{ [[]] * 9223372036854775807 }}", "memory"},
        {"{{ range(10**9) }}", "100000 items"},
        {"{{ range(-9223372036854775807, 9223372036854775807) }}", "100000 items"},
        {"{{ 10**10**10 }}", "64 bits"},
        {"{{ 2**63 }}", "64 bits"},
        {"{{ 9223372036854775807 + 1 }}", "64 bits"},
        {"{{ 9223372036854775807 * 2 }}{{ 1 }}", "64 bits"},
        {"{{ -9223372036854775807 - 2 }}", "64 bits"},
        {"{{ (-9223372036854775807 - 1) // -1 }}", "64 bits"},
        {"{{ -(-9223372036854775807 - 1) }}", "64 bits"},
        {"{{ (-9223372036854775807 - 1)|abs }}", "64 bits"},
        {"{{ 9223372036854775808 }}", "64 bits"},
        {"{{ [1]|tojson(indent=1000000000) }}", "too much"},
        {"{{ [1]|tojson(indent=100000000) }}", "steps"},
        {"{{ 'a'.center(10**12) }}", "steps"},
        {"{{ 'a'.zfill(10**9) }}", "steps"},
        {"{{ '%999999999d' % 1 }}", "width"},
        {"{{ '%*d' % (2000000, 1) }}", "width"},
        {"{{ '{:999999999}'.format(1) }}", "width"},
        {"{{ '%*d' % (-9223372036854775807 - 1, 1) }}", "width"},
        {"{{ range(9, 0, -1)[::-9223372036854775807] }}", "64 bits"},
        {"{{ range(0, 9, 5)[::9223372036854775807] }}", "64 bits"},
        {"{{ '{:.999}'.format(1.5) }}", "precision"},
        {"{{ 'a'|indent(10**9) }}", "steps"},
        {"{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "deep"},
        {"{% macro f(n) %}{{ g(n) }}{% endmacro %}{% macro g(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
         "deep"},
        {"{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
         "memory"},
        {"{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}", "memory"},
        {"{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x == "
         "[ns.x[0], ns.x[1]] and ns.x|string }}",
         "steps"},
        {"{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% set ns.y = "
         "[ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}",
         "steps"},
        {"{% set ns = namespace(x=[1]) %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ "
         "ns.x|tojson }}",
         "steps"},
        {"{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}", "deep"},
        {"{% set ns = namespace(x=[]) %}{% for i in range(2000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}",
         "deep"},
        {"{% set ns = namespace(x=[], y=[]) %}{% for i in range(2000) %}{% set ns.x = [ns.x] %}{% set ns.y = [ns.y] "
         "%}{% endfor %}{{ ns.x == ns.y }}",
         "deep"},
        {"{% set ns = namespace(x=()) %}{% for i in range(2000) %}{% set ns.x = (ns.x,) %}{% endfor %}{{ {ns.x: 1} }}",
         "deep"},
        {"{% for i in range(100000) %}{% for j in range(9) %}{{ "
         "'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx' }}{% endfor %}{% "
         "endfor %}",
         "steps"},
        {"{% set s = 'x' * 1000000 %}{% for i in range(100) %}{{ s }}{% endfor %}", "writes more than"},
        {"{% set s = 'ab' * 100000 %}{% for i in range(100000) %}{% if 'ba' * 9000 ~ 'c' in s %}{% endif %}{% endfor "
         "%}",
         ""},
        {"{{ strftime_now('%' ~ 'c' * 9000) }}", "format"},
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        struct template_output out;
        struct error err;
        int rc = render_with(cases[i].text, strlen(cases[i].text), NULL, NULL, &out, &err);
        if (!rc || !strstr(err.msg, cases[i].words))
            fail_msg("%s\n  wanted an error with \"%s\", found %s", cases[i].text, cases[i].words,
                     rc ? err.msg : "none");
        assert_true(rc == ERR_USAGE || rc == ERR_MODEL);
    }
    const struct template_limits small = {.steps = 100, .memory_bytes = 20000, .output_bytes = 10};
    struct template_output out;
    struct error err;
    assert_int_equal(render_with("{{ 'x' * 10 }}", 14, NULL, &small, &out, &err), 0);
    template_output_clear(&out);
    assert_int_equal(render_with("{{ 'x' * 11 }}", 14, NULL, &small, &out, &err), ERR_USAGE);
    assert_non_null(strstr(err.msg, "more than 10 bytes"));
    assert_int_equal(render_with("{{ ('x' * 30000)|length }}", 26, NULL, &small, &out, &err), ERR_USAGE);
}

static json_t *filled(const char *begin, char fill, size_t count, const char *end)
{
    char *text = malloc(count + 16);
    size_t before = (size_t)(stpcpy(text, begin) - text);
    memset(text + before, fill, count);
    strcpy(text + before + count, end);
    json_t *json = json_string(text);
    free(text);
    return json;
}

// What takes long counts as many steps: each of these ends soon.
static void test_charges(void **state)
{
    (void)state;
    static const char *const work[] = {
        "i", // costs little: the rest of the template is within the limit
        "r|sum",
        "r|min",
        "r|max",
        "r|map('abs')|first",
        "r|select('string')|first",
        "r|map(attribute='x')|first",
        "r.count(-1)",
        "r.index(99999)",
        "'x' in r",
        "a == b",
        "a <= b",
        "w[900000]",
        "w[900000:900001]",
        "w.find('x', 900000)",
        "w.find('x')",
        "w.find('z')",
        "w.rfind('z')",
        "w.count('')",
        "w.startswith('x', 900000)",
        "'%.900000s' % w == w",
        "t.startswith(t2)",
        "t.endswith(t2)",
        "t == t2",
        "t <= t2",
        "t.rfind(first)",
        "t.rfind(middle)",
        "t.rfind(last)",
        "t|wordcount",
        "t.isalpha()",
        "t.islower()",
        "t.istitle()",
        "blank.strip()",
        "blank.split()",
        "blank|int",
        "blank|float",
        "w|truncate(900000)",
    };
    const struct template_limits limits = {.steps = 16000, .memory_bytes = 1 << 30};
    json_t *variables = json_object(), *middle = filled("", 'a', 15000, "b");
    char *wide = malloc(2000001), *needle = malloc(40000);
    for (size_t i = 0; i < 1000000; i++)
        memcpy(wide + 2 * i, "\xC3\xA9", 3);
    memcpy(wide + 1999998, "x", 2);
    size_t half = json_string_length(middle);
    memcpy(needle, json_string_value(middle), half);
    memcpy(needle + half, json_string_value(middle), half - 1);
    needle[2 * half - 1] = 0;
    json_object_set_new(variables, "w", json_string(wide));
    json_object_set_new(variables, "middle", json_string(needle)); // aa..b..aa
    json_object_set_new(variables, "t", filled("", 'a', 1000000, ""));
    json_object_set_new(variables, "t2", filled("", 'a', 1000000, ""));
    json_object_set_new(variables, "blank", filled("", ' ', 1000000, ""));
    json_object_set_new(variables, "first", filled("b", 'a', 30000, ""));
    json_object_set_new(variables, "last", filled("", 'a', 30000, "b"));
    json_decref(middle);
    free(wide);
    free(needle);
    for (size_t i = 0; i < COUNT(work); i += quick() ? 4 : 1) {
        char text[512];
        struct template_output out;
        struct error err;
        snprintf(text, sizeof text,
                 "{%% set r = range(100000) %%}{%% set a = [0] * 100000 %%}{%% set b = [0] * 100000 %%}"
                 "{%% for i in range(200) %%}{%% if %s %%}{%% endif %%}{%% endfor %%}",
                 work[i]);
        int rc = render_with(text, strlen(text), variables, &limits, &out, &err);
        if (i == 0 ? rc : rc != ERR_USAGE || !strstr(err.msg, "takes more than 16000 steps"))
            fail_msg("%s\n  found %s", work[i], rc ? err.msg : "no error");
        template_output_clear(&out);
    }
    json_decref(variables);
    // Names are looked for among all of them.
    char *names = malloc(40000 * 24), *at = names;
    struct template_output out;
    struct error err;
    for (int i = 0; i < 40000; i++)
        at += sprintf(at, "{%% set a%d = 1 %%}", i);
    assert_int_equal(render_with(names, (size_t)(at - names), NULL, NULL, &out, &err), ERR_MODEL);
    assert_non_null(strstr(err.msg, "steps"));
    free(names);
}

// The reverse: each byte of a long text counts once, however often something is found in it.
static void test_honest_work(void **state)
{
    (void)state;
    static const struct {
        const char *text, *wanted;
    } cases[] = {
        {"{{ s.replace('\n', '|')|length }}", "480000"}, {"{{ s.split('\n')|length }}", "12001"},
        {"{{ s.rsplit('\n')|length }}", "12001"},        {"{{ s.count('\n') }}", "12000"},
        {"{{ s.splitlines()|length }}", "12000"},        {"{{ s.strip()|length }}", "479999"},
        {"{% if '</think>' in s %}{% endif %}a", "a"},   {"{{ s.rpartition('\n')[0]|length }}", "479999"},
    };
    char *text = malloc(480000);
    for (size_t i = 0; i < 480000; i++)
        text[i] = i % 40 == 39 ? '\n' : 'a';
    json_t *variables = json_pack("{s:s#}", "s", text, (size_t)480000);
    const struct template_limits limits = {.steps = 30000};
    free(text);
    for (size_t i = 0; i < COUNT(cases); i++) {
        struct template_output out;
        struct error err;
        if (render_with(cases[i].text, strlen(cases[i].text), variables, &limits, &out, &err))
            fail_msg("%s: %s", cases[i].text, err.msg);
        assert_string_equal(out.text, cases[i].wanted);
        template_output_clear(&out);
    }
    json_decref(variables);
}

// A text of `count` times part, between begin and end.
static char *repeated(const char *begin, const char *part, size_t count, const char *end)
{
    char *text = malloc(strlen(begin) + strlen(part) * count + strlen(end) + 1), *at = stpcpy(text, begin);
    while (count--)
        at = stpcpy(at, part);
    strcpy(at, end);
    return text;
}

static void check_limit(const char *text, json_t *variables, size_t depth, const char *words)
{
    struct template_output out;
    struct error err;
    int rc = render_with(text, strlen(text), variables, NULL, &out, &err);
    if (depth <= 64 ? rc != 0 : rc == 0 || !strstr(err.msg, words))
        fail_msg("%zu deep: %s", depth, rc ? err.msg : text);
    template_output_clear(&out);
    json_decref(variables);
}

// 64 deep is accepted, 65 is not.
static void test_nesting_limits(void **state)
{
    (void)state;
    static const char calls[] = "{% macro f(n) %}{% if n > 1 %}{{ g(n - 1) }}{% endif %}{% endmacro %}"
                                "{% macro g(n) %}{% if n > 1 %}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(n) }}";
    json_t *deep = json_integer(1);
    for (size_t depth = 1; depth <= 66; depth++) {
        char *begin = repeated("", "{% macro f() %}", depth, ""),
             *blocks = repeated(begin, "{% endmacro %}", depth, "");
        deep = json_pack("[o]", deep);
        check_limit(calls, json_pack("{s:I}", "n", (json_int_t)depth), depth,
                    "macros call each other more than 64 deep");
        check_limit(blocks, NULL, depth, "blocks or expressions are nested more than 64 deep");
        check_limit("{{ x }}", json_pack("{s:O}", "x", deep), depth, "the request is nested more than 64 deep");
        free(begin);
        free(blocks);
    }
    json_decref(deep);
}

static void test_nesting(void **state)
{
    (void)state;
    static const struct {
        const char *begin, *part, *end;
    } cases[] = {
        {"{{ ", "(", ""},
        {"{{ ", "[", ""},
        {"{{ ", "{1:", ""},
        {"{{ ", "-", "1 }}"},
        {"{{ ", "not ", "1 }}"},
        {"{{ a", "[a", " }}"},
        {"{{ a", "(a", " }}"},
        {"{{ 1", "+1", " }}"},
        {"{{ a", ".b", " }}"},
        {"{{ a", "|trim", " }}"},
        {"{{ a", " or a", " }}"},
        {"{{ 1", " if 1 else 1", " }}"},
        {"", "{% if a %}", ""},
        {"", "{% for a in b %}", ""},
        {"{{ 1 is eq", " 1 is eq", " 1 }}"},
        {"{{ a", "()", " }}"},
        {"{{ 1", "**1", " }}"},
        {"{{ a", " is a", " }}"},
        {"", "{% macro f() %}", ""},
        {"{{ a", "[1:a", " }}"},
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        struct template_output out;
        struct error err;
        char *text = repeated(cases[i].begin, cases[i].part, 100000, cases[i].end);
        assert_int_equal(render_with(text, strlen(text), NULL, NULL, &out, &err), ERR_MODEL);
        free(text);
    }
    json_t *deep = json_array(); // a request may be deep too
    for (int i = 0; i < 1000; i++) {
        json_t *outer = json_array();
        json_array_append_new(outer, deep);
        deep = outer;
    }
    json_t *variables = json_pack("{s:o}", "x", deep);
    struct template_output out;
    struct error err;
    assert_int_equal(render_with("{{ x }}", 7, variables, NULL, &out, &err), ERR_USAGE);
    assert_non_null(strstr(err.msg, "nested more than 64"));
    json_decref(variables);
}

// ---- messages

static void test_messages(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        int code;
        const char *message;
    } cases[] = {
        {"{{ raise_exception('only this') }}", ERR_USAGE, "only this"},
        {"a\n{{ x.y }}", ERR_USAGE, "test, line 2: 'x' is undefined"},
        {"{{ {'a': 1}.b.c }}", ERR_USAGE, "test, line 1: 'dict object' has no attribute 'b'"},
        {"{{ [][0].c }}", ERR_USAGE, "test, line 1: list object has no element 0"},
        {"{{ none.a.b }}", ERR_USAGE, "test, line 1: 'None' has no attribute 'a'"},
        {"{{ [].append(1) }}", ERR_USAGE, "test, line 1: access to attribute 'append' of 'list' object is unsafe"},
        {"\n\n{{ f(1) }}", ERR_USAGE, "test, line 3: 'f' is undefined"},
        {"{{ 'a'.encode() }}", ERR_USAGE, "test, line 1: the method 'encode' is not supported in chat templates"},
        {"{{ cycler(1) }}", ERR_USAGE, "test, line 1: the function 'cycler' is not supported in chat templates"},
        {"\n{{ 1|nope }}", ERR_MODEL, "test, line 2: there is no filter named 'nope'"},
        {"{% if 0 %}{{ 1|xmlattr }}{% endif %}", ERR_MODEL, "test, line 1: there is no filter named 'xmlattr'"},
        {"{{ [1]|map('a' * 70)|list }}", ERR_USAGE,
         "test, line 1: there is no filter named "
         "'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa'"},
        {"{{ 1 is nope }}", ERR_MODEL, "test, line 1: there is no test named 'nope'"},
        {"{% nope %}", ERR_MODEL, "test, line 1: unknown tag 'nope'"},
        {"\n{% include 'a' %}", ERR_MODEL, "test, line 2: the tag 'include' is not supported in chat templates"},
        {"{% call f() %}{% endcall %}", ERR_MODEL, "test, line 1: the tag 'call' is not supported in chat templates"},
        {"{% for a in b recursive %}", ERR_MODEL, "test, line 1: recursive loops are not supported"},
        {"{% if 1 %}\n", ERR_MODEL, "test, line 1: the template ends where {% elif %} is missing"},
        {"{{ 'a }}", ERR_MODEL, "test, line 1: a string has no end"},
        {"x\n{# a", ERR_MODEL, "test, line 2: a comment has no end '#}'"},
        {"{{ a", ERR_MODEL, "test, line 1: the tag that begins here has no end '}}'"},
        {"{{ (1] }}", ERR_MODEL, "test, line 1: unexpected ']', expected ')'"},
        {"\xff", ERR_MODEL, "test: the template is not valid UTF-8"},
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        struct template_output out;
        struct error err;
        int rc = render_with(cases[i].text, strlen(cases[i].text), NULL, NULL, &out, &err);
        assert_int_equal(rc, cases[i].code);
        assert_int_equal(err.code, cases[i].code);
        assert_string_equal(err.msg, cases[i].message);
    }
}

// __class__ and its like are hidden as attributes, even where a dict has such a key; as items they are like others.
static void test_internal_names(void **state)
{
    (void)state;
    static const struct {
        const char *text, *wanted;
    } cases[] = {
        {"{{ {'__class__': 'x'}.__class__ }}|{{ {'__class__': 'x'}['__class__'] }}", "|x"},
        {"{{ {'__init__': 'x'}.__init__ is defined }}|{{ 'a'.__class__ is defined }}", "False|False"},
        {"{{ {'_a_': 'x'}._a_ }}|{{ {'__a': 'x'}.__a }}|{{ {'a__': 'x'}.a__ }}", "x|x|x"},
    };
    struct template_output out;
    struct error err;
    for (size_t i = 0; i < COUNT(cases); i++) {
        if (render_with(cases[i].text, strlen(cases[i].text), NULL, NULL, &out, &err))
            fail_msg("%s: %s", cases[i].text, err.msg);
        assert_string_equal(out.text, cases[i].wanted);
        template_output_clear(&out);
    }
    static const char call[] = "{{ [].__len__() }}";
    assert_int_equal(render_with(call, strlen(call), NULL, NULL, &out, &err), ERR_USAGE);
    assert_string_equal(err.msg, "test, line 1: access to attribute '__len__' of 'list' object is unsafe");
}

static void test_time(void **state)
{
    (void)state;
    static const char text[] = "{{ strftime_now('%d %b %Y %H:%M') }}{{ strftime_now('%') }}";
    struct template_output out;
    struct error err;
    setenv("TZ", "UTC", 1);
    assert_int_equal(render_with(text, strlen(text), NULL, NULL, &out, &err), 0);
    assert_string_equal(out.text, "14 Nov 2023 22:13%");
    template_output_clear(&out);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_features),       cmocka_unit_test(test_marks),          cmocka_unit_test(test_origins),
        cmocka_unit_test(test_limits),         cmocka_unit_test(test_nesting),        cmocka_unit_test(test_messages),
        cmocka_unit_test(test_nesting_limits), cmocka_unit_test(test_internal_names), cmocka_unit_test(test_time),
        cmocka_unit_test(test_charges),        cmocka_unit_test(test_honest_work),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
