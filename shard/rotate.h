// Rotation (--rot): a model is multiplied by orthogonal matrices on the one side of a product and by their inverses on the other, so that it
// computes the same while outliers of single channels are spread over many, and four bits hold the weights better. A rotation is block
// diagonal, of Hadamard matrices over the root of their size, behind a sign for each channel:
//
//   residual stream  norm gains go into the matrices behind the norm (which then multiplies by 1: the root mean square of a row does not
//                    change); embedding rows, inputs of qkv, gate, up, router and head, outputs of o and down, with their biases
//   values           of each head alike: outputs of v, inputs of o. Latent attention: value rows of kv_b; also both latents, whose norm
//                    gains go into q_b and kv_b
//   mlp              inputs of down, in experts too; the engine rotates the activation itself (model_desc.mlp_rotation), signs go into up
//
// Owns which part of which tensor is rotated how. Values are f32, in an order of operations that is fixed, and rounded once, when they are
// stored: the rotated weights do not depend on tp, threads or instruction set.
#ifndef TPSHARD_SHARD_ROTATE_H
#define TPSHARD_SHARD_ROTATE_H

#include "formats/error.h"
#include "formats/model_desc.h"
#include "kernels/kernels.h"
#include "shard/plan.h"
#include "shard/row_source.h"

#include <stdint.h>

// Columns of a block: the largest power of two up to MODEL_MAX_ROTATION that divides `count`; 0 where that is below MANIFEST_MIN_ROTATION.
uint32_t rotate_block(int64_t count);

// Makes the description that of the rotated model: mlp_rotation, and embeddings of their own (the embedding has no norm in front, the head
// has). *block: of the residual stream, for manifest_quant. ERR_MODEL: a rotation would change what this model computes.
int rotate_model(struct model_desc *model, uint32_t *block, struct error *err);

// Where `original`, the description before, ties the head to the embedding, it is read from there. ERR_MODEL: the plan stores columns in
// orders of their own (act-order), which a rotation would mix.
int rotate_plan(struct plan *plan, const struct model_desc *original, struct error *err);

// "residual 128, values 64, mlp 128": the blocks of a plan that is rotated, for people.
void rotate_text(char *out, size_t bytes, const struct plan *plan);

struct rotate_gains {
    float *attention, *mlp, *q_a, *kv_a; // NULL: none
};

// Rows of the rotated model, from a source that has them as they are.
struct rotate_source {
    struct row_source source; // must be first
    const struct row_source *base;
    const struct plan *plan;
    const struct kernels *kernels;
    struct rotate_gains *layers; // [num_layers]
    float *final_gain;
};

// Reads the norms' gains, which it holds. base, which has `values`, and plan must outlive it. Success: rotate_source_clear.
int rotate_source_init(struct rotate_source *out, const struct row_source *base, const struct plan *plan,
                       struct error *err);
void rotate_source_clear(struct rotate_source *source); // accepts a zeroed one

#endif
