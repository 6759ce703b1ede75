// A library for LD_PRELOAD: makes the operating system fail where a test says so, for test_io_faults.py. It stands between a program and
// the C library's calls of files and memory; what the C library calls by itself (stdio) it does not see. glibc only.
//
// Environment (all may be left out):
//   IO_SHIM_PAGE=FILE        counters and the armed fault, a struct page, shared with whoever maps FILE and with forked processes
//   IO_SHIM_FAIL="KIND N ERRNO [always]"   the N-th call of a kind (from 1) fails with that number; always: and every later one.
//                            ERRNO 0: before it the process stops (SIGSTOP), until it is told to go on
//   IO_SHIM_SHORT=N          reads and writes transfer 1 .. N bytes, at random
//   IO_SHIM_EINTR=N          every N-th read, write, reservation of space and lock is interrupted (EINTR)
//   IO_SHIM_STOP="N HOW"     before the N-th step (a call that changes files) the process ends; HOW:
//       kill        by SIGKILL
//       lose        the power fails: of files only what was synced remains, of names only what the directory's last sync saw
//       mix:SEED    the power fails: of each unsynced page and each unsynced name it is decided at random whether it remains
//     What a power failure leaves of IO_SHIM_DISK (a directory) is written to IO_SHIM_DISK.after, and the exit status is POWER_FAILED. With
//     N beyond the last step, the power fails after the process has ended by itself, with its exit status.
//   IO_SHIM_STACKS=FILE      writes the numbers of the allocations whose call stack is new, one line each
//
// Kinds: the names below. close and the like are done before they are said to have failed, as Linux does it. Allocations (alloc) are malloc,
// calloc, realloc, posix_memalign, aligned_alloc and anonymous mmap.
#undef _FORTIFY_SOURCE // what it makes of the functions' names is written out below
#include "tests/io_shim.h"

#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static const char *const kind_names[KINDS] = {
    "open",  "read",   "pread",   "write",   "pwrite", "sync", "rename", "truncate", "allocate", "map",  "close",
    "mkdir", "unlink", "opendir", "readdir", "stat",   "lock", "thread", "alloc",    "step",     "live", "written"};

enum { POWER_FAILED = 99, MEMORY_PAGE_BYTES = 4096, NO_KIND = -1 };

struct page *io_shim_page;
static long short_bytes, eintr_every;
static _Atomic long eintr_calls;
int io_shim_stacks_fd = -1;
static long stop_step;
static enum { STOP_NEVER, STOP_KILL, STOP_LOSE, STOP_MIX } stop_how;
static char disk[PATH_MAX];
static uint64_t random_state = 88172645463325252u;
pthread_mutex_t io_shim_steps = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;
static DIR *(*real_opendir)(const char *);
static DIR *(*real_fdopendir)(int);
static struct dirent *(*real_readdir)(DIR *);
static int (*real_thread)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
__thread bool io_shim_inside __attribute__((tls_model("initial-exec")));

static uint64_t random_next(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
}

static bool interruptible(enum kind kind)
{
    return kind == KIND_READ || kind == KIND_PREAD || kind == KIND_WRITE || kind == KIND_PWRITE ||
           kind == KIND_ALLOCATE || kind == KIND_LOCK;
}

bool io_shim_fails(enum kind kind)
{
    if (!io_shim_page || io_shim_inside)
        return false;
    io_shim_page->counts[kind]++;
    if (eintr_every && interruptible(kind) && ++eintr_calls % eintr_every == 0) {
        io_shim_page->injected++;
        errno = EINTR;
        return true;
    }
    if (io_shim_page->kind != (int64_t)kind)
        return false;
    int64_t left = io_shim_page->left--;
    if (left > 1 || (left < 1 && !io_shim_page->always))
        return false;
    io_shim_page->injected++;
    if (io_shim_page->error == 0) {
        kill(getpid(), SIGSTOP);
        return false;
    }
    errno = (int)io_shim_page->error;
    return true;
}

