// Files of a shard directory beside the ranks' own, such as tokenizer.bin and chat_template.jinja: what decides which text is
// trusted must be what the manifest names, byte for byte.
#ifndef TPSHARD_FORMATS_EXTRA_FILE_H
#define TPSHARD_FORMATS_EXTRA_FILE_H

#include <stdint.h>

#include "formats/error.h"
#include "formats/manifest.h"

// Reads dir/name and compares it with the manifest. *out becomes NULL when the manifest names no such file, whatever lies in the
// directory. ERR_CORRUPT: size or checksum differs, or it has more than cap_bytes.
// Success: the caller owns *out (free), *num_bytes long and followed by one NUL byte.
int extra_file_read(uint8_t **out, uint64_t *num_bytes, const struct manifest *manifest, const char *dir,
                    const char *name, uint64_t cap_bytes, struct error *err);

// The same for a file that was found in the manifest. What cannot be opened is told as repair_hint_unopened does.
int extra_file_load(uint8_t **out, uint64_t *num_bytes, const struct manifest_file *extra, const char *dir,
                    struct error *err);

// The two halves of that, for files that come from elsewhere. path is for messages.
// *out becomes NULL when the manifest names no such file; ERR_CORRUPT when it has more than cap_bytes there.
int extra_file_find(const struct manifest_file **out, const struct manifest *manifest, const char *name,
                    uint64_t cap_bytes, const char *path, struct error *err);
int extra_file_check(const struct manifest_file *extra, const void *bytes, uint64_t num_bytes, const char *path,
                     struct error *err);

#endif
