// See repair.h.
#include "shard/repair.h"

#include "formats/file_io.h"
#include "shard/pool_error.h"
#include "shard/repair_head.h"
#include "shard/repair_leaf.h"
#include "shard/stop.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

// So many leaves that come out wrong say that the source is another model: the rest need not be tried.
enum { GIVE_UP_AFTER = 16 };
// Reasons that are kept: no more are shown.
enum { REASONS = VERIFY_SHOWN, NOT_TRIED = UINT8_MAX };
_Static_assert((int)REASONS < (int)NOT_TRIED, "a byte tells them apart");

int repair_begin(struct repair *out, struct shard_dir *dir, const char *path, struct thread_pool *pool,
                 struct verify_findings *failures, struct error *err)
{
    struct repair repair = {.path = path, .dir = dir, .pool = pool, .failures = failures};
    repair.ranks = calloc(dir->manifest->num_ranks, sizeof *repair.ranks);
    repair.extras = calloc(dir->manifest->num_extras + 1, sizeof *repair.extras);
    repair.memory = verify_memory_new(thread_pool_size(pool));
    if (!repair.ranks || !repair.extras || !repair.memory) {
        repair_end(&repair);
        return error_set(err, ERR_MEMORY, "%s: out of memory", path);
    }
    *out = repair;
    return 0;
}

void repair_end(struct repair *repair)
{
    for (size_t rank = 0; repair->ranks && rank < repair->dir->manifest->num_ranks; rank++)
        free(repair->ranks[rank].broken);
    free(repair->ranks);
    free(repair->extras);
    if (repair->memory)
        verify_memory_free(repair->memory, thread_pool_size(repair->pool));
    *repair = (struct repair){0};
}

// ---- looking -----------------------------------------------------------------------------------------------------

// Which leaves are broken, by a head that holds.
static int scan_rank(struct repair *repair, uint32_t rank, struct progress *progress, struct error *err)
{
    struct repair_rank *state = &repair->ranks[rank];
    const struct shard_file *file = repair->dir->files[rank];
    const char *path = repair->dir->paths[rank];
    uint64_t leaves = shard_file_leaf_count(file);
    int fd = -1, rc = 0;
    if (!(state->broken = calloc(leaves + 1, sizeof *state->broken)))
        rc = error_set(err, ERR_MEMORY, "%s: out of memory", path);
    else if (state->missing)
        memset(state->broken, true, leaves);
    else if (!(rc = file_open_read(&fd, NULL, path, err)))
        rc = verify_leaves(state->broken, file, fd, path, repair->memory, repair->pool, progress, err);
    for (uint64_t leaf = 0; !rc && leaf < leaves; leaf++)
        state->broken_leaves += state->broken[leaf];
    if (fd >= 0)
        close(fd);
    return rc;
}

// Only regular files are written, and only in the directory itself: whatever else has the name was put there by somebody, who may want it.
static int refuse_strange(const char *path, struct error *err)
{
    struct stat status;
    if (lstat(path, &status) || S_ISREG(status.st_mode))
        return 0;
    if (!S_ISLNK(status.st_mode))
        return error_set(err, ERR_CORRUPT, "%s: is no regular file; remove it, then repair makes it anew", path);
    return error_set(err, ERR_CORRUPT,
                     "%s: is a symbolic link to what does not hold; repair the directory that it leads to, or remove "
                     "the link, then repair makes the file anew",
                     path);
}

// What stands at the place of a rank's file, and whether its head holds.
static int look_at_rank(struct repair *repair, uint32_t rank, struct error *err)
{
    struct repair_rank *state = &repair->ranks[rank];
    const char *path = repair->dir->paths[rank];
    struct stat status;
    struct error found;
    bool there = stat(path, &status) == 0;
    if (!there && errno != ENOENT && errno != ELOOP)
        return error_set_errno(err, "%s: cannot look at it", path);
    if (!there || !S_ISREG(status.st_mode)) {
        state->missing = state->head = true;
        return 0;
    }
    state->length = (uint64_t)status.st_size != repair->dir->manifest->ranks[rank].bytes;
    if (!shard_dir_open_rank(repair->dir, rank, &found))
        return 0;
    if (found.code == ERR_MEMORY)
        return error_set(err, ERR_MEMORY, "%s", found.msg);
    int rc = repair_head_of_file(&repair->dir->files[rank], repair->dir, rank, err);
    state->head = !rc && !repair->dir->files[rank];
    return rc;
}

static bool rank_is_broken(const struct repair_rank *rank) { return rank->head || rank->length || rank->broken_leaves; }

