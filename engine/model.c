// One rank's model: open, check, view, wait. See model.h.
#include "engine/model.h"

#include "formats/checked.h"
#include "formats/rank_file.h"
#include "kernels/buffers.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

// ---- views -----------------------------------------------------------------------------------------------------

// Where views come from, and of which layer and expert they are just now (-1: outside of them).
struct binder {
    const struct shard_file *file;
    const uint8_t *base; // where the payload will lie, for the backend; NULL: shapes and places are checked alone
    const char *name;
    int32_t layer, expert;
    struct payload_range *part; // grows by every tensor that is found
    struct error *err;
};

// "qkv of layer 3", "expert_down of layer 3, expert 17"
static const char *label(char out[96], const struct binder *b, enum tensor_role role)
{
    int used = snprintf(out, 96, "%s", tensor_role_name(role));
    if (b->layer >= 0)
        used += snprintf(out + used, 96 - (size_t)used, " of layer %d", b->layer);
    if (b->expert >= 0)
        snprintf(out + used, 96 - (size_t)used, ", expert %d", b->expert);
    return out;
}

static void widen(struct payload_range *range, uint64_t offset, uint64_t bytes)
{
    uint64_t end = offset + bytes;
    if (bytes == 0)
        return;
    if (range->end == 0 || offset < range->begin)
        range->begin = offset;
    range->end = end > range->end ? end : range->end;
}

// The tensor of a role, with the shape that the description calls for. Absent optional tensors leave *out NULL.
static int find(const struct binder *b, enum tensor_role role, int64_t rows, int64_t cols, bool wanted,
                const struct shard_tensor **out)
{
    const struct shard_tensor *tensor = shard_file_find(b->file, role, b->layer, b->expert);
    char name[96];
    *out = NULL;
    if (!tensor && !wanted)
        return 0;
    if (!tensor || !wanted)
        return error_set(b->err, ERR_CORRUPT, "%s: tensor %s is %s, against the model description", b->name,
                         label(name, b, role), tensor ? "there" : "missing");
    if (tensor->shape.rows != (uint64_t)rows || tensor->shape.cols != (uint64_t)cols)
        return error_set(b->err, ERR_CORRUPT, "%s: tensor %s is %llu x %llu, wanted %lld x %lld", b->name,
                         label(name, b, role), (unsigned long long)tensor->shape.rows,
                         (unsigned long long)tensor->shape.cols, (long long)rows, (long long)cols);
    widen(b->part, tensor->data_offset, tensor->shape.data_bytes);
    widen(b->part, tensor->scale_offset, tensor->shape.scale_bytes);
    *out = tensor;
    return 0;
}

static const void *at(const struct binder *b, uint64_t offset) { return b->base ? b->base + offset : NULL; }

static int bind_matrix(const struct binder *b, struct matrix *out, enum tensor_role role, int64_t rows, int64_t cols)
{
    const struct shard_tensor *tensor;
    char name[96];
    int rc = find(b, role, rows, cols, true, &tensor);
    if (rc)
        return rc;
    assert(tensor); // wanted, so it is there
    if (tensor->shape.kind == WEIGHT_F32)
        return error_set(b->err, ERR_CORRUPT, "%s: matrix %s is stored as f32", b->name, label(name, b, role));
    out->shape = tensor->shape;
    out->data = at(b, tensor->data_offset);
    out->scale = tensor->shape.scale_bytes == 0 ? NULL : at(b, tensor->scale_offset);
    return 0;
}

// A matrix that the engine reads as rows of bfloat16 itself.
static int bind_bf16(const struct binder *b, struct matrix *out, enum tensor_role role, int64_t rows, int64_t cols)
{
    char name[96];
    int rc = bind_matrix(b, out, role, rows, cols);
    if (!rc && out->shape.kind != WEIGHT_BF16)
        return error_set(b->err, ERR_CORRUPT, "%s: matrix %s is stored as %s, wanted bf16", b->name,
                         label(name, b, role), weight_kind_name(out->shape.kind));
    return rc;
}

