// Leaves of another copy of the directory. See repair_source.h.
#include "shard/repair_source.h"

#include "formats/file_io.h"
#include "formats/repair_hint.h"
#include "shard/verify.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct from_shards {
    struct repair_source source; // must be first
    struct shard_dir dir;
    const struct manifest *wanted; // of what is to be mended
    struct error *refused;         // [ranks] why a file cannot be used; code 0: it can
    int *fds;                      // [ranks]
    int threads;
    struct verify_memory *memory; // [threads]
};

// A file of the copy that is broken itself is missed only when something of it is needed.
static int usable(const struct from_shards *from, uint32_t rank, struct error *err)
{
    if (from->refused[rank].code)
        *err = from->refused[rank];
    return from->refused[rank].code;
}

static int contents(struct repair_source *base, uint32_t rank, struct rank_share *share,
                    const struct shard_tensor **tensors, uint64_t *count, struct error *err)
{
    const struct from_shards *from = (const struct from_shards *)base;
    int rc = usable(from, rank, err);
    if (rc)
        return rc;
    *share = shard_file_identity(from->dir.files[rank])->share;
    *tensors = shard_file_tensor(from->dir.files[rank], 0);
    *count = shard_file_tensor_count(from->dir.files[rank]);
    return 0;
}

static int payload(struct repair_source *base, int thread, uint32_t rank, uint64_t begin, uint64_t end, uint8_t *out,
                   struct error *err)
{
    const struct from_shards *from = (const struct from_shards *)base;
    const struct shard_file *file = from->dir.files[rank];
    struct verify_memory *memory = &from->memory[thread];
    int rc = usable(from, rank, err);
    if (!rc && end > shard_file_payload_bytes(file)) // equal contracts do not say that the tensors are the same
        rc = error_set(
            err, ERR_CORRUPT, "%s: it holds %llu bytes of weights, bytes up to %llu are needed: it is no copy",
            from->dir.paths[rank], (unsigned long long)shard_file_payload_bytes(file), (unsigned long long)end);
    for (uint64_t at = begin; !rc && at < end; at += SHARD_LEAF_BYTES) {
        uint64_t leaf = at / SHARD_LEAF_BYTES;
        if (!(rc = verify_leaf(file, leaf, from->fds[rank], from->dir.paths[rank], memory, err)))
            memcpy(out + (at - begin), shard_file_is_compressed(file) ? memory->payload : memory->stored,
                   shard_file_leaf_bytes(file, leaf));
    }
    return rc;
}

// A file of the same root has the same bytes.
static bool same_file(const struct from_shards *from, uint32_t rank)
{
    return from->refused[rank].code == 0 &&
           checksum128_equal(from->dir.manifest->ranks[rank].hash, from->wanted->ranks[rank].hash);
}

static bool head(struct repair_source *base, uint32_t rank, uint8_t **out, uint64_t *head_bytes)
{
    const struct from_shards *from = (const struct from_shards *)base;
    struct error ignored;
    if (!same_file(from, rank))
        return false;
    *head_bytes = shard_file_payload_offset(from->dir.files[rank]);
    if (!(*out = malloc(*head_bytes)))
        return false;
    if (!file_pread_full(from->fds[rank], *out, *head_bytes, 0, from->dir.paths[rank], &ignored))
        return true;
    free(*out);
    return false;
}

static bool stored(struct repair_source *base, uint32_t rank, uint64_t leaf, uint64_t stored_bytes, uint8_t *out)
{
    const struct from_shards *from = (const struct from_shards *)base;
    const struct shard_file *file = from->dir.files[rank];
    struct error ignored;
    if (!same_file(from, rank) || shard_file_stored_leaf(file, leaf).bytes != stored_bytes)
        return false;
    uint64_t offset = shard_file_payload_offset(file) + shard_file_stored_leaf(file, leaf).offset;
    return !file_pread_full(from->fds[rank], out, stored_bytes, offset, from->dir.paths[rank], &ignored) &&
           !shard_file_verify_leaf(file, leaf, out, &ignored);
}

