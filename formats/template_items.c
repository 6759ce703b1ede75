// Filters that take sequences and mappings: attributes, choosing, sorting.
#include <string.h>

#include "formats/template_internal.h"

#define FILTER(name)                                                                                                   \
    static struct value name(struct run *r, struct value self, const struct value *v, const struct args *args)
#define UNUSED (void)r, (void)self, (void)v, (void)args

static bool flag(struct run *r, struct value v) { return value_given(v) && value_true(r, v); }

static struct value sequence_of(struct run *r, enum value_kind kind, struct sequence items)
{
    struct value v = value_sequence(r, kind, items.count);
    if (items.count)
        memcpy(v.sequence->items, items.items, items.count * sizeof *items.items);
    return v;
}

// ---- attributes

struct path { // "a.0.b" of map(attribute=...)
    struct value parts[16];
    size_t count;
};

static struct path read_path(struct run *r, struct value attribute)
{
    struct path path = {.count = 0};
    if (!value_given(attribute) || attribute.kind == VALUE_NONE)
        return path;
    if (attribute.kind != VALUE_STRING) {
        path.parts[path.count++] = value_int(value_need_int(r, attribute, "an attribute"));
        return path;
    }
    const struct string *s = attribute.string;
    for (size_t begin = 0, end; begin <= s->bytes; begin = end + 1) {
        const char *dot = begin < s->bytes ? memchr(s->text + begin, '.', s->bytes - begin) : NULL;
        end = dot ? (size_t)(dot - s->text) : s->bytes;
        int64_t index = 0;
        bool numeric = end > begin && end - begin < 10;
        for (size_t i = begin; i < end; i++) {
            numeric = numeric && s->text[i] >= '0' && s->text[i] <= '9';
            index = index * 10 + (s->text[i] - '0');
            if (!numeric)
                break;
        }
        if (path.count == 16)
            run_fail(r, "an attribute has more than 16 parts");
        path.parts[path.count++] = numeric ? value_int(index) : value_string(string_part(r, s, begin, end));
    }
    return path;
}

static struct value follow(struct run *r, struct value v, const struct path *path, struct value otherwise)
{
    run_charge_items(r, 1 + path->count);
    for (size_t i = 0; i < path->count; i++) {
        v = call_item(r, v, path->parts[i]);
        if (v.kind == VALUE_UNDEFINED && value_given(otherwise))
            v = otherwise;
    }
    return v;
}

static struct value no_value(void) { return (struct value){.kind = VALUE_MISSING}; }

FILTER(filter_attr)
{
    UNUSED;
    if (v[0].kind != VALUE_STRING)
        run_fail(r, "attr takes a name");
    value_refuse_undefined(r, self);
    struct value found = call_attribute(r, self, v[0].string);
    // Unlike "." this filter never looks into a mapping.
    if (self.kind == VALUE_DICT && found.kind != VALUE_METHOD)
        return value_undefined_in(r, self, v[0], false);
    return found;
}

// The filter or test that a template names in an argument.
static const struct callable *find_named(struct run *r, struct value name, const char *what,
                                         const struct callable *find(const char *name))
{
    const struct string *s = value_str(r, name);
    const struct callable *callable = call_named(s, find);
    if (!callable)
        run_fail(r, "there is no %s named '%.*s'", what, (int)(s->bytes < 200 ? s->bytes : 200), s->text);
    return callable;
}

static struct value call_for_item(struct run *r, const struct callable *callable, const char *what, struct value item,
                                  const struct args *args)
{
    run_charge(r, 1);
    return call_callable(r, callable, what, item, args);
}

// map(attribute=..., default=...) or map('filter', arguments ...)
FILTER(filter_map)
{
    UNUSED;
    struct value attribute = no_value(), otherwise = no_value();
    struct args rest = *args;
    const struct callable *callable = NULL;
    if (!value_true(r, self)) // Jinja2 does not even look at the arguments
        return value_sequence(r, VALUE_ITERATOR, 0);
    if (args->count == 0) {
        for (size_t i = 0; i < args->num_named; i++) {
            if (string_is(args->names[i], "attribute"))
                attribute = args->named[i];
            else if (string_is(args->names[i], "default"))
                otherwise = args->named[i];
            else
                run_fail(r, "map has no argument '%s'", value_str(r, value_string(args->names[i]))->text);
        }
        if (!value_given(attribute))
            run_fail(r, "map requires a filter argument");
    } else {
        callable = find_named(r, args->values[0], "filter", template_filter);
        rest.values++;
        rest.count--;
    }
    struct sequence items = value_items(r, self);
    struct value result = value_sequence(r, VALUE_ITERATOR, items.count);
    struct path path = read_path(r, attribute);
    for (size_t i = 0; i < items.count; i++)
        result.sequence->items[i] = callable ? call_for_item(r, callable, "filter", items.items[i], &rest)
                                             : follow(r, items.items[i], &path, otherwise);
    return result;
}

