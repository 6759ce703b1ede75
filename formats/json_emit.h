// Writes JSON to a stream: keys in the order of the calls, compact or indented by two spaces.
#ifndef TPSHARD_FORMATS_JSON_EMIT_H
#define TPSHARD_FORMATS_JSON_EMIT_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

struct json_emit {
    FILE *out;
    bool pretty; // indented; else no blank anywhere
    int depth;
    bool first; // nothing stands in the open object or array yet; true at the start
};

// key is NULL in an array and for the root. Texts hold no control characters.
void json_emit_open(struct json_emit *to, const char *key, char bracket);
void json_emit_close(struct json_emit *to, char bracket);
void json_emit_string(struct json_emit *to, const char *key, const char *text);
void json_emit_int(struct json_emit *to, const char *key, int64_t value);
void json_emit_bool(struct json_emit *to, const char *key, bool value);
void json_emit_real(struct json_emit *to, const char *key, double value); // reads back to the same double

#endif
