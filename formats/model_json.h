// The model description as a JSON object of the manifest: one table of keys, types and ranges, for reading and writing.
// Specification: formats/shard_file.md.
#ifndef TPSHARD_FORMATS_MODEL_JSON_H
#define TPSHARD_FORMATS_MODEL_JSON_H

#include "formats/error.h"
#include "formats/json_emit.h"
#include "formats/json_file.h"
#include "formats/model_desc.h"

#include <stdbool.h>
#include <stddef.h>

// Whether the description's fields go together. False: *problem is a sentence such as "num_kv_heads must divide num_heads,
// found 7 and 32", of at most problem_bytes.
bool model_json_check(const struct model_desc *model, char *problem, size_t problem_bytes);

// Writes the object, keys sorted.
void model_json_emit(struct json_emit *to, const struct model_desc *model);
// Reads and checks it. *out must be zeroed. The object's bad_code names key, wanted and found.
int model_json_parse(struct model_desc *out, const struct json_object *object, struct error *err);

#endif
