#include "engine/serve/output_call.h"

#include "formats/utf8.h"

#include <stdlib.h>
#include <string.h>

enum { OPEN, KEY, KEY_TEXT, COLON, VALUE, NAME, OBJECT, TEXT, NOTHING, SKIP, SKIP_WORD, COMMA };

void output_call_start(struct output_call *call, struct output_call_sink sink, bool strict)
{
    char *early = call->early;
    size_t capacity = call->early_capacity;
    *call = (struct output_call){.sink = sink, .strict = strict, .early = early, .early_capacity = capacity};
}

void output_call_start_arguments(struct output_call *call, struct output_call_sink sink, const char *name, size_t bytes)
{
    output_call_start(call, sink, false);
    call->name_bytes = bytes < sizeof call->name ? bytes : sizeof call->name;
    memcpy(call->name, name, call->name_bytes);
    call->named = true;
    call->state = VALUE;
}

void output_call_clear(struct output_call *call)
{
    free(call->early);
    *call = (struct output_call){0};
}

static bool is_blank(char byte) { return byte == ' ' || byte == '\n' || byte == '\t' || byte == '\r'; }

// ---- strings -----------------------------------------------------------------------------------------------------

// The code of one escape (\u and four digits) is complete. A surrogate without its other half reads as U+FFFD.
static size_t take_code(struct output_call *call, char *out)
{
    uint32_t code = call->code, high = call->high;
    size_t count = 0;
    call->high = 0;
    if (high && code >= 0xDC00 && code < 0xE000)
        return utf8_put(out, 0x10000 + ((high - 0xD800) << 10) + (code - 0xDC00));
    if (high)
        count = utf8_put(out, UTF8_REPLACEMENT);
    if (code >= 0xD800 && code < 0xDC00)
        call->high = code;
    else
        count += utf8_put(out + count, code >= 0xDC00 && code < 0xE000 ? UTF8_REPLACEMENT : code);
    return count;
}

enum { STRING_MORE, STRING_END, STRING_BAD };

// One byte of a string behind its opening quote; out [count <= 8] is what the string means by it.
static int take_string(struct output_call *call, char byte, char *out, size_t *count)
{
    static const char letters[] = "\"\\/bfnrt", meant[] = "\"\\/\b\f\n\r\t";
    *count = 0;
    if (call->escape > 1) {
        int digit = byte >= '0' && byte <= '9'                     ? byte - '0'
                    : (byte | 0x20) >= 'a' && (byte | 0x20) <= 'f' ? (byte | 0x20) - 'a' + 10
                                                                   : -1;
        if (digit < 0)
            return STRING_BAD;
        call->code = call->code << 4 | (uint32_t)digit;
        call->escape = call->escape == 5 ? 0 : call->escape + 1;
        if (call->escape == 0)
            *count = take_code(call, out);
        return STRING_MORE;
    }
    if (call->escape == 1 && byte == 'u') {
        call->escape = 2;
        call->code = 0;
        return STRING_MORE;
    }
    if (call->escape == 0 && byte == '\\') {
        call->escape = 1;
        return STRING_MORE;
    }
    if (call->high)
        *count = utf8_put(out, UTF8_REPLACEMENT);
    call->high = 0;
    if (call->escape == 0 && byte == '"')
        return STRING_END;
    if (call->escape) {
        const char *found = byte ? strchr(letters, byte) : NULL;
        if (!found)
            return STRING_BAD;
        byte = meant[found - letters];
        call->escape = 0;
    }
    out[(*count)++] = byte;
    return STRING_MORE;
}

// ---- values ------------------------------------------------------------------------------------------------------

enum { NEST_MORE, NEST_END, NEST_BAD };

// Brackets match and what stands outside of strings could be JSON; more is not asked: a client sees what the model wrote.
static int take_nest(struct output_call_nest *nest, char byte)
{
    if (nest->in_string) {
        if (nest->escaped)
            nest->escaped = false;
        else if (byte == '\\')
            nest->escaped = true;
        else if (byte == '"')
            nest->in_string = false;
        return NEST_MORE;
    }
    if (byte == '{' || byte == '[') {
        if (nest->depth == OUTPUT_CALL_DEPTH)
            return NEST_BAD;
        uint8_t bit = (uint8_t)(1u << nest->depth % 8), *bits = &nest->objects[nest->depth / 8];
        *bits = (uint8_t)(byte == '{' ? *bits | bit : *bits & ~bit);
        nest->depth++;
        return NEST_MORE;
    }
    if (byte == '}' || byte == ']') {
        int top = nest->depth - 1;
        if ((nest->objects[top / 8] >> top % 8 & 1) != (byte == '}'))
            return NEST_BAD;
        nest->depth = top;
        return top ? NEST_MORE : NEST_END;
    }
    nest->in_string = byte == '"';
    bool word = (byte >= '0' && byte <= '9') || (byte >= 'a' && byte <= 'z') || (byte >= 'A' && byte <= 'Z');
    return word || is_blank(byte) || (byte && strchr("\",:+-.", byte)) ? NEST_MORE : NEST_BAD;
}

