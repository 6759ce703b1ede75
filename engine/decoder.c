// The decoder, phase by phase: embed, then per layer attention and mlp, then the head. See decoder.h.
//
// While the model is being loaded, each phase first waits for the weights that it reads; to the other ranks and to the watchdog this rank is then
// at its start (OP_LOAD). The operation and layer that exchanges compare are said after that.
//
// Each block ends in a partial sum that the ranks exchange; the next norm adds it to the residual. What a compressing wire loses of one sum is made
// up for in the next one, so that the residual behind the last layer lacks no more than one sum did. decoder_parts.h says how a prompt's rows are
// cut and where their residual lies.
#include "engine/decoder.h"

#include "engine/comm_select.h"
#include "engine/decoder_parts.h"
#include "engine/decoder_stage.h"

#include <string.h>

enum wire decoder_wire(const struct decoder *d, enum phase phase) { return comm_select_wire(phase, d->wire); }

bool decoder_mixes(const struct decoder *d)
{
    return d->backend->mixes_phases && !(d->deals && comm_size(d->comm) > 1) &&
           decoder_wire(d, PHASE_PREFILL) == decoder_wire(d, PHASE_DECODE);
}

// q and k are normed over all heads of all ranks together: their sums of squares are added up in rank order.
static int exchange_squares(struct decoder *d, const struct block *block, struct error *err)
{
    enum { PIECE = 64 }; // rows of one exchange
    const struct backend *b = d->backend;
    int ranks = comm_size(d->comm), rc = b->squares(d->device, block->layer, err);
    float *squares, all[COMM_MAX_RANKS * 2 * PIECE];
    if (rc || ranks == 1 || (rc = part_settle_other(d, err)))
        return rc;
    if (decoder_devices_exchange(d)) // from zeros in rank order: the same numbers, since none of them is -0
        return part_sum_on_device(d, BUFFER_SQUARES, 2, WIRE_F32, block->op, (int)block->layer, err);
    if ((rc = b->lend(d->device, BUFFER_SQUARES, false, &squares, err)))
        return rc;
    for (int64_t row = 0; row < d->part->count; row += PIECE) {
        int64_t values = 2 * (d->part->count - row < PIECE ? d->part->count - row : PIECE);
        struct exchange gather = {.kind = EXCHANGE_GATHER,
                                  .op = block->op,
                                  .layer = (int)block->layer,
                                  .data = squares + 2 * row,
                                  .cols = values,
                                  .all = all};
        if ((rc = part_exchange(d, &gather, err)))
            return rc;
        for (int64_t i = 0; i < values; i++) {
            float sum = all[i];
            for (int rank = 1; rank < ranks; rank++)
                sum += all[rank * values + i];
            squares[2 * row + i] = sum;
        }
    }
    return b->returned(d->device, BUFFER_SQUARES, err);
}

// Between two operations of a part: who watches is told, and the other part's sums may have come.
static int tell(struct decoder *d, enum calibration_input input, int64_t layer, struct error *err)
{
    int rc = d->watch ? d->watch->input(d->watch->arg, d, input, layer, err) : 0;
    return rc ? rc : part_look(d, err);
}

// Queries by way of their latent, where the model has one, and the latent of keys and values.
static int project_latent(struct decoder *d, int64_t i, struct error *err)
{
    const struct backend *b = d->backend;
    const struct layer *layer = &d->model->weights.layers[i];
    int rc;
    if (d->model->desc.latent.q_rank == 0)
        return (rc = b->linear(d->device, BUFFER_QKV, &layer->q_b, err))
                   ? rc
                   : b->linear(d->device, BUFFER_KV_LATENT, &layer->kv_a, err);
    if ((rc = b->linear(d->device, BUFFER_Q_LATENT, &layer->q_a, err)) ||
        (rc = b->linear(d->device, BUFFER_KV_LATENT, &layer->kv_a, err)) || (rc = b->norm_latent(d->device, i, err)) ||
        (rc = tell(d, CALIBRATION_Q_LATENT, i, err)))
        return rc;
    return b->linear(d->device, BUFFER_QKV, &layer->q_b, err);
}

static int need_layer(struct decoder *d, int64_t i, struct error *err)
{
    if (d->model->loaded)
        return 0;
    comm_at(d->comm, OP_LOAD, -1); // before it is loaded, no other thread has the comm
    return model_need_layer(d->model, i, err);
}

// What the rows read before the first layer.
static int need_inputs(struct decoder *d, const struct token_row *rows, int64_t count, struct error *err)
{
    int rc;
    if (d->model->loaded)
        return 0;
    comm_at(d->comm, OP_LOAD, -1);
    return (rc = model_need_rows(d->model, rows, count, err)) ? rc : model_need(d->model, PART_TABLES, err);
}

