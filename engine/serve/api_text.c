// See api_text.h.
#include "engine/serve/api_text.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { KEPT_BYTES = 1 << 20 };

// Room for more bytes and a NUL.
static bool reserve(struct api_text *text, size_t more)
{
    size_t wanted;
    if (text->failed)
        return false;
    if (__builtin_add_overflow(text->bytes, more, &wanted) || wanted > SIZE_MAX / 2 - 1) {
        text->failed = true;
        return false;
    }
    if (wanted < text->capacity)
        return true;
    size_t capacity = wanted < 128 ? 256 : 2 * wanted;
    char *data = realloc(text->data, capacity);
    if (!data) {
        text->failed = true;
        return false;
    }
    text->data = data;
    text->capacity = capacity;
    return true;
}

void api_text_append(struct api_text *text, const void *data, size_t bytes)
{
    if (!reserve(text, bytes))
        return;
    if (bytes)
        memcpy(text->data + text->bytes, data, bytes);
    text->bytes += bytes;
    text->data[text->bytes] = 0;
}

void api_text_puts(struct api_text *text, const char *string) { api_text_append(text, string, strlen(string)); }

void api_text_printf(struct api_text *text, const char *format, ...)
{
    char line[1024];
    va_list arguments;
    va_start(arguments, format);
    int bytes = vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    if (bytes < 0 || (size_t)bytes >= sizeof line)
        text->failed = true; // no caller writes that much
    else
        api_text_append(text, line, (size_t)bytes);
}

static void escape(struct api_text *text, unsigned char c)
{
    static const char letters[] = {['\b'] = 'b', ['\f'] = 'f', ['\n'] = 'n', ['\r'] = 'r', ['\t'] = 't'};
    char out[8];
    if (c == '"' || c == '\\')
        snprintf(out, sizeof out, "\\%c", c);
    else if (c < sizeof letters && letters[c])
        snprintf(out, sizeof out, "\\%c", letters[c]);
    else
        snprintf(out, sizeof out, "\\u%04x", c);
    api_text_puts(text, out);
}

void api_text_escaped(struct api_text *text, const char *data, size_t bytes)
{
    size_t done = 0;
    for (size_t i = 0; i < bytes; i++) {
        unsigned char c = (unsigned char)data[i];
        if (c >= 0x20 && c != '"' && c != '\\' && c != 0x7f)
            continue;
        api_text_append(text, data + done, i - done);
        escape(text, c);
        done = i + 1;
    }
    api_text_append(text, data + done, bytes - done);
}

void api_text_string(struct api_text *text, const char *data, size_t bytes)
{
    api_text_append(text, "\"", 1);
    api_text_escaped(text, data, bytes);
    api_text_append(text, "\"", 1);
}

void api_text_number(struct api_text *text, double value)
{
    if (isfinite(value))
        api_text_printf(text, "%.9g", value);
    else
        api_text_puts(text, "-9999");
}

void api_text_clear(struct api_text *text)
{
    if (text->capacity > KEPT_BYTES)
        api_text_free(text);
    text->bytes = 0;
    text->failed = false;
    if (text->data)
        text->data[0] = 0;
}

void api_text_free(struct api_text *text)
{
    free(text->data);
    *text = (struct api_text){0};
}
