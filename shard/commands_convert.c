// tpshard convert: checkpoint -> shard directory. See commands.h.
#include "shard/commands.h"
#include "shard/model_rows.h"
#include "shard/plan.h"
#include "shard/source_files.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct model_options model_options = MODEL_OPTIONS_DEFAULT;
static struct {
    int64_t threads;
    bool zstd, resume, force, dry_run;
} options = {.threads = -1};

const struct option_spec convert_options[] = {
    MODEL_OPTION_SPECS(model_options),
    ZSTD_OPTION_SPEC(&options.zstd),
    THREADS_OPTION_SPEC(&options.threads),
    {"resume", OPTION_FLAG, &options.resume, NULL, 0, 0, "go on with a run that was interrupted"},
    {"force", OPTION_FLAG, &options.force, NULL, 0, 0, "replace the model that is in out_dir"},
    {"dry-run", OPTION_FLAG, &options.dry_run, NULL, 0, 0, "write nothing; show what `tpshard plan` shows"},
    {0},
};

struct conversion {
    struct hf_config config;
    struct plan *plan;
    struct model_rows rows;
    enum experts_mode experts;
    bool keep; // matrices of a quantized checkpoint as they are
    struct extras extras;
    struct source_files files;
    struct source_hasher *hasher;
};

static int make_plan(struct conversion *c, struct error *err)
{
    const struct plan_wish wish = commands_wish(&model_options, c->experts);
    c->keep = plan_wish_keeps(&wish, c->rows.import);
    int rc = commands_check_scales(&model_options, false, err);
    return rc ? rc : plan_of_wish(&c->plan, &c->config.model, &c->rows.config, c->rows.import, &wish, err);
}

static void say_what_is_stored(const struct conversion *c)
{
    const char *first;
    uint64_t mixed;
    if (!c->rows.import)
        return;
    if (!c->keep)
        commands_note("note: the checkpoint's weights (%s) are stored anew, with rounding; --quant keep stores them as "
                      "they are",
                      c->rows.config.name);
    else if ((mixed = import_mixed(c->rows.import, &first)) > 0)
        commands_note("note: %llu matrices are stored in bf16, since what is stored together is quantized in ways that "
                      "have no kind in common (the first begins with %s)",
                      (unsigned long long)mixed, first);
}

// The matrices that are not stored exactly, the worst first.
static void report_losses(const struct conversion *c)
{
    enum { SHOWN = 16 };
    struct import_loss *losses = NULL;
    uint64_t count = c->rows.import ? import_losses(c->rows.import, NULL, 0) : 0;
    if (count == 0)
        return;
    if (!(losses = calloc(count, sizeof *losses))) {
        commands_note("note: %llu matrices differ from the checkpoint's; there is no memory to list their errors",
                      (unsigned long long)count);
        return;
    }
    import_losses(c->rows.import, losses, count);
    commands_note("note: %llu matrices differ from the checkpoint's; error relative to the weights, root mean square:",
                  (unsigned long long)count);
    for (uint64_t i = 0; i < count && i < SHOWN; i++)
        commands_note("  %s %.3g %%", losses[i].source, 100 * losses[i].relative_rmse);
    if (count > SHOWN)
        commands_note("  the others: at most %.3g %%", 100 * losses[SHOWN].relative_rmse);
    free(losses);
}

// Everything that can be refused is refused here, before any heavy work.
static int prepare(struct conversion *c, const char *model_dir, struct error *err)
{
    bool has_tokenizer;
    int rc;
    if ((rc = commands_read_model(&c->config, &c->experts, model_dir, false, &model_options, err)) ||
        (rc = model_rows_open(&c->rows, model_dir, err)) || (rc = make_plan(c, err)) ||
        (rc = model_rows_init(&c->rows, c->plan, &c->config, err)) ||
        (rc = extras_from_model(&c->extras, &has_tokenizer, model_dir, c->config.model.vocab_size, err)) ||
        (rc = source_files_list(&c->files, c->rows.checkpoint, model_dir, err)))
        return rc;
    char line[256];
    if (plan_empty_shares(c->plan, line, sizeof line))
        commands_note("warning: %s", line);
    if (!has_tokenizer)
        commands_note("note: %s has no tokenizer.json; the shards will work with token ids only, not with text",
                      model_dir);
    if (c->extras.warning[0])
        commands_note("warning: %s", c->extras.warning);
    if (c->rows.rounds_to_bf16)
        commands_note("note: the checkpoint's f16 or f32 weights are rounded to bf16");
    say_what_is_stored(c);
    return 0;
}

static int begin_hashing(void *arg, const struct progress *progress, struct error *err)
{
    struct conversion *c = arg;
    return source_hasher_start(&c->hasher, &c->files, progress, err);
}

static void cancel_hashing(void *arg)
{
    struct conversion *c = arg;
    struct error ignored;
    if (c->hasher)
        source_hasher_finish(c->hasher, true, &ignored);
    c->hasher = NULL;
}

static int take_sources(void *arg, struct manifest *manifest, struct error *err)
{
    struct conversion *c = arg;
    int rc = source_hasher_finish(c->hasher, false, err);
    c->hasher = NULL;
    return rc ? rc : source_files_to_manifest(&c->files, manifest, err);
}

static int convert(struct conversion *c, const char *out_dir, struct error *err)
{
    char key[512];
    const struct manifest_quant *quant = &c->plan->quant;
    snprintf(key, sizeof key, "%s convert tp %u experts %s linear %d embedding %d head %d group %u keep %d%s%s",
             build_tool_name(), c->plan->tp_size, experts_mode_name(c->plan->experts), quant->linear, quant->embedding,
             quant->head, quant->group_size, c->keep, options.zstd ? " zstd" : "",
             quant->scales == WEIGHT_SCALES_LARGEST ? " scales max" : "");
    struct build_input input = {
        .plan = c->plan,
        .source = c->rows.source,
        .extras = &c->extras,
        .key = source_files_key(&c->files, key),
        .what = "convert",
        .source_bytes = source_files_bytes(&c->files),
        .sources = take_sources,
        .begin = begin_hashing,
        .fail = cancel_hashing,
        .arg = c,
    };
    struct build_options build_options = {
        .out_dir = out_dir,
        .force = options.force,
        .resume = options.resume,
        .quiet = common.quiet,
        .compress = options.zstd,
        .threads = options.threads > 0 ? (int)options.threads : thread_pool_default_threads(),
    };
    struct build_result result;
    int rc = build_directory(&result, &input, &build_options, err);
    if (!rc)
        report_losses(c);
    return rc ? rc : commands_report_build(&result, c->plan, out_dir, err);
}

int convert_run(int argc, char **argv, struct error *err)
{
    struct conversion conversion = {0};
    int rc;
    if (options.dry_run)
        return plan_report(argv[0], &model_options, err);
    if (argc < 2)
        return error_set(err, ERR_USAGE, "convert needs two arguments: model_dir out_dir");
    if (!(rc = prepare(&conversion, argv[0], err)))
        rc = convert(&conversion, argv[1], err);
    source_files_clear(&conversion.files);
    extras_clear(&conversion.extras);
    model_rows_close(&conversion.rows);
    plan_free(conversion.plan);
    return rc;
}
