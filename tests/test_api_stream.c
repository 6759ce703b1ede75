// Streams: whatever the tokens, their cuts, the stop strings and the batches of the engine, the pieces of a stream put together are the answer
// without one, and both are what a plain search in the whole text says.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/api_help.h"

enum { TEXT_BYTES = 512, MAX_TOKENS = 600, CHOICES = 4 };

static uint64_t random_state = 0x9E3779B97F4A7C15u;
static uint32_t below(uint32_t limit) { return (uint32_t)(fake_random(&random_state) % limit); }

static uint32_t byte_tokens[256]; // the token of one byte alone

static void find_byte_tokens(const struct tokenizer *tok)
{
    struct tokenizer_stream *stream;
    struct error err;
    bool found[256] = {0};
    assert_int_equal(tokenizer_stream_new(&stream, tok, true, &err), 0);
    for (uint32_t id = 0; id < tokenizer_vocab_size(tok); id++) {
        const char *bytes;
        size_t count;
        if (tokenizer_stream_token_bytes(stream, id, &bytes, &count, &err) == 0 && count == 1 &&
            !found[(uint8_t)*bytes]) {
            byte_tokens[(uint8_t)*bytes] = id;
            found[(uint8_t)*bytes] = true;
        }
    }
    tokenizer_stream_free(stream);
    for (int i = 0x20; i < 0x7f; i++)
        assert_true(found[i]);
    assert_true(found[0xe2] && found[0x82] && found[0xac] && found[0xf0] && found[0x9f]);
}

// Text of few words, so that stop strings are often half there.
static size_t random_text(char *text)
{
    static const char *const words[] = {"a",          "ab", "aab", "b",   " ", "\n", "the ",   "\u20ac",
                                        "\U0001F600", "\\", "\"",  "x\t", "/", "{}", "\u00e9", "\U0001F468\u200D",
                                        "end",        "e",  "."};
    size_t bytes = 0;
    for (uint32_t n = below(60); n > 0; n--)
        bytes += (size_t)sprintf(text + bytes, "%s", words[below(COUNT(words))]);
    text[bytes] = 0;
    return bytes;
}

static bool is_inside(const char *text, size_t at_byte) { return ((uint8_t)text[at_byte] & 0xc0) == 0x80; }

// Random tokens that spell the text: single bytes, or what the tokenizer makes of a few characters.
static int64_t random_tokens(const struct tokenizer *tok, const char *text, size_t bytes, uint32_t *out)
{
    int64_t count = 0;
    for (size_t begin = 0; begin < bytes;) {
        size_t end = begin + 1 + below(8);
        end = end < bytes ? end : bytes;
        while (end < bytes && is_inside(text, end))
            end++;
        if (below(3) == 0) {
            for (; begin < end; begin++)
                out[count++] = byte_tokens[(uint8_t)text[begin]];
            continue;
        }
        struct token_list ids = encode(tok, text + begin, end - begin, TOKENIZER_PLAIN_TEXT);
        memcpy(out + count, ids.ids, ids.count * sizeof *ids.ids);
        count += (int64_t)ids.count;
        free(ids.ids);
        begin = end;
    }
    return count;
}

// A piece of the text, or of others like it.
static void random_stop(const char *text, size_t bytes, char *stop)
{
    char other[TEXT_BYTES * 2];
    const char *from = text;
    if (bytes == 0 || below(4) == 0) {
        bytes = random_text(other);
        from = other;
    }
    size_t begin = bytes ? below((uint32_t)bytes) : 0, end = begin + 1 + below(6);
    while (begin > 0 && is_inside(from, begin))
        begin--;
    end = end < bytes ? end : bytes;
    while (end < bytes && is_inside(from, end))
        end++;
    snprintf(stop, 64, "%.*s", (int)(end - begin), from + begin);
    if (!*stop)
        strcpy(stop, "z");
}

// What is left of the text: the stop string that is complete first ends it, the longest if several are.
static size_t cut_text(const char *text, size_t bytes, char stops[][64], int num_stops, bool include)
{
    for (size_t end = 1; end <= bytes; end++) {
        size_t longest = 0;
        for (int i = 0; i < num_stops; i++) {
            size_t length = strlen(stops[i]);
            if (length <= end && length > longest && memcmp(text + end - length, stops[i], length) == 0)
                longest = length;
        }
        if (longest)
            return include ? end : end - longest;
    }
    return bytes;
}

// ---- what came back ----------------------------------------------------------------------------------------------

struct seen {
    char text[CHOICES][TEXT_BYTES * 2], finish[CHOICES][16];
    char token_text[CHOICES][TEXT_BYTES * 2]; // of logprobs' bytes
    int64_t logprobs[CHOICES], roles[CHOICES];
    int64_t prompt_tokens, completion_tokens, done, usages;
};

