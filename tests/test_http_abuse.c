// What hostile and unlucky clients do to the HTTP server: bad requests, slow ones, clients that go, too many of them.
#include "tests/http_help.h"

// ---- what hostile clients send -------------------------------------------------------------------------------------

static void test_refusals(void **state)
{
    (void)state;
    static char large[200000];
    memset(large, 'a', sizeof large - 1);
    char headers[40000] = "";
    for (int i = 0, at = 0; i < 2000; i++)
        at += sprintf(headers + at, "A%d: b\r\n", i);
    const struct {
        const char *name, *first, *second, *third;
        int status;
    } cases[] = {
        {"good", "GET / HTTP/1.1\r\n" CLOSE "\r\n", "", "", 200},
        {"no Host", "GET / HTTP/1.1\r\nConnection: close\r\n\r\n", "", "", 400},
        {"two Hosts", "GET / HTTP/1.1\r\n" HOST CLOSE "\r\n", "", "", 400},
        {"length and chunks", "POST / HTTP/1.1\r\n" HOST "Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n",
         "0\r\n\r\n", "GET /smuggled HTTP/1.1\r\n" CLOSE "\r\n", 400},
        {"two lengths", "POST / HTTP/1.1\r\n" CLOSE "Content-Length: 0\r\nContent-Length: 5\r\n\r\nhello", "", "", 400},
        {"length +5", "POST / HTTP/1.1\r\n" CLOSE "Content-Length: +5\r\n\r\nhello", "", "", 400},
        {"length -1", "POST / HTTP/1.1\r\n" CLOSE "Content-Length: -1\r\n\r\nhello", "", "", 400},
        {"length 2^64", "POST / HTTP/1.1\r\n" CLOSE "Content-Length: 18446744073709551616\r\n\r\nhello", "", "", 413},
        {"length 1 TB", "POST / HTTP/1.1\r\n" CLOSE "Content-Length: 1099511627776\r\n\r\nhello", "", "", 413},
        {"length 1 TB and a part of it", "POST / HTTP/1.1\r\n" CLOSE "Content-Length: 1099511627776\r\n\r\n", large,
         large, 413},
        {"xchunked", "POST / HTTP/1.1\r\n" CLOSE "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", "", "", 501},
        {"large chunk", "POST / HTTP/1.1\r\n" CLOSE "Transfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFF\r\nx", "", "",
         413},
        {"chunks above the limit", "POST / HTTP/1.1\r\n" CLOSE "Transfer-Encoding: chunked\r\n\r\n18000\r\n", large,
         large, 400},
        {"chunk zz", "POST / HTTP/1.1\r\n" CLOSE "Transfer-Encoding: chunked\r\n\r\nzz\r\nx", "", "", 400},
        {"folded", "GET / HTTP/1.1\r\n" CLOSE "X-A: b\r\n c\r\n\r\n", "", "", 400},
        {"blank before the colon", "GET / HTTP/1.1\r\n" CLOSE "X-A : b\r\n\r\n", "", "", 400},
        {"LF only", "GET / HTTP/1.1\nHost: x\nConnection: close\n\n", "", "", 400},
        {"CR in a value", "GET / HTTP/1.1\r\n" CLOSE "X-A: b\rc\r\n\r\n", "", "", 400},
        {"large header", "GET / HTTP/1.1\r\n" CLOSE "X-A: ", large, "\r\n\r\n", 431},
        {"large target", "GET /", large, " HTTP/1.1\r\n" CLOSE "\r\n", 414},
        {"2000 headers", "GET / HTTP/1.1\r\n" CLOSE, headers, "\r\n", 431},
        {"HTTP/9.9", "GET / HTTP/9.9\r\n" CLOSE "\r\n", "", "", 505},
        {"HTTP/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "", "", 400},
        {"TLS", "\x16\x03\x01\x02", large, "", 400},
        {"garbage", "\x9f\x01\xff\xfe\x80 abc\r\n\r\n", "", "", 400},
        {"absolute", "GET http://x/health HTTP/1.1\r\n" CLOSE "\r\n", "", "", 200},
        {"NUL in the path", "GET /health%00x HTTP/1.1\r\n" CLOSE "\r\n", "", "", 400},
        {"expectation", "POST / HTTP/1.1\r\n" CLOSE "Content-Length: 2\r\nExpect: more\r\n\r\n", "", "", 417},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        int fd = connect_to(here.port);
        struct stopwatch watch = stopwatch_start();
        send_text(fd, cases[i].first);
        send_text(fd, cases[i].second);
        send_text(fd, cases[i].third);
        receive(fd);
        close(fd);
        // At once, not at a deadline; and the client reads its answer though it sent more than was wanted.
        if (status_of(got.bytes) != cases[i].status || !got.closed || got.reset ||
            stopwatch_idle_s(&watch) > PATIENCE * 0.35)
            fail_msg("%s: closed %d reset %d after %.3f s, answer: %.200s", cases[i].name, got.closed, got.reset,
                     stopwatch_s(&watch), got.bytes);
        if (cases[i].status != 200 &&
            (!strstr(got.bytes, "{\"error\":{\"message\":\"") || !strstr(got.bytes, "Connection: close")))
            fail_msg("%s: %s", cases[i].name, got.bytes);
    }
    assert_int_equal(here.requests, 2);
}

// Behind a refusal the connection still takes, for a while, what the client had not yet stopped to send: a reset would overtake the answer.
static void test_linger(void **state)
{
    (void)state;
    static char more[30000];
    int fd = connect_to(here.port);
    struct stopwatch watch = stopwatch_start();
    bool ended = false;
    send_text(fd, "POST / HTTP/1.1\r\n" HOST "Content-Length: 1099511627776\r\n\r\n");
    send_bytes(fd, more, sizeof more);
    receive(fd);
    assert_int_equal(status_of(got.bytes), 413);
    assert_true(got.closed && stopwatch_idle_s(&watch) < PATIENCE * 0.35);
    while (!ended && stopwatch_s(&watch) < ENOUGH_S) {
        ended = send(fd, more, sizeof more, MSG_NOSIGNAL) < 0;
        if (!ended)
            sleep_s(0.02);
    }
    close(fd);
    assert_true(ended && stopwatch_s(&watch) > PATIENCE * 0.45 && stopwatch_idle_s(&watch) < PATIENCE * 0.9);
}

// ---- deadlines -----------------------------------------------------------------------------------------------------

struct drip {
    const char *begin;
    bool drips;
    int status;          // 0: closed without an answer
    double from_s, to_s; // when
};

static void *drip(void *arg)
{
    struct drip *drip = arg;
    int fd = connect_to(here.port);
    struct stopwatch watch = stopwatch_start();
    bool ended = false;
    char answer[2000];
    size_t count = 0;
    send_text(fd, drip->begin);
    while (!ended && stopwatch_s(&watch) < ENOUGH_S) {
        struct pollfd state = {.fd = fd, .events = POLLIN};
        if (poll(&state, 1, 30) == 0) {
            if (drip->drips && send(fd, "a", 1, MSG_NOSIGNAL) < 0)
                break;
            continue;
        }
        ssize_t bytes = recv(fd, answer + count, sizeof answer - 1 - count, 0);
        ended = bytes <= 0;
        if (!ended)
            count += (size_t)bytes;
    }
    double took_s = stopwatch_s(&watch) / PATIENCE, idle_s = stopwatch_idle_s(&watch) / PATIENCE;
    close(fd);
    answer[count] = 0;
    const char *last = answer; // behind what a request before was answered
    for (const char *at = answer; (at = strstr(at, "HTTP/1.1 ")); at++)
        last = at;
    int status = strncmp(drip->begin, "GET /ok", 7) == 0 && last == answer ? 0 : status_of(last);
    if (!ended || took_s < drip->from_s || idle_s > drip->to_s || status != drip->status)
        fprintf(stderr, "%.40s: %d after %.3f s\n%s", drip->begin, status, took_s, answer);
    else
        drip->begin = NULL; // good
    return NULL;
}

static void test_deadlines(void **state)
{
    (void)state;
    struct drip drips[] = {
        {"", false, 0, 0.35, 0.6},
        {"G", false, 408, 0.35, 0.6},
        {"GET / HTTP/1.1\r\n" HOST "X-A: ", true, 408, 0.35, 0.6},
        {"GET / HTTP/1.1\r\n" HOST "\r", false, 408, 0.35, 0.6},
        {"POST / HTTP/1.1\r\n" HOST "Content-Length: 100000\r\n\r\n", true, 408, 0.65, 0.95},
        {"POST / HTTP/1.1\r\n" HOST "Content-Length: 5\r\n\r\nhell", false, 408, 0.65, 0.95},
        {"POST / HTTP/1.1\r\n" HOST "Transfer-Encoding: chunked\r\n\r\nfff\r\n", true, 408, 0.65, 0.95},
        {"POST / HTTP/1.1\r\n" HOST "Transfer-Encoding: chunked\r\n\r\n5;x=", true, 408, 0.65, 0.95},
        {"GET /ok HTTP/1.1\r\n" HOST "\r\n", false, 0, 0.95, 1.25},                               // idle
        {"GET /ok HTTP/1.1\r\n" HOST "\r\nGET /second HTTP/1.1\r\nX-A: ", true, 408, 0.35, 0.65}, // from its first byte
    };
    enum { NUM_DRIPS = sizeof drips / sizeof drips[0] };
    pthread_t threads[NUM_DRIPS];
    for (int i = 0; i < NUM_DRIPS; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, drip, &drips[i]), 0);
    for (int i = 0; i < NUM_DRIPS; i++)
        pthread_join(threads[i], NULL);
    for (int i = 0; i < NUM_DRIPS; i++)
        assert_null(drips[i].begin);
    struct http_server_stats stats;
    http_server_read_stats(here.server, &stats);
    assert_int_equal(stats.timeouts_total, 8);
}

