// See api_params.h. Of a chat's own members: api_messages.c.
#include "engine/serve/api_params.h"

#include "formats/json_file.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

// A member that is there and not null.
int api_params_get_bool(const json_t *body, const char *key, bool *value, struct api_error *error)
{
    const json_t *found = api_member(body, key);
    if (!found)
        return 0;
    if (!json_is_boolean(found))
        return api_error_wrong(error, key, "true or false", found);
    *value = json_is_true(found);
    return 0;
}

static int get_int(const json_t *body, const char *key, int64_t min, int64_t max, int64_t *value,
                   struct api_error *error)
{
    const json_t *found = api_member(body, key);
    if (!found)
        return 0;
    if (!json_is_integer(found))
        return api_error_wrong(error, key, "an integer", found);
    if (json_integer_value(found) < min || json_integer_value(found) > max)
        return api_error_set(error, 400, NULL, key, "%s must be from %lld to %lld, found %lld", key, (long long)min,
                             (long long)max, (long long)json_integer_value(found));
    *value = json_integer_value(found);
    return 0;
}

static int get_number(const json_t *body, const char *key, double min, double max, double *value,
                      struct api_error *error)
{
    const json_t *found = api_member(body, key);
    if (!found)
        return 0;
    if (!json_is_number(found))
        return api_error_wrong(error, key, "a number", found);
    double number = json_number_value(found);
    if (!(number >= min && number <= max))
        return api_error_set(error, 400, NULL, key, "%s must be from %g to %g, found %g", key, min, max, number);
    *value = number;
    return 0;
}

static double otherwise(double value, double otherwise_value)
{
    return isnan(value) || value < 0 ? otherwise_value : value;
}

static int read_sampling(struct api_params *params, const struct model_desc *desc, struct api_error *error)
{
    struct sampling *sampling = &params->sampling;
    int64_t seed;
    *sampling = (struct sampling){
        .temperature = otherwise(desc->default_temperature, 1),
        .top_p = otherwise(desc->default_top_p, 1),
        .top_k = desc->default_top_k > 0 ? desc->default_top_k : 0,
        .repetition_penalty = otherwise(desc->default_repetition_penalty, 1),
    };
    const struct {
        const char *key;
        double min, max, *value;
    } numbers[] = {
        {"temperature", 0, 2, &sampling->temperature},
        {"top_p", 1e-9, 1, &sampling->top_p},
        {"min_p", 0, 1, &sampling->min_p},
        {"repetition_penalty", 0.01, 100, &sampling->repetition_penalty},
        {"frequency_penalty", -2, 2, &sampling->frequency_penalty},
        {"presence_penalty", -2, 2, &sampling->presence_penalty},
    };
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        if (get_number(params->body, numbers[i].key, numbers[i].min, numbers[i].max, numbers[i].value, error))
            return -1;
    if (get_int(params->body, "top_k", -1, INT32_MAX, &sampling->top_k, error))
        return -1;
    if (sampling->top_k < 0)
        sampling->top_k = 0;
    if (getrandom(&seed, sizeof seed, GRND_NONBLOCK) != (ssize_t)sizeof seed)
        return api_error_memory(error); // the system's generator is not ready
    if (get_int(params->body, "seed", INT64_MIN, INT64_MAX, &seed, error))
        return -1;
    sampling->seed = (uint64_t)seed;
    return 0;
}

// ---- stops and biases --------------------------------------------------------------------------------------------

static int add_stop(struct api_params *params, const json_t *text, struct api_error *error)
{
    size_t bytes = json_string_length(text);
    if (!json_is_string(text))
        return api_error_wrong(error, "stop", "a string or a list of strings", text);
    if (bytes == 0 || bytes > STOP_STRING_BYTES)
        return api_error_set(error, 400, NULL, "stop", "a stop string must have from 1 to %d bytes, found %zu",
                             STOP_STRING_BYTES, bytes);
    return stop_strings_add(&params->rules.stops, json_string_value(text), bytes) ? 0 : api_error_memory(error);
}

