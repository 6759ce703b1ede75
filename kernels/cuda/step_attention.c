// Attention's part of a step: norms and rotation of queries and keys, the cache, the heads; plain or over latent rows. See device.h.
#include "kernels/cuda/device.h"

#include "kernels/buffers.h"
#include "kernels/kv.h"

static struct device_kv kv_of(const struct device *d, int64_t layer)
{
    const struct device_shape *s = &d->shape;
    struct kv_shape shape = kv_shape(s->desc, s->share);
    uint64_t keys_bytes = kv_keys_bytes(&shape, s->num_pages, s->kv_format);
    uint64_t scales_bytes = kv_scales_bytes(&shape, s->num_pages, s->kv_format);
    uint8_t *k = d->kv + kv_layer_bytes(&shape, s->num_pages, s->kv_format) * (uint64_t)layer;
    uint16_t *scales = kv_format_scaled(s->kv_format) ? (uint16_t *)(void *)(k + 2 * keys_bytes) : NULL;
    return (struct device_kv){.k = k,
                              .v = k + keys_bytes,
                              .format = s->kv_format,
                              .pages = d->pages,
                              .pages_per_sequence = d->pages_per_sequence,
                              .num_kv_heads = shape.heads,
                              .head_dim = shape.k_dim,
                              .k_scale = scales,
                              .v_scale = scales ? scales + scales_bytes / sizeof *scales : NULL};
}

static struct device_rows rows_of(const struct device *d)
{
    return (struct device_rows){d->block.sequence, d->block.position, d->count};
}

static struct device_rotation rotation_of(const struct device *d, const struct layer *layer)
{
    const struct model_desc *desc = d->shape.desc;
    bool local = layer->flags & LAYER_LOCAL_ROPE;
    return (struct device_rotation){
        .inv_freq = layer->flags & LAYER_NO_ROPE ? NULL
                    : local                      ? d->weights->rope_local
                                                 : rope_of(d->weights, &d->shape),
        .factor = local ? 1.0f : (float)desc->rope_attention_factor, // it belongs to the scaling of the first table
        .interleaved = desc->rotary_interleaved,
    };
}

static struct device_latent latent_of(const struct device *d)
{
    const struct latent_desc *latent = &d->shape.desc->latent;
    return (struct device_latent){d->shape.share->num_heads_local, latent->kv_rank, latent->rope_dim, latent->nope_dim,
                                  latent->v_dim};
}

// ---- queries, keys and values ----------------------------------------------------------------------------------

int step_norm_latent(struct device *d, int64_t layer_index, struct error *err)
{
    const struct layer *layer = &d->weights->layers[layer_index];
    const struct model_desc *desc = d->shape.desc;
    enum input_format format = multiply_input(d, &layer->q_b);
    d->source = (struct step_input){.format = format};
    return CHECK(launch_norm(d->input, format, d->buffer[BUFFER_Q_LATENT], (struct device_join){0}, layer->q_a_norm,
                             NULL, d->count, desc->latent.q_rank, (float)model_latent_norm_eps(desc), d->stream),
                 "the queries' latent");
}

// A kv head that several ranks hold is counted by the one that has the first of its query heads.
int step_squares(struct device *d, int64_t layer, struct error *err)
{
    const struct model_desc *desc = d->shape.desc;
    const struct rank_share *share = d->shape.share;
    int64_t per_kv = desc->num_heads / desc->num_kv_heads, q_end = share->num_heads_local * desc->head_dim;
    int64_t first = (share->head_begin + per_kv - 1) / per_kv - share->kv_head_begin,
            end = (share->head_begin + share->num_heads_local + per_kv - 1) / per_kv - share->kv_head_begin;
    return CHECK(launch_squares(d->buffer[BUFFER_SQUARES], d->buffer[BUFFER_QKV], d->weights->layers[layer].qkv_bias,
                                d->count, buffer_width(desc, share, BUFFER_QKV), q_end, q_end + first * desc->head_dim,
                                q_end + end * desc->head_dim, d->stream),
                 "sums of squares");
}

static int finish_latent(struct device *d, int64_t layer_index, struct error *err)
{
    const struct layer *layer = &d->weights->layers[layer_index];
    return CHECK(launch_finish_latent(d->buffer[BUFFER_QKV], d->buffer[BUFFER_KV_LATENT], layer->kv_a_norm,
                                      (float)model_latent_norm_eps(d->shape.desc), rotation_of(d, layer), latent_of(d),
                                      rows_of(d), kv_of(d, layer_index), d->stream),
                 "queries and the latent");
}

