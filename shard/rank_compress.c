// See rank_compress.h. Rounds of some leaves: all threads encode, then, when it is known where each begins, all write. Behind each round its
// checksums, codes and lengths are written where the head will hold them: a later run goes on where what lies in the file ceases to agree with
// them. The head itself comes last, so that an unfinished file is not taken for a whole one.
#include "shard/rank_compress.h"

#include "formats/checked.h"
#include "formats/checksum.h"
#include "formats/file_io.h"
#include "shard/pool_error.h"
#include "shard/stop.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { LEAVES_PER_THREAD = 4 }; // in a round

struct thread_memory {
    uint8_t *raw; // one leaf
    struct leaf_encoder *encoder;
};

struct work {
    const struct rank_compress_input *input;
    struct thread_pool *pool;
    int fd;
    struct shard_compressed_layout layout;
    uint64_t leaf_count;
    uint64_t *checksums;       // [leaf_count]
    struct shard_leaf *leaves; // [leaf_count]
    uint64_t *offsets;         // [leaf_count + 1], from the payload's start
    struct thread_memory *threads;
    uint64_t round_begin, round_leaves; // of this round; and at most
    uint8_t *stored;                    // [round_leaves][SHARD_STORED_MAX_BYTES]
    struct pool_error failure;
};

static uint64_t leaf_bytes(const struct work *work, uint64_t leaf)
{
    return leaf_payload_bytes(work->input->planned->payload_bytes, leaf);
}

static uint8_t *slot_of(const struct work *work, uint64_t leaf)
{
    return work->stored + (leaf - work->round_begin) * SHARD_STORED_MAX_BYTES;
}

// A leaf of this round as it lies in the file, with the zeros behind the last one.
struct stored_leaf {
    uint64_t leaf, bytes, file_offset;
    uint8_t *slot;
};

static struct stored_leaf stored_leaf_of(const struct work *work, int64_t task)
{
    uint64_t leaf = work->round_begin + (uint64_t)task, begin = work->offsets[leaf],
             end = begin + work->leaves[leaf].bytes;
    end = leaf + 1 == work->leaf_count ? round_up(end, SHARD_FILE_ALIGN) : end;
    return (struct stored_leaf){leaf, end - begin, work->layout.payload_offset + begin, slot_of(work, leaf)};
}

// ---- one round ------------------------------------------------------------------------------------------------------

static int encode_leaf(struct work *work, uint64_t leaf, struct thread_memory *memory, struct error *err)
{
    const struct rank_compress_input *input = work->input;
    uint64_t bytes = leaf_bytes(work, leaf), encoded_bytes;
    const uint8_t *encoded;
    enum leaf_code code;
    int rc = stop_check(err);
    if (rc ||
        (rc = file_pread_full(input->raw_fd, memory->raw, bytes,
                              input->planned->payload_offset + leaf * SHARD_LEAF_BYTES, input->raw_path, err)) ||
        (rc = leaf_encode(&code, &encoded, &encoded_bytes, memory->encoder, memory->raw, bytes, err)))
        return rc;
    memcpy(slot_of(work, leaf), encoded, encoded_bytes);
    work->leaves[leaf] = (struct shard_leaf){(uint32_t)encoded_bytes, code};
    progress_add(input->progress, bytes);
    return 0;
}

static void run_encode(void *arg, int64_t task, int thread)
{
    struct work *work = arg;
    struct error err;
    if (!pool_error_any(&work->failure) &&
        encode_leaf(work, work->round_begin + (uint64_t)task, &work->threads[thread], &err))
        pool_error_note(&work->failure, &err);
    if (thread == 0)
        progress_show(work->input->progress);
}

