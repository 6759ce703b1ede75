// Proof by example for one kind of product. See gemm.h.
//
// The values are -2 .. 2 in a fixed pseudo-random order, so that every partial sum is a small integer, exact in whatever the tensor cores
// add up with; the scales are powers of two that differ from row to row and column to column, so that a scale that is swapped,
// ignored or applied twice shows.
#include "formats/number_formats.h"
#include "kernels/cuda/gemm.h"

#include <string.h>

enum { M = 80, N = 192, K = 272, Y_STRIDE = N + 16, X_STRIDE = K + 32 };

struct probe {
    struct gemm gemm;
    unsigned char *host; // x, w, x_scale, w_scale and y as on the device, one behind the other
    unsigned char *device;
    cudaStream_t stream;
};

static int value_at(uint32_t matrix, uint32_t row, uint32_t col)
{
    uint32_t h = (matrix * 0x9e3779b9u + row) * 0x85ebca6bu + col;
    h = (h ^ h >> 15) * 0x2c1b3c6du;
    h = (h ^ h >> 12) * 0x297a2d39u;
    return (int)((h ^ h >> 15) % 5) - 2;
}
static float x_scale_at(uint32_t row) { return f32_from_bits((127 - 2 + row % 5) << 23); }
static float w_scale_at(uint32_t row) { return f32_from_bits((127 - 3 + row % 7) << 23); }

static int format_bytes(enum gemm_format format) { return format == GEMM_F32 ? 4 : format == GEMM_E4M3 ? 1 : 2; }

static void put(void *at, enum gemm_format format, int64_t index, float value)
{
    if (format == GEMM_F32)
        ((float *)at)[index] = value;
    else if (format == GEMM_E4M3)
        ((uint8_t *)at)[index] = f32_to_e4m3(value);
    else
        ((uint16_t *)at)[index] = format == GEMM_F16 ? f32_to_f16(value) : f32_to_bf16(value);
}

static float get(const void *at, enum gemm_format format, int64_t index)
{
    if (format == GEMM_F32)
        return ((const float *)at)[index];
    uint16_t bits = ((const uint16_t *)at)[index];
    return format == GEMM_F16 ? f16_to_f32(bits) : bf16_to_f32(bits);
}

static int cuda_error(cudaError_t status, struct error *err)
{
    return status == cudaSuccess ? 0 : error_set(err, ERR_GPU, "gemm probe: %s", cudaGetErrorString(status));
}

// All offsets are multiples of 16.
enum { X_OFFSET = 0, W_OFFSET = M * X_STRIDE * 2, X_SCALE_OFFSET = W_OFFSET + N * K * 2 };
enum {
    W_SCALE_OFFSET = X_SCALE_OFFSET + M * 4,
    Y_OFFSET = W_SCALE_OFFSET + N * 4,
    BYTES = Y_OFFSET + M * Y_STRIDE * 4
};

static void fill(unsigned char *host, enum gemm_format format)
{
    memset(host, 0xff, BYTES); // NaN in every format: between the rows, and where y is not written
    for (uint32_t i = 0; i < M; i++)
        for (uint32_t c = 0; c < K; c++)
            put(host + X_OFFSET, format, (int64_t)i * X_STRIDE + c, (float)value_at(1, i, c));
    for (uint32_t j = 0; j < N; j++)
        for (uint32_t c = 0; c < K; c++)
            put(host + W_OFFSET, format, (int64_t)j * K + c, (float)value_at(2, j, c));
    for (uint32_t i = 0; i < M; i++)
        put(host + X_SCALE_OFFSET, GEMM_F32, i, x_scale_at(i));
    for (uint32_t j = 0; j < N; j++)
        put(host + W_SCALE_OFFSET, GEMM_F32, j, w_scale_at(j));
}

static float expected(enum gemm_format format, enum gemm_scale scale, uint32_t i, uint32_t j)
{
    int sum = 0;
    for (uint32_t c = 0; c < K; c++)
        sum += value_at(1, i, c) * value_at(2, j, c);
    float want = (float)sum;
    if (scale == GEMM_SCALE_TENSOR)
        want *= x_scale_at(0) * w_scale_at(0);
    if (scale == GEMM_SCALE_OUTER)
        want *= x_scale_at(i) * w_scale_at(j);
    uint32_t rounded;
    put(&rounded, format, 0, want);
    return get(&rounded, format, 0);
}

static int compare(const struct probe *p, struct error *err)
{
    const struct gemm *g = &p->gemm;
    for (uint32_t i = 0; i < M; i++) {
        for (uint32_t j = 0; j < N; j++) {
            float want = expected(g->out, g->scale, i, j),
                  got = get(p->host + Y_OFFSET, g->out, (int64_t)i * Y_STRIDE + j);
            if (!(got == want))
                return error_set(err, ERR_GPU,
                                 "gemm probe: element (%u, %u) of a known product is %g instead of %g; this kind of "
                                 "product cannot be trusted here",
                                 i, j, (double)got, (double)want);
        }
    }
    return 0;
}

static int run(struct gemm_handle *handle, struct probe *p, struct error *err)
{
    int rc;
    struct gemm_plan *plan = NULL;
    uint64_t y_bytes = (uint64_t)M * Y_STRIDE * (uint64_t)format_bytes(p->gemm.out);
    if ((rc = gemm_prepare(handle, &plan, &p->gemm, err)))
        return rc;
    if ((rc = cuda_error(cudaMemcpyAsync(p->device, p->host, BYTES, cudaMemcpyHostToDevice, p->stream), err)))
        goto fail;
    if ((rc = gemm_run(handle, plan, &p->gemm, p->stream, err)))
        goto fail;
    if ((rc = cuda_error(
             cudaMemcpyAsync(p->host + Y_OFFSET, p->device + Y_OFFSET, y_bytes, cudaMemcpyDeviceToHost, p->stream),
             err)))
        goto fail;
    if ((rc = cuda_error(cudaStreamSynchronize(p->stream), err)))
        goto fail;
    rc = compare(p, err);
fail:
    gemm_plan_free(plan);
    return rc;
}

int gemm_probe(struct gemm_handle *handle, const struct gemm *kind, struct error *err)
{
    int rc;
    struct probe p = {.host = NULL};
    if ((rc = cuda_error(cudaMallocHost((void **)&p.host, BYTES), err)))
        goto fail;
    if ((rc = cuda_error(cudaMalloc((void **)&p.device, BYTES), err)))
        goto fail;
    if ((rc = cuda_error(cudaStreamCreate(&p.stream), err)))
        goto fail;
    fill(p.host, kind->in);
    bool scaled = kind->scale != GEMM_SCALE_NONE;
    p.gemm = (struct gemm){
        .m = M,
        .n = N,
        .k = K,
        .in = kind->in,
        .out = kind->out,
        .scale = kind->scale,
        .fast_accumulate = kind->fast_accumulate,
        .x_stride = X_STRIDE,
        .w_stride = K,
        .y_stride = Y_STRIDE,
        .x = p.device + X_OFFSET,
        .w = p.device + W_OFFSET,
        .y = p.device + Y_OFFSET,
        .x_scale = scaled ? (const float *)(const void *)(p.device + X_SCALE_OFFSET) : NULL,
        .w_scale = scaled ? (const float *)(const void *)(p.device + W_SCALE_OFFSET) : NULL,
        .workspace_bytes = kind->workspace_bytes,
    };
    rc = run(handle, &p, err);
fail:
    if (p.stream)
        cudaStreamDestroy(p.stream);
    cudaFree(p.device);
    cudaFreeHost(p.host);
    return rc;
}
