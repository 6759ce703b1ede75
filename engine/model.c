// One rank's model: map, verify, view. See model.h.
#include "engine/model.h"

#include "formats/checked.h"
#include "kernels/buffers.h"

#include <assert.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// ---- identity --------------------------------------------------------------------------------------------------

static void hex(char out[33], const uint8_t bytes[16])
{
    for (int i = 0; i < 16; i++)
        snprintf(out + 2 * (size_t)i, 3, "%02x", bytes[i]);
}

static void contract_bytes(uint8_t out[16], struct checksum128 hash)
{
    for (int i = 0; i < 8; i++) {
        out[i] = (uint8_t)(hash.high >> (56 - 8 * i));
        out[8 + i] = (uint8_t)(hash.low >> (56 - 8 * i));
    }
}

// Rank k must refuse rank j's file, another sharding run's file and another model's file.
static int check_identity(const struct shard_file *file, const struct manifest *manifest, int rank, const char *path,
                          struct error *err)
{
    const struct shard_identity *id = shard_file_identity(file);
    if (id->rank != (uint32_t)rank || id->tp_size != manifest->tp_size || id->pp_size != manifest->pp_size)
        return error_set(err, ERR_CORRUPT,
                         "%s: it is rank %u of %u, but rank %d of %u was wanted here; files were mixed up", path,
                         id->rank, id->tp_size, rank, manifest->tp_size);
    uint8_t want[16];
    contract_bytes(want, manifest->contract);
    if (memcmp(want, id->contract, 16) != 0) {
        char found_hex[33], want_hex[33];
        hex(found_hex, id->contract);
        hex(want_hex, want);
        return error_set(err, ERR_CORRUPT,
                         "%s: contract %s differs from the manifest's %s: the file comes from another run of tpshard",
                         path, found_hex, want_hex);
    }
    if (!checksum128_equal(shard_file_root(file), manifest->ranks[rank].hash))
        return error_set(err, ERR_CORRUPT,
                         "%s: the header's checksum differs from the manifest's; shard the model again", path);
    return 0;
}

// ---- verification ----------------------------------------------------------------------------------------------

struct verify_job {
    const struct shard_file *file;
    struct thread_pool *pool;
    struct comm *comm;
    enum verify_mode mode;
    atomic_llong *loaded_bytes; // NULL: nobody wants to know
    // of the piece under way
    const uint8_t *data;
    uint64_t first_leaf;
    atomic_int failed;
    struct error *err; // written by the first that fails
};

enum { SAMPLE_STRIDE = 64 }; // VERIFY_SAMPLE checks every so manyth leaf

static void verify_leaf(void *arg, int64_t task, int thread)
{
    struct verify_job *job = arg;
    uint64_t leaf = job->first_leaf + (uint64_t)task;
    if (job->loaded_bytes)
        atomic_fetch_add_explicit(job->loaded_bytes, SHARD_LEAF_BYTES, memory_order_relaxed);
    if (atomic_load_explicit(&job->failed, memory_order_relaxed) ||
        (job->mode == VERIFY_SAMPLE && leaf % SAMPLE_STRIDE != 0))
        return;
    if (thread == 0 && job->comm)
        comm_at(job->comm, OP_LOAD, -1);
    struct error err;
    if (shard_file_verify_leaf(job->file, leaf, job->data + (uint64_t)task * SHARD_LEAF_BYTES, &err) == 0)
        return;
    if (atomic_exchange(&job->failed, 1) == 0)
        *job->err = err;
}

static int verify_piece(void *arg, const uint8_t *data, uint64_t offset, uint64_t bytes, struct error *err)
{
    struct verify_job *job = arg;
    if (job->comm)
        comm_at(job->comm, OP_LOAD, -1);
    if (job->mode == VERIFY_OFF)
        return 0;
    job->data = data;
    job->first_leaf = offset / SHARD_LEAF_BYTES;
    job->err = err;
    thread_pool_run(job->pool, verify_leaf, job, (int64_t)div_up(bytes, SHARD_LEAF_BYTES));
    return atomic_load(&job->failed) ? err->code : 0;
}

