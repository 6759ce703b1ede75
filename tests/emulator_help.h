// What the tests of the emulator share. It includes cmocka, whose names would disturb the emulator's: other headers of this kind stand above.
#ifndef TPSHARD_TESTS_EMULATOR_HELP_H
#define TPSHARD_TESTS_EMULATOR_HELP_H

#include "kernels/cuda/primitives.cuh"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

extern "C" {
#include <cmocka.h>
}

enum { WARP = 32, POISON = 0xCD };
static const uint32_t ALL = 0xffffffffu, POISON_WORD = 0xcdcdcdcdu;

// Device memory for count elements, poisoned.
template <typename T> static inline T *device(size_t count)
{
    void *p;
    assert_int_equal(cudaMalloc(&p, count * sizeof(T)), cudaSuccess);
    return static_cast<T *>(p);
}

// Launches and waits.
#define RUN(kernel, grid, block, shared_bytes, ...)                                                                    \
    do {                                                                                                               \
        assert_int_equal(LAUNCH(kernel, grid, block, shared_bytes, nullptr, __VA_ARGS__), cudaSuccess);                \
        assert_int_equal(cudaDeviceSynchronize(), cudaSuccess);                                                        \
    } while (0)

static inline uint32_t random_bits(void)
{
    static uint64_t state = 1;
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t)(state >> 16);
}

#endif
