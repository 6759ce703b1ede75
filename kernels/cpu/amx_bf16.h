// Matmul of bf16, fp8 and fp8g weights in tiles of bf16; included by kernels_amx.c.
//
// Weights are exact: bf16 as they are, e4m3 as bf16 of 2^-8 times their value. Activations are rounded to bf16 by `prepare` (bf16_rows.h says
// why, and what it costs). The likeliest token changes with that now and then, as it does from a GPU to a CPU. What was tried instead: the
// rounding's rest as a second bf16 beside the first takes twice the products of tiles in prefill, and leaves 2.2e-6 of a typical output.
// Tiles count subnormal numbers as zero. NaN and Inf give NaN or Inf, and so do magnitudes from 3.39e38 on, which round to an infinite bf16.
// (tests/test_bf16.c measures, and holds these bounds.)
//
// The order of every sum, and so a row's bits, are one whatever its company. With a step of 32 columns, its product and the chains inside it as
// TILE_DOT_BF16 has them, and everything else in f32:
//   sum = step 0 + step 1 + ... from zero, ascending
//   bf16   y = sum
//   fp8    y = sum * (2^8 * scale_w[row])
//   fp8g   y = 2^8 * total, where for each 128 columns g, ascending, with the sum begun anew: total = fma(sum, scale_w[row][g], total)
// Two ways lead to these bits, since the operands of a product may change places. Each rearranges the one that is used less:
//   few tokens    weights are the left operand: 16 rows as they lie in the file (fp8: unpacked), read side by side, each cache line whole.
//                 Activations, at most FEW_INPUT_BYTES, are turned to the right operand once a call.
//   more tokens   activations are the left operand, as `prepare` leaves them. 64 rows x PANEL_FLOATS columns of weights are turned to right
//                 operands that up to BLOCK_TOKENS tokens use. Four sums, of 32 tokens by 32 rows, take four loads for four products;
//                 they leave their registers at a panel's end. Between products the next panel is unpacked and the one behind it
//                 fetched: the vectors and the memory have time while tiles multiply.
#ifndef TPSHARD_KERNELS_CPU_AMX_BF16_H
#define TPSHARD_KERNELS_CPU_AMX_BF16_H

#include "kernels/cpu/bf16_rows.h"

enum {
    STEP_COLS = 32,                         // of one product
    PANEL_FLOATS = 128,                     // columns: 16 KiB of weights, 8 KiB of 32 tokens; a group of fp8g
    PANEL_STEPS = PANEL_FLOATS / STEP_COLS, //
    PAIR_TOKENS = 2 * TILE_ROWS,            // of two left operands, whose sums by those of
    HALF_ROWS = BLOCK_ROWS / 2,             //   half a panel's rows fit the registers
    FEW_INPUT_BYTES = 512 * 1024,           // of right operands, where weights are the left one: a quarter of L2
    FEW_PREFETCH_BYTES = 1024,              // ahead, of each row
};
_Static_assert(PANEL_FLOATS == 128, "a group of fp8g is one panel");

// ---- Weights -------------------------------------------------------------------------------------------------------

VECTOR_INLINE int64_t float_bytes(const struct matrix *w) { return w->shape.kind == WEIGHT_BF16 ? 2 : 1; }

VECTOR_INLINE const uint8_t *floats_at(const struct matrix *w, int64_t row, int64_t col)
{
    return (const uint8_t *)w->data + (row * (int64_t)w->shape.cols_padded + col) * float_bytes(w);
}

// 64 codes of e4m3 as 2^-8 times their value, NaN as NaN, in their order. By way of f16, whose exponent has the bits that e4m3 lacks.
VECTOR_INLINE void bf16_of_fp8(__m512i out[2], __m512i codes)
{
    const __m512i bits = _mm512_set1_epi16((short)0xbf80);
    __m512i even = _mm512_and_si512(_mm512_srai_epi16(_mm512_slli_epi16(codes, 8), 1), bits);
    __m512i odd = _mm512_and_si512(_mm512_srai_epi16(codes, 1), bits);
    __m256i even_half[2] = {_mm512_castsi512_si256(even), _mm512_extracti64x4_epi64(even, 1)};
    __m256i odd_half[2] = {_mm512_castsi512_si256(odd), _mm512_extracti64x4_epi64(odd, 1)};
    for (int i = 0; i < 2; i++) // the lower halves of these floats are zero
        out[i] = _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(_mm512_cvtph_ps(even_half[i])), 16),
                                 _mm512_castps_si512(_mm512_cvtph_ps(odd_half[i])));
    __mmask64 nan = _mm512_cmpeq_epi8_mask(_mm512_add_epi8(codes, codes), _mm512_set1_epi8((char)0xfe));
    if (__builtin_expect(nan != 0, 0)) {
        out[0] = _mm512_mask_mov_epi16(out[0], (__mmask32)nan, _mm512_set1_epi16(0x7fc0));
        out[1] = _mm512_mask_mov_epi16(out[1], (__mmask32)(nan >> 32), _mm512_set1_epi16(0x7fc0));
    }
}

