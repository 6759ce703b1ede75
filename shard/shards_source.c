// See shards_source.h. A wanted source row may lie on one rank (rows cut), in slices on all (columns cut) or on several
// (replicated): whatever ranks hold part of it are read and joined, replicas over each other.
#include "shard/shards_source.h"

#include "formats/checked.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// The stored rows of one rank that a request touches.
struct slice {
    const struct shard_tensor *tensor;
    const struct shard_part *part;
    uint64_t part_begin; // stored row where the part begins
    uint64_t stored_begin, stored_end;
    uint64_t block_begin, block_end; // the whole blocks around them
    uint64_t data_bytes, scale_bytes;
};

// False when the rank holds nothing of the request's rows.
static bool slice_of(struct slice *out, const struct shards_source *source, const struct row_request *request,
                     uint32_t rank)
{
    const struct shard_tensor *tensor = &source->plan->ranks[rank].tensors[request->tensor];
    struct slice slice = {.tensor = tensor, .part = &tensor->parts[request->part]};
    const struct shard_part *part = slice.part;
    uint64_t begin = request->row_begin, end = request->row_begin + request->rows;
    if (begin < part->row_begin)
        begin = part->row_begin;
    if (end > part->row_begin + part->rows)
        end = part->row_begin + part->rows;
    if (begin >= end || part->cols == 0)
        return false;
    for (int p = 0; p < request->part; p++)
        slice.part_begin += tensor->parts[p].rows;
    slice.stored_begin = slice.part_begin + begin - part->row_begin;
    slice.stored_end = slice.part_begin + end - part->row_begin;
    slice.block_begin = slice.stored_begin / WEIGHT_ROW_UNIT;
    slice.block_end = div_up(slice.stored_end, WEIGHT_ROW_UNIT);
    slice.data_bytes = (slice.block_end - slice.block_begin) * pack_block_data_bytes(&tensor->shape);
    slice.scale_bytes = (slice.block_end - slice.block_begin) * pack_block_scale_bytes(&tensor->shape);
    *out = slice;
    return true;
}

// Vectors are stored unpadded, the parts one after the other.
static uint64_t vector_slice(const struct shards_source *source, const struct row_request *request, uint32_t rank,
                             const struct shard_part **part)
{
    const struct shard_tensor *tensor = &source->plan->ranks[rank].tensors[request->tensor];
    uint64_t begin = 0;
    for (int p = 0; p < request->part; p++)
        begin += tensor->parts[p].cols;
    *part = &tensor->parts[request->part];
    return tensor->data_offset + begin * sizeof(float);
}

static int read_vector(const struct shards_source *source, struct row_window *window, const struct row_request *request,
                       struct error *err)
{
    int rc = row_window_reserve(window, 0, request->source->source_cols, err);
    for (uint32_t rank = 0; !rc && rank < source->plan->num_ranks; rank++) {
        const struct shard_part *part;
        uint64_t offset = vector_slice(source, request, rank, &part);
        rc = payload_reader_read(source->ranks[rank].reader, window->values + part->col_begin,
                                 part->cols * sizeof(float), offset, err);
    }
    return rc;
}

static int source_read(const struct row_source *base, struct row_window *window, const struct row_request *request,
                       struct error *err)
{
    const struct shards_source *source = (const struct shards_source *)base;
    struct slice slice;
    uint64_t bytes = 0, at = 0;
    int rc;
    window->request = *request;
    if (request->kind == WEIGHT_F32)
        return read_vector(source, window, request, err);
    for (uint32_t rank = 0; rank < source->plan->num_ranks; rank++)
        if (slice_of(&slice, source, request, rank))
            bytes += slice.data_bytes + slice.scale_bytes;
    if ((rc = row_window_reserve(window, bytes, 0, err)))
        return rc;
    for (uint32_t rank = 0; rank < source->plan->num_ranks; rank++) {
        if (!slice_of(&slice, source, request, rank))
            continue;
        struct payload_reader *reader = source->ranks[rank].reader;
        uint64_t data = slice.tensor->data_offset + slice.block_begin * pack_block_data_bytes(&slice.tensor->shape);
        uint64_t scale = slice.tensor->scale_offset + slice.block_begin * pack_block_scale_bytes(&slice.tensor->shape);
        if ((rc = payload_reader_read(reader, window->raw + at, slice.data_bytes, data, err)) ||
            (rc = payload_reader_read(reader, window->raw + at + slice.data_bytes, slice.scale_bytes, scale, err)))
            return rc;
        at += slice.data_bytes + slice.scale_bytes;
    }
    return 0;
}

