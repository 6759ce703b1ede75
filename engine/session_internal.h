// What the session's files share.
//
//   session.c           opening, memory, start and end of the ranks, single steps
//   session_generate.c  prompts run to their ends
#ifndef TPSHARD_ENGINE_SESSION_INTERNAL_H
#define TPSHARD_ENGINE_SESSION_INTERNAL_H

#include "engine/session.h"

struct session {
    struct store *store;
    char *raw_place; // as it was given: a URL's may hold what is secret
    const char *dir; // for messages
    struct manifest *manifest;
    struct worker_options worker;
    const char *backend_note; // for the user; NULL: none
    bool ranks_are_threads, leave_signals, recomputes;
    int timeout_ms;
    int64_t draft_tokens;
    int64_t wanted_pages;
    bool settled;        // the next start's memory
    double needed_bytes; // of the host, by that plan
    // While ranks run:
    struct launch *launch;
    struct shared_area *shared;
    struct step_area area;
    struct forward_area forward;
    bool ready;
    struct scheduler *scheduler; // session_generate's
    struct start_figures start;  // of the last start
    struct tokenizer_file tokenizer;
};

// ERR_USAGE: the vocabulary ends before one of them.
int session_check_tokens(const struct session *session, const uint32_t *tokens, int64_t count, struct error *err);

#endif