static int bind_vector(const struct binder *b, const float **out, enum tensor_role role, int64_t cols, bool wanted)
{
    const struct shard_tensor *tensor;
    char name[96];
    int rc = find(b, role, 1, cols, wanted, &tensor);
    *out = NULL;
    if (rc || !tensor)
        return rc;
    if (tensor->shape.kind != WEIGHT_F32)
        return error_set(b->err, ERR_CORRUPT, "%s: vector %s is not stored as f32", b->name, label(name, b, role));
    *out = at(b, tensor->data_offset);
    return 0;
}

// The order of an input's columns, where the file has one. What it says is checked when it has arrived.
static int bind_order(const struct binder *b, const float **out, enum tensor_role role, int64_t cols)
{
    return bind_vector(b, out, role, cols, shard_file_find(b->file, role, b->layer, b->expert) != NULL);
}

static int bind_plain_attention(const struct binder *b, const struct model *m, struct layer *layer)
{
    const struct model_desc *d = &m->desc;
    int64_t q = m->share.num_heads_local * d->head_dim, kv = m->share.num_kv_heads_local * d->head_dim;
    bool full = d->qk_norm == QK_NORM_FULL, norms = d->qk_norm != QK_NORM_NONE;
    int rc;
    if ((rc = bind_matrix(b, &layer->qkv, ROLE_QKV, q + 2 * kv, d->hidden_size)) ||
        (rc = bind_order(b, &layer->qkv_order, ROLE_QKV_ORDER, d->hidden_size)) ||
        (rc = bind_vector(b, &layer->qkv_bias, ROLE_QKV_BIAS, q + 2 * kv, d->qkv_bias)) ||
        (rc = bind_vector(b, &layer->q_norm, ROLE_Q_NORM, full ? q : d->head_dim, norms)) ||
        (rc = bind_vector(b, &layer->k_norm, ROLE_K_NORM, full ? kv : d->head_dim, norms)))
        return rc;
    return 0;
}

static int bind_latent_attention(const struct binder *b, const struct model *m, struct layer *layer)
{
    const struct model_desc *d = &m->desc;
    const struct latent_desc *l = &d->latent;
    int64_t heads = m->share.num_heads_local, q_input = l->q_rank > 0 ? l->q_rank : d->hidden_size;
    int rc;
    if (l->q_rank > 0 && (rc = bind_matrix(b, &layer->q_a, ROLE_Q_A, l->q_rank, d->hidden_size)))
        return rc;
    if ((rc = bind_vector(b, &layer->q_a_norm, ROLE_Q_A_NORM, l->q_rank, l->q_rank > 0)) ||
        (rc = bind_matrix(b, &layer->q_b, ROLE_Q_B, heads * d->head_dim, q_input)) ||
        (rc = bind_matrix(b, &layer->kv_a, ROLE_KV_A, l->kv_rank + l->rope_dim, d->hidden_size)) ||
        (rc = bind_vector(b, &layer->kv_a_norm, ROLE_KV_A_NORM, l->kv_rank, true)))
        return rc;
    return bind_bf16(b, &layer->kv_b, ROLE_KV_B, heads * (l->nope_dim + l->v_dim), l->kv_rank);
}

static int bind_attention(const struct binder *b, const struct model *m, struct layer *layer)
{
    const struct model_desc *d = &m->desc;
    int64_t hidden = d->hidden_size;
    int rc;
    if ((rc = bind_vector(b, &layer->attention_norm, ROLE_ATTENTION_NORM, hidden, d->pre_norms)) ||
        (rc = d->latent.kv_rank > 0 ? bind_latent_attention(b, m, layer) : bind_plain_attention(b, m, layer)) ||
        (rc = bind_vector(b, &layer->sinks, ROLE_SINKS, m->share.num_heads_local, d->sinks)) ||
        (rc = bind_matrix(b, &layer->o, ROLE_O, hidden, attended_width(d, &m->share))) ||
        (rc = bind_vector(b, &layer->attention_join.bias, ROLE_O_BIAS, hidden, d->o_bias)))
        return rc;
    return bind_vector(b, &layer->attention_join.norm, ROLE_ATTENTION_POST_NORM, hidden, d->post_norms);
}