static int source_row(const struct row_source *base, struct row_window *window, uint64_t row, struct packed_row *out,
                      struct error *err)
{
    const struct shards_source *source = (const struct shards_source *)base;
    const struct row_request *request = &window->request;
    struct slice slice;
    uint64_t at = 0, cols = 0;
    if (request->kind == WEIGHT_F32) {
        for (uint64_t c = 0; c < request->source->source_cols; c++)
            out->f32[c] = window->values[c];
        return 0;
    }
    for (uint32_t rank = 0; rank < source->plan->num_ranks; rank++) {
        if (!slice_of(&slice, source, request, rank))
            continue;
        uint64_t stored = slice.part_begin + row - slice.part->row_begin;
        if (row >= slice.part->row_begin && stored >= slice.stored_begin && stored < slice.stored_end) {
            const uint8_t *data = window->raw + at;
            pack_load_row(out, slice.part->col_begin, data, data + slice.data_bytes, &slice.tensor->shape,
                          stored - slice.block_begin * WEIGHT_ROW_UNIT);
            cols += slice.part->cols;
        }
        at += slice.data_bytes + slice.scale_bytes;
    }
    if (cols < request->source->source_cols)
        return error_set(err, ERR_CORRUPT, "tensor %s, row %llu: the rank files hold only %llu of its %llu columns",
                         request->source->source, (unsigned long long)row, (unsigned long long)cols,
                         (unsigned long long)request->source->source_cols);
    return 0;
}

// The same on every rank.
static int source_computed(const struct row_source *base, uint64_t tensor, float *out, uint64_t values,
                           struct error *err)
{
    const struct shards_source *source = (const struct shards_source *)base;
    return payload_reader_read(source->ranks[0].reader, out, values * sizeof *out,
                               source->plan->ranks[0].tensors[tensor].data_offset, err);
}

static int open_rank(struct shards_source *source, const char *dir, uint32_t rank, struct error *err)
{
    char name[64], path[PATH_MAX];
    struct shards_source_rank *opened = &source->ranks[rank];
    int rc;
    manifest_rank_file_name(name, sizeof name, rank, source->plan->tp_size, source->plan->pp_size);
    snprintf(path, sizeof path, "%s/%s", dir, name);
    if (!(opened->path = strdup(path)))
        return error_set(err, ERR_MEMORY, "out of memory for a path");
    if ((rc = shard_file_open(&opened->file, path, err)) ||
        (rc = plan_compare(source->plan, rank, opened->file, path, err)))
        return rc;
    return payload_reader_open(&opened->reader, opened->file, opened->path, err);
}

int shards_source_init(struct shards_source *out, const char *dir, const struct plan *plan, struct error *err)
{
    int rc = 0;
    struct shards_source source = {.source = {source_read, source_computed, source_row, NULL, NULL}, .plan = plan};
    if (!(source.ranks = calloc(plan->num_ranks, sizeof *source.ranks)))
        return error_set(err, ERR_MEMORY, "out of memory for %u rank files", plan->num_ranks);
    for (uint32_t rank = 0; !rc && rank < plan->num_ranks; rank++)
        rc = open_rank(&source, dir, rank, err);
    if (rc)
        shards_source_clear(&source);
    else
        *out = source;
    return rc;
}

void shards_source_clear(struct shards_source *source)
{
    for (uint32_t rank = 0; source->ranks && rank < source->plan->num_ranks; rank++) {
        payload_reader_close(source->ranks[rank].reader);
        shard_file_close(source->ranks[rank].file);
        free(source->ranks[rank].path);
    }
    free(source->ranks);
    *source = (struct shards_source){0};
}
