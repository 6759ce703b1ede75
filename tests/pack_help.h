// What the tests of packed rows share: numbers to work on, the kinds, rows and their comparison.
#ifndef TPSHARD_TESTS_PACK_HELP_H
#define TPSHARD_TESTS_PACK_HELP_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdlib.h>
#include <string.h>

#include "kernels/pack.h"

static uint64_t state;

static uint64_t next_random(void)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return state >> 32;
}

// Roughly Gaussian, exact in f32 and the same on every machine: the sum of four 16-bit numbers.
static inline float next_weight(void)
{
    int32_t sum = -131070;
    for (int i = 0; i < 4; i++)
        sum += (int32_t)(next_random() & 0xffff);
    return (float)sum * 0x1p-20f;
}

static void *allocate(uint64_t bytes)
{
    void *memory = calloc(1, bytes + 1);
    assert_non_null(memory);
    return memory;
}

struct kind_case {
    enum weight_kind kind;
    uint32_t group_size;
};

static const struct kind_case all_kinds[] = {
    {WEIGHT_F32, 0},    {WEIGHT_BF16, 0},    {WEIGHT_INT8, 0},   {WEIGHT_FP8, 0},
    {WEIGHT_INT4, 32},  {WEIGHT_INT4, 64},   {WEIGHT_INT4, 128}, {WEIGHT_INT4Z, 32},
    {WEIGHT_INT4Z, 64}, {WEIGHT_INT4Z, 128}, {WEIGHT_FP8G, 128}, {WEIGHT_MXFP4, 32},
    {WEIGHT_NVFP4, 16}, {WEIGHT_NL4, 32},    {WEIGHT_NL4, 64},   {WEIGHT_NL4, 128},
};
enum { NUM_KINDS = sizeof all_kinds / sizeof *all_kinds };

static struct packed_row new_row(struct kind_case c, uint64_t cols)
{
    struct packed_row row;
    packed_row_place(&row, allocate(packed_row_bytes(c.kind, c.group_size, cols)), c.kind, c.group_size, cols);
    return row;
}

static void free_row(struct packed_row *row) { free(row->group_scales ? row->group_scales : (void *)row->q); }

static uint64_t code_size(enum weight_kind kind) { return kind == WEIGHT_F32 ? 4 : kind == WEIGHT_BF16 ? 2 : 1; }

// Bytes of the scale of a group.
static uint64_t group_scale_size(enum weight_kind kind)
{
    return kind == WEIGHT_FP8G ? 4 : kind == WEIGHT_MXFP4 || kind == WEIGHT_NVFP4 ? 1 : 2;
}

static inline void assert_rows_equal(struct kind_case c, const struct packed_row *a, const struct packed_row *b,
                                     uint64_t cols)
{
    assert_memory_equal(a->q, b->q, cols * code_size(c.kind));
    assert_memory_equal(&a->scale, &b->scale, sizeof a->scale);
    uint64_t groups = c.group_size ? (cols + c.group_size - 1) / c.group_size : 0;
    if (groups)
        assert_memory_equal(a->group_scales, b->group_scales, groups * group_scale_size(c.kind));
    if (c.kind == WEIGHT_INT4Z && groups)
        assert_memory_equal(a->zero_f16, b->zero_f16, groups * 2);
}

#endif
