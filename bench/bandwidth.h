// The denominator of every memory-bound figure: bytes per second that `threads` threads can read from a block that no cache
// holds, four sequential streams each (one stream reads a fifth to a half less).
//
// Time is what the slowest thread itself was on a processor, not the clock on the wall: on a shared machine the rest belongs
// to others.
#ifndef TPSHARD_BENCH_BANDWIDTH_H
#define TPSHARD_BENCH_BANDWIDTH_H

#include <pthread.h>
#include <stdint.h>
#include <time.h>

enum { BANDWIDTH_STREAMS = 4, BANDWIDTH_MAX_THREADS = 64 };

static inline double bench_thread_seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

struct bench_thread {
    void (*fn)(void *arg, int thread);
    void *arg;
    int thread;
    double seconds;
    pthread_t handle;
};

static void *bench_thread_main(void *arg)
{
    struct bench_thread *self = arg;
    double begin = bench_thread_seconds();
    self->fn(self->arg, self->thread);
    self->seconds = bench_thread_seconds() - begin;
    return NULL;
}

// Runs fn(arg, thread) on `threads` threads; returns the seconds of the slowest, 0 when no thread could be started.
static double bench_parallel(int threads, void (*fn)(void *arg, int thread), void *arg)
{
    struct bench_thread t[BANDWIDTH_MAX_THREADS];
    int started = 0;
    for (; started < threads; started++) {
        t[started] = (struct bench_thread){.fn = fn, .arg = arg, .thread = started};
        if (pthread_create(&t[started].handle, NULL, bench_thread_main, &t[started]))
            break;
    }
    double slowest = 0;
    for (int i = 0; i < started; i++) {
        pthread_join(t[i].handle, NULL);
        slowest = t[i].seconds > slowest ? t[i].seconds : slowest;
    }
    return started == threads ? slowest : 0;
}

struct bandwidth_job {
    const uint8_t *data;
    uint64_t bytes;
    int threads;
    volatile uint64_t sink[BANDWIDTH_MAX_THREADS];
};

static void bandwidth_read(void *arg, int thread)
{
    typedef uint64_t u64x2 __attribute__((vector_size(16)));
    struct bandwidth_job *job = arg;
    uint64_t stream_bytes = job->bytes / (uint64_t)(job->threads * BANDWIDTH_STREAMS) / 64 * 64;
    const uint8_t *base = job->data + (uint64_t)thread * BANDWIDTH_STREAMS * stream_bytes;
    u64x2 sum[BANDWIDTH_STREAMS] = {0};
    for (uint64_t i = 0; i < stream_bytes; i += 64)
        for (int s = 0; s < BANDWIDTH_STREAMS; s++) {
            const u64x2 *line = (const u64x2 *)(const void *)(base + (uint64_t)s * stream_bytes + i);
            sum[s] ^= line[0] ^ line[1] ^ line[2] ^ line[3];
        }
    u64x2 all = sum[0] ^ sum[1] ^ sum[2] ^ sum[3];
    job->sink[thread] = all[0] ^ all[1];
}

// data is aligned to 64 bytes.
static inline double bandwidth_bytes_per_second(const void *data, uint64_t bytes, int threads)
{
    struct bandwidth_job job = {.data = data, .bytes = bytes, .threads = threads};
    double seconds = bench_parallel(threads, bandwidth_read, &job);
    return seconds > 0 ? (double)bytes / seconds : 0;
}

#endif
