// See rotate.h. A stored row is a combination of a block of source rows (out), and its columns are mixed in blocks (in).
#include "shard/rotate.h"

#include "formats/rotation.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// ---- the model ---------------------------------------------------------------------------------------------------

uint32_t rotate_block(int64_t count)
{
    uint32_t block = MODEL_MAX_ROTATION;
    while (block > 1 && count % block != 0)
        block /= 2;
    return count > 0 && block >= MANIFEST_MIN_ROTATION ? block : 0;
}

static uint32_t smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }

// One block for all the layers' mlps.
static uint32_t mlp_block(const struct model_desc *model)
{
    uint32_t block = MODEL_MAX_ROTATION;
    const int64_t sizes[] = {model->intermediate_size, model->experts.expert_size, model->experts.shared_size};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (sizes[i] > 0)
            block = smaller(block, rotate_block(sizes[i]));
    return block;
}

int rotate_model(struct model_desc *model, uint32_t *block, struct error *err)
{
    if (model->post_norms || !model->pre_norms)
        return error_set(err, ERR_MODEL,
                         "--rot: a %s norms what attention and mlp put out, with a gain for each channel, before the "
                         "residual stream takes it; a rotated model would not compute the same. Leave --rot out",
                         model->architecture);
    if (!(*block = rotate_block(model->hidden_size)))
        return error_set(err, ERR_MODEL,
                         "--rot: the hidden size, %lld, cannot be cut into blocks of %d channels or a larger power of "
                         "two; leave --rot out",
                         (long long)model->hidden_size, MANIFEST_MIN_ROTATION);
    model->mlp_rotation = mlp_block(model);
    model->tied_embeddings = false;
    return 0;
}

int rotate_plan(struct plan *plan, const struct model_desc *original, struct error *err)
{
    uint64_t head = plan->tensor_count, embedding = plan->tensor_count;
    for (uint64_t i = 0; i < plan->tensor_count; i++) {
        enum tensor_role role = plan->ranks[0].tensors[i].role;
        if (role == ROLE_QKV_ORDER || role == ROLE_GATE_UP_ORDER)
            return error_set(err, ERR_MODEL,
                             "--rot: the checkpoint's columns stand in orders of their own (GPTQ's act-order), which "
                             "a rotation would mix; leave --rot out, or start from the model that was not quantized");
        head = role == ROLE_HEAD ? i : head;
        embedding = role == ROLE_EMBEDDING ? i : embedding;
    }
    if (original->tied_embeddings && head < plan->tensor_count && embedding < plan->tensor_count)
        plan->sources[head][0] = plan->sources[embedding][0];
    return 0;
}

static int64_t value_size(const struct model_desc *model)
{
    return model->latent.kv_rank > 0 ? model->latent.v_dim : model->head_dim;
}

void rotate_text(char *out, size_t bytes, const struct plan *plan)
{
    snprintf(out, bytes, "residual %u, values %u, mlp %lld", plan->quant.rotation,
             rotate_block(value_size(&plan->model)), (long long)plan->model.mlp_rotation);
}

// ---- what is done to a part ----------------------------------------------------------------------------------------

struct fold {
    bool ones;         // a norm whose gain is in the matrices behind it
    const float *gain; // [columns]: multiplies the columns; NULL: 1
    // Columns in blocks of in_block (0: as they are); behind signs, which begin anew after in_period columns.
    uint64_t in_block, in_period;
    bool in_signs;
    // Rows, or elements of a vector, from out_first on: of each out_period the out_count from out_begin on, in blocks of out_block (0: as
    // they are; 1: signs alone).
    uint64_t out_block, out_first, out_period, out_begin, out_count;
};

static void fold_in(struct fold *fold, uint64_t block, uint64_t period, bool signs, const float *gain)
{
    fold->in_block = block;
    fold->in_period = period;
    fold->in_signs = signs;
    fold->gain = gain;
}

static void fold_out(struct fold *fold, uint64_t block, uint64_t first, uint64_t period, uint64_t begin, uint64_t count)
{
    fold->out_block = block;
    fold->out_first = first;
    fold->out_period = period;
    fold->out_begin = begin;
    fold->out_count = count;
}

// gpt-oss adds 1 to up, so that no sign can stand there.
static bool mlp_signs(const struct model_desc *model) { return model->activation != ACTIVATION_GPT_OSS; }

