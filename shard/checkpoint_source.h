// Rows from a Hugging Face checkpoint, quantized as they are read.
#ifndef TPSHARD_SHARD_CHECKPOINT_SOURCE_H
#define TPSHARD_SHARD_CHECKPOINT_SOURCE_H

#include "formats/checkpoint.h"
#include "shard/hf_config.h"
#include "shard/plan.h"
#include "shard/row_source.h"

#include <stdbool.h>

// What another reader takes of the checkpoint: parts of stored tensors that it makes, and the tensors that these come from.
struct checkpoint_claims {
    bool (*makes)(const struct checkpoint_claims *claims, const struct plan_source *source);
    bool (*reads)(const struct checkpoint_claims *claims, const struct safetensors_tensor *tensor);
};

struct checkpoint_source {
    struct row_source source; // must be first
    const struct checkpoint *checkpoint;
    const struct plan *plan;
    const struct hf_config *config;
    bool rounds_to_bf16; // some weight is f16 or f32 and will be stored as bf16
};

// Checks every tensor that the plan needs (there, shape, a dtype that can be read) and that the checkpoint holds none
// that nothing would use; claims (NULL: none) are left out. ERR_MODEL names the tensor. All arguments must outlive *out.
int checkpoint_source_init(struct checkpoint_source *out, const struct checkpoint *checkpoint, const struct plan *plan,
                           const struct hf_config *config, const struct checkpoint_claims *claims, struct error *err);

#endif
