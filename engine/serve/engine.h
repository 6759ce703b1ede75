// The engine behind the server: a session and its scheduler on a thread of their own. Requests come in from any thread; tokens go out through
// the callbacks of struct sequence_spec, on the engine's thread.
// Owns: the way of requests to that thread, the ranks' starts and ends, drain, restarts, signals. Leaves to others: what a step computes
// (scheduler.h), what ranks are (session.h), text, HTTP.
#ifndef TPSHARD_ENGINE_SERVE_ENGINE_H
#define TPSHARD_ENGINE_SERVE_ENGINE_H

#include "engine/scheduler.h"
#include "engine/session.h"

#include <stdbool.h>
#include <stdint.h>

enum engine_state { ENGINE_LOADING, ENGINE_READY, ENGINE_RESTARTING, ENGINE_DRAINING, ENGINE_FAILED };
const char *engine_state_name(enum engine_state state); // "loading", "ready" ...

struct engine_options {
    int64_t max_queue; // waiting sequences, beside those that compute
    int64_t draft_tokens;
    bool share_prefixes;
    double drain_timeout_s; // for what runs when a drain begins
    // Start the ranks again when one is lost: after restart_delay_s, twice that and so on up to a minute, until a start has lasted for half a
    // minute; at most restart_limit times within ten minutes.
    bool restart;
    double restart_delay_s;
    int64_t restart_limit;
    // Called in engine_run about every alive_s (0: never) as long as that thread goes on: between steps, or idle, loading, waiting. Not during a step.
    double alive_s;
    void (*on_alive)(void);
};
extern const struct engine_options engine_options_default;

struct engine;     // thread-safe
struct engine_job; // the sequences of one request

// Borrows the session, which no other thread uses from here on (but for what never changes). The ranks start in engine_run.
int engine_create(struct engine **out, struct session *session, const struct engine_options *options,
                  struct error *err);
// Runs on the calling thread until a drain is complete (0), or the ranks are lost for good. That thread forks the ranks and handles SIGINT and
// SIGTERM, so all others should block them: the first one drains, the second ends the process at once. Then mask and handlers are as before. Where
// a drain had to cut sequences short: ERR_SIGINT, ERR_SIGTERM. on_state is called here at every change, before sequences that the change ends
// hear of it.
int engine_run(struct engine *engine, void (*on_state)(void *arg, enum engine_state state), void *arg,
               struct error *err);
// After engine_run, and with no other thread in here. Accepts NULL.
void engine_free(struct engine *engine);

// The sequences of one request: of one tenant, taken whole or not at all. Neighbours with the same prompt (the same pointer) compute it once.
// ERR_BUSY: the queue is full, or half of its places are this tenant's while others are there (429). ERR_RANK: not ready, draining or failed
// (503). ERR_USAGE: what can never run, such as more sequences than there are places. ERR_MEMORY. The specs are copied, what they point to is
// borrowed until on_end. A callback may come before this returns. *out is valid until the last on_end of its sequences has returned. No lock of
// the engine is held while a callback runs.
enum { ERR_BUSY = -64 };
int engine_submit(struct engine *engine, const struct sequence_spec *specs, int64_t count, struct engine_job **out,
                  struct error *err);
// Ends one sequence of a job, or all (index -1), within a step. Harmless when it has ended; the caller knows that *job is still valid. Never waits.
void engine_cancel(struct engine *engine, struct engine_job *job, int64_t index);
// No new work; ends when what runs has ended or the time is over. A second call ends it at once. Any thread, signal handlers too.
void engine_drain(struct engine *engine);

enum engine_state engine_state(const struct engine *engine);
// A rank, as it was seen a moment ago.
struct engine_rank {
    int64_t pid, loaded_bytes, file_bytes, rss_bytes;
    int64_t losses;            // how often its failure has ended all ranks
    double exchange_s_total;   // in exchanges with other ranks, waiting included; of all starts
    double step_s_total;       // in steps outside of exchanges; likewise
    double load_s, load_cpu_s; // of the last start: until all of its weights were in place, and its CPU time until then
    struct load_figures load;  // the same
    char operation[24];        // "load", "attention" ...
    char device[128];
};
struct engine_stats {
    struct scheduler_stats scheduler; // totals over all starts
    bool ready;                       // the ranks take work (READY, DRAINING)
    int64_t queued;                   // accepted and not yet seen by the scheduler, and waiting there
    int64_t restarts;
    int64_t loaded_bytes; // weights of all starts
    double load_s,
        start_s;          // of the last start: weights; everything until ready, which is not before they are all there
    double step_s_total;  // time in steps, of all starts
    double retry_after_s; // estimate for a 429's Retry-After
    char error[ERROR_MSG_BYTES]; // why the ranks were lost last; ""
    int num_ranks;
    struct engine_rank ranks[COMM_MAX_RANKS];
};
void engine_read_stats(struct engine *engine, struct engine_stats *out);

#endif