// The signs of down's inputs stand in the rows of up, which are the last ones of the second part.
static void fold_up(struct fold *fold, const struct model_desc *model, int part, uint64_t rows, int64_t size)
{
    if (part == 1 && model->mlp_rotation > 0 && mlp_signs(model))
        fold_out(fold, 1, rows - (uint64_t)size, (uint64_t)size, 0, (uint64_t)size);
}

static void fold_down(struct fold *fold, const struct model_desc *model, int64_t size)
{
    if (model->mlp_rotation > 0)
        fold_in(fold, (uint64_t)model->mlp_rotation, (uint64_t)size, mlp_signs(model), NULL);
}

// Of the matrices and gains that latent attention alone has.
static struct fold fold_of_latent(const struct rotate_source *source, const struct shard_tensor *tensor, uint64_t rows)
{
    const struct model_desc *model = &source->plan->model;
    const struct latent_desc *latent = &model->latent;
    const struct rotate_gains *gains = &source->layers[tensor->layer];
    uint64_t block = source->plan->quant.rotation, hidden = (uint64_t)model->hidden_size;
    uint64_t values = (uint64_t)value_size(model), nope = (uint64_t)latent->nope_dim;
    uint64_t q_rank = (uint64_t)latent->q_rank, q_block = rotate_block(latent->q_rank);
    uint64_t kv_rank = (uint64_t)latent->kv_rank, kv_block = rotate_block(latent->kv_rank);
    struct fold fold = {0};
    switch (tensor->role) {
    case ROLE_Q_A:
        fold_in(&fold, block, hidden, true, gains->attention);
        fold_out(&fold, q_block, 0, q_rank, 0, q_rank);
        break;
    case ROLE_Q_A_NORM:
        fold.ones = q_block > 0;
        break;
    case ROLE_Q_B:
        if (q_rank == 0)
            fold_in(&fold, block, hidden, true, gains->attention);
        else if (q_block > 0)
            fold_in(&fold, q_block, q_rank, true, gains->q_a);
        break;
    case ROLE_KV_A:
        fold_in(&fold, block, hidden, true, gains->attention);
        fold_out(&fold, kv_block, 0, rows, 0, kv_rank);
        break;
    case ROLE_KV_A_NORM:
        fold.ones = kv_block > 0;
        break;
    case ROLE_KV_B:
        if (kv_block > 0)
            fold_in(&fold, kv_block, kv_rank, true, gains->kv_a);
        fold_out(&fold, rotate_block(value_size(model)), 0, nope + values, nope, values);
        break;
    default:
        break;
    }
    return fold;
}

// rows: of the source, or elements of a vector.
static struct fold fold_of(const struct rotate_source *source, const struct shard_tensor *tensor, int part,
                           uint64_t rows)
{
    const struct model_desc *model = &source->plan->model;
    const struct rotate_gains *gains = tensor->layer >= 0 ? &source->layers[tensor->layer] : NULL;
    uint64_t block = source->plan->quant.rotation, hidden = (uint64_t)model->hidden_size;
    uint64_t values = (uint64_t)value_size(model), value_block = rotate_block(value_size(model));
    uint64_t kv_rows = (uint64_t)model->num_kv_heads * values;
    struct fold fold = {0};
    switch (tensor->role) {
    case ROLE_ATTENTION_NORM:
    case ROLE_MLP_NORM:
    case ROLE_FINAL_NORM:
        fold.ones = true;
        break;
    case ROLE_EMBEDDING:
        fold_in(&fold, block, hidden, true, NULL);
        break;
    case ROLE_HEAD:
        fold_in(&fold, block, hidden, true, source->final_gain);
        break;
    case ROLE_QKV:
        fold_in(&fold, block, hidden, true, gains->attention);
        // fallthrough
    case ROLE_QKV_BIAS:
        if (part == 2)
            fold_out(&fold, value_block, rows - kv_rows, values, 0, values);
        break;
    case ROLE_O:
        fold_in(&fold, value_block, values, true, NULL);
        fold_out(&fold, block, 0, hidden, 0, hidden);
        break;
    case ROLE_O_BIAS:
    case ROLE_DOWN_BIAS:
    case ROLE_EXPERT_DOWN_BIAS:
        fold_out(&fold, block, 0, hidden, 0, hidden);
        break;
    case ROLE_ROUTER:
        fold_in(&fold, block, hidden, true, gains->mlp);
        break;
    case ROLE_GATE_UP:
        fold_in(&fold, block, hidden, true, gains->mlp);
        // fallthrough
    case ROLE_GATE_UP_BIAS:
        fold_up(&fold, model, part, rows, model->intermediate_size);
        break;
    case ROLE_EXPERT_GATE_UP:
        fold_in(&fold, block, hidden, true, gains->mlp);
        // fallthrough
    case ROLE_EXPERT_GATE_UP_BIAS:
        fold_up(&fold, model, part, rows, model->experts.expert_size);
        break;
    case ROLE_SHARED_GATE_UP:
        fold_in(&fold, block, hidden, true, gains->mlp);
        fold_up(&fold, model, part, rows, model->experts.shared_size);
        break;
    case ROLE_DOWN:
        fold_down(&fold, model, model->intermediate_size);
        fold_out(&fold, block, 0, hidden, 0, hidden);
        break;
    case ROLE_EXPERT_DOWN:
        fold_down(&fold, model, model->experts.expert_size);
        fold_out(&fold, block, 0, hidden, 0, hidden);
        break;
    case ROLE_SHARED_DOWN:
        fold_down(&fold, model, model->experts.shared_size);
        fold_out(&fold, block, 0, hidden, 0, hidden);
        break;
    case ROLE_Q_A:
    case ROLE_Q_A_NORM:
    case ROLE_Q_B:
    case ROLE_KV_A:
    case ROLE_KV_A_NORM:
    case ROLE_KV_B:
        return fold_of_latent(source, tensor, rows);
    default: // nothing of it is rotated
        break;
    }
    return fold;
}