static int survey_rank(struct repair *repair, uint32_t rank, struct progress *progress, struct error *err)
{
    int rc = look_at_rank(repair, rank, err);
    if (!rc && !repair->ranks[rank].head)
        rc = scan_rank(repair, rank, progress, err);
    return !rc && rank_is_broken(&repair->ranks[rank]) ? refuse_strange(repair->dir->paths[rank], err) : rc;
}

static int survey_extra(struct repair *repair, size_t i, struct error *err)
{
    const struct manifest_file *extra = &repair->dir->manifest->extras[i];
    char path[2 * PATH_MAX];
    struct error found;
    snprintf(path, sizeof path, "%s/%s", repair->path, extra->name);
    repair->extras[i] = verify_extra(repair->path, extra, &found) != 0;
    if (repair->extras[i] && found.code == ERR_MEMORY)
        return error_set(err, ERR_MEMORY, "%s", found.msg);
    return repair->extras[i] ? refuse_strange(path, err) : 0;
}

int repair_survey(struct repair *repair, struct progress *progress, struct error *err)
{
    const struct manifest *manifest = repair->dir->manifest;
    int rc;
    for (uint32_t rank = 0; rank < manifest->num_ranks; rank++) {
        snprintf(progress->label, sizeof progress->label, "%s", manifest->ranks[rank].name);
        if ((rc = survey_rank(repair, rank, progress, err)))
            return rc;
    }
    for (size_t i = 0; i < manifest->num_extras; i++)
        if ((rc = survey_extra(repair, i, err)))
            return rc;
    return 0;
}

bool repair_is_needed(const struct repair *repair)
{
    for (size_t rank = 0; rank < repair->dir->manifest->num_ranks; rank++)
        if (rank_is_broken(&repair->ranks[rank]))
            return true;
    for (size_t i = 0; i < repair->dir->manifest->num_extras; i++)
        if (repair->extras[i])
            return true;
    return false;
}

uint64_t repair_bytes(const struct repair *repair)
{
    uint64_t bytes = 0;
    for (size_t rank = 0; rank < repair->dir->manifest->num_ranks; rank++)
        bytes += repair->ranks[rank].head ? repair->dir->manifest->ranks[rank].bytes
                                          : repair->ranks[rank].broken_leaves * SHARD_LEAF_BYTES;
    return bytes;
}

// ---- leaves ------------------------------------------------------------------------------------------------------

// Broken leaves that follow each other.
struct run {
    uint64_t first, end;
};

struct mend_job {
    struct repair *repair;
    struct repair_source *source;
    struct repair_worker *workers;
    struct progress *progress;
    uint32_t rank;
    const struct shard_file *file;
    const char *path;
    int fd;
    struct run *runs;
    uint64_t num_runs;
    uint8_t *refused;      // [leaves] 0: it was mended, or whole; NOT_TRIED; else 1 + the number of the reason
    struct error *reasons; // [REASONS]
    atomic_int refused_leaves;
    struct pool_error failure;
};

static int list_runs(struct mend_job *job, struct error *err)
{
    const bool *broken = job->repair->ranks[job->rank].broken;
    uint64_t leaves = shard_file_leaf_count(job->file);
    job->runs = malloc((leaves + 1) * sizeof *job->runs);
    job->refused = calloc(leaves + 1, sizeof *job->refused);
    job->reasons = malloc(REASONS * sizeof *job->reasons);
    if (!job->runs || !job->refused || !job->reasons)
        return error_set(err, ERR_MEMORY, "%s: out of memory", job->path);
    for (uint64_t leaf = 0; leaf < leaves; leaf++) {
        struct run *last = job->num_runs ? &job->runs[job->num_runs - 1] : NULL;
        if (!broken[leaf])
            continue;
        if (last && last->end == leaf && leaf - last->first < REPAIR_RUN_LEAVES)
            last->end++;
        else
            job->runs[job->num_runs++] = (struct run){leaf, leaf + 1};
    }
    return 0;
}

static int write_leaf(const struct mend_job *job, uint64_t leaf, const uint8_t *stored, struct error *err)
{
    struct shard_stored place = shard_file_stored_leaf(job->file, leaf);
    return file_pwrite_full(job->fd, stored, place.bytes, shard_file_payload_offset(job->file) + place.offset,
                            job->path, err);
}

// What a source lacks, gives otherwise than it was or cannot read is told of the leaf, and the others can still be mended. Anything else, such
// as want of memory, says nothing of the source and ends the repair.
static bool is_told(int rc) { return rc == ERR_CORRUPT || rc == ERR_MODEL || rc == ERR_IO; }

