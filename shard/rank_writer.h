// The rank files while they are made: laid out by the plan, payload first, head last. All files lie in one folder.
#ifndef TPSHARD_SHARD_RANK_WRITER_H
#define TPSHARD_SHARD_RANK_WRITER_H

#include "formats/error.h"
#include "formats/manifest.h"
#include "kernels/thread_pool.h"
#include "shard/band.h"
#include "shard/plan.h"
#include "shard/progress.h"

#include <stdbool.h>

struct rank_writer;

// Creates the files at their full size (keep: opens those that are there, as an earlier run left them).
// compress: what is written are the raw files, and finish makes compressed ones of them; the raw ones stay for a run that resumes.
// Success: the caller owns *out (rank_writer_free); plan and the folder's name must outlive it.
int rank_writer_open(struct rank_writer **out, const char *dir, const struct plan *plan, bool compress, bool keep,
                     struct error *err);
void rank_writer_free(struct rank_writer *writer); // accepts null

// Writes or reads back one band of one rank: data, and right behind it scales. Any thread.
int rank_writer_put(struct rank_writer *writer, const struct band *band, uint32_t rank, const uint8_t *bytes,
                    struct error *err);
int rank_writer_get(struct rank_writer *writer, const struct band *band, uint32_t rank, uint8_t *bytes,
                    struct error *err);

// Hashes or compresses every payload, writes the heads with this contract, syncs and closes. files [num_ranks] receives name, size and
// root of each; the caller frees the names. progress: shows the compression, which counts payload. A file in which nothing became shorter is as if it were not to be compressed.
int rank_writer_finish(struct rank_writer *writer, struct checksum128 contract, struct thread_pool *pool,
                       struct progress *progress, struct manifest_file *files, struct error *err);

#endif
