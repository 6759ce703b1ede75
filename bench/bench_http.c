// bench_http [CONNECTIONS [EVENTS [INTERVAL_MS]]]: what server-sent events cost. A server in a process of its own streams to clients in this one:
// an engine's thread posts one event of about 190 bytes for each stream every INTERVAL_MS. All events are counted, in their order.
// cpu_us_per_event is the server's, its kernel's part included; rss_kib_per_connection is what the server's process grew by.
#include "engine/serve/http_server.h"
#include "kernels/clock.h"
#include "version.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

enum { EVENT_BYTES = 190 };

static int num_connections = 4000, num_events = 100, interval_ms = 50;

static void die(const char *what)
{
    fprintf(stderr, "bench_http: %s: %s\n", what, strerror(errno));
    exit(1);
}

// ---- the server ----------------------------------------------------------------------------------------------------

static struct stream {
    struct http_post post;
    struct http_exchange *exchange;
    atomic_int due; // events that the engine has made and the loop has not written
    int written;
} * streams;
static struct http_server *server;
static atomic_int num_streams;

static void write_due(void *arg)
{
    struct stream *stream = arg;
    char event[256];
    for (int due = atomic_exchange(&stream->due, 0); due > 0 && stream->exchange; due--) {
        int head = snprintf(event, sizeof event, "data: {\"number\":%d,\"time\":%.6f,\"text\":\"", stream->written++,
                            clock_now_s());
        memset(event + head, 'x', EVENT_BYTES - 4 - (size_t)head);
        memcpy(event + EVENT_BYTES - 4, "\"}\n\n", 4);
        http_stream_write(stream->exchange, event, EVENT_BYTES);
        if (stream->written == num_events) {
            http_stream_end(stream->exchange);
            stream->exchange = NULL;
        }
    }
}

static void on_request(void *arg, struct http_exchange *exchange)
{
    (void)arg;
    int index = atomic_load(&num_streams);
    if (index == num_connections)
        return;
    streams[index] = (struct stream){.post = {.fn = write_due, .arg = &streams[index]}, .exchange = exchange};
    http_exchange_set_data(exchange, &streams[index]);
    http_stream_begin(exchange, 200, "text/event-stream");
    http_stream_write(exchange, ": begin\n\n", 9);
    atomic_store(&num_streams, index + 1);
}

static void on_ended(void *arg, struct http_exchange *exchange, bool complete)
{
    (void)arg, (void)complete;
    struct stream *stream = http_exchange_data(exchange);
    if (stream)
        stream->exchange = NULL;
}

static void on_writable(void *arg, struct http_exchange *exchange) { (void)arg, (void)exchange; }

static long rss_kib(void)
{
    long pages = 0;
    FILE *file = fopen("/proc/self/statm", "r");
    if (!file || fscanf(file, "%*d %ld", &pages) != 1)
        die("/proc/self/statm");
    fclose(file);
    return pages * (sysconf(_SC_PAGESIZE) / 1024);
}

static double cpu_s(void)
{
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
           1e-6 * (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec);
}

struct report {
    double cpu_s;
    long rss_before_kib, rss_kib;
};

// Ticks when all streams are there; then tells what they cost.
static void *engine(void *arg)
{
    struct report report = {.rss_before_kib = *(long *)arg};
    while (atomic_load(&num_streams) < num_connections)
        usleep(1000);
    usleep(200000);
    report.cpu_s = -cpu_s();
    double begin_s = clock_now_s();
    for (int event = 0; event < num_events; event++) {
        double wait_s = begin_s + 1e-3 * interval_ms * event - clock_now_s();
        if (wait_s > 0)
            usleep((useconds_t)(1e6 * wait_s));
        for (int i = 0; i < num_connections; i++)
            if (atomic_fetch_add(&streams[i].due, 1) == 0)
                http_server_post(server, &streams[i].post);
        if (event == num_events / 2)
            report.rss_kib = rss_kib();
    }
    struct http_server_stats stats;
    do {
        usleep(1000);
        http_server_read_stats(server, &stats);
    } while (stats.exchanges > 0);
    report.cpu_s += cpu_s();
    if (write(STDOUT_FILENO, &report, sizeof report) != sizeof report)
        die("write");
    return NULL;
}

static void serve(int out)
{
    struct http_limits limits = http_limits_default;
    struct http_handlers handlers = {.on_request = on_request, .on_ended = on_ended, .on_writable = on_writable};
    struct error err;
    int port;
    pthread_t thread;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    dup2(out, STDOUT_FILENO);
    limits.connections = num_connections + 10;
    streams = calloc((size_t)num_connections, sizeof *streams);
    memset(streams, 1, (size_t)num_connections * sizeof *streams); // its memory is the benchmark's, not a connection's
    if (http_server_create(&server, &limits, &handlers, &err) ||
        http_server_listen(server, "127.0.0.1", 0, false, &port, &err) || write(out, &port, sizeof port) != sizeof port)
        die(err.msg);
    long before_kib = rss_kib();
    if (pthread_create(&thread, NULL, engine, &before_kib))
        die("thread");
    if (http_server_run(server, &err))
        die(err.msg);
    exit(0);
}