// select, reject, selectattr, rejectattr
static struct value choose(struct run *r, struct value self, const struct args *args, bool wanted, bool by_attribute)
{
    struct args rest = *args;
    struct path path = {.count = 0};
    const struct callable *callable = NULL;
    if (!value_true(r, self))
        return value_sequence(r, VALUE_ITERATOR, 0);
    if (by_attribute) {
        if (!rest.count)
            run_fail(r, "Missing parameter for attribute name");
        path = read_path(r, rest.values[0]);
        rest.values++;
        rest.count--;
    }
    if (rest.count) {
        callable = find_named(r, rest.values[0], "test", template_test);
        rest.values++;
        rest.count--;
    }
    struct sequence items = value_items(r, self);
    struct value result = value_sequence(r, VALUE_ITERATOR, items.count);
    size_t count = 0;
    for (size_t i = 0; i < items.count; i++) {
        struct value item = follow(r, items.items[i], &path, no_value());
        bool holds = value_true(r, callable ? call_for_item(r, callable, "test", item, &rest) : item);
        if (holds == wanted)
            result.sequence->items[count++] = items.items[i];
    }
    result.sequence->count = count;
    return result;
}

FILTER(filter_select)
{
    UNUSED;
    return choose(r, self, args, true, false);
}
FILTER(filter_reject)
{
    UNUSED;
    return choose(r, self, args, false, false);
}
FILTER(filter_selectattr)
{
    UNUSED;
    return choose(r, self, args, true, true);
}
FILTER(filter_rejectattr)
{
    UNUSED;
    return choose(r, self, args, false, true);
}

// ---- sequences

FILTER(filter_length)
{
    UNUSED;
    return value_int((int64_t)value_length(r, self));
}
FILTER(filter_list)
{
    UNUSED;
    return sequence_of(r, VALUE_LIST, value_items(r, self));
}

FILTER(filter_default)
{
    UNUSED;
    bool missing = self.kind == VALUE_UNDEFINED || (flag(r, v[1]) && !value_true(r, self));
    return !missing ? self : value_given(v[0]) ? v[0] : value_text(r, "");
}

FILTER(filter_join)
{
    UNUSED;
    struct path path = read_path(r, v[1]);
    struct sequence items = value_items(r, self);
    struct value *chosen = run_alloc(r, items.count, sizeof *chosen);
    for (size_t i = 0; i < items.count; i++)
        chosen[i] = follow(r, items.items[i], &path, no_value());
    items.items = chosen;
    return strings_join(r, value_given(v[0]) ? value_str(r, v[0]) : value_text(r, "").string, items, false);
}

FILTER(filter_first)
{
    UNUSED;
    if (self.kind == VALUE_ITERATOR) {
        struct sequence *s = self.sequence;
        return s->done < s->count ? s->items[s->done++] : value_undefined();
    }
    struct sequence items = value_items(r, self);
    return items.count ? items.items[0] : value_undefined();
}

static void refuse_one_way(struct run *r, struct value v)
{
    if (v.kind == VALUE_ITERATOR)
        run_fail(r, "'%s' object is not reversible", value_type_name(v));
}

FILTER(filter_last)
{
    UNUSED;
    refuse_one_way(r, self);
    struct sequence items = value_items(r, self);
    return items.count ? items.items[items.count - 1] : value_undefined();
}

FILTER(filter_reverse)
{
    UNUSED;
    if (self.kind == VALUE_STRING)
        return strings_slice(r, self, value_none(), value_none(), value_int(-1));
    struct sequence items = value_items(r, self);
    struct value result = value_sequence(r, VALUE_ITERATOR, items.count);
    for (size_t i = 0; i < items.count; i++)
        result.sequence->items[i] = items.items[items.count - 1 - i];
    return result;
}

