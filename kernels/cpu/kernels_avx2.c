// Matmul with AVX2, FMA and F16C. The order of every sum: kernels.h.
//
// int8 and int4 go by 8 rows and one group at a time: vpmaddubsw multiplies unsigned with signed bytes, and pairs of products must
// fit 16 bits. int4 codes + 8 (at most 15) allow four such pairs to be added there; int8 uses |w| and x with w's sign. int4 is
// unpacked into L1 first, once for all tokens.
#include "kernels/kernels_internal.h"
#include "kernels/vector_ops.h"

#include <immintrin.h>

enum {
    BLOCK_ROWS = WEIGHT_ROW_UNIT,
    TILE_ROWS = 16,
    ROWS = 8,         // of one sum across lanes
    PANEL_COLS = 256, // 4 KiB of unpacked codes
    PANEL_TOKENS = 96,
    PREFETCH_BYTES = 4096,
};

// ---- bf16 and fp8 --------------------------------------------------------------------------------------------------

struct lanes {
    __m256 a, b;
};
VECTOR_INLINE struct lanes lanes_zero(void) { return (struct lanes){_mm256_setzero_ps(), _mm256_setzero_ps()}; }
VECTOR_INLINE struct lanes lanes_load(const float *x)
{
    return (struct lanes){_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)};
}
VECTOR_INLINE void lanes_store(float *x, const struct lanes *v)
{
    _mm256_storeu_ps(x, v->a);
    _mm256_storeu_ps(x + 8, v->b);
}
VECTOR_INLINE void lanes_fmadd(struct lanes *sum, struct lanes x, struct lanes y)
{
    sum->a = _mm256_fmadd_ps(x.a, y.a, sum->a);
    sum->b = _mm256_fmadd_ps(x.b, y.b, sum->b);
}

VECTOR_INLINE __m256 bf16_to_ps(const uint8_t *codes)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)codes)), 16));
}
VECTOR_INLINE struct lanes lanes_bf16(const uint8_t *codes)
{
    return (struct lanes){bf16_to_ps(codes), bf16_to_ps(codes + 16)};
}

// By way of f16, whose exponent has the bits that e4m3 lacks: each code is shifted to the top of its 16 bits, then down by one.
VECTOR_INLINE struct lanes lanes_fp8(const uint8_t *codes, bool odd)
{
    __m256i wide = _mm256_loadu_si256((const __m256i *)codes);
    if (!odd)
        wide = _mm256_slli_epi16(wide, 8);
    wide = _mm256_and_si256(_mm256_srai_epi16(wide, 1), _mm256_set1_epi16((short)0xbf80));
    return (struct lanes){_mm256_cvtph_ps(_mm256_castsi256_si128(wide)),
                          _mm256_cvtph_ps(_mm256_extracti128_si256(wide, 1))};
}

#define FLOAT_TILE_ROWS 2
#define FLOAT_TILE_TOKENS 3
#define FLOAT_DECODE_ROWS 4
#include "kernels/cpu/float_matmul.h"

// ---- int8 and int4 -------------------------------------------------------------------------------------------------

// Where the codes of 8 rows lie: row r, columns 64c.. at data + r * row_bytes + c * part_bytes.
struct codes {
    const uint8_t *data;
    int64_t row_bytes, part_bytes;
};

VECTOR_INLINE __m256i load(const void *x) { return _mm256_loadu_si256((const __m256i *)x); }

// Lane i: the sum of both 128-bit lanes' word i % 4 of low (i < 4) or high.
VECTOR_INLINE __m256i add_lanes(__m256i low, __m256i high)
{
    return _mm256_add_epi32(_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31));
}

// Lane i: the sum of all lanes of v[i].
VECTOR_INLINE __m256i sum_8(const __m256i v[ROWS])
{
    __m256i low = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
    __m256i high = _mm256_hadd_epi32(_mm256_hadd_epi32(v[4], v[5]), _mm256_hadd_epi32(v[6], v[7]));
    return add_lanes(low, high);
}

VECTOR_INLINE __m256i pick_words(__m256i a, __m256i b, int odd)
{
    __m256 x = _mm256_castsi256_ps(a), y = _mm256_castsi256_ps(b);
    return _mm256_castps_si256(odd ? _mm256_shuffle_ps(x, y, 0xdd) : _mm256_shuffle_ps(x, y, 0x88));
}

// Lane i of half[h]: the sum of words 2h and 2h + 1 of both 128-bit lanes of v[i].
VECTOR_INLINE void sum_8_halves(__m256i half[2], const __m256i v[ROWS])
{
    __m256i pair[4];
    for (int i = 0; i < 4; i++)
        pair[i] = _mm256_hadd_epi32(v[2 * i], v[2 * i + 1]);
    for (int h = 0; h < 2; h++)
        half[h] = add_lanes(pick_words(pair[0], pair[1], h), pick_words(pair[2], pair[3], h));
}

