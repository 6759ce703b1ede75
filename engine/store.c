// See store.h. What is behind a URL comes through store_http.c, what is kept of it through store_cache.c.
#include "engine/store.h"

#include "engine/store_cache.h"
#include "engine/store_http.h"
#include "engine/store_url.h"
#include "formats/extra_file.h"
#include "formats/file_io.h"
#include "formats/json_file.h"
#include "formats/repair_hint.h"
#include "formats/shard_file.h"

#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { FETCHES = 3 }; // of what came damaged

struct store {
    char *dir;               // local
    struct store_http *http; // remote
    char *cache_dir;         // NULL: none
    int64_t cache_limit_bytes;
};

// ---- opening -------------------------------------------------------------------------------------------------------

static int open_dir(struct store *store, const char *place, struct error *err)
{
    size_t bytes = strlen(place);
    while (bytes > 1 && place[bytes - 1] == '/')
        bytes--;
    store->dir = strndup(place, bytes);
    return store->dir ? 0 : error_set(err, ERR_MEMORY, "no memory for the name of a directory");
}

static int open_url(struct store *store, const char *place, const struct store_options *options, struct error *err)
{
    struct store_url url;
    int rc = store_url_parse(&url, place, err);
    if (rc || (rc = store_http_open(&store->http, url, options, err)) || !options->cache_dir)
        return rc;
    store->cache_dir = strdup(options->cache_dir);
    store->cache_limit_bytes = options->cache_limit_bytes;
    return store->cache_dir ? 0 : error_set(err, ERR_MEMORY, "no memory for the name of a directory");
}

int store_open(struct store **out, const char *place, const struct store_options *options, struct error *err)
{
    static const struct store_options none = {0};
    struct store *store = calloc(1, sizeof *store);
    if (!store)
        return error_set(err, ERR_MEMORY, "no memory for a store");
    int rc =
        store_url_is_one(place) ? open_url(store, place, options ? options : &none, err) : open_dir(store, place, err);
    if (rc)
        store_close(store);
    else
        *out = store;
    return rc;
}

void store_close(struct store *store)
{
    if (!store)
        return;
    store_http_close(store->http);
    free(store->dir);
    free(store->cache_dir);
    free(store);
}

void store_cancel(struct store *store)
{
    if (store->http)
        store_http_cancel(store->http);
}

bool store_is_remote(const struct store *store) { return store->http != NULL; }
const char *store_place(const struct store *store) { return store->http ? store_http_place(store->http) : store->dir; }

// ---- small files ---------------------------------------------------------------------------------------------------

static int fetch_manifest(struct manifest **out, struct store *store, const char *path, struct error *err)
{
    uint8_t *text;
    uint64_t bytes;
    int rc = store_http_get(store->http, &text, &bytes, MANIFEST_FILE_NAME, JSON_FILE_CAP_BYTES, err);
    if (rc)
        return rc;
    rc = manifest_parse(out, (const char *)text, bytes, path, err);
    free(text);
    return rc;
}

int store_manifest(struct manifest **out, struct store *store, struct error *err)
{
    if (!store->http)
        return manifest_read(out, store->dir, err);
    char *path;
    if (asprintf(&path, "%s/" MANIFEST_FILE_NAME, store_place(store)) < 0)
        return error_set(err, ERR_MEMORY, "no memory for the name of a file");
    int rc = ERR_CORRUPT;
    for (int i = 0; i < FETCHES && rc == ERR_CORRUPT; i++)
        rc = fetch_manifest(out, store, path, err);
    free(path);
    return rc;
}

static int fetch_extra(uint8_t **out, uint64_t *num_bytes, struct store *store, const struct manifest_file *extra,
                       const char *path, struct error *err)
{
    int rc = store_http_get(store->http, out, num_bytes, extra->name, extra->bytes, err);
    if (rc)
        return rc;
    if ((rc = extra_file_check(extra, *out, *num_bytes, path, err))) {
        free(*out);
        *out = NULL;
    }
    return rc;
}

int store_extra(uint8_t **out, uint64_t *num_bytes, struct store *store, const struct manifest *manifest,
                const char *name, uint64_t cap_bytes, struct error *err)
{
    const struct manifest_file *extra;
    char *path;
    if (!store->http)
        return extra_file_read(out, num_bytes, manifest, store->dir, name, cap_bytes, err);
    *out = NULL;
    *num_bytes = 0;
    if (asprintf(&path, "%s/%s", store_place(store), name) < 0)
        return error_set(err, ERR_MEMORY, "no memory for the name of a file");
    int rc = extra_file_find(&extra, manifest, name, cap_bytes, path, err);
    if (!rc && extra) {
        rc = ERR_CORRUPT;
        for (int i = 0; i < FETCHES && rc == ERR_CORRUPT; i++)
            rc = fetch_extra(out, num_bytes, store, extra, path, err);
    }
    free(path);
    return rc;
}