static bool keep_early(struct output_call *call, const char *text, size_t bytes)
{
    size_t wanted = call->early_bytes + bytes;
    if (wanted > call->early_capacity) {
        size_t capacity = 2 * wanted + 64;
        char *early = realloc(call->early, capacity);
        if (!early)
            return false;
        call->early = early;
        call->early_capacity = capacity;
    }
    memcpy(call->early + call->early_bytes, text, bytes);
    call->early_bytes = wanted;
    return true;
}

static enum output_call_step pass_on(struct output_call *call, const char *text, size_t bytes)
{
    if (bytes == 0)
        return OUTPUT_CALL_MORE;
    call->wrote_arguments = true;
    if (call->begun)
        call->sink.arguments(call->sink.arg, text, bytes);
    else if (call->early_bytes + bytes > OUTPUT_CALL_EARLY_BYTES)
        return OUTPUT_CALL_BAD;
    else if (!keep_early(call, text, bytes))
        return OUTPUT_CALL_NO_MEMORY;
    return OUTPUT_CALL_MORE;
}

// As soon as there are a name and arguments.
static void begin_if_known(struct output_call *call)
{
    if (call->begun || !call->named || !call->has_arguments)
        return;
    call->begun = true;
    call->sink.begin(call->sink.arg, call->name, call->name_bytes);
    if (call->early_bytes)
        call->sink.arguments(call->sink.arg, call->early, call->early_bytes);
    call->early_bytes = 0;
}

// ---- members -----------------------------------------------------------------------------------------------------

static bool key_is(const struct output_call *call, const char *key)
{
    return call->key_bytes == strlen(key) && memcmp(call->key, key, call->key_bytes) == 0;
}

static enum output_call_step begin_arguments(struct output_call *call, char byte)
{
    bool alone = call->key_bytes == 0;
    if (call->has_arguments || (byte != '{' && (alone || (byte != '"' && byte != 'n'))))
        return OUTPUT_CALL_BAD;
    call->has_arguments = true;
    begin_if_known(call);
    call->state = byte == '{' ? OBJECT : byte == '"' ? TEXT : NOTHING;
    call->word = 1;
    if (byte != '{')
        return OUTPUT_CALL_MORE;
    take_nest(&call->nest, byte);
    return pass_on(call, &byte, 1);
}

static enum output_call_step begin_value(struct output_call *call, char byte)
{
    if (key_is(call, "arguments") || key_is(call, "parameters") || call->key_bytes == 0)
        return begin_arguments(call, byte);
    if (key_is(call, "name")) {
        call->state = NAME;
        return byte == '"' && !call->named ? OUTPUT_CALL_MORE : OUTPUT_CALL_BAD;
    }
    if (call->strict && !call->begun && !key_is(call, "type") && !key_is(call, "id"))
        return OUTPUT_CALL_BAD;
    bool nested = byte == '{' || byte == '[' || byte == '"';
    if (!nested && !((byte >= '0' && byte <= '9') || byte == '-' || (byte >= 'a' && byte <= 'z')))
        return OUTPUT_CALL_BAD;
    call->state = nested ? SKIP : SKIP_WORD;
    if (nested)
        take_nest(&call->nest, byte);
    return OUTPUT_CALL_MORE;
}

static enum output_call_step end_object(struct output_call *call)
{
    if (!call->named || (call->strict && !call->has_arguments))
        return OUTPUT_CALL_BAD_ENDS;
    call->has_arguments = true;
    begin_if_known(call);
    if (!call->wrote_arguments)
        pass_on(call, "{}", 2);
    return OUTPUT_CALL_END;
}