// dot[r] = products of 64 * parts columns, parts <= 2, of row r. int4: with codes + 8.
VECTOR_INLINE void dots(__m256i dot[ROWS], const struct codes *codes, const int8_t *q, int parts, bool int4)
{
    const __m256i one = _mm256_set1_epi16(1);
    __m256i x[4];
    for (int i = 0; i < 2 * parts; i++)
        x[i] = load(q + 32 * i);
    for (int r = 0; r < ROWS; r++) {
        __m256i products = _mm256_setzero_si256();
        for (int i = 0; i < 2 * parts; i++) {
            __m256i w = load(codes->data + r * codes->row_bytes + i / 2 * codes->part_bytes + i % 2 * 32);
            if (int4) {
                products = _mm256_add_epi16(products, _mm256_maddubs_epi16(w, x[i]));
            } else {
                __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x[i], w));
                products = _mm256_add_epi32(products, _mm256_madd_epi16(pairs, one));
            }
        }
        dot[r] = int4 ? _mm256_madd_epi16(products, one) : products;
    }
}

VECTOR_INLINE __m256 load_scale_f16(const uint16_t *scale)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)scale));
}

VECTOR_INLINE void add_term(float *sum, __m256i dot, __m256 scale)
{
    _mm256_storeu_ps(sum, _mm256_add_ps(_mm256_loadu_ps(sum), _mm256_mul_ps(_mm256_cvtepi32_ps(dot), scale)));
}

// 8 rows of int4, columns [0, cols) of one token: unpacked codes, scale [cols / group_size][16] at the first of the rows.
VECTOR_INLINE void int4_rows(float *sum, const struct codes *codes, const uint16_t *scale, const int8_t *q,
                             const float *q_scale, const int32_t *q_sum, int64_t cols, int group_size)
{
    int step = group_size == 128 ? 128 : 64;
    for (int64_t col = 0; col < cols; col += step) {
        struct codes from = {codes->data + col / 64 * codes->part_bytes, codes->row_bytes, codes->part_bytes};
        __m256i dot[ROWS], half[2];
        dots(dot, &from, q + col, step / 64, true);
        __m256 x_scale = _mm256_set1_ps(q_scale[col / ACT_GROUP]);
        const int32_t *s = q_sum + col / 32;
        const uint16_t *w_scale = scale + col / group_size * TILE_ROWS;
        if (group_size == 32) {
            sum_8_halves(half, dot);
            for (int h = 0; h < 2; h++)
                add_term(sum, _mm256_sub_epi32(half[h], _mm256_set1_epi32(8 * s[h])),
                         _mm256_mul_ps(load_scale_f16(w_scale + h * TILE_ROWS), x_scale));
        } else {
            int32_t x_sum = s[0] + s[1];
            if (step == 128)
                x_sum += s[2] + s[3];
            add_term(sum, _mm256_sub_epi32(sum_8(dot), _mm256_set1_epi32(8 * x_sum)),
                     _mm256_mul_ps(load_scale_f16(w_scale), x_scale));
        }
    }
}

static void int4_rows_any(float *sum, const struct codes *codes, const uint16_t *scale, const int8_t *q,
                          const float *q_scale, const int32_t *q_sum, int64_t cols, uint32_t group_size)
{
    if (group_size == 128)
        int4_rows(sum, codes, scale, q, q_scale, q_sum, cols, 128);
    else if (group_size == 64)
        int4_rows(sum, codes, scale, q, q_scale, q_sum, cols, 64);
    else
        int4_rows(sum, codes, scale, q, q_scale, q_sum, cols, 32);
}

// 16 rows and 64 columns of a tile as codes + 8: [16][64].
VECTOR_INLINE void unpack_tile(uint8_t *out, const uint8_t *tile)
{
    const __m256i low = _mm256_set1_epi8(15), eight = _mm256_set1_epi8(8);
    for (int i = 0; i < WEIGHT_TILE_BYTES; i += 32) {
        __m256i v = load(tile + i);
        __builtin_prefetch(tile + i + PREFETCH_BYTES);
        __m256i high = _mm256_and_si256(_mm256_srli_epi16(v, 4), low);
        _mm256_storeu_si256((__m256i *)(out + i), _mm256_xor_si256(_mm256_and_si256(v, low), eight));
        _mm256_storeu_si256((__m256i *)(out + WEIGHT_TILE_BYTES + i), _mm256_xor_si256(high, eight));
    }
}

