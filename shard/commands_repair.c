// tpshard repair: writes again what does not hold, and nothing else. See commands.h.
#include "shard/commands.h"
#include "shard/output_dir.h"
#include "shard/repair.h"
#include "shard/stop.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { PRINTED = 20 };

static struct {
    int64_t threads;
    const char *from;
} options = {.threads = -1};

const struct option_spec repair_options[] = {
    {"from", OPTION_TEXT, &options.from, "SOURCE", 0, 0,
     "the checkpoint that the files were made from, or another copy of the directory"},
    THREADS_OPTION_SPEC(&options.threads),
    {0},
};

// ---- the report --------------------------------------------------------------------------------------------------

struct totals {
    uint64_t files, leaves, heads, tensors, bytes;
};

static bool was_mended(const struct repair_rank *rank) { return rank->mended_head || rank->mended_leaves > 0; }

// Does a leaf that was mended hold some of the tensor?
static bool tensor_was_mended(const struct repair *repair, size_t rank, const struct shard_tensor *tensor)
{
    const uint64_t spans[2][2] = {{tensor->data_offset, tensor->shape.data_bytes},
                                  {tensor->scale_offset, tensor->shape.scale_bytes}};
    for (int i = 0; i < 2; i++)
        for (uint64_t at = spans[i][0] / SHARD_LEAF_BYTES;
             spans[i][1] > 0 && at <= (spans[i][0] + spans[i][1] - 1) / SHARD_LEAF_BYTES; at++)
            if (repair->ranks[rank].broken[at])
                return true;
    return false;
}

// Names of the tensors of which something was mended.
static json_t *mended_tensors(const struct repair *repair, size_t rank)
{
    const struct shard_file *file = repair->dir->files[rank];
    json_t *names = json_array();
    char label[96];
    for (uint64_t i = 0; i < shard_file_tensor_count(file); i++)
        if (tensor_was_mended(repair, rank, shard_file_tensor(file, i))) {
            plan_tensor_label(label, sizeof label, shard_file_tensor(file, i));
            json_array_append_new(names, json_string(label));
        }
    return names;
}

// One object for each file of a rank that was mended.
static json_t *list_files(const struct repair *repair, struct totals *totals)
{
    json_t *files = json_array();
    *totals = (struct totals){.files = repair->mended_extras, .bytes = repair->mended_extra_bytes};
    for (size_t i = 0; i < repair->dir->manifest->num_ranks; i++) {
        const struct repair_rank *rank = &repair->ranks[i];
        if (!was_mended(rank) && !rank->length)
            continue;
        json_t *tensors = rank->broken ? mended_tensors(repair, i) : json_array();
        totals->files++;
        totals->leaves += rank->mended_leaves;
        totals->heads += rank->mended_head;
        totals->tensors += json_array_size(tensors);
        totals->bytes += rank->mended_bytes;
        json_array_append_new(files,
                              json_pack("{s:s, s:I, s:I, s:b, s:o}", "name", repair->dir->manifest->ranks[i].name,
                                        "leaves", (json_int_t)rank->mended_leaves, "bytes",
                                        (json_int_t)rank->mended_bytes, "head", rank->mended_head, "tensors", tensors));
    }
    return files;
}

static int report_json(const struct repair *repair, double seconds, struct error *err)
{
    struct totals totals;
    json_t *files = list_files(repair, &totals), *failures = json_array();
    for (uint64_t i = 0; i < repair->failures->count && i < VERIFY_SHOWN; i++)
        json_array_append_new(failures, json_string(repair->failures->shown[i].msg));
    return commands_print_json(
        json_pack("{s:i, s:b, s:I, s:I, s:I, s:I, s:I, s:I, s:f, s:o, s:I, s:o}", "schema_version", 1, "ok",
                  repair->failures->count == 0, "files", (json_int_t)totals.files, "leaves", (json_int_t)totals.leaves,
                  "heads", (json_int_t)totals.heads, "extras", (json_int_t)repair->mended_extras, "tensors",
                  (json_int_t)totals.tensors, "bytes", (json_int_t)totals.bytes, "seconds", seconds, "mended", files,
                  "failure_count", (json_int_t)repair->failures->count, "failures", failures),
        err);
}

// "1 leaf", "3 leaves"
static const char *counted(char out[48], uint64_t count, const char *one, const char *many)
{
    snprintf(out, 48, "%" PRIu64 " %s", count, count == 1 ? one : many);
    return out;
}

// "  rank-00-of-02.tpshard: head, 2 leaves, 2.1 MB: layer 3 qkv, layer 3 o"
static void print_file(const json_t *file)
{
    enum { NAMED = 6 };
    char bytes[32], leaves[48];
    const json_t *tensors = json_object_get(file, "tensors");
    size_t count = json_array_size(tensors);
    printf("  %s: %s%s, %s", json_string_value(json_object_get(file, "name")),
           json_is_true(json_object_get(file, "head")) ? "head, " : "",
           counted(leaves, (uint64_t)json_integer_value(json_object_get(file, "leaves")), "leaf", "leaves"),
           progress_bytes_text(bytes, (uint64_t)json_integer_value(json_object_get(file, "bytes"))));
    for (size_t i = 0; i < count && i < NAMED; i++)
        printf("%s %s", i == 0 ? ":" : ",", json_string_value(json_array_get(tensors, i)));
    if (count > NAMED)
        printf(" and %zu more", count - NAMED);
    putchar('\n');
}

