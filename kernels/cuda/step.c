// The operations of a step on the device, and decode steps kept as CUDA graphs. See device.h and kernels/backend.h.
//
// Everything runs in order on one stream. All that changes from one decode step to the next lies in the step block, which the host fills
// and the step's first operation copies, and in the page tables; so a recorded step can be launched again for the same number of rows.
#include "kernels/cuda/device.h"
#include "kernels/cuda/exchange_host.h"

#include "formats/checked.h"
#include "kernels/buffers.h"

#include <string.h>

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

int step_begin(struct device *d, const struct token_row *rows, int64_t count, enum phase phase,
               const struct kv_pages *pages, struct error *err)
{
    // The host's block and tables may be written again once the step before has read them.
    int rc = device_wait_uploaded(d, err);
    if (rc || (rc = send_pages(d, pages, err)))
        return rc;
    d->step_count = count;
    d->phase = phase;
    d->source = (struct step_input){0};
    d->recording = d->rows_sent = false;
    d->host = device_step_block(d, d->step_host, count);
    d->all_block = device_step_block(d, d->step_device, count);
    for (int64_t i = 0; i < count; i++) {
        d->host.token[i] = rows[i].token;
        d->host.sequence[i] = rows[i].sequence;
        d->host.position[i] = (int32_t)rows[i].position;
    }
    rc = step_window(d, 0, count, err);
    return rc ? rc : exchange_begin_step(d, err); // a later stage embeds nothing
}

// Behind it the host's part of the step has been read.
static int launch_graph(struct device *d, cudaGraphExec_t graph, struct error *err)
{
    int rc = CHECK(cudaGraphLaunch(graph, d->stream), "launching a step's graph");
    return rc ? rc : CHECK(cudaEventRecord(d->uploaded, d->stream), "launching a step's graph");
}

int step_record(struct device *d, bool *replayed, struct error *err)
{
    *replayed = false;
    if (d->count > d->shape.decode_rows)
        return 0;
    struct step_graph *graph = &d->graphs[d->count];
    *replayed = graph->exec != NULL;
    if (d->shape.samples && d->sampled != d->count)
        return error_set(err, ERR_OTHER, "device %d: a decode step of %lld rows samples %lld", d->index,
                         (long long)d->count, (long long)d->sampled);
    if (*replayed)
        return launch_graph(d, graph->exec, err);
    d->recording = graph->ran;
    graph->ran = true;
    return d->recording ? CHECK(cudaStreamBeginCapture(d->stream, cudaStreamCaptureModeThreadLocal), "recording a step")
                        : 0;
}

int step_finish(struct device *d, struct error *err)
{
    cudaGraph_t graph = NULL;
    int rc;
    if ((rc = exchange_flush(d, err)) || !d->recording)
        return rc;
    d->recording = false;
    if ((rc = CHECK(cudaStreamEndCapture(d->stream, &graph), "recording a step")))
        return rc;
    rc = CHECK(cudaGraphInstantiate(&d->graphs[d->count].exec, graph, 0), "making a step's graph");
    cudaGraphDestroy(graph);
    return rc ? rc : launch_graph(d, d->graphs[d->count].exec, err);
}

// ---- operations ------------------------------------------------------------------------------------------------

// Once in a step: with its first operation, which is the embedding or takes the residual from another pipeline stage.
static int send_rows(struct device *d, struct error *err)
{
    if (d->rows_sent)
        return 0;
    int rc = CHECK(cudaMemcpyAsync(d->step_device, d->step_host, d->host.bytes, cudaMemcpyHostToDevice, d->stream),
                   "copying a step's rows");
    if (!rc && !d->recording)
        rc = CHECK(cudaEventRecord(d->uploaded, d->stream), "copying a step's rows");
    d->rows_sent = !rc;
    return rc;
}

int step_embed(struct device *d, struct error *err)
{
    int rc = send_rows(d, err);
    if (rc)
        return rc;
    return CHECK(launch_embed(d->buffer[BUFFER_RESIDUAL], &d->weights->embedding, d->block.token, d->count,
                              d->shape.share->vocab_begin, d->stream),
                 "the embedding");
}

