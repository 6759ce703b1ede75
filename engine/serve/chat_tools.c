#include "engine/serve/chat_tools.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// ---- texts without calls -------------------------------------------------------------------------------------------

// Any text that does not have the mark, as an expression. The mark's first byte occurs in it once, so a mark that breaks off can begin anew only
// with the byte that broke it: ([^m] | begun* broken)* begun*. Marks have no letters of expressions but brackets.
static void add_text_without(struct grammar *grammar, const char *mark)
{
    const char *first = *mark == '[' ? "\\[" : "<";
    char begun[512] = "", broken[1024] = "", expression[4096];
    size_t begun_bytes = 0, broken_bytes = 0;
    for (size_t n = 1; mark[n]; n++) {
        const char *bar = n > 1 ? "|" : "", *bracket = mark[n] == ']' ? "\\" : "";
        begun_bytes += (size_t)snprintf(begun + begun_bytes, sizeof begun - begun_bytes, "%s%s%.*s", bar, first,
                                        (int)n - 1, mark + 1);
        broken_bytes += (size_t)snprintf(broken + broken_bytes, sizeof broken - broken_bytes, "%s%s%.*s[^%s%s%c]", bar,
                                         first, (int)n - 1, mark + 1, first, bracket, mark[n]);
    }
    snprintf(expression, sizeof expression, "(?:[^%s]|(?:%s)*(?:%s))*(?:%s)*", first, begun, broken, begun);
    grammar_regex(grammar, expression, "tools");
}

// Any text that does not begin like {"name": nothing else is taken for a call of Llama's.
#define ANY "[\\s\\S]*"
static const char no_llama_call[] = "\\s*(?:[^{\\s]" ANY "|\\{\\s*(?:[^\"\\s]" ANY "|\"(?:[^n]" ANY "|n(?:[^a]" ANY
                                    "|a(?:[^m]" ANY "|m(?:[^e]" ANY "|e(?:[^\"]" ANY ")?)?)?)?)?)?)?";

static const char *mark_of(enum tool_format format) { return format == TOOLS_HERMES ? "<tool_call>" : "[TOOL_CALLS]"; }

static void add_text(struct grammar *grammar, enum tool_format format)
{
    if (format == TOOLS_LLAMA3)
        grammar_regex(grammar, no_llama_call, "tools");
    else
        add_text_without(grammar, mark_of(format));
}

// ---- calls ---------------------------------------------------------------------------------------------------------

static const json_t *function_at(const struct chat_tools *tools, size_t index)
{
    return json_object_get(json_array_get(tools->tools, index), "function");
}

static bool is_strict(const json_t *function) { return json_is_true(json_object_get(function, "strict")); }

static bool asked_for(const struct chat_tools *tools) { return tools->required || tools->only; }

bool chat_tools_can_force(enum tool_format format) { return format != TOOLS_NONE && format != TOOLS_HARMONY; }

bool chat_tools_restrict(const struct chat_tools *tools)
{
    bool strict = false;
    for (size_t i = 0; i < json_array_size(tools->tools); i++)
        strict |= is_strict(function_at(tools, i));
    return chat_tools_can_force(tools->format) && (asked_for(tools) || strict || !tools->parallel);
}

// Arguments are an object even where the schema leaves the type open.
static int add_schema(struct grammar *grammar, const json_t *schema, const char *path, struct error *err)
{
    static const char *const deciding[] = {"type", "$ref", "anyOf", "oneOf", "allOf", "enum", "const"};
    const json_t *type = json_object_get(schema, "type");
    bool open = true;
    if (type && (!json_is_string(type) || strcmp(json_string_value(type), "object") != 0))
        return error_set(err, ERR_USAGE, "%s.type must be \"object\"", path);
    for (size_t i = 0; i < sizeof deciding / sizeof *deciding; i++)
        open &= !json_object_get(schema, deciding[i]);
    json_t *object = open ? json_copy((json_t *)schema) : json_incref((json_t *)schema);
    if (!object || (open && json_object_set_new(object, "type", json_string("object")))) {
        json_decref(object);
        return error_set(err, ERR_MEMORY, "no memory for the parameters of a function");
    }
    grammar_schema(grammar, object, path);
    json_decref(object);
    return 0;
}

static int add_arguments(struct grammar *grammar, const struct chat_tools *tools, size_t index, struct error *err)
{
    const json_t *function = function_at(tools, index), *schema = json_object_get(function, "parameters");
    char path[64];
    snprintf(path, sizeof path, "tools[%zu].function.parameters", index);
    if (!asked_for(tools) && !is_strict(function))
        grammar_json(grammar, true);
    else if (json_is_object(schema))
        return add_schema(grammar, schema, path, err);
    else
        grammar_text(grammar, "{}");
    return 0;
}

static int add_object(struct grammar *grammar, const struct chat_tools *tools, size_t index, struct error *err)
{
    const json_t *name = json_object_get(function_at(tools, index), "name");
    char *quoted = json_dumps(name, JSON_ENCODE_ANY);
    if (!quoted)
        return error_set(err, ERR_MEMORY, "no memory for the name of a function");
    grammar_text(grammar, "{\"name\": ");
    grammar_text(grammar, quoted);
    grammar_text(grammar, tools->format == TOOLS_LLAMA3 ? ", \"parameters\": " : ", \"arguments\": ");
    free(quoted);
    int rc = add_arguments(grammar, tools, index, err);
    grammar_text(grammar, "}");
    return rc;
}

