// Files: opened without ever blocking, read and written in full, replaced as a whole. See file_io.h.
#include "formats/file_io.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "formats/checked.h"

static int require_regular(const struct stat *status, const char *path, struct error *err)
{
    const char *kind = S_ISDIR(status->st_mode)    ? "a directory"
                       : S_ISFIFO(status->st_mode) ? "a FIFO"
                       : S_ISSOCK(status->st_mode) ? "a socket"
                                                   : "a device";
    if (S_ISREG(status->st_mode))
        return 0;
    return error_set(err, ERR_IO, "%s: is %s, a regular file is needed", path, kind);
}

int file_open_read(int *fd_out, uint64_t *file_bytes, const char *path, struct error *err)
{
    int rc;
    struct stat status;
    // Asked before opening, because to open a device can act on it; and again after, because the name may have
    // come to mean another file. O_NONBLOCK lets the opening of a FIFO return.
    if (stat(path, &status))
        return error_set_errno(err, "%s: cannot open", path);
    if ((rc = require_regular(&status, path, err)))
        return rc;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
    if (fd < 0)
        return error_set_errno(err, "%s: cannot open", path);
    if (fstat(fd, &status)) {
        rc = error_set_errno(err, "%s: cannot stat", path);
        goto fail;
    }
    if ((rc = require_regular(&status, path, err)))
        goto fail;
    *fd_out = fd;
    if (file_bytes)
        *file_bytes = (uint64_t)status.st_size;
    return 0;
fail:
    close(fd);
    return rc;
}

int file_is_there(bool *there, const char *path, struct error *err)
{
    struct stat status;
    *there = lstat(path, &status) == 0;
    return *there || errno == ENOENT || errno == ENOTDIR ? 0
                                                         : error_set_errno(err, "%s: cannot look at the file", path);
}

// The kernel's offsets are signed.
static int check_extent(uint64_t num_bytes, uint64_t offset, const char *path, struct error *err)
{
    if (checked_range(offset, num_bytes, INT64_MAX))
        return 0;
    return error_set(err, ERR_IO, "%s: %llu bytes at offset %llu lie beyond any file", path,
                     (unsigned long long)num_bytes, (unsigned long long)offset);
}

int file_pread_full(int fd, void *buffer, uint64_t num_bytes, uint64_t offset, const char *path, struct error *err)
{
    int rc = check_extent(num_bytes, offset, path, err);
    if (rc)
        return rc;
    for (uint64_t done = 0; done < num_bytes;) {
        ssize_t got = pread(fd, (char *)buffer + done, num_bytes - done, (off_t)(offset + done));
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return error_set_errno(err, "%s: cannot read %llu bytes at offset %llu", path,
                                   (unsigned long long)(num_bytes - done), (unsigned long long)(offset + done));
        if (got == 0)
            return error_set(err, ERR_IO, "%s: the file shrank: it ends at byte %llu, bytes up to %llu are needed",
                             path, (unsigned long long)(offset + done), (unsigned long long)(offset + num_bytes));
        done += (uint64_t)got;
    }
    return 0;
}

int file_pwrite_full(int fd, const void *buffer, uint64_t num_bytes, uint64_t offset, const char *path,
                     struct error *err)
{
    int rc = check_extent(num_bytes, offset, path, err);
    if (rc)
        return rc;
    for (uint64_t done = 0; done < num_bytes;) {
        ssize_t put = pwrite(fd, (const char *)buffer + done, num_bytes - done, (off_t)(offset + done));
        if (put < 0 && errno == EINTR)
            continue;
        if (put < 0)
            return error_set_errno(err, "%s: cannot write %llu bytes at offset %llu", path,
                                   (unsigned long long)(num_bytes - done), (unsigned long long)(offset + done));
        if (put == 0)
            return error_set(err, ERR_IO, "%s: the operating system writes nothing at offset %llu", path,
                             (unsigned long long)(offset + done));
        done += (uint64_t)put;
    }
    return 0;
}

