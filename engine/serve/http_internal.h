// What the files of the HTTP server share: http_server.c (loop, posts), http_listen.c (sockets), http_connection.c (a connection's life),
// http_answer.c (what handlers write).
#ifndef TPSHARD_ENGINE_SERVE_HTTP_INTERNAL_H
#define TPSHARD_ENGINE_SERVE_HTTP_INTERNAL_H

#include "engine/serve/http_parser.h"
#include "engine/serve/http_server.h"
#include "kernels/clock.h"

#include <event2/buffer.h>
#include <event2/event.h>
#include <event2/event_struct.h>
#include <stdatomic.h>
#include <sys/types.h>

enum {
    HTTP_INPUT_BYTES = 65536, // read at once
    HTTP_SEND_BUFFER = 65536, // the kernel's, for each client
    HTTP_HEALTH_CONNECTIONS = 256,
    HTTP_EXTRA_CONNECTIONS = 64 // above the limit: those that are being told so
};

enum http_connection_phase {
    HTTP_READING,   // a request, or nothing yet
    HTTP_ANSWERING, // exchange is set
    HTTP_CLOSING,   // the last bytes are being written
    HTTP_LINGERING // ours is shut; what the client still sends is dropped, so that the kernel does not reset what it has not read
};

struct http_exchange {
    struct http_connection *connection;
    struct http_request request;
    void *data;
    char *headers; // added ones, as they will be sent
    size_t headers_bytes;
    int status;          // 0: no answer has begun
    uint64_t body_bytes; // written
    uint64_t held_bytes; // by the handler, in the server's waiting_bytes
    bool complete;       // the whole answer is in the output
    bool streams, chunked, bodiless;
    bool writer_waits; // http_stream_write returned false
    bool aborted, ended, outlives_half_close;
};

struct http_connection {
    struct http_server *server;
    struct http_connection *next, *previous; // of the server's
    struct http_connection *next_dirty;      // of those to be looked after
    bool dirty;
    int fd;
    enum http_connection_phase phase;
    struct event io, timer;
    double timer_s;   // when the timer comes; 0: it is off
    double started_s; // READING: the request's first byte, or when the connection became idle; LINGERING: its beginning
    double stall_s;   // while output waits: the next look at what the client takes; 0 else
    double taken_s;   // when it had last taken something
    // While more than output_bytes wait: since when, how many there were, and what had been taken then. backlog_s is 0 else.
    double backlog_s;
    uint64_t backlog_bytes, backlog_taken_bytes;
    uint64_t counted_bytes;           // of output, in the server's waiting_bytes
    uint64_t sent_bytes, taken_bytes; // handed to the kernel; taken by the client at taken_s
    struct evbuffer *output;
    struct http_parser parser;
    char *input; // read behind the end of a request
    size_t input_at, input_bytes;
    struct http_exchange *exchange;
    int64_t num_requests;
    bool health_only;
    bool readable;   // there may be something to read
    bool blocked;    // the kernel takes no more at present
    bool stirred;    // an event came that may be the client's end
    bool timed_out;  // the timer came
    bool broken;     // nothing can be written or read
    bool keep_alive; // after the present answer
    bool continued;  // "100 Continue" was sent
    uint64_t peer_hash;
    char peer[64];
};

struct http_listener {
    struct http_listener *next;
    struct http_server *server;
    struct event event;
    int fd;
    bool health_only;
    char *unix_path; // NULL: TCP
    dev_t device;    // of the socket file, so that only this one is removed
    ino_t inode;
};

struct http_server {
    struct http_limits limits;
    struct http_parser_limits parser_limits;
    struct http_handlers handlers;
    struct event_base *base;
    struct event wake_event, accept_event; // posts; the end of a pause of accepting
    int wake_fd;
    struct http_listener *listeners;
    struct http_connection *connections;
    struct http_connection *first_dirty, **last_dirty;
    int num_open[2]; // connections; [1]: of listeners for health checks
    uint64_t body_budget;
    uint64_t waiting_bytes; // in the outputs of all connections, and held by handlers
    double now_s;           // of the present callback
    time_t date_time;
    char date[40];
    bool drained;                      // the drain has been seen
    bool ending;                       // the loop has ended: connections are only closed now
    _Atomic(struct http_post *) posts; // newest first
    atomic_bool stopping, draining;
    _Atomic int64_t open_total, exchanges, accepted, requests, refused, timeouts;
    char input[HTTP_INPUT_BYTES];
};

// http_server.c
// The connection is looked after when the present callback ends.
void http_server_mark(struct http_connection *connection);
// Looks after the marked connections; the end of every callback of the loop.
void http_server_settle(struct http_server *server);

// http_listen.c
void http_listeners_pause(struct http_server *server, bool pause);
void http_listeners_free(struct http_server *server);

// http_connection.c
// Takes fd, which it closes without memory. refused: it is answered 503.
void http_connection_open(struct http_server *server, int fd, bool health_only, bool refused, const void *address,
                          socklen_t address_bytes);
void http_connection_advance(struct http_connection *connection);
// The server's end: what the kernel takes is sent, an exchange ends, the connection is closed.
void http_connection_close(struct http_connection *connection);

// http_answer.c
void http_answer_refuse(struct http_connection *connection, int status, const char *reason);
// To be called when the output has grown or shrunk.
void http_answer_count(struct http_connection *connection);
const char *http_status_text(int status);

#endif
