// How fast does the loader bring one rank's file, by each path? One line for each round.
//
//   bench_load DIR [--rank N] [--path auto|map|read|direct|uring] [--threads N] [--verify full|sample|off]
//              [--target host|null] [--cold] [--rounds N]
//
//   target        host: where the CPU's kernels read. null: a device whose copies cost nothing, so that what is left is reading and verifying
//   cold          the file leaves the page cache before each round; cached_percent is what was still there
//   gb_s          payload bytes by the time from loader_start to the end of loader_finish; the head is parsed before, in head_ms
//   cpu_s_per_gb  user and system time of the whole process in that time
//   read_bytes    what the process had the block device read (/proc/self/io), and of that by 100 the share of the whole file
//   first_ms      until the first layer's bytes were there, which a step of the model waits for
//
// bench_start.py runs it beside other readers of the same file.
#include "engine/loader.h"
#include "kernels/futex.h"
#include "kernels/thread_pool.h"

#include <fcntl.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

static struct {
    const char *dir;
    enum load_path path;
    enum verify_mode verify;
    int rank, threads, rounds;
    bool null_target, cold;
} how = {.path = LOAD_AUTO, .verify = VERIFY_FULL, .rounds = 1};

static const char *const verify_names[] = {[VERIFY_FULL] = "full", [VERIFY_SAMPLE] = "sample", [VERIFY_OFF] = "off"};

static void must(int rc, const struct error *err)
{
    if (rc == 0)
        return;
    fprintf(stderr, "bench_load: %s\n", err->msg);
    exit(error_exit_code(rc));
}

static _Noreturn void usage(const char *what)
{
    fprintf(stderr, "bench_load: %s; the options are told at the top of bench/bench_load.c\n", what);
    exit(2);
}

// ---- a device whose copies cost nothing ------------------------------------------------------------------------------

static uint8_t *buffers[LOAD_LANES];

static int null_begin(struct device *device, const uint8_t *mapped, uint64_t bytes, struct load_target *target,
                      struct error *err)
{
    (void)device, (void)mapped, (void)bytes, (void)err;
    *target = (struct load_target){0};
    return 0;
}

static int null_buffer(struct device *device, int lane, uint64_t bytes, uint8_t **buffer, struct error *err)
{
    (void)device;
    if (!buffers[lane]) {
        buffers[lane] = aligned_alloc(2 << 20, (bytes + (2 << 20) - 1) & ~((2ull << 20) - 1));
        if (!buffers[lane])
            return error_set(err, ERR_MEMORY, "no memory for a buffer");
        madvise(buffers[lane], bytes, MADV_HUGEPAGE);
    }
    *buffer = buffers[lane];
    return 0;
}

static int null_copy(struct device *device, int lane, uint64_t offset, const uint8_t *from, uint64_t bytes,
                     struct error *err)
{
    (void)device, (void)lane, (void)offset, (void)from, (void)bytes, (void)err;
    return 0;
}

static void null_end(struct device *device)
{
    (void)device;
    for (int i = 0; i < LOAD_LANES; i++) {
        free(buffers[i]);
        buffers[i] = NULL;
    }
}

static const struct backend null_backend = {
    .abi = BACKEND_ABI,
    .name = "null",
    .load_begin = null_begin,
    .load_buffer = null_buffer,
    .load_copy = null_copy,
    .load_end = null_end,
};

// ---- one round -------------------------------------------------------------------------------------------------------

static double cpu_s(void)
{
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    return (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
           1e-6 * (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec);
}

static long long device_bytes(void)
{
    char line[128];
    long long bytes = -1;
    FILE *io = fopen("/proc/self/io", "r");
    while (io && fgets(line, sizeof line, io))
        sscanf(line, "read_bytes: %lld", &bytes);
    if (io)
        fclose(io);
    return bytes;
}

static int cached_percent(int fd, uint64_t bytes)
{
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), pages = (bytes + page - 1) / page, there = 0;
    void *map = mmap(NULL, bytes, PROT_READ, MAP_PRIVATE, fd, 0);
    unsigned char *state = malloc(pages);
    if (map != MAP_FAILED && state && mincore(map, bytes, state) == 0)
        for (uint64_t i = 0; i < pages; i++)
            there += state[i] & 1;
    if (map != MAP_FAILED)
        munmap(map, bytes);
    free(state);
    return (int)(there * 100 / pages);
}

