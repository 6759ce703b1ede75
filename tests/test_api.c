// The API on a real server with an engine that plays tokens back: routes, keys, answers, errors, and clients that leave at every phase.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/api_help.h"

#define CHAT "/v1/chat/completions"
#define HELLO "\"messages\":[{\"role\":\"user\",\"content\":\"hello\"}]"

static struct token_list script;

// The engine plays this text.
static void play(struct test_server *server, const char *text)
{
    free(script.ids);
    script = encode(server->tokenizer.tok, text, strlen(text), 0);
    FAKE_SET(server, tokens, script.ids);
    FAKE_SET(server, count, (int64_t)script.count);
}

static int setup(void **state)
{
    struct test_server *server = malloc(sizeof *server);
    test_server_init(server);
    test_server_start(server);
    play(server, "The answer is 42.");
    *state = server;
    return 0;
}

static int teardown(void **state)
{
    struct test_server *server = *state;
    wait_for_quiet(server);
    test_server_stop(server);
    free(server);
    free(script.ids);
    script = (struct token_list){0};
    return 0;
}

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

static void check_shape(const struct answer *answer)
{
    json_t *json = answer_json(answer);
    const json_t *error = at(json, "error");
    assert_true(json_is_string(at(error, "message")) && json_is_string(at(error, "type")));
    assert_true(json_object_get(error, "param") && json_object_get(error, "code") && json_object_size(error) == 4);
    json_decref(json);
}

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
            FAKE_SET(server, submit_limit, 0);
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
    FAKE_SET(server, submit_limit, 0);
    FAKE_SET(server, pages, 1000);
    struct answer many = post(server, CHAT, "{" HELLO ",\"n\":2}");
    assert_true(many.status == 400 && strstr(many.body, "\"param\":\"n\",\"code\":null"));
    answer_free(&many);
    // Some prompts are taken, then one is not: those that run are ended.
    FAKE_SET(server, submit_error, ERR_BUSY);
    FAKE_SET(server, submit_limit, 2);
    FAKE_SET(server, hold_after, 0);
    struct answer answer = post(server, "/v1/completions", "{\"prompt\":[\"a\",\"b\",\"c\"],\"n\":2}");
    assert_int_equal(answer.status, 429);
    answer_free(&answer);
    wait_for_quiet(server);
    assert_int_equal(server->fake.cancelled, 4);
    FAKE_SET(server, submit_error, 0);
    FAKE_SET(server, hold_after, -1);
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

// ---- answers -----------------------------------------------------------------------------------------------------

static void test_chat(void **state)
{
    struct test_server *server = *state;
    struct answer answer =
        post(server, CHAT, "{" HELLO ",\"model\":\"alias\",\"seed\":5,\"n\":2,\"temperature\":0.25}");
    json_t *json = answer_json(&answer);
    assert_int_equal(answer.status, 200);
    assert_true(strncmp(text_at(json, "id"), "chatcmpl-", 9) == 0);
    assert_string_equal(text_at(json, "object"), "chat.completion");
    assert_string_equal(text_at(json, "model"), "alias");
    for (int i = 0; i < 2; i++) {
        const json_t *choice = json_array_get(at(json, "choices"), (size_t)i);
        assert_int_equal(number_at(choice, "index"), i);
        assert_string_equal(text_at(choice, "message.role"), "assistant");
        assert_string_equal(text_at(choice, "message.content"), "The answer is 42.");
        assert_string_equal(text_at(choice, "finish_reason"), "stop");
        assert_true(json_is_null(at(choice, "logprobs")));
    }
    int64_t prompt = number_at(json, "usage.prompt_tokens");
    static const char prompt_text[] = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n";
    struct token_list ids = encode(server->tokenizer.tok, prompt_text, strlen(prompt_text), 0);
    assert_int_equal(prompt, ids.count);
    assert_int_equal(server->fake.seen.prompt_count, ids.count);
    assert_memory_equal(server->fake.seen_prompt, ids.ids, ids.count * sizeof *ids.ids);
    assert_int_equal(number_at(json, "usage.completion_tokens"), 2 * ((int64_t)script.count + 1));
    assert_int_equal(number_at(json, "usage.total_tokens"), prompt + 2 * ((int64_t)script.count + 1));
    assert_int_equal(number_at(json, "usage.prompt_tokens_details.cached_tokens"), prompt / 2);
    assert_true(json_number_value(at(json, "timings.queue_ms")) == 500);
    assert_true(server->fake.seen.sampling.temperature == 0.25 && server->fake.seen.sampling.seed == 5);
    assert_int_equal(server->fake.seen.max_tokens, server->model.context - prompt);
    free(ids.ids);
    json_decref(json);
    answer_free(&answer);
}

