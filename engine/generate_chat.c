// See generate_chat.h.
#include "engine/generate_chat.h"

#include "engine/commands.h"
#include "formats/json_file.h"
#include "formats/tokenizer_text.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int generate_chat_add(json_t *messages, const char *role, const char *text, size_t bytes, struct error *err)
{
    if (tokenizer_text_valid_prefix(text, bytes) != bytes)
        return error_set(err, ERR_USAGE, "the %s message must be valid UTF-8", role);
    json_t *content = json_stringn(text, bytes);
    if (!content || json_array_append_new(messages, json_pack("{s:s, s:o}", "role", role, "content", content)))
        return error_set(err, ERR_MEMORY, "no memory for a message");
    return 0;
}

int generate_chat_begin(json_t **out, const char *system, struct error *err)
{
    json_t *messages = json_array();
    int rc = messages ? 0 : error_set(err, ERR_MEMORY, "no memory for the conversation");
    if (!rc && system)
        rc = generate_chat_add(messages, "system", system, strlen(system), err);
    if (rc)
        json_decref(messages);
    else
        *out = messages;
    return rc;
}

int generate_chat_read(json_t **out, const char *path, struct error *err)
{
    char *text;
    size_t bytes;
    json_error_t reason;
    int rc = read_text(path, &text, &bytes, err);
    if (rc)
        return rc;
    bool no_memory;
    json_t *messages = json_file_load(text, bytes, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &reason, &no_memory);
    free(text);
    if (no_memory)
        return error_set(err, ERR_MEMORY, "%s: out of memory", path);
    if (!messages)
        return error_set(err, ERR_USAGE, "%s: invalid JSON in line %d: %s", path, reason.line, reason.text);
    if (!json_is_array(messages)) {
        rc = error_set(err, ERR_USAGE, "%s: messages must be a list, found %s", path, json_file_type_name(messages));
        json_decref(messages);
        return rc;
    }
    *out = messages;
    return 0;
}

int generate_chat_line(char **line, size_t *bytes, struct error *err)
{
    size_t capacity = 0;
    ssize_t length;
    free(*line);
    *line = NULL;
    do {
        if (isatty(STDIN_FILENO)) {
            fputs("> ", stderr);
            fflush(stderr);
        }
        length = getline(line, &capacity, stdin);
        while (length > 0 && ((*line)[length - 1] == '\n' || (*line)[length - 1] == '\r'))
            length--;
    } while (length >= 0 && strspn(*line, " \t\r\n") >= (size_t)length);
    if (length < 0) {
        free(*line);
        *line = NULL;
        return ferror(stdin) ? error_set_errno(err, "standard input could not be read") : 0;
    }
    *bytes = (size_t)length;
    return 0;
}

int generate_chat_encode(const struct chat *chat, const struct tokenizer *tokenizer, const json_t *messages,
                         struct token_list *out, struct error *err)
{
    const struct chat_request request = {.messages = messages, .add_generation_prompt = true};
    return chat_encode(chat, tokenizer, &request, out, err);
}

int generate_chat_prompt(const struct chat *chat, const struct tokenizer *tokenizer, const char *system,
                         const char *prompt, size_t bytes, struct token_list *out, struct error *err)
{
    json_t *messages = NULL;
    int rc = generate_chat_begin(&messages, system, err);
    if (rc == 0)
        rc = generate_chat_add(messages, "user", prompt, bytes, err);
    if (rc == 0)
        rc = generate_chat_encode(chat, tokenizer, messages, out, err);
    json_decref(messages);
    return rc;
}
