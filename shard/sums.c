// See sums.h. A list is a line for each file: 64 hexadecimal digits, a blank, a blank or an asterisk, the name.
#include "shard/sums.h"

#include "formats/file_io.h"
#include "formats/memory_stream.h"
#include "shard/output_dir.h"
#include "shard/pool_error.h"
#include "shard/stop.h"

#include <limits.h>
#include <openssl/evp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { SHA256_BYTES = 32, HEX_DIGITS = 2 * SHA256_BYTES, PIECE_BYTES = 1 << 20, LIST_CAP_BYTES = 16 << 20 };

struct sum {
    const char *name;
    char hex[HEX_DIGITS + 1]; // of the file as it is
    struct error refused;     // why there is none; code 0: there is
};

struct sums_job {
    const char *dir;
    struct sum *sums; // sorted by name
    size_t count;
    struct progress *progress;
};

// ---- hashing -----------------------------------------------------------------------------------------------------

static int hash_pieces(EVP_MD_CTX *context, int fd, uint64_t file_bytes, uint8_t *piece, const char *path,
                       struct sums_job *job, bool shows, struct error *err)
{
    int rc = 0;
    for (uint64_t at = 0; !rc && at < file_bytes;) {
        uint64_t bytes = file_bytes - at < PIECE_BYTES ? file_bytes - at : PIECE_BYTES;
        if ((rc = stop_check(err)) || (rc = file_pread_full(fd, piece, bytes, at, path, err)))
            break;
        if (!EVP_DigestUpdate(context, piece, bytes))
            rc = error_set(err, ERR_OTHER, "%s: libcrypto cannot hash it", path);
        at += bytes;
        progress_add(job->progress, bytes);
        if (shows)
            progress_show(job->progress);
    }
    return rc;
}

static int hash_file(struct sum *sum, struct sums_job *job, bool shows, struct error *err)
{
    char path[2 * PATH_MAX];
    uint8_t digest[SHA256_BYTES], *piece = malloc(PIECE_BYTES);
    EVP_MD_CTX *context = EVP_MD_CTX_new();
    uint64_t file_bytes;
    int fd = -1, rc = 0;
    snprintf(path, sizeof path, "%s/%s", job->dir, sum->name);
    if (!piece || !context)
        rc = error_set(err, ERR_MEMORY, "%s: out of memory to hash it", path);
    else if (!EVP_DigestInit_ex(context, EVP_sha256(), NULL))
        rc = error_set(err, ERR_OTHER, "%s: libcrypto offers no SHA-256", path);
    if (!rc && !(rc = file_open_read(&fd, &file_bytes, path, err)))
        rc = hash_pieces(context, fd, file_bytes, piece, path, job, shows, err);
    if (!rc && !EVP_DigestFinal_ex(context, digest, NULL))
        rc = error_set(err, ERR_OTHER, "%s: libcrypto cannot hash it", path);
    for (int i = 0; !rc && i < SHA256_BYTES; i++)
        snprintf(sum->hex + 2 * (size_t)i, 3, "%02x", digest[i]);
    if (fd >= 0)
        close(fd);
    EVP_MD_CTX_free(context);
    free(piece);
    return rc;
}

static void hash_task(void *arg, int64_t task, int thread)
{
    struct sums_job *job = arg;
    struct error err;
    if (!stop_requested() && hash_file(&job->sums[task], job, thread == 0, &err))
        job->sums[task].refused = err;
}

static int compare_sums(const void *a, const void *b)
{
    return strcmp(((const struct sum *)a)->name, ((const struct sum *)b)->name);
}

