// Norms and rotation of q and k, the KV cache, the heads. See cpu_attention.h.
#include "kernels/cpu_attention.h"

#include "formats/checked.h"
#include "kernels/attention.h"
#include "kernels/cpu_device.h"

#include <stdlib.h>
#include <string.h>

enum {
    PARTS_FLOATS = 1 << 20, // of chunks that are summed up by different threads
    TASKS_PER_THREAD = 4,   // wanted, so that no thread waits long for the last
    LEAST_TASKS = 2,        // of a thread, before chunks or heads of one row are dealt
    LEAST_HEADS = 4,        // of a task, for then keys are widened anew
};

struct attention_job {
    struct device *d;
    int64_t layer;
    // How attend is cut: blocks of rows of one sequence, kv heads, shares of a kv head's query heads, chunks of positions (1: not cut).
    // The results are the same however it is cut.
    int64_t blocks, shares, chunks;
};

// ---- scratch ---------------------------------------------------------------------------------------------------

static int64_t room_floats(const struct kv_shape *kv)
{
    return (int64_t)round_up((uint64_t)attention_room_floats(kv->k_dim, kv->v_dim), 16); // whole cache lines
}
static int64_t latent_floats(const struct kv_shape *kv)
{
    return kv->latent ? ATTENTION_QUERIES * (kv->k_dim + kv->v_dim) : 0;
}
static int64_t parts_floats(const struct device_shape *s, int64_t threads, const struct kv_shape *kv)
{
    return threads > 1 && s->context > KV_CHUNK_TOKENS && !kv->latent ? PARTS_FLOATS : 0;
}

uint64_t cpu_attention_bytes(const struct device_shape *s, int threads)
{
    struct kv_shape kv = kv_shape(s->desc, s->share);
    int64_t floats = threads * (room_floats(&kv) + latent_floats(&kv)) + parts_floats(s, threads, &kv);
    return (uint64_t)floats * sizeof(float) + (uint64_t)(s->max_rows + 1) * sizeof(int64_t);
}

int cpu_attention_alloc(struct device *d, struct error *err)
{
    struct attention_work *w = &d->attention;
    int64_t threads = thread_pool_size(d->pool);
    w->room_floats = room_floats(&d->kv_shape);
    w->parts_floats = parts_floats(&d->shape, threads, &d->kv_shape);
    w->blocks = calloc((size_t)d->shape.max_rows + 1, sizeof *w->blocks);
    w->room = aligned_alloc(64, (size_t)(threads * w->room_floats) * sizeof *w->room);
    w->latent = calloc((size_t)(threads * latent_floats(&d->kv_shape)) + 1, sizeof *w->latent);
    w->parts = calloc((size_t)w->parts_floats + 1, sizeof *w->parts);
    if (!w->blocks || !w->room || !w->latent || !w->parts)
        return error_set(err, ERR_MEMORY, "no memory for the scratch of attention");
    return 0;
}

void cpu_attention_free(struct device *d)
{
    free(d->attention.blocks);
    free(d->attention.room);
    free(d->attention.latent);
    free(d->attention.parts);
}

static const struct layer *layer_of(const struct attention_job *job) { return &job->d->weights->layers[job->layer]; }

