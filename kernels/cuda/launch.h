// The device kernels' launchers: what the host side of the CUDA backend (C11) calls, one function per operation over rows.
//
// Every pointer is device memory unless said otherwise; every launch is asynchronous on `stream` and returns its own
// error. Nothing here allocates, waits or depends on values that only the device knows, so any launch may be captured into a CUDA
// graph (after a first one, which loads its code): the counts are arguments, all that changes from step to step lies in device memory.
//
// Law 9: what a row becomes depends on that row, the weights and the shapes of the model alone, never on the number of rows in the
// launch or on the order in which blocks run. Splits of a sum are fixed by the shape, and their parts are added in a fixed order.
#ifndef TPSHARD_KERNELS_CUDA_LAUNCH_H
#define TPSHARD_KERNELS_CUDA_LAUNCH_H

#include "kernels/backend.h"

#include <cuda_runtime_api.h>
#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// ---- inputs of a matrix product ------------------------------------------------------------------------------------

// How the rows of a matmul's input lie in memory. The permutations let one lane of the tensor cores' operand B read its part of
// 64 columns with 16-byte loads.
enum input_format {
    INPUT_F16, // half, natural order; scale [rows]: a power of two, x = value * scale, 1 unless |x| exceeds 32768
    INPUT_F16_TILE, // half, inside each 64 columns element t * 16 + w * 4 + j holds column 16 w + 2 t + {0, 1, 8, 9}[j]; scale as above
    INPUT_BF16, // bfloat16, natural order; no scale
    INPUT_INT8, // int8, natural order; scale [rows][stride / 128], exactly kernels.h's q_scale (NaN for a group with NaN or Inf)
    INPUT_INT8_TILE, // int8, inside each 64 columns byte (t * 4 + w) * 4 + j holds column 16 w + 2 t + {0, 8, 1, 9}[j]; scale as above
    INPUT_E4M3, // e4m3, natural order; scale [rows]: largest magnitude / 448, NaN if the row holds NaN or Inf
    INPUT_MXFP8_TILE, // e4m3, order as INPUT_INT8_TILE; scale: bytes [rows][stride / 32], e8m0 of 32 columns: the least that brings their
                      // largest magnitude to 448 or below, 1 for zeros; for columns with NaN or Inf 255 and NaN codes
    INPUT_F32, // float, natural order; no scale. From launch_norm alone: what is prepared later
};

struct device_input {
    void *
        values; // [rows][stride] elements of the format; columns from cols to the next multiple of 128 are zero, but with INPUT_F32
    float *scale;   // see the format
    int64_t stride; // elements, a multiple of 128; INPUT_F32: at least cols
};

// ---- rows --------------------------------------------------------------------------------------------------------------

// residual[row, :] = bf16(row tokens[row] - vocab_begin of table) + 0.0f, zeros where this rank does not hold the token.
cudaError_t launch_embed(float *residual, const struct matrix *table, const uint32_t *tokens, int64_t rows,
                         int64_t vocab_begin, cudaStream_t stream);

// How a block's sum enters the residual: scale * (partial + bias), of which the sum is normalised first when norm is there.
struct device_join {
    const float *partial;     // [..][cols]; NULL: nothing enters
    const float *bias, *norm; // [cols]; NULL: none
    float scale;
};

// x = residual[r, :] + join's, r = row_index ? row_index[row] : row; partial + bias first, each step rounded. Without row_index, x is
// written back to residual. out[row, :] = x / sqrt(mean(x^2) + eps) * weight (NULL: x) in `format`.
cudaError_t launch_norm(struct device_input out, enum input_format format, float *residual, struct device_join join,
                        const float *weight, const int32_t *row_index, int64_t rows, int64_t cols, float eps,
                        cudaStream_t stream);
// launch_norm to f32 of rows that stand row_stride floats apart, in out, residual and join's partial alike; out may be the partial.
cudaError_t launch_norm_apart(float *out, float *residual, struct device_join join, const float *weight, int64_t rows,
                              int64_t cols, int64_t row_stride, float eps, cudaStream_t stream);

// out[row, i] = x[row, order ? order[i] : i] in `format`. order [cols]: column numbers as floats.
cudaError_t launch_prepare(struct device_input out, enum input_format format, const float *x, int64_t x_stride,
                           const float *order, int64_t rows, int64_t cols, cudaStream_t stream);

// out[row, i] = activation(gate + bias, up + bias) in `format`; gate_up is [rows][2 * cols], gate first; bias [2 * cols] or NULL.
// rotation: each so many columns, a power of two up to 128 that divides cols, are then rotated by a Hadamard matrix (kernels/kernels.h); 0: not.
cudaError_t launch_activate(struct device_input out, enum input_format format, enum activation activation,
                            int64_t rotation, const float *gate_up, const float *bias, int64_t rows, int64_t cols,
                            cudaStream_t stream);