static void run_round(struct store *store, const struct manifest *manifest)
{
    struct error err;
    struct store_file *source;
    struct shard_file *file;
    struct loader *loader;
    struct device *device = NULL;
    struct thread_pool *pool = NULL;
    const struct backend *backend = how.null_target ? &null_backend : &backend_cpu;
    const struct shard_tensor *first;
    const uint8_t *base;
    uint8_t *head;
    uint64_t head_bytes;

    must(store_file_open(&source, store, manifest, (uint32_t)how.rank, &err), &err);
    int fd = store_file_fd(source), cached = 0;
    if (how.cold)
        posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    if (fd >= 0)
        cached = cached_percent(fd, store_file_bytes(source));
    if (!how.null_target) {
        struct device_options options = {.rank = how.rank, .tp_size = (int)manifest->tp_size, .device = -1};
        must(kernels_select(&options.kernels, "auto", &err), &err);
        must(thread_pool_create(&pool, 1, &err), &err);
        options.pool = pool;
        must(backend->open(&device, &options, &err), &err);
    }

    long long read_before = device_bytes();
    double cpu_before = cpu_s();
    int64_t begin_ns = clock_now_ns();
    must(store_file_head(&head, &head_bytes, source, &err), &err);
    must(shard_file_parse(&file, head, head_bytes, store_file_bytes(source), store_file_name(source), &err), &err);
    int64_t parsed_ns = clock_now_ns();
    struct loader_options options = {.file = file,
                                     .source = source,
                                     .backend = backend,
                                     .device = device,
                                     .verify = how.verify,
                                     .path = how.path,
                                     .threads = how.threads};
    must(loader_start(&loader, &options, &base, &err), &err);
    first = shard_file_find(file, ROLE_DOWN, 0, -1);
    if (!first)
        first = shard_file_find(file, ROLE_QKV, 0, -1);
    if (first)
        must(loader_need(loader, first->data_offset, first->shape.data_bytes, &err), &err);
    int64_t first_ns = clock_now_ns();
    must(loader_finish(loader, &err), &err);
    int64_t end_ns = clock_now_ns();
    double cpu = cpu_s() - cpu_before;
    long long read = device_bytes() - read_before;

    struct load_figures figures;
    loader_figures(loader, &figures);
    double seconds = 1e-9 * (double)(end_ns - parsed_ns), gb = 1e-9 * (double)shard_file_payload_bytes(file);
    printf("load path=%s threads=%d verify=%s target=%s cold=%d cached_percent=%d bytes=%llu seconds=%.4f gb_s=%.3f "
           "cpu_s_per_gb=%.4f verify_s_per_gb=%.4f read_bytes=%lld read_percent=%.2f head_ms=%.2f first_ms=%.1f "
           "why=\"%s\"\n",
           load_path_name(figures.path), figures.threads, verify_names[how.verify], backend->name, how.cold, cached,
           (unsigned long long)shard_file_payload_bytes(file), seconds, gb / seconds, cpu / gb, figures.verify_s / gb,
           read, 100 * (double)read / (double)store_file_bytes(source), 1e-6 * (double)(parsed_ns - begin_ns),
           1e-6 * (double)(first_ns - parsed_ns), figures.why);
    fflush(stdout);
    loader_stop(loader);
    if (device)
        backend->close(device);
    loader_free(loader);
    thread_pool_free(pool);
    shard_file_close(file);
    free(head);
    store_file_close(source);
}

// ---- options ---------------------------------------------------------------------------------------------------------

static void read_options(int argc, char **argv)
{
    static const struct option known[] = {
        {"rank", required_argument, NULL, 'r'},    {"path", required_argument, NULL, 'p'},
        {"threads", required_argument, NULL, 't'}, {"verify", required_argument, NULL, 'v'},
        {"target", required_argument, NULL, 'o'},  {"cold", no_argument, NULL, 'c'},
        {"rounds", required_argument, NULL, 'n'},  {0}};
    int option, mode;
    while ((option = getopt_long(argc, argv, "", known, NULL)) != -1)
        switch (option) {
        case 'r':
            how.rank = atoi(optarg);
            break;
        case 't':
            how.threads = atoi(optarg);
            break;
        case 'n':
            how.rounds = atoi(optarg);
            break;
        case 'c':
            how.cold = true;
            break;
        case 'p':
            if (!load_path_from_name(optarg, &how.path))
                usage("no such path");
            break;
        case 'v':
            for (mode = VERIFY_FULL; mode <= VERIFY_OFF && strcmp(optarg, verify_names[mode]) != 0; mode++)
                ;
            if (mode > VERIFY_OFF)
                usage("no such way to verify");
            how.verify = (enum verify_mode)mode;
            break;
        case 'o':
            how.null_target = strcmp(optarg, "null") == 0;
            if (!how.null_target && strcmp(optarg, "host") != 0)
                usage("no such target");
            break;
        default:
            usage("no such option");
        }
    how.dir = argv[optind];
}

int main(int argc, char **argv)
{
    struct error err;
    struct store *store;
    struct manifest *manifest;
    read_options(argc, argv);
    if (!how.dir) { // `make bench` has no model of any size
        printf("load SKIP no shard directory was named\n");
        return 0;
    }
    must(store_open(&store, how.dir, NULL, &err), &err);
    must(store_manifest(&manifest, store, &err), &err);
    for (int round = 0; round < how.rounds; round++)
        run_round(store, manifest);
    manifest_free(manifest);
    store_close(store);
    return 0;
}
