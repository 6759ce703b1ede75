// Waiting between threads or processes: spin for a bounded time, then sleep in the kernel until the word changes. The
// word is any 32-bit atomic, also in memory shared between processes. Publishing is the caller's: a release (or
// stronger) change of the word before futex_wake, an acquire load after futex_wait; a sleep may end without cause.
#ifndef TPSHARD_KERNELS_FUTEX_H
#define TPSHARD_KERNELS_FUTEX_H

#include "kernels/clock.h"

#include <limits.h>
#include <linux/futex.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

// Sleeps while *word == value, at most timeout_ns (< 0: without limit).
static inline void futex_wait(_Atomic uint32_t *word, uint32_t value, int64_t timeout_ns)
{
    struct timespec timeout = {.tv_sec = timeout_ns / 1000000000, .tv_nsec = timeout_ns % 1000000000};
    syscall(SYS_futex, word, FUTEX_WAIT, value, timeout_ns < 0 ? NULL : &timeout, NULL, 0);
}

// Wakes at most count sleepers.
static inline void futex_wake(_Atomic uint32_t *word, int count)
{
    syscall(SYS_futex, word, FUTEX_WAKE, count, NULL, NULL, 0);
}

static inline void cpu_relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb" ::: "memory");
#endif
}

// How long a waiter spins. A sleep and its wake-up cost some tens of microseconds, so spinning that long at most
// doubles the cost of any wait. But a spin that fails has kept the core from whoever was to end it (a rank or thread
// without a core of its own, a foreign process): after failures the time shrinks, and only now and then is the full
// time tried again.
enum { SPIN_MAX_NS = 50000, SPIN_MIN_NS = 1000, SPIN_RETRY = 16 };

struct spinner {
    int64_t budget_ns;
    int failures; // since the last success or full try
};

static inline void spinner_init(struct spinner *spinner) { *spinner = (struct spinner){.budget_ns = SPIN_MAX_NS}; }

static inline void spinner_learn(struct spinner *spinner, bool success)
{
    bool full_time = success || ++spinner->failures >= SPIN_RETRY;
    int64_t less_ns = spinner->budget_ns / 2 > SPIN_MIN_NS ? spinner->budget_ns / 2 : SPIN_MIN_NS;
    spinner->budget_ns = full_time ? SPIN_MAX_NS : less_ns;
    if (full_time)
        spinner->failures = 0;
}

// One round of a spin: `while (!condition && spin_again(&spin)) {}`. False once the time is over.
struct spin {
    int64_t budget_ns, end_ns;
    unsigned rounds;
};

static inline struct spin spin_begin(const struct spinner *spinner)
{
    return (struct spin){.budget_ns = spinner->budget_ns};
}

static inline bool spin_again(struct spin *spin)
{
    cpu_relax();
    if (++spin->rounds % 8)
        return true;
    int64_t now_ns = clock_now_ns();
    if (!spin->end_ns)
        spin->end_ns = now_ns + spin->budget_ns;
    return now_ns < spin->end_ns;
}

#endif
