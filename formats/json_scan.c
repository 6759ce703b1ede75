// Strict JSON, token by token. See json_scan.h.
#include "formats/json_scan.h"

#include "formats/utf8.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

struct json_scan json_scan_start(const uint8_t *text, size_t num_bytes, char *strings, const char *file_name,
                                 struct error *err)
{
    return (struct json_scan){text, text, text + num_bytes, file_name, err, strings};
}

int json_scan_fail(const struct json_scan *scan, const char *fmt, ...)
{
    char what[384];
    va_list args;
    va_start(args, fmt);
    vsnprintf(what, sizeof what, fmt, args);
    va_end(args);
    return error_set(scan->err, ERR_MODEL, "%s: byte %zu of the JSON: %s", scan->file_name,
                     (size_t)(scan->at - scan->begin), what);
}

// The next character that is not white space, not taken; 0 at the end (a NUL in the text fits nowhere either).
static uint8_t peek(struct json_scan *scan)
{
    while (scan->at < scan->end && (*scan->at == ' ' || *scan->at == '\t' || *scan->at == '\n' || *scan->at == '\r'))
        scan->at++;
    return scan->at < scan->end ? *scan->at : 0;
}

static int fail_found(const struct json_scan *scan, const char *wanted)
{
    if (scan->at == scan->end)
        return json_scan_fail(scan, "%s is missing, the text ends here", wanted);
    if (*scan->at > 0x20 && *scan->at < 0x7f)
        return json_scan_fail(scan, "%s is needed, found '%c'", wanted, *scan->at);
    return json_scan_fail(scan, "%s is needed, found byte 0x%02x", wanted, *scan->at);
}

int json_scan_expect(struct json_scan *scan, char wanted)
{
    if (peek(scan) != (uint8_t)wanted) {
        const char name[] = {'\'', wanted, '\'', 0};
        return fail_found(scan, name);
    }
    scan->at++;
    return 0;
}

int json_scan_next(struct json_scan *scan, char close, bool *first, bool *more)
{
    uint8_t found = peek(scan);
    *more = found != (uint8_t)close;
    if (*more && *first) {
        *first = false;
        return 0;
    }
    if (*more && found != ',')
        return fail_found(scan, close == '}' ? "',' or '}'" : "',' or ']'");
    scan->at++;
    return 0;
}

// The length of the UTF-8 sequence at `at`, 0 if it is none: overlong forms, surrogates and values beyond
// U+10FFFF are none.
static int utf8_bytes(const uint8_t *at, const uint8_t *end)
{
    uint8_t lead = at[0];
    if (lead < 0x80)
        return 1;
    int bytes = lead >= 0xc2 && lead <= 0xdf   ? 2
                : lead >= 0xe0 && lead <= 0xef ? 3
                : lead >= 0xf0 && lead <= 0xf4 ? 4
                                               : 0;
    if (!bytes || end - at < bytes)
        return 0;
    for (int i = 1; i < bytes; i++)
        if ((at[i] & 0xc0) != 0x80)
            return 0;
    bool bad = (lead == 0xe0 && at[1] < 0xa0) || (lead == 0xed && at[1] > 0x9f) || (lead == 0xf0 && at[1] < 0x90) ||
               (lead == 0xf4 && at[1] > 0x8f);
    return bad ? 0 : bytes;
}

// The four hexadecimal digits behind "\u", or -1.
static int32_t hex4(const uint8_t *at, const uint8_t *end)
{
    int32_t value = 0;
    if (end - at < 4)
        return -1;
    for (int i = 0; i < 4; i++) {
        uint8_t c = at[i];
        int32_t digit = c >= '0' && c <= '9'   ? c - '0'
                        : c >= 'a' && c <= 'f' ? c - 'a' + 10
                        : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                               : -1;
        if (digit < 0)
            return -1;
        value = value << 4 | digit;
    }
    return value;
}

// scan->at is behind "\u". Takes the digits, and those of the second half of a surrogate pair.
static int decode_unicode(struct json_scan *scan)
{
    int32_t code = hex4(scan->at, scan->end);
    if (code < 0)
        return json_scan_fail(scan, "four hexadecimal digits are needed behind \\u");
    scan->at += 4;
    if (code >= 0xd800 && code <= 0xdfff) {
        bool pair = code <= 0xdbff && scan->end - scan->at >= 6 && scan->at[0] == '\\' && scan->at[1] == 'u';
        int32_t low = pair ? hex4(scan->at + 2, scan->end) : -1;
        if (low < 0xdc00 || low > 0xdfff)
            return json_scan_fail(scan, "a surrogate without its other half");
        scan->at += 6;
        code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
    }
    scan->strings += utf8_put(scan->strings, (uint32_t)code);
    return 0;
}

// scan->at is behind a backslash.
static int decode_escape(struct json_scan *scan)
{
    static const char names[] = "\"\\/bfnrt", values[] = "\"\\/\b\f\n\r\t";
    const char *name = scan->at < scan->end && *scan->at ? strchr(names, *scan->at) : NULL;
    if (scan->at < scan->end && *scan->at == 'u') {
        scan->at++;
        return decode_unicode(scan);
    }
    if (!name)
        return json_scan_fail(scan, "an unknown escape in a string");
    *scan->strings++ = values[name - names];
    scan->at++;
    return 0;
}

