// Matmul with AMX: bf16 and fp8 weights in tiles of bf16, whatever the number of tokens (amx_bf16.h); int8 and tiled weights of many tokens in
// tiles of int8, below. All else is AVX-512's. The order of every sum: kernels.h; whole numbers are exact in any order, so their bits are those
// of the other tables.
//
// 64 rows and PANEL_COLS columns of weights are unpacked once to signed int8 in the order of the right operand, which up to BLOCK_TOKENS
// tokens use from L1. The left operand is 16 tokens times 64 columns of the activations, as they lie. One left tile times four right ones:
// each activation is read once for 64 rows, and four sums in turn hide the latency of a product. They stay in their registers over a whole group
// (of sums: the weight's group, or ACT_GROUP for int8), and are scaled in vectors while the tiles multiply the next group.
//
// Registers are configured at the beginning of a call and released at its end, a few dozen cycles among the many thousands of the least call. A
// flag that a thread is configured would be wrong in a child of fork, which gets empty registers; and a thread that sleeps, or decodes, with
// released registers has no 8 KiB to be saved at a context switch.
#include "kernels/attention.h"
#include "kernels/cpu/avx512_help.h"
#include "kernels/kernels_internal.h"

// clang 14 has names of its own; an emulation needs neither.
#if defined(__AMX_INT8__) && defined(__AMX_BF16__) || defined(__AMXINT8__) && defined(__AMXBF16__) || defined(TILE_LOAD)

#include "kernels/cpu/amx_tiles.h"

static bool supported(void) { return kernels_supported_amx(); }

enum {
    LEAST_TOKENS = 12,  // fewer are done sooner by vectors
    BLOCK_TOKENS = 256, // tokens that share a panel: 64 KiB of sums
    PANEL_COLS = 384,   // 24 KiB of unpacked codes
    NARROW_COLS = 128,  // the same for groups of less than 64 columns
    PANEL_GROUPS = NARROW_COLS / 16,
};
_Static_assert(PANEL_COLS / 64 <= PANEL_GROUPS && PANEL_COLS % ACT_GROUP == 0 && NARROW_COLS % ACT_GROUP == 0, "");

static const struct tile_config all_tiles = {
    .palette = 1,
    .row_bytes = {TILE_ROW_BYTES, TILE_ROW_BYTES, TILE_ROW_BYTES, TILE_ROW_BYTES, TILE_ROW_BYTES, TILE_ROW_BYTES,
                  TILE_ROW_BYTES, TILE_ROW_BYTES},
    .rows = {TILE_ROWS, TILE_ROWS, TILE_ROWS, TILE_ROWS, TILE_ROWS, TILE_ROWS, TILE_ROWS, TILE_ROWS},
};

// Left operands: 16 tokens, 64 columns each.
typedef int8_t left_tile[TILE_ROWS][TILE_ROW_BYTES];

// 64 rows, what they are multiplied with, and what comes of it.
struct block {
    __m512i codes[PANEL_COLS / 64][BLOCK_VECTORS][TILE_ROWS]; // right operands: [4 columns each][16 rows][4 columns]
    float scale[PANEL_GROUPS][BLOCK_ROWS], zero[PANEL_GROUPS][BLOCK_ROWS];
    left_tile input[PANEL_GROUPS]; // where activations do not serve as they lie
    int32_t dot[TILE_ROWS][BLOCK_ROWS];
    float sum[BLOCK_TOKENS][BLOCK_ROWS];
};

// ---- Unpacking weights ---------------------------------------------------------------------------------------------

// 16 bytes from each of four places.
VECTOR_INLINE __m512i load_lanes(const void *a, const void *b, const void *c, const void *d)
{
    __m512i v = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)a));
    v = _mm512_mask_broadcast_i32x4(v, 0x00f0, _mm_loadu_si128((const __m128i *)b));
    v = _mm512_mask_broadcast_i32x4(v, 0x0f00, _mm_loadu_si128((const __m128i *)c));
    return _mm512_mask_broadcast_i32x4(v, 0xf000, _mm_loadu_si128((const __m128i *)d));
}

