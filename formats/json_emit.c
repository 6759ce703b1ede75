// See json_emit.h.
#include "formats/json_emit.h"

#include <inttypes.h>
#include <string.h>

// What stands before a value: comma, line break, key.
static void emit_key(struct json_emit *to, const char *key)
{
    if (!to->first)
        fputc(',', to->out);
    to->first = false;
    if (to->pretty && to->depth)
        fprintf(to->out, "\n%*s", 2 * to->depth, "");
    if (key)
        fprintf(to->out, to->pretty ? "\"%s\": " : "\"%s\":", key);
}

void json_emit_open(struct json_emit *to, const char *key, char bracket)
{
    emit_key(to, key);
    fputc(bracket, to->out);
    to->depth++;
    to->first = true;
}

void json_emit_close(struct json_emit *to, char bracket)
{
    to->depth--;
    if (to->pretty && !to->first)
        fprintf(to->out, "\n%*s", 2 * to->depth, "");
    fputc(bracket, to->out);
    to->first = false;
}

// Without control characters only two characters need an escape.
void json_emit_string(struct json_emit *to, const char *key, const char *text)
{
    emit_key(to, key);
    fputc('"', to->out);
    for (; *text; text++) {
        if (*text == '"' || *text == '\\')
            fputc('\\', to->out);
        fputc(*text, to->out);
    }
    fputc('"', to->out);
}

void json_emit_int(struct json_emit *to, const char *key, int64_t value)
{
    emit_key(to, key);
    fprintf(to->out, "%" PRId64, value);
}

void json_emit_bool(struct json_emit *to, const char *key, bool value)
{
    emit_key(to, key);
    fputs(value ? "true" : "false", to->out);
}

// 17 significant digits read back to the same double.
void json_emit_real(struct json_emit *to, const char *key, double value)
{
    char text[40];
    snprintf(text, sizeof text, "%.17g", value);
    char *comma = strchr(text, ','); // a locale may have been set
    if (comma)
        *comma = '.';
    emit_key(to, key);
    fputs(text, to->out);
}
