// Objects and arrays of a schema.
#include "engine/serve/grammar_schema_internal.h"

#include "engine/serve/grammar_regex.h"
#include "formats/tokenizer_text.h"

#include <stdlib.h>
#include <string.h>

// ---- objects -------------------------------------------------------------------------------------------------------

// What may stand where no property is named: by all schemas together.
struct additional {
    bool allowed, refused; // refused: some schema says false; neither: nobody says anything
    struct schema_source sources[SCHEMA_MAX_TOGETHER];
    int count;
};

static void find_additional(struct schema_builder *b, const struct schema_source *sources, int count,
                            struct additional *out)
{
    bool named = false;
    *out = (struct additional){0};
    for (int i = 0; i < count; i++) {
        const json_t *value = json_object_get(sources[i].json, "additionalProperties");
        named |= json_object_size(json_object_get(sources[i].json, "properties")) > 0;
        out->refused |= json_is_false(value);
        out->allowed |= json_is_true(value) || json_is_object(value);
        if (json_is_object(value))
            out->sources[out->count++] =
                (struct schema_source){value, schema_path(b, sources[i].path, "additionalProperties", -1)};
    }
    out->allowed = !out->refused && (out->allowed || !named);
}

// The rule of a property's value: each schema says something about it under its name, or as an additional one.
static uint32_t property_rule(struct schema_builder *b, const struct schema_source *sources, int count,
                              const char *name)
{
    struct schema_source found[SCHEMA_MAX_TOGETHER];
    int num_found = 0;
    for (int i = 0; i < count && num_found < SCHEMA_MAX_TOGETHER; i++) {
        const json_t *value = json_object_get(json_object_get(sources[i].json, "properties"), name);
        const char *word = "properties";
        if (!value) {
            value = json_object_get(sources[i].json, "additionalProperties");
            word = "additionalProperties";
        }
        if (!value)
            continue;
        const char *path = schema_path(b, sources[i].path, word, -1);
        found[num_found++] = (struct schema_source){value, word[0] == 'p' ? schema_path(b, path, name, -1) : path};
    }
    return schema_rule(b, found, num_found);
}

// Names in the order in which schemas give them, those that are only required last. A new object: name -> whether it is required.
static json_t *property_names(struct schema_builder *b, const struct schema_source *sources, int count,
                              const struct additional *additional)
{
    json_t *names = json_object(), *value;
    const char *name;
    bool ok = names != NULL;
    for (int i = 0; i < count; i++)
        json_object_foreach(json_object_get(sources[i].json, "properties"), name, value) ok =
            ok && (json_object_get(names, name) || !json_object_set_new(names, name, json_false()));
    for (int i = 0; i < count && ok; i++) {
        const json_t *required = json_object_get(sources[i].json, "required");
        for (size_t k = 0; k < json_array_size(required) && ok && schema_step(b, sources[i].path); k++) {
            name = json_string_value(json_array_get(required, k));
            if (!name)
                schema_refuse(b, sources[i].path, "\"required\" must be an array of strings");
            else if (!json_object_get(names, name) && additional->refused)
                schema_refuse(
                    b, sources[i].path,
                    "\"%.60s\" is required, but \"properties\" lacks it and \"additionalProperties\" is false", name);
            else
                ok = !json_object_set_new(names, name, json_true());
        }
    }
    if (!ok)
        b->rc = error_set(b->err, ERR_MEMORY, "out of memory for a schema");
    return names;
}

enum { MAX_NAME_BYTES = 128 }; // other_key calls itself for each character

