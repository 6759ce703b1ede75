// Matrices in kinds of their own, for people.
#ifndef TPSHARD_SHARD_MIX_TEXT_H
#define TPSHARD_SHARD_MIX_TEXT_H

#include "formats/matrix_kinds.h"

// "qkv 4 int4:32; o 3 int8, 1 int4z:32; ...": how many matrices of each role have which kind, the most frequent first. list is sorted
// (matrix_kinds_sort). What has no room is left out.
void mix_text_line(char *out, size_t out_bytes, const struct matrix_kind *list, size_t count);

#endif
