// Whether the alternatives of "oneOf" exclude each other: then any of them is exactly one of them.
//
// The question is always the same: may a value that is let through for one side be valid for another? The first side is read as narrowly as rules
// are built of it (an object that names properties has no others unless it says so), the second as widely as the standard does. "No" is proven by
// types, by values of "enum" and "const", and by properties of objects; where none of that tells, the answer is that it may.
#include "engine/serve/grammar_schema_internal.h"

#include <string.h>

enum { MAX_CHOICES = 8, MAX_DEPTH = 12 };

// Schemas that hold together, references and "allOf" followed.
struct side {
    struct schema_source sources[SCHEMA_MAX_TOGETHER];
    int count;
    struct schema_source choices[MAX_CHOICES]; // arrays of "anyOf" and "oneOf"
    int num_choices;
    bool nothing;  // admits no value
    bool unknown;  // there is more than could be followed
    bool complete; // nothing else holds that could name further properties
};

static void add(struct schema_builder *b, struct side *side, struct schema_source source, int depth)
{
    static const char *const choices[] = {"anyOf", "oneOf"};
    struct schema_source target;
    side->nothing |= json_is_false(source.json);
    if (!json_is_object(source.json) || !schema_step(b, source.path))
        return;
    if (depth > MAX_DEPTH || side->count == SCHEMA_MAX_TOGETHER) {
        side->unknown = true;
        return;
    }
    side->sources[side->count++] = source;
    const char *pointer = json_string_value(json_object_get(source.json, "$ref"));
    if (pointer && schema_find_reference(b, source, pointer, &target) == 0)
        add(b, side, target, depth + 1);
    const json_t *all = json_object_get(source.json, "allOf");
    for (size_t i = 0; i < json_array_size(all); i++)
        add(b, side, (struct schema_source){json_array_get(all, i), source.path}, depth + 1);
    for (int i = 0; i < 2; i++) {
        const json_t *choice = json_object_get(source.json, choices[i]);
        if (choice && side->num_choices == MAX_CHOICES)
            side->unknown = true;
        else if (choice)
            side->choices[side->num_choices++] = (struct schema_source){choice, source.path};
    }
}

// ---- types and values --------------------------------------------------------------------------------------------

// narrow: what rules are built for; else what the standard lets be valid.
static int types_of(struct schema_builder *b, const struct side *side, bool narrow)
{
    int all = TYPE_ALL, types;
    bool own;
    for (int i = 0; i < side->count; i++)
        if (schema_check(b, side->sources[i], &types, &own) == 0 &&
            (narrow || json_object_get(side->sources[i].json, "type")))
            all &= types;
    return all;
}

static int types_of_value(const json_t *value)
{
    return json_is_real(value) ? TYPE_NUMBER | TYPE_INTEGER : schema_type_of_value(value); // 1.0 is an integer
}

static bool may_equal(const json_t *a, const json_t *b)
{
    if (json_is_number(a) && json_is_number(b))
        return json_number_value(a) == json_number_value(b);
    bool within = json_typeof(a) == json_typeof(b) && (json_is_array(a) || json_is_object(a)); // with numbers, perhaps
    return within || json_equal(a, b);
}

// The i-th value that "enum", or else "const", names; NULL: there are no more.
static const json_t *named_value(const json_t *schema, size_t i)
{
    const json_t *list = json_object_get(schema, "enum"), *one = json_object_get(schema, "const");
    return list ? json_array_get(list, i) : i == 0 ? one : NULL;
}

static bool may_be(struct schema_builder *b, const struct side *side, const json_t *value, bool narrow)
{
    if (!(types_of_value(value) & types_of(b, side, narrow)))
        return false;
    for (int s = 0; s < side->count; s++) {
        const json_t *schema = side->sources[s].json, *one = json_object_get(schema, "const"), *other;
        bool found = !json_object_get(schema, "enum");
        for (size_t i = 0; !found && (other = named_value(schema, i)) && schema_step(b, side->sources[s].path); i++)
            found = may_equal(value, other);
        if (!found || (one && !may_equal(value, one)))
            return false;
    }
    return true;
}

// Where one side names its values: whether none of them is also the other's. Else false.
static bool values_differ(struct schema_builder *b, const struct side *named, bool named_is_narrow,
                          const struct side *other)
{
    for (int s = 0; s < named->count; s++) {
        const json_t *schema = named->sources[s].json, *value = named_value(schema, 0);
        bool differ = value != NULL;
        for (size_t i = 0; differ && (value = named_value(schema, i)) && schema_step(b, named->sources[s].path); i++)
            differ = !may_be(b, named, value, named_is_narrow) || !may_be(b, other, value, !named_is_narrow);
        if (differ)
            return true;
    }
    return false;
}

// ---- objects -----------------------------------------------------------------------------------------------------

static bool apart(struct schema_builder *b, const struct side *a, const struct side *other, int depth);