// ---- views -----------------------------------------------------------------------------------------------------

// Where views come from, and of which layer and expert they are just now (-1: outside of them).
struct binder {
    const struct shard_file *file;
    const uint8_t *base; // where the payload lies, for the backend
    const char *path;
    bool loaded; // the payload is there to be read: orders are checked
    int32_t layer, expert;
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
        return error_set(b->err, ERR_CORRUPT, "%s: tensor %s is %s, against the model description", b->path,
                         label(name, b, role), tensor ? "there" : "missing");
    if (tensor->shape.rows != (uint64_t)rows || tensor->shape.cols != (uint64_t)cols)
        return error_set(b->err, ERR_CORRUPT, "%s: tensor %s is %llu x %llu, wanted %lld x %lld", b->path,
                         label(name, b, role), (unsigned long long)tensor->shape.rows,
                         (unsigned long long)tensor->shape.cols, (long long)rows, (long long)cols);
    *out = tensor;
    return 0;
}

static int bind_matrix(const struct binder *b, struct matrix *out, enum tensor_role role, int64_t rows, int64_t cols)
{
    const struct shard_tensor *tensor;
    char name[96];
    int rc = find(b, role, rows, cols, true, &tensor);
    if (rc)
        return rc;
    assert(tensor); // wanted, so it is there
    if (tensor->shape.kind == WEIGHT_F32)
        return error_set(b->err, ERR_CORRUPT, "%s: matrix %s is stored as f32", b->path, label(name, b, role));
    out->shape = tensor->shape;
    out->data = b->base + tensor->data_offset;
    out->scale = tensor->shape.scale_bytes == 0 ? NULL : b->base + tensor->scale_offset;
    return 0;
}

