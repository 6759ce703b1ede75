// See progress.h.
#include "shard/progress.h"

#include "kernels/clock.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

void progress_start(struct progress *progress, const char *what, uint64_t total_bytes, bool quiet)
{
    const char *terminal = getenv("TERM");
    memset(progress, 0, sizeof *progress);
    progress->what = what;
    progress->total_bytes = total_bytes;
    progress->quiet = quiet;
    progress->terminal = isatty(STDERR_FILENO) && terminal && strcmp(terminal, "dumb") != 0;
    progress->started_s = progress->shown_s = clock_now_s();
}

void progress_add(struct progress *progress, uint64_t bytes) { atomic_fetch_add(&progress->done_bytes, bytes); }

void progress_resumed(struct progress *progress, uint64_t bytes)
{
    progress->resumed_bytes += bytes;
    progress_add(progress, bytes);
}

double progress_seconds(const struct progress *progress) { return clock_now_s() - progress->started_s; }

void progress_show(struct progress *progress)
{
    if (progress->quiet || progress->total_bytes == 0)
        return;
    double now = clock_now_s();
    uint64_t done = atomic_load(&progress->done_bytes);
    bool tenth = done * 10 / progress->total_bytes != progress->shown_bytes * 10 / progress->total_bytes;
    if (progress->terminal ? now - progress->shown_s < 0.1 : now - progress->shown_s < (tenth ? 1 : 10))
        return;
    double rate = (double)(done - progress->resumed_bytes) / (now - progress->started_s);
    // What was not foreseen belongs to the whole, too.
    uint64_t total = done > progress->total_bytes ? done : progress->total_bytes;
    double left_s = rate > 0 ? (double)(total - done) / rate : 0;
    char done_text[32], total_text[32], rate_text[32];
    fprintf(stderr, "%s%s: %3.0f %%  %s of %s  %s/s  %.0f s left  %s%s", progress->terminal ? "\r" : "", progress->what,
            100.0 * (double)done / (double)total, progress_bytes_text(done_text, done),
            progress_bytes_text(total_text, total), progress_bytes_text(rate_text, (uint64_t)rate), left_s,
            progress->label, progress->terminal ? "\033[K" : "\n");
    progress->drawn = progress->terminal;
    progress->shown_s = now;
    progress->shown_bytes = done;
}

void progress_end(struct progress *progress)
{
    if (progress->drawn)
        fputs("\r\033[K", stderr);
    progress->drawn = false;
}

char *progress_bytes_text(char buffer[32], uint64_t bytes)
{
    static const char *const units[] = {"B", "kB", "MB", "GB", "TB", "PB"};
    double value = (double)bytes;
    size_t unit = 0;
    for (; value >= 999.5 && unit + 1 < sizeof units / sizeof units[0]; unit++)
        value /= 1000;
    snprintf(buffer, 32, "%.*f %s", unit == 0 || value >= 100 ? 0 : value >= 10 ? 1 : 2, value, units[unit]);
    return buffer;
}

uint64_t progress_peak_memory_bytes(void)
{
    struct rusage usage;
    return getrusage(RUSAGE_SELF, &usage) ? 0 : (uint64_t)usage.ru_maxrss * 1024;
}
