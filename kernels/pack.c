// Quantized rows in memory, their values, and the stored layouts of weights. See pack.h; the layouts are specified in
// formats/shard_file.md. How codes and scales are chosen: pack_quantize.c.
#include "kernels/pack.h"

#include "formats/checked.h"
#include "formats/number_formats.h"

#include <stddef.h>
#include <string.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

// Bytes of one code of a packed row; of a stored one too, except that tiled kinds store two codes in a byte.
static uint64_t code_bytes(enum weight_kind kind) { return kind == WEIGHT_F32 ? 4 : kind == WEIGHT_BF16 ? 2 : 1; }

// What stands beside the codes of one group and row: `parts` numbers (scale, zero) of `bytes` each.
struct group_scale {
    uint64_t parts, bytes;
};

static struct group_scale group_scale(enum weight_kind kind)
{
    switch (kind) {
    case WEIGHT_INT4:
    case WEIGHT_NL4:
        return (struct group_scale){1, sizeof(uint16_t)};
    case WEIGHT_INT4Z:
        return (struct group_scale){2, sizeof(uint16_t)};
    case WEIGHT_FP8G:
        return (struct group_scale){1, sizeof(float)};
    case WEIGHT_MXFP4:
    case WEIGHT_NVFP4:
        return (struct group_scale){1, sizeof(uint8_t)};
    default:
        return (struct group_scale){0, 0};
    }
}

static bool has_row_scale(enum weight_kind kind)
{
    return kind == WEIGHT_INT8 || kind == WEIGHT_FP8 || kind == WEIGHT_NVFP4;
}

// ---- rows in memory -------------------------------------------------------------------------------------------------

static uint64_t num_groups(uint32_t group_size, uint64_t cols) { return group_size ? div_up(cols, group_size) : 0; }

// Group scales first, then the codes, each rounded up to 16 bytes so that rows can stand one behind the other.
static uint64_t group_scale_bytes(enum weight_kind kind, uint32_t group_size, uint64_t cols)
{
    struct group_scale scale = group_scale(kind);
    return round_up(num_groups(group_size, cols) * scale.parts * scale.bytes, 16);
}

uint64_t packed_row_bytes(enum weight_kind kind, uint32_t group_size, uint64_t cols)
{
    return group_scale_bytes(kind, group_size, cols) + round_up(cols * code_bytes(kind), 16);
}

void packed_row_place(struct packed_row *row, void *memory, enum weight_kind kind, uint32_t group_size, uint64_t cols)
{
    uint8_t *codes = (uint8_t *)memory + group_scale_bytes(kind, group_size, cols);
    *row = (struct packed_row){.group_scales = group_size ? memory : NULL};
    if (kind == WEIGHT_INT4Z)
        row->zero_f16 = row->scale_f16 + num_groups(group_size, cols);
    if (kind == WEIGHT_F32)
        row->f32 = (float *)(void *)codes;
    else if (kind == WEIGHT_BF16)
        row->bf16 = (uint16_t *)(void *)codes;
    else
        row->e4m3 = codes;
}

// ---- values ---------------------------------------------------------------------------------------------------------

_Static_assert(WEIGHT_INT4_SCALE_EXPONENT == -8, "WEIGHT_INT4_FACTOR");
_Static_assert(WEIGHT_NL4_SCALE_EXPONENT == -10, "WEIGHT_NL4_FACTOR");

