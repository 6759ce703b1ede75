// See calibrate.h.
#include "shard/calibrate.h"

#include "kernels/host_memory.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// An expert that fewer tokens chose is quantized as if all columns counted the same; a text must have as many.
enum { LEAST_ROWS = 16 };

// ---- which statistics ----------------------------------------------------------------------------------------------

// Of the input that a tensor multiplies; NULL: it is not one that statistics decide about, or there are none.
static const struct calibration_moments *moments_of(const struct calibration_file *file, const struct plan *plan,
                                                    const struct shard_tensor *tensor, bool *has_triangle)
{
    enum calibration_input input;
    if (!calibration_input_of(&input, tensor->role, &plan->model))
        return NULL;
    return calibration_file_find(file, input, input == CALIBRATION_HEAD ? -1 : tensor->layer,
                                 input == CALIBRATION_EXPERT_DOWN ? tensor->expert : -1, has_triangle);
}

static bool is_decided(const struct plan *plan, const struct shard_tensor *tensor)
{
    enum calibration_input input;
    return gptq_has(tensor->shape.kind) && calibration_input_of(&input, tensor->role, &plan->model);
}

uint64_t calibrate_weights(const struct plan *plan)
{
    uint64_t count = 0;
    for (uint64_t i = 0; i < plan->tensor_count; i++) {
        const struct shard_tensor *tensor = &plan->ranks[0].tensors[i];
        bool twice[SHARD_MAX_PARTS] = {false}; // parts of one source, of which each is a half
        for (int p = 0; p < tensor->num_parts && is_decided(plan, tensor); p++) {
            for (int q = 0; q < p; q++)
                twice[p] |= tensor->parts[p].source == tensor->parts[q].source;
            count += twice[p] ? 0 : tensor->parts[p].source_rows * tensor->parts[p].source_cols;
        }
    }
    return count;
}

static int check_tensor(const struct calibration_file *file, const struct plan *plan, const struct shard_tensor *tensor,
                        struct error *err)
{
    char label[96];
    if (!is_decided(plan, tensor))
        return 0;
    const struct calibration_moments *moments = moments_of(file, plan, tensor, NULL);
    plan_tensor_label(label, sizeof label, tensor);
    if (!moments)
        return error_set(err, ERR_MODEL, "the calibration statistics hold nothing about %s: they are of another model",
                         label);
    if (moments->cols != tensor->parts[0].source_cols)
        return error_set(err, ERR_MODEL,
                         "the calibration statistics of %s are of %llu columns and it has %llu: they are of another "
                         "model",
                         label, (unsigned long long)moments->cols, (unsigned long long)tensor->parts[0].source_cols);
    if (moments->rows < LEAST_ROWS && moments->input != CALIBRATION_EXPERT_DOWN)
        return error_set(err, ERR_USAGE,
                         "the calibration statistics of %s are of %llu tokens, and at least %d are needed: capture "
                         "them from a longer text",
                         label, (unsigned long long)moments->rows, LEAST_ROWS);
    return 0;
}

int calibrate_check_model(const struct calibration_file *file, const struct manifest *manifest, bool with_weights,
                          const char *path, struct error *err)
{
    struct checksum128 key;
    const struct calibration_header *header = calibration_file_header(file);
    const uint8_t *found = with_weights ? header->weights : header->model;
    int rc = with_weights ? calibration_weights_key(manifest, &key, err) : calibration_model_key(manifest, &key, err);
    if (rc || checksum128_equal(key, checksum128_from_bytes(found)))
        return rc;
    return error_set(err, ERR_MODEL,
                     "%s: these statistics were captured from another model, another version of its files, or with "
                     "--rot said in the one and not in the other; capture them again",
                     path);
}

// ---- one tensor ----------------------------------------------------------------------------------------------------

static int make_factor(const struct calibrate_source *source, const struct calibration_moments *moments,
                       struct thread_pool *pool, struct error *err)
{
    struct calibrate_state *state = source->state;
    if (state->factored == moments)
        return 0;
    gptq_factor_free(&state->factor);
    state->factored = NULL;
    float *triangle = malloc(calibration_triangle_elems(moments->cols) * sizeof *triangle);
    if (!triangle)
        return error_set(err, ERR_MEMORY, "out of memory for the statistics of %llu columns",
                         (unsigned long long)moments->cols);
    int rc = calibration_file_triangle(source->file, moments, triangle, err);
    if (!rc && (rc = gptq_factor_make(&state->factor, triangle, moments->cols, pool, err)) == 0)
        state->factored = moments;
    free(triangle);
    return rc;
}

