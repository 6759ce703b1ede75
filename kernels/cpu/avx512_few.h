// Matmul of tiled weights with some tokens, for AVX-512; included by avx512_table.h.
//
// A panel would be filled while memory is busy and multiplied while it rests; here each cache line of weights is used for all tokens as it
// comes. Lines are transposed as in avx512_tiled.h; after lanes of two fours of them have changed places, the columns of a row lie in two lanes.
#ifndef TPSHARD_KERNELS_CPU_AVX512_FEW_H
#define TPSHARD_KERNELS_CPU_AVX512_FEW_H

enum {
    FEW_TOKENS = 16, // at most
    FEW_TILE = 8,    // tokens whose sums stay in registers
    FEW_COLS = 128,  // of a step, at most
    FEW_BLOCKS = 4,  // blocks that share a step's input
    FEW_ROWS = FEW_BLOCKS * BLOCK_ROWS,
    FEW_PREFETCH_BYTES = 6144, // of codes, ahead
};

// What the tokens give to a step.
struct few_input {
    // Of each 64 columns, in the order of act->q, and of w < 4: word w of each 128-bit lane in all four places of that lane.
    __m512i x[FEW_TOKENS][FEW_COLS / 64][4];
    float scale[FEW_TOKENS];
    int32_t sum[FEW_COLS / 16][FEW_TOKENS]; // of q, per group
};

// One step: all rows at hand times the columns from `col` on and a tile of tokens.
struct few_step {
    const uint8_t *codes; // of the first row and column
    int64_t block_bytes;  // to the next block
    int64_t blocks, col;
    const struct tile_scales *scales; // [blocks * BLOCK_VECTORS]
    const struct few_input *in;       // of all tokens
    int64_t token;                    // the tile's first
    float (*sum)[FEW_ROWS];           // [FEW_TOKENS]
};

static void few_input_fill(struct few_input *in, const struct activations *act, int64_t tokens, int64_t col,
                           int64_t cols, int64_t group_size)
{
    for (int64_t t = 0; t < tokens; t++) {
        const int8_t *q = act->q + t * act->stride + col;
        const int32_t *q_sum = act->q_sum + t * (act->stride / ACT_SUM);
        for (int64_t c = 0; c < cols / 64; c++) {
            __m512i x = _mm512_loadu_si512(q + 64 * c);
            in->x[t][c][0] = _mm512_shuffle_epi32(x, 0x00);
            in->x[t][c][1] = _mm512_shuffle_epi32(x, 0x55);
            in->x[t][c][2] = _mm512_shuffle_epi32(x, 0xaa);
            in->x[t][c][3] = _mm512_shuffle_epi32(x, 0xff);
        }
        in->scale[t] = act->q_scale[t * (act->stride / ACT_GROUP) + col / ACT_GROUP];
        for (int64_t c = 0; c < cols; c += group_size)
            in->sum[c / group_size][t] = sum_of_q(q_sum, col + c, group_size);
    }
}

VECTOR_INLINE void few_tiles(const struct few_step *step, int tokens, enum weight_kind kind, int group_size)
{
    const bool high_16 = !has_tile_table(kind) && group_size >= 64;
    const int tile_count = group_size == 128 ? 2 : 1;
    const struct few_input *in = step->in;
    for (int i = 0; i < BLOCK_VECTORS; i++)
        for (int64_t b = 0; b < step->blocks; b++) {
            const struct tile_scales *at = &step->scales[b * BLOCK_VECTORS + i];
            const uint8_t *tile = step->codes + b * step->block_bytes + i * WEIGHT_TILE_BYTES;
            const uint8_t *scale_at = tile_scales_at(at, step->col);
            int64_t row = b * BLOCK_ROWS + i * LANES;
            i32x16 dot[FEW_TILE][2];
            prefetch(scale_at + 256);
            UNROLL
            for (int c = 0; c < tile_count; c++) {
                __m512i first[4], second[4];
                turn_tile(first, second, tile + c * (4 * WEIGHT_TILE_BYTES), FEW_PREFETCH_BYTES);
                UNROLL
                for (int w = 0; w < 4; w++) {
                    if ((64 * c + 16 * w) % group_size == 0) {
                        UNROLL
                        for (int t = 0; t < tokens; t++)
                            dot[t][0] = dot[t][1] = (i32x16){0};
                    }
                    UNROLL
                    for (int p = 0; p < 2; p++) {
                        __m512i codes = p ? _mm512_shuffle_i32x4(first[w], second[w], 0xee)
                                          : _mm512_shuffle_i32x4(first[w], second[w], 0x44);
                        __m512i low = low_codes(codes, kind);
                        __m512i high = high_16 ? high_codes_16(codes) : high_codes(codes, kind);
                        UNROLL
                        for (int t = 0; t < tokens; t++) {
                            const __m256i *from = (const __m256i *)&in->x[step->token + t][c][w] + p;
                            __m512i x = _mm512_broadcast_i64x4(_mm256_load_si256(from));
                            dot[t][0] = (i32x16)_mm512_dpbusd_epi32((__m512i)dot[t][0], low, x);
                            dot[t][1] = (i32x16)_mm512_dpbusd_epi32((__m512i)dot[t][1], high, x);
                        }
                    }
                    if ((64 * c + 16 * w + 16) % group_size)
                        continue;
                    int group = (64 * c + 16 * w) / group_size;
                    const uint8_t *from = scale_at + group * at->group_bytes;
                    __m512 scale = load_scale(kind, from), zero = _mm512_setzero_ps();
                    if (kind == WEIGHT_INT4Z)
                        zero = load_f16(from + 2 * LANES);
                    UNROLL
                    for (int t = 0; t < tokens; t++) {
                        __m512i total = add_lane_pairs((__m512i)dot[t][0], (__m512i)dot[t][1]);
                        int32_t x_sum = in->sum[group][step->token + t];
                        if (high_16)
                            total = _mm512_mask_srai_epi32(total, 0xff00, total, 4);
                        total = _mm512_sub_epi32(total, _mm512_set1_epi32(tile_bias(kind) * x_sum));
                        __m512 value = _mm512_cvtepi32_ps(total);
                        if (kind == WEIGHT_INT4Z)
                            value = _mm512_sub_ps(value, _mm512_mul_ps(zero, _mm512_set1_ps((float)x_sum)));
                        __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(in->scale[step->token + t]));
                        float *sum = step->sum[step->token + t] + row;
                        value = _mm512_add_ps(_mm512_loadu_ps(sum), _mm512_mul_ps(value, factor));
                        _mm512_storeu_ps(sum, value);
                    }
                }
            }
        }
}

