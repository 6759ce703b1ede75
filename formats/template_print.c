// Values as text: Python's str and repr, and JSON as json.dumps writes it.
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

#include "formats/template_internal.h"

// The shortest decimal number that reads back as the same double.
void print_real(char text[32], double value)
{
    char digits[40];
    if (isnan(value) || isinf(value)) {
        strcpy(text, isnan(value) ? "nan" : value < 0 ? "-inf" : "inf");
        return;
    }
    int precision = 0;
    do
        snprintf(digits, sizeof digits, "%.*e", precision, value);
    while (strtod(digits, NULL) != value && ++precision < 17);
    int exponent = atoi(strchr(digits, 'e') + 1);
    if (exponent < -4 || exponent >= 16) { // digits as they are, but without zeros that %e never writes here
        snprintf(text, 32, "%.31s", digits);
        return;
    }
    int decimals = precision - exponent;
    snprintf(text, 32, "%.*f", decimals > 1 ? decimals : 1, value);
}

static void print_int(struct builder *b, int64_t value)
{
    char text[24];
    snprintf(text, sizeof text, "%" PRId64, value);
    builder_add_text(b, text);
}

static void print_number(struct builder *b, double value)
{
    char text[32];
    print_real(text, value);
    builder_add_text(b, text);
}

// ---- repr

static bool is_printable(uint32_t c)
{
    if (c == ' ')
        return true;
    switch (utf8proc_category((utf8proc_int32_t)c)) {
    case UTF8PROC_CATEGORY_CN:
    case UTF8PROC_CATEGORY_CC:
    case UTF8PROC_CATEGORY_CF:
    case UTF8PROC_CATEGORY_CS:
    case UTF8PROC_CATEGORY_CO:
    case UTF8PROC_CATEGORY_ZS:
    case UTF8PROC_CATEGORY_ZL:
    case UTF8PROC_CATEGORY_ZP:
        return false;
    default:
        return true;
    }
}

static void repr_string(struct builder *b, const struct string *s)
{
    char quote = memchr(s->text, '\'', s->bytes) && !memchr(s->text, '"', s->bytes) ? '"' : '\'';
    builder_add(b, &quote, 1, false);
    size_t done = 0;
    for (size_t at = 0, begin; at < s->bytes;) {
        char escape[12];
        begin = at;
        uint32_t c = text_next(s->text, &at);
        if (c == (uint32_t)quote || c == '\\')
            snprintf(escape, sizeof escape, "\\%c", (char)c);
        else if (c == '\n' || c == '\r' || c == '\t')
            snprintf(escape, sizeof escape, "\\%c", c == '\n' ? 'n' : c == '\r' ? 'r' : 't');
        else if (c < 0x80 ? c >= ' ' && c != 0x7F : is_printable(c))
            continue;
        else
            snprintf(escape, sizeof escape, c < 0x100 ? "\\x%02x" : c < 0x10000 ? "\\u%04x" : "\\U%08x", c);
        builder_add_part(b, s, done, begin);
        builder_add(b, escape, strlen(escape), string_user_at(s, begin));
        done = at;
    }
    builder_add_part(b, s, done, s->bytes);
    builder_add(b, &quote, 1, false);
}

static void repr_items(struct builder *b, const struct sequence *s, const char *open, const char *close)
{
    builder_add_text(b, open);
    for (size_t i = 0; i < s->count; i++) {
        if (i)
            builder_add_text(b, ", ");
        print_repr(b, s->items[i]);
    }
    builder_add_text(b, close);
}

static void repr_dict(struct builder *b, const struct dict *d)
{
    builder_add_text(b, "{");
    for (size_t i = 0; i < d->count; i++) {
        if (i)
            builder_add_text(b, ", ");
        print_repr(b, d->entries[i].key);
        builder_add_text(b, ": ");
        print_repr(b, d->entries[i].value);
    }
    builder_add_text(b, "}");
}

static void repr_range(struct builder *b, const struct sequence *s)
{
    char text[80];
    int length = snprintf(text, sizeof text, "range(%" PRId64 ", %" PRId64, s->start, s->stop);
    if (s->step != 1)
        snprintf(text + length, sizeof text - (size_t)length, ", %" PRId64, s->step);
    builder_add_text(b, text);
    builder_add_text(b, ")");
}

