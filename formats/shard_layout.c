// Writer of rank files: where everything lies, and the bytes of the head. See shard_file.h for what is public; the
// specification is shard_file.md.
#include "formats/shard_layout.h"

#include "formats/checked.h"
#include "formats/error.h"

#include <assert.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *shard_layout_label(char *buffer, size_t bytes, const struct shard_tensor *tensor)
{
    char place[32] = "", expert[32] = "";
    if (tensor->layer >= 0)
        snprintf(place, sizeof place, "layers.%" PRId32 ".", tensor->layer);
    if (tensor->expert >= 0)
        snprintf(expert, sizeof expert, " %" PRId32, tensor->expert);
    const char *source = tensor->num_parts ? tensor->parts[0].source : "computed";
    snprintf(buffer, bytes, "%s%s%s (%s%s)", place, tensor_role_name(tensor->role), expert, source,
             tensor->num_parts > 1 ? ", ..." : "");
    return buffer;
}

// Gives `bytes` the next aligned place behind *end.
static bool place_bytes(uint64_t *offset, uint64_t *end, uint64_t bytes)
{
    uint64_t begin;
    if (!checked_round_up(*end, SHARD_TENSOR_ALIGN, &begin) || !checked_add(begin, bytes, end))
        return false;
    *offset = begin;
    return true;
}

bool shard_layout_tensor(struct shard_tensor *tensor, uint64_t *end)
{
    tensor->scale_offset = 0;
    return place_bytes(&tensor->data_offset, end, tensor->shape.data_bytes) &&
           (tensor->shape.scale_bytes == 0 || place_bytes(&tensor->scale_offset, end, tensor->shape.scale_bytes));
}

// Counts are bounded before they are multiplied: a hostile header may say anything.
bool shard_layout_file(struct shard_disk_layout *out, uint64_t tensor_count, uint64_t part_count,
                       uint64_t strings_bytes, uint64_t payload_end, bool compressed)
{
    if (tensor_count > HEAD_MAX_BYTES || part_count > HEAD_MAX_BYTES || strings_bytes > HEAD_MAX_BYTES)
        return false;
    struct shard_disk_layout layout = {.part_count = part_count, .strings_bytes = strings_bytes};
    if (!checked_round_up(payload_end, SHARD_FILE_ALIGN, &layout.payload_bytes))
        return false;
    layout.leaf_count = layout.payload_bytes / SHARD_LEAF_BYTES + (layout.payload_bytes % SHARD_LEAF_BYTES != 0);
    if (layout.leaf_count > HEAD_MAX_BYTES)
        return false;
    layout.parts_offset = HEADER_BYTES + tensor_count * sizeof(struct disk_tensor);
    layout.strings_offset = layout.parts_offset + part_count * sizeof(struct disk_part);
    layout.leaves_offset = round_up(layout.strings_offset + strings_bytes, LEAVES_ALIGN);
    layout.table_offset = layout.leaves_offset + layout.leaf_count * sizeof(uint64_t);
    layout.table_bytes = compressed ? layout.leaf_count * sizeof(struct shard_leaf) : 0;
    layout.payload_offset = round_up(layout.table_offset + layout.table_bytes, SHARD_PAYLOAD_ALIGN);
    layout.file_bytes = layout.payload_offset + layout.payload_bytes;
    if (layout.payload_offset > HEAD_MAX_BYTES)
        return false;
    *out = layout;
    return true;
}

uint64_t shard_layout_leaf_bytes(const struct shard_disk_layout *layout, uint64_t index)
{
    assert(index < layout->leaf_count);
    return leaf_payload_bytes(layout->payload_bytes, index);
}

const char *shard_layout_stored(struct shard_disk_layout *layout, const struct shard_leaf *table, uint64_t *offsets)
{
    uint64_t end = 0;
    bool all_raw = true;
    for (uint64_t i = 0; i < layout->leaf_count; i++) {
        if (!leaf_code_fits(table[i].code, shard_layout_leaf_bytes(layout, i), table[i].bytes))
            return "a leaf has an impossible code or length";
        all_raw = all_raw && table[i].code == LEAF_RAW;
        offsets[i] = end;
        end += table[i].bytes; // below 2^43: leaves are bounded by the head's size
    }
    if (all_raw)
        return "no leaf is compressed";
    layout->file_bytes = layout->payload_offset + round_up(end, SHARD_FILE_ALIGN);
    return NULL;
}