void pack_dequantize_row(float *out, const struct packed_row *row, enum weight_kind kind, uint32_t group_size,
                         uint64_t cols)
{
    for (uint64_t i = 0; i < cols; i++)
        switch (kind) {
        case WEIGHT_F32:
            memcpy(&out[i], &row->f32[i], sizeof *out);
            break;
        case WEIGHT_BF16:
            out[i] = bf16_to_f32(row->bf16[i]);
            break;
        case WEIGHT_INT8:
            out[i] = (float)row->q[i] * row->scale;
            break;
        case WEIGHT_FP8:
            out[i] = e4m3_to_f32(row->e4m3[i]) * row->scale;
            break;
        case WEIGHT_INT4:
            out[i] = (float)row->q[i] * weight_int4_scale(row->scale_f16[i / group_size]);
            break;
        case WEIGHT_INT4Z:
            out[i] = ((float)row->q[i] - f16_to_f32(row->zero_f16[i / group_size])) *
                     weight_int4_scale(row->scale_f16[i / group_size]);
            break;
        case WEIGHT_NL4:
            out[i] =
                (float)weight_nl4_level((uint8_t)(row->q[i] & 15)) * weight_nl4_scale(row->scale_f16[i / group_size]);
            break;
        case WEIGHT_FP8G:
            out[i] = e4m3_to_f32(row->e4m3[i]) * row->scale_f32[i / group_size];
            break;
        case WEIGHT_MXFP4:
            out[i] = e2m1_to_f32(row->e2m1[i]) * e8m0_to_f32(row->scale_u8[i / group_size]);
            break;
        case WEIGHT_NVFP4:
            out[i] = e2m1_to_f32(row->e2m1[i]) * e4m3_to_f32(row->scale_u8[i / group_size]) * row->scale;
            break;
        case WEIGHT_KIND_COUNT:
            break;
        }
}

// ---- stored layouts -------------------------------------------------------------------------------------------------

uint64_t pack_block_data_bytes(const struct weight_shape *shape)
{
    uint64_t elems = WEIGHT_ROW_UNIT * shape->cols_padded;
    return weight_is_tiled(shape->kind) ? elems / 2 : elems * code_bytes(shape->kind);
}

// Scales of the groups of a block of 64 rows.
static uint64_t block_group_bytes(const struct weight_shape *shape)
{
    struct group_scale scale = group_scale(shape->kind);
    return WEIGHT_ROW_UNIT * num_groups(shape->group_size, shape->cols_padded) * scale.parts * scale.bytes;
}

uint64_t pack_block_scale_bytes(const struct weight_shape *shape)
{
    return block_group_bytes(shape) + (has_row_scale(shape->kind) ? WEIGHT_ROW_UNIT * sizeof(float) : 0);
}

// T16x64, see weight_tile_offset: the 64 codes of one row in one tile lie in 64 consecutive bytes, one nibble each.
// tile_col[b] is the column that byte b holds: b = 16t + 4w + j, column 16w + 2t + {0, 8, 1, 9}[j].
static const uint8_t tile_col[WEIGHT_COL_UNIT] = {
    0,  8,  1,  9,  16, 24, 17, 25, 32, 40, 33, 41, 48, 56, 49, 57, 2,  10, 3,  11, 18, 26,
    19, 27, 34, 42, 35, 43, 50, 58, 51, 59, 4,  12, 5,  13, 20, 28, 21, 29, 36, 44, 37, 45,
    52, 60, 53, 61, 6,  14, 7,  15, 22, 30, 23, 31, 38, 46, 39, 47, 54, 62, 55, 63,
};

enum { TILE_ROWS = 16, TILE_COLUMN_BYTES = WEIGHT_ROW_UNIT / TILE_ROWS * WEIGHT_TILE_BYTES };

// One row of T16x64 in a block of 64 rows: the byte of its first column (the next 64 columns lie TILE_COLUMN_BYTES
// further), and its nibble.
static uint64_t tile_row(uint64_t row, int *shift)
{
    *shift = row % TILE_ROWS < 8 ? 0 : 4;
    return row / TILE_ROWS * WEIGHT_TILE_BYTES + row % 8 * WEIGHT_COL_UNIT;
}

