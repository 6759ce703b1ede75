// One rank's device: what the host side of the CUDA backend shares between its files.
//
//   backend_cuda.c  the table; opening, describing and closing a device
//   memory.c        what is allocated, planned before; loading the weights
//   multiply.c      which arithmetic a matrix product takes, and taking it
//   step.c          the operations of a step, and steps kept as CUDA graphs
#ifndef TPSHARD_KERNELS_CUDA_DEVICE_H
#define TPSHARD_KERNELS_CUDA_DEVICE_H

#include "kernels/backend.h"
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/launch.h"

#include <cuda_runtime_api.h>
#include <stdbool.h>
#include <stdint.h>

enum {
    PREFILL_ROWS = 2048,
    LOGITS_ROWS = 64,     // rows whose logits are on the device together
    GEMM_ROWS_STEP = 128, // products by cuBLASLt run at multiples of so many rows
    MAX_GEMM_PLANS = 512, // distinct products of one model
    LOAD_PIECE_BYTES = 16 << 20,
    LOAD_PIECES = 4,
};
// Beside what is allocated here: the code of kernels, which is loaded when it is first run, graphs, and what the driver rounds up.
#define RESERVE_BYTES (192ull << 20)
#ifndef SLAB_BYTES               // the emulator's are small, so that small matrices take several
#define SLAB_BYTES (32ull << 20) // weights expanded for cuBLASLt at a time; stays in the L2 cache of large chips
#endif

// How a matrix is multiplied.
enum arithmetic {
    ARITHMETIC_F16,        // own kernel: weights widened to f16 or bf16 in registers
    ARITHMETIC_INT8,       // own kernel: int8 activations, exact sums over groups
    ARITHMETIC_GEMM_F16,   // cuBLASLt, weights expanded into an f16 slab
    ARITHMETIC_GEMM_BF16,  // cuBLASLt, bf16 as it lies
    ARITHMETIC_FP8_OUTER,  // cuBLASLt, e4m3 with a scale for each row and column (sm_90)
    ARITHMETIC_FP8_TENSOR, // cuBLASLt, e4m3 without scales; rows and columns are scaled afterwards (sm_89, sm_120)
};

// A product of cuBLASLt that has been prepared.
struct gemm_entry {
    struct gemm problem; // pointers apart
    struct gemm_plan *plan;
};

// What the host says of a step, in pinned memory and, copied in one piece, on the device.
struct step_block {
    struct device_sampling *sampling; // [max_sequences]
    uint32_t *token;                  // [count]
    int32_t *sequence, *position;     // [count]
    uint64_t bytes;
};

// A decode step of so many rows. The first runs as it comes, which loads its kernels; the second is recorded; all others replay it.
struct step_graph {
    bool ran;
    cudaGraphExec_t exec;
};

struct device {
    int index, sm; // sm: 10 * major + minor of the compute capability
    char name[64];
    struct thread_pool *pool;
    int tp_size;
    cudaStream_t stream;

    struct device_shape shape;
    const struct weights *weights;
    int64_t q_size, kv_size, mlp_size;
    int64_t rows_capacity; // of buffers: max_rows, rounded up for cuBLASLt

    // Device memory: two allocations, the second cut up by memory.c; cuBLASLt's workspace is a third.
    uint8_t *payload, *arena;
    float *residual, *qkv, *attended, *gate_up, *partial, *logits;
    struct device_input input; // of the next product
    uint8_t *kv;               // [num_layers][k, v][num_pages][num_kv_heads][KV_PAGE_TOKENS][head_dim]
    int32_t *pages, *row_index, *identity;
    void *attention_scratch, *sample_scratch, *slab;
    float *slab_scale, *one;
    uint16_t *in_output; // [max_sequences][vocab]
    uint8_t *in_any;
    uint32_t *chosen; // [max_sequences]
    uint8_t *step_device;

    // Pinned host memory.
    uint8_t *step_host;
    int32_t *pages_host, *row_index_host;
    uint32_t *chosen_host;
    uint8_t *seen_host; // [vocab], of a prompt; only where the device samples
    float *lent;        // [max_rows][hidden]; only with several ranks
    float *logits_host; // [LOGITS_ROWS][vocab_local]; from the first use on

    // The step under way.
    int64_t count;
    enum phase phase;
    uint64_t pages_version;
    int64_t pages_per_sequence;
    struct step_block host, block; // block: the same on the device
    cudaEvent_t uploaded;          // the host's part of the step has been read
    bool recording;
    int64_t sampled;           // rows that sample chooses for
    struct step_graph *graphs; // [max_sequences + 1], by rows of a decode step

    // Products.
    struct gemm_handle *gemm; // NULL: not needed, or the library is not there
    char gemm_problem[256];   // why not, when it was wanted
    enum arithmetic arithmetic[2][WEIGHT_KIND_COUNT];
    struct gemm_entry plans[MAX_GEMM_PLANS];
    int num_plans;
};

// 0, or ERR_GPU (ERR_MEMORY when memory ran out) with the device, `what` and the driver's words.
int device_status(const struct device *d, cudaError_t status, const char *what, struct error *err);

// ---- memory.c
uint64_t device_host_bytes(const struct device_shape *shape, int threads);
int device_plan(struct device *d, const struct device_shape *shape, struct memory_plan *plan, struct error *err);
int device_load(struct device *d, const uint8_t **base, const uint8_t *mapped, uint64_t bytes, payload_check_fn *check,
                void *arg, struct error *err);
int device_prepare(struct device *d, const struct device_shape *shape, const struct weights *weights,
                   struct error *err);
void device_settle(struct device *d); // before anything is freed: nothing runs any more
void device_free_memory(struct device *d);
struct step_block device_step_block(const struct device *d, uint8_t *memory, int64_t count);

// ---- multiply.c
// Chooses an arithmetic for every kind of weight in the model and proves those of cuBLASLt by example.
int multiply_prepare(struct device *d, struct error *err);
void multiply_free(struct device *d);
uint64_t multiply_workspace_bytes(int sm); // of cuBLASLt
void multiply_describe(const struct device *d, char *text, size_t bytes);
// How rows must be prepared for a product with w in the step's phase.
enum input_format multiply_input(const struct device *d, const struct matrix *w);
// y [rows][y_stride] = the prepared input * w^T. For cuBLASLt y has room for rows rounded up to GEMM_ROWS_STEP.
int multiply(struct device *d, float *y, int64_t y_stride, const struct matrix *w, int64_t rows, struct error *err);

// ---- step.c
extern const struct backend step_operations; // only the operations of a step are set

#endif
