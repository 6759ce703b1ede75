// nl4: the scale of a group, and its codes. A part of pack_quantize_impl.h, which includes it behind what it stands on: groups, sums of lanes and
// scales in f16.
#ifndef TPSHARD_KERNELS_PACK_NL4_IMPL_H
#define TPSHARD_KERNELS_PACK_NL4_IMPL_H

typedef uint32_t part_bits __attribute__((vector_size(WIDTH * sizeof(uint32_t))));

// What the codes nearest to x, in units of the scale, have in `of`; of two as near the lower one.
static inline part nearest_nl4(part x, const float of[16])
{
#if defined(__AVX512F__) && defined(__AVX512DQ__)
    // A search by halves: `at` counts the levels that are too low.
    const __m512 value = (__m512)x, between = _mm512_loadu_ps(pack_nl4_between);
    __m512i at = _mm512_maskz_set1_epi32(_mm512_cmp_ps_mask(value, _mm512_set1_ps(pack_nl4_between[7]), _CMP_GT_OQ), 8);
    UNROLL
    for (int half = 4; half >= 1; half /= 2) {
        __m512i middle = _mm512_add_epi32(at, _mm512_set1_epi32(half - 1));
        __mmask16 above = _mm512_cmp_ps_mask(value, _mm512_permutexvar_ps(middle, between), _CMP_GT_OQ);
        at = _mm512_mask_add_epi32(at, above, at, _mm512_set1_epi32(half));
    }
    return (part)_mm512_permutexvar_ps(at, _mm512_loadu_ps(of));
#elif defined(__AVX2__)
    // The same; tables of eight are looked up by the halves chosen so far.
    const float *b = pack_nl4_between;
    const __m256 value = (__m256)x, twos = _mm256_setr_ps(b[3], b[11], b[3], b[11], b[3], b[11], b[3], b[11]);
    const __m256 fours = _mm256_setr_ps(b[1], b[5], b[9], b[13], b[1], b[5], b[9], b[13]);
    const __m256 eights = _mm256_setr_ps(b[0], b[2], b[4], b[6], b[8], b[10], b[12], b[14]);
    __m256 upper = _mm256_cmp_ps(value, _mm256_set1_ps(b[7]), _CMP_GT_OQ), above = upper;
    __m256i at = _mm256_setzero_si256();
    UNROLL
    for (int table = 0; table < 3; table++) {
        at = _mm256_sub_epi32(_mm256_add_epi32(at, at), _mm256_castps_si256(above)); // true is -1
        __m256 bound = _mm256_permutevar8x32_ps(table == 0 ? twos : table == 1 ? fours : eights, at);
        above = _mm256_cmp_ps(value, bound, _CMP_GT_OQ);
    }
    at = _mm256_sub_epi32(_mm256_add_epi32(at, at), _mm256_castps_si256(above));
    return (part)_mm256_blendv_ps(_mm256_permutevar8x32_ps(_mm256_loadu_ps(of), at),
                                  _mm256_permutevar8x32_ps(_mm256_loadu_ps(of + 8), at), upper);
#else
    part found = part_all(of[0]);
    for (int i = 1; i < 16; i++)
        found += (part)((part_bits)(x > part_all(pack_nl4_between[i - 1])) & (part_bits)part_all(of[i] - of[i - 1]));
    return found;
#endif
}

// For the levels nearest to x * inverse, the sums of a * x * level and a * level^2.
struct nl4_fit {
    float xq, qq;
};

static inline struct nl4_fit fit_nl4(const struct group *group, float inverse, const bool weighted)
{
    const part inverses = part_all(inverse);
    part xq[PARTS], qq[PARTS];
    for (int lane = 0; lane < PARTS; lane++) {
        part xq_sum = part_all(0), qq_sum = part_all(0);
        for (int i = lane * WIDTH; i < group->count; i += LANES) {
            part q = nearest_nl4(part_load(group->x + i) * inverses, pack_nl4_levels);
            xq_sum += part_load(group->ax + i) * q;
            qq_sum += (weighted ? part_load(group->a + i) * q : q) * q;
        }
        xq[lane] = xq_sum, qq[lane] = qq_sum;
    }
    quad sums = lanes_sums(xq, qq, xq, qq);
    return (struct nl4_fit){sums[0], sums[1]};
}

// As search_scale: the largest magnitude at level 34 * f, f = 0.76 to 1.24 in steps of 0.04, with both signs; then the best scale is fitted to
// its own codes, twice at most.
static inline float search_nl4_scale(const struct group *group, float largest, const bool weighted)
{
    enum { CANDIDATES = 13, REFITS = 2 };
    float best_gain = -1.0f, best_scale = largest / WEIGHT_NL4_TOP;
    for (int i = 0; i < 2 * CANDIDATES + REFITS; i++) {
        int step = i / 2 - CANDIDATES / 2;
        float inverse = 1.0f / (largest / WEIGHT_NL4_TOP * (1.0f + 0.04f * (float)step));
        inverse = i >= 2 * CANDIDATES ? 1.0f / best_scale : i % 2 ? -inverse : inverse;
        struct nl4_fit fit = fit_nl4(group, inverse, weighted);
        float scale = fit.xq / fit.qq, gain = fit.xq * scale;
        if (fit.qq > 0 && gain > best_gain) {
            best_gain = gain;
            best_scale = scale;
        }
    }
    return best_scale;
}

static void nl4_codes(int8_t *q, const float *x, uint32_t count, float inverse)
{
    static const float codes_of[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
    for (uint32_t i = 0; i < count; i += LANES) {
        uint32_t left = count - i < LANES ? count - i : LANES;
        float values[LANES] = {0};
        memcpy(values, x + i, left * sizeof *x);
        part codes[PARTS];
        for (int lane = 0; lane < PARTS; lane++) // the lowest bits are the integer, see round_codes
            codes[lane] =
                nearest_nl4(part_load(values + lane * WIDTH) * part_all(inverse), codes_of) + part_all(12582912.0f);
        int8_t bytes[LANES];
        store_low_bytes(bytes, codes);
        memcpy(q + i, bytes, left);
    }
}

// The value of the largest magnitude; of two, the positive one.
static float largest_value(const float *x, uint32_t count)
{
    float low = 0, high = 0;
    for (uint32_t i = 0; i < count; i++) {
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
    }
    return high >= -low ? high : low;
}

static uint16_t quantize_nl4_group(int8_t *q, const float *x, const float *a, uint32_t count, enum weight_scales scales)
{
    float largest = largest_magnitude(x, count), best = 0;
    if (largest >= INT4_SMALLEST && scales == WEIGHT_SCALES_LARGEST) {
        best = -largest_value(x, count) / WEIGHT_NL4_TOP; // the level of that magnitude is a negative one
    } else if (largest >= INT4_SMALLEST) {
        struct group_room room;
        struct group group = group_make(&room, x, a, count);
        best = group.a ? search_nl4_scale(&group, largest, true) : search_nl4_scale(&group, largest, false);
    }
    uint16_t magnitude = scale_bits(best < 0 ? -best : best, WEIGHT_NL4_FACTOR);
    if (magnitude == 0) {
        memset(q, 0, count);
        return 0; // not -0: one spelling
    }
    uint16_t stored = best < 0 ? magnitude | 0x8000 : magnitude;
    nl4_codes(q, x, count, 1.0f / weight_nl4_scale(stored));
    return stored;
}

#endif
