// See repair_head.h. Cheapest first: the table of checksums that stands in the broken head, checksums of what stands in the file, and
// at last, checksums of everything that the source gives.
#include "shard/repair_head.h"

#include "formats/checked.h"
#include "formats/file_io.h"
#include "formats/shard_layout.h"
#include "shard/pool_error.h"
#include "shard/stop.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct remaking {
    const struct shard_dir *dir;
    struct repair_source *source;
    uint32_t rank;
    struct thread_pool *pool;
    struct repair_worker *workers;
    struct progress *progress;
    const char *path;
    int fd; // of what stands there; -1: nothing does
    uint64_t file_bytes;
    struct shard_identity identity;
    struct shard_tensor *tensors;
    uint64_t tensor_count;
    struct shard_disk_layout layout; // compressed: without the file's length
    bool compressed;
    uint64_t *leaves;          // [layout.leaf_count]: the guess
    struct shard_leaf *stored; // [layout.leaf_count], compressed files only
    struct pool_error failure;
};

// ---- the index ---------------------------------------------------------------------------------------------------

// Lays the file out as it must be. A file that has the length that it has without compression is not compressed.
static int lay_out(struct remaking *r, struct error *err)
{
    const struct manifest *manifest = r->dir->manifest;
    const struct shard_tensor *tensors;
    int rc = r->source->contents(r->source, r->rank, &r->identity.share, &tensors, &r->tensor_count, err);
    if (rc)
        return rc;
    r->identity.rank = r->rank % manifest->tp_size;
    r->identity.pp_rank = r->rank / manifest->tp_size;
    r->identity.tp_size = manifest->tp_size;
    r->identity.pp_size = manifest->pp_size;
    if (manifest->pp_size > 1) {
        int64_t layer_begin, num_layers;
        manifest_stage(manifest->stage_layers, r->identity.pp_rank, &layer_begin, &num_layers);
        r->identity.layer_begin = (uint32_t)layer_begin;
        r->identity.num_layers = (uint32_t)num_layers;
    }
    checksum128_to_bytes(manifest->contract, r->identity.contract);
    if (!(r->tensors = malloc(r->tensor_count * sizeof *r->tensors + 1)))
        return error_set(err, ERR_MEMORY, "%s: out of memory for its index", r->path);
    memcpy(r->tensors, tensors, r->tensor_count * sizeof *tensors);
    if ((rc = shard_layout_all(&r->layout, r->tensors, r->tensor_count, false, err)))
        return rc;
    r->compressed = r->layout.file_bytes != manifest->ranks[r->rank].bytes;
    if (r->compressed && (rc = shard_layout_all(&r->layout, r->tensors, r->tensor_count, true, err)))
        return rc;
    r->leaves = calloc(r->layout.leaf_count + 1, sizeof *r->leaves);
    r->stored = calloc(r->layout.leaf_count + 1, sizeof *r->stored);
    return r->leaves && r->stored ? 0 : error_set(err, ERR_MEMORY, "%s: out of memory for its checksums", r->path);
}

// Makes the head of the guess. *head is NULL when it is not the one that the manifest means.
static int try_guess(const struct remaking *r, uint8_t **head, struct error *err)
{
    struct checksum128 root;
    uint8_t *made;
    *head = NULL;
    int rc = r->compressed
                 ? shard_compressed_head_serialise(&made, &r->identity, r->tensors, r->tensor_count, r->leaves,
                                                   r->stored, &root, err)
                 : shard_head_serialise(&made, &r->identity, r->tensors, r->tensor_count, r->leaves, &root, err);
    if (rc)
        return rc == ERR_MEMORY ? rc : 0; // no head at all comes of it
    if (checksum128_equal(root, r->dir->manifest->ranks[r->rank].hash))
        *head = made;
    else
        free(made);
    return 0;
}

// ---- guesses -----------------------------------------------------------------------------------------------------

