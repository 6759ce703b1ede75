// The body of every wire_<target>.c: the codecs in plain C, compiled for one instruction set and exported as one
// table WIRE_TARGET named WIRE_TARGET_NAME. Included once per file, by those files alone. See wire.h for the formats.
//
// The inner loops run over whole groups with a fixed count, so that the compiler makes vectors of them; a short group
// goes through a padded copy. fmaf is one instruction with -mfma and an exact library call without: the same bits.
// Nobody looks at the exception flags of floating point; gcc, unless told so, makes no vectors of a select beside an
// addition. bf16 and f32, which carry every prompt, are written for AVX2 by hand: NaN is looked for once a group.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-trapping-math")
#endif
#include "formats/number_formats.h"
#include "kernels/wire.h"

#include <math.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

extern const struct wire_target WIRE_TARGET;

static inline float nan_if(bool condition, float value)
{
    return f32_from_bits(condition ? (uint32_t)WIRE_NAN_BITS : f32_bits(value));
}
static inline float canonical(float value) { return nan_if(value != value, value); }

static inline int32_t magnitude(float value) { return (int32_t)(f32_bits(value) & 0x7fffffff); }
static inline bool is_finite_magnitude(int32_t bits) { return bits < 0x7f800000; }

static inline int32_t largest_magnitude(const float *x)
{
    int32_t largest = 0;
    for (int i = 0; i < WIRE_GROUP; i++) {
        int32_t m = magnitude(x[i]);
        largest = m > largest ? m : largest;
    }
    return largest;
}

static void fill_nan(float *x, int count)
{
    for (int i = 0; i < count; i++)
        x[i] = f32_from_bits(WIRE_NAN_BITS);
}

// ---- bf16 ----------------------------------------------------------------------------------------------------------

#ifdef __AVX2__
// The bf16 bits of eight floats none of which is NaN, in 32 bits each.
static inline __m256i bf16_bits(__m256 x)
{
    __m256i bits = _mm256_castps_si256(x), upper = _mm256_srli_epi32(bits, 16);
    __m256i half = _mm256_add_epi32(_mm256_set1_epi32(0x7fff), _mm256_and_si256(upper, _mm256_set1_epi32(1)));
    return _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
}

