// See import_plan.h.
#include "shard/import_plan.h"

#include "shard/rotate.h"

#include <string.h>

static int parts_of(struct import_part *out, const struct shard_tensor *tensor)
{
    for (int p = 0; p < tensor->num_parts; p++)
        out[p] =
            (struct import_part){tensor->parts[p].source, tensor->parts[p].source_rows, tensor->parts[p].source_cols};
    return tensor->num_parts;
}

static int kind_of(const struct plan_kinds *base, struct plan_kind *out, const struct shard_tensor *tensor,
                   const struct plan_source *sources, struct error *err)
{
    const struct import_kinds *kinds = (const struct import_kinds *)base;
    struct import_part parts[SHARD_MAX_PARTS];
    int rc, num_parts = parts_of(parts, tensor);
    bool keep = kinds->keep && (tensor->role != ROLE_EMBEDDING || kinds->keep_embedding) &&
                (tensor->role != ROLE_HEAD || kinds->keep_head);
    if (!keep && kinds->base && (rc = kinds->base->of(kinds->base, out, tensor, sources, err)))
        return rc;
    rc = keep ? import_choose(kinds->import, tensor->role, parts, num_parts, &out->kind, &out->group_size, err)
              : import_settle(kinds->import, tensor->role, parts, num_parts, err);
    if (!rc && num_parts > 0)
        out->order = import_has_order(kinds->import, tensor->role, parts[0].source);
    return rc;
}

struct import_kinds import_kinds_keep(struct import *import, const char *embed, const char *head)
{
    return (struct import_kinds){
        .kinds = {kind_of}, .import = import, .keep = true, .keep_embedding = !embed, .keep_head = !head};
}

struct import_kinds import_kinds_as(struct import *import, const struct plan_kinds *base)
{
    return (struct import_kinds){.kinds = {kind_of}, .import = import, .base = base};
}

int import_quant(struct manifest_quant *out, const struct import_config *config, const char *embed, const char *head,
                 int64_t group_size, bool tied_embeddings, struct error *err)
{
    uint32_t own_group;
    int rc = plan_quant(out, "none", embed, head, group_size, tied_embeddings, err);
    if (rc || config->num_schemes == 0)
        return rc;
    if (!import_kind_of_form(&config->schemes[0].form, WEIGHT_MAX_DIM, &out->linear, &own_group)) {
        out->linear = WEIGHT_BF16;
        return 0;
    }
    if (out->linear == WEIGHT_INT4 || out->linear == WEIGHT_INT4Z)
        out->group_size = own_group;
    return 0;
}

bool plan_wish_keeps(const struct plan_wish *wish, const struct import *import)
{
    return import && strcmp(wish->quant, "keep") == 0 && !(wish->mix && wish->mix->list);
}

// The description to plan with.
static int rotated_model(struct model_desc *out, uint32_t *block, const struct model_desc *model,
                         const struct import_config *config, const struct plan_wish *wish, bool keep, struct error *err)
{
    *out = *model;
    if (!wish->rotate)
        return 0;
    if (keep)
        return error_set(err, ERR_USAGE,
                         "--rot changes the weights: what the checkpoint holds quantized (%s) cannot be kept as it is. "
                         "Say --quant int4 or another kind to store it anew, or leave --rot out",
                         config->name);
    return rotate_model(out, block, err);
}

int plan_of_wish(struct plan **out, const struct model_desc *model, const struct import_config *config,
                 struct import *import, const struct plan_wish *wish, struct error *err)
{
    struct plan_options cut = {.tp_size = wish->tp_size,
                               .pp_size = wish->pp_size,
                               .stage_layers = wish->stage_layers,
                               .experts = wish->experts};
    const struct plan_mix *mix = wish->mix && wish->mix->list ? wish->mix : NULL;
    const char *quant = strcmp(wish->quant, "keep") == 0 ? "none" : wish->quant;
    bool keep = plan_wish_keeps(wish, import);
    struct model_desc planned;
    struct plan_kinds_of_list mixed;
    struct import_kinds kinds;
    struct plan *plan;
    int rc;
    if (mix) {
        quant = mix->linear == WEIGHT_BF16 ? "none" : weight_kind_name(mix->linear);
        plan_kinds_of_list_init(&mixed, mix->list, mix->count, mix->name, ERR_USAGE);
        cut.kinds = &mixed.kinds;
    }
    if ((rc = rotated_model(&planned, &cut.quant.rotation, model, config, wish, keep, err)))
        return rc;
    bool tied = planned.tied_embeddings;
    rc = keep ? import_quant(&cut.quant, config, wish->embed, wish->head, wish->group_size, tied, err)
              : plan_quant(&cut.quant, quant, wish->embed, wish->head, wish->group_size, tied, err);
    if (rc)
        return rc;
    if (model->tied_embeddings && !tied && !wish->embed) // as if it were still the head
        cut.quant.embedding = cut.quant.head;
    cut.quant.millibits = mix ? mix->millibits : 0;
    if (mix || weight_is_tiled(cut.quant.linear) || weight_is_tiled(cut.quant.embedding) ||
        weight_is_tiled(cut.quant.head))
        cut.quant.scales = wish->scales;
    if (import) {
        kinds = keep ? import_kinds_keep(import, wish->embed, wish->head) : import_kinds_as(import, cut.kinds);
        cut.kinds = &kinds.kinds;
    }
    if ((rc = plan_make(&plan, &planned, &cut, err)))
        return rc;
    if (wish->rotate && (rc = rotate_plan(plan, model, err)))
        plan_free(plan);
    else
        *out = plan;
    return rc;
}
