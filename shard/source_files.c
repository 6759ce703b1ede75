// See source_files.h.
#include "shard/source_files.h"

#include "formats/file_io.h"
#include "shard/stop.h"

#include <inttypes.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { PIECE_BYTES = 256 << 10, AHEAD_BYTES = 1 << 30 }; // a piece is hashed while it is in the cache

// ---- the list ----------------------------------------------------------------------------------------------------

static const char *const small_files[] = {
    "config.json",         "generation_config.json",       "tokenizer.json",       "tokenizer_config.json",
    "chat_template.jinja", "model.safetensors.index.json", "hf_quant_config.json",
};

static int look(struct source_file *file, struct error *err)
{
    struct stat status;
    if (stat(file->path, &status))
        return error_set_errno(err, "%s: cannot look at the file", file->path);
    file->bytes = (uint64_t)status.st_size;
    file->modified_ns = (int64_t)status.st_mtim.tv_sec * 1000000000 + status.st_mtim.tv_nsec;
    return 0;
}

int source_files_add(struct source_files *files, const char *dir, const char *name, struct error *err)
{
    char path[2 * PATH_MAX];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    struct source_file *grown = realloc(files->files, (files->count + 1) * sizeof *grown);
    if (!grown)
        return error_set(err, ERR_MEMORY, "out of memory for the list of files");
    files->files = grown;
    struct source_file *file = &grown[files->count];
    *file = (struct source_file){.name = strdup(name), .path = strdup(path)};
    if (!file->name || !file->path) {
        free(file->name);
        free(file->path);
        return error_set(err, ERR_MEMORY, "out of memory for the list of files");
    }
    files->count++;
    return look(file, err);
}

static int compare_names(const void *a, const void *b)
{
    return strcmp(((const struct source_file *)a)->name, ((const struct source_file *)b)->name);
}

void source_files_sort(struct source_files *files)
{
    if (files->count)
        qsort(files->files, files->count, sizeof *files->files, compare_names);
}

int source_files_list(struct source_files *out, const struct checkpoint *checkpoint, const char *model_dir,
                      struct error *err)
{
    struct source_files files = {0};
    int rc = 0;
    for (size_t i = 0; !rc && i < checkpoint_file_count(checkpoint); i++)
        rc = source_files_add(&files, model_dir, checkpoint_file_name(checkpoint, i), err);
    for (size_t i = 0; !rc && i < sizeof small_files / sizeof small_files[0]; i++) {
        char path[2 * PATH_MAX];
        snprintf(path, sizeof path, "%s/%s", model_dir, small_files[i]);
        bool there;
        if (!(rc = file_is_there(&there, path, err)) && there)
            rc = source_files_add(&files, model_dir, small_files[i], err);
    }
    source_files_sort(&files);
    if (!rc) // then what is listed is what was opened
        rc = checkpoint_unchanged(checkpoint, err);
    if (rc)
        source_files_clear(&files);
    else
        *out = files;
    return rc;
}

void source_files_clear(struct source_files *files)
{
    for (size_t i = 0; i < files->count; i++) {
        free(files->files[i].name);
        free(files->files[i].path);
    }
    free(files->files);
    *files = (struct source_files){0};
}

uint64_t source_files_bytes(const struct source_files *files)
{
    uint64_t bytes = 0;
    for (size_t i = 0; i < files->count; i++)
        bytes += files->files[i].bytes;
    return bytes;
}

struct checksum128 source_files_key(const struct source_files *files, const char *options_text)
{
    struct checksum128 key = checksum_whole(options_text, strlen(options_text));
    for (size_t i = 0; i < files->count; i++) {
        char text[PATH_MAX + 128];
        int length = snprintf(text, sizeof text, "%016" PRIx64 "%016" PRIx64 " %s %" PRIu64 " %" PRId64, key.high,
                              key.low, files->files[i].name, files->files[i].bytes, files->files[i].modified_ns);
        key = checksum_whole(text, (size_t)length);
    }
    return key;
}

int source_files_unchanged(const struct source_files *files, struct error *err)
{
    int rc = 0;
    for (size_t i = 0; !rc && i < files->count; i++) {
        struct source_file now = files->files[i];
        if (!(rc = look(&now, err)) &&
            (now.bytes != files->files[i].bytes || now.modified_ns != files->files[i].modified_ns))
            rc = error_set(err, ERR_MODEL, "%s: the file changed while it was being read", now.path);
    }
    return rc;
}

