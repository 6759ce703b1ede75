// What handlers write: heads, whole answers, streams. Everything goes to the connection's output; sending is http_connection.c's.
#include "engine/serve/http_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <time.h>

const char *http_status_text(int status)
{
    static const struct {
        int status;
        const char *text;
    } texts[] = {{200, "OK"},
                 {202, "Accepted"},
                 {204, "No Content"},
                 {301, "Moved Permanently"},
                 {302, "Found"},
                 {304, "Not Modified"},
                 {400, "Bad Request"},
                 {401, "Unauthorized"},
                 {403, "Forbidden"},
                 {404, "Not Found"},
                 {405, "Method Not Allowed"},
                 {406, "Not Acceptable"},
                 {408, "Request Timeout"},
                 {413, "Content Too Large"},
                 {414, "URI Too Long"},
                 {415, "Unsupported Media Type"},
                 {417, "Expectation Failed"},
                 {422, "Unprocessable Content"},
                 {429, "Too Many Requests"},
                 {431, "Request Header Fields Too Large"},
                 {500, "Internal Server Error"},
                 {501, "Not Implemented"},
                 {503, "Service Unavailable"},
                 {504, "Gateway Timeout"},
                 {505, "HTTP Version Not Supported"}};
    for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++)
        if (texts[i].status == status)
            return texts[i].text;
    return "Status";
}

static const char *date_now(struct http_server *server)
{
    time_t now = time(NULL);
    struct tm parts;
    if (now != server->date_time && gmtime_r(&now, &parts)) {
        // Not strftime: names of days and months would follow the locale.
        static const char days[] = "SunMonTueWedThuFriSat", months[] = "JanFebMarAprMayJunJulAugSepOctNovDec";
        snprintf(server->date, sizeof server->date, "%.3s, %02d %.3s %04d %02d:%02d:%02d GMT", days + 3 * parts.tm_wday,
                 parts.tm_mday % 100, months + 3 * parts.tm_mon, (parts.tm_year + 1900) % 10000, parts.tm_hour % 100,
                 parts.tm_min % 100, parts.tm_sec % 100);
        server->date_time = now;
    }
    return server->date;
}

void http_answer_count(struct http_connection *connection)
{
    uint64_t bytes = evbuffer_get_length(connection->output);
    connection->server->waiting_bytes += bytes - connection->counted_bytes; // modulo 2^64: it may fall
    connection->counted_bytes = bytes;
}

// Without memory for the output the client cannot get what follows rightly: the connection ends.
static void put(struct http_connection *connection, const void *data, size_t bytes)
{
    if (bytes && evbuffer_add(connection->output, data, bytes))
        connection->broken = true;
    http_answer_count(connection);
}

static void put_text(struct http_connection *connection, const char *text) { put(connection, text, strlen(text)); }

static void put_head(struct http_connection *connection, int status, const char *content_type, const char *framing,
                     const char *headers, size_t headers_bytes)
{
    char line[160];
    snprintf(line, sizeof line, "HTTP/1.1 %d %s\r\nDate: %s\r\n", status, http_status_text(status),
             date_now(connection->server));
    put_text(connection, line);
    if (content_type && http_is_field_value(content_type)) {
        put_text(connection, "Content-Type: ");
        put_text(connection, content_type);
        put_text(connection, "\r\n");
    }
    put_text(connection, framing);
    if (!connection->keep_alive)
        put_text(connection, "Connection: close\r\n");
    else if (connection->parser.minor_version == 0)
        put_text(connection, "Connection: keep-alive\r\n");
    put(connection, headers, headers_bytes);
    put_text(connection, "\r\n");
}

enum { REFUSAL_BYTES = 320 };
static const char later[] = "Retry-After: 1\r\n"; // of a 503

// The body of a refusal; its bytes.
static int write_refusal(char body[REFUSAL_BYTES], int status, const char *reason)
{
    return snprintf(body, REFUSAL_BYTES,
                    "{\"error\":{\"message\":\"%c%s.\",\"type\":\"%s\",\"param\":null,\"code\":null}}\n",
                    reason[0] >= 'a' && reason[0] <= 'z' ? reason[0] - 'a' + 'A' : reason[0], reason + 1,
                    status < 500 ? "invalid_request_error" : "server_error");
}

void http_answer_refuse(struct http_connection *connection, int status, const char *reason)
{
    char body[REFUSAL_BYTES], framing[64];
    int bytes = write_refusal(body, status, reason);
    connection->keep_alive = false;
    snprintf(framing, sizeof framing, "Content-Length: %d\r\n", bytes);
    put_head(connection, status, "application/json", framing, later, status == 503 ? sizeof later - 1 : 0);
    put(connection, body, (size_t)bytes);
}

// ---- for handlers --------------------------------------------------------------------------------------------------

const char *http_request_header(const struct http_exchange *exchange, const char *name)
{
    return http_parser_header(&exchange->connection->parser, name);
}

const struct http_request *http_exchange_request(const struct http_exchange *exchange) { return &exchange->request; }

char *http_request_take_body(struct http_exchange *exchange, uint64_t *bytes)
{
    *bytes = exchange->request.body_bytes;
    exchange->request.body = "";
    exchange->request.body_bytes = 0;
    return http_parser_take_body(&exchange->connection->parser);
}

