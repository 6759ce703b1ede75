// What joins the residual joins it in the next block's norm: the stream is looked at behind the norm of each layer, and of the head. See
// residual_tap.h.
#include "engine/residual_tap.h"

#include <string.h>

static int show(struct residual_tap *tap, struct decoder *d, int64_t stage, struct error *err)
{
    size_t hidden = (size_t)d->model->desc.hidden_size;
    float *rows;
    int rc;
    if (d->count > tap->room - tap->at)
        return error_set(err, ERR_OTHER, "the residual stream of %lld rows does not fit where %lld have room",
                         (long long)(tap->at + d->count), (long long)tap->room);
    if ((rc = d->backend->lend(d->device, BUFFER_RESIDUAL, false, &rows, err)))
        return rc;
    memcpy(tap->rows + (size_t)(stage * tap->room + tap->at) * hidden, rows, (size_t)d->count * hidden * sizeof *rows);
    return d->backend->returned(d->device, BUFFER_RESIDUAL, err);
}

static int on_input(void *arg, struct decoder *d, enum calibration_input input, int64_t layer, struct error *err)
{
    struct residual_tap *tap = arg;
    const struct model *model = d->model;
    if (input == CALIBRATION_ATTENTION) {
        if (layer == 0) {
            tap->at = tap->next;
            tap->next += d->count;
        }
        return show(tap, d, model->layer_begin + layer, err);
    }
    if (input != CALIBRATION_HEAD)
        return 0;
    return show(tap, d, model->layer_begin + model->desc.num_layers, err);
}

void residual_tap_init(struct residual_tap *tap, float *rows, int64_t room)
{
    *tap = (struct residual_tap){.watch = {.input = on_input, .arg = tap}, .rows = rows, .room = room};
}
