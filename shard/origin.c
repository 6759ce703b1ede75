// See origin.h.
#include "shard/origin.h"

#include <string.h>

// The description that config.json gives must be the one in the manifest: then so is its part of the contract.
static int check_model(struct origin *origin, const char *model_dir, const struct manifest *manifest, struct error *err)
{
    struct manifest derived = *manifest;
    struct checksum128 contract;
    origin->model = origin->config.model;
    int rc = derived.quant.rotation ? rotate_model(&origin->model, &derived.quant.rotation, err) : 0;
    if (rc)
        return rc;
    derived.model = origin->model;
    rc = manifest_contract(&derived, &contract, err);
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

// Kinds as `kinds` has them; of a quantized checkpoint also the orders of columns.
static int plan_with(struct origin *origin, const struct manifest *manifest, const struct plan_kinds *kinds,
                     struct error *err)
{
    struct plan_options cut = {.quant = manifest->quant,
                               .tp_size = manifest->tp_size,
                               .pp_size = manifest->pp_size,
                               .stage_layers = manifest->stage_layers,
                               .experts = manifest->experts,
                               .kinds = kinds};
    struct import_kinds imported;
    if (origin->rows.import) {
        imported = import_kinds_as(origin->rows.import, kinds);
        cut.kinds = &imported.kinds;
    }
    int rc = plan_make(&origin->plan, &origin->model, &cut, err);
    return rc || !manifest->quant.rotation ? rc : rotate_plan(origin->plan, &origin->config.model, err);
}

static int plan_of_file(struct origin *origin, const struct manifest *manifest, const struct shard_file *file,
                        struct error *err)
{
    struct plan_kinds_of_file of_file;
    plan_kinds_of_file_init(&of_file, file);
    return plan_with(origin, manifest, &of_file.kinds, err);
}

static const char *word_of(enum weight_kind kind) { return kind == WEIGHT_BF16 ? "none" : weight_kind_name(kind); }

static bool same_quant(const struct manifest_quant *a, const struct manifest_quant *b)
{
    return a->linear == b->linear && a->embedding == b->embedding && a->head == b->head &&
           a->group_size == b->group_size && a->scales == b->scales && a->rotation == b->rotation &&
           a->millibits == b->millibits;
}

// A manifest that lists its matrices' kinds says it all.
static int plan_of_matrices(struct origin *origin, const struct manifest *manifest, struct error *err)
{
    struct plan_kinds_of_list listed;
    plan_kinds_of_list_init(&listed, manifest->matrices, manifest->num_matrices, MANIFEST_FILE_NAME, ERR_CORRUPT);
    return plan_with(origin, manifest, &listed.kinds, err);
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
                                 .pp_size = manifest->pp_size,
                                 .stage_layers = manifest->stage_layers,
                                 .experts = manifest->experts,
                                 .rotate = manifest->quant.rotation > 0};
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
    int rc = file                             ? plan_of_file(origin, dir->manifest, file, err)
             : dir->manifest->quant.millibits ? plan_of_matrices(origin, dir->manifest, err)
                                              : plan_of_manifest(origin, dir->manifest, err);
    if (!rc)
        rc = plan_compare_matrices(origin->plan, dir->manifest, MANIFEST_FILE_NAME, err);
    for (uint32_t rank = 0; !rc && rank < origin->plan->num_ranks; rank++)
        if (dir->files[rank])
            rc = plan_compare(origin->plan, rank, dir->files[rank], dir->paths[rank], err);
    return rc;
}

// Rows by the statistics that the manifest names.
static int open_statistics(struct origin *origin, const struct manifest *manifest, const char *path, struct error *err)
{
    const struct manifest_quant *quant = &manifest->quant;
    char wanted[CHECKSUM128_HEX_DIGITS + 1];
    int rc;
    origin->source = origin->rows.source;
    if (quant->calibration == CALIBRATION_NONE)
        return path ? error_set(err, ERR_USAGE, "%s: the directory was not quantized by statistics", path) : 0;
    checksum128_to_hex(quant->statistics, wanted);
    if (!path)
        return error_set(
            err, ERR_USAGE,
            "the weights were quantized by calibration statistics (%s) and cannot be made from the checkpoint "
            "alone: tpshard verify takes them as --calib-stats FILE; repair works from another copy of the "
            "directory",
            wanted);
    if ((rc = calibration_file_open(&origin->statistics, path, err)))
        return rc;
    if (!checksum128_equal(calibration_file_hash(origin->statistics), quant->statistics))
        return error_set(err, ERR_USAGE, "%s: these are not the statistics that the weights were quantized by (%s)",
                         path, wanted);
    if ((rc = calibrate_source_init(&origin->calibrated, origin->rows.source, origin->plan, origin->statistics,
                                    quant->calibration, err)))
        return rc;
    origin->source = &origin->calibrated.source;
    return 0;
}

int origin_open(struct origin *out, const char *model_dir, const struct shard_dir *dir, const char *statistics_path,
                struct error *err)
{
    const char *known_as = strstr(dir->manifest->model.architecture, " as "); // "New as Known": what --as said
    int rc;
    *out = (struct origin){0};
    if ((rc = hf_config_read(&out->config, model_dir, known_as ? known_as + strlen(" as ") : NULL, err)) ||
        (rc = check_model(out, model_dir, dir->manifest, err)) || (rc = model_rows_open(&out->rows, model_dir, err)) ||
        (rc = make_plan(out, dir, err)))
        return rc;
    rc = model_rows_init(&out->rows, out->plan, &out->config, err);
    return rc ? rc : open_statistics(out, dir->manifest, statistics_path, err);
}

void origin_close(struct origin *origin)
{
    calibrate_source_clear(&origin->calibrated);
    calibration_file_close(origin->statistics);
    model_rows_close(&origin->rows);
    plan_free(origin->plan);
    *origin = (struct origin){0};
}
