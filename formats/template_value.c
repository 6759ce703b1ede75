// Values of the template interpreter, with Python's rules of truth, equality, order and membership.
#include <math.h>
#include <string.h>

#include "formats/template_internal.h"

struct value value_text(struct run *r, const char *text)
{
    return value_string(string_new(r, text, strlen(text), false));
}

struct value value_sequence(struct run *r, enum value_kind kind, size_t count)
{
    struct sequence *sequence = run_alloc(r, 1, sizeof *sequence);
    sequence->items = run_alloc(r, count, sizeof *sequence->items);
    sequence->count = count;
    return (struct value){.kind = kind, .sequence = sequence};
}

const char *value_type_name(struct value v)
{
    static const char *const names[] = {
        [VALUE_UNDEFINED] = "Undefined", [VALUE_NONE] = "NoneType",
        [VALUE_BOOL] = "bool",           [VALUE_INT] = "int",
        [VALUE_FLOAT] = "float",         [VALUE_STRING] = "str",
        [VALUE_LIST] = "list",           [VALUE_TUPLE] = "tuple",
        [VALUE_RANGE] = "range",         [VALUE_KEYS] = "dict_keys",
        [VALUE_VALUES] = "dict_values",  [VALUE_ITEMS] = "dict_items",
        [VALUE_ITERATOR] = "generator",  [VALUE_DICT] = "dict",
        [VALUE_NAMESPACE] = "Namespace", [VALUE_LOOP] = "LoopContext",
        [VALUE_MACRO] = "Macro",         [VALUE_FUNCTION] = "function",
        [VALUE_METHOD] = "method",       [VALUE_MISSING] = "nothing",
    };
    return names[v.kind];
}

// ---- undefined

struct value value_undefined_in(struct run *r, struct value object, struct value name, bool unsafe)
{
    struct undefined *u = run_alloc(r, 1, sizeof *u);
    *u = (struct undefined){object.kind == VALUE_NONE ? "None" : value_type_name(object), name, unsafe};
    return (struct value){.kind = VALUE_UNDEFINED, .undefined = u};
}

void value_fail_undefined(struct run *r, struct value v)
{
    const struct undefined *u = v.undefined;
    if (!u)
        run_fail(r, "a value is undefined");
    struct builder name = builder_start(r);
    print_repr(&name, u->name);
    const char *suffix = u->object && strcmp(u->object, "None") != 0 ? " object" : "";
    if (!u->object)
        run_fail(r, "%.*s is undefined", (int)name.bytes, name.text);
    if (u->unsafe)
        run_fail(r, "access to attribute %.*s of '%s' object is unsafe", (int)name.bytes, name.text, u->object);
    if (u->name.kind != VALUE_STRING)
        run_fail(r, "%s%s has no element %.*s", u->object, suffix, (int)name.bytes, name.text);
    run_fail(r, "'%s%s' has no attribute %.*s", u->object, suffix, (int)name.bytes, name.text);
}

void value_refuse_undefined(struct run *r, struct value v)
{
    if (v.kind == VALUE_UNDEFINED)
        value_fail_undefined(r, v);
}

// ---- numbers

bool value_is_number(struct value v, int64_t *integer, double *real)
{
    switch (v.kind) {
    case VALUE_BOOL:
        *integer = v.boolean;
        *real = v.boolean;
        return true;
    case VALUE_INT:
        *integer = v.integer;
        *real = (double)v.integer;
        return true;
    case VALUE_FLOAT:
        *integer = 0;
        *real = v.real;
        return true;
    default:
        return false;
    }
}

bool value_as_int(struct value v, int64_t *out)
{
    double ignored;
    return v.kind != VALUE_FLOAT && value_is_number(v, out, &ignored);
}

int64_t value_need_int(struct run *r, struct value v, const char *what)
{
    int64_t i;
    value_refuse_undefined(r, v);
    if (!value_as_int(v, &i))
        run_fail(r, "%s must be an integer, not %s", what, value_type_name(v));
    return i;
}

