// See capture.h.
//
// The residual of a window between two layers is what the backend keeps of it: the residual itself and the last block's sum, which the next
// layer adds. Two halves of the file take turns, so that a layer reads one and writes the other: what the last finished layer left is
// whole at any moment.
#include "engine/capture.h"

#include "formats/file_io.h"
#include "kernels/cpu_device.h"
#include "kernels/gptq.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

// Of the residuals' file: the statistics' header, to tell whose they are, and the layer that they stand in front of.
struct residuals_head {
    struct calibration_header header;
    uint64_t layer;
};
enum { HEAD_BYTES = 4096 }; // a page

// What is being summed of one input.
struct sum {
    uint64_t rows, cols;
    float *diagonal, *triangle; // of experts: the diagonal alone
};

struct capture {
    struct decoder *decoder;
    const struct capture_text *text;
    const struct calibration_header *header;
    struct calibration_writer *writer;
    struct decoder_watch watch;
    bool watching; // false: a layer that was finished before is run for its residuals alone
    struct sum sums[CALIBRATION_INPUT_COUNT];
    struct sum *experts; // [num_experts]
    float *panels;
    uint64_t panel_elems;
    // The residuals' file.
    int fd;
    char path[PATH_MAX];
    uint8_t *map;
    uint64_t map_bytes;
    // One window.
    struct token_row *rows;
    int32_t *page_table;
    struct kv_pages pages;
};

// ---- sums ----------------------------------------------------------------------------------------------------------

static void free_sum(struct sum *sum)
{
    free(sum->diagonal);
    free(sum->triangle);
    *sum = (struct sum){0};
}

static int reserve_sum(struct sum *sum, uint64_t cols, bool triangle, struct error *err)
{
    uint64_t elems = triangle ? calibration_triangle_elems(cols) : 0;
    if (sum->cols == cols)
        return 0;
    free_sum(sum); // of a layer of another size
    sum->cols = cols;
    sum->diagonal = calloc(cols, sizeof *sum->diagonal);
    sum->triangle = triangle ? calloc(elems, sizeof *sum->triangle) : NULL;
    if (sum->diagonal && (sum->triangle || !triangle))
        return 0;
    return error_set(err, ERR_MEMORY, "no memory for the second moments of %llu columns (%.2f GiB)",
                     (unsigned long long)cols, (double)(elems + cols) * sizeof(float) / 0x1p30);
}

static int reserve_panels(struct capture *c, uint64_t rows, uint64_t cols, struct error *err)
{
    uint64_t elems = moments_panel_elems(rows, cols);
    if (elems <= c->panel_elems)
        return 0;
    free(c->panels);
    c->panel_elems = 0;
    if (!(c->panels = malloc(elems * sizeof *c->panels)))
        return error_set(err, ERR_MEMORY, "no memory for a window's rows of %llu columns", (unsigned long long)cols);
    c->panel_elems = elems;
    return 0;
}

static int add_rows(struct capture *c, struct sum *sum, struct cpu_rows in, uint64_t cols, struct error *err)
{
    int rc;
    if ((rc = reserve_sum(sum, cols, true, err)) || (rc = reserve_panels(c, (uint64_t)in.count, cols, err)))
        return rc;
    moments_add(sum->triangle, cols, in.x, in.stride, (uint64_t)in.count, c->panels, c->decoder->pool);
    sum->rows += (uint64_t)in.count;
    return 0;
}

static int add_experts(struct capture *c, const struct layer *layer, struct error *err)
{
    for (int64_t e = 0; e < c->decoder->model->share.num_experts_local; e++) {
        struct sum *sum = &c->experts[e];
        uint64_t cols = layer->experts[e].down.shape.cols;
        struct cpu_rows in = cpu_expert_input(c->decoder->device, e);
        int rc = reserve_sum(sum, cols, false, err);
        if (rc)
            return rc;
        for (int64_t row = 0; row < in.count; row++)
            for (uint64_t i = 0; i < cols; i++)
                sum->diagonal[i] += in.x[row * in.stride + (int64_t)i] * in.x[row * in.stride + (int64_t)i];
        sum->rows += (uint64_t)in.count;
    }
    return 0;
}

static uint64_t input_cols(const struct decoder *d, enum calibration_input input, int64_t layer_index)
{
    const struct model_desc *desc = &d->model->desc;
    const struct layer *layer = &d->model->weights.layers[layer_index < 0 ? 0 : layer_index];
    switch (input) {
    case CALIBRATION_Q_LATENT:
        return (uint64_t)desc->latent.q_rank;
    case CALIBRATION_O:
        return layer->o.shape.cols;
    case CALIBRATION_DOWN:
        return layer->mlp.down.shape.cols;
    default:
        return (uint64_t)desc->hidden_size;
    }
}

