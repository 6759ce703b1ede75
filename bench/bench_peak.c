// Products of bytes, and of bf16 or f32, that the cores of this machine can sum at most, the limit of prefill: bench_peak [threads]. Sums stay in
// registers or tiles and nothing is loaded. One result line for each kind of instruction that this machine has.
#include "bench/bandwidth.h"
#include "bench/peak.h"
#include "kernels/kernels.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { ROUNDS = 5 };

int main(int argc, char **argv)
{
    static const struct {
        const char *table, *instruction;
        bool integers;
    } kinds[] = {{"amx", "amx", true},       {"avx512", "vnni", true},      {"avx2", "avx2", true},
                 {"amx", "amx-bf16", false}, {"avx512bf16", "bf16", false}, {"avx512", "fma-512", false},
                 {"avx2", "fma-256", false}};
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
                double rate = peak_operations_per_second(kinds[k].table, kinds[k].integers, (int)threads);
                best = rate > best ? rate : best;
            }
            if (best > 0)
                printf("peak kind=%s threads=%ld gop_s=%.1f\n", kinds[k].instruction, threads, best * 1e-9);
        }
    return 0;
}