// tile[i]: word i of each row.
VECTOR_INLINE void turn_words(__m512i tile[TILE_ROWS], const left_tile *rows)
{
    for (int part = 0; part < 4; part++) {
        __m512i v[4];
        for (int r = 0; r < 4; r++)
            v[r] = load_lanes(&(*rows)[r][16 * part], &(*rows)[r + 4][16 * part], &(*rows)[r + 8][16 * part],
                              &(*rows)[r + 12][16 * part]);
        transpose_words(tile + 4 * part, v[0], v[1], v[2], v[3]);
    }
}

// 64 bytes of 16 rows. Each cache line is read once as a whole: rows of a length of 2^n crowd each other out of L1.
VECTOR_INLINE void unpack_lines(__m512i tile[TILE_ROWS], const uint8_t *codes, int64_t row_bytes)
{
    _Alignas(64) left_tile rows;
    for (int r = 0; r < TILE_ROWS; r++)
        _mm512_storeu_si512(rows[r], _mm512_loadu_si512(codes + r * row_bytes));
    turn_words(tile, (const left_tile *)&rows);
}

// A tile of four-bit codes: 128-bit lanes 0 and 1 become rows 0 to 7, the low nibbles, 2 and 3 the rows behind them.
VECTOR_INLINE void unpack_tile(__m512i tile[TILE_ROWS], const uint8_t *packed, __m512i values)
{
    const __m512i shift = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi32(4), 1);
    for (int part = 0; part < 4; part++) {
        __m512i v[4];
        for (int r = 0; r < 4; r++) {
            const uint8_t *first = packed + 64 * r + 16 * part, *second = first + 4 * 64;
            v[r] = load_lanes(first, second, first, second);
        }
        transpose_words(tile + 4 * part, v[0], v[1], v[2], v[3]);
    }
    for (int i = 0; i < TILE_ROWS; i++) {
        __m512i code = _mm512_and_si512(_mm512_srlv_epi32(tile[i], shift), _mm512_set1_epi8(15));
        tile[i] = _mm512_shuffle_epi8(values, code);
    }
}

// What the sixteen codes of a tiled kind mean: whole numbers, those of fp4 doubled.
static __m512i code_values(enum weight_kind kind)
{
    static const int8_t int4[16] = {0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1};
    __m128i values = _mm_loadu_si128((const __m128i *)int4);
    if (has_tile_table(kind))
        values = _mm_sub_epi8(_mm_loadu_si128((const __m128i *)tile_table(kind)), _mm_set1_epi8((char)tile_bias(kind)));
    return _mm512_broadcast_i32x4(values);
}

// The codes of 64 rows from column `col` on.
static const uint8_t *codes_at(const struct matrix *w, int64_t row, int64_t col)
{
    int64_t cols = (int64_t)w->shape.cols_padded;
    return (const uint8_t *)w->data +
           (w->shape.kind == WEIGHT_INT8 ? row * cols + col : (row * cols + col * BLOCK_ROWS) / 2);
}

// Cache lines of the codes of so many columns, and one of them brought to L2. Behind the end of a matrix that does nothing.
static int64_t codes_lines(const struct matrix *w, int64_t cols)
{
    return w->shape.kind == WEIGHT_INT8 ? cols : cols / 2;
}
VECTOR_INLINE void prefetch_codes(const struct matrix *w, const uint8_t *codes, int64_t line)
{
    int64_t at = 64 * line;
    if (w->shape.kind == WEIGHT_INT8)
        at = line % BLOCK_ROWS * (int64_t)w->shape.cols_padded + line / BLOCK_ROWS * 64;
    _mm_prefetch((const char *)((uintptr_t)codes + (uintptr_t)at), _MM_HINT_T1);
}

