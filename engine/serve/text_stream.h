// The text of one sequence as its tokens come: special tokens left out, stop strings found wherever tokens cut them, and nothing released that a stop
// string may still take back. What is released does not depend on how tokens arrive, only on which: it is the same for a stream and a whole answer.
// Owns: stop strings, what is held back. Leaves to others: ids to text (formats/tokenizer.h), what the text means (output_parser.h).
#ifndef TPSHARD_ENGINE_SERVE_TEXT_STREAM_H
#define TPSHARD_ENGINE_SERVE_TEXT_STREAM_H

#include "formats/error.h"
#include "formats/tokenizer.h"

#include <stdbool.h>
#include <stdint.h>

enum { STOP_STRINGS_MAX = 16, STOP_STRING_BYTES = 4096 };

// The stop strings of a request: immutable, for any number of streams. Start from {0}.
struct stop_strings {
    int count;
    struct stop_string {
        char *text;
        uint16_t bytes;
        uint16_t *fallback; // [bytes] of Knuth, Morris and Pratt: longest proper border of the first i + 1 bytes
    } items[STOP_STRINGS_MAX];
};
// text: UTF-8, 1 .. STOP_STRING_BYTES bytes; copied. False without memory.
bool stop_strings_add(struct stop_strings *stops, const char *text, size_t bytes);
void stop_strings_free(struct stop_strings *stops);

struct text_rules { // of a request; borrowed until the last stream is freed
    const struct tokenizer *tokenizer;
    struct stop_strings stops;
    bool skip_special;    // but for those in kept
    const uint32_t *kept; // special tokens that are text all the same (a tool format's)
    int num_kept;
    bool include_stop;  // the stop string stays in the text
    int64_t min_tokens; // no stop string begins in the text of so many tokens
};

struct text_stream; // one thread at a time

int text_stream_create(struct text_stream **out, const struct text_rules *rules, struct error *err);
void text_stream_free(struct text_stream *stream); // accepts NULL
// The next token. Nothing is taken after a stop string.
int text_stream_push(struct text_stream *stream, uint32_t token, struct error *err);
// The end of the tokens: everything held back is released.
int text_stream_finish(struct text_stream *stream, struct error *err);
// What was released since the last call: complete UTF-8 characters, valid until the next push.
const char *text_stream_take(struct text_stream *stream, size_t *bytes);

bool text_stream_stopped(const struct text_stream *stream);      // a stop string was met: the text has ended
uint64_t text_stream_total(const struct text_stream *stream);    // bytes of text so far, what is held back included
uint64_t text_stream_released(const struct text_stream *stream); // bytes released so far, taken or not

#endif
