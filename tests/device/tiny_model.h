// A model of a few thousand weights in a payload like a rank file's, of whatever description, for tests of a backend; and a step through
// it, operation by operation as engine/decoder.c orders them.
#ifndef TPSHARD_TESTS_DEVICE_TINY_MODEL_H
#define TPSHARD_TESTS_DEVICE_TINY_MODEL_H

#include "tests/device/cuda_test.h"

enum { TINY_LAYERS = 2, TINY_EXPERTS = 8, TINY_BYTES = 4 << 20 };

struct tiny_model {
    struct model_desc desc;
    struct rank_share share;
    struct kind_case qkv, o, gate_up, down, head; // kinds of the matrices
    bool orders;                                  // qkv and gate_up have their columns in an order of their own
    bool fill;                                    // bind writes random weights; otherwise they are left as they are
    struct weights weights;
    struct layer layers[TINY_LAYERS];
    struct mlp experts[TINY_LAYERS][TINY_EXPERTS];
    uint64_t bytes;
    uint8_t payload[TINY_BYTES];
};

static inline uint64_t tiny_place(struct tiny_model *m, uint64_t bytes)
{
    uint64_t at = m->bytes;
    m->bytes += (bytes + 255) / 256 * 256;
    assert_true(m->bytes <= TINY_BYTES);
    return at;
}

static inline void tiny_fill_row(float *x, uint64_t row, uint64_t cols)
{
    (void)row;
    for (uint64_t i = 0; i < cols; i++)
        x[i] = centred() * 2 / sqrtf((float)cols);
}

static inline struct matrix tiny_matrix(struct tiny_model *m, const uint8_t *base, struct kind_case kind, int64_t rows,
                                        int64_t cols)
{
    struct matrix w = {};
    assert_true(weight_shape_make(&w.shape, kind.kind, kind.group_size, (uint64_t)rows, (uint64_t)cols));
    uint64_t data = tiny_place(m, w.shape.data_bytes), scale = tiny_place(m, w.shape.scale_bytes);
    if (m->fill)
        pack_matrix(&w.shape, m->payload + data, m->payload + scale, tiny_fill_row);
    w.data = base + data;
    w.scale = w.shape.scale_bytes ? base + scale : NULL;
    return w;
}

// around + amount * [-1, 1]; NULL unless wanted.
static inline const float *tiny_vector(struct tiny_model *m, const uint8_t *base, bool wanted, int64_t count,
                                       float around, float amount)
{
    if (!wanted)
        return NULL;
    uint64_t at = tiny_place(m, (uint64_t)count * 4);
    for (int64_t i = 0; i < count && m->fill; i++)
        ((float *)(void *)(m->payload + at))[i] = around + amount * centred();
    return (const float *)(const void *)(base + at);
}

static inline const float *tiny_rope(struct tiny_model *m, const uint8_t *base, double theta)
{
    uint64_t at = tiny_place(m, (uint64_t)m->desc.rotary_dim * 2);
    for (int64_t i = 0; i < m->desc.rotary_dim / 2 && m->fill; i++)
        ((float *)(void *)(m->payload + at))[i] = (float)pow(theta, -2.0 * (double)i / (double)m->desc.rotary_dim);
    return (const float *)(const void *)(base + at);
}

static inline const float *tiny_order(struct tiny_model *m, const uint8_t *base)
{
    uint64_t at = tiny_place(m, (uint64_t)m->desc.hidden_size * 4);
    for (int64_t i = 0; i < m->desc.hidden_size && m->fill; i++)
        ((float *)(void *)(m->payload + at))[i] = (float)((i * 5 + 3) % m->desc.hidden_size);
    return m->orders ? (const float *)(const void *)(base + at) : NULL;
}

static inline struct mlp tiny_mlp(struct tiny_model *m, const uint8_t *base, int64_t size, bool bias)
{
    struct mlp mlp = {};
    mlp.gate_up = tiny_matrix(m, base, m->gate_up, 2 * size, m->desc.hidden_size);
    mlp.down = tiny_matrix(m, base, m->down, m->desc.hidden_size, size);
    mlp.gate_up_bias = tiny_vector(m, base, bias, 2 * size, 0, 1);
    mlp.down_bias = tiny_vector(m, base, bias, m->desc.hidden_size, 0, 1);
    return mlp;
}

