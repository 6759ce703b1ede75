// How a weight tensor lies in a rank file and in memory: the kinds, their padding and their sizes.
// The same bytes feed every backend. Prose and pictures: formats/shard_file.md.
#ifndef TPSHARD_FORMATS_WEIGHT_H
#define TPSHARD_FORMATS_WEIGHT_H

#include "formats/number_formats.h"

#include <stdbool.h>
#include <stdint.h>

// Numbers are on disk and never change their meaning.
enum weight_kind {
    WEIGHT_F32 = 0,   // float [rows_padded][cols_padded]; vectors (norms, biases, tables), never sliced groups
    WEIGHT_BF16 = 1,  // bfloat16 [rows_padded][cols_padded]
    WEIGHT_INT8 = 2,  // int8 [rows_padded][cols_padded], scale f32 [rows_padded]; w = q * scale[row]
    WEIGHT_FP8 = 3,   // e4m3 [rows_padded][cols_padded], scale f32 [rows_padded]; w = q * scale[row]
    WEIGHT_INT4 = 4,  // T16x64 tiles, scale f16 [rows_padded/16][cols_padded/group_size][16];
                      // w = q * scale * 2^WEIGHT_INT4_SCALE_EXPONENT
    WEIGHT_INT4Z = 5, // T16x64 tiles, per 16 rows and group f16 scale [16], then f16 zero [16]:
                      // f16 [rows_padded/16][cols_padded/group_size][2][16];
                      // w = (q - zero) * scale * 2^WEIGHT_INT4_SCALE_EXPONENT; zero may be a fraction
    WEIGHT_FP8G = 6,  // e4m3 [rows_padded][cols_padded], scale f32 [rows_padded/16][cols_padded/128][16];
                      // w = q * scale
    WEIGHT_MXFP4 = 7, // T16x64 tiles of e2m1, scale e8m0 [rows_padded/16][cols_padded/32][16];
                      // w = q * 2^(scale - 127), NaN for scale 255
    WEIGHT_NVFP4 = 8, // T16x64 tiles of e2m1; per block of 64 rows: scale e4m3 [4][cols_padded/16][16], then
                      // f32 global [64]; w = q * scale * global[row]
    WEIGHT_NL4 = 9,   // T16x64 tiles, scale f16 [rows_padded/16][cols_padded/group_size][16];
                      // w = level[q] * scale * 2^WEIGHT_NL4_SCALE_EXPONENT; the levels: weight_nl4_level
    WEIGHT_KIND_COUNT = 10,
};

enum {
    WEIGHT_ROW_UNIT = 64,            // rows of a matrix are padded to this (4 tiles of 16 rows)
    WEIGHT_COL_UNIT = 64,            // columns are padded to this (one tile), or to the group if that is larger
    WEIGHT_TILE_BYTES = 512,         // 16 rows x 64 columns of four bits
    WEIGHT_INT4_SCALE_EXPONENT = -8, // keeps f16 scales normal for group maxima from 4e-6 to 2000
    WEIGHT_NL4_SCALE_EXPONENT = -10, // the same for the levels of nl4
    WEIGHT_NL4_TOP = 34,             // largest magnitude of a level
    WEIGHT_MAX_DIM = 0x7fffffff,     // rows and cols are at most this, so that int32 counts them
};
// 2^WEIGHT_INT4_SCALE_EXPONENT. A scale of int4 and int4z is stored as f16, divided by this.
#define WEIGHT_INT4_FACTOR 0x1p-8f
TP_HD float weight_int4_scale(uint16_t stored) { return f16_to_f32(stored) * WEIGHT_INT4_FACTOR; }

// 2^WEIGHT_NL4_SCALE_EXPONENT.
#define WEIGHT_NL4_FACTOR 0x1p-10f
TP_HD float weight_nl4_scale(uint16_t stored) { return f16_to_f32(stored) * WEIGHT_NL4_FACTOR; }

