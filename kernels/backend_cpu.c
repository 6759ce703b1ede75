// The backend of the host: operations over rows on a kernel table, dealt to a thread pool. See backend.h.
//
// Shapes of a step with n rows on one rank (q = num_heads_local * head_dim, kv = num_kv_heads_local * head_dim):
//   residual [n][hidden]    the stream; the same bits on every rank
//   qkv      [n][q + 2 kv]  this rank's heads
//   attended [n][q]
//   gate_up  [n][2 * intermediate_local]
//   partial  [n][hidden]    this rank's part of a sum
#include "formats/checked.h"
#include "formats/number_formats.h"
#include "kernels/backend.h"
#include "kernels/kv.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

struct device {
    const struct kernels *k;
    struct thread_pool *pool;
    struct device_shape shape;
    const struct weights *weights;
    int64_t q_size, kv_size, mlp_size;

    const struct token_row *rows; // of the step under way
    int64_t count;
    struct kv_pages pages;

    float *residual, *normed, *qkv, *attended, *gate_up, *partial;
    float *cosines, *sines; // [max_rows][head_dim / 2]
    float *scores;          // [threads][context]
    struct activations act; // the input of the next product
    uint8_t *kv;            // [num_layers][k, v][num_pages][num_kv_heads][KV_PAGE_TOKENS][head_dim]
    uint64_t kv_bytes;      // mapped, so that untouched pages cost nothing
};

// ---- memory ----------------------------------------------------------------------------------------------------

static int64_t largest(int64_t a, int64_t b) { return a > b ? a : b; }

// Columns of the widest matmul input on this rank.
static int64_t widest_input(const struct model_desc *desc, const struct rank_share *share)
{
    return largest(desc->hidden_size, largest(share->num_heads_local * desc->head_dim, share->intermediate_local));
}

// Floats that a device keeps for one row.
static uint64_t row_floats(const struct model_desc *desc, const struct rank_share *share)
{
    uint64_t q = (uint64_t)(share->num_heads_local * desc->head_dim),
             kv = (uint64_t)(share->num_kv_heads_local * desc->head_dim);
    return 3 * (uint64_t)desc->hidden_size + 2 * q + 2 * kv + 2 * (uint64_t)share->intermediate_local +
           (uint64_t)desc->head_dim;
}

static int cpu_open(struct device **out, const struct device_options *options, struct error *err)
{
    struct device *d = calloc(1, sizeof *d);
    if (!d)
        return error_set(err, ERR_MEMORY, "no memory for a rank's buffers");
    d->k = options->kernels;
    d->pool = options->pool;
    *out = d;
    return 0;
}

static void free_buffers(struct device *d)
{
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
    if (d->kv)
        munmap(d->kv, d->kv_bytes ? d->kv_bytes : 1);
}

static void cpu_close(struct device *d)
{
    if (!d)
        return;
    free_buffers(d);
    free(d);
}

static void cpu_describe(const struct device *d, char text[DEVICE_TEXT_BYTES])
{
    snprintf(text, DEVICE_TEXT_BYTES, "cpu, %s kernels, %d threads", d->k->name, thread_pool_size(d->pool));
}

static uint64_t cpu_host_bytes(const struct device_shape *s, int threads)
{
    uint64_t activations = round_up((uint64_t)widest_input(s->desc, s->share), ACT_GROUP) * 6;
    return (uint64_t)s->max_rows * (row_floats(s->desc, s->share) * sizeof(float) + activations) +
           (uint64_t)threads * (uint64_t)s->context * sizeof(float);
}

static int cpu_plan(struct device *d, const struct device_shape *s, struct memory_plan *plan, struct error *err)
{
    (void)err;
    plan->kv_bytes = kv_bytes(s->desc, s->share, s->num_pages, s->kv_format);
    plan->scratch_bytes = cpu_host_bytes(s, thread_pool_size(d->pool));
    plan->available_bytes = UINT64_MAX; // the parent knows the host's memory
    plan->device = -1;
    return 0;
}

// The file is mapped and read where it lies.
static int cpu_load(struct device *d, const uint8_t **base, const uint8_t *mapped, uint64_t bytes,
                    payload_check_fn *check, void *arg, struct error *err)
{
    (void)d;
    *base = mapped;
    return check(arg, mapped, 0, bytes, err);
}

static float *floats(int64_t count) { return calloc((size_t)(count > 0 ? count : 1), sizeof(float)); }

