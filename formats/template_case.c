// Upper, lower and title case of strings, and questions about their characters, as Python's str has them. Roman and other letter
// numerals have no case here, and ideographs no numeric value: the tables of utf8proc do not tell.
#include <utf8proc.h>

#include "formats/template_internal.h"
#include "formats/utf8.h"

#define METHOD(name)                                                                                                   \
    static struct value name(struct run *r, struct value self, const struct value *v, const struct args *args)

// ---- upper and lower case

static utf8proc_category_t category(uint32_t c) { return utf8proc_category((utf8proc_int32_t)c); }

static bool is_cased(uint32_t c)
{
    utf8proc_category_t kind = category(c);
    return kind == UTF8PROC_CATEGORY_LU || kind == UTF8PROC_CATEGORY_LL || kind == UTF8PROC_CATEGORY_LT;
}

// A sigma is final behind a letter and before none; marks and such between them do not count.
static bool is_final_sigma(const struct string *s, size_t begin, size_t end)
{
    bool before = false, after = false;
    for (size_t at = begin; at > 0 && !before;) {
        do
            at--;
        while (((uint8_t)s->text[at] & 0xC0) == 0x80);
        size_t next = at;
        uint32_t c = text_next(s->text, &next);
        before = is_cased(c);
        if (!before && category(c) != UTF8PROC_CATEGORY_MN && category(c) != UTF8PROC_CATEGORY_CF && c != '\'' &&
            c != '.')
            break;
    }
    for (size_t at = end; at < s->bytes && !after;) {
        uint32_t c = text_next(s->text, &at);
        after = is_cased(c);
        if (!after && category(c) != UTF8PROC_CATEGORY_MN && category(c) != UTF8PROC_CATEGORY_CF && c != '\'' &&
            c != '.')
            break;
    }
    return before && !after;
}

// Appends the character [begin, end) of s in another case: 'u'pper, 'l'ower or 't'itle.
static void add_cased(struct builder *b, const struct string *s, size_t begin, size_t end, char how)
{
    size_t at = begin;
    uint32_t c = text_next(s->text, &at);
    utf8proc_int32_t folded[8] = {(utf8proc_int32_t)c};
    utf8proc_ssize_t count = 1;
    int boundary = 0;
    char text[4 * 8];
    size_t bytes = 0;
    if (c < 0x80) {
        char letter = (char)c;
        if (how == 'l' ? c >= 'A' && c <= 'Z' : c >= 'a' && c <= 'z')
            letter ^= 0x20;
        builder_add(b, &letter, 1, string_user_at(s, begin));
        return;
    }
    if (how == 'l') {
        folded[0] = c == 0x3A3 && is_final_sigma(s, begin, end) ? 0x3C2 : utf8proc_tolower((utf8proc_int32_t)c);
        if (c == 0x130) { // the dotted capital I keeps its dot
            folded[0] = 'i';
            folded[1] = 0x307;
            count = 2;
        }
    } else {
        // What folds to several characters has an upper case of several: that of each.
        if (category(c) != UTF8PROC_CATEGORY_LU && (how == 'u' || category(c) != UTF8PROC_CATEGORY_LT))
            count = utf8proc_decompose_char((utf8proc_int32_t)c, folded, 8, UTF8PROC_CASEFOLD, &boundary);
        utf8proc_int32_t title = utf8proc_totitle((utf8proc_int32_t)c);
        if (count < 2 || count > 8 || (how == 't' && category((uint32_t)title) == UTF8PROC_CATEGORY_LT)) {
            count = 1;
            folded[0] = how == 't' ? title : utf8proc_toupper((utf8proc_int32_t)c);
        } else {
            bool inside = false; // a title's first letter alone is large
            for (int i = 0; i < count; i++) {
                bool large = how == 'u' || !inside;
                inside |= is_cased((uint32_t)folded[i]);
                folded[i] = large ? utf8proc_toupper(folded[i]) : folded[i];
            }
        }
    }
    for (int i = 0; i < count; i++)
        bytes += utf8_put(text + bytes, (uint32_t)folded[i]);
    builder_add(b, text, bytes, string_user_at(s, begin));
}

struct value strings_case(struct run *r, const struct string *s, char how)
{
    struct builder b = builder_start(r);
    run_charge_bytes(r, s->bytes * 8);
    for (size_t begin = 0, at = 0; at < s->bytes; begin = at) {
        uint32_t c = text_next(s->text, &at);
        char mine = how == 'c' ? (begin ? 'l' : 't') : how;
        if (how == 's')
            mine = category(c) == UTF8PROC_CATEGORY_LU || category(c) == UTF8PROC_CATEGORY_LT ? 'l' : 'u';
        add_cased(&b, s, begin, at, mine);
    }
    return value_string(builder_finish(&b));
}

// The method begins a word at every letter behind what has no case; the filter behind white space and "-({[<".
struct value strings_title(struct run *r, const struct string *s, bool as_filter)
{
    struct builder b = builder_start(r);
    bool inside = false;
    run_charge_bytes(r, s->bytes * 8);
    for (size_t begin = 0, at = 0; at < s->bytes; begin = at) {
        uint32_t c = text_next(s->text, &at);
        if (as_filter) {
            add_cased(&b, s, begin, at, inside ? 'l' : 'u');
            inside = !(text_is_space(c) || c == '-' || c == '(' || c == '{' || c == '[' || c == '<');
        } else {
            add_cased(&b, s, begin, at, inside ? 'l' : 't');
            inside = is_cased(c);
        }
    }
    return value_string(builder_finish(&b));
}