// Of eight floats none of which is NaN; of any, NaN as they are.
static inline __m256 as_bf16(__m256 x) { return _mm256_castsi256_ps(_mm256_slli_epi32(bf16_bits(x), 16)); }
static inline __m256 through_bf16(__m256 x)
{
    return _mm256_blendv_ps(as_bf16(x), x, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}

static inline __m256 bf16_floats(const uint8_t *in)
{
    __m128i bits = _mm_loadu_si128((const __m128i *)(const void *)in);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

// False, and nothing to be relied on in out: there is a NaN.
static inline bool bf16_encode_numbers(uint8_t *restrict out, const float *restrict x)
{
    __m256 nan = _mm256_setzero_ps();
    for (int i = 0; i < WIRE_GROUP; i += 16) {
        __m256 a = _mm256_loadu_ps(x + i), b = _mm256_loadu_ps(x + i + 8);
        nan = _mm256_or_ps(nan, _mm256_cmp_ps(a, b, _CMP_UNORD_Q));
        __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(bf16_bits(a), bf16_bits(b)), 0xd8);
        _mm256_storeu_si256((__m256i *)(void *)(out + 2 * i), packed);
    }
    return _mm256_movemask_ps(nan) == 0;
}

// to = a + b of eight floats; what is NaN in it is added to `nan`.
static inline void add_eight(float *to, __m256 a, __m256 b, __m256 *nan)
{
    __m256 sum = _mm256_add_ps(a, b);
    *nan = _mm256_or_ps(*nan, _mm256_cmp_ps(sum, sum, _CMP_UNORD_Q));
    _mm256_storeu_ps(to, sum);
}

static inline void make_canonical(float *x, __m256 nan)
{
    for (int i = 0; i < WIRE_GROUP && _mm256_movemask_ps(nan); i++)
        x[i] = canonical(x[i]);
}

static inline __m256 eight_floats(const uint8_t *in) { return _mm256_loadu_ps((const float *)(const void *)in); }
#endif

static inline void bf16_encode(uint8_t *restrict out, const float *restrict x)
{
#ifdef __AVX2__
    if (bf16_encode_numbers(out, x))
        return;
#endif
    uint16_t value[WIRE_GROUP];
    for (int i = 0; i < WIRE_GROUP; i++)
        value[i] = f32_to_bf16(x[i]);
    memcpy(out, value, sizeof value);
}

static inline void bf16_add(float *restrict sum, const uint8_t *restrict in)
{
#ifdef __AVX2__
    __m256 nan = _mm256_setzero_ps();
    for (int i = 0; i < WIRE_GROUP; i += 8)
        add_eight(sum + i, _mm256_loadu_ps(sum + i), bf16_floats(in + 2 * i), &nan);
    make_canonical(sum, nan);
#else
    uint16_t value[WIRE_GROUP];
    memcpy(value, in, sizeof value);
    for (int i = 0; i < WIRE_GROUP; i++)
        sum[i] = canonical(sum[i] + bf16_to_f32(value[i]));
#endif
}

static inline void bf16_decode(float *restrict out, const uint8_t *restrict in)
{
#ifdef __AVX2__
    __m256 nan = _mm256_setzero_ps();
    for (int i = 0; i < WIRE_GROUP; i += 8)
        add_eight(out + i, _mm256_setzero_ps(), bf16_floats(in + 2 * i), &nan);
    make_canonical(out, nan);
#else
    memset(out, 0, WIRE_GROUP * sizeof *out);
    bf16_add(out, in);
#endif
}

#ifdef __AVX2__
// Eight floats at a time from the parts to the result, without a way through memory.
static inline void bf16_add_up(uint8_t *restrict out, float *restrict x, const uint8_t *const *parts, int own,
                               int ranks)
{
    const __m256 not_a_number = _mm256_castsi256_ps(_mm256_set1_epi32(WIRE_NAN_BITS));
    for (int i = 0; i < WIRE_GROUP; i += 8) {
        __m256 sum = _mm256_setzero_ps();
        for (int rank = 0; rank < ranks; rank++)
            sum = _mm256_add_ps(sum,
                                rank == own ? through_bf16(_mm256_loadu_ps(x + i)) : bf16_floats(parts[rank] + 2 * i));
        sum = _mm256_blendv_ps(sum, not_a_number, _mm256_cmp_ps(sum, sum, _CMP_UNORD_Q));
        __m256i bits = bf16_bits(sum);
        __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
        _mm_storeu_si128((__m128i *)(void *)(out + 2 * i), packed);
        __m256 decoded = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
        _mm256_storeu_ps(x + i, _mm256_add_ps(_mm256_setzero_ps(), decoded));
    }
}

static inline void bf16_sum(float *restrict out, const float *const *parts, int ranks)
{
    const __m256 not_a_number = _mm256_castsi256_ps(_mm256_set1_epi32(WIRE_NAN_BITS));
    for (int i = 0; i < WIRE_GROUP; i += 8) {
        __m256 sum = _mm256_setzero_ps();
        for (int rank = 0; rank < ranks; rank++)
            sum = _mm256_add_ps(sum, through_bf16(_mm256_loadu_ps(parts[rank] + i)));
        __m256 nan = _mm256_cmp_ps(sum, sum, _CMP_UNORD_Q);
        sum = _mm256_blendv_ps(_mm256_add_ps(_mm256_setzero_ps(), as_bf16(sum)), not_a_number, nan);
        _mm256_storeu_ps(out + i, sum);
    }
}
#endif

// ---- fp8 -----------------------------------------------------------------------------------------------------------

static inline void fp8_encode(uint8_t *restrict out, const float *restrict x)
{
    int32_t largest = largest_magnitude(x);
    bool finite = is_finite_magnitude(largest);
    bool tiny = largest < 0x0d800000; // 2^-100
    float scale = nan_if(!finite, tiny ? 0.0f : f32_from_bits((uint32_t)largest) / E4M3_MAX);
    memcpy(out + WIRE_GROUP, &scale, sizeof scale);
    if (!finite || tiny) {
        memset(out, 0, WIRE_GROUP);
        return;
    }
    float inverse = 1.0f / scale;
    for (int i = 0; i < WIRE_GROUP; i++)
        out[i] = f32_to_e4m3(x[i] * inverse);
}

// sum[i] += value, or with `anew` sum[i] = value.
static inline void fp8_sum(float *restrict sum, const uint8_t *restrict in, bool anew)
{
    float scale;
    memcpy(&scale, in + WIRE_GROUP, sizeof scale);
    if (!is_finite_magnitude(magnitude(scale))) {
        fill_nan(sum, WIRE_GROUP);
        return;
    }
    for (int i = 0; i < WIRE_GROUP; i++)
        sum[i] = canonical(fmaf(e4m3_to_f32(in[i]), scale, anew ? 0.0f : sum[i]));
}

static inline void fp8_add(float *restrict sum, const uint8_t *restrict in) { fp8_sum(sum, in, false); }
static inline void fp8_decode(float *restrict out, const uint8_t *restrict in) { fp8_sum(out, in, true); }

// ---- s8x -----------------------------------------------------------------------------------------------------------

// The index of the largest magnitude, the first of several, and the second largest magnitude.
#ifdef __AVX2__
static inline int find_spike(const float *restrict x, int32_t *second)
{
    __m256i first = _mm256_setzero_si256(), next = first;
    for (int i = 0; i < WIRE_GROUP; i += 8) {
        __m256i m = _mm256_castps_si256(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), _mm256_loadu_ps(x + i)));
        next = _mm256_max_epi32(next, _mm256_min_epi32(first, m));
        first = _mm256_max_epi32(first, m);
    }
    int32_t firsts[8], nexts[8], largest = 0;
    _mm256_storeu_si256((__m256i *)(void *)firsts, first);
    _mm256_storeu_si256((__m256i *)(void *)nexts, next);
    *second = 0;
    for (int lane = 0; lane < 8; lane++) {
        int32_t smaller = firsts[lane] < largest ? firsts[lane] : largest;
        *second = *second > smaller ? *second : smaller;
        *second = *second > nexts[lane] ? *second : nexts[lane];
        largest = largest > firsts[lane] ? largest : firsts[lane];
    }
    for (int i = 0;; i += 8) {
        __m256i m = _mm256_castps_si256(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), _mm256_loadu_ps(x + i)));
        int found = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(m, _mm256_set1_epi32(largest))));
        if (found)
            return i + __builtin_ctz((unsigned)found);
    }
}
#else
static inline int find_spike(const float *restrict x, int32_t *second)
{
    int32_t largest = largest_magnitude(x);
    int spike = 0;
    while (magnitude(x[spike]) != largest)
        spike++;
    *second = 0;
    for (int i = 0; i < WIRE_GROUP; i++) {
        int32_t m = i == spike ? 0 : magnitude(x[i]);
        *second = m > *second ? m : *second;
    }
    return spike;
}
#endif

