// One rank's device: what the host side of the CUDA backend shares between its files.
//
//   backend_cuda.c  the table; opening, describing and closing a device
//   device.c        the driver's errors
//   memory.c        what is allocated, planned before; loading the weights
//   multiply.c      which arithmetic a matrix product takes, and taking it
//   step.c          the operations of a step, and steps kept as CUDA graphs
//   step_attention.c  from queries and keys to what attention puts out
//   step_experts.c  those of a mixture of experts
//   exchange*.c     sums over the ranks of one machine, and their halves: over pinned memory of the host, p2p into other devices' memory, or by NCCL
//   link_probe.c    what devices really do with each other's memory
#ifndef TPSHARD_KERNELS_CUDA_DEVICE_H
#define TPSHARD_KERNELS_CUDA_DEVICE_H

#include "kernels/backend.h"
#include "kernels/cuda/launch.h"

#include <cuda_runtime_api.h>
#include <stdbool.h>
#include <stdint.h>

enum {
    PREFILL_ROWS = 2048,
    LATENT_ROWS = 512,    // rows whose queries are on the latent's side together
    EXPERTS_ROWS = 1024,  // rows whose chosen experts are computed together
    LOGITS_ROWS = 64,     // rows whose logits are on the device together
    GEMM_ROWS_STEP = 128, // products by cuBLASLt run at multiples of so many rows
};
// Beside what is allocated here: the code of kernels, which is loaded when it is first run, graphs, and what the driver rounds up.
#define RESERVE_BYTES (192ull << 20)
#ifndef SLAB_BYTES               // the emulator's are small, so that small matrices take several
#define SLAB_BYTES (32ull << 20) // weights expanded for cuBLASLt at a time; stays in the L2 cache of large chips
#endif

// What the host says of a step, in pinned memory and, copied in one piece, on the device.
struct step_block {
    struct device_sampling *sampling; // [decode_rows]
    uint32_t *token;                  // [count]
    int32_t *sequence, *position;     // [count]
    uint64_t bytes;
};

// What the next products multiply: rows of f32, if they are kept, and how they are prepared.
struct step_input {
    const float *rows;  // [count][cols]; NULL: not kept, as they are prepared already for all that is to come
    const float *order; // of the columns; NULL: as they are
    int64_t cols;
    enum input_format format;
};

// Work of the experts of one layer; of slots, see launch.h.
struct expert_work {
    struct device_expert *table; // [num_layers][num_experts_local]
    int32_t *chosen;             // [rows_capacity][experts_per_token]
    float *weight;               // likewise
    float *shared_factor;        // [rows_capacity]
    struct device_slots slots;   // of at most EXPERTS_ROWS rows, as are the following
    float *gate_up, *out;        // [slots][2 * expert_size_local], [slots][hidden]
    struct device_input input;   // of down: [slots]
};

// A decode step of so many rows. The first runs as it comes, which loads its kernels; the second is recorded; all others replay it.
struct step_graph {
    bool ran;
    cudaGraphExec_t exec;
};

// What one thread copies weights with.
struct load_lane {
    cudaStream_t stream;
    cudaEvent_t copied;
    uint8_t *pinned;
};

struct device {
    int index, sm; // sm: 10 * major + minor of the compute capability
    char name[64];
    struct thread_pool *pool;
    int tp_size;
    cudaStream_t stream;

    struct device_shape shape;
    const struct weights *weights;
    int64_t rows_capacity; // of buffers: max_rows, rounded up for cuBLASLt

