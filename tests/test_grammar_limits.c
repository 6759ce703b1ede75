// Grammars at their limits: deep nesting, long texts, hostile schemas.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/grammar_help.h"

#include <time.h>

static struct test_vocabulary vocabulary;

// Nothing is allowed that would be refused when it comes; what is left out was too much to look at.
static void check_subset(struct test_vocabulary *v, struct grammar_state *state, const uint32_t *mask)
{
    bool any = false;
    for (int64_t id = 0; id < v->count; id++) {
        any |= test_bit(mask, id);
        if (id != TEST_EOS && id != TEST_SPECIAL && test_bit(mask, id) &&
            !grammar_state_admits(state, v->tokens[id].bytes, v->tokens[id].count))
            fail_msg("token %d is allowed and will be refused", (int)id);
    }
    assert_true(any);
    test_positions++;
}

#define ONE_ITEM(items) "\"type\":\"array\",\"minItems\":1,\"maxItems\":1,\"items\":" items

static void test_depth(void **unused)
{
    (void)unused;
    uint32_t mask[TEST_WORDS];
    struct grammar *grammar = NULL;
    struct error err = {0};
    if (test_schema_grammar(&grammar, vocabulary.vocabulary, "json", &err))
        fail_msg("%s", err.msg);
    struct grammar_state *state = test_state(grammar);
    int depth = 0;
    for (; grammar_state_take(state, "[", 1); depth++) {
        grammar_state_fill(state, mask, TEST_WORDS);
        if (depth % 20 == 0 || depth > 180)
            test_check_mask(&vocabulary, state, mask);
    }
    assert_true(depth >= 190 && depth < 256);
    assert_true(grammar_state_take(state, "1", 1));
    for (; depth > 0; depth--) {
        grammar_state_fill(state, mask, TEST_WORDS);
        if (depth % 20 == 0 || depth > 180)
            test_check_mask(&vocabulary, state, mask);
        assert_true(grammar_state_take(state, "]", 1));
    }
    assert_true(grammar_state_complete(state));
    grammar_state_free(state);
    grammar_free(grammar);

    // Every second level alone can end, counted from the outermost one or from the next: at the limit there is still a way out.
    static const char *const outer[] = {"\"$ref\":\"#/$defs/n\"", ONE_ITEM("{\"$ref\":\"#/$defs/n\"}")};
    for (int i = 0; i < 2; i++) {
        static const char node[] = "\"$defs\":{\"n\":{" ONE_ITEM(
            "{" ONE_ITEM("{\"anyOf\":[{\"$ref\":\"#/$defs/n\"},{\"type\":\"null\"}]}") "}") "}}";
        char schema[1024];
        snprintf(schema, sizeof schema, "{%s,%s}", outer[i], node);
        if (test_schema_grammar(&grammar, vocabulary.vocabulary, schema, &err))
            fail_msg("%s", err.msg);
        state = test_state(grammar);
        for (int length = 0; !grammar_state_complete(state); length++) {
            static const char wanted[] = "[nul]";
            size_t next = 0;
            grammar_state_fill(state, mask, TEST_WORDS);
            if (length > 170)
                test_check_mask(&vocabulary, state, mask);
            while (wanted[next] && !test_bit(mask, wanted[next]))
                next++;
            if (!wanted[next])
                fail_msg("no way on behind %d bytes", length);
            grammar_state_advance(state, (uint32_t)wanted[next]);
        }
        grammar_state_free(state);
        grammar_free(grammar);
    }
}

