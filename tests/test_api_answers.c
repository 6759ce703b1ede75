// What the API answers while an engine plays tokens back: chats, completions, logprobs, special tokens, errors amid an answer, limits.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/api_help.h"

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
    assert_int_equal(number_at(json, "usage.completion_tokens"), 2 * ((int64_t)server->script.count + 1));
    assert_int_equal(number_at(json, "usage.total_tokens"), prompt + 2 * ((int64_t)server->script.count + 1));
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
    assert_int_equal(json_array_size(content), server->script.count);
    for (size_t i = 0; i < server->script.count; i++) {
        const json_t *token = json_array_get(content, i), *list = at(token, "bytes");
        assert_int_equal(json_array_size(at(token, "top_logprobs")), 3);
        assert_true(json_number_value(at(token, "logprob")) == -(double)(server->script.ids[i] % 97) / 8);
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

int main(void)
{
    const struct CMUnitTest tests[] = {
        WITH_SERVER(test_chat),
        WITH_SERVER(test_completions),
        WITH_SERVER(test_logprobs),
        WITH_SERVER(test_special_tokens),
        WITH_SERVER(test_engine_error),
        WITH_SERVER(test_text_before_error),
        cmocka_unit_test(test_large_answers),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