// What stands where the tables belong. False: the file is too short.
static bool guess_table(struct remaking *r)
{
    struct error ignored;
    const struct shard_disk_layout *layout = &r->layout;
    return r->fd >= 0 && layout->table_offset + layout->table_bytes <= r->file_bytes &&
           !file_pread_full(r->fd, r->leaves, layout->leaf_count * sizeof *r->leaves, layout->leaves_offset, r->path,
                            &ignored) &&
           !file_pread_full(r->fd, r->stored, layout->table_bytes, layout->table_offset, r->path, &ignored);
}

static void hash_found(void *arg, int64_t task, int thread)
{
    struct remaking *r = arg;
    uint64_t offset = r->layout.payload_offset + (uint64_t)task * SHARD_LEAF_BYTES;
    uint64_t bytes = shard_layout_leaf_bytes(&r->layout, (uint64_t)task);
    struct error ignored;
    r->leaves[task] = 0;
    if (!stop_requested() && offset + bytes <= r->file_bytes &&
        !file_pread_full(r->fd, r->workers[thread].stored, bytes, offset, r->path, &ignored))
        r->leaves[task] = checksum_leaf(r->workers[thread].stored, bytes);
}

// Checksums of the leaves that the source gives: the last one of a compressed file is left out.
static int hash_run(struct remaking *r, uint64_t first, uint64_t end, int thread, struct error *err)
{
    struct repair_worker *worker = &r->workers[thread];
    uint64_t begin_bytes = first * SHARD_LEAF_BYTES;
    uint64_t end_bytes = (end - 1) * SHARD_LEAF_BYTES + shard_layout_leaf_bytes(&r->layout, end - 1);
    int rc = stop_check(err);
    if (!rc)
        rc = r->source->payload(r->source, thread, r->rank, begin_bytes, end_bytes, worker->run, err);
    for (uint64_t leaf = first; !rc && leaf < end; leaf++) {
        const uint8_t *payload = worker->run + (leaf - first) * SHARD_LEAF_BYTES;
        rc = repair_leaf_store(&r->stored[leaf], worker, r->compressed, payload,
                               shard_layout_leaf_bytes(&r->layout, leaf), err);
        r->leaves[leaf] = rc ? 0 : checksum_leaf(worker->stored, r->stored[leaf].bytes);
    }
    progress_add(r->progress, end_bytes - begin_bytes);
    return rc;
}

static void hash_task(void *arg, int64_t task, int thread)
{
    struct remaking *r = arg;
    struct error err;
    uint64_t first = (uint64_t)task * REPAIR_RUN_LEAVES, end = first + REPAIR_RUN_LEAVES;
    if (pool_error_any(&r->failure))
        return;
    if (hash_run(r, first, end < r->layout.leaf_count ? end : r->layout.leaf_count, thread, &err))
        pool_error_note(&r->failure, &err);
    if (thread == 0)
        progress_show(r->progress);
}

// The zeros up to the end of a compressed file belong to its last leaf.
static int hash_last(struct remaking *r, struct error *err)
{
    uint64_t last = r->layout.leaf_count - 1, end = 0;
    for (uint64_t leaf = 0; leaf <= last; leaf++)
        end += r->stored[leaf].bytes;
    int rc = hash_run(r, last, last + 1, 0, err); // leaves the bytes in the worker's memory
    if (!rc)
        r->leaves[last] =
            checksum_leaf(r->workers[0].stored, r->stored[last].bytes + (round_up(end, SHARD_FILE_ALIGN) - end));
    return rc;
}

static int guess_from_source(struct remaking *r, struct error *err)
{
    int rc;
    r->progress->total_bytes += r->layout.payload_bytes; // it is seldom needed
    thread_pool_run(r->pool, hash_task, r, (int64_t)div_up(r->layout.leaf_count, REPAIR_RUN_LEAVES));
    if ((rc = pool_error_take(&r->failure, err)) || !r->compressed || r->layout.leaf_count == 0)
        return rc;
    return hash_last(r, err);
}

