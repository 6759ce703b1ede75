// Log lines on standard error: "2026-11-21T11:20:31.123Z info  message key=value", or one JSON object a line. Any thread; a line is one write.
#ifndef TPSHARD_ENGINE_SERVE_LOG_H
#define TPSHARD_ENGINE_SERVE_LOG_H

#include <stdbool.h>
#include <stdint.h>

enum log_level { LOG_ERROR, LOG_WARNING, LOG_INFO, LOG_DEBUG };
struct log_field { // the list ends with a NULL key
    const char *key;
    enum { LOG_TEXT, LOG_INTEGER, LOG_SECONDS } type;
    const char *text;
    int64_t integer;
    double seconds;
};
void log_configure(enum log_level level, bool json);
void log_line(enum log_level level, const char *message, const struct log_field *fields);

#endif
