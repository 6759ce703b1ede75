// Bodies of requests: JSON into checked parameters, or an error that names the member. Runs on worker threads.
// Members that are null count as missing, unknown ones are ignored, and what would change the answer but is not supported is refused.
#ifndef TPSHARD_ENGINE_SERVE_API_PARAMS_H
#define TPSHARD_ENGINE_SERVE_API_PARAMS_H

#include "engine/serve/api.h"
#include "engine/serve/api_error.h"
#include "engine/serve/text_stream.h"

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

enum {
    API_MAX_N = 16,
    API_MAX_STOP_IDS = 256,
    API_MAX_TOOLS = 256,
    API_MAX_MESSAGES = 65536,
    API_SALT_BYTES = 1024,
};

enum api_format { FORMAT_TEXT, FORMAT_JSON_OBJECT, FORMAT_JSON_SCHEMA };
enum api_tool_choice { TOOL_CHOICE_AUTO, TOOL_CHOICE_NONE, TOOL_CHOICE_REQUIRED, TOOL_CHOICE_NAMED };

// All JSON is borrowed from body.
struct api_params {
    json_t *body;           // owned
    const char *model_name; // the served one that was asked for
    bool chat;
    bool stream, include_usage, continuous_usage;
    int n;
    int64_t max_tokens; // 0: not given
    int64_t min_tokens;
    bool ignore_eos;
    struct sampling sampling;
    int num_logprobs;        // -1: none
    struct text_rules rules; // stops are owned; kept is left empty
    uint32_t *stop_ids;      // owned
    int64_t num_stop_ids;
    struct logit_edit *edits; // owned
    int64_t num_edits;
    const char *cache_salt; // "": none
    enum api_format format;
    const json_t *schema; // FORMAT_JSON_SCHEMA: an object or a boolean
    // chat
    const json_t *messages;
    const json_t *tools; // NULL: none offered
    enum api_tool_choice tool_choice;
    const char *tool_name; // TOOL_CHOICE_NAMED
    bool parallel_tool_calls;
    const json_t *documents;
    json_t *options; // owned: what a template is given besides
    bool add_generation_prompt;
    // completions
    const json_t *prompt;
    int num_prompts;
    bool add_special_tokens;
};

// Of POST /v1/chat/completions (chat) and /v1/completions. names: the served models. 0, or -1 with *error; params are cleared by the caller
// either way (start from {0}).
int api_params_read(struct api_params *params, const char *body, size_t bytes, bool chat, const struct api_model *model,
                    const char *const *names, int num_names, struct api_error *error);
void api_params_clear(struct api_params *params);

// Parts that other routes use as well.
int api_params_parse(json_t **out, const char *body, size_t bytes, struct api_error *error); // an object
// messages, tools, tool_choice, template options of a chat.
int api_params_read_chat(struct api_params *params, const struct api_model *model, struct api_error *error);
int api_params_get_bool(const json_t *body, const char *key, bool *value, struct api_error *error);
// Token ids [count] of a JSON list. Appends to *out.
int api_params_read_ids(const json_t *list, const char *param, int64_t vocab_size, struct token_list *out,
                        struct api_error *error);

#endif
