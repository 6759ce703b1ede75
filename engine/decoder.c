// The decoder, phase by phase: embed, then per layer attention and mlp, then the head. See decoder.h.
//
// Shapes of a step with n rows on one rank (q = num_heads_local * head_dim, kv = num_kv_heads_local * head_dim):
//   residual [n][hidden]    the stream; the same bits on every rank
//   qkv      [n][q + 2 kv]  this rank's heads
//   attended [n][q]
//   gate_up  [n][2 * intermediate_local]
//   partial  [n][hidden]    this rank's part of a sum; all-reduced, then added to the residual
#include "engine/decoder.h"

#include "formats/checked.h"
#include "formats/number_formats.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

struct decoder {
    const struct model *model;
    const struct kernels *k;
    struct thread_pool *pool;
    struct comm *comm;
    struct kv_cache *cache;
    enum wire wire;
    int64_t max_rows, max_context;
    int64_t q_size, kv_size, mlp_size;

    const struct token_row *rows; // of the step under way
    int64_t count;
    int64_t layer;

    float *residual, *normed, *qkv, *attended, *gate_up, *partial;
    float *cosines, *sines; // [max_rows][head_dim / 2]
    float *scores;          // [threads][max_context]
    struct activations act;
};

// ---- memory ----------------------------------------------------------------------------------------------------

static int64_t largest(int64_t a, int64_t b) { return a > b ? a : b; }

// Columns of the widest matmul input on this rank.
static int64_t widest_input(const struct model_desc *desc, const struct rank_share *share)
{
    return largest(desc->hidden_size, largest(share->num_heads_local * desc->head_dim, share->intermediate_local));
}

// Floats that a decoder keeps for one row.
static uint64_t row_floats(const struct model_desc *desc, const struct rank_share *share)
{
    uint64_t q = (uint64_t)(share->num_heads_local * desc->head_dim),
             kv = (uint64_t)(share->num_kv_heads_local * desc->head_dim);
    return 3 * (uint64_t)desc->hidden_size + 2 * q + 2 * kv + 2 * (uint64_t)share->intermediate_local +
           (uint64_t)desc->head_dim;
}

uint64_t decoder_bytes(const struct model_desc *desc, const struct rank_share *share, int64_t max_rows,
                       int64_t max_context, int threads)
{
    uint64_t activations = round_up((uint64_t)widest_input(desc, share), ACT_GROUP) * 6;
    return (uint64_t)max_rows * (row_floats(desc, share) * sizeof(float) + activations) +
           (uint64_t)threads * (uint64_t)max_context * sizeof(float);
}

static float *floats(int64_t count) { return calloc((size_t)(count > 0 ? count : 1), sizeof(float)); }

int decoder_create(struct decoder **out, const struct model *model, const struct kernels *kernels,
                   struct thread_pool *pool, struct comm *comm, struct kv_cache *cache, enum wire wire,
                   int64_t max_rows, int64_t max_context, struct error *err)
{
    const struct model_desc *desc = &model->desc;
    struct decoder *d = calloc(1, sizeof *d);
    if (!d)
        return error_set(err, ERR_MEMORY, "no memory for the decoder");
    int rc;
    d->model = model;
    d->k = kernels;
    d->pool = pool;
    d->comm = comm;
    d->cache = cache;
    d->wire = wire;
    d->max_rows = max_rows;
    d->max_context = max_context;
    d->q_size = model->share.num_heads_local * desc->head_dim;
    d->kv_size = model->share.num_kv_heads_local * desc->head_dim;
    d->mlp_size = model->share.intermediate_local;
    d->residual = floats(max_rows * desc->hidden_size);
    d->normed = floats(max_rows * desc->hidden_size);
    d->partial = floats(max_rows * desc->hidden_size);
    d->qkv = floats(max_rows * (d->q_size + 2 * d->kv_size));
    d->attended = floats(max_rows * d->q_size);
    d->gate_up = floats(max_rows * 2 * d->mlp_size);
    d->cosines = floats(max_rows * (desc->head_dim / 2));
    d->sines = floats(max_rows * (desc->head_dim / 2));
    d->scores = floats(thread_pool_size(pool) * max_context);
    if (!d->residual || !d->normed || !d->partial || !d->qkv || !d->attended || !d->gate_up || !d->cosines ||
        !d->sines || !d->scores) {
        rc = error_set(err, ERR_MEMORY, "no memory for the buffers of %lld rows", (long long)max_rows);
        goto fail;
    }
    if ((rc = activations_alloc(&d->act, max_rows, widest_input(desc, &model->share), err)))
        goto fail;
    *out = d;
    return 0;
fail:
    decoder_free(d);
    return rc;
}

void decoder_free(struct decoder *d)
{
    if (!d)
        return;
    free(d->residual);
    free(d->normed);
    free(d->partial);
    free(d->qkv);
    free(d->attended);
    free(d->gate_up);
    free(d->cosines);
    free(d->sines);
    free(d->scores);
    activations_free(&d->act);
    free(d);
}

