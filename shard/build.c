// See build.h. Phases: take the directory, weights (band by band, tensor by tensor), sources and contract, heads,
// extras, commit.
#include "shard/build.h"

#include "formats/checked.h"

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

// A run that resumes does at most one piece again: a hundredth and less of the work, and more than a disk needs to be quick.
enum { PIECES = 128 };

struct build {
    const struct build_input *input;
    const struct plan *plan;
    struct output_dir dir;
    struct journal *journal;
    uint64_t *first_piece; // [tensor_count + 1]; what the journal counts
    struct rank_writer *writer;
    struct thread_pool *pool;
    struct band_buffer *buffers; // one for each thread
    struct progress progress;
    uint64_t rank_bytes, largest_rank_bytes;
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
    for (uint32_t rank = 0; rank < plan->num_ranks; rank++)
        bytes +=
            plan->ranks[rank].tensors[tensor].shape.data_bytes + plan->ranks[rank].tensors[tensor].shape.scale_bytes;
    return bytes;
}

// A tensor's pieces follow from the plan alone. One that has more pieces than bands has some without any.
static int count_pieces(struct build *build, struct error *err)
{
    const struct plan *plan = build->plan;
    uint64_t piece_bytes = plan_stored_bytes(plan) / PIECES + 1;
    if (!(build->first_piece = calloc(plan->tensor_count + 1, sizeof *build->first_piece)))
        return error_set(err, ERR_MEMORY, "out of memory for a list of %llu tensors",
                         (unsigned long long)plan->tensor_count);
    for (uint64_t tensor = 0; tensor < plan->tensor_count; tensor++)
        build->first_piece[tensor + 1] =
            build->first_piece[tensor] + div_up(tensor_stored_bytes(plan, tensor), piece_bytes);
    return 0;
}

static uint64_t bands_bytes(const struct build *build, const struct band *bands, uint64_t count)
{
    uint64_t bytes = 0;
    for (uint64_t i = 0; i < count; i++)
        for (uint32_t rank = bands[i].rank_begin; rank < bands[i].rank_end; rank++) {
            struct band_place place = band_place(build->plan, &bands[i], rank);
            bytes += place.data_bytes + place.scale_bytes;
        }
    return bytes;
}

static int build_piece(struct band_job *job, uint64_t piece, uint64_t count, struct error *err)
{
    struct build *build = job->build;
    struct checksum128 hash, wanted;
    int rc;
    if (journal_has(build->journal, piece, &wanted)) {
        job->read_back = true;
        if ((rc = run_bands(job, count, &hash, err)))
            return rc;
        if (checksum128_equal(hash, wanted)) {
            progress_resumed(&build->progress, bands_bytes(build, job->bands, count));
            return 0;
        }
    }
    job->read_back = false; // not done, or it did not all reach the disk
    rc = run_bands(job, count, &hash, err);
    return rc ? rc : journal_add(build->journal, piece, hash, err);
}

static int build_tensor(struct build *build, uint64_t tensor, struct error *err)
{
    int rc;
    uint64_t count, first = build->first_piece[tensor], pieces = build->first_piece[tensor + 1] - first;
    struct band *bands = NULL;
    struct band_job job = {.build = build};
    if ((rc = band_list(&bands, &count, build->plan, tensor, err)))
        return rc;
    job.ranks_per_band = count ? bands[0].rank_end - bands[0].rank_begin : 0;
    if (!(job.hashes = calloc(count * job.ranks_per_band + 1, sizeof *job.hashes)))
        rc = error_set(err, ERR_MEMORY, "out of memory for the checksums of a tensor");
    plan_tensor_label(build->progress.label, sizeof build->progress.label, &build->plan->ranks[0].tensors[tensor]);
    if (!rc && build->input->source->begin)
        rc = build->input->source->begin(build->input->source, tensor, build->pool, err);
    for (uint64_t piece = 0; !rc && piece < pieces; piece++) {
        uint64_t begin = piece * count / pieces, end = (piece + 1) * count / pieces;
        job.bands = bands + begin;
        if (end > begin)
            rc = build_piece(&job, first + piece, end - begin, err);
    }
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
    manifest->pp_size = plan->pp_size;
    memcpy(manifest->stage_layers, plan->stage_layers, sizeof manifest->stage_layers);
    manifest->quant = plan->quant;
    if (plan->quant.millibits) {
        int rc = plan_matrices(&manifest->matrices, &manifest->num_matrices, plan, err);
        if (rc)
            return rc;
    }
    manifest->experts = plan->experts;
    manifest->wire_advice = strdup("bf16");
    manifest->ranks = calloc(plan->num_ranks, sizeof *manifest->ranks);
    manifest->num_ranks = manifest->ranks ? plan->num_ranks : 0;
    if (!manifest->tool || !manifest->wire_advice || !manifest->ranks)
        return error_set(err, ERR_MEMORY, "out of memory for the manifest");
    return build->input->sources(build->input->arg, manifest, err);
}

