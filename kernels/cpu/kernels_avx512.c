// Matmul with AVX-512 (F, BW, DQ, VL, VNNI). The order of every sum: kernels.h.
//
// One token (decode) is bound by memory: weights go from their cache lines to vpdpbusd or FMA once, several sequential
// streams at a time. More tokens: int8 and int4 weights of 64 rows and 256 columns are unpacked and transposed into a panel
// in L1 that all tokens use, with 16 rows in the lanes of a vector, so that no sum goes across lanes; bf16 and fp8 keep
// 4 rows x 6 tokens of partial sums in registers.
#include "kernels/kernels_internal.h"
#include "kernels/vector_ops.h"

#include <immintrin.h>

enum {
    BLOCK_ROWS = WEIGHT_ROW_UNIT,
    BLOCK_VECTORS = BLOCK_ROWS / LANES,
    TILE_TOKENS = 6,   // tokens whose sums stay in registers at once
    PANEL_COLS = 256,  // 16 KiB of unpacked codes
    PANEL_TOKENS = 96, // tokens that share a panel: 24 KiB of sums
    DECODE_BLOCKS = 4, // blocks of int4 read side by side
    PREFETCH_BYTES = 2048,
};

VECTOR_INLINE void prefetch(const void *address) { _mm_prefetch((const char *)address, _MM_HINT_T0); }

// Stores lanes whose row is below row_end.
VECTOR_INLINE void store_rows(float *y, int64_t row, int64_t row_end, __m512 value)
{
    int64_t count = row_end - row;
    if (count > 0)
        _mm512_mask_storeu_ps(y + row, count >= LANES ? 0xffff : (__mmask16)((1u << count) - 1), value);
}

// ---- bf16 and fp8 --------------------------------------------------------------------------------------------------

struct lanes {
    __m512 v;
};
VECTOR_INLINE struct lanes lanes_zero(void) { return (struct lanes){_mm512_setzero_ps()}; }
VECTOR_INLINE struct lanes lanes_load(const float *x) { return (struct lanes){_mm512_loadu_ps(x)}; }
VECTOR_INLINE void lanes_store(float *x, const struct lanes *a) { _mm512_storeu_ps(x, a->v); }
VECTOR_INLINE void lanes_fmadd(struct lanes *sum, struct lanes a, struct lanes b)
{
    sum->v = _mm512_fmadd_ps(a.v, b.v, sum->v);
}

VECTOR_INLINE struct lanes lanes_bf16(const uint8_t *codes)
{
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)codes));
    return (struct lanes){_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}

// By way of f16, whose exponent has the bits that e4m3 lacks: each code is shifted to the top of its 16 bits, then down by one.
VECTOR_INLINE struct lanes lanes_fp8(const uint8_t *codes, bool odd)
{
    __m256i wide = _mm256_loadu_si256((const __m256i *)codes);
    if (!odd)
        wide = _mm256_slli_epi16(wide, 8);
    wide = _mm256_and_si256(_mm256_srai_epi16(wide, 1), _mm256_set1_epi16((short)0xbf80));
    return (struct lanes){_mm512_cvtph_ps(wide)};
}

#define FLOAT_TILE_ROWS 4
#define FLOAT_TILE_TOKENS 6
#define FLOAT_DECODE_ROWS 8
#include "kernels/cpu/float_matmul.h"

// ---- Sums across lanes ---------------------------------------------------------------------------------------------

// Per 128-bit lane: the sums of a, b, c, d over its four elements.
VECTOR_INLINE __m512i sum_quads(__m512i a, __m512i b, __m512i c, __m512i d)
{
    __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
}

// Sums of neighbouring 128-bit lanes: a01 a23 b01 b23.
VECTOR_INLINE __m512i add_lane_pairs(__m512i a, __m512i b)
{
    return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
}

