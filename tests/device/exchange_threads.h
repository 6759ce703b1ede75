// Ranks whose devices exchange, as threads of one process.
#ifndef TPSHARD_TESTS_DEVICE_EXCHANGE_THREADS_H
#define TPSHARD_TESTS_DEVICE_EXCHANGE_THREADS_H

#include "tests/device/exchange_ends.h"

#include <thread>

enum { TIMEOUT_MS = 60000 };

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
