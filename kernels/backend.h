// A backend: where one rank's numbers live, and the operations of the decoder over the rows of a step. The kernel table (kernels.h) is
// numbers in the host's memory; this is the layer above, shaped so that a device can do it too: whole rows, named buffers, nothing
// that returns a number to the host before it is asked for. "cpu" runs it on a kernel table and a thread pool; "cuda" is a shared
// object that is loaded when it is wanted.
//
// A step: begin, embed, then the operations of engine/decoder.c layer by layer, at the end logits or sample. What a backend has not
// finished when an operation returns, it finishes in the same order later; host memory that an operation filled or lent is valid when
// the operation returns.
//
// The input: what linear and experts multiply. norm, norm_latent, attend and activate make it, prepared at once for the matrix that uses
// it first (`next`); a matrix of another kind makes the backend prepare the same rows again.
//
// Law 9: the result of a row depends on its own sequence, the phase and the model, never on the rows beside it.
#ifndef TPSHARD_KERNELS_BACKEND_H
#define TPSHARD_KERNELS_BACKEND_H

#include "formats/error.h"
#include "formats/model_desc.h"
#include "kernels/exchange_choice.h"
#include "kernels/kernels.h"
#include "kernels/thread_pool.h"

#include <stdbool.h>
#include <stdint.h>

// One token to be computed: at `position` of sequence slot `sequence`, whose earlier positions are in the KV cache or in earlier rows.
struct token_row {
    uint32_t token;
    int32_t sequence;
    int64_t position;
};

// What the arithmetic may be chosen by. Prefill: consecutive positions of one sequence. Decode: any rows.
enum phase { PHASE_PREFILL, PHASE_DECODE };

// How what a block put out enters the residual: residual += residual_scale * RMSNorm(partial + bias). NULL: no bias, no norm.
struct join {
    const float *bias, *norm;
};

// A gated pair of products: down * activation(gate_up * x + bias), the activation rotated by mlp_rotation (model_desc.h). rows or columns are 0 where this rank holds no part.
struct mlp {
    struct matrix gate_up, down;
    const float *gate_up_bias, *down_bias;
};

// One layer's weights where the backend wants them (load). Vectors are f32 and NULL where the model has none; so is a matrix's data.
struct layer {
    unsigned flags; // enum layer_flags
    const float *attention_norm, *mlp_norm;
    const float *qkv_order, *gate_up_order; // [hidden] column numbers; NULL: in order
    struct join attention_join, mlp_join;

    struct matrix qkv; // plain attention
    const float *qkv_bias, *q_norm, *k_norm;
    struct matrix q_a, q_b, kv_a, kv_b; // latent attention; q_a only where the description has a q_rank
    const float *q_a_norm, *kv_a_norm;
    struct matrix o;
    const float *sinks; // [num_heads_local]

    struct mlp mlp; // of a layer without experts; with experts: the shared one, if the model has it
    struct matrix router;
    const float *router_bias, *choice_bias; // [num_experts]
    struct mlp *experts;                    // [num_experts_local]
};
struct weights {
    struct matrix embedding, head;              // the same matrix when embeddings are tied
    const float *rope, *rope_long, *rope_local; // [rotary_dim / 2] inverse frequencies; NULL where the model has none
    const float *final_norm;                    // [hidden_size]
    struct layer *layers;                       // [num_layers]
};

// What a device is made for; borrowed pointers outlive it.
struct device_shape {
    const struct model_desc *desc;
    const struct rank_share *share;
    int64_t max_rows;      // of a step
    int64_t max_sequences; // slots
    int64_t decode_rows;   // most rows of a decode step
    int64_t context;       // longest sequence
    int64_t num_pages;     // of the KV cache, all sequences
    enum kv_format kv_format;
    bool samples;            // sample will be called (one rank, whole vocabulary)
    enum transport exchange; // what exchange_open will be asked for; TRANSPORT_SHM: it will not be called
    bool feedback;           // likewise
};

// The first table of inverse frequencies: a model with a second one for long contexts is told once, at the start, which it is.
static inline const float *rope_of(const struct weights *weights, const struct device_shape *shape)
{
    bool is_long = shape->desc->rope_original_context > 0 && shape->context > shape->desc->rope_original_context;
    return is_long ? weights->rope_long : weights->rope;
}

// Page tables of all sequences: position p of sequence s lies in page pages[s * pages_per_sequence + p / KV_PAGE_TOKENS].
struct kv_pages {
    const int32_t *pages;
    int64_t pages_per_sequence;
    uint64_t version; // changes whenever an entry does
};