// ---- matrix products -------------------------------------------------------------------------------------------

struct product {
    struct decoder *d;
    const struct matrix *w;
    const float *x;
    int64_t x_stride;
    float *y;
    int64_t y_stride;
    int64_t tokens, rows_per_task;
};

static void prepare_token(void *arg, int64_t task, int thread)
{
    (void)thread;
    struct product *p = arg;
    p->d->k->prepare(&p->d->act, p->w, p->x, p->x_stride, task, task + 1);
}

static void product_rows(void *arg, int64_t task, int thread)
{
    (void)thread;
    struct product *p = arg;
    int64_t begin = task * p->rows_per_task, end = begin + p->rows_per_task, rows = (int64_t)p->w->shape.rows;
    p->d->k->matmul(p->y, p->y_stride, p->w, &p->d->act, p->tokens, begin, end < rows ? end : rows);
}

// y[tokens][w.rows] = x[tokens][w.cols] * w^T, rows of w dealt to the threads.
static void multiply(struct decoder *d, float *y, int64_t y_stride, const struct matrix *w, const float *x,
                     int64_t x_stride, int64_t tokens)
{
    int64_t blocks = (int64_t)div_up(w->shape.rows, WEIGHT_ROW_UNIT);
    int64_t wanted_tasks = 4 * (int64_t)thread_pool_size(d->pool); // enough to even out a disturbed thread
    int64_t blocks_per_task = largest(1, blocks / wanted_tasks);
    struct product p = {d, w, x, x_stride, y, y_stride, tokens, blocks_per_task * WEIGHT_ROW_UNIT};
    thread_pool_run(d->pool, prepare_token, &p, tokens);
    thread_pool_run(d->pool, product_rows, &p, (int64_t)div_up((uint64_t)blocks, (uint64_t)blocks_per_task));
}

// ---- steps over rows -------------------------------------------------------------------------------------------

struct norm_job {
    struct decoder *d;
    const float *weight;
};

static void norm_row(void *arg, int64_t row, int thread)
{
    (void)thread;
    struct norm_job *job = arg;
    struct decoder *d = job->d;
    int64_t hidden = d->model->desc.hidden_size;
    d->k->rms_norm(d->normed + row * hidden, d->residual + row * hidden, job->weight, hidden,
                   (float)d->model->desc.norm_eps);
}

static void normalise(struct decoder *d, const float *weight)
{
    struct norm_job job = {d, weight};
    thread_pool_run(d->pool, norm_row, &job, d->count);
}

static void rope_row(void *arg, int64_t row, int thread)
{
    (void)thread;
    struct decoder *d = arg;
    int64_t half = d->model->desc.head_dim / 2;
    d->k->rope_table(d->cosines + row * half, d->sines + row * half, d->model->inv_freq, half, d->rows[row].position,
                     (float)d->model->desc.rope_attention_factor);
}

// Bias, q and k norms, rotation, and the new position's place in the KV cache.
static void finish_qkv_row(void *arg, int64_t row, int thread)
{
    (void)thread;
    struct decoder *d = arg;
    const struct model_desc *desc = &d->model->desc;
    const struct layer *layer = &d->model->layers[d->layer];
    int64_t head_dim = desc->head_dim, half = head_dim / 2;
    float *q = d->qkv + row * (d->q_size + 2 * d->kv_size), *k = q + d->q_size, *v = k + d->kv_size;
    if (layer->qkv_bias)
        d->k->add(q, layer->qkv_bias, d->q_size + 2 * d->kv_size);
    for (float *head = q; head < v; head += head_dim) {
        const float *norm = head < k ? layer->q_norm : layer->k_norm;
        if (norm)
            d->k->rms_norm(head, head, norm, head_dim, (float)desc->norm_eps);
        d->k->rope(head, d->cosines + row * half, d->sines + row * half, head_dim);
    }
    kv_cache_store(d->cache, d->layer, d->rows[row].sequence, d->rows[row].position, k, v);
}

// One task is one row and one query head.
static void attend(void *arg, int64_t task, int thread)
{
    struct decoder *d = arg;
    const struct model_desc *desc = &d->model->desc;
    const struct rank_share *share = &d->model->share;
    int64_t row = task / share->num_heads_local, head = task % share->num_heads_local;
    int64_t kv_head = (share->head_begin + head) / (desc->num_heads / desc->num_kv_heads) - share->kv_head_begin;
    int64_t end = d->rows[row].position + 1;
    int64_t first = desc->sliding_window > 0 && end > desc->sliding_window ? end - desc->sliding_window : 0;
    struct kv_view kv = kv_cache_view(d->cache, d->layer, d->rows[row].sequence);
    d->k->attention(d->attended + row * d->q_size + head * desc->head_dim,
                    d->qkv + row * (d->q_size + 2 * d->kv_size) + head * desc->head_dim, &kv, kv_head, first, end,
                    1.0f / sqrtf((float)desc->head_dim), d->scores + thread * d->max_context);
}

