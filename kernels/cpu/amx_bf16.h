// Matmul of bf16, fp8 and fp8g weights in tiles of bf16; included by kernels_amx.c.
//
// Weights are exact: bf16 as they are, e4m3 as bf16 of 2^-8 times their value. Activations are f32, and are split by `prepare`: hi, the nearest
// bf16, and lo, the bf16 nearest to what is left; both are multiplied, and their sums added at the end. What that is worth, and what it costs:
//   hi alone      errs by up to 2^-8 of each activation, and by 1.5e-3 of a typical output. Activations of int8 err four times that, but those who
//                 keep bf16 or fp8 weights do so for what int8 loses; and the likeliest token would often change with the machine.
//   hi + lo       errs by up to 2^-17 of each, and by 2.2e-6 of a typical output: 700 times less. (The vectors' sums of f32 err by 3e-7.)
//                 In prefill twice the products of tiles, so half of their peak is useful: on paper still 8 times the peak of f32 in
//                 vectors, which was all there was. In decode nothing: weights are read once, and hi and lo are columns of one right operand.
//   three parts   lose nothing, at three times the products; the error of the sums stays, so outputs would gain less than a factor of 7.
// Tiles count subnormal numbers as zero: activations below 2^-126, lo of those below 2^-117. NaN and Inf give NaN, and so do magnitudes from
// 3.39e38 on, which round to an infinite bf16. (tests/test_amx_bf16.c measures, and holds these bounds.)
//
// The order of every sum, and so a row's bits, are one whatever its company. With a step of 32 columns, its product and the chains inside it as
// TILE_DOT_BF16 has them, and everything else in f32:
//   sum_hi = step 0 + step 1 + ... from zero, ascending;  sum_lo likewise
//   bf16   y = sum_hi + sum_lo
//   fp8    y = (sum_hi + sum_lo) * (2^8 * scale_w[row])
//   fp8g   y = 2^8 * total, where for each 128 columns g, ascending, with sums begun anew: total = fma(sum_hi + sum_lo, scale_w[row][g], total)
// Two ways lead to these bits, since the operands of a product may change places. Each rearranges the one that is used less:
//   few tokens    weights are the left operand: 16 rows as they lie in the file (fp8: unpacked), read side by side, each cache line whole.
//                 Activations, at most FEW_INPUT_BYTES, are turned to the right operand once a call: of 8 tokens hi and lo stand side by side.
//   more tokens   activations are the left operand, as `prepare` leaves them. 64 rows x PANEL_FLOATS columns of weights are turned to right
//                 operands that up to BLOCK_TOKENS tokens use. Four sums, of 32 rows by hi and lo, take four loads for four products; they
//                 leave their registers at a panel's end. Between products the next panel is unpacked and the one behind it
//                 fetched: the vectors and the memory have time while tiles multiply.
#ifndef TPSHARD_KERNELS_CPU_AMX_BF16_H
#define TPSHARD_KERNELS_CPU_AMX_BF16_H

enum {
    STEP_COLS = 32,                              // of one product
    STEP_BYTES = STEP_COLS * (int)sizeof(float), // of prepared activations: hi, then lo
    PANEL_FLOATS = 128,                          // columns: 16 KiB of weights, 8 KiB of 16 tokens; a group of fp8g
    PANEL_STEPS = PANEL_FLOATS / STEP_COLS,      //
    HALF_ROWS = BLOCK_ROWS / 2,                  // of a panel, whose sums fit the registers
    FEW_GROUP = 8,                               // tokens of one right operand, where weights are the left one
    FEW_GROUPS = 2,                              //
    FEW_INPUT_BYTES = 512 * 1024,                // of them: a quarter of L2
    FEW_PREFETCH_BYTES = 1024,                   // ahead, of each row
};
_Static_assert(PANEL_FLOATS == 128, "a group of fp8g is one panel");

static bool is_float_product(enum weight_kind kind)
{
    return kind == WEIGHT_BF16 || kind == WEIGHT_FP8 || kind == WEIGHT_FP8G;
}

// ---- Activations ---------------------------------------------------------------------------------------------------

// Floats whose upper halves are the nearest bf16.
VECTOR_INLINE __m512 nearest_bf16(__m512 x)
{
    __m512i bits = _mm512_castps_si512(x), even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(even, _mm512_set1_epi32(0x7fff)));
    bits = _mm512_mask_mov_epi32(bits, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
    return _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32((int)0xffff0000)));
}

