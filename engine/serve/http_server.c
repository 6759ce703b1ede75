// The loop, posts, start and stop.
#include "engine/serve/http_internal.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

const struct http_limits http_limits_default = {
    .header_bytes = 16384,
    .headers = 64,
    .uri_bytes = 2048,
    .body_bytes = 4 << 20,
    .all_bodies_bytes = 512 << 20,
    .header_s = 10,
    .body_s = 15,
    .idle_s = 75,
    .write_stall_s = 10,
    .linger_s = 2,
    .output_bytes = 65536,
    .all_output_bytes = 512 << 20,
    .connections = 4096,
};

// ---- marked connections --------------------------------------------------------------------------------------------

void http_server_mark(struct http_connection *connection)
{
    struct http_server *server = connection->server;
    if (connection->dirty || server->ending)
        return;
    connection->dirty = true;
    connection->next_dirty = NULL;
    *server->last_dirty = connection;
    server->last_dirty = &connection->next_dirty;
}

static void wake(struct http_server *server)
{
    uint64_t one = 1;
    while (write(server->wake_fd, &one, sizeof one) < 0 && errno == EINTR)
        ;
}

void http_server_settle(struct http_server *server)
{
    struct http_connection *connection = server->first_dirty;
    server->first_dirty = NULL;
    server->last_dirty = &server->first_dirty;
    server->now_s = clock_now_s();
    while (connection) {
        struct http_connection *next = connection->next_dirty;
        http_connection_advance(connection);
        connection = next;
    }
    if (server->first_dirty)
        wake(server); // what has more to do waits for a turn of the loop
}

// ---- posts ---------------------------------------------------------------------------------------------------------

void http_server_post(struct http_server *server, struct http_post *node)
{
    struct http_post *newest = atomic_load_explicit(&server->posts, memory_order_relaxed);
    do
        node->next = newest;
    while (!atomic_compare_exchange_weak_explicit(&server->posts, &newest, node, memory_order_acq_rel,
                                                  memory_order_relaxed));
    if (!newest)
        wake(server);
}

// Runs what has been posted by now; false: there was nothing.
static bool run_posts(struct http_server *server)
{
    struct http_post *newest = atomic_exchange_explicit(&server->posts, NULL, memory_order_acq_rel), *oldest = NULL;
    while (newest) {
        struct http_post *older = newest->next;
        newest->next = oldest;
        oldest = newest;
        newest = older;
    }
    bool any = oldest != NULL;
    while (oldest) {
        struct http_post *next = oldest->next; // the node is its owner's again when fn runs
        oldest->fn(oldest->arg);
        oldest = next;
    }
    return any;
}

static void begin_drain(struct http_server *server)
{
    server->drained = true;
    for (struct http_connection *at = server->connections; at; at = at->next)
        if (at->phase == HTTP_READING)
            http_server_mark(at);
}

static void on_wake(evutil_socket_t fd, short events, void *arg)
{
    (void)events;
    struct http_server *server = arg;
    uint64_t count;
    while (read(fd, &count, sizeof count) < 0 && errno == EINTR)
        ;
    run_posts(server);
    if (!server->drained && atomic_load(&server->draining))
        begin_drain(server);
    http_server_settle(server);
    if (atomic_load(&server->stopping))
        event_base_loopbreak(server->base);
}

static void on_accept_again(evutil_socket_t fd, short events, void *arg)
{
    (void)fd, (void)events;
    http_listeners_pause(arg, false);
}

// ---- life ----------------------------------------------------------------------------------------------------------

// Without locks: one thread uses the base, others write to wake_fd. Edges and the client's end are what http_connection.c builds on.
static struct event_base *base_create(void)
{
    struct event_config *config = event_config_new();
    struct event_base *base = NULL;
    if (config && !event_config_set_flag(config, EVENT_BASE_FLAG_NOLOCK | EVENT_BASE_FLAG_IGNORE_ENV) &&
        !event_config_require_features(config, EV_FEATURE_ET | EV_FEATURE_O1 | EV_FEATURE_EARLY_CLOSE))
        base = event_base_new_with_config(config);
    if (config)
        event_config_free(config);
    return base;
}

int http_server_create(struct http_server **out, const struct http_limits *limits, const struct http_handlers *handlers,
                       struct error *err)
{
    int rc = 0;
    struct http_server *server = calloc(1, sizeof *server);
    if (!server)
        return error_set(err, ERR_MEMORY, "HTTP server: out of memory");
    server->limits = *limits;
    server->parser_limits =
        (struct http_parser_limits){limits->header_bytes, limits->headers, limits->uri_bytes, limits->body_bytes};
    server->body_budget = limits->all_bodies_bytes;
    server->handlers = *handlers;
    server->last_dirty = &server->first_dirty;
    server->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (server->wake_fd < 0) {
        rc = error_set_errno(err, "HTTP server: eventfd");
        goto fail;
    }
    server->base = base_create();
    if (!server->base) {
        rc = error_set(err, ERR_OTHER, "HTTP server: libevent has no epoll here, or no memory");
        goto fail;
    }
    event_assign(&server->wake_event, server->base, server->wake_fd, EV_READ | EV_PERSIST, on_wake, server);
    event_assign(&server->accept_event, server->base, -1, 0, on_accept_again, server);
    if (event_add(&server->wake_event, NULL)) {
        rc = error_set(err, ERR_OTHER, "HTTP server: cannot watch its eventfd");
        goto fail;
    }
    *out = server;
    return 0;
fail:
    http_server_free(server);
    return rc;
}

int http_server_run(struct http_server *server, struct error *err)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int rc = 0;
    if (!atomic_load(&server->stopping) && event_base_dispatch(server->base) < 0)
        rc = error_set(err, ERR_OTHER, "HTTP server: the event loop failed");
    run_posts(server);
    server->ending = true;
    server->first_dirty = NULL;
    while (server->connections)
        http_connection_close(server->connections);
    while (run_posts(server))
        ;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return rc;
}

void http_server_stop(struct http_server *server)
{
    atomic_store(&server->stopping, true);
    wake(server);
}

void http_server_drain(struct http_server *server)
{
    atomic_store(&server->draining, true);
    wake(server);
}

void http_server_free(struct http_server *server)
{
    if (!server)
        return;
    http_listeners_free(server);
    if (server->base) {
        event_del(&server->wake_event);
        event_del(&server->accept_event);
        event_base_free(server->base);
    }
    if (server->wake_fd >= 0)
        close(server->wake_fd);
    free(server);
}

void http_server_read_stats(const struct http_server *server, struct http_server_stats *out)
{
    *out = (struct http_server_stats){
        .connections = atomic_load_explicit(&server->open_total, memory_order_relaxed),
        .exchanges = atomic_load_explicit(&server->exchanges, memory_order_relaxed),
        .accepted_total = atomic_load_explicit(&server->accepted, memory_order_relaxed),
        .requests_total = atomic_load_explicit(&server->requests, memory_order_relaxed),
        .refused_total = atomic_load_explicit(&server->refused, memory_order_relaxed),
        .timeouts_total = atomic_load_explicit(&server->timeouts, memory_order_relaxed),
    };
}
