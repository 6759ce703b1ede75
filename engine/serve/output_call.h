// One call of a function as models write it, read byte by byte: {"name": "f", "arguments": {...}}. The arguments are passed on as they come.
// Owns: what such an object may look like. Leaves to others: what stands around it (output_parser.c).
#ifndef TPSHARD_ENGINE_SERVE_OUTPUT_CALL_H
#define TPSHARD_ENGINE_SERVE_OUTPUT_CALL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { OUTPUT_CALL_NAME_BYTES = 256, OUTPUT_CALL_DEPTH = 512, OUTPUT_CALL_EARLY_BYTES = 64 << 10 };

// Values with brackets, followed as far as needed to see where they end.
struct output_call_nest {
    int depth;
    bool in_string, escaped;
    uint8_t objects[OUTPUT_CALL_DEPTH / 8]; // bit: the bracket is '{', not '['
};

struct output_call_sink {
    void (*begin)(void *arg, const char *name, size_t bytes);
    void (*arguments)(void *arg, const char *text, size_t bytes); // after begin; together the text of an object
    void *arg;
};

// Start with output_call_start; free with output_call_clear. One thread.
struct output_call {
    struct output_call_sink sink;
    bool strict; // without the marks that say "a call": only known members, and arguments must be there
    int state;
    char key[16]; // of the member being read; too long a key is cut and matches none
    size_t key_bytes;
    char name[OUTPUT_CALL_NAME_BYTES];
    size_t name_bytes;
    bool named, begun, has_arguments, wrote_arguments;
    char *early; // arguments that came before the name
    size_t early_bytes, early_capacity;
    struct output_call_nest nest;
    int escape; // of a string: 0 none, 1 after a backslash, 2 .. 5 hexadecimal digits
    uint32_t code, high;
    int word; // letters of null so far
};

enum output_call_step {
    OUTPUT_CALL_MORE,
    OUTPUT_CALL_END,      // this byte ended the call
    OUTPUT_CALL_BAD,      // no call; the byte was not taken
    OUTPUT_CALL_BAD_ENDS, // no call; the byte was taken
    OUTPUT_CALL_NO_MEMORY,
};

void output_call_start(struct output_call *call, struct output_call_sink sink, bool strict);
// Where the name is known from elsewhere: the arguments alone follow, an object.
void output_call_start_arguments(struct output_call *call, struct output_call_sink sink, const char *name,
                                 size_t bytes);
enum output_call_step output_call_take(struct output_call *call, char byte);
void output_call_clear(struct output_call *call);

#endif
