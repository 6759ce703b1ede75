// The plan of a quantized checkpoint: kinds and orders as the import has them, for convert, plan and verify alike. See
// import.h.
#ifndef TPSHARD_SHARD_IMPORT_PLAN_H
#define TPSHARD_SHARD_IMPORT_PLAN_H

#include "shard/import.h"
#include "shard/plan.h"

#include <stdbool.h>

// Set up by its users; import must outlive it. Orders of columns are the same whatever the kinds.
struct import_kinds {
    struct plan_kinds kinds; // must be first
    struct import *import;
    bool keep;                      // matrices keep their kinds; else they get those of the plan's quant, or of base
    bool keep_embedding, keep_head; // with keep: unless the command line says another kind for them
    const struct plan_kinds *base;  // without keep: asked for the kind (kinds of rank files); NULL: the plan's quant
};
// keep with embed and head as the command line says them (NULL: not said).
struct import_kinds import_kinds_keep(struct import *import, const char *embed, const char *head);
struct import_kinds import_kinds_as(struct import *import, const struct plan_kinds *base);

// What the manifest says of a model that keeps its kinds: the kind of most of its matrices; embed and head as said.
int import_quant(struct manifest_quant *out, const struct import_config *config, const char *embed, const char *head,
                 int64_t group_size, bool tied_embeddings, struct error *err);

// Kinds matrix by matrix.
struct plan_mix {
    struct matrix_kind *list; // of all matrices of the layers, sorted (matrix_kinds_sort); NULL: no mix
    size_t count;
    enum weight_kind linear; // that of most weights
    uint32_t millibits;      // thousandths of a bit per weight that they take at most, or were to take
    const char *name;        // of where the list comes from, for messages
};

// How the command line wants a model stored and cut.
struct plan_wish {
    const char
        *quant; // "keep": as the checkpoint has it (bf16 where it is not quantized), "none", or the name of a kind
    const char *embed, *head; // NULL: not said
    int64_t group_size;
    enum weight_scales scales;    // of what is rounded to four bits
    uint32_t tp_size, pp_size;    // pp_size 0: 1
    const uint16_t *stage_layers; // [pp_size]; NULL: balanced
    enum experts_mode experts;
    bool rotate;                // --rot
    const struct plan_mix *mix; // instead of quant; NULL or without a list: none
};
// config says how the checkpoint is quantized; import NULL: it is not. Success: the caller owns *out (plan_free).
int plan_of_wish(struct plan **out, const struct model_desc *model, const struct import_config *config,
                 struct import *import, const struct plan_wish *wish, struct error *err);
// Whether matrices keep the kinds of a quantized checkpoint.
bool plan_wish_keeps(const struct plan_wish *wish, const struct import *import);

#endif