// One sequence's sampling; engine/sampler.h says what each part means.
struct sampling {
    double temperature;                                             // 0: greedy
    double top_p;                                                   // 1: off
    double min_p;                                                   // 0: off
    int64_t top_k;                                                  // 0: off
    double repetition_penalty, frequency_penalty, presence_penalty; // 1, 0, 0: off
    uint64_t seed;
};

// The f32 buffers of a step that operations name. A product's rows stand next to each other: [rows][rows of the matrix].
enum buffer {
    BUFFER_RESIDUAL,  // [rows][hidden]
    BUFFER_QKV,       // [rows][q + 2 kv]: this rank's heads; latent attention: [rows][q]
    BUFFER_Q_LATENT,  // [rows][q_rank]
    BUFFER_KV_LATENT, // [rows][kv_rank + rope_dim]
    BUFFER_SQUARES,   // [rows][2]: sums of squares of q and of k, of the heads that this rank answers for
    BUFFER_GATE_UP,   // [rows][2 * columns of down]
    BUFFER_ROUTER,    // [rows][num_experts (+ 1)]
    BUFFER_PARTIAL,   // [rows][hidden]: this rank's part of a sum over ranks
    BUFFER_NORMED, // [rows][hidden]: norm_own's rows, and their like from other ranks; a backend may give it BUFFER_PARTIAL's place
    BUFFER_COUNT,
};

struct memory_plan {
    uint64_t kv_bytes, scratch_bytes; // weights: the file's payload
    uint64_t exchange_bytes;          // what exchange_open will take
    uint64_t available_bytes;         // on the device, before anything was taken; UINT64_MAX: not known
    int device;                       // ranks that name the same device share it; -1: the host's memory
};

struct device_options {
    const struct kernels *kernels; // of the host
    struct thread_pool *pool;
    int rank, tp_size;
    int device; // -1: rank modulo the number of devices
};

struct link_board; // kernels/link_board.h
struct device;     // one rank's end of a backend; belongs to one thread

// What a device that exchanges sums with those of the other ranks needs of who opens it; borrowed, but for what the text says.
struct exchange_failure {
    int rank, whom; // who waited, and for whom: of those that did not come, the one furthest behind; -1: not known
    int operation, layer; // as all_reduce was told; operation -1: not known, an exchange of the step
    uint32_t call;        // how many exchanges the device had begun
    uint32_t phase;       // 0: parts, 1: sums
    uint32_t expected, seen;
};
struct exchange_options {
    enum transport transport; // TRANSPORT_HOST, TRANSPORT_P2P, TRANSPORT_NCCL
    int rank, tp_size;
    int timeout_ms; // of each wait
    bool feedback;  // all_reduce will be asked for it
    void
        *region; // of exchange_bytes, zero, on a page, in the memory of every rank; outlives the device; over nccl NULL
    uint64_t region_bytes; // of it
    // Called by the device's thread while it opens or waits. all [tp_size][bytes] receives everyone's mine.
    int (*all_gather)(void *arg, void *all, const void *mine, size_t bytes, struct error *err);
    // Whether the ranks are to end.
    bool (*aborted)(void *arg);
    // Says what has happened and ends all ranks; an error. failure NULL: it was another rank's.
    int (*failed)(void *arg, const struct exchange_failure *failure, struct error *err);
    // Ends all ranks with an error that this rank's device has found; *err becomes the first one of any rank.
    int (*raise)(void *arg, struct error *err);
    // "all_reduce of layer 3 (attention)"
    void (*describe)(void *arg, int operation, int layer, char *text, size_t bytes);
    void *arg;
};

// Rows first .. first + count - 1 of a window, dealt out to the ranks in turn.
struct dealt_rows {
    int64_t first, count;
    int first_owner; // of row `first`; < tp_size
};

struct dealt_norm {
    int first_owner; // of the window's row 0
    const struct join *join;
    const float *weight;
    struct exchange_choice choice; // of both halves
    bool feedback;                 // of the sums
    int operation[2], layer[2];    // of the sums; of the normed rows
};

// Where a payload will lie.
struct load_target {
    const uint8_t *base; // payload byte `offset` at base + offset, as the kernels see it
    uint8_t *place;      // the same memory where the host may write it; NULL: it is the map itself, or on a device
};

enum {
    BACKEND_ABI = 12,
    DEVICE_TEXT_BYTES = 768,
    DEVICE_BUS_BYTES = 24,
    LOAD_LANES = 16,             // threads that copy to a device at a time
    LOAD_BUFFER_BYTES = 8 << 20, // of one lane, at most
    DEVICE_SIDES = 2,
};

