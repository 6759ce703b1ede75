// The HTTP server under test, in this process on a thread of its own, with deadlines of tenths of a second; and clients, which are plain sockets.
#ifndef TPSHARD_TESTS_HTTP_HELP_H
#define TPSHARD_TESTS_HTTP_HELP_H

#include "engine/serve/http_server.h"
#include "kernels/clock.h"
#include "tests/patience.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cmocka.h>

#define HOST "Host: x\r\n"

static const struct http_limits limits = {
    .header_bytes = 16384,
    .headers = 64,
    .uri_bytes = 2048,
    .body_bytes = 100000,
    .all_bodies_bytes = 400000,
    .header_s = PATIENCE * 0.4,
    .body_s = PATIENCE * 0.7,
    .idle_s = PATIENCE * 1.0,
    .write_stall_s = PATIENCE * 0.8,
    .linger_s = PATIENCE * 0.5,
    .output_bytes = 16384,
    .all_output_bytes = 6 << 20,
    .connections = 40,
};

enum { ENOUGH_S = 30 }; // for what comes at once, or never

static inline void sleep_s(double seconds) { usleep((useconds_t)(1e6 * seconds)); }

// ---- the server under test -----------------------------------------------------------------------------------------

enum { FLOOD_BYTES = 4 << 20, FLOOD_PIECE = 1000, LARGE_BYTES = 4 << 20 };

static struct {
    struct http_server *server;
    pthread_t thread;
    int port, health_port;
    atomic_int requests, complete, incomplete, answered, refused, last_status, last_refusal, writable, waits;
    atomic_llong flooded;
    struct http_exchange *_Atomic held; // of the last /hold
} here;

struct flood { // what a flooding exchange has written
    uint64_t bytes, total;
};

static inline void flood(struct http_exchange *exchange)
{
    struct flood *flood = http_exchange_data(exchange);
    char piece[FLOOD_PIECE];
    while (flood->bytes < flood->total) {
        for (int i = 0; i < FLOOD_PIECE; i++)
            piece[i] = (char)('a' + (flood->bytes + (uint64_t)i) % 23);
        flood->bytes += FLOOD_PIECE;
        atomic_fetch_add(&here.flooded, FLOOD_PIECE);
        if (!http_stream_write(exchange, piece, FLOOD_PIECE)) {
            atomic_fetch_add(&here.waits, 1);
            return;
        }
    }
    http_stream_end(exchange);
}

static inline void begin_flood(struct http_exchange *exchange)
{
    struct flood *flooding = calloc(1, sizeof *flooding);
    flooding->total = FLOOD_BYTES / FLOOD_PIECE * FLOOD_PIECE;
    http_exchange_set_data(exchange, flooding);
    http_stream_begin(exchange, 200, "text/plain");
    flood(exchange);
}

static inline void answer_echo(struct http_exchange *exchange)
{
    const struct http_request *request = http_exchange_request(exchange);
    const char *header = http_request_header(exchange, "x-test");
    char text[600];
    int count = snprintf(text, sizeof text, "%s %s ?%s %s %ju %.100s", request->method, request->path, request->query,
                         header ? header : "-", (uintmax_t)request->body_bytes, request->body);
    http_add_header(exchange, "X-Good", "yes");
    http_add_header(exchange, "X-Bad", "a\r\nX-Injected: 1");
    http_add_header(exchange, "X Bad", "name");
    http_add_header(exchange, "Content-Length", "7");
    http_respond(exchange, 200, "text/plain", text, (size_t)count);
    http_respond(exchange, 500, "text/plain", "twice", 5); // ignored
    assert_true(http_stream_write(exchange, "x", 1));
    http_stream_end(exchange);
    http_exchange_abort(exchange);
}

static inline void on_request(void *arg, struct http_exchange *exchange)
{
    assert_ptr_equal(arg, &here);
    atomic_fetch_add(&here.requests, 1);
    const char *path = http_exchange_request(exchange)->path;
    if (strcmp(path, "/hold") == 0 || strcmp(path, "/half") == 0) {
        if (strcmp(path, "/half") == 0)
            http_exchange_outlive_half_close(exchange);
        atomic_store(&here.held, exchange);
    } else if (strcmp(path, "/open") == 0) {
        http_stream_begin(exchange, 200, "text/event-stream");
        http_stream_write(exchange, "data: 1\n\n", 9);
        atomic_store(&here.held, exchange);
    } else if (strcmp(path, "/stream") == 0) {
        http_stream_begin(exchange, 200, "text/event-stream");
        http_stream_write(exchange, "", 0);
        http_stream_write(exchange, "one ", 4);
        http_stream_write(exchange, "and two", 7);
        http_stream_end(exchange);
    } else if (strcmp(path, "/flood") == 0) {
        begin_flood(exchange);
    } else if (strcmp(path, "/large") == 0) {
        static const char large[LARGE_BYTES];
        http_respond(exchange, 200, "text/plain", large, sizeof large);
    } else if (strcmp(path, "/abort") == 0) {
        http_stream_begin(exchange, 200, "text/plain");
        http_stream_write(exchange, "begin", 5);
        http_exchange_abort(exchange);
    } else if (strcmp(path, "/none") == 0) {
        http_respond(exchange, 204, NULL, "ignored", 7);
    } else if (strcmp(path, "/take") == 0) {
        uint64_t bytes;
        char *body = http_request_take_body(exchange, &bytes);
        assert_int_equal(http_exchange_request(exchange)->body_bytes, 0);
        assert_int_equal(bytes, strlen(body));
        http_respond(exchange, 200, "text/plain", body, bytes);
        free(body);
    } else if (strcmp(path, "/port") == 0) {
        http_respond(exchange, 200, NULL, http_exchange_request(exchange)->health_port ? "health" : "main", 6);
    } else {
        answer_echo(exchange);
    }
}