static int cpu_prepare(struct device *d, const struct device_shape *s, const struct weights *weights, struct error *err)
{
    const struct model_desc *desc = s->desc;
    d->shape = *s;
    d->weights = weights;
    d->q_size = s->share->num_heads_local * desc->head_dim;
    d->kv_size = s->share->num_kv_heads_local * desc->head_dim;
    d->mlp_size = s->share->intermediate_local;
    d->residual = floats(s->max_rows * desc->hidden_size);
    d->normed = floats(s->max_rows * desc->hidden_size);
    d->partial = floats(s->max_rows * desc->hidden_size);
    d->qkv = floats(s->max_rows * (d->q_size + 2 * d->kv_size));
    d->attended = floats(s->max_rows * d->q_size);
    d->gate_up = floats(s->max_rows * 2 * d->mlp_size);
    d->cosines = floats(s->max_rows * (desc->head_dim / 2));
    d->sines = floats(s->max_rows * (desc->head_dim / 2));
    d->scores = floats(thread_pool_size(d->pool) * s->context);
    if (!d->residual || !d->normed || !d->partial || !d->qkv || !d->attended || !d->gate_up || !d->cosines ||
        !d->sines || !d->scores)
        return error_set(err, ERR_MEMORY, "no memory for the buffers of %lld rows", (long long)s->max_rows);
    d->kv_bytes = kv_bytes(desc, s->share, s->num_pages, s->kv_format);
    void *kv = mmap(NULL, d->kv_bytes ? d->kv_bytes : 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (kv == MAP_FAILED)
        return error_set(err, ERR_MEMORY, "no memory for a KV cache of %llu bytes; ask for a smaller --context",
                         (unsigned long long)d->kv_bytes);
    d->kv = kv;
    return activations_alloc(&d->act, s->max_rows, widest_input(desc, s->share), err);
}

// ---- the step --------------------------------------------------------------------------------------------------

static void rope_row(void *arg, int64_t row, int thread)
{
    (void)thread;
    struct device *d = arg;
    int64_t half = d->shape.desc->head_dim / 2;
    d->k->rope_table(d->cosines + row * half, d->sines + row * half, d->weights->inv_freq, half, d->rows[row].position,
                     (float)d->shape.desc->rope_attention_factor);
}

static int cpu_begin(struct device *d, const struct token_row *rows, int64_t count, enum phase phase,
                     const struct kv_pages *pages, struct error *err)
{
    (void)phase; // one arithmetic for both
    (void)err;
    d->rows = rows;
    d->count = count;
    d->pages = *pages;
    thread_pool_run(d->pool, rope_row, d, count);
    return 0;
}

// The row is rounded to bfloat16, at every tp_size, so that a sum over ranks on a bf16 wire is exact and the residual starts with the same
// bits whatever the split.
static void embed_row(void *arg, int64_t row, int thread)
{
    (void)thread;
    struct device *d = arg;
    const struct rank_share *share = d->shape.share;
    int64_t hidden = d->shape.desc->hidden_size, local = (int64_t)d->rows[row].token - share->vocab_begin;
    float *x = d->residual + row * hidden;
    if (local < 0 || local >= share->vocab_local) {
        memset(x, 0, (size_t)hidden * sizeof *x);
        return;
    }
    d->k->dequantize_row(x, &d->weights->embedding, local);
    for (int64_t i = 0; i < hidden; i++)
        x[i] = bf16_to_f32(f32_to_bf16(x[i])) + 0.0f; // a sum of ranks has no -0.0
}

static int cpu_embed(struct device *d, struct error *err)
{
    (void)err;
    thread_pool_run(d->pool, embed_row, d, d->count);
    return 0;
}

// ---- matrix products -------------------------------------------------------------------------------------------

struct prepare_job {
    struct device *d;
    const struct matrix *next;
    const float *x;
    int64_t x_stride;
};

static void prepare_row(void *arg, int64_t row, int thread)
{
    (void)thread;
    struct prepare_job *job = arg;
    job->d->k->prepare(&job->d->act, job->next, job->x, job->x_stride, row, row + 1);
}

static void prepare_input(struct device *d, const struct matrix *next, const float *x, int64_t x_stride, int64_t count)
{
    struct prepare_job job = {d, next, x, x_stride};
    thread_pool_run(d->pool, prepare_row, &job, count);
}

struct product {
    struct device *d;
    const struct matrix *w;
    float *y;
    int64_t y_stride;
    int64_t tokens, rows_per_task;
};

static void product_rows(void *arg, int64_t task, int thread)
{
    (void)thread;
    struct product *p = arg;
    int64_t begin = task * p->rows_per_task, end = begin + p->rows_per_task, rows = (int64_t)p->w->shape.rows;
    p->d->k->matmul(p->y, p->y_stride, p->w, &p->d->act, p->tokens, begin, end < rows ? end : rows);
}

// y[tokens][w.rows] = input[tokens][w.cols] * w^T, rows of w dealt to the threads.
static void multiply(struct device *d, float *y, int64_t y_stride, const struct matrix *w, int64_t tokens)
{
    int64_t blocks = (int64_t)div_up(w->shape.rows, WEIGHT_ROW_UNIT);
    int64_t wanted_tasks = 4 * (int64_t)thread_pool_size(d->pool); // enough to even out a disturbed thread
    int64_t blocks_per_task = largest(1, blocks / wanted_tasks);
    struct product p = {d, w, y, y_stride, tokens, blocks_per_task * WEIGHT_ROW_UNIT};
    thread_pool_run(d->pool, product_rows, &p, (int64_t)div_up((uint64_t)blocks, (uint64_t)blocks_per_task));
}

static float *buffer_of(const struct device *d, enum buffer buffer, int64_t *stride)
{
    switch (buffer) {
    case BUFFER_QKV:
        *stride = d->q_size + 2 * d->kv_size;
        return d->qkv;
    case BUFFER_GATE_UP:
        *stride = 2 * d->mlp_size;
        return d->gate_up;
    case BUFFER_PARTIAL:
        *stride = d->shape.desc->hidden_size;
        return d->partial;
    case BUFFER_RESIDUAL:
        break;
    }
    *stride = d->shape.desc->hidden_size;
    return d->residual;
}

static int cpu_linear(struct device *d, enum buffer out, const struct matrix *w, struct error *err)
{
    int64_t stride;
    float *y = buffer_of(d, out, &stride);
    (void)err;
    multiply(d, y, stride, w, d->count);
    return 0;
}

// ---- rows ------------------------------------------------------------------------------------------------------

struct norm_job {
    struct device *d;
    bool add;
    const float *bias, *weight;
    const int64_t *row_index;
};

static void norm_row(void *arg, int64_t row, int thread)
{
    (void)thread;
    struct norm_job *job = arg;
    struct device *d = job->d;
    int64_t hidden = d->shape.desc->hidden_size;
    float *residual = d->residual + row * hidden, *partial = d->partial + row * hidden;
    if (job->add && job->bias)
        d->k->add(partial, job->bias, hidden);
    if (job->add)
        d->k->add(residual, partial, hidden);
    d->k->rms_norm(d->normed + row * hidden, residual, job->weight, hidden, (float)d->shape.desc->norm_eps);
}

static int cpu_norm(struct device *d, bool add, const float *bias, const float *weight, const struct matrix *next,
                    struct error *err)
{
    struct norm_job job = {.d = d, .add = add, .bias = bias, .weight = weight};
    (void)err;
    thread_pool_run(d->pool, norm_row, &job, d->count);
    prepare_input(d, next, d->normed, d->shape.desc->hidden_size, d->count);
    return 0;
}

struct activate_job {
    struct device *d;
    const float *bias;
};

static void activate_row(void *arg, int64_t row, int thread)
{
    (void)thread;
    struct activate_job *job = arg;
    struct device *d = job->d;
    float *gate = d->gate_up + row * 2 * d->mlp_size;
    if (job->bias)
        d->k->add(gate, job->bias, 2 * d->mlp_size);
    d->k->silu_mul(gate, gate, gate + d->mlp_size, d->mlp_size);
}

static int cpu_activate(struct device *d, const float *bias, const struct matrix *next, struct error *err)
{
    struct activate_job job = {d, bias};
    (void)err;
    thread_pool_run(d->pool, activate_row, &job, d->count);
    prepare_input(d, next, d->gate_up, 2 * d->mlp_size, d->count);
    return 0;
}

// ---- attention -------------------------------------------------------------------------------------------------

static struct kv_view view_of(const struct device *d, int64_t layer, int32_t sequence)
{
    const struct device_shape *s = &d->shape;
    uint64_t half = kv_bytes(s->desc, s->share, s->num_pages, s->kv_format) / (2 * (uint64_t)s->desc->num_layers);
    uint8_t *k = d->kv + 2 * half * (uint64_t)layer;
    return (struct kv_view){.k = k,
                            .v = k + half,
                            .format = s->kv_format,
                            .pages = d->pages.pages + sequence * d->pages.pages_per_sequence,
                            .num_kv_heads = s->share->num_kv_heads_local,
                            .head_dim = s->desc->head_dim};
}

struct attention_job {
    struct device *d;
    int64_t layer;
};

static void finish_qkv_row(void *arg, int64_t row, int thread)
{
    (void)thread;
    struct attention_job *job = arg;
    struct device *d = job->d;
    const struct model_desc *desc = d->shape.desc;
    const struct layer *layer = &d->weights->layers[job->layer];
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
    struct kv_view kv = view_of(d, job->layer, d->rows[row].sequence);
    kv_store(&kv, d->rows[row].position, k, v);
}

static int cpu_finish_qkv(struct device *d, int64_t layer, struct error *err)
{
    struct attention_job job = {d, layer};
    (void)err;
    thread_pool_run(d->pool, finish_qkv_row, &job, d->count);
    return 0;
}

// One task is one row and one query head.
static void attend_head(void *arg, int64_t task, int thread)
{
    struct attention_job *job = arg;
    struct device *d = job->d;
    const struct model_desc *desc = d->shape.desc;
    const struct rank_share *share = d->shape.share;
    int64_t row = task / share->num_heads_local, head = task % share->num_heads_local;
    int64_t kv_head = (share->head_begin + head) / (desc->num_heads / desc->num_kv_heads) - share->kv_head_begin;
    int64_t end = d->rows[row].position + 1;
    int64_t first = desc->sliding_window > 0 && end > desc->sliding_window ? end - desc->sliding_window : 0;
    struct kv_view kv = view_of(d, job->layer, d->rows[row].sequence);
    d->k->attention(d->attended + row * d->q_size + head * desc->head_dim,
                    d->qkv + row * (d->q_size + 2 * d->kv_size) + head * desc->head_dim, &kv, kv_head, first, end,
                    1.0f / sqrtf((float)desc->head_dim), d->scores + thread * d->shape.context);
}

static int cpu_attend(struct device *d, int64_t layer, const struct matrix *next, struct error *err)
{
    struct attention_job job = {d, layer};
    (void)err;
    thread_pool_run(d->pool, attend_head, &job, d->count * d->shape.share->num_heads_local);
    prepare_input(d, next, d->attended, d->q_size, d->count);
    return 0;
}

// ---- exchange and logits ---------------------------------------------------------------------------------------

static int cpu_lend(struct device *d, enum buffer buffer, float **host, struct error *err)
{
    int64_t stride;
    (void)err;
    *host = buffer_of(d, buffer, &stride);
    return 0;
}

static int cpu_returned(struct device *d, enum buffer buffer, struct error *err)
{
    (void)d;
    (void)buffer;
    (void)err;
    return 0;
}

// Into normed, so that the residual stays as it is and logits may be asked for again.
static void head_norm_row(void *arg, int64_t i, int thread)
{
    (void)thread;
    struct norm_job *job = arg;
    struct device *d = job->d;
    int64_t hidden = d->shape.desc->hidden_size, row = job->row_index ? job->row_index[i] : i;
    float *x = d->normed + i * hidden;
    memcpy(x, d->partial + row * hidden, (size_t)hidden * sizeof *x);
    if (job->bias)
        d->k->add(x, job->bias, hidden);
    d->k->add(x, d->residual + row * hidden, hidden);
    d->k->rms_norm(x, x, job->weight, hidden, (float)d->shape.desc->norm_eps);
}

static int cpu_logits(struct device *d, const float *bias, const int64_t *row_index, int64_t count, float *host,
                      int64_t stride, struct error *err)
{
    struct norm_job job = {.d = d, .bias = bias, .weight = d->weights->final_norm, .row_index = row_index};
    (void)err;
    thread_pool_run(d->pool, head_norm_row, &job, count);
    prepare_input(d, &d->weights->head, d->normed, d->shape.desc->hidden_size, count);
    multiply(d, host, stride, &d->weights->head, count);
    return 0;
}

const struct backend backend_cpu = {
    .abi = BACKEND_ABI,
    .name = "cpu",
    .prefill_rows = 256,
    .host_bytes = cpu_host_bytes,
    .open = cpu_open,
    .close = cpu_close,
    .describe = cpu_describe,
    .plan = cpu_plan,
    .load = cpu_load,
    .prepare = cpu_prepare,
    .begin = cpu_begin,
    .embed = cpu_embed,
    .norm = cpu_norm,
    .linear = cpu_linear,
    .finish_qkv = cpu_finish_qkv,
    .attend = cpu_attend,
    .activate = cpu_activate,
    .lend = cpu_lend,
    .returned = cpu_returned,
    .logits = cpu_logits,
};