// x[i] *= factor, then (softcap > 0) x[i] = softcap * tanh(x[i] / softcap).
cudaError_t launch_scale_values(float *x, int64_t count, float factor, float softcap, cudaStream_t stream);

// ---- attention ---------------------------------------------------------------------------------------------------------

// One layer's keys and values, as struct kv_view, for all sequences.
//   k, v    [num_pages][num_kv_heads][KV_PAGE_TOKENS][head_dim]; int4: head_dim / 2 bytes, as kv_int4_byte (kernels/kv_codes.h) has them
//   k_scale, v_scale  bf16 [num_pages][num_kv_heads][KV_PAGE_TOKENS] where the format has scales
//   pages   [sequences][pages_per_sequence]: position p of sequence s lies in page pages[s][p / KV_PAGE_TOKENS]
struct device_kv {
    void *k, *v;
    enum kv_format format;
    const int32_t *pages;
    int64_t pages_per_sequence, num_kv_heads, head_dim;
    uint16_t *k_scale, *v_scale;
};

// The rows of a step: row i belongs to sequence[i] and stands at position[i].
struct device_rows {
    const int32_t *sequence, *position;
    int64_t count;
};

// What attention is, in this model and on this rank. Query head h (0 <= h < num_heads, this rank's) reads kv head
// (head_begin + h) / heads_per_kv - kv_head_begin.
struct attention_shape {
    int64_t num_heads, head_begin, heads_per_kv, kv_head_begin;
    float scale;        // of q . k
    float soft_cap;     // 0: none; else s becomes soft_cap * tanh(s / soft_cap)
    int64_t window;     // positions a query sees, itself included; 0: all
    const float *sinks; // [num_heads], a logit each that takes part in the softmax and carries no value; NULL: none
};

// How positions rotate the pairs of a head: by position * inv_freq[i], an angle rounded to f32.
struct device_rotation {
    const float *inv_freq; // [half of the columns that rotate]; NULL: no rotation
    float factor;          // of cosines and sines
    bool interleaved;      // pairs (2i, 2i + 1) rotate, not (i, i + half of them)
};

// What becomes of q, k and v between their product and attention.
struct device_qkv {
    const float *bias; // [(num_heads + 2 * num_kv_heads) * head_dim]; NULL: none
    const float *q_norm,
        *k_norm; // [head_dim], or with squares [num_heads * head_dim] and [num_kv_heads * head_dim]; NULL: none
    const float *squares;     // [rows][2], see launch_squares; NULL: each head is normed by itself
    int64_t q_width, k_width; // columns that the squares are of, on all ranks
    float eps;
    struct device_rotation rotation;
    int64_t rotary_dim; // leading columns of a head that rotate
    int64_t num_heads;
};
// qkv [rows][(num_heads + 2 * num_kv_heads) * head_dim], q then k then v: adds the bias, normalises q and k, rotates them, writes q back and stores k and v of the row in the cache.
// Where the cache has scales, q, k and v are multiplied by a Hadamard matrix before, as kernels/kv_codes.h says; what attention puts out then is
// still to be rotated back.
cudaError_t launch_finish_qkv(float *qkv, struct device_qkv how, struct device_rows rows, struct device_kv kv,
                              cudaStream_t stream);
// x [heads][head_dim]: each head rotated as kernels/kv_codes.h says, times the factor.
cudaError_t launch_rotate_heads(float *x, int64_t heads, int64_t head_dim, float factor, cudaStream_t stream);
// qkv [rows][width] += bias (NULL: none); squares[row] = the sums of squares of columns [0, q_end) and [k_begin, k_end).
cudaError_t launch_squares(float *squares, float *qkv, const float *bias, int64_t rows, int64_t width, int64_t q_end,
                           int64_t k_begin, int64_t k_end, cudaStream_t stream);

// out [rows][num_heads * head_dim] = attention of each row over positions max(0, p + 1 - window) .. p of its sequence.
// Few rows, of any sequences (decode). Positions are dealt to blocks in chunks of ATTENTION_CHUNK from position 0 on, whatever the length;
// the chunks' parts are combined in ascending order. max_context bounds the positions; scratch: attention_scratch_bytes.
enum { ATTENTION_CHUNK = 256 };
uint64_t attention_scratch_bytes(int64_t max_rows, int64_t num_heads, int64_t head_dim, int64_t max_context);
cudaError_t launch_attention_decode(float *out, const float *qkv, struct attention_shape shape, struct device_rows rows,
                                    struct device_kv kv, int64_t max_context, void *scratch, cudaStream_t stream);
// The same for the rows of one sequence at ascending, consecutive positions (prefill); tensor cores, no scratch.
cudaError_t launch_attention_prefill(float *out, const float *qkv, struct attention_shape shape,
                                     struct device_rows rows, struct device_kv kv, cudaStream_t stream);

