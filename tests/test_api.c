// The API on a real server with an engine that plays tokens back: routes, keys, origins, states, what the engine refuses. Answers:
// test_api_answers.c, test_api_stream.c; clients that leave: test_api_clients.c.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/api_help.h"

// ---- routes ------------------------------------------------------------------------------------------------------

static const struct {
    const char *method, *path, *headers, *body;
    int status;
    const char *words; // of the body
} routes[] = {
    {"GET", "/health", "", "", 200, "{\"status\":\"ok\"}"},
    {"GET", "/v1/health", "", "", 200, "{\"status\":\"ok\"}"},
    {"GET", "/ping", "", "", 200, ""},
    {"HEAD", "/health", "", "", 200, ""},
    {"GET", "/version", "", "", 200, "{\"version\":\"1.2.3\"}"},
    {"GET", "/metrics", "", "", 200, "a_metric 1"},
    {"GET", "/v1/models", "", "", 200, "\"id\":\"test-model\""},
    {"GET", "/v1/models/alias", "", "", 200, "\"max_model_len\":1048576"},
    {"GET", "/v1/models/none", "", "", 404, "model_not_found"},
    {"GET", "/v1/models/", "", "", 404, "not_found"},
    {"GET", "/props", "", "", 200, "\"state\":\"ok\""},
    {"GET", "/info", "", "", 200, "\"vocab_size\""},
    {"GET", "/v1/stats", "", "", 200, "\"kv_pages_used\""},
    {"GET", "/", "", "", 404, "the API begins at /v1"},
    {"GET", "/nowhere", "", "", 404, "there is nothing at /nowhere"},
    {"GET", "/v1/../health", "", "", 404, "not_found"},
    {"POST", "/health", "", "", 405, "method_not_allowed"},
    {"GET", CHAT, "", "", 405, "method_not_allowed"},
    {"DELETE", CHAT, "", "", 405, "takes POST, not DELETE"},
    {"OPTIONS", CHAT, "Origin: https://a\r\nAccess-Control-Request-Method: POST\r\n", "", 405, "method_not_allowed"},
    {"POST", CHAT, "Content-Type: multipart/form-data; boundary=x\r\n", "{}", 415, "application/json"},
    {"POST", CHAT, "Content-Type: application/x-www-form-urlencoded\r\n", "{" HELLO "}", 200, "chat.completion"},
    {"POST", CHAT, "Content-Encoding: gzip\r\n", "{" HELLO "}", 415, "Content-Encoding"},
    {"POST", CHAT, "Content-Encoding: identity\r\n", "{" HELLO "}", 200, "chat.completion"},
    {"POST", CHAT, "", "{" HELLO "}", 200, "chat.completion"},
    {"POST", CHAT, "", "", 400, "the body is empty"},
    {"POST", CHAT, "", "{}", 400, "messages is missing"},
    {"POST", CHAT, "", "{\"model\":\"x\"," HELLO "}", 404, "model_not_found"},
    {"POST", CHAT, "", "{" HELLO ",\"response_format\":{\"type\":\"json_object\"}}", 400,
     "not supported for this model"},
    {"POST", "/v1/completions", "", "{\"prompt\":\"\"}", 400, "the prompt has no tokens"},
    {"POST", "/v1/completions", "", "{\"prompt\":[1,\"a\"]}", 400, "a list of token ids"},
    {"POST", "/v1/completions", "", "{\"prompt\":[[1],\"a\",{}]}", 400, "a string, a list of token ids"},
    {"POST", "/v1/completions", "", "{\"prompt\":[99999999]}", 400, "token id 99999999"},
    {"POST", "/tokenize", "", "{\"prompt\":\"hello\"}", 200, "\"tokens\":["},
    {"POST", "/tokenize", "", "{\"content\":\"hello\"}", 200, "\"count\":"},
    {"POST", "/tokenize", "", "{" HELLO "}", 200, "\"max_model_len\":1048576"},
    {"POST", "/tokenize", "", "{}", 400, "prompt must be a string"},
    {"POST", "/tokenize", "", "[]", 400, "must be a JSON object"},
    {"POST", "/detokenize", "", "{\"tokens\":\"x\"}", 400, "tokens must be a list"},
    {"POST", "/detokenize", "", "{\"tokens\":[-1]}", 400, "token id -1"},
    {"POST", "/apply-template", "", "{" HELLO "}", 200,
     "<|im_start|>user\\nhello<|im_end|>\\n<|im_start|>assistant\\n"},
    {"POST", "/apply-template", "", "{" HELLO ",\"add_generation_prompt\":false}", 200, "hello<|im_end|>\\n\"}"},
    {"POST", "/invocations", "", "{" HELLO "}", 200, "chat.completion"},
    {"POST", "/invocations", "", "{\"prompt\":\"a\"}", 200, "text_completion"},
    {"POST", "/invocations", "", "{", 400, "not valid JSON"},
};

