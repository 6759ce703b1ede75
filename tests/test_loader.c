// The loader: every path brings the same bytes to every kind of backend and says which way it went and why; the order follows who waits;
// damage and failures are errors with a sentence, and nothing is left behind by a load that ends early. What surroundings can do to it:
// test_loader_hostile.c.
#include "tests/loader_help.h"

static bool direct_works, uring_works; // in the folder of the test

static const char *const words[] = {"auto", "map", "read", "direct", "uring"};

// Loads everything and compares it.
static void load_whole(struct load_fixture *f, const struct loader_options *options, struct load_figures *figures,
                       const char *what)
{
    const uint8_t *base;
    struct loader *loader;
    struct error err;
    if (loader_start(&loader, options, &base, &err) || loader_finish(loader, &err) || loader_finish(loader, &err))
        fail_msg("%s: %s", what, err.msg);
    assert_true(loader_is_done(loader));
    if (memcmp(base, f->payload, f->payload_bytes) != 0)
        fail_msg("%s: other bytes than in the file", what);
    loader_figures(loader, figures);
    if (options->device->mapped != loader_is_mapped(loader))
        fail_msg("%s: not where the device was told", what);
    loader_free(loader);
}

// ---- paths ---------------------------------------------------------------------------------------------------------

enum { HOST, DEVICE };
enum { COLD, WARM };

static const struct path_case {
    enum load_path asked;
    int backend, cache;
    bool compressed;
    enum load_path wanted; // where everything works
    const char *why;
} path_cases[] = {
    {LOAD_AUTO, HOST, WARM, false, LOAD_MAP, " % of the file lies in the page cache"},
    {LOAD_AUTO, HOST, COLD, false, LOAD_MAP, " % of the file lies in the page cache"},
    {LOAD_AUTO, HOST, WARM, true, LOAD_READ, " % of the file"},
    {LOAD_AUTO, HOST, COLD, true, LOAD_URING, " % of the file"},
    {LOAD_AUTO, DEVICE, WARM, false, LOAD_READ, " % of the file"},
    {LOAD_AUTO, DEVICE, COLD, false, LOAD_URING, " % of the file"},
    {LOAD_AUTO, DEVICE, WARM, true, LOAD_READ, " % of the file"},
    {LOAD_AUTO, DEVICE, COLD, true, LOAD_URING, " % of the file"},
    {LOAD_MAP, HOST, WARM, false, LOAD_MAP, "as asked for"},
    {LOAD_MAP, HOST, COLD, false, LOAD_MAP, "as asked for"},
    {LOAD_MAP, DEVICE, WARM, false, LOAD_READ, "the weights go to a device; "},
    {LOAD_MAP, HOST, WARM, true, LOAD_READ, "a compressed file is not used where it lies; "},
    {LOAD_READ, HOST, WARM, false, LOAD_READ, "as asked for"},
    {LOAD_READ, HOST, COLD, false, LOAD_READ, "as asked for"},
    {LOAD_READ, HOST, COLD, true, LOAD_READ, "as asked for"},
    {LOAD_READ, DEVICE, COLD, false, LOAD_READ, "as asked for"},
    {LOAD_READ, DEVICE, COLD, true, LOAD_READ, "as asked for"},
    {LOAD_DIRECT, HOST, WARM, false, LOAD_DIRECT, "as asked for"},
    {LOAD_DIRECT, HOST, COLD, true, LOAD_DIRECT, "as asked for"},
    {LOAD_DIRECT, DEVICE, COLD, false, LOAD_DIRECT, "as asked for"},
    {LOAD_DIRECT, DEVICE, COLD, true, LOAD_DIRECT, "as asked for"},
    {LOAD_URING, HOST, WARM, false, LOAD_URING, "as asked for"},
    {LOAD_URING, HOST, COLD, true, LOAD_URING, "as asked for"},
    {LOAD_URING, DEVICE, COLD, false, LOAD_URING, "as asked for"},
    {LOAD_URING, DEVICE, COLD, true, LOAD_URING, "as asked for"},
};

