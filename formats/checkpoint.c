// The weights of a model directory. See checkpoint.h for which files count and what is refused.
#include "formats/checkpoint.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "formats/checked.h"
#include "formats/file_io.h"
#include "formats/json_scan.h"

static const char SINGLE_NAME[] = "model.safetensors";
static const char INDEX_NAME[] = "model.safetensors.index.json";

// No entry of a weight_map is shorter than `"a":"b"`.
enum { MIN_ENTRY_JSON_BYTES = 7, FILE_NAME_BYTES = 255 };

struct checkpoint_file {
    char *path;
    const char *name; // the last part of path
    int fd;           // -1: not open
    uint64_t bytes;
    struct safetensors_header *header; // its tensor array is handed over to the checkpoint and then null
    struct stat opened;                // what it was when it was opened
};

struct checkpoint {
    struct checkpoint_file *files;
    size_t file_count;
    struct safetensors_tensor *tensors; // names point into the headers
    size_t tensor_count;
};

// ---- The index ---------------------------------------------------------------------------------------------------

static bool file_name_ok(const char *name, size_t bytes)
{
    return bytes <= FILE_NAME_BYTES && safetensors_name_ok(name, bytes) && !strchr(name, '/') && strcmp(name, ".") &&
           strcmp(name, "..");
}

static int compare_entries(const void *a, const void *b)
{
    return strcmp(((const struct checkpoint_index_entry *)a)->tensor,
                  ((const struct checkpoint_index_entry *)b)->tensor);
}

static int parse_weight_map(struct json_scan *scan, struct checkpoint_index *index)
{
    bool first = true, more;
    int rc = json_scan_expect(scan, '{');
    while (!rc && !(rc = json_scan_next(scan, '}', &first, &more)) && more) {
        char *tensor, *file;
        size_t tensor_bytes, file_bytes;
        if ((rc = json_scan_key(scan, &tensor, &tensor_bytes)) || (rc = json_scan_string(scan, &file, &file_bytes)))
            return rc;
        if (!safetensors_name_ok(tensor, tensor_bytes))
            return json_scan_fail(scan, "a tensor's name must have 1 to %d bytes and no control characters",
                                  SAFETENSORS_NAME_BYTES);
        if (!file_name_ok(file, file_bytes))
            return json_scan_fail(scan, "tensor '%.120s' lies in '%.120s', which is not a plain file name", tensor,
                                  file);
        // Neighbours mostly name the same file: one copy serves both.
        struct checkpoint_index_entry *last = index->count ? &index->entries[index->count - 1] : NULL;
        if (last && strcmp(last->file, file) == 0) {
            scan->strings = file;
            file = (char *)last->file;
        }
        index->entries[index->count++] = (struct checkpoint_index_entry){tensor, file};
    }
    return rc;
}

int checkpoint_index_parse(struct checkpoint_index *out, const uint8_t *json, size_t num_bytes, const char *name,
                           struct error *err)
{
    int rc;
    bool first = true, more, seen = false;
    struct checkpoint_index index = {0};
    size_t colons = 0;
    for (size_t i = 0; i < num_bytes; i++)
        colons += json[i] == ':';
    size_t by_length = num_bytes / MIN_ENTRY_JSON_BYTES + 1;
    index.entries = calloc((colons < by_length ? colons : by_length) + 1, sizeof *index.entries);
    index.strings = malloc(num_bytes + 1);
    if (!index.entries || !index.strings) {
        rc = error_set(err, ERR_MEMORY, "%s: no memory for an index of %zu bytes", name, num_bytes);
        goto fail;
    }
    struct json_scan scan = json_scan_start(json, num_bytes, index.strings, name, err);
    rc = json_scan_expect(&scan, '{');
    while (!rc && !(rc = json_scan_next(&scan, '}', &first, &more)) && more) {
        char *key;
        if ((rc = json_scan_key(&scan, &key, NULL)))
            goto fail;
        scan.strings = key;
        if (strcmp(key, "weight_map")) {
            rc = json_scan_skip(&scan);
        } else if (seen) {
            rc = json_scan_fail(&scan, "weight_map occurs twice");
        } else {
            seen = true;
            rc = parse_weight_map(&scan, &index);
        }
    }
    if (rc || (rc = json_scan_end(&scan)))
        goto fail;
    if (!index.count) {
        rc = error_set(err, ERR_MODEL, "%s: has no weight_map that names a tensor", name);
        goto fail;
    }
    qsort(index.entries, index.count, sizeof *index.entries, compare_entries);
    for (size_t i = 1; i < index.count; i++) {
        if (strcmp(index.entries[i - 1].tensor, index.entries[i].tensor) == 0) {
            rc = error_set(err, ERR_MODEL, "%s: names tensor '%.200s' twice", name, index.entries[i].tensor);
            goto fail;
        }
    }
    *out = index;
    return 0;
fail:
    checkpoint_index_clear(&index);
    return rc;
}

