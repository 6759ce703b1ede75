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

// Limits that the engine's buffers rest on.
enum {
    MODEL_MAX_HEAD_DIM = 256,        // of plain attention
    MODEL_MAX_LATENT_HEAD_DIM = 320, // of latent attention: of keys, and of values
    MODEL_MAX_LATENT_RANK = 1024,    // kv_rank; q_rank is bound by the hidden size's range alone
    MODEL_MAX_EXPERTS = 1024,
    MODEL_MAX_EXPERTS_PER_TOKEN = 32,
};

// Whether the description's fields go together. False: *problem is a sentence such as "num_kv_heads must divide num_heads,
// found 7 and 32", of at most problem_bytes.
bool model_json_check(const struct model_desc *model, char *problem, size_t problem_bytes);

// Writes the object, keys sorted.
void model_json_emit(struct json_emit *to, const struct model_desc *model);
// Reads and checks it. *out must be zeroed. The object's bad_code names key, wanted and found.
int model_json_parse(struct model_desc *out, const struct json_object *object, struct error *err);

#endif
