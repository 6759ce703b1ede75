// Quantizers and the stored layouts of weights. See pack.h; the layouts are specified in formats/shard_file.md.
//
// Same bytes everywhere: every sum runs in LANES partial sums that are combined in one fixed tree, so the order of the
// additions does not depend on the width of a vector; nothing calls libm; no product is fused into a sum
// (-ffp-contract=off).
#include "kernels/pack.h"

#include "formats/checked.h"
#include "formats/number_formats.h"

#include <float.h>
#include <stddef.h>
#include <string.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

enum { MAX_GROUP = 128, LANES = 16, QUAD = 4 };

// Bytes of one code of a packed row; of a stored one too, except that int4 stores two codes in a byte.
static uint64_t code_bytes(enum weight_kind kind) { return kind == WEIGHT_F32 ? 4 : kind == WEIGHT_BF16 ? 2 : 1; }

// ---- rows in memory -------------------------------------------------------------------------------------------------

// Group scales first, then the codes, each rounded up to 16 bytes so that rows can stand one behind the other.
static uint64_t group_scale_bytes(enum weight_kind kind, uint32_t group_size, uint64_t cols)
{
    return kind == WEIGHT_INT4 ? round_up(div_up(cols, group_size) * sizeof(uint16_t), 16) : 0;
}

uint64_t packed_row_bytes(enum weight_kind kind, uint32_t group_size, uint64_t cols)
{
    return group_scale_bytes(kind, group_size, cols) + round_up(cols * code_bytes(kind), 16);
}

void packed_row_place(struct packed_row *row, void *memory, enum weight_kind kind, uint32_t group_size, uint64_t cols)
{
    uint8_t *codes = (uint8_t *)memory + group_scale_bytes(kind, group_size, cols);
    *row = (struct packed_row){.scale_f16 = kind == WEIGHT_INT4 ? memory : NULL};
    switch (kind) {
    case WEIGHT_F32:
        row->f32 = (float *)(void *)codes;
        break;
    case WEIGHT_BF16:
        row->bf16 = (uint16_t *)(void *)codes;
        break;
    case WEIGHT_FP8:
        row->e4m3 = codes;
        break;
    default:
        row->q = (int8_t *)codes;
        break;
    }
}

// ---- int4: the scale of a group -------------------------------------------------------------------------------------

typedef float quad __attribute__((vector_size(QUAD * sizeof(float))));

// a < b ? a : b and a > b ? a : b, element by element. Compilers turn neither into one instruction by themselves.
static inline quad quad_min(quad a, quad b)
{
#ifdef __SSE2__
    return (quad)_mm_min_ps((__m128)a, (__m128)b);
#else
    for (int i = 0; i < QUAD; i++)
        a[i] = a[i] < b[i] ? a[i] : b[i];
    return a;
#endif
}

static inline quad quad_max(quad a, quad b)
{
#ifdef __SSE2__
    return (quad)_mm_max_ps((__m128)a, (__m128)b);
#else
    for (int i = 0; i < QUAD; i++)
        a[i] = a[i] > b[i] ? a[i] : b[i];
    return a;
#endif
}

static inline quad quad_load(const float *from)
{
    quad value;
    memcpy(&value, from, sizeof value);
    return value;
}

static inline quad quad_all(float value) { return (quad){value, value, value, value}; }

