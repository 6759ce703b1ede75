// See repair_leaf.h.
#include "shard/repair_leaf.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

int repair_workers_new(struct repair_worker **out, int threads, struct error *err)
{
    struct repair_worker *workers = calloc((size_t)threads, sizeof *workers);
    bool complete = workers != NULL;
    for (int i = 0; complete && i < threads; i++)
        complete = (workers[i].encoder = leaf_encoder_new()) != NULL;
    if (!complete) {
        repair_workers_free(workers, threads);
        return error_set(err, ERR_MEMORY, "out of memory for %d threads", threads);
    }
    *out = workers;
    return 0;
}

void repair_workers_free(struct repair_worker *workers, int threads)
{
    for (int i = 0; workers && i < threads; i++)
        leaf_encoder_free(workers[i].encoder);
    free(workers);
}

int repair_leaf_store(struct shard_leaf *out, struct repair_worker *worker, bool compressed, const uint8_t *payload,
                      uint64_t payload_bytes, struct error *err)
{
    enum leaf_code code = LEAF_RAW;
    const uint8_t *stored = payload;
    uint64_t bytes = payload_bytes;
    int rc = compressed ? leaf_encode(&code, &stored, &bytes, worker->encoder, payload, payload_bytes, err) : 0;
    if (rc)
        return rc;
    memcpy(worker->stored, stored, bytes);
    memset(worker->stored + bytes, 0, SHARD_STORED_MAX_BYTES - bytes);
    *out = (struct shard_leaf){(uint32_t)bytes, code};
    return 0;
}

int repair_leaf_make(struct repair_worker *worker, const struct shard_file *file, uint64_t leaf, const uint8_t *payload,
                     const char *source_path, const char *path, struct error *err)
{
    bool compressed = shard_file_is_compressed(file);
    struct shard_stored place = shard_file_stored_leaf(file, leaf);
    struct shard_leaf made;
    struct error ignored;
    char label[SHARD_LEAF_LABEL_BYTES];
    int rc = repair_leaf_store(&made, worker, compressed, payload, shard_file_leaf_bytes(file, leaf), err);
    if (rc)
        return rc;
    bool last = leaf + 1 == shard_file_leaf_count(file);
    bool fits =
        last ? made.bytes <= place.bytes && place.bytes - made.bytes < SHARD_FILE_ALIGN : made.bytes == place.bytes;
    if (fits && shard_file_verify_leaf(file, leaf, worker->stored, &ignored) == 0)
        return 0;
    uint64_t offset = shard_file_payload_offset(file) + place.offset;
    return error_set(err, ERR_CORRUPT,
                     "%s: rank %" PRIu32 ": %s, file bytes %" PRIu64 " to %" PRIu64 ": made again from %s%s, it has "
                     "another checksum, so it was left as it is: that is not what these files were made from, or "
                     "another version of tpshard%s made them",
                     path, shard_file_identity(file)->rank, shard_file_leaf_label(file, leaf, label, sizeof label),
                     offset, offset + place.bytes - 1, source_path, compressed ? " and compressed again" : "",
                     compressed ? " or of zstd" : "");
}
