// What the files hf_config*.c share.
#ifndef TPSHARD_SHARD_HF_CONFIG_PARTS_H
#define TPSHARD_SHARD_HF_CONFIG_PARTS_H

#include "formats/json_file.h"
#include "shard/families.h"
#include "shard/hf_config.h"

// Larger than any model; small enough that products of two fit easily.
enum {
    MAX_HIDDEN = 1 << 20,
    MAX_INTERMEDIATE = 1 << 24,
    MAX_HEADS = 1 << 14,
    MAX_VOCAB = 1 << 26,
    MAX_CONTEXT = 1 << 30,
};

// The config of one family.
struct config {
    struct json_object json;
    const struct family *family;
};

// As json_file_get_*, but a key that the file does not hold has the family's default. JSON_OPTIONAL: a key without
// default, and null, leave *out as it is.
int config_int(int64_t *out, const struct config *config, const char *key, int64_t min, int64_t max,
               enum json_need need, struct error *err);
int config_number(double *out, const struct config *config, const char *key, double min, double max,
                  enum json_need need, struct error *err);
int config_bool(bool *out, const struct config *config, const char *key, struct error *err); // missing: false

// Attention: head_dim, latents, biases, norms, windows, scale, soft-caps, rotation.
int config_attention(struct hf_config *out, const struct config *config, struct error *err);
// Experts; LAYER_EXPERTS of every layer.
int config_experts(struct model_desc *model, const struct config *config, struct error *err);

#endif
