// The rules of JSON at large; alternatives and references of a schema, and its rules. See grammar_schema.h.
#include "engine/serve/grammar_schema_internal.h"

#include "engine/serve/grammar_regex.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// ---- JSON at large -------------------------------------------------------------------------------------------------

static uint32_t of_regex(struct net *net, const char *expression)
{
    uint32_t node = NET_NOTHING;
    struct error err;
    if (grammar_regex_build(net, expression, strlen(expression), REGEX_PLAIN, REGEX_WHOLE, NET_ACCEPT_NODE, &node,
                            &err))
        grammar_net_fail(net, err.code);
    return node;
}

void grammar_schema_base(struct net *net, struct grammar_base *base)
{
    // White space between the signs of JSON: nothing, a blank, or a line end and its indentation. Models write both styles; without a bound a
    // model may go on with blanks for ever.
    base->space = of_regex(net, "(?: |\\n[ \\t]{0,32})?");
    base->string = of_regex(net, "\"(?:" GRAMMAR_JSON_CHARACTER ")*\"");
    // Digits are bounded: no parser overflows, no model goes on for ever.
    base->integer = of_regex(net, "0|-?[1-9][0-9]{0,17}");
    base->number = of_regex(net, "-?(?:0|[1-9][0-9]{0,15})(?:\\.[0-9]{1,16})?(?:[eE][+-]?[0-9]{1,2})?");
    base->boolean = of_regex(net, "true|false");
    base->null = of_regex(net, "null");
    base->value = grammar_net_later(net);

    uint32_t end = NET_ACCEPT_NODE, space = base->space;
    uint32_t close = grammar_net_text(net, "}", 1, end), more = grammar_net_later(net);
    uint32_t pair = grammar_net_call(net, space, grammar_net_call(net, base->value, more));
    pair = grammar_net_call(net, base->string, grammar_net_call(net, space, grammar_net_text(net, ":", 1, pair)));
    uint32_t comma = grammar_net_text(net, ",", 1, grammar_net_call(net, space, pair));
    grammar_net_set(net, more, grammar_net_call(net, space, grammar_net_either(net, close, comma)));
    base->object = grammar_net_text(net, "{", 1, grammar_net_call(net, space, grammar_net_either(net, close, pair)));

    close = grammar_net_text(net, "]", 1, end);
    more = grammar_net_later(net);
    uint32_t item = grammar_net_call(net, base->value, more);
    comma = grammar_net_text(net, ",", 1, grammar_net_call(net, space, item));
    grammar_net_set(net, more, grammar_net_call(net, space, grammar_net_either(net, close, comma)));
    base->array = grammar_net_text(net, "[", 1, grammar_net_call(net, space, grammar_net_either(net, close, item)));

    const uint32_t rules[] = {base->string, base->number, base->object, base->array, base->boolean, base->null};
    uint32_t any = grammar_net_begin(net, NET_SPLIT);
    for (size_t i = 0; i < sizeof rules / sizeof *rules; i++)
        grammar_net_edge(net, any, 0, 0, rules[i]);
    grammar_net_set(net, base->value, any);
}

// ---- the builder ---------------------------------------------------------------------------------------------------

struct schema_block {
    struct schema_block *next;
    char bytes[];
};

struct schema_rule {
    struct schema_source *sources;
    int count;
    uint32_t node; // a later one
};

int schema_refuse(struct schema_builder *b, const char *path, const char *format, ...)
{
    if (!b->rc) {
        char text[ERROR_MSG_BYTES];
        va_list args;
        va_start(args, format);
        vsnprintf(text, sizeof text, format, args);
        va_end(args);
        b->rc = error_set(b->err, ERR_USAGE, "%s: %s", path, text);
    }
    return b->rc;
}

void *schema_keep(struct schema_builder *b, size_t bytes)
{
    if (b->rc)
        return NULL;
    b->memory_bytes += bytes;
    if (b->memory_bytes > SCHEMA_MAX_MEMORY_BYTES) {
        schema_refuse(b, b->root.path, "the schema is too large");
        return NULL;
    }
    struct schema_block *block = calloc(1, sizeof *block + bytes);
    if (!block) {
        b->rc = error_set(b->err, ERR_MEMORY, "out of memory for a schema");
        return NULL;
    }
    block->next = b->blocks;
    b->blocks = block;
    return block->bytes;
}

