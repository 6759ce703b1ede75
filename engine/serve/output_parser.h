// A model's text taken apart as it comes: what it thinks, what it says, which tools it calls. One format per family of models, found in the chat
// template. Deltas put together equal what the whole text would give, wherever it is cut.
//
// Marks are taken out, and blanks next to them: behind <think>, around </think>, between a text and a call, between calls. What looks like a call but
// is none comes as content, marks included. Once a call's arguments have begun they can not be taken back: where they break off, the call ends
// there and the rest is content. Arguments come as the model writes them: they may be no JSON, and end early.
#ifndef TPSHARD_ENGINE_SERVE_OUTPUT_PARSER_H
#define TPSHARD_ENGINE_SERVE_OUTPUT_PARSER_H

#include "formats/error.h"

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>

enum tool_format {
    TOOLS_NONE,
    TOOLS_HERMES, // <tool_call>{"name": "f", "arguments": {...}}</tool_call>, any number; also Qwen's
    TOOLS_LLAMA3, // {"name": "f", "parameters": {...}} as the whole text, several separated by ";"; <|python_tag|> may stand before
    TOOLS_MISTRAL,     // [TOOL_CALLS] [{"name": "f", "arguments": {...}}, ...]
    TOOLS_MISTRAL_V11, // [TOOL_CALLS]f[ARGS]{...}, any number
    TOOLS_HARMONY, // <|channel|>commentary to=functions.f<|message|>{...}<|call|>; all text stands in channels (output_channels.h)
};
// What names of functions consist of where they stand bare.
#define OUTPUT_NAME_BYTES "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-./:"
struct output_format {
    enum tool_format tools;
    bool reasoning; // <think> ... </think>, or a channel
};
// The texts that mark calls and reasoning, in all formats; where a tokenizer has them as special tokens the parser must see them.
enum { OUTPUT_MARKS = 15 };
extern const char *const output_marks[OUTPUT_MARKS];
bool output_format_has(struct output_format format, int mark); // this format's
// By what the template's text says; TOOLS_NONE where calls are written in none of these ways.
struct output_format output_format_find(const char *template_text);

struct output_delta {
    enum { DELTA_CONTENT, DELTA_REASONING, DELTA_TOOL_BEGIN, DELTA_TOOL_ARGUMENTS, DELTA_TOOL_END } type;
    const char *text; // CONTENT, REASONING: text; BEGIN: the function's name; ARGUMENTS: a piece of JSON text
    size_t bytes;
    int tool; // index of the call
};
typedef void output_delta_fn(void *arg, const struct output_delta *delta);

struct output_parser;
// tools: whether the request offered any; without, nothing is taken for a call. starts_in_reasoning: the prompt ended with <think>.
int output_parser_create(struct output_parser **out, struct output_format format, bool tools, bool starts_in_reasoning,
                         output_delta_fn *on_delta, void *arg, struct error *err);
void output_parser_free(struct output_parser *parser);
// Text of the output in whole characters, with the control tokens that are the format's marks; others are left out by the caller. A delta's text is whole characters, some KiB at most.
int output_parser_push(struct output_parser *parser, const char *text, size_t bytes, struct error *err);
// The end: text that was held back comes as content.
int output_parser_finish(struct output_parser *parser, struct error *err);
int output_parser_tool_calls(const struct output_parser *parser); // so far

#endif
