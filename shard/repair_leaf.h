// Leaves as `repair` makes them: some payload from the source, in the form in which a rank file stores it.
#ifndef TPSHARD_SHARD_REPAIR_LEAF_H
#define TPSHARD_SHARD_REPAIR_LEAF_H

#include "formats/error.h"
#include "formats/shard_file.h"
#include "shard/repair_source.h"

#include <stdbool.h>
#include <stdint.h>

// Leaves that follow each other are derived together: what lies on a border between them is then derived once.
enum { REPAIR_RUN_LEAVES = 8 };

// One thread's memory.
struct repair_worker {
    struct leaf_encoder *encoder;
    uint8_t run[REPAIR_RUN_LEAVES * SHARD_LEAF_BYTES]; // payload
    uint8_t stored[SHARD_STORED_MAX_BYTES];            // one leaf
};
// Success: repair_workers_free.
int repair_workers_new(struct repair_worker **out, int threads, struct error *err);
void repair_workers_free(struct repair_worker *workers, int threads); // accepts NULL

// Puts the leaf at `payload` into worker->stored, as a compressed file or another one stores it; behind its bytes stand zeros.
int repair_leaf_store(struct shard_leaf *out, struct repair_worker *worker, bool compressed, const uint8_t *payload,
                      uint64_t payload_bytes, struct error *err);
// Makes a leaf of a file again, worker->run holding its payload at `payload`, and compares it with its checksum. worker->stored then holds what
// the file must hold. ERR_CORRUPT says what differs.
int repair_leaf_make(struct repair_worker *worker, const struct shard_file *file, uint64_t leaf, const uint8_t *payload,
                     const char *source_path, const char *path, struct error *err);

#endif
