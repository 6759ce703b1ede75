// Methods of Python's str that templates use, and what filters share with them. Every part of a result keeps its marks.
#include <string.h>

#include "formats/template_internal.h"

#define METHOD(name)                                                                                                   \
    static struct value name(struct run *r, struct value self, const struct value *v, const struct args *args)

static const struct string *need_string(struct run *r, struct value v, const char *what)
{
    value_refuse_undefined(r, v);
    if (v.kind != VALUE_STRING)
        run_fail(r, "%s must be str, not %s", what, value_type_name(v));
    return v.string;
}

static const struct string *string_or_null(struct run *r, struct value v, const char *what)
{
    return !value_given(v) || v.kind == VALUE_NONE ? NULL : need_string(r, v, what);
}

static int64_t int_or(struct run *r, struct value v, int64_t otherwise, const char *what)
{
    return !value_given(v) || v.kind == VALUE_NONE ? otherwise : value_need_int(r, v, what);
}

// ---- slices

// start, stop and step of a slice of `count` items, as Python's slice.indices; returns how many items it has.
static size_t slice_indices(struct run *r, int64_t count, struct value start, struct value stop, struct value step,
                            int64_t *first, int64_t *stride)
{
    int64_t by = int_or(r, step, 1, "a slice's step");
    if (by == 0)
        run_fail(r, "slice step cannot be zero");
    by = by < -INT64_MAX ? -INT64_MAX : by;
    int64_t low = by < 0 ? -1 : 0, high = by < 0 ? count - 1 : count;
    int64_t bounds[2] = {by < 0 ? high : low, by < 0 ? low : high};
    struct value given[2] = {start, stop};
    for (int i = 0; i < 2; i++) {
        if (!value_given(given[i]) || given[i].kind == VALUE_NONE)
            continue;
        int64_t at = value_need_int(r, given[i], "a slice's bound");
        at += at < 0 ? count : 0;
        bounds[i] = at < low ? low : at > high ? high : at;
    }
    *first = bounds[0];
    *stride = by;
    int64_t distance = by < 0 ? bounds[0] - bounds[1] : bounds[1] - bounds[0], width = by < 0 ? -by : by;
    return distance > 0 ? (size_t)((distance - 1) / width) + 1 : 0;
}

static struct value slice_string(struct run *r, const struct string *s, int64_t first, int64_t stride, size_t count)
{
    if (!count)
        return value_string(string_part(r, s, 0, 0));
    if (stride == 1)
        return value_string(
            string_part(r, s, string_offset(r, s, (size_t)first), string_offset(r, s, (size_t)first + count)));
    size_t *offsets = run_alloc(r, s->chars + 1, sizeof *offsets);
    for (size_t i = 0, at = 0; i < s->chars; i++) {
        offsets[i] = at;
        text_next(s->text, &at);
    }
    offsets[s->chars] = s->bytes;
    run_charge(r, count / 64);
    struct builder b = builder_start(r);
    for (size_t i = 0; i < count; i++) {
        size_t at = (size_t)(first + (int64_t)i * stride);
        builder_add_part(&b, s, offsets[at], offsets[at + 1]);
    }
    return value_string(builder_finish(&b));
}

struct value strings_slice(struct run *r, struct value object, struct value start, struct value stop, struct value step)
{
    int64_t first, stride;
    value_refuse_undefined(r, object);
    bool sliced = object.kind == VALUE_STRING || object.kind == VALUE_LIST || object.kind == VALUE_TUPLE ||
                  object.kind == VALUE_RANGE;
    if (!sliced)
        run_fail(r, "'%s' object cannot be sliced", value_type_name(object));
    size_t count = slice_indices(r, (int64_t)value_length(r, object), start, stop, step, &first, &stride);
    if (object.kind == VALUE_STRING)
        return slice_string(r, object.string, first, stride, count);
    struct value result = value_sequence(r, object.kind, count);
    run_charge(r, count / 64);
    for (size_t i = 0; i < count; i++)
        result.sequence->items[i] = object.sequence->items[first + (int64_t)i * stride];
    if (object.kind == VALUE_RANGE) {
        struct sequence *from = object.sequence, *to = result.sequence;
        int64_t skipped, length;
        if (__builtin_mul_overflow(from->step, stride, &to->step) ||
            __builtin_mul_overflow(from->step, first, &skipped) ||
            __builtin_add_overflow(from->start, skipped, &to->start) ||
            __builtin_mul_overflow(to->step, (int64_t)count, &length) ||
            __builtin_add_overflow(to->start, length, &to->stop))
            run_fail(r, "the slice of a range does not fit 64 bits");
    }
    return result;
}

