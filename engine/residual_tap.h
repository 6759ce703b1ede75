// Shows the residual stream of a forward's rows: behind the embedding, stage 0, and behind each layer, stages 1 .. num_layers. The stream is the same
// on every rank, so one of them does it.
#ifndef TPSHARD_ENGINE_RESIDUAL_TAP_H
#define TPSHARD_ENGINE_RESIDUAL_TAP_H

#include "engine/decoder.h"

#include <stdint.h>

struct residual_tap {
    struct decoder_watch watch; // for the decoder
    float *rows;                // [num_layers + 1][room][hidden_size]; borrowed
    int64_t room;
    int64_t at; // the next step's rows go to rows at .. ; the caller begins with 0
};

// A step is shown whole when decoder_head_input has been called behind it.
void residual_tap_init(struct residual_tap *tap, float *rows, int64_t room);

#endif
