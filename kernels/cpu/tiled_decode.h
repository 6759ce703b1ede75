// Decode of the tiled kinds, after tiled_decode of kernels_<isa>.c, which it calls with constants for kind and group: DECODE_BLOCKS blocks of
// BLOCK_ROWS rows side by side.
#ifndef TPSHARD_KERNELS_CPU_TILED_DECODE_H
#define TPSHARD_KERNELS_CPU_TILED_DECODE_H

VECTOR_INLINE void tiled_decode_rows(float *y, const struct matrix *w, const struct activations *act, int64_t row_begin,
                                     int64_t row_end, enum weight_kind kind, int group_size)
{
    for (int64_t row = row_begin; row < row_end; row += DECODE_BLOCKS * BLOCK_ROWS) {
        int64_t left = (row_end - row + BLOCK_ROWS - 1) / BLOCK_ROWS;
        tiled_decode(y, w, act, row, row_end, left < DECODE_BLOCKS ? left : DECODE_BLOCKS, kind, group_size);
    }
}

static void tiled_decode_any(float *y, const struct matrix *w, const struct activations *act, int64_t row_begin,
                             int64_t row_end)
{
#define DECODE_CASE(kind, group_size)                                                                                  \
    case (kind)*256 + (group_size):                                                                                    \
        tiled_decode_rows(y, w, act, row_begin, row_end, kind, group_size);                                            \
        break
    switch ((int)w->shape.kind * 256 + (int)w->shape.group_size) {
        DECODE_CASE(WEIGHT_INT4, 128);
        DECODE_CASE(WEIGHT_INT4, 64);
        DECODE_CASE(WEIGHT_INT4, 32);
        DECODE_CASE(WEIGHT_INT4Z, 128);
        DECODE_CASE(WEIGHT_INT4Z, 64);
        DECODE_CASE(WEIGHT_INT4Z, 32);
        DECODE_CASE(WEIGHT_NL4, 128);
        DECODE_CASE(WEIGHT_NL4, 64);
        DECODE_CASE(WEIGHT_NL4, 32);
        DECODE_CASE(WEIGHT_MXFP4, 32);
        DECODE_CASE(WEIGHT_NVFP4, 16);
    }
#undef DECODE_CASE
}

#endif
