// What response_format and tools ask of the tokens, as a grammar. Worker thread.
#include "engine/serve/api_internal.h"

#include "engine/serve/chat_tools.h"
#include "engine/serve/grammar.h"

static void add_format(struct grammar *grammar, const struct api_params *params)
{
    if (params->format == FORMAT_JSON_OBJECT)
        grammar_json(grammar, true);
    else
        grammar_schema(grammar, params->schema, "response_format.json_schema.schema");
}

// Up to where the answer's message begins in its channel.
static void add_channels(struct grammar *grammar)
{
    grammar_begin(grammar);
    grammar_marker(grammar, "<|channel|>");
    grammar_text(grammar, "analysis");
    grammar_marker(grammar, "<|message|>");
    grammar_until(grammar, "<|end|>");
    grammar_marker(grammar, "<|start|>");
    grammar_text(grammar, "assistant");
    grammar_end(grammar, 0, 1, "");
    grammar_marker(grammar, "<|channel|>");
    grammar_text(grammar, "final");
    grammar_marker(grammar, "<|message|>");
}

// The model may think first.
static void add_reasoning(struct grammar *grammar, const struct api_request *request)
{
    bool begun = request->starts_in_reasoning;
    if (request->params.chat && request->model->format.tools == TOOLS_HARMONY) {
        add_channels(grammar);
        return;
    }
    if (!begun && !(request->params.chat && request->model->format.reasoning))
        return;
    grammar_begin(grammar);
    if (!begun)
        grammar_marker(grammar, "<think>");
    grammar_until(grammar, "</think>");
    grammar_blank(grammar);
    grammar_end(grammar, begun ? 1 : 0, 1, "");
}

static int add_pieces(struct grammar *grammar, const struct api_request *request, const struct chat_tools *tools,
                      struct error *err)
{
    const struct api_params *params = &request->params;
    int rc;
    add_reasoning(grammar, request);
    if (params->format == FORMAT_TEXT)
        return chat_tools_add(grammar, tools, err);
    if (!tools->tools || !chat_tools_can_force(tools->format)) {
        add_format(grammar, params);
        return 0;
    }
    struct chat_tools calls = *tools; // calls or the answer in its format
    calls.required = true;
    grammar_begin(grammar);
    add_format(grammar, params);
    grammar_or(grammar);
    rc = chat_tools_add(grammar, &calls, err);
    grammar_end(grammar, 1, 1, "");
    return rc;
}

int api_constrain(struct api_request *request, struct api_error *error)
{
    const struct api_params *params = &request->params;
    const struct chat_tools tools = {
        .format = request->model->format.tools,
        .tools = params->tools,
        .required = params->tool_choice == TOOL_CHOICE_REQUIRED,
        .only = params->tools && params->tool_choice == TOOL_CHOICE_NAMED ? params->tool_name : NULL,
        .parallel = params->parallel_tool_calls,
    };
    bool asked = tools.tools && (tools.required || tools.only), formatted = params->format != FORMAT_TEXT;
    const char *param = formatted ? "response_format" : "tools";
    struct error err = {0};
    int rc;
    if (asked && !chat_tools_can_force(tools.format))
        return api_error_set(
            error, 400, "unsupported_parameter", "tool_choice",
            "tool_choice is not supported for this model: its chat template has no form of calls that can be forced");
    if (!formatted && !(tools.tools && chat_tools_restrict(&tools)))
        return 0;
    if (!request->model->vocabulary)
        return api_error_set(error, 400, "unsupported_parameter", param, "%s is not supported for this model", param);
    if ((rc = grammar_create(&request->grammar, request->model->vocabulary, &err)) == 0 &&
        (rc = add_pieces(request->grammar, request, &tools, &err)) == 0)
        rc = grammar_compile(request->grammar, &err);
    for (int i = 0; i < request->num_sequences && !rc; i++) {
        struct api_sequence *sequence = &request->sequences[i];
        rc = grammar_state_create(&sequence->grammar, request->grammar, &err);
        sequence->filter = (struct token_filter){sequence->grammar, grammar_state_fill, grammar_state_advance};
        request->specs[i].filter = &sequence->filter;
    }
    return rc ? api_error_from(error, &err, param) : 0;
}
