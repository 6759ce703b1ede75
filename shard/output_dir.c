// See output_dir.h.
#include "shard/output_dir.h"

#include "formats/chat.h"
#include "formats/file_io.h"

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
#define COMMIT_MARK "commit" // in the work folder: rank files beside it are this run's, on their way to their place

// Names that tpshard itself gives to files of a finished directory, besides the manifest and rank files; and those that signatures of its
// list of checksums get: they say nothing of another model.
static const char *const own_extras[] = {
    "tokenizer.bin", CHAT_TEMPLATE_FILE, CHAT_TOOL_TEMPLATE_FILE, CHAT_SPECIAL_TOKENS_FILE, "generation_config.json",
    "config.json",   "SHA256SUMS",       "SHA256SUMS.asc",        "SHA256SUMS.minisig",     "SHA256SUMS.sig",
};

static bool is_rank_file(const char *name)
{
    return fnmatch("rank-[0-9][0-9]-of-[0-9][0-9].tpshard", name, 0) == 0 ||
           fnmatch("stage-[0-9][0-9]-rank-[0-9][0-9]-of-[0-9][0-9].tpshard", name, 0) == 0;
}

static bool is_own_name(const char *name)
{
    for (size_t i = 0; i < sizeof own_extras / sizeof own_extras[0]; i++)
        if (strcmp(own_extras[i], name) == 0)
            return true;
    return false;
}

// What a crash leaves of a file that was written beside its place, see file_write_atomic.
static bool is_leftover(const char *name)
{
    char whole[NAME_MAX + 1];
    const char *end = strstr(name, ".tmp-");
    if (name[0] != '.' || !end)
        return false;
    snprintf(whole, sizeof whole, "%.*s", (int)(end - name - 1), name + 1);
    return strcmp(whole, MANIFEST_FILE_NAME) == 0 || is_own_name(whole);
}

static bool is_own_extra(const char *name) { return is_own_name(name) || is_leftover(name); }

bool output_dir_is_own_name(const char *name) { return is_rank_file(name) || is_own_name(name); }

static bool is_dot(const char *name) { return strcmp(name, ".") == 0 || strcmp(name, "..") == 0; }

// ---- taking ------------------------------------------------------------------------------------------------------

struct contents {
    bool manifest, rank_files, work, others; // work: a run's folder; others: our names, but none of these
    char foreign[NAME_MAX + 1];              // a name that is not ours, or ""
};

int output_dir_next(const struct dirent **entry, DIR *dir, const char *path, struct error *err)
{
    errno = 0;
    *entry = readdir(dir);
    return !*entry && errno ? error_set_errno(err, "%s: cannot read the directory", path) : 0;
}

// A link to one is none.
static bool is_directory(DIR *dir, const struct dirent *entry)
{
    struct stat status;
    if (entry->d_type != DT_UNKNOWN)
        return entry->d_type == DT_DIR;
    return fstatat(dirfd(dir), entry->d_name, &status, AT_SYMLINK_NOFOLLOW) == 0 && S_ISDIR(status.st_mode);
}

static int look(struct contents *out, const char *path, struct error *err)
{
    int rc;
    DIR *dir = opendir(path);
    if (!dir)
        return error_set_errno(err, "%s: cannot read the directory", path);
    *out = (struct contents){0};
    for (const struct dirent *entry; !(rc = output_dir_next(&entry, dir, path, err)) && entry;) {
        const char *name = entry->d_name;
        if (is_dot(name))
            continue;
        // A link as the work folder would be followed; no other name is a folder's.
        bool is_work = strcmp(name, WORK_NAME) == 0, fits = is_work == is_directory(dir, entry);
        if (fits && is_work)
            out->work = true;
        else if (fits && strcmp(name, MANIFEST_FILE_NAME) == 0)
            out->manifest = true;
        else if (fits && is_rank_file(name))
            out->rank_files = true;
        else if (fits && is_own_extra(name))
            out->others = true;
        else
            snprintf(out->foreign, sizeof out->foreign, "%s", name);
    }
    closedir(dir);
    return rc;
}

static int judge(const struct contents *contents, const char *path, bool force, struct error *err)
{
    if (contents->foreign[0])
        return error_set(err, ERR_USAGE,
                         "%s: the directory holds \"%s\", which tpshard did not write; name an empty or new one", path,
                         contents->foreign);
    if (contents->others && !contents->rank_files && !contents->manifest && !contents->work)
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

// Where a file system has no locks, nothing is held.
int output_dir_lock(int *out, const char *path, struct error *err)
{
    int rc, fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC), failed;
    if (fd < 0)
        return error_set_errno(err, "%s: cannot open the directory", path);
    do {
        failed = flock(fd, LOCK_EX | LOCK_NB);
    } while (failed && errno == EINTR);
    if (!failed || errno == ENOTSUP || errno == ENOSYS || errno == EINVAL) {
        *out = fd;
        return 0;
    }
    if (errno == EWOULDBLOCK)
        rc = error_set(err, ERR_USAGE, "%s: another tpshard is writing there; wait for it to end", path);
    else
        rc = error_set_errno(err, "%s: cannot lock the directory", path);
    close(fd);
    return rc;
}

