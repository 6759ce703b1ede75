// Quantizers: codes and scales for rows of weights, see pack.h. The including file is compiled for one instruction set, and defines
// PACK_TARGET, the table's name, and PACK_TARGET_NAME.
//
// Same bytes everywhere: every sum runs in LANES partial sums that are combined in one fixed tree, so the order of the
// additions does not depend on the width of a vector; nothing calls libm; no product is fused into a sum
// (-ffp-contract=off).
#include "kernels/pack.h"

#include "formats/checked.h"
#include "formats/number_formats.h"
#include "kernels/vectors.h"

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <string.h>
#ifdef __SSE2__
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512DQ__)
enum { WIDTH = 16 };
#elif defined(__AVX2__)
enum { WIDTH = 8 };
#else
enum { WIDTH = 4 };
#endif
enum { MAX_GROUP = 128, PARTS = LANES / WIDTH };

// ---- groups ---------------------------------------------------------------------------------------------------------

// As many lanes as one register holds.
typedef float part __attribute__((vector_size(WIDTH * sizeof(float))));

// a < b ? a : b and a > b ? a : b, element by element. Compilers turn neither into one instruction by themselves.
static inline part part_min(part a, part b)
{
#if defined(__AVX512F__) && defined(__AVX512DQ__)
    return (part)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (part)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
    return (part)_mm_min_ps((__m128)a, (__m128)b);
#else
    for (int i = 0; i < WIDTH; i++)
        a[i] = a[i] < b[i] ? a[i] : b[i];
    return a;
#endif
}

static inline part part_max(part a, part b)
{
#if defined(__AVX512F__) && defined(__AVX512DQ__)
    return (part)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (part)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
    return (part)_mm_max_ps((__m128)a, (__m128)b);
#else
    for (int i = 0; i < WIDTH; i++)
        a[i] = a[i] > b[i] ? a[i] : b[i];
    return a;
#endif
}

static inline part part_load(const float *from)
{
    part value;
    memcpy(&value, from, sizeof value);
    return value;
}

static inline part part_all(float value) { return value - (part){0}; } // -0 stays what it is

typedef float quad __attribute__((vector_size(4 * sizeof(float))));
typedef int32_t quad_index __attribute__((vector_size(4 * sizeof(int32_t))));

// Lane l of LANES holds the terms l, l + LANES, ... The tree: lanes l + 8, then + 4; lanes_sum adds + 2 and + 1.
static inline quad lanes_quad(const part lanes[PARTS])
{
    quad four[LANES / 4];
    memcpy(four, lanes, sizeof four);
    return (four[0] + four[2]) + (four[1] + four[3]);
}