static void check_path(struct load_fixture *f, const struct path_case *c, int threads)
{
    char what[160];
    struct load_figures figures;
    struct device device = fresh_device();
    atomic_llong loaded = 0;
    snprintf(what, sizeof what, "%s, %s, %s%s, %d threads", words[c->asked], c->backend == HOST ? "host" : "device",
             c->cache == WARM ? "warm" : "cold", c->compressed ? ", compressed" : "", threads);
    if (!fixture_cache(f, c->cache == WARM) && c->cache == COLD && c->asked == LOAD_AUTO)
        return; // a file system whose files are always there
    struct loader_options options = load_options(f, &device, c->backend == DEVICE);
    options.path = c->asked;
    options.threads = threads;
    options.loaded_bytes = &loaded;
    load_whole(f, &options, &figures, what);
    enum load_path wanted = c->wanted == LOAD_URING && !uring_works ? LOAD_DIRECT : c->wanted;
    wanted = wanted >= LOAD_DIRECT && !direct_works ? LOAD_READ : wanted;
    if (figures.path != wanted || !strstr(figures.why, c->why))
        fail_msg("%s: %s (%s), not %s (%s)", what, words[figures.path], figures.why, words[wanted], c->why);
    if (wanted != c->wanted && !strstr(figures.why, "without "))
        fail_msg("%s: %s does not say what is missing", what, figures.why);
    assert_int_equal(loaded, (long long)f->payload_bytes);
    // A compressed piece begins and ends inside of pages.
    uint64_t stored = f->file_bytes - f->payload_offset;
    if (figures.read_bytes < (int64_t)stored ||
        figures.read_bytes > (int64_t)(stored + 2 * 4096 * (FIXTURE_LEAVES + 1)))
        fail_msg("%s: %lld bytes read of %llu", what, (long long)figures.read_bytes, (unsigned long long)stored);
    assert_true(figures.wall_s > 0 && figures.read_s > 0 && figures.verify_s > 0 && figures.cpu_s > 0);
    assert_true((figures.decode_s > 0) == c->compressed && (figures.copy_s > 0) == (c->backend == DEVICE));
    assert_true(figures.threads >= 1 && figures.threads <= LOAD_LANES && (threads == 0 || figures.threads <= threads));
    free_device(&device);
}

static void every_path(void **state)
{
    (void)state;
#ifdef KERNELS_SANITIZED // slow
    static const int threads[] = {5};
#else
    static const int threads[] = {0, 1, 5};
#endif
    for (int compressed = 0; compressed < 2; compressed++) {
        struct load_fixture f;
        fixture_make(&f, compressed);
        assert_int_equal(shard_file_is_compressed(f.file), compressed);
        for (size_t i = quick(); i < sizeof path_cases / sizeof *path_cases; i += quick() ? 3 : 1)
            for (size_t t = 0; t < sizeof threads / sizeof *threads && path_cases[i].compressed == compressed; t++)
                check_path(&f, &path_cases[i], threads[t]);
        fixture_free(&f);
    }
}

static void paths_have_names(void **state)
{
    (void)state;
    enum load_path path;
    for (int i = 0; i < 5; i++) {
        assert_string_equal(load_path_name((enum load_path)i), words[i]);
        assert_true(load_path_from_name(words[i], &path) && path == (enum load_path)i);
    }
    assert_string_equal(load_path_name((enum load_path)5), "unknown");
    assert_false(load_path_from_name("mmap", &path));
}

// ---- verifying -----------------------------------------------------------------------------------------------------

