// One rank's model: map, verify, view. See model.h.
#include "engine/model.h"

#include "formats/checked.h"

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

struct binder {
    const struct shard_file *file;
    const uint8_t *base; // where the payload lies, for the backend
    const char *path;
    struct error *err;
};

// The tensor of a role, with the shape that the description calls for. Absent optional tensors leave *out NULL.
static int find(const struct binder *b, enum tensor_role role, int32_t layer, int64_t rows, int64_t cols, bool wanted,
                const struct shard_tensor **out)
{
    const struct shard_tensor *tensor = shard_file_find(b->file, role, layer);
    *out = NULL;
    if (!tensor && !wanted)
        return 0;
    if (!tensor || !wanted)
        return error_set(b->err, ERR_CORRUPT, "%s: tensor %s of layer %d is %s, against the model description", b->path,
                         tensor_role_name(role), layer, tensor ? "there" : "missing");
    if (tensor->shape.rows != (uint64_t)rows || tensor->shape.cols != (uint64_t)cols)
        return error_set(b->err, ERR_CORRUPT, "%s: tensor %s of layer %d is %llu x %llu, wanted %lld x %lld", b->path,
                         tensor_role_name(role), layer, (unsigned long long)tensor->shape.rows,
                         (unsigned long long)tensor->shape.cols, (long long)rows, (long long)cols);
    *out = tensor;
    return 0;
}

static int bind_matrix(const struct binder *b, struct matrix *out, enum tensor_role role, int32_t layer, int64_t rows,
                       int64_t cols)
{
    const struct shard_tensor *tensor;
    int rc = find(b, role, layer, rows, cols, true, &tensor);
    if (rc)
        return rc;
    assert(tensor); // wanted, so it is there
    if (tensor->shape.kind == WEIGHT_F32)
        return error_set(b->err, ERR_CORRUPT, "%s: matrix %s of layer %d is stored as f32", b->path,
                         tensor_role_name(role), layer);
    out->shape = tensor->shape;
    out->data = b->base + tensor->data_offset;
    out->scale = tensor->shape.kind == WEIGHT_BF16 ? NULL : b->base + tensor->scale_offset;
    return 0;
}

static int bind_vector(const struct binder *b, const float **out, enum tensor_role role, int32_t layer, int64_t cols,
                       bool wanted)
{
    const struct shard_tensor *tensor;
    int rc = find(b, role, layer, 1, cols, wanted, &tensor);
    *out = NULL;
    if (rc || !tensor)
        return rc;
    if (tensor->shape.kind != WEIGHT_F32)
        return error_set(b->err, ERR_CORRUPT, "%s: vector %s of layer %d is not stored as f32", b->path,
                         tensor_role_name(role), layer);
    *out = (const float *)(const void *)(b->base + tensor->data_offset);
    return 0;
}

static int bind_layer(const struct binder *b, const struct model *m, struct layer *layer, int32_t i)
{
    const struct model_desc *d = &m->desc;
    int64_t hidden = d->hidden_size, q = m->share.num_heads_local * d->head_dim;
    int64_t qkv = q + 2 * m->share.num_kv_heads_local * d->head_dim, mlp = m->share.intermediate_local;
    int rc;
    if ((rc = bind_vector(b, &layer->attention_norm, ROLE_ATTENTION_NORM, i, hidden, true)) ||
        (rc = bind_matrix(b, &layer->qkv, ROLE_QKV, i, qkv, hidden)) ||
        (rc = bind_vector(b, &layer->qkv_bias, ROLE_QKV_BIAS, i, qkv, d->qkv_bias)) ||
        (rc = bind_vector(b, &layer->q_norm, ROLE_Q_NORM, i, d->head_dim, d->qk_norm)) ||
        (rc = bind_vector(b, &layer->k_norm, ROLE_K_NORM, i, d->head_dim, d->qk_norm)) ||
        (rc = bind_matrix(b, &layer->o, ROLE_O, i, hidden, q)) ||
        (rc = bind_vector(b, &layer->o_bias, ROLE_O_BIAS, i, hidden, d->o_bias)) ||
        (rc = bind_vector(b, &layer->mlp_norm, ROLE_MLP_NORM, i, hidden, true)) ||
        (rc = bind_matrix(b, &layer->gate_up, ROLE_GATE_UP, i, 2 * mlp, hidden)) ||
        (rc = bind_vector(b, &layer->gate_up_bias, ROLE_GATE_UP_BIAS, i, 2 * mlp, d->mlp_bias)) ||
        (rc = bind_matrix(b, &layer->down, ROLE_DOWN, i, hidden, mlp)) ||
        (rc = bind_vector(b, &layer->down_bias, ROLE_DOWN_BIAS, i, hidden, d->mlp_bias)))
        return rc;
    return 0;
}