// Lane l of LANES holds the terms l, l + LANES, ... The tree: lanes l + 8, then + 4, + 2, + 1.
static inline float lanes_sum(const quad lanes[LANES / QUAD])
{
    quad sum = (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

// A group made ready: padded with zeros to a multiple of LANES; a missing element adds nothing to any sum.
struct group {
    const float *x;  // values
    const float *a;  // importance, largest 1; NULL: 1 everywhere
    const float *ax; // a * x; x itself without importance
    int count;       // multiple of LANES
};

// The two ranges of codes: a positive scale stores -8..7; a negative one stores the negated codes, hence -7..8.
enum code_range { RANGE_POSITIVE, RANGE_NEGATIVE, RANGE_COUNT };

// Sums of the best fit x ~ s * q for the codes q = rint(x * inverse), clamped to each range.
struct fit {
    float xq; // sum of a * x * q
    float qq; // sum of a * q * q
};

// `ranges` is 1 when every code lies in -7..7 by itself, so that both ranges are the same.
static inline void fit_codes(struct fit fit[RANGE_COUNT], const struct group *group, float inverse, const int ranges,
                             const bool weighted)
{
    const quad round = quad_all(12582912.0f); // 1.5 * 2^23: adding it leaves no bits below one, rounded to even
    const quad inverses = quad_all(inverse), seven = quad_all(7.0f), eight = quad_all(8.0f);
    quad xq[RANGE_COUNT][LANES / QUAD], qq[RANGE_COUNT][LANES / QUAD];
    for (int lane = 0; lane < LANES / QUAD; lane++) {
        quad xq0 = quad_all(0), qq0 = quad_all(0), xq1 = quad_all(0), qq1 = quad_all(0);
        for (int i = lane * QUAD; i < group->count; i += LANES) {
            quad ax = quad_load(group->ax + i);
            quad x = weighted ? quad_load(group->x + i) : ax;
            quad code = x * inverses;
            if (ranges > 1)
                code = quad_max(quad_min(code, eight), -eight);
            code = code + round - round;
            quad q = ranges > 1 ? quad_min(code, seven) : code;
            quad aq = weighted ? quad_load(group->a + i) * q : q;
            xq0 += ax * q;
            qq0 += aq * q;
            if (ranges > 1) {
                q = quad_max(code, -seven);
                aq = weighted ? quad_load(group->a + i) * q : q;
                xq1 += ax * q;
                qq1 += aq * q;
            }
        }
        xq[0][lane] = xq0, qq[0][lane] = qq0, xq[1][lane] = xq1, qq[1][lane] = qq1;
    }
    for (int range = 0; range < ranges; range++)
        fit[range] = (struct fit){lanes_sum(xq[range]), lanes_sum(qq[range])};
}

// The scale of one group, as stored. For codes q the best scale is xq / qq, and it leaves the squared error
// sum(a x^2) - xq^2 / qq; so each candidate needs one pass, and the best is the one with the largest xq^2 / qq.
// Candidates: the largest magnitude at code 8 * f, f = 0.76 to 1.24 in steps of 0.02, in both ranges.
static inline uint16_t search_scale(const struct group *group, float largest, const bool weighted)
{
    float best_gain = -1.0f;
    float best_scale = largest * 0.125f; // stands when no element with a weight has a code
    enum code_range best_range = RANGE_POSITIVE;
    for (int i = -12; i <= 12; i++) {
        float inverse = 1.0f / (largest * 0.125f * (1.0f + 0.02f * (float)i));
        struct fit fit[RANGE_COUNT];
        int ranges = largest * inverse < 7.49f ? 1 : RANGE_COUNT; // below 7.5 nothing rounds to 8
        if (ranges == 1)
            fit_codes(fit, group, inverse, 1, weighted);
        else
            fit_codes(fit, group, inverse, RANGE_COUNT, weighted);
        for (int range = 0; range < ranges; range++) {
            if (!(fit[range].qq > 0))
                continue;
            float scale = fit[range].xq / fit[range].qq;
            float gain = fit[range].xq * scale;
            if (gain > best_gain) {
                best_gain = gain;
                best_scale = scale;
                best_range = (enum code_range)range;
            }
        }
    }
    float stored = best_scale * 0x1p8f; // 2^-WEIGHT_INT4_SCALE_EXPONENT
    stored = stored < F16_MAX ? stored : F16_MAX;
    return f32_to_f16(best_range == RANGE_POSITIVE ? stored : -stored);
}

static float int4_scale(uint16_t stored) { return f16_to_f32(stored) * 0x1p-8f; }
_Static_assert(WEIGHT_INT4_SCALE_EXPONENT == -8, "the two factors above");

// Quantizes one group of `count` values whose largest magnitude is `largest`, importance a (or NULL).
static uint16_t quantize_group(int8_t *q, const float *x, const float *a, uint32_t count)
{
    float largest = 0;
    for (uint32_t i = 0; i < count; i++) {
        float magnitude = x[i] < 0 ? -x[i] : x[i];
        largest = magnitude > largest ? magnitude : largest;
    }
    uint16_t stored = 0;
    if (largest >= 0x1p-34f) { // below, every scale rounds to zero; stay clear of subnormal reciprocals
        float padded_x[MAX_GROUP], padded_a[MAX_GROUP], ax[MAX_GROUP];
        struct group group = {.x = x, .ax = x, .count = (int)round_up(count, LANES)};
        if (count % LANES) {
            memset(padded_x, 0, sizeof padded_x);
            memcpy(padded_x, x, count * sizeof *x);
            group.x = group.ax = padded_x;
        }
        float heaviest = 0;
        for (uint32_t i = 0; a && i < count; i++)
            heaviest = a[i] > heaviest ? a[i] : heaviest;
        if (a && heaviest >= FLT_MIN && heaviest <= FLT_MAX) {
            memset(padded_a, 0, sizeof padded_a);
            memset(ax, 0, sizeof ax);
            for (uint32_t i = 0; i < count; i++) {
                padded_a[i] = a[i] / heaviest;
                ax[i] = padded_a[i] * x[i];
            }
            group.a = padded_a;
            group.ax = ax;
            stored = search_scale(&group, largest, true);
        } else { // no importance given, or none at all in this group
            stored = search_scale(&group, largest, false);
        }
    }
    float scale = int4_scale(stored);
    if (scale == 0) {
        memset(q, 0, count);
        return 0; // not -0: one spelling
    }
    float inverse = 1.0f / scale;
    for (uint32_t i = 0; i < count; i++)
        q[i] = f32_to_int4(x[i] * inverse);
    return stored;
}

// ---- quantizing rows ------------------------------------------------------------------------------------------------

// Largest magnitude as bits of an f32: above 0x7f800000 there is a NaN, at it an Inf.
static uint32_t largest_magnitude_bits(const float *x, uint64_t cols)
{
    uint32_t largest = 0;
    for (uint64_t i = 0; i < cols; i++) {
        uint32_t bits = f32_bits(x[i]) & 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    return largest;
}

static int report_not_finite(enum weight_kind kind, const float *x, uint64_t cols, struct error *err)
{
    uint64_t col = 0;
    while (col < cols && (f32_bits(x[col]) & 0x7fffffff) < 0x7f800000)
        col++;
    bool nan = (f32_bits(x[col]) & 0x7fffffff) > 0x7f800000;
    return error_set(err, ERR_MODEL, "column %llu is %s, which %s cannot store; repair the checkpoint or use bf16",
                     (unsigned long long)col, nan ? "NaN" : "infinite", weight_kind_name(kind));
}

// Scale of a row whose largest magnitude shall become `top`; 0 for a row of zeros (or of what rounds to zeros).
static float row_scale(uint32_t largest_bits, float top)
{
    float scale = f32_from_bits(largest_bits) / top;
    if (scale * top > FLT_MAX) // rounded up
        scale = f32_from_bits(f32_bits(scale) - 1);
    return scale >= FLT_MIN ? scale : 0; // a subnormal scale would have no reciprocal
}

int pack_quantize_row(struct packed_row *out, enum weight_kind kind, uint32_t group_size, const float *x, uint64_t cols,
                      const float *weight, struct error *err)
{
    if (kind == WEIGHT_F32) {
        if (cols)
            memcpy(out->f32, x, cols * sizeof *x);
        return 0;
    }
    if (kind == WEIGHT_BF16) {
        for (uint64_t i = 0; i < cols; i++) {
            uint32_t bits = f32_bits(x[i]);
            out->bf16[i] = bits & 0xffff ? f32_to_bf16(x[i]) : (uint16_t)(bits >> 16); // even a signalling NaN
        }
        return 0;
    }

    uint32_t largest = largest_magnitude_bits(x, cols);
    if (largest >= 0x7f800000)
        return report_not_finite(kind, x, cols, err);
    if (kind == WEIGHT_INT8) {
        out->scale = row_scale(largest, 127.0f);
        float inverse = out->scale > 0 ? 1.0f / out->scale : 0;
        for (uint64_t i = 0; i < cols; i++)
            out->q[i] = f32_to_int8(x[i] * inverse);
    } else if (kind == WEIGHT_FP8) {
        out->scale = row_scale(largest, E4M3_MAX);
        float inverse = out->scale > 0 ? 1.0f / out->scale : 0;
        for (uint64_t i = 0; i < cols; i++)
            out->e4m3[i] = f32_to_e4m3(x[i] * inverse);
    } else {
        for (uint64_t begin = 0; begin < cols; begin += group_size) {
            uint32_t count = cols - begin < group_size ? (uint32_t)(cols - begin) : group_size;
            out->scale_f16[begin / group_size] =
                quantize_group(out->q + begin, x + begin, weight ? weight + begin : NULL, count);
        }
    }
    return 0;
}

void pack_dequantize_row(float *out, const struct packed_row *row, enum weight_kind kind, uint32_t group_size,
                         uint64_t cols)
{
    switch (kind) {
    case WEIGHT_F32:
        if (cols)
            memcpy(out, row->f32, cols * sizeof *out);
        break;
    case WEIGHT_BF16:
        for (uint64_t i = 0; i < cols; i++)
            out[i] = bf16_to_f32(row->bf16[i]);
        break;
    case WEIGHT_INT8:
        for (uint64_t i = 0; i < cols; i++)
            out[i] = (float)row->q[i] * row->scale;
        break;
    case WEIGHT_FP8:
        for (uint64_t i = 0; i < cols; i++)
            out[i] = e4m3_to_f32(row->e4m3[i]) * row->scale;
        break;
    default:
        for (uint64_t i = 0; i < cols; i++)
            out[i] = (float)row->q[i] * int4_scale(row->scale_f16[i / group_size]);
        break;
    }
}

// ---- stored layouts -------------------------------------------------------------------------------------------------

uint64_t pack_block_data_bytes(const struct weight_shape *shape)
{
    uint64_t elems = WEIGHT_ROW_UNIT * shape->cols_padded;
    return shape->kind == WEIGHT_INT4 ? elems / 2 : elems * code_bytes(shape->kind);
}

uint64_t pack_block_scale_bytes(const struct weight_shape *shape)
{
    switch (shape->kind) {
    case WEIGHT_INT8:
    case WEIGHT_FP8:
        return WEIGHT_ROW_UNIT * sizeof(float);
    case WEIGHT_INT4:
        return WEIGHT_ROW_UNIT * (shape->cols_padded / shape->group_size) * sizeof(uint16_t);
    default:
        return 0;
    }
}

// T16x64, see weight_int4_offset: the 64 codes of one row in one tile lie in 64 consecutive bytes, one nibble each.
// tile_col[b] is the column that byte b holds: b = 16t + 4w + j, column 16w + 2t + {0, 8, 1, 9}[j].
static const uint8_t tile_col[WEIGHT_COL_UNIT] = {
    0,  8,  1,  9,  16, 24, 17, 25, 32, 40, 33, 41, 48, 56, 49, 57, 2,  10, 3,  11, 18, 26,
    19, 27, 34, 42, 35, 43, 50, 58, 51, 59, 4,  12, 5,  13, 20, 28, 21, 29, 36, 44, 37, 45,
    52, 60, 53, 61, 6,  14, 7,  15, 22, 30, 23, 31, 38, 46, 39, 47, 54, 62, 55, 63,
};

enum { TILE_ROWS = 16, TILE_COLUMN_BYTES = WEIGHT_ROW_UNIT / TILE_ROWS * WEIGHT_TILE_BYTES };

// One row of T16x64 in a block of 64 rows: the byte of its first column (the next 64 columns lie TILE_COLUMN_BYTES
// further), its nibble, and the index of its first group's scale (the next lies TILE_ROWS further).
struct int4_row {
    uint64_t first_byte, first_scale;
    int shift;
};

static struct int4_row int4_row(const struct weight_shape *shape, uint64_t row)
{
    uint64_t groups = shape->cols_padded / shape->group_size;
    return (struct int4_row){
        .first_byte = row / TILE_ROWS * WEIGHT_TILE_BYTES + row % 8 * WEIGHT_COL_UNIT,
        .first_scale = row / TILE_ROWS * groups * TILE_ROWS + row % TILE_ROWS,
        .shift = row % TILE_ROWS < 8 ? 0 : 4,
    };
}

static void store_int4(uint8_t *data, uint16_t *scale, const struct weight_shape *shape, uint64_t row,
                       const struct packed_row *in, uint64_t col_begin)
{
    struct int4_row at = int4_row(shape, row);
    uint8_t keep = (uint8_t)(0xf0 >> at.shift);
    uint8_t *to = data + at.first_byte;
    for (uint64_t col = 0; col < shape->cols; col += WEIGHT_COL_UNIT, to += TILE_COLUMN_BYTES) {
        const int8_t *codes = in->q + col_begin + col;
        int8_t padded[WEIGHT_COL_UNIT] = {0};
        if (shape->cols - col < WEIGHT_COL_UNIT) {
            memcpy(padded, codes, shape->cols - col);
            codes = padded;
        }
        for (int b = 0; b < WEIGHT_COL_UNIT; b++)
            to[b] = (uint8_t)((to[b] & keep) | (codes[tile_col[b]] & 15) << at.shift);
    }
    const uint16_t *from = in->scale_f16 + col_begin / shape->group_size;
    for (uint64_t g = 0; g < div_up(shape->cols, shape->group_size); g++)
        scale[at.first_scale + g * TILE_ROWS] = from[g];
}

static void load_int4(struct packed_row *out, uint64_t col_begin, const uint8_t *data, const uint16_t *scale,
                      const struct weight_shape *shape, uint64_t row)
{
    struct int4_row at = int4_row(shape, row);
    const uint8_t *from = data + at.first_byte;
    for (uint64_t col = 0; col < shape->cols; col += WEIGHT_COL_UNIT, from += TILE_COLUMN_BYTES) {
        int8_t codes[WEIGHT_COL_UNIT];
        for (int b = 0; b < WEIGHT_COL_UNIT; b++)
            codes[tile_col[b]] = int4_sign_extend((uint8_t)(from[b] >> at.shift));
        uint64_t left = shape->cols - col;
        memcpy(out->q + col_begin + col, codes, left < WEIGHT_COL_UNIT ? left : WEIGHT_COL_UNIT);
    }
    uint16_t *to = out->scale_f16 + col_begin / shape->group_size;
    for (uint64_t g = 0; g < div_up(shape->cols, shape->group_size); g++)
        to[g] = scale[at.first_scale + g * TILE_ROWS];
}

// Column `col` of a packed row, whatever its kind.
static void *packed_codes(const struct packed_row *row, enum weight_kind kind, uint64_t col)
{
    switch (kind) {
    case WEIGHT_F32:
        return row->f32 + col;
    case WEIGHT_BF16:
        return row->bf16 + col;
    case WEIGHT_FP8:
        return row->e4m3 + col;
    default:
        return row->q + col;
    }
}

void pack_store_row(void *data, void *scale, const struct weight_shape *shape, uint64_t block_row, uint64_t row,
                    const struct packed_row *in, uint64_t col_begin)
{
    if (!shape->cols && !shape->scale_bytes)
        return;
    row -= block_row;
    uint64_t block = row / WEIGHT_ROW_UNIT;
    uint8_t *to = (uint8_t *)data + block * pack_block_data_bytes(shape);
    if (shape->kind == WEIGHT_INT4) {
        uint16_t *scales = (uint16_t *)scale + block * pack_block_scale_bytes(shape) / sizeof(uint16_t);
        store_int4(to, scales, shape, row % WEIGHT_ROW_UNIT, in, col_begin);
        return;
    }
    uint64_t unit = code_bytes(shape->kind);
    if (shape->cols)
        memcpy(to + row % WEIGHT_ROW_UNIT * shape->cols_padded * unit, packed_codes(in, shape->kind, col_begin),
               shape->cols * unit);
    if (shape->scale_bytes)
        ((float *)scale)[row] = in->scale;
}

void pack_load_row(struct packed_row *out, uint64_t col_begin, const void *data, const void *scale,
                   const struct weight_shape *shape, uint64_t row)
{
    if (!shape->cols && !shape->scale_bytes)
        return;
    uint64_t block = row / WEIGHT_ROW_UNIT;
    const uint8_t *from = (const uint8_t *)data + block * pack_block_data_bytes(shape);
    if (shape->kind == WEIGHT_INT4) {
        const uint16_t *scales = (const uint16_t *)scale + block * pack_block_scale_bytes(shape) / sizeof(uint16_t);
        load_int4(out, col_begin, from, scales, shape, row % WEIGHT_ROW_UNIT);
        return;
    }
    uint64_t unit = code_bytes(shape->kind);
    if (shape->cols)
        memcpy(packed_codes(out, shape->kind, col_begin), from + row % WEIGHT_ROW_UNIT * shape->cols_padded * unit,
               shape->cols * unit);
    if (shape->scale_bytes)
        out->scale = ((const float *)scale)[row];
}