static inline void on_writable(void *arg, struct http_exchange *exchange)
{
    (void)arg;
    atomic_fetch_add(&here.writable, 1);
    flood(exchange);
}

static inline void on_ended(void *arg, struct http_exchange *exchange, bool complete)
{
    (void)arg;
    atomic_fetch_add(complete ? &here.complete : &here.incomplete, 1);
    if (atomic_load(&here.held) == exchange)
        atomic_store(&here.held, NULL);
    free(http_exchange_data(exchange));
    http_respond(exchange, 200, NULL, "too late", 8); // ignored
}

static inline void on_answered(void *arg, const struct http_exchange *exchange, int status, uint64_t body_bytes)
{
    (void)arg, (void)exchange, (void)body_bytes;
    atomic_fetch_add(&here.answered, 1);
    atomic_store(&here.last_status, status);
}

static inline void on_refused(void *arg, const char *peer, int status)
{
    (void)arg;
    assert_true(peer[0]);
    atomic_fetch_add(&here.refused, 1);
    atomic_store(&here.last_refusal, status);
}

static const struct http_handlers handlers = {&here, on_request, on_ended, on_writable, on_answered, on_refused};

static inline void *run(void *arg)
{
    struct error err;
    return http_server_run(arg, &err) ? (void *)1 : NULL;
}

static inline int start_with(const struct http_limits *with)
{
    struct error err = {0};
    memset(&here, 0, sizeof here);
    int rc = http_server_create(&here.server, with, &handlers, &err) ||
             http_server_listen(here.server, "127.0.0.1", 0, false, &here.port, &err) ||
             http_server_listen(here.server, "127.0.0.1", 0, true, &here.health_port, &err) ||
             pthread_create(&here.thread, NULL, run, here.server);
    if (rc)
        fprintf(stderr, "%s\n", err.msg);
    return rc;
}

static inline int start(void **state)
{
    (void)state;
    return start_with(&limits);
}

// After each test: every request had its one end.
static inline int stop(void **state)
{
    (void)state;
    struct http_server_stats stats;
    void *failed;
    http_server_stop(here.server);
    pthread_join(here.thread, &failed);
    http_server_read_stats(here.server, &stats);
    http_server_free(here.server);
    return failed || stats.connections != 0 || stats.exchanges != 0 ||
           here.requests != here.complete + here.incomplete || here.requests != here.answered || here.held ||
           stats.requests_total != here.requests || stats.refused_total != here.refused;
}

static inline void wait_for(atomic_int *counter, int wanted)
{
    for (double until_s = clock_now_s() + ENOUGH_S; atomic_load(counter) != wanted && clock_now_s() < until_s;)
        sleep_s(0.002);
    assert_int_equal(atomic_load(counter), wanted);
}

// ---- clients -------------------------------------------------------------------------------------------------------

static inline int connect_to(int port)
{
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_in address = {
        .sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr = {htonl(INADDR_LOOPBACK)}};
    assert_true(fd >= 0);
    assert_int_equal(connect(fd, (struct sockaddr *)&address, sizeof address), 0);
    return fd;
}

static inline void send_bytes(int fd, const char *bytes, size_t count)
{
    while (count > 0) {
        ssize_t sent = send(fd, bytes, count, MSG_NOSIGNAL);
        if (sent < 0)
            return; // the server may have refused already
        bytes += sent;
        count -= (size_t)sent;
    }
}

static inline void send_text(int fd, const char *text) { send_bytes(fd, text, strlen(text)); }

static struct {
    char bytes[8 << 20];
    size_t count;
    bool closed, reset; // the server's end came; as a reset
} got;

// Reads until the server closes, or until the end of the text is there, or for so long.
static inline void receive_until(int fd, const char *end, double seconds)
{
    double until_s = clock_now_s() + seconds;
    got.count = 0;
    got.closed = got.reset = false;
    got.bytes[0] = 0;
    while (!(end && got.count >= strlen(end) && strcmp(got.bytes + got.count - strlen(end), end) == 0)) {
        double left_s = until_s - clock_now_s();
        struct pollfd state = {.fd = fd, .events = POLLIN};
        if (left_s <= 0 || poll(&state, 1, (int)(1000 * left_s) + 1) == 0)
            return;
        ssize_t bytes = recv(fd, got.bytes + got.count, sizeof got.bytes - 1 - got.count, 0);
        if (bytes <= 0) {
            got.closed = true;
            got.reset = bytes < 0;
            return;
        }
        got.count += (size_t)bytes;
        got.bytes[got.count] = 0;
    }
}

static inline void receive(int fd) { receive_until(fd, NULL, ENOUGH_S); }

static inline int status_of(const char *answer) { return strncmp(answer, "HTTP/1.1 ", 9) == 0 ? atoi(answer + 9) : 0; }

static inline const char *body_of(const char *answer)
{
    const char *end = strstr(answer, "\r\n\r\n");
    return end ? end + 4 : "";
}

static inline void reset(int fd)
{
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &(struct linger){.l_onoff = 1}, sizeof(struct linger));
    close(fd);
}

// One request on a connection of its own.
static inline void ask(const char *text)
{
    int fd = connect_to(here.port);
    send_text(fd, text);
    receive(fd);
    close(fd);
}

#define CLOSE HOST "Connection: close\r\n"

static inline void respond_to_held(void *arg)
{
    (void)arg;
    if (here.held)
        http_respond(here.held, 200, "text/plain", "late", 4);
}

static struct http_post respond_post = {.fn = respond_to_held};

#endif