    // Device memory: two allocations, the second cut up by memory.c; cuBLASLt's workspace is a third.
    uint8_t *payload, *arena;
    struct load_lane lanes[LOAD_LANES]; // while the weights come
    float *buffer[BUFFER_COUNT];        // [rows_capacity][buffer_width]
    float *attended, *logits;
    float *query, *mixed;      // [LATENT_ROWS][heads][k_dim], [..][kv_rank]; only with latent attention
    bool keeps_rows;           // a norm's rows are multiplied by matrices of several kinds
    float *normed;             // [max_rows][hidden]: these rows; else BUFFER_PARTIAL, which is free when a norm is done
    struct device_input input; // of the next product
    struct expert_work experts;
    uint8_t *kv; // [num_layers], each as kv.h has it
    int32_t *pages, *row_index, *identity;
    void *attention_scratch, *sample_scratch, *slab;
    float *slab_scale, *one;
    uint16_t *in_output; // [max_sequences][vocab]
    uint8_t *in_any;
    uint32_t *chosen; // [decode_rows]
    uint8_t *step_device;

    // Pinned host memory.
    uint8_t *step_host;
    int32_t *pages_host, *row_index_host;
    uint32_t *chosen_host;
    uint16_t *output_host; // [vocab], of one sequence; only where the device samples, as is the following
    uint8_t *any_host;
    float *lent;        // [max_rows][hidden]; only with several ranks
    float *logits_host; // [LOGITS_ROWS][vocab_local]; from the first use on

    // The step under way, and what stands for all of its rows: buffer, normed, block and count are the window's, from row window_first on.
    float *all_buffer[BUFFER_COUNT];
    struct step_block all_block;
    int64_t step_count, window_first;
    int64_t count;
    enum phase phase;
    uint64_t pages_version;
    int64_t pages_per_sequence;
    struct step_block host, block; // block: the same on the device
    cudaEvent_t uploaded;          // the host's part of the step has been read
    struct step_input source;      // of what `input` holds
    bool recording;
    bool rows_sent;            // what the host says of the step is on its way to the device
    int64_t sampled;           // rows that sample chooses for
    struct step_graph *graphs; // [decode_rows + 1], by rows of a decode step

    struct products *products; // multiply.c's; NULL before prepare
    struct exchange *exchange; // exchange.c's; NULL: the host exchanges
    bool hangs;                // an exchange has been closed that did not end
};

// 0, or ERR_GPU (ERR_MEMORY when memory ran out) with the device, `what` and the driver's words.
int device_status(const struct device *d, cudaError_t status, const char *what, struct error *err);
// Copies to the device before any stream of it goes on: what cudaMemcpy takes from memory that is not pinned may still be on its way when it returns,
// and our streams do not wait for it.
int device_upload(struct device *d, void *to, const void *from, uint64_t bytes, const char *what, struct error *err);
#define CHECK(call, what) device_status(d, call, what, err)

// ---- exchange.c
// Waits for what the stream has been given. ERR_RANK when an exchange did not end.
int device_wait(struct device *d, const char *what, struct error *err);
// Until the host's part of the step before has been read.
int device_wait_uploaded(struct device *d, struct error *err);

// ---- memory.c
uint64_t device_host_bytes(const struct device_shape *shape, int threads);
int device_plan(struct device *d, const struct device_shape *shape, struct memory_plan *plan, struct error *err);
int device_load_begin(struct device *d, const uint8_t *mapped, uint64_t bytes, struct load_target *target,
                      struct error *err);
int device_load_buffer(struct device *d, int lane, uint64_t bytes, uint8_t **buffer, struct error *err);
int device_load_copy(struct device *d, int lane, uint64_t offset, const uint8_t *from, uint64_t bytes,
                     struct error *err);
int device_load_read(struct device *d, uint64_t offset, void *to, uint64_t bytes, struct error *err);
void device_load_end(struct device *d);
int device_prepare(struct device *d, const struct device_shape *shape, const struct weights *weights,
                   struct error *err);
void device_end_recording(struct device *d); // of a step that failed on the way; else it does nothing
void device_settle(struct device *d);        // before anything is freed: nothing runs any more
void device_free_memory(struct device *d);
struct step_block device_step_block(const struct device *d, uint8_t *memory, int64_t count);

// ---- step_experts.c
// The device's table of experts; refuses layers whose experts differ in more than their numbers.
int experts_prepare(struct device *d, struct error *err);

