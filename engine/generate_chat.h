// Conversations of `tpengine generate --chat`: messages from the command line, a file or line by line.
#ifndef TPSHARD_ENGINE_GENERATE_CHAT_H
#define TPSHARD_ENGINE_GENERATE_CHAT_H

#include "formats/chat.h"

#include <jansson.h>

// A new list of messages, with the system message if there is one (may be NULL). Success: the caller owns *out.
int generate_chat_begin(json_t **out, const char *system, struct error *err);
// ERR_USAGE for text that is not valid UTF-8.
int generate_chat_add(json_t *messages, const char *role, const char *text, size_t bytes, struct error *err);
// The list of messages in a file, "-" for standard input. Success: the caller owns *out.
int generate_chat_read(json_t **out, const char *path, struct error *err);
// The next line of standard input that is not blank, without its newline, into *line (realloc'ed); at the end *line becomes NULL.
// Asks with "> " on a terminal.
int generate_chat_line(char **line, size_t *bytes, struct error *err);

// Appends the tokens of a conversation, up to where the model answers.
int generate_chat_encode(const struct chat *chat, const struct tokenizer *tokenizer, const json_t *messages,
                         struct token_list *out, struct error *err);
// The same for a conversation of one user message.
int generate_chat_prompt(const struct chat *chat, const struct tokenizer *tokenizer, const char *system,
                         const char *prompt, size_t bytes, struct token_list *out, struct error *err);

#endif
