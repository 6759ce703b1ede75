// See calibration_file.h and calibration_file.md.
#include "formats/calibration_file.h"

#include "formats/checked.h"
#include "formats/file_io.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

enum { RECORD_MAGIC = 0x43455243, NUMBERS_ALIGN = 64 };
enum record_kind { RECORD_MOMENTS = 1, RECORD_END_OF_LAYER, RECORD_END };

struct record {
    uint32_t magic, kind, input; //  0
    int32_t layer, expert;       // 12
    uint32_t has_triangle;       // 20
    uint64_t cols, rows;         // 24
    uint64_t diagonal, triangle; // 40  checksums
    uint64_t checksum;           // 56  of the bytes in front of it
};
_Static_assert(sizeof(struct record) == 64, "on-disk layout");
_Static_assert(offsetof(struct record, checksum) == 56, "on-disk layout");

// ---- inputs and keys -----------------------------------------------------------------------------------------------

const char *calibration_input_name(enum calibration_input input)
{
    static const char *const names[CALIBRATION_INPUT_COUNT] = {"attention", "q_latent",    "o",   "mlp",
                                                               "down",      "expert_down", "head"};
    return names[input];
}

bool calibration_input_of(enum calibration_input *out, enum tensor_role role, const struct model_desc *model)
{
    switch (role) {
    case ROLE_QKV:
    case ROLE_Q_A:
    case ROLE_KV_A:
        *out = CALIBRATION_ATTENTION;
        return true;
    case ROLE_Q_B:
        *out = model->latent.q_rank > 0 ? CALIBRATION_Q_LATENT : CALIBRATION_ATTENTION;
        return true;
    case ROLE_O:
        *out = CALIBRATION_O;
        return true;
    case ROLE_GATE_UP:
    case ROLE_EXPERT_GATE_UP:
    case ROLE_SHARED_GATE_UP:
        *out = CALIBRATION_MLP;
        return true;
    case ROLE_DOWN:
    case ROLE_SHARED_DOWN:
        *out = CALIBRATION_DOWN;
        return true;
    case ROLE_EXPERT_DOWN:
        *out = CALIBRATION_EXPERT_DOWN;
        return true;
    case ROLE_EMBEDDING:
    case ROLE_HEAD:
        *out = CALIBRATION_HEAD;
        return role == ROLE_HEAD || model->tied_embeddings;
    default:
        return false;
    }
}

static int key_of(const struct manifest *manifest, bool with_hashes, struct checksum128 *out, struct error *err)
{
    struct manifest plain = *manifest;
    plain.tp_size = plain.pp_size = 1;
    plain.experts = EXPERTS_TP;
    plain.quant = (struct manifest_quant){
        .linear = WEIGHT_BF16, .embedding = WEIGHT_BF16, .head = WEIGHT_BF16, .rotation = manifest->quant.rotation};
    plain.sources = malloc((plain.num_sources + 1) * sizeof *plain.sources);
    if (!plain.sources)
        return error_set(err, ERR_MEMORY, "out of memory for a list of %zu files", plain.num_sources);
    for (size_t i = 0; i < plain.num_sources; i++) {
        plain.sources[i] = manifest->sources[i];
        if (!with_hashes)
            plain.sources[i].hash = (struct checksum128){0};
    }
    int rc = manifest_contract(&plain, out, err);
    free(plain.sources);
    return rc;
}

int calibration_model_key(const struct manifest *manifest, struct checksum128 *out, struct error *err)
{
    return key_of(manifest, false, out, err);
}

int calibration_weights_key(const struct manifest *manifest, struct checksum128 *out, struct error *err)
{
    return key_of(manifest, true, out, err);
}

static uint64_t header_checksum(const struct calibration_header *header)
{
    return checksum_leaf(header, offsetof(struct calibration_header, checksum));
}

static uint64_t record_checksum(const struct record *record)
{
    return checksum_leaf(record, offsetof(struct record, checksum));
}

void calibration_header_make(struct calibration_header *out, uint32_t num_layers, uint32_t window_tokens,
                             uint64_t tokens, struct checksum128 model, struct checksum128 weights,
                             struct checksum128 text, const char *kernels)
{
    *out = (struct calibration_header){.version = CALIBRATION_VERSION,
                                       .header_bytes = sizeof *out,
                                       .num_layers = num_layers,
                                       .window_tokens = window_tokens,
                                       .tokens = tokens};
    memcpy(out->magic, CALIBRATION_MAGIC, sizeof out->magic);
    checksum128_to_bytes(model, out->model);
    checksum128_to_bytes(weights, out->weights);
    checksum128_to_bytes(text, out->text);
    snprintf(out->kernels, sizeof out->kernels, "%s", kernels);
    out->checksum = header_checksum(out);
}

