// Files about matrices: kinds that the user says himself (--kinds), sensitivities that were measured (--sensitivity). JSON objects, whose member
// "kinds" or "sensitivity" is an object of names and values. A name is "3.down", "*.down" (all layers), "3.*" (the layer's matrices) or "*"; the
// more exact one counts, a layer's before a role's.
#ifndef TPSHARD_SHARD_BITS_FILE_H
#define TPSHARD_SHARD_BITS_FILE_H

#include "shard/bits.h"

// ERR_USAGE: not such a file, a name that is no matrix of the model, a value out of range, a matrix without a value.
// Success: the caller frees *out, sorted (matrix_kinds_sort), one entry for each unit.
int bits_file_kinds(struct matrix_kind **out, const struct bits *bits, const char *path, struct error *err);
// Sets the units' sensitivities: numbers from 0 to 10^9, not all 0.
int bits_file_sensitivity(struct bits *bits, const char *path, struct error *err);

#endif