// ---- trimming

static bool among(const struct string *chars, uint32_t c)
{
    for (size_t at = 0; at < chars->bytes;)
        if (text_next(chars->text, &at) == c)
            return true;
    return false;
}

struct value strings_trim(struct run *r, const struct string *s, struct value chars, bool left, bool right)
{
    const struct string *set = string_or_null(r, chars, "the characters to strip");
    size_t begin = 0, end = s->bytes;
    if (set)
        run_charge_bytes(r, set->bytes * 64); // each character is looked for
    while (left && begin < end) {
        size_t next = begin;
        uint32_t c = text_next(s->text, &next);
        if (!(set ? among(set, c) : text_is_space(c)))
            break;
        begin = next;
        if (set)
            run_charge_bytes(r, set->bytes);
    }
    while (right && end > begin) {
        size_t start = end - 1, next;
        while (((uint8_t)s->text[start] & 0xC0) == 0x80)
            start--;
        next = start;
        uint32_t c = text_next(s->text, &next);
        if (!(set ? among(set, c) : text_is_space(c)))
            break;
        end = start;
        if (set)
            run_charge_bytes(r, set->bytes);
    }
    run_charge_bytes(r, begin + (s->bytes - end));
    return value_string(string_part(r, s, begin, end));
}

METHOD(str_strip)
{
    (void)args;
    return strings_trim(r, self.string, v[0], true, true);
}
METHOD(str_lstrip)
{
    (void)args;
    return strings_trim(r, self.string, v[0], true, false);
}
METHOD(str_rstrip)
{
    (void)args;
    return strings_trim(r, self.string, v[0], false, true);
}

// ---- splitting

struct list { // growing, of values
    struct run *run;
    struct value *items;
    size_t count, capacity;
};

static void list_add(struct list *list, struct value v)
{
    if (list->count == list->capacity) {
        size_t capacity = list->capacity ? 2 * list->capacity : 8;
        struct value *items = run_alloc(list->run, capacity, sizeof *items);
        if (list->count)
            memcpy(items, list->items, list->count * sizeof *items);
        list->items = items;
        list->capacity = capacity;
    }
    list->items[list->count++] = v;
}

static struct value list_value(struct list *list, bool reversed)
{
    struct value v = value_sequence(list->run, VALUE_LIST, list->count);
    for (size_t i = 0; i < list->count; i++)
        v.sequence->items[i] = list->items[reversed ? list->count - 1 - i : i];
    return v;
}

static struct value split(struct run *r, const struct string *s, const struct value *v, bool from_right)
{
    const struct string *separator = string_or_null(r, v[0], "a separator");
    int64_t most = int_or(r, v[1], -1, "maxsplit");
    struct list parts = {.run = r};
    size_t begin = 0, end = s->bytes;
    if (separator && !separator->bytes)
        run_fail(r, "empty separator");
    if (!separator) { // words; what is left over by maxsplit keeps its inner white space
        run_charge_bytes(r, end);
        begin = from_right ? 0 : text_space_end(s->text, end, 0);
        end = from_right ? text_space_begin(s->text, 0, end) : end;
    }
    for (; separator && most; most -= most > 0) {
        size_t at =
            from_right ? string_find_last(r, s, separator, begin, end) : string_find(r, s, separator, begin, end);
        if (at == SIZE_MAX)
            break;
        if (from_right) {
            list_add(&parts, value_string(string_part(r, s, at + separator->bytes, end)));
            end = at;
        } else {
            list_add(&parts, value_string(string_part(r, s, begin, at)));
            begin = at + separator->bytes;
        }
        run_charge(r, 1);
    }
    for (; !separator && most && end > begin; most -= most > 0) {
        size_t word;
        run_charge(r, 1);
        if (from_right) {
            for (word = end; word > begin && text_space_begin(s->text, begin, word) == word;) {
                word--;
                while (((uint8_t)s->text[word] & 0xC0) == 0x80)
                    word--;
            }
            list_add(&parts, value_string(string_part(r, s, word, end)));
            end = text_space_begin(s->text, begin, word);
        } else {
            for (word = begin; word < end && text_space_end(s->text, end, word) == word;)
                text_next(s->text, &word);
            list_add(&parts, value_string(string_part(r, s, begin, word)));
            begin = text_space_end(s->text, end, word);
        }
    }
    if (separator || begin < end) // the rest
        list_add(&parts, value_string(string_part(r, s, begin, end)));
    return list_value(&parts, from_right);
}

