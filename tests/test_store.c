// Where a model lies: URLs, directories of this machine, and the cache of those that came from elsewhere. What servers do is in
// test_store.py, for which this program has a mode of its own (store_fetch.h).
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "engine/store.h"
#include "engine/store_cache.h"
#include "engine/store_url.h"
#include "formats/file_io.h"
#include "tests/shard_fixture.h"
#include "tests/store_fetch.h"

#define COUNT(array) (sizeof(array) / sizeof *(array))

static char work[64];

static int enter_directory(void **state)
{
    (void)state;
    strcpy(work, "/tmp/test_store.XXXXXX");
    return !mkdtemp(work);
}

static int leave_directory(void **state)
{
    (void)state;
    char command[128];
    snprintf(command, sizeof command, "rm -rf %s", work);
    return system(command);
}

static const char *in_work(const char *name)
{
    static char path[4][256];
    static int next;
    char *out = path[next++ % 4];
    snprintf(out, sizeof path[0], "%s/%s", work, name);
    return out;
}

// ---- URLs ----------------------------------------------------------------------------------------------------------

static void test_urls(void **state)
{
    (void)state;
    static const struct {
        const char *place, *shown, *file; // of "a b.bin"
        bool is_tls;
    } cases[] = {
        {"http://host", "http://host", "http://host/a%20b.bin", false},
        {"https://host/", "https://host", "https://host/a%20b.bin", true},
        {"HTTPS://host:8443/x/y//", "https://host:8443/x/y", "HTTPS://host:8443/x/y/a%20b.bin", true},
        {"http://me:secret@host/x", "http://host/x", "http://me:secret@host/x/a%20b.bin", false},
        {"https://host/x?sig=secret&v=1/2", "https://host/x", "https://host/x/a%20b.bin?sig=secret&v=1/2", true},
        {"https://host?sig=secret", "https://host", "https://host/a%20b.bin?sig=secret", true},
        {"http://[::1]:80/x%20y/", "http://[::1]:80/x%20y", "http://[::1]:80/x%20y/a%20b.bin", false},
        {"http://host/x@y", "http://host/x@y", "http://host/x@y/a%20b.bin", false},
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        struct store_url url;
        struct error err;
        assert_true(store_url_is_one(cases[i].place));
        if (store_url_parse(&url, cases[i].place, &err))
            fail_msg("%s: %s", cases[i].place, err.msg);
        char *file = store_url_of(&url, "a b.bin");
        assert_string_equal(url.shown, cases[i].shown);
        assert_string_equal(file, cases[i].file);
        assert_int_equal(url.is_tls, cases[i].is_tls);
        free(file);
        store_url_clear(&url);
    }
    struct store_url url;
    struct error err;
    assert_int_equal(store_url_parse(&url, "http://h", &err), 0);
    char *file = store_url_of(&url, "ä?#%~../\x01");
    assert_string_equal(file, "http://h/%C3%A4%3F%23%25~..%2F%01");
    free(file);
    store_url_clear(&url);
}

static void test_bad_urls(void **state)
{
    (void)state;
    static const struct {
        const char *place, *words;
    } cases[] = {
        {"ftp://secret.host/x", "ftp://...: a model is read from a directory, http:// or https://"},
        {"file:///secret", "http:// or https://"},
        {"s3://secret/x", "http:// or https://"},
        {"http:///secret", "names no host"},
        {"http://?secret", "names no host"},
        {"https://:80/secret", "names no host"},
        {"https://me:secret@/x", "names no host"},
        {"https://me:sec@ret@host/x", "%40"},
        {"https://me:secret @host/x", "character 18 must not stand in a URL; write it as %20"},
        {"https://host/secret#x", "%23"},
        {"https://host\\@secret/", "%5C"},
        {"https://host/secret\nx", "%0A"},
        {"https://host/secret\xc3\xa4", "%C3"},
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        struct store *store = NULL;
        struct error err = {0};
        int rc = store_open(&store, cases[i].place, NULL, &err);
        if (rc != ERR_USAGE || store || !strstr(err.msg, cases[i].words) || strstr(err.msg, "secret"))
            fail_msg("%s: code %d: %s", cases[i].place, rc, err.msg);
    }
    char *longest = malloc(STORE_URL_MAX_BYTES + 2);
    memset(longest, 'a', STORE_URL_MAX_BYTES + 1);
    memcpy(longest, "http://", 7);
    longest[STORE_URL_MAX_BYTES + 1] = 0;
    struct store_url url;
    struct error err;
    assert_int_equal(store_url_parse(&url, longest, &err), ERR_USAGE);
    longest[STORE_URL_MAX_BYTES] = 0;
    assert_int_equal(store_url_parse(&url, longest, &err), 0);
    store_url_clear(&url);
    free(longest);
    static const char *const paths[] = {"", "/", "dir", "./http:/x", "http:/x", "://x", "a b://x", "1http://x"};
    for (size_t i = 0; i < COUNT(paths); i++)
        assert_false(store_url_is_one(paths[i]));
}

