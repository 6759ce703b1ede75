// What grammar_schema.c (alternatives, references), grammar_schema_one_of.c (whether they exclude each other), grammar_schema_types.c (one alternative), grammar_schema_object.c (objects, arrays) and
// grammar_schema_words.c (keywords) share.
#ifndef TPSHARD_ENGINE_SERVE_GRAMMAR_SCHEMA_INTERNAL_H
#define TPSHARD_ENGINE_SERVE_GRAMMAR_SCHEMA_INTERNAL_H

#include "engine/serve/grammar_schema.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    SCHEMA_MAX_STEPS = 50000, // schemas looked at, references followed, values of enumerations
    SCHEMA_MAX_MEMORY_BYTES = 48 << 20,
    SCHEMA_MAX_TOGETHER = 64, // schemas that hold for one value
    SCHEMA_PATH_BYTES = 256,
};

enum schema_type { // bits
    TYPE_NULL = 1,
    TYPE_BOOLEAN = 2,
    TYPE_INTEGER = 4,
    TYPE_NUMBER = 8,
    TYPE_STRING = 16,
    TYPE_ARRAY = 32,
    TYPE_OBJECT = 64,
    TYPE_ALL = 127,
};

// A schema and where it stands.
struct schema_source {
    const json_t *json;
    const char *path;
};

struct schema_builder {
    struct net *net;
    const struct grammar_base *base;
    struct schema_source root;
    struct schema_rule *rules; // of schemas that hold together; built in the order in which they were first asked for
    uint32_t num_rules, rule_capacity, *rule_slots, slot_capacity;
    struct schema_block *blocks; // memory that lives as long as the builder
    uint64_t memory_bytes;
    int64_t steps;
    struct schema_lengths { // strings of bounded length that have a rule already
        uint32_t min, max, rule;
    } lengths[32];
    int num_lengths;
    struct error *err;
    int rc; // the first error
};

// A character of a JSON string: itself in UTF-8, or an escape. Surrogates come in pairs; U+0000, which many parsers refuse, never comes.
#define GRAMMAR_JSON_HEX "[0-9a-fA-F]"
#define GRAMMAR_JSON_CHARACTER                                                                                         \
    "[^\"\\\\\\u0000-\\u001f]|\\\\(?:[\"\\\\/bfnrt]|u(?:"                                                              \
    "(?:[1-9a-cefA-CEF]" GRAMMAR_JSON_HEX "|[dD][0-7])" GRAMMAR_JSON_HEX "{2}|"                                        \
    "0(?:[1-9a-fA-F]" GRAMMAR_JSON_HEX "{2}|0(?:[1-9a-fA-F]" GRAMMAR_JSON_HEX "|0[1-9a-fA-F]))|"                       \
    "[dD][89abAB]" GRAMMAR_JSON_HEX "{2}\\\\u[dD][c-fC-F]" GRAMMAR_JSON_HEX "{2}))"

// ---- grammar_schema.c

// Sets b->rc: "<path>: <sentence>". Returns it.
int schema_refuse(struct schema_builder *b, const char *path, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
// Zeroed; NULL and b->rc without memory or beyond the limit.
void *schema_keep(struct schema_builder *b, size_t bytes);
// "<path>.<name>", "<path>.<name>[<index>]" with an index that is not negative, "<path>[<index>]" with an empty name.
const char *schema_path(struct schema_builder *b, const char *path, const char *name, int64_t index);
// Counts a step; false when there were too many.
bool schema_step(struct schema_builder *b, const char *path);
// The rule of values that all these schemas admit. The array is copied.
uint32_t schema_rule(struct schema_builder *b, const struct schema_source *sources, int count);
// What a "$ref" of `from` refers to.
int schema_find_reference(struct schema_builder *b, struct schema_source from, const char *pointer,
                          struct schema_source *out);

// ---- grammar_schema_one_of.c

// Refuses a list of alternatives of which two may hold for one value that is let through beside all these. complete: nothing else holds there.
void schema_check_one_of(struct schema_builder *b, struct schema_source list, const struct schema_source *beside,
                         int count, bool complete);

// ---- grammar_schema_words.c

// Refuses what is not understood, by name. *types: what "type" says or the keywords imply. *own: it says something about values itself, not only
// through other schemas.
int schema_check(struct schema_builder *b, struct schema_source source, int *types, bool *own);
const char *schema_format(const char *name); // a regular expression; NULL: not known

// ---- grammar_schema_types.c

int schema_type_of_value(const json_t *value); // one bit
// Where a value begins that all of these admit, up to the rule's end. References and alternatives in them are somebody else's.
uint32_t schema_build_value(struct schema_builder *b, const struct schema_source *sources, int count);
// The largest min and the smallest max that these set; 0 and NET_NO_LIMIT where none does.
void schema_counts(struct schema_builder *b, const struct schema_source *sources, int count, const char *min_name,
                   const char *max_name, uint32_t *min, uint32_t *max);

// ---- grammar_schema_object.c

uint32_t schema_object(struct schema_builder *b, const struct schema_source *sources, int count);
uint32_t schema_array(struct schema_builder *b, const struct schema_source *sources, int count);

#endif
