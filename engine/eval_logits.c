// Logits kept in a file. See eval_logits.h.
#include "engine/eval_logits.h"

#include "formats/checked.h"
#include "formats/checksum.h"
#include "formats/file_io.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static const uint8_t magic[8] = "TPLOGIT1";

struct eval_logits {
    const char *path;
    char temporary[PATH_MAX]; // of a file that is being written; "": none
    int fd;
    struct eval_logits_header header;
    uint64_t row_bytes;
    int64_t done; // rows so far
    struct checksum_stream *sum;
    float *rows; // of a reader
    int64_t capacity;
};

static int new_logits(struct eval_logits **out, const char *path, const struct eval_logits_key *key, struct error *err)
{
    struct eval_logits *logits = calloc(1, sizeof *logits);
    struct checksum_stream *sum = checksum_stream_new();
    if (!logits || !sum) {
        free(logits);
        checksum_stream_free(sum);
        return error_set(err, ERR_MEMORY, "%s: no memory for logits", path);
    }
    logits->path = path;
    logits->fd = -1;
    logits->sum = sum;
    logits->row_bytes = (uint64_t)key->vocab_size * sizeof(float);
    memcpy(logits->header.magic, magic, sizeof magic);
    logits->header.vocab_size = key->vocab_size;
    logits->header.rows = key->rows;
    logits->header.context = key->context;
    logits->header.stride = key->stride;
    logits->header.text = key->text;
    *out = logits;
    return 0;
}

void eval_logits_close(struct eval_logits *logits)
{
    if (!logits)
        return;
    if (logits->fd >= 0)
        close(logits->fd);
    if (logits->temporary[0])
        unlink(logits->temporary);
    checksum_stream_free(logits->sum);
    free(logits->rows);
    free(logits);
}

static uint64_t offset_of(const struct eval_logits *logits, int64_t row)
{
    return sizeof logits->header + (uint64_t)row * logits->row_bytes;
}

// ---- writing ---------------------------------------------------------------------------------------------------

// A file of logits may be replaced; what else stands there is somebody's, or a device.
static int check_place(const char *path, struct error *err)
{
    struct stat there;
    uint8_t found[sizeof magic];
    if (lstat(path, &there))
        return errno == ENOENT ? 0 : error_set_errno(err, "%s", path);
    int fd = S_ISREG(there.st_mode) ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    bool ours =
        fd >= 0 && read(fd, found, sizeof found) == (ssize_t)sizeof found && memcmp(found, magic, sizeof magic) == 0;
    if (fd >= 0)
        close(fd);
    return ours ? 0
                : error_set(err, ERR_IO,
                            "%s is there already and is no file of saved logits: name another one for "
                            "--save-logits",
                            path);
}

