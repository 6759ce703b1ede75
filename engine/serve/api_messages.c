// Of api_params.h: the members of a chat. Messages are brought into the form that chat templates expect: contents are texts, arguments of earlier
// tool calls are objects.
#include "engine/serve/api_params.h"

#include "engine/serve/chat_tools.h"
#include "formats/json_file.h"

#include <stdio.h>
#include <string.h>

// ---- messages ----------------------------------------------------------------------------------------------------

// Texts of a list of parts, one to a line.
static int join_parts(json_t *message, const json_t *parts, const char *param, struct api_error *error)
{
    struct api_text text = {0};
    int rc = 0;
    for (size_t i = 0; i < json_array_size(parts) && !rc; i++) {
        const json_t *part = json_array_get(parts, i);
        const char *type = json_string_value(json_object_get(part, "type"));
        bool refusal = type && strcmp(type, "refusal") == 0;
        const json_t *piece = json_object_get(part, refusal ? "refusal" : "text");
        if (!type)
            rc = api_error_set(error, 400, NULL, param, "%s: a part must be an object with a type", param);
        else if (!refusal && strcmp(type, "text") != 0)
            rc = api_error_set(error, 400, "unsupported_content", param,
                               "%s: parts of type \"%.40s\" are not supported: this model reads text", param, type);
        else if (!json_is_string(piece))
            rc = api_error_set(error, 400, NULL, param, "%s: a part of type \"%s\" must have its text, found %s", param,
                               type, json_file_type_name(piece));
        else {
            if (i)
                api_text_append(&text, "\n", 1);
            api_text_append(&text, json_string_value(piece), json_string_length(piece));
        }
    }
    if (!rc && (text.failed ||
                json_object_set_new(message, "content", json_stringn_nocheck(text.bytes ? text.data : "", text.bytes))))
        rc = api_error_memory(error);
    api_text_free(&text);
    return rc;
}

static int read_content(json_t *message, const char *role, size_t index, struct api_error *error)
{
    char param[64];
    const json_t *content = api_member(message, "content");
    snprintf(param, sizeof param, "messages[%zu].content", index);
    if (json_is_string(content))
        return 0;
    if (json_is_array(content))
        return join_parts(message, content, param, error);
    if (content)
        return api_error_wrong(error, param, "a string or a list of parts", content);
    if (strcmp(role, "assistant") == 0)
        return 0;
    return api_error_set(error, 400, NULL, param, "%s is missing", param);
}

// Arguments come as JSON text; templates write them with tojson and want the object. Text that is none stays text.
static int read_call(json_t *call, const char *param, struct api_error *error)
{
    json_t *function = json_object_get(call, "function");
    const json_t *arguments = api_member(function, "arguments");
    if (!json_is_object(function))
        return api_error_wrong(error, param, "a list of objects with a function", call);
    if (!json_is_string(json_object_get(function, "name")))
        return api_error_set(error, 400, NULL, param, "%s: a function must have a name", param);
    if (arguments && !json_is_string(arguments) && !json_is_object(arguments))
        return api_error_set(error, 400, NULL, param, "%s: arguments must be JSON text, found %s", param,
                             json_file_type_name(arguments));
    if (json_is_object(arguments))
        return 0;
    json_error_t ignored;
    bool no_memory = false;
    json_t *object = arguments && json_string_length(arguments)
                         ? json_file_load(json_string_value(arguments), json_string_length(arguments),
                                          JSON_REJECT_DUPLICATES, &ignored, &no_memory)
                         : json_object();
    if (no_memory || (!object && !json_is_string(arguments)))
        return api_error_memory(error);
    if (json_is_object(object))
        return json_object_set_new(function, "arguments", object) ? api_error_memory(error) : 0;
    json_decref(object);
    return 0;
}

static int read_calls(json_t *message, size_t index, struct api_error *error)
{
    char param[64];
    const json_t *calls = api_member(message, "tool_calls");
    snprintf(param, sizeof param, "messages[%zu].tool_calls", index);
    if (!calls)
        return 0;
    if (!json_is_array(calls))
        return api_error_wrong(error, param, "a list", calls);
    for (size_t i = 0; i < json_array_size(calls); i++)
        if (read_call(json_array_get(calls, i), param, error))
            return -1;
    return json_array_size(calls) == 0 && json_object_del(message, "tool_calls") ? api_error_memory(error) : 0;
}

