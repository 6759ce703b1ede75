// One rank's model: its own file, mapped read-only and verified, and views of every matrix and vector in it.
// It leaves to others: arithmetic and memory that changes (backend), other ranks' files (never touched).
#ifndef TPSHARD_ENGINE_MODEL_H
#define TPSHARD_ENGINE_MODEL_H

#include "engine/comm.h"
#include "formats/error.h"
#include "formats/manifest.h"
#include "formats/shard_file.h"
#include "kernels/backend.h"
#include "kernels/thread_pool.h"

#include <stdatomic.h>

struct model {
    struct model_desc desc;
    struct rank_share share;
    struct mlp *experts;     // what the layers' experts point into
    struct weights weights;  // shapes: formats/shard_file.h; pointers: where the backend loaded the payload
    struct shard_file *file; // the mapped file
    char *path;              // its name, for messages
};

// How much of the payload is checked before the first weight is used.
enum verify_mode { VERIFY_FULL, VERIFY_SAMPLE, VERIFY_OFF };

// Maps the file of `rank` in `dir`, compares it with the manifest (rank, tp_size, contract, head hash) and every tensor's shape with the
// description: no weight is read. ERR_CORRUPT for any mismatch. Success: model_close.
int model_open(struct model *out, const char *dir, const struct manifest *manifest, int rank, struct comm *comm,
               struct error *err);
// Brings the payload to the backend's device, verifying it on the way, and points the weights there. comm (may be NULL) is told of
// progress; *loaded_bytes (likewise) grows by whole leaves.
int model_load(struct model *model, const struct backend *backend, struct device *device, enum verify_mode verify,
               struct thread_pool *pool, struct comm *comm, atomic_llong *loaded_bytes, struct error *err);
void model_close(struct model *model);

#endif
