// Conversations as the text and the tokens that a model was trained on: its chat template, applied.
// Owns: the templates of a shard directory, what a template is given, marked tokenizing of the result.
// Leaves to others: where the files lie and whether they are what the manifest names, the template language (template.h), HTTP, what to do
// with the tokens.
//
// A shard directory has chat_template.jinja, perhaps chat_template.tool_use.jinja for conversations with tools, and
// special_tokens_map.json with the texts of bos_token, eos_token and so on.
#ifndef TPSHARD_FORMATS_CHAT_H
#define TPSHARD_FORMATS_CHAT_H

#include <stdbool.h>
#include <stdint.h>

#include <jansson.h>

#include "formats/error.h"
#include "formats/template.h"
#include "formats/tokenizer.h"

#define CHAT_TEMPLATE_FILE "chat_template.jinja"
#define CHAT_TOOL_TEMPLATE_FILE "chat_template.tool_use.jinja"
#define CHAT_SPECIAL_TOKENS_FILE "special_tokens_map.json"

enum { CHAT_TEMPLATE_CAP_BYTES = 4 << 20 }; // enough for every template

// Contents of the three files; text NULL: there is none.
struct chat_text {
    const char *text;
    uint64_t bytes;
};
struct chat_files {
    const char *place; // for messages
    struct chat_text usual, with_tools, special_tokens;
};

struct chat; // immutable once opened: any number of threads may use it at the same time

// Copies what it needs. ERR_MODEL when there is no template, or one that cannot be used. Success: the caller owns *out.
int chat_open(struct chat **out, const struct chat_files *files, struct error *err);
void chat_close(struct chat *chat); // accepts NULL
// The template for conversations with tools, or the only one, for whoever looks what a model is told and writes; until chat_close.
const char *chat_template_text(const struct chat *chat);

// All JSON is borrowed, and untrusted: no text of it becomes a control token.
struct chat_request {
    const json_t
        *messages; // a list of objects with "role" and "content", not empty; members that are null count as missing
    const json_t *tools;     // a list of objects, or NULL
    const json_t *documents; // a list of objects, or NULL
    const json_t *options;   // an object of further variables, such as enable_thinking, or NULL
    bool add_generation_prompt;
    int64_t now_s;                        // for templates that write the date; 0: the clock's
    const struct template_limits *limits; // NULL: the defaults
};

// The text, with marks. ERR_USAGE for a conversation that the template refuses. Success: the caller clears *out.
int chat_render(struct template_output *out, const struct chat *chat, const struct chat_request *request,
                struct error *err);
// Appends the tokens of the conversation to *out.
int chat_encode(const struct chat *chat, const struct tokenizer *tokenizer, const struct chat_request *request,
                struct token_list *out, struct error *err);

#endif
