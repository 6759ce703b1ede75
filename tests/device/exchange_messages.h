// Messages of the tests of sums over ranks: the same numbers for the same message, rank, row and column.
#ifndef TPSHARD_TESTS_DEVICE_EXCHANGE_MESSAGES_H
#define TPSHARD_TESTS_DEVICE_EXCHANGE_MESSAGES_H

#include "formats/number_formats.h"

#include <stdint.h>

static inline uint64_t exchange_mix(uint64_t x)
{
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

// A value of a message: most rows hold ordinary numbers; the others one kind of special ones each, of some ranks.
static inline float exchange_value(uint64_t message, int rank, int64_t row, int64_t col)
{
    uint64_t bits = exchange_mix(message << 40 ^ (uint64_t)rank << 34 ^ (uint64_t)row << 16 ^ (uint64_t)col);
    float x = ((float)(bits >> 40) * 0x1p-23f - 1.0f) * (bits % 97 == 0 ? 300.0f : 1.0f);
    bool here = (bits >> 8) % 64 == 0;
    switch (row % 9) {
    case 2:
        return rank == 1 && here ? f32_from_bits(0x7fa00000u | (uint32_t)(bits & 0x8000ffffu)) : x; // NaN, not quiet
    case 3:
        return here ? f32_from_bits(0x7f800000u | (uint32_t)(bits & 0x80000000u)) : x; // Inf of both signs
    case 4:
        return rank % 2 ? -0.0f : 0.0f;
    case 5:
        return x * 0x1p-140f;
    case 6:
        return x * 0x1p125f;
    case 7:
        return x * 0x1p-30f;
    default:
        return x;
    }
}

static inline void exchange_fill(float *data, uint64_t message, int rank, int64_t rows, int64_t cols)
{
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < cols; j++)
            data[i * cols + j] = exchange_value(message, rank, i, j);
}

#endif