// A flipped bit anywhere, by every path: found, and told with file, rank, tensor, bytes and the way to repair it.
static void flips_are_found(void **state)
{
    (void)state;
    static const struct {
        uint64_t leaf;
        const char *tensor;
    } flips[] = {{0, "embedding"}, {8, "qkv"}, {FIXTURE_LEAVES, "head"}};
    for (int compressed = 0; compressed < 2; compressed++) {
        struct load_fixture f;
        fixture_make(&f, compressed);
        for (int turn = quick() ? 4 * compressed : 0; turn < 3 * 5 * 2; turn += quick() ? 5 : 1) {
            const uint8_t *base;
            struct loader *loader;
            struct error err, again;
            struct device device = fresh_device();
            uint64_t leaf = flips[turn % 3].leaf;
            struct shard_stored at = shard_file_stored_leaf(f.file, leaf);
            uint64_t flipped = f.payload_offset + at.offset + (turn % 2 ? at.bytes - 1 : 0);
            fixture_flip(&f, flipped, 0x10);
            struct loader_options options = load_options(&f, &device, turn / 15);
            options.path = (enum load_path)(turn / 3 % 5);
            assert_int_equal(loader_start(&loader, &options, &base, &err), 0);
            int rc = turn % 2 ? loader_need(loader, leaf * SHARD_LEAF_BYTES, 1, &err) : loader_finish(loader, &err);
            if (rc != ERR_CORRUPT || err.code != rc || !strstr(err.msg, f.path) || !strstr(err.msg, "rank 0") ||
                !strstr(err.msg, flips[turn % 3].tensor) || !strstr(err.msg, "file bytes ") ||
                !strstr(err.msg, "tpshard repair"))
                fail_msg("leaf %llu, %s: %d, %s", (unsigned long long)leaf, words[options.path], rc, err.msg);
            // The first failure is everybody's.
            assert_int_equal(loader_need(loader, 0, f.payload_bytes, &again), ERR_CORRUPT);
            assert_string_equal(again.msg, err.msg);
            assert_int_equal(loader_finish(loader, &again), ERR_CORRUPT);
            assert_true(loader_is_done(loader));
            loader_free(loader);
            free_device(&device);
            fixture_flip(&f, flipped, 0x10);
        }
        fixture_free(&f);
    }
}

// Loads everything while one byte of the file is another. What loader_finish says.
static int load_damaged(struct load_fixture *f, enum load_path path, bool to_device, enum verify_mode verify,
                        uint64_t offset)
{
    const uint8_t *base;
    struct loader *loader;
    struct error err;
    struct device device = fresh_device();
    fixture_flip(f, f->payload_offset + offset, 4);
    struct loader_options options = load_options(f, &device, to_device);
    options.path = path;
    options.verify = verify;
    assert_int_equal(loader_start(&loader, &options, &base, &err), 0);
    int rc = loader_finish(loader, &err);
    loader_free(loader);
    free_device(&device);
    fixture_flip(f, f->payload_offset + offset, 4);
    return rc;
}

// No leaf is passed over, whichever lane brings it and wherever in its buffers.
static void every_leaf_is_verified(void **state)
{
    (void)state;
    struct load_fixture f;
    fixture_make(&f, false);
    for (int turn = quick() ? 9 : 2; turn < 5 * 2; turn++) // of each path's: the host, a device
        for (uint64_t leaf = 0; leaf <= FIXTURE_LEAVES; leaf++)
            if (load_damaged(&f, (enum load_path)(turn / 2), turn % 2, VERIFY_FULL, leaf * SHARD_LEAF_BYTES + 3) !=
                ERR_CORRUPT)
                fail_msg("%s: leaf %llu is not compared", words[turn / 2], (unsigned long long)leaf);
    fixture_free(&f);
}

