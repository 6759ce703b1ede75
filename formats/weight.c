// Sizes of stored weights. See weight.h.
#include "formats/weight.h"

#include "formats/checked.h"

#include <stddef.h>
#include <string.h>

static const char *const kind_names[WEIGHT_KIND_COUNT] = {"f32",   "bf16", "int8",  "fp8",   "int4",
                                                          "int4z", "fp8g", "mxfp4", "nvfp4", "nl4"};

uint32_t weight_group_default(enum weight_kind kind)
{
    switch (kind) {
    case WEIGHT_INT4:
    case WEIGHT_INT4Z:
    case WEIGHT_NL4:
    case WEIGHT_FP8G:
        return 128;
    case WEIGHT_MXFP4:
        return 32;
    case WEIGHT_NVFP4:
        return 16;
    default:
        return 0;
    }
}

bool weight_group_valid(enum weight_kind kind, uint32_t group_size)
{
    if (weight_group_chosen(kind))
        return group_size == 32 || group_size == 64 || group_size == 128;
    return group_size == weight_group_default(kind);
}

bool weight_shape_make(struct weight_shape *out, enum weight_kind kind, uint32_t group_size, uint64_t rows,
                       uint64_t cols)
{
    if ((unsigned)kind >= WEIGHT_KIND_COUNT || rows > WEIGHT_MAX_DIM || cols > WEIGHT_MAX_DIM)
        return false;
    if (!weight_group_valid(kind, group_size))
        return false;

    struct weight_shape shape = {
        .kind = kind,
        .group_size = group_size,
        .rows = rows,
        .cols = cols,
        .rows_padded = rows,
        .cols_padded = cols,
    };
    if (kind != WEIGHT_F32) {
        uint64_t col_unit = group_size > WEIGHT_COL_UNIT ? group_size : WEIGHT_COL_UNIT;
        shape.rows_padded = round_up(rows, WEIGHT_ROW_UNIT);
        shape.cols_padded = round_up(cols, col_unit);
    }

    // Both dimensions are at most about 2^31: only the four bytes of an f32 can overflow.
    uint64_t elems = shape.rows_padded * shape.cols_padded;
    switch (kind) {
    case WEIGHT_F32:
        if (!checked_mul(elems, sizeof(float), &shape.data_bytes))
            return false;
        break;
    case WEIGHT_BF16:
        shape.data_bytes = elems * 2;
        break;
    case WEIGHT_INT8:
    case WEIGHT_FP8:
        shape.data_bytes = elems;
        shape.scale_bytes = shape.rows_padded * sizeof(float);
        break;
    case WEIGHT_INT4:
    case WEIGHT_NL4:
        shape.data_bytes = elems / 2;
        shape.scale_bytes = elems / group_size * 2;
        break;
    case WEIGHT_INT4Z:
        shape.data_bytes = elems / 2;
        shape.scale_bytes = elems / group_size * 4;
        break;
    case WEIGHT_FP8G:
        shape.data_bytes = elems;
        shape.scale_bytes = elems / group_size * sizeof(float);
        break;
    case WEIGHT_MXFP4:
        shape.data_bytes = elems / 2;
        shape.scale_bytes = elems / group_size;
        break;
    case WEIGHT_NVFP4:
        shape.data_bytes = elems / 2;
        shape.scale_bytes = elems / group_size + shape.rows_padded * sizeof(float);
        break;
    case WEIGHT_KIND_COUNT:
        return false;
    }
    if (shape.data_bytes > INT64_MAX)
        return false;
    *out = shape;
    return true;
}

const char *weight_kind_name(enum weight_kind kind)
{
    return (unsigned)kind < WEIGHT_KIND_COUNT ? kind_names[kind] : "unknown";
}

const char *weight_scales_name(enum weight_scales scales) { return scales == WEIGHT_SCALES_LARGEST ? "max" : "search"; }

bool weight_scales_from_name(const char *name, enum weight_scales *scales)
{
    bool largest = strcmp(name, "max") == 0;
    if (!largest && strcmp(name, "search") != 0)
        return false;
    *scales = largest ? WEIGHT_SCALES_LARGEST : WEIGHT_SCALES_SEARCHED;
    return true;
}

bool weight_kind_from_name(const char *name, enum weight_kind *kind)
{
    for (int i = 0; i < WEIGHT_KIND_COUNT; i++)
        if (strcmp(name, kind_names[i]) == 0) {
            *kind = (enum weight_kind)i;
            return true;
        }
    return false;
}
