// An HTTP/1.1 server on libevent's loop and buffers, with a strict parser of its own (http_parser.h): evhttp accepts requests that proxies read
// otherwise (two lengths, folded lines, a blank before the colon), and has lost the bytes by the time a callback could refuse them.
// Owns: listening, connections, limits, deadlines, responses and streams. Leaves to others: what requests mean.
//
// Threads: everything runs on the server's one thread but http_server_post, _stop, _drain and _read_stats. A handler does not block: it answers
// at once, or keeps the exchange and answers later, from a posted function. No call made by a handler calls a handler: what answers cause
// (on_writable, on_ended) comes when the handler or posted function has returned.
//
// A client that closes its side of the connection (FIN) while its answer is not complete is gone, as for nginx and what it proxies: the
// exchange ends at once, however long nothing was to be written. An answer that a handler gives before it returns is always written, so that
// `nc -N` gets its page; http_exchange_outlive_half_close extends that to answers that come soon.
#ifndef TPSHARD_ENGINE_SERVE_HTTP_SERVER_H
#define TPSHARD_ENGINE_SERVE_HTTP_SERVER_H

#include "formats/error.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct http_limits {           // defaults: http_limits_default
    uint64_t header_bytes;     // 16 KiB: request line and headers; also extensions and trailers of a chunked body
    int headers;               // 64
    uint64_t uri_bytes;        // 2 KiB
    uint64_t body_bytes;       // 4 MiB
    uint64_t all_bodies_bytes; // 512 MiB: of all requests that the server holds; 503 above
    double header_s;           // 10: the head, from its first byte (the first request's: from the connection)
    double body_s;             // 15: the whole request, from the same moment
    double idle_s;             // 75: between requests of a connection
    // 10: a client is cut that takes less than 1 KiB in this time while more waits; or, while more than output_bytes wait, less than 16 KiB or a
    // sixtieth of them in each such time on average.
    double write_stall_s;
    double linger_s;       // 2: what a client still sends behind the last answer is read and dropped for so long
    uint64_t output_bytes; // 64 KiB waiting for one client; a stream's writer is told to wait above
    // 512 MiB waiting for all clients, and held by handlers (http_exchange_hold). A whole answer above output_bytes that does not fit is a 503.
    uint64_t all_output_bytes;
    int connections; // 4096; above: 503 and the end. Listeners for health checks have 256 of their own
};
extern const struct http_limits http_limits_default;

struct http_server;
struct http_exchange; // one request and its answer; ends when the answer is written or the client is gone

struct http_request { // borrowed until the exchange ends
    const char *method;
    const char *path;  // percent-decoded, without control characters; begins with '/', or is "*"
    const char *query; // as sent, without '?'; "" for none
    const char *body;  // NUL-terminated beyond its end; "" for none
    uint64_t body_bytes;
    const char *peer;   // "127.0.0.1:51234", or "unix"
    uint64_t peer_hash; // of the address without the port
    bool health_port;   // came in on a listener that was opened for health checks alone
    double received_s;  // CLOCK_MONOTONIC, when the request was complete
};

// The value of a header, name in any case, the first of several; NULL when there is none. Borrowed.
const char *http_request_header(const struct http_exchange *exchange, const char *name);
const struct http_request *http_exchange_request(const struct http_exchange *exchange);
// The body becomes the caller's (free; NUL-terminated), so that it may outlive the exchange, on another thread say; the request's is "" from then on.
// NULL when it is empty.
char *http_request_take_body(struct http_exchange *exchange, uint64_t *bytes);
// For answers that come soon though not at once: a client that shuts down its side of the connection still gets this one.
void http_exchange_outlive_half_close(struct http_exchange *exchange);
void http_exchange_set_data(struct http_exchange *exchange, void *data);
void *http_exchange_data(const struct http_exchange *exchange);

// The exchange's end in every case (answered, client gone, server stopped): called exactly once for each call of on_request, after it has
// returned, and the exchange is gone when it returns. complete: the whole answer was handed to the kernel.
typedef void http_ended_fn(void *arg, struct http_exchange *exchange, bool complete);
typedef void http_request_fn(void *arg, struct http_exchange *exchange);
// A stream's buffer has room again (called once after http_stream_write returned false).
typedef void http_writable_fn(void *arg, struct http_exchange *exchange);