// Lane i: the sum of all lanes of v[i].
VECTOR_INLINE __m512i sum_16(const __m512i v[16])
{
    __m512i a = sum_quads(v[0], v[1], v[2], v[3]), b = sum_quads(v[4], v[5], v[6], v[7]);
    __m512i c = sum_quads(v[8], v[9], v[10], v[11]), d = sum_quads(v[12], v[13], v[14], v[15]);
    return add_lane_pairs(add_lane_pairs(a, b), add_lane_pairs(c, d));
}

// Per 128-bit lane: a01 b01 a23 b23.
VECTOR_INLINE __m512i add_word_pairs(__m512i a, __m512i b)
{
    __m512i even = _mm512_mask_blend_epi32(0xaaaa, a, b), odd = _mm512_mask_blend_epi32(0xaaaa, b, a);
    return _mm512_add_epi32(even, _mm512_shuffle_epi32(odd, _MM_PERM_CDAB));
}

// Lane i of half[h]: the sum of words 2h and 2h + 1 of all 128-bit lanes of v[i].
VECTOR_INLINE void sum_16_halves(__m512i half[2], const __m512i v[16])
{
    __m512i pair[8];
    for (int i = 0; i < 8; i++)
        pair[i] = add_word_pairs(v[2 * i], v[2 * i + 1]);
    __m512i a = add_lane_pairs(add_lane_pairs(pair[0], pair[1]), add_lane_pairs(pair[2], pair[3]));
    __m512i b = add_lane_pairs(add_lane_pairs(pair[4], pair[5]), add_lane_pairs(pair[6], pair[7]));
    const __m512i low = _mm512_setr_epi32(0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29);
    half[0] = _mm512_permutex2var_epi32(a, low, b);
    half[1] = _mm512_permutex2var_epi32(a, _mm512_add_epi32(low, _mm512_set1_epi32(2)), b);
}

// vpdpbusd wants unsigned weights: w + bias. The sums start at -bias times the sum of the activations of each lane.
VECTOR_INLINE __m512i minus_bias(int bias, __m512i x)
{
    __m512i zero = _mm512_setzero_si512();
    return _mm512_sub_epi32(zero, _mm512_dpbusd_epi32(zero, _mm512_set1_epi8((char)bias), x));
}

VECTOR_INLINE __m512 load_scale_f16(const uint16_t *scale)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)scale));
}

// ---- int4, one token -----------------------------------------------------------------------------------------------

// (code + 8) of rows 0..7 of a tile (low nibbles) and of rows 8..15.
VECTOR_INLINE __m512i low_codes(__m512i v)
{
    return _mm512_ternarylogic_epi32(v, _mm512_set1_epi8(15), _mm512_set1_epi8(8), 0x6a); // (v & 15) ^ 8
}
VECTOR_INLINE __m512i high_codes(__m512i v) { return low_codes(_mm512_srli_epi16(v, 4)); }

// sum[row] += products of 64 columns, for the 16 rows of a tile.
VECTOR_INLINE void add_tile(__m512i sum[16], const uint8_t *tile, __m512i x)
{
    for (int g = 0; g < 8; g++) {
        __m512i v = _mm512_loadu_si512(tile + 64 * g);
        prefetch(tile + PREFETCH_BYTES + 64 * g);
        sum[g] = _mm512_dpbusd_epi32(sum[g], low_codes(v), x);
        sum[g + 8] = _mm512_dpbusd_epi32(sum[g + 8], high_codes(v), x);
    }
}

VECTOR_INLINE __m512 add_term(__m512 sum, __m512i dot, const uint16_t *scale, __m512 x_scale)
{
    return _mm512_add_ps(sum, _mm512_mul_ps(_mm512_cvtepi32_ps(dot), _mm512_mul_ps(load_scale_f16(scale), x_scale)));
}

