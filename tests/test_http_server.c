// What the HTTP server does for good clients and for the program: answers, their order, posts, drain and stop, listening.
#include "tests/http_help.h"

// ---- many requests on a connection ---------------------------------------------------------------------------------

static void test_keep_alive(void **state)
{
    (void)state;
    static const char request[] = "GET /a HTTP/1.1\r\n" HOST "X-Test: t\r\n\r\n";
    int fd = connect_to(here.port);
    for (int i = 0; i < 10000; i++) {
        send_bytes(fd, request, sizeof request - 1);
        receive_until(fd, "GET /a ? t 0 ", 2);
        if (status_of(got.bytes) != 200 || strcmp(body_of(got.bytes), "GET /a ? t 0 ") != 0)
            fail_msg("request %d: %s", i, got.bytes);
    }
    close(fd);
    assert_int_equal(here.requests, 10000);
    struct http_server_stats stats;
    http_server_read_stats(here.server, &stats);
    assert_int_equal(stats.accepted_total, 1);
}

// All at once, with bodies and chunks between; the answers come in order. The last one's client is slow to read.
static void test_pipelining(void **state)
{
    (void)state;
    enum { NUM = 3000 };
    int fd = connect_to(here.port);
    char *text = malloc(NUM * 120), *at = text;
    assert_non_null(text);
    for (int i = 0; i < NUM; i++) {
        if (i % 3 == 0)
            at += sprintf(at, "GET /%d HTTP/1.1\r\n" HOST "%s\r\n", i, i == NUM - 1 ? "Connection: close\r\n" : "");
        else if (i % 3 == 1)
            at += sprintf(at, "POST /%d HTTP/1.1\r\n" HOST "Content-Length: 5\r\n\r\nhello", i);
        else
            at += sprintf(at, "POST /%d HTTP/1.1\r\n" HOST "Transfer-Encoding: chunked\r\n%s\r\n2\r\nab\r\n0\r\n\r\n",
                          i, i == NUM - 1 ? "Connection: close\r\n" : "");
    }
    size_t count = (size_t)(at - text);
    fcntl(fd, F_SETFL, O_NONBLOCK);
    size_t sent = 0;
    got.count = 0;
    for (double until_s = clock_now_s() + 5; clock_now_s() < until_s;) {
        struct pollfd poller = {.fd = fd, .events = (short)(POLLIN | (sent < count ? POLLOUT : 0))};
        poll(&poller, 1, 100);
        ssize_t bytes = sent < count ? send(fd, text + sent, count - sent, MSG_NOSIGNAL) : 0;
        if (bytes > 0)
            sent += (size_t)bytes;
        bytes = recv(fd, got.bytes + got.count, sizeof got.bytes - 1 - got.count, 0);
        if (bytes == 0)
            break;
        if (bytes > 0)
            got.count += (size_t)bytes;
    }
    got.bytes[got.count] = 0;
    free(text);
    close(fd);
    const char *answer = got.bytes;
    for (int i = 0; i < NUM; i++) {
        char wanted[80];
        sprintf(wanted, "%s /%d ? - %s", i % 3 ? "POST" : "GET", i,
                i % 3 == 0   ? "0 "
                : i % 3 == 1 ? "5 hello"
                             : "2 ab");
        if (status_of(answer) != 200 || strncmp(body_of(answer), wanted, strlen(wanted)) != 0)
            fail_msg("answer %d: %.300s", i, answer);
        answer = body_of(answer) + strlen(wanted);
    }
    assert_string_equal(answer, "");
    assert_int_equal(here.requests, NUM);
}

// A request behind one whose answer takes long waits its turn.
static void test_order(void **state)
{
    (void)state;
    int fd = connect_to(here.port);
    send_text(fd, "GET /hold HTTP/1.1\r\n" HOST "\r\nGET /second HTTP/1.1\r\n" HOST "\r\n");
    wait_for(&here.requests, 1);
    send_text(fd, "GET /third HTTP/1.1\r\n" CLOSE "\r\n");
    sleep_s(0.05);
    assert_int_equal(here.requests, 1);
    http_server_post(here.server, &respond_post);
    receive(fd);
    close(fd);
    const char *first = strstr(got.bytes, "late"), *second = strstr(got.bytes, "/second"),
               *third = strstr(got.bytes, "/third");
    assert_true(first && second && third && first < second && second < third);
}