static bool header_is_sound(const struct calibration_header *header)
{
    static const uint8_t zero[sizeof header->reserved];
    return memcmp(header->magic, CALIBRATION_MAGIC, sizeof header->magic) == 0 &&
           header->checksum == header_checksum(header) && header->header_bytes == sizeof *header &&
           header->num_layers > 0 && header->num_layers <= MODEL_MAX_LAYERS && header->window_tokens > 0 &&
           header->tokens > 0 && header->kernels[sizeof header->kernels - 1] == 0 &&
           memcmp(header->reserved, zero, sizeof zero) == 0;
}

// ---- records -------------------------------------------------------------------------------------------------------

static uint64_t diagonal_bytes(uint64_t cols) { return round_up(cols * sizeof(float), NUMBERS_ALIGN); }

static uint64_t triangle_bytes(uint64_t cols)
{
    return round_up(calibration_triangle_elems(cols) * sizeof(float), NUMBERS_ALIGN);
}

// Of numbers behind a record that is sound.
static uint64_t numbers_bytes(const struct record *record)
{
    if (record->kind != RECORD_MOMENTS)
        return 0;
    return diagonal_bytes(record->cols) + (record->has_triangle ? triangle_bytes(record->cols) : 0);
}

// Whether a record can stand behind `layers_done` layers that have ended, of num_layers.
static bool record_is_sound(const struct record *r, uint32_t layers_done, uint32_t num_layers)
{
    if (r->magic != RECORD_MAGIC || r->checksum != record_checksum(r))
        return false;
    bool more = layers_done < num_layers;
    int32_t layer = more ? (int32_t)layers_done : -1;
    if (r->kind != RECORD_MOMENTS)
        return (r->kind == RECORD_END_OF_LAYER ? more : r->kind == RECORD_END && !more) && r->layer == layer &&
               r->expert == -1 && !r->input && !r->has_triangle && !r->cols && !r->rows && !r->diagonal && !r->triangle;
    bool of_expert = r->input == CALIBRATION_EXPERT_DOWN;
    return r->input < CALIBRATION_INPUT_COUNT && r->layer == layer && (r->input == CALIBRATION_HEAD) == !more &&
           (of_expert ? r->expert >= 0 && r->expert < MODEL_MAX_EXPERTS : r->expert == -1) && r->has_triangle <= 1 &&
           r->cols > 0 && r->cols <= CALIBRATION_MAX_COLS && (r->has_triangle || r->triangle == 0);
}

// ---- reading -------------------------------------------------------------------------------------------------------

struct entry {
    struct calibration_moments moments; // must be first
    bool has_triangle;
    uint64_t triangle_offset, triangle_checksum;
};

struct calibration_file {
    int fd;
    char path[PATH_MAX];
    uint64_t bytes;
    struct calibration_header header;
    struct checksum128 hash;
    struct entry *entries; // sorted
    uint64_t count, capacity;
};

static int compare_entries(const void *a, const void *b)
{
    const struct calibration_moments *x = a, *y = b;
    int64_t order = (int64_t)x->layer - y->layer;
    order = order ? order : (int64_t)x->input - (int64_t)y->input;
    order = order ? order : (int64_t)x->expert - y->expert;
    return order < 0 ? -1 : order > 0;
}

static int reserve_entry(struct calibration_file *file, struct error *err)
{
    if (file->count < file->capacity)
        return 0;
    uint64_t capacity = file->capacity ? 2 * file->capacity : 64;
    struct entry *entries = realloc(file->entries, capacity * sizeof *entries);
    if (!entries)
        return error_set(err, ERR_MEMORY, "%s: out of memory for %llu statistics", file->path,
                         (unsigned long long)capacity);
    file->entries = entries;
    file->capacity = capacity;
    return 0;
}

static int damaged(const struct calibration_file *file, const struct calibration_moments *moments, struct error *err)
{
    return error_set(err, ERR_CORRUPT,
                     "%s: the statistics of input %s of layer %d are damaged; remove the file and capture them again",
                     file->path, calibration_input_name(moments->input), moments->layer);
}

