// See plan.h. The rules that decide who owns what stand in share_of; the rest follows from the family's table.
#include "shard/plan.h"

#include "formats/checked.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { NAME_BYTES = 96, MAX_FAMILY_TENSORS = 64 };

// ---- number formats ----------------------------------------------------------------------------------------------

static enum weight_kind kind_of(const char *word)
{
    enum weight_kind kind = WEIGHT_BF16;
    if (strcmp(word, "none") != 0 && !weight_kind_from_name(word, &kind))
        assert(!"the option table lets only known words through");
    return kind;
}

int plan_quant(struct manifest_quant *out, const char *quant, const char *embed, const char *head, int64_t group_size,
               bool tied_embeddings, struct error *err)
{
    // The head decides which token comes next and is a small part of the model: never below 8 bits unless asked.
    const char *default_head = strcmp(quant, "int4") == 0 ? "int8" : quant;
    if (tied_embeddings && embed && head && strcmp(embed, head) != 0)
        return error_set(err, ERR_USAGE,
                         "the model's embedding is also its head, one stored tensor: --embed %s and --head %s must "
                         "agree",
                         embed, head);
    if (tied_embeddings && !head)
        head = embed;
    out->linear = kind_of(quant);
    out->head = kind_of(head ? head : default_head);
    out->embedding = tied_embeddings ? out->head : kind_of(embed ? embed : "none");
    bool any_int4 = out->linear == WEIGHT_INT4 || out->head == WEIGHT_INT4 || out->embedding == WEIGHT_INT4;
    out->group_size = any_int4 ? (uint32_t)group_size : 0;
    return 0;
}

static enum weight_kind kind_of_role(enum tensor_role role, const struct manifest_quant *quant)
{
    switch (role) {
    case ROLE_EMBEDDING:
        return quant->embedding;
    case ROLE_HEAD:
        return quant->head;
    case ROLE_QKV:
    case ROLE_O:
    case ROLE_GATE_UP:
    case ROLE_DOWN:
        return quant->linear;
    default:
        return WEIGHT_F32;
    }
}

// ---- shares ------------------------------------------------------------------------------------------------------

static int64_t min_i64(int64_t a, int64_t b) { return a < b ? a : b; }

int64_t plan_attention_unit_heads(const struct model_desc *model, const struct manifest_quant *quant)
{
    if (quant->linear != WEIGHT_INT4)
        return 1;
    int64_t unit_heads = 1; // lcm(head_dim, group_size) / head_dim
    while (unit_heads * model->head_dim % quant->group_size != 0)
        unit_heads++;
    return unit_heads;
}

int64_t plan_mlp_unit(const struct manifest_quant *quant)
{
    return quant->linear == WEIGHT_INT4 ? quant->group_size : 1;
}

// Whole units are dealt out; the last one may be incomplete.
static void deal(int64_t *begin, int64_t *count, int64_t total, int64_t unit, uint32_t rank, uint32_t tp_size)
{
    int64_t units = (total + unit - 1) / unit;
    *begin = min_i64(partition_begin(units, rank, tp_size) * unit, total);
    *count = min_i64(partition_begin(units, rank + 1, tp_size) * unit, total) - *begin;
}

static struct rank_share share_of(const struct plan *plan, uint32_t rank)
{
    const struct model_desc *model = &plan->model;
    struct rank_share share;
    deal(&share.head_begin, &share.num_heads_local, model->num_heads, plan_attention_unit_heads(model, &plan->quant),
         rank, plan->tp_size);
    deal(&share.mlp_begin, &share.intermediate_local, model->intermediate_size, plan_mlp_unit(&plan->quant), rank,
         plan->tp_size);
    deal(&share.vocab_begin, &share.vocab_local, model->vocab_size, PLAN_VOCAB_UNIT, rank, plan->tp_size);

    // The kv heads that its query heads attend to. Where several ranks need one, each holds a copy.
    int64_t heads_per_kv_head = model->num_heads / model->num_kv_heads;
    share.kv_head_begin = share.head_begin / heads_per_kv_head;
    share.num_kv_heads_local = 0;
    if (share.num_heads_local > 0) {
        int64_t last_head = share.head_begin + share.num_heads_local - 1;
        share.num_kv_heads_local = last_head / heads_per_kv_head + 1 - share.kv_head_begin;
    }
    return share;
}

// ---- tensors -----------------------------------------------------------------------------------------------------