static int compare_names(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

// The rest of a key that is none of these names, behind `depth` bytes that all of them share. any: the rest of any key; quote: its end.
static uint32_t other_key(struct schema_builder *b, const char *const *names, size_t count, size_t depth, uint32_t any,
                          uint32_t quote)
{
    struct net *net = b->net;
    struct regex_set set = {0};
    uint32_t result = NET_NOTHING;
    bool is_name = count > 0 && !names[0][depth];
    for (size_t i = is_name; i < count && schema_step(b, b->root.path);) {
        uint32_t character, other;
        size_t begin = i, bytes = tokenizer_text_next(names[i] + depth, strlen(names[i] + depth), &character);
        while (i < count && !strncmp(names[i] + depth, names[begin] + depth, bytes))
            i++;
        struct regex_set one = {0};
        grammar_regex_add(&one, character, character);
        grammar_regex_add(&set, character, character);
        other = other_key(b, names + begin, i - begin, depth + bytes, any, quote);
        result = grammar_net_either(net, result, grammar_regex_build_set(net, &one, REGEX_JSON, other));
    }
    grammar_regex_add(&set, 0, 0x1F); // no control characters
    if (set.full)
        schema_refuse(b, b->root.path, "too many properties beside additional ones");
    grammar_regex_invert(&set);
    result = grammar_net_either(net, result, grammar_regex_build_set(net, &set, REGEX_JSON, any));
    return is_name ? result : grammar_net_either(net, result, quote);
}

// A pair of an additional property, then next.
static uint32_t additional_pair(struct schema_builder *b, json_t *names, const struct additional *additional,
                                uint32_t next)
{
    struct net *net = b->net;
    uint32_t space = b->base->space, key;
    size_t count = 0;
    const char *name;
    json_t *value;
    uint32_t rule = schema_rule(b, additional->sources, additional->count);
    uint32_t colon = grammar_net_text(net, ":", 1, grammar_net_call(net, space, grammar_net_call(net, rule, next)));
    colon = grammar_net_call(net, space, colon);
    if (!json_object_size(names))
        return grammar_net_call(net, b->base->string, colon);
    const char **list = calloc(json_object_size(names), sizeof *list);
    if (!list) {
        b->rc = error_set(b->err, ERR_MEMORY, "out of memory for a schema");
        return NET_NOTHING;
    }
    json_object_foreach(names, name, value)
    {
        if (strlen(name) > MAX_NAME_BYTES)
            schema_refuse(b, b->root.path, "beside additional properties a name has at most %d bytes: \"%.40s...\"",
                          (int)MAX_NAME_BYTES, name);
        list[count++] = name;
    }
    qsort(list, count, sizeof *list, compare_names);
    uint32_t quote = grammar_net_text(net, "\"", 1, NET_ACCEPT_NODE), any = grammar_net_later(net);
    struct regex_set all = {0};
    grammar_regex_add(&all, 0, 0x1F);
    grammar_regex_invert(&all);
    grammar_net_set(net, any, grammar_net_either(net, grammar_regex_build_set(net, &all, REGEX_JSON, any), quote));
    key = grammar_net_text(net, "\"", 1, other_key(b, list, count, 0, any, quote));
    free(list);
    return grammar_net_call(net, key, colon);
}

// The key as it stands in the text, with its colon, then the value and next.
static uint32_t named_pair(struct schema_builder *b, const char *name, uint32_t rule, uint32_t next)
{
    struct net *net = b->net;
    json_t *json = json_string(name);
    char *key = json ? json_dumps(json, JSON_ENCODE_ANY) : NULL;
    json_decref(json);
    if (!key) {
        b->rc = b->rc ? b->rc : error_set(b->err, ERR_MEMORY, "out of memory for a schema");
        return NET_NOTHING;
    }
    uint32_t node = grammar_net_call(net, b->base->space, grammar_net_call(net, rule, next));
    node = grammar_net_call(net, b->base->space, grammar_net_text(net, ":", 1, node));
    node = grammar_net_text(net, key, strlen(key), node);
    free(key);
    return node;
}

// Pairs from the last to the first. Before each there are two states: nothing was written so far, or a comma was.
static uint32_t build_pairs(struct schema_builder *b, const struct schema_source *sources, int count, json_t *names,
                            const struct additional *additional)
{
    struct net *net = b->net;
    uint32_t space = b->base->space, close = grammar_net_text(net, "}", 1, NET_ACCEPT_NODE);
    uint32_t first = close, after_comma = NET_NOTHING, behind = grammar_net_call(net, space, close);
    bool may_end = true;
    if (additional->allowed) {
        behind = grammar_net_later(net);
        after_comma = additional_pair(b, names, additional, behind);
        uint32_t comma = grammar_net_text(net, ",", 1, grammar_net_call(net, space, after_comma));
        grammar_net_set(net, behind, grammar_net_call(net, space, grammar_net_either(net, close, comma)));
        first = grammar_net_either(net, close, after_comma);
    }
    size_t left = json_object_size(names);
    const char **list = calloc(left + 1, sizeof *list), *name;
    json_t *value;
    if (!list) {
        b->rc = error_set(b->err, ERR_MEMORY, "out of memory for a schema");
        return NET_NOTHING;
    }
    left = 0;
    json_object_foreach(names, name, value) list[left++] = name;
    while (left > 0 && schema_step(b, b->root.path)) {
        name = list[--left];
        bool required = json_is_true(json_object_get(names, name));
        uint32_t pair = named_pair(b, name, property_rule(b, sources, count, name), behind);
        after_comma = required ? pair : grammar_net_either(net, pair, after_comma);
        first = required ? pair : grammar_net_either(net, pair, first);
        may_end &= !required;
        uint32_t comma = after_comma == NET_NOTHING ? NET_NOTHING : grammar_net_call(net, space, after_comma);
        comma = grammar_net_text(net, ",", 1, comma);
        behind = grammar_net_call(net, space, grammar_net_either(net, may_end ? close : NET_NOTHING, comma));
    }
    free(list);
    return grammar_net_text(net, "{", 1, grammar_net_call(net, space, first));
}

uint32_t schema_object(struct schema_builder *b, const struct schema_source *sources, int count)
{
    struct additional additional;
    bool about = false;
    static const char *const words[] = {"properties", "required", "additionalProperties"};
    for (int i = 0; i < count; i++)
        for (int k = 0; k < 3; k++)
            about |= json_object_get(sources[i].json, words[k]) != NULL;
    if (!about)
        return b->base->object;
    find_additional(b, sources, count, &additional);
    json_t *names = property_names(b, sources, count, &additional);
    uint32_t node = b->rc ? NET_NOTHING : build_pairs(b, sources, count, names, &additional);
    json_decref(names);
    return node;
}

// ---- arrays --------------------------------------------------------------------------------------------------------

// The rule of the item at an index; index -1: of those behind all prefixItems. NET_NOTHING: there is none.
static uint32_t item_rule(struct schema_builder *b, const struct schema_source *sources, int count, int64_t index)
{
    struct schema_source found[SCHEMA_MAX_TOGETHER];
    int num_found = 0;
    bool prefix = false, items = false;
    for (int i = 0; i < count && num_found < SCHEMA_MAX_TOGETHER; i++) {
        const json_t *list = json_object_get(sources[i].json, "prefixItems"),
                     *rest = json_object_get(sources[i].json, "items");
        const json_t *own = index >= 0 ? json_array_get(list, (size_t)index) : NULL;
        prefix |= list != NULL;
        items |= rest != NULL;
        if (json_is_false(own ? own : rest))
            return NET_NOTHING;
        if (own)
            found[num_found++] = (struct schema_source){own, schema_path(b, sources[i].path, "prefixItems", index)};
        else if (rest)
            found[num_found++] = (struct schema_source){rest, schema_path(b, sources[i].path, "items", -1)};
    }
    // Items that nobody speaks of come only where nobody speaks of any.
    return index < 0 && prefix && !items ? NET_NOTHING : schema_rule(b, found, num_found);
}

// Items behind the prefix, each with its comma, between min and max of them; then next.
static uint32_t more_items(struct schema_builder *b, uint32_t rule, uint32_t min, uint32_t max, uint32_t next)
{
    struct net *net = b->net;
    uint32_t space = b->base->space, again, pair;
    bool counted = min > 0 || max != NET_NO_LIMIT;
    if (rule == NET_NOTHING || max == 0)
        return min ? NET_NOTHING : grammar_net_call(net, space, next);
    if (counted)
        grammar_net_loop_begin(net, min, max, grammar_net_call(net, space, next), &again);
    else
        again = grammar_net_later(net);
    pair = grammar_net_text(net, ",", 1, grammar_net_call(net, space, grammar_net_call(net, rule, again)));
    if (counted)
        return grammar_net_loop_end(net, again, grammar_net_call(net, space, pair));
    grammar_net_set(net, again, grammar_net_call(net, space, grammar_net_either(net, pair, next)));
    return again;
}

static uint32_t less(uint32_t count, uint32_t by)
{
    return count == NET_NO_LIMIT ? count : count > by ? count - by : 0;
}

uint32_t schema_array(struct schema_builder *b, const struct schema_source *sources, int count)
{
    struct net *net = b->net;
    uint32_t min, max, space = b->base->space, close = grammar_net_text(net, "]", 1, NET_ACCEPT_NODE);
    size_t prefix = 0;
    bool about = false;
    schema_counts(b, sources, count, "minItems", "maxItems", &min, &max);
    for (int i = 0; i < count; i++) {
        size_t own = json_array_size(json_object_get(sources[i].json, "prefixItems"));
        prefix = own > prefix ? own : prefix;
        about |= json_object_get(sources[i].json, "prefixItems") || json_object_get(sources[i].json, "items");
    }
    if (b->rc || min > max)
        return NET_NOTHING;
    if (!about && !min && max == NET_NO_LIMIT)
        return b->base->array;
    uint32_t rest = max > prefix ? item_rule(b, sources, count, -1) : NET_NOTHING;
    uint32_t more, first;
    if (!prefix) {
        more = rest == NET_NOTHING || !max ? NET_NOTHING : more_items(b, rest, less(min, 1), less(max, 1), close);
        first = grammar_net_call(net, rest, more);
        return grammar_net_text(
            net, "[", 1, grammar_net_call(net, space, grammar_net_either(net, first, min ? NET_NOTHING : close)));
    }
    // From the last to the first: `more` is what may follow the item before.
    if (prefix > max)
        prefix = max;
    more = more_items(b, rest, less(min, (uint32_t)prefix), less(max, (uint32_t)prefix), close);
    for (size_t i = prefix; i > 0 && schema_step(b, b->root.path); i--) {
        uint32_t rule = item_rule(b, sources, count, (int64_t)i - 1);
        uint32_t item = grammar_net_call(net, rule, more);
        uint32_t end = min < i ? close : NET_NOTHING; // the array may end before this item
        if (i == 1) {
            more = grammar_net_either(net, item, end);
        } else {
            uint32_t comma =
                item == NET_NOTHING ? item : grammar_net_text(net, ",", 1, grammar_net_call(net, space, item));
            more = grammar_net_call(net, space, grammar_net_either(net, comma, end));
        }
    }
    if (!prefix)
        more = min ? NET_NOTHING : close;
    return grammar_net_text(net, "[", 1, grammar_net_call(net, space, more));
}