static int connect_small(void)
{
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), small = 4096;
    struct sockaddr_in address = {
        .sin_family = AF_INET, .sin_port = htons((uint16_t)here.port), .sin_addr = {htonl(INADDR_LOOPBACK)}};
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
    assert_int_equal(connect(fd, (struct sockaddr *)&address, sizeof address), 0);
    return fd;
}

static void expect_cut(const struct stopwatch *watch, double from_s, double to_s)
{
    double took_s = stopwatch_s(watch), idle_s = stopwatch_idle_s(watch);
    if (took_s < PATIENCE * from_s || idle_s > PATIENCE * to_s)
        fail_msg("cut after %.3f s (%.3f s of them on an idle machine)", took_s, idle_s);
}

// A client that reads nothing, or nearly nothing, is cut; what was made for it stays within the bound.
static void test_stalled_reader(void **state)
{
    (void)state;
    for (int trickle = 0; trickle < 2; trickle++) {
        int fd = connect_small(), incomplete = here.incomplete;
        struct stopwatch watch = stopwatch_start();
        atomic_store(&here.flooded, 0);
        send_text(fd, "GET /flood HTTP/1.1\r\n" HOST "\r\n");
        while (atomic_load(&here.incomplete) == incomplete && stopwatch_s(&watch) < ENOUGH_S) {
            char little[10];
            sleep_s(0.02);
            if (trickle)
                (void)!recv(fd, little, sizeof little, MSG_DONTWAIT);
        }
        assert_int_equal(atomic_load(&here.incomplete), incomplete + 1);
        expect_cut(&watch, 0.75, 1.2);
        assert_true(atomic_load(&here.flooded) < 600000);
        close(fd);
    }
}