// Elements along the cut dimension: all of them, and the rank's range.
static void cut_range(const struct model_desc *model, const struct rank_share *share, enum cut cut, int64_t *total,
                      int64_t *begin, int64_t *count)
{
    switch (cut) {
    case CUT_HEADS:
        *total = model->num_heads * model->head_dim;
        *begin = share->head_begin * model->head_dim;
        *count = share->num_heads_local * model->head_dim;
        return;
    case CUT_KV_HEADS:
        *total = model->num_kv_heads * model->head_dim;
        *begin = share->kv_head_begin * model->head_dim;
        *count = share->num_kv_heads_local * model->head_dim;
        return;
    case CUT_MLP:
        *total = model->intermediate_size;
        *begin = share->mlp_begin;
        *count = share->intermediate_local;
        return;
    case CUT_VOCAB:
        *total = model->vocab_size;
        *begin = share->vocab_begin;
        *count = share->vocab_local;
        return;
    case CUT_NONE:
        break;
    }
    assert(!"a tensor that is cut says by what");
}

static int64_t replicated_elems(const struct model_desc *model, enum tensor_role role)
{
    switch (role) {
    case ROLE_ROPE_INV_FREQ:
        return model->head_dim / 2;
    case ROLE_Q_NORM:
    case ROLE_K_NORM:
        return model->head_dim;
    default:
        return model->hidden_size;
    }
}

// The rectangle of one source tensor that a rank holds.
static struct shard_part part_of(const struct plan *plan, const struct rank_share *share,
                                 const struct family_tensor *entry, const char *source)
{
    int64_t total, begin, count;
    if (entry->cut == CUT_NONE) {
        total = count = replicated_elems(&plan->model, entry->role);
        begin = 0;
    } else {
        cut_range(&plan->model, share, entry->cut, &total, &begin, &count);
    }
    uint64_t hidden = (uint64_t)plan->model.hidden_size;
    struct shard_part part = {.source = source};
    if (kind_of_role(entry->role, &plan->quant) == WEIGHT_F32) { // a vector
        part.source_rows = part.rows = 1;
        part.source_cols = (uint64_t)total;
        part.col_begin = (uint64_t)begin;
        part.cols = (uint64_t)count;
    } else if (family_split(entry) == SPLIT_OUT) {
        part.source_rows = (uint64_t)total;
        part.row_begin = (uint64_t)begin;
        part.rows = (uint64_t)count;
        part.source_cols = part.cols = hidden;
    } else {
        part.source_rows = part.rows = hidden;
        part.source_cols = (uint64_t)total;
        part.col_begin = (uint64_t)begin;
        part.cols = (uint64_t)count;
    }
    return part;
}

// Fuses the entries of one role into stored tensor `index` on every rank. names [num_entries][NAME_BYTES].
static int add_tensor(struct plan *plan, uint64_t index, const struct family_tensor *entries, int num_entries,
                      int32_t layer, const char *names, struct error *err)
{
    enum weight_kind kind = kind_of_role(entries[0].role, &plan->quant);
    plan->splits[index] = family_split(&entries[0]);
    for (uint32_t rank = 0; rank < plan->tp_size; rank++) {
        struct shard_tensor *tensor = &plan->ranks[rank].tensors[index];
        *tensor = (struct shard_tensor){.role = entries[0].role, .layer = layer};
        uint64_t rows = 0, cols = 0;
        for (int p = 0; p < num_entries; p++) {
            struct shard_part part = part_of(plan, &plan->ranks[rank].share, &entries[p], names + p * NAME_BYTES);
            if (strcmp(entries[p].source, FAMILY_COMPUTED) != 0)
                tensor->parts[tensor->num_parts++] = part;
            rows = kind == WEIGHT_F32 ? 1 : rows + part.rows;
            cols = kind == WEIGHT_F32 ? cols + part.cols : part.cols;
        }
        if (!weight_shape_make(&tensor->shape, kind, kind == WEIGHT_INT4 ? plan->quant.group_size : 0, rows, cols))
            return error_set(err, ERR_MODEL, "%s: %llu x %llu elements are more than a tensor can hold", names,
                             (unsigned long long)rows, (unsigned long long)cols);
    }
    return 0;
}

static bool per_layer(const struct family_tensor *entry) { return strchr(entry->source, '*') != NULL; }

static void source_name(char *out, const char *pattern, int32_t layer)
{
    const char *star = strchr(pattern, '*');
    if (star)
        snprintf(out, NAME_BYTES, "%.*s%d%s", (int)(star - pattern), pattern, layer, star + 1);
    else
        snprintf(out, NAME_BYTES, "%s", pattern);
}

