// What a rank does in the tests that start ranks as processes of their own, under mpirun or on other hosts. Its last line tells
// how that ended: "rank 1 of 3 after 0.20 s: all is well".
#ifndef TPSHARD_TESTS_COMM_RANK_HELP_H
#define TPSHARD_TESTS_COMM_RANK_HELP_H

#include "engine/comm.h"

// "all": comm_cases_all. "stop", "kill", "fail": rank 1 does so to itself while the others wait for it. "sums": sums until an
// error comes; "idle": waits for a command of rank 0 that never comes; both say "ready" first.
int comm_rank_body(const char *name, struct comm *comm, struct error *err);
// Longest wait of a case in ms.
int comm_rank_timeout_ms(const char *name);
// Memory for a region as "all" wants it.
struct comm_region *comm_rank_region(int ranks, int stages);
// Runs the body, tells how it ended and closes comm. Returns its result.
int comm_rank_run(const char *name, struct comm *comm, struct comm_region *region);

#endif
