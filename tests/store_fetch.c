// See store_fetch.h.
#include "tests/store_fetch.h"

#include "engine/store.h"
#include "formats/file_io.h"
#include "formats/shard_file.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { MAX_THREADS = 64, FETCHES = 3, EXTRA_CAP_BYTES = 64 << 20 };

struct fetch {
    struct store *store;
    struct manifest *manifest;
    struct store_file *source;
    struct shard_file *file;
    int out_fd, threads, cancel_ms;
    uint64_t piece_bytes;
    const char *out_path;
    atomic_uint_fast64_t next_leaf, fetched_again;
    pthread_mutex_t mutex;
    struct error error; // the first
};

static void set_first(struct fetch *f, const struct error *err)
{
    pthread_mutex_lock(&f->mutex);
    if (!f->error.code)
        f->error = *err;
    pthread_mutex_unlock(&f->mutex);
    atomic_store(&f->next_leaf, UINT64_MAX / 2); // the others stop
}

// Leaves [first, first + count) of a piece that lies in bytes; those that are damaged are fetched again one by one.
static int check_leaves(struct fetch *f, uint64_t first, uint64_t count, uint8_t *bytes, struct error *err)
{
    uint64_t payload = shard_file_payload_offset(f->file), begin = shard_file_stored_leaf(f->file, first).offset;
    for (uint64_t leaf = first; leaf < first + count; leaf++) {
        struct shard_stored at = shard_file_stored_leaf(f->file, leaf);
        uint8_t *there = bytes + (at.offset - begin);
        int rc = shard_file_verify_leaf(f->file, leaf, there, err);
        bool mends = store_file_fd(f->source) < 0 || (rc && store_file_distrust(f->source));
        for (int i = 1; i < FETCHES && rc && mends; i++) {
            atomic_fetch_add(&f->fetched_again, 1);
            if ((rc = store_file_read(f->source, there, at.bytes, payload + at.offset, err)))
                return rc;
            rc = shard_file_verify_leaf(f->file, leaf, there, err);
        }
        if (rc || (rc = file_pwrite_full(f->out_fd, there, at.bytes, payload + at.offset, f->out_path, err)))
            return rc;
        store_file_keep(f->source, there, at.bytes, payload + at.offset);
    }
    return 0;
}

static void *fetch_leaves(void *arg)
{
    struct fetch *f = arg;
    struct error err;
    uint64_t count = shard_file_leaf_count(f->file), step = f->piece_bytes / SHARD_LEAF_BYTES, leaf;
    uint8_t *bytes = malloc((step + 1) * (SHARD_LEAF_BYTES + 4096));
    while (bytes && (leaf = atomic_fetch_add(&f->next_leaf, step)) < count) {
        uint64_t leaves = leaf + step < count ? step : count - leaf;
        struct shard_stored first = shard_file_stored_leaf(f->file, leaf),
                            last = shard_file_stored_leaf(f->file, leaf + leaves - 1);
        if (store_file_read(f->source, bytes, last.offset + last.bytes - first.offset,
                            shard_file_payload_offset(f->file) + first.offset, &err) ||
            check_leaves(f, leaf, leaves, bytes, &err))
            set_first(f, &err);
    }
    free(bytes);
    return NULL;
}

static void *cancel_later(void *arg)
{
    struct fetch *f = arg;
    nanosleep(&(struct timespec){.tv_sec = f->cancel_ms / 1000, .tv_nsec = f->cancel_ms % 1000 * 1000000l}, NULL);
    store_file_cancel(f->source);
    return NULL;
}

static int fetch_head(struct fetch *f, struct error *err)
{
    uint8_t *head;
    uint64_t head_bytes;
    int rc = store_file_head(&head, &head_bytes, f->source, err);
    if (rc)
        return rc;
    rc = shard_file_parse(&f->file, head, head_bytes, store_file_bytes(f->source), store_file_name(f->source), err);
    if (!rc)
        rc = file_pwrite_full(f->out_fd, head, head_bytes, 0, f->out_path, err);
    free(head);
    return rc;
}

