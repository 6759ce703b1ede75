// See rank_writer.h.
#include "shard/rank_writer.h"

#include "formats/checked.h"
#include "formats/checksum.h"
#include "formats/file_io.h"
#include "shard/pool_error.h"
#include "shard/stop.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct rank_writer {
    const struct plan *plan;
    int *fds;
    char (*paths)[PATH_MAX];
};

// ---- opening -----------------------------------------------------------------------------------------------------

// Takes the space at once, so that a full disk is found before the work and not after. It reads as zeros.
static int take_space(int fd, uint64_t bytes, const char *path, struct error *err)
{
    int failed;
    do {
        failed = fallocate(fd, 0, 0, (off_t)bytes);
    } while (failed && errno == EINTR);
    if (failed && (errno == EOPNOTSUPP || errno == ENOSYS)) // a file system that cannot reserve
        failed = ftruncate(fd, (off_t)bytes);
    return failed ? error_set_errno(err, "%s: cannot take %llu bytes of disk", path, (unsigned long long)bytes) : 0;
}

static int open_rank(struct rank_writer *writer, const char *dir, uint32_t rank, bool keep, struct error *err)
{
    char name[64];
    const char *path = writer->paths[rank];
    manifest_rank_file_name(name, sizeof name, rank, writer->plan->tp_size);
    snprintf(writer->paths[rank], PATH_MAX, "%s/%s", dir, name);
    writer->fds[rank] = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | (keep ? 0 : O_TRUNC), 0666);
    if (writer->fds[rank] < 0)
        return error_set_errno(err, "%s: cannot create", path);
    return take_space(writer->fds[rank], writer->plan->ranks[rank].file_bytes, path, err);
}

int rank_writer_open(struct rank_writer **out, const char *dir, const struct plan *plan, bool keep, struct error *err)
{
    int rc = 0;
    struct rank_writer *writer = calloc(1, sizeof *writer);
    if (!writer)
        return error_set(err, ERR_MEMORY, "out of memory for the rank files");
    writer->plan = plan;
    writer->fds = malloc(plan->tp_size * sizeof *writer->fds);
    writer->paths = calloc(plan->tp_size, sizeof *writer->paths);
    for (uint32_t rank = 0; writer->fds && rank < plan->tp_size; rank++)
        writer->fds[rank] = -1;
    if (!writer->fds || !writer->paths)
        rc = error_set(err, ERR_MEMORY, "out of memory for %u rank files", plan->tp_size);
    for (uint32_t rank = 0; !rc && rank < plan->tp_size; rank++)
        rc = open_rank(writer, dir, rank, keep, err);
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
    for (uint32_t rank = 0; writer->fds && rank < writer->plan->tp_size; rank++)
        if (writer->fds[rank] >= 0)
            close(writer->fds[rank]);
    free(writer->fds);
    free(writer->paths);
    free(writer);
}

// ---- bands -------------------------------------------------------------------------------------------------------

int rank_writer_put(struct rank_writer *writer, const struct band *band, uint32_t rank, const uint8_t *bytes,
                    struct error *err)
{
    struct band_place place = band_place(writer->plan, band, rank);
    int rc = file_pwrite_full(writer->fds[rank], bytes, place.data_bytes, place.data_offset, writer->paths[rank], err);
    if (rc || place.scale_bytes == 0)
        return rc;
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
    uint64_t bytes = rank->payload_bytes - offset < SHARD_LEAF_BYTES ? rank->payload_bytes - offset : SHARD_LEAF_BYTES;
    int rc = stop_check(&err);
    if (!rc)
        rc = file_pread_full(job->writer->fds[job->rank], leaf, bytes, rank->payload_offset + offset,
                             job->writer->paths[job->rank], &err);
    if (rc)
        pool_error_note(&job->failure, &err);
    else
        job->leaves[task] = checksum_leaf(leaf, bytes);
}

static int finish_rank(struct rank_writer *writer, uint32_t rank, struct checksum128 contract, struct thread_pool *pool,
                       struct manifest_file *file, struct error *err)
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
    if ((rc = pool_error_take(&job.failure, err)))
        goto done;
    struct shard_identity identity = {
        .rank = rank, .tp_size = writer->plan->tp_size, .pp_rank = 0, .pp_size = 1, .share = planned->share};
    checksum128_to_bytes(contract, identity.contract);
    if ((rc = shard_head_serialise(&head, &identity, planned->tensors, writer->plan->tensor_count, job.leaves,
                                   &file->hash, err)) ||
        (rc = file_pwrite_full(writer->fds[rank], head, planned->payload_offset, 0, path, err)))
        goto done;
    if (fdatasync(writer->fds[rank])) {
        rc = error_set_errno(err, "%s: cannot sync", path);
        goto done;
    }
    int fd = writer->fds[rank];
    writer->fds[rank] = -1;
    if (close(fd))
        rc = error_set_errno(err, "%s: cannot close", path);
done:
    free(head);
    free(job.leaves);
    free(job.buffers);
    return rc;
}

int rank_writer_finish(struct rank_writer *writer, struct checksum128 contract, struct thread_pool *pool,
                       struct manifest_file *files, struct error *err)
{
    int rc;
    for (uint32_t rank = 0; rank < writer->plan->tp_size; rank++) {
        if (!files[rank].name && !(files[rank].name = strdup(strrchr(writer->paths[rank], '/') + 1)))
            return error_set(err, ERR_MEMORY, "out of memory for a file name");
        files[rank].bytes = writer->plan->ranks[rank].file_bytes;
        if ((rc = finish_rank(writer, rank, contract, pool, &files[rank], err)))
            return rc;
    }
    return 0;
}
