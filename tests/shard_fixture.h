// A small shard directory of two ranks that holds every kind of weight, whose sources are known by formula, so that a
// reader of its own (shard_reader.py) can check the values.
#ifndef TPSHARD_TESTS_SHARD_FIXTURE_H
#define TPSHARD_TESTS_SHARD_FIXTURE_H

#include "formats/checksum.h"
#include "formats/shard_file.h"

#include <stdbool.h>
#include <stdint.h>

enum { SHARD_FIXTURE_TENSORS = 16 };

struct shard_fixture {
    struct shard_identity identity;
    struct shard_tensor tensors[SHARD_FIXTURE_TENSORS];
    uint8_t *bytes; // the whole file; the caller frees it
    uint64_t payload_offset, payload_bytes, file_bytes;
    struct checksum128 root;
};

// One rank's file in memory. extra_vocab makes it longer: rows of zeros of a larger vocabulary.
void shard_fixture_make(struct shard_fixture *file, uint32_t rank, const uint8_t contract[16], uint64_t extra_vocab);
// The same file compressed: file->bytes and what follows from them are replaced.
void shard_fixture_compress(struct shard_fixture *file);
// The whole directory: both ranks, note.txt and model.json.
void shard_fixture_write(const char *out_dir, bool compressed);

// A tensor of a legal shape, without parts.
void shard_fixture_set_tensor(struct shard_tensor *tensor, enum tensor_role role, int32_t layer, enum weight_kind kind,
                              uint32_t group_size, uint64_t rows, uint64_t cols); // expert is -1

#endif
