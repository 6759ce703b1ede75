// Calls: arguments to parameters, attributes and items, the global functions, the methods of dicts, lists and loops.
#include <string.h>
#include <time.h>

#include "formats/template_internal.h"

// ---- arguments

// The index of a parameter in "width first blank", or -1.
static int parameter_index(const char *parameters, const struct string *name)
{
    int index = 0;
    for (const char *at = parameters; *at; index++) {
        size_t bytes = strcspn(at, " ");
        if (bytes == name->bytes && !memcmp(at, name->text, bytes))
            return index;
        at += bytes + (at[bytes] == ' ');
    }
    return -1;
}

static size_t parameter_count(const char *parameters)
{
    size_t count = *parameters != 0;
    for (; *parameters; parameters++)
        count += *parameters == ' ';
    return count;
}

struct value call_callable(struct run *r, const struct callable *callable, const char *what, struct value self,
                           const struct args *args)
{
    struct value v[TEMPLATE_MAX_PARAMETERS] = {{.kind = VALUE_MISSING}};
    if (!callable->call)
        run_fail(r, "the %s '%s' is not supported in chat templates", what, callable->name);
    if (callable->parameters) {
        size_t count = parameter_count(callable->parameters);
        if (args->count > count)
            run_fail(r, "the %s '%s' takes at most %zu arguments, not %zu", what, callable->name, count, args->count);
        for (size_t i = 0; i < args->count; i++)
            v[i] = args->values[i];
        for (size_t i = 0; i < args->num_named; i++) {
            int index = parameter_index(callable->parameters, args->names[i]);
            if (index < 0)
                run_fail(r, "the %s '%s' has no argument '%.*s'", what, callable->name, (int)args->names[i]->bytes,
                         args->names[i]->text);
            if (value_given(v[index]))
                run_fail(r, "the %s '%s' got an argument twice", what, callable->name);
            v[index] = args->named[i];
        }
        for (int i = 0; i < callable->required; i++)
            if (!value_given(v[i]))
                run_fail(r, "the %s '%s' needs %d arguments", what, callable->name, callable->required);
    }
    run_enter(r);
    struct value result = callable->call(r, self, v, args);
    run_exit(r);
    return result;
}

struct value call_value(struct run *r, struct value function, const struct args *args)
{
    struct value result;
    switch (function.kind) {
    case VALUE_UNDEFINED:
        value_fail_undefined(r, function);
    case VALUE_MACRO:
        run_enter(r);
        result = call_macro(r, function.macro, args);
        run_exit(r);
        return result;
    case VALUE_FUNCTION:
        return call_callable(r, function.function, "function", value_none(), args);
    case VALUE_METHOD:
        return call_callable(r, function.method->callable, "method", function.method->self, args);
    default:
        run_fail(r, "'%s' object is not callable", value_type_name(function));
    }
}

// ---- global functions

static struct value function_raise(struct run *r, struct value self, const struct value *v, const struct args *args)
{
    (void)self, (void)args;
    const struct string *text = value_str(r, v[0]);
    (void)error_set(r->err, ERR_USAGE, "%.*s", (int)(text->bytes < ERROR_MSG_BYTES ? text->bytes : ERROR_MSG_BYTES),
                    text->text);
    longjmp(r->leave, 1);
}

static struct value function_range(struct run *r, struct value self, const struct value *v, const struct args *args)
{
    (void)self, (void)args;
    enum { MOST = 100000 }; // as the sandbox of Jinja2
    int64_t start = 0, stop = value_need_int(r, v[0], "an argument of range"), step = 1;
    if (value_given(v[1])) {
        start = stop;
        stop = value_need_int(r, v[1], "an argument of range");
    }
    if (value_given(v[2]))
        step = value_need_int(r, v[2], "an argument of range");
    if (step == 0)
        run_fail(r, "range() arg 3 must not be zero");
    __int128 distance = step > 0 ? (__int128)stop - start : (__int128)start - stop;
    __int128 stride = step > 0 ? step : -(__int128)step;
    __int128 count = distance > 0 ? (distance + stride - 1) / stride : 0;
    if (count > MOST)
        run_fail(r, "a range has more than %d items", MOST);
    struct value range = value_sequence(r, VALUE_RANGE, (size_t)count);
    run_charge(r, (uint64_t)count / 64);
    for (size_t i = 0; i < (size_t)count; i++)
        range.sequence->items[i] = value_int((int64_t)(start + (__int128)i * step));
    range.sequence->start = start;
    range.sequence->stop = stop;
    range.sequence->step = step;
    return range;
}