static bool does_nothing(const struct fold *fold)
{
    return !fold->ones && !fold->gain && fold->in_block == 0 && fold->out_block == 0;
}

// The channel of a row that is rotated; false: it stays as it is.
static bool channel_of(const struct fold *fold, uint64_t row, uint64_t *channel)
{
    if (fold->out_block == 0 || row < fold->out_first)
        return false;
    uint64_t at = (row - fold->out_first) % fold->out_period;
    *channel = at - fold->out_begin;
    return at >= fold->out_begin && *channel < fold->out_count;
}

static void rotate_columns(const struct rotate_source *source, const struct fold *fold, float *x, uint64_t cols)
{
    for (uint64_t i = 0; fold->gain && i < cols; i++)
        x[i] *= fold->gain[i];
    for (uint64_t begin = 0; fold->in_block > 0 && fold->in_signs && begin < cols; begin += fold->in_period)
        for (uint64_t i = 0; i < fold->in_period; i++)
            x[begin + i] *= rotation_sign(i);
    if (fold->in_block > 0)
        source->kernels->hadamard(x, (int64_t)cols, (int64_t)fold->in_block);
}

// ---- rows --------------------------------------------------------------------------------------------------------

// What a window keeps for the rotation.
struct own_window {
    struct row_window base;
    float *block; // [block_rows][columns], rotated, from row block_begin on
    uint64_t capacity, block_begin, block_rows;
};

static void free_own(void *memory)
{
    struct own_window *own = memory;
    row_window_free(&own->base);
    free(own->block);
    free(own);
}

static struct fold fold_of_request(const struct rotate_source *source, const struct row_request *request)
{
    const struct shard_tensor *tensor = &source->plan->ranks[0].tensors[request->tensor];
    bool vector = request->kind == WEIGHT_F32;
    return fold_of(source, tensor, request->part, vector ? request->source->source_cols : request->source->source_rows);
}

// The first row of the block of rows that are combined with this one.
static uint64_t block_begin(const struct fold *fold, uint64_t row)
{
    uint64_t channel;
    return channel_of(fold, row, &channel) ? row - channel % fold->out_block : row;
}

static uint64_t block_end(const struct fold *fold, uint64_t row)
{
    uint64_t channel;
    return channel_of(fold, row, &channel) ? row - channel % fold->out_block + fold->out_block : row + 1;
}

static int source_read(const struct row_source *base, struct row_window *window, const struct row_request *request,
                       struct error *err)
{
    const struct rotate_source *source = (const struct rotate_source *)base;
    if (!window->own) {
        if (!(window->own = calloc(1, sizeof(struct own_window))))
            return error_set(err, ERR_MEMORY, "out of memory for rows");
        window->free_own = free_own;
    }
    struct own_window *own = window->own;
    struct row_request wider = *request;
    struct fold fold = fold_of_request(source, request);
    window->request = *request;
    own->block_rows = 0;
    if (request->kind != WEIGHT_F32) {
        wider.row_begin = block_begin(&fold, request->row_begin);
        wider.rows = block_end(&fold, request->row_begin + request->rows - 1) - wider.row_begin;
    }
    int rc = row_window_reserve(window, 0, request->source->source_cols, err);
    return rc ? rc : source->base->read(source->base, &own->base, &wider, err);
}

