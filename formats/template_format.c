// Python's two ways of formatting: "%s" % value and "{}".format(value). A value keeps its marks.
#include <ctype.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "formats/template_internal.h"

enum { MAX_WIDTH = 1 << 20, MAX_PRECISION = 100 };

struct layout {       // of one value
    const char *fill; // one character of the format
    size_t fill_bytes;
    char align; // '<', '>', '^', '=', or 0
    char sign;  // '+', ' ', or 0
    bool alternate;
    char grouping;            // ',' or '_', or 0
    int64_t width, precision; // -1: none
    char type;                // or 0
    bool user;                // the layout is the user's, and so is what it adds: fill, signs, separators
};

static bool from_user(const struct string *s, size_t begin, size_t end) // a byte of [begin, end), which is not empty
{
    return s->marks ? memchr(s->marks + begin, 1, end - begin) != NULL : s->user;
}

static void add_fill(struct builder *b, const struct layout *layout, int64_t count)
{
    run_charge(b->run, (uint64_t)(count > 0 ? count : 0) / 64);
    for (; count > 0; count--)
        builder_add(b, layout->fill, layout->fill_bytes, layout->user);
}

// The text within the width. sign_bytes: so many bytes stay in front of the fill with '='.
static void add_aligned(struct builder *b, const struct string *s, const struct layout *layout, char align,
                        size_t sign_bytes)
{
    int64_t space = layout->width > (int64_t)s->chars ? layout->width - (int64_t)s->chars : 0;
    int64_t left = align == '<' ? 0 : align == '^' ? space / 2 : space;
    size_t lead = align == '=' ? sign_bytes : 0;
    builder_add_part(b, s, 0, lead);
    add_fill(b, layout, left);
    builder_add_part(b, s, lead, s->bytes);
    add_fill(b, layout, space - left);
}

// ---- numbers

static void group_digits(char *text, size_t size, char separator, int every)
{
    char grouped[700];
    size_t begin = strspn(text, "+- "), digits = strspn(text + begin, "0123456789abcdefABCDEF"), length = 0;
    memcpy(grouped, text, begin);
    length = begin;
    for (size_t i = 0; i < digits && length + 2 < sizeof grouped; i++) {
        if (i && (digits - i) % (size_t)every == 0)
            grouped[length++] = separator;
        grouped[length++] = text[begin + i];
    }
    snprintf(grouped + length, sizeof grouped - length, "%s", text + begin + digits);
    snprintf(text, size, "%s", grouped);
}

static void integer_text(char *text, size_t size, int64_t value, const struct layout *layout)
{
    char digits[72];
    uint64_t magnitude = value < 0 ? 0 - (uint64_t)value : (uint64_t)value;
    const char *sign = value < 0 ? "-" : layout->sign == '+' ? "+" : layout->sign == ' ' ? " " : "", *prefix = "";
    switch (layout->type) {
    case 'x':
        snprintf(digits, sizeof digits, "%" PRIx64, magnitude);
        prefix = "0x";
        break;
    case 'X':
        snprintf(digits, sizeof digits, "%" PRIX64, magnitude);
        prefix = "0X";
        break;
    case 'o':
        snprintf(digits, sizeof digits, "%" PRIo64, magnitude);
        prefix = "0o";
        break;
    case 'b': {
        size_t length = 0;
        for (int bit = 63; bit >= 0; bit--)
            if (magnitude >> bit || bit == 0)
                digits[length++] = (char)('0' + (magnitude >> bit & 1));
        digits[length] = 0;
        prefix = "0b";
        break;
    }
    default:
        snprintf(digits, sizeof digits, "%" PRIu64, magnitude);
    }
    snprintf(text, size, "%s%s%s", sign, layout->alternate ? prefix : "", digits);
    if (layout->grouping)
        group_digits(text, size, layout->grouping, strchr("xXob", layout->type ? layout->type : 'd') ? 4 : 3);
}