// 64 codes into one nibble each of 64 bytes. shift: 0 or 4.
static void store_tile_row(uint8_t *to, const uint8_t *codes, int shift)
{
#ifdef __SSE2__
    // Within 16 columns the code of column c + 8 goes beside that of c: four bytes for each t; then t and w change places.
    __m128i v[4], part[4], row[4];
    for (int w = 0; w < 4; w++) {
        __m128i sixteen = _mm_loadu_si128((const __m128i *)(codes + 16 * w));
        v[w] = _mm_unpacklo_epi8(sixteen, _mm_srli_si128(sixteen, 8));
    }
    part[0] = _mm_unpacklo_epi32(v[0], v[1]), part[1] = _mm_unpacklo_epi32(v[2], v[3]);
    part[2] = _mm_unpackhi_epi32(v[0], v[1]), part[3] = _mm_unpackhi_epi32(v[2], v[3]);
    row[0] = _mm_unpacklo_epi64(part[0], part[1]), row[1] = _mm_unpackhi_epi64(part[0], part[1]);
    row[2] = _mm_unpacklo_epi64(part[2], part[3]), row[3] = _mm_unpackhi_epi64(part[2], part[3]);
    const __m128i keep = _mm_set1_epi8((char)(0xf0 >> shift));
    for (int t = 0; t < 4; t++) {
        __m128i *at = (__m128i *)(to + 16 * t);
        __m128i codes_of_t = _mm_slli_epi16(_mm_and_si128(row[t], _mm_set1_epi8(15)), shift);
        _mm_storeu_si128(at, _mm_or_si128(_mm_and_si128(_mm_loadu_si128(at), keep), codes_of_t));
    }
#else
    uint8_t keep = (uint8_t)(0xf0 >> shift);
    for (int b = 0; b < WEIGHT_COL_UNIT; b++)
        to[b] = (uint8_t)((to[b] & keep) | (codes[tile_col[b]] & 15) << shift);
#endif
}

static void store_tiled(uint8_t *data, const struct weight_shape *shape, uint64_t row, const uint8_t *codes)
{
    int shift;
    uint8_t *to = data + tile_row(row, &shift);
    for (uint64_t col = 0; col < shape->cols; col += WEIGHT_COL_UNIT, to += TILE_COLUMN_BYTES) {
        const uint8_t *from = codes + col;
        uint8_t padded[WEIGHT_COL_UNIT] = {0};
        if (shape->cols - col < WEIGHT_COL_UNIT) {
            memcpy(padded, from, shape->cols - col);
            from = padded;
        }
        store_tile_row(to, from, shift);
    }
}

static void load_tiled(uint8_t *codes, const uint8_t *data, const struct weight_shape *shape, uint64_t row)
{
    bool is_signed = weight_group_chosen(shape->kind);
    int shift;
    const uint8_t *from = data + tile_row(row, &shift);
    for (uint64_t col = 0; col < shape->cols; col += WEIGHT_COL_UNIT, from += TILE_COLUMN_BYTES) {
        uint8_t natural[WEIGHT_COL_UNIT];
        for (int b = 0; b < WEIGHT_COL_UNIT; b++) {
            uint8_t code = (uint8_t)(from[b] >> shift & 15);
            natural[tile_col[b]] = is_signed ? (uint8_t)int4_sign_extend(code) : code;
        }
        uint64_t left = shape->cols - col;
        memcpy(codes + col, natural, left < WEIGHT_COL_UNIT ? left : WEIGHT_COL_UNIT);
    }
}

// Copies `count` numbers whose distance in bytes is given on both sides.
static inline void copy_strided(uint8_t *to, uint64_t to_step, const uint8_t *from, uint64_t from_step, uint64_t count,
                                uint64_t bytes)
{
    for (uint64_t i = 0; i < count; i++)
        if (bytes == 1)
            to[i * to_step] = from[i * from_step];
        else if (bytes == 2)
            memcpy(to + i * to_step, from + i * from_step, 2);
        else
            memcpy(to + i * to_step, from + i * from_step, 4);
}

// Scales of one row of a block: stored [4][groups][parts][16 rows], packed [parts][groups of the whole row].
struct scale_row {
    uint64_t first, step;   // where the row's first scale lies, and how far the next group's
    uint64_t first_group;   // of the slice
    uint64_t packed_groups; // from the first of a part to the first of the next, in the packed row
};

