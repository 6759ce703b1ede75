// One alternative of a schema: the values that a few simple schemas admit together.
#include "engine/serve/grammar_schema_internal.h"

#include "engine/serve/grammar_number.h"
#include "engine/serve/grammar_regex.h"

#include <stdlib.h>
#include <string.h>

// ---- enumerations --------------------------------------------------------------------------------------------------

int schema_type_of_value(const json_t *value)
{
    switch (json_typeof(value)) {
    case JSON_OBJECT:
        return TYPE_OBJECT;
    case JSON_ARRAY:
        return TYPE_ARRAY;
    case JSON_STRING:
        return TYPE_STRING;
    case JSON_INTEGER:
        return TYPE_INTEGER;
    case JSON_REAL:
        return TYPE_NUMBER;
    case JSON_TRUE:
    case JSON_FALSE:
        return TYPE_BOOLEAN;
    default:
        return TYPE_NULL;
    }
}

// Whether all of "enum" and "const" of a schema name this value.
static bool names_value(struct schema_builder *b, struct schema_source source, const json_t *value)
{
    const json_t *list = json_object_get(source.json, "enum"), *one = json_object_get(source.json, "const");
    bool found = !list;
    if (json_is_array(value) || json_is_object(value)) {
        schema_refuse(b, source.path, "several enumerations of arrays or objects for one value are not supported");
        return false;
    }
    for (size_t i = 0; i < json_array_size(list) && !found && schema_step(b, source.path); i++)
        found = json_equal(json_array_get(list, i), value);
    return found && (!one || json_equal(one, value));
}

static uint32_t build_enumeration(struct schema_builder *b, const struct schema_source *sources, int count, int types,
                                  int first)
{
    static const char *const others[] = {
        "properties", "required", "items",  "prefixItems", "minItems", "maxItems",         "minLength",
        "maxLength",  "pattern",  "format", "minimum",     "maximum",  "exclusiveMinimum", "exclusiveMaximum"};
    const json_t *list = json_object_get(sources[first].json, "enum");
    size_t most = list ? json_array_size(list) : 1, num_texts = 0;
    bool both =
        list && json_object_get(sources[first].json, "const"); // else the first one names all values that come from it
    for (int s = 0; s < count; s++) {
        for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
            if (json_object_get(sources[s].json, others[i])) {
                schema_refuse(b, sources[s].path, "\"%s\" together with \"enum\" or \"const\" is not supported",
                              others[i]);
                return NET_NOTHING;
            }
        }
    }
    struct net_text *texts = calloc(most, sizeof *texts);
    for (size_t i = 0; texts && i < most && schema_step(b, sources[first].path); i++) {
        const json_t *value = list ? json_array_get(list, i) : json_object_get(sources[first].json, "const");
        bool wanted = schema_type_of_value(value) & types;
        for (int s = 0; s < count && wanted; s++)
            wanted = (s == first && !both) || names_value(b, sources[s], value);
        char *text = wanted ? json_dumps(value, JSON_ENCODE_ANY) : NULL;
        if (text)
            texts[num_texts++] = (struct net_text){text, strlen(text)};
        else if (wanted)
            schema_refuse(b, sources[first].path, "a value of \"enum\" cannot be written");
    }
    if (!texts)
        b->rc = error_set(b->err, ERR_MEMORY, "out of memory for a schema");
    uint32_t node = texts ? grammar_net_texts(b->net, texts, num_texts, NET_ACCEPT_NODE) : NET_NOTHING;
    for (size_t i = 0; i < num_texts; i++)
        free((char *)texts[i].text);
    free(texts);
    return node;
}

// ---- strings -------------------------------------------------------------------------------------------------------

static int64_t count_value(const json_t *value)
{
    return json_is_integer(value) ? json_integer_value(value) : (int64_t)json_real_value(value);
}

void schema_counts(struct schema_builder *b, const struct schema_source *sources, int count, const char *min_name,
                   const char *max_name, uint32_t *min, uint32_t *max)
{
    *min = 0;
    *max = NET_NO_LIMIT;
    for (int i = 0; i < count; i++) {
        const json_t *low = json_object_get(sources[i].json, min_name),
                     *high = json_object_get(sources[i].json, max_name);
        if (low && count_value(low) > 1000000)
            schema_refuse(b, sources[i].path, "\"%s\" is above 1000000", min_name);
        else if (low && count_value(low) > *min)
            *min = (uint32_t)count_value(low);
        if (high && count_value(high) < *max)
            *max = (uint32_t)count_value(high);
    }
}

static uint32_t bounded_string(struct schema_builder *b, uint32_t min, uint32_t max)
{
    struct net *net = b->net;
    struct schema_lengths *lengths = b->lengths;
    for (int i = 0; i < b->num_lengths; i++)
        if (lengths[i].min == min && lengths[i].max == max)
            return lengths[i].rule;
    uint32_t again, body = NET_NOTHING, quote = grammar_net_text(net, "\"", 1, NET_ACCEPT_NODE);
    if (max == 0)
        return grammar_net_text(net, "\"", 1, quote);
    grammar_net_loop_begin(net, min, max, quote, &again);
    struct error err;
    if (grammar_regex_build(net, GRAMMAR_JSON_CHARACTER, strlen(GRAMMAR_JSON_CHARACTER), REGEX_PLAIN, REGEX_WHOLE,
                            again, &body, &err))
        schema_refuse(b, b->root.path, "%s", err.msg);
    uint32_t rule = grammar_net_text(net, "\"", 1, grammar_net_loop_end(net, again, body));
    int room = (int)(sizeof b->lengths / sizeof *b->lengths);
    lengths[b->num_lengths < room ? b->num_lengths++ : room - 1] = (struct schema_lengths){min, max, rule};
    return rule;
}

