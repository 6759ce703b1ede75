// What a device holds: planned, allocated in one piece, cut up; and the way of the weights to it. See device.h.
#include "formats/checked.h"
#include "kernels/buffers.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/exchange_host.h"
#include "kernels/kv.h"

#include <stdlib.h>
#include <string.h>

enum { ALIGNMENT = 256, PAGE_BYTES = 4096 };

// ---- the plan --------------------------------------------------------------------------------------------------

// Cuts memory into pieces; with base NULL it only counts.
struct cutter {
    uint8_t *base;
    uint64_t used;
};

static void *cut(struct cutter *c, uint64_t bytes)
{
    void *piece = c->base ? c->base + c->used : NULL;
    c->used += round_up(bytes, ALIGNMENT);
    return piece;
}

struct step_block device_step_block(const struct device *d, uint8_t *memory, int64_t count)
{
    struct step_block block;
    uint64_t at = (uint64_t)d->shape.decode_rows * sizeof *block.sampling;
    block.sampling = (struct device_sampling *)(void *)memory;
    block.token = (uint32_t *)(void *)(memory + at);
    block.sequence = (int32_t *)(void *)(block.token + count);
    block.position = block.sequence + count;
    block.bytes = at + 3 * (uint64_t)count * sizeof *block.token;
    return block;
}

static uint64_t step_bytes(const struct device_shape *s)
{
    return (uint64_t)s->decode_rows * sizeof(struct device_sampling) + 3 * (uint64_t)s->max_rows * sizeof(uint32_t);
}

static int64_t pages_per_sequence(const struct device_shape *s)
{
    return (int64_t)div_up((uint64_t)s->context, KV_PAGE_TOKENS);
}

// Whether a norm's rows are multiplied by matrices of different kinds, or again after others.
static bool keeps_rows(const struct model_desc *desc)
{
    return desc->experts.num_experts > 0 || desc->latent.kv_rank > 0;
}

static void cut_experts(struct device *d, const struct device_shape *s, struct cutter *c)
{
    const struct model_desc *desc = s->desc;
    const struct rank_share *share = s->share;
    struct expert_work *e = &d->experts;
    uint64_t local = (uint64_t)share->num_experts_local, size = (uint64_t)share->expert_size_local;
    uint64_t rows = (uint64_t)d->rows_capacity, all = (uint64_t)expert_slots(desc, d->rows_capacity);
    uint64_t slots = (uint64_t)expert_slots(desc, d->rows_capacity < EXPERTS_ROWS ? d->rows_capacity : EXPERTS_ROWS);
    uint64_t stride = round_up(size, ACT_GROUP);
    if (slots == 0)
        return;
    e->table = cut(c, (uint64_t)desc->num_layers * local * sizeof *e->table);
    e->chosen = cut(c, all * sizeof *e->chosen);
    e->weight = cut(c, all * sizeof *e->weight);
    e->shared_factor = cut(c, rows * sizeof *e->shared_factor);
    e->slots.slot = cut(c, slots * sizeof *e->slots.slot);
    e->slots.tiles =
        cut(c, (uint64_t)expert_tiles((int64_t)slots, (int64_t)local, EXPERT_TILE_FEW) * sizeof *e->slots.tiles);
    e->gate_up = cut(c, slots * 2 * size * sizeof *e->gate_up);
    e->out = cut(c, slots * (uint64_t)desc->hidden_size * sizeof *e->out);
    e->input.values = cut(c, slots * stride * 2);
    e->input.scale = cut(c, slots * sizeof *e->input.scale);
    e->input.stride = (int64_t)stride;
}

