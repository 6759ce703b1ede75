// The loader where the system withholds something: no map, no io_uring (at first, or later), no O_DIRECT (on opening, at the first read, later), no
// way to ask what is in the page cache or to keep it there, no read-ahead, no locked memory, no threads; reads and maps that differ; and files that vanish under their maps. Each in a process of its own, whose system
// calls a filter refuses.
#include "tests/loader_help.h"

#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include "engine/loader_guard.h"
#include "kernels/thread_pool.h"

#ifndef SYS_cachestat
#define SYS_cachestat 451
#endif
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

// ---- withholding ---------------------------------------------------------------------------------------------------

// An argument that a refused call has: (argument & mask) == value.
struct condition {
    int argument; // -1: any call
    uint32_t mask, value;
};

// From now on such calls of this process fail with the error.
static void refuse(int call, struct condition first, struct condition second, int error)
{
#define LOAD(field) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, (uint32_t)(field))
#define ARGUMENT(c) (offsetof(struct seccomp_data, args) + 8 * (size_t)((c).argument < 0 ? 0 : (c).argument))
#define MASK(c) ((c).argument < 0 ? 0 : (c).mask)
#define VALUE(c) ((c).argument < 0 ? 0 : (c).value)
    struct sock_filter program[] = {
        LOAD(offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ, (uint32_t)call, 0, 7),
        LOAD(ARGUMENT(first)),
        BPF_STMT(BPF_ALU | BPF_AND, MASK(first)),
        BPF_JUMP(BPF_JMP | BPF_JEQ, VALUE(first), 0, 4),
        LOAD(ARGUMENT(second)),
        BPF_STMT(BPF_ALU | BPF_AND, MASK(second)),
        BPF_JUMP(BPF_JMP | BPF_JEQ, VALUE(second), 0, 1),
        BPF_STMT(BPF_RET, SECCOMP_RET_ERRNO | (uint32_t)error),
        BPF_STMT(BPF_RET, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog filter = {sizeof program / sizeof *program, program};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) != 0)
        _exit(77);
}

static const struct condition any = {-1, 0, 0};

static void with_everything(void) {}

static void without_uring(void) { refuse(SYS_io_uring_setup, any, any, EPERM); }
static void without_entering(void) { refuse(SYS_io_uring_enter, any, any, EPERM); }
static void without_direct(void) { refuse(SYS_openat, (struct condition){2, O_DIRECT, O_DIRECT}, any, EINVAL); }
static void without_first_read(void) { refuse(SYS_pread64, (struct condition){2, ~0u, 4096}, any, EINVAL); }
static void without_cachestat(void) { refuse(SYS_cachestat, any, any, ENOSYS); }
static void without_populate(void) { refuse(SYS_madvise, (struct condition){2, ~0u, MADV_POPULATE_READ}, any, EINVAL); }

static void without_knowing(void)
{
    without_cachestat();
    refuse(SYS_preadv2, any, any, EOPNOTSUPP);
}

static void without_map(void)
{
    refuse(SYS_mmap, (struct condition){2, ~0u, PROT_READ}, (struct condition){3, ~0u, MAP_PRIVATE}, ENODEV);
}

// What is read does not stay in the page cache.
static void without_staying(void)
{
    without_cachestat();
    refuse(SYS_preadv2, any, any, EAGAIN);
}

// The ring of the second lane: of the next descriptors, one is O_DIRECT's, one the first lane's (and before that the trial's).
static uint32_t second_ring(void)
{
    int fd = open("/dev/null", O_RDONLY);
    close(fd);
    return (uint32_t)fd + 2;
}

static void without_second_ring(void)
{
    refuse(SYS_io_uring_enter, (struct condition){0, ~0u, second_ring()}, any, EPERM);
}
static void with_busy_ring(void) { refuse(SYS_io_uring_enter, (struct condition){0, ~0u, second_ring()}, any, EBUSY); }
// Reads begin there, but nobody can wait for them.
static void without_waiting(void)
{
    refuse(SYS_io_uring_enter, (struct condition){0, ~0u, second_ring()}, (struct condition){2, ~0u, 1}, EPERM);
}