static void refuse(struct mend_job *job, uint64_t leaf, const struct error *why)
{
    int number = atomic_fetch_add(&job->refused_leaves, 1);
    if (number < REASONS)
        job->reasons[number] = *why;
    job->refused[leaf] = number < REASONS ? (uint8_t)(1 + number) : NOT_TRIED;
}

// Makes the bytes of one leaf that the source does not hold as they are. *have_payload: the worker has the payload of the run.
static int make_leaf(struct mend_job *job, const struct run *run, uint64_t leaf, bool *have_payload,
                     struct repair_worker *worker, int thread, struct error *err)
{
    struct repair_source *source = job->source;
    uint64_t begin = run->first * SHARD_LEAF_BYTES, payload_bytes = shard_file_payload_bytes(job->file);
    uint64_t end = run->end * SHARD_LEAF_BYTES < payload_bytes ? run->end * SHARD_LEAF_BYTES : payload_bytes;
    int rc = *have_payload ? 0 : source->payload(source, thread, job->rank, begin, end, worker->run, err);
    if (rc)
        return rc;
    *have_payload = true;
    return repair_leaf_make(worker, job->file, leaf, worker->run + (leaf - run->first) * SHARD_LEAF_BYTES, source->path,
                            job->path, err);
}

static int mend_run(struct mend_job *job, const struct run *run, struct repair_worker *worker, int thread,
                    struct error *err)
{
    struct repair_source *source = job->source;
    bool have_payload = false;
    int rc = stop_check(err);
    for (uint64_t leaf = run->first; !rc && leaf < run->end; leaf++) {
        if (!source->stored ||
            !source->stored(source, job->rank, leaf, shard_file_stored_leaf(job->file, leaf).bytes, worker->stored))
            rc = make_leaf(job, run, leaf, &have_payload, worker, thread, err);
        if (!rc) {
            rc = write_leaf(job, leaf, worker->stored, err);
        } else if (is_told(rc)) {
            for (uint64_t end = have_payload ? leaf + 1 : run->end; leaf < end; leaf++)
                refuse(job, leaf, err);
            leaf--;
            rc = 0;
        }
    }
    return rc;
}

static void mend_task(void *arg, int64_t task, int thread)
{
    struct mend_job *job = arg;
    const struct run *run = &job->runs[task];
    struct error err;
    if (pool_error_any(&job->failure))
        return;
    if (atomic_load(&job->refused_leaves) >= GIVE_UP_AFTER) {
        memset(job->refused + run->first, NOT_TRIED, run->end - run->first);
        return;
    }
    if (mend_run(job, run, &job->workers[thread], thread, &err))
        pool_error_note(&job->failure, &err);
    progress_add(job->progress, (run->end - run->first) * SHARD_LEAF_BYTES);
    if (thread == 0)
        progress_show(job->progress);
}

// ---- files -------------------------------------------------------------------------------------------------------

static int open_to_mend(int *fd, const struct repair *repair, uint32_t rank, struct error *err)
{
    const struct repair_rank *state = &repair->ranks[rank];
    const char *path = repair->dir->paths[rank];
    int flags = O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK | (state->missing ? O_CREAT | O_EXCL : 0);
    *fd = open(path, flags, 0666);
    if (*fd < 0)
        return error_set_errno(err, "%s: cannot open it for writing", path);
    return state->missing || state->length ? file_take_space(*fd, repair->dir->manifest->ranks[rank].bytes, path, err)
                                           : 0;
}

static void note_refused(const struct mend_job *job, uint64_t leaf)
{
    struct error not_tried;
    if (job->refused[leaf] == NOT_TRIED)
        error_set(&not_tried, ERR_CORRUPT, "%s: not tried, after so much that did not fit", job->path);
    verify_note(job->repair->failures,
                job->refused[leaf] == NOT_TRIED ? &not_tried : &job->reasons[job->refused[leaf] - 1]);
}

// Reads back what was mended, past the page cache where that works, and counts it.
static int confirm(struct mend_job *job, struct error *err)
{
    struct repair_rank *state = &job->repair->ranks[job->rank];
    struct error found;
    posix_fadvise(job->fd, 0, 0, POSIX_FADV_DONTNEED);
    for (uint64_t leaf = 0; leaf < shard_file_leaf_count(job->file); leaf++) {
        if (!state->broken[leaf])
            continue;
        if (job->refused[leaf]) {
            state->broken[leaf] = false;
            note_refused(job, leaf);
            continue;
        }
        if (verify_leaf(job->file, leaf, job->fd, job->path, job->repair->memory, &found))
            return error_set(err, ERR_IO, "the disk does not give back what was written to it: %s", found.msg);
        state->mended_leaves++;
        state->mended_bytes += shard_file_stored_leaf(job->file, leaf).bytes;
    }
    return 0;
}

