// The filters of Jinja2 that chat templates use: of text and numbers. Those of sequences: template_items.c.
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

#include "formats/template_internal.h"

#define FILTER(name)                                                                                                   \
    static struct value name(struct run *r, struct value self, const struct value *v, const struct args *args)
#define UNUSED (void)r, (void)self, (void)v, (void)args

static bool flag(struct run *r, struct value v) { return value_given(v) && value_true(r, v); }

static int64_t int_or(struct run *r, struct value v, int64_t otherwise)
{
    return value_given(v) && v.kind != VALUE_NONE ? value_need_int(r, v, "an argument") : otherwise;
}

static const struct string *need_string(struct run *r, struct value v, const char *filter)
{
    value_refuse_undefined(r, v);
    if (v.kind != VALUE_STRING)
        run_fail(r, "the filter '%s' takes a string, not %s", filter, value_type_name(v));
    return v.string;
}

// ---- text

FILTER(filter_string)
{
    UNUSED;
    return value_string(value_str(r, self));
}
FILTER(filter_upper)
{
    UNUSED;
    return strings_case(r, value_str(r, self), 'u');
}
FILTER(filter_lower)
{
    UNUSED;
    return strings_case(r, value_str(r, self), 'l');
}
FILTER(filter_capitalize)
{
    UNUSED;
    return strings_case(r, value_str(r, self), 'c');
}
FILTER(filter_title)
{
    UNUSED;
    return strings_title(r, value_str(r, self), true);
}
FILTER(filter_trim)
{
    UNUSED;
    return strings_trim(r, value_str(r, self), v[0], true, true);
}
FILTER(filter_tojson)
{
    UNUSED;
    return print_json(r, self, v);
}

FILTER(filter_safe)
{
    UNUSED;
    struct string *s = run_alloc(r, 1, sizeof *s);
    *s = *value_str(r, self);
    s->markup = true;
    return value_string(s);
}

FILTER(filter_escape)
{
    UNUSED;
    const struct string *s = value_str(r, self);
    return value_string(s->markup ? s : strings_escape(r, s));
}

FILTER(filter_replace)
{
    UNUSED;
    return strings_replace(r, value_str(r, self), value_str(r, v[0]), value_str(r, v[1]), int_or(r, v[2], -1));
}

FILTER(filter_center)
{
    UNUSED;
    struct value width = value_given(v[0]) ? v[0] : value_int(80);
    struct value text = value_string(value_str(r, self));
    return call_value(r, call_attribute(r, text, value_text(r, "center").string),
                      &(struct args){&width, 1, NULL, NULL, 0});
}

FILTER(filter_indent)
{
    UNUSED;
    const struct string *s = need_string(r, self, "indent"), *indent;
    if (value_given(v[0]) && v[0].kind == VALUE_STRING) {
        indent = v[0].string;
    } else {
        struct value times = value_int(int_or(r, v[0], 4));
        indent = eval_binary(r, TOKEN_MUL, value_text(r, " "), times).string;
    }
    bool first = flag(r, v[1]), blank = flag(r, v[2]);
    struct sequence lines = value_items(r, strings_lines(r, s, false));
    struct builder b = builder_start(r);
    size_t count = lines.count;
    // A newline is put behind the text beforehand: a text that ends without one has its last line all the same.
    bool ends_open = !s->bytes;
    if (s->bytes) {
        struct value with_newline = eval_binary(r, TOKEN_ADD, value_string(s), value_text(r, "\n"));
        lines = value_items(r, strings_lines(r, with_newline.string, false));
        count = lines.count;
    }
    for (size_t i = 0; i < count || (ends_open && i == 0); i++) {
        const struct string *line = ends_open ? s : lines.items[i].string;
        if (i)
            builder_add_text(&b, "\n");
        if (i ? blank || line->bytes : first)
            builder_add_string(&b, indent);
        builder_add_string(&b, line);
    }
    return value_string(builder_finish(&b));
}

