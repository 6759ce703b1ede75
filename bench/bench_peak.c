// Products of bytes that the cores of this machine can sum at most, the limit of prefill: bench_peak [threads]. Sums stay in registers or
// tiles and nothing is loaded. One result line for each kind of instruction that this machine has.
#include "bench/bandwidth.h"
#include "bench/peak.h"
#include "kernels/kernels.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { ROUNDS = 5, TILE_STEPS = 250000 };

#if defined(__x86_64__) && (__GNUC__ >= 11 || __clang_major__ >= 12) // older ones do not know tiles

__attribute__((target("amx-tile,amx-int8"))) static void tile_sums(void *arg, int thread)
{
    (void)arg, (void)thread;
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } shape = {.palette = 1};
    for (int tile = 0; tile < 8; tile++)
        shape.row_bytes[tile] = 64, shape.rows[tile] = 16;
    _tile_loadconfig(&shape);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
    for (int i = 0; i < TILE_STEPS; i++) {
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
    }
    _tile_release();
}

static double tile_operations_per_second(int threads)
{
    double seconds = bench_parallel(threads, tile_sums, NULL);
    return seconds > 0 ? threads * 2.0 * 16 * 16 * 64 * 4 * TILE_STEPS / seconds : 0;
}

#else

static double tile_operations_per_second(int threads)
{
    (void)threads;
    return 0;
}

#endif

int main(int argc, char **argv)
{
    static const struct {
        const char *table, *instruction;
    } kinds[] = {{"amx", "amx"}, {"avx512", "vnni"}, {"avx2", "avx2"}};
    long threads = argc > 1 ? strtol(argv[1], NULL, 10) : sysconf(_SC_NPROCESSORS_ONLN);
    if (threads < 1 || threads > BANDWIDTH_MAX_THREADS) {
        fprintf(stderr, "bench_peak: threads must be from 1 to %d\n", BANDWIDTH_MAX_THREADS);
        return 2;
    }
    for (int t = 0; kernels_all[t]; t++)
        for (size_t k = 0; k < sizeof kinds / sizeof *kinds; k++) {
            if (strcmp(kernels_all[t]->name, kinds[k].table) != 0 || !kernels_all[t]->supported())
                continue;
            double best = 0;
            for (int round = 0; round < ROUNDS; round++) {
                double rate = strcmp(kinds[k].table, "amx") == 0
                                  ? tile_operations_per_second((int)threads)
                                  : peak_operations_per_second(kinds[k].table, true, (int)threads);
                best = rate > best ? rate : best;
            }
            if (best > 0)
                printf("peak kind=%s threads=%ld gop_s=%.1f\n", kinds[k].instruction, threads, best * 1e-9);
        }
    return 0;
}