void print_repr(struct builder *b, struct value v)
{
    struct run *r = b->run;
    run_enter(r);
    run_charge(r, 1);
    switch (v.kind) {
    case VALUE_MISSING:
        break;
    case VALUE_UNDEFINED:
        builder_add_text(b, "Undefined");
        break;
    case VALUE_NONE:
        builder_add_text(b, "None");
        break;
    case VALUE_BOOL:
        builder_add_text(b, v.boolean ? "True" : "False");
        break;
    case VALUE_INT:
        print_int(b, v.integer);
        break;
    case VALUE_FLOAT:
        print_number(b, v.real);
        break;
    case VALUE_STRING:
        if (v.string->markup)
            builder_add_text(b, "Markup(");
        repr_string(b, v.string);
        if (v.string->markup)
            builder_add_text(b, ")");
        break;
    case VALUE_LIST:
        repr_items(b, v.sequence, "[", "]");
        break;
    case VALUE_TUPLE:
        repr_items(b, v.sequence, "(", v.sequence->count == 1 ? ",)" : ")");
        break;
    case VALUE_RANGE:
        repr_range(b, v.sequence);
        break;
    case VALUE_KEYS:
        repr_items(b, v.sequence, "dict_keys([", "])");
        break;
    case VALUE_VALUES:
        repr_items(b, v.sequence, "dict_values([", "])");
        break;
    case VALUE_ITEMS:
        repr_items(b, v.sequence, "dict_items([", "])");
        break;
    case VALUE_DICT:
        repr_dict(b, v.dict);
        break;
    case VALUE_NAMESPACE:
        builder_add_text(b, "<Namespace ");
        repr_dict(b, v.dict);
        builder_add_text(b, ">");
        break;
    case VALUE_MACRO:
    case VALUE_LOOP:
    case VALUE_ITERATOR:
    case VALUE_FUNCTION:
    case VALUE_METHOD: // Python would print an address
        builder_add_text(b, "<");
        builder_add_text(b, value_type_name(v));
        builder_add_text(b, ">");
        break;
    }
    run_exit(r);
}

void print_str(struct builder *b, struct value v)
{
    if (v.kind == VALUE_STRING)
        builder_add_string(b, v.string);
    else if (v.kind != VALUE_UNDEFINED)
        print_repr(b, v);
}

const struct string *value_str(struct run *r, struct value v)
{
    if (v.kind == VALUE_STRING)
        return v.string;
    struct builder b = builder_start(r);
    print_str(&b, v);
    return builder_finish(&b);
}

// ---- JSON

struct json_style {
    bool ascii, sort_keys, lines;
    const struct string *indent, *item_separator, *key_separator;
};

static void json_string_text(struct builder *b, const struct string *s, bool ascii)
{
    static const char from[] = "\"\\\n\r\t\f\b", to[] = "\"\\nrtfb";
    size_t done = 0;
    builder_add_text(b, "\"");
    for (size_t at = 0, begin; at < s->bytes;) {
        char escape[16];
        begin = at;
        uint32_t c = text_next(s->text, &at);
        const char *simple = c && c < 0x80 ? strchr(from, (int)c) : NULL;
        if (simple)
            snprintf(escape, sizeof escape, "\\%c", to[simple - from]);
        else if (c >= 0x10000 && ascii)
            snprintf(escape, sizeof escape, "\\u%04x\\u%04x", 0xD800 + ((c - 0x10000) >> 10), 0xDC00 + (c & 0x3FF));
        else if (c < 0x20 || (ascii && c > 0x7E))
            snprintf(escape, sizeof escape, "\\u%04x", c);
        else
            continue;
        builder_add_part(b, s, done, begin);
        builder_add(b, escape, strlen(escape), string_user_at(s, begin));
        done = at;
    }
    builder_add_part(b, s, done, s->bytes);
    builder_add_text(b, "\"");
}

static void json_line(struct builder *b, const struct json_style *style, int level)
{
    if (!style->lines)
        return;
    builder_add_text(b, "\n");
    for (int i = 0; i < level; i++)
        builder_add_string(b, style->indent);
}

static void json_value(struct builder *b, struct value v, const struct json_style *style, int level);

// Numbers and constants as JSON has them; false for other kinds.
static bool json_scalar(struct builder *b, struct value v)
{
    if (v.kind == VALUE_NONE)
        builder_add_text(b, "null");
    else if (v.kind == VALUE_BOOL)
        builder_add_text(b, v.boolean ? "true" : "false");
    else if (v.kind == VALUE_INT)
        print_int(b, v.integer);
    else if (v.kind == VALUE_FLOAT && (isnan(v.real) || isinf(v.real)))
        builder_add_text(b, isnan(v.real) ? "NaN" : v.real < 0 ? "-Infinity" : "Infinity");
    else if (v.kind == VALUE_FLOAT)
        print_number(b, v.real);
    else
        return false;
    return true;
}

