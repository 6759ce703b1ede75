// A checkpoint with whatever reads its rows: the plain source, or the import where it is quantized. For convert and
// verify.
#ifndef TPSHARD_SHARD_MODEL_ROWS_H
#define TPSHARD_SHARD_MODEL_ROWS_H

#include "shard/import_plan.h"
#include "shard/import_source.h"
#include "shard/rotate.h"

struct model_rows {
    const struct row_source *source; // after model_rows_init
    bool rounds_to_bf16;
    struct import_config config;
    struct checkpoint *checkpoint;
    struct import *import; // NULL: the checkpoint is not quantized
    struct checkpoint_source plain;
    struct import_source quantized;
    struct rotate_source rotated; // in front of either, if the plan says so
};

// Opens config and headers. Refuses a quantization that cannot be read. Success or failure: model_rows_close. *out must
// not be moved.
int model_rows_open(struct model_rows *out, const char *model_dir, struct error *err);
// Checks every tensor that the plan needs. plan and config must outlive *rows.
int model_rows_init(struct model_rows *rows, const struct plan *plan, const struct hf_config *config,
                    struct error *err);
void model_rows_close(struct model_rows *rows); // accepts a zeroed one

#endif