static void test_completions(void **state)
{
    struct test_server *server = *state;
    struct answer answer =
        post(server, "/v1/completions",
             "{\"prompt\":[\"a\",[5,6,7]],\"n\":2,\"max_tokens\":3,\"logprobs\":2,\"ignore_eos\":true,"
             "\"stop_token_ids\":[9],\"logit_bias\":{\"4\":1},\"min_tokens\":1}");
    json_t *json = answer_json(&answer);
    assert_int_equal(json_array_size(at(json, "choices")), 4);
    for (size_t i = 0; i < 4; i++) {
        const json_t *choice = json_array_get(at(json, "choices"), i);
        assert_int_equal(number_at(choice, "index"), i);
        assert_string_equal(text_at(choice, "finish_reason"), "length");
        assert_int_equal(json_array_size(at(choice, "logprobs.tokens")), 3);
        assert_int_equal(json_array_size(at(choice, "logprobs.token_logprobs")), 3);
        assert_int_equal(json_array_size(at(choice, "logprobs.text_offset")), 3);
        assert_true(json_object_size(at(choice, "logprobs.top_logprobs.0")) >= 1);
        char joined[256] = "";
        for (size_t t = 0; t < 3; t++) {
            assert_int_equal(json_integer_value(json_array_get(at(choice, "logprobs.text_offset"), t)), strlen(joined));
            strcat(joined, json_string_value(json_array_get(at(choice, "logprobs.tokens"), t)));
        }
        assert_string_equal(joined, text_at(choice, "text"));
    }
    assert_int_equal(number_at(json, "usage.completion_tokens"), 12);
    const struct sequence_spec *seen = &server->fake.seen;
    assert_true(seen->ignore_eos && seen->num_stop_ids == 1 && seen->num_edits == 1 && seen->min_tokens == 1);
    assert_true(seen->num_logprobs == 2 && seen->num_eos == 1);
    json_decref(json);
    answer_free(&answer);
    answer = post(server, "/v1/completions", "{\"prompt\":\"a\"}");
    assert_int_equal(server->fake.seen.max_tokens, 16);
    answer_free(&answer);
}

// Bytes and alternatives of a chat's logprobs; a character in pieces.
static void test_logprobs(void **state)
{
    struct test_server *server = *state;
    play(server, "a \U0001F9FF b");
    struct answer answer = post(server, CHAT, "{" HELLO ",\"logprobs\":true,\"top_logprobs\":3}");
    json_t *json = answer_json(&answer);
    const json_t *content = at(json, "choices.0.logprobs.content");
    char joined[64] = "";
    size_t bytes = 0;
    assert_int_equal(json_array_size(content), script.count);
    for (size_t i = 0; i < script.count; i++) {
        const json_t *token = json_array_get(content, i), *list = at(token, "bytes");
        assert_int_equal(json_array_size(at(token, "top_logprobs")), 3);
        assert_true(json_number_value(at(token, "logprob")) == -(double)(script.ids[i] % 97) / 8);
        assert_string_equal(text_at(token, "top_logprobs.0.token"), text_at(token, "token"));
        for (size_t b = 0; b < json_array_size(list); b++)
            joined[bytes++] = (char)json_integer_value(json_array_get(list, b));
    }
    assert_string_equal(joined, "a \U0001F9FF b");
    json_decref(json);
    answer_free(&answer);
}