static void test_routes(void **state)
{
    struct test_server *server = *state;
    for (size_t i = 0; i < COUNT(routes); i++) {
        struct answer answer = call(server->port, routes[i].method, routes[i].path, routes[i].headers, routes[i].body);
        if (answer.status != routes[i].status || !strstr(answer.body, routes[i].words) || !answer.complete)
            if (strcmp(routes[i].method, "HEAD") != 0 || answer.status != 200)
                fail_msg("%s %s: %d %.300s", routes[i].method, routes[i].path, answer.status, answer.body);
        assert_non_null(answer_header(&answer, "X-Request-Id"));
        assert_null(answer_header(&answer, "Access-Control-Allow-Origin"));
        if (answer.status >= 400)
            check_shape(&answer);
        if (answer.status == 405)
            assert_non_null(answer_header(&answer, "Allow"));
        answer_free(&answer);
    }
}

// Text -> ids -> text.
static void test_round_trip(void **state)
{
    struct test_server *server = *state;
    struct answer answer = post(server, "/tokenize", "{\"prompt\":\"h\\u00e9llo <|im_end|> \\ud83d\\ude00\"}");
    json_t *json = answer_json(&answer), *again;
    char *tokens = json_dumps(at(json, "tokens"), JSON_COMPACT), *body = NULL;
    assert_int_equal(number_at(json, "count"), json_array_size(at(json, "tokens")));
    assert_true(asprintf(&body, "{\"tokens\":%s}", tokens) > 0);
    struct answer back = post(server, "/detokenize", body);
    again = answer_json(&back);
    assert_string_equal(text_at(again, "prompt"), "h\u00e9llo <|im_end|> \U0001F600");
    assert_string_equal(text_at(again, "content"), text_at(again, "prompt"));
    json_decref(json);
    json_decref(again);
    answer_free(&answer);
    answer_free(&back);
    free(tokens);
    free(body);
}

static void test_request_ids(void **state)
{
    struct test_server *server = *state;
    static const struct {
        const char *header, *id; // NULL: a new one
    } cases[] = {{"X-Request-Id: mine-1_2.3\r\n", "mine-1_2.3"},
                 {"", NULL},
                 {"X-Request-Id: a b\r\n", NULL},
                 {"X-Request-Id: \"x\"\r\n", NULL},
                 {"X-Request-Id:\r\n", NULL}};
    for (size_t i = 0; i < COUNT(cases); i++) {
        struct answer answer = call(server->port, "GET", i % 2 ? "/nowhere" : "/health", cases[i].header, "");
        const char *id = answer_header(&answer, "X-Request-Id");
        assert_true(cases[i].id ? header_is(&answer, "X-Request-Id", cases[i].id) : strncmp(id, "req-", 4) == 0);
        answer_free(&answer);
    }
    struct answer answer = call(server->port, "POST", CHAT, "X-Request-Id: kept\r\n", "{" HELLO ",\"stream\":true}");
    assert_true(header_is(&answer, "X-Request-Id", "kept"));
    answer_free(&answer);
}