// -1, 0, 1, or 2 when one is NaN. Exact: an int64_t may have more digits than a double.
static int compare_numbers(struct value a, struct value b)
{
    int64_t i = 0, j = 0;
    double x = 0, y = 0;
    value_is_number(a, &i, &x);
    value_is_number(b, &j, &y);
    if (a.kind != VALUE_FLOAT && b.kind != VALUE_FLOAT)
        return i < j ? -1 : i > j;
    if (isnan(x) || isnan(y))
        return 2;
    if (x != y || (a.kind == VALUE_FLOAT && b.kind == VALUE_FLOAT) || fabs(x) >= 0x1p63)
        return x < y ? -1 : x > y;
    if (a.kind == VALUE_FLOAT)
        i = (int64_t)x;
    else
        j = (int64_t)y;
    return i < j ? -1 : i > j;
}

// ---- truth, equality, order

bool value_true(struct run *r, struct value v)
{
    switch (v.kind) {
    case VALUE_MISSING:
    case VALUE_UNDEFINED:
    case VALUE_NONE:
        return false;
    case VALUE_BOOL:
        return v.boolean;
    case VALUE_INT:
        return v.integer != 0;
    case VALUE_FLOAT:
        return v.real != 0;
    case VALUE_STRING:
        return v.string->bytes > 0;
    case VALUE_DICT:
        return v.dict->count > 0;
    case VALUE_LIST:
    case VALUE_TUPLE:
    case VALUE_RANGE:
    case VALUE_KEYS:
    case VALUE_VALUES:
    case VALUE_ITEMS:
        return v.sequence->count > 0;
    case VALUE_LOOP:
        return value_length(r, v) > 0;
    default:
        return true;
    }
}

static bool equal_dicts(struct run *r, const struct dict *a, const struct dict *b)
{
    if (a->count != b->count)
        return false;
    for (size_t i = 0; i < a->count; i++) {
        const struct value *other = dict_get(r, b, a->entries[i].key);
        if (!other || !value_equal(r, a->entries[i].value, *other))
            return false;
    }
    return true;
}

static bool equal_sequences(struct run *r, const struct sequence *a, const struct sequence *b)
{
    if (a->count != b->count)
        return false;
    for (size_t i = 0; i < a->count; i++) {
        run_charge_items(r, 1);
        if (!value_equal(r, a->items[i], b->items[i]))
            return false;
    }
    return true;
}

bool value_equal(struct run *r, struct value a, struct value b)
{
    int64_t i;
    double x;
    bool equal;
    if (value_is_number(a, &i, &x) && value_is_number(b, &i, &x))
        return compare_numbers(a, b) == 0;
    if (a.kind != b.kind)
        return false;
    switch (a.kind) {
    case VALUE_UNDEFINED:
    case VALUE_NONE:
        return true;
    case VALUE_STRING:
        if (a.string->bytes == b.string->bytes)
            run_charge_bytes(r, a.string->bytes);
        return string_equal(a.string, b.string);
    case VALUE_METHOD:
        return a.method->callable == b.method->callable && value_equal(r, a.method->self, b.method->self);
    case VALUE_LIST:
    case VALUE_TUPLE:
    case VALUE_RANGE:
    case VALUE_KEYS:
    case VALUE_ITEMS:
    case VALUE_DICT:
        run_enter(r);
        run_charge(r, 1);
        equal = a.kind == VALUE_DICT ? equal_dicts(r, a.dict, b.dict) : equal_sequences(r, a.sequence, b.sequence);
        run_exit(r);
        return equal;
    default: // the same object
        return a.sequence == b.sequence;
    }
}

