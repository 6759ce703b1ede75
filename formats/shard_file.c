// Reader of rank files. See shard_file.h; the specification is shard_file.md, the writer shard_layout.c.
//
// A rank file has exactly one valid spelling: every offset and length in it follows from its counts, names and shapes.
// So the reader decodes the records, lays the tensors out again as the writer would, and refuses any difference: there
// is no room for overlaps, holes or unread bytes.
#include "formats/shard_file.h"

#include "formats/checked.h"
#include "formats/file_io.h"
#include "formats/repair_hint.h"
#include "formats/shard_layout.h"

#include <assert.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

// ---- roles ----------------------------------------------------------------------------------------------------------

// What stands in a tensor of a role, and how many there are.
enum role_form { VECTOR, MATRIX, BF16_MATRIX };
enum role_place { ONCE, LAYER, EXPERT }; // one in the file, one of a layer, one of each expert of a layer

static const struct {
    const char *name;
    enum role_form form;
    enum role_place place;
} roles[ROLE_COUNT] = {
    [ROLE_EMBEDDING] = {"embedding", MATRIX, ONCE},
    [ROLE_ROPE_INV_FREQ] = {"rope_inv_freq", VECTOR, ONCE},
    [ROLE_ATTENTION_NORM] = {"attention_norm", VECTOR, LAYER},
    [ROLE_QKV] = {"qkv", MATRIX, LAYER},
    [ROLE_QKV_BIAS] = {"qkv_bias", VECTOR, LAYER},
    [ROLE_Q_NORM] = {"q_norm", VECTOR, LAYER},
    [ROLE_K_NORM] = {"k_norm", VECTOR, LAYER},
    [ROLE_O] = {"o", MATRIX, LAYER},
    [ROLE_O_BIAS] = {"o_bias", VECTOR, LAYER},
    [ROLE_MLP_NORM] = {"mlp_norm", VECTOR, LAYER},
    [ROLE_GATE_UP] = {"gate_up", MATRIX, LAYER},
    [ROLE_GATE_UP_BIAS] = {"gate_up_bias", VECTOR, LAYER},
    [ROLE_DOWN] = {"down", MATRIX, LAYER},
    [ROLE_DOWN_BIAS] = {"down_bias", VECTOR, LAYER},
    [ROLE_FINAL_NORM] = {"final_norm", VECTOR, ONCE},
    [ROLE_HEAD] = {"head", MATRIX, ONCE},
    [ROLE_ROPE_LONG] = {"rope_long", VECTOR, ONCE},
    [ROLE_ROPE_LOCAL] = {"rope_local", VECTOR, ONCE},
    [ROLE_SINKS] = {"sinks", VECTOR, LAYER},
    [ROLE_ATTENTION_POST_NORM] = {"attention_post_norm", VECTOR, LAYER},
    [ROLE_MLP_POST_NORM] = {"mlp_post_norm", VECTOR, LAYER},
    [ROLE_Q_A] = {"q_a", MATRIX, LAYER},
    [ROLE_Q_A_NORM] = {"q_a_norm", VECTOR, LAYER},
    [ROLE_Q_B] = {"q_b", MATRIX, LAYER},
    [ROLE_KV_A] = {"kv_a", MATRIX, LAYER},
    [ROLE_KV_A_NORM] = {"kv_a_norm", VECTOR, LAYER},
    [ROLE_KV_B] = {"kv_b", BF16_MATRIX, LAYER},
    [ROLE_ROUTER] = {"router", BF16_MATRIX, LAYER},
    [ROLE_ROUTER_BIAS] = {"router_bias", VECTOR, LAYER},
    [ROLE_ROUTER_CHOICE_BIAS] = {"router_choice_bias", VECTOR, LAYER},
    [ROLE_EXPERT_GATE_UP] = {"expert_gate_up", MATRIX, EXPERT},
    [ROLE_EXPERT_GATE_UP_BIAS] = {"expert_gate_up_bias", VECTOR, EXPERT},
    [ROLE_EXPERT_DOWN] = {"expert_down", MATRIX, EXPERT},
    [ROLE_EXPERT_DOWN_BIAS] = {"expert_down_bias", VECTOR, EXPERT},
    [ROLE_SHARED_GATE_UP] = {"shared_gate_up", MATRIX, LAYER},
    [ROLE_SHARED_DOWN] = {"shared_down", MATRIX, LAYER},
    [ROLE_QKV_ORDER] = {"qkv_order", VECTOR, LAYER},
    [ROLE_GATE_UP_ORDER] = {"gate_up_order", VECTOR, LAYER},
};