// ---- attention over latent rows --------------------------------------------------------------------------------------------

// As struct latent_desc. The cache has one row for all heads, kv.head_dim = kv_rank + rope_dim, num_kv_heads 1; there are no values.
struct device_latent {
    int64_t num_heads, kv_rank, rope_dim, nope_dim, v_dim;
};
enum { LATENT_CHUNK = 512, LATENT_MAX_KEY = 592, LATENT_MAX_VALUE = 512 };

// q [rows][num_heads][nope_dim + rope_dim]: rotates the last rope_dim columns. latent [rows][kv_rank + rope_dim] goes into the cache: its
// first part normalised, the rest rotated.
cudaError_t launch_finish_latent(float *q, const float *latent, const float *norm, float eps,
                                 struct device_rotation rotation, struct device_latent shape, struct device_rows rows,
                                 struct device_kv kv, cudaStream_t stream);
// query [rows][num_heads][kv_rank + rope_dim] of q, by the heads' keys in kv_b.
cudaError_t launch_absorb_queries(float *query, const float *q, const struct matrix *kv_b, struct device_latent shape,
                                  int64_t rows, cudaStream_t stream);
// mixed [rows][num_heads][kv_rank]: the latents that each query sees, by their weights. scratch NULL: prefill, but rows may be any.
// Otherwise decode, by chunks: latent_scratch_bytes.
uint64_t latent_scratch_bytes(int64_t max_rows, struct device_latent shape, int64_t max_context);
cudaError_t launch_latent_attention(float *mixed, const float *query, struct attention_shape attention,
                                    struct device_latent shape, struct device_rows rows, struct device_kv kv,
                                    int64_t max_context, void *scratch, cudaStream_t stream);
// out [rows][num_heads * v_dim] of mixed, by the heads' values in kv_b.
cudaError_t launch_latent_values(float *out, const float *mixed, const struct matrix *kv_b, struct device_latent shape,
                                 int64_t rows, cudaStream_t stream);

// ---- matrix products -----------------------------------------------------------------------------------------------------

// y[row, :] = in[row, :] * w^T, f32, y [rows][y_stride]; any row count. w's pointers are on the device.
// linear_f16: weights stay as they are and are widened in registers, f32 sums; all kinds but f32 and int8. Four-bit kinds take
// INPUT_F16_TILE, bf16 INPUT_BF16, the others INPUT_F16. Made for few rows: reads the weights once for each 64 rows
// (each 16 where the matrix has fewer than 2048).
cudaError_t launch_linear_f16(float *y, int64_t y_stride, const struct matrix *w, struct device_input in, int64_t rows,
                              cudaStream_t stream);
// linear_int8: int4 with INPUT_INT8_TILE, int8 with INPUT_INT8, exact integer sums over groups; the same bits as kernels.h's matmul.
// Any row count: a kernel for few rows and one with tiles for many, the same bits from both.
cudaError_t launch_linear_int8(float *y, int64_t y_stride, const struct matrix *w, struct device_input in, int64_t rows,
                               cudaStream_t stream);

// linear_fp4: mxfp4 and nvfp4 with INPUT_MXFP8_TILE on the fp8 tensor cores of sm_120, weights exact; any row count. mxfp4: all in the tensor
// cores, which apply the scales of both; nvfp4: sums over 16 columns, their scales applied to f32.
cudaError_t launch_linear_fp4(float *y, int64_t y_stride, const struct matrix *w, struct device_input in, int64_t rows,
                              cudaStream_t stream);

// ---- mixtures of experts -------------------------------------------------------------------------------------------------

// A slot is one of a row's chosen experts: slot = row * experts_per_token + its place in the order of choice.
// One local expert's part of a tile of slots that a block multiplies; a tile with count 0 is none.
struct expert_tile {
    int32_t expert, first, count; // slots [first, first + count) of the list
};
enum { EXPERT_TILE_FEW = 8, EXPERT_TILE_MANY = 32 };
// The slots of this rank's experts, listed expert by expert, ascending.
struct device_slots {
    int32_t *slot;             // [number of slots]
    struct expert_tile *tiles; // [num_tiles], at most tile_tokens slots each
    int64_t num_tiles, tile_tokens;
};
// The most tiles that so many slots make.
static inline int64_t expert_tiles(int64_t slots, int64_t num_experts_local, int64_t tile_tokens)
{
    return slots / tile_tokens + (num_experts_local < slots ? num_experts_local : slots);
}

// Where one matrix and one bias of an expert lie, in device memory.
struct device_weights {
    const void *data, *scale;
    const float *bias;
};
struct device_expert {
    struct device_weights gate_up, down;
};

