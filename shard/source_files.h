// The files of a checkpoint as provenance: names, sizes, times and XXH3-128, which go into the manifest and its contract.
#ifndef TPSHARD_SHARD_SOURCE_FILES_H
#define TPSHARD_SHARD_SOURCE_FILES_H

#include "formats/checkpoint.h"
#include "formats/checksum.h"
#include "formats/error.h"
#include "formats/manifest.h"
#include "shard/progress.h"

#include <stddef.h>
#include <stdint.h>

struct source_file {
    char *name; // within its directory
    char *path;
    uint64_t bytes;
    int64_t modified_ns;
    struct checksum128 hash; // once hashed
};

struct source_files {
    struct source_file *files; // sorted by name
    size_t count;
};

// Weights, and whichever there are of the small files that decide the output. Success: source_files_clear.
int source_files_list(struct source_files *out, const struct checkpoint *checkpoint, const char *model_dir,
                      struct error *err);
void source_files_clear(struct source_files *files); // accepts a zeroed one
// Adds one file; for other lists. path must exist.
int source_files_add(struct source_files *files, const char *dir, const char *name, struct error *err);
void source_files_sort(struct source_files *files);
uint64_t source_files_bytes(const struct source_files *files);

// Names, sizes and times, folded into key: what a resumed run must find unchanged.
struct checksum128 source_files_key(const struct source_files *files, const char *options_text);

// Hashing on a thread of its own, beside the conversion. It stays about as far in the files as the conversion
// is in its work, so that on the usual checkpoint, whose files are in layer order, each byte comes from the disk
// once and the other of the two finds it in the page cache.
struct source_hasher;
int source_hasher_start(struct source_hasher **out, struct source_files *files, const struct progress *progress,
                        struct error *err);
// Waits for the rest (or, with cancel, ends it), fills in the hashes, and frees the hasher. ERR_MODEL when a file
// has changed since it was listed.
int source_hasher_finish(struct source_hasher *hasher, bool cancel, struct error *err);

// Whether all are as they were when they were listed; ERR_MODEL when one is not.
int source_files_unchanged(const struct source_files *files, struct error *err);
// Copies the list into manifest->sources.
int source_files_to_manifest(const struct source_files *files, struct manifest *manifest, struct error *err);

#endif
