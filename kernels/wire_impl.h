// The body of every wire_<target>.c: the three codecs in plain C, compiled for one instruction set and exported as one
// table WIRE_TARGET named WIRE_TARGET_NAME. Included once per file, by those files alone. See wire.h for the formats.
//
// The inner loops run over whole groups with a fixed count, so that the compiler makes vectors of them; a short group
// goes through a padded copy. fmaf is one instruction with -mfma and an exact library call without: the same bits.
// Nobody looks at the exception flags of floating point; gcc, unless told so, makes no vectors of a select beside an
// addition.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-trapping-math")
#endif
#include "formats/number_formats.h"
#include "kernels/wire.h"

#include <math.h>
#include <string.h>

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

static inline void bf16_encode(uint8_t *restrict out, const float *restrict x)
{
    uint16_t value[WIRE_GROUP];
    for (int i = 0; i < WIRE_GROUP; i++)
        value[i] = f32_to_bf16(x[i]);
    memcpy(out, value, sizeof value);
}

static inline void bf16_add(float *restrict sum, const uint8_t *restrict in)
{
    uint16_t value[WIRE_GROUP];
    memcpy(value, in, sizeof value);
    for (int i = 0; i < WIRE_GROUP; i++)
        sum[i] = canonical(sum[i] + bf16_to_f32(value[i]));
}

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

static inline void fp8_add(float *restrict sum, const uint8_t *restrict in)
{
    float scale;
    memcpy(&scale, in + WIRE_GROUP, sizeof scale);
    if (!is_finite_magnitude(magnitude(scale))) {
        fill_nan(sum, WIRE_GROUP);
        return;
    }
    for (int i = 0; i < WIRE_GROUP; i++)
        sum[i] = canonical(fmaf(e4m3_to_f32(in[i]), scale, sum[i]));
}

// ---- s8x -----------------------------------------------------------------------------------------------------------

static inline void s8x_encode(uint8_t *restrict out, const float *restrict x)
{
    int32_t largest = largest_magnitude(x), second = 0;
    int spike_index = 0;
    while (magnitude(x[spike_index]) != largest)
        spike_index++;
    for (int i = 0; i < WIRE_GROUP; i++) {
        int32_t m = i == spike_index ? 0 : magnitude(x[i]);
        second = m > second ? m : second;
    }
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

static inline void s8x_add(float *restrict sum, const uint8_t *restrict in)
{
    if (in[S8X_CODE_BYTE] == S8X_MARKED) {
        fill_nan(sum, WIRE_GROUP);
        return;
    }
    float scale = s8x_scale(in[S8X_CODE_BYTE]);
    for (int i = 0; i < WIRE_GROUP; i++)
        sum[i] = canonical(fmaf((float)(int8_t)in[i], scale, sum[i]));
    uint16_t spike;
    memcpy(&spike, in + S8X_SPIKE_BYTE + 1, sizeof spike);
    int index = in[S8X_SPIKE_BYTE] % WIRE_GROUP;
    sum[index] = canonical(sum[index] + bf16_to_f32(spike));
}

// ---- any count -----------------------------------------------------------------------------------------------------

#define DEFINE_CODEC(codec)                                                                                            \
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
        memset(out, 0, (size_t)count * sizeof *out);                                                                   \
        codec##_add_any(out, in, count);                                                                               \
    }

DEFINE_CODEC(bf16)
DEFINE_CODEC(fp8)
DEFINE_CODEC(s8x)

const struct wire_target WIRE_TARGET = {
    WIRE_TARGET_NAME,
    {bf16_encode_any, fp8_encode_any, s8x_encode_any},
    {bf16_add_any, fp8_add_any, s8x_add_any},
    {bf16_decode_any, fp8_decode_any, s8x_decode_any},
};