void checkpoint_index_clear(struct checkpoint_index *index)
{
    free(index->entries);
    free(index->strings);
    *index = (struct checkpoint_index){0};
}

// ---- Files ---------------------------------------------------------------------------------------------------------

// dir/name, to be freed; null: out of memory.
static char *join_path(const char *dir, const char *name)
{
    size_t bytes = strlen(dir) + strlen(name) + 2;
    char *path = malloc(bytes);
    if (path)
        snprintf(path, bytes, "%s/%s", dir, name);
    return path;
}

// Opens path if it is a regular file. Names that lead nowhere or to something else are faults of the model.
static int open_model_file(int *fd, uint64_t *file_bytes, const char *path, const char *named_by, struct error *err)
{
    struct stat status;
    bool missing = stat(path, &status) != 0;
    if (missing && (errno == ENOENT || errno == ELOOP))
        return error_set(err, ERR_MODEL, "%s: %s, but %s; download the model again", path, named_by,
                         errno == ELOOP ? "its symbolic links loop" : "the file is missing");
    if (!missing && !S_ISREG(status.st_mode))
        return error_set(err, ERR_MODEL, "%s: is not a regular file", path);
    return file_open_read(fd, file_bytes, path, err);
}

static int open_file(struct checkpoint_file *file, const char *model_dir, const char *name, const char *named_by,
                     struct error *err)
{
    int rc;
    uint8_t *header = NULL, prefix[SAFETENSORS_PREFIX_BYTES];
    uint64_t header_bytes;
    file->fd = -1;
    if (!(file->path = join_path(model_dir, name)))
        return error_set(err, ERR_MEMORY, "%s/%s: out of memory", model_dir, name);
    file->name = file->path + strlen(model_dir) + 1;
    if ((rc = open_model_file(&file->fd, &file->bytes, file->path, named_by, err)))
        return rc;
    if (fstat(file->fd, &file->opened))
        return error_set_errno(err, "%s: cannot stat", file->path);
    uint64_t prefix_bytes = file->bytes < sizeof prefix ? file->bytes : sizeof prefix;
    if ((rc = file_pread_full(file->fd, prefix, prefix_bytes, 0, file->path, err)) ||
        (rc = safetensors_header_bytes(prefix, file->bytes, file->path, &header_bytes, err)))
        return rc;
    header_bytes += SAFETENSORS_PREFIX_BYTES;
    if (!(header = malloc(header_bytes)))
        return error_set(err, ERR_MEMORY, "%s: no memory for a header of %llu bytes", file->path,
                         (unsigned long long)header_bytes);
    rc = file_pread_full(file->fd, header, header_bytes, 0, file->path, err);
    if (!rc)
        rc = safetensors_parse(header, header_bytes, file->bytes, file->path, &file->header, err);
    free(header);
    return rc;
}