int step_finish_qkv(struct device *d, int64_t layer_index, struct error *err)
{
    const struct layer *layer = &d->weights->layers[layer_index];
    const struct model_desc *desc = d->shape.desc;
    if (desc->latent.kv_rank > 0)
        return finish_latent(d, layer_index, err);
    bool full = desc->qk_norm == QK_NORM_FULL; // then squares has added the bias
    struct device_qkv how = {
        .bias = full ? NULL : layer->qkv_bias,
        .q_norm = layer->q_norm,
        .k_norm = layer->k_norm,
        .squares = full ? d->buffer[BUFFER_SQUARES] : NULL,
        .q_width = desc->num_heads * desc->head_dim,
        .k_width = desc->num_kv_heads * desc->head_dim,
        .eps = (float)desc->norm_eps,
        .rotation = rotation_of(d, layer),
        .rotary_dim = desc->rotary_dim,
        .num_heads = d->shape.share->num_heads_local,
    };
    return CHECK(launch_finish_qkv(d->buffer[BUFFER_QKV], how, rows_of(d), kv_of(d, layer_index), d->stream),
                 "queries and keys");
}

// ---- heads -----------------------------------------------------------------------------------------------------

static int attend_plain(struct device *d, struct attention_shape shape, struct device_kv kv, struct error *err)
{
    const float *qkv = d->buffer[BUFFER_QKV];
    int rc =
        CHECK(d->phase == PHASE_PREFILL ? launch_attention_prefill(d->attended, qkv, shape, rows_of(d), kv, d->stream)
                                        : launch_attention_decode(d->attended, qkv, shape, rows_of(d), kv,
                                                                  d->shape.context, d->attention_scratch, d->stream),
              "attention");
    if (rc || !kv.k_scale)
        return rc;
    return CHECK(launch_rotate_heads(d->attended, d->count * shape.num_heads, kv.head_dim, kv_rotate_back(kv.head_dim),
                                     d->stream),
                 "attention's results");
}

static int attend_latent(struct device *d, const struct layer *layer, struct attention_shape shape, struct device_kv kv,
                         struct error *err)
{
    struct device_latent latent = latent_of(d);
    void *scratch = d->phase == PHASE_DECODE ? d->attention_scratch : NULL;
    int64_t q_width = latent.num_heads * d->shape.desc->head_dim, out_width = latent.num_heads * latent.v_dim;
    int rc = 0;
    for (int64_t begin = 0; begin < d->count && !rc; begin += LATENT_ROWS) {
        struct device_rows rows = rows_of(d);
        rows.sequence += begin;
        rows.position += begin;
        rows.count = d->count - begin < LATENT_ROWS ? d->count - begin : LATENT_ROWS;
        if ((rc = CHECK(launch_absorb_queries(d->query, d->buffer[BUFFER_QKV] + begin * q_width, &layer->kv_b, latent,
                                              rows.count, d->stream),
                        "queries of the latent")) ||
            (rc = CHECK(launch_latent_attention(d->mixed, d->query, shape, latent, rows, kv, d->shape.context, scratch,
                                                d->stream),
                        "attention")))
            break;
        rc = CHECK(launch_latent_values(d->attended + begin * out_width, d->mixed, &layer->kv_b, latent, rows.count,
                                        d->stream),
                   "values of the latent");
    }
    return rc;
}

int step_attend(struct device *d, int64_t layer_index, struct error *err)
{
    const struct layer *layer = &d->weights->layers[layer_index];
    const struct model_desc *desc = d->shape.desc;
    const struct rank_share *share = d->shape.share;
    struct device_kv kv = kv_of(d, layer_index);
    struct attention_shape shape = {
        .num_heads = share->num_heads_local,
        .head_begin = share->head_begin,
        .heads_per_kv = desc->num_heads / desc->num_kv_heads,
        .kv_head_begin = share->kv_head_begin,
        .scale = (float)desc->attention_scale,
        .soft_cap = (float)desc->attention_softcap,
        .window = layer->flags & LAYER_WINDOW ? desc->sliding_window : 0,
        .sinks = layer->sinks,
    };
    int rc = desc->latent.kv_rank > 0 ? attend_latent(d, layer, shape, kv, err) : attend_plain(d, shape, kv, err);
    return rc ? rc : step_keep(d, d->attended, NULL, attended_width(desc, share), &layer->o, err);
}
