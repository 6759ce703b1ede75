// Which products exist, and how cuBLASLt is told of them. See gemm.h. What holds on which device is from cuBLASLt's documentation and
// header: FP8 from sm_89 on; scale vectors over rows and columns on sm_90 alone; the "TN" form only.
#include "kernels/cuda/gemm.h"

#include <stddef.h>

enum { SM_OLDEST = 80, SM_FP8 = 89, SM_OUTER = 90, FP8_MULTIPLE = 16, MAX_DIM = 0x7fffffff };

static const char *format_name(enum gemm_format format)
{
    static const char *const names[] = {"f32", "f16", "bf16", "e4m3"};
    return (unsigned)format <= GEMM_E4M3 ? names[format] : "an unknown format";
}

static int format_bytes(enum gemm_format format) { return format == GEMM_F32 ? 4 : format == GEMM_E4M3 ? 1 : 2; }

static int check_formats(const struct gemm *g, int sm, struct error *err)
{
    if (g->in != GEMM_F16 && g->in != GEMM_BF16 && g->in != GEMM_E4M3)
        return error_set(err, ERR_GPU, "gemm: x and w are %s; wanted f16, bf16 or e4m3", format_name(g->in));
    bool fp8 = g->in == GEMM_E4M3;
    if (g->out != GEMM_F32 && g->out != g->in && !(fp8 && (g->out == GEMM_F16 || g->out == GEMM_BF16)))
        return error_set(err, ERR_GPU, "gemm: y is %s for x and w in %s; wanted f32%s", format_name(g->out),
                         format_name(g->in), fp8 ? ", f16 or bf16" : " or the same");
    if (g->out == GEMM_E4M3)
        return error_set(err, ERR_GPU, "gemm: y is e4m3, which would need a scale of its own; wanted f32, f16 or bf16");
    if (sm < SM_OLDEST)
        return error_set(err, ERR_GPU, "gemm: the device is sm_%d; sm_%d is the oldest that is supported", sm,
                         SM_OLDEST);
    if (fp8 && sm < SM_FP8)
        return error_set(err, ERR_GPU, "gemm: e4m3 needs sm_%d or newer, the device is sm_%d", SM_FP8, sm);
    if (g->fast_accumulate && !fp8)
        return error_set(err, ERR_GPU, "gemm: fast accumulation exists for e4m3 only, x and w are %s",
                         format_name(g->in));
    return 0;
}

static int check_scales(const struct gemm *g, int sm, struct error *err)
{
    switch (g->scale) {
    case GEMM_SCALE_NONE:
        if (g->x_scale || g->w_scale)
            return error_set(err, ERR_GPU, "gemm: scales are given, but the mode is none");
        return 0;
    case GEMM_SCALE_TENSOR:
    case GEMM_SCALE_OUTER:
        break;
    default:
        return error_set(err, ERR_GPU, "gemm: unknown scale mode %d", (int)g->scale);
    }
    bool outer = g->scale == GEMM_SCALE_OUTER;
    if (g->in != GEMM_E4M3)
        return error_set(err, ERR_GPU, "gemm: scales exist for e4m3 only, x and w are %s", format_name(g->in));
    if (outer && sm != SM_OUTER)
        return error_set(err, ERR_GPU, "gemm: scales for each row and column exist on sm_%d only, the device is sm_%d",
                         SM_OUTER, sm);
    if (!g->x_scale || !g->w_scale)
        return error_set(err, ERR_GPU, "gemm: the mode wants scales, but that of %s is NULL", g->x_scale ? "w" : "x");
    uintptr_t unit = outer ? GEMM_ALIGNMENT : sizeof(float);
    if ((uintptr_t)g->x_scale % unit || (uintptr_t)g->w_scale % unit)
        return error_set(err, ERR_GPU, "gemm: the scale of %s is not aligned to %d bytes",
                         (uintptr_t)g->x_scale % unit ? "x" : "w", (int)unit);
    return 0;
}