// What fills numbers up, to `end`.
static int read_padding(bool *sound, const struct calibration_file *file, uint64_t begin, uint64_t end,
                        struct error *err)
{
    static const uint8_t zero[NUMBERS_ALIGN];
    uint8_t padding[NUMBERS_ALIGN];
    int rc = file_pread_full(file->fd, padding, end - begin, begin, file->path, err);
    *sound = !rc && memcmp(padding, zero, end - begin) == 0;
    return rc;
}

static int read_diagonal(struct calibration_file *file, const struct record *record, uint64_t offset, struct error *err)
{
    struct entry *entry = &file->entries[file->count];
    uint64_t bytes = record->cols * sizeof(float);
    float *diagonal = malloc(bytes);
    int rc;
    if (!diagonal)
        return error_set(err, ERR_MEMORY, "%s: out of memory for %llu bytes", file->path, (unsigned long long)bytes);
    *entry = (struct entry){.moments = {.input = (enum calibration_input)record->input,
                                        .layer = record->layer,
                                        .expert = record->expert,
                                        .rows = record->rows,
                                        .cols = record->cols,
                                        .diagonal = diagonal},
                            .has_triangle = record->has_triangle,
                            .triangle_offset = offset + diagonal_bytes(record->cols),
                            .triangle_checksum = record->triangle};
    file->count++; // calibration_file_close frees the diagonal
    bool sound;
    if ((rc = file_pread_full(file->fd, diagonal, bytes, offset, file->path, err)) ||
        (rc = read_padding(&sound, file, offset + bytes, offset + diagonal_bytes(record->cols), err)))
        return rc;
    sound = sound && checksum_leaf(diagonal, bytes) == record->diagonal;
    for (uint64_t i = 0; i < record->cols && sound; i++)
        sound = diagonal[i] >= 0 && isfinite(diagonal[i]);
    return sound ? 0 : damaged(file, &entry->moments, err);
}

static int unfinished(const struct calibration_file *file, uint32_t layers_done, struct error *err)
{
    return error_set(
        err, ERR_CORRUPT,
        "%s: the statistics are unfinished (%u of %u layers); the command that makes them goes on with them",
        file->path, layers_done, file->header.num_layers);
}

static int read_records(struct calibration_file *file, struct checksum_stream *stream, struct error *err)
{
    uint64_t at = sizeof file->header, end;
    uint32_t layers_done = 0;
    int rc;
    for (struct record record;; at = end) {
        if (at == file->bytes)
            return unfinished(file, layers_done, err);
        if (file->bytes - at < sizeof record)
            return unfinished(file, layers_done, err);
        if ((rc = file_pread_full(file->fd, &record, sizeof record, at, file->path, err)))
            return rc;
        if (!record_is_sound(&record, layers_done, file->header.num_layers))
            return error_set(err, ERR_CORRUPT, "%s: the record at byte %llu is damaged; capture the statistics again",
                             file->path, (unsigned long long)at);
        checksum_stream_update(stream, &record, sizeof record);
        end = at + sizeof record + numbers_bytes(&record);
        if (end > file->bytes)
            return unfinished(file, layers_done, err);
        if (record.kind == RECORD_END_OF_LAYER)
            layers_done++;
        if (record.kind == RECORD_MOMENTS &&
            ((rc = reserve_entry(file, err)) || (rc = read_diagonal(file, &record, at + sizeof record, err))))
            return rc;
        if (record.kind == RECORD_END)
            break;
    }
    if (end != file->bytes)
        return error_set(err, ERR_CORRUPT, "%s: %llu bytes stand behind the end; capture the statistics again",
                         file->path, (unsigned long long)(file->bytes - end));
    file->hash = checksum_stream_final(stream);
    return 0;
}

static int check_twice(struct calibration_file *file, struct error *err)
{
    if (file->count > 0)
        qsort(file->entries, file->count, sizeof *file->entries, compare_entries);
    for (uint64_t i = 1; i < file->count; i++)
        if (compare_entries(&file->entries[i - 1], &file->entries[i]) == 0)
            return error_set(err, ERR_CORRUPT, "%s: input %s of layer %d stands in it twice", file->path,
                             calibration_input_name(file->entries[i].moments.input), file->entries[i].moments.layer);
    return 0;
}

