// One rank's model: its own file, opened through the store, and views of every matrix and vector in it. The payload arrives while the first step already
// runs (loader.h): whoever computes asks for each part before it reads it.
// It leaves to others: arithmetic and memory that changes (backend), other ranks' files (never touched).
#ifndef TPSHARD_ENGINE_MODEL_H
#define TPSHARD_ENGINE_MODEL_H

#include "engine/comm.h"
#include "engine/loader.h"
#include "engine/store.h"
#include "formats/error.h"
#include "formats/manifest.h"
#include "formats/shard_file.h"
#include "kernels/backend.h"

#include <stdbool.h>
#include <stdint.h>

// Where a part's tensors lie in the payload: from the lowest byte to behind the highest. Empty: begin == end.
struct payload_range {
    uint64_t begin, end;
};

// What is asked for at once; each layer is one part more.
enum model_part {
    PART_TABLES, // rotary frequencies
    PART_EMBEDDING,
    PART_FINAL_NORM,
    PART_HEAD, // the embedding's place when embeddings are tied
    PART_COUNT,
};

struct model {
    struct model_desc desc;          // of the stage's layers, which are numbered from 0 on, here and in the backend
    int64_t layer_begin;             // number of the first of them in the model
    bool stage_before, stage_behind; // there are other stages
    bool has_rope_local;             // the whole model's layers
    struct rank_share share;
    struct mlp *experts;    // what the layers' experts point into
    struct weights weights; // shapes: formats/shard_file.h; pointers: where the backend reads the payload
    struct payload_range parts[PART_COUNT], *layers; // [desc.num_layers]
    struct store *store;
    struct store_file *source;
    struct shard_file *file; // its head
    const char *name;        // of the file, for messages
    // Since model_load:
    const struct backend *backend;
    struct device *device;
    const uint8_t *base; // of the payload
    struct loader *loader;
    bool loaded;        // everything is in place, and compared as far as was asked for
    int64_t next_layer; // layers before it have arrived, and their orders of columns are in bounds
};

// Opens the file of `rank`, which counts over all stages, in `place` and compares its head with the manifest (rank, tp_size, contract, head hash), and every tensor's shape
// with the description: no weight is read. ERR_CORRUPT for any mismatch. Success: model_close.
int model_open(struct model *out, const char *place, const struct store_options *store, const struct manifest *manifest,
               int rank, struct comm *comm, struct error *err);
// Begins to bring the payload to the backend's device, and points the weights to where it will lie. file and source of options are the model's
// own. The device is closed before model_close.
int model_load(struct model *model, const struct loader_options *options, struct error *err);
// Waits until a part, or a layer, may be read. Layers are asked for in their order.
int model_need(struct model *model, enum model_part part, struct error *err);
int model_need_layer(struct model *model, int64_t layer, struct error *err);
// The same for the rows of the embedding that these tokens take. Where the file is mapped nothing is waited for: they are read as they come, and
// compared with the rest of the file.
int model_need_rows(struct model *model, const struct token_row *rows, int64_t count, struct error *err);
// Waits for everything, and checks what model_need_layer has not. A second call is cheap.
int model_finish(struct model *model, struct error *err);
// Ends a load that is under way, before the device is closed. Harmless without one.
void model_stop(struct model *model);
void model_close(struct model *model);

#endif
