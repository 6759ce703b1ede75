// gemm.h on the CPU, for the emulator: every descriptor is checked for the emulated device, then the product is calculated in double when
// the stream runs, some columns side by side. Takes the place of gemm_cublaslt.c.
#include "formats/number_formats.h"
#include "kernels/cuda/gemm.h"
#include "tests/emulator/emulator.h"

#include <stdlib.h>

struct job {
    struct gemm gemm;
    struct job *next;
};

struct gemm_handle {
    uint64_t workspace_bytes;
    int sm;
    struct job *jobs; // a captured graph may run them again at any time
};

struct gemm_plan {
    struct gemm gemm;
};

int gemm_open(struct gemm_handle **out, uint64_t workspace_bytes, struct error *err)
{
    struct cudaDeviceProp properties;
    struct gemm_handle *h = calloc(1, sizeof *h);
    if (!h)
        return error_set(err, ERR_MEMORY, "no memory for the reference of matrix products");
    if (cudaGetDeviceProperties(&properties, 0) != cudaSuccess) {
        free(h);
        return error_set(err, ERR_GPU, "gemm: no device");
    }
    h->workspace_bytes = workspace_bytes;
    h->sm = 10 * properties.major + properties.minor;
    *out = h;
    return 0;
}

void gemm_close(struct gemm_handle *h)
{
    if (!h)
        return;
    for (struct job *job = h->jobs, *next; job; job = next) {
        next = job->next;
        free(job);
    }
    free(h);
}

const char *gemm_library(const struct gemm_handle *h)
{
    (void)h;
    return "reference on the CPU";
}

int gemm_prepare(struct gemm_handle *h, struct gemm_plan **out, const struct gemm *gemm, struct error *err)
{
    int rc = gemm_check(gemm, h->sm, err);
    if (rc)
        return rc;
    if (gemm->workspace_bytes > h->workspace_bytes)
        return error_set(err, ERR_GPU, "gemm: a workspace of %llu bytes is wanted, the handle has %llu",
                         (unsigned long long)gemm->workspace_bytes, (unsigned long long)h->workspace_bytes);
    struct gemm_plan *plan = malloc(sizeof *plan);
    if (!plan)
        return error_set(err, ERR_MEMORY, "no memory for the plan of a matrix product");
    plan->gemm = *gemm;
    *out = plan;
    return 0;
}

void gemm_plan_free(struct gemm_plan *plan) { free(plan); }

static double get(const void *at, enum gemm_format format, int64_t i)
{
    switch (format) {
    case GEMM_F16:
        return f16_to_f32(((const uint16_t *)at)[i]);
    case GEMM_BF16:
        return bf16_to_f32(((const uint16_t *)at)[i]);
    case GEMM_E4M3:
        return e4m3_to_f32(((const uint8_t *)at)[i]);
    default:
        return ((const float *)at)[i];
    }
}

static void put(void *at, enum gemm_format format, int64_t i, float value)
{
    if (format == GEMM_F32)
        ((float *)at)[i] = value;
    else
        ((uint16_t *)at)[i] = format == GEMM_F16 ? f32_to_f16(value) : f32_to_bf16(value);
}

static void widen(double *out, int64_t stride, const void *at, enum gemm_format format, int64_t begin, int64_t count)
{
    for (int64_t i = 0; i < count; i++)
        out[i * stride] = get(at, format, begin + i);
}

enum { SIDE_BY_SIDE = 8 };

// Columns first .. first + count of a row of y. w: [k][SIDE_BY_SIDE].
static void run_row(const struct gemm *g, int64_t row, int64_t first, int64_t count, const double *x, const double *w)
{
    bool outer = g->scale == GEMM_SCALE_OUTER, scaled = g->scale != GEMM_SCALE_NONE;
    double sum[SIDE_BY_SIDE] = {0};
    for (int64_t c = 0; c < g->k; c++)
        for (int j = 0; j < SIDE_BY_SIDE; j++)
            sum[j] += x[c] * w[c * SIDE_BY_SIDE + j];
    for (int64_t j = 0; j < count; j++) {
        double factor = scaled ? (double)g->x_scale[outer ? row : 0] * g->w_scale[outer ? first + j : 0] : 1;
        put(g->y, g->out, row * g->y_stride + first + j, (float)(sum[j] * factor));
    }
}

static void run_job(void *arg)
{
    const struct gemm *g = &((const struct job *)arg)->gemm;
    double *x = malloc((size_t)(g->m * g->k) * sizeof *x), *w = calloc((size_t)g->k * SIDE_BY_SIDE, sizeof *w);
    if (!x || !w)
        abort();
    for (int64_t i = 0; i < g->m; i++)
        widen(x + i * g->k, 1, g->x, g->in, i * g->x_stride, g->k);
    for (int64_t first = 0; first < g->n; first += SIDE_BY_SIDE) {
        int64_t count = g->n - first < SIDE_BY_SIDE ? g->n - first : SIDE_BY_SIDE;
        for (int64_t j = 0; j < count; j++)
            widen(w + j, SIDE_BY_SIDE, g->w, g->in, (first + j) * g->w_stride, g->k);
        for (int64_t i = 0; i < g->m; i++)
            run_row(g, i, first, count, x + i * g->k, w);
    }
    free(x);
    free(w);
}

int gemm_run(struct gemm_handle *h, const struct gemm_plan *plan, const struct gemm *gemm, cudaStream_t stream,
             struct error *err)
{
    int rc = gemm_check(gemm, h->sm, err);
    if (rc || (rc = gemm_check_same(&plan->gemm, gemm, err)))
        return rc;
    struct job *job = malloc(sizeof *job);
    if (!job)
        return error_set(err, ERR_MEMORY, "no memory for a matrix product");
    *job = (struct job){.gemm = *gemm, .next = h->jobs};
    h->jobs = job;
    emulator_enqueue(stream, run_job, job);
    return 0;
}