// ---- multiply.c
// Chooses an arithmetic for every kind of weight in the model and proves those of cuBLASLt by example.
int multiply_prepare(struct device *d, struct error *err);
void multiply_free(struct device *d);
uint64_t multiply_workspace_bytes(int sm); // of cuBLASLt
void multiply_describe(const struct device *d, char *text, size_t bytes);
bool multiply_expands(const struct device *d); // weights, in prefill
// How rows must be prepared for a product with w in the step's phase.
enum input_format multiply_input(const struct device *d, const struct matrix *w);
// y [rows][rows of w] = the prepared input * w^T. For cuBLASLt y has room for rows rounded up to GEMM_ROWS_STEP.
int multiply(struct device *d, float *y, const struct matrix *w, int64_t rows, struct error *err);
// How rows must be prepared for the own kernel that widens weights of this kind, which takes any kind and shape.
enum input_format multiply_widening_input(enum weight_kind kind);

// ---- backend_cuda.c
int device_count(int *count, struct error *err);
// Where a rank computes that wants no device of its own (-1).
static inline int device_of_rank(int rank, int wanted, int count) { return wanted >= 0 ? wanted : rank % count; }

// ---- link_probe.c: see kernels/backend.h
int link_probe(struct link_board *board, int end, struct error *err);

// ---- fp4_probe.c
// Whether launch_linear_fp4 does here what it should: a small product with a known result, of a kind of weights. ERR_GPU if not.
int fp4_probe(enum weight_kind kind, cudaStream_t stream, struct error *err);

// ---- step.c: the operations of a step, as kernels/backend.h has them
int step_begin(struct device *d, const struct token_row *rows, int64_t count, enum phase phase,
               const struct kv_pages *pages, struct error *err);
int step_record(struct device *d, bool *replayed, struct error *err);
int step_finish(struct device *d, struct error *err);
int step_embed(struct device *d, struct error *err);
int step_scale_residual(struct device *d, float factor, struct error *err);
int step_norm(struct device *d, const struct join *join, const float *weight, const float *order,
              const struct matrix *next, struct error *err);
int step_linear(struct device *d, enum buffer out, const struct matrix *w, struct error *err);
int step_norm_latent(struct device *d, int64_t layer, struct error *err);
int step_squares(struct device *d, int64_t layer, struct error *err);
int step_finish_qkv(struct device *d, int64_t layer, struct error *err);
int step_attend(struct device *d, int64_t layer, struct error *err);
int step_activate(struct device *d, const struct mlp *mlp, struct error *err);
// Takes f32 rows [count][cols] for the next products, prepared for `next`.
int step_keep(struct device *d, const float *rows, const float *order, int64_t cols, const struct matrix *next,
              struct error *err);
struct device_join step_join(const struct device *d, const struct join *join);
// Prepares the rows of d->source in a format, unless they are.
int step_prepare(struct device *d, enum input_format format, struct error *err);
int step_route(struct device *d, int64_t layer, struct error *err);
int step_experts(struct device *d, int64_t layer, struct error *err);
int step_window(struct device *d, int64_t first, int64_t count, struct error *err);
int step_norm_own(struct device *d, const struct join *join, const float *weight, int64_t first, int64_t stride,
                  struct error *err);
int step_take_normed(struct device *d, const float *order, const struct matrix *next, struct error *err);
int step_lend(struct device *d, enum buffer buffer, bool overwrite, float **host, struct error *err);
int step_returned(struct device *d, enum buffer buffer, struct error *err);
int step_logits(struct device *d, const struct join *join, const int64_t *row_index, int64_t count, float *host,
                int64_t stride, struct error *err);
int step_count_tokens(struct device *d, int32_t sequence, const uint32_t *tokens, int64_t prompt_count, int64_t count,
                      struct error *err);
int step_sampling(struct device *d, const struct sampling *const *sampling, const uint64_t *steps,
                  const int64_t *row_index, int64_t count, struct error *err);
int step_sample(struct device *d, struct error *err);
int step_tokens(struct device *d, uint32_t *tokens, int64_t count, struct error *err);

#endif