// Everything but weights and KV cache, in the order in which it is used.
static void cut_scratch(struct device *d, const struct device_shape *s, struct cutter *c)
{
    const struct model_desc *desc = s->desc;
    const struct rank_share *share = s->share;
    uint64_t rows = round_up((uint64_t)s->max_rows, GEMM_ROWS_STEP), floats = rows * sizeof(float);
    uint64_t sequences = (uint64_t)s->max_sequences, vocab = (uint64_t)share->vocab_local;
    uint64_t choices = (uint64_t)s->decode_rows;
    uint64_t widest = round_up((uint64_t)widest_input(desc, share), ACT_GROUP);
    uint64_t input_rows = (uint64_t)larger_of((int64_t)rows, LOGITS_ROWS);
    d->rows_capacity = (int64_t)rows;
    d->step_device = cut(c, step_bytes(s));
    d->pages = cut(c, sequences * (uint64_t)pages_per_sequence(s) * sizeof *d->pages);
    d->row_index = cut(c, LOGITS_ROWS * sizeof *d->row_index);
    d->identity = cut(c, LOGITS_ROWS * sizeof *d->identity);
    for (int i = 0; i < BUFFER_NORMED; i++)
        d->buffer[i] = cut(c, floats * (uint64_t)buffer_width(desc, share, (enum buffer)i));
    d->attended = cut(c, floats * (uint64_t)attended_width(desc, share));
    // Otherwise a norm that needs to keep its rows has the place of the sum that it has just taken.
    d->keeps_rows = keeps_rows(desc);
    d->normed = d->buffer[BUFFER_NORMED] =
        d->keeps_rows ? cut(c, floats * (uint64_t)desc->hidden_size) : d->buffer[BUFFER_PARTIAL];
    d->input.values = cut(c, input_rows * widest * 2);
    d->input.scale = cut(c, input_rows * (widest / ACT_GROUP) * sizeof(float));
    d->input.stride = (int64_t)widest;
    cut_experts(d, s, c);
    d->logits = cut(c, LOGITS_ROWS * vocab * sizeof(float));
    struct device_latent latent = {share->num_heads_local, desc->latent.kv_rank, desc->latent.rope_dim, 0, 0};
    if (latent.kv_rank > 0) {
        uint64_t heads = (rows < LATENT_ROWS ? rows : LATENT_ROWS) * (uint64_t)latent.num_heads * sizeof(float);
        d->query = cut(c, heads * (uint64_t)(latent.kv_rank + latent.rope_dim));
        d->mixed = cut(c, heads * (uint64_t)latent.kv_rank);
    }
    d->attention_scratch = cut(c, latent.kv_rank > 0 ? latent_scratch_bytes(s->decode_rows, latent, s->context)
                                                     : attention_scratch_bytes(s->decode_rows, share->num_heads_local,
                                                                               desc->head_dim, s->context));
    d->slab = cut(c, SLAB_BYTES > WEIGHT_ROW_UNIT * widest * 2 ? SLAB_BYTES : WEIGHT_ROW_UNIT * widest * 2);
    d->slab_scale = cut(c, SLAB_BYTES / 64 * sizeof(float)); // no row of a slab is shorter than 64 bytes
    d->one = cut(c, sizeof *d->one);
    if (s->samples) {
        d->sample_scratch = cut(c, sample_scratch_bytes(s->decode_rows, (int64_t)vocab));
        d->in_output = cut(c, sequences * vocab * sizeof *d->in_output);
        d->in_any = cut(c, sequences * vocab);
        d->chosen = cut(c, choices * sizeof *d->chosen);
    }
}

// Pinned memory: while the weights come, the lanes' buffers; later, what the steps copy through.
uint64_t device_host_bytes(const struct device_shape *s, int threads)
{
    uint64_t lanes = (uint64_t)LOAD_LANES * (LOAD_BUFFER_BYTES + PAGE_BYTES);
    uint64_t lent = s->samples ? 0 : (uint64_t)(s->max_rows * s->desc->hidden_size) * sizeof(float);
    uint64_t logits = (uint64_t)(LOGITS_ROWS * s->desc->vocab_size) * sizeof(float);
    (void)threads;
    return lanes + lent + logits + step_bytes(s) +
           (uint64_t)(s->max_sequences * pages_per_sequence(s)) * sizeof(int32_t);
}

// What no kernel here does is said before anything is loaded.
static int check_features(const struct model_desc *desc, struct error *err)
{
    const struct latent_desc *latent = &desc->latent;
    bool wide = latent->kv_rank + latent->rope_dim > LATENT_MAX_KEY || latent->kv_rank > LATENT_MAX_VALUE;
    const char *missing = wide                                                               ? "a latent of this size"
                          : latent->kv_rank > 0 && desc->sinks                               ? "sinks over a latent"
                          : desc->head_dim > KERNELS_MAX_HEAD_DIM || desc->head_dim % 2 != 0 ? "heads of this size"
                                                                                             : NULL;
    if (!missing)
        return 0;
    return error_set(err, ERR_MODEL, "the CUDA backend does not do %s; --backend cpu does", missing);
}

