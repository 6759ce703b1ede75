// Starts the ranks of one model on this machine, as processes (fork, the default) or as threads of this process, and
// watches them: a dead rank is noticed at once (pidfd), a silent one by its deadline; then every rank ends, and one
// sentence names rank, operation and layer. The parent never touches weights, so it can never hang on them. The thread
// that called launch_start stays alive until launch_stop: ranks die with it. Other threads may live when it forks;
// rank_main then keeps to what is safe after that (malloc is), and the caller blocks SIGINT and SIGTERM in them. A rank
// process has no descriptor of its parent but 0 to 2, the launch's event and its own links. A launch can follow a launch, after a failure too.
//
// Signals: from launch_start to launch_stop SIGINT and SIGTERM of the process are handled here; rank processes ignore
// both, since Ctrl-C reaches them too and the parent ends them in order. launch_wait reports the first signal once and
// leaves the ranks as they are (drain or launch_stop, as the caller likes); the second signal ends the process and with
// it the ranks at once, exit code 130 or 143. So does the first one before any launch_wait: nobody would hear of it.
// Of several launches in one process, whichever waits next reports it.
//
// Where other ranks are other processes', they wait for the one rank that gets commands here, and it waits for the parent: it ends all of them when the parent
// is stopped for longer than wait_timeout_ms while no command runs. A rank that ends over an error wakes a stopped parent, so that this one says it and ends.
//
// All memory that ranks and parent share is anonymous (MAP_SHARED before the fork): nothing is left behind, however
// anyone ends.
#ifndef TPSHARD_ENGINE_LAUNCH_H
#define TPSHARD_ENGINE_LAUNCH_H

#include "engine/comm.h"
#include "formats/error.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct launch_options {
    int tp_size, pp_size; // ranks of a stage, and stages (0: 1); 1 to COMM_MAX_RANKS together
    bool threads;         // ranks as threads instead of processes
    int start_timeout_ms; // longest time without progress of a rank that starts or waits for weights; 0: 120000
    int wait_timeout_ms;  // longest wait in a collective; a busy rank may be silent for a quarter more; 0: 10000
    // SIGINT and SIGTERM are the caller's: launch_wait reports none (rank processes still ignore them).
    bool leave_signals;
    // Ranks of other processes, maybe on other hosts: links [tp_size * pp_size] are connected sockets to them, and only rank `only` runs here. The
    // sockets belong to the launch from now on, in every case but ERR_USAGE (the entries become -1). NULL: all ranks run here.
    int *links;
    int only;
    bool mpi; // with links: MPI carries what the ranks exchange (comm_mpi.h); its launcher has started the processes
    uint64_t comm_max_elems;     // largest all-reduce message in floats
    uint64_t comm_message_bytes; // from stage to stage; see comm_region_bytes
    size_t shared_bytes;         // the caller's own shared area, zeroed
};

// Shared between the parent and its ranks.
struct launch; // the parent's end

// One rank's view.
struct rank_env {
    int rank, num_ranks; // of all stages
    int tp_size;         // of this rank's stage
    bool spread;         // other ranks are other processes'; commands reach this rank's process at rank 0 alone
    struct comm *comm;   // the world's end: open, not yet shaken hands
    void *shared;        // the caller's shared area
    struct launch *launch;
};

// Runs on every rank; returns 0 or an error. While it runs it waits for commands with rank_next_command().
typedef int rank_main_fn(struct rank_env *env, void *arg, struct error *err);

// Starts the ranks. arg is seen by every rank as it was at the time of the call (copied by fork; shared with threads:
// read only).
int launch_start(struct launch **out, const struct launch_options *options, rank_main_fn *rank_main, void *arg,
                 struct error *err);
void *launch_shared(struct launch *launch);
// Where a rank is and in which process; this one's where ranks are threads.
struct comm_position launch_position(const struct launch *launch, int rank);
int64_t launch_pid(const struct launch *launch, int rank);
// The rank whose failure has ended all of them; -1: none has failed.
int launch_lost_rank(const struct launch *launch);

// Rank side: this rank has failed with err, and all others end. Whoever is first tells. At the latest when its main function returns an error.
void rank_failed(struct rank_env *env, int code, struct error *err);

// Rank side, from a signal handler too: why this rank is about to end its process. The parent says so; where ranks are threads, there is no parent,
// and it is written to standard error here.
void rank_ends(struct rank_env *env, const struct error *why);

// ---- commands: the parent posts one, all ranks take it, run it and report done ----------------------------------
// Rank side. Blocks (spins a bounded time, then sleeps) until the parent posts a command; *command receives it. Returns
// ERR_* when aborted. Command 0 means: end, return 0 from rank_main.
int rank_next_command(struct rank_env *env, int *command, struct error *err);
// Rank side, instead of it, for ranks whose commands come otherwise: this rank is ready for the first one.
void rank_is_ready(struct rank_env *env);
// Rank side: this rank has finished the command (all ranks must call it).
void rank_command_done(struct rank_env *env);
// Rank side, any thread: whether all ranks are to end. For who waits for anything but other ranks.
bool rank_is_stopped(const struct rank_env *env);
// Rank side, any time: wakes the parent's launch_wait with an event (new data in the shared area).
void rank_notify(struct rank_env *env);

// Parent side. Post: a number > 0 meaningful to rank_main (its data lie in the shared area). Only when no command is
// running.
int launch_post(struct launch *launch, int command, struct error *err);
// Parent side: waits until the ranks notify (returns 1), the running command is done on all ranks (returns 0), or
// something failed (< 0: the ranks are ended, err has the sentence). extra_fd (>= 0) is watched for input as well:
// returns 2. A signal: ERR_SIGINT or ERR_SIGTERM, the ranks go on. Before the first command it waits for all ranks to
// reach rank_next_command (returns 0, once). With no command running it waits for extra_fd, or returns 0 when there is
// none.
int launch_wait(struct launch *launch, int extra_fd, struct error *err);
// Parent side, for ranks whose commands come otherwise: waits until they have ended: 0 when as they were told. They decide about a first signal; a
// second one ends the process.
int launch_wait_end(struct launch *launch, struct error *err);
// Ends the ranks and frees everything: command 0, or an abort where they still start or a command is running; SIGKILL for those that
// live 3 s later. Accepts NULL. Returns the error of a rank that ended badly after the last launch_wait, or 0.
int launch_stop(struct launch *launch, struct error *err);

#endif