const char *tensor_role_name(enum tensor_role role)
{
    return (unsigned)role < ROLE_COUNT ? roles[role].name : "unknown";
}

// ---- reading --------------------------------------------------------------------------------------------------------

struct shard_file {
    char *name; // as given, for messages
    struct shard_identity identity;
    struct shard_disk_layout layout;
    struct checksum128 root;
    uint8_t *index; // copy of the file's bytes up to the end of the leaves; names point into it
    struct shard_tensor *tensors;
    uint64_t tensor_count;
    const struct shard_tensor **sorted; // by role, layer and expert
    uint8_t *payload;                   // mapped, or NULL
    struct shard_leaf *leaves; // [leaf_count] and where they begin, of a compressed file; NULL: they lie as they are
    uint64_t *leaf_offsets;
};

static int refuse(const struct shard_file *file, struct error *err, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
static int refuse(const struct shard_file *file, struct error *err, const char *fmt, ...)
{
    char what[512], hint[REPAIR_HINT_BYTES];
    va_list args;
    va_start(args, fmt);
    vsnprintf(what, sizeof what, fmt, args);
    va_end(args);
    return error_set(err, ERR_CORRUPT, "%s: %s; %s", file->name, what, repair_hint(hint, file->name));
}

static bool all_zero(const uint8_t *bytes, uint64_t begin, uint64_t end)
{
    return begin == end || (bytes[begin] == 0 && memcmp(bytes + begin, bytes + begin + 1, end - begin - 1) == 0);
}

// What can be said before anything but the header is trusted to be there.
static int check_kind(const struct shard_file *file, const struct disk_header *header, uint64_t available,
                      uint64_t file_bytes, struct error *err)
{
    if (available < HEADER_BYTES)
        return refuse(file, err, "truncated: %" PRIu64 " bytes, a rank file has at least %d", available, HEADER_BYTES);
    if (memcmp(header->magic, SHARD_MAGIC, sizeof header->magic) != 0)
        return refuse(file, err, "not a rank file: it does not begin with the letters TPSHARD");
    if (header->version != SHARD_VERSION)
        return refuse(file, err, "rank file version %" PRIu32 ", this program reads version %d", header->version,
                      SHARD_VERSION);
    if (header->required_features & ~(uint32_t)REQUIRED_FEATURES_KNOWN)
        return refuse(file, err, "it needs features 0x%" PRIx32 " that this program does not know; use a newer one",
                      header->required_features);
    if (header->payload_offset > HEAD_MAX_BYTES || header->payload_offset < SHARD_PAYLOAD_ALIGN ||
        header->payload_offset % SHARD_PAYLOAD_ALIGN)
        return refuse(file, err, "impossible payload offset %" PRIu64, header->payload_offset);
    if (header->file_bytes != file_bytes)
        return refuse(file, err,
                      "%" PRIu64 " bytes long, its header says %" PRIu64 ": an incomplete copy or other bytes",
                      file_bytes, header->file_bytes);
    if (available < header->payload_offset)
        return refuse(file, err, "truncated: %" PRIu64 " bytes of its head of %" PRIu64, available,
                      header->payload_offset);
    return 0;
}

static int check_head_hash(const struct shard_file *file, const struct disk_header *header, const uint8_t *bytes,
                           struct error *err)
{
    struct checksum_stream *stream = checksum_stream_new();
    if (!stream)
        return error_set(err, ERR_MEMORY, "%s: out of memory", file->name);
    struct disk_header unhashed = *header;
    memset(unhashed.head_hash, 0, sizeof unhashed.head_hash);
    checksum_stream_update(stream, &unhashed, sizeof unhashed);
    checksum_stream_update(stream, bytes + HEADER_BYTES, header->payload_offset - HEADER_BYTES);
    uint8_t hash[16];
    checksum128_to_bytes(checksum_stream_final(stream), hash);
    checksum_stream_free(stream);
    if (memcmp(hash, header->head_hash, sizeof hash) != 0)
        return refuse(file, err, "checksum mismatch in its head (file bytes 0 to %" PRIu64 ")",
                      header->payload_offset - 1);
    return 0;
}

// Identity and layout. After this every record and leaf is known to lie inside the head.
static int read_header(struct shard_file *file, const struct disk_header *header, const uint8_t *bytes,
                       struct error *err)
{
    bool stages = header->required_features & FEATURE_STAGES;
    if (header->header_bytes != HEADER_BYTES || (!stages && (header->layer_begin || header->num_layers)) ||
        !all_zero(header->reserved_end, 0, sizeof header->reserved_end))
        return refuse(file, err, "a reserved field of its header is in use");
    if (header->tp_size < 1 || header->tp_size > SHARD_MAX_RANKS || header->rank >= header->tp_size ||
        header->pp_size < 1 || header->pp_size > SHARD_MAX_RANKS || header->pp_rank >= header->pp_size)
        return refuse(file, err, "impossible rank %" PRIu32 " of %" PRIu32 ", stage %" PRIu32 " of %" PRIu32,
                      header->rank, header->tp_size, header->pp_rank, header->pp_size);
    if (stages != (header->pp_size > 1) || stages != (header->num_layers > 0) ||
        header->num_layers > MODEL_MAX_LAYERS || header->layer_begin > MODEL_MAX_LAYERS - header->num_layers)
        return refuse(file, err,
                      "impossible layers of stage %" PRIu32 " of %" PRIu32 ": %" PRIu32 " from layer %" PRIu32 " on",
                      header->pp_rank, header->pp_size, header->num_layers, header->layer_begin);
    for (int i = 0; i < SHARE_FIELDS; i++)
        if (header->share[i] > WEIGHT_MAX_DIM)
            return refuse(file, err, "impossible share (field %d is %" PRIu64 ")", i, header->share[i]);
    file->identity = (struct shard_identity){
        .rank = header->rank,
        .tp_size = header->tp_size,
        .pp_rank = header->pp_rank,
        .pp_size = header->pp_size,
        .layer_begin = header->layer_begin,
        .num_layers = header->num_layers,
    };
    memcpy(&file->identity.share, header->share, sizeof header->share);
    memcpy(file->identity.contract, header->contract, sizeof header->contract);

    struct shard_disk_layout layout;
    if (header->tensor_count == 0)
        return refuse(file, err, "it holds no tensor");
    if (!shard_layout_file(&layout, header->tensor_count, header->part_count, header->strings_bytes,
                           header->payload_bytes, header->required_features & FEATURE_COMPRESSED))
        return refuse(file, err,
                      "impossible counts: %" PRIu32 " tensors, %" PRIu32 " parts, %" PRIu64 " bytes of names",
                      header->tensor_count, header->part_count, header->strings_bytes);
    const struct {
        const char *what;
        uint64_t found, wanted;
    } fields[] = {
        {"offset of tensors", header->tensors_offset, HEADER_BYTES},
        {"offset of parts", header->parts_offset, layout.parts_offset},
        {"offset of names", header->strings_offset, layout.strings_offset},
        {"offset of leaves", header->leaves_offset, layout.leaves_offset},
        {"count of leaves", header->leaf_count, layout.leaf_count},
        {"offset of the payload", header->payload_offset, layout.payload_offset},
        {"size of the payload", header->payload_bytes, layout.payload_bytes},
        {"size of the file", header->file_bytes, layout.table_bytes ? header->file_bytes : layout.file_bytes},
    };
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++)
        if (fields[i].found != fields[i].wanted)
            return refuse(file, err, "%s is %" PRIu64 " instead of %" PRIu64, fields[i].what, fields[i].found,
                          fields[i].wanted);
    if (!all_zero(bytes, layout.strings_offset + layout.strings_bytes, layout.leaves_offset) ||
        !all_zero(bytes, layout.table_offset + layout.table_bytes, layout.payload_offset))
        return refuse(file, err, "the padding of its head is not zero");
    file->layout = layout;
    file->tensor_count = header->tensor_count;
    return 0;
}