static size_t shortened(size_t bytes)
{
    if (!io_shim_page || io_shim_inside || !short_bytes || bytes < 2)
        return bytes;
    pthread_mutex_lock(&io_shim_steps);
    size_t some = 1 + random_next() % (uint64_t)short_bytes;
    pthread_mutex_unlock(&io_shim_steps);
    return some < bytes ? some : bytes;
}

// ---- what a power failure leaves ---------------------------------------------------------------------------------------------------

// A file or directory as the disk knows it. Contents are kept whole: the tests' models are small.
struct name {
    char text[NAME_MAX + 1];
    struct node *node;
};
struct node {
    dev_t dev;
    ino_t ino;
    bool live, is_dir; // live: dev and ino still mean this file
    uint8_t *bytes, *now;
    size_t num_bytes, now_bytes; // synced, and at the moment of the failure
    struct name *names;          // of a directory, synced
    size_t num_names;
    struct node *next;
};
static struct node *nodes;

static _Noreturn void give_up(const char *what)
{
    dprintf(STDERR_FILENO, "io_shim: %s: %s\n", what, strerror(errno));
    for (;;)
        syscall(SYS_exit_group, 98);
}

static void *grown(void *memory, size_t bytes)
{
    void *new_memory = __libc_realloc(memory, bytes ? bytes : 1);
    if (!new_memory)
        give_up("out of memory");
    return new_memory;
}

static struct node *node_of(const struct stat *status)
{
    for (struct node *node = nodes; node; node = node->next)
        if (node->live && node->dev == status->st_dev && node->ino == status->st_ino)
            return node;
    struct node *node = grown(NULL, sizeof *node);
    *node = (struct node){
        .dev = status->st_dev, .ino = status->st_ino, .live = true, .is_dir = S_ISDIR(status->st_mode), .next = nodes};
    return nodes = node;
}

static void take_bytes(int fd, uint8_t **bytes, size_t *num_bytes)
{
    char path[64];
    struct stat status;
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd); // it may be open for writing only
    int own = (int)syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC);
    if (own < 0 || fstat(own, &status))
        give_up(path);
    *bytes = grown(*bytes, (size_t)status.st_size);
    *num_bytes = 0;
    for (ssize_t got; (got = (ssize_t)syscall(SYS_pread64, own, *bytes + *num_bytes,
                                              (size_t)status.st_size - *num_bytes, *num_bytes)) > 0;)
        *num_bytes += (size_t)got;
    syscall(SYS_close, own);
}

static void for_entries(const char *path,
                        void (*visit)(void *arg, const char *path, const char *name, const struct stat *status),
                        void *arg)
{
    DIR *dir = real_opendir(path);
    if (!dir)
        give_up(path);
    for (const struct dirent *entry; (entry = real_readdir(dir));) {
        char full[2 * PATH_MAX];
        struct stat status;
        if (snprintf(full, sizeof full, "%s/%s", path, entry->d_name) >= (int)sizeof full)
            give_up(path);
        if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0 && lstat(full, &status) == 0)
            visit(arg, full, entry->d_name, &status);
    }
    closedir(dir);
}

static void add_name(void *arg, const char *path, const char *name, const struct stat *status)
{
    struct node *node = arg;
    (void)path;
    node->names = grown(node->names, (node->num_names + 1) * sizeof *node->names);
    struct name *added = &node->names[node->num_names++];
    snprintf(added->text, sizeof added->text, "%s", name);
    added->node = node_of(status);
}

static void synced(int fd)
{
    char path[64];
    struct stat status;
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    if (fstat(fd, &status))
        return;
    struct node *node = node_of(&status);
    if (S_ISREG(status.st_mode))
        take_bytes(fd, &node->bytes, &node->num_bytes);
    else if (S_ISDIR(status.st_mode)) {
        node->num_names = 0;
        for_entries(path, add_name, node);
    }
}