static int see_input(void *arg, struct decoder *d, enum calibration_input input, int64_t layer, struct error *err)
{
    struct capture *c = arg;
    if (!c->watching)
        return 0;
    if (input == CALIBRATION_EXPERT_DOWN)
        return add_experts(c, &d->model->weights.layers[layer], err);
    return add_rows(c, &c->sums[input], cpu_input(d->device), input_cols(d, input, layer), err);
}

static int write_sum(struct capture *c, struct sum *sum, enum calibration_input input, int32_t layer, int32_t expert,
                     struct error *err)
{
    for (uint64_t i = 0; i < sum->cols && sum->triangle; i++)
        sum->diagonal[i] = sum->triangle[calibration_triangle_elems(i + 1) - 1];
    const struct calibration_moments moments = {input,     layer,         expert,       sum->rows,
                                                sum->cols, sum->diagonal, sum->triangle};
    int rc = sum->cols ? calibration_writer_add(c->writer, &moments, err) : 0;
    if (sum->cols) { // for the next layer
        memset(sum->diagonal, 0, sum->cols * sizeof *sum->diagonal);
        if (sum->triangle)
            memset(sum->triangle, 0, calibration_triangle_elems(sum->cols) * sizeof *sum->triangle);
    }
    sum->rows = 0;
    return rc;
}

// Those of no layer come at the end; an input that this layer does not have was not summed.
static int write_sums(struct capture *c, int32_t layer, struct error *err)
{
    int rc = 0;
    int64_t experts = layer >= 0 ? c->decoder->model->desc.experts.num_experts : 0;
    for (int input = 0; input < CALIBRATION_INPUT_COUNT && !rc; input++)
        if (c->sums[input].rows > 0)
            rc = write_sum(c, &c->sums[input], (enum calibration_input)input, layer, -1, err);
    if (layer >= 0 && !(c->decoder->model->desc.layer_flags[layer] & LAYER_EXPERTS))
        return rc;
    for (int64_t e = 0; e < experts && !rc; e++)
        rc = write_sum(c, &c->experts[e], CALIBRATION_EXPERT_DOWN, layer, (int32_t)e, err);
    return rc;
}

// ---- residuals -----------------------------------------------------------------------------------------------------

static uint64_t half_bytes(const struct capture *c)
{
    return (uint64_t)c->text->count * 2 * (uint64_t)c->decoder->model->desc.hidden_size * sizeof(float);
}

// Where a window's residuals in front of a layer are kept: [rows][hidden], and as many of the last block's sum behind them.
static float *residuals(const struct capture *c, int64_t layer, int64_t first_token)
{
    uint64_t at = HEAD_BYTES + (layer % 2 ? half_bytes(c) : 0);
    return (float *)(void *)(c->map + at) + first_token * 2 * c->decoder->model->desc.hidden_size;
}

static int move_residuals(struct capture *c, float *kept, int64_t count, bool back, struct error *err)
{
    static const enum buffer buffers[] = {BUFFER_RESIDUAL, BUFFER_PARTIAL};
    const struct backend *b = c->decoder->backend;
    size_t elems = (size_t)(count * c->decoder->model->desc.hidden_size);
    int rc = 0;
    for (int i = 0; i < 2 && !rc; i++, kept += elems) {
        float *rows = NULL;
        if ((rc = b->lend(c->decoder->device, buffers[i], back, &rows, err)))
            return rc;
        memcpy(back ? rows : kept, back ? kept : rows, elems * sizeof *rows);
        rc = b->returned(c->decoder->device, buffers[i], err);
    }
    return rc;
}

