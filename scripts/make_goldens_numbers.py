#!/usr/bin/env python3
"""Golden data for tests/test_number_formats.c, made with numpy and ml_dtypes, independent of formats/number_formats.h.

Needs: numpy, ml_dtypes.   Run: python3 scripts/make_goldens_numbers.py tests/golden/numbers

Writes one text file per series, one hexadecimal number per line:
  e4m3_to_f32, e5m2_to_f32, e8m0_to_f32, e2m1_to_f32   the f32 bits of every code (256 lines; e2m1: 16)
  f16_to_f32                          FNV-1a 64 of each 256 results (f32 bits), all 65,536 codes
  f32_to_{bf16,f16,e4m3,e2m1}_borders      FNV-1a 64 of each 4,096 results; inputs: inputs_borders()
  f32_to_{bf16,f16,e4m3,e2m1}_random       the same; inputs: 245 * 4,096 splitmix64 words, upper 32 bits as f32 bits
  f32_to_{int8,int4}_{ties,random}    the same; inputs: inputs_ties() and random multiples of 2^-16 in -128..128
  {mxfp4,nvfp4}_rows                  FNV-1a 64 of each row's codes, scales of groups, f32 scale of the row (mxfp4: 0) and f32 values;
                                      inputs: fp4_inputs()
Every NaN result is replaced by one value before hashing; results are hashed as little-endian bytes.
"""
import pathlib
import sys

import ml_dtypes
import numpy as np

BLOCK = 4096
RANDOM = 245 * BLOCK
SEED = 20240607


def splitmix64(count):
    state = (np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)) + np.uint64(SEED)
    z = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def fnv_blocks(results, block):
    """FNV-1a 64 of the bytes of every `block` results; the last block may be short."""
    hashes = []
    whole = len(results) // block * block
    for part in (results[:whole].reshape(-1, block), results[whole:].reshape(1, -1)):
        if part.size == 0:
            continue
        data = np.ascontiguousarray(part).view(np.uint8)
        h = np.full(len(data), 0xCBF29CE484222325, np.uint64)
        for column in data.T:
            h = (h ^ column.astype(np.uint64)) * np.uint64(0x100000001B3)
        hashes += [int(x) for x in h]
    return hashes


def to_bits(values, dtype, bits_dtype, nan):
    if dtype == ml_dtypes.float8_e4m3fn:  # our conversion saturates finite values, ml_dtypes does not
        values = np.where(np.isfinite(values), np.clip(values, np.float32(-448), np.float32(448)), values)
    if dtype == ml_dtypes.float4_e2m1fn:
        values = np.nan_to_num(np.clip(values, np.float32(-6), np.float32(6)), nan=0.0)
    small = values.astype(dtype)
    return np.where(np.isnan(small.astype(np.float32)), bits_dtype(nan), small.view(bits_dtype))


def to_int(values, low, high):
    return np.nan_to_num(np.rint(np.clip(values, low, high)), nan=0.0).astype(np.int8)


def inputs_borders(dtype, bits_dtype, max_finite_code, beyond):
    """Each sign, each finite code: its value, and the midpoint to the next value (`beyond` after the last) -1, 0, +1 ulp."""
    codes = np.arange(max_finite_code + 1).astype(bits_dtype)
    value = np.append(codes.view(dtype).astype(np.float64), beyond)
    middle = ((value[:-1] + value[1:]) / 2).astype(np.float32).view(np.uint32)
    rows = np.stack([value[:-1].astype(np.float32).view(np.uint32), middle - 1, middle, middle + 1], axis=1).ravel()
    special = np.array([0x7F800000, 0x7F7FFFFF, 0x7FC00000, 0x7F800001, 1, 0x007FFFFF], np.uint32)
    positive = np.append(rows, special)
    return np.append(positive, positive | np.uint32(0x80000000)).view(np.float32)


def inputs_ties():
    """k / 2 for k = -600..600, each -1, 0, +1 ulp, then huge, Inf and NaN of both signs."""
    half = (np.arange(-600, 601) / 2).astype(np.float32).view(np.uint32)
    rows = np.stack([half - np.uint32(1), half, half + np.uint32(1)], axis=1).ravel()
    special = np.array([0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0xFF7FFFFF, 0xFF800000, 0xFFC00000], np.uint32)
    return np.append(rows, special).view(np.float32)


FP4_VALUES = np.arange(16).astype(np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)


def fp4_inputs(rows=64, cols=256):
    """Rows of ever smaller size, of elements that differ by up to 2^7 more than a uniform draw."""
    words = splitmix64(rows * cols).reshape(rows, cols)
    whole = (words >> np.uint64(40)).astype(np.float64) - 2.0**23
    exponent = -16 - np.arange(rows).reshape(-1, 1) - (words & np.uint64(7)).astype(np.int64)
    return np.ldexp(whole, exponent).astype(np.float32)