static uint32_t build_string(struct schema_builder *b, const struct schema_source *sources, int count)
{
    const json_t *expression = NULL;
    bool is_format = false;
    const char *path = b->root.path;
    uint32_t min, max, node = NET_NOTHING;
    schema_counts(b, sources, count, "minLength", "maxLength", &min, &max);
    for (int i = 0; i < count; i++) {
        const json_t *found[] = {json_object_get(sources[i].json, "pattern"),
                                 json_object_get(sources[i].json, "format")};
        for (int k = 0; k < 2; k++) {
            if (!found[k] || (expression && is_format == (k == 1) && json_equal(found[k], expression)))
                continue;
            if (expression || min || max != NET_NO_LIMIT) {
                schema_refuse(
                    b, sources[i].path,
                    "\"%s\" together with another of pattern, format, minLength and maxLength is not supported",
                    k ? "format" : "pattern");
                return NET_NOTHING;
            }
            expression = found[k];
            is_format = k == 1;
            path = sources[i].path;
        }
    }
    if (min > max)
        return NET_NOTHING;
    if (!expression)
        return min || max != NET_NO_LIMIT ? bounded_string(b, min, max) : b->base->string;
    const char *text = is_format ? schema_format(json_string_value(expression)) : json_string_value(expression);
    size_t bytes = is_format && text ? strlen(text) : json_string_length(expression);
    if (!text) {
        schema_refuse(b, path, "the format \"%.60s\" is not supported", json_string_value(expression));
        return NET_NOTHING;
    }
    uint32_t quote = grammar_net_text(b->net, "\"", 1, NET_ACCEPT_NODE);
    struct error err;
    int rc = grammar_regex_build(b->net, text, bytes, REGEX_JSON, is_format ? REGEX_WHOLE : REGEX_SEARCH, quote, &node,
                                 &err);
    if (rc == ERR_MEMORY)
        b->rc = error_set(b->err, rc, "%s", err.msg);
    else if (rc)
        schema_refuse(b, path, "\"pattern\" cannot be used: %s", err.msg);
    return rc ? NET_NOTHING : grammar_net_text(b->net, "\"", 1, node);
}

// ---- numbers -------------------------------------------------------------------------------------------------------

static double real_of(struct number_bound bound) { return bound.is_integer ? (double)bound.integer : bound.real; }

// Takes the bound that `name` sets if it is narrower. sign: 1 for lower bounds, -1 for upper ones.
static void narrow(struct number_bound *bound, struct schema_source source, const char *name, bool exclusive, int sign)
{
    const json_t *value = json_object_get(source.json, name);
    if (!value)
        return;
    struct number_bound found = {.set = true, .exclusive = exclusive, .is_integer = json_is_integer(value)};
    if (found.is_integer)
        found.integer = json_integer_value(value);
    else
        found.real = json_real_value(value);
    double difference = (real_of(found) - real_of(*bound)) * sign;
    if (bound->set && found.is_integer && bound->is_integer) // doubles may not tell them apart
        difference = sign * (found.integer > bound->integer ? 1 : found.integer < bound->integer ? -1 : 0);
    if (!bound->set || difference > 0 || (difference == 0 && exclusive))
        *bound = found;
}

static uint32_t build_number(struct schema_builder *b, const struct schema_source *sources, int count, bool integers)
{
    struct number_bound min = {0}, max = {0};
    struct error err;
    uint32_t node = NET_NOTHING;
    const char *path = b->root.path;
    for (int i = 0; i < count; i++) {
        bool was_set = min.set || max.set;
        narrow(&min, sources[i], "minimum", false, 1);
        narrow(&min, sources[i], "exclusiveMinimum", true, 1);
        narrow(&max, sources[i], "maximum", false, -1);
        narrow(&max, sources[i], "exclusiveMaximum", true, -1);
        if (!was_set && (min.set || max.set))
            path = sources[i].path;
    }
    if (!min.set && !max.set)
        return integers ? b->base->integer : b->base->number;
    if (grammar_number_build(b->net, integers, min, max, NET_ACCEPT_NODE, &node, &err))
        schema_refuse(b, path, "%s", err.msg);
    return node;
}

// ---- all types -----------------------------------------------------------------------------------------------------

uint32_t schema_build_value(struct schema_builder *b, const struct schema_source *sources, int count)
{
    int types = TYPE_ALL, enumeration = -1;
    uint32_t node = NET_NOTHING;
    for (int i = 0; i < count; i++) {
        int of_source;
        bool own;
        if (schema_check(b, sources[i], &of_source, &own))
            return NET_NOTHING;
        types &= of_source;
        if (json_object_get(sources[i].json, "enum") || json_object_get(sources[i].json, "const"))
            enumeration = i;
    }
    if (enumeration >= 0)
        return build_enumeration(b, sources, count, types, enumeration);
    if (!count)
        return b->base->value;
    if (types & TYPE_NULL)
        node = grammar_net_either(b->net, node, b->base->null);
    if (types & TYPE_BOOLEAN)
        node = grammar_net_either(b->net, node, b->base->boolean);
    if (types & (TYPE_INTEGER | TYPE_NUMBER))
        node = grammar_net_either(b->net, node, build_number(b, sources, count, !(types & TYPE_NUMBER)));
    if (types & TYPE_STRING)
        node = grammar_net_either(b->net, node, build_string(b, sources, count));
    if (types & TYPE_ARRAY)
        node = grammar_net_either(b->net, node, schema_array(b, sources, count));
    if (types & TYPE_OBJECT)
        node = grammar_net_either(b->net, node, schema_object(b, sources, count));
    return node;
}