static void real_text(char *text, size_t size, double value, const struct layout *layout)
{
    const char *sign = signbit(value) ? "-" : layout->sign == '+' ? "+" : layout->sign == ' ' ? " " : "";
    int precision = (int)(layout->precision < 0 ? 6 : layout->precision);
    char format[16] = "%.*f", body[512];
    double magnitude = fabs(value);
    if (layout->type == 0 && layout->precision < 0) {
        print_real(body, magnitude);
    } else if (layout->type == '%') {
        snprintf(body, sizeof body, "%.*f%%", precision, magnitude * 100);
    } else {
        char type = layout->type ? layout->type : 'g';
        snprintf(format, sizeof format, layout->alternate ? "%%#.*%c" : "%%.*%c", type == 'n' ? 'g' : type);
        snprintf(body, sizeof body, format, type == 'g' && precision == 0 ? 1 : precision, magnitude);
        if (layout->type == 0 && isfinite(value) && !strpbrk(body, ".e"))
            strcat(body, ".0"); // without a type a real number still looks like one
    }
    snprintf(text, size, "%s%s", isnan(value) && *sign == '-' ? "" : sign, body);
    if (layout->grouping && isfinite(value))
        group_digits(text, size, layout->grouping, 3);
}

static void add_number(struct builder *b, struct value v, const struct layout *layout, char default_align)
{
    char text[700];
    int64_t i = 0;
    double x = 0;
    value_is_number(v, &i, &x);
    if (layout->precision > MAX_PRECISION)
        run_fail(b->run, "a precision above %d is not supported", MAX_PRECISION);
    if (v.kind == VALUE_FLOAT || (layout->type && strchr("eEfFgG%", layout->type)))
        real_text(text, sizeof text, x, layout);
    else
        integer_text(text, sizeof text, i, layout);
    size_t sign = strspn(text, "+- ");
    if (layout->alternate && text[sign] == '0' && strchr("xXob", text[sign + 1]) && text[sign + 1])
        sign += 2;
    const struct string *s = string_new(b->run, text, strlen(text), layout->user);
    add_aligned(b, s, layout, layout->align ? layout->align : default_align, sign);
}

static void add_text(struct builder *b, const struct string *s, const struct layout *layout)
{
    if (layout->precision >= 0 && (uint64_t)layout->precision < s->chars)
        s = string_part(b->run, s, 0, string_offset(b->run, s, (size_t)layout->precision));
    add_aligned(b, s, layout, layout->align ? layout->align : '<', 0);
}

// ---- "%"

struct percent {
    struct run *run;
    const struct string *format;
    size_t at;
    struct value args;
    size_t used; // of a tuple, or 1 when a single value was taken
    bool by_name;
};

static struct value next_argument(struct percent *p)
{
    size_t count = p->args.kind == VALUE_TUPLE ? p->args.sequence->count : 1;
    if (p->used >= count)
        run_fail(p->run, "not enough arguments for format string");
    p->used++;
    return p->args.kind == VALUE_TUPLE ? p->args.sequence->items[p->used - 1] : p->args;
}

static char percent_peek(struct percent *p)
{
    if (p->at >= p->format->bytes)
        run_fail(p->run, "incomplete format");
    return p->format->text[p->at];
}

static int64_t percent_number(struct percent *p)
{
    int64_t number = 0;
    if (percent_peek(p) == '*') {
        p->at++;
        return value_need_int(p->run, next_argument(p), "a width");
    }
    while (isdigit((unsigned char)percent_peek(p)) && number <= MAX_WIDTH)
        number = number * 10 + (p->format->text[p->at++] - '0');
    if (number > MAX_WIDTH)
        run_fail(p->run, "a width above %d is not supported", MAX_WIDTH);
    return number;
}

static struct value percent_name(struct percent *p) // behind "%("
{
    size_t begin = ++p->at;
    for (int depth = 1; depth; p->at++)
        depth += percent_peek(p) == '(' ? 1 : percent_peek(p) == ')' ? -1 : 0;
    if (p->args.kind != VALUE_DICT)
        run_fail(p->run, "format requires a mapping");
    struct value key = value_string(string_part(p->run, p->format, begin, p->at - 1));
    const struct value *found = dict_get(p->run, p->args.dict, key);
    if (!found)
        run_fail(p->run, "the key '%.*s' of a format is not in the mapping", (int)key.string->bytes, key.string->text);
    p->by_name = true;
    return *found;
}