int store_chat(struct chat **out, struct store *store, const struct manifest *manifest, struct error *err)
{
    static const struct {
        const char *name;
        uint64_t cap_bytes;
    } wanted[] = {{CHAT_TEMPLATE_FILE, CHAT_TEMPLATE_CAP_BYTES},
                  {CHAT_TOOL_TEMPLATE_FILE, CHAT_TEMPLATE_CAP_BYTES},
                  {CHAT_SPECIAL_TOKENS_FILE, JSON_FILE_CAP_BYTES}};
    uint8_t *texts[3] = {NULL};
    uint64_t bytes[3] = {0};
    int rc = 0;
    for (int i = 0; i < 3 && !rc; i++)
        rc = store_extra(&texts[i], &bytes[i], store, manifest, wanted[i].name, wanted[i].cap_bytes, err);
    const struct chat_files files = {.place = store_place(store),
                                     .usual = {(const char *)texts[0], bytes[0]},
                                     .with_tools = {(const char *)texts[1], bytes[1]},
                                     .special_tokens = {(const char *)texts[2], bytes[2]}};
    if (!rc)
        rc = chat_open(out, &files, err);
    for (int i = 0; i < 3; i++)
        free(texts[i]);
    return rc;
}

// ---- one large file ------------------------------------------------------------------------------------------------

struct store_file {
    struct store *store;
    const struct manifest *manifest;
    uint32_t rank;
    char *path; // of a local file, also one of the cache
    uint64_t bytes;
    int fd;                         // of a local file, also one of the cache; else -1
    struct store_http_file *remote; // where it comes from when it is not, or no longer, in the cache; NULL: local
    bool was_cached;
    atomic_bool is_dropped;   // the cache's copy was found damaged
    pthread_rwlock_t filling; // held for writing by who begins or ends to fill
    struct store_cache_fill *fill;
    char *note;
};

static const struct manifest_file *named(const struct store_file *file) { return &file->manifest->ranks[file->rank]; }

static int open_local(struct store_file *file, struct error *err)
{
    if (asprintf(&file->path, "%s/%s", file->store->dir, named(file)->name) < 0) {
        file->path = NULL;
        return error_set(err, ERR_MEMORY, "%s: no memory for the name of a file", file->store->dir);
    }
    int rc = file_open_read(&file->fd, &file->bytes, file->path, err);
    return rc == ERR_IO ? repair_hint_unopened(file->path, err) : rc;
}

static int open_remote(struct store_file *file, struct error *err)
{
    struct store *store = file->store;
    char cache_name[STORE_CACHE_NAME_BYTES];
    file->bytes = named(file)->bytes;
    int rc = store_http_file_open(&file->remote, store->http, named(file)->name, file->bytes, err);
    if (rc || !store->cache_dir)
        return rc;
    store_cache_name(cache_name, file->manifest, file->rank);
    file->fd = store_cache_open(store->cache_dir, cache_name, file->bytes);
    file->was_cached = file->fd >= 0;
    if (!file->was_cached)
        return 0;
    if (asprintf(&file->path, "%s/%s", store->cache_dir, cache_name) < 0) {
        file->path = NULL;
        return error_set(err, ERR_MEMORY, "%s: no memory for the name of a file", store->cache_dir);
    }
    return 0;
}

int store_file_open(struct store_file **out, struct store *store, const struct manifest *manifest, uint32_t rank,
                    struct error *err)
{
    struct store_file *file = calloc(1, sizeof *file);
    if (!file)
        return error_set(err, ERR_MEMORY, "%s: no memory for a file", store_place(store));
    file->store = store;
    file->manifest = manifest;
    file->rank = rank;
    file->fd = -1;
    pthread_rwlock_init(&file->filling, NULL);
    int rc = store->http ? open_remote(file, err) : open_local(file, err);
    if (rc)
        store_file_close(file);
    else
        *out = file;
    return rc;
}

void store_file_close(struct store_file *file)
{
    if (!file)
        return;
    store_cache_fill_end(file->fill);
    store_http_file_close(file->remote);
    if (file->fd >= 0)
        close(file->fd);
    pthread_rwlock_destroy(&file->filling);
    free(file->path);
    free(file->note);
    free(file);
}

const char *store_file_name(const struct store_file *file)
{
    return file->remote ? store_http_file_name(file->remote) : file->path;
}
uint64_t store_file_bytes(const struct store_file *file) { return file->bytes; }
int store_file_fd(const struct store_file *file) { return file->fd; }

