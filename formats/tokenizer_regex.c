// Oniguruma patterns on PCRE2. See tokenizer_regex.h.
//
// The translation accepts what it knows and refuses everything else by name, because a construct that both engines
// accept but read differently would give silently different ids. Known differences, and what is done about them:
//   \s            PCRE2 also takes U+180E            written out as the 25 White_Space code points
//   \w \b         PCRE2 10.42 leaves out marks       written out as Alphabetic, M, Nd, Pc and (an oddity of
//                                                    Oniguruma) the superscripts and fractions of Latin-1
//   \p{Han}       PCRE2 means script extensions      \p{sc:Han}
//   \h \v \uHHHH  different or no meaning            hex digit, U+000B, \x{HHHH}
//   ^ $           match at every line in Ruby        PCRE2_MULTILINE
//   X{n,m}+       a repeated interval in Ruby        (?:X{n,m})+
//   X{n}?         an optional interval in Ruby       (?:X{n})?
//   X{,m}         is X{0,m} in Ruby                  X{0,m}
#include "formats/tokenizer_regex.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "formats/tokenizer_image.h"
#include "formats/tokenizer_text.h"

// A match that needs more than this is a pattern that blows up, not a tokenizer's. The patterns of all known model
// families stay far below on any text, because no part of them backtracks over more than one run of characters.
enum { MATCH_LIMIT = 10 * 1000 * 1000, HEAP_LIMIT_KIB = 20 * 1000, MAX_GROUP_DEPTH = 64 };

#define SPACE_CLASS                                                                                                    \
    "\\x{09}-\\x{0d}\\x{20}\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}\\x{3000}"
#define NOT_SPACE_CLASS                                                                                                \
    "\\x{00}-\\x{08}\\x{0e}-\\x{1f}\\x{21}-\\x{84}\\x{86}-\\x{9f}\\x{a1}-\\x{167f}\\x{1681}-\\x{1fff}"                 \
    "\\x{200b}-\\x{2027}\\x{202a}-\\x{202e}\\x{2030}-\\x{205e}\\x{2060}-\\x{2fff}\\x{3001}-\\x{10ffff}"
#define WORD_CLASS "\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\x{b2}\\x{b3}\\x{b9}\\x{bc}-\\x{be}"
#define HEX_CLASS "0-9A-Fa-f"

struct tokenizer_regex {
    pcre2_code *code;
    pcre2_match_context *context;
    bool jit;
    char where[96];
};

struct tokenizer_regex_memory {
    pcre2_match_data *data;
};

struct translation {
    const char *in;
    size_t bytes, at; // input and position in it
    struct tokenizer_text out;
    size_t atom_start;                   // in out: what a quantifier would apply to
    size_t group_start[MAX_GROUP_DEPTH]; // in out: the open groups
    size_t depth;
    const char *where;
    struct error *err;
};

static int refuse(struct translation *t, const char *what)
{
    return error_set(t->err, ERR_MODEL, "%s: pattern: %s at byte %zu is not supported", t->where, what, t->at);
}

static int emit_bytes(struct translation *t, const char *data, size_t bytes)
{
    if (!tokenizer_text_append(&t->out, data, bytes))
        return error_set(t->err, ERR_MEMORY, "%s: out of memory", t->where);
    return 0;
}

static int emit(struct translation *t, const char *text) { return emit_bytes(t, text, strlen(text)); }

static bool next_is(const struct translation *t, const char *text)
{
    size_t bytes = strlen(text);
    return t->bytes - t->at >= bytes && !memcmp(t->in + t->at, text, bytes);
}