static int read_header(struct calibration_file *file, struct error *err)
{
    int rc;
    if (file->bytes < sizeof file->header)
        return error_set(err, ERR_CORRUPT, "%s: has %llu bytes, too few for a calibration file", file->path,
                         (unsigned long long)file->bytes);
    if ((rc = file_pread_full(file->fd, &file->header, sizeof file->header, 0, file->path, err)))
        return rc;
    if (memcmp(file->header.magic, CALIBRATION_MAGIC, sizeof file->header.magic) != 0)
        return error_set(err, ERR_CORRUPT, "%s: is no calibration file; tpengine capture makes one from a text",
                         file->path);
    if (file->header.version != CALIBRATION_VERSION)
        return error_set(err, ERR_CORRUPT, "%s: calibration file version %u, this program reads version %d", file->path,
                         file->header.version, CALIBRATION_VERSION);
    if (!header_is_sound(&file->header))
        return error_set(err, ERR_CORRUPT, "%s: its header is damaged; capture the statistics again", file->path);
    return 0;
}

int calibration_file_open(struct calibration_file **out, const char *path, struct error *err)
{
    struct checksum_stream *stream = NULL;
    struct calibration_file *file = calloc(1, sizeof *file);
    int rc;
    if (!file)
        return error_set(err, ERR_MEMORY, "%s: out of memory", path);
    file->fd = -1;
    snprintf(file->path, sizeof file->path, "%s", path);
    if ((rc = file_open_read(&file->fd, &file->bytes, path, err)) || (rc = read_header(file, err)))
        goto fail;
    if (!(stream = checksum_stream_new())) {
        rc = error_set(err, ERR_MEMORY, "%s: out of memory", path);
        goto fail;
    }
    checksum_stream_update(stream, &file->header, sizeof file->header);
    if ((rc = read_records(file, stream, err)) || (rc = check_twice(file, err)))
        goto fail;
    checksum_stream_free(stream);
    *out = file;
    return 0;
fail:
    checksum_stream_free(stream);
    calibration_file_close(file);
    return rc;
}

void calibration_file_close(struct calibration_file *file)
{
    if (!file)
        return;
    for (uint64_t i = 0; i < file->count; i++)
        free((float *)file->entries[i].moments.diagonal);
    free(file->entries);
    if (file->fd >= 0)
        close(file->fd);
    free(file);
}

const struct calibration_header *calibration_file_header(const struct calibration_file *file) { return &file->header; }
struct checksum128 calibration_file_hash(const struct calibration_file *file) { return file->hash; }
uint64_t calibration_file_count(const struct calibration_file *file) { return file->count; }

const struct calibration_moments *calibration_file_at(const struct calibration_file *file, uint64_t index,
                                                      bool *has_triangle)
{
    if (has_triangle)
        *has_triangle = file->entries[index].has_triangle;
    return &file->entries[index].moments;
}

const struct calibration_moments *calibration_file_find(const struct calibration_file *file,
                                                        enum calibration_input input, int32_t layer, int32_t expert,
                                                        bool *has_triangle)
{
    const struct calibration_moments wanted = {.input = input, .layer = layer, .expert = expert};
    const struct entry *found =
        file->count ? bsearch(&wanted, file->entries, file->count, sizeof *file->entries, compare_entries) : NULL;
    if (has_triangle)
        *has_triangle = found && found->has_triangle;
    return found ? &found->moments : NULL;
}

int calibration_file_triangle(const struct calibration_file *file, const struct calibration_moments *moments,
                              float *out, struct error *err)
{
    const struct entry *entry = (const struct entry *)moments;
    uint64_t elems = calibration_triangle_elems(moments->cols), begin = entry->triangle_offset;
    bool sound;
    int rc;
    if ((rc = file_pread_full(file->fd, out, elems * sizeof *out, begin, file->path, err)) ||
        (rc = read_padding(&sound, file, begin + elems * sizeof *out, begin + triangle_bytes(moments->cols), err)))
        return rc;
    float not_finite = 0; // Inf * 0 and NaN * 0 are NaN, and stay it in a sum
    for (uint64_t i = 0; i < elems; i++)
        not_finite += out[i] * 0;
    sound = sound && not_finite == 0 && checksum_leaf(out, elems * sizeof *out) == entry->triangle_checksum;
    return sound ? 0 : damaged(file, moments, err);
}