static int read_stops(struct api_params *params, struct api_error *error)
{
    const json_t *stop = api_member(params->body, "stop");
    if (!stop)
        return 0;
    if (!json_is_array(stop))
        return add_stop(params, stop, error);
    if (json_array_size(stop) > STOP_STRINGS_MAX)
        return api_error_set(error, 400, NULL, "stop", "stop may have at most %d strings, found %zu", STOP_STRINGS_MAX,
                             json_array_size(stop));
    for (size_t i = 0; i < json_array_size(stop); i++)
        if (add_stop(params, json_array_get(stop, i), error))
            return -1;
    return 0;
}

int api_params_read_ids(const json_t *list, const char *param, int64_t vocab_size, struct token_list *out,
                        struct api_error *error)
{
    size_t count = json_array_size(list);
    if (out->count + count > out->capacity) {
        uint32_t *ids = realloc(out->ids, (out->count + count) * sizeof *ids);
        if (!ids)
            return api_error_memory(error);
        out->ids = ids;
        out->capacity = out->count + count;
    }
    for (size_t i = 0; i < count; i++) {
        const json_t *id = json_array_get(list, i);
        if (!json_is_integer(id))
            return api_error_wrong(error, param, "a list of token ids", id);
        if (json_integer_value(id) < 0 || json_integer_value(id) >= vocab_size)
            return api_error_set(error, 400, NULL, param, "%s: token id %lld is not from 0 to %lld", param,
                                 (long long)json_integer_value(id), (long long)vocab_size - 1);
        out->ids[out->count++] = (uint32_t)json_integer_value(id);
    }
    return 0;
}

static int read_stop_ids(struct api_params *params, int64_t vocab_size, struct api_error *error)
{
    struct token_list ids = {0};
    const json_t *list = api_member(params->body, "stop_token_ids");
    if (!list)
        return 0;
    if (!json_is_array(list))
        return api_error_wrong(error, "stop_token_ids", "a list of token ids", list);
    if (json_array_size(list) > API_MAX_STOP_IDS)
        return api_error_set(error, 400, NULL, "stop_token_ids", "stop_token_ids may have at most %d ids, found %zu",
                             API_MAX_STOP_IDS, json_array_size(list));
    int rc = api_params_read_ids(list, "stop_token_ids", vocab_size, &ids, error);
    params->stop_ids = ids.ids;
    params->num_stop_ids = (int64_t)ids.count;
    return rc;
}

// A whole decimal number without sign or leading zeros.
static bool read_id(const char *text, int64_t vocab_size, uint32_t *id)
{
    char *end;
    if (*text < '0' || *text > '9' || (*text == '0' && text[1]))
        return false;
    errno = 0;
    unsigned long long value = strtoull(text, &end, 10);
    if (errno || *end || value >= (unsigned long long)vocab_size)
        return false;
    *id = (uint32_t)value;
    return true;
}

static int read_bias(struct api_params *params, int64_t vocab_size, struct api_error *error)
{
    json_t *bias = (json_t *)api_member(params->body, "logit_bias"), *value;
    const char *key;
    if (!bias)
        return 0;
    if (!json_is_object(bias))
        return api_error_wrong(error, "logit_bias", "an object of token ids and numbers", bias);
    size_t count = json_object_size(bias);
    if (count > STEP_MAX_EDITS)
        return api_error_set(error, 400, NULL, "logit_bias", "logit_bias may have at most %d tokens, found %zu",
                             STEP_MAX_EDITS, count);
    params->edits = calloc(count + 1, sizeof *params->edits);
    if (!params->edits)
        return api_error_memory(error);
    json_object_foreach(bias, key, value)
    {
        struct logit_edit *edit = &params->edits[params->num_edits];
        if (!read_id(key, vocab_size, &edit->token))
            return api_error_set(error, 400, NULL, "logit_bias",
                                 "logit_bias: \"%.40s\" is not a token id from 0 to %lld", key,
                                 (long long)vocab_size - 1);
        if (!json_is_number(value) || !(fabs(json_number_value(value)) <= 100))
            return api_error_set(error, 400, NULL, "logit_bias",
                                 "logit_bias: the bias of token %u must be a number from -100 to 100", edit->token);
        edit->add = (float)json_number_value(value);
        params->num_edits++;
    }
    return 0;
}