METHOD(str_split)
{
    (void)args;
    return split(r, self.string, v, false);
}
METHOD(str_rsplit)
{
    (void)args;
    return split(r, self.string, v, true);
}

static bool ends_line(uint32_t c)
{
    return (c >= 10 && c <= 13) || (c >= 28 && c <= 30) || c == 0x85 || c == 0x2028 || c == 0x2029;
}

struct value strings_lines(struct run *r, const struct string *s, bool keep_ends)
{
    struct list lines = {.run = r};
    for (size_t begin = 0, at = 0; begin < s->bytes; begin = at) {
        size_t end = at;
        while (at < s->bytes) {
            end = at;
            uint32_t c = text_next(s->text, &at);
            if (c == '\r' && at < s->bytes && s->text[at] == '\n')
                at++;
            if (ends_line(c))
                break;
            end = at;
        }
        list_add(&lines, value_string(string_part(r, s, begin, keep_ends ? at : end)));
        run_charge(r, 1);
    }
    return list_value(&lines, false);
}

METHOD(str_splitlines)
{
    (void)args;
    return strings_lines(r, self.string, value_given(v[0]) && value_true(r, v[0]));
}

static struct value partition(struct run *r, const struct string *s, struct value wanted, bool from_right)
{
    const struct string *separator = need_string(r, wanted, "a separator");
    if (!separator->bytes)
        run_fail(r, "empty separator");
    size_t at = from_right ? string_find_last(r, s, separator, 0, s->bytes) : string_find(r, s, separator, 0, s->bytes);
    struct value parts = value_sequence(r, VALUE_TUPLE, 3);
    struct value *items = parts.sequence->items;
    items[0] = items[1] = items[2] = value_text(r, "");
    if (at == SIZE_MAX) {
        items[from_right ? 2 : 0] = value_string(s);
    } else {
        items[0] = value_string(string_part(r, s, 0, at));
        items[1] = value_string(string_part(r, s, at, at + separator->bytes));
        items[2] = value_string(string_part(r, s, at + separator->bytes, s->bytes));
    }
    return parts;
}

METHOD(str_partition)
{
    (void)args;
    return partition(r, self.string, v[0], false);
}
METHOD(str_rpartition)
{
    (void)args;
    return partition(r, self.string, v[0], true);
}

// ---- searching

// The byte range of the optional arguments start and end, in characters. False: start lies behind the string.
static bool search_range(struct run *r, const struct string *s, const struct value *v, size_t *begin, size_t *end)
{
    int64_t count = (int64_t)s->chars, first = int_or(r, v[0], 0, "start"), last = int_or(r, v[1], count, "end");
    first += first < 0 ? count : 0;
    last += last < 0 ? count : 0;
    first = first < 0 ? 0 : first;
    last = last < 0 ? 0 : last > count ? count : last;
    if (first > last)
        return false;
    *begin = string_offset(r, s, (size_t)first);
    *end = string_offset(r, s, (size_t)last);
    return true;
}

static int64_t characters_before(struct run *r, const struct string *s, size_t byte)
{
    int64_t count = 0;
    run_charge_bytes(r, byte);
    for (size_t i = 0; i < byte; i++)
        count += ((uint8_t)s->text[i] & 0xC0) != 0x80;
    return count;
}

static int64_t find(struct run *r, const struct string *s, const struct value *v, bool last)
{
    const struct string *wanted = need_string(r, v[0], "what is looked for");
    size_t begin, end;
    if (!search_range(r, s, v + 1, &begin, &end))
        return -1;
    size_t at = last ? string_find_last(r, s, wanted, begin, end) : string_find(r, s, wanted, begin, end);
    return at == SIZE_MAX ? -1 : characters_before(r, s, at);
}

static struct value found_or_fail(struct run *r, int64_t at)
{
    if (at < 0)
        run_fail(r, "substring not found");
    return value_int(at);
}

METHOD(str_find)
{
    (void)args;
    return value_int(find(r, self.string, v, false));
}
METHOD(str_rfind)
{
    (void)args;
    return value_int(find(r, self.string, v, true));
}
METHOD(str_index)
{
    (void)args;
    return found_or_fail(r, find(r, self.string, v, false));
}
METHOD(str_rindex)
{
    (void)args;
    return found_or_fail(r, find(r, self.string, v, true));
}

