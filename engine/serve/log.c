// Log lines on standard error. See log.h.
#include "engine/serve/log.h"

#include "formats/tokenizer_text.h"
#include "formats/utf8.h"

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

// Text inside double quotes, in both forms of line: what could end the line or move a terminal's cursor is escaped.
static void add_quoted(struct line *line, const char *text)
{
    size_t room = LINE_BYTES - RESERVED_BYTES, left = strlen(text), valid = 0;
    add(line, "\"", 1);
    while (left > 0 && line->bytes + 8 < room) {
        char escaped[8];
        uint32_t c = 0;
        size_t length = 1;
        if (valid == 0)
            valid = tokenizer_text_valid_prefix(text, left);
        if (valid == 0) { // a byte that is no text
            add(line, escaped, utf8_put(escaped, UTF8_REPLACEMENT));
            valid = 1;
        } else if ((length = tokenizer_text_next(text, valid, &c)) == 1 && (c == '"' || c == '\\')) {
            snprintf(escaped, sizeof escaped, "\\%c", (int)c);
            add_text(line, escaped);
        } else if (c < 0x20 || c == 0x7f) {
            snprintf(escaped, sizeof escaped, "\\u%04x", (unsigned)c);
            add_text(line, escaped);
        } else {
            add(line, text, length);
        }
        text += length;
        left -= length;
        valid -= length;
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
