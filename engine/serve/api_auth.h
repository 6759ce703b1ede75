// Keys of the API. A key that is asked about is compared with every key over its full length, whatever was found before: the time says nothing.
#ifndef TPSHARD_ENGINE_SERVE_API_AUTH_H
#define TPSHARD_ENGINE_SERVE_API_AUTH_H

#include "formats/error.h"

#include <stdbool.h>
#include <stdint.h>

struct api_auth;

// Keys are copied. ERR_USAGE for one that is empty, too long (API_KEY_BYTES) or has characters that a header cannot carry.
int api_auth_create(struct api_auth **out, const char *const *keys, int num_keys, struct error *err);
void api_auth_free(struct api_auth *auth); // accepts NULL
bool api_auth_required(const struct api_auth *auth);
// The value of an Authorization header (NULL: none was sent) -> 1 + index of the key, or 0.
int api_auth_check(const struct api_auth *auth, const char *header);

#endif