static void fill_panel(struct block *block, const struct matrix *w, int64_t row, int64_t col, int64_t cols)
{
    enum weight_kind kind = w->shape.kind;
    int64_t row_cols = (int64_t)w->shape.cols_padded;
    const uint8_t *codes = codes_at(w, row, col);
    __m512i values = code_values(kind);
    if (kind == WEIGHT_INT8) {
        for (int64_t c = 0; c < cols / 64; c++)
            for (int64_t i = 0; i < BLOCK_VECTORS; i++)
                unpack_lines(block->codes[c][i], codes + i * LANES * row_cols + 64 * c, row_cols);
        return;
    }
    for (int64_t c = 0; c < cols / 64; c++)
        for (int64_t i = 0; i < BLOCK_VECTORS; i++, codes += WEIGHT_TILE_BYTES)
            unpack_tile(block->codes[c][i], codes, values);
    load_scales(block->scale, block->zero, w, row, col, cols);
}

// ---- Products ------------------------------------------------------------------------------------------------------

// Up to 16 tokens times a panel.
struct tile_job {
    struct block *block;
    const struct matrix *w;
    const struct activations *act;
    int64_t group_size;       // of sums
    int64_t col, cols;        // of the panel
    int64_t token, tokens;    // of act
    float (*sum)[BLOCK_ROWS]; // [tokens]
    const int8_t *left;       // left operands, one for each 64 columns or narrow group
    int64_t left_stride;      // from one token to the next
    int64_t left_step;        // from one operand to the next
};

// Words of a left operand's row that belong to group g of its 64 columns: of each four words, one, two or all.
static __mmask16 group_words(int64_t group_size, int64_t g)
{
    return group_size == 16 ? (__mmask16)(0x1111 << g) : group_size == 32 ? (__mmask16)(0x3333 << 2 * g) : 0xffff;
}

// Whole tiles of tokens are multiplied as they lie. The last tokens are copied, since no others may follow them in memory; and for groups of less
// than 64 columns there is a copy for each, in which the columns of other groups are zero: that takes no longer than shorter tiles.
static void set_left(struct tile_job *job)
{
    int64_t stride = job->act->stride, copies = job->group_size < 64 ? 64 / job->group_size : 1;
    const int8_t *q = job->act->q + job->token * stride + job->col;
    if (job->tokens == TILE_ROWS && copies == 1) {
        job->left = q;
        job->left_stride = stride;
        job->left_step = TILE_ROW_BYTES;
        return;
    }
    for (int64_t col = 0; col < job->cols; col += 64)
        for (int64_t g = 0; g < copies; g++) {
            int8_t(*tile)[TILE_ROW_BYTES] = job->block->input[col / 64 * copies + g];
            __mmask16 words = group_words(job->group_size, g);
            for (int64_t t = 0; t < TILE_ROWS; t++) {
                __m512i x = _mm512_setzero_si512();
                if (t < job->tokens)
                    x = _mm512_maskz_loadu_epi32(words, q + t * stride + col);
                _mm512_storeu_si512(tile[t], x);
            }
        }
    job->left = job->block->input[0][0];
    job->left_stride = TILE_ROW_BYTES;
    job->left_step = sizeof(left_tile);
}

// Columns of the group that begins at column `col` of the panel: the last of a row may be cut off.
VECTOR_INLINE int64_t group_cols(const struct tile_job *job, int64_t col)
{
    return job->cols - col < job->group_size ? job->cols - col : job->group_size;
}

// Sums of a group, which begins at column `col` of the panel, into tiles 0 to 3.
static void multiply(const struct tile_job *job, int64_t col)
{
    int64_t left_cols = group_cols(job, col);
    const int8_t *left = job->left + col / (job->group_size < 64 ? job->group_size : 64) * job->left_step;
    const __m512i(*right)[BLOCK_VECTORS][TILE_ROWS] = &job->block->codes[col / 64];
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
    for (; left_cols > 0; left_cols -= 64, left += job->left_step, right++) {
        TILE_LOAD(4, left, job->left_stride);
        TILE_LOAD(5, (*right)[0], TILE_ROW_BYTES);
        TILE_DOT_INT8(0, 4, 5);
        TILE_LOAD(6, (*right)[1], TILE_ROW_BYTES);
        TILE_DOT_INT8(1, 4, 6);
        TILE_LOAD(7, (*right)[2], TILE_ROW_BYTES);
        TILE_DOT_INT8(2, 4, 7);
        TILE_LOAD(5, (*right)[3], TILE_ROW_BYTES);
        TILE_DOT_INT8(3, 4, 5);
    }
}

