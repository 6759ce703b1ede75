// A Hugging Face model directory's weights: one or several safetensors files, read strictly, never mapped.
//
// Which files (as Hugging Face does): model.safetensors if that name exists, even beside an index; else the files that
// model.safetensors.index.json names. Other files of the directory are ignored, and so is metadata.total_size.
// With an index: every tensor that it names must stand in the file that it names, and no tensor may stand in two
// files. A tensor that stands in a named file but not in the index is part of the checkpoint.
// File names of the index are plain names ('/' is refused). Symbolic links are followed wherever they lead, because
// Hugging Face's cache is made of them, but must end at a regular file.
//
// Codes: ERR_MODEL for anything wrong with the contents of the directory: missing files (an incomplete download),
// links that dangle or loop, FIFOs, directories, devices, bad headers. ERR_IO when the operating system refuses to
// read what is there, or a file shrinks.
#ifndef TPSHARD_FORMATS_CHECKPOINT_H
#define TPSHARD_FORMATS_CHECKPOINT_H

#include <stddef.h>
#include <stdint.h>

#include "formats/error.h"
#include "formats/safetensors.h"

enum { CHECKPOINT_INDEX_CAP_BYTES = 64 << 20, CHECKPOINT_MAX_FILES = 10000 };

struct checkpoint;

// Opens every file and parses every header; reads no weights. Keeps one descriptor per file.
// Success: the caller owns *out (checkpoint_close).
int checkpoint_open(struct checkpoint **out, const char *model_dir, struct error *err);
void checkpoint_close(struct checkpoint *checkpoint); // accepts null

// Tensors of all files, sorted by name (strcmp). Borrowed from the checkpoint.
size_t checkpoint_tensor_count(const struct checkpoint *checkpoint);
const struct safetensors_tensor *checkpoint_tensor(const struct checkpoint *checkpoint, size_t index);
const struct safetensors_tensor *checkpoint_find(const struct checkpoint *checkpoint, const char *name); // or null

// Reads bytes [byte_offset, byte_offset + num_bytes) of a tensor. Safe to call from any thread at once.
// ERR_IO if the file has shrunk; ERR_OTHER if the range leaves the tensor, which is the caller's fault.
int checkpoint_read(const struct checkpoint *checkpoint, const struct safetensors_tensor *tensor, uint64_t byte_offset,
                    uint64_t num_bytes, void *destination, struct error *err);
// Tells the operating system that this range will be read soon. It may do nothing.
void checkpoint_read_ahead(const struct checkpoint *checkpoint, const struct safetensors_tensor *tensor,
                           uint64_t byte_offset, uint64_t num_bytes);

// Whether the names still lead to the files that were opened, as they were then; ERR_MODEL when one does not.
int checkpoint_unchanged(const struct checkpoint *checkpoint, struct error *err);

// Files, sorted by name; safetensors_tensor.file is an index into them. Sizes are those at opening.
size_t checkpoint_file_count(const struct checkpoint *checkpoint);
const char *checkpoint_file_name(const struct checkpoint *checkpoint, size_t index); // within model_dir
const char *checkpoint_file_path(const struct checkpoint *checkpoint, size_t index); // with model_dir
uint64_t checkpoint_file_bytes(const struct checkpoint *checkpoint, size_t index);

// The weight_map of an index: tensor name -> file name. Parsed apart, for fuzzing.
struct checkpoint_index {
    struct checkpoint_index_entry {
        const char *tensor, *file;
    } * entries; // sorted by tensor name, no duplicates
    size_t count;
    char *strings; // what the names point into
};
// Success: the caller frees with checkpoint_index_clear.
int checkpoint_index_parse(struct checkpoint_index *out, const uint8_t *json, size_t num_bytes, const char *name,
                           struct error *err);
void checkpoint_index_clear(struct checkpoint_index *index);

#endif