// ---- keys and origins --------------------------------------------------------------------------------------------

static void test_keys(void **state)
{
    (void)state;
    static const char *const keys[] = {"secret-one", "secret-two", "s"};
    char longest[8000] = "Authorization: Bearer ";
    memset(longest + 22, 'k', 6000);
    strcpy(longest + 6022, "\r\n");
    const struct {
        const char *header;
        int status;
    } cases[] = {{"", 401},
                 {"Authorization: Bearer secret-one\r\n", 200},
                 {"Authorization: bearer secret-two\r\n", 200},
                 {"Authorization: Bearer  s\r\n", 200},
                 {"Authorization: Bearer secret-on\r\n", 401},
                 {"Authorization: Bearer secret-onee\r\n", 401},
                 {"Authorization: Bearer \r\n", 401},
                 {"Authorization: Basic secret-one\r\n", 401},
                 {"Authorization: secret-one\r\n", 401},
                 {"X-Api-Key: secret-one\r\n", 401},
                 {longest, 401}};
    static const char *const closed[] = {"/v1/models", "/version", "/metrics", "/props", "/v1/stats", "/nowhere"},
                             *const open[] = {"/health", "/v1/health", "/ping"};
    struct test_server server;
    test_server_init(&server);
    server.options.keys = keys;
    server.options.num_keys = COUNT(keys);
    test_server_start(&server);
    play(&server, "x");
    for (size_t i = 0; i < COUNT(cases); i++) {
        struct answer answer = call(server.port, "POST", CHAT, cases[i].header, "{" HELLO "}");
        if (answer.status != cases[i].status)
            fail_msg("%.40s: %d", cases[i].header, answer.status);
        if (answer.status == 401) {
            check_shape(&answer);
            assert_non_null(strstr(answer.body, "invalid_api_key"));
            assert_true(header_is(&answer, "WWW-Authenticate", "Bearer"));
        }
        answer_free(&answer);
    }
    for (size_t i = 0; i < COUNT(closed) + COUNT(open); i++) {
        const char *path = i < COUNT(closed) ? closed[i] : open[i - COUNT(closed)];
        struct answer answer = call(server.port, "GET", path, "", "");
        assert_int_equal(answer.status, i < COUNT(closed) ? 401 : 200);
        answer_free(&answer);
    }
    // Keys, salts and nothing else tell caches apart.
    uint64_t salts[4], tenants[4];
    for (int i = 0; i < 4; i++) {
        struct answer answer = call(server.port, "POST", CHAT, cases[i < 2 ? 1 : 2].header,
                                    i == 3 ? "{" HELLO ",\"cache_salt\":\"x\"}" : "{" HELLO "}");
        assert_int_equal(answer.status, 200);
        salts[i] = server.fake.seen.salt;
        tenants[i] = server.fake.seen.tenant;
        answer_free(&answer);
    }
    assert_true(salts[0] == salts[1] && salts[1] != salts[2] && salts[2] != salts[3] && salts[1] != salts[3]);
    assert_true(tenants[0] == tenants[1] && tenants[1] != tenants[2] && tenants[2] == tenants[3]);
    wait_for_quiet(&server);
    test_server_stop(&server);
    // Keys that no header can carry are found at the start.
    static const char *const bad[] = {"", "a b", "\xc3\xa9"};
    for (size_t i = 0; i < COUNT(bad); i++) {
        struct api_auth *auth;
        struct error err;
        assert_int_equal(api_auth_create(&auth, &bad[i], 1, &err), ERR_USAGE);
    }
}

