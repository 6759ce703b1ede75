// The one decoder: every model that the description can express runs through it. It owns the buffers of a step and nothing else.
//
// Law 9: the arithmetic of a token row depends on its own sequence alone, so rows of any sequences may share a step.
#ifndef TPSHARD_ENGINE_DECODER_H
#define TPSHARD_ENGINE_DECODER_H

#include "engine/comm.h"
#include "engine/kv_cache.h"
#include "engine/model.h"
#include "kernels/kernels.h"
#include "kernels/thread_pool.h"

#include <stdint.h>

// One token to be computed: at `position` of sequence slot `sequence`, whose earlier positions are in the KV cache or in earlier rows.
struct token_row {
    uint32_t token;
    int32_t sequence;
    int64_t position;
};

struct decoder;

// Everything is borrowed and must outlive the decoder. max_rows: most rows of one step. max_context: longest sequence.
int decoder_create(struct decoder **out, const struct model *model, const struct kernels *kernels,
                   struct thread_pool *pool, struct comm *comm, struct kv_cache *cache, enum wire wire,
                   int64_t max_rows, int64_t max_context, struct error *err);
void decoder_free(struct decoder *decoder);
// Bytes a decoder takes on the rank with this share.
uint64_t decoder_bytes(const struct model_desc *desc, const struct rank_share *share, int64_t max_rows,
                       int64_t max_context, int threads);

// Runs rows (count <= max_rows) through all layers; KV room must be reserved. Collective: every rank calls it with the same rows.
int decoder_forward(struct decoder *decoder, const struct token_row *rows, int64_t count, struct error *err);
// Logits of this rank's part of the vocabulary for some rows of the last forward: logits [count][stride], f32, stride >= vocab_local.
// row_index [count] (NULL: rows 0 .. count-1).
int decoder_logits(struct decoder *decoder, const int64_t *row_index, int64_t count, float *logits, int64_t stride,
                   struct error *err);

#endif