METHOD(str_count)
{
    (void)args;
    const struct string *s = self.string, *wanted = need_string(r, v[0], "what is counted");
    size_t at, end;
    int64_t count = 0;
    if (!search_range(r, s, v + 1, &at, &end))
        return value_int(0);
    if (!wanted->bytes)
        return value_int(characters_before(r, s, end) - characters_before(r, s, at) + 1);
    while ((at = string_find(r, s, wanted, at, end)) != SIZE_MAX) {
        at += wanted->bytes;
        count++;
    }
    return value_int(count);
}

static bool has_affix(struct run *r, const struct string *s, const struct string *affix, size_t begin, size_t end,
                      bool at_end)
{
    run_charge_items(r, 1);
    if (affix->bytes > end - begin)
        return false;
    run_charge_bytes(r, affix->bytes);
    return !memcmp(s->text + (at_end ? end - affix->bytes : begin), affix->text, affix->bytes);
}

static struct value test_affix(struct run *r, const struct string *s, const struct value *v, bool at_end)
{
    size_t begin = 0, end = 0;
    bool in_range = search_range(r, s, v + 1, &begin, &end), found = false;
    if (v[0].kind != VALUE_TUPLE)
        return value_bool(has_affix(r, s, need_string(r, v[0], "a prefix or suffix"), begin, end, at_end) && in_range);
    for (size_t i = 0; i < v[0].sequence->count && !found; i++)
        found = has_affix(r, s, need_string(r, v[0].sequence->items[i], "a prefix or suffix"), begin, end, at_end);
    return value_bool(found && in_range);
}

METHOD(str_startswith)
{
    (void)args;
    return test_affix(r, self.string, v, false);
}
METHOD(str_endswith)
{
    (void)args;
    return test_affix(r, self.string, v, true);
}

METHOD(str_removeprefix)
{
    (void)args;
    const struct string *s = self.string, *affix = need_string(r, v[0], "a prefix");
    return has_affix(r, s, affix, 0, s->bytes, false) ? value_string(string_part(r, s, affix->bytes, s->bytes)) : self;
}

METHOD(str_removesuffix)
{
    (void)args;
    const struct string *s = self.string, *affix = need_string(r, v[0], "a suffix");
    return has_affix(r, s, affix, 0, s->bytes, true) ? value_string(string_part(r, s, 0, s->bytes - affix->bytes))
                                                     : self;
}

struct value strings_replace(struct run *r, const struct string *s, const struct string *old, const struct string *with,
                             int64_t count)
{
    struct builder b = builder_start(r);
    size_t done = 0, at;
    if (!old->bytes) { // before every character and at the end
        run_charge(r, s->chars / 64);
        for (at = 0; count; count -= count > 0) {
            builder_add_string(&b, with);
            if (at >= s->bytes)
                break;
            done = at;
            text_next(s->text, &at);
            builder_add_part(&b, s, done, at);
        }
        builder_add_part(&b, s, at, s->bytes);
        return value_string(builder_finish(&b));
    }
    for (; count && (at = string_find(r, s, old, done, s->bytes)) != SIZE_MAX; count -= count > 0) {
        builder_add_part(&b, s, done, at);
        builder_add_string(&b, with);
        done = at + old->bytes;
    }
    builder_add_part(&b, s, done, s->bytes);
    return value_string(builder_finish(&b));
}

METHOD(str_replace)
{
    (void)args;
    return strings_replace(r, self.string, need_string(r, v[0], "what is replaced"),
                           need_string(r, v[1], "the replacement"), int_or(r, v[2], -1, "count"));
}

struct value strings_join(struct run *r, const struct string *separator, struct sequence items, bool strict)
{
    struct builder b = builder_start(r);
    run_charge(r, items.count / 16);
    for (size_t i = 0; i < items.count; i++) {
        if (i)
            builder_add_string(&b, separator);
        if (strict)
            need_string(r, items.items[i], "an item to join");
        print_str(&b, items.items[i]);
    }
    return value_string(builder_finish(&b));
}

METHOD(str_join)
{
    (void)args;
    return strings_join(r, self.string, value_items(r, v[0]), true);
}