static void add_percent(struct builder *b, struct value v, struct layout *layout)
{
    struct run *r = b->run;
    int64_t i;
    double x;
    switch (layout->type) {
    case 's':
    case 'r':
    case 'a': {
        struct builder text = builder_start(r);
        if (layout->type == 's')
            print_str(&text, v);
        else
            print_repr(&text, v);
        layout->align = layout->align == '<' ? '<' : '>';
        layout->fill = " ";
        add_text(b, builder_finish(&text), layout);
        return;
    }
    case 'd':
    case 'i':
    case 'u':
        if (!value_is_number(v, &i, &x))
            run_fail(r, "%%%c format: a real number is required, not %s", layout->type, value_type_name(v));
        if (v.kind == VALUE_FLOAT && !(fabs(x) < 0x1p63))
            run_fail(r, "the number does not fit 64 bits");
        v = v.kind == VALUE_FLOAT ? value_int((int64_t)x) : v;
        layout->precision = -1;
        layout->type = 'd';
        break;
    case 'x':
    case 'X':
    case 'o':
        if (!value_as_int(v, &i))
            run_fail(r, "%%%c format: an integer is required, not %s", layout->type, value_type_name(v));
        layout->precision = -1;
        break;
    case 'e':
    case 'E':
    case 'f':
    case 'F':
    case 'g':
    case 'G':
        if (!value_is_number(v, &i, &x))
            run_fail(r, "must be real number, not %s", value_type_name(v));
        break;
    case 'c':
        if (v.kind == VALUE_STRING && v.string->chars == 1) {
            layout->fill = " ";
            layout->align = layout->align == '<' ? '<' : '>';
            add_text(b, v.string, layout);
            return;
        }
        // fall through
    default:
        run_fail(r, "the format character '%c' is not supported here", layout->type);
    }
    add_number(b, v, layout, '>');
}

static void percent_item(struct percent *p, struct builder *b) // behind '%'
{
    struct layout layout = {.fill = " ", .fill_bytes = 1, .width = -1, .precision = -1};
    struct value v = {.kind = VALUE_MISSING};
    size_t begin = p->at;
    if (percent_peek(p) == '(')
        v = percent_name(p);
    for (; strchr("-+ #0", percent_peek(p)) && percent_peek(p); p->at++) {
        char flag = percent_peek(p);
        if (flag == '-')
            layout.align = '<';
        else if (flag == '+' || (flag == ' ' && layout.sign != '+'))
            layout.sign = flag;
        else if (flag == '#')
            layout.alternate = true;
        else if (flag == '0')
            layout.fill = "0";
    }
    layout.width = percent_number(p);
    if (layout.width < -MAX_WIDTH)
        run_fail(p->run, "a width above %d is not supported", MAX_WIDTH);
    if (layout.width < 0) {
        layout.width = -layout.width;
        layout.align = '<';
    }
    if (layout.width > MAX_WIDTH)
        run_fail(p->run, "a width above %d is not supported", MAX_WIDTH);
    if (layout.align == '<')
        layout.fill = " ";
    else if (*layout.fill == '0')
        layout.align = '=';
    if (percent_peek(p) == '.') {
        p->at++;
        layout.precision = percent_number(p);
        layout.precision = layout.precision < 0 ? 0 : layout.precision;
    }
    while (strchr("hlL", percent_peek(p)) && percent_peek(p))
        p->at++;
    layout.type = percent_peek(p);
    p->at++;
    if (layout.type == '%') {
        builder_add_part(b, p->format, p->at - 1, p->at);
        return;
    }
    layout.user = from_user(p->format, begin, p->at);
    add_percent(b, value_given(v) ? v : next_argument(p), &layout);
}

struct value format_percent(struct run *r, const struct string *format, struct value args)
{
    struct percent p = {.run = r, .format = format, .args = args};
    struct builder b = builder_start(r);
    while (p.at < format->bytes) {
        const char *percent = memchr(format->text + p.at, '%', format->bytes - p.at);
        size_t end = percent ? (size_t)(percent - format->text) : format->bytes;
        builder_add_part(&b, format, p.at, end);
        p.at = end + 1;
        if (percent)
            percent_item(&p, &b);
        run_charge(r, 1);
    }
    bool is_mapping =
        args.kind == VALUE_DICT || args.kind == VALUE_LIST || args.kind == VALUE_RANGE || args.kind == VALUE_UNDEFINED;
    if (args.kind == VALUE_TUPLE ? p.used < args.sequence->count : !p.used && !p.by_name && !is_mapping)
        run_fail(r, "not all arguments converted during string formatting");
    return value_string(builder_finish(&b));
}

