// Bodies of requests: none crashes or leaks; what is taken is within the documented ranges; what is refused gives an error that is JSON. The first
// byte says for which route.
#include "engine/serve/api_params.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static void check(bool holds)
{
    if (!holds)
        abort();
}

static void check_error(const struct api_error *error)
{
    struct api_text text = {0};
    check(error->status >= 400 && error->status < 600);
    api_error_write(&text, error);
    json_t *json = json_loadb(text.data, text.bytes, JSON_REJECT_DUPLICATES, NULL);
    check(text.failed || json);
    json_decref(json);
    api_text_free(&text);
}

static void check_params(const struct api_params *params, int64_t vocab_size)
{
    const struct sampling *sampling = &params->sampling;
    check(sampling->temperature >= 0 && sampling->temperature <= 2 && sampling->top_p > 0 && sampling->top_p <= 1);
    check(sampling->min_p >= 0 && sampling->min_p <= 1 && sampling->top_k >= 0 && sampling->repetition_penalty > 0);
    check(fabs(sampling->frequency_penalty) <= 2 && fabs(sampling->presence_penalty) <= 2);
    check(params->n >= 1 && params->n <= API_MAX_N && params->n * params->num_prompts <= API_MAX_CHOICES);
    check(params->max_tokens >= 0 && params->min_tokens >= 0 && params->num_logprobs >= -1 &&
          params->num_logprobs <= STEP_MAX_LOGPROBS);
    check(params->rules.stops.count <= STOP_STRINGS_MAX && params->num_edits <= STEP_MAX_EDITS);
    for (int64_t i = 0; i < params->num_edits; i++)
        check(params->edits[i].token < vocab_size && fabsf(params->edits[i].add) <= 100);
    for (int64_t i = 0; i < params->num_stop_ids; i++)
        check(params->stop_ids[i] < vocab_size);
    check(params->chat ? json_array_size(params->messages) > 0 : params->prompt != NULL);
    for (size_t i = 0; params->chat && i < json_array_size(params->messages); i++) {
        const json_t *message = json_array_get(params->messages, i), *content = json_object_get(message, "content");
        check(json_is_string(json_object_get(message, "role")));
        check(!content || json_is_null(content) || json_is_string(content));
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    static const struct model_desc desc = {.vocab_size = 1000,
                                           .default_temperature = NAN,
                                           .default_top_p = NAN,
                                           .default_repetition_penalty = NAN,
                                           .default_top_k = -1};
    static const struct api_model model = {.desc = &desc, .context = 4096};
    static const char *const names[] = {"m"};
    struct api_params params = {0};
    struct api_error error = {0};
    if (bytes == 0)
        return 0;
    if (api_params_read(&params, (const char *)data + 1, bytes - 1, data[0] & 1, &model, names, 1, &error))
        check_error(&error);
    else
        check_params(&params, desc.vocab_size);
    api_params_clear(&params);
    return 0;
}
