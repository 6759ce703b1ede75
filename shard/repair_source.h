// Where the bytes come from that `repair` writes: the checkpoint, from which weights are derived again, or another copy of the same
// directory. What a source gives is believed by nobody: repair compares it with the checksums of what it mends.
#ifndef TPSHARD_SHARD_REPAIR_SOURCE_H
#define TPSHARD_SHARD_REPAIR_SOURCE_H

#include "formats/error.h"
#include "formats/shard_file.h"
#include "shard/shard_dir.h"

#include <stdint.h>

struct repair_source {
    // The share and the tensors of a rank, for a head that is made anew; without offsets. *tensors belongs to the source.
    int (*contents)(struct repair_source *source, uint32_t rank, struct rank_share *share,
                    const struct shard_tensor **tensors, uint64_t *count, struct error *err);
    // Payload bytes [begin, end) of a rank, begin at a leaf's, end at a leaf's or the payload's. Called by many threads, 0 <= thread < threads.
    int (*payload)(struct repair_source *source, int thread, uint32_t rank, uint64_t begin, uint64_t end, uint8_t *out,
                   struct error *err);
    // The whole head of a rank's file, and one of its leaves as it is stored (stored_bytes long), where the source holds the very same file; else, or
    // when it cannot be read: false. NULL: never. Success of head: the caller frees *out.
    bool (*head)(struct repair_source *source, uint32_t rank, uint8_t **out, uint64_t *head_bytes);
    bool (*stored)(struct repair_source *source, uint32_t rank, uint64_t leaf, uint64_t stored_bytes, uint8_t *out);
    // The file of this name, as it should stand beside the shards. Success: the caller frees *bytes.
    int (*extra)(struct repair_source *source, const char *name, uint8_t **bytes, uint64_t *num_bytes,
                 struct error *err);
    void (*close)(struct repair_source *source);
    const char *path; // as the user named it
};

// dir: what is to be mended; heads that hold are open. Both must outlive the source. Success: (*out)->close(*out).
int repair_from_checkpoint(struct repair_source **out, const char *path, const struct shard_dir *dir, int threads,
                           struct error *err);
// ERR_CORRUPT: the other directory is of another contract: another model, other options or another number of ranks.
int repair_from_shards(struct repair_source **out, const char *path, const struct shard_dir *dir, int threads,
                       struct error *err);

#endif
