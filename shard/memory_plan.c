// See memory_plan.h.
#include "shard/memory_plan.h"

#include "formats/checked.h"
#include "kernels/buffers.h"
#include "kernels/kv.h"
#include "kernels/wire.h"

#include <string.h>

// ---- weights -----------------------------------------------------------------------------------------------------

// Bytes without any padding: codes and scales in proportion.
static uint64_t logical_bytes(const struct weight_shape *shape)
{
    uint64_t elems = shape->rows * shape->cols;
    uint64_t padded = shape->rows_padded * shape->cols_padded;
    return padded ? (uint64_t)((double)(shape->data_bytes + shape->scale_bytes) * ((double)elems / (double)padded)) : 0;
}

static uint64_t chosen_of(const struct model_desc *model, uint64_t bytes)
{
    const struct experts_desc *experts = &model->experts;
    return (uint64_t)((double)bytes * (double)experts->experts_per_token / (double)experts->num_experts);
}

// What a token reads of the weights: everything but the unchosen experts and the other tokens' embeddings.
static uint64_t read_bytes(const struct plan *plan, const struct plan_rank *rank)
{
    uint64_t always = 0, experts = 0;
    bool last = rank >= plan->ranks + plan->num_ranks - plan->tp_size, is_head = plan->model.tied_embeddings && last;
    for (uint64_t i = 0; i < plan->tensor_count; i++) {
        const struct shard_tensor *tensor = &rank->tensors[i];
        uint64_t bytes = tensor->shape.data_bytes + tensor->shape.scale_bytes;
        if (tensor->expert >= 0)
            experts += bytes;
        else if (tensor->role != ROLE_EMBEDDING || is_head)
            always += bytes;
        else if (tensor->shape.rows_padded > 0)
            always += bytes / tensor->shape.rows_padded;
    }
    return always + (experts ? chosen_of(&plan->model, experts) : 0);
}

static uint64_t parameters(const struct plan *plan, bool of_experts)
{
    uint64_t sum = 0;
    for (uint64_t i = 0; i < plan->tensor_count; i++) {
        const struct shard_tensor *tensor = &plan->ranks[0].tensors[i];
        for (int p = 0; p < tensor->num_parts && (tensor->expert >= 0) == of_experts; p++)
            if (p == 0 || strcmp(tensor->parts[p].source, tensor->parts[p - 1].source) != 0)
                sum += tensor->parts[p].source_rows * tensor->parts[p].source_cols;
    }
    return sum;
}

uint64_t memory_plan_parameters(const struct plan *plan) { return parameters(plan, false) + parameters(plan, true); }

uint64_t memory_plan_active_parameters(const struct plan *plan)
{
    uint64_t of_experts = parameters(plan, true);
    return parameters(plan, false) + (of_experts ? chosen_of(&plan->model, of_experts) : 0);
}

// ---- KV cache ----------------------------------------------------------------------------------------------------

static uint64_t cache_bytes(const struct plan *plan, uint32_t rank, int64_t context_tokens, enum kv_format format)
{
    int64_t pages = (int64_t)div_up((uint64_t)context_tokens, KV_PAGE_TOKENS);
    struct model_desc model;
    plan_rank_model(&model, plan, rank);
    return kv_bytes(&model, &plan->ranks[rank].share, pages, format);
}

static uint64_t cache_read_bytes(const struct plan *plan, uint32_t rank, int64_t context_tokens, enum kv_format format)
{
    struct model_desc stage;
    const struct model_desc *model = &stage;
    plan_rank_model(&stage, plan, rank);
    struct kv_shape shape = kv_shape(model, &plan->ranks[rank].share);
    uint64_t layer_bytes = kv_layer_bytes(&shape, 1, format) / KV_PAGE_TOKENS, sum = 0;
    for (int64_t layer = 0; layer < model->num_layers; layer++) {
        bool window = (model->layer_flags[layer] & LAYER_WINDOW) && model->sliding_window < context_tokens;
        sum += layer_bytes * (uint64_t)(window ? model->sliding_window : context_tokens);
    }
    return sum;
}

// ---- buffers -----------------------------------------------------------------------------------------------------

