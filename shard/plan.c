// See plan.h. The rules that decide who owns what stand in share_of; the rest follows from the family's table.
#include "shard/plan.h"

#include "shard/plan_tensors.h"
#include "shard/stages.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { NAME_BYTES = 128 };

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
    out->linear = kind_of(quant);
    const char *default_head = weight_is_tiled(out->linear) ? "int8" : quant;
    if (tied_embeddings && embed && head && strcmp(embed, head) != 0)
        return error_set(err, ERR_USAGE,
                         "the model's embedding is also its head, one stored tensor: --embed %s and --head %s must "
                         "agree",
                         embed, head);
    if (tied_embeddings && !head)
        head = embed;
    out->head = kind_of(head ? head : default_head);
    out->embedding = tied_embeddings ? out->head : kind_of(embed ? embed : "none");
    bool groups =
        weight_group_chosen(out->linear) || weight_group_chosen(out->head) || weight_group_chosen(out->embedding);
    out->group_size = groups ? (uint32_t)group_size : 0;
    return 0;
}

// Names part p, "model.layers.3.mlp.experts.7.w1.weight" or "...gate_up_proj[7]", in the memory behind *next_name.
static const char *name_part(struct plan_source *source, const char *prefix, const struct planned *tensor, int p,
                             char **next_name)
{
    const char *pattern = tensor->entries[p]->source;
    const char *first = strchr(pattern, '*'), *second = first ? strchr(first + 1, '*') : NULL;
    bool stacked = second && second[-1] == '[';
    char *name = *next_name;
    *next_name += NAME_BYTES;
    if (!first)
        snprintf(name, NAME_BYTES, "%s%s", prefix, pattern);
    else if (!second)
        snprintf(name, NAME_BYTES, "%s%.*s%d%s", prefix, (int)(first - pattern), pattern, tensor->layer, first + 1);
    else
        snprintf(name, NAME_BYTES, "%s%.*s%d%.*s%d%s", prefix, (int)(first - pattern), pattern, tensor->layer,
                 (int)(second - first - 1), first + 1, tensor->expert, second + 1);
    *source = (struct plan_source){name, stacked ? tensor->expert : -1, tensor->entries[p]->form};
    if (stacked) { // the name of the stack itself
        size_t length = strcspn(name, "[");
        source->tensor = memcpy(*next_name, name, length);
        (*next_name)[length] = 0;
        *next_name += NAME_BYTES;
    }
    return name;
}

static int kind_of_file(const struct plan_kinds *kinds, struct plan_kind *out, const struct shard_tensor *tensor,
                        const struct plan_source *sources, struct error *err)
{
    (void)sources;
    const struct shard_file *file = ((const struct plan_kinds_of_file *)kinds)->file;
    const struct shard_tensor *stored = shard_file_find(file, tensor->role, tensor->layer, tensor->expert);
    if (!stored) {
        char label[NAME_BYTES];
        plan_tensor_label(label, sizeof label, tensor);
        return error_set(err, ERR_CORRUPT, "a rank file holds no %s, which its description calls for", label);
    }
    out->kind = stored->shape.kind;
    out->group_size = stored->shape.group_size;
    enum tensor_role order = tensor->role == ROLE_QKV ? ROLE_QKV_ORDER : ROLE_GATE_UP_ORDER;
    out->order = (tensor->role == ROLE_QKV || tensor->role == ROLE_GATE_UP) &&
                 shard_file_find(file, order, tensor->layer, -1) != NULL;
    return 0;
}

void plan_kinds_of_file_init(struct plan_kinds_of_file *out, const struct shard_file *file)
{
    *out = (struct plan_kinds_of_file){.kinds = {kind_of_file}, .file = file};
}