int value_compare(struct run *r, struct value a, struct value b, const char *op)
{
    int64_t i;
    double x;
    value_refuse_undefined(r, a);
    value_refuse_undefined(r, b);
    if (value_is_number(a, &i, &x) && value_is_number(b, &i, &x))
        return compare_numbers(a, b);
    if (a.kind == VALUE_STRING && b.kind == VALUE_STRING) {
        // The order of UTF-8 is that of code points.
        size_t bytes = a.string->bytes < b.string->bytes ? a.string->bytes : b.string->bytes;
        run_charge_bytes(r, bytes);
        int order = memcmp(a.string->text, b.string->text, bytes);
        return order ? order : (a.string->bytes > b.string->bytes) - (a.string->bytes < b.string->bytes);
    }
    if (a.kind == b.kind && (a.kind == VALUE_LIST || a.kind == VALUE_TUPLE)) {
        run_enter(r);
        run_charge(r, 1);
        size_t count = a.sequence->count < b.sequence->count ? a.sequence->count : b.sequence->count;
        int order = 2;
        for (size_t at = 0; at < count && order == 2; at++) {
            run_charge_items(r, 1);
            if (!value_equal(r, a.sequence->items[at], b.sequence->items[at]))
                order = value_compare(r, a.sequence->items[at], b.sequence->items[at], op);
        }
        run_exit(r);
        return order != 2 ? order : (a.sequence->count > b.sequence->count) - (a.sequence->count < b.sequence->count);
    }
    run_fail(r, "'%s' not supported between instances of '%s' and '%s'", op, value_type_name(a), value_type_name(b));
}

bool value_contains(struct run *r, struct value container, struct value item)
{
    if (container.kind == VALUE_STRING) {
        value_refuse_undefined(r, item);
        if (item.kind != VALUE_STRING)
            run_fail(r, "'in <string>' requires string as left operand, not %s", value_type_name(item));
        return string_find(r, container.string, item.string, 0, container.string->bytes) != SIZE_MAX;
    }
    if (container.kind == VALUE_DICT)
        return dict_get(r, container.dict, item) != NULL;
    if (container.kind == VALUE_ITERATOR) { // is walked up to the item
        struct sequence *s = container.sequence;
        while (s->done < s->count) // once: it is used up
            if (value_equal(r, s->items[s->done++], item))
                return true;
        return false;
    }
    struct sequence items = value_items(r, container);
    run_charge_items(r, items.count);
    for (size_t i = 0; i < items.count; i++)
        if (value_equal(r, items.items[i], item))
            return true;
    return false;
}

// ---- items

size_t value_length(struct run *r, struct value v)
{
    switch (v.kind) {
    case VALUE_UNDEFINED:
        return 0;
    case VALUE_STRING:
        return v.string->chars;
    case VALUE_DICT:
        return v.dict->count;
    case VALUE_LOOP:
        return (size_t)loop_attribute(r, v.loop, "length").integer;
    case VALUE_ITERATOR:
        break;
    default:
        if (value_is_sequence(v))
            return v.sequence->count;
    }
    run_fail(r, "object of type '%s' has no len()", value_type_name(v));
}

static struct sequence characters(struct run *r, const struct string *s)
{
    struct sequence items = {.items = run_alloc(r, s->chars, sizeof *items.items), .count = s->chars};
    size_t at = 0;
    run_charge(r, s->chars / 64);
    for (size_t i = 0; i < s->chars; i++) {
        size_t begin = at;
        text_next(s->text, &at);
        struct string *character = run_alloc(r, 1, sizeof *character);
        *character = *string_part(r, s, begin, at);
        character->markup = false;
        items.items[i] = value_string(character);
    }
    return items;
}

struct sequence value_items(struct run *r, struct value v)
{
    struct sequence items = {0};
    if (v.kind == VALUE_UNDEFINED)
        return items;
    if (v.kind == VALUE_STRING)
        return characters(r, v.string);
    if (v.kind == VALUE_DICT) {
        items.count = v.dict->count;
        items.items = run_alloc(r, items.count, sizeof *items.items);
        for (size_t i = 0; i < items.count; i++)
            items.items[i] = v.dict->entries[i].key;
        return items;
    }
    if (!value_is_sequence(v))
        run_fail(r, "'%s' object is not iterable", value_type_name(v));
    items = *v.sequence;
    if (v.kind == VALUE_ITERATOR) {
        items.items += items.done;
        items.count -= items.done;
        v.sequence->done = v.sequence->count;
    }
    return items;
}

// ---- dicts: small, so they are searched from the front

struct dict *dict_new(struct run *r) { return run_alloc(r, 1, sizeof(struct dict)); }

