// The entry of a table for all kinds, included last by kernels_<isa>.c.
#ifndef TPSHARD_KERNELS_CPU_MATMUL_H
#define TPSHARD_KERNELS_CPU_MATMUL_H

static void matmul(float *y, int64_t y_stride, const struct matrix *w, const struct activations *act, int64_t tokens,
                   int64_t row_begin, int64_t row_end)
{
    if (vector_ops_matmul(y, y_stride, w, act, tokens, row_begin, row_end))
        return;
    switch (w->shape.kind) {
    case WEIGHT_BF16:
        float_matmul_bf16(y, y_stride, w, act, tokens, row_begin, row_end);
        break;
    case WEIGHT_FP8:
        float_matmul_fp8(y, y_stride, w, act, tokens, row_begin, row_end);
        break;
    case WEIGHT_FP8G:
        float_matmul_fp8g(y, y_stride, w, act, tokens, row_begin, row_end);
        break;
    case WEIGHT_INT8:
        int8_matmul(y, y_stride, w, act, tokens, row_begin, row_end);
        break;
    case WEIGHT_INT4:
    case WEIGHT_INT4Z:
    case WEIGHT_NL4:
    case WEIGHT_MXFP4:
    case WEIGHT_NVFP4:
        tiled_matmul(y, y_stride, w, act, tokens, row_begin, row_end);
        break;
    case WEIGHT_F32:
    case WEIGHT_KIND_COUNT:
        break;
    }
}

#endif