// A whole answer lies in memory until it is taken: one that trickles for hours, though never slower than a stream may, is cut.
static void test_trickling_reader(void **state)
{
    (void)state;
    int fd = connect_small();
    struct stopwatch watch = stopwatch_start();
    send_text(fd, "GET /large HTTP/1.1\r\n" HOST "\r\n");
    while (atomic_load(&here.incomplete) == 0 && stopwatch_s(&watch) < ENOUGH_S) {
        char little[400];
        sleep_s(PATIENCE * 0.01);
        (void)!recv(fd, little, sizeof little, MSG_DONTWAIT);
    }
    assert_int_equal(here.incomplete, 1);
    expect_cut(&watch, 0.75, 1.5);
    close(fd);
}

// What waits for all clients has a limit: large answers are refused above it, small ones are not.
static void test_output_budget(void **state)
{
    (void)state;
    int fd = connect_small();
    send_text(fd, "GET /large HTTP/1.1\r\n" HOST "\r\n");
    wait_for(&here.requests, 1);
    sleep_s(0.05);
    ask("GET /large HTTP/1.1\r\n" CLOSE "\r\n");
    assert_int_equal(status_of(got.bytes), 503);
    assert_int_equal(here.last_status, 503);
    assert_non_null(strstr(got.bytes, "\r\nRetry-After: 1\r\n"));
    assert_non_null(strstr(got.bytes, "{\"error\":{\"message\":\""));
    ask("GET /a HTTP/1.1\r\n" CLOSE "\r\n");
    assert_int_equal(status_of(got.bytes), 200);
    reset(fd);
    wait_for(&here.incomplete, 1);
    for (int i = 0; i < 3; i++) { // what was taken counts no more
        ask("GET /large HTTP/1.1\r\n" CLOSE "\r\n");
        assert_int_equal(status_of(got.bytes), 200);
        assert_int_equal(got.count - (size_t)(body_of(got.bytes) - got.bytes), LARGE_BYTES);
    }
}

