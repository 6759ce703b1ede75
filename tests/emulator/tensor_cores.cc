// The tensor cores' products of a warp; declared in block.h. Here and not beside the others in kernels/cuda/primitives.cuh, as most of what the emulator
// does is done here: the columns of a result are summed side by side, each in the order of k.
#include "formats/number_formats.h"
#include "tests/emulator/block.h"

#include <string.h>

namespace emulator
{

namespace
{

enum { ROWS = 16, COLS = 8, WARP = 32, ROW_BYTES = 32 };

// Rows of A, ROW_BYTES each whatever their type, from the lanes' words.
void gather_rows(void *rows, const lanes &all)
{
    for (int l = 0; l < WARP; l++) {
        const fragments *f = static_cast<const fragments *>(all.in[l]);
        for (int i = 0; i < 4; i++)
            memcpy((char *)rows + ((l >> 2) + 8 * (i & 1)) * ROW_BYTES + 4 * (l & 3) + 16 * (i >> 1), &f->a[i],
                   sizeof f->a[i]);
    }
}

template <float (*WIDEN)(uint16_t)> void multiply(lanes &all)
{
    enum { K = 16 };
    uint16_t a16[ROWS * K], b16[K * COLS];
    float a[ROWS * K], b[K * COLS];
    gather_rows(a16, all);
    for (int l = 0; l < WARP; l++) {
        const fragments *f = static_cast<const fragments *>(all.in[l]);
        int g = l >> 2, t = l & 3;
        for (int i = 0; i < 4; i++)
            b16[(2 * t + 8 * (i >> 1) + (i & 1)) * COLS + g] = (uint16_t)(f->b[i >> 1] >> 16 * (i & 1));
    }
    for (int i = 0; i < ROWS * K; i++)
        a[i] = WIDEN(a16[i]);
    for (int i = 0; i < K * COLS; i++)
        b[i] = WIDEN(b16[i]);
    float sum[ROWS * COLS] = {};
    for (int row = 0; row < ROWS; row++)
        for (int k = 0; k < K; k++)
            for (int column = 0; column < COLS; column++)
                sum[row * COLS + column] += a[row * K + k] * b[k * COLS + column];
    for (int l = 0; l < WARP; l++) {
        float *c = static_cast<float *>(all.out[l]);
        for (int i = 0; i < 4; i++)
            c[i] += sum[((l >> 2) + 8 * (i >> 1)) * COLS + 2 * (l & 3) + (i & 1)];
    }
}

} // namespace

void multiply_f16(lanes &all) { multiply<f16_to_f32>(all); }
void multiply_bf16(lanes &all) { multiply<bf16_to_f32>(all); }

void multiply_int8(lanes &all)
{
    enum { K = 32 };
    int8_t a8[ROWS * K], b8[COLS * K];
    int16_t a[ROWS * K], b[COLS * K];
    gather_rows(a8, all);
    for (int l = 0; l < WARP; l++) {
        const fragments *f = static_cast<const fragments *>(all.in[l]);
        int g = l >> 2, t = l & 3;
        for (int i = 0; i < 2; i++)
            memcpy(&b8[g * K + 4 * t + 16 * i], &f->b[i], sizeof f->b[i]);
    }
    for (int i = 0; i < ROWS * K; i++)
        a[i] = a8[i];
    for (int i = 0; i < COLS * K; i++)
        b[i] = b8[i];
    for (int l = 0; l < WARP; l++) {
        int *c = static_cast<int *>(all.out[l]);
        for (int i = 0; i < 4; i++) {
            const int16_t *row = &a[((l >> 2) + 8 * (i >> 1)) * K], *column = &b[(2 * (l & 3) + (i & 1)) * K];
            int sum = 0;
            for (int k = 0; k < K; k++)
                sum += row[k] * column[k];
            c[i] = (int)((uint32_t)c[i] + (uint32_t)sum);
        }
    }
}

} // namespace emulator