// The descriptor that the next open gets reads one page and then no more.
static void without_later_reads(void)
{
    int fd = open("/dev/null", O_RDONLY);
    close(fd);
    refuse(SYS_pread64, (struct condition){0, ~0u, (uint32_t)fd}, (struct condition){2, ~0u, 1 << 20}, EINVAL);
}

static void without_anything(void)
{
    without_uring();
    without_direct();
    without_knowing();
    without_populate();
}

// As nobody, to whom limits apply.
static void limit_locked_memory(rlim_t bytes)
{
    struct rlimit limit = {bytes, bytes};
    if (setrlimit(RLIMIT_MEMLOCK, &limit) != 0 || (geteuid() == 0 && (setgid(65534) != 0 || setuid(65534) != 0)))
        _exit(77);
    prctl(PR_SET_DUMPABLE, 1, 0, 0, 0); // /proc/self stays ours
}

static void without_locked_memory(void) { limit_locked_memory(0); }
static void with_little_locked_memory(void) { limit_locked_memory(8 << 20); }

// ---- reads that are counted, or lie --------------------------------------------------------------------------------

static atomic_int leaf_reads;
static const uint8_t *lie; // what reads bring, whatever the file holds; NULL: what it holds

// In place of the C library's.
ssize_t counted_pread(int fd, void *to, size_t bytes, off_t offset) __asm__("pread");
ssize_t counted_pread(int fd, void *to, size_t bytes, off_t offset)
{
    ssize_t got = syscall(SYS_pread64, fd, to, bytes, offset);
    if (bytes >= SHARD_LEAF_BYTES / 4)
        atomic_fetch_add(&leaf_reads, 1);
    if (lie && got > 0)
        memcpy(to, lie + offset, (size_t)got);
    return got;
}

// ---- loads in hostile surroundings ---------------------------------------------------------------------------------

static const char *const words[] = {"auto", "map", "read", "direct", "uring"};
enum { HOST, DEVICE };
enum { COLD, WARM };
enum way { ANY_WAY, IN_PLACE, COPIED };

