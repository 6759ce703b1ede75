// Quantizers: codes and scales for rows of weights. See pack.h.
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

// ---- groups ---------------------------------------------------------------------------------------------------------

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

// Where a group that must be padded or weighted is kept.
struct group_room {
    float x[MAX_GROUP], a[MAX_GROUP], ax[MAX_GROUP];
};

// `count` values with importance a (or NULL). No importance at all in this group is none.
static struct group group_make(struct group_room *room, const float *x, const float *a, uint32_t count)
{
    struct group group = {.x = x, .ax = x, .count = (int)round_up(count, LANES)};
    if (count % LANES) {
        memset(room->x, 0, sizeof room->x);
        memcpy(room->x, x, count * sizeof *x);
        group.x = group.ax = room->x;
    }
    float heaviest = 0;
    for (uint32_t i = 0; a && i < count; i++)
        heaviest = a[i] > heaviest ? a[i] : heaviest;
    if (!a || !(heaviest >= FLT_MIN && heaviest <= FLT_MAX))
        return group;
    memset(room->a, 0, sizeof room->a);
    memset(room->ax, 0, sizeof room->ax);
    for (uint32_t i = 0; i < count; i++) {
        room->a[i] = a[i] / heaviest;
        room->ax[i] = room->a[i] * x[i];
    }
    group.a = room->a;
    group.ax = room->ax;
    return group;
}

// Magnitudes of finite numbers are in the order of their bits.
static float largest_magnitude(const float *x, uint64_t count)
{
    float largest = 0;
    uint64_t i = 0;
#ifdef __SSE2__
    const quad magnitude = (quad)_mm_castsi128_ps(_mm_set1_epi32(0x7fffffff));
    quad most[LANES / QUAD] = {quad_all(0), quad_all(0), quad_all(0), quad_all(0)};
    for (; i + LANES <= count; i += LANES)
        for (int lane = 0; lane < LANES / QUAD; lane++)
            most[lane] =
                quad_max((quad)_mm_and_ps((__m128)quad_load(x + i + lane * QUAD), (__m128)magnitude), most[lane]);
    most[0] = quad_max(quad_max(most[0], most[1]), quad_max(most[2], most[3]));
    for (int lane = 0; lane < QUAD; lane++)
        largest = most[0][lane] > largest ? most[0][lane] : largest;
#endif
    for (; i < count; i++) {
        float one = x[i] < 0 ? -x[i] : x[i];
        largest = one > largest ? one : largest;
    }
    return largest;
}

// The bits of a scale > 0, clamped to what f16 holds.
static uint16_t int4_scale_bits(float scale)
{
    float stored = scale / WEIGHT_INT4_FACTOR;
    return f32_to_f16(stored < F16_MAX ? stored : F16_MAX);
}

// Below, every scale rounds to zero; stay clear of subnormal reciprocals.
#define INT4_SMALLEST 0x1p-34f

// q[i] = f32_to_int4(x[i] * inverse + zero) of finite numbers, where zero is no NaN.
static void round_codes(int8_t *q, const float *x, uint32_t count, float inverse, float zero)
{
    uint32_t i = 0;
#ifdef __SSE2__
    const quad inverses = quad_all(inverse), zeros = quad_all(zero), round = quad_all(12582912.0f); // see fit_codes
    for (; i + LANES <= count; i += LANES) {
        __m128i codes[LANES / QUAD];
        for (int lane = 0; lane < LANES / QUAD; lane++) {
            quad code = quad_load(x + i + lane * QUAD) * inverses + zeros;
            code = quad_max(quad_min(code, quad_all(7.0f)), quad_all(-8.0f)) + round; // its lowest bits are the integer
            codes[lane] = _mm_and_si128(_mm_castps_si128((__m128)code), _mm_set1_epi32(0xff));
        }
        __m128i low = _mm_packs_epi32(codes[0], codes[1]), high = _mm_packs_epi32(codes[2], codes[3]);
        _mm_storeu_si128((__m128i *)(q + i), _mm_packus_epi16(low, high));
    }
#endif
    for (; i < count; i++)
        q[i] = f32_to_int4(x[i] * inverse + zero);
}

// ---- int4: the scale of a group -------------------------------------------------------------------------------------

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
    uint16_t bits = int4_scale_bits(best_scale);
    return best_range == RANGE_POSITIVE ? bits : bits | 0x8000;
}

