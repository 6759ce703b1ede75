// One rank's model in memory: its own file, mapped read-only and verified, and views of every matrix and vector in it.
// It leaves to others: arithmetic (decoder), memory that changes (kv_cache), other ranks' files (never touched).
#ifndef TPSHARD_ENGINE_MODEL_H
#define TPSHARD_ENGINE_MODEL_H

#include "engine/comm.h"
#include "formats/error.h"
#include "formats/manifest.h"
#include "formats/shard_file.h"
#include "kernels/kernels.h"
#include "kernels/thread_pool.h"

// Vectors are f32 and NULL where the model has none. Shapes: formats/shard_file.h.
struct layer {
    const float *attention_norm, *mlp_norm;
    const float *q_norm, *k_norm;
    const float *qkv_bias, *o_bias, *gate_up_bias, *down_bias;
    struct matrix qkv, o, gate_up, down;
};

struct model {
    struct model_desc desc;
    struct rank_share share;
    struct matrix embedding, head; // the same matrix when embeddings are tied
    const float *inv_freq;         // [head_dim / 2]
    const float *final_norm;       // [hidden_size]
    struct layer *layers;          // [num_layers]
    struct shard_file *file;       // owner of every pointer above
};

// How much of the payload is checked before the first weight is used.
enum verify_mode { VERIFY_FULL, VERIFY_SAMPLE, VERIFY_OFF };

// Maps the file of `rank` in `dir`, compares it with the manifest (rank, tp_size, contract, head hash), verifies leaves on the pool and
// checks every tensor's shape against the description. comm (may be NULL) is told of progress. ERR_CORRUPT for any mismatch.
int model_open(struct model *out, const char *dir, const struct manifest *manifest, int rank, enum verify_mode verify,
               struct thread_pool *pool, struct comm *comm, struct error *err);
void model_close(struct model *model);

#endif