// ---- writing -------------------------------------------------------------------------------------------------------

struct calibration_writer {
    int fd;
    char path[PATH_MAX];
    uint32_t num_layers, layers_done;
    uint64_t end;
};

static int refuse_other(const char *path, struct error *err)
{
    return error_set(err, ERR_USAGE,
                     "%s: there is a file of this name, and it does not hold statistics of this model, text and "
                     "settings; name another one or remove it",
                     path);
}

// Sums differ from one instruction set to the other, so that a file has those of one.
static int refuse_kernels(const char *path, const struct calibration_header *found,
                          const struct calibration_header *wanted, struct error *err)
{
    return error_set(err, ERR_USAGE,
                     "%s: these statistics were begun with the kernels %s, and the kernels here are %s; tpengine "
                     "capture --backend %s goes on with them, or remove the file",
                     path, found->kernels, wanted->kernels, found->kernels);
}

static bool differs_in_kernels_alone(const struct calibration_header *found, const struct calibration_header *wanted)
{
    struct calibration_header same = *found;
    if (!header_is_sound(found))
        return false;
    memcpy(same.kernels, wanted->kernels, sizeof same.kernels);
    same.checksum = wanted->checksum;
    return memcmp(&same, wanted, sizeof same) == 0;
}

// Finds the end of the last layer that is complete, as far as heads of records tell; what follows was being written.
static int find_end(struct calibration_writer *writer, uint64_t file_bytes, bool *finished, struct error *err)
{
    struct record record;
    uint64_t at = writer->end;
    while (file_bytes - at >= sizeof record) {
        int rc = file_pread_full(writer->fd, &record, sizeof record, at, writer->path, err);
        if (rc)
            return rc;
        if (!record_is_sound(&record, writer->layers_done, writer->num_layers) ||
            numbers_bytes(&record) > file_bytes - at - sizeof record)
            break;
        at += sizeof record + numbers_bytes(&record);
        if (record.kind == RECORD_END_OF_LAYER) {
            writer->layers_done++;
            writer->end = at;
        }
        if (record.kind == RECORD_END) {
            *finished = at == file_bytes;
            break;
        }
    }
    return 0;
}

// Goes on with what is there.
static int resume(struct calibration_writer *writer, const struct calibration_header *header, uint64_t file_bytes,
                  bool *finished, struct error *err)
{
    struct calibration_header found;
    uint64_t bytes = file_bytes < sizeof found ? file_bytes : sizeof found;
    int rc = file_pread_full(writer->fd, &found, bytes, 0, writer->path, err);
    if (rc)
        return rc;
    if (memcmp(&found, header, bytes) != 0)
        return bytes == sizeof found && differs_in_kernels_alone(&found, header)
                   ? refuse_kernels(writer->path, &found, header, err)
                   : refuse_other(writer->path, err);
    if (bytes == sizeof found && (rc = find_end(writer, file_bytes, finished, err)))
        return rc;
    if (!*finished && ftruncate(writer->fd, (off_t)(bytes == sizeof found ? writer->end : 0)))
        return error_set_errno(err, "%s: cannot shorten", writer->path);
    return 0;
}

int calibration_writer_open(struct calibration_writer **out, const char *path, const struct calibration_header *header,
                            uint32_t *layers_done, bool *finished, struct error *err)
{
    struct stat status;
    struct calibration_writer *writer = calloc(1, sizeof *writer);
    int rc;
    if (!writer)
        return error_set(err, ERR_MEMORY, "%s: out of memory", path);
    *finished = false;
    writer->end = sizeof *header;
    writer->num_layers = header->num_layers;
    snprintf(writer->path, sizeof writer->path, "%s", path);
    writer->fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOCTTY | O_NONBLOCK, 0666);
    if (writer->fd < 0 || fstat(writer->fd, &status)) {
        rc = error_set_errno(err, "%s: cannot open", path);
        goto fail;
    }
    if (!S_ISREG(status.st_mode)) {
        rc = error_set(err, ERR_USAGE, "%s: is no regular file", path);
        goto fail;
    }
    if (flock(writer->fd, LOCK_EX | LOCK_NB)) { // ends with the descriptor
        rc = errno == EWOULDBLOCK ? error_set(err, ERR_USAGE, "%s: another capture is writing it", path)
                                  : error_set_errno(err, "%s: cannot be locked", path);
        goto fail;
    }
    if (fstat(writer->fd, &status)) { // what the one before has left
        rc = error_set_errno(err, "%s", path);
        goto fail;
    }
    if (status.st_size > 0 && (rc = resume(writer, header, (uint64_t)status.st_size, finished, err)))
        goto fail;
    if (!*finished && (rc = file_pwrite_full(writer->fd, header, sizeof *header, 0, path, err)))
        goto fail;
    *layers_done = writer->layers_done;
    *out = writer;
    return 0;