// How the leaves of a compressed file lie in it.
static int read_table(struct shard_file *file, const struct disk_header *header, struct error *err)
{
    if (!(header->required_features & FEATURE_COMPRESSED))
        return 0;
    file->leaves = malloc(file->layout.table_bytes + 1);
    file->leaf_offsets = malloc(file->layout.leaf_count * sizeof *file->leaf_offsets + 1);
    if (!file->leaves || !file->leaf_offsets)
        return error_set(err, ERR_MEMORY, "%s: out of memory for %" PRIu64 " leaves", file->name,
                         file->layout.leaf_count);
    memcpy(file->leaves, file->index + file->layout.table_offset, file->layout.table_bytes);
    const char *wrong = shard_layout_stored(&file->layout, file->leaves, file->leaf_offsets);
    if (wrong)
        return refuse(file, err, "its table of leaves: %s", wrong);
    if (file->layout.file_bytes != header->file_bytes)
        return refuse(file, err, "its leaves end at %" PRIu64 ", the file at %" PRIu64, file->layout.file_bytes,
                      header->file_bytes);
    return 0;
}

// Names stand in the order of the parts, each followed by one NUL: *name_end is where the last one ended.
static int read_part(struct shard_part *out, struct shard_file *file, uint64_t part_index, uint64_t *name_end,
                     struct error *err)
{
    struct disk_part record;
    memcpy(&record, file->index + file->layout.parts_offset + part_index * sizeof record, sizeof record);
    const char *name = (const char *)file->index + file->layout.strings_offset + *name_end;
    if (record.name_offset != *name_end || record.name_bytes < 1 || record.name_bytes > NAME_MAX_BYTES ||
        !checked_range(*name_end, (uint64_t)record.name_bytes + 1, file->layout.strings_bytes) ||
        name[record.name_bytes] != 0)
        return refuse(file, err, "part %" PRIu64 ": its name is out of place", part_index);
    for (uint32_t i = 0; i < record.name_bytes; i++)
        if (name[i] < 0x20 || name[i] > 0x7e)
            return refuse(file, err, "part %" PRIu64 ": its name holds byte 0x%02x", part_index, (uint8_t)name[i]);
    if (record.reserved || record.source_rows > WEIGHT_MAX_DIM || record.source_cols > WEIGHT_MAX_DIM ||
        !checked_range(record.row_begin, record.rows, record.source_rows) ||
        !checked_range(record.col_begin, record.cols, record.source_cols))
        return refuse(file, err, "part %" PRIu64 " (%s) does not lie inside its source", part_index, name);
    *name_end += (uint64_t)record.name_bytes + 1;
    *out = (struct shard_part){
        .source = name,
        .source_rows = record.source_rows,
        .source_cols = record.source_cols,
        .row_begin = record.row_begin,
        .rows = record.rows,
        .col_begin = record.col_begin,
        .cols = record.cols,
    };
    return 0;
}