static int bind_experts(struct binder *b, struct model *m, struct layer *layer)
{
    const struct model_desc *d = &m->desc;
    const struct experts_desc *e = &d->experts;
    const struct rank_share *s = &m->share;
    int64_t hidden = d->hidden_size, size = s->expert_size_local, shared = s->shared_size_local;
    int rc;
    if ((rc = bind_bf16(b, &layer->router, ROLE_ROUTER, e->num_experts + e->shared_gate, hidden)) ||
        (rc = bind_vector(b, &layer->router_bias, ROLE_ROUTER_BIAS, e->num_experts, e->router_bias)) ||
        (rc = bind_vector(b, &layer->choice_bias, ROLE_ROUTER_CHOICE_BIAS, e->num_experts, e->choice_bias)))
        return rc;
    if (e->shared_size > 0 && ((rc = bind_matrix(b, &layer->mlp.gate_up, ROLE_SHARED_GATE_UP, 2 * shared, hidden)) ||
                               (rc = bind_matrix(b, &layer->mlp.down, ROLE_SHARED_DOWN, hidden, shared))))
        return rc;
    for (int64_t i = 0; !rc && i < s->num_experts_local; i++) {
        struct mlp *mlp = &layer->experts[i];
        b->expert = (int32_t)(s->expert_begin + i);
        if (!(rc = bind_matrix(b, &mlp->gate_up, ROLE_EXPERT_GATE_UP, 2 * size, hidden)) &&
            !(rc = bind_vector(b, &mlp->gate_up_bias, ROLE_EXPERT_GATE_UP_BIAS, 2 * size, e->bias)) &&
            !(rc = bind_matrix(b, &mlp->down, ROLE_EXPERT_DOWN, hidden, size)) &&
            !(rc = bind_vector(b, &mlp->down_bias, ROLE_EXPERT_DOWN_BIAS, hidden, e->bias)) &&
            mlp->gate_up.shape.kind != layer->experts[0].gate_up.shape.kind)
            rc = error_set(b->err, ERR_CORRUPT, "%s: the experts of layer %d are stored in different kinds", b->name,
                           b->layer);
    }
    b->expert = -1;
    return rc;
}

static int bind_dense_mlp(const struct binder *b, const struct model *m, struct layer *layer)
{
    const struct model_desc *d = &m->desc;
    int64_t hidden = d->hidden_size, size = m->share.intermediate_local;
    int rc;
    if ((rc = bind_matrix(b, &layer->mlp.gate_up, ROLE_GATE_UP, 2 * size, hidden)) ||
        (rc = bind_order(b, &layer->gate_up_order, ROLE_GATE_UP_ORDER, hidden)) ||
        (rc = bind_vector(b, &layer->mlp.gate_up_bias, ROLE_GATE_UP_BIAS, 2 * size, d->mlp_bias)) ||
        (rc = bind_matrix(b, &layer->mlp.down, ROLE_DOWN, hidden, size)))
        return rc;
    return bind_vector(b, &layer->mlp_join.bias, ROLE_DOWN_BIAS, hidden, d->mlp_bias);
}

static int bind_layer(struct binder *b, struct model *m, struct layer *layer)
{
    const struct model_desc *d = &m->desc;
    int rc;
    layer->flags = d->layer_flags[b->layer - m->layer_begin];
    if ((rc = bind_attention(b, m, layer)) ||
        (rc = bind_vector(b, &layer->mlp_norm, ROLE_MLP_NORM, d->hidden_size, d->pre_norms)) ||
        (rc = layer->flags & LAYER_EXPERTS ? bind_experts(b, m, layer) : bind_dense_mlp(b, m, layer)))
        return rc;
    return bind_vector(b, &layer->mlp_join.norm, ROLE_MLP_POST_NORM, d->hidden_size, d->post_norms);
}

static bool part_of(int64_t begin, int64_t count, int64_t total)
{
    return begin >= 0 && count >= 0 && count <= total && begin <= total - count;
}

