// Errors of the residual stream, layer by layer. See eval_layers.h.
#include "engine/eval_layers.h"

#include "formats/rotation.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

int64_t eval_layers_room(const struct model_desc *model, int64_t most)
{
    enum { ROOM_BYTES = 64 << 20 };
    int64_t row_bytes = (model->num_layers + 1) * model->hidden_size * (int64_t)sizeof(float);
    int64_t room = ROOM_BYTES / row_bytes;
    return room < 1 ? 1 : room > most ? most : room;
}

int eval_layers_open(struct eval_layers *out, const struct manifest *model, const struct manifest *reference,
                     int64_t room, int threads, struct error *err)
{
    int64_t stages = model->model.num_layers + 1, hidden = model->model.hidden_size;
    struct eval_layers layers = {.stages = stages, .hidden_size = hidden, .room = room};
    int rc;
    if (model->quant.rotation != reference->quant.rotation) {
        layers.rotation[0] = model->quant.rotation;
        layers.rotation[1] = reference->quant.rotation;
        if ((rc = kernels_select(&layers.kernels, "auto", err)))
            return rc;
        if (!(layers.turned = malloc((size_t)(threads * 2 * hidden) * sizeof *layers.turned)))
            goto no_memory;
    }
    if (!(layers.sum = calloc((size_t)(2 * stages + room * stages), sizeof *layers.sum)))
        goto no_memory;
    layers.largest = layers.sum + stages;
    layers.errors = layers.largest + stages;
    *out = layers;
    return 0;
no_memory:
    eval_layers_close(&layers);
    return error_set(err, ERR_MEMORY, "no memory for the errors of %lld layers", (long long)stages - 1);
}

void eval_layers_close(struct eval_layers *layers)
{
    free(layers->sum);
    free(layers->turned);
    *layers = (struct eval_layers){0};
}

struct comparison {
    const struct eval_layers *layers;
    const float *q, *p;
    int64_t first;
};

static double relative_error(const float *q, const float *p, int64_t count)
{
    double squares = 0, off = 0;
    for (int64_t i = 0; i < count; i++) {
        double difference = (double)q[i] - p[i];
        squares += (double)p[i] * p[i];
        off += difference * difference;
    }
    return off == 0 ? 0 : sqrt(off / squares);
}

// The row as it was before the rotation, in `room` where there was one.
static const float *turn_back(const struct eval_layers *l, const float *row, int64_t block, float *room)
{
    if (block == 0)
        return row;
    memcpy(room, row, (size_t)l->hidden_size * sizeof *row);
    l->kernels->hadamard(room, l->hidden_size, block);
    for (int64_t i = 0; i < l->hidden_size; i++)
        room[i] *= rotation_sign((uint64_t)i);
    return room;
}

static void compare_row(void *arg, int64_t row, int thread)
{
    const struct comparison *c = arg;
    const struct eval_layers *l = c->layers;
    float *room = l->turned ? l->turned + 2 * thread * l->hidden_size : NULL;
    for (int64_t stage = 0; stage < l->stages; stage++) {
        int64_t at = (stage * l->room + c->first + row) * l->hidden_size;
        const float *q = turn_back(l, c->q + at, l->rotation[0], room);
        const float *p = turn_back(l, c->p + at, l->rotation[1], room ? room + l->hidden_size : NULL);
        l->errors[row * l->stages + stage] = relative_error(q, p, l->hidden_size);
    }
}

void eval_layers_add(struct eval_layers *l, const float *q, const float *p, int64_t first, int64_t count,
                     struct thread_pool *pool)
{
    struct comparison comparison = {.layers = l, .q = q, .p = p, .first = first};
    thread_pool_run(pool, compare_row, &comparison, count);
    for (int64_t row = 0; row < count; row++)
        for (int64_t stage = 0; stage < l->stages; stage++) {
            double error = l->errors[row * l->stages + stage];
            l->sum[stage] += error;
            if (!(error <= l->largest[stage])) // NaN, too
                l->largest[stage] = error;
        }
    l->tokens += count;
}

double eval_layers_mean(const struct eval_layers *l, int64_t stage) { return l->sum[stage] / (double)l->tokens; }
