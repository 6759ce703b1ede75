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

// True when a stored row of the band differs, codes or scales.
static bool row_differs(const struct shard_tensor *tensor, const uint8_t *a, const uint8_t *b, uint64_t data_bytes,
                        uint64_t row, struct packed_row *row_a, struct packed_row *row_b, uint64_t memory_bytes,
                        void *memory_a, void *memory_b)
{
    const struct weight_shape *shape = &tensor->shape;
    if (shape->kind == WEIGHT_F32)
        return true;
    memset(memory_a, 0, memory_bytes);
    memset(memory_b, 0, memory_bytes);
    packed_row_place(row_a, memory_a, shape->kind, shape->group_size, shape->cols);
    packed_row_place(row_b, memory_b, shape->kind, shape->group_size, shape->cols);
    row_a->scale = row_b->scale = 0;
    pack_load_row(row_a, 0, a, a + data_bytes, shape, row);
    pack_load_row(row_b, 0, b, b + data_bytes, shape, row);
    return memcmp(memory_a, memory_b, memory_bytes) != 0 || memcmp(&row_a->scale, &row_b->scale, sizeof(float)) != 0;
}

// Says which row of a differing band is the first on this rank. stored and buffer hold both versions.
static int note_difference(const struct against_job *job, const struct band *band, uint32_t rank,
                           struct verify_findings *findings, struct error *err)
{
    const struct shard_tensor *tensor = &job->plan->ranks[rank].tensors[band->tensor];
    struct band_place place = band_place(job->plan, band, rank);
    const uint8_t *wanted = band_bytes(&job->buffers[0], job->plan, band, rank), *found = job->stored[0];
    uint64_t memory_bytes = packed_row_bytes(tensor->shape.kind, tensor->shape.group_size, tensor->shape.cols);
    void *memory_a = malloc(memory_bytes + 1), *memory_b = malloc(memory_bytes + 1);
    struct packed_row row_a, row_b;
    struct error sentence;
    const char *source = NULL;
    uint64_t source_row = 0;
    if (!memory_a || !memory_b) {
        free(memory_a);
        free(memory_b);
        return error_set(err, ERR_MEMORY, "out of memory to compare rows");
    }
    for (uint64_t row = band->row_begin; !source && row < band->row_end; row++)
        if (row_differs(tensor, wanted, found, place.data_bytes, row - band->row_begin, &row_a, &row_b, memory_bytes,
                        memory_a, memory_b))
            source = band_row_source(tensor, row, &source_row);
    free(memory_a);
    free(memory_b);
    if (source)
        error_set(&sentence, ERR_CORRUPT, "%s: rank %u: tensor %s, row %llu differs from the checkpoint",
                  job->dir->paths[rank], rank, source, (unsigned long long)source_row);
    else
        error_set(&sentence, ERR_CORRUPT, "%s: rank %u: the padding of tensor %s (%s) differs", job->dir->paths[rank],
                  rank, tensor_role_name(tensor->role), tensor->parts[0].source);
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