static void report_text(const struct repair *repair, double seconds)
{
    struct totals totals;
    char bytes[32], leaves[48], heads[48], extras[48], files_text[48];
    json_t *files = list_files(repair, &totals);
    if (totals.files == 0 && repair->failures->count == 0)
        printf("%s: nothing to repair, %s verified in %.1f s\n", repair->path,
               progress_bytes_text(bytes, verify_bytes(repair->dir->manifest)), seconds);
    else if (totals.files > 0)
        printf("%s: repaired %s, %s and %s in %s, %s in %.1f s\n", repair->path,
               counted(leaves, totals.leaves, "leaf", "leaves"), counted(heads, totals.heads, "head", "heads"),
               counted(extras, repair->mended_extras, "extra", "extras"),
               counted(files_text, totals.files, "file", "files"), progress_bytes_text(bytes, totals.bytes), seconds);
    for (size_t i = 0; i < json_array_size(files); i++)
        print_file(json_array_get(files, i));
    json_decref(files);
    fflush(stdout);
}

static int report(const struct repair *repair, double seconds, struct error *err)
{
    const struct verify_findings *failures = repair->failures;
    int rc = 0;
    if (common.json)
        rc = report_json(repair, seconds, err);
    else
        report_text(repair, seconds);
    if (rc || failures->count == 0)
        return rc;
    if (failures->count == 1)
        return error_set(err, failures->code, "%s", failures->shown[0].msg);
    for (uint64_t i = 0; i < failures->count && i < PRINTED; i++)
        fprintf(stderr, "%s\n", failures->shown[i].msg);
    return error_set(err, failures->code, "%s: %" PRIu64 " things could not be repaired%s", repair->path,
                     failures->count, failures->count > PRINTED ? "; the first are above" : "");
}

// ---- the command -------------------------------------------------------------------------------------------------

static bool holds(const char *dir, const char *name)
{
    char path[PATH_MAX];
    return snprintf(path, sizeof path, "%s/%s", dir, name) < (int)sizeof path && access(path, F_OK) == 0;
}

static int check_source(const char *path, struct error *err)
{
    struct stat a, b;
    if (!options.from)
        return error_set(err, ERR_USAGE, "repair needs --from SOURCE: the checkpoint, or another copy of %s", path);
    if (!stat(path, &a) && !stat(options.from, &b) && a.st_dev == b.st_dev && a.st_ino == b.st_ino)
        return error_set(err, ERR_USAGE, "--from %s: that is the directory itself", options.from);
    return 0;
}

static int read_manifest(struct shard_dir *dir, const char *path, struct error *err)
{
    struct error cause;
    int rc = shard_dir_open(dir, path, &cause);
    if (rc == ERR_CORRUPT)
        return error_set(err, ERR_CORRUPT,
                         "%s (repair needs a whole " MANIFEST_FILE_NAME ": take that of another copy, or run tpshard "
                         "convert --force)",
                         cause.msg);
    if (rc)
        *err = cause;
    return rc;
}

static int mend(struct repair *repair, struct error *err)
{
    struct repair_source *source;
    struct progress progress;
    int threads = thread_pool_size(repair->pool);
    int rc = holds(options.from, MANIFEST_FILE_NAME)
                 ? repair_from_shards(&source, options.from, repair->dir, threads, err)
                 : repair_from_checkpoint(&source, options.from, repair->dir, threads, err);
    if (rc)
        return rc;
    progress_start(&progress, "repair", repair_bytes(repair), common.quiet);
    rc = repair_mend(repair, source, &progress, err);
    progress_end(&progress);
    source->close(source);
    return rc;
}

static int look_and_mend(struct repair *repair, struct error *err)
{
    struct progress progress;
    progress_start(&progress, "verify", verify_bytes(repair->dir->manifest), common.quiet);
    int rc = repair_survey(repair, &progress, err);
    progress_end(&progress);
    if (!rc && repair_is_needed(repair))
        rc = mend(repair, err);
    return rc ? rc : report(repair, progress_seconds(&progress), err);
}

int repair_run(int argc, char **argv, struct error *err)
{
    struct shard_dir dir = {0};
    struct thread_pool *pool = NULL;
    struct repair repair = {0};
    struct verify_findings *failures = calloc(1, sizeof *failures);
    int lock = -1, threads = options.threads > 0 ? (int)options.threads : thread_pool_default_threads(), rc;
    (void)argc;
    if (!failures)
        return error_set(err, ERR_MEMORY, "out of memory");
    stop_install();
    if ((rc = check_source(argv[0], err)) || (rc = output_dir_lock(&lock, argv[0], err)) ||
        (rc = read_manifest(&dir, argv[0], err)) || (rc = thread_pool_create(&pool, threads, err)) ||
        (rc = repair_begin(&repair, &dir, argv[0], pool, failures, err)))
        goto done;
    if (!(rc = output_dir_remove_leftovers(argv[0], err)))
        rc = look_and_mend(&repair, err);
    repair_end(&repair);
done:
    if (lock >= 0)
        close(lock);
    thread_pool_free(pool);
    shard_dir_close(&dir);
    free(failures);
    return rc;
}