// While it is loaded a map asks for no read-ahead; whoever keeps that afterwards loses its pages first when memory is short.
static void maps_are_ordinary_afterwards(void **state)
{
    (void)state;
    struct load_fixture f;
    const uint8_t *base;
    struct loader *loader;
    struct error err;
    struct device device = fresh_device();
    char line[4096];
    fixture_make(&f, false);
    fixture_cache(&f, false);
    struct loader_options options = load_options(&f, &device, false);
    assert_int_equal(loader_start(&loader, &options, &base, &err), 0);
    assert_int_equal(loader_finish(loader, &err), 0);
    assert_true(loader_is_mapped(loader));
    FILE *maps = fopen("/proc/self/smaps", "re");
    assert_non_null(maps);
    bool inside = false;
    int flags = 0;
    while (fgets(line, sizeof line, maps)) {
        unsigned long begin, end;
        if (sscanf(line, "%lx-%lx ", &begin, &end) == 2)
            inside = (uintptr_t)base >= begin && (uintptr_t)base < end;
        if (inside && strncmp(line, "VmFlags:", 8) == 0) {
            flags++;
            if (strstr(line, " rr"))
                fail_msg("the map is still read without order: %s", line);
        }
    }
    fclose(maps);
    assert_int_equal(flags, 1);
    loader_free(loader);
    free_device(&device);
    fixture_free(&f);
}

static void less_verifying(void **state)
{
    (void)state;
    struct load_fixture f;
    fixture_make(&f, false);
    static const struct {
        enum verify_mode mode;
        uint64_t leaf;
        int rc;
    } cases[] = {
        {VERIFY_OFF, 0, 0}, {VERIFY_SAMPLE, 0, ERR_CORRUPT}, {VERIFY_SAMPLE, 1, 0}, {VERIFY_FULL, 1, ERR_CORRUPT}};
    for (size_t i = 0; i < 4 * 2; i++)
        assert_int_equal(
            load_damaged(&f, LOAD_AUTO, i % 2, cases[i / 2].mode, cases[i / 2].leaf * SHARD_LEAF_BYTES + 77),
            cases[i / 2].rc);
    fixture_free(&f);
}

// A decoder is given no byte that nobody has compared, whatever is asked for.
static void decoders_see_verified_bytes(void **state)
{
    (void)state;
    struct load_fixture f;
    fixture_make(&f, true);
    for (int turn = 0; turn < 4 * 3; turn += quick() ? 5 : 1) { // of the last ones, one is noise
        const uint8_t *base;
        struct loader *loader;
        struct error err;
        struct device device = fresh_device();
        struct shard_stored at = shard_file_stored_leaf(f.file, FIXTURE_LEAVES - 4 + (uint64_t)turn / 3);
        uint64_t flipped = f.payload_offset + at.offset + at.bytes / 2;
        fixture_flip(&f, flipped, 1);
        struct loader_options options = load_options(&f, &device, turn % 2);
        options.verify = (enum verify_mode)(turn % 3);
        assert_int_equal(loader_start(&loader, &options, &base, &err), 0);
        assert_int_equal(loader_finish(loader, &err), ERR_CORRUPT);
        if (!strstr(err.msg, "checksum"))
            fail_msg("case %d: %s", turn, err.msg);
        loader_free(loader);
        free_device(&device);
        fixture_flip(&f, flipped, 1);
    }
    fixture_free(&f);
}

// ---- order ---------------------------------------------------------------------------------------------------------

static void wait_for_reads(struct store_file *source, int reads)
{
    for (int i = 0; source_reads(source) < reads; i++) {
        assert_true(i < 10000);
        usleep(1000);
    }
}

struct needer {
    struct loader *loader;
    uint64_t offset, bytes;
    struct error err;
    int rc;
    atomic_int done;
};

static void *need(void *arg)
{
    struct needer *n = arg;
    n->rc = loader_need(n->loader, n->offset, n->bytes, &n->err);
    atomic_store(&n->done, 1);
    return NULL;
}

static void count_call(void *arg) { atomic_fetch_add((atomic_int *)arg, 1); }

static void wait_for_calls(atomic_int *calls, int wanted)
{
    for (int i = 0; *calls < wanted; i++) {
        assert_true(i < 10000);
        usleep(1000);
    }
}