// All functions but close return 0 or an error; `device` is filled by open and owned by the caller.
struct backend {
    uint32_t abi;         // BACKEND_ABI
    const char *name;     // "cpu", "cuda"
    int64_t prefill_rows; // good size of a prefill step
    int64_t decode_rows;  // most rows of a decode step
    int64_t balance_rows; // so many rows of a decode step take about as long as reading the weights
    bool
        mixes_phases; // one arithmetic: a step may hold rows of both phases and of any sequences, and says PHASE_DECODE
    bool chunks_fixed;   // results of prefill depend on where its steps are cut
    bool reads_map;      // computes on a mapped file where it lies
    int64_t window_rows; // multiples of it may begin a window
    // Host memory that a rank's device takes beside the KV cache, for a parent that plans before its ranks run.
    uint64_t (*host_bytes)(const struct device_shape *shape, int threads);

    // Devices that this process may use; and one end's part of a probe of the links between them, until it is ordered to end. Both touch the
    // driver, and may hang in it: for processes of their own. NULL where there are no devices.
    int (*devices)(int *count, struct error *err);
    int (*link_probe)(struct link_board *board, int end, struct error *err);

    // Before the first rank is started as a thread of this process; several may share a device; called by who starts them. NULL: nothing to be done.
    void (*before_threads)(void);
    int (*open)(struct device **out, const struct device_options *options, struct error *err);
    void (*close)(struct device *device); // accepts NULL
    // One line about the device and how matrices will be multiplied on it; the second part is known after prepare.
    void (*describe)(const struct device *device, char text[DEVICE_TEXT_BYTES]);
    // Where the device is on this host's bus, "0000:01:00.0", the same to every process, however it is shown; "": not known. NULL: it is the host.
    void (*bus)(const struct device *device, char bus[DEVICE_BUS_BYTES]);

    // Memory that prepare and exchange_open will take; nothing is allocated yet.
    int (*plan)(struct device *device, const struct device_shape *shape, struct memory_plan *plan, struct error *err);
    // The payload's way to where the kernels read it: begin, copies from any threads, end. begin takes room for it, on lasting until
    // close. mapped (NULL: there is no map; only where reads_map): it is used where it lies, and outlives the device.
    int (*load_begin)(struct device *device, const uint8_t *mapped, uint64_t bytes, struct load_target *target,
                      struct error *err);
    // NULL where there is no device to copy to. A lane is one thread's, 0 .. LOAD_LANES - 1: a buffer that the device copies from, aligned
    // to pages, the same whenever it is asked for; and a copy from it, complete on return.
    int (*load_buffer)(struct device *device, int lane, uint64_t bytes, uint8_t **buffer, struct error *err);
    int (*load_copy)(struct device *device, int lane, uint64_t offset, const uint8_t *from, uint64_t bytes,
                     struct error *err);
    // Payload bytes that are there, to the host; NULL where base is the host's memory.
    int (*load_read)(struct device *device, uint64_t offset, void *to, uint64_t bytes, struct error *err);
    // Gives back what the lanes had; their threads have ended. Also after a load that failed.
    void (*load_end)(struct device *device);
    // After prepare: whether products of prefill expand weights anew for each step, so that cutting a step doubles that. NULL: no.
    bool (*expands)(const struct device *device);
    // Allocates buffers and KV cache. weights point into the payload, which may still be on its way: they are not read. They outlive the
    // device.
    int (*prepare)(struct device *device, const struct device_shape *shape, const struct weights *weights,
                   struct error *err);

    // ---- a step --------------------------------------------------------------------------------------------------
    int (*begin)(struct device *device, const struct token_row *rows, int64_t count, enum phase phase,
                 const struct kv_pages *pages, struct error *err);
    // A decode step from embed to sample, or to the last layer where the device does not sample, may be kept and run again for the same number
    // of rows. record: *replayed says that all of it was run from a kept one; otherwise the caller runs the operations and ends
    // with finish. Not called for steps that exchange anything over the host. Both are there where sample or all_reduce is.
    int (*record)(struct device *device, bool *replayed, struct error *err);
    int (*finish)(struct device *device, struct error *err);

