// See memory_plan.h.
#include "shard/memory_plan.h"

#include "formats/checked.h"
#include "kernels/kernels.h"

enum { KV_ELEM_BYTES = 2 };

// Bytes without any padding.
static uint64_t logical_bytes(const struct weight_shape *shape)
{
    uint64_t elems = shape->rows * shape->cols;
    switch (shape->kind) {
    case WEIGHT_F32:
        return elems * 4;
    case WEIGHT_BF16:
        return elems * 2;
    case WEIGHT_INT8:
    case WEIGHT_FP8:
        return elems ? elems + shape->rows * 4 : 0;
    default:
        return (elems + 1) / 2 + shape->rows * div_up(shape->cols, shape->group_size) * 2;
    }
}

void memory_plan_rank(struct rank_memory *out, const struct plan *plan, uint32_t rank, int64_t context_tokens)
{
    const struct plan_rank *planned = &plan->ranks[rank];
    struct rank_memory memory = {.file_bytes = planned->file_bytes, .weight_bytes = planned->payload_bytes};
    uint64_t logical = 0;
    for (uint64_t i = 0; i < plan->tensor_count; i++) {
        const struct weight_shape *shape = &planned->tensors[i].shape;
        memory.kind_bytes[shape->kind] += shape->data_bytes + shape->scale_bytes;
        logical += logical_bytes(shape);
    }
    memory.padding_bytes = memory.weight_bytes - logical;
    memory.kv_bytes_per_token = 2 * (uint64_t)plan->model.num_layers * (uint64_t)planned->share.num_kv_heads_local *
                                (uint64_t)plan->model.head_dim * KV_ELEM_BYTES;
    memory.kv_bytes = round_up((uint64_t)context_tokens, KV_PAGE_TOKENS) * memory.kv_bytes_per_token;
    memory.total_bytes = memory.weight_bytes + memory.kv_bytes + MEMORY_PLAN_WORKING_BYTES;
    *out = memory;
}

uint64_t memory_plan_parameters(const struct plan *plan)
{
    uint64_t parameters = 0;
    for (uint64_t i = 0; i < plan->tensor_count; i++) {
        const struct shard_tensor *tensor = &plan->ranks[0].tensors[i];
        for (int p = 0; p < tensor->num_parts; p++)
            parameters += tensor->parts[p].source_rows * tensor->parts[p].source_cols;
    }
    return parameters;
}
