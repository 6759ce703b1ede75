// See checkpoint_source.h.
#include "shard/checkpoint_source.h"

#include "formats/number_formats.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// ---- rows --------------------------------------------------------------------------------------------------------

static uint64_t elem_bytes(enum dtype dtype) { return (uint64_t)dtype_bits(dtype) / 8; }

static int source_read(const struct row_source *base, struct row_window *window, const struct row_request *request,
                       struct error *err)
{
    const struct checkpoint_source *source = (const struct checkpoint_source *)base;
    uint64_t cols = request->source->source_cols;
    int rc;
    window->request = *request;
    const struct safetensors_tensor *tensor = checkpoint_find(source->checkpoint, request->source->source);
    if (!tensor)
        return error_set(err, ERR_MODEL, "tensor %s is not in the checkpoint", request->source->source);
    uint64_t row_bytes = cols * elem_bytes(tensor->dtype);
    if ((rc = row_window_reserve(window, request->rows * row_bytes, cols, err)))
        return rc;
    window->raw_format = tensor->dtype;
    return checkpoint_read(source->checkpoint, tensor, request->row_begin * row_bytes, request->rows * row_bytes,
                           window->raw, err);
}

static void widen(float *out, const uint8_t *raw, enum dtype dtype, uint64_t count)
{
    if (dtype == DTYPE_F32) {
        memcpy(out, raw, count * sizeof *out);
        return;
    }
    for (uint64_t i = 0; i < count; i++) {
        uint16_t bits;
        memcpy(&bits, raw + 2 * i, sizeof bits);
        out[i] = dtype == DTYPE_BF16 ? bf16_to_f32(bits) : f16_to_f32(bits);
    }
}

static int source_row(const struct row_source *base, struct row_window *window, uint64_t row, struct packed_row *out,
                      struct error *err)
{
    const struct row_request *request = &window->request;
    uint64_t cols = request->source->source_cols;
    (void)base;
    enum dtype dtype = (enum dtype)window->raw_format;
    const uint8_t *raw = window->raw + (row - request->row_begin) * cols * elem_bytes(dtype);
    struct error cause;
    widen(window->values, raw, dtype, cols);
    int rc = pack_quantize_row(out, request->kind, request->group_size, window->values, cols, NULL, &cause);
    if (rc)
        return error_set(err, rc, "tensor %s, row %llu: %s", request->source->source, (unsigned long long)row,
                         cause.msg);
    return 0;
}

// Of this kind there is only the table of inverse rope frequencies.
static int source_computed(const struct row_source *base, uint64_t tensor, float *out, uint64_t values,
                           struct error *err)
{
    const struct checkpoint_source *source = (const struct checkpoint_source *)base;
    (void)tensor;
    (void)err;
    memcpy(out, source->inv_freq, values * sizeof *out);
    return 0;
}

// ---- checks ------------------------------------------------------------------------------------------------------

static void shape_text(char *out, size_t bytes, const struct safetensors_tensor *tensor)
{
    size_t at = 0;
    out[0] = 0;
    for (int d = 0; d < tensor->num_dims && at < bytes; d++)
        at += (size_t)snprintf(out + at, bytes - at, "%s%llu", d ? " x " : "", (unsigned long long)tensor->dims[d]);
}

