// Small JSON files (configs, manifests): read, parsed and typed members fetched, each refusal one sentence such as
// "config.json: hidden_size must be an integer from 1 to 1048576, found a string". Built on jansson.
// Headers of safetensors files can be large and are not read here: see json_scan.h.
#ifndef TPSHARD_FORMATS_JSON_FILE_H
#define TPSHARD_FORMATS_JSON_FILE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <jansson.h>

#include "formats/error.h"

enum { JSON_FILE_CAP_BYTES = 4 << 20 }; // enough for every config and manifest

// An object within a parsed file. Borrows everything from the file; freely copied.
struct json_object {
    const json_t *json;
    const char *file_name; // as given when opened, for messages
    int bad_code;          // error code for bad contents
    bool ints_are_reals;   // see json_file_open
    char path[128];        // where the object stands: "", "rope_scaling.", "ranks[3]."
};

// Jansson's json_loadb, which often does not say that it is memory that was lacking: *no_memory does.
json_t *json_file_load(const char *text, size_t num_bytes, size_t flags, json_error_t *why, bool *no_memory);

// Jansson builds values that lack what there was no memory for. True when that has happened on this thread since it was last
// asked, or since its last json_file_load: such a value is not to be shown.
bool json_file_no_memory(void);

// Reads a regular file whose root is an object. Refused with bad_code (ERR_MODEL, ERR_CORRUPT): larger than cap_bytes,
// invalid JSON (line and column are named), duplicate keys, NUL in strings, nesting deeper than 2048, another root.
// A file with an integer beyond 64 bits (Hugging Face writes model_max_length 10^30) is read with all numbers as
// reals; whole reals up to 2^53 then count as integers.
// Success: the caller owns *out (json_file_close); path must outlive it.
int json_file_open(struct json_object *out, const char *path, uint64_t cap_bytes, int bad_code, struct error *err);
// The same for text in memory; name is for messages.
int json_file_parse(struct json_object *out, const char *text, size_t num_bytes, const char *name, int bad_code,
                    struct error *err);
void json_file_close(struct json_object *root); // accepts a zeroed one

// Members. Found: *out is set. Missing or null: an error for JSON_REQUIRED; for JSON_OPTIONAL *out stays as it is
// (put the default there before). Wrong type or out of range: always an error. What is returned is borrowed.
enum json_need { JSON_REQUIRED, JSON_OPTIONAL };

int json_file_get_int(int64_t *out, const struct json_object *object, const char *key, int64_t min, int64_t max,
                      enum json_need need, struct error *err);
// Integers count as numbers. NaN cannot occur; the range is inclusive.
int json_file_get_number(double *out, const struct json_object *object, const char *key, double min, double max,
                         enum json_need need, struct error *err);
int json_file_get_bool(bool *out, const struct json_object *object, const char *key, enum json_need need,
                       struct error *err);
int json_file_get_string(const char **out, const struct json_object *object, const char *key, enum json_need need,
                         struct error *err);
int json_file_get_array(const json_t **out, const struct json_object *object, const char *key, enum json_need need,
                        struct error *err);
int json_file_get_object(struct json_object *out, const struct json_object *object, const char *key,
                         enum json_need need, struct error *err);
// Element `index` of the array that is member `key`; it must be an object.
int json_file_get_object_at(struct json_object *out, const struct json_object *object, const char *key, size_t index,
                            struct error *err);

// Of files that tpshard wrote: refuses a member whose name is none of `known` (NULL behind the last). What is not
// understood must not be ignored.
int json_file_check_keys(const struct json_object *object, const char *const *known, struct error *err);

// "a string", "an object", "nothing" (null pointer) ...: for sentences of the form "must be ..., found %s".
const char *json_file_type_name(const json_t *json);
// Sets "<file>: <path><key> must be <wanted>, found <type of found>" with the file's bad_code, and returns that code.
int json_file_wrong(const struct json_object *object, const char *key, const char *wanted, const json_t *found,
                    struct error *err);

#endif
