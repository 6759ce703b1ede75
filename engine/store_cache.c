// See store_cache.h.
#include "engine/store_cache.h"

#include "formats/checked.h"
#include "formats/file_io.h"
#include "kernels/clock.h"

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
static const double lock_s =
    1; // whoever holds the lock longer is stopped or behind a dead network: a start does not wait for that

void store_cache_name(char *name, const struct manifest *manifest, uint32_t rank)
{
    char contract[CHECKSUM128_HEX_DIGITS + 1], hash[CHECKSUM128_HEX_DIGITS + 1];
    checksum128_to_hex(manifest->contract, contract);
    checksum128_to_hex(manifest->ranks[rank].hash, hash);
    snprintf(name, STORE_CACHE_NAME_BYTES, "%s-rank-%02" PRIu32 "-of-%02" PRIu32 "-%" PRIu64 "-%s.tpshard", contract,
             rank, (uint32_t)manifest->num_ranks, manifest->ranks[rank].bytes, hash);
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
    bool is_own; // of the model that is loaded
};

struct listing {
    struct entry *entries;
    size_t count, capacity;
    uint64_t bytes, own_bytes,
        filling_bytes; // of all entries; of those of the model that is loaded; of those that others are filling
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

static bool is_of_model(const char *name, const struct manifest *manifest)
{
    char own[STORE_CACHE_NAME_BYTES];
    for (uint32_t rank = 0; rank < manifest->num_ranks; rank++) {
        store_cache_name(own, manifest, rank);
        if (strcmp(name, own) == 0)
            return true;
    }
    return false;
}

static int list_file(struct listing *list, int dir_fd, const char *name, const struct manifest *manifest,
                     struct error *err)
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
    entry->is_own = is_of_model(name, manifest);
    list->bytes += named_bytes;
    list->own_bytes += entry->is_own ? named_bytes : 0;
    return 0;
}

static int compare_use(const void *a, const void *b)
{
    const struct timespec *x = &((const struct entry *)a)->used, *y = &((const struct entry *)b)->used;
    if (x->tv_sec != y->tv_sec)
        return x->tv_sec < y->tv_sec ? -1 : 1;
    return (x->tv_nsec > y->tv_nsec) - (x->tv_nsec < y->tv_nsec);
}

// Drops what is longest unused, but none of the model's own, until file_bytes fit.
static int drop_entries(struct listing *list, int dir_fd, const char *dir, uint64_t file_bytes, uint64_t limit_bytes,
                        struct error *err)
{
    uint64_t filling_bytes = list->filling_bytes;
    if (filling_bytes + file_bytes > limit_bytes || list->own_bytes + filling_bytes + file_bytes > limit_bytes)
        return error_set(err, ERR_IO,
                         "%s: %" PRIu64 " bytes more do not fit into the cache's limit of %" PRIu64 ", beside %" PRIu64
                         " of the same model's other ranks and %" PRIu64 " that are being fetched",
                         dir, file_bytes, limit_bytes, list->own_bytes, filling_bytes);
    if (list->count)
        qsort(list->entries, list->count, sizeof *list->entries, compare_use);
    for (size_t i = 0; i < list->count && list->bytes + filling_bytes + file_bytes > limit_bytes; i++)
        if (!list->entries[i].is_own && unlinkat(dir_fd, list->entries[i].name, 0) == 0)
            list->bytes -= list->entries[i].bytes;
    return 0;
}

// The lock of the cache is held.
static int make_room(int dir_fd, const char *dir, const struct manifest *manifest, uint64_t file_bytes,
                     uint64_t limit_bytes, struct error *err)
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
        rc = list_file(&list, dir_fd, found->d_name, manifest, err);
    closedir(stream);
    if (!rc && limit_bytes)
        rc = drop_entries(&list, dir_fd, dir, file_bytes, limit_bytes, err);
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
    bool done, publishes; // it has its name; `publisher` is there to be joined
    pthread_t publisher;
    pthread_mutex_t mutex;
    struct extent *extents; // what is there: in order, none touching the next
    size_t num_extents, capacity;
};

// The descriptor that holds it, or -1.
static int lock_cache(const struct store_cache_fill *fill, const char *dir, struct error *err)
{
    double end_s = clock_now_s() + lock_s;
    int fd = openat(fill->dir_fd, LOCK_FILE_NAME, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0666);
    int failed = fd < 0;
    while (!failed && flock(fd, LOCK_EX | LOCK_NB) && !(failed = errno != EWOULDBLOCK && errno != EINTR)) {
        if (clock_now_s() > end_s) {
            error_set(err, ERR_IO, "%s: another process holds the cache's lock", dir);
            close(fd);
            return -1;
        }
        nanosleep(&(struct timespec){.tv_nsec = 5000000}, NULL);
    }
    if (!failed)
        return fd;
    error_set_errno(err, "%s: cannot lock the cache", dir);
    if (fd >= 0)
        close(fd);
    return -1;
}

