// Matrix products by a vendor's library, for many rows: y = x * w^T. Owns which problems exist on which device, the descriptors that the
// library is given, and the proof by example that it does what they say. How weights become f16, bf16 or e4m3 is slab.cu's matter.
//
//   gemm_check.c     what is legal, in words; the descriptors: plain C, no device
//   gemm_probe.c     a small product with known values, before a kind of problem is trusted
//   gemm_cublaslt.c  the functions below by cuBLASLt, which is loaded at run time
//   tests/emulator/gemm_reference.c   the same functions on the CPU
#ifndef TPSHARD_KERNELS_CUDA_GEMM_H
#define TPSHARD_KERNELS_CUDA_GEMM_H

#include "formats/error.h"

#include <cuda_runtime_api.h>
#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum gemm_format { GEMM_F32, GEMM_F16, GEMM_BF16, GEMM_E4M3 };

enum gemm_scale {
    GEMM_SCALE_NONE,   // y = x * w^T, for every format
    GEMM_SCALE_TENSOR, // e4m3: y = x_scale[0] * w_scale[0] * (x * w^T)
    GEMM_SCALE_OUTER,  // e4m3 on sm_90: y[i, j] = x_scale[i] * w_scale[j] * (x * w^T)[i, j]
};

// One problem: y [m][n] = x [m][k] * w [n][k]^T, all row-major in device memory, f32 sums.
struct gemm {
    int64_t m, n, k;
    enum gemm_format in;  // of x and w: GEMM_F16, GEMM_BF16, GEMM_E4M3
    enum gemm_format out; // of y: GEMM_F32, or 16 bits: that of x and w, either one for e4m3
    enum gemm_scale scale;
    bool fast_accumulate;                 // e4m3: the sums may stay in the tensor cores' narrower registers
    int64_t x_stride, w_stride, y_stride; // elements from row to row
    const void *x, *w;
    void *y;
    const float *x_scale, *w_scale; // as `scale` says, else NULL
    uint64_t workspace_bytes;       // the most that the product may use of the handle's workspace
};

// 0, or ERR_GPU with a sentence: what is wrong with the problem, or that it does not exist on this device. sm: 10 * major + minor of
// the compute capability. Pointers are looked at, never followed.
int gemm_check(const struct gemm *gemm, int sm, struct error *err);
// 0, or ERR_GPU when the two differ in more than their pointers.
int gemm_check_same(const struct gemm *prepared, const struct gemm *gemm, struct error *err);

// ---- descriptors -----------------------------------------------------------------------------------------------------

// What cuBLASLt is told of a problem, in its own numbers; it thinks in columns, so that its A is w (transposed), its B is x and its D is
// y^T. A pure function of a problem that gemm_check accepts.
enum {
    GEMM_CUDA_R_32F = 0,
    GEMM_CUDA_R_16F = 2,
    GEMM_CUDA_R_16BF = 14,
    GEMM_CUDA_R_8F_E4M3 = 28,
    GEMM_CUBLAS_COMPUTE_32F = 68,
    GEMM_CUBLAS_OP_N = 0,
    GEMM_CUBLAS_OP_T = 1,
    GEMM_CUBLASLT_SCALE_SCALAR_32F = 0,
    GEMM_CUBLASLT_SCALE_OUTER_VEC_32F = 3,
    GEMM_ALIGNMENT = 16, // bytes, of pointers and of leading dimensions
};
struct gemm_layout {
    int32_t type; // cudaDataType_t
    uint64_t rows, cols;
    int64_t ld; // elements from column to column
};
struct gemm_attributes {
    int32_t transa, transb; // cublasOperation_t
    struct gemm_layout a, b, d;
    int32_t compute_type;               // cublasComputeType_t
    int32_t scale_type;                 // of alpha and beta
    bool has_scales;                    // the two modes and pointers are set
    int32_t a_scale_mode, b_scale_mode; // cublasLtMatmulMatrixScale_t
    const float *a_scale, *b_scale;
    int8_t fast_accumulate;
    uint64_t workspace_bytes;
    uint32_t alignment; // least, of each pointer
};
struct gemm_attributes gemm_attributes(const struct gemm *gemm);

// ---- running ---------------------------------------------------------------------------------------------------------

struct gemm_handle; // one device's library handle and workspace; one stream uses it at a time
struct gemm_plan;   // the algorithm for one problem; pointers apart

enum { GEMM_UNAVAILABLE = 1 }; // returned with a sentence: legal, but the library is missing or has no algorithm for it

// For the current device. GEMM_UNAVAILABLE when the library cannot be loaded. Success: caller owns *out.
int gemm_open(struct gemm_handle **out, uint64_t workspace_bytes, struct error *err);
void gemm_close(struct gemm_handle *handle);
const char *gemm_library(const struct gemm_handle *handle); // name and version, for a line of the log

// Finds an algorithm; the pointers of the problem must have their final alignment, nothing is read. A row's bits may depend on m: who
// needs the same bits for a row in any company prepares one m and fills up with rows that nobody reads. Success: caller owns
// *out, which must not outlive the handle.
int gemm_prepare(struct gemm_handle *handle, struct gemm_plan **out, const struct gemm *gemm, struct error *err);
void gemm_plan_free(struct gemm_plan *plan);
// Runs a problem that differs from the prepared one in its pointers alone (checked). Asynchronous on the stream; may be captured.
int gemm_run(struct gemm_handle *handle, const struct gemm_plan *plan, const struct gemm *gemm, cudaStream_t stream,
             struct error *err);

// Runs a small product of the same formats, scales and flags on the device and compares every element with what the host
// knows: sums of small integers, scales that are powers of two, so that there is only one right answer. GEMM_UNAVAILABLE: no such algorithm.
// ERR_GPU: the device or the library failed, or calculated something else. Waits for the device. The sizes and pointers of `kind` are not used.
int gemm_probe(struct gemm_handle *handle, const struct gemm *kind, struct error *err);

#ifdef __cplusplus
}
#endif
#endif