// `blocks` blocks of 64 rows side by side.
VECTOR_INLINE void int4_decode(float *y, const struct matrix *w, const int8_t *q, const float *q_scale,
                               int64_t row_begin, int64_t row_end, int64_t blocks, int group_size)
{
    int64_t cols = (int64_t)w->shape.cols_padded, groups = cols / group_size, block_bytes = cols * BLOCK_ROWS / 2;
    const uint8_t *data = (const uint8_t *)w->data + row_begin / BLOCK_ROWS * block_bytes;
    const uint16_t *scale = (const uint16_t *)w->scale + row_begin * groups;
    int step = group_size == 128 ? 128 : 64;
    __m512 sum[DECODE_BLOCKS * BLOCK_VECTORS];
    for (int i = 0; i < blocks * BLOCK_VECTORS; i++)
        sum[i] = _mm512_setzero_ps();

    for (int64_t col = 0; col < cols; col += step) {
        __m512i x0 = _mm512_loadu_si512(q + col), bias = minus_bias(8, x0), x1 = x0;
        if (step == 128) {
            x1 = _mm512_loadu_si512(q + col + 64);
            bias = _mm512_add_epi32(bias, minus_bias(8, x1));
        }
        __m512 x_scale = _mm512_set1_ps(q_scale[col / ACT_GROUP]);
        for (int i = 0; i < BLOCK_VECTORS; i++)
            for (int64_t b = 0; b < blocks; b++) {
                const uint8_t *tile =
                    data + b * block_bytes + col / 64 * (4 * WEIGHT_TILE_BYTES) + i * WEIGHT_TILE_BYTES;
                const uint16_t *s = scale + ((b * BLOCK_VECTORS + i) * groups + col / group_size) * LANES;
                __m512 *out = &sum[b * BLOCK_VECTORS + i];
                __m512i dot[16], half[2];
                for (int r = 0; r < 16; r++)
                    dot[r] = bias;
                add_tile(dot, tile, x0);
                if (step == 128)
                    add_tile(dot, tile + 4 * WEIGHT_TILE_BYTES, x1);
                prefetch(s + 8 * LANES);
                if (group_size == 32) {
                    sum_16_halves(half, dot);
                    *out = add_term(add_term(*out, half[0], s, x_scale), half[1], s + LANES, x_scale);
                } else {
                    *out = add_term(*out, sum_16(dot), s, x_scale);
                }
            }
    }
    for (int i = 0; i < blocks * BLOCK_VECTORS; i++)
        store_rows(y, row_begin + i * LANES, row_end, _mm512_mul_ps(sum[i], _mm512_set1_ps(0x1p-8f)));
}

static void int4_decode_any(float *y, const struct matrix *w, const int8_t *q, const float *q_scale, int64_t row_begin,
                            int64_t row_end)
{
    for (int64_t row = row_begin; row < row_end; row += DECODE_BLOCKS * BLOCK_ROWS) {
        int64_t left = (row_end - row + BLOCK_ROWS - 1) / BLOCK_ROWS;
        int64_t blocks = left < DECODE_BLOCKS ? left : DECODE_BLOCKS;
        if (w->shape.group_size == 128)
            int4_decode(y, w, q, q_scale, row, row_end, blocks, 128);
        else if (w->shape.group_size == 64)
            int4_decode(y, w, q, q_scale, row, row_end, blocks, 64);
        else
            int4_decode(y, w, q, q_scale, row, row_end, blocks, 32);
    }
}

// ---- int8, few tokens: 8 rows and 2 groups at a time ---------------------------------------------------------------

enum { INT8_ROWS = 8, INT8_DECODE_TOKENS = 4 };

// dot[r] = products of 64 * parts columns of row r.
VECTOR_INLINE void int8_dots(__m512i dot[INT8_ROWS], const int8_t *codes, int64_t cols, const int8_t *q, int parts)
{
    __m512i x[2], bias = _mm512_setzero_si512();
    for (int p = 0; p < parts; p++) {
        x[p] = _mm512_loadu_si512(q + 64 * p);
        bias = _mm512_add_epi32(bias, minus_bias(128, x[p]));
    }
    for (int r = 0; r < INT8_ROWS; r++) {
        dot[r] = bias;
        for (int p = 0; p < parts; p++) {
            __m512i v = _mm512_loadu_si512(codes + r * cols + 64 * p);
            prefetch(codes + r * cols + 64 * p + PREFETCH_BYTES / 2);
            dot[r] = _mm512_dpbusd_epi32(dot[r], _mm512_xor_si512(v, _mm512_set1_epi8((char)0x80)), x[p]);
        }
    }
}

