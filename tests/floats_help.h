// Random floats for tests, and their comparison bit by bit. Include behind cmocka.h.
#ifndef TPSHARD_TESTS_FLOATS_HELP_H
#define TPSHARD_TESTS_FLOATS_HELP_H

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>

#include "formats/number_formats.h"
#include "tests/random_help.h"

static inline int64_t random_below(int64_t limit) { return (int64_t)(random_bits() >> 33) % limit; }
static inline float uniform(void) { return (float)((double)(random_bits() >> 11) * 0x1p-52 - 1.0); } // [-1, 1)

static inline void *zeroed(uint64_t bytes)
{
    void *memory = calloc(1, bytes ? bytes : 1);
    assert_non_null(memory);
    return memory;
}

// One in twenty is an outlier. The caller frees them.
static inline float *random_floats(int64_t count)
{
    float *x = zeroed((uint64_t)count * sizeof *x);
    for (int64_t i = 0; i < count; i++)
        x[i] = uniform() * (random_below(20) ? 1.0f : 8.0f);
    return x;
}

// Same bits, or both NaN.
static inline bool same(float a, float b) { return f32_bits(a) == f32_bits(b) || (isnan(a) && isnan(b)); }

static inline void assert_same(const float *a, const float *b, int64_t count, const char *what)
{
    for (int64_t i = 0; i < count; i++)
        if (!same(a[i], b[i]))
            fail_msg("%s: element %lld is %.9g, not %.9g", what, (long long)i, (double)a[i], (double)b[i]);
}

#endif