// ---- "{}"

struct braces {
    struct run *run;
    const struct string *format;
    const struct args *args;
    int64_t next; // argument without a name; -1: arguments have numbers
    int depth;
};

static void add_braces(struct braces *f, struct builder *b, size_t at, size_t end);

// name[.attribute | [item]]* in [at, end)
static struct value field_value(struct braces *f, size_t at, size_t end)
{
    struct run *r = f->run;
    const char *text = f->format->text;
    size_t begin = at;
    struct value v = {.kind = VALUE_MISSING};
    while (at < end && text[at] != '.' && text[at] != '[')
        at++;
    const struct string *name = string_part(r, f->format, begin, at);
    bool numeric = name->bytes > 0 && name->bytes < 10;
    int64_t index = 0;
    for (size_t i = 0; i < name->bytes && numeric; i++) {
        numeric = name->text[i] >= '0' && name->text[i] <= '9';
        index = index * 10 + (name->text[i] - '0');
    }
    if (!name->bytes || numeric) {
        if (numeric ? f->next > 0 : f->next < 0)
            run_fail(r, "a format mixes fields with and without numbers");
        index = numeric ? index : f->next++;
        f->next = numeric ? -1 : f->next;
        if ((uint64_t)index >= f->args->count)
            run_fail(r, "Replacement index %lld out of range for positional args tuple", (long long)index);
        v = f->args->values[index];
    } else {
        for (size_t i = 0; i < f->args->num_named; i++)
            if (string_equal(f->args->names[i], name))
                v = f->args->named[i];
        if (!value_given(v))
            run_fail(r, "the format has no argument '%.*s'", (int)name->bytes, name->text);
    }
    while (at < end) {
        begin = at + 1;
        if (text[at] == '.') {
            for (at = begin; at < end && text[at] != '.' && text[at] != '['; at++)
                ;
            v = call_attribute(r, v, string_part(r, f->format, begin, at));
            continue;
        }
        const char *close = memchr(text + begin, ']', end - begin);
        if (text[at] != '[' || !close)
            run_fail(r, "a format field cannot be read");
        at = (size_t)(close - text);
        const struct string *item = string_part(r, f->format, begin, at++);
        index = 0;
        numeric = item->bytes > 0 && item->bytes < 10;
        for (size_t i = 0; i < item->bytes && numeric; i++) {
            numeric = item->text[i] >= '0' && item->text[i] <= '9';
            index = index * 10 + (item->text[i] - '0');
        }
        v = call_item(r, v, numeric ? value_int(index) : value_string(item));
    }
    return v;
}

static int64_t layout_number(struct run *r, const struct string *s, size_t *at)
{
    int64_t number = -1;
    while (*at < s->bytes && isdigit((unsigned char)s->text[*at])) {
        number = (number < 0 ? 0 : number) * 10 + (s->text[(*at)++] - '0');
        if (number > MAX_WIDTH)
            run_fail(r, "a width above %d is not supported", MAX_WIDTH);
    }
    return number;
}

// [[fill]align][sign][#][0][width][grouping][.precision][type]
static struct layout read_layout(struct run *r, const struct string *s)
{
    struct layout layout = {.fill = " ", .fill_bytes = 1, .user = from_user(s, 0, s->bytes)};
    size_t at = 0, second = 0;
    if (s->bytes)
        text_next(s->text, &second);
    if (second && second < s->bytes && strchr("<>=^", s->text[second])) {
        layout.fill = s->text;
        layout.fill_bytes = second;
        layout.align = s->text[second];
        at = second + 1;
    } else if (s->bytes && strchr("<>=^", s->text[0]) && s->text[0]) {
        layout.align = s->text[at++];
    }
    if (at < s->bytes && strchr("+- ", s->text[at]) && s->text[at])
        layout.sign = s->text[at++];
    if (at < s->bytes && s->text[at] == '#') {
        layout.alternate = true;
        at++;
    }
    if (at < s->bytes && s->text[at] == '0') {
        if (!layout.align) {
            layout.fill = "0";
            layout.align = '=';
        }
        at++;
    }
    layout.width = layout_number(r, s, &at);
    if (at < s->bytes && (s->text[at] == ',' || s->text[at] == '_'))
        layout.grouping = s->text[at++];
    layout.precision = -1;
    if (at < s->bytes && s->text[at] == '.') {
        at++;
        layout.precision = layout_number(r, s, &at);
        if (layout.precision < 0)
            run_fail(r, "Format specifier missing precision");
    }
    if (at < s->bytes)
        layout.type = s->text[at++];
    if (at < s->bytes)
        run_fail(r, "the format '%.*s' is not supported", (int)s->bytes, s->text);
    return layout;
}

