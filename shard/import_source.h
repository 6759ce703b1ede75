// Rows from a checkpoint that is quantized: quantized matrices come from the import, everything else from the plain
// checkpoint's source.
#ifndef TPSHARD_SHARD_IMPORT_SOURCE_H
#define TPSHARD_SHARD_IMPORT_SOURCE_H

#include "shard/checkpoint_source.h"
#include "shard/import.h"

struct import_source {
    struct row_source source;        // must be first
    struct checkpoint_claims claims; // what the plain source leaves to the import
    struct checkpoint_source plain;
    struct import *import;
    const struct plan *plan;
};

// Checks as checkpoint_source_init does. The plan was made with kinds of the import (import_plan.h). All arguments must
// outlive *out, which must not be moved.
int import_source_init(struct import_source *out, struct import *import, const struct checkpoint *checkpoint,
                       const struct plan *plan, const struct hf_config *config, struct error *err);

#endif
