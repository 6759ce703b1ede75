// NCCL as this backend sees it: the functions that it calls, found in libnccl.so.2 when the transport "nccl" is asked for. Nothing is linked
// and no header of NCCL's is needed; where one is, nccl_library.c compares its prototypes and layouts with these.
#ifndef TPSHARD_KERNELS_CUDA_NCCL_LIBRARY_H
#define TPSHARD_KERNELS_CUDA_NCCL_LIBRARY_H

#include "formats/error.h"

#include <cuda_runtime_api.h>
#include <limits.h>
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
    NCCL_OLDEST =
        21800, // major * 10000 + minor * 100 + patch: communicators that do not block, and their configuration
    NCCL_ID_BYTES = 128,
    NCCL_UNSET = INT_MIN,
    NCCL_CONFIG_MAGIC = (int)0xcafebeef,
};

// ---- NCCL's own types and values, by its names ---------------------------------------------------------------------------

#ifndef NCCL_H_
struct ncclComm;
struct nccl_id {
    char internal[NCCL_ID_BYTES];
};
enum nccl_result {
    ncclSuccess = 0,
    ncclUnhandledCudaError = 1,
    ncclSystemError = 2,
    ncclInternalError = 3,
    ncclInvalidArgument = 4,
    ncclInvalidUsage = 5,
    ncclRemoteError = 6,
    ncclInProgress = 7,
};
enum nccl_type { ncclUint8 = 1 };
#define ncclComm_t struct ncclComm *
#define ncclUniqueId struct nccl_id
#define ncclResult_t enum nccl_result
#define ncclDataType_t enum nccl_type
#define ncclConfig_t struct nccl_config
#endif

// ncclConfig_t as it was in NCCL 2.18. Later ones are longer; NCCL reads as much as `size` says and takes what is behind it as not set.
struct nccl_config {
    size_t size;
    unsigned magic, version; // of these fields
    int blocking, cga_cluster_size, min_ctas, max_ctas;
    const char *net_name;
    int split_share;
};

// F(name, type of a pointer to it)
#define NCCL_FUNCTIONS(F)                                                                                              \
    F(ncclGetVersion, ncclResult_t (*)(int *version))                                                                  \
    F(ncclGetUniqueId, ncclResult_t (*)(ncclUniqueId * id))                                                            \
    F(ncclCommInitRankConfig,                                                                                          \
      ncclResult_t (*)(ncclComm_t * comm, int num_ranks, ncclUniqueId id, int rank, ncclConfig_t *config))             \
    F(ncclCommFinalize, ncclResult_t (*)(ncclComm_t comm))                                                             \
    F(ncclCommDestroy, ncclResult_t (*)(ncclComm_t comm))                                                              \
    F(ncclCommAbort, ncclResult_t (*)(ncclComm_t comm))                                                                \
    F(ncclCommGetAsyncError, ncclResult_t (*)(ncclComm_t comm, ncclResult_t * error))                                  \
    F(ncclGroupStart, ncclResult_t (*)(void))                                                                          \
    F(ncclGroupEnd, ncclResult_t (*)(void))                                                                            \
    F(ncclSend, ncclResult_t (*)(const void *from, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,       \
                                 cudaStream_t stream))                                                                 \
    F(ncclRecv,                                                                                                        \
      ncclResult_t (*)(void *to, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream))   \
    F(ncclAllGather, ncclResult_t (*)(const void *from, void *to, size_t count, ncclDataType_t type, ncclComm_t comm,  \
                                      cudaStream_t stream))                                                            \
    F(ncclGetErrorString, const char *(*)(ncclResult_t result))                                                        \
    F(ncclGetLastError, const char *(*)(ncclComm_t comm))

#define NCCL_DECLARE(name, type) __typeof__(type) name##_;
struct nccl_library {
    void *handle;
    char name[64];  // "NCCL 2.28.9"
    int version;    // as NCCL_OLDEST
    char note[160]; // what was set in the environment for it; "": nothing
    NCCL_FUNCTIONS(NCCL_DECLARE)
};
#undef NCCL_DECLARE

// file NULL: libnccl.so.2, then libnccl.so, where the loader looks for libraries. ERR_GPU with one sentence when there is none, when it lacks a
// function, or when it is too old. Where the driver is older than CUDA 13 and NCCL would take host memory in a way that such drivers may
// refuse, NCCL_CUMEM_HOST_ENABLE=0 is set in the environment, unless it is set already, and the note says so. Success: the caller owns
// what `library` holds (nccl_library_close).
int nccl_library_open(struct nccl_library *library, const char *file, struct error *err);
void nccl_library_close(struct nccl_library *library); // accepts one that is zero

#ifdef __cplusplus
}
#endif
#endif
