// Finding the tensors of a quantized matrix and checking them. See import.h.
#include "shard/import_internal.h"
#include "shard/text.h"

#include "formats/checked.h"
#include "formats/fnv.h"
#include "formats/number_formats.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { COMPANION_BYTES = 512 };

// ---- small readers -----------------------------------------------------------------------------------------------

bool import_is_real(enum dtype dtype) { return dtype == DTYPE_F32 || dtype == DTYPE_F16 || dtype == DTYPE_BF16; }

float import_real(const uint8_t *raw, enum dtype dtype, uint64_t index)
{
    uint16_t bits;
    float value;
    if (dtype == DTYPE_F32) {
        memcpy(&value, raw + 4 * index, sizeof value);
        return value;
    }
    if (dtype == DTYPE_F8_E8M0) // a power of two
        return e8m0_to_f32(raw[index]);
    memcpy(&bits, raw + 2 * index, sizeof bits);
    return dtype == DTYPE_BF16 ? bf16_to_f32(bits) : f16_to_f32(bits);
}

int import_read_reals(const struct import *import, const struct safetensors_tensor *tensor, float *out, uint64_t count,
                      struct error *err)
{
    uint8_t *raw = malloc(tensor->bytes + 1);
    if (!raw)
        return error_set(err, ERR_MEMORY, "out of memory for tensor %s", tensor->name);
    int rc = checkpoint_read(import->checkpoint, tensor, 0, tensor->bytes, raw, err);
    for (uint64_t i = 0; !rc && i < count; i++)
        out[i] = import_real(raw, tensor->dtype, i);
    free(raw);
    return rc;
}

void import_companion_name(char *out, size_t bytes, const char *name, const char *suffix)
{
    static const char weight[] = ".weight";
    size_t length = strlen(name), tail = sizeof weight - 1;
    if (length > tail && strcmp(name + length - tail, weight) == 0)
        length -= tail;
    snprintf(out, bytes, "%.*s%s", (int)length, name, suffix);
}

const struct safetensors_tensor *import_companion(const struct import *import, const char *name, const char *suffix)
{
    char companion[COMPANION_BYTES];
    import_companion_name(companion, sizeof companion, name, suffix);
    return checkpoint_find(import->checkpoint, companion);
}

// ---- the table ---------------------------------------------------------------------------------------------------

static uint64_t hash_of(const char *source) { return fnv1a_64(source, strlen(source)) * 0x9e3779b97f4a7c15u >> 8; }

static struct import_matrix **place(struct import_matrix **table, uint64_t size, const char *source)
{
    uint64_t at = hash_of(source) & (size - 1);
    while (table[at] && strcmp(table[at]->source, source) != 0)
        at = (at + 1) & (size - 1);
    return &table[at];
}

struct import_matrix *import_find(const struct import *import, const char *source)
{
    return import->table_size ? *place(import->table, import->table_size, source) : NULL;
}

static int grow(struct import *import, struct error *err)
{
    if (import->count < import->table_size / 2)
        return 0;
    uint64_t size = import->table_size ? 2 * import->table_size : 256;
    struct import_matrix **table = calloc(size, sizeof *table);
    if (!table)
        return error_set(err, ERR_MEMORY, "out of memory for the list of quantized tensors");
    for (uint64_t i = 0; i < import->table_size; i++)
        if (import->table[i])
            *place(table, size, import->table[i]->source) = import->table[i];
    free(import->table);
    import->table = table;
    import->table_size = size;
    return 0;
}

static void free_matrix(struct import_matrix *matrix)
{
    free(matrix->source);
    free(matrix->name);
    free(matrix->nested_table);
    free(matrix->column_group);
    free(matrix->sorted);
    free(matrix);
}

int import_open(struct import **out, const struct import_config *config, const struct checkpoint *checkpoint,
                struct error *err)
{
    struct import *import = calloc(1, sizeof *import);
    int rc;
    if (!import)
        return error_set(err, ERR_MEMORY, "out of memory for the import");
    import->config = config;
    import->checkpoint = checkpoint;
    pthread_mutex_init(&import->mutex, NULL);
    if ((rc = grow(import, err)) || (checkpoint && (rc = slab_cache_new(&import->slabs, checkpoint, err)))) {
        import_close(import);
        return rc;
    }
    *out = import;
    return 0;
}

