// Which tensors an import accounts for, and what storing its matrices lost. See import.h.
#include "shard/import_internal.h"
#include "shard/text.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// What stands beside a matrix's codes, by format.
static const char *const companions[] = {
    ".qweight", ".qzeros", ".scales", ".g_idx",
    // compressed-tensors, fp8, ModelOpt
    ".weight_packed", ".weight_scale", ".weight_scale_inv", ".weight_scale_2", ".weight_zero_point", ".weight_g_idx",
    ".weight_shape", ".weight_global_scale", ".input_scale", ".input_zero_point", ".input_global_scale",
    ".activation_scale",
    // bitsandbytes
    ".weight.absmax", ".weight.quant_map", ".weight.nested_absmax", ".weight.nested_quant_map",
    ".weight.quant_state.bitsandbytes__nf4", ".weight.quant_state.bitsandbytes__fp4",
    // hqq
    ".W_q", ".scale", ".zero", ".nbits", ".group_size", ".shape", ".axis", ".packing", ".unpack_view_dtype",
    ".view_as_float", ".compute_dtype", ".quant_scale", ".quant_zero", ".offload_meta", ".encoded_state_dict",
    ".stores_quant_config", ".channel_wise", ".optimize", ".round_zero",
    // gpt-oss
    "_blocks", "_scales"};

// Scales of a quantized cache or of activations: this engine has its own.
static const char *const never_needed[] = {
    ".k_scale", ".v_scale", ".q_scale", ".kv_scale", ".prob_scale", ".output_scale", ".k_proj.output_scale"};

// A bound matrix of the module whose tensor with this suffix is called so, whether or not the matrix's own name ends with ".weight".
static const struct import_matrix *matrix_of(const struct import *import, const char *name, const char *suffix)
{
    char source[600];
    const struct import_matrix *found = NULL;
    if (!text_ends(name, suffix))
        return NULL;
    size_t stem = strlen(name) - strlen(suffix);
    for (int bare = 0; !found && bare < 2; bare++) {
        if (snprintf(source, sizeof source, "%.*s%s", (int)stem, name, bare ? "" : ".weight") >= (int)sizeof source)
            return NULL;
        if (!(found = import_find(import, source)) && bare) { // of a stack, the first will do
            strncat(source, "[0]", sizeof source - strlen(source) - 1);
            found = import_find(import, source);
        }
    }
    return found;
}

// Some writers of GPTQ give every module a bias, of zeros where the model has none.
static int only_zeros(const struct import *import, const struct safetensors_tensor *tensor, bool *zeros,
                      struct error *err)
{
    *zeros = false;
    if (!import_is_real(tensor->dtype) || tensor->num_dims != 1 || tensor->bytes > 16 << 20)
        return 0;
    uint64_t count = tensor->dims[0];
    float *values = malloc(count * sizeof *values + 1);
    if (!values)
        return error_set(err, ERR_MEMORY, "out of memory for tensor %s", tensor->name);
    int rc = import_read_reals(import, tensor, values, count, err);
    *zeros = true;
    for (uint64_t i = 0; !rc && i < count; i++)
        *zeros = *zeros && values[i] == 0;
    free(values);
    return rc;
}

int import_tensor_known(struct import *import, const struct safetensors_tensor *tensor, bool *known, struct error *err)
{
    *known = true;
    for (size_t i = 0; i < sizeof never_needed / sizeof never_needed[0]; i++)
        if (text_ends(tensor->name, never_needed[i]))
            return 0;
    for (size_t i = 0; i < sizeof companions / sizeof companions[0]; i++)
        if (matrix_of(import, tensor->name, companions[i]))
            return 0;
    *known = false;
    if (matrix_of(import, tensor->name, ".bias"))
        return only_zeros(import, tensor, known, err);
    return 0;
}

static int compare_losses(const void *a, const void *b)
{
    const struct import_loss *left = a, *right = b;
    if (left->relative_rmse != right->relative_rmse)
        return left->relative_rmse < right->relative_rmse ? 1 : -1;
    return strcmp(left->source, right->source);
}

uint64_t import_losses(const struct import *import, struct import_loss *out, uint64_t max)
{
    uint64_t count = 0;
    for (uint64_t i = 0; i < import->table_size; i++) {
        const struct import_matrix *matrix = import->table[i];
        if (!matrix || !(matrix->error_squares > 0))
            continue;
        double relative = matrix->squares > 0 ? sqrt(matrix->error_squares / matrix->squares) : INFINITY;
        if (count < max)
            out[count] = (struct import_loss){matrix->source, relative};
        count++;
    }
    if (max)
        qsort(out, count < max ? count : max, sizeof *out, compare_losses);
    return count;
}