static bool aligned; // no stop strings: every token comes with its text

static void add_logprobs(struct seen *seen, int64_t index, const json_t *content)
{
    char *to = seen->token_text[index] + strlen(seen->token_text[index]);
    for (size_t i = 0; i < json_array_size(content); i++) {
        const json_t *bytes = at(json_array_get(content, i), "bytes");
        seen->logprobs[index]++;
        for (size_t b = 0; b < json_array_size(bytes); b++)
            *to++ = (char)json_integer_value(json_array_get(bytes, b));
    }
    *to = 0;
}

static void add_choice(struct seen *seen, const json_t *choice, bool chat)
{
    int64_t index = number_at(choice, "index");
    const char *text = json_string_value(at(choice, chat ? "delta.content" : "text")),
               *whole = json_string_value(at(choice, "message.content")),
               *finish = json_string_value(at(choice, "finish_reason"));
    assert_true(index >= 0 && index < CHOICES);
    assert_string_equal(seen->finish[index], ""); // nothing after the end
    seen->roles[index] += at(choice, "delta.role") != NULL;
    strcat(seen->text[index], whole ? whole : text ? text : "");
    strcat(seen->finish[index], finish ? finish : "");
    add_logprobs(seen, index, at(choice, "logprobs.content"));
    // What a chunk says comes with its tokens; stop strings may hold back the last one, which has said something already.
    if (aligned && json_is_array(at(choice, "logprobs.content")))
        assert_true(strlen(seen->token_text[index]) >= strlen(seen->text[index]));
}

static void add_event(struct seen *seen, const json_t *json, bool chat)
{
    const json_t *choices = at(json, "choices");
    assert_int_equal(seen->done, 0);
    for (size_t i = 0; i < json_array_size(choices); i++)
        add_choice(seen, json_array_get(choices, i), chat);
    if (!json_is_object(at(json, "usage")))
        return;
    seen->usages++;
    seen->prompt_tokens = number_at(json, "usage.prompt_tokens");
    seen->completion_tokens = number_at(json, "usage.completion_tokens");
    assert_int_equal(number_at(json, "usage.total_tokens"), seen->prompt_tokens + seen->completion_tokens);
}

// Events must be whole JSON each: no character is split between two.
static void read_events(struct seen *seen, char *body, bool chat)
{
    char *line = body, *end;
    for (; (end = strstr(line, "\n\n")); line = end + 2) {
        *end = 0;
        if (*line == ':')
            continue;
        assert_true(strncmp(line, "data: ", 6) == 0);
        if (strcmp(line + 6, "[DONE]") == 0) {
            seen->done++;
            continue;
        }
        json_error_t error;
        json_t *json = json_loads(line + 6, JSON_REJECT_DUPLICATES, &error);
        if (!json)
            fail_msg("%s: %s", error.text, line);
        add_event(seen, json, chat);
        json_decref(json);
    }
    assert_int_equal(*line, 0);
}

static void ask(const struct test_server *server, const char *body, bool chat, bool stream, struct seen *seen)
{
    struct answer answer = post(server, chat ? "/v1/chat/completions" : "/v1/completions", body);
    memset(seen, 0, sizeof *seen);
    if (answer.status != 200 || !answer.complete)
        fail_msg("%d: %s", answer.status, answer.body);
    if (stream)
        read_events(seen, answer.body, chat);
    else {
        json_t *json = answer_json(&answer);
        add_event(seen, json, false);
        json_decref(json);
    }
    answer_free(&answer);
}

// ---- the test ----------------------------------------------------------------------------------------------------

struct case_of {
    char text[TEXT_BYTES * 2], stops[3][64];
    uint32_t tokens[MAX_TOKENS];
    size_t bytes, cut;
    int num_stops, n;
    int64_t count;
    bool chat, include, logprobs;
};

static void make_case(struct case_of *of, const struct tokenizer *tok)
{
    of->bytes = random_text(of->text);
    of->count = random_tokens(tok, of->text, of->bytes, of->tokens);
    of->num_stops = (int)below(4);
    of->n = 1 + (int)below(CHOICES);
    of->chat = below(2);
    of->include = below(4) == 0;
    of->logprobs = of->chat && below(2);
    for (int i = 0; i < of->num_stops; i++)
        random_stop(of->text, of->bytes, of->stops[i]);
    aligned = of->num_stops == 0 && !of->include;
    of->cut = cut_text(of->text, of->bytes, of->stops, of->num_stops, of->include);
}