static void run_write(void *arg, int64_t task, int thread)
{
    struct work *work = arg;
    const struct stored_leaf stored = stored_leaf_of(work, task);
    uint64_t encoded_bytes = work->leaves[stored.leaf].bytes;
    struct error err;
    (void)thread;
    memset(stored.slot + encoded_bytes, 0, stored.bytes - encoded_bytes);
    work->checksums[stored.leaf] = checksum_leaf(stored.slot, stored.bytes);
    if (file_pwrite_full(work->fd, stored.slot, stored.bytes, stored.file_offset, work->input->path, &err))
        pool_error_note(&work->failure, &err);
}

static int write_table(const struct work *work, uint64_t count, struct error *err)
{
    const char *path = work->input->path;
    uint64_t begin = work->round_begin;
    int rc = file_pwrite_full(work->fd, work->checksums + begin, count * sizeof *work->checksums,
                              work->layout.leaves_offset + begin * sizeof *work->checksums, path, err);
    return rc ? rc
              : file_pwrite_full(work->fd, work->leaves + begin, count * sizeof *work->leaves,
                                 work->layout.table_offset + begin * sizeof *work->leaves, path, err);
}

static uint64_t round_size(const struct work *work)
{
    uint64_t left = work->leaf_count - work->round_begin;
    return left < work->round_leaves ? left : work->round_leaves;
}

static int run_round(struct work *work, struct error *err)
{
    uint64_t count = round_size(work);
    int rc;
    thread_pool_run(work->pool, run_encode, work, (int64_t)count);
    if ((rc = pool_error_take(&work->failure, err)))
        return rc;
    for (uint64_t leaf = work->round_begin; leaf < work->round_begin + count; leaf++)
        work->offsets[leaf + 1] = work->offsets[leaf] + work->leaves[leaf].bytes;
    thread_pool_run(work->pool, run_write, work, (int64_t)count);
    if ((rc = pool_error_take(&work->failure, err)) || (rc = write_table(work, count, err)))
        return rc;
    work->round_begin += count;
    return 0;
}

// ---- what an earlier run has left -----------------------------------------------------------------------------------

// A leaf that cannot be read, since the file ends before, is one that does not agree.
static void run_check(void *arg, int64_t task, int thread)
{
    struct work *work = arg;
    const struct stored_leaf stored = stored_leaf_of(work, task);
    struct error ignored;
    (void)thread;
    if (file_pread_full(work->fd, stored.slot, stored.bytes, stored.file_offset, work->input->path, &ignored) ||
        checksum_leaf(stored.slot, stored.bytes) != work->checksums[stored.leaf])
        work->leaves[stored.leaf].bytes = 0;
}

// Moves round_begin behind the leaves that are there: each has a possible code and length and its checksum. An error only for what has nothing
// to do with the file.
static int find_kept(struct work *work, struct error *err)
{
    struct error ignored;
    int rc;
    if (file_pread_full(work->fd, work->checksums, work->leaf_count * sizeof *work->checksums,
                        work->layout.leaves_offset, work->input->path, &ignored) ||
        file_pread_full(work->fd, work->leaves, work->leaf_count * sizeof *work->leaves, work->layout.table_offset,
                        work->input->path, &ignored))
        return 0;
    while (work->round_begin < work->leaf_count) {
        uint64_t begin = work->round_begin, count = round_size(work), possible = 0;
        for (; possible < count; possible++) {
            const struct shard_leaf *leaf = &work->leaves[begin + possible];
            if (!leaf_code_fits(leaf->code, leaf_bytes(work, begin + possible), leaf->bytes))
                break;
            work->offsets[begin + possible + 1] = work->offsets[begin + possible] + leaf->bytes;
        }
        thread_pool_run(work->pool, run_check, work, (int64_t)possible);
        if ((rc = stop_check(err)))
            return rc;
        while (work->round_begin < begin + possible && work->leaves[work->round_begin].bytes)
            work->round_begin++;
        if (work->round_begin < begin + count)
            break;
    }
    return 0;
}

// ---- the file -------------------------------------------------------------------------------------------------------

