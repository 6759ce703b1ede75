// A growing byte string that JSON is written into. Lack of memory is remembered and asked for once, at the end.
#ifndef TPSHARD_ENGINE_SERVE_API_TEXT_H
#define TPSHARD_ENGINE_SERVE_API_TEXT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct api_text { // start from {0}; data is NUL-terminated once anything was appended
    char *data;
    size_t bytes, capacity;
    bool failed; // memory ran out: what follows is dropped
};

void api_text_append(struct api_text *text, const void *data, size_t bytes);
void api_text_puts(struct api_text *text, const char *string);
void api_text_printf(struct api_text *text, const char *format, ...) __attribute__((format(printf, 2, 3)));
// A JSON string, with its quotes. data is valid UTF-8.
void api_text_string(struct api_text *text, const char *data, size_t bytes);
// The same without the quotes.
void api_text_escaped(struct api_text *text, const char *data, size_t bytes);
// A finite number; -9999 for one that JSON cannot write, as OpenAI does for what has no probability.
void api_text_number(struct api_text *text, double value);
void api_text_clear(struct api_text *text); // empty again; keeps the memory, but not more than 1 MiB of it
void api_text_free(struct api_text *text);

#endif
