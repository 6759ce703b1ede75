// Offline numbers: quantize rows of a weight matrix and place them in the stored layout, and the reverse.
// Plain C with a fixed order of operations: the same bytes from every compiler and instruction set (laws 1 and 2).
#ifndef TPSHARD_KERNELS_PACK_H
#define TPSHARD_KERNELS_PACK_H

#include "formats/error.h"
#include "formats/weight.h"

#include <math.h>
#include <stddef.h>
#include <stdint.h>

// One whole source row, quantized: either by pack_quantize_row or read as it is from a quantized checkpoint, which fills the
// fields itself. Groups count from column 0 of the whole source row, so that a slice at a multiple of the group equals
// the same slice of the whole: slicing and quantizing commute. With groups = ceil(cols / group_size):
//
//   kind   codes, one per column       scales                                                 value of a column
//   f32    f32 [cols]                  -                                                      f32
//   bf16   bf16 [cols], bits           -                                                      bf16
//   int8   q [cols], -128..127         scale                                                  q * scale
//   fp8    e4m3 [cols]                 scale                                                  e4m3 * scale
//   int4   q [cols], -8..7             scale_f16 [groups], bits of f16                        q * (scale_f16 * 2^-8)
//   int4z  q [cols], -8..7             scale_f16 [groups], zero_f16 [groups], bits of f16     (q - zero_f16) * (scale_f16 * 2^-8)
//   nl4    q [cols], -8..7             scale_f16 [groups], bits of f16                        level[q] * (scale_f16 * 2^-10)
//   fp8g   e4m3 [cols]                 scale_f32 [groups]                                     e4m3 * scale_f32
//   mxfp4  e2m1 [cols], 0..15          scale_u8 [groups], e8m0                                e2m1 * 2^(scale_u8 - 127)
//   nvfp4  e2m1 [cols], 0..15          scale_u8 [groups], e4m3; scale, of the whole row       e2m1 * scale_u8 * scale
//
// Four-bit codes stand one in a byte here; of q and e2m1 the lower four bits are stored.
struct packed_row {
    union {
        uint16_t *bf16;
        float *f32;
        int8_t *q;
        uint8_t *e4m3;
        uint8_t *e2m1;
    };
    union {
        void *group_scales; // NULL: the kind has no groups
        uint16_t *scale_f16;
        float *scale_f32;
        uint8_t *scale_u8;
    };
    uint16_t *zero_f16; // behind scale_f16
    float scale;
};
// Bytes one packed_row needs for `cols` columns (codes, and scales of groups), a multiple of 16, to carve from one
// allocation; packed_row_place sets the pointers to it, and scale to 0.
uint64_t packed_row_bytes(enum weight_kind kind, uint32_t group_size, uint64_t cols);
void packed_row_place(struct packed_row *row, void *memory, enum weight_kind kind, uint32_t group_size, uint64_t cols);

// Quantizes one whole row. weight (may be NULL: 1 everywhere) is the importance of each column in the search for scales of
// four-bit kinds: finite, >= 0; a group without any counts as all equal. ERR_MODEL for NaN, Inf, and what bf16 would round
// to Inf (the message names the column, the caller adds tensor and row). Every other f32 is legal: what is beyond the reach of
// a scale becomes zero or saturates.
//   f32:   bits as they are
//   bf16:  rounded to nearest even
//   int8:  scale = row maximum / 127, fp8: row maximum / 448, fp8g: group maximum / 448; code = x / scale, to nearest even
//   int4:  per group, scales (largest magnitude / 8) * (0.76 ... 1.24) in 25 steps, both signs; each is refitted to its
//          codes in closed form, the one with the least squared error wins, and the codes are taken anew from its f16
//   int4z: per group, the range from min(x, 0) to max(x, 0), each end shrunk by 0 to 24 % in 5 steps; scale and zero of each are
//          refitted and chosen in the same way
//   nl4:   per group, scales (largest magnitude / 34) * (0.76 ... 1.24) in 13 steps, both signs, refitted and chosen in the same way; then the
//          chosen one is refitted to its new codes, twice
//   mxfp4: per group, 2^(floor(log2(maximum)) - 2), as OCP MX has it, or twice that: the one with the smaller squared error
//   nvfp4: scale = row maximum / (6 * 448); per group of eight e4m3, which put the maximum at 4 to 7.5, the one with the least
//          squared error
int pack_quantize_row(struct packed_row *out, enum weight_kind kind, uint32_t group_size, const float *x, uint64_t cols,
                      const float *weight, struct error *err);
// The same without a search: the scales of four-bit kinds follow from the largest magnitude alone (plain rounding): int4 maximum / 7, int4z the
// whole range, nl4 the maximum at -34, mxfp4 as OCP MX has it, nvfp4 the maximum at 6. Quicker by far; errs more (int4, groups of 128, normal values: rms 11.7 %
// against 9.7 %), and its codes are less evenly used, so that they can be compressed.
int pack_round_row(struct packed_row *out, enum weight_kind kind, uint32_t group_size, const float *x, uint64_t cols,
                   struct error *err);

// One implementation of both per instruction set, each with the same bytes; for the functions above, tests and benchmarks.
struct pack_target {
    const char *name; // "base", "avx2", "avx512"
    int (*quantize_row)(struct packed_row *out, enum weight_kind kind, uint32_t group_size, const float *x,
                        uint64_t cols, const float *weight, enum weight_scales scales, struct error *err);
};
// The supported targets, slowest first; index 0 always exists, null after the last.
const struct pack_target *pack_target_at(size_t index);

// Places columns [col_begin, col_begin + shape->cols) of a whole packed row at row `row` of the stored matrix. The
// caller has zeroed the block: padding is not written. data and scale (NULL when the kind has none) point at the stored
// block that begins with row block_row (a multiple of WEIGHT_ROW_UNIT). col_begin is a multiple of group_size, if there is one.
// Rows of tiled kinds share bytes: the rows of one block belong to one thread at a time.
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

// The levels of nl4 by code, from -8 on, and what is halfway between each and the next one.
static const float pack_nl4_levels[16] = {-34, -26, -20, -16, -12, -9, -6, -3, 0, 3, 6, 9, 13, 17, 22, 29};
static const float pack_nl4_between[16] = {-30,  -23,  -18,  -14, -10.5f, -7.5f, -4.5f, -1.5f,
                                           1.5f, 4.5f, 7.5f, 11,  15,     19.5f, 25.5f, INFINITY};

// The code, -8 to 7, of int4 or nl4 whose value is nearest to x, both in units of the scale; of two as near int4 takes the even one, nl4 the lower.
// And that value.
static inline int8_t pack_nearest_code(enum weight_kind kind, float x)
{
    if (kind != WEIGHT_NL4)
        return (int8_t)f32_to_int_clamped(x, -8.0f, 7.0f);
    int32_t code = -8;
    for (int i = 0; i < 15; i++)
        code += x > pack_nl4_between[i];
    return (int8_t)code;
}
static inline float pack_code_value(enum weight_kind kind, int8_t code)
{
    return kind == WEIGHT_NL4 ? (float)weight_nl4_level((uint8_t)(code & 15)) : (float)code;
}

// Values of a packed row as floats (the reference dequantizer). out [cols].
void pack_dequantize_row(float *out, const struct packed_row *row, enum weight_kind kind, uint32_t group_size,
                         uint64_t cols);

#endif