// Each 32 columns: 32 hi, then 32 lo.
static void split_row(uint8_t *out, const float *x, int64_t cols)
{
    _Alignas(64) static const uint16_t upper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                    33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    __m512i halves = _mm512_load_si512(upper);
    for (int64_t col = 0, stored = (int64_t)round_up((uint64_t)cols, ACT_GROUP); col < stored; col += STEP_COLS) {
        __m512 hi[2], lo[2];
        for (int64_t i = 0; i < 2; i++) {
            int64_t left = cols - col - i * LANES;
            __mmask16 some = left >= LANES ? 0xffff : left > 0 ? (__mmask16)((1u << left) - 1) : 0;
            __m512 v = _mm512_maskz_loadu_ps(some, x + col + i * LANES);
            hi[i] = nearest_bf16(v);
            lo[i] = nearest_bf16(_mm512_sub_ps(v, hi[i]));
        }
        _mm512_storeu_si512(out + col * 4,
                            _mm512_permutex2var_epi16(_mm512_castps_si512(hi[0]), halves, _mm512_castps_si512(hi[1])));
        _mm512_storeu_si512(out + col * 4 + TILE_ROW_BYTES,
                            _mm512_permutex2var_epi16(_mm512_castps_si512(lo[0]), halves, _mm512_castps_si512(lo[1])));
    }
}

static void prepare(struct activations *act, const struct matrix *w, const float *x, int64_t x_stride,
                    int64_t token_begin, int64_t token_end)
{
    if (!is_float_product(w->shape.kind)) {
        vector_ops_prepare(act, w, x, x_stride, token_begin, token_end);
        return;
    }
    for (int64_t token = token_begin; token < token_end; token++)
        split_row((uint8_t *)(act->f32 + token * act->stride), x + token * x_stride, (int64_t)w->shape.cols);
}

// Prepared columns of a token, from a multiple of STEP_COLS on.
VECTOR_INLINE const uint8_t *split_at(const struct activations *act, int64_t token, int64_t col)
{
    return (const uint8_t *)(act->f32 + token * act->stride + col);
}

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

// The right operands of up to FEW_GROUP tokens: for each step 16 rows of `row_bytes`, a word of each token's hi, then of its lo.
struct few_input {
    int64_t tokens, row_bytes;
    const uint8_t *tiles;
};

static int64_t few_input_bytes(const struct matrix *w, int64_t tokens)
{
    return tokens * (int64_t)w->shape.cols_padded * (int64_t)sizeof(float);
}

// Rows are stored whole, one over the end of the other: 64 bytes behind the last are written too.
static struct few_input few_input(uint8_t *room, const struct activations *act, int64_t token, int64_t tokens,
                                  int64_t cols)
{
    struct few_input input = {tokens, 2 * tokens * (int64_t)sizeof(int32_t), room};
    _Alignas(64) left_tile rows;
    memset(rows, 0, sizeof rows);
    for (int64_t col = 0; col < cols; col += STEP_COLS, room += TILE_ROWS * input.row_bytes) {
        __m512i turned[TILE_ROWS];
        if (tokens == 1) {
            _Alignas(64) static const int32_t order[2][16] = {
                {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23},
                {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31}};
            __m512i hi = _mm512_loadu_si512(split_at(act, token, col));
            __m512i lo = _mm512_loadu_si512(split_at(act, token, col) + TILE_ROW_BYTES);
            for (int i = 0; i < 2; i++)
                _mm512_storeu_si512(room + TILE_ROW_BYTES * i,
                                    _mm512_permutex2var_epi32(hi, _mm512_load_si512(order[i]), lo));
            continue;
        }
        for (int64_t t = 0; t < tokens; t++) {
            const uint8_t *split = split_at(act, token + t, col);
            _mm512_store_si512(rows[t], _mm512_loadu_si512(split));
            _mm512_store_si512(rows[tokens + t], _mm512_loadu_si512(split + TILE_ROW_BYTES));
        }
        turn_words(turned, (const left_tile *)&rows);
        for (int64_t i = 0; i < TILE_ROWS; i++)
            _mm512_storeu_si512(room + i * input.row_bytes, turned[i]);
    }
    return input;
}

struct few_job {
    const struct matrix *w;
    struct few_input input[FEW_GROUPS];
    _Alignas(64) left_tile left[2];                       // fp8: unpacked
    _Alignas(64) float dot[FEW_GROUPS][TILE_ROWS][LANES]; // as stored: the columns of hi, then those of lo
    _Alignas(64) float sum[FEW_GROUPS][TILE_ROWS][LANES]; // column: token
};

