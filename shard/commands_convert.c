// tpshard convert: checkpoint -> shard directory. See commands.h.
#include "shard/checkpoint_source.h"
#include "shard/commands.h"
#include "shard/hf_config.h"
#include "shard/plan.h"
#include "shard/source_files.h"

#include <stdio.h>
#include <stdlib.h>

static struct {
    int64_t threads;
    bool resume, force, dry_run;
} options = {.threads = -1};

const struct option_spec convert_options[] = {
    MODEL_OPTION_SPECS,
    THREADS_OPTION_SPEC(&options.threads),
    {"resume", OPTION_FLAG, &options.resume, NULL, 0, 0, "go on with a run that was interrupted"},
    {"force", OPTION_FLAG, &options.force, NULL, 0, 0, "replace the model that is in out_dir"},
    {"dry-run", OPTION_FLAG, &options.dry_run, NULL, 0, 0, "write nothing; show what `tpshard plan` shows"},
    {0},
};

struct conversion {
    struct checkpoint *checkpoint;
    struct hf_config config;
    struct plan *plan;
    struct checkpoint_source source;
    struct extras extras;
    struct source_files files;
    struct source_hasher *hasher;
};

// Everything that can be refused is refused here, before any heavy work.
static int prepare(struct conversion *c, const char *model_dir, struct error *err)
{
    struct manifest_quant quant;
    bool has_tokenizer;
    int rc;
    if ((rc = hf_config_read(&c->config, model_dir, err)) ||
        (rc = plan_quant(&quant, model_options.quant, model_options.embed, model_options.head,
                         atoi(model_options.group_size), c->config.model.tied_embeddings, err)) ||
        (rc = plan_make(&c->plan, &c->config.model, &quant, (uint32_t)model_options.tp, err)) ||
        (rc = checkpoint_open(&c->checkpoint, model_dir, err)) ||
        (rc = checkpoint_source_init(&c->source, c->checkpoint, c->plan, &c->config.rope, err)) ||
        (rc = extras_from_model(&c->extras, &has_tokenizer, model_dir, c->config.model.vocab_size, err)) ||
        (rc = source_files_list(&c->files, c->checkpoint, model_dir, err)))
        return rc;
    char line[256];
    if (plan_empty_shares(c->plan, line, sizeof line))
        commands_note("warning: %s", line);
    if (!has_tokenizer)
        commands_note("note: %s has no tokenizer.json; the shards will work with token ids only, not with text",
                      model_dir);
    if (c->source.rounds_to_bf16)
        commands_note("note: the checkpoint's f16 or f32 weights are rounded to bf16");
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
    snprintf(key, sizeof key, "%s convert tp %u linear %d embedding %d head %d group %u", build_tool_name(),
             c->plan->tp_size, quant->linear, quant->embedding, quant->head, quant->group_size);
    struct build_input input = {
        .plan = c->plan,
        .source = &c->source.source,
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
        .threads = options.threads > 0 ? (int)options.threads : thread_pool_default_threads(),
    };
    struct build_result result;
    int rc = build_directory(&result, &input, &build_options, err);
    return rc ? rc : commands_report_build(&result, c->plan, out_dir, err);
}

int convert_run(int argc, char **argv, struct error *err)
{
    struct conversion conversion = {0};
    int rc;
    if (options.dry_run)
        return plan_report(argv[0], 0, 0, err);
    if (argc < 2)
        return error_set(err, ERR_USAGE, "convert needs two arguments: model_dir out_dir");
    if (!(rc = prepare(&conversion, argv[0], err)))
        rc = convert(&conversion, argv[1], err);
    source_files_clear(&conversion.files);
    extras_clear(&conversion.extras);
    checkpoint_source_clear(&conversion.source);
    checkpoint_close(conversion.checkpoint);
    plan_free(conversion.plan);
    return rc;
}