// Adds entries [begin, end), fused by role, for one layer.
static int add_entries(struct plan *plan, const struct family_tensor **entries, int begin, int end, int32_t layer,
                       char **next_name, struct error *err)
{
    for (int e = begin; e < end;) {
        struct family_tensor fused[SHARD_MAX_PARTS];
        char *names = *next_name;
        int count = 0;
        for (; e < end && count < SHARD_MAX_PARTS && entries[e]->role == entries[begin]->role; e++, count++) {
            fused[count] = *entries[e];
            source_name(*next_name, entries[e]->source, layer);
            *next_name += NAME_BYTES;
        }
        int rc = add_tensor(plan, plan->tensor_count++, fused, count, layer, names, err);
        if (rc)
            return rc;
        begin = e;
    }
    return 0;
}

static int add_all(struct plan *plan, const struct family_tensor **entries, int count, struct error *err)
{
    char *next_name = plan->names;
    for (int begin = 0; begin < count;) {
        int end = begin + 1, rc;
        while (end < count && per_layer(entries[end]) == per_layer(entries[begin]))
            end++;
        int32_t layers = per_layer(entries[begin]) ? (int32_t)plan->model.num_layers : 1;
        for (int32_t layer = 0; layer < layers; layer++)
            if ((rc = add_entries(plan, entries, begin, end, per_layer(entries[begin]) ? layer : -1, &next_name, err)))
                return rc;
        begin = end;
    }
    return 0;
}

// ---- the whole ---------------------------------------------------------------------------------------------------

static int allocate(struct plan *plan, uint64_t max_tensors)
{
    plan->ranks = calloc(plan->tp_size, sizeof *plan->ranks);
    plan->splits = calloc(max_tensors, sizeof *plan->splits);
    plan->names = calloc(max_tensors, NAME_BYTES);
    if (!plan->ranks || !plan->splits || !plan->names)
        return -1;
    for (uint32_t rank = 0; rank < plan->tp_size; rank++)
        if (!(plan->ranks[rank].tensors = calloc(max_tensors, sizeof *plan->ranks[rank].tensors)))
            return -1;
    return 0;
}

int plan_make(struct plan **out, const struct model_desc *model, const struct manifest_quant *quant, uint32_t tp_size,
              struct error *err)
{
    int rc;
    const struct family *family = family_find(model->architecture);
    if (!family)
        return error_set(err, ERR_MODEL, "architecture \"%s\" is not supported (known: %s)", model->architecture,
                         family_list());
    if (tp_size < 1 || tp_size > PLAN_MAX_TP)
        return error_set(err, ERR_USAGE, "--tp %u: a model can be cut for 1 to %d ranks", tp_size, PLAN_MAX_TP);

    const struct family_tensor *entries[MAX_FAMILY_TENSORS];
    int count = 0;
    for (const struct family_tensor *entry = family->tensors; entry->source; entry++) {
        assert(count < MAX_FAMILY_TENSORS);
        if (family_tensor_present(entry, model))
            entries[count++] = entry;
    }

    struct plan *plan = calloc(1, sizeof *plan);
    if (!plan)
        return error_set(err, ERR_MEMORY, "out of memory for the plan");
    plan->model = *model;
    plan->quant = *quant;
    plan->tp_size = tp_size;
    if (allocate(plan, (uint64_t)count * (uint64_t)model->num_layers)) {
        rc = error_set(err, ERR_MEMORY, "out of memory for the plan of %u ranks", tp_size);
        goto fail;
    }
    for (uint32_t rank = 0; rank < tp_size; rank++)
        plan->ranks[rank].share = share_of(plan, rank);
    if ((rc = add_all(plan, entries, count, err)))
        goto fail;
    for (uint32_t rank = 0; rank < tp_size; rank++) {
        struct plan_rank *r = &plan->ranks[rank];
        if ((rc = shard_layout(r->tensors, plan->tensor_count, &r->payload_offset, &r->payload_bytes, &r->file_bytes,
                               err)))
            goto fail;
    }
    *out = plan;
    return 0;
fail:
    plan_free(plan);
    return rc;
}

void plan_free(struct plan *plan)
{
    if (!plan)
        return;
    for (uint32_t rank = 0; plan->ranks && rank < plan->tp_size; rank++)
        free(plan->ranks[rank].tensors);
    free(plan->ranks);
    free(plan->splits);
    free(plan->names);
    free(plan);
}

