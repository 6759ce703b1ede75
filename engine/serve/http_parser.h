// HTTP/1.1 requests from bytes, strictly (RFC 9112): what could be read in two ways is refused. Any division of the bytes into pieces gives the
// same result. Owns: the grammar of request heads and chunked bodies, their limits, the request's bytes. Leaves to others: sockets, deadlines,
// answers, what requests mean.
#ifndef TPSHARD_ENGINE_SERVE_HTTP_PARSER_H
#define TPSHARD_ENGINE_SERVE_HTTP_PARSER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct http_parser_limits {
    uint64_t header_bytes; // request line, headers and their line ends; also chunk extensions and trailers together
    int headers;           // trailers included
    uint64_t uri_bytes;
    uint64_t body_bytes;
};

enum http_parser_phase {
    HTTP_PARSER_EMPTY,    // no byte of a request yet
    HTTP_PARSER_HEAD,     // in the request line or headers
    HTTP_PARSER_BODY,     // the head is complete and its fields are valid
    HTTP_PARSER_COMPLETE, // so is the body
    HTTP_PARSER_REFUSED   // status and reason say why; the connection's further bytes mean nothing
};

struct http_parser {
    enum http_parser_phase phase;
    int status;         // REFUSED: 400, 413, 414, 417, 431, 501, 503 (no memory), 505
    const char *reason; // REFUSED: half a sentence, static

    // From BODY on.
    const char *method;      // a token, as sent
    const char *path;        // percent-decoded, begins with '/' (or is "*"), without control characters
    const char *query;       // as sent, behind '?'; "" for none
    int minor_version;       // HTTP/1.0 or 1.1
    bool keep_alive;         // the client wants the connection to stay
    bool expects_continue;   // sends the body after "100 Continue" only
    bool chunked;            // no Content-Length
    uint64_t content_length; // when not chunked
    // From COMPLETE on.
    char *body; // NUL-terminated beyond its end; NULL when empty
    uint64_t body_bytes;

    // The rest is the parser's.
    const struct http_parser_limits *limits;
    uint64_t *body_budget; // bytes that the bodies of all parsers may still take, or NULL
    int state;
    char *head; // method, target, then a name and a value for each header, each with a NUL behind it
    uint32_t head_bytes, head_capacity, target_at, headers_at, name_at, value_at;
    uint64_t line_bytes; // of the head, line ends included; then of extensions and trailers
    uint64_t chunk_left, body_capacity;
    int num_headers, chunk_digits, hosts, codings, seen;
    bool has_length, close_asked, keep_asked, in_trailer;
};

// limits and body_budget are borrowed.
void http_parser_init(struct http_parser *parser, const struct http_parser_limits *limits, uint64_t *body_budget);
// Takes bytes until the request is complete or refused, or all are taken; returns how many. What is left belongs to the next request.
size_t http_parser_feed(struct http_parser *parser, const char *data, size_t bytes);
// Bytes of the body that are still to come when their number is known; 0 else.
uint64_t http_parser_missing_bytes(const struct http_parser *parser);
// The value of a header, name in any case, the first of several; NULL when there is none.
const char *http_parser_header(const struct http_parser *parser, const char *name);
// Calls fn for each header in the order of their coming.
void http_parser_each_header(const struct http_parser *parser,
                             void (*fn)(void *arg, const char *name, const char *value), void *arg);
// The body becomes the caller's (free); NULL when it is empty.
char *http_parser_take_body(struct http_parser *parser);
// Frees what was read; ready for the next request.
void http_parser_reset(struct http_parser *parser);

// Whether text is a token of the grammar (a header's name), and whether it can be a header's value.
bool http_is_token(const char *text);
bool http_is_field_value(const char *text);

#endif
