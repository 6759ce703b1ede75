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
#if __GNUC__ >= 10 || __clang_major__ >= 9 // older ones do not know it
#define PEAK_BF16_512(sum, a, b) _mm512_dpbf16_ps(sum, (__m512bh)(a), (__m512bh)(b))
PEAK_FN(peak_bf16_512, "avx512f,avx512bf16", __m512, _mm512_setzero_ps(), PEAK_BF16_512)
#else
static void peak_bf16_512(void *arg, int thread) { (void)arg, (void)thread; }
#endif

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

// Of the table with this name (0: unknown), for weights that are multiplied as integers or as floats.
static inline double peak_operations_per_second(const char *table, bool integers, int threads)
{
    static const struct {
        const char *table;
        bool integers;
        double products; // of a step
        int64_t steps;
        void (*run)(void *arg, int thread);
    } peaks[] = {
        {"amx", true, 16 * 16 * 64 * 4, PEAK_TILE_STEPS, peak_tiles_int8},
        {"amx", false, 16 * 16 * 32 * 4, PEAK_TILE_STEPS, peak_tiles_bf16},
        {"avx512bf16", true, 64 * PEAK_CHAINS, PEAK_STEPS, peak_vnni_512},
        {"avx512bf16", false, 32 * PEAK_CHAINS, PEAK_STEPS, peak_bf16_512},
        {"avx512vbmi", true, 64 * PEAK_CHAINS, PEAK_STEPS, peak_vnni_512},
        {"avx512vbmi", false, 16 * PEAK_CHAINS, PEAK_STEPS, peak_fma_512},
        {"avx512", true, 64 * PEAK_CHAINS, PEAK_STEPS, peak_vnni_512},
        {"avx512", false, 16 * PEAK_CHAINS, PEAK_STEPS, peak_fma_512},
        {"avx2", true, 32 * PEAK_CHAINS, PEAK_STEPS, peak_madd_256},
        {"avx2", false, 8 * PEAK_CHAINS, PEAK_STEPS, peak_fma_256},
    };
    for (size_t i = 0; i < sizeof peaks / sizeof *peaks; i++)
        if (strcmp(peaks[i].table, table) == 0 && peaks[i].integers == integers) {
            double seconds = bench_parallel(threads, peaks[i].run, NULL);
            return seconds > 0 ? threads * 2 * peaks[i].products * (double)peaks[i].steps / seconds : 0;
        }
    return 0;
}

#else

static inline double peak_operations_per_second(const char *table, bool integers, int threads)
{
    (void)table, (void)integers, (void)threads;
    return 0;
}

#endif
#endif