// A decoded string is never longer than its text, and the quotes make room for the NUL.
int json_scan_string(struct json_scan *scan, char **out, size_t *bytes)
{
    if (peek(scan) != '"')
        return fail_found(scan, "a string");
    scan->at++;
    char *begin = scan->strings;
    for (;;) {
        if (scan->at == scan->end)
            return json_scan_fail(scan, "the text ends within a string");
        if (*scan->at == '"')
            break;
        if (*scan->at == '\\') {
            scan->at++;
            int rc = decode_escape(scan);
            if (rc)
                return rc;
            continue;
        }
        int length = utf8_bytes(scan->at, scan->end);
        if (!length)
            return json_scan_fail(scan, "a string is not valid UTF-8");
        if (*scan->at < 0x20)
            return json_scan_fail(scan, "a control character in a string");
        memcpy(scan->strings, scan->at, (size_t)length);
        scan->strings += length;
        scan->at += length;
    }
    scan->at++;
    *out = begin;
    if (bytes)
        *bytes = (size_t)(scan->strings - begin);
    *scan->strings++ = 0;
    return 0;
}

int json_scan_key(struct json_scan *scan, char **out, size_t *bytes)
{
    int rc = json_scan_string(scan, out, bytes);
    return rc ? rc : json_scan_expect(scan, ':');
}

int json_scan_uint(struct json_scan *scan, uint64_t *out, const char *what)
{
    uint8_t c = peek(scan);
    const uint8_t *begin = scan->at;
    uint64_t value = 0;
    for (; scan->at < scan->end && *scan->at >= '0' && *scan->at <= '9'; scan->at++) {
        if (__builtin_mul_overflow(value, 10u, &value) ||
            __builtin_add_overflow(value, (uint64_t)(*scan->at - '0'), &value))
            return json_scan_fail(scan, "%s must be an integer of at most 64 bits", what);
    }
    bool digits_only = scan->at == scan->end || !strchr(".eE", *scan->at) || !*scan->at;
    if (scan->at == begin || !digits_only || (c == '0' && scan->at - begin > 1))
        return json_scan_fail(scan, "%s must be an integer from 0, without sign, point or exponent", what);
    *out = value;
    return 0;
}

// The end of the digits that begin at `at`; null when there are none.
static const uint8_t *pass_digits(const uint8_t *at, const uint8_t *end)
{
    const uint8_t *begin = at;
    while (at < end && *at >= '0' && *at <= '9')
        at++;
    return at == begin ? NULL : at;
}

// The end of the number that begins at `at`; null when there is none.
static const uint8_t *pass_number(const uint8_t *at, const uint8_t *end)
{
    at += at < end && *at == '-';
    bool zero = at < end && *at == '0';
    at = zero ? at + 1 : pass_digits(at, end);
    if (at && at < end && *at == '.')
        at = pass_digits(at + 1, end);
    if (at && at < end && (*at == 'e' || *at == 'E')) {
        at++;
        at += at < end && (*at == '+' || *at == '-');
        at = pass_digits(at, end);
    }
    return at;
}

// Passes over a number, true, false or null.
static int skip_scalar(struct json_scan *scan)
{
    static const char *const words[] = {"true", "false", "null"};
    const uint8_t *after = pass_number(scan->at, scan->end);
    for (int i = 0; i < 3 && !after; i++) {
        size_t length = strlen(words[i]);
        if ((size_t)(scan->end - scan->at) >= length && memcmp(scan->at, words[i], length) == 0)
            after = scan->at + length;
    }
    if (!after)
        return fail_found(scan, "a JSON value");
    scan->at = after;
    return 0;
}

int json_scan_skip(struct json_scan *scan)
{
    char closes[JSON_SCAN_MAX_DEPTH]; // of the objects and arrays that are open
    int depth = 0, rc;
    bool first = false;
    char *keep = scan->strings, *text;
    do {
        uint8_t c = peek(scan);
        if (c == '{' || c == '[') {
            if (depth == JSON_SCAN_MAX_DEPTH)
                return json_scan_fail(scan, "nested deeper than %d", JSON_SCAN_MAX_DEPTH);
            closes[depth++] = c == '{' ? '}' : ']';
            scan->at++;
            first = true;
        } else if ((rc = c == '"' ? json_scan_string(scan, &text, NULL) : skip_scalar(scan))) {
            return rc;
        }
        // Go to the next value, closing what ends here.
        for (bool more = false; depth && !more; depth -= !more) {
            if ((rc = json_scan_next(scan, closes[depth - 1], &first, &more)))
                return rc;
            if (more && closes[depth - 1] == '}' && (rc = json_scan_key(scan, &text, NULL)))
                return rc;
            first = false;
        }
        scan->strings = keep;
    } while (depth);
    return 0;
}

int json_scan_end(struct json_scan *scan)
{
    peek(scan);
    return scan->at == scan->end ? 0 : fail_found(scan, "the end of the JSON");
}
