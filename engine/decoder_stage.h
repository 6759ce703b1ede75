// A pass through several pipeline stages: between two of them the residual stream goes from each rank to the one of the same number in the next
// stage. What the last layer put out has joined it, so the next stage goes on as one stage would: the same bits.
#ifndef TPSHARD_ENGINE_DECODER_STAGE_H
#define TPSHARD_ENGINE_DECODER_STAGE_H

#include "engine/decoder.h"

// Behind begin: the residual of the step's rows comes from the stage before. Waits for it, as long as that one works.
int decoder_stage_take(struct decoder *decoder, struct error *err);
// Behind the stage's last layer: hands the residual to the next stage, which may still be at an earlier pass.
int decoder_stage_pass_on(struct decoder *decoder, struct error *err);

#endif