int device_plan(struct device *d, const struct device_shape *shape, struct memory_plan *plan, struct error *err)
{
    size_t available, total;
    struct cutter count = {0};
    if (shape->decode_rows > LOGITS_ROWS)
        return error_set(err, ERR_USAGE, "%lld rows: the CUDA backend decodes at most %d together",
                         (long long)shape->decode_rows, LOGITS_ROWS);
    int rc = check_features(shape->desc, err);
    if (rc)
        return rc;
    rc = device_status(d, cudaMemGetInfo(&available, &total), "asking for its free memory", err);
    if (rc)
        return rc;
    cut_scratch(d, shape, &count);
    plan->kv_bytes = kv_bytes(shape->desc, shape->share, shape->num_pages, shape->kv_format);
    plan->scratch_bytes = count.used + multiply_workspace_bytes(d->sm) + RESERVE_BYTES;
    plan->exchange_bytes = exchange_memory_bytes(shape, d->tp_size);
    plan->available_bytes = available;
    plan->device = d->index;
    return 0;
}

// ---- the weights -----------------------------------------------------------------------------------------------

int device_load_begin(struct device *d, const uint8_t *mapped, uint64_t bytes, struct load_target *target,
                      struct error *err)
{
    (void)mapped;
    int rc = CHECK(cudaMalloc((void **)&d->payload, bytes > 0 ? bytes : 1), "taking memory for the weights");
    *target = (struct load_target){.base = d->payload};
    return rc;
}

// The first call of each lane makes what it needs; the calling thread may be new to the device.
int device_load_buffer(struct device *d, int lane, uint64_t bytes, uint8_t **buffer, struct error *err)
{
    struct load_lane *l = &d->lanes[lane];
    int rc;
    if (!l->stream && ((rc = CHECK(cudaSetDevice(d->index), "choosing it")) ||
                       (rc = CHECK(cudaStreamCreateWithFlags(&l->stream, cudaStreamNonBlocking), "making a stream"))))
        return rc;
    // A thread that waits must leave its core to those that read and check.
    if (!l->copied && (rc = CHECK(cudaEventCreateWithFlags(&l->copied, cudaEventDisableTiming | cudaEventBlockingSync),
                                  "making an event")))
        return rc;
    if (!l->pinned &&
        (rc = CHECK(cudaMallocHost((void **)&l->pinned, bytes + PAGE_BYTES), "pinning memory to load through")))
        return rc;
    *buffer = l->pinned + (PAGE_BYTES - (uintptr_t)l->pinned % PAGE_BYTES) % PAGE_BYTES;
    return 0;
}

int device_load_copy(struct device *d, int lane, uint64_t offset, const uint8_t *from, uint64_t bytes,
                     struct error *err)
{
    struct load_lane *l = &d->lanes[lane];
    static const char what[] = "copying the weights";
    int rc;
    if ((rc = CHECK(cudaMemcpyAsync(d->payload + offset, from, bytes, cudaMemcpyHostToDevice, l->stream), what)) ||
        (rc = CHECK(cudaEventRecord(l->copied, l->stream), what)) ||
        (rc = CHECK(cudaEventSynchronize(l->copied), what)))
        cudaStreamSynchronize(l->stream); // nothing may still read a buffer that is filled anew
    return rc;
}

int device_load_read(struct device *d, uint64_t offset, void *to, uint64_t bytes, struct error *err)
{
    return CHECK(cudaMemcpy(to, d->payload + offset, bytes, cudaMemcpyDeviceToHost), "reading weights back");
}

void device_load_end(struct device *d)
{
    for (int i = 0; i < LOAD_LANES; i++) {
        struct load_lane *l = &d->lanes[i];
        if (l->pinned)
            cudaFreeHost(l->pinned);
        if (l->copied)
            cudaEventDestroy(l->copied);
        if (l->stream)
            cudaStreamDestroy(l->stream);
        *l = (struct load_lane){0};
    }
}

// ---- everything else -------------------------------------------------------------------------------------------

static int pin(const struct device *d, void *pointer, uint64_t bytes, struct error *err)
{
    return device_status(d, cudaMallocHost((void **)pointer, bytes > 0 ? bytes : 1), "pinning memory for the host",
                         err);
}

