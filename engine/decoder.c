// The decoder, phase by phase: embed, then per layer attention and mlp, then the head. See decoder.h.
//
// The residual stream is the same on every rank. Each block ends in a partial sum that the ranks exchange; the next norm adds it to the
// residual.
#include "engine/decoder.h"

// The sum over ranks of a buffer's rows, in place. One rank alone has it already.
static int exchange(struct decoder *d, enum buffer buffer, enum wire wire, struct error *err)
{
    const struct backend *b = d->backend;
    int64_t hidden = d->model->desc.hidden_size;
    float *rows;
    int rc;
    if (comm_size(d->comm) == 1)
        return 0;
    if ((rc = b->lend(d->device, buffer, &rows, err)) ||
        (rc = comm_all_reduce(d->comm, rows, d->count, hidden, hidden, wire, d->pool, err)))
        return rc;
    return b->returned(d->device, buffer, err);
}

static int attention_block(struct decoder *d, int64_t i, struct error *err)
{
    const struct backend *b = d->backend;
    const struct layer *layer = &d->model->weights.layers[i];
    const float *earlier_bias = i > 0 ? layer[-1].down_bias : NULL;
    int rc;
    comm_at(d->comm, OP_ATTENTION, (int)i);
    if ((rc = b->norm(d->device, i > 0, earlier_bias, layer->attention_norm, &layer->qkv, err)) ||
        (rc = b->linear(d->device, BUFFER_QKV, &layer->qkv, err)) || (rc = b->finish_qkv(d->device, i, err)) ||
        (rc = b->attend(d->device, i, &layer->o, err)) || (rc = b->linear(d->device, BUFFER_PARTIAL, &layer->o, err)))
        return rc;
    return exchange(d, BUFFER_PARTIAL, d->wire, err);
}

static int mlp_block(struct decoder *d, int64_t i, struct error *err)
{
    const struct backend *b = d->backend;
    const struct layer *layer = &d->model->weights.layers[i];
    int rc;
    comm_at(d->comm, OP_MLP, (int)i);
    if ((rc = b->norm(d->device, true, layer->o_bias, layer->mlp_norm, &layer->gate_up, err)) ||
        (rc = b->linear(d->device, BUFFER_GATE_UP, &layer->gate_up, err)) ||
        (rc = b->activate(d->device, layer->gate_up_bias, &layer->down, err)) ||
        (rc = b->linear(d->device, BUFFER_PARTIAL, &layer->down, err)))
        return rc;
    return exchange(d, BUFFER_PARTIAL, d->wire, err);
}

// From the tokens to the residual and the last partial sum, which logits adds.
static int run_layers(struct decoder *d, struct error *err)
{
    int rc;
    comm_at(d->comm, OP_EMBED, -1);
    // Each rank holds some rows of the embedding, rounded to bf16; the others add zeros, so the sum over a bf16 wire is exact.
    if ((rc = d->backend->embed(d->device, err)) || (rc = exchange(d, BUFFER_RESIDUAL, WIRE_BF16, err)))
        return rc;
    for (int64_t i = 0; i < d->model->desc.num_layers; i++)
        if ((rc = attention_block(d, i, err)) || (rc = mlp_block(d, i, err)))
            return rc;
    return 0;
}

static const float *last_bias(const struct decoder *d)
{
    return d->model->weights.layers[d->model->desc.num_layers - 1].down_bias;
}

int decoder_forward(struct decoder *d, const struct token_row *rows, int64_t count, enum phase phase,
                    const struct kv_pages *pages, struct error *err)
{
    int rc = d->backend->begin(d->device, rows, count, phase, pages, err);
    d->count = count;
    return rc ? rc : run_layers(d, err);
}

int decoder_logits(struct decoder *d, const int64_t *row_index, int64_t count, float *logits, int64_t stride,
                   struct error *err)
{
    comm_at(d->comm, OP_HEAD, -1);
    for (int64_t i = 0; i < count; i++) {
        int64_t row = row_index ? row_index[i] : i;
        if (row < 0 || row >= d->count)
            return error_set(err, ERR_OTHER, "logits of row %lld were asked for after a step of %lld rows",
                             (long long)row, (long long)d->count);
    }
    return d->backend->logits(d->device, last_bias(d), row_index, count, logits, stride, err);
}

bool decoder_samples(const struct decoder *d) { return d->backend->sample && comm_size(d->comm) == 1; }

int decoder_sample(struct decoder *d, const struct token_row *rows, int64_t num_rows, enum phase phase,
                   const struct kv_pages *pages, const struct sampling *const *sampling, const uint64_t *steps,
                   int64_t count, uint32_t *tokens, struct error *err)
{
    const struct backend *b = d->backend;
    int64_t last = num_rows - 1;
    bool replayed = false;
    int rc;
    d->count = num_rows;
    if ((rc = b->begin(d->device, rows, num_rows, phase, pages, err)) ||
        (rc = b->sampling(d->device, sampling, steps, rows + num_rows - count, count, err)))
        return rc;
    if (phase == PHASE_DECODE && (rc = b->record(d->device, &replayed, err)))
        return rc;
    if (!replayed && ((rc = run_layers(d, err)) ||
                      (rc = b->logits(d->device, last_bias(d), count < num_rows ? &last : NULL, count, NULL, 0, err)) ||
                      (rc = b->sample(d->device, err)) || (rc = b->finish(d->device, err))))
        return rc;
    comm_at(d->comm, OP_SAMPLE, -1); // a replayed step has said nothing of itself so far
    return b->tokens(d->device, tokens, count, err);
}
