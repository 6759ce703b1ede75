// Whether devices really reach each other's memory, as found out before ranks rely on it: each pair, both directions, with data that is looked at
// where it was to arrive (kernels/link_board.h says what is tried).
//
// A driver that hangs must hang nobody here. A process starts, orders and watches the ends, each of them a process of its own, and ends those that are
// late; what was found until then stays, in memory that all of them share. Who wants the verdict waits for it with a deadline.
//
// Pairs that share no device are tried at the same time, as in a tournament: n ends take n - 1 turns (n, where n is odd) of up to n / 2 pairs. So links are
// loaded as exchanges of all ranks load them, and a rate is what remains of it then. All of it ends within options.seconds.
#ifndef TPSHARD_ENGINE_LINK_PROBE_H
#define TPSHARD_ENGINE_LINK_PROBE_H

#include "kernels/backend.h"
#include "kernels/link_board.h"

#include <stdbool.h>

struct link_probe_options {
    const struct backend *backend; // with link_probe
    int num_ends;                  // at most LINK_ENDS
    int group;                     // ends a and b are a pair where a / group == b / group
    const int *device;             // [num_ends]; NULL: each where its rank computes
    const int *rank;               // [num_ends], then; NULL: that of its own number
    bool as_the_bus_counts;        // devices are numbered so
    bool all;     // every pair is tried, whatever comes of the others; else the first that does not deliver ends it
    bool at_once; // pairs are; else one by one, for the rate that each link has by itself, until some hang
    int rounds;   // of what is timed; 0: what is looked at is timed
    double open_s, step_s;  // longest times: of what a device does alone, its start too; of a step over a link
    double seconds;         // of everything: what is under way then is ended, and what was not tried is late
    uint64_t largest_bytes; // of a message, at most LINK_MOST_BYTES; 0: that
};
extern const struct link_probe_options link_probe_defaults; // for ranks that start

struct link_probe;

// Success: caller owns *out (link_probe_end), and the probe runs. Other threads may live; nothing of the driver is touched in this process.
int link_probe_begin(struct link_probe **out, const struct link_probe_options *options, struct error *err);
// Any process or thread that has been started since. Done: nothing on the board changes any more.
bool link_probe_is_done(const struct link_probe *probe);
// Done, or nobody watches it any more: there is nothing to wait for. It comes to that by itself.
bool link_probe_has_ended(const struct link_probe *probe);
double link_probe_age_s(const struct link_probe *probe);
// What is there, done or not.
const struct link_board *link_probe_board(const struct link_probe *probe);
// True: done, and every pair is good. Else the reason, a clause without a full stop: of a pair that does not deliver, or else of one that is slow, or why
// there is none.
bool link_probe_verdict(const struct link_probe *probe, char why[LINK_SENTENCE_BYTES]);
// Done, and whatever is written arrives: every pair is good, or merely slow.
bool link_probe_delivers(const struct link_probe *probe);
// Ends what still runs. What was found stays to be read.
void link_probe_stop(struct link_probe *probe);
// Stops it. Nobody else of this process uses the probe any more. Accepts NULL.
void link_probe_end(struct link_probe *probe);

// Waits until it has ended.
void link_probe_wait(const struct link_probe *probe);
const char *link_fault_name(enum link_fault fault); // "good", "refused", ...

#endif
