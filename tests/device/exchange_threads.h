// Ranks whose devices exchange, as threads of one process.
#ifndef TPSHARD_TESTS_DEVICE_EXCHANGE_THREADS_H
#define TPSHARD_TESTS_DEVICE_EXCHANGE_THREADS_H

#include "tests/device/exchange_ends.h"

#include <thread>

enum { TIMEOUT_MS = 60000 };

// To be called before the device is: false where ranks that wait for each other's kernels cannot run, which it says.
static inline bool begin_exchange_tests(void)
{
    // On a device: its code is there before a kernel waits, and each stream has a queue of its own.
    setenv("CUDA_MODULE_LOADING", "EAGER", 1);
    setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);
    setenv("EMULATED_DEVICES", "8", 1);
    if (!quick() || emulator_present())
        return true;
    // What watches a kernel may run one at a time.
    puts(
        "SKIP: ranks that wait for each other's kernels, under a sanitizer; test_cuda_together has them in one launch");
    return false;
}

// Runs fn as every rank of a group, a thread each.
template <typename FN> static void run_ranks(void *way, int tp_size, int timeout_ms, bool feedback, FN fn)
{
    static struct end ends[TEST_RANKS];
    struct group g;
    open_group(&g, (const struct way *)way, tp_size, timeout_ms, feedback);
    g.host_timeout_ms = TIMEOUT_MS; // ranks may open late on a busy machine
    std::vector<std::thread> threads;
    for (int r = 0; r < tp_size; r++) {
        begin_end(&ends[r], &g, r);
        threads.emplace_back([=] {
            if (open_end(&ends[r]))
                fn(&ends[r]);
            close_end(&ends[r]);
        });
    }
    for (std::thread &t : threads)
        t.join();
    for (int r = 0; r < tp_size; r++)
        if (!ends[r].wrong.empty())
            fail_msg("%s", ends[r].wrong.c_str());
    close_group(&g);
}

#endif