// Quantizes one group of `count` values, importance a (or NULL); returns its scale.
static uint16_t quantize_int4_group(int8_t *q, const float *x, const float *a, uint32_t count,
                                    enum weight_scales scales)
{
    float largest = largest_magnitude(x, count);
    uint16_t stored = 0;
    if (largest >= INT4_SMALLEST && scales == WEIGHT_SCALES_LARGEST) {
        stored = int4_scale_bits(largest / 7.0f);
    } else if (largest >= INT4_SMALLEST) {
        struct group_room room;
        struct group group = group_make(&room, x, a, count);
        stored = group.a ? search_scale(&group, largest, true) : search_scale(&group, largest, false);
    }
    float scale = weight_int4_scale(stored);
    if (scale == 0) {
        memset(q, 0, count);
        return 0; // not -0: one spelling
    }
    round_codes(q, x, count, 1.0f / scale, 0);
    return stored;
}

// ---- int4z: scale and zero of a group -------------------------------------------------------------------------------

// Sums over a group for the codes q = rint(x * inverse + zero), clamped to -8..7.
struct affine_fit {
    float q, qq, xq; // sums of a * q, a * q * q, a * x * q
};

static struct affine_fit fit_affine(const struct group *group, float inverse, float zero)
{
    const quad round = quad_all(12582912.0f), inverses = quad_all(inverse), zeros = quad_all(zero);
    const quad seven = quad_all(7.0f), eight = quad_all(8.0f);
    quad sum_q[LANES / QUAD], sum_qq[LANES / QUAD], sum_xq[LANES / QUAD];
    for (int lane = 0; lane < LANES / QUAD; lane++) {
        quad aq_sum = quad_all(0), aqq_sum = quad_all(0), axq_sum = quad_all(0);
        for (int i = lane * QUAD; i < group->count; i += LANES) {
            quad q = quad_max(quad_min(quad_load(group->x + i) * inverses + zeros, seven), -eight) + round - round;
            quad aq = quad_load(group->a + i) * q;
            aq_sum += aq;
            aqq_sum += aq * q;
            axq_sum += quad_load(group->ax + i) * q;
        }
        sum_q[lane] = aq_sum, sum_qq[lane] = aqq_sum, sum_xq[lane] = axq_sum;
    }
    return (struct affine_fit){lanes_sum(sum_q), lanes_sum(sum_qq), lanes_sum(sum_xq)};
}

static float group_sum(const float *x, int count)
{
    quad sum[LANES / QUAD];
    for (int lane = 0; lane < LANES / QUAD; lane++) {
        sum[lane] = quad_all(0);
        for (int i = lane * QUAD; i < count; i += LANES)
            sum[lane] += quad_load(x + i);
    }
    return lanes_sum(sum);
}

struct affine {
    float scale, zero; // x ~ (q - zero) * scale
};

// Codes -8 and 7 at the ends of the values.
static struct affine whole_range(float low, float high)
{
    float scale = (high - low) / 15.0f;
    return (struct affine){scale, -8.0f - low / scale};
}

// For given codes the best line x ~ scale * q + offset is the closed form of least squares; it leaves the squared error
// sum(a x^2) - (scale * sum(a x q) + offset * sum(a x)), so the best candidate is the one that takes the most away.
// Candidates: codes -8 and 7 at the ends low <= 0 <= high of the values, each end shrunk by up to 24 %.
static struct affine search_affine(const struct group *group, float low, float high)
{
    enum { STEPS = 5 };
    float weight = group_sum(group->a, group->count), x = group_sum(group->ax, group->count), best_gain = -1.0f;
    struct affine best = whole_range(low, high);
    for (int i = 0; i < STEPS * STEPS; i++) {
        int low_step = i / STEPS, high_step = i % STEPS;
        float from = low * (1.0f - 0.06f * (float)low_step), to = high * (1.0f - 0.06f * (float)high_step);
        float inverse = 15.0f / (to - from);
        struct affine_fit fit = fit_affine(group, inverse, -8.0f - from * inverse);
        float spread = weight * fit.qq - fit.q * fit.q;
        if (!(spread > 1e-4f * weight * fit.qq)) // one code for all: no line
            continue;
        float scale = (weight * fit.xq - fit.q * x) / spread, offset = (x - scale * fit.q) / weight;
        float gain = scale * fit.xq + offset * x;
        if (gain > best_gain && scale > 0) {
            best_gain = gain;
            best = (struct affine){scale, -offset / scale};
        }
    }
    return best;
}

