// The plan: which rank holds which slice of which tensor, and where it stands in the rank's file. Pure arithmetic from
// the model description; reads and writes nothing.
#ifndef TPSHARD_SHARD_PLAN_H
#define TPSHARD_SHARD_PLAN_H

#include "formats/error.h"
#include "formats/manifest.h"
#include "formats/model_desc.h"
#include "formats/shard_file.h"
#include "shard/families.h"

#include <stdint.h>

enum { PLAN_MAX_TP = 64 };

struct plan_rank {
    struct rank_share share;
    struct shard_tensor *tensors;
    uint64_t payload_offset, payload_bytes, file_bytes;
};

// Tensor i is the same one (role, layer, source tensors in the same order) on every rank; only its slice differs, and
// it may be empty.
struct plan {
    struct model_desc model;
    struct manifest_quant quant;
    uint32_t tp_size;
    uint64_t tensor_count;
    enum split *splits;      // [tensor_count]
    struct plan_rank *ranks; // [tp_size]
    char *names;             // what shard_part.source points into
};

// Kinds of the three groups of weights from the words of the command line ("none", "int8", "fp8", "int4"); embed and
// head may be NULL for the default. ERR_USAGE when tied embeddings are asked to differ from their head.
int plan_quant(struct manifest_quant *out, const char *quant, const char *embed, const char *head, int64_t group_size,
               bool tied_embeddings, struct error *err);

// Success: the caller owns *out (plan_free). ERR_USAGE for tp_size above PLAN_MAX_TP, ERR_MODEL for an unknown family.
int plan_make(struct plan **out, const struct model_desc *model, const struct manifest_quant *quant, uint32_t tp_size,
              struct error *err);
void plan_free(struct plan *plan); // accepts null

// Heads and mlp rows come in units that keep the groups of the matrices behind them (o, down) whole.
int64_t plan_attention_unit_heads(const struct model_desc *model, const struct manifest_quant *quant);
int64_t plan_mlp_unit(const struct manifest_quant *quant);
// Rows of embedding and head are dealt out in this unit, so that padding costs nothing on all but the last rank.
enum { PLAN_VOCAB_UNIT = WEIGHT_ROW_UNIT };

// ERR_CORRUPT when a rank file's share or tensors are not those of the plan.
int plan_compare(const struct plan *plan, uint32_t rank, const struct shard_file *file, const char *name,
                 struct error *err);

// One line about ranks that hold no heads, mlp columns or vocabulary; false when there are none.
bool plan_empty_shares(const struct plan *plan, char *line, size_t line_bytes);

// Bytes that all ranks together store for weights, scales and padding.
uint64_t plan_stored_bytes(const struct plan *plan);
// "embedding", "layer 3 qkv": for people.
void plan_tensor_label(char *buffer, size_t bytes, const struct shard_tensor *tensor);

#endif