static void int8_rows(float *y, const struct matrix *w, const int8_t *q, const float *q_scale, int64_t row,
                      int64_t row_end)
{
    int64_t cols = (int64_t)w->shape.cols_padded;
    const int8_t *codes = (const int8_t *)w->data + row * cols;
    __m256 sum = _mm256_setzero_ps();
    __m512i dot[16];
    int64_t col = 0;
    for (; col + 2 * ACT_GROUP <= cols; col += 2 * ACT_GROUP) {
        int8_dots(dot, codes + col, cols, q + col, 2);
        int8_dots(dot + INT8_ROWS, codes + col + ACT_GROUP, cols, q + col + ACT_GROUP, 2);
        const float *s = q_scale + col / ACT_GROUP;
        __m512 x_scale = _mm512_insertf32x8(_mm512_set1_ps(s[0]), _mm256_set1_ps(s[1]), 1);
        __m512 term = _mm512_mul_ps(_mm512_cvtepi32_ps(sum_16(dot)), x_scale);
        sum = _mm256_add_ps(sum, _mm512_castps512_ps256(term));
        sum = _mm256_add_ps(sum, _mm512_extractf32x8_ps(term, 1));
    }
    for (; col < cols; col += ACT_GROUP) {
        if (cols - col >= ACT_GROUP)
            int8_dots(dot, codes + col, cols, q + col, 2);
        else
            int8_dots(dot, codes + col, cols, q + col, 1);
        for (int r = INT8_ROWS; r < 16; r++)
            dot[r] = _mm512_setzero_si512();
        __m512 term = _mm512_mul_ps(_mm512_cvtepi32_ps(sum_16(dot)), _mm512_set1_ps(q_scale[col / ACT_GROUP]));
        sum = _mm256_add_ps(sum, _mm512_castps512_ps256(term));
    }
    sum = _mm256_mul_ps(sum, _mm256_loadu_ps((const float *)w->scale + row));
    int64_t last = row_end < row + INT8_ROWS ? row_end : row + INT8_ROWS;
    store_rows(y, row, last, _mm512_castps256_ps512(sum));
}

// One token, or few enough that reading 8 rows again from a cache for each is quicker than a panel.
static void int8_decode(float *y, int64_t y_stride, const struct matrix *w, const struct activations *act,
                        int64_t tokens, int64_t row_begin, int64_t row_end)
{
    for (int64_t row = row_begin; row < row_end; row += INT8_ROWS)
        for (int64_t t = 0; t < tokens; t++)
            int8_rows(y + t * y_stride, w, act->q + t * act->stride, act->q_scale + t * (act->stride / ACT_GROUP), row,
                      row_end);
}

// ---- int8 and int4, several tokens ---------------------------------------------------------------------------------

// Unpacked codes + bias of 64 rows and up to PANEL_COLS columns: [cols / 4][4 vectors][16 rows][4 columns].
struct panel {
    __m512i v[PANEL_COLS / 4][BLOCK_VECTORS];
};

// 4x4 transpose of 128-bit lanes: out[i] = lane i of a, b, c, d.
VECTOR_INLINE void transpose_lanes(__m512i out[4], __m512i a, __m512i b, __m512i c, __m512i d)
{
    __m512i ab02 = _mm512_shuffle_i32x4(a, b, 0x88),
            ab13 = _mm512_shuffle_i32x4(a, b, 0xdd); // a0 a2 b0 b2, a1 a3 b1 b3
    __m512i cd02 = _mm512_shuffle_i32x4(c, d, 0x88), cd13 = _mm512_shuffle_i32x4(c, d, 0xdd);
    out[0] = _mm512_shuffle_i32x4(ab02, cd02, 0x88);
    out[1] = _mm512_shuffle_i32x4(ab13, cd13, 0x88);
    out[2] = _mm512_shuffle_i32x4(ab02, cd02, 0xdd);
    out[3] = _mm512_shuffle_i32x4(ab13, cd13, 0xdd);
}