// The line is searched on values divided by the largest magnitude, so that no sum leaves the range of f32.
static void quantize_int4z_group(int8_t *q, uint16_t *scale_f16, uint16_t *zero_f16, const float *x, const float *a,
                                 uint32_t count, enum weight_scales scales)
{
    float largest = largest_magnitude(x, count);
    *scale_f16 = *zero_f16 = 0;
    if (largest >= INT4_SMALLEST) {
        struct group_room room;
        float unit[MAX_GROUP], ones[MAX_GROUP], low = 0, high = 0;
        for (uint32_t i = 0; i < count; i++) {
            unit[i] = x[i] / largest;
            ones[i] = 1.0f;
            low = unit[i] < low ? unit[i] : low;
            high = unit[i] > high ? unit[i] : high;
        }
        struct group group = group_make(&room, unit, a, count);
        if (!group.a)
            group = group_make(&room, unit, ones, count);
        struct affine best = whole_range(low, high);
        if (scales == WEIGHT_SCALES_SEARCHED)
            best = search_affine(&group, low, high);
        // The zero that the rounded scale leaves best: the one that keeps scale * zero.
        *scale_f16 = int4_scale_bits(best.scale * largest);
        float zero = best.zero * (best.scale * largest) / weight_int4_scale(*scale_f16);
        zero = zero > -16.0f ? zero < 16.0f ? zero : 16.0f : -16.0f; // NaN and Inf where the scale is 0
        *zero_f16 = f32_to_f16(zero);
    }
    float scale = weight_int4_scale(*scale_f16), zero = f16_to_f32(*zero_f16);
    if (scale == 0)
        *zero_f16 = 0;
    if (scale > 0)
        round_codes(q, x, count, 1.0f / scale, zero);
    else
        memset(q, 0, count);
}

// ---- mxfp4, nvfp4: the scale of a group -----------------------------------------------------------------------------

// Squared error of e2m1 codes, in units of the scale.
static float fp4_error(const struct group *group, float inverse)
{
    float lane[LANES] = {0};
    for (int i = 0; i < group->count; i += LANES)
        for (int l = 0; l < LANES; l++) {
            float x = group->x[i + l] * inverse, rest = x - e2m1_to_f32(f32_to_e2m1(x));
            lane[l] += (group->a ? group->a[i + l] : 1.0f) * (rest * rest);
        }
    quad sum[LANES / QUAD];
    memcpy(sum, lane, sizeof sum);
    return lanes_sum(sum);
}

// Chooses among scale codes: value[i] is what code i multiplies e2m1 with. Returns the index of the one with the least squared
// error, the first of equals; -1 when none is a normal number.
static int best_fp4_scale(const struct group *group, const float *value, int count)
{
    float best_error = 0, unit = 0;
    int best = -1;
    for (int i = 0; i < count; i++) {
        if (!(value[i] >= FLT_MIN) || (i > 0 && value[i] == value[i - 1]))
            continue;
        unit = unit > 0 ? unit : value[i]; // errors are compared in units of the first scale: f32 holds their squares
        float ratio = value[i] / unit, error = fp4_error(group, 1.0f / value[i]) * (ratio * ratio);
        if (best < 0 || error < best_error) {
            best = i;
            best_error = error;
        }
    }
    return best;
}

static void fp4_codes(uint8_t *e2m1, const float *x, uint32_t count, float scale)
{
    float inverse = scale > 0 ? 1.0f / scale : 0;
    for (uint32_t i = 0; i < count; i++)
        e2m1[i] = f32_to_e2m1(x[i] * inverse);
}

