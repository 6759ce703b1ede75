// Matmul of bf16, fp8 and fp8g weights with AVX512_BF16 and AVX512_VBMI (avx512_bf16.h), whose activations are rounded to bf16 (bf16_rows.h). All
// else is that of AVX-512 with VBMI.
#include "kernels/attention.h"
#include "kernels/cpu/avx512_help.h"
#include "kernels/kernels_internal.h"

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__) || defined(BF16_DOT)

// An emulation runs where VBMI may not be.
#ifdef BF16_DOT
#define OTHERS kernels_avx512
#else
#define OTHERS kernels_avx512vbmi
#endif
#include "kernels/cpu/avx512_bf16.h"

static bool supported(void) { return kernels_supported_avx512bf16(); }

static void prepare(struct activations *act, const struct matrix *w, const float *x, int64_t x_stride,
                    int64_t token_begin, int64_t token_end)
{
    round_or_prepare(act, w, x, x_stride, token_begin, token_end, true);
}

static void matmul(float *y, int64_t y_stride, const struct matrix *w, const struct activations *act, int64_t tokens,
                   int64_t row_begin, int64_t row_end)
{
    if (vector_ops_matmul(y, y_stride, w, act, tokens, row_begin, row_end))
        return;
    (is_float_product(w->shape.kind) ? bf16_matmul : OTHERS.matmul)(y, y_stride, w, act, tokens, row_begin, row_end);
}

#else // the compiler does not know these instructions
#include "kernels/cpu/kernels_absent.h"
#endif

const struct kernels kernels_avx512bf16 = {
    .name = "avx512bf16",
    .sums = "avx512bf16",
    .supported = supported,
    .prepare = prepare,
    .matmul = matmul,
    .attention = attention_avx512,
    VECTOR_OPS_OTHER_ENTRIES,
};
