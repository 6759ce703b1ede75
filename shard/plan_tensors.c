// See plan_tensors.h.
#include "shard/plan_tensors.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_FAMILY_TENSORS = 64 };

// ---- kinds -------------------------------------------------------------------------------------------------------

static enum weight_kind kind_of_role(enum tensor_role role, const struct manifest_quant *quant)
{
    if (tensor_role_is_linear(role))
        return quant->linear;
    switch (role) {
    case ROLE_EMBEDDING:
        return quant->embedding;
    case ROLE_HEAD:
        return quant->head;
    case ROLE_KV_B:
    case ROLE_ROUTER:
        return WEIGHT_BF16;
    default:
        return WEIGHT_F32;
    }
}

bool planned_any_kind(enum tensor_role role)
{
    static const struct manifest_quant probe = {.linear = WEIGHT_INT8, .embedding = WEIGHT_INT8, .head = WEIGHT_INT8};
    return kind_of_role(role, &probe) == WEIGHT_INT8;
}

static struct plan_kind default_kind(enum tensor_role role, const struct manifest_quant *quant)
{
    struct plan_kind kind = {.kind = kind_of_role(role, quant)};
    kind.group_size = weight_group_chosen(kind.kind) ? quant->group_size : weight_group_default(kind.kind);
    return kind;
}

// ---- the list ----------------------------------------------------------------------------------------------------

static bool per_layer(const struct family_tensor *entry) { return strchr(entry->source, '*') != NULL; }

static bool per_expert(const struct family_tensor *entry)
{
    const char *star = strchr(entry->source, '*');
    return star && strchr(star + 1, '*');
}

static int reserve_one(struct planned_list *list, struct error *err)
{
    if (list->count < list->capacity)
        return 0;
    uint64_t capacity = list->capacity ? 2 * list->capacity : 1024;
    struct planned *tensors = realloc(list->tensors, capacity * sizeof *tensors);
    if (!tensors)
        return error_set(err, ERR_MEMORY, "out of memory for the plan of %llu tensors", (unsigned long long)capacity);
    list->tensors = tensors;
    list->capacity = capacity;
    return 0;
}

// Adds the entries, fused by role.
static int add_fused(struct planned_list *list, const struct family_tensor *const *entries, int count, int32_t layer,
                     int32_t expert, const struct manifest_quant *quant, struct error *err)
{
    for (int e = 0; e < count;) {
        int rc = reserve_one(list, err);
        if (rc)
            return rc;
        struct planned *tensor = &list->tensors[list->count++];
        *tensor = (struct planned){.role = entries[e]->role, .layer = layer, .expert = expert};
        tensor->kind = default_kind(tensor->role, quant);
        while (e < count && entries[e]->role == tensor->role && tensor->num_entries < SHARD_MAX_PARTS)
            tensor->entries[tensor->num_entries++] = entries[e++];
    }
    return 0;
}

// What the layer holds of `entries`; those of experts come once for each expert, together.
static int add_layer(struct planned_list *list, const struct family_tensor *entries, int count, int32_t layer,
                     const struct model_desc *model, const struct manifest_quant *quant, struct error *err)
{
    const struct family_tensor *present[MAX_FAMILY_TENSORS];
    int num_present = 0, rc;
    for (int e = 0; e < count; e++)
        if (family_tensor_present(&entries[e], model, layer))
            present[num_present++] = &entries[e];
    for (int begin = 0, end; begin < num_present; begin = end) {
        bool experts = per_expert(present[begin]);
        for (end = begin + 1; end < num_present && per_expert(present[end]) == experts;)
            end++;
        for (int64_t expert = 0; expert < (experts ? model->experts.num_experts : 1); expert++)
            if ((rc = add_fused(list, present + begin, end - begin, layer, experts ? (int32_t)expert : -1, quant, err)))
                return rc;
    }
    return 0;
}

int planned_list_make(struct planned_list *list, const struct model_desc *model, const struct family_tensor *table,
                      const struct manifest_quant *quant, struct error *err)
{
    *list = (struct planned_list){0};
    int rc = 0;
    for (int begin = 0, end; !rc && table[begin].source; begin = end) {
        bool layers = per_layer(&table[begin]);
        for (end = begin + 1; table[end].source && per_layer(&table[end]) == layers;)
            end++;
        assert(end - begin <= MAX_FAMILY_TENSORS);
        for (int64_t layer = 0; !rc && layer < (layers ? model->num_layers : 1); layer++)
            rc = add_layer(list, table + begin, end - begin, layers ? (int32_t)layer : -1, model, quant, err);
    }
    if (rc) {
        free(list->tensors);
        *list = (struct planned_list){0};
    }
    return rc;
}

int planned_list_add_order(struct planned_list *list, uint64_t index, struct error *err)
{
    static const struct family_tensor computed = {.source = FAMILY_COMPUTED, .strategy = "replicate"};
    int rc = reserve_one(list, err);
    if (rc)
        return rc;
    struct planned *behind = &list->tensors[index + 1];
    memmove(behind + 1, behind, (list->count - index - 1) * sizeof *behind);
    list->count++;
    *behind = (struct planned){
        .role = list->tensors[index].role == ROLE_QKV ? ROLE_QKV_ORDER : ROLE_GATE_UP_ORDER,
        .layer = list->tensors[index].layer,
        .expert = -1,
        .num_entries = 1,
        .entries = {&computed},
        .kind.kind = WEIGHT_F32,
    };
    return 0;
}

// ---- sizes -------------------------------------------------------------------------------------------------------

struct range {
    int64_t total, begin, count;
};

