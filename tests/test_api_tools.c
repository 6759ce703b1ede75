// The API with what it has around it: calls of tools and reasoning in both kinds of answers, restricted output, the page, and a server that has
// too much to read.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/api_help.h"

#define TOOL                                                                                                           \
    "{\"type\":\"function\",\"function\":{\"name\":\"f\",\"parameters\":{\"type\":\"object\",\"properties\":{\"a\":{"  \
    "\"type\":\"integer\"}}}}}"

static void stop(struct test_server *server)
{
    wait_for_quiet(server);
    test_server_stop(server);
}

// ---- calls and reasoning -----------------------------------------------------------------------------------------

// A stream put together again, as clients do it.
struct joined {
    char content[512], reasoning[512], names[4][64], arguments[4][256], ids[4][64], finish[32];
    int num_calls;
};

static void join_calls(struct joined *joined, const json_t *calls)
{
    for (size_t i = 0; i < json_array_size(calls); i++) {
        const json_t *call = json_array_get(calls, i);
        int index = (int)number_at(call, "index");
        const char *name = json_string_value(at(call, "function.name")),
                   *arguments = json_string_value(at(call, "function.arguments"));
        assert_true(index >= 0 && index < 4);
        if (name) {
            assert_int_equal(index, joined->num_calls);
            joined->num_calls++;
            strcpy(joined->names[index], name);
            strcpy(joined->ids[index], text_at(call, "id"));
        }
        strcat(joined->arguments[index], arguments);
    }
}

static void join_stream(struct joined *joined, char *body)
{
    memset(joined, 0, sizeof *joined);
    for (char *line = body, *end; (end = strstr(line, "\n\n")); line = end + 2) {
        *end = 0;
        json_t *event = json_loads(line + 6, 0, NULL);
        const json_t *choice = at(event, "choices.0");
        const char *content = json_string_value(at(choice, "delta.content")),
                   *reasoning = json_string_value(at(choice, "delta.reasoning_content")),
                   *finish = json_string_value(at(choice, "finish_reason"));
        strcat(joined->content, content ? content : "");
        strcat(joined->reasoning, reasoning ? reasoning : "");
        strcat(joined->finish, finish ? finish : "");
        join_calls(joined, at(choice, "delta.tool_calls"));
        json_decref(event);
    }
}

static const struct {
    const char *text;
    bool tools;
    const char *content, *reasoning, *finish;
    int num_calls;
    const char *names[2], *arguments[2];
} outputs[] = {
    {"Hello.", true, "Hello.", "", "stop", 0, {0}, {0}},
    {"<think>\nhm\n</think>\n\nHello.", true, "Hello.", "hm", "stop", 0, {0}, {0}},
    {"<think>\nhm\n</think>\n\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n</tool_call>",
     true,
     "",
     "hm",
     "tool_calls",
     1,
     {"f"},
     {"{\"a\": 1}"}},
    {"<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": \"\u20ac\\n\"}}\n</tool_call>\n<tool_call>\n{\"name\": "
     "\"f\", "
     "\"arguments\": {}}\n</tool_call>",
     true,
     "",
     "",
     "tool_calls",
     2,
     {"f", "f"},
     {"{\"a\": \"\u20ac\\n\"}", "{}"}},
    {"<tool_call>x</tool_call>", false, "<tool_call>x</tool_call>", "", "stop", 0, {0}, {0}},
};

static const char *trimmed(char *text)
{
    size_t bytes = strlen(text);
    while (bytes > 0 && text[bytes - 1] == '\n')
        text[--bytes] = 0;
    return text + strspn(text, "\n");
}

static void check_whole(const struct answer *answer, size_t i, const struct joined *streamed)
{
    json_t *json = answer_json(answer);
    const json_t *message = at(json, "choices.0.message"), *calls = at(message, "tool_calls");
    const char *content = json_string_value(at(message, "content")),
               *reasoning = json_string_value(at(message, "reasoning_content"));
    assert_string_equal(text_at(json, "choices.0.finish_reason"), outputs[i].finish);
    assert_string_equal(content ? content : "", streamed->content);
    assert_string_equal(reasoning ? reasoning : "", streamed->reasoning);
    assert_int_equal(json_array_size(calls), outputs[i].num_calls);
    for (int c = 0; c < outputs[i].num_calls; c++) {
        const json_t *call = json_array_get(calls, (size_t)c);
        assert_string_equal(text_at(call, "type"), "function");
        assert_true(strncmp(text_at(call, "id"), "call_", 5) == 0);
        assert_string_equal(text_at(call, "function.name"), outputs[i].names[c]);
        assert_string_equal(text_at(call, "function.arguments"), streamed->arguments[c]);
    }
    json_decref(json);
}

