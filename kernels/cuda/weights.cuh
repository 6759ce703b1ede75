// Single weights of any kind with groups, on the device: what a code is worth. The formulas and layouts: formats/weight.h; the same bits as
// dequantize_row of kernels.h.
#ifndef TPSHARD_KERNELS_CUDA_WEIGHTS_CUH
#define TPSHARD_KERNELS_CUDA_WEIGHTS_CUH

#include "formats/number_formats.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/primitives.cuh"

namespace
{

// A weight is (code - zero) * scale * last; last: of the whole row.
struct weight_group {
    float scale, zero, last;
};

// kind: the matrix's, a constant where the caller knows it.
__device__ __forceinline__ struct weight_group group_at(enum weight_kind kind, const struct matrix &w, int64_t row,
                                                        int64_t col)
{
    const unsigned char *scales = (const unsigned char *)w.scale;
    uint32_t in_row = (uint32_t)col / w.shape.group_size; // columns count in 31 bits
    int64_t groups = (uint32_t)w.shape.cols_padded / w.shape.group_size, lane = row % 16;
    int64_t group = row / 16 * groups + in_row;
    struct weight_group g = {0, 0, 1};
    if (kind == WEIGHT_FP8G) {
        g.scale = ((const float *)(const void *)scales)[group * 16 + lane];
    } else if (kind == WEIGHT_MXFP4) {
        g.scale = e8m0_to_f32(scales[group * 16 + lane]);
    } else if (kind == WEIGHT_NVFP4) { // behind the scales of 64 rows their factors
        const unsigned char *block = scales + row / 64 * (64 * groups + 64 * (int64_t)sizeof(float));
        g.scale = e4m3_to_f32(block[(row / 16 % 4 * groups + in_row) * 16 + lane]);
        g.last = ((const float *)(const void *)(block + 64 * groups))[row % 64];
    } else {
        bool zeros = kind == WEIGHT_INT4Z;
        const uint16_t *at = (const uint16_t *)(const void *)scales + group * (zeros ? 32 : 16) + lane;
        g.scale = kind == WEIGHT_NL4 ? weight_nl4_scale(at[0]) : weight_int4_scale(at[0]);
        g.zero = zeros ? f16_to_f32(at[16]) : 0.0f;
    }
    return g;
}

// code: e4m3 (fp8g), or four bits in the lowest ones.
__device__ __forceinline__ float weight_value(enum weight_kind kind, struct weight_group g, uint32_t code)
{
    float value = kind == WEIGHT_FP8G                            ? e4m3_to_f32((uint8_t)code)
                  : kind == WEIGHT_MXFP4 || kind == WEIGHT_NVFP4 ? e2m1_to_f32((uint8_t)code)
                  : kind == WEIGHT_NL4                           ? (float)weight_nl4_level((uint8_t)code)
                                                                 : (float)int4_sign_extend((uint8_t)code) - g.zero;
    return value * g.scale * g.last;
}

} // namespace

#endif
