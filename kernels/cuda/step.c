// The operations of a step on the device, and decode steps kept as CUDA graphs. See device.h and kernels/backend.h.
//
// Everything runs in order on one stream. All that changes from one decode step to the next lies in the step block, which the host fills
// and the step's first operation copies, and in the page tables; so a recorded step can be launched again for the same number of rows.
#include "kernels/cuda/device.h"

#include "formats/checked.h"
#include "kernels/kv.h"

#include <math.h>
#include <string.h>

#define CHECK(call, what) device_status(d, call, what, err)

// ---- begin -----------------------------------------------------------------------------------------------------

static int send_pages(struct device *d, const struct kv_pages *pages, struct error *err)
{
    uint64_t bytes = (uint64_t)(d->shape.max_sequences * d->pages_per_sequence) * sizeof *d->pages;
    if (pages->version == d->pages_version)
        return 0;
    if (pages->pages_per_sequence != d->pages_per_sequence)
        return error_set(err, ERR_OTHER, "device %d: page tables of %lld entries, made for %lld", d->index,
                         (long long)pages->pages_per_sequence, (long long)d->pages_per_sequence);
    memcpy(d->pages_host, pages->pages, bytes);
    d->pages_version = pages->version;
    return CHECK(cudaMemcpyAsync(d->pages, d->pages_host, bytes, cudaMemcpyHostToDevice, d->stream),
                 "copying page tables");
}

static int step_begin(struct device *d, const struct token_row *rows, int64_t count, enum phase phase,
                      const struct kv_pages *pages, struct error *err)
{
    // The host's block and tables may be written again once the step before has read them.
    int rc = CHECK(cudaEventSynchronize(d->uploaded), "the step before");
    if (rc || (rc = send_pages(d, pages, err)))
        return rc;
    d->count = count;
    d->phase = phase;
    d->recording = false;
    d->host = device_step_block(d, d->step_host, count);
    d->block = device_step_block(d, d->step_device, count);
    for (int64_t i = 0; i < count; i++) {
        d->host.token[i] = rows[i].token;
        d->host.sequence[i] = rows[i].sequence;
        d->host.position[i] = (int32_t)rows[i].position;
    }
    return 0;
}

// Behind it the host's part of the step has been read.
static int launch_graph(struct device *d, cudaGraphExec_t graph, struct error *err)
{
    int rc = CHECK(cudaGraphLaunch(graph, d->stream), "launching a step's graph");
    return rc ? rc : CHECK(cudaEventRecord(d->uploaded, d->stream), "launching a step's graph");
}

static int step_record(struct device *d, bool *replayed, struct error *err)
{
    struct step_graph *graph = &d->graphs[d->count];
    *replayed = graph->exec != NULL;
    if (d->sampled != d->count)
        return error_set(err, ERR_OTHER, "device %d: a decode step of %lld rows samples %lld", d->index,
                         (long long)d->count, (long long)d->sampled);
    if (*replayed)
        return launch_graph(d, graph->exec, err);
    d->recording = graph->ran;
    graph->ran = true;
    return d->recording ? CHECK(cudaStreamBeginCapture(d->stream, cudaStreamCaptureModeThreadLocal), "recording a step")
                        : 0;
}

static int step_finish(struct device *d, struct error *err)
{
    cudaGraph_t graph = NULL;
    int rc;
    if (!d->recording)
        return 0;
    d->recording = false;
    if ((rc = CHECK(cudaStreamEndCapture(d->stream, &graph), "recording a step")))
        return rc;
    rc = CHECK(cudaGraphInstantiate(&d->graphs[d->count].exec, graph, 0), "making a step's graph");
    cudaGraphDestroy(graph);
    return rc ? rc : launch_graph(d, d->graphs[d->count].exec, err);
}

// ---- operations ------------------------------------------------------------------------------------------------

static int step_embed(struct device *d, struct error *err)
{
    int rc = CHECK(cudaMemcpyAsync(d->step_device, d->step_host, d->host.bytes, cudaMemcpyHostToDevice, d->stream),
                   "copying a step's rows");
    if (!rc && !d->recording)
        rc = CHECK(cudaEventRecord(d->uploaded, d->stream), "copying a step's rows");
    if (rc)
        return rc;
    return CHECK(launch_embed(d->residual, &d->weights->embedding, d->block.token, d->count,
                              d->shape.share->vocab_begin, d->stream),
                 "the embedding");
}

