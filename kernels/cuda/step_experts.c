// A mixture of experts on the device: the router's choice, then the products of the chosen experts alone. See device.h and launch.h.
//
// Nothing of the choice comes to the host: slots are listed by expert on the device, and every launch is as large as the number of rows alone
// says, so that a step can be recorded.
#include "kernels/cuda/device.h"

#include "kernels/buffers.h"

#include <stdlib.h>

static bool same_shape(const struct matrix *a, const struct matrix *b)
{
    return a->shape.kind == b->shape.kind && a->shape.group_size == b->shape.group_size &&
           a->shape.rows == b->shape.rows && a->shape.cols == b->shape.cols;
}

static struct device_weights weights_of(const struct matrix *w, const float *bias)
{
    return (struct device_weights){w->data, w->scale, bias};
}

int experts_prepare(struct device *d, struct error *err)
{
    int64_t layers = d->shape.desc->num_layers, local = d->shape.share->num_experts_local;
    if (d->shape.desc->experts.num_experts == 0 || local == 0)
        return 0;
    struct device_expert *table = calloc((size_t)(layers * local), sizeof *table);
    int rc = table ? 0 : error_set(err, ERR_MEMORY, "no memory for the table of experts");
    for (int64_t i = 0; i < layers * local && !rc; i++) {
        const struct layer *layer = &d->weights->layers[i / local];
        if (!layer->experts)
            continue;
        const struct mlp *first = &layer->experts[0], *mlp = &layer->experts[i % local];
        if (!same_shape(&first->gate_up, &mlp->gate_up) || !same_shape(&first->down, &mlp->down))
            rc = error_set(err, ERR_MODEL,
                           "the CUDA backend takes experts of one layer in one kind and size, expert %lld of layer "
                           "%lld differs; --backend cpu takes any",
                           (long long)(i % local), (long long)(i / local));
        table[i] = (struct device_expert){weights_of(&mlp->gate_up, mlp->gate_up_bias),
                                          weights_of(&mlp->down, mlp->down_bias)};
    }
    if (!rc)
        rc = device_upload(d, d->experts.table, table, (uint64_t)(layers * local) * sizeof *table,
                           "copying the table of experts", err);
    free(table);
    return rc;
}

int step_route(struct device *d, int64_t layer_index, struct error *err)
{
    const struct experts_desc *e = &d->shape.desc->experts;
    const struct layer *layer = &d->weights->layers[layer_index];
    struct device_router router = {
        .kind = e->router,
        .num_experts = e->num_experts,
        .experts_per_token = e->experts_per_token,
        .num_groups = e->num_groups,
        .groups_per_token = e->groups_per_token,
        .group_members = e->group_members,
        .shared_gate = e->shared_gate,
        .normalise = e->normalise,
        .scale = (float)e->scale,
        .bias = layer->router_bias,
        .choice_bias = layer->choice_bias,
        .expert_begin = d->shape.share->expert_begin,
        .num_experts_local = d->shape.share->num_experts_local,
    };
    return CHECK(launch_route(d->experts.chosen, d->experts.weight, d->experts.shared_factor, d->buffer[BUFFER_ROUTER],
                              router, d->count, d->stream),
                 "the router");
}

// What the chosen experts of rows [begin, begin + count) put out, slot by slot.
static int run_experts(struct device *d, const struct mlp *mlp, const struct device_expert *table, int64_t begin,
                       int64_t count, struct error *err)
{
    struct expert_work *e = &d->experts;
    int64_t per_token = d->shape.desc->experts.experts_per_token, local = d->shape.share->num_experts_local;
    int64_t num_slots = count * per_token, step = sizeof *table / sizeof table->gate_up;
    const int32_t *chosen = e->chosen + begin * per_token;
    struct device_input in = {(uint16_t *)d->input.values + begin * d->input.stride, d->input.scale + begin,
                              d->input.stride};
    struct device_slots slots = e->slots;
    slots.tile_tokens = num_slots > local * EXPERT_TILE_FEW ? EXPERT_TILE_MANY : EXPERT_TILE_FEW;
    slots.num_tiles = expert_tiles(num_slots, local, slots.tile_tokens);
    int rc;
    if ((rc = CHECK(launch_list_slots(slots, chosen, num_slots, local, d->stream), "listing experts")) ||
        (rc = CHECK(launch_linear_experts(e->gate_up, &mlp->gate_up.shape, in, (int)per_token, &table->gate_up, step,
                                          slots, d->stream),
                    "the experts' products")) ||
        (rc = CHECK(launch_activate_slots(e->input, multiply_widening_input(mlp->down.shape.kind),
                                          d->shape.desc->activation, d->shape.desc->mlp_rotation, e->gate_up, chosen,
                                          table, num_slots, (int64_t)mlp->down.shape.cols, d->stream),
                    "the experts' activation")))
        return rc;
    return CHECK(launch_linear_experts(e->out, &mlp->down.shape, e->input, 1, &table->down, step, slots, d->stream),
                 "the experts' products");
}

int step_experts(struct device *d, int64_t layer_index, struct error *err)
{
    const struct layer *layer = &d->weights->layers[layer_index];
    const struct model_desc *desc = d->shape.desc;
    const struct rank_share *share = d->shape.share;
    const struct device_expert *table = d->experts.table + layer_index * share->num_experts_local;
    int64_t hidden = desc->hidden_size, per_token = desc->experts.experts_per_token;
    bool any = share->num_experts_local > 0 && share->expert_size_local > 0;
    bool shared = desc->experts.shared_size > 0;
    if (any) {
        if (d->source.rows != d->normed) // the shared expert has had its own input since
            d->source = (struct step_input){d->normed, layer->gate_up_order, hidden, INPUT_F32};
        int rc = step_prepare(d, multiply_widening_input(layer->experts[0].gate_up.shape.kind), err);
        if (rc)
            return rc;
    }
    for (int64_t begin = 0, count; begin < d->count; begin += count) {
        count = d->count - begin < EXPERTS_ROWS ? d->count - begin : EXPERTS_ROWS;
        int rc = any ? run_experts(d, &layer->experts[0], table, begin, count, err) : 0;
        if (rc || (rc = CHECK(launch_combine(d->buffer[BUFFER_PARTIAL] + begin * hidden, shared,
                                             desc->experts.shared_gate ? d->experts.shared_factor + begin : NULL,
                                             d->experts.out, d->experts.chosen + begin * per_token,
                                             d->experts.weight + begin * per_token, table, share->expert_mlp_begin == 0,
                                             any ? per_token : 0, count, hidden, d->stream),
                              "the sum of experts")))
            return rc;
    }
    return 0;
}
