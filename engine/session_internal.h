// What the session's files share.
//
//   session.c           opening, memory, start and end of the ranks, single steps
//   session_exchanges.c how its ranks exchange
//   session_generate.c  prompts run to their ends
//   session_ranks.c     ranks in processes that a launcher started
//   session_offer.c     what they compare
//   session_plan.c      what rank 0 tells them
//   session_links.c     what is known of the links between the devices
#ifndef TPSHARD_ENGINE_SESSION_INTERNAL_H
#define TPSHARD_ENGINE_SESSION_INTERNAL_H

#include "engine/numa.h"
#include "engine/session_offer.h"

struct session {
    struct store *store;
    char *raw_place; // as it was given: a URL's may hold what is secret
    const char *dir; // for messages
    struct manifest *manifest;
    struct worker_options worker;
    const char *backend_note; // for the user; NULL: none
    char threads_note[NUMA_NOTE_BYTES];
    bool ranks_are_threads, leave_signals, recomputes;
    int timeout_ms;
    int64_t draft_tokens;
    int64_t wanted_pages;
    bool settled;                // the next start's memory
    double needed_bytes;         // of the host, by that plan
    struct launcher_place where; // world_size > 1: ranks are processes that a launcher started
    const char *token_file;
    int join_timeout_ms;
    struct session_offer offer; // to the other processes' ranks
    bool met;                   // has started once
    struct error met_error;     // of that; code 0: none
    // While ranks run:
    struct launch *launch;
    struct link_probe *links; // of the devices, until the ranks are ready; NULL: nobody asks
    struct shared_area *shared;
    struct step_area area;
    struct forward_area forward;
    bool ready;
    struct scheduler *scheduler; // session_generate's
    struct start_figures start;  // of the last start
    struct tokenizer_file tokenizer;
};

// The ranks of other processes: finds them, agrees with them on the memory and fills links [ranks of all stages], which are the caller's. In rank 0's process the
// session's plan goes to the others, in theirs it becomes the session's.
int session_meet(struct session *session, int *links, struct error *err);
// What launch_start needs.
struct launch_options session_launch_options(const struct session *session, int *links);
// The places in shared memory, after launch_start.
void session_place(struct session *session);
// Takes the options of exchanges. The manifest, the launcher's place and the backend are known. ERR_USAGE with the reason: what was asked for cannot be had.
int session_choose_exchanges(struct session *session, const struct session_options *options, struct error *err);
// ERR_USAGE: the launcher's processes are not as many as the model's ranks.
int session_check_world(const struct session *session, struct error *err);
// ERR_USAGE: the vocabulary ends before one of them.
int session_check_tokens(const struct session *session, const uint32_t *tokens, int64_t count, struct error *err);

// Before ranks are started over TRANSPORT_P2P: their devices' links are tried, or have been for ranks of this process before. Where that cannot begin,
// ranks whose transport is chosen for them have the reason; for others it is an error. Called by the one thread that starts ranks, like the
// next two.
int session_begin_links(struct session *session, struct error *err);
// The ranks are ready, or have ended.
void session_end_links(struct session *session);
// Ranks were lost: their links may not be what they were. The next start tries them anew, where it can.
void session_doubt_links(void);

#endif