void http_exchange_outlive_half_close(struct http_exchange *exchange) { exchange->outlives_half_close = true; }
void http_exchange_set_data(struct http_exchange *exchange, void *data) { exchange->data = data; }
void *http_exchange_data(const struct http_exchange *exchange) { return exchange->data; }

void http_add_header(struct http_exchange *exchange, const char *name, const char *value)
{
    static const char *const own[] = {"Content-Type", "Content-Length", "Transfer-Encoding", "Connection", "Date"};
    for (size_t i = 0; i < sizeof own / sizeof own[0]; i++)
        if (strcasecmp(name, own[i]) == 0)
            return;
    if (exchange->status || !http_is_token(name) || !http_is_field_value(value))
        return;
    size_t bytes = strlen(name) + strlen(value) + 4;
    char *headers = realloc(exchange->headers, exchange->headers_bytes + bytes + 1);
    if (!headers) {
        exchange->connection->broken = true;
        http_server_mark(exchange->connection);
        return;
    }
    snprintf(headers + exchange->headers_bytes, bytes + 1, "%s: %s\r\n", name, value);
    exchange->headers = headers;
    exchange->headers_bytes += bytes;
}

static void begin(struct http_exchange *exchange, int status, const char *content_type, const char *framing)
{
    struct http_connection *connection = exchange->connection;
    exchange->status = status;
    exchange->bodiless = status == 204 || status == 304 || strcmp(exchange->request.method, "HEAD") == 0;
    connection->keep_alive &= !atomic_load_explicit(&connection->server->draining, memory_order_relaxed);
    put_head(connection, status, content_type, framing, exchange->headers, exchange->headers_bytes);
    http_server_mark(connection);
}

// Small answers always find room: they say how the server is, and why others get nothing.
static bool has_room(const struct http_server *server, uint64_t bytes, uint64_t more_bytes)
{
    const struct http_limits *limits = &server->limits;
    return bytes <= limits->output_bytes || (server->waiting_bytes <= limits->all_output_bytes &&
                                             more_bytes <= limits->all_output_bytes - server->waiting_bytes);
}

bool http_exchange_hold(struct http_exchange *exchange, uint64_t bytes)
{
    struct http_server *server = exchange->connection->server;
    server->waiting_bytes += bytes - exchange->held_bytes; // modulo 2^64: it may fall
    exchange->held_bytes = bytes;
    return has_room(server, bytes + evbuffer_get_length(exchange->connection->output), 0);
}

int http_respond(struct http_exchange *exchange, int status, const char *content_type, const void *body, size_t bytes)
{
    char framing[64] = "", refusal[REFUSAL_BYTES];
    if (exchange->status || exchange->ended)
        return exchange->status;
    if (!has_room(exchange->connection->server, bytes, bytes)) {
        status = 503;
        content_type = "application/json";
        bytes = (size_t)write_refusal(refusal, status, HTTP_NO_ROOM);
        body = refusal;
        http_add_header(exchange, "Retry-After", "1");
    }
    if (status != 204 && status != 304)
        snprintf(framing, sizeof framing, "Content-Length: %zu\r\n", bytes);
    begin(exchange, status, content_type, framing);
    exchange->complete = true;
    if (exchange->bodiless)
        return status;
    put(exchange->connection, body, bytes);
    exchange->body_bytes = bytes;
    return status;
}

void http_stream_begin(struct http_exchange *exchange, int status, const char *content_type)
{
    struct http_connection *connection = exchange->connection;
    if (exchange->status || exchange->ended)
        return;
    exchange->streams = true;
    exchange->chunked = connection->parser.minor_version > 0;
    connection->keep_alive &= exchange->chunked;
    begin(exchange, status, content_type, exchange->chunked ? "Transfer-Encoding: chunked\r\n" : "");
}

bool http_stream_write(struct http_exchange *exchange, const void *data, size_t bytes)
{
    struct http_connection *connection = exchange->connection;
    if (!exchange->streams || exchange->complete || exchange->ended || exchange->bodiless)
        return true;
    if (bytes) { // a chunk of no bytes would be the end
        char size[24];
        if (exchange->chunked)
            put(connection, size, (size_t)snprintf(size, sizeof size, "%zx\r\n", bytes));
        put(connection, data, bytes);
        if (exchange->chunked)
            put(connection, "\r\n", 2);
        exchange->body_bytes += bytes;
        http_server_mark(connection);
    }
    if (evbuffer_get_length(connection->output) > connection->server->limits.output_bytes)
        exchange->writer_waits = true;
    return !exchange->writer_waits;
}

void http_stream_end(struct http_exchange *exchange)
{
    if (!exchange->streams || exchange->complete || exchange->ended)
        return;
    exchange->complete = true;
    if (exchange->chunked && !exchange->bodiless)
        put(exchange->connection, "0\r\n\r\n", 5);
    http_server_mark(exchange->connection);
}

void http_exchange_abort(struct http_exchange *exchange)
{
    if (exchange->complete || exchange->ended)
        return;
    exchange->aborted = true;
    exchange->connection->keep_alive = false;
    http_server_mark(exchange->connection);
}
