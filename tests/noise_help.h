// The noise of a draw, Gumbel numbers of splitmix64, and the way back to a seed. For C and C++.
#ifndef TPSHARD_TESTS_NOISE_HELP_H
#define TPSHARD_TESTS_NOISE_HELP_H

#include <math.h>
#include <stdint.h>

static inline uint64_t mix(uint64_t z)
{
    z += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static inline uint64_t unshift(uint64_t z, int bits) // x with x ^ x >> bits == z
{
    uint64_t x = z;
    for (int known = bits; known < 64; known += bits)
        x = z ^ x >> bits;
    return x;
}

static inline uint64_t unmix(uint64_t z)
{
    z = unshift(z, 31) * 0x319642b2d24d8ec3u; // the inverses of the factors, modulo 2^64
    z = unshift(z, 27) * 0x96de1b173f119089u;
    return unshift(z, 30) - 0x9e3779b97f4a7c15u;
}

static inline double noise(uint64_t seed, uint64_t step, uint32_t token)
{
    uint64_t bits = mix(mix(mix(seed) ^ step) ^ token);
    return -log(-log(fmin(((double)(bits >> 11) + 0.5) * 0x1p-53, 1 - 0x1p-53)));
}

// A seed that gives this token, at this step, random bits of this value.
static inline uint64_t seed_for(uint64_t bits, uint64_t step, uint32_t token)
{
    return unmix(unmix(unmix(bits) ^ token) ^ step);
}

#endif