// The directory's name is synced in the directory above, so that after a power failure it is there with what it holds.
static int sync_name(const char *path, struct error *err)
{
    char above[PATH_MAX + 4];
    snprintf(above, sizeof above, "%s/..", path);
    if (access(above, R_OK) && errno == EACCES) // it can be written to and not be opened
        return 0;
    return file_sync_dir(above, err);
}

// For each wanted name in the directory `path` of dir.
static int for_names(const struct output_dir *dir, const char *path, bool (*wanted)(const char *name),
                     int (*act)(const struct output_dir *dir, const char *path, const char *name, struct error *err),
                     struct error *err)
{
    int rc = 0;
    DIR *stream = opendir(path);
    if (!stream)
        return error_set_errno(err, "%s: cannot read the directory", path);
    for (const struct dirent *entry; !rc && !(rc = output_dir_next(&entry, stream, path, err)) && entry;)
        if (!is_dot(entry->d_name) && wanted(entry->d_name))
            rc = act(dir, path, entry->d_name, err);
    closedir(stream);
    return rc;
}

static int move_file(const char *from_dir, const char *to_dir, const char *name, struct error *err)
{
    char from[2 * PATH_MAX], to[2 * PATH_MAX];
    snprintf(from, sizeof from, "%s/%s", from_dir, name);
    snprintf(to, sizeof to, "%s/%s", to_dir, name);
    return rename(from, to) ? error_set_errno(err, "%s: cannot move it to %s", from, to_dir) : 0;
}

static int move_back(const struct output_dir *dir, const char *path, const char *name, struct error *err)
{
    return move_file(path, dir->work_path, name, err);
}

// A run that ended while it was committing is taken up with all its rank files in the work folder.
static int take_back(const struct output_dir *dir, struct error *err)
{
    char mark[PATH_MAX + sizeof COMMIT_MARK];
    bool committing;
    int rc;
    snprintf(mark, sizeof mark, "%s/" COMMIT_MARK, dir->work_path);
    if ((rc = file_is_there(&committing, mark, err)) || !committing ||
        (rc = for_names(dir, dir->path, is_rank_file, move_back, err)))
        return rc;
    return unlink(mark) ? error_set_errno(err, "%s: cannot remove", mark) : 0;
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
    if ((rc = output_dir_lock(&dir.lock_fd, dir.path, err)) || (rc = sync_name(dir.path, err)) ||
        (rc = look(&contents, dir.path, err)) || (rc = judge(&contents, dir.path, force, err)))
        goto fail;
    snprintf(dir.work_path, sizeof dir.work_path, "%.*s/" WORK_NAME, (int)(sizeof dir.work_path - NAME_MAX), dir.path);
    if ((rc = make_dir(dir.work_path, &work_created, err)))
        goto fail;
    dir.found_work = !work_created && keep_work;
    if (!work_created && (rc = keep_work ? take_back(&dir, err) : output_dir_clean(&dir, err)))
        goto fail;
    *out = dir;
    return 0;
fail:
    if (dir.lock_fd >= 0)
        close(dir.lock_fd);
    if (dir.created)
        rmdir(dir.path);
    return rc;
}

static int remove_name(const struct output_dir *dir, const char *path, const char *name, struct error *err)
{
    char full[2 * PATH_MAX];
    (void)dir;
    snprintf(full, sizeof full, "%s/%s", path, name);
    return unlink(full) ? error_set_errno(err, "%s: cannot remove", full) : 0;
}

int output_dir_remove_leftovers(const char *path, struct error *err)
{
    return for_names(NULL, path, is_leftover, remove_name, err);
}

static bool any_name(const char *name) { return *name != 0; }

int output_dir_clean(struct output_dir *dir, struct error *err)
{
    return for_names(dir, dir->work_path, any_name, remove_name, err);
}

// ---- committing --------------------------------------------------------------------------------------------------

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
    // Rank files go last and come first: a directory with our other files alone is not taken for tpshard's.
    if ((rc = file_sync_dir(dir->path, err)) || (rc = for_names(dir, dir->path, is_own_extra, remove_name, err)) ||
        (rc = file_sync_dir(dir->path, err)) || (rc = for_names(dir, dir->path, is_rank_file, remove_name, err)) ||
        (rc = file_sync_dir(dir->path, err)) || (rc = file_write_atomic(dir->work_path, COMMIT_MARK, "", 0, err)))
        goto done;
    for (size_t i = 0; i < manifest->num_ranks; i++)
        if ((rc = move_file(dir->work_path, dir->path, manifest->ranks[i].name, err)))
            goto done;
    if ((rc = file_sync_dir(dir->path, err)))
        goto done;
    for (size_t i = 0; i < manifest->num_extras; i++)
        if ((rc = move_file(dir->work_path, dir->path, manifest->extras[i].name, err)))
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