static char *body_for(const struct case_of *of, bool stream)
{
    struct api_text body = {0};
    api_text_puts(&body, of->chat ? "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}]" : "{\"prompt\":\"x\"");
    api_text_printf(&body, ",\"n\":%d,\"max_tokens\":100000", of->n);
    api_text_puts(&body, of->include ? ",\"include_stop_str_in_output\":true" : "");
    api_text_puts(&body, of->logprobs ? ",\"logprobs\":true,\"top_logprobs\":2" : "");
    api_text_puts(&body, stream ? ",\"stream\":true,\"stream_options\":{\"include_usage\":true}" : "");
    for (int i = 0; i < of->num_stops; i++) {
        api_text_puts(&body, i ? "," : ",\"stop\":[");
        api_text_string(&body, of->stops[i], strlen(of->stops[i]));
    }
    api_text_puts(&body, of->num_stops ? "]}" : "}");
    return body.data;
}

static void check_case(const struct case_of *of, const struct seen *seen, bool stream)
{
    assert_int_equal(seen->done, stream);
    assert_int_equal(seen->usages, 1);
    bool stopped = of->cut < of->bytes || of->include;
    for (int i = 0; i < of->n; i++) {
        char wanted[TEXT_BYTES * 2];
        snprintf(wanted, sizeof wanted, "%.*s", (int)of->cut, of->text);
        // include_stop keeps the end-of-sequence token's text as well
        if (!of->include || of->cut < of->bytes)
            assert_string_equal(seen->text[i], wanted);
        else
            assert_memory_equal(seen->text[i], wanted, of->cut);
        assert_string_equal(seen->finish[i], "stop");
        assert_int_equal(seen->roles[i], stream && of->chat);
        if (!of->logprobs)
            continue;
        // Tokens and text begin alike; those of the text are all there, those of the stop string are not.
        assert_true(strlen(seen->token_text[i]) >= of->cut);
        assert_memory_equal(seen->token_text[i], of->text, of->cut);
        if (!stopped)
            assert_int_equal(seen->logprobs[i], of->count);
    }
}

static void test_streams(void **state)
{
    (void)state;
    struct test_server server;
    struct case_of *of = malloc(sizeof *of);
    struct seen *streamed = malloc(sizeof *streamed), *whole = malloc(sizeof *whole);
    test_server_init(&server);
    server.fake.pause_us = 20;
    test_server_start(&server);
    find_byte_tokens(server.tokenizer.tok);
    for (int i = 0; i < 400; i++) {
        make_case(of, server.tokenizer.tok);
        FAKE_SET(&server, tokens, of->tokens);
        FAKE_SET(&server, count, of->count);
        FAKE_SET(&server, batch, 1 + (int64_t)below(20));
        char *body = body_for(of, true);
        ask(&server, body, of->chat, true, streamed);
        free(body);
        FAKE_SET(&server, batch, 1 + (int64_t)below(20));
        body = body_for(of, false);
        ask(&server, body, of->chat, false, whole);
        free(body);
        check_case(of, streamed, true);
        check_case(of, whole, false);
        assert_int_equal(streamed->prompt_tokens, whole->prompt_tokens);
        assert_int_equal(streamed->completion_tokens, whole->completion_tokens);
        for (int c = 0; c < of->n; c++) {
            assert_string_equal(streamed->text[c], whole->text[c]);
            assert_string_equal(streamed->token_text[c], whole->token_text[c]);
            assert_int_equal(streamed->logprobs[c], whole->logprobs[c]);
        }
        if (of->cut == of->bytes && !of->include)
            assert_int_equal(whole->completion_tokens, of->n * (of->count + 1));
    }
    wait_for_quiet(&server);
    test_server_stop(&server);
    free(of);
    free(streamed);
    free(whole);
}

// Stop strings look at nothing that min_tokens protects.
static void test_min_tokens(void **state)
{
    (void)state;
    struct test_server server;
    struct seen *seen = malloc(sizeof *seen);
    uint32_t tokens[8];
    test_server_init(&server);
    test_server_start(&server);
    find_byte_tokens(server.tokenizer.tok);
    for (int i = 0; i < 8; i++)
        tokens[i] = byte_tokens[(uint8_t) "abxabxab"[i]];
    FAKE_SET(&server, tokens, tokens);
    FAKE_SET(&server, count, 8);
    static const struct {
        const char *members, *text;
    } cases[] = {{"\"min_tokens\":0", "ab"},
                 {"\"min_tokens\":2", "ab"},
                 {"\"min_tokens\":3", "abxab"},
                 {"\"min_tokens\":6", "abxabxab"}};
    for (size_t i = 0; i < COUNT(cases); i++) {
        char body[128];
        snprintf(body, sizeof body, "{\"prompt\":\"p\",\"stop\":\"x\",%s}", cases[i].members);
        ask(&server, body, false, false, seen);
        assert_string_equal(seen->text[0], cases[i].text);
    }
    wait_for_quiet(&server);
    test_server_stop(&server);
    free(seen);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_streams), cmocka_unit_test(test_min_tokens)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