    // residual = the tokens' rows of the embedding, rounded to bf16; zeros for tokens that this rank does not hold.
    int (*embed)(struct device *device, struct error *err);
    // residual *= factor.
    int (*scale_residual)(struct device *device, float factor, struct error *err);
    // The residual takes the last block's sum (join NULL: there is none yet); input = RMSNorm(residual) * weight (NULL: residual as it is),
    // its columns in the given order (NULL: as they are).
    int (*norm)(struct device *device, const struct join *join, const float *weight, const float *order,
                const struct matrix *next, struct error *err);
    // out = input * w^T.
    int (*linear)(struct device *device, enum buffer out, const struct matrix *w, struct error *err);
    // input = RMSNorm of the queries' latent, for q_b.
    int (*norm_latent)(struct device *device, int64_t layer, struct error *err);
    // QK_NORM_FULL: adds the bias and fills BUFFER_SQUARES; the ranks' sums are added up before finish_qkv.
    int (*squares)(struct device *device, int64_t layer, struct error *err);
    // Bias, q and k norms, rotation; keys and values of the rows (or their latent) go into the cache.
    int (*finish_qkv)(struct device *device, int64_t layer, struct error *err);
    // input = attention of the rows over their sequences, for o.
    int (*attend)(struct device *device, int64_t layer, struct error *err);
    // input = activation(gate + bias, up + bias) of BUFFER_GATE_UP, rotated where the model asks for it, for mlp->down.
    int (*activate)(struct device *device, const struct mlp *mlp, struct error *err);
    // Chooses experts and their weights by BUFFER_ROUTER, and the factor of the shared expert where it has one.
    int (*route)(struct device *device, int64_t layer, struct error *err);
    // partial = factor * partial (0 without a shared expert) + this rank's part of the chosen experts. input: norm's.
    int (*experts)(struct device *device, int64_t layer, struct error *err);
    // Lends a buffer's rows to the host (f32), with anything in them where the host is to write all of them (overwrite); returned takes back what it
    // has changed.
    int (*lend)(struct device *device, enum buffer buffer, bool overwrite, float **host, struct error *err);
    int (*returned)(struct device *device, enum buffer buffer, struct error *err);

    // ---- part of the rows; the three are NULL where a backend cannot do it ---------------------------------------------
    // From now on the operations above act on rows [first, first + count) of the step alone, and count them from there; begin sets it to all
    // rows. first: a multiple of window_rows. The input stays that of the rows it was made of, until the next one is made. Rows of other
    // windows keep what they have in every buffer. logits and sample are for a window of all rows.
    int (*window)(struct device *device, int64_t first, int64_t count, struct error *err);
    // A residual whose rows are dealt out to the ranks, of which this one owns rows first, first + stride, ... of the window: these take the
    // last block's sum as in norm, and BUFFER_NORMED = RMSNorm(residual) * weight in them. The input stays as it is.
    int (*norm_own)(struct device *device, const struct join *join, const float *weight, int64_t first, int64_t stride,
                    struct error *err);
    // input = BUFFER_NORMED, its columns in the given order; with norm_own and an exchange between them it stands for norm.
    int (*take_normed)(struct device *device, const float *order, const struct matrix *next, struct error *err);

    // ---- sums over ranks in memory of the host that all of them read; NULL where a backend's numbers lie elsewhere ---------
    // From now on BUFFER_PARTIAL is rows [max_rows][hidden], borrowed; what it held is gone, unless rows are those that it is already: then what
    // they were to add up to still becomes it. parts (NULL: none): what the ranks' parts of the window's
    // rows add up to becomes BUFFER_PARTIAL there; they stay as they are until the next operation that names BUFFER_PARTIAL has ended, or norm, or
    // until the next step begins; rows is none of them.
    int (*place_partial)(struct device *device, float *rows, const struct rank_parts *parts, struct error *err);