static int read_messages(struct api_params *params, const struct api_model *model, struct api_error *error)
{
    const json_t *messages = api_member(params->body, "messages");
    char param[64];
    if (!messages)
        return api_error_set(error, 400, NULL, "messages", "messages is missing");
    if (!json_is_array(messages))
        return api_error_wrong(error, "messages", "a list", messages);
    size_t count = json_array_size(messages);
    if (count == 0 || count > API_MAX_MESSAGES)
        return api_error_set(error, 400, NULL, "messages", "messages must have from 1 to %d messages, found %zu",
                             API_MAX_MESSAGES, count);
    for (size_t i = 0; i < count; i++) {
        json_t *message = json_array_get(messages, i);
        const json_t *role = json_object_get(message, "role");
        snprintf(param, sizeof param, "messages[%zu]", i);
        if (!json_is_object(message))
            return api_error_wrong(error, param, "an object", message);
        snprintf(param, sizeof param, "messages[%zu].role", i);
        if (!json_is_string(role))
            return api_error_wrong(error, param, "a string", role);
        if (json_string_length(role) == 0)
            return api_error_set(error, 400, NULL, param, "%s must not be empty", param);
        if (read_content(message, json_string_value(role), i, error) || read_calls(message, i, error))
            return -1;
        if (!model->knows_developer && strcmp(json_string_value(role), "developer") == 0 &&
            json_object_set_new(message, "role", json_string("system")))
            return api_error_memory(error);
    }
    struct error err = {0};
    if (chat_tools_fit_ids((json_t *)messages, model->format.tools, &err))
        return api_error_from(error, &err, "messages");
    params->messages = messages;
    return 0;
}

// ---- tools -------------------------------------------------------------------------------------------------------

// Templates of many models read both without looking whether they are there.
static int fill_in(json_t *function, struct api_error *error)
{
    int rc = 0;
    if (!api_member(function, "description"))
        rc |= json_object_set_new(function, "description", json_string(""));
    if (!api_member(function, "parameters")) // no arguments, as OpenAI's API defines it
        rc |= json_object_set_new(function, "parameters", json_pack("{s:s,s:{}}", "type", "object", "properties"));
    return rc ? api_error_memory(error) : 0;
}

static int check_tool(const json_t *tool, size_t index, struct api_error *error)
{
    char param[64];
    json_t *function = json_object_get(tool, "function");
    const json_t *name = json_object_get(function, "name");
    const char *type = json_string_value(json_object_get(tool, "type"));
    const json_t *parameters = api_member(function, "parameters"), *description = api_member(function, "description");
    snprintf(param, sizeof param, "tools[%zu]", index);
    if (!type || strcmp(type, "function") != 0 || !json_is_object(function))
        return api_error_set(error, 400, NULL, param, "%s must be {\"type\": \"function\", \"function\": {...}}",
                             param);
    snprintf(param, sizeof param, "tools[%zu].function.name", index);
    if (!json_is_string(name) || json_string_length(name) == 0 || json_string_length(name) > 256)
        return api_error_set(error, 400, NULL, param, "%s must be a string of 1 to 256 bytes", param);
    snprintf(param, sizeof param, "tools[%zu].function.description", index);
    if (description && !json_is_string(description))
        return api_error_wrong(error, param, "a string", description);
    snprintf(param, sizeof param, "tools[%zu].function.parameters", index);
    if (parameters && !json_is_object(parameters))
        return api_error_wrong(error, param, "a JSON schema", parameters);
    return fill_in(function, error);
}

static bool tool_exists(const json_t *tools, const char *name)
{
    for (size_t i = 0; i < json_array_size(tools); i++)
        if (strcmp(json_string_value(json_object_get(json_object_get(json_array_get(tools, i), "function"), "name")),
                   name) == 0)
            return true;
    return false;
}

