// Unpacked rows of quantized matrices (import_unpack.c) as packed rows, exactly where the kind allows it, or as floats.
// See import.h.
#include "shard/import_internal.h"

#include "formats/checked.h"
#include "formats/number_formats.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

// ---- one row -----------------------------------------------------------------------------------------------------

// What a row consists of.
struct row_view {
    const uint8_t *codes, *scales_u8;
    const float *scales, *zeros, *values;
    float *scratch; // [cols]
    uint64_t group; // columns of one
};

static struct row_view view_of(const struct import_window *window, uint64_t row)
{
    const struct import_matrix *matrix = window->matrix;
    struct import_unpacked all = import_unpacked_of(window);
    uint64_t i = row - window->row_begin;
    return (struct row_view){
        .codes = import_as_values(matrix) ? NULL : all.codes + i * matrix->cols,
        .scales_u8 = all.scales_u8 + i * matrix->groups,
        .scales = all.scales + i * matrix->groups,
        .zeros = all.zeros + i * matrix->groups,
        .values = import_as_values(matrix) ? all.values + i * matrix->cols : NULL,
        .scratch = all.values,
        .group = matrix->groups == 1 ? matrix->cols : matrix->form.group_size,
    };
}

static uint64_t group_of(const struct import_matrix *matrix, const struct row_view *row, uint64_t col)
{
    return matrix->column_group && !matrix->reordered ? matrix->column_group[col] : col / row->group;
}

static int bad_row(const struct import_matrix *matrix, uint64_t row, const char *what, struct error *err)
{
    return error_set(err, ERR_MODEL, "tensor %s, row %llu: %s", matrix->source, (unsigned long long)row, what);
}

// Numbers that no quantizer writes: a weight that is none would otherwise turn up far behind.
static int check_row(const struct import_matrix *matrix, const struct row_view *view, uint64_t row, struct error *err)
{
    enum import_layout layout = matrix->form.layout;
    if (import_as_values(matrix))
        return 0; // the quantizer checks values
    if (layout == LAYOUT_NVFP4 || layout == LAYOUT_MXFP4) {
        for (uint64_t g = 0; g < matrix->groups; g++)
            if (layout == LAYOUT_MXFP4 ? view->scales_u8[g] == 255 : (view->scales_u8[g] & 0x7f) == 0x7f)
                return bad_row(matrix, row, "a scale is not a number", err);
        return 0;
    }
    for (uint64_t g = 0; g < matrix->groups; g++)
        if (!isfinite(view->scales[g]) || !isfinite(view->zeros[g]))
            return bad_row(matrix, row, "a scale or zero point is not a finite number", err);
    for (uint64_t c = 0; layout == LAYOUT_FP8 && c < matrix->cols; c++)
        if ((view->codes[c] & 0x7f) == 0x7f)
            return bad_row(matrix, row, "a weight is not a number", err);
    return 0;
}

static void dequantize(const struct import_matrix *matrix, const struct row_view *view, float *out)
{
    for (uint64_t c = 0; c < matrix->cols; c++) {
        uint64_t g = view->codes ? group_of(matrix, view, c) : 0;
        switch (matrix->form.layout) {
        case LAYOUT_PLAIN:
        case LAYOUT_NF4:
            out[c] = view->values[c];
            break;
        case LAYOUT_FP8:
            out[c] = e4m3_to_f32(view->codes[c]) * view->scales[g];
            break;
        case LAYOUT_NVFP4:
            out[c] = e2m1_to_f32(view->codes[c]) * e4m3_to_f32(view->scales_u8[g]) * matrix->global;
            break;
        case LAYOUT_MXFP4:
            out[c] = e2m1_to_f32(view->codes[c]) * e8m0_to_f32(view->scales_u8[g]);
            break;
        default:
            out[c] = ((float)view->codes[c] - view->zeros[g]) * view->scales[g];
            break;
        }
    }
}

int import_values(struct import *import, struct import_window *window, uint64_t row, float *out, struct error *err)
{
    struct row_view view = view_of(window, row);
    (void)import;
    int rc = check_row(window->matrix, &view, row, err);
    if (!rc)
        dequantize(window->matrix, &view, out);
    return rc;
}

// ---- exact rows --------------------------------------------------------------------------------------------------

// Scales of int4 are stored as f16, divided by WEIGHT_INT4_FACTOR.
static int put_f16(uint16_t *out, float value, bool *exact, const struct import_matrix *matrix, uint64_t row,
                   struct error *err)
{
    *out = f32_to_f16(value);
    if ((*out & 0x7c00) == 0x7c00)
        return bad_row(matrix, row, "a scale or zero point is too large for f16 (scales must be below 256)", err);
    *exact = *exact && f16_to_f32(*out) == value;
    return 0;
}

