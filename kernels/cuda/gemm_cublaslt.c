// gemm.h by cuBLASLt. The library is opened at run time, so that the backend loads on machines that lack it; only types come from its header.
// What the descriptors hold is gemm_attributes' matter; here it is copied into calls.
#include "kernels/cuda/gemm.h"

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wstrict-prototypes" // a declaration of the header says () for (void)
#include <cublasLt.h>
#pragma GCC diagnostic pop

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

_Static_assert((int)GEMM_CUDA_R_32F == (int)CUDA_R_32F && (int)GEMM_CUDA_R_16F == (int)CUDA_R_16F, "cudaDataType_t");
_Static_assert((int)GEMM_CUDA_R_16BF == (int)CUDA_R_16BF && (int)GEMM_CUDA_R_8F_E4M3 == (int)CUDA_R_8F_E4M3,
               "cudaDataType_t");
_Static_assert((int)GEMM_CUBLAS_COMPUTE_32F == (int)CUBLAS_COMPUTE_32F, "cublasComputeType_t");
_Static_assert((int)GEMM_CUBLAS_OP_N == (int)CUBLAS_OP_N && (int)GEMM_CUBLAS_OP_T == (int)CUBLAS_OP_T,
               "cublasOperation_t");
_Static_assert((int)GEMM_CUBLASLT_SCALE_SCALAR_32F == (int)CUBLASLT_MATMUL_MATRIX_SCALE_SCALAR_32F &&
                   (int)GEMM_CUBLASLT_SCALE_OUTER_VEC_32F == (int)CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F,
               "cublasLtMatmulMatrixScale_t");

// ---- the library -----------------------------------------------------------------------------------------------------

// Functions of the library that are called, each by its full name.
#define FUNCTIONS(F)                                                                                                   \
    F(cublasLtCreate)                                                                                                  \
    F(cublasLtDestroy)                                                                                                 \
    F(cublasLtGetStatusString)                                                                                         \
    F(cublasLtGetVersion)                                                                                              \
    F(cublasLtMatmul)                                                                                                  \
    F(cublasLtMatmulAlgoGetHeuristic)                                                                                  \
    F(cublasLtMatmulDescCreate)                                                                                        \
    F(cublasLtMatmulDescDestroy)                                                                                       \
    F(cublasLtMatmulDescSetAttribute)                                                                                  \
    F(cublasLtMatmulPreferenceCreate)                                                                                  \
    F(cublasLtMatmulPreferenceDestroy)                                                                                 \
    F(cublasLtMatmulPreferenceSetAttribute)                                                                            \
    F(cublasLtMatrixLayoutCreate)                                                                                      \
    F(cublasLtMatrixLayoutDestroy)

#define DECLARE(name) __typeof__(&(name)) name##_;
struct gemm_handle {
    void *library;
    cublasLtHandle_t lt;
    void *workspace; // device
    uint64_t workspace_bytes;
    int device, sm;
    char name[96];
    FUNCTIONS(DECLARE)
};

static int load_library(struct gemm_handle *h, struct error *err)
{
    static const char *const names[] = {"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"};
    const char *name = NULL;
    for (size_t i = 0; i < sizeof names / sizeof names[0] && !h->library; i++)
        h->library = dlopen(name = names[i], RTLD_NOW | RTLD_LOCAL);
    if (!h->library) {
        (error_set)(err, ERR_GPU, "cuBLASLt is not here: neither %s nor %s nor %s could be loaded (%s)", names[0],
                    names[1], names[2], dlerror());
        return GEMM_UNAVAILABLE;
    }
#define LOAD(function)                                                                                                 \
    *(void **)&h->function##_ = dlsym(h->library, #function);                                                          \
    if (!h->function##_) {                                                                                             \
        (error_set)(err, ERR_GPU, "%s has no function %s", name, #function);                                           \
        return GEMM_UNAVAILABLE;                                                                                       \
    }
    FUNCTIONS(LOAD)
    unsigned long version = h->cublasLtGetVersion_();
    snprintf(h->name, sizeof h->name, "cuBLASLt %lu.%lu.%lu (%s)", version / 10000, version / 100 % 100, version % 100,
             name);
    return 0;
}

static int cublas_error(const struct gemm_handle *h, cublasStatus_t status, const char *what, struct error *err)
{
    if (status == CUBLAS_STATUS_SUCCESS)
        return 0;
    return error_set(err, ERR_GPU, "%s: %s failed: %s", h->name, what, h->cublasLtGetStatusString_(status));
}

static int cuda_error(cudaError_t status, const char *what, struct error *err)
{
    return status == cudaSuccess ? 0 : error_set(err, ERR_GPU, "gemm: %s: %s", what, cudaGetErrorString(status));
}

int gemm_open(struct gemm_handle **out, uint64_t workspace_bytes, struct error *err)
{
    int rc, major = 0, minor = 0;
    struct gemm_handle *h = calloc(1, sizeof *h);
    if (!h)
        return error_set(err, ERR_MEMORY, "no memory for a handle of cuBLASLt");
    h->workspace_bytes = workspace_bytes;
    if ((rc = load_library(h, err)))
        goto fail;
    if ((rc = cuda_error(cudaGetDevice(&h->device), "no current device", err)))
        goto fail;
    if ((rc = cuda_error(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, h->device),
                         "the compute capability", err)))
        goto fail;
    if ((rc = cuda_error(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, h->device),
                         "the compute capability", err)))
        goto fail;
    h->sm = 10 * major + minor;
    if (workspace_bytes && (rc = cuda_error(cudaMalloc(&h->workspace, workspace_bytes), "the workspace", err)))
        goto fail;
    if ((rc = cublas_error(h, h->cublasLtCreate_(&h->lt), "cublasLtCreate", err)))
        goto fail;
    *out = h;
    return 0;
