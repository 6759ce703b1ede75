// Clients of the API that are slow, ask for too much, or leave at every phase; requests that take too long; and a server that stops amid requests.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/api_help.h"
#include "tests/patience.h"

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

// ---- the common budget -------------------------------------------------------------------------------------------

// The engine plays a text of many tokens, of which each takes much room with its alternatives.
#define ALTERNATIVES "\"logprobs\":true,\"top_logprobs\":20"

static void play_long(struct test_server *server)
{
    enum { TOKENS = 1500 };
    static uint32_t tokens[TOKENS];
    for (size_t i = 0; i < TOKENS; i++)
        tokens[i] = 5;
    FAKE_SET(server, batch, 64);
    FAKE_SET(server, pause_us, 1);
    FAKE_SET(server, tokens, tokens);
    FAKE_SET(server, count, TOKENS);
}

static void check_small_answer(struct test_server *server)
{
    static const char *const bodies[] = {"{" HELLO ",\"max_tokens\":3}",
                                         "{" HELLO ",\"max_tokens\":3,\"stream\":true}"};
    for (int i = 0; i < 2; i++) {
        struct answer answer = post(server, CHAT, bodies[i]);
        assert_int_equal(answer.status, 200);
        assert_null(strstr(answer.body, "\"error\""));
        answer_free(&answer);
    }
}

// Streams whose clients do not read, and whole answers in the making, share one budget: who holds much when it is used up gets an error, small
// answers go on. When they have ended, the budget is free again.
static void test_budget(void **state)
{
    (void)state;
    enum { CLIENTS = 4 };
    static const char *const bodies[] = {"{" HELLO ",\"stream\":true,\"n\":2," ALTERNATIVES "}",
                                         "{" HELLO ",\"n\":2," ALTERNATIVES "}"};
    for (int whole = 0; whole < 2; whole++) {
        struct test_server server;
        int fds[CLIENTS], small = 65536, refused = 0;
        test_server_init(&server);
        server.limits.all_output_bytes = 1 << 20;
        test_server_start(&server);
        play_long(&server);
        for (int i = 0; i < CLIENTS; i++) {
            fds[i] = client_connect(server.port);
            setsockopt(fds[i], SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
            client_request(fds[i], "POST", CHAT, "", bodies[whole]);
        }
        wait_for_submitted(&server, 2 * CLIENTS);
        for (int i = 0; i < 5000 && fake_live(&server) > 0; i++)
            usleep(1000);
        assert_int_equal(fake_live(&server), 0);
        check_small_answer(&server);
        for (int i = 0; i < CLIENTS; i++) {
            struct answer answer = client_read(fds[i]);
            assert_true(answer.status == 503 || (answer.status == 200 && !whole)); // a stream may have begun
            refused += strstr(answer.body,
                              "{\"error\":{\"message\":\"too many bytes of answers wait for slow clients") != NULL;
            assert_true(answer.status == 200 || header_is(&answer, "Retry-After", "1"));
            answer_free(&answer);
            close(fds[i]);
        }
        assert_true(refused >= (whole ? CLIENTS : 2)); // one stream alone may have found room
        wait_for_quiet(&server);
        struct answer answer = post(&server, CHAT, "{" HELLO ",\"max_tokens\":150," ALTERNATIVES "}");
        assert_int_equal(answer.status, 200);
        assert_true(answer.bytes > 65536);
        answer_free(&answer);
        wait_for_quiet(&server);
        test_server_stop(&server);
    }
}

// ---- time limits -------------------------------------------------------------------------------------------------

static void test_request_timeout(void **state)
{
    (void)state;
    struct test_server server;
    test_server_init(&server);
    server.options.request_timeout_s = 0.3;
    test_server_start(&server);
    play(&server, "one two three four five");
    struct answer answer = post(&server, CHAT, "{" HELLO "}"); // in time
    assert_int_equal(answer.status, 200);
    answer_free(&answer);
    for (int held = 0; held < 4; held++) { // in the queue; amid a whole answer; amid a stream; while a worker has it
        FAKE_SET(&server, hold_after, held == 0 ? 0 : 2);
        FAKE_SET(&server, hold_submit, held == 3);
        struct stopwatch watch = stopwatch_start();
        int fd = client_connect(server.port);
        client_request(fd, "POST", CHAT, "", held == 2 ? "{" HELLO ",\"stream\":true}" : "{" HELLO "}");
        answer = client_read(fd);
        double took_s = stopwatch_s(&watch), idle_s = stopwatch_idle_s(&watch);
        close(fd);
        if (!(took_s >= 0.29 && idle_s < PATIENCE * 1.5))
            fail_msg("%d: %.3f s, %.3f of them on an idle machine", held, took_s, idle_s);
        assert_true(answer.complete);
        assert_int_equal(answer.status, held == 2 ? 200 : 504);
        assert_non_null(strstr(answer.body, "{\"error\":{\"message\":\"the answer was not complete within 0.3 s"));
        assert_non_null(
            strstr(answer.body, "\"type\":\"timeout_error\",\"param\":null,\"code\":\"request_timeout\"}}"));
        assert_null(strstr(answer.body, "[DONE]"));
        assert_true(held == 2 || header_is(&answer, "X-Should-Retry", "false"));
        answer_free(&answer);
        FAKE_SET(&server, hold_submit, false);
        wait_for_quiet(&server); // the engine has been told
    }
    FAKE_SET(&server, hold_after, -1);
    answer = post(&server, CHAT, "{" HELLO ",\"stream\":true}");
    assert_non_null(strstr(answer.body, "[DONE]"));
    answer_free(&answer);
    wait_for_quiet(&server);
    test_server_stop(&server);
}

// ---- clients that leave ------------------------------------------------------------------------------------------

static void leave(int fd, bool reset)
{
    struct linger now = {.l_onoff = 1};
    if (reset)
        setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof now);
    close(fd);
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
    struct stopwatch watch = stopwatch_start();
    test_server_stop(&server);
    double took_s = stopwatch_idle_s(&watch);
    pthread_join(thread, NULL);
    for (int i = 0; i < WAITING; i++)
        close(fds[i]);
    close(held);
    free(body);
    if (took_s > PATIENCE * 3)
        fail_msg("stopping took %.1f s", took_s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_keep_alive),      WITH_SERVER(test_slow_reader),          WITH_SERVER(test_disconnects),
        WITH_SERVER(test_disconnect_storm),     cmocka_unit_test(test_stop_amid),       cmocka_unit_test(test_budget),
        cmocka_unit_test(test_request_timeout), cmocka_unit_test(test_stop_with_queue),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
