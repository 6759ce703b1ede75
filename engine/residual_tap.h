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
    int64_t at, next; // this pass' rows stand at rows at .., the next one's at rows next ..; the caller sets next to 0
};

// A step is shown whole when decoder_head_input has been called behind it. Of several stages each shows what its layers take in, the last one also what
// the head does.
void residual_tap_init(struct residual_tap *tap, float *rows, int64_t room);

#endif