static void test_bad_tokens(void **state)
{
    (void)state;
    static const char *const tokens[] = {"", "a\r\nHost: b", "a\n"};
    for (size_t i = 0; i < COUNT(tokens); i++) {
        struct store *store;
        struct error err;
        const struct store_options options = {.bearer_token = tokens[i]};
        assert_int_equal(store_open(&store, "http://127.0.0.1:1/", &options, &err), ERR_USAGE);
    }
}

// ---- a directory of this machine -----------------------------------------------------------------------------------

static void test_directory(void **state)
{
    (void)state;
    const char *dir = in_work("shards");
    char place[256], path[300];
    struct store *store;
    struct manifest *manifest;
    struct store_file *file;
    struct error err;
    uint8_t *bytes, *whole, some[1000];
    uint64_t num_bytes, whole_bytes;
    assert_int_equal(mkdir(dir, 0777), 0);
    shard_fixture_write(dir, false);
    snprintf(place, sizeof place, "%s//", dir);
    assert_int_equal(store_open(&store, place, NULL, &err), 0);
    assert_false(store_is_remote(store));
    assert_string_equal(store_place(store), dir);
    if (store_manifest(&manifest, store, &err))
        fail_msg("%s", err.msg);
    assert_int_equal(store_extra(&bytes, &num_bytes, store, manifest, "note.txt", 1000, &err), 0);
    assert_non_null(bytes);
    free(bytes);
    assert_int_equal(store_extra(&bytes, &num_bytes, store, manifest, "note.txt", 1, &err), ERR_CORRUPT);
    assert_int_equal(store_extra(&bytes, &num_bytes, store, manifest, "none", 1000, &err), 0);
    assert_null(bytes);

    assert_int_equal(store_file_open(&file, store, manifest, 1, &err), 0);
    snprintf(path, sizeof path, "%s/%s", dir, manifest->ranks[1].name);
    assert_int_equal(file_read_all(&whole, &whole_bytes, path, 1 << 30, ERR_IO, &err), 0);
    assert_string_equal(store_file_name(file), path);
    assert_int_equal(store_file_bytes(file), whole_bytes);
    assert_true(store_file_fd(file) >= 0);
    assert_int_equal(store_file_read(file, some, sizeof some, 12345, &err), 0);
    assert_memory_equal(some, whole + 12345, sizeof some);
    assert_int_equal(store_file_read(file, some, 2, whole_bytes - 1, &err), ERR_IO);
    assert_int_equal(store_file_head(&bytes, &num_bytes, file, &err), 0);
    assert_memory_equal(bytes, whole, num_bytes);
    assert_true(checksum128_equal(checksum_whole(bytes, num_bytes), manifest->ranks[1].hash));
    store_file_keep(file, bytes, num_bytes, 0);
    assert_false(store_file_distrust(file));
    store_file_cancel(file);
    assert_int_equal(store_file_fetched_bytes(file), 0);
    assert_null(store_file_note(file));
    free(bytes);
    free(whole);
    store_file_close(file);
    assert_int_equal(unlink(path), 0);
    assert_int_equal(store_file_open(&file, store, manifest, 1, &err), ERR_IO);
    assert_non_null(strstr(err.msg, "there is no such file; repair it: tpshard repair "));
    manifest_free(manifest);
    store_close(store);

    assert_int_equal(store_open(&store, in_work("nowhere"), NULL, &err), 0);
    assert_int_equal(store_manifest(&manifest, store, &err), ERR_IO);
    store_close(store);
    store_close(NULL);
    store_file_close(NULL);
}

