// The keywords of JSON Schema: which are understood, which mean nothing here, which are refused; and the formats.
#include "engine/serve/grammar_schema_internal.h"

#include <string.h>

enum word_value { ANYTHING, OBJECT, ARRAY, STRING, COUNT, NUMBER, SCHEMA, SCHEMAS, BOOLEAN };

static const struct word {
    const char *name;
    enum word_value value;
    int types; // of the values that it is about; 0: all
} words[] = {
    {"type", ANYTHING, 0},
    {"enum", SCHEMAS, 0},
    {"const", ANYTHING, 0},
    {"anyOf", SCHEMAS, 0},
    {"oneOf", SCHEMAS, 0},
    {"allOf", SCHEMAS, 0},
    {"$ref", STRING, 0},
    {"properties", OBJECT, TYPE_OBJECT},
    {"required", ARRAY, TYPE_OBJECT},
    {"additionalProperties", SCHEMA, TYPE_OBJECT},
    {"items", SCHEMA, TYPE_ARRAY},
    {"prefixItems", ARRAY, TYPE_ARRAY},
    {"minItems", COUNT, TYPE_ARRAY},
    {"maxItems", COUNT, TYPE_ARRAY},
    {"minLength", COUNT, TYPE_STRING},
    {"maxLength", COUNT, TYPE_STRING},
    {"pattern", STRING, TYPE_STRING},
    {"format", STRING, TYPE_STRING},
    {"minimum", NUMBER, TYPE_NUMBER | TYPE_INTEGER},
    {"maximum", NUMBER, TYPE_NUMBER | TYPE_INTEGER},
    {"exclusiveMinimum", NUMBER, TYPE_NUMBER | TYPE_INTEGER},
    {"exclusiveMaximum", NUMBER, TYPE_NUMBER | TYPE_INTEGER},
    {"nullable", BOOLEAN, 0},
};

// They say something about a schema, not about values.
static const char *const annotations[] = {
    "title",    "description", "default",         "examples",         "example",      "$schema",   "$id",
    "$comment", "$defs",       "definitions",     "deprecated",       "readOnly",     "writeOnly", "discriminator",
    "$anchor",  "strict",      "contentEncoding", "contentMediaType", "externalDocs", "xml"};

static const char *const value_names[] = {"",
                                          "an object",
                                          "an array",
                                          "a string",
                                          "a whole number from 0",
                                          "a number",
                                          "an object or a boolean",
                                          "an array that is not empty",
                                          "true or false"};

static bool value_is(enum word_value wanted, const json_t *value)
{
    switch (wanted) {
    case OBJECT:
        return json_is_object(value);
    case ARRAY:
        return json_is_array(value);
    case STRING:
        return json_is_string(value);
    case COUNT:
        return (json_is_integer(value) && json_integer_value(value) >= 0) ||
               (json_is_real(value) && json_real_value(value) >= 0 &&
                json_real_value(value) == (double)(int64_t)json_real_value(value) && json_real_value(value) < 1e15);
    case NUMBER:
        return json_is_number(value);
    case SCHEMA:
        return json_is_object(value) || json_is_boolean(value);
    case SCHEMAS:
        return json_array_size(value) > 0;
    case BOOLEAN:
        return json_is_boolean(value);
    default:
        return true;
    }
}

static int type_of_name(const char *name)
{
    static const char *const names[] = {"null", "boolean", "integer", "number", "string", "array", "object"};
    for (int i = 0; name && i < 7; i++)
        if (!strcmp(names[i], name))
            return 1 << i;
    return 0;
}

// The types that "type" names, as they were written: an integer is a number too.
static int types_of(struct schema_builder *b, struct schema_source source, const json_t *value)
{
    int types = type_of_name(json_string_value(value));
    for (size_t i = 0; i < json_array_size(value); i++) {
        int one = type_of_name(json_string_value(json_array_get(value, i)));
        if (!one) {
            types = 0;
            break;
        }
        types |= one;
    }
    if (!types)
        schema_refuse(b, source.path,
                      "\"type\" must be one or a list of null, boolean, integer, number, string, array, object");
    return types & TYPE_NUMBER ? types | TYPE_INTEGER : types;
}