static inline void s8x_encode(uint8_t *restrict out, const float *restrict x)
{
    int32_t second;
    int spike_index = find_spike(x, &second);
    uint16_t spike = f32_to_bf16(x[spike_index]);
    int code = s8x_code((uint32_t)second);
    // The bf16 exponent is all ones for NaN, Inf and what rounds to Inf.
    if ((spike & 0x7f80) == 0x7f80 || code > S8X_MAX_CODE) {
        memset(out, 0, WIRE_GROUP);
        code = S8X_MARKED, spike_index = 0, spike = WIRE_NAN_BITS >> 16;
    } else {
        float inverse = s8x_inverse(code);
        for (int i = 0; i < WIRE_GROUP; i++)
            out[i] = (uint8_t)f32_to_int8(x[i] * inverse);
        out[spike_index] = 0;
    }
    out[S8X_CODE_BYTE] = (uint8_t)code;
    out[S8X_SPIKE_BYTE] = (uint8_t)spike_index;
    memcpy(out + S8X_SPIKE_BYTE + 1, &spike, sizeof spike);
}

static inline void s8x_sum(float *restrict sum, const uint8_t *restrict in, bool anew)
{
    if (in[S8X_CODE_BYTE] == S8X_MARKED) {
        fill_nan(sum, WIRE_GROUP);
        return;
    }
    float scale = s8x_scale(in[S8X_CODE_BYTE]);
    for (int i = 0; i < WIRE_GROUP; i++)
        sum[i] = canonical(fmaf((float)(int8_t)in[i], scale, anew ? 0.0f : sum[i]));
    uint16_t spike;
    memcpy(&spike, in + S8X_SPIKE_BYTE + 1, sizeof spike);
    int index = in[S8X_SPIKE_BYTE] % WIRE_GROUP;
    sum[index] = canonical(sum[index] + bf16_to_f32(spike));
}

