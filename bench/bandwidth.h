// The denominator of every memory-bound figure: bytes per second that `threads` threads can read from a block that no cache
// holds, in four sequential streams each or in one, whichever is faster (on Intel Xeon one stream reads a fifth to a half
// less than four). A stream is BANDWIDTH_APART shorter than its share of the block, so that streams of a block of 2^n bytes do not
// begin a power of two apart, which puts them into the same sets and banks: an AMD EPYC then reads 13 GB/s instead of 32.
//
// Several threads are timed by the clock on the wall from a common start: where a shared machine lets one of them wait, the
// others read with more than their share meanwhile, and the time that each was on a processor makes a rate that all of them
// together never have. Callers take medians of many rounds, as single ones are far off in both directions (an AMD EPYC gave two
// processors 36 GB/s most of the time and 62 for moments).
#ifndef TPSHARD_BENCH_BANDWIDTH_H
#define TPSHARD_BENCH_BANDWIDTH_H

#include "kernels/clock.h"

#include <assert.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <time.h>

enum { BANDWIDTH_STREAMS = 4, BANDWIDTH_MAX_THREADS = 64, BANDWIDTH_APART = 83 * 4096 + 17 * 64 };

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
    atomic_int *to_come; // threads that are not at the start yet; below zero: one of them never comes
    double begin, end;
    pthread_t handle;
};

static void *bench_thread_main(void *arg)
{
    struct bench_thread *self = arg;
    atomic_fetch_sub(self->to_come, 1);
    while (atomic_load(self->to_come) > 0)
        sched_yield();
    self->begin = clock_now_s();
    if (atomic_load(self->to_come) == 0)
        self->fn(self->arg, self->thread);
    self->end = clock_now_s();
    return NULL;
}

// Runs fn(arg, thread) on `threads` threads; returns the seconds from the first one's begin, when all of them are there, to the
// last one's end; 0 when a thread could not be started.
static double bench_parallel(int threads, void (*fn)(void *arg, int thread), void *arg)
{
    struct bench_thread t[BANDWIDTH_MAX_THREADS];
    atomic_int to_come = threads;
    int started = 0;
    for (; started < threads; started++) {
        t[started] = (struct bench_thread){.fn = fn, .arg = arg, .thread = started, .to_come = &to_come};
        if (pthread_create(&t[started].handle, NULL, bench_thread_main, &t[started])) {
            atomic_store(&to_come, -BANDWIDTH_MAX_THREADS - 1);
            break;
        }
    }
    double begin = 0, end = 0;
    for (int i = 0; i < started; i++) {
        pthread_join(t[i].handle, NULL);
        begin = i == 0 || t[i].begin < begin ? t[i].begin : begin;
        end = i == 0 || t[i].end > end ? t[i].end : end;
    }
    return started == threads ? end - begin : 0;
}

typedef uint64_t bandwidth_u64x2 __attribute__((vector_size(16)));

struct bandwidth_job {
    const uint8_t *data;
    uint64_t bytes;
    int threads;
    volatile uint64_t sink[BANDWIDTH_MAX_THREADS];
};

// Of each of BANDWIDTH_STREAMS of a thread: a multiple of 64.
static inline uint64_t bandwidth_stream_bytes(const struct bandwidth_job *job)
{
    uint64_t share = job->bytes / (uint64_t)(job->threads * BANDWIDTH_STREAMS) / 64 * 64;
    assert(share > BANDWIDTH_APART);
    return share - BANDWIDTH_APART;
}

static inline bandwidth_u64x2 bandwidth_line(const uint8_t *at)
{
    const bandwidth_u64x2 *line = (const bandwidth_u64x2 *)(const void *)at;
    return line[0] ^ line[1] ^ line[2] ^ line[3];
}

static void bandwidth_read_four(void *arg, int thread)
{
    struct bandwidth_job *job = arg;
    uint64_t stream_bytes = bandwidth_stream_bytes(job);
    const uint8_t *base = job->data + (uint64_t)thread * BANDWIDTH_STREAMS * stream_bytes;
    bandwidth_u64x2 sum[BANDWIDTH_STREAMS] = {0};
    for (uint64_t i = 0; i < stream_bytes; i += 64)
        for (int s = 0; s < BANDWIDTH_STREAMS; s++)
            sum[s] ^= bandwidth_line(base + (uint64_t)s * stream_bytes + i);
    bandwidth_u64x2 all = sum[0] ^ sum[1] ^ sum[2] ^ sum[3];
    job->sink[thread] = all[0] ^ all[1];
}

static void bandwidth_read_one(void *arg, int thread)
{
    struct bandwidth_job *job = arg;
    uint64_t stream_bytes = bandwidth_stream_bytes(job) * BANDWIDTH_STREAMS;
    const uint8_t *base = job->data + (uint64_t)thread * stream_bytes;
    bandwidth_u64x2 sum[BANDWIDTH_STREAMS] = {0};
    for (uint64_t i = 0; i < stream_bytes; i += 64 * BANDWIDTH_STREAMS)
        for (int s = 0; s < BANDWIDTH_STREAMS; s++)
            sum[s] ^= bandwidth_line(base + i + 64 * (uint64_t)s);
    bandwidth_u64x2 all = sum[0] ^ sum[1] ^ sum[2] ^ sum[3];
    job->sink[thread] = all[0] ^ all[1];
}

static inline double bandwidth_of(const void *data, uint64_t bytes, int threads, int streams)
{
    struct bandwidth_job job = {.data = data, .bytes = bytes, .threads = threads};
    double seconds = bench_parallel(threads, streams == 1 ? bandwidth_read_one : bandwidth_read_four, &job);
    double read = (double)(bandwidth_stream_bytes(&job) * (uint64_t)(threads * BANDWIDTH_STREAMS));
    return seconds > 0 ? read / seconds : 0;
}

// data is aligned to 64 bytes; bytes: some hundred MiB, and more than BANDWIDTH_APART for each stream of each thread.
static inline double bandwidth_bytes_per_second(const void *data, uint64_t bytes, int threads)
{
    double four = bandwidth_of(data, bytes, threads, BANDWIDTH_STREAMS), one = bandwidth_of(data, bytes, threads, 1);
    return one > four ? one : four;
}

#endif