// ---- answers -------------------------------------------------------------------------------------------------------

static void test_answers(void **state)
{
    (void)state;
    ask("GET /a%20b?c=d HTTP/1.1\r\n" CLOSE "X-Test: v\r\n\r\n");
    assert_string_equal(body_of(got.bytes), "GET /a b ?c=d v 0 ");
    assert_non_null(strstr(got.bytes, "\r\nContent-Length: 18\r\n"));
    assert_non_null(strstr(got.bytes, "\r\nContent-Type: text/plain\r\n"));
    assert_non_null(strstr(got.bytes, "\r\nConnection: close\r\n"));
    assert_non_null(strstr(got.bytes, "\r\nX-Good: yes\r\n"));
    assert_null(strstr(got.bytes, "Injected"));
    assert_null(strstr(got.bytes, "X Bad"));
    assert_null(strstr(got.bytes, "Content-Length: 7"));
    const char *date = strstr(got.bytes, "\r\nDate: ");
    struct tm parts = {0};
    assert_true(date && strptime(date + 8, "%a, %d %b %Y %H:%M:%S GMT", &parts));
    assert_true(labs((long)(timegm(&parts) - time(NULL))) <= 2);

    ask("HEAD /a HTTP/1.1\r\n" CLOSE "\r\n");
    assert_non_null(strstr(got.bytes, "\r\nContent-Length: 14\r\n"));
    assert_string_equal(body_of(got.bytes), "");
    ask("HEAD /stream HTTP/1.1\r\n" CLOSE "\r\n");
    assert_non_null(strstr(got.bytes, "\r\nTransfer-Encoding: chunked\r\n"));
    assert_string_equal(body_of(got.bytes), "");
    ask("GET /none HTTP/1.1\r\n" CLOSE "\r\n");
    assert_int_equal(status_of(got.bytes), 204);
    assert_null(strstr(got.bytes, "Content-Length"));
    assert_string_equal(body_of(got.bytes), "");

    ask("GET /stream HTTP/1.1\r\n" CLOSE "\r\n");
    assert_string_equal(body_of(got.bytes), "4\r\none \r\n7\r\nand two\r\n0\r\n\r\n");
    ask("GET /stream HTTP/1.0\r\nConnection: keep-alive\r\n\r\n");
    assert_string_equal(body_of(got.bytes), "one and two");
    assert_true(got.closed);
    assert_null(strstr(got.bytes, "chunked"));
    ask("GET /abort HTTP/1.1\r\n" HOST "\r\n");
    assert_string_equal(body_of(got.bytes), "5\r\nbegin\r\n");
    assert_true(got.closed);

    int fd = connect_to(here.port);
    send_text(fd, "GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n");
    receive_until(fd, "GET / ? - 0 ", 2);
    assert_non_null(strstr(got.bytes, "\r\nConnection: keep-alive\r\n"));
    send_text(fd, "GET / HTTP/1.0\r\n\r\n");
    receive(fd);
    assert_non_null(strstr(got.bytes, "\r\nConnection: close\r\n"));
    assert_true(got.closed);
    close(fd);
    wait_for(&here.complete, 8);
    wait_for(&here.incomplete, 1);
}

