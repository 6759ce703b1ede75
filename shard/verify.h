// Checking a shard directory: every stored byte against its checksum, or every weight against the checkpoint.
#ifndef TPSHARD_SHARD_VERIFY_H
#define TPSHARD_SHARD_VERIFY_H

#include "formats/error.h"
#include "kernels/thread_pool.h"
#include "shard/plan.h"
#include "shard/progress.h"
#include "shard/row_source.h"
#include "shard/shard_dir.h"

#include <stddef.h>
#include <stdint.h>

// What was found, in the order of the files; only the first VERIFY_SHOWN sentences are kept.
enum { VERIFY_SHOWN = 100 };
struct verify_findings {
    uint64_t count;
    int code; // ERR_CORRUPT; ERR_IO when any is of that kind
    struct error shown[VERIFY_SHOWN];
};
void verify_note(struct verify_findings *findings, const struct error *error);

// One thread's memory for a leaf.
struct verify_memory {
    uint8_t *stored, *payload;
    struct leaf_scratch *scratch;
};
struct verify_memory *verify_memory_new(int threads);               // NULL: out of memory
void verify_memory_free(struct verify_memory *memory, int threads); // accepts NULL
// Reads a leaf and compares it with its checksum; a compressed one must not only be what was written, but also become a leaf.
int verify_leaf(const struct shard_file *file, uint64_t leaf, int fd, const char *path, struct verify_memory *memory,
                struct error *err);
// The leaves of one file by all threads of the pool; memory: [threads of the pool]. broken [leaves]: what verify_leaf refuses, whatever
// the reason. The return value is for a signal.
int verify_leaves(bool *broken, const struct shard_file *file, int fd, const char *path, struct verify_memory *memory,
                  struct thread_pool *pool, struct progress *progress, struct error *err);

// Opens every rank file (shard_dir_open_rank), checks every leaf and every extra. What does not hold, or did not at the first look, goes to findings; the
// return value is for what kept the check from being done (ERR_MEMORY, a signal).
int verify_checksums(struct shard_dir *dir, const char *path, struct thread_pool *pool, struct progress *progress,
                     struct verify_findings *findings, struct error *err);
// One extra: ERR_CORRUPT says that it is not what the manifest says.
int verify_extra(const char *dir, const struct manifest_file *file, struct error *err);
// Bytes that verify_checksums will read, as the manifest says.
uint64_t verify_bytes(const struct manifest *manifest);

// Derives every weight again from source and compares it bit for bit with the rank files, which must be open and laid
// out as the plan says. Findings name tensor, rank and the first row that differs, one for each band of rows.
int verify_against(const struct shard_dir *dir, const struct plan *plan, const struct row_source *source,
                   struct thread_pool *pool, struct progress *progress, struct verify_findings *findings,
                   struct error *err);

#endif