// Calls until none has come for so long, which is many looks.
static int settled_calls(atomic_int *calls, int wanted_ms)
{
    int seen = *calls, quiet_ms = 0;
    for (int i = 0; quiet_ms < wanted_ms; i++) {
        assert_true(i < 2000);
        usleep(10000);
        quiet_ms = *calls == seen ? quiet_ms + 10 : 0;
        seen = *calls;
    }
    return seen;
}

// One thread, and a source that gives what it is told to: who waits is served next, the order goes on behind it, and what was passed over comes at
// the end.
static void who_waits_is_served(void **state)
{
    (void)state;
    struct load_fixture f;
    const uint8_t *base;
    struct loader *loader;
    struct error err;
    pthread_t thread;
    atomic_int progress = 0;
    struct device device = fresh_device();
    fixture_make(&f, false);
    f.source.remote = true;
    source_allow(&f.source, 0);
    struct loader_options options = load_options(&f, &device, false);
    options.threads = 1;
    options.on_progress = count_call;
    options.arg = &progress;
    assert_int_equal(loader_start(&loader, &options, &base, &err), 0);
    wait_for_reads(&f.source, 1);
    assert_false(loader_is_done(loader));

    uint64_t piece = 5; // FIXTURE_LEAVES + 1 leaves, one thread
    struct needer n = {.loader = loader, .offset = (2 * piece + 1) * SHARD_LEAF_BYTES + 5, .bytes = SHARD_LEAF_BYTES};
    assert_int_equal(pthread_create(&thread, NULL, need, &n), 0);
    usleep(120000);
    assert_false(n.done);
    source_allow(&f.source, 2); // the piece under way, then the one that is waited for
    pthread_join(thread, NULL);
    assert_int_equal(n.rc, 0);
    assert_memory_equal(base + n.offset, f.payload + n.offset, n.bytes);
    assert_true(progress > 0);
    wait_for_reads(&f.source, 3);
    // What is there is there, and costs no wait.
    assert_int_equal(loader_need(loader, 0, piece * SHARD_LEAF_BYTES, &err), 0);
    assert_int_equal(loader_need(loader, 2 * piece * SHARD_LEAF_BYTES, piece * SHARD_LEAF_BYTES, &err), 0);
    assert_int_equal(loader_need(loader, f.payload_bytes + 1, 0, &err), 0);
    source_allow(&f.source, -1);
    assert_int_equal(loader_finish(loader, &err), 0);
    static const uint64_t order[] = {0, 2, 3, 4, 1};
    assert_int_equal(f.source.num_reads, 5);
    for (int i = 0; i < 5; i++)
        assert_int_equal(f.source.read_at[i], f.payload_offset + order[i] * piece * SHARD_LEAF_BYTES);
    assert_memory_equal(base, f.payload, f.payload_bytes);
    loader_free(loader);
    free_device(&device);
    fixture_free(&f);
}

// ---- a source behind a network -------------------------------------------------------------------------------------

