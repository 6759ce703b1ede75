#!/usr/bin/env python3
"""Golden data for tests/test_wire.c: the wire codecs written a second time, from the description in kernels/wire.h.

Needs: numpy, ml_dtypes.   Run: python3 scripts/make_goldens_wire.py > tests/golden/wire/groups.txt

One line per case and codec: name, codec, count, then in hexadecimal the input floats (big-endian digits, `count` of
them), the bytes on the wire, the decoded floats. The powers of two of s8x come from exact integer roots, its code from a
plain search; products are formed in float64, where they are exact, and rounded once.
"""
import struct
from fractions import Fraction
from math import isqrt

import ml_dtypes
import numpy as np

GROUP = 128
NAN = 0x7FC00000


def f32(value):
    return np.float32(value)


def root_mantissa(eighths):
    """2^(eighths / 8) as the nearest float32, by integer square roots with 200 bits to spare."""
    value = 1 << eighths  # (2^eighths)^(1/8)
    shift = 1600
    root = isqrt(isqrt(isqrt(value << shift)))
    return f32(float(Fraction(root, 1 << (shift // 8))))


MANTISSA = [root_mantissa(k) for k in range(8)]
INVERSE = [f32(1)] + [f32(float(Fraction(MANTISSA_EXACT, 2))) for MANTISSA_EXACT in
                      (Fraction(isqrt(isqrt(isqrt((1 << k) << 1600))), 1 << 200) for k in range(7, 0, -1))]


def s8x_scale(code):
    return f32(float(MANTISSA[code % 8]) * 2.0 ** (code // 8 - 20))


def s8x_inverse(code):
    return f32(float(INVERSE[code % 8]) * 2.0 ** (20 - code // 8))


def bf16_bits(x):
    bits = int(np.array(x, np.float32).view(np.uint32))
    if bits & 0x7FFFFFFF > 0x7F800000:
        return bits >> 16 | 0x40
    return int(np.array(x, np.float32).astype(ml_dtypes.bfloat16).view(np.uint16))


def bits_to_f32(bits):
    return np.array([bits], np.uint32).view(np.float32)[0]


def code_bf16(x):
    bits = [bf16_bits(v) for v in x]
    decoded = [bits_to_f32(b << 16) for b in bits]
    return struct.pack("<128H", *bits), [np.float32(0) + v for v in decoded]


def code_fp8(x):
    largest = np.max(np.abs(x)) if np.all(np.isfinite(x)) else f32(np.inf)
    if not np.isfinite(largest):
        return bytes(128) + struct.pack("<I", NAN), [f32(np.nan)] * GROUP
    if largest < 2.0 ** -100:
        return bytes(132), [f32(0)] * GROUP
    scale = f32(largest / f32(448))
    inverse = f32(f32(1) / scale)
    q = (x * inverse).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    decoded = [f32(float(v) * float(scale)) + f32(0) for v in q]
    return q.view(np.uint8).tobytes() + struct.pack("<f", scale), decoded


def code_s8x(x):
    marked = bytes(128) + struct.pack("<BBH", 255, 0, NAN >> 16), [f32(np.nan)] * GROUP
    if not np.all(np.isfinite(x)):
        return marked
    magnitudes = [abs(float(v)) for v in x]
    spike_index = magnitudes.index(max(magnitudes))
    second = max(m for i, m in enumerate(magnitudes) if i != spike_index)
    spike = bf16_bits(x[spike_index])
    codes = [c for c in range(255) if float(f32(127.0 * float(s8x_scale(c)))) >= second]
    if not codes or spike & 0x7F80 == 0x7F80:
        return marked
    code = codes[0]
    q = []
    for i, v in enumerate(x):
        product = f32(0) if i == spike_index else f32(float(v) * float(s8x_inverse(code)))
        q.append(max(-127, min(127, int(np.rint(product)))))
    decoded = [f32(v * float(s8x_scale(code))) + f32(0) for v in q]
    decoded[spike_index] = f32(decoded[spike_index] + bits_to_f32(spike << 16))
    return struct.pack("<128bBBH", *q, code, spike_index, spike), decoded


def code_f32(x):
    decoded = [f32(np.nan) if np.isnan(v) else v + f32(0) for v in x]
    return x.tobytes(), decoded


CODECS = {"bf16": code_bf16, "fp8": code_fp8, "s8x": code_s8x, "f32": code_f32}


def cases():
    rng = np.random.default_rng(20)
    normal = rng.standard_normal(GROUP).astype(np.float32)
    yield "normal", normal
    yield "normal_large", normal * f32(3000)
    yield "normal_small", normal * f32(2.0 ** -18)
    outlier = normal.copy()
    outlier[77] *= 50
    yield "outlier", outlier
    yield "wide", (normal * np.exp2(rng.uniform(-30, 15, GROUP))).astype(np.float32)
    yield "short_1", normal[:1]
    yield "short_3", normal[3:6]
    yield "short_127", normal[1:]
    yield "zeros", np.zeros(GROUP, np.float32)
    yield "minus_zeros", -np.zeros(GROUP, np.float32)
    yield "denormals", (rng.integers(-2 ** 23, 2 ** 23, GROUP) * 2.0 ** -149).astype(np.float32)
    yield "denormal_and_one", np.array([2.0 ** -149] * 64 + [1.0] + [2.0 ** -130] * 63, np.float32)
    yield "equal_largest", np.array([0.5, -2.0, 2.0, -2.0] * 32, np.float32)
    yield "ties_int8", (np.arange(GROUP) - 63.5).astype(np.float32) * f32(2.0 ** -10)
    yield "ties_bf16", np.array([0x3F808000 + 0x10000 * i for i in range(GROUP)], np.uint32).view(np.float32)
    yield "ties_e4m3", np.array([448.0] + [1 + (2 * i + 1) / 16 for i in range(127)], np.float32)
    borders = np.zeros(GROUP, np.float32)
    for name, step in (("below", -1), ("at", 0), ("above", 1)):
        # The second largest magnitude at 127 * scale(163) and its neighbours.
        border = f32(127.0 * float(s8x_scale(163)))
        borders = normal.copy() * f32(0.1)
        borders[5] = f32(1000)
        borders[9] = bits_to_f32(int(border.view(np.uint32)) + step)
        yield f"code_border_{name}", borders
    top = f32(127.0 * float(s8x_scale(254)))
    yield "top_of_s8x", np.array([top, -top] + [top / f32(3)] * 126, np.float32)
    above = np.array([top * f32(4)] * 2 + [1.0] * 126, np.float32)
    yield "above_s8x", above
    yield "spike_above_s8x", np.array([1.0] * 3 + [1e30] + [1.0] * 124, np.float32)
    biggest = np.finfo(np.float32).max
    yield "max_float", np.array([biggest, -biggest] * 64, np.float32)
    yield "one_max_float", np.array([1.0] * 100 + [-biggest] + [0.25] * 27, np.float32)
    for name, value in (("nan", np.nan), ("inf", np.inf), ("minus_inf", -np.inf)):
        broken = normal.copy()
        broken[100] = value
        yield name, broken
    yield "tiny_2^-100", np.array([2.0 ** -100] * 2 + [2.0 ** -101] * 126, np.float32)
    yield "below_2^-100", np.array([2.0 ** -100 - 2.0 ** -124] + [2.0 ** -110] * 127, np.float32)


def hex_floats(values):
    bits = np.array(values, np.float32).view(np.uint32)
    return "".join("%08x" % (NAN if b & 0x7FFFFFFF > 0x7F800000 else b) for b in map(int, bits))


np.seterr(all="ignore")
for name, x in cases():
    x = np.asarray(x, np.float32)
    padded = np.zeros(GROUP, np.float32)
    padded[: len(x)] = x
    for codec, encode in CODECS.items():
        wire, decoded = encode(padded)
        print(name, codec, len(x), hex_floats(x), wire.hex(), hex_floats(decoded[: len(x)]))
