// --bits, --kinds and --sensitivity: kinds matrix by matrix, for `convert` and `plan`. See commands.h.
#include "shard/bits_file.h"
#include "shard/bits_measure.h"
#include "shard/commands.h"
#include "shard/model_rows.h"
#include "shard/stop.h"

#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

bool commands_mixes(const struct model_options *options) { return options->bits > 0 || options->kinds; }

static bool has_groups(const char *word)
{
    enum weight_kind kind;
    return word && weight_kind_from_name(word, &kind) && weight_group_chosen(kind);
}

int commands_check_mix(const struct model_options *options, struct error *err)
{
    const char *option = options->bits > 0 ? "--bits" : "--kinds";
    if (options->bits > 0 && options->kinds)
        return error_set(err, ERR_USAGE, "--bits chooses the kinds that --kinds says: use one of them");
    if (commands_mixes(options) && options->quant)
        return error_set(err, ERR_USAGE,
                         "%s stores each matrix of the layers in a kind of its own: it goes without "
                         "--quant %s (the head is stored as --head says)",
                         option, options->quant);
    if (options->sensitivity && !(options->bits > 0))
        return error_set(err, ERR_USAGE, "--sensitivity says where --bits is to spend them: add --bits");
    if (options->among && !(options->bits > 0))
        return error_set(err, ERR_USAGE, "--among says which kinds --bits chooses among: add --bits");
    if (commands_mixes(options) && options->group_size && !has_groups(options->embed) && !has_groups(options->head))
        return error_set(err, ERR_USAGE,
                         "--group-size %s: beside %s it is for embedding and head alone, and neither is said to be "
                         "int4, int4z or nl4%s",
                         options->group_size, option, options->kinds ? "; FILE says groups as \"int4:64\"" : "");
    return 0;
}

// Beside --scales. What is chosen shows it, so that it can be said only now.
static int check_scales(const struct mix *mix, const struct model_options *options, struct error *err)
{
    struct model_options others = *options;
    for (size_t u = 0; u < mix->choice.count; u++)
        if (weight_is_tiled(mix->choice.list[u].kind))
            return 0;
    others.bits = -1;
    others.kinds = NULL;
    return commands_check_scales(&others, false, err);
}

// A plan in which every matrix has a place and none is cut.
static int plan_whole(struct plan **out, const struct hf_config *config, struct model_rows *rows,
                      const struct model_options *options, struct error *err)
{
    const struct plan_wish wish = {.quant = "none", .tp_size = 1, .experts = EXPERTS_TP, .rotate = options->rot};
    return plan_of_wish(out, &config->model, &rows->config, rows->import, &wish, err);
}

static int measure(struct bits *bits, const struct plan *plan, const struct hf_config *config, struct model_rows *rows,
                   const struct model_options *options, int threads, struct error *err)
{
    enum weight_scales scales = WEIGHT_SCALES_SEARCHED;
    struct thread_pool *pool = NULL;
    struct progress progress;
    int rc;
    weight_scales_from_name(options->scales, &scales);
    if ((rc = model_rows_init(rows, plan, config, err)) || (rc = thread_pool_create(&pool, threads, err)))
        return rc;
    stop_install();
    progress_start(&progress, "measure", bits_measure_bytes(plan), common.quiet);
    rc = bits_measure(bits, plan, rows->source, scales, pool, &progress, err);
    progress_end(&progress);
    thread_pool_free(pool);
    return rc;
}

// The kind of most weights, and bits per weight.
static void sum_up(struct mix *mix)
{
    uint64_t weights[WEIGHT_KIND_COUNT] = {0}, bytes = 0;
    for (size_t u = 0; u < mix->bits.num_units; u++) {
        const struct bits_unit *unit = &mix->bits.units[u];
        const struct matrix_kind *entry = &mix->choice.list[u];
        weights[entry->kind] += unit->matrices * unit->rows * unit->cols;
        bytes += bits_unit_bytes(unit, entry->kind, entry->group_size);
        if (weights[entry->kind] > weights[mix->choice.linear])
            mix->choice.linear = entry->kind;
    }
    mix->average = mix->bits.weights ? 8 * (double)bytes / (double)mix->bits.weights : 0;
    if (mix->choice.millibits == 0)
        mix->choice.millibits = (uint32_t)ceil(1000 * mix->average);
}

