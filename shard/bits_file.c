// See bits_file.h.
#include "shard/bits_file.h"

#include "formats/json_file.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// The value that counts for a unit; NULL: none.
static const json_t *value_of(const json_t *values, const struct bits_unit *unit)
{
    char exact[MATRIX_WORD_BYTES], layer[MATRIX_WORD_BYTES], role[MATRIX_WORD_BYTES];
    const char *const names[] = {exact, layer, role, "*"};
    const json_t *found = NULL;
    matrix_name_print(exact, unit->layer, unit->role);
    snprintf(layer, sizeof layer, "%d.*", unit->layer);
    snprintf(role, sizeof role, "*.%s", tensor_role_name(unit->role));
    for (size_t i = 0; i < sizeof names / sizeof *names && !found; i++)
        found = json_object_get(values, names[i]);
    return found;
}

static bool speaks_of(const char *name, const struct bits_unit *unit)
{
    char exact[MATRIX_WORD_BYTES], layer[MATRIX_WORD_BYTES];
    matrix_name_print(exact, unit->layer, unit->role);
    snprintf(layer, sizeof layer, "%d.*", unit->layer);
    return strcmp(name, "*") == 0 || strcmp(name, exact) == 0 || strcmp(name, layer) == 0 ||
           (name[0] == '*' && name[1] == '.' && strcmp(name + 2, tensor_role_name(unit->role)) == 0);
}

// A name that is none is a mistake, not a wish for nothing.
static int check_names(const struct json_object *values, const struct bits *bits, struct error *err)
{
    const char *name;
    json_t *value;
    json_object_foreach((json_t *)values->json, name, value)
    {
        bool known = false;
        for (size_t u = 0; u < bits->num_units && !known; u++)
            known = speaks_of(name, &bits->units[u]);
        if (!known)
            return error_set(
                err, ERR_USAGE,
                "%s: %s%.40s is no matrix of this model's layers; they are named like 0.%s, *.%s, 0.* and *",
                values->file_name, values->path, name, bits->num_units ? tensor_role_name(bits->units[0].role) : "qkv",
                bits->num_units ? tensor_role_name(bits->units[bits->num_units - 1].role) : "down");
    }
    return 0;
}

static int open_values(struct json_object *root, struct json_object *values, const struct bits *bits, const char *path,
                       const char *key, struct error *err)
{
    int rc = json_file_open(root, path, JSON_FILE_CAP_BYTES, ERR_USAGE, err);
    if (!rc && !(rc = json_file_get_object(values, root, key, JSON_REQUIRED, err)))
        rc = check_names(values, bits, err);
    return rc;
}

static int missing(const struct json_object *values, const struct bits_unit *unit, struct error *err)
{
    char name[MATRIX_WORD_BYTES];
    matrix_name_print(name, unit->layer, unit->role);
    return error_set(err, ERR_USAGE, "%s: %s says nothing of %s; \"*\" stands for all matrices that are not named",
                     values->file_name, values->path, name);
}

static int kind_of(struct matrix_kind *out, const struct json_object *values, const struct bits_unit *unit,
                   struct error *err)
{
    const json_t *value = value_of(values->json, unit);
    *out = (struct matrix_kind){.layer = unit->layer, .role = unit->role};
    if (!value)
        return missing(values, unit, err);
    if (json_is_string(value) && matrix_kind_parse(json_string_value(value), &out->kind, &out->group_size) &&
        out->kind != WEIGHT_FP8G && bits_unit_bytes(unit, out->kind, out->group_size) > 0)
        return 0;
    return error_set(err, ERR_USAGE,
                     "%s: %s: a matrix is stored as bf16, int8, fp8, mxfp4, nvfp4, or int4, int4z or nl4 "
                     "with its group, such as \"int4:32\"; found %.40s",
                     values->file_name, values->path,
                     json_is_string(value) ? json_string_value(value) : json_file_type_name(value));
}

int bits_file_kinds(struct matrix_kind **out, const struct bits *bits, const char *path, struct error *err)
{
    struct json_object root = {0}, values = {0};
    struct matrix_kind *list = NULL;
    int rc = open_values(&root, &values, bits, path, "kinds", err);
    if (!rc && !(list = calloc(bits->num_units + 1, sizeof *list)))
        rc = error_set(err, ERR_MEMORY, "%s: out of memory", path);
    for (size_t u = 0; !rc && u < bits->num_units; u++)
        rc = kind_of(&list[u], &values, &bits->units[u], err);
    json_file_close(&root);
    if (rc)
        free(list);
    else
        *out = list;
    return rc;
}

int bits_file_sensitivity(struct bits *bits, const char *path, struct error *err)
{
    static const double most = 1e9;
    struct json_object root = {0}, values = {0};
    double sum = 0;
    int rc = open_values(&root, &values, bits, path, "sensitivity", err);
    for (size_t u = 0; !rc && u < bits->num_units; u++) {
        const json_t *value = value_of(values.json, &bits->units[u]);
        double number = json_number_value(value); // 0 for what is none
        if (!value)
            rc = missing(&values, &bits->units[u], err);
        else if (!json_is_number(value) || !(number >= 0 && number <= most))
            rc = error_set(err, ERR_USAGE, "%s: a sensitivity must be a number from 0 to 10^9, found %s", path,
                           json_is_number(value) ? "another number" : json_file_type_name(value));
        sum += bits->units[u].sensitivity = number;
    }
    if (!rc && sum == 0)
        rc = error_set(err, ERR_USAGE, "%s: no matrix has a sensitivity above 0", path);
    json_file_close(&root);
    return rc;
}