// A row as it is. What is not a number would spread over a whole block: it is named here.
static int plain_row(const struct rotate_source *source, struct row_window *window, uint64_t row, float *out,
                     struct error *err)
{
    struct own_window *own = window->own;
    const struct shard_part *part = window->request.source;
    int rc = source->base->values(source->base, &own->base, row, out, err);
    for (uint64_t i = 0; !rc && i < part->source_cols; i++)
        if (!isfinite(out[i]))
            rc = error_set(err, ERR_MODEL, "tensor %s, row %llu: column %llu is not a finite number", part->source,
                           (unsigned long long)row, (unsigned long long)i);
    return rc;
}

// Sums and differences of rows, a few columns at a time, so that they stay in the cache.
static void combine_rows(float *x, uint64_t rows, uint64_t cols)
{
    enum { STRIP = 64 };
    float factor = (float)(1.0 / sqrt((double)rows));
    for (uint64_t begin = 0; begin < cols; begin += STRIP) {
        uint64_t count = cols - begin < STRIP ? cols - begin : STRIP;
        for (uint64_t step = 1; step < rows; step *= 2)
            for (uint64_t row = 0; row < rows; row++) {
                float *low = x + row * cols + begin, *high = low + step * cols;
                for (uint64_t i = 0; !(row & step) && i < count; i++) {
                    float a = low[i], b = high[i];
                    low[i] = a + b;
                    high[i] = a - b;
                }
            }
        for (uint64_t row = 0; row < rows; row++)
            for (uint64_t i = 0; i < count; i++)
                x[row * cols + begin + i] *= factor;
    }
}

// Has the window hold the rotated rows around `row`, which is one of them.
static int make_block(const struct rotate_source *source, const struct fold *fold, struct row_window *window,
                      uint64_t row, uint64_t channel, struct error *err)
{
    struct own_window *own = window->own;
    uint64_t cols = window->request.source->source_cols, needed = fold->out_block * cols;
    uint64_t first = row - channel % fold->out_block, first_channel = channel - channel % fold->out_block;
    if (row >= own->block_begin && row - own->block_begin < own->block_rows)
        return 0;
    own->block_rows = 0;
    if (needed > own->capacity) {
        free(own->block);
        own->capacity = 0;
        if (!(own->block = malloc(needed * sizeof *own->block)))
            return error_set(err, ERR_MEMORY, "out of memory for %llu rows that are rotated together",
                             (unsigned long long)fold->out_block);
        own->capacity = needed;
    }
    for (uint64_t r = 0; r < fold->out_block; r++) {
        float *out = own->block + r * cols, sign = rotation_sign(first_channel + r);
        int rc = plain_row(source, window, first + r, out, err);
        if (rc)
            return rc;
        for (uint64_t i = 0; i < cols; i++)
            out[i] *= sign;
    }
    combine_rows(own->block, fold->out_block, cols);
    own->block_begin = first;
    own->block_rows = fold->out_block;
    return 0;
}

// Elements of a vector are what rows of a matrix are.
static void rotate_vector(const struct rotate_source *source, const struct fold *fold, float *x, uint64_t count)
{
    uint64_t channel;
    for (uint64_t i = 0; i < count; i++)
        if (channel_of(fold, i, &channel))
            x[i] *= rotation_sign(channel);
    for (uint64_t i = 0; fold->out_block > 1 && i < count; i++)
        if (channel_of(fold, i, &channel) && channel % fold->out_block == 0)
            source->kernels->hadamard(x + i, (int64_t)fold->out_block, (int64_t)fold->out_block);
}