// What kernels/cuda/memory.c takes beside weights and KV cache, and the constants of kernels/cuda/device.h that it takes it by.
// tests/test_cuda_plan.cc compares.
enum {
    CUDA_ROWS = 2048,
    CUDA_LOGITS_ROWS = 64,
    CUDA_EXPERTS_ROWS = 1024,
    CUDA_EXPERT_BYTES = 64, // an expert's entry in the table of experts
    CUDA_SLAB_BYTES = 32 << 20,
    CUDA_ATTENTION_CHUNK = 256,
    CUDA_LATENT_ROWS = 512,
    CUDA_LATENT_CHUNK = 512,
    CUDA_SMALL_BYTES = 1 << 20, // tables of a step, of constants, of the sampler; alignment
    CUDA_WORKSPACE_BYTES = 32 << 20,
    CUDA_RESERVE_BYTES = 192 << 20,
    // kernels/cuda/exchange.h, exchange_p2p.c: sums over ranks by the devices, without a wire that loses. Over p2p, which takes more than the host's
    // memory: what goes out and comes in of chunks, and an area for each other rank.
    CUDA_EXCHANGE_RANKS = 16,
    CUDA_CHUNKS_BYTES = 18 << 20,
    CUDA_AREA_BYTES = (2 << 20) + 8192,
};

// Of a mixture of experts: for each chosen expert of a row gate and up, its output, and their input.
static uint64_t cuda_experts_bytes(const struct model_desc *model, const struct rank_share *share)
{
    uint64_t size = (uint64_t)share->expert_size_local, stride = round_up(size, ACT_GROUP);
    uint64_t slot_bytes = (2 * size + (uint64_t)model->hidden_size + 2) * sizeof(float) + stride * 2;
    if (model->experts.num_experts == 0)
        return 0;
    return (uint64_t)expert_slots(model, CUDA_EXPERTS_ROWS) * slot_bytes +
           (uint64_t)expert_slots(model, CUDA_ROWS) * 2 * sizeof(float) +
           (uint64_t)(model->num_layers * share->num_experts_local) * CUDA_EXPERT_BYTES;
}

// Of attention to one sequence: the heads' parts of every chunk of the context; queries against the latent and its mixtures.
static uint64_t cuda_attention_bytes(const struct model_desc *model, const struct rank_share *share,
                                     int64_t context_tokens)
{
    const struct latent_desc *latent = &model->latent;
    uint64_t heads = (uint64_t)share->num_heads_local * sizeof(float), context = (uint64_t)context_tokens;
    if (latent->kv_rank == 0)
        return heads * div_up(context, CUDA_ATTENTION_CHUNK) * (uint64_t)(model->head_dim + 2);
    return heads * (div_up(context, CUDA_LATENT_CHUNK) * (uint64_t)(latent->kv_rank + 2) +
                    CUDA_LATENT_ROWS * (uint64_t)(2 * latent->kv_rank + latent->rope_dim));
}

static uint64_t cuda_scratch(const struct plan *plan, uint32_t rank, int64_t context_tokens)
{
    struct model_desc stage;
    const struct model_desc *model = &stage;
    const struct rank_share *share = &plan->ranks[rank].share;
    plan_rank_model(&stage, plan, rank);
    uint64_t vocab = (uint64_t)share->vocab_local, widest = round_up((uint64_t)widest_input(model, share), ACT_GROUP);
    uint64_t row_floats = (uint64_t)attended_width(model, share);
    for (int buffer = 0; buffer < BUFFER_NORMED; buffer++) // normed rows have the place of others
        row_floats += (uint64_t)buffer_width(model, share, (enum buffer)buffer);
    if (model->experts.num_experts > 0 || model->latent.kv_rank > 0)
        row_floats += (uint64_t)model->hidden_size;
    uint64_t bytes = CUDA_ROWS * (row_floats * sizeof(float) + widest * 2 + widest / ACT_GROUP * sizeof(float)) +
                     cuda_experts_bytes(model, share) + cuda_attention_bytes(model, share, context_tokens) +
                     CUDA_LOGITS_ROWS * vocab * sizeof(float) + CUDA_SLAB_BYTES + CUDA_SLAB_BYTES / 64 * sizeof(float);
    if (plan->num_ranks == 1) // the device samples
        bytes += vocab * 3;
    if (plan->tp_size > 1 && plan->tp_size <= CUDA_EXCHANGE_RANKS)
        bytes += CUDA_CHUNKS_BYTES + (uint64_t)(plan->tp_size - 1) * CUDA_AREA_BYTES;
    return bytes + CUDA_SMALL_BYTES + CUDA_WORKSPACE_BYTES + CUDA_RESERVE_BYTES;
}

