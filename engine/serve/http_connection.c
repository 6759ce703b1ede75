// A connection's life. Events only leave marks; http_connection_advance does what can be done now, in one loop: send what waits, read, begin or
// end an exchange, close. Sockets are watched edge-triggered for everything at once, so a stream of events costs one sendmsg each and no calls
// that change the watch; the price is that reading and writing go on until the kernel says no.
#include "engine/serve/http_internal.h"

#include "formats/fnv.h"

#include <arpa/inet.h>
#include <errno.h>
#include <linux/sockios.h>
#include <math.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

enum { TURNS = 32, STALL_BYTES = 1024, STALL_LOOKS = 20, BACKLOG_BYTES = 16384, BACKLOG_SHARES = 60, SEND_PIECES = 16 };

static void count(_Atomic int64_t *counter, int64_t by)
{
    atomic_fetch_add_explicit(counter, by, memory_order_relaxed);
}

// ---- open and close ------------------------------------------------------------------------------------------------

static void on_io(evutil_socket_t fd, short events, void *arg)
{
    (void)fd;
    struct http_connection *connection = arg;
    if (events & EV_WRITE)
        connection->blocked = false;
    if (events & (EV_READ | EV_CLOSED))
        connection->readable = connection->stirred = true;
    http_server_mark(connection);
    http_server_settle(connection->server);
}

static void on_timer(evutil_socket_t fd, short events, void *arg)
{
    (void)fd, (void)events;
    struct http_connection *connection = arg;
    connection->timed_out = true;
    connection->timer_s = 0;
    http_server_mark(connection);
    http_server_settle(connection->server);
}

// Of the network that one customer has: an IPv4 address, the first half of an IPv6 one.
static void name_peer(struct http_connection *connection, const struct sockaddr *address)
{
    const struct sockaddr_in *v4 = (const struct sockaddr_in *)address;
    const struct sockaddr_in6 *v6 = (const struct sockaddr_in6 *)address;
    const uint8_t *bytes = NULL;
    size_t num_bytes = 0;
    char text[INET6_ADDRSTRLEN] = "";
    if (address->sa_family == AF_INET) {
        bytes = (const uint8_t *)&v4->sin_addr;
        num_bytes = 4;
        inet_ntop(AF_INET, bytes, text, sizeof text);
        snprintf(connection->peer, sizeof connection->peer, "%s:%d", text, ntohs(v4->sin_port));
    } else if (address->sa_family == AF_INET6 && IN6_IS_ADDR_V4MAPPED(&v6->sin6_addr)) {
        bytes = v6->sin6_addr.s6_addr + 12;
        num_bytes = 4;
        inet_ntop(AF_INET, bytes, text, sizeof text);
        snprintf(connection->peer, sizeof connection->peer, "%s:%d", text, ntohs(v6->sin6_port));
    } else if (address->sa_family == AF_INET6) {
        bytes = v6->sin6_addr.s6_addr;
        num_bytes = 8;
        inet_ntop(AF_INET6, bytes, text, sizeof text);
        snprintf(connection->peer, sizeof connection->peer, "[%s]:%d", text, ntohs(v6->sin6_port));
    } else {
        snprintf(connection->peer, sizeof connection->peer, "unix");
    }
    uint64_t hash = fnv1a_64(bytes, num_bytes);
    connection->peer_hash = hash ^ hash >> 29;
}

static void refuse(struct http_connection *connection, int status, const char *reason)
{
    struct http_server *server = connection->server;
    count(&server->refused, 1);
    if (server->handlers.on_refused)
        server->handlers.on_refused(server->handlers.arg, connection->peer, status);
    http_answer_refuse(connection, status, reason);
    connection->phase = HTTP_CLOSING;
}

