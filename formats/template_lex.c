// Template text -> tokens, with the white space control of Jinja2: trim_blocks, lstrip_blocks, '-' and '+'.
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "formats/template_internal.h"
#include "formats/utf8.h"

struct lexer {
    struct run *run;
    const char *text;
    size_t bytes, at;
    uint32_t line;
    bool line_starting; // the last tag ended with its line
    struct token *tokens;
    size_t count, capacity;
};

static struct token *push(struct lexer *l, enum token_kind kind)
{
    if (l->count == l->capacity) {
        size_t capacity = l->capacity ? 2 * l->capacity : 256;
        struct token *tokens = run_alloc(l->run, capacity, sizeof *tokens);
        if (l->count)
            memcpy(tokens, l->tokens, l->count * sizeof *tokens);
        l->tokens = tokens;
        l->capacity = capacity;
    }
    l->tokens[l->count] = (struct token){.kind = kind, .line = l->line};
    return &l->tokens[l->count++];
}

static void advance(struct lexer *l, size_t to)
{
    for (; l->at < to; l->at++)
        l->line += l->text[l->at] == '\n';
    l->run->line = l->line;
}

static bool looking_at(const struct lexer *l, size_t at, const char *text)
{
    size_t bytes = strlen(text);
    return l->bytes - at >= bytes && !memcmp(l->text + at, text, bytes);
}

// "{%", "{{" or "{#" at or behind `at`, or the end.
static size_t find_tag(const struct lexer *l, size_t at)
{
    for (; at + 1 < l->bytes; at++)
        if (l->text[at] == '{' && (l->text[at + 1] == '%' || l->text[at + 1] == '{' || l->text[at + 1] == '#'))
            return at;
    return l->bytes;
}

static bool all_space(const char *text, size_t begin, size_t end) { return text_space_end(text, end, begin) == end; }

// Where the text before a tag ends, given the tag's sign: '-' takes white space away, lstrip_blocks that of the tag's line.
static size_t text_end(const struct lexer *l, size_t begin, size_t end, char sign, bool is_print)
{
    if (sign == '-')
        return text_space_begin(l->text, begin, end);
    if (sign == '+' || is_print)
        return end;
    const char *newline = memrchr(l->text + begin, '\n', end - begin);
    size_t line = newline ? (size_t)(newline - l->text) + 1 : begin;
    if ((line > begin || l->line_starting) && all_space(l->text, line, end))
        return line;
    return end;
}

static void push_text(struct lexer *l, size_t begin, size_t end)
{
    if (end > begin) {
        struct token *token = push(l, TOKEN_TEXT);
        token->text = l->text + begin;
        token->bytes = end - begin;
    }
}

// Behind a tag's end ("%}" at `at`): white space goes with '-', one newline goes with none (trim_blocks).
static void leave_tag(struct lexer *l, size_t at, char sign, bool trim)
{
    size_t end = at + 2;
    if (sign == '-')
        end = text_space_end(l->text, l->bytes, end);
    else if (sign == 0 && trim && end < l->bytes && l->text[end] == '\n')
        end++;
    l->line_starting = end > 0 && l->text[end - 1] == '\n';
    advance(l, end);
}

// ---- inside tags

static bool is_name_byte(char c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || (uint8_t)c >= 0x80;
}

static bool is_digit(char c) { return c >= '0' && c <= '9'; }

static uint32_t hex_value(const char *text, size_t digits, bool *ok)
{
    uint32_t value = 0;
    for (size_t i = 0; i < digits; i++) {
        char c = text[i];
        int digit = is_digit(c)            ? c - '0'
                    : c >= 'a' && c <= 'f' ? c - 'a' + 10
                    : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                           : -1;
        *ok = *ok && digit >= 0;
        value = value << 4 | (uint32_t)(digit & 15);
    }
    return value;
}