static int begin_head(struct decoder *d, struct error *err)
{
    int rc = 0;
    if (!d->model->loaded) {
        comm_at(d->comm, OP_LOAD, -1);
        if ((rc = model_need(d->model, PART_FINAL_NORM, err)) == 0)
            rc = model_need(d->model, PART_HEAD, err);
    }
    comm_at(d->comm, OP_HEAD, -1);
    return rc;
}

static int attention_block(struct decoder *d, const struct block *block, struct error *err)
{
    const struct backend *b = d->backend;
    const struct model_desc *desc = &d->model->desc;
    int64_t i = block->layer;
    const struct layer *layer = &d->model->weights.layers[i];
    bool latent = desc->latent.kv_rank > 0;
    int rc;
    if ((rc = part_enter(d, block, err)) || (rc = tell(d, CALIBRATION_ATTENTION, i, err)) ||
        (rc = latent ? project_latent(d, i, err) : b->linear(d->device, BUFFER_QKV, &layer->qkv, err)) ||
        (rc = desc->qk_norm == QK_NORM_FULL ? exchange_squares(d, block, err) : 0) ||
        (rc = b->finish_qkv(d->device, i, err)) || (rc = part_look(d, err)) || (rc = b->attend(d->device, i, err)) ||
        (rc = tell(d, CALIBRATION_O, i, err)) || (rc = b->linear(d->device, BUFFER_PARTIAL, &layer->o, err)))
        return rc;
    return part_leave(d, block, err);
}

static int dense_mlp(struct decoder *d, int64_t i, const struct mlp *mlp, struct error *err)
{
    const struct backend *b = d->backend;
    int rc;
    if ((rc = b->linear(d->device, BUFFER_GATE_UP, &mlp->gate_up, err)) || (rc = part_look(d, err)) ||
        (rc = b->activate(d->device, mlp, err)) || (rc = tell(d, CALIBRATION_DOWN, i, err)))
        return rc;
    return b->linear(d->device, BUFFER_PARTIAL, &mlp->down, err);
}

static int mlp_block(struct decoder *d, const struct block *block, struct error *err)
{
    const struct backend *b = d->backend;
    int64_t i = block->layer;
    const struct layer *layer = &d->model->weights.layers[i];
    bool experts = layer->flags & LAYER_EXPERTS, shared = d->model->desc.experts.shared_size > 0;
    int rc;
    if ((rc = part_enter(d, block, err)) || (rc = tell(d, CALIBRATION_MLP, i, err)) ||
        (rc = experts ? b->linear(d->device, BUFFER_ROUTER, &layer->router, err) : 0) ||
        (rc = experts ? b->route(d->device, i, err) : 0) ||
        (rc = !experts || shared ? dense_mlp(d, i, &layer->mlp, err) : 0) ||
        (rc = experts ? b->experts(d->device, i, err) : 0) ||
        (rc = experts ? tell(d, CALIBRATION_EXPERT_DOWN, i, err) : 0))
        return rc;
    return part_leave(d, block, err);
}

// From the tokens to the residual.
static int begin_residual(struct decoder *d, struct error *err)
{
    const struct model_desc *desc = &d->model->desc;
    int rc;
    comm_at(d->comm, OP_EMBED, -1);
    if (d->lost)
        memset(d->lost, 0, (size_t)(d->count * desc->hidden_size) * sizeof *d->lost);
    // Each rank holds some rows of the embedding, rounded to bf16; the others add zeros, so the sum over a bf16 wire is exact.
    if ((rc = d->backend->embed(d->device, err)) || (rc = part_sum_embedding(d, err)))
        return rc;
    return desc->embedding_scale != 1 ? d->backend->scale_residual(d->device, (float)desc->embedding_scale, err) : 0;
}

// All parts of the step through one block.
static int run_block(struct decoder *d, const struct block *block, struct error *err)
{
    int rc = 0;
    for (int i = 0; i < d->num_parts && !rc; i++) {
        d->part = &d->parts[i];
        rc = block->op == OP_ATTENTION ? attention_block(d, block, err) : mlp_block(d, block, err);
    }
    return rc;
}

static int run_layer(struct decoder *d, int64_t i, struct error *err)
{
    struct block attention = block_at(d->model, 2 * i), mlp = block_at(d->model, 2 * i + 1);
    int rc;
    return (rc = need_layer(d, i, err)) || (rc = run_block(d, &attention, err)) ? rc : run_block(d, &mlp, err);
}

int decoder_layer(struct decoder *d, int64_t i, struct error *err)
{
    int rc = run_layer(d, i, err);
    return parts_settle(d, rc, err);
}

