// See session_offer.h.
#include "engine/session_offer.h"

#include "engine/comm.h"

#include <stdio.h>
#include <string.h>

// Chosen is what differs, not how it was said: --wire auto and the codec that it stands for go together.
static const char *const names[SESSION_OFFER_WORDS] = {
    "--wire",       "--wire-feedback", "--transport", "--sequence-parallel", "--overlap",
    "--check-sums", "--kv-cache",      "--verify",    "--context",
};

// Between devices an "auto" may end otherwise than the same transport that was asked for.
static const char *transport_word(const struct worker_options *w)
{
    bool of_devices = w->transport == TRANSPORT_HOST || w->transport == TRANSPORT_P2P || w->transport == TRANSPORT_NCCL;
    return of_devices && w->transport_is_auto ? "auto" : transport_name(w->transport);
}

void session_offer_make(struct session_offer *out, const struct worker_options *w, const struct session_options *given)
{
    char checked[SESSION_OFFER_WORD_BYTES], context[SESSION_OFFER_WORD_BYTES];
    // Not the worker's, which a command may have chosen for itself.
    const char *wire = strcmp(given->wire, "auto") == 0 ? w->manifest->wire_advice : given->wire;
    const char *deals = strcmp(given->sequence_parallel, "on") == 0 ? "on" : "off";
    snprintf(checked, sizeof checked, "%lld", (long long)given->check_sums);
    snprintf(context, sizeof context, "%lld", (long long)given->context);
    if (given->context == 0) // which nobody types
        snprintf(context, sizeof context, "(the default)");
    const char *const words[SESSION_OFFER_WORDS] = {
        wire,    given->wire_feedback, transport_word(w), deals,   given->overlap,
        checked, given->kv_cache,      given->verify,     context,
    };
    memset(out, 0, sizeof *out);
    rank_sums_of(&out->sums, w->backend, w->kernels);
    for (int i = 0; i < SESSION_OFFER_WORDS; i++)
        snprintf(out->words[i], sizeof out->words[i], "%s", words[i]);
}

// As session_offer_make makes them: all texts have their ends.
static bool is_offer(const struct session_offer *offer)
{
    bool ends =
        memchr(offer->sums.name, 0, sizeof offer->sums.name) && memchr(offer->sums.sums, 0, sizeof offer->sums.sums);
    for (int i = 0; i < SESSION_OFFER_WORDS; i++)
        ends = ends && memchr(offer->words[i], 0, sizeof offer->words[i]);
    return ends;
}

int session_offers_compare(const struct session_offer *all, int ranks, struct error *err)
{
    struct rank_sums sums[COMM_MAX_RANKS];
    for (int r = 0; r < ranks; r++) {
        if (!is_offer(&all[r]))
            return error_set(err, ERR_RANK,
                             "rank %d does not say what it would compute with as ranks of this version do", r);
        sums[r] = all[r].sums;
    }
    int rc = rank_sums_compare(sums, ranks, err);
    for (int i = 0; i < SESSION_OFFER_WORDS && !rc; i++)
        for (int r = 1; r < ranks && !rc; r++)
            if (memcmp(all[r].words[i], all[0].words[i], sizeof all[r].words[i]) != 0)
                rc = error_set(err, ERR_USAGE,
                               "rank 0 was started with %s %s, rank %d with %s %s: start all ranks with the same",
                               names[i], all[0].words[i], r, names[i], all[r].words[i]);
    return rc;
}
