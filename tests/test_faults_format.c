// Damage to shard directories, of every kind that disks, copies and people make: all of it is found, by `tpshard verify` and by the engine before
// a weight is used. Reproducible: fault number n is always the same one.
//
//   FAULTS=2500     so many faults in all (default; TEST_QUICK=1: 500). 10000 take a minute
//   FAULT=1234      this one alone, and what it is
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <malloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "engine/model.h"
#include "formats/file_io.h"
#include "kernels/thread_pool.h"
#include "shard/verify.h"
#include "tests/random_help.h"

static char work[PATH_MAX];

static const char *build_dir(void) { return getenv("BUILD") ? getenv("BUILD") : "build"; }

static long number_of(const char *name, long usual)
{
    const char *text = getenv(name);
    return text ? atol(text) : usual;
}

// ---- directories -----------------------------------------------------------------------------------------------------

enum { MAX_FILES = 12, MAX_TOUCHED = 8, PAGE = 4096 };

struct file {
    char *path;
    uint8_t *bytes; // as they should be
    uint64_t size;
    uint64_t head_used, payload_offset; // of rank files: the head without its padding
    struct shard_file *shard;           // likewise
};

// A directory, and what has been changed in it.
struct target {
    char dir[PATH_MAX];
    struct file files[MAX_FILES]; // ranks, extras, the manifest
    int num_ranks, num_files;
    struct {
        int file;
        uint64_t offset, bytes;
    } touched[MAX_TOUCHED];
    int num_touched;
};