static int prepare(struct work *work, struct thread_pool *pool, struct error *err)
{
    const struct rank_compress_input *input = work->input;
    int threads = thread_pool_size(pool);
    int rc = shard_compressed_layout(&work->layout, input->planned->tensors, input->tensor_count, err);
    if (rc)
        return rc;
    work->pool = pool;
    work->leaf_count = div_up(input->planned->payload_bytes, SHARD_LEAF_BYTES);
    work->round_leaves = (uint64_t)threads * LEAVES_PER_THREAD;
    work->checksums = calloc(work->leaf_count + 1, sizeof *work->checksums);
    work->leaves = calloc(work->leaf_count + 1, sizeof *work->leaves);
    work->offsets = calloc(work->leaf_count + 1, sizeof *work->offsets);
    work->threads = calloc((size_t)threads, sizeof *work->threads);
    work->stored = malloc(work->round_leaves * SHARD_STORED_MAX_BYTES);
    bool complete = work->checksums && work->leaves && work->offsets && work->threads && work->stored;
    for (int i = 0; complete && i < threads; i++)
        complete = (work->threads[i].raw = malloc(SHARD_LEAF_BYTES)) && (work->threads[i].encoder = leaf_encoder_new());
    if (!complete)
        return error_set(err, ERR_MEMORY, "%s: out of memory to compress it", input->path);
    work->fd = open(input->path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | (input->keep ? 0 : O_TRUNC), 0666);
    return work->fd < 0 ? error_set_errno(err, "%s: cannot create", input->path) : 0;
}

static void release(struct work *work)
{
    if (work->fd >= 0)
        close(work->fd);
    for (int i = 0; work->threads && i < thread_pool_size(work->pool); i++) {
        free(work->threads[i].raw);
        leaf_encoder_free(work->threads[i].encoder);
    }
    free(work->threads);
    free(work->stored);
    free(work->offsets);
    free(work->leaves);
    free(work->checksums);
}

static bool any_shorter(const struct work *work)
{
    for (uint64_t leaf = 0; leaf < work->leaf_count; leaf++)
        if (work->leaves[leaf].code != LEAF_RAW)
            return true;
    return false;
}

// Leaves first, then the head: each must be on disk before what vouches for it is.
static int finish(struct work *work, struct manifest_file *file, struct error *err)
{
    const struct rank_compress_input *input = work->input;
    uint8_t *head = NULL;
    int rc;
    file->bytes = work->layout.payload_offset + round_up(work->offsets[work->leaf_count], SHARD_FILE_ALIGN);
    if (ftruncate(work->fd, (off_t)file->bytes))
        return error_set_errno(err, "%s: cannot give it %llu bytes", input->path, (unsigned long long)file->bytes);
    if ((rc = file_sync(work->fd, input->path, err)) ||
        (rc = shard_compressed_head_serialise(&head, input->identity, input->planned->tensors, input->tensor_count,
                                              work->checksums, work->leaves, &file->hash, err)))
        return rc;
    rc = file_pwrite_full(work->fd, head, work->layout.payload_offset, 0, input->path, err);
    free(head);
    if (!rc)
        rc = file_sync(work->fd, input->path, err);
    int fd = work->fd;
    work->fd = -1;
    if (close(fd) && !rc)
        rc = error_set_errno(err, "%s: cannot close", input->path);
    return rc;
}

int rank_compress(bool *worth, struct manifest_file *file, const struct rank_compress_input *input,
                  struct thread_pool *pool, struct error *err)
{
    struct work work = {.input = input, .pool = pool, .fd = -1};
    int rc = prepare(&work, pool, err);
    if (rc)
        goto done;
    if (input->keep && (rc = find_kept(&work, err)))
        goto done;
    progress_resumed(input->progress, work.round_begin * SHARD_LEAF_BYTES);
    while (work.round_begin < work.leaf_count)
        if ((rc = run_round(&work, err)))
            goto done;
    if ((*worth = any_shorter(&work)))
        rc = finish(&work, file, err);
    else if (unlink(input->path))
        rc = error_set_errno(err, "%s: cannot remove", input->path);
done:
    release(&work);
    return rc;
}