static int extra(struct repair_source *base, const char *name, uint8_t **bytes, uint64_t *num_bytes, struct error *err)
{
    enum { EXTRA_CAP_BYTES = 256 << 20 };
    char path[2 * PATH_MAX];
    bool there;
    snprintf(path, sizeof path, "%s/%s", base->path, name);
    int rc = file_is_there(&there, path, err);
    if (!rc && !there)
        rc = error_set(err, ERR_CORRUPT, "%s: it is not there", path);
    if (!rc && (rc = file_read_all(bytes, num_bytes, path, EXTRA_CAP_BYTES, ERR_CORRUPT, err)) == ERR_IO)
        rc = repair_hint_unopened(path, err);
    return rc;
}

// ---- opening -----------------------------------------------------------------------------------------------------

static void close_source(struct repair_source *base)
{
    struct from_shards *from = (struct from_shards *)base;
    for (size_t rank = 0; from->fds && rank < from->dir.manifest->num_ranks; rank++)
        if (from->fds[rank] >= 0)
            close(from->fds[rank]);
    verify_memory_free(from->memory, from->threads);
    free(from->fds);
    free(from->refused);
    shard_dir_close(&from->dir);
    free(from);
}

static int allocate(struct from_shards *from, struct error *err)
{
    size_t ranks = from->dir.manifest->num_ranks;
    from->refused = calloc(ranks, sizeof *from->refused);
    from->fds = malloc(ranks * sizeof *from->fds);
    from->memory = verify_memory_new(from->threads);
    for (size_t rank = 0; from->fds && rank < ranks; rank++)
        from->fds[rank] = -1;
    if (!from->refused || !from->fds || !from->memory)
        return error_set(err, ERR_MEMORY, "out of memory for %d threads", from->threads);
    return 0;
}

static int check_contract(const struct from_shards *from, const struct shard_dir *dir, struct error *err)
{
    char found[CHECKSUM128_HEX_DIGITS + 1], wanted[CHECKSUM128_HEX_DIGITS + 1];
    if (checksum128_equal(from->dir.manifest->contract, dir->manifest->contract))
        return 0;
    checksum128_to_hex(from->dir.manifest->contract, found);
    checksum128_to_hex(dir->manifest->contract, wanted);
    return error_set(err, ERR_CORRUPT,
                     "%s: its contract is %s, that of what is to be repaired %s: it is of another model, other options "
                     "or another number of ranks",
                     from->source.path, found, wanted);
}

static int open_ranks(struct from_shards *from, struct error *err)
{
    for (uint32_t rank = 0; rank < from->dir.manifest->num_ranks; rank++) {
        struct error *refused = &from->refused[rank];
        if (shard_dir_open_rank(&from->dir, rank, refused) ||
            file_open_read(&from->fds[rank], NULL, from->dir.paths[rank], refused)) {
            bool there;
            if (refused->code == ERR_MEMORY)
                return error_set(err, ERR_MEMORY, "%s", refused->msg);
            if (!file_is_there(&there, from->dir.paths[rank], err) && !there)
                refused->code = ERR_CORRUPT; // it is the copy that is not whole
        } else {
            refused->code = 0;
        }
    }
    return 0;
}

int repair_from_shards(struct repair_source **out, const char *path, const struct shard_dir *dir, int threads,
                       struct error *err)
{
    struct from_shards *from = calloc(1, sizeof *from);
    int rc;
    if (!from)
        return error_set(err, ERR_MEMORY, "out of memory for the other directory");
    from->source = (struct repair_source){contents, payload, head, stored, extra, close_source, path};
    from->threads = threads;
    from->wanted = dir->manifest;
    if ((rc = shard_dir_open(&from->dir, path, err)) || (rc = check_contract(from, dir, err)) ||
        (rc = allocate(from, err)) || (rc = open_ranks(from, err)))
        close_source(&from->source);
    else
        *out = &from->source;
    return rc;
}
