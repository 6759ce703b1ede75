// The head of a rank file. The checksum in it would stop nearly every mutation, so the target computes it anew, and
// takes the length of the file from the header: the checks behind are what is tested. An input is a head without its
// trailing zeros.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "formats/checked.h"
#include "formats/checksum.h"
#include "formats/shard_file.h"
#include "tests/fuzz/fuzz.h"

enum {
    HEADER_BYTES = 320,
    HEAD_BYTES = SHARD_PAYLOAD_ALIGN
}; // heads of one step of 2 MiB; longer ones are refused as truncated

static _Alignas(8) uint8_t head[HEAD_BYTES];
static uint8_t leaf[SHARD_STORED_MAX_BYTES], payload[SHARD_LEAF_BYTES];
static struct leaf_scratch *scratch;
static size_t dirty_bytes; // of head, left by the input before

static uint64_t field(uint64_t offset)
{
    uint64_t value;
    memcpy(&value, head + offset, sizeof value);
    return value;
}

static void put_head_hash(void)
{
    memset(head + 256, 0, 16);
    checksum128_to_bytes(checksum_whole(head, HEAD_BYTES), head + 256);
}

// Ranges inside the payload, in order, without overlap.
static void check_ranges(const struct shard_file *file)
{
    uint64_t end = 0, payload_bytes = shard_file_payload_bytes(file);
    CHECK(shard_file_payload_offset(file) + shard_file_stored_bytes(file) == field(112));
    CHECK(shard_file_is_compressed(file) || shard_file_stored_bytes(file) == payload_bytes);
    for (uint64_t i = 0; i < shard_file_tensor_count(file); i++) {
        const struct shard_tensor *tensor = shard_file_tensor(file, i);
        const struct weight_shape *shape = &tensor->shape;
        CHECK(tensor->data_offset >= end && tensor->data_offset % SHARD_TENSOR_ALIGN == 0);
        CHECK(checked_range(tensor->data_offset, shape->data_bytes, payload_bytes));
        end = tensor->data_offset + shape->data_bytes;
        if (shape->scale_bytes) {
            CHECK(tensor->scale_offset >= end && tensor->scale_offset % SHARD_TENSOR_ALIGN == 0);
            CHECK(checked_range(tensor->scale_offset, shape->scale_bytes, payload_bytes));
            end = tensor->scale_offset + shape->scale_bytes;
        }
        CHECK(tensor->num_parts <= SHARD_MAX_PARTS);
        for (int p = 0; p < tensor->num_parts; p++) {
            const struct shard_part *part = &tensor->parts[p];
            CHECK(strlen(part->source) >= 1 && strlen(part->source) <= 255);
            CHECK(checked_range(part->row_begin, part->rows, part->source_rows));
            CHECK(checked_range(part->col_begin, part->cols, part->source_cols));
        }
        CHECK(shard_file_find(file, tensor->role, tensor->layer, tensor->expert) == tensor);
    }
}

// Behind each other, up to the end of the file.
static void check_leaves(const struct shard_file *file)
{
    uint64_t end = 0, count = shard_file_leaf_count(file);
    for (uint64_t i = 0; i < count; i++) {
        struct shard_stored stored = shard_file_stored_leaf(file, i);
        CHECK(shard_file_leaf_bytes(file, i) <= SHARD_LEAF_BYTES && stored.bytes <= SHARD_STORED_MAX_BYTES);
        CHECK(stored.offset == end && stored.bytes > 0);
        CHECK(shard_file_is_compressed(file) || shard_file_leaf_code(file, i) == LEAF_RAW);
        end += stored.bytes;
    }
    CHECK(end == shard_file_stored_bytes(file) && end % SHARD_FILE_ALIGN == 0);
}

// There is one spelling: what was read, written again, is the same bytes (optional features aside).
static void check_spelling(const struct shard_file *file)
{
    uint64_t count = shard_file_tensor_count(file);
    struct shard_tensor *tensors = malloc(count * sizeof *tensors);
    uint64_t *leaves = malloc(shard_file_leaf_count(file) * sizeof *leaves + 1);
    uint8_t *again = NULL;
    struct error err = {0};
    CHECK(tensors && leaves);
    for (uint64_t i = 0; i < count; i++)
        tensors[i] = *shard_file_tensor(file, i);
    memcpy(leaves, head + field(80), shard_file_leaf_count(file) * sizeof *leaves);
    const struct shard_identity *identity = shard_file_identity(file);
    if (shard_file_is_compressed(file)) {
        uint64_t table = field(80) + shard_file_leaf_count(file) * sizeof *leaves;
        CHECK(shard_compressed_head_serialise(&again, identity, tensors, count, leaves,
                                              (const struct shard_leaf *)(const void *)(head + table), NULL,
                                              &err) == 0);
    } else {
        CHECK(shard_head_serialise(&again, identity, tensors, count, leaves, NULL, &err) == 0);
    }
    memset(head + 20, 0, 4); // optional features
    put_head_hash();
    CHECK(memcmp(again, head, HEAD_BYTES) == 0);
    free(again);
    free(leaves);
    free(tensors);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct shard_file *file = NULL;
    struct error err = {0};
    if (shard_file_parse(&file, data, size, size, "fuzz.tpshard", &err) == 0)
        shard_file_close(file);

    if (size > HEAD_BYTES)
        return 0;
    memcpy(head, data, size);
    if (size < dirty_bytes)
        memset(head + size, 0, dirty_bytes - size);
    dirty_bytes = size < HEADER_BYTES ? HEADER_BYTES : size; // the hash is written even behind a shorter input
    put_head_hash();
    if (shard_file_parse(&file, head, HEAD_BYTES, field(112), "fuzz.tpshard", &err)) {
        CHECK(err.code == ERR_CORRUPT && err.msg[0]);
        return 0;
    }
    if (!scratch)
        CHECK((scratch = leaf_scratch_new()) != NULL);
    check_ranges(file);
    check_leaves(file);
    for (uint64_t i = 0; i < shard_file_leaf_count(file); i += 1 + shard_file_leaf_count(file) / 2) {
        if (shard_file_verify_leaf(file, i, leaf, &err))
            CHECK(err.code == ERR_CORRUPT && err.msg[0]);
        if (shard_file_decode_leaf(file, i, leaf, payload, scratch, &err))
            CHECK(err.code == ERR_CORRUPT && err.msg[0]);
    }
    check_spelling(file);
    shard_file_close(file);
    return 0;
}