int shard_layout_all(struct shard_disk_layout *out, struct shard_tensor *tensors, uint64_t count, bool compressed,
                     struct error *err)
{
    uint64_t end = 0, part_count = 0, strings_bytes = 0;
    char label[192];
    for (uint64_t i = 0; i < count; i++) {
        struct shard_tensor *tensor = &tensors[i];
        assert(tensor->num_parts >= 0 && tensor->num_parts <= SHARD_MAX_PARTS);
        if (!shard_layout_tensor(tensor, &end))
            return error_set(err, ERR_MODEL, "tensor %s: the rank file would exceed 2^64 bytes",
                             shard_layout_label(label, sizeof label, tensor));
        part_count += (uint64_t)tensor->num_parts;
        for (int p = 0; p < tensor->num_parts; p++)
            strings_bytes += strlen(tensor->parts[p].source) + 1;
    }
    if (!shard_layout_file(out, count, part_count, strings_bytes, end, compressed))
        return error_set(err, ERR_MODEL,
                         "the index of the rank file would exceed %d MiB (%" PRIu64 " tensors, %" PRIu64
                         " bytes of weights); split the model over more ranks",
                         HEAD_MAX_BYTES >> 20, count, end);
    return 0;
}

int shard_layout(struct shard_tensor *tensors, uint64_t count, uint64_t *payload_offset, uint64_t *payload_bytes,
                 uint64_t *file_bytes, struct error *err)
{
    struct shard_disk_layout layout;
    int rc = shard_layout_all(&layout, tensors, count, false, err);
    if (rc)
        return rc;
    *payload_offset = layout.payload_offset;
    *payload_bytes = layout.payload_bytes;
    *file_bytes = layout.file_bytes;
    return 0;
}

static int copy_tensors(struct shard_tensor **out, const struct shard_tensor *tensors, uint64_t count,
                        struct error *err)
{
    *out = malloc(count * sizeof **out + 1);
    if (!*out)
        return error_set(err, ERR_MEMORY, "out of memory for the index of %" PRIu64 " tensors", count);
    memcpy(*out, tensors, count * sizeof **out);
    return 0;
}

int shard_compressed_layout(struct shard_compressed_layout *out, const struct shard_tensor *tensors, uint64_t count,
                            struct error *err)
{
    struct shard_disk_layout layout;
    struct shard_tensor *placed;
    int rc = copy_tensors(&placed, tensors, count, err);
    if (rc)
        return rc;
    if (!(rc = shard_layout_all(&layout, placed, count, true, err)))
        *out = (struct shard_compressed_layout){layout.leaves_offset, layout.table_offset, layout.payload_offset};
    free(placed);
    return rc;
}

// ---- writing --------------------------------------------------------------------------------------------------------

static struct disk_header make_header(const struct shard_disk_layout *layout, const struct shard_identity *identity,
                                      uint64_t tensor_count)
{
    struct disk_header header = {
        .version = SHARD_VERSION,
        .header_bytes = HEADER_BYTES,
        .required_features =
            (layout->table_bytes ? FEATURE_COMPRESSED : 0u) | (identity->pp_size > 1 ? FEATURE_STAGES : 0u),
        .rank = identity->rank,
        .tp_size = identity->tp_size,
        .pp_rank = identity->pp_rank,
        .pp_size = identity->pp_size,
        .layer_begin = identity->layer_begin,
        .num_layers = identity->num_layers,
        .tensor_count = (uint32_t)tensor_count,
        .part_count = (uint32_t)layout->part_count,
        .tensors_offset = HEADER_BYTES,
        .parts_offset = layout->parts_offset,
        .strings_offset = layout->strings_offset,
        .strings_bytes = layout->strings_bytes,
        .leaves_offset = layout->leaves_offset,
        .leaf_count = layout->leaf_count,
        .payload_offset = layout->payload_offset,
        .payload_bytes = layout->payload_bytes,
        .file_bytes = layout->file_bytes,
    };
    memcpy(header.magic, SHARD_MAGIC, sizeof header.magic);
    memcpy(header.share, &identity->share, sizeof header.share);
    memcpy(header.contract, identity->contract, sizeof header.contract);
    return header;
}

