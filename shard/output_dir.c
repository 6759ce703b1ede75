// See output_dir.h.
#include "shard/output_dir.h"

#include "formats/file_io.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#define WORK_NAME ".tmp-tpshard"

// Names that tpshard itself gives to files of a finished directory, besides the manifest and rank files.
static const char *const own_extras[] = {
    "tokenizer.bin",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
};
#define MANIFEST_LEFTOVER ".model.json.tmp-*" // what a crash while writing the manifest leaves

static bool is_rank_file(const char *name) { return fnmatch("rank-[0-9][0-9]-of-[0-9][0-9].tpshard", name, 0) == 0; }

static bool is_own_extra(const char *name)
{
    for (size_t i = 0; i < sizeof own_extras / sizeof own_extras[0]; i++)
        if (strcmp(own_extras[i], name) == 0)
            return true;
    return fnmatch(MANIFEST_LEFTOVER, name, 0) == 0;
}

static bool is_dot(const char *name) { return strcmp(name, ".") == 0 || strcmp(name, "..") == 0; }

// ---- taking ------------------------------------------------------------------------------------------------------

struct contents {
    bool manifest, rank_files, others; // others: our names, but no rank file
    char foreign[NAME_MAX + 1];        // a name that is not ours, or ""
};

static int look(struct contents *out, const char *path, struct error *err)
{
    DIR *dir = opendir(path);
    if (!dir)
        return error_set_errno(err, "%s: cannot read the directory", path);
    *out = (struct contents){0};
    for (const struct dirent *entry; (entry = readdir(dir));) {
        const char *name = entry->d_name;
        if (is_dot(name) || strcmp(name, WORK_NAME) == 0)
            continue;
        if (strcmp(name, MANIFEST_FILE_NAME) == 0)
            out->manifest = true;
        else if (is_rank_file(name))
            out->rank_files = true;
        else if (is_own_extra(name))
            out->others = true;
        else
            snprintf(out->foreign, sizeof out->foreign, "%s", name);
    }
    closedir(dir);
    return 0;
}

static int judge(const struct contents *contents, const char *path, bool force, struct error *err)
{
    if (contents->foreign[0])
        return error_set(err, ERR_USAGE,
                         "%s: the directory holds \"%s\", which tpshard did not write; name an empty or new one", path,
                         contents->foreign);
    if (contents->others && !contents->rank_files && !contents->manifest)
        return error_set(err, ERR_USAGE,
                         "%s: the directory holds files but no shards, so it is not tpshard's; name an empty or new "
                         "one",
                         path);
    if (contents->manifest && !force)
        return error_set(err, ERR_USAGE, "%s: a model is there already; --force replaces it", path);
    return 0;
}

static int make_dir(const char *path, bool *created, struct error *err)
{
    *created = mkdir(path, 0777) == 0;
    if (!*created && errno != EEXIST)
        return error_set_errno(err, "%s: cannot create the directory", path);
    return 0;
}

int output_dir_take(struct output_dir *out, const char *path, bool force, bool keep_work, struct error *err)
{
    struct output_dir dir = {.lock_fd = -1};
    struct contents contents;
    bool work_created;
    int rc;
    if (snprintf(dir.path, sizeof dir.path, "%s", path) >= (int)sizeof dir.path - NAME_MAX)
        return error_set(err, ERR_USAGE, "the path of the output directory is too long");
    for (size_t end = strlen(dir.path); end > 1 && dir.path[end - 1] == '/';)
        dir.path[--end] = 0;
    if ((rc = make_dir(dir.path, &dir.created, err)))
        return rc;
    dir.lock_fd = open(dir.path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (dir.lock_fd < 0)
        return error_set_errno(err, "%s: cannot open the directory", dir.path); // cppcheck-suppress memleak
    if (flock(dir.lock_fd, LOCK_EX | LOCK_NB) && errno == EWOULDBLOCK) {
        rc = error_set(err, ERR_USAGE, "%s: another tpshard is writing there; wait for it to end", dir.path);
        goto fail;
    }
    if ((rc = look(&contents, dir.path, err)) || (rc = judge(&contents, dir.path, force, err)))
        goto fail;
    snprintf(dir.work_path, sizeof dir.work_path, "%.*s/" WORK_NAME, (int)(sizeof dir.work_path - NAME_MAX), dir.path);
    if ((rc = make_dir(dir.work_path, &work_created, err)))
        goto fail;
    if (!work_created && !keep_work && (rc = output_dir_clean(&dir, err)))
        goto fail;
    *out = dir;
    return 0;
fail:
    close(dir.lock_fd);
    if (dir.created)
        rmdir(dir.path);
    return rc;
}

static int remove_from(const char *path, bool (*wanted)(const char *name), struct error *err)
{
    int rc = 0;
    DIR *dir = opendir(path);
    if (!dir)
        return error_set_errno(err, "%s: cannot read the directory", path);
    for (const struct dirent *entry; !rc && (entry = readdir(dir));)
        if (!is_dot(entry->d_name) && wanted(entry->d_name) && unlinkat(dirfd(dir), entry->d_name, 0))
            rc = error_set_errno(err, "%s/%s: cannot remove", path, entry->d_name);
    closedir(dir);
    return rc;
}

static bool any_name(const char *name) { return *name != 0; }

int output_dir_clean(struct output_dir *dir, struct error *err) { return remove_from(dir->work_path, any_name, err); }

// ---- committing --------------------------------------------------------------------------------------------------

static int move_file(const struct output_dir *dir, const char *name, struct error *err)
{
    char from[2 * PATH_MAX], to[2 * PATH_MAX];
    snprintf(from, sizeof from, "%s/%s", dir->work_path, name);
    snprintf(to, sizeof to, "%s/%s", dir->path, name);
    return rename(from, to) ? error_set_errno(err, "%s: cannot move it to %s", from, dir->path) : 0;
}

int output_dir_commit(struct output_dir *dir, const struct manifest *manifest, struct error *err)
{
    int rc;
    char *text = NULL;
    if ((rc = manifest_to_json(manifest, &text, err)) || (rc = file_sync_dir(dir->work_path, err)))
        goto done;
    if (unlinkat(dir->lock_fd, MANIFEST_FILE_NAME, 0) && errno != ENOENT) {
        rc = error_set_errno(err, "%s/" MANIFEST_FILE_NAME ": cannot remove", dir->path);
        goto done;
    }
    // From here until the new manifest stands there is no model.
    // Rank files go last: a directory without them is not taken for tpshard's.
    if ((rc = file_sync_dir(dir->path, err)) || (rc = remove_from(dir->path, is_own_extra, err)) ||
        (rc = file_sync_dir(dir->path, err)) || (rc = remove_from(dir->path, is_rank_file, err)))
        goto done;
    for (size_t i = 0; i < manifest->num_ranks; i++)
        if ((rc = move_file(dir, manifest->ranks[i].name, err)))
            goto done;
    for (size_t i = 0; i < manifest->num_extras; i++)
        if ((rc = move_file(dir, manifest->extras[i].name, err)))
            goto done;
    if ((rc = file_sync_dir(dir->path, err)))
        goto done;
    rc = file_write_atomic(dir->path, MANIFEST_FILE_NAME, text, strlen(text), err);
done:
    free(text);
    return rc;
}

void output_dir_release(struct output_dir *dir, bool remove_work)
{
    struct error ignored;
    if (remove_work) {
        output_dir_clean(dir, &ignored);
        rmdir(dir->work_path);
        if (dir->created)
            rmdir(dir->path); // only if it is empty
    }
    close(dir->lock_fd);
}
