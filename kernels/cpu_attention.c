// Norms and rotation of q and k, the KV cache, the heads. See cpu_attention.h.
#include "kernels/cpu_attention.h"

#include "kernels/cpu_device.h"

#include <string.h>

struct attention_job {
    struct device *d;
    int64_t layer;
};

static const struct layer *layer_of(const struct attention_job *job) { return &job->d->weights->layers[job->layer]; }

static struct kv_view view_of(const struct device *d, int64_t layer, int32_t sequence)
{
    const struct device_shape *s = &d->shape;
    const struct kv_shape *kv = &d->kv_shape;
    uint8_t *k = d->kv + (uint64_t)layer * kv_layer_bytes(kv, s->num_pages, s->kv_format);
    uint8_t *v = kv->latent ? k : k + kv_keys_bytes(kv, s->num_pages, s->kv_format);
    return (struct kv_view){.k = k,
                            .v = v,
                            .format = s->kv_format,
                            .pages = d->pages.pages + sequence * d->pages.pages_per_sequence,
                            .num_kv_heads = kv->heads,
                            .k_dim = kv->k_dim,
                            .v_dim = kv->v_dim,
                            .v_stride = kv->k_dim};
}

static float *qkv_of(const struct device *d, int64_t row)
{
    return d->buffers[BUFFER_QKV] + row * (d->q_size + 2 * d->kv_size);
}

// ---- norms and rotation ----------------------------------------------------------------------------------------

// Of a kv head that several ranks hold, the one with its first query head answers for the square.
static double key_squares(const struct device *d, const float *k)
{
    const struct model_desc *desc = d->shape.desc;
    const struct rank_share *share = d->shape.share;
    int64_t per_kv = desc->num_heads / desc->num_kv_heads;
    double sum = 0;
    for (int64_t i = 0; i < share->num_kv_heads_local; i++)
        if ((share->kv_head_begin + i) * per_kv >= share->head_begin)
            sum += d->k->squares(k + i * desc->head_dim, desc->head_dim);
    return sum;
}

static void squares_row(void *arg, int64_t row, int thread)
{
    (void)thread;
    struct attention_job *job = arg;
    struct device *d = job->d;
    float *q = qkv_of(d, row), *squares = d->buffers[BUFFER_SQUARES] + 2 * row;
    if (layer_of(job)->qkv_bias)
        d->k->add(q, layer_of(job)->qkv_bias, d->q_size + 2 * d->kv_size);
    squares[0] = (float)d->k->squares(q, d->q_size);
    squares[1] = (float)key_squares(d, q + d->q_size);
}

int cpu_squares(struct device *d, int64_t layer, struct error *err)
{
    struct attention_job job = {d, layer};
    (void)err;
    thread_pool_run(d->pool, squares_row, &job, d->count);
    return 0;
}

// x: the part of a head that rotates.
static void rotate(const struct attention_job *job, int64_t row, float *x)
{
    struct device *d = job->d;
    const struct model_desc *desc = d->shape.desc;
    unsigned flags = layer_of(job)->flags;
    int table = flags & LAYER_LOCAL_ROPE ? 1 : 0;
    int64_t half = desc->rotary_dim / 2;
    if (!(flags & LAYER_NO_ROPE))
        d->k->rope(x, d->cosines[table] + row * half, d->sines[table] + row * half, desc->rotary_dim,
                   desc->rotary_interleaved);
}

static void norm_qk(const struct attention_job *job, int64_t row, float *q, float *k)
{
    struct device *d = job->d;
    const struct layer *layer = layer_of(job);
    const struct model_desc *desc = d->shape.desc;
    int64_t head_dim = desc->head_dim;
    float eps = (float)desc->norm_eps;
    if (desc->qk_norm == QK_NORM_FULL) {
        const float *squares = d->buffers[BUFFER_SQUARES] + 2 * row;
        d->k->scale_norm(q, q, layer->q_norm, d->q_size, squares[0], desc->num_heads * head_dim, eps);
        d->k->scale_norm(k, k, layer->k_norm, d->kv_size, squares[1], desc->num_kv_heads * head_dim, eps);
    } else if (desc->qk_norm == QK_NORM_HEAD) {
        for (float *head = q; head < k + d->kv_size; head += head_dim)
            d->k->rms_norm(head, head, head < k ? layer->q_norm : layer->k_norm, head_dim, eps);
    }
}

static void finish_qkv_row(void *arg, int64_t row, int thread)
{
    (void)thread;
    struct attention_job *job = arg;
    struct device *d = job->d;
    const struct model_desc *desc = d->shape.desc;
    const struct layer *layer = layer_of(job);
    float *q = qkv_of(d, row), *k = q + d->q_size, *v = k + d->kv_size;
    if (layer->qkv_bias && desc->qk_norm != QK_NORM_FULL)
        d->k->add(q, layer->qkv_bias, d->q_size + 2 * d->kv_size);
    norm_qk(job, row, q, k);
    for (float *head = q; head < v; head += desc->head_dim)
        rotate(job, row, head);
    struct kv_view kv = view_of(d, job->layer, d->rows[row].sequence);
    kv_store(&kv, d->rows[row].position, k, v);
}