// What is there at the start counts as synced.
static void sync_tree(void *arg, const char *path, const char *name, const struct stat *status)
{
    (void)arg, (void)name, (void)status;
    int fd = (int)syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        give_up(path);
    synced(fd);
    syscall(SYS_close, fd);
    if (S_ISDIR(status->st_mode))
        for_entries(path, sync_tree, NULL);
}

static void look_now(void *arg, const char *path, const char *name, const struct stat *status)
{
    struct node *node = node_of(status);
    (void)arg, (void)name;
    if (node->is_dir) {
        for_entries(path, look_now, NULL);
        return;
    }
    int fd = (int)syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        give_up(path);
    take_bytes(fd, &node->now, &node->now_bytes);
    syscall(SYS_close, fd);
}

static bool remains(void) { return stop_how == STOP_MIX && random_next() >> 40 & 1; }

static void write_file(const struct node *node, const char *path)
{
    bool longer = node->now && remains();
    size_t num_bytes = longer ? node->now_bytes : node->num_bytes;
    int fd = (int)syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (fd < 0 || syscall(SYS_ftruncate, fd, num_bytes))
        give_up(path);
    for (size_t at = 0; at < num_bytes; at += MEMORY_PAGE_BYTES) {
        bool now = node->now && remains();
        const uint8_t *bytes = now ? node->now : node->bytes;
        size_t end = now ? node->now_bytes : node->num_bytes;
        if (end > num_bytes)
            end = num_bytes;
        if (end > at &&
            syscall(SYS_pwrite64, fd, bytes + at, end - at < MEMORY_PAGE_BYTES ? end - at : MEMORY_PAGE_BYTES, at) < 0)
            give_up(path);
    }
    syscall(SYS_close, fd);
}

static struct node *named(const struct name *names, size_t count, const char *text)
{
    for (size_t i = 0; i < count; i++)
        if (strcmp(names[i].text, text) == 0)
            return names[i].node;
    return NULL;
}

static void write_node(const struct node *node, const char *now_path, const char *path);

static void write_name(struct node *before, struct node *now, const char *text, const char *now_path, const char *path)
{
    char from[2 * PATH_MAX], to[3 * PATH_MAX];
    const struct node *left = before == now || remains() ? now : before;
    if (snprintf(from, sizeof from, "%s/%s", now_path ? now_path : "", text) >= (int)sizeof from ||
        snprintf(to, sizeof to, "%s/%s", path, text) >= (int)sizeof to)
        give_up(path);
    if (left)
        write_node(left, now_path && left == now ? from : NULL, to);
}

// now_path: where the directory is at the moment of the failure, NULL when it is nowhere.
static void write_node(const struct node *node, const char *now_path, const char *path)
{
    if (!node->is_dir) {
        write_file(node, path);
        return;
    }
    struct node now = {0};
    if (now_path)
        for_entries(now_path, add_name, &now);
    if (syscall(SYS_mkdirat, AT_FDCWD, path, 0777))
        give_up(path);
    for (size_t i = 0; i < node->num_names; i++)
        write_name(node->names[i].node, named(now.names, now.num_names, node->names[i].text), node->names[i].text,
                   now_path, path);
    for (size_t i = 0; i < now.num_names; i++)
        if (!named(node->names, node->num_names, now.names[i].text))
            write_name(NULL, now.names[i].node, now.names[i].text, now_path, path);
    free(now.names);
}

static void power_fails(void)
{
    char after[PATH_MAX + 8];
    struct stat status;
    io_shim_inside = true;
    snprintf(after, sizeof after, "%s.after", disk);
    if (lstat(disk, &status))
        give_up(disk);
    look_now(NULL, disk, NULL, &status);
    write_node(node_of(&status), disk, after);
}