// One that reads slowly but steadily, for many times the deadline, gets everything.
static void test_slow_reader(void **state)
{
    (void)state;
    int fd = connect_to(here.port), small = 65536;
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof small); // or its kernel would take much at a time
    double began_s = clock_now_s();
    size_t count = 0;
    send_text(fd, "GET /flood HTTP/1.0\r\nConnection: close\r\n\r\n");
    for (;;) {
        size_t room = sizeof got.bytes - 1 - count;
        ssize_t bytes = recv(fd, got.bytes + count, room < 16384 ? room : 16384, 0);
        if (bytes <= 0) {
            assert_int_equal(bytes, 0);
            break;
        }
        count += (size_t)bytes;
        sleep_s(PATIENCE * 0.007);
    }
    close(fd);
    got.bytes[count] = 0;
    const char *body = body_of(got.bytes);
    size_t body_bytes = count - (size_t)(body - got.bytes);
    assert_int_equal(body_bytes, FLOOD_BYTES / FLOOD_PIECE * FLOOD_PIECE);
    for (size_t i = 0; i < body_bytes; i++)
        if (body[i] != (char)('a' + i % 23))
            fail_msg("byte %zu is wrong", i);
    assert_true(clock_now_s() - began_s > 2 * limits.write_stall_s); // or it was no test
    assert_true(here.waits > 10);
    wait_for(&here.complete, 1);
    assert_int_equal(here.writable, here.waits);
}

// ---- the client's end ----------------------------------------------------------------------------------------------

// Keeps the server's thread away from its sockets.
static atomic_int naps;
static void nap(void *arg)
{
    (void)arg;
    sleep_s(0.01);
    atomic_fetch_add(&naps, 1);
}

// So many have come, and all have gone.
static void wait_for_connections_to_go(int accepted)
{
    struct http_server_stats stats = {.connections = 1};
    for (double until_s = clock_now_s() + ENOUGH_S; clock_now_s() < until_s; sleep_s(0.005)) {
        http_server_read_stats(here.server, &stats);
        if (stats.connections == 0 && stats.accepted_total >= accepted)
            return;
    }
    fail_msg("%d connections are left of %d", (int)stats.connections, (int)stats.accepted_total);
}

