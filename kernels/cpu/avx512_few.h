// Matmul of tiled weights with some tokens, for AVX-512; included by avx512_table.h.
//
// Each cache line of weights is used for all tokens as it comes: a panel would be filled while memory is busy and multiplied while it rests.
// Two tiles side by side, 32 rows, are turned, still packed, so that the same four columns of a row are in each lane: no sum goes across lanes,
// and four columns of a token, broadcast, are multiplied with 32 rows. The turned codes of a unit (two tiles, one group of columns or 64 of them)
// wait in L1 until the unit before is multiplied: while it is, shuffles and products take turns every few hundred instructions, as they use different ports.
#ifndef TPSHARD_KERNELS_CPU_AVX512_FEW_H
#define TPSHARD_KERNELS_CPU_AVX512_FEW_H

enum {
    FEW_TOKENS = 16, // at most
    FEW_TILE = 8,    // tokens whose sums stay in registers
    FEW_PAIRS = BLOCK_VECTORS / 2,
    FEW_UNIT_COLS = 128,       // at most
    FEW_PREFETCH_BYTES = 6144, // of codes, ahead
};

// Packed codes of a unit: of each 64 columns [4 words of a lane][4 lanes].
typedef __m512i few_unit[FEW_UNIT_COLS / 4];

// 64 rows times up to PANEL_COLS columns from `col` on and a tile of tokens.
struct few_job {
    few_unit *units;                  // [FEW_PAIRS], of the pairs of tiles; the first one is there
    const uint8_t *codes;             // of the first row and column
    const uint8_t *next;              // of the unit that is turned last, for what is multiplied next
    const uint8_t *next_scales;       // of the next block
    const struct tile_scales *scales; // [BLOCK_VECTORS]
    const struct panel_token *x;      // [tokens]
    int64_t col, cols;
    float (*sum)[BLOCK_ROWS]; // [tokens]: of each pair of tiles rows 0..7 of both, then rows 8..15
};

// Half (0 or 1) of two tiles, 64 columns, into a unit: each vector has four columns of rows 0..7 of both tiles (low nibbles) and of rows 8..15.
// Lines are read as wholes and in the order in which they lie: so the processor, too, fetches ahead. Fetches half of what stands farther ahead.
VECTOR_INLINE void few_turn(__m512i *out, const uint8_t *tiles, int64_t half)
{
    __m512i lanes[2][4]; // of both tiles: two lanes of rows r and r + 4
    UNROLL
    for (int i = 0; i < 2; i++) {
        const uint8_t *tile = tiles + i * WEIGHT_TILE_BYTES;
        __m512i v[8];
        for (int r = 0; r < 8; r++) {
            v[r] = _mm512_loadu_si512(tile + 64 * r);
            if (i == 0)
                prefetch(tile + half * WEIGHT_TILE_BYTES + FEW_PREFETCH_BYTES + 64 * r);
        }
        for (int r = 0; r < 4; r++)
            lanes[i][r] =
                half ? _mm512_shuffle_i32x4(v[r], v[r + 4], 0xee) : _mm512_shuffle_i32x4(v[r], v[r + 4], 0x44);
    }
    UNROLL
    for (int t = 0; t < 2; t++) {
        __m512i v[4], word[4];
        for (int r = 0; r < 4; r++)
            v[r] = t ? _mm512_shuffle_i32x4(lanes[0][r], lanes[1][r], 0xdd)
                     : _mm512_shuffle_i32x4(lanes[0][r], lanes[1][r], 0x88);
        transpose_words(word, v[0], v[1], v[2], v[3]);
        for (int w = 0; w < 4; w++)
            _mm512_store_si512(&out[4 * w + 2 * half + t], word[w]);
    }
}

// From two vectors of 16 rows each: rows 0..7 of both, then rows 8..15; and back.
VECTOR_INLINE void join_halves(__m512 out[2], __m512 first, __m512 second)
{
    out[0] = _mm512_shuffle_f32x4(first, second, 0x44);
    out[1] = _mm512_shuffle_f32x4(first, second, 0xee);
}

