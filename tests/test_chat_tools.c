// Tools as grammars: with real tokenizers, the right calls and no others; random sentences are calls that the parser of outputs finds again;
// ids of calls in messages.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "engine/serve/chat_tools.h"
#include "tests/grammar_help.h"
#undef COUNT
#include "tests/tokenizer_help.h"

// ---- which outputs are allowed -------------------------------------------------------------------------------------

static const char tools_text[] = "[{\"type\": \"function\", \"function\": {\"name\": \"add\", \"parameters\": "
                                 "{\"properties\": {\"a\": {\"type\": \"integer\"}},"
                                 " \"required\": [\"a\"], \"additionalProperties\": false}}},"
                                 " {\"type\": \"function\", \"function\": {\"name\": \"now\"}},"
                                 " {\"type\": \"function\", \"function\": {\"name\": \"any\", \"parameters\": {}}},"
                                 " {\"type\": \"function\", \"function\": {\"name\": \"see\", \"strict\": true, "
                                 "\"parameters\": {\"type\": \"object\","
                                 " \"properties\": {\"c\": {\"enum\": [\"x\", \"y\\\"\"]}}, \"required\": [\"c\"], "
                                 "\"additionalProperties\": false}}}]";

enum mode { AUTO, ONE, REQUIRED, NAMED, NAMED_NOW }; // ONE: auto without parallel calls
#define ADD(a) "{\"name\": \"add\", \"arguments\": {\"a\": " a "}}"
#define NOW "{\"name\": \"now\", \"arguments\": {}}"
#define SEE(c) "{\"name\": \"see\", \"arguments\": {\"c\": " c "}}"
#define TAG(call) "<tool_call>\n" call "\n</tool_call>"
#define LADD(a) "{\"name\": \"add\", \"parameters\": {\"a\": " a "}}"
#define LSEE(c) "{\"name\": \"see\", \"parameters\": {\"c\": " c "}}"