const char *schema_path(struct schema_builder *b, const char *path, const char *name, int64_t index)
{
    char text[SCHEMA_PATH_BYTES];
    int length = index < 0
                     ? snprintf(text, sizeof text, "%s.%s", path, name)
                     : snprintf(text, sizeof text, "%s%s%s[%lld]", path, *name ? "." : "", name, (long long)index);
    if (length < 0 || length >= (int)sizeof text)
        return path;
    char *kept = schema_keep(b, (size_t)length + 1);
    return kept ? memcpy(kept, text, (size_t)length + 1) : path;
}

bool schema_step(struct schema_builder *b, const char *path)
{
    if (b->rc)
        return false;
    if (b->net->failed == ERR_MEMORY)
        b->rc = error_set(b->err, ERR_MEMORY, "out of memory for a schema");
    else if (b->net->failed || ++b->steps > SCHEMA_MAX_STEPS)
        schema_refuse(b, path, "the schema is too large, or has too many alternatives");
    return !b->rc;
}

// ---- rules ---------------------------------------------------------------------------------------------------------

static uint64_t hash_sources(const struct schema_source *sources, int count)
{
    uint64_t hash = (uint64_t)count;
    for (int i = 0; i < count; i++)
        hash = (hash ^ (uintptr_t)sources[i].json) * 0x9E3779B97F4A7C15u, hash ^= hash >> 29;
    return hash;
}

static bool same_sources(const struct schema_rule *rule, const struct schema_source *sources, int count)
{
    for (int i = 0; i < count && rule->count == count; i++)
        if (rule->sources[i].json != sources[i].json)
            return false;
    return rule->count == count;
}

// Makes room for one more rule and its slot.
static bool grow_rules(struct schema_builder *b)
{
    if (b->num_rules < b->rule_capacity)
        return true;
    uint32_t capacity = b->rule_capacity ? 2 * b->rule_capacity : 64;
    struct schema_rule *rules = realloc(b->rules, capacity * sizeof *rules);
    if (rules)
        b->rules = rules;
    uint32_t *slots = calloc(2 * capacity, sizeof *slots); // 1 + index of the rule
    if (!rules || !slots) {
        free(slots);
        b->rc = error_set(b->err, ERR_MEMORY, "out of memory for a schema");
        return false;
    }
    free(b->rule_slots);
    b->rule_slots = slots;
    b->rule_capacity = capacity;
    b->slot_capacity = 2 * capacity;
    for (uint32_t i = 0; i < b->num_rules; i++) {
        uint32_t slot = (uint32_t)hash_sources(rules[i].sources, rules[i].count) & (b->slot_capacity - 1);
        while (slots[slot])
            slot = (slot + 1) & (b->slot_capacity - 1);
        slots[slot] = i + 1;
    }
    return true;
}

static bool admits_all(const json_t *schema)
{
    return json_is_true(schema) || (json_is_object(schema) && !json_object_size(schema));
}

uint32_t schema_rule(struct schema_builder *b, const struct schema_source *sources, int count)
{
    struct schema_source different[SCHEMA_MAX_TOGETHER];
    int num_different = 0;
    if (b->rc || !grow_rules(b))
        return NET_NOTHING;
    for (int i = 0; i < count; i++) {
        bool known = admits_all(sources[i].json);
        for (int k = 0; k < num_different; k++)
            known |= different[k].json == sources[i].json;
        if (known)
            continue;
        if (num_different == SCHEMA_MAX_TOGETHER) {
            schema_refuse(b, sources[i].path, "more than %d schemas hold for one value", (int)SCHEMA_MAX_TOGETHER);
            return NET_NOTHING;
        }
        different[num_different++] = sources[i];
    }
    if (!num_different)
        return b->base->value;
    uint32_t slot = (uint32_t)hash_sources(different, num_different) & (b->slot_capacity - 1);
    for (; b->rule_slots[slot]; slot = (slot + 1) & (b->slot_capacity - 1))
        if (same_sources(&b->rules[b->rule_slots[slot] - 1], different, num_different))
            return b->rules[b->rule_slots[slot] - 1].node;
    struct schema_source *kept = schema_keep(b, (size_t)num_different * sizeof *kept);
    if (!kept)
        return NET_NOTHING;
    memcpy(kept, different, (size_t)num_different * sizeof *kept);
    b->rules[b->num_rules] = (struct schema_rule){kept, num_different, grammar_net_later(b->net)};
    b->rule_slots[slot] = b->num_rules + 1;
    return b->rules[b->num_rules++].node;
}

