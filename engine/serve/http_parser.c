#include "engine/serve/http_parser.h"

#include <stdlib.h>
#include <string.h>
#include <strings.h>

enum { METHOD_BYTES = 32, HEAD_FIRST_BYTES = 512, BODY_FIRST_BYTES = 16384, CHUNK_DIGITS = 16 };

enum state {
    START,
    START_LF, // behind the CR of an empty line before the request line
    METHOD,
    TARGET_START,
    TARGET,
    VERSION,
    REQUEST_LF,
    HEADER_START,
    NAME,
    VALUE_START,
    VALUE,
    HEADER_LF,
    HEAD_LF,
    BODY,
    CHUNK_SIZE,
    CHUNK_EXTENSION,
    CHUNK_SIZE_LF,
    CHUNK_DATA,
    CHUNK_END_CR,
    CHUNK_END_LF
};

// Classes of characters. A target's are those of RFC 3986, a host's the ones that names, addresses and ports are made of.
enum { IN_TOKEN = 1, IN_TARGET = 2, IN_HOST = 4 };
static const uint8_t class_of[256] = {
    ['a' ... 'z'] = IN_TOKEN | IN_TARGET | IN_HOST,
    ['A' ... 'Z'] = IN_TOKEN | IN_TARGET | IN_HOST,
    ['0' ... '9'] = IN_TOKEN | IN_TARGET | IN_HOST,
    ['-'] = IN_TOKEN | IN_TARGET | IN_HOST,
    ['.'] = IN_TOKEN | IN_TARGET | IN_HOST,
    ['_'] = IN_TOKEN | IN_TARGET | IN_HOST,
    ['~'] = IN_TOKEN | IN_TARGET | IN_HOST,
    ['%'] = IN_TOKEN | IN_TARGET | IN_HOST,
    ['!'] = IN_TOKEN | IN_TARGET,
    ['$'] = IN_TOKEN | IN_TARGET,
    ['&'] = IN_TOKEN | IN_TARGET,
    ['\''] = IN_TOKEN | IN_TARGET,
    ['*'] = IN_TOKEN | IN_TARGET,
    ['+'] = IN_TOKEN | IN_TARGET,
    ['#'] = IN_TOKEN,
    ['^'] = IN_TOKEN,
    ['`'] = IN_TOKEN,
    ['|'] = IN_TOKEN,
    ['('] = IN_TARGET,
    [')'] = IN_TARGET,
    [','] = IN_TARGET,
    [';'] = IN_TARGET,
    ['='] = IN_TARGET,
    ['@'] = IN_TARGET,
    ['/'] = IN_TARGET,
    ['?'] = IN_TARGET,
    [':'] = IN_TARGET | IN_HOST,
    ['['] = IN_TARGET | IN_HOST,
    [']'] = IN_TARGET | IN_HOST,
};

static bool is_value_byte(uint8_t c) { return c == '\t' || (c >= 0x20 && c != 0x7f); }

