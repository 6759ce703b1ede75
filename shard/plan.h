// The plan: which rank holds which slice of which tensor, and where it stands in the rank's file. Pure arithmetic from
// the model description and the family's table; reads and writes nothing.
#ifndef TPSHARD_SHARD_PLAN_H
#define TPSHARD_SHARD_PLAN_H

#include "formats/error.h"
#include "formats/manifest.h"
#include "formats/model_desc.h"
#include "formats/shard_file.h"
#include "shard/families.h"

#include <stdint.h>

enum { PLAN_MAX_TP = 64, PLAN_MAX_PP = 64, PLAN_MAX_RANKS = 64 }; // ranks of a stage, stages, ranks in all

struct plan_rank {
    struct rank_share share;
    struct shard_tensor *tensors;
    uint64_t payload_offset, payload_bytes, file_bytes;
};

// What a part is read from. A part's own name, "...gate_up_proj[5]" for the sixth matrix of a stack, stands for the
// matrix as it is stored: [out, in], rows of gate in front of rows of up, norms ready to multiply.
struct plan_source {
    const char *tensor; // of the checkpoint: the part's name, without an index
    int64_t index;      // into a stacked tensor; -1: it is none
    enum source_form form;
};

// What is dealt out whole, so that columns that share a scale, or are rotated together, are never cut apart.
struct plan_units {
    int64_t heads, mlp, expert, shared; // query heads; rows of gate and up, columns of down
};

// Tensor i is the same one (role, layer, expert, source tensors in the same order) on every rank; only its slice
// differs, and it may be empty.
struct plan {
    struct model_desc model;
    struct manifest_quant quant;
    enum experts_mode experts;
    uint32_t tp_size, pp_size, num_ranks;    // of a stage; stages; tp_size * pp_size
    uint16_t stage_layers[MODEL_MAX_LAYERS]; // [pp_size]
    struct plan_units units;
    const char *prefix; // of all source names, "" for most
    uint64_t tensor_count;
    enum split *splits;                             // [tensor_count]
    struct plan_source (*sources)[SHARD_MAX_PARTS]; // [tensor_count]
    struct plan_rank *ranks;                        // [num_ranks], stage by stage
    char *names;                                    // what shard_part.source and plan_source.tensor point into
};

// How one matrix is stored.
struct plan_kind {
    enum weight_kind kind;
    uint32_t group_size; // 0 where the kind has no groups
    bool order;          // its input columns stand in an order of their own (ROLE_QKV and ROLE_GATE_UP alone)
};

// Decides kinds matrix by matrix, where a checkpoint or rank files have decided already. `of` is asked for every matrix
// that may be stored in any kind; *out holds what the words of the command line give. tensor: role, layer, expert, and
// its parts' names and whole shapes; sources [tensor->num_parts].
struct plan_kinds {
    int (*of)(const struct plan_kinds *kinds, struct plan_kind *out, const struct shard_tensor *tensor,
              const struct plan_source *sources, struct error *err);
};

// Kinds as they stand in a rank file (any rank's).
struct plan_kinds_of_file {
    struct plan_kinds kinds; // must be first
    const struct shard_file *file;
};
void plan_kinds_of_file_init(struct plan_kinds_of_file *out, const struct shard_file *file);

// Kinds of the layers' matrices from a list (a manifest's, or one that was chosen), which must hold all of them.
struct plan_kinds_of_list {
    struct plan_kinds kinds; // must be first
    const struct matrix_kind *list;
    size_t count;
    const char *name; // of the file that holds the list, for messages
    int bad_code;     // of a matrix that is not listed
};
void plan_kinds_of_list_init(struct plan_kinds_of_list *out, const struct matrix_kind *list, size_t count,
                             const char *name, int bad_code);

// The kinds of the layers' matrices as planned. Success: the caller frees *out, sorted (matrix_kinds_sort).
int plan_matrices(struct matrix_kind **out, size_t *count, const struct plan *plan, struct error *err);

struct plan_options {
    struct manifest_quant quant;
    uint32_t tp_size;
    enum experts_mode experts;
    const struct plan_kinds *kinds;      // NULL: as quant says
    const struct family_tensor *tensors; // NULL: the table of the model's architecture
    uint32_t pp_size;                    // 0: 1
    const uint16_t *stage_layers;        // [pp_size]; NULL: balanced (stages.h)
};

// Kinds of the three groups of weights from the words of the command line ("none", or the name of a kind); embed and
// head may be NULL for the default. ERR_USAGE when tied embeddings are asked to differ from their head.
int plan_quant(struct manifest_quant *out, const char *quant, const char *embed, const char *head, int64_t group_size,
               bool tied_embeddings, struct error *err);

// Success: the caller owns *out (plan_free). ERR_USAGE for more ranks than PLAN_MAX_RANKS or more stages than layers, ERR_MODEL for an unknown family.
int plan_make(struct plan **out, const struct model_desc *model, const struct plan_options *options, struct error *err);
void plan_free(struct plan *plan); // accepts null

// Whether a rank's stage holds the tensor. Of the others no rank has any rows (of vectors: columns).
bool plan_rank_holds(const struct plan *plan, uint32_t rank, uint64_t tensor);
// The description of the layers of a rank's stage, numbered from 0 on.
void plan_rank_model(struct model_desc *out, const struct plan *plan, uint32_t rank);

// Rows of embedding and head are dealt out in this unit, so that padding costs nothing on all but the last rank.
enum { PLAN_VOCAB_UNIT = WEIGHT_ROW_UNIT };

// ERR_CORRUPT when a manifest lists other kinds than those of the plan. name is for messages.
int plan_compare_matrices(const struct plan *plan, const struct manifest *manifest, const char *name,
                          struct error *err);
// ERR_CORRUPT when a rank file's share or tensors are not those of the plan.
int plan_compare(const struct plan *plan, uint32_t rank, const struct shard_file *file, const char *name,
                 struct error *err);

// "of 8 ranks 4 hold no mlp columns ...": for people, when some rank gets an empty share. False: none does.
bool plan_empty_shares(const struct plan *plan, char *line, size_t line_bytes);

// Bytes that all ranks together store for weights, scales and padding.
uint64_t plan_stored_bytes(const struct plan *plan);
// "embedding", "layer 3 qkv", "layer 3 expert 17 expert_down": for people.
void plan_tensor_label(char *buffer, size_t bytes, const struct shard_tensor *tensor);

#endif