// What the sums of 16 rows are multiplied with at last.
VECTOR_INLINE __m512 last_of_floats(const struct matrix *w, int64_t row, enum weight_kind kind)
{
    if (kind == WEIGHT_BF16)
        return _mm512_set1_ps(1);
    __m512 factor = _mm512_set1_ps(0x1p8f);
    return kind == WEIGHT_FP8 ? _mm512_mul_ps(factor, _mm512_loadu_ps((const float *)w->scale + row)) : factor;
}

// ---- Few tokens ----------------------------------------------------------------------------------------------------

// The right operands of up to TILE_ROWS tokens: for each step 16 rows of `row_bytes`, a word of each token.
struct few_job {
    const struct matrix *w;
    int64_t tokens, row_bytes;
    const uint8_t *input;
    _Alignas(64) left_tile left[2];           // fp8: unpacked
    _Alignas(64) float dot[TILE_ROWS][LANES]; // as stored; column: token
    _Alignas(64) float sum[TILE_ROWS][LANES];
};

static int64_t few_input_bytes(const struct matrix *w, int64_t tokens)
{
    return tokens * (int64_t)w->shape.cols_padded * (int64_t)sizeof(uint16_t);
}

// Rows are stored whole, one over the end of the other: 64 bytes behind the last are written too.
static void few_input(uint8_t *room, const struct activations *act, int64_t tokens, int64_t cols)
{
    int64_t row_bytes = tokens * (int64_t)sizeof(int32_t);
    _Alignas(64) left_tile rows;
    memset(rows, 0, sizeof rows);
    for (int64_t col = 0; col < cols; col += STEP_COLS, room += TILE_ROWS * row_bytes) {
        __m512i turned[TILE_ROWS];
        if (tokens == 1) {
            _mm512_storeu_si512(room, _mm512_loadu_si512(rounded_at(act, 0, col)));
            continue;
        }
        for (int64_t t = 0; t < tokens; t++)
            _mm512_store_si512(rows[t], _mm512_loadu_si512(rounded_at(act, t, col)));
        turn_words(turned, (const left_tile *)&rows);
        for (int64_t i = 0; i < TILE_ROWS; i++)
            _mm512_storeu_si512(room + i * row_bytes, turned[i]);
    }
}

static void few_configure(const struct few_job *job)
{
    struct tile_config config = {.palette = 1, .row_bytes = {[4] = TILE_ROW_BYTES, [5] = TILE_ROW_BYTES}};
    config.rows[4] = config.rows[5] = TILE_ROWS;
    for (int tile = 0; tile < 3; tile++) {
        config.rows[tile] = TILE_ROWS;
        config.row_bytes[tile] = (uint16_t)job->row_bytes;
    }
    TILES_CONFIGURE(&config);
}

// Two steps of 16 rows, to the sums in tile 0.
VECTOR_INLINE void few_products(const struct few_job *job, const uint8_t *left, int64_t left_stride, int64_t left_step,
                                int64_t step)
{
    const uint8_t *right = job->input + step * TILE_ROWS * job->row_bytes;
    TILE_LOAD(4, left, left_stride);
    TILE_LOAD(1, right, job->row_bytes);
    TILE_DOT_BF16(0, 4, 1);
    TILE_LOAD(5, left + left_step, left_stride);
    TILE_LOAD(2, right + TILE_ROWS * job->row_bytes, job->row_bytes);
    TILE_DOT_BF16(0, 5, 2);
}

