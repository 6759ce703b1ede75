// See verify.h.
#include "shard/verify.h"

#include "formats/file_io.h"
#include "shard/stop.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

void verify_note(struct verify_findings *findings, const struct error *error)
{
    if (findings->count < VERIFY_SHOWN)
        findings->shown[findings->count] = *error;
    findings->count++;
}

uint64_t verify_bytes(const struct manifest *manifest)
{
    uint64_t bytes = 0;
    for (size_t i = 0; i < manifest->num_ranks; i++)
        bytes += manifest->ranks[i].bytes;
    for (size_t i = 0; i < manifest->num_extras; i++)
        bytes += manifest->extras[i].bytes;
    return bytes;
}

// ---- checksums ---------------------------------------------------------------------------------------------------

struct thread_memory {
    uint8_t *stored, *payload; // one leaf
    struct leaf_scratch *scratch;
};

// One run of the pool over the leaves of one file. Which leaves are broken is noted in flags; their sentences
// are made afterwards, in order.
struct leaf_job {
    const struct shard_file *file;
    const char *path;
    int fd;
    struct thread_memory *threads;
    bool *broken; // [leaves]
    struct progress *progress;
};

// A compressed leaf must not only be what was written, but also become a leaf.
static int check_leaf(const struct leaf_job *job, uint64_t leaf, struct thread_memory *memory, struct error *err)
{
    struct shard_stored stored = shard_file_stored_leaf(job->file, leaf);
    uint64_t offset = shard_file_payload_offset(job->file) + stored.offset;
    int rc = file_pread_full(job->fd, memory->stored, stored.bytes, offset, job->path, err);
    if (rc || (rc = shard_file_verify_leaf(job->file, leaf, memory->stored, err)) ||
        !shard_file_is_compressed(job->file))
        return rc;
    return shard_file_decode_leaf(job->file, leaf, memory->stored, memory->payload, memory->scratch, err);
}

static void run_leaf(void *arg, int64_t task, int thread)
{
    struct leaf_job *job = arg;
    struct error err;
    if (stop_requested())
        return;
    job->broken[task] = check_leaf(job, (uint64_t)task, &job->threads[thread], &err) != 0;
    progress_add(job->progress, shard_file_stored_leaf(job->file, (uint64_t)task).bytes);
    if (thread == 0)
        progress_show(job->progress);
}

static void free_threads(struct thread_memory *threads, int count)
{
    for (int i = 0; threads && i < count; i++) {
        free(threads[i].stored);
        free(threads[i].payload);
        leaf_scratch_free(threads[i].scratch);
    }
    free(threads);
}

static struct thread_memory *make_threads(int count)
{
    bool complete = true;
    struct thread_memory *threads = calloc((size_t)count, sizeof *threads);
    for (int i = 0; threads && i < count; i++)
        complete = (threads[i].stored = malloc(SHARD_STORED_MAX_BYTES)) &&
                   (threads[i].payload = malloc(SHARD_LEAF_BYTES)) && (threads[i].scratch = leaf_scratch_new()) &&
                   complete;
    if (complete)
        return threads;
    free_threads(threads, count);
    return NULL;
}

static int verify_rank(const struct shard_dir *dir, uint32_t rank, struct thread_pool *pool, struct progress *progress,
                       struct verify_findings *findings, struct error *err)
{
    struct leaf_job job = {.file = dir->files[rank], .path = dir->paths[rank], .fd = -1, .progress = progress};
    uint64_t leaves = shard_file_leaf_count(job.file);
    int rc;
    snprintf(progress->label, sizeof progress->label, "%s", dir->manifest->ranks[rank].name);
    job.threads = make_threads(thread_pool_size(pool));
    job.broken = calloc(leaves + 1, sizeof *job.broken);
    if (!job.threads || !job.broken) {
        rc = error_set(err, ERR_MEMORY, "out of memory to verify %s", job.path);
        goto done;
    }
    if ((rc = file_open_read(&job.fd, NULL, job.path, err)))
        goto done;
    thread_pool_run(pool, run_leaf, &job, (int64_t)leaves);
    if ((rc = stop_check(err)))
        goto done;
    for (uint64_t leaf = 0; leaf < leaves; leaf++) {
        struct error found;
        if (job.broken[leaf] && check_leaf(&job, leaf, &job.threads[0], &found))
            verify_note(findings, &found);
    }
done:
    if (job.fd >= 0)
        close(job.fd);
    free(job.broken);
    free_threads(job.threads, thread_pool_size(pool));
    return rc;
}

int verify_extra(const char *dir, const struct manifest_file *file, struct error *err)
{
    char path[2 * PATH_MAX];
    uint8_t *bytes;
    uint64_t num_bytes;
    snprintf(path, sizeof path, "%s/%s", dir, file->name);
    int rc = file_read_all(&bytes, &num_bytes, path, file->bytes, ERR_CORRUPT, err);
    if (rc)
        return rc;
    if (num_bytes != file->bytes)
        rc = error_set(err, ERR_CORRUPT, "%s: the file has %llu bytes, the manifest says %llu", path,
                       (unsigned long long)num_bytes, (unsigned long long)file->bytes);
    else if (!checksum128_equal(checksum_whole(bytes, num_bytes), file->hash))
        rc = error_set(err, ERR_CORRUPT, "%s: checksum mismatch; the file was changed", path);
    free(bytes);
    return rc;
}

int verify_checksums(struct shard_dir *dir, const char *path, struct thread_pool *pool, struct progress *progress,
                     struct verify_findings *findings, struct error *err)
{
    struct error found;
    int rc;
    for (uint32_t rank = 0; rank < dir->manifest->num_ranks; rank++) {
        if (shard_dir_open_rank(dir, rank, &found)) {
            if (found.code == ERR_MEMORY) // says nothing about the file
                return error_set(err, ERR_MEMORY, "%s", found.msg);
            verify_note(findings, &found);
        } else if ((rc = verify_rank(dir, rank, pool, progress, findings, err)))
            return rc;
    }
    for (size_t i = 0; i < dir->manifest->num_extras; i++)
        if (verify_extra(path, &dir->manifest->extras[i], &found)) {
            if (found.code == ERR_MEMORY)
                return error_set(err, ERR_MEMORY, "%s", found.msg);
            verify_note(findings, &found);
        }
    return 0;
}
