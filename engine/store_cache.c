// See store_cache.h.
#include "engine/store_cache.h"

#include "formats/checked.h"
#include "formats/file_io.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#define LOCK_FILE_NAME ".tpshard-cache.lock"

void store_cache_name(char *name, const struct manifest *manifest, uint32_t rank)
{
    char contract[CHECKSUM128_HEX_DIGITS + 1], hash[CHECKSUM128_HEX_DIGITS + 1];
    checksum128_to_hex(manifest->contract, contract);
    checksum128_to_hex(manifest->ranks[rank].hash, hash);
    snprintf(name, STORE_CACHE_NAME_BYTES, "%s-rank-%02" PRIu32 "-of-%02" PRIu32 "-%" PRIu64 "-%s.tpshard", contract,
             rank, manifest->tp_size, manifest->ranks[rank].bytes, hash);
}

// ---- names ---------------------------------------------------------------------------------------------------------

enum kind { OTHER, ENTRY, PART };

static bool skip_hex(const char **c)
{
    bool whole = strspn(*c, "0123456789abcdef") == CHECKSUM128_HEX_DIGITS;
    *c += whole ? CHECKSUM128_HEX_DIGITS : 0;
    return whole;
}

static bool skip_number(const char **c, uint64_t *value)
{
    char *end;
    if (**c < '0' || **c > '9')
        return false;
    *value = strtoull(*c, &end, 10);
    *c = end;
    return true;
}

static bool skip_text(const char **c, const char *text)
{
    bool there = strncmp(*c, text, strlen(text)) == 0;
    *c += there ? strlen(text) : 0;
    return there;
}

// Only a name that this file makes is ENTRY or PART.
static enum kind kind_of(const char *name, uint64_t *file_bytes)
{
    const char *c = name + (*name == '.');
    uint64_t number;
    if (!skip_hex(&c) || !skip_text(&c, "-rank-") || !skip_number(&c, &number) || !skip_text(&c, "-of-") ||
        !skip_number(&c, &number) || !skip_text(&c, "-") || !skip_number(&c, file_bytes) || !skip_text(&c, "-") ||
        !skip_hex(&c) || !skip_text(&c, ".tpshard"))
        return OTHER;
    if (*name != '.')
        return *c ? OTHER : ENTRY;
    return skip_text(&c, ".") && skip_number(&c, &number) && skip_text(&c, "-") && skip_number(&c, &number) &&
                   strcmp(c, ".part") == 0
               ? PART
               : OTHER;
}

// ---- entries -------------------------------------------------------------------------------------------------------

static int open_dir(const char *dir) { return open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC); }

