#!/usr/bin/env python3
"""Golden data for tests/test_checksum.c, made with the Python binding of xxHash.

Needs: xxhash.   Run: python3 scripts/make_goldens_checksum.py > tests/golden/checksum/xxh3.txt

One line per length: bytes, XXH3-64 and XXH3-128 (seed 0, canonical spelling) of the first bytes of xxHash's own
sanity-check buffer.
"""
import xxhash

LENGTHS = list(range(1101)) + [2048, 2240, 2367, 65536, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 5000000]


def sanity_buffer(num_bytes):
    state, out = 2654435761, bytearray(num_bytes)
    for i in range(num_bytes):
        out[i] = state >> 56
        state = state * 11400714785074694797 & 0xFFFFFFFFFFFFFFFF
    return bytes(out)


data = sanity_buffer(max(LENGTHS))
for length in LENGTHS:
    print(length, xxhash.xxh3_64_hexdigest(data[:length]), xxhash.xxh3_128_hexdigest(data[:length]))