static struct kv_view view_of(const struct device *d, int64_t layer, int32_t sequence)
{
    const struct device_shape *s = &d->shape;
    const struct kv_shape *kv = &d->kv_shape;
    uint8_t *k = d->kv + (uint64_t)layer * kv_layer_bytes(kv, s->num_pages, s->kv_format);
    uint64_t keys_bytes = kv_keys_bytes(kv, s->num_pages, s->kv_format);
    uint8_t *v = kv->latent ? k : k + keys_bytes;
    uint8_t *k_scale = kv_format_scaled(s->kv_format) ? v + keys_bytes : NULL;
    return (struct kv_view){
        .k = k,
        .v = v,
        .format = s->kv_format,
        .pages = d->pages.pages + sequence * d->pages.pages_per_sequence,
        .num_kv_heads = kv->heads,
        .k_dim = kv->k_dim,
        .v_dim = kv->v_dim,
        .v_stride = kv->k_dim,
        .k_scale = (uint16_t *)(void *)k_scale,
        .v_scale = k_scale ? (uint16_t *)(void *)(k_scale + kv_scales_bytes(kv, s->num_pages, s->kv_format)) : NULL};
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
    struct attention_job job = {.d = d, .layer = layer};
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
    if (kv_format_scaled(kv.format))
        kv_rotate(q, d->shape.share->num_heads_local, desc->head_dim, kv_rotate_back(desc->head_dim));
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
    struct attention_job job = {.d = d, .layer = layer};
    (void)err;
    thread_pool_run(d->pool, d->kv_shape.latent ? finish_latent_row : finish_qkv_row, &job, d->count);
    return 0;
}

// ---- heads -----------------------------------------------------------------------------------------------------

static void heads_of(const struct device *d, int64_t kv_head, int64_t *begin, int64_t *end)
{
    const struct model_desc *desc = d->shape.desc;
    const struct rank_share *share = d->shape.share;
    int64_t per_kv = desc->num_heads / desc->num_kv_heads;
    int64_t first = (share->kv_head_begin + kv_head) * per_kv - share->head_begin;
    *begin = d->kv_shape.latent || first < 0 ? 0 : first;
    *end = d->kv_shape.latent || first + per_kv > share->num_heads_local ? share->num_heads_local : first + per_kv;
}

static float *attended_of(const struct device *d, int64_t row, int64_t head)
{
    int64_t width = attended_width(d->shape.desc, d->shape.share);
    return d->attended + row * width + head * (width / d->shape.share->num_heads_local);
}

// What a query has summed up over a chunk: out, largest, sum.
static float *part_of(const struct attention_job *job, int64_t row, int64_t head, int64_t chunk)
{
    struct device *d = job->d;
    int64_t query = row * d->shape.share->num_heads_local + head;
    return d->attention.parts + (query * job->chunks + chunk) * (d->kv_shape.v_dim + 2);
}

// The queries of one task: rows and heads.
struct task {
    int64_t row_begin, row_end, head_begin, head_end;
    struct attention_query queries[ATTENTION_QUERIES];
};

static int64_t set_queries(const struct attention_job *job, struct task *task)
{
    struct device *d = job->d;
    const struct model_desc *desc = d->shape.desc;
    int64_t count = 0;
    for (int64_t row = task->row_begin; row < task->row_end; row++) {
        int64_t end = d->rows[row].position + 1;
        int64_t window = layer_of(job)->flags & LAYER_WINDOW ? desc->sliding_window : end;
        for (int64_t head = task->head_begin; head < task->head_end; head++, count++) {
            struct attention_query *query = &task->queries[count];
            *query = (struct attention_query){.q = qkv_of(d, row) + head * desc->head_dim,
                                              .first = end > window ? end - window : 0,
                                              .end = end,
                                              .out = attended_of(d, row, head)};
            attention_begin(query);
        }
    }
    return count;
}

// The latent's side of the queries: with key = K c and value = V c for a cached latent c, q . K c = (K^T q) . c, and the weighted sum of
// values is V times the weighted sum of latents (DeepSeek-V2, section 2.1: K and V absorbed). latent: [queries][k_dim + v_dim].
static void absorb_keys(const struct attention_job *job, struct task *task, float *latent)
{
    struct device *d = job->d;
    const struct latent_desc *desc = &d->shape.desc->latent;
    const struct matrix *w = &layer_of(job)->kv_b;
    int64_t stride = (int64_t)w->shape.cols_padded, heads = task->head_end - task->head_begin;
    int64_t rows = task->row_end - task->row_begin, floats = d->kv_shape.k_dim + d->kv_shape.v_dim;
    for (int64_t h = 0; h < heads; h++) {
        const uint16_t *keys =
            (const uint16_t *)w->data + (task->head_begin + h) * (desc->nope_dim + desc->v_dim) * stride;
        for (int64_t i = h; i < rows * heads; i += heads) {
            const float *q = task->queries[i].q;
            float *query = latent + i * floats;
            d->k->mix_rows(query, q, keys, stride, desc->nope_dim, desc->kv_rank);
            memcpy(query + desc->kv_rank, q + desc->nope_dim, (size_t)desc->rope_dim * sizeof *query);
            task->queries[i].q = query;
            task->queries[i].out = query + d->kv_shape.k_dim;
        }
    }
}

