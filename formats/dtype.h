// Element types of tensors in safetensors files, by the names used there.
#ifndef TPSHARD_FORMATS_DTYPE_H
#define TPSHARD_FORMATS_DTYPE_H

#include <stdbool.h>
#include <stdint.h>

enum dtype {
    DTYPE_BOOL,
    DTYPE_U8,
    DTYPE_I8,
    DTYPE_I16,
    DTYPE_U16,
    DTYPE_F16,
    DTYPE_BF16,
    DTYPE_I32,
    DTYPE_U32,
    DTYPE_F32,
    DTYPE_F64,
    DTYPE_I64,
    DTYPE_U64,
    DTYPE_F8_E4M3,
    DTYPE_F8_E5M2,
    DTYPE_F8_E8M0, // a power of two: scales of microscaling formats
    DTYPE_F4,      // e2m1, two to a byte
    DTYPE_COUNT,
};

const char *dtype_name(enum dtype dtype); // "BF16"
int dtype_bits(enum dtype dtype);         // of one element: 4, 8, 16, 32, 64
static inline uint64_t dtype_bytes(enum dtype dtype)
{
    return (uint64_t)dtype_bits(dtype) / 8;
} // of one element, 4 bits: 0
bool dtype_from_name(enum dtype *out, const char *name); // exact spelling; false: unknown, *out untouched

#endif