static void store(int32_t dot[TILE_ROWS][BLOCK_ROWS])
{
    enum { STRIDE = BLOCK_ROWS * sizeof(int32_t) };
    TILE_STORE(0, dot[0], STRIDE);
    TILE_STORE(1, dot[0] + 16, STRIDE);
    TILE_STORE(2, dot[0] + 32, STRIDE);
    TILE_STORE(3, dot[0] + 48, STRIDE);
}

// Adds what was stored, scaled, to the tokens' sums.
VECTOR_INLINE void add_group(const struct tile_job *job, int64_t col, enum weight_kind kind)
{
    const struct block *block = job->block;
    int64_t x_groups = job->act->stride / ACT_GROUP, x_sums = job->act->stride / ACT_SUM, tokens = job->tokens;
    int64_t size = group_cols(job, col), g = col / job->group_size, act_col = job->col + col;
    const float *x_scale = job->act->q_scale + job->token * x_groups + act_col / ACT_GROUP;
    const int32_t *q_sum = job->act->q_sum + job->token * x_sums;
    float *sum = job->sum[0];
    __m512 scale[BLOCK_VECTORS], zero[BLOCK_VECTORS];
    UNROLL
    for (int i = 0; i < BLOCK_VECTORS; i++) {
        scale[i] = kind == WEIGHT_INT8 ? _mm512_setzero_ps() : _mm512_loadu_ps(block->scale[g] + i * LANES);
        zero[i] = kind == WEIGHT_INT4Z ? _mm512_loadu_ps(block->zero[g] + i * LANES) : _mm512_setzero_ps();
    }
    for (int64_t t = 0; t < tokens; t++, sum += BLOCK_ROWS) {
        __m512 xs = _mm512_set1_ps(x_scale[t * x_groups]), x_sum = _mm512_setzero_ps();
        if (kind == WEIGHT_INT4Z)
            x_sum = _mm512_set1_ps((float)sum_of_q(q_sum + t * x_sums, act_col, size));
        UNROLL
        for (int i = 0; i < BLOCK_VECTORS; i++) {
            __m512 value = _mm512_cvtepi32_ps(_mm512_loadu_si512(block->dot[t] + i * LANES));
            if (kind == WEIGHT_INT4Z)
                value = _mm512_sub_ps(value, _mm512_mul_ps(zero[i], x_sum));
            value = _mm512_mul_ps(value, kind == WEIGHT_INT8 ? xs : _mm512_mul_ps(scale[i], xs));
            _mm512_storeu_ps(sum + i * LANES, _mm512_add_ps(_mm512_loadu_ps(sum + i * LANES), value));
        }
    }
}

static void add_int8(const struct tile_job *job, int64_t col) { add_group(job, col, WEIGHT_INT8); }
static void add_int4z(const struct tile_job *job, int64_t col) { add_group(job, col, WEIGHT_INT4Z); }
static void add_scaled(const struct tile_job *job, int64_t col) { add_group(job, col, WEIGHT_INT4); }

