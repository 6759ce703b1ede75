// tpshard reshard: the same model for another number of ranks, from shards alone. See commands.h.
#include "shard/commands.h"
#include "shard/shards_source.h"
#include "shard/source_files.h"
#include "shard/verify.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

static struct {
    int64_t tp, pp, threads; // -1: not said
    const char *experts;     // NULL: as they are
    bool zstd, resume, force;
} options = {.tp = -1, .pp = -1, .threads = -1};

const struct option_spec reshard_options[] = {
    {"tp", OPTION_INT, &options.tp, "N", 1, PLAN_MAX_TP, "ranks to cut the model for"},
    {"pp", OPTION_INT, &options.pp, "N", 1, PLAN_MAX_PP,
     "pipeline stages of so many ranks each (default: as in out_dir)"},
    {"experts", OPTION_CHOICE, &options.experts, "tp|ep", 0, 0,
     "tp: every rank holds a slice of each expert; ep: some of them, whole (default: as in out_dir)"},
    ZSTD_OPTION_SPEC(&options.zstd),
    THREADS_OPTION_SPEC(&options.threads),
    {"resume", OPTION_FLAG, &options.resume, NULL, 0, 0, "go on with a run that was interrupted"},
    {"force", OPTION_FLAG, &options.force, NULL, 0, 0, "replace the model that is in new_dir"},
    {0},
};

struct resharding {
    struct shard_dir dir;
    struct plan *from, *to;
    struct shards_source source;
    struct extras extras;
    struct source_files files; // the rank files, for --resume
};

static int threads(void) { return options.threads > 0 ? (int)options.threads : thread_pool_default_threads(); }

static int refuse_same_dir(const char *from, const char *to, struct error *err)
{
    struct stat a, b;
    if (stat(from, &a) || stat(to, &b) || a.st_dev != b.st_dev || a.st_ino != b.st_ino)
        return 0;
    return error_set(err, ERR_USAGE, "%s: new_dir is out_dir itself; name another directory", to);
}

// Nothing is made from shards that do not hold.
static int verify_first(struct shard_dir *dir, const char *path, struct error *err)
{
    struct thread_pool *pool = NULL;
    struct progress progress;
    struct verify_findings *findings = calloc(1, sizeof *findings);
    int rc = findings ? 0 : error_set(err, ERR_MEMORY, "out of memory");
    if (!rc && !(rc = thread_pool_create(&pool, threads(), err))) {
        progress_start(&progress, "verify", verify_bytes(dir->manifest), common.quiet);
        rc = verify_checksums(dir, path, pool, &progress, findings, err);
        progress_end(&progress);
    }
    if (!rc && findings->count > 0)
        rc = error_set(err, ERR_CORRUPT, "%s", findings->shown[0].msg);
    thread_pool_free(pool);
    free(findings);
    return rc;
}

static enum experts_mode wanted_experts(const struct manifest *manifest)
{
    enum experts_mode mode = manifest->experts;
    if (options.experts)
        experts_mode_from_name(options.experts, &mode);
    return mode;
}

static int prepare(struct resharding *r, const char *from, struct error *err)
{
    int rc;
    if ((rc = shard_dir_open(&r->dir, from, err)) || (rc = verify_first(&r->dir, from, err)))
        return rc;
    const struct manifest *manifest = r->dir.manifest;
    struct plan_kinds_of_file kinds;
    plan_kinds_of_file_init(&kinds, r->dir.files[0]);
    struct plan_options from_options = {.quant = manifest->quant,
                                        .tp_size = manifest->tp_size,
                                        .pp_size = manifest->pp_size,
                                        .stage_layers = manifest->stage_layers,
                                        .experts = manifest->experts,
                                        .kinds = &kinds.kinds};
    struct plan_options to_options = from_options;
    to_options.tp_size = options.tp > 0 ? (uint32_t)options.tp : manifest->tp_size;
    to_options.pp_size = options.pp > 0 ? (uint32_t)options.pp : manifest->pp_size;
    to_options.stage_layers = NULL;
    to_options.experts = wanted_experts(manifest);
    if ((rc = plan_make(&r->from, &manifest->model, &from_options, err)) ||
        (rc = plan_compare_matrices(r->from, manifest, MANIFEST_FILE_NAME, err)) ||
        (rc = plan_make(&r->to, &manifest->model, &to_options, err)) ||
        (rc = shards_source_init(&r->source, from, r->from, err)) ||
        (rc = extras_from_shards(&r->extras, from, manifest, err)))
        return rc;
    for (size_t i = 0; i < manifest->num_ranks; i++)
        if ((rc = source_files_add(&r->files, from, manifest->ranks[i].name, err)))
            return rc;
    char line[256];
    if (plan_empty_shares(r->to, line, sizeof line))
        commands_note("warning: %s", line);
    return 0;
}

// Provenance stays that of the checkpoint.
static int copy_sources(void *arg, struct manifest *manifest, struct error *err)
{
    const struct resharding *r = arg;
    const struct manifest *from = r->dir.manifest;
    manifest->sources = calloc(from->num_sources + 1, sizeof *manifest->sources);
    if (!manifest->sources)
        return error_set(err, ERR_MEMORY, "out of memory for the manifest");
    for (size_t i = 0; i < from->num_sources; i++) {
        manifest->sources[i] = from->sources[i];
        manifest->num_sources++;
        if (!(manifest->sources[i].name = strdup(from->sources[i].name)))
            return error_set(err, ERR_MEMORY, "out of memory for the manifest");
    }
    return 0;
}

static int reshard(struct resharding *r, const char *to, struct error *err)
{
    char key[512], contract[CHECKSUM128_HEX_DIGITS + 1];
    checksum128_to_hex(r->dir.manifest->contract, contract);
    snprintf(key, sizeof key, "%s reshard tp %u pp %u experts %s from %s%s", build_tool_name(), r->to->tp_size,
             r->to->pp_size, experts_mode_name(r->to->experts), contract, options.zstd ? " zstd" : "");
    struct build_input input = {
        .plan = r->to,
        .source = &r->source.source,
        .extras = &r->extras,
        .key = source_files_key(&r->files, key),
        .what = "reshard",
        .source_bytes = source_files_bytes(&r->files),
        .sources = copy_sources,
        .arg = r,
    };
    struct build_options build_options = {
        .out_dir = to,
        .force = options.force,
        .resume = options.resume,
        .quiet = common.quiet,
        .compress = options.zstd,
        .threads = threads(),
    };
    struct build_result result;
    int rc = build_directory(&result, &input, &build_options, err);
    return rc ? rc : commands_report_build(&result, r->to, to, err);
}

int reshard_run(int argc, char **argv, struct error *err)
{
    struct resharding resharding = {0};
    int rc;
    (void)argc;
    if (options.tp < 0 && options.pp < 0)
        return error_set(err, ERR_USAGE, "reshard needs --tp N or --pp N: for how many ranks?");
    if ((rc = refuse_same_dir(argv[0], argv[1], err)))
        return rc;
    if (!(rc = prepare(&resharding, argv[0], err)))
        rc = reshard(&resharding, argv[1], err);
    source_files_clear(&resharding.files);
    extras_clear(&resharding.extras);
    shards_source_clear(&resharding.source);
    plan_free(resharding.from);
    plan_free(resharding.to);
    shard_dir_close(&resharding.dir);
    return rc;
}
