// See build.h. Phases: take the directory, weights (band by band, tensor by tensor), sources and contract, heads,
// extras, commit.
#include "shard/build.h"

#include "shard/band.h"
#include "shard/journal.h"
#include "shard/output_dir.h"
#include "shard/pool_error.h"
#include "shard/rank_writer.h"
#include "shard/stop.h"

#include "version.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct build {
    const struct build_input *input;
    const struct plan *plan;
    struct output_dir dir;
    struct journal *journal;
    struct rank_writer *writer;
    struct thread_pool *pool;
    struct band_buffer *buffers; // one for each thread
    struct progress progress;
    bool keep_work;
};

const char *build_tool_name(void) { return "tpshard " TPSHARD_VERSION " (" TPSHARD_COMMIT ")"; }

// ---- weights -----------------------------------------------------------------------------------------------------

// One run of the pool over the bands of one tensor.
struct band_job {
    struct build *build;
    const struct band *bands;
    uint64_t ranks_per_band;
    uint64_t *hashes; // [bands][ranks_per_band], of what is written or was found
    bool read_back;   // hash what lies in the files instead of making it
    struct pool_error failure;
};

static int band_work(struct band_job *job, uint64_t index, struct band_buffer *buffer, struct error *err)
{
    struct build *build = job->build;
    const struct band *band = &job->bands[index];
    int rc = stop_check(err);
    if (!rc)
        rc = job->read_back ? band_reserve(buffer, build->plan, band, err)
                            : band_build(buffer, build->plan, band, build->input->source, err);
    for (uint32_t rank = band->rank_begin; !rc && rank < band->rank_end; rank++) {
        struct band_place place = band_place(build->plan, band, rank);
        uint64_t bytes = place.data_bytes + place.scale_bytes;
        uint8_t *at = band_bytes(buffer, build->plan, band, rank);
        rc = job->read_back ? rank_writer_get(build->writer, band, rank, at, err)
                            : rank_writer_put(build->writer, band, rank, at, err);
        job->hashes[index * job->ranks_per_band + rank - band->rank_begin] = checksum_leaf(at, bytes);
        if (!job->read_back)
            progress_add(&build->progress, bytes);
    }
    return rc;
}

static void run_band(void *arg, int64_t task, int thread)
{
    struct band_job *job = arg;
    struct error err;
    if (pool_error_any(&job->failure))
        return;
    if (band_work(job, (uint64_t)task, &job->build->buffers[thread], &err))
        pool_error_note(&job->failure, &err);
    if (thread == 0)
        progress_show(&job->build->progress);
}

// One hash for all that the ranks hold of the tensor.
static int run_bands(struct band_job *job, uint64_t count, struct checksum128 *hash, struct error *err)
{
    int rc;
    memset(&job->failure, 0, sizeof job->failure);
    thread_pool_run(job->build->pool, run_band, job, (int64_t)count);
    if ((rc = pool_error_take(&job->failure, err)))
        return rc;
    *hash = checksum_whole(job->hashes, count * job->ranks_per_band * sizeof *job->hashes);
    return 0;
}

static uint64_t tensor_stored_bytes(const struct plan *plan, uint64_t tensor)
{
    uint64_t bytes = 0;
    for (uint32_t rank = 0; rank < plan->tp_size; rank++)
        bytes +=
            plan->ranks[rank].tensors[tensor].shape.data_bytes + plan->ranks[rank].tensors[tensor].shape.scale_bytes;
    return bytes;
}

static int build_tensor(struct build *build, uint64_t tensor, struct error *err)
{
    int rc;
    uint64_t count;
    struct band *bands = NULL;
    struct checksum128 hash, wanted;
    struct band_job job = {.build = build};
    if ((rc = band_list(&bands, &count, build->plan, tensor, err)))
        return rc;
    job.bands = bands;
    job.ranks_per_band = count ? bands[0].rank_end - bands[0].rank_begin : 0;
    if (!(job.hashes = calloc(count * job.ranks_per_band + 1, sizeof *job.hashes))) {
        rc = error_set(err, ERR_MEMORY, "out of memory for the checksums of a tensor");
        goto done;
    }
    plan_tensor_label(build->progress.label, sizeof build->progress.label, &build->plan->ranks[0].tensors[tensor]);
    if (journal_has(build->journal, tensor, &wanted)) {
        job.read_back = true;
        if ((rc = run_bands(&job, count, &hash, err)))
            goto done;
        if (checksum128_equal(hash, wanted)) {
            progress_resumed(&build->progress, tensor_stored_bytes(build->plan, tensor));
            goto done;
        }
        job.read_back = false; // it did not all reach the disk: once more
    }
    if ((rc = run_bands(&job, count, &hash, err)) || (rc = journal_add(build->journal, tensor, hash, err)))
        goto done;
done:
    free(job.hashes);
    free(bands);
    return rc;
}