// The escape behind a backslash at text[*at]; appends it.
static void unescape(struct lexer *l, struct builder *b, const char *text, size_t bytes, size_t *at)
{
    static const char from[] = "abfnrtv\\'\"", to[] = "\a\b\f\n\r\t\v\\'\"";
    char c = text[*at];
    const char *simple = c ? strchr(from, c) : NULL;
    if (simple) {
        builder_add(b, &to[simple - from], 1, false);
        ++*at;
        return;
    }
    if (c == '\n') {
        ++*at;
        return;
    }
    uint32_t code = 0;
    bool ok = true;
    if (c >= '0' && c <= '7') {
        for (int i = 0; i < 3 && *at < bytes && text[*at] >= '0' && text[*at] <= '7'; i++)
            code = code * 8 + (uint32_t)(text[(*at)++] - '0');
    } else if (c == 'x' || c == 'u' || c == 'U') {
        size_t digits = c == 'x' ? 2 : c == 'u' ? 4 : 8;
        if (bytes - *at - 1 < digits)
            run_fail(l->run, "a string has an unfinished \\%c escape", c);
        code = hex_value(text + *at + 1, digits, &ok);
        *at += 1 + digits;
        if (!ok || code > 0x10FFFF || (code >= 0xD800 && code < 0xE000))
            run_fail(l->run, "a string has a \\%c escape that is no character", c);
    } else if (c == 'N') {
        run_fail(l->run, "\\N{...} in strings is not supported");
    } else {
        builder_add_text(b, "\\");
        return;
    }
    char out[4];
    builder_add(b, out, utf8_put(out, code), false);
}

static void lex_string(struct lexer *l)
{
    char quote = l->text[l->at];
    size_t end = l->at + 1;
    while (end < l->bytes && l->text[end] != quote)
        end += l->text[end] == '\\' ? 2 : 1;
    if (end >= l->bytes)
        run_fail(l->run, "a string has no end");
    struct token *token = push(l, TOKEN_STRING);
    const char *text = l->text + l->at + 1;
    size_t bytes = end - l->at - 1;
    struct builder b = builder_start(l->run);
    for (size_t at = 0; at < bytes;) {
        const char *escape = memchr(text + at, '\\', bytes - at);
        size_t plain = escape ? (size_t)(escape - text) : bytes;
        builder_add(&b, text + at, plain - at, false);
        at = plain;
        if (escape) {
            at++;
            unescape(l, &b, text, bytes, &at);
        }
    }
    const struct string *s = builder_finish(&b);
    token->text = s->text;
    token->bytes = s->bytes;
    advance(l, end + 1);
}

static size_t skip_digits(const struct lexer *l, size_t at)
{
    while (at < l->bytes && (is_digit(l->text[at]) || (l->text[at] == '_' && is_digit(l->text[at - 1]) &&
                                                       at + 1 < l->bytes && is_digit(l->text[at + 1]))))
        at++;
    return at;
}

static void lex_number(struct lexer *l)
{
    char digits[400];
    size_t count = 0, end = l->at;
    int base = 10;
    bool real = false;
    if (l->text[end] == '0' && end + 1 < l->bytes && strchr("xXoObB", l->text[end + 1])) {
        char kind = l->text[end + 1] | 32;
        base = kind == 'x' ? 16 : kind == 'o' ? 8 : 2;
        end += 2;
        while (end < l->bytes && (is_name_byte(l->text[end])))
            end++;
        l->at += 2;
    } else {
        end = skip_digits(l, end);
        bool after_dot = l->count && l->tokens[l->count - 1].kind == TOKEN_DOT && l->text[l->at - 1] == '.';
        if (!after_dot && end + 1 < l->bytes && l->text[end] == '.' && is_digit(l->text[end + 1])) {
            real = true;
            end = skip_digits(l, end + 1);
        }
        if (!after_dot && end < l->bytes && (l->text[end] | 32) == 'e') {
            size_t sign = end + 1 < l->bytes && (l->text[end + 1] == '+' || l->text[end + 1] == '-') ? 2 : 1;
            if (end + sign < l->bytes && is_digit(l->text[end + sign])) {
                real = true;
                end = skip_digits(l, end + sign);
            }
        }
    }
    for (size_t i = l->at; i < end && count + 1 < sizeof digits; i++)
        if (l->text[i] != '_')
            digits[count++] = l->text[i];
    digits[count] = 0;
    struct token *token = push(l, real ? TOKEN_REAL : TOKEN_INT);
    char *rest;
    errno = 0;
    if (real)
        token->value = value_real(strtod(digits, &rest));
    else
        token->value = value_int(strtoll(digits, &rest, base));
    if (*rest || !count || (!real && errno) || end - l->at >= sizeof digits)
        run_fail(l->run, "the number %.40s cannot be used (integers have 64 bits)", digits);
    advance(l, end);
}