// Parts of a matrix stand one below the other, parts of a vector side by side, and fill the tensor.
static bool parts_fill_tensor(const struct shard_tensor *tensor)
{
    bool vector = roles[tensor->role].form == VECTOR;
    uint64_t sum = 0;
    for (int i = 0; i < tensor->num_parts; i++) {
        const struct shard_part *part = &tensor->parts[i];
        if (vector ? part->rows != 1 || part->source_rows != 1 : part->cols != tensor->shape.cols)
            return false;
        sum += vector ? part->cols : part->rows;
    }
    return tensor->num_parts == 0 || sum == (vector ? tensor->shape.cols : tensor->shape.rows);
}

static int read_tensor(struct shard_file *file, uint64_t index, uint64_t *part_end, uint64_t *name_end,
                       uint64_t *payload_end, struct error *err)
{
    struct shard_tensor *tensor = &file->tensors[index];
    struct disk_tensor record;
    memcpy(&record, file->index + HEADER_BYTES + index * sizeof record, sizeof record);
    if (record.role >= ROLE_COUNT)
        return refuse(file, err, "tensor %" PRIu64 ": unknown role %" PRIu32, index, record.role);
    enum role_place place = roles[record.role].place;
    if (place == ONCE ? record.layer != -1 : record.layer < 0 || record.layer > LAYER_MAX)
        return refuse(file, err, "tensor %" PRIu64 " (%s): impossible layer %" PRId32, index, roles[record.role].name,
                      record.layer);
    if (place != EXPERT ? record.expert != -1 : record.expert < 0 || record.expert > EXPERT_MAX)
        return refuse(file, err, "tensor %" PRIu64 " (%s): impossible expert %" PRId32, index, roles[record.role].name,
                      record.expert);
    tensor->role = (enum tensor_role)record.role;
    tensor->layer = record.layer;
    tensor->expert = record.expert;
    if (!weight_shape_make(&tensor->shape, (enum weight_kind)record.kind, record.group_size, record.rows, record.cols))
        return refuse(file, err,
                      "tensor %" PRIu64 " (%s): impossible kind %" PRIu32 ", group size %" PRIu32 ", shape %" PRIu64
                      " x %" PRIu64,
                      index, roles[record.role].name, record.kind, record.group_size, record.rows, record.cols);
    enum role_form form = roles[record.role].form;
    if (form == VECTOR && (record.kind != WEIGHT_F32 || record.rows != 1))
        return refuse(file, err, "tensor %" PRIu64 " (%s) must be one row of f32", index, roles[record.role].name);
    if (form == BF16_MATRIX && record.kind != WEIGHT_BF16)
        return refuse(file, err, "tensor %" PRIu64 " (%s) must be bf16", index, roles[record.role].name);

    if (record.num_parts > SHARD_MAX_PARTS || record.first_part != *part_end ||
        record.num_parts > file->layout.part_count - *part_end)
        return refuse(file, err, "tensor %" PRIu64 " (%s): its parts are out of place", index, roles[record.role].name);
    int rc;
    for (uint32_t p = 0; p < record.num_parts; p++, tensor->num_parts++)
        if ((rc = read_part(&tensor->parts[p], file, (*part_end)++, name_end, err)))
            return rc;
    if (!parts_fill_tensor(tensor))
        return refuse(file, err, "tensor %" PRIu64 " (%s): its parts do not add up to %" PRIu64 " x %" PRIu64, index,
                      roles[record.role].name, record.rows, record.cols);

    if (!shard_layout_tensor(tensor, payload_end) || record.data_offset != tensor->data_offset ||
        record.data_bytes != tensor->shape.data_bytes || record.scale_offset != tensor->scale_offset ||
        record.scale_bytes != tensor->shape.scale_bytes || record.reserved)
        return refuse(file, err, "tensor %" PRIu64 " (%s) is out of place or has the wrong size", index,
                      roles[record.role].name);
    return 0;
}