// What tile 0 holds: sum = it, or with a scale for each row, sum = fma(it, scale, sum).
VECTOR_INLINE void few_add(struct few_job *job, const float *scale)
{
    __mmask16 some = (__mmask16)((1u << job->tokens) - 1);
    TILE_STORE(0, job->dot, TILE_ROW_BYTES);
    for (int r = 0; r < TILE_ROWS; r++) {
        __m512 value = _mm512_maskz_loadu_ps(some, job->dot[r]);
        if (scale)
            value = _mm512_fmadd_ps(value, _mm512_set1_ps(scale[r]), _mm512_load_ps(job->sum[r]));
        _mm512_store_ps(job->sum[r], value);
    }
}

// 16 rows from `row` on. What is fetched ahead runs on from the rows' ends to the beginnings of the next 16.
VECTOR_INLINE void few_rows(float *y, int64_t y_stride, struct few_job *job, int64_t row, int64_t row_end,
                            enum weight_kind kind)
{
    enum { COLS = 2 * STEP_COLS };
    const struct matrix *w = job->w;
    int64_t cols = (int64_t)w->shape.cols_padded, elem_bytes = kind == WEIGHT_BF16 ? 2 : 1;
    int64_t row_bytes = cols * elem_bytes;
    const uint8_t *codes = (const uint8_t *)w->data + row * row_bytes;
    const float *scale = kind == WEIGHT_FP8G ? fp8g_scales(w, row) : NULL;
    if (kind == WEIGHT_FP8G)
        memset(job->sum, 0, sizeof job->sum);
    TILE_ZERO(0);
    for (int64_t col = 0; col < cols; col += COLS) {
        const uint8_t *from = codes + col * elem_bytes;
        int64_t ahead = FEW_PREFETCH_BYTES;
        if (col * elem_bytes + ahead >= row_bytes)
            ahead += (TILE_ROWS - 1) * row_bytes;
        for (int64_t r = 0; r < TILE_ROWS; r++) {
            for (int64_t line = 0; line < elem_bytes; line++)
                _mm_prefetch((const char *)((uintptr_t)(from + r * row_bytes) + (uintptr_t)(ahead + 64 * line)),
                             _MM_HINT_T1);
            if (kind != WEIGHT_BF16) {
                __m512i wide[2];
                bf16_of_fp8(wide, _mm512_loadu_si512(from + r * row_bytes));
                _mm512_store_si512(job->left[0][r], wide[0]);
                _mm512_store_si512(job->left[1][r], wide[1]);
            }
        }
        if (kind == WEIGHT_BF16)
            few_products(job, from, row_bytes, TILE_ROW_BYTES, col / STEP_COLS);
        else
            few_products(job, (const uint8_t *)job->left, TILE_ROW_BYTES, sizeof(left_tile), col / STEP_COLS);
        if (kind == WEIGHT_FP8G && (col + COLS) % PANEL_FLOATS == 0) {
            few_add(job, scale + col / PANEL_FLOATS * 16);
            TILE_ZERO(0);
        }
    }
    if (kind != WEIGHT_FP8G)
        few_add(job, NULL);
    __m512 last = last_of_floats(w, row, kind);
    __m512i turned[TILE_ROWS];
    turn_words(turned, (const left_tile *)&job->sum);
    for (int64_t t = 0; t < job->tokens; t++)
        store_rows(y + t * y_stride, row, row_end, _mm512_mul_ps(_mm512_castsi512_ps(turned[t]), last));
}

static void few_floats(float *y, int64_t y_stride, const struct matrix *w, const struct activations *act,
                       int64_t tokens, int64_t row_begin, int64_t row_end)
{
    _Alignas(64) uint8_t room[FEW_INPUT_BYTES + TILE_ROW_BYTES];
    struct few_job job = {.w = w, .tokens = tokens, .row_bytes = tokens * (int64_t)sizeof(int32_t), .input = room};
    few_input(room, act, tokens, (int64_t)w->shape.cols_padded);
    few_configure(&job);
#define FEW_CASE(kind)                                                                                                 \
    case kind:                                                                                                         \
        for (int64_t row = row_begin; row < row_end; row += TILE_ROWS)                                                 \
            few_rows(y, y_stride, &job, row, row_end, kind);                                                           \
        break
    switch (w->shape.kind) {
        FEW_CASE(WEIGHT_BF16);
        FEW_CASE(WEIGHT_FP8);
        FEW_CASE(WEIGHT_FP8G);
    default:
        break;
    }
#undef FEW_CASE
    TILES_RELEASE();
}

// ---- More tokens ---------------------------------------------------------------------------------------------------

enum { UNPACK_COLS = 64, UNPACK_PARTS = PANEL_FLOATS / UNPACK_COLS * BLOCK_VECTORS };