static const struct hostile_case {
    const char *name;
    void (*withhold)(void);
    enum load_path asked;
    int backend, cache;
    enum load_path wanted; // AUTO: kernels differ
    const char *why;
    enum way way; // used in the map, and never read besides; not mapped at all
} cases[] = {
    {"no map", without_map, LOAD_MAP, HOST, WARM, LOAD_READ, "as asked for; without a map (No such device)", COPIED},
    {"no map", without_map, LOAD_AUTO, HOST, WARM, LOAD_READ, "; without a map (No such device)", COPIED},
    {"no map", without_map, LOAD_AUTO, HOST, COLD, LOAD_READ, "; without a map (No such device)", COPIED},
    {"nothing stays", without_staying, LOAD_READ, HOST, COLD, LOAD_READ, "as asked for", COPIED},
    {"nothing stays", without_staying, LOAD_AUTO, HOST, COLD, LOAD_AUTO, "what is read does not stay", COPIED},
    {"nothing stays", without_staying, LOAD_MAP, HOST, WARM, LOAD_MAP, "as asked for", ANY_WAY},
    {"one ring fails", without_second_ring, LOAD_URING, HOST, COLD, LOAD_URING, "as asked for", ANY_WAY},
    {"one ring fails", without_second_ring, LOAD_URING, DEVICE, COLD, LOAD_URING, "as asked for", ANY_WAY},
    {"one ring is busy", with_busy_ring, LOAD_URING, HOST, COLD, LOAD_URING, "as asked for", ANY_WAY},
    {"no waiting", without_waiting, LOAD_URING, HOST, COLD, LOAD_URING, "as asked for", ANY_WAY},
    {"no waiting", without_waiting, LOAD_URING, DEVICE, COLD, LOAD_URING, "as asked for", ANY_WAY},
    {"everything", with_everything, LOAD_AUTO, HOST, WARM, LOAD_MAP, " % of the file", IN_PLACE},
    {"everything", with_everything, LOAD_AUTO, HOST, COLD, LOAD_MAP, " % of the file", IN_PLACE},
    {"no io_uring", without_uring, LOAD_URING, DEVICE, WARM, LOAD_DIRECT, "without io_uring (Operation not permitted)",
     ANY_WAY},
    {"no io_uring", without_uring, LOAD_AUTO, DEVICE, COLD, LOAD_DIRECT, NULL, ANY_WAY},
    {"no io_uring_enter", without_entering, LOAD_URING, HOST, WARM, LOAD_DIRECT, "without io_uring (Operation not",
     ANY_WAY},
    {"no O_DIRECT", without_direct, LOAD_DIRECT, DEVICE, WARM, LOAD_READ, "without O_DIRECT (Invalid argument)",
     ANY_WAY},
    {"no O_DIRECT", without_direct, LOAD_DIRECT, HOST, COLD, LOAD_READ, "without O_DIRECT (Invalid argument)", ANY_WAY},
    {"no O_DIRECT", without_direct, LOAD_URING, DEVICE, COLD, LOAD_READ, "without O_DIRECT (Invalid argument)",
     ANY_WAY},
    {"no O_DIRECT", without_direct, LOAD_AUTO, DEVICE, COLD, LOAD_READ, "without O_DIRECT (Invalid argument)", ANY_WAY},
    {"no first read", without_first_read, LOAD_DIRECT, DEVICE, COLD, LOAD_READ, "without O_DIRECT (Invalid argument)",
     ANY_WAY},
    {"no first read", without_first_read, LOAD_AUTO, DEVICE, COLD, LOAD_READ, "without O_DIRECT (Invalid argument)",
     ANY_WAY},
    {"no later read", without_later_reads, LOAD_DIRECT, DEVICE, COLD, LOAD_DIRECT, NULL, ANY_WAY},
    {"no later read", without_later_reads, LOAD_DIRECT, HOST, COLD, LOAD_DIRECT, NULL, ANY_WAY},
    {"no cachestat", without_cachestat, LOAD_AUTO, HOST, WARM, LOAD_MAP, " % of the file", IN_PLACE},
    {"no cachestat", without_cachestat, LOAD_AUTO, HOST, COLD, LOAD_MAP, " % of the file", IN_PLACE},
    {"not known", without_knowing, LOAD_AUTO, HOST, WARM, LOAD_MAP, "what lies in the page cache is not known",
     IN_PLACE},
    {"not known", without_knowing, LOAD_AUTO, HOST, COLD, LOAD_MAP, "what lies in the page cache is not known",
     IN_PLACE},
    {"no populating", without_populate, LOAD_MAP, HOST, WARM, LOAD_MAP, "as asked for", IN_PLACE},
    {"no populating", without_populate, LOAD_MAP, HOST, COLD, LOAD_MAP, "as asked for", IN_PLACE},
    {"nothing", without_anything, LOAD_AUTO, HOST, COLD, LOAD_MAP, "not known", IN_PLACE},
    {"nothing", without_anything, LOAD_AUTO, DEVICE, COLD, LOAD_READ, "without O_DIRECT", ANY_WAY},
    {"nothing", without_anything, LOAD_URING, DEVICE, WARM, LOAD_READ, "without O_DIRECT", ANY_WAY},
    {"no locked memory", without_locked_memory, LOAD_URING, DEVICE, COLD, LOAD_AUTO, "as asked for", ANY_WAY},
    {"no locked memory", without_locked_memory, LOAD_AUTO, HOST, WARM, LOAD_MAP, NULL, ANY_WAY},
    {"8 MiB of locked memory", with_little_locked_memory, LOAD_URING, HOST, COLD, LOAD_URING, "as asked for", ANY_WAY},
};