// Elements along the cut dimension: all of them, and the rank's range.
static struct range cut_range(const struct model_desc *model, const struct rank_share *share, enum cut cut)
{
    const struct latent_desc *latent = &model->latent;
    int64_t each = model->head_dim;
    switch (cut) {
    case CUT_HEAD_VALUES:
        each = latent->kv_rank ? latent->v_dim : model->head_dim;
        break;
    case CUT_HEAD_LATENT:
        each = latent->nope_dim + latent->v_dim;
        break;
    case CUT_EACH_HEAD:
        each = 1;
        break;
    case CUT_HEADS:
        break;
    case CUT_KV_HEADS:
        return (struct range){model->num_kv_heads * each, share->kv_head_begin * each,
                              share->num_kv_heads_local * each};
    case CUT_MLP:
        return (struct range){model->intermediate_size, share->mlp_begin, share->intermediate_local};
    case CUT_SHARED:
        return (struct range){model->experts.shared_size, share->shared_begin, share->shared_size_local};
    case CUT_VOCAB:
        return (struct range){model->vocab_size, share->vocab_begin, share->vocab_local};
    case CUT_EXPERT:
    case CUT_NONE:
        assert(!"these are no ranges of the model");
    }
    return (struct range){model->num_heads * each, share->head_begin * each, share->num_heads_local * each};
}

// Elements of what is not cut: a vector, or the rows of a matrix.
static int64_t whole_elems(const struct model_desc *model, const struct family_tensor *entry, enum tensor_role role)
{
    switch (role) {
    case ROLE_ROPE_INV_FREQ:
    case ROLE_ROPE_LONG:
    case ROLE_ROPE_LOCAL:
        return model->rotary_dim / 2;
    case ROLE_Q_NORM:
    case ROLE_K_NORM:
        return model->head_dim;
    case ROLE_Q_A:
    case ROLE_Q_A_NORM:
        return model->latent.q_rank;
    case ROLE_KV_A:
        return model->latent.kv_rank + model->latent.rope_dim;
    case ROLE_KV_A_NORM:
        return model->latent.kv_rank;
    case ROLE_ROUTER:
        return entry->presence == WITH_SHARED_GATE ? 1 : model->experts.num_experts;
    case ROLE_ROUTER_BIAS:
    case ROLE_ROUTER_CHOICE_BIAS:
        return model->experts.num_experts;
    default:
        return model->hidden_size;
    }
}

// Columns of a matrix whose rows are cut or whole.
static int64_t input_elems(const struct model_desc *model, enum tensor_role role)
{
    if (role == ROLE_Q_B && model->latent.q_rank > 0)
        return model->latent.q_rank;
    return role == ROLE_KV_B ? model->latent.kv_rank : model->hidden_size;
}

static struct range entry_range(const struct planned *tensor, const struct family_tensor *entry,
                                const struct model_desc *model, enum experts_mode experts,
                                const struct rank_share *share)
{
    if (entry->cut != CUT_NONE && entry->cut != CUT_EXPERT)
        return cut_range(model, share, entry->cut);
    int64_t whole = entry->cut == CUT_EXPERT ? model->experts.expert_size : whole_elems(model, entry, tensor->role);
    if (tensor->expert >= 0 && experts == EXPERTS_EP) {
        int64_t number = tensor->expert - share->expert_begin;
        return (struct range){whole, 0, number >= 0 && number < share->num_experts_local ? whole : 0};
    }
    if (entry->cut == CUT_EXPERT)
        return (struct range){whole, share->expert_mlp_begin, share->expert_size_local};
    return (struct range){whole, 0, whole};
}

// Whole experts are dealt out by their rows, be they inputs or outputs.
enum split planned_split(const struct planned *tensor, enum experts_mode experts)
{
    return tensor->expert >= 0 && experts == EXPERTS_EP ? SPLIT_OUT : family_split(tensor->entries[0]);
}

struct shard_part planned_part(const struct planned *tensor, int p, const struct model_desc *model,
                               enum experts_mode experts, const struct rank_share *share)
{
    const struct family_tensor *entry = tensor->entries[p];
    struct range range = entry_range(tensor, entry, model, experts, share);
    int64_t total = 0, before = 0;
    for (int i = 0; i < tensor->num_entries; i++) { // ranges of one source stand one behind the other
        if (strcmp(tensor->entries[i]->source, entry->source) != 0)
            continue;
        int64_t elems = entry_range(tensor, tensor->entries[i], model, experts, share).total;
        total += elems;
        before += i < p ? elems : 0;
    }
    range.begin += before;
    struct shard_part part = {0};
    if (tensor->kind.kind == WEIGHT_F32) { // a vector
        part.source_rows = part.rows = 1;
        part.source_cols = (uint64_t)total;
        part.col_begin = (uint64_t)range.begin;
        part.cols = (uint64_t)range.count;
    } else if (family_split(entry) != SPLIT_IN) {
        part.source_rows = (uint64_t)total;
        part.row_begin = (uint64_t)range.begin;
        part.rows = (uint64_t)range.count;
        part.source_cols = part.cols = (uint64_t)input_elems(model, tensor->role);
    } else if (tensor->expert >= 0 && experts == EXPERTS_EP) { // all columns, all rows or none
        part.source_rows = (uint64_t)model->hidden_size;
        part.rows = range.count > 0 ? part.source_rows : 0;
        part.source_cols = part.cols = (uint64_t)total;
    } else {
        part.source_rows = part.rows = (uint64_t)model->hidden_size;
        part.source_cols = (uint64_t)total;
        part.col_begin = (uint64_t)range.begin;
        part.cols = (uint64_t)range.count;
    }
    return part;
}