static bool is_zero(const struct calibration_moments *moments)
{
    for (uint64_t i = 0; i < moments->cols; i++)
        if (moments->diagonal[i] > 0)
            return false;
    return true;
}

// The same factor serves what multiplies the same input, in the order of the file: experts of a layer.
static int source_begin(const struct row_source *base, uint64_t tensor, struct thread_pool *pool, struct error *err)
{
    const struct calibrate_source *source = (const struct calibrate_source *)base;
    const struct shard_tensor *stored = &source->plan->ranks[0].tensors[tensor];
    struct calibrate_state *state = source->state;
    bool has_triangle = false;
    int rc = source->base->begin ? source->base->begin(source->base, tensor, pool, err) : 0;
    state->moments =
        is_decided(source->plan, stored) ? moments_of(source->file, source->plan, stored, &has_triangle) : NULL;
    if (state->moments && (state->moments->rows < LEAST_ROWS || is_zero(state->moments)))
        state->moments = NULL;
    if (rc || !state->moments)
        return rc;
    state->weight = state->moments->diagonal;
    if (source->method != CALIBRATION_GPTQ || !has_triangle)
        return 0;
    struct error cause;
    if ((rc = make_factor(source, state->moments, pool, &cause))) {
        char label[96];
        plan_tensor_label(label, sizeof label, stored);
        return error_set(err, rc, "%s: %s", label, cause.msg);
    }
    state->weight = state->factor.pivots;
    return 0;
}

static bool by_gptq(const struct calibrate_source *source)
{
    return source->state->moments && source->state->factored == source->state->moments;
}

// ---- rows ----------------------------------------------------------------------------------------------------------

// What a window keeps: rows that were quantized together.
struct own_window {
    struct row_window base;
    uint64_t begin, count;
    uint64_t row_bytes;         // of a packed row
    float *values, *scratch;    // [GPTQ_ROWS][columns]
    uint8_t *packed;            // [GPTQ_ROWS][row_bytes]
    float scales[GPTQ_ROWS];    // of whole rows
    uint64_t cols, packed_room; // what there is room for
};

static void free_own(void *memory)
{
    struct own_window *own = memory;
    row_window_free(&own->base);
    free(own->values);
    free(own->scratch);
    free(own->packed);
    free(own);
}

static int reserve(struct own_window *own, const struct row_request *request, struct error *err)
{
    uint64_t cols = request->source->source_cols;
    own->row_bytes = packed_row_bytes(request->kind, request->group_size, cols);
    if (cols > own->cols) {
        free(own->values);
        free(own->scratch);
        own->values = malloc(GPTQ_ROWS * cols * sizeof *own->values);
        own->scratch = malloc(gptq_scratch_elems(cols) * sizeof *own->scratch);
        own->cols = own->values && own->scratch ? cols : 0;
    }
    if (GPTQ_ROWS * own->row_bytes > own->packed_room) {
        free(own->packed);
        own->packed = malloc(GPTQ_ROWS * own->row_bytes);
        own->packed_room = own->packed ? GPTQ_ROWS * own->row_bytes : 0;
    }
    if (own->cols >= cols && own->packed_room >= GPTQ_ROWS * own->row_bytes)
        return 0;
    return error_set(err, ERR_MEMORY, "out of memory for rows of %llu columns", (unsigned long long)cols);
}

static int source_read(const struct row_source *base, struct row_window *window, const struct row_request *request,
                       struct error *err)
{
    const struct calibrate_source *source = (const struct calibrate_source *)base;
    if (!window->own) {
        if (!(window->own = calloc(1, sizeof(struct own_window))))
            return error_set(err, ERR_MEMORY, "out of memory for rows");
        window->free_own = free_own;
    }
    struct own_window *own = window->own;
    window->request = *request;
    own->count = 0;
    int rc = source->state->moments ? reserve(own, request, err) : 0;
    return rc ? rc : source->base->read(source->base, &own->base, request, err);
}

// Scales by the weighted search, and codes with them.
static int search_row(const struct calibrate_source *source, const struct row_request *request, uint64_t row,
                      const float *values, struct packed_row *out, struct error *err)
{
    struct error cause;
    int rc = pack_quantize_row(out, request->kind, request->group_size, values, request->source->source_cols,
                               source->state->weight, &cause);
    return rc ? error_set(err, rc, "tensor %s, row %llu: %s", request->source->source, (unsigned long long)row,
                          cause.msg)
              : 0;
}