fail:
    calibration_writer_close(writer);
    return rc;
}

static int write_record(struct calibration_writer *writer, struct record *record, struct error *err)
{
    record->magic = RECORD_MAGIC;
    record->checksum = record_checksum(record);
    if (!record_is_sound(record, writer->layers_done, writer->num_layers))
        return error_set(err, ERR_OTHER, "%s: record %u of input %u and layer %d cannot stand behind layer %u",
                         writer->path, record->kind, record->input, record->layer, writer->layers_done);
    int rc = file_pwrite_full(writer->fd, record, sizeof *record, writer->end, writer->path, err);
    if (!rc)
        writer->end += sizeof *record;
    return rc;
}

// Numbers and the zeros that fill them up.
static int write_numbers(struct calibration_writer *writer, const float *numbers, uint64_t elems, struct error *err)
{
    static const uint8_t zero[NUMBERS_ALIGN];
    uint64_t bytes = elems * sizeof *numbers, padding = round_up(bytes, NUMBERS_ALIGN) - bytes;
    int rc = file_pwrite_full(writer->fd, numbers, bytes, writer->end, writer->path, err);
    if (!rc)
        rc = file_pwrite_full(writer->fd, zero, padding, writer->end + bytes, writer->path, err);
    writer->end += bytes + padding;
    return rc;
}

int calibration_writer_add(struct calibration_writer *writer, const struct calibration_moments *m, struct error *err)
{
    struct record record = {.kind = RECORD_MOMENTS,
                            .input = m->input,
                            .layer = m->layer,
                            .expert = m->expert,
                            .has_triangle = m->triangle != NULL,
                            .cols = m->cols,
                            .rows = m->rows};
    if (m->cols > CALIBRATION_MAX_COLS)
        return error_set(err, ERR_MODEL, "%s: rows of %llu columns; at most %d can be captured", writer->path,
                         (unsigned long long)m->cols, CALIBRATION_MAX_COLS);
    uint64_t triangle = m->triangle ? calibration_triangle_elems(m->cols) : 0;
    for (uint64_t i = 0; i < m->cols; i++)
        if (!(m->diagonal[i] >= 0 && isfinite(m->diagonal[i])))
            return error_set(
                err, ERR_MODEL,
                "input %s of layer %d: column %llu overflows or is NaN; the weights or the activations are "
                "damaged",
                calibration_input_name(m->input), m->layer, (unsigned long long)i);
    record.diagonal = checksum_leaf(m->diagonal, m->cols * sizeof *m->diagonal);
    record.triangle = triangle ? checksum_leaf(m->triangle, triangle * sizeof *m->triangle) : 0;
    int rc = write_record(writer, &record, err);
    if (!rc)
        rc = write_numbers(writer, m->diagonal, m->cols, err);
    if (!rc && triangle)
        rc = write_numbers(writer, m->triangle, triangle, err);
    return rc;
}

static int end_with(struct calibration_writer *writer, enum record_kind kind, int32_t layer, struct error *err)
{
    struct record record = {.kind = kind, .layer = layer, .expert = -1};
    int rc = file_sync(writer->fd, writer->path, err); // what the record speaks of comes first
    if (!rc)
        rc = write_record(writer, &record, err);
    return rc ? rc : file_sync(writer->fd, writer->path, err);
}

int calibration_writer_end_layer(struct calibration_writer *writer, struct error *err)
{
    int rc = end_with(writer, RECORD_END_OF_LAYER, (int32_t)writer->layers_done, err);
    if (!rc)
        writer->layers_done++;
    return rc;
}

int calibration_writer_finish(struct calibration_writer *writer, struct error *err)
{
    return end_with(writer, RECORD_END, -1, err);
}

void calibration_writer_close(struct calibration_writer *writer)
{
    if (!writer)
        return;
    if (writer->fd >= 0)
        close(writer->fd);
    free(writer);
}
