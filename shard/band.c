// See band.h.
#include "shard/band.h"

#include "formats/checked.h"

#include <stdlib.h>
#include <string.h>

// Bytes of source that one read should fetch: enough for a disk, little enough for many threads.
enum { BAND_BYTES = 2 << 20 };

// ---- which bands -------------------------------------------------------------------------------------------------

static uint64_t rows_per_band(const struct shard_tensor *tensor)
{
    uint64_t row_bytes = tensor->num_parts ? 2 * tensor->parts[0].source_cols : 0;
    uint64_t rows = row_bytes ? BAND_BYTES / row_bytes / WEIGHT_ROW_UNIT * WEIGHT_ROW_UNIT : 0;
    return rows < WEIGHT_ROW_UNIT ? WEIGHT_ROW_UNIT : rows;
}

int band_list(struct band **out, uint64_t *count, const struct plan *plan, uint64_t tensor, struct error *err)
{
    bool one_rank_each = plan->splits[tensor] == SPLIT_OUT;
    uint64_t step = rows_per_band(&plan->ranks[0].tensors[tensor]);
    if (plan->quant.rotation > WEIGHT_ROW_UNIT) // rows that are rotated together are made together
        step = round_up(step, plan->quant.rotation);
    uint64_t capacity = 0, used = 0;
    for (uint32_t rank = 0; rank < plan->num_ranks; rank++)
        capacity += div_up(plan->ranks[rank].tensors[tensor].shape.rows_padded, step);
    struct band *bands = malloc((capacity + 1) * sizeof *bands);
    if (!bands)
        return error_set(err, ERR_MEMORY, "out of memory for a list of %llu bands", (unsigned long long)capacity);
    uint32_t first = 0, behind = plan->num_ranks;
    while (first < plan->num_ranks && !plan_rank_holds(plan, first, tensor))
        first++;
    while (behind > first && !plan_rank_holds(plan, behind - 1, tensor))
        behind--;
    for (uint32_t rank = first; rank < (one_rank_each ? behind : first + 1); rank++) {
        const struct weight_shape *shape = &plan->ranks[rank].tensors[tensor].shape;
        if (!plan_rank_holds(plan, rank, tensor)) // a stage between two that hold it
            continue;
        for (uint64_t row = 0; row < shape->rows_padded; row += step) {
            uint64_t end = row + step < shape->rows_padded ? row + step : shape->rows_padded;
            bands[used++] = (struct band){tensor, rank, one_rank_each ? rank + 1 : behind, row, end};
        }
    }
    *out = bands;
    *count = used;
    return 0;
}

struct band_place band_place(const struct plan *plan, const struct band *band, uint32_t rank)
{
    const struct shard_tensor *tensor = &plan->ranks[rank].tensors[band->tensor];
    uint64_t payload = plan->ranks[rank].payload_offset;
    if (tensor->shape.kind == WEIGHT_F32) // not padded, and one band
        return (struct band_place){payload + tensor->data_offset, tensor->shape.data_bytes, 0, 0};
    uint64_t first = band->row_begin / WEIGHT_ROW_UNIT;
    uint64_t blocks = band->row_end / WEIGHT_ROW_UNIT - first;
    uint64_t data_bytes = pack_block_data_bytes(&tensor->shape), scale_bytes = pack_block_scale_bytes(&tensor->shape);
    return (struct band_place){
        .data_offset = payload + tensor->data_offset + first * data_bytes,
        .data_bytes = blocks * data_bytes,
        .scale_offset = payload + tensor->scale_offset + first * scale_bytes,
        .scale_bytes = blocks * scale_bytes,
    };
}

// ---- building ----------------------------------------------------------------------------------------------------

void band_buffer_free(struct band_buffer *buffer)
{
    row_window_free(&buffer->window);
    free(buffer->row);
    free(buffer->bytes);
    *buffer = (struct band_buffer){0};
}

static int reserve(void **memory, uint64_t *capacity, uint64_t bytes, struct error *err)
{
    if (bytes <= *capacity)
        return 0;
    free(*memory);
    *capacity = 0;
    if (!(*memory = malloc(bytes)))
        return error_set(err, ERR_MEMORY, "out of memory for %llu bytes of weights", (unsigned long long)bytes);
    *capacity = bytes;
    return 0;
}

static uint64_t offset_of_rank(const struct plan *plan, const struct band *band, uint32_t rank)
{
    uint64_t offset = 0;
    for (uint32_t r = band->rank_begin; r < rank; r++) {
        struct band_place place = band_place(plan, band, r);
        offset += place.data_bytes + place.scale_bytes;
    }
    return offset;
}

uint8_t *band_bytes(const struct band_buffer *buffer, const struct plan *plan, const struct band *band, uint32_t rank)
{
    return buffer->bytes + offset_of_rank(plan, band, rank);
}

int band_reserve(struct band_buffer *buffer, const struct plan *plan, const struct band *band, struct error *err)
{
    uint64_t bytes = offset_of_rank(plan, band, band->rank_end);
    void *memory = buffer->bytes;
    int rc = reserve(&memory, &buffer->bytes_capacity, bytes + 1, err); // one more, so that it is never NULL
    buffer->bytes = memory;
    if (!rc)
        memset(buffer->bytes, 0, bytes);
    return rc;
}