// ---- questions ---------------------------------------------------------------------------------------------------

static bool same_part(const struct shard_part *a, const struct shard_part *b)
{
    return strcmp(a->source, b->source) == 0 && a->source_rows == b->source_rows && a->source_cols == b->source_cols &&
           a->row_begin == b->row_begin && a->rows == b->rows && a->col_begin == b->col_begin && a->cols == b->cols;
}

static bool same_tensor(const struct shard_tensor *a, const struct shard_tensor *b)
{
    if (a->role != b->role || a->layer != b->layer || a->num_parts != b->num_parts || a->shape.kind != b->shape.kind ||
        a->shape.group_size != b->shape.group_size || a->shape.rows != b->shape.rows ||
        a->shape.cols != b->shape.cols || a->data_offset != b->data_offset || a->scale_offset != b->scale_offset)
        return false;
    for (int p = 0; p < a->num_parts; p++)
        if (!same_part(&a->parts[p], &b->parts[p]))
            return false;
    return true;
}

static bool same_share(const struct rank_share *a, const struct rank_share *b)
{
    return a->head_begin == b->head_begin && a->num_heads_local == b->num_heads_local &&
           a->kv_head_begin == b->kv_head_begin && a->num_kv_heads_local == b->num_kv_heads_local &&
           a->mlp_begin == b->mlp_begin && a->intermediate_local == b->intermediate_local &&
           a->vocab_begin == b->vocab_begin && a->vocab_local == b->vocab_local;
}

int plan_compare(const struct plan *plan, uint32_t rank, const struct shard_file *file, const char *name,
                 struct error *err)
{
    const struct plan_rank *planned = &plan->ranks[rank];
    if (!same_share(&planned->share, &shard_file_identity(file)->share))
        return error_set(err, ERR_CORRUPT,
                         "%s: the rank's share of the model is not the one that its description gives", name);
    if (shard_file_tensor_count(file) != plan->tensor_count)
        return error_set(err, ERR_CORRUPT, "%s: holds %llu tensors, its description gives %llu", name,
                         (unsigned long long)shard_file_tensor_count(file), (unsigned long long)plan->tensor_count);
    for (uint64_t i = 0; i < plan->tensor_count; i++) {
        char label[NAME_BYTES];
        plan_tensor_label(label, sizeof label, &planned->tensors[i]);
        if (!same_tensor(&planned->tensors[i], shard_file_tensor(file, i)))
            return error_set(err, ERR_CORRUPT,
                             "%s: tensor %llu (%s) is cut or placed otherwise than its description gives", name,
                             (unsigned long long)i, label);
    }
    return 0;
}

bool plan_empty_shares(const struct plan *plan, char *line, size_t line_bytes)
{
    int no_heads = 0, no_mlp = 0, no_vocab = 0;
    for (uint32_t rank = 0; rank < plan->tp_size; rank++) {
        no_heads += plan->ranks[rank].share.num_heads_local == 0;
        no_mlp += plan->ranks[rank].share.intermediate_local == 0;
        no_vocab += plan->ranks[rank].share.vocab_local == 0;
    }
    if (!no_heads && !no_mlp && !no_vocab)
        return false;
    snprintf(
        line, line_bytes,
        "of %u ranks %d hold no heads, %d no mlp columns, %d no vocabulary: they will idle there; a smaller --tp%s "
        "uses them better",
        plan->tp_size, no_heads, no_mlp, no_vocab,
        plan->quant.linear == WEIGHT_INT4 && plan->quant.group_size > 32 ? " or --group-size" : "");
    return true;
}

uint64_t plan_stored_bytes(const struct plan *plan)
{
    uint64_t bytes = 0;
    for (uint32_t rank = 0; rank < plan->tp_size; rank++)
        for (uint64_t i = 0; i < plan->tensor_count; i++)
            bytes += plan->ranks[rank].tensors[i].shape.data_bytes + plan->ranks[rank].tensors[i].shape.scale_bytes;
    return bytes;
}

void plan_tensor_label(char *buffer, size_t bytes, const struct shard_tensor *tensor)
{
    if (tensor->layer >= 0)
        snprintf(buffer, bytes, "layer %d %s", tensor->layer, tensor_role_name(tensor->role));
    else
        snprintf(buffer, bytes, "%s", tensor_role_name(tensor->role));
}
