// See api_error.h.
#include "engine/serve/api_error.h"

#include "engine/serve/engine.h"
#include "formats/json_file.h"
#include "formats/tokenizer_text.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

const char api_error_no_memory[] =
    "{\"error\":{\"message\":\"out of memory\",\"type\":\"service_unavailable_error\",\"param\":null,"
    "\"code\":\"out_of_memory\"}}";

// Texts of requests find their way into messages: cut short between characters.
static void keep_valid(char *text)
{
    size_t bytes = strlen(text);
    text[tokenizer_text_valid_prefix(text, bytes)] = 0;
}

int api_error_set(struct api_error *error, int status, const char *code, const char *param, const char *format, ...)
{
    va_list arguments;
    error->status = status;
    error->code = code;
    error->retry_after_s = 0;
    snprintf(error->param, sizeof error->param, "%s", param ? param : "");
    va_start(arguments, format);
    vsnprintf(error->message, sizeof error->message, format, arguments);
    va_end(arguments);
    keep_valid(error->param);
    keep_valid(error->message);
    return -1;
}

int api_error_wrong(struct api_error *error, const char *key, const char *wanted, const json_t *found)
{
    return api_error_set(error, 400, NULL, key, "%s must be %s, found %s", key, wanted, json_file_type_name(found));
}

int api_error_memory(struct api_error *error)
{
    api_error_set(error, 503, "out_of_memory", NULL, "the server has no memory for this request; try again later");
    error->retry_after_s = 1;
    return -1;
}

int api_error_large(struct api_error *error, const char *advice)
{
    return api_error_set(error, 400, "answer_too_large", NULL, "the answer has more than %d MiB; %s",
                         API_ANSWER_BYTES >> 20, advice);
}

int api_error_from(struct api_error *error, const struct error *err, const char *param)
{
    switch (err->code) {
    case ERR_USAGE:
        return api_error_set(error, 400, NULL, param, "%s", err->msg);
    case ERR_MEMORY:
        return api_error_memory(error);
    case ERR_BUSY:
        api_error_set(error, 429, "queue_full", NULL, "%s", err->msg);
        error->retry_after_s = 1;
        return -1;
    case ERR_RANK:
        api_error_set(error, 503, "not_ready", NULL, "%s", err->msg);
        error->retry_after_s = 5;
        return -1;
    case ERR_IO:
    case ERR_CORRUPT:
    case ERR_GPU: // of the ranks: where files lie is no client's business
        return api_error_set(error, 500, NULL, NULL, "the model cannot be computed; the server's log says why");
    default:
        return api_error_set(error, 500, NULL, NULL, "%s", err->msg);
    }
}

static const char *type_of(int status)
{
    return status == 429   ? "rate_limit_error"
           : status == 503 ? "service_unavailable_error"
           : status == 504 ? "timeout_error"
           : status >= 500 ? "server_error"
                           : "invalid_request_error";
}

void api_error_write(struct api_text *to, const struct api_error *error)
{
    api_text_puts(to, "{\"error\":{\"message\":");
    api_text_string(to, error->message, strlen(error->message));
    api_text_printf(to, ",\"type\":\"%s\",\"param\":", type_of(error->status));
    if (error->param[0])
        api_text_string(to, error->param, strlen(error->param));
    else
        api_text_puts(to, "null");
    if (error->code)
        api_text_printf(to, ",\"code\":\"%s\"}}", error->code);
    else
        api_text_puts(to, ",\"code\":null}}");
}
