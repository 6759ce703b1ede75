// See import_source.h.
#include "shard/import_source.h"

#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct import_source *of_base(const struct row_source *base) { return (const struct import_source *)base; }

static const struct import_source *of_claims(const struct checkpoint_claims *claims)
{
    return (const struct import_source *)(const void *)((const char *)claims - offsetof(struct import_source, claims));
}

static bool from_import(const struct import_source *source, const struct row_request *request)
{
    return request->kind != WEIGHT_F32 && import_serves(source->import, request->source->source);
}

// ---- rows --------------------------------------------------------------------------------------------------------

static void free_window(void *memory)
{
    import_window_free(memory);
    free(memory);
}

static int source_read(const struct row_source *base, struct row_window *window, const struct row_request *request,
                       struct error *err)
{
    const struct import_source *source = of_base(base);
    if (!from_import(source, request))
        return source->plain.source.read(&source->plain.source, window, request, err);
    window->request = *request;
    if (!window->own) {
        if (!(window->own = calloc(1, sizeof(struct import_window))))
            return error_set(err, ERR_MEMORY, "out of memory for rows");
        window->free_own = free_window;
    }
    return import_read(source->import, window->own, request->source->source, request->row_begin, request->rows, err);
}

// Elements of a bias follow the rows of its matrix.
static int reorder_vector(const struct import_source *source, const struct row_request *request, struct packed_row *out,
                          struct error *err)
{
    uint64_t period, cols = request->source->source_cols;
    const uint32_t *order = import_row_order(source->import, request->source->source, &period);
    if (!order)
        return 0;
    float *values = malloc(cols * sizeof *values);
    if (!values)
        return error_set(err, ERR_MEMORY, "out of memory for a vector of %llu values", (unsigned long long)cols);
    memcpy(values, out->f32, cols * sizeof *values);
    for (uint64_t i = 0; i < cols; i++)
        out->f32[i] = values[i / period * period + order[i % period]];
    free(values);
    return 0;
}

static int source_row(const struct row_source *base, struct row_window *window, uint64_t row, struct packed_row *out,
                      struct error *err)
{
    const struct import_source *source = of_base(base);
    const struct row_request *request = &window->request;
    if (from_import(source, request))
        return import_row(source->import, window->own, row, request->kind, request->group_size, request->scales, out,
                          err);
    int rc = source->plain.source.row(&source->plain.source, window, row, out, err);
    return rc || request->kind != WEIGHT_F32 ? rc : reorder_vector(source, request, out, err);
}

static int source_values(const struct row_source *base, struct row_window *window, uint64_t row, float *out,
                         struct error *err)
{
    const struct import_source *source = of_base(base);
    const struct row_request *request = &window->request;
    if (from_import(source, request))
        return import_values(source->import, window->own, row, out, err);
    int rc = source->plain.source.values(&source->plain.source, window, row, out, err);
    struct packed_row vector = {.f32 = out};
    return rc || request->kind != WEIGHT_F32 ? rc : reorder_vector(source, request, &vector, err);
}

// The order of columns stands right behind the matrix whose columns it orders.
static int source_computed(const struct row_source *base, uint64_t tensor, float *out, uint64_t values,
                           struct error *err)
{
    const struct import_source *source = of_base(base);
    const struct shard_tensor *tensors = source->plan->ranks[0].tensors;
    enum tensor_role role = tensors[tensor].role;
    if (role != ROLE_QKV_ORDER && role != ROLE_GATE_UP_ORDER)
        return source->plain.source.computed(&source->plain.source, tensor, out, values, err);
    import_order(source->import, tensors[tensor - 1].parts[0].source, out, values);
    return 0;
}

// ---- what the plain source leaves out ------------------------------------------------------------------------------

static bool makes(const struct checkpoint_claims *claims, const struct plan_source *source)
{
    char name[512];
    if (source->index < 0)
        return import_serves(of_claims(claims)->import, source->tensor);
    snprintf(name, sizeof name, "%s[%lld]", source->tensor, (long long)source->index);
    return import_serves(of_claims(claims)->import, name);
}

static bool reads(const struct checkpoint_claims *claims, const struct safetensors_tensor *tensor)
{
    bool known = false;
    struct error ignored; // then the tensor is refused as unused
    return import_tensor_known(of_claims(claims)->import, tensor, &known, &ignored) == 0 && known;
}

// The engine runs all experts of a layer by one kind of product.
static int check_experts(const struct plan *plan, struct error *err)
{
    const struct shard_tensor *firsts[ROLE_COUNT] = {0};
    for (uint64_t i = 0; i < plan->tensor_count; i++) {
        const struct shard_tensor *tensor = &plan->ranks[0].tensors[i], *first = firsts[tensor->role];
        if (tensor->role != ROLE_EXPERT_GATE_UP && tensor->role != ROLE_EXPERT_DOWN)
            continue;
        if (!first || first->layer != tensor->layer)
            first = firsts[tensor->role] = tensor;
        if (tensor->shape.kind != first->shape.kind || tensor->shape.group_size != first->shape.group_size)
            return error_set(err, ERR_MODEL,
                             "experts 0 and %d of layer %d are quantized in different forms (%s, %s), which cannot run "
                             "together; --quant int8, int4, fp8 or none stores all alike",
                             tensor->expert, tensor->layer, weight_kind_name(first->shape.kind),
                             weight_kind_name(tensor->shape.kind));
    }
    return 0;
}

int import_source_init(struct import_source *out, struct import *import, const struct checkpoint *checkpoint,
                       const struct plan *plan, const struct hf_config *config, struct error *err)
{
    int rc;
    *out = (struct import_source){.source = {source_read, source_computed, source_row, source_values, NULL},
                                  .claims = {makes, reads},
                                  .import = import,
                                  .plan = plan};
    if ((rc = check_experts(plan, err)))
        return rc;
    // Those that have no choice of kind were not seen when the plan was made.
    for (uint64_t i = 0; i < plan->tensor_count; i++) {
        const struct shard_tensor *tensor = &plan->ranks[0].tensors[i];
        for (int p = 0; p < tensor->num_parts && tensor->shape.kind != WEIGHT_F32; p++) {
            const struct shard_part *part = &tensor->parts[p];
            struct import_part whole = {part->source, part->source_rows, part->source_cols};
            if ((rc = import_bind(import, &whole, err)))
                return rc;
        }
    }
    return checkpoint_source_init(&out->plain, checkpoint, plan, config, &out->claims, err);
}