static int compare_places(const void *a, const void *b)
{
    const struct shard_tensor *x = *(const struct shard_tensor *const *)a, *y = *(const struct shard_tensor *const *)b;
    if (x->role != y->role)
        return x->role < y->role ? -1 : 1;
    if (x->layer != y->layer)
        return x->layer < y->layer ? -1 : 1;
    return (x->expert > y->expert) - (x->expert < y->expert);
}

static int read_tensors(struct shard_file *file, struct error *err)
{
    int rc;
    uint64_t part_end = 0, name_end = 0, payload_end = 0;
    for (uint64_t i = 0; i < file->tensor_count; i++) {
        if ((rc = read_tensor(file, i, &part_end, &name_end, &payload_end, err)))
            return rc;
        file->sorted[i] = &file->tensors[i];
    }
    if (part_end != file->layout.part_count || name_end != file->layout.strings_bytes)
        return refuse(file, err, "its index holds parts or names that belong to no tensor");
    if (round_up(payload_end, SHARD_FILE_ALIGN) != file->layout.payload_bytes)
        return refuse(file, err, "its tensors end at %" PRIu64 ", its payload at %" PRIu64, payload_end,
                      file->layout.payload_bytes);

    qsort(file->sorted, file->tensor_count, sizeof *file->sorted, compare_places);
    for (uint64_t i = 1; i < file->tensor_count; i++)
        if (compare_places(&file->sorted[i], &file->sorted[i - 1]) == 0) {
            const struct shard_tensor *twice = file->sorted[i];
            return refuse(file, err, "two tensors are %s of layer %" PRId32 " (expert %" PRId32 ")",
                          tensor_role_name(twice->role), twice->layer, twice->expert);
        }
    return 0;
}