static inline float lanes_sum(const part lanes[PARTS])
{
    quad sum = lanes_quad(lanes);
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

// The sums of four at once.
static inline quad lanes_sums(const part a[PARTS], const part b[PARTS], const part c[PARTS], const part d[PARTS])
{
    quad qa = lanes_quad(a), qb = lanes_quad(b), qc = lanes_quad(c), qd = lanes_quad(d);
    quad ab = VECTOR_SHUFFLE(quad_index, qa, qb, 0, 4, 1, 5) + VECTOR_SHUFFLE(quad_index, qa, qb, 2, 6, 3, 7);
    quad cd = VECTOR_SHUFFLE(quad_index, qc, qd, 0, 4, 1, 5) + VECTOR_SHUFFLE(quad_index, qc, qd, 2, 6, 3, 7);
    return VECTOR_SHUFFLE(quad_index, ab, cd, 0, 1, 4, 5) + VECTOR_SHUFFLE(quad_index, ab, cd, 2, 3, 6, 7);
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

// Of finite numbers.
static float largest_magnitude(const float *x, uint64_t count)
{
    float largest = 0;
    uint64_t i = 0;
    part most[PARTS];
    for (int lane = 0; lane < PARTS; lane++)
        most[lane] = part_all(0);
    for (; i + LANES <= count; i += LANES)
        for (int lane = 0; lane < PARTS; lane++) {
            part values = part_load(x + i + lane * WIDTH);
            most[lane] = part_max(part_max(values, -values), most[lane]);
        }
    float lanes[LANES];
    memcpy(lanes, most, sizeof lanes);
    for (int lane = 0; lane < LANES / 2; lane++)
        lanes[lane] = lanes[lane] > lanes[lane + LANES / 2] ? lanes[lane] : lanes[lane + LANES / 2];
    for (int lane = 0; lane < LANES / 4; lane++)
        lanes[lane] = lanes[lane] > lanes[lane + LANES / 4] ? lanes[lane] : lanes[lane + LANES / 4];
    for (int lane = 1; lane < LANES / 4; lane++)
        lanes[0] = lanes[lane] > lanes[0] ? lanes[lane] : lanes[0];
    largest = lanes[0];
    for (; i < count; i++) {
        float one = x[i] < 0 ? -x[i] : x[i];
        largest = one > largest ? one : largest;
    }
    return largest;
}

// The bits of a scale > 0 that is stored divided by `factor`, clamped to what f16 holds.
static uint16_t scale_bits(float scale, float factor)
{
    float stored = scale / factor;
    return f32_to_f16(stored < F16_MAX ? stored : F16_MAX);
}
static uint16_t int4_scale_bits(float scale) { return scale_bits(scale, WEIGHT_INT4_FACTOR); }

// Below, every scale rounds to zero; stay clear of subnormal reciprocals.
#define INT4_SMALLEST 0x1p-34f

// The lowest byte of each of LANES words.
static inline void store_low_bytes(int8_t *q, const part words[PARTS])
{
#if defined(__AVX512F__) && defined(__AVX512DQ__)
    _mm_storeu_si128((__m128i *)q, _mm512_cvtepi32_epi8(_mm512_castps_si512((__m512)words[0])));
#elif defined(__SSE2__)
    __m128i quads[LANES / 4];
    memcpy(quads, words, sizeof quads);
    for (int i = 0; i < LANES / 4; i++)
        quads[i] = _mm_and_si128(quads[i], _mm_set1_epi32(0xff));
    __m128i low = _mm_packs_epi32(quads[0], quads[1]), high = _mm_packs_epi32(quads[2], quads[3]);
    _mm_storeu_si128((__m128i *)q, _mm_packus_epi16(low, high));
#else
    uint32_t bits[LANES];
    memcpy(bits, words, sizeof bits);
    for (int i = 0; i < LANES; i++)
        q[i] = (int8_t)(uint8_t)bits[i];
#endif
}

// q[i] = f32_to_int_clamped(x[i] * inverse + zero, low, high) of finite numbers, where zero is no NaN.
static inline void round_codes(int8_t *q, const float *x, uint64_t count, float inverse, float zero, float low,
                               float high)
{
    const part inverses = part_all(inverse), zeros = part_all(zero), round = part_all(12582912.0f); // see fit_codes
    uint64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        part codes[PARTS];
        for (int lane = 0; lane < PARTS; lane++) {
            part code = part_load(x + i + lane * WIDTH) * inverses + zeros;
            codes[lane] =
                part_max(part_min(code, part_all(high)), part_all(low)) + round; // its lowest bits are the integer
        }
        store_low_bytes(q + i, codes);
    }
    for (; i < count; i++)
        q[i] = (int8_t)f32_to_int_clamped(x[i] * inverse + zero, low, high);
}

static void round_int4(int8_t *q, const float *x, uint64_t count, float inverse, float zero)
{
    round_codes(q, x, count, inverse, zero, -8.0f, 7.0f);
}

// ---- int4: the scale of a group -------------------------------------------------------------------------------------

// The two ranges of codes: a positive scale stores -8..7; a negative one stores the negated codes, hence -7..8.
enum code_range { RANGE_POSITIVE, RANGE_NEGATIVE, RANGE_COUNT };

// For the codes q = rint(x * inverse), clamped to each range, the sums of a * x * q and a * q * q: {xq, qq} of the positive one, then
// of the negative. `ranges` is 1 when every code lies in -7..7 by itself, so that both are the same; then the second is 0.
static inline quad fit_codes(const struct group *group, float inverse, const int ranges, const bool weighted)
{
    const part round = part_all(12582912.0f); // 1.5 * 2^23: adding it leaves no bits below one, rounded to even
    const part inverses = part_all(inverse), seven = part_all(7.0f), eight = part_all(8.0f);
    part xq[RANGE_COUNT][PARTS], qq[RANGE_COUNT][PARTS];
    for (int lane = 0; lane < PARTS; lane++) {
        part xq0 = part_all(0), qq0 = part_all(0), xq1 = part_all(0), qq1 = part_all(0);
        for (int i = lane * WIDTH; i < group->count; i += LANES) {
            part ax = part_load(group->ax + i);
            part x = weighted ? part_load(group->x + i) : ax;
            part code = x * inverses;
            if (ranges > 1)
                code = part_max(part_min(code, eight), -eight);
            code = code + round - round;
            part q = ranges > 1 ? part_min(code, seven) : code;
            part aq = weighted ? part_load(group->a + i) * q : q;
            xq0 += ax * q;
            qq0 += aq * q;
            if (ranges > 1) {
                q = part_max(code, -seven);
                aq = weighted ? part_load(group->a + i) * q : q;
                xq1 += ax * q;
                qq1 += aq * q;
            }
        }
        xq[0][lane] = xq0, qq[0][lane] = qq0, xq[1][lane] = xq1, qq[1][lane] = qq1;
    }
    return lanes_sums(xq[0], qq[0], xq[1], qq[1]);
}

// The scale of one group, as stored. For codes q the best scale is xq / qq, and it leaves the squared error
// sum(a x^2) - xq^2 / qq; so each candidate needs one pass, and the best is the one with the largest xq^2 / qq.
// Candidates: the largest magnitude at code 8 * f, f = 0.76 to 1.24 in steps of 0.02, in both ranges.
static inline uint16_t search_scale(const struct group *group, float largest, const bool weighted)
{
    enum { CANDIDATES = 25 };
    quad fits[CANDIDATES];
    for (int i = 0; i < CANDIDATES; i++) {
        int step = i - CANDIDATES / 2;
        float inverse = 1.0f / (largest * 0.125f * (1.0f + 0.02f * (float)step));
        if (largest * inverse < 7.49f) // below 7.5 nothing rounds to 8
            fits[i] = fit_codes(group, inverse, 1, weighted);
        else
            fits[i] = fit_codes(group, inverse, RANGE_COUNT, weighted);
    }
    float best_gain = -1.0f;
    float best_scale = largest * 0.125f; // stands when no element with a weight has a code
    enum code_range best_range = RANGE_POSITIVE;
    for (int i = 0; i < CANDIDATES; i++)
        for (int range = 0; range < RANGE_COUNT; range++) {
            float xq = fits[i][2 * range], qq = fits[i][2 * range + 1];
            if (!(qq > 0))
                continue;
            float scale = xq / qq, gain = xq * scale;
            if (gain > best_gain) {
                best_gain = gain;
                best_scale = scale;
                best_range = (enum code_range)range;
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
    round_int4(q, x, count, 1.0f / scale, 0);
    return stored;
}

// ---- int4z: scale and zero of a group -------------------------------------------------------------------------------

// Sums over a group for the codes q = rint(x * inverse + zero), clamped to -8..7.
struct affine_fit {
    float q, qq, xq; // sums of a * q, a * q * q, a * x * q
};

static struct affine_fit fit_affine(const struct group *group, float inverse, float zero)
{
    const part round = part_all(12582912.0f), inverses = part_all(inverse), zeros = part_all(zero);
    const part seven = part_all(7.0f), eight = part_all(8.0f);
    part sum_q[PARTS], sum_qq[PARTS], sum_xq[PARTS];
    for (int lane = 0; lane < PARTS; lane++) {
        part aq_sum = part_all(0), aqq_sum = part_all(0), axq_sum = part_all(0);
        for (int i = lane * WIDTH; i < group->count; i += LANES) {
            part q = part_max(part_min(part_load(group->x + i) * inverses + zeros, seven), -eight) + round - round;
            part aq = part_load(group->a + i) * q;
            aq_sum += aq;
            aqq_sum += aq * q;
            axq_sum += part_load(group->ax + i) * q;
        }
        sum_q[lane] = aq_sum, sum_qq[lane] = aqq_sum, sum_xq[lane] = axq_sum;
    }
    quad sums = lanes_sums(sum_q, sum_qq, sum_xq, sum_xq);
    return (struct affine_fit){sums[0], sums[1], sums[2]};
}

static float group_sum(const float *x, int count)
{
    part sum[PARTS];
    for (int lane = 0; lane < PARTS; lane++) {
        sum[lane] = part_all(0);
        for (int i = lane * WIDTH; i < count; i += LANES)
            sum[lane] += part_load(x + i);
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
        round_int4(q, x, count, 1.0f / scale, zero);
    else
        memset(q, 0, count);
}

#include "kernels/pack_nl4_impl.h"

// ---- mxfp4, nvfp4: the scale of a group -----------------------------------------------------------------------------

// e2m1_to_f32(f32_to_e2m1(x)) of magnitudes: from 1 to 6 a step is half the power of two below, and under 1 the same as above it.
static inline part round_e2m1(part magnitude)
{
    const part_bits exponent = (part_bits)part_all(INFINITY);
    magnitude = part_min(magnitude, part_all(E2M1_MAX));
    part power = (part)((part_bits)part_max(magnitude, part_all(1.0f)) & exponent);
    part round = power * part_all(6291456.0f); // adding it leaves no bits below half of power, see fit_codes
    return magnitude + round - round;
}

// Squared error of e2m1 codes, in units of the scale.
static float fp4_error(const struct group *group, float inverse)
{
    const part inverses = part_all(inverse);
    part sum[PARTS];
    for (int lane = 0; lane < PARTS; lane++) {
        sum[lane] = part_all(0);
        for (int i = lane * WIDTH; i < group->count; i += LANES) {
            part x = part_load(group->x + i) * inverses, magnitude = part_max(x, -x);
            part rest = magnitude - round_e2m1(magnitude), square = rest * rest;
            sum[lane] += group->a ? part_load(group->a + i) * square : square;
        }
    }
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
    uint32_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        uint8_t codes[LANES]; // of its own, so that the compiler sees that the loop can be made vectors of
        for (int lane = 0; lane < LANES; lane++)
            codes[lane] = f32_to_e2m1(x[i + lane] * inverse);
        memcpy(e2m1 + i, codes, sizeof codes);
    }
    for (; i < count; i++)
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
    uint8_t code[CANDIDATES] = {0};
    int candidates = scales == WEIGHT_SCALES_SEARCHED ? CANDIDATES : 1;
    for (int i = 0; i < candidates; i++) {
        code[i] = global > 0 ? f32_to_e4m3(largest / top[i] / global) : 0;
        if (!code[i])
            code[i] = 1; // the smallest, rather than nothing
        value[i] = e4m3_to_f32(code[i]) * global;
    }
    struct group_room room;
    struct group group = group_make(&room, x, a, count);
    int best = largest > 0 ? best_fp4_scale(&group, value, candidates) : -1;
    fp4_codes(e2m1, x, count, best < 0 ? 0 : value[best]);
    return best < 0 ? 0 : code[best];
}

// ---- quantizing rows ------------------------------------------------------------------------------------------------

// Whether all are finite: Inf * 0 and NaN * 0 are NaN, and stay it in a sum.
static bool all_finite(const float *x, uint64_t cols)
{
    part sum[PARTS];
    float rest = 0;
    uint64_t i = 0;
    for (int lane = 0; lane < PARTS; lane++)
        sum[lane] = part_all(0);
    for (; i + LANES <= cols; i += LANES)
        for (int lane = 0; lane < PARTS; lane++)
            sum[lane] += part_load(x + i + lane * WIDTH) * part_all(0);
    for (; i < cols; i++)
        rest += x[i] * 0;
    return lanes_sum(sum) + rest == 0;
}

// Largest magnitude as bits of an f32: above 0x7f800000 there is a NaN, at it an Inf.
static uint32_t largest_magnitude_bits(const float *x, uint64_t cols)
{
    uint32_t largest = 0;
    if (all_finite(x, cols))
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
    for (; i + LANES <= cols; i += LANES) {
        uint32_t bits[LANES];
        uint16_t half[LANES];
        memcpy(bits, x + i, sizeof bits);
        for (int lane = 0; lane < LANES;
             lane++) // to nearest, ties to even: half of the last place less one, one more where it is odd
            half[lane] = (uint16_t)((bits[lane] + 0x7fff + (bits[lane] >> 16 & 1)) >> 16);
        memcpy(out + i, half, sizeof half);
    }
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
    uint64_t i = 0;
    for (; i + LANES <= cols; i += LANES) {
        uint8_t codes[LANES]; // see fp4_codes
        for (int lane = 0; lane < LANES; lane++)
            codes[lane] = f32_to_e4m3(x[i + (uint64_t)lane] * inverse);
        memcpy(e4m3 + i, codes, sizeof codes);
    }
    for (; i < cols; i++)
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
    case WEIGHT_NL4:
        out->scale_f16[group] = quantize_nl4_group(out->q + begin, x, a, count, scales);
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

// Whether what is stored depends on the row's largest magnitude.
static bool needs_largest(enum weight_kind kind)
{
    return kind == WEIGHT_BF16 || kind == WEIGHT_INT8 || kind == WEIGHT_FP8 || kind == WEIGHT_NVFP4;
}

static int quantize_row(struct packed_row *out, enum weight_kind kind, uint32_t group_size, const float *x,
                        uint64_t cols, const float *weight, enum weight_scales scales, struct error *err)
{
    uint32_t largest = 0;
    if (needs_largest(kind) || !all_finite(x, cols))
        largest = largest_magnitude_bits(x, cols);
    if (largest >= not_finite_bits(kind))
        return report_not_finite(kind, x, cols, err);
    if (kind == WEIGHT_F32) {
        if (cols)
            memcpy(out->f32, x, cols * sizeof *x);
    } else if (kind == WEIGHT_BF16) {
        round_bf16(out->bf16, x, cols);
    } else if (kind == WEIGHT_INT8) {
        out->scale = row_scale(largest, 127.0f);
        round_codes(out->q, x, cols, out->scale > 0 ? 1.0f / out->scale : 0, 0, -127.0f, 127.0f);
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

extern const struct pack_target PACK_TARGET;
const struct pack_target PACK_TARGET = {PACK_TARGET_NAME, quantize_row};