const struct string *strings_escape(struct run *r, const struct string *s)
{
    static const struct {
        char from;
        const char *to;
    } escapes[] = {{'&', "&amp;"}, {'<', "&lt;"}, {'>', "&gt;"}, {'\'', "&#39;"}, {'"', "&#34;"}};
    struct builder b = builder_start(r);
    size_t done = 0;
    for (size_t i = 0; i < s->bytes; i++)
        for (size_t e = 0; e < 5; e++)
            if (s->text[i] == escapes[e].from) {
                builder_add_part(&b, s, done, i);
                builder_add(&b, escapes[e].to, strlen(escapes[e].to), string_user_at(s, i));
                done = i + 1;
            }
    builder_add_part(&b, s, done, s->bytes);
    struct string *escaped = (struct string *)builder_finish(&b);
    escaped->markup = true;
    return escaped;
}

// ---- padding

static struct value pad(struct run *r, const struct string *s, const struct value *v, char how)
{
    int64_t width = value_need_int(r, v[0], "a width"), chars = (int64_t)s->chars;
    const struct string *fill =
        value_given(v[1]) ? need_string(r, v[1], "the fill character") : value_text(r, " ").string;
    if (fill->chars != 1)
        run_fail(r, "The fill character must be exactly one character long");
    int64_t space = width > chars ? width - chars : 0;
    int64_t left = how == 'l' ? 0 : how == 'r' ? space : space / 2 + (space & width & 1);
    struct builder b = builder_start(r);
    run_charge(r, (uint64_t)space / 64);
    for (int64_t i = 0; i < left; i++)
        builder_add_string(&b, fill);
    builder_add_string(&b, s);
    for (int64_t i = left; i < space; i++)
        builder_add_string(&b, fill);
    return value_string(builder_finish(&b));
}

METHOD(str_ljust)
{
    (void)args;
    return pad(r, self.string, v, 'l');
}
METHOD(str_rjust)
{
    (void)args;
    return pad(r, self.string, v, 'r');
}
METHOD(str_center)
{
    (void)args;
    return pad(r, self.string, v, 'c');
}

METHOD(str_zfill)
{
    (void)args;
    const struct string *s = self.string;
    size_t sign = s->bytes && (s->text[0] == '+' || s->text[0] == '-');
    int64_t width = value_need_int(r, v[0], "a width"), chars = (int64_t)s->chars;
    int64_t space = width > chars ? width - chars : 0;
    struct builder b = builder_start(r);
    run_charge(r, (uint64_t)space / 64);
    builder_add_part(&b, s, 0, sign);
    for (; space > 0; space--)
        builder_add_text(&b, "0");
    builder_add_part(&b, s, sign, s->bytes);
    return value_string(builder_finish(&b));
}

const struct callable template_string_methods[] = {
    {"strip", str_strip, "chars", 0},
    {"lstrip", str_lstrip, "chars", 0},
    {"rstrip", str_rstrip, "chars", 0},
    {"split", str_split, "sep maxsplit", 0},
    {"rsplit", str_rsplit, "sep maxsplit", 0},
    {"splitlines", str_splitlines, "keepends", 0},
    {"partition", str_partition, "sep", 1},
    {"rpartition", str_rpartition, "sep", 1},
    {"find", str_find, "sub start end", 1},
    {"rfind", str_rfind, "sub start end", 1},
    {"index", str_index, "sub start end", 1},
    {"rindex", str_rindex, "sub start end", 1},
    {"count", str_count, "sub start end", 1},
    {"startswith", str_startswith, "prefix start end", 1},
    {"endswith", str_endswith, "suffix start end", 1},
    {"removeprefix", str_removeprefix, "prefix", 1},
    {"removesuffix", str_removesuffix, "suffix", 1},
    {"replace", str_replace, "old new count", 2},
    {"join", str_join, "iterable", 1},
    {"casefold", NULL, NULL, 0},
    {"ljust", str_ljust, "width fillchar", 1},
    {"rjust", str_rjust, "width fillchar", 1},
    {"center", str_center, "width fillchar", 1},
    {"zfill", str_zfill, "width", 1},
    {"format", format_method, NULL, 0},
    {"format_map", NULL, NULL, 0},
    {"encode", NULL, NULL, 0},
    {"expandtabs", NULL, NULL, 0},
    {"translate", NULL, NULL, 0},
    {"maketrans", NULL, NULL, 0},
    {"isidentifier", NULL, NULL, 0},
    {"isprintable", NULL, NULL, 0},
    {NULL, NULL, NULL, 0},
};