static void test_special_tokens(void **state)
{
    struct test_server *server = *state;
    static const char *const bodies[] = {"{" HELLO "}", "{" HELLO ",\"skip_special_tokens\":false}",
                                         "{" HELLO
                                         ",\"skip_special_tokens\":false,\"include_stop_str_in_output\":true}"},
                             *const texts[] = {"a  b", "a <|im_end|> b", "a <|im_end|> b"};
    play(server, "a <|im_end|> b");
    for (size_t i = 0; i < COUNT(bodies); i++) {
        struct answer answer = post(server, CHAT, bodies[i]);
        json_t *json = answer_json(&answer);
        const char *content = text_at(json, "choices.0.message.content");
        assert_true(strncmp(content, texts[i], strlen(texts[i])) == 0);
        assert_int_equal(strlen(content) > strlen(texts[i]), i == 2); // the end-of-sequence token
        json_decref(json);
        answer_free(&answer);
    }
}

static void test_engine_error(void **state)
{
    struct test_server *server = *state;
    FAKE_SET(server, error_after, 0);
    struct answer answer = post(server, CHAT, "{" HELLO ",\"n\":3}");
    assert_int_equal(answer.status, 503);
    check_shape(&answer);
    assert_non_null(strstr(answer.body, "rank 1 was lost"));
    answer_free(&answer);
    answer = post(server, CHAT, "{" HELLO ",\"n\":3,\"stream\":true}");
    assert_int_equal(answer.status, 503); // nothing was sent yet
    answer_free(&answer);
    FAKE_SET(server, error_after, 2);
    answer = post(server, CHAT, "{" HELLO ",\"n\":3,\"stream\":true}");
    assert_int_equal(answer.status, 200);
    assert_non_null(strstr(answer.body, "data: {\"error\":{\"message\":\"rank 1 was lost\""));
    assert_null(strstr(answer.body, "[DONE]"));
    const char *event = strstr(answer.body, "data: {\"error\"");
    assert_null(strstr(event + 6, "data: ")); // the last one
    answer_free(&answer);
    FAKE_SET(server, error_after, -1);
    answer = post(server, "/v1/completions", "{\"prompt\":\"a\",\"min_tokens\":40}"); // above the default
    assert_int_equal(server->fake.seen.max_tokens, 40);
    answer_free(&answer);
}

static void nap(void *arg)
{
    usleep(200000);
    *(atomic_bool *)arg = true;
}

// Text that had come goes out before the error, also where both are seen at once.
static void test_text_before_error(void **state)
{
    struct test_server *server = *state;
    atomic_bool napped = false;
    struct http_post post = {.fn = nap, .arg = &napped};
    FAKE_SET(server, error_after, 2);
    FAKE_SET(server, hold_submit, true);
    int fd = client_connect(server->port);
    client_request(fd, "POST", CHAT, "", "{" HELLO ",\"n\":3,\"stream\":true}");
    usleep(200000); // the worker stands in submit
    http_server_post(server->http, &post);
    FAKE_SET(server, hold_submit, false);
    struct answer answer = client_read(fd);
    close(fd);
    assert_true(napped && answer.status == 200);
    const char *error = strstr(answer.body, "data: {\"error\""), *text = answer.body;
    assert_non_null(error);
    for (int i = 0; i < 3; i++) {
        text = strstr(text, "\"content\":\"The\"");
        assert_true(text && text++ < error);
    }
    answer_free(&answer);
    FAKE_SET(server, error_after, -1);
}