// Places one source row in the layouts of all ranks of the band; stored_row is the same on each.
static void store_row(struct band_buffer *buffer, const struct plan *plan, const struct band *band, int part,
                      uint64_t stored_row, const struct packed_row *row)
{
    uint8_t *at = buffer->bytes;
    for (uint32_t rank = band->rank_begin; rank < band->rank_end; rank++) {
        const struct shard_tensor *tensor = &plan->ranks[rank].tensors[band->tensor];
        struct band_place place = band_place(plan, band, rank);
        pack_store_row(at, at + place.data_bytes, &tensor->shape, band->row_begin, stored_row, row,
                       tensor->parts[part].col_begin);
        at += place.data_bytes + place.scale_bytes;
    }
}

// The parts of a vector stand one after the other in its one row.
static void store_vector(struct band_buffer *buffer, const struct plan *plan, const struct band *band, int part,
                         const struct packed_row *row)
{
    uint8_t *at = buffer->bytes;
    for (uint32_t rank = band->rank_begin; rank < band->rank_end; rank++) {
        const struct shard_tensor *tensor = &plan->ranks[rank].tensors[band->tensor];
        const struct shard_part *slice = &tensor->parts[part];
        uint64_t before = 0;
        for (int p = 0; p < part; p++)
            before += tensor->parts[p].cols;
        if (slice->cols > 0)
            memcpy(at + before * sizeof(float), row->f32 + slice->col_begin, slice->cols * sizeof(float));
        at += tensor->shape.data_bytes;
    }
}

// Fetches the band's rows of one part and stores them. part_begin: stored row where the part begins.
static int build_part(struct band_buffer *buffer, const struct plan *plan, const struct band *band,
                      const struct row_source *source, int part, uint64_t part_begin, struct error *err)
{
    const struct shard_tensor *tensor = &plan->ranks[band->rank_begin].tensors[band->tensor];
    const struct shard_part *slice = &tensor->parts[part];
    const struct weight_shape *shape = &tensor->shape;
    uint64_t begin = band->row_begin > part_begin ? band->row_begin : part_begin;
    uint64_t end = band->row_end < part_begin + slice->rows ? band->row_end : part_begin + slice->rows;
    int rc;
    if (begin >= end)
        return 0;
    struct row_request request = {
        .tensor = band->tensor,
        .part = part,
        .source = slice,
        .kind = shape->kind,
        .group_size = shape->group_size,
        .scales = plan->quant.scales,
        .row_begin = slice->row_begin + begin - part_begin,
        .rows = end - begin,
    };
    uint64_t row_bytes = packed_row_bytes(shape->kind, shape->group_size, slice->source_cols);
    if ((rc = source->read(source, &buffer->window, &request, err)) ||
        (rc = reserve(&buffer->row, &buffer->row_capacity, row_bytes, err)))
        return rc;
    struct packed_row row;
    packed_row_place(&row, buffer->row, shape->kind, shape->group_size, slice->source_cols);
    for (uint64_t stored_row = begin; stored_row < end; stored_row++) {
        uint64_t source_row = slice->row_begin + stored_row - part_begin;
        if ((rc = source->row(source, &buffer->window, source_row, &row, err)))
            return rc;
        if (shape->kind == WEIGHT_F32)
            store_vector(buffer, plan, band, part, &row);
        else
            store_row(buffer, plan, band, part, stored_row, &row);
    }
    return 0;
}

static int build_computed(struct band_buffer *buffer, const struct plan *plan, const struct band *band,
                          const struct row_source *source, struct error *err)
{
    uint64_t values = plan->ranks[band->rank_begin].tensors[band->tensor].shape.cols;
    int rc = source->computed(source, band->tensor, (float *)(void *)buffer->bytes, values, err);
    for (uint32_t rank = band->rank_begin + 1; !rc && rank < band->rank_end; rank++)
        memcpy(band_bytes(buffer, plan, band, rank), buffer->bytes, values * sizeof(float));
    return rc;
}

int band_build(struct band_buffer *buffer, const struct plan *plan, const struct band *band,
               const struct row_source *source, struct error *err)
{
    const struct shard_tensor *tensor = &plan->ranks[band->rank_begin].tensors[band->tensor];
    uint64_t part_begin = 0;
    int rc = band_reserve(buffer, plan, band, err);
    if (rc)
        return rc;
    if (tensor->num_parts == 0)
        return build_computed(buffer, plan, band, source, err);
    for (int part = 0; part < tensor->num_parts; part++) {
        if ((rc = build_part(buffer, plan, band, source, part, part_begin, err)))
            return rc;
        if (tensor->shape.kind != WEIGHT_F32)
            part_begin += tensor->parts[part].rows;
    }
    return 0;
}

const char *band_row_source(const struct shard_tensor *tensor, uint64_t stored_row, uint64_t *source_row)
{
    uint64_t begin = 0;
    for (int part = 0; part < tensor->num_parts; part++) {
        const struct shard_part *slice = &tensor->parts[part];
        if (stored_row >= begin && stored_row < begin + slice->rows) {
            *source_row = slice->row_begin + stored_row - begin;
            return slice->source;
        }
        begin += tensor->shape.kind == WEIGHT_F32 ? 0 : slice->rows;
    }
    return NULL;
}