int store_cache_open(const char *dir, const char *name, uint64_t file_bytes)
{
    struct stat status;
    int dir_fd = open_dir(dir);
    if (dir_fd < 0)
        return -1;
    int fd = openat(dir_fd, name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    close(dir_fd);
    if (fd < 0)
        return -1;
    if (fstat(fd, &status) || !S_ISREG(status.st_mode) || (uint64_t)status.st_size != file_bytes) {
        close(fd);
        return -1;
    }
    futimens(fd, NULL); // a cache of another user's is used as it is
    return fd;
}

void store_cache_drop(const char *dir, const char *name, int fd)
{
    struct stat ours, there;
    int dir_fd = open_dir(dir);
    if (dir_fd < 0)
        return;
    if (fstat(fd, &ours) == 0 && fstatat(dir_fd, name, &there, AT_SYMLINK_NOFOLLOW) == 0 &&
        ours.st_dev == there.st_dev && ours.st_ino == there.st_ino)
        unlinkat(dir_fd, name, 0);
    close(dir_fd);
}

// ---- room ----------------------------------------------------------------------------------------------------------

struct entry {
    char name[NAME_MAX + 1];
    uint64_t bytes;
    struct timespec used;
};

struct listing {
    struct entry *entries;
    size_t count, capacity;
    uint64_t bytes, filling_bytes; // of all entries; of those that others are filling
};

// Whether the process that filled it is gone; if so, so is the file.
static bool clear_part(int dir_fd, const char *name)
{
    int fd = openat(dir_fd, name, O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (fd < 0)
        return false;
    bool gone = flock(fd, LOCK_EX | LOCK_NB) == 0;
    if (gone)
        unlinkat(dir_fd, name, 0);
    close(fd);
    return gone;
}

static int list_file(struct listing *list, int dir_fd, const char *name, struct error *err)
{
    uint64_t named_bytes;
    struct stat status;
    enum kind kind = kind_of(name, &named_bytes);
    if (kind == OTHER || fstatat(dir_fd, name, &status, AT_SYMLINK_NOFOLLOW) || !S_ISREG(status.st_mode))
        return 0;
    if (kind == PART) {
        list->filling_bytes += clear_part(dir_fd, name) ? 0 : (uint64_t)status.st_size;
        return 0;
    }
    if ((uint64_t)status.st_size != named_bytes)
        return 0;
    if (list->count == list->capacity) {
        size_t capacity = list->capacity ? 2 * list->capacity : 64;
        struct entry *larger = realloc(list->entries, capacity * sizeof *larger);
        if (!larger)
            return error_set(err, ERR_MEMORY, "no memory for the list of the cache's files");
        list->entries = larger;
        list->capacity = capacity;
    }
    struct entry *entry = &list->entries[list->count++];
    strcpy(entry->name, name);
    entry->bytes = named_bytes;
    entry->used = status.st_mtim;
    list->bytes += named_bytes;
    return 0;
}

static int compare_use(const void *a, const void *b)
{
    const struct timespec *x = &((const struct entry *)a)->used, *y = &((const struct entry *)b)->used;
    if (x->tv_sec != y->tv_sec)
        return x->tv_sec < y->tv_sec ? -1 : 1;
    return (x->tv_nsec > y->tv_nsec) - (x->tv_nsec < y->tv_nsec);
}

// The lock of the cache is held.
static int make_room(int dir_fd, const char *dir, uint64_t file_bytes, uint64_t limit_bytes, struct error *err)
{
    struct listing list = {0};
    int rc = 0, copy = fcntl(dir_fd, F_DUPFD_CLOEXEC, 0);
    DIR *stream = copy < 0 ? NULL : fdopendir(copy);
    if (!stream) {
        if (copy >= 0)
            close(copy);
        return error_set_errno(err, "%s: cannot list the cache", dir);
    }
    for (const struct dirent *found; !rc && (found = readdir(stream));)
        rc = list_file(&list, dir_fd, found->d_name, err);
    closedir(stream);
    if (!rc && limit_bytes && list.filling_bytes + file_bytes > limit_bytes)
        rc = error_set(err, ERR_IO, "%s: %" PRIu64 " bytes more do not fit into the cache's limit of %" PRIu64, dir,
                       file_bytes, limit_bytes);
    if (!rc && limit_bytes && list.count) {
        qsort(list.entries, list.count, sizeof *list.entries, compare_use);
        for (size_t i = 0; i < list.count && list.bytes + list.filling_bytes + file_bytes > limit_bytes; i++)
            if (unlinkat(dir_fd, list.entries[i].name, 0) == 0)
                list.bytes -= list.entries[i].bytes;
    }
    free(list.entries);
    return rc;
}

// ---- filling -------------------------------------------------------------------------------------------------------

struct extent {
    uint64_t begin, end;
};

struct store_cache_fill {
    int dir_fd, fd;
    char *path; // of the entry, for messages
    char name[STORE_CACHE_NAME_BYTES], part_name[STORE_CACHE_NAME_BYTES + 48];
    uint64_t file_bytes;
    bool done;
    pthread_mutex_t mutex;
    struct extent *extents; // what is there: in order, none touching the next
    size_t num_extents, capacity;
};

static int begin_part(struct store_cache_fill *fill, const char *dir, int64_t limit_bytes, struct error *err)
{
    static atomic_uint counter;
    int rc, lock_fd = openat(fill->dir_fd, LOCK_FILE_NAME, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0666);
    if (lock_fd < 0 || flock(lock_fd, LOCK_EX)) {
        rc = error_set_errno(err, "%s: cannot lock the cache", dir);
        goto done;
    }
    if ((rc = make_room(fill->dir_fd, dir, fill->file_bytes, (uint64_t)limit_bytes, err)))
        goto done;
    snprintf(fill->part_name, sizeof fill->part_name, ".%s.%ld-%u.part", fill->name, (long)getpid(), counter++);
    fill->fd = openat(fill->dir_fd, fill->part_name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0666);
    if (fill->fd < 0 || flock(fill->fd, LOCK_EX | LOCK_NB) || ftruncate(fill->fd, (off_t)fill->file_bytes))
        rc = error_set_errno(err, "%s: cannot write to the cache", dir);
done:
    if (lock_fd >= 0)
        close(lock_fd);
    return rc;
}

int store_cache_fill_begin(struct store_cache_fill **out, const char *dir, const char *name, uint64_t file_bytes,
                           int64_t limit_bytes, struct error *err)
{
    int rc;
    struct store_cache_fill *fill = calloc(1, sizeof *fill);
    if (!fill)
        return error_set(err, ERR_MEMORY, "%s: no memory for the cache", dir);
    *fill = (struct store_cache_fill){.dir_fd = -1, .fd = -1, .file_bytes = file_bytes};
    pthread_mutex_init(&fill->mutex, NULL);
    snprintf(fill->name, sizeof fill->name, "%s", name);
    if (asprintf(&fill->path, "%s/%s", dir, name) < 0) {
        fill->path = NULL;
        rc = error_set(err, ERR_MEMORY, "%s: no memory for the cache", dir);
        goto fail;
    }
    if ((mkdir(dir, 0777) && errno != EEXIST) || (fill->dir_fd = open_dir(dir)) < 0) {
        rc = error_set_errno(err, "%s: cannot use the cache", dir);
        goto fail;
    }
    if ((rc = begin_part(fill, dir, limit_bytes, err)))
        goto fail;
    *out = fill;
    return 0;
fail:
    store_cache_fill_end(fill);
    return rc;
}

// Puts an extent in, joining it with those that it touches or overlaps.
static int add_extent(struct store_cache_fill *fill, struct extent new)
{
    struct extent *all = fill->extents;
    size_t first = 0, behind;
    while (first < fill->num_extents && all[first].end < new.begin)
        first++;
    for (behind = first; behind < fill->num_extents && all[behind].begin <= new.end; behind++) {
        new.begin = all[behind].begin < new.begin ? all[behind].begin : new.begin;
        new.end = all[behind].end > new.end ? all[behind].end : new.end;
    }
    if (behind == first && fill->num_extents == fill->capacity) {
        size_t capacity = fill->capacity ? 2 * fill->capacity : 64;
        if (!(all = realloc(all, capacity * sizeof *all)))
            return -1;
        fill->extents = all;
        fill->capacity = capacity;
    }
    memmove(all + first + 1, all + behind, (fill->num_extents - behind) * sizeof *all);
    all[first] = new;
    fill->num_extents += 1 + first - behind;
    return 0;
}

int store_cache_fill_add(struct store_cache_fill *fill, const void *bytes, uint64_t num_bytes, uint64_t offset,
                         struct error *err)
{
    if (!num_bytes || !checked_range(offset, num_bytes, fill->file_bytes))
        return 0;
    int rc = file_pwrite_full(fill->fd, bytes, num_bytes, offset, fill->path, err);
    if (rc)
        return rc;
    pthread_mutex_lock(&fill->mutex);
    if (add_extent(fill, (struct extent){offset, offset + num_bytes}))
        rc = error_set(err, ERR_MEMORY, "%s: no memory for the cache", fill->path);
    bool whole = !rc && !fill->done && fill->extents[0].begin == 0 && fill->extents[0].end == fill->file_bytes;
    if (whole && renameat(fill->dir_fd, fill->part_name, fill->dir_fd, fill->name))
        rc = error_set_errno(err, "%s: cannot be given its name", fill->path);
    fill->done |= whole && !rc;
    pthread_mutex_unlock(&fill->mutex);
    return rc;
}

void store_cache_fill_end(struct store_cache_fill *fill)
{
    if (!fill)
        return;
    if (fill->fd >= 0 && !fill->done)
        unlinkat(fill->dir_fd, fill->part_name, 0);
    if (fill->fd >= 0)
        close(fill->fd);
    if (fill->dir_fd >= 0)
        close(fill->dir_fd);
    pthread_mutex_destroy(&fill->mutex);
    free(fill->extents);
    free(fill->path);
    free(fill);
}
