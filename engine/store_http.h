// Files of a directory behind http:// or https://, through libcurl: ranged and whole GETs, refused where the answer is not what was asked for,
// repeated where trying again may help. It leaves to others: whether the bytes are the right ones.
//
// What a server may not do: answer a range with the whole file, with another range or with more or fewer bytes; encode; redirect more than 5
// times, to anything but http and https, or from https to http; send endless headers; where needs_one_version asks for that, change a file
// between two ranges. The token goes to the URL's own host alone, whatever its port where libcurl is older than 7.83.
#ifndef TPSHARD_ENGINE_STORE_HTTP_H
#define TPSHARD_ENGINE_STORE_HTTP_H

#include "engine/store.h"
#include "engine/store_url.h"
#include "formats/error.h"

#include <stdint.h>

struct store_http;

// Takes the URL over (on failure too). Nothing is asked for. Any thread may use what is opened.
int store_http_open(struct store_http **out, struct store_url url, const struct store_options *options,
                    struct error *err);
void store_http_close(struct store_http *http); // accepts NULL; after its files
void store_http_cancel(struct store_http *http);
const char *store_http_place(const struct store_http *http);

// A whole file; ERR_CORRUPT when it has more than cap_bytes. Success: the caller owns *out (free), followed by one NUL byte.
int store_http_get(struct store_http *http, uint8_t **out, uint64_t *num_bytes, const char *name, uint64_t cap_bytes,
                   struct error *err);

struct store_http_file;

// One that is read in ranges and must be file_bytes long. Nothing is asked for.
int store_http_file_open(struct store_http_file **out, struct store_http *http, const char *name, uint64_t file_bytes,
                         struct error *err);
void store_http_file_close(struct store_http_file *file); // accepts NULL
const char *store_http_file_name(const struct store_http_file *file);
// Exactly num_bytes at offset; see store_file_read.
int store_http_file_read(struct store_http_file *file, void *buffer, uint64_t num_bytes, uint64_t offset,
                         struct error *err);
void store_http_file_cancel(struct store_http_file *file);
uint64_t store_http_file_fetched_bytes(const struct store_http_file *file);

#endif
