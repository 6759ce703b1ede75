// See chat.h. What a template is given, and how messages are put right beforehand, follows apply_chat_template of transformers.
#include "formats/chat.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "formats/json_file.h"

enum { MAX_VARIABLES = 64 };

struct chat {
    struct template *usual, *with_tools; // with_tools: NULL when there is no own one
    struct json_object special_tokens;   // json NULL: none known
    char *text;
};

static int compile(struct template **out, const struct chat_text *text, const char *place, const char *name,
                   struct error *err)
{
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/%s", place, name);
    return text->text ? template_compile(out, text->text, text->bytes, path, err) : 0;
}

int chat_open(struct chat **out, const struct chat_files *files, struct error *err)
{
    struct chat *chat = calloc(1, sizeof *chat);
    const struct chat_text *tokens = &files->special_tokens;
    int rc;
    if (!chat)
        return error_set(err, ERR_MEMORY, "%s: out of memory for the chat template", files->place);
    if ((rc = compile(&chat->usual, &files->usual, files->place, CHAT_TEMPLATE_FILE, err)) ||
        (rc = compile(&chat->with_tools, &files->with_tools, files->place, CHAT_TOOL_TEMPLATE_FILE, err)))
        goto fail;
    if (!chat->usual) {
        rc = error_set(err, ERR_MODEL, "%s has no chat template (%s): the model takes plain text only", files->place,
                       CHAT_TEMPLATE_FILE);
        goto fail;
    }
    const struct chat_text *text = files->with_tools.text ? &files->with_tools : &files->usual;
    if (!(chat->text = strndup(text->text, text->bytes))) {
        rc = error_set(err, ERR_MEMORY, "%s: out of memory for the chat template", files->place);
        goto fail;
    }
    if (tokens->text && (rc = json_file_parse(&chat->special_tokens, tokens->text, tokens->bytes,
                                              CHAT_SPECIAL_TOKENS_FILE, ERR_MODEL, err)))
        goto fail;
    *out = chat;
    return 0;
fail:
    chat_close(chat);
    return rc;
}

void chat_close(struct chat *chat)
{
    if (!chat)
        return;
    template_free(chat->usual);
    template_free(chat->with_tools);
    json_file_close(&chat->special_tokens);
    free(chat->text);
    free(chat);
}

const char *chat_template_text(const struct chat *chat) { return chat->text; }

// ---- messages

static int set(json_t *object, const char *key, const json_t *value) // borrows value
{
    return json_object_set(object, key, (json_t *)value);
}

// Reasoning has had several names; templates find it under the two that they use.
static const json_t *reasoning_of(const json_t *message)
{
    static const char *const names[] = {"reasoning_content", "thinking", "reasoning"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        const json_t *value = json_object_get(message, names[i]);
        if (value && !json_is_null(value))
            return value;
    }
    return NULL;
}

// The messages without null members and with their reasoning where templates look for it.
static int prepare_messages(json_t **out, const json_t *messages, struct error *err)
{
    if (!json_is_array(messages) || json_array_size(messages) == 0)
        return error_set(err, ERR_USAGE, "messages must be a list of at least one message, found %s",
                         json_is_array(messages) ? "an empty list" : json_file_type_name(messages));
    json_t *prepared = json_array();
    int failed = !prepared;
    for (size_t i = 0; i < json_array_size(messages) && !failed; i++) {
        json_t *message = json_array_get(messages, i), *copy = json_object(), *value;
        const char *key;
        if (!json_is_object(message)) {
            json_decref(copy);
            json_decref(prepared);
            return error_set(err, ERR_USAGE, "messages[%zu] must be an object, found %s", i,
                             json_file_type_name(message));
        }
        const json_t *reasoning = reasoning_of(message);
        failed = !copy || (reasoning && set(copy, "thinking", reasoning));
        json_object_foreach(message, key, value) if (!json_is_null(value)) failed |= set(copy, key, value);
        if (reasoning)
            failed |= set(copy, "reasoning_content", reasoning);
        failed |= json_array_append_new(prepared, copy);
    }
    if (failed) {
        json_decref(prepared);
        return error_set(err, ERR_MEMORY, "out of memory for the messages");
    }
    *out = prepared;
    return 0;
}

static int check_list(const json_t *list, const char *name, struct error *err)
{
    if (list && !json_is_null(list) && !json_is_array(list))
        return error_set(err, ERR_USAGE, "%s must be a list, found %s", name, json_file_type_name(list));
    for (size_t i = 0; i < json_array_size(list); i++)
        if (!json_is_object(json_array_get(list, i)))
            return error_set(err, ERR_USAGE, "%s[%zu] must be an object, found %s", name, i,
                             json_file_type_name(json_array_get(list, i)));
    return 0;
}

// ---- rendering

struct variables {
    struct template_variable list[MAX_VARIABLES];
    size_t count;
};

static int add_all(struct variables *variables, const json_t *object, enum template_origin origin, struct error *err)
{
    json_t *members = (json_t *)object, *value; // iterating takes no const
    const char *key;
    json_object_foreach(members, key, value)
    {
        if (variables->count == MAX_VARIABLES)
            return error_set(err, ERR_USAGE, "a chat template takes at most %d variables", MAX_VARIABLES);
        variables->list[variables->count++] = (struct template_variable){key, value, origin};
    }
    return 0;
}

int chat_render(struct template_output *out, const struct chat *chat, const struct chat_request *request,
                struct error *err)
{
    struct variables variables = {.count = 0};
    json_t *messages = NULL;
    const json_t *null = json_null();
    const json_t *tools = request->tools ? request->tools : null,
                 *documents = request->documents ? request->documents : null;
    int rc;
    if (request->options && !json_is_null(request->options) && !json_is_object(request->options))
        return error_set(err, ERR_USAGE, "the template's options must be an object, found %s",
                         json_file_type_name(request->options));
    if ((rc = check_list(tools, "tools", err)) || (rc = check_list(documents, "documents", err)) ||
        (rc = add_all(&variables, chat->special_tokens.json, TEMPLATE_TRUSTED, err)) ||
        (rc = add_all(&variables, request->options, TEMPLATE_FROM_USER, err)) ||
        (rc = prepare_messages(&messages, request->messages, err)))
        return rc;
    const struct template_variable own[] = {
        {"messages", messages, TEMPLATE_MESSAGES},
        {"tools", tools, TEMPLATE_FROM_USER},
        {"documents", documents, TEMPLATE_FROM_USER},
        {"add_generation_prompt", json_boolean(request->add_generation_prompt), TEMPLATE_TRUSTED},
    };
    struct template_variable all[MAX_VARIABLES + 4];
    memcpy(all, variables.list, variables.count * sizeof *all);
    memcpy(all + variables.count, own, sizeof own);
    const struct template *tmpl = chat->with_tools && !json_is_null(tools) ? chat->with_tools : chat->usual;
    rc = template_render(out, tmpl, all, variables.count + 4, request->limits,
                         request->now_s ? request->now_s : (int64_t)time(NULL), err);
    json_decref(messages);
    return rc;
}

int chat_encode(const struct chat *chat, const struct tokenizer *tokenizer, const struct chat_request *request,
                struct token_list *out, struct error *err)
{
    struct template_output rendered;
    int rc = chat_render(&rendered, chat, request, err);
    if (rc)
        return rc;
    rc = tokenizer_encode_marked(tokenizer, rendered.text, rendered.bytes, rendered.segments, rendered.num_segments, 0,
                                 out, err);
    template_output_clear(&rendered);
    return rc;
}
