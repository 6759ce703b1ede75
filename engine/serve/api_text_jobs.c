// /tokenize, /detokenize, /apply-template. Worker thread. Members are those of vLLM and llama-server.
#include "engine/serve/api_internal.h"

#include "formats/json_file.h"

#include <stdlib.h>
#include <string.h>

static void answer(struct api_request *request, int rc, struct api_text *json, const struct api_error *error)
{
    if (rc)
        api_request_fail(request, error);
    else
        api_request_answer(request, json);
    api_text_free(json);
}

static const json_t *either(const json_t *body, const char *key, const char *other)
{
    const json_t *value = json_object_get(body, key);
    return value && !json_is_null(value) ? value : json_object_get(body, other);
}

// {"prompt": text} or {"content": text}, or a chat.
static int encode_body(struct api_request *request, struct api_params *params, struct token_list *ids,
                       struct api_error *error)
{
    const struct api_model *model = request->model;
    const json_t *text;
    struct error err = {0};
    bool special, in_reasoning;
    if (api_params_parse(&params->body, request->body, request->body_bytes, error))
        return -1;
    text = either(params->body, "prompt", "content");
    special = !json_object_get(params->body, "content"); // llama-server's default is without
    if (!text && json_object_get(params->body, "messages"))
        return api_params_read_chat(params, model, error) ? -1
                                                          : api_encode_chat(model, params, ids, &in_reasoning, error);
    if (!json_is_string(text))
        return api_error_set(error, 400, NULL, "prompt", "prompt must be a string, found %s",
                             json_file_type_name(text));
    if (api_params_get_bool(params->body, "add_special", &special, error) ||
        api_params_get_bool(params->body, "add_special_tokens", &special, error))
        return -1;
    return tokenizer_encode(model->tokenizer, json_string_value(text), json_string_length(text),
                            special ? TOKENIZER_ADD_SPECIAL : 0, ids, &err)
               ? api_error_from(error, &err, "prompt")
               : 0;
}

void api_tokenize(struct api_request *request)
{
    struct api_params params = {0};
    struct api_error error = {0};
    struct api_text json = {0};
    struct token_list ids = {0};
    int rc = encode_body(request, &params, &ids, &error);
    if (rc == 0) {
        api_text_printf(&json, "{\"count\":%zu,\"max_model_len\":%lld,\"tokens\":[", ids.count,
                        (long long)request->model->context);
        for (size_t i = 0; i < ids.count; i++)
            api_text_printf(&json, i ? ",%u" : "%u", ids.ids[i]);
        api_text_puts(&json, "]}");
    }
    free(ids.ids);
    api_params_clear(&params);
    answer(request, rc, &json, &error);
}

static int decode_body(struct api_request *request, json_t *body, struct api_text *json, struct api_error *error)
{
    const struct api_model *model = request->model;
    const json_t *list = json_object_get(body, "tokens");
    struct token_list ids = {0};
    struct error err = {0};
    char *text = NULL;
    size_t bytes;
    bool skip = false;
    if (!json_is_array(list))
        return api_error_set(error, 400, NULL, "tokens", "tokens must be a list of token ids, found %s",
                             json_file_type_name(list));
    if (api_params_get_bool(body, "skip_special_tokens", &skip, error))
        return -1;
    int rc = api_params_read_ids(list, "tokens", tokenizer_vocab_size(model->tokenizer), &ids, error);
    if (rc == 0 && tokenizer_decode(model->tokenizer, ids.ids, ids.count, skip, &text, &bytes, &err))
        rc = api_error_from(error, &err, "tokens");
    free(ids.ids);
    if (rc)
        return rc;
    api_text_puts(json, "{\"prompt\":");
    api_text_string(json, text, bytes);
    api_text_puts(json, ",\"content\":");
    api_text_string(json, text, bytes);
    api_text_puts(json, "}");
    free(text);
    return 0;
}

void api_detokenize(struct api_request *request)
{
    struct api_error error = {0};
    struct api_text json = {0};
    json_t *body = NULL;
    int rc = api_params_parse(&body, request->body, request->body_bytes, &error);
    if (rc == 0)
        rc = decode_body(request, body, &json, &error);
    json_decref(body);
    answer(request, rc, &json, &error);
}

void api_apply_template(struct api_request *request)
{
    struct api_params params = {0};
    struct api_error error = {0};
    struct api_text json = {0};
    struct template_output text = {0};
    int rc = api_params_parse(&params.body, request->body, request->body_bytes, &error);
    if (rc == 0 && (rc = api_params_read_chat(&params, request->model, &error)) == 0 &&
        (rc = api_render_chat(request->model, &params, &text, &error)) == 0) {
        api_text_puts(&json, "{\"prompt\":");
        api_text_string(&json, text.text, text.bytes);
        api_text_puts(&json, "}");
    }
    template_output_clear(&text);
    api_params_clear(&params);
    answer(request, rc, &json, &error);
}