FILTER(filter_items)
{
    UNUSED;
    struct args none = {0};
    if (self.kind == VALUE_UNDEFINED)
        return value_sequence(r, VALUE_ITERATOR, 0);
    if (self.kind != VALUE_DICT)
        run_fail(r, "Can only get item pairs from a mapping.");
    struct value view = call_value(r, call_attribute(r, self, value_text(r, "items").string), &none);
    return (struct value){.kind = VALUE_ITERATOR, .sequence = view.sequence};
}

// What an item is ordered by: its attribute, in lower case unless case counts.
static struct value sort_key(struct run *r, struct value item, const struct path *path, bool case_sensitive)
{
    struct value key = follow(r, item, path, no_value());
    return key.kind == VALUE_STRING && !case_sensitive ? strings_case(r, key.string, 'l') : key;
}

static bool comes_later(struct run *r, struct value a, struct value b) { return value_compare(r, b, a, "<") < 0; }

// Merges the sorted halves; equal keys keep their order.
static void merge_sort(struct run *r, struct value *keys, struct value *items, struct value *spare, size_t count,
                       bool reverse)
{
    if (count < 2)
        return;
    size_t half = count / 2, left = 0, right = half;
    merge_sort(r, keys, items, spare, half, reverse);
    merge_sort(r, keys + half, items + half, spare, count - half, reverse);
    run_charge(r, 1 + count / 8);
    for (size_t i = 0; i < count; i++) {
        bool take_right = left == half || (right < count && (reverse ? comes_later(r, keys[right], keys[left])
                                                                     : comes_later(r, keys[left], keys[right])));
        size_t from = take_right ? right++ : left++;
        spare[2 * i] = keys[from];
        spare[2 * i + 1] = items[from];
    }
    for (size_t i = 0; i < count; i++) {
        keys[i] = spare[2 * i];
        items[i] = spare[2 * i + 1];
    }
}

static struct value sorted(struct run *r, struct sequence items, const struct path *paths, size_t num_paths,
                           bool case_sensitive, bool reverse)
{
    struct value result = sequence_of(r, VALUE_LIST, items);
    struct value *keys = run_alloc(r, items.count, sizeof *keys), *spare = run_alloc(r, 2 * items.count, sizeof *spare);
    for (size_t i = 0; i < items.count; i++) {
        keys[i] = num_paths == 1 ? sort_key(r, items.items[i], paths, case_sensitive)
                                 : value_sequence(r, VALUE_TUPLE, num_paths);
        for (size_t p = 0; num_paths > 1 && p < num_paths; p++)
            keys[i].sequence->items[p] = sort_key(r, items.items[i], &paths[p], case_sensitive);
    }
    merge_sort(r, keys, result.sequence->items, spare, items.count, reverse);
    return result;
}

FILTER(filter_sort)
{
    UNUSED;
    struct path paths[4];
    size_t count = 1;
    paths[0] = read_path(r, no_value());
    if (value_given(v[2]) && v[2].kind == VALUE_STRING) {
        struct value comma = value_text(r, ",");
        struct args one = {&comma, 1, NULL, NULL, 0};
        struct sequence names =
            value_items(r, call_value(r, call_attribute(r, v[2], value_text(r, "split").string), &one));
        if (names.count > 4)
            run_fail(r, "sort takes at most 4 attributes");
        for (count = 0; count < names.count; count++)
            paths[count] = read_path(r, names.items[count]);
    } else {
        paths[0] = read_path(r, v[2]);
    }
    return sorted(r, value_items(r, self), paths, count, flag(r, v[1]), flag(r, v[0]));
}

FILTER(filter_dictsort)
{
    UNUSED;
    struct value by = value_given(v[1]) ? v[1] : value_text(r, "key");
    bool by_value = by.kind == VALUE_STRING && string_is(by.string, "value");
    if (!by_value && !(by.kind == VALUE_STRING && string_is(by.string, "key")))
        run_fail(r, "You can only sort by either \"key\" or \"value\"");
    value_refuse_undefined(r, self);
    if (self.kind != VALUE_DICT)
        run_fail(r, "'%s' object has no attribute 'items'", value_type_name(self));
    struct args none = {0};
    struct path path = read_path(r, value_int(by_value));
    struct sequence items =
        value_items(r, call_value(r, call_attribute(r, self, value_text(r, "items").string), &none));
    return sorted(r, items, &path, 1, flag(r, v[0]), flag(r, v[2]));
}