// The levels of nl4, q from -8 to 7: -34 -26 -20 -16 -12 -9 -6 -3 0 3 6 9 13 17 22 29. Rows of weights are roughly Gaussian, so levels are closer
// together about zero: with the scales that a search finds for groups of 128 the error of Gaussian weights is 8.66 %, that of int4 9.67 %
// and that of the best sixteen real numbers 8.60 % (scripts/derive_nl4_levels.py). Zero is exact; between the lowest and the highest
// are 63 steps, so that instruction sets without wider sums can add two products of them in 16 bits.
// A byte each, codes from the lowest byte on: of 0 to 7, and of -8 to -1.
#define WEIGHT_NL4_POSITIVE 0x1d16110d09060300u
#define WEIGHT_NL4_NEGATIVE 0xfdfaf7f4f0ece6deu
// nibble: 0 to 15, the code as two's complement.
TP_HD int32_t weight_nl4_level(uint8_t nibble)
{
    return (int8_t)(uint8_t)((nibble & 8 ? WEIGHT_NL4_NEGATIVE : WEIGHT_NL4_POSITIVE) >> (nibble & 7) * 8);
}

// One stored matrix. A vector is a matrix of one row; WEIGHT_F32 is not padded at all.
struct weight_shape {
    enum weight_kind kind;
    uint32_t group_size; // int4, int4z and nl4: 32, 64 or 128; fp8g: 128; mxfp4: 32; nvfp4: 16; else 0
    uint64_t rows, cols; // logical; rows or cols may be 0 (a rank that holds no part)
    uint64_t rows_padded, cols_padded;
    uint64_t data_bytes, scale_bytes;
};

// Fills the padded sizes and byte counts; false, and *out untouched, on an unknown kind, an impossible group size, a
// dimension above WEIGHT_MAX_DIM or more than 2^63 bytes.
bool weight_shape_make(struct weight_shape *out, enum weight_kind kind, uint32_t group_size, uint64_t rows,
                       uint64_t cols);

// The group size of a kind when none is asked for (the only one, except for int4, int4z and nl4: 128); 0: it has no groups.
uint32_t weight_group_default(enum weight_kind kind);
bool weight_group_valid(enum weight_kind kind, uint32_t group_size);
// Whether a group size can be asked for.
static inline bool weight_group_chosen(enum weight_kind kind)
{
    return kind == WEIGHT_INT4 || kind == WEIGHT_INT4Z || kind == WEIGHT_NL4;
}

// Codes of four bits in T16x64 tiles.
static inline bool weight_is_tiled(enum weight_kind kind)
{
    return weight_group_chosen(kind) || kind == WEIGHT_MXFP4 || kind == WEIGHT_NVFP4;
}

// How the scales of the four-bit kinds are found: by a search for the least error, or from the largest magnitudes alone (kernels/pack.h).
enum weight_scales { WEIGHT_SCALES_SEARCHED, WEIGHT_SCALES_LARGEST };
const char *weight_scales_name(enum weight_scales scales); // "search", "max"
bool weight_scales_from_name(const char *name, enum weight_scales *scales);

// "f32", "bf16", "int8", "fp8", "int4", "int4z", "fp8g", "mxfp4", "nvfp4", "nl4"
const char *weight_kind_name(enum weight_kind kind);
bool weight_kind_from_name(const char *name, enum weight_kind *kind);

// T16x64: where the code of (row, col) lies, of all five kinds. Byte offset inside the tensor's data; *high says which nibble.
// Tiles are ordered [rows_padded/64][cols_padded/64][4 tiles of 16 rows][512 bytes]. Inside a tile, lane
// l (g = l >> 2, t = l & 3) owns bytes 16l .. 16l+15 = words w = 0..3; byte j of word w holds, low nibble,
// row g, high nibble, row g + 8, both at column 16w + 2t + {0, 8, 1, 9}[j]. int4, int4z and nl4: two's complement nibbles.
TP_HD uint64_t weight_tile_offset(uint64_t row, uint64_t col, uint64_t cols_padded, bool *high)
{
    uint64_t tile = (row / 64 * (cols_padded / 64) + col / 64) * 4 + row % 64 / 16;
    uint64_t r = row % 16, c = col % 64;
    uint64_t in_word = c % 16; // 2t + {0, 8, 1, 9}[j]
    uint64_t t = in_word % 8 / 2;
    uint64_t j = (in_word % 2) * 2 + in_word / 8;
    *high = r >= 8;
    return tile * WEIGHT_TILE_BYTES + (r % 8 * 4 + t) * 16 + c / 16 * 4 + j;
}

#endif