static void few_configure(const struct few_job *job, int groups)
{
    struct tile_config config = {.palette = 1, .row_bytes = {[4] = TILE_ROW_BYTES, [5] = TILE_ROW_BYTES}};
    config.rows[4] = config.rows[5] = TILE_ROWS;
    for (int tile = 0; tile < TILE_COUNT; tile++)
        if (tile != 4 && tile != 5 && tile % 2 < groups) {
            config.rows[tile] = TILE_ROWS;
            config.row_bytes[tile] = (uint16_t)job->input[tile % 2].row_bytes;
        }
    TILES_CONFIGURE(&config);
}

#define FEW_PRODUCT(sum, left, right, group, step)                                                                     \
    TILE_LOAD(right, job->input[group].tiles + (step)*TILE_ROWS * job->input[group].row_bytes,                         \
              job->input[group].row_bytes);                                                                            \
    TILE_DOT_BF16(sum, left, right)

// Two steps of 16 rows: sums in tile 0, of the second group in tile 1.
VECTOR_INLINE void few_products(const struct few_job *job, const uint8_t *left, int64_t left_stride, int64_t left_step,
                                int64_t step, int groups)
{
    TILE_LOAD(4, left, left_stride);
    FEW_PRODUCT(0, 4, 2, 0, step);
    if (groups == 2) {
        FEW_PRODUCT(1, 4, 3, 1, step);
    }
    TILE_LOAD(5, left + left_step, left_stride);
    FEW_PRODUCT(0, 5, 6, 0, step + 1);
    if (groups == 2) {
        FEW_PRODUCT(1, 5, 7, 1, step + 1);
    }
}
#undef FEW_PRODUCT

// What the tiles hold: sum = hi + lo, or with a scale for each row, sum = fma(hi + lo, scale, sum).
VECTOR_INLINE void few_add(struct few_job *job, const float *scale, int groups)
{
    TILE_STORE(0, job->dot[0], TILE_ROW_BYTES);
    if (groups == 2)
        TILE_STORE(1, job->dot[1], TILE_ROW_BYTES);
    for (int g = 0; g < groups; g++) {
        int64_t tokens = job->input[g].tokens;
        __mmask16 some = (__mmask16)((1u << tokens) - 1);
        for (int r = 0; r < TILE_ROWS; r++) {
            const float *dot = job->dot[g][r];
            __m512 value = _mm512_add_ps(_mm512_maskz_loadu_ps(some, dot), _mm512_maskz_loadu_ps(some, dot + tokens));
            if (scale)
                value = _mm512_fmadd_ps(value, _mm512_set1_ps(scale[r]), _mm512_load_ps(job->sum[g][r]));
            _mm512_store_ps(job->sum[g][r], value);
        }
    }
}

VECTOR_INLINE void few_zero(int groups)
{
    TILE_ZERO(0);
    if (groups == 2)
        TILE_ZERO(1);
}

// 16 rows from `row` on. What is fetched ahead runs on from the rows' ends to the beginnings of the next 16.
VECTOR_INLINE void few_rows(float *y, int64_t y_stride, struct few_job *job, int64_t row, int64_t row_end,
                            enum weight_kind kind, int groups)
{
    enum { COLS = 2 * STEP_COLS };
    const struct matrix *w = job->w;
    int64_t cols = (int64_t)w->shape.cols_padded, elem_bytes = kind == WEIGHT_BF16 ? 2 : 1;
    int64_t row_bytes = cols * elem_bytes;
    const uint8_t *codes = (const uint8_t *)w->data + row * row_bytes;
    const float *scale = kind == WEIGHT_FP8G ? fp8g_scales(w, row) : NULL;
    if (kind == WEIGHT_FP8G)
        memset(job->sum, 0, sizeof job->sum);
    few_zero(groups);
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
            few_products(job, from, row_bytes, TILE_ROW_BYTES, col / STEP_COLS, groups);
        else
            few_products(job, (const uint8_t *)job->left, TILE_ROW_BYTES, sizeof(left_tile), col / STEP_COLS, groups);
        if (kind == WEIGHT_FP8G && (col + COLS) % PANEL_FLOATS == 0) {
            few_add(job, scale + col / PANEL_FLOATS * 16, groups);
            few_zero(groups);
        }
    }
    if (kind != WEIGHT_FP8G)
        few_add(job, NULL, groups);
    __m512 last = last_of_floats(w, row, kind);
    for (int64_t g = 0; g < groups; g++) {
        __m512i turned[TILE_ROWS];
        turn_words(turned, (const left_tile *)&job->sum[g]);
        for (int64_t t = 0; t < job->input[g].tokens; t++)
            store_rows(y + (FEW_GROUP * g + t) * y_stride, row, row_end,
                       _mm512_mul_ps(_mm512_castsi512_ps(turned[t]), last));
    }
}