// Whole answers have a limit.
static void test_large_answers(void **state)
{
    (void)state;
    static const struct {
        int bytes, status;
    } cases[] = {{300000, 200}, {1000000, 400}};
    struct test_server server;
    test_server_init(&server);
    chat_close(server.chat);
    server.chat = open_test_chat("{% if tools %}{{ tools[0].a.b.c }}{% endif %}"
                                 "{% for i in range(10) %}{{ messages[0].content }}{% endfor %}");
    server.model.chat = server.chat;
    test_server_start(&server);
    for (size_t i = 0; i < COUNT(cases); i++) {
        char *body, *content = malloc((size_t)cases[i].bytes + 1);
        memset(content, 0x7f, (size_t)cases[i].bytes); // six bytes in JSON
        content[cases[i].bytes] = 0;
        assert_true(asprintf(&body, "{\"messages\":[{\"role\":\"user\",\"content\":\"%s\"}]}", content) > 0);
        struct answer answer = post(&server, "/apply-template", body);
        assert_int_equal(answer.status, cases[i].status);
        assert_true(answer.complete);
        assert_true(answer.status == 200 ? answer.bytes > 18000000 : strstr(answer.body, "answer_too_large") != NULL);
        answer_free(&answer);
        free(content);
        free(body);
    }
    struct answer refusal =
        post(&server, CHAT, "{" HELLO ",\"tools\":[{\"type\":\"function\",\"function\":{\"name\":\"f\"}}]}");
    assert_int_equal(refusal.status, 400); // a template's words, without the place of its file
    assert_non_null(strstr(refusal.body, "\"message\":\"chat_template.jinja, line 1: "));
    answer_free(&refusal);
    // Logprobs: 16 choices with 3000 tokens and 20 alternatives of each.
    static uint32_t tokens[3000];
    for (size_t i = 0; i < COUNT(tokens); i++)
        tokens[i] = 5;
    FAKE_SET(&server, batch, 64);
    FAKE_SET(&server, tokens, tokens);
    FAKE_SET(&server, count, (int64_t)COUNT(tokens));
    struct answer answer = post(&server, CHAT, "{" HELLO ",\"n\":16,\"logprobs\":true,\"top_logprobs\":20}");
    assert_true(answer.status == 400 && strstr(answer.body, "answer_too_large"));
    answer_free(&answer);
    wait_for_quiet(&server);
    test_server_stop(&server);
}

// ---- streams -----------------------------------------------------------------------------------------------------

static void test_keep_alive(void **state)
{
    (void)state;
    struct test_server server;
    test_server_init(&server);
    server.options.keep_alive_s = 0.05;
    test_server_start(&server);
    play(&server, "x");
    FAKE_SET(&server, hold_after, 0);
    int fd = client_connect(server.port);
    client_request(fd, "POST", CHAT, "", "{" HELLO ",\"stream\":true}");
    usleep(400000);
    FAKE_SET(&server, hold_after, -1);
    struct answer answer = client_read(fd);
    close(fd);
    int comments = 0;
    for (const char *line = answer.body; (line = strstr(line, ": keep-alive\n\n")); line++)
        comments++;
    if (comments < 3 || comments > 10)
        fail_msg("%d comments", comments);
    assert_non_null(strstr(answer.body, "data: [DONE]\n\n"));
    assert_true(answer.complete);
    answer_free(&answer);
    wait_for_quiet(&server);
    test_server_stop(&server);
}

// A reader that sleeps: nothing is lost, the engine is not held up.
static void test_slow_reader(void **state)
{
    struct test_server *server = *state;
    enum { WORDS = 20000 };
    int done = 0;
    char *text = malloc(WORDS * 6 + 1);
    size_t bytes = 0;
    for (int i = 0; i < WORDS; i++)
        bytes += (size_t)sprintf(text + bytes, "%d ", i % 10000);
    play(server, text);
    FAKE_SET(server, batch, 64);
    FAKE_SET(server, pause_us, 1);
    int fd = client_connect(server->port), small = 16384;
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
    client_request(fd, "POST", CHAT, "", "{" HELLO ",\"stream\":true}");
    for (int i = 0; i < 5000 && (i == 0 || fake_live(server) > 0); i++)
        usleep(1000);
    assert_int_equal(fake_live(server), 0);
    struct answer answer = client_read(fd);
    close(fd);
    char *seen = calloc(1, bytes + 1), *seen_end = seen;
    for (char *line = answer.body, *end; (end = strchr(line, '\n')); line = end + 1) {
        *end = 0;
        done += strcmp(line, "data: [DONE]") == 0;
        if (strncmp(line, "data: {", 7) != 0)
            continue;
        json_t *event = json_loads(line + 6, 0, NULL);
        const char *piece = json_string_value(at(event, "choices.0.delta.content"));
        if (piece)
            seen_end = stpcpy(seen_end, piece);
        json_decref(event);
    }
    assert_string_equal(seen, text);
    assert_int_equal(done, 1);
    answer_free(&answer);
    free(seen);
    free(text);
    FAKE_SET(server, batch, 4);
    FAKE_SET(server, pause_us, 200);
}