static uint64_t payload_bytes(const struct plan *plan)
{
    uint64_t bytes = 0;
    for (uint32_t rank = 0; rank < plan->num_ranks; rank++)
        bytes += plan->ranks[rank].payload_bytes;
    return bytes;
}

static int finish(struct build *build, struct error *err)
{
    int rc;
    struct progress compressing;
    struct manifest *manifest = calloc(1, sizeof *manifest);
    progress_start(&compressing, "compress", payload_bytes(build->plan), build->progress.quiet);
    if (!manifest)
        return error_set(err, ERR_MEMORY, "out of memory for the manifest");
    if ((rc = describe(build, manifest, err)) || (rc = manifest_contract(manifest, &manifest->contract, err)) ||
        (rc = rank_writer_finish(build->writer, manifest->contract, build->pool, &compressing, manifest->ranks, err)) ||
        (rc = extras_write(build->input->extras, build->dir.work_path, manifest, err)) || (rc = stop_check(err)))
        goto done;
    for (size_t i = 0; i < manifest->num_ranks; i++) {
        build->rank_bytes += manifest->ranks[i].bytes;
        if (manifest->ranks[i].bytes > build->largest_rank_bytes)
            build->largest_rank_bytes = manifest->ranks[i].bytes;
    }
    rc = output_dir_commit(&build->dir, manifest, err);
done:
    progress_end(&compressing);
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
    if ((rc = count_pieces(build, err)))
        return rc;
    uint64_t num_pieces = build->first_piece[build->plan->tensor_count];
    bool resume = options->resume;
    rc = journal_open(&build->journal, build->dir.work_path, build->input->key, num_pieces, resume, err);
    if (rc == ERR_USAGE && options->force) { // another run's journal, and leave to drop it
        resume = build->keep_work = false;
        if (!(rc = output_dir_clean(&build->dir, err)))
            rc = journal_open(&build->journal, build->dir.work_path, build->input->key, num_pieces, resume, err);
    }
    if (rc)
        return rc;
    build->keep_work = false;
    // Rank files that no journal tells of are another run's, which was being dropped.
    resume = resume && journal_count(build->journal) > 0;
    return rank_writer_open(&build->writer, build->dir.work_path, build->plan, options->compress, resume, err);
}

static void release(struct build *build, const struct build_options *options)
{
    for (int thread = 0; build->buffers && thread < options->threads; thread++)
        band_buffer_free(&build->buffers[thread]);
    free(build->buffers);
    free(build->first_piece);
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
    error_set(err, cause.code, "%s (%llu %% is done; the same command with --resume goes on from there)", cause.msg,
              (unsigned long long)(100 * atomic_load(&build->progress.done_bytes) / (build->progress.total_bytes + 1)));
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
    build.keep_work = build.dir.found_work; // until its journal says whose it is and how much of it is done
    if ((rc = prepare(&build, options, err)))
        goto done;
    if (input->begin && (rc = input->begin(input->arg, &build.progress, err)))
        goto done;
    begun = true;
    if ((rc = build_weights(&build, err)) || (rc = finish(&build, err)))
        goto done;
    *result = (struct build_result){
        .rank_bytes = build.rank_bytes,
        .largest_rank_bytes = build.largest_rank_bytes,
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