static int copy_int4(struct packed_row *out, const struct import_matrix *matrix, const struct row_view *view,
                     uint64_t row, enum weight_kind kind, uint32_t group_size, bool *exact, struct error *err)
{
    int rc = 0;
    for (uint64_t c = 0; c < matrix->cols; c++)
        out->q[c] = (int8_t)(view->codes[c] - 8);
    for (uint64_t g = 0; !rc && g < div_up(matrix->cols, group_size); g++) {
        uint64_t from = g * group_size / view->group;
        rc = put_f16(&out->scale_f16[g], view->scales[from] / WEIGHT_INT4_FACTOR, exact, matrix, row, err);
        if (!rc && kind == WEIGHT_INT4Z)
            rc = put_f16(&out->zero_f16[g], view->zeros[from] - 8, exact, matrix, row, err);
        else if (!rc && view->zeros[from] != 8)
            rc = error_set(err, ERR_MODEL,
                           "tensor %s, row %llu: a zero point is %g, though the configuration says symmetric (8); "
                           "\"sym\" or \"checkpoint_format\" is wrong there",
                           matrix->source, (unsigned long long)row, view->zeros[from]);
    }
    return rc;
}

static int copy_row(struct packed_row *out, const struct import_matrix *matrix, const struct row_view *view,
                    uint64_t row, enum weight_kind kind, uint32_t group_size, bool *exact, struct error *err)
{
    uint64_t cols = matrix->cols;
    switch (kind) {
    case WEIGHT_INT4:
    case WEIGHT_INT4Z:
        return copy_int4(out, matrix, view, row, kind, group_size, exact, err);
    case WEIGHT_INT8:
        if (view->zeros[0] != 128)
            return bad_row(matrix, row, "a zero point is not the middle, though the configuration says symmetric", err);
        for (uint64_t c = 0; c < cols; c++)
            out->q[c] = (int8_t)(view->codes[c] - 128);
        out->scale = view->scales[0];
        return 0;
    case WEIGHT_FP8:
        memcpy(out->e4m3, view->codes, cols);
        out->scale = view->scales[0];
        return 0;
    case WEIGHT_FP8G:
        memcpy(out->e4m3, view->codes, cols);
        for (uint64_t g = 0; g < div_up(cols, group_size); g++)
            out->scale_f32[g] = view->scales[g * group_size / view->group];
        return 0;
    default: // mxfp4, nvfp4
        memcpy(out->e2m1, view->codes, cols);
        memcpy(out->scale_u8, view->scales_u8, matrix->groups);
        out->scale = matrix->global;
        return 0;
    }
}

static int note_loss(struct import *import, struct import_matrix *matrix, const float *wanted,
                     const struct packed_row *stored, enum weight_kind kind, uint32_t group_size, struct error *err)
{
    double error_squares = 0, squares = 0;
    float *found = malloc(matrix->cols * sizeof *found);
    if (!found)
        return error_set(err, ERR_MEMORY, "out of memory for a row of %llu values", (unsigned long long)matrix->cols);
    pack_dequantize_row(found, stored, kind, group_size, matrix->cols);
    for (uint64_t c = 0; c < matrix->cols; c++) {
        double difference = (double)found[c] - wanted[c];
        error_squares += difference * difference;
        squares += (double)wanted[c] * wanted[c];
    }
    free(found);
    pthread_mutex_lock(&import->mutex);
    matrix->error_squares += error_squares;
    matrix->squares += squares;
    pthread_mutex_unlock(&import->mutex);
    return 0;
}

int import_row(struct import *import, struct import_window *window, uint64_t row, enum weight_kind kind,
               uint32_t group_size, enum weight_scales scales, struct packed_row *out, struct error *err)
{
    struct import_matrix *matrix = window->matrix;
    struct row_view view = view_of(window, row);
    struct error cause;
    bool exact = true;
    int rc = check_row(matrix, &view, row, err);
    if (rc)
        return rc;
    if (import_is_exact(matrix, kind, group_size)) {
        if ((rc = copy_row(out, matrix, &view, row, kind, group_size, &exact, err)) || exact)
            return rc;
        dequantize(matrix, &view, view.scratch);
        return note_loss(import, matrix, view.scratch, out, kind, group_size, err);
    }
    const float *values = view.values;
    if (!values) {
        dequantize(matrix, &view, view.scratch);
        values = view.scratch;
    }
    rc = scales == WEIGHT_SCALES_LARGEST ? pack_round_row(out, kind, group_size, values, matrix->cols, &cause)
                                         : pack_quantize_row(out, kind, group_size, values, matrix->cols, NULL, &cause);
    if (rc)
        return bad_row(matrix, row, cause.msg, err);
    return matrix->form.layout == LAYOUT_PLAIN ? 0 : note_loss(import, matrix, values, out, kind, group_size, err);
}