static void add_formatted(struct builder *b, struct value v, const struct string *spec)
{
    struct run *r = b->run;
    struct layout layout;
    int64_t i;
    double x;
    if (!spec->bytes) {
        print_str(b, v);
        return;
    }
    layout = read_layout(r, spec);
    if (v.kind == VALUE_STRING) {
        if ((layout.type && layout.type != 's') || layout.sign || layout.alternate || layout.grouping ||
            layout.align == '=')
            run_fail(r, "the format '%.*s' does not fit a string", (int)spec->bytes, spec->text);
        add_text(b, v.string, &layout);
        return;
    }
    if (!value_is_number(v, &i, &x))
        run_fail(r, "unsupported format string passed to %s.__format__", value_type_name(v));
    const char *types = v.kind == VALUE_FLOAT ? "eEfFgG%n" : "bdoxXneEfFgG%";
    if (layout.type && !strchr(types, layout.type))
        run_fail(r, "Unknown format code '%c' for object of type '%s'", layout.type, value_type_name(v));
    if (layout.precision >= 0 && v.kind != VALUE_FLOAT && (!layout.type || strchr("bdoxXn", layout.type)))
        run_fail(r, "Precision not allowed in integer format specifier");
    add_number(b, v, &layout, '>');
}

// One replacement field in [at, end), without its braces.
static void add_field(struct braces *f, struct builder *b, size_t at, size_t end)
{
    const char *text = f->format->text;
    size_t name_end = at;
    char conversion = 0;
    for (; name_end < end && text[name_end] != ':' && text[name_end] != '!'; name_end++)
        if (text[name_end] == '[')
            while (name_end + 1 < end && text[name_end] != ']')
                name_end++;
    struct value v = field_value(f, at, name_end);
    if (name_end < end && text[name_end] == '!') {
        conversion = name_end + 1 < end ? text[name_end + 1] : 0;
        name_end += 2;
        if ((conversion != 's' && conversion != 'r') || (name_end < end && text[name_end] != ':'))
            run_fail(f->run, "a conversion in a format is not supported");
    }
    struct builder spec = builder_start(f->run), converted = builder_start(f->run);
    if (name_end < end)
        add_braces(f, &spec, name_end + 1, end);
    if (conversion) {
        if (conversion == 'r')
            print_repr(&converted, v);
        else
            print_str(&converted, v);
        v = value_string(builder_finish(&converted));
    }
    add_formatted(b, v, builder_finish(&spec));
}

static void add_braces(struct braces *f, struct builder *b, size_t at, size_t end)
{
    const char *text = f->format->text;
    if (++f->depth > 2)
        run_fail(f->run, "Max string recursion exceeded");
    while (at < end) {
        size_t plain = at;
        while (at < end && text[at] != '{' && text[at] != '}')
            at++;
        builder_add_part(b, f->format, plain, at);
        if (at >= end)
            break;
        run_charge(f->run, 1);
        if (at + 1 < end && text[at + 1] == text[at]) {
            builder_add_part(b, f->format, at, at + 1);
            at += 2;
            continue;
        }
        if (text[at] == '}')
            run_fail(f->run, "Single '}' encountered in format string");
        size_t begin = ++at;
        for (int depth = 1; depth; at++) {
            if (at >= end)
                run_fail(f->run, "expected '}' before end of string");
            depth += text[at] == '{' ? 1 : text[at] == '}' ? -1 : 0;
        }
        add_field(f, b, begin, at - 1);
    }
    f->depth--;
}

struct value format_method(struct run *r, struct value self, const struct value *v, const struct args *args)
{
    (void)v;
    struct braces f = {.run = r, .format = self.string, .args = args};
    struct builder b = builder_start(r);
    add_braces(&f, &b, 0, self.string->bytes);
    return value_string(builder_finish(&b));
}