static int source_values(const struct row_source *base, struct row_window *window, uint64_t row, float *out,
                         struct error *err)
{
    const struct rotate_source *source = (const struct rotate_source *)base;
    const struct row_request *request = &window->request;
    struct own_window *own = window->own;
    struct fold fold = fold_of_request(source, request);
    uint64_t cols = request->source->source_cols, channel = 0;
    int rc;
    if (does_nothing(&fold))
        return source->base->values(source->base, &own->base, row, out, err);
    if (request->kind != WEIGHT_F32 && fold.out_block > 1 && channel_of(&fold, row, &channel)) {
        if ((rc = make_block(source, &fold, window, row, channel, err)))
            return rc;
        memcpy(out, own->block + (row - own->block_begin) * cols, cols * sizeof *out);
    } else if ((rc = plain_row(source, window, row, out, err))) {
        return rc;
    }
    if (request->kind == WEIGHT_F32) {
        for (uint64_t i = 0; fold.ones && i < cols; i++)
            out[i] = 1;
        rotate_vector(source, &fold, out, cols);
        return 0;
    }
    for (uint64_t i = 0; fold.out_block == 1 && channel_of(&fold, row, &channel) && i < cols; i++)
        out[i] *= rotation_sign(channel);
    rotate_columns(source, &fold, out, cols);
    return 0;
}

static int source_row(const struct row_source *base, struct row_window *window, uint64_t row, struct packed_row *out,
                      struct error *err)
{
    const struct rotate_source *source = (const struct rotate_source *)base;
    const struct row_request *request = &window->request;
    struct own_window *own = window->own;
    struct fold fold = fold_of_request(source, request);
    if (does_nothing(&fold))
        return source->base->row(source->base, &own->base, row, out, err);
    int rc = source_values(base, window, row, window->values, err);
    return rc ? rc : row_source_pack(out, request, row, window->values, err);
}

static int source_computed(const struct row_source *base, uint64_t tensor, float *out, uint64_t values,
                           struct error *err)
{
    const struct rotate_source *source = (const struct rotate_source *)base;
    return source->base->computed(source->base, tensor, out, values, err);
}

// ---- opening -----------------------------------------------------------------------------------------------------

static float **gain_place(struct rotate_source *source, const struct shard_tensor *tensor)
{
    struct rotate_gains *gains = tensor->layer >= 0 ? &source->layers[tensor->layer] : NULL;
    switch (tensor->role) {
    case ROLE_ATTENTION_NORM:
        return &gains->attention;
    case ROLE_MLP_NORM:
        return &gains->mlp;
    case ROLE_Q_A_NORM:
        return &gains->q_a;
    case ROLE_KV_A_NORM:
        return &gains->kv_a;
    case ROLE_FINAL_NORM:
        return &source->final_gain;
    default:
        return NULL;
    }
}

static int read_gain(float **out, const struct row_source *base, struct row_window *window, uint64_t index,
                     const struct shard_tensor *tensor, struct error *err)
{
    const struct row_request request = {.tensor = index, .source = &tensor->parts[0], .kind = WEIGHT_F32, .rows = 1};
    float *values = malloc(tensor->parts[0].source_cols * sizeof *values);
    if (!values)
        return error_set(err, ERR_MEMORY, "out of memory for the norms' gains");
    free(*out); // a table that names a norm twice
    *out = values;
    int rc = base->read(base, window, &request, err);
    return rc ? rc : base->values(base, window, 0, values, err);
}

int rotate_source_init(struct rotate_source *out, const struct row_source *base, const struct plan *plan,
                       struct error *err)
{
    struct rotate_source source = {
        .source = {.read = source_read, .computed = source_computed, .row = source_row, .values = source_values},
        .base = base,
        .plan = plan,
        .layers = calloc((size_t)plan->model.num_layers, sizeof *source.layers)};
    struct row_window window = {0};
    int rc = source.layers
                 ? kernels_select(&source.kernels, "auto", err)
                 : error_set(err, ERR_MEMORY, "out of memory for %lld layers", (long long)plan->model.num_layers);
    for (uint64_t i = 0; !rc && i < plan->tensor_count; i++) {
        const struct shard_tensor *tensor = &plan->ranks[0].tensors[i];
        float **gain = gain_place(&source, tensor);
        if (gain && tensor->num_parts > 0)
            rc = read_gain(gain, base, &window, i, tensor, err);
    }
    row_window_free(&window);
    if (rc)
        rotate_source_clear(&source);
    else
        *out = source;
    return rc;
}

void rotate_source_clear(struct rotate_source *source)
{
    for (int64_t layer = 0; source->layers && layer < source->plan->model.num_layers; layer++) {
        free(source->layers[layer].attention);
        free(source->layers[layer].mlp);
        free(source->layers[layer].q_a);
        free(source->layers[layer].kv_a);
    }
    free(source->layers);
    free(source->final_gain);
    *source = (struct rotate_source){0};
}