void import_close(struct import *import)
{
    if (!import)
        return;
    for (uint64_t i = 0; i < import->table_size; i++)
        if (import->table[i])
            free_matrix(import->table[i]);
    free(import->table);
    slab_cache_free(import->slabs);
    pthread_mutex_destroy(&import->mutex);
    free(import);
}

// ---- checks ------------------------------------------------------------------------------------------------------

int import_wrong_shape(const struct import *import, const struct safetensors_tensor *tensor, const uint64_t *wanted,
                       int num_wanted, struct error *err)
{
    char found_text[160], wanted_text[64];
    text_shape(found_text, sizeof found_text, tensor->dims, tensor->num_dims);
    text_shape(wanted_text, sizeof wanted_text, wanted, num_wanted);
    return error_set(err, ERR_MODEL, "%s: tensor %s is %s, the configuration calls for %s",
                     checkpoint_file_name(import->checkpoint, (size_t)tensor->file), tensor->name, found_text,
                     wanted_text);
}

int import_wrong_dtype(const struct import *import, const struct safetensors_tensor *tensor, const char *wanted,
                       struct error *err)
{
    return error_set(err, ERR_MODEL, "%s: tensor %s is %s, and %s is wanted",
                     checkpoint_file_name(import->checkpoint, (size_t)tensor->file), tensor->name,
                     dtype_name(tensor->dtype), wanted);
}

int import_missing(const struct import_matrix *matrix, const char *suffix, struct error *err)
{
    char name[COMPANION_BYTES];
    import_companion_name(name, sizeof name, matrix->name, suffix);
    return error_set(err, ERR_MODEL, "tensor %s is not in the checkpoint, though the weight it belongs to is", name);
}

static bool is_matrix(const struct safetensors_tensor *tensor, uint64_t rows, uint64_t cols)
{
    return tensor->num_dims == 2 && tensor->dims[0] == rows && tensor->dims[1] == cols;
}

static int want_matrix(const struct import *import, const struct safetensors_tensor *tensor, enum dtype dtype,
                       uint64_t rows, uint64_t cols, struct error *err)
{
    if (tensor->dtype != dtype)
        return import_wrong_dtype(import, tensor, dtype_name(dtype), err);
    if (!is_matrix(tensor, rows, cols))
        return import_wrong_shape(import, tensor, (const uint64_t[]){rows, cols}, 2, err);
    return 0;
}

uint64_t import_elements(const struct safetensors_tensor *tensor)
{
    return tensor->bytes * 8 / (uint64_t)dtype_bits(tensor->dtype);
}

int import_want_reals(const struct import *import, const struct safetensors_tensor *tensor, struct error *err)
{
    return import_is_real(tensor->dtype) ? 0 : import_wrong_dtype(import, tensor, "F16, BF16 or F32", err);
}

// ---- groups and act-order ----------------------------------------------------------------------------------------

// Groups of a row from the number of scales; the config's group size decides where several would give that number.
static int settle_groups(const struct import *import, struct import_matrix *matrix,
                         const struct safetensors_tensor *scales, uint64_t groups, struct error *err)
{
    uint64_t cols = matrix->cols, group = matrix->form.group_size ? matrix->form.group_size : cols;
    matrix->groups = groups;
    if (groups > 0 && groups == div_up(cols, group)) {
        matrix->form.group_size = groups == 1 ? 0 : group;
        return 0;
    }
    if (groups > 0 && cols % groups == 0) { // some modules are quantized otherwise than the rest
        matrix->form.group_size = groups == 1 ? 0 : cols / groups;
        return 0;
    }
    return error_set(err, ERR_MODEL,
                     "%s: tensor %s holds %llu scales for %llu columns, which does not agree with a group size of %llu",
                     checkpoint_file_name(import->checkpoint, (size_t)scales->file), scales->name,
                     (unsigned long long)groups, (unsigned long long)cols, (unsigned long long)group);
}