int shard_file_parse(struct shard_file **out, const uint8_t *bytes, uint64_t available, uint64_t file_bytes,
                     const char *name, struct error *err)
{
    int rc;
    struct disk_header header = {0};
    struct shard_file *file = calloc(1, sizeof *file);
    if (!file || !(file->name = strdup(name))) {
        rc = error_set(err, ERR_MEMORY, "%s: out of memory", name);
        goto fail;
    }
    if (available)
        memcpy(&header, bytes, available < sizeof header ? available : sizeof header);
    if ((rc = check_kind(file, &header, available, file_bytes, err)) ||
        (rc = check_head_hash(file, &header, bytes, err)) || (rc = read_header(file, &header, bytes, err)))
        goto fail;

    uint64_t index_bytes = file->layout.table_offset + file->layout.table_bytes;
    file->index = malloc(index_bytes);
    file->tensors = calloc(file->tensor_count, sizeof *file->tensors);
    file->sorted = calloc(file->tensor_count, sizeof *file->sorted);
    if (!file->index || !file->tensors || !file->sorted) {
        rc = error_set(err, ERR_MEMORY, "%s: out of memory for the index of %" PRIu64 " tensors", name,
                       file->tensor_count);
        goto fail;
    }
    memcpy(file->index, bytes, index_bytes);
    if ((rc = read_tensors(file, err)) || (rc = read_table(file, &header, err)))
        goto fail;
    file->root = checksum_whole(bytes, file->layout.payload_offset);
    *out = file;
    return 0;
fail:
    shard_file_close(file);
    return rc;
}

uint64_t shard_file_head_bytes(const uint8_t *first, uint64_t num_first)
{
    struct disk_header header;
    if (num_first < sizeof header)
        return 0;
    memcpy(&header, first, sizeof header);
    return header.payload_offset <= HEAD_MAX_BYTES ? header.payload_offset : 0;
}