#define CHECK(condition, ...)                                                                                          \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            printf(__VA_ARGS__);                                                                                       \
            printf("\n");                                                                                              \
            fflush(stdout);                                                                                            \
            _exit(1);                                                                                                  \
        }                                                                                                              \
    } while (0)

static void load_there(struct load_fixture *f, const struct hostile_case *c)
{
    const uint8_t *base;
    struct loader *loader;
    struct load_figures figures;
    struct error err;
    struct device device = fresh_device();
    c->withhold();
    leaf_reads = 0;
    struct loader_options options = load_options(f, &device, c->backend == DEVICE);
    options.path = c->asked;
    CHECK(!loader_start(&loader, &options, &base, &err) && !loader_finish(loader, &err), "%s: %s", c->name, err.msg);
    CHECK(memcmp(base, f->payload, f->payload_bytes) == 0, "%s: other bytes than in the file", c->name);
    loader_figures(loader, &figures);
    CHECK((figures.path == c->wanted || c->wanted == LOAD_AUTO) && (!c->why || strstr(figures.why, c->why)),
          "%s, asked for %s: %s (%s), not %s (%s)", c->name, words[c->asked], words[figures.path], figures.why,
          words[c->wanted], c->why ? c->why : "");
    CHECK(c->way != COPIED || !loader_is_mapped(loader), "%s: mapped", c->name);
    CHECK(c->way != IN_PLACE || (loader_is_mapped(loader) && leaf_reads == 0), "%s, asked for %s: %d leaves were read",
          c->name, words[c->asked], (int)leaf_reads);
    loader_free(loader);
    _exit(0);
}

// How a child ended; waits for it.
static int status_of(pid_t child)
{
    int status;
    assert_true(child > 0);
    assert_int_equal(waitpid(child, &status, 0), child);
    return status;
}

static bool direct_works(const struct load_fixture *f)
{
    int fd = open(f->path, O_RDONLY | O_DIRECT | O_CLOEXEC);
    void *page = aligned_alloc(4096, 4096);
    bool works = fd >= 0 && page && pread(fd, page, 4096, 0) == 4096;
    free(page);
    if (fd >= 0)
        close(fd);
    return works;
}

static void every_refusal(void **state)
{
    (void)state;
    struct load_fixture f;
    fixture_make(&f, false);
    assert_true(chmod(f.path, 0644) == 0);
    if (!direct_works(&f)) {
        fixture_free(&f);
        skip();
    }
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i += quick() ? 2 : 1) {
        fixture_cache(&f, cases[i].cache == WARM);
        fflush(stdout);
        pid_t child = fork();
        if (child == 0)
            load_there(&f, &cases[i]);
        int status = status_of(child);
        if (WIFEXITED(status) && WEXITSTATUS(status) == 77)
            printf("# %s: cannot be arranged here\n", cases[i].name);
        else if (status != 0)
            fail_msg("%s, asked for %s: status %x", cases[i].name, words[cases[i].asked], status);
    }
    fixture_free(&f);
}

// Reads that bring other bytes than the map has: only what the kernels would see counts.
static void reads_that_lie(void **state)
{
    (void)state;
    struct load_fixture f;
    fixture_make(&f, false);
    static const enum load_path paths[] = {LOAD_AUTO, LOAD_MAP};
    for (int turn = 0; turn < 2 * 2; turn++) {
        bool map_is_right = turn % 2;
        const uint8_t *base;
        struct loader *loader;
        struct error err;
        struct device device = fresh_device();
        uint64_t flipped = f.payload_offset + 7 * SHARD_LEAF_BYTES + 5;
        uint8_t *wrong = malloc(f.file_bytes);
        assert_non_null(wrong);
        memcpy(wrong, f.content, f.file_bytes);
        wrong[flipped] ^= 1;
        if (!map_is_right)
            fixture_flip(&f, flipped, 1);
        fixture_cache(&f, paths[turn / 2] != LOAD_MAP);
        struct loader_options options = load_options(&f, &device, false);
        options.path = paths[turn / 2];
        lie = map_is_right ? wrong : f.content;
        assert_int_equal(loader_start(&loader, &options, &base, &err), 0);
        assert_true(loader_is_mapped(loader));
        int rc = loader_finish(loader, &err);
        lie = NULL;
        assert_int_equal(rc, map_is_right ? 0 : ERR_CORRUPT);
        assert_true(rc || memcmp(base, f.payload, f.payload_bytes) == 0);
        loader_free(loader);
        free_device(&device);
        free(wrong);
        if (!map_is_right)
            fixture_flip(&f, flipped, 1);
    }
    fixture_free(&f);
}