static bool lex_operator(struct lexer *l, char *brackets, int *depth)
{
    static const struct {
        char text[3];
        enum token_kind kind;
    } operators[] = {
        {"//", TOKEN_FLOORDIV}, {"**", TOKEN_POW},     {"==", TOKEN_EQ},      {"!=", TOKEN_NE},    {">=", TOKEN_GE},
        {"<=", TOKEN_LE},       {"+", TOKEN_ADD},      {"-", TOKEN_SUB},      {"*", TOKEN_MUL},    {"/", TOKEN_DIV},
        {"%", TOKEN_MOD},       {"~", TOKEN_TILDE},    {">", TOKEN_GT},       {"<", TOKEN_LT},     {"(", TOKEN_LPAREN},
        {")", TOKEN_RPAREN},    {"[", TOKEN_LBRACKET}, {"]", TOKEN_RBRACKET}, {"{", TOKEN_LBRACE}, {"}", TOKEN_RBRACE},
        {".", TOKEN_DOT},       {":", TOKEN_COLON},    {",", TOKEN_COMMA},    {"|", TOKEN_PIPE},   {"=", TOKEN_ASSIGN},
        {";", TOKEN_SEMICOLON},
    };
    for (size_t i = 0; i < sizeof operators / sizeof *operators; i++) {
        if (!looking_at(l, l->at, operators[i].text))
            continue;
        char c = operators[i].text[0];
        if (c == '(' || c == '[' || c == '{') {
            if (*depth == TEMPLATE_MAX_NESTING)
                run_fail(l->run, "brackets are nested more than %d deep", TEMPLATE_MAX_NESTING);
            brackets[(*depth)++] = c == '(' ? ')' : c == '[' ? ']' : '}';
        } else if (c == ')' || c == ']' || c == '}') {
            if (*depth == 0)
                run_fail(l->run, "unexpected '%c'", c);
            if (brackets[--*depth] != c)
                run_fail(l->run, "unexpected '%c', expected '%c'", c, brackets[*depth]);
        }
        push(l, operators[i].kind);
        advance(l, l->at + strlen(operators[i].text));
        return true;
    }
    return false;
}

// Tokens up to the end of a tag, which is "%}" or "}}".
static void lex_tag(struct lexer *l, bool is_print)
{
    const char *end = is_print ? "}}" : "%}";
    char brackets[TEMPLATE_MAX_NESTING];
    int depth = 0;
    uint32_t begin_line = l->line;
    for (;;) {
        advance(l, text_space_end(l->text, l->bytes, l->at));
        if (l->at >= l->bytes) {
            l->run->line = begin_line;
            run_fail(l->run, "the tag that begins here has no end '%s'", end);
        }
        char c = l->text[l->at];
        if (!depth) {
            char sign = (c == '-' || (c == '+' && !is_print)) && looking_at(l, l->at + 1, end) ? c : 0;
            if (sign || looking_at(l, l->at, end)) {
                push(l, is_print ? TOKEN_PRINT_END : TOKEN_BLOCK_END);
                leave_tag(l, l->at + (sign != 0), sign, !is_print);
                return;
            }
        }
        if (is_digit(c)) {
            lex_number(l);
        } else if (c == '\'' || c == '"') {
            lex_string(l);
        } else if (is_name_byte(c)) {
            size_t stop = l->at;
            while (stop < l->bytes && is_name_byte(l->text[stop]))
                stop++;
            struct token *token = push(l, TOKEN_NAME);
            token->text = l->text + l->at;
            token->bytes = stop - l->at;
            advance(l, stop);
        } else if (!lex_operator(l, brackets, &depth)) {
            run_fail(l->run, "unexpected character '%c'", c);
        }
    }
}