int source_files_to_manifest(const struct source_files *files, struct manifest *manifest, struct error *err)
{
    manifest->sources = calloc(files->count + 1, sizeof *manifest->sources);
    if (!manifest->sources)
        return error_set(err, ERR_MEMORY, "out of memory for the manifest");
    for (size_t i = 0; i < files->count; i++) {
        const struct source_file *file = &files->files[i];
        manifest->sources[i] = (struct manifest_file){strdup(file->name), file->bytes, file->hash};
        manifest->num_sources++;
        if (!manifest->sources[i].name)
            return error_set(err, ERR_MEMORY, "out of memory for the manifest");
    }
    return 0;
}

// ---- hashing -----------------------------------------------------------------------------------------------------

struct source_hasher {
    struct source_files *files;
    const struct progress *progress;
    uint64_t total_bytes, hashed_bytes;
    atomic_bool unpaced, cancelled;
    pthread_t thread;
    struct error error; // read after the join
};

static bool give_up(const struct source_hasher *hasher) { return atomic_load(&hasher->cancelled) || stop_requested(); }

static void wait_for_conversion(const struct source_hasher *hasher)
{
    const struct progress *progress = hasher->progress;
    while (!atomic_load(&hasher->unpaced) && !give_up(hasher)) {
        double share =
            progress->total_bytes ? (double)atomic_load(&progress->done_bytes) / (double)progress->total_bytes : 1;
        if ((double)hasher->hashed_bytes <= share * (double)hasher->total_bytes + AHEAD_BYTES)
            return;
        nanosleep(&(struct timespec){.tv_nsec = 5 * 1000 * 1000}, NULL);
    }
}

static int hash_file(struct source_hasher *hasher, struct source_file *file, uint8_t *piece, struct error *err)
{
    int fd = -1, rc;
    uint64_t bytes = 0;
    struct checksum_stream *stream = checksum_stream_new();
    if (!stream)
        return error_set(err, ERR_MEMORY, "%s: out of memory for its checksum", file->path);
    if ((rc = file_open_read(&fd, &bytes, file->path, err)))
        goto done;
    for (uint64_t at = 0; at < file->bytes && !give_up(hasher); at += PIECE_BYTES) {
        uint64_t part = file->bytes - at < PIECE_BYTES ? file->bytes - at : PIECE_BYTES;
        wait_for_conversion(hasher);
        if ((rc = file_pread_full(fd, piece, part, at, file->path, err)))
            goto done;
        checksum_stream_update(stream, piece, part);
        hasher->hashed_bytes += part;
    }
    file->hash = checksum_stream_final(stream);
done:
    checksum_stream_free(stream);
    if (fd >= 0)
        close(fd);
    return rc;
}

static void *hash_all(void *arg)
{
    struct source_hasher *hasher = arg;
    uint8_t *piece = malloc(PIECE_BYTES);
    int rc = piece ? 0 : error_set(&hasher->error, ERR_MEMORY, "out of memory to hash the checkpoint");
    for (size_t i = 0; !rc && i < hasher->files->count && !give_up(hasher); i++)
        rc = hash_file(hasher, &hasher->files->files[i], piece, &hasher->error);
    free(piece);
    return NULL;
}

int source_hasher_start(struct source_hasher **out, struct source_files *files, const struct progress *progress,
                        struct error *err)
{
    struct source_hasher *hasher = calloc(1, sizeof *hasher);
    if (!hasher)
        return error_set(err, ERR_MEMORY, "out of memory to hash the checkpoint");
    hasher->files = files;
    hasher->progress = progress;
    hasher->total_bytes = source_files_bytes(files);
    int failed = pthread_create(&hasher->thread, NULL, hash_all, hasher);
    if (failed) {
        free(hasher);
        return error_set(err, ERR_MEMORY, "cannot start a thread: %s", strerror(failed));
    }
    *out = hasher;
    return 0;
}

int source_hasher_finish(struct source_hasher *hasher, bool cancel, struct error *err)
{
    atomic_store(&hasher->unpaced, true);
    atomic_store(&hasher->cancelled, cancel);
    pthread_join(hasher->thread, NULL);
    int rc = 0;
    if (!cancel && !(rc = stop_check(err)) && (rc = hasher->error.code))
        *err = hasher->error;
    if (!cancel && !rc) // after the conversion, which may have read what the hasher did not see
        rc = source_files_unchanged(hasher->files, err);
    free(hasher);
    return rc;
}