static inline void s8x_add(float *restrict sum, const uint8_t *restrict in) { s8x_sum(sum, in, false); }
static inline void s8x_decode(float *restrict out, const uint8_t *restrict in) { s8x_sum(out, in, true); }

// ---- f32 -----------------------------------------------------------------------------------------------------------

static inline void f32_encode(uint8_t *restrict out, const float *restrict x)
{
    memcpy(out, x, WIRE_GROUP * sizeof *x);
}

static inline void f32_add(float *restrict sum, const uint8_t *restrict in)
{
#ifdef __AVX2__
    __m256 nan = _mm256_setzero_ps();
    for (int i = 0; i < WIRE_GROUP; i += 8)
        add_eight(sum + i, _mm256_loadu_ps(sum + i), eight_floats(in + 4 * i), &nan);
    make_canonical(sum, nan);
#else
    float value[WIRE_GROUP];
    memcpy(value, in, sizeof value);
    for (int i = 0; i < WIRE_GROUP; i++)
        sum[i] = canonical(sum[i] + value[i]);
#endif
}

static inline void f32_decode(float *restrict out, const uint8_t *restrict in)
{
#ifdef __AVX2__
    __m256 nan = _mm256_setzero_ps();
    for (int i = 0; i < WIRE_GROUP; i += 8)
        add_eight(out + i, _mm256_setzero_ps(), eight_floats(in + 4 * i), &nan);
    make_canonical(out, nan);
#else
    memset(out, 0, WIRE_GROUP * sizeof *out);
    f32_add(out, in);
#endif
}

// ---- error feedback ------------------------------------------------------------------------------------------------

static inline void add_lost(float *restrict t, const uint16_t *restrict lost)
{
    for (int i = 0; i < WIRE_GROUP; i++)
        t[i] += bf16_to_f32(lost[i]);
}

static inline void keep_lost(uint16_t *restrict lost, const float *restrict t, const float *restrict decoded)
{
    for (int i = 0; i < WIRE_GROUP; i++) {
        uint16_t difference = f32_to_bf16(t[i] - decoded[i]);
        lost[i] = (difference & 0x7f80) == 0x7f80 ? 0 : difference;
    }
}

// ---- any count -----------------------------------------------------------------------------------------------------

