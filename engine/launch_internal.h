// What the files of a launch share.
//
//   launch.c       the parent: starting, commanding, watching and ending the ranks
//   launch_rank.c  a rank: its process or thread, and what it asks of the parent
#ifndef TPSHARD_ENGINE_LAUNCH_INTERNAL_H
#define TPSHARD_ENGINE_LAUNCH_INTERNAL_H

#include "engine/launch.h"
#include "kernels/futex.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/types.h>

enum {
    CACHE_LINE = 64,
    LOOK_MS = 50, // between two looks of who watches another
};

struct rank_state {
    _Alignas(CACHE_LINE) _Atomic uint32_t started;
    _Atomic uint32_t taken, done; // number of the last command
    _Atomic uint32_t returned;    // from rank_main, with code
    int code;
};

struct launch_area {
    _Alignas(CACHE_LINE) _Atomic uint32_t command_number; // raised by every command; ranks sleep on it
    _Atomic int command;
    _Alignas(CACHE_LINE) _Atomic uint32_t sleeping_ranks;
    _Alignas(CACHE_LINE) _Atomic uint32_t started_ranks, done_ranks, notices;
    struct rank_state ranks[COMM_MAX_RANKS];
};

// How long a process has been stopped, as far as it was seen. Zeros, or looked_ns of the time when it begins.
struct stop_watch {
    int64_t looked_ns, stopped_ns;
    bool stopped; // at the last look
};

// The parent's view of one rank.
struct rank_handle {
    pid_t pid; // processes
    int pidfd; // -1: none, waitpid is asked now and then
    pthread_t thread;
    bool running;
    uint64_t progress;      // at the last look
    int64_t silent_ns;      // since it last moved
    struct spinner spinner; // rank side
    struct rank_env env;
    struct launch *launch;
};

struct launch {
    struct launch_options options;
    rank_main_fn *rank_main;
    void *arg;
    bool spread;               // other ranks are other processes'
    int first, end;            // the ranks that run here
    int links[COMM_MAX_RANKS]; // [num_ranks] where ranks are other processes': what no rank has taken yet, else -1
    struct launch_area *area;
    struct comm_region *region;
    void *shared;
    size_t mapped_bytes;
    int num_ranks; // of all stages
    int event_fd;
    bool ready;           // all ranks have reached rank_next_command
    bool command_running; // posted, not yet done everywhere
    bool last_was_notice;
    bool handles_signals;
    struct sigaction before_int, before_term;
    int64_t looked_ns;
    struct stop_watch stop_watch; // where other ranks are elsewhere: of the one that runs here
    struct error error;           // code 0: nothing has failed
    int lost_rank;                // where it came from
    struct rank_handle ranks[COMM_MAX_RANKS];
};

static inline struct rank_state *launch_state_of(struct launch *launch, int rank) { return &launch->area->ranks[rank]; }

// Of those that run here.
static inline uint32_t launch_num_here(const struct launch *launch) { return (uint32_t)(launch->end - launch->first); }

void launch_wake_parent(int event_fd); // from a signal handler too
void launch_close_links(int *links, int count);

// Looks at the process every look_ms and returns its stop_watch's stopped_ns. Time in which the caller itself did not run counts little.
int64_t launch_stopped_ns(struct stop_watch *watch, pid_t pid, int look_ms);

// A rank from its begin to its end: a thread's function, of a struct rank_handle; and what a forked process of `parent` becomes.
void *launch_rank_thread(void *handle);
_Noreturn void launch_rank_process(struct rank_handle *handle, pid_t parent);

#endif