static void damage_is_fetched_again(void **state)
{
    (void)state;
    for (int compressed = 0; compressed < 2; compressed++)
        for (int times = 0; times < 5; times += quick() ? 2 : 1) {
            struct load_fixture f;
            const uint8_t *base;
            struct loader *loader;
            struct load_figures figures;
            struct error err;
            struct device device = fresh_device();
            fixture_make(&f, compressed);
            f.source.remote = true;
            f.source.damaged_offset = f.payload_offset + shard_file_stored_leaf(f.file, 7).offset + 3;
            f.source.damaged_times = times;
            struct loader_options options = load_options(&f, &device, times % 2);
            assert_int_equal(loader_start(&loader, &options, &base, &err), 0);
            int rc = loader_finish(loader, &err);
            loader_figures(loader, &figures);
            assert_int_equal(rc, times < 3 ? 0 : ERR_CORRUPT);
            assert_int_equal(figures.fetched_again, times < 3 ? times : 2);
            assert_int_equal(figures.path, LOAD_READ);
            assert_string_equal(figures.why, "the file is fetched");
            // All of it, once, is given to be kept; of a damaged one, never what is damaged.
            uint64_t end = f.payload_offset;
            for (int i = 0; i < f.source.num_kept; i++) {
                const uint64_t *range = f.source.kept[i];
                assert_true(rc == 0 ? range[0] == end : range[0] >= end);
                assert_true(rc == 0 || f.source.damaged_offset < range[0] || f.source.damaged_offset >= range[1]);
                end = range[1];
            }
            if (rc == 0) {
                assert_int_equal(end, f.file_bytes);
                assert_memory_equal(base, f.payload, f.payload_bytes);
            }
            loader_free(loader);
            free_device(&device);
            fixture_free(&f);
        }
}

// A damaged copy in the cache: what is copied is asked for anew, of what is mapped the next start will.
static void a_damaged_cache_heals(void **state)
{
    (void)state;
    struct load_fixture f;
    fixture_make(&f, false);
    for (int i = 0; i < 5; i++)
        fixture_flip(&f, f.payload_offset + (uint64_t)(4 * i) * SHARD_LEAF_BYTES + 99, 8);
    for (int turn = 0; turn < 5 * 2; turn++) {
        const uint8_t *base;
        struct loader *loader;
        struct load_figures figures;
        struct error err;
        struct device device = fresh_device();
        f.source.cached = true;
        f.source.distrusted = 0;
        f.source.cancelled = 0;
        struct loader_options options = load_options(&f, &device, turn % 2);
        options.path = (enum load_path)(turn / 2);
        assert_int_equal(loader_start(&loader, &options, &base, &err), 0);
        int rc = loader_finish(loader, &err);
        loader_figures(loader, &figures);
        assert_true(f.source.distrusted > 0);
        if (loader_is_mapped(loader)) {
            assert_int_equal(rc, ERR_CORRUPT);
            assert_non_null(strstr(err.msg, "was damaged and has been removed; start again"));
        } else {
            if (rc)
                fail_msg("%s", err.msg);
            assert_int_equal(figures.fetched_again, 5);
            assert_memory_equal(base, f.payload, f.payload_bytes);
        }
        loader_free(loader);
        free_device(&device);
    }
    fixture_free(&f);
}

// Whoever waits is heard of while bytes arrive, those of a read under way too; and while a remote source is silent, but not for ever.
static void silence_has_an_end(void **state)
{
    (void)state;
    // A file of the cache that turns out to be damaged is a remote one from then on.
    for (int cached = 0; cached < 2; cached++) {
        struct load_fixture f;
        const uint8_t *base;
        struct loader *loader;
        struct error err;
        pthread_t thread;
        atomic_int progress = 0;
        struct device device = fresh_device();
        fixture_make(&f, false);
        f.source.remote = !cached;
        f.source.cached = cached;
        if (cached)
            fixture_flip(&f, f.payload_offset + 5, 1);
        source_allow(&f.source, 0);
        struct loader_options options = load_options(&f, &device, true);
        options.on_progress = count_call;
        options.arg = &progress;
        options.silence_ms = 500;
        assert_int_equal(loader_start(&loader, &options, &base, &err), 0);
        struct needer n = {.loader = loader, .bytes = 1};
        assert_int_equal(pthread_create(&thread, NULL, need, &n), 0);
        wait_for_calls(&progress, 2);
        int calls = settled_calls(&progress, 500);
        atomic_fetch_add(&f.source.trickled, 1);
        wait_for_calls(&progress, calls + 2); // one for what has come, one for patience
        settled_calls(&progress, 500);
        source_allow(&f.source, -1);
        pthread_join(thread, NULL);
        if (n.rc || loader_finish(loader, &err))
            fail_msg("%s", n.rc ? n.err.msg : err.msg);
        assert_memory_equal(base, f.payload, f.payload_bytes);
        loader_free(loader);
        free_device(&device);
        fixture_free(&f);
    }
}

