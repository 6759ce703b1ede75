// Small JSON files, typed members, one-sentence refusals. See json_file.h.
#include "formats/json_file.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "formats/file_io.h"

static const double LARGEST_EXACT_INTEGER = 9007199254740992.0; // 2^53

// jansson takes some failed allocations for syntax errors, so they are remembered here.
static _Thread_local bool allocation_failed;

static void *allocate(size_t num_bytes)
{
    void *memory = malloc(num_bytes);
    allocation_failed = allocation_failed || !memory;
    return memory;
}

static void set_allocator(void) { json_set_alloc_funcs(allocate, free); }

json_t *json_file_load(const char *text, size_t num_bytes, size_t flags, json_error_t *why, bool *no_memory)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, set_allocator);
    allocation_failed = false;
    json_t *root = json_loadb(text, num_bytes, flags, why);
    *no_memory = allocation_failed;
    if (!allocation_failed)
        return root;
    json_decref(root); // its texts may be cut: the scanner goes on without the memory for them
    return NULL;
}

bool json_file_no_memory(void)
{
    bool failed = allocation_failed;
    allocation_failed = false;
    return failed;
}

int json_file_parse(struct json_object *out, const char *text, size_t num_bytes, const char *name, int bad_code,
                    struct error *err)
{
    json_error_t why;
    bool ints_are_reals = false, no_memory;
    json_t *root = json_file_load(text, num_bytes, JSON_REJECT_DUPLICATES, &why, &no_memory);
    if (!root && json_error_code(&why) == json_error_numeric_overflow) {
        ints_are_reals = true;
        root = json_file_load(text, num_bytes, JSON_REJECT_DUPLICATES | JSON_DECODE_INT_AS_REAL, &why, &no_memory);
    }
    if (no_memory)
        return error_set(err, ERR_MEMORY, "%s: no memory to parse %zu bytes of JSON", name, num_bytes);
    if (!root)
        return error_set(err, bad_code, "%s, line %d, column %d: not valid JSON: %s", name, why.line, why.column,
                         why.text);
    if (!json_is_object(root)) {
        int rc = error_set(err, bad_code, "%s: must hold a JSON object, found %s", name, json_file_type_name(root));
        json_decref(root);
        return rc;
    }
    *out =
        (struct json_object){.json = root, .file_name = name, .bad_code = bad_code, .ints_are_reals = ints_are_reals};
    return 0;
}

int json_file_open(struct json_object *out, const char *path, uint64_t cap_bytes, int bad_code, struct error *err)
{
    uint8_t *text;
    uint64_t num_bytes;
    int rc = file_read_all(&text, &num_bytes, path, cap_bytes, bad_code, err);
    if (rc)
        return rc;
    rc = json_file_parse(out, (const char *)text, num_bytes, path, bad_code, err);
    free(text);
    return rc;
}

void json_file_close(struct json_object *root)
{
    json_decref((json_t *)root->json);
    root->json = NULL;
}

const char *json_file_type_name(const json_t *json)
{
    if (!json)
        return "nothing";
    switch (json_typeof(json)) {
    case JSON_OBJECT:
        return "an object";
    case JSON_ARRAY:
        return "an array";
    case JSON_STRING:
        return "a string";
    case JSON_INTEGER:
        return "an integer";
    case JSON_REAL:
        return "a real number";
    case JSON_TRUE:
    case JSON_FALSE:
        return "a boolean";
    case JSON_NULL:
        return "null";
    }
    return "something unknown";
}

int json_file_wrong(const struct json_object *object, const char *key, const char *wanted, const json_t *found,
                    struct error *err)
{
    return error_set(err, object->bad_code, "%s: %s%s must be %s, found %s", object->file_name, object->path, key,
                     wanted, json_file_type_name(found));
}

int json_file_check_keys(const struct json_object *object, const char *const *known, struct error *err)
{
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)object->json, key, value)
    {
        bool found = false;
        for (size_t i = 0; known[i] && !found; i++)
            found = strcmp(key, known[i]) == 0;
        if (!found)
            return error_set(err, object->bad_code, "%s: unknown key %s%s; a newer tpshard may have written it",
                             object->file_name, object->path, key);
    }
    return 0;
}