// dict(mapping or pairs, name=value ...)
static struct dict *dict_from_args(struct run *r, const struct args *args, const char *what)
{
    struct dict *d = dict_new(r);
    if (args->count > 1)
        run_fail(r, "%s takes at most one argument without a name", what);
    if (args->count && args->values[0].kind == VALUE_DICT) {
        const struct dict *from = args->values[0].dict;
        for (size_t i = 0; i < from->count; i++)
            dict_set(r, d, from->entries[i].key, from->entries[i].value);
    } else if (args->count) {
        struct sequence pairs = value_items(r, args->values[0]);
        for (size_t i = 0; i < pairs.count; i++) {
            struct sequence pair = value_items(r, pairs.items[i]);
            if (pair.count != 2)
                run_fail(r, "%s takes pairs, not %zu values", what, pair.count);
            dict_set(r, d, pair.items[0], pair.items[1]);
        }
    }
    for (size_t i = 0; i < args->num_named; i++)
        dict_set(r, d, value_string(args->names[i]), args->named[i]);
    return d;
}

static struct value function_dict(struct run *r, struct value self, const struct value *v, const struct args *args)
{
    (void)self, (void)v;
    return (struct value){.kind = VALUE_DICT, .dict = dict_from_args(r, args, "dict")};
}

static struct value function_namespace(struct run *r, struct value self, const struct value *v, const struct args *args)
{
    (void)self, (void)v;
    struct dict *d = dict_from_args(r, args, "namespace");
    for (size_t i = 0; i < d->count; i++)
        if (d->entries[i].key.kind == VALUE_STRING && d->entries[i].key.string->bytes &&
            d->entries[i].key.string->text[0] == '_')
            run_fail(r, "a namespace cannot have a member whose name begins with '_'");
    return (struct value){.kind = VALUE_NAMESPACE, .dict = d};
}

static struct value function_strftime_now(struct run *r, struct value self, const struct value *v,
                                          const struct args *args)
{
    (void)self, (void)args;
    enum { MOST = 4096 };
    time_t seconds = (time_t)r->now_s;
    struct tm when;
    char format[MOST / 8], text[MOST];
    if (v[0].kind != VALUE_STRING)
        run_fail(r, "strftime_now takes a string, not %s", value_type_name(v[0]));
    const struct string *s = v[0].string;
    if (s->bytes >= sizeof format - 1 || memchr(s->text, 0, s->bytes) || !localtime_r(&seconds, &when))
        run_fail(r, "strftime_now cannot use this format");
    format[0] = 'x'; // so that 0 bytes mean that there was no room
    memcpy(format + 1, s->text, s->bytes);
    format[s->bytes + 1] = 0;
    size_t bytes = strftime(text, sizeof text, format, &when);
    if (!bytes)
        run_fail(r, "the format of strftime_now gives more than %d bytes", MOST);
    // What a user's format says comes from the user.
    return value_string(string_new(r, text + 1, bytes - 1, s->user || s->marks));
}

const struct callable *callable_find(const struct callable *table, const char *name)
{
    for (; table->name; table++)
        if (!strcmp(table->name, name))
            return table;
    return NULL;
}

const struct callable *call_global(const char *name)
{
    static const struct callable functions[] = {
        {"raise_exception", function_raise, "message", 1},
        {"namespace", function_namespace, NULL, 0},
        {"range", function_range, "start stop step", 1},
        {"strftime_now", function_strftime_now, "format", 1},
        {"dict", function_dict, NULL, 0},
        {"lipsum", NULL, NULL, 0},
        {"cycler", NULL, NULL, 0},
        {"joiner", NULL, NULL, 0},
        {NULL, NULL, NULL, 0},
    };
    return callable_find(functions, name);
}

const struct callable *call_named(const struct string *name, const struct callable *find(const char *name))
{
    char text[64];
    if (name->bytes >= sizeof text || memchr(name->text, 0, name->bytes))
        return NULL; // no name is so long
    memcpy(text, name->text, name->bytes);
    text[name->bytes] = 0;
    return find(text);
}