static void test_bodies(void **state)
{
    (void)state;
    ask("POST /take HTTP/1.1\r\n" CLOSE "Content-Length: 5\r\n\r\nhello");
    assert_string_equal(body_of(got.bytes), "hello");
    ask("POST /take HTTP/1.1\r\n" CLOSE "Transfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2;x\r\nlo\r\n0\r\nA: b\r\n\r\n");
    assert_string_equal(body_of(got.bytes), "hello");

    // The client waits to be told; a body that comes along is not waited for.
    int fd = connect_to(here.port);
    send_text(fd, "POST /take HTTP/1.1\r\n" CLOSE "Expect: 100-continue\r\nContent-Length: 5\r\n\r\n");
    receive_until(fd, "\r\n\r\n", 2);
    assert_string_equal(got.bytes, "HTTP/1.1 100 Continue\r\n\r\n");
    send_text(fd, "hello");
    receive(fd);
    assert_int_equal(status_of(got.bytes), 200);
    assert_string_equal(body_of(got.bytes), "hello");
    close(fd);
    ask("POST /take HTTP/1.1\r\n" CLOSE "Expect: 100-continue\r\nContent-Length: 5\r\n\r\nhello");
    assert_int_equal(status_of(got.bytes), 200);

    // At the limit.
    static char large[100000];
    memset(large, 'x', sizeof large);
    fd = connect_to(here.port);
    send_text(fd, "POST /take HTTP/1.1\r\n" CLOSE "Content-Length: 100000\r\n\r\n");
    send_bytes(fd, large, sizeof large);
    receive(fd);
    assert_int_equal(strlen(body_of(got.bytes)), 100000);
    close(fd);

    // What all requests hold together has a limit too.
    int fds[5], refused = 0, waiting = 0;
    for (int i = 0; i < 5; i++) {
        fds[i] = connect_to(here.port);
        send_text(fds[i], "POST /hold HTTP/1.1\r\n" HOST "Content-Length: 100000\r\n\r\n");
        send_bytes(fds[i], large, sizeof large);
    }
    for (int i = 0; i < 5; i++) {
        receive_until(fds[i], NULL, 0.1);
        refused += status_of(got.bytes) == 503;
        waiting += got.count == 0;
        close(fds[i]);
    }
    assert_int_equal(refused, 2);
    assert_int_equal(waiting, 3);
}

// ---- posts ---------------------------------------------------------------------------------------------------------

enum { POSTERS = 4, POSTS = 20000 };

static struct numbered {
    struct http_post node;
    int poster, number;
} numbered[POSTERS][POSTS];
static int next_number[POSTERS];
static atomic_int posts_run, out_of_order;

static void run_numbered(void *arg)
{
    struct numbered *post = arg;
    if (post->number != next_number[post->poster]++)
        atomic_fetch_add(&out_of_order, 1);
    memset(&post->node, 0xff, sizeof post->node); // it is ours again
    atomic_fetch_add(&posts_run, 1);
}

static void *post_numbered(void *arg)
{
    struct numbered *posts = arg;
    for (int i = 0; i < POSTS; i++)
        http_server_post(here.server, &posts[i].node);
    return NULL;
}

static void test_posts(void **state)
{
    (void)state;
    pthread_t threads[POSTERS];
    for (int poster = 0; poster < POSTERS; poster++)
        for (int i = 0; i < POSTS; i++)
            numbered[poster][i] = (struct numbered){{.fn = run_numbered, .arg = &numbered[poster][i]}, poster, i};
    for (int poster = 0; poster < POSTERS; poster++)
        assert_int_equal(pthread_create(&threads[poster], NULL, post_numbered, numbered[poster]), 0);
    for (int poster = 0; poster < POSTERS; poster++)
        pthread_join(threads[poster], NULL);
    wait_for(&posts_run, POSTERS * POSTS);
    assert_int_equal(out_of_order, 0);
}

static atomic_int early_posts;
static void run_early(void *arg)
{
    (void)arg;
    atomic_fetch_add(&early_posts, 1);
}

// Before the server runs, and on its way out.
static void test_posts_outside(void **state)
{
    (void)state;
    struct http_server *server;
    struct error err;
    struct http_post first = {.fn = run_early}, last = {.fn = run_early};
    assert_int_equal(http_server_create(&server, &limits, &handlers, &err), 0);
    http_server_post(server, &first);
    http_server_stop(server);
    assert_int_equal(http_server_run(server, &err), 0);
    assert_int_equal(early_posts, 1);
    http_server_post(server, &last);
    http_server_free(server);
    assert_int_equal(early_posts, 1);
    http_server_free(NULL);
}

// ---- drain and stop ------------------------------------------------------------------------------------------------

static void end_held_stream(void *arg)
{
    (void)arg;
    http_stream_write(here.held, "data: 2\n\n", 9);
    http_stream_end(here.held);
}