// *layer: the one in front of which the file holds what an earlier run left; -1: it holds nothing.
static int open_residuals(struct capture *c, const char *path, int64_t *layer, struct error *err)
{
    struct residuals_head found, begun = {*c->header, UINT64_MAX};
    struct stat status;
    int rc;
    snprintf(c->path, sizeof c->path, "%.*s" CALIBRATION_RESIDUALS,
             (int)(sizeof c->path - sizeof CALIBRATION_RESIDUALS), path);
    c->map_bytes = HEAD_BYTES + 2 * half_bytes(c);
    c->fd = open(c->path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOCTTY | O_NONBLOCK, 0666);
    if (c->fd < 0 || fstat(c->fd, &status))
        return error_set_errno(err, "%s: cannot open", c->path);
    if (!S_ISREG(status.st_mode))
        return error_set(err, ERR_USAGE, "%s: is no regular file", c->path);
    bool valid = (uint64_t)status.st_size == c->map_bytes;
    if (valid && (rc = file_pread_full(c->fd, &found, sizeof found, 0, c->path, err)))
        return rc;
    valid = valid && memcmp(&found.header, c->header, sizeof found.header) == 0 &&
            found.layer <= (uint64_t)c->decoder->model->desc.num_layers;
    *layer = valid ? (int64_t)found.layer : -1;
    if (!valid && ftruncate(c->fd, 0))
        return error_set_errno(err, "%s: cannot be emptied", c->path);
    if (!valid && ((rc = file_take_space(c->fd, c->map_bytes, c->path, err)) ||
                   (rc = file_pwrite_full(c->fd, &begun, sizeof begun, 0, c->path, err))))
        return rc;
    void *map = mmap(NULL, c->map_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, c->fd, 0);
    if (map == MAP_FAILED)
        return error_set_errno(err, "%s: cannot be mapped", c->path);
    c->map = map;
    return 0;
}

// What stands in front of `layer` is whole: it is on the disk before the file says so.
static int keep_residuals(struct capture *c, int64_t layer, struct error *err)
{
    uint8_t *half = (uint8_t *)residuals(c, layer, 0),
            *page = c->map + (uint64_t)(half - c->map) / HEAD_BYTES * HEAD_BYTES;
    if (msync(page, half_bytes(c) + (uint64_t)(half - page), MS_SYNC))
        return error_set_errno(err, "%s: writing", c->path);
    ((struct residuals_head *)(void *)c->map)->layer = (uint64_t)layer;
    return msync(c->map, HEAD_BYTES, MS_SYNC) ? error_set_errno(err, "%s: writing", c->path) : 0;
}

// ---- windows -------------------------------------------------------------------------------------------------------

static int64_t window_rows(struct capture *c, int64_t first)
{
    int64_t left = c->text->count - first, count = left < c->text->window_tokens ? left : c->text->window_tokens;
    for (int64_t i = 0; i < count; i++)
        c->rows[i] = (struct token_row){.token = c->text->tokens[first + i], .position = i};
    return count;
}

// All windows in front of the first layer.
static int embed_all(struct capture *c, struct error *err)
{
    int rc = 0;
    for (int64_t first = 0, count; first < c->text->count && !rc; first += count) {
        count = window_rows(c, first);
        if (!(rc = decoder_embed(c->decoder, c->rows, count, PHASE_PREFILL, &c->pages, err)))
            rc = move_residuals(c, residuals(c, 0, first), count, false, err);
    }
    return rc;
}

// All windows through a layer, or behind the last one to what the head multiplies.
static int run_layer(struct capture *c, int64_t layer, struct error *err)
{
    struct decoder *d = c->decoder;
    bool head = layer == d->model->desc.num_layers;
    int rc = 0;
    for (int64_t first = 0, count; first < c->text->count && !rc; first += count) {
        count = window_rows(c, first);
        if ((rc = decoder_begin(d, c->rows, count, PHASE_PREFILL, &c->pages, err)) ||
            (rc = move_residuals(c, residuals(c, layer, first), count, true, err)) ||
            (rc = head ? decoder_head_input(d, err) : decoder_layer(d, layer, err)))
            return rc;
        if (!head)
            rc = move_residuals(c, residuals(c, layer + 1, first), count, false, err);
    }
    return rc;
}

// kept: the layer in front of which residuals are there, or -1. Both halves of the file are whole when the statistics lag one layer behind them.
static int run_all(struct capture *c, int64_t layers_done, int64_t kept, capture_progress_fn *progress, void *arg,
                   struct error *err)
{
    int64_t layers = c->decoder->model->desc.num_layers, first = kept < layers_done ? kept : layers_done;
    int rc = 0;
    if (first < 0) {
        first = 0;
        rc = embed_all(c, err);
    }
    for (int64_t layer = first; layer < layers && !rc; layer++) {
        c->watching = layer >= layers_done;
        if ((rc = run_layer(c, layer, err)) || (rc = keep_residuals(c, layer + 1, err)))
            return rc;
        if (c->watching &&
            ((rc = write_sums(c, (int32_t)layer, err)) || (rc = calibration_writer_end_layer(c->writer, err))))
            return rc;
        progress(arg, layer);
    }
    c->watching = true;
    if (rc || (rc = run_layer(c, layers, err)) || (rc = write_sums(c, -1, err)) ||
        (rc = calibration_writer_finish(c->writer, err)))
        return rc;
    progress(arg, -1);
    return 0;
}