// ---- the whole ---------------------------------------------------------------------------------------------------

static int remake(struct remaking *r, uint8_t **head, struct error *err)
{
    int rc = lay_out(r, err);
    if (rc)
        return rc;
    if (guess_table(r) && ((rc = try_guess(r, head, err)) || *head))
        return rc;
    if (!r->compressed && r->fd >= 0) {
        thread_pool_run(r->pool, hash_found, r, (int64_t)r->layout.leaf_count);
        if ((rc = stop_check(err)) || (rc = try_guess(r, head, err)) || *head)
            return rc;
    }
    if ((rc = guess_from_source(r, err)) || (rc = try_guess(r, head, err)) || *head)
        return rc;
    return error_set(
        err, ERR_CORRUPT,
        "%s: the head that %s gives is not the one that the manifest means (its checksum is another): that "
        "is not what these files were made from, another version of tpshard made them, or %s itself was "
        "damaged; run tpshard convert --force",
        r->path, r->source->path, MANIFEST_FILE_NAME);
}

int repair_head(uint8_t **head, struct shard_file **file, struct repair_source *source, const struct shard_dir *dir,
                uint32_t rank, struct thread_pool *pool, struct repair_worker *workers, struct progress *progress,
                struct error *err)
{
    struct remaking r = {.dir = dir,
                         .source = source,
                         .rank = rank,
                         .pool = pool,
                         .workers = workers,
                         .progress = progress,
                         .path = dir->paths[rank],
                         .fd = -1};
    const struct manifest_file *wanted = &dir->manifest->ranks[rank];
    struct shard_file *parsed = NULL;
    struct error ignored;
    uint8_t *made = NULL;
    uint64_t head_bytes;
    int rc = 0;
    if (file_open_read(&r.fd, &r.file_bytes, r.path, &ignored))
        r.fd = -1;
    if (source->head && source->head(source, rank, &made, &head_bytes)) {
        ; // a copy of it
    } else if (!(rc = remake(&r, &made, err))) {
        head_bytes = r.layout.payload_offset;
    }
    if (!rc && !(rc = shard_file_parse(&parsed, made, head_bytes, wanted->bytes, r.path, err))) {
        if (checksum128_equal(shard_file_root(parsed), wanted->hash)) {
            *head = made;
            *file = parsed;
            made = NULL;
        } else { // the copy has changed since it was opened
            shard_file_close(parsed);
            rc = error_set(err, ERR_CORRUPT, "%s: the head that %s gives is not the one that the manifest means",
                           r.path, source->path);
        }
    }
    free(made);
    free(r.leaves);
    free(r.stored);
    free(r.tensors);
    if (r.fd >= 0)
        close(r.fd);
    return rc;
}

int repair_head_of_file(struct shard_file **file, const struct shard_dir *dir, uint32_t rank, struct error *err)
{
    const struct manifest_file *wanted = &dir->manifest->ranks[rank];
    const char *path = dir->paths[rank];
    struct error ignored;
    uint8_t *bytes;
    uint64_t num_bytes;
    int fd, rc = 0;
    *file = NULL;
    if (file_open_read(&fd, &num_bytes, path, &ignored))
        return 0;
    if (num_bytes > HEAD_MAX_BYTES)
        num_bytes = HEAD_MAX_BYTES;
    if (!(bytes = malloc(num_bytes + 1)))
        rc = error_set(err, ERR_MEMORY, "%s: out of memory for its head", path);
    else if (!file_pread_full(fd, bytes, num_bytes, 0, path, &ignored) &&
             !shard_file_parse(file, bytes, num_bytes, wanted->bytes, path, &ignored) &&
             !checksum128_equal(shard_file_root(*file), wanted->hash)) {
        shard_file_close(*file);
        *file = NULL;
    }
    free(bytes);
    close(fd);
    return rc;
}