static void test_drain(void **state)
{
    (void)state;
    int stream = connect_to(here.port), idle = connect_to(here.port), fresh = connect_to(here.port);
    send_text(idle, "GET / HTTP/1.1\r\n" HOST "\r\n");
    receive_until(idle, "GET / ? - 0 ", 2);
    send_text(stream, "GET /open HTTP/1.1\r\n" HOST "\r\n");
    receive_until(stream, "data: 1\n\n\r\n", 2);
    send_text(stream, "GET /behind HTTP/1.1\r\n" HOST "\r\n");

    http_server_drain(here.server);
    receive(idle);
    assert_true(got.closed && got.count == 0);
    close(idle);
    for (int i = 0; i < 2; i++) { // what was open and what is new get one answer each
        int fd = i ? connect_to(here.port) : fresh;
        send_text(fd, "GET / HTTP/1.1\r\n" HOST "\r\nGET / HTTP/1.1\r\n" HOST "\r\n");
        receive(fd);
        assert_int_equal(status_of(got.bytes), 200);
        assert_non_null(strstr(got.bytes, "Connection: close"));
        assert_null(strstr(body_of(got.bytes), "HTTP"));
        assert_true(got.closed && !got.reset);
        close(fd);
    }
    int health = connect_to(here.health_port);
    send_text(health, "GET /port HTTP/1.1\r\n" HOST "\r\n");
    receive(health);
    assert_string_equal(body_of(got.bytes), "health");
    assert_non_null(strstr(got.bytes, "Connection: close"));
    close(health);

    struct http_post post = {.fn = end_held_stream};
    http_server_post(here.server, &post);
    receive(stream);
    assert_non_null(strstr(got.bytes, "data: 2\n\n\r\n0\r\n\r\n"));
    assert_non_null(strstr(got.bytes, "GET /behind ? - 0 "));
    assert_true(got.closed && !got.reset);
    close(stream);
}

static void test_stop(void **state)
{
    (void)state;
    int fds[10];
    for (int i = 0; i < 10; i++) {
        fds[i] = connect_to(here.port);
        send_text(fds[i], i % 3 == 0   ? "GET /hold HTTP/1.1\r\n" HOST "\r\n"
                          : i % 3 == 1 ? "GET /flood HTTP/1.1\r\n" HOST "\r\n"
                                       : "GET /open HTTP/1.1\r\n" HOST "\r\n");
    }
    wait_for(&here.requests, 10);
    assert_int_equal(stop(NULL), 0); // counts the ends
    for (int i = 0; i < 10; i++) {
        receive(fds[i]);
        assert_true(got.closed);
        close(fds[i]);
    }
}

// ---- listening -----------------------------------------------------------------------------------------------------

static void test_listen(void **state)
{
    (void)state;
    struct error err;
    struct http_server *server;
    int port, again;
    assert_int_equal(http_server_create(&server, &limits, &handlers, &err), 0);
    assert_int_equal(http_server_listen(server, "localhost", 0, false, &port, &err), 0);
    assert_in_range(port, 1, 65535);
    assert_int_equal(http_server_listen(server, "127.0.0.1", port, false, &again, &err), ERR_IO);
    assert_non_null(strstr(err.msg, "cannot listen on 127.0.0.1 port"));
    assert_int_equal(http_server_listen(server, "127.0.0.1", 70000, false, NULL, &err), ERR_USAGE);
    assert_int_equal(http_server_listen(server, "256.1.1.1", 0, false, NULL, &err), ERR_USAGE);
    assert_int_equal(http_server_listen(server, "192.0.2.1", 0, false, NULL, &err), ERR_IO); // not this machine's
    int fd = socket(AF_INET6, SOCK_STREAM, 0);
    struct sockaddr_in6 loopback = {.sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT};
    if (fd >= 0 && bind(fd, (struct sockaddr *)&loopback, sizeof loopback) == 0) {
        assert_int_equal(http_server_listen(server, "::1", 0, false, &port, &err), 0);
        assert_int_equal(http_server_listen(server, "[::1]", 0, false, &port, &err), 0);
    }
    if (fd >= 0)
        close(fd);
    http_server_free(server);
}

