// Output taken apart: what each format says, the same however the text is cut, nothing lost where a call is none, bounded memory and time.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "engine/serve/output_parser.h"
#include "tests/device/quick.h"
#include "tests/random_help.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define COUNT(array) (sizeof(array) / sizeof *(array))

// Deltas as text: C(content) R(reasoning) B0(name) A0(arguments) E0. Neighbours of one kind are joined.
struct record {
    char text[16384];
    size_t bytes;
    int type, tool;
    bool open; // a call has begun and not ended
    int calls;
    const char *problem;
};

static void append(struct record *record, const char *text, size_t bytes)
{
    if (record->bytes + bytes >= sizeof record->text)
        bytes = 0;
    memcpy(record->text + record->bytes, text, bytes);
    record->bytes += bytes;
    record->text[record->bytes] = 0;
}

static void on_delta(void *arg, const struct output_delta *delta)
{
    struct record *record = arg;
    char head[16];
    int type = (int)delta->type;
    bool text = type == DELTA_CONTENT || type == DELTA_REASONING;
    if (type == DELTA_TOOL_BEGIN ? record->open || delta->tool != record->calls
                                 : !text && (!record->open || delta->tool != record->calls - 1))
        record->problem = "calls begin, continue and end out of order";
    if (text && record->open)
        record->problem = "text within a call";
    if (type == DELTA_TOOL_BEGIN || type == DELTA_TOOL_END)
        record->open = type == DELTA_TOOL_BEGIN;
    record->calls += type == DELTA_TOOL_BEGIN;
    if (type != DELTA_TOOL_END && delta->bytes == 0)
        record->problem = "an empty delta";
    if (type != record->type || type == DELTA_TOOL_BEGIN || type == DELTA_TOOL_END) {
        if (record->type >= 0 && record->type != DELTA_TOOL_END)
            append(record, ")", 1);
        snprintf(head, sizeof head,
                 text                     ? "%c("
                 : type == DELTA_TOOL_END ? "%c%d"
                                          : "%c%d(",
                 "CRBAE"[type], delta -> tool);
        append(record, head, strlen(head));
    }
    record->type = type;
    append(record, delta->text, delta->bytes);
}

// text [bytes], cut at the given places.
static void parse(struct record *record, struct output_format format, bool tools, bool thinking, const char *text,
                  size_t bytes, const size_t *cuts, size_t num_cuts)
{
    struct output_parser *parser = NULL;
    struct error err = {0};
    record->text[0] = 0; // the rest of 16 KiB need not be cleared
    record->bytes = 0;
    record->type = -1;
    record->open = false;
    record->calls = 0;
    record->problem = NULL;
    assert_int_equal(output_parser_create(&parser, format, tools, thinking, on_delta, record, &err), 0);
    size_t at = 0;
    for (size_t i = 0; i <= num_cuts; i++) {
        size_t end = i < num_cuts ? cuts[i] : bytes;
        assert_int_equal(output_parser_push(parser, text + at, end - at, &err), 0);
        at = end;
    }
    assert_int_equal(output_parser_finish(parser, &err), 0);
    if (record->type >= 0 && record->type != DELTA_TOOL_END)
        append(record, ")", 1);
    if (record->open)
        record->problem = "a call without end";
    if (output_parser_tool_calls(parser) != record->calls)
        record->problem = "calls are counted wrong";
    output_parser_free(parser);
    if (record->problem)
        fail_msg("%s: %.300s gave %.300s", record->problem, text, record->text);
}

// ---- what formats say ----------------------------------------------------------------------------------------------

enum { NO_TOOLS = 1, THINKS = 2, BEGUN = 4 }; // offered none; the format has reasoning; the prompt began it
#define CALL(body) "<tool_call>\n" body "\n</tool_call>"
#define F "{\"name\": \"f\", \"arguments\": {\"a\": 1}}"
#define DONE "B0(f)A0({\"a\": 1})E0"

