// See rank_writer.h.
#include "shard/rank_writer.h"

#include "formats/checked.h"
#include "formats/checksum.h"
#include "formats/file_io.h"
#include "shard/pool_error.h"
#include "shard/rank_compress.h"
#include "shard/stop.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

struct rank_writer {
    const struct plan *plan;
    const char *dir;
    bool compress, keep;
    bool *stays_raw; // of those that were to be compressed
    int *fds;
    char (*paths)[PATH_MAX];
};

// ---- opening -----------------------------------------------------------------------------------------------------

// The file's name in the finished directory.
static void final_path(char path[PATH_MAX], const struct rank_writer *writer, uint32_t rank)
{
    char name[64];
    manifest_rank_file_name(name, sizeof name, rank, writer->plan->tp_size, writer->plan->pp_size);
    snprintf(path, PATH_MAX, "%s/%s", writer->dir, name);
}

// An earlier run that ended at the very last may have given a raw file, in which nothing became shorter, its final name.
static void find_raw(const struct rank_writer *writer, uint32_t rank)
{
    char path[PATH_MAX];
    struct stat status;
    final_path(path, writer, rank);
    if (access(writer->paths[rank], F_OK) && errno == ENOENT && stat(path, &status) == 0 &&
        (uint64_t)status.st_size == writer->plan->ranks[rank].file_bytes)
        rename(path, writer->paths[rank]); // or else it is made once more
}

static int open_rank(struct rank_writer *writer, uint32_t rank, struct error *err)
{
    const char *path = writer->paths[rank];
    if (!writer->compress) {
        final_path(writer->paths[rank], writer, rank);
    } else {
        snprintf(writer->paths[rank], PATH_MAX, "%s/rank-%02u.raw", writer->dir, rank);
        if (writer->keep)
            find_raw(writer, rank);
    }
    writer->fds[rank] = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | (writer->keep ? 0 : O_TRUNC), 0666);
    if (writer->fds[rank] < 0)
        return error_set_errno(err, "%s: cannot create", path);
    return file_take_space(writer->fds[rank], writer->plan->ranks[rank].file_bytes, path, err);
}

int rank_writer_open(struct rank_writer **out, const char *dir, const struct plan *plan, bool compress, bool keep,
                     struct error *err)
{
    int rc = 0;
    struct rank_writer *writer = calloc(1, sizeof *writer);
    if (!writer)
        return error_set(err, ERR_MEMORY, "out of memory for the rank files");
    writer->plan = plan;
    writer->dir = dir;
    writer->compress = compress;
    writer->keep = keep;
    writer->fds = malloc(plan->num_ranks * sizeof *writer->fds);
    writer->paths = calloc(plan->num_ranks, sizeof *writer->paths);
    writer->stays_raw = calloc(plan->num_ranks, sizeof *writer->stays_raw);
    for (uint32_t rank = 0; writer->fds && rank < plan->num_ranks; rank++)
        writer->fds[rank] = -1;
    if (!writer->fds || !writer->paths || !writer->stays_raw)
        rc = error_set(err, ERR_MEMORY, "out of memory for %u rank files", plan->num_ranks);
    for (uint32_t rank = 0; !rc && rank < plan->num_ranks; rank++)
        rc = open_rank(writer, rank, err);
    if (rc)
        rank_writer_free(writer);
    else
        *out = writer;
    return rc;
}

void rank_writer_free(struct rank_writer *writer)
{
    if (!writer)
        return;
    for (uint32_t rank = 0; writer->fds && rank < writer->plan->num_ranks; rank++)
        if (writer->fds[rank] >= 0)
            close(writer->fds[rank]);
    free(writer->fds);
    free(writer->paths);
    free(writer->stays_raw);
    free(writer);
}

// ---- bands -------------------------------------------------------------------------------------------------------

int rank_writer_put(struct rank_writer *writer, const struct band *band, uint32_t rank, const uint8_t *bytes,
                    struct error *err)
{
    struct band_place place = band_place(writer->plan, band, rank);
    int rc = file_pwrite_full(writer->fds[rank], bytes, place.data_bytes, place.data_offset, writer->paths[rank], err);
    if (rc)
        return rc;
    // The disk can begin now, and the sync at the end has little left to wait for. An error shows there.
    if (place.data_bytes > 0) // 0 means all
        sync_file_range(writer->fds[rank], (off_t)place.data_offset, (off_t)place.data_bytes, SYNC_FILE_RANGE_WRITE);
    if (place.scale_bytes == 0)
        return 0;
    return file_pwrite_full(writer->fds[rank], bytes + place.data_bytes, place.scale_bytes, place.scale_offset,
                            writer->paths[rank], err);
}

int rank_writer_get(struct rank_writer *writer, const struct band *band, uint32_t rank, uint8_t *bytes,
                    struct error *err)
{
    struct band_place place = band_place(writer->plan, band, rank);
    int rc = file_pread_full(writer->fds[rank], bytes, place.data_bytes, place.data_offset, writer->paths[rank], err);
    if (rc || place.scale_bytes == 0)
        return rc;
    return file_pread_full(writer->fds[rank], bytes + place.data_bytes, place.scale_bytes, place.scale_offset,
                           writer->paths[rank], err);
}

// ---- finishing ---------------------------------------------------------------------------------------------------

struct leaf_job {
    struct rank_writer *writer;
    uint32_t rank;
    uint64_t *leaves;
    uint8_t *buffers; // one leaf for each thread
    struct pool_error failure;
};

