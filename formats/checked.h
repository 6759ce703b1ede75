// Checked arithmetic for sizes that come from files. Every function returns false on overflow and then
// leaves *out untouched. No raw '+' or '*' on a value read from disk: these are used instead.
#ifndef TPSHARD_FORMATS_CHECKED_H
#define TPSHARD_FORMATS_CHECKED_H

#include <stdbool.h>
#include <stdint.h>

static inline bool checked_add(uint64_t a, uint64_t b, uint64_t *out)
{
    uint64_t sum;
    if (__builtin_add_overflow(a, b, &sum))
        return false;
    *out = sum;
    return true;
}

static inline bool checked_mul(uint64_t a, uint64_t b, uint64_t *out)
{
    uint64_t product;
    if (__builtin_mul_overflow(a, b, &product))
        return false;
    *out = product;
    return true;
}

// value rounded up to a multiple of unit; unit > 0.
static inline bool checked_round_up(uint64_t value, uint64_t unit, uint64_t *out)
{
    uint64_t sum;
    if (__builtin_add_overflow(value, unit - 1, &sum))
        return false;
    *out = sum / unit * unit;
    return true;
}

// True when [offset, offset + bytes) lies inside [0, total).
static inline bool checked_range(uint64_t offset, uint64_t bytes, uint64_t total)
{
    return offset <= total && bytes <= total - offset;
}

// For sizes the program itself bounded before: no overflow possible below 2^63.
static inline uint64_t round_up(uint64_t value, uint64_t unit) { return (value + unit - 1) / unit * unit; }
static inline uint64_t div_up(uint64_t value, uint64_t unit) { return (value + unit - 1) / unit; }

#endif
