// What the benchmarks of one device share: the device, memory on it, random bytes, the time of launches, and the rate at which it copies its own
// memory, to which others are held. What goes wrong ends the program with status 6.
#ifndef TPSHARD_BENCH_GPU_GPU_TIMING_H
#define TPSHARD_BENCH_GPU_GPU_TIMING_H

#include <cuda_runtime_api.h>
#include <stdbool.h>
#include <stdint.h>

struct gpu {
    cudaStream_t stream;
    char name[64]; // without blanks
    int sm;
    int runs, warm_ups; // of a measurement
    double copy_gb_s;   // gpu_measure_copy's; bytes read and written
};

// Device 0. quick: few runs, for sanitizers and the emulator.
void gpu_open(struct gpu *gpu, bool quick);
void gpu_check(cudaError_t status, const char *what);
void *gpu_take(uint64_t bytes); // cudaFree gives it back
// Random bytes; `mask` keeps f16 and e4m3 values small and finite.
void gpu_fill_random(void *to, uint64_t bytes, uint8_t mask);

typedef void gpu_work_fn(void *arg, int repeat);
// Microseconds of one call of work on gpu->stream: the median of gpu->runs runs of a graph of `repeats` calls.
double gpu_time_us(const struct gpu *gpu, gpu_work_fn *work, void *arg, int repeats);
// Prints a line and sets copy_gb_s.
void gpu_measure_copy(struct gpu *gpu, uint64_t bytes);

#endif