// A long text: what a state remembers is forgotten on the way, and where it stands is not.
static void test_long(void **unused)
{
    (void)unused;
    enum { ITEMS = 1500 };
    struct grammar *grammar = NULL;
    struct error err = {0};
    if (test_schema_grammar(&grammar, vocabulary.vocabulary,
                            "{\"type\":\"array\",\"items\":{},\"minItems\":1500,\"maxItems\":1500}", &err))
        fail_msg("%s", err.msg);
    struct grammar_state *state = test_state(grammar);
    assert_true(grammar_state_take(state, "[", 1));
    for (int i = 0; i < ITEMS; i++) {
        char item[1024];
        bool object[150];
        int length = 0, levels = (int)(random_bits() % 150);
        for (int k = 0; k < levels; k++) {
            object[k] = random_bits() % 2;
            length += snprintf(item + length, sizeof item - (size_t)length, "%s", object[k] ? "{\"\":" : "[");
        }
        size_t half = (size_t)length;
        item[length++] = '1';
        while (levels > 0)
            item[length++] = object[--levels] ? '}' : ']';
        if (!grammar_state_take(state, item, half) || grammar_state_complete(state) ||
            !grammar_state_take(state, item + half, (size_t)length - half))
            fail_msg("item %d: %.*s", i, length, item);
        assert_int_equal(grammar_state_admits(state, "]", 1), i == ITEMS - 1);
        assert_false(grammar_state_complete(state));
        assert_int_equal(grammar_state_take(state, ",", 1), i < ITEMS - 1);
        assert_false(grammar_state_complete(state));
    }
    assert_true(grammar_state_take(state, "]", 1) && grammar_state_complete(state));
    grammar_state_free(state);
    grammar_free(grammar);
}

// A schema of n parts, by a pattern with %d for the part's index (up to three times).
static char *many(const char *head, const char *part, int count, const char *end)
{
    char *text = NULL;
    size_t bytes;
    FILE *out = open_memstream(&text, &bytes);
    fputs(head, out);
    for (int i = 0; i < count; i++) {
        fputs(i ? "," : "", out);
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
        fprintf(out, part, i, i, i);
#pragma GCC diagnostic pop
    }
    fputs(end, out);
    fclose(out);
    return text;
}