static int choose(struct mix *mix, const struct model_options *options, struct error *err)
{
    int rc;
    mix->choice.name = options->kinds ? options->kinds : "--bits";
    if (options->kinds) {
        rc = bits_file_kinds(&mix->choice.list, &mix->bits, options->kinds, err);
    } else {
        mix->choice.millibits = (uint32_t)(1000 * options->bits + 0.5);
        if (!(rc = bits_choose(&mix->bits, mix->choice.millibits, err)))
            rc = bits_matrices(&mix->choice.list, &mix->bits, err);
    }
    mix->choice.count = mix->bits.num_units;
    if (!rc)
        sum_up(mix);
    return rc;
}

int commands_make_mix(struct mix *out, const struct hf_config *config, const char *model_dir, bool has_weights,
                      const struct model_options *options, int threads, struct error *err)
{
    struct model_rows rows = {0};
    struct plan *plan = NULL;
    struct mix mix = {0};
    int rc = 0;
    if (!commands_mixes(options))
        return 0;
    if ((has_weights && (rc = model_rows_open(&rows, model_dir, err))) ||
        (rc = plan_whole(&plan, config, &rows, options, err)) || (rc = bits_init(&mix.bits, plan, err)) ||
        (options->bits > 0 && (rc = bits_among(&mix.bits, options->among, err))) ||
        (options->sensitivity && (rc = bits_file_sensitivity(&mix.bits, options->sensitivity, err))) ||
        (has_weights && options->bits > 0 && (rc = measure(&mix.bits, plan, config, &rows, options, threads, err))) ||
        (rc = choose(&mix, options, err)) || (rc = check_scales(&mix, options, err)))
        commands_mix_clear(&mix);
    else
        *out = mix;
    model_rows_close(&rows);
    plan_free(plan);
    return rc;
}

// Of what --kinds says there are no errors.
static json_t *unit_json(const struct mix *mix, size_t u)
{
    const struct bits_unit *unit = &mix->bits.units[u];
    const struct matrix_kind *entry = &mix->choice.list[u];
    char name[MATRIX_WORD_BYTES], kind[MATRIX_WORD_BYTES];
    uint64_t weights = unit->matrices * unit->rows * unit->cols;
    uint64_t bytes = bits_unit_bytes(unit, entry->kind, entry->group_size);
    json_t *errors = json_object();
    for (int c = 0; c < BITS_CANDIDATES; c++) {
        if (mix->bits.left_out[c])
            continue;
        matrix_kind_print(kind, bits_candidates[c].kind, bits_candidates[c].group_size);
        json_object_set_new(errors, kind, json_real(sqrt(unit->error[c])));
    }
    matrix_name_print(name, unit->layer, unit->role);
    matrix_kind_print(kind, entry->kind, entry->group_size);
    return json_pack("{s:s, s:s, s:I, s:f, s:f, s:o}", "matrix", name, "kind", kind, "weights", (json_int_t)weights,
                     "bits", weights ? 8 * (double)bytes / (double)weights : 0.0, "sensitivity", unit->sensitivity,
                     "relative_errors", errors);
}

json_t *commands_mix_json(const struct mix *mix)
{
    json_t *matrices = json_array();
    for (size_t u = 0; u < mix->bits.num_units; u++)
        json_array_append_new(matrices, unit_json(mix, u));
    return json_pack("{s:f, s:f, s:b, s:o}", "bits", mix->average, "at_most", mix->choice.millibits / 1000.0,
                     "measured", (int)mix->bits.measured, "matrices", matrices);
}

void commands_mix_clear(struct mix *mix)
{
    free(mix->choice.list);
    bits_clear(&mix->bits);
    *mix = (struct mix){0};
}
