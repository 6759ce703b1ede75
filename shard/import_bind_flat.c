// Finding and checking the tensors of formats that store a matrix as one row of blocks: bitsandbytes and hqq. See import.h.
#include "formats/checked.h"
#include "shard/import_internal.h"

#include <stdlib.h>

// ---- bitsandbytes ------------------------------------------------------------------------------------------------

static int parse_state(const struct import *import, struct import_matrix *matrix,
                       const struct safetensors_tensor *state, struct error *err)
{
    enum { STATE_CAP_BYTES = 64 << 10 };
    struct json_object root = {0};
    int64_t block = 64, nested_block = 256;
    double offset = 0;
    const json_t *shape = NULL;
    if (state->bytes > STATE_CAP_BYTES)
        return import_unsupported(import, state, "it is too large for a description", err);
    char *text = malloc(state->bytes + 1);
    if (!text)
        return error_set(err, ERR_MEMORY, "out of memory for tensor %s", state->name);
    int rc = checkpoint_read(import->checkpoint, state, 0, state->bytes, text, err);
    if (!rc)
        rc = json_file_parse(&root, text, state->bytes, state->name, ERR_MODEL, err);
    if (!rc && !(rc = json_file_get_int(&block, &root, "blocksize", 1, 1 << 20, JSON_REQUIRED, err)) &&
        !(rc = json_file_get_int(&nested_block, &root, "nested_blocksize", 1, 1 << 20, JSON_OPTIONAL, err)) &&
        !(rc = json_file_get_number(&offset, &root, "nested_offset", -1e6, 1e6, JSON_OPTIONAL, err)) &&
        !(rc = json_file_get_array(&shape, &root, "shape", JSON_REQUIRED, err)) &&
        (json_array_size(shape) != 2 || json_integer_value(json_array_get(shape, 0)) != (json_int_t)matrix->rows ||
         json_integer_value(json_array_get(shape, 1)) != (json_int_t)matrix->cols))
        rc = error_set(err, ERR_MODEL, "%s: shape is not the %llu x %llu that config.json calls for", state->name,
                       (unsigned long long)matrix->rows, (unsigned long long)matrix->cols);
    matrix->form.group_size = (uint64_t)block;
    matrix->nested_block = (uint64_t)nested_block;
    matrix->nested_offset = (float)offset;
    json_file_close(&root);
    free(text);
    return rc;
}

int import_bind_nf4(const struct import *import, struct import_matrix *matrix, struct error *err)
{
    const char *name = matrix->name;
    const struct safetensors_tensor *state = import_companion(import, name, ".weight.quant_state.bitsandbytes__nf4");
    const struct safetensors_tensor *table = import_companion(import, name, ".weight.quant_map");
    const struct safetensors_tensor *nested_table = import_companion(import, name, ".weight.nested_quant_map");
    uint64_t count = matrix->rows * matrix->cols;
    int rc;
    if (!state)
        state = import_companion(import, name, ".weight.quant_state.bitsandbytes__fp4");
    matrix->form = (struct import_form){LAYOUT_NF4, 4, 64, 1, true};
    matrix->scales = import_companion(import, name, ".weight.absmax");
    matrix->nested_scales = import_companion(import, name, ".weight.nested_absmax");
    if (!state)
        return import_missing(matrix, ".weight.quant_state.bitsandbytes__nf4", err);
    if (!matrix->scales)
        return import_missing(matrix, ".weight.absmax", err);
    if (!table)
        return import_missing(matrix, ".weight.quant_map", err);
    if ((rc = parse_state(import, matrix, state, err)))
        return rc;
    if (count % 2 || matrix->codes->bytes != count / 2)
        return import_wrong_shape(import, matrix->codes, (const uint64_t[]){count / 2, 1}, 2, err);
    uint64_t blocks = div_up(count, matrix->form.group_size);
    if (import_elements(matrix->scales) != blocks)
        return import_wrong_shape(import, matrix->scales, &blocks, 1, err);
    if (table->dtype != DTYPE_F32 || import_elements(table) != NF4_CODES)
        return import_wrong_shape(import, table, (const uint64_t[]){NF4_CODES}, 1, err);
    if ((rc = import_read_reals(import, table, matrix->table, NF4_CODES, err)))
        return rc;
    if (matrix->scales->dtype == DTYPE_F32)
        return 0;
    if (matrix->scales->dtype != DTYPE_U8)
        return import_wrong_dtype(import, matrix->scales, "F32 or U8", err);
    if (!nested_table)
        return import_missing(matrix, ".weight.nested_quant_map", err);
    if (!matrix->nested_scales)
        return import_missing(matrix, ".weight.nested_absmax", err);
    uint64_t nested = div_up(blocks, matrix->nested_block);
    if (nested_table->dtype != DTYPE_F32 || import_elements(nested_table) != NESTED_CODES)
        return import_wrong_shape(import, nested_table, (const uint64_t[]){NESTED_CODES}, 1, err);
    if (matrix->nested_scales->dtype != DTYPE_F32 || import_elements(matrix->nested_scales) != nested)
        return import_wrong_shape(import, matrix->nested_scales, &nested, 1, err);
    if (!(matrix->nested_table = malloc(NESTED_CODES * sizeof(float))))
        return error_set(err, ERR_MEMORY, "out of memory for tensor %s", nested_table->name);
    return import_read_reals(import, nested_table, matrix->nested_table, NESTED_CODES, err);
}

// ---- hqq ---------------------------------------------------------------------------------------------------------

int import_bind_hqq(const struct import *import, struct import_matrix *matrix, struct error *err)
{
    uint64_t count = matrix->rows * matrix->cols;
    int rc;
    matrix->scales = import_companion(import, matrix->name, ".scale");
    matrix->zeros = import_companion(import, matrix->name, ".zero");
    if (!matrix->scales)
        return import_missing(matrix, ".scale", err);
    if (!matrix->zeros)
        return import_missing(matrix, ".zero", err);
    if ((rc = import_want_reals(import, matrix->scales, err)) || (rc = import_want_reals(import, matrix->zeros, err)))
        return rc;
    uint64_t scales = import_elements(matrix->scales);
    // Groups along a row give a column of scales; groups along a column (axis 0) a row of them.
    if (matrix->scales->num_dims == 2 && matrix->scales->dims[0] == 1 && scales > 1)
        return import_unsupported(import, matrix->scales, "its groups run along a column (axis 0)", err);
    if (scales == 0 || scales % matrix->rows || scales % 2 || matrix->cols % (scales / matrix->rows))
        return import_unsupported(import, matrix->scales, "its scales are not whole groups of each row", err);
    matrix->groups = scales / matrix->rows;
    uint64_t group = matrix->cols / matrix->groups;
    matrix->form = (struct import_form){LAYOUT_HQQ, 4, matrix->groups == 1 ? 0 : group, 1, false};
    if (import_elements(matrix->zeros) != scales)
        return import_wrong_shape(import, matrix->zeros, (const uint64_t[]){scales, 1}, 2, err);
    if (matrix->codes->dtype != DTYPE_U8 || import_elements(matrix->codes) != count / 2)
        return import_wrong_shape(import, matrix->codes, (const uint64_t[]){scales / 2, group}, 2, err);
    return 0;
}