static void lex_comment(struct lexer *l)
{
    const char *end = memmem(l->text + l->at, l->bytes - l->at, "#}", 2);
    if (!end)
        run_fail(l->run, "a comment has no end '#}'");
    size_t at = (size_t)(end - l->text);
    char sign = at > l->at && (l->text[at - 1] == '-' || l->text[at - 1] == '+') ? l->text[at - 1] : 0;
    leave_tag(l, at, sign, true);
}

// "{%- raw %}" at `at`: the byte behind it, else 0. What follows "-%}" is trimmed, a newline behind "%}" stays.
static size_t raw_begin(const struct lexer *l, size_t at)
{
    at += 2;
    at += at < l->bytes && (l->text[at] == '-' || l->text[at] == '+');
    at = text_space_end(l->text, l->bytes, at);
    if (!looking_at(l, at, "raw"))
        return 0;
    at = text_space_end(l->text, l->bytes, at + 3);
    if (looking_at(l, at, "-%}"))
        return text_space_end(l->text, l->bytes, at + 3);
    return looking_at(l, at, "%}") ? at + 2 : 0;
}

// From behind {% raw %} to behind {% endraw %}.
static void lex_raw(struct lexer *l)
{
    for (size_t tag = l->at; tag + 1 < l->bytes; tag++) {
        if (!looking_at(l, tag, "{%"))
            continue;
        size_t at = tag + 2;
        char sign = at < l->bytes && (l->text[at] == '-' || l->text[at] == '+') ? l->text[at] : 0;
        at = text_space_end(l->text, l->bytes, at + (sign != 0));
        if (!looking_at(l, at, "endraw"))
            continue;
        at = text_space_end(l->text, l->bytes, at + 6);
        char end_sign = at < l->bytes && (l->text[at] == '-' || l->text[at] == '+') ? l->text[at] : 0;
        if (!looking_at(l, at + (end_sign != 0), "%}"))
            continue;
        push_text(l, l->at, text_end(l, l->at, tag, sign, false));
        leave_tag(l, at + (end_sign != 0), end_sign, true);
        return;
    }
    run_fail(l->run, "{%% raw %%} has no {%% endraw %%}");
}

// Newlines become '\n', and one at the very end goes.
static void normalize(struct lexer *l, const char *text, size_t bytes)
{
    char *copy = run_alloc(l->run, bytes + 1, 1);
    size_t length = 0;
    for (size_t i = 0; i < bytes; i++) {
        copy[length++] = text[i] == '\r' ? '\n' : text[i];
        i += text[i] == '\r' && i + 1 < bytes && text[i + 1] == '\n';
    }
    length -= length && copy[length - 1] == '\n';
    l->text = copy;
    l->bytes = length;
}

struct token_array template_lex(struct run *r, const char *text, size_t bytes)
{
    struct lexer l = {.run = r, .line = 1, .line_starting = true};
    normalize(&l, text, bytes);
    while (l.at < l.bytes) {
        size_t tag = find_tag(&l, l.at);
        if (tag == l.bytes) {
            push_text(&l, l.at, l.bytes);
            break;
        }
        char kind = l.text[tag + 1];
        char sign = tag + 2 < l.bytes && (l.text[tag + 2] == '-' || l.text[tag + 2] == '+') ? l.text[tag + 2] : 0;
        push_text(&l, l.at, text_end(&l, l.at, tag, sign, kind == '{'));
        size_t raw = kind == '%' ? raw_begin(&l, tag) : 0;
        if (raw) {
            l.line_starting = l.text[raw - 1] == '\n';
            advance(&l, raw);
            lex_raw(&l);
            continue;
        }
        advance(&l, tag + 2 + (sign != 0));
        if (kind == '#') {
            lex_comment(&l);
            continue;
        }
        push(&l, kind == '{' ? TOKEN_PRINT_BEGIN : TOKEN_BLOCK_BEGIN);
        lex_tag(&l, kind == '{');
    }
    push(&l, TOKEN_END);
    return (struct token_array){l.tokens, l.count};
}