int step_scale_residual(struct device *d, float factor, struct error *err)
{
    return CHECK(
        launch_scale_values(d->buffer[BUFFER_RESIDUAL], d->count * d->shape.desc->hidden_size, factor, 0, d->stream),
        "scaling the residual");
}

int step_prepare(struct device *d, enum input_format format, struct error *err)
{
    struct step_input *source = &d->source;
    if (format == source->format)
        return 0;
    if (!source->rows)
        return error_set(err, ERR_OTHER, "device %d: the rows of a product were not kept", d->index);
    source->format = format;
    return CHECK(
        launch_prepare(d->input, format, source->rows, source->cols, source->order, d->count, source->cols, d->stream),
        "a product's input");
}

// INPUT_F32 stands for rows that are not prepared yet.
int step_keep(struct device *d, const float *rows, const float *order, int64_t cols, const struct matrix *next,
              struct error *err)
{
    d->source = (struct step_input){.rows = rows, .order = order, .cols = cols, .format = INPUT_F32};
    return step_prepare(d, multiply_input(d, next), err);
}

struct device_join step_join(const struct device *d, const struct join *join)
{
    if (!join)
        return (struct device_join){0};
    return (struct device_join){d->buffer[BUFFER_PARTIAL], join->bias, join->norm,
                                (float)d->shape.desc->residual_scale};
}

int step_norm(struct device *d, const struct join *join, const float *weight, const float *order,
              const struct matrix *next, struct error *err)
{
    int64_t hidden = d->shape.desc->hidden_size;
    bool keep = order || d->keeps_rows;
    struct device_input rows = {.values = d->normed, .stride = hidden};
    enum input_format format = keep ? INPUT_F32 : multiply_input(d, next);
    struct exchange_norm norm = {.out = keep ? rows : d->input,
                                 .format = format,
                                 .residual = d->buffer[BUFFER_RESIDUAL],
                                 .join = step_join(d, join),
                                 .weight = weight,
                                 .eps = (float)d->shape.desc->norm_eps};
    int rc = join && exchange_takes_norm(d) ? exchange_with_norm(d, &norm, err)
                                            : CHECK(launch_norm(norm.out, format, norm.residual, norm.join, weight,
                                                                NULL, d->count, hidden, norm.eps, d->stream),
                                                    "a norm");
    d->source = (struct step_input){.format = format};
    return rc || !keep ? rc : step_keep(d, d->normed, order, hidden, next, err);
}

int step_linear(struct device *d, enum buffer out, const struct matrix *w, struct error *err)
{
    int rc = step_prepare(d, multiply_input(d, w), err);
    return rc ? rc : multiply(d, d->buffer[out], w, d->count, err);
}

int step_activate(struct device *d, const struct mlp *mlp, struct error *err)
{
    enum input_format format = multiply_input(d, &mlp->down);
    d->source = (struct step_input){.format = format};
    return CHECK(launch_activate(d->input, format, d->shape.desc->activation, d->shape.desc->mlp_rotation,
                                 d->buffer[BUFFER_GATE_UP], mlp->gate_up_bias, d->count, (int64_t)mlp->down.shape.cols,
                                 d->stream),
                 "the activation");
}

// ---- the host's part -------------------------------------------------------------------------------------------

static uint64_t lent_bytes(const struct device *d, enum buffer buffer)
{
    return (uint64_t)(d->count * buffer_width(d->shape.desc, d->shape.share, buffer)) * sizeof(float);
}

// Windows lend beside each other. What was lent before may still be on its way back to the device: the host waits for that, too.
static float *lent_place(const struct device *d) { return d->lent + d->window_first * d->shape.desc->hidden_size; }

int step_lend(struct device *d, enum buffer buffer, bool overwrite, float **host, struct error *err)
{
    float *place = lent_place(d);
    int rc = exchange_flush(d, err);
    if (!rc && !overwrite)
        rc = CHECK(cudaMemcpyAsync(place, d->buffer[buffer], lent_bytes(d, buffer), cudaMemcpyDeviceToHost, d->stream),
                   "copying a sum's part");
    *host = place;
    return rc ? rc : device_wait(d, "computing a sum's part", err);
}

int step_returned(struct device *d, enum buffer buffer, struct error *err)
{
    int rc = send_rows(d, err);
    if (rc)
        return rc;
    return CHECK(
        cudaMemcpyAsync(d->buffer[buffer], lent_place(d), lent_bytes(d, buffer), cudaMemcpyHostToDevice, d->stream),
        "copying a sum");
}