// Source columns sorted by group, those of one group in their order; NULL when a group then would not be whole.
static int sort_columns(struct import_matrix *matrix, struct error *err)
{
    uint64_t cols = matrix->cols, group = matrix->form.group_size ? matrix->form.group_size : cols;
    uint64_t *next = calloc(matrix->groups + 1, sizeof *next);
    uint32_t *sorted = malloc(cols * sizeof *sorted);
    if (!next || !sorted) {
        free(next);
        free(sorted);
        return error_set(err, ERR_MEMORY, "out of memory for the order of columns");
    }
    for (uint64_t c = 0; c < cols; c++)
        next[matrix->column_group[c] + 1]++;
    bool whole = true;
    for (uint64_t g = 0; g < matrix->groups; g++) {
        uint64_t wanted = (g + 1) * group < cols ? group : cols - g * group;
        whole = whole && next[g + 1] == wanted;
        next[g + 1] += next[g];
    }
    for (uint64_t c = 0; c < cols; c++)
        sorted[next[matrix->column_group[c]]++] = (uint32_t)c;
    free(next);
    if (!whole) {
        free(sorted);
        sorted = NULL;
    }
    matrix->sorted = sorted;
    return 0;
}

static int read_column_groups(const struct import *import, struct import_matrix *matrix,
                              const struct safetensors_tensor *index, struct error *err)
{
    uint64_t cols = matrix->cols, group = matrix->form.group_size ? matrix->form.group_size : cols;
    bool plain = true, unset = true;
    int rc;
    if (index->dtype != DTYPE_I32)
        return import_wrong_dtype(import, index, "I32", err);
    if (index->num_dims != 1 || index->dims[0] != cols)
        return import_wrong_shape(import, index, &cols, 1, err);
    int32_t *groups = malloc(cols * sizeof *groups);
    if (!groups)
        return error_set(err, ERR_MEMORY, "out of memory for tensor %s", index->name);
    if ((rc = checkpoint_read(import->checkpoint, index, 0, cols * sizeof *groups, groups, err)))
        goto fail;
    for (uint64_t c = 0; c < cols; c++) {
        unset = unset && groups[c] == -1;
        plain = plain && groups[c] >= 0 && (uint64_t)groups[c] == c / group;
    }
    for (uint64_t c = 0; c < cols && !unset; c++)
        if (groups[c] < 0 || (uint64_t)groups[c] >= matrix->groups) {
            rc = error_set(err, ERR_MODEL, "%s: tensor %s puts column %llu into group %d, of %llu",
                           checkpoint_file_name(import->checkpoint, (size_t)index->file), index->name,
                           (unsigned long long)c, groups[c], (unsigned long long)matrix->groups);
            goto fail;
        }
    if (plain || unset) {
        free(groups);
        return 0;
    }
    matrix->column_group = (uint32_t *)groups;
    return sort_columns(matrix, err);
fail:
    free(groups);
    return rc;
}

// ---- the layouts -------------------------------------------------------------------------------------------------

int import_unsupported(const struct import *import, const struct safetensors_tensor *tensor, const char *what,
                       struct error *err)
{
    return error_set(err, ERR_MODEL, "%s: tensor %s: %s",
                     checkpoint_file_name(import->checkpoint, (size_t)tensor->file), tensor->name, what);
}

// GPTQ and AWQ: everything with the output's dimension last.
static int bind_columns(const struct import *import, struct import_matrix *matrix, struct error *err)
{
    const char *name = matrix->name;
    uint64_t rows = matrix->rows, cols = matrix->cols;
    const struct safetensors_tensor *index = import_companion(import, name, ".g_idx");
    int rc;
    bool awq = import->config->method == IMPORT_AWQ;
    matrix->codes = import_companion(import, name, ".qweight");
    matrix->scales = import_companion(import, name, ".scales");
    matrix->zeros = import_companion(import, name, ".qzeros");
    if (!matrix->scales)
        return import_missing(matrix, ".scales", err);
    if (!matrix->zeros)
        return import_missing(matrix, ".qzeros", err);
    if (matrix->form.layout != LAYOUT_AWQ && matrix->form.layout != LAYOUT_GPTQ)
        return import_unsupported(import, matrix->codes, "only gptq and awq store weights under this name", err);
    uint64_t per_word = GPTQ_WORD_BITS / (uint64_t)matrix->form.bits;
    if (!awq && matrix->codes->num_dims == 2 && matrix->codes->dims[0] * 4 == cols) { // a module of 8 bits among others
        matrix->form.bits = 8;
        per_word = 4;
    } else if (!awq && matrix->codes->num_dims == 2 && matrix->codes->dims[0] * 8 == cols) {
        matrix->form.bits = 4;
        per_word = 8;
    }
    if (rows % per_word || (!awq && cols % per_word))
        return import_unsupported(import, matrix->codes, "a matrix of this size cannot be packed in words of 32 bits",
                                  err);
    if ((rc = want_matrix(import, matrix->codes, DTYPE_I32, awq ? cols : cols / per_word, awq ? rows / per_word : rows,
                          err)) ||
        (rc = import_want_reals(import, matrix->scales, err)))
        return rc;
    uint64_t groups = matrix->scales->num_dims == 2 ? matrix->scales->dims[0] : 0;
    if ((rc = settle_groups(import, matrix, matrix->scales, groups, err)))
        return rc;
    if (!is_matrix(matrix->scales, groups, rows))
        return import_wrong_shape(import, matrix->scales, (const uint64_t[]){groups, rows}, 2, err);
    if ((rc = want_matrix(import, matrix->zeros, DTYPE_I32, groups, rows / per_word, err)))
        return rc;
    if (!index && import->config->act_order && groups > 1)
        return error_set(
            err, ERR_MODEL,
            "tensor %s has no g_idx beside it, though desc_act says that its columns have an order of their "
            "own; take a complete checkpoint",
            matrix->codes->name);
    return index && !awq ? read_column_groups(import, matrix, index, err) : 0;
}