static int pin_all(struct device *d, struct error *err)
{
    const struct device_shape *s = &d->shape;
    int rc;
    if ((rc = pin(d, &d->step_host, step_bytes(s), err)) ||
        (rc = pin(d, &d->pages_host, (uint64_t)(s->max_sequences * d->pages_per_sequence) * sizeof *d->pages, err)) ||
        (rc = pin(d, &d->row_index_host, LOGITS_ROWS * sizeof *d->row_index, err)) ||
        (rc = pin(d, &d->chosen_host, (uint64_t)s->decode_rows * sizeof *d->chosen, err)))
        return rc;
    uint64_t vocab = (uint64_t)s->share->vocab_local;
    if (s->samples && ((rc = pin(d, &d->output_host, vocab * sizeof *d->output_host, err)) ||
                       (rc = pin(d, &d->any_host, vocab, err))))
        return rc;
    if (s->samples && d->tp_size == 1) // one rank alone exchanges nothing
        return 0;
    return pin(d, &d->lent, (uint64_t)(s->max_rows * s->desc->hidden_size) * sizeof *d->lent, err);
}

// What never changes. The arena is zeroed, so that no kernel meets bits that nobody wrote.
static int fill_constants(struct device *d, uint64_t arena_bytes, struct error *err)
{
    static const float one = 1.0f;
    int32_t identity[LOGITS_ROWS];
    int rc;
    for (int i = 0; i < LOGITS_ROWS; i++)
        identity[i] = i;
    if ((rc = device_status(d, cudaMemsetAsync(d->arena, 0, arena_bytes, d->stream), "clearing its memory", err)) ||
        (rc = device_status(d, cudaStreamSynchronize(d->stream), "clearing its memory", err)) ||
        (rc = device_upload(d, d->identity, identity, sizeof identity, "copying constants", err)))
        return rc;
    return device_upload(d, d->one, &one, sizeof one, "copying constants", err);
}

int device_prepare(struct device *d, const struct device_shape *shape, const struct weights *weights, struct error *err)
{
    struct cutter cutter = {0};
    uint64_t kv = kv_bytes(shape->desc, shape->share, shape->num_pages, shape->kv_format);
    int rc;
    d->shape = *shape;
    d->weights = weights;
    d->pages_per_sequence = pages_per_sequence(shape);
    cut_scratch(d, shape, &cutter);
    uint64_t arena_bytes = cutter.used + kv;
    if ((rc = device_status(d, cudaMalloc((void **)&d->arena, arena_bytes), "taking memory for buffers and KV cache",
                            err)))
        return rc;
    cutter = (struct cutter){.base = d->arena};
    cut_scratch(d, shape, &cutter);
    memcpy(d->all_buffer, d->buffer, sizeof d->all_buffer);
    d->kv = cut(&cutter, kv);
    d->graphs = calloc((size_t)shape->decode_rows + 1, sizeof *d->graphs);
    if (!d->graphs)
        return error_set(err, ERR_MEMORY, "no memory for the table of graphs");
    if ((rc = pin_all(d, err)) || (rc = fill_constants(d, arena_bytes, err)) || (rc = experts_prepare(d, err)))
        return rc;
    return multiply_prepare(d, err);
}

static void free_pinned(void *pointer)
{
    if (pointer)
        cudaFreeHost(pointer);
}

void device_end_recording(struct device *d)
{
    cudaGraph_t graph = NULL;
    if (!d->recording)
        return;
    cudaStreamEndCapture(d->stream, &graph);
    if (graph)
        cudaGraphDestroy(graph);
    cudaGetLastError(); // it may say that streams were not brought together
    d->recording = false;
}

void device_settle(struct device *d)
{
    device_end_recording(d);
    if (d->stream)
        cudaStreamSynchronize(d->stream);
}

void device_free_memory(struct device *d)
{
    for (int64_t i = 0; d->graphs && i <= d->shape.decode_rows; i++)
        if (d->graphs[i].exec)
            cudaGraphExecDestroy(d->graphs[i].exec);
    free(d->graphs);
    free_pinned(d->step_host);
    free_pinned(d->pages_host);
    free_pinned(d->row_index_host);
    free_pinned(d->chosen_host);
    free_pinned(d->output_host);
    free_pinned(d->any_host);
    free_pinned(d->lent);
    free_pinned(d->logits_host);
    device_load_end(d);
    if (d->payload)
        cudaFree(d->payload);
    if (d->arena)
        cudaFree(d->arena);
}