static inline void tiny_bind_attention(struct tiny_model *m, const uint8_t *base, struct layer *l)
{
    const struct model_desc *desc = &m->desc;
    const struct latent_desc *latent = &desc->latent;
    const struct kind_case bf16 = {WEIGHT_BF16, 0};
    int64_t hidden = desc->hidden_size, heads = m->share.num_heads_local, q = heads * desc->head_dim;
    int64_t kv = m->share.num_kv_heads_local * desc->head_dim;
    bool full = desc->qk_norm == QK_NORM_FULL;
    if (latent->kv_rank > 0) {
        if (latent->q_rank > 0)
            l->q_a = tiny_matrix(m, base, m->qkv, latent->q_rank, hidden);
        l->q_b = tiny_matrix(m, base, m->qkv, q, latent->q_rank > 0 ? latent->q_rank : hidden);
        l->kv_a = tiny_matrix(m, base, m->o, latent->kv_rank + latent->rope_dim, hidden);
        l->kv_b = tiny_matrix(m, base, bf16, heads * (latent->nope_dim + latent->v_dim), latent->kv_rank);
        l->q_a_norm = tiny_vector(m, base, latent->q_rank > 0, latent->q_rank, 1, 0.5f);
        l->kv_a_norm = tiny_vector(m, base, true, latent->kv_rank, 1, 0.5f);
        l->o = tiny_matrix(m, base, m->o, hidden, heads * latent->v_dim);
        return;
    }
    l->qkv = tiny_matrix(m, base, m->qkv, q + 2 * kv, hidden);
    l->qkv_bias = tiny_vector(m, base, desc->qkv_bias, q + 2 * kv, 0, 1);
    l->q_norm = tiny_vector(m, base, desc->qk_norm != QK_NORM_NONE, full ? q : desc->head_dim, 1, 0.5f);
    l->k_norm = tiny_vector(m, base, desc->qk_norm != QK_NORM_NONE, full ? kv : desc->head_dim, 1, 0.5f);
    l->sinks = tiny_vector(m, base, desc->sinks, heads, 0, 2);
    l->o = tiny_matrix(m, base, m->o, hidden, q);
}

static inline void tiny_bind_experts(struct tiny_model *m, const uint8_t *base, struct layer *l, struct mlp *experts)
{
    const struct experts_desc *e = &m->desc.experts;
    const struct kind_case bf16 = {WEIGHT_BF16, 0};
    l->router = tiny_matrix(m, base, bf16, e->num_experts + e->shared_gate, m->desc.hidden_size);
    l->router_bias = tiny_vector(m, base, e->router_bias, e->num_experts, 0, 1);
    l->choice_bias = tiny_vector(m, base, e->choice_bias, e->num_experts, 0, 0.2f);
    l->experts = experts;
    for (int64_t i = 0; i < m->share.num_experts_local; i++)
        experts[i] = tiny_mlp(m, base, m->share.expert_size_local, e->bias);
    if (e->shared_size > 0)
        l->mlp = tiny_mlp(m, base, m->share.shared_size_local, false);
}

// Everything at its place behind `base`, in an order that does not change.
static inline void tiny_bind(struct tiny_model *m, const uint8_t *base)
{
    const struct model_desc *desc = &m->desc;
    const struct kind_case bf16 = {WEIGHT_BF16, 0};
    int64_t hidden = desc->hidden_size;
    m->bytes = 0;
    m->weights.layers = m->layers;
    m->weights.embedding = tiny_matrix(m, base, bf16, m->share.vocab_local, hidden);
    m->weights.head = tiny_matrix(m, base, m->head, m->share.vocab_local, hidden);
    m->weights.rope = tiny_rope(m, base, 1e4);
    m->weights.rope_long = tiny_rope(m, base, 1e5);
    m->weights.rope_local = tiny_rope(m, base, 100);
    m->weights.final_norm = tiny_vector(m, base, true, hidden, 1, 0.5f);
    for (int64_t i = 0; i < desc->num_layers; i++) {
        struct layer *l = &m->layers[i];
        memset(l, 0, sizeof *l);
        l->flags = desc->layer_flags[i];
        l->attention_norm = tiny_vector(m, base, desc->pre_norms, hidden, 1, 0.5f);
        l->mlp_norm = tiny_vector(m, base, desc->pre_norms, hidden, 1, 0.5f);
        l->qkv_order = tiny_order(m, base);
        l->gate_up_order = tiny_order(m, base);
        l->attention_join.bias = tiny_vector(m, base, desc->o_bias, hidden, 0, 1);
        l->attention_join.norm = tiny_vector(m, base, desc->post_norms, hidden, 1, 0.5f);
        l->mlp_join.norm = tiny_vector(m, base, desc->post_norms, hidden, 1, 0.5f);
        tiny_bind_attention(m, base, l);
        if (l->flags & LAYER_EXPERTS)
            tiny_bind_experts(m, base, l, m->experts[i]);
        else
            l->mlp = tiny_mlp(m, base, m->share.intermediate_local, desc->mlp_bias);
        if (!(l->flags & LAYER_EXPERTS))
            l->mlp_join.bias = l->mlp.down_bias;
    }
}

