// The files that travel with the shards: compiled tokenizer, chat template, configs. Small, held in memory.
#ifndef TPSHARD_SHARD_EXTRAS_H
#define TPSHARD_SHARD_EXTRAS_H

#include "formats/error.h"
#include "formats/manifest.h"

#include <limits.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct extra {
    char *name;
    uint8_t *bytes;
    uint64_t num_bytes;
};

enum { EXTRAS_MAX = 8 };
struct extras {
    struct extra files[EXTRAS_MAX]; // sorted by name
    size_t count;
    char warning[ERROR_MSG_BYTES]; // why the chat template cannot be used, or empty
};

// From a Hugging Face model. tokenizer.json is compiled; without it *has_tokenizer is false and that is no error.
// Success: extras_clear.
int extras_from_model(struct extras *out, bool *has_tokenizer, const char *model_dir, int64_t vocab_size,
                      struct error *err);
// From a shard directory, each checked against its checksum in the manifest (ERR_CORRUPT).
int extras_from_shards(struct extras *out, const char *dir, const struct manifest *manifest, struct error *err);
// Takes ownership of bytes (malloc), on failure too.
int extras_add(struct extras *extras, const char *name, uint8_t *bytes, uint64_t num_bytes, struct error *err);
// Whether dir holds the name; path becomes dir/name.
int extras_there(bool *there, char path[PATH_MAX], const char *dir, const char *name, struct error *err);
void extras_clear(struct extras *extras); // accepts a zeroed one

// Writes and syncs the files in dir and lists them in manifest->extras.
int extras_write(const struct extras *extras, const char *dir, struct manifest *manifest, struct error *err);

#endif