static enum output_call_step take_key(struct output_call *call, char byte)
{
    char out[8];
    size_t count;
    int step = take_string(call, byte, out, &count);
    if (step == STRING_BAD || (step == STRING_MORE && (unsigned char)byte < 0x20))
        return OUTPUT_CALL_BAD;
    for (size_t i = 0; i < count; i++)
        if (call->key_bytes < sizeof call->key)
            call->key[call->key_bytes++] = out[i];
    if (step == STRING_END)
        call->state = COLON;
    return step == STRING_END && call->key_bytes == 0 ? OUTPUT_CALL_BAD : OUTPUT_CALL_MORE;
}

static enum output_call_step take_name(struct output_call *call, char byte)
{
    char out[8];
    size_t count;
    int step = take_string(call, byte, out, &count);
    if (step == STRING_BAD || call->name_bytes + count > sizeof call->name ||
        (step == STRING_MORE && (unsigned char)byte < 0x20))
        return OUTPUT_CALL_BAD;
    memcpy(call->name + call->name_bytes, out, count);
    call->name_bytes += count;
    if (step == STRING_MORE)
        return OUTPUT_CALL_MORE;
    if (call->name_bytes == 0)
        return OUTPUT_CALL_BAD;
    call->named = true;
    call->state = COMMA;
    begin_if_known(call);
    return OUTPUT_CALL_MORE;
}

static enum output_call_step take_object(struct output_call *call, char byte)
{
    int step = take_nest(&call->nest, byte);
    if (step == NEST_BAD)
        return OUTPUT_CALL_BAD;
    enum output_call_step passed = pass_on(call, &byte, 1);
    if (step == NEST_MORE || passed != OUTPUT_CALL_MORE)
        return passed;
    call->state = COMMA;
    return call->key_bytes ? OUTPUT_CALL_MORE : OUTPUT_CALL_END; // without a key the arguments stood alone
}

// Some models write the arguments as a string that holds their JSON.
static enum output_call_step take_text(struct output_call *call, char byte)
{
    char out[8];
    size_t count;
    int step = take_string(call, byte, out, &count);
    if (step == STRING_BAD)
        return OUTPUT_CALL_BAD;
    if (step == STRING_END)
        call->state = COMMA;
    return pass_on(call, out, count);
}

static enum output_call_step take_nothing(struct output_call *call, char byte)
{
    if (byte != "null"[call->word++])
        return OUTPUT_CALL_BAD;
    if (call->word == 4)
        call->state = COMMA;
    return OUTPUT_CALL_MORE;
}

static enum output_call_step take_skipped(struct output_call *call, char byte)
{
    int step = take_nest(&call->nest, byte);
    if (step == NEST_END || (call->nest.depth == 0 && !call->nest.in_string))
        call->state = COMMA;
    return step == NEST_BAD ? OUTPUT_CALL_BAD : OUTPUT_CALL_MORE;
}

static enum output_call_step take_comma(struct output_call *call, char byte)
{
    if (byte == '}')
        return end_object(call);
    call->state = KEY;
    call->key_bytes = 0;
    return byte == ',' ? OUTPUT_CALL_MORE : OUTPUT_CALL_BAD;
}

static enum output_call_step expect(struct output_call *call, char byte, char wanted, int next)
{
    call->state = next;
    return byte == wanted ? OUTPUT_CALL_MORE : OUTPUT_CALL_BAD;
}

enum output_call_step output_call_take(struct output_call *call, char byte)
{
    switch (call->state) {
    case KEY_TEXT:
        return take_key(call, byte);
    case NAME:
        return take_name(call, byte);
    case OBJECT:
        return take_object(call, byte);
    case TEXT:
        return take_text(call, byte);
    case NOTHING:
        return take_nothing(call, byte);
    case SKIP:
        return take_skipped(call, byte);
    case SKIP_WORD:
        if (byte == '.' || byte == '+' || byte == '-' || (byte >= '0' && byte <= '9') || (byte >= 'a' && byte <= 'z') ||
            byte == 'E')
            return OUTPUT_CALL_MORE;
        call->state = COMMA;
        break;
    }
    if (is_blank(byte))
        return OUTPUT_CALL_MORE;
    switch (call->state) {
    case OPEN:
        return expect(call, byte, '{', KEY);
    case KEY:
        return expect(call, byte, '"', KEY_TEXT);
    case COLON:
        return expect(call, byte, ':', VALUE);
    case VALUE:
        return begin_value(call, byte);
    default:
        return take_comma(call, byte);
    }
}