// While the text may not end, tokens that would end it take places of biases.
static int check_edits(const struct api_params *params, const struct api_model *model, struct api_error *error)
{
    int64_t ends = params->min_tokens > 0 ? params->num_stop_ids + (params->ignore_eos ? 0 : model->num_eos) : 0;
    if (params->num_edits + ends <= STEP_MAX_EDITS)
        return 0;
    return api_error_set(
        error, 400, NULL, "logit_bias",
        "logit_bias has %lld tokens; with min_tokens and %lld tokens that end the text it may have %lld",
        (long long)params->num_edits, (long long)ends, (long long)(STEP_MAX_EDITS - ends));
}

// ---- what comes back ---------------------------------------------------------------------------------------------

static int read_logprobs(struct api_params *params, struct api_error *error)
{
    int64_t number = -1;
    bool wanted = false;
    params->num_logprobs = -1;
    if (params->chat) {
        if (api_params_get_bool(params->body, "logprobs", &wanted, error) ||
            get_int(params->body, "top_logprobs", 0, STEP_MAX_LOGPROBS, &number, error))
            return -1;
        if (number > 0 && !wanted)
            return api_error_set(error, 400, NULL, "top_logprobs", "top_logprobs needs \"logprobs\": true");
        params->num_logprobs = !wanted ? -1 : number < 0 ? 0 : (int)number;
        return 0;
    }
    if (get_int(params->body, "logprobs", 0, STEP_MAX_LOGPROBS, &number, error))
        return -1;
    params->num_logprobs = (int)number;
    return 0;
}

static int read_stream(struct api_params *params, struct api_error *error)
{
    const json_t *options = api_member(params->body, "stream_options");
    if (api_params_get_bool(params->body, "stream", &params->stream, error))
        return -1;
    if (!options)
        return 0;
    if (!json_is_object(options))
        return api_error_wrong(error, "stream_options", "an object", options);
    if (!params->stream)
        return api_error_set(error, 400, NULL, "stream_options", "stream_options needs \"stream\": true");
    return api_params_get_bool(options, "include_usage", &params->include_usage, error) ||
                   api_params_get_bool(options, "continuous_usage_stats", &params->continuous_usage, error)
               ? -1
               : 0;
}

static int read_format(struct api_params *params, struct api_error *error)
{
    const json_t *format = api_member(params->body, "response_format");
    const char *param = "response_format", *type;
    if (!format)
        return 0;
    if (!json_is_object(format))
        return api_error_wrong(error, param, "an object", format);
    type = json_string_value(json_object_get(format, "type"));
    if (!type)
        return api_error_wrong(error, "response_format.type", "a string", json_object_get(format, "type"));
    if (strcmp(type, "text") == 0)
        return 0;
    if (strcmp(type, "json_object") == 0) {
        params->format = FORMAT_JSON_OBJECT;
        return 0;
    }
    if (strcmp(type, "json_schema") != 0)
        return api_error_set(
            error, 400, NULL, "response_format.type",
            "response_format.type must be \"text\", \"json_object\" or \"json_schema\", found \"%.40s\"", type);
    params->format = FORMAT_JSON_SCHEMA;
    format = json_object_get(format, "json_schema");
    if (!json_is_object(format))
        return api_error_wrong(error, "response_format.json_schema", "an object with a schema", format);
    params->schema = json_object_get(format, "schema");
    if (!json_is_object(params->schema) && !json_is_boolean(params->schema))
        return api_error_wrong(error, "response_format.json_schema.schema", "a JSON schema", params->schema);
    return 0;
}