// ---- the cache -----------------------------------------------------------------------------------------------------

enum { ENTRY_BYTES = 10000 };

// A model of one rank; `number` tells it from others.
static struct manifest model_of(struct manifest_file *rank, uint64_t number, uint64_t bytes)
{
    *rank = (struct manifest_file){.bytes = bytes, .hash = {number, 2}};
    return (struct manifest){.contract = {3, 4}, .tp_size = 2, .ranks = rank, .num_ranks = 1};
}

static void name_of(char *name, uint64_t number, uint64_t bytes)
{
    struct manifest_file rank;
    struct manifest manifest = model_of(&rank, number, bytes);
    store_cache_name(name, &manifest, 0);
}

static uint8_t byte_at(uint64_t number, uint64_t offset) { return (uint8_t)(number * 31 + offset * offset / 7); }

static int begin(struct store_cache_fill **fill, const char *dir, uint64_t number, int64_t limit, struct error *err)
{
    struct manifest_file rank;
    struct manifest manifest = model_of(&rank, number, ENTRY_BYTES);
    return store_cache_fill_begin(fill, dir, &manifest, 0, limit, err);
}

static void add(struct store_cache_fill *fill, uint64_t number, uint64_t first, uint64_t behind)
{
    uint8_t bytes[ENTRY_BYTES];
    struct error err;
    for (uint64_t i = first; i < behind; i++)
        bytes[i - first] = byte_at(number, i);
    if (store_cache_fill_add(fill, bytes, behind - first, first, &err))
        fail_msg("%s", err.msg);
}

static void put(const char *dir, uint64_t number, int64_t limit)
{
    struct store_cache_fill *fill;
    struct error err;
    if (begin(&fill, dir, number, limit, &err))
        fail_msg("%s", err.msg);
    add(fill, number, 0, ENTRY_BYTES);
    store_cache_fill_end(fill);
}

// Whether it is there, and right. Counts as a use.
static bool has(const char *dir, uint64_t number)
{
    char name[STORE_CACHE_NAME_BYTES];
    uint8_t bytes[ENTRY_BYTES];
    struct error err;
    name_of(name, number, ENTRY_BYTES);
    int fd = store_cache_open(dir, name, ENTRY_BYTES);
    if (fd < 0)
        return false;
    assert_int_equal(file_pread_full(fd, bytes, ENTRY_BYTES, 0, name, &err), 0);
    for (uint64_t i = 0; i < ENTRY_BYTES; i++)
        assert_int_equal(bytes[i], byte_at(number, i));
    close(fd);
    return true;
}

static void set_used(const char *dir, uint64_t number, time_t when)
{
    char name[STORE_CACHE_NAME_BYTES], path[512];
    name_of(name, number, ENTRY_BYTES);
    snprintf(path, sizeof path, "%s/%s", dir, name);
    const struct timespec times[2] = {{.tv_sec = when}, {.tv_sec = when}};
    assert_int_equal(utimensat(AT_FDCWD, path, times, 0), 0);
}

static int count_files(const char *dir, const char *words)
{
    int count = 0;
    DIR *stream = opendir(dir);
    assert_non_null(stream);
    for (const struct dirent *found; (found = readdir(stream));)
        count += strstr(found->d_name, words) != NULL;
    closedir(stream);
    return count;
}

