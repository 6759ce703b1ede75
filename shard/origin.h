// The checkpoint that a shard directory was made from, opened again: its description, the plan by which the directory is cut, and its rows.
// For `verify --against` and `repair`.
#ifndef TPSHARD_SHARD_ORIGIN_H
#define TPSHARD_SHARD_ORIGIN_H

#include "formats/error.h"
#include "shard/calibrate.h"
#include "shard/hf_config.h"
#include "shard/model_rows.h"
#include "shard/plan.h"
#include "shard/shard_dir.h"

struct origin {
    struct hf_config config;
    struct model_desc model; // config's, rotated where the directory is
    struct plan *plan;
    struct model_rows rows;
    struct calibration_file *statistics; // where the directory was quantized by them
    struct calibrate_source calibrated;
    const struct row_source *source; // of the directory's rows
};

// statistics_path: the calibration statistics that the directory was quantized by, or NULL; ERR_USAGE where they are needed and not said.
// Kinds of matrices are those of a rank file of dir that is open; where none is, those that the manifest's words and the checkpoint give.
// ERR_CORRUPT: the checkpoint is another model than the manifest describes, or the plan is not that of an open rank file. Success or failure:
// origin_close. *out must not be moved.
int origin_open(struct origin *out, const char *model_dir, const struct shard_dir *dir, const char *statistics_path,
                struct error *err);
void origin_close(struct origin *origin); // accepts a zeroed one

#endif
