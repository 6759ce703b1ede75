// See statistics.h.
#include "shard/statistics.h"

#include "formats/file_io.h"
#include "shard/calibrate.h"
#include "shard/stop.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { TEXT_CAP_BYTES = 1 << 30 };

// ---- the place -----------------------------------------------------------------------------------------------------

int statistics_place_make(struct statistics_place *out, const char *out_dir, const struct statistics_wish *wish,
                          struct error *err)
{
    size_t length = strlen(out_dir);
    while (length > 1 && out_dir[length - 1] == '/')
        length--;
    if (length + sizeof ".calib/statistics" > sizeof out->file ||
        (wish->file && strlen(wish->file) >= sizeof out->file))
        return error_set(err, ERR_IO, "%.80s...: the path is too long", out_dir);
    snprintf(out->folder, sizeof out->folder, "%.*s.calib", (int)length, out_dir);
    snprintf(out->shards, sizeof out->shards, "%.*s.calib/bf16", (int)length, out_dir);
    snprintf(out->mark, sizeof out->mark, "%.*s.calib/by-tpshard", (int)length, out_dir);
    out->own_file = !wish->file;
    if (wish->file)
        snprintf(out->file, sizeof out->file, "%s", wish->file);
    else
        snprintf(out->file, sizeof out->file, "%.*s.calib/statistics", (int)length, out_dir);
    return 0;
}

static int make_mark(const struct statistics_place *place, struct error *err)
{
    int fd = open(place->mark, O_WRONLY | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0666);
    if (fd < 0)
        return error_set_errno(err, "%s: cannot make this file", place->mark);
    close(fd);
    return 0;
}

int statistics_place_take(const struct statistics_place *place, struct error *err)
{
    bool there;
    int rc;
    // An empty one is as good as none, and what a crash leaves that comes in front of the mark.
    if (mkdir(place->folder, 0777) == 0 ||
        (errno == EEXIST && rmdir(place->folder) == 0 && !mkdir(place->folder, 0777)))
        return make_mark(place, err);
    if (errno != EEXIST && errno != ENOTEMPTY && errno != ENOTDIR)
        return error_set_errno(err, "%s: cannot make this folder", place->folder);
    if ((rc = file_is_there(&there, place->mark, err)) || there)
        return rc;
    return error_set(err, ERR_USAGE,
                     "%s: this is where --calib works, and what is there is not left by an interrupted run; move it "
                     "away, or name another out_dir",
                     place->folder);
}

// Files alone: what else is in it is not ours and keeps it.
static void remove_folder(const char *path)
{
    char name[PATH_MAX];
    DIR *entries = opendir(path);
    const struct dirent *entry;
    while (entries && (entry = readdir(entries)))
        if (snprintf(name, sizeof name, "%s/%s", path, entry->d_name) < (int)sizeof name)
            unlink(name);
    if (entries)
        closedir(entries);
    rmdir(path);
}

static bool is_ours(const struct statistics_place *place) { return access(place->mark, F_OK) == 0; }

static void remove_mark(const struct statistics_place *place)
{
    unlink(place->mark);
    rmdir(place->folder); // where nothing else is in it
}

void statistics_remove_shards(const struct statistics_place *place)
{
    if (!is_ours(place))
        return;
    remove_folder(place->shards);
    if (!place->own_file)
        remove_mark(place);
}

void statistics_place_remove(const struct statistics_place *place)
{
    char residuals[PATH_MAX];
    if (!is_ours(place))
        return;
    remove_folder(place->shards);
    if (place->own_file) {
        snprintf(residuals, sizeof residuals, "%.*s" CALIBRATION_RESIDUALS,
                 (int)(sizeof residuals - sizeof CALIBRATION_RESIDUALS), place->file);
        unlink(residuals);
        unlink(place->file);
    }
    remove_mark(place);
}

// ---- a file that is there ------------------------------------------------------------------------------------------

static int check_text(const struct calibration_file *file, const char *path, const char *text_path, struct error *err)
{
    uint8_t *text;
    uint64_t bytes;
    int rc = file_read_all(&text, &bytes, text_path, TEXT_CAP_BYTES, ERR_USAGE, err);
    if (rc)
        return rc;
    struct checksum128 hash = checksum_whole(text, bytes);
    free(text);
    if (checksum128_equal(hash, checksum128_from_bytes(calibration_file_header(file)->text)))
        return 0;
    return error_set(err, ERR_USAGE,
                     "%s: these statistics are of another text than %s; leave out --calib to use them, or name another "
                     "file",
                     path, text_path);
}

int statistics_open(struct calibration_file **out, const struct statistics_place *place,
                    const struct statistics_wish *wish, const struct manifest *manifest, struct error *err)
{
    struct calibration_file *file = NULL;
    bool there;
    int rc, fd;
    *out = NULL;
    if (wish->text) { // before anything heavy
        if ((rc = file_open_read(&fd, NULL, wish->text, err)))
            return rc;
        close(fd);
    }
    if ((rc = file_is_there(&there, place->file, err)) || (!there && wish->text))
        return rc;
    rc = calibration_file_open(&file, place->file, err);
    if (rc == ERR_CORRUPT && wish->text) // unfinished: tpengine knows whether it can go on with it
        return 0;
    if (!rc)
        rc = calibrate_check_model(file, manifest, false, place->file, err);
    if (!rc && wish->text)
        rc = check_text(file, place->file, wish->text, err);
    if (rc)
        calibration_file_close(file);
    else
        *out = file;
    return rc;
}