// Sums of products of a group: per token those of a unit's low nibbles, then of its high ones. high_16: these stay where they are in their
// bytes, and their sums are 16 times as large.
VECTOR_INLINE void few_start(i32x16 dot[FEW_TILE][2], const struct panel_token *x, int64_t group, int tokens,
                             bool high_16)
{
    UNROLL
    for (int t = 0; t < tokens; t++) {
        dot[t][0] = (i32x16)_mm512_set1_epi32(x[t].start[group]);
        dot[t][1] = dot[t][0];
        if (high_16)
            dot[t][1] = (i32x16){0};
    }
}

// `count` vectors of a unit: words [0, count / 4) of all four lanes, from column `col` of the panel's on.
VECTOR_INLINE void few_products(i32x16 dot[FEW_TILE][2], const __m512i *unit, const struct panel_token *x, int64_t col,
                                int count, int tokens, enum weight_kind kind, bool high_16)
{
    UNROLL
    for (int i = 0; i < count; i++) {
        __m512i codes = _mm512_load_si512(unit + i), low = low_codes(codes, kind);
        __m512i high = high_16 ? high_codes_16(codes) : high_codes(codes, kind);
        UNROLL
        for (int t = 0; t < tokens; t++) {
            int32_t four;
            memcpy(&four, x[t].q + col + i % 4 * 16 + i / 4 * 4, sizeof four);
            __m512i all = _mm512_set1_epi32(four);
            dot[t][0] = (i32x16)_mm512_dpbusd_epi32((__m512i)dot[t][0], low, all);
            dot[t][1] = (i32x16)_mm512_dpbusd_epi32((__m512i)dot[t][1], high, all);
        }
    }
}

// Adds a group of a pair of tiles, scaled, to the tokens' sums. col: of the panel's.
VECTOR_INLINE void few_add(const struct few_job *job, int64_t pair, int64_t col, i32x16 dot[FEW_TILE][2], int tokens,
                           enum weight_kind kind, bool high_16)
{
    const struct tile_scales *at = job->scales + 2 * pair;
    const uint8_t *first = tile_scales_at(at, job->col + col), *second = tile_scales_at(at + 1, job->col + col);
    __m512 scale[2], zero[2];
    join_halves(scale, load_scale(kind, first), load_scale(kind, second));
    if (kind == WEIGHT_INT4Z)
        join_halves(zero, load_f16(first + 2 * LANES), load_f16(second + 2 * LANES));
    UNROLL
    for (int t = 0; t < tokens; t++) {
        const struct panel_token *x = &job->x[t];
        float *sum = job->sum[t] + pair * 2 * LANES;
        __m512 x_scale = _mm512_set1_ps(x->scale[col / ACT_GROUP]);
        if (high_16)
            dot[t][1] = (dot[t][1] >> 4) + (i32x16)_mm512_set1_epi32(x->start[col / ACT_SUM]);
        UNROLL
        for (int i = 0; i < 2; i++) {
            __m512 value = _mm512_cvtepi32_ps((__m512i)dot[t][i]);
            if (kind == WEIGHT_INT4Z)
                value = _mm512_sub_ps(value, _mm512_mul_ps(zero[i], _mm512_set1_ps(x->sum[col / ACT_SUM])));
            value = _mm512_mul_ps(value, _mm512_mul_ps(scale[i], x_scale));
            _mm512_store_ps(sum + i * LANES, _mm512_add_ps(_mm512_load_ps(sum + i * LANES), value));
        }
    }
}