// partial becomes the sum over ranks; bias is added once; the residual takes it.
static int reduce_into_residual(struct decoder *d, const float *bias, struct error *err)
{
    int64_t hidden = d->model->desc.hidden_size;
    int rc = comm_all_reduce(d->comm, d->partial, d->count, hidden, hidden, d->wire, d->pool, err);
    if (rc)
        return rc;
    for (int64_t row = 0; row < d->count; row++) {
        if (bias)
            d->k->add(d->partial + row * hidden, bias, hidden);
        d->k->add(d->residual + row * hidden, d->partial + row * hidden, hidden);
    }
    return 0;
}

// ---- the layers ------------------------------------------------------------------------------------------------

static int attention_block(struct decoder *d, struct error *err)
{
    const struct layer *layer = &d->model->layers[d->layer];
    int64_t hidden = d->model->desc.hidden_size;
    comm_at(d->comm, OP_ATTENTION, (int)d->layer);
    normalise(d, layer->attention_norm);
    multiply(d, d->qkv, d->q_size + 2 * d->kv_size, &layer->qkv, d->normed, hidden, d->count);
    thread_pool_run(d->pool, finish_qkv_row, d, d->count);
    thread_pool_run(d->pool, attend, d, d->count * d->model->share.num_heads_local);
    multiply(d, d->partial, hidden, &layer->o, d->attended, d->q_size, d->count);
    return reduce_into_residual(d, layer->o_bias, err);
}

static void activate_row(void *arg, int64_t row, int thread)
{
    (void)thread;
    struct decoder *d = arg;
    const struct layer *layer = &d->model->layers[d->layer];
    float *gate = d->gate_up + row * 2 * d->mlp_size;
    if (layer->gate_up_bias)
        d->k->add(gate, layer->gate_up_bias, 2 * d->mlp_size);
    d->k->silu_mul(gate, gate, gate + d->mlp_size, d->mlp_size);
}

static int mlp_block(struct decoder *d, struct error *err)
{
    const struct layer *layer = &d->model->layers[d->layer];
    int64_t hidden = d->model->desc.hidden_size;
    comm_at(d->comm, OP_MLP, (int)d->layer);
    normalise(d, layer->mlp_norm);
    multiply(d, d->gate_up, 2 * d->mlp_size, &layer->gate_up, d->normed, hidden, d->count);
    thread_pool_run(d->pool, activate_row, d, d->count);
    multiply(d, d->partial, hidden, &layer->down, d->gate_up, 2 * d->mlp_size, d->count);
    return reduce_into_residual(d, layer->down_bias, err);
}

// Each rank holds some rows of the embedding; the others add zeros, so the sum over a bf16 wire is exact. The row is rounded
// to bfloat16 first, at every tp_size, so that the residual starts with the same bits whatever the split.
static int embed(struct decoder *d, struct error *err)
{
    const struct rank_share *share = &d->model->share;
    int64_t hidden = d->model->desc.hidden_size;
    comm_at(d->comm, OP_EMBED, -1);
    for (int64_t row = 0; row < d->count; row++) {
        float *x = d->residual + row * hidden;
        int64_t local = (int64_t)d->rows[row].token - share->vocab_begin;
        memset(x, 0, (size_t)hidden * sizeof *x);
        if (local < 0 || local >= share->vocab_local)
            continue;
        d->k->dequantize_row(x, &d->model->embedding, local);
        for (int64_t i = 0; i < hidden; i++)
            x[i] = bf16_to_f32(f32_to_bf16(x[i])) + 0.0f; // a sum of ranks has no -0.0
    }
    return comm_all_reduce(d->comm, d->residual, d->count, hidden, hidden, WIRE_BF16, d->pool, err);
}

int decoder_forward(struct decoder *d, const struct token_row *rows, int64_t count, struct error *err)
{
    d->rows = rows;
    d->count = count;
    int rc = embed(d, err);
    if (rc)
        return rc;
    thread_pool_run(d->pool, rope_row, d, count);
    for (d->layer = 0; d->layer < d->model->desc.num_layers; d->layer++)
        if ((rc = attention_block(d, err)) || (rc = mlp_block(d, err)))
            return rc;
    return 0;
}

int decoder_logits(struct decoder *d, const int64_t *row_index, int64_t count, float *logits, int64_t stride,
                   struct error *err)
{
    int64_t hidden = d->model->desc.hidden_size;
    comm_at(d->comm, OP_HEAD, -1);
    for (int64_t i = 0; i < count; i++) {
        int64_t row = row_index ? row_index[i] : i;
        if (row < 0 || row >= d->count || i >= d->max_rows)
            return error_set(err, ERR_OTHER, "logits of row %lld were asked for after a step of %lld rows",
                             (long long)row, (long long)d->count);
        d->k->rms_norm(d->normed + i * hidden, d->residual + row * hidden, d->model->final_norm, hidden,
                       (float)d->model->desc.norm_eps);
    }
    multiply(d, logits, stride, &d->model->head, d->normed, hidden, count);
    return 0;
}
