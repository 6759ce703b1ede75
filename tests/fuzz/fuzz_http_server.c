// The whole HTTP server: the bytes come over a socket in two pieces, and the answers must be those that the parser alone would lead to, in
// their order, and nothing else. Every exchange ends once.
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <pthread.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "engine/serve/http_parser.h"
#include "engine/serve/http_server.h"
#include "tests/fuzz/fuzz.h"

static const struct http_parser_limits parser_limits = {600, 8, 100, 300};
static struct http_server *server;
static char socket_path[64];
static atomic_llong num_requests, num_ended;

// By the path's first letter: a whole answer, a stream, a stream that is cut off.
static void on_request(void *arg, struct http_exchange *exchange)
{
    (void)arg;
    const struct http_request *request = http_exchange_request(exchange);
    atomic_fetch_add(&num_requests, 1);
    CHECK(strlen(request->path) >= 1 && request->body[request->body_bytes] == 0);
    if (request->path[1] == 's' || request->path[1] == 'a') {
        http_stream_begin(exchange, 200, "text/plain");
        http_stream_write(exchange, "text", 4);
        if (request->path[1] == 's')
            http_stream_end(exchange);
        else
            http_exchange_abort(exchange);
    } else {
        http_add_header(exchange, "X-Method", request->method);
        http_add_header(exchange, "X-Path", request->path);
        http_respond(exchange, 200, NULL, "text", 4);
    }
}

static void on_ended(void *arg, struct http_exchange *exchange, bool complete)
{
    (void)arg, (void)exchange, (void)complete;
    atomic_fetch_add(&num_ended, 1);
}

static void *run(void *arg)
{
    struct error err;
    CHECK(http_server_run(arg, &err) == 0);
    return NULL;
}

static void remove_socket(void) { unlink(socket_path); }

static void start(void)
{
    struct http_limits limits = http_limits_default;
    struct http_handlers handlers = {.on_request = on_request, .on_ended = on_ended};
    struct error err;
    pthread_t thread;
    limits.header_bytes = parser_limits.header_bytes;
    limits.headers = parser_limits.headers;
    limits.uri_bytes = parser_limits.uri_bytes;
    limits.body_bytes = parser_limits.body_bytes;
    snprintf(socket_path, sizeof socket_path, "/tmp/fuzz_http_server_%d", (int)getpid());
    CHECK(http_server_create(&server, &limits, &handlers, &err) == 0);
    CHECK(http_server_listen_unix(server, socket_path, &err) == 0);
    CHECK(pthread_create(&thread, NULL, run, server) == 0);
    atexit(remove_socket);
}

// The statuses in what the server sent: 'c' for 100, 'o' for 200, and so on; nothing that a client chose can look like one, because line ends
// cannot come into an answer.
static size_t statuses_of(const char *answer, size_t bytes, int *statuses, size_t room)
{
    size_t count = 0;
    for (size_t i = 0; i + 12 < bytes; i++)
        if (memcmp(answer + i, "HTTP/1.1 ", 9) == 0 &&
            (i == 0 || answer[i - 1] == '\n' || memcmp(answer + i - 4, "text", 4) == 0)) {
            CHECK(count < room);
            statuses[count++] = atoi(answer + i + 9);
        }
    return count;
}

static size_t wanted_statuses(const uint8_t *data, size_t size, int *statuses, size_t room)
{
    struct http_parser parser;
    size_t count = 0, at = 0;
    bool open = true;
    http_parser_init(&parser, &parser_limits, NULL);
    while (open && at < size) {
        at += http_parser_feed(&parser, (const char *)data + at, size - at);
        if (parser.phase < HTTP_PARSER_COMPLETE)
            break;
        CHECK(count < room);
        if (parser.phase == HTTP_PARSER_REFUSED) {
            statuses[count++] = parser.status;
            break;
        }
        statuses[count++] = 200;
        open = parser.keep_alive && parser.path[1] != 'a' && !(parser.path[1] == 's' && parser.minor_version == 0);
        http_parser_reset(&parser);
    }
    http_parser_reset(&parser);
    return count;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    enum { ROOM = 400 };
    static char answer[1 << 18];
    int statuses[ROOM], wanted[ROOM];
    size_t bytes = 0, cut = size ? data[size / 2] * size / 256 : 0;
    if (size > 4096)
        return 0;
    if (!server)
        start();
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strcpy(address.sun_path, socket_path);
    CHECK(fd >= 0 && connect(fd, (struct sockaddr *)&address, sizeof address) == 0);
    // The server may have refused, and closed, after the first piece.
    (void)!send(fd, data, cut, MSG_NOSIGNAL);
    if (size & 1)
        sched_yield();
    (void)!send(fd, data + cut, size - cut, MSG_NOSIGNAL);
    shutdown(fd, SHUT_WR);
    for (ssize_t more; (more = recv(fd, answer + bytes, sizeof answer - bytes, 0)) > 0;)
        bytes += (size_t)more;
    close(fd);

    size_t num_wanted = wanted_statuses(data, size, wanted, ROOM), num = statuses_of(answer, bytes, statuses, ROOM),
           at = 0;
    for (size_t i = 0; i < num; i++) {
        if (statuses[i] == 100)
            continue; // comes when the head does not come with its body
        CHECK(at < num_wanted && statuses[i] == wanted[at]);
        at++;
    }
    CHECK(at == num_wanted);
    CHECK(atomic_load(&num_ended) <= atomic_load(&num_requests) &&
          atomic_load(&num_requests) - atomic_load(&num_ended) <= 1);
    return 0;
}