    // ---- sums over ranks by the devices themselves; NULL where the host does it, by lend and returned --------------------
    // Bytes of the region for so many ranks; 0: too many.
    uint64_t (*exchange_bytes)(int tp_size);
    // After prepare; all ranks call it, and it fails on all or none. Without it all_reduce is not called.
    int (*exchange_open)(struct device *device, const struct exchange_options *options, struct error *err);
    // buffer = the sum of all ranks' over the rows of the window, with the bits of engine/comm_reduce.h. feedback: what the wire loses is made up for
    // by the next sum of the step. All ranks call it in the same order with the same choice. A step with it may be kept (record). That a
    // rank did not come is found when the host next waits for the device. operation and layer go into the failure.
    int (*all_reduce)(struct device *device, enum buffer buffer, const struct exchange_choice *choice, bool feedback,
                      int operation, int layer, struct error *err);
    // Its halves, over rows of the window, as engine/comm_rows.h has them, and with its bits: the owners' rows become the sums; every row becomes what its
    // owner's is after the way over the wire. Rules as for all_reduce. There where norm_own and all_reduce are.
    int (*reduce_scatter_rows)(struct device *device, enum buffer buffer, const struct dealt_rows *rows,
                               const struct exchange_choice *choice, bool feedback, int operation, int layer,
                               struct error *err);
    int (*all_gather_rows)(struct device *device, enum buffer buffer, const struct dealt_rows *rows,
                           const struct exchange_choice *choice, int operation, int layer, struct error *err);
    // All that is between two blocks of a residual that is dealt out, over all rows of the window: reduce_scatter_rows of BUFFER_PARTIAL, norm_own of a
    // rank's own rows, all_gather_rows of BUFFER_NORMED. Its bits are those of the three; what has been added up is normed and sent on while more comes.
    int (*norm_dealt)(struct device *device, const struct dealt_norm *what, struct error *err);
    // What the wire has lost in the sums of this step, bf16 [rows of the window][hidden], for a later pipeline stage to make up for. lend_lost waits
    // for it and lends it to the host, with anything in it where the host is to write all of it (overwrite); what the host then has there is the device's
    // with returned_lost. With exchange_options.feedback; no other lend in between.
    int (*lend_lost)(struct device *device, bool overwrite, uint16_t **host, struct error *err);
    int (*returned_lost)(struct device *device, struct error *err);
    // What is asked for between side_begin and side_end goes on beside what is asked for after it: behind all that came before side_begin, and
    // behind earlier sides. side_wait: what is asked for from now on comes behind that side (0 .. DEVICE_SIDES - 1; nothing if it never began).
    // For all_reduce, its halves, norm_own and norm_dealt; what they touch is theirs until the side is waited for, and so is the order of exchanges: while a side is
    // under way, others belong to sides too. Not amid a recorded step. side_end without a side changes nothing.
    int (*side_begin)(struct device *device, int side, struct error *err);
    int (*side_end)(struct device *device, struct error *err);
    int (*side_wait)(struct device *device, int side, struct error *err);

    // Logits of some rows after the last layer, whose sum joins for them alone, so that logits may be asked for again; row_index [count]
    // (NULL: 0 .. count-1). The logits stay with the device for sample, or go to host [count][stride] when host is not NULL.
    int (*logits)(struct device *device, const struct join *join, const int64_t *row_index, int64_t count, float *host,
                  int64_t stride, struct error *err);

    // ---- sampling on the device; NULL where the host does it -------------------------------------------------------
    // What penalties count of a sequence, anew: prompt_count tokens of a prompt and those of the output behind it. sample adds what it
    // chooses for sequences with penalties.
    int (*count_tokens)(struct device *device, int32_t sequence, const uint32_t *tokens, int64_t prompt_count,
                        int64_t count, struct error *err);
    // After begin: how the tokens behind some rows of the step are chosen; row_index [count] (NULL: 0 .. count-1). sampling [count];
    // steps [count]: tokens their sequence has produced so far. Sequences with penalties have one row each.
    int (*sampling)(struct device *device, const struct sampling *const *sampling, const uint64_t *steps,
                    const int64_t *row_index, int64_t count, struct error *err);
    // Chooses a token for each of the rows whose logits were computed.
    int (*sample)(struct device *device, struct error *err);
    // Waits for the step and hands out its tokens [count].
    int (*tokens)(struct device *device, uint32_t *tokens, int64_t count, struct error *err);
};

extern const struct backend backend_cpu;
// Rows of a CPU rank's steps, at most shape's: a rank keeps to small buffers beside its file and its KV cache, so models with wide rows have shorter
// steps, down to `least` (or CPU_LEAST_ROWS, where that is more). That changes no result (law 9), and from there on little speed. row_extra_bytes:
// what else a row of a step takes.
enum { CPU_LEAST_ROWS = 64 };
int64_t cpu_step_rows(const struct device_shape *shape, int threads, uint64_t row_extra_bytes, int64_t least);
// Bytes that a row takes of the memory where tp_size ranks of one host make their sums: two sets of each, in place of a buffer of its own.
static inline uint64_t cpu_parts_row_bytes(int tp_size, int64_t hidden_size)
{
    return tp_size > 1 && tp_size <= RANK_PARTS_MOST
               ? (uint64_t)(2 * tp_size - 1) * (uint64_t)hidden_size * sizeof(float)
               : 0;
}

// The entry of a backend's shared object.
#define BACKEND_ENTRY "tpengine_cuda_backend"
typedef const struct backend *backend_entry_fn(void);

#endif