VECTOR_INLINE void few_columns(const struct few_job *job, int tokens, enum weight_kind kind, int group_size)
{
    enum { PART_COLS = 32, PART_CODES = PART_COLS / 4 };
    const int unit_cols = group_size == 128 ? 128 : 64, part_groups = group_size == 16 ? 2 : 1;
    const bool whole = group_size >= 64; // a unit is one group
    // Else high nibbles are shifted: once for all tokens, in place of each token's sums.
    const bool high_16 = !has_tile_table(kind) && (whole || tokens <= 4);
    const int64_t unit_bytes = unit_cols / 2 * BLOCK_ROWS; // to the next columns
    const int64_t scale_bytes = BLOCK_VECTORS * (unit_cols / group_size) * job->scales[0].group_bytes;
    const uint8_t *codes = job->codes, *next_scales = job->next_scales;
    for (int64_t col = 0; col < job->cols; col += unit_cols, codes += unit_bytes, next_scales += scale_bytes) {
        for (int64_t i = 0; i < scale_bytes; i += 64)
            prefetch(next_scales + i);
        NO_UNROLL
        for (int64_t pair = 0; pair < FEW_PAIRS; pair++) {
            const bool last = pair + 1 == FEW_PAIRS;
            _Static_assert(FEW_PAIRS == 2, "what is not last is the first pair, and `next` the second");
            const uint8_t *next = codes + (last ? unit_bytes : 2 * WEIGHT_TILE_BYTES);
            if (last && col + unit_cols >= job->cols)
                next = job->next;
            const __m512i *unit = job->units[pair];
            __m512i *next_unit = job->units[last ? 0 : pair + 1];
            i32x16 dot[FEW_TILE][2];
            if (whole)
                few_start(dot, job->x, col / ACT_SUM, tokens, high_16);
            NO_UNROLL
            for (int64_t part = 0; part < unit_cols / PART_COLS; part++, unit += PART_CODES) {
                // Of each 64 columns a part has two words of every lane.
                int64_t in_q = col + part / 2 * 64 + part % 2 * 8;
                few_turn(next_unit + part / 2 * 16, next + part / 2 * (BLOCK_VECTORS * WEIGHT_TILE_BYTES), part % 2);
                if (whole) {
                    few_products(dot, unit, job->x, in_q, PART_CODES, tokens, kind, high_16);
                    continue;
                }
                UNROLL
                for (int g = 0; g < part_groups; g++) {
                    int64_t group_col = col + part * PART_COLS + g * 16;
                    few_start(dot, job->x, group_col / ACT_SUM, tokens, high_16);
                    few_products(dot, unit + 4 * g, job->x, in_q + 4 * g, PART_CODES / part_groups, tokens, kind,
                                 high_16);
                    few_add(job, pair, group_col, dot, tokens, kind, high_16);
                }
            }
            if (whole)
                few_add(job, pair, col, dot, tokens, kind, high_16);
        }
    }
}

typedef void few_fn(const struct few_job *job);

#define FEW_FN(name, tokens, call)                                                                                     \
    static void few_##name##_##tokens(const struct few_job *job) { call; }
#define FEW_TABLE(name)                                                                                                \
    static few_fn *const few_##name[FEW_TILE + 1] = {NULL,           few_##name##_1, few_##name##_2,                   \
                                                     few_##name##_3, few_##name##_4, few_##name##_5,                   \
                                                     few_##name##_6, few_##name##_7, few_##name##_8}
#define FEW_TILED(name, kind, group_size)                                                                              \
    FEW_FN(name, 1, few_columns(job, 1, kind, group_size))                                                             \
    FEW_FN(name, 2, few_columns(job, 2, kind, group_size))                                                             \
    FEW_FN(name, 3, few_columns(job, 3, kind, group_size))                                                             \
    FEW_FN(name, 4, few_columns(job, 4, kind, group_size))                                                             \
    FEW_FN(name, 5, few_columns(job, 5, kind, group_size))                                                             \
    FEW_FN(name, 6, few_columns(job, 6, kind, group_size))                                                             \
    FEW_FN(name, 7, few_columns(job, 7, kind, group_size))                                                             \
    FEW_FN(name, 8, few_columns(job, 8, kind, group_size))                                                             \
    FEW_TABLE(name)
FEW_TILED(int4_128, WEIGHT_INT4, 128);
FEW_TILED(int4_64, WEIGHT_INT4, 64);
FEW_TILED(int4_32, WEIGHT_INT4, 32);
FEW_TILED(int4z_128, WEIGHT_INT4Z, 128);
FEW_TILED(int4z_64, WEIGHT_INT4Z, 64);
FEW_TILED(int4z_32, WEIGHT_INT4Z, 32);
FEW_TILED(nl4_128, WEIGHT_NL4, 128);
FEW_TILED(nl4_64, WEIGHT_NL4, 64);
FEW_TILED(nl4_32, WEIGHT_NL4, 32);
FEW_TILED(mxfp4, WEIGHT_MXFP4, 32);
FEW_TILED(nvfp4, WEIGHT_NVFP4, 16);
#undef FEW_FN
#undef FEW_TABLE
#undef FEW_TILED

