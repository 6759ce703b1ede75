// What a plan costs in memory: weights by kind, padding, KV cache. Arithmetic only.
#ifndef TPSHARD_SHARD_MEMORY_PLAN_H
#define TPSHARD_SHARD_MEMORY_PLAN_H

#include "shard/plan.h"

#include <stdint.h>

// Room that a device needs besides weights and KV cache: driver, activations, transfer buffers.
#define MEMORY_PLAN_WORKING_BYTES ((uint64_t)1 << 30)

struct rank_memory {
    uint64_t file_bytes;                    // of the rank's file
    uint64_t weight_bytes;                  // the payload: what lies in the device's memory
    uint64_t kind_bytes[WEIGHT_KIND_COUNT]; // weights and scales as stored
    uint64_t padding_bytes;                 // in the payload: rounding of rows, columns, tensors and the end
    uint64_t kv_bytes_per_token;            // bf16 keys and values
    uint64_t kv_bytes;                      // at the context
    uint64_t total_bytes;                   // weights + KV cache + working room
};

void memory_plan_rank(struct rank_memory *out, const struct plan *plan, uint32_t rank, int64_t context_tokens);
// Weights of the whole model, each counted once.
uint64_t memory_plan_parameters(const struct plan *plan);

#endif