int shard_file_open(struct shard_file **out, const char *path, struct error *err)
{
    int rc, fd = -1;
    uint64_t file_bytes = 0;
    uint8_t *head = NULL;
    struct shard_file *file = NULL;
    if ((rc = file_open_read(&fd, &file_bytes, path, err)))
        return rc;

    // The header says how long the head is; where it says nonsense, that is told of the header.
    uint8_t header[HEADER_BYTES];
    uint64_t header_bytes = file_bytes < sizeof header ? file_bytes : sizeof header;
    if ((rc = file_pread_full(fd, header, header_bytes, 0, path, err)))
        goto fail;
    uint64_t head_bytes = shard_file_head_bytes(header, header_bytes);
    head_bytes = head_bytes < header_bytes ? header_bytes : head_bytes < file_bytes ? head_bytes : file_bytes;
    head = malloc(head_bytes + 1);
    if (!head) {
        rc = error_set(err, ERR_MEMORY, "%s: out of memory for its head (%" PRIu64 " bytes)", path, head_bytes);
        goto fail;
    }
    if ((rc = file_pread_full(fd, head, head_bytes, 0, path, err)) ||
        (rc = shard_file_parse(&file, head, head_bytes, file_bytes, path, err)))
        goto fail;
    if (file->layout.payload_bytes && !file->leaves) {
        void *payload =
            mmap(NULL, file->layout.payload_bytes, PROT_READ, MAP_PRIVATE, fd, (off_t)file->layout.payload_offset);
        if (payload == MAP_FAILED) {
            rc = error_set_errno(err, "%s: cannot map %" PRIu64 " bytes", path, file->layout.payload_bytes);
            goto fail;
        }
        file->payload = payload;
    }
    free(head);
    close(fd);
    *out = file;
    return 0;
fail:
    shard_file_close(file);
    free(head);
    close(fd);
    return rc;
}

void shard_file_close(struct shard_file *file)
{
    if (!file)
        return;
    if (file->payload)
        munmap(file->payload, file->layout.payload_bytes);
    free(file->leaf_offsets);
    free(file->leaves);
    free(file->sorted);
    free(file->tensors);
    free(file->index);
    free(file->name);
    free(file);
}

const struct shard_identity *shard_file_identity(const struct shard_file *file) { return &file->identity; }
uint64_t shard_file_tensor_count(const struct shard_file *file) { return file->tensor_count; }
struct checksum128 shard_file_root(const struct shard_file *file) { return file->root; }
uint64_t shard_file_payload_bytes(const struct shard_file *file) { return file->layout.payload_bytes; }
uint64_t shard_file_payload_offset(const struct shard_file *file) { return file->layout.payload_offset; }
const uint8_t *shard_file_payload(const struct shard_file *file) { return file->payload; }
uint64_t shard_file_leaf_count(const struct shard_file *file) { return file->layout.leaf_count; }

const struct shard_tensor *shard_file_tensor(const struct shard_file *file, uint64_t index)
{
    assert(index < file->tensor_count);
    return &file->tensors[index];
}

const struct shard_tensor *shard_file_find(const struct shard_file *file, enum tensor_role role, int32_t layer,
                                           int32_t expert)
{
    const struct shard_tensor wanted = {.role = role, .layer = layer, .expert = expert}, *key = &wanted;
    const struct shard_tensor **found =
        bsearch(&key, file->sorted, file->tensor_count, sizeof *file->sorted, compare_places);
    return found ? *found : NULL;
}

uint64_t shard_file_leaf_bytes(const struct shard_file *file, uint64_t index)
{
    return shard_layout_leaf_bytes(&file->layout, index);
}

const char *shard_file_leaf_label(const struct shard_file *file, uint64_t index, char *buffer, size_t bytes)
{
    char label[256];
    uint64_t begin = index * SHARD_LEAF_BYTES, end = begin + shard_file_leaf_bytes(file, index), others = 0;
    const struct shard_tensor *first = NULL;
    for (uint64_t i = 0; i < file->tensor_count; i++) {
        const struct shard_tensor *tensor = &file->tensors[i];
        const struct weight_shape *shape = &tensor->shape;
        uint64_t tensor_end =
            shape->scale_bytes ? tensor->scale_offset + shape->scale_bytes : tensor->data_offset + shape->data_bytes;
        if (tensor_end == tensor->data_offset || tensor->data_offset >= end || tensor_end <= begin)
            continue;
        others += first != NULL;
        first = first ? first : tensor;
    }
    if (!first)
        snprintf(buffer, bytes, "padding");
    else if (others == 0)
        snprintf(buffer, bytes, "tensor %s", shard_layout_label(label, sizeof label, first));
    else
        snprintf(buffer, bytes, "tensor %s or one of the %" PRIu64 " behind it",
                 shard_layout_label(label, sizeof label, first), others);
    return buffer;
}