static few_fn *const *few_table(const struct weight_shape *shape)
{
    switch (shape->kind) {
    case WEIGHT_INT4:
        return shape->group_size == 128 ? few_int4_128 : shape->group_size == 64 ? few_int4_64 : few_int4_32;
    case WEIGHT_INT4Z:
        return shape->group_size == 128 ? few_int4z_128 : shape->group_size == 64 ? few_int4z_64 : few_int4z_32;
    case WEIGHT_NL4:
        return shape->group_size == 128 ? few_nl4_128 : shape->group_size == 64 ? few_nl4_64 : few_nl4_32;
    case WEIGHT_MXFP4:
        return few_mxfp4;
    default:
        return few_nvfp4;
    }
}

// 64 rows from `row` on; tokens <= FEW_TOKENS. Their first unit stands in units[0], and at the end that of the rows behind them.
static void few_block(float *y, int64_t y_stride, const struct matrix *w, const struct activations *act, int64_t tokens,
                      int64_t row, int64_t row_end, few_unit units[FEW_PAIRS])
{
    few_fn *const *table = few_table(&w->shape);
    int64_t cols = (int64_t)w->shape.cols_padded, group_size = w->shape.group_size;
    struct tile_scales scales[BLOCK_VECTORS];
    struct panel_token x[FEW_TOKENS];
    _Alignas(64) float sum[FEW_TOKENS][BLOCK_ROWS];
    for (int64_t i = 0; i < BLOCK_VECTORS; i++)
        scales[i] = tile_scales(w, row + i * LANES);
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t i = 0; i < BLOCK_VECTORS; i++)
            _mm512_store_ps(sum[t] + i * LANES, _mm512_setzero_ps());
    struct few_job job = {.units = units, .scales = scales};
    for (int64_t col = 0; col < cols; col += PANEL_COLS) {
        job.codes = (const uint8_t *)w->data + (row * cols + col * BLOCK_ROWS) / 2;
        job.col = col;
        job.cols = cols - col < PANEL_COLS ? cols - col : PANEL_COLS;
        job.next_scales = tile_scales(w, row + BLOCK_ROWS).first +
                          BLOCK_VECTORS * (tile_scales_at(&scales[0], col) - scales[0].first);
        bool last = col + job.cols == cols && row + BLOCK_ROWS >= row_end;
        panel_tokens(x, act, 0, tokens, col, job.cols, group_size, tile_bias(w->shape.kind));
        for (int64_t t = 0, count; t < tokens; t += count) {
            int64_t left = tokens - t;
            count = left > FEW_TILE ? (left + 1) / 2 : left;
            job.x = x + t;
            job.sum = sum + t;
            // The same columns again for more tokens, else what follows in memory; behind the last rows nothing that may be read.
            job.next = job.codes + (t + count < tokens || last ? 0 : job.cols * BLOCK_ROWS / 2);
            table[count](&job);
        }
    }
    for (int64_t i = 0; i < BLOCK_VECTORS; i++) {
        __m512 factor = load_last(w->shape.kind, &scales[i]);
        for (int64_t t = 0; t < tokens; t++) {
            const float *pair = sum[t] + i / 2 * 2 * LANES;
            __m512 total[2];
            join_halves(total, _mm512_load_ps(pair), _mm512_load_ps(pair + LANES));
            store_rows(y + t * y_stride, row + i * LANES, row_end, _mm512_mul_ps(total[i % 2], factor));
        }
    }
}

// tokens <= FEW_TOKENS
static void few_matmul(float *y, int64_t y_stride, const struct matrix *w, const struct activations *act,
                       int64_t tokens, int64_t row_begin, int64_t row_end)
{
    int64_t cols = (int64_t)w->shape.cols_padded, parts = w->shape.group_size == 128 ? 4 : 2;
    few_unit units[FEW_PAIRS];
    if (row_begin >= row_end || cols == 0)
        return;
    const uint8_t *codes = (const uint8_t *)w->data + row_begin * cols / 2;
    for (int64_t part = 0; part < parts; part++)
        few_turn(units[0] + part / 2 * 16, codes + part / 2 * (BLOCK_VECTORS * WEIGHT_TILE_BYTES), part % 2);
    for (int64_t row = row_begin; row < row_end; row += BLOCK_ROWS)
        few_block(y, y_stride, w, act, tokens, row, row_end, units);
}

#endif