// Leaves are made from what lies in the file, not from what was meant to be written.
static void hash_leaf(void *arg, int64_t task, int thread)
{
    struct leaf_job *job = arg;
    const struct plan_rank *rank = &job->writer->plan->ranks[job->rank];
    uint8_t *leaf = job->buffers + (uint64_t)thread * SHARD_LEAF_BYTES;
    struct error err;
    if (pool_error_any(&job->failure))
        return;
    uint64_t offset = (uint64_t)task * SHARD_LEAF_BYTES;
    uint64_t bytes = leaf_payload_bytes(rank->payload_bytes, (uint64_t)task);
    int rc = stop_check(&err);
    if (!rc)
        rc = file_pread_full(job->writer->fds[job->rank], leaf, bytes, rank->payload_offset + offset,
                             job->writer->paths[job->rank], &err);
    if (rc)
        pool_error_note(&job->failure, &err);
    else
        job->leaves[task] = checksum_leaf(leaf, bytes);
}

// Checksums and head of a file that stays as it is.
static int finish_raw(struct rank_writer *writer, uint32_t rank, const struct shard_identity *identity,
                      struct thread_pool *pool, struct manifest_file *file, struct error *err)
{
    const struct plan_rank *planned = &writer->plan->ranks[rank];
    const char *path = writer->paths[rank];
    uint64_t num_leaves = div_up(planned->payload_bytes, SHARD_LEAF_BYTES);
    uint8_t *head = NULL;
    int rc;
    struct leaf_job job = {.writer = writer, .rank = rank};
    job.leaves = malloc((num_leaves + 1) * sizeof *job.leaves);
    job.buffers = malloc((size_t)thread_pool_size(pool) * SHARD_LEAF_BYTES);
    if (!job.leaves || !job.buffers) {
        rc = error_set(err, ERR_MEMORY, "%s: out of memory for its checksums", path);
        goto done;
    }
    thread_pool_run(pool, hash_leaf, &job, (int64_t)num_leaves);
    file->bytes = planned->file_bytes;
    if ((rc = pool_error_take(&job.failure, err)) ||
        (rc = shard_head_serialise(&head, identity, planned->tensors, writer->plan->tensor_count, job.leaves,
                                   &file->hash, err)) ||
        (rc = file_pwrite_full(writer->fds[rank], head, planned->payload_offset, 0, path, err)))
        goto done;
    rc = file_sync(writer->fds[rank], path, err);
done:
    free(head);
    free(job.leaves);
    free(job.buffers);
    return rc;
}

static int close_rank(struct rank_writer *writer, uint32_t rank, struct error *err)
{
    int fd = writer->fds[rank];
    writer->fds[rank] = -1;
    return close(fd) ? error_set_errno(err, "%s: cannot close", writer->paths[rank]) : 0;
}

static int finish_compressed(bool *worth, struct rank_writer *writer, uint32_t rank,
                             const struct shard_identity *identity, struct thread_pool *pool, struct progress *progress,
                             struct manifest_file *file, struct error *err)
{
    char path[PATH_MAX];
    final_path(path, writer, rank);
    const struct rank_compress_input input = {
        .planned = &writer->plan->ranks[rank],
        .tensor_count = writer->plan->tensor_count,
        .identity = identity,
        .raw_fd = writer->fds[rank],
        .raw_path = writer->paths[rank],
        .path = path,
        .progress = progress,
        .keep = writer->keep,
    };
    return rank_compress(worth, file, &input, pool, err);
}

static int finish_rank(struct rank_writer *writer, uint32_t rank, struct checksum128 contract, struct thread_pool *pool,
                       struct progress *progress, struct manifest_file *file, struct error *err)
{
    bool shorter = false;
    int rc = 0;
    const struct plan *plan = writer->plan;
    struct shard_identity identity = {.rank = rank % plan->tp_size,
                                      .tp_size = plan->tp_size,
                                      .pp_rank = rank / plan->tp_size,
                                      .pp_size = plan->pp_size,
                                      .share = plan->ranks[rank].share};
    if (plan->pp_size > 1) {
        int64_t layer_begin, num_layers;
        manifest_stage(plan->stage_layers, identity.pp_rank, &layer_begin, &num_layers);
        identity.layer_begin = (uint32_t)layer_begin;
        identity.num_layers = (uint32_t)num_layers;
    }
    checksum128_to_bytes(contract, identity.contract);
    if (writer->compress)
        rc = finish_compressed(&shorter, writer, rank, &identity, pool, progress, file, err);
    if (!rc && !shorter)
        rc = finish_raw(writer, rank, &identity, pool, file, err);
    writer->stays_raw[rank] = writer->compress && !shorter;
    return rc ? rc : close_rank(writer, rank, err);
}

int rank_writer_finish(struct rank_writer *writer, struct checksum128 contract, struct thread_pool *pool,
                       struct progress *progress, struct manifest_file *files, struct error *err)
{
    char path[PATH_MAX];
    int rc;
    for (uint32_t rank = 0; rank < writer->plan->num_ranks; rank++) {
        final_path(path, writer, rank);
        if (!files[rank].name && !(files[rank].name = strdup(strrchr(path, '/') + 1)))
            return error_set(err, ERR_MEMORY, "out of memory for a file name");
        snprintf(progress->label, sizeof progress->label, "%s", files[rank].name);
        if ((rc = finish_rank(writer, rank, contract, pool, progress, &files[rank], err)))
            return rc;
    }
    // Last of all: until here a run that resumes finds its payloads.
    for (uint32_t rank = 0; rank < writer->plan->num_ranks; rank++) {
        final_path(path, writer, rank);
        if (writer->stays_raw[rank] && rename(writer->paths[rank], path))
            return error_set_errno(err, "%s: cannot rename", writer->paths[rank]);
    }
    return 0;
}