// Around each call that changes files. Only a run that ends at a step has its calls one at a time.
static void step_begin(void)
{
    if (!io_shim_page || io_shim_inside)
        return;
    if (stop_how == STOP_NEVER) {
        io_shim_page->counts[KIND_STEP]++;
        return;
    }
    pthread_mutex_lock(&io_shim_steps);
    if (++io_shim_page->counts[KIND_STEP] != stop_step)
        return;
    if (stop_how == STOP_KILL)
        kill(getpid(), SIGKILL);
    power_fails();
    syscall(SYS_exit_group, POWER_FAILED);
}

static void step_end(void)
{
    if (io_shim_page && !io_shim_inside && stop_how != STOP_NEVER)
        pthread_mutex_unlock(&io_shim_steps);
}

// A name is about to go or to come to mean another file: its number may then be given to a new one.
static struct node *about_to_go(int dir, const char *path)
{
    struct stat status;
    if (!io_shim_page || io_shim_inside || stop_how < STOP_LOSE ||
        syscall(SYS_newfstatat, dir, path, &status, AT_SYMLINK_NOFOLLOW))
        return NULL;
    return S_ISDIR(status.st_mode) || status.st_nlink == 1 ? node_of(&status) : NULL;
}

// ---- beginning and end -------------------------------------------------------------------------------------------------------------

static void read_fault(struct page *p, const char *text)
{
    char kind[32], always[16] = "";
    long long left, error;
    if (!text)
        return;
    p->kind = NO_KIND;
    if (sscanf(text, "%31s %lld %lld %15s", kind, &left, &error, always) < 3)
        return;
    for (int i = 0; i < KINDS; i++)
        if (strcmp(kind, kind_names[i]) == 0)
            p->kind = i;
    p->left = left;
    p->error = error;
    p->always = *always != 0;
}

static void read_stop(const char *text)
{
    char how[32];
    if (!text || sscanf(text, "%ld %31s", &stop_step, how) != 2)
        return;
    stop_how = strcmp(how, "kill") == 0 ? STOP_KILL : strcmp(how, "lose") == 0 ? STOP_LOSE : STOP_MIX;
    if (stop_how == STOP_MIX)
        random_state += strtoull(how + strcspn(how, ":") + 1, NULL, 10) * 0x9E3779B97F4A7C15u;
}

static long number_of(const char *name)
{
    const char *text = getenv(name);
    return text ? strtol(text, NULL, 10) : 0;
}

static __attribute__((constructor)) void begin(void)
{
    const char *page_path = getenv("IO_SHIM_PAGE"), *fault = getenv("IO_SHIM_FAIL"), *stacks = getenv("IO_SHIM_STACKS");
    struct stat status;
    io_shim_inside = true;
    *(void **)&real_opendir = dlsym(RTLD_NEXT, "opendir");
    *(void **)&real_fdopendir = dlsym(RTLD_NEXT, "fdopendir");
    *(void **)&real_readdir = dlsym(RTLD_NEXT, "readdir");
    *(void **)&real_thread = dlsym(RTLD_NEXT, "pthread_create");
    int fd = page_path ? (int)syscall(SYS_openat, AT_FDCWD, page_path, O_RDWR | O_CREAT | O_CLOEXEC, 0666) : -1;
    if (page_path && (fd < 0 || syscall(SYS_ftruncate, fd, MEMORY_PAGE_BYTES)))
        give_up(page_path);
    struct page *p =
        mmap(NULL, MEMORY_PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | (fd < 0 ? MAP_ANONYMOUS : 0), fd, 0);
    if (p == MAP_FAILED)
        give_up("page");
    if (fd >= 0)
        syscall(SYS_close, fd);
    if (fd < 0)
        p->kind = NO_KIND;
    read_fault(p, fault);
    short_bytes = number_of("IO_SHIM_SHORT");
    eintr_every = number_of("IO_SHIM_EINTR");
    if (stacks && (io_shim_stacks_fd =
                       (int)syscall(SYS_openat, AT_FDCWD, stacks, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666)) < 0)
        give_up(stacks);
    read_stop(getenv("IO_SHIM_STOP"));
    snprintf(disk, sizeof disk, "%s", getenv("IO_SHIM_DISK") ? getenv("IO_SHIM_DISK") : "");
    if (stop_how >= STOP_LOSE) {
        if (lstat(disk, &status))
            give_up(disk);
        sync_tree(NULL, disk, NULL, &status);
    }
    io_shim_inside = false;
    io_shim_page = p; // from here on calls count
}

