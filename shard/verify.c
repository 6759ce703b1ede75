// See verify.h.
#include "shard/verify.h"

#include "formats/extra_file.h"
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
    if (findings->code != ERR_IO)
        findings->code = error->code == ERR_IO ? ERR_IO : ERR_CORRUPT;
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

int verify_leaf(const struct shard_file *file, uint64_t leaf, int fd, const char *path, struct verify_memory *memory,
                struct error *err)
{
    struct shard_stored stored = shard_file_stored_leaf(file, leaf);
    int rc =
        file_pread_full(fd, memory->stored, stored.bytes, shard_file_payload_offset(file) + stored.offset, path, err);
    if (rc || (rc = shard_file_verify_leaf(file, leaf, memory->stored, err)) || !shard_file_is_compressed(file))
        return rc;
    return shard_file_decode_leaf(file, leaf, memory->stored, memory->payload, memory->scratch, err);
}

// One run of the pool over the leaves of one file. Which leaves are broken is noted in flags; their sentences are made
// afterwards, in order.
struct leaf_job {
    const struct shard_file *file;
    const char *path;
    int fd;
    struct verify_memory *threads;
    bool *broken; // [leaves]
    struct progress *progress;
};

static void run_leaf(void *arg, int64_t task, int thread)
{
    struct leaf_job *job = arg;
    struct error ignored; // a disk that cannot read it has lost it
    if (stop_requested())
        return;
    job->broken[task] =
        verify_leaf(job->file, (uint64_t)task, job->fd, job->path, &job->threads[thread], &ignored) != 0;
    progress_add(job->progress, shard_file_stored_leaf(job->file, (uint64_t)task).bytes);
    if (thread == 0)
        progress_show(job->progress);
}

int verify_leaves(bool *broken, const struct shard_file *file, int fd, const char *path, struct verify_memory *memory,
                  struct thread_pool *pool, struct progress *progress, struct error *err)
{
    struct leaf_job job = {file, path, fd, memory, broken, progress};
    thread_pool_run(pool, run_leaf, &job, (int64_t)shard_file_leaf_count(file));
    return stop_check(err);
}

void verify_memory_free(struct verify_memory *memory, int threads)
{
    for (int i = 0; memory && i < threads; i++) {
        free(memory[i].stored);
        free(memory[i].payload);
        leaf_scratch_free(memory[i].scratch);
    }
    free(memory);
}

struct verify_memory *verify_memory_new(int threads)
{
    struct verify_memory *memory = calloc((size_t)threads, sizeof *memory);
    bool complete = memory != NULL;
    for (int i = 0; complete && i < threads; i++)
        complete = (memory[i].stored = malloc(SHARD_STORED_MAX_BYTES)) &&
                   (memory[i].payload = malloc(SHARD_LEAF_BYTES)) && (memory[i].scratch = leaf_scratch_new());
    if (complete)
        return memory;
    verify_memory_free(memory, threads);
    return NULL;
}

// A leaf that was wrong and is right at a second look: whatever the reason, it comes again.
static void note_changing(const struct shard_file *file, const char *path, uint64_t leaf,
                          struct verify_findings *findings)
{
    struct shard_stored stored = shard_file_stored_leaf(file, leaf);
    uint64_t begin = shard_file_payload_offset(file) + stored.offset;
    struct error found;
    error_set(
        &found, ERR_CORRUPT,
        "%s: file bytes %llu to %llu came wrong from the disk once and right the second time: it, its cable or the "
        "memory is not to be relied on",
        path, (unsigned long long)begin, (unsigned long long)(begin + stored.bytes - 1));
    verify_note(findings, &found);
}

static int verify_rank(const struct shard_dir *dir, uint32_t rank, struct thread_pool *pool, struct progress *progress,
                       struct verify_findings *findings, struct error *err)
{
    const struct shard_file *file = dir->files[rank];
    const char *path = dir->paths[rank];
    uint64_t leaves = shard_file_leaf_count(file);
    int fd = -1, rc;
    snprintf(progress->label, sizeof progress->label, "%s", dir->manifest->ranks[rank].name);
    struct verify_memory *memory = verify_memory_new(thread_pool_size(pool));
    bool *broken = calloc(leaves + 1, sizeof *broken);
    if (!memory || !broken)
        rc = error_set(err, ERR_MEMORY, "out of memory to verify %s", path);
    else if (!(rc = file_open_read(&fd, NULL, path, err)))
        rc = verify_leaves(broken, file, fd, path, memory, pool, progress, err);
    for (uint64_t leaf = 0; !rc && leaf < leaves; leaf++) {
        struct error found;
        if (!broken[leaf])
            continue;
        if (verify_leaf(file, leaf, fd, path, memory, &found))
            verify_note(findings, &found);
        else
            note_changing(file, path, leaf, findings);
    }
    if (fd >= 0)
        close(fd);
    free(broken);
    verify_memory_free(memory, thread_pool_size(pool));
    return rc;
}

int verify_extra(const char *dir, const struct manifest_file *file, struct error *err)
{
    uint8_t *bytes;
    uint64_t num_bytes;
    int rc = extra_file_load(&bytes, &num_bytes, file, dir, err);
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
