// Offline numbers: quantize rows of a weight matrix and place them in the stored layout, and the reverse.
// Plain C with a fixed order of operations: the same bytes from every compiler and instruction set (laws 1 and 2).
#ifndef TPSHARD_KERNELS_PACK_H
#define TPSHARD_KERNELS_PACK_H

#include "formats/error.h"
#include "formats/weight.h"

#include <stdint.h>

// One whole source row, quantized. Groups count from column 0 of the whole source row, so that a slice at a multiple
// of the group equals the same slice of the whole: slicing and quantizing commute.
//   bf16: bits [cols]; f32: f32 [cols]; int8/int4: q [cols]; fp8: e4m3 [cols]
//   scales: int8/fp8: scale [1] (f32); int4: scale_f16 [ceil(cols / group_size)]
struct packed_row {
    union {
        uint16_t *bf16;
        float *f32;
        int8_t *q; // int8, and int4 one code per byte
        uint8_t *e4m3;
    };
    float scale;
    uint16_t *scale_f16;
};
// Bytes one packed_row needs for `cols` columns (codes and group scales), a multiple of 16, to carve from one
// allocation.
uint64_t packed_row_bytes(enum weight_kind kind, uint32_t group_size, uint64_t cols);
void packed_row_place(struct packed_row *row, void *memory, enum weight_kind kind, uint32_t group_size, uint64_t cols);

// Quantizes one whole row. weight (may be NULL: 1 everywhere) is the importance of each column in the scale search of
// int4: finite, >= 0; a group without any counts as all equal. ERR_MODEL when a quantized kind meets NaN or Inf (the
// message names the column, the caller adds tensor and row). Every other f32 is legal: what is beyond the reach of a
// scale becomes zero or saturates.
//   f32:  bits as they are
//   bf16: an exact bf16 keeps its bits (NaN payloads too), others round to nearest even
//   int8: scale = row maximum / 127, fp8: row maximum / 448; code = x / scale, to nearest even
//   int4: per group, scales (largest magnitude / 8) * (0.76 ... 1.24) in 25 steps, both signs; each is refitted to its
//         codes in closed form, the one with the least squared error wins, and the codes are taken anew from its f16
int pack_quantize_row(struct packed_row *out, enum weight_kind kind, uint32_t group_size, const float *x, uint64_t cols,
                      const float *weight, struct error *err);

// Places columns [col_begin, col_begin + shape->cols) of a whole packed row at row `row` of the stored matrix. The
// caller has zeroed the block: padding is not written. data and scale (NULL when the kind has none) point at the stored
// block that begins with row block_row (a multiple of WEIGHT_ROW_UNIT). col_begin is a multiple of group_size (int4).
// int4 rows share bytes: the rows of one block belong to one thread at a time.
void pack_store_row(void *data, void *scale, const struct weight_shape *shape, uint64_t block_row, uint64_t row,
                    const struct packed_row *in, uint64_t col_begin);
// The reverse: reads row `row` of the stored matrix, whose first block is at data and scale, into columns
// [col_begin, col_begin + shape->cols) of a whole packed row.
void pack_load_row(struct packed_row *out, uint64_t col_begin, const void *data, const void *scale,
                   const struct weight_shape *shape, uint64_t row);
// Bytes of data and of scale for a block of WEIGHT_ROW_UNIT rows (the stored matrix is a sequence of such blocks; of
// f32, which is not padded, the last block is shorter).
uint64_t pack_block_data_bytes(const struct weight_shape *shape);
uint64_t pack_block_scale_bytes(const struct weight_shape *shape);

// Values of a packed row as floats (the reference dequantizer). out [cols].
void pack_dequantize_row(float *out, const struct packed_row *row, enum weight_kind kind, uint32_t group_size,
                         uint64_t cols);

#endif