struct http_handlers {
    void *arg;
    http_request_fn *on_request;
    http_ended_fn *on_ended;
    http_writable_fn *on_writable;
    // Status and bytes (of the body) of every exchange, before its on_ended, for logs and metrics; status 499: the client was gone
    // before an answer began. May be NULL.
    void (*on_answered)(void *arg, const struct http_exchange *exchange, int status, uint64_t body_bytes);
    void (*on_refused)(void *arg, const char *peer,
                       int status); // by the server itself, before on_request. May be NULL.
};

int http_server_create(struct http_server **out, const struct http_limits *limits, const struct http_handlers *handlers,
                       struct error *err);
// host: an address or name; port 0 takes a free one, which *bound_port (may be NULL) receives. Before the server runs.
int http_server_listen(struct http_server *server, const char *host, int port, bool health_only, int *bound_port,
                       struct error *err);
// A socket in the file system, for its owner alone (mode 0600), removed by http_server_free. A stale one is replaced; a living one is
// ERR_USAGE, another file too.
int http_server_listen_unix(struct http_server *server, const char *path, struct error *err);
// Runs the loop on the calling thread until http_server_stop. Signals stay with the caller's other threads.
int http_server_run(struct http_server *server, struct error *err);
// Any thread: ends the loop. What the kernel takes at once of written answers is still sent; exchanges end, connections are closed. (To let
// answers finish: http_server_drain, then wait for no exchanges in http_server_read_stats.)
void http_server_stop(struct http_server *server);
// Any thread: from now on every answer ends its connection ("Connection: close"), and idle connections are closed. New ones are still taken, so
// that their requests hear a 503 from the handler.
void http_server_drain(struct http_server *server);
// Any thread: fn(arg) runs on the server's thread, in the order of the posts. Never fails: node is the caller's and free again when fn runs.
// What is posted before http_server_run runs in it; what is posted before it has ended all exchanges runs too; after that nothing does.
struct http_post {
    struct http_post *next;
    void (*fn)(void *arg);
    void *arg;
};
void http_server_post(struct http_server *server, struct http_post *node);
void http_server_free(struct http_server *server); // after run has returned; accepts NULL

struct http_server_stats {
    int64_t connections, exchanges; // now
    int64_t accepted_total, requests_total, refused_total, timeouts_total;
};
void http_server_read_stats(const struct http_server *server, struct http_server_stats *out); // any thread

// ---- answers -----------------------------------------------------------------------------------------------------
// Headers beyond those that the server writes itself (Content-Type, Content-Length, Transfer-Encoding, Connection, Date). Before the answer
// begins; name and value are copied. What could not be a header (a name that is no token, a value with control characters) is dropped.
void http_add_header(struct http_exchange *exchange, const char *name, const char *value);
// A whole answer. body is copied; content_type may be NULL. A body is not sent with 204 and 304, and not to HEAD. Once per exchange. The status
// that the client gets: 503 where all_output_bytes has no room for the body.
int http_respond(struct http_exchange *exchange, int status, const char *content_type, const void *body, size_t bytes);
// The handler holds so many bytes of an answer that is being made, or waits for a slow client: from now on they count toward all_output_bytes,
// until the exchange ends or this is called again. false: there is no room, and what it holds and what waits for this client is more than
// output_bytes; the answer had better end, HTTP_NO_ROOM says why.
bool http_exchange_hold(struct http_exchange *exchange, uint64_t bytes);
#define HTTP_NO_ROOM "too many bytes of answers wait for slow clients; try again soon"
// A stream (chunked; for HTTP/1.0 until the connection closes).
void http_stream_begin(struct http_exchange *exchange, int status, const char *content_type);
// false: more than output_bytes wait; write no more until on_writable. What was given is taken either way.
bool http_stream_write(struct http_exchange *exchange, const void *data, size_t bytes);
void http_stream_end(struct http_exchange *exchange);
// Ends the connection without the end of the stream; what was written before is still sent.
void http_exchange_abort(struct http_exchange *exchange);

#endif