// No read-ahead: requests keep their size, and nothing is left to page faults. In a child, whose counts are its own.
static void reads_of_a_child(struct load_fixture *f, enum load_path path, long long counts[2])
{
    char line[64];
    FILE *io = fopen("/proc/self/io", "re");
    const uint8_t *base;
    struct loader *loader;
    struct error err;
    struct device device = fresh_device();
    struct rusage usage;
    CHECK(io, "no /proc/self/io");
    posix_fadvise(f->source.fd, 0, 0, POSIX_FADV_RANDOM);
    struct loader_options options = load_options(f, &device, false);
    options.path = path;
    CHECK(!loader_start(&loader, &options, &base, &err) && !loader_finish(loader, &err), "%s", err.msg);
    CHECK(memcmp(base, f->payload, f->payload_bytes) == 0, "other bytes than in the file");
    while (fgets(line, sizeof line, io))
        if (sscanf(line, "syscr: %lld", &counts[0]) == 1)
            break;
    getrusage(RUSAGE_SELF, &usage);
    counts[1] = usage.ru_majflt;
    _exit(0);
}

static void read_ahead_is_not_needed(void **state)
{
    (void)state;
    static const enum load_path paths[] = {LOAD_AUTO, LOAD_MAP, LOAD_READ, LOAD_DIRECT};
    long long *counts = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    struct load_fixture f;
    assert_true(counts != MAP_FAILED);
    fixture_make(&f, false);
    for (int i = 0; i < 4; i++) {
        bool cold = fixture_cache(&f, false);
        counts[0] = counts[1] = 0;
        pid_t child = fork();
        if (child == 0)
            reads_of_a_child(&f, paths[i], counts);
        assert_int_equal(status_of(child), 0);
        // One read for a leaf, and what asks about the page cache.
        if (counts[0] > FIXTURE_LEAVES + 1 + 16)
            fail_msg("%s: %lld reads of %d leaves", words[paths[i]], counts[0], FIXTURE_LEAVES + 1);
        if (cold && counts[1] > 100) // one for each of the 5000 pages, were they read so
            fail_msg("%s: %lld page faults had to read", words[paths[i]], counts[1]);
    }
    munmap(counts, 4096);
    fixture_free(&f);
}

// A file system in memory.
static void files_in_memory(void **state)
{
    (void)state;
    struct load_fixture f;
    fixture_make(&f, false);
    char dir[] = "/dev/shm/test_loader.XXXXXX";
    if (!mkdtemp(dir)) {
        fixture_free(&f);
        skip();
    }
    fixture_close(&f);
    unlink(f.path);
    rmdir(f.dir);
    snprintf(f.dir, sizeof f.dir, "%s", dir);
    fixture_write(&f);
    fixture_open(&f);
    for (int turn = 0; turn < 5 * 2; turn++) {
        const uint8_t *base;
        struct loader *loader;
        struct load_figures figures;
        struct error err;
        struct device device = fresh_device();
        struct loader_options options = load_options(&f, &device, turn % 2);
        options.path = (enum load_path)(turn / 2);
        if (loader_start(&loader, &options, &base, &err) || loader_finish(loader, &err))
            fail_msg("%s: %s", words[turn / 2], err.msg);
        assert_memory_equal(base, f.payload, f.payload_bytes);
        loader_figures(loader, &figures);
        if (options.path == LOAD_AUTO)
            assert_int_equal(figures.path, turn % 2 ? LOAD_READ : LOAD_MAP);
        loader_free(loader);
        free_device(&device);
    }
    fixture_free(&f);
}