static int fetch_all(struct fetch *f, uint32_t rank, struct error *err)
{
    int rc = store_manifest(&f->manifest, f->store, err);
    for (size_t i = 0; !rc && i < f->manifest->num_extras; i++) {
        uint8_t *bytes = NULL;
        uint64_t num_bytes;
        rc = store_extra(&bytes, &num_bytes, f->store, f->manifest, f->manifest->extras[i].name, EXTRA_CAP_BYTES, err);
        free(bytes);
    }
    if (rc || (rc = store_file_open(&f->source, f->store, f->manifest, rank, err)))
        return rc;
    pthread_t threads[MAX_THREADS] = {0}, cancel = 0;
    if (f->cancel_ms)
        pthread_create(&cancel, NULL, cancel_later, f);
    rc = fetch_head(f, err);
    for (int i = 0; !rc && i < f->threads; i++)
        pthread_create(&threads[i], NULL, fetch_leaves, f);
    for (int i = 0; !rc && i < f->threads; i++)
        pthread_join(threads[i], NULL);
    if (f->cancel_ms)
        pthread_join(cancel, NULL);
    if (f->error.code)
        *err = f->error;
    return rc ? rc : f->error.code;
}

static const char *word(int argc, char **argv, const char *name)
{
    for (int i = 0; i < argc; i++)
        if (strncmp(argv[i], name, strlen(name)) == 0 && argv[i][strlen(name)] == '=')
            return argv[i] + strlen(name) + 1;
    return NULL;
}
static long number(int argc, char **argv, const char *name, long usual)
{
    const char *text = word(argc, argv, name);
    return text ? atol(text) : usual;
}

int store_fetch_main(int argc, char **argv)
{
    if (argc < 5)
        return 2;
    const struct store_options options = {.cache_dir = word(argc, argv, "cache"),
                                          .cache_limit_bytes = number(argc, argv, "limit", 0),
                                          .bearer_token = word(argc, argv, "token"),
                                          .needs_one_version = number(argc, argv, "strict", 0) != 0,
                                          .stall_s = (int)number(argc, argv, "stall", 0),
                                          .pause_ms = (int)number(argc, argv, "pause", 0)};
    struct fetch f = {.out_path = argv[4],
                      .threads = (int)number(argc, argv, "threads", 4),
                      .piece_bytes = (uint64_t)number(argc, argv, "piece", SHARD_LEAF_BYTES),
                      .cancel_ms = (int)number(argc, argv, "cancel", 0),
                      .mutex = PTHREAD_MUTEX_INITIALIZER};
    struct error err = {0};
    struct timespec begin, end;
    f.out_fd = open(f.out_path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    clock_gettime(CLOCK_MONOTONIC, &begin);
    int rc = store_open(&f.store, argv[2], &options, &err);
    if (!rc)
        rc = fetch_all(&f, (uint32_t)atoi(argv[3]), &err);
    clock_gettime(CLOCK_MONOTONIC, &end);
    double seconds = (double)(end.tv_sec - begin.tv_sec) + 1e-9 * (double)(end.tv_nsec - begin.tv_nsec);
    if (rc)
        fprintf(stderr, "%s\n", err.msg);
    else
        printf(
            "{\"local\": %s, \"fetched_bytes\": %llu, \"fetched_again\": %llu, \"note\": \"%s\", \"seconds\": %.4f}\n",
            store_file_fd(f.source) >= 0 ? "true" : "false", (unsigned long long)store_file_fetched_bytes(f.source),
            (unsigned long long)f.fetched_again, store_file_note(f.source) ? store_file_note(f.source) : "", seconds);
    close(f.out_fd);
    shard_file_close(f.file);
    store_file_close(f.source);
    manifest_free(f.manifest);
    store_close(f.store);
    return error_exit_code(rc);
}
