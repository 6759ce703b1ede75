// The monotonic clock, for what is measured and for deadlines; and the time that all of a process's threads have computed.
#ifndef TPSHARD_KERNELS_CLOCK_H
#define TPSHARD_KERNELS_CLOCK_H

#include <stdint.h>
#include <time.h>

static inline int64_t clock_now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static inline double clock_now_s(void) { return 1e-9 * (double)clock_now_ns(); }

static inline double clock_process_cpu_s(void)
{
    struct timespec used;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &used);
    return (double)used.tv_sec + 1e-9 * (double)used.tv_nsec;
}

#endif
