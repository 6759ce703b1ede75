// What a client is told when something is wrong, in OpenAI's shape.
#ifndef TPSHARD_ENGINE_SERVE_API_ERROR_H
#define TPSHARD_ENGINE_SERVE_API_ERROR_H

#include "engine/serve/api_text.h"
#include "formats/error.h"

#include <jansson.h>
#include <stdint.h>

struct api_error {
    int status;       // HTTP; 0: no error
    const char *code; // static; NULL: none
    char param[96];   // "": none
    char message[640];
    int64_t retry_after_s; // 0: no Retry-After
};

// Each fills error and returns -1. param may be NULL.
int api_error_set(struct api_error *error, int status, const char *code, const char *param, const char *format, ...)
    __attribute__((format(printf, 5, 6)));
// "KEY must be WANTED, found a string", 400.
int api_error_wrong(struct api_error *error, const char *key, const char *wanted, const json_t *found);
// An answer of more than API_ANSWER_BYTES, which is not made; advice: half a sentence.
enum { API_ANSWER_BYTES = 32 << 20 };
int api_error_large(struct api_error *error, const char *advice);
int api_error_memory(struct api_error *error); // 503
// What one of the libraries said about a request: ERR_USAGE is the client's fault, ERR_MEMORY and ERR_RANK will pass.
int api_error_from(struct api_error *error, const struct error *err, const char *param);

// A member of a request's object; null counts as missing, which is NULL.
static inline const json_t *api_member(const json_t *object, const char *key)
{
    const json_t *value = json_object_get(object, key);
    return json_is_null(value) ? NULL : value;
}

// The body of a 503 where even that of an error cannot be had.
extern const char api_error_no_memory[];
// {"error":{...}}
void api_error_write(struct api_text *to, const struct api_error *error);

#endif
