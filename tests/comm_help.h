// Ranks for tests of the collectives: a function that runs on each of them, as threads or as forked processes, and what came
// of it.
#ifndef TPSHARD_TESTS_COMM_HELP_H
#define TPSHARD_TESTS_COMM_HELP_H

#include "engine/comm.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

// Over sockets each rank has a region of its own: threads over Unix sockets, processes over TCP.
enum mode { THREADS, PROCESSES, SOCKET_THREADS, SOCKET_PROCESSES, MODE_COUNT };
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
// connections[a][b]: the socket of rank a to rank b; -1 for a == b. TCP over the loopback device, or Unix sockets.
void connect_ranks(int connections[COMM_MAX_RANKS][COMM_MAX_RANKS], int ranks, bool tcp);
// Runs body on every rank of the region; results [ranks] are shared memory.
void run_ranks_in(enum mode mode, struct comm_region *region, int ranks, int timeout_ms, comm_body *body, void *arg,
                  struct rank_result *results);
// With a fresh region, without and with stages; results belong to the caller until the next call.
struct rank_result *run_ranks(enum mode mode, int tp_size, uint64_t max_elems, int timeout_ms, comm_body *body,
                              void *arg);
struct rank_result *run_stages(enum mode mode, int tp_size, int pp_size, uint64_t message_bytes, int timeout_ms,
                               comm_body *body, void *arg);
// As run_stages with all that a region is made of.
struct rank_shape {
    int tp_size, pp_size, timeout_ms, start_timeout_ms;
    uint64_t max_elems, message_bytes;
};
struct rank_result *run_shape(enum mode mode, const struct rank_shape *shape, comm_body *body, void *arg);
void expect_success(const struct rank_result *results, int ranks, const char *what);
// Every rank left with the code, and with a sentence that holds all parts (NULL at the end).
void expect_error(const struct rank_result *results, int ranks, int code, const char *const *parts);

#endif
