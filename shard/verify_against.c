// Comparing weights with their checkpoint. See verify.h.
#include "shard/verify.h"

#include "shard/band.h"
#include "shard/payload_reader.h"
#include "shard/pool_error.h"
#include "shard/stop.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct against_job {
    const struct plan *plan;
    const struct row_source *source;
    const struct shard_dir *dir;
    struct payload_reader **readers; // [plan->num_ranks]
    const struct band *bands;
    struct band_buffer *buffers; // one for each thread
    uint8_t *stored;             // stored_bytes for each thread
    uint64_t stored_bytes;       // of the tensor's largest band on one rank
    bool *differs;               // [bands]
    struct progress *progress;
    struct pool_error failure;
};

static int read_stored(const struct against_job *job, const struct band *band, uint32_t rank, uint8_t *out,
                       struct error *err)
{
    struct band_place place =
        band_place(job->plan, band, rank); // in the file that the plan says, which is not compressed
    uint64_t payload = job->plan->ranks[rank].payload_offset;
    int rc = payload_reader_read(job->readers[rank], out, place.data_bytes, place.data_offset - payload, err);
    if (rc || !place.scale_bytes)
        return rc;
    return payload_reader_read(job->readers[rank], out + place.data_bytes, place.scale_bytes,
                               place.scale_offset - payload, err);
}

static uint64_t band_rank_bytes(const struct plan *plan, const struct band *band, uint32_t rank)
{
    struct band_place place = band_place(plan, band, rank);
    return place.data_bytes + place.scale_bytes;
}

static void run_against(void *arg, int64_t task, int thread)
{
    struct against_job *job = arg;
    const struct band *band = &job->bands[task];
    struct band_buffer *buffer = &job->buffers[thread];
    struct error err;
    if (pool_error_any(&job->failure))
        return;
    int rc = stop_check(&err);
    if (!rc)
        rc = band_build(buffer, job->plan, band, job->source, &err);
    for (uint32_t rank = band->rank_begin; !rc && rank < band->rank_end; rank++) {
        uint8_t *stored = job->stored + (uint64_t)thread * job->stored_bytes;
        uint64_t bytes = band_rank_bytes(job->plan, band, rank);
        if (!(rc = read_stored(job, band, rank, stored, &err)) &&
            memcmp(stored, band_bytes(buffer, job->plan, band, rank), bytes) != 0)
            job->differs[task] = true;
        progress_add(job->progress, bytes);
    }
    if (rc)
        pool_error_note(&job->failure, &err);
    if (thread == 0)
        progress_show(job->progress);
}

// The codes and scales of one stored row, without its padding, in memory [code_bytes + 4].
static void load_row(uint8_t *memory, uint64_t code_bytes, const struct weight_shape *shape, const uint8_t *stored,
                     uint64_t data_bytes, uint64_t row)
{
    struct packed_row packed;
    memset(memory, 0, code_bytes);
    packed_row_place(&packed, memory, shape->kind, shape->group_size, shape->cols);
    packed.scale = 0;
    pack_load_row(&packed, 0, stored, stored + data_bytes, shape, row);
    memcpy(memory + code_bytes, &packed.scale, sizeof packed.scale);
}

// "tensor NAME, row N": the first row of a band of a matrix in which the two versions differ.
static int name_row(char *out, size_t out_bytes, const struct band *band, const struct shard_tensor *tensor,
                    const uint8_t *wanted, const uint8_t *found, uint64_t data_bytes, struct error *err)
{
    const struct weight_shape *shape = &tensor->shape;
    uint64_t code_bytes = packed_row_bytes(shape->kind, shape->group_size, shape->cols);
    uint64_t row_bytes = code_bytes + sizeof(float), row = band->row_begin, source_row;
    uint8_t *memory = malloc(2 * row_bytes);
    if (!memory)
        return error_set(err, ERR_MEMORY, "out of memory to compare rows");
    for (; row < band->row_end; row++) {
        load_row(memory, code_bytes, shape, wanted, data_bytes, row - band->row_begin);
        load_row(memory + row_bytes, code_bytes, shape, found, data_bytes, row - band->row_begin);
        if (memcmp(memory, memory + row_bytes, row_bytes) != 0)
            break;
    }
    free(memory);
    const char *source = band_row_source(tensor, row, &source_row);
    if (source)
        snprintf(out, out_bytes, "tensor %s, row %llu", source, (unsigned long long)source_row);
    else
        snprintf(out, out_bytes, "the padding of tensor %s", tensor->parts[0].source);
    return 0;
}

// "tensor NAME, element N": the first one of a vector. Its parts stand side by side.
static void name_element(char *out, size_t out_bytes, const struct shard_tensor *tensor, const uint8_t *wanted,
                         const uint8_t *found)
{
    uint64_t element = 0;
    while (memcmp(wanted + 4 * element, found + 4 * element, 4) == 0)
        element++;
    int part = 0;
    for (; part + 1 < tensor->num_parts && element >= tensor->parts[part].cols; part++)
        element -= tensor->parts[part].cols;
    if (tensor->num_parts)
        snprintf(out, out_bytes, "tensor %s, element %llu", tensor->parts[part].source,
                 (unsigned long long)(tensor->parts[part].col_begin + element));
    else
        snprintf(out, out_bytes, "%s, element %llu", tensor_role_name(tensor->role), (unsigned long long)element);
}

