// See decoder_stage.h. Over f32, so that nothing is lost; with a compressing wire, what its sums have lost so far goes along.
#include "engine/decoder_stage.h"

#include "engine/decoder_parts.h"
#include "engine/sum_check.h"
#include "kernels/clock.h"

static bool has_losses(const struct decoder *d) { return d->feedback && wire_is_compressed(decoder_wire(d, d->phase)); }

static int carry(struct decoder *d, bool takes, int other, void *data, size_t bytes, struct error *err)
{
    return takes ? comm_receive(d->world, data, bytes, other, err) : comm_send(d->world, data, bytes, other, err);
}

// Whoever adds up has them: the hosts, or the devices.
static int hand_over_losses(struct decoder *d, bool takes, int other, struct error *err)
{
    size_t elems = (size_t)(d->count * d->model->desc.hidden_size);
    bool on_device = decoder_devices_exchange(d);
    uint16_t *lost = d->lost;
    int rc;
    if (!has_losses(d))
        return 0;
    if ((rc = on_device ? d->backend->lend_lost(d->device, takes, &lost, err) : 0) ||
        (rc = carry(d, takes, other, lost, elems * sizeof *lost, err)) || !takes || !on_device)
        return rc;
    if ((rc = d->checked ? sum_check_take_losses(d->check, lost, (int64_t)elems, err) : 0))
        return rc;
    return d->backend->returned_lost(d->device, err);
}

// From or to the rank of this one's number in another stage, which is `other` of the world.
static int hand_over(struct decoder *d, bool takes, int other, struct error *err)
{
    size_t elems = (size_t)(d->count * d->model->desc.hidden_size);
    int64_t begin_ns;
    float *rows;
    int rc = d->backend->lend(d->device, BUFFER_RESIDUAL, takes, &rows, err);
    if (rc)
        return rc;
    begin_ns = clock_now_ns();
    if ((rc = carry(d, takes, other, rows, elems * sizeof *rows, err)) ||
        (rc = takes ? d->backend->returned(d->device, BUFFER_RESIDUAL, err) : 0) ||
        (rc = hand_over_losses(d, takes, other, err)))
        return rc;
    d->stage_wait_ns += clock_now_ns() - begin_ns;
    return 0;
}

int decoder_stage_take(struct decoder *d, struct error *err)
{
    comm_at(d->world, OP_HAND_OVER, -1);
    return hand_over(d, true, comm_rank(d->world) - comm_size(d->comm), err);
}

int decoder_stage_pass_on(struct decoder *d, struct error *err)
{
    const struct join *last = &d->model->weights.layers[d->model->desc.num_layers - 1].mlp_join;
    const struct matrix *any = block_at(d->model, 0).first; // the input that norm makes is nobody's
    int rc;
    comm_at(d->world, OP_HAND_OVER, -1);
    if ((rc = parts_gather(d, NULL, d->count, err)) || // each rank sends all rows
        (rc = d->backend->norm(d->device, last, NULL, NULL, any, err)))
        return rc;
    return hand_over(d, false, comm_rank(d->world) + comm_size(d->comm), err);
}