static void no_threads(void **state)
{
    (void)state;
    struct load_fixture f;
    fixture_make(&f, false);
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        const uint8_t *base;
        struct loader *loader;
        struct error err;
        struct device device = fresh_device();
        struct loader_options options = load_options(&f, &device, false);
        refuse(SYS_clone3, any, any, EAGAIN);
        refuse(SYS_clone, any, any, EAGAIN);
        int rc = loader_start(&loader, &options, &base, &err);
        CHECK(rc == ERR_MEMORY && strstr(err.msg, "cannot start a thread"), "%d: %s", rc, rc ? err.msg : "");
        CHECK(device.ended, "the device was not told");
        _exit(0);
    }
    int status = status_of(child);
    if (status != 0 && !(WIFEXITED(status) && WEXITSTATUS(status) == 77))
        fail_msg("status %x", status);
    fixture_free(&f);
}

// ---- files that vanish under their maps ----------------------------------------------------------------------------

static void touch(void *arg)
{
    volatile const uint8_t *byte = arg;
    (void)*byte;
}

// A map of a file whose second page is gone.
static uint8_t *broken_map(void)
{
    char name[] = "/tmp/test_loader.XXXXXX";
    int fd = mkstemp(name);
    assert_true(fd >= 0 && ftruncate(fd, 8192) == 0);
    uint8_t *map = mmap(NULL, 8192, PROT_READ, MAP_PRIVATE, fd, 0);
    assert_true(map != MAP_FAILED && ftruncate(fd, 4096) == 0);
    unlink(name);
    close(fd);
    return map;
}

static void a_guard_holds(void **state)
{
    (void)state;
    uint8_t *map = broken_map();
    struct loader_guard *guard;
    struct error err;
    assert_int_equal(loader_guard_new(&guard, map, 8192, "some/file", NULL, NULL, &err), 0);
    for (int i = 0; i < 3; i++) {
        assert_true(loader_guard_try(touch, map));
        assert_false(loader_guard_try(touch, map + 4096));
    }
    assert_int_equal(loader_guard_error("some/file", &err), ERR_IO);
    assert_non_null(strstr(err.msg, "some/file: a part that is in use can no longer be read"));
    loader_guard_free(guard);
    loader_guard_free(NULL);
    munmap(map, 8192);
}

static void say_lost(void *arg, const struct error *why)
{
    if (write(*(int *)arg, why->msg, strlen(why->msg)) < 0)
        _exit(99);
}

static void touch_task(void *arg, int64_t task, int thread)
{
    if (thread > 0) // not the one that has called
        touch((uint8_t *)arg + task * 4096);
    else
        usleep(1000);
}

enum use { BY_ITSELF, IN_A_POOL, WITH_A_HOOK, ELSEWHERE, SENT };

// A rank that computes on a file which is shortened meanwhile.
static void compute(struct load_fixture *f, enum use use, int say)
{
    const uint8_t *base;
    struct loader *loader;
    struct error err;
    struct thread_pool *pool;
    struct device device = fresh_device();
    struct loader_options options = load_options(f, &device, false);
    options.path = LOAD_MAP;
    options.on_lost = use == WITH_A_HOOK ? say_lost : NULL;
    options.arg = &say;
    signal(SIGBUS, SIG_DFL); // not cmocka's
    dup2(say, STDERR_FILENO);
    CHECK(!loader_start(&loader, &options, &base, &err) && !loader_finish(loader, &err), "%s", err.msg);
    CHECK(!truncate(f->path, (off_t)f->payload_offset + 4096), "cannot shorten it");
    if (use == IN_A_POOL) {
        CHECK(!thread_pool_create(&pool, 3, &err), "%s", err.msg);
        thread_pool_run(pool, touch_task, (void *)(uintptr_t)base, 100);
    } else if (use == ELSEWHERE)
        touch(broken_map() + 4096);
    else if (use == SENT)
        kill(getpid(), SIGBUS);
    else
        touch((void *)(uintptr_t)(base + f->payload_bytes / 2));
    _exit(0);
}