static __attribute__((destructor)) void end(void)
{
    if (stop_how >= STOP_LOSE && io_shim_page && io_shim_page->counts[KIND_STEP] < stop_step)
        power_fails();
}

// ---- files -------------------------------------------------------------------------------------------------------------------------

static int open_at(int dir, const char *path, int flags, mode_t mode)
{
    if (io_shim_fails(KIND_OPEN))
        return -1;
    bool changes = flags & (O_CREAT | O_TRUNC);
    if (changes)
        step_begin();
    int fd = (int)syscall(SYS_openat, dir, path, flags, mode);
    if (changes)
        step_end();
    return fd;
}

int open(const char *path, int flags, ...)
{
    va_list args;
    va_start(args, flags);
    mode_t mode = flags & O_CREAT ? va_arg(args, mode_t) : 0;
    va_end(args);
    return open_at(AT_FDCWD, path, flags, mode);
}
ALSO(open, open64);

int openat(int dir, const char *path, int flags, ...)
{
    va_list args;
    va_start(args, flags);
    mode_t mode = flags & O_CREAT ? va_arg(args, mode_t) : 0;
    va_end(args);
    return open_at(dir, path, flags, mode);
}
ALSO(openat, openat64);

int __open_2(const char *path, int flags);
int __openat_2(int dir, const char *path, int flags);
int __open_2(const char *path, int flags) { return open_at(AT_FDCWD, path, flags, 0); }
int __openat_2(int dir, const char *path, int flags) { return open_at(dir, path, flags, 0); }
ALSO(__open_2, __open64_2);
ALSO(__openat_2, __openat64_2);

ssize_t read(int fd, void *buffer, size_t bytes)
{
    return io_shim_fails(KIND_READ) ? -1 : (ssize_t)syscall(SYS_read, fd, buffer, shortened(bytes));
}

ssize_t pread(int fd, void *buffer, size_t bytes, off_t offset)
{
    return io_shim_fails(KIND_PREAD) ? -1 : (ssize_t)syscall(SYS_pread64, fd, buffer, shortened(bytes), offset);
}
ALSO(pread, pread64);

ssize_t __read_chk(int fd, void *buffer, size_t bytes, size_t room);
ssize_t __pread_chk(int fd, void *buffer, size_t bytes, off_t offset, size_t room);
ssize_t __read_chk(int fd, void *buffer, size_t bytes, size_t room)
{
    (void)room;
    return read(fd, buffer, bytes);
}
ssize_t __pread_chk(int fd, void *buffer, size_t bytes, off_t offset, size_t room)
{
    (void)room;
    return pread(fd, buffer, bytes, offset);
}
ALSO(__pread_chk, __pread64_chk);

#define STEP(type, kind, call)                                                                                         \
    if (io_shim_fails(kind))                                                                                           \
        return -1;                                                                                                     \
    step_begin();                                                                                                      \
    type result = (type)(call);                                                                                        \
    step_end();                                                                                                        \
    return result

