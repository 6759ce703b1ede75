// The option table: precedence, bounds, messages, exit status.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "formats/options.h"

#include <stdlib.h>
#include <string.h>

static struct {
    bool flag, json;
    int64_t count;
    double share;
    uint64_t memory;
    const char *kind, *text;
    struct option_list list, other_list;
    int ran, arguments, refused;
    char why[256];
} got;

static void refused(const struct command_spec *command, const struct error *why)
{
    got.refused++;
    snprintf(got.why, sizeof got.why, "%s: %.200s", command->name, why->msg);
}

static int run(int argc, char **argv, struct error *err)
{
    got.ran++;
    got.arguments = argc;
    if (argc > 0 && strcmp(argv[0], "corrupt") == 0)
        return error_set(err, ERR_CORRUPT, "the file is corrupt");
    return 0;
}

static const struct option_spec own[] = {
    {"flag", OPTION_FLAG, &got.flag, NULL, 0, 0, "a switch"},
    {"count", OPTION_INT, &got.count, "N", 1, 64, "a number"},
    {"share", OPTION_NUMBER, &got.share, "P", 0, 1, "a fraction"},
    {"gpu-memory", OPTION_BYTES, &got.memory, "SIZE", 0, 0, "a size"},
    {"kind", OPTION_CHOICE, &got.kind, "none|int8|int4", 0, 0, "a word"},
    {"text", OPTION_TEXT, &got.text, "TEXT", 0, 0, "any text"},
    {"stop", OPTION_LIST, &got.list, "TEXT", 0, 0, "repeatable"},
    {"start", OPTION_LIST, &got.other_list, "TEXT", 0, 0, "repeatable as well"},
    {NULL, OPTION_FLAG, NULL, NULL, 0, 0, NULL},
};
static const struct option_spec common[] = {{"json", OPTION_FLAG, &got.json, NULL, 0, 0, "report"},
                                            {NULL, OPTION_FLAG, NULL, NULL, 0, 0, NULL}};
static const struct command_spec commands[] = {{"convert", "in out", 1, 2, "converts", own, run},
                                               {"inspect", "dir", 1, 1, "shows", NULL, run},
                                               {NULL, NULL, 0, 0, NULL, NULL, NULL}};
static const struct program_spec program = {"tool", "a tool", "1",        "TOOL_", commands,
                                            true,   common,   "examples", "exit",  refused};

// Words separated by blanks; the exit status.
static int call(const char *line)
{
    static char copy[256]; // the values point into it
    char *argv[24], *rest = copy;
    int argc = 0;
    memset(&got, 0, sizeof got);
    got.count = 7;
    snprintf(copy, sizeof copy, "%s", line);
    for (char *word; (word = strsep(&rest, " "));)
        argv[argc++] = word;
    argv[argc] = NULL;
    return options_main(&program, argc, argv);
}

static void test_status(void **state)
{
    (void)state;
    static const struct {
        const char *line;
        int status, ran;
    } cases[] = {
        {"tool convert a b", 0, 1},
        {"tool a b", 0, 1}, // the default command
        {"tool convert", 2, 0},
        {"tool convert a b c", 2, 0},
        {"tool", 2, 0},
        {"tool --help", 0, 0},
        {"tool convert --help", 0, 0},
        {"tool --version", 0, 0},
        {"tool --help-man", 0, 0},
        {"tool --help-completion-bash", 0, 0},
        {"tool convert a --nonsense", 2, 0},
        {"tool convert a -x", 2, 0},
        {"tool convert a --count", 2, 0},
        {"tool convert a --count 0", 2, 0},
        {"tool convert a --count 65", 2, 0},
        {"tool convert a --count 1x", 2, 0},
        {"tool convert a --count 99999999999999999999", 2, 0},
        {"tool convert a --count=64", 0, 1},
        {"tool convert a --share nan", 2, 0},
        {"tool convert a --share 1.5", 2, 0},
        {"tool convert a --share 0.5", 0, 1},
        {"tool convert a --kind int3", 2, 0},
        {"tool convert a --kind int", 2, 0},
        {"tool convert a --kind int4", 0, 1},
        {"tool convert a --flag=2", 2, 0},
        {"tool convert a --gpu-memory 24Gi", 2, 0},
        {"tool convert a --gpu-memory -1", 2, 0},
        {"tool convert a --gpu-memory 24GiB", 0, 1},
        {"tool inspect a --count 3", 2, 0}, // an option of another command
        {"tool inspect a --json", 0, 1},
        {"tool --json inspect a", 0, 1}, // a common switch may come first
        {"tool --json a b", 0, 1},
        {"tool convert corrupt", 4, 1},
        {"tool convert -- --flag", 0, 1}, // an argument, not an option
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        int status = call(cases[i].line);
        if (status != cases[i].status || got.ran != cases[i].ran)
            fail_msg("%s: status %d, ran %d", cases[i].line, status, got.ran);
    }
}

