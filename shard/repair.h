// Mending a shard directory: what does not hold is found and written again, and nothing else. Everything is compared with a checksum that stands
// there before it is written: leaves with their heads, heads and extras with the manifest. So a repair that is broken off leaves what it has
// mended and what was broken, which the next one finds.
//
// Files are mended where they lie. A program that has such a file mapped sees broken bytes become right ones.
#ifndef TPSHARD_SHARD_REPAIR_H
#define TPSHARD_SHARD_REPAIR_H

#include "formats/error.h"
#include "kernels/thread_pool.h"
#include "shard/progress.h"
#include "shard/repair_source.h"
#include "shard/shard_dir.h"
#include "shard/verify.h"

#include <stdbool.h>
#include <stdint.h>

// One rank's file.
struct repair_rank {
    bool missing, head, length; // there is no file; its head is broken; it is longer or shorter than the manifest says
    bool *broken;               // [leaves]; NULL while the head is not known. After repair_mend: those that were mended
    uint64_t broken_leaves;
    uint64_t mended_leaves, mended_bytes; // bytes of leaves and head that were written
    bool mended_head;
};

struct repair {
    const char *path;
    struct shard_dir *dir;
    struct thread_pool *pool;
    struct verify_memory *memory; // [threads of the pool]
    struct repair_rank *ranks;    // [manifest->num_ranks]
    bool *extras;                 // [manifest->num_extras]: broken
    uint64_t mended_extras, mended_extra_bytes;
    struct verify_findings *failures; // what could not be mended
};

// dir holds the manifest; path is its directory's. Both, pool and failures must outlive *out. Success: repair_end.
int repair_begin(struct repair *out, struct shard_dir *dir, const char *path, struct thread_pool *pool,
                 struct verify_findings *failures, struct error *err);
void repair_end(struct repair *repair); // accepts a zeroed one

// Looks at everything; changes nothing. Heads that hold are open in dir afterwards.
int repair_survey(struct repair *repair, struct progress *progress, struct error *err);
bool repair_is_needed(const struct repair *repair);
// Bytes that repair_mend will have to make, as far as it is known.
uint64_t repair_bytes(const struct repair *repair);
// Mends what the survey has found, from a source that was opened since. What cannot be mended goes to failures, among it what cannot be
// read in the source (ERR_IO): the rest is mended all the same. The return value is for what kept the work from being done (ERR_MEMORY, ERR_IO of
// what is mended, a signal).
int repair_mend(struct repair *repair, struct repair_source *source, struct progress *progress, struct error *err);

#endif