// A panel times `tokens` tokens from `first` on. Meanwhile the next panel's codes come to L2: tiles are quicker than memory.
static void multiply_panel(struct tile_job job, int64_t first, int64_t tokens, const uint8_t *next_codes)
{
    enum weight_kind kind = job.w->shape.kind;
    void (*add)(const struct tile_job *, int64_t) = kind == WEIGHT_INT8    ? add_int8
                                                    : kind == WEIGHT_INT4Z ? add_int4z
                                                                           : add_scaled;
    int64_t steps = (tokens + TILE_ROWS - 1) / TILE_ROWS * ((job.cols + job.group_size - 1) / job.group_size);
    int64_t lines = (codes_lines(job.w, job.cols) + steps - 1) / steps, line = 0, col_before = 0;
    struct tile_job before = {0};
    for (int64_t t = 0; t < tokens; t += TILE_ROWS) {
        job.token = first + t;
        job.tokens = tokens - t < TILE_ROWS ? tokens - t : TILE_ROWS;
        job.sum = job.block->sum + t;
        set_left(&job);
        for (int64_t col = 0; col < job.cols; col += job.group_size) {
            multiply(&job, col);
            for (int64_t i = 0; i < lines; i++)
                prefetch_codes(job.w, next_codes, line++);
            if (before.block)
                add(&before, col_before);
            store(job.block->dot);
            before = job;
            col_before = col;
        }
    }
    add(&before, col_before);
}

// 64 rows from `row` on, tokens [token, token + tokens), tokens <= BLOCK_TOKENS.
static void multiply_block(float *y, int64_t y_stride, const struct matrix *w, const struct activations *act,
                           int64_t token, int64_t tokens, int64_t row, int64_t row_end)
{
    struct block block;
    bool int8 = w->shape.kind == WEIGHT_INT8;
    int64_t cols = (int64_t)w->shape.cols_padded, group_size = int8 ? ACT_GROUP : w->shape.group_size;
    int64_t panel_cols = group_size < 64 ? NARROW_COLS : PANEL_COLS;
    memset(block.sum, 0, (size_t)tokens * sizeof *block.sum);
    for (int64_t col = 0; col < cols; col += panel_cols) {
        struct tile_job job = {.block = &block, .w = w, .act = act, .group_size = group_size, .col = col};
        job.cols = cols - col < panel_cols ? cols - col : panel_cols;
        fill_panel(&block, w, row, col, job.cols);
        bool is_last = col + job.cols == cols;
        multiply_panel(job, token, tokens,
                       is_last ? codes_at(w, row + BLOCK_ROWS, 0) : codes_at(w, row, col + job.cols));
    }
    for (int i = 0; i < BLOCK_VECTORS; i++) {
        __m512 last = load_last_of(w, row + i * LANES);
        for (int64_t t = 0; t < tokens; t++)
            store_rows(y + (token + t) * y_stride, row + i * LANES, row_end,
                       _mm512_mul_ps(_mm512_loadu_ps(block.sum[t] + i * LANES), last));
    }
}

#include "kernels/cpu/amx_bf16.h"

// ---- The table -----------------------------------------------------------------------------------------------------

static void prepare(struct activations *act, const struct matrix *w, const float *x, int64_t x_stride,
                    int64_t token_begin, int64_t token_end)
{
    round_or_prepare(act, w, x, x_stride, token_begin, token_end, false);
}

static void matmul(float *y, int64_t y_stride, const struct matrix *w, const struct activations *act, int64_t tokens,
                   int64_t row_begin, int64_t row_end)
{
    if (vector_ops_matmul(y, y_stride, w, act, tokens, row_begin, row_end))
        return;
    if (is_float_product(w->shape.kind)) {
        float_matmul(y, y_stride, w, act, tokens, row_begin, row_end);
        return;
    }
    if (tokens < LEAST_TOKENS) {
        kernels_avx512.matmul(y, y_stride, w, act, tokens, row_begin, row_end);
        return;
    }
    TILES_CONFIGURE(&all_tiles);
    for (int64_t row = row_begin; row < row_end; row += BLOCK_ROWS)
        for (int64_t t = 0; t < tokens; t += BLOCK_TOKENS)
            multiply_block(y, y_stride, w, act, t, tokens - t < BLOCK_TOKENS ? tokens - t : BLOCK_TOKENS, row, row_end);
    TILES_RELEASE();
}

#else // the compiler knows no AMX
#include "kernels/cpu/kernels_absent.h"
#endif

const struct kernels kernels_amx = {
    .name = "amx",
    .sums = "amx",
    .supported = supported,
    .prepare = prepare,
    .matmul = matmul,
    .attention = attention_avx512,
    VECTOR_OPS_OTHER_ENTRIES,
};