static int note_difference(const struct against_job *job, const struct band *band, uint32_t rank, const uint8_t *wanted,
                           const uint8_t *found, struct verify_findings *findings, struct error *err)
{
    const struct shard_tensor *tensor = &job->plan->ranks[rank].tensors[band->tensor];
    char name[256];
    struct error sentence;
    int rc = 0;
    if (tensor->shape.kind == WEIGHT_F32)
        name_element(name, sizeof name, tensor, wanted, found);
    else
        rc =
            name_row(name, sizeof name, band, tensor, wanted, found, band_place(job->plan, band, rank).data_bytes, err);
    if (rc)
        return rc;
    error_set(&sentence, ERR_CORRUPT, "%s: rank %u: %s differs from the checkpoint", job->dir->paths[rank], rank, name);
    verify_note(findings, &sentence);
    return 0;
}

// Once more, on this thread, to say what differs.
static int explain_band(const struct against_job *job, const struct band *band, struct verify_findings *findings,
                        struct error *err)
{
    struct band_buffer *buffer = &job->buffers[0];
    int rc = band_build(buffer, job->plan, band, job->source, err);
    for (uint32_t rank = band->rank_begin; !rc && rank < band->rank_end; rank++) {
        const uint8_t *wanted = band_bytes(buffer, job->plan, band, rank);
        if (!(rc = read_stored(job, band, rank, job->stored, err)) &&
            memcmp(job->stored, wanted, band_rank_bytes(job->plan, band, rank)) != 0)
            rc = note_difference(job, band, rank, wanted, job->stored, findings, err);
    }
    return rc;
}

static uint64_t largest_band_bytes(const struct plan *plan, const struct band *bands, uint64_t count)
{
    uint64_t largest = 1;
    for (uint64_t i = 0; i < count; i++)
        for (uint32_t rank = bands[i].rank_begin; rank < bands[i].rank_end; rank++)
            if (band_rank_bytes(plan, &bands[i], rank) > largest)
                largest = band_rank_bytes(plan, &bands[i], rank);
    return largest;
}

static int compare_tensor(struct against_job *job, uint64_t tensor, struct thread_pool *pool,
                          struct verify_findings *findings, struct error *err)
{
    struct band *bands;
    uint64_t count;
    int rc = job->source->begin ? job->source->begin(job->source, tensor, pool, err) : 0;
    if (rc || (rc = band_list(&bands, &count, job->plan, tensor, err)))
        return rc;
    job->bands = bands;
    job->stored_bytes = largest_band_bytes(job->plan, bands, count);
    job->stored = malloc((size_t)thread_pool_size(pool) * job->stored_bytes);
    job->differs = calloc(count + 1, sizeof *job->differs);
    if (!job->stored || !job->differs) {
        rc = error_set(err, ERR_MEMORY, "out of memory to compare a tensor");
    } else {
        thread_pool_run(pool, run_against, job, (int64_t)count);
        rc = pool_error_take(&job->failure, err);
    }
    for (uint64_t i = 0; !rc && i < count; i++)
        if (job->differs[i])
            rc = explain_band(job, &bands[i], findings, err);
    free(job->stored);
    free(job->differs);
    free(bands);
    return rc;
}

int verify_against(const struct shard_dir *dir, const struct plan *plan, const struct row_source *source,
                   struct thread_pool *pool, struct progress *progress, struct verify_findings *findings,
                   struct error *err)
{
    int threads = thread_pool_size(pool), rc = 0;
    struct against_job job = {.plan = plan, .source = source, .dir = dir, .progress = progress};
    job.readers = calloc(plan->num_ranks, sizeof *job.readers);
    job.buffers = calloc((size_t)threads, sizeof *job.buffers);
    if (!job.readers || !job.buffers)
        rc = error_set(err, ERR_MEMORY, "out of memory to compare weights");
    for (uint32_t rank = 0; !rc && rank < plan->num_ranks; rank++)
        rc = payload_reader_open(&job.readers[rank], dir->files[rank], dir->paths[rank], err);
    for (uint64_t tensor = 0; !rc && tensor < plan->tensor_count; tensor++) {
        plan_tensor_label(progress->label, sizeof progress->label, &plan->ranks[0].tensors[tensor]);
        rc = compare_tensor(&job, tensor, pool, findings, err);
    }
    for (uint32_t rank = 0; job.readers && rank < plan->num_ranks; rank++)
        payload_reader_close(job.readers[rank]);
    for (int thread = 0; job.buffers && thread < threads; thread++)
        band_buffer_free(&job.buffers[thread]);
    free(job.readers);
    free(job.buffers);
    return rc;
}