// Logits of at most LOGITS_ROWS rows, which row_index (on the device) names, into d->logits.
static int logits_part(struct device *d, const struct join *join, const int32_t *row_index, int64_t count,
                       struct error *err)
{
    const struct model_desc *desc = d->shape.desc;
    const struct matrix *head = &d->weights->head;
    int rc;
    if ((rc = CHECK(launch_norm(d->input, multiply_input(d, head), d->buffer[BUFFER_RESIDUAL], step_join(d, join),
                                d->weights->final_norm, row_index, count, desc->hidden_size, (float)desc->norm_eps,
                                d->stream),
                    "the last norm")) ||
        (rc = multiply(d, d->logits, head, count, err)) || (desc->logit_scale == 1 && desc->logit_softcap == 0))
        return rc;
    return CHECK(launch_scale_values(d->logits, count * d->shape.share->vocab_local, (float)desc->logit_scale,
                                     (float)desc->logit_softcap, d->stream),
                 "scaling logits");
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
        (rc = device_wait(d, "computing logits", err)))
        return rc;
    for (int64_t i = 0; i < count; i++)
        memcpy(host + i * stride, d->logits_host + i * vocab, (size_t)vocab * sizeof *host);
    return 0;
}

int step_logits(struct device *d, const struct join *join, const int64_t *row_index, int64_t count, float *host,
                int64_t stride, struct error *err)
{
    int rc = exchange_flush(d, err);
    if (rc)
        return rc;
    if (!host && !row_index &&
        count <= LOGITS_ROWS) // rows 0 .. count - 1, of a decode step: nothing to copy, so that it can be recorded
        return logits_part(d, join, d->identity, count, err);
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
            (rc = logits_part(d, join, d->row_index, part, err)))
            return rc;
        if (host && (rc = logits_to_host(d, part, host + done * stride, stride, err)))
            return rc;
    }
    return 0;
}

// ---- sampling --------------------------------------------------------------------------------------------------

int step_count_tokens(struct device *d, int32_t sequence, const uint32_t *tokens, int64_t prompt_count, int64_t count,
                      struct error *err)
{
    int64_t vocab = d->shape.share->vocab_local;
    int rc;
    memset(d->output_host, 0, (size_t)vocab * sizeof *d->output_host);
    memset(d->any_host, 0, (size_t)vocab);
    for (int64_t i = 0; i < count; i++) {
        if (tokens[i] >= vocab)
            return error_set(err, ERR_OTHER, "device %d: token %u of a vocabulary of %lld is to be counted", d->index,
                             tokens[i], (long long)vocab);
        d->any_host[tokens[i]] = 1;
        if (i >= prompt_count && d->output_host[tokens[i]] < UINT16_MAX)
            d->output_host[tokens[i]]++;
    }
    if ((rc = CHECK(cudaMemcpyAsync(d->in_output + sequence * vocab, d->output_host,
                                    (uint64_t)vocab * sizeof *d->in_output, cudaMemcpyHostToDevice, d->stream),
                    "counting an output")) ||
        (rc = CHECK(cudaMemcpyAsync(d->in_any + sequence * vocab, d->any_host, (uint64_t)vocab, cudaMemcpyHostToDevice,
                                    d->stream),
                    "counting a prompt")))
        return rc;
    return device_wait(d, "counting a prompt", err); // the buffers may be filled again
}

int step_sampling(struct device *d, const struct sampling *const *sampling, const uint64_t *steps,
                  const int64_t *row_index, int64_t count, struct error *err)
{
    if (count > d->shape.decode_rows)
        return error_set(err, ERR_OTHER, "device %d: %lld tokens are to be chosen at once, at most %lld", d->index,
                         (long long)count, (long long)d->shape.decode_rows);
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
            .sequence = d->host.sequence[row_index ? row_index[i] : i],
            .seed = how->seed,
            .step = steps[i],
        };
    }
    d->sampled = count;
    return 0;
}

int step_sample(struct device *d, struct error *err)
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

int step_tokens(struct device *d, uint32_t *tokens, int64_t count, struct error *err)
{
    int rc = device_wait(d, "computing a step", err);
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
