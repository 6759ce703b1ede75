// From a body to sequences: prompts rendered and tokenized, one group of sequences for each, handed to the engine. Worker thread.
#include "engine/serve/api_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

// ---- prompts -----------------------------------------------------------------------------------------------------

static bool ends_in_thinking(const struct template_output *text)
{
    static const char mark[] = "<think>";
    size_t end = text->bytes;
    while (end > 0 && (text->text[end - 1] == '\n' || text->text[end - 1] == ' '))
        end--;
    return end >= sizeof mark - 1 && memcmp(text->text + end - (sizeof mark - 1), mark, sizeof mark - 1) == 0;
}

// What a template says of a chat. Where its file lies is not the client's business.
static int template_error(struct error *err, struct api_error *error)
{
    const char *place = strstr(err->msg, ", line "), *name = place;
    while (name && name > err->msg && name[-1] != '/')
        name--;
    if (name)
        memmove(err->msg, name, strlen(name) + 1);
    return api_error_from(error, err, "messages");
}

int api_render_chat(const struct api_model *model, const struct api_params *params, struct template_output *out,
                    struct api_error *error)
{
    static const struct template_limits limits = {.memory_bytes = 64 << 20, .output_bytes = 16 << 20};
    const struct chat_request chat = {.messages = params->messages,
                                      .tools = params->tools,
                                      .documents = params->documents,
                                      .options = params->options,
                                      .add_generation_prompt = params->add_generation_prompt,
                                      .limits = &limits};
    struct error err = {0};
    if (!model->chat)
        return api_error_set(error, 400, "no_chat_template", "messages",
                             "the model has no chat template; use /v1/completions");
    return chat_render(out, model->chat, &chat, &err) ? template_error(&err, error) : 0;
}

int api_encode_chat(const struct api_model *model, const struct api_params *params, struct token_list *out,
                    bool *in_reasoning, struct api_error *error)
{
    struct template_output text = {0};
    struct error err = {0};
    if (api_render_chat(model, params, &text, error))
        return -1;
    *in_reasoning = ends_in_thinking(&text);
    int rc = tokenizer_encode_marked(model->tokenizer, text.text, text.bytes, text.segments, text.num_segments, 0, out,
                                     &err);
    template_output_clear(&text);
    return rc ? api_error_from(error, &err, "messages") : 0;
}

static int encode_text(struct api_request *request, const json_t *text, struct token_list *out, struct api_error *error)
{
    struct error err = {0};
    unsigned flags = request->params.add_special_tokens ? TOKENIZER_ADD_SPECIAL : 0;
    int rc = tokenizer_encode(request->model->tokenizer, json_string_value(text), json_string_length(text), flags, out,
                              &err);
    return rc ? api_error_from(error, &err, "prompt") : 0;
}

static int encode_prompt(struct api_request *request, const json_t *prompt, struct token_list *out,
                         struct api_error *error)
{
    if (json_is_string(prompt))
        return encode_text(request, prompt, out, error);
    if (json_is_array(prompt))
        return api_params_read_ids(prompt, "prompt", request->model->desc->vocab_size, out, error);
    return api_error_set(error, 400, NULL, "prompt",
                         "prompt must be a string, a list of token ids, or a list of either");
}

static int check_length(const struct api_request *request, const struct token_list *prompt, struct api_error *error)
{
    const char *param = request->params.chat ? "messages" : "prompt";
    if (prompt->count == 0)
        return api_error_set(error, 400, NULL, param, "the prompt has no tokens; give some text");
    if ((int64_t)prompt->count >= request->model->context)
        return api_error_set(error, 400, "context_length_exceeded", param,
                             "the prompt has %zu tokens; with the answer there may be %lld", prompt->count,
                             (long long)request->model->context);
    return 0;
}

static int encode_prompts(struct api_request *request, struct api_error *error)
{
    const struct api_params *params = &request->params;
    bool one = params->chat || json_is_string(params->prompt) || json_is_integer(json_array_get(params->prompt, 0));
    for (int i = 0; i < request->num_groups; i++) {
        struct token_list *out = &request->groups[i].prompt;
        const json_t *prompt = one ? params->prompt : json_array_get(params->prompt, (size_t)i);
        if ((params->chat ? api_encode_chat(request->model, params, out, &request->starts_in_reasoning, error)
                          : encode_prompt(request, prompt, out, error)) ||
            check_length(request, out, error))
            return -1;
        request->prompt_tokens += (int64_t)out->count;
    }
    return 0;
}

// ---- sequences ---------------------------------------------------------------------------------------------------

// Prefixes are shared within a key and a salt.
static uint64_t salt_of(const struct api_request *request)
{
    const char *salt = request->params.cache_salt;
    uint64_t tenant = request->salted ? request->tenant : 0;
    return XXH3_64bits_withSeed(salt, strlen(salt), request->api->secret ^ (tenant * 0x9E3779B97F4A7C15u));
}

static int64_t default_max_tokens(const struct api_request *request)
{
    if (!request->params.chat)
        return 16; // OpenAI's
    int64_t set = request->api->options.default_max_tokens;
    return set > 0 ? set : INT32_MAX; // the scheduler cuts it to what the context leaves
}

