// Matmul of tiled weights with one or two tokens, for AVX-512; included by avx512_table.h.
//
// One stream of memory to a thread: a block of 64 rows from one end to the other, each line of weights used for all tokens as it comes. A load
// goes through memory in equal steps, in the order in which it lies (the loop over tiles is not unrolled): so the processor, too, fetches ahead.
//
// Four lines are transposed by words, still packed, so that a 128-bit lane holds four rows; the columns of a row lie then in four lanes, and
// are added up at the end of a group. Where a group is only one or two words long, lanes of two fours of rows change places before, so that
// columns lie in two lanes.
#ifndef TPSHARD_KERNELS_CPU_AVX512_TILED_H
#define TPSHARD_KERNELS_CPU_AVX512_TILED_H

enum {
    TILED_TOKENS = 2, // at most
    TILED_PREFETCH_BYTES = 5120,
    TILED_SCALES_AHEAD_BYTES = 512, // of one tile
};

// What the tokens give to a step of 64 columns, or 128 where a group is so large.
struct tiled_input {
    // Of each 64 columns, in the order of act->q, and of w < 4: word w of each 128-bit lane in all four places of that lane.
    __m512i x[TILED_TOKENS][2][4];
    float scale[TILED_TOKENS];
    int32_t bias[TILED_TOKENS][4]; // per group: what unsigned codes add
    float sum[TILED_TOKENS][4];    // of q, per group
};

VECTOR_INLINE void tiled_input_fill(struct tiled_input *in, const struct activations *act, int64_t col, int step,
                                    int group_size, int tokens, enum weight_kind kind)
{
    UNROLL
    for (int t = 0; t < tokens; t++) {
        const int8_t *q = act->q + t * act->stride + col;
        const int32_t *q_sum = act->q_sum + t * (act->stride / ACT_SUM);
        for (int h = 0; h < step / 64; h++) {
            __m512i x = _mm512_loadu_si512(q + 64 * h);
            in->x[t][h][0] = _mm512_shuffle_epi32(x, 0x00);
            in->x[t][h][1] = _mm512_shuffle_epi32(x, 0x55);
            in->x[t][h][2] = _mm512_shuffle_epi32(x, 0xaa);
            in->x[t][h][3] = _mm512_shuffle_epi32(x, 0xff);
        }
        in->scale[t] = act->q_scale[t * (act->stride / ACT_GROUP) + col / ACT_GROUP];
        for (int g = 0; g < step / group_size; g++) {
            int32_t sum = sum_of_q(q_sum, col + g * group_size, group_size);
            in->bias[t][g] = tile_bias(kind) * sum;
            in->sum[t][g] = (float)sum;
        }
    }
}

// Codes of high nibbles left where they are, 16 times as large, and so will be their sums.
VECTOR_INLINE __m512i high_codes_16(__m512i v)
{
    return _mm512_ternarylogic_epi32(v, _mm512_set1_epi8((char)0xf0), _mm512_set1_epi8((char)0x80), 0x6a);
}

// Word w of rows 0..3 (low nibbles) and 8..11 (high ones) of a tile in first[w], of rows 4..7 and 12..15 in second[w]; each 128-bit lane
// has the columns that its lane of the activations has. Fetches as much, so many bytes ahead.
VECTOR_INLINE void turn_tile(__m512i first[4], __m512i second[4], const uint8_t *tile, int64_t prefetch_bytes)
{
    __m512i v[8];
    for (int g = 0; g < 8; g++) {
        v[g] = _mm512_loadu_si512(tile + 64 * g);
        prefetch(tile + prefetch_bytes + 64 * g);
    }
    transpose_words(first, v[0], v[1], v[2], v[3]);
    transpose_words(second, v[4], v[5], v[6], v[7]);
}

// Codes of high nibbles as tiled_add expects their products.
VECTOR_INLINE __m512i tiled_high_codes(__m512i v, enum weight_kind kind)
{
    return has_tile_table(kind) ? high_codes(v, kind) : high_codes_16(v);
}

// total[t]: products of all words of a tile's 16 rows. x: of the tile's columns, every second of an array of [token][2].
VECTOR_INLINE void tiled_tile(__m512i total[TILED_TOKENS], const __m512i first[4], const __m512i second[4],
                              const __m512i (*x)[4], int tokens, enum weight_kind kind)
{
    i32x16 dot[TILED_TOKENS][4]; // of rows 0..3, 4..7, 8..11 and 12..15
    UNROLL
    for (int t = 0; t < tokens; t++)
        for (int i = 0; i < 4; i++)
            dot[t][i] = (i32x16){0};
    UNROLL
    for (int w = 0; w < 4; w++) {
        __m512i codes[4] = {low_codes(first[w], kind), low_codes(second[w], kind), tiled_high_codes(first[w], kind),
                            tiled_high_codes(second[w], kind)};
        UNROLL
        for (int t = 0; t < tokens; t++) {
            UNROLL
            for (int i = 0; i < 4; i++)
                dot[t][i] = (i32x16)_mm512_dpbusd_epi32((__m512i)dot[t][i], codes[i], x[2 * t][w]);
        }
    }
    UNROLL
    for (int t = 0; t < tokens; t++)
        total[t] = add_lane_pairs(add_lane_pairs((__m512i)dot[t][0], (__m512i)dot[t][1]),
                                  add_lane_pairs((__m512i)dot[t][2], (__m512i)dot[t][3]));
}