static void test_origins(void **state)
{
    (void)state;
    static const char *const origins[] = {"https://a.example", "http://localhost:3000"};
    struct test_server server;
    test_server_init(&server);
    server.options.cors_origins = origins;
    server.options.num_cors_origins = COUNT(origins);
    test_server_start(&server);
    struct answer answer = call(server.port, "OPTIONS", CHAT,
                                "Origin: https://a.example\r\nAccess-Control-Request-Method: POST\r\n"
                                "Access-Control-Request-Headers: authorization,x-stainless-os\r\n",
                                "");
    assert_int_equal(answer.status, 204);
    assert_true(header_is(&answer, "Access-Control-Allow-Origin", "https://a.example"));
    assert_true(header_is(&answer, "Access-Control-Allow-Headers", "authorization,x-stainless-os"));
    assert_null(answer_header(&answer, "Access-Control-Allow-Credentials"));
    answer_free(&answer);
    answer = call(server.port, "GET", "/v1/models", "Origin: http://localhost:3000\r\n", "");
    assert_true(answer.status == 200 && header_is(&answer, "Access-Control-Allow-Origin", "http://localhost:3000"));
    assert_true(header_is(&answer, "Vary", "Origin"));
    answer_free(&answer);
    answer = call(server.port, "GET", "/v1/models", "Origin: https://evil.example\r\n", "");
    assert_true(answer.status == 200 && !answer_header(&answer, "Access-Control-Allow-Origin"));
    answer_free(&answer);
    answer = call(server.port, "OPTIONS", CHAT, "Origin: https://evil.example\r\n", "");
    assert_true(answer.status == 405 && !answer_header(&answer, "Access-Control-Allow-Origin"));
    answer_free(&answer);
    test_server_stop(&server);
}

// ---- states ------------------------------------------------------------------------------------------------------

static void test_states(void **state)
{
    struct test_server *server = *state;
    static const struct {
        enum engine_state state;
        int health, ping, chat;
        const char *word;
    } cases[] = {{ENGINE_LOADING, 503, 204, 503, "loading"},
                 {ENGINE_READY, 200, 200, 200, "ok"},
                 {ENGINE_RESTARTING, 503, 204, 503, "restarting"},
                 {ENGINE_DRAINING, 503, 503, 503, "draining"},
                 {ENGINE_FAILED, 503, 503, 503, "failed"}};
    for (size_t i = 0; i < COUNT(cases); i++) {
        FAKE_SET(server, state, cases[i].state);
        int ports[] = {server->port, server->health_port};
        for (int p = 0; p < 2; p++) {
            struct answer health = call(ports[p], "GET", "/health", "", ""),
                          ping = call(ports[p], "GET", "/ping", "", ""),
                          alive = call(ports[p], "GET", "/health?live=1", "", "");
            assert_int_equal(health.status, cases[i].health);
            assert_int_equal(ping.status, cases[i].ping);
            assert_int_equal(alive.status, 200);
            assert_non_null(strstr(health.body, cases[i].word));
            answer_free(&health);
            answer_free(&ping);
            answer_free(&alive);
        }
        struct answer chat = post(server, CHAT, "{" HELLO "}"),
                      tokens = post(server, "/tokenize", "{\"prompt\":\"a\"}"),
                      other = call(server->health_port, "GET", "/v1/models", "", "");
        assert_int_equal(chat.status, cases[i].chat);
        if (chat.status == 503) {
            check_shape(&chat);
            assert_non_null(answer_header(&chat, "Retry-After"));
        }
        assert_int_equal(tokens.status, 200);
        assert_int_equal(other.status, 404);
        answer_free(&chat);
        answer_free(&tokens);
        answer_free(&other);
    }
}

// Before the tokenizer is there.
static void test_loading(void **state)
{
    (void)state;
    struct test_server server;
    test_server_init(&server);
    server.model.tokenizer = NULL;
    test_server_start(&server);
    struct answer health = call(server.port, "GET", "/health", "", ""), tokens = post(&server, "/tokenize", "{}"),
                  models = call(server.port, "GET", "/v1/models", "", "");
    assert_true(health.status == 503 && strstr(health.body, "loading"));
    assert_true(tokens.status == 503 && models.status == 200);
    answer_free(&health);
    answer_free(&tokens);
    answer_free(&models);
    test_server_stop(&server);
}