struct float_block {
    const struct matrix *w;
    const struct activations *act;
    int64_t row, token, tokens;                              // of w and of act
    __m512i codes[2][PANEL_STEPS][BLOCK_VECTORS][TILE_ROWS]; // right operands of this panel and the next
    _Alignas(64) uint8_t input[TILE_ROWS][2 * PANEL_FLOATS]; // the last tokens, and zeros
    _Alignas(64) float dot[PAIR_TOKENS][HALF_ROWS];          // fp8g: of a group
    _Alignas(64) float sum[BLOCK_TOKENS][BLOCK_ROWS];        // fp8g: the total
};

// A panel of a block: columns [col, col + cols).
struct float_panel {
    int64_t col, cols;
    __m512i (*codes)[BLOCK_VECTORS][TILE_ROWS];
};

static struct float_panel panel_at(struct float_block *block, int64_t col)
{
    int64_t left = (int64_t)block->w->shape.cols_padded - col;
    return (struct float_panel){col, left < PANEL_FLOATS ? left : PANEL_FLOATS, block->codes[col / PANEL_FLOATS % 2]};
}

static int64_t panel_parts(const struct float_panel *panel) { return panel->cols / UNPACK_COLS * BLOCK_VECTORS; }

// 16 rows x 64 columns of a panel. Codes of fp8 are turned first, four columns of a row at a time, then unpacked.
VECTOR_INLINE void unpack_part(const struct float_block *block, const struct float_panel *panel, int64_t part,
                               enum weight_kind kind)
{
    int64_t i = part % BLOCK_VECTORS, step = part / BLOCK_VECTORS * 2;
    int64_t row_bytes = (int64_t)block->w->shape.cols_padded * (kind == WEIGHT_BF16 ? 2 : 1);
    const uint8_t *from = floats_at(block->w, block->row + i * LANES, panel->col + step * STEP_COLS);
    if (kind == WEIGHT_BF16) {
        unpack_lines(panel->codes[step][i], from, row_bytes);
        unpack_lines(panel->codes[step + 1][i], from + TILE_ROW_BYTES, row_bytes);
        return;
    }
    _Alignas(64) static const uint16_t pairs[32] = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                                                    1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
    __m512i turned[TILE_ROWS], order = _mm512_load_si512(pairs);
    unpack_lines(turned, from, row_bytes);
    for (int64_t j = 0; j < TILE_ROWS; j++)
        bf16_of_fp8(&panel->codes[step + j / 8][i][j % 8 * 2], _mm512_permutexvar_epi16(order, turned[j]));
}

// What a block does beside its products, dealt out evenly over the `steps` that multiply one panel.
struct beside {
    struct float_panel next; // to be unpacked; cols 0: none
    const uint8_t *fetch;    // a panel's first row, brought to L2. Behind the end of a matrix that does nothing
    int64_t steps, step, unpacked, fetched;
};

VECTOR_INLINE void do_beside(const struct float_block *block, struct beside *b, enum weight_kind kind)
{
    enum { LINES = PANEL_FLOATS / 64 };
    int64_t row_lines = LINES * (kind == WEIGHT_BF16 ? 2 : 1),
            row_bytes = floats_at(block->w, 1, 0) - floats_at(block->w, 0, 0);
    b->step++;
    for (; b->unpacked * b->steps < panel_parts(&b->next) * b->step; b->unpacked++)
        unpack_part(block, &b->next, b->unpacked, kind);
    for (; b->fetched * b->steps < row_lines * BLOCK_ROWS * b->step; b->fetched++)
        _mm_prefetch((const char *)((uintptr_t)b->fetch +
                                    (uintptr_t)(b->fetched / row_lines * row_bytes + b->fetched % row_lines * 64)),
                     _MM_HINT_T1);
}

// The left operands of up to PAIR_TOKENS tokens: `count` of them, each with its stride.
struct left_pair {
    const uint8_t *tile[2];
    int64_t stride[2];
    int count;
};