static void finish_latent_row(void *arg, int64_t row, int thread)
{
    (void)thread;
    struct attention_job *job = arg;
    struct device *d = job->d;
    const struct model_desc *desc = d->shape.desc;
    const struct latent_desc *latent = &desc->latent;
    float *c = d->buffers[BUFFER_KV_LATENT] + row * (latent->kv_rank + latent->rope_dim), *q = qkv_of(d, row);
    d->k->rms_norm(c, c, layer_of(job)->kv_a_norm, latent->kv_rank, (float)model_latent_norm_eps(desc));
    rotate(job, row, c + latent->kv_rank);
    for (float *head = q; head < q + d->q_size; head += desc->head_dim)
        rotate(job, row, head + latent->nope_dim);
    struct kv_view kv = view_of(d, job->layer, d->rows[row].sequence);
    kv_store(&kv, d->rows[row].position, c, NULL);
}

int cpu_finish_qkv(struct device *d, int64_t layer, struct error *err)
{
    struct attention_job job = {d, layer};
    (void)err;
    thread_pool_run(d->pool, d->kv_shape.latent ? finish_latent_row : finish_qkv_row, &job, d->count);
    return 0;
}

// ---- heads -----------------------------------------------------------------------------------------------------

// The latent's side of a head: with key = K c and value = V c for a cached latent c, q . K c = (K^T q) . c, and the weighted sum of values
// is V times the weighted sum of latents. out[v_dim] (DeepSeek-V2, section 2.1: K and V absorbed).
static void attend_latent(const struct attention_job *job, float *out, const float *q, int64_t head,
                          const struct kv_view *kv, int64_t first, int64_t end, const struct attention_scores *scores,
                          int thread)
{
    struct device *d = job->d;
    const struct latent_desc *latent = &d->shape.desc->latent;
    const struct matrix *w = &layer_of(job)->kv_b;
    int64_t stride = (int64_t)w->shape.cols_padded;
    const uint16_t *keys = (const uint16_t *)w->data + head * (latent->nope_dim + latent->v_dim) * stride;
    float *query = d->latent_rows + thread * (kv->k_dim + kv->v_dim), *mixed = query + kv->k_dim;
    d->k->mix_rows(query, q, keys, stride, latent->nope_dim, latent->kv_rank);
    memcpy(query + latent->kv_rank, q + latent->nope_dim, (size_t)latent->rope_dim * sizeof *query);
    d->k->attention(mixed, query, kv, 0, first, end, scores, d->scores + thread * d->shape.context);
    d->k->dot_rows(out, mixed, keys + latent->nope_dim * stride, stride, latent->v_dim, latent->kv_rank);
}

// One task is one row and one query head.
static void attend_head(void *arg, int64_t task, int thread)
{
    struct attention_job *job = arg;
    struct device *d = job->d;
    const struct layer *layer = layer_of(job);
    const struct model_desc *desc = d->shape.desc;
    const struct rank_share *share = d->shape.share;
    int64_t row = task / share->num_heads_local, head = task % share->num_heads_local;
    int64_t end = d->rows[row].position + 1, window = layer->flags & LAYER_WINDOW ? desc->sliding_window : end;
    int64_t first = end > window ? end - window : 0, width = attended_width(desc, share);
    struct attention_scores scores = {.scale = (float)desc->attention_scale,
                                      .softcap = (float)desc->attention_softcap,
                                      .sink = layer->sinks ? layer->sinks + head : NULL};
    struct kv_view kv = view_of(d, job->layer, d->rows[row].sequence);
    float *out = d->attended + row * width + head * (width / share->num_heads_local);
    const float *q = qkv_of(d, row) + head * desc->head_dim;
    if (d->kv_shape.latent) {
        attend_latent(job, out, q, head, &kv, first, end, &scores, thread);
        return;
    }
    int64_t kv_head = (share->head_begin + head) / (desc->num_heads / desc->num_kv_heads) - share->kv_head_begin;
    d->k->attention(out, q, &kv, kv_head, first, end, &scores, d->scores + thread * d->shape.context);
}

int cpu_attend(struct device *d, int64_t layer, struct error *err)
{
    struct attention_job job = {d, layer};
    (void)err;
    thread_pool_run(d->pool, attend_head, &job, d->count * d->shape.share->num_heads_local);
    cpu_set_input(d, d->attended, attended_width(d->shape.desc, d->shape.share), d->count,
                  &d->weights->layers[layer].o);
    return 0;
}
