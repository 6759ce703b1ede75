// For tests that make claims on time: how much longer things take in slow builds, and how much of a time was spent waiting for a processor that
// others had. A lower bound is on the time as it was; an upper one on what is left without such waits, so that a loaded machine fails nothing.
#ifndef TPSHARD_TESTS_PATIENCE_H
#define TPSHARD_TESTS_PATIENCE_H

#include "kernels/clock.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <unistd.h>

// Of deadlines and of what tests allow for them: sanitized builds let a thread wait for tenths of a second.
#if defined __has_feature
#if __has_feature(thread_sanitizer) || __has_feature(address_sanitizer)
#define PATIENCE 4
#endif
#endif
#ifndef PATIENCE
#define PATIENCE 1
#endif

enum { LAG_SLEEP_US = 2000, LAG_USUAL_US = 1000, LAG_WAITERS = 3 };

static struct {
    pthread_once_t once;
    _Atomic uint64_t lag_us, woken_us;
} patience = {.once = PTHREAD_ONCE_INIT};

static inline uint64_t patience_now_us(void) { return (uint64_t)(1e6 * clock_now_s()); }

// A thread that does nothing but sleep: what its sleeps take longer than they should, the whole process waits for processors.
static inline void *patience_watch(void *arg)
{
    for (;;) {
        uint64_t slept_us = patience_now_us() - atomic_load(&patience.woken_us);
        if (slept_us > LAG_SLEEP_US + LAG_USUAL_US)
            atomic_fetch_add(&patience.lag_us, slept_us - LAG_SLEEP_US);
        atomic_store(&patience.woken_us, patience_now_us());
        usleep(LAG_SLEEP_US);
    }
    return arg;
}

static inline void patience_begin(void)
{
    pthread_t thread;
    atomic_store(&patience.woken_us, patience_now_us());
    if (pthread_create(&thread, NULL, patience_watch, NULL) == 0)
        pthread_detach(thread);
}

// Not for the children of tests that fork: they are without the thread that watches.
struct stopwatch {
    double began_s;
    uint64_t lag_us;
};

static inline struct stopwatch stopwatch_start(void)
{
    pthread_once(&patience.once, patience_begin);
    return (struct stopwatch){clock_now_s(), atomic_load(&patience.lag_us)};
}

static inline double stopwatch_s(const struct stopwatch *watch) { return clock_now_s() - watch->began_s; }

// Without waits for a processor: those of client, server and whoever stands between them come one after the other.
static inline double stopwatch_idle_s(const struct stopwatch *watch)
{
    uint64_t asleep_us = patience_now_us() - atomic_load(&patience.woken_us);
    uint64_t lag_us = atomic_load(&patience.lag_us) - watch->lag_us;
    if (asleep_us > LAG_SLEEP_US + LAG_USUAL_US && asleep_us < 1u << 30)
        lag_us += asleep_us - LAG_SLEEP_US;
    return stopwatch_s(watch) - 1e-6 * LAG_WAITERS * (double)lag_us;
}

#endif