// Two sets of a step's rows that the ranks of one host share, where no wire carries their sums; as worker_part_area of engine/worker.c has them.
static uint64_t cpu_parts_bytes(const struct plan *plan, int64_t rows)
{
    enum { PAGE_BYTES = 4096 };
    uint64_t bytes = (uint64_t)(rows * plan->model.hidden_size) * sizeof(float);
    return plan->tp_size > 1 && plan->tp_size <= RANK_PARTS_MOST ? 2 * round_up(bytes, PAGE_BYTES) : 0;
}

// As the engine runs it on one host with a lossless wire.
static uint64_t cpu_scratch(const struct plan *plan, uint32_t rank, int64_t context_tokens)
{
    struct model_desc stage;
    plan_rank_model(&stage, plan, rank);
    struct device_shape shape = {
        .desc = &stage,
        .share = &plan->ranks[rank].share,
        .max_rows = backend_cpu.prefill_rows,
        .max_sequences = 1,
        .context = context_tokens,
    };
    shape.max_rows = cpu_step_rows(&shape, 1, cpu_parts_row_bytes((int)plan->tp_size, stage.hidden_size), 1);
    return backend_cpu.host_bytes(&shape, 1) + cpu_parts_bytes(plan, shape.max_rows);
}

// ---- the whole ---------------------------------------------------------------------------------------------------

uint64_t memory_plan_available(uint64_t card_bytes)
{
    uint64_t taken = MEMORY_PLAN_DRIVER_BYTES + card_bytes / MEMORY_PLAN_DRIVER_SHARE;
    return card_bytes > taken ? card_bytes - taken : 0;
}

static uint64_t gpu_bytes(const struct plan *plan, uint32_t rank, int64_t context_tokens, enum kv_format format)
{
    return plan->ranks[rank].payload_bytes + cache_bytes(plan, rank, context_tokens, format) +
           cuda_scratch(plan, rank, context_tokens);
}

// The embedding and two sums a layer, of the rank's stage. Every rank sends its part of each sum to the other ranks, and its share of the result; and,
// to the next stage, a row of the residual in f32.
static uint64_t sent_bytes(const struct plan *plan, uint32_t rank)
{
    struct model_desc model;
    plan_rank_model(&model, plan, rank);
    bool first = rank < plan->tp_size, last = rank + plan->tp_size >= plan->num_ranks;
    uint64_t sums = (first ? 1 : 0) + 2 * (uint64_t)model.num_layers, hidden = (uint64_t)model.hidden_size;
    uint64_t row = wire_groups(hidden) * wire_group_bytes(WIRE_BF16);
    return sums * (row * 2 * (plan->tp_size - 1) / plan->tp_size) + (last ? 0 : hidden * sizeof(float));
}

void memory_plan_rank(struct rank_memory *out, const struct plan *plan, uint32_t rank, int64_t context_tokens,
                      enum kv_format kv_format)
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
    memory.kv_bytes_per_token = cache_bytes(plan, rank, 1, kv_format) / KV_PAGE_TOKENS;
    memory.kv_bytes = cache_bytes(plan, rank, context_tokens, kv_format);
    memory.scratch_bytes = cuda_scratch(plan, rank, context_tokens);
    memory.cpu_scratch_bytes = cpu_scratch(plan, rank, context_tokens);
    memory.total_bytes = gpu_bytes(plan, rank, context_tokens, kv_format);
    memory.read_bytes = read_bytes(plan, planned);
    memory.kv_read_bytes = cache_read_bytes(plan, rank, context_tokens, kv_format);
    memory.sent_bytes = sent_bytes(plan, rank);
    *out = memory;
}

uint64_t memory_plan_largest(const struct plan *plan, int64_t context_tokens, enum kv_format kv_format)
{
    uint64_t largest = 0;
    for (uint32_t rank = 0; rank < plan->num_ranks; rank++) {
        uint64_t bytes = gpu_bytes(plan, rank, context_tokens, kv_format);
        largest = bytes > largest ? bytes : largest;
    }
    return largest;
}

int64_t memory_plan_max_context(const struct plan *plan, enum kv_format kv_format, uint64_t available_bytes)
{
    int64_t fits = 0, too_many = plan->model.context / KV_PAGE_TOKENS + 1; // pages
    if (memory_plan_largest(plan, plan->model.context, kv_format) <= available_bytes)
        return plan->model.context;
    while (too_many - fits > 1) {
        int64_t pages = fits + (too_many - fits) / 2;
        if (memory_plan_largest(plan, pages * KV_PAGE_TOKENS, kv_format) <= available_bytes)
            fits = pages;
        else
            too_many = pages;
    }
    return fits * KV_PAGE_TOKENS;
}
