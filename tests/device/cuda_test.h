// What the tests of the device's kernels share: cmocka, random numbers, device memory that the host sees too, packed matrices.
#ifndef TPSHARD_TESTS_DEVICE_CUDA_TEST_H
#define TPSHARD_TESTS_DEVICE_CUDA_TEST_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

extern "C" {
#include <cmocka.h>

#include "formats/number_formats.h"
#include "kernels/backend.h"
#include "kernels/kernels.h"
#include "kernels/pack.h"
}
#include "kernels/cuda/launch.h"
#include "tests/device/quick.h"
#include "tests/emulator/emulator.h"
#include "tests/random_help.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// ---- random numbers ----------------------------------------------------------------------------------------------------

static inline double uniform(void) { return (double)(random_bits() >> 11) * 0x1p-53; } // [0, 1)
static inline float centred(void) { return (float)(2 * uniform() - 1); }               // [-1, 1]

// ---- memory ------------------------------------------------------------------------------------------------------------

static inline void *zeroed(int64_t bytes) // the host's
{
    void *memory = calloc(1, bytes ? (size_t)bytes : 1);
    assert_non_null(memory);
    return memory;
}
static inline float *floats(int64_t count) { return (float *)zeroed(count * (int64_t)sizeof(float)); }

static inline void *device_new(int64_t bytes)
{
    void *memory = NULL;
    assert_int_equal(cudaMalloc(&memory, bytes ? (size_t)bytes : 1), cudaSuccess);
    return memory;
}
static inline void *device_zeros(int64_t bytes)
{
    void *memory = device_new(bytes);
    memset(memory, 0, (size_t)bytes);
    return memory;
}
template <class T> static inline T *device_array(int64_t count) { return (T *)device_new(count * (int64_t)sizeof(T)); }
template <class T> static inline T *device_copy(const T *host, int64_t count)
{
    T *memory = device_array<T>(count);
    assert_int_equal(cudaMemcpy(memory, host, (size_t)count * sizeof(T), cudaMemcpyHostToDevice), cudaSuccess);
    return memory;
}

static inline void finish(cudaError_t rc)
{
    assert_int_equal(rc, cudaSuccess);
    assert_int_equal(cudaDeviceSynchronize(), cudaSuccess);
}

// ---- numbers -----------------------------------------------------------------------------------------------------------

// Same bits, or both NaN.
static inline bool same(float a, float b) { return f32_bits(a) == f32_bits(b) || (isnan(a) && isnan(b)); }

static inline int64_t round_up_to(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

static inline const struct kernels *scalar(void)
{
    struct error err;
    const struct kernels *kernels = NULL;
    assert_int_equal(kernels_select(&kernels, "scalar", &err), 0);
    return kernels;
}

// ---- matrices ----------------------------------------------------------------------------------------------------------

struct kind_case {
    enum weight_kind kind;
    uint32_t group_size;
};

typedef void fill_row_fn(float *x, uint64_t row, uint64_t cols); // the values of row `row`

// Packs the rows as a rank file holds them. data and scale are zero before.
static inline void pack_matrix(const struct weight_shape *shape, void *data, void *scale, fill_row_fn *fill)
{
    float *x = floats((int64_t)shape->cols);
    void *memory = aligned_alloc(16, packed_row_bytes(shape->kind, shape->group_size, shape->cols) + 16);
    for (uint64_t row = 0; row < shape->rows; row++) {
        struct packed_row packed;
        struct error err;
        uint64_t block = row / WEIGHT_ROW_UNIT;
        fill(x, row, shape->cols);
        packed_row_place(&packed, memory, shape->kind, shape->group_size, shape->cols);
        assert_int_equal(pack_quantize_row(&packed, shape->kind, shape->group_size, x, shape->cols, NULL, &err), 0);
        pack_store_row((uint8_t *)data + block * pack_block_data_bytes(shape),
                       (uint8_t *)scale + block * pack_block_scale_bytes(shape), shape, block * WEIGHT_ROW_UNIT, row,
                       &packed, 0);
    }
    free(memory);
    free(x);
}

// In device memory.
static inline struct matrix make_matrix(struct kind_case k, uint64_t rows, uint64_t cols, fill_row_fn *fill)
{
    struct matrix w = {};
    assert_true(weight_shape_make(&w.shape, k.kind, k.group_size, rows, cols));
    void *data = device_zeros((int64_t)w.shape.data_bytes), *scale = device_zeros((int64_t)w.shape.scale_bytes);
    pack_matrix(&w.shape, data, scale, fill);
    w.data = data, w.scale = scale;
    return w;
}

static inline void free_matrix(struct matrix *w)
{
    cudaFree((void *)w->data);
    cudaFree((void *)w->scale);
}

static inline void free_input(struct device_input in)
{
    cudaFree(in.values);
    cudaFree(in.scale);
}

#endif