// *found is null when the member is absent and may be.
static int find(const json_t **found, const struct json_object *object, const char *key, const char *wanted,
                enum json_need need, struct error *err)
{
    *found = json_object_get(object->json, key);
    if (*found && !json_is_null(*found))
        return 0;
    if (need == JSON_REQUIRED)
        return json_file_wrong(object, key, wanted, *found, err);
    *found = NULL;
    return 0;
}

int json_file_get_int(int64_t *out, const struct json_object *object, const char *key, int64_t min, int64_t max,
                      enum json_need need, struct error *err)
{
    char wanted[96];
    snprintf(wanted, sizeof wanted, "an integer from %" PRId64 " to %" PRId64, min, max);
    const json_t *found;
    int rc = find(&found, object, key, wanted, need, err);
    if (rc || !found)
        return rc;
    int64_t value;
    double real = json_real_value(found);
    if (json_is_integer(found))
        value = json_integer_value(found);
    else if (object->ints_are_reals && json_is_real(found) && real >= -LARGEST_EXACT_INTEGER &&
             real <= LARGEST_EXACT_INTEGER && real == (double)(int64_t)real)
        value = (int64_t)real;
    else
        return json_file_wrong(object, key, wanted, found, err);
    if (value < min || value > max)
        return error_set(err, object->bad_code, "%s: %s%s must be %s, found %" PRId64, object->file_name, object->path,
                         key, wanted, value);
    *out = value;
    return 0;
}

int json_file_get_number(double *out, const struct json_object *object, const char *key, double min, double max,
                         enum json_need need, struct error *err)
{
    char wanted[96];
    snprintf(wanted, sizeof wanted, "a number from %g to %g", min, max);
    const json_t *found;
    int rc = find(&found, object, key, wanted, need, err);
    if (rc || !found)
        return rc;
    if (!json_is_number(found))
        return json_file_wrong(object, key, wanted, found, err);
    double value = json_number_value(found);
    if (!(value >= min && value <= max))
        return error_set(err, object->bad_code, "%s: %s%s must be %s, found %g", object->file_name, object->path, key,
                         wanted, value);
    *out = value;
    return 0;
}

int json_file_get_bool(bool *out, const struct json_object *object, const char *key, enum json_need need,
                       struct error *err)
{
    const json_t *found;
    int rc = find(&found, object, key, "true or false", need, err);
    if (rc || !found)
        return rc;
    if (!json_is_boolean(found))
        return json_file_wrong(object, key, "true or false", found, err);
    *out = json_is_true(found);
    return 0;
}

int json_file_get_string(const char **out, const struct json_object *object, const char *key, enum json_need need,
                         struct error *err)
{
    const json_t *found;
    int rc = find(&found, object, key, "a string", need, err);
    if (rc || !found)
        return rc;
    if (!json_is_string(found))
        return json_file_wrong(object, key, "a string", found, err);
    *out = json_string_value(found);
    return 0;
}

int json_file_get_array(const json_t **out, const struct json_object *object, const char *key, enum json_need need,
                        struct error *err)
{
    const json_t *found;
    int rc = find(&found, object, key, "an array", need, err);
    if (rc || !found)
        return rc;
    if (!json_is_array(found))
        return json_file_wrong(object, key, "an array", found, err);
    *out = found;
    return 0;
}

// The part of the file at json, called <path of object><label>.
static struct json_object descend(const struct json_object *object, const json_t *json, const char *label)
{
    struct json_object child = *object;
    child.json = json;
    snprintf(child.path, sizeof child.path, "%.60s%.60s.", object->path, label);
    return child;
}

int json_file_get_object(struct json_object *out, const struct json_object *object, const char *key,
                         enum json_need need, struct error *err)
{
    const json_t *found;
    int rc = find(&found, object, key, "an object", need, err);
    if (rc || !found)
        return rc;
    if (!json_is_object(found))
        return json_file_wrong(object, key, "an object", found, err);
    *out = descend(object, found, key);
    return 0;
}

int json_file_get_object_at(struct json_object *out, const struct json_object *object, const char *key, size_t index,
                            struct error *err)
{
    const json_t *array;
    int rc = json_file_get_array(&array, object, key, JSON_REQUIRED, err);
    if (rc)
        return rc;
    char label[96];
    snprintf(label, sizeof label, "%.40s[%zu]", key, index);
    const json_t *found = json_array_get(array, index);
    if (!json_is_object(found))
        return json_file_wrong(object, label, "an object", found, err);
    *out = descend(object, found, label);
    return 0;
}