// No block of columns that is rotated together is cut.
static bool whole_blocks(const struct rank_share *s, const struct model_desc *d)
{
    int64_t block = d->mlp_rotation > 0 ? d->mlp_rotation : 1;
    return s->mlp_begin % block == 0 && s->intermediate_local % block == 0 && s->expert_mlp_begin % block == 0 &&
           s->expert_size_local % block == 0 && s->shared_begin % block == 0 && s->shared_size_local % block == 0;
}

static bool share_fits(const struct rank_share *s, const struct model_desc *d)
{
    if (!part_of(s->head_begin, s->num_heads_local, d->num_heads) ||
        !part_of(s->kv_head_begin, s->num_kv_heads_local, d->num_kv_heads))
        return false;
    int64_t per_kv = d->num_heads / d->num_kv_heads;
    if (s->num_heads_local > 0 &&
        (s->head_begin / per_kv < s->kv_head_begin ||
         (s->head_begin + s->num_heads_local - 1) / per_kv >= s->kv_head_begin + s->num_kv_heads_local))
        return false;
    return part_of(s->mlp_begin, s->intermediate_local, d->intermediate_size) &&
           part_of(s->vocab_begin, s->vocab_local, d->vocab_size) &&
           part_of(s->expert_begin, s->num_experts_local, d->experts.num_experts) &&
           part_of(s->expert_mlp_begin, s->expert_size_local, d->experts.expert_size) &&
           part_of(s->shared_begin, s->shared_size_local, d->experts.shared_size) && whole_blocks(s, d);
}

static bool any_layer(const struct model_desc *d, unsigned flag)
{
    for (int64_t i = 0; i < d->num_layers; i++)
        if (d->layer_flags[i] & flag)
            return true;
    return false;
}

// base NULL: shapes are checked, and places noted.
static int bind_model(struct model *m, const uint8_t *base, struct error *err)
{
    struct binder b = {.file = m->file, .base = base, .name = m->name, .layer = -1, .expert = -1, .err = err};
    const struct model_desc *d = &m->desc;
    struct weights *w = &m->weights;
    bool has_embedding = !m->stage_before || (!m->stage_behind && d->tied_embeddings);
    int64_t half = d->rotary_dim / 2, vocab = m->share.vocab_local;
    int rc;
    b.part = &m->parts[PART_EMBEDDING];
    if ((rc = bind_matrix(&b, &w->embedding, ROLE_EMBEDDING, has_embedding ? vocab : 0, d->hidden_size)))
        return rc;
    b.part = &m->parts[PART_TABLES];
    if ((rc = bind_vector(&b, &w->rope, ROLE_ROPE_INV_FREQ, half, true)) ||
        (rc = bind_vector(&b, &w->rope_long, ROLE_ROPE_LONG, half, d->rope_original_context > 0)) ||
        (rc = bind_vector(&b, &w->rope_local, ROLE_ROPE_LOCAL, half, m->has_rope_local)))
        return rc;
    b.part = &m->parts[PART_FINAL_NORM];
    if ((rc = bind_vector(&b, &w->final_norm, ROLE_FINAL_NORM, !m->stage_behind ? d->hidden_size : 0, true)))
        return rc;
    w->head = w->embedding;
    m->parts[PART_HEAD] = m->parts[PART_EMBEDDING];
    if (!d->tied_embeddings) {
        m->parts[PART_HEAD] = (struct payload_range){0};
        b.part = &m->parts[PART_HEAD];
        if ((rc = bind_matrix(&b, &w->head, ROLE_HEAD, !m->stage_behind ? vocab : 0, d->hidden_size)))
            return rc;
    }
    for (int64_t i = 0; i < d->num_layers; i++) {
        b.layer = (int32_t)(m->layer_begin + i);
        b.part = &m->layers[i];
        if ((rc = bind_layer(&b, m, &w->layers[i])))
            return rc;
    }
    return 0;
}