// Tensor records, part records and names.
static void write_index(uint8_t *head, const struct shard_disk_layout *layout, const struct shard_tensor *tensors,
                        uint64_t count)
{
    uint8_t *tensor_at = head + HEADER_BYTES, *part_at = head + layout->parts_offset;
    char *names = (char *)head + layout->strings_offset;
    uint32_t part_end = 0, name_end = 0;
    for (uint64_t i = 0; i < count; i++) {
        const struct shard_tensor *tensor = &tensors[i];
        struct disk_tensor record = {
            .role = (uint32_t)tensor->role,
            .layer = tensor->layer,
            .expert = tensor->expert,
            .kind = (uint32_t)tensor->shape.kind,
            .group_size = tensor->shape.group_size,
            .rows = tensor->shape.rows,
            .cols = tensor->shape.cols,
            .data_offset = tensor->data_offset,
            .data_bytes = tensor->shape.data_bytes,
            .scale_offset = tensor->scale_offset,
            .scale_bytes = tensor->shape.scale_bytes,
            .first_part = part_end,
            .num_parts = (uint32_t)tensor->num_parts,
        };
        memcpy(tensor_at + i * sizeof record, &record, sizeof record);
        for (int p = 0; p < tensor->num_parts; p++, part_end++) {
            const struct shard_part *part = &tensor->parts[p];
            struct disk_part part_record = {
                .name_offset = name_end,
                .name_bytes = (uint32_t)strlen(part->source),
                .source_rows = part->source_rows,
                .source_cols = part->source_cols,
                .row_begin = part->row_begin,
                .rows = part->rows,
                .col_begin = part->col_begin,
                .cols = part->cols,
            };
            memcpy(part_at + part_end * sizeof part_record, &part_record, sizeof part_record);
            memcpy(names + name_end, part->source, part_record.name_bytes);
            name_end += part_record.name_bytes + 1;
        }
    }
}

// Tells the layout how leaves are stored, where they are compressed.
static int layout_leaves(struct shard_disk_layout *layout, const struct shard_leaf *stored, struct error *err)
{
    uint64_t *offsets = stored ? malloc(layout->leaf_count * sizeof *offsets + 1) : NULL;
    if (!stored)
        return 0;
    if (!offsets)
        return error_set(err, ERR_MEMORY, "out of memory for %" PRIu64 " leaves", layout->leaf_count);
    const char *wrong = shard_layout_stored(layout, stored, offsets);
    free(offsets);
    return wrong ? error_set(err, ERR_CORRUPT, "new rank file: %s", wrong) : 0;
}

// stored: NULL, or how the leaves of a compressed file lie in it.
static int serialise(uint8_t **out, const struct shard_identity *identity, const struct shard_tensor *tensors,
                     uint64_t count, const uint64_t *leaves, const struct shard_leaf *stored, struct checksum128 *root,
                     struct error *err)
{
    int rc;
    struct shard_disk_layout layout;
    uint8_t *head = NULL;
    struct shard_file *check = NULL;
    struct shard_tensor *placed;
    if ((rc = copy_tensors(&placed, tensors, count, err)))
        return rc;
    if ((rc = shard_layout_all(&layout, placed, count, stored != NULL, err)) ||
        (rc = layout_leaves(&layout, stored, err)))
        goto fail;
    head = calloc(1, layout.payload_offset);
    if (!head) {
        rc = error_set(err, ERR_MEMORY, "out of memory for the head of a rank file (%" PRIu64 " bytes)",
                       layout.payload_offset);
        goto fail;
    }
    struct disk_header header = make_header(&layout, identity, count);
    memcpy(head, &header, sizeof header);
    write_index(head, &layout, placed, count);
    if (layout.leaf_count)
        memcpy(head + layout.leaves_offset, leaves, layout.leaf_count * sizeof *leaves);
    if (layout.table_bytes)
        memcpy(head + layout.table_offset, stored, layout.table_bytes);
    checksum128_to_bytes(checksum_whole(head, layout.payload_offset), header.head_hash);
    memcpy(head, &header, sizeof header);

    // What is written can be read: the reader's checks are the writer's too.
    if ((rc = shard_file_parse(&check, head, layout.payload_offset, layout.file_bytes, "new rank file", err)))
        goto fail;
    if (root)
        *root = shard_file_root(check);
    shard_file_close(check);
    free(placed);
    *out = head;
    return 0;
fail:
    free(placed);
    free(head);
    return rc;
}

int shard_head_serialise(uint8_t **out, const struct shard_identity *identity, const struct shard_tensor *tensors,
                         uint64_t count, const uint64_t *leaves, struct checksum128 *root, struct error *err)
{
    return serialise(out, identity, tensors, count, leaves, NULL, root, err);
}

int shard_compressed_head_serialise(uint8_t **out, const struct shard_identity *identity,
                                    const struct shard_tensor *tensors, uint64_t count, const uint64_t *leaves,
                                    const struct shard_leaf *stored, struct checksum128 *root, struct error *err)
{
    return serialise(out, identity, tensors, count, leaves, stored, root, err);
}