void http_connection_open(struct http_server *server, int fd, bool health_only, bool refused, const void *address,
                          socklen_t address_bytes)
{
    struct http_connection *connection = calloc(1, sizeof *connection);
    struct evbuffer *output = connection ? evbuffer_new() : NULL;
    if (!output) {
        free(connection);
        close(fd);
        return;
    }
    connection->server = server;
    connection->fd = fd;
    connection->output = output;
    connection->health_only = health_only;
    connection->readable = true;
    connection->started_s = server->now_s;
    struct sockaddr_storage peer = {.ss_family = AF_UNIX};
    memcpy(&peer, address, address_bytes < sizeof peer ? address_bytes : sizeof peer);
    name_peer(connection, (const struct sockaddr *)&peer);
    http_parser_init(&connection->parser, &server->parser_limits, &server->body_budget);
    event_assign(&connection->io, server->base, fd, EV_READ | EV_WRITE | EV_CLOSED | EV_ET | EV_PERSIST, on_io,
                 connection);
    event_assign(&connection->timer, server->base, -1, 0, on_timer, connection);

    connection->next = server->connections;
    if (connection->next)
        connection->next->previous = connection;
    server->connections = connection;
    server->num_open[health_only]++;
    count(&server->open_total, 1);
    count(&server->accepted, 1);
    if (event_add(&connection->io, NULL))
        connection->broken = true;
    else if (refused)
        refuse(connection, 503, "the server has too many connections");
    http_server_mark(connection);
}

static void end_exchange(struct http_connection *connection)
{
    struct http_server *server = connection->server;
    struct http_exchange *exchange = connection->exchange;
    bool complete = exchange->complete && evbuffer_get_length(connection->output) == 0;
    exchange->ended = true;
    http_exchange_hold(exchange, 0);
    if (server->handlers.on_answered)
        server->handlers.on_answered(server->handlers.arg, exchange, exchange->status ? exchange->status : 499,
                                     exchange->body_bytes);
    if (server->handlers.on_ended)
        server->handlers.on_ended(server->handlers.arg, exchange, complete);
    connection->exchange = NULL;
    free(exchange->headers);
    free(exchange);
    http_parser_reset(&connection->parser);
    count(&server->exchanges, -1);
}

// reset: without the kernel's further efforts for what the client has not taken.
static void destroy(struct http_connection *connection, bool reset)
{
    struct http_server *server = connection->server;
    if (connection->exchange)
        end_exchange(connection);
    event_del(&connection->io);
    event_del(&connection->timer);
    if (reset)
        setsockopt(connection->fd, SOL_SOCKET, SO_LINGER, &(struct linger){.l_onoff = 1}, sizeof(struct linger));
    else
        shutdown(connection->fd, SHUT_RDWR); // the client is told even if a forked process still has the descriptor
    close(connection->fd);
    if (connection->next)
        connection->next->previous = connection->previous;
    if (connection->previous)
        connection->previous->next = connection->next;
    else
        server->connections = connection->next;
    server->num_open[connection->health_only]--;
    count(&server->open_total, -1);
    http_parser_reset(&connection->parser);
    server->waiting_bytes -= connection->counted_bytes;
    evbuffer_free(connection->output);
    free(connection->input);
    free(connection);
}

// ---- sending -------------------------------------------------------------------------------------------------------

static uint64_t taken_by_client(const struct http_connection *connection)
{
    int waiting = 0;
    if (ioctl(connection->fd, SIOCOUTQ, &waiting) || waiting < 0)
        waiting = 0;
    uint64_t kernels = (uint64_t)waiting;
    return connection->sent_bytes > kernels ? connection->sent_bytes - kernels : 0;
}