static void fill_spec(struct api_request *request, int index, const struct api_group *group, uint64_t salt)
{
    const struct api_params *params = &request->params;
    const struct api_model *model = request->model;
    struct sequence_spec *spec = &request->specs[index];
    int64_t room = model->context - (int64_t)group->prompt.count;
    int64_t max_tokens = params->max_tokens ? params->max_tokens : default_max_tokens(request);
    if (max_tokens < params->min_tokens) // the default is
        max_tokens = params->min_tokens;
    *spec = (struct sequence_spec){
        .prompt = group->prompt.ids,
        .prompt_count = (int64_t)group->prompt.count,
        .max_tokens = max_tokens < room ? max_tokens : room,
        .min_tokens = params->min_tokens,
        .ignore_eos = params->ignore_eos,
        .eos_ids = model->eos_ids,
        .num_eos = model->num_eos,
        .stop_ids = params->stop_ids,
        .num_stop_ids = params->num_stop_ids,
        .sampling = params->sampling,
        .edits = params->edits,
        .num_edits = params->num_edits,
        .num_logprobs = params->num_logprobs,
        .tenant = request->tenant,
        .salt = salt,
    };
    spec->sampling.seed += (uint64_t)(index - group->first); // choices of one prompt differ
}

// The parser decides by control tokens that texts leave out otherwise.
static int create_parser(struct api_request *request, struct api_choice *choice, struct error *err)
{
    const struct output_format *format = &request->model->format;
    bool tools = request->params.tools && format->tools != TOOLS_NONE;
    if (!request->params.chat || (!tools && !format->reasoning))
        return 0;
    request->params.rules.kept = request->model->kept;
    request->params.rules.num_kept = request->model->num_kept;
    return output_parser_create(&choice->parser, *format, tools, request->starts_in_reasoning, api_choice_delta, choice,
                                err);
}

static int create_sequence(struct api_request *request, int index, int group, struct error *err)
{
    struct api_sequence *sequence = &request->sequences[index];
    struct api_choice *choice = &sequence->choice;
    int rc;
    sequence->request = request;
    sequence->index = index;
    sequence->group = group;
    choice->sequence = sequence;
    choice->delta_type = -1;
    if ((rc = create_parser(request, choice, err)) ||
        (rc = text_stream_create(&choice->text, &request->params.rules, err)))
        return rc;
    if (request->params.num_logprobs < 0)
        return 0;
    return tokenizer_stream_new(&choice->token_bytes, request->model->tokenizer, false, err);
}

// Tokens must have a text of their own, each for itself.
static int check_logprobs(const struct api_request *request, struct api_error *error)
{
    struct tokenizer_stream *stream = request->sequences[0].choice.token_bytes;
    const char *bytes;
    size_t count;
    struct error err = {0};
    if (!stream || tokenizer_stream_token_bytes(stream, 0, &bytes, &count, &err) != ERR_MODEL)
        return 0;
    return api_error_set(error, 400, "unsupported_parameter", "logprobs",
                         "logprobs are not supported for this model: %s", err.msg);
}

static int create_sequences(struct api_request *request, struct api_error *error)
{
    int n = request->params.n, count = request->num_groups * n;
    struct error err = {0};
    uint64_t salt = salt_of(request);
    request->sequences = calloc((size_t)count, sizeof *request->sequences);
    request->specs = calloc((size_t)count, sizeof *request->specs);
    if (!request->sequences || !request->specs)
        return api_error_memory(error);
    request->num_sequences = count;
    for (int i = 0; i < count; i++) {
        struct api_group *group = &request->groups[i / n];
        group->first = i / n * n;
        group->count = n;
        fill_spec(request, i, group, salt);
        if (create_sequence(request, i, i / n, &err))
            return api_error_from(error, &err, NULL);
    }
    return check_logprobs(request, error);
}

// ---- the whole ---------------------------------------------------------------------------------------------------

static void drop_json(struct api_request *request)
{
    struct api_params *params = &request->params;
    json_decref(params->body);
    json_decref(params->options);
    params->body = params->options = NULL;
    params->messages = params->tools = params->documents = params->prompt = params->schema = NULL;
    params->tool_name = params->cache_salt = "";
    free(request->body);
    request->body = NULL;
}

static int prepare(struct api_request *request, bool chat, struct api_error *error)
{
    const struct api_options *options = &request->api->options;
    char hex[33];
    if (api_params_read(&request->params, request->body, request->body_bytes, chat, request->model,
                        options->model_names, options->num_model_names, error))
        return -1;
    request->groups = calloc((size_t)request->params.num_prompts, sizeof *request->groups);
    if (!request->groups)
        return api_error_memory(error);
    request->num_groups = request->params.num_prompts;
    api_random_hex(hex, 32);
    snprintf(request->completion_id, sizeof request->completion_id, chat ? "chatcmpl-%s" : "cmpl-%s", hex);
    request->created = (int64_t)time(NULL);
    if (encode_prompts(request, error) || create_sequences(request, error) || api_constrain(request, error))
        return -1;
    drop_json(request);
    return 0;
}

static void generate(struct api_request *request, bool chat)
{
    struct api_error error = {0};
    if (api_request_cancelled(request) || prepare(request, chat, &error) || api_request_cancelled(request) ||
        api_request_submit(request, &error)) {
        drop_json(request); // here: a large tree takes long, and the last owner may be the I/O thread
        api_request_fail(request, &error);
    }
}

void api_chat_completions(struct api_request *request) { generate(request, true); }
void api_completions(struct api_request *request) { generate(request, false); }

// SageMaker has one path for everything.
void api_invocations(struct api_request *request)
{
    struct api_error error = {0};
    json_t *body = NULL;
    bool chat = api_params_parse(&body, request->body, request->body_bytes, &error) == 0 &&
                json_object_get(body, "messages") != NULL;
    json_decref(body);
    if (error.status)
        api_request_fail(request, &error);
    else
        generate(request, chat);
}
