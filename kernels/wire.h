// Wire codecs of the collectives: the same bytes on every transport and backend.
// A row of `cols` floats travels as ceil(cols / WIRE_GROUP) groups; the last one is padded with zeros. Little-endian.
//   bf16  256 bytes a group: bfloat16 value[128]
//   fp8   132 bytes: e4m3 q[128], f32 scale
//   s8x   132 bytes: int8 q[128], u8 scale_code, u8 spike_index, bf16 spike
//   f32   512 bytes: float value[128]; loses nothing, for comparing the others with it
//
// Every step is one correctly rounded f32 operation (nearest, ties to even) or integer work, so the bytes depend on
// neither compiler nor machine. Nothing is ever clamped or dropped silently: what a codec cannot carry arrives as NaN,
// on every rank alike.
//
// bf16: each value rounded; a NaN keeps its sign and upper payload, Inf stays Inf, beyond the largest bfloat16 gives
// Inf. f32: the bits as they are.
//
// fp8: largest = largest magnitude of the group.
//   largest >= 2^-100: scale = largest / 448, inverse = 1 / scale, q = e4m3(x * inverse)
//   smaller:           scale = 0 and q = 0; the group decodes to zeros
//   NaN or Inf in it:  scale = NaN (0x7fc00000) and q = 0; every value decodes to NaN
//
// s8x: the value of largest magnitude (the first, if several) is the spike: it travels as bf16 and its q is 0.
//   scale(c) = 2^((c mod 8) / 8) * 2^(c div 8 - 20), the eight mantissas rounded to f32; inverse(c) likewise from
//   2^(-(c mod 8) / 8): no division stands on the data path. scale_code is the smallest c <= 254 whose 127 * scale(c),
//   rounded to f32, is >= the second largest magnitude; q = x * inverse(c), rounded to an integer, clamped to +-127
//   (the rounding of 127 * scale is all it can clip). A group is marked instead (scale_code 255, q = 0, spike_index 0,
//   spike 0x7fc0) and decodes to NaN throughout when it holds NaN or Inf, when the spike would round to Inf, or when no
//   code is large enough (second largest above 127 * scale(254), about 437000). Magnitudes below half of scale(0),
//   2^-21, may round to zero beside a spike.
//
// Error feedback: what a group lost on the wire is kept and added to the sender's next group of the same place, so that
// in a sum over many messages (the residual stream of a model) the losses of all but the last one cancel.
#ifndef TPSHARD_KERNELS_WIRE_H
#define TPSHARD_KERNELS_WIRE_H

#include "formats/number_formats.h"

#include <stdbool.h>
#include <stdint.h>

enum wire { WIRE_BF16 = 0, WIRE_FP8 = 1, WIRE_S8X = 2, WIRE_F32 = 3, WIRE_COUNT = 4 };
enum { WIRE_GROUP = 128, WIRE_MAX_GROUP_BYTES = 512 };

const char *wire_name(enum wire wire); // "bf16", "fp8", "s8x", "f32"
bool wire_from_name(const char *name, enum wire *wire);
uint64_t wire_group_bytes(enum wire wire);
// Eight bits and a little a value: for messages whose bytes cost time, those of prefill.
static inline bool wire_is_compressed(enum wire wire) { return wire == WIRE_FP8 || wire == WIRE_S8X; }
// The codec of an owner's own part in a sum without error feedback. In bf16 it is rounded like the others', so that one message to all tells everything
// that a sum is made of (ALGORITHM_ONE_SHOT of exchange_choice.h) and costs no byte more; what compresses keeps it exact.
TP_HD enum wire wire_of_own(enum wire wire) { return wire == WIRE_BF16 ? WIRE_BF16 : WIRE_F32; }
static inline uint64_t wire_groups(uint64_t cols) { return (cols + WIRE_GROUP - 1) / WIRE_GROUP; }