// Layers, and the experts of all layers behind each other.
static int alloc_layers(struct model *m, struct error *err)
{
    size_t layers = (size_t)m->desc.num_layers, experts = (size_t)m->share.num_experts_local, with_experts = 0;
    for (size_t i = 0; i < layers; i++)
        with_experts += (m->desc.layer_flags[i] & LAYER_EXPERTS) != 0;
    m->weights.layers = calloc(layers, sizeof *m->weights.layers);
    m->experts = calloc(with_experts * experts + 1, sizeof *m->experts);
    m->layers = calloc(layers, sizeof *m->layers);
    if (!m->weights.layers || !m->experts || !m->layers)
        return error_set(err, ERR_MEMORY, "%s: no memory for %zu layers", m->name, layers);
    struct mlp *next = m->experts;
    for (size_t i = 0; i < layers; i++)
        if (m->desc.layer_flags[i] & LAYER_EXPERTS) {
            m->weights.layers[i].experts = next;
            next += experts;
        }
    return 0;
}

// ---- opening ---------------------------------------------------------------------------------------------------

// The file's name is taken behind its head: with a head that was damaged in the cache, another file takes the cached one's place.
static int read_head(struct model *m, const struct manifest *manifest, int rank, struct error *err)
{
    uint8_t *head = NULL;
    uint64_t head_bytes;
    int rc = store_file_head(&head, &head_bytes, m->source, err);
    m->name = store_file_name(m->source);
    if (!rc)
        rc = shard_file_parse(&m->file, head, head_bytes, store_file_bytes(m->source), m->name, err);
    free(head);
    return rc ? rc : rank_file_check(m->file, manifest, (uint32_t)rank, m->name, err);
}

// The rank's stage: its layers, and whether the embedding or the head is its.
static void take_stage(struct model *m, const struct manifest *manifest, uint32_t rank)
{
    uint32_t stage = rank / manifest->tp_size;
    int64_t begin = 0, count = manifest->model.num_layers;
    if (manifest->pp_size > 1)
        manifest_stage(manifest->stage_layers, stage, &begin, &count);
    *m = (struct model){.layer_begin = begin,
                        .stage_before = stage > 0,
                        .stage_behind = stage + 1 < manifest->pp_size,
                        .has_rope_local = any_layer(&manifest->model, LAYER_LOCAL_ROPE)};
    manifest_stage_model(&m->desc, &manifest->model, begin, count);
}

int model_open(struct model *out, const char *place, const struct store_options *store, const struct manifest *manifest,
               int rank, struct comm *comm, struct error *err)
{
    int rc;
    struct model model;
    take_stage(&model, manifest, (uint32_t)rank);
    if (comm)
        comm_at(comm, OP_LOAD, -1);
    if ((rc = store_open(&model.store, place, store, err)) ||
        (rc = store_file_open(&model.source, model.store, manifest, (uint32_t)rank, err)))
        goto fail;
    if ((rc = read_head(&model, manifest, rank, err)))
        goto fail;
    model.share = shard_file_identity(model.file)->share;
    if (!share_fits(&model.share, &model.desc)) {
        rc = error_set(err, ERR_CORRUPT,
                       "%s: the rank's share of heads, mlp or vocabulary does not fit the model description",
                       model.name);
        goto fail;
    }
    if ((rc = alloc_layers(&model, err)) || (rc = bind_model(&model, NULL, err)))
        goto fail;
    *out = model;
    return 0;
fail:
    model_close(&model);
    return rc;
}

void model_close(struct model *model)
{
    loader_free(model->loader);
    free(model->weights.layers);
    free(model->experts);
    free(model->layers);
    shard_file_close(model->file);
    store_file_close(model->source);
    store_close(model->store);
    *model = (struct model){0};
}

// ---- arrival ---------------------------------------------------------------------------------------------------

int model_load(struct model *model, const struct loader_options *options, struct error *err)
{
    struct loader_options mine = *options;
    mine.file = model->file;
    mine.source = model->source;
    model->backend = options->backend;
    model->device = options->device;
    int rc = loader_start(&model->loader, &mine, &model->base, err);
    return rc ? rc : bind_model(model, model->base, err);
}

static int need(struct model *m, const struct payload_range *range, struct error *err)
{
    return m->loaded ? 0 : loader_need(m->loader, range->begin, range->end - range->begin, err);
}

