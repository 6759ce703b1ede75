// What a table has for its own where the compiler does not know its instructions: nobody is given it, as it is not supported.
#ifndef TPSHARD_KERNELS_CPU_KERNELS_ABSENT_H
#define TPSHARD_KERNELS_CPU_KERNELS_ABSENT_H

#include "kernels/kernels_internal.h"

static bool supported(void) { return false; }

static void prepare(struct activations *act, const struct matrix *w, const float *x, int64_t x_stride,
                    int64_t token_begin, int64_t token_end)
{
    vector_ops_prepare(act, w, x, x_stride, token_begin, token_end);
}

static void matmul(float *y, int64_t y_stride, const struct matrix *w, const struct activations *act, int64_t tokens,
                   int64_t row_begin, int64_t row_end)
{
    if (!vector_ops_matmul(y, y_stride, w, act, tokens, row_begin, row_end))
        kernels_avx512.matmul(y, y_stride, w, act, tokens, row_begin, row_end);
}

#endif