// What a router makes of its logits [rows][num_experts + shared_gate]; see struct experts_desc.
struct device_router {
    enum router kind;
    int64_t num_experts, experts_per_token, num_groups, groups_per_token, group_members;
    bool shared_gate, normalise;
    float scale;
    const float *bias, *choice_bias; // [num_experts]; NULL: none
    int64_t expert_begin, num_experts_local;
};
// chosen [slots]: the expert, counted from expert_begin, -1 on another rank; weight [slots]; shared_factor [rows] with a shared gate.
cudaError_t launch_route(int32_t *chosen, float *weight, float *shared_factor, const float *logits,
                         struct device_router router, int64_t rows, cudaStream_t stream);
// Fills the list and its tiles from chosen [count].
cudaError_t launch_list_slots(struct device_slots slots, const int32_t *chosen, int64_t count,
                              int64_t num_experts_local, cudaStream_t stream);
// y [slots][rows of shape] = input row slot / slots_per_row * w^T of the slot's expert, for the slots of the list, by linear_f16's
// arithmetic, int8 weights too (INPUT_F16). The expert's weights are experts[expert * experts_step].
cudaError_t launch_linear_experts(float *y, const struct weight_shape *shape, struct device_input in, int slots_per_row,
                                  const struct device_weights *experts, int64_t experts_step, struct device_slots slots,
                                  cudaStream_t stream);
// launch_activate of the slots [count] whose expert is here, each with its expert's bias.
cudaError_t launch_activate_slots(struct device_input out, enum input_format format, enum activation activation,
                                  int64_t rotation, const float *gate_up, const int32_t *chosen,
                                  const struct device_expert *experts, int64_t count, int64_t cols,
                                  cudaStream_t stream);
// partial [rows][cols] = (shared ? shared_factor (NULL: 1) * partial : 0) + the sum over the row's slots, in order, of weight *
// (out [slot] + the expert's bias, if with_bias).
cudaError_t launch_combine(float *partial, bool shared, const float *shared_factor, const float *out,
                           const int32_t *chosen, const float *weight, const struct device_expert *experts,
                           bool with_bias, int64_t experts_per_token, int64_t rows, int64_t cols, cudaStream_t stream);

// ---- slabs for cuBLASLt ---------------------------------------------------------------------------------------------------

enum slab_format { SLAB_F16, SLAB_BF16, SLAB_E4M3 };
// Expands rows [row_begin, row_end) of w into slab [row_end - row_begin][cols_padded] of the format, row-major. SLAB_E4M3 from int4 also writes
// row_scale [row_end - row_begin], w ~ slab * row_scale, chosen so that the row's largest magnitude is 448; the other formats hold
// the weights themselves (row_scale NULL). f16 saturates at 65504.
cudaError_t launch_slab(void *slab, enum slab_format format, float *row_scale, const struct matrix *w,
                        int64_t row_begin, int64_t row_end, cudaStream_t stream);
// y[row, i] *= row_factor[row] * column_factor[i]; either may be NULL (1). y [rows][y_stride].
cudaError_t launch_scale(float *y, int64_t y_stride, const float *row_factor, const float *column_factor, int64_t rows,
                         int64_t cols, cudaStream_t stream);

// ---- sampling --------------------------------------------------------------------------------------------------------------

// One row's sampling, as engine/sampler.h describes it, in device memory.
struct device_sampling {
    double temperature; // 0: greedy
    double top_p;       // 1: off
    double min_p;       // 0: off
    double repetition_penalty, frequency_penalty, presence_penalty;
    uint64_t seed, step;
    int32_t top_k;    // 0: off
    int32_t sequence; // with penalties: whose counts are used and whose chosen token is counted
};
#define SAMPLE_NAN UINT32_MAX        // the row's logits hold a NaN
#define SAMPLE_NONE (UINT32_MAX - 1) // every logit is minus infinity, or min_p leaves none
// Chooses one token for each row of logits [rows][stride] (changed) over the whole vocabulary. Exact top-k and top-p by radix search over
// ordered bits; masses are summed as integers, so that the result does not depend on the order of blocks. Ties as in engine/sampler.h.
//   in_output u16 [sequences][vocab], in_any u8 [sequences][vocab]: the counts of engine/sampler.h, NULL when no row has a penalty;
//     the token chosen for a row with penalties is counted
//   tokens [rows]: the choice, or SAMPLE_NAN, or SAMPLE_NONE
//   scratch: sample_scratch_bytes, on 16 bytes; nothing in it is kept from launch to launch
// No two rows with penalties of one launch have the same sequence.
cudaError_t launch_sample(uint32_t *tokens, float *logits, int64_t stride, int64_t vocab,
                          const struct device_sampling *how, uint16_t *in_output, uint8_t *in_any, int64_t rows,
                          void *scratch, cudaStream_t stream);
uint64_t sample_scratch_bytes(int64_t max_rows, int64_t vocab);

#ifdef __cplusplus
}
#endif
#endif
