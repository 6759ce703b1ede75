// What the tests of the matmul kernels share: matrices of every kind with known values, and the meaning of prepared activations.
#ifndef TPSHARD_TESTS_KERNELS_HELP_H
#define TPSHARD_TESTS_KERNELS_HELP_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/kernels.h"
#include "tests/floats_help.h"

static const struct kernels *table(const char *name)
{
    struct error err;
    const struct kernels *kernels = NULL;
    return kernels_select(&kernels, name, &err) ? NULL : kernels;
}

// ---- Matrices with known values ------------------------------------------------------------------------------------

struct kind_case {
    enum weight_kind kind;
    uint32_t group_size;
};
static const struct kind_case kind_cases[] = {
    {WEIGHT_F32, 0},    {WEIGHT_BF16, 0},    {WEIGHT_INT8, 0},   {WEIGHT_FP8, 0},
    {WEIGHT_INT4, 32},  {WEIGHT_INT4, 64},   {WEIGHT_INT4, 128}, {WEIGHT_INT4Z, 32},
    {WEIGHT_INT4Z, 64}, {WEIGHT_INT4Z, 128}, {WEIGHT_FP8G, 128}, {WEIGHT_MXFP4, 32},
    {WEIGHT_NVFP4, 16}, {WEIGHT_NL4, 32},    {WEIGHT_NL4, 64},   {WEIGHT_NL4, 128},
};
enum { KIND_CASES = sizeof kind_cases / sizeof *kind_cases };

static bool is_integer(enum weight_kind kind) { return kind == WEIGHT_INT8 || weight_is_tiled(kind); }

struct test_matrix {
    struct matrix m;
    void *data, *scale;
    double *value; // [rows][cols]
    char name[64];
};

// Where the scale of (row, group) lies, by the text of formats/weight.h: byte offset in the scales. int4z: part 1 is the zero.
static uint64_t scale_offset(const struct weight_shape *shape, uint64_t row, uint64_t group, uint64_t part)
{
    uint64_t groups = shape->cols_padded / shape->group_size, at = row / 16 * groups + group;
    switch (shape->kind) {
    case WEIGHT_INT4:
    case WEIGHT_NL4:
        return (at * 16 + row % 16) * 2;
    case WEIGHT_INT4Z:
        return ((at * 2 + part) * 16 + row % 16) * 2;
    case WEIGHT_FP8G:
        return (at * 16 + row % 16) * 4;
    case WEIGHT_NVFP4:
        return at * 16 + row % 16 + row / 64 * 256; // behind the globals of the blocks above
    default:
        return at * 16 + row % 16;
    }
}

static uint64_t global_offset(const struct weight_shape *shape, uint64_t row)
{
    uint64_t block_groups = 64 * (shape->cols_padded / 16);
    return row / 64 * (block_groups + 256) + block_groups + row % 64 * 4;
}

// What a group multiplies its codes with.
struct group_numbers {
    double scale, zero;
};

static struct group_numbers random_group(uint8_t *scale, const struct weight_shape *shape, uint64_t row, uint64_t group)
{
    uint8_t *at = scale + scale_offset(shape, row, group, 0);
    uint16_t f16 = f32_to_f16(uniform() * 2);
    float f32 = 0.001f + 0.01f * fabsf(uniform());
    switch (shape->kind) {
    case WEIGHT_INT4:
    case WEIGHT_INT4Z: {
        uint16_t zero = f32_to_f16(random_below(2) ? (float)random_below(16) - 8 : uniform() * 10);
        memcpy(at, &f16, 2);
        if (shape->kind == WEIGHT_INT4Z)
            memcpy(scale + scale_offset(shape, row, group, 1), &zero, 2);
        return (struct group_numbers){(double)f16_to_f32(f16) / 256,
                                      shape->kind == WEIGHT_INT4Z ? (double)f16_to_f32(zero) : 0};
    }
    case WEIGHT_NL4:
        memcpy(at, &f16, 2);
        return (struct group_numbers){(double)f16_to_f32(f16) / 1024, 0};
    case WEIGHT_FP8G:
        memcpy(at, &f32, 4);
        return (struct group_numbers){(double)f32, 0};
    case WEIGHT_MXFP4:
        *at = (uint8_t)(117 + random_below(20));
        return (struct group_numbers){ldexp(1, *at - 127), 0};
    default:
        *at = (uint8_t)(random_below(0x7f) | (random_below(8) ? 0 : 0x80));
        return (struct group_numbers){(double)e4m3_to_f32(*at), 0};
    }
}