// The manifest and what it names, sorted and hashed.
static int hash_all(struct sums_job *job, const struct manifest *manifest, const char *dir, struct thread_pool *pool,
                    struct progress *progress, struct error *err)
{
    *job = (struct sums_job){.dir = dir, .progress = progress};
    if (!(job->sums = calloc(1 + manifest->num_ranks + manifest->num_extras, sizeof *job->sums)))
        return error_set(err, ERR_MEMORY, "%s: out of memory", dir);
    job->sums[job->count++].name = MANIFEST_FILE_NAME;
    for (size_t i = 0; i < manifest->num_ranks; i++)
        job->sums[job->count++].name = manifest->ranks[i].name;
    for (size_t i = 0; i < manifest->num_extras; i++)
        job->sums[job->count++].name = manifest->extras[i].name;
    qsort(job->sums, job->count, sizeof *job->sums, compare_sums);
    thread_pool_run(pool, hash_task, job, (int64_t)job->count);
    int rc = stop_check(err);
    for (size_t i = 0; !rc && i < job->count; i++)
        if (job->sums[i].refused.code == ERR_MEMORY ||
            job->sums[i].refused.code == ERR_OTHER) { // says nothing of the file
            *err = job->sums[i].refused;
            rc = err->code;
        }
    return rc;
}

int sums_bytes(uint64_t *out, const struct manifest *manifest, const char *dir, struct error *err)
{
    char path[2 * PATH_MAX];
    struct stat status;
    snprintf(path, sizeof path, "%s/" MANIFEST_FILE_NAME, dir);
    if (stat(path, &status))
        return error_set_errno(err, "%s: cannot look at it", path);
    *out = verify_bytes(manifest) + (uint64_t)status.st_size;
    return 0;
}

// ---- writing -----------------------------------------------------------------------------------------------------

// Is this the list that stands there? One that cannot be read is another one.
static bool is_list(const char *dir, const char *text)
{
    char path[2 * PATH_MAX];
    struct error ignored;
    uint8_t *old;
    uint64_t num_bytes;
    snprintf(path, sizeof path, "%s/" SUMS_FILE_NAME, dir);
    if (file_read_all(&old, &num_bytes, path, LIST_CAP_BYTES, ERR_CORRUPT, &ignored))
        return false;
    bool same = num_bytes == strlen(text) && memcmp(old, text, num_bytes) == 0;
    free(old);
    return same;
}

int sums_write(bool *changed, const struct manifest *manifest, const char *dir, struct thread_pool *pool,
               struct progress *progress, struct error *err)
{
    struct sums_job job;
    struct memory_stream list = {0};
    char *text = NULL;
    int rc = hash_all(&job, manifest, dir, pool, progress, err);
    for (size_t i = 0; !rc && i < job.count; i++) {
        if (job.sums[i].refused.code) {
            *err = job.sums[i].refused;
            rc = err->code;
        } else if (strchr(job.sums[i].name, '\\')) { // such a line has a spelling of its own
            rc = error_set(err, ERR_CORRUPT, "%s: a name with a backslash cannot be listed: %s", dir, job.sums[i].name);
        }
    }
    if (!rc) {
        bool open = memory_stream_open(&list);
        for (size_t i = 0; open && i < job.count; i++)
            fprintf(list.out, "%s  %s\n", job.sums[i].hex, job.sums[i].name);
        if (!open || !(text = memory_stream_close(&list, NULL)))
            rc = error_set(err, ERR_MEMORY, "%s: out of memory for the list", dir);
        else if ((*changed = !is_list(dir, text)))
            rc = file_write_atomic(dir, SUMS_FILE_NAME, text, strlen(text), err);
    }
    free(text);
    free(job.sums);
    return rc;
}

// ---- comparing ---------------------------------------------------------------------------------------------------

static bool is_hex(const char *text) { return strspn(text, "0123456789abcdef") >= HEX_DIGITS; }

__attribute__((format(printf, 2, 3))) static void note(struct verify_findings *findings, const char *fmt, ...)
{
    char text[ERROR_MSG_BYTES];
    struct error found;
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    error_set(&found, ERR_CORRUPT, "%s", text);
    verify_note(findings, &found);
}

