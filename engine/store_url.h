// URLs of shard directories: taken apart, joined with a file's name, and spelled for messages without what may be secret.
#ifndef TPSHARD_ENGINE_STORE_URL_H
#define TPSHARD_ENGINE_STORE_URL_H

#include "formats/error.h"

#include <stdbool.h>

enum { STORE_URL_MAX_BYTES = 4096 };

struct store_url {
    char *base;  // up to the end of the path, without trailing slashes: "http://me:secret@host:8000/dir"
    char *query; // "?..." or "": appended to every file's URL
    char *shown; // base without "me:secret@"; for messages
    bool is_tls; // https
};

// Begins as a URL does, of whatever scheme; what does not can only be a path.
bool store_url_is_one(const char *place);
// ERR_USAGE: another scheme than http and https, no host, a fragment, blanks or control characters. Success: store_url_clear.
int store_url_parse(struct store_url *out, const char *place, struct error *err);
void store_url_clear(struct store_url *url);
// The URL of a file in the directory, the name percent-encoded; NULL: out of memory. Caller frees it.
char *store_url_of(const struct store_url *url, const char *name);

#endif