static int step_norm(struct device *d, bool add, const float *bias, const float *weight, const struct matrix *next,
                     struct error *err)
{
    return CHECK(launch_norm(d->input, multiply_input(d, next), d->residual, add ? d->partial : NULL, add ? bias : NULL,
                             weight, NULL, d->count, d->shape.desc->hidden_size, (float)d->shape.desc->norm_eps,
                             d->stream),
                 "a norm");
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

static int step_linear(struct device *d, enum buffer out, const struct matrix *w, struct error *err)
{
    int64_t stride;
    float *y = buffer_of(d, out, &stride);
    return multiply(d, y, stride, w, d->count, err);
}

static struct device_kv kv_of(const struct device *d, int64_t layer)
{
    const struct device_shape *s = &d->shape;
    uint64_t half = kv_bytes(s->desc, s->share, s->num_pages, s->kv_format) / (2 * (uint64_t)s->desc->num_layers);
    uint8_t *k = d->kv + 2 * half * (uint64_t)layer;
    return (struct device_kv){.k = k,
                              .v = k + half,
                              .format = s->kv_format,
                              .pages = d->pages,
                              .pages_per_sequence = d->pages_per_sequence,
                              .num_kv_heads = s->share->num_kv_heads_local,
                              .head_dim = s->desc->head_dim};
}

static struct device_rows rows_of(const struct device *d)
{
    return (struct device_rows){d->block.sequence, d->block.position, d->count};
}

static int step_finish_qkv(struct device *d, int64_t layer_index, struct error *err)
{
    const struct layer *layer = &d->weights->layers[layer_index];
    const struct model_desc *desc = d->shape.desc;
    return CHECK(launch_finish_qkv(d->qkv, layer->qkv_bias, layer->q_norm, layer->k_norm, (float)desc->norm_eps,
                                   d->weights->inv_freq, (float)desc->rope_attention_factor, rows_of(d),
                                   kv_of(d, layer_index), d->shape.share->num_heads_local, d->stream),
                 "queries and keys");
}

static int step_attend(struct device *d, int64_t layer, const struct matrix *next, struct error *err)
{
    const struct model_desc *desc = d->shape.desc;
    const struct rank_share *share = d->shape.share;
    struct attention_shape shape = {
        .num_heads = share->num_heads_local,
        .head_begin = share->head_begin,
        .heads_per_kv = desc->num_heads / desc->num_kv_heads,
        .kv_head_begin = share->kv_head_begin,
        .scale = 1.0f / sqrtf((float)desc->head_dim),
        .window = desc->sliding_window,
    };
    int rc = d->phase == PHASE_PREFILL
                 ? CHECK(launch_attention_prefill(d->attended, d->qkv, shape, rows_of(d), kv_of(d, layer), d->stream),
                         "attention")
                 : CHECK(launch_attention_decode(d->attended, d->qkv, shape, rows_of(d), kv_of(d, layer),
                                                 d->shape.context, d->attention_scratch, d->stream),
                         "attention");
    if (rc)
        return rc;
    return CHECK(
        launch_prepare(d->input, multiply_input(d, next), d->attended, d->q_size, d->count, d->q_size, d->stream),
        "attention's output");
}

static int step_activate(struct device *d, const float *bias, const struct matrix *next, struct error *err)
{
    return CHECK(launch_activate(d->input, multiply_input(d, next), d->gate_up, bias, d->count, d->mlp_size, d->stream),
                 "the activation");
}

// ---- the host's part -------------------------------------------------------------------------------------------

static int step_lend(struct device *d, enum buffer buffer, float **host, struct error *err)
{
    int64_t stride;
    const float *from = buffer_of(d, buffer, &stride);
    uint64_t bytes = (uint64_t)(d->count * stride) * sizeof *from;
    int rc = CHECK(cudaMemcpyAsync(d->lent, from, bytes, cudaMemcpyDeviceToHost, d->stream), "copying a sum's part");
    *host = d->lent;
    return rc ? rc : CHECK(cudaStreamSynchronize(d->stream), "computing a sum's part");
}

static int step_returned(struct device *d, enum buffer buffer, struct error *err)
{
    int64_t stride;
    float *to = buffer_of(d, buffer, &stride);
    uint64_t bytes = (uint64_t)(d->count * stride) * sizeof *to;
    return CHECK(cudaMemcpyAsync(to, d->lent, bytes, cudaMemcpyHostToDevice, d->stream), "copying a sum");
}

// Logits of at most LOGITS_ROWS rows, which row_index (on the device) names, into d->logits.
static int logits_part(struct device *d, const float *bias, const int32_t *row_index, int64_t count, struct error *err)
{
    const struct matrix *head = &d->weights->head;
    int rc = CHECK(launch_norm(d->input, multiply_input(d, head), d->residual, d->partial, bias, d->weights->final_norm,
                               row_index, count, d->shape.desc->hidden_size, (float)d->shape.desc->norm_eps, d->stream),
                   "the last norm");
    return rc ? rc : multiply(d, d->logits, d->shape.share->vocab_local, head, count, err);
}

static int logits_to_host(struct device *d, int64_t count, float *host, int64_t stride, struct error *err)
{
    int64_t vocab = d->shape.share->vocab_local;
    int rc;
    if (!d->logits_host &&
        (rc = CHECK(cudaMallocHost((void **)&d->logits_host, (uint64_t)(LOGITS_ROWS * vocab + 1) * sizeof(float)),
                    "pinning memory for logits")))
        return rc;
    if ((rc = CHECK(cudaMemcpyAsync(d->logits_host, d->logits, (uint64_t)(count * vocab) * sizeof(float),
                                    cudaMemcpyDeviceToHost, d->stream),
                    "copying logits")) ||
        (rc = CHECK(cudaStreamSynchronize(d->stream), "computing logits")))
        return rc;
    for (int64_t i = 0; i < count; i++)
        memcpy(host + i * stride, d->logits_host + i * vocab, (size_t)vocab * sizeof *host);
    return 0;
}

static int step_logits(struct device *d, const float *bias, const int64_t *row_index, int64_t count, float *host,
                       int64_t stride, struct error *err)
{
    int rc;
    if (!host && !row_index &&
        count <= LOGITS_ROWS) // rows 0 .. count - 1, of a decode step: nothing to copy, so that it can be recorded
        return logits_part(d, bias, d->identity, count, err);
    if (!host && count > LOGITS_ROWS)
        return error_set(err, ERR_OTHER, "device %d: logits of %lld rows are to stay on it, which holds %d", d->index,
                         (long long)count, LOGITS_ROWS);
    for (int64_t done = 0; done < count; done += LOGITS_ROWS) {
        int64_t part = count - done < LOGITS_ROWS ? count - done : LOGITS_ROWS;
        for (int64_t i = 0; i < part; i++)
            d->row_index_host[i] = (int32_t)(row_index ? row_index[done + i] : done + i);
        if ((rc = CHECK(cudaMemcpyAsync(d->row_index, d->row_index_host, (uint64_t)part * sizeof *d->row_index,
                                        cudaMemcpyHostToDevice, d->stream),
                        "copying row numbers")) ||
            (rc = logits_part(d, bias, d->row_index, part, err)))
            return rc;
        if (host && (rc = logits_to_host(d, part, host + done * stride, stride, err)))
            return rc;
    }
    return 0;
}

// ---- sampling --------------------------------------------------------------------------------------------------

static int step_count_prompt(struct device *d, int32_t sequence, const uint32_t *prompt, int64_t count,
                             struct error *err)
{
    int64_t vocab = d->shape.share->vocab_local;
    int rc;
    memset(d->seen_host, 0, (size_t)vocab);
    for (int64_t i = 0; i < count; i++)
        d->seen_host[prompt[i]] = 1;
    if ((rc = CHECK(
             cudaMemsetAsync(d->in_output + sequence * vocab, 0, (uint64_t)vocab * sizeof *d->in_output, d->stream),
             "clearing a sequence's counts")) ||
        (rc = CHECK(cudaMemcpyAsync(d->in_any + sequence * vocab, d->seen_host, (uint64_t)vocab, cudaMemcpyHostToDevice,
                                    d->stream),
                    "counting a prompt")))
        return rc;
    return CHECK(cudaStreamSynchronize(d->stream), "counting a prompt"); // the buffer may be filled again
}

static int step_sampling(struct device *d, const struct sampling *const *sampling, const uint64_t *steps,
                         const struct token_row *rows, int64_t count, struct error *err)
{
    (void)err;
    for (int64_t i = 0; i < count; i++) {
        const struct sampling *how = sampling[i];
        d->host.sampling[i] = (struct device_sampling){
            .temperature = how->temperature,
            .top_p = how->top_p,
            .min_p = how->min_p,
            .top_k = how->top_k < INT32_MAX ? (int32_t)how->top_k : INT32_MAX,
            .repetition_penalty = how->repetition_penalty,
            .frequency_penalty = how->frequency_penalty,
            .presence_penalty = how->presence_penalty,
            .sequence = rows[i].sequence,
            .seed = how->seed,
            .step = steps[i],
        };
    }
    d->sampled = count;
    return 0;
}

static int step_sample(struct device *d, struct error *err)
{
    int64_t vocab = d->shape.share->vocab_local;
    int rc = CHECK(launch_sample(d->chosen, d->logits, vocab, vocab, d->block.sampling, d->in_output, d->in_any,
                                 d->sampled, d->sample_scratch, d->stream),
                   "sampling");
    return rc ? rc
              : CHECK(cudaMemcpyAsync(d->chosen_host, d->chosen, (uint64_t)d->sampled * sizeof *d->chosen,
                                      cudaMemcpyDeviceToHost, d->stream),
                      "copying tokens");
}

static int step_tokens(struct device *d, uint32_t *tokens, int64_t count, struct error *err)
{
    int rc = CHECK(cudaStreamSynchronize(d->stream), "computing a step");
    if (rc)
        return rc;
    for (int64_t i = 0; i < count; i++) {
        tokens[i] = d->chosen_host[i];
        if (tokens[i] == SAMPLE_NAN)
            return error_set(err, ERR_OTHER,
                             "device %d: the logits hold NaN; the weights or the activations are damaged", d->index);
        if (tokens[i] == SAMPLE_NONE)
            return error_set(err, ERR_OTHER, "no token is left to choose from: every logit is minus infinity");
    }
    return 0;
}

const struct backend step_operations = {
    .begin = step_begin,
    .record = step_record,
    .finish = step_finish,
    .embed = step_embed,
    .norm = step_norm,
    .linear = step_linear,
    .finish_qkv = step_finish_qkv,
    .attend = step_attend,
    .activate = step_activate,
    .lend = step_lend,
    .returned = step_returned,
    .logits = step_logits,
    .count_prompt = step_count_prompt,
    .sampling = step_sampling,
    .sample = step_sample,
    .tokens = step_tokens,
};