static void few_floats(float *y, int64_t y_stride, const struct matrix *w, const struct activations *act,
                       int64_t tokens, int64_t row_begin, int64_t row_end)
{
    _Alignas(64) uint8_t room[FEW_INPUT_BYTES + FEW_GROUPS * TILE_ROW_BYTES];
    struct few_job job = {.w = w};
    int groups = tokens > FEW_GROUP ? 2 : 1;
    int64_t cols = (int64_t)w->shape.cols_padded, first = groups == 2 ? FEW_GROUP : tokens;
    job.input[0] = few_input(room, act, 0, first, cols);
    if (groups == 2)
        job.input[1] = few_input(room + few_input_bytes(w, first) + TILE_ROW_BYTES, act, first, tokens - first, cols);
    few_configure(&job, groups);
#define FEW_CASE(kind)                                                                                                 \
    case kind:                                                                                                         \
        for (int64_t row = row_begin; row < row_end; row += TILE_ROWS)                                                 \
            if (groups == 2)                                                                                           \
                few_rows(y, y_stride, &job, row, row_end, kind, 2);                                                    \
            else                                                                                                       \
                few_rows(y, y_stride, &job, row, row_end, kind, 1);                                                    \
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

enum { HI, LO, UNPACK_COLS = 64, UNPACK_PARTS = PANEL_FLOATS / UNPACK_COLS * BLOCK_VECTORS };

struct float_block {
    const struct matrix *w;
    const struct activations *act;
    int64_t row, token, tokens;                                      // of w and of act
    __m512i codes[2][PANEL_STEPS][BLOCK_VECTORS][TILE_ROWS];         // right operands of this panel and the next
    _Alignas(64) uint8_t input[TILE_ROWS][PANEL_STEPS * STEP_BYTES]; // the last tokens, and zeros
    _Alignas(64) float dot[2][TILE_ROWS][HALF_ROWS];                 // fp8g: of a group
    _Alignas(64) float sum[2][BLOCK_TOKENS][BLOCK_ROWS];             // fp8g: [HI] is the total
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

// 16 tokens times 32 rows of a panel: tiles 0 and 1 take hi, 2 and 3 lo.
static void half_products(const struct float_panel *panel, const uint8_t *left, int64_t left_stride, int64_t half)
{
    const __m512i(*right)[TILE_ROWS] = (const __m512i(*)[TILE_ROWS]) & panel->codes[0][2 * half];
    for (int64_t col = 0; col < panel->cols; col += STEP_COLS, left += STEP_BYTES, right += BLOCK_VECTORS) {
        TILE_LOAD(4, left, left_stride);
        TILE_LOAD(6, right[0], TILE_ROW_BYTES);
        TILE_DOT_BF16(0, 4, 6);
        TILE_LOAD(7, right[1], TILE_ROW_BYTES);
        TILE_DOT_BF16(1, 4, 7);
        TILE_LOAD(5, left + TILE_ROW_BYTES, left_stride);
        TILE_DOT_BF16(2, 5, 6);
        TILE_DOT_BF16(3, 5, 7);
    }
}

VECTOR_INLINE void zero_sums(void)
{
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
}
VECTOR_INLINE void load_sums(const float *hi, const float *lo)
{
    enum { STRIDE = BLOCK_ROWS * sizeof(float) };
    TILE_LOAD(0, hi, STRIDE);
    TILE_LOAD(1, hi + LANES, STRIDE);
    TILE_LOAD(2, lo, STRIDE);
    TILE_LOAD(3, lo + LANES, STRIDE);
}
VECTOR_INLINE void store_sums(float *hi, float *lo, int64_t stride)
{
    TILE_STORE(0, hi, stride);
    TILE_STORE(1, hi + LANES, stride);
    TILE_STORE(2, lo, stride);
    TILE_STORE(3, lo + LANES, stride);
}

// fp8g: a group's sums, which were stored, scaled and added to the totals of 16 tokens and 32 rows. Inline: gcc 12 takes a function like this
// for one without effects, and leaves out its calls.
VECTOR_INLINE void add_floats(struct float_block *block, const struct float_panel *panel, int64_t token, int64_t half)
{
    __m512 scale[2];
    for (int64_t i = 0; i < 2; i++)
        scale[i] = _mm512_loadu_ps(fp8g_scales(block->w, block->row + half * HALF_ROWS + i * LANES) +
                                   panel->col / PANEL_FLOATS * 16);
    for (int64_t t = 0; t < TILE_ROWS; t++)
        for (int64_t i = 0; i < 2; i++) {
            float *total = &block->sum[HI][token + t][half * HALF_ROWS + i * LANES];
            __m512 value = _mm512_add_ps(_mm512_load_ps(&block->dot[HI][t][i * LANES]),
                                         _mm512_load_ps(&block->dot[LO][t][i * LANES]));
            _mm512_store_ps(total, _mm512_fmadd_ps(value, scale[i], _mm512_load_ps(total)));
        }
}

// Whole tiles of tokens are multiplied as they lie; the last tokens are copied, since no others may follow them in memory.
static const uint8_t *panel_left(struct float_block *block, const struct float_panel *panel, int64_t token,
                                 int64_t *stride)
{
    const uint8_t *left = split_at(block->act, block->token + token, panel->col);
    int64_t tokens = block->tokens - token;
    *stride = block->act->stride * (int64_t)sizeof(float);
    if (tokens >= TILE_ROWS)
        return left;
    memset(block->input, 0, sizeof block->input);
    for (int64_t t = 0; t < tokens; t++)
        memcpy(block->input[t], left + t * *stride, (size_t)panel->cols * sizeof(float));
    *stride = sizeof block->input[0];
    return block->input[0];
}

VECTOR_INLINE void multiply_float_panel(struct float_block *block, const struct float_panel *panel, struct beside *b,
                                        enum weight_kind kind)
{
    int64_t token_before = -1, half_before = 0;
    for (int64_t token = 0; token < block->tokens; token += TILE_ROWS) {
        int64_t left_stride;
        const uint8_t *left = panel_left(block, panel, token, &left_stride);
        for (int64_t half = 0; half < 2; half++) {
            float *hi = &block->sum[HI][token][half * HALF_ROWS], *lo = &block->sum[LO][token][half * HALF_ROWS];
            if (kind == WEIGHT_FP8G || panel->col == 0)
                zero_sums();
            else
                load_sums(hi, lo);
            half_products(panel, left, left_stride, half);
            do_beside(block, b, kind);
            if (kind != WEIGHT_FP8G) {
                store_sums(hi, lo, sizeof block->sum[0][0]);
                continue;
            }
            if (token_before >= 0)
                add_floats(block, panel, token_before, half_before);
            store_sums(block->dot[HI][0], block->dot[LO][0], sizeof block->dot[0][0]);
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
        memset(block->sum[HI], 0, sizeof block->sum[HI]);
    struct float_panel panel = panel_at(block, 0);
    for (int64_t part = 0; part < panel_parts(&panel); part++)
        unpack_part(block, &panel, part, kind);
    for (int64_t col = 0; col < cols; col += PANEL_FLOATS) {
        int64_t fetch_col = col + 2 * PANEL_FLOATS, fetch_row = block->row;
        if (fetch_col >= cols) {
            fetch_col -= whole_cols;
            fetch_row += BLOCK_ROWS;
        }
        struct beside b = {.steps = 2 * ((block->tokens + TILE_ROWS - 1) / TILE_ROWS)};
        b.fetch = floats_at(w, fetch_row, fetch_col > 0 ? fetch_col : 0);
        if (col + PANEL_FLOATS < cols)
            b.next = panel_at(block, col + PANEL_FLOATS);
        panel = panel_at(block, col);
        multiply_float_panel(block, &panel, &b, kind);
    }
    for (int64_t i = 0; i < BLOCK_ROWS; i += LANES) {
        __m512 last = last_of_floats(w, block->row + i, kind);
        for (int64_t t = 0; t < block->tokens; t++) {
            __m512 value = _mm512_load_ps(&block->sum[HI][t][i]);
            if (kind != WEIGHT_FP8G)
                value = _mm512_add_ps(value, _mm512_load_ps(&block->sum[LO][t][i]));
            store_rows(y + (block->token + t) * y_stride, block->row + i, row_end, _mm512_mul_ps(value, last));
        }
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
    bool few = tokens <= FEW_GROUPS * FEW_GROUP && few_input_bytes(w, tokens) <= FEW_INPUT_BYTES;
    if (tokens > 0 && row_begin < row_end)
        (few ? few_floats : many_floats)(y, y_stride, w, act, tokens, row_begin, row_end);
}

#endif