// Random codes over their whole range, int8's -128 and int4's -8 among them, stored by the formulas of weight.h alone.
static struct test_matrix make_matrix(struct kind_case c, uint64_t rows, uint64_t cols)
{
    static const double e2m1[8] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
    static const double nl4[16] = {0, 3, 6, 9, 13, 17, 22, 29, -34, -26, -20, -16, -12, -9, -6, -3};
    struct test_matrix t = {0};
    struct weight_shape *shape = &t.m.shape;
    assert_true(weight_shape_make(shape, c.kind, c.group_size, rows, cols));
    snprintf(t.name, sizeof t.name, "%s g%u %llux%llu", weight_kind_name(c.kind), c.group_size,
             (unsigned long long)rows, (unsigned long long)cols);
    t.data = zeroed(shape->data_bytes);
    t.scale = zeroed(shape->scale_bytes);
    t.value = zeroed(rows * cols * sizeof *t.value);
    t.m.data = t.data;
    t.m.scale = shape->scale_bytes ? t.scale : NULL;
    for (uint64_t r = 0; r < rows; r++) {
        float row_scale = 0.001f + 0.01f * fabsf(uniform());
        if (c.kind == WEIGHT_INT8 || c.kind == WEIGHT_FP8)
            ((float *)t.scale)[r] = row_scale;
        if (c.kind == WEIGHT_NVFP4)
            memcpy((uint8_t *)t.scale + global_offset(shape, r), &row_scale, sizeof row_scale);
        struct group_numbers group = {0};
        for (uint64_t i = 0; i < cols; i++) {
            uint64_t at = r * shape->cols_padded + i;
            double *value = &t.value[r * cols + i];
            uint8_t code = (uint8_t)random_below(256);
            if (c.group_size && i % c.group_size == 0)
                group = random_group(t.scale, shape, r, i / c.group_size);
            if (weight_is_tiled(c.kind)) {
                bool high;
                uint8_t *byte = (uint8_t *)t.data + weight_tile_offset(r, i, shape->cols_padded, &high);
                code &= 15;
                *byte = (uint8_t)(*byte | (high ? code << 4 : code));
            }
            switch (c.kind) {
            case WEIGHT_F32:
                *value = ((float *)t.data)[at] = uniform();
                break;
            case WEIGHT_BF16:
                ((uint16_t *)t.data)[at] = f32_to_bf16(uniform());
                *value = bf16_to_f32(((uint16_t *)t.data)[at]);
                break;
            case WEIGHT_INT8:
                *value = ((int8_t *)t.data)[at] = (int8_t)code;
                *value *= row_scale;
                break;
            case WEIGHT_FP8:
            case WEIGHT_FP8G:
                code = (code & 0x7f) == 0x7f ? 0 : code;
                ((uint8_t *)t.data)[at] = code;
                *value = (double)e4m3_to_f32(code) * (c.kind == WEIGHT_FP8 ? (double)row_scale : group.scale);
                break;
            case WEIGHT_INT4:
            case WEIGHT_INT4Z:
                *value = ((code < 8 ? code : code - 16) - group.zero) * group.scale;
                break;
            case WEIGHT_NL4:
                *value = nl4[code] * group.scale;
                break;
            case WEIGHT_MXFP4:
            case WEIGHT_NVFP4:
                *value = (code & 8 ? -e2m1[code & 7] : e2m1[code & 7]) * group.scale;
                *value *= c.kind == WEIGHT_NVFP4 ? (double)row_scale : 1;
                break;
            case WEIGHT_KIND_COUNT:
                fail();
            }
        }
    }
    return t;
}

static void free_matrix(struct test_matrix *t)
{
    free(t->data);
    free(t->scale);
    free(t->value);
}

static struct activations make_activations(int64_t tokens, int64_t cols)
{
    struct activations act;
    struct error err;
    assert_int_equal(activations_alloc(&act, tokens, cols, &err), 0);
    assert_int_equal(
        (uintptr_t)act.f32 % 64 | (uintptr_t)act.q % 64 | (uintptr_t)act.q_scale % 64 | (uintptr_t)act.q_sum % 64, 0);
    return act;
}

// Where column `col` of an activation row lies for tiled kinds: kernels.h, struct activations.
static int64_t permuted(int64_t col)
{
    // position[c] = 4t + j where 2t + {0, 8, 1, 9}[j] = c
    static const int64_t position[16] = {0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15};
    int64_t p = position[col % 16], t = p / 4, j = p % 4, w = col / 16 % 4;
    return col / 64 * 64 + (t * 4 + w) * 4 + j;
}

// Whether a table rounds activations to bf16: kernels.h, struct activations.
static inline bool rounds_floats(const struct kernels *kernels, enum weight_kind kind)
{
    bool bf16 = strcmp(kernels->name, "amx") == 0 || strcmp(kernels->name, "avx512bf16") == 0;
    return bf16 && kind != WEIGHT_F32 && !is_integer(kind);
}

// Where column `col` of a rounded row lies.
static inline int64_t rounded_place(const struct kernels *kernels, enum weight_kind kind, int64_t col)
{
    if (kind == WEIGHT_BF16 || strcmp(kernels->name, "amx") == 0)
        return col;
    return col / 64 * 64 + col % 16 / 8 * 32 + col % 64 / 16 * 8 + col % 8;
}

// What a table multiplies: x itself, or its bf16 or int8 form.
static inline double activation_value(const struct kernels *kernels, const struct activations *act,
                                      const struct matrix *w, int64_t token, int64_t col)
{
    if (rounds_floats(kernels, w->shape.kind)) {
        uint16_t rounded;
        const uint8_t *row = (const uint8_t *)(act->f32 + token * act->stride);
        memcpy(&rounded, row + 2 * rounded_place(kernels, w->shape.kind, col), sizeof rounded);
        return bf16_to_f32(rounded);
    }
    if (w->shape.kind == WEIGHT_FP8 || w->shape.kind == WEIGHT_FP8G)
        return act->f32[token * act->stride + col / 32 * 32 + col % 2 * 16 + col % 32 / 2];
    if (!is_integer(w->shape.kind))
        return act->f32[token * act->stride + col];
    int64_t at = weight_is_tiled(w->shape.kind) ? permuted(col) : col;
    return act->q[token * act->stride + at] * (double)act->q_scale[token * (act->stride / ACT_GROUP) + col / ACT_GROUP];
}

static float *multiply(const struct kernels *kernels, const struct matrix *w, const struct activations *act,
                       int64_t tokens)
{
    float *y = zeroed((uint64_t)tokens * w->shape.rows * sizeof *y);
    kernels->matmul(y, (int64_t)w->shape.rows, w, act, tokens, 0, (int64_t)w->shape.rows);
    return y;
}

#endif
