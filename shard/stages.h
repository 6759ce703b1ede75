// Which layers a pipeline stage holds: one run of layers each, so that the largest stage has as few bytes as can be. Arithmetic only.
#ifndef TPSHARD_SHARD_STAGES_H
#define TPSHARD_SHARD_STAGES_H

#include "formats/error.h"

#include <stdint.h>

// layer_bytes [num_layers]; first_bytes and last_bytes lie on the first and the last stage besides. stage_layers [pp_size], pp_size <= num_layers
// <= MODEL_MAX_LAYERS. Of several divisions with the smallest largest stage: the one with the least sum of squares, then the one
// whose first stage that differs has fewer layers.
int stages_balance(uint16_t *stage_layers, uint32_t pp_size, const uint64_t *layer_bytes, int64_t num_layers,
                   uint64_t first_bytes, uint64_t last_bytes, struct error *err);

#endif