// ---- failing, and ending early -------------------------------------------------------------------------------------

static void failures_leave_nothing(void **state)
{
    (void)state;
    static const struct {
        const char *what;
        bool fail_begin, fail_buffers, fails_at_start;
        int fail_copy, fail_read, code;
        const char *says;
    } cases[] = {
        {"begin", true, false, true, -1, -1, ERR_MEMORY, "no room on the device"},
        {"buffer", false, true, false, -1, -1, ERR_MEMORY, "no memory to pin"},
        {"first copy", false, false, false, 0, -1, ERR_GPU, "fell off the bus"},
        {"later copy", false, false, false, 3, -1, ERR_GPU, "fell off the bus"},
        {"first read", false, false, false, -1, 0, ERR_IO, "the server went away"},
        {"later read", false, false, false, -1, 2, ERR_IO, "the server went away"},
    };
    struct load_fixture f;
    fixture_make(&f, false);
    int threads = count_threads();
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const uint8_t *base;
        struct loader *loader = NULL;
        struct error err = {0};
        struct device device = fresh_device();
        device.fail_begin = cases[i].fail_begin;
        device.least_lane = cases[i].fail_buffers ? LOAD_LANES : 0;
        device.fail_copy = cases[i].fail_copy;
        f.source.remote = cases[i].fail_read >= 0;
        f.source.fail_at = cases[i].fail_read;
        f.source.num_reads = 0;
        f.source.cancelled = 0;
        struct loader_options options = load_options(&f, &device, true);
        options.threads = 4;
        int rc = loader_start(&loader, &options, &base, &err);
        assert_int_equal(rc != 0, cases[i].fails_at_start);
        rc = rc ? rc : loader_finish(loader, &err);
        if (rc != cases[i].code || err.code != rc || !strstr(err.msg, cases[i].says))
            fail_msg("%s: %d, %s", cases[i].what, rc, err.msg);
        if (loader)
            loader_free(loader);
        free_device(&device);
        assert_int_equal(count_threads(), threads);
    }
    fixture_free(&f);
    loader_free(NULL);
}

// What keeps some threads from beginning is nothing to those who have what they need.
static void one_lane_is_enough(void **state)
{
    (void)state;
    struct load_fixture f;
    fixture_make(&f, false);
    for (int least = 1; least < 4; least += 2)
        for (int turn = LOAD_READ; turn <= LOAD_URING; turn++) {
            char what[32];
            struct load_figures figures;
            struct device device = fresh_device();
            struct loader_options options = load_options(&f, &device, true);
            device.least_lane = least;
            options.threads = 4;
            options.path = (enum load_path)turn;
            snprintf(what, sizeof what, "%d lanes of 4, %s", 4 - least, words[turn]);
            load_whole(&f, &options, &figures, what);
            free_device(&device);
        }
    fixture_free(&f);
}

