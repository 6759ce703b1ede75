// Log lines on standard error. See log.h.
#include "engine/serve/log.h"

#include <errno.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

// At most this much of a line goes out in one write; longer texts are cut.
enum { LINE_BYTES = 4096, RESERVED_BYTES = 64 };

static atomic_int threshold = LOG_INFO;
static atomic_bool json_lines;

struct line {
    char text[LINE_BYTES];
    size_t bytes;
};

void log_configure(enum log_level level, bool json)
{
    atomic_store(&threshold, (int)level);
    atomic_store(&json_lines, json);
}

// Leaves room for what closes the line.
static void add(struct line *line, const char *text, size_t bytes)
{
    size_t room = LINE_BYTES - RESERVED_BYTES - line->bytes;
    if (bytes > room)
        bytes = room;
    memcpy(line->text + line->bytes, text, bytes);
    line->bytes += bytes;
}

static void add_text(struct line *line, const char *text) { add(line, text, strlen(text)); }

// Length of the well-formed UTF-8 sequence at text, 0 when there is none.
static size_t utf8_length(const unsigned char *text)
{
    static const struct {
        unsigned char first, last, second_first, second_last;
        size_t length;
    } forms[] = {
        {0xc2, 0xdf, 0x80, 0xbf, 2}, {0xe0, 0xe0, 0xa0, 0xbf, 3}, {0xe1, 0xec, 0x80, 0xbf, 3},
        {0xed, 0xed, 0x80, 0x9f, 3}, {0xee, 0xef, 0x80, 0xbf, 3}, {0xf0, 0xf0, 0x90, 0xbf, 4},
        {0xf1, 0xf3, 0x80, 0xbf, 4}, {0xf4, 0xf4, 0x80, 0x8f, 4},
    };
    if (text[0] < 0x80)
        return 1;
    for (size_t i = 0; i < sizeof forms / sizeof forms[0]; i++) {
        if (text[0] < forms[i].first || text[0] > forms[i].last)
            continue;
        if (text[1] < forms[i].second_first || text[1] > forms[i].second_last)
            return 0;
        for (size_t at = 2; at < forms[i].length; at++)
            if ((text[at] & 0xc0) != 0x80)
                return 0;
        return forms[i].length;
    }
    return 0;
}

// Text inside double quotes, in both forms of line: what could end the line or move a terminal's cursor is escaped.
static void add_quoted(struct line *line, const char *text)
{
    static const char replacement[] = "\xef\xbf\xbd";
    size_t room = LINE_BYTES - RESERVED_BYTES;
    add(line, "\"", 1);
    for (const unsigned char *at = (const unsigned char *)text; *at && line->bytes + 8 < room;) {
        size_t length = utf8_length(at);
        char escaped[8];
        if (length == 0) {
            add_text(line, replacement);
            length = 1;
        } else if (*at == '"' || *at == '\\') {
            snprintf(escaped, sizeof escaped, "\\%c", *at);
            add_text(line, escaped);
        } else if (*at < 0x20 || *at == 0x7f) {
            snprintf(escaped, sizeof escaped, "\\u%04x", *at);
            add_text(line, escaped);
        } else {
            add(line, (const char *)at, length);
        }
        at += length;
    }
    add(line, "\"", 1);
}

static bool is_plain(const char *text)
{
    for (const unsigned char *at = (const unsigned char *)text; *at; at++)
        if (*at <= 0x20 || *at >= 0x7f || *at == '"' || *at == '\\' || *at == '=')
            return false;
    return *text != 0;
}

static void add_value(struct line *line, const struct log_field *field, bool json)
{
    char number[40];
    switch (field->type) {
    case LOG_INTEGER:
        snprintf(number, sizeof number, "%lld", (long long)field->integer);
        add_text(line, number);
        break;
    case LOG_SECONDS:
        snprintf(number, sizeof number, "%.6f", field->seconds);
        add_text(line, number);
        break;
    case LOG_TEXT:
        if (!field->text)
            add_text(line, json ? "null" : "-");
        else if (!json && is_plain(field->text))
            add_text(line, field->text);
        else
            add_quoted(line, field->text);
        break;
    }
}

static void add_time(struct line *line)
{
    struct timespec now;
    struct tm utc;
    char text[80];
    clock_gettime(CLOCK_REALTIME, &now);
    gmtime_r(&now.tv_sec, &utc);
    size_t bytes = strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%S", &utc);
    snprintf(text + bytes, sizeof text - bytes, ".%03dZ", (int)(now.tv_nsec / 1000000));
    add_text(line, text);
}

void log_line(enum log_level level, const char *message, const struct log_field *fields)
{
    static const char *const names[] = {"error", "warning", "info", "debug"};
    bool json = atomic_load_explicit(&json_lines, memory_order_relaxed);
    if ((int)level > atomic_load_explicit(&threshold, memory_order_relaxed))
        return;
    struct line line = {.bytes = 0};
    add_text(&line, json ? "{\"time\":\"" : "");
    add_time(&line);
    add_text(&line, json ? "\",\"level\":\"" : " ");
    add_text(&line, names[level]);
    add_text(&line, json ? "\",\"message\":" : level == LOG_INFO ? "    " : level == LOG_WARNING ? " " : "   ");
    if (json)
        add_quoted(&line, message);
    else
        add_text(&line, message);
    for (; fields && fields->key; fields++) {
        // A whole field or none, so that a long line stays well formed.
        struct line before = line;
        add_text(&line, json ? ",\"" : " ");
        add_text(&line, fields->key);
        add_text(&line, json ? "\":" : "=");
        add_value(&line, fields, json);
        if (line.bytes >= LINE_BYTES - RESERVED_BYTES) {
            line = before;
            break;
        }
    }
    memcpy(line.text + line.bytes, json ? "}\n" : "\n", json ? 2 : 1);
    line.bytes += json ? 2 : 1;
    // A pipe that is full or closed costs the line, not the server.
    struct pollfd room = {.fd = STDERR_FILENO, .events = POLLOUT};
    if (poll(&room, 1, 0) == 0)
        return;
    ssize_t written;
    do
        written = write(STDERR_FILENO, line.text, line.bytes);
    while (written < 0 && errno == EINTR);
}