static void refuse_unhashable(struct run *r, struct value v)
{
    if (v.kind == VALUE_TUPLE) {
        run_enter(r);
        run_charge(r, v.sequence->count);
        for (size_t i = 0; i < v.sequence->count; i++)
            refuse_unhashable(r, v.sequence->items[i]);
        run_exit(r);
    }
    if (v.kind == VALUE_LIST || v.kind == VALUE_DICT || v.kind == VALUE_KEYS || v.kind == VALUE_ITEMS)
        run_fail(r, "unhashable type: '%s'", value_type_name(v));
}

const struct value *dict_get(struct run *r, const struct dict *d, struct value key)
{
    refuse_unhashable(r, key);
    run_charge(r, d->count / 16);
    for (size_t i = 0; i < d->count; i++)
        if (value_equal(r, d->entries[i].key, key))
            return &d->entries[i].value;
    return NULL;
}

static void dict_append(struct run *r, struct dict *d, struct value key, struct value value)
{
    if (d->count == d->capacity) {
        size_t capacity = d->capacity ? 2 * d->capacity : 8;
        struct dict_entry *entries = run_alloc(r, capacity, sizeof *entries);
        if (d->count)
            memcpy(entries, d->entries, d->count * sizeof *entries);
        d->entries = entries;
        d->capacity = capacity;
    }
    d->entries[d->count++] = (struct dict_entry){key, value};
}

void dict_set(struct run *r, struct dict *d, struct value key, struct value value)
{
    struct value *known = (struct value *)dict_get(r, d, key);
    if (known)
        *known = value;
    else
        dict_append(r, d, key, value);
}

// ---- JSON

static bool is_usual_role(const json_t *json)
{
    static const char *const roles[] = {"system",      "user",   "assistant", "tool",     "developer",
                                        "function",    "model",  "human",     "ipython",  "environment",
                                        "tool_result", "critic", "context",   "documents"};
    for (size_t i = 0; json_is_string(json) && i < sizeof roles / sizeof *roles; i++)
        if (json_string_length(json) == strlen(roles[i]) && !strcmp(json_string_value(json), roles[i]))
            return true;
    return false;
}

static struct value from_json(struct run *r, const json_t *json, bool user, int messages);

static struct value dict_from_json(struct run *r, const json_t *json, bool user, int messages)
{
    struct dict *d = dict_new(r);
    json_t *object = (json_t *)json; // iterating takes no const
    for (void *at = json_object_iter(object); at; at = json_object_iter_next(object, at)) {
        const char *key = json_object_iter_key(at);
        json_t *member = json_object_iter_value(at);
        bool trusted = messages == 1 && !strcmp(key, "role") && is_usual_role(member);
        struct value name = value_string(string_new(r, key, json_object_iter_key_len(at), user));
        dict_append(r, d, name, from_json(r, member, user && !trusted, 0)); // JSON objects have no key twice
    }
    return (struct value){.kind = VALUE_DICT, .dict = d};
}

// messages: 2 for a list of messages, 1 for a message, 0 for all else.
static struct value from_json(struct run *r, const json_t *json, bool user, int messages)
{
    struct value v = value_none();
    switch (json_typeof(json)) {
    case JSON_NULL:
        return v;
    case JSON_TRUE:
    case JSON_FALSE:
        return value_bool(json_is_true(json));
    case JSON_INTEGER:
        return value_int(json_integer_value(json));
    case JSON_REAL:
        return value_real(json_real_value(json));
    case JSON_STRING:
        return value_string(string_new(r, json_string_value(json), json_string_length(json), user));
    case JSON_ARRAY:
    case JSON_OBJECT:
        if (r->depth >= TEMPLATE_MAX_NESTING)
            run_fail(r, "the request is nested more than %d deep", TEMPLATE_MAX_NESTING);
        run_enter(r);
        if (json_is_object(json)) {
            v = dict_from_json(r, json, user, messages);
        } else {
            v = value_sequence(r, VALUE_LIST, json_array_size(json));
            for (size_t i = 0; i < v.sequence->count; i++)
                v.sequence->items[i] = from_json(r, json_array_get(json, i), user, messages == 2);
        }
        run_exit(r);
    }
    return v;
}

struct value value_from_json(struct run *r, const json_t *json, enum template_origin origin)
{
    return from_json(r, json, origin != TEMPLATE_TRUSTED, origin == TEMPLATE_MESSAGES ? 2 : 0);
}