// In every phase, by FIN and by RST: nothing is left, and an exchange that waits ends at once.
static void test_disconnects(void **state)
{
    (void)state;
    struct http_post nap_post = {.fn = nap};
    static const struct {
        const char *name, *text;
        bool exchange;
    } phases[] = {
        {"before the request", "", false},
        {"in the head", "GET / HTT", false},
        {"in the body", "POST / HTTP/1.1\r\n" HOST "Content-Length: 100\r\n\r\nabc", false},
        {"in a chunk", "POST / HTTP/1.1\r\n" HOST "Transfer-Encoding: chunked\r\n\r\n5\r\nab", false},
        {"waiting", "GET /hold HTTP/1.1\r\n" HOST "\r\n", true},
        {"waiting, more sent", "GET /hold HTTP/1.1\r\n" HOST "\r\nGET /more HTTP/1.1\r\n" HOST "\r\n", true},
        {"in a stream", "GET /open HTTP/1.1\r\n" HOST "\r\n", true},
        {"in a stream of 1.0", "GET /open HTTP/1.0\r\n\r\n", true},
        {"refused", "GET / HTTP/7.7\r\n", false},
    };
    const size_t num_phases = sizeof phases / sizeof phases[0];
    int ended = 0, num_naps = 0;
    for (size_t i = 0; i < num_phases; i++)
        for (int how = 0; how < 8; how++) {
            int fd = connect_to(here.port), requests = here.requests;
            if (!(how & 1)) { // the end comes in one event with the request
                wait_for(&naps, num_naps++);
                http_server_post(here.server, &nap_post);
            }
            send_text(fd, phases[i].text);
            if ((how & 1) && phases[i].exchange)
                wait_for(&here.requests, requests + 1);
            else if (how & 1)
                sleep_s(0.02);
            if (phases[i].exchange && how >= 4) {
                send_text(fd, "GET /behind HTTP/1.1\r\n" HOST "\r\n"); // the end is behind bytes that nobody reads
                sleep_s(0.01);
            }
            struct stopwatch watch = stopwatch_start();
            if (how & 2)
                reset(fd);
            else
                close(fd);
            // A reset may overtake the request: then there was no exchange.
            if (phases[i].exchange && ((how & 1) || !(how & 2)))
                ended++;
            else if (phases[i].exchange) {
                wait_for_connections_to_go((int)i * 8 + how + 1);
                ended = here.incomplete;
            }
            while (atomic_load(&here.incomplete) < ended && stopwatch_s(&watch) < ENOUGH_S)
                sleep_s(0.001);
            if (here.incomplete != ended || stopwatch_idle_s(&watch) > PATIENCE * 0.25)
                fail_msg("%s, way %d: %d ended, wanted %d, after %.3f s", phases[i].name, how, here.incomplete, ended,
                         stopwatch_s(&watch));
        }
    assert_int_equal(here.last_status == 499 || here.last_status == 200, 1);
    wait_for_connections_to_go((int)num_phases * 8);
}