// ---- the whole -----------------------------------------------------------------------------------------------------

static int prepare(struct capture *c, struct error *err)
{
    const struct model_desc *desc = &c->decoder->model->desc;
    int64_t pages = (c->text->window_tokens + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS;
    c->rows = calloc((size_t)c->text->window_tokens, sizeof *c->rows);
    c->page_table = calloc((size_t)pages, sizeof *c->page_table);
    c->experts = calloc((size_t)desc->experts.num_experts + 1, sizeof *c->experts);
    if (!c->rows || !c->page_table || !c->experts)
        return error_set(err, ERR_MEMORY, "no memory for windows of %lld tokens", (long long)c->text->window_tokens);
    for (int64_t i = 0; i < pages; i++)
        c->page_table[i] = (int32_t)i;
    c->pages = (struct kv_pages){.pages = c->page_table, .pages_per_sequence = pages, .version = 1};
    c->watch = (struct decoder_watch){see_input, c};
    c->decoder->watch = &c->watch;
    for (int64_t i = 0; i < desc->num_layers; i++)
        if (c->decoder->model->weights.layers[i].qkv_order || c->decoder->model->weights.layers[i].gate_up_order)
            return error_set(
                err, ERR_USAGE,
                "layer %lld multiplies columns in another order than the model's: capture from a directory "
                "that was made with --quant none",
                (long long)i);
    return 0;
}

static void release(struct capture *c, bool done)
{
    c->decoder->watch = NULL;
    for (int i = 0; i < CALIBRATION_INPUT_COUNT; i++)
        free_sum(&c->sums[i]);
    for (int64_t e = 0; c->experts && e < c->decoder->model->desc.experts.num_experts; e++)
        free_sum(&c->experts[e]);
    if (c->map)
        munmap(c->map, c->map_bytes);
    if (c->fd >= 0)
        close(c->fd);
    if (done)
        unlink(c->path);
    free(c->experts);
    free(c->panels);
    free(c->rows);
    free(c->page_table);
    calibration_writer_close(c->writer);
}

int capture_write(struct decoder *decoder, const struct capture_text *text, const char *path,
                  const struct calibration_header *header, capture_progress_fn *progress, void *arg, struct error *err)
{
    struct capture c = {.decoder = decoder, .text = text, .header = header, .fd = -1};
    uint32_t layers_done = 0;
    int64_t kept = -1;
    bool finished = false;
    int rc;
    if ((rc = prepare(&c, err)) ||
        (rc = calibration_writer_open(&c.writer, path, header, &layers_done, &finished, err)) || finished)
        goto done;
    if ((rc = open_residuals(&c, path, &kept, err)))
        goto done;
    rc = run_all(&c, layers_done, kept, progress, arg, err);
    finished = rc == 0;
done:
    release(&c, finished && c.path[0]);
    return rc;
}

void capture_bytes(const struct model_desc *desc, uint64_t *memory_bytes, uint64_t *file_bytes)
{
    uint64_t hidden = (uint64_t)desc->hidden_size, latent = (uint64_t)desc->latent.q_rank;
    uint64_t attended = (uint64_t)(desc->num_heads * (desc->latent.kv_rank ? desc->latent.v_dim : desc->head_dim));
    uint64_t plain = (uint64_t)desc->intermediate_size, shared = (uint64_t)desc->experts.shared_size;
    uint64_t common = 2 * calibration_triangle_elems(hidden) + calibration_triangle_elems(attended) +
                      calibration_triangle_elems(latent);
    *memory_bytes = 0;
    *file_bytes = sizeof(float) * calibration_triangle_elems(hidden); // of the head
    for (int64_t i = 0; i < desc->num_layers; i++) {
        bool experts = desc->layer_flags[i] & LAYER_EXPERTS;
        uint64_t elems = common + calibration_triangle_elems(experts ? shared : plain);
        elems += experts ? (uint64_t)(desc->experts.num_experts * desc->experts.expert_size) : 0;
        *memory_bytes = sizeof(float) * elems > *memory_bytes ? sizeof(float) * elems : *memory_bytes;
        *file_bytes += sizeof(float) * elems;
    }
}