static int check_tensor(struct checkpoint_source *source, const struct shard_part *part, enum weight_kind kind,
                        struct error *err)
{
    const struct safetensors_tensor *tensor = checkpoint_find(source->checkpoint, part->source);
    if (!tensor)
        return error_set(err, ERR_MODEL, "tensor %s, which config.json calls for, is not in the checkpoint",
                         part->source);
    const char *file = checkpoint_file_name(source->checkpoint, (size_t)tensor->file);
    if (tensor->dtype != DTYPE_BF16 && tensor->dtype != DTYPE_F16 && tensor->dtype != DTYPE_F32)
        return error_set(err, ERR_MODEL, "%s: tensor %s is %s; only BF16, F16 and F32 weights can be read", file,
                         part->source, dtype_name(tensor->dtype));
    bool vector = kind == WEIGHT_F32;
    bool fits =
        vector ? tensor->num_dims == 1 && tensor->dims[0] == part->source_cols
               : tensor->num_dims == 2 && tensor->dims[0] == part->source_rows && tensor->dims[1] == part->source_cols;
    if (!fits) {
        char found[128], wanted[64];
        shape_text(found, sizeof found, tensor);
        if (vector)
            snprintf(wanted, sizeof wanted, "%llu", (unsigned long long)part->source_cols);
        else
            snprintf(wanted, sizeof wanted, "%llu x %llu", (unsigned long long)part->source_rows,
                     (unsigned long long)part->source_cols);
        return error_set(err, ERR_MODEL, "%s: tensor %s is %s, config.json calls for %s", file, part->source, found,
                         wanted);
    }
    if (kind == WEIGHT_BF16 && tensor->dtype != DTYPE_BF16)
        source->rounds_to_bf16 = true;
    return 0;
}

// What old checkpoints carry besides weights, and the copy of the embedding that some carry as their head.
static bool may_be_ignored(const char *name, const struct plan *plan)
{
    static const char suffix[] = ".rotary_emb.inv_freq";
    size_t length = strlen(name);
    if (length > strlen(suffix) && strcmp(name + length - strlen(suffix), suffix) == 0)
        return true;
    return plan->model.tied_embeddings && strcmp(name, "lm_head.weight") == 0;
}

static int compare_names(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

// A tensor that nothing uses means that the model is not what its config says.
static int refuse_unused(const struct checkpoint *checkpoint, const struct plan *plan, struct error *err)
{
    const char **used = malloc(plan->tensor_count * SHARD_MAX_PARTS * sizeof *used);
    size_t count = 0;
    int rc = 0;
    if (!used)
        return error_set(err, ERR_MEMORY, "out of memory for the list of tensors");
    for (uint64_t i = 0; i < plan->tensor_count; i++)
        for (int p = 0; p < plan->ranks[0].tensors[i].num_parts; p++)
            used[count++] = plan->ranks[0].tensors[i].parts[p].source;
    qsort(used, count, sizeof *used, compare_names);
    for (size_t i = 0; !rc && i < checkpoint_tensor_count(checkpoint); i++) {
        const struct safetensors_tensor *tensor = checkpoint_tensor(checkpoint, i);
        if (!bsearch(&tensor->name, used, count, sizeof *used, compare_names) && !may_be_ignored(tensor->name, plan))
            rc = error_set(err, ERR_MODEL, "%s: tensor %s has no place in a %s with this config.json",
                           checkpoint_file_name(checkpoint, (size_t)tensor->file), tensor->name,
                           plan->model.architecture);
    }
    free(used);
    return rc;
}

int checkpoint_source_init(struct checkpoint_source *out, const struct checkpoint *checkpoint, const struct plan *plan,
                           const struct rope *rope, struct error *err)
{
    int rc;
    struct checkpoint_source source = {.source = {source_read, source_computed, source_row}, .checkpoint = checkpoint};
    for (uint64_t i = 0; i < plan->tensor_count; i++) {
        const struct shard_tensor *tensor = &plan->ranks[0].tensors[i];
        for (int p = 0; p < tensor->num_parts; p++)
            if ((rc = check_tensor(&source, &tensor->parts[p], tensor->shape.kind, err)))
                return rc;
    }
    if ((rc = refuse_unused(checkpoint, plan, err)))
        return rc;
    if (!(source.inv_freq = malloc((size_t)plan->model.head_dim / 2 * sizeof(float))))
        return error_set(err, ERR_MEMORY, "out of memory for the rope table");
    rope_inv_freq(source.inv_freq, rope, plan->model.head_dim);
    *out = source;
    return 0;
}

void checkpoint_source_clear(struct checkpoint_source *source)
{
    free(source->inv_freq);
    *source = (struct checkpoint_source){0};
}