ssize_t write(int fd, const void *buffer, size_t bytes)
{
    STEP(ssize_t, KIND_WRITE, syscall(SYS_write, fd, buffer, shortened(bytes)));
}
static ssize_t pwrite_counted(int fd, const void *buffer, size_t bytes, off_t offset)
{
    ssize_t put = syscall(SYS_pwrite64, fd, buffer, shortened(bytes), offset);
    if (io_shim_page && !io_shim_inside && put > 0 && offset > 0)
        io_shim_page->counts[KIND_WRITTEN] += put;
    return put;
}
ssize_t pwrite(int fd, const void *buffer, size_t bytes, off_t offset)
{
    STEP(ssize_t, KIND_PWRITE, pwrite_counted(fd, buffer, bytes, offset));
}
ALSO(pwrite, pwrite64);
int ftruncate(int fd, off_t bytes) { STEP(int, KIND_TRUNCATE, syscall(SYS_ftruncate, fd, bytes)); }
ALSO(ftruncate, ftruncate64);
int fallocate(int fd, int mode, off_t offset, off_t bytes)
{
    STEP(int, KIND_ALLOCATE, syscall(SYS_fallocate, fd, mode, offset, bytes));
}
ALSO(fallocate, fallocate64);
int mkdirat(int dir, const char *path, mode_t mode) { STEP(int, KIND_MKDIR, syscall(SYS_mkdirat, dir, path, mode)); }
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

// The real sync is left out: of a power failure that is only played, nothing is lost, and disks are slow.
static int sync_fd(int fd)
{
    if (io_shim_fails(KIND_SYNC))
        return -1;
    step_begin();
    if (io_shim_page && !io_shim_inside && stop_how >= STOP_LOSE) {
        io_shim_inside = true;
        synced(fd);
        io_shim_inside = false;
    }
    step_end();
    return 0;
}
int fsync(int fd) { return sync_fd(fd); }
int fdatasync(int fd) { return sync_fd(fd); }

int unlinkat(int dir, const char *path, int flags)
{
    if (io_shim_fails(KIND_UNLINK))
        return -1;
    step_begin();
    struct node *node = about_to_go(dir, path);
    int failed = (int)syscall(SYS_unlinkat, dir, path, flags);
    if (node && !failed)
        node->live = false;
    step_end();
    return failed;
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int renameat(int old_dir, const char *old_path, int new_dir, const char *new_path)
{
    if (io_shim_fails(KIND_RENAME))
        return -1;
    step_begin();
    struct node *node = about_to_go(new_dir, new_path);
    int failed = (int)syscall(SYS_renameat2, old_dir, old_path, new_dir, new_path, 0);
    if (node && !failed)
        node->live = false;
    step_end();
    return failed;
}
int rename(const char *old_path, const char *new_path) { return renameat(AT_FDCWD, old_path, AT_FDCWD, new_path); }

int close(int fd)
{
    bool failed = io_shim_fails(KIND_CLOSE);
    int error = errno;
    long rc = syscall(SYS_close, fd);
    if (failed)
        errno = error;
    return failed ? -1 : (int)rc;
}

int flock(int fd, int operation) { return io_shim_fails(KIND_LOCK) ? -1 : (int)syscall(SYS_flock, fd, operation); }
DIR *opendir(const char *path) { return io_shim_fails(KIND_OPENDIR) ? NULL : real_opendir(path); }
DIR *fdopendir(int fd) { return io_shim_fails(KIND_OPENDIR) ? NULL : real_fdopendir(fd); }
struct dirent *readdir(DIR *dir) { return io_shim_fails(KIND_READDIR) ? NULL : real_readdir(dir); }

int stat(const char *path, struct stat *status)
{
    return io_shim_fails(KIND_STAT) ? -1 : (int)syscall(SYS_newfstatat, AT_FDCWD, path, status, 0);
}
int lstat(const char *path, struct stat *status)
{
    return io_shim_fails(KIND_STAT) ? -1 : (int)syscall(SYS_newfstatat, AT_FDCWD, path, status, AT_SYMLINK_NOFOLLOW);
}
int fstat(int fd, struct stat *status)
{
    return io_shim_fails(KIND_STAT) ? -1 : (int)syscall(SYS_newfstatat, fd, "", status, AT_EMPTY_PATH);
}
int access(const char *path, int mode)
{
    return io_shim_fails(KIND_STAT) ? -1 : (int)syscall(SYS_faccessat, AT_FDCWD, path, mode);
}

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*run)(void *), void *arg)
{
    return io_shim_fails(KIND_THREAD) ? errno : real_thread(thread, attributes, run, arg);
}
