// Columns of tensors whose packed layout runs across rows (GPTQ, AWQ): blocks of columns are read once, in large
// pieces, and shared by the threads that unpack them. Memory: a few blocks of BLOCK_BYTES, or of one tensor where that
// is larger and its rows are wanted out of order.
#ifndef TPSHARD_SHARD_IMPORT_SLAB_H
#define TPSHARD_SHARD_IMPORT_SLAB_H

#include "formats/checkpoint.h"
#include "formats/error.h"

#include <stdbool.h>
#include <stdint.h>

struct slab_cache;
int slab_cache_new(struct slab_cache **out, const struct checkpoint *checkpoint, struct error *err);
void slab_cache_free(struct slab_cache *cache); // accepts null

// Bytes [begin, begin + width) of every row of a tensor of `rows` rows.
struct slab {
    const uint8_t *bytes; // [rows][width]
    uint64_t begin, width;
    int slot; // for import_slab.c
};

// The block around byte `at` of each row; whole: all of the row. May be called by many threads; each gives back what it
// holds (slab_put) before it takes another.
int slab_get(struct slab *out, struct slab_cache *cache, const struct safetensors_tensor *tensor, uint64_t rows,
             uint64_t at, bool whole, struct error *err);
void slab_put(struct slab_cache *cache, const struct slab *slab);

#endif