// ---- references ----------------------------------------------------------------------------------------------------

// One segment of a JSON pointer, decoded: ~0 ~1 and %xx. Returns where it ends.
static const char *pointer_segment(const char *at, char *out, size_t capacity)
{
    size_t length = 0;
    for (; *at && *at != '/'; at++) {
        char c = *at;
        unsigned value;
        if (c == '~' && (at[1] == '0' || at[1] == '1'))
            c = *++at == '0' ? '~' : '/';
        else if (c == '%' && at[1] && at[2] && sscanf(at + 1, "%2x", &value) == 1) {
            c = (char)value;
            at += 2;
        }
        if (length + 1 < capacity)
            out[length++] = c;
    }
    out[length] = 0;
    return at;
}

int schema_find_reference(struct schema_builder *b, struct schema_source from, const char *pointer,
                          struct schema_source *out)
{
    struct schema_source found = b->root;
    char segment[512], *end;
    if (pointer[0] != '#' || (pointer[1] && pointer[1] != '/'))
        return schema_refuse(b, from.path, "\"$ref\" must be \"#\" or begin with \"#/\", found \"%.200s\"", pointer);
    for (const char *at = pointer + 1; *at && found.json;) {
        at = pointer_segment(at + 1, segment, sizeof segment);
        found.path = schema_path(b, found.path, segment, -1);
        if (json_is_array(found.json)) {
            unsigned long index = strtoul(segment, &end, 10);
            found.json = *segment && !*end ? json_array_get(found.json, index) : NULL;
        } else {
            found.json = json_object_get(found.json, segment);
        }
    }
    if (!found.json)
        return schema_refuse(b, from.path, "there is no \"%.200s\" to refer to", pointer);
    *out = found;
    return b->rc;
}

// ---- alternatives --------------------------------------------------------------------------------------------------

// Schemas that hold together and are still to be looked at. A choice stands for one of the members of its array, or for exactly one of them.
enum choice { NO_CHOICE, ANY_OF, ONE_OF };
struct pending {
    struct schema_source source;
    enum choice choice;
    const struct pending *from; // what it was found in, for references in a circle
};

struct expansion {
    struct schema_builder *b;
    uint32_t result; // alternatives so far
    int depth;
};

static bool found_in(const struct pending *from, const json_t *json)
{
    for (; from; from = from->from)
        if (from->source.json == json && !from->choice)
            return true;
    return false;
}

struct together {
    struct pending pending[SCHEMA_MAX_TOGETHER];
    int num_pending;
    struct schema_source simple[SCHEMA_MAX_TOGETHER]; // without references and alternatives, or those were taken out
    int num_simple;
};

static void add_pending(struct schema_builder *b, struct together *t, struct pending added)
{
    if (b->rc)
        return;
    if (t->num_pending == SCHEMA_MAX_TOGETHER) {
        schema_refuse(b, added.source.path, "more than %d schemas hold for one value", (int)SCHEMA_MAX_TOGETHER);
        return;
    }
    t->pending[t->num_pending++] = added;
}

static void expand(struct expansion *e, struct together *t);

// Each member of a choice in turn, together with all else.
static void expand_choice(struct expansion *e, const struct together *t, const struct pending *from)
{
    struct schema_source choice = from->source;
    size_t count = json_array_size(choice.json);
    if (from->choice == ONE_OF)
        schema_check_one_of(e->b, choice, t->simple, t->num_simple, t->num_pending == 0);
    if (++e->depth > 64) {
        schema_refuse(e->b, choice.path, "alternatives are nested too deeply");
        return;
    }
    struct together *copy = malloc(sizeof *copy);
    if (!copy) {
        e->b->rc = error_set(e->b->err, ERR_MEMORY, "out of memory for a schema");
        return;
    }
    for (size_t i = 0; i < count && !e->b->rc; i++) {
        *copy = *t;
        const char *path = schema_path(e->b, choice.path, "", (int64_t)i);
        add_pending(e->b, copy, (struct pending){{json_array_get(choice.json, i), path}, NO_CHOICE, from});
        expand(e, copy);
    }
    free(copy);
    e->depth--;
}

