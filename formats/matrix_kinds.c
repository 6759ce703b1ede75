// See matrix_kinds.h.
#include "formats/matrix_kinds.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

bool tensor_role_is_linear(enum tensor_role role)
{
    switch (role) {
    case ROLE_QKV:
    case ROLE_O:
    case ROLE_GATE_UP:
    case ROLE_DOWN:
    case ROLE_Q_A:
    case ROLE_Q_B:
    case ROLE_KV_A:
    case ROLE_EXPERT_GATE_UP:
    case ROLE_EXPERT_DOWN:
    case ROLE_SHARED_GATE_UP:
    case ROLE_SHARED_DOWN:
        return true;
    default:
        return false;
    }
}

// ---- words -------------------------------------------------------------------------------------------------------

// Digits alone, without zeros in front: every number has one word.
static const char *parse_number(const char *word, uint32_t *out)
{
    size_t digits = strspn(word, "0123456789");
    if (digits == 0 || digits > 6 || (word[0] == '0' && digits > 1))
        return NULL;
    *out = (uint32_t)strtoul(word, NULL, 10);
    return word + digits;
}

void matrix_name_print(char out[MATRIX_WORD_BYTES], int32_t layer, enum tensor_role role)
{
    snprintf(out, MATRIX_WORD_BYTES, "%d.%s", layer, tensor_role_name(role));
}

bool matrix_name_parse(const char *word, int32_t *layer, enum tensor_role *role)
{
    uint32_t number;
    const char *dot = parse_number(word, &number);
    if (!dot || *dot != '.')
        return false;
    for (int i = 0; i < ROLE_COUNT; i++)
        if (tensor_role_is_linear((enum tensor_role)i) && strcmp(dot + 1, tensor_role_name((enum tensor_role)i)) == 0) {
            *layer = (int32_t)number;
            *role = (enum tensor_role)i;
            return true;
        }
    return false;
}

void matrix_kind_print(char out[MATRIX_WORD_BYTES], enum weight_kind kind, uint32_t group_size)
{
    if (weight_group_chosen(kind))
        snprintf(out, MATRIX_WORD_BYTES, "%s:%u", weight_kind_name(kind), group_size);
    else
        snprintf(out, MATRIX_WORD_BYTES, "%s", weight_kind_name(kind));
}

bool matrix_kind_parse(const char *word, enum weight_kind *kind, uint32_t *group_size)
{
    char name[MATRIX_WORD_BYTES];
    size_t length = strcspn(word, ":");
    uint32_t group;
    if (length >= sizeof name)
        return false;
    memcpy(name, word, length);
    name[length] = 0;
    if (!weight_kind_from_name(name, kind) || *kind == WEIGHT_F32 ||
        weight_group_chosen(*kind) != (word[length] == ':'))
        return false;
    *group_size = weight_group_default(*kind);
    if (word[length] == 0)
        return true;
    const char *end = parse_number(word + length + 1, &group);
    if (!end || *end || !weight_group_valid(*kind, group))
        return false;
    *group_size = group;
    return true;
}

// ---- lists -------------------------------------------------------------------------------------------------------

int matrix_kinds_compare(const void *a, const void *b)
{
    const struct matrix_kind *x = a, *y = b;
    char name_x[MATRIX_WORD_BYTES], name_y[MATRIX_WORD_BYTES];
    matrix_name_print(name_x, x->layer, x->role);
    matrix_name_print(name_y, y->layer, y->role);
    return strcmp(name_x, name_y);
}

static int compare_places(const void *a, const void *b)
{
    const struct matrix_kind *x = a, *y = b;
    if (x->layer != y->layer)
        return x->layer < y->layer ? -1 : 1;
    return (x->role > y->role) - (x->role < y->role);
}

void matrix_kinds_sort(struct matrix_kind *list, size_t count)
{
    if (count > 0)
        qsort(list, count, sizeof *list, compare_places);
}

const struct matrix_kind *matrix_kinds_find(const struct matrix_kind *list, size_t count, int32_t layer,
                                            enum tensor_role role)
{
    const struct matrix_kind wanted = {.layer = layer, .role = role};
    return count > 0 ? bsearch(&wanted, list, count, sizeof *list, compare_places) : NULL;
}

static int parse_one(struct matrix_kind *out, const struct json_object *object, const char *name, json_t *value,
                     int64_t num_layers, struct error *err)
{
    if (!matrix_name_parse(name, &out->layer, &out->role) || out->layer >= num_layers)
        return error_set(err, object->bad_code,
                         "%s: %s%.40s is no matrix of this model's layers; they are named like 0.qkv and %lld.down",
                         object->file_name, object->path, name, (long long)num_layers - 1);
    if (!json_is_string(value) || !matrix_kind_parse(json_string_value(value), &out->kind, &out->group_size))
        return error_set(err, object->bad_code,
                         "%s: %s%.40s must be a kind of weight such as \"int8\" or \"int4:32\", found %.40s",
                         object->file_name, object->path, name,
                         json_is_string(value) ? json_string_value(value) : json_file_type_name(value));
    return 0;
}

int matrix_kinds_parse(struct matrix_kind **out, size_t *count, const struct json_object *object, const char *key,
                       int64_t num_layers, struct error *err)
{
    struct json_object member = {0};
    const char *name;
    json_t *value;
    int rc;
    *out = NULL;
    *count = 0;
    if ((rc = json_file_get_object(&member, object, key, JSON_OPTIONAL, err)) || !member.json)
        return rc;
    size_t all = json_object_size(member.json);
    struct matrix_kind *list = calloc(all + 1, sizeof *list);
    if (!list)
        return error_set(err, ERR_MEMORY, "%s: out of memory", object->file_name);
    size_t at = 0;
    json_object_foreach((json_t *)member.json, name, value)
    {
        if ((rc = parse_one(&list[at++], &member, name, value, num_layers, err))) {
            free(list);
            return rc;
        }
    }
    matrix_kinds_sort(list, at);
    *out = list;
    *count = at;
    return 0;
}
