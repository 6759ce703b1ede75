// The plan's list of stored tensors, and the rectangle of each source that a rank holds. For plan.c alone.
#ifndef TPSHARD_SHARD_PLAN_TENSORS_H
#define TPSHARD_SHARD_PLAN_TENSORS_H

#include "shard/plan.h"

#include <stdbool.h>
#include <stdint.h>

// One stored tensor: the entries of the family's table that are fused into it.
struct planned {
    enum tensor_role role;
    int32_t layer, expert; // -1: none
    int num_entries;
    const struct family_tensor *entries[SHARD_MAX_PARTS];
    struct plan_kind kind;
};

struct planned_list {
    struct planned *tensors;
    uint64_t count, capacity;
};

// All stored tensors of the model, in the order of the file, kinds as quant says. Success: the caller frees list->tensors.
int planned_list_make(struct planned_list *list, const struct model_desc *model, const struct family_tensor *table,
                      const struct manifest_quant *quant, struct error *err);
// Adds the tensor that holds the order of the columns of tensor `index`, right behind it.
int planned_list_add_order(struct planned_list *list, uint64_t index, struct error *err);

// Whether a role may be stored in any kind: neither a vector nor always bf16.
bool planned_any_kind(enum tensor_role role);

// Sizes of part p of a tensor, whole and this rank's, without its name.
struct shard_part planned_part(const struct planned *tensor, int p, const struct model_desc *model,
                               enum experts_mode experts, const struct rank_share *share);
// The tensor's split over the ranks.
enum split planned_split(const struct planned *tensor, enum experts_mode experts);

#endif