// Takes one schema apart. false: it admits nothing.
static bool expand_one(struct expansion *e, struct together *t, const struct pending *one)
{
    static const char *const choices[] = {"anyOf", "oneOf"};
    struct schema_builder *b = e->b;
    struct schema_source source = one->source, target = {0};
    int types;
    bool own;
    if (json_is_false(source.json))
        return false;
    if (admits_all(source.json))
        return true;
    if (schema_check(b, source, &types, &own))
        return false;
    const char *pointer = json_string_value(json_object_get(source.json, "$ref"));
    if (pointer) {
        if (schema_find_reference(b, source, pointer, &target) || found_in(one, target.json))
            return false;
        add_pending(b, t, (struct pending){target, NO_CHOICE, one});
    }
    const json_t *all = json_object_get(source.json, "allOf");
    for (size_t i = 0; i < json_array_size(all); i++)
        add_pending(b, t,
                    (struct pending){
                        {json_array_get(all, i), schema_path(b, source.path, "allOf", (int64_t)i)}, NO_CHOICE, one});
    for (int i = 0; i < 2; i++) {
        const json_t *choice = json_object_get(source.json, choices[i]);
        if (choice)
            add_pending(
                b, t,
                (struct pending){{choice, schema_path(b, source.path, choices[i], -1)}, i ? ONE_OF : ANY_OF, one});
    }
    for (int i = 0; i < t->num_simple; i++)
        own &= t->simple[i].json != source.json;
    if (!own)
        return true;
    if (t->num_simple == SCHEMA_MAX_TOGETHER) {
        schema_refuse(b, source.path, "more than %d schemas hold for one value", (int)SCHEMA_MAX_TOGETHER);
        return false;
    }
    t->simple[t->num_simple++] = source;
    return true;
}

static void expand(struct expansion *e, struct together *t)
{
    struct schema_builder *b = e->b;
    while (t->num_pending > 0) {
        // What needs no choice comes first, in order; then the first choice.
        int next = 0;
        while (next < t->num_pending && t->pending[next].choice)
            next++;
        next = next < t->num_pending ? next : 0;
        struct pending *one = schema_keep(b, sizeof *one);
        if (!one || !schema_step(b, t->pending[next].source.path))
            return;
        *one = t->pending[next];
        memmove(t->pending + next, t->pending + next + 1, (size_t)(--t->num_pending - next) * sizeof *t->pending);
        if (one->choice) {
            expand_choice(e, t, one);
            return;
        }
        if (!expand_one(e, t, one))
            return;
    }
    if (!b->rc)
        e->result = grammar_net_either(b->net, e->result, schema_build_value(b, t->simple, t->num_simple));
}

static void build_rule(struct schema_builder *b, uint32_t index)
{
    struct schema_rule rule = b->rules[index];
    struct expansion e = {b, NET_NOTHING, 0};
    struct together *t = calloc(1, sizeof *t);
    if (!t) {
        b->rc = error_set(b->err, ERR_MEMORY, "out of memory for a schema");
        return;
    }
    for (int i = 0; i < rule.count; i++)
        add_pending(b, t, (struct pending){rule.sources[i], NO_CHOICE, NULL});
    expand(&e, t);
    free(t);
    grammar_net_set(b->net, rule.node, e.result);
}

int grammar_schema_build(struct net *net, const struct grammar_base *base, const json_t *schema, const char *path,
                         uint32_t *rule, struct error *err)
{
    struct schema_builder b = {.net = net, .base = base, .root = {schema, path}, .err = err};
    *rule = schema_rule(&b, &b.root, 1);
    for (uint32_t i = 0; i < b.num_rules && schema_step(&b, path); i++)
        build_rule(&b, i);
    if (!b.rc)
        schema_step(&b, path); // the net may have failed last
    while (b.blocks) {
        struct schema_block *next = b.blocks->next;
        free(b.blocks);
        b.blocks = next;
    }
    free(b.rules);
    free(b.rule_slots);
    return b.rc;
}
