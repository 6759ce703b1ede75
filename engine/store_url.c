// See store_url.h.
#include "engine/store_url.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#define LETTERS "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
#define DIGITS "0123456789"

// Bytes of "scheme" before "://"; 0: there is none.
static size_t scheme_bytes(const char *place)
{
    size_t bytes = strcspn(place, ":");
    bool is_scheme = strspn(place, LETTERS) > 0 && strspn(place, LETTERS DIGITS "+-.") == bytes;
    return is_scheme && strncmp(place + bytes, "://", 3) == 0 ? bytes : 0;
}

bool store_url_is_one(const char *place) { return scheme_bytes(place) > 0; }

static bool scheme_is(const char *place, size_t bytes, const char *scheme)
{
    return bytes == strlen(scheme) && strncasecmp(place, scheme, bytes) == 0;
}

// Messages print nothing behind the scheme: what is wrong may stand in a password.
int store_url_parse(struct store_url *out, const char *place, struct error *err)
{
    int scheme = (int)scheme_bytes(place);
    bool is_tls = scheme_is(place, (size_t)scheme, "https");
    if (!is_tls && !scheme_is(place, (size_t)scheme, "http"))
        return error_set(err, ERR_USAGE, "%.*s://...: a model is read from a directory, http:// or https://", scheme,
                         place);
    if (strlen(place) > STORE_URL_MAX_BYTES)
        return error_set(err, ERR_USAGE, "%.*s://...: the URL is longer than %d bytes", scheme, place,
                         STORE_URL_MAX_BYTES);
    for (const char *c = place; *c; c++)
        if ((unsigned char)*c <= 0x20 || (unsigned char)*c >= 0x7f || strchr("\\#\"<>", *c))
            return error_set(err, ERR_USAGE, "%.*s://...: character %d must not stand in a URL; write it as %%%02X",
                             scheme, place, (int)(c - place) + 1, (unsigned char)*c);
    const char *authority = place + scheme + 3, *path = authority + strcspn(authority, "/?");
    const char *at = memchr(authority, '@', (size_t)(path - authority)), *host = at ? at + 1 : authority;
    if (host == path || *host == ':' || memchr(host, '@', (size_t)(path - host)))
        return error_set(err, ERR_USAGE, "%.*s://...: the URL names no host, or a '@' before it is not written as %%40",
                         scheme, place);
    const char *query = path + strcspn(path, "?"), *end = query;
    while (end > path && end[-1] == '/')
        end--;
    struct store_url url = {.base = strndup(place, (size_t)(end - place)), .query = strdup(query), .is_tls = is_tls};
    if (!url.base || !url.query ||
        asprintf(&url.shown, "%s://%.*s", is_tls ? "https" : "http", (int)(end - host), host) < 0) {
        url.shown = NULL;
        store_url_clear(&url);
        return error_set(err, ERR_MEMORY, "no memory for a URL");
    }
    *out = url;
    return 0;
}

void store_url_clear(struct store_url *url)
{
    free(url->base);
    free(url->query);
    free(url->shown);
    *url = (struct store_url){0};
}

char *store_url_of(const struct store_url *url, const char *name)
{
    char *text = malloc(strlen(url->base) + 1 + 3 * strlen(name) + strlen(url->query) + 1);
    if (!text)
        return NULL;
    char *to = text + sprintf(text, "%s/", url->base);
    for (; *name; name++)
        if (strchr(LETTERS DIGITS "-._~", *name))
            *to++ = *name;
        else
            to += sprintf(to, "%%%02X", (unsigned char)*name);
    strcpy(to, url->query);
    return text;
}
