// Progress of long work on stderr: one redrawn line on a terminal, else a plain line every 10 % or 10 s, or nothing.
#ifndef TPSHARD_SHARD_PROGRESS_H
#define TPSHARD_SHARD_PROGRESS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

struct progress {
    const char *what; // "convert"
    uint64_t total_bytes;
    atomic_uint_fast64_t done_bytes;
    bool quiet, terminal, drawn;
    char label[96]; // what is being worked on; changed between pool runs only
    double started_s, shown_s;
    uint64_t shown_bytes, resumed_bytes;
};

void progress_start(struct progress *progress, const char *what, uint64_t total_bytes, bool quiet);
void progress_add(struct progress *progress, uint64_t bytes);     // any thread
void progress_resumed(struct progress *progress, uint64_t bytes); // done by an earlier run: not counted in the rate
// Shows what is due; cheap. Only from the thread that called progress_start.
void progress_show(struct progress *progress);
// Clears the redrawn line.
void progress_end(struct progress *progress);
double progress_seconds(const struct progress *progress);

// "1.5 GB", "12 MB": decimal units. The buffer is returned.
char *progress_bytes_text(char buffer[32], uint64_t bytes);
// Largest resident memory of this process so far.
uint64_t progress_peak_memory_bytes(void);

#endif