int eval_logits_create(struct eval_logits **out, const char *path, const struct eval_logits_key *key, struct error *err)
{
    struct eval_logits *logits;
    uint64_t bytes;
    int rc = check_place(path, err);
    if (rc || (rc = new_logits(&logits, path, key, err)))
        return rc;
    if (!checked_mul((uint64_t)key->rows, logits->row_bytes, &bytes) || bytes > INT64_MAX / 2) {
        rc =
            error_set(err, ERR_USAGE, "%s: %lld rows of logits are more than a file holds", path, (long long)key->rows);
        goto fail;
    }
    int length = snprintf(logits->temporary, sizeof logits->temporary, "%s.tmp-%ld", path, (long)getpid());
    if (length < 0 || (size_t)length >= sizeof logits->temporary) {
        logits->temporary[0] = 0;
        errno = ENAMETOOLONG;
        rc = error_set_errno(err, "%s", path);
        goto fail;
    }
    logits->fd = open(logits->temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (logits->fd < 0) {
        logits->temporary[0] = 0;
        rc = error_set_errno(err, "%s", path);
        goto fail;
    }
    if ((rc = file_take_space(logits->fd, offset_of(logits, key->rows), path, err)))
        goto fail;
    *out = logits;
    return 0;
fail:
    eval_logits_close(logits);
    return rc;
}

int eval_logits_write(struct eval_logits *logits, const float *rows, int64_t count, struct error *err)
{
    uint64_t bytes = (uint64_t)count * logits->row_bytes;
    int rc = file_pwrite_full(logits->fd, rows, bytes, offset_of(logits, logits->done), logits->path, err);
    if (rc)
        return rc;
    checksum_stream_update(logits->sum, rows, bytes);
    logits->done += count;
    return 0;
}

int eval_logits_finish(struct eval_logits *logits, struct error *err)
{
    int rc;
    if (logits->done != logits->header.rows)
        return error_set(err, ERR_OTHER, "%s: %lld of %lld rows of logits were written", logits->path,
                         (long long)logits->done, (long long)logits->header.rows);
    checksum128_to_bytes(checksum_stream_final(logits->sum), logits->header.checksum);
    if ((rc = file_pwrite_full(logits->fd, &logits->header, sizeof logits->header, 0, logits->path, err)) ||
        (rc = file_sync(logits->fd, logits->path, err)))
        return rc;
    if (rename(logits->temporary, logits->path))
        return error_set_errno(err, "%s", logits->path);
    logits->temporary[0] = 0;
    return 0;
}

// ---- reading ---------------------------------------------------------------------------------------------------

static int check_header(const struct eval_logits *logits, const struct eval_logits_header *found, uint64_t bytes,
                        struct error *err)
{
    const struct eval_logits_header *wanted = &logits->header;
    if (memcmp(found->magic, magic, sizeof magic) != 0 || found->reserved != 0)
        return error_set(err, ERR_CORRUPT, "%s: not a file of eval --save-logits", logits->path);
    if (found->vocab_size != wanted->vocab_size)
        return error_set(err, ERR_USAGE,
                         "%s: logits of a vocabulary of %u tokens, and the model's has %u: they cannot be compared",
                         logits->path, found->vocab_size, wanted->vocab_size);
    if (found->context != wanted->context || found->stride != wanted->stride)
        return error_set(err, ERR_USAGE,
                         "%s: made with --context %lld --stride %lld, and this is with --context %lld --stride %lld",
                         logits->path, (long long)found->context, (long long)found->stride, (long long)wanted->context,
                         (long long)wanted->stride);
    if (found->rows != wanted->rows || found->text != wanted->text)
        return error_set(
            err, ERR_USAGE,
            "%s: made from other tokens than these (%lld scored there, %lld here); use the same --text and "
            "--max-tokens",
            logits->path, (long long)found->rows, (long long)wanted->rows);
    if (bytes != offset_of(logits, wanted->rows))
        return error_set(err, ERR_CORRUPT, "%s: %llu bytes, and %lld rows of logits need %llu", logits->path,
                         (unsigned long long)bytes, (long long)wanted->rows,
                         (unsigned long long)offset_of(logits, wanted->rows));
    return 0;
}

int eval_logits_open(struct eval_logits **out, const char *path, const struct eval_logits_key *key, struct error *err)
{
    struct eval_logits *logits;
    struct eval_logits_header found;
    uint64_t bytes;
    int rc = new_logits(&logits, path, key, err);
    if (rc)
        return rc;
    if ((rc = file_open_read(&logits->fd, &bytes, path, err)))
        goto fail;
    if (bytes < sizeof found) {
        rc = error_set(err, ERR_CORRUPT, "%s: not a file of eval --save-logits", path);
        goto fail;
    }
    if ((rc = file_pread_full(logits->fd, &found, sizeof found, 0, path, err)) ||
        (rc = check_header(logits, &found, bytes, err)))
        goto fail;
    logits->header = found;
    *out = logits;
    return 0;
fail:
    eval_logits_close(logits);
    return rc;
}

int eval_logits_read(struct eval_logits *logits, int64_t count, const float **rows, struct error *err)
{
    uint64_t bytes = (uint64_t)count * logits->row_bytes;
    if (count > logits->header.rows - logits->done)
        return error_set(err, ERR_OTHER, "%s: more rows are wanted than there are", logits->path);
    if (count > logits->capacity) {
        float *larger = realloc(logits->rows, bytes);
        if (!larger)
            return error_set(err, ERR_MEMORY, "%s: no memory for %lld rows of logits", logits->path, (long long)count);
        logits->rows = larger;
        logits->capacity = count;
    }
    int rc = file_pread_full(logits->fd, logits->rows, bytes, offset_of(logits, logits->done), logits->path, err);
    if (rc)
        return rc;
    checksum_stream_update(logits->sum, logits->rows, bytes);
    logits->done += count;
    *rows = logits->rows;
    return 0;
}

int eval_logits_check(const struct eval_logits *logits, struct error *err)
{
    if (!checksum128_equal(checksum_stream_final(logits->sum), checksum128_from_bytes(logits->header.checksum)))
        return error_set(err, ERR_CORRUPT, "%s: damaged: its logits are not those of its checksum; save them again",
                         logits->path);
    return 0;
}