static const struct {
    const char *tokenizer;
    enum tool_format format;
    enum mode mode;
    bool allowed;
    const char *text;
} outputs[] = {
    {"qwen", TOOLS_HERMES, REQUIRED, true, TAG(ADD("12"))},
    {"qwen", TOOLS_HERMES, REQUIRED, true, TAG(ADD("-1")) "\n" TAG(NOW) "\n" TAG(SEE("\"y\\\"\""))},
    {"qwen", TOOLS_HERMES, REQUIRED, true, TAG("{\"name\": \"any\", \"arguments\": {\"x\": 5}}")},
    {"qwen", TOOLS_HERMES, REQUIRED, false, ""},
    {"qwen", TOOLS_HERMES, REQUIRED, false, "x" TAG(NOW)},
    {"qwen", TOOLS_HERMES, REQUIRED, false, TAG(ADD("\"12\""))},
    {"qwen", TOOLS_HERMES, REQUIRED, false, TAG("{\"name\": \"add\", \"arguments\": {}}")},
    {"qwen", TOOLS_HERMES, REQUIRED, false, TAG("{\"name\": \"now\", \"arguments\": {\"a\": 1}}")},
    {"qwen", TOOLS_HERMES, REQUIRED, false, TAG("{\"name\": \"any\", \"arguments\": 5}")},
    {"qwen", TOOLS_HERMES, REQUIRED, false, TAG("{\"name\": \"sub\", \"arguments\": {}}")},
    {"qwen", TOOLS_HERMES, REQUIRED, false, TAG(ADD("1")) "\nDone"},
    {"qwen", TOOLS_HERMES, REQUIRED, false, "<tool_call>\n" ADD("1")},
    {"qwen", TOOLS_HERMES, NAMED, true, TAG(ADD("3"))},
    {"qwen", TOOLS_HERMES, NAMED, false, TAG(NOW)},
    {"qwen", TOOLS_HERMES, NAMED, false, TAG(ADD("3")) "\n" TAG(ADD("3"))},
    {"qwen", TOOLS_HERMES, NAMED_NOW, true, TAG(NOW)},
    {"qwen", TOOLS_HERMES, AUTO, true, ""},
    {"qwen", TOOLS_HERMES, AUTO, true, "It is 5 < 6, \xE2\x82\xAC.\n<tool <<tool_call {}"},
    {"qwen", TOOLS_HERMES, AUTO, true,
     "Let me.\n" TAG(SEE("\"x\"")) "\n" TAG("{\"name\": \"add\", \"arguments\": {\"any\": [1, null]}}")},
    {"qwen", TOOLS_HERMES, AUTO, true, "<<tool_call" TAG(NOW)},
    {"qwen", TOOLS_HERMES, AUTO, false, TAG(SEE("\"z\""))},
    {"qwen", TOOLS_HERMES, AUTO, false, "<tool_call>see"},
    {"qwen", TOOLS_HERMES, AUTO, false, "<tool_cal<tool_call>see"},
    {"qwen", TOOLS_HERMES, ONE, true, "So: " TAG(ADD("1"))},
    {"qwen", TOOLS_HERMES, ONE, false, TAG(ADD("1")) "\n" TAG(ADD("1"))},
    {"llama3", TOOLS_LLAMA3, REQUIRED, true, LADD("0") "; " LSEE("\"x\"")},
    {"llama3", TOOLS_LLAMA3, REQUIRED, false, ADD("0")},
    {"llama3", TOOLS_LLAMA3, REQUIRED, false, LADD("0") " and"},
    {"llama3", TOOLS_LLAMA3, NAMED, true, LADD("0")},
    {"llama3", TOOLS_LLAMA3, NAMED, false, LSEE("\"x\"")},
    {"llama3", TOOLS_LLAMA3, AUTO, true, "\nHello {\"name\": 1}"},
    {"llama3", TOOLS_LLAMA3, AUTO, true, "{\"names\": []}"},
    {"llama3", TOOLS_LLAMA3, AUTO, true, " {\"n\": 5}"},
    {"llama3", TOOLS_LLAMA3, AUTO, true, "{}"},
    {"llama3", TOOLS_LLAMA3, AUTO, true, ""},
    {"llama3", TOOLS_LLAMA3, AUTO, true, LSEE("\"x\"")},
    {"llama3", TOOLS_LLAMA3, AUTO, false, LSEE("\"z\"")},
    {"llama3", TOOLS_LLAMA3, AUTO, false, " {\"name\": \"Ada\"}"},
    {"mistral_v3", TOOLS_MISTRAL, REQUIRED, true, "[TOOL_CALLS] [" ADD("7") ", " NOW "]"},
    {"mistral_v3", TOOLS_MISTRAL, REQUIRED, true, "[TOOL_CALLS][" NOW "]"},
    {"mistral_v3", TOOLS_MISTRAL, REQUIRED, false, "[TOOL_CALLS] []"},
    {"mistral_v3", TOOLS_MISTRAL, REQUIRED, false, "[TOOL_CALLS] [" NOW},
    {"mistral_v3", TOOLS_MISTRAL, NAMED, true, "[TOOL_CALLS] [" ADD("7") "]"},
    {"mistral_v3", TOOLS_MISTRAL, NAMED, false, "[TOOL_CALLS] [" ADD("7") ", " ADD("7") "]"},
    {"mistral_v3", TOOLS_MISTRAL, AUTO, true, "Hm [1].[TOOL_CALLS] [" SEE("\"x\"") "]"},
    {"mistral_v3", TOOLS_MISTRAL, AUTO, false, "Hm.[TOOL_CALLS] [" SEE("1") "]"},
    {"tekken", TOOLS_MISTRAL_V11, REQUIRED, true, "[TOOL_CALLS]add[ARGS]{\"a\": 1}[TOOL_CALLS]now[ARGS]{}"},
    {"tekken", TOOLS_MISTRAL_V11, REQUIRED, false, "[TOOL_CALLS]add[ARGS]{}"},
    {"tekken", TOOLS_MISTRAL_V11, NAMED, true, "[TOOL_CALLS]add[ARGS]{\"a\": 1}"},
    {"tekken", TOOLS_MISTRAL_V11, AUTO, true, "Well[TOOL.[TOOL_CALLS]see[ARGS]{\"c\": \"x\"}"},
    {"tekken", TOOLS_MISTRAL_V11, AUTO, false, "Well[TOOL_CALLS]see[ARGS]{\"c\": \"z\"}"},
};

static struct chat_tools tools_of(const json_t *list, enum tool_format format, enum mode mode)
{
    return (struct chat_tools){
        .format = format,
        .tools = list,
        .required = mode == REQUIRED,
        .only = mode == NAMED       ? "add"
                : mode == NAMED_NOW ? "now"
                                    : NULL,
        .parallel = mode != ONE,
    };
}

static struct grammar *grammar_of(struct vocabulary *vocabulary, const json_t *list, enum tool_format format,
                                  enum mode mode)
{
    struct chat_tools tools = tools_of(list, format, mode);
    struct grammar *grammar = test_grammar_new(vocabulary);
    struct error err = {0};
    assert_true(chat_tools_restrict(&tools));
    if (chat_tools_add(grammar, &tools, &err) || grammar_compile(grammar, &err))
        fail_msg("%s", err.msg);
    return grammar;
}