// Leaf `index` as it lies in the file does not hold: what stands in it is named by its payload bytes.
static int report_leaf(const struct shard_file *file, uint64_t index, const char *wrong, struct error *err)
{
    char label[SHARD_LEAF_LABEL_BYTES], hint[REPAIR_HINT_BYTES];
    struct shard_stored stored = shard_file_stored_leaf(file, index);
    uint64_t offset = file->layout.payload_offset + stored.offset;
    return error_set(err, ERR_CORRUPT, "%s: rank %" PRIu32 ": %s, file bytes %" PRIu64 " to %" PRIu64 ": %s; %s",
                     file->name, file->identity.rank, shard_file_leaf_label(file, index, label, sizeof label), offset,
                     offset + stored.bytes - 1, wrong, repair_hint(hint, file->name));
}

// ---- stored leaves --------------------------------------------------------------------------------------------------

_Static_assert((int)LEAF_MAX_BYTES == (int)SHARD_LEAF_BYTES, "a leaf is what is encoded");

bool shard_file_is_compressed(const struct shard_file *file) { return file->leaves != NULL; }

uint64_t shard_file_stored_bytes(const struct shard_file *file)
{
    return file->layout.file_bytes - file->layout.payload_offset;
}

enum leaf_code shard_file_leaf_code(const struct shard_file *file, uint64_t index)
{
    assert(index < file->layout.leaf_count);
    return file->leaves ? (enum leaf_code)file->leaves[index].code : LEAF_RAW;
}

struct shard_stored shard_file_stored_leaf(const struct shard_file *file, uint64_t index)
{
    uint64_t leaf_bytes = shard_file_leaf_bytes(file, index);
    if (!file->leaves)
        return (struct shard_stored){index * SHARD_LEAF_BYTES, leaf_bytes};
    bool last = index + 1 == file->layout.leaf_count;
    uint64_t offset = file->leaf_offsets[index];
    uint64_t end = last ? shard_file_stored_bytes(file) : offset + file->leaves[index].bytes;
    return (struct shard_stored){offset, end - offset};
}

int shard_file_verify_leaf(const struct shard_file *file, uint64_t index, const uint8_t *stored, struct error *err)
{
    uint64_t wanted, stored_bytes = shard_file_stored_leaf(file, index).bytes;
    memcpy(&wanted, file->index + file->layout.leaves_offset + index * sizeof wanted, sizeof wanted);
    return checksum_leaf(stored, stored_bytes) == wanted ? 0 : report_leaf(file, index, "checksum mismatch", err);
}

int shard_file_decode_leaf(const struct shard_file *file, uint64_t index, const uint8_t *stored, uint8_t *out,
                           struct leaf_scratch *scratch, struct error *err)
{
    uint64_t leaf_bytes = shard_file_leaf_bytes(file, index);
    struct shard_leaf raw = {(uint32_t)leaf_bytes, LEAF_RAW}, leaf = file->leaves ? file->leaves[index] : raw;
    const char *wrong = leaf_decode(out, leaf_bytes, leaf.code, stored, leaf.bytes, scratch);
    if (!wrong && !all_zero(stored, leaf.bytes, shard_file_stored_leaf(file, index).bytes))
        wrong = "it is not followed by zeros";
    return wrong ? report_leaf(file, index, wrong, err) : 0;
}