static void shortened_under_the_kernels(void **state)
{
    (void)state;
    struct load_fixture f;
    fixture_make(&f, false);
    for (int use = BY_ITSELF; use <= SENT; use++) {
        int pipe_fds[2];
        char said[2048] = "";
        assert_int_equal(pipe(pipe_fds), 0);
        fixture_write(&f);
        fixture_cache(&f, true);
        fflush(stdout);
        pid_t child = fork();
        if (child == 0)
            compute(&f, (enum use)use, pipe_fds[1]);
        close(pipe_fds[1]);
        size_t length = 0;
        for (ssize_t got; (got = read(pipe_fds[0], said + length, sizeof said - 1 - length)) > 0;)
            length += (size_t)got;
        said[length] = 0;
        close(pipe_fds[0]);
        int status = status_of(child);
        bool told = strstr(said, f.path) && strstr(said, "can no longer be read");
        bool ended = WIFEXITED(status) && WEXITSTATUS(status) == -ERR_IO;
        if (use < ELSEWHERE ? !told || !ended : told || ended || status == 0)
            fail_msg("use %d: status %x, '%s'", use, status, said);
#if !defined(__SANITIZE_ADDRESS__) && !defined(KERNELS_SANITIZED)
        if (use >= ELSEWHERE)
            assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS);
#endif
    }
    fixture_free(&f);
}

// A file that is shortened and written again all the while: a load brings its bytes or fails with a sentence.
struct changer {
    struct load_fixture *f;
    atomic_bool stop;
};

static void *change(void *arg)
{
    struct changer *changer = arg;
    struct load_fixture *f = changer->f;
    int fd = open(f->path, O_WRONLY | O_CLOEXEC);
    while (fd >= 0 && !atomic_load(&changer->stop)) {
        if (ftruncate(fd, (off_t)(f->payload_offset + SHARD_LEAF_BYTES)) != 0)
            break;
        if (pwrite(fd, f->content, f->file_bytes, 0) != (ssize_t)f->file_bytes)
            break;
        usleep((useconds_t)(random_bits() % 6000)); // in the middle of a load, more often than not
    }
    close(fd);
    return NULL;
}

static void shortened_under_the_loader(void **state)
{
    (void)state;
    struct load_fixture f;
    pthread_t thread;
    int loaded = 0, failed = 0;
    fixture_make(&f, false);
    struct changer changer = {.f = &f};
    assert_int_equal(pthread_create(&thread, NULL, change, &changer), 0);
    for (int turn = 0; turn < 200; turn++) {
        const uint8_t *base;
        struct loader *loader;
        struct error err;
        struct device device = fresh_device();
        struct loader_options options = load_options(&f, &device, false);
        options.path = LOAD_MAP;
        options.threads = 1;
        assert_int_equal(loader_start(&loader, &options, &base, &err), 0);
        int rc = loader_finish(loader, &err);
        if (rc && ((rc != ERR_IO && rc != ERR_CORRUPT) || !strstr(err.msg, f.path)))
            fail_msg("%d: %s", rc, err.msg);
        loaded += rc == 0;
        failed += rc != 0;
        loader_free(loader);
        free_device(&device);
    }
    atomic_store(&changer.stop, true);
    pthread_join(thread, NULL);
    printf("# %d loads were whole, %d failed\n", loaded, failed);
    assert_true(failed > 0);
    fixture_free(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_refusal),
        cmocka_unit_test(reads_that_lie),
        cmocka_unit_test(read_ahead_is_not_needed),
        cmocka_unit_test(files_in_memory),
        cmocka_unit_test(no_threads),
        cmocka_unit_test(a_guard_holds),
        cmocka_unit_test(shortened_under_the_kernels),
        cmocka_unit_test(shortened_under_the_loader),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
