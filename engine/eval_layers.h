// How far a model's residual stream is from a reference's, behind the embedding and behind each layer: for each token |q - p| / |p| (Euclidean
// norms over the channels), of which the mean over tokens and the largest are told. Tokens count alike, however long their vectors are: a few, such as the
// first, are often longer than all others together. A rotated model's stream (formats/rotation.h) is turned back first.
#ifndef TPSHARD_ENGINE_EVAL_LAYERS_H
#define TPSHARD_ENGINE_EVAL_LAYERS_H

#include "formats/error.h"
#include "formats/manifest.h"
#include "kernels/kernels.h"
#include "kernels/thread_pool.h"

#include <stdint.h>

struct eval_layers {
    int64_t stages, hidden_size; // stage 0 is the embedding, stage i the i-th layer
    int64_t room;                // rows that are looked at together
    int64_t tokens;              // so far
    double *sum, *largest;       // [stages]
    double *errors;              // [room][stages]
    int64_t rotation[2];         // of the model's stream and the reference's; both 0 where they are the same
    const struct kernels *kernels;
    float *turned; // [threads][2][hidden_size]; NULL: nothing is turned back
};

// Rows of a forward: at most `most`, fewer for models that are deep and wide.
int64_t eval_layers_room(const struct model_desc *model, int64_t most);
// Success: eval_layers_close.
int eval_layers_open(struct eval_layers *out, const struct manifest *model, const struct manifest *reference,
                     int64_t room, int threads, struct error *err);
void eval_layers_close(struct eval_layers *layers); // accepts a zeroed one
// Rows first .. first + count - 1 of q and p, which are [stages][room][hidden_size].
void eval_layers_add(struct eval_layers *layers, const float *q, const float *p, int64_t first, int64_t count,
                     struct thread_pool *pool); // of at most `threads`
// Of a stage.
double eval_layers_mean(const struct eval_layers *layers, int64_t stage);

#endif