// ---- clients that leave ------------------------------------------------------------------------------------------

static void leave(int fd, bool reset)
{
    struct linger now = {.l_onoff = 1};
    if (reset)
        setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof now);
    close(fd);
}

static void wait_for_submitted(struct test_server *server, int64_t count)
{
    for (int i = 0; i < 5000; i++) {
        pthread_mutex_lock(&server->fake.mutex);
        bool there = server->fake.submitted >= count;
        pthread_mutex_unlock(&server->fake.mutex);
        if (there)
            return;
        usleep(1000);
    }
    fail_msg("nothing was submitted");
}

static void test_disconnects(void **state)
{
    struct test_server *server = *state;
    static const char head[] = "POST " CHAT " HTTP/1.1\r\nHost",
                      part[] = "POST " CHAT " HTTP/1.1\r\nHost: t\r\nContent-Length: 100\r\n\r\n{";
    play(server, "one two three four five six seven eight nine ten eleven twelve");
    for (int reset = 0; reset < 2; reset++)
        for (int stream = 0; stream < 2; stream++) {
            const char *body = stream ? "{" HELLO ",\"stream\":true,\"n\":3}" : "{" HELLO ",\"n\":3}";
            int64_t before = server->fake.submitted;
            int fd = client_connect(server->port); // before the end of the headers
            client_send(fd, head, strlen(head));
            leave(fd, reset);
            fd = client_connect(server->port); // in the body
            client_send(fd, part, strlen(part));
            leave(fd, reset);
            FAKE_SET(server, hold_submit, true); // while a worker has it
            fd = client_connect(server->port);
            client_request(fd, "POST", CHAT, "", body);
            usleep(20000);
            leave(fd, reset);
            usleep(20000);
            FAKE_SET(server, hold_after, 0);
            FAKE_SET(server, hold_submit, false);
            wait_for_quiet(server);
            fd = client_connect(server->port); // queued, or in the prompt
            client_request(fd, "POST", CHAT, "", body);
            wait_for_submitted(server, before + 3);
            leave(fd, reset);
            wait_for_quiet(server);
            FAKE_SET(server, hold_after, 5); // amid the answer
            before = server->fake.submitted;
            fd = client_connect(server->port);
            client_request(fd, "POST", CHAT, "", body);
            wait_for_submitted(server, before + 3);
            usleep(20000);
            leave(fd, reset);
            wait_for_quiet(server);
            FAKE_SET(server, hold_after, -1);
        }
    assert_true(server->fake.cancelled >= 4 * 6);
    struct answer answer = post(server, CHAT, "{" HELLO "}"); // still at work
    assert_int_equal(answer.status, 200);
    answer_free(&answer);
}

// Many at random moments, with answers of both kinds between.
static void test_disconnect_storm(void **state)
{
    struct test_server *server = *state;
    uint64_t random = 12345;
    play(server, "one two three four five six seven eight nine ten eleven twelve");
    for (int i = 0; i < 300; i++) {
        int fd = client_connect(server->port);
        uint64_t now = fake_random(&random);
        client_request(fd, "POST", now & 1 ? CHAT : "/v1/completions", "",
                       now & 1 ? "{" HELLO ",\"stream\":true,\"n\":2,\"stop\":\"seven\"}"
                               : "{\"prompt\":[\"a\",\"b\"],\"stream\":false,\"max_tokens\":50}");
        usleep((useconds_t)(now >> 8) % 3000);
        leave(fd, now & 2);
    }
    wait_for_quiet(server);
    struct answer answer = post(server, CHAT, "{" HELLO ",\"stream\":true}");
    assert_non_null(strstr(answer.body, "data: [DONE]"));
    answer_free(&answer);
}