static bool follows(struct grammar *grammar, const struct token_list *ids)
{
    static uint32_t mask[1 << 10];
    struct grammar_state *state = test_state(grammar);
    bool allowed = true;
    for (size_t i = 0; i < ids->count && allowed; i++) {
        assert_true(ids->ids[i] < 32 * COUNT(mask));
        memset(mask, 0, sizeof mask);
        grammar_state_fill(state, mask, COUNT(mask));
        allowed = test_bit(mask, ids->ids[i]);
        if (allowed)
            grammar_state_advance(state, ids->ids[i]);
    }
    allowed = allowed && grammar_state_complete(state);
    grammar_state_free(state);
    return allowed;
}

static struct vocabulary *vocabulary_of(const struct tokenizer *tokenizer)
{
    static const char *const ends[] = {"<|im_end|>", "<|eot_id|>", "</s>"};
    struct vocabulary *vocabulary = NULL;
    struct error err = {0};
    uint32_t eos[COUNT(ends)];
    int64_t num_eos = 0;
    for (size_t i = 0; i < COUNT(ends); i++)
        num_eos += tokenizer_token_id(tokenizer, ends[i], &eos[num_eos]);
    assert_true(num_eos > 0);
    if (vocabulary_create(&vocabulary, tokenizer, eos, num_eos, &err))
        fail_msg("%s", err.msg);
    return vocabulary;
}

static void test_outputs(void **state)
{
    json_t *list = test_json(tools_text);
    struct opened opened = {0};
    struct vocabulary *known = NULL;
    (void)state;
    for (size_t i = 0; i < COUNT(outputs); i++) {
        if (i == 0 || strcmp(outputs[i].tokenizer, outputs[i - 1].tokenizer) != 0) {
            vocabulary_free(known);
            if (i)
                close_opened(&opened);
            opened = open_family(outputs[i].tokenizer);
            known = vocabulary_of(opened.tok);
        }
        struct grammar *grammar = grammar_of(known, list, outputs[i].format, outputs[i].mode);
        struct token_list ids = encode(opened.tok, outputs[i].text, strlen(outputs[i].text), 0);
        if (follows(grammar, &ids) != outputs[i].allowed)
            fail_msg("%s, mode %d: %s is %s", outputs[i].tokenizer, (int)outputs[i].mode, outputs[i].text,
                     outputs[i].allowed ? "refused" : "allowed");
        free(ids.ids);
        grammar_free(grammar);
    }
    vocabulary_free(known);
    close_opened(&opened);
    json_decref(list);
}

// ---- what the grammar allows, the parser finds ---------------------------------------------------------------------

struct found {
    char arguments[4096];
    size_t bytes;
    char name[16];
    int calls;
    bool content;
    const char *only;
};

static void on_delta(void *arg, const struct output_delta *delta)
{
    struct found *found = arg;
    switch ((int)delta->type) {
    case DELTA_TOOL_BEGIN:
        snprintf(found->name, sizeof found->name, "%.*s", (int)delta->bytes, delta->text);
        found->bytes = 0;
        break;
    case DELTA_TOOL_ARGUMENTS:
        assert_true(found->bytes + delta->bytes < sizeof found->arguments);
        memcpy(found->arguments + found->bytes, delta->text, delta->bytes);
        found->bytes += delta->bytes;
        break;
    case DELTA_TOOL_END: {
        json_t *arguments = json_loadb(found->arguments, found->bytes, 0, NULL);
        bool right = json_is_object(arguments);
        if (strcmp(found->name, "add") == 0)
            right &= json_is_integer(json_object_get(arguments, "a"));
        else if (strcmp(found->name, "see") == 0)
            right &= json_is_string(json_object_get(arguments, "c"));
        else if (strcmp(found->name, "now") == 0)
            right &= json_object_size(arguments) == 0;
        else
            right &= strcmp(found->name, "any") == 0;
        if (!right || (found->only && strcmp(found->only, found->name) != 0))
            fail_msg("%s(%.*s)", found->name, (int)found->bytes, found->arguments);
        json_decref(arguments);
        found->calls++;
        break;
    }
    default:
        found->content = true;
    }
}

static void test_round_trip(void **state)
{
    static struct test_vocabulary vocabulary;
    json_t *list = test_json(tools_text);
    int whole = 0;
    (void)state;
    test_vocabulary_open(&vocabulary, 400);
    for (int round = 0; round < 800; round++) {
        enum tool_format format = TOOLS_HERMES + (enum tool_format)(round % 4);
        enum mode mode = round / 4 % 2 ? REQUIRED : NAMED;
        struct grammar *grammar = grammar_of(vocabulary.vocabulary, list, format, mode);
        struct grammar_state *sentence = test_state(grammar);
        struct found found = {.only = mode == NAMED ? "add" : NULL};
        struct output_parser *parser = NULL;
        struct error err = {0};
        char text[2048];
        int64_t bytes = test_walk(&vocabulary, sentence, text, sizeof text, NULL);
        grammar_state_free(sentence);
        grammar_free(grammar);
        if (bytes < 0)
            continue; // too long
        assert_int_equal(
            output_parser_create(&parser, (struct output_format){format, false}, true, false, on_delta, &found, &err),
            0);
        assert_int_equal(output_parser_push(parser, text, (size_t)bytes, &err), 0);
        assert_int_equal(output_parser_finish(parser, &err), 0);
        output_parser_free(parser);
        if (found.calls < 1 || found.content || (mode == NAMED && found.calls != 1))
            fail_msg("%d calls in %.*s", found.calls, (int)bytes, text);
        whole++;
    }
    assert_true(whole > 400);
    test_vocabulary_close(&vocabulary);
    json_decref(list);
}