// Compares one line, which ends with NUL; listed [job->count] tells which files have had theirs.
static void check_line(const struct sums_job *job, char *line, bool *listed, struct verify_findings *findings)
{
    size_t length = strlen(line);
    if (!is_hex(line) || length < HEX_DIGITS + 3 || line[HEX_DIGITS] != ' ' ||
        (line[HEX_DIGITS + 1] != ' ' && line[HEX_DIGITS + 1] != '*')) {
        note(findings, "%s/" SUMS_FILE_NAME ": a line is not a SHA-256 and a name: %.80s", job->dir, line);
        return;
    }
    struct sum wanted = {.name = line + HEX_DIGITS + 2};
    struct sum *sum = bsearch(&wanted, job->sums, job->count, sizeof wanted, compare_sums);
    if (!sum) {
        note(findings, "%s/" SUMS_FILE_NAME ": it names %s, which " MANIFEST_FILE_NAME " does not", job->dir,
             wanted.name);
        return;
    }
    if (listed[sum - job->sums])
        note(findings, "%s/" SUMS_FILE_NAME ": it names %s twice", job->dir, wanted.name);
    listed[sum - job->sums] = true;
    if (sum->refused.code)
        verify_note(findings, &sum->refused);
    else if (memcmp(sum->hex, line, HEX_DIGITS) != 0)
        note(findings, "%s/%s: its SHA-256 is %s, " SUMS_FILE_NAME " says %.64s", job->dir, sum->name, sum->hex, line);
}

static void check_list(const struct sums_job *job, char *text, uint64_t num_bytes, bool *listed,
                       struct verify_findings *findings)
{
    if (strlen(text) != num_bytes) {
        note(findings, "%s/" SUMS_FILE_NAME ": it holds a NUL byte", job->dir);
        return;
    }
    for (char *line = text, *end; *line; line = end) {
        end = strchr(line, '\n');
        end = end ? end : line + strlen(line);
        if (*end)
            *end++ = 0;
        check_line(job, line, listed, findings);
    }
    for (size_t i = 0; i < job->count; i++)
        if (!listed[i])
            note(findings, "%s/" SUMS_FILE_NAME ": it does not name %s", job->dir, job->sums[i].name);
}

// Files of names that tpshard writes, and that belong to no model here: nothing reads them, but whoever looks may take them for part of it.
static int check_strays(const struct sums_job *job, struct verify_findings *findings, struct error *err)
{
    DIR *dir = opendir(job->dir);
    if (!dir)
        return error_set_errno(err, "%s: cannot read the directory", job->dir);
    int rc;
    for (const struct dirent *entry; !(rc = output_dir_next(&entry, dir, job->dir, err)) && entry;) {
        struct sum wanted = {.name = entry->d_name};
        if (output_dir_is_own_name(entry->d_name) &&
            strncmp(entry->d_name, SUMS_FILE_NAME, strlen(SUMS_FILE_NAME)) != 0 &&
            !bsearch(&wanted, job->sums, job->count, sizeof wanted, compare_sums))
            note(findings, "%s/%s: " MANIFEST_FILE_NAME " does not name it", job->dir, entry->d_name);
    }
    closedir(dir);
    return rc;
}

int sums_verify(const struct manifest *manifest, const char *dir, struct thread_pool *pool, struct progress *progress,
                struct verify_findings *findings, struct error *err)
{
    struct sums_job job = {0};
    char path[2 * PATH_MAX];
    uint8_t *text = NULL;
    uint64_t num_bytes = 0;
    bool *listed = NULL, there;
    int rc;
    snprintf(path, sizeof path, "%s/" SUMS_FILE_NAME, dir);
    if ((rc = file_is_there(&there, path, err)))
        return rc;
    if (!there)
        return error_set(err, ERR_CORRUPT,
                         "%s: there is no such list; tpshard sums writes one where files are published", path);
    if ((rc = file_read_all(&text, &num_bytes, path, LIST_CAP_BYTES, ERR_CORRUPT, err)) ||
        (rc = hash_all(&job, manifest, dir, pool, progress, err)))
        goto done;
    if (!(listed = calloc(job.count, sizeof *listed))) {
        rc = error_set(err, ERR_MEMORY, "%s: out of memory", dir);
        goto done;
    }
    check_list(&job, (char *)text, num_bytes, listed, findings);
    rc = check_strays(&job, findings, err);
done:
    free(listed);
    free(job.sums);
    free(text);
    return rc;
}