// ---- methods of dicts

static struct value dict_get_method(struct run *r, struct value self, const struct value *v, const struct args *args)
{
    (void)args;
    const struct value *found = dict_get(r, self.dict, v[0]);
    return found ? *found : value_given(v[1]) ? v[1] : value_none();
}

static struct value dict_view(struct run *r, const struct dict *d, enum value_kind kind)
{
    struct value view = value_sequence(r, kind, d->count);
    for (size_t i = 0; i < d->count; i++) {
        const struct dict_entry *entry = &d->entries[i];
        struct value item = kind == VALUE_KEYS ? entry->key : entry->value;
        if (kind == VALUE_ITEMS) {
            item = value_sequence(r, VALUE_TUPLE, 2);
            item.sequence->items[0] = entry->key;
            item.sequence->items[1] = entry->value;
        }
        view.sequence->items[i] = item;
    }
    return view;
}

static struct value dict_items_method(struct run *r, struct value self, const struct value *v, const struct args *args)
{
    (void)v, (void)args;
    return dict_view(r, self.dict, VALUE_ITEMS);
}

static struct value dict_keys_method(struct run *r, struct value self, const struct value *v, const struct args *args)
{
    (void)v, (void)args;
    return dict_view(r, self.dict, VALUE_KEYS);
}

static struct value dict_values_method(struct run *r, struct value self, const struct value *v, const struct args *args)
{
    (void)v, (void)args;
    return dict_view(r, self.dict, VALUE_VALUES);
}

static struct value copy_method(struct run *r, struct value self, const struct value *v, const struct args *args)
{
    (void)r, (void)v, (void)args;
    return self; // values never change
}

static const struct callable dict_methods[] = {{"get", dict_get_method, "key default", 1},
                                               {"items", dict_items_method, "", 0},
                                               {"keys", dict_keys_method, "", 0},
                                               {"values", dict_values_method, "", 0},
                                               {"copy", copy_method, "", 0},
                                               {"fromkeys", NULL, NULL, 0},
                                               {NULL, NULL, NULL, 0}};
static const char *const dict_unsafe[] = {"clear", "pop", "popitem", "setdefault", "update", NULL};

// ---- methods of lists

static struct value list_count(struct run *r, struct value self, const struct value *v, const struct args *args)
{
    (void)args;
    int64_t count = 0;
    run_charge_items(r, self.sequence->count);
    for (size_t i = 0; i < self.sequence->count; i++)
        count += value_equal(r, self.sequence->items[i], v[0]);
    return value_int(count);
}

static struct value list_index(struct run *r, struct value self, const struct value *v, const struct args *args)
{
    (void)args;
    for (size_t i = 0; i < self.sequence->count; i++) {
        run_charge_items(r, 1);
        if (value_equal(r, self.sequence->items[i], v[0]))
            return value_int((int64_t)i);
    }
    run_fail(r, "the item is not in the %s", value_type_name(self));
}

static const struct callable list_methods[] = {{"count", list_count, "value", 1},
                                               {"index", list_index, "value", 1},
                                               {"copy", copy_method, "", 0},
                                               {NULL, NULL, NULL, 0}};
static const char *const list_unsafe[] = {"append", "clear",  "pop",    "reverse", "insert",
                                          "sort",   "extend", "remove", NULL};

// ---- methods of loops

static struct value loop_cycle(struct run *r, struct value self, const struct value *v, const struct args *args)
{
    (void)v;
    if (!args->count)
        run_fail(r, "loop.cycle needs something to cycle through");
    return args->values[self.loop->index % args->count];
}

static struct value loop_changed(struct run *r, struct value self, const struct value *v, const struct args *args)
{
    (void)v;
    struct value now = value_sequence(r, VALUE_TUPLE, args->count);
    for (size_t i = 0; i < args->count; i++)
        now.sequence->items[i] = args->values[i];
    bool changed = !value_given(self.loop->changed) || !value_equal(r, self.loop->changed, now);
    self.loop->changed = now;
    return value_bool(changed);
}

static const struct callable loop_methods[] = {
    {"cycle", loop_cycle, NULL, 0}, {"changed", loop_changed, NULL, 0}, {NULL, NULL, NULL, 0}};

// ---- attributes and items

