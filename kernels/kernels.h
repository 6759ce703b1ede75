// The kernel table: numbers in memory, behind one struct per backend. "scalar" is the plain C reference that all others
// are tested against. Chosen once, at start, from what the CPU and the operating system report.
//
// Determinism (law 9): the result for one token row depends on that row and the weights alone: never on how many rows
// stand beside it, on how rows of the matrix are dealt to threads, or on the number of threads. Every reduction has a fixed order.
// Two things are the same bits from every table as well: all that is not a matmul (kernels/vector_ops.h), and int8 and four-bit matmul:
//   int8   y = scale_w[row] * sum over groups of 128 columns g, ascending, of (float)dot(g) * q_scale[g]
//   others y = last * sum over the weight's groups g, ascending, of (float)dot(g) * (scale_w[row][g] * q_scale[g / its 128 columns])
//     int4   last = 2^-8
//     int4z  last = 2^-8, and instead of (float)dot(g): (float)dot(g) - zero_w[row][g] * (float)sum(g), sum the exact sum of q
//     nl4    last = 2^-10, the products those of levels
//     mxfp4  last = 1/2, the codes doubled to integers, scale_w = 2^(scale - 127)
//     nvfp4  last = 2^7 * global_w[row], the codes doubled, scale_w = scale * 2^-8 (which is an f16)
// where dot is the exact integer sum of products, and each *, +, - rounds to f32. bf16, fp8, fp8g and f32 matmul: 16 partial sums over
// ascending columns (partial sum: column mod 16; fp8, fp8g: column mod 32 / 2), added by halves at the end; fp8g begins them anew for
// each 128 columns and adds scale_w[row][g] times them, g ascending, to the 16 that are added at the end. avx2, avx512 and avx512vbmi agree
// bit for bit (fused multiply-add), scalar rounds products. avx512bf16 and amx multiply bf16, fp8 and fp8g by activations rounded to bf16, at every
// number of rows; their sums are others (kernels/cpu/avx512_bf16.h, kernels/cpu/amx_bf16.h).
//
// Attention, the same bits from every table: a product q . k is one chain of fused multiply-adds over ascending columns (of codes, where the
// cache has scales: then times the key's scale), then scaled and capped. Positions are cut into chunks of KV_CHUNK_TOKENS, and these into pages, both by position alone. Within a chunk, page by page:
// largest becomes that of the scores so far, and what is summed up is multiplied by exp(old largest - new one); then out = fma(weight,
// v, out) for ascending positions, weight = exp(score - largest) (times the value's scale, with v its code), and the weights add up in 16 partial sums (position mod 16), added by
// halves at the chunk's end. Chunks are joined in ascending order (attention_join in kernels/attention.c).
#ifndef TPSHARD_KERNELS_KERNELS_H
#define TPSHARD_KERNELS_KERNELS_H

#include "formats/error.h"
#include "formats/model_desc.h"
#include "formats/weight.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    ACT_GROUP = 128,                                // columns of an activation row that share one int8 scale
    ACT_SUM = 16,                                   // columns of one q_sum
    KERNELS_MAX_HEAD_DIM = MODEL_MAX_HEAD_DIM,      // of plain attention
    KERNELS_MAX_KEY_DIM = MODEL_MAX_LATENT_KEY_DIM, // of attention over latent rows
    KV_PAGE_TOKENS = 64,                            // positions of one page of the KV cache
    KV_CHUNK_TOKENS = 1024,                         // positions that are summed up by themselves
    ATTENTION_QUERIES = 64,                         // most of one call
    KERNELS_MAX_ROTATION = 256,                     // columns of a block that hadamard rotates
};

// A weight matrix as it lies in the mapped rank file. Not owned.
struct matrix {
    struct weight_shape shape;
    const void *data;
    const void *scale; // NULL for f32 and bf16
};