static void test_outputs(void **state)
{
    (void)state;
    struct test_server server;
    struct joined joined;
    test_server_init(&server);
    server.model.format = (struct output_format){.tools = TOOLS_HERMES, .reasoning = true};
    test_server_start(&server);
    for (size_t i = 0; i < COUNT(outputs); i++)
        for (int batch = 1; batch < 8; batch += 3) {
            play(&server, outputs[i].text);
            FAKE_SET(&server, batch, batch);
            struct answer answer = post(&server, CHAT,
                                        outputs[i].tools ? "{" HELLO ",\"tools\":[" TOOL "],\"stream\":true}"
                                                         : "{" HELLO ",\"stream\":true}");
            assert_int_equal(answer.status, 200);
            join_stream(&joined, answer.body);
            answer_free(&answer);
            answer = post(&server, CHAT, outputs[i].tools ? "{" HELLO ",\"tools\":[" TOOL "]}" : "{" HELLO "}");
            assert_int_equal(answer.status, 200);
            check_whole(&answer, i, &joined);
            answer_free(&answer);
            assert_string_equal(joined.finish, outputs[i].finish);
            assert_int_equal(joined.num_calls, outputs[i].num_calls);
            assert_string_equal(trimmed(joined.content), outputs[i].content);
            assert_string_equal(trimmed(joined.reasoning), outputs[i].reasoning);
            for (int c = 0; c < joined.num_calls; c++) {
                assert_string_equal(joined.names[c], outputs[i].names[c]);
                assert_string_equal(joined.arguments[c], outputs[i].arguments[c]);
                assert_true(strncmp(joined.ids[c], "call_", 5) == 0);
            }
        }
    stop(&server);
}

// ---- restricted output -------------------------------------------------------------------------------------------

#define FORMAT(schema)                                                                                                 \
    "{" HELLO ",\"response_format\":{\"type\":\"json_schema\",\"json_schema\":{\"schema\":" schema "}}}"

static const struct {
    const char *body;
    int status;
    const char *words; // of the answer
    bool filter;
} restricted[] = {
    {"{" HELLO "}", 200, "chat.completion", false},
    {"{" HELLO ",\"response_format\":{\"type\":\"json_object\"}}", 200, "chat.completion", true},
    {"{" HELLO ",\"response_format\":{\"type\":\"json_object\"},\"n\":3,\"stream\":true}", 200, "[DONE]", true},
    {FORMAT("{\"type\":\"object\",\"properties\":{\"a\":{\"type\":\"integer\"}}}"), 200, "chat.completion", true},
    {FORMAT("{\"type\":\"nonsense\"}"), 400, "response_format.json_schema.schema", false},
    {FORMAT("false"), 400, "response_format.json_schema.schema", false},
    {"{" HELLO ",\"tools\":[" TOOL "]}", 200, "chat.completion", false},
    {"{" HELLO ",\"tools\":[" TOOL "],\"tool_choice\":\"required\"}", 200, "chat.completion", true},
    {"{" HELLO ",\"tools\":[" TOOL "],\"tool_choice\":\"none\"}", 200, "chat.completion", false},
};

static void test_restricted(void **state)
{
    (void)state;
    struct test_server server;
    struct vocabulary *vocabulary;
    struct error err;
    test_server_init(&server);
    if (vocabulary_create(&vocabulary, server.tokenizer.tok, test_eos, COUNT(test_eos), &err))
        fail_msg("%s", err.msg);
    server.model.vocabulary = vocabulary;
    server.model.format.tools = TOOLS_HERMES;
    test_server_start(&server);
    play(&server, "{}");
    for (size_t i = 0; i < COUNT(restricted); i++) {
        FAKE_SET(&server, seen.filter, NULL);
        struct answer answer = post(&server, CHAT, restricted[i].body);
        if (answer.status != restricted[i].status || !strstr(answer.body, restricted[i].words))
            fail_msg("%s: %d %s", restricted[i].body, answer.status, answer.body);
        assert_int_equal(server.fake.seen.filter != NULL, restricted[i].filter);
        answer_free(&answer);
    }
    stop(&server);
    vocabulary_free(vocabulary);
}

