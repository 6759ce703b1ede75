// What a rank of another process would compute with and how, by its own command line: ranks whose offers differ are refused when they meet. What is of
// the command, rank 0's plan says (session_plan.h); what the user has said of --verify and --context is compared, too. What is of one host (threads, pinning,
// the way weights are read) and deadlines need not agree.
#ifndef TPSHARD_ENGINE_SESSION_OFFER_H
#define TPSHARD_ENGINE_SESSION_OFFER_H

#include "engine/rank_backends.h"
#include "engine/rendezvous_wire.h"
#include "engine/session.h"

enum { SESSION_OFFER_WORDS = 9, SESSION_OFFER_WORD_BYTES = 16 };

struct session_offer {
    struct rank_sums sums;
    char words[SESSION_OFFER_WORDS][SESSION_OFFER_WORD_BYTES]; // of options, as they would be given
};
_Static_assert(sizeof(struct session_offer) <= MEET_OFFER_BYTES, "within what a rank says when it joins");

// worker: manifest, backend, kernels and transport are chosen. given: what the user has said.
void session_offer_make(struct session_offer *out, const struct worker_options *worker,
                        const struct session_options *given);
// all [ranks], of which but the first may be any bytes: ERR_RANK for one that is no offer.
// ERR_USAGE with both values: the first rank that differs from rank 0. What computes comes first: other differences may follow from it.
int session_offers_compare(const struct session_offer *all, int ranks, struct error *err);

#endif
