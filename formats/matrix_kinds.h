// Which kind each matrix of the layers is stored in, where they differ: the words "3.down" and "int4:32" of manifests and of files that users
// write, and a list of them.
#ifndef TPSHARD_FORMATS_MATRIX_KINDS_H
#define TPSHARD_FORMATS_MATRIX_KINDS_H

#include "formats/error.h"
#include "formats/json_file.h"
#include "formats/shard_file.h"
#include "formats/weight.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// One matrix of a layer, or all of its experts' matrices of one role.
struct matrix_kind {
    int32_t layer;
    enum tensor_role role; // one of tensor_role_is_linear
    enum weight_kind kind;
    uint32_t group_size; // 0 where the kind has no groups
};

enum { MATRIX_WORD_BYTES = 48 }; // for the words below

// Matrices of the layers that may be stored in any kind; not embedding and head.
bool tensor_role_is_linear(enum tensor_role role);

// "3.down"
void matrix_name_print(char out[MATRIX_WORD_BYTES], int32_t layer, enum tensor_role role);
bool matrix_name_parse(const char *word, int32_t *layer, enum tensor_role *role);
// "int8"; "int4:32" for kinds whose groups can be chosen (of which a word without a group is refused).
void matrix_kind_print(char out[MATRIX_WORD_BYTES], enum weight_kind kind, uint32_t group_size);
bool matrix_kind_parse(const char *word, enum weight_kind *kind, uint32_t *group_size);

// By name, as strcmp has it: the order in which a manifest lists them.
int matrix_kinds_compare(const void *a, const void *b);
// The member `key` of object, itself an object of names and kinds. *out is sorted by layer, then role: for matrix_kinds_find. Success: the
// caller frees *out; *count is 0 where there is no such member. The object's bad_code: a name or a word that is none, a layer beyond num_layers.
int matrix_kinds_parse(struct matrix_kind **out, size_t *count, const struct json_object *object, const char *key,
                       int64_t num_layers, struct error *err);
const struct matrix_kind *matrix_kinds_find(const struct matrix_kind *list, size_t count, int32_t layer,
                                            enum tensor_role role); // NULL: not listed
void matrix_kinds_sort(struct matrix_kind *list, size_t count);     // as matrix_kinds_find wants them

#endif
