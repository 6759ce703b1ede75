// Tools of a request, in the form that a model writes calls (output_parser.h): as a grammar, so that what is asked for is what comes, and in the
// messages of a conversation. Leaves to others: grammars (grammar.h), checking of requests (api_messages.c), taking output apart.
#ifndef TPSHARD_ENGINE_SERVE_CHAT_TOOLS_H
#define TPSHARD_ENGINE_SERVE_CHAT_TOOLS_H

#include "engine/serve/grammar.h"
#include "engine/serve/output_parser.h"

#include <jansson.h>
#include <stdbool.h>

struct chat_tools {
    enum tool_format format; // of the model
    const json_t *tools;     // a list of {"type": "function", "function": {"name", "parameters", "strict"}}, not empty
    bool required;           // nothing but calls, at least one
    const char *only;        // the one function that must be called, once; NULL: any
    bool parallel;           // more than one call
};

// Whether calls in this form can be asked for: as a grammar.
bool chat_tools_can_force(enum tool_format format);
// Whether output must be restricted: calls are asked for, only one is allowed, or a function is strict. Without, calls are as the model makes them.
bool chat_tools_restrict(const struct chat_tools *tools);

// Appends the pieces of the output: calls alone (required, only), else text and calls. Names are those of the tools. Arguments satisfy the
// function's parameters where calls are asked for or the function is strict, else they are some object. The parameters of a function without any are {}.
// ERR_USAGE: a name that the format cannot express, parameters that are no object. Schemas that grammars refuse are reported by grammar_compile.
int chat_tools_add(struct grammar *grammar, const struct chat_tools *tools, struct error *err);

// Mistral's templates want ids of calls to be nine letters and digits: the last ones of longer ids, in calls and in their results alike. Nothing
// changes for other formats. messages: a list; what is not as expected is left alone.
int chat_tools_fit_ids(json_t *messages, enum tool_format format, struct error *err);

#endif