// The server goes while requests run: nothing is lost (address sanitizer), nobody hangs.
static void test_stop_amid(void **state)
{
    (void)state;
    struct test_server server;
    int fds[6];
    test_server_init(&server);
    test_server_start(&server);
    play(&server, "one two three four five six seven");
    FAKE_SET(&server, hold_after, 3);
    for (size_t i = 0; i < COUNT(fds); i++) {
        fds[i] = client_connect(server.port);
        client_request(fds[i], "POST", CHAT, "", i & 1 ? "{" HELLO ",\"stream\":true}" : "{" HELLO "}");
    }
    wait_for_submitted(&server, 3);
    test_server_stop(&server);
    for (size_t i = 0; i < COUNT(fds); i++) {
        struct answer answer = client_read(fds[i]);
        answer_free(&answer);
        close(fds[i]);
    }
}

static void *let_go(void *arg)
{
    usleep(300000);
    FAKE_SET((struct test_server *)arg, hold_submit, false);
    return NULL;
}

// Stopping does not do the work that waits for a worker.
static void test_stop_with_queue(void **state)
{
    (void)state;
    enum { WAITING = 40, BYTES = 2 << 20 };
    struct test_server server;
    pthread_t thread;
    int held, fds[WAITING];
    test_server_init(&server);
    server.options.worker_threads = 1;
    test_server_start(&server);
    FAKE_SET(&server, hold_submit, true);
    held = client_connect(server.port);
    client_request(held, "POST", CHAT, "", "{" HELLO "}");
    usleep(200000);
    char *body = malloc(BYTES + 1);
    memset(body, 'a', BYTES);
    memcpy(body, "{\"prompt\":\"", 11);
    for (int i = 16; i < BYTES; i += 7)
        body[i] = ' ';
    memcpy(body + BYTES - 2, "\"}", 3);
    for (int i = 0; i < WAITING; i++) {
        fds[i] = client_connect(server.port);
        client_request(fds[i], "POST", "/tokenize", "", body);
    }
    usleep(500000); // they wait for the worker
    assert_int_equal(pthread_create(&thread, NULL, let_go, &server), 0);
    double began_s = api_now();
    test_server_stop(&server);
    double took_s = api_now() - began_s;
    pthread_join(thread, NULL);
    for (int i = 0; i < WAITING; i++)
        close(fds[i]);
    close(held);
    free(body);
    if (took_s > 3)
        fail_msg("stopping took %.1f s", took_s);
}

int main(void)
{
#define WITH_SERVER(test) cmocka_unit_test_setup_teardown(test, setup, teardown)
    const struct CMUnitTest tests[] = {
        WITH_SERVER(test_routes),
        WITH_SERVER(test_round_trip),
        WITH_SERVER(test_request_ids),
        cmocka_unit_test(test_keys),
        cmocka_unit_test(test_origins),
        WITH_SERVER(test_states),
        cmocka_unit_test(test_loading),
        WITH_SERVER(test_submit_errors),
        cmocka_unit_test(test_context),
        WITH_SERVER(test_chat),
        WITH_SERVER(test_completions),
        WITH_SERVER(test_logprobs),
        WITH_SERVER(test_special_tokens),
        WITH_SERVER(test_engine_error),
        cmocka_unit_test(test_keep_alive),
        WITH_SERVER(test_slow_reader),
        WITH_SERVER(test_disconnects),
        WITH_SERVER(test_disconnect_storm),
        cmocka_unit_test(test_stop_amid),
        WITH_SERVER(test_text_before_error),
        cmocka_unit_test(test_large_answers),
        cmocka_unit_test(test_stop_with_queue),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
