// Matmul of int8 weights with few tokens, for AVX-512; included by avx512_table.h.
//
// As float_few of float_matmul.h does it: a few rows side by side, which stand so far apart that what follows each in memory is read after it.
#ifndef TPSHARD_KERNELS_CPU_AVX512_INT8_H
#define TPSHARD_KERNELS_CPU_AVX512_INT8_H

enum {
    INT8_ROWS = 8,       // for one or two tokens; half of them for more
    INT8_TOKENS = 4,     // at once
    INT8_FEW_TOKENS = 8, // at most, a few at a time from a cache
    INT8_PREFETCH_BYTES = 1536,
};

// Some rows times some tokens.
struct int8_job {
    const int8_t *codes; // of the first row
    int64_t gap_bytes;   // to the next one
    const int8_t *q;     // of the first token
    int64_t q_stride;
};

// dot[t * rows + r] = products of 64 * parts columns from `col` on.
VECTOR_INLINE void int8_dots(i32x16 *dot, const struct int8_job *job, int64_t col, int rows, int tokens, int parts)
{
    __m512i x[INT8_TOKENS][2];
    i32x16 bias[INT8_TOKENS];
    UNROLL
    for (int t = 0; t < tokens; t++) {
        bias[t] = (i32x16){0};
        for (int p = 0; p < parts; p++) {
            x[t][p] = _mm512_loadu_si512(job->q + t * job->q_stride + col + 64 * p);
            bias[t] += (i32x16)minus_bias(128, x[t][p]);
        }
    }
    UNROLL
    for (int r = 0; r < rows; r++) {
        const int8_t *codes = job->codes + r * job->gap_bytes + col;
        UNROLL
        for (int p = 0; p < parts; p++) {
            __m512i v = _mm512_xor_si512(_mm512_loadu_si512(codes + 64 * p), _mm512_set1_epi8((char)0x80));
            prefetch(codes + 64 * p + INT8_PREFETCH_BYTES);
            UNROLL
            for (int t = 0; t < tokens; t++) {
                i32x16 *sum = &dot[t * rows + r];
                *sum = (i32x16)_mm512_dpbusd_epi32((__m512i)(p ? *sum : bias[t]), v, x[t][p]);
            }
        }
    }
}

// 8 rows, one token; two groups at a time.
static void int8_rows_1(float *sum, const struct int8_job *job, const float *scale, int64_t scale_stride, int64_t cols)
{
    (void)scale_stride;
    __m256 total = _mm256_setzero_ps();
    i32x16 dot[2 * INT8_ROWS];
    int64_t col = 0;
    for (; col + 2 * ACT_GROUP <= cols; col += 2 * ACT_GROUP, scale += 2) {
        int8_dots(dot, job, col, INT8_ROWS, 1, 2);
        int8_dots(dot + INT8_ROWS, job, col + ACT_GROUP, INT8_ROWS, 1, 2);
        __m512 x_scale = _mm512_insertf32x8(_mm512_set1_ps(scale[0]), _mm256_set1_ps(scale[1]), 1);
        __m512 term = _mm512_mul_ps(_mm512_cvtepi32_ps(sum_16((const __m512i *)dot)), x_scale);
        total = _mm256_add_ps(total, _mm512_castps512_ps256(term));
        total = _mm256_add_ps(total, _mm512_extractf32x8_ps(term, 1));
    }
    for (; col < cols; col += ACT_GROUP, scale++) {
        if (cols - col >= ACT_GROUP)
            int8_dots(dot, job, col, INT8_ROWS, 1, 2);
        else
            int8_dots(dot, job, col, INT8_ROWS, 1, 1);
        for (int r = INT8_ROWS; r < 2 * INT8_ROWS; r++)
            dot[r] = (i32x16){0};
        __m512 term = _mm512_mul_ps(_mm512_cvtepi32_ps(sum_16((const __m512i *)dot)), _mm512_set1_ps(*scale));
        total = _mm256_add_ps(total, _mm512_castps512_ps256(term));
    }
    _mm256_storeu_ps(sum, total);
}

// 16 / tokens rows, two or four tokens: sum[t * rows + r].
VECTOR_INLINE void int8_rows(float *sum, const struct int8_job *job, const float *scale, int64_t scale_stride,
                             int64_t cols, int tokens)
{
    const int rows = LANES / tokens;
    __m512 total = _mm512_setzero_ps();
    for (int64_t col = 0; col < cols; col += ACT_GROUP, scale++) {
        i32x16 dot[LANES];
        if (cols - col >= ACT_GROUP)
            int8_dots(dot, job, col, rows, tokens, 2);
        else
            int8_dots(dot, job, col, rows, tokens, 1);
        __m512 x_scale = _mm512_set1_ps(scale[0]);
        UNROLL
        for (int t = 1; t < tokens; t++)
            x_scale =
                _mm512_mask_mov_ps(x_scale, (__mmask16)(0xffff << t * rows), _mm512_set1_ps(scale[t * scale_stride]));
        __m512 term = _mm512_mul_ps(_mm512_cvtepi32_ps(sum_16((const __m512i *)dot)), x_scale);
        total = _mm512_add_ps(total, term);
    }
    _mm512_storeu_ps(sum, total);
}

static void int8_rows_2(float *sum, const struct int8_job *job, const float *scale, int64_t scale_stride, int64_t cols)
{
    int8_rows(sum, job, scale, scale_stride, cols, 2);
}

static void int8_rows_4(float *sum, const struct int8_job *job, const float *scale, int64_t scale_stride, int64_t cols)
{
    int8_rows(sum, job, scale, scale_stride, cols, 4);
}

static void int8_few(float *y, int64_t y_stride, const struct matrix *w, const struct activations *act, int64_t tokens,
                     int64_t row_begin, int64_t row_end)
{
    int64_t cols = (int64_t)w->shape.cols_padded;
    int64_t gap = (int64_t)div_up((uint64_t)(row_end - row_begin), WEIGHT_ROW_UNIT) * (WEIGHT_ROW_UNIT / INT8_ROWS);
    const float *scales = w->scale;
    for (int64_t first = row_begin; first < row_begin + gap; first++)
        for (int64_t t = 0, count; t < tokens; t += count) {
            int64_t left = tokens - t;
            count = left >= 4 ? 4 : left >= 2 ? 2 : 1;
            int64_t rows = count == 4 ? INT8_ROWS / 2 : INT8_ROWS;
            for (int64_t row = first; row < row_end && row < first + INT8_ROWS * gap; row += rows * gap) {
                struct int8_job job = {(const int8_t *)w->data + row * cols, gap * cols, act->q + t * act->stride,
                                       act->stride};
                const int64_t scale_stride = act->stride / ACT_GROUP;
                float sum[LANES];
                const float *q_scale = act->q_scale + t * scale_stride;
                if (count == 4)
                    int8_rows_4(sum, &job, q_scale, scale_stride, cols);
                else if (count == 2)
                    int8_rows_2(sum, &job, q_scale, scale_stride, cols);
                else
                    int8_rows_1(sum, &job, q_scale, scale_stride, cols);
                for (int64_t r = 0; r < rows && row + r * gap < row_end; r++)
                    for (int64_t i = 0; i < count; i++)
                        y[(t + i) * y_stride + row + r * gap] = sum[i * rows + r] * scales[row + r * gap];
            }
        }
}

#endif
