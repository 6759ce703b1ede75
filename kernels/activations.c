// Memory of prepared activations. What stands in it: kernels.h.
#include "formats/checked.h"
#include "kernels/kernels.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

enum { ALIGNMENT = 64, MARGIN = 2 * ALIGNMENT }; // room for a pointer, and to be aligned behind it

// Zeroed, so that no kernel ever meets bits that nobody wrote; but by the kernel, when a page is first touched: what a model's kinds of
// weights do not use costs nothing. Where calloc's memory begins stands before the aligned address.
static void *alloc_zeroed(uint64_t bytes)
{
    uint8_t *memory = calloc(1, bytes + MARGIN);
    if (!memory)
        return NULL;
    uint64_t begin = (uint64_t)(uintptr_t)memory;
    void **aligned = (void **)(void *)(memory + (round_up(begin + sizeof(void *), ALIGNMENT) - begin));
    aligned[-1] = memory;
    return aligned;
}

static void free_zeroed(void *aligned)
{
    if (aligned)
        free(((void **)aligned)[-1]);
}

// An odd number of groups: rows at a distance of 2^n bytes would share few sets of a cache.
static bool row_stride(int64_t max_cols, uint64_t *stride)
{
    bool fits = max_cols >= 0 && checked_round_up((uint64_t)max_cols, ACT_GROUP, stride);
    *stride |= ACT_GROUP;
    return fits;
}

int activations_alloc(struct activations *act, int64_t max_tokens, int64_t max_cols, struct error *err)
{
    *act = (struct activations){0};
    uint64_t stride = 0, elems;
    if (max_tokens < 0 || !row_stride(max_cols, &stride) || !checked_mul((uint64_t)max_tokens, stride, &elems) ||
        elems > (PTRDIFF_MAX - MARGIN) / sizeof(float))
        return error_set(err, ERR_MEMORY, "activations of %" PRId64 " tokens with %" PRId64 " columns are too large",
                         max_tokens, max_cols);
    act->max_tokens = max_tokens;
    act->stride = (int64_t)stride;
    act->f32 = alloc_zeroed(elems * sizeof *act->f32);
    act->q = alloc_zeroed(elems * sizeof *act->q);
    act->q_scale = alloc_zeroed(elems / ACT_GROUP * sizeof *act->q_scale);
    act->q_sum = alloc_zeroed(elems / ACT_SUM * sizeof *act->q_sum);
    if (act->f32 && act->q && act->q_scale && act->q_sum)
        return 0;
    activations_free(act);
    return error_set(err, ERR_MEMORY, "out of memory for activations of %" PRId64 " tokens with %" PRId64 " columns",
                     max_tokens, max_cols);
}

void activations_free(struct activations *act)
{
    free_zeroed(act->f32);
    free_zeroed(act->q);
    free_zeroed(act->q_scale);
    free_zeroed(act->q_sum);
    *act = (struct activations){0};
}

void activations_copy_row(struct activations *dst, int64_t dst_row, const struct activations *src, int64_t src_row,
                          enum weight_kind kind)
{
    struct activations to = activations_rows(dst, dst_row), from = activations_rows(src, src_row);
    size_t cols = (size_t)(src->stride < dst->stride ? src->stride : dst->stride);
    if (kind != WEIGHT_INT8 && !weight_is_tiled(kind)) {
        memmove(to.f32, from.f32, cols * sizeof *to.f32);
        return;
    }
    memmove(to.q, from.q, cols);
    memmove(to.q_scale, from.q_scale, cols / ACT_GROUP * sizeof *to.q_scale);
    memmove(to.q_sum, from.q_sum, cols / ACT_SUM * sizeof *to.q_sum);
}
