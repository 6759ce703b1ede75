// See decoder_stage.h. Over f32, so that nothing is lost; with a compressing wire, what its sums have lost so far goes along.
#include "engine/decoder_stage.h"

#include "engine/decoder_parts.h"
#include "engine/sum_check.h"
#include "kernels/clock.h"

static bool has_losses(const struct decoder *d) { return d->feedback && wire_is_compressed(decoder_wire(d, d->phase)); }

// Whoever adds up has them: the hosts, or the devices.
static int take_losses(struct decoder *d, int from, struct error *err)
{
    size_t bytes = (size_t)(d->count * d->model->desc.hidden_size) * sizeof(uint16_t);
    uint16_t *lost = d->lost;
    int rc;
    if (!has_losses(d))
        return 0;
    if (!decoder_devices_exchange(d))
        return comm_receive(d->world, lost, bytes, from, err);
    if ((rc = d->backend->lend_lost(d->device, true, &lost, err)) ||
        (rc = comm_receive(d->world, lost, bytes, from, err)) ||
        (rc = d->checked ? sum_check_take_losses(d->check, lost, (int64_t)(bytes / sizeof *lost), err) : 0))
        return rc;
    return d->backend->returned_lost(d->device, err);
}

static int pass_on_losses(struct decoder *d, int to, struct error *err)
{
    size_t bytes = (size_t)(d->count * d->model->desc.hidden_size) * sizeof(uint16_t);
    uint16_t *lost = d->lost;
    int rc;
    if (!has_losses(d))
        return 0;
    if (decoder_devices_exchange(d) && (rc = d->backend->lend_lost(d->device, false, &lost, err)))
        return rc;
    return comm_send(d->world, lost, bytes, to, err);
}

int decoder_stage_take(struct decoder *d, struct error *err)
{
    int from = comm_rank(d->world) - comm_size(d->comm), rc;
    size_t elems = (size_t)(d->count * d->model->desc.hidden_size);
    int64_t begin_ns = clock_now_ns();
    float *rows;
    comm_at(d->world, OP_HAND_OVER, -1);
    if ((rc = d->backend->lend(d->device, BUFFER_RESIDUAL, &rows, err)) ||
        (rc = comm_receive(d->world, rows, elems * sizeof *rows, from, err)) ||
        (rc = d->backend->returned(d->device, BUFFER_RESIDUAL, err)) || (rc = take_losses(d, from, err)))
        return rc;
    d->stage_wait_ns += clock_now_ns() - begin_ns;
    return 0;
}

int decoder_stage_pass_on(struct decoder *d, struct error *err)
{
    const struct join *last = &d->model->weights.layers[d->model->desc.num_layers - 1].mlp_join;
    const struct matrix *any = block_at(d->model, 0).first; // the input that norm makes is nobody's
    int to = comm_rank(d->world) + comm_size(d->comm), rc;
    size_t elems = (size_t)(d->count * d->model->desc.hidden_size);
    float *rows;
    comm_at(d->world, OP_HAND_OVER, -1);
    if ((rc = parts_gather(d, NULL, d->count, err)) || // each rank sends all rows
        (rc = d->backend->norm(d->device, last, NULL, NULL, any, err)) ||
        (rc = d->backend->lend(d->device, BUFFER_RESIDUAL, &rows, err)))
        return rc;
    int64_t begin_ns = clock_now_ns();
    if ((rc = comm_send(d->world, rows, elems * sizeof *rows, to, err)) ||
        (rc = d->backend->returned(d->device, BUFFER_RESIDUAL, err)) || (rc = pass_on_losses(d, to, err)))
        return rc;
    d->stage_wait_ns += clock_now_ns() - begin_ns;
    return 0;
}