static bool share_fits(const struct rank_share *s, const struct model_desc *d)
{
    if (s->head_begin < 0 || s->num_heads_local < 0 || s->head_begin > d->num_heads - s->num_heads_local)
        return false;
    if (s->kv_head_begin < 0 || s->num_kv_heads_local < 0 || s->kv_head_begin > d->num_kv_heads - s->num_kv_heads_local)
        return false;
    int64_t per_kv = d->num_heads / d->num_kv_heads;
    if (s->num_heads_local > 0 &&
        (s->head_begin / per_kv < s->kv_head_begin ||
         (s->head_begin + s->num_heads_local - 1) / per_kv >= s->kv_head_begin + s->num_kv_heads_local))
        return false;
    return s->mlp_begin >= 0 && s->intermediate_local >= 0 &&
           s->mlp_begin <= d->intermediate_size - s->intermediate_local && s->vocab_begin >= 0 && s->vocab_local >= 0 &&
           s->vocab_begin <= d->vocab_size - s->vocab_local;
}

static int bind_model(struct model *m, const uint8_t *base, struct error *err)
{
    const struct binder b = {m->file, base, m->path, err};
    const struct model_desc *d = &m->desc;
    struct weights *w = &m->weights;
    int rc;
    if ((rc = bind_matrix(&b, &w->embedding, ROLE_EMBEDDING, -1, m->share.vocab_local, d->hidden_size)) ||
        (rc = bind_vector(&b, &w->inv_freq, ROLE_ROPE_INV_FREQ, -1, d->head_dim / 2, true)) ||
        (rc = bind_vector(&b, &w->final_norm, ROLE_FINAL_NORM, -1, d->hidden_size, true)))
        return rc;
    w->head = w->embedding;
    if (!d->tied_embeddings && (rc = bind_matrix(&b, &w->head, ROLE_HEAD, -1, m->share.vocab_local, d->hidden_size)))
        return rc;
    for (int32_t i = 0; i < d->num_layers; i++)
        if ((rc = bind_layer(&b, m, &w->layers[i], i)))
            return rc;
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
    model.weights.layers = calloc((size_t)manifest->model.num_layers, sizeof *model.weights.layers);
    if (!model.weights.layers) {
        rc = error_set(err, ERR_MEMORY, "%s: no memory for %lld layers", model.path,
                       (long long)manifest->model.num_layers);
        goto fail;
    }
    if ((rc = bind_model(&model, shard_file_payload(model.file), err)))
        goto fail;
    *out = model;
    return 0;
fail:
    model_close(&model);
    return rc;
}

int model_load(struct model *model, const struct backend *backend, struct device *device, enum verify_mode verify,
               struct thread_pool *pool, struct comm *comm, struct error *err)
{
    struct verify_job job = {.file = model->file, .pool = pool, .comm = comm, .mode = verify};
    const uint8_t *base;
    int rc = backend->load(device, &base, shard_file_payload(model->file), shard_file_payload_bytes(model->file),
                           verify_piece, &job, err);
    return rc ? rc : bind_model(model, base, err);
}

void model_close(struct model *model)
{
    free(model->weights.layers);
    free(model->path);
    shard_file_close(model->file);
    *model = (struct model){0};
}