FILTER(filter_wordcount)
{
    UNUSED;
    const struct string *s = value_str(r, self);
    int64_t words = 0;
    bool inside = false;
    run_charge_bytes(r, s->bytes * 8);
    for (size_t at = 0; at < s->bytes;) {
        uint32_t c = text_next(s->text, &at);
        utf8proc_category_t kind = utf8proc_category((utf8proc_int32_t)c);
        bool word = c == '_' || (kind >= UTF8PROC_CATEGORY_LU && kind <= UTF8PROC_CATEGORY_LO) ||
                    (kind >= UTF8PROC_CATEGORY_ND && kind <= UTF8PROC_CATEGORY_NO);
        words += word && !inside;
        inside = word;
    }
    return value_int(words);
}

FILTER(filter_truncate)
{
    UNUSED;
    const struct string *end = value_given(v[2]) ? value_str(r, v[2]) : value_text(r, "...").string;
    int64_t length = int_or(r, v[0], 255), leeway = int_or(r, v[3], 5);
    if (length < (int64_t)end->chars || leeway < 0)
        run_fail(r, "the length %lld of truncate is too small", (long long)length);
    if ((int64_t)value_length(r, self) - leeway <= length)
        return self;
    const struct string *s = need_string(r, self, "truncate");
    size_t cut = string_offset(r, s, (size_t)length - end->chars);
    const char *space = flag(r, v[1]) || !cut ? NULL : memrchr(s->text, ' ', cut);
    run_charge_bytes(r, cut);
    cut = space ? (size_t)(space - s->text) : cut;
    return eval_binary(r, TOKEN_ADD, value_string(string_part(r, s, 0, cut)), value_string(end));
}

FILTER(filter_format)
{
    UNUSED;
    if (args->count && args->num_named)
        run_fail(r, "format takes arguments with names or without, not both");
    struct value arguments = value_sequence(r, VALUE_TUPLE, args->count);
    for (size_t i = 0; i < args->count; i++)
        arguments.sequence->items[i] = args->values[i];
    if (args->num_named) {
        arguments = (struct value){.kind = VALUE_DICT, .dict = dict_new(r)};
        for (size_t i = 0; i < args->num_named; i++)
            dict_set(r, arguments.dict, value_string(args->names[i]), args->named[i]);
    }
    return format_percent(r, value_str(r, self), arguments);
}

// ---- numbers

static bool parse_real(struct run *r, const struct string *s, double *out)
{
    run_charge_bytes(r, s->bytes);
    char text[128];
    size_t count = 0, begin = text_space_end(s->text, s->bytes, 0), end = text_space_begin(s->text, begin, s->bytes);
    for (size_t i = begin; i < end; i++) {
        if (count + 1 == sizeof text || !strchr("0123456789+-._eEinfatyINFATY", s->text[i]) || !s->text[i])
            return false;
        if (s->text[i] != '_')
            text[count++] = s->text[i];
    }
    text[count] = 0;
    char *rest;
    *out = strtod(text, &rest);
    return count > 0 && !*rest;
}

static bool parse_int(struct run *r, const struct string *s, int64_t base, int64_t *out)
{
    run_charge_bytes(r, s->bytes);
    char text[128];
    size_t count = 0, begin = text_space_end(s->text, s->bytes, 0), end = text_space_begin(s->text, begin, s->bytes);
    for (size_t i = begin; i < end; i++) {
        bool underscore = s->text[i] == '_' && i > begin && s->text[i - 1] != '_' && i + 1 < end;
        if (count + 1 == sizeof text || !s->text[i])
            return false;
        if (!underscore)
            text[count++] = s->text[i];
    }
    text[count] = 0;
    size_t digits = strspn(text, "+-");
    if (digits > 1 || !count || strpbrk(text + digits, " +-\t\n"))
        return false;
    const char *prefix = base == 16 ? "xX" : base == 8 ? "oO" : base == 2 ? "bB" : "";
    if (text[digits] == '0' && text[digits + 1] && strchr(prefix, text[digits + 1]))
        memmove(text + digits, text + digits + 2, count - digits - 1);
    if (!text[digits])
        return false;
    char *rest;
    errno = 0;
    *out = strtoll(text, &rest, (int)base);
    if (!*rest && errno)
        run_fail(r, "the integer %.40s does not fit 64 bits", text);
    return !*rest;
}