static uint8_t quantize_mxfp4_group(uint8_t *e2m1, const float *x, const float *a, uint32_t count,
                                    enum weight_scales scales)
{
    int exponent = (int)(f32_bits(largest_magnitude(x, count)) >> 23) - 2; // of the largest value of e2m1: 2
    uint8_t code = (uint8_t)(exponent > 0 ? exponent : 0);
    const float value[] = {e8m0_to_f32(code), e8m0_to_f32((uint8_t)(code + 1))};
    struct group_room room;
    struct group group = group_make(&room, x, a, count);
    if (scales == WEIGHT_SCALES_SEARCHED && exponent > 0 && exponent < 252 &&
        best_fp4_scale(&group, value, 2) == 1) // 6 * 2^(253 - 127) is beyond f32
        code++;
    fp4_codes(e2m1, x, count, e8m0_to_f32(code));
    return code;
}

static uint8_t quantize_nvfp4_group(uint8_t *e2m1, const float *x, const float *a, uint32_t count, float global,
                                    enum weight_scales scales)
{
    static const float top[] = {6, 5.5f, 5, 4.5f, 4, 6.5f, 7, 7.5f};
    enum { CANDIDATES = sizeof top / sizeof *top };
    float largest = largest_magnitude(x, count), value[CANDIDATES];
    uint8_t code[CANDIDATES];
    for (int i = 0; i < CANDIDATES; i++) {
        code[i] = global > 0 ? f32_to_e4m3(largest / top[i] / global) : 0;
        if (!code[i])
            code[i] = 1; // the smallest, rather than nothing
        value[i] = e4m3_to_f32(code[i]) * global;
    }
    struct group_room room;
    struct group group = group_make(&room, x, a, count);
    int best = largest > 0 ? best_fp4_scale(&group, value, scales == WEIGHT_SCALES_SEARCHED ? (int)CANDIDATES : 1) : -1;
    fp4_codes(e2m1, x, count, best < 0 ? 0 : value[best]);
    return best < 0 ? 0 : code[best];
}

// ---- quantizing rows ------------------------------------------------------------------------------------------------

// Or Inf.
static bool has_nan(const float *x, uint64_t cols)
{
    quad sum = quad_all(0); // Inf * 0 is a NaN as well, and stays one in the sum
    uint64_t i = 0;
    for (; i + QUAD <= cols; i += QUAD)
        sum += quad_load(x + i) * quad_all(0);
    float rest = sum[0] + sum[1] + sum[2] + sum[3];
    for (; i < cols; i++)
        rest += x[i] * 0;
    return rest != 0;
}

