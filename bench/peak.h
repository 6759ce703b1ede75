// The denominator of figures that arithmetic bounds: operations per second (a product and its addition are two) of `threads` threads that do
// nothing but multiply and add in registers. Processor time, as in bandwidth.h.
#ifndef TPSHARD_BENCH_PEAK_H
#define TPSHARD_BENCH_PEAK_H

#include "bench/bandwidth.h"
#include "kernels/vectors.h"

#include <stdbool.h>
#include <string.h>

enum { PEAK_STEPS = 400000, PEAK_TILE_STEPS = 250000, PEAK_CHAINS = 12 }; // chains: enough to hide any latency

#ifdef __x86_64__

#include "kernels/cpu/amx_tiles.h"

#include <immintrin.h>

// Lives through the optimizer: it may not know what stands in v.
#define PEAK_KEEP(v) __asm__ volatile("" : "+x"(v))

#define PEAK_FN(name, isa, vector, zero, step)                                                                         \
    __attribute__((target(isa))) static void name(void *arg, int thread)                                               \
    {                                                                                                                  \
        (void)arg, (void)thread;                                                                                       \
        vector sum[PEAK_CHAINS], a = zero, b = zero;                                                                   \
        PEAK_KEEP(a);                                                                                                  \
        PEAK_KEEP(b);                                                                                                  \
        UNROLL                                                                                                         \
        for (int c = 0; c < PEAK_CHAINS; c++)                                                                          \
            sum[c] = zero;                                                                                             \
        for (int i = 0; i < PEAK_STEPS; i++) {                                                                         \
            UNROLL                                                                                                     \
            for (int c = 0; c < PEAK_CHAINS; c++) {                                                                    \
                sum[c] = step(sum[c], a, b);                                                                           \
                PEAK_KEEP(a);                                                                                          \
                PEAK_KEEP(sum[c]);                                                                                     \
            }                                                                                                          \
        }                                                                                                              \
    }
#define PEAK_FMA_256(sum, a, b) _mm256_fmadd_ps(a, b, sum)
#define PEAK_FMA_512(sum, a, b) _mm512_fmadd_ps(a, b, sum)
#define PEAK_MADD_256(sum, a, b) _mm256_add_epi16(sum, _mm256_maddubs_epi16(a, b))
#define PEAK_VNNI_512(sum, a, b) _mm512_dpbusd_epi32(sum, a, b)
PEAK_FN(peak_fma_256, "avx2,fma", __m256, _mm256_setzero_ps(), PEAK_FMA_256)
PEAK_FN(peak_fma_512, "avx512f", __m512, _mm512_setzero_ps(), PEAK_FMA_512)
PEAK_FN(peak_madd_256, "avx2", __m256i, _mm256_setzero_si256(), PEAK_MADD_256)
PEAK_FN(peak_vnni_512, "avx512f,avx512vnni", __m512i, _mm512_setzero_si512(), PEAK_VNNI_512)

#if __GNUC__ >= 11 || __clang_major__ >= 12 // older ones do not know tiles
#define PEAK_TILES_FN(name, isa, dot)                                                                                  \
    __attribute__((target(isa))) static void name(void *arg, int thread)                                               \
    {                                                                                                                  \
        static const struct tile_config config = {                                                                     \
            .palette = 1, .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64}, .rows = {16, 16, 16, 16, 16, 16, 16, 16}};    \
        (void)arg, (void)thread;                                                                                       \
        TILES_CONFIGURE(&config);                                                                                      \
        TILE_ZERO(0);                                                                                                  \
        TILE_ZERO(1);                                                                                                  \
        TILE_ZERO(2);                                                                                                  \
        TILE_ZERO(3);                                                                                                  \
        TILE_ZERO(4);                                                                                                  \
        TILE_ZERO(5);                                                                                                  \
        TILE_ZERO(6);                                                                                                  \
        TILE_ZERO(7);                                                                                                  \
        for (int i = 0; i < PEAK_TILE_STEPS; i++) {                                                                    \
            dot(0, 4, 6);                                                                                              \
            dot(1, 4, 7);                                                                                              \
            dot(2, 5, 6);                                                                                              \
            dot(3, 5, 7);                                                                                              \
        }                                                                                                              \
        TILES_RELEASE();                                                                                               \
    }
PEAK_TILES_FN(peak_tiles_int8, "amx-tile,amx-int8", TILE_DOT_INT8)
PEAK_TILES_FN(peak_tiles_bf16, "amx-tile,amx-bf16", TILE_DOT_BF16)
#else
static void peak_tiles_int8(void *arg, int thread) { (void)arg, (void)thread; }
static void peak_tiles_bf16(void *arg, int thread) { (void)arg, (void)thread; }
#endif

// Of the table with this name (0: unknown), for weights that are multiplied as integers or as floats. Tiles of bf16 count as what they are, two
// of which make the product of a float (kernels/cpu/amx_bf16.h).
static inline double peak_operations_per_second(const char *table, bool integers, int threads)
{
    bool tiles = strcmp(table, "amx") == 0, wide = strcmp(table, "avx2") != 0;
    if (!tiles && wide && strcmp(table, "avx512") != 0)
        return 0;
    double products = (integers ? 32 : 8) * (wide ? 2.0 : 1.0) * PEAK_CHAINS * PEAK_STEPS; // a byte or a float each
    double seconds;
    if (tiles) {
        products = 16.0 * 16 * (integers ? 64 : 32) * 4 * PEAK_TILE_STEPS;
        seconds = bench_parallel(threads, integers ? peak_tiles_int8 : peak_tiles_bf16, NULL);
    } else if (wide) {
        seconds = bench_parallel(threads, integers ? peak_vnni_512 : peak_fma_512, NULL);
    } else {
        seconds = bench_parallel(threads, integers ? peak_madd_256 : peak_fma_256, NULL);
    }
    return seconds > 0 ? threads * 2 * products / seconds : 0;
}

#else

static inline double peak_operations_per_second(const char *table, bool integers, int threads)
{
    (void)table, (void)integers, (void)threads;
    return 0;
}

#endif
#endif