static void flush(struct http_connection *connection)
{
    struct evbuffer *output = connection->output;
    while (evbuffer_get_length(output) > 0 && !connection->blocked && !connection->broken) {
        struct evbuffer_iovec pieces[SEND_PIECES];
        int num_pieces = evbuffer_peek(output, -1, NULL, pieces, SEND_PIECES);
        struct msghdr message = {.msg_iov = pieces,
                                 .msg_iovlen = (size_t)(num_pieces < SEND_PIECES ? num_pieces : SEND_PIECES)};
        ssize_t sent = sendmsg(connection->fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent >= 0) {
            evbuffer_drain(output, (size_t)sent);
            connection->sent_bytes += (uint64_t)sent;
        } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
            connection->blocked = true;
        } else if (errno != EINTR) {
            connection->broken = true;
        }
    }
    http_answer_count(connection);
    if (evbuffer_get_length(output) == 0) {
        connection->stall_s = connection->backlog_s = 0;
    } else if (connection->stall_s == 0) {
        connection->taken_s = connection->server->now_s;
        connection->taken_bytes = taken_by_client(connection);
        connection->stall_s = connection->taken_s + connection->server->limits.write_stall_s / STALL_LOOKS;
    }
}

// ---- reading -------------------------------------------------------------------------------------------------------

static void begin_exchange(struct http_connection *connection)
{
    struct http_server *server = connection->server;
    struct http_parser *parser = &connection->parser;
    struct http_exchange *exchange = calloc(1, sizeof *exchange);
    if (!exchange) {
        refuse(connection, 503, "the server has no memory for the request");
        return;
    }
    exchange->connection = connection;
    exchange->request = (struct http_request){
        .method = parser->method,
        .path = parser->path,
        .query = parser->query,
        .body = parser->body ? parser->body : "",
        .body_bytes = parser->body_bytes,
        .peer = connection->peer,
        .peer_hash = connection->peer_hash,
        .health_port = connection->health_only,
        .received_s = clock_now_s(),
    };
    connection->exchange = exchange;
    connection->phase = HTTP_ANSWERING;
    connection->keep_alive = parser->keep_alive;
    connection->continued = false;
    connection->num_requests++;
    // The client's end may have come with the request, and will not be told again.
    connection->stirred = connection->readable;
    count(&server->exchanges, 1);
    count(&server->requests, 1);
    server->handlers.on_request(server->handlers.arg, exchange);
}

// Gives the parser what was read. false: no memory for what is behind the request's end.
static bool take(struct http_connection *connection, const char *data, size_t bytes)
{
    struct http_server *server = connection->server;
    struct http_parser *parser = &connection->parser;
    if (parser->phase == HTTP_PARSER_EMPTY && connection->num_requests > 0)
        connection->started_s = server->now_s;
    size_t taken = http_parser_feed(parser, data, bytes);
    if (connection->input) {
        connection->input_at += taken;
        if (connection->input_at == connection->input_bytes) {
            free(connection->input);
            connection->input = NULL;
        }
    } else if (taken < bytes && parser->phase == HTTP_PARSER_COMPLETE) {
        connection->input = malloc(bytes - taken);
        if (!connection->input)
            return false;
        memcpy(connection->input, data + taken, bytes - taken);
        connection->input_at = 0;
        connection->input_bytes = bytes - taken;
    }
    if (parser->phase == HTTP_PARSER_REFUSED) {
        refuse(connection, parser->status, parser->reason);
    } else if (parser->phase == HTTP_PARSER_COMPLETE) {
        begin_exchange(connection);
    } else if (parser->phase == HTTP_PARSER_BODY && parser->expects_continue && !connection->continued) {
        static const char go_on[] = "HTTP/1.1 100 Continue\r\n\r\n";
        connection->continued = true;
        if (evbuffer_add(connection->output, go_on, sizeof go_on - 1))
            return false;
    }
    return true;
}

// -1: the client has closed its side, or worse. 0: nothing now. Else bytes in the server's input.
static ssize_t receive(struct http_connection *connection, uint64_t wanted)
{
    struct http_server *server = connection->server;
    if (wanted == 0 || wanted > sizeof server->input)
        wanted = sizeof server->input;
    while (connection->readable) {
        ssize_t bytes = recv(connection->fd, server->input, wanted, MSG_DONTWAIT);
        if (bytes > 0)
            return bytes;
        if (bytes < 0 && errno == EINTR)
            continue;
        connection->readable = false;
        if (bytes == 0 || (errno != EAGAIN && errno != EWOULDBLOCK))
            return -1;
    }
    return 0;
}