// Quantizes the rows from `row` on, as many as go together and were asked for.
static int fill(const struct calibrate_source *source, struct row_window *window, uint64_t row, struct error *err)
{
    struct own_window *own = window->own;
    const struct row_request *request = &window->request;
    struct packed_row packed[GPTQ_ROWS];
    uint64_t cols = request->source->source_cols, left = request->row_begin + request->rows - row;
    uint64_t count = left < GPTQ_ROWS ? left : GPTQ_ROWS;
    int rc = 0;
    own->count = 0;
    for (uint64_t r = 0; r < count && !rc; r++) {
        float *values = own->values + r * cols;
        packed_row_place(&packed[r], own->packed + r * own->row_bytes, request->kind, request->group_size, cols);
        if (!(rc = source->base->values(source->base, &own->base, row + r, values, err)))
            rc = search_row(source, request, row + r, values, &packed[r], err);
    }
    if (rc)
        return rc;
    gptq_quantize(packed, count, request->kind, request->group_size, own->values, &source->state->factor, own->scratch);
    for (uint64_t r = 0; r < count; r++)
        own->scales[r] = packed[r].scale;
    own->begin = row;
    own->count = count;
    return 0;
}

static int source_row(const struct row_source *base, struct row_window *window, uint64_t row, struct packed_row *out,
                      struct error *err)
{
    const struct calibrate_source *source = (const struct calibrate_source *)base;
    struct own_window *own = window->own;
    int rc;
    if (!source->state->moments)
        return source->base->row(source->base, &own->base, row, out, err);
    if (!by_gptq(source)) {
        rc = source->base->values(source->base, &own->base, row, own->values, err);
        return rc ? rc : search_row(source, &window->request, row, own->values, out, err);
    }
    if ((row < own->begin || row - own->begin >= own->count) && (rc = fill(source, window, row, err)))
        return rc;
    memcpy(out->group_scales, own->packed + (row - own->begin) * own->row_bytes,
           own->row_bytes); // a row lies in one piece
    out->scale = own->scales[row - own->begin];
    return 0;
}

static int source_values(const struct row_source *base, struct row_window *window, uint64_t row, float *out,
                         struct error *err)
{
    const struct calibrate_source *source = (const struct calibrate_source *)base;
    struct own_window *own = window->own;
    return source->base->values(source->base, &own->base, row, out, err);
}

static int source_computed(const struct row_source *base, uint64_t tensor, float *out, uint64_t values,
                           struct error *err)
{
    const struct calibrate_source *source = (const struct calibrate_source *)base;
    return source->base->computed(source->base, tensor, out, values, err);
}

uint64_t calibrate_widest(const struct plan *plan)
{
    uint64_t widest = 0;
    for (uint64_t i = 0; i < plan->tensor_count; i++) {
        const struct shard_tensor *tensor = &plan->ranks[0].tensors[i];
        bool factored = is_decided(plan, tensor) && tensor->role != ROLE_EXPERT_DOWN; // which has no triangle
        if (factored && tensor->parts[0].source_cols > widest)
            widest = tensor->parts[0].source_cols;
    }
    return widest;
}

int calibrate_check_memory(const struct plan *plan, enum calibration_method method, struct error *err)
{
    uint64_t widest = calibrate_widest(plan), bytes = 2 * sizeof(float) * calibration_triangle_elems(widest);
    double available = host_memory_available();
    if (method != CALIBRATION_GPTQ || available < 0 || (double)bytes <= available)
        return 0;
    return error_set(err, ERR_MEMORY,
                     "a factor of %llu columns takes %.2f GB of memory and %.2f GB are available: convert on a machine "
                     "with more, or with --calib-method scales, which needs none",
                     (unsigned long long)widest, 1e-9 * (double)bytes, 1e-9 * available);
}

int calibrate_source_init(struct calibrate_source *out, const struct row_source *base, const struct plan *plan,
                          const struct calibration_file *file, enum calibration_method method, struct error *err)
{
    int rc;
    if (!base->values)
        return error_set(err, ERR_OTHER, "rows that are quantized already cannot be quantized by statistics");
    for (uint64_t i = 0; i < plan->tensor_count; i++)
        if ((rc = check_tensor(file, plan, &plan->ranks[0].tensors[i], err)))
            return rc;
    struct calibrate_source made = {
        .source = {source_read, source_computed, source_row, source_values, source_begin},
        .base = base,
        .plan = plan,
        .file = file,
        .method = method,
    };
    if ((rc = calibrate_check_memory(plan, method, err)))
        return rc;
    if (!(made.state = calloc(1, sizeof *made.state)))
        return error_set(err, ERR_MEMORY, "out of memory");
    *out = made;
    return 0;
}

void calibrate_source_clear(struct calibrate_source *source)
{
    if (source->state)
        gptq_factor_free(&source->state->factor);
    free(source->state);
    *source = (struct calibrate_source){0};
}