// Inputs of a matmul, prepared once by its table and then read by every thread. Rows are padded with zeros to `stride` columns, which is an
// odd multiple of 128 and at least cols_padded of every matrix it is used with. (prepare writes the zeros of the last 128 columns
// that it touches; what lies behind them is never read.)
//   f32        [tokens][stride]                 what bf16, fp8, fp8g and f32 weights are multiplied with; for fp8 and fp8g the
//                                               even columns of each 32 stand before the odd ones
//                                               avx512bf16, amx, for all but f32 weights: the nearest bf16 in the first half of a row's
//                                               room; of avx512bf16 for fp8 and fp8g of each 64 columns the first 8 of each 16, then the others
//   q          [tokens][stride]                 int8, for int8 and tiled weights; for tiled ones permuted inside each block of 16
//                                               columns: byte 4t + j holds column 2t + {0, 8, 1, 9}[j] (the order of T16x64), and the
//                                               four 16-blocks of each 64 columns are interleaved so that the 64 bytes match a tile row:
//                                               byte (t * 4 + w) * 4 + j holds column 16w + 2t + {0, 8, 1, 9}[j]
//   q_scale    [tokens][stride / ACT_GROUP]     x ~ q * q_scale; largest magnitude of the group / 127. NaN when the group holds
//                                               NaN or Inf (its q are 0 then), so that no output hides it
//   q_sum      [tokens][stride / 16]            sum of q over each 16 natural columns (corrects the bias of unsigned weights)
struct activations {
    int64_t max_tokens, stride; // capacity
    float *f32;
    int8_t *q;
    float *q_scale;
    int32_t *q_sum;
};
int activations_alloc(struct activations *act, int64_t max_tokens, int64_t max_cols, struct error *err);
void activations_free(struct activations *act);
// Copies one row that was prepared for weights of a kind, as far as the smaller stride goes. Both may be the same activations.
void activations_copy_row(struct activations *dst, int64_t dst_row, const struct activations *src, int64_t src_row,
                          enum weight_kind kind);

// A view of the rows from first_row on, for a matmul that begins there. Not to be freed.
static inline struct activations activations_rows(const struct activations *act, int64_t first_row)
{
    return (struct activations){
        .max_tokens = act->max_tokens - first_row,
        .stride = act->stride,
        .f32 = act->f32 + first_row * act->stride,
        .q = act->q + first_row * act->stride,
        .q_scale = act->q_scale + first_row * (act->stride / ACT_GROUP),
        .q_sum = act->q_sum + first_row * (act->stride / ACT_SUM),
    };
}

// How keys and values are kept. e4m3 has no scale: it saturates at 448, and a NaN stays NaN. int8 and int4 have a bf16 scale for each
// position's key and value of a kv head, and keep them rotated (kernels/kv_codes.h).
enum kv_format { KV_BF16 = 0, KV_E4M3 = 1, KV_INT8 = 2, KV_INT4 = 3, KV_FORMAT_COUNT };
static inline bool kv_format_scaled(enum kv_format format) { return format >= KV_INT8; }

// One layer's keys and values on one rank, in pages.
//   k      [num_pages][num_kv_heads][k_dim][KV_PAGE_TOKENS] in the format: a page's keys lie turned, so that 16 of them fill a vector
//   v      [num_pages][num_kv_heads][KV_PAGE_TOKENS][v_stride]
//          int4: bytes of two codes, keys [k_dim / 2][KV_PAGE_TOKENS], with column 2i in the low nibbles of row i and 2i + 1 in the high ones,
//          and values [KV_PAGE_TOKENS][v_stride / 2] as kv_int4_byte has them
//   k_scale, v_scale  bf16 [num_pages][num_kv_heads][KV_PAGE_TOKENS] where the format has scales
//   pages  [pages of this sequence]: position p lies in page pages[p / KV_PAGE_TOKENS], slot p % KV_PAGE_TOKENS
// Latent attention keeps one row that is key and value, [num_pages][1][KV_PAGE_TOKENS][k_dim]: v is k, v_stride k_dim, and the value its first
// v_dim columns.
struct kv_view {
    void *k, *v;
    enum kv_format format;
    const int32_t *pages;
    int64_t num_kv_heads, k_dim, v_dim, v_stride;
    uint16_t *k_scale, *v_scale;
};
static inline bool kv_in_rows(const struct kv_view *kv) { return kv->v == kv->k; }

// What happens to the products q . k before the softmax: scaled, then (softcap > 0) softcap * tanh(product / softcap).
struct attention_scores {
    float scale, softcap;
};

// One query to a kv head, and what it has summed up so far (kernels/attention.h begins, joins and ends it).
struct attention_query {
    const float *q;     // [k_dim]
    int64_t first, end; // positions that it attends to
    float *out;         // [v_dim]: sum of exp(score - largest) * v
    float largest, sum; // of the scores; of exp(score - largest)
};

struct kernels {
    const char *name;        // "scalar", "avx2", "avx512", "avx512vbmi", "avx512bf16", "amx"
    const char *sums;        // tables of the same word give the same bits: the name of one of them
    bool (*supported)(void); // CPU and operating system