static int compare_strings(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

// The distinct file names of an index, sorted. The caller frees *names, whose strings belong to the index.
static int index_files(const char ***names, size_t *count, const struct checkpoint_index *index, const char *path,
                       struct error *err)
{
    const char **files = malloc(index->count * sizeof *files);
    if (!files)
        return error_set(err, ERR_MEMORY, "%s: out of memory", path);
    for (size_t i = 0; i < index->count; i++)
        files[i] = index->entries[i].file;
    qsort(files, index->count, sizeof *files, compare_strings);
    size_t distinct = 1;
    for (size_t i = 1; i < index->count; i++)
        if (strcmp(files[distinct - 1], files[i]))
            files[distinct++] = files[i];
    if (distinct > CHECKPOINT_MAX_FILES) {
        free(files);
        return error_set(err, ERR_MODEL, "%s: names %zu files, at most %d are accepted", path, distinct,
                         CHECKPOINT_MAX_FILES);
    }
    *names = files;
    *count = distinct;
    return 0;
}

static int open_files(struct checkpoint *checkpoint, const char *model_dir, const char *const *names, size_t count,
                      const char *named_by, struct error *err)
{
    checkpoint->files = calloc(count, sizeof *checkpoint->files);
    if (!checkpoint->files)
        return error_set(err, ERR_MEMORY, "%s: out of memory", model_dir);
    int rc = 0;
    for (size_t i = 0; !rc && i < count; i++) {
        checkpoint->file_count = i + 1; // so that closing finds a half-opened one
        rc = open_file(&checkpoint->files[i], model_dir, names[i], named_by, err);
    }
    return rc;
}

// ---- Tensors -------------------------------------------------------------------------------------------------------

static int compare_tensors(const void *a, const void *b)
{
    return strcmp(((const struct safetensors_tensor *)a)->name, ((const struct safetensors_tensor *)b)->name);
}

// Collects the tensors of all files into one sorted array.
static int merge_tensors(struct checkpoint *checkpoint, const char *model_dir, struct error *err)
{
    size_t count = 0;
    for (size_t i = 0; i < checkpoint->file_count; i++)
        count += checkpoint->files[i].header->tensor_count;
    if (!count)
        return error_set(err, ERR_MODEL, "%s: the checkpoint holds no tensors", model_dir);
    checkpoint->tensors = calloc(count, sizeof *checkpoint->tensors);
    if (!checkpoint->tensors)
        return error_set(err, ERR_MEMORY, "%s: no memory for %zu tensors", model_dir, count);
    for (size_t i = 0; i < checkpoint->file_count; i++) {
        struct safetensors_header *header = checkpoint->files[i].header;
        for (size_t t = 0; t < header->tensor_count; t++) {
            header->tensors[t].file = (int)i;
            checkpoint->tensors[checkpoint->tensor_count++] = header->tensors[t];
        }
        free(header->tensors);
        header->tensors = NULL;
        header->tensor_count = 0;
    }
    qsort(checkpoint->tensors, count, sizeof *checkpoint->tensors, compare_tensors);
    for (size_t i = 1; i < count; i++) {
        const struct safetensors_tensor *one = &checkpoint->tensors[i - 1], *two = &checkpoint->tensors[i];
        if (strcmp(one->name, two->name) == 0)
            return error_set(err, ERR_MODEL, "%s: tensor '%.200s' stands in two files, %s and %s", model_dir, one->name,
                             checkpoint->files[one->file].name, checkpoint->files[two->file].name);
    }
    return 0;
}

// Every tensor of the index must stand in the file that it names.
static int check_index(const struct checkpoint *checkpoint, const struct checkpoint_index *index, const char *path,
                       struct error *err)
{
    for (size_t i = 0; i < index->count; i++) {
        const struct checkpoint_index_entry *entry = &index->entries[i];
        const struct safetensors_tensor *tensor = checkpoint_find(checkpoint, entry->tensor);
        if (!tensor)
            return error_set(err, ERR_MODEL, "%s: tensor '%.200s' should stand in %s, but is in no file", path,
                             entry->tensor, entry->file);
        if (strcmp(checkpoint->files[tensor->file].name, entry->file))
            return error_set(err, ERR_MODEL, "%s: tensor '%.200s' should stand in %s, but is in %s", path,
                             entry->tensor, entry->file, checkpoint->files[tensor->file].name);
    }
    return 0;
}

// ---- Opening -------------------------------------------------------------------------------------------------------

static int open_indexed(struct checkpoint *checkpoint, const char *model_dir, const char *index_path, struct error *err)
{
    int rc, fd;
    uint8_t *json = NULL;
    uint64_t json_bytes;
    struct checkpoint_index index = {0};
    const char **names = NULL;
    size_t count;
    if ((rc = open_model_file(&fd, &json_bytes, index_path, "the model needs it", err)))
        return rc;
    close(fd);
    if ((rc = file_read_all(&json, &json_bytes, index_path, CHECKPOINT_INDEX_CAP_BYTES, ERR_MODEL, err)))
        return rc;
    if ((rc = checkpoint_index_parse(&index, json, json_bytes, index_path, err)))
        goto done;
    if ((rc = index_files(&names, &count, &index, index_path, err)))
        goto done;
    if ((rc = open_files(checkpoint, model_dir, names, count, "the index names it", err)))
        goto done;
    if ((rc = merge_tensors(checkpoint, model_dir, err)))
        goto done;
    rc = check_index(checkpoint, &index, index_path, err);
done:
    free(names);
    checkpoint_index_clear(&index);
    free(json);
    return rc;
}

static int open_single(struct checkpoint *checkpoint, const char *model_dir, struct error *err)
{
    const char *name = SINGLE_NAME;
    int rc = open_files(checkpoint, model_dir, &name, 1, "the directory lists it", err);
    return rc ? rc : merge_tensors(checkpoint, model_dir, err);
}

int checkpoint_open(struct checkpoint **out, const char *model_dir, struct error *err)
{
    int rc;
    struct stat status;
    char *single_path = join_path(model_dir, SINGLE_NAME), *index_path = join_path(model_dir, INDEX_NAME);
    struct checkpoint *checkpoint = calloc(1, sizeof *checkpoint);
    if (!checkpoint || !single_path || !index_path) {
        rc = error_set(err, ERR_MEMORY, "%s: out of memory", model_dir);
        goto done;
    }
    // A dangling link is an incomplete download, not an absent file.
    bool single, indexed;
    if ((rc = file_is_there(&single, single_path, err)) || (rc = file_is_there(&indexed, index_path, err)))
        ;
    else if (single)
        rc = open_single(checkpoint, model_dir, err);
    else if (indexed)
        rc = open_indexed(checkpoint, model_dir, index_path, err);
    else if (stat(model_dir, &status))
        rc = errno == ENOENT ? error_set(err, ERR_MODEL, "%s: no such model directory", model_dir)
                             : error_set_errno(err, "%s: cannot open the model directory", model_dir);
    else if (!S_ISDIR(status.st_mode))
        rc = error_set(err, ERR_MODEL, "%s: is not a directory", model_dir);
    else
        rc = error_set(err, ERR_MODEL, "%s: holds neither %s nor %s (other formats of weights are not read)", model_dir,
                       SINGLE_NAME, INDEX_NAME);
    if (!rc) {
        *out = checkpoint;
        checkpoint = NULL;
    }
done:
    checkpoint_close(checkpoint);
    free(single_path);
    free(index_path);
    return rc;
}

void checkpoint_close(struct checkpoint *checkpoint)
{
    if (!checkpoint)
        return;
    for (size_t i = 0; i < checkpoint->file_count; i++) {
        struct checkpoint_file *file = &checkpoint->files[i];
        if (file->fd >= 0)
            close(file->fd);
        safetensors_free(file->header);
        free(file->path);
    }
    free(checkpoint->files);
    free(checkpoint->tensors);
    free(checkpoint);
}

// ---- Access --------------------------------------------------------------------------------------------------------

size_t checkpoint_tensor_count(const struct checkpoint *checkpoint) { return checkpoint->tensor_count; }

const struct safetensors_tensor *checkpoint_tensor(const struct checkpoint *checkpoint, size_t index)
{
    return index < checkpoint->tensor_count ? &checkpoint->tensors[index] : NULL;
}

const struct safetensors_tensor *checkpoint_find(const struct checkpoint *checkpoint, const char *name)
{
    struct safetensors_tensor key = {.name = name};
    return bsearch(&key, checkpoint->tensors, checkpoint->tensor_count, sizeof key, compare_tensors);
}

int checkpoint_read(const struct checkpoint *checkpoint, const struct safetensors_tensor *tensor, uint64_t byte_offset,
                    uint64_t num_bytes, void *destination, struct error *err)
{
    const struct checkpoint_file *file = &checkpoint->files[tensor->file];
    if (!checked_range(byte_offset, num_bytes, tensor->bytes))
        return error_set(err, ERR_OTHER, "%s: tensor '%.200s' has %llu bytes, %llu at offset %llu were asked for",
                         file->path, tensor->name, (unsigned long long)tensor->bytes, (unsigned long long)num_bytes,
                         (unsigned long long)byte_offset);
    return file_pread_full(file->fd, destination, num_bytes, tensor->offset + byte_offset, file->path, err);
}

void checkpoint_read_ahead(const struct checkpoint *checkpoint, const struct safetensors_tensor *tensor,
                           uint64_t byte_offset, uint64_t num_bytes)
{
    if (num_bytes > 0 && checked_range(byte_offset, num_bytes, tensor->bytes))
        posix_fadvise(checkpoint->files[tensor->file].fd, (off_t)(tensor->offset + byte_offset), (off_t)num_bytes,
                      POSIX_FADV_WILLNEED);
}

int checkpoint_unchanged(const struct checkpoint *checkpoint, struct error *err)
{
    for (size_t i = 0; i < checkpoint->file_count; i++) {
        const struct checkpoint_file *file = &checkpoint->files[i];
        const struct stat *then = &file->opened;
        struct stat now;
        if (stat(file->path, &now))
            return error_set_errno(err, "%s: cannot look at the file", file->path);
        if (now.st_dev != then->st_dev || now.st_ino != then->st_ino || now.st_size != then->st_size ||
            now.st_mtim.tv_sec != then->st_mtim.tv_sec || now.st_mtim.tv_nsec != then->st_mtim.tv_nsec)
            return error_set(err, ERR_MODEL, "%s: the file changed while it was being read", file->path);
    }
    return 0;
}

size_t checkpoint_file_count(const struct checkpoint *checkpoint) { return checkpoint->file_count; }

const char *checkpoint_file_name(const struct checkpoint *checkpoint, size_t index)
{
    return checkpoint->files[index].name;
}

const char *checkpoint_file_path(const struct checkpoint *checkpoint, size_t index)
{
    return checkpoint->files[index].path;
}

uint64_t checkpoint_file_bytes(const struct checkpoint *checkpoint, size_t index)
{
    return checkpoint->files[index].bytes;
}