METHOD(str_upper)
{
    (void)v, (void)args;
    return strings_case(r, self.string, 'u');
}
METHOD(str_lower)
{
    (void)v, (void)args;
    return strings_case(r, self.string, 'l');
}
METHOD(str_swapcase)
{
    (void)v, (void)args;
    return strings_case(r, self.string, 's');
}
METHOD(str_capitalize)
{
    (void)v, (void)args;
    return strings_case(r, self.string, 'c');
}
METHOD(str_title)
{
    (void)v, (void)args;
    return strings_title(r, self.string, false);
}

// ---- questions

static bool is_super_or_subscript_digit(uint32_t c)
{
    return c == 0xB2 || c == 0xB3 || c == 0xB9 || c == 0x2070 || (c >= 0x2074 && c <= 0x2079) ||
           (c >= 0x2080 && c <= 0x2089) || (c >= 0x2460 && c <= 0x2468) || (c >= 0x2474 && c <= 0x247C) ||
           (c >= 0x2488 && c <= 0x2490);
}

static bool is_letter(uint32_t c)
{
    utf8proc_category_t kind = category(c);
    return kind >= UTF8PROC_CATEGORY_LU && kind <= UTF8PROC_CATEGORY_LO;
}

static bool is_decimal(uint32_t c) { return category(c) == UTF8PROC_CATEGORY_ND; }
static bool is_digit(uint32_t c) { return is_decimal(c) || is_super_or_subscript_digit(c); }

static bool is_numeric(uint32_t c)
{
    utf8proc_category_t kind = category(c);
    return kind == UTF8PROC_CATEGORY_ND || kind == UTF8PROC_CATEGORY_NL || kind == UTF8PROC_CATEGORY_NO;
}

static bool is_alphanumeric(uint32_t c) { return is_letter(c) || is_numeric(c); }

static struct value all_are(struct run *r, const struct string *s, bool is(uint32_t c))
{
    run_charge_bytes(r, s->bytes * 8);
    for (size_t at = 0; at < s->bytes;)
        if (!is(text_next(s->text, &at)))
            return value_bool(false);
    return value_bool(s->bytes > 0);
}

METHOD(str_isdigit)
{
    (void)v, (void)args;
    return all_are(r, self.string, is_digit);
}
METHOD(str_isdecimal)
{
    (void)v, (void)args;
    return all_are(r, self.string, is_decimal);
}
METHOD(str_isnumeric)
{
    (void)v, (void)args;
    return all_are(r, self.string, is_numeric);
}
METHOD(str_isalpha)
{
    (void)v, (void)args;
    return all_are(r, self.string, is_letter);
}
METHOD(str_isalnum)
{
    (void)v, (void)args;
    return all_are(r, self.string, is_alphanumeric);
}
METHOD(str_isspace)
{
    (void)v, (void)args;
    return all_are(r, self.string, text_is_space);
}
METHOD(str_isascii)
{
    (void)r, (void)v, (void)args;
    return value_bool(self.string->bytes == self.string->chars);
}

// No letter of the other case, and at least one of this.
static struct value has_case(struct run *r, const struct string *s, utf8proc_category_t wanted,
                             utf8proc_category_t other)
{
    bool any = false;
    run_charge_bytes(r, s->bytes * 8);
    for (size_t at = 0; at < s->bytes;) {
        utf8proc_category_t kind = category(text_next(s->text, &at));
        if (kind == other || kind == UTF8PROC_CATEGORY_LT)
            return value_bool(false);
        any |= kind == wanted;
    }
    return value_bool(any);
}

METHOD(str_islower)
{
    (void)v, (void)args;
    return has_case(r, self.string, UTF8PROC_CATEGORY_LL, UTF8PROC_CATEGORY_LU);
}

METHOD(str_isupper)
{
    (void)v, (void)args;
    return has_case(r, self.string, UTF8PROC_CATEGORY_LU, UTF8PROC_CATEGORY_LL);
}

METHOD(str_istitle)
{
    (void)v, (void)args;
    bool inside = false, any = false;
    run_charge_bytes(r, self.string->bytes * 8);
    for (size_t at = 0; at < self.string->bytes;) {
        utf8proc_category_t kind = category(text_next(self.string->text, &at));
        bool begins = kind == UTF8PROC_CATEGORY_LU || kind == UTF8PROC_CATEGORY_LT,
             goes_on = kind == UTF8PROC_CATEGORY_LL;
        if ((begins && inside) || (goes_on && !inside))
            return value_bool(false);
        inside = begins || goes_on;
        any |= inside;
    }
    return value_bool(any);
}

const struct callable template_case_methods[] = {
    {"upper", str_upper, "", 0},         {"lower", str_lower, "", 0},
    {"swapcase", str_swapcase, "", 0},   {"capitalize", str_capitalize, "", 0},
    {"title", str_title, "", 0},         {"isdigit", str_isdigit, "", 0},
    {"isdecimal", str_isdecimal, "", 0}, {"isnumeric", str_isnumeric, "", 0},
    {"isalpha", str_isalpha, "", 0},     {"isalnum", str_isalnum, "", 0},
    {"isspace", str_isspace, "", 0},     {"isascii", str_isascii, "", 0},
    {"islower", str_islower, "", 0},     {"isupper", str_isupper, "", 0},
    {"istitle", str_istitle, "", 0},     {NULL, NULL, NULL, 0},
};