// ---- the clients ---------------------------------------------------------------------------------------------------

struct client {
    int fd, num_events;
    char line[64]; // the begin of the present line
    size_t line_bytes;
    bool ended;
};

static double *delays_s;
static int64_t num_delays;

static void take_line(struct client *client)
{
    int number;
    double sent_s;
    client->line[client->line_bytes] = 0;
    if (sscanf(client->line, "data: {\"number\":%d,\"time\":%lf", &number, &sent_s) == 2) {
        if (number != client->num_events)
            die("an event is lost or out of order");
        client->num_events++;
        delays_s[num_delays++] = clock_now_s() - sent_s;
    }
    client->ended |= strcmp(client->line, "0\r") == 0;
    client->line_bytes = 0;
}

static bool take(struct client *client)
{
    char data[65536];
    ssize_t bytes = recv(client->fd, data, sizeof data, MSG_DONTWAIT);
    if (bytes <= 0)
        return bytes < 0 && errno == EAGAIN;
    for (ssize_t i = 0; i < bytes; i++) {
        if (data[i] == '\n')
            take_line(client);
        else if (client->line_bytes < sizeof client->line - 1)
            client->line[client->line_bytes++] = data[i];
    }
    return !client->ended;
}

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// Connects all clients; a poller that hears of them.
static int connect_all(struct client *clients, int port)
{
    int poller = epoll_create1(0);
    if (poller < 0)
        die("epoll_create1");
    struct sockaddr_in address = {
        .sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr = {htonl(INADDR_LOOPBACK)}};
    static const char request[] = "GET /events HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\n\r\n";
    for (int i = 0; i < num_connections; i++) {
        clients[i].fd = socket(AF_INET, SOCK_STREAM, 0);
        if (clients[i].fd < 0 || connect(clients[i].fd, (struct sockaddr *)&address, sizeof address) ||
            send(clients[i].fd, request, sizeof request - 1, 0) != sizeof request - 1)
            die("connect");
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = &clients[i]};
        if (epoll_ctl(poller, EPOLL_CTL_ADD, clients[i].fd, &event))
            die("epoll_ctl");
    }
    return poller;
}

// Takes what comes until every stream has ended.
static void take_all(int poller)
{
    int open_clients = num_connections;
    while (open_clients > 0) {
        struct epoll_event events[256];
        int count = epoll_wait(poller, events, 256, 20000);
        if (count == 0)
            die("nothing came for 20 s");
        for (int i = 0; i < count; i++) {
            struct client *client = events[i].data.ptr;
            if (take(client))
                continue;
            epoll_ctl(poller, EPOLL_CTL_DEL, client->fd, NULL);
            open_clients--;
        }
    }
}

static bool raise_limit(void)
{
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    if (files.rlim_cur >= (rlim_t)num_connections + 50)
        return true;
    printf("SKIP: %d descriptors are allowed\n", (int)files.rlim_cur);
    return false;
}

static void read_arguments(int argc, char **argv)
{
    if (argc > 1)
        num_connections = atoi(argv[1]);
    if (argc > 2)
        num_events = atoi(argv[2]);
    if (argc > 3)
        interval_ms = atoi(argv[3]);
    if (num_connections < 1 || num_events < 1 || interval_ms < 0) {
        fprintf(stderr, "usage: bench_http [CONNECTIONS [EVENTS [INTERVAL_MS]]]\n");
        exit(2);
    }
}

int main(int argc, char **argv)
{
    read_arguments(argc, argv);
    if (!raise_limit())
        return 0;
    int pipes[2], port = 0;
    if (pipe(pipes))
        die("pipe");
    pid_t child = fork();
    if (child == 0)
        serve(pipes[1]);
    close(pipes[1]);
    if (child < 0 || read(pipes[0], &port, sizeof port) != sizeof port)
        die("the server did not start");

    int64_t wanted = (int64_t)num_connections * num_events;
    struct client *clients = calloc((size_t)num_connections, sizeof *clients);
    delays_s = calloc((size_t)wanted, sizeof *delays_s);
    if (!clients || !delays_s)
        die("memory");
    take_all(connect_all(clients, port));
    struct report report;
    if (read(pipes[0], &report, sizeof report) != sizeof report)
        die("the server's report did not come");
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
    qsort(delays_s, (size_t)num_delays, sizeof *delays_s, by_size);
    printf("http_stream connections=%d events=%lld lost=%lld interval_ms=%d cpu_us_per_event=%.2f "
           "rss_kib_per_connection=%.2f "
           "delay_p50_ms=%.2f delay_p99_ms=%.2f delay_max_ms=%.2f commit=%s\n",
           num_connections, (long long)num_delays, (long long)(wanted - num_delays), interval_ms,
           1e6 * report.cpu_s / (double)wanted, (double)(report.rss_kib - report.rss_before_kib) / num_connections,
           1e3 * delays_s[num_delays / 2], 1e3 * delays_s[num_delays * 99 / 100], 1e3 * delays_s[num_delays - 1],
           TPSHARD_COMMIT);
    return num_delays == wanted ? 0 : 1;
}