static int run(char *const argv[], char *out, size_t out_bytes)
{
    int pipe_fds[2], status;
    assert_int_equal(pipe(pipe_fds), 0);
    pid_t pid = fork();
    if (pid == 0) {
        int null = open("/dev/null", O_RDWR);
        dup2(null, STDIN_FILENO);
        dup2(pipe_fds[1], STDOUT_FILENO);
        dup2(null, STDERR_FILENO);
        close(pipe_fds[0]);
        execv(argv[0], argv);
        _exit(127);
    }
    close(pipe_fds[1]);
    size_t used = 0;
    for (ssize_t got; (got = read(pipe_fds[0], out + used, out_bytes - 1 - used)) > 0;)
        used += (size_t)got;
    out[used] = 0;
    close(pipe_fds[0]);
    assert_int_equal(waitpid(pid, &status, 0), pid);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

static void convert(const char *name, const char *model, const char *quant, const char *tp, const char *option)
{
    char program[PATH_MAX], dir[2 * PATH_MAX], out[4096];
    snprintf(program, sizeof program, "%s/tpshard", build_dir());
    snprintf(dir, sizeof dir, "%s/%s", work, name);
    char *argv[] = {program,   "convert",     "--quiet",     "--force", "--tp",         (char *)tp,
                    "--quant", (char *)quant, (char *)model, dir,       (char *)option, NULL};
    int status = run(argv, out, sizeof out);
    if (status != 0)
        fail_msg("%s of %s: exit status %d", program, model, status);
}

static void add_file(struct target *target, const char *name)
{
    struct error err;
    assert_true(target->num_files < MAX_FILES);
    struct file *file = &target->files[target->num_files++];
    *file = (struct file){0};
    char path[2 * PATH_MAX];
    snprintf(path, sizeof path, "%s/%s", target->dir, name);
    assert_non_null(file->path = strdup(path));
    if (file_read_all(&file->bytes, &file->size, file->path, 1 << 30, ERR_IO, &err))
        fail_msg("%s", err.msg);
}

static void open_target(struct target *out, const char *name)
{
    struct error err = {0};
    struct manifest *manifest = NULL;
    *out = (struct target){.num_files = 0};
    assert_true(snprintf(out->dir, sizeof out->dir, "%.4000s/%s", work, name) < (int)sizeof out->dir);
    if (manifest_read(&manifest, out->dir, &err))
        fail_msg("%s", err.msg);
    for (size_t i = 0; i < manifest->num_ranks; i++) {
        add_file(out, manifest->ranks[i].name);
        struct file *file = &out->files[i];
        assert_int_equal(shard_file_open(&file->shard, file->path, &err), 0);
        file->payload_offset = file->head_used = shard_file_payload_offset(file->shard);
        while (file->bytes[file->head_used - 1] == 0)
            file->head_used--;
    }
    out->num_ranks = out->num_files;
    for (size_t i = 0; i < manifest->num_extras; i++)
        add_file(out, manifest->extras[i].name);
    add_file(out, MANIFEST_FILE_NAME);
    manifest_free(manifest);
}

// Turns to a copy of the directory.
static void copy_target(struct target *target, const char *suffix)
{
    char command[3 * PATH_MAX];
    snprintf(command, sizeof command, "cp -r '%s' '%s%s'", target->dir, target->dir, suffix);
    assert_int_equal(system(command), 0);
    strncat(target->dir, suffix, sizeof target->dir - strlen(target->dir) - 1);
    for (int i = 0; i < target->num_files; i++) {
        char path[2 * PATH_MAX];
        snprintf(path, sizeof path, "%s/%s", target->dir, strrchr(target->files[i].path, '/') + 1);
        free(target->files[i].path);
        assert_non_null(target->files[i].path = strdup(path));
    }
}

static void close_target(struct target *target)
{
    for (int i = 0; i < target->num_files; i++) {
        shard_file_close(target->files[i].shard);
        free(target->files[i].bytes);
        free(target->files[i].path);
    }
}

static struct file *manifest_of(struct target *target) { return &target->files[target->num_files - 1]; }

// ---- changing and changing back --------------------------------------------------------------------------------------

static void touch(struct target *target, int file, uint64_t offset, uint64_t bytes)
{
    assert_true(target->num_touched < MAX_TOUCHED);
    target->touched[target->num_touched].file = file;
    target->touched[target->num_touched].offset = offset;
    target->touched[target->num_touched++].bytes = bytes;
}

static void write_at(const struct file *file, uint64_t offset, const void *bytes, uint64_t num_bytes, uint64_t size)
{
    struct error err;
    int fd = open(file->path, O_WRONLY | O_CREAT | O_CLOEXEC, 0666);
    assert_true(fd >= 0);
    if (file_pwrite_full(fd, bytes, num_bytes, offset, file->path, &err))
        fail_msg("%s", err.msg);
    assert_int_equal(ftruncate(fd, (off_t)size), 0);
    close(fd);
}

// False: these bytes stand there already.
static bool overwrite(struct target *target, int file, uint64_t offset, const uint8_t *bytes, uint64_t num_bytes)
{
    const struct file *f = &target->files[file];
    assert_true(offset + num_bytes <= f->size);
    if (memcmp(f->bytes + offset, bytes, num_bytes) == 0)
        return false;
    touch(target, file, offset, num_bytes);
    write_at(f, offset, bytes, num_bytes, f->size);
    return true;
}

static bool flip(struct target *target, int file, uint64_t offset, int bit)
{
    uint8_t byte = target->files[file].bytes[offset] ^ (uint8_t)(1 << bit);
    return overwrite(target, file, offset, &byte, 1);
}

static void resize(struct target *target, int file, uint64_t size)
{
    const struct file *f = &target->files[file];
    uint64_t kept = size < f->size ? size : f->size;
    touch(target, file, kept, f->size - kept);
    assert_int_equal(truncate(f->path, (off_t)size), 0);
}

static bool replace(struct target *target, int file, const struct file *with)
{
    const struct file *f = &target->files[file];
    if (f->size == with->size && memcmp(f->bytes, with->bytes, f->size) == 0)
        return false;
    touch(target, file, 0, f->size);
    write_at(f, 0, with->bytes, with->size, with->size);
    return true;
}

static void change_back(struct target *target)
{
    while (target->num_touched > 0) {
        const struct file *f = &target->files[target->touched[--target->num_touched].file];
        uint64_t offset = target->touched[target->num_touched].offset;
        write_at(f, offset, f->bytes + offset, target->touched[target->num_touched].bytes, f->size);
    }
}

// ---- faults ----------------------------------------------------------------------------------------------------------

static struct target targets[3]; // small leaves of experts; several leaves; compressed
static struct target others[3];  // of the same model: other kinds, other ranks; of another model
static int num_targets;

static uint64_t below(uint64_t limit) { return random_bits() % limit; }
static int any_rank(const struct target *t) { return (int)below((uint64_t)t->num_ranks); }

static bool bit_of_payload(struct target *t)
{
    int file = any_rank(t);
    const struct file *f = &t->files[file];
    return flip(t, file, f->payload_offset + below(f->size - f->payload_offset), (int)below(8));
}

static bool bit_of_head(struct target *t)
{
    int file = any_rank(t);
    return flip(t, file, below(t->files[file].head_used), (int)below(8));
}

static bool bit_of_head_padding(struct target *t)
{
    int file = any_rank(t);
    const struct file *f = &t->files[file];
    return flip(t, file, f->head_used + below(f->payload_offset - f->head_used), (int)below(8));
}

// The name of the program that wrote the directory is for people: another one is no damage.
static bool bit_of_manifest(struct target *t)
{
    const struct file *f = manifest_of(t);
    uint64_t offset = below(f->size);
    const char *tool = strstr((const char *)f->bytes, "\"tool\": \"");
    assert_non_null(tool);
    uint64_t begin = (uint64_t)(tool - (const char *)f->bytes) + strlen("\"tool\": \"");
    uint64_t end = begin + strcspn(tool + strlen("\"tool\": \""), "\"");
    return (offset < begin || offset >= end) && flip(t, t->num_files - 1, offset, (int)below(8));
}

static bool bit_of_extra(struct target *t)
{
    int extras = t->num_files - 1 - t->num_ranks;
    if (extras == 0)
        return false;
    int file = t->num_ranks + (int)below((uint64_t)extras);
    return flip(t, file, below(t->files[file].size), (int)below(8));
}

static bool zero_page(struct target *t)
{
    static const uint8_t zeros[PAGE];
    int file = (int)below((uint64_t)t->num_files);
    const struct file *f = &t->files[file];
    uint64_t offset = below((f->size + PAGE - 1) / PAGE) * PAGE;
    if (file < t->num_ranks && below(4)) // seldom the head, most of which is zero
        offset = f->payload_offset + below((f->size - f->payload_offset) / PAGE) * PAGE;
    return overwrite(t, file, offset, zeros, f->size - offset < PAGE ? f->size - offset : PAGE);
}

// A write that came to the wrong place.
static bool misdirected_write(struct target *t)
{
    int file = any_rank(t), from = any_rank(t);
    uint64_t bytes = PAGE << below(5), size = t->files[file].size, from_size = t->files[from].size;
    if (bytes > size || bytes > from_size)
        return false;
    return overwrite(t, file, below((size - bytes) / PAGE + 1) * PAGE,
                     t->files[from].bytes + below((from_size - bytes) / PAGE + 1) * PAGE, bytes);
}

static bool some_bytes(struct target *t)
{
    int file = any_rank(t);
    uint8_t bytes[64];
    uint64_t count = 1 + below(sizeof bytes);
    for (uint64_t i = 0; i < count; i++)
        bytes[i] = (uint8_t)(random_bits() >> 24);
    return overwrite(t, file, below(t->files[file].size - count), bytes, count);
}

// Two leaves change places, of one file or of two.
static bool swapped_leaves(struct target *t)
{
    int a = any_rank(t), b = any_rank(t);
    const struct file *fa = &t->files[a], *fb = &t->files[b];
    uint64_t i = below(shard_file_leaf_count(fa->shard)), j = below(shard_file_leaf_count(fb->shard));
    struct shard_stored pa = shard_file_stored_leaf(fa->shard, i), pb = shard_file_stored_leaf(fb->shard, j);
    uint64_t bytes = pa.bytes < pb.bytes ? pa.bytes : pb.bytes; // the rest stays
    if (a == b && i == j)
        return false;
    uint64_t at_a = fa->payload_offset + pa.offset, at_b = fb->payload_offset + pb.offset;
    return overwrite(t, a, at_a, fb->bytes + at_b, bytes) && overwrite(t, b, at_b, fa->bytes + at_a, bytes);
}

static bool swapped_ranks(struct target *t)
{
    int a = any_rank(t), b = any_rank(t);
    return a != b && replace(t, a, &t->files[b]) && replace(t, b, &t->files[a]);
}

static bool same_rank_twice(struct target *t)
{
    int a = any_rank(t), b = any_rank(t);
    return a != b && replace(t, a, &t->files[b]);
}

static bool truncated(struct target *t)
{
    int file = (int)below((uint64_t)t->num_files);
    uint64_t size = below(t->files[file].size);
    if (below(2))
        size = size / PAGE * PAGE;
    resize(t, file, size);
    return true;
}

static bool grown(struct target *t)
{
    int file = (int)below((uint64_t)t->num_files - 1); // white space may follow the manifest
    resize(t, file, t->files[file].size + 1 + below(3 * PAGE));
    return true;
}

static bool lost_and_found(struct target *t)
{
    static const uint8_t byte[1];
    int file = (int)below((uint64_t)t->num_files);
    struct file empty = {.bytes = (uint8_t *)byte};
    return replace(t, file, &empty);
}

// The file of another run, or all but one of them.
static bool other_run(struct target *t)
{
    const struct target *other = &others[below(sizeof others / sizeof *others)];
    int file = any_rank(t), from = any_rank(other);
    return replace(t, file, &other->files[from]);
}

static bool stale_manifest(struct target *t)
{
    struct target *other = &others[below(sizeof others / sizeof *others)];
    return replace(t, t->num_files - 1, manifest_of(other));
}

static const struct {
    const char *name;
    bool (*make)(struct target *target); // false: nothing is wrong afterwards
    unsigned share;
} faults[] = {
    {"a bit of the payload", bit_of_payload, 26},
    {"a bit of the head", bit_of_head, 10},
    {"a bit of the head's padding", bit_of_head_padding, 4},
    {"a bit of the manifest", bit_of_manifest, 6},
    {"a bit of an extra", bit_of_extra, 4},
    {"a page of zeros", zero_page, 12},
    {"a write to the wrong place", misdirected_write, 7},
    {"other bytes", some_bytes, 6},
    {"swapped leaves", swapped_leaves, 7},
    {"swapped ranks", swapped_ranks, 2},
    {"one rank twice", same_rank_twice, 2},
    {"truncated", truncated, 6},
    {"grown", grown, 3},
    {"emptied", lost_and_found, 1},
    {"a file of another run", other_run, 3},
    {"a stale manifest", stale_manifest, 1},
};
enum { NUM_FAULTS = sizeof faults / sizeof *faults, SHARES = 100 };

// Makes fault `number`; *name says which kind it is. The target is left changed.
static struct target *make_fault(uint64_t number, const char **name)
{
    random_state = number * 0x9e3779b97f4a7c15u + 1;
    for (int i = 0; i < 3; i++)
        random_bits();
    for (int tries = 0; tries < 1000; tries++) {
        struct target *target = &targets[below((uint64_t)num_targets)];
        uint64_t share = below(SHARES);
        int kind = 0;
        for (; share >= faults[kind].share; kind++)
            share -= faults[kind].share;
        *name = faults[kind].name;
        if (faults[kind].make(target))
            return target;
        change_back(target);
    }
    fail_msg("no fault comes of number %" PRIu64, number);
    return NULL;
}

// ---- finding them ----------------------------------------------------------------------------------------------------

// As `tpshard verify` does it.
static bool verify_finds(const struct target *target, struct thread_pool *pool, struct error *err)
{
    static struct verify_findings findings;
    struct shard_dir dir = {0};
    struct progress progress;
    findings.count = 0;
    if (shard_dir_open(&dir, target->dir, err))
        return err->code == ERR_CORRUPT;
    progress_start(&progress, "verify", 0, true);
    int rc = verify_checksums(&dir, target->dir, pool, &progress, &findings, err);
    shard_dir_close(&dir);
    if (rc)
        fail_msg("%s", err->msg);
    *err = findings.shown[0];
    return findings.count > 0;
}

// As a rank of the engine loads its file. The parent reads the tokenizer.
static int load_rank(const struct target *target, const struct manifest *manifest, int rank, struct error *err)
{
    const struct store_options here = {0};
    struct device_options options = {.rank = rank, .tp_size = (int)manifest->tp_size, .device = -1};
    struct model model = {0};
    struct device *device = NULL;
    int rc = kernels_select(&options.kernels, "scalar", err);
    if (rc || (rc = model_open(&model, target->dir, &here, manifest, rank, NULL, err)))
        return rc;
    struct loader_options load = {.backend = &backend_cpu, .verify = VERIFY_FULL, .threads = 1};
    if (!(rc = backend_cpu.open(&device, &options, err))) {
        load.device = device;
        if (!(rc = model_load(&model, &load, err)))
            rc = model_finish(&model, err);
    }
    model_stop(&model);
    backend_cpu.close(device);
    model_close(&model);
    return rc;
}

static int load_all(const struct target *target, struct error *err)
{
    static const char *const extras[] = {"tokenizer.bin", "chat_template.jinja"};
    struct store *store = NULL;
    struct manifest *manifest = NULL;
    int rc = store_open(&store, target->dir, NULL, err);
    if (!rc)
        rc = store_manifest(&manifest, store, err);
    for (int i = 0; !rc && i < 2; i++) {
        uint8_t *bytes = NULL;
        uint64_t num_bytes;
        rc = store_extra(&bytes, &num_bytes, store, manifest, extras[i], 1 << 28, err);
        free(bytes);
    }
    for (int i = 0; !rc && i < target->num_touched; i++) // these first: most often the first of them says it
        if (target->touched[i].file < target->num_ranks && target->touched[i].file < (int)manifest->num_ranks)
            rc = load_rank(target, manifest, target->touched[i].file, err);
    for (size_t rank = 0; !rc && rank < manifest->num_ranks; rank++)
        rc = load_rank(target, manifest, (int)rank, err);
    manifest_free(manifest);
    store_close(store);
    return rc;
}

// Files that the engine does not read, and what the manifest says of extras, are of no account to it.
static bool engine_reads(const struct target *target)
{
    const struct file *manifest = &target->files[target->num_files - 1];
    uint64_t begin = (uint64_t)(strstr((const char *)manifest->bytes, "\"extras\": [") - (const char *)manifest->bytes);
    uint64_t end = begin + strcspn((const char *)manifest->bytes + begin, "]");
    for (int i = 0; i < target->num_touched; i++) {
        int file = target->touched[i].file;
        uint64_t offset = target->touched[i].offset;
        if (file < target->num_ranks || strstr(target->files[file].path, "/tokenizer.bin") ||
            (file == target->num_files - 1 && (offset < begin || offset >= end)))
            return true;
    }
    return false;
}

// 0: whoever should find it found it.
static int try_fault(long number, struct thread_pool *pool, uint64_t of_kind[NUM_FAULTS], bool talks)
{
    const char *name;
    struct error by_verify = {0}, by_engine = {0};
    struct target *target = make_fault((uint64_t)number, &name);
    bool found = verify_finds(target, pool, &by_verify), reads = engine_reads(target);
    int engine = reads ? load_all(target, &by_engine) : ERR_CORRUPT;
    change_back(target);
    for (int kind = 0; kind < NUM_FAULTS; kind++)
        of_kind[kind] += strcmp(faults[kind].name, name) == 0;
    bool refused = engine == ERR_CORRUPT || engine == ERR_IO; // a file that a stale manifest names may not be there
    if (talks || !found || !refused)
        print_error("fault %ld: %s in %s\n  verify: %s\n  engine: %s\n", number, name, target->dir,
                    found ? by_verify.msg : "not found",
                    engine ? reads ? by_engine.msg : "does not read it" : "not found");
    return found && refused ? 0 : 1;
}

// The faults number first, first + step ... in copies of the directories, in a process of its own.
static int try_faults(long first, long step, long count)
{
    uint64_t of_kind[NUM_FAULTS] = {0};
    struct thread_pool *pool;
    struct error err = {0};
    char suffix[32];
    int failed = 0;
    snprintf(suffix, sizeof suffix, "-%ld", first);
    for (int i = 0; i < num_targets; i++)
        copy_target(&targets[i], suffix);
    if (thread_pool_create(&pool, 1, &err))
        return 1;
    for (long number = first; !failed && number < count; number += step)
        failed = try_fault(number, pool, of_kind, false);
    for (int kind = 0; kind < NUM_FAULTS && count / step >= 1000; kind++)
        if (of_kind[kind] == 0) {
            print_error("no fault of the kind \"%s\" was made\n", faults[kind].name);
            failed = 1;
        }
    for (int i = 0; i < num_targets; i++) // nothing of a fault has stayed
        if (verify_finds(&targets[i], pool, &err)) {
            print_error("after the last fault: %s\n", err.msg);
            failed = 1;
        }
    thread_pool_free(pool);
    return failed;
}

static void test_whole(void **state)
{
    (void)state;
    struct thread_pool *pool;
    struct error err = {0};
    assert_int_equal(thread_pool_create(&pool, 1, &err), 0);
    for (int i = 0; i < num_targets; i++)
        if (verify_finds(&targets[i], pool, &err) || load_all(&targets[i], &err))
            fail_msg("before any fault: %s", err.msg);
    thread_pool_free(pool);
}

static void test_faults(void **state)
{
    (void)state;
    long count = number_of("FAULTS", getenv("TEST_QUICK") ? 500 : 2500), only = number_of("FAULT", -1);
    int processes = thread_pool_default_threads() < 4 ? thread_pool_default_threads() : 4, failed = 0;
    pid_t pids[4];
    if (only >= 0) {
        uint64_t of_kind[NUM_FAULTS] = {0};
        struct thread_pool *pool;
        struct error err;
        assert_int_equal(thread_pool_create(&pool, 1, &err), 0);
        assert_int_equal(try_fault(only, pool, of_kind, true), 0);
        thread_pool_free(pool);
        return;
    }
    for (int i = 0; i < processes; i++)
        if ((pids[i] = fork()) == 0)
            _exit(try_faults(i, processes, count));
    for (int i = 0; i < processes; i++) {
        int status;
        assert_int_equal(waitpid(pids[i], &status, 0), pids[i]);
        failed += status != 0;
    }
    assert_int_equal(failed, 0);
}

// As a user sees it: no token, one sentence, exit status 4 or 5. tpengine reads the tokenizer, no other extra.
static void test_programs(void **state)
{
    (void)state;
    char program[PATH_MAX], out[4096];
    snprintf(program, sizeof program, "%s/tpengine", build_dir());
    if (access(program, X_OK))
        skip();
    int wanted = getenv("TEST_QUICK") ? 8 : 40;
    for (uint64_t number = 1000000; wanted > 0; number++) {
        const char *name;
        struct target *target = make_fault(number, &name);
        if (target != &targets[0] && engine_reads(target)) { // the others have a tokenizer
            char *argv[] = {program,        "generate", target->dir, "--prompt", "In the",
                            "--max-tokens", "1",        "--ids",     "--quiet",  NULL};
            int status = run(argv, out, sizeof out);
            if ((status != 4 && status != 5) || out[0])
                fail_msg("fault %" PRIu64 " (%s in %s): exit status %d, \"%s\"", number, name, target->dir, status,
                         out);
            wanted--;
        }
        change_back(target);
    }
}

// ---- setting up ------------------------------------------------------------------------------------------------------

static int set_up(void **state)
{
    (void)state;
    char program[PATH_MAX];
    snprintf(program, sizeof program, "%s/tpshard", build_dir());
    if (access(program, X_OK)) {
        print_message("SKIP no %s: build it first\n", program);
        exit(77);
    }
    snprintf(work, sizeof work, "%s/tests/test_faults_format.%d", build_dir(), (int)getpid());
    assert_int_equal(mkdir(work, 0777), 0);
    convert("experts", "tests/golden/families/mixtral", "int4", "2", NULL);
    convert("leaves", "tests/model", "int8", "2", NULL);
    open_target(&targets[num_targets++], "experts");
    open_target(&targets[num_targets++], "leaves");
    convert("compressed", "tests/model", "int4", "2", "--zstd");
    open_target(&targets[num_targets++], "compressed");
    convert("fp8", "tests/model", "fp8", "2", NULL);
    convert("tp4", "tests/model", "int8", "4", NULL);
    convert("qwen", "tests/golden/families/qwen3_moe", "int4", "3", NULL);
    open_target(&others[0], "fp8");
    open_target(&others[1], "tp4");
    open_target(&others[2], "qwen");
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    char command[PATH_MAX + 16];
    for (int i = 0; i < num_targets; i++)
        close_target(&targets[i]);
    for (size_t i = 0; i < sizeof others / sizeof *others; i++)
        close_target(&others[i]);
    snprintf(command, sizeof command, "rm -rf '%s'", work);
    return system(command) ? -1 : 0;
}

int main(void)
{
    mallopt(M_MMAP_THRESHOLD, 1 << 30); // heads are 2 MiB: pages that come and go would cost more than the rest
    mallopt(M_TRIM_THRESHOLD, 1 << 30);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_whole),
        cmocka_unit_test(test_faults),
        cmocka_unit_test(test_programs),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