// Largest magnitude as bits of an f32: above 0x7f800000 there is a NaN, at it an Inf.
static uint32_t largest_magnitude_bits(const float *x, uint64_t cols)
{
    uint32_t largest = 0;
    if (!has_nan(x, cols))
        return f32_bits(largest_magnitude(x, cols));
    for (uint64_t i = 0; i < cols; i++) {
        uint32_t bits = f32_bits(x[i]) & 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    return largest;
}

// Of finite numbers.
static void round_bf16(uint16_t *out, const float *x, uint64_t cols)
{
    uint64_t i = 0;
#ifdef __SSE2__
    for (; i + 2 * QUAD <= cols; i += 2 * QUAD) {
        __m128i half[2];
        for (int h = 0; h < 2;
             h++) { // to nearest, ties to even: half of the last place less one, and one more where it is odd
            __m128i bits = _mm_castps_si128((__m128)quad_load(x + i + h * QUAD));
            __m128i odd = _mm_and_si128(_mm_srli_epi32(bits, 16), _mm_set1_epi32(1));
            half[h] = _mm_srai_epi32(_mm_add_epi32(_mm_add_epi32(bits, _mm_set1_epi32(0x7fff)), odd), 16);
        }
        _mm_storeu_si128((__m128i *)(out + i), _mm_packs_epi32(half[0], half[1]));
    }
#endif
    for (; i < cols; i++)
        out[i] = f32_to_bf16(x[i]);
}

// Magnitudes from here on are no weights: Inf and NaN, and what bf16 would round to Inf.
static uint32_t not_finite_bits(enum weight_kind kind) { return kind == WEIGHT_BF16 ? 0x7f7f8000 : 0x7f800000; }

static int report_not_finite(enum weight_kind kind, const float *x, uint64_t cols, struct error *err)
{
    uint64_t col = 0;
    uint32_t bits = 0;
    while (col < cols && (bits = f32_bits(x[col]) & 0x7fffffff) < not_finite_bits(kind))
        col++;
    return error_set(err, ERR_MODEL, "column %llu is %s; repair the checkpoint", (unsigned long long)col,
                     bits > 0x7f800000    ? "NaN"
                     : bits == 0x7f800000 ? "infinite"
                                          : "too large for bf16");
}

// Scale of a row whose largest magnitude shall become `top`; 0 for a row of zeros (or of what rounds to zeros).
static float row_scale(uint32_t largest_bits, float top)
{
    float scale = f32_from_bits(largest_bits) / top;
    if (scale * top > FLT_MAX) // rounded up
        scale = f32_from_bits(f32_bits(scale) - 1);
    return scale >= FLT_MIN ? scale : 0; // a subnormal scale would have no reciprocal
}

static void quantize_fp8(uint8_t *e4m3, float *scale, const float *x, uint64_t cols, uint32_t largest_bits)
{
    *scale = row_scale(largest_bits, E4M3_MAX);
    float inverse = *scale > 0 ? 1.0f / *scale : 0;
    for (uint64_t i = 0; i < cols; i++)
        e4m3[i] = f32_to_e4m3(x[i] * inverse);
}

// One group of a kind that has them; a: importance or NULL.
static void quantize_group(struct packed_row *out, enum weight_kind kind, uint64_t group, uint64_t begin,
                           const float *x, const float *a, uint32_t count, enum weight_scales scales)
{
    switch (kind) {
    case WEIGHT_INT4:
        out->scale_f16[group] = quantize_int4_group(out->q + begin, x, a, count, scales);
        break;
    case WEIGHT_INT4Z:
        quantize_int4z_group(out->q + begin, &out->scale_f16[group], &out->zero_f16[group], x, a, count, scales);
        break;
    case WEIGHT_FP8G:
        quantize_fp8(out->e4m3 + begin, &out->scale_f32[group], x, count, largest_magnitude_bits(x, count));
        break;
    case WEIGHT_MXFP4:
        out->scale_u8[group] = quantize_mxfp4_group(out->e2m1 + begin, x, a, count, scales);
        break;
    case WEIGHT_NVFP4:
        out->scale_u8[group] = quantize_nvfp4_group(out->e2m1 + begin, x, a, count, out->scale, scales);
        break;
    default:
        break;
    }
}

static int quantize_row(struct packed_row *out, enum weight_kind kind, uint32_t group_size, const float *x,
                        uint64_t cols, const float *weight, enum weight_scales scales, struct error *err)
{
    uint32_t largest = largest_magnitude_bits(x, cols);
    if (largest >= not_finite_bits(kind))
        return report_not_finite(kind, x, cols, err);
    if (kind == WEIGHT_F32) {
        if (cols)
            memcpy(out->f32, x, cols * sizeof *x);
    } else if (kind == WEIGHT_BF16) {
        round_bf16(out->bf16, x, cols);
    } else if (kind == WEIGHT_INT8) {
        out->scale = row_scale(largest, 127.0f);
        float inverse = out->scale > 0 ? 1.0f / out->scale : 0;
        for (uint64_t i = 0; i < cols; i++)
            out->q[i] = f32_to_int8(x[i] * inverse);
    } else if (kind == WEIGHT_FP8) {
        quantize_fp8(out->e4m3, &out->scale, x, cols, largest);
    } else {
        if (kind == WEIGHT_NVFP4)
            out->scale = row_scale(largest, E2M1_MAX * E4M3_MAX);
        for (uint64_t begin = 0; begin < cols; begin += group_size) {
            uint32_t count = cols - begin < group_size ? (uint32_t)(cols - begin) : group_size;
            quantize_group(out, kind, begin / group_size, begin, x + begin, weight ? weight + begin : NULL, count,
                           scales);
        }
    }
    return 0;
}

int pack_quantize_row(struct packed_row *out, enum weight_kind kind, uint32_t group_size, const float *x, uint64_t cols,
                      const float *weight, struct error *err)
{
    return quantize_row(out, kind, group_size, x, cols, weight, WEIGHT_SCALES_SEARCHED, err);
}

int pack_round_row(struct packed_row *out, enum weight_kind kind, uint32_t group_size, const float *x, uint64_t cols,
                   struct error *err)
{
    return quantize_row(out, kind, group_size, x, cols, NULL, WEIGHT_SCALES_LARGEST, err);
}