// Whole tiles of tokens are multiplied as they lie; the last tokens are copied, since no others may follow them in memory.
static struct left_pair panel_left(struct float_block *block, const struct float_panel *panel, int64_t token)
{
    struct left_pair left = {.count = block->tokens - token > TILE_ROWS ? 2 : 1};
    for (int i = 0; i < left.count; i++, token += TILE_ROWS) {
        int64_t tokens = block->tokens - token, stride = block->act->stride * (int64_t)sizeof(float);
        const uint8_t *from = rounded_at(block->act, block->token + token, panel->col);
        left.tile[i] = from;
        left.stride[i] = stride;
        if (tokens >= TILE_ROWS)
            continue;
        memset(block->input, 0, sizeof block->input);
        for (int64_t t = 0; t < tokens; t++)
            memcpy(block->input[t], from + t * stride, (size_t)panel->cols * sizeof(uint16_t));
        left.tile[i] = block->input[0];
        left.stride[i] = sizeof block->input[0];
    }
    return left;
}

// The tokens times 32 rows of a panel: tiles 0 and 1 take the first 16 tokens, 2 and 3 the others.
VECTOR_INLINE void half_products(const struct float_panel *panel, const struct left_pair *left, int64_t half, int count)
{
    const __m512i(*right)[TILE_ROWS] = (const __m512i(*)[TILE_ROWS]) & panel->codes[0][2 * half];
    for (int64_t col = 0, at = 0; col < panel->cols; col += STEP_COLS, at += TILE_ROW_BYTES, right += BLOCK_VECTORS) {
        TILE_LOAD(4, left->tile[0] + at, left->stride[0]);
        TILE_LOAD(6, right[0], TILE_ROW_BYTES);
        TILE_DOT_BF16(0, 4, 6);
        TILE_LOAD(7, right[1], TILE_ROW_BYTES);
        TILE_DOT_BF16(1, 4, 7);
        if (count == 2) {
            TILE_LOAD(5, left->tile[1] + at, left->stride[1]);
            TILE_DOT_BF16(2, 5, 6);
            TILE_DOT_BF16(3, 5, 7);
        }
    }
}

VECTOR_INLINE void zero_sums(int count)
{
    TILE_ZERO(0);
    TILE_ZERO(1);
    if (count == 2) {
        TILE_ZERO(2);
        TILE_ZERO(3);
    }
}
VECTOR_INLINE void load_sums(const float *sum, int count)
{
    enum { STRIDE = BLOCK_ROWS * sizeof(float) };
    TILE_LOAD(0, sum, STRIDE);
    TILE_LOAD(1, sum + LANES, STRIDE);
    if (count == 2) {
        TILE_LOAD(2, sum + TILE_ROWS * BLOCK_ROWS, STRIDE);
        TILE_LOAD(3, sum + TILE_ROWS * BLOCK_ROWS + LANES, STRIDE);
    }
}
VECTOR_INLINE void store_sums(float *sum, int64_t row_floats, int count)
{
    int64_t stride = row_floats * (int64_t)sizeof(float);
    TILE_STORE(0, sum, stride);
    TILE_STORE(1, sum + LANES, stride);
    if (count == 2) {
        TILE_STORE(2, sum + TILE_ROWS * row_floats, stride);
        TILE_STORE(3, sum + TILE_ROWS * row_floats + LANES, stride);
    }
}

// fp8g: a group's sums, which were stored, scaled and added to the totals of the tokens from `token` on and 32 rows. Inline: gcc 12 takes a
// function like this for one without effects, and leaves out its calls.
VECTOR_INLINE void add_floats(struct float_block *block, const struct float_panel *panel, int64_t token, int64_t half)
{
    int64_t tokens = block->tokens - token < PAIR_TOKENS ? block->tokens - token : PAIR_TOKENS;
    __m512 scale[2];
    for (int64_t i = 0; i < 2; i++)
        scale[i] = _mm512_loadu_ps(fp8g_scales(block->w, block->row + half * HALF_ROWS + i * LANES) +
                                   panel->col / PANEL_FLOATS * 16);
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t i = 0; i < 2; i++) {
            float *total = &block->sum[token + t][half * HALF_ROWS + i * LANES];
            __m512 value = _mm512_load_ps(&block->dot[t][i * LANES]);
            _mm512_store_ps(total, _mm512_fmadd_ps(value, scale[i], _mm512_load_ps(total)));
        }
}

VECTOR_INLINE void multiply_half(struct float_block *block, const struct float_panel *panel,
                                 const struct left_pair *left, int64_t token, int64_t half, struct beside *b, int count,
                                 enum weight_kind kind)
{
    float *sum = &block->sum[token][half * HALF_ROWS];
    if (kind == WEIGHT_FP8G || panel->col == 0)
        zero_sums(count);
    else
        load_sums(sum, count);
    half_products(panel, left, half, count);
    do_beside(block, b, kind);
    if (kind != WEIGHT_FP8G)
        store_sums(sum, BLOCK_ROWS, count);
}

