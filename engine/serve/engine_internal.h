// What the files of the engine share. Nobody else includes it.
//
// engine.c: what any thread may call; engine_work.c: jobs and figures, engine_run.c: ranks, drain and restarts, both on the engine's thread.
//
// One mutex guards the state, the list of jobs that the engine's thread has not yet taken, and the published figures; nobody holds it while
// anything else happens. An eventfd wakes the engine's thread from session_wait, which also watches the ranks; while they load, a timer does, for
// the figures.
#ifndef TPSHARD_ENGINE_SERVE_ENGINE_INTERNAL_H
#define TPSHARD_ENGINE_SERVE_ENGINE_INTERNAL_H

#include "engine/serve/engine.h"
#include "engine/serve/places.h"
#include "kernels/clock.h"

#include <pthread.h>
#include <stdatomic.h>

enum { ENGINE_LOOK_MS = 200 }; // between two looks at the ranks' figures
enum { ENGINE_MAX_RESTARTS = 1000 };

// One sequence of a job.
struct entry {
    struct engine_job *job;
    struct sequence_spec spec; // the caller's
    struct sequence *sequence; // NULL: not with the scheduler
    atomic_bool cancelled;
    bool ended;
};

struct engine_job {
    struct engine *engine;
    uint64_t tenant;
    struct engine_job *next;            // not yet taken
    struct engine_job *before, *behind; // taken: the engine thread's list
    struct sequence_spec *specs;        // as the scheduler sees them
    int64_t count, left;                // sequences; those that have not ended, and holds
    struct entry entries[];
};

struct engine {
    struct session *session;
    struct engine_options options;
    int wake_fd, timer_fd, wait_fd; // wait_fd: has input when one of the others has
    uint64_t hash_seed;
    int64_t max_live; // sequences
    atomic_int drains, signal;
    atomic_bool woken, cancels; // the eventfd is set; some entry's cancelled is
    atomic_llong room_tokens;   // of one sequence: what the context and the KV cache hold

    pthread_mutex_t mutex; // for these:
    atomic_int state;      // changed under it, read anywhere
    struct engine_job *submitted, **submitted_end;
    int64_t num_submitted; // sequences
    struct places places;  // those of accepted sequences that have not ended are taken
    struct engine_stats stats;

    // The engine thread's own.
    struct scheduler *scheduler;
    struct step_runner runner; // the session's
    struct engine_job *taken;  // newest first
    struct engine_stats now;
    struct scheduler_stats past;            // of earlier starts
    double past_exchange_s[COMM_MAX_RANKS]; // the same
    double looked_s;                        // at the ranks
    double alive_s;                         // when on_alive was last called
    void (*on_state)(void *arg, enum engine_state state);
    void *on_state_arg;
    bool was_ready, cut_short;
    bool launched, lost, restarts; // this start: has ranks to ask, has ended in an error, is followed by another one
    double drain_end_s;            // 0: no drain yet
    double ready_s;                // when the ranks were last ready
    double sequence_s;             // running mean of a sequence's time in its slot
    double restarts_s[ENGINE_MAX_RESTARTS];
    int64_t num_restarts; // in the window
    double delay_s;       // before the next one
};

// engine.c
void engine_wake(struct engine *engine); // also from signal handlers
void engine_job_free(struct engine_job *job);
void engine_copy_stats(struct engine_stats *to,
                       const struct engine_stats *from); // of the many ranks that there could be, those that are

// engine_work.c
// The callbacks of every sequence, with its entry: pass on to the caller's.
bool engine_work_tokens(void *arg, const struct step_choice *choices, int64_t count);
void engine_work_end(void *arg, enum finish_reason reason, const struct sequence_usage *usage, uint32_t stop_token,
                     const struct error *err);
void engine_work_add(struct engine *engine);                             // what was submitted goes to the scheduler
void engine_work_refuse(struct engine *engine, const struct error *why); // or ends
void engine_work_cancel(struct engine *engine);                          // what was marked
void engine_work_look(struct engine *engine, bool at_once); // at the ranks, now and then: it costs more than a step may
void engine_work_publish(struct engine *engine);

#endif