def fp4_quantize(x, scales):
    """x [group] with the best of several f32 scales: index, codes. Ties go to the first."""
    best = None
    for i, scale in enumerate(scales):
        scaled = x * (np.float32(1) / scale)
        codes = np.clip(scaled, np.float32(-6), np.float32(6)).astype(ml_dtypes.float4_e2m1fn)
        error = np.sum((scaled.astype(np.float64) - codes.astype(np.float64)) ** 2) * float(scale) ** 2
        if best is None or error < best[0]:
            best = (error, i, codes.view(np.uint8) & 15)
    return best[1], best[2]


def mxfp4_row(x):
    codes, scales = [], []
    for group in x.reshape(-1, 32):
        code = int(np.floor(np.log2(np.abs(group).max().astype(np.float64)))) - 2 + 127
        candidates = np.array([code, code + 1], np.uint8)
        i, q = fp4_quantize(group, candidates.view(ml_dtypes.float8_e8m0fnu).astype(np.float32))
        codes.append(q)
        scales.append(candidates[i])
    values = FP4_VALUES[codes] * np.array(scales).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)[:, None]
    return codes, scales, np.float32(0), values


def nvfp4_row(x):
    row_scale = np.abs(x).max() / np.float32(6 * 448)
    codes, scales = [], []
    for group in x.reshape(-1, 16):
        tops = np.array([6, 5.5, 5, 4.5, 4, 6.5, 7, 7.5], np.float32)
        candidates = np.minimum(np.abs(group).max() / tops / row_scale, np.float32(448)).astype(ml_dtypes.float8_e4m3fn)
        candidates = np.maximum(candidates.view(np.uint8), 1)
        i, q = fp4_quantize(group, candidates.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * row_scale)
        codes.append(q)
        scales.append(candidates[i])
    of_groups = np.array(scales).view(ml_dtypes.float8_e4m3fn).astype(np.float32)[:, None]
    return codes, scales, row_scale, FP4_VALUES[codes] * of_groups * row_scale


def fp4_row_hash(row):
    codes, scales, row_scale, values = row
    parts = [np.array(codes, np.uint8), np.array(scales, np.uint8), np.float32(row_scale), values.astype(np.float32)]
    data = np.frombuffer(b"".join(part.tobytes() for part in parts), np.uint8)
    return fnv_blocks(data, len(data))[0]


def write(folder, name, numbers, digits):
    folder.joinpath(name + ".txt").write_text("".join(f"{int(n):0{digits}x}\n" for n in numbers))


def main():
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    np.seterr(all="ignore")

    def upcast(codes, dtype):
        values = codes.view(dtype).astype(np.float32)
        return np.where(np.isnan(values), np.uint32(0x7FC00000), values.view(np.uint32))

    bytes_all = np.arange(256).astype(np.uint8)
    write(folder, "e4m3_to_f32", upcast(bytes_all, ml_dtypes.float8_e4m3fn), 8)
    write(folder, "e5m2_to_f32", upcast(bytes_all, ml_dtypes.float8_e5m2), 8)
    write(folder, "e8m0_to_f32", upcast(bytes_all, ml_dtypes.float8_e8m0fnu), 8)
    write(folder, "e2m1_to_f32", FP4_VALUES.view(np.uint32), 8)
    for name, quantize in (("mxfp4", mxfp4_row), ("nvfp4", nvfp4_row)):
        write(folder, f"{name}_rows", [fp4_row_hash(quantize(x)) for x in fp4_inputs()], 16)
    write(folder, "f16_to_f32", fnv_blocks(upcast(np.arange(65536).astype(np.uint16), np.float16), 256), 16)

    words = splitmix64(RANDOM)
    patterns = (words >> np.uint64(32)).astype(np.uint32).view(np.float32)
    formats = [
        ("bf16", ml_dtypes.bfloat16, np.uint16, 0x7FC0, 0x7F7F, 2.0**128),
        ("f16", np.float16, np.uint16, 0x7E00, 0x7BFF, 65536.0),
        ("e4m3", ml_dtypes.float8_e4m3fn, np.uint8, 0x7F, 0x7E, 480.0),
        ("e2m1", ml_dtypes.float4_e2m1fn, np.uint8, 0, 7, 8.0),
    ]
    for name, dtype, bits_dtype, nan, max_finite_code, beyond in formats:
        borders = inputs_borders(dtype, bits_dtype, max_finite_code, beyond)
        for kind, values in (("borders", borders), ("random", patterns)):
            write(folder, f"f32_to_{name}_{kind}", fnv_blocks(to_bits(values, dtype, bits_dtype, nan), BLOCK), 16)

    in_range = ((words >> np.uint64(40)).astype(np.float32) - np.float32(2**23)) * np.float32(2.0**-16)
    for name, low, high in (("int8", -127, 127), ("int4", -8, 7)):
        for kind, values in (("ties", inputs_ties()), ("random", in_range)):
            write(folder, f"f32_to_{name}_{kind}", fnv_blocks(to_int(values, low, high), BLOCK), 16)


main()
