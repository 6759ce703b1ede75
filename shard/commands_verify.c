// tpshard verify: is a shard directory whole, and is it what the checkpoint says? See commands.h.
#include "shard/commands.h"
#include "shard/hf_config.h"
#include "shard/model_rows.h"
#include "shard/stop.h"
#include "shard/verify.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PRINTED = 20 };

static struct {
    int64_t threads;
    const char *against;
} options = {.threads = -1};

const struct option_spec verify_options[] = {
    {"against", OPTION_TEXT, &options.against, "MODEL_DIR", 0, 0,
     "derive every weight again from this checkpoint and compare"},
    THREADS_OPTION_SPEC(&options.threads),
    {0},
};

// ---- against a checkpoint ----------------------------------------------------------------------------------------

// The description that config.json gives must be the one in the manifest: then so is its part of the contract.
static int same_model(const struct manifest *manifest, const struct hf_config *config, struct error *err)
{
    struct manifest derived = *manifest;
    struct checksum128 contract;
    derived.model = config->model;
    int rc = manifest_contract(&derived, &contract, err);
    if (!rc && !checksum128_equal(contract, manifest->contract))
        rc = error_set(err, ERR_CORRUPT,
                       "the model description in the manifest is not the one that %s/config.json and "
                       "generation_config.json give",
                       options.against);
    return rc;
}

static int compare_weights(const struct shard_dir *dir, const struct hf_config *config, struct thread_pool *pool,
                           struct verify_findings *findings, struct error *err)
{
    struct plan *plan = NULL;
    struct model_rows rows;
    struct import_kinds imported;
    struct progress progress;
    int rc;
    const struct manifest *manifest = dir->manifest;
    struct plan_kinds_of_file kinds;
    plan_kinds_of_file_init(&kinds, dir->files[0]);
    struct plan_options cut = {manifest->quant, manifest->tp_size, manifest->experts, &kinds.kinds, NULL};
    if ((rc = model_rows_open(&rows, options.against, err)))
        goto done;
    if (rows.import) {
        imported = import_kinds_as(rows.import, &kinds.kinds);
        cut.kinds = &imported.kinds;
    }
    if ((rc = plan_make(&plan, &config->model, &cut, err)))
        goto done;
    for (uint32_t rank = 0; rank < plan->tp_size; rank++)
        if ((rc = plan_compare(plan, rank, dir->files[rank], dir->paths[rank], err)))
            goto done;
    if ((rc = model_rows_init(&rows, plan, config, err)))
        goto done;
    progress_start(&progress, "compare", plan_stored_bytes(plan), common.quiet);
    rc = verify_against(dir, plan, rows.source, pool, &progress, findings, err);
    progress_end(&progress);
done:
    model_rows_close(&rows);
    plan_free(plan);
    return rc;
}

// A mismatch of description or plan is a finding like any other.
static int check_against(const struct shard_dir *dir, struct thread_pool *pool, struct verify_findings *findings,
                         struct error *err)
{
    struct hf_config config;
    const char *known_as = strstr(dir->manifest->model.architecture, " as "); // "New as Known": what --as said
    int rc = hf_config_read(&config, options.against, known_as ? known_as + strlen(" as ") : NULL, err);
    if (!rc)
        rc = same_model(dir->manifest, &config, err);
    if (!rc)
        rc = compare_weights(dir, &config, pool, findings, err);
    if (rc != ERR_CORRUPT)
        return rc;
    verify_note(findings, err);
    return 0;
}

// ---- the report --------------------------------------------------------------------------------------------------

static int report_json(const struct manifest *manifest, const struct verify_findings *findings, double seconds,
                       struct error *err)
{
    json_t *failures = json_array();
    for (uint64_t i = 0; i < findings->count && i < VERIFY_SHOWN; i++)
        json_array_append_new(failures, json_string(findings->shown[i].msg));
    return commands_print_json(
        json_pack("{s:i, s:b, s:i, s:I, s:f, s:b, s:I, s:o}", "schema_version", 1, "ok", findings->count == 0, "files",
                  (int)(manifest->num_ranks + manifest->num_extras + 1), "bytes", (json_int_t)verify_bytes(manifest),
                  "seconds", seconds, "against_checkpoint", options.against != NULL, "failure_count",
                  (json_int_t)findings->count, "failures", failures),
        err);
}

static int report(const char *path, const struct manifest *manifest, const struct verify_findings *findings,
                  double seconds, struct error *err)
{
    char bytes[32];
    int rc;
    if (common.json && (rc = report_json(manifest, findings, seconds, err)))
        return rc;
    if (findings->count == 0) {
        if (!common.json)
            printf("%s: ok, %zu files, %s verified in %.1f s%s\n", path, manifest->num_ranks + manifest->num_extras + 1,
                   progress_bytes_text(bytes, verify_bytes(manifest)), seconds,
                   options.against ? "; every weight equals the checkpoint's" : "");
        return 0;
    }
    if (findings->count == 1)
        return error_set(err, ERR_CORRUPT, "%s", findings->shown[0].msg);
    for (uint64_t i = 0; i < findings->count && i < PRINTED; i++)
        fprintf(stderr, "%s\n", findings->shown[i].msg);
    return error_set(err, ERR_CORRUPT, "%s: %llu things do not hold%s", path, (unsigned long long)findings->count,
                     findings->count > PRINTED ? "; the first are above" : "");
}

int verify_run(int argc, char **argv, struct error *err)
{
    struct shard_dir dir = {0};
    struct thread_pool *pool = NULL;
    struct progress progress;
    struct verify_findings *findings = calloc(1, sizeof *findings);
    int rc;
    (void)argc;
    if (!findings)
        return error_set(err, ERR_MEMORY, "out of memory");
    stop_install();
    if ((rc = shard_dir_open(&dir, argv[0], err)) ||
        (rc = thread_pool_create(&pool, options.threads > 0 ? (int)options.threads : thread_pool_default_threads(),
                                 err)))
        goto done;
    progress_start(&progress, "verify", verify_bytes(dir.manifest), common.quiet);
    rc = verify_checksums(&dir, argv[0], pool, &progress, findings, err);
    progress_end(&progress);
    if (!rc && options.against && findings->count == 0)
        rc = check_against(&dir, pool, findings, err);
    if (!rc)
        rc = report(argv[0], dir.manifest, findings, progress_seconds(&progress), err);
done:
    thread_pool_free(pool);
    shard_dir_close(&dir);
    free(findings);
    return rc;
}
