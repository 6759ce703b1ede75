// Weights derived again from the checkpoint, band by band. See repair_source.h.
#include "shard/repair_source.h"

#include "shard/band.h"
#include "shard/extras.h"
#include "shard/origin.h"

#include <stdlib.h>
#include <string.h>

struct from_checkpoint {
    struct repair_source source; // must be first
    struct origin origin;
    struct extras extras; // once asked for
    bool has_extras;
    int threads;
    struct band_buffer buffers[]; // [threads]
};

static int contents(struct repair_source *base, uint32_t rank, struct rank_share *share,
                    const struct shard_tensor **tensors, uint64_t *count, struct error *err)
{
    const struct from_checkpoint *from = (const struct from_checkpoint *)base;
    (void)err;
    *share = from->origin.plan->ranks[rank].share;
    *tensors = from->origin.plan->ranks[rank].tensors;
    *count = from->origin.plan->tensor_count;
    return 0;
}

// ---- payload -----------------------------------------------------------------------------------------------------

// Payload bytes that are wanted, and where they go.
struct window {
    uint64_t begin, end;
    uint8_t *out;
};

static bool touches(const struct window *window, uint64_t offset, uint64_t bytes)
{
    return bytes > 0 && offset < window->end && offset + bytes > window->begin;
}

// What of bytes [offset, offset + bytes) of the payload lies in the window.
static void copy_overlap(const struct window *window, const uint8_t *from, uint64_t offset, uint64_t bytes)
{
    if (!touches(window, offset, bytes))
        return;
    uint64_t begin = offset > window->begin ? offset : window->begin;
    uint64_t end = offset + bytes < window->end ? offset + bytes : window->end;
    memcpy(window->out + (begin - window->begin), from + (begin - offset), end - begin);
}

// Builds a band for this rank alone, if it lies in the window.
static int take_band(struct from_checkpoint *from, int thread, uint32_t rank, struct band band,
                     const struct window *window, struct error *err)
{
    const struct plan *plan = from->origin.plan;
    struct band_buffer *buffer = &from->buffers[thread];
    struct band_place place = band_place(plan, &band, rank);
    uint64_t payload = plan->ranks[rank].payload_offset;
    if (!touches(window, place.data_offset - payload, place.data_bytes) &&
        !touches(window, place.scale_offset - payload, place.scale_bytes))
        return 0;
    band.rank_begin = rank;
    band.rank_end = rank + 1;
    int rc = band_build(buffer, plan, &band, from->origin.source, err);
    if (rc)
        return rc;
    const uint8_t *built = band_bytes(buffer, plan, &band, rank);
    copy_overlap(window, built, place.data_offset - payload, place.data_bytes);
    copy_overlap(window, built + place.data_bytes, place.scale_offset - payload, place.scale_bytes);
    return 0;
}

static int payload(struct repair_source *base, int thread, uint32_t rank, uint64_t begin, uint64_t end, uint8_t *out,
                   struct error *err)
{
    struct from_checkpoint *from = (struct from_checkpoint *)base;
    const struct plan *plan = from->origin.plan;
    const struct window window = {begin, end, out};
    int rc = 0;
    memset(out, 0, end - begin);
    for (uint64_t i = 0; !rc && i < plan->tensor_count; i++) {
        const struct shard_tensor *tensor = &plan->ranks[rank].tensors[i];
        struct band *bands;
        uint64_t count;
        if (!touches(&window, tensor->data_offset, tensor->shape.data_bytes) &&
            !touches(&window, tensor->scale_offset, tensor->shape.scale_bytes))
            continue;
        if ((rc = band_list(&bands, &count, plan, i, err)))
            return rc;
        for (uint64_t b = 0; !rc && b < count; b++)
            if (bands[b].rank_begin <= rank && rank < bands[b].rank_end)
                rc = take_band(from, thread, rank, bands[b], &window, err);
        free(bands);
    }
    return rc;
}

// ---- extras ------------------------------------------------------------------------------------------------------

static int extra(struct repair_source *base, const char *name, uint8_t **bytes, uint64_t *num_bytes, struct error *err)
{
    struct from_checkpoint *from = (struct from_checkpoint *)base;
    bool has_tokenizer;
    int rc;
    if (!from->has_extras &&
        (rc = extras_from_model(&from->extras, &has_tokenizer, base->path, from->origin.plan->model.vocab_size, err)))
        return rc;
    from->has_extras = true;
    for (size_t i = 0; i < from->extras.count; i++) {
        const struct extra *file = &from->extras.files[i];
        if (strcmp(file->name, name) != 0)
            continue;
        if (!(*bytes = malloc(file->num_bytes + 1)))
            return error_set(err, ERR_MEMORY, "%s: out of memory", name);
        memcpy(*bytes, file->bytes, file->num_bytes);
        *num_bytes = file->num_bytes;
        return 0;
    }
    return error_set(err, ERR_CORRUPT, "%s: %s holds nothing to make it from", name, base->path);
}

// ---- opening -----------------------------------------------------------------------------------------------------

static void close_source(struct repair_source *base)
{
    struct from_checkpoint *from = (struct from_checkpoint *)base;
    for (int thread = 0; thread < from->threads; thread++)
        band_buffer_free(&from->buffers[thread]);
    extras_clear(&from->extras);
    origin_close(&from->origin);
    free(from);
}

int repair_from_checkpoint(struct repair_source **out, const char *path, const struct shard_dir *dir, int threads,
                           struct error *err)
{
    struct from_checkpoint *from = calloc(1, sizeof *from + (size_t)threads * sizeof from->buffers[0]);
    if (!from)
        return error_set(err, ERR_MEMORY, "out of memory for %d threads", threads);
    from->source = (struct repair_source){
        .contents = contents, .payload = payload, .extra = extra, .close = close_source, .path = path};
    from->threads = threads;
    int rc = origin_open(&from->origin, path, dir, NULL, err);
    if (rc)
        close_source(&from->source);
    else
        *out = &from->source;
    return rc;
}