// One rank with everything, two layers, plain in all respects; the caller changes what it likes, then binds.
static inline struct tiny_model *tiny_make(void)
{
    struct tiny_model *m = (struct tiny_model *)calloc(1, sizeof *m);
    assert_non_null(m);
    struct model_desc *desc = &m->desc;
    desc->num_layers = TINY_LAYERS;
    desc->hidden_size = desc->intermediate_size = 128;
    desc->num_heads = 2;
    desc->num_kv_heads = 1;
    desc->head_dim = desc->rotary_dim = 64;
    desc->vocab_size = 64;
    desc->norm_eps = 1e-5;
    desc->pre_norms = true;
    desc->embedding_scale = desc->residual_scale = desc->logit_scale = desc->rope_attention_factor = 1;
    desc->attention_scale = 0.125;
    m->share.num_heads_local = 2;
    m->share.num_kv_heads_local = 1;
    m->share.intermediate_local = 128;
    m->share.vocab_local = 64;
    m->qkv = m->o = m->gate_up = m->down = m->head = {WEIGHT_FP8, 0};
    return m;
}

// ---- a step ------------------------------------------------------------------------------------------------------------

static inline int tiny_attention(const struct backend *b, struct device *d, const struct tiny_model *m, int64_t i,
                                 struct error *err)
{
    const struct layer *l = &m->layers[i];
    const struct latent_desc *latent = &m->desc.latent;
    const struct join *join = i > 0 ? &l[-1].mlp_join : NULL;
    const struct matrix *first = latent->kv_rank == 0 ? &l->qkv : latent->q_rank > 0 ? &l->q_a : &l->q_b;
    int rc = b->norm(d, join, l->attention_norm, l->qkv_order, first, err);
    if (!rc && latent->kv_rank == 0)
        rc = b->linear(d, BUFFER_QKV, &l->qkv, err);
    if (!rc && latent->q_rank > 0)
        rc = b->linear(d, BUFFER_Q_LATENT, &l->q_a, err);
    if (!rc && latent->kv_rank > 0 && latent->q_rank == 0)
        rc = b->linear(d, BUFFER_QKV, &l->q_b, err);
    if (!rc && latent->kv_rank > 0)
        rc = b->linear(d, BUFFER_KV_LATENT, &l->kv_a, err);
    if (!rc && latent->q_rank > 0 && (rc = b->norm_latent(d, i, err)) == 0)
        rc = b->linear(d, BUFFER_QKV, &l->q_b, err);
    if (!rc && m->desc.qk_norm == QK_NORM_FULL)
        rc = b->squares(d, i, err);
    if (rc || (rc = b->finish_qkv(d, i, err)) || (rc = b->attend(d, i, err)))
        return rc;
    return b->linear(d, BUFFER_PARTIAL, &l->o, err);
}

static inline int tiny_layers(const struct backend *b, struct device *d, const struct tiny_model *m, struct error *err)
{
    int rc = b->embed(d, err);
    if (!rc && m->desc.embedding_scale != 1)
        rc = b->scale_residual(d, (float)m->desc.embedding_scale, err);
    for (int64_t i = 0; i < m->desc.num_layers && !rc; i++) {
        const struct layer *l = &m->layers[i];
        bool experts = l->flags & LAYER_EXPERTS, dense = !experts || m->desc.experts.shared_size > 0;
        if ((rc = tiny_attention(b, d, m, i, err)) ||
            (rc = b->norm(d, &l->attention_join, l->mlp_norm, l->gate_up_order, experts ? &l->router : &l->mlp.gate_up,
                          err)))
            return rc;
        if (experts && ((rc = b->linear(d, BUFFER_ROUTER, &l->router, err)) || (rc = b->route(d, i, err))))
            return rc;
        if (dense && ((rc = b->linear(d, BUFFER_GATE_UP, &l->mlp.gate_up, err)) ||
                      (rc = b->activate(d, &l->mlp, err)) || (rc = b->linear(d, BUFFER_PARTIAL, &l->mlp.down, err))))
            return rc;
        if (experts)
            rc = b->experts(d, i, err);
    }
    return rc;
}

// The payload's way to a device, through one lane and a small buffer; or its copy where the host computes.
static inline int tiny_load(const struct backend *b, struct device *d, const struct tiny_model *m, const uint8_t **base,
                            struct error *err)
{
    const uint64_t piece = 64 << 10;
    struct load_target target = {};
    uint8_t *buffer;
    int rc = b->load_begin(d, NULL, m->bytes, &target, err);
    if (!rc && target.place)
        memcpy(target.place, m->payload, m->bytes);
    for (uint64_t at = 0; !rc && !target.place && at < m->bytes; at += piece) {
        uint64_t bytes = m->bytes - at < piece ? m->bytes - at : piece;
        if ((rc = b->load_buffer(d, 1, piece, &buffer, err)))
            break;
        memcpy(buffer, m->payload + at, bytes);
        rc = b->load_copy(d, 1, at, buffer, bytes, err);
    }
    b->load_end(d);
    *base = target.base;
    return rc;
}

#endif
