// A strict JSON reader that pulls one token at a time and builds no tree: for the headers and indexes of checkpoints,
// which are large and hostile. Memory is what the caller gives; integers are exact; nothing recurses.
// Strings must be valid UTF-8 without lone surrogates. Errors are ERR_MODEL and name the file and the byte.
#ifndef TPSHARD_FORMATS_JSON_SCAN_H
#define TPSHARD_FORMATS_JSON_SCAN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "formats/error.h"

struct json_scan {
    const uint8_t *begin, *at, *end;
    const char *file_name; // for messages
    struct error *err;
    char *strings; // where the next decoded string goes
};

// strings must have room for num_bytes: all decoded strings together, NUL-terminated, never need more.
// Everything given must outlive the scan. A scan that has failed must not be used further.
struct json_scan json_scan_start(const uint8_t *text, size_t num_bytes, char *strings, const char *file_name,
                                 struct error *err);

// Sets "<file>: byte N: <what>" as ERR_MODEL and returns that.
int json_scan_fail(const struct json_scan *scan, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

// Takes this character, with white space before it.
int json_scan_expect(struct json_scan *scan, char wanted);

// For the members of an object whose '{' is taken (close '}'), or the elements of an array (close ']').
// Sets *more to whether another one follows, and takes the comma or the closing character. *first must be true before
// the first call.
int json_scan_next(struct json_scan *scan, char close, bool *first, bool *more);

// Decodes a string to scan->strings, NUL-terminated, and moves scan->strings behind it. To forget the string, set
// scan->strings back to it. *bytes (may be null) is its length; it may hold NUL when the text says \u0000.
int json_scan_string(struct json_scan *scan, char **out, size_t *bytes);
// A string and the ':' behind it.
int json_scan_key(struct json_scan *scan, char **out, size_t *bytes);

// An integer from 0 to 2^64 - 1, written as digits only. what names it in the error.
int json_scan_uint(struct json_scan *scan, uint64_t *out, const char *what);

// Passes over any one valid value, at most JSON_SCAN_MAX_DEPTH deep. Duplicate keys within it are not looked for.
enum { JSON_SCAN_MAX_DEPTH = 64 };
int json_scan_skip(struct json_scan *scan);

// Only white space may follow.
int json_scan_end(struct json_scan *scan);

#endif
