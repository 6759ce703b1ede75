// Ranks for tests of the collectives: a function that runs on each of them, as threads or as forked processes, and what came
// of it.
#ifndef TPSHARD_TESTS_COMM_HELP_H
#define TPSHARD_TESTS_COMM_HELP_H

#include "engine/comm.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

enum mode { THREADS, PROCESSES };
extern const char *const mode_names[];

typedef int comm_body(struct comm *comm, void *arg, struct error *err);

struct rank_result {
    int code; // -99: it never returned
    struct error error;
    double seconds;
};

// Zeroed memory that forked processes share.
void *map_shared(size_t bytes);
uint64_t mix(uint64_t x); // 64 bits that look random
// Runs body on every rank of the region; results [ranks] are shared memory.
void run_ranks_in(enum mode mode, struct comm_region *region, int ranks, int timeout_ms, comm_body *body, void *arg,
                  struct rank_result *results);
// With a fresh region, without and with stages; results belong to the caller until the next call.
struct rank_result *run_ranks(enum mode mode, int tp_size, uint64_t max_elems, int timeout_ms, comm_body *body,
                              void *arg);
struct rank_result *run_stages(enum mode mode, int tp_size, int pp_size, uint64_t message_bytes, int timeout_ms,
                               comm_body *body, void *arg);
void expect_success(const struct rank_result *results, int ranks, const char *what);
// Every rank left with the code, and with a sentence that holds all parts (NULL at the end).
void expect_error(const struct rank_result *results, int ranks, int code, const char *const *parts);

#endif
