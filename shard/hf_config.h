// config.json and generation_config.json of a Hugging Face model -> the model description. Refuses by name whatever
// would change the arithmetic and is not known here. What each family reads stands in its table (families.h); this
// directory's hf_config_*.c turn the keys into fields. How the weights are quantized is not read here (import.h).
#ifndef TPSHARD_SHARD_HF_CONFIG_H
#define TPSHARD_SHARD_HF_CONFIG_H

#include "formats/error.h"
#include "formats/model_desc.h"
#include "shard/rope.h"

#include <stdbool.h>
#include <stddef.h>

struct hf_config {
    struct model_desc model;
    struct rope rope, rope_local; // rope_local: of LAYER_LOCAL_ROPE layers
    bool has_generation_config;
};

// Texts need not outlive the call; generation may be NULL. Names are for messages. On failure *out is untouched.
// known_as: the architecture whose keys and tensors count; NULL: the one that config.json names.
int hf_config_parse(struct hf_config *out, const char *config, size_t config_bytes, const char *config_name,
                    const char *generation, size_t generation_bytes, const char *generation_name, const char *known_as,
                    struct error *err);

// The same from model_dir/config.json and, where it exists, model_dir/generation_config.json.
int hf_config_read(struct hf_config *out, const char *model_dir, const char *known_as, struct error *err);

#endif