// Zero points of a form that is symmetric: nothing but its middle may stand there.
static int refuse_zero_points(const struct import *import, const struct import_matrix *matrix, struct error *err)
{
    const struct safetensors_tensor *zeros = matrix->zeros;
    uint64_t per_word = 32 / (uint64_t)matrix->form.bits, groups = zeros->num_dims == 2 ? zeros->dims[1] : 1;
    uint32_t middle = 1u << (matrix->form.bits - 1), mask = (middle << 1) - 1, word;
    bool shifted = zeros->dtype != DTYPE_I8 && zeros->dtype != DTYPE_I32;
    uint8_t *bytes = malloc(zeros->bytes + sizeof word);
    int rc = bytes ? checkpoint_read(import->checkpoint, zeros, 0, zeros->bytes, bytes, err)
                   : error_set(err, ERR_MEMORY, "out of memory for the zero points of %s", zeros->name);
    for (uint64_t i = 0; !rc && !shifted && zeros->dtype == DTYPE_I8 && i < zeros->bytes; i++)
        shifted = bytes[i] != 0;
    for (uint64_t i = 0; !rc && !shifted && zeros->dtype == DTYPE_I32 && i < zeros->bytes / sizeof word; i++) {
        memcpy(&word, bytes + i * sizeof word, sizeof word);
        for (uint64_t j = 0; j < per_word && i / groups * per_word + j < matrix->rows; j++)
            shifted |= (word >> (j * (uint64_t)matrix->form.bits) & mask) != middle;
    }
    free(bytes);
    return !rc && shifted
               ? import_unsupported(import, zeros, "the config says symmetric, but there are zero points", err)
               : rc;
}

static int bind_packed_i32(const struct import *import, struct import_matrix *matrix, struct error *err)
{
    const struct safetensors_tensor *shape = import_companion(import, matrix->name, ".weight_shape");
    const struct safetensors_tensor *index = import_companion(import, matrix->name, ".weight_g_idx");
    uint64_t per_word = GPTQ_WORD_BITS / (uint64_t)matrix->form.bits;
    int rc;
    matrix->form.layout = LAYOUT_PACKED;
    matrix->scales = import_companion(import, matrix->name, ".weight_scale");
    matrix->zeros = import_companion(import, matrix->name, ".weight_zero_point");
    if (!matrix->scales)
        return import_missing(matrix, ".weight_scale", err);
    if (shape && shape->dtype == DTYPE_I64 && import_elements(shape) == 2) {
        int64_t stated[2];
        if ((rc = checkpoint_read(import->checkpoint, shape, 0, sizeof stated, stated, err)))
            return rc;
        if (stated[0] != (int64_t)matrix->rows || stated[1] != (int64_t)matrix->cols)
            return error_set(err, ERR_MODEL, "%s: %s says %lld x %lld, config.json calls for %llu x %llu",
                             checkpoint_file_name(import->checkpoint, (size_t)shape->file), shape->name,
                             (long long)stated[0], (long long)stated[1], (unsigned long long)matrix->rows,
                             (unsigned long long)matrix->cols);
    }
    if ((rc = want_matrix(import, matrix->codes, DTYPE_I32, matrix->rows, div_up(matrix->cols, per_word), err)) ||
        (rc = import_want_reals(import, matrix->scales, err)))
        return rc;
    matrix->scale_per_tensor = import_elements(matrix->scales) == 1;
    uint64_t groups = matrix->scale_per_tensor ? 1 : matrix->scales->num_dims == 2 ? matrix->scales->dims[1] : 0;
    if ((rc = settle_groups(import, matrix, matrix->scales, groups, err)))
        return rc;
    if (!matrix->scale_per_tensor && !is_matrix(matrix->scales, matrix->rows, groups))
        return import_wrong_shape(import, matrix->scales, (const uint64_t[]){matrix->rows, groups}, 2, err);
    if (matrix->form.symmetric) {
        if (matrix->zeros && (rc = refuse_zero_points(import, matrix, err)))
            return rc;
        matrix->zeros = NULL;
    } else if (!matrix->zeros) {
        return import_missing(matrix, ".weight_zero_point", err);
    }
    if (matrix->zeros &&
        (rc = want_matrix(import, matrix->zeros, DTYPE_I32, div_up(matrix->rows, per_word), groups, err)))
        return rc;
    return index ? read_column_groups(import, matrix, index, err) : 0;
}