static void test_fill(void **state)
{
    (void)state;
    const char *dir = in_work("fill");
    struct store_cache_fill *fill;
    struct error err;
    assert_false(has(dir, 1));
    assert_int_equal(begin(&fill, dir, 1, 0, &err), 0);
    // In any order, twice, overlapping; beyond the end nothing counts.
    add(fill, 1, 5000, 6000);
    add(fill, 1, 0, 1000);
    add(fill, 1, 9000, 10000);
    add(fill, 1, 5000, 6000);
    add(fill, 1, 500, 5000);
    add(fill, 1, 7000, 9000);
    assert_int_equal(store_cache_fill_add(fill, "x", 1, ENTRY_BYTES, &err), 0);
    assert_int_equal(store_cache_fill_add(fill, "x", UINT64_MAX, 1, &err), 0);
    assert_false(has(dir, 1));
    add(fill, 1, 6000, 6999);
    assert_false(has(dir, 1));
    add(fill, 1, 6999, 7000);
    for (int i = 0; i < 2000 && !has(dir, 1); i++) // soon, and whoever uses the file need not have closed it
        usleep(10000);
    assert_true(has(dir, 1));
    add(fill, 1, 6999, 7000);
    store_cache_fill_end(fill);
    assert_true(has(dir, 1));
    // One that ends too early leaves nothing, and the same file may be filled twice at a time.
    struct store_cache_fill *other;
    assert_int_equal(begin(&fill, dir, 2, 0, &err), 0);
    assert_int_equal(begin(&other, dir, 2, 0, &err), 0);
    add(fill, 2, 0, 9999);
    add(other, 2, 0, ENTRY_BYTES);
    store_cache_fill_end(fill);
    store_cache_fill_end(other);
    assert_true(has(dir, 2));
    assert_int_equal(count_files(dir, ".part"), 0);
    // A file of another length is not taken for it.
    char name[STORE_CACHE_NAME_BYTES];
    name_of(name, 2, ENTRY_BYTES);
    assert_int_equal(store_cache_open(dir, name, ENTRY_BYTES - 1), -1);
    assert_int_equal(store_cache_open(dir, "..", 4096), -1);
    store_cache_fill_end(NULL);
}

static void test_names(void **state)
{
    (void)state;
    struct manifest_file ranks[2] = {{.bytes = 5, .hash = {1, 2}}, {.bytes = 5, .hash = {1, 2}}};
    struct manifest manifest = {.contract = {3, 4}, .tp_size = 2, .ranks = ranks, .num_ranks = 2};
    char names[5][STORE_CACHE_NAME_BYTES];
    store_cache_name(names[0], &manifest, 0);
    assert_string_equal(names[0],
                        "00000000000000040000000000000003-rank-00-of-02-5-00000000000000020000000000000001.tpshard");
    store_cache_name(names[1], &manifest, 1);
    manifest.contract.low = 9;
    store_cache_name(names[2], &manifest, 0);
    ranks[0].bytes = 6;
    store_cache_name(names[3], &manifest, 0);
    ranks[0].hash.high = 9;
    store_cache_name(names[4], &manifest, 0);
    for (size_t i = 0; i < COUNT(names); i++)
        for (size_t j = 0; j < i; j++)
            assert_string_not_equal(names[i], names[j]);
}

static void write_file(const char *dir, const char *name, size_t bytes)
{
    char path[512];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    assert_int_equal(fclose(file), 0);
    assert_int_equal(truncate(path, (off_t)bytes), 0);
}

static void test_least_recently_used(void **state)
{
    (void)state;
    const char *dir = in_work("lru");
    char name[STORE_CACHE_NAME_BYTES], other[STORE_CACHE_NAME_BYTES + 64];
    struct error err;
    struct store_cache_fill *fill;
    for (uint64_t i = 1; i <= 4; i++) {
        put(dir, i, 4 * ENTRY_BYTES);
        set_used(dir, i, (time_t)(1000 + i));
    }
    // What only looks like the cache's is left alone and does not count.
    name_of(name, 7, ENTRY_BYTES);
    write_file(dir, "model.safetensors", 100000);
    write_file(dir, name, ENTRY_BYTES + 1);
    snprintf(other, sizeof other, "%s.bak", name);
    write_file(dir, other, ENTRY_BYTES);
    snprintf(other, sizeof other, "x%s", name);
    write_file(dir, other, ENTRY_BYTES);
    snprintf(other, sizeof other, ".%s.part", name);
    write_file(dir, other, 100000);

    assert_true(has(dir, 1)); // now it is the latest
    put(dir, 5, 4 * ENTRY_BYTES);
    set_used(dir, 5, 1005);
    assert_false(has(dir, 2));
    assert_int_equal(count_files(dir, ""), 2 + 1 + 4 + 5);
    put(dir, 6, 2 * ENTRY_BYTES); // 3, 4 and 5 are older than 1
    assert_true(has(dir, 1) && has(dir, 6));
    assert_false(has(dir, 3) || has(dir, 4) || has(dir, 5));
    // What can never fit drops nothing.
    assert_int_equal(begin(&fill, dir, 8, ENTRY_BYTES - 1, &err), ERR_IO);
    assert_non_null(strstr(err.msg, "limit"));
    assert_true(has(dir, 1) && has(dir, 6));
}

