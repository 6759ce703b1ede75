// HTTP requests, several behind each other on one connection. However the bytes are divided, the same requests come out; what is accepted is
// framed in one way only, and written again and read again it is the same.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "engine/serve/http_parser.h"
#include "tests/fuzz/fuzz.h"

// Small limits, so that inputs of some hundred bytes reach them.
static const struct http_parser_limits limits = {
    .header_bytes = 600, .headers = 8, .uri_bytes = 100, .body_bytes = 300};
static const struct http_parser_limits loose = {
    .header_bytes = 2000, .headers = 20, .uri_bytes = 400, .body_bytes = 300};
static const uint64_t body_budget = 320;

struct text {
    char *bytes;
    size_t count, capacity;
};

static void add(struct text *text, const void *bytes, size_t count)
{
    if (text->count + count + 1 > text->capacity) {
        text->capacity = 2 * (text->count + count + 1);
        text->bytes = realloc(text->bytes, text->capacity);
        CHECK(text->bytes);
    }
    if (count)
        memcpy(text->bytes + text->count, bytes, count);
    text->count += count;
    text->bytes[text->count] = 0;
}

static void add_text(struct text *text, const char *more) { add(text, more, strlen(more)); }

static void add_header(void *arg, const char *name, const char *value)
{
    add_text(arg, name);
    add_text(arg, ": ");
    add_text(arg, value);
    add_text(arg, "\r\n");
}

static void add_number(struct text *text, const char *name, uint64_t number)
{
    char line[80];
    snprintf(line, sizeof line, "%s %ju\n", name, (uintmax_t)number);
    add_text(text, line);
}

// Everything that a server sees of a request.
static void describe(struct text *out, const struct http_parser *parser)
{
    add_number(out, "phase", parser->phase);
    if (parser->phase == HTTP_PARSER_REFUSED) {
        add_number(out, parser->reason, (uint64_t)parser->status);
        return;
    }
    if (parser->phase != HTTP_PARSER_COMPLETE)
        return;
    add_text(out, parser->method);
    add_text(out, parser->path);
    add_text(out, "?");
    add_text(out, parser->query);
    add_number(out, "minor", (uint64_t)parser->minor_version);
    add_number(out, "keep", parser->keep_alive);
    add_number(out, "expects", parser->expects_continue);
    http_parser_each_header(parser, add_header, out);
    add_number(out, "body", parser->body_bytes);
    add(out, parser->body, parser->body_bytes);
}

// The rules that must hold for what is accepted, in words of their own.
struct framing {
    int hosts, lengths, codings;
    const char *length;
};

static void count_framing(void *arg, const char *name, const char *value)
{
    struct framing *framing = arg;
    CHECK(http_is_token(name) && http_is_field_value(value));
    CHECK(value[0] != ' ' && value[0] != '\t');
    framing->hosts += strcasecmp(name, "host") == 0;
    framing->codings += strcasecmp(name, "transfer-encoding") == 0;
    if (strcasecmp(name, "content-length") == 0) {
        framing->lengths++;
        framing->length = value;
    }
    CHECK(strcasecmp(name, "transfer-encoding") != 0 || strcasecmp(value, "chunked") == 0);
}

static void check_accepted(const struct http_parser *parser)
{
    struct framing framing = {0};
    http_parser_each_header(parser, count_framing, &framing);
    CHECK(http_is_token(parser->method));
    CHECK(parser->path[0] == '/' || strcmp(parser->path, "*") == 0);
    for (const char *at = parser->path; *at; at++)
        CHECK((uint8_t)*at >= 0x20 && *at != 0x7f);
    for (const char *at = parser->query; *at; at++)
        CHECK((uint8_t)*at > 0x20 && (uint8_t)*at < 0x7f);
    CHECK(parser->minor_version == 0 || parser->minor_version == 1);
    CHECK(framing.hosts == 1 || (framing.hosts == 0 && parser->minor_version == 0));
    CHECK(framing.lengths + framing.codings <= 1);
    CHECK(framing.codings == parser->chunked && (!parser->chunked || parser->minor_version == 1));
    CHECK(parser->chunked || parser->body_bytes == (framing.lengths ? strtoull(framing.length, NULL, 10) : 0));
    CHECK(framing.length == NULL || framing.length[strspn(framing.length, "0123456789")] == 0);
    CHECK(parser->body_bytes <= limits.body_bytes);
    CHECK(parser->body_bytes == 0 || parser->body[parser->body_bytes] == 0);
}

