// See api_auth.h.
#include "engine/serve/api_auth.h"

#include "engine/serve/api.h"

#include <stdlib.h>
#include <string.h>
#include <strings.h>

struct api_auth {
    int num_keys;
    uint8_t keys[][API_KEY_BYTES]; // filled up with zeros, which no key contains
};

static int check_key(const char *key, int index, struct error *err)
{
    size_t bytes = strlen(key);
    if (bytes == 0 || bytes > API_KEY_BYTES)
        return error_set(err, ERR_USAGE, "API key %d must have from 1 to %d characters, found %zu", index + 1,
                         API_KEY_BYTES, bytes);
    for (size_t i = 0; i < bytes; i++)
        if (key[i] <= ' ' || key[i] > '~')
            return error_set(err, ERR_USAGE, "API key %d has a blank or another character that a header cannot carry",
                             index + 1);
    return 0;
}

int api_auth_create(struct api_auth **out, const char *const *keys, int num_keys, struct error *err)
{
    struct api_auth *auth = calloc(1, sizeof *auth + (size_t)num_keys * sizeof *auth->keys);
    if (!auth)
        return error_set(err, ERR_MEMORY, "no memory for %d API keys", num_keys);
    for (int i = 0; i < num_keys; i++) {
        int rc = check_key(keys[i], i, err);
        if (rc) {
            api_auth_free(auth);
            return rc;
        }
        memcpy(auth->keys[i], keys[i], strlen(keys[i]));
    }
    auth->num_keys = num_keys;
    *out = auth;
    return 0;
}

void api_auth_free(struct api_auth *auth)
{
    if (auth)
        explicit_bzero(auth->keys, (size_t)auth->num_keys * sizeof *auth->keys);
    free(auth);
}

bool api_auth_required(const struct api_auth *auth) { return auth->num_keys > 0; }

// 0 when both are equal, without a branch on what they hold.
static uint32_t difference(const volatile uint8_t *a, const volatile uint8_t *b)
{
    uint32_t found = 0;
    for (int i = 0; i < API_KEY_BYTES; i++)
        found |= (uint32_t)(a[i] ^ b[i]);
    return found;
}

int api_auth_check(const struct api_auth *auth, const char *header)
{
    uint8_t given[API_KEY_BYTES] = {0};
    const char *key = header && strncasecmp(header, "Bearer ", 7) == 0 ? header + 7 : "";
    key += strspn(key, " ");
    size_t bytes = strlen(key);
    uint32_t match = 0, fits = bytes <= API_KEY_BYTES;
    memcpy(given, key, fits ? bytes : API_KEY_BYTES);
    for (int i = 0; i < auth->num_keys; i++) {
        uint32_t equal =
            (difference(auth->keys[i], given) - 1) >> 31 & fits; // 0 - 1 has the top bit; 1 .. 255 less 1 has not
        match |= (0 - equal) & (uint32_t)(i + 1);
    }
    return (int)match;
}
