// How a file's bytes come: the path that was asked for, or the one that suits what lies in the page cache; and in place of one that does not
// work here, the next best. Nothing is believed that was not tried: a map may be refused, O_DIRECT may be refused on opening or at the first read, io_uring by a
// filter of system calls.
#include "engine/loader_internal.h"

#include "formats/checked.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/utsname.h>
#include <unistd.h>

enum {
    SAMPLES = 64,
    SAMPLE_BYTES = 1 << 20,
    CACHED_PERCENT = 90, // from here on reading past the page cache would cost more than it saves
};

static const char *const names[] = {
    [LOAD_AUTO] = "auto", [LOAD_MAP] = "map", [LOAD_READ] = "read", [LOAD_DIRECT] = "direct", [LOAD_URING] = "uring",
};

const char *load_path_name(enum load_path path)
{
    return (unsigned)path < sizeof names / sizeof *names ? names[path] : "unknown";
}

bool load_path_from_name(const char *name, enum load_path *path)
{
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (strcmp(name, names[i]) == 0) {
            *path = (enum load_path)i;
            return true;
        }
    return false;
}

// ---- what is in the page cache -------------------------------------------------------------------------------------

// cachestat(2), which older C libraries do not know.
#ifndef SYS_cachestat
#define SYS_cachestat 451
#endif
struct cachestat_range {
    uint64_t offset, bytes;
};
struct cachestat {
    uint64_t cached, dirty, writeback, evicted, recently_evicted; // pages
};

// Pages in the page cache; -1: the kernel does not say.
static int64_t cached_pages(int fd, uint64_t offset, uint64_t bytes)
{
    struct cachestat_range range = {offset, bytes};
    struct cachestat found;
    return syscall(SYS_cachestat, fd, &range, &found, 0) == 0 ? (int64_t)found.cached : -1;
}

// 0 or 100: whether a read of one byte would have to wait. -1: not known.
static int sample_without_waiting(int fd, uint64_t offset)
{
    char byte;
    struct iovec to = {&byte, 1};
    ssize_t got = preadv2(fd, &to, 1, (off_t)offset, RWF_NOWAIT);
    return got > 0 ? 100 : got < 0 && errno == EAGAIN ? 0 : -1;
}

static int sample(int fd, uint64_t offset, uint64_t bytes)
{
    uint64_t pages = div_up(bytes, (uint64_t)sysconf(_SC_PAGESIZE));
    int64_t cached = cached_pages(fd, offset, bytes);
    return cached >= 0 ? (int)((uint64_t)cached * 100 / pages) : sample_without_waiting(fd, offset);
}

// How much of [offset, offset + bytes) lies in the page cache, by samples spread over it; -1: not known.
static int cached_percent(int fd, uint64_t offset, uint64_t bytes)
{
    uint64_t count = bytes / SAMPLE_BYTES, sum = 0;
    count = count < 1 ? 1 : count > SAMPLES ? SAMPLES : count;
    for (uint64_t i = 0; i < count; i++) {
        uint64_t at = bytes / count * i, left = bytes - at;
        int percent = sample(fd, offset + at, left < SAMPLE_BYTES ? left : SAMPLE_BYTES);
        if (percent < 0)
            return -1;
        sum += (uint64_t)percent;
    }
    return (int)(sum / count);
}

// ---- what works ----------------------------------------------------------------------------------------------------

// A second descriptor of the same file. 0, or what the system says to it: on opening, or to a first read.
static int open_direct(int *out, int fd, uint64_t offset)
{
    char path[32];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    int direct = open(path, O_RDONLY | O_CLOEXEC | O_DIRECT), failed = 0;
    if (direct < 0)
        return errno;
    void *page = aligned_alloc(DIRECT_ALIGN, DIRECT_ALIGN);
    if (!page)
        failed = ENOMEM;
    else if (pread(direct, page, DIRECT_ALIGN, (off_t)offset) < 0)
        failed = errno;
    free(page);
    if (failed)
        close(direct);
    else
        *out = direct;
    return failed;
}

// Makes a ring and reads by it. 0, or what the system says to it.
static int try_ring(int fd, uint64_t offset)
{
    struct loader_ring *ring = NULL;
    void *page = aligned_alloc(DIRECT_ALIGN, DIRECT_ALIGN);
    bool whole = false;
    int failed = page ? loader_ring_open(&ring, NULL) : ENOMEM;
    if (!failed) {
        loader_ring_read(ring, 0, fd, page, DIRECT_ALIGN, offset);
        failed = loader_ring_wait(ring, 0, &whole);
        failed = failed ? failed : whole ? 0 : EOPNOTSUPP;
        loader_ring_close(ring);
    }
    free(page);
    return failed;
}