// From the residual to the last layer's residual and partial sum, which logits adds.
static int run_layers(struct decoder *d, struct error *err)
{
    int rc = 0;
    for (int64_t i = 0; !rc && i < d->model->desc.num_layers; i++)
        rc = run_layer(d, i, err);
    return parts_settle(d, rc, err);
}

static const struct join *last_join(const struct decoder *d)
{
    return &d->model->weights.layers[d->model->desc.num_layers - 1].mlp_join;
}

int decoder_begin(struct decoder *d, const struct token_row *rows, int64_t count, enum phase phase,
                  const struct kv_pages *pages, struct error *err)
{
    int rc;
    d->count = count;
    d->phase = phase;
    parts_begin(d, rows);
    return (rc = need_inputs(d, rows, count, err)) ? rc : d->backend->begin(d->device, rows, count, phase, pages, err);
}

static int take_residual(struct decoder *d, struct error *err)
{
    return d->model->stage_before ? decoder_stage_take(d, err) : begin_residual(d, err);
}

int decoder_embed(struct decoder *d, const struct token_row *rows, int64_t count, enum phase phase,
                  const struct kv_pages *pages, struct error *err)
{
    int rc = decoder_begin(d, rows, count, phase, pages, err);
    return rc ? rc : take_residual(d, err);
}

// A decode step of devices that exchange among themselves is kept, and run again as a whole; not over NCCL, which says nothing of
// where a kept step stands.
int decoder_forward(struct decoder *d, const struct token_row *rows, int64_t count, enum phase phase,
                    const struct kv_pages *pages, struct error *err)
{
    bool one_stage = !d->model->stage_before && !d->model->stage_behind, replayed = false;
    int rc = decoder_begin(d, rows, count, phase, pages, err);
    bool kept = phase == PHASE_DECODE && decoder_devices_exchange(d) && d->transport != TRANSPORT_NCCL && one_stage &&
                d->model->loaded && !d->watch && !d->checked;
    if (rc || (kept && (rc = d->backend->record(d->device, &replayed, err))) || replayed)
        return rc;
    if ((rc = take_residual(d, err)) || (rc = run_layers(d, err)) ||
        (kept && (rc = d->backend->finish(d->device, err))))
        return rc;
    return d->model->stage_behind ? decoder_stage_pass_on(d, err) : 0;
}

int decoder_head_input(struct decoder *d, struct error *err)
{
    const struct weights *weights = &d->model->weights;
    int rc = begin_head(d, err);
    if (!rc)
        rc = d->backend->norm(d->device, last_join(d), weights->final_norm, NULL, &weights->head, err);
    return rc ? rc : tell(d, CALIBRATION_HEAD, -1, err);
}

int decoder_logits(struct decoder *d, const int64_t *row_index, int64_t count, float *logits, int64_t stride,
                   struct error *err)
{
    int rc = begin_head(d, err);
    if (rc)
        return rc;
    for (int64_t i = 0; i < count; i++) {
        int64_t row = row_index ? row_index[i] : i;
        if (row < 0 || row >= d->count)
            return error_set(err, ERR_OTHER, "logits of row %lld were asked for after a step of %lld rows",
                             (long long)row, (long long)d->count);
    }
    if ((rc = parts_gather(d, row_index, count, err)))
        return rc;
    return d->backend->logits(d->device, last_join(d), row_index, count, logits, stride, err);
}

bool decoder_samples(const struct decoder *d)
{
    return d->backend->sample && comm_size(d->comm) == 1 && !d->model->stage_before && !d->model->stage_behind;
}

int decoder_sample(struct decoder *d, const struct token_row *rows, int64_t num_rows, enum phase phase,
                   const struct kv_pages *pages, const int64_t *row_index, const struct sampling *const *sampling,
                   const uint64_t *steps, int64_t count, uint32_t *tokens, struct error *err)
{
    const struct backend *b = d->backend;
    bool kept = phase == PHASE_DECODE && !row_index && d->model->loaded, replayed = false;
    int rc;
    d->count = num_rows;
    d->phase = phase;
    parts_begin(d, rows);
    if ((rc = need_inputs(d, rows, num_rows, err)) || (rc = b->begin(d->device, rows, num_rows, phase, pages, err)) ||
        (rc = b->sampling(d->device, sampling, steps, row_index, count, err)) ||
        (kept && (rc = b->record(d->device, &replayed, err))))
        return rc;
    if (!replayed && ((rc = begin_residual(d, err)) || (rc = run_layers(d, err)) || (rc = begin_head(d, err)) ||
                      (rc = b->logits(d->device, last_join(d), row_index, count, NULL, 0, err)) ||
                      (rc = b->sample(d->device, err)) || (rc = b->finish(d->device, err))))
        return rc;
    comm_at(d->comm, OP_SAMPLE, -1); // a replayed step has said nothing of itself so far
    return b->tokens(d->device, tokens, count, err);
}
