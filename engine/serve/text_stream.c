// See text_stream.h. Each stop string has an automaton that says how much of it the text ends with: the most that any of them says is held back.
#include "engine/serve/text_stream.h"

#include "engine/serve/api_text.h"

#include <stdlib.h>
#include <string.h>

struct text_stream {
    const struct text_rules *rules;
    struct tokenizer_stream *decoder;
    struct api_text text; // what was not taken yet
    uint64_t taken;       // bytes before it
    size_t ready;         // of text: released
    size_t given;         // of text: handed out by the last take, dropped with the next push
    uint16_t state[STOP_STRINGS_MAX];
    int64_t tokens;
    bool stopped;
};

bool stop_strings_add(struct stop_strings *stops, const char *text, size_t bytes)
{
    struct stop_string stop = {malloc(bytes), (uint16_t)bytes, calloc(bytes, sizeof(uint16_t))};
    if (!stop.text || !stop.fallback) {
        free(stop.text);
        free(stop.fallback);
        return false;
    }
    memcpy(stop.text, text, bytes);
    for (uint16_t i = 1, border = 0; i < stop.bytes; i++) {
        while (border && text[i] != text[border])
            border = stop.fallback[border - 1];
        border = (uint16_t)(border + (text[i] == text[border]));
        stop.fallback[i] = border;
    }
    stops->items[stops->count++] = stop;
    return true;
}

void stop_strings_free(struct stop_strings *stops)
{
    for (int i = 0; i < stops->count; i++) {
        free(stops->items[i].text);
        free(stops->items[i].fallback);
    }
    *stops = (struct stop_strings){0};
}

int text_stream_create(struct text_stream **out, const struct text_rules *rules, struct error *err)
{
    struct text_stream *stream = calloc(1, sizeof *stream);
    if (!stream)
        return error_set(err, ERR_MEMORY, "no memory for a stream of text");
    stream->rules = rules;
    int rc = tokenizer_stream_new(&stream->decoder, rules->tokenizer, false, err);
    if (rc)
        text_stream_free(stream);
    else
        *out = stream;
    return rc;
}

void text_stream_free(struct text_stream *stream)
{
    if (!stream)
        return;
    tokenizer_stream_free(stream->decoder);
    api_text_free(&stream->text);
    free(stream);
}

static void drop_given(struct text_stream *stream)
{
    struct api_text *text = &stream->text;
    if (!stream->given)
        return;
    memmove(text->data, text->data + stream->given, text->bytes - stream->given);
    text->bytes -= stream->given;
    stream->ready -= stream->given;
    stream->taken += stream->given;
    stream->given = 0;
}

// Takes one byte into every automaton. The longest stop string that is complete with it, or NULL.
static const struct stop_string *feed(struct text_stream *stream, char byte)
{
    const struct stop_string *found = NULL;
    for (int i = 0; i < stream->rules->stops.count; i++) {
        const struct stop_string *stop = &stream->rules->stops.items[i];
        uint16_t state = stream->state[i];
        while (state && stop->text[state] != byte)
            state = stop->fallback[state - 1];
        state = (uint16_t)(state + (stop->text[state] == byte));
        stream->state[i] = state;
        if (state == stop->bytes && (!found || stop->bytes > found->bytes))
            found = stop;
    }
    return found;
}

// The bytes of text from `from` on are new. watched: stop strings are looked for.
static void release(struct text_stream *stream, size_t from, bool watched)
{
    struct api_text *text = &stream->text;
    size_t held = 0;
    for (size_t i = from; watched && i < text->bytes; i++) {
        const struct stop_string *stop = feed(stream, text->data[i]);
        if (stop) {
            text->bytes = i + 1 - (stream->rules->include_stop ? 0 : stop->bytes);
            stream->ready = text->bytes;
            stream->stopped = true;
            return;
        }
    }
    for (int i = 0; i < stream->rules->stops.count; i++)
        held = stream->state[i] > held ? stream->state[i] : held;
    stream->ready = text->bytes - held;
}

static bool shown(const struct text_rules *rules, uint32_t token)
{
    if (!rules->skip_special || !tokenizer_is_special(rules->tokenizer, token))
        return true;
    for (int i = 0; i < rules->num_kept; i++)
        if (rules->kept[i] == token)
            return true;
    return false;
}

static int take_in(struct text_stream *stream, const char *piece, size_t bytes, struct error *err)
{
    size_t from = stream->text.bytes;
    api_text_append(&stream->text, piece, bytes);
    if (stream->text.failed)
        return error_set(err, ERR_MEMORY, "no memory for the output");
    release(stream, from, stream->tokens > stream->rules->min_tokens);
    return 0;
}

int text_stream_push(struct text_stream *stream, uint32_t token, struct error *err)
{
    const char *piece;
    size_t bytes;
    drop_given(stream);
    if (stream->stopped)
        return 0;
    stream->tokens++;
    if (!shown(stream->rules, token))
        return 0;
    int rc = tokenizer_stream_push(stream->decoder, token, &piece, &bytes, err);
    return rc ? rc : take_in(stream, piece, bytes, err);
}

int text_stream_finish(struct text_stream *stream, struct error *err)
{
    const char *piece;
    size_t bytes;
    drop_given(stream);
    if (stream->stopped)
        return 0;
    int rc = tokenizer_stream_flush(stream->decoder, &piece, &bytes, err);
    if (rc || (rc = take_in(stream, piece, bytes, err)))
        return rc;
    stream->ready = stream->text.bytes;
    memset(stream->state, 0, sizeof stream->state);
    return 0;
}

const char *text_stream_take(struct text_stream *stream, size_t *bytes)
{
    const char *text = stream->text.data ? stream->text.data + stream->given : "";
    *bytes = stream->ready - stream->given;
    stream->given = stream->ready;
    return text;
}

bool text_stream_stopped(const struct text_stream *stream) { return stream->stopped; }
uint64_t text_stream_total(const struct text_stream *stream) { return stream->taken + stream->text.bytes; }
uint64_t text_stream_released(const struct text_stream *stream) { return stream->taken + stream->ready; }