// Leaves first and the head last: a file whose head holds is worth looking into.
static int mend_file(struct mend_job *job, const uint8_t *head, struct error *err)
{
    struct repair_rank *state = &job->repair->ranks[job->rank];
    uint64_t head_bytes = shard_file_payload_offset(job->file);
    int rc = list_runs(job, err);
    if (rc || (rc = open_to_mend(&job->fd, job->repair, job->rank, err)))
        return rc;
    thread_pool_run(job->repair->pool, mend_task, job, (int64_t)job->num_runs);
    if ((rc = pool_error_take(&job->failure, err)) || (rc = file_sync(job->fd, job->path, err)))
        return rc;
    if (head && ((rc = file_pwrite_full(job->fd, head, head_bytes, 0, job->path, err)) ||
                 (rc = file_sync(job->fd, job->path, err))))
        return rc;
    state->mended_head = head != NULL;
    state->mended_bytes += head ? head_bytes : 0;
    return confirm(job, err);
}

static int mend_rank(struct repair *repair, uint32_t rank, struct repair_source *source, struct repair_worker *workers,
                     struct progress *progress, struct error *err)
{
    struct repair_rank *state = &repair->ranks[rank];
    struct mend_job job = {.repair = repair,
                           .source = source,
                           .workers = workers,
                           .progress = progress,
                           .rank = rank,
                           .path = repair->dir->paths[rank],
                           .fd = -1};
    uint8_t *head = NULL;
    int rc = 0;
    snprintf(progress->label, sizeof progress->label, "%s", repair->dir->manifest->ranks[rank].name);
    if (state->head) {
        struct error found;
        if ((rc = repair_head(&head, &repair->dir->files[rank], source, repair->dir, rank, repair->pool, workers,
                              progress, &found))) {
            if (!is_told(rc)) {
                *err = found;
                return rc;
            }
            verify_note(repair->failures, &found);
            return 0;
        }
        rc = scan_rank(repair, rank, progress, err);
        progress->total_bytes += state->broken_leaves * SHARD_LEAF_BYTES;
    }
    job.file = repair->dir->files[rank];
    if (!rc)
        rc = mend_file(&job, head, err);
    if (job.fd >= 0 && close(job.fd) && !rc)
        rc = error_set_errno(err, "%s: cannot close", job.path);
    free(job.runs);
    free(job.refused);
    free(job.reasons);
    free(head);
    return rc;
}

// ---- extras ------------------------------------------------------------------------------------------------------

static int mend_extra(struct repair *repair, const struct manifest_file *wanted, struct repair_source *source,
                      struct error *err)
{
    struct error found;
    uint8_t *bytes;
    uint64_t num_bytes;
    int rc = source->extra(source, wanted->name, &bytes, &num_bytes, &found);
    if (rc && !is_told(rc)) {
        *err = found;
        return rc;
    }
    if (rc) {
        verify_note(repair->failures, &found);
        return 0;
    }
    if (num_bytes != wanted->bytes || !checksum128_equal(checksum_whole(bytes, num_bytes), wanted->hash)) {
        error_set(&found, ERR_CORRUPT,
                  "%s/%s: what %s gives has another checksum than the manifest says, so it was left as it is",
                  repair->path, wanted->name, source->path);
        verify_note(repair->failures, &found);
    } else if (!(rc = file_write_atomic(repair->path, wanted->name, bytes, num_bytes, err))) {
        repair->mended_extras++;
        repair->mended_extra_bytes += num_bytes;
    }
    free(bytes);
    return rc;
}

int repair_mend(struct repair *repair, struct repair_source *source, struct progress *progress, struct error *err)
{
    const struct manifest *manifest = repair->dir->manifest;
    struct repair_worker *workers;
    int threads = thread_pool_size(repair->pool), rc = repair_workers_new(&workers, threads, err);
    if (rc)
        return rc;
    for (uint32_t rank = 0; !rc && rank < manifest->num_ranks; rank++) {
        if (rank_is_broken(&repair->ranks[rank]))
            rc = mend_rank(repair, rank, source, workers, progress, err);
    }
    for (size_t i = 0; !rc && i < manifest->num_extras; i++)
        if (repair->extras[i])
            rc = mend_extra(repair, &manifest->extras[i], source, err);
    repair_workers_free(workers, threads);
    return rc ? rc : file_sync_dir(repair->path, err);
}