// ---- what each phase does; false: nothing more at present, or the connection is gone ----------------------------------

static bool read_request(struct http_connection *connection)
{
    if (connection->input) {
        if (!take(connection, connection->input + connection->input_at, connection->input_bytes - connection->input_at))
            connection->broken = true;
        return true;
    }
    ssize_t bytes = receive(connection, http_parser_missing_bytes(&connection->parser));
    if (bytes < 0 || (bytes > 0 && !take(connection, connection->server->input, (size_t)bytes)))
        connection->broken = true;
    bool idle = connection->phase == HTTP_READING && connection->parser.phase == HTTP_PARSER_EMPTY &&
                connection->num_requests > 0;
    if (bytes == 0 && idle && connection->server->drained)
        connection->broken = true;
    return bytes != 0 || connection->broken;
}

// FIN is told apart from data without reading: what is in the kernel stays there until this answer is done.
static bool client_is_gone(struct http_connection *connection)
{
    struct pollfd state = {.fd = connection->fd, .events = POLLRDHUP};
    if (!connection->stirred)
        return false;
    connection->stirred = false;
    if (poll(&state, 1, 0) <= 0)
        return false;
    if (state.revents & (POLLERR | POLLHUP | POLLNVAL))
        return true;
    return !connection->exchange->outlives_half_close && (state.revents & POLLRDHUP);
}

static bool answer(struct http_connection *connection)
{
    struct http_server *server = connection->server;
    struct http_exchange *exchange = connection->exchange;
    size_t waiting = evbuffer_get_length(connection->output);
    if (exchange->aborted) {
        end_exchange(connection);
        connection->phase = HTTP_CLOSING;
        return true;
    }
    if (exchange->complete) {
        if (waiting > 0)
            return false;
        end_exchange(connection);
        connection->phase = connection->keep_alive ? HTTP_READING : HTTP_CLOSING;
        connection->started_s = server->now_s;
        return true;
    }
    if (client_is_gone(connection)) {
        connection->broken = true;
        return true;
    }
    if (!exchange->writer_waits || waiting > server->limits.output_bytes / 2)
        return false;
    exchange->writer_waits = false;
    if (server->handlers.on_writable)
        server->handlers.on_writable(server->handlers.arg, exchange);
    return true;
}

static bool close_softly(struct http_connection *connection)
{
    if (evbuffer_get_length(connection->output) > 0)
        return false;
    shutdown(connection->fd, SHUT_WR);
    connection->phase = HTTP_LINGERING;
    connection->started_s = connection->server->now_s;
    return true;
}

// Of a client that has more to take than a stream would have let wait: such memory is not lent for as long as a trickle lasts.
static bool too_slow(struct http_connection *connection, uint64_t taken)
{
    const struct http_limits *limits = &connection->server->limits;
    uint64_t waiting = evbuffer_get_length(connection->output);
    if (waiting <= limits->output_bytes) {
        connection->backlog_s = 0;
        return false;
    }
    if (connection->backlog_s == 0) {
        connection->backlog_s = connection->server->now_s;
        connection->backlog_bytes = waiting;
        connection->backlog_taken_bytes = taken;
    }
    double times = (connection->server->now_s - connection->backlog_s) / limits->write_stall_s;
    double wanted = fmax(BACKLOG_BYTES, (double)connection->backlog_bytes / BACKLOG_SHARES);
    return times >= 1 && (double)(taken - connection->backlog_taken_bytes) < times * wanted;
}