// The same of words [begin, end), one or two.
VECTOR_INLINE void tiled_words(__m512i total[TILED_TOKENS], const __m512i first[4], const __m512i second[4],
                               const __m512i (*x)[4], int begin, int end, int tokens, enum weight_kind kind)
{
    i32x16 dot[TILED_TOKENS][2]; // of rows 0..7 and 8..15
    UNROLL
    for (int t = 0; t < tokens; t++)
        dot[t][0] = dot[t][1] = (i32x16){0};
    UNROLL
    for (int w = begin; w < end; w++) {
        UNROLL
        for (int p = 0; p < 2; p++) {
            __m512i v =
                p ? _mm512_shuffle_i32x4(first[w], second[w], 0xee) : _mm512_shuffle_i32x4(first[w], second[w], 0x44);
            __m512i low = low_codes(v, kind), high = tiled_high_codes(v, kind);
            UNROLL
            for (int t = 0; t < tokens; t++) {
                __m512i half = _mm512_broadcast_i64x4(_mm256_load_si256((const __m256i *)&x[2 * t][w] + p));
                dot[t][0] = (i32x16)_mm512_dpbusd_epi32((__m512i)dot[t][0], low, half);
                dot[t][1] = (i32x16)_mm512_dpbusd_epi32((__m512i)dot[t][1], high, half);
            }
        }
    }
    UNROLL
    for (int t = 0; t < tokens; t++)
        total[t] = add_lane_pairs((__m512i)dot[t][0], (__m512i)dot[t][1]);
}

// sum[t][i] += a group of tile i whose products are total[t].
VECTOR_INLINE void tiled_add(__m512 sum[TILED_TOKENS][BLOCK_VECTORS], int64_t i, const __m512i total[TILED_TOKENS],
                             __m512 scale, const uint8_t *scales, const struct tiled_input *in, int group, int tokens,
                             enum weight_kind kind)
{
    UNROLL
    for (int t = 0; t < tokens; t++) {
        __m512i dot = has_tile_table(kind) ? total[t] : _mm512_mask_srai_epi32(total[t], 0xff00, total[t], 4);
        __m512 value = _mm512_cvtepi32_ps(_mm512_sub_epi32(dot, _mm512_set1_epi32(in->bias[t][group])));
        if (kind == WEIGHT_INT4Z)
            value =
                _mm512_sub_ps(value, _mm512_mul_ps(load_f16(scales + 2 * LANES), _mm512_set1_ps(in->sum[t][group])));
        value = _mm512_mul_ps(value, _mm512_mul_ps(scale, _mm512_set1_ps(in->scale[t])));
        sum[t][i] = _mm512_add_ps(sum[t][i], value);
    }
}