// One scale, one for each row, or one for each block.
static int bind_byte_codes(const struct import *import, struct import_matrix *matrix, struct error *err)
{
    bool fp8 = matrix->codes->dtype == DTYPE_F8_E4M3;
    int rc;
    matrix->scales = import_companion(import, matrix->name, ".weight_scale");
    if (!matrix->scales)
        matrix->scales = import_companion(import, matrix->name, ".weight_scale_inv"); // multiplied all the same
    if (!matrix->scales)
        return import_missing(matrix, fp8 ? ".weight_scale_inv" : ".weight_scale", err);
    const struct safetensors_tensor *zeros = import_companion(import, matrix->name, ".weight_zero_point");
    if (zeros)
        return import_unsupported(import, zeros, "weights of 8 bits with zero points cannot be read", err);
    if (!is_matrix(matrix->codes, matrix->rows, matrix->cols))
        return import_wrong_shape(import, matrix->codes, (const uint64_t[]){matrix->rows, matrix->cols}, 2, err);
    if (matrix->scales->dtype != DTYPE_F8_E8M0 && (rc = import_want_reals(import, matrix->scales, err)))
        return rc;

    const struct import_form stated = matrix->form;
    const uint64_t *dims = matrix->scales->dims;
    int num_dims = matrix->scales->num_dims;
    matrix->form = (struct import_form){fp8 ? LAYOUT_FP8 : LAYOUT_INT8, 8, 0, 1, true};
    matrix->groups = 1;
    matrix->scale_per_tensor = import_elements(matrix->scales) == 1;
    bool per_row = (num_dims == 1 || (num_dims == 2 && dims[1] == 1)) && dims[0] == matrix->rows;
    if (matrix->scale_per_tensor || per_row)
        return 0;
    if (!fp8 || stated.layout != LAYOUT_FP8 || !stated.group_size)
        return import_wrong_shape(import, matrix->scales, (const uint64_t[]){matrix->rows, 1}, 2, err);
    matrix->form.block_rows = stated.block_rows;
    matrix->form.group_size = stated.group_size;
    matrix->groups = div_up(matrix->cols, stated.group_size);
    uint64_t blocks = div_up(matrix->rows, stated.block_rows);
    if (!is_matrix(matrix->scales, blocks, matrix->groups))
        return import_wrong_shape(import, matrix->scales, (const uint64_t[]){blocks, matrix->groups}, 2, err);
    return 0;
}