static struct scale_row scale_row(const struct weight_shape *shape, uint64_t row, const struct packed_row *packed,
                                  uint64_t col_begin)
{
    struct group_scale scale = group_scale(shape->kind);
    uint64_t step = TILE_ROWS * scale.parts * scale.bytes;
    return (struct scale_row){
        .first =
            row / TILE_ROWS * num_groups(shape->group_size, shape->cols_padded) * step + row % TILE_ROWS * scale.bytes,
        .step = step,
        .first_group = col_begin / shape->group_size,
        .packed_groups = packed->zero_f16 ? (uint64_t)(packed->zero_f16 - packed->scale_f16) : 0,
    };
}

static void store_group_scales(uint8_t *stored, const struct weight_shape *shape, uint64_t row,
                               const struct packed_row *in, uint64_t col_begin)
{
    struct group_scale scale = group_scale(shape->kind);
    struct scale_row at = scale_row(shape, row, in, col_begin);
    for (uint64_t part = 0; part < scale.parts; part++) {
        const uint8_t *from =
            (const uint8_t *)in->group_scales + (part * at.packed_groups + at.first_group) * scale.bytes;
        copy_strided(stored + at.first + part * TILE_ROWS * scale.bytes, at.step, from, scale.bytes,
                     num_groups(shape->group_size, shape->cols), scale.bytes);
    }
}

static void load_group_scales(struct packed_row *out, uint64_t col_begin, const uint8_t *stored,
                              const struct weight_shape *shape, uint64_t row)
{
    struct group_scale scale = group_scale(shape->kind);
    struct scale_row at = scale_row(shape, row, out, col_begin);
    for (uint64_t part = 0; part < scale.parts; part++) {
        uint8_t *to = (uint8_t *)out->group_scales + (part * at.packed_groups + at.first_group) * scale.bytes;
        copy_strided(to, scale.bytes, stored + at.first + part * TILE_ROWS * scale.bytes, at.step,
                     num_groups(shape->group_size, shape->cols), scale.bytes);
    }
}

void pack_store_row(void *data, void *scale, const struct weight_shape *shape, uint64_t block_row, uint64_t row,
                    const struct packed_row *in, uint64_t col_begin)
{
    uint64_t block = (row - block_row) / WEIGHT_ROW_UNIT, unit = code_bytes(shape->kind);
    row = (row - block_row) % WEIGHT_ROW_UNIT;
    if (shape->cols) {
        uint8_t *to = (uint8_t *)data + block * pack_block_data_bytes(shape);
        const uint8_t *codes = in->e4m3 + col_begin * unit;
        if (weight_is_tiled(shape->kind))
            store_tiled(to, shape, row, codes);
        else
            memcpy(to + row * shape->cols_padded * unit, codes, shape->cols * unit);
    }
    uint8_t *scales = shape->scale_bytes ? (uint8_t *)scale + block * pack_block_scale_bytes(shape) : NULL;
    if (scales && shape->group_size)
        store_group_scales(scales, shape, row, in, col_begin);
    if (scales && has_row_scale(shape->kind))
        memcpy(scales + block_group_bytes(shape) + row * sizeof in->scale, &in->scale, sizeof in->scale);
}

void pack_load_row(struct packed_row *out, uint64_t col_begin, const void *data, const void *scale,
                   const struct weight_shape *shape, uint64_t row)
{
    uint64_t block = row / WEIGHT_ROW_UNIT, unit = code_bytes(shape->kind);
    row %= WEIGHT_ROW_UNIT;
    if (shape->cols) {
        const uint8_t *from = (const uint8_t *)data + block * pack_block_data_bytes(shape);
        uint8_t *codes = out->e4m3 + col_begin * unit;
        if (weight_is_tiled(shape->kind))
            load_tiled(codes, from, shape, row);
        else
            memcpy(codes, from + row * shape->cols_padded * unit, shape->cols * unit);
    }
    const uint8_t *scales = shape->scale_bytes ? (const uint8_t *)scale + block * pack_block_scale_bytes(shape) : NULL;
    if (scales && shape->group_size)
        load_group_scales(out, col_begin, scales, shape, row);
    if (scales && has_row_scale(shape->kind))
        memcpy(&out->scale, scales + block_group_bytes(shape) + row * sizeof out->scale, sizeof out->scale);
}