static int begin_part(struct store_cache_fill *fill, const char *dir, const struct manifest *manifest,
                      int64_t limit_bytes, struct error *err)
{
    static atomic_uint counter;
    int rc, lock_fd = lock_cache(fill, dir, err);
    if (lock_fd < 0)
        return ERR_IO;
    if ((rc = make_room(fill->dir_fd, dir, manifest, fill->file_bytes, (uint64_t)limit_bytes, err)))
        goto done;
    snprintf(fill->part_name, sizeof fill->part_name, ".%s.%ld-%u.part", fill->name, (long)getpid(), counter++);
    fill->fd = openat(fill->dir_fd, fill->part_name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0666);
    if (fill->fd < 0 || flock(fill->fd, LOCK_EX | LOCK_NB) || ftruncate(fill->fd, (off_t)fill->file_bytes))
        rc = error_set_errno(err, "%s: cannot write to the cache", dir);
done:
    close(lock_fd);
    return rc;
}

int store_cache_fill_begin(struct store_cache_fill **out, const char *dir, const struct manifest *manifest,
                           uint32_t rank, int64_t limit_bytes, struct error *err)
{
    int rc;
    struct store_cache_fill *fill = calloc(1, sizeof *fill);
    if (!fill)
        return error_set(err, ERR_MEMORY, "%s: no memory for the cache", dir);
    *fill = (struct store_cache_fill){.dir_fd = -1, .fd = -1, .file_bytes = manifest->ranks[rank].bytes};
    pthread_mutex_init(&fill->mutex, NULL);
    store_cache_name(fill->name, manifest, rank);
    if (asprintf(&fill->path, "%s/%s", dir, fill->name) < 0) {
        fill->path = NULL;
        rc = error_set(err, ERR_MEMORY, "%s: no memory for the cache", dir);
        goto fail;
    }
    if ((mkdir(dir, 0777) && errno != EEXIST) || (fill->dir_fd = open_dir(dir)) < 0) {
        rc = error_set_errno(err, "%s: cannot use the cache", dir);
        goto fail;
    }
    if ((rc = begin_part(fill, dir, manifest, limit_bytes, err)))
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

static bool is_whole(const struct store_cache_fill *fill)
{
    return fill->num_extents == 1 && fill->extents[0].begin == 0 && fill->extents[0].end == fill->file_bytes;
}

// What is not on the disk has no name: after a power failure an entry of the right length could be zeros, which nobody who verifies only
// a part would see.
static void *publish(void *arg)
{
    struct store_cache_fill *fill = arg;
    if (fdatasync(fill->fd) == 0 && renameat(fill->dir_fd, fill->part_name, fill->dir_fd, fill->name) == 0)
        fill->done = true;
    return NULL;
}

// Whoever brought the last byte has no time to wait for the disk.
static void begin_to_publish(struct store_cache_fill *fill)
{
    fill->publishes = pthread_create(&fill->publisher, NULL, publish, fill) == 0;
    if (!fill->publishes)
        publish(fill);
}

int store_cache_fill_add(struct store_cache_fill *fill, const void *bytes, uint64_t num_bytes, uint64_t offset,
                         struct error *err)
{
    if (!num_bytes || !checked_range(offset, num_bytes, fill->file_bytes))
        return 0;
    int rc = file_pwrite_full(fill->fd, bytes, num_bytes, offset, fill->path, err);
    if (rc)
        return rc;
    // Begun now, so that little is left to wait for at the end.
    sync_file_range(fill->fd, (off_t)offset, (off_t)num_bytes, SYNC_FILE_RANGE_WRITE);
    pthread_mutex_lock(&fill->mutex);
    bool was_whole = is_whole(fill);
    if (add_extent(fill, (struct extent){offset, offset + num_bytes}))
        rc = error_set(err, ERR_MEMORY, "%s: no memory for the cache", fill->path);
    if (!rc && !was_whole && is_whole(fill))
        begin_to_publish(fill);
    pthread_mutex_unlock(&fill->mutex);
    return rc;
}

void store_cache_fill_end(struct store_cache_fill *fill)
{
    if (!fill)
        return;
    if (fill->publishes)
        pthread_join(fill->publisher, NULL);
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
