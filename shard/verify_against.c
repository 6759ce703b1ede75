// Comparing weights with their checkpoint. See verify.h.
#include "shard/verify.h"

#include "formats/file_io.h"
#include "shard/band.h"
#include "shard/pool_error.h"
#include "shard/stop.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct against_job {
    const struct plan *plan;
    const struct row_source *source;
    const struct shard_dir *dir;
    int *fds;
    const struct band *bands;
    struct band_buffer *buffers; // one for each thread
    uint8_t **stored;            // one for each thread, as large as the largest band
    bool *differs;               // [bands]
    struct progress *progress;
    struct pool_error failure;
};

static int read_stored(const struct against_job *job, const struct band *band, uint32_t rank, uint8_t *out,
                       struct error *err)
{
    struct band_place place = band_place(job->plan, band, rank);
    int rc = file_pread_full(job->fds[rank], out, place.data_bytes, place.data_offset, job->dir->paths[rank], err);
    if (rc || !place.scale_bytes)
        return rc;
    return file_pread_full(job->fds[rank], out + place.data_bytes, place.scale_bytes, place.scale_offset,
                           job->dir->paths[rank], err);
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
        uint64_t bytes = band_rank_bytes(job->plan, band, rank);
        if (!(rc = read_stored(job, band, rank, job->stored[thread], &err)) && bytes &&
            memcmp(job->stored[thread], band_bytes(buffer, job->plan, band, rank), bytes) != 0)
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

// The first stored row of a band in which the two versions differ; row_end when only padding does.
static int first_difference(uint64_t *out, const struct band *band, const struct weight_shape *shape,
                            const uint8_t *wanted, const uint8_t *found, uint64_t data_bytes, struct error *err)
{
    *out = band->row_begin;
    if (shape->kind == WEIGHT_F32)
        return 0;
    uint64_t code_bytes = packed_row_bytes(shape->kind, shape->group_size, shape->cols);
    uint64_t row_bytes = code_bytes + sizeof(float);
    uint8_t *memory = malloc(2 * row_bytes);
    if (!memory)
        return error_set(err, ERR_MEMORY, "out of memory to compare rows");
    for (; *out < band->row_end; ++*out) {
        load_row(memory, code_bytes, shape, wanted, data_bytes, *out - band->row_begin);
        load_row(memory + row_bytes, code_bytes, shape, found, data_bytes, *out - band->row_begin);
        if (memcmp(memory, memory + row_bytes, row_bytes) != 0)
            break;
    }
    free(memory);
    return 0;
}

// buffers[0] holds the wanted band, stored[0] what was found on this rank.
static int note_difference(const struct against_job *job, const struct band *band, uint32_t rank,
                           struct verify_findings *findings, struct error *err)
{
    const struct shard_tensor *tensor = &job->plan->ranks[rank].tensors[band->tensor];
    struct band_place place = band_place(job->plan, band, rank);
    uint64_t row, source_row;
    struct error sentence;
    int rc = first_difference(&row, band, &tensor->shape, band_bytes(&job->buffers[0], job->plan, band, rank),
                              job->stored[0], place.data_bytes, err);
    if (rc)
        return rc;
    const char *source = band_row_source(tensor, row, &source_row);
    if (source)
        error_set(&sentence, ERR_CORRUPT, "%s: rank %u: tensor %s, row %llu differs from the checkpoint",
                  job->dir->paths[rank], rank, source, (unsigned long long)source_row);
    else
        error_set(&sentence, ERR_CORRUPT, "%s: rank %u: the padding of tensor %s differs", job->dir->paths[rank], rank,
                  tensor->parts[0].source);
    verify_note(findings, &sentence);
    return 0;
}

static int explain_band(const struct against_job *job, const struct band *band, struct verify_findings *findings,
                        struct error *err)
{
    int rc = band_build(&job->buffers[0], job->plan, band, job->source, err);
    for (uint32_t rank = band->rank_begin; !rc && rank < band->rank_end; rank++) {
        uint64_t bytes = band_rank_bytes(job->plan, band, rank);
        if (!(rc = read_stored(job, band, rank, job->stored[0], err)) && bytes &&
            memcmp(job->stored[0], band_bytes(&job->buffers[0], job->plan, band, rank), bytes) != 0)
            rc = note_difference(job, band, rank, findings, err);
    }
    return rc;
}

static int compare_tensor(struct against_job *job, uint64_t tensor, struct thread_pool *pool,
                          struct verify_findings *findings, struct error *err)
{
    struct band *bands;
    uint64_t count, largest = 1;
    int rc = band_list(&bands, &count, job->plan, tensor, err);
    if (rc)
        return rc;
    job->bands = bands;
    for (uint64_t i = 0; i < count; i++)
        for (uint32_t rank = bands[i].rank_begin; rank < bands[i].rank_end; rank++)
            if (band_rank_bytes(job->plan, &bands[i], rank) > largest)
                largest = band_rank_bytes(job->plan, &bands[i], rank);
    job->differs = calloc(count + 1, sizeof *job->differs);
    if (!job->differs)
        rc = error_set(err, ERR_MEMORY, "out of memory to compare a tensor");
    for (int thread = 0; !rc && thread < thread_pool_size(pool); thread++) {
        free(job->stored[thread]);
        if (!(job->stored[thread] = malloc(largest)))
            rc = error_set(err, ERR_MEMORY, "out of memory to compare a tensor");
    }
    if (!rc) {
        thread_pool_run(pool, run_against, job, (int64_t)count);
        rc = pool_error_take(&job->failure, err);
    }
    for (uint64_t i = 0; !rc && i < count; i++)
        if (job->differs[i])
            rc = explain_band(job, &bands[i], findings, err);
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
    job.fds = malloc(plan->tp_size * sizeof *job.fds);
    job.buffers = calloc((size_t)threads, sizeof *job.buffers);
    job.stored = calloc((size_t)threads, sizeof *job.stored);
    for (uint32_t rank = 0; job.fds && rank < plan->tp_size; rank++)
        job.fds[rank] = -1;
    if (!job.fds || !job.buffers || !job.stored)
        rc = error_set(err, ERR_MEMORY, "out of memory to compare weights");
    for (uint32_t rank = 0; !rc && rank < plan->tp_size; rank++)
        rc = file_open_read(&job.fds[rank], NULL, dir->paths[rank], err);
    for (uint64_t tensor = 0; !rc && tensor < plan->tensor_count; tensor++) {
        plan_tensor_label(progress->label, sizeof progress->label, &plan->ranks[0].tensors[tensor]);
        rc = compare_tensor(&job, tensor, pool, findings, err);
    }
    for (uint32_t rank = 0; job.fds && rank < plan->tp_size; rank++)
        if (job.fds[rank] >= 0)
            close(job.fds[rank]);
    for (int thread = 0; thread < threads; thread++) {
        if (job.buffers)
            band_buffer_free(&job.buffers[thread]);
        if (job.stored)
            free(job.stored[thread]);
    }
    free(job.fds);
    free(job.buffers);
    free(job.stored);
    return rc;
}
