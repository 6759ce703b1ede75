// Rows from a Hugging Face checkpoint, quantized as they are read.
#ifndef TPSHARD_SHARD_CHECKPOINT_SOURCE_H
#define TPSHARD_SHARD_CHECKPOINT_SOURCE_H

#include "formats/checkpoint.h"
#include "shard/plan.h"
#include "shard/rope.h"
#include "shard/row_source.h"

#include <stdbool.h>

struct checkpoint_source {
    struct row_source source; // must be first
    const struct checkpoint *checkpoint;
    float *inv_freq;     // [head_dim / 2]
    bool rounds_to_bf16; // some weight is f16 or f32 and will be stored as bf16
};

// Checks every tensor that the plan needs (there, shape, a dtype that can be read) and that the checkpoint holds none
// that nothing would use. ERR_MODEL names the tensor. Success: checkpoint_source_clear; checkpoint must outlive it.
int checkpoint_source_init(struct checkpoint_source *out, const struct checkpoint *checkpoint, const struct plan *plan,
                           const struct rope *rope, struct error *err);
void checkpoint_source_clear(struct checkpoint_source *source); // accepts a zeroed one

#endif
