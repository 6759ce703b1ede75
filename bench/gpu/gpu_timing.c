// See gpu_timing.h.
#include "bench/gpu/gpu_timing.h"

#include "bench/median.h"

#include <stdio.h>
#include <stdlib.h>

enum { MAX_RUNS = 16, RUNS = 11, WARM_UPS = 3, BLOCK_BYTES = 8 << 20 };

void gpu_check(cudaError_t status, const char *what)
{
    if (status == cudaSuccess)
        return;
    fflush(stdout);
    fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
    exit(6);
}

void gpu_open(struct gpu *gpu, bool quick)
{
    struct cudaDeviceProp properties;
    *gpu = (struct gpu){.runs = quick ? 1 : RUNS, .warm_ups = quick ? 0 : WARM_UPS};
    gpu_check(cudaGetDeviceProperties(&properties, 0), "device");
    gpu_check(cudaStreamCreateWithFlags(&gpu->stream, cudaStreamNonBlocking), "stream");
    gpu->sm = 10 * properties.major + properties.minor;
    snprintf(gpu->name, sizeof gpu->name, "%.63s", properties.name);
    for (char *c = gpu->name; *c; c++)
        if (*c == ' ')
            *c = '-';
}

void *gpu_take(uint64_t bytes)
{
    void *p;
    gpu_check(cudaMalloc(&p, bytes ? bytes : 1), "memory");
    return p;
}

void gpu_fill_random(void *to, uint64_t bytes, uint8_t mask)
{
    static uint8_t *block;
    uint64_t state = 1;
    if (!block && !(block = malloc(BLOCK_BYTES)))
        exit(8);
    for (int i = 0; i < BLOCK_BYTES; i++)
        block[i] = (uint8_t)((state = state * 6364136223846793005u + 1442695040888963407u) >> 56) & mask;
    for (uint64_t at = 0; at < bytes; at += BLOCK_BYTES)
        gpu_check(cudaMemcpy((uint8_t *)to + at, block, bytes - at < BLOCK_BYTES ? bytes - at : BLOCK_BYTES,
                             cudaMemcpyHostToDevice),
                  "filling");
}

double gpu_time_us(const struct gpu *gpu, gpu_work_fn *work, void *arg, int repeats)
{
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    cudaEvent_t begin, end;
    double us[MAX_RUNS];
    // Kernels are loaded and libraries set up before a graph is recorded.
    work(arg, 0);
    gpu_check(cudaStreamSynchronize(gpu->stream), "running");
    gpu_check(cudaStreamBeginCapture(gpu->stream, cudaStreamCaptureModeThreadLocal), "capture");
    for (int i = 0; i < repeats; i++)
        work(arg, i);
    gpu_check(cudaStreamEndCapture(gpu->stream, &graph), "capture");
    gpu_check(cudaGraphInstantiate(&exec, graph, 0), "graph");
    gpu_check(cudaEventCreateWithFlags(&begin, cudaEventDefault), "event");
    gpu_check(cudaEventCreateWithFlags(&end, cudaEventDefault), "event");
    for (int i = -gpu->warm_ups; i < gpu->runs; i++) {
        float ms;
        gpu_check(cudaEventRecord(begin, gpu->stream), "event");
        gpu_check(cudaGraphLaunch(exec, gpu->stream), "graph");
        gpu_check(cudaEventRecord(end, gpu->stream), "event");
        gpu_check(cudaEventSynchronize(end), "running");
        gpu_check(cudaEventElapsedTime(&ms, begin, end), "event");
        if (i >= 0)
            us[i] = 1000.0 * ms / repeats;
    }
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
    return bench_median(us, (size_t)gpu->runs);
}

struct copy_work {
    const struct gpu *gpu;
    void *from, *to;
    uint64_t bytes;
};

static void copy(void *arg, int repeat)
{
    const struct copy_work *w = arg;
    (void)repeat;
    gpu_check(cudaMemcpyAsync(w->to, w->from, w->bytes, cudaMemcpyDeviceToDevice, w->gpu->stream), "copy");
}

void gpu_measure_copy(struct gpu *gpu, uint64_t bytes)
{
    struct copy_work w = {gpu, gpu_take(bytes), gpu_take(bytes), bytes};
    gpu_fill_random(w.from, bytes, 0xff);
    double us = gpu_time_us(gpu, copy, &w, 4);
    gpu->copy_gb_s = 2e-3 * (double)bytes / us;
    printf("gpu_copy bytes=%llu us=%.1f gb_s=%.0f gpu=%s\n", (unsigned long long)bytes, us, gpu->copy_gb_s, gpu->name);
    cudaFree(w.from);
    cudaFree(w.to);
}