FILTER(filter_int)
{
    UNUSED;
    int64_t i, base = int_or(r, v[1], 10);
    double x;
    value_refuse_undefined(r, self);
    if (base < 2 || base > 36)
        run_fail(r, "the base of int must be from 2 to 36");
    if (value_as_int(self, &i))
        return value_int(i);
    if (self.kind == VALUE_STRING && parse_int(r, self.string, base, &i))
        return value_int(i);
    bool real = self.kind == VALUE_FLOAT || (self.kind == VALUE_STRING && parse_real(r, self.string, &x));
    if (self.kind == VALUE_FLOAT)
        x = self.real;
    if (!real || !isfinite(x))
        return value_given(v[0]) ? v[0] : value_int(0);
    if (!(fabs(x) < 0x1p63))
        run_fail(r, "the number does not fit 64 bits");
    return value_int((int64_t)x);
}

FILTER(filter_float)
{
    UNUSED;
    int64_t i;
    double x;
    value_refuse_undefined(r, self);
    if (value_is_number(self, &i, &x) || (self.kind == VALUE_STRING && parse_real(r, self.string, &x)))
        return value_real(x);
    return value_given(v[0]) ? v[0] : value_real(0);
}

FILTER(filter_abs)
{
    UNUSED;
    int64_t i;
    double x;
    value_refuse_undefined(r, self);
    if (!value_is_number(self, &i, &x))
        run_fail(r, "bad operand type for abs(): '%s'", value_type_name(self));
    if (self.kind == VALUE_FLOAT)
        return value_real(fabs(x));
    return i < 0 ? eval_binary(r, TOKEN_SUB, value_int(0), value_int(i)) : value_int(i);
}

FILTER(filter_round)
{
    UNUSED;
    int64_t i, precision = int_or(r, v[0], 0);
    double x;
    const char *methods[] = {"common", "ceil", "floor"};
    size_t method = 0;
    value_refuse_undefined(r, self);
    while (value_given(v[1]) && method < 3 && !(v[1].kind == VALUE_STRING && string_is(v[1].string, methods[method])))
        method++;
    if (method == 3)
        run_fail(r, "method must be common, ceil or floor");
    if (!value_is_number(self, &i, &x))
        run_fail(r, "type %s doesn't define __round__ method", value_type_name(self));
    if (precision < -300 || precision > 300)
        run_fail(r, "a precision of %lld is not supported", (long long)precision);
    if (method == 0) {
        char text[400];
        if (self.kind != VALUE_FLOAT && precision >= 0)
            return value_int(i);
        if (self.kind != VALUE_FLOAT)
            run_fail(r, "integers cannot be rounded to a negative precision");
        if (precision < 0) {
            double unit = pow(10, (double)-precision);
            return value_real(rint(x / unit) * unit);
        }
        snprintf(text, sizeof text, "%.*f", (int)(precision > 60 ? 60 : precision), x);
        return value_real(precision > 22 ? x : strtod(text, NULL));
    }
    double unit = pow(10, (double)precision), scaled = x * unit;
    double whole = method == 1 ? ceil(scaled) : floor(scaled);
    return value_real(whole / unit);
}

const struct callable *template_filter(const char *name)
{
    static const struct callable filters[] = {
        {"tojson", filter_tojson, "ensure_ascii indent separators sort_keys", 0},
        {"trim", filter_trim, "chars", 0},
        {"string", filter_string, "", 0},
        {"safe", filter_safe, "", 0},
        {"lower", filter_lower, "", 0},
        {"upper", filter_upper, "", 0},
        {"capitalize", filter_capitalize, "", 0},
        {"title", filter_title, "", 0},
        {"replace", filter_replace, "old new count", 2},
        {"indent", filter_indent, "width first blank", 0},
        {"int", filter_int, "default base", 0},
        {"float", filter_float, "default", 0},
        {"abs", filter_abs, "", 0},
        {"round", filter_round, "precision method", 0},
        {"escape", filter_escape, "", 0},
        {"e", filter_escape, "", 0},
        {"format", filter_format, NULL, 0},
        {"truncate", filter_truncate, "length killwords end leeway", 0},
        {"wordcount", filter_wordcount, "", 0},
        {"center", filter_center, "width", 0},
        {NULL, NULL, NULL, 0},
    };
    const struct callable *filter = callable_find(filters, name);
    return filter ? filter : template_items_filter(name);
}