static double seconds(void)
{
    struct timespec time;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

#define TWICE(a, b) "\"" a "\":{\"anyOf\":[{\"$ref\":\"#/$defs/" b "\"},{\"$ref\":\"#/$defs/" b "\"}]},"

static void test_hostile(void **unused)
{
    (void)unused;
    static const struct {
        const char *head, *part;
        int count;
        const char *end;
        bool refused;
    } cases[] = {
        {"{\"enum\":[", "\"v%d %d %d\"", 4000, "]}", false},
        {"{\"enum\":[", "1%d", 60000, "]}", true},
        {"{\"type\":\"object\",\"properties\":{", "\"p%d\":{\"type\":\"integer\"}", 4000, "}}", false},
        {"{\"type\":\"object\",\"properties\":{", "\"p%d\":{\"type\":\"integer\",\"minimum\":%d}", 20000, "}}", true},
        {"{\"type\":\"object\",\"additionalProperties\":true,\"properties\":{", "\"p%d\":{}", 1000, "}}", false},
        // Each definition twice in the one before.
        {"{\"$ref\":\"#/$defs/a\",\"$defs\":{" TWICE("a", "b") TWICE("b", "c") TWICE("c", "d") TWICE("d", "e") TWICE(
             "e", "f") TWICE("f", "g") TWICE("g", "h") TWICE("h", "i") TWICE("i", "j") TWICE("j", "k") TWICE("k", "l")
             TWICE("l", "m") TWICE("m", "n") TWICE("n", "o") TWICE("o", "p") TWICE("p", "q") TWICE("q", "r"),
         "\"r\":{}", 1, "}}", true},
        {"{\"allOf\":[",
         "{\"anyOf\":[{\"properties\":{\"x%d\":{}}},{\"properties\":{\"y%d\":{}}},{\"properties\":{\"z%d\":{}}}]}", 30,
         "]}", true},
        {"{\"allOf\":[", "{\"minLength\":%d}", 100, "]}", true},
        // The same beginning for many alternatives, and again below it.
        {"{\"$defs\":{\"r\":{\"anyOf\":[{\"type\":\"null\"},",
         "{\"type\":\"array\",\"items\":{\"$ref\":\"#/$defs/r\"},\"maxItems\":1%d}", 40, "]}},\"$ref\":\"#/$defs/r\"}",
         false},
        {"{\"anyOf\":[", "{\"type\":\"string\",\"minLength\":%d,\"maxLength\":100%d}", 300, "]}", false},
        {"{\"anyOf\":[", "{\"pattern\":\"a%db.*c%d|[x-z]{%d}\"}", 100, "]}", false},
        {"{\"pattern\":\"", "(?:[a-z]{1,90}){1,9%d}{1}", 1, "\"}", true},
        {"{\"pattern\":\"^(?:a|b)*a(?:a|b){1%d}$\"", "", 0, "}", true},
        {"{\"pattern\":\"^(?:(?:(?:[a-z]{1,100}){1,100}){1,100}){1,100}$\"", "", 0, "}", true},
        {"{\"pattern\":\"^(?:.*a){30}$\"", "", 0, "}", false},
        {"{\"pattern\":\"^(?:a*)*(?:(?:b|)+c?)*$\"", "", 0, "}", false},
        // Nothing, very often: no node would ever be the last one.
        {"{\"pattern\":\"(((){10000}){10000}){10000}\"", "", 0, "}", false},
        {"{\"pattern\":\"^(((([]){0,10000}|){0,10000}){5,10000}){9,}a$\"", "", 0, "}", false},
        {"{\"pattern\":\"^(?:a(?:", "(?:b{0}|(?:){9})|%d{0}", 100, "){10000}){100}$\"}", true},
        {"{\"type\":\"object\",\"properties\":{",
         "\"p%d\":{\"pattern\":\"^(?:a(?:(|||||||||||||||||||||||||||||||){4}){9}){999}$\"}", 999, "}}", true},
        {"{\"type\":\"array\",\"minItems\":1000000,\"items\":{\"type\":\"array\",\"minItems\":999999}", "", 0, "}",
         false},
    };
    double slowest = 0;
    test_positions = 0;
    for (size_t i = 0; i < COUNT(cases); i++) {
        char *schema = many(cases[i].head, cases[i].part, cases[i].count, cases[i].end);
        struct grammar *grammar = NULL;
        struct error err = {0};
        double start = seconds();
        int rc = test_schema_grammar(&grammar, vocabulary.vocabulary, schema, &err);
        slowest = seconds() - start > slowest ? seconds() - start : slowest;
        if (rc && (!cases[i].refused || rc != ERR_USAGE))
            fail_msg("case %d: %s", (int)i, err.msg);
        if (!rc && cases[i].refused)
            fail_msg("case %d was not refused", (int)i);
        for (int walk = 0; walk < 3 && !rc; walk++) {
            char text[200];
            struct grammar_state *state = test_state(grammar);
            test_walk(&vocabulary, state, text, sizeof text, check_subset);
            grammar_state_free(state);
        }
        if (!rc)
            grammar_free(grammar);
        free(schema);
    }
    print_message("# slowest refusal or compilation: %.0f ms, %lld positions\n", slowest * 1e3,
                  (long long)test_positions);
    assert_true(slowest < 2); // sanitizers take their time
}

// No token goes on, and the text is not whole: nothing is allowed, so that it does not end as if it were. A token that was not allowed
// leaves the end.
static void test_dead_end(void **unused)
{
    (void)unused;
    static const struct vocabulary_token tokens[] = {
        {"n", 1, false}, {"l", 1, false}, {"nul", 3, false}, {"</s>", 4, true}};
    const uint32_t eos = 3;
    static const struct {
        uint32_t taken[2];
        int count;
        uint32_t mask;
    } cases[] = {{{0}, 0, 1 | 4}, {{0}, 1, 0}, {{2}, 1, 2}, {{2, 1}, 2, 8}, {{1}, 1, 8}, {{0, 1}, 2, 8}};
    struct vocabulary *few = NULL;
    struct grammar *grammar = NULL;
    struct error err = {0};
    if (vocabulary_create_from(&few, tokens, COUNT(tokens), &eos, 1, &err) ||
        test_schema_grammar(&grammar, few, "{\"type\":\"null\"}", &err))
        fail_msg("%s", err.msg);
    for (size_t i = 0; i < COUNT(cases); i++) {
        struct grammar_state *state = test_state(grammar);
        uint32_t mask = UINT32_MAX;
        for (int k = 0; k < cases[i].count; k++)
            grammar_state_advance(state, cases[i].taken[k]);
        grammar_state_fill(state, &mask, 1);
        assert_int_equal(mask, cases[i].mask);
        grammar_state_free(state);
    }
    grammar_free(grammar);
    vocabulary_free(few);
}

int main(void)
{
    test_vocabulary_open(&vocabulary, 600);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_dead_end),
        cmocka_unit_test(test_depth),
        cmocka_unit_test(test_long),
        cmocka_unit_test(test_hostile),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    test_vocabulary_close(&vocabulary);
    return failed;
}