static bool is_among(const char *const *names, const struct string *name)
{
    for (; names && *names; names++)
        if (string_is(name, *names))
            return true;
    return false;
}

static bool is_internal(const struct string *name) // __class__ and its like
{
    return name->bytes > 4 && !memcmp(name->text, "__", 2) && !memcmp(name->text + name->bytes - 2, "__", 2);
}

static const struct callable *find_method(const struct callable *methods, const struct string *name)
{
    for (; methods && methods->name; methods++)
        if (string_is(name, methods->name))
            return methods;
    return NULL;
}

// What getattr of Python finds: a method, or a member of a namespace or loop. *hidden: it is there, but the sandbox hides it.
static bool find_attribute(struct run *r, struct value object, const struct string *name, struct value *out,
                           bool *hidden)
{
    const struct callable *methods = NULL;
    const char *const *unsafe = NULL;
    *hidden = is_internal(name);
    if (object.kind == VALUE_STRING)
        methods = template_string_methods;
    else if (object.kind == VALUE_DICT) {
        methods = dict_methods;
        unsafe = dict_unsafe;
    } else if (object.kind == VALUE_LIST || object.kind == VALUE_TUPLE || object.kind == VALUE_RANGE) {
        methods = list_methods;
        unsafe = object.kind == VALUE_LIST ? list_unsafe : NULL;
    } else if (object.kind == VALUE_LOOP) {
        methods = loop_methods;
    } else if (object.kind == VALUE_NAMESPACE) {
        const struct value *member = dict_get(r, object.dict, value_string(name));
        if (member)
            *out = *member;
        return member != NULL;
    }
    *hidden |= is_among(unsafe, name);
    const struct callable *found = *hidden ? NULL : find_method(methods, name);
    if (!found && object.kind == VALUE_STRING && !*hidden)
        found = find_method(template_case_methods, name);
    if (found) {
        struct method *method = run_alloc(r, 1, sizeof *method);
        *method = (struct method){found, object};
        *out = (struct value){.kind = VALUE_METHOD, .method = method};
        return true;
    }
    if (object.kind == VALUE_LOOP && !*hidden && name->bytes < 16) {
        char text[16];
        memcpy(text, name->text, name->bytes);
        text[name->bytes] = 0;
        *out = loop_attribute(r, object.loop, text);
        return true;
    }
    return false;
}

struct value call_attribute(struct run *r, struct value object, const struct string *name)
{
    struct value out;
    bool hidden;
    if (object.kind == VALUE_UNDEFINED && string_is(name, "__class__")) // which an undefined value has, and hides, too
        return value_undefined_in(r, object, value_string(name), true);
    value_refuse_undefined(r, object);
    if (find_attribute(r, object, name, &out, &hidden))
        return out;
    if (object.kind == VALUE_DICT && !hidden) {
        const struct value *member = dict_get(r, object.dict, value_string(name));
        if (member)
            return *member;
    }
    return value_undefined_in(r, object, value_string(name), hidden);
}

static bool is_unhashable(struct value v)
{
    return v.kind == VALUE_LIST || v.kind == VALUE_DICT || v.kind == VALUE_KEYS || v.kind == VALUE_ITEMS;
}

struct value call_item(struct run *r, struct value object, struct value key)
{
    int64_t index;
    struct value out;
    bool hidden = false;
    value_refuse_undefined(r, object);
    if (object.kind == VALUE_DICT && !is_unhashable(key)) {
        const struct value *member = dict_get(r, object.dict, key);
        if (member)
            return *member;
    }
    bool indexed = object.kind == VALUE_STRING || object.kind == VALUE_LIST || object.kind == VALUE_TUPLE ||
                   object.kind == VALUE_RANGE;
    if (indexed && value_as_int(key, &index)) {
        int64_t count = (int64_t)value_length(r, object);
        index += index < 0 ? count : 0;
        if (index < 0 || index >= count)
            return value_undefined_in(r, object, key, false);
        if (object.kind != VALUE_STRING)
            return object.sequence->items[index];
        size_t begin = string_offset(r, object.string, (size_t)index), end = begin;
        text_next(object.string->text, &end);
        return value_string(string_part(r, object.string, begin, end));
    }
    if (key.kind == VALUE_STRING && find_attribute(r, object, key.string, &out, &hidden))
        return out;
    return value_undefined_in(r, object, key, hidden);
}