static void json_key(struct builder *b, struct value key, const struct json_style *style)
{
    if (key.kind == VALUE_STRING) {
        json_string_text(b, key.string, style->ascii);
        return;
    }
    builder_add_text(b, "\"");
    if (!json_scalar(b, key))
        run_fail(b->run, "keys must be str, int, float, bool or None, not %s", value_type_name(key));
    builder_add_text(b, "\"");
}

// The order of a dict's entries by key: insertion, so that equal keys keep their order.
static const struct dict_entry *sorted_entries(struct run *r, const struct dict *d)
{
    struct dict_entry *entries = run_alloc(r, d->count, sizeof *entries);
    for (size_t i = 0; i < d->count; i++) {
        size_t at = i;
        for (; at && value_compare(r, d->entries[i].key, entries[at - 1].key, "<") < 0; at--)
            entries[at] = entries[at - 1];
        run_charge(r, 1 + (i - at) / 16);
        entries[at] = d->entries[i];
    }
    return entries;
}

static void json_dict(struct builder *b, const struct dict *d, const struct json_style *style, int level)
{
    const struct dict_entry *entries = style->sort_keys ? sorted_entries(b->run, d) : d->entries;
    builder_add_text(b, "{");
    for (size_t i = 0; i < d->count; i++) {
        if (i)
            builder_add_string(b, style->item_separator);
        json_line(b, style, level + 1);
        json_key(b, entries[i].key, style);
        builder_add_string(b, style->key_separator);
        json_value(b, entries[i].value, style, level + 1);
    }
    if (d->count)
        json_line(b, style, level);
    builder_add_text(b, "}");
}

static void json_list(struct builder *b, const struct sequence *s, const struct json_style *style, int level)
{
    builder_add_text(b, "[");
    for (size_t i = 0; i < s->count; i++) {
        if (i)
            builder_add_string(b, style->item_separator);
        json_line(b, style, level + 1);
        json_value(b, s->items[i], style, level + 1);
    }
    if (s->count)
        json_line(b, style, level);
    builder_add_text(b, "]");
}

static void json_value(struct builder *b, struct value v, const struct json_style *style, int level)
{
    run_enter(b->run);
    run_charge(b->run, 1);
    if (v.kind == VALUE_STRING)
        json_string_text(b, v.string, style->ascii);
    else if (v.kind == VALUE_DICT)
        json_dict(b, v.dict, style, level);
    else if (v.kind == VALUE_LIST || v.kind == VALUE_TUPLE)
        json_list(b, v.sequence, style, level);
    else if (!json_scalar(b, v))
        run_fail(b->run, "Object of type %s is not JSON serializable", value_type_name(v));
    run_exit(b->run);
}

// options: ensure_ascii, indent, separators, sort_keys
struct value print_json(struct run *r, struct value v, const struct value *options)
{
    struct json_style style = {.ascii = value_given(options[0]) && value_true(r, options[0]),
                               .sort_keys = value_given(options[3]) && value_true(r, options[3])};
    struct value indent = options[1], separators = options[2];
    int64_t spaces;
    style.lines = value_given(indent) && indent.kind != VALUE_NONE;
    if (style.lines && indent.kind == VALUE_STRING) {
        style.indent = indent.string;
    } else if (style.lines) {
        spaces = value_need_int(r, indent, "the indent of tojson");
        struct builder b = builder_start(r);
        if (spaces > 0 && (uint64_t)spaces > r->arena.limit_bytes)
            run_fail(r, "an indent of %lld is too much", (long long)spaces);
        run_charge(r, spaces > 0 ? (uint64_t)spaces / 64 : 0);
        for (; spaces > 0; spaces--)
            builder_add_text(&b, " ");
        style.indent = builder_finish(&b);
    }
    if (value_given(separators) && separators.kind != VALUE_NONE) {
        struct sequence pair = value_items(r, separators);
        if (pair.count != 2 || pair.items[0].kind != VALUE_STRING || pair.items[1].kind != VALUE_STRING)
            run_fail(r, "separators of tojson must be two strings");
        style.item_separator = pair.items[0].string;
        style.key_separator = pair.items[1].string;
    } else {
        style.item_separator = value_text(r, style.lines ? "," : ", ").string;
        style.key_separator = value_text(r, ": ").string;
    }
    struct builder b = builder_start(r);
    json_value(&b, v, &style, 0);
    return value_string(builder_finish(&b));
}