// 64 rows from `row` on, times the first `tokens` tokens of act.
VECTOR_INLINE void tiled_block(float *y, int64_t y_stride, const struct matrix *w, const struct activations *act,
                               int64_t row, int64_t row_end, int tokens, enum weight_kind kind, int group_size)
{
    const bool halves = group_size == 128; // a group is two tiles long
    const int step = halves ? 128 : 64, tiles = step / 64 * BLOCK_VECTORS, words = halves ? 4 : group_size / 16;
    const int scale_lines = step / group_size * (int)tile_group_bytes(kind) / 64;
    int64_t cols = (int64_t)w->shape.cols_padded;
    const uint8_t *codes = (const uint8_t *)w->data + row * cols / 2, *next = tile_scales(w, row + BLOCK_ROWS).first;
    struct tile_scales scales[BLOCK_VECTORS];
    struct tiled_input in;
    __m512 sum[TILED_TOKENS][BLOCK_VECTORS];
    for (int64_t i = 0; i < BLOCK_VECTORS; i++) {
        scales[i] = tile_scales(w, row + i * LANES);
        for (int t = 0; t < tokens; t++)
            sum[t][i] = _mm512_setzero_ps();
    }
    int64_t group_bytes = scales[0].group_bytes, step_bytes = step / group_size * group_bytes, at = 0;
    for (int64_t col = 0; col < cols; col += step, codes += tiles * WEIGHT_TILE_BYTES, at += step_bytes) {
        __m512i total[BLOCK_VECTORS][TILED_TOKENS];
        tiled_input_fill(&in, act, col, step, group_size, tokens, kind);
        // Scales of the next block, as many as the step uses: they stand by themselves, and would come late.
        for (int64_t i = 0; i < BLOCK_VECTORS * step_bytes; i += 64)
            prefetch(next + BLOCK_VECTORS * at + i);
        // To L1 those of this block, where a step takes whole lines of each tile: from four places, products would wait for them.
        UNROLL
        for (int line = 0; line < scale_lines; line++) {
            UNROLL
            for (int64_t i = 0; i < BLOCK_VECTORS; i++)
                _mm_prefetch((const char *)scales[i].first + at + TILED_SCALES_AHEAD_BYTES + 64 * line, _MM_HINT_T0);
        }
        NO_UNROLL
        for (int64_t tile = 0; tile < tiles; tile++) {
            int64_t i = tile % BLOCK_VECTORS;
            const __m512i(*x)[4] = &in.x[0][tile / BLOCK_VECTORS];
            const uint8_t *tile_scales = scales[i].first + at;
            __m512i first[4], second[4], group[TILED_TOKENS];
            __m512 scale[4];
            turn_tile(first, second, codes + tile * WEIGHT_TILE_BYTES, TILED_PREFETCH_BYTES);
            if (words == 4) {
                tiled_tile(group, first, second, x, tokens, kind);
                for (int t = 0; t < tokens && halves; t++)
                    total[i][t] = tile < BLOCK_VECTORS ? group[t] : _mm512_add_epi32(total[i][t], group[t]);
                if (!halves)
                    tiled_add(sum, i, group, load_scale(kind, tile_scales), tile_scales, &in, 0, tokens, kind);
                continue;
            }
            load_group_scales(scale, kind, tile_scales, 4 / words);
            UNROLL
            for (int g = 0; g < 4 / words; g++) {
                tiled_words(group, first, second, x, g * words, (g + 1) * words, tokens, kind);
                tiled_add(sum, i, group, scale[g], tile_scales + g * group_bytes, &in, g, tokens, kind);
            }
        }
        for (int64_t i = 0; i < BLOCK_VECTORS && halves; i++) {
            const uint8_t *tile_scales = scales[i].first + at;
            tiled_add(sum, i, total[i], load_scale(kind, tile_scales), tile_scales, &in, 0, tokens, kind);
        }
    }
    for (int64_t i = 0; i < BLOCK_VECTORS; i++)
        for (int t = 0; t < tokens; t++)
            store_rows(y + t * y_stride, row + i * LANES, row_end,
                       _mm512_mul_ps(sum[t][i], load_last(kind, &scales[i])));
}

typedef void tiled_fn(float *y, int64_t y_stride, const struct matrix *w, const struct activations *act, int64_t tokens,
                      int64_t row_begin, int64_t row_end);
#define TILED_FN(name, kind, group_size)                                                                               \
    static void name(float *y, int64_t y_stride, const struct matrix *w, const struct activations *act,                \
                     int64_t tokens, int64_t row_begin, int64_t row_end)                                               \
    {                                                                                                                  \
        for (int64_t row = row_begin; row < row_end; row += BLOCK_ROWS)                                                \
            if (tokens == 1)                                                                                           \
                tiled_block(y, y_stride, w, act, row, row_end, 1, kind, group_size);                                   \
            else                                                                                                       \
                tiled_block(y, y_stride, w, act, row, row_end, 2, kind, group_size);                                   \
    }
TILED_FN(tiled_int4_128, WEIGHT_INT4, 128)
TILED_FN(tiled_int4_64, WEIGHT_INT4, 64)
TILED_FN(tiled_int4_32, WEIGHT_INT4, 32)
TILED_FN(tiled_int4z_128, WEIGHT_INT4Z, 128)
TILED_FN(tiled_int4z_64, WEIGHT_INT4Z, 64)
TILED_FN(tiled_int4z_32, WEIGHT_INT4Z, 32)
TILED_FN(tiled_nl4_128, WEIGHT_NL4, 128)
TILED_FN(tiled_nl4_64, WEIGHT_NL4, 64)
TILED_FN(tiled_nl4_32, WEIGHT_NL4, 32)
TILED_FN(tiled_mxfp4, WEIGHT_MXFP4, 32)
TILED_FN(tiled_nvfp4, WEIGHT_NVFP4, 16)
#undef TILED_FN

static tiled_fn *tiled_fn_of(const struct weight_shape *shape)
{
    switch (shape->kind) {
    case WEIGHT_INT4:
        return shape->group_size == 128 ? tiled_int4_128 : shape->group_size == 64 ? tiled_int4_64 : tiled_int4_32;
    case WEIGHT_INT4Z:
        return shape->group_size == 128 ? tiled_int4z_128 : shape->group_size == 64 ? tiled_int4z_64 : tiled_int4z_32;
    case WEIGHT_NL4:
        return shape->group_size == 128 ? tiled_nl4_128 : shape->group_size == 64 ? tiled_nl4_64 : tiled_nl4_32;
    case WEIGHT_MXFP4:
        return tiled_mxfp4;
    default:
        return tiled_nvfp4;
    }
}

#endif