    // Fills rows [token_begin, token_end) of act from x [.., x_stride] for a matmul with w: the parts that w's kind needs.
    // Good for every matrix of the same kind and number of columns, with the same table.
    void (*prepare)(struct activations *act, const struct matrix *w, const float *x, int64_t x_stride,
                    int64_t token_begin, int64_t token_end);
    // y[t, row] = sum over columns of x[t, :] * w[row, :] for t < tokens and row_begin <= row < row_end; row_begin is a
    // multiple of WEIGHT_ROW_UNIT, row_end too or equal to shape.rows. y is [tokens][y_stride], f32.
    void (*matmul)(float *y, int64_t y_stride, const struct matrix *w, const struct activations *act, int64_t tokens,
                   int64_t row_begin, int64_t row_end);
    // out[shape.cols] = row `row` of w, any kind.
    void (*dequantize_row)(float *out, const struct matrix *w, int64_t row);
    // y[cols] = x / sqrt(mean(x^2) + eps) * weight. y may be x.
    void (*rms_norm)(float *y, const float *x, const float *weight, int64_t cols, float eps);
    // The same with the sum of squares given: over `width` columns, of which x are some.
    void (*scale_norm)(float *y, const float *x, const float *weight, int64_t cols, double squares, int64_t width,
                       float eps);
    // cos[i] = cos(position * inv_freq[i]) * factor for i < half, sin likewise; the angle is rounded to f32, as in the
    // reference implementations. Once per token, for all heads and layers.
    void (*rope_table)(float *cos, float *sin, const float *inv_freq, int64_t half, int64_t position, float factor);
    // Rotates the leading rotary_dim columns of a head by the angles of a rope_table with half = rotary_dim / 2: pairs (i, i + half), or
    // (2i, 2i + 1) when interleaved.
    void (*rope)(float *x, const float *cos, const float *sin, int64_t rotary_dim, bool interleaved);
    // Each query joins the softmax-weighted values of its positions in [begin, end) to what it has: begin is a multiple of KV_CHUNK_TOKENS,
    // end too or behind all. Queries [count <= ATTENTION_QUERIES] are of one sequence and one kv head; k_dim is even and at most
    // KERNELS_MAX_KEY_DIM. room: attention_room_floats, best aligned to 64 bytes.
    void (*attention)(struct attention_query *queries, int64_t count, const struct kv_view *kv, int64_t kv_head,
                      int64_t begin, int64_t end, const struct attention_scores *scores, float *room);
    // out[i] = activation(gate[i], up[i]); formats/model_desc.h has the formulas. out may be gate.
    void (*activate)(float *out, const float *gate, const float *up, int64_t count, enum activation activation);
    // Rotates each `block` columns (a power of two, 2 to KERNELS_MAX_ROTATION, that divides count) by the Hadamard matrix in Sylvester's order
    // over sqrt(block), which is its own inverse: sums and differences of columns 1 apart, then 2, 4, ... block / 2, then one product.
    void (*hadamard)(float *x, int64_t count, int64_t block);
    // x[i] = cap * tanh(x[i] / cap)
    void (*softcap)(float *x, int64_t count, float cap);
    // sum over columns of x^2, in double from 16 partial sums.
    double (*squares)(const float *x, int64_t cols);
    // y[i] += factor * x[i]
    void (*add_scaled)(float *y, const float *x, int64_t count, float factor);
    // out[cols] = sum over rows r, ascending, of x[r] * w[r][:], and out[rows] = w[r] . x, of bf16 rows that stand `stride` apart;
    // cols <= KERNELS_MAX_KEY_DIM.
    void (*mix_rows)(float *out, const float *x, const uint16_t *w, int64_t stride, int64_t rows, int64_t cols);
    void (*dot_rows)(float *out, const float *x, const uint16_t *w, int64_t stride, int64_t rows, int64_t cols);
    // y[i] += x[i]
    void (*add)(float *y, const float *x, int64_t count);
};

// The fastest supported table, or the one named ("auto", "scalar", "avx2", "avx512", "avx512vbmi", "avx512bf16", "amx"); ERR_USAGE with the list of what this
// machine supports when the name is unknown or unsupported.
int kernels_select(const struct kernels **out, const char *wanted, struct error *err);
// The fastest supported table with these sums; NULL: this machine has none.
const struct kernels *kernels_of_sums(const char *sums);
// The tables that "auto" may take here, one bit each, and the fastest table of such a set, which is not empty. Bits count from the end of
// kernels_all: scalar is bit 0 on every processor, so that sets of several hosts can be compared.
uint32_t kernels_auto_set(void);
const struct kernels *kernels_fastest(uint32_t set);
// All tables compiled in, fastest first, NULL at the end; supported or not.
extern const struct kernels *const kernels_all[];

#endif