static const json_t *property(struct schema_source source, const char *name)
{
    return json_object_get(json_object_get(source.json, "properties"), name);
}

// What both sides say of one property keeps them apart.
static bool property_apart(struct schema_builder *b, const struct side *a, const struct side *other, const char *name,
                           int depth)
{
    struct side mine = {.complete = a->complete}, theirs = {0};
    for (int i = 0; i < a->count; i++) {
        if (property(a->sources[i], name))
            add(b, &mine, (struct schema_source){property(a->sources[i], name), a->sources[i].path}, 0);
        mine.complete &= !json_is_object(json_object_get(a->sources[i].json, "additionalProperties"));
    }
    for (int i = 0; i < other->count; i++)
        if (property(other->sources[i], name))
            add(b, &theirs, (struct schema_source){property(other->sources[i], name), other->sources[i].path}, 0);
    return (theirs.count > 0 || theirs.nothing) && apart(b, &mine, &theirs, depth + 1);
}

static bool is_required(const json_t *schema, const char *name)
{
    const json_t *required = json_object_get(schema, "required");
    for (size_t i = 0; i < json_array_size(required); i++) {
        const char *one = json_string_value(json_array_get(required, i));
        if (one && !strcmp(one, name))
            return true;
    }
    return false;
}

// Objects of this side cannot have the property. narrow: as above.
static bool lacks(const struct side *side, const char *name, bool narrow)
{
    bool names = false, open = !side->complete;
    for (int i = 0; i < side->count; i++) {
        const json_t *schema = side->sources[i].json, *others = json_object_get(schema, "additionalProperties");
        if (json_is_false(others) && !property(side->sources[i], name))
            return true;
        names |= json_object_size(json_object_get(schema, "properties")) > 0;
        open |= property(side->sources[i], name) || is_required(schema, name) || (others && !json_is_false(others));
    }
    return narrow && names && !open;
}

static bool objects_apart(struct schema_builder *b, const struct side *a, const struct side *other, int depth)
{
    for (int side = 0; side < 2; side++) {
        const struct side *asks = side == 0 ? a : other;
        for (int s = 0; s < asks->count; s++) {
            const json_t *required = json_object_get(asks->sources[s].json, "required");
            for (size_t i = 0; i < json_array_size(required) && schema_step(b, asks->sources[s].path); i++) {
                const char *name = json_string_value(json_array_get(required, i));
                if (name && (side == 0 ? lacks(other, name, false) : lacks(a, name, true)))
                    return true;
                if (name && property_apart(b, a, other, name, depth))
                    return true;
            }
        }
    }
    return false;
}

// ---- the whole ---------------------------------------------------------------------------------------------------

// Each member of the last choice in turn, together with all else.
static bool choice_apart(struct schema_builder *b, const struct side *a, const struct side *other, bool of_a, int depth)
{
    const struct side *from = of_a ? a : other;
    struct schema_source choice = from->choices[from->num_choices - 1];
    bool all = true;
    for (size_t i = 0; i < json_array_size(choice.json) && all; i++) {
        struct side one = *from;
        one.num_choices--;
        add(b, &one, (struct schema_source){json_array_get(choice.json, i), choice.path}, 0);
        all = of_a ? apart(b, &one, other, depth + 1) : apart(b, a, &one, depth + 1);
    }
    return all;
}

static bool apart(struct schema_builder *b, const struct side *a, const struct side *other, int depth)
{
    if (a->nothing || other->nothing)
        return true;
    if (a->unknown || depth > MAX_DEPTH || !schema_step(b, b->root.path))
        return false;
    if (a->num_choices || other->num_choices)
        return choice_apart(b, a, other, a->num_choices > 0, depth);
    int common = types_of(b, a, true) & types_of(b, other, false);
    if (!common || values_differ(b, a, true, other) || values_differ(b, other, false, a))
        return true;
    return common == TYPE_OBJECT && objects_apart(b, a, other, depth);
}

void schema_check_one_of(struct schema_builder *b, struct schema_source list, const struct schema_source *beside,
                         int count, bool complete)
{
    size_t alternatives = json_array_size(list.json);
    for (size_t i = 0; i < alternatives; i++)
        for (size_t k = 0; k < alternatives; k++) {
            struct side a = {.complete = complete}, other = {0};
            if (i == k)
                continue;
            for (int s = 0; s < count; s++) { // what they refer to is among them
                a.sources[s] = beside[s];
                a.count++;
            }
            add(b, &a, (struct schema_source){json_array_get(list.json, i), list.path}, 0);
            add(b, &other, (struct schema_source){json_array_get(list.json, k), list.path}, 0);
            if (!b->rc && !apart(b, &a, &other, 0))
                schema_refuse(b, list.path,
                              "a value may be valid for [%zu] and [%zu] at once, which \"oneOf\" forbids: use "
                              "\"anyOf\", or tell them apart by \"type\", \"const\", or a required property",
                              i < k ? i : k, i < k ? k : i);
            if (b->rc)
                return;
        }
}