static void free_in_the_middle(void **state)
{
    (void)state;
    struct load_fixture f;
    fixture_make(&f, false);
    int threads = count_threads();
    for (int turn = 0; turn < 5 * 2 * 4; turn += quick() ? 3 : 1) {
        const uint8_t *base;
        struct loader *loader;
        struct error err;
        struct device device = fresh_device();
        struct loader_options options = load_options(&f, &device, turn % 2);
        options.path = (enum load_path)(turn / 2 % 5);
        assert_int_equal(loader_start(&loader, &options, &base, &err), 0);
        if (turn / 10 > 0)
            usleep(500 << turn / 10);
        if (turn % 4 < 2) {
            loader_stop(loader);
            int rc = loader_finish(loader, &err); // all of it was there already, or this says that it is not
            assert_true(rc == 0 || rc == ERR_IO || (rc == ERR_OTHER && strstr(err.msg, "its load was ended")));
            assert_true(rc == 0 || loader_need(loader, 0, f.payload_bytes, &err) == rc);
            assert_true(rc != 0 || memcmp(base, f.payload, f.payload_bytes) == 0);
        }
        loader_free(loader);
        free_device(&device);
        assert_int_equal(count_threads(), threads);
    }
    // Reads that are under way when the load is given up are called off.
    const uint8_t *base;
    struct loader *loader;
    struct error err;
    struct device device = fresh_device();
    f.source.remote = true;
    f.source.cancelled = 0;
    source_allow(&f.source, 1);
    struct loader_options options = load_options(&f, &device, true);
    options.threads = 2;
    assert_int_equal(loader_start(&loader, &options, &base, &err), 0);
    wait_for_reads(&f.source, 3);
    loader_stop(loader);
    loader_stop(loader);
    assert_int_equal(f.source.cancelled, 1);
    assert_true(device.ended && loader_is_done(loader));
    loader_free(loader);
    loader_stop(NULL);
    free_device(&device);
    assert_int_equal(count_threads(), threads);
    fixture_free(&f);
}

// A file that has become shorter since its head was read.
static void shortened_files(void **state)
{
    (void)state;
    struct load_fixture f;
    fixture_make(&f, false);
    for (int turn = 0; turn < 5 * 2; turn++) {
        const uint8_t *base;
        struct loader *loader;
        struct error err;
        struct device device = fresh_device();
        fixture_close(&f);
        fixture_write(&f);
        fixture_open(&f);
        assert_int_equal(truncate(f.path, (off_t)(f.payload_offset + 7 * SHARD_LEAF_BYTES + 4096)), 0);
        struct loader_options options = load_options(&f, &device, turn % 2);
        options.path = (enum load_path)(turn / 2);
        assert_int_equal(loader_start(&loader, &options, &base, &err), 0);
        int rc = loader_finish(loader, &err);
        if (rc != ERR_IO || !strstr(err.msg, f.path))
            fail_msg("%s: %d, %s", words[turn / 2], rc, err.msg);
        loader_free(loader);
        free_device(&device);
    }
    fixture_free(&f);
}

static int find_out(void **state)
{
    (void)state;
    struct load_fixture f;
    fixture_make(&f, false);
    int fd = open(f.path, O_RDONLY | O_DIRECT | O_CLOEXEC);
    void *page = aligned_alloc(4096, 4096);
    direct_works = fd >= 0 && page && pread(fd, page, 4096, 0) == 4096;
    free(page);
    if (fd >= 0)
        close(fd);
    char nothing[256] = {0};
    int ring = (int)syscall(SYS_io_uring_setup, 4, nothing);
    uring_works = ring >= 0;
    if (ring >= 0)
        close(ring);
    printf("# O_DIRECT %s here, io_uring %s\n", direct_works ? "works" : "does not work",
           uring_works ? "works" : "does not work");
    fixture_free(&f);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_path),
        cmocka_unit_test(paths_have_names),
        cmocka_unit_test(flips_are_found),
        cmocka_unit_test(every_leaf_is_verified),
        cmocka_unit_test(maps_are_ordinary_afterwards),
        cmocka_unit_test(less_verifying),
        cmocka_unit_test(decoders_see_verified_bytes),
        cmocka_unit_test(who_waits_is_served),
        cmocka_unit_test(damage_is_fetched_again),
        cmocka_unit_test(a_damaged_cache_heals),
        cmocka_unit_test(silence_has_an_end),
        cmocka_unit_test(failures_leave_nothing),
        cmocka_unit_test(one_lane_is_enough),
        cmocka_unit_test(free_in_the_middle),
        cmocka_unit_test(shortened_files),
    };
    return cmocka_run_group_tests(tests, find_out, NULL);
}