// ---- what is not supported ---------------------------------------------------------------------------------------

static bool says_nothing(const json_t *value)
{
    return json_is_false(value) || (json_is_string(value) && json_string_length(value) == 0) ||
           (json_is_array(value) && json_array_size(value) == 0);
}

static int refuse_unsupported(const struct api_params *params, struct api_error *error)
{
    static const struct {
        const char *key, *instead;
    } refused[] = {
        {"echo", "the prompt is not repeated in the answer"},
        {"suffix", "models here continue a text, they do not fill it in"},
        {"prompt_logprobs", "ask for the logprobs of the answer"},
        {"use_beam_search", "ask for several choices with n"},
        {"functions", "use tools"},
        {"function_call", "use tool_choice"},
        {"guided_json", "use response_format with a json_schema"},
        {"guided_regex", "use response_format with a json_schema"},
        {"guided_choice", "use response_format with a json_schema and an enum"},
        {"guided_grammar", "use response_format with a json_schema"},
        {"structured_outputs", "use response_format with a json_schema"},
        {"grammar", "use response_format with a json_schema"},
        {"logits_processors", "use logit_bias"},
        {"continue_final_message", "end the prompt of /v1/completions with the text to continue"},
        {"audio", "this model writes text"},
    };
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++) {
        const json_t *value = api_member(params->body, refused[i].key);
        if (value && !says_nothing(value))
            return api_error_set(error, 400, "unsupported_parameter", refused[i].key, "%s is not supported: %s",
                                 refused[i].key, refused[i].instead);
    }
    const json_t *best_of = api_member(params->body, "best_of");
    if (best_of && (!json_is_integer(best_of) || json_integer_value(best_of) > params->n))
        return api_error_set(error, 400, "unsupported_parameter", "best_of",
                             "best_of above n is not supported: ask for n choices");
    return 0;
}

// ---- the whole ---------------------------------------------------------------------------------------------------

int api_params_parse(json_t **out, const char *body, size_t bytes, struct api_error *error)
{
    json_error_t reason;
    bool no_memory;
    if (bytes == 0)
        return api_error_set(error, 400, NULL, NULL, "the body is empty; send a JSON object");
    *out = json_file_load(body, bytes, JSON_REJECT_DUPLICATES, &reason, &no_memory);
    if (no_memory)
        return api_error_memory(error);
    if (!*out)
        return api_error_set(error, 400, "invalid_json", NULL, "the body is not valid JSON: line %d, column %d: %s",
                             reason.line, reason.column, reason.text);
    if (!json_is_object(*out))
        return api_error_set(error, 400, NULL, NULL, "the body must be a JSON object, found %s",
                             json_file_type_name(*out));
    return 0;
}

static int read_model(struct api_params *params, const char *const *names, int num_names, struct api_error *error)
{
    const json_t *name = api_member(params->body, "model");
    params->model_name = num_names ? names[0] : "";
    if (!name)
        return 0;
    if (!json_is_string(name))
        return api_error_wrong(error, "model", "a string", name);
    for (int i = 0; i < num_names; i++)
        if (strcmp(json_string_value(name), names[i]) == 0) {
            params->model_name = names[i];
            return 0;
        }
    return api_error_set(error, 404, "model_not_found", "model",
                         "the model \"%.200s\" is not served here; there is \"%s\"", json_string_value(name),
                         params->model_name);
}

