// A broken head of a rank file made anew: the index from what the rank holds, the checksums of the leaves from wherever they are right. The
// manifest's root says whether they are.
#ifndef TPSHARD_SHARD_REPAIR_HEAD_H
#define TPSHARD_SHARD_REPAIR_HEAD_H

#include "formats/error.h"
#include "formats/shard_file.h"
#include "kernels/thread_pool.h"
#include "shard/progress.h"
#include "shard/repair_leaf.h"
#include "shard/repair_source.h"
#include "shard/shard_dir.h"

#include <stdint.h>

// The head that belongs in dir->paths[rank], payload_offset bytes long, and parsed. What stands in that file is read, not changed. ERR_CORRUPT: no
// head that can be made has the manifest's root. Success: the caller owns *head (free) and *file (shard_file_close).
int repair_head(uint8_t **head, struct shard_file **file, struct repair_source *source, const struct shard_dir *dir,
                uint32_t rank, struct thread_pool *pool, struct repair_worker *workers, struct progress *progress,
                struct error *err);

// The head that stands in a file that may be too short or too long, if it is the one that the manifest means; *file is NULL if it is not.
// ERR_MEMORY only.
int repair_head_of_file(struct shard_file **file, const struct shard_dir *dir, uint32_t rank, struct error *err);

#endif
