// See origin.h.
#include "shard/origin.h"

#include <string.h>

// The description that config.json gives must be the one in the manifest: then so is its part of the contract.
static int check_model(const struct hf_config *config, const char *model_dir, const struct manifest *manifest,
                       struct error *err)
{
    struct manifest derived = *manifest;
    struct checksum128 contract;
    derived.model = config->model;
    int rc = manifest_contract(&derived, &contract, err);
    if (!rc && !checksum128_equal(contract, manifest->contract))
        rc = error_set(err, ERR_CORRUPT,
                       "the model description in the manifest is not the one that %s/config.json and "
                       "generation_config.json give",
                       model_dir);
    return rc;
}

// ---- the plan ----------------------------------------------------------------------------------------------------

static const struct shard_file *any_open(const struct shard_dir *dir)
{
    for (size_t rank = 0; rank < dir->manifest->num_ranks; rank++)
        if (dir->files[rank])
            return dir->files[rank];
    return NULL;
}

static int plan_of_file(struct origin *origin, const struct manifest *manifest, const struct shard_file *file,
                        struct error *err)
{
    struct plan_kinds_of_file of_file;
    plan_kinds_of_file_init(&of_file, file);
    struct plan_options cut = {manifest->quant, manifest->tp_size, manifest->experts, &of_file.kinds, NULL};
    struct import_kinds imported;
    if (origin->rows.import) {
        imported = import_kinds_as(origin->rows.import, &of_file.kinds);
        cut.kinds = &imported.kinds;
    }
    return plan_make(&origin->plan, &origin->config.model, &cut, err);
}

static const char *word_of(enum weight_kind kind) { return kind == WEIGHT_BF16 ? "none" : weight_kind_name(kind); }

static bool same_quant(const struct manifest_quant *a, const struct manifest_quant *b)
{
    return a->linear == b->linear && a->embedding == b->embedding && a->head == b->head &&
           a->group_size == b->group_size && a->scales == b->scales;
}

// No rank file says how matrices are stored: of the ways in which convert may have been asked, the first that gives what the manifest says.
static int plan_of_manifest(struct origin *origin, const struct manifest *manifest, struct error *err)
{
    const char *linear = word_of(manifest->quant.linear), *embed = word_of(manifest->quant.embedding),
               *head = word_of(manifest->quant.head);
    const char *const ways[][3] = {
        {"keep", NULL, NULL}, {"keep", NULL, head}, {"keep", embed, head}, {linear, embed, head}};
    int rc = ERR_CORRUPT;
    for (size_t i = 0; i < sizeof ways / sizeof ways[0]; i++) {
        struct plan_wish wish = {.quant = ways[i][0],
                                 .embed = ways[i][1],
                                 .head = ways[i][2],
                                 .group_size = manifest->quant.group_size,
                                 .scales = manifest->quant.scales,
                                 .tp_size = manifest->tp_size,
                                 .experts = manifest->experts};
        struct plan *plan;
        if (plan_wish_keeps(&wish, origin->rows.import) != (strcmp(ways[i][0], "keep") == 0))
            continue;
        if ((rc = plan_of_wish(&plan, &origin->config.model, &origin->rows.config, origin->rows.import, &wish, err)))
            continue;
        if (same_quant(&plan->quant, &manifest->quant)) {
            origin->plan = plan;
            return 0;
        }
        plan_free(plan);
        rc = error_set(err, ERR_CORRUPT,
                       "no rank file's head is whole, and the checkpoint cannot be stored as the manifest says (%s)",
                       linear);
    }
    return rc;
}

static int make_plan(struct origin *origin, const struct shard_dir *dir, struct error *err)
{
    const struct shard_file *file = any_open(dir);
    int rc = file ? plan_of_file(origin, dir->manifest, file, err) : plan_of_manifest(origin, dir->manifest, err);
    for (uint32_t rank = 0; !rc && rank < origin->plan->tp_size; rank++)
        if (dir->files[rank])
            rc = plan_compare(origin->plan, rank, dir->files[rank], dir->paths[rank], err);
    return rc;
}

int origin_open(struct origin *out, const char *model_dir, const struct shard_dir *dir, struct error *err)
{
    const char *known_as = strstr(dir->manifest->model.architecture, " as "); // "New as Known": what --as said
    int rc;
    *out = (struct origin){0};
    if ((rc = hf_config_read(&out->config, model_dir, known_as ? known_as + strlen(" as ") : NULL, err)) ||
        (rc = check_model(&out->config, model_dir, dir->manifest, err)) ||
        (rc = model_rows_open(&out->rows, model_dir, err)) || (rc = make_plan(out, dir, err)))
        return rc;
    return model_rows_init(&out->rows, out->plan, &out->config, err);
}

void origin_close(struct origin *origin)
{
    model_rows_close(&origin->rows);
    plan_free(origin->plan);
    *origin = (struct origin){0};
}
