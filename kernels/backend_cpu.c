// The backend of the host: operations over rows on a kernel table, dealt to a thread pool. See backend.h.
#include "formats/checked.h"
#include "formats/number_formats.h"
#include "kernels/cpu_attention.h"
#include "kernels/cpu_device.h"
#include "kernels/cpu_experts.h"
#include "kernels/wire.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { CPU_STEP_ROWS = 256, CPU_WINDOW_ROWS = 32 };

// ---- memory ----------------------------------------------------------------------------------------------------

// Bytes of one prepared row of `cols` columns: f32, int8, scales and sums.
static uint64_t prepared_bytes(int64_t cols) { return (round_up((uint64_t)cols, ACT_GROUP) + ACT_GROUP) * 6; }

static uint64_t row_bytes(const struct model_desc *desc, const struct rank_share *share)
{
    uint64_t floats = (uint64_t)(attended_width(desc, share) + 2 * desc->rotary_dim);
    for (int b = 0; b < BUFFER_COUNT; b++)
        floats += (uint64_t)buffer_width(desc, share, (enum buffer)b);
    uint64_t slot = (uint64_t)(2 * share->expert_size_local + desc->hidden_size) * sizeof(float) +
                    prepared_bytes(larger_of(desc->hidden_size, share->expert_size_local)) +
                    sizeof(struct chosen_expert) + sizeof(int32_t);
    return floats * sizeof(float) + prepared_bytes(widest_input(desc, share)) + (uint64_t)expert_slots(desc, 1) * slot;
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
    for (int b = 0; b < BUFFER_COUNT; b++)
        free(d->all_buffers[b]);
    free(d->attended);
    for (int table = 0; table < 2; table++) {
        free(d->all_cosines[table]);
        free(d->all_sines[table]);
    }
    free(d->head_rows);
    activations_free(&d->act);
    cpu_attention_free(d);
    cpu_experts_free(d);
    if (d->kv)
        munmap(d->kv, d->kv_bytes ? d->kv_bytes : 1);
    if (d->payload)
        munmap(d->payload, d->payload_bytes);
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
    return (uint64_t)s->max_rows * row_bytes(s->desc, s->share) + cpu_attention_bytes(s, threads) +
           (uint64_t)threads * (uint64_t)s->desc->hidden_size * sizeof(float);
}

int64_t cpu_step_rows(const struct device_shape *shape, int threads, uint64_t row_extra_bytes, int64_t least)
{
    enum { BUFFERS_BYTES = 56 << 20, ROWS_UNIT = 32 };
    struct device_shape s = *shape;
    least = larger_of(least, CPU_LEAST_ROWS);
    s.max_rows = 0;
    uint64_t fixed = cpu_host_bytes(&s, threads); // what shorter steps do not change
    for (s.max_rows = shape->max_rows; s.max_rows - ROWS_UNIT >= least; s.max_rows -= ROWS_UNIT)
        if (cpu_host_bytes(&s, threads) + (uint64_t)s.max_rows * row_extra_bytes - fixed <= BUFFERS_BYTES)
            break;
    return s.max_rows;
}

static int cpu_plan(struct device *d, const struct device_shape *s, struct memory_plan *plan, struct error *err)
{
    (void)err;
    plan->kv_bytes = kv_bytes(s->desc, s->share, s->num_pages, s->kv_format);
    plan->scratch_bytes = cpu_host_bytes(s, thread_pool_size(d->pool));
    plan->exchange_bytes = 0;
    plan->available_bytes = UINT64_MAX; // the parent knows the host's memory
    plan->device = -1;
    return 0;
}