static int read_tool_choice(struct api_params *params, struct api_error *error)
{
    const json_t *choice = api_member(params->body, "tool_choice");
    const char *word = json_string_value(choice),
               *name = json_string_value(json_object_get(json_object_get(choice, "function"), "name"));
    if (!choice || (word && strcmp(word, "auto") == 0))
        return 0;
    if (word && strcmp(word, "none") == 0)
        params->tool_choice = TOOL_CHOICE_NONE;
    else if (word && strcmp(word, "required") == 0)
        params->tool_choice = TOOL_CHOICE_REQUIRED;
    else if (name)
        params->tool_choice = TOOL_CHOICE_NAMED;
    else
        return api_error_set(error, 400, NULL, "tool_choice",
                             "tool_choice must be \"none\", \"auto\", \"required\" or "
                             "{\"type\": \"function\", \"function\": {\"name\": ...}}");
    if (params->tool_choice == TOOL_CHOICE_REQUIRED && !params->tools)
        return api_error_set(error, 400, NULL, "tool_choice", "tool_choice \"required\" needs tools");
    if (name && !tool_exists(params->tools, name))
        return api_error_set(error, 400, NULL, "tool_choice", "tool_choice names \"%.200s\", which is not among tools",
                             name);
    params->tool_name = name;
    return 0;
}

static int read_tools(struct api_params *params, struct api_error *error)
{
    const json_t *tools = api_member(params->body, "tools");
    params->parallel_tool_calls = true;
    if (tools && !json_is_array(tools))
        return api_error_wrong(error, "tools", "a list", tools);
    if (json_array_size(tools) > API_MAX_TOOLS)
        return api_error_set(error, 400, NULL, "tools", "tools may have at most %d tools, found %zu", API_MAX_TOOLS,
                             json_array_size(tools));
    for (size_t i = 0; i < json_array_size(tools); i++)
        if (check_tool(json_array_get(tools, i), i, error))
            return -1;
    params->tools = json_array_size(tools) ? tools : NULL;
    if (read_tool_choice(params, error) ||
        api_params_get_bool(params->body, "parallel_tool_calls", &params->parallel_tool_calls, error))
        return -1;
    if (params->tool_choice == TOOL_CHOICE_NONE)
        params->tools = NULL; // the model is not tempted
    if (params->tools && params->format != FORMAT_TEXT && params->tool_choice != TOOL_CHOICE_AUTO)
        return api_error_set(error, 400, NULL, "response_format",
                             "response_format and a tool_choice that asks for a call exclude each other");
    return 0;
}

// ---- template options --------------------------------------------------------------------------------------------

static int read_effort(struct api_params *params, struct api_error *error)
{
    const json_t *effort = api_member(params->body, "reasoning_effort");
    if (!effort)
        return 0;
    if (!json_is_string(effort) || json_string_length(effort) == 0 || json_string_length(effort) > 32)
        return api_error_wrong(error, "reasoning_effort", "a word such as \"low\", \"medium\" or \"high\"", effort);
    bool none = strcmp(json_string_value(effort), "none") == 0;
    if (json_object_set(params->options, "reasoning_effort", (json_t *)effort) ||
        (none && json_object_set_new(params->options, "enable_thinking", json_false())))
        return api_error_memory(error);
    return 0;
}

static int read_options(struct api_params *params, struct api_error *error)
{
    const json_t *further = api_member(params->body, "chat_template_kwargs"),
                 *thinking = api_member(params->body, "enable_thinking");
    bool checked = true;
    params->add_generation_prompt = true;
    params->options = json_object();
    if (!params->options)
        return api_error_memory(error);
    if (further && !json_is_object(further))
        return api_error_wrong(error, "chat_template_kwargs", "an object", further);
    if (read_effort(params, error) || api_params_get_bool(params->body, "enable_thinking", &checked, error) ||
        api_params_get_bool(params->body, "add_generation_prompt", &params->add_generation_prompt, error))
        return -1;
    if ((thinking && json_object_set(params->options, "enable_thinking", (json_t *)thinking)) ||
        (further && json_object_update(params->options, (json_t *)further)))
        return api_error_memory(error);
    params->documents = api_member(params->body, "documents");
    if (params->documents && !json_is_array(params->documents))
        return api_error_wrong(error, "documents", "a list", params->documents);
    return 0;
}

int api_params_read_chat(struct api_params *params, const struct api_model *model, struct api_error *error)
{
    return read_messages(params, model, error) || read_tools(params, error) || read_options(params, error) ? -1 : 0;
}
