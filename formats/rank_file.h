// The file of a rank in a shard directory: opened, and compared with the manifest that names it. The file alone is shard_file.h's.
#ifndef TPSHARD_FORMATS_RANK_FILE_H
#define TPSHARD_FORMATS_RANK_FILE_H

#include "formats/error.h"
#include "formats/manifest.h"
#include "formats/shard_file.h"

#include <stdint.h>

// Is it the file that the manifest means: rank k's and no other's, of this contract, of this length, with this head? ERR_CORRUPT names
// both values, and what mends it. path: for messages.
int rank_file_check(const struct shard_file *file, const struct manifest *manifest, uint32_t rank, const char *path,
                    struct error *err);
// shard_file_open and that. What cannot be opened is told as repair_hint_unopened does. Failure: *out untouched.
int rank_file_open(struct shard_file **out, const struct manifest *manifest, uint32_t rank, const char *path,
                   struct error *err);

#endif
