// Rotary positions: reads their parameters from config.json and computes the table of inverse frequencies, scaling
// applied, so that the engine knows no rope scaling.
#ifndef TPSHARD_SHARD_ROPE_H
#define TPSHARD_SHARD_ROPE_H

#include "formats/error.h"
#include "formats/json_file.h"

#include <stdint.h>

enum rope_scaling { ROPE_PLAIN, ROPE_LINEAR, ROPE_LLAMA3 };

struct rope {
    enum rope_scaling scaling;
    double theta;
    double factor;                            // linear, llama3
    double low_freq_factor, high_freq_factor; // llama3
    int64_t original_context;                 // llama3, tokens
};

// Reads `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before). context is the model's, tokens.
// ERR_MODEL names a kind of scaling that is not supported.
int rope_parse(struct rope *out, const struct json_object *config, int64_t context, struct error *err);

// out [head_dim / 2]; computed in double, rounded once.
void rope_inv_freq(float *out, const struct rope *rope, int64_t head_dim);

#endif