static int build_weights(struct build *build, struct error *err)
{
    int rc = 0;
    for (uint64_t tensor = 0; !rc && tensor < build->plan->tensor_count; tensor++)
        rc = build_tensor(build, tensor, err);
    progress_end(&build->progress);
    return rc;
}

// ---- the rest ----------------------------------------------------------------------------------------------------

static int describe(const struct build *build, struct manifest *manifest, struct error *err)
{
    const struct plan *plan = build->plan;
    manifest->version = MANIFEST_VERSION;
    manifest->tool = strdup(build_tool_name());
    manifest->model = plan->model;
    manifest->tp_size = plan->tp_size;
    manifest->pp_size = 1;
    manifest->quant = plan->quant;
    manifest->experts = plan->experts;
    manifest->wire_advice = strdup("bf16");
    manifest->ranks = calloc(plan->tp_size, sizeof *manifest->ranks);
    manifest->num_ranks = manifest->ranks ? plan->tp_size : 0;
    if (!manifest->tool || !manifest->wire_advice || !manifest->ranks)
        return error_set(err, ERR_MEMORY, "out of memory for the manifest");
    return build->input->sources(build->input->arg, manifest, err);
}

static int finish(struct build *build, struct error *err)
{
    int rc;
    struct manifest *manifest = calloc(1, sizeof *manifest);
    if (!manifest)
        return error_set(err, ERR_MEMORY, "out of memory for the manifest");
    if ((rc = describe(build, manifest, err)) || (rc = manifest_contract(manifest, &manifest->contract, err)) ||
        (rc = rank_writer_finish(build->writer, manifest->contract, build->pool, manifest->ranks, err)) ||
        (rc = extras_write(build->input->extras, build->dir.work_path, manifest, err)) || (rc = stop_check(err)))
        goto done;
    rc = output_dir_commit(&build->dir, manifest, err);
done:
    manifest_free(manifest);
    return rc;
}

static int prepare(struct build *build, const struct build_options *options, struct error *err)
{
    int rc = thread_pool_create(&build->pool, options->threads, err);
    if (rc)
        return rc;
    if (!(build->buffers = calloc((size_t)options->threads, sizeof *build->buffers)))
        return error_set(err, ERR_MEMORY, "out of memory for %d threads", options->threads);
    bool resume = options->resume;
    rc = journal_open(&build->journal, build->dir.work_path, build->input->key, build->plan->tensor_count, resume, err);
    if (rc == ERR_USAGE && options->force) { // another run's journal, and leave to drop it
        resume = false;
        if (!(rc = output_dir_clean(&build->dir, err)))
            rc = journal_open(&build->journal, build->dir.work_path, build->input->key, build->plan->tensor_count,
                              resume, err);
    }
    if (rc) {
        build->keep_work = resume; // it may be another run's
        return rc;
    }
    return rank_writer_open(&build->writer, build->dir.work_path, build->plan, resume, err);
}

static void release(struct build *build, const struct build_options *options)
{
    for (int thread = 0; build->buffers && thread < options->threads; thread++)
        band_buffer_free(&build->buffers[thread]);
    free(build->buffers);
    rank_writer_free(build->writer);
    journal_close(build->journal);
    thread_pool_free(build->pool);
}

// What is done so far is worth keeping when another try could use it; what is wrong with the input stays wrong.
static bool worth_keeping(const struct build *build, int rc)
{
    return rc != ERR_MODEL && rc != ERR_CORRUPT && build->journal && journal_count(build->journal) > 0;
}

static void say_how_to_resume(struct error *err, const struct build *build)
{
    struct error cause = *err;
    error_set(err, cause.code, "%s (%llu of %llu tensors are done; the same command with --resume goes on from there)",
              cause.msg, (unsigned long long)journal_count(build->journal),
              (unsigned long long)build->plan->tensor_count);
}

int build_directory(struct build_result *result, const struct build_input *input, const struct build_options *options,
                    struct error *err)
{
    int rc;
    bool begun = false;
    struct build build = {.input = input, .plan = input->plan};
    stop_install();
    if ((rc = output_dir_take(&build.dir, options->out_dir, options->force, options->resume, err)))
        return rc;
    progress_start(&build.progress, input->what, plan_stored_bytes(input->plan), options->quiet);
    if ((rc = prepare(&build, options, err)))
        goto done;
    if (input->begin && (rc = input->begin(input->arg, &build.progress, err)))
        goto done;
    begun = true;
    if ((rc = build_weights(&build, err)) || (rc = finish(&build, err)))
        goto done;
    *result = (struct build_result){
        .written_bytes = build.progress.total_bytes,
        .source_bytes = input->source_bytes,
        .peak_memory_bytes = progress_peak_memory_bytes(),
        .seconds = progress_seconds(&build.progress),
    };
done:
    progress_end(&build.progress);
    if (rc && begun && input->fail)
        input->fail(input->arg);
    if (rc && worth_keeping(&build, rc)) {
        build.keep_work = true;
        say_how_to_resume(err, &build);
    }
    release(&build, options);
    output_dir_release(&build.dir, !build.keep_work);
    return rc;
}