static bool is_digit(char c) { return c >= '0' && c <= '9'; }
static bool is_letter(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }
static bool is_hex(char c) { return is_digit(c) || (c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F'); }

static bool pattern_compiles(const char *pattern)
{
    int code;
    size_t offset;
    pcre2_code *compiled = pcre2_compile((PCRE2_SPTR)pattern, PCRE2_ZERO_TERMINATED, PCRE2_UTF, &code, &offset, NULL);
    pcre2_code_free(compiled);
    return compiled != NULL;
}

// \p{Name}, \P{Name}, \p{^Name}; t->at is behind the p.
static int translate_property(struct translation *t, bool negated)
{
    size_t begin = t->at + 1, end = begin;
    if (!next_is(t, "{"))
        return refuse(t, "a property without braces");
    if (begin < t->bytes && t->in[begin] == '^') {
        negated = !negated;
        begin = ++end;
    }
    while (end < t->bytes && (is_letter(t->in[end]) || t->in[end] == '_' || t->in[end] == ' '))
        end++;
    if (end == begin || end - begin > 40 || end == t->bytes || t->in[end] != '}')
        return refuse(t, "this property name");
    int length = (int)(end - begin);
    const char *name = t->in + begin;
    char property[64];
    snprintf(property, sizeof property, "\\p{sc:%.*s}", length, name);
    if (length <= 2 || !pattern_compiles(property)) // not a script: a category or a binary property
        snprintf(property, sizeof property, "\\p{%.*s}", length, name);
    if (negated)
        property[1] = 'P';
    t->at = end + 1;
    return emit(t, property);
}

// \xHH, \x{H...}, \uHHHH; t->at is behind the letter.
static int translate_code_point(struct translation *t, char letter)
{
    bool braces = letter == 'x' && next_is(t, "{");
    size_t begin = t->at + braces, end = begin;
    size_t most = braces ? 6 : letter == 'x' ? 2 : 4;
    while (end < t->bytes && end - begin < most && is_hex(t->in[end]))
        end++;
    if (end == begin || (letter == 'u' && end - begin != 4) || (braces && (end == t->bytes || t->in[end] != '}')))
        return refuse(t, "this hexadecimal escape");
    if (!braces && letter == 'x' && end - begin == 2 && t->in[begin] > '7')
        return refuse(t, "a byte above 7F");
    char escape[16];
    snprintf(escape, sizeof escape, "\\x{%.*s}", (int)(end - begin), t->in + begin);
    t->at = end + braces;
    return emit(t, escape);
}

// t->at is at the backslash.
static int translate_escape(struct translation *t, bool in_class)
{
    if (t->bytes - t->at < 2)
        return refuse(t, "a trailing backslash");
    char c = t->in[t->at + 1];
    size_t escape_at = t->at;
    t->at += 2;
    switch (c) {
    case 's':
        return emit(t, in_class ? SPACE_CLASS : "[" SPACE_CLASS "]");
    case 'S':
        return emit(t, in_class ? NOT_SPACE_CLASS : "[" NOT_SPACE_CLASS "]");
    case 'w':
        return emit(t, in_class ? WORD_CLASS : "[" WORD_CLASS "]");
    case 'h':
        return emit(t, in_class ? HEX_CLASS : "[" HEX_CLASS "]");
    case 'v':
        return emit(t, "\\x{0b}");
    case 'd':
        return emit(t, "\\p{Nd}");
    case 'D':
        return emit(t, "\\P{Nd}");
    case 'n':
    case 'r':
    case 't':
    case 'f':
    case 'a':
    case 'e':
        return emit_bytes(t, t->in + escape_at, 2);
    case 'x':
    case 'u':
        return translate_code_point(t, c);
    case 'p':
    case 'P':
        return translate_property(t, c == 'P');
    }
    if (!in_class)
        switch (c) {
        case 'W':
            return emit(t, "[^" WORD_CLASS "]");
        case 'H':
            return emit(t, "[^" HEX_CLASS "]");
        case 'b':
            return emit(t, "(?:(?<=[" WORD_CLASS "])(?![" WORD_CLASS "])|(?<![" WORD_CLASS "])(?=[" WORD_CLASS "]))");
        case 'B':
            return emit(t, "(?:(?<=[" WORD_CLASS "])(?=[" WORD_CLASS "])|(?<![" WORD_CLASS "])(?![" WORD_CLASS "]))");
        case 'A':
        case 'z':
        case 'Z':
            return emit_bytes(t, t->in + escape_at, 2);
        }
    if (is_letter(c) || is_digit(c)) {
        t->at = escape_at;
        char what[16];
        snprintf(what, sizeof what, "\\%c", c);
        return refuse(t, what);
    }
    if ((uint8_t)c >= 0x80) { // an escaped letter beyond ASCII is itself
        t->at = escape_at + 1;
        return 0;
    }
    return emit_bytes(t, t->in + escape_at, 2);
}

// t->at is at the opening bracket.
static int translate_class(struct translation *t)
{
    int rc = emit(t, "[");
    t->at++;
    if (!rc && next_is(t, "^")) {
        rc = emit(t, "^");
        t->at++;
    }
    if (!rc && next_is(t, "]")) { // first in the class: itself
        rc = emit(t, "\\]");
        t->at++;
    }
    while (!rc) {
        if (t->at == t->bytes)
            return refuse(t, "a bracket without end");
        if (next_is(t, "]")) {
            t->at++;
            return emit(t, "]");
        }
        if (next_is(t, "[:"))
            return refuse(t, "a POSIX bracket");
        if (next_is(t, "["))
            return refuse(t, "a nested class");
        if (next_is(t, "&&"))
            return refuse(t, "a class intersection");
        if (next_is(t, "\\"))
            rc = translate_escape(t, true);
        else
            rc = emit_bytes(t, t->in + t->at++, 1);
    }
    return rc;
}

// t->at is at the opening parenthesis.
static int translate_group(struct translation *t)
{
    static const char *const known[] = {"(?:", "(?=", "(?!", "(?>", "(?<=", "(?<!", "(?i:", "(?-i:"};
    const char *opening = "(";
    if (next_is(t, "(?i)") && t->at == 0) {
        t->at += 4;
        return emit(t, "(?i)");
    }
    if (next_is(t, "(*"))
        return refuse(t, "a verb (*...)");
    if (next_is(t, "(?")) {
        opening = NULL;
        for (size_t i = 0; i < sizeof known / sizeof *known; i++)
            if (next_is(t, known[i]))
                opening = known[i];
        if (!opening) {
            char what[32];
            size_t rest = t->bytes - t->at;
            snprintf(what, sizeof what, "group \"%.*s\"", rest < 4 ? (int)rest : 4, t->in + t->at);
            return refuse(t, what);
        }
    }
    if (t->depth == MAX_GROUP_DEPTH)
        return refuse(t, "nesting beyond 64 groups");
    t->group_start[t->depth++] = t->out.bytes;
    t->at += strlen(opening);
    return emit(t, opening);
}

// Puts "(?:" in front of the last atom and the tail behind it.
static int wrap_atom(struct translation *t, const char *tail)
{
    size_t end = t->out.bytes;
    int rc = emit(t, "(?:");
    if (rc)
        return rc;
    memmove(t->out.data + t->atom_start + 3, t->out.data + t->atom_start, end - t->atom_start);
    memcpy(t->out.data + t->atom_start, "(?:", 3);
    return emit(t, tail);
}

// t->at is at the opening brace: an interval, or else a literal brace.
static int translate_interval(struct translation *t)
{
    size_t at = t->at + 1, low = at;
    while (at < t->bytes && is_digit(t->in[at]))
        at++;
    size_t low_end = at, high = at, high_end = at;
    bool comma = at < t->bytes && t->in[at] == ',';
    if (comma) {
        high = high_end = ++at;
        while (at < t->bytes && is_digit(t->in[at]))
            high_end = ++at;
    }
    bool has_number = low_end > low || high_end > high;
    if (at == t->bytes || t->in[at] != '}' || !has_number || low_end - low > 5 || high_end - high > 5) {
        t->atom_start = t->out.bytes;
        t->at++;
        return emit(t, "\\{");
    }
    char interval[32];
    snprintf(interval, sizeof interval, "{%.*s%s%.*s}", low_end > low ? (int)(low_end - low) : 1,
             low_end > low ? t->in + low : "0", comma ? "," : "", (int)(high_end - high), t->in + high);
    int rc = emit(t, interval);
    t->at = at + 1;
    if (!rc && next_is(t, "+")) {
        t->at++;
        rc = wrap_atom(t, ")+");
    } else if (!rc && next_is(t, "?")) {
        t->at++;
        rc = comma ? emit(t, "?") : wrap_atom(t, ")?");
    }
    return rc;
}

static int translate(struct translation *t)
{
    int rc = 0;
    while (!rc && t->at < t->bytes) {
        char c = t->in[t->at];
        size_t start = t->out.bytes;
        switch (c) {
        case '\\':
            rc = translate_escape(t, false);
            t->atom_start = start;
            break;
        case '[':
            rc = translate_class(t);
            t->atom_start = start;
            break;
        case '(':
            rc = translate_group(t);
            t->atom_start = start;
            break;
        case ')':
            if (!t->depth)
                return refuse(t, "a closing parenthesis too many");
            t->atom_start = t->group_start[--t->depth];
            t->at++;
            rc = emit(t, ")");
            break;
        case '{':
            rc = translate_interval(t);
            break;
        case '*':
        case '+':
        case '?': // a following + (possessive) or ? (lazy) means the same in both
            t->at++;
            rc = emit_bytes(t, &c, 1);
            break;
        default: {
            uint32_t code_point;
            size_t length = tokenizer_text_next(t->in + t->at, t->bytes - t->at, &code_point);
            rc = emit_bytes(t, t->in + t->at, length);
            t->at += length;
            t->atom_start = start;
        }
        }
    }
    return rc;
}

// The match limits, and code: JIT-compiled where the machine allows it.
static int compile(struct tokenizer_regex *regex, const struct tokenizer_text *pattern, struct error *err)
{
    int code, rc = ERR_MEMORY;
    size_t offset;
    pcre2_compile_context *context = pcre2_compile_context_create(NULL);
    regex->context = pcre2_match_context_create(NULL);
    if (!context || !regex->context) {
        error_set(err, ERR_MEMORY, "%s: out of memory", regex->where);
        goto done;
    }
    pcre2_set_newline(context, PCRE2_NEWLINE_LF);
    pcre2_set_parens_nest_limit(context, MAX_GROUP_DEPTH + 32); // the translation adds a few levels
    pcre2_set_match_limit(regex->context, MATCH_LIMIT);
    pcre2_set_depth_limit(regex->context, MATCH_LIMIT);
    pcre2_set_heap_limit(regex->context, HEAP_LIMIT_KIB);
    uint32_t options =
        PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C | PCRE2_NO_AUTO_CAPTURE | PCRE2_NO_UTF_CHECK;
    regex->code = pcre2_compile((PCRE2_SPTR)pattern->data, pattern->bytes, options, &code, &offset, context);
    if (!regex->code && code == PCRE2_ERROR_HEAP_FAILED) {
        rc = error_set(err, ERR_MEMORY, "%s: out of memory", regex->where);
        goto done;
    }
    if (!regex->code) {
        PCRE2_UCHAR reason[128];
        pcre2_get_error_message(code, reason, sizeof reason);
        rc = error_set(err, ERR_MODEL, "%s: pattern: %s (behind \"%.*s\")", regex->where, (char *)reason,
                       (int)(offset > 60 ? 60 : offset), pattern->data + (offset > 60 ? offset - 60 : 0));
        goto done;
    }
    regex->jit = pcre2_jit_compile(regex->code, PCRE2_JIT_COMPLETE) == 0;
    rc = 0;
done:
    pcre2_compile_context_free(context);
    return rc;
}

int tokenizer_regex_open(struct tokenizer_regex **out, const char *pattern, size_t bytes, const char *where,
                         struct error *err)
{
    struct translation t = {.in = pattern, .bytes = bytes, .where = where, .err = err};
    int rc;
    struct tokenizer_regex *regex = calloc(1, sizeof *regex);
    if (!regex) {
        rc = error_set(err, ERR_MEMORY, "%s: out of memory", where);
        goto fail;
    }
    snprintf(regex->where, sizeof regex->where, "%s", where);
    if (bytes > TOKENIZER_MAX_PATTERN || bytes == 0) {
        rc = error_set(err, ERR_MODEL, "%s: the pattern has %zu bytes, wanted 1 to %d", where, bytes,
                       (int)TOKENIZER_MAX_PATTERN);
        goto fail;
    }
    if (tokenizer_text_valid_prefix(pattern, bytes) != bytes) {
        rc = error_set(err, ERR_MODEL, "%s: the pattern is not valid UTF-8", where);
        goto fail;
    }
    if ((rc = translate(&t)))
        goto fail;
    if ((rc = compile(regex, &t.out, err)))
        goto fail;
    tokenizer_text_free(&t.out);
    *out = regex;
    return 0;
fail:
    tokenizer_text_free(&t.out);
    tokenizer_regex_close(regex);
    return rc;
}

void tokenizer_regex_close(struct tokenizer_regex *regex)
{
    if (!regex)
        return;
    pcre2_code_free(regex->code);
    pcre2_match_context_free(regex->context);
    free(regex);
}

struct tokenizer_regex_memory *tokenizer_regex_memory_new(void)
{
    struct tokenizer_regex_memory *memory = calloc(1, sizeof *memory);
    if (memory && !(memory->data = pcre2_match_data_create(1, NULL))) {
        free(memory);
        return NULL;
    }
    return memory;
}

void tokenizer_regex_memory_free(struct tokenizer_regex_memory *memory)
{
    if (!memory)
        return;
    pcre2_match_data_free(memory->data);
    free(memory);
}

// The PCRE2 result: negative is an error or no match.
static int match_from(const struct tokenizer_regex *regex, pcre2_match_data *data, const char *text, size_t bytes,
                      size_t from)
{
    if (regex->jit) {
        int result = pcre2_jit_match(regex->code, (PCRE2_SPTR)text, bytes, from, 0, data, regex->context);
        if (result != PCRE2_ERROR_JIT_STACKLIMIT)
            return result;
    }
    return pcre2_match(regex->code, (PCRE2_SPTR)text, bytes, from, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, data,
                       regex->context);
}

int tokenizer_regex_next(const struct tokenizer_regex *regex, struct tokenizer_regex_memory *memory,
                         struct tokenizer_regex_walk *walk, size_t *start, size_t *end, struct error *err)
{
    while (walk->position <= walk->bytes) {
        int result = match_from(regex, memory->data, walk->text, walk->bytes, walk->position);
        if (result == PCRE2_ERROR_NOMATCH)
            return 0;
        if (result == PCRE2_ERROR_NOMEMORY)
            return error_set(err, ERR_MEMORY, "%s: out of memory", regex->where);
        if (result < 0) {
            PCRE2_UCHAR reason[128];
            pcre2_get_error_message(result, reason, sizeof reason);
            return error_set(err, ERR_MODEL, "%s: the pattern gives up on this text (%zu bytes): %s", regex->where,
                             walk->bytes, (char *)reason);
        }
        const size_t *bounds = pcre2_get_ovector_pointer(memory->data);
        *start = bounds[0];
        *end = bounds[1];
        if (*start != *end || !walk->has_last_match || walk->last_end != *end) {
            walk->position = walk->last_end = *end;
            walk->has_last_match = 1;
            return 1;
        }
        if (walk->position == walk->bytes)
            return 0;
        uint32_t code_point;
        walk->position += tokenizer_text_next(walk->text + walk->position, walk->bytes - walk->position, &code_point);
    }
    return 0;
}