fail:
    gemm_close(h);
    return rc;
}

void gemm_close(struct gemm_handle *h)
{
    if (!h)
        return;
    if (h->lt)
        h->cublasLtDestroy_(h->lt);
    cudaFree(h->workspace);
    // The library stays loaded: what it registered with the runtime outlives its handles.
    free(h);
}

const char *gemm_library(const struct gemm_handle *h) { return h->name; }

// ---- plans -----------------------------------------------------------------------------------------------------------

struct gemm_plan {
    const struct gemm_handle *handle;
    struct gemm gemm; // as prepared
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t a, b, d;
    cublasLtMatmulAlgo_t algo;
    uint64_t workspace_bytes; // that the algorithm needs
};

void gemm_plan_free(struct gemm_plan *p)
{
    if (!p)
        return;
    if (p->desc)
        p->handle->cublasLtMatmulDescDestroy_(p->desc);
    if (p->a)
        p->handle->cublasLtMatrixLayoutDestroy_(p->a);
    if (p->b)
        p->handle->cublasLtMatrixLayoutDestroy_(p->b);
    if (p->d)
        p->handle->cublasLtMatrixLayoutDestroy_(p->d);
    free(p);
}

#define SET(handle, desc, attribute, value)                                                                            \
    (handle)->cublasLtMatmulDescSetAttribute_((desc), CUBLASLT_MATMUL_DESC_##attribute, &(value), sizeof(value))

// An attribute that this version of the library refuses means that it lacks the mode.
static int set_scales(const struct gemm_handle *h, cublasLtMatmulDesc_t desc, const struct gemm_attributes *at,
                      struct error *err)
{
    if (!at->has_scales)
        return 0;
    cublasStatus_t status = CUBLAS_STATUS_SUCCESS;
    if (at->a_scale_mode != GEMM_CUBLASLT_SCALE_SCALAR_32F) // which is the default, and older libraries know no other
        status = SET(h, desc, A_SCALE_MODE, at->a_scale_mode);
    if (status == CUBLAS_STATUS_SUCCESS && at->b_scale_mode != GEMM_CUBLASLT_SCALE_SCALAR_32F)
        status = SET(h, desc, B_SCALE_MODE, at->b_scale_mode);
    if (status == CUBLAS_STATUS_SUCCESS)
        status = SET(h, desc, A_SCALE_POINTER, at->a_scale);
    if (status == CUBLAS_STATUS_SUCCESS)
        status = SET(h, desc, B_SCALE_POINTER, at->b_scale);
    if (status == CUBLAS_STATUS_SUCCESS)
        return 0;
    (error_set)(err, ERR_GPU, "%s refuses scale mode %d: %s", h->name, at->a_scale_mode,
                h->cublasLtGetStatusString_(status));
    return GEMM_UNAVAILABLE;
}

static int make_descriptor(struct gemm_plan *p, const struct gemm_attributes *at, struct error *err)
{
    const struct gemm_handle *h = p->handle;
    cublasStatus_t status =
        h->cublasLtMatmulDescCreate_(&p->desc, (cublasComputeType_t)at->compute_type, (cudaDataType_t)at->scale_type);
    if (status == CUBLAS_STATUS_SUCCESS)
        status = SET(h, p->desc, TRANSA, at->transa);
    if (status == CUBLAS_STATUS_SUCCESS)
        status = SET(h, p->desc, TRANSB, at->transb);
    if (status == CUBLAS_STATUS_SUCCESS && at->fast_accumulate)
        status = SET(h, p->desc, FAST_ACCUM, at->fast_accumulate);
    if (status != CUBLAS_STATUS_SUCCESS)
        return cublas_error(h, status, "the descriptor of a product", err);
    return set_scales(h, p->desc, at, err);
}

static int make_layout(const struct gemm_handle *h, cublasLtMatrixLayout_t *out, const struct gemm_layout *layout,
                       struct error *err)
{
    return cublas_error(
        h, h->cublasLtMatrixLayoutCreate_(out, (cudaDataType_t)layout->type, layout->rows, layout->cols, layout->ld),
        "cublasLtMatrixLayoutCreate", err);
}

static int find_algorithm(struct gemm_plan *p, const struct gemm_attributes *at, struct error *err)
{
    static const cublasLtMatmulPreferenceAttributes_t alignments[] = {
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
    const struct gemm_handle *h = p->handle;
    cublasLtMatmulPreference_t preference = NULL;
    cublasLtMatmulHeuristicResult_t result;
    int found = 0;
    memset(&result, 0, sizeof result);
    int rc = cublas_error(h, h->cublasLtMatmulPreferenceCreate_(&preference), "cublasLtMatmulPreferenceCreate", err);
    if (rc)
        return rc;
    cublasStatus_t status = h->cublasLtMatmulPreferenceSetAttribute_(
        preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &at->workspace_bytes, sizeof at->workspace_bytes);
    for (size_t i = 0; i < sizeof alignments / sizeof alignments[0] && status == CUBLAS_STATUS_SUCCESS; i++)
        status =
            h->cublasLtMatmulPreferenceSetAttribute_(preference, alignments[i], &at->alignment, sizeof at->alignment);
    if (status != CUBLAS_STATUS_SUCCESS) {
        rc = cublas_error(h, status, "cublasLtMatmulPreferenceSetAttribute", err);
        goto fail;
    }
    status = h->cublasLtMatmulAlgoGetHeuristic_(h->lt, p->desc, p->a, p->b, p->d, p->d, preference, 1, &result, &found);
    if (status != CUBLAS_STATUS_SUCCESS || found < 1 || result.state != CUBLAS_STATUS_SUCCESS) {
        (error_set)(err, ERR_GPU, "%s has no algorithm for m %lld, n %lld, k %lld on sm_%d: %s", h->name,
                    (long long)p->gemm.m, (long long)p->gemm.n, (long long)p->gemm.k, h->sm,
                    h->cublasLtGetStatusString_(status != CUBLAS_STATUS_SUCCESS ? status : result.state));
        rc = GEMM_UNAVAILABLE;
        goto fail;
    }
    p->algo = result.algo;
    p->workspace_bytes = result.workspaceSize;
fail:
    h->cublasLtMatmulPreferenceDestroy_(preference);
    return rc;
}

int gemm_prepare(struct gemm_handle *h, struct gemm_plan **out, const struct gemm *gemm, struct error *err)
{
    int rc = gemm_check(gemm, h->sm, err);
    if (rc)
        return rc;
    if (gemm->workspace_bytes > h->workspace_bytes)
        return error_set(err, ERR_GPU, "gemm: a workspace of %llu bytes is wanted, the handle has %llu",
                         (unsigned long long)gemm->workspace_bytes, (unsigned long long)h->workspace_bytes);
    struct gemm_attributes at = gemm_attributes(gemm);
    struct gemm_plan *p = calloc(1, sizeof *p);
    if (!p)
        return error_set(err, ERR_MEMORY, "no memory for the plan of a matrix product");
    p->handle = h;
    p->gemm = *gemm;
    if ((rc = make_descriptor(p, &at, err)))
        goto fail;
    if ((rc = make_layout(h, &p->a, &at.a, err)) || (rc = make_layout(h, &p->b, &at.b, err)) ||
        (rc = make_layout(h, &p->d, &at.d, err)))
        goto fail;
    if ((rc = find_algorithm(p, &at, err)))
        goto fail;
    *out = p;
    return 0;
fail:
    gemm_plan_free(p);
    return rc;
}

int gemm_run(struct gemm_handle *h, const struct gemm_plan *p, const struct gemm *gemm, cudaStream_t stream,
             struct error *err)
{
    static const float one = 1, zero = 0;
    int rc = gemm_check(gemm, h->sm, err);
    if (rc || (rc = gemm_check_same(&p->gemm, gemm, err)))
        return rc;
    struct gemm_attributes at = gemm_attributes(gemm);
    if ((rc = set_scales(h, p->desc, &at, err)))
        return rc;
    return cublas_error(h,
                        h->cublasLtMatmul_(h->lt, p->desc, &one, gemm->w, p->a, gemm->x, p->b, &zero, gemm->y, p->d,
                                           gemm->y, p->d, &p->algo, h->workspace, p->workspace_bytes, stream),
                        "cublasLtMatmul", err);
}