int file_read_all(uint8_t **out, uint64_t *num_bytes, const char *path, uint64_t cap_bytes, int too_large_code,
                  struct error *err)
{
    int rc, fd;
    uint64_t file_bytes;
    if ((rc = file_open_read(&fd, &file_bytes, path, err)))
        return rc;
    uint8_t *bytes = NULL;
    if (file_bytes > cap_bytes) {
        rc = error_set(err, too_large_code, "%s: has %llu bytes, at most %llu are accepted", path,
                       (unsigned long long)file_bytes, (unsigned long long)cap_bytes);
        goto fail;
    }
    if (!(bytes = malloc(file_bytes + 1))) {
        rc = error_set(err, ERR_MEMORY, "%s: no memory for %llu bytes", path, (unsigned long long)file_bytes);
        goto fail;
    }
    if ((rc = file_pread_full(fd, bytes, file_bytes, 0, path, err)))
        goto fail;
    bytes[file_bytes] = 0;
    close(fd);
    *out = bytes;
    *num_bytes = file_bytes;
    return 0;
fail:
    free(bytes);
    close(fd);
    return rc;
}

int file_take_space(int fd, uint64_t num_bytes, const char *path, struct error *err)
{
    int failed;
    if (ftruncate(fd, (off_t)num_bytes))
        return error_set_errno(err, "%s: cannot give it %llu bytes", path, (unsigned long long)num_bytes);
    do {
        failed = fallocate(fd, 0, 0, (off_t)num_bytes);
    } while (failed && errno == EINTR);
    if (failed && errno != EOPNOTSUPP && errno != ENOSYS)
        return error_set_errno(err, "%s: cannot take %llu bytes of disk", path, (unsigned long long)num_bytes);
    return 0;
}

int file_sync(int fd, const char *path, struct error *err)
{
    return fdatasync(fd) ? error_set_errno(err, "%s: cannot sync", path) : 0;
}

static int sync_dir_fd(int dir_fd, const char *dir_path, struct error *err)
{
    if (fsync(dir_fd) && errno != EINVAL && errno != ENOTSUP)
        return error_set_errno(err, "%s: cannot sync the directory", dir_path);
    return 0;
}

static int open_dir(int *dir_fd, const char *dir_path, struct error *err)
{
    *dir_fd = open(dir_path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    return *dir_fd < 0 ? error_set_errno(err, "%s: cannot open the directory", dir_path) : 0;
}

int file_sync_dir(const char *dir_path, struct error *err)
{
    int dir_fd, rc = open_dir(&dir_fd, dir_path, err);
    if (rc)
        return rc;
    rc = sync_dir_fd(dir_fd, dir_path, err);
    close(dir_fd);
    return rc;
}

// Creates a file in dir_fd, filled and synced. path is the name it will have, for messages.
static int write_temporary(int dir_fd, const char *temporary, const void *bytes, uint64_t num_bytes, const char *path,
                           struct error *err)
{
    int fd = openat(dir_fd, temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0666);
    if (fd < 0)
        return error_set_errno(err, "%s: cannot create %s beside it", path, temporary);
    int rc = file_pwrite_full(fd, bytes, num_bytes, 0, path, err);
    if (!rc && fsync(fd))
        rc = error_set_errno(err, "%s: cannot sync", path);
    if (close(fd) && !rc) // network file systems report a failed write here
        rc = error_set_errno(err, "%s: cannot close", path);
    return rc;
}

int file_write_atomic(const char *dir_path, const char *name, const void *bytes, uint64_t num_bytes, struct error *err)
{
    static atomic_uint counter; // threads of one process do not share temporary names
    char path[4096], temporary[256];
    int length = snprintf(temporary, sizeof temporary, ".%s.tmp-%ld-%u", name, (long)getpid(), counter++);
    if (!*name || strchr(name, '/') || length >= (int)sizeof temporary)
        return error_set(err, ERR_IO, "%s: '%s' cannot be the name of a new file", dir_path, name);
    snprintf(path, sizeof path, "%s/%s", dir_path, name);
    int dir_fd, rc = open_dir(&dir_fd, dir_path, err);
    if (rc)
        return rc;
    unlinkat(dir_fd, temporary, 0); // a crashed process may have had the same id
    rc = write_temporary(dir_fd, temporary, bytes, num_bytes, path, err);
    if (!rc && renameat(dir_fd, temporary, dir_fd, name))
        rc = error_set_errno(err, "%s: cannot rename %s to it", path, temporary);
    if (rc)
        unlinkat(dir_fd, temporary, 0);
    else
        rc = sync_dir_fd(dir_fd, dir_path, err);
    close(dir_fd);
    return rc;
}