static void absorb_values(const struct attention_job *job, const struct task *task)
{
    struct device *d = job->d;
    const struct latent_desc *desc = &d->shape.desc->latent;
    const struct matrix *w = &layer_of(job)->kv_b;
    int64_t stride = (int64_t)w->shape.cols_padded, heads = task->head_end - task->head_begin;
    for (int64_t head = task->head_begin; head < task->head_end; head++) {
        const uint16_t *values =
            (const uint16_t *)w->data + (head * (desc->nope_dim + desc->v_dim) + desc->nope_dim) * stride;
        for (int64_t row = task->row_begin; row < task->row_end; row++) {
            const float *mixed = task->queries[(row - task->row_begin) * heads + head - task->head_begin].out;
            d->k->dot_rows(attended_of(d, row, head), mixed, values, stride, desc->v_dim, desc->kv_rank);
        }
    }
}

static const float *sink_of(const struct attention_job *job, int64_t head)
{
    const float *sinks = layer_of(job)->sinks;
    return sinks ? sinks + head : NULL;
}

// The end of a head's row: what was summed up over rotated values is rotated back.
static void finish_head(const struct attention_job *job, struct attention_query *query, int64_t head)
{
    const struct device *d = job->d;
    int64_t v_dim = d->kv_shape.v_dim;
    attention_finish(query, v_dim, sink_of(job, head));
    if (kv_format_scaled(d->shape.kv_format))
        kv_rotate(query->out, 1, v_dim, kv_rotate_back(v_dim));
}

// A task: the last rows, whose way is longest, come first.
static void attend_task(void *arg, int64_t index, int thread)
{
    struct attention_job *job = arg;
    struct device *d = job->d;
    int64_t chunk = index % job->chunks, share = index / job->chunks % job->shares;
    int64_t kv_head = index / (job->chunks * job->shares) % d->kv_shape.heads, heads, end;
    int64_t block = job->blocks - 1 - index / (job->chunks * job->shares * d->kv_shape.heads);
    struct task task = {.row_begin = d->attention.blocks[block], .row_end = d->attention.blocks[block + 1]};
    heads_of(d, kv_head, &task.head_begin, &end);
    heads = end - task.head_begin;
    task.head_end = task.head_begin + heads * (share + 1) / job->shares;
    task.head_begin += heads * share / job->shares;
    if (task.head_begin >= task.head_end)
        return;

    struct attention_scores scores = {.scale = (float)d->shape.desc->attention_scale,
                                      .softcap = (float)d->shape.desc->attention_softcap};
    struct kv_view kv = view_of(d, job->layer, d->rows[task.row_begin].sequence);
    float *room = d->attention.room + thread * d->attention.room_floats;
    int64_t count = set_queries(job, &task);
    heads = task.head_end - task.head_begin;
    if (job->chunks > 1) {
        for (int64_t i = 0; i < count; i++)
            task.queries[i].out = part_of(job, task.row_begin + i / heads, task.head_begin + i % heads, chunk);
        d->k->attention(task.queries, count, &kv, kv_head, chunk * KV_CHUNK_TOKENS, (chunk + 1) * KV_CHUNK_TOKENS,
                        &scores, room);
        for (int64_t i = 0; i < count; i++) {
            task.queries[i].out[kv.v_dim] = task.queries[i].largest;
            task.queries[i].out[kv.v_dim + 1] = task.queries[i].sum;
        }
        return;
    }
    if (d->kv_shape.latent)
        absorb_keys(job, &task, d->attention.latent + thread * latent_floats(&d->kv_shape));
    d->k->attention(task.queries, count, &kv, kv_head, 0, INT64_MAX, &scores, room);
    for (int64_t i = 0; i < count; i++)
        finish_head(job, &task.queries[i], task.head_begin + i % heads);
    if (d->kv_shape.latent)
        absorb_values(job, &task);
}