static int connect_unix(const char *path)
{
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strcpy(address.sun_path, path);
    if (connect(fd, (struct sockaddr *)&address, sizeof address) == 0)
        return fd;
    close(fd);
    return -1;
}

static void test_unix(void **state)
{
    (void)state;
    char folder[] = "/tmp/test_http_XXXXXX", path[64], file[64];
    struct error err;
    struct http_server *first, *second;
    struct stat status;
    assert_non_null(mkdtemp(folder));
    snprintf(path, sizeof path, "%s/socket", folder);
    snprintf(file, sizeof file, "%s/file", folder);

    // One that listens keeps its place; one that has died loses it.
    assert_int_equal(http_server_create(&first, &limits, &handlers, &err), 0);
    assert_int_equal(http_server_create(&second, &limits, &handlers, &err), 0);
    assert_int_equal(http_server_listen_unix(first, path, &err), 0);
    assert_int_equal(stat(path, &status), 0);
    assert_true(S_ISSOCK(status.st_mode));
    assert_int_equal(status.st_mode & 0777, 0600);
    assert_int_equal(http_server_listen_unix(second, path, &err), ERR_USAGE);
    assert_non_null(strstr(err.msg, "another server"));
    http_server_free(first);
    assert_int_equal(access(path, F_OK), -1);

    int stale = socket(AF_UNIX, SOCK_STREAM, 0);
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strcpy(address.sun_path, path);
    assert_int_equal(bind(stale, (struct sockaddr *)&address, sizeof address), 0);
    close(stale);
    assert_int_equal(http_server_listen_unix(second, path, &err), 0);

    // Not a socket, no folder, no room in the address.
    char long_path[200];
    memset(long_path, 'a', sizeof long_path - 1);
    long_path[sizeof long_path - 1] = 0;
    close(open(file, O_CREAT | O_WRONLY, 0600));
    assert_int_equal(http_server_listen_unix(second, file, &err), ERR_USAGE);
    assert_int_equal(http_server_listen_unix(second, "/nonexistent/folder/socket", &err), ERR_IO);
    assert_int_equal(http_server_listen_unix(second, long_path, &err), ERR_USAGE);
    assert_int_equal(http_server_listen_unix(second, "", &err), ERR_USAGE);

    struct http_server *mine = here.server; // the thread of this test's server is left alone
    pthread_t thread;
    int before = here.requests;
    assert_int_equal(pthread_create(&thread, NULL, run, second), 0);
    int fd = connect_unix(path);
    assert_true(fd >= 0);
    send_text(fd, "GET /flood HTTP/1.0\r\n\r\n");
    receive(fd);
    assert_int_equal(strlen(body_of(got.bytes)), FLOOD_BYTES / FLOOD_PIECE * FLOOD_PIECE);
    close(fd);
    fd = connect_unix(path);
    send_text(fd, "GET /hold HTTP/1.0\r\n\r\n");
    wait_for(&here.requests, before + 2);
    close(fd);
    wait_for(&here.incomplete, 1);
    http_server_stop(second);
    pthread_join(thread, NULL);

    // Another file in the socket's place stays.
    assert_int_equal(unlink(path), 0);
    assert_int_equal(rename(file, path), 0);
    http_server_free(second);
    assert_int_equal(access(path, F_OK), 0);
    unlink(path);
    rmdir(folder);
    here.server = mine;
    here.requests = here.complete = here.incomplete = here.answered = 0;
}

int main(void)
{
#define SERVED(test) cmocka_unit_test_setup_teardown(test, start, stop)
    const struct CMUnitTest tests[] = {
        SERVED(test_keep_alive),
        SERVED(test_pipelining),
        SERVED(test_order),
        SERVED(test_answers),
        SERVED(test_bodies),
        SERVED(test_posts),
        cmocka_unit_test(test_posts_outside),
        SERVED(test_drain),
        cmocka_unit_test_setup(test_stop, start),
        cmocka_unit_test(test_listen),
        SERVED(test_unix),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