// Looks several times during the time that a client may take nothing, because for a moment after the kernel's buffer is full it still fills the
// client's. What was taken since the last look counts for that look's time.
static bool stalled(struct http_connection *connection)
{
    double now_s = connection->server->now_s, most_s = connection->server->limits.write_stall_s;
    if (connection->stall_s == 0 || connection->stall_s > now_s)
        return false; // an old timer
    uint64_t taken = taken_by_client(connection);
    double step_s = most_s / STALL_LOOKS;
    if (taken >= connection->taken_bytes + STALL_BYTES) {
        connection->taken_bytes = taken;
        connection->taken_s = now_s - step_s;
    } else if (now_s >= connection->taken_s + most_s) {
        return true;
    }
    connection->stall_s = fmin(now_s + step_s, connection->taken_s + most_s);
    return too_slow(connection, taken);
}

// The time is over for what the phase waits for.
static void time_out(struct http_connection *connection)
{
    struct http_server *server = connection->server;
    connection->timed_out = false;
    if (connection->phase == HTTP_LINGERING) {
        connection->broken = true;
        return;
    }
    if (connection->phase != HTTP_READING && !stalled(connection))
        return;
    if (connection->phase == HTTP_READING && connection->parser.phase == HTTP_PARSER_EMPTY) {
        connection->broken = true; // idle: a client may be about to send, and would take a 408 for the answer
        return;
    }
    count(&server->timeouts, 1);
    if (connection->phase == HTTP_READING)
        refuse(connection, 408,
               connection->parser.phase == HTTP_PARSER_BODY ? "the body took too long" : "the headers took too long");
    else
        connection->broken = true;
}

// ---- the loop ------------------------------------------------------------------------------------------------------

static double deadline_s(const struct http_connection *connection)
{
    const struct http_limits *limits = &connection->server->limits;
    double started_s = connection->started_s;
    switch (connection->phase) {
    case HTTP_READING:
        if (connection->parser.phase == HTTP_PARSER_BODY)
            return started_s + limits->body_s;
        if (connection->parser.phase == HTTP_PARSER_EMPTY && connection->num_requests > 0)
            return started_s + limits->idle_s;
        return started_s + limits->header_s;
    case HTTP_LINGERING:
        return started_s + limits->linger_s;
    default:
        return connection->stall_s;
    }
}

static void set_timer(struct http_connection *connection)
{
    double wanted_s = deadline_s(connection);
    if (wanted_s == connection->timer_s)
        return;
    connection->timer_s = wanted_s;
    if (wanted_s == 0) {
        event_del(&connection->timer);
        return;
    }
    double wait_s = wanted_s - clock_now_s();
    if (wait_s < 0)
        wait_s = 0;
    struct timeval wait = {.tv_sec = (time_t)wait_s, .tv_usec = (suseconds_t)((wait_s - (double)(time_t)wait_s) * 1e6)};
    if (event_add(&connection->timer, &wait))
        connection->broken = true; // no wait without a deadline
}

void http_connection_advance(struct http_connection *connection)
{
    bool goes_on = true;
    for (int turn = 0; goes_on && turn < TURNS; turn++) {
        if (connection->timed_out)
            time_out(connection);
        flush(connection);
        if (connection->broken)
            break;
        switch (connection->phase) {
        case HTTP_READING:
            goes_on = read_request(connection);
            break;
        case HTTP_ANSWERING:
            goes_on = answer(connection);
            break;
        case HTTP_CLOSING:
            goes_on = close_softly(connection);
            break;
        case HTTP_LINGERING: {
            ssize_t bytes = receive(connection, 0);
            connection->broken = bytes < 0;
            goes_on = bytes != 0;
        }
        }
    }
    if (!connection->broken)
        set_timer(connection);
    if (connection->broken) {
        destroy(connection, evbuffer_get_length(connection->output) > 0);
        return;
    }
    connection->dirty = false;
    if (goes_on)
        http_server_mark(connection); // others first
}

void http_connection_close(struct http_connection *connection)
{
    flush(connection);
    destroy(connection, false);
}