// One row and head: its chunks, in ascending order.
static void join_chunks(void *arg, int64_t index, int thread)
{
    (void)thread;
    struct attention_job *job = arg;
    struct device *d = job->d;
    int64_t v_dim = d->kv_shape.v_dim, row = index / d->shape.share->num_heads_local;
    int64_t head = index % d->shape.share->num_heads_local;
    struct attention_query total = {.out = attended_of(d, row, head)};
    attention_begin(&total);
    for (int64_t chunk = 0; chunk < job->chunks; chunk++) {
        float *out = part_of(job, row, head, chunk);
        struct attention_query part = {.out = out, .largest = out[v_dim], .sum = out[v_dim + 1]};
        attention_join(&total, &part, v_dim);
    }
    finish_head(job, &total, head);
}

// Blocks of at most so many rows of one sequence, which stand next to each other.
static int64_t cut_rows(struct device *d, int64_t most)
{
    int64_t *blocks = d->attention.blocks, count = 0;
    for (int64_t row = 0; row < d->count; row++)
        if (row == 0 || row - blocks[count - 1] == most || d->rows[row].sequence != d->rows[row - 1].sequence)
            blocks[count++] = row;
    blocks[count] = d->count;
    return count;
}

static void cut(struct attention_job *job)
{
    struct device *d = job->d;
    const struct model_desc *desc = d->shape.desc;
    int64_t threads = thread_pool_size(d->pool), kv_heads = d->kv_shape.heads, heads = d->shape.share->num_heads_local;
    int64_t per_kv = d->kv_shape.latent ? heads : desc->num_heads / desc->num_kv_heads;
    if (per_kv > heads)
        per_kv = heads;
    job->chunks = 1;
    job->shares = (int64_t)div_up((uint64_t)per_kv, ATTENTION_QUERIES);
    int64_t rows = ATTENTION_QUERIES / (int64_t)div_up((uint64_t)per_kv, (uint64_t)job->shares);
    int64_t wanted = threads > 1 ? TASKS_PER_THREAD * threads : 1, least = threads > 1 ? LEAST_TASKS * threads : 1;
    job->blocks = cut_rows(d, rows);
    while (rows > 1 && job->blocks * job->shares * kv_heads < wanted) {
        rows = (rows + 1) / 2;
        job->blocks = cut_rows(d, rows);
    }
    if (job->blocks * job->shares * kv_heads >= least)
        return;
    int64_t longest = 0;
    for (int64_t row = 0; row < d->count; row++)
        longest = d->rows[row].position >= longest ? d->rows[row].position + 1 : longest;
    int64_t chunks = (int64_t)div_up((uint64_t)longest, KV_CHUNK_TOKENS);
    if (chunks > 1 && d->count * heads * chunks * (d->kv_shape.v_dim + 2) <= d->attention.parts_floats)
        job->chunks = chunks;
    while (job->blocks * job->shares * kv_heads * job->chunks < least && per_kv / (2 * job->shares) >= LEAST_HEADS)
        job->shares *= 2;
}

int cpu_attend(struct device *d, int64_t layer, struct error *err)
{
    struct attention_job job = {.d = d, .layer = layer};
    (void)err;
    if (d->shape.share->num_heads_local > 0) {
        cut(&job);
        thread_pool_run(d->pool, attend_task, &job, job.blocks * d->kv_shape.heads * job.shares * job.chunks);
        if (job.chunks > 1)
            thread_pool_run(d->pool, join_chunks, &job, d->count * d->shape.share->num_heads_local);
    }
    cpu_set_input(d, d->attended, attended_width(d->shape.desc, d->shape.share), d->count,
                  &d->weights->layers[layer].o);
    return 0;
}
