// What a plan costs: memory by kind on each rank, and what a token of decoding moves. Arithmetic only. Of a GPU it counts what the CUDA
// backend takes there: weights, KV cache, buffers and reserve.
#ifndef TPSHARD_SHARD_MEMORY_PLAN_H
#define TPSHARD_SHARD_MEMORY_PLAN_H

#include "kernels/kernels.h"
#include "shard/plan.h"

#include <stdint.h>

// What a card of so many bytes has left for a rank: driver and CUDA context take 512 MiB and 1 % of the card. 0: nothing.
enum { MEMORY_PLAN_DRIVER_BYTES = 512 << 20, MEMORY_PLAN_DRIVER_SHARE = 100 };
uint64_t memory_plan_available(uint64_t card_bytes);

// One sequence of so many tokens.
struct rank_memory {
    uint64_t file_bytes;                    // of the rank's file
    uint64_t weight_bytes;                  // its payload: what lies in memory
    uint64_t kind_bytes[WEIGHT_KIND_COUNT]; // weights and scales as stored
    uint64_t padding_bytes;                 // in the payload: rounding of rows, columns, tensors and the end
    uint64_t kv_bytes_per_token;            // all layers of its stage; those with a window keep as much as the others
    uint64_t kv_bytes;                      // at the context, in whole pages
    uint64_t
        scratch_bytes; // on a GPU: buffers of a step of 2048 rows and of sums over ranks, and the backend's reserve
    uint64_t cpu_scratch_bytes; // on a CPU, one thread: buffers of a step, and the rank's parts of sums over ranks
    uint64_t total_bytes;       // on a GPU: weights, KV cache and scratch
    // One token of decoding.
    uint64_t read_bytes;    // weights, of the experts the chosen ones alone; whole experts: on average
    uint64_t kv_read_bytes; // at the context's end; layers with a window read no more than that
    uint64_t sent_bytes;    // to the other ranks, on a bf16 wire, and to the next stage
};
void memory_plan_rank(struct rank_memory *out, const struct plan *plan, uint32_t rank, int64_t context_tokens,
                      enum kv_format kv_format);

// Memory of the fullest rank on a GPU.
uint64_t memory_plan_largest(const struct plan *plan, int64_t context_tokens, enum kv_format kv_format);
// The longest sequence, at most the model's context and else in whole pages, with which no rank needs more than available_bytes. 0: none.
int64_t memory_plan_max_context(const struct plan *plan, enum kv_format kv_format, uint64_t available_bytes);
// Weights of the whole model, each counted once.
uint64_t memory_plan_parameters(const struct plan *plan);
// Of these, what one token is multiplied with.
uint64_t memory_plan_active_parameters(const struct plan *plan);

#endif
