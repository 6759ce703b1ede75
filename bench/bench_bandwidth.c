// Read bandwidth of this machine, the limit of decode: bench_bandwidth [threads]. One result line.
#include "bench/bandwidth.h"
#include "bench/median.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { ROUNDS = 15 };                           // about a second in all
static const uint64_t block_bytes = 1ull << 30; // beyond any cache

int main(int argc, char **argv)
{
    long threads = argc > 1 ? strtol(argv[1], NULL, 10) : sysconf(_SC_NPROCESSORS_ONLN);
    if (threads < 1 || threads > BANDWIDTH_MAX_THREADS) {
        fprintf(stderr, "bench_bandwidth: threads must be from 1 to %d\n", BANDWIDTH_MAX_THREADS);
        return 2;
    }
    void *block = mmap(NULL, block_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (block == MAP_FAILED) {
        fprintf(stderr, "bench_bandwidth: no memory for 1 GiB\n");
        return 8;
    }
    madvise(block, block_bytes, MADV_HUGEPAGE); // the limit is the memory's, not that of its pages
    memset(block, 1, block_bytes);
    double four[ROUNDS], one[ROUNDS];
    for (int round = 0; round < ROUNDS; round++) {
        four[round] = bandwidth_of(block, block_bytes, (int)threads, BANDWIDTH_STREAMS);
        one[round] = bandwidth_of(block, block_bytes, (int)threads, 1);
    }
    double of_four = bench_median(four, ROUNDS), of_one = bench_median(one, ROUNDS);
    printf("bandwidth threads=%ld one_stream=%.2f four_streams=%.2f gb_s=%.2f\n", threads, of_one * 1e-9,
           of_four * 1e-9, (of_one > of_four ? of_one : of_four) * 1e-9);
    return 0;
}