static void test_values(void **state)
{
    (void)state;
    assert_int_equal(call("tool convert a b --flag --count 12 --share=0.25 --gpu-memory 1.5GiB --kind int8 --text "
                          "--odd --stop x --stop y"),
                     0);
    assert_true(got.flag && got.count == 12 && got.share == 0.25 && got.memory == 3ull << 29);
    assert_string_equal(got.kind, "int8");
    assert_string_equal(got.text, "--odd");
    assert_int_equal(got.list.count, 2);
    assert_string_equal(got.list.items[1], "y");
    assert_int_equal(got.arguments, 2);
}

// Who waits for a process with a wrong command line is told its first fault; where they are can stand before it and behind it.
static void test_refused(void **state)
{
    (void)state;
    assert_int_equal(call("tool convert a --text before --nonsense 1 --count 99 --share 0.25 --kind int8"), 2);
    assert_int_equal(got.refused, 1);
    assert_non_null(strstr(got.why, "convert: convert has no option --nonsense"));
    assert_string_equal(got.text, "before");
    assert_string_equal(got.kind, "int8");
    assert_true(got.share == 0.25 && got.count == 7);
    setenv("TOOL_COUNT", "abc", 1);
    assert_int_equal(call("tool convert a --nonsense --text behind"), 2);
    unsetenv("TOOL_COUNT");
    assert_int_equal(got.refused, 1);
    assert_non_null(strstr(got.why, "TOOL_COUNT"));
    assert_string_equal(got.text, "behind");
    assert_int_equal(call("tool convert"), 2);
    assert_int_equal(got.refused, 1);
    assert_int_equal(call("tool convert corrupt"), 4); // it has begun
    assert_int_equal(got.refused, 0);
}

static void test_environment(void **state)
{
    (void)state;
    setenv("TOOL_COUNT", "33", 1);
    setenv("TOOL_GPU_MEMORY", "1KiB", 1);
    setenv("TOOL_STOP", "env", 1);
    assert_int_equal(call("tool convert a"), 0);
    assert_true(got.count == 33 && got.memory == 1024 && got.list.count == 1);
    assert_int_equal(call("tool convert a --count 5 --stop flag"), 0); // a flag goes before the environment
    assert_true(got.count == 5 && got.list.count == 1);
    assert_string_equal(got.list.items[0], "flag");
    // Each list by itself: another one before it changes nothing.
    assert_int_equal(call("tool convert a --start one --stop flag --stop more"), 0);
    assert_int_equal(got.list.count, 2);
    assert_string_equal(got.list.items[0], "flag");
    assert_int_equal(call("tool convert a --start one"), 0);
    assert_true(got.list.count == 1 && strcmp(got.list.items[0], "env") == 0);
    setenv("TOOL_COUNT", "many", 1);
    assert_int_equal(call("tool convert a"), 2);
    unsetenv("TOOL_COUNT");
    unsetenv("TOOL_GPU_MEMORY");
    unsetenv("TOOL_STOP");
    assert_int_equal(call("tool convert a"), 0);
    assert_true(got.count == 7); // the default
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_status), cmocka_unit_test(test_values),
                                       cmocka_unit_test(test_refused), cmocka_unit_test(test_environment)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