static int cpu_load_begin(struct device *d, const uint8_t *mapped, uint64_t bytes, struct load_target *target,
                          struct error *err)
{
    *target = (struct load_target){.base = mapped};
    if (mapped)
        return 0;
    d->payload_bytes = bytes > 0 ? bytes : 1;
    void *payload = mmap(NULL, d->payload_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (payload == MAP_FAILED)
        return error_set(err, ERR_MEMORY, "no memory for %llu bytes of weights", (unsigned long long)bytes);
    madvise(payload, d->payload_bytes, MADV_HUGEPAGE); // where it is to be had
    d->payload = payload;
    *target = (struct load_target){.base = payload, .place = payload};
    return 0;
}

static void cpu_load_end(struct device *d) { (void)d; }

static float *floats(int64_t count) { return calloc((size_t)(count > 0 ? count : 1), sizeof(float)); }

static int alloc_rows(struct device *d, struct error *err)
{
    const struct device_shape *s = &d->shape;
    int64_t half = s->desc->rotary_dim / 2, threads = thread_pool_size(d->pool);
    bool ok = true;
    for (int b = 0; b < BUFFER_COUNT; b++)
        ok &= (d->all_buffers[b] = floats(s->max_rows * buffer_width(s->desc, s->share, (enum buffer)b))) != NULL;
    for (int table = 0; table < 2; table++)
        ok &= (d->all_cosines[table] = floats(s->max_rows * half)) != NULL &&
              (d->all_sines[table] = floats(s->max_rows * half)) != NULL;
    ok &= (d->attended = floats(s->max_rows * attended_width(s->desc, s->share))) != NULL;
    ok &= (d->head_rows = floats(threads * s->desc->hidden_size)) != NULL;
    if (!ok)
        return error_set(err, ERR_MEMORY, "no memory for the buffers of %lld rows", (long long)s->max_rows);
    return activations_alloc(&d->act, s->max_rows, widest_input(s->desc, s->share), err);
}

// Keys and values of a long context are read at the memory's speed from large pages only. The front of each layer's keys and of its values,
// which every context takes, keeps small ones: a first token would wait until two large ones of each layer were cleared.
static void want_large_pages(const struct device *d)
{
    static const uint64_t large = 2 << 20;
    uint64_t layer = kv_layer_bytes(&d->kv_shape, d->shape.num_pages, d->shape.kv_format);
    uint64_t part = kv_keys_bytes(&d->kv_shape, d->shape.num_pages, d->shape.kv_format);
    for (uint64_t at = 0; part > 0 && at < d->kv_bytes; at += layer)
        for (uint64_t begin = at; begin + part <= at + layer; begin += part) {
            uint64_t first = round_up((uint64_t)(uintptr_t)d->kv + begin + large, large);
            uint64_t end = ((uint64_t)(uintptr_t)d->kv + begin + part) / large * large;
            if (first < end)
                madvise((void *)(uintptr_t)first, end - first, MADV_HUGEPAGE); // where it is to be had
        }
}

static int cpu_prepare(struct device *d, const struct device_shape *s, const struct weights *weights, struct error *err)
{
    int rc;
    d->shape = *s;
    d->weights = weights;
    d->kv_shape = kv_shape(s->desc, s->share);
    d->q_size = s->share->num_heads_local * s->desc->head_dim;
    d->kv_size = d->kv_shape.latent ? 0 : d->kv_shape.heads * s->desc->head_dim;
    if ((rc = alloc_rows(d, err)) || (rc = cpu_attention_alloc(d, err)) || (rc = cpu_experts_alloc(d, err)))
        return rc;
    d->kv_bytes = kv_bytes(s->desc, s->share, s->num_pages, s->kv_format);
    void *kv = mmap(NULL, d->kv_bytes ? d->kv_bytes : 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (kv == MAP_FAILED)
        return error_set(err, ERR_MEMORY, "no memory for a KV cache of %llu bytes; ask for a smaller --context",
                         (unsigned long long)d->kv_bytes);
    d->kv = kv;
    want_large_pages(d);
    return 0;
}

// ---- the step --------------------------------------------------------------------------------------------------

static void rope_row(void *arg, int64_t row, int thread)
{
    (void)thread;
    struct device *d = arg;
    const float *tables[2] = {rope_of(d->weights, &d->shape), d->weights->rope_local};
    int64_t half = d->shape.desc->rotary_dim / 2;
    for (int table = 0; table < 2; table++) // the factor belongs to the first one's scaling
        if (tables[table])
            d->k->rope_table(d->cosines[table] + row * half, d->sines[table] + row * half, tables[table], half,
                             d->rows[row].position, table == 0 ? (float)d->shape.desc->rope_attention_factor : 1.0f);
}

// The sum of a row's parts, whose groups' owners are the ranks in turn.
static void sum_row(const struct device *d, int64_t row, float *sum)
{
    const struct rank_parts *parts = &d->parts;
    int64_t hidden = d->shape.desc->hidden_size, step_row = d->rows - d->step_rows + row;
    for (int64_t at = 0, group = 0; at < hidden; at += WIRE_GROUP, group++) {
        const float *part[RANK_PARTS_MOST];
        for (int rank = 0; rank < parts->ranks; rank++)
            part[rank] = parts->part[rank] + step_row * hidden + at;
        wire_sum_group(sum + at, part, (int)(group % parts->ranks), parts->ranks,
                       hidden - at < WIRE_GROUP ? (int)(hidden - at) : WIRE_GROUP, parts->wire);
    }
}

static void sum_row_task(void *arg, int64_t row, int thread)
{
    (void)thread;
    struct device *d = arg;
    sum_row(d, row, d->buffers[BUFFER_PARTIAL] + row * d->shape.desc->hidden_size);
}

// BUFFER_PARTIAL is about to be read, or the window to move.
static void finish_sum(struct device *d)
{
    if (d->parts.ranks > 0)
        thread_pool_run(d->pool, sum_row_task, d, d->count);
    d->parts.ranks = 0;
}

static int cpu_window(struct device *d, int64_t first, int64_t count, struct error *err)
{
    int64_t half = d->shape.desc->rotary_dim / 2;
    if (first < 0 || count < 0 || first % CPU_WINDOW_ROWS || first + count > d->step_count)
        return error_set(err, ERR_OTHER, "a window of rows %lld to %lld in a step of %lld", (long long)first,
                         (long long)(first + count), (long long)d->step_count);
    finish_sum(d);
    d->rows = d->step_rows + first;
    d->count = count;
    for (int b = 0; b < BUFFER_COUNT; b++)
        d->buffers[b] = d->all_buffers[b] + first * buffer_width(d->shape.desc, d->shape.share, (enum buffer)b);
    if (d->partial)
        d->buffers[BUFFER_PARTIAL] = d->partial + first * d->shape.desc->hidden_size;
    for (int table = 0; table < 2; table++) {
        d->cosines[table] = d->all_cosines[table] + first * half;
        d->sines[table] = d->all_sines[table] + first * half;
    }
    return 0;
}

static int cpu_begin(struct device *d, const struct token_row *rows, int64_t count, enum phase phase,
                     const struct kv_pages *pages, struct error *err)
{
    (void)phase;        // one arithmetic for both
    d->parts.ranks = 0; // of a step whose sums nobody reads any more
    d->step_rows = rows;
    d->step_count = count;
    d->pages = *pages;
    int rc = cpu_window(d, 0, count, err);
    if (rc)
        return rc;
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
    float *x = d->buffers[BUFFER_RESIDUAL] + row * hidden;
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

struct scale_job {
    struct device *d;
    float factor;
};

static void scale_row(void *arg, int64_t row, int thread)
{
    (void)thread;
    struct scale_job *job = arg;
    int64_t hidden = job->d->shape.desc->hidden_size;
    float *x = job->d->buffers[BUFFER_RESIDUAL] + row * hidden;
    for (int64_t i = 0; i < hidden; i++)
        x[i] *= job->factor;
}

static int cpu_scale_residual(struct device *d, float factor, struct error *err)
{
    struct scale_job job = {d, factor};
    (void)err;
    thread_pool_run(d->pool, scale_row, &job, d->count);
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

static void prepare_input(struct device *d, int64_t count, const struct matrix *next)
{
    struct prepare_job job = {d, next, d->input, d->input_stride};
    d->input_kind = next->shape.kind;
    thread_pool_run(d->pool, prepare_row, &job, count);
}

void cpu_set_input(struct device *d, const float *x, int64_t x_stride, int64_t count, const struct matrix *next)
{
    d->input = x;
    d->input_stride = x_stride;
    prepare_input(d, count, next);
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
    int64_t blocks_per_task = larger_of(1, blocks / wanted_tasks);
    struct product p = {d, w, y, y_stride, tokens, blocks_per_task * WEIGHT_ROW_UNIT};
    thread_pool_run(d->pool, product_rows, &p, (int64_t)div_up((uint64_t)blocks, (uint64_t)blocks_per_task));
}

static int cpu_linear(struct device *d, enum buffer out, const struct matrix *w, struct error *err)
{
    (void)err;
    if (d->input_kind != w->shape.kind)
        prepare_input(d, d->count, w);
    multiply(d, d->buffers[out], (int64_t)w->shape.rows, w, d->count);
    return 0;
}

// ---- rows ------------------------------------------------------------------------------------------------------

struct norm_job {
    struct device *d;
    const struct join *join;
    const float *weight, *order;
    const int64_t *row_index;
    int64_t first, stride; // of a rank's own rows
    bool sums;             // the ranks' parts are added up first
};

// residual += residual_scale * RMSNorm(partial + bias). partial is changed.
static void join_row(const struct norm_job *job, float *residual, float *partial)
{
    struct device *d = job->d;
    const struct model_desc *desc = d->shape.desc;
    int64_t hidden = desc->hidden_size;
    if (job->join->bias)
        d->k->add(partial, job->join->bias, hidden);
    if (job->join->norm)
        d->k->rms_norm(partial, partial, job->join->norm, hidden, (float)desc->norm_eps);
    if (desc->residual_scale != 1)
        d->k->add_scaled(residual, partial, hidden, (float)desc->residual_scale);
    else
        d->k->add(residual, partial, hidden);
}

// The residual takes the sum; its normed row.
static void join_and_norm(const struct norm_job *job, int64_t row)
{
    struct device *d = job->d;
    int64_t hidden = d->shape.desc->hidden_size;
    float *residual = d->buffers[BUFFER_RESIDUAL] + row * hidden, *normed = d->buffers[BUFFER_NORMED] + row * hidden;
    if (job->join)
        join_row(job, residual, d->buffers[BUFFER_PARTIAL] + row * hidden);
    if (job->weight)
        d->k->rms_norm(normed, residual, job->weight, hidden, (float)d->shape.desc->norm_eps);
    else
        memcpy(normed, residual, (size_t)hidden * sizeof *normed);
}

static void order_columns(const struct norm_job *job, int64_t row)
{
    struct device *d = job->d;
    int64_t hidden = d->shape.desc->hidden_size;
    float *partial = d->buffers[BUFFER_PARTIAL] + row * hidden, *normed = d->buffers[BUFFER_NORMED] + row * hidden;
    if (!job->order)
        return;
    memcpy(partial, normed, (size_t)hidden * sizeof *partial); // partial has been taken and is free
    for (int64_t i = 0; i < hidden; i++)
        normed[i] = partial[(int64_t)job->order[i]];
}

static void norm_row(void *arg, int64_t row, int thread)
{
    const struct norm_job *job = arg;
    if (job->sums)
        sum_row_task(job->d, row, thread);
    join_and_norm(job, row);
    order_columns(job, row);
}

static void norm_own_row(void *arg, int64_t i, int thread)
{
    (void)thread;
    const struct norm_job *job = arg;
    join_and_norm(job, job->first + i * job->stride);
}

static void order_row(void *arg, int64_t row, int thread)
{
    (void)thread;
    order_columns(arg, row);
}

static int cpu_norm(struct device *d, const struct join *join, const float *weight, const float *order,
                    const struct matrix *next, struct error *err)
{
    struct norm_job job = {.d = d, .join = join, .weight = weight, .order = order, .sums = d->parts.ranks > 0};
    (void)err;
    thread_pool_run(d->pool, norm_row, &job, d->count);
    d->parts.ranks = 0;
    cpu_set_input(d, d->buffers[BUFFER_NORMED], d->shape.desc->hidden_size, d->count, next);
    return 0;
}

static int cpu_norm_own(struct device *d, const struct join *join, const float *weight, int64_t first, int64_t stride,
                        struct error *err)
{
    struct norm_job job = {.d = d, .join = join, .weight = weight, .first = first, .stride = stride};
    (void)err;
    finish_sum(d);
    if (first < d->count)
        thread_pool_run(d->pool, norm_own_row, &job, (d->count - first + stride - 1) / stride);
    return 0;
}

static int cpu_take_normed(struct device *d, const float *order, const struct matrix *next, struct error *err)
{
    struct norm_job job = {.d = d, .order = order};
    (void)err;
    if (order)
        thread_pool_run(d->pool, order_row, &job, d->count);
    cpu_set_input(d, d->buffers[BUFFER_NORMED], d->shape.desc->hidden_size, d->count, next);
    return 0;
}

static void norm_latent_row(void *arg, int64_t row, int thread)
{
    (void)thread;
    struct norm_job *job = arg;
    struct device *d = job->d;
    int64_t cols = d->shape.desc->latent.q_rank;
    float *x = d->buffers[BUFFER_Q_LATENT] + row * cols;
    d->k->rms_norm(x, x, job->weight, cols, (float)model_latent_norm_eps(d->shape.desc));
}

static int cpu_norm_latent(struct device *d, int64_t layer, struct error *err)
{
    struct norm_job job = {.d = d, .weight = d->weights->layers[layer].q_a_norm};
    (void)err;
    thread_pool_run(d->pool, norm_latent_row, &job, d->count);
    cpu_set_input(d, d->buffers[BUFFER_Q_LATENT], d->shape.desc->latent.q_rank, d->count,
                  &d->weights->layers[layer].q_b);
    return 0;
}

struct activate_job {
    struct device *d;
    const struct mlp *mlp;
};

static void activate_row(void *arg, int64_t row, int thread)
{
    (void)thread;
    struct activate_job *job = arg;
    struct device *d = job->d;
    int64_t size = (int64_t)job->mlp->down.shape.cols;
    float *gate = d->buffers[BUFFER_GATE_UP] + row * 2 * size;
    if (job->mlp->gate_up_bias)
        d->k->add(gate, job->mlp->gate_up_bias, 2 * size);
    d->k->activate(gate, gate, gate + size, size, d->shape.desc->activation);
    if (d->shape.desc->mlp_rotation > 0)
        d->k->hadamard(gate, size, d->shape.desc->mlp_rotation);
}

static int cpu_activate(struct device *d, const struct mlp *mlp, struct error *err)
{
    struct activate_job job = {d, mlp};
    (void)err;
    thread_pool_run(d->pool, activate_row, &job, d->count);
    cpu_set_input(d, d->buffers[BUFFER_GATE_UP], 2 * (int64_t)mlp->down.shape.cols, d->count, &mlp->down);
    return 0;
}

// ---- exchange and logits ---------------------------------------------------------------------------------------

static int cpu_place_partial(struct device *d, float *rows, const struct rank_parts *parts, struct error *err)
{
    (void)err;
    finish_sum(d);
    d->partial = rows;
    d->buffers[BUFFER_PARTIAL] = rows + (d->rows - d->step_rows) * d->shape.desc->hidden_size;
    if (parts)
        d->parts = *parts;
    return 0;
}

static int cpu_lend(struct device *d, enum buffer buffer, bool overwrite, float **host, struct error *err)
{
    (void)overwrite, (void)err;
    if (buffer == BUFFER_PARTIAL)
        finish_sum(d);
    *host = d->buffers[buffer];
    return 0;
}

static int cpu_returned(struct device *d, enum buffer buffer, struct error *err)
{
    (void)d;
    (void)buffer;
    (void)err;
    return 0;
}

// Into BUFFER_NORMED, by way of copies, so that the residual and the ranks' parts stay as they are and logits may be asked for again.
static void head_norm_row(void *arg, int64_t i, int thread)
{
    struct norm_job *job = arg;
    struct device *d = job->d;
    int64_t hidden = d->shape.desc->hidden_size, row = job->row_index ? job->row_index[i] : i;
    float *x = d->buffers[BUFFER_NORMED] + i * hidden, *partial = d->head_rows + thread * hidden;
    memcpy(x, d->buffers[BUFFER_RESIDUAL] + row * hidden, (size_t)hidden * sizeof *x);
    if (job->sums)
        sum_row(d, row, partial);
    else
        memcpy(partial, d->buffers[BUFFER_PARTIAL] + row * hidden, (size_t)hidden * sizeof *partial);
    join_row(job, x, partial);
    d->k->rms_norm(x, x, job->weight, hidden, (float)d->shape.desc->norm_eps);
}

struct logits_job {
    struct device *d;
    float *logits;
    int64_t stride;
};

static void shape_logits(void *arg, int64_t row, int thread)
{
    (void)thread;
    struct logits_job *job = arg;
    const struct model_desc *desc = job->d->shape.desc;
    float *x = job->logits + row * job->stride;
    int64_t count = job->d->shape.share->vocab_local;
    for (int64_t i = 0; i < count && desc->logit_scale != 1; i++)
        x[i] *= (float)desc->logit_scale;
    if (desc->logit_softcap > 0)
        job->d->k->softcap(x, count, (float)desc->logit_softcap);
}

static int cpu_logits(struct device *d, const struct join *join, const int64_t *row_index, int64_t count, float *host,
                      int64_t stride, struct error *err)
{
    struct norm_job job = {
        .d = d, .join = join, .weight = d->weights->final_norm, .row_index = row_index, .sums = d->parts.ranks > 0};
    struct logits_job shaping = {d, host, stride};
    (void)err;
    thread_pool_run(d->pool, head_norm_row, &job, count);
    cpu_set_input(d, d->buffers[BUFFER_NORMED], d->shape.desc->hidden_size, count, &d->weights->head);
    multiply(d, host, stride, &d->weights->head, count);
    if (d->shape.desc->logit_scale != 1 || d->shape.desc->logit_softcap > 0)
        thread_pool_run(d->pool, shape_logits, &shaping, count);
    return 0;
}

const struct backend backend_cpu = {
    .abi = BACKEND_ABI,
    .name = "cpu",
    .prefill_rows = CPU_STEP_ROWS,
    .decode_rows = CPU_STEP_ROWS,
    .balance_rows = 8, // measured, int4 and int8
    .mixes_phases = true,
    .reads_map = true,
    .window_rows = CPU_WINDOW_ROWS,
    .host_bytes = cpu_host_bytes,
    .open = cpu_open,
    .close = cpu_close,
    .describe = cpu_describe,
    .plan = cpu_plan,
    .load_begin = cpu_load_begin,
    .load_end = cpu_load_end,
    .prepare = cpu_prepare,
    .begin = cpu_begin,
    .embed = cpu_embed,
    .scale_residual = cpu_scale_residual,
    .norm = cpu_norm,
    .linear = cpu_linear,
    .norm_latent = cpu_norm_latent,
    .squares = cpu_squares,
    .finish_qkv = cpu_finish_qkv,
    .attend = cpu_attend,
    .activate = cpu_activate,
    .route = cpu_route,
    .experts = cpu_experts,
    .lend = cpu_lend,
    .returned = cpu_returned,
    .window = cpu_window,
    .norm_own = cpu_norm_own,
    .take_normed = cpu_take_normed,
    .place_partial = cpu_place_partial,
    .logits = cpu_logits,
};