// A matrix that the engine reads as rows of bfloat16 itself.
static int bind_bf16(const struct binder *b, struct matrix *out, enum tensor_role role, int64_t rows, int64_t cols)
{
    char name[96];
    int rc = bind_matrix(b, out, role, rows, cols);
    if (!rc && out->shape.kind != WEIGHT_BF16)
        return error_set(b->err, ERR_CORRUPT, "%s: matrix %s is stored as %s, wanted bf16", b->path,
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
        return error_set(b->err, ERR_CORRUPT, "%s: vector %s is not stored as f32", b->path, label(name, b, role));
    *out = (const float *)(const void *)(b->base + tensor->data_offset);
    return 0;
}

// The order of an input's columns, where the file has one: column numbers.
static int bind_order(const struct binder *b, const float **out, enum tensor_role role, int64_t cols)
{
    const struct shard_tensor *tensor = shard_file_find(b->file, role, b->layer, b->expert);
    char name[96];
    int rc = bind_vector(b, out, role, cols, tensor != NULL);
    if (rc || !tensor || !b->loaded)
        return rc;
    const float *order = (const float *)(const void *)(shard_file_payload(b->file) + tensor->data_offset);
    for (int64_t i = 0; i < cols; i++)
        if (!(order[i] >= 0 && order[i] < (float)cols && order[i] == (float)(int64_t)order[i]))
            return error_set(b->err, ERR_CORRUPT, "%s: %s names column %g of %lld", b->path, label(name, b, role),
                             (double)order[i], (long long)cols);
    return 0;
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
            rc = error_set(b->err, ERR_CORRUPT, "%s: the experts of layer %d are stored in different kinds", b->path,
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
    layer->flags = d->layer_flags[b->layer];
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
           part_of(s->shared_begin, s->shared_size_local, d->experts.shared_size);
}

static bool any_layer(const struct model_desc *d, unsigned flag)
{
    for (int64_t i = 0; i < d->num_layers; i++)
        if (d->layer_flags[i] & flag)
            return true;
    return false;
}

static int bind_model(struct model *m, const uint8_t *base, bool loaded, struct error *err)
{
    struct binder b = {m->file, base, m->path, loaded, -1, -1, err};
    const struct model_desc *d = &m->desc;
    struct weights *w = &m->weights;
    int64_t half = d->rotary_dim / 2;
    int rc;
    if ((rc = bind_matrix(&b, &w->embedding, ROLE_EMBEDDING, m->share.vocab_local, d->hidden_size)) ||
        (rc = bind_vector(&b, &w->rope, ROLE_ROPE_INV_FREQ, half, true)) ||
        (rc = bind_vector(&b, &w->rope_long, ROLE_ROPE_LONG, half, d->rope_original_context > 0)) ||
        (rc = bind_vector(&b, &w->rope_local, ROLE_ROPE_LOCAL, half, any_layer(d, LAYER_LOCAL_ROPE))) ||
        (rc = bind_vector(&b, &w->final_norm, ROLE_FINAL_NORM, d->hidden_size, true)))
        return rc;
    w->head = w->embedding;
    if (!d->tied_embeddings && (rc = bind_matrix(&b, &w->head, ROLE_HEAD, m->share.vocab_local, d->hidden_size)))
        return rc;
    for (b.layer = 0; b.layer < d->num_layers; b.layer++)
        if ((rc = bind_layer(&b, m, &w->layers[b.layer])))
            return rc;
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
    if (!m->weights.layers || !m->experts)
        return error_set(err, ERR_MEMORY, "%s: no memory for %zu layers", m->path, layers);
    struct mlp *next = m->experts;
    for (size_t i = 0; i < layers; i++)
        if (m->desc.layer_flags[i] & LAYER_EXPERTS) {
            m->weights.layers[i].experts = next;
            next += experts;
        }
    return 0;
}

// ---- opening ---------------------------------------------------------------------------------------------------

int model_open(struct model *out, const char *dir, const struct manifest *manifest, int rank, struct comm *comm,
               struct error *err)
{
    int rc;
    struct model model = {.desc = manifest->model};
    if (comm)
        comm_at(comm, OP_LOAD, -1);
    if (asprintf(&model.path, "%s/%s", dir, manifest->ranks[rank].name) < 0)
        return error_set(err, ERR_MEMORY, "%s: no memory for the name of a file", dir);
    if ((rc = shard_file_open(&model.file, model.path, err)))
        goto fail;
    if ((rc = check_identity(model.file, manifest, rank, model.path, err)))
        goto fail;
    model.share = shard_file_identity(model.file)->share;
    if (!share_fits(&model.share, &model.desc)) {
        rc = error_set(err, ERR_CORRUPT,
                       "%s: the rank's share of heads, mlp or vocabulary does not fit the model description",
                       model.path);
        goto fail;
    }
    if ((rc = alloc_layers(&model, err)))
        goto fail;
    if ((rc = bind_model(&model, shard_file_payload(model.file), false, err)))
        goto fail;
    *out = model;
    return 0;
fail:
    model_close(&model);
    return rc;
}

int model_load(struct model *model, const struct backend *backend, struct device *device, enum verify_mode verify,
               struct thread_pool *pool, struct comm *comm, atomic_llong *loaded_bytes, struct error *err)
{
    struct verify_job job = {
        .file = model->file, .pool = pool, .comm = comm, .mode = verify, .loaded_bytes = loaded_bytes};
    const uint8_t *base;
    int rc = backend->load(device, &base, shard_file_payload(model->file), shard_file_payload_bytes(model->file),
                           verify_piece, &job, err);
    return rc ? rc : bind_model(model, base, true, err);
}

void model_close(struct model *model)
{
    free(model->weights.layers);
    free(model->experts);
    free(model->path);
    shard_file_close(model->file);
    *model = (struct model){0};
}