// Per 128-bit lane, 4x4 transpose of words: out[i] = word i of a, b, c, d.
VECTOR_INLINE void transpose_words(__m512i out[4], __m512i a, __m512i b, __m512i c, __m512i d)
{
    __m512i ab01 = _mm512_unpacklo_epi32(a, b), ab23 = _mm512_unpackhi_epi32(a, b);
    __m512i cd01 = _mm512_unpacklo_epi32(c, d), cd23 = _mm512_unpackhi_epi32(c, d);
    out[0] = _mm512_unpacklo_epi64(ab01, cd01);
    out[1] = _mm512_unpackhi_epi64(ab01, cd01);
    out[2] = _mm512_unpacklo_epi64(ab23, cd23);
    out[3] = _mm512_unpackhi_epi64(ab23, cd23);
}

// 64 columns (16 words) of 64 rows into panel words 0..15.
static void panel_int4(__m512i (*panel)[BLOCK_VECTORS], const uint8_t *tiles)
{
    for (int i = 0; i < BLOCK_VECTORS; i++, tiles += WEIGHT_TILE_BYTES) {
        __m512i v[8], first[4], second[4], word[4];
        for (int g = 0; g < 8; g++) {
            v[g] = _mm512_loadu_si512(tiles + 64 * g);
            prefetch(tiles + 2 * PREFETCH_BYTES + 64 * g);
        }
        transpose_words(first, v[0], v[1], v[2], v[3]);
        transpose_words(second, v[4], v[5], v[6], v[7]);
        for (int c = 0; c < 4; c++) {
            transpose_lanes(word, low_codes(first[c]), low_codes(second[c]), high_codes(first[c]),
                            high_codes(second[c]));
            for (int l = 0; l < 4; l++)
                panel[4 * l + c][i] = word[l];
        }
    }
}

static void panel_int8(__m512i (*panel)[BLOCK_VECTORS], const int8_t *codes, int64_t cols)
{
    const __m512i flip = _mm512_set1_epi8((char)0x80);
    for (int i = 0; i < BLOCK_VECTORS; i++) {
        __m512i part[4][4], word[4];
        for (int p = 0; p < 4; p++) {
            const int8_t *row = codes + (i * LANES + 4 * p) * cols;
            __m512i v[4];
            for (int r = 0; r < 4; r++) {
                v[r] = _mm512_xor_si512(_mm512_loadu_si512(row + r * cols), flip);
                // To L2: 64 rows of a length of 2^n would crowd each other out of L1.
                _mm_prefetch((const char *)(row + r * cols + PANEL_COLS), _MM_HINT_T1);
            }
            transpose_words(part[p], v[0], v[1], v[2], v[3]);
        }
        for (int c = 0; c < 4; c++) {
            transpose_lanes(word, part[0][c], part[1][c], part[2][c], part[3][c]);
            for (int l = 0; l < 4; l++)
                panel[4 * l + c][i] = word[l];
        }
    }
}

// dot[t][i] += panel words `word` times the activations of each token. dot has elements of 32 bits by its type: gcc 12 keeps
// sums of type __m512i twice, once as what they are, and runs out of registers.
VECTOR_INLINE void add_word(i32x16 dot[TILE_TOKENS][BLOCK_VECTORS], const __m512i word[BLOCK_VECTORS], const int8_t *q,
                            int64_t stride, int tokens)
{
    UNROLL
    for (int t = 0; t < tokens; t++) {
        int32_t four;
        memcpy(&four, q + t * stride, sizeof four);
        __m512i x = _mm512_set1_epi32(four);
        UNROLL
        for (int i = 0; i < BLOCK_VECTORS; i++)
            dot[t][i] = (i32x16)_mm512_dpbusd_epi32((__m512i)dot[t][i], word[i], x);
    }
}