static void check_again(const struct http_parser *parser)
{
    struct text wire = {0}, first = {0}, second = {0};
    struct http_parser again;
    char code[8];
    add_text(&wire, parser->method);
    add_text(&wire, " ");
    for (const char *at = parser->path; *at; at++) {
        snprintf(code, sizeof code, "%%%02X", (uint8_t)*at);
        if (at == parser->path)
            add(&wire, at, 1);
        else
            add_text(&wire, code);
    }
    if (*parser->query) {
        add_text(&wire, "?");
        add_text(&wire, parser->query);
    }
    add_text(&wire, parser->minor_version ? " HTTP/1.1\r\n" : " HTTP/1.0\r\n");
    http_parser_each_header(parser, add_header, &wire);
    add_text(&wire, "\r\n");
    if (parser->chunked && parser->body_bytes) {
        char size[24];
        snprintf(size, sizeof size, "%jx\r\n", (uintmax_t)parser->body_bytes);
        add_text(&wire, size);
        add(&wire, parser->body, parser->body_bytes);
        add_text(&wire, "\r\n");
    } else if (!parser->chunked) {
        add(&wire, parser->body, parser->body_bytes);
    }
    if (parser->chunked)
        add_text(&wire, "0\r\n\r\n");
    http_parser_init(&again, &loose, NULL);
    CHECK(http_parser_feed(&again, wire.bytes, wire.count) == wire.count);
    describe(&first, parser);
    describe(&second, &again);
    CHECK(first.count == second.count && memcmp(first.bytes, second.bytes, first.count) == 0);
    http_parser_reset(&again);
    free(wire.bytes);
    free(first.bytes);
    free(second.bytes);
}

// All requests of one connection. seed 0: the bytes come whole; 1: one by one; else in pieces of chance.
static struct text connection(const uint8_t *data, size_t size, uint32_t seed)
{
    struct text out = {0};
    struct http_parser parser;
    uint64_t budget = body_budget;
    uint32_t chance = seed;
    size_t at = 0;
    http_parser_init(&parser, &limits, &budget);
    add_text(&out, "");
    while (at < size) {
        chance = chance * 1664525 + 1013904223;
        size_t count = seed == 0 ? size : seed == 1 ? 1 : 1 + (chance >> 8) % ((chance >> 29) ? 7 : 200);
        if (count > size - at)
            count = size - at;
        char *piece = malloc(count); // of exactly its size
        CHECK(piece);
        memcpy(piece, data + at, count);
        size_t taken = http_parser_feed(&parser, piece, count);
        free(piece);
        CHECK(taken <= count && (taken == count || parser.phase >= HTTP_PARSER_COMPLETE));
        CHECK(parser.phase != HTTP_PARSER_EMPTY);
        CHECK(http_parser_missing_bytes(&parser) <= limits.body_bytes);
        at += taken;
        if (parser.phase < HTTP_PARSER_COMPLETE)
            continue;
        describe(&out, &parser);
        add_number(&out, "at", at);
        if (parser.phase == HTTP_PARSER_REFUSED)
            break;
        if (seed == 0) {
            check_accepted(&parser);
            check_again(&parser);
        }
        http_parser_reset(&parser);
        CHECK(budget == body_budget);
    }
    add_number(&out, "end", parser.phase);
    http_parser_reset(&parser);
    CHECK(budget == body_budget);
    return out;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct text whole = connection(data, size, 0);
    for (uint32_t seed = 1; seed < 4; seed++) {
        struct text pieces = connection(data, size, seed * 7919 - 7918);
        CHECK(whole.count == pieces.count && memcmp(whole.bytes, pieces.bytes, whole.count) == 0);
        free(pieces.bytes);
    }
    free(whole.bytes);
    return 0;
}