#define DEFINE_CODEC(codec, mine_in)                                                                                   \
    static void codec##_encode_any(uint8_t *out, const float *x, int count)                                            \
    {                                                                                                                  \
        if (count == WIRE_GROUP) {                                                                                     \
            codec##_encode(out, x);                                                                                    \
            return;                                                                                                    \
        }                                                                                                              \
        float padded[WIRE_GROUP] = {0};                                                                                \
        memcpy(padded, x, (size_t)count * sizeof *x);                                                                  \
        codec##_encode(out, padded);                                                                                   \
    }                                                                                                                  \
    static void codec##_add_any(float *sum, const uint8_t *in, int count)                                              \
    {                                                                                                                  \
        if (count == WIRE_GROUP) {                                                                                     \
            codec##_add(sum, in);                                                                                      \
            return;                                                                                                    \
        }                                                                                                              \
        float padded[WIRE_GROUP] = {0};                                                                                \
        memcpy(padded, sum, (size_t)count * sizeof *sum);                                                              \
        codec##_add(padded, in);                                                                                       \
        memcpy(sum, padded, (size_t)count * sizeof *sum);                                                              \
    }                                                                                                                  \
    static void codec##_decode_any(float *out, const uint8_t *in, int count)                                           \
    {                                                                                                                  \
        if (count == WIRE_GROUP) {                                                                                     \
            codec##_decode(out, in);                                                                                   \
            return;                                                                                                    \
        }                                                                                                              \
        float padded[WIRE_GROUP];                                                                                      \
        codec##_decode(padded, in);                                                                                    \
        memcpy(out, padded, (size_t)count * sizeof *out);                                                              \
    }                                                                                                                  \
    static void codec##_add_up_any(uint8_t *out, float *x, const uint8_t *const *parts, int own, int ranks, int count) \
    {                                                                                                                  \
        float sum[WIRE_GROUP] = {0}, mine[WIRE_GROUP] = {0};                                                           \
        uint8_t bytes[WIRE_MAX_GROUP_BYTES];                                                                           \
        memcpy(mine, x, (size_t)count * sizeof *x);                                                                    \
        mine_in##_encode(bytes, mine);                                                                                 \
        for (int rank = 0; rank < ranks; rank++)                                                                       \
            if (rank != own)                                                                                           \
                codec##_add(sum, parts[rank]);                                                                         \
            else                                                                                                       \
                mine_in##_add(sum, bytes);                                                                             \
        codec##_encode(out, sum);                                                                                      \
        codec##_decode(mine, out);                                                                                     \
        memcpy(x, mine, (size_t)count * sizeof *x);                                                                    \
    }                                                                                                                  \
    static void codec##_sum_any(float *out, const float *const *parts, int own, int ranks, int count)                  \
    {                                                                                                                  \
        float sum[WIRE_GROUP] = {0}, part[WIRE_GROUP] = {0};                                                           \
        uint8_t bytes[WIRE_MAX_GROUP_BYTES];                                                                           \
        for (int rank = 0; rank < ranks; rank++) {                                                                     \
            memcpy(part, parts[rank], (size_t)count * sizeof *part);                                                   \
            if (rank == own) {                                                                                         \
                mine_in##_encode(bytes, part);                                                                         \
                mine_in##_add(sum, bytes);                                                                             \
            } else {                                                                                                   \
                codec##_encode(bytes, part);                                                                           \
                codec##_add(sum, bytes);                                                                               \
            }                                                                                                          \
        }                                                                                                              \
        codec##_encode(bytes, sum);                                                                                    \
        codec##_decode(part, bytes);                                                                                   \
        memcpy(out, part, (size_t)count * sizeof *out);                                                                \
    }                                                                                                                  \
    static void codec##_feed_any(uint8_t *out, float *decoded, const float *x, uint16_t *lost, int count)              \
    {                                                                                                                  \
        float t[WIRE_GROUP] = {0}, back[WIRE_GROUP];                                                                   \
        uint16_t kept[WIRE_GROUP] = {0};                                                                               \
        memcpy(t, x, (size_t)count * sizeof *t);                                                                       \
        memcpy(kept, lost, (size_t)count * sizeof *kept);                                                              \
        add_lost(t, kept);                                                                                             \
        codec##_encode(out, t);                                                                                        \
        codec##_decode(back, out);                                                                                     \
        keep_lost(kept, t, back);                                                                                      \
        memcpy(lost, kept, (size_t)count * sizeof *kept);                                                              \
        memcpy(decoded, back, (size_t)count * sizeof *back);                                                           \
    }

// And the codec of an owner's own part: wire_of_own.
DEFINE_CODEC(bf16, bf16) // NOLINT(bugprone-branch-clone) one codec for both
DEFINE_CODEC(fp8, f32)
DEFINE_CODEC(s8x, f32)
DEFINE_CODEC(f32, f32) // NOLINT(bugprone-branch-clone)

#ifdef __AVX2__
static void bf16_add_up_fast(uint8_t *out, float *x, const uint8_t *const *parts, int own, int ranks, int count)
{
    if (count == WIRE_GROUP)
        bf16_add_up(out, x, parts, own, ranks);
    else
        bf16_add_up_any(out, x, parts, own, ranks, count);
}

static void bf16_sum_fast(float *out, const float *const *parts, int own, int ranks, int count)
{
    if (count < WIRE_GROUP)
        bf16_sum_any(out, parts, own, ranks, count);
    else if (ranks == 2) // the loop over ranks is unrolled
        bf16_sum(out, parts, 2);
    else
        bf16_sum(out, parts, ranks);
}
#else
#define bf16_add_up_fast bf16_add_up_any
#define bf16_sum_fast bf16_sum_any
#endif

const struct wire_target WIRE_TARGET = {
    WIRE_TARGET_NAME,
    {bf16_encode_any, fp8_encode_any, s8x_encode_any, f32_encode_any},
    {bf16_add_any, fp8_add_any, s8x_add_any, f32_add_any},
    {bf16_decode_any, fp8_decode_any, s8x_decode_any, f32_decode_any},
    {bf16_add_up_fast, fp8_add_up_any, s8x_add_up_any, f32_add_up_any},
    {bf16_feed_any, fp8_feed_any, s8x_feed_any, f32_feed_any},
    {bf16_sum_fast, fp8_sum_any, s8x_sum_any, f32_sum_any},
};