// ---- a capture -----------------------------------------------------------------------------------------------------

// The tpengine beside this program.
static int find_engine(char path[PATH_MAX], struct error *err)
{
    ssize_t length = readlink("/proc/self/exe", path, PATH_MAX - sizeof "tpengine");
    if (length <= 0)
        return error_set_errno(err, "/proc/self/exe: cannot tell where tpshard is");
    path[length] = 0;
    char *slash = strrchr(path, '/');
    strcpy(slash ? slash + 1 : path, "tpengine");
    if (access(path, X_OK) == 0)
        return 0;
    return error_set(err, ERR_USAGE,
                     "%s: not there; --calib needs tpengine beside tpshard, to run the model. Or run tpengine capture "
                     "elsewhere and name its file with --calib-stats",
                     path);
}

// What is there may be cut off anywhere.
static int check_begin(const char *path, struct error *err)
{
    char begin[sizeof CALIBRATION_MAGIC - 1];
    uint64_t bytes;
    bool there;
    int fd, rc = file_is_there(&there, path, err);
    if (rc || !there || (rc = file_open_read(&fd, &bytes, path, err)))
        return rc;
    bytes = bytes < sizeof begin ? bytes : sizeof begin;
    rc = file_pread_full(fd, begin, bytes, 0, path, err);
    close(fd);
    if (rc || memcmp(begin, CALIBRATION_MAGIC, bytes) == 0)
        return rc;
    return error_set(err, ERR_USAGE, "%s: there is a file of this name, and it holds no statistics; name another one",
                     path);
}

int statistics_check(const struct statistics_place *place, const struct statistics_wish *wish, struct error *err)
{
    char engine[PATH_MAX];
    uint64_t bytes;
    int fd, rc;
    if ((rc = find_engine(engine, err)) || (rc = file_open_read(&fd, &bytes, wish->text, err)))
        return rc;
    close(fd);
    if (bytes == 0)
        return error_set(err, ERR_USAGE, "%s: the text is empty", wish->text);
    return check_begin(place->file, err);
}

// The user's settings for other runs of tpengine are not for this one. In place: another thread may have held the environment's lock at the fork.
static void drop_settings(void)
{
    char **kept = environ;
    for (char **entry = environ; *entry; entry++)
        if (strncmp(*entry, "TPENGINE_", strlen("TPENGINE_")) != 0)
            *kept++ = *entry;
    *kept = NULL;
}

static void become_engine(const char *engine, const struct statistics_place *place, const struct statistics_wish *wish)
{
    char tokens[32], threads[32];
    snprintf(tokens, sizeof tokens, "%lld", (long long)wish->tokens);
    snprintf(threads, sizeof threads, "%d", wish->threads);
    const char *const arguments[] = {engine,     "capture",   place->shards, "--text",
                                     wish->text, "--output",  place->file,   "--tokens",
                                     tokens,     "--threads", threads,       wish->quiet ? "--quiet" : NULL,
                                     NULL};
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    int nowhere = open("/dev/null", O_WRONLY | O_CLOEXEC); // the report on stdout is tpshard's alone
    if (nowhere >= 0)
        dup2(nowhere, STDOUT_FILENO);
    drop_settings();
    execv(engine, (char *const *)arguments);
    dprintf(STDERR_FILENO, "%s: cannot be run: %s\n", engine, strerror(errno));
    _exit(127);
}

// Waits for the child; when this process is to stop, so is the child.
static int wait_for(pid_t child, int *status, struct error *err)
{
    const struct timespec pause = {.tv_nsec = 20000000};
    bool told = false;
    for (;;) {
        pid_t ended = waitpid(child, status, WNOHANG);
        if (ended == child)
            return stop_check(err);
        if (ended < 0 && errno != EINTR)
            return error_set_errno(err, "waiting for tpengine capture");
        if (stop_requested() && !told) {
            kill(child, SIGTERM);
            told = true;
        }
        nanosleep(&pause, NULL);
    }
}

int statistics_capture(const struct statistics_place *place, const struct statistics_wish *wish, struct error *err)
{
    char engine[PATH_MAX];
    int rc, status = 0;
    if ((rc = find_engine(engine, err)))
        return rc;
    fflush(NULL);
    pid_t child = fork();
    if (child < 0)
        return error_set_errno(err, "%s: cannot be started", engine);
    if (child == 0)
        become_engine(engine, place, wish);
    if ((rc = wait_for(child, &status, err)) || status == 0)
        return rc;
    if (WIFSIGNALED(status))
        return error_set(err, ERR_OTHER,
                         "tpengine capture was ended by signal %d; the same command goes on behind the last layer that "
                         "it finished",
                         WTERMSIG(status));
    return error_set(
        err, WEXITSTATUS(status) <= 8 ? -WEXITSTATUS(status) : ERR_OTHER,
        "tpengine capture failed with status %d, for the reason above; what runs so far have left is %s and "
        "can be removed",
        WEXITSTATUS(status), place->file);
}
