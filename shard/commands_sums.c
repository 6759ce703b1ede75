// tpshard sums: the list of SHA-256 checksums that is signed and published with a shard directory. See commands.h.
#include "formats/file_io.h"
#include "shard/commands.h"
#include "shard/output_dir.h"
#include "shard/stop.h"
#include "shard/sums.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static struct {
    int64_t threads;
} options = {.threads = -1};

const struct option_spec sums_options[] = {
    THREADS_OPTION_SPEC(&options.threads),
    {0},
};

// What is published has been verified.
static int verify_first(struct shard_dir *dir, const char *path, struct thread_pool *pool, struct error *err)
{
    struct progress progress;
    struct verify_findings *findings = calloc(1, sizeof *findings);
    if (!findings)
        return error_set(err, ERR_MEMORY, "out of memory");
    progress_start(&progress, "verify", verify_bytes(dir->manifest), common.quiet);
    int rc = verify_checksums(dir, path, pool, &progress, findings, err);
    progress_end(&progress);
    if (!rc && findings->count > 0)
        rc = error_set(err, ERR_CORRUPT, "%s", findings->shown[0].msg);
    free(findings);
    return rc;
}

// A signature of the list as it was says nothing of the new one.
static void warn_of_signatures(const char *path)
{
    static const char *const suffixes[] = {".sig", ".asc", ".minisig"};
    for (size_t i = 0; i < sizeof suffixes / sizeof *suffixes; i++) {
        char signature[2 * PATH_MAX];
        struct error ignored;
        bool there;
        snprintf(signature, sizeof signature, "%s/" SUMS_FILE_NAME "%s", path, suffixes[i]);
        if (!file_is_there(&there, signature, &ignored) && there)
            commands_note("warning: %s: this signature is of the list as it was before and does not fit the new one; "
                          "sign " SUMS_FILE_NAME " again",
                          signature);
    }
}

static int list(const struct shard_dir *dir, const char *path, struct thread_pool *pool, struct error *err)
{
    struct progress progress;
    uint64_t bytes;
    bool changed;
    int rc = sums_bytes(&bytes, dir->manifest, path, err);
    if (rc)
        return rc;
    progress_start(&progress, "sums", bytes, common.quiet);
    rc = sums_write(&changed, dir->manifest, path, pool, &progress, err);
    progress_end(&progress);
    if (!rc && changed)
        warn_of_signatures(path);
    size_t files = 1 + dir->manifest->num_ranks + dir->manifest->num_extras;
    char text[32];
    if (!rc && common.json)
        rc = commands_print_json(json_pack("{s:i, s:s, s:i, s:I, s:f}", "schema_version", 1, "list", SUMS_FILE_NAME,
                                           "files", (int)files, "bytes", (json_int_t)bytes, "seconds",
                                           progress_seconds(&progress)),
                                 err);
    else if (!rc)
        printf("%s/" SUMS_FILE_NAME ": %zu files, %s in %.1f s\n", path, files, progress_bytes_text(text, bytes),
               progress_seconds(&progress));
    return rc;
}

int sums_run(int argc, char **argv, struct error *err)
{
    struct shard_dir dir = {0};
    struct thread_pool *pool = NULL;
    int lock = -1, rc, threads = options.threads > 0 ? (int)options.threads : thread_pool_default_threads();
    (void)argc;
    stop_install();
    if (!(rc = output_dir_lock(&lock, argv[0], err)) && !(rc = shard_dir_open(&dir, argv[0], err)) &&
        !(rc = thread_pool_create(&pool, threads, err)) && !(rc = verify_first(&dir, argv[0], pool, err)))
        rc = list(&dir, argv[0], pool, err);
    if (lock >= 0)
        close(lock);
    thread_pool_free(pool);
    shard_dir_close(&dir);
    return rc;
}
