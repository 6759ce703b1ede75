// Random bits for tests, the same on every machine: xorshift64* (Marsaglia 2003, Vigna 2014). For C and C++.
#ifndef TPSHARD_TESTS_RANDOM_HELP_H
#define TPSHARD_TESTS_RANDOM_HELP_H

#include <stdint.h>

static uint64_t random_state = 0x9e3779b97f4a7c15u; // a test may set it, never to 0

static inline uint64_t random_bits(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state * 0x2545f4914f6cdd1du;
}

#endif