static int add_named(struct grammar *grammar, const struct chat_tools *tools, size_t index, struct error *err)
{
    const char *name = json_string_value(json_object_get(function_at(tools, index), "name"));
    if (name[strspn(name, OUTPUT_NAME_BYTES)])
        return error_set(
            err, ERR_USAGE,
            "tools[%zu].function.name: this model calls functions whose names have letters, digits and _ - "
            ". / : alone",
            index);
    grammar_text(grammar, name);
    grammar_marker(grammar, "[ARGS]");
    return add_arguments(grammar, tools, index, err);
}

// Any one of the functions.
static int add_call(struct grammar *grammar, const struct chat_tools *tools, struct error *err)
{
    bool first = true;
    int rc = 0;
    grammar_begin(grammar);
    for (size_t i = 0; i < json_array_size(tools->tools) && !rc; i++) {
        const char *name = json_string_value(json_object_get(function_at(tools, i), "name"));
        if (tools->only && strcmp(name, tools->only) != 0)
            continue;
        if (!first)
            grammar_or(grammar);
        first = false;
        rc =
            tools->format == TOOLS_MISTRAL_V11 ? add_named(grammar, tools, i, err) : add_object(grammar, tools, i, err);
    }
    grammar_end(grammar, 1, 1, "");
    return rc;
}

// The calls of an answer, at least one.
static int add_calls(struct grammar *grammar, const struct chat_tools *tools, struct error *err)
{
    int64_t most = tools->parallel && !tools->only ? -1 : 1;
    int rc;
    switch (tools->format) {
    case TOOLS_HERMES:
        grammar_begin(grammar);
        grammar_marker(grammar, "<tool_call>");
        grammar_text(grammar, "\n");
        rc = add_call(grammar, tools, err);
        grammar_text(grammar, "\n");
        grammar_marker(grammar, "</tool_call>");
        grammar_end(grammar, 1, most, "\n");
        return rc;
    case TOOLS_LLAMA3:
        grammar_begin(grammar);
        rc = add_call(grammar, tools, err);
        grammar_end(grammar, 1, most, "; ");
        return rc;
    case TOOLS_MISTRAL:
        grammar_marker(grammar, "[TOOL_CALLS]");
        grammar_regex(grammar, " ?", "tools");
        grammar_text(grammar, "[");
        grammar_begin(grammar);
        rc = add_call(grammar, tools, err);
        grammar_end(grammar, 1, most, ", ");
        grammar_text(grammar, "]");
        return rc;
    default:
        grammar_begin(grammar);
        grammar_marker(grammar, "[TOOL_CALLS]");
        rc = add_call(grammar, tools, err);
        grammar_end(grammar, 1, most, "");
        return rc;
    }
}

int chat_tools_add(struct grammar *grammar, const struct chat_tools *tools, struct error *err)
{
    if (asked_for(tools))
        return add_calls(grammar, tools, err);
    if (tools->format == TOOLS_LLAMA3) {
        grammar_begin(grammar);
        add_text(grammar, tools->format);
        grammar_or(grammar);
        int rc = add_calls(grammar, tools, err);
        grammar_end(grammar, 1, 1, "");
        return rc;
    }
    add_text(grammar, tools->format);
    grammar_begin(grammar);
    int rc = add_calls(grammar, tools, err);
    grammar_end(grammar, 0, 1, "");
    return rc;
}

// ---- messages ------------------------------------------------------------------------------------------------------

enum { SHORT_ID_BYTES = 9 };

static bool is_alphanumeric(char byte)
{
    return (byte >= '0' && byte <= '9') || (byte >= 'a' && byte <= 'z') || (byte >= 'A' && byte <= 'Z');
}

static int fit_id(json_t *object, const char *key, struct error *err)
{
    const json_t *id = json_object_get(object, key);
    size_t bytes = json_string_length(id), count = SHORT_ID_BYTES;
    char fitting[SHORT_ID_BYTES];
    if (!json_is_string(id))
        return 0;
    memset(fitting, '0', sizeof fitting);
    for (size_t i = bytes; i-- > 0 && count > 0;)
        if (is_alphanumeric(json_string_value(id)[i]))
            fitting[--count] = json_string_value(id)[i];
    if (json_object_set_new(object, key, json_stringn(fitting, sizeof fitting)))
        return error_set(err, ERR_MEMORY, "no memory for the id of a call");
    return 0;
}

int chat_tools_fit_ids(json_t *messages, enum tool_format format, struct error *err)
{
    size_t index, number;
    json_t *message, *call;
    int rc = 0;
    if (format != TOOLS_MISTRAL && format != TOOLS_MISTRAL_V11)
        return 0;
    json_array_foreach(messages, index, message)
    {
        json_array_foreach(json_object_get(message, "tool_calls"), number, call) rc = rc ? rc : fit_id(call, "id", err);
        if (rc || (rc = fit_id(message, "tool_call_id", err)))
            return rc;
    }
    return 0;
}