// ---- what is refused -----------------------------------------------------------------------------------------------

#define FUNCTION(name, more) "[{\"type\": \"function\", \"function\": {\"name\": \"" name "\"" more "}}]"

static void test_refusals(void **state)
{
    static const struct {
        enum tool_format format;
        const char *tools, *message; // NULL: accepted
    } refused[] = {
        {TOOLS_HERMES, FUNCTION("f", ", \"parameters\": {\"type\": \"array\"}"),
         "tools[0].function.parameters.type must be \"object\""},
        {TOOLS_HERMES, FUNCTION("f", ", \"parameters\": {\"type\": [\"object\", \"null\"]}"),
         "tools[0].function.parameters.type must be \"object\""},
        {TOOLS_HERMES, FUNCTION("f", ", \"parameters\": {\"properties\": {\"a\": {\"type\": \"nothing\"}}}"),
         "tools[0].function.parameters"},
        {TOOLS_HERMES, FUNCTION("a\\\"\\u00e9 b", ", \"parameters\": {}"), NULL},
        {TOOLS_HERMES, FUNCTION("f", ", \"parameters\": {\"anyOf\": [{\"type\": \"object\"}]}"), NULL},
        {TOOLS_MISTRAL_V11, FUNCTION("a b", ""), "tools[0].function.name"},
        {TOOLS_MISTRAL_V11, FUNCTION("a.b-c_D/9:x", ""), NULL},
    };
    static struct test_vocabulary vocabulary;
    (void)state;
    test_vocabulary_open(&vocabulary, 0);
    for (size_t i = 0; i < COUNT(refused); i++) {
        json_t *list = test_json(refused[i].tools);
        struct chat_tools tools = tools_of(list, refused[i].format, REQUIRED);
        struct grammar *grammar = test_grammar_new(vocabulary.vocabulary);
        struct error err = {0};
        int rc = chat_tools_add(grammar, &tools, &err);
        rc = rc ? rc : grammar_compile(grammar, &err);
        if (rc != (refused[i].message ? ERR_USAGE : 0) || (rc && !strstr(err.msg, refused[i].message)))
            fail_msg("%s: %d %s", refused[i].tools, rc, err.msg);
        grammar_free(grammar);
        json_decref(list);
    }
    test_vocabulary_close(&vocabulary);
    json_t *loose = test_json(FUNCTION("f", ""));
    struct chat_tools tools = tools_of(loose, TOOLS_HERMES, AUTO);
    assert_false(chat_tools_restrict(&tools));
    tools.required = true;
    assert_true(chat_tools_restrict(&tools));
    tools.format = TOOLS_NONE;
    assert_false(chat_tools_restrict(&tools));
    json_decref(loose);
}

// ---- messages ------------------------------------------------------------------------------------------------------

static void test_ids(void **state)
{
    static const char before[] =
        "[{\"role\": \"user\"}, {\"tool_calls\": [{\"id\": \"call_0123456789ab\"}, {\"id\": \"a-1\"}, {}, 5]},"
        " {\"tool_call_id\": \"call_0123456789ab\"}, {\"tool_call_id\": \"abcdefghi\"}, {\"tool_call_id\": \"\"}, 7, "
        "{\"tool_calls\": 3}]";
    static const char after[] =
        "[{\"role\": \"user\"}, {\"tool_calls\": [{\"id\": \"3456789ab\"}, {\"id\": \"0000000a1\"}, {}, 5]},"
        " {\"tool_call_id\": \"3456789ab\"}, {\"tool_call_id\": \"abcdefghi\"}, {\"tool_call_id\": \"000000000\"}, 7, "
        "{\"tool_calls\": 3}]";
    json_t *messages = test_json(before), *same = test_json(before), *wanted = test_json(after);
    struct error err = {0};
    (void)state;
    assert_int_equal(chat_tools_fit_ids(messages, TOOLS_HERMES, &err), 0);
    assert_true(json_equal(messages, same));
    assert_int_equal(chat_tools_fit_ids(messages, TOOLS_MISTRAL, &err), 0);
    assert_true(json_equal(messages, wanted));
    json_decref(messages);
    json_decref(same);
    json_decref(wanted);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_outputs),
        cmocka_unit_test(test_round_trip),
        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_ids),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