// A client that shuts down its side gets what is answered at once, and what a handler said comes soon; else it is gone.
static void test_half_close(void **state)
{
    (void)state;
    int fd = connect_to(here.port);
    send_text(fd, "GET /echo HTTP/1.0\r\n\r\n");
    shutdown(fd, SHUT_WR);
    receive(fd);
    assert_int_equal(status_of(got.bytes), 200);
    close(fd);

    fd = connect_to(here.port);
    send_text(fd, "GET /half HTTP/1.1\r\n" HOST "\r\n");
    shutdown(fd, SHUT_WR);
    wait_for(&here.requests, 2);
    sleep_s(0.05);
    assert_int_equal(here.incomplete, 0);
    http_server_post(here.server, &respond_post);
    receive(fd);
    assert_string_equal(body_of(got.bytes), "late");
    assert_true(got.closed && !got.reset);
    close(fd);

    fd = connect_to(here.port);
    send_text(fd, "GET /half HTTP/1.1\r\n" HOST "\r\n");
    wait_for(&here.requests, 3);
    reset(fd); // nobody is there to take it
    wait_for(&here.incomplete, 1);

    fd = connect_to(here.port);
    send_text(fd, "GET /hold HTTP/1.1\r\n" HOST "\r\n");
    shutdown(fd, SHUT_WR);
    wait_for(&here.incomplete, 2);
    receive(fd);
    assert_int_equal(got.count, 0);
    close(fd);
}

// ---- limits of the whole server ------------------------------------------------------------------------------------

static void test_connection_limit(void **state)
{
    (void)state;
    int fds[40];
    for (int i = 0; i < 40; i++) {
        fds[i] = connect_to(here.port);
        send_text(fds[i], "GET /hold HTTP/1.1\r\n" HOST "\r\n");
    }
    wait_for(&here.requests, 40);
    for (int i = 0; i < 5; i++) {
        ask("GET / HTTP/1.1\r\n" CLOSE "\r\n");
        assert_int_equal(status_of(got.bytes), 503);
        assert_non_null(strstr(got.bytes, "Retry-After: 1"));
        assert_true(got.closed && !got.reset);
    }
    // Health checks have connections of their own.
    int fd = connect_to(here.health_port);
    send_text(fd, "GET /port HTTP/1.1\r\n" CLOSE "\r\n");
    receive(fd);
    assert_string_equal(body_of(got.bytes), "health");
    close(fd);
    for (int i = 0; i < 40; i++)
        close(fds[i]);
    wait_for(&here.incomplete, 40);
    ask("GET / HTTP/1.1\r\n" CLOSE "\r\n");
    assert_int_equal(status_of(got.bytes), 200);
}

static double cpu_s(void)
{
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return (double)usage.ru_utime.tv_sec + 1e-6 * (double)usage.ru_utime.tv_usec + (double)usage.ru_stime.tv_sec +
           1e-6 * (double)usage.ru_stime.tv_usec;
}

// Without descriptors the server waits without spinning, and goes on when there are some.
static void test_no_descriptors(void **state)
{
    (void)state;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_in address = {
        .sin_family = AF_INET, .sin_port = htons((uint16_t)here.port), .sin_addr = {htonl(INADDR_LOOPBACK)}};
    struct rlimit before, none;
    getrlimit(RLIMIT_NOFILE, &before);
    none = (struct rlimit){.rlim_cur = (rlim_t)fd + 1, .rlim_max = before.rlim_max};
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &none), 0);
    assert_int_equal(connect(fd, (struct sockaddr *)&address, sizeof address), 0);
    send_text(fd, "GET / HTTP/1.1\r\n" CLOSE "\r\n");
    double began_s = cpu_s();
    sleep_s(0.4);
    double used_s = cpu_s() - began_s;
    assert_int_equal(here.requests, 0);
    setrlimit(RLIMIT_NOFILE, &before);
    receive(fd);
    close(fd);
    assert_int_equal(status_of(got.bytes), 200);
    if (used_s > 0.1)
        fail_msg("%.3f s of CPU in 0.4 s of waiting", used_s);
}

int main(void)
{
#define SERVED(test) cmocka_unit_test_setup_teardown(test, start, stop)
    const struct CMUnitTest tests[] = {
        SERVED(test_refusals),         SERVED(test_linger),           SERVED(test_deadlines),
        SERVED(test_stalled_reader),   SERVED(test_slow_reader),      SERVED(test_disconnects),
        SERVED(test_half_close),       SERVED(test_connection_limit), SERVED(test_no_descriptors),
        SERVED(test_trickling_reader), SERVED(test_output_budget),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
