// Rotary positions: reads their parameters from config.json and computes the tables of inverse frequencies, scaling
// applied, so that the engine knows no rope scaling.
#ifndef TPSHARD_SHARD_ROPE_H
#define TPSHARD_SHARD_ROPE_H

#include "formats/error.h"
#include "formats/json_file.h"

#include <stdbool.h>
#include <stdint.h>

enum rope_scaling { ROPE_PLAIN, ROPE_LINEAR, ROPE_LLAMA3, ROPE_YARN, ROPE_LONG };
enum { ROPE_MAX_PAIRS = 160 };

struct rope {
    enum rope_scaling scaling;
    int64_t dim; // columns of a head that rotate; even
    double theta;
    double factor;                                                    // linear, llama3, yarn
    double low_freq_factor, high_freq_factor;                         // llama3
    int64_t original_context;                                         // llama3, yarn, long: tokens
    double beta_fast, beta_slow;                                      // yarn
    bool truncate;                                                    // yarn
    double short_factor[ROPE_MAX_PAIRS], long_factor[ROPE_MAX_PAIRS]; // long: one for each pair
    double attention_factor;                                          // multiplies cosines and sines
    double mscale_all_dim; // yarn: DeepSeek scales attention by it too; 0: does not
};

// What the config class of the model says where the file does not.
struct rope_defaults {
    double theta, partial_rotary_factor;
    int64_t head_dim;   // columns that a full rotation turns
    int64_t context;    // max_position_embeddings, tokens
    bool longrope_only; // su and yarn are older names of longrope (Phi-3)
    bool nested;        // rope_parameters may be given by layer type
};

// Reads `rope_parameters` (transformers 5) or `rope_theta`, `rope_scaling` and `partial_rotary_factor` (before).
// ERR_MODEL names a kind of scaling that is not supported.
int rope_parse(struct rope *out, const struct json_object *config, const struct rope_defaults *defaults,
               struct error *err);
// The table of layers with a window, where they have their own: rope_parameters.sliding_attention, or
// rope_local_base_freq, and never scaled. theta: where the file says nothing.
int rope_parse_local(struct rope *out, const struct json_object *config, const struct rope_defaults *defaults,
                     double theta, struct error *err);

// out [rope->dim / 2]; computed in double, rounded once. long_table: that of contexts above the original one.
void rope_inv_freq(float *out, const struct rope *rope, bool long_table);

// What DeepSeek multiplies the scale of attention by.
double rope_attention_scale(const struct rope *rope);

#endif