// u8 codes, two to a byte, with scales of one byte.
static int bind_fp4(const struct import *import, struct import_matrix *matrix, struct error *err)
{
    const struct safetensors_tensor *divisor = import_companion(import, matrix->name, ".weight_global_scale");
    const struct safetensors_tensor *factor = import_companion(import, matrix->name, ".weight_scale_2");
    const struct safetensors_tensor *global = divisor ? divisor : factor;
    int rc;
    matrix->scales = import_companion(import, matrix->name, ".weight_scale");
    if (!matrix->scales)
        return import_missing(matrix, ".weight_scale", err);
    bool nvfp4 = matrix->scales->dtype == DTYPE_F8_E4M3;
    if (!nvfp4 && matrix->scales->dtype != DTYPE_U8 && matrix->scales->dtype != DTYPE_F8_E8M0)
        return import_wrong_dtype(import, matrix->scales, "F8_E4M3 (NVFP4) or U8 (MXFP4)", err);
    uint64_t group = nvfp4 ? 16 : 32;
    matrix->form = (struct import_form){nvfp4 ? LAYOUT_NVFP4 : LAYOUT_MXFP4, 4, group, 1, true};
    matrix->groups = div_up(matrix->cols, group);
    if (matrix->cols % group)
        return import_unsupported(import, matrix->codes, "its columns are not whole groups", err);
    if ((rc = want_matrix(import, matrix->codes, DTYPE_U8, matrix->rows, matrix->cols / 2, err)))
        return rc;
    if (!is_matrix(matrix->scales, matrix->rows, matrix->groups))
        return import_wrong_shape(import, matrix->scales, (const uint64_t[]){matrix->rows, matrix->groups}, 2, err);
    if (!nvfp4)
        return 0;
    if (!global)
        return import_missing(matrix, ".weight_global_scale", err);
    if (global->dtype != DTYPE_F32)
        return import_wrong_dtype(import, global, "F32", err);
    if (import_elements(global) != 1)
        return import_wrong_shape(import, global, (const uint64_t[]){1}, 1, err);
    float stated;
    if ((rc = import_read_reals(import, global, &stated, 1, err)))
        return rc;
    matrix->global = divisor ? 1.0f / stated : stated;
    if (!isfinite(stated) || !isfinite(matrix->global))
        return import_unsupported(import, global, "it is not a finite number other than zero", err);
    return 0;
}

// All experts in one tensor, [experts, rows, cols / 32, 16] (gpt-oss).
static int bind_blocks(const struct import *import, struct import_matrix *matrix, struct error *err)
{
    const struct safetensors_tensor *blocks = matrix->codes;
    uint64_t expert = matrix->index < 0 ? 0 : (uint64_t)matrix->index;
    matrix->scales = import_companion(import, matrix->name, "_scales");
    if (!matrix->scales)
        return import_missing(matrix, "_scales", err);
    matrix->form = (struct import_form){LAYOUT_MXFP4, 4, 32, 1, true};
    matrix->groups = matrix->cols / 32;
    if (blocks->dtype != DTYPE_U8)
        return import_wrong_dtype(import, blocks, "U8", err);
    if (matrix->scales->dtype != DTYPE_U8 && matrix->scales->dtype != DTYPE_F8_E8M0)
        return import_wrong_dtype(import, matrix->scales, "U8", err);
    if (matrix->cols % 32 || blocks->num_dims != 4 || blocks->dims[0] <= expert || blocks->dims[1] != matrix->rows ||
        blocks->dims[2] != matrix->groups || blocks->dims[3] != 16)
        return import_wrong_shape(import, blocks, (const uint64_t[]){blocks->dims[0], matrix->rows, matrix->groups, 16},
                                  4, err);
    if (matrix->scales->num_dims != 3 || matrix->scales->dims[0] != blocks->dims[0] ||
        matrix->scales->dims[1] != matrix->rows || matrix->scales->dims[2] != matrix->groups)
        return import_wrong_shape(import, matrix->scales,
                                  (const uint64_t[]){blocks->dims[0], matrix->rows, matrix->groups}, 3, err);
    matrix->first_row = expert * matrix->rows;
    matrix->interleaved = strstr(matrix->name, "gate_up") != NULL; // rows of gate and up alternate in this layout
    return 0;
}

// ---- binding -----------------------------------------------------------------------------------------------------

// Which of two would be the model's cannot be known.
static int refuse_second_weight(const struct import *import, const char *name, const struct safetensors_tensor *plain,
                                struct error *err)
{
    static const char *const codes[] = {".qweight", ".W_q", "_blocks", ".weight_packed"};
    for (size_t i = 0; i < sizeof codes / sizeof *codes; i++) {
        const struct safetensors_tensor *second = import_companion(import, name, codes[i]);
        if (second)
            return error_set(err, ERR_MODEL,
                             "%s: tensors %s and %s are one weight twice; take a checkpoint that holds one of them",
                             checkpoint_file_name(import->checkpoint, (size_t)second->file), plain->name, second->name);
    }
    return 0;
}