static void test_submit_errors(void **state)
{
    struct test_server *server = *state;
    static const struct {
        int code, status;
        const char *word, *retry;
    } cases[] = {{ERR_BUSY, 429, "queue_full", "3"},
                 {ERR_RANK, 503, "not_ready", "5"},
                 {ERR_USAGE, 400, "context_length_exceeded", NULL},
                 {ERR_MEMORY, 503, "out_of_memory", "1"},
                 {ERR_OTHER, 500, "server_error", NULL}};
    for (size_t i = 0; i < COUNT(cases); i++)
        for (int stream = 0; stream < 2; stream++) {
            FAKE_SET(server, submit_error, cases[i].code);
            struct answer answer = post(server, CHAT, stream ? "{" HELLO ",\"stream\":true}" : "{" HELLO "}");
            assert_int_equal(answer.status, cases[i].status);
            check_shape(&answer);
            assert_non_null(strstr(answer.body, cases[i].word));
            assert_true(cases[i].retry ? header_is(&answer, "Retry-After", cases[i].retry)
                                       : !answer_header(&answer, "Retry-After"));
            answer_free(&answer);
        }
    // Not every refusal is about the prompt's length.
    FAKE_SET(server, submit_error, ERR_USAGE);
    FAKE_SET(server, pages, 1000);
    struct answer many = post(server, CHAT, "{" HELLO ",\"n\":2}");
    assert_true(many.status == 400 && strstr(many.body, "\"param\":\"n\",\"code\":null"));
    answer_free(&many);
    many = post(server, "/v1/completions", "{\"prompt\":[\"a\",\"b\"],\"n\":2}");
    assert_true(many.status == 400 && strstr(many.body, "\"param\":\"prompt\",\"code\":null"));
    answer_free(&many);
    // The sequences of several prompts are taken together or not at all.
    FAKE_SET(server, submit_error, 0);
    many = post(server, "/v1/completions", "{\"prompt\":[\"a\",\"b\",\"c\"],\"n\":2}");
    assert_int_equal(many.status, 200);
    assert_int_equal(server->fake.seen_count, 6);
    answer_free(&many);
}

// Prompts that leave no room.
static void test_context(void **state)
{
    (void)state;
    struct test_server server;
    test_server_init(&server);
    server.model.context = 8;
    test_server_start(&server);
    play(&server, "one two three four five six seven eight nine ten");
    struct answer answer = post(&server, "/v1/completions", "{\"prompt\":[1,2,3,4,5,6,7,8]}");
    assert_true(answer.status == 400 && strstr(answer.body, "context_length_exceeded") &&
                strstr(answer.body, "\"prompt\""));
    answer_free(&answer);
    answer = post(&server, "/v1/completions", "{\"prompt\":[1],\"min_tokens\":5,\"max_tokens\":6}");
    assert_int_equal(server.fake.seen.max_tokens, 6);
    answer_free(&answer);
    answer = post(&server, "/v1/completions", "{\"prompt\":[1,2,3,4,5,6],\"max_tokens\":100}");
    json_t *json = answer_json(&answer);
    assert_int_equal(number_at(json, "usage.completion_tokens"), 2);
    assert_string_equal(text_at(json, "choices.0.finish_reason"), "length");
    json_decref(json);
    answer_free(&answer);
    wait_for_quiet(&server);
    test_server_stop(&server);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        WITH_SERVER(test_routes),       WITH_SERVER(test_round_trip),    WITH_SERVER(test_request_ids),
        cmocka_unit_test(test_keys),    cmocka_unit_test(test_origins),  WITH_SERVER(test_states),
        cmocka_unit_test(test_loading), WITH_SERVER(test_submit_errors), cmocka_unit_test(test_context),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