static int kind_of_list(const struct plan_kinds *kinds, struct plan_kind *out, const struct shard_tensor *tensor,
                        const struct plan_source *sources, struct error *err)
{
    (void)sources;
    const struct plan_kinds_of_list *of = (const struct plan_kinds_of_list *)kinds;
    if (!tensor_role_is_linear(tensor->role))
        return 0;
    const struct matrix_kind *found = matrix_kinds_find(of->list, of->count, tensor->layer, tensor->role);
    if (!found) {
        char word[MATRIX_WORD_BYTES];
        matrix_name_print(word, tensor->layer, tensor->role);
        return error_set(err, of->bad_code, "%s: no kind is said for %s, a matrix that the model has", of->name, word);
    }
    *out = (struct plan_kind){found->kind, found->group_size, false};
    return 0;
}

void plan_kinds_of_list_init(struct plan_kinds_of_list *out, const struct matrix_kind *list, size_t count,
                             const char *name, int bad_code)
{
    *out = (struct plan_kinds_of_list){{kind_of_list}, list, count, name, bad_code};
}

// Asks for the kind of every matrix that has a choice. Its name and whole shape come from the share of all there is.
static int ask_kinds(struct plan *plan, struct planned_list *list, const struct plan_kinds *kinds, struct error *err)
{
    const struct rank_share nothing = {0};
    int rc;
    for (uint64_t i = 0; kinds && i < list->count; i++) {
        struct planned *planned = &list->tensors[i];
        if (!planned_any_kind(planned->role))
            continue;
        struct shard_tensor tensor = {.role = planned->role, .layer = planned->layer, .expert = planned->expert};
        struct plan_source sources[SHARD_MAX_PARTS];
        char names[2 * SHARD_MAX_PARTS][NAME_BYTES], *next_name = names[0];
        for (int p = 0; p < planned->num_entries; p++) {
            tensor.parts[p] = planned_part(planned, p, &plan->model, plan->experts, &nothing);
            tensor.parts[p].source = name_part(&sources[p], plan->prefix, planned, p, &next_name);
            tensor.num_parts++;
        }
        if ((rc = kinds->of(kinds, &planned->kind, &tensor, sources, err)) ||
            (planned->kind.order && (rc = planned_list_add_order(list, i, err))))
            return rc;
    }
    return 0;
}

// ---- shares ------------------------------------------------------------------------------------------------------

static int64_t min_i64(int64_t a, int64_t b) { return a < b ? a : b; }