typedef void few_fn(const struct few_step *step);

#define FEW_FN(name, tokens, call)                                                                                     \
    static void few_##name##_##tokens(const struct few_step *step) { call; }
#define FEW_TABLE(name)                                                                                                \
    static few_fn *const few_##name[FEW_TILE + 1] = {NULL,           few_##name##_1, few_##name##_2,                   \
                                                     few_##name##_3, few_##name##_4, few_##name##_5,                   \
                                                     few_##name##_6, few_##name##_7, few_##name##_8}
#define FEW_TILED(name, kind, group_size)                                                                              \
    FEW_FN(name, 1, few_tiles(step, 1, kind, group_size))                                                              \
    FEW_FN(name, 2, few_tiles(step, 2, kind, group_size))                                                              \
    FEW_FN(name, 3, few_tiles(step, 3, kind, group_size))                                                              \
    FEW_FN(name, 4, few_tiles(step, 4, kind, group_size))                                                              \
    FEW_FN(name, 5, few_tiles(step, 5, kind, group_size))                                                              \
    FEW_FN(name, 6, few_tiles(step, 6, kind, group_size))                                                              \
    FEW_FN(name, 7, few_tiles(step, 7, kind, group_size))                                                              \
    FEW_FN(name, 8, few_tiles(step, 8, kind, group_size))                                                              \
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

// tokens <= FEW_TOKENS
static void few_matmul(float *y, int64_t y_stride, const struct matrix *w, const struct activations *act,
                       int64_t tokens, int64_t row_begin, int64_t row_end)
{
    few_fn *const *table = few_table(&w->shape);
    int64_t cols = (int64_t)w->shape.cols_padded, group_size = w->shape.group_size,
            step_cols = group_size == 128 ? 128 : 64;
    for (int64_t row = row_begin; row < row_end; row += FEW_ROWS) {
        int64_t blocks = (row_end - row + BLOCK_ROWS - 1) / BLOCK_ROWS;
        struct tile_scales scales[FEW_BLOCKS * BLOCK_VECTORS];
        struct few_input in;
        float sum[FEW_TOKENS][FEW_ROWS];
        struct few_step step = {
            .block_bytes = BLOCK_ROWS / 2 * cols,
            .blocks = blocks < FEW_BLOCKS ? blocks : FEW_BLOCKS,
            .scales = scales,
            .in = &in,
            .sum = sum,
        };
        int64_t vectors = step.blocks * BLOCK_VECTORS;
        for (int64_t i = 0; i < vectors; i++)
            scales[i] = tile_scales(w, row + i * LANES);
        for (int64_t t = 0; t < tokens; t++)
            memset(sum[t], 0, (size_t)(vectors * LANES) * sizeof **sum);
        for (step.col = 0; step.col < cols; step.col += step_cols) {
            step.codes = (const uint8_t *)w->data + (row * cols + step.col * BLOCK_ROWS) / 2;
            few_input_fill(&in, act, tokens, step.col, step_cols, group_size);
            int64_t count;
            for (step.token = 0; step.token < tokens; step.token += count) {
                int64_t left = tokens - step.token;
                count = left < FEW_TILE ? left : FEW_TILE;
                table[count](&step);
            }
        }
        for (int64_t i = 0; i < vectors; i++) {
            __m512 last = load_last(w->shape.kind, &scales[i]);
            for (int64_t t = 0; t < tokens; t++)
                store_rows(y + t * y_stride, row + i * LANES, row_end,
                           _mm512_mul_ps(_mm512_loadu_ps(sum[t] + i * LANES), last));
        }
    }
}

#endif