// What a panel is multiplied with; all pointers stand at the panel's first column and the tile's first token.
struct panel_job {
    const struct panel *panel;
    int64_t cols, group_size; // of sums: the weight's group, or ACT_GROUP
    int32_t bias;             // of the codes
    const int8_t *q;
    const float *q_scale;
    const int32_t *q_sum;
    int64_t stride;        // of act
    const uint16_t *scale; // int4: f16 [4][scale_stride], 16 rows a group; int8: NULL
    int64_t scale_stride;
    float (*sum)[BLOCK_ROWS]; // [tokens]
};

VECTOR_INLINE void panel_tile(const struct panel_job *job, int tokens, bool halves)
{
    int64_t stride = job->stride, group_size = halves ? 32 : job->group_size;
    for (int64_t col = 0; col < job->cols; col += group_size) {
        int64_t size = job->cols - col < group_size ? job->cols - col : group_size;
        int32_t first[TILE_TOKENS] = {0};
        for (int t = 0; t < tokens; t++)
            for (int64_t i = col / 32; i < (col + size) / 32; i++)
                first[t] -= job->bias * job->q_sum[t * (stride / 32) + i];
        i32x16 dot[TILE_TOKENS][BLOCK_VECTORS];
        UNROLL
        for (int t = 0; t < tokens; t++) {
            UNROLL
            for (int i = 0; i < BLOCK_VECTORS; i++)
                dot[t][i] = (i32x16)_mm512_set1_epi32(first[t]);
        }
        if (halves) {
            // Of the 16 words of a tile row, two of every four belong to each half.
            int64_t begin = col / 64 * 16 + col / 32 % 2 * 2;
            for (int64_t k = begin; k < begin + 16; k += 4) {
                add_word(dot, job->panel->v[k], job->q + 4 * k, stride, tokens);
                add_word(dot, job->panel->v[k + 1], job->q + 4 * k + 4, stride, tokens);
            }
        } else {
            for (int64_t k = col / 4; k < (col + size) / 4; k++)
                add_word(dot, job->panel->v[k], job->q + 4 * k, stride, tokens);
        }
        UNROLL
        for (int i = 0; i < BLOCK_VECTORS; i++) {
            __m512 scale = _mm512_set1_ps(1.0f);
            if (job->scale)
                scale = load_scale_f16(job->scale + i * job->scale_stride + col / group_size * LANES);
            UNROLL
            for (int t = 0; t < tokens; t++) {
                __m512 x_scale = _mm512_set1_ps(job->q_scale[t * (stride / ACT_GROUP) + col / ACT_GROUP]);
                __m512 term = _mm512_mul_ps(_mm512_cvtepi32_ps((__m512i)dot[t][i]), _mm512_mul_ps(scale, x_scale));
                float *sum = job->sum[t] + i * LANES;
                _mm512_storeu_ps(sum, _mm512_add_ps(_mm512_loadu_ps(sum), term));
            }
        }
    }
}

// halves: groups of 32. tokens as tile_tokens says.
VECTOR_INLINE void panel_tile_any(const struct panel_job *job, int64_t tokens, bool halves)
{
    switch (tokens) {
    case 1:
        panel_tile(job, 1, halves);
        break;
    case 2:
        panel_tile(job, 2, halves);
        break;
    case 4:
        panel_tile(job, 4, halves);
        break;
    case 6:
        panel_tile(job, 6, halves);
        break;
    }
}

static void panel_tile_32(const struct panel_job *job, int64_t tokens) { panel_tile_any(job, tokens, true); }
static void panel_tile_wide(const struct panel_job *job, int64_t tokens) { panel_tile_any(job, tokens, false); }