// The groups of the matrices behind what is cut are powers of two: the largest one holds whole groups of all.
static struct plan_units units_of(const struct model_desc *model, const struct planned_list *list)
{
    struct plan_units units = {1, 1, 1, 1};
    int64_t o_group = 1, head_values = model->latent.kv_rank ? model->latent.v_dim : model->head_dim;
    for (uint64_t i = 0; i < list->count; i++) {
        const struct planned *tensor = &list->tensors[i];
        int64_t *unit = tensor->role == ROLE_O             ? &o_group
                        : tensor->role == ROLE_DOWN        ? &units.mlp
                        : tensor->role == ROLE_EXPERT_DOWN ? &units.expert
                        : tensor->role == ROLE_SHARED_DOWN ? &units.shared
                                                           : NULL;
        if (unit && tensor->kind.group_size > *unit)
            *unit = tensor->kind.group_size;
    }
    // Columns that the engine rotates together stay together: a power of two as well.
    int64_t *const rotated[] = {&units.mlp, &units.expert, &units.shared};
    for (size_t i = 0; i < sizeof rotated / sizeof *rotated; i++)
        if (model->mlp_rotation > *rotated[i])
            *rotated[i] = model->mlp_rotation;
    while (units.heads * head_values % o_group != 0)
        units.heads++;
    return units;
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
    const struct experts_desc *experts = &model->experts;
    const struct plan_units *units = &plan->units;
    uint32_t tp = plan->tp_size;
    struct rank_share share = {0};
    deal(&share.head_begin, &share.num_heads_local, model->num_heads, units->heads, rank, tp);
    deal(&share.mlp_begin, &share.intermediate_local, model->intermediate_size, units->mlp, rank, tp);
    deal(&share.vocab_begin, &share.vocab_local, model->vocab_size, PLAN_VOCAB_UNIT, rank, tp);
    deal(&share.shared_begin, &share.shared_size_local, experts->shared_size, units->shared, rank, tp);
    share.num_experts_local = experts->num_experts;
    share.expert_size_local = experts->expert_size;
    if (plan->experts == EXPERTS_EP)
        deal(&share.expert_begin, &share.num_experts_local, experts->num_experts, 1, rank, tp);
    else
        deal(&share.expert_mlp_begin, &share.expert_size_local, experts->expert_size, units->expert, rank, tp);

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

// Whether a stage of the plan holds tensors of this role and layer (-1: none). The head of the last stage may be the embedding.
static bool stage_holds(const struct plan *plan, uint32_t stage, enum tensor_role role, int32_t layer)
{
    bool first = stage == 0, last = stage + 1 == plan->pp_size;
    int64_t begin, count;
    if (layer >= 0) {
        manifest_stage(plan->stage_layers, stage, &begin, &count);
        return layer >= begin && layer < begin + count;
    }
    switch (role) {
    case ROLE_EMBEDDING:
        return first || (last && plan->model.tied_embeddings);
    case ROLE_FINAL_NORM:
    case ROLE_HEAD:
        return last;
    default:
        return true;
    }
}

bool plan_rank_holds(const struct plan *plan, uint32_t rank, uint64_t tensor)
{
    const struct shard_tensor *of = &plan->ranks[rank].tensors[tensor];
    return stage_holds(plan, rank / plan->tp_size, of->role, of->layer);
}

void plan_rank_model(struct model_desc *out, const struct plan *plan, uint32_t rank)
{
    int64_t begin, count;
    manifest_stage(plan->stage_layers, rank / plan->tp_size, &begin, &count);
    manifest_stage_model(out, &plan->model, begin, count);
}

// A rank's slice of a tensor, parts without their names. holds: its stage has the tensor.
static int slice_tensor(struct shard_tensor *tensor, const struct plan *plan, const struct planned *planned,
                        const struct rank_share *share, bool holds, struct error *err)
{
    bool vector = planned->kind.kind == WEIGHT_F32;
    uint64_t rows = 0, cols = 0;
    *tensor = (struct shard_tensor){.role = planned->role, .layer = planned->layer, .expert = planned->expert};
    for (int p = 0; p < planned->num_entries; p++) {
        struct shard_part part = planned_part(planned, p, &plan->model, plan->experts, share);
        if (!holds && vector)
            part.col_begin = part.cols = 0;
        else if (!holds)
            part.row_begin = part.rows = 0;
        rows = vector ? 1 : rows + part.rows;
        cols = vector ? cols + part.cols : part.cols;
        if (strcmp(planned->entries[p]->source, FAMILY_COMPUTED) != 0)
            tensor->parts[tensor->num_parts++] = part;
    }
    if (weight_shape_make(&tensor->shape, planned->kind.kind, planned->kind.group_size, rows, cols))
        return 0;
    char label[NAME_BYTES];
    plan_tensor_label(label, sizeof label, tensor);
    return error_set(err, ERR_MODEL, "%s: %llu x %llu elements as %s are more than a tensor can hold", label,
                     (unsigned long long)rows, (unsigned long long)cols, weight_kind_name(planned->kind.kind));
}

// Fills stored tensor `index` on every rank, and where its parts come from. Names are taken from *next_name.
static int add_tensor(struct plan *plan, uint64_t index, const struct planned *planned, char **next_name,
                      struct error *err)
{
    const char *names[SHARD_MAX_PARTS];
    int num_parts = 0;
    plan->splits[index] = planned_split(planned, plan->experts);
    for (int p = 0; p < planned->num_entries; p++)
        if (strcmp(planned->entries[p]->source, FAMILY_COMPUTED) != 0) {
            names[num_parts] = name_part(&plan->sources[index][p], plan->prefix, planned, p, next_name);
            num_parts++;
        }
    for (uint32_t rank = 0; rank < plan->num_ranks; rank++) {
        struct shard_tensor *tensor = &plan->ranks[rank].tensors[index];
        bool holds = stage_holds(plan, rank / plan->tp_size, planned->role, planned->layer);
        int rc = slice_tensor(tensor, plan, planned, &plan->ranks[rank].share, holds, err);
        if (rc)
            return rc;
        for (int p = 0; p < num_parts; p++)
            tensor->parts[p].source = names[p];
    }
    return 0;
}

// ---- stages ------------------------------------------------------------------------------------------------------

// What each layer takes on all ranks of a stage together, and what lies outside of the layers.
static int weigh_layers(struct plan *plan, const struct planned_list *list, uint64_t *layer_bytes,
                        uint64_t *first_bytes, uint64_t *last_bytes, struct error *err)
{
    for (uint64_t i = 0; i < list->count; i++) {
        const struct planned *planned = &list->tensors[i];
        uint64_t bytes = 0;
        for (uint32_t rank = 0; rank < plan->tp_size; rank++) {
            struct shard_tensor tensor;
            int rc = slice_tensor(&tensor, plan, planned, &plan->ranks[rank].share, true, err);
            if (rc)
                return rc;
            bytes += tensor.shape.data_bytes + tensor.shape.scale_bytes;
        }
        if (planned->layer >= 0) {
            layer_bytes[planned->layer] += bytes;
            continue;
        }
        *first_bytes += stage_holds(plan, 0, planned->role, -1) ? bytes : 0;
        *last_bytes += stage_holds(plan, plan->pp_size - 1, planned->role, -1) ? bytes : 0;
    }
    return 0;
}

// Decides which layers each stage holds.
static int cut_stages(struct plan *plan, const struct planned_list *list, const uint16_t *wanted, struct error *err)
{
    uint64_t layer_bytes[MODEL_MAX_LAYERS] = {0}, first_bytes = 0, last_bytes = 0;
    plan->stage_layers[0] = (uint16_t)plan->model.num_layers;
    if (plan->pp_size == 1)
        return 0;
    if (wanted) {
        memcpy(plan->stage_layers, wanted, plan->pp_size * sizeof *wanted);
        return 0;
    }
    int rc = weigh_layers(plan, list, layer_bytes, &first_bytes, &last_bytes, err);
    return rc ? rc
              : stages_balance(plan->stage_layers, plan->pp_size, layer_bytes, plan->model.num_layers, first_bytes,
                               last_bytes, err);
}

// ---- the whole ---------------------------------------------------------------------------------------------------

static int allocate(struct plan *plan, const struct planned_list *list)
{
    uint64_t names = 1;
    for (uint64_t i = 0; i < list->count; i++)
        names += 2 * (uint64_t)list->tensors[i].num_entries;
    plan->tensor_count = list->count;
    plan->ranks = calloc(plan->num_ranks, sizeof *plan->ranks);
    plan->splits = calloc(list->count, sizeof *plan->splits);
    plan->sources = calloc(list->count, sizeof *plan->sources);
    plan->names = calloc(names, NAME_BYTES);
    if (!plan->ranks || !plan->splits || !plan->sources || !plan->names)
        return -1;
    for (uint32_t rank = 0; rank < plan->num_ranks; rank++)
        if (!(plan->ranks[rank].tensors = calloc(list->count, sizeof *plan->ranks[rank].tensors)))
            return -1;
    return 0;
}

static int fill(struct plan *plan, const struct planned_list *list, struct error *err)
{
    char *next_name = plan->names;
    int rc;
    for (uint64_t i = 0; i < list->count; i++)
        if ((rc = add_tensor(plan, i, &list->tensors[i], &next_name, err)))
            return rc;
    for (uint32_t rank = 0; rank < plan->num_ranks; rank++) {
        struct plan_rank *r = &plan->ranks[rank];
        if ((rc = shard_layout(r->tensors, plan->tensor_count, &r->payload_offset, &r->payload_bytes, &r->file_bytes,
                               err)))
            return rc;
    }
    return 0;
}

static int check_ranks(uint32_t tp_size, uint32_t pp_size, const struct model_desc *model, struct error *err)
{
    if (tp_size < 1 || tp_size > PLAN_MAX_TP)
        return error_set(err, ERR_USAGE, "--tp %u: a model can be cut for 1 to %d ranks", tp_size, PLAN_MAX_TP);
    if (pp_size > PLAN_MAX_PP || tp_size * pp_size > PLAN_MAX_RANKS)
        return error_set(err, ERR_USAGE, "--tp %u --pp %u: a model can be cut for %d ranks in all, not for %u", tp_size,
                         pp_size, PLAN_MAX_RANKS, tp_size * pp_size);
    if (pp_size > model->num_layers)
        return error_set(err, ERR_USAGE, "--pp %u: the model has %lld layers, and each stage needs one", pp_size,
                         (long long)model->num_layers);
    return 0;
}

int plan_make(struct plan **out, const struct model_desc *model, const struct plan_options *options, struct error *err)
{
    int rc;
    const struct family *family = family_find(model->architecture);
    if (!family)
        return error_set(err, ERR_MODEL, "architecture \"%s\" is not supported (known: %s)", model->architecture,
                         family_list());
    uint32_t pp_size = options->pp_size ? options->pp_size : 1;
    if ((rc = check_ranks(options->tp_size, pp_size, model, err)))
        return rc;

    struct planned_list list = {0};
    struct plan *plan = calloc(1, sizeof *plan);
    if (!plan)
        return error_set(err, ERR_MEMORY, "out of memory for the plan");
    plan->model = *model;
    plan->quant = options->quant;
    plan->experts = model->experts.num_experts > 0 ? options->experts : EXPERTS_TP;
    plan->tp_size = options->tp_size;
    plan->pp_size = pp_size;
    plan->num_ranks = options->tp_size * pp_size;
    plan->prefix = family->prefix ? family->prefix : "";
    if ((rc = planned_list_make(&list, model, options->tensors ? options->tensors : family->tensors, &plan->quant,
                                err)) ||
        (rc = ask_kinds(plan, &list, options->kinds, err)))
        goto done;
    if (allocate(plan, &list)) {
        rc = error_set(err, ERR_MEMORY, "out of memory for the plan of %u ranks", plan->num_ranks);
        goto done;
    }
    plan->units = units_of(model, &list);
    for (uint32_t rank = 0; rank < plan->num_ranks; rank++)
        plan->ranks[rank].share = share_of(plan, rank % plan->tp_size);
    if (!(rc = cut_stages(plan, &list, options->stage_layers, err)))
        rc = fill(plan, &list, err);
done:
    free(list.tensors);
    if (rc)
        plan_free(plan);
    else
        *out = plan;
    return rc;
}

void plan_free(struct plan *plan)
{
    if (!plan)
        return;
    for (uint32_t rank = 0; plan->ranks && rank < plan->num_ranks; rank++)
        free(plan->ranks[rank].tensors);
    free(plan->ranks);
    free(plan->splits);
    free(plan->sources);
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
    if (a->role != b->role || a->layer != b->layer || a->expert != b->expert || a->num_parts != b->num_parts ||
        a->shape.kind != b->shape.kind || a->shape.group_size != b->shape.group_size ||
        a->shape.rows != b->shape.rows || a->shape.cols != b->shape.cols || a->data_offset != b->data_offset ||
        a->scale_offset != b->scale_offset)
        return false;
    for (int p = 0; p < a->num_parts; p++)
        if (!same_part(&a->parts[p], &b->parts[p]))
            return false;
    return true;
}

int plan_compare(const struct plan *plan, uint32_t rank, const struct shard_file *file, const char *name,
                 struct error *err)
{
    const struct plan_rank *planned = &plan->ranks[rank];
    if (memcmp(&planned->share, &shard_file_identity(file)->share, sizeof planned->share) != 0)
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

// Of the experts of a layer the first stands for all.
int plan_matrices(struct matrix_kind **out, size_t *count, const struct plan *plan, struct error *err)
{
    struct matrix_kind *list = calloc(plan->tensor_count + 1, sizeof *list);
    if (!list)
        return error_set(err, ERR_MEMORY, "out of memory for a list of matrices");
    *count = 0;
    for (uint64_t i = 0; i < plan->tensor_count; i++) {
        const struct shard_tensor *tensor = &plan->ranks[0].tensors[i];
        if (tensor_role_is_linear(tensor->role) && tensor->expert <= 0)
            list[(*count)++] =
                (struct matrix_kind){tensor->layer, tensor->role, tensor->shape.kind, tensor->shape.group_size};
    }
    matrix_kinds_sort(list, *count);
    *out = list;
    return 0;
}

int plan_compare_matrices(const struct plan *plan, const struct manifest *manifest, const char *name, struct error *err)
{
    struct matrix_kind *planned;
    size_t count;
    if (!manifest->quant.millibits)
        return 0;
    int rc = plan_matrices(&planned, &count, plan, err);
    if (rc)
        return rc;
    for (size_t i = 0; !rc && (i < count || i < manifest->num_matrices); i++) {
        const struct matrix_kind *a = i < count ? &planned[i] : NULL;
        const struct matrix_kind *b = i < manifest->num_matrices ? &manifest->matrices[i] : NULL;
        if (a && b && a->layer == b->layer && a->role == b->role && a->kind == b->kind &&
            a->group_size == b->group_size)
            continue;
        char word[MATRIX_WORD_BYTES];
        matrix_name_print(word, a ? a->layer : b->layer, a ? a->role : b->role);
        rc = error_set(err, ERR_CORRUPT,
                       "%s: quant.matrices is not what the rank files hold, first at %s: the manifest was edited or is "
                       "another run's",
                       name, word);
    }
    free(planned);
    return rc;
}

bool plan_empty_shares(const struct plan *plan, char *line, size_t line_bytes)
{
    const struct model_desc *model = &plan->model;
    const struct experts_desc *experts = &model->experts;
    int no_heads = 0, no_mlp = 0, no_vocab = 0, no_experts = 0;
    for (uint32_t rank = 0; rank < plan->tp_size; rank++) {
        const struct rank_share *share = &plan->ranks[rank].share;
        no_heads += share->num_heads_local == 0;
        no_mlp += model->intermediate_size > 0 && share->intermediate_local == 0;
        no_vocab += share->vocab_local == 0;
        no_experts += experts->num_experts > 0 && (share->num_experts_local == 0 || share->expert_size_local == 0);
    }
    if (!no_heads && !no_mlp && !no_vocab && !no_experts)
        return false;
    char of_experts[48] = "";
    if (experts->num_experts > 0)
        snprintf(of_experts, sizeof of_experts, ", %d no part of the experts", no_experts);
    snprintf(line, line_bytes,
             "of %u ranks %d hold no heads, %d no mlp columns, %d no vocabulary%s: they will idle there; a smaller "
             "--tp%s uses them better",
             plan->tp_size, no_heads, no_mlp, no_vocab, of_experts,
             weight_group_chosen(plan->quant.linear) && plan->quant.group_size > 32 ? " or --group-size" : "");
    return true;
}

uint64_t plan_stored_bytes(const struct plan *plan)
{
    uint64_t bytes = 0;
    for (uint32_t rank = 0; rank < plan->num_ranks; rank++)
        for (uint64_t i = 0; i < plan->tensor_count; i++)
            bytes += plan->ranks[rank].tensors[i].shape.data_bytes + plan->ranks[rank].tensors[i].shape.scale_bytes;
    return bytes;
}

void plan_tensor_label(char *buffer, size_t bytes, const struct shard_tensor *tensor)
{
    if (tensor->expert >= 0)
        snprintf(buffer, bytes, "layer %d %s %d", tensor->layer, tensor_role_name(tensor->role), tensor->expert);
    else if (tensor->layer >= 0)
        snprintf(buffer, bytes, "layer %d %s", tensor->layer, tensor_role_name(tensor->role));
    else
        snprintf(buffer, bytes, "%s", tensor_role_name(tensor->role));
}