int store_file_read(struct store_file *file, void *buffer, uint64_t num_bytes, uint64_t offset, struct error *err)
{
    if (file->fd >= 0 && !atomic_load(&file->is_dropped))
        return file_pread_full(file->fd, buffer, num_bytes, offset, file->path, err);
    return store_http_file_read(file->remote, buffer, num_bytes, offset, err);
}

bool store_file_distrust(struct store_file *file)
{
    char cache_name[STORE_CACHE_NAME_BYTES];
    if (file->was_cached && !atomic_exchange(&file->is_dropped, true)) {
        store_cache_name(cache_name, file->manifest, file->rank);
        store_cache_drop(file->store->cache_dir, cache_name, file->fd);
    }
    return file->was_cached;
}

void store_file_cancel(struct store_file *file)
{
    if (file->remote)
        store_http_file_cancel(file->remote);
}

uint64_t store_file_fetched_bytes(const struct store_file *file)
{
    return file->remote ? store_http_file_fetched_bytes(file->remote) : 0;
}

// ---- its head ------------------------------------------------------------------------------------------------------

// The first read is as long as the shortest head; the header there says how long this one is. Nonsense is for the parser to name.
static int read_head(uint8_t **out, uint64_t *num_bytes, struct store_file *file, struct error *err)
{
    uint64_t first_bytes = file->bytes < SHARD_PAYLOAD_ALIGN ? file->bytes : SHARD_PAYLOAD_ALIGN;
    uint8_t *bytes = malloc(first_bytes + 1), *larger;
    if (!bytes)
        return error_set(err, ERR_MEMORY, "%s: no memory for its head", store_file_name(file));
    int rc = store_file_read(file, bytes, first_bytes, 0, err);
    if (rc)
        goto fail;
    uint64_t all_bytes = shard_file_head_bytes(bytes, first_bytes);
    if (all_bytes < first_bytes || all_bytes > file->bytes)
        all_bytes = first_bytes;
    if (all_bytes > first_bytes) {
        if (!(larger = realloc(bytes, all_bytes))) {
            rc = error_set(err, ERR_MEMORY, "%s: no memory for its head (%llu bytes)", store_file_name(file),
                           (unsigned long long)all_bytes);
            goto fail;
        }
        bytes = larger;
        if ((rc = store_file_read(file, bytes + first_bytes, all_bytes - first_bytes, first_bytes, err)))
            goto fail;
    }
    *out = bytes;
    *num_bytes = all_bytes;
    return 0;
fail:
    free(bytes);
    return rc;
}

// The cache's copy cannot be used: as if it had not been there.
static void leave_cache(struct store_file *file)
{
    store_file_distrust(file);
    close(file->fd);
    file->fd = -1;
    file->was_cached = false;
}

static void note(struct store_file *file, const struct error *why)
{
    if (!file->note && asprintf(&file->note, "the cache does not keep the file: %s", why->msg) < 0)
        file->note = NULL;
}

static void begin_to_fill(struct store_file *file)
{
    struct store *store = file->store;
    struct error why = {0};
    if (!file->fill && store_cache_fill_begin(&file->fill, store->cache_dir, file->manifest, file->rank,
                                              store->cache_limit_bytes, &why)) {
        file->fill = NULL;
        note(file, &why);
    }
}

int store_file_head(uint8_t **out, uint64_t *num_bytes, struct store_file *file, struct error *err)
{
    uint8_t *bytes = NULL;
    uint64_t count = 0;
    bool is_right = false;
    for (int left = FETCHES; left > 0 && !is_right;) {
        free(bytes);
        bytes = NULL;
        int rc = read_head(&bytes, &count, file, err);
        if (rc && !file->was_cached)
            return rc;
        is_right = !rc && (!file->remote || checksum128_equal(checksum_whole(bytes, count), named(file)->hash));
        if (!is_right && file->was_cached)
            leave_cache(file);
        else
            left--;
    }
    if (is_right && file->remote && file->fd < 0 && file->store->cache_dir) {
        begin_to_fill(file);
        store_file_keep(file, bytes, count, 0);
    }
    *out = bytes;
    *num_bytes = count;
    return 0;
}

void store_file_keep(struct store_file *file, const void *bytes, uint64_t num_bytes, uint64_t offset)
{
    struct error why = {0};
    pthread_rwlock_rdlock(&file->filling);
    int rc = file->fill ? store_cache_fill_add(file->fill, bytes, num_bytes, offset, &why) : 0;
    pthread_rwlock_unlock(&file->filling);
    if (!rc)
        return;
    pthread_rwlock_wrlock(&file->filling);
    store_cache_fill_end(file->fill);
    file->fill = NULL;
    note(file, &why);
    pthread_rwlock_unlock(&file->filling);
}

const char *store_file_note(const struct store_file *file) { return file->note; }