// In all of these 1 <= count <= WIRE_GROUP, and the buffers do not overlap.
// Encodes `count` floats (missing ones are zeros) into wire_group_bytes(wire) bytes.
void wire_encode_group(uint8_t *out, const float *x, int count, enum wire wire);
// sum[i] = fma(q, scale, sum[i]) for i < count (bf16, f32: sum[i] += value), then the spike is added at its index. Where
// that gives NaN, or the group is marked, sum[i] = 0x7fc00000.
void wire_add_group(float *sum, const uint8_t *in, int count, enum wire wire);
// out[i] = value; exactly wire_add_group on zeros.
void wire_decode_group(float *out, const uint8_t *in, int count, enum wire wire);
// With error feedback, for i < count: t[i] = x[i] + lost[i] is encoded and decoded again, and lost[i], a bfloat16, becomes
// t[i] - decoded[i], rounded; 0 where that is NaN or infinite. decoded may be x.
void wire_feed_group(uint8_t *out, float *decoded, const float *x, uint16_t *lost, int count, enum wire wire);
// What an owner does: the sum, from 0 and in order, of parts[0 .. ranks - 1], encoded, but for parts[own] (not read), in
// whose place x is as wire_of_own would bring it; out becomes the encoded sum and x what it decodes to.
void wire_add_up_group(uint8_t *out, float *x, const uint8_t *const *parts, int own, int ranks, int count,
                       enum wire wire);

// The same from parts that all ranks can read, none of them encoded so far; any codec, without error feedback. out, for i < count: the
// values that wire_encode_group at the others and wire_add_up_group at rank `own` leave.
void wire_sum_group(float *out, const float *const *parts, int own, int ranks, int count, enum wire wire);

// One implementation per instruction set; all give the same bits. The functions above use the fastest one.
struct wire_target {
    const char *name; // "base", "avx2"
    void (*encode[WIRE_COUNT])(uint8_t *out, const float *x, int count);
    void (*add[WIRE_COUNT])(float *sum, const uint8_t *in, int count);
    void (*decode[WIRE_COUNT])(float *out, const uint8_t *in, int count);
    void (*add_up[WIRE_COUNT])(uint8_t *out, float *x, const uint8_t *const *parts, int own, int ranks, int count);
    void (*feed[WIRE_COUNT])(uint8_t *out, float *decoded, const float *x, uint16_t *lost, int count);
    void (*sum[WIRE_COUNT])(float *out, const float *const *parts, int own, int ranks, int count);
};
// The targets that this machine supports, fastest last; NULL past the end.
const struct wire_target *wire_target_at(int index);

// ---- the arithmetic of s8x, shared with the device ------------------------------------------------------------------

enum { S8X_MARKED = 255, S8X_MAX_CODE = 254, S8X_SPIKE_BYTE = 129, S8X_CODE_BYTE = 128, WIRE_NAN_BITS = 0x7fc00000 };

// Bits of 2^(k / 8) and 2^(-k / 8), k = 0..7, rounded to f32.
TP_HD uint32_t s8x_mantissa(int k)
{
    static const uint32_t bits[8] = {0x3f800000, 0x3f8b95c2, 0x3f9837f0, 0x3fa5fed7,
                                     0x3fb504f3, 0x3fc5672a, 0x3fd744fd, 0x3feac0c7};
    return bits[k];
}
TP_HD uint32_t s8x_inverse_mantissa(int k)
{
    static const uint32_t bits[8] = {0x3f800000, 0x3f6ac0c7, 0x3f5744fd, 0x3f45672a,
                                     0x3f3504f3, 0x3f25fed7, 0x3f1837f0, 0x3f0b95c2};
    return bits[k];
}
// Multiplying by a power of two is adding to the exponent.
TP_HD float s8x_scale(int code) { return f32_from_bits(s8x_mantissa(code & 7) + ((uint32_t)((code >> 3) - 20) << 23)); }
TP_HD float s8x_inverse(int code)
{
    return f32_from_bits(s8x_inverse_mantissa(code & 7) + ((uint32_t)(20 - (code >> 3)) << 23));
}

// The smallest code with 127 * scale(code) >= second, given as magnitude bits; above S8X_MAX_CODE when there is none.
TP_HD int s8x_code(uint32_t second)
{
    // 127 * 2^(k / 8), k = 1..8, lies in 2^7 .. 2^8: its mantissas in rising order.
    static const uint32_t limit[8] = {0x0a7e96, 0x170780, 0x24b2d9, 0x339ae9, 0x43dc5c, 0x559673, 0x68eb45, 0x7e0000};
    int code = ((int)(second >> 23) - 127 - 7 + 20) * 8 + 1;
    for (int k = 0; k < 8; k++)
        code += (second & 0x7fffff) > limit[k];
    return code < 0 ? 0 : code;
}

#endif