static int read_counts(struct api_params *params, struct api_error *error)
{
    int64_t n = 1;
    if (get_int(params->body, "n", 1, API_MAX_N, &n, error) ||
        get_int(params->body, "max_tokens", 1, INT32_MAX, &params->max_tokens, error) ||
        get_int(params->body, "max_completion_tokens", 1, INT32_MAX, &params->max_tokens, error) ||
        get_int(params->body, "min_tokens", 0, INT32_MAX, &params->min_tokens, error))
        return -1;
    params->n = (int)n;
    if (params->max_tokens && params->min_tokens > params->max_tokens)
        return api_error_set(error, 400, NULL, "min_tokens", "min_tokens (%lld) is above max_tokens (%lld)",
                             (long long)params->min_tokens, (long long)params->max_tokens);
    params->rules.min_tokens = params->min_tokens;
    return 0;
}

static int read_salt(struct api_params *params, struct api_error *error)
{
    const json_t *salt = api_member(params->body, "cache_salt");
    params->cache_salt = "";
    if (!salt)
        return 0;
    if (!json_is_string(salt))
        return api_error_wrong(error, "cache_salt", "a string", salt);
    if (json_string_length(salt) == 0 || json_string_length(salt) > API_SALT_BYTES)
        return api_error_set(error, 400, NULL, "cache_salt", "cache_salt must have from 1 to %d bytes, found %zu",
                             API_SALT_BYTES, json_string_length(salt));
    params->cache_salt = json_string_value(salt);
    return 0;
}

// A text, token ids, or a list of either.
static int read_prompt(struct api_params *params, struct api_error *error)
{
    const json_t *prompt = api_member(params->body, "prompt");
    params->add_special_tokens = true;
    if (!prompt)
        return api_error_set(error, 400, NULL, "prompt", "prompt is missing");
    if (!json_is_string(prompt) && !json_is_array(prompt))
        return api_error_wrong(error, "prompt", "a string, a list of token ids, or a list of either", prompt);
    if (json_is_array(prompt) && json_array_size(prompt) == 0)
        return api_error_set(error, 400, NULL, "prompt", "prompt must not be an empty list");
    bool one = json_is_string(prompt) || json_is_integer(json_array_get(prompt, 0));
    size_t count = one ? 1 : json_array_size(prompt);
    if (count > (size_t)(API_MAX_CHOICES / params->n))
        return api_error_set(error, 400, NULL, "prompt", "%zu prompts with n = %d are more than %d choices", count,
                             params->n, API_MAX_CHOICES);
    params->prompt = prompt;
    params->num_prompts = (int)count;
    return api_params_get_bool(params->body, "add_special_tokens", &params->add_special_tokens, error);
}

int api_params_read(struct api_params *params, const char *body, size_t bytes, bool chat, const struct api_model *model,
                    const char *const *names, int num_names, struct api_error *error)
{
    const struct model_desc *desc = model->desc;
    params->chat = chat;
    params->rules.tokenizer = model->tokenizer;
    params->rules.skip_special = true;
    params->num_prompts = 1;
    if (api_params_parse(&params->body, body, bytes, error) || read_model(params, names, num_names, error) ||
        read_counts(params, error) || read_sampling(params, desc, error) || read_stops(params, error) ||
        read_stop_ids(params, desc->vocab_size, error) || read_bias(params, desc->vocab_size, error) ||
        api_params_get_bool(params->body, "ignore_eos", &params->ignore_eos, error) ||
        check_edits(params, model, error) ||
        api_params_get_bool(params->body, "include_stop_str_in_output", &params->rules.include_stop, error) ||
        api_params_get_bool(params->body, "skip_special_tokens", &params->rules.skip_special, error) ||
        read_logprobs(params, error) || read_stream(params, error) || read_salt(params, error) ||
        read_format(params, error) || refuse_unsupported(params, error))
        return -1;
    return chat ? api_params_read_chat(params, model, error) : read_prompt(params, error);
}

void api_params_clear(struct api_params *params)
{
    json_decref(params->body);
    json_decref(params->options);
    stop_strings_free(&params->rules.stops);
    free(params->stop_ids);
    free(params->edits);
    *params = (struct api_params){0};
}