static int check_matrix(const char *name, const void *pointer, int64_t cols, int64_t stride, enum gemm_format format,
                        struct error *err)
{
    if (!pointer)
        return error_set(err, ERR_GPU, "gemm: %s is NULL", name);
    if (stride < cols || stride > MAX_DIM)
        return error_set(err, ERR_GPU, "gemm: the rows of %s are %lld apart; wanted at least its %lld columns", name,
                         (long long)stride, (long long)cols);
    if ((uintptr_t)pointer % GEMM_ALIGNMENT)
        return error_set(err, ERR_GPU, "gemm: %s is not aligned to %d bytes", name, GEMM_ALIGNMENT);
    if (stride * format_bytes(format) % GEMM_ALIGNMENT)
        return error_set(err, ERR_GPU, "gemm: the rows of %s are %lld bytes apart, which is no multiple of %d", name,
                         (long long)stride * format_bytes(format), GEMM_ALIGNMENT);
    return 0;
}

int gemm_check(const struct gemm *g, int sm, struct error *err)
{
    int rc;
    if (g->m < 1 || g->n < 1 || g->k < 1 || g->m > MAX_DIM || g->n > MAX_DIM || g->k > MAX_DIM)
        return error_set(err, ERR_GPU, "gemm: m %lld, n %lld, k %lld; each must be from 1 to %d", (long long)g->m,
                         (long long)g->n, (long long)g->k, MAX_DIM);
    if ((rc = check_formats(g, sm, err)) || (rc = check_scales(g, sm, err)))
        return rc;
    if (g->in == GEMM_E4M3 && (g->n % FP8_MULTIPLE || g->k % FP8_MULTIPLE))
        return error_set(err, ERR_GPU, "gemm: n %lld, k %lld; both must be multiples of %d for e4m3", (long long)g->n,
                         (long long)g->k, FP8_MULTIPLE);
    if ((rc = check_matrix("x", g->x, g->k, g->x_stride, g->in, err)) ||
        (rc = check_matrix("w", g->w, g->k, g->w_stride, g->in, err)))
        return rc;
    return check_matrix("y", g->y, g->n, g->y_stride, g->out, err);
}

int gemm_check_same(const struct gemm *a, const struct gemm *b, struct error *err)
{
    if (a->m != b->m || a->n != b->n || a->k != b->k)
        return error_set(err, ERR_GPU, "gemm: prepared for m %lld, n %lld, k %lld, run with %lld, %lld, %lld",
                         (long long)a->m, (long long)a->n, (long long)a->k, (long long)b->m, (long long)b->n,
                         (long long)b->k);
    if (a->in != b->in || a->out != b->out || a->scale != b->scale || a->fast_accumulate != b->fast_accumulate)
        return error_set(err, ERR_GPU, "gemm: prepared for other formats or scales than it is run with");
    if (a->x_stride != b->x_stride || a->w_stride != b->w_stride || a->y_stride != b->y_stride)
        return error_set(err, ERR_GPU, "gemm: prepared for other strides than it is run with");
    return 0;
}

static int32_t data_type(enum gemm_format format)
{
    switch (format) {
    case GEMM_F16:
        return GEMM_CUDA_R_16F;
    case GEMM_BF16:
        return GEMM_CUDA_R_16BF;
    case GEMM_E4M3:
        return GEMM_CUDA_R_8F_E4M3;
    default:
        return GEMM_CUDA_R_32F;
    }
}

struct gemm_attributes gemm_attributes(const struct gemm *g)
{
    int32_t mode = g->scale == GEMM_SCALE_OUTER ? GEMM_CUBLASLT_SCALE_OUTER_VEC_32F : GEMM_CUBLASLT_SCALE_SCALAR_32F;
    return (struct gemm_attributes){
        .transa = GEMM_CUBLAS_OP_T,
        .transb = GEMM_CUBLAS_OP_N,
        .a = {data_type(g->in), (uint64_t)g->k, (uint64_t)g->n, g->w_stride},
        .b = {data_type(g->in), (uint64_t)g->k, (uint64_t)g->m, g->x_stride},
        .d = {data_type(g->out), (uint64_t)g->n, (uint64_t)g->m, g->y_stride},
        .compute_type = GEMM_CUBLAS_COMPUTE_32F,
        .scale_type = GEMM_CUDA_R_32F,
        .has_scales = g->scale != GEMM_SCALE_NONE,
        .a_scale_mode = mode,
        .b_scale_mode = mode,
        .a_scale = g->w_scale,
        .b_scale = g->x_scale,
        .fast_accumulate = g->fast_accumulate,
        .workspace_bytes = g->workspace_bytes,
        .alignment = GEMM_ALIGNMENT,
    };
}