VECTOR_INLINE void multiply_float_panel(struct float_block *block, const struct float_panel *panel, struct beside *b,
                                        enum weight_kind kind)
{
    int64_t token_before = -1, half_before = 0;
    for (int64_t token = 0; token < block->tokens; token += PAIR_TOKENS) {
        struct left_pair left = panel_left(block, panel, token);
        for (int64_t half = 0; half < 2; half++) {
            if (left.count == 2)
                multiply_half(block, panel, &left, token, half, b, 2, kind);
            else
                multiply_half(block, panel, &left, token, half, b, 1, kind);
            if (kind != WEIGHT_FP8G)
                continue;
            if (token_before >= 0)
                add_floats(block, panel, token_before, half_before);
            store_sums(block->dot[0], HALF_ROWS, left.count);
            token_before = token;
            half_before = half;
        }
    }
    if (kind == WEIGHT_FP8G)
        add_floats(block, panel, token_before, half_before);
}

VECTOR_INLINE void multiply_float_block(float *y, int64_t y_stride, struct float_block *block, int64_t row_end,
                                        enum weight_kind kind)
{
    const struct matrix *w = block->w;
    int64_t cols = (int64_t)w->shape.cols_padded, whole_cols = (int64_t)round_up(w->shape.cols_padded, PANEL_FLOATS);
    if (kind == WEIGHT_FP8G)
        memset(block->sum, 0, sizeof block->sum);
    struct float_panel panel = panel_at(block, 0);
    for (int64_t part = 0; part < panel_parts(&panel); part++)
        unpack_part(block, &panel, part, kind);
    for (int64_t col = 0; col < cols; col += PANEL_FLOATS) {
        int64_t fetch_col = col + 2 * PANEL_FLOATS, fetch_row = block->row;
        if (fetch_col >= cols) {
            fetch_col -= whole_cols;
            fetch_row += BLOCK_ROWS;
        }
        struct beside b = {.steps = 2 * ((block->tokens + PAIR_TOKENS - 1) / PAIR_TOKENS)};
        b.fetch = floats_at(w, fetch_row, fetch_col > 0 ? fetch_col : 0);
        if (col + PANEL_FLOATS < cols)
            b.next = panel_at(block, col + PANEL_FLOATS);
        panel = panel_at(block, col);
        multiply_float_panel(block, &panel, &b, kind);
    }
    for (int64_t i = 0; i < BLOCK_ROWS; i += LANES) {
        __m512 last = last_of_floats(w, block->row + i, kind);
        for (int64_t t = 0; t < block->tokens; t++)
            store_rows(y + (block->token + t) * y_stride, block->row + i, row_end,
                       _mm512_mul_ps(_mm512_load_ps(&block->sum[t][i]), last));
    }
}

static void many_floats(float *y, int64_t y_stride, const struct matrix *w, const struct activations *act,
                        int64_t tokens, int64_t row_begin, int64_t row_end)
{
    struct float_block block;
    block.w = w;
    block.act = act;
    TILES_CONFIGURE(&all_tiles);
    for (block.row = row_begin; block.row < row_end; block.row += BLOCK_ROWS)
        for (block.token = 0; block.token < tokens; block.token += BLOCK_TOKENS) {
            block.tokens = tokens - block.token < BLOCK_TOKENS ? tokens - block.token : BLOCK_TOKENS;
            if (w->shape.kind == WEIGHT_BF16)
                multiply_float_block(y, y_stride, &block, row_end, WEIGHT_BF16);
            else if (w->shape.kind == WEIGHT_FP8)
                multiply_float_block(y, y_stride, &block, row_end, WEIGHT_FP8);
            else
                multiply_float_block(y, y_stride, &block, row_end, WEIGHT_FP8G);
        }
    TILES_RELEASE();
}

static void float_matmul(float *y, int64_t y_stride, const struct matrix *w, const struct activations *act,
                         int64_t tokens, int64_t row_begin, int64_t row_end)
{
    bool few = tokens <= TILE_ROWS && few_input_bytes(w, tokens) <= FEW_INPUT_BYTES;
    if (tokens > 0 && row_begin < row_end)
        (few ? few_floats : many_floats)(y, y_stride, w, act, tokens, row_begin, row_end);
}

#endif