// A model that writes into channels: what it thinks, a call, an answer; calls cannot be forced, the answer's format can.
static void test_channels(void **state)
{
    (void)state;
    static const struct {
        const char *text, *content, *reasoning, *arguments, *finish;
    } answers[] = {
        {"<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.f "
         "<|constrain|>json<|message|>{\"a\": 1}<|call|>",
         "", "Hm.", "{\"a\": 1}", "tool_calls"},
        {"<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Four.<|return|>",
         "Four.", "Hm.", "", "stop"},
    };
    struct test_server server;
    struct vocabulary *vocabulary;
    struct joined joined;
    struct error err;
    test_server_init(&server);
    if (vocabulary_create(&vocabulary, server.tokenizer.tok, test_eos, COUNT(test_eos), &err))
        fail_msg("%s", err.msg);
    server.model.vocabulary = vocabulary;
    server.model.format = (struct output_format){.tools = TOOLS_HARMONY, .reasoning = true};
    test_server_start(&server);
    for (size_t i = 0; i < COUNT(answers); i++) {
        play(&server, answers[i].text);
        struct answer answer = post(&server, CHAT, "{" HELLO ",\"tools\":[" TOOL "],\"stream\":true}");
        assert_int_equal(answer.status, 200);
        join_stream(&joined, answer.body);
        answer_free(&answer);
        assert_string_equal(joined.content, answers[i].content);
        assert_string_equal(joined.reasoning, answers[i].reasoning);
        assert_string_equal(joined.finish, answers[i].finish);
        assert_int_equal(joined.num_calls, *answers[i].arguments != 0);
        assert_string_equal(joined.num_calls ? joined.arguments[0] : "", answers[i].arguments);
    }
    struct answer answer = post(&server, CHAT, "{" HELLO ",\"tools\":[" TOOL "],\"tool_choice\":\"required\"}");
    assert_true(answer.status == 400 && strstr(answer.body, "no form of calls that can be forced"));
    answer_free(&answer);
    FAKE_SET(&server, seen.filter, NULL);
    answer = post(&server, CHAT, "{" HELLO ",\"tools\":[" TOOL "],\"response_format\":{\"type\":\"json_object\"}}");
    assert_true(answer.status == 200 && server.fake.seen.filter);
    answer_free(&answer);
    stop(&server);
    vocabulary_free(vocabulary);
}

// ---- the page ----------------------------------------------------------------------------------------------------

static void test_page(void **state)
{
    (void)state;
    static const char *const keys[] = {"k"};
    struct test_server server;
    test_server_init(&server);
    server.options.page = "<p>page</p>";
    server.options.page_bytes = 11;
    server.options.page_policy = "default-src 'none'";
    server.options.keys = keys;
    server.options.num_keys = 1;
    test_server_start(&server);
    struct answer answer = call(server.port, "GET", "/", "", "");
    assert_int_equal(answer.status, 200);
    assert_string_equal(answer.body, "<p>page</p>");
    assert_true(header_is(&answer, "Content-Security-Policy", "default-src 'none'"));
    assert_true(header_is(&answer, "Content-Type", "text/html; charset=utf-8"));
    assert_true(header_is(&answer, "X-Content-Type-Options", "nosniff"));
    answer_free(&answer);
    answer = call(server.port, "GET", "/v1/stats", "", "");
    assert_int_equal(answer.status, 401);
    answer_free(&answer);
    stop(&server);
}

// ---- too much ----------------------------------------------------------------------------------------------------

static void test_overload(void **state)
{
    (void)state;
    struct test_server server;
    int fds[8], busy = 0, served = 0;
    test_server_init(&server);
    server.options.worker_threads = 1;
    server.options.max_jobs = 2;
    test_server_start(&server);
    play(&server, "x");
    FAKE_SET(&server, hold_submit, true);
    for (size_t i = 0; i < COUNT(fds); i++) {
        fds[i] = client_connect(server.port);
        client_request(fds[i], "POST", CHAT, "", "{" HELLO "}");
        usleep(10000);
    }
    struct answer health = call(server.port, "GET", "/health", "", "");
    assert_int_equal(health.status, 200);
    answer_free(&health);
    FAKE_SET(&server, hold_submit, false);
    for (size_t i = 0; i < COUNT(fds); i++) {
        struct answer answer = client_read(fds[i]);
        served += answer.status == 200;
        if (answer.status == 503) {
            busy++;
            assert_non_null(strstr(answer.body, "overloaded"));
            assert_true(header_is(&answer, "Retry-After", "1"));
        }
        answer_free(&answer);
        close(fds[i]);
    }
    assert_int_equal(served, 3); // one with the worker, two waiting
    assert_int_equal(busy, 5);
    stop(&server);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_outputs), cmocka_unit_test(test_restricted),
                                       cmocka_unit_test(test_channels), cmocka_unit_test(test_page),
                                       cmocka_unit_test(test_overload)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
