// tpshard verify: is a shard directory whole, and is it what the checkpoint says? See commands.h.
#include "shard/commands.h"
#include "shard/origin.h"
#include "shard/stop.h"
#include "shard/sums.h"
#include "shard/verify.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PRINTED = 20 };

static struct {
    int64_t threads;
    const char *against, *statistics;
    bool sha256;
} options = {.threads = -1};

const struct option_spec verify_options[] = {
    {"against", OPTION_TEXT, &options.against, "MODEL_DIR", 0, 0,
     "derive every weight again from this checkpoint and compare"},
    {"calib-stats", OPTION_TEXT, &options.statistics, "FILE", 0, 0,
     "with --against: the statistics that the weights were quantized by"},
    {"sha256", OPTION_FLAG, &options.sha256, NULL, 0, 0,
     "compare every file with the list SHA256SUMS too, which tpshard sums writes"},
    THREADS_OPTION_SPEC(&options.threads),
    {0},
};

// ---- against a checkpoint ----------------------------------------------------------------------------------------

// A mismatch of description or plan is a finding like any other.
static int check_against(const struct shard_dir *dir, struct thread_pool *pool, struct verify_findings *findings,
                         struct error *err)
{
    struct origin origin;
    struct progress progress;
    int rc = origin_open(&origin, options.against, dir, options.statistics, err);
    if (!rc) {
        progress_start(&progress, "compare", plan_stored_bytes(origin.plan), common.quiet);
        rc = verify_against(dir, origin.plan, origin.source, pool, &progress, findings, err);
        progress_end(&progress);
    }
    origin_close(&origin);
    if (rc != ERR_CORRUPT)
        return rc;
    verify_note(findings, err);
    return 0;
}

// ---- SHA-256 -----------------------------------------------------------------------------------------------------

static int check_sha256(const struct shard_dir *dir, const char *path, struct thread_pool *pool,
                        struct verify_findings *findings, struct error *err)
{
    struct progress progress;
    uint64_t bytes;
    int rc = sums_bytes(&bytes, dir->manifest, path, err);
    if (rc)
        return rc;
    progress_start(&progress, "sha256", bytes, common.quiet);
    rc = sums_verify(dir->manifest, path, pool, &progress, findings, err);
    progress_end(&progress);
    return rc;
}

// ---- the report --------------------------------------------------------------------------------------------------

static int report_json(const struct manifest *manifest, const struct verify_findings *findings, double seconds,
                       struct error *err)
{
    json_t *failures = json_array();
    for (uint64_t i = 0; i < findings->count && i < VERIFY_SHOWN; i++)
        json_array_append_new(failures, json_string(findings->shown[i].msg));
    return commands_print_json(
        json_pack("{s:i, s:b, s:i, s:I, s:f, s:b, s:b, s:I, s:o}", "schema_version", 1, "ok", findings->count == 0,
                  "files", (int)(manifest->num_ranks + manifest->num_extras + 1), "bytes",
                  (json_int_t)verify_bytes(manifest), "seconds", seconds, "against_checkpoint", options.against != NULL,
                  "sha256", options.sha256, "failure_count", (json_int_t)findings->count, "failures", failures),
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
            printf("%s: ok, %zu files, %s verified in %.1f s%s%s\n", path,
                   manifest->num_ranks + manifest->num_extras + 1, progress_bytes_text(bytes, verify_bytes(manifest)),
                   seconds, options.sha256 ? "; every SHA-256 is that of " SUMS_FILE_NAME : "",
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
    if (options.statistics && !options.against) {
        free(findings);
        return error_set(err, ERR_USAGE, "--calib-stats says how to read a checkpoint: it goes with --against");
    }
    if ((rc = shard_dir_open(&dir, argv[0], err)) ||
        (rc = thread_pool_create(&pool, options.threads > 0 ? (int)options.threads : thread_pool_default_threads(),
                                 err)))
        goto done;
    progress_start(&progress, "verify", verify_bytes(dir.manifest), common.quiet);
    rc = verify_checksums(&dir, argv[0], pool, &progress, findings, err);
    progress_end(&progress);
    if (!rc && options.sha256)
        rc = check_sha256(&dir, argv[0], pool, findings, err);
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