// 64 rows from `row` on, tokens [token, token + tokens), tokens <= PANEL_TOKENS.
static void panel_block(float *y, int64_t y_stride, const struct matrix *w, const struct activations *act,
                        int64_t token, int64_t tokens, int64_t row, int64_t row_end)
{
    bool int4 = w->shape.kind == WEIGHT_INT4;
    int64_t cols = (int64_t)w->shape.cols_padded, stride = act->stride;
    int64_t group_size = int4 ? w->shape.group_size : ACT_GROUP;
    struct panel panel;
    float sum[PANEL_TOKENS][BLOCK_ROWS];
    memset(sum, 0, (size_t)tokens * sizeof *sum);

    for (int64_t col = 0; col < cols; col += PANEL_COLS) {
        struct panel_job job = {
            .panel = &panel,
            .cols = cols - col < PANEL_COLS ? cols - col : PANEL_COLS,
            .group_size = group_size,
            .bias = int4 ? 8 : 128,
            .stride = stride,
        };
        for (int64_t c = 0; c < job.cols; c += 64) {
            if (int4)
                panel_int4(&panel.v[c / 4], (const uint8_t *)w->data + (row * cols + (col + c) * BLOCK_ROWS) / 2);
            else
                panel_int8(&panel.v[c / 4], (const int8_t *)w->data + row * cols + col + c, cols);
        }
        if (int4) {
            job.scale_stride = cols / group_size * LANES;
            job.scale = (const uint16_t *)w->scale + row / LANES * job.scale_stride + col / group_size * LANES;
        }
        for (int64_t t = 0, count; t < tokens; t += count) {
            count = tile_tokens(tokens - t);
            job.q = act->q + (token + t) * stride + col;
            job.q_scale = act->q_scale + (token + t) * (stride / ACT_GROUP) + col / ACT_GROUP;
            job.q_sum = act->q_sum + (token + t) * (stride / 32) + col / 32;
            job.sum = sum + t;
            (group_size == 32 ? panel_tile_32 : panel_tile_wide)(&job, count);
        }
    }
    for (int i = 0; i < BLOCK_VECTORS; i++) {
        __m512 scale = int4 ? _mm512_set1_ps(0x1p-8f) : _mm512_loadu_ps((const float *)w->scale + row + i * LANES);
        for (int64_t t = 0; t < tokens; t++)
            store_rows(y + (token + t) * y_stride, row + i * LANES, row_end,
                       _mm512_mul_ps(_mm512_loadu_ps(sum[t] + i * LANES), scale));
    }
}

// ---- The table -----------------------------------------------------------------------------------------------------

static void int_matmul(float *y, int64_t y_stride, const struct matrix *w, const struct activations *act,
                       int64_t tokens, int64_t row_begin, int64_t row_end)
{
    if (tokens <= INT8_DECODE_TOKENS && w->shape.kind == WEIGHT_INT8) {
        int8_decode(y, y_stride, w, act, tokens, row_begin, row_end);
    } else if (tokens == 1) {
        int4_decode_any(y, w, act->q, act->q_scale, row_begin, row_end);
    } else {
        for (int64_t row = row_begin; row < row_end; row += BLOCK_ROWS)
            for (int64_t t = 0; t < tokens; t += PANEL_TOKENS)
                panel_block(y, y_stride, w, act, t, tokens - t < PANEL_TOKENS ? tokens - t : PANEL_TOKENS, row,
                            row_end);
    }
}

static void matmul(float *y, int64_t y_stride, const struct matrix *w, const struct activations *act, int64_t tokens,
                   int64_t row_begin, int64_t row_end)
{
    if (vector_ops_matmul(y, y_stride, w, act, tokens, row_begin, row_end))
        return;
    switch (w->shape.kind) {
    case WEIGHT_BF16:
        float_matmul_bf16(y, y_stride, w, act, tokens, row_begin, row_end);
        break;
    case WEIGHT_FP8:
        float_matmul_fp8(y, y_stride, w, act, tokens, row_begin, row_end);
        break;
    case WEIGHT_INT8:
    case WEIGHT_INT4:
        int_matmul(y, y_stride, w, act, tokens, row_begin, row_end);
        break;
    case WEIGHT_F32:
    case WEIGHT_KIND_COUNT:
        break;
    }
}

const struct kernels kernels_avx512 = {
    .name = "avx512",
    .supported = kernels_supported_avx512,
    .matmul = matmul,
    VECTOR_OPS_ENTRIES,
};