static int hex_digit(uint8_t c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    c |= 0x20;
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

bool http_is_token(const char *text)
{
    const char *at = text;
    while (class_of[(uint8_t)*at] & IN_TOKEN)
        at++;
    return at > text && *at == 0;
}

bool http_is_field_value(const char *text)
{
    while (*text && is_value_byte((uint8_t)*text))
        text++;
    return *text == 0;
}

static void refuse(struct http_parser *parser, int status, const char *reason)
{
    parser->phase = HTTP_PARSER_REFUSED;
    parser->status = status;
    parser->reason = reason;
}

// ---- memory --------------------------------------------------------------------------------------------------------

void http_parser_init(struct http_parser *parser, const struct http_parser_limits *limits, uint64_t *body_budget)
{
    *parser = (struct http_parser){.limits = limits, .body_budget = body_budget, .state = START};
}

static void release_budget(struct http_parser *parser)
{
    if (parser->body_budget)
        *parser->body_budget += parser->body_capacity;
    parser->body_capacity = 0;
}

char *http_parser_take_body(struct http_parser *parser)
{
    char *body = parser->body;
    parser->body = NULL;
    parser->body_bytes = 0;
    release_budget(parser);
    return body;
}

void http_parser_reset(struct http_parser *parser)
{
    free(http_parser_take_body(parser));
    free(parser->head);
    http_parser_init(parser, parser->limits, parser->body_budget);
}

// The head's text is never longer than its lines, which have a limit: two bytes of a line end against one NUL for a value, and
// a colon against one for a name.
static void keep(struct http_parser *parser, uint8_t c)
{
    if (parser->head_bytes == parser->head_capacity) {
        uint32_t capacity = parser->head_capacity ? 2 * parser->head_capacity : HEAD_FIRST_BYTES;
        char *head = realloc(parser->head, capacity);
        if (!head) {
            refuse(parser, 503, "no memory for the request");
            return;
        }
        parser->head = head;
        parser->head_capacity = capacity;
    }
    parser->head[parser->head_bytes++] = (char)c;
}

// Room for count more bytes of the body and a NUL. most: how long the whole can become.
static bool body_room(struct http_parser *parser, uint64_t count, uint64_t most)
{
    uint64_t wanted = parser->body_bytes + count + 1;
    if (wanted <= parser->body_capacity)
        return true;
    uint64_t capacity = parser->body_capacity ? parser->body_capacity : BODY_FIRST_BYTES;
    while (capacity < wanted)
        capacity *= 2;
    if (capacity > most + 1)
        capacity = most + 1;
    uint64_t growth = capacity - parser->body_capacity;
    char *body = NULL;
    if (!parser->body_budget || growth <= *parser->body_budget)
        body = realloc(parser->body, capacity);
    if (!body) {
        refuse(parser, 503, "the server has no memory for the body, try again later");
        return false;
    }
    if (parser->body_budget)
        *parser->body_budget -= growth;
    parser->body = body;
    parser->body_capacity = capacity;
    return true;
}

// ---- the request line ----------------------------------------------------------------------------------------------

static bool valid_host(const char *text, size_t bytes)
{
    for (size_t i = 0; i < bytes; i++)
        if (!(class_of[(uint8_t)text[i]] & IN_HOST))
            return false;
    return bytes > 0;
}

// Decodes in place; false for a bad code, and for one of a control character. In the query the codes stay.
static bool decode_percent(char *text, bool in_place)
{
    char *to = text;
    for (const char *from = text; *from; from++) {
        uint8_t c = (uint8_t)*from;
        if (c == '%') {
            int high = hex_digit((uint8_t)from[1]);
            int low = high < 0 ? -1 : hex_digit((uint8_t)from[2]);
            if (low < 0)
                return false;
            c = (uint8_t)(high << 4 | low);
            if (c < 0x20 || c == 0x7f)
                return false;
            from += 2;
        }
        if (in_place)
            *to++ = (char)c;
    }
    if (in_place)
        *to = 0;
    return true;
}

// "/path?query", "http://host/path?query" or "*". The authority of the second form, which is no longer than the target, goes to the header that
// must name it too: that is checked when all headers are there, so it stays in the head.
static char *target_authority(char *target, size_t *bytes)
{
    char *authority = NULL;
    if (strncasecmp(target, "http://", 7) == 0)
        authority = target + 7;
    else if (strncasecmp(target, "https://", 8) == 0)
        authority = target + 8;
    *bytes = authority ? strcspn(authority, "/?") : 0;
    return authority;
}

static void take_target(struct http_parser *parser)
{
    char *target = parser->head + parser->target_at;
    if (*target == '/' || *target == '*') {
        if (*target == '*' && target[1])
            refuse(parser, 400, "the request target is not a path");
        return;
    }
    size_t bytes;
    const char *authority = target_authority(target, &bytes);
    if (!authority || !valid_host(authority, bytes))
        refuse(parser, 400, "the request target is neither a path nor an http URI");
}

static void take_version(struct http_parser *parser)
{
    const char *version = parser->head + parser->value_at;
    static const char form[] = "HTTP/d.d";
    size_t bytes = parser->head_bytes - parser->value_at;
    for (size_t i = 0; i < bytes; i++) {
        bool fits = form[i] == 'd' ? version[i] >= '0' && version[i] <= '9' : version[i] == form[i];
        if (!fits) {
            refuse(parser, 400, "the request line does not end with an HTTP version");
            return;
        }
    }
    if (bytes < sizeof form - 1)
        return;
    parser->minor_version = version[7] - '0';
    if (version[5] != '1' || parser->minor_version > 1)
        refuse(parser, 505, "only HTTP/1.0 and HTTP/1.1 are spoken here");
}

// ---- headers -------------------------------------------------------------------------------------------------------

static bool same(const char *a, const char *b) { return strcasecmp(a, b) == 0; }

static void take_length(struct http_parser *parser, const char *value)
{
    parser->has_length = true;
    if (!*value)
        refuse(parser, 400, "Content-Length is empty");
    for (; *value; value++) {
        if (*value < '0' || *value > '9') {
            refuse(parser, 400, "Content-Length is not a number");
            return;
        }
        if (parser->content_length > (UINT64_MAX - 9) / 10)
            parser->content_length = UINT64_MAX / 10; // above any limit, and stays there
        else
            parser->content_length = 10 * parser->content_length + (uint64_t)(*value - '0');
    }
}

static void take_connection(struct http_parser *parser, const char *value)
{
    while (*value) {
        value += strspn(value, ", \t");
        size_t bytes = strcspn(value, ", \t");
        if (bytes == 5 && strncasecmp(value, "close", 5) == 0)
            parser->close_asked = true;
        else if (bytes == 10 && strncasecmp(value, "keep-alive", 10) == 0)
            parser->keep_asked = true;
        value += bytes;
    }
}

// Headers that, given twice, one reader takes from the first line and another from the last.
static const char *const singles[] = {"Host", "Content-Length", "Transfer-Encoding", "Authorization", "Content-Type"};

static void take_header(struct http_parser *parser)
{
    const char *name = parser->head + parser->name_at, *value = parser->head + parser->value_at;
    for (int i = 0; i < (int)(sizeof singles / sizeof singles[0]); i++)
        if (same(name, singles[i])) {
            if (parser->seen & 1 << i)
                refuse(parser, 400, "a header that must be alone is given twice");
            parser->seen |= 1 << i;
        }
    if (parser->phase == HTTP_PARSER_REFUSED)
        return;
    if (same(name, "Host")) {
        parser->hosts++;
        if (!valid_host(value, strlen(value)))
            refuse(parser, 400, "the Host header is not a host");
    } else if (same(name, "Content-Length")) {
        take_length(parser, value);
    } else if (same(name, "Transfer-Encoding")) {
        parser->codings++;
        parser->chunked = same(value, "chunked");
    } else if (same(name, "Connection")) {
        take_connection(parser, value);
    } else if (same(name, "Expect")) {
        if (!same(value, "100-continue"))
            refuse(parser, 417, "the only expectation that is met is 100-continue");
        parser->expects_continue = parser->minor_version > 0;
    }
}

static void set_fields(struct http_parser *parser)
{
    parser->method = parser->head;
    char *target = parser->head + parser->target_at;
    size_t bytes;
    char *authority = target_authority(target, &bytes);
    const char *host = http_parser_header(parser, "Host");
    if (authority && host && (strncasecmp(authority, host, bytes) != 0 || host[bytes]))
        refuse(parser, 400, "the Host header is not the host of the request target");
    char *path = authority ? authority + bytes : target;
    char *query = strchr(path, '?');
    if (query)
        *query++ = 0;
    if (!decode_percent(path, true) || (query && !decode_percent(query, false)))
        refuse(parser, 400, "the request target has a bad percent code");
    parser->path = *path ? path : "/";
    parser->query = query ? query : "";
}

static void finish_head(struct http_parser *parser)
{
    if (parser->minor_version > 0 && !parser->hosts)
        refuse(parser, 400, "the Host header is missing");
    else if (parser->codings && parser->has_length)
        refuse(parser, 400, "both Content-Length and Transfer-Encoding are given");
    else if (parser->codings && parser->minor_version == 0)
        refuse(parser, 400, "HTTP/1.0 has no Transfer-Encoding");
    else if (parser->codings && !parser->chunked)
        refuse(parser, 501, "the only transfer coding that is known is chunked");
    else if (parser->content_length > parser->limits->body_bytes)
        refuse(parser, 413, "the body is larger than the server takes");
    else
        set_fields(parser);
    if (parser->phase == HTTP_PARSER_REFUSED)
        return;
    parser->keep_alive = !parser->close_asked && (parser->minor_version > 0 || parser->keep_asked);
    parser->expects_continue &= parser->chunked || parser->content_length > 0;
    parser->line_bytes = 0;
    parser->state = parser->chunked ? CHUNK_SIZE : BODY;
    parser->phase = parser->chunked || parser->content_length > 0 ? HTTP_PARSER_BODY : HTTP_PARSER_COMPLETE;
}

// ---- bytes ---------------------------------------------------------------------------------------------------------

static void take_target_byte(struct http_parser *parser, uint8_t c)
{
    if (c == ' ') {
        keep(parser, 0);
        parser->value_at = parser->head_bytes;
        parser->state = VERSION;
        if (parser->phase != HTTP_PARSER_REFUSED)
            take_target(parser);
    } else if (!(class_of[c] & IN_TARGET)) {
        refuse(parser, 400, "the request target has a character that it may not have");
    } else if (parser->head_bytes - parser->target_at >= parser->limits->uri_bytes) {
        refuse(parser, 414, "the request target is too long");
    } else {
        keep(parser, c);
    }
}

static void take_request_line_byte(struct http_parser *parser, uint8_t c)
{
    switch (parser->state) {
    case START:
        if (c == '\r' && parser->line_bytes == 1) {
            parser->state = START_LF;
            break;
        }
        parser->state = METHOD; // fall through
    case METHOD:
        if (class_of[c] & IN_TOKEN) {
            if (parser->head_bytes == METHOD_BYTES)
                refuse(parser, 501, "the method is not known");
            else
                keep(parser, c);
        } else if (c == ' ' && parser->head_bytes > 0) {
            keep(parser, 0);
            parser->target_at = parser->head_bytes;
            parser->state = TARGET_START;
        } else {
            refuse(parser, 400, "the request does not begin with a method");
        }
        break;
    case START_LF:
        parser->state = START;
        if (c != '\n')
            refuse(parser, 400, "a line ends without a line feed");
        break;
    case TARGET_START:
        if (c != '/' && (c | 0x20) != 'h' && !(c == '*' && strcmp(parser->head, "OPTIONS") == 0)) {
            refuse(parser, 400, "the request target is neither a path nor an http URI");
            break;
        }
        parser->state = TARGET; // fall through
    case TARGET:
        take_target_byte(parser, c);
        break;
    case VERSION:
        if (c == '\r' && parser->head_bytes - parser->value_at == 8) {
            parser->head_bytes = parser->headers_at = parser->value_at;
            parser->state = REQUEST_LF;
        } else if (parser->head_bytes - parser->value_at == 8) {
            refuse(parser, 400, "the request line does not end with an HTTP version");
        } else {
            keep(parser, c);
            if (parser->phase != HTTP_PARSER_REFUSED)
                take_version(parser);
        }
        break;
    default: // REQUEST_LF
        parser->state = HEADER_START;
        if (c != '\n')
            refuse(parser, 400, "a line ends without a line feed");
    }
}

static void end_value(struct http_parser *parser)
{
    parser->state = HEADER_LF;
    if (parser->in_trailer)
        return;
    while (parser->head_bytes > parser->value_at &&
           (parser->head[parser->head_bytes - 1] == ' ' || parser->head[parser->head_bytes - 1] == '\t'))
        parser->head_bytes--;
    keep(parser, 0);
}

// Trailers are headers that nobody keeps.
static void take_header_byte(struct http_parser *parser, uint8_t c)
{
    switch (parser->state) {
    case HEADER_START:
        if (c == '\r') {
            parser->state = HEAD_LF;
            break;
        }
        if (++parser->num_headers > parser->limits->headers) {
            refuse(parser, 431, "there are too many headers");
            break;
        }
        if (!(class_of[c] & IN_TOKEN)) {
            refuse(parser, 400, c == ' ' || c == '\t' ? "a header is folded" : "a header's name has a wrong character");
            break;
        }
        parser->name_at = parser->head_bytes;
        parser->state = NAME; // fall through
    case NAME:
        if (c != ':' && !(class_of[c] & IN_TOKEN)) {
            refuse(parser, 400, "a header's name has a wrong character");
            break;
        }
        if (c == ':')
            parser->state = VALUE_START;
        if (!parser->in_trailer)
            keep(parser, c == ':' ? 0 : c);
        if (c == ':')
            parser->value_at = parser->head_bytes;
        break;
    case VALUE_START:
        if (c == ' ' || c == '\t')
            break;
        parser->state = VALUE; // fall through
    case VALUE:
        if (c == '\r')
            end_value(parser);
        else if (!is_value_byte(c))
            refuse(parser, 400, "a header has a control character");
        else if (!parser->in_trailer)
            keep(parser, c);
        break;
    case HEADER_LF:
        parser->state = HEADER_START;
        if (c != '\n')
            refuse(parser, 400, "a line ends without a line feed");
        else if (!parser->in_trailer)
            take_header(parser);
        break;
    default: // HEAD_LF
        if (c != '\n')
            refuse(parser, 400, "a line ends without a line feed");
        else if (parser->in_trailer)
            parser->phase = HTTP_PARSER_COMPLETE;
        else
            finish_head(parser);
    }
}

static void take_chunk_byte(struct http_parser *parser, uint8_t c)
{
    int digit = hex_digit(c);
    switch (parser->state) {
    case CHUNK_SIZE:
        if (digit >= 0) {
            parser->chunk_left = 16 * parser->chunk_left + (uint64_t)digit;
            if (parser->chunk_left > parser->limits->body_bytes - parser->body_bytes)
                refuse(parser, 413, "the body is larger than the server takes");
            else if (++parser->chunk_digits > CHUNK_DIGITS)
                refuse(parser, 400, "the size of a chunk has too many digits");
        } else if (parser->chunk_digits == 0 || (c != '\r' && c != ';')) {
            refuse(parser, 400, "the size of a chunk is not a number");
        } else {
            parser->state = c == '\r' ? CHUNK_SIZE_LF : CHUNK_EXTENSION;
        }
        break;
    case CHUNK_EXTENSION:
        if (c == '\r')
            parser->state = CHUNK_SIZE_LF;
        else if (!is_value_byte(c))
            refuse(parser, 400, "the extension of a chunk has a control character");
        break;
    case CHUNK_SIZE_LF:
        parser->chunk_digits = 0;
        parser->in_trailer = parser->chunk_left == 0;
        parser->state = parser->in_trailer ? HEADER_START : CHUNK_DATA;
        if (c != '\n')
            refuse(parser, 400, "a line ends without a line feed");
        break;
    case CHUNK_END_CR:
        parser->state = CHUNK_END_LF;
        if (c != '\r')
            refuse(parser, 400, "a chunk is longer than its size says");
        break;
    default: // CHUNK_END_LF
        parser->state = CHUNK_SIZE;
        if (c != '\n')
            refuse(parser, 400, "a line ends without a line feed");
    }
}

static void take_byte(struct http_parser *parser, uint8_t c)
{
    // Of chunks only what is beside the data counts; sizes and line ends are bounded by the data.
    bool counted = parser->state < BODY || parser->state == CHUNK_EXTENSION;
    if (counted && ++parser->line_bytes > parser->limits->header_bytes) {
        refuse(parser, 431, "the headers are too long");
        return;
    }
    if (parser->state < HEADER_START)
        take_request_line_byte(parser, c);
    else if (parser->state < BODY)
        take_header_byte(parser, c);
    else
        take_chunk_byte(parser, c);
}

static size_t take_body(struct http_parser *parser, const char *data, size_t bytes)
{
    uint64_t left = parser->chunked ? parser->chunk_left : parser->content_length - parser->body_bytes;
    uint64_t count = bytes < left ? bytes : left;
    if (!body_room(parser, count, parser->chunked ? parser->limits->body_bytes : parser->content_length))
        return 0;
    memcpy(parser->body + parser->body_bytes, data, count);
    parser->body_bytes += count;
    parser->body[parser->body_bytes] = 0;
    if (parser->chunked) {
        parser->chunk_left -= count;
        if (parser->chunk_left == 0)
            parser->state = CHUNK_END_CR;
    } else if (count == left) {
        parser->phase = HTTP_PARSER_COMPLETE;
    }
    return count;
}

size_t http_parser_feed(struct http_parser *parser, const char *data, size_t bytes)
{
    size_t at = 0;
    if (bytes && parser->phase == HTTP_PARSER_EMPTY)
        parser->phase = HTTP_PARSER_HEAD;
    while (at < bytes && parser->phase < HTTP_PARSER_COMPLETE) {
        if (parser->state == BODY || parser->state == CHUNK_DATA)
            at += take_body(parser, data + at, bytes - at);
        else
            take_byte(parser, (uint8_t)data[at++]);
    }
    return at;
}

uint64_t http_parser_missing_bytes(const struct http_parser *parser)
{
    return parser->phase == HTTP_PARSER_BODY && !parser->chunked ? parser->content_length - parser->body_bytes : 0;
}

// ---- reading -------------------------------------------------------------------------------------------------------

void http_parser_each_header(const struct http_parser *parser,
                             void (*fn)(void *arg, const char *name, const char *value), void *arg)
{
    for (uint32_t at = parser->headers_at; parser->method && at < parser->head_bytes;) {
        const char *name = parser->head + at, *value = name + strlen(name) + 1;
        fn(arg, name, value);
        at = (uint32_t)(value + strlen(value) + 1 - parser->head);
    }
}

const char *http_parser_header(const struct http_parser *parser, const char *name)
{
    for (uint32_t at = parser->headers_at; parser->method && at < parser->head_bytes;) {
        const char *found = parser->head + at, *value = found + strlen(found) + 1;
        if (same(found, name))
            return value;
        at = (uint32_t)(value + strlen(value) + 1 - parser->head);
    }
    return NULL;
}
