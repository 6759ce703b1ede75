// The CPU backend's device, shared by the files that implement it: backend_cpu.c (memory, rows, products), cpu_attention.c,
// cpu_experts.c.
#ifndef TPSHARD_KERNELS_CPU_DEVICE_H
#define TPSHARD_KERNELS_CPU_DEVICE_H

#include "kernels/backend.h"
#include "kernels/buffers.h"
#include "kernels/kv.h"

struct chosen_expert {
    int32_t expert; // of the whole model
    float weight;
};

// Work of the experts of one layer. A slot is one of a row's chosen experts; slots of one expert of this rank stand next to each other.
struct expert_work {
    struct chosen_expert *chosen; // [max_rows][experts_per_token], best first
    float *shared_factor;         // [max_rows]
    int32_t *place;               // [max_rows][experts_per_token]: where the slot stands, -1: on another rank
    int32_t *first;               // [num_experts_local + 1]: the experts' first places
    struct activations act;       // [places]
    float *gate_up, *out;         // [places][2 * expert_size_local], [places][hidden]
};

// Scratch of attention; see cpu_attention.c.
struct attention_work {
    int64_t *blocks;     // [max_rows + 1]: first rows of the blocks of a step
    int64_t room_floats; // of one thread
    float *room;         // [threads][room_floats]
    float *latent;       // [threads][ATTENTION_QUERIES][k_dim + v_dim]: queries against the latent, and its mixtures
    float *parts;        // [parts_floats]: what queries have summed up over a chunk of positions
    int64_t parts_floats;
};

struct device {
    const struct kernels *k;
    struct thread_pool *pool;
    struct device_shape shape;
    const struct weights *weights;
    uint8_t *payload; // weights that do not lie in a mapped file; NULL: they do
    uint64_t payload_bytes;
    struct kv_shape kv_shape;
    int64_t q_size, kv_size; // floats of a row of BUFFER_QKV: queries, then keys, then values

    const struct token_row *step_rows; // of the step under way
    int64_t step_count;
    struct kv_pages pages;

    // The window's rows. What is here counts them from its first.
    const struct token_row *rows;
    int64_t count;
    float *buffers[BUFFER_COUNT];
    float *cosines[2], *sines[2]; // [rows][rotary_dim / 2]: by the first table, by the local one

    // The step's.
    float *all_buffers[BUFFER_COUNT], *all_cosines[2], *all_sines[2]; // [max_rows]
    float *partial;          // in the place of BUFFER_PARTIAL's own memory; NULL: nothing is
    struct rank_parts parts; // of the window's rows, not yet added up; ranks 0: they are
    float *attended;         // [max_rows][attended_width]
    float *head_rows;        // [threads][hidden]
    uint8_t *kv;             // [num_layers][k, v], each as in struct kv_view
    uint64_t kv_bytes;       // mapped, so that untouched pages cost nothing
    struct attention_work attention;
    struct expert_work experts;

    const float *input; // rows of the next product, and how they are prepared in act
    int64_t input_stride;
    enum weight_kind input_kind;
    struct activations act;
};

// The rows of the next products are x [count][x_stride], prepared for `next`.
void cpu_set_input(struct device *d, const float *x, int64_t x_stride, int64_t count, const struct matrix *next);

// What the operation just done has left for the next products to multiply, before it is prepared for them: rows [count][stride].
struct cpu_rows {
    const float *x;
    int64_t count, stride;
};
static inline struct cpu_rows cpu_input(const struct device *d)
{
    return (struct cpu_rows){d->input, d->count, d->input_stride};
}
// After `experts`: what an expert's down multiplied; its columns are the first of each row.
static inline struct cpu_rows cpu_expert_input(const struct device *d, int64_t expert)
{
    const struct expert_work *e = &d->experts;
    int64_t stride = 2 * d->shape.share->expert_size_local;
    return (struct cpu_rows){e->gate_up + e->first[expert] * stride, e->first[expert + 1] - e->first[expert], stride};
}

#endif