static const struct {
    enum tool_format tools;
    int flags;
    const char *text, *deltas;
} cases[] = {
    {TOOLS_HERMES, 0, "", ""},
    {TOOLS_HERMES, 0, "Hello, <b>world</b>.\n", "C(Hello, <b>world</b>.\n)"},
    {TOOLS_HERMES, 0, CALL(F), DONE},
    {TOOLS_HERMES, 0, "\n\nI look. \n" CALL(F) "\n", "C(\n\nI look.)" DONE},
    {TOOLS_HERMES, 0, CALL(F) "\n" CALL("{\"arguments\": {}, \"name\": \"g\"}"), DONE "B1(g)A1({})E1"},
    {TOOLS_HERMES, 0, CALL(F) CALL(F), DONE "B1(f)A1({\"a\": 1})E1"},
    {TOOLS_HERMES, 0, CALL(F) "\nDone.", DONE "C(\nDone.)"},
    {TOOLS_HERMES, 0, "<tool_call>" F, DONE},
    {TOOLS_HERMES, 0, "<tool_call>" F " <tool_call>" F, DONE "B1(f)A1({\"a\": 1})E1"},
    {TOOLS_HERMES, 0, CALL("{\"name\": \"f\"}"), "B0(f)A0({})E0"},
    {TOOLS_HERMES, 0, CALL("{\"name\": \"f\", \"arguments\": null}"), "B0(f)A0({})E0"},
    {TOOLS_HERMES, 0, CALL("{\"name\":\"f\",\"arguments\":{}}"), "B0(f)A0({})E0"},
    {TOOLS_HERMES, 0, CALL("{\"name\": \"f\", \"parameters\": {\"x\": [1, {\"y\": \"}]\\\"</tool_call>\"}]}}"),
     "B0(f)A0({\"x\": [1, {\"y\": \"}]\\\"</tool_call>\"}]})E0"},
    {TOOLS_HERMES, 0,
     CALL("{\"id\": [1, \"]\"], \"x\": -1.5e3, \"y\": \"}\", \"z\":true , \"name\": \"f\", \"arguments\": {}, "
          "\"more\": {}}"),
     "B0(f)A0({})E0"},
    {TOOLS_HERMES, 0, CALL("{\"name\": \"a\\\"b\\\\\\u00e9\\ud83d\\ude00\\n\", \"arguments\": {}}"),
     "B0(a\"b\\\xC3\xA9\xF0\x9F\x98\x80\n)A0({})E0"},
    {TOOLS_HERMES, 0, CALL("{\"name\": \"x\\ud83dy\\udc00\", \"arguments\": {}}"),
     "B0(x\xEF\xBF\xBDy\xEF\xBF\xBD)A0({})E0"},
    {TOOLS_HERMES, 0, CALL("{\"name\": \"x\\ud83d\\u0041\\ud83d\", \"arguments\": {}}"),
     "B0(x\xEF\xBF\xBD"
     "A\xEF\xBF\xBD)A0({})E0"},
    {TOOLS_HERMES, 0, CALL("{\"na\\u006de\": \"f\", \"arguments\": \"{\\\"a\\\": \\\"\\u20ac\\\"}\"}"),
     "B0(f)A0({\"a\": \"\xE2\x82\xAC\"})E0"},
    {TOOLS_HERMES, 0, CALL("{\"arguments\": \"{}\", \"name\": \"f\"}"), "B0(f)A0({})E0"},
    {TOOLS_HERMES, 0, CALL("{\"arguments\": \"\", \"name\": \"f\"}"), "B0(f)A0({})E0"},
    // none, or cut short
    {TOOLS_HERMES, 0, "x" CALL("{\"name\": \"\", \"arguments\": {}}"),
     "C(x" CALL("{\"name\": \"\", \"arguments\": {}}") ")"},
    {TOOLS_HERMES, 0, "x \n" CALL("get_weather()"), "C(x \n" CALL("get_weather()") ")"},
    {TOOLS_HERMES, 0, CALL("{\"name\": 5, \"arguments\": {}}"), "C(" CALL("{\"name\": 5, \"arguments\": {}}") ")"},
    {TOOLS_HERMES, 0, CALL("{\"name\": \"f\", \"arguments\": [1]}"),
     "C(" CALL("{\"name\": \"f\", \"arguments\": [1]}") ")"},
    {TOOLS_HERMES, 0, CALL("{\"name\": \"f\", }"), "C(" CALL("{\"name\": \"f\", }") ")"},
    {TOOLS_HERMES, 0, CALL("{\"arguments\": {}}"), "C(" CALL("{\"arguments\": {}}") ")"},
    {TOOLS_HERMES, 0, CALL("{\"name\": \"a\\qb\", \"arguments\": {}}"),
     "C(" CALL("{\"name\": \"a\\qb\", \"arguments\": {}}") ")"},
    {TOOLS_HERMES, 0, CALL("{\"name\": \"a\nb\", \"arguments\": {}}"),
     "C(" CALL("{\"name\": \"a\nb\", \"arguments\": {}}") ")"},
    {TOOLS_HERMES, 0, "<tool_call>{\"name\": <tool_call>" F, "C(<tool_call>{\"name\": )" DONE},
    {TOOLS_HERMES, 0, "<<tool_<tool_call>" F, "C(<<tool_)" DONE},
    {TOOLS_HERMES, 0, "a <tool_cal", "C(a <tool_cal)"},
    {TOOLS_HERMES, 0, "</tool_call>", "C(</tool_call>)"},
    {TOOLS_HERMES, 0, "a <tool_call>\n{\"name\": \"f\", \"argu", "C(a <tool_call>\n{\"name\": \"f\", \"argu)"},
    {TOOLS_HERMES, 0, "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": [", "B0(f)A0({\"a\": [)E0"},
    {TOOLS_HERMES, 0, "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": 1}", DONE},
    {TOOLS_HERMES, 0, "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}\n</tool_call>", DONE "C(</tool_call>)"},
    {TOOLS_HERMES, 0, "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": 1</tool_call> x",
     "B0(f)A0({\"a\": 1)E0C(</tool_call> x)"},
    {TOOLS_HERMES, 0, "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": [1}}", "B0(f)A0({\"a\": [1)E0C(}})"},
    {TOOLS_HERMES, 0, CALL(F) "\n</tool_", DONE "C(\n</tool_)"},
    {TOOLS_HERMES, NO_TOOLS, CALL(F), "C(" CALL(F) ")"},
    // reasoning
    {TOOLS_NONE, THINKS, "<think>\nWell <b>\n</b>\n</think>\n\nHello.\n", "R(Well <b>\n</b>)C(Hello.\n)"},
    {TOOLS_NONE, THINKS, "\n <think>x</think>y", "R(x)C(y)"},
    {TOOLS_NONE, THINKS, "<think>\n\n</think>\n\nHello.", "C(Hello.)"},
    {TOOLS_NONE, THINKS | BEGUN, "\nWell\n</think>\n\nHello </think>.", "R(Well)C(Hello </think>.)"},
    {TOOLS_NONE, THINKS | BEGUN, "Well </thin", "R(Well </thin)"},
    {TOOLS_NONE, THINKS | BEGUN, "<think>Well</think>", "R(<think>Well)"},
    {TOOLS_NONE, THINKS, "<think>Wel</th</think><think>y</think>", "R(Wel</th)C(<think>y</think>)"},
    {TOOLS_NONE, THINKS, "So <think>x</think>", "C(So <think>x</think>)"},
    {TOOLS_NONE, THINKS, "\n\n<thin>", "C(\n\n<thin>)"},
    {TOOLS_NONE, 0, "<think>x</think>y", "C(<think>x</think>y)"},
    {TOOLS_NONE, BEGUN, "x</think>y", "C(x</think>y)"},
    {TOOLS_HERMES, THINKS, "<think>\nIs it <tool_call>?\n</think>\n\n" CALL(F), "R(Is it <tool_call>?)" DONE},
    {TOOLS_HERMES, THINKS, CALL(F) "\n<think>x</think>", DONE "C(\n<think>x</think>)"},
    {TOOLS_LLAMA3, THINKS | BEGUN, "x</think>\n{\"name\": \"f\", \"parameters\": {\"a\": 1}}", "R(x)" DONE},
    // Llama
    {TOOLS_LLAMA3, 0, "{\"name\": \"f\", \"parameters\": {\"a\": 1}}", DONE},
    {TOOLS_LLAMA3, 0, "\n{\"type\": \"function\", \"name\": \"f\", \"parameters\": {\"a\": 1}}\n", DONE},
    {TOOLS_LLAMA3, 0, "<|python_tag|>{\"name\": \"f\", \"arguments\": {\"a\": 1}}", DONE},
    {TOOLS_LLAMA3, 0, "I call. <|python_tag|>{\"name\": \"f\", \"arguments\": {\"a\": 1}}", "C(I call.)" DONE},
    {TOOLS_LLAMA3, 0, "{\"name\": \"f\", \"parameters\": {\"a\": 1}}; {\"name\": \"g\", \"parameters\": {}};",
     DONE "B1(g)A1({})E1"},
    {TOOLS_LLAMA3, 0,
     "{\"name\": \"f\", \"parameters\": {\"a\": 1}}\n<|python_tag|>{\"name\": \"g\", \"parameters\": {}}",
     DONE "B1(g)A1({})E1"},
    {TOOLS_LLAMA3, 0, "{\"name\": \"f\", \"parameters\": {\"a\": 1}}; or {}", DONE "C(; or {})"},
    {TOOLS_LLAMA3, 0, "{\"name\": \"Ada\", \"born\": 1815}", "C({\"name\": \"Ada\", \"born\": 1815})"},
    {TOOLS_LLAMA3, 0, "{\"name\": \"Ada\", \"born\": 1815, \"parameters\": {}}",
     "C({\"name\": \"Ada\", \"born\": 1815, \"parameters\": {}})"},
    {TOOLS_LLAMA3, 0, "{\"name\": \"Ada\"}", "C({\"name\": \"Ada\"})"},
    {TOOLS_LLAMA3, 0, "{}", "C({})"},
    {TOOLS_LLAMA3, 0, "So {\"name\": \"f\", \"parameters\": {}}", "C(So {\"name\": \"f\", \"parameters\": {}})"},
    {TOOLS_LLAMA3, 0, "<|python_tag|>print(1)", "C(<|python_tag|>print(1))"},
    {TOOLS_LLAMA3, 0, "{\"name\": \"Ada\", \"born\": 1}; {\"name\": \"f\", \"parameters\": {}}",
     "C({\"name\": \"Ada\", \"born\": 1}; {\"name\": \"f\", \"parameters\": {}})"},
    {TOOLS_LLAMA3, NO_TOOLS, "{\"name\": \"f\", \"parameters\": {}}", "C({\"name\": \"f\", \"parameters\": {}})"},
    // Mistral
    {TOOLS_MISTRAL, 0, "[TOOL_CALLS] [" F "]", DONE},
    {TOOLS_MISTRAL, 0, "[TOOL_CALLS][" F ", {\"name\": \"g\", \"arguments\": {}, \"id\": \"abcdefghi\"}] ",
     DONE "B1(g)A1({})E1"},
    {TOOLS_MISTRAL, 0, "Let me see. [TOOL_CALLS] [" F "]\nSo.", "C(Let me see.)" DONE "C(\nSo.)"},
    {TOOLS_MISTRAL, 0, "[TOOL_CALLS] " F, DONE},
    {TOOLS_MISTRAL, 0, "[TOOL_CALLS] [" F ", ", DONE},
    {TOOLS_MISTRAL, 0, "[TOOL_CALLS] [" F " x", DONE "C( x)"},
    {TOOLS_MISTRAL, 0, "[TOOL_CALLS] []", "C([TOOL_CALLS] [])"},
    {TOOLS_MISTRAL, 0, "[[TOOL_CALLS [TOOL", "C([[TOOL_CALLS [TOOL)"},
    {TOOLS_MISTRAL, 0, "[TOOL_CALLS] [[" F "]]", "C([TOOL_CALLS] [[" F "]])"},
    {TOOLS_MISTRAL_V11, 0, "[TOOL_CALLS]f[ARGS]{\"a\": 1}", DONE},
    {TOOLS_MISTRAL_V11, 0, "Hm.\n[TOOL_CALLS]f[CALL_ID]123456789[ARGS] {\"a\": 1}[TOOL_CALLS]ns.g-2[ARGS]{}",
     "C(Hm.)" DONE "B1(ns.g-2)A1({})E1"},
    {TOOLS_MISTRAL_V11, 0, "[TOOL_CALLS] [" F "]", DONE},
    {TOOLS_MISTRAL_V11, 0, "[TOOL_CALLS]f{\"a\": 1}", "C([TOOL_CALLS]f{\"a\": 1})"},
    {TOOLS_MISTRAL_V11, 0, "[TOOL_CALLS]f[ARG", "C([TOOL_CALLS]f[ARG)"},
    {TOOLS_MISTRAL_V11, 0, "[TOOL_CALLS]f[A[TOOL_CALLS]f[ARGS]{\"a\": 1}", "C([TOOL_CALLS]f[A)" DONE},
    {TOOLS_MISTRAL_V11, 0, "[TOOL_CALLS]f[ARGS]\"x\"", "C([TOOL_CALLS]f[ARGS]\"x\")"},
    {TOOLS_MISTRAL_V11, 0, "[TOOL_CALLS]f[ARGS]{\"a\": \"[TOOL_CALLS]", "B0(f)A0({\"a\": \"[TOOL_CALLS])E0"},
    {TOOLS_HARMONY, 0,
     "<|channel|>analysis<|message|>Simple.<|end|><|start|>assistant<|channel|>final<|message|>It is 4.<|return|>",
     "R(Simple.)C(It is 4.)"},
    {TOOLS_HARMONY, 0,
     "<|channel|>analysis<|message|>Need it.<|end|><|start|>assistant<|channel|>commentary to=functions.f "
     "<|constrain|>json<|message|>{\"a\": 1}<|call|>",
     "R(Need it.)" DONE},
    {TOOLS_HARMONY, 0, " to=functions.f<|channel|>commentary json<|message|>{\"a\": 1}<|call|>", DONE},
    {TOOLS_HARMONY, 0,
     "<|channel|>commentary<|message|>I look. <|end|><|start|>assistant "
     "to=functions.ns.g-2<|channel|>commentary<|message|><|call|>",
     "C(I look. )B0(ns.g-2)A0({})E0"},
    {TOOLS_HARMONY, 0,
     "<|channel|>commentary to=functions.f<|message|>{\"a\": 1}<|call|><|start|>assistant<|channel|>commentary "
     "to=functions.g<|message|>{}",
     DONE "B1(g)A1({})E1"},
    {TOOLS_HARMONY, NO_TOOLS, "<|channel|>commentary to=functions.f<|message|>{}<|call|>", "C({})"},
    {TOOLS_HARMONY, 0, "<|channel|>commentary to=functions.f<|message|>{\"a\": \"<|b <\"}<|call|>",
     "B0(f)A0({\"a\": \"<|b <\"})E0"},
    {TOOLS_HARMONY, 0, "<|channel|>commentary to=browser.search<|message|>x", "C(x)"},
    {TOOLS_HARMONY, 0, "<|channel|>final <|constrain|>to=functions.f<|message|>x", "C(x)"},
    {TOOLS_HARMONY, 0, "<|channel|>final<|message|>\n a <|channel <think>b</think>\n",
     "C(\n a <|channel <think>b</think>\n)"},
    {TOOLS_HARMONY, 0,
     "<|channel|>analysis<|message|>a<|channel|>final<|message|>b<|start|>assistant<|message|>c<|end|>\n", "R(a)C(bc)"},
    {TOOLS_HARMONY, 0, "<|channel|>analysis<|message|>cut <|e", "R(cut <|e)"},
    {TOOLS_HARMONY, 0, "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|chann",
     "R(a)C(<|start|>assistant<|chann)"},
    {TOOLS_HARMONY, 0, "<|channel|>final", ""},
    {TOOLS_HARMONY, 0, "Hello.", "C(Hello.)"},
    {TOOLS_HARMONY, 0, "{\"a\": 1}", "C({\"a\": 1})"},
    {TOOLS_HARMONY, 0, " to day", "C( to day)"},
    {TOOLS_HARMONY, 0, "<|channel|>final<|message|>a<|return|>b", "C(ab)"},
};

static struct output_format format_of(size_t i)
{
    return (struct output_format){cases[i].tools, (cases[i].flags & THINKS) != 0};
}

static void parse_case(struct record *record, size_t i, const size_t *cuts, size_t num_cuts)
{
    parse(record, format_of(i), !(cases[i].flags & NO_TOOLS), (cases[i].flags & BEGUN) != 0, cases[i].text,
          strlen(cases[i].text), cuts, num_cuts);
}

static void test_cases(void **state)
{
    static struct record record;
    (void)state;
    for (size_t i = 0; i < COUNT(cases); i++) {
        parse_case(&record, i, NULL, 0);
        if (strcmp(record.text, cases[i].deltas) != 0)
            fail_msg("%s\n  gave %s\n  not  %s", cases[i].text, record.text, cases[i].deltas);
    }
}

// Into two and three parts at every place, into many at random, and byte by byte.
static void test_cuts(void **state)
{
    static struct record record;
    (void)state;
    for (size_t i = 0; i < COUNT(cases); i++) {
        size_t bytes = strlen(cases[i].text), cuts[512];
        assert_true(bytes < COUNT(cuts));
        for (size_t a = 0; a <= bytes; a++)
            for (size_t b = a; b <= bytes; b += bytes < 80 ? 1 : 3) {
                cuts[0] = a;
                cuts[1] = b;
                parse_case(&record, i, cuts, 2);
                assert_string_equal(record.text, cases[i].deltas);
            }
        for (int round = 0; round < 100; round++) {
            size_t count = 0;
            for (size_t a = 0; a < bytes; a++)
                if (round == 0 || random_bits() % 4 == 0)
                    cuts[count++] = a;
            parse_case(&record, i, cuts, count);
            assert_string_equal(record.text, cases[i].deltas);
        }
    }
}

// ---- garbage -------------------------------------------------------------------------------------------------------

static const char list_of_calls[] = "[TOOL_CALLS] [" F, tagged_call[] = "<tool_call>" F;
static const char *const pieces[] = {"<|start|>assistant",
                                     "<|channel|>",
                                     "<|message|>",
                                     "<|message|>",
                                     "<|end|>",
                                     "<|call|>",
                                     "<|constrain|>",
                                     "analysis",
                                     "commentary",
                                     " to=functions.f",
                                     "<|channel|>commentary to=functions.g<|message|>",
                                     "<|",
                                     F,
                                     list_of_calls,
                                     "[TOOL_CALLS]f[ARGS]{",
                                     tagged_call,
                                     "{\"name\": \"f\", \"parameters\": {\"a\": ",
                                     "<tool_call>",
                                     "</tool_call>",
                                     "[TOOL_CALLS]",
                                     "[ARGS]",
                                     "[CALL_ID]",
                                     "<|python_tag|>",
                                     "<think>",
                                     "</think>",
                                     "{\"name\": \"f\"",
                                     ", \"arguments\": {",
                                     "\"parameters\":{}",
                                     "{\"name\":\"g\",\"parameters\":{\"x\":[\"}\"]}}",
                                     "}",
                                     "]",
                                     "[",
                                     "{",
                                     ",",
                                     ";",
                                     ":",
                                     "\"",
                                     "\\",
                                     "\\u",
                                     "d83d",
                                     "null",
                                     "12",
                                     "-",
                                     "name",
                                     "f",
                                     " ",
                                     "\n",
                                     "<",
                                     "</",
                                     "tool_call>",
                                     "[TOOL",
                                     "\xC3\xA9",
                                     "x y",
                                     "\x01",
                                     "e"};

static size_t garbage(char *text, size_t capacity)
{
    size_t bytes = 0, count = random_bits() % 24;
    for (size_t i = 0; i < count; i++) {
        const char *piece = pieces[random_bits() % COUNT(pieces)];
        if (bytes + strlen(piece) >= capacity)
            break;
        memcpy(text + bytes, piece, strlen(piece));
        bytes += strlen(piece);
    }
    text[bytes] = 0;
    return bytes;
}

// However it is cut; and where nothing was a call or a thought, everything is content.
static void test_garbage(void **state)
{
    static struct record whole, parts;
    char text[1024], content[1100];
    int calls = 0, plain = 0;
    (void)state;
    for (int round = 0; round < 20000; round++) {
        struct output_format format = {(enum tool_format)(random_bits() % 6), random_bits() % 3 == 0};
        bool tools = random_bits() % 8 != 0, thinking = random_bits() % 4 == 0;
        size_t bytes = garbage(text, sizeof text), cuts[1024], count = 0;
        for (size_t a = 0; a < bytes; a++)
            if (round % 3 == 0 || random_bits() % 5 == 0)
                cuts[count++] = a;
        parse(&whole, format, tools, thinking, text, bytes, NULL, 0);
        parse(&parts, format, tools, thinking, text, bytes, cuts, count);
        if (strcmp(whole.text, parts.text) != 0)
            fail_msg("%s\n  gave      %s\n  in pieces %s", text, whole.text, parts.text);
        calls += whole.calls;
        if (whole.calls || format.reasoning || !bytes || format.tools == TOOLS_HARMONY)
            continue;
        snprintf(content, sizeof content, "C(%s)", text);
        assert_string_equal(whole.text, content);
        plain++;
    }
    if (calls < 500 || plain < 500)
        fail_msg("only %d calls and %d plain texts", calls, plain);
}

// ---- size ----------------------------------------------------------------------------------------------------------

struct tally {
    size_t bytes, longest;
};

static void on_tally(void *arg, const struct output_delta *delta)
{
    struct tally *tally = arg;
    tally->bytes += delta->bytes;
    tally->longest = delta->bytes > tally->longest ? delta->bytes : tally->longest;
}

// Text that never becomes a call is let go before long, and time stays linear: 1 MB of each in some milliseconds.
static void test_size(void **state)
{
    static const struct {
        enum tool_format tools;
        const char *head, *body;
    } texts[] = {
        {TOOLS_HERMES, "<tool_call>{\"", "aaaaaaaa"},
        {TOOLS_HERMES, "<tool_call>{\"name\": \"f\", \"x\": \"", "aaaaaaaa"},
        {TOOLS_HERMES, "<tool_call>{\"x\": [", "[[[[[[[["},
        {TOOLS_HERMES, "<tool_call>{\"arguments\": {\"a\": \"", "aaaaaaaa"},
        {TOOLS_HERMES, "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": \"", "aaaaaaaa"},
        {TOOLS_HERMES, "", "<<<<<<<<"},
        {TOOLS_HERMES, "", "<tool_call"},
        {TOOLS_HERMES, "", "<tool_call>{\"name\":"},
        {TOOLS_HERMES, "", "        "},
        {TOOLS_HERMES, "<think>x", "        "},
        {TOOLS_LLAMA3, "{\"name\": \"f\", \"parameters\": {}}", ";;;;;;;;"},
        {TOOLS_LLAMA3, "{\"name\": \"f\"", "        "},
        {TOOLS_MISTRAL, "[TOOL_CALLS]", "        "},
        {TOOLS_MISTRAL, "[TOOL_CALLS] [" F, "        "},
        {TOOLS_MISTRAL_V11, "[TOOL_CALLS]", "ffffffff"},
        {TOOLS_MISTRAL_V11, "[TOOL_CALLS]f[CALL_ID]", "11111111"},
        {TOOLS_HARMONY, "<|channel|>", "aaaaaaaa"},
        {TOOLS_HARMONY, "<|channel|>final<|constrain|>", "aaaaaaaa"},
        {TOOLS_HARMONY, "<|channel|>final<|message|>", "<|channel"},
        {TOOLS_HARMONY, "<|channel|>final<|message|>x<|end|>", "        "},
        {TOOLS_HARMONY, "<|channel|>commentary to=functions.f<|message|>", "<<<<<<<<"},
    };
    const size_t most = quick() ? 1 << 18 : 1 << 20;
    (void)state;
    for (size_t i = 0; i < COUNT(texts); i++) {
        struct output_parser *parser = NULL;
        struct error err = {0};
        struct tally tally = {0};
        size_t pushed = strlen(texts[i].head), length = strlen(texts[i].body);
        clock_t begin = clock();
        assert_int_equal(output_parser_create(&parser, (struct output_format){texts[i].tools, true}, true, false,
                                              on_tally, &tally, &err),
                         0);
        assert_int_equal(output_parser_push(parser, texts[i].head, pushed, &err), 0);
        for (; pushed < most; pushed += length) {
            assert_int_equal(output_parser_push(parser, texts[i].body, length, &err), 0);
            if (pushed > tally.bytes + (66 << 10))
                fail_msg("text %zu: %zu bytes are held back", i, pushed - tally.bytes);
        }
        output_parser_free(parser);
        double seconds = (double)(clock() - begin) / CLOCKS_PER_SEC;
        if (!(seconds <=
              5)) // far above what it takes, sanitizers and a loaded machine included; quadratic would be minutes
            fail_msg("text %zu took %.1f s", i, seconds);
        assert_true(tally.longest <= 66 << 10);
    }
}

// ---- templates -----------------------------------------------------------------------------------------------------

static void test_templates(void **state)
{
    static const struct {
        const char *name;
        struct output_format format;
    } known[] = {
        {"llama3_tools", {TOOLS_LLAMA3, false}}, {"mistral", {TOOLS_MISTRAL, false}},
        {"qwen25_tools", {TOOLS_HERMES, false}}, {"qwen3_thinking", {TOOLS_HERMES, true}},
        {"hermes_tools", {TOOLS_HERMES, false}}, {"deepseek", {TOOLS_NONE, true}},
        {"gpt_oss", {TOOLS_HARMONY, true}},
    };
    size_t found = 0;
    const char *name;
    json_t *golden = json_load_file("tests/golden/templates/families.json", 0, NULL), *text;
    (void)state;
    assert_non_null(golden);
    json_object_foreach(json_object_get(golden, "templates"), name, text)
    {
        struct output_format wanted = {TOOLS_NONE, false}, got = output_format_find(json_string_value(text));
        for (size_t i = 0; i < COUNT(known); i++)
            if (strcmp(known[i].name, name) == 0) {
                wanted = known[i].format;
                found++;
            }
        if (got.tools != wanted.tools || got.reasoning != wanted.reasoning)
            fail_msg("the template %s has tools %d, reasoning %d", name, (int)got.tools, (int)got.reasoning);
    }
    assert_int_equal(found, COUNT(known));
    json_decref(golden);
    static const struct {
        const char *text;
        enum tool_format tools;
    } others[] = {
        {"{{- '[TOOL_CALLS]' + name + '[ARGS]' + arguments }}", TOOLS_MISTRAL_V11},
        {"<tool_call>\n<function=example>\n<parameter=a> arguments", TOOLS_NONE},
        {"<tool_call>{name}\n<arg_key>k</arg_key> arguments", TOOLS_NONE},
        {"<|start|>assistant<|channel|>final<|message|>", TOOLS_HARMONY},
        {"<|tool_call|>[{\"name\": \"f\", \"arguments\": {}}]<|/tool_call|>", TOOLS_NONE},
        {"", TOOLS_NONE},
    };
    for (size_t i = 0; i < COUNT(others); i++)
        assert_int_equal(output_format_find(others[i].text).tools, others[i].tools);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_cases), cmocka_unit_test(test_cuts),      cmocka_unit_test(test_garbage),
        cmocka_unit_test(test_size),  cmocka_unit_test(test_templates),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