int model_need(struct model *model, enum model_part part, struct error *err)
{
    return need(model, &model->parts[part], err);
}

// Kernels take the numbers of columns for granted.
static int check_order(const struct model *m, int64_t layer, enum tensor_role role, struct error *err)
{
    enum { PIECE = 1024 };
    float piece[PIECE];
    int64_t number = m->layer_begin + layer;
    const struct shard_tensor *tensor = shard_file_find(m->file, role, (int32_t)number, -1);
    int64_t cols = m->desc.hidden_size;
    int rc;
    for (int64_t done = 0; tensor && done < cols; done += PIECE) {
        int64_t count = cols - done < PIECE ? cols - done : PIECE;
        uint64_t offset = tensor->data_offset + (uint64_t)done * sizeof *piece, bytes = (uint64_t)count * sizeof *piece;
        if (!m->backend->load_read)
            memcpy(piece, m->base + offset, bytes);
        else if ((rc = m->backend->load_read(m->device, offset, piece, bytes, err)))
            return rc;
        for (int64_t i = 0; i < count; i++)
            if (!(piece[i] >= 0 && piece[i] < (float)cols && piece[i] == (float)(int64_t)piece[i]))
                return error_set(err, ERR_CORRUPT, "%s: %s of layer %lld names column %g of %lld", m->name,
                                 tensor_role_name(role), (long long)number, (double)piece[i], (long long)cols);
    }
    return 0;
}

// A layer that has arrived.
static int take_layer(struct model *model, int64_t layer, struct error *err)
{
    int rc;
    if ((rc = check_order(model, layer, ROLE_QKV_ORDER, err)) ||
        (rc = check_order(model, layer, ROLE_GATE_UP_ORDER, err)))
        return rc;
    model->next_layer = layer + 1;
    return 0;
}

int model_need_layer(struct model *model, int64_t layer, struct error *err)
{
    if (layer < model->next_layer)
        return 0;
    int rc = need(model, &model->layers[layer], err);
    return rc ? rc : take_layer(model, layer, err);
}

// Has the part of a matrix read that holds a row, where `unit` rows lie together. A page fault would bring megabytes around it.
static void want_row(const void *matrix, uint64_t bytes, const struct weight_shape *shape, uint64_t row, uint64_t unit)
{
    uintptr_t page_bytes = (uintptr_t)sysconf(_SC_PAGESIZE);
    uint64_t unit_bytes = bytes / (shape->rows_padded / unit);
    uintptr_t begin = (uintptr_t)matrix + row / unit * unit_bytes, first_page = begin / page_bytes * page_bytes;
    if (unit_bytes > 0)
        madvise((void *)first_page, begin + unit_bytes - first_page, MADV_WILLNEED); // if it fails, the fault comes
}

int model_need_rows(struct model *model, const struct token_row *rows, int64_t count, struct error *err)
{
    const struct matrix *m = &model->weights.embedding;
    if (model->loaded || model->stage_before) // the rows come from there
        return 0;
    if (!loader_is_mapped(model->loader))
        return need(model, &model->parts[PART_EMBEDDING], err);
    for (int64_t i = 0; i < count; i++) {
        int64_t row = (int64_t)rows[i].token - model->share.vocab_begin;
        if (row < 0 || row >= model->share.vocab_local)
            continue;
        want_row(m->data, m->shape.data_bytes, &m->shape, (uint64_t)row,
                 weight_is_tiled(m->shape.kind) ? WEIGHT_ROW_UNIT : 1);
        want_row(m->scale, m->shape.scale_bytes, &m->shape, (uint64_t)row, WEIGHT_ROW_UNIT);
    }
    return 0;
}

void model_stop(struct model *model)
{
    if (model->loader)
        loader_stop(model->loader);
}

int model_finish(struct model *model, struct error *err)
{
    if (model->loaded)
        return 0;
    int rc = loader_finish(model->loader, err);
    // A model that is loaded before its first step has passed none of them.
    for (int64_t layer = model->next_layer; layer < model->desc.num_layers && !rc; layer++)
        rc = take_layer(model, layer, err);
    model->loaded = !rc;
    return rc;
}