// Keywords that are refused unless they ask for nothing.
static bool asks_nothing(const char *name, const json_t *value)
{
    if (!strcmp(name, "uniqueItems"))
        return json_is_false(value);
    if (!strcmp(name, "minProperties"))
        return json_is_integer(value) && json_integer_value(value) == 0;
    if (!strcmp(name, "unevaluatedProperties") || !strcmp(name, "unevaluatedItems"))
        return json_is_boolean(value); // what is not named is left out anyway
    return false;
}

// They speak of values through other schemas.
static bool is_composition(const char *name)
{
    return name[0] == '$' || !strcmp(name, "anyOf") || !strcmp(name, "oneOf") || !strcmp(name, "allOf") ||
           !strcmp(name, "nullable");
}

int schema_check(struct schema_builder *b, struct schema_source source, int *types, bool *own)
{
    const char *name;
    json_t *value;
    int implied = 0;
    bool known_type = false;
    if (!json_is_object(source.json))
        return schema_refuse(b, source.path, "a schema must be an object or a boolean");
    *types = TYPE_ALL;
    *own = false;
    json_object_foreach((json_t *)source.json, name, value)
    {
        const struct word *word = NULL;
        bool annotation = !strncmp(name, "x-", 2) || asks_nothing(name, value);
        for (size_t i = 0; i < sizeof annotations / sizeof *annotations && !annotation; i++)
            annotation = !strcmp(annotations[i], name);
        if (annotation)
            continue;
        for (size_t i = 0; i < sizeof words / sizeof *words && !word; i++)
            word = strcmp(words[i].name, name) ? NULL : &words[i];
        if (!word)
            return schema_refuse(b, source.path, "\"%.60s\" is not supported", name);
        if (!value_is(word->value, value))
            return schema_refuse(b, source.path, "\"%s\" must be %s", name, value_names[word->value]);
        if (!strcmp(name, "type")) {
            known_type = true;
            *types = types_of(b, source, value);
        }
        implied |= word->types;
        *own |= !is_composition(name);
    }
    if (!known_type && implied)
        *types = implied;
    if (json_is_true(json_object_get(source.json, "nullable")) && (known_type || implied))
        *types |= TYPE_NULL;
    return b->rc;
}

#define YEAR "[1-9][0-9]{3}"
#define LEAP_YEAR "(?:[1-9][0-9](?:0[48]|[2468][048]|[13579][26])|(?:[2468][048]|[13579][26])00)"
#define DATE                                                                                                           \
    "(?:" YEAR "-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|"              \
    "02-(?:0[1-9]|1[0-9]|2[0-8]))|" LEAP_YEAR "-02-29)"
#define HOURS_MINUTES "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
#define TIME HOURS_MINUTES ":[0-5][0-9](?:\\.[0-9]{1,6})?(?:Z|[+-]" HOURS_MINUTES ")"
#define HEX "[0-9a-fA-F]"
#define LABEL "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
#define OCTET "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
#define PATH_CHARACTER "(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|%" HEX "{2})"

const char *schema_format(const char *name)
{
    static const struct {
        const char *name, *expression;
    } formats[] = {
        {"date", DATE},
        {"time", TIME},
        {"date-time", DATE "T" TIME},
        {"duration", "P(?:[0-9]{1,4}W|[0-9]{1,4}D(?:T[0-9]{1,4}[HMS])?|T(?:[0-9]{1,4}H)?[0-9]{1,4}M(?:[0-9]{1,4}S)?|T["
                     "0-9]{1,4}[HS])"},
        {"uuid", HEX "{8}-" HEX "{4}-" HEX "{4}-" HEX "{4}-" HEX "{12}"},
        {"email", "[A-Za-z0-9_+-]{1,32}(?:\\.[A-Za-z0-9_+-]{1,16})?@(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?\\.)+[A-"
                  "Za-z]{2,24}"},
        {"hostname", "(?:" LABEL "\\.){0,3}" LABEL},
        {"ipv4", "(?:" OCTET "\\.){3}" OCTET},
        {"uri", "[a-z][a-z0-9+.-]{1,15}://"
                "(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?\\.)*[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
                "(?::[1-9][0-9]{0,3})?(?:/" PATH_CHARACTER "*)*(?:\\?(?:" PATH_CHARACTER
                "|[/?])*)?(?:#(?:" PATH_CHARACTER "|[/?])*)?"},
    };
    for (size_t i = 0; i < sizeof formats / sizeof *formats; i++)
        if (!strcmp(formats[i].name, name))
            return formats[i].expression;
    return NULL;
}