FILTER(filter_unique)
{
    UNUSED;
    struct path path = read_path(r, v[1]);
    struct sequence items = value_items(r, self);
    struct value result = value_sequence(r, VALUE_ITERATOR, items.count);
    struct dict *seen = dict_new(r);
    size_t count = 0;
    for (size_t i = 0; i < items.count; i++) {
        struct value key = sort_key(r, items.items[i], &path, flag(r, v[0]));
        if (dict_get(r, seen, key))
            continue;
        dict_set(r, seen, key, value_none());
        result.sequence->items[count++] = items.items[i];
    }
    result.sequence->count = count;
    return result;
}

static struct value extreme(struct run *r, struct value self, const struct value *v, int wanted)
{
    struct path path = read_path(r, v[1]);
    struct sequence items = value_items(r, self);
    if (!items.count)
        return value_undefined();
    struct value best = items.items[0], best_key = sort_key(r, best, &path, flag(r, v[0]));
    for (size_t i = 1; i < items.count; i++) {
        struct value key = sort_key(r, items.items[i], &path, flag(r, v[0]));
        int order = value_compare(r, key, best_key, wanted < 0 ? "<" : ">");
        if (order != 2 && (wanted < 0 ? order < 0 : order > 0)) {
            best = items.items[i];
            best_key = key;
        }
    }
    return best;
}

FILTER(filter_min)
{
    UNUSED;
    return extreme(r, self, v, -1);
}
FILTER(filter_max)
{
    UNUSED;
    return extreme(r, self, v, 1);
}

FILTER(filter_sum)
{
    UNUSED;
    struct path path = read_path(r, v[0]);
    struct sequence items = value_items(r, self);
    struct value total = value_given(v[1]) ? v[1] : value_int(0);
    if (total.kind == VALUE_STRING)
        run_fail(r, "sum() can't sum strings [use ''.join(seq) instead]");
    for (size_t i = 0; i < items.count; i++)
        total = eval_binary(r, TOKEN_ADD, total, follow(r, items.items[i], &path, no_value()));
    return total;
}

FILTER(filter_batch)
{
    UNUSED;
    int64_t size = value_need_int(r, v[0], "the size of a batch");
    struct sequence items = value_items(r, self);
    if (size < 1)
        run_fail(r, "the size of a batch must be at least 1");
    bool fill = value_given(v[1]) && v[1].kind != VALUE_NONE;
    uint64_t width = (uint64_t)size;
    struct value result = value_sequence(r, VALUE_ITERATOR, items.count / width + (items.count % width != 0));
    for (size_t i = 0; i < result.sequence->count; i++) {
        size_t left = items.count - i * width, count = left < width ? left : width;
        struct value batch = value_sequence(r, VALUE_LIST, fill ? width : count);
        for (size_t j = 0; j < batch.sequence->count; j++)
            batch.sequence->items[j] = j < count ? items.items[i * width + j] : v[1];
        result.sequence->items[i] = batch;
    }
    return result;
}

const struct callable *template_items_filter(const char *name)
{
    static const struct callable filters[] = {
        {"length", filter_length, "", 0},
        {"count", filter_length, "", 0},
        {"items", filter_items, "", 0},
        {"join", filter_join, "d attribute", 0},
        {"default", filter_default, "default_value boolean", 0},
        {"d", filter_default, "default_value boolean", 0},
        {"list", filter_list, "", 0},
        {"selectattr", filter_selectattr, NULL, 0},
        {"rejectattr", filter_rejectattr, NULL, 0},
        {"select", filter_select, NULL, 0},
        {"reject", filter_reject, NULL, 0},
        {"map", filter_map, NULL, 0},
        {"dictsort", filter_dictsort, "case_sensitive by reverse", 0},
        {"first", filter_first, "", 0},
        {"last", filter_last, "", 0},
        {"unique", filter_unique, "case_sensitive attribute", 0},
        {"sort", filter_sort, "reverse case_sensitive attribute", 0},
        {"reverse", filter_reverse, "", 0},
        {"min", filter_min, "case_sensitive attribute", 0},
        {"max", filter_max, "case_sensitive attribute", 0},
        {"sum", filter_sum, "attribute start", 0},
        {"batch", filter_batch, "linecount fill_with", 1},
        {"attr", filter_attr, "name", 1},
        {NULL, NULL, NULL, 0},
    };
    return callable_find(filters, name);
}