// Those that are being filled count, and are not dropped.
static void test_filling_counts(void **state)
{
    (void)state;
    const char *dir = in_work("filling");
    struct error err;
    struct store_cache_fill *fill, *third, *none;
    put(dir, 1, 2 * ENTRY_BYTES);
    put(dir, 6, 2 * ENTRY_BYTES);
    assert_int_equal(begin(&fill, dir, 9, 2 * ENTRY_BYTES, &err), 0);
    assert_int_equal(begin(&third, dir, 10, 2 * ENTRY_BYTES, &err), 0);
    assert_false(has(dir, 1) || has(dir, 6));
    assert_int_equal(begin(&none, dir, 11, 2 * ENTRY_BYTES, &err), ERR_IO);
    add(fill, 9, 0, ENTRY_BYTES);
    store_cache_fill_end(fill);
    store_cache_fill_end(third);
    assert_true(has(dir, 9));
    assert_int_equal(count_files(dir, ".part"), 0);
}

// One in use lives on for who uses it.
static void test_dropped_in_use(void **state)
{
    (void)state;
    const char *dir = in_work("in-use");
    char name[STORE_CACHE_NAME_BYTES];
    put(dir, 9, ENTRY_BYTES);
    name_of(name, 9, ENTRY_BYTES);
    int fd = store_cache_open(dir, name, ENTRY_BYTES);
    uint8_t byte;
    put(dir, 12, ENTRY_BYTES);
    assert_false(has(dir, 9));
    assert_int_equal(pread(fd, &byte, 1, 77), 1);
    assert_int_equal(byte, byte_at(9, 77));
    // Dropping drops what was opened, not what came after it.
    put(dir, 9, 0);
    store_cache_drop(dir, name, fd);
    assert_true(has(dir, 9));
    close(fd);
    fd = store_cache_open(dir, name, ENTRY_BYTES);
    store_cache_drop(dir, name, fd);
    assert_false(has(dir, 9));
    close(fd);
}

// The ranks of one model do not push each other out: where not all fit, those stay that are there.
static void test_own_ranks(void **state)
{
    (void)state;
    enum { RANKS = 3 };
    const char *dir = in_work("own");
    struct manifest_file ranks[RANKS];
    struct manifest manifest = {.contract = {3, 4}, .tp_size = RANKS, .ranks = ranks, .num_ranks = RANKS};
    const int64_t limit = 2 * ENTRY_BYTES + 1;
    uint8_t bytes[ENTRY_BYTES] = {0};
    char name[STORE_CACHE_NAME_BYTES];
    struct error err;
    for (uint64_t r = 0; r < RANKS; r++)
        ranks[r] = (struct manifest_file){.bytes = ENTRY_BYTES, .hash = {100 + r, 2}};
    put(dir, 1, limit);
    put(dir, 2, limit);
    for (int round = 0; round < 2; round++)
        for (uint32_t r = 0; r < RANKS; r++) {
            struct store_cache_fill *fill;
            store_cache_name(name, &manifest, r);
            int fd = store_cache_open(dir, name, ENTRY_BYTES);
            if (fd >= 0 ? round == 0 || r == 2 : round == 1 && r < 2)
                fail_msg("round %d, rank %u: %d", round, r, fd);
            if (fd >= 0) {
                close(fd);
                continue;
            }
            int rc = store_cache_fill_begin(&fill, dir, &manifest, r, limit, &err);
            assert_int_equal(rc, r < 2 ? 0 : ERR_IO);
            if (rc) {
                assert_non_null(strstr(err.msg, "of the same model's other ranks"));
                continue;
            }
            assert_int_equal(store_cache_fill_add(fill, bytes, ENTRY_BYTES, 0, &err), 0);
            store_cache_fill_end(fill);
        }
    assert_false(has(dir, 1) || has(dir, 2)); // another model's
    put(dir, 3, limit);                       // which takes what it needs
    assert_true(has(dir, 3));
}