// 64 rows from `row` on, tokens [token, token + tokens), tokens <= PANEL_TOKENS.
static void int4_block(float *y, int64_t y_stride, const struct matrix *w, const struct activations *act, int64_t token,
                       int64_t tokens, int64_t row, int64_t row_end)
{
    int64_t cols = (int64_t)w->shape.cols_padded, group_size = w->shape.group_size, stride = act->stride;
    int64_t groups = cols / group_size;
    const uint8_t *block = (const uint8_t *)w->data + row * cols / 2;
    const uint16_t *scale = (const uint16_t *)w->scale + row * groups;
    float sum[PANEL_TOKENS][BLOCK_ROWS];
    memset(sum, 0, (size_t)tokens * sizeof *sum);
    for (int64_t col = 0; col < cols; col += PANEL_COLS) {
        int64_t part = cols - col < PANEL_COLS ? cols - col : PANEL_COLS;
        for (int64_t i = 0; i < BLOCK_ROWS; i += TILE_ROWS) {
            uint8_t panel[PANEL_COLS / 64][TILE_ROWS][64];
            for (int64_t c = 0; c < part / 64; c++)
                unpack_tile(panel[c][0],
                            block + (col / 64 + c) * (4 * WEIGHT_TILE_BYTES) + i / TILE_ROWS * WEIGHT_TILE_BYTES);
            for (int64_t t = 0; t < tokens; t++)
                for (int64_t r = 0; r < TILE_ROWS; r += ROWS) {
                    struct codes codes = {panel[0][r], 64, sizeof panel[0]};
                    int64_t act_row = token + t;
                    int4_rows_any(&sum[t][i + r], &codes, scale + i * groups + col / group_size * TILE_ROWS + r,
                                  act->q + act_row * stride + col,
                                  act->q_scale + act_row * (stride / ACT_GROUP) + col / ACT_GROUP,
                                  act->q_sum + act_row * (stride / 32) + col / 32, part, w->shape.group_size);
                }
        }
    }
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t r = 0; r < BLOCK_ROWS && row + r < row_end; r++)
            y[(token + t) * y_stride + row + r] = sum[t][r] * 0x1p-8f;
}

// 8 rows, all tokens, 256 columns at a time for each, so that the weights come from L1 after the first.
static void int8_block(float *y, int64_t y_stride, const struct matrix *w, const struct activations *act, int64_t token,
                       int64_t tokens, int64_t row, int64_t row_end)
{
    int64_t cols = (int64_t)w->shape.cols_padded, stride = act->stride;
    float sum[PANEL_TOKENS][ROWS];
    memset(sum, 0, (size_t)tokens * sizeof *sum);
    for (int64_t begin = 0; begin < cols; begin += PANEL_COLS) {
        int64_t end = begin + PANEL_COLS < cols ? begin + PANEL_COLS : cols;
        for (int r = 0; r < ROWS; r++)
            for (int64_t col = begin; col < end; col += 64)
                __builtin_prefetch((const uint8_t *)w->data + (row + r) * cols + col + 2 * PANEL_COLS);
        for (int64_t t = 0; t < tokens; t++) {
            const int8_t *q = act->q + (token + t) * stride;
            const float *q_scale = act->q_scale + (token + t) * (stride / ACT_GROUP);
            for (int64_t col = begin; col < end; col += ACT_GROUP) {
                struct codes codes = {(const uint8_t *)w->data + row * cols + col, cols, 64};
                __m256i dot[ROWS];
                if (end - col >= ACT_GROUP)
                    dots(dot, &codes, q + col, 2, false);
                else
                    dots(dot, &codes, q + col, 1, false);
                add_term(sum[t], sum_8(dot), _mm256_set1_ps(q_scale[col / ACT_GROUP]));
            }
        }
    }
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t r = 0; r < ROWS && row + r < row_end; r++)
            y[(token + t) * y_stride + row + r] = sum[t][r] * ((const float *)w->scale)[row + r];
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
        for (int64_t row = row_begin; row < row_end; row += ROWS)
            for (int64_t t = 0; t < tokens; t += PANEL_TOKENS)
                int8_block(y, y_stride, w, act, t, tokens - t < PANEL_TOKENS ? tokens - t : PANEL_TOKENS, row, row_end);
        break;
    case WEIGHT_INT4:
        for (int64_t row = row_begin; row < row_end; row += BLOCK_ROWS)
            for (int64_t t = 0; t < tokens; t += PANEL_TOKENS)
                int4_block(y, y_stride, w, act, t, tokens - t < PANEL_TOKENS ? tokens - t : PANEL_TOKENS, row, row_end);
        break;
    case WEIGHT_F32:
    case WEIGHT_KIND_COUNT:
        break;
    }
}

const struct kernels kernels_avx2 = {
    .name = "avx2",
    .supported = kernels_supported_avx2,
    .matmul = matmul,
    VECTOR_OPS_ENTRIES,
};