// Whether the page cache keeps what is read. Where it does not (some file systems in user space or over a network), a map would ask for all of it once more.
static bool reads_stay(int fd, uint64_t offset)
{
    char byte;
    return pread(fd, &byte, 1, (off_t)offset) != 1 || sample(fd, offset, 1) != 0;
}

// ---- the choice ----------------------------------------------------------------------------------------------------

static void because(struct loader *l, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static void because(struct loader *l, const char *fmt, ...)
{
    size_t used = strlen(l->why);
    if (used > 0)
        used += (size_t)snprintf(l->why + used, sizeof l->why - used, "; ");
    va_list args;
    va_start(args, fmt);
    if (used < sizeof l->why)
        vsnprintf(l->why + used, sizeof l->why - used, fmt, args);
    va_end(args);
}

static enum load_path suggest(struct loader *l, bool may_map, int percent)
{
    if (percent < 0)
        because(l, "what lies in the page cache is not known");
    else
        because(l, "%d %% of the file lies in the page cache", percent);
    if (may_map && l->waits && !reads_stay(l->fd, l->payload_offset)) {
        because(l, "what is read does not stay there");
        may_map = false;
    }
    return may_map ? LOAD_MAP : l->waits ? LOAD_URING : LOAD_READ;
}

// From 5.18 on a fault in such a map reads 2 MiB, whatever the device's read-ahead, and keeps them in one unit where the file system can: that
// takes less than a tenth of the time that single pages take to make and to map. There the read-ahead, which would go on in small units
// behind each fault, is left out while the load lasts: other threads keep reads in flight.
static void read_in_large_units(void *map, uint64_t bytes)
{
    struct utsname name;
    int major = 0, minor = 0;
    if (uname(&name) == 0 && sscanf(name.release, "%d.%d", &major, &minor) == 2 &&
        (major > 5 || (major == 5 && minor >= 18)) && madvise(map, bytes, MADV_HUGEPAGE) == 0)
        madvise(map, bytes, MADV_RANDOM);
}

static void map_payload(struct loader *l)
{
    const struct loader_options *o = &l->options;
    struct error err;
    uint64_t bytes = shard_file_payload_bytes(o->file);
    void *map = mmap(NULL, bytes, PROT_READ, MAP_PRIVATE, l->fd, (off_t)l->payload_offset);
    if (map == MAP_FAILED)
        because(l, "without a map (%s)", strerror(errno));
    else if (loader_guard_new(&l->guard, map, bytes, store_file_name(o->source), o->on_lost, o->arg, &err) != 0) {
        because(l, "without a map (%s)", err.msg);
        munmap(map, bytes);
    } else {
        read_in_large_units(map, bytes);
        l->map = map;
    }
}

// Sets path, why and direct_fd.
static void choose(struct loader *l, bool may_map)
{
    int failed;
    uint64_t bytes = shard_file_stored_bytes(l->options.file);
    l->path = l->options.path;
    if (l->fd < 0) {
        l->path = LOAD_READ;
        because(l, "the file is fetched");
        return;
    }
    int percent = bytes == 0 ? 100 : cached_percent(l->fd, l->payload_offset, bytes);
    l->waits = percent < CACHED_PERCENT;
    if (l->path == LOAD_MAP && !may_map) {
        because(l, l->compressed ? "a compressed file is not used where it lies" : "the weights go to a device");
        l->path = LOAD_AUTO;
    }
    if (l->path == LOAD_AUTO)
        l->path = suggest(l, may_map, percent);
    else
        because(l, "as asked for");
    if (l->path == LOAD_MAP || l->path == LOAD_READ)
        return;
    if ((failed = open_direct(&l->direct_fd, l->fd, l->payload_offset))) {
        because(l, "without O_DIRECT (%s)", strerror(failed));
        l->path = LOAD_READ;
    } else if (l->path == LOAD_URING && (failed = try_ring(l->direct_fd, l->payload_offset))) {
        because(l, "without io_uring (%s)", strerror(failed));
        l->path = LOAD_DIRECT;
    }
}

void loader_choose_path(struct loader *l, bool may_map)
{
    l->waits = true;
    choose(l, may_map);
    if (l->path == LOAD_MAP)
        map_payload(l);
    if (l->path == LOAD_MAP && !l->map)
        l->path = LOAD_READ;
}