// Whoever holds the lock for ever, stopped or behind a dead network, holds up no start.
static void test_held_lock(void **state)
{
    (void)state;
    const char *dir = in_work("held");
    char path[300];
    struct store_cache_fill *fill;
    struct error err;
    put(dir, 1, 0);
    snprintf(path, sizeof path, "%s/.tpshard-cache.lock", dir);
    int fd = open(path, O_RDWR);
    assert_int_equal(flock(fd, LOCK_EX), 0);
    assert_int_equal(begin(&fill, dir, 2, 0, &err), ERR_IO);
    assert_non_null(strstr(err.msg, "another process holds the cache's lock"));
    close(fd);
    put(dir, 2, 0);
    assert_true(has(dir, 2));
}

// A process that ends while it fills leaves a file that the next one removes.
static void test_left_behind(void **state)
{
    (void)state;
    const char *dir = in_work("dead");
    struct store_cache_fill *fill;
    struct error err;
    pid_t child = fork();
    if (child == 0) {
        if (begin(&fill, dir, 1, 0, &err) == 0)
            add(fill, 1, 0, 5000);
        _exit(0);
    }
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(count_files(dir, ".part"), 1);
    put(dir, 2, ENTRY_BYTES);
    assert_int_equal(count_files(dir, ".part"), 0);
    assert_true(has(dir, 2));
}

// Several processes fill and use one cache that has room for three of eight.
static void test_processes(void **state)
{
    (void)state;
    enum { PROCESSES = 6, ROUNDS = 60, KINDS = 8, ROOM = 3 };
    const char *dir = in_work("shared");
    pid_t children[PROCESSES];
    for (int p = 0; p < PROCESSES; p++)
        if ((children[p] = fork()) == 0) {
            for (int i = 0; i < ROUNDS; i++) {
                uint64_t number = (uint64_t)(p * 5 + i * 3) % KINDS;
                struct store_cache_fill *fill;
                struct error err;
                if (has(dir, number) || begin(&fill, dir, number, (int64_t)ROOM * ENTRY_BYTES, &err))
                    continue;
                add(fill, number, ENTRY_BYTES / 2, ENTRY_BYTES);
                add(fill, number, 0, ENTRY_BYTES / 2);
                store_cache_fill_end(fill);
            }
            _exit(0);
        }
    int entries = 0;
    for (int p = 0; p < PROCESSES; p++) {
        int status;
        assert_int_equal(waitpid(children[p], &status, 0), children[p]);
        assert_int_equal(status, 0);
    }
    for (uint64_t i = 0; i < KINDS; i++)
        entries += has(dir, i);
    assert_in_range(entries, 1, ROOM);
    assert_int_equal(count_files(dir, ".part"), 0);
}

static void test_no_cache(void **state)
{
    (void)state;
    struct store_cache_fill *fill;
    struct error err;
    write_file(work, "file", 1);
    assert_int_equal(begin(&fill, in_work("file"), 1, 0, &err), ERR_IO);
    assert_int_equal(begin(&fill, in_work("no/parent"), 1, 0, &err), ERR_IO);
    assert_false(has(in_work("file"), 1));
    // Another's lock file is not followed.
    assert_int_equal(mkdir(in_work("linked"), 0777), 0);
    assert_int_equal(symlink("/dev/null", in_work("linked/.tpshard-cache.lock")), 0);
    assert_int_equal(begin(&fill, in_work("linked"), 1, 0, &err), ERR_IO);
}

int main(int argc, char **argv)
{
    if (argc > 1 && strcmp(argv[1], "fetch") == 0)
        return store_fetch_main(argc, argv);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_urls),           cmocka_unit_test(test_bad_urls),
        cmocka_unit_test(test_bad_tokens),     cmocka_unit_test(test_directory),
        cmocka_unit_test(test_names),          cmocka_unit_test(test_fill),
        cmocka_unit_test(test_processes),      cmocka_unit_test(test_least_recently_used),
        cmocka_unit_test(test_filling_counts), cmocka_unit_test(test_dropped_in_use),
        cmocka_unit_test(test_left_behind),    cmocka_unit_test(test_no_cache),
        cmocka_unit_test(test_own_ranks),      cmocka_unit_test(test_held_lock),
    };
    return cmocka_run_group_tests(tests, enter_directory, leave_directory);
}