static int bind_tensors(const struct import *import, struct import_matrix *matrix, struct error *err)
{
    const char *name = matrix->name;
    const struct safetensors_tensor *plain = checkpoint_find(import->checkpoint, name);
    int rc;
    if (!plain)
        plain = import_companion(import, name, ".weight"); // a source without the suffix
    if (plain && (rc = refuse_second_weight(import, name, plain, err)))
        return rc;
    if (plain && import_is_real(plain->dtype)) {
        matrix->form.layout = LAYOUT_PLAIN;
        matrix->codes = plain;
        if (matrix->index < 0 && !is_matrix(plain, matrix->rows, matrix->cols))
            return import_wrong_shape(import, plain, (const uint64_t[]){matrix->rows, matrix->cols}, 2, err);
        return 0;
    }
    if ((matrix->codes = import_companion(import, name, ".qweight")))
        return bind_columns(import, matrix, err);
    if ((matrix->codes = import_companion(import, name, ".W_q")))
        return import_bind_hqq(import, matrix, err);
    if ((matrix->codes = import_companion(import, name, "_blocks")))
        return bind_blocks(import, matrix, err);
    if ((matrix->codes = import_companion(import, name, ".weight_packed")))
        return matrix->codes->dtype == DTYPE_I32 ? bind_packed_i32(import, matrix, err) : bind_fp4(import, matrix, err);
    if (!(matrix->codes = plain))
        return error_set(err, ERR_MODEL, "tensor %s, which config.json calls for, is not in the checkpoint", name);
    if (plain->dtype == DTYPE_F8_E4M3 || plain->dtype == DTYPE_I8)
        return bind_byte_codes(import, matrix, err);
    if (plain->dtype == DTYPE_U8)
        return import->config->method == IMPORT_BITSANDBYTES ? import_bind_nf4(import, matrix, err)
                                                             : bind_fp4(import, matrix, err);
    return error_set(err, ERR_MODEL, "%s: tensor %s is %s, which no supported quantization stores",
                     checkpoint_file_name(import->checkpoint, (size_t)plain->file), plain->name,
                     dtype_name(plain->dtype));
}

int import_bind(struct import *import, const struct import_part *part, struct error *err)
{
    char module[COMPANION_BYTES];
    int rc;
    if (import_find(import, part->source))
        return 0;
    if (strlen(part->source) >= COMPANION_BYTES / 2)
        return error_set(err, ERR_MODEL, "tensor %.200s...: the name is too long", part->source);
    if (part->rows < 1 || part->cols < 1 || part->rows > WEIGHT_MAX_DIM || part->cols > WEIGHT_MAX_DIM)
        return error_set(err, ERR_MODEL, "tensor %s: %llu x %llu is not a matrix that can be read", part->source,
                         (unsigned long long)part->rows, (unsigned long long)part->cols);
    if ((rc = grow(import, err)))
        return rc;
    struct import_matrix *matrix = calloc(1, sizeof *matrix);
    if (!matrix)
        return error_set(err, ERR_MEMORY, "out of memory for the list of quantized tensors");
    const char *bracket = strrchr(part->source, '[');
    matrix->index = bracket ? strtol(bracket + 1, NULL, 10) : -1;
    matrix->source = strdup(part->source);
    matrix->name = strndup(part->source, bracket ? (size_t)(bracket - part->source) : strlen(part->source));
    if (!matrix->source || !matrix->name) {
        free_matrix(matrix);
        return error_set(err, ERR_MEMORY, "out of memory for the list of quantized tensors");
    }
    matrix->rows = part->rows;
    matrix->cols = part->cols;
    import_companion_name(module, sizeof module, matrix->name, "");
    const struct import_form *form = NULL;
    rc = import_config_form(&form, import->config, module, err);
    if (form)
        matrix->form = *form;
    if (!rc && import->checkpoint) {
        if (!form && import->config->num_schemes) // what the tensors are decides in the end
            matrix->form = import->config->schemes[0].form;
        rc = bind_tensors(import, matrix, err);
    }
    if (rc) {
        free_matrix(matrix);
        return rc;
    }
    *place(import->table, import->table_size, matrix->source) = matrix;
    import->count++;
    return 0;
}

bool import_serves(const struct import *import, const char *source)
{
    const struct import_matrix *matrix = import_find(import, source);
    return matrix && (matrix->form.layout != LAYOUT_PLAIN || matrix->row_leader);
}
